"""Transformer-XL: attention that reaches past the segment, by caching what each layer has already seen.

Dai et al., "Transformer-XL: Attentive Language Models Beyond a Fixed-Length Context", ACL 2019 (arXiv 1901.02860). Two ideas
that need each other: segment recurrence (section 3.2) and relative positions (section 3.3).

Letters in the shape comments: B batch, T tokens in the segment, M in memory, K = M + T keys, H heads, d_model = H * d_head.
"""

import torch
from torch import nn


def distances(T, M, device=None):
    """How far key j lies before query i, (T, M + T): 0 is the query itself, below 0 is the future."""
    return M + torch.arange(T, device=device)[:, None] - torch.arange(M + T, device=device)


def sinusoid(distance, d_model):
    """The encoding R of distances, (n,) -> (n, d_model). Section 3.3: a fixed sinusoid, as in Vaswani et al., nothing learned."""
    wavelengths = 10_000 ** (torch.arange(0, d_model, 2, device=distance.device) / d_model)  # (d_model / 2,)
    angles = distance[:, None] / wavelengths
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


def rel_shift(scores):
    """Line scores up by key instead of by distance. Appendix B, without a copy.

    (..., T, K + 1) with columns for the distances K ... 0, the same in every row -> (..., T, K) with a column for each key.
    Entries of future keys are garbage, to be masked.
    """
    T, K = scores.size(-2), scores.size(-1) - 1
    return scores.flatten(-2)[..., T:].unflatten(-1, (T, K))


class RelativeAttention(nn.Module):
    """Multi-head attention of a segment over memory and itself, by content and by distance. Section 3.3."""

    def __init__(self, d_model, n_heads, dropout):
        super().__init__()
        self.n_heads, d_head = n_heads, d_model // n_heads
        self.query = nn.Linear(d_model, d_model, bias=False)
        self.key_value = nn.Linear(d_model, 2 * d_model, bias=False)
        self.position = nn.Linear(d_model, d_model, bias=False)  # W_R
        self.out = nn.Linear(d_model, d_model, bias=False)
        self.u = nn.Parameter(torch.zeros(n_heads, 1, d_head))
        self.v = nn.Parameter(torch.zeros(n_heads, 1, d_head))
        self.dropout = nn.Dropout(dropout)

    def heads(self, x):
        """(..., n, d_model) -> (..., H, n, d_head)."""
        return x.unflatten(-1, (self.n_heads, -1)).transpose(-2, -3)

    def forward(self, context, R, mask):
        """context (B, K, d_model) is memory, then segment; R (K + 1, d_model); mask (T, K) is 0 or, where no look is allowed, -inf."""
        T, scale = mask.size(0), self.u.size(-1) ** -0.5
        q = self.heads(self.query(context[:, -T:]))  # (B, H, T, d_head)
        k, values = (self.heads(x) for x in self.key_value(context).chunk(2, dim=-1))  # (B, H, K, d_head)
        r = self.heads(self.position(R))  # (H, K + 1, d_head)
        scores = scale * (q + self.u) @ k.mT  # (B, H, T, K): terms (a) and (c)
        scores += rel_shift(scale * (q + self.v) @ r.mT)  # terms (b) and (d)
        scores += mask
        weights = self.dropout(scores.softmax(dim=-1))  # (B, H, T, K)
        heads = weights @ values  # (B, H, T, d_head)
        return self.out(heads.transpose(1, 2).flatten(2))  # (B, T, d_model)


class Layer(nn.Module):
    """Attention over memory and segment, then a feed-forward network, each around a residual."""

    def __init__(self, d_model, n_heads, d_ff, dropout):
        super().__init__()
        self.attention = RelativeAttention(d_model, n_heads, dropout)
        self.feed_forward = nn.Sequential(
            nn.Linear(d_model, d_ff), nn.ReLU(), nn.Linear(d_ff, d_model)
        )
        self.norm_attention, self.norm_feed_forward = nn.LayerNorm(d_model), nn.LayerNorm(d_model)
        self.dropout = nn.Dropout(dropout)

    def forward(self, context, R, mask):
        """context (B, K, d_model) -> the segment's new states (B, T, d_model)."""
        x = context[:, -mask.size(0) :]  # (B, T, d_model)
        x = x + self.dropout(self.attention(self.norm_attention(context), R, mask))
        return x + self.dropout(self.feed_forward(self.norm_feed_forward(x)))


class TransformerXL(nn.Module):
    """A language model that reads a stream segment by segment and caches the inputs of each layer.

    tokens (B, T) int64, memory -> logits (B, T, vocab_size), memory. The memory is a list of one
    tensor a layer (B, M, d_model), M <= mem_len, detached; pass None at the start of a stream.
    mem_len is a plain attribute: raise it to evaluate with a longer memory than in training.

    clamp_len    distances above it share one encoding (None: no limit)
    same_length  every query sees its mem_len latest keys and no more, itself included
    """

    def __init__(
        self, vocab_size, d_model=128, n_heads=4, n_layers=4, d_ff=512,
        mem_len=64, clamp_len=None, same_length=False, dropout=0.0,
    ):  # fmt: skip
        super().__init__()
        if d_model % (2 * n_heads):
            raise ValueError(f"d_model {d_model} is not a multiple of 2 * n_heads = {2 * n_heads}")
        if mem_len < 0 or (same_length and mem_len == 0):
            raise ValueError(f"mem_len {mem_len} is not 0 or more (same_length needs 1 or more)")
        if clamp_len is not None and clamp_len < 1:
            raise ValueError(f"clamp_len {clamp_len} is not 1 or more: None sets no limit")
        self.mem_len, self.clamp_len, self.same_length = mem_len, clamp_len, same_length
        self.embedding = nn.Embedding(vocab_size, d_model)
        self.dropout = nn.Dropout(dropout)
        self.layers = nn.ModuleList(
            Layer(d_model, n_heads, d_ff, dropout) for _ in range(n_layers)
        )
        self.norm = nn.LayerNorm(d_model)
        self.head = nn.Linear(d_model, vocab_size)

    def forward(self, tokens, memory=None):
        x = self.dropout(self.embedding(tokens))  # (B, T, d_model)
        memory = memory or [x[:, :0]] * len(self.layers)
        if memory[0].size(0) != x.size(0):
            raise ValueError(f"memory of {memory[0].size(0)} streams, tokens of {x.size(0)}")
        R, mask = self.positions(T=x.size(1), M=memory[0].size(1), like=x)

        remembered = []
        for layer, past in zip(self.layers, memory, strict=True):
            context = torch.cat([past, x], dim=1)  # (B, K, d_model)
            first = max(0, context.size(1) - self.mem_len)
            remembered.append(context[:, first:].detach().clone())
            x = layer(context, R, mask)
        return self.head(self.norm(x)), remembered

    def positions(self, *, T, M, like):
        """R for the distances K ... 0, (K + 1, d_model), and the mask (T, K): 0 to look, -inf not to."""
        distance = distances(T, M, like.device)
        hidden = distance < 0
        if self.same_length:
            hidden |= distance >= self.mem_len
        mask = like.new_zeros(T, M + T).masked_fill(hidden, float("-inf"))
        columns = torch.arange(M + T, -1, -1, device=like.device).clamp(max=self.clamp_len or M + T)
        return self.dropout(sinusoid(columns, like.size(-1)).to(like.dtype)), mask
