"""Feedback Transformer: one memory, made of all layers, read by all layers.

Fan et al., "Addressing Some Limitations of Transformers with Feedback Memory", 2020
(arXiv 2002.09402). Each step leaves one memory vector, a mixture of the outputs of all
its layers; each layer of each later step attends to these vectors (section 3.2). So the
lowest layer of now sees the highest layer of before, and steps must wait for steps.

Letters in the shape comments: B batch, T tokens in the segment, M vectors in memory
(one more with each step, up to mem_len), L layers, H heads, d_model = H * d_head.
"""

import torch
from torch import nn

from memtx_minimal import inputs


class Layer(nn.Module):
    """One layer at one step: attention to memory, then feed-forward."""

    def __init__(self, d_model, n_heads, d_ff, dropout):
        super().__init__()
        self.n_heads = n_heads
        self.query = nn.Linear(d_model, d_model, bias=False)
        self.out = nn.Linear(d_model, d_model, bias=False)
        self.feed_forward = nn.Sequential(
            nn.Linear(d_model, d_ff), nn.ReLU(), nn.Linear(d_ff, d_model)
        )
        self.norm_attention = nn.LayerNorm(d_model)
        self.norm_feed_forward = nn.LayerNorm(d_model)
        self.dropout = nn.Dropout(dropout)

    def attention(self, x, keys, values):
        """x (B, d_model), keys and values (B, H, M, d_head) -> like x."""
        q = self.query(x).unflatten(-1, (self.n_heads, 1, -1))  # (B, H, 1, d_head)
        scores = q.size(-1) ** -0.5 * q @ keys.mT  # (B, H, 1, M)
        weights = self.dropout(scores.softmax(dim=-1))
        return self.out((weights @ values).flatten(1))  # (B, d_model)

    def forward(self, x, keys, values):
        """The state x (B, d_model) and what it sees -> the next state (B, d_model)."""
        x = x + self.dropout(self.attention(self.norm_attention(x), keys, values))
        return x + self.dropout(self.feed_forward(self.norm_feed_forward(x)))


class Memory(nn.Module):
    """From the states of a step to its memory vector, then to keys and values."""

    def __init__(self, d_model, n_heads, n_layers, mem_len, shared_kv):
        super().__init__()
        self.n_heads = n_heads
        self.layer_weights = nn.Parameter(torch.zeros(n_layers + 1))  # w
        self.norm = nn.LayerNorm(d_model)
        n_kv = 1 if shared_kv else n_layers
        self.key_value = nn.Linear(d_model, n_kv * 2 * d_model, bias=False)
        self.positions = nn.Parameter(torch.randn(mem_len, d_model // n_heads))

    def vector(self, states):
        """The mixture of L + 1 states (B, d_model), embedding first -> (B, d_model)."""
        weights = self.layer_weights.softmax(dim=0)
        return torch.einsum("l,lbd->bd", weights, torch.stack(states))

    def keys_values(self, vectors):
        """Vectors (B, M, d_model) -> kv (B, M, n_kv, 2, H, d_head)."""
        kv = self.key_value(self.norm(vectors))  # (B, M, n_kv * 2 * d_model)
        return kv.unflatten(-1, (-1, 2, self.n_heads, self.positions.size(1)))

    def seen(self, kv):
        """Keys with their ages added, and values, (n_kv, B, H, M, d_head) each."""
        keys, values = kv.permute(3, 2, 0, 4, 1, 5)
        oldest = len(self.positions) - keys.size(-2)
        keys = keys + self.positions[oldest:]  # ages M ... 2, 1
        return keys.contiguous(), values.contiguous()  # not in each layer anew


def embed(model, tokens):
    """Tokens (B, T), checked -> what the steps begin with, (B, T, d_model)."""
    inputs.check_number("mem_len", model.mem_len, 1, len(model.memory.positions))
    inputs.check_tokens(tokens, model.embedding.num_embeddings)
    return model.dropout(model.embedding(tokens))


def step(model, x, kv):
    """One token x (B, d_model) -> its output and memory vector, (B, d_model) each."""
    keys, values = model.memory.seen(kv)
    states = [x]
    for n, layer in enumerate(model.layers):
        n_kv = n % len(keys)  # which set: 0 for every layer if they share one
        states.append(layer(states[-1], keys[n_kv], values[n_kv]))
    return states[-1], model.memory.vector(states)


class FeedbackTransformer(nn.Module):
    """A language model whose layers all read one memory of what all layers found.

    tokens (B, T) int64, memory -> logits (B, T, vocab_size), memory: the latest mem_len
    vectors, (B, M, d_model), detached. Pass None at the start of a stream. mem_len may
    be lowered at any time. shared_kv: one projection to keys and values for all layers,
    or one for each.
    """

    def __init__(
        self, vocab_size, d_model=128, n_heads=4, n_layers=4, d_ff=512,
        mem_len=64, shared_kv=True, dropout=0.0,
    ):  # fmt: skip
        super().__init__()
        inputs.check_sizes(locals())
        inputs.check_number("mem_len", mem_len, 1)
        self.mem_len, self.shared_kv = mem_len, shared_kv
        self.embedding = nn.Embedding(vocab_size, d_model)
        self.dropout = nn.Dropout(dropout)
        stack = (Layer(d_model, n_heads, d_ff, dropout) for _ in range(n_layers))
        self.layers = nn.ModuleList(stack)
        self.memory = Memory(d_model, n_heads, n_layers, mem_len, shared_kv)
        self.norm, self.head = nn.LayerNorm(d_model), nn.Linear(d_model, vocab_size)

    def loop(self, x, kv):
        """x (B, T, d_model), step by step -> outputs, vectors, the latest kv."""
        outputs, vectors = [], []
        for x_t in x.unbind(dim=1):
            output, vector = step(self, x_t, kv)
            new = self.memory.keys_values(vector[:, None])  # (B, 1, n_kv, 2, H, d_head)
            kv = torch.cat([kv, new], dim=1)[:, -self.mem_len :]
            outputs.append(output)
            vectors.append(vector)
        return torch.stack(outputs, dim=1), torch.stack(vectors, dim=1), kv

    def forward(self, tokens, memory=None):
        x = embed(self, tokens)  # (B, T, d_model)
        memory = inputs.checked_memory(memory, x[:, :0].detach())  # none yet: M = 0
        old = memory[:, -self.mem_len :]  # (B, M, d_model)
        outputs, new, _ = self.loop(x, self.memory.keys_values(old))
        memory = torch.cat([old, new], dim=1)[:, -self.mem_len :].detach()
        return self.head(self.norm(outputs)), memory.clone()


class Cached(nn.Module):
    """A FeedbackTransformer for generation: its memory is keys and values, made once.

    tokens (B, T) int64, memory -> logits (B, T, vocab_size), memory: one tensor
    (B, M, n_kv, 2, H, d_head). Pass None at the start of a stream. Several texts may go
    on from one memory, since nothing is written in place. There are no gradients.
    """

    def __init__(self, model):
        super().__init__()
        self.model = model

    @torch.no_grad()
    def forward(self, tokens, memory=None):
        model = self.model
        x = embed(model, tokens)  # (B, T, d_model)
        nothing_yet = model.memory.keys_values(x[:, :0])
        kv = inputs.checked_memory(memory, nothing_yet)[:, -model.mem_len :]
        outputs, _, kv = model.loop(x, kv)
        return model.head(model.norm(outputs)), kv
