"""Reformer: attention among the likely keys alone, in layers that keep no activations.

Kitaev, Kaiser, Levskaya, ICLR 2020 (arXiv 2001.04451). Letters in the shape comments:
B batch, T tokens, H heads, d_model = H * d_head, P hash rounds, G chunks of w tokens.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from memtx_minimal import inputs

SELF = -1e5  # added to the score of a token with itself: the last resort


def hash_vectors(x, n_buckets, n_rounds, seed):
    """h(x) = argmax [xD ; -xD] for each round and head: (B, H, T, d) -> (P, B, H, T).

    Above 32, two small hashes, h1 + b1 * h2, make nearly as many buckets for less work.
    """
    inputs.check_hash(x, n_buckets, n_rounds)
    b1 = n_buckets if n_buckets <= 32 else 2 * round(math.sqrt(n_buckets) / 2)
    generator, buckets, total = torch.Generator().manual_seed(seed), 0, 1
    for b in [b1] if b1 == n_buckets else [b1, 2 * round(n_buckets / b1 / 2)]:
        # Direction by direction: where b is smaller, D has the first of the same ones.
        D = torch.randn(b // 2, n_rounds, 1, x.size(1), x.size(3), generator=generator)
        xD = x @ D.movedim(0, -1).to(x)  # (P, B, H, T, b / 2)
        buckets = buckets + total * torch.cat([xD, -xD], dim=-1).argmax(dim=-1)
        total *= b
    small = torch.int16 if total <= 2**15 else torch.int32
    return buckets.to(torch.uint8 if total <= 2**8 else small)  # (P, B, H, T)


def in_set(bucket, chunk, key_bucket, key_chunk, same_bucket=True):
    """Whether queries may look at keys, the future aside: two comparisons."""
    near = (key_chunk == chunk) | (key_chunk == chunk - 1)
    return near & (key_bucket == bucket) if same_bucket else near


@dataclass(slots=True)
class Settings:
    """How keys are found, in all layers of a model. May be changed at any time."""

    chunk_len: int
    n_rounds: int = 1  # 0 is exact attention
    same_bucket: bool = True  # look at keys of the same bucket alone
    count_once: bool = True  # a key that several rounds find counts once: -log N

    def __setattr__(self, name, value):
        inputs.check_sizes({name: value})
        object.__setattr__(self, name, value)


def attention_weights(q, k, buckets, settings):
    """By definition: a softmax over the keys that rounds find, or all. (B, H, T, T)"""
    T, least = q.size(2), torch.finfo(q.dtype).min / 2  # -1e5 is too much for half
    scores = q @ k.mT + max(SELF, least) * torch.eye(T).to(q)
    scores = scores + q.new_full((T, T), -math.inf).triu(1)
    if buckets is not None:
        place = buckets.argsort(dim=-1, stable=True).argsort(dim=-1)  # (P, B, H, T)
        queries = buckets[..., None], (place // settings.chunk_len)[..., None]
        keys = [x.mT for x in queries]  # (P, B, H, T, 1) -> (P, B, H, 1, T)
        N_ij = in_set(*queries, *keys, settings.same_bucket).sum(dim=0)  # (B, H, T, T)
        scores = scores.masked_fill(N_ij == 0, -math.inf)
        scores = scores if settings.count_once else scores + N_ij.to(scores).log()
    return scores.softmax(dim=-1)


def rearrange(x, order):
    """The tokens of each head in another order: x (B, H, T, ...), order (B, H, T)."""
    B, H, T = order.shape
    head = torch.arange(B * H, device=x.device).view(B, H, 1)
    return x.flatten(0, 2).index_select(0, (order + T * head).flatten()).view(x.shape)


def look_back(x, nothing=0):
    """Each chunk after the one before it: (B, H, G, w, ...) -> (B, H, G, 2w, ...)."""
    before_first = torch.full_like(x[:, :, :1], nothing)
    return torch.cat([torch.cat([before_first, x[:, :, :-1]], dim=2), x], dim=3)


def round_mask(r, q, buckets, order, chunk, settings):
    """What eq. 16 adds to the scores of round r: (B, H, G, w, 2w), in sorted order."""
    cut = lambda x: x.unflatten(2, (-1, settings.chunk_len))[..., None]

    def found(other):
        queries = [cut(rearrange(x[other], order[r])) for x in (buckets, chunk)]
        keys = [look_back(x).mT for x in queries]  # (B, H, G, w, 1) -> (B, H, G, 1, 2w)
        return in_set(*queries, *keys, settings.same_bucket)  # (B, H, G, w, 2w)

    others = [n for n in range(len(buckets)) if n != r and settings.count_once]
    mine = found(r)
    N_ij = sum((found(n).byte() for n in others), start=mine.byte())
    mask = q.new_zeros(mine.shape)
    for n in range(2, len(others) + 2):
        mask.masked_fill_(N_ij == n, -math.log(n))
    i, after_all = cut(order[r]), order.size(3)
    j = look_back(i, nothing=after_all).mT
    return mask.masked_fill_(i == j, SELF).masked_fill_((j > i) | ~mine, -math.inf)


def one_round(q, k, v, mask, order, place):
    """Attention in one round: o (B, H, T, d_head) and z (B, H, T, 1). Eq. 13, 14."""
    cut = lambda x: rearrange(x, order).unflatten(2, (-1, mask.size(3)))
    scores = cut(q) @ look_back(cut(k)).mT + mask  # (B, H, G, w, 2w)
    o = scores.softmax(dim=-1) @ look_back(cut(v))  # (B, H, G, w, d_head)
    z = scores.logsumexp(dim=-1, keepdim=True)  # (B, H, G, w, 1)
    return rearrange(o.flatten(2, 3), place), rearrange(z.flatten(2, 3), place)


def lsh_attention(q, k, v, buckets, settings):
    """Attention within buckets (P, B, H, T): q, k, v (B, H, T, d_head) -> as v.

    Any T: the end is filled up to whole chunks, in a bucket that comes last.
    """
    inputs.check_attention(q, k, v, buckets)
    T, w, rounds = q.size(2), settings.chunk_len, []
    wide = torch.promote_types(q.dtype, torch.float32)
    whole = [F.pad(x.to(wide), (0, 0, 0, -T % w)) for x in (q, k, v)]
    buckets = F.pad(buckets.int(), (0, -T % w), value=int(buckets.max()) + 1)
    order = buckets.argsort(dim=-1, stable=True)  # (P, B, H, T): which token comes n-th
    place = order.argsort(dim=-1)  # the inverse: at which place each token comes
    with inputs.autocast(q.device.type, enabled=False):
        for r in range(len(buckets)):
            mask = round_mask(r, whole[0], buckets, order, place // w, settings)
            rounds.append(one_round(*whole, mask, order[r], place[r]))
        o, z = (torch.stack(of_rounds) for of_rounds in zip(*rounds))
        return (z.softmax(dim=0) * o).sum(dim=0)[:, :, :T].to(v.dtype)  # eq. 15


class LSHAttention(nn.Module):
    """Shared-QK attention among the keys that fall in the same buckets."""

    attend = staticmethod(lsh_attention)

    def __init__(self, d_model, n_heads, settings, dropout=0.0, seed=0):
        super().__init__()
        self.n_heads, self.settings, self.seed = n_heads, settings, seed
        self.norm, self.dropout = nn.LayerNorm(d_model), nn.Dropout(dropout)
        self.query_value = nn.Linear(d_model, 2 * d_model, bias=False)
        self.out = nn.Linear(d_model, d_model, bias=False)

    def heads(self, x):
        """(B, T, d_model) -> q, unit-norm k, v: (B, H, T, d_head) each."""
        qv = self.query_value(self.norm(x)).unflatten(-1, (2, self.n_heads, -1))
        q, v = qv.permute(2, 0, 3, 1, 4)
        return q, F.normalize(q, dim=-1), v

    def hash(self, q, seed):
        """Buckets (P, B, H, T); None for exact attention, always within two chunks."""
        w, n_rounds = self.settings.chunk_len, self.settings.n_rounds
        if n_rounds == 0 or q.size(2) <= 2 * w:
            return None
        return hash_vectors(q.detach(), 2 * math.ceil(q.size(2) / w), n_rounds, seed)

    def forward(self, x, buckets=None):
        """x (B, T, d_model), buckets if known -> change (B, T, d_model), buckets."""
        q, k, v = self.heads(x)
        # Drawn even if buckets are known: what comes after finds the same random state.
        seed = int(torch.randint(2**31, ())) if self.training else self.seed
        buckets = self.hash(q, seed) if buckets is None else buckets
        if buckets is None:
            y = attention_weights(q, k, None, self.settings) @ v  # (B, H, T, d_head)
        else:
            y = self.attend(q, k, v, buckets, self.settings)
        return self.dropout(self.out(y.transpose(1, 2).flatten(2))), buckets


class FeedForward(nn.Module):
    """The same at every position: computed in pieces, if there are many tokens."""

    def __init__(self, d_model, d_ff, piece_len, dropout=0.0):
        super().__init__()
        self.piece_len, self.dropout = piece_len, nn.Dropout(dropout)
        linear = nn.Linear(d_model, d_ff), nn.ReLU(), nn.Linear(d_ff, d_model)
        self.layers = nn.Sequential(nn.LayerNorm(d_model), *linear)

    def forward(self, x, buckets=None):
        """x (B, T, d_model) -> change (B, T, d_model), no buckets."""
        if x.size(1) <= self.piece_len:
            return self.dropout(self.layers(x)), None
        pieces = x.split(self.piece_len, dim=1)  # each computed again in backward
        pieces = [checkpoint(self.layers, p, use_reentrant=False) for p in pieces]
        return self.dropout(torch.cat(pieces, dim=1)), None


def run(blocks, x):
    """x (B, T, d_model) through all blocks, in two streams: [x1 ; x2]. Eq. 9.

    And for each block, to compute it again: the random states before it, its buckets.
    """
    x1, x2, kept = x, x, []
    for block in blocks:
        states = inputs.random_states(x.device)
        change, buckets = block(x2)
        x1, x2 = x2, x1 + change  # the streams change roles
        kept += [*states, buckets]
    return torch.cat([x1, x2], dim=-1), kept


def step_back(block, y1, y2, dy1, dy2, buckets, autocast, grads):
    """From y1 = x2, y2 = x1 + f(x2) and their gradients back to x1, x2 and theirs.

    Adds the gradients of f's parameters to grads, {parameter: gradient}.
    """
    own = [p for p in block.parameters() if p.requires_grad]
    with torch.enable_grad(), inputs.autocast(y1.device.type, **autocast):
        x2 = y1.detach().requires_grad_()
        f, _ = block(x2, buckets)
    df = torch.autograd.grad(f, [x2, *own], dy2.to(f.dtype), allow_unused=True)
    for p, d in zip(own, df[1:]):
        if d is not None:
            grads[p] = d if grads[p] is None else grads[p] + d
    return y2 - f.detach(), y1, dy2, dy1 + df[0]


class Reversible(torch.autograd.Function):
    """As `run`, but keeps nothing that was computed on the way: only what comes out."""

    @staticmethod
    def forward(ctx, x, blocks, *parameters):
        ctx.blocks, ctx.modes = blocks, inputs.modes(blocks)
        ctx.autocast = inputs.autocast_settings(x.device.type)
        with inputs.autocast(x.device.type, **ctx.autocast):
            y, kept = run(blocks, x)
        ctx.save_for_backward(y, *kept, *parameters)  # changed in place: an error
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        inputs.check_unchanged(ctx.modes, inputs.modes(ctx.blocks))
        y, *kept = ctx.saved_tensors
        streams = [*y.chunk(2, dim=-1), *dy.chunk(2, dim=-1)]  # y1, y2, dy1, dy2
        grads = {p: None for p in ctx.blocks.parameters() if p.requires_grad}
        now = inputs.random_states(y.device)
        for n, block in reversed(list(enumerate(ctx.blocks))):
            *states, buckets = kept[3 * n : 3 * n + 3]
            inputs.random_states(y.device, states)
            streams = step_back(block, *streams, buckets, ctx.autocast, grads)
        inputs.random_states(y.device, now)
        return streams[2] + streams[3], None, *grads.values()  # x was both streams


class AxialPositions(nn.Module):
    """Learned positions from two tables: n is row n // columns, column n % columns."""

    def __init__(self, shape, d_model):
        super().__init__()
        self.rows = nn.Parameter(torch.randn(shape[0], 1, d_model // 2))
        self.columns = nn.Parameter(torch.randn(1, shape[1], d_model - d_model // 2))

    def forward(self, T):
        """The first T positions, (T, d_model)."""
        inputs.check_number("T", T, 1, len(self.rows) * self.columns.size(1))
        rows = self.rows.expand(-1, self.columns.size(1), -1)
        columns = self.columns.expand(self.rows.size(0), -1, -1)
        return torch.cat([rows, columns], dim=-1).flatten(0, 1)[:T]


class Reformer(nn.Module):
    """A language model for long windows: hashed attention, in reversible layers.

    tokens (B, T) int64, T <= max_len = axial_shape[0] * axial_shape[1] -> logits (B, T,
    vocab_size), None: no memory. reversible=False computes the same, and keeps it all.
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
        piece_len = piece_len if reversible else self.max_len
        for n in range(n_layers):
            attention = LSHAttention(d_model, n_heads, self.settings, dropout, seed=n)
            self.blocks += [attention, FeedForward(d_model, d_ff, piece_len, dropout)]
        self.norm = nn.LayerNorm(2 * d_model)
        self.head = nn.Linear(2 * d_model, vocab_size)

    def forward(self, tokens, memory=None):
        inputs.check_tokens(tokens, self.embedding.num_embeddings, self.max_len)
        memory = inputs.checked_memory(memory, None)  # there is none
        x = self.dropout(self.embedding(tokens) + self.positions(tokens.size(1)))
        if self.reversible:
            learned = [p for p in self.blocks.parameters() if p.requires_grad]
            y = Reversible.apply(x, self.blocks, *learned)  # (B, T, 2 * d_model)
        else:
            y, _ = run(self.blocks, x)
        return self.head(self.norm(y)), memory
