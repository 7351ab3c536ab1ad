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
# # 1. Transformer-XL: remember what each layer has seen

# %% [markdown] tags=["badges"]
# No links to Colab and Kaggle here: the project has no public address yet.
# To run this notebook, type `make lab` in your copy of the project.

# %% [markdown]
# A transformer reads a window of text. What lies before the window does not exist for it.
# **Transformer-XL** ([Dai et al., 2019](https://arxiv.org/abs/1901.02860)) gives it a memory in
# the most direct way: it keeps the hidden states that were computed for the previous segment, and
# lets attention look at them. This chapter shows why that needs a second idea, a new way to tell
# attention where things stand, and what the two achieve together.
#
# **After this chapter you can**
# - say why absolute positions and a memory of hidden states do not go together, and show it in an
# experiment;
# - write relative attention with its four terms, and the shift that makes it cheap;
# - train and evaluate a model that carries memory from segment to segment, and say how far back it
# can look;
# - measure what the memory gains and what it costs.
#
# **You need** PyTorch and chapter 0: attention with heads, the causal mask, lanes, the training loop,
# the loss by position in the window, and what a *band* of recorded seeds is.
#
# **Time and memory.** About 6 minutes and 1 GiB on two CPU cores. The notebook trains eight small
# models while you read. The last cell prints what it took on your machine.

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
import math
import time

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import memtx_minimal
from memtx_minimal import (
    bands, corpora, exercises, figures, inputs, measure, tasks, training,
)  # fmt: skip
from memtx_minimal.vanilla_transformer import VanillaTransformer

started = time.perf_counter()
figures.use_style()
device = training.best_device()
SEED = 0
print(f"PyTorch {torch.__version__} on {device}")

# %% [markdown]
# The letters in the shape comments:
#
# | letter | meaning | letter | meaning |
# | --- | --- | --- | --- |
# | `B` | batch: texts side by side | `H` | attention heads |
# | `T` | tokens in the segment | `d_model` | width of a hidden state |
# | `M` | states in memory | `d_head` | width of a head, `d_model / H` |
# | `K` | keys: memory, then segment, `M + T` | `d_ff` | width inside the feed-forward |
# | `L` | layers | `R` | encodings of distances |
# | `i` | query | `j` | key |
#
# One picture of the idea. Positions run across, layers go up. Blue states are being computed.
# Orange states were computed earlier and wait in memory. Grey states are not read at this
# moment. (Layer 3 is never orange: nothing above would read it.)

# %% jupyter={"source_hidden": true} tags=["hide-input"]
def frame(title, p, start, end):
    """One step of both models: vanilla computes the window that ends at p, XL the
    segment start ... end - 1, if it has not done so yet."""
    figure, (top, bottom) = plt.subplots(2, 1, figsize=(6.4, 4.8))
    figure.suptitle(title, x=0.01, ha="left", fontweight="bold")
    figures.unrolled(
        top, 3, 12, now=range(p - 3, p + 1), sees=lambda i: range(p - 3, i + 1),
        title="Vanilla: the window is all there is",
    )  # fmt: skip
    first = max(0, start - 4)
    text = "segment and memory" if start < end else "nothing to do, the segment is read"
    figures.unrolled(
        bottom, 3, 12, now=range(start, end), cached=range(first, start),
        sees=lambda i: range(first, i + 1), title=f"Transformer-XL: {text}",
    )  # fmt: skip
    for axes in (top, bottom):
        axes.set_xticks(range(12), labels=range(1, 13))
    return figure


frames = [
    frame(f"Training, segment {n + 1}", 4 * n + 3, 4 * n, 4 * n + 4) for n in range(3)
]
frames += [
    frame(f"Evaluation: what follows token {p + 1}?", p, 8 if p == 8 else 12, 12)
    for p in range(8, 12)
]
figures.show_animation(
    frames,
    "Animation. Training: vanilla computes segments that do not see each other; "
    "Transformer-XL computes the same segments, and each reads the previous one's "
    "states in memory. Evaluation: vanilla computes a whole window anew for every "
    "token; Transformer-XL computes the segment once.",
    seconds=2.5,
)

# %% [markdown]
# Two of its frames, standing still:

# %% jupyter={"source_hidden": true} tags=["hide-input"]
figures.show(
    frame("Training, segment 3", 11, 8, 12),
    "In training, segment 3 of the vanilla model sees nothing outside itself; that of "
    "Transformer-XL reads the inputs of segment 2's layers too, and segment 1 is grey.",
)

# %% jupyter={"source_hidden": true} tags=["hide-input"]
figures.show(
    frame("Evaluation: what follows token 10?", 9, 12, 12),
    "In evaluation the vanilla model computes the four tokens of a window anew to "
    "predict what follows token 10; Transformer-XL has computed its segment once, and "
    "the mask makes it answer for all four.",
)

# %% [markdown]
# In the first picture, segment 1 is grey: its states have left the memory. It is felt all the
# same. Segment 2's states in layers 1 and 2 were computed while segment 1 was in memory, and hold what they
# found there. Section 1.3 follows this through the layers.
#
# The second picture: in a vanilla window only the last prediction has the full context, so each token gets its own
# window. Transformer-XL has read the tokens 9 to 12 as one segment (in evaluation the whole text is known), which gave all four predictions at once; the mask kept each from seeing its answer.
#
# ## 1.1 The problem: a window forgets
#
# The text is Tiny Shakespeare, a million characters. (Without a network and without the file it is
# a synthetic play that the package writes itself; every figure names its text. To read a file
# of your own in UTF-8, write `corpora.from_file("my.txt")` instead.)

# %% tags=["setup"]
corpus = corpora.tiny_shakespeare()

# %%
print(f"{corpus.name}: {len(corpus.train):,} characters to train on,", end=" ")
print(f"{len(corpus.valid):,} to validate, {len(corpus.vocab)} different ones")

# %% [markdown]
# The baseline is the decoder of chapter 0, `VanillaTransformer`. It reads segments of `T = 32`
# characters, and each segment is a new world to it. All models of this chapter get the same widths
# and depth, the same text and the same number of steps. (Relative attention adds 8 % more weights;
# section 1.4 counts.)

# %% tags=["setup"]
T = 32
STEPS = 1200
SIZES = dict(vocab_size=len(corpus.vocab), d_model=96, n_heads=4, n_layers=3, d_ff=384)


def fit(make, seed, **options):
    """A new model, trained for STEPS steps on segments of T characters, and its losses.

    make: a class, or a function, that takes SIZES and the options. The seed decides
    which random weights the training starts from.
    """
    torch.manual_seed(seed)
    model = make(**SIZES, **options).to(device)
    sizes = dict(batch_size=32, segment_len=T)
    history = training.train(model, corpus.train, steps=STEPS, **sizes)
    return model, history["loss"]


# %%
history = {}
vanilla, history["vanilla"] = fit(VanillaTransformer, SEED, max_len=T)

# %% [markdown]
# Here is the validation loss
# by position in the segment, in nats per character:

# %% tags=["band"]
def loss_by_position(model):
    """Mean validation loss at each position of the segment, (T,)."""
    losses = training.token_losses(model, corpus.valid, segment_len=T)
    whole = losses.size(1) // T * T  # losses: (B, characters of a lane)
    return losses[:, :whole].unflatten(1, (-1, T)).mean(dim=(0, 1))  # (T,)


# %% jupyter={"source_hidden": true} tags=["hide-input"]
LOOK = {
    "vanilla": dict(color=figures.COLOUR["vanilla"], marker="D"),
    "Transformer-XL": dict(color=figures.COLOUR["Transformer-XL"], marker="s"),
    "relative, no memory": dict(color="#E69F00", marker="^"),
    "absolute, memory": dict(color="#56B4E9", marker="v"),
}


def lines(axes, x, values, seeds=None, **look):
    """A curve for each model {name: values}, upon its recorded seeds."""
    label = "{} recorded seeds"
    for name, value in values.items():
        some = (seeds or {}).get(name, ())
        figures.band(axes, x, some, label)
        label = label if not len(some) else "_"  # named once
        axes.plot(x, value, **{"markersize": 4} | LOOK[name] | look, label=name)
    axes.legend()


by_position = {"vanilla": loss_by_position(vanilla)}
figure, axes = plt.subplots()
lines(axes, range(1, T + 1), by_position)
axes.axhline(by_position["vanilla"].mean(), color="black", linestyle=":", label="mean")
axes.legend()
labels = dict(xlabel="position in the segment")
axes.set(**labels, ylabel="validation loss (nats per character)")
axes.set_title(f"A new segment starts blind ({corpus.name})")
figures.show(
    figure,
    "The vanilla model's validation loss is .7 to .8 nats higher at the first position "
    "of a segment than in its second half: it falls steeply over the first few "
    "characters, then slowly.",
)

# %%
losses = by_position["vanilla"]
print(f"first position {losses[0]:.2f} nats,", end=" ")
print(f"last eight positions {losses[-8:].mean():.2f} nats")
assert losses[0] > losses[-8:].mean() + 0.5

# %% [markdown]
# The first characters of every segment are guessed almost blind, although their past stands in the
# text. The paper calls this **context fragmentation**. You can avoid it at evaluation: slide the
# window by one character and compute it anew for each prediction. (The key-value cache does not help: when
# the window slides, every character gets another place.) That makes evaluation slower by
# a factor of about the length of the window, and training still never sees further than `T`.
#
# ## 1.2 Positions that survive a move
#
# The remedy: keep the hidden states of the previous segment and attend to them. But
# they carry positions. In the baseline the state at place 5 of the old segment and the state at place
# 5 of the new one were both computed with the same position vector. Side by side in one attention,
# nothing tells which of the two is the nearer one. Numbering on from segment to segment would tell them apart, but a
# long text soon reaches numbers that never came up in training.
#
# Chapter 0 found that the dot product of two position vectors depends on their distance alone. Take that as a hint: what stays true when a segment becomes memory is the **distance** from query to key. Count places
# from the start of the memory: `M` states in memory stand at the places 0 to $M - 1$, the segment
# at $M$ to $M + T - 1$. The query at place $i$ sees the key at place $j$ at the distance $i - j$. All
# formulas of this chapter count this way.

# %% tags=["from-module"]
def distances(T, M, device=None):
    """How far each key lies before each query, (T, M + T); below 0 is the future."""
    query = M + torch.arange(T, device=device)[:, None]  # (T, 1)
    key = torch.arange(M + T, device=device)  # (M + T,)
    return query - key

# %%
print(distances(T=3, M=2))

# %% [markdown]
# Three queries, five keys. A zero is the query itself; what is negative lies in the future. The
# mask follows from the same table: a number to add to each score, 0 or minus infinity.

# %% tags=["from-module"]
def attention_mask(distance, limit=None):
    """Added to scores, (T, K): -inf hides the future, and keys at limit or farther."""
    hidden = distance < 0
    if limit is not None:
        inputs.check_number("limit", limit, 1)
        hidden |= distance >= limit
    mask = torch.zeros_like(distance, dtype=torch.float32)
    return mask.masked_fill(hidden, float("-inf"))

# %%
print(attention_mask(distances(T=3, M=2)))
print(attention_mask(distances(T=3, M=2), limit=2))

# %% [markdown]
# With a `limit` of 2, each query sees the two latest keys: itself and the one before. (Section 1.3 uses it. Lines that
# begin with `inputs.` refuse what cannot work and say what would; you can read past them.)
#
# Each distance gets a vector $R_{i-j}$: the same fixed sinusoids that the original transformer
# uses for places. One half of its numbers are sines, the other half cosines of the distance. The wavelengths
# go from $2\pi$ almost to $10\,000 \cdot 2\pi$; in the code, `wavelengths` are given in units of
# $2\pi$. Nothing is learned here, so a distance that never came up in training has a vector too.

# %% tags=["from-module"]
def sinusoid(distance, d_model):
    """The encoding R of distances, (n,) -> (n, d_model). Section 3.3: not learned."""
    inputs.check_even("d_model", d_model)
    evens = torch.arange(0.0, d_model, 2, dtype=torch.float32, device=distance.device)
    wavelengths = 10_000 ** (evens / d_model)  # (d_model / 2,), in units of 2 * pi
    angles = distance[:, None] / wavelengths  # in float32, whatever the model's dtype
    return torch.cat([angles.sin(), angles.cos()], dim=-1)

# %% jupyter={"source_hidden": true} tags=["hide-input"]
R = sinusoid(torch.arange(64), d_model=96)  # (64, d_model)
figure, axes = plt.subplots(figsize=(6.4, 3.0))
image = figures.matrix(axes, R.T, xlabel="distance (tokens)", ylabel="dimension of R")
axes.axhline(47.5, color="white", linewidth=2)
axes.set_title("R: sines above the line, cosines below")
figure.colorbar(image, ax=axes)
figures.show(
    figure,
    "In each half of R the first dimensions turn several times over 64 distances, and "
    "the further down, the slower: the last ones hardly change.",
)

# %% [markdown]
# ### Four terms
#
# How does the distance get into the score of query $i$ and key $j$? Start from absolute positions.
# Write $E_j$ for the embedding of the token at place $j$, and $U_j$ for the vector of the place itself. In the first layer their sum goes
# into attention. The score there, before it is divided by $\sqrt{d_{\text{head}}}$, is a product of two sums,
#
# $$
# A^{\text{abs}}_{i,j} = \left(W_q (E_i + U_i)\right)^\top W_k (E_j + U_j)
#  = (E_i + U_i)^\top W_q^\top W_k (E_j + U_j) ,
# $$
#
# and multiplied out it has four terms:
#
# $$
# A^{\text{abs}}_{i,j} = \underbrace{E_i^\top W_q^\top W_k E_j}_{(a)} + \underbrace{E_i^\top W_q^\top W_k U_j}_{(b)}
#  + \underbrace{U_i^\top W_q^\top W_k E_j}_{(c)} + \underbrace{U_i^\top W_q^\top W_k U_j}_{(d)} .
# $$

# %% [markdown]
# The paper changes three things.
#
# - The key's place $U_j$ becomes the distance, $R_{i-j}$.
# - The query's place must not matter any more: at every place the same distances lie behind it. So the vector
# $U_i^\top W_q^\top$ becomes a learned vector that is the same for all queries. It asks two different
# questions, for content in (c) and for distance in (d), so there are two such vectors, $u$ and $v$.
# - What makes a key interesting and what makes a distance interesting have nothing to do with each other. So
# contents and distances are projected apart, by $W_{k,E}$ and $W_{k,R}$.
#
# $$
# A^{\text{rel}}_{i,j} = \underbrace{E_i^\top W_q^\top W_{k,E} E_j}_{(a)} + \underbrace{E_i^\top W_q^\top W_{k,R} R_{i-j}}_{(b)}
#  + \underbrace{u^\top W_{k,E} E_j}_{(c)} + \underbrace{v^\top W_{k,R} R_{i-j}}_{(d)}
# $$
#
# | term | asks | depends on |
# | --- | --- | --- |
# | (a) | does this key hold what this query wants? | query, key |
# | (b) | does this query want to look this far back? | query, distance |
# | (c) | is this key of interest to anybody? | key |
# | (d) | is this distance of interest to anybody? | distance |
#
# Every head has its own $u$ and $v$, and its own rows of $W_q$, $W_{k,E}$, $W_{k,R}$ and $W_v$. And every
# layer has these four terms: from here on $E$ is the input of any layer, after its norm. Absolute positions were added once, at the
# bottom; $R$ enters the scores of each layer anew.
#
# Here are the terms for one head with `d_head = 2`, one state in memory and two in the segment. The
# projections have been done: `q` holds $W_q E_i$ of the two queries, `k` holds $W_{k,E} E_j$ of the three
# keys, and `r` holds $W_{k,R} R$ of the distances 0, 1 and 2.

# %%
M_, T_, d_head = 1, 2, 2
q = torch.tensor([[1.0, 0.0], [0.0, 2.0]])  # (T, d_head)
k = torch.tensor([[1.0, 1.0], [2.0, 0.0], [0.0, 1.0]])  # (K, d_head)
r = torch.tensor([[0.0, 1.0], [1.0, -1.0], [1.0, -2.0]])  # (distances, d_head)
u, v = torch.tensor([0.0, 1.0]), torch.tensor([0.5, 1.0])  # (d_head,) each

by_pair = {}  # (i, j) -> the four terms
for i in range(M_, M_ + T_):
    for j in range(i + 1):  # no key of the future
        a = q[i - M_] @ k[j]  # (a)
        b = q[i - M_] @ r[i - j]  # (b)
        c = u @ k[j]  # (c)
        d = v @ r[i - j]  # (d)
        by_pair[i, j] = a, b, c, d

# %% jupyter={"source_hidden": true} tags=["hide-input"]
figures.table(
    "The four terms of each visible pair, and the score",
    ["query i, key j", "distance", "(a)", "(b)", "(c)", "(d)", "sum / √d_head"],
    [
        [
            f"{i}, {j}", i - j, *(f"{term:.1f}" for term in pair),
            f"{sum(pair) / d_head**0.5:.2f}",
        ]
        for (i, j), pair in by_pair.items()
    ],
)  # fmt: skip

# %% [markdown]
# Follow one column at a time. (c) is the same wherever the key is the same: pairs (1, 0) and (2, 0). (d)
# is the same wherever the distance is the same: (1, 0) and (2, 1). (b) depends on the distance, and differently for each
# query: query 1 is drawn to what lies further back, query 2 is repelled by it.

# %%
assert by_pair[1, 0][2] == by_pair[2, 0][2] and by_pair[1, 0][3] == by_pair[2, 1][3]
b = {pair: terms[1] for pair, terms in by_pair.items()}
assert b[1, 0] > b[1, 1]  # query 1: farther is better
assert b[2, 0] < b[2, 1] < b[2, 2]  # query 2: nearer is better

# %% [markdown]
# Write $q_i = W_q E_i$ and $k_j = W_{k,E} E_j$, and the four terms are two products:
#
# $$
# A^{\text{rel}}_{i,j} = \underbrace{(q_i + u)^\top k_j}_{(a) + (c)} + \underbrace{(q_i + v)^\top W_{k,R} R_{i-j}}_{(b) + (d)} .
# $$
#
# ### The shift
#
# The first product is one matrix product. The second has a different vector for each pair $(i, j)$,
# which would mean a tensor of shape `(T, K, d_head)`. But there are only `K` different distances.
# So compute a matrix whose *columns are distances*, the same in every row, and move each row into
# place afterwards.
#
# Here is the matrix for three queries and two states in memory. In place of scores it holds the
# distance that each entry is for. The columns run from the largest distance, 4, down to 0, with one
# more at the front that no query needs: you will see what it is good for.

# %%
T_, M_ = 3, 2
K_ = M_ + T_
by_distance = torch.arange(K_, -1, -1).expand(T_, K_ + 1).contiguous()  # (T, K + 1)
print(by_distance)

# %% [markdown]
# Row 0 should start at distance 2, row 1 at distance 3, row 2 at distance 4: each row has to move one
# place further to the left than the row below it. Lay all rows end to end, drop the first `T` numbers,
# and cut again, now in rows of `K`. Because the new rows are one shorter than the old ones, each cut
# falls one place *earlier* in its old row than the cut before: before distance 2, then before 3,
# then before 4. That is the shift. The bars mark the cuts:

# %%
def with_cuts(numbers, length):
    """Numbers as a text, with a bar after every `length` of them."""
    groups = [numbers[n : n + length] for n in range(0, len(numbers), length)]
    return " | ".join(" ".join(map(str, group)) for group in groups)


end_to_end = by_distance.flatten().tolist()
print(f"in rows of {K_ + 1}:")
print(with_cuts(end_to_end, K_ + 1))
print(f"without the first {T_}, in rows of {K_}:")
print(" " * 2 * T_ + with_cuts(end_to_end[T_:], K_))

# %% [markdown]
# The new rows, one below the other, are the table of distances from above, up to the zero in each row. To the
# right of it stands garbage: the start of a row that slipped into the one above. Nobody will look there,
# because the future is masked. The extra column at the front makes the lengths come out right, and
# nothing is copied: the shift only *views* the same numbers in another way.

# %% tags=["from-module"]
def rel_shift(scores):
    """Line scores up by key instead of by distance. Appendix B, without a copy.

    (..., T, K + 1), with distances K ... 0 as columns in every row -> (..., T, K),
    with keys as columns. Entries of future keys are garbage, to be masked.
    """
    T, K = scores.size(-2), scores.size(-1) - 1
    return scores.flatten(-2)[..., T:].unflatten(-1, (T, K))

# %%
shifted, distance = rel_shift(by_distance), distances(T_, M_)
assert (shifted == distance)[distance >= 0].all()
assert shifted.data_ptr() == by_distance.flatten()[T_:].data_ptr()  # a view, no copy

# %% jupyter={"source_hidden": true} tags=["hide-input"]
figure, axes = plt.subplots(1, 2, figsize=(6.4, 2.6))
look = dict(numbers=True, vmin=0, vmax=5)
figures.matrix(axes[0], by_distance, title="by distance", xlabel="column", **look)
crossed = distance < 0
title = "by key, after the shift"
figures.matrix(axes[1], shifted, crossed=crossed, title=title, ylabel="", **look)
axes[0].set_xticks(range(6), labels=range(5, -1, -1))
axes[1].set_xticks(range(5), labels=["m", "m", "s", "s", "s"])
for ax in axes:
    ax.set_yticks(range(3))
figures.show(
    figure,
    "Three equal rows 5 4 3 2 1 0 become, after the shift, rows that end at the query "
    "itself: 2 1 0, then 3 2 1 0, then 4 3 2 1 0. The future is crossed out.",
)

# %% [markdown]
# In the right table `m` are keys in memory and `s` keys in the segment. The zeros lie where each
# query meets itself; the crossed triangle is the garbage.
#
# ### Relative attention
#
# Memory and segment, joined along time, are the *context*. Queries come from the segment alone, the end of the context: the
# mask has one row for each query, so its first size says how many there are. Keys and values come
# from memory and segment.

# %% tags=["from-module"]
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

# %% [markdown]
# Check it against the formula, in the slow way: one vector $R_{i-j}$ for each pair, and the letters at the
# lines that compute them.

# %%
torch.manual_seed(SEED)
T_, M_, H, d_head = 4, 3, 2, 8
attention = RelativeAttention(d_model=H * d_head, n_heads=H, dropout=0.0)
nn.init.normal_(attention.u), nn.init.normal_(attention.v)  # (H, 1, d_head) each
context = torch.randn(1, M_ + T_, H * d_head)  # (B, K, d_model)

distance = distances(T_, M_)  # (T, K)
mask = attention_mask(distance)  # (T, K)
out = attention(context, sinusoid(torch.arange(M_ + T_, -1, -1), H * d_head), mask)
for name, x in {"context": context, "mask": mask, "out": out}.items():
    print(name, tuple(x.shape), end="  ")

# %%
q = attention.heads(attention.query(context[:, -T_:]))  # (B, H, T, d_head)
k, values = attention.key_value(context).chunk(2, dim=-1)  # (B, K, d_model) each
k, values = attention.heads(k), attention.heads(values)  # (B, H, K, d_head) each
R = sinusoid(distance.clamp(min=0).flatten(), H * d_head)  # (T * K, d_model)
r = attention.position(R).unflatten(-1, (H, d_head))  # (T * K, H, d_head)
r = r.unflatten(0, distance.shape)  # (T, K, H, d_head)
u, v = attention.u[:, 0], attention.v[:, 0]  # (H, d_head) each

terms = {
    "a": torch.einsum("bhid,bhjd->bhij", q, k),  # (B, H, T, K)
    "b": torch.einsum("bhid,ijhd->bhij", q, r),  # (B, H, T, K)
    "c": torch.einsum("hd,bhjd->bhj", u, k)[:, :, None],  # (B, H, 1, K)
    "d": torch.einsum("hd,ijhd->hij", v, r),  # (H, T, K)
}
weights = (sum(terms.values()) / d_head**0.5 + mask).softmax(dim=-1)  # (B, H, T, K)
heads = (weights @ values).transpose(1, 2)  # (B, T, H, d_head)
slow = attention.out(heads.flatten(2))  # (B, T, d_model)
print(f"largest difference: {(out - slow).abs().max():.1e}")
assert torch.allclose(out, slow, atol=1e-5)

# %% [markdown]
# ## 1.3 Recurrence
#
# Let $h^{n}_{\tau}$ be the states of segment $\tau$ after layer $n$, with the embeddings as
# $h^{0}_{\tau}$. Layer $n$ reads
#
# $$
# \tilde h^{n-1}_{\tau} = \left[\, \text{SG}(h^{n-1}_{\tau-1}) \circ h^{n-1}_{\tau} \,\right],
# $$
#
# the states of the previous segment and those of this one, joined along time. SG stops the
# gradient: the old states are read, and not trained through. But the projections that turn them
# into keys and values do learn from them.
#
# Note which states are kept: the *input* of each layer. Layer $n$ looks one segment back at states
# that had themselves looked one segment back. That is why the reach grows with depth.

# %% tags=["from-module"]
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

# %% [markdown]
# The memory is a list with one tensor a layer. It grows until it holds
# `mem_len` states and then drops the oldest. The caller gets it back with the logits and passes it
# in again with the next segment:
#
# ```python
# memory = None
# for tokens, targets in corpora.lanes(stream, batch_size, segment_len):
#     logits, memory = model(tokens, memory)
# ```
#
# What is remembered is cut off from the gradient by `detach`. It is also copied by `clone`, since a slice is a view: it
# would keep alive the whole context that it was cut from. Two options, `same_length` and `clamp_len`, are explained below the
# code. (`inputs.checked_memory` turns `None` into a memory of no states. With `same_length` the memory must hold one
# or more: so `int(same_length)`.)

# %% tags=["from-module"]
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

# %%
torch.manual_seed(SEED)
tiny = TransformerXL(10, d_model=16, n_heads=2, n_layers=3, d_ff=32, mem_len=6)
tokens = torch.randint(10, (2, 12))  # (B, 12)
memory = None
for segment in tokens.split(4, dim=1):
    logits, memory = tiny(segment, memory)
    print("logits", tuple(logits.shape), end="  ")
    print("memory", len(memory), "x", tuple(memory[0].shape))
assert not any(state.requires_grad for state in memory)

# %% [markdown]
# ### Does it remember?
#
# It should not matter where the text was cut: reading segment by
# segment, with a memory that holds everything, must give the same logits as reading all at once. (In float64, so that
# rounding hides nothing.)

# %%
@torch.no_grad()
def read(model, tokens, segment_len):
    """Logits of a text (B, N), read in segments, with memory from one to the next."""
    memory, logits = None, []
    for segment in tokens.split(segment_len, dim=1):
        out, memory = model(segment, memory)
        logits.append(out)
    return torch.cat(logits, dim=1)  # (B, N, vocab_size)


tiny = tiny.double()
tiny.mem_len = 12
whole = read(tiny, tokens, 12)
for segment_len in (1, 3, 5):
    difference = (read(tiny, tokens, segment_len) - whole).abs().max()
    print(f"segments of {segment_len}: largest difference {difference:.1e}")
    assert difference < 1e-10

# %% [markdown]
# ### How far back?
#
# Follow the last prediction of a text down through the layers. At the top it reads its segment and
# the memory. The oldest state that it reads belongs to an earlier segment. When *that* segment was
# computed, it had a memory of its own, and so on, one layer at a time. In the picture the black dots are the states that the last
# prediction needs, the orange lines are what the oldest of them in each layer reads, and the dotted lines are where segments end:

# %% jupyter={"source_hidden": true} tags=["hide-input"]
def draw_reach(axes, M, T=4, L=3, n=22):
    """From the last of n tokens down through the layers; `queries` are the states that
    a layer must have computed for it."""
    last = n - 1
    queries, oldest = {last}, last
    starts = range(last + 1 - T, -T, -T)  # of the segments, from the end
    for layer in range(L, 0, -1):
        keys = set()
        for query in queries:
            start = max(s for s in starts if s <= query)
            seen = range(max(0, start - M), query + 1)
            keys |= set(seen)
            path = query == oldest
            look = dict(color=figures.ORANGE, alpha=0.9) if path else {}
            look = dict(color=figures.DARK_GREY, alpha=0.25) | look
            for key in seen:
                axes.plot([query, key], [layer, layer - 1], linewidth=0.9, **look)
        axes.scatter(sorted(queries), [layer] * len(queries), color="black", s=25)
        queries, oldest = keys, min(keys)
    axes.scatter(sorted(keys), [0] * len(keys), color="black", s=25)
    for start in starts:
        axes.axvline(start - 0.5, color="black", linestyle=":", linewidth=1)
    axes.set(xlim=(-0.7, n - 0.3), xticks=[], yticks=range(L + 1))
    axes.set_yticklabels(["text", *(f"layer {layer + 1}" for layer in range(L))])
    axes.set_title(f"memory of {M}: the last {len(keys)} tokens")
    axes.grid(False)
    return len(keys)


figure, axes = plt.subplots(2, 1, figsize=(6.4, 5.2))
drawn = [draw_reach(axes[0], M=4), draw_reach(axes[1], M=1)]
figures.show(
    figure,
    "Three layers, segments of four tokens, parted by dotted lines. With a memory of "
    "four, the last prediction reaches one segment further with every layer, 16 tokens "
    "in all; with a memory of one state it reaches 13.",
)

# %% [markdown]
# Above, the memory is as long as a segment, and each layer adds `M`. Below, it is a single state, and the
# reach still grows by a whole segment for every layer after the first: the oldest state in memory is the
# *last* of its segment, and has seen all of it. A longer memory touches $\lceil M / T \rceil$ segments, and
# each of these layers goes back by all of them. So the reach in tokens is
#
# $$
# T + M + T \left\lceil \tfrac{M}{T} \right\rceil (L - 1) ,
# $$
#
# which is $T + L M$ if $M$ is a multiple of $T$. To test it, change one token of the past and see whether the
# last logits feel it.

# %%
def felt(mem_len, n_layers, segment_len=4, n=48, **options):
    """For each of n tokens, (n,): does changing it change the last logits?"""
    torch.manual_seed(SEED)
    model = TransformerXL(10, 16, 2, n_layers, 32, mem_len=mem_len, **options).double()
    tokens = torch.randint(10, (1, n))
    before = read(model, tokens, segment_len)[:, -1]  # (1, vocab_size)
    other = torch.eye(n, dtype=torch.int64)  # row p changes token p
    changed = (tokens + other) % 10  # (n, n)
    difference = read(model, changed, segment_len)[:, -1] - before  # (n, vocab_size)
    return difference.abs().amax(dim=1) > 1e-12  # (n,): more than rounding


def reach(T, M, L):
    return T + M + T * math.ceil(M / T) * (L - 1)


assert drawn == [reach(4, 4, 3), reach(4, 1, 3)]
cases = [(0, 3), (4, 1), (4, 2), (4, 3), (8, 3), (1, 3), (3, 2), (6, 3)]  # M, L
rows = torch.stack([felt(M, L) for M, L in cases])  # (cases, n)
for (M, L), row in zip(cases, rows):
    assert row.sum() == reach(4, M, L) < len(row)

# %% jupyter={"source_hidden": true} tags=["hide-input"]
figure, axes = plt.subplots(figsize=(6.4, 3.2))
look = dict(ylabel="", cmap="Blues", vmax=1.4)
figures.matrix(axes, rows, xlabel="position in the text (tokens)", **look)
for n, (M, L) in enumerate(cases):
    axes.plot([47.5 - 4 - L * M] * 2, [n - 0.5, n + 0.5], color=figures.ORANGE)
labels = [f"M = {M}, L = {L}: {row.sum()}" for (M, L), row in zip(cases, rows)]
axes.set_yticks(range(len(cases)), labels=labels)
axes.set_title("Dark: the last prediction feels a change here")
figures.show(
    figure,
    "The last prediction feels as many tokens as the formula says, from 4 without "
    "memory to 28. Orange strokes mark T + L M: where M is no multiple of T = 4, the "
    "reach goes beyond them.",
)

# %% [markdown]
# The labels give the number of tokens that are felt, the orange strokes mark $T + L M$. The formula holds in every
# row. It says what can be felt, not what a model learns to use (section 1.5).
#
# ### Two options for evaluation
#
# The authors' released scripts evaluate with a memory several times as long as in training, and with two options switched
# on.
#
# **`same_length`**: with a full memory, the first query of a segment sees $M + 1$ keys and the last one
# $M + T$. With this option every query sees just its `mem_len` latest keys, itself among them. So
# each prediction gets the same amount of context, and how the text is cut no longer matters.

# %% jupyter={"source_hidden": true} tags=["hide-input"]
figure, axes = plt.subplots(1, 2, figsize=(6.4, 2.6))
masks = [attention_mask(distances(4, 6), limit) for limit in (None, 6)]
for ax, mask, title in zip(axes, masks, ["as it is", "same_length"]):
    shown = mask.exp()  # 1 where a key is seen, 0 where it is hidden
    figures.matrix(ax, shown, title=f"{title}, T = 4, M = 6", cmap="Blues", vmax=1.4)
    ax.axvline(5.5, color="black", linestyle="--")
    ax.set_yticks(range(4), labels=[f"{n:.0f} keys" for n in shown.sum(dim=1)])
    ax.set_ylabel("")
figures.show(
    figure,
    "As it is, the four queries of a segment see 7, 8, 9 and 10 keys; with same_length "
    "each sees 6, a stripe of equal width along the diagonal. A dashed line parts "
    "memory from segment.",
)

# %%
tiny.mem_len, tiny.same_length = 6, True
apart = [read(tiny, tokens, segment_len) for segment_len in (1, 3, 5)]
assert all(torch.allclose(apart[0], logits) for logits in apart[1:])
tiny.same_length = False

# %% [markdown]
# **`clamp_len`**: all distances beyond it share one vector $R$. A model trained with segments and memory of 32
# has only met distances up to 63. Clamped at 63, a longer memory shows it nothing new, except that
# everything older looks equally far away.

# %%
columns = torch.arange(8, -1, -1)  # the distances of a context of K = 8
print("distances      ", columns.tolist())
print("clamp_len = 5  ", columns.clamp(0, 5).tolist())

# %% [markdown]
# ## 1.4 Train it
#
# The training loop is that of chapter 0. What it does for the memory: segment after segment
# *continues* the text of its lane, and the memory that the model returns for one segment is handed in
# with the next. At the end of the lanes it reads on from their start, with an empty memory. Shuffled batches
# would make the memory meaningless.

# %%
xl, history["Transformer-XL"] = fit(TransformerXL, SEED, mem_len=T)
numbers = {name: p.numel() for name, p in xl.named_parameters()}
new = [name for name in numbers if name.endswith((".position.weight", ".u", ".v"))]
more = sum(numbers[name] for name in new)
before = sum(p.numel() for p in vanilla.parameters())
print(f"vanilla {before:,} parameters, Transformer-XL {sum(numbers.values()):,}")
print(f"{more:,} more, {more / before:.0%}: W_kR, u and v")
assert sum(numbers.values()) == before + more

# %% jupyter={"source_hidden": true} tags=["hide-input"]
figure, axes = plt.subplots()
smooth = {name: figures.smooth(losses, 50) for name, losses in history.items()}
lines(axes, range(50, STEPS + 1), smooth, marker="")
axes.set(xlabel="training step", ylim=(None, 2.6))
axes.set(ylabel="training loss (nats per character)")
axes.set_title(f"Running mean over 50 steps ({corpus.name})")
figures.show(
    figure,
    "Transformer-XL's training loss lies below the vanilla model's from early in "
    "training to the end.",
)

# %%
assert (smooth["Transformer-XL"][150:] < smooth["vanilla"][150:]).all()

# %% [markdown]
# To generate, the model reads the prompt of 64 characters in one go, and then one new character at a
# time, with the latest `mem_len` = 32 states of each layer in memory. What is older is gone, except for what these
# states have taken up from it.

# %%
prompt = corpus.valid[:64]
text = training.generate(xl, prompt, 300, temperature=0.8)
print("--- the prompt\n" + corpus.vocab.decode(text[:64]))
print("--- and how the model goes on\n" + corpus.vocab.decode(text[64:]))

# %% [markdown]
# ## 1.5 The claims, one by one
#
# ### Both ideas are needed
#
# The paper takes its two ideas apart: relative positions with and without recurrence, and absolute
# positions without. We add the fourth corner, which section 1.2 warned of: recurrence with
# absolute positions. To build it, the sinusoids of the places 0 to `T - 1` are added to the embedding
# in every segment anew, and no distance enters a score.

# %% tags=["band"]
class PlacedEmbedding(nn.Embedding):
    """Characters plus their place in the segment."""

    def forward(self, tokens):
        places = torch.arange(tokens.size(1), device=tokens.device)
        return super().forward(tokens) + sinusoid(places, self.embedding_dim)


def absolute_xl(**sizes):
    """Transformer-XL with absolute positions: every segment counts from 0."""
    model = TransformerXL(**sizes)
    model.embedding = PlacedEmbedding(sizes["vocab_size"], sizes["d_model"])
    for layer in model.layers:  # W_{k,R} = 0, for good: no distance in any score
        nn.init.zeros_(layer.attention.position.weight).requires_grad_(False)
    return model


# %% [markdown]
# Two of the four models are trained already: Transformer-XL and the baseline. The other two follow,
# and the function `ablation` trains all four from one seed. It was run beforehand for five seeds; your run is
# drawn upon this band.

# %% tags=["band"]
CORNERS = {
    "relative, memory": (TransformerXL, dict(mem_len=T)),
    "relative, no memory": (TransformerXL, dict(mem_len=0)),
    "absolute, no memory": (VanillaTransformer, dict(max_len=T)),
    "absolute, memory": (absolute_xl, dict(mem_len=T)),
}


def corner(name, seed):
    """One of the four models, trained from this seed."""
    make, options = CORNERS[name]
    model, _ = fit(make, seed, **options)
    return model


def validation_losses(models):
    """{name: nats per character} of models {name: model}, after their STEPS steps."""
    return {
        name: training.evaluate(model, corpus.valid, segment_len=T)
        for name, model in models.items()
    }


def ablation(seed):
    """The validation losses of all four models, trained from this seed."""
    return validation_losses({name: corner(name, seed) for name in CORNERS})


# %%
models = {
    "relative, memory": xl,
    "relative, no memory": corner("relative, no memory", SEED),
    "absolute, no memory": vanilla,
    "absolute, memory": corner("absolute, memory", SEED),
}
live = validation_losses(models)
band = bands.load("01_ablation", corpus.name)

# %% jupyter={"source_hidden": true} tags=["hide-input"]
figure, axes = plt.subplots()
names = {"relative, memory": "Transformer-XL", "absolute, no memory": "vanilla"}
colors = {name: LOOK[names.get(name, name)]["color"] for name in live}
look = dict(xlabel="validation loss (nats per character)", number="{:.3f}")
look["colors"] = colors
figures.points(axes, live, band.values, **look)
axes.set_title(f"Positions and memory, taken apart ({corpus.name})")
figures.show(
    figure,
    "Relative positions with memory have the lowest validation loss, relative without "
    "memory come next, absolute without memory third, and absolute with memory are "
    "worst by far. The recorded seeds of one model lie closer together than any two "
    "models.",
)

# %%
band.check(live, margin=0.02)
for better, worse in zip(CORNERS, list(CORNERS)[1:]):
    assert live[better] < live[worse]
    assert band.high(better) < band.low(worse)  # no two bands overlap

# %% [markdown]
# The first in this figure is Transformer-XL, the third is vanilla. Relative positions help without a
# memory, and a memory helps on top of them. The fourth corner is the lesson: a memory whose positions collide with
# those of the segment is *worse than no memory*.
#
# No two of the four bands overlap, so this order is not the luck of a seed, at this size, after this
# many steps and on this text. The cell above asks your run to lie in the band, give or take 0.02 nats: where
# sums round differently, the same seed ends elsewhere.
#
# The paper's Table 6, perplexity ($e$ to the nats per token) on WikiText-103, each model evaluated with the context that suits it best:
#
# | positions | recurrence | no recurrence |
# | --- | --- | --- |
# | relative, the paper's | 26.77 | 29.02 |
# | relative, Shaw et al. (terms (a) and (b), learned vectors) | 27.94 | 29.75 |
# | absolute | not tried | 30.97 |
#
# Three of our four corners are in this table, and they come in the same order. (What memory adds does
# not come from the additional weights of relative attention: the model without memory has them, too.)
#
# Most sections that follow *evaluate* these same models under other conditions. Those results, too, were
# recorded for five seeds:

# %%
seen = bands.load("01_lengths", corpus.name)


def of(kind, values):
    """The part {name: value} of {"kind: name": value}."""
    start = f"{kind}: "
    found = {label: value for label, value in values.items() if label.startswith(start)}
    return {label.removeprefix(start): value for label, value in found.items()}


# %% [markdown]
# ### No more blind starts
#
# Expected: with memory, the first position of a segment is no worse off than the others.

# %%
by_position["Transformer-XL"] = loss_by_position(xl)
live = {f"position: {name}": losses for name, losses in by_position.items()}
seen.check(live, margin=0.1)

# %% jupyter={"source_hidden": true} tags=["hide-input", "readme-figure"]
figure, axes = plt.subplots()
lines(axes, range(1, T + 1), by_position, of("position", seen.values))
labels = dict(xlabel="position in the segment")
axes.set(**labels, ylabel="validation loss (nats per character)")
axes.set_title(f"Context fragmentation ({corpus.name})")
figures.show(
    figure,
    "The vanilla model's loss falls from .7 to .8 nats above its later level at the "
    "first position of a segment; Transformer-XL's is level from the first position "
    "on. Five recorded seeds of each show the same.",
)

# %%
for name, losses in by_position.items():
    bits = training.bits_per_character(losses.mean())
    means = f"all {losses.mean():.3f} nats, {bits:.3f} bits"
    print(f"{name:15} first position {losses[0]:.2f} nats, {means}")
blind = {name: loss[0] - loss[8:].mean() for name, loss in by_position.items()}
assert blind["vanilla"] > 0.5 and abs(blind["Transformer-XL"]) < 0.15

# %% [markdown]
# Transformer-XL's first position is hardly worse off than its mean. (The means here leave out the rest of each lane that
# does not fill a segment; the losses of the ablation include it.)

# %% [markdown]
# ### What lies before the segment: all or nothing
#
# On text, memory is worth about a tenth of a nat (the two relative models of the ablation). Here is a
# stream on which it is worth everything. In `tasks.echo` the tokens are random symbols, and the
# question at each token is always the same: which symbol stood `lag` tokens ago? With a lag of one segment the
# answer never stands in the segment of the question.

# %%
tokens, targets, _ = next(tasks.echo(1, segment_len=12, lag=4, seed=SEED))
print("tokens ", *tokens[0].tolist())
print("targets", *("-" if n < 0 else n for n in targets[0].tolist()), " (lag 4)")

# %% [markdown]
# Four models, with a lag of `T = 32`. Three have one layer: vanilla, and Transformer-XL with a memory of half a segment
# and of a whole one. The last has two layers and half a segment. Before you read on, write down for each
# where in the segment it can answer. (In one layer, the query at position $n$ of the segment, counted from 1, sees
# $M + n - 1$ tokens back.)

# %% tags=["band"]
ECHO = dict(vocab_size=8, d_model=64, n_heads=4, d_ff=128)
ECHOERS = {
    "vanilla": (VanillaTransformer, dict(n_layers=1, max_len=T)),
    "M = 16": (TransformerXL, dict(n_layers=1, mem_len=T // 2)),
    "M = 32": (TransformerXL, dict(n_layers=1, mem_len=T)),
    "M = 16, 2 layers": (TransformerXL, dict(n_layers=2, mem_len=T // 2)),
}


def echoer(name, seed):
    """One of the models, trained for 300 steps on the echo of the segment before."""
    make, options = ECHOERS[name]
    torch.manual_seed(seed)
    model = make(**ECHO, **options).to(device)
    stream = tasks.echo(32, segment_len=T, lag=T, seed=seed)
    training.train(model, stream, steps=300, progress=False)
    return model


@torch.no_grad()
def right_answers(model, change=lambda memory: memory):
    """The share of right answers at each position of new segments, (T,)."""
    memory, right = None, []
    for n, batch in zip(range(22), tasks.echo(64, segment_len=T, lag=T, seed=10**6)):
        tokens, targets = batch[0].to(device), batch[1].to(device)
        logits, memory = model(tokens, change(memory))
        right.append((logits.argmax(dim=-1) == targets).float().mean(dim=0).cpu())
    return torch.stack(right[2:]).mean(dim=0)  # the memory is full


def echo_scores(seed):
    """Right answers by position, for all models trained from this seed."""
    return {name: right_answers(echoer(name, seed)) for name in ECHOERS}

# %%
echoers = {name: echoer(name, SEED) for name in ECHOERS}
right = {name: right_answers(model) for name, model in echoers.items()}
echo_band = bands.load("01_echo_scores", text=None)  # made-up symbols, no text
echo_band.check(right, margin=0.05)

# %% jupyter={"source_hidden": true} tags=["hide-input"]
figure, axes = plt.subplots(2, 2, figsize=(6.4, 4.2), sharex=True, sharey=True)
for ax, (name, shares) in zip(axes.flat, right.items()):
    look = LOOK["vanilla" if name == "vanilla" else "Transformer-XL"]
    figures.band(ax, range(1, T + 1), echo_band.values[name])
    ax.plot(range(1, T + 1), shares, label="this run", **look | dict(markersize=3))
    ax.axhline(1 / 8, color="black", linestyle=":", label="guessing")
    ax.set(title=name, ylim=(0, 1.05), xticks=[1, 8, 16, 24, 32])
axes[0, 0].legend()
figure.supxlabel("position in the segment", fontsize=11)
figure.supylabel("share of right answers", fontsize=11)
figures.show(
    figure,
    "The vanilla model guesses everywhere. With a memory of half a segment the first "
    "half of the answers is guessed and the second half right; with a whole segment "
    "all are right. A second layer does not help the half memory.",
)

# %%
first, second = slice(0, T // 2), slice(T // 2, T)
for name, shares in right.items():
    halves = f"{shares[first].mean():.2f}, second {shares[second].mean():.2f}"
    print(f"{name:17} first half {halves}")
assert right["vanilla"].max() < 0.25 and right["M = 32"].min() > 0.95
for name in ("M = 16", "M = 16, 2 layers"):
    assert right[name][first].max() < 0.25 and right[name][second].min() > 0.95

# %% [markdown]
# All or nothing, at the very position where the answer comes into sight. To check that the memory's *content* does it,
# exchange it: give each lane the memory of its neighbour.

# %%
def neighbour(memory):
    """The memory of the next lane for each lane."""
    return memory and [states.roll(1, dims=0) for states in memory]


exchanged = right_answers(echoers["M = 32"], change=neighbour)
print(f"own memory {right['M = 32'].mean():.2f},", end=" ")
print(f"the neighbour's {exchanged.mean():.2f}")
assert exchanged.max() < 0.25

# %% [markdown]
# The model with two layers reaches far enough for every question: even the first query of a
# segment feels $32 + 16 = 48$ tokens back, since the oldest state in its memory belongs to a segment that began 32 tokens ago with
# a memory of 16. The answer, 32 tokens back, could have come in two steps of 16: a state in memory picks it
# up in layer 1, and the query reads that state in layer 2. The model has not learned to. Within
# the older segment nothing asks for it, and the gradient stops at the memory, so nothing tells that segment what
# the newer one will need. **Reach is what a model can feel, not what it has learned to use.** Exercise 1.7
# lets the gradient through.

# %% [markdown]
# ### A longer memory at evaluation
#
# Because every distance has a vector, you can evaluate with a longer memory than in training. The paper's
# released scripts do: trained on WikiText-103 with segments and memory of 150, the base model is evaluated in segments of
# 64 with a memory of 640, `same_length`, and `clamp_len = 400`. Here the memory grows from 8 to 256, for
# Transformer-XL, for the same model with both options (clamped at 63, the largest distance in training), and for
# the model with absolute positions.

# %% tags=["band"]
LENGTHS = [8, 16, 32, 64, 256]  # of the memory at evaluation
OPTIONS = dict(same_length=True, clamp_len=2 * T - 1)


def with_memory(model, mem_len, **options):
    """Validation loss with another memory; the model is left as it was."""
    settings = dict(mem_len=mem_len, **options)
    trained = {name: getattr(model, name) for name in settings}
    for name, value in settings.items():
        setattr(model, name, value)
    loss = training.evaluate(model, corpus.valid, segment_len=T)
    for name, value in trained.items():
        setattr(model, name, value)
    return loss


def by_memory(model):
    """Validation losses of Transformer-XL, one for each of LENGTHS."""
    return {
        "memory: relative": [with_memory(model, n) for n in LENGTHS],
        "memory: options": [with_memory(model, n, **OPTIONS) for n in LENGTHS],
        "memory: none": [with_memory(model, 0)],
    }


# %%
sweep = by_memory(xl)
seen.check(sweep, margin=0.05)
sweep = of("memory", sweep)
sweep["absolute"] = [with_memory(models["absolute, memory"], n) for n in LENGTHS]

# %% jupyter={"source_hidden": true} tags=["hide-input"]
figure, axes = plt.subplots()
look = {
    "relative": LOOK["Transformer-XL"] | dict(label="Transformer-XL"),
    "options": LOOK["Transformer-XL"]
    | dict(label="same_length, clamp_len", linestyle="--", markerfacecolor="white"),
    "absolute": LOOK["absolute, memory"] | dict(label="absolute, memory"),
}
for name, style in look.items():
    label = "{} recorded seeds" if name == "relative" else "_"
    figures.band(axes, LENGTHS, of("memory", seen.values).get(name, ()), label)
    axes.plot(LENGTHS, sweep[name], **style)
axes.axvline(T, color="black", linestyle=":", label="memory in training")
axes.set_xscale("log", base=2)
axes.set_xticks(LENGTHS, labels=LENGTHS)
axes.set(xlabel="memory at evaluation (states, doubling)")
axes.set(ylabel="validation loss (nats per character)")
axes.set_title(f"A longer memory than in training ({corpus.name})")
axes.legend()
figures.show(
    figure,
    "Transformer-XL's validation loss falls until about the memory length of training "
    "and is level from there to eight times that length, with and without the two "
    "options; with absolute positions the loss rises from 16 states on.",
)
figures.table(
    f"Validation loss by memory at evaluation ({corpus.name})",
    ["", *LENGTHS],
    [[look[name]["label"], *(f"{n:.3f}" for n in sweep[name])] for name in look],
)

# %%
relative, options, absolute = (sweep[name] for name in look)
print(f"without memory: {sweep['none'][0]:.3f}")
trained_with = LENGTHS.index(T)
assert sweep["none"][0] > relative[trained_with] + 0.1  # memory is worth something
assert abs(relative[-1] - relative[trained_with]) < 0.03  # eight times as long: no harm
assert abs(options[-1] - relative[trained_with]) < 0.03
assert absolute[-1] > absolute[trained_with] + 0.05  # with absolute positions it harms

# %% [markdown]
# The gain is complete at the memory of training. Beyond it the loss of Transformer-XL falls no further; it rises
# by a few thousandths. That is a fact about this text and this small model, which find little use for what stands more
# than a line back. The echo shows that the method uses all of the memory that it was trained with when the stream calls for
# it; a gain from a longer one is not shown here. (In the paper's Table 6 there is one: its Transformer-XL does best at 500 words.) But nothing breaks either, and that is what the relative positions promise: with absolute ones, the longer the memory
# grows beyond that of training, the worse.
#
# Is that because our model was trained for a minute? The package comes with a Transformer-XL of four layers that was trained for some ten
# minutes, with a memory of 64 (the book's page on trained weights has the details):

# %%
trained, vocab = memtx_minimal.load("transformer_xl")  # on the CPU
text = vocab.encode(corpus.vocab.decode(corpus.valid))
longer_run = {}
for n in (0, 16, 64, 256):
    trained.mem_len = n
    longer_run[n] = training.evaluate(trained, text, segment_len=64)
trained.mem_len = 64
for n, loss in longer_run.items():
    print(f"trained longer, memory of {n:3} at evaluation: {loss:.3f}")
if corpus.name == "Tiny Shakespeare":  # which it has learned
    assert longer_run[0] > longer_run[16] > longer_run[64]
    assert abs(longer_run[256] - longer_run[64]) < 0.02

# %% [markdown]
# The same: memory is worth more than a tenth of a nat to it, and the gain is complete at the memory of training.
#
# In the figure above, the two options change next to nothing at a long memory. At a short one `same_length` costs something: with `M = 8` each
# query sees 8 keys, and without the option 9 to 40.

# %% [markdown]
# ### How much context is used?
#
# Now without memory: at 2,000 places spread over the validation text, each model reads just the `n` characters before
# the place, as one segment, and predicts the next.

# %% tags=["band"]
CONTEXTS = list(range(16, 129, 16))
PLACES = torch.linspace(CONTEXTS[-1], len(corpus.valid) - 1, 2000).long()


@torch.inference_mode()
def losses_with_context(model, n):
    """Loss of the characters at PLACES when n characters are seen before each, (N,).

    The vanilla model has no positions beyond its window: it sees max_len at most.
    """
    n, losses = min(n, getattr(model, "max_len", n)), []
    windows = torch.stack([corpus.valid[p - n : p + 1] for p in PLACES])  # (N, n + 1)
    for some in windows.to(device).split(100):
        logits, *_ = model(some[:, :-1])
        last = logits[:, -1].float()  # (100, vocab_size)
        losses.append(F.cross_entropy(last, some[:, -1], reduction="none"))
    return torch.cat(losses).cpu()


def by_context(models):
    """The losses of three models at each place, {name: (contexts, N)}."""
    readers = {
        "Transformer-XL": models["relative, memory"],
        "relative, no memory": models["relative, no memory"],
        "vanilla": models["absolute, no memory"],
    }
    return {
        name: torch.stack([losses_with_context(model, n) for n in CONTEXTS])
        for name, model in readers.items()
    }


# %%
table = by_context(models)
means = {name: losses.mean(dim=1) for name, losses in table.items()}
seen.check({f"context: {name}": mean for name, mean in means.items()}, margin=0.05)

# %% jupyter={"source_hidden": true} tags=["hide-input"]
figure, axes = plt.subplots()
lines(axes, CONTEXTS, means, of("context", seen.values))
axes.axvline(T, color="black", linestyle=":", label="segment in training")
axes.legend(loc="center right", bbox_to_anchor=(1, 0.7), ncols=2)
axes.set(ylabel="loss (nats per character)")
axes.set(xlabel="context (characters)", xticks=CONTEXTS)
axes.set_title(f"Loss by length of context ({corpus.name})")
figures.show(
    figure,
    "Transformer-XL's loss is the lowest of the three at 128 characters; it falls a "
    "little beyond the 32 of a training segment, where the vanilla model's is level "
    "and that of the model with relative positions and no memory rises.",
)

# %% [markdown]
# Which differences are more than chance? Two kinds of chance are at work: which places were chosen, and which seed the
# models were trained from. The table takes Transformer-XL's loss minus vanilla's at each
# place, so that below zero Transformer-XL is ahead: the mean with its standard error, and then the mean for each recorded seed.

# %% jupyter={"source_hidden": true} tags=["hide-input"]
rows, seeds = [], of("context", seen.values)
for n in (16, 32, 64, 128):
    place = CONTEXTS.index(n)
    pairs = table["Transformer-XL"][place] - table["vanilla"][place]
    error = pairs.std() / len(pairs) ** 0.5
    recorded = seeds["Transformer-XL"] - seeds["vanilla"]  # (S, contexts)
    others = "  ".join(f"{value:+.3f}" for value in recorded[:, place])
    rows.append([n, f"{pairs.mean():+.3f} ± {error:.3f}", others])
figures.table(
    f"Transformer-XL's loss minus vanilla's, nats ({corpus.name})",
    ["context", "this run, ± standard error", "recorded seeds"],
    rows,
)

# %%
longer = {name: (mean[1] - mean[-1]).item() for name, mean in means.items()}
for name, gain in longer.items():
    error = (table[name][1] - table[name][-1]).std() / len(PLACES) ** 0.5
    what = f"gains {gain:+.3f} ± {error:.3f} nats from {CONTEXTS[1]} to {CONTEXTS[-1]}"
    print(f"{name:20} {what}")
assert longer["vanilla"] == 0 and CONTEXTS[1] == T
assert longer["Transformer-XL"] > longer["relative, no memory"] + 0.01
assert means["Transformer-XL"][-1] == min(mean[-1] for mean in means.values())
ahead = table["vanilla"] - table["Transformer-XL"]  # (contexts, N)
errors = ahead.std(dim=1) / ahead.size(1) ** 0.5
assert (ahead.mean(dim=1)[1:] > 4 * errors[1:]).all()  # from 32 characters on

recorded = of("context", seen.values)  # (seeds, contexts) each
assert (recorded["Transformer-XL"] < recorded["vanilla"]).all()
assert (recorded["vanilla"][:, 0] < recorded["vanilla"][:, 1]).all()  # 16 beats 32
gains_of_seeds = recorded["Transformer-XL"][:, 1] - recorded["Transformer-XL"][:, -1]
print("Transformer-XL's gain, by seed:", [f"{gain:+.3f}" for gain in gains_of_seeds])
assert (gains_of_seeds > 0).all() and (gains_of_seeds < 0.03).all()

# %% [markdown]
# At 32 characters both see the same characters, no memory takes part, and yet Transformer-XL is ahead by about a tenth of a nat, in every seed. Most of
# this comes from the relative positions: in the figure, the model that has only these does nearly as well. At 16 characters Transformer-XL is ahead in every seed too, but by little: vanilla met contexts of 1 to 32 in training, and Transformer-XL, once
# its memory was full, only 33 to 64.
#
# The vanilla model can have nothing from beyond its window. From 16 to 32 characters it even gets worse, in every seed. Why,
# we have not found out. The model with relative positions that was trained without
# memory can be given more, and does worse with it: it has never met a distance above 31. That need not be so. In the
# paper's Table 6 such a model, far larger, gains: its perplexity is 29.59 at the length of training and 29.02 at 260. Here only the
# model that was trained with memory gains from beyond the segment: about a hundredth of a nat, in every seed.

# %% [markdown]
# ### Relative effective context length
#
# Appendix C of the paper has a measure for this that is fair to models of different strength. Let
# $l_m(n, t)$ be the loss of model $m$ at place $t$ when it sees $n$ tokens before it, and $b(n, t) = \min_m l_m(n, t)$ that of the
# best model of a group, here the three above. Only the hard places count: $\mathcal T$ holds the share $r$ of all places with the highest $b(n, t)$.
# Let the model see $\Delta$ more tokens there, 16 here, and count only what beats the best loss at $n$, so that a weak model gains
# nothing by catching up. The mean of the losses counted like this is $f_m$, and the gain $g_m$ is the share by which the
# perplexity $\exp f_m$ falls:
#
# $$
# f_m(n, n') = \frac{1}{|\mathcal T|} \sum_{t \in \mathcal T} \min\left(b(n, t),\, l_m(n', t)\right), \qquad
# g_m = \frac{\exp f_m(n, n) - \exp f_m(n, n + \Delta)}{\exp f_m(n, n)} .
# $$
#
# At $n' = n$ the minimum is always $b(n, t)$, so
# $f_m(n, n)$ is the same number $f$ for all models, and the gain is
# $1 - \exp\left(f_m(n, n + \Delta) - f\right)$. The **RECL** is the first $n$ at which the gain is below 0.01.

# %% tags=["band"]
SHARES = (0.1, 0.5, 1.0)  # r


def gains(table, name, r):
    """The gain of a model from each context length to the next, on the share r."""
    best = torch.stack(list(table.values())).amin(dim=0)  # (contexts, N): b
    result = []
    for n in range(len(CONTEXTS) - 1):
        hard = best[n].topk(int(r * best.size(1))).indices
        longer = torch.minimum(best[n], table[name][n + 1])[hard].mean()
        result.append(1 - (longer - best[n][hard].mean()).exp().item())
    return result


def recl(table, name, r):
    """The context length at which the gain first falls below 0.01."""
    small = [n for n, gain in zip(CONTEXTS, gains(table, name, r)) if gain < 0.01]
    return small[0] if small else CONTEXTS[-1]

# %% [markdown]
# How much of the result is the luck of the 2,000 places? Draw 2,000 of them anew, with repetition, and compute it
# again, a hundred times (a *bootstrap*). The range below holds 90 of the 100 results. The luck of the seed is not in
# it: that is what the recorded seeds add. They come from the function `lengths`, like all of `seen`.

# %% tags=["band"]
def lengths(seed):
    """What models trained from one seed make of position, memory and context."""
    three = [name for name in CORNERS if name != "absolute, memory"]
    models = {name: corner(name, seed) for name in three}
    values, table = by_memory(models["relative, memory"]), by_context(models)
    for name, losses in table.items():
        values[f"context: {name}"] = losses.mean(dim=1)
        values[f"recl: {name}"] = [recl(table, name, r) for r in SHARES]
    pairs = {"Transformer-XL": "relative, memory", "vanilla": "absolute, no memory"}
    for name, key in pairs.items():
        values[f"position: {name}"] = loss_by_position(models[key])
    return values


# %%
def spread(name, r, n_draws=100):
    """The range that holds 90 % of the RECLs of places drawn anew."""
    generator, found = torch.Generator().manual_seed(SEED), []
    for _ in range(n_draws):
        drawn = torch.randint(len(PLACES), (len(PLACES),), generator=generator)
        again = {name: losses[:, drawn] for name, losses in table.items()}
        found.append(recl(again, name, r))
    return sorted(found)[5], sorted(found)[94]


here = {name: [recl(table, name, r) for r in SHARES] for name in table}
ranges = {name: [spread(name, r) for r in SHARES] for name in table}

# %% jupyter={"source_hidden": true} tags=["hide-input"]
rows = []
for name in table:
    for n, r in enumerate(SHARES):
        low, high = ranges[name][n]
        seeds = of("recl", seen.values)[name][:, n]
        others = "  ".join(f"{value:.0f}" for value in seeds)
        rows.append([f"{name}, r = {r}", here[name][n], f"{low} to {high}", others])
figures.table(
    f"RECL in characters, in steps of 16 ({corpus.name})",
    ["", "this run", "places drawn anew", "recorded seeds"],
    rows,
)

# %% [markdown]
# At this size the measure is nearly blind. Its steps are 16 characters wide, the results lie at most three steps apart, and new places
# alone move some of them by a step. Nor can a gain be negative, since $b$ takes the place of any loss that rises: what the relative model without
# memory loses beyond 32 does not show, and vanilla, whose mean loss rises from 16 to 32, gets credit where it
# beats $b$. At `r` = 0.1 and 0.5 it even comes out ahead of that model, in every seed. In the paper it is
# last, and the models differ by hundreds of words (Table 8; its first three rows are one group with a $b$ of its own, the others a second):
#
# | | r = 0.1 | r = 0.5 | r = 1 |
# | --- | --- | --- | --- |
# | Transformer-XL, 151 million parameters | 900 | 800 | 700 |
# | QRNN (recurrent) | 500 | 400 | 300 |
# | LSTM (recurrent) | 400 | 300 | 200 |
# | Transformer-XL, 128 million | 700 | 600 | 500 |
# | with the positions of Shaw et al. | 400 | 400 | 300 |
# | relative, no recurrence | 300 | 300 | 300 |
# | vanilla | 128 | 128 | 128 |

# %% [markdown]
# ### Where it looks
#
# Give the trained model a memory of three segments (in training it had one), and sort its attention by
# the **age** of the key: its distance from the query. The buckets double in width. Ages beyond
# the memory's 96 exist only for the later queries of a segment.

# %%
@torch.inference_mode()
def attention_by_age(model, stream, T=T, n_segments=40):
    """Mean attention of each layer at each age, (L, K), and the share of it that goes
    to memory, by query, (L, T)."""
    M, memory, total = model.mem_len, None, 0
    segments = corpora.lanes(stream, 32, T)
    for n, (tokens, _) in zip(range(M // T + n_segments), segments):
        with measure.record_attention(model) as weights:
            _, memory = model(tokens, memory)
        if n >= M // T:  # the memory is full
            rows = [w.mean(dim=(0, 1)) for w in weights]  # (T, K) each
            total += torch.stack(rows).cpu()  # (L, T, K)
    mass, ages = total / n_segments, distances(T, M)
    by_age = [mass[:, ages == age].sum(dim=1) / T for age in range(M + T)]
    return torch.stack(by_age, dim=1), mass[:, :, :M].sum(dim=2)


xl.mem_len = 3 * T
by_age, share = attention_by_age(xl, corpus.valid.to(device))
xl.mem_len = T
assert torch.allclose(by_age.sum(dim=-1), torch.ones(3), atol=1e-4)  # nothing is lost

# %% jupyter={"source_hidden": true} tags=["hide-input"]
edges = [0, 1, 2, 4, 8, 16, 32, 64, 128]
mass = {
    f"layer {n + 1}": [row[a:b].sum() for a, b in zip(edges, edges[1:])]
    for n, row in enumerate(by_age)
}
greys = ["#222222", "#777777", "#bbbbbb"]
figure, axes = plt.subplots()
axes.set_prop_cycle(color=greys)
labels = dict(xlabel="age of the key (characters)", ylabel="share of attention")
figures.buckets(axes, edges, mass, **labels)
axes.set_title(f"Attention by age, memory of {3 * T} ({corpus.name})")
figures.show(
    figure,
    "Most attention goes to keys less than four characters old; the rest is spread "
    "over all ages, back to the oldest.",
)

# %% jupyter={"source_hidden": true} tags=["hide-input"]
figure, axes = plt.subplots()
axes.set_prop_cycle(color=greys)
rows = {f"layer {n + 1}": row for n, row in enumerate(share)}
labels = dict(xlabel="position in the segment", ylabel="share of attention on memory")
figures.curves(axes, range(1, T + 1), rows, **labels)
axes.set_ylim(0, 1)
axes.set_title(f"How much attention goes to memory ({corpus.name})")
figures.show(
    figure,
    "Nearly all attention of the first position of a segment goes to memory; the share "
    "falls fast over the next few positions and slowly from there on.",
)
for title, values in {
    "on the latest four characters": by_age[:, :4].sum(dim=1),
    "on memory, over all positions": share.mean(dim=1),
}.items():
    layers = (f"layer {n + 1}: {value:.2f}" for n, value in enumerate(values))
    print(f"{title}: {'  '.join(layers)}")

# %%
assert (share[:, 0] > share[:, -1] + 0.2).all()
assert by_age[:, :4].sum(dim=1).mean() > 0.5

# %% [markdown]
# Most attention goes to the latest few characters. So the start of a segment looks
# at the memory most: there the latest few characters *are* the memory.
#
# Attention alone does not show that something is used. So exchange the memory, of one segment again: each lane gets its
# neighbour's, other text from the same plays.

# %%
@torch.inference_mode()
def loss_with(model, change):
    """Validation loss when change(memory) is read in place of the memory."""
    memory, losses = None, []
    for tokens, targets in corpora.lanes(corpus.valid.to(device), 32, T):
        logits, memory = model(tokens, change(memory))
        losses.append(F.cross_entropy(logits.mT, targets, reduction="none"))
    return torch.cat(losses, dim=1).mean().item()  # of (B, characters of a lane)


def old_half(memory):
    """The older half from the neighbour, the newer one from the lane itself."""
    pairs = zip(memory or [], neighbour(memory) or [])
    halves = [torch.cat([b[:, : T // 2], a[:, T // 2 :]], dim=1) for a, b in pairs]
    return halves or None


changes = {
    "its own memory": lambda memory: memory,
    "the older half from the neighbour": old_half,
    "no memory": lambda memory: None,
    "the neighbour's memory": neighbour,
}
content = {name: loss_with(xl, change) for name, change in changes.items()}
for name, loss in content.items():
    print(f"{name:35}{loss:.3f}")
own, half, none, other = content.values()
assert own < half < none and abs(other - none) < 0.1 < other - own

# %% [markdown]
# The memory's content is what counts: another text's memory is worth about as much as none. The older half of the lane's own memory counts a little, too.
#
# Look for yourself, with the model that was trained longer. Point at a character, or step to one with the arrow keys, and see what each of its four layers and
# four heads reads there: orange is memory, blue the segment. Go to the start of a segment, and the bars move to the memory.

# %%
seen_by = measure.reads(trained, text[:300], segment_len=64)
figures.explorer({"Transformer-XL": seen_by}, vocab)

# %% [markdown]
# ### The four terms after training
#
# The terms of section 1.2 with the trained weights: one layer, one segment, all heads. The hook catches what this layer's
# attention gets, the normalised context; `before` is the memory that the last segment reads. The picture shows the head whose term (b) varies most. The table below it has the spread (standard deviation) of each term over
# all heads. Its last row asks whether (a), too, prefers some keys whoever asks: it is the spread of the mean of (a) over all queries, from key to key in memory.

# %%
@torch.inference_mode()
def four_terms(model, layer, tokens, memory):
    """The terms (a) to (d) of a layer for one text, (H, T, K) each, future nan."""
    block, contexts = model.layers[layer], []
    keep = lambda module, args, out: contexts.append(out)
    hook = block.norm_attention.register_forward_hook(keep)
    model(tokens, memory)
    hook.remove()
    attention, context = block.attention, contexts[0][0]  # (K, d_model)
    K, T = len(context), tokens.size(1)
    q = attention.heads(attention.query(context[-T:]))  # (H, T, d_head)
    k, _ = attention.key_value(context).chunk(2, dim=-1)  # (K, d_model)
    k = attention.heads(k)  # (H, K, d_head)
    R = sinusoid(torch.arange(K, -1, -1, device=context.device), context.size(1))
    r = attention.heads(attention.position(R))  # (H, K + 1, d_head)
    u, v = (bias.expand_as(q) for bias in (attention.u, attention.v))  # (H, T, d_head)
    a, b = q @ k.mT, rel_shift(q @ r.mT)  # (a), (b)
    c, d = u @ k.mT, rel_shift(v @ r.mT)  # (c), (d)
    future = distances(T, K - T, context.device) < 0
    terms = torch.stack([a, b, c, d]) * q.size(-1) ** -0.5  # (4, H, T, K)
    return dict(zip("abcd", terms.masked_fill(future, math.nan).cpu()))


memory = None
for tokens, _ in corpora.lanes(corpus.valid[: 3 * T + 1].to(device), 1, T):
    before, (_, memory) = memory, xl(tokens, memory)
terms = four_terms(xl, 1, tokens, before)

# %% jupyter={"source_hidden": true} tags=["hide-input"]
head = max(range(4), key=lambda h: terms["b"][h].nan_to_num().std())
names = dict(a="content", b="content and distance", c="key alone", d="distance alone")
figure, axes = plt.subplots(2, 2, figsize=(6.4, 4.8), sharex=True, sharey=True)
for ax, (name, term) in zip(axes.flat, terms.items()):
    most = term[head].nan_to_num().abs().quantile(0.99).item()  # but for extreme cells
    image = figures.matrix(
        ax, term[head], title=f"({name}) {names[name]}",
        cmap="PuOr", vmin=-most, vmax=most,
        xlabel="key" if name in "cd" else "", ylabel="query" if name in "ac" else "",
    )  # fmt: skip
    ax.axvline(T - 0.5, color="black", linestyle="--", linewidth=1)
    figure.colorbar(image, ax=ax)
figure.suptitle(f"Parts of the score: layer 2, head {head + 1} ({corpus.name})")
figures.show(
    figure,
    "Term (a) changes from pair to pair; term (b) is strong near the diagonal in some "
    "rows and absent in others; term (c) is the same in every row, term (d) along "
    "every diagonal. The colour scale of (c) is the narrowest.",
)

# %%
def spreads_of(terms, M):
    """How much each term varies, and the mean of (a) by key, over M keys in memory."""
    mean_a = terms["a"][:, :, :M].mean(dim=1)  # (H, M): every query sees these keys
    spreads = {f"({name})": t[~t.isnan()].std().item() for name, t in terms.items()}
    return spreads | {"mean of (a) by key": mean_a.std(dim=1).mean().item()}


memory = None
for tokens, _ in corpora.lanes(text[: 3 * 64 + 1], 1, 64):
    before, (_, memory) = memory, trained(tokens, memory)
live = spreads_of(terms, T)
longer_run = spreads_of(four_terms(trained, 1, tokens, before), 64)
figures.table(
    "Spread of the terms in layer 2",
    ["", "this run", "trained longer"],
    [[name, f"{live[name]:.2f}", f"{longer_run[name]:.2f}"] for name in live],
)
for spreads in (live, longer_run):
    assert spreads["(c)"] == min(spreads.values())
    assert spreads["mean of (a) by key"] > 2 * spreads["(c)"]

# %% [markdown]
# Position speaks through (b) and (d). The term (c), a preference for
# keys whoever asks, has the smallest spread. That does not mean that the model has no such preference: the
# spread in the last row is more than twice that of (c). Both models have put the preference into (a). The
# dashed line parts memory (left) from segment (right); no term takes notice of it.
#
# ### How much faster evaluation is
#
# The baseline needs one window for each prediction if it is to see a full context. Transformer-XL
# computes each state once. The paper's Table 9 gives the factor at several lengths of attention; here
# is ours, for one layer of width 512 (untrained weights take just as long). What is compared is the
# time to predict **one character with a context of `n`**.
#
# - Vanilla: one forward pass over a window of `n`.
# - Transformer-XL: one forward pass over a segment of 1,024 with a full memory of `n`, divided by 1,024.
#
# Vanilla attention runs in a *fused* kernel here: one that computes softmax and products in blocks and never
# stores the whole matrix of scores. Neither the models of 2019 nor our Transformer-XL have one, so vanilla is
# measured with a plain kernel too.

# %%
paper = {800: 363, 1800: 773, 2800: 1409, 3800: 1874}
WIDE = SIZES | dict(d_model=512, n_heads=2, n_layers=1, d_ff=2048)
SEGMENT = 1024


@torch.inference_mode()
def slow_down(n):
    """Time of a sliding window, with a plain and with a fused kernel, over the time of
    cached segments, for one character at context n."""
    sliding = VanillaTransformer(**WIDE, max_len=n).to(device).eval()
    cached = TransformerXL(**WIDE, mem_len=n).to(device).eval()
    text = corpus.valid[None, : n + SEGMENT].to(device)
    window, segment, memory = text[:, :n], text[:, n:], None
    for part in window.split(SEGMENT, dim=1):
        _, memory = cached(part, memory)
    timing = dict(warmup=1, rounds=3, device=device)
    with sdpa_kernel(SDPBackend.MATH):
        plain = measure.seconds(lambda: sliding(window), **timing)
    fused = measure.seconds(lambda: sliding(window), **timing)
    one = measure.seconds(lambda: cached(segment, memory), **timing) / SEGMENT
    return plain / one, fused / one


factors = {n: slow_down(n) for n in paper}
assert all(factors[3800][kernel] > factors[800][kernel] > 50 for kernel in (0, 1))

# %% jupyter={"source_hidden": true} tags=["hide-input"]
figure, axes = plt.subplots()
curves = {
    "plain kernel": [plain for plain, _ in factors.values()],
    "fused kernel": [fused for _, fused in factors.values()],
    "paper, Table 9": list(paper.values()),
}
colors = [figures.COLOUR["vanilla"], "#56B4E9", "black"]
for (name, values), color, line in zip(curves.items(), colors, ["-", "-", "--"]):
    axes.plot(list(paper), values, line, color=color, marker="o", label=name)
axes.set(xlabel="context (tokens)", ylabel="times slower than cached segments")
axes.set(ylim=(0, None), xticks=list(paper), title="Vanilla with a sliding window")
axes.legend()
figures.show(
    figure,
    "A sliding window is hundreds of times slower than cached segments, and the factor "
    "is larger at 3,800 tokens than at 800 with both kernels, as in the paper.",
)
figures.table(
    "Times slower than cached segments",
    ["context", *curves],
    [
        [f"{n:,}", *(f"{values[k]:,.0f}" for values in curves.values())]
        for k, n in enumerate(paper)
    ],
)

# %% [markdown]
# With both kernels the factor is larger at 3,800 tokens than at 800, as in the paper; at the long end the fused kernel is the
# faster one. Single points are rough, each the middle of three runs: at 800 the kernels may change places. The factor also depends on the
# machine, on the width (the wider the layer, the less attention weighs against the projections), and on the length of
# the segment, since the memory is paid for once a segment.

# %% [markdown]
# ### What the memory costs
#
# The **memory itself** is one state for each layer and each remembered token:
# `4 * L * B * M * d_model` bytes, at 4 bytes a number. And **training** keeps more for the backward pass, since
# every layer has more keys. Here is what autograd keeps in each layer, for each text of the batch. (Only for
# those who want to compute the bytes.)
#
# | for each key | numbers |
# | --- | --- |
# | context, normalised context, keys, values | `4 * d_model` |
# | projected distances, copied for each text (one more than there are keys) | `d_model` |
# | attention weights | `H * T` |
# | mean and deviation of the norm | 2 |
#
# | for each token of the segment | numbers |
# | --- | --- |
# | normalised states of the segment (copied), queries with $u$ and with $v$, results of the heads | `4 * d_model` |
# | input of the second norm, and its output | `2 * d_model` |
# | hidden layer of the feed-forward | `d_ff` |
# | mean and deviation of the norm | 2 |
#
# Outside the layers there are the final norm, the tokens, and the encodings $R$.

# %%
def kept_computed(B, M, T, H, L, d_model, d_ff):
    """Bytes for backward, of float32 numbers and int64 tokens."""
    K = M + T
    per_key, per_token = 5 * d_model + H * T + 2, 6 * d_model + d_ff + 2
    layers = L * B * (K * per_key + d_model + T * per_token)
    return 4 * (layers + B * T * (2 * d_model + 2) + (K + 1) * d_model) + 8 * B * T


B, names = 32, ("n_heads", "n_layers", "d_model", "d_ff")
H, L, d_model, d_ff = (SIZES[name] for name in names)
mem_lens = [32, 64, 128, 256]
held, kept = [], []
for M in mem_lens:
    model = TransformerXL(**SIZES, mem_len=M).to(device)
    tokens = corpus.valid[: B * (M + T)].view(B, -1).to(device)
    _, memory = model(tokens[:, :M])
    held.append(measure.kept_alive(memory))
    kept.append(measure.bytes_for_backward(model, lambda: model(tokens[:, M:], memory)))
held_computed = [4 * L * B * M * d_model for M in mem_lens]
computed = [kept_computed(B, M, T, H, L, d_model, d_ff) for M in mem_lens]
assert held == held_computed
assert all(abs(m / c - 1) < 0.01 for m, c in zip(kept, computed))

# %% jupyter={"source_hidden": true} tags=["hide-input"]
MiB = 2**20
figure, axes = plt.subplots(1, 2, figsize=(6.4, 3.2))
for ax, title, measured, expected in [
    (axes[0], "memory itself", held, held_computed),
    (axes[1], "kept for backward", kept, computed),
]:
    look = dict(color="black", linestyle=":", label="computed")
    ax.plot(mem_lens, [n / MiB for n in expected], **look)
    look = dict(color=figures.COLOUR["Transformer-XL"], label="measured")
    ax.plot(mem_lens, [n / MiB for n in measured], "s", **look)
    ax.set(title=title, xlabel="memory (states)", ylabel="MiB", ylim=(0, None))
    ax.set(xlim=(0, None), xticks=[0, *mem_lens[1:]])
    ax.legend()
figures.show(
    figure,
    "The memory itself takes a few MiB and grows in proportion to its length; what is "
    "kept for the backward pass is many times as much and grows along a straight line. "
    "Measured and computed bytes agree.",
)
figures.table(
    "MiB for a batch of 32",
    ["memory", "memory itself", "kept for backward"],
    [[M, f"{a / MiB:.1f}", f"{b / MiB:.1f}"] for M, a, b in zip(mem_lens, held, kept)],
)

# %% [markdown]
# Memory costs little to hold and much more to train with; both grow along a straight line.
#
# ### The paper's own numbers
#
# The paper's Tables 1 and 2 show what a minute of training on one megabyte cannot. On WikiText-103 the large model, of 257 million
# parameters, reaches a perplexity of 18.3. And on characters:
#
# | enwik8, bits per character | 12 layers | 18 layers | 24 layers | 64 layers |
# | --- | --- | --- | --- | --- |
# | vanilla (Al-Rfou et al.) | 1.11 | | | 1.06 |
# | Transformer-XL | 1.06 | 1.03 | 0.99 | |
#
# With 12 layers, Transformer-XL is as good as the vanilla transformer with 64.

# %% [markdown]
# ## 1.6 Departures from the paper
#
# | here | the paper and its code | why |
# | --- | --- | --- |
# | layer norm *before* attention and feed-forward (pre-LN); so the memory is normalised when it is read | after each of them (post-LN) by default | the models of the other chapters have it so |
# | an ordinary softmax over characters; the output layer has weights of its own | adaptive softmax for large vocabularies; input and output embeddings tied by default | some dozens of characters need neither |
# | embeddings start at standard deviation 1 and are used as they are | start at 0.02 and are multiplied by $\sqrt{d_{\text{model}}}$: 0.4 to 0.64 for their widths of 410 to 1,024 | PyTorch's default |
# | `u` and `v` in each layer | one pair for all layers in the PyTorch code; in the TensorFlow scripts one for each layer on WikiText-103 and One Billion Word, one for all on enwik8 and text8 | a layer holds all that it needs |
# | linear layers start as PyTorch starts them, `u` and `v` at zero | normal, standard deviation 0.02 | PyTorch's default |
# | dropout on embeddings, $R$, attention weights, and what each sub-layer adds, one rate for all | also inside the feed-forward; attention weights have a rate of their own | one number to set. It is 0 in this chapter |
# | one more column of distances, and the shift is a view | a column of zeros, padded | the same scores in the places that are looked at, without a copy |
# | evaluated in segments as long as in training, mostly with the memory of training | short segments, a long memory, `same_length` and `clamp_len` | section 1.5 tries the paper's way beside it |
# | AdamW, gradients clipped at 1.0, a minute of training | Adam, clipped at 0.25, days | what a notebook can do |
#
# ## 1.7 What became of it
#
# The key-value cache of every language model that you talk to is segment recurrence at segment length one: do
# not compute a state twice. Relative positions won, too, in a simpler form: [rotary
# embeddings](https://arxiv.org/abs/2104.09864) let the distance into term (a) itself, by rotating queries and
# keys.
#
# Some works that took an idea of this chapter further, with the year in which each was first public. Which
# idea each goes back to is our reading, not always its authors':
#
# - [XLNet](https://arxiv.org/abs/1906.08237) (2019) keeps the memory and the relative positions of
#   Transformer-XL, in a model that learns to predict the words of a text in any order.
# - [Memorizing Transformers](https://arxiv.org/abs/2203.08913) (2022) keep the keys and values of a long past
#   in one layer, where each query looks up those nearest to it; they still gained when that memory grew to
#   262K tokens.
# - The [Recurrent Memory Transformer](https://arxiv.org/abs/2207.06881) (2022) adds a few memory tokens to
#   each segment and hands on to the next what has become of them; the transformer itself stays as it is.
# - [StreamingLLM](https://arxiv.org/abs/2309.17453) (2023) keeps the keys and values of the first few tokens
#   beside a window of the latest, and so stays stable for 4 million tokens and more; its authors say that it
#   remembers no more than the window.
# - [Mistral 7B](https://arxiv.org/abs/2310.06825) (2023) lets each token attend to a window of the latest
#   tokens only, so that its reach grows with depth, by one window a layer.
# - [Gemma 3](https://arxiv.org/abs/2503.19786) (2025) has five layers that look at a window of 1,024 tokens
#   for each one that looks at everything, which leaves far fewer keys and values to keep.

# %% [markdown]
# ## 1.8 Exercises
#
# Write your answer where the dots stand and run the cell. `exercises.check` says that it is right, or names the
# case that fails, what was expected and what came. All [solutions](solutions/01_transformer_xl.ipynb) are worked out in words and code.
#
# **1.1 Who sees what** *(predict; easy; 5 minutes)* You can read a mask without seeing it. `T` queries follow
# a memory of `M` states. How many keys does each of them see, without a `limit` and with one?

# %% tags=["exercise"]
def my_seen(T, M, limit):
    """How many keys each query sees, a list of T numbers; limit may be None."""
    return ...


exercises.check("1.1", my_seen)

# %% [markdown]
# <details><summary>Hint</summary>
#
# The first query of the segment has `M` keys before it, the next one `M + 1`. A `limit` of 2 leaves two keys.
#
# </details>
#
# **1.2 The authors' shift** *(fill in; middle; 15 minutes)* The
# [authors' code](https://github.com/kimiyoung/transformer-xl/blob/master/pytorch/mem_transformer.py) (`_rel_shift`
# there) starts from `K` columns, for the distances `K - 1` to 0, and *pads*: it puts a column of zeros at the
# front. Write it without `rel_shift`.

# %% tags=["exercise"]
def my_shift(scores):
    """(..., T, K), distances K - 1 ... 0 as columns -> (..., T, K), keys as columns."""
    return ...


exercises.check("1.2", my_shift)

# %% [markdown]
# <details><summary>Hint</summary>
#
# With the zeros the matrix is `(T, K + 1)`. Reshape it to `(K + 1, T)`, drop one of its rows, and reshape again.
#
# </details>
#
# **1.3 A memory with two faults** *(find the fault; middle; 10 minutes)* This is how a colleague updates the memory of a
# layer. Training stops with an error at the second segment; and a model that is evaluated without memory suddenly has one. Mend both.

# %% tags=["exercise"]
def my_memory(past, x, mem_len):
    """The latest mem_len states of past (B, M, d_model), then x (B, T, d_model)."""
    context = torch.cat([past, x], dim=1)  # (B, M + T, d_model)
    return context[:, -mem_len:]


exercises.check("1.3", my_memory)

# %% [markdown]
# <details><summary>Hint</summary>
#
# What is `context[:, -0:]`? And what else does a state keep alive, as long as it can be trained through?
#
# </details>
#
# **1.4 Cleared every four segments** *(predict, then measure; middle; 10 minutes)* The memory of `xl` is cleared at the start
# of every fourth segment. `own` and `none`, from "Where it looks", are its losses with its own memory and without any. Predict the loss from these. Then
# measure it with `loss_with`, and check what you measured.

# %% tags=["exercise"]
my_loss = ...  # a number: first your prediction, then what you measure

exercises.check("1.4", my_loss, none, own)

# %% [markdown]
# <details><summary>Hint</summary>
#
# How many segments of four begin without memory? How good is the one that comes after it? To measure, count the
# calls: `change` is called once a segment, and what it returns is read in place of the memory.
#
# </details>
#
# **1.5 The reach of `same_length`** *(derive; middle; 10 minutes)* Each query sees its `M` latest keys, itself
# among them. How many tokens does the last prediction of a long text feel, with `L` layers? Look at
# `felt(4, 3, same_length=True).sum()` when you have predicted it.

# %% tags=["exercise"]
def my_reach(M, L):
    return ...


exercises.check("1.5", my_reach)

# %% [markdown]
# <details><summary>Hint</summary>
#
# Draw the path for `M = 4`: from the last token one layer down, the oldest key is `M - 1` places back.
#
# </details>
#
# **1.6 One number for a distance** *(build; hard; 30 minutes)* As T5 does, put one learned number for
# each head and distance in the place of the terms (b) and (d). Keep (a) and (c). `bias`, (H, n), has a number for each of `n` distances, and farther keys share
# the last one. The mask has the shape `(T, K)`, from which `distances` gives the distances; `R` and `v` are not needed any more.
# When it is right, put it in place (`layer.attention = BiasAttention(...)` for each layer of a new model), train it, and
# evaluate it with memories of 32, 64 and 256. What do you gain, what do you lose?

# %% tags=["exercise"]
class BiasAttention(RelativeAttention):
    def __init__(self, d_model, n_heads, dropout):
        super().__init__(d_model, n_heads, dropout)
        self.bias = ...  # a parameter (H, 2 * T)

    def forward(self, context, R, mask):
        return ...


exercises.check("1.6", BiasAttention)

# %% [markdown]
# <details><summary>Hint</summary>
#
# `distances(n_queries, K - n_queries)` clamped to `0 ... n - 1` is an index (T, K); `bias[:, index]` is (H, T, K). All
# else is as in `RelativeAttention.forward`.
#
# </details>
#
# **1.7 Let the gradient through** *(experiment; hard; 40 minutes)* The model of two layers with `M = 16` cannot answer the first half of
# the echo. Is it the stopped gradient? Copy the class `TransformerXL` as `Through`, without `detach`. When the
# check passes, train it on the echo in a loop of your own, with one update for every *two* segments on the mean of
# their losses, 1,000 updates in all, and detach the memory after each update. Compare with a `TransformerXL` trained by the very same loop:
# anything else would compare the numbers of updates.

# %% tags=["exercise"]
my_model = ...  # Through(**ECHO, n_layers=2, mem_len=16)

exercises.check("1.7", my_model)

# %% [markdown]
# <details><summary>Hint</summary>
#
# `training.train` calls `backward` after each segment, and the second call would fail: its graph leads into the first segment, which is
# gone. Add two losses, halve the sum, and call `backward` once.
#
# </details>

# %% [markdown]
# ## References
#
# - Z. Dai, Z. Yang, Y. Yang, J. Carbonell, Q. V. Le, R. Salakhutdinov: [Transformer-XL: Attentive
# Language Models Beyond a Fixed-Length Context](https://arxiv.org/abs/1901.02860). ACL 2019.
# - A. Vaswani et al.: [Attention Is All You Need](https://arxiv.org/abs/1706.03762). NeurIPS 2017.
# - P. Shaw, J. Uszkoreit, A. Vaswani: [Self-Attention with Relative Position
# Representations](https://arxiv.org/abs/1803.02155). NAACL 2018.
# - R. Al-Rfou, D. Choe, N. Constant, M. Guo, L. Jones: [Character-Level Language Modeling with
# Deeper Self-Attention](https://arxiv.org/abs/1808.04444). AAAI 2019.

# %%
minutes = (time.perf_counter() - started) / 60
peak = measure.process_peak_bytes() / 2**30
print(f"this run: {minutes:.1f} minutes,", end=" ")
print(f"peak memory {peak:.2f} GiB, text: {corpus.name}")
