"""Transformer-XL: attention reaches past the segment, into what each layer has seen.

Dai et al., "Transformer-XL: Attentive Language Models Beyond a Fixed-Length Context",
ACL 2019 (arXiv 1901.02860). Two ideas that need each other: segment recurrence
(section 3.2) and relative positions (section 3.3).

Letters in the shape comments: B batch, T tokens in the segment, M states in memory,
K = M + T keys, H heads, d_model = H * d_head.
"""

import torch
from torch import nn

from memtx_minimal import inputs


def distances(T, M, device=None):
    """How far each key lies before each query, (T, M + T); below 0 is the future."""
    query = M + torch.arange(T, device=device)[:, None]  # (T, 1)
    key = torch.arange(M + T, device=device)  # (M + T,)
    return query - key


def attention_mask(distance, limit=None):
    """Added to scores, (T, K): -inf hides the future, and keys at limit or farther."""
    hidden = distance < 0
    if limit is not None:
        inputs.check_number("limit", limit, 1)
        hidden |= distance >= limit
    mask = torch.zeros_like(distance, dtype=torch.float32)
    return mask.masked_fill(hidden, float("-inf"))


def sinusoid(distance, d_model):
    """The encoding R of distances, (n,) -> (n, d_model). Section 3.3: not learned."""
    inputs.check_even("d_model", d_model)
    evens = torch.arange(0.0, d_model, 2, dtype=torch.float32, device=distance.device)
    wavelengths = 10_000 ** (evens / d_model)  # (d_model / 2,), in units of 2 * pi
    angles = distance[:, None] / wavelengths  # in float32, whatever the model's dtype
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


def rel_shift(scores):
    """Line scores up by key instead of by distance. Appendix B, without a copy.

    (..., T, K + 1), with distances K ... 0 as columns in every row -> (..., T, K),
    with keys as columns. Entries of future keys are garbage, to be masked.
    """
    T, K = scores.size(-2), scores.size(-1) - 1
    return scores.flatten(-2)[..., T:].unflatten(-1, (T, K))


class RelativeAttention(nn.Module):
    """Attention of a segment over memory and itself, by content and distance."""

    def __init__(self, d_model, n_heads, dropout):
        super().__init__()
        self.n_heads, d_head = n_heads, d_model // n_heads
        self.query = nn.Linear(d_model, d_model, bias=False)
        self.key_value = nn.Linear(d_model, 2 * d_model, bias=False)
        self.position = nn.Linear(d_model, d_model, bias=False)  # W_{k,R}
        self.out = nn.Linear(d_model, d_model, bias=False)
        self.u = nn.Parameter(torch.zeros(n_heads, 1, d_head))
        self.v = nn.Parameter(torch.zeros(n_heads, 1, d_head))
        self.dropout = nn.Dropout(dropout)

    def heads(self, x):
        """(..., n, d_model) -> (..., H, n, d_head)."""
        return x.unflatten(-1, (self.n_heads, -1)).transpose(-2, -3)

    def forward(self, context, R, mask):
        """context (B, K, d_model), R (K + 1, d_model), mask (T, K): (B, T, d_model)."""
        inputs.check_added("mask", mask)
        T, scale = mask.size(0), self.u.size(-1) ** -0.5
        q = self.heads(self.query(context[:, -T:]))  # (B, H, T, d_head)
        k, values = self.key_value(context).chunk(2, dim=-1)  # (B, K, d_model)
        k, values = self.heads(k), self.heads(values)  # (B, H, K, d_head)
        r = self.heads(self.position(R))  # (H, K + 1, d_head)
        scores = scale * (q + self.u) @ k.mT  # (B, H, T, K): (a) + (c)
        scores += rel_shift(scale * (q + self.v) @ r.mT)  # (b) + (d)
        scores += mask
        weights = self.dropout(scores.softmax(dim=-1))  # (B, H, T, K)
        heads = weights @ values  # (B, H, T, d_head)
        return self.out(heads.transpose(1, 2).flatten(2))  # (B, T, d_model)


class Layer(nn.Module):
    """Attention over memory and segment, then feed-forward; a residual around each."""

    def __init__(self, d_model, n_heads, d_ff, dropout):
        super().__init__()
        self.attention = RelativeAttention(d_model, n_heads, dropout)
        self.feed_forward = nn.Sequential(
            nn.Linear(d_model, d_ff), nn.ReLU(), nn.Linear(d_ff, d_model)
        )
        self.norm_attention = nn.LayerNorm(d_model)
        self.norm_feed_forward = nn.LayerNorm(d_model)
        self.dropout = nn.Dropout(dropout)

    def forward(self, context, R, mask):
        """context (B, K, d_model) -> the segment's new states (B, T, d_model)."""
        x = context[:, -mask.size(0) :]  # (B, T, d_model)
        x = x + self.dropout(self.attention(self.norm_attention(context), R, mask))
        return x + self.dropout(self.feed_forward(self.norm_feed_forward(x)))


class TransformerXL(nn.Module):
    """A language model that remembers the inputs of each layer, segment after segment.

    tokens (B, T) int64, memory -> logits (B, T, vocab_size), memory: a detached tensor
    (B, M, d_model) a layer, M <= mem_len. Pass None at the start of a stream. mem_len
    may change at any time, to evaluate with a longer memory. Distances above clamp_len
    share one encoding; with same_length a query sees its mem_len latest keys.
    """

    def __init__(
        self, vocab_size, d_model=128, n_heads=4, n_layers=4, d_ff=512,
        mem_len=64, clamp_len=None, same_length=False, dropout=0.0,
    ):  # fmt: skip
        super().__init__()
        inputs.check_sizes(locals(), even=["d_model"])
        inputs.check_number("mem_len", mem_len, int(same_length))
        self.mem_len, self.clamp_len, self.same_length = mem_len, clamp_len, same_length
        self.embedding = nn.Embedding(vocab_size, d_model)
        self.dropout = nn.Dropout(dropout)
        stack = (Layer(d_model, n_heads, d_ff, dropout) for _ in range(n_layers))
        self.layers = nn.ModuleList(stack)
        self.norm, self.head = nn.LayerNorm(d_model), nn.Linear(d_model, vocab_size)

    def forward(self, tokens, memory=None):
        inputs.check_sizes({"mem_len": self.mem_len, "clamp_len": self.clamp_len})
        inputs.check_tokens(tokens, self.embedding.num_embeddings)
        x = self.dropout(self.embedding(tokens))  # (B, T, d_model)
        nothing_yet = [x[:, :0]] * len(self.layers)  # (B, 0, d_model) each
        memory = inputs.checked_memory(memory, nothing_yet)
        M = min(memory[0].size(1), self.mem_len)
        distance = distances(x.size(1), M, x.device)  # (T, K)
        mask = attention_mask(distance, self.mem_len if self.same_length else None)
        columns = torch.arange(mask.size(1), -1, -1, device=x.device)  # K ... 0
        R = sinusoid(columns.clamp(0, self.clamp_len), x.size(-1)).to(x.dtype)
        R = self.dropout(R)  # (K + 1, d_model)

        remembered = []
        for layer, past in zip(self.layers, memory, strict=True):
            past = past[:, past.size(1) - M :]  # (B, M, d_model)
            context = torch.cat([past, x], dim=1)  # (B, K, d_model)
            first = max(0, context.size(1) - self.mem_len)
            remembered.append(context[:, first:].detach().clone())
            x = layer(context, R, mask)
        return self.head(self.norm(x)), remembered
