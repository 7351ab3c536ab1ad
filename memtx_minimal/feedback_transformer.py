"""Feedback Transformer: one memory, made of all layers, read by all layers.

Fan et al., "Addressing Some Limitations of Transformers with Feedback Memory", 2020
(arXiv 2002.09402). Each step leaves one memory vector, a mixture of what its layers have
worked out; each layer of each later step attends to these vectors (section 3.2). So
the lowest layer of now sees the highest layer of before, and steps must wait for steps.

Letters in the shape comments: B batch, T tokens in the segment, M vectors in memory,
K vectors that a step sees, at most mem_len, L layers, H heads, d_model = H * d_head.
"""

from typing import NamedTuple

import torch
from torch import nn
from torch.nn.functional import pad

from memtx_minimal import inputs
from memtx_minimal.feedback_segment import Segment, run


class Layer(nn.Module):
    """One layer at one step: attention to memory, feed-forward; a residual around each."""

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
        """x (B, d_model), keys and values (B, H, K, d_head) -> like x."""
        q = self.query(x).unflatten(-1, (self.n_heads, 1, -1))  # (B, H, 1, d_head)
        scores = q.size(-1) ** -0.5 * q @ keys.mT  # (B, H, 1, K)
        weights = self.dropout(scores.softmax(dim=-1))
        return self.out((weights @ values).flatten(1))  # (B, d_model)

    def forward(self, x, keys, values):
        """x (B, d_model) and what the step sees -> the step's new state (B, d_model)."""
        x = x + self.dropout(self.attention(self.norm_attention(x), keys, values))
        return x + self.dropout(self.feed_forward(self.norm_feed_forward(x)))


class Memory(nn.Module):
    """From the states of a step to a memory vector, and from there to keys and values."""

    def __init__(self, d_model, n_heads, n_layers, mem_len, shared_kv):
        super().__init__()
        self.n_heads = n_heads
        self.layer_weights = nn.Parameter(torch.zeros(n_layers + 1))
        self.norm = nn.LayerNorm(d_model)
        n_kv = 1 if shared_kv else n_layers
        self.key_value = nn.Linear(d_model, n_kv * 2 * d_model, bias=False)
        self.positions = nn.Parameter(torch.randn(mem_len, d_model // n_heads))

    def vector(self, states):
        """The mixture: L + 1 states (B, d_model), embedding first -> (B, d_model)."""
        weights = self.layer_weights.softmax(dim=0)
        return torch.einsum("l,lbd->bd", weights, torch.stack(states))

    def keys_values(self, vectors):
        """(B, n, d_model) -> (n_kv, 2, B, H, n, d_head): keys and values."""
        kv = self.key_value(self.norm(vectors))  # (B, n, n_kv * 2 * d_model)
        kv = kv.unflatten(-1, (-1, 2, self.n_heads, self.positions.size(1)))
        return kv.permute(2, 3, 0, 4, 1, 5)  # (n_kv, 2, B, H, n, d_head)

    def seen(self, kv, mem_len):
        """The latest mem_len: keys with their ages, values, (n_kv, B, H, K, d_head)."""
        keys, values = kv[..., -mem_len:, :].unbind(1)
        positions = self.positions[len(self.positions) - keys.size(-2) :]  # ages K ... 1
        return keys + positions, values.clone()  # not a view, which would keep all of kv


def step(model, x, kv):
    """One token x (B, d_model) -> its output and its memory vector, (B, d_model) each."""
    keys, values = model.memory.seen(kv, model.mem_len)
    states = [x]
    for n, layer in enumerate(model.layers):
        n_kv = n % len(keys)  # 0 where the layers share keys and values
        states.append(layer(states[-1], keys[n_kv], values[n_kv]))
    return states[-1], model.memory.vector(states)


def loop(model, x, kv):
    """Step by step: x (B, T, d_model) -> outputs, vectors, keys and values with T more."""
    outputs, vectors = [], []
    for x_t in x.unbind(dim=1):
        output, vector = step(model, x_t, kv)
        kv = torch.cat([kv, model.memory.keys_values(vector[:, None])], dim=-2)
        outputs.append(output)
        vectors.append(vector)
    return torch.stack(outputs, dim=1), torch.stack(vectors, dim=1), kv


ROOM = 64  # slots that a cache keeps free for what comes next


class Cache(NamedTuple):
    """Memory without gradients: keys and values in slots, with room behind them.

    The first to go on with the text writes into the room. Anybody else who goes on from
    the same place gets a copy. So what a cache holds never changes.
    """

    kv: torch.Tensor  # (n_kv, 2, B, H, slots, d_head)
    end: int  # this text's slots are those before it
    taken: list  # of one number: the slots taken by any of the caches that share them

    @classmethod
    def of(cls, kv):
        """A cache with slots of its own, and no room yet."""
        n = kv.size(-2)
        return cls(kv.contiguous(), n, [n])

    def latest(self, n):
        """Keys and values of the latest n slots, or of all."""
        return self.kv[..., max(0, self.end - n) : self.end, :]

    def with_more(self, T, mem_len):
        """A cache with T more slots, to be filled in: these slots, if there is room."""
        end = self.end + T
        if self.taken[0] == self.end and end <= self.kv.size(-2):
            self.taken[0] = end
            return self._replace(end=end)
        kv, room = self.latest(mem_len), max(T, ROOM) if self.end else T
        end = kv.size(-2) + T
        return Cache(pad(kv, (0, 0, 0, room)), end, [end])


torch.serialization.add_safe_globals([Cache])  # so that torch.load reads one


def recall(model, memory, x):
    """The caller's memory, checked -> vectors with gradients, a Cache without."""
    ages, trains = len(model.memory.positions), torch.is_grad_enabled()
    inputs.check_number("mem_len", model.mem_len, 1, ages)
    if trains and isinstance(memory, Cache):
        raise ValueError("a memory made under no_grad does not train: start with None")
    if isinstance(memory, Cache):
        by_stream = (2, 4), (0, 1)  # (B, slots, n_kv, 2, H, d_head)
        like = model.memory.keys_values(x[:, :0]).type_as(x).movedim(*by_stream)
        inputs.checked_memory(memory.kv.movedim(*by_stream), like)
        return memory
    memory = inputs.checked_memory(memory, x[:, :0].detach())  # nothing yet: (B, 0, d_model)
    return memory if trains else Cache.of(model.memory.keys_values(memory).type_as(x))


def from_vectors(model, x, vectors, by_hand):
    """x (B, T, d_model) -> outputs, memory. Old vectors get keys and values anew."""
    run_steps = segment if by_hand else loop
    outputs, new, *_ = run_steps(model, x, model.memory.keys_values(vectors))
    memory = torch.cat([vectors, new], dim=1)[:, -model.mem_len :]
    return outputs, memory.detach().clone()


def from_cache(model, x, cache, by_hand):
    """x (B, T, d_model) -> outputs, memory. Nothing is computed twice."""
    if by_hand:
        cache = cache.with_more(x.size(1), model.mem_len)
        outputs, _ = run(x, cache.latest(cache.end)[0], *weights_of(model)).results()
        if cache.kv.size(-2) <= model.mem_len + ROOM:
            return outputs, cache
        kv = cache.latest(model.mem_len)  # of a long text, only the end is remembered
    else:
        outputs, _, kv = loop(model, x, cache.latest(model.mem_len))
    return outputs, Cache.of(kv[..., -model.mem_len :, :])


class FeedbackTransformer(nn.Module):
    """A language model whose every layer reads one memory of what all layers found before.

    tokens (B, T) int64, memory -> logits (B, T, vocab_size), memory. Pass None at the start
    of a stream. With gradients memory is the latest mem_len vectors, (B, M, d_model),
    detached; without, it is a Cache of their keys and values. mem_len may be lowered at any
    time. shared_kv: one projection to keys and values for all layers, or one for each.
    by_hand: the backward pass of feedback_segment.py, where it applies (shared_kv, no
    dropout at work), or always autograd's.
    """

    def __init__(
        self, vocab_size, d_model=128, n_heads=4, n_layers=4, d_ff=512,
        mem_len=64, shared_kv=True, by_hand=True, dropout=0.0,
    ):  # fmt: skip
        super().__init__()
        inputs.check_sizes(locals())
        inputs.check_number("mem_len", mem_len, 1)
        self.mem_len, self.shared_kv, self.by_hand = mem_len, shared_kv, by_hand
        self.embedding = nn.Embedding(vocab_size, d_model)
        self.dropout = nn.Dropout(dropout)
        stack = (Layer(d_model, n_heads, d_ff, dropout) for _ in range(n_layers))
        self.layers = nn.ModuleList(stack)
        self.memory = Memory(d_model, n_heads, n_layers, mem_len, shared_kv)
        self.norm, self.head = nn.LayerNorm(d_model), nn.Linear(d_model, vocab_size)

    def forward(self, tokens, memory=None):
        inputs.check_tokens(tokens, self.embedding.num_embeddings)
        x = self.dropout(self.embedding(tokens))  # (B, T, d_model)
        memory = recall(self, memory, x)
        dropout = self.training and self.dropout.p > 0
        by_hand = self.by_hand and self.shared_kv and not dropout
        run_steps = from_vectors if torch.is_grad_enabled() else from_cache
        outputs, memory = run_steps(self, x, memory, by_hand)
        return self.head(self.norm(outputs)), memory


def weights_of(model):
    """The tensors that a segment is computed with, as a flat list: ten at the end a layer."""
    memory = model.memory
    flat = [
        memory.layer_weights.softmax(dim=0),
        memory.positions[-model.mem_len :],
        memory.norm.weight, memory.norm.bias, memory.key_value.weight,
    ]  # fmt: skip
    for layer in model.layers:
        norm, feed_forward_norm = layer.norm_attention, layer.norm_feed_forward
        inner, _, outer = layer.feed_forward
        flat += [norm.weight, norm.bias, layer.query.weight, layer.out.weight]
        flat += [feed_forward_norm.weight, feed_forward_norm.bias]
        flat += [inner.weight, inner.bias, outer.weight, outer.bias]
    return flat


def segment(model, x, kv):
    """What loop does, as one operation whose backward pass is written by hand."""
    return Segment.apply(x, kv[0], *weights_of(model))


@torch.no_grad()
def start_from_parallel(model, vanilla):
    """Copy the weights of a trained VanillaTransformer of the same sizes into model.

    A layer's projection to keys and values is copied with the gain of the norm before it;
    where the layers share one, it is the mean of theirs. Vanilla knows no ages and no
    mixture of layers: the positions and the layer weights stay as they are.
    """
    for name, ours, theirs in [
        ("n_layers", len(model.layers), len(vanilla.layers)),
        ("n_heads", model.memory.n_heads, vanilla.layers[0].attention.n_heads),
        ("vocab_size, d_model", *(tuple(m.embedding.weight.shape) for m in (model, vanilla))),
        ("d_ff", *(m.layers[0].feed_forward[0].out_features for m in (model, vanilla))),
    ]:
        if ours != theirs:
            raise ValueError(f"{name}: {ours} here, {theirs} in vanilla: build both alike")
    for name in ("embedding", "norm", "head"):
        getattr(model, name).load_state_dict(getattr(vanilla, name).state_dict())
    projections = []
    for ours, theirs in zip(model.layers, vanilla.layers):
        W_q, *W_kv = theirs.attention.query_key_value.weight.chunk(3)
        ours.query.weight.copy_(W_q)
        ours.out.load_state_dict(theirs.attention.out.state_dict())
        for name in ("feed_forward", "norm_attention", "norm_feed_forward"):
            getattr(ours, name).load_state_dict(getattr(theirs, name).state_dict())
        projections.append(torch.cat(W_kv) * theirs.norm_attention.weight)
    W_kv = torch.stack(projections)  # (L, 2 * d_model, d_model)
    model.memory.norm.reset_parameters()
    weight = model.memory.key_value.weight
    weight.copy_(W_kv.mean(dim=0) if model.shared_kv else W_kv.flatten(0, 1))
