"""Attention by locality-sensitive hashing: a query looks only where similar keys are.

Kitaev, Kaiser, Levskaya, "Reformer: The Efficient Transformer", ICLR 2020 (arXiv
2001.04451), section 2. The model, and section 3, stand in reformer.py.

Letters in the shape comments: B batch, T tokens, H heads, d_model = H * d_head, R hash
rounds, c tokens in a chunk, N = B * H * T rows (the vectors of all heads, one after the
other), G = N / c chunks, g of them at a time.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

from memtx_minimal import inputs

SELF, NEVER = -1e5, -1e9  # eq. 16: yourself, if nothing else is there; keys outside the set
LOG2E = math.log2(math.e)  # exp(x) = exp2(LOG2E * x), and exp2 is fast for masked scores
PAIRS = 2**19  # scores held at a time: 2 MiB, which stay in the processor's cache


def hash_vectors(x, n_buckets, n_rounds, seed):
    """Angular hashing: h(x) = argmax [xR ; -xR]. Section 2, "Locality sensitive hashing".

    (B, H, T, d_head) -> (R, B, H, T). Above 32 buckets a hash is made of two smaller ones,
    h1 + h2 * b1, both even: n_buckets is then met as nearly as that allows.
    """
    inputs.check_hash(x, n_buckets, n_rounds)
    b1 = n_buckets if n_buckets <= 32 else 2 ** (n_buckets.bit_length() // 2)
    generator = torch.Generator().manual_seed(seed)
    buckets, step = 0, 1
    for b in [b1] if b1 == n_buckets else [b1, 2 * round(n_buckets / b1 / 2)]:
        R = torch.randn(n_rounds, 1, x.size(1), x.size(3), b // 2, generator=generator)
        xR = x @ R.to(x)  # (R, B, H, T, b / 2)
        buckets = buckets + step * torch.cat([xR, -xR], dim=-1).argmax(dim=-1)
        step *= b
    dtype = torch.uint8 if step <= 2**8 else torch.int16 if step <= 2**15 else torch.int32
    return buckets.to(dtype)  # (R, B, H, T)


def sort_buckets(buckets, c, bucket_mask=True):
    """Each head's tokens sorted by bucket, then by position, and cut in chunks of c.

    (R, B, H, T) -> order (R, N): the row that comes n-th; code (R, N): row i may look at
    row j, as far as this round goes, if 0 <= code_i - code_j <= 1 and j is no later than i.
    """
    T, rows = buckets.size(3), buckets.flatten(1, 2).int()  # (R, B * H, T)
    heads = torch.arange(rows.size(1), device=rows.device)[:, None]
    keys = (rows + heads * (1 + rows.max())).flatten(1)  # (R, N), head by head
    order = torch.stack([key.argsort(stable=True) for key in keys])
    chunk = torch.arange(order.size(1), device=order.device) % T // c  # (N,)
    chunk = torch.empty_like(order).scatter_(1, order, chunk.expand_as(order))
    return order, chunk + 2 * rows.flatten(1) if bucket_mask else chunk


def exact_mask(q):
    """Added to all scores (T, T): the future hidden, yourself as the last resort."""
    T, worst = q.size(2), max(SELF, torch.finfo(q.dtype).min / 2)  # -1e5 is too much for half
    future = q.new_full((T, T), float("-inf")).triu(1)
    return future + worst * torch.eye(T).to(q)


def attention_weights(q, k, buckets, c, bucket_mask=True, duplicates=True):
    """Eq. 16 in the slow way: all weights (B, H, T, T), in the order of the text.

    Without buckets, exact attention. lsh_attention does the same, and never holds them.
    """
    scores = q @ k.mT + exact_mask(q)
    if buckets is not None:
        code = sort_buckets(buckets, c, bucket_mask)[1].view(buckets.shape)  # (R, B, H, T)
        N_ij = (code[..., None] - code[..., None, :] >> 1 == 0).sum(dim=0)  # (B, H, T, T)
        scores = scores.masked_fill(N_ij == 0, float("-inf"))
        scores = scores if duplicates else scores + N_ij.to(scores).log()
    return scores.softmax(dim=-1)


def chunks(x, place, c):
    """Sorted rows, chunk by chunk: (N, d) -> (G, c, d)."""
    return x.index_select(0, place).unflatten(0, (-1, c))


def windows(x, place, c):
    """The same, each with the chunk before it: (N, d) -> (G, d, 2c), a view."""
    return x.index_select(0, torch.cat([place[:c], place])).unfold(0, 2 * c, c)


def masked_scores(q, k, order, labels, r, c, T, duplicates):
    """Round r by eq. 16, some chunks at a time: their slice, q, k, scores and N_ij.

    labels (N, R + 1): the codes of all rounds, and the positions. q (g, c, d), k (g, d, 2c);
    scores (g, c, 2c), in base 2 and without -log N_ij: divide their exponentials by N_ij,
    the number of rounds in which i sees j.
    """
    q, k = chunks(q, order[r], c), windows(k, order[r], c)
    a = chunks(labels, order[r], c)  # (G, c, R + 1)
    b = windows(labels, order[r], c).contiguous()  # (G, R + 1, 2c)
    b[:: T // c, -1, :c] = T  # before a head's first chunk lies nothing: call it future
    self_mask = F.pad(SELF * torch.eye(c).to(q), (c, 0))  # (c, 2c)
    others = [o for o in range(len(order)) if o != r and duplicates]
    for start in range(0, len(q), max(1, PAIRS // (2 * c * c))):
        s = slice(start, start + max(1, PAIRS // (2 * c * c)))
        difference = lambda n: a[s, :, n, None] - b[s, n, None]  # (g, c, 2c)
        scores = torch.baddbmm(self_mask, q[s], k[s], beta=LOG2E, alpha=LOG2E)
        outside = difference(r).bitwise_right_shift_(1)  # 0 if the difference is 0 or 1
        outside |= difference(-1).lt_(0)  # in the future
        scores.sub_(outside.ne_(0), alpha=-NEVER)
        N_ij = 1 + sum(difference(o).bitwise_right_shift_(1).eq_(0) for o in others)
        yield s, q[s], k[s], scores, torch.as_tensor(N_ij).to(q)


def attend(q, k, v, order, labels, r, *how):
    """Round r: for each row its top score, sum of weights (N, 1), and weighted sum (N, d)."""
    v, parts = windows(v, order[r], how[0]).mT, []  # (G, 2c, d)
    for s, _, _, scores, N_ij in masked_scores(q, k, order, labels, r, *how):
        top = scores.amax(dim=-1, keepdim=True)  # (g, c, 1)
        p = scores.sub_(top).exp2_().div_(N_ij)  # (g, c, 2c)
        parts.append((top, p.sum(dim=-1, keepdim=True), p @ v[s]))
    rank = torch.empty_like(order[r]).scatter_(0, order[r], torch.arange(len(q)).to(order))
    return [torch.cat(part).flatten(0, 1).index_select(0, rank) for part in zip(*parts)]


def attend_backward(d_out, shift, top, q, k, v, order, labels, r, *how):
    """What round r adds to the gradients of q, k and v, each (N, d)."""
    c, v, parts = how[0], windows(v, order[r], how[0]), []
    d_out, shift, top = (chunks(x, order[r], c) for x in (d_out, shift, top))  # (G, c, ...)
    for s, q_, k_, scores, N_ij in masked_scores(q, k, order, labels, r, *how):
        p = scores.sub_(top[s]).exp2_().div_(N_ij)  # (g, c, 2c)
        d_scores = (d_out[s] @ v[s]).sub_(shift[s]).mul_(p)
        parts.append((d_scores @ k_.mT, d_scores.mT @ q_, p.mT @ d_out[s]))
    dq, dk, dv = map(torch.cat, zip(*parts))  # (G, c, d), (G, 2c, d), (G, 2c, d)
    for d in (dk, dv):
        d[:-1, c:] += d[1:, :c]  # a chunk is also looked at from the next one
    rank = torch.empty_like(order[r]).scatter_(0, order[r], torch.arange(len(q)).to(order))
    return [d[:, -c:].flatten(0, 1).index_select(0, rank) for d in (dq, dk, dv)]


def full_precision(method):
    """Keeps autocast out of forward and backward, which must get the same scores."""

    def outside_autocast(ctx, x, *rest):
        with inputs.autocast(x.device.type, enabled=False):
            return method(ctx, x, *rest)

    return outside_autocast


class HashedAttention(torch.autograd.Function):
    """Softmax over the union of each row's sets: q, k, v (N, d) -> (N, d). Eq. 13 to 16.

    Keeps no scores: the backward pass computes them again. Rounds are added up: with
    sums of weights total_r and weighted sums out_r, o = sum_r out_r / sum_r total_r.
    """

    @staticmethod
    @full_precision
    def forward(ctx, q, k, v, order, labels, *how):
        top, total, out = q.new_full((len(q), 1), 2 * NEVER), 0, 0
        for r in range(len(order)):
            new, t, o = attend(q, k, v, order, labels, r, *how)
            old, top = top, torch.maximum(top, new)
            total = total * (old - top).exp2() + t * (new - top).exp2()
            out = out * (old - top).exp2() + o * (new - top).exp2()
        out = out / total
        ctx.save_for_backward(q, k, v, order, labels, top, total, out)
        ctx.how = how
        return out

    @staticmethod
    @once_differentiable
    @full_precision
    def backward(ctx, d_out):
        q, k, v, order, labels, top, total, out = ctx.saved_tensors
        d_out = d_out / total
        shift = (d_out * out).sum(dim=-1, keepdim=True)  # (N, 1): of the softmax's backward
        grads = [torch.zeros_like(x) for x in (q, k, v)]
        for r in range(len(order)):
            more = attend_backward(d_out, shift, top, q, k, v, order, labels, r, *ctx.how)
            for grad, d in zip(grads, more):
                grad += d
        return *grads, None, None, None, None, None


def lsh_attention(q, k, v, buckets, c, bucket_mask=True, duplicates=True):
    """Attention within buckets (R, B, H, T): q, k, v (B, H, T, d_head) -> the same shape.

    Any T: the end is padded to whole chunks, in a bucket that comes last. bucket_mask=False
    and duplicates=False leave out what later code leaves out of eq. 16.
    """
    inputs.check_sizes({"chunk_len": c})
    inputs.check_attention(q, k, v, buckets)
    T, pad = q.size(2), -q.size(2) % c
    buckets = F.pad(buckets.int(), (0, pad), value=int(buckets.max()) + 1)
    order, code = sort_buckets(buckets, c, bucket_mask)
    position = torch.arange(code.size(1), device=q.device) % (T + pad)  # (N,)
    labels = torch.cat([code, position[None]]).T  # (N, R + 1)
    labels = labels.to(torch.int16 if labels.max() + 1 < 2**15 else torch.int32).contiguous()
    wide = torch.promote_types(q.dtype, torch.float32)
    rows = [F.pad(x.to(wide), (0, 0, 0, pad)).flatten(0, 2) for x in (q, k, v)]  # (N, d_head)
    out = HashedAttention.apply(*rows, order, labels, c, T + pad, duplicates)
    return out.view(*v.shape[:2], T + pad, -1)[:, :, :T].to(v.dtype)


@dataclass(slots=True)
class Settings:
    """How keys are found, in all layers of a model. It may be changed at any time."""

    chunk_len: int
    n_rounds: int  # 0 is exact attention
    bucket_mask: bool = True  # hide keys of other buckets in the same chunks
    duplicates: bool = True  # count a key once that several rounds find: -log N_ij

    def __setattr__(self, name, value):
        inputs.check_sizes({name: value})
        object.__setattr__(self, name, value)

    def arguments(self):
        return self.chunk_len, self.bucket_mask, self.duplicates


class LSHAttention(nn.Module):
    """Shared-QK attention over the keys that fall in the same buckets."""

    piece_len = None  # needs all tokens at once

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

    def hash(self, q, seed=None):
        """Buckets (R, B, H, T), by the rotations of a seed; None: see all."""
        chunk_len, n_rounds = self.settings.chunk_len, self.settings.n_rounds
        if n_rounds == 0 or q.size(2) <= 2 * chunk_len:
            return None  # two chunks see nearly all anyway, and exact attention costs no more
        n_buckets = 2 * math.ceil(q.size(2) / chunk_len)  # so that c = 2 T / n_buckets
        seed = self.seed if seed is None else seed
        return hash_vectors(q.detach(), n_buckets, n_rounds, seed)

    def forward(self, x, buckets=None):
        """x (B, T, d_model), buckets if known -> change (B, T, d_model), buckets."""
        q, k, v = self.heads(x)
        # Training hashes anew each time. Drawn even where buckets are known, so that what
        # is computed a second time finds the same random numbers behind it.
        seed = int(torch.randint(2**31, ())) if self.training else None
        buckets = self.hash(q, seed) if buckets is None else buckets
        if buckets is None:
            y = F.scaled_dot_product_attention(q, k, v, exact_mask(q), scale=1.0)
        else:
            y = lsh_attention(q, k, v, buckets, *self.settings.arguments())
        y = y.to(v.dtype).transpose(1, 2).flatten(2)  # (B, T, d_model)
        return self.dropout(self.out(y)), buckets
