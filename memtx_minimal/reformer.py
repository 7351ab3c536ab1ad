"""Reformer: attention among the likely keys alone, in layers that keep no activations.

Kitaev, Kaiser, Levskaya, "Reformer: The Efficient Transformer", ICLR 2020 (arXiv
2001.04451). Attention by hashing, section 2, stands in lsh_attention.py. Here is section 3:
reversible layers, computation in pieces, axial positions; and the model.

Letters in the shape comments: B batch, T tokens, H heads.
"""

import math

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from memtx_minimal import inputs
from memtx_minimal.lsh_attention import LSHAttention, Settings, attention_weights


def random_state(device, state=None):
    """The states of the random numbers on the CPU and on the device; sets them to `state`."""
    here = {"cuda": torch.cuda, "mps": torch.mps}.get(device.type)
    where = [device] if device.type == "cuda" else []
    if state is not None:
        torch.set_rng_state(state[0])
        if here:
            here.set_rng_state(state[1], *where)
    return torch.get_rng_state(), here.get_rng_state(*where) if here else None


def couple(block, x, y, kept=None):
    """y + block(x), in pieces of block.piece_len tokens; and what the block wants kept."""
    length, pieces = block.piece_len or x.size(1), []
    for read, changed in zip(x.split(length, dim=1), y.split(length, dim=1)):
        change, kept = block(read, kept)
        pieces.append(changed + change)
    return torch.cat(pieces, dim=1), kept


def run(blocks, x, kept=None):
    """x (B, T, d_model) through all blocks, as two streams x1 and x2. Eq. 7 to 9.

    Puts in kept, for each block, the states of the random numbers before it, and buckets.
    """
    x1 = x2 = x
    for block in blocks:
        states = random_state(x.device)
        changed, buckets = couple(block, x2, x1)
        x1, x2 = x2, changed
        if kept is not None:
            kept += [*states, buckets]
    return x1, x2


def uncouple(block, x, y, dx, dy, kept, autocast):
    """The way back: y before `couple`, the gradient of x, and those of the parameters.

    dy, the gradient of what came out, is also that of y: y only had something added.
    """
    own, grads, ys, dxs = [p for p in block.parameters() if p.requires_grad], [], [], []
    pieces = (t.split(block.piece_len or x.size(1), dim=1) for t in (x, y, dx, dy))
    for read, changed, d_read, d_changed in zip(*pieces):
        with torch.enable_grad(), inputs.autocast(x.device.type, **autocast):
            read = read.detach().requires_grad_()
            change, _ = block(read, kept)
        d, *more = torch.autograd.grad(change, [read, *own], d_changed.to(change.dtype))
        ys.append(changed - change.detach())
        dxs.append(d_read + d)
        grads = [a + b for a, b in zip(grads, more)] if grads else more
    return torch.cat(ys, dim=1), torch.cat(dxs, dim=1), grads


def modes(blocks):
    """What must not change between forward and backward."""
    return [
        (b.training, str(getattr(b, "settings", "")), [p.requires_grad for p in b.parameters()])
        for b in blocks
    ]


class Reversible(torch.autograd.Function):
    """As `run`, x (B, T, d_model) -> [x1 ; x2] (B, T, 2 * d_model), and keeps only that.

    A block is called as block(x, kept) -> (change, kept): what it returns as kept when
    called with None, hash buckets or nothing, it is given again in the backward pass.
    """

    @staticmethod
    def forward(ctx, x, blocks, *parameters):
        ctx.blocks, ctx.modes, device = blocks, modes(blocks), x.device.type
        ctx.autocast, kept = inputs.autocast_settings(device), []
        with inputs.autocast(device, **ctx.autocast):
            y = torch.cat(run(blocks, x, kept), dim=-1)
        ctx.save_for_backward(y, *kept, *parameters)  # whoever changes one in place is told
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        if modes(ctx.blocks) != ctx.modes:
            what = "train, eval, settings or requires_grad"
            raise RuntimeError(f"{what} changed between forward and backward")
        y, *kept = ctx.saved_tensors
        (x1, x2), (d1, d2), grads = y.chunk(2, dim=-1), dy.chunk(2, dim=-1), []
        now = random_state(y.device)
        for n, block in reversed(list(enumerate(ctx.blocks))):
            *states, buckets = kept[3 * n : 3 * n + 3]
            random_state(y.device, states)
            before, d, own = uncouple(block, x1, x2, d1, d2, buckets, ctx.autocast)
            x1, x2, d1, d2, grads = before, x1, d2, d, own + grads
        random_state(y.device, now)
        return d1 + d2, None, *grads


class FeedForward(nn.Module):
    """The same at every position, so it may be computed in pieces. Section 3, "Chunking"."""

    def __init__(self, d_model, d_ff, piece_len, dropout=0.0):
        super().__init__()
        self.piece_len = piece_len
        self.layers = nn.Sequential(
            nn.LayerNorm(d_model), nn.Linear(d_model, d_ff), nn.ReLU(),
            nn.Linear(d_ff, d_model), nn.Dropout(dropout),
        )  # fmt: skip

    def forward(self, x, kept=None):
        """x (B, T, d_model) -> change (B, T, d_model), nothing to keep."""
        return self.layers(x), None


class AxialPositions(nn.Module):
    """Learned positions in two small tables: position n is row n // columns, n % columns."""

    def __init__(self, shape, d_model):
        super().__init__()
        self.rows = nn.Parameter(torch.randn(shape[0], 1, d_model // 2))
        self.columns = nn.Parameter(torch.randn(1, shape[1], d_model - d_model // 2))

    def forward(self, T):
        """The first T positions, (T, d_model)."""
        inputs.check_number("T", T, 1, self.rows.size(0) * self.columns.size(1))
        shape = self.rows.size(0), self.columns.size(1), -1
        both = torch.cat([self.rows.expand(shape), self.columns.expand(shape)], dim=-1)
        return both.flatten(0, 1)[:T]


class Reformer(nn.Module):
    """A language model for long windows: hashed attention, in reversible layers.

    tokens (B, T) int64, T <= max_len = axial_shape[0] * axial_shape[1] -> logits (B, T,
    vocab_size), None: it has no memory, and takes the argument to share the protocol.
    Texts of up to two chunks get exact attention. settings (chunk_len, n_rounds, ...) may
    change at any time. reversible=False computes the same and keeps all activations.
    """

    def __init__(
        self, vocab_size, d_model=128, n_heads=4, n_layers=4, d_ff=512, chunk_len=32,
        n_rounds=2, axial_shape=(16, 64), piece_len=512, reversible=True, dropout=0.0,
    ):  # fmt: skip
        super().__init__()
        inputs.check_sizes(locals())
        inputs.check_pair("axial_shape", axial_shape)
        self.max_len, self.reversible = math.prod(axial_shape), reversible
        self.settings = Settings(chunk_len, n_rounds)
        self.embedding = nn.Embedding(vocab_size, d_model)
        self.positions = AxialPositions(axial_shape, d_model)
        self.dropout, self.blocks = nn.Dropout(dropout), nn.ModuleList()
        for n in range(n_layers):
            self.blocks.append(LSHAttention(d_model, n_heads, self.settings, dropout, seed=n))
            self.blocks.append(FeedForward(d_model, d_ff, piece_len, dropout))
        self.norm, self.head = nn.LayerNorm(2 * d_model), nn.Linear(2 * d_model, vocab_size)

    def forward(self, tokens, memory=None):
        inputs.check_tokens(tokens, self.embedding.num_embeddings, self.max_len)
        memory, positions = inputs.checked_memory(memory, None), self.positions(tokens.size(1))
        x = self.dropout(self.embedding(tokens) + positions)  # (B, T, d_model)
        if self.reversible:
            learned = [p for p in self.blocks.parameters() if p.requires_grad]
            x = Reversible.apply(x, self.blocks, *learned)  # (B, T, 2 * d_model)
        else:
            x = torch.cat(run(self.blocks, x), dim=-1)
        return self.head(self.norm(x)), memory


@torch.no_grad()
def look(model, tokens):
    """Where each layer of a Reformer looks, (B, H, T, T) each, as in evaluation."""
    weights, training = [], model.training

    def record(block, args, _):
        q, k, _ = block.heads(args[0])
        weights.append(attention_weights(q, k, block.hash(q), *block.settings.arguments()))

    hooks = [block.register_forward_hook(record) for block in model.blocks[::2]]
    try:
        model.eval()(tokens)
    finally:
        model.train(training)
        for hook in hooks:
            hook.remove()
    return weights
