"""Compressive Transformer: what is too old to keep is kept in fewer states.

Rae et al., "Compressive Transformers for Long-Range Sequence Modelling", ICLR 2020
(arXiv 1911.05507). Transformer-XL with a second, coarser memory behind the first:
states that leave the memory are compressed, c into one, and stay for c times as long.

Letters in the shape comments: B batch, T tokens in the segment, M states in memory, C
in compressed memory, K = C + M + T keys, O old states that leave memory, c the rate.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

from memtx_minimal import inputs
from memtx_minimal.transformer_xl import Layer, attention_mask, distances, sinusoid


class MaxPooling(nn.Module):
    """Of c old states, the largest value in each dimension."""

    def __init__(self, d_model, rate):
        super().__init__()
        self.rate = rate

    def forward(self, old, used=None):
        """(B, O, d_model) -> (B, O / c, d_model); so for all compression functions."""
        return old.unflatten(1, (-1, self.rate)).amax(dim=2)


class MeanPooling(MaxPooling):
    """Of c old states, the mean."""

    def forward(self, old, used=None):
        return old.unflatten(1, (-1, self.rate)).mean(dim=2)


class Convolution(nn.Module):
    """A convolution with kernel and stride c: one matrix for c states side by side."""

    def __init__(self, d_model, rate):
        super().__init__()
        self.rate, self.kernel = rate, nn.Linear(rate * d_model, d_model)

    def forward(self, old, used=None):
        return self.kernel(old.unflatten(1, (-1, self.rate)).flatten(2))


class DilatedConvolution(Convolution):
    """The same, after convolutions with dilations 1 and 2 have mixed neighbours in."""

    def __init__(self, d_model, rate):
        super().__init__(d_model, rate)
        self.near = nn.Conv1d(d_model, d_model, 3, dilation=1, padding="same")
        self.far = nn.Conv1d(d_model, d_model, 3, dilation=2, padding="same")

    def forward(self, old, used=None):
        wide = self.far(self.near(old.mT).relu()).relu().mT  # (B, O, d_model)
        return super().forward(old + wide)


class MostUsed(MaxPooling):
    """The O / c old states that got the most attention, used (B, O), in their order."""

    def forward(self, old, used):
        n = old.size(1) // self.rate
        if used is None or n * self.rate != old.size(1):
            raise ValueError("most-used needs old states c by c, and how each was used")
        kept = used.topk(n, dim=1).indices.sort(dim=1).values  # (B, O / c)
        return old.take_along_dim(kept[:, :, None], dim=1)


def by_content(layer, h, states):
    """Queries of h (B, T, d_model), keys and values of states (B, S, d_model).

    Everything stands still but `states`: no gradient reaches h or the layer (3.2).
    """
    norm, attention = layer.norm_attention, layer.attention
    W_q, W_kv = attention.query.weight.detach(), attention.key_value.weight.detach()
    gain, bias = norm.weight.detach(), norm.bias.detach()
    h, states = (F.layer_norm(x, gain.shape, gain, bias) for x in (h.detach(), states))
    k, values = F.linear(states, W_kv).chunk(2, dim=-1)  # (B, S, d_model)
    q = F.linear(h, W_q)  # (B, T, d_model)
    return [attention.heads(x) for x in (q, k, values)]  # (B, H, ., d_head)


def attention_reconstruction(layer, h, old, new):
    """How differently h reads old and new: softmax((h Q)(m K)^T)(m V), no positions."""
    read = F.scaled_dot_product_attention  # -> (B, H, T, d_head)
    before, after = (read(*by_content(layer, h, states)) for states in (old, new))
    return (before - after).square().mean()


def auto_encoding(decode, old, new):
    """How far the old states are from what g, d_model -> c * d_model, makes of new."""
    return (decode(new).reshape(old.shape) - old).square().mean()


def usage(layer, h, old):
    """The average attention that each old state gets from h, (B, O)."""
    q, k, _ = (x.flatten(0, 1) for x in by_content(layer, h, old))  # (B * H, ., d_head)
    weights = (q.size(-1) ** -0.5 * q @ k.mT).softmax(dim=-1)  # (B * H, T, O)
    return weights.unflatten(0, (len(h), -1)).mean(dim=(1, 2))


COMPRESSIONS = {
    "max": MaxPooling, "mean": MeanPooling, "conv": Convolution,
    "dilated": DilatedConvolution, "most-used": MostUsed,
}  # fmt: skip
LOSSES = "attention", "auto-encoding", "bptt", None


class Memory(nn.Module):
    """Memory and compressed memory of one layer, and how one becomes the other."""

    def __init__(self, d_model, rate, compression, loss):
        super().__init__()
        self.rate, self.loss = rate, loss
        self.compress = COMPRESSIONS[compression](d_model, rate)
        if loss == "auto-encoding":
            self.decode = nn.Linear(d_model, rate * d_model)  # g

    def forward(self, layer, h, compressed, recent, mem_len, compressed_len):
        """h (B, T, d_model) enters -> (B, C, d_model), (B, M, d_model), loss."""
        recent = torch.cat([recent, h.detach()], dim=1)  # (B, M + T, d_model)
        excess = max(0, recent.size(1) - mem_len)
        n_old = math.ceil(excess / self.rate) * self.rate  # whole groups leave
        if n_old == 0:
            return compressed, recent, h.new_zeros(())
        old, recent = recent[:, :n_old], recent[:, n_old:]
        used = usage(layer, h, old) if isinstance(self.compress, MostUsed) else None
        new = self.compress(old, used)  # (B, O / c, d_model)
        loss = h.new_zeros(())
        if self.training and self.loss == "attention":
            loss = attention_reconstruction(layer, h, old, new)
        elif self.training and self.loss == "auto-encoding":
            loss = auto_encoding(self.decode, old, new)
        if self.loss != "bptt":
            new = new.detach()
        compressed = torch.cat([compressed, new], dim=1)  # (B, C + O / c, d_model)
        first = max(0, compressed.size(1) - compressed_len)
        return compressed[:, first:], recent, loss


def pieces(model, tokens):
    """Tokens (B, T) in pieces of mem_len; they and both lengths, checked."""
    rate = model.memories[0].rate
    inputs.check_sizes({"compressed_len": model.compressed_len})
    inputs.check_multiple("mem_len", model.mem_len, "compression_rate", rate)
    inputs.check_tokens(tokens, model.embedding.num_embeddings)
    return tokens.split(model.mem_len, dim=1)


def read_piece(model, tokens, memory):
    """At most mem_len tokens -> states (B, T, d_model), memory, loss, with graphs."""
    x = model.dropout(model.embedding(tokens))  # (B, T, d_model)
    nothing_yet = [(x[:, :0], x[:, :0])] * len(model.layers)  # (B, 0, d_model) each
    memory = inputs.checked_memory(memory, nothing_yet)
    surplus = max(0, memory[0][0].size(1) - model.compressed_len)  # if it was lowered
    memory = [(compressed[:, surplus:], recent) for compressed, recent in memory]
    n_remembered = sum(part.size(1) for part in memory[0])  # C + M
    mask = attention_mask(distances(x.size(1), n_remembered, x.device))  # (T, K)
    columns = torch.arange(mask.size(1), -1, -1, device=x.device)  # K ... 0
    R = model.dropout(sinusoid(columns, x.size(-1)).to(x.dtype))  # (K + 1, d_model)
    updated, losses, sizes = [], [], (model.mem_len, model.compressed_len)
    stack = zip(model.layers, model.memories, memory, strict=True)
    for layer, remember, (compressed, recent) in stack:
        context = torch.cat([compressed, recent, x], dim=1)  # (B, K, d_model)
        *parts, loss = remember(layer, x, compressed, recent, *sizes)
        updated.append(tuple(parts)), losses.append(loss)
        x = layer(context, R, mask)
    return x, updated, sum(losses)


class CompressiveTransformer(nn.Module):
    """A language model with a memory in each layer, and a compressed memory behind it.

    tokens (B, T) int64, memory -> logits (B, T, vocab_size), memory, and in training
    a compression loss, a scalar. There is none with loss=None, nor with "bptt", which
    trains f_c by the logits of later pieces (pass two or more of mem_len at once).
    Memory, for each layer: detached (B, C, d_model), (B, M, d_model); both lengths may
    be changed. Until something is compressed f_c has no gradient, as DDP must know.
    """

    def __init__(
        self, vocab_size, d_model=128, n_heads=4, n_layers=4, d_ff=512,
        mem_len=64, compressed_len=64, compression_rate=4, compression="conv",
        loss="attention", dropout=0.0,
    ):  # fmt: skip
        super().__init__()
        inputs.check_sizes(locals(), even=["d_model"])
        inputs.check_one_of("compression", compression, COMPRESSIONS)
        inputs.check_one_of("loss", loss, LOSSES)
        inputs.check_multiple("mem_len", mem_len, "compression_rate", compression_rate)
        self.mem_len, self.compressed_len = mem_len, compressed_len
        self.embedding = nn.Embedding(vocab_size, d_model)
        self.dropout = nn.Dropout(dropout)
        stack = (Layer(d_model, n_heads, d_ff, dropout) for _ in range(n_layers))
        self.layers = nn.ModuleList(stack)
        sizes = d_model, compression_rate, compression, loss
        self.memories = nn.ModuleList(Memory(*sizes) for _ in range(n_layers))
        self.norm, self.head = nn.LayerNorm(d_model), nn.Linear(d_model, vocab_size)

    loss = property(lambda self: self.memories[0].loss)  # chosen when it was built

    def clip_groups(self):  # the language model's parameters, and those that compress
        compression = list(self.memories.parameters())
        ids = {id(p) for p in compression}
        return [[p for p in self.parameters() if id(p) not in ids], compression]

    def forward(self, tokens, memory=None):
        states, losses = [], []
        for piece in pieces(self, tokens):
            x, memory, loss = read_piece(self, piece, memory)
            states.append(x), losses.append(loss)
        logits = self.head(self.norm(torch.cat(states, dim=1)))  # (B, T, vocab_size)
        memory = [tuple(part.detach().clone() for part in parts) for parts in memory]
        own = self.training and self.loss in ("attention", "auto-encoding")
        return (logits, memory, sum(losses)) if own else (logits, memory)
