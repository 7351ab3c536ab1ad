# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#       format_version: '1.3'
#       jupytext_version: 1.19.6
#   kernelspec:
#     display_name: Python 3 (ipykernel)
#     language: python
#     name: python3
# ---

# %% [markdown]
# # B. What makes hashed attention fast

# %% [markdown] tags=["badges"]
# No links to Colab and Kaggle here: the project has no public address yet.
# To run this notebook, type `make lab` in your copy of the project.

# %% [markdown]
# Chapter 4 computes hashed attention in the plainest way that is not slow. This appendix computes the same numbers about twice as fast and keeps
# a fifth of the memory, by four tricks: **codes** of 16 bits that decide who sees whom, exponentials of **base 2**, scores that are **computed
# again** in the backward pass instead of being kept, and computed in **pieces**, so that few exist at a time. Each is measured, on the CPU. At
# the end one call installs all of it in a Reformer: `fast_lsh.speed_up(model)`, of `memtx_minimal.fast_lsh`, which this page writes.
#
# **When you have read it, you can** find out where the time of a tensor program goes, write a backward pass by hand for a softmax that is split
# into parts, and say what each trick buys.
#
# **You need** chapter 4, up to section 4.5, and section 4.6 for the model that B.6 speeds up. **Time and memory:** less than 2 minutes and 1 GiB
# on two CPU cores.

# %% tags=["colab-install"]
import importlib.util

# Where memtx_minimal is installed, this cell does nothing.
if importlib.util.find_spec("memtx_minimal") is None:
    raise ModuleNotFoundError(
        "This notebook needs the package memtx_minimal and cannot fetch it: "
        "the project has no public address yet. In your copy of the project, "
        "type: pip install ."
    )

# %% tags=["setup"]
import contextlib
import copy
import functools
import math
import statistics
import time
from unittest.mock import patch

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from memtx_minimal import exercises, figures, inputs, measure, training
from memtx_minimal.reformer import (
    SELF, LSHAttention, Reformer, Settings, hash_vectors, in_set, lsh_attention,
    round_mask,
)  # fmt: skip

started = time.perf_counter()
figures.use_style()
device, SEED = training.best_device(), 0
print(f"PyTorch {torch.__version__} on {device}")

# %% [markdown]
# Letters as in chapter 4: `B` texts, `T` tokens, `H` heads, `P` rounds, `w` tokens in a chunk. New here: the vectors of all texts and heads are
# laid one after the other, as `BHT = B * H * T` **rows**; they make `G = BHT / w` chunks, of which `g` are handled at a time.
#
# ## B.1 Where the time goes
#
# One layer's attention for a text of 4,096 tokens, two rounds, chunks of 64, four heads of 32.

# %%
T, w, P = 4096, 64, 2
torch.manual_seed(SEED)
q, v = torch.randn(2, 1, 4, T, 32, device=device).unbind()  # (B, H, T, d_head)
q, v = q.requires_grad_(), v.requires_grad_()
buckets = hash_vectors(q.detach(), 2 * T // w, P, seed=SEED)  # (P, B, H, T)
settings = Settings(w)


def ms(ways, rounds=5):
    """{name: run} -> {name: median milliseconds}. The ways take turns."""
    times, how = {name: [] for name in ways}, dict(warmup=1, rounds=1, device=device)
    for name, run in rounds * list(ways.items()):
        times[name].append(1e3 * measure.seconds(run, **how))
    return {name: statistics.median(of_way) for name, of_way in times.items()}


def plain():
    return lsh_attention(q, F.normalize(q, dim=-1), v, buckets, settings)


order = buckets.argsort(dim=-1, stable=True)
chunk = order.argsort(dim=-1) // w
mask = lambda: round_mask(0, q.detach(), buckets.int(), order, chunk, settings)
ways = {
    "forward": plain,
    "of these, the masks": lambda: [mask() for _ in range(P)],
    "forward and backward": lambda: plain().sum().backward(),
}
for name, value in ms(ways).items():
    print(f"{name:21} {value:6.1f} ms")

# %% [markdown]
# A large part of the forward pass decides who sees whom, by the masks; the rest is scores, exponentials and sums. The masks and the exponentials
# come first.
#
# ## B.2 Codes: one small number instead of two comparisons
#
# Chapter 4 compares buckets and chunks, each in a tensor of its own. Give each token one number instead, its **code**: twice its bucket, plus
# its chunk. Then, within a head, $j$ is in $i$'s set, the future aside, exactly if $\text{code}_i - \text{code}_j$ is 0 or 1. Why?
#
# - Same bucket, same chunk: the codes are equal. Same bucket, $j$ one chunk earlier: they differ by 1. Two chunks earlier: by 2 or more. One
#   chunk later: by $-1$ or less, and that is the future anyway.
# - Another bucket: tokens are sorted by bucket, so a later bucket never lies in an earlier chunk. If $i$'s bucket is the larger one, twice the
#   bucket grows by at least 2 and the chunk does not fall: the difference is 2 or more. If it is the smaller one, it is $-2$ or less.
#
# The length $T$ is a multiple of `w` here. If a token may look at other buckets, too (`same_bucket=False`), its chunk alone is the code.

# %% tags=["from-module"]
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

# %% [markdown]
# Here are the twelve tokens of chapter 4 (chunks of 4, round 1) with their codes:

# %%
TEXT, small = "abracadabra!", [4, 4, 3, 4, 3, 0, 1, 4, 4, 3, 4, 0]
by_bucket, codes = (x[0].tolist() for x in sort_and_code(torch.tensor([[[small]]]), 4))
for name, row in [("sorted", TEXT), ("bucket", small), ("code", codes)]:
    print(f"{name:7}", *(f"{row[i]:>2}" for i in by_bucket))

# %% jupyter={"source_hidden": true} tags=["hide-input"]
difference = torch.tensor([[codes[i] - codes[j] for j in by_bucket] for i in by_bucket])
figure, axes = plt.subplots(figsize=(4.6, 4.2))
look = dict(cmap="Blues", vmin=0, vmax=2.6, xlabel="key, sorted")
figures.matrix(axes, ((difference == 0) | (difference == 1)).float(), **look)
axes.set_ylabel("query, sorted")
for i in range(12):
    for j in range(12):
        axes.text(j, i, int(difference[i, j]), ha="center", va="center", fontsize=10)
axes.set_xticks(range(12), labels=[TEXT[i] for i in by_bucket])
axes.set_yticks(range(12), labels=[TEXT[i] for i in by_bucket])
axes.set_title("code of the query minus code of the key")
figures.show(
    figure,
    "The difference of codes is 0 or 1, in blue, exactly for pairs of one bucket in "
    "the same chunk or in the chunk before; for other buckets it is at least 2, or "
    "negative.",
)

# %% [markdown]
# Codes are small: of the order of twice the number of buckets. They fit in 16 bits (and so do positions up to 32,767, which will tell the future
# from the past). A comparison of 16-bit numbers moves a quarter of the bytes of one of 64 bits, and the processor handles four times as many at
# once. Shifting a difference right by one bit, in place, gives 0 for 0 and 1, and something else for everything else: one operation for two
# comparisons. Chapter 4's buckets have 32 bits, its chunks 64.

# %%
G = 4 * T // w
query, key = (G, w, 1), (G, 1, 2 * w)  # random numbers stand in for real ones
bucket, key_bucket = (torch.randint(128, s, device=device).int() for s in (query, key))
x, y = (torch.randint(128, s, device=device) for s in (query, key))
a, b = x.to(torch.int16), y.to(torch.int16)
ways = {
    "bucket and chunk": lambda: in_set(bucket, x, key_bucket, y),
    "difference of codes, 64 bits": lambda: (x - y).bitwise_right_shift_(1).eq_(0),
    "difference of codes, 16 bits": lambda: (a - b).bitwise_right_shift_(1).eq_(0),
}
compared = ms(ways, 9)
print(f"Who is in whose set, {G * 2 * w * w:,} pairs:")
for name, value in compared.items():
    print(f"{name:30} {value:5.2f} ms")
two_comparisons, _, one_difference = compared.values()
assert one_difference < 1.5 * two_comparisons

# %% [markdown]
# ## B.3 Exponentials in base 2
#
# Of each row of scores, chapter 4 takes the `softmax` and the `logsumexp`. By hand, the largest score, exponentials and their sum give both at
# once. But with which exponential? `softmax` has one of its own, which is quick. `torch.exp`, which `logsumexp` calls, is slow on some
# processors where its result becomes 0, as for all that is masked, and slower still at large negative numbers. `torch.exp2` is not, and $e^x =
# 2^{x \log_2 e}$: in base 2, all scores are multiplied by $\log_2 e$, and that factor goes into the matrix product, where it costs nothing. Try
# it on scores with the masks of chapter 4:

# %%
scores = torch.randn(G, w, 2 * w, device=device)
masked = scores + mask().flatten(0, 2)  # minus infinity where hidden


def by_hand(exp, scores):
    p = exp(scores - scores.amax(dim=-1, keepdim=True))
    return p, p.sum(dim=-1, keepdim=True)


ways = {
    "softmax": lambda: masked.softmax(dim=-1),
    "logsumexp": lambda: masked.logsumexp(dim=-1),
    "logsumexp, nothing masked": lambda: scores.logsumexp(dim=-1),
    "by hand, exp": lambda: by_hand(torch.exp, masked),
    "by hand, exp, masked by -1e9": lambda: by_hand(torch.exp, masked.clamp(-1e9)),
    "by hand, exp2": lambda: by_hand(torch.exp2, masked),
    "by hand, exp2, masked by -1e9": lambda: by_hand(torch.exp2, masked.clamp(-1e9)),
}
exponentials = ms(ways, 9)
for name, value in exponentials.items():
    print(f"{name:30} {value:5.2f} ms")
before = exponentials["softmax"] + exponentials["logsumexp"]
assert exponentials["by hand, exp2"] < before

# %% [markdown]
# From here on, hidden scores get $-10^9$, not minus infinity: the mask below is 0 or 1 times this number, and $0 \cdot \infty$ is not a number.
# `exp2` does not mind (last line).

# %%
NEVER = -1e9  # in place of -inf: a finite number has a difference to every other
LOG2E = math.log2(math.e)  # exp(x) = exp2(LOG2E * x)
PAIRS = 2**19  # scores held at a time: 2 MiB

# %% [markdown]
# ### The scores of a round, some chunks at a time
#
# `order` says which row comes n-th; its inverse says where each row comes. `windows` joins each chunk to the one before, as a view: nothing is
# copied twice. Rows of all heads lie in one line, so the first chunk of a head finds the last one of *another* head before it (the very first
# finds itself). That must never be seen.

# %% tags=["from-module"]
def inverse(order):
    """Where each row comes, given which row comes n-th: (BHT,) -> (BHT,)."""
    places = torch.arange(len(order), device=order.device)
    return torch.empty_like(order).scatter_(0, order, places)

# %% tags=["from-module"]
def chunks(x, order, w):
    """Sorted rows, chunk by chunk: (BHT, d) -> (G, w, d)."""
    return x.index_select(0, order).unflatten(0, (-1, w))

# %% tags=["from-module"]
def windows(x, order, w):
    """The same, each with the chunk before it: (BHT, d) -> (G, d, 2w), a view."""
    return x.index_select(0, torch.cat([order[:w], order])).unfold(0, 2 * w, w)

# %%
rows = torch.arange(8)[:, None]  # 8 rows that are sorted already, d = 1
print(windows(rows, torch.arange(8), w=2).squeeze(1).tolist())

# %% [markdown]
# Scores are computed for some chunks at a time (here 64 of the 256). The **labels** of a row are its codes in all rounds and, as the last one,
# its position. Before a head's first chunk the position is set to `T`, the future of all. $-\log N_{i,j}$ is not added to the score: the
# exponential is divided by $N_{i,j}$ later, which is the same and needs no logarithm.
#
# `*how`, in the functions below, stands for `w`, `T` (the length of a text, filled up to whole chunks) and `count_once`.

# %% tags=["from-module"]
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

# %% [markdown]
# ## B.4 Forward: sums that can be added up
#
# A round returns what is needed to add rounds up: for each row its largest score, the sum of its weights and the weighted sum of values. The
# weights are *not* normalised: $p_{ij} = 2^{\,s_{ij} \log_2 e \,-\, \text{top}_i} / N_{i,j}$, with $\text{top}_i$ the largest score in base 2.

# %% tags=["from-module"]
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

# %% [markdown]
# ## B.5 Backward: compute it again
#
# What is the gradient? Let $\bar p_{ij}$ be the final, normalised weights over all rounds, $o_i = \sum_j \bar p_{ij} v_j$, and $do_i$ the
# gradient that comes in. Then $d\bar p_{ij} = do_i \cdot v_j$, and softmax takes off the weighted mean of these, $\sum_j \bar p_{ij}\, do_i
# \cdot v_j = do_i \cdot o_i$:
#
# $$
# dv_j = \sum_i \bar p_{ij}\, do_i , \qquad
# ds_{ij} = \bar p_{ij} \left( do_i \cdot v_j - do_i \cdot o_i \right) , \qquad
# dq_i = \sum_j ds_{ij}\, k_j , \qquad dk_j = \sum_i ds_{ij}\, q_i .
# $$
#
# Everything follows from $\bar p$. From here on $\text{top}_i$ and $\text{total}_i$ are the largest score and the sum of weights of *all* rounds
# (the autograd function below joins them), and $p^{(r)}_{ij} = 2^{\,s_{ij} \log_2 e \,-\, \text{top}_i} / N_{i,j}$ is the share of round $r$:
# $\bar p_{ij} = \sum_r p^{(r)}_{ij} / \text{total}_i$. So every gradient is a sum over rounds, too, and no scores need to be kept: two numbers a
# row, and the output $o_i$. `d_out` is divided by `total` once, so that $p^{(r)}$ will do for its share of $\bar p$; `shift` is $do_i \cdot o_i$
# for this divided `d_out`. ($\log_2 e$ does not appear: $s$ is the score in base $e$, and only its exponential was computed in base 2.)

# %% tags=["from-module"]
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

# %% [markdown]
# A window's keys belong to two chunks: the gradient of its first half belongs to the chunk before, and `d[:-1, w:] += d[1:, :w]` puts it there.
# At the edge of two heads that adds what the first chunk of one head gave to the last of another: zero, because nothing was seen there.
#
# Forward and backward may run under different autocast (4.6), and both must get the same scores: autocast is kept out.

# %% tags=["from-module"]
def full_precision(method):
    """Keeps autocast out of forward and backward, which must get the same scores."""

    def outside_autocast(ctx, x, *rest):
        with inputs.autocast(x.device.type, enabled=False):
            return method(ctx, x, *rest)

    return outside_autocast

# %% [markdown]
# The autograd function adds rounds up as equations 13 to 15 do, with sums in place of their logarithms: $o = \sum_r \text{out}_r / \sum_r
# \text{total}_r$, after bringing all to one largest score.

# %% tags=["from-module"]
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

# %% tags=["from-module"]
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

# %%
def fast():
    return fast_attention(q, F.normalize(q, dim=-1), v, buckets, settings)


kept, runs = {}, {"plain": plain, "fast": fast}
for name, run in runs.items():
    kept[name] = measure.bytes_for_backward(torch.nn.Identity(), run) / 2**20
forward = ms(runs)
both = ms({name: lambda run=run: run().sum().backward() for name, run in runs.items()})
for name in runs:
    print(f"{name:5} forward {forward[name]:5.1f} ms,", end=" ")
    print(f"backward {both[name] - forward[name]:5.1f} ms, keeps {kept[name]:5.1f} MiB")
assert forward["fast"] < forward["plain"] and both["fast"] < 1.5 * both["plain"]
assert kept["fast"] < 0.3 * kept["plain"]

# %% [markdown]
# The forward pass gains most of the time. The backward pass computes all scores once more, and so hardly anything is kept. What does each trick
# buy? Take away one at a time (the results stay the same), and compare within this table: times change from one cell to the next. The peak is
# the most that one pass forwards and backwards holds.

# %%
computed, stored = masked_scores, {}


def keep_scores(q, k, order, labels, r, *how):
    """For masked_scores: forward keeps the scores of round r, backward takes them."""
    if r in stored:
        yield from stored.pop(r)
        return
    stored[r] = []
    for s, q_, k_, scores, N_ij in computed(q, k, order, labels, r, *how):
        stored[r].append((s, q_, k_, scores.clone(), N_ij))
        yield s, q_, k_, scores, N_ij


# %%
changed = functools.partial(patch.multiple, __name__)  # as long as a `with` lasts
wide_labels = lambda q, k, order, x, *how: computed(q, k, order, x.long(), *how)
# exp in place of exp2, in all tensors:
in_base_e = patch.multiple(torch.Tensor, exp2=torch.Tensor.exp, exp2_=torch.Tensor.exp_)
changes = {
    "all tricks": [],
    "scores kept": [changed(masked_scores=keep_scores)],
    "codes of 64 bits": [changed(masked_scores=wide_labels)],
    "base e": [changed(LOG2E=1.0), in_base_e],
    "all chunks at once": [changed(PAIRS=2**30)],
}


def step(change):
    with contextlib.ExitStack() as stack:
        for each in changes[change]:
            stack.enter_context(each)
        out = fast()
        out.sum().backward()
    return out


for change in changes:
    torch.testing.assert_close(step(change), fast())
spent = ms({change: lambda change=change: step(change) for change in changes}, 9)
peaks = {c: measure.peak_bytes(lambda: step(c), device) / 2**20 for c in changes}
figures.table(
    "One pass forwards and backwards",
    ["", "ms", "peak (MiB)"],
    [[change, f"{spent[change]:.1f}", f"{peaks[change]:.1f}"] for change in changes],
)
assert spent["all tricks"] < 1.2 * statistics.median(spent.values())
for change in ("scores kept", "all chunks at once"):
    assert peaks["all tricks"] < 0.9 * peaks[change]

# %% [markdown]
# Base 2 and codes of 16 bits buy time: in `base e`, all hidden scores are $-10^9$, for which you timed `exp` in B.3. The other two buy memory:
# keeping the scores takes no more time, nor does computing all chunks at once, but both hold more.
#
# ## B.6 The same numbers
#
# Fast is worth nothing if it is not the same. In float64, values and gradients, three rounds, a length that does not divide into chunks:

# %%
torch.manual_seed(SEED)
q_, v_ = torch.randn(2, 2, 3, 50, 8, dtype=torch.float64, requires_grad=True)
k_, h = F.normalize(q_, dim=-1), hash_vectors(q_.detach(), 14, n_rounds=3, seed=SEED)
ways = fast_attention, lsh_attention
outs = [way(q_, k_, v_, h, Settings(8)) for way in ways]
pull = torch.randn_like(outs[0])
grads = [torch.autograd.grad(out, (q_, v_), pull, retain_graph=True) for out in outs]
pairs = [outs, *zip(*grads)]
errors = [(x - y).abs().max() for x, y in pairs]
print("largest differences:", *(f"{e:.0e}" for e in errors))
assert max(errors) < 1e-10

# %% [markdown]
# To install it, every attention layer of a model gets the fast function in place of the plain one. Projections, hooks and hashing stay as they
# are. A layer that is not a plain one might compute something else, and is refused.

# %% tags=["from-module"]
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

# %%
torch.manual_seed(SEED)
model = Reformer(65, chunk_len=64, n_rounds=2, axial_shape=(64, 64)).to(device)
tokens = torch.randint(65, (1, T), device=device)
quick = speed_up(copy.deepcopy(model))
steps = {
    name: lambda m=m: F.cross_entropy(m(tokens)[0].mT, tokens).backward()
    for name, m in [("plain", model), ("fast", quick)]
}
of_model = ms(steps, 3)
for name, value in of_model.items():
    print(f"a step of the whole model, 4,096 tokens, {name}: {value:.0f} ms")
print(f"{of_model['plain'] / of_model['fast']:.1f} times as fast")
assert of_model["fast"] < 1.3 * of_model["plain"]

# %% [markdown]
# The rest of a step takes as long as before: hashing, projections, feed-forward and the output layer. Attention's forward pass, where most is
# gained, counts twice, because reversible layers run it once more in the backward pass.
#
# ## B.7 Exercises
#
# Write your answer where the dots stand and run the cell. `exercises.check` says that it is right, or names the case that fails, what was
# expected and what came. All [solutions](solutions/b_fast_lsh.ipynb), worked out in words and code.
#
# **B.1 A softmax in base 2** *(fill in; easy; 5 minutes)* With `exp2` alone: no `softmax`, no `exp`. Large scores must not overflow.

# %% tags=["exercise"]
def my_softmax(scores):
    """scores (n,), in base e as always -> weights (n,)."""
    return ...


exercises.check("B.1", my_softmax)

# %% [markdown]
# <details><summary>Hint</summary>
#
# $e^x = 2^{x \log_2 e}$, and a softmax stays the same if all scores get smaller by the same number.
#
# </details>
#
# **B.2 Why twice?** *(puzzle; middle; 10 minutes)* Why must codes be *twice* the bucket plus the chunk? Find two pairs (bucket, chunk), query
# first, that a sorted row can hold and that `bucket + chunk` would take for one set although the buckets differ.

# %% tags=["exercise"]
my_pairs = ...  # ((bucket, chunk), (bucket, chunk))

exercises.check("B.2", my_pairs)

# %% [markdown]
# <details><summary>Hint</summary>
#
# One set means: the sums differ by 0 or 1. Try neighbouring buckets.
#
# </details>
#
# **B.3 Back to the text** *(find the fault; middle; 10 minutes)* Rows come out of a round in sorted order: `order[n]` says which row of the text
# stands in place `n`. A colleague puts them back like this. Tried on three rows of which two had been exchanged, it was right.

# %% tags=["exercise"]
def my_unsort(rows, order):
    """Sorted rows (n, ...), order (n,) -> the rows in the order of the text."""
    return rows[order]


exercises.check("B.3", my_unsort)

# %% [markdown]
# <details><summary>Hint</summary>
#
# An exchange is its own inverse. What does `rows[order]` do to three rows that change places in a circle?
#
# </details>
#
# **B.4 The codes** *(fill in; middle; 10 minutes)* Give each token of one head its code, in plain Python.

# %% tags=["exercise"]
def my_codes(buckets, w):
    """The buckets of T tokens as a list, chunks of w -> a list of T codes."""
    return ...


exercises.check("B.4", my_codes)

# %% [markdown]
# <details><summary>Hint</summary>
#
# Sort by bucket, then by position. A token's place in the sorted row, divided by `w`, is its chunk.
#
# </details>
#
# **B.5 Add the rounds up** *(build; middle; 15 minutes)* From what `attend` returns for each round, make $o$, without a loop over rounds.

# %% tags=["exercise"]
def my_rounds(tops, totals, outs):
    """Lists with a tensor a round, (BHT, 1), (BHT, 1) and (BHT, d) -> o (BHT, d)."""
    return ...


exercises.check("B.5", my_rounds)

# %% [markdown]
# <details><summary>Hint</summary>
#
# Each round has subtracted its own largest score. Bring all of them to the largest of all rounds: with which factor?
#
# </details>
#
# **B.6 How many scores?** *(predict; middle; 5 minutes)* A head reads `T` tokens in chunks of `w`, in `P` rounds. How many scores are computed,
# the masked ones among them? From which length on is that less than exact attention's $T^2$, for `w = 64` and 8 rounds? (The second question has
# no check; the solution answers it.)

# %% tags=["exercise"]
def my_count(T, w, P):
    return ...


exercises.check("B.6", my_count)

# %% [markdown]
# <details><summary>Hint</summary>
#
# There are `T / w` chunks. With how many keys does each of its queries get a score?
#
# </details>
#
# **Without a check.** *(20 minutes)* Change `PAIRS` to `2**15`, `2**17`, `2**21` and `2**24`, and time `fast`. How do time and peak change on
# your machine, and which number would you choose?

# %% [markdown]
# ## References
#
# - T. Dao, D. Y. Fu, S. Ermon, A. Rudra, C. Ré: [FlashAttention](https://arxiv.org/abs/2205.14135). NeurIPS 2022. Sums that can be added up, and
#   scores that are computed again.
# - M. Milakov, N. Gimelshein: [Online normalizer calculation for softmax](https://arxiv.org/abs/1805.02867). 2018.

# %%
minutes = (time.perf_counter() - started) / 60
peak_memory = measure.process_peak_bytes() / 2**30
print(f"this run: {minutes:.1f} minutes, peak memory {peak_memory:.2f} GiB")
