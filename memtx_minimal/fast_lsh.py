"""Appendix B: hashed attention, faster. The same results as in reformer.py.

Four changes: codes of 16 bits decide who sees whom; exponentials have base 2; no scores
are kept, the backward pass computes them again; and it all goes some chunks at a time.

Letters in the shape comments: B batch, T tokens, H heads, P hash rounds, w tokens in a
chunk, BHT = B * H * T rows (the vectors of all heads, one after the other), G = BHT / w
chunks, g of them at a time.
"""

import math

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from memtx_minimal import inputs
from memtx_minimal.reformer import SELF, LSHAttention, Reformer, lsh_attention

NEVER = -1e9  # in place of -inf: a finite number has a difference to every other
LOG2E = math.log2(math.e)  # exp(x) = exp2(LOG2E * x)
PAIRS = 2**19  # scores held at a time: 2 MiB


def sort_and_code(buckets, w, same_bucket=True):
    """Sorts each head's tokens by bucket, then by position, and gives each one a code.

    (P, B, H, T) -> order (P, BHT): which row comes n-th; code (P, BHT): row i finds row
    j where code_i - code_j is 0 or 1.
    """
    T, rows = buckets.size(3), buckets.flatten(1, 2).int()  # (P, B * H, T)
    heads = torch.arange(rows.size(1), device=rows.device)[:, None]
    keys = (rows + heads * (1 + rows.max())).flatten(1)  # (P, BHT), head by head
    order = torch.stack([key.argsort(stable=True) for key in keys])
    chunk = torch.arange(order.size(1), device=order.device) % T // w  # of n-th row
    # Scattered to where each row stands in the text: from here on, chunk[i] is row i's.
    chunk = torch.empty_like(order).scatter_(1, order, chunk.expand_as(order))
    return order, chunk + 2 * rows.flatten(1) if same_bucket else chunk


def inverse(order):
    """Where each row comes, given which row comes n-th: (BHT,) -> (BHT,)."""
    places = torch.arange(len(order), device=order.device)
    return torch.empty_like(order).scatter_(0, order, places)


def chunks(x, order, w):
    """Sorted rows, chunk by chunk: (BHT, d) -> (G, w, d)."""
    return x.index_select(0, order).unflatten(0, (-1, w))


def windows(x, order, w):
    """The same, each with the chunk before it: (BHT, d) -> (G, d, 2w), a view."""
    return x.index_select(0, torch.cat([order[:w], order])).unfold(0, 2 * w, w)


def masked_scores(q, k, order, labels, r, w, T, count_once):
    """Round r by eq. 16, some chunks at a time: their slice, q, k, scores and N_ij.

    labels (BHT, P + 1): the codes of all rounds, and the positions. q (g, w, d), k (g,
    d, 2w); scores (g, w, 2w), in base 2 and without -log N_ij: divide their
    exponentials.
    """
    q, k = chunks(q, order[r], w), windows(k, order[r], w)
    a = chunks(labels, order[r], w)  # (G, w, P + 1)
    # A copy, (G, P + 1, 2w): the next line writes, and windows overlap.
    b = windows(labels, order[r], w).contiguous()
    b[:: T // w, -1, :w] = T  # before a head's first chunk lies nothing: call it future
    self_mask = F.pad(SELF * torch.eye(w).to(q), (w, 0))  # (w, 2w)
    others = [o for o in range(len(order)) if o != r and count_once]
    for start in range(0, len(q), max(1, PAIRS // (2 * w * w))):
        s = slice(start, start + max(1, PAIRS // (2 * w * w)))
        difference = lambda n: a[s, :, n, None] - b[s, n, None]  # (g, w, 2w)
        scores = torch.baddbmm(self_mask, q[s], k[s], beta=LOG2E, alpha=LOG2E)
        outside = difference(r).bitwise_right_shift_(1)  # 0 if the difference is 0 or 1
        outside |= difference(-1).lt_(0)  # in the future
        scores.sub_(outside.ne_(0), alpha=-NEVER)  # adds NEVER to what is hidden
        N_ij = 1 + sum(difference(o).bitwise_right_shift_(1).eq_(0) for o in others)
        yield s, q[s], k[s], scores, torch.as_tensor(N_ij).to(q)


def attend(q, k, v, order, labels, r, *how):
    """Round r: each row's top score and sum of weights, (BHT, 1) each, and weighted
    sum (BHT, d).

    A weight is 2 ** (score - top) / N_ij: they do not sum to 1.
    """
    v, parts = windows(v, order[r], how[0]).mT, []  # (G, 2w, d)
    for s, _, _, scores, N_ij in masked_scores(q, k, order, labels, r, *how):
        top = scores.amax(dim=-1, keepdim=True)  # (g, w, 1)
        p = scores.sub_(top).exp2_().div_(N_ij)  # (g, w, 2w)
        parts.append((top, p.sum(dim=-1, keepdim=True), p @ v[s]))
    place = inverse(order[r])
    parts = (torch.cat(part).flatten(0, 1) for part in zip(*parts))  # (BHT, ...)
    return [part.index_select(0, place) for part in parts]


def attend_backward(d_out, shift, top, q, k, v, order, labels, r, *how):
    """What round r adds to the gradients of q, k and v, each (BHT, d)."""
    w, v, parts = how[0], windows(v, order[r], how[0]), []
    d_out, shift, top = (chunks(x, order[r], w) for x in (d_out, shift, top))
    for s, q_, k_, scores, N_ij in masked_scores(q, k, order, labels, r, *how):
        p = scores.sub_(top[s]).exp2_().div_(N_ij)  # (g, w, 2w)
        d_scores = (d_out[s] @ v[s]).sub_(shift[s]).mul_(p)  # of scores in base e
        parts.append((d_scores @ k_.mT, d_scores.mT @ q_, p.mT @ d_out[s]))
    dq, dk, dv = map(torch.cat, zip(*parts))  # (G, w, d), (G, 2w, d), (G, 2w, d)
    for d in (dk, dv):
        d[:-1, w:] += d[1:, :w]  # the next chunk looks back; 0 from another head's
    place = inverse(order[r])
    return [d[:, -w:].flatten(0, 1).index_select(0, place) for d in (dq, dk, dv)]


def full_precision(method):
    """Keeps autocast out of forward and backward, which must get the same scores."""

    def outside_autocast(ctx, x, *rest):
        with inputs.autocast(x.device.type, enabled=False):
            return method(ctx, x, *rest)

    return outside_autocast


class HashedAttention(torch.autograd.Function):
    """Softmax over the keys that rounds find: q, k, v (BHT, d) -> like q. Eq. 13 to 16.

    Keeps no scores: the backward pass computes them again. Rounds are added up: with
    sums of weights total_r and weighted sums out_r, o = sum_r out_r / sum_r total_r.
    """

    @staticmethod
    @full_precision
    def forward(ctx, q, k, v, order, labels, *how):
        # Lower than any score: the first round replaces it.
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
        shift = (d_out * out).sum(dim=-1, keepdim=True)  # (BHT, 1)
        known, grads = (d_out, shift, top), [torch.zeros_like(x) for x in (q, k, v)]
        for r in range(len(order)):
            more = attend_backward(*known, q, k, v, order, labels, r, *ctx.how)
            for grad, d in zip(grads, more):
                grad += d
        return *grads, None, None, None, None, None


def fast_attention(q, k, v, buckets, settings):
    """The same as reformer.lsh_attention: q, k, v (B, H, T, d_head) -> as v."""
    inputs.check_attention(q, k, v, buckets)
    T, w = q.size(2), settings.chunk_len
    pad = -T % w
    buckets = F.pad(buckets.int(), (0, pad), value=int(buckets.max()) + 1)
    order, code = sort_and_code(buckets, w, settings.same_bucket)
    position = torch.arange(code.size(1), device=q.device) % (T + pad)  # (BHT,)
    labels = torch.cat([code, position[None]]).T  # (BHT, P + 1)
    small = torch.int16 if labels.max() + 1 < 2**15 else torch.int32
    labels = labels.to(small).contiguous()
    wide = torch.promote_types(q.dtype, torch.float32)
    rows = [F.pad(x.to(wide), (0, 0, 0, pad)).flatten(0, 2) for x in (q, k, v)]
    how = w, T + pad, settings.count_once
    out = HashedAttention.apply(*rows, order, labels, *how)  # (BHT, d_head)
    return out.view(*v.shape[:2], T + pad, -1)[:, :, :T].to(v.dtype)


def speed_up(model):
    """Installs fast_attention in all layers of a Reformer, in place, and returns it.

    Nothing else changes: layers hash, project and call their hooks as before. A layer
    that is not a plain LSHAttention may compute something else, and is refused.
    """
    if not isinstance(model, Reformer):
        raise ValueError(f"speed_up takes a Reformer, not a {type(model).__name__}")
    for n, block in enumerate(model.blocks[::2]):
        where, kind = f"the attention of layer {n}", type(block)
        if kind is not LSHAttention:
            raise ValueError(f"{where} is a {kind.__name__}, not a plain LSHAttention")
        if "forward" in vars(block):
            raise ValueError(f"{where} has a forward of its own")
        if block.attend not in (lsh_attention, fast_attention):
            raise ValueError(f"{where} attends in a way of its own, by {block.attend}")
    for block in model.blocks[::2]:
        block.attend = fast_attention
    return model
