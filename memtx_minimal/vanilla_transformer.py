"""The baseline: a decoder-only transformer that forgets everything outside its window.

Every chapter compares with this model. It reads one window of at most `max_len` tokens,
and nothing survives from one window to the next. Vaswani et al., "Attention Is All You
Need" (2017), decoder only, with layer norm before each block (pre-LN).

Letters in the shape comments: B batch, T tokens in the window, H heads, d_model = H *
d_head.
"""

import torch
import torch.nn.functional as F
from torch import nn

from memtx_minimal import inputs


class CausalAttention(nn.Module):
    """Multi-head attention in which position t sees the positions 0 ... t of its own
    window."""

    def __init__(self, d_model, n_heads, dropout):
        super().__init__()
        self.n_heads, self.dropout = n_heads, dropout
        self.query_key_value = nn.Linear(d_model, 3 * d_model, bias=False)
        self.out = nn.Linear(d_model, d_model, bias=False)

    def forward(self, x):
        """x (B, T, d_model) -> (B, T, d_model)."""
        qkv = self.query_key_value(x)  # (B, T, 3 * d_model)
        qkv = qkv.unflatten(-1, (3, self.n_heads, -1))  # (B, T, 3, H, d_head)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, H, T, d_head) each
        dropout = self.dropout if self.training else 0.0
        heads = F.scaled_dot_product_attention(
            q, k, v, is_causal=True, dropout_p=dropout
        )  # (B, H, T, d_head)
        return self.out(heads.transpose(1, 2).flatten(2))  # (B, T, d_model)


class Layer(nn.Module):
    """Attention, then a feed-forward network, each around a residual connection."""

    def __init__(self, d_model, n_heads, d_ff, dropout):
        super().__init__()
        self.attention = CausalAttention(d_model, n_heads, dropout)
        self.feed_forward = nn.Sequential(
            nn.Linear(d_model, d_ff), nn.ReLU(), nn.Linear(d_ff, d_model)
        )
        self.norm_attention = nn.LayerNorm(d_model)
        self.norm_feed_forward = nn.LayerNorm(d_model)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x):
        """x (B, T, d_model) -> (B, T, d_model)."""
        x = x + self.dropout(self.attention(self.norm_attention(x)))
        return x + self.dropout(self.feed_forward(self.norm_feed_forward(x)))


def sinusoid(positions, d_model):
    """Fixed embeddings of integer positions, shape (len(positions), d_model). Vaswani
    et al., section 3.5."""
    inputs.check_even("d_model", d_model)
    evens = torch.arange(0.0, d_model, 2, dtype=torch.float32, device=positions.device)
    wavelengths = 10_000 ** (evens / d_model)  # (d_model / 2,), in units of 2 * pi
    angles = positions[:, None] / wavelengths  # in float32, whatever the model's dtype
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


class VanillaTransformer(nn.Module):
    """A language model with absolute positions and no memory.

    tokens (B, T) int64, T <= max_len -> logits (B, T, vocab_size), None. It has no
    memory: it takes and returns None, only to share the protocol of the other models.
    """

    def __init__(
        self, vocab_size, d_model=128, n_heads=4, n_layers=4, d_ff=512,
        max_len=64, dropout=0.0,
    ):  # fmt: skip
        super().__init__()
        inputs.check_sizes(locals(), even=["d_model"])
        self.max_len = max_len
        self.embedding = nn.Embedding(vocab_size, d_model)
        self.dropout = nn.Dropout(dropout)
        stack = (Layer(d_model, n_heads, d_ff, dropout) for _ in range(n_layers))
        self.layers = nn.ModuleList(stack)
        self.norm = nn.LayerNorm(d_model)
        self.head = nn.Linear(d_model, vocab_size)

    def forward(self, tokens, memory=None):
        inputs.check_tokens(tokens, self.embedding.num_embeddings, self.max_len)
        memory = inputs.checked_memory(memory, None)  # there is none
        x = self.embedding(tokens)  # (B, T, d_model)
        positions = torch.arange(x.size(1), device=x.device)
        x = self.dropout(x + sinusoid(positions, x.size(-1)).to(x.dtype))
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x)), memory
