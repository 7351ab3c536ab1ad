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
# # 4. Reformer: look only where it matters, keep only what you must

# %% [markdown] tags=["badges"]
# [Open in Colab](https://colab.research.google.com/github/memtx-minimal/memtx-minimal/blob/main/notebooks/04_reformer.ipynb) · [Download this notebook](https://github.com/memtx-minimal/memtx-minimal/raw/main/notebooks/04_reformer.ipynb)

# %% [markdown]
# The other chapters give a transformer a memory beyond its window. **Reformer** ([Kitaev, Kaiser
# and Levskaya, 2020](https://arxiv.org/abs/2001.04451)) goes the other way: it makes the window
# itself long. Two things stand in the way. Attention compares every token with every other, and
# training keeps every activation of every layer. Reformer answers each with an idea of its own:
# attention among *likely* keys, found by hashing, and layers that can be *run backwards*, so that
# nothing has to be kept.
#
# **When you have read it, you can**
# - say what attention and training cost in memory, and measure it;
# - find near vectors by hashing, and turn that into attention that is exact over the keys it finds;
# - write a residual layer that is undone in the backward pass, with dropout and all;
# - say where hashing beats fused attention today, where it does not, and what it gives away about
# the future.
#
# **You need** PyTorch, and attention with queries, keys and values. The chapter stands by itself.
#
# **Time and memory.** The budget of the whole notebook is 8 minutes and 4 GiB on two CPU cores. The
# last cell prints what it took on your machine.

# %% tags=["colab-install"]
import subprocess
import sys

if "google.colab" in sys.modules:  # anywhere else this cell does nothing; Colab keeps its own torch
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps"]
    subprocess.check_call([*pip, "pooch", "git+https://github.com/memtx-minimal/memtx-minimal"])

# %%
import math
import time
from dataclasses import dataclass
from itertools import islice

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

from memtx_minimal import corpora, figures, inputs, measure, tasks, training
from memtx_minimal.vanilla_transformer import VanillaTransformer

started = time.perf_counter()
figures.use_style()
device = training.best_device()
SEED = 0
print(f"PyTorch {torch.__version__} on {device}")

# %% [markdown]
# The letters for shapes, as in the other chapters, and some more:
#
# | letter | meaning | letter | meaning |
# | --- | --- | --- | --- |
# | `B` | batch: texts side by side | `R` | hash rounds |
# | `T` | tokens in the window | `c` | tokens in a chunk |
# | `H` | attention heads | `N` | `B * H * T` rows: the vectors of all heads in a row |
# | `d_model` | width of a hidden state | `G` | chunks in all, `N / c` |
# | `d_head` | width of a head, `d_model / H` | `g` | chunks handled at a time |
# | `L` | layers | `b` | buckets of one hash |
#
# And one picture of the first idea. Colours are hash buckets: similar vectors get the same colour,
# mostly. Sort the tokens by colour, cut the sorted row into chunks of equal length, and let each
# chunk attend to itself and to the chunk before it. Only tokens of the same colour look at each
# other.

# %%
def sorting_picture(axes, buckets, c):
    """Tokens in the order of the text, sorted by bucket, and cut into chunks of c."""
    T, colors = len(buckets), [figures.BLUE, figures.ORANGE, figures.GREEN, figures.PINK]
    order = sorted(range(T), key=lambda i: (buckets[i], i))
    for place, i in enumerate(order):
        axes.plot([i, place], [2, 1], color=colors[buckets[i]], alpha=0.4, linewidth=1, zorder=1)
        cut = place + place // c * 0.5 - 0.75  # a gap after each chunk
        for x, y in [(i, 2), (place, 1), (cut, 0)]:
            axes.scatter(x, y, marker="s", s=110, color=colors[buckets[i]], zorder=2)
            axes.text(x, y, i, ha="center", va="center", color="white", fontsize=7, zorder=3)
    for chunk in range(1, T // c):
        middle = chunk * (c + 0.5) + (c - 1) / 2 - 0.75
        look = dict(arrowstyle="->", connectionstyle="arc3,rad=-0.25", color="black")
        axes.annotate("", (middle - c, -0.25), (middle, -0.25), arrowprops=look)
    axes.set_yticks([2, 1, 0], labels=["text", "sorted", "chunks"])
    axes.set(xticks=[], ylim=(-0.9, 2.4))
    axes.grid(False)
    axes.spines[:].set_visible(False)

# %%
figure, axes = plt.subplots(figsize=(6.4, 2.8))
example = torch.tensor([2, 0, 1, 0, 3, 2, 0, 1, 1, 3, 2, 0, 3, 1, 0, 2])
sorting_picture(axes, example.tolist(), c=4)
figures.show(
    figure,
    "Sixteen numbered tokens in three rows: in the order of the text, coloured by bucket; sorted by "
    "bucket; and cut in four chunks, with an arrow from each chunk to the one before it.",
)

# %% [markdown]
# ## 4.1 The problem: where the memory goes

# %%
corpus = corpora.tiny_shakespeare()
print(f"{corpus.name}: {len(corpus.train):,} characters to train on, {len(corpus.valid):,} to validate")

# %% [markdown]
# Take the baseline of this course, at a length of 1,024 characters, and ask autograd what it keeps
# between the forward and the backward pass. The hooks in `measure.bytes_for_backward` see every
# tensor that is saved; `kept_alive` counts all the memory that these hold on to.

# %%
MiB = 2**20
WIDE = dict(vocab_size=len(corpus.vocab), d_model=128, n_heads=4, n_layers=4, d_ff=512)


def text_of(T, B=1):
    """The start of the validation text as B windows of T tokens, on the device."""
    return corpus.valid[: B * T].clone().view(B, T).to(device)  # a view keeps the whole text alive


def kept(model, tokens):
    """MiB that autograd keeps for the backward pass of a training step."""
    loss = lambda: F.cross_entropy(model(tokens)[0].flatten(0, 1), tokens.flatten())
    return measure.bytes_for_backward(model, loss, count=measure.kept_alive) / MiB


vanilla = VanillaTransformer(**WIDE, max_len=1024).to(device)
layer, x = vanilla.layers[0], torch.randn(1, 1024, 128, device=device, requires_grad=True)
parts = dict(zip(["attention", "feed-forward"], [layer.attention, layer.feed_forward]))
parts = {name: measure.bytes_for_backward(m, lambda m=m: m(x)) / MiB for name, m in parts.items()}
parts["whole layer"] = measure.bytes_for_backward(layer, lambda: layer(x)) / MiB
parts["four layers"] = kept(vanilla, text_of(1024))
parts["parameters"] = sum(p.nbytes for p in vanilla.parameters()) / MiB

# %%
figure, axes = plt.subplots()
figures.bars(axes, parts, ylabel="MiB", number="{:.1f}")
axes.set_title("Kept for the backward pass, one window of 1,024 tokens")
figures.show(
    figure,
    "Bars: what attention, the feed-forward network, a whole layer and four layers keep for the backward "
    "pass at length 1,024, beside the size of the parameters, which is far smaller than the four layers.",
)

# %%
assert parts["four layers"] > 5 * parts["parameters"]

# %% [markdown]
# A single window keeps many times the size of the model, and all of it is for the backward pass. It
# grows with length and with depth. (PyTorch's fused attention already avoids the worst: it never
# stores the `T * T` weights. When the paper was written, everybody stored them. Section 4.6 comes
# back to this.)
#
# And time. Fused or not, attention compares each token with all earlier ones.

# %%
def step_time(model, tokens, rounds=1):
    """Seconds for a forward and a backward pass, after one that does not count."""
    run = lambda: F.cross_entropy(model(tokens)[0].flatten(0, 1), tokens.flatten()).backward()
    return measure.seconds(run, warmup=1, rounds=rounds, device=device)


for T in (512, 2048, 4096):
    seconds = step_time(VanillaTransformer(**WIDE, max_len=T).to(device), text_of(T))
    print(f"length {T:5,}: {1e6 * seconds / T:5.0f} microseconds a token")

# %% [markdown]
# If a token had to look at a fixed number of others only, the last column would stay the same.
#
# ## 4.2 Hashing finds the likely keys
#
# The output of attention for query $q_i$ is a weighted mean of values, with weights $\exp(q_i \cdot
# k_j)$. The exponential makes it sparse in effect: the few keys nearest to the query have nearly
# all the weight. So it would be enough to find those few, without comparing with all.
#
# **Locality-sensitive hashing** does that. Draw a random matrix of shape $[d_{\text{head}}, b/2]$
# (called $R$ as in the paper; not the number of rounds) and give a vector $x$ the bucket
#
# $$
# h(x) = \arg\max \left( [xR \,;\, -xR] \right) ,
# $$
#
# where $[u\,;\,v]$ joins two vectors end to end. There are $b$ buckets, one for each direction, a
# column of $R$ or its opposite; $h$ picks the one with the largest product with $x$. Long columns
# win more often, so buckets are of uneven size. Vectors that point nearly the same way mostly get
# the same bucket. The length of $x$ does not matter.
#
# **Shared QK.** For a query and a key to fall into the same bucket they must be comparable.
# Reformer makes them the same vector: $k_j = q_j / \lVert q_j \rVert$. No key projection is left.

# %% tags=["from-module"]
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

# %% [markdown]
# With more than 32 buckets, one hash with that many directions gets expensive, so two hashes of few
# buckets are put together: $h = h_1 + h_2 \, b_1$.
#
# In two dimensions you can see the buckets. Each panel is one hash round with 4 buckets, that is,
# two random directions and their opposites. Two pairs of points are marked: a near one and a far
# one.

# %%
angles = torch.linspace(0, 2 * math.pi, 361)[:-1]
circle = torch.stack([angles.cos(), angles.sin()], dim=-1)[None, None]  # (B, H, 360, d_head)
buckets = hash_vectors(circle, n_buckets=4, n_rounds=3, seed=SEED + 3)[:, 0, 0]  # (R, 360)
pairs = {"near": (30, 45), "far": (30, 170)}  # in degrees

figure, axes = plt.subplots(1, 3, figsize=(6.4, 2.5))
cmap = plt.matplotlib.colors.ListedColormap(["#0072B2", "#D55E00", "#009E73", "#CC79A7"])
for r, ax in enumerate(axes):
    ax.scatter(*circle[0, 0].T, c=buckets[r], cmap=cmap, vmin=0, vmax=3, s=8)
    for (name, (i, j)), marker in zip(pairs.items(), "os"):
        ends = circle[0, 0, [i, j]] * (0.88 if name == "near" else 0.7)
        ax.plot(*ends.T, marker=marker, color="black", linewidth=1, markersize=4, label=name)
    same = [name for name, (i, j) in pairs.items() if buckets[r, i] == buckets[r, j]]
    ax.set_title(f"round {r + 1}\ntogether: {', '.join(same) or 'none'}", fontsize=9)
    ax.set(xticks=[], yticks=[], aspect="equal")
    ax.spines[:].set_visible(False)
axes[0].legend(loc="center", fontsize=7)
figures.show(
    figure,
    "Three circles, one a hash round, each divided into four coloured arcs at random places. A near pair "
    "and a far pair of points are marked; the titles say which of them share a bucket in that round.",
)

# %% [markdown]
# One round may part a near pair, or join a far one. That is chance, and so more rounds help: two
# vectors meet if *any* round puts them together. Count how often that happens, by angle.

# %%
many = hash_vectors(circle[:, :, :181:5], n_buckets=4, n_rounds=4000, seed=SEED)[:, 0, 0]  # (R, 37)
p = (many == many[:, :1]).float().mean(dim=0)  # (37,): how often each meets the first
meet = {f"{n} round{'s' * (n > 1)}": 1 - (1 - p) ** n for n in (1, 2, 4, 8)}

figure, axes = plt.subplots()
figures.curves(
    axes, range(0, 181, 5), meet,
    xlabel="angle between the vectors (degrees)", ylabel="chance to meet in a bucket",
)
axes.set_title("Four buckets in two dimensions")
figures.show(
    figure,
    "Chance that two vectors share a bucket in at least one round, against the angle between them, for 1, 2, "
    "4 and 8 rounds. All curves fall from 1; with more rounds they stay up longer.",
)

# %%
assert p[0] == 1 and p[3] > 0.8 and p[-1] == 0 and (meet["8 rounds"] >= meet["1 round"]).all()

# %% [markdown]
# ## 4.3 Attention over the sets that hashing found
#
# Let $\mathcal P_i$ be the set of keys that query $i$ may look at. Exact causal attention has
# $\mathcal P_i = \{j : j \le i\}$. With hashing it is $\{j \le i : h(q_j) = h(q_i)\}$, and the
# output is
#
# $$
# o_i = \sum_{j \in \mathcal P_i} \exp\left( q_i \cdot k_j - z(i, \mathcal P_i) \right) v_j ,
# \qquad z(i, \mathcal P_i) = \log \sum_{j \in \mathcal P_i} \exp (q_i \cdot k_j) .
# $$
#
# It is the softmax that you know, with fewer keys. There is no division by
# $\sqrt{d_{\text{head}}}$: the keys have length one, and the network sets the scale of the scores
# by the length of its queries.
#
# ### Sort, and cut in chunks
#
# Buckets are of uneven size, and hardware likes even ones. So sort the tokens by bucket, and inside
# a bucket by position. Cut the sorted row in chunks of $c$ tokens, twice the average bucket. Let
# each chunk look at itself and at the one before it, which is where the rest of its first bucket
# is. A bucket that is longer than that is cut off.
#
# To know who sees whom, each token gets a **code**: twice its bucket, plus the number of its chunk.
# Two tokens of the same bucket in the same chunk have equal codes, in neighbouring chunks codes
# that differ by one; different buckets are at least two apart. So in one round
#
# $$
# \mathcal P_i = \{\, j \le i \;:\; 0 \le \text{code}_i - \text{code}_j \le 1 \,\} .
# $$

# %% tags=["from-module"]
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

# %%
order, code = sort_buckets(example.view(1, 1, 1, 16), c=4)
print("bucket", example.tolist())
print("order ", order[0].tolist())
print("code  ", code[0].tolist())

# %% [markdown]
# These are the tokens of the first picture. (The rows of all texts and heads lie one after the
# other in one long row, and every head is sorted for itself. Here there is one text and one head.)
#
# ### The masks, one by one
#
# Equation 16 of the paper says what is added to a score $q_i \cdot k_j$: minus infinity for keys
# of other buckets and for the future; $-10^5$ for $i = j$; and $-\log N_{i,j}$, of which more
# below: $N_{i,j}$ is the number of rounds that put $j$ in $i$'s set. Why $i = j$? A query is
# nearest to its own key, always, because both are the same vector: without the penalty tokens
# would look at little but themselves. With it they do so only when nothing else is there.
#
# First the slow way, in which all of this is easy to read: one matrix of scores for each head.

# %%
SELF, NEVER = -1e5, -1e9  # eq. 16: yourself, if nothing else is there; keys outside the set
LOG2E = math.log2(math.e)  # exp(x) = exp2(LOG2E * x), and exp2 is fast for masked scores
PAIRS = 2**19  # scores held at a time: 2 MiB, which stay in the processor's cache

# %% tags=["from-module"]
def exact_mask(q):
    """Added to all scores (T, T): the future hidden, yourself as the last resort."""
    T, worst = q.size(2), max(SELF, torch.finfo(q.dtype).min / 2)  # -1e5 is too much for half
    future = q.new_full((T, T), float("-inf")).triu(1)
    return future + worst * torch.eye(T).to(q)

# %% tags=["from-module"]
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

# %%
def clustered(T, d, n_clusters, noise, seed, scale=1.0):
    """Vectors scattered around a few directions, as trained queries are: (1, 1, T, d)."""
    g = torch.Generator().manual_seed(seed)
    centres = torch.randn(n_clusters, d, generator=g)
    of = torch.randint(n_clusters, (T,), generator=g)
    x = F.normalize(centres[of] + noise * torch.randn(T, d, generator=g), dim=-1)
    return scale * x[None, None]


T, c = 16, 4
q = clustered(T, 8, 4, 0.15, seed=SEED, scale=4.0)  # (1, 1, T, d_head)
k = F.normalize(q, dim=-1)
buckets = hash_vectors(q, n_buckets=8, n_rounds=2, seed=SEED)  # (R, 1, 1, T)
order, code = sort_buckets(buckets, c)  # (R, T)
place, chunk, bucket = order[0], torch.arange(T) // c, buckets[0, 0, 0][order[0]]

window = (chunk[:, None] - chunk >= 0) & (chunk[:, None] - chunk <= 1)  # its chunk, and the one before
same = window & (bucket[:, None] == bucket)
past = same & (place[:, None] >= place)
N_ij = ((code[:, :, None] - code[:, None] >> 1) == 0).sum(dim=0)[place][:, place] * past

# %%
figure, axes = plt.subplots(1, 4, figsize=(7.6, 2.5), sharey=True)
steps = {"chunk and\nlook-back": window, "same bucket": same, "not the future": past}
steps["$N_{i,j}$, and\nyourself (pale)"] = N_ij
for n, (ax, (title, seen)) in enumerate(zip(axes, steps.items())):
    seen = seen.float()
    if n == 3:
        seen[range(T), range(T)] = 0.4
    figures.matrix(
        ax, seen, title=title, cmap="Blues", vmin=0, vmax=2, xlabel="key, sorted",
        ylabel="query, sorted" if n == 0 else "",
    )
figures.show(
    figure,
    "Four matrices in sorted order. First: blocks of each chunk and the one before it. Second: only squares of "
    "equal bucket are left. Third: only their lower triangles. Fourth: some pairs count two rounds.",
)

# %%
allowed = torch.zeros(T, T, dtype=torch.bool)
allowed[place[:, None], place] = past  # back in the order of the text
weights = attention_weights(q, k, buckets[:1], c)[0, 0]
assert (allowed == (weights > 0) | (allowed & torch.eye(T, dtype=torch.bool))).all()

# %% [markdown]
# The same at a glance, for 32 tokens: exact attention, the same matrix with rows and columns sorted
# by bucket, the part that one round computes, and that part in the order of the text.

# %%
T, c = 32, 8
q = clustered(T, 8, 4, 0.1, seed=SEED, scale=4.0)
k = F.normalize(q, dim=-1)
buckets = hash_vectors(q, n_buckets=8, n_rounds=1, seed=SEED)
place = sort_buckets(buckets, c)[0][0]  # (T,)
exact, hashed = (attention_weights(q, k, b, c)[0, 0] for b in (None, buckets))  # (T, T)

# %%
figure, axes = plt.subplots(2, 2, figsize=(6.4, 6.0))
panels = {
    "exact attention": exact, "sorted by bucket": exact[place][:, place],
    "sorted and chunked": hashed[place][:, place], "hashed attention": hashed,
}  # fmt: skip
for n, (ax, (title, weights)) in enumerate(zip(axes.flat, panels.items())):
    names = ("key, sorted", "query, sorted") if n in (1, 2) else ("key", "query")
    figures.matrix(ax, weights.sqrt(), title=title, cmap="Blues", vmin=0, vmax=1, xlabel=names[0], ylabel=names[1])
    for g in range(T // c if n == 2 else 0):
        corner = (max(0, g - 1) * c - 0.5, g * c - 0.5)
        box = dict(fill=False, edgecolor=figures.ORANGE, linewidth=1.5)
        ax.add_patch(plt.Rectangle(corner, c * (1 + (g > 0)), c, **box))
figures.show(
    figure,
    "Four heat maps of attention. Exact attention is scattered below the diagonal; sorted by bucket, most of it "
    "gathers near the diagonal; one round computes only the blocks that are framed; back in the order of the "
    "text they give nearly the picture of exact attention.",
)

# %%
overlap = torch.minimum(exact, hashed)[1:].sum(dim=1).mean().item()
print(f"one round finds keys that hold {overlap:.0%} of the weight of exact attention")

# %% [markdown]
# ### Several rounds, and each key once
#
# With $R$ rounds, the set of query $i$ is the union of its sets in all rounds. Write $o_i^{(r)}$
# for the output and $z_i^{(r)}$ for the log of the normaliser of round $r$ alone. Then (equations
# 13 to 15)
#
# $$
# \mathcal P_i = \bigcup_r \mathcal P_i^{(r)} , \qquad
# o_i = \sum_{r} \exp\left( z_i^{(r)} - z_i \right) o_i^{(r)} , \qquad z_i = \log \sum_r \exp z_i^{(r)} .
# $$
#
# Every round is a softmax of its own, and the rounds are weighed by how much they found. One thing
# is missing: a key that several rounds find would count several times. So if $N_{i,j}$ rounds have
# $j$ in $i$'s set, each gives it only its share, $-\log N_{i,j}$ in the score. Then the result is
# *exactly* the softmax over the union.
#
# Now the fast way. No code touches a $T \times T$ matrix; a round is computed chunk by chunk, with
# $c \times 2c$ scores for each chunk. Two small functions put rows in sorted order:

# %% tags=["from-module"]
def chunks(x, place, c):
    """Sorted rows, chunk by chunk: (N, d) -> (G, c, d)."""
    return x.index_select(0, place).unflatten(0, (-1, c))

# %% tags=["from-module"]
def windows(x, place, c):
    """The same, each with the chunk before it: (N, d) -> (G, d, 2c), a view."""
    return x.index_select(0, torch.cat([place[:c], place])).unfold(0, 2 * c, c)

# %%
sorted_rows = torch.arange(8)[:, None]  # 8 rows that are sorted already, d = 1
print(windows(sorted_rows, torch.arange(8), c=2).squeeze(1))  # (G, 2c)

# %% [markdown]
# Each chunk, with the one before it. The first chunk has nothing before it; what stands there is
# filler, and must never be seen. (Much code lets the first chunk look back to the last one. Then a
# mask must keep the beginning of the text from seeing its end.)
#
# Next come the scores, by equation 16, in base 2: on the processor where this was written, `exp` is
# very slow for the large negative numbers of masked scores, and `exp2` is not. The labels of a row are its codes in
# all rounds and its position. Shifting a difference of codes right by one bit gives 0 for 0 and 1,
# and something else for anything else.

# %% tags=["from-module"]
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

# %% [markdown]
# One round, forward. It returns what must be known to add rounds up: the largest score of each row,
# the sum of its weights and the weighted sum of values.

# %% tags=["from-module"]
def attend(q, k, v, order, labels, r, *how):
    """Round r: for each row its top score, sum of weights (N, 1), and weighted sum (N, d)."""
    v, parts = windows(v, order[r], how[0]).mT, []  # (G, 2c, d)
    for s, _, _, scores, N_ij in masked_scores(q, k, order, labels, r, *how):
        top = scores.amax(dim=-1, keepdim=True)  # (g, c, 1)
        p = scores.sub_(top).exp2_().div_(N_ij)  # (g, c, 2c)
        parts.append((top, p.sum(dim=-1, keepdim=True), p @ v[s]))
    rank = torch.empty_like(order[r]).scatter_(0, order[r], torch.arange(len(q)).to(order))
    return [torch.cat(part).flatten(0, 1).index_select(0, rank) for part in zip(*parts)]

# %% [markdown]
# And backward. With $p_{ij}$ the final weights, $do_i$ the gradient that comes in, and $s_{ij}$ the
# scores,
#
# $$
# dv_j = \sum_i p_{ij}\, do_i , \qquad
# ds_{ij} = p_{ij} \left( do_i \cdot v_j - do_i \cdot o_i \right) , \qquad
# dq_i = \sum_j ds_{ij}\, k_j , \qquad dk_j = \sum_i ds_{ij}\, q_i .
# $$
#
# That is the gradient of any softmax attention. The scores are computed again: to keep them would
# cost far more than to make them.

# %% tags=["from-module"]
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

# %% tags=["from-module"]
def full_precision(method):
    """Keeps autocast out of forward and backward, which must get the same scores."""

    def outside_autocast(ctx, x, *rest):
        with inputs.autocast(x.device.type, enabled=False):
            return method(ctx, x, *rest)

    return outside_autocast

# %% [markdown]
# An autograd function holds forward and backward together. It adds up the rounds as equations 13 to
# 15 do, with sums in place of their logarithms. What it keeps for the backward pass has the size of
# its inputs, whatever the number of chunks.

# %% tags=["from-module"]
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

# %% tags=["from-module"]
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

# %% [markdown]
# Check the fast way against the slow one, values and gradients, at a length that does not divide
# into chunks.

# %%
torch.manual_seed(SEED)
q, v = (torch.randn(2, 3, 50, 8, dtype=torch.float64, requires_grad=True) for _ in range(2))
k = F.normalize(q, dim=-1)  # (B, H, T, d_head)
buckets = hash_vectors(q.detach(), n_buckets=14, n_rounds=3, seed=SEED)  # (R, B, H, T)
fast = lsh_attention(q, k, v, buckets, c=8)
slow = attention_weights(q, k, buckets, c=8) @ v
pull = torch.randn_like(fast)
grads = [torch.autograd.grad(out, (q, v), pull, retain_graph=True) for out in (fast, slow)]
errors = [(fast - slow).abs().max(), *((a - b).abs().max() for a, b in zip(*grads))]
print("out", tuple(fast.shape), " largest differences:", "  ".join(f"{e:.0e}" for e in errors))
assert max(errors) < 1e-10

# %% [markdown]
# ### How many rounds does it take?
#
# Take 1,024 clustered vectors and measure how far hashed attention is from exact attention. With
# $N_{i,j}$, more rounds bring it ever nearer. Without, a key that is found eight times counts eight
# times, and no number of rounds mends that.

# %%
def error(n_rounds, duplicates, T=1024, c=64):
    """Mean distance between hashed and exact attention, relative to the size of the exact output."""
    q = clustered(T, 32, 64, 0.08, seed=SEED + 1, scale=6.0).to(device)
    v = torch.randn(q.shape, generator=torch.Generator().manual_seed(SEED)).to(q)
    k = F.normalize(q, dim=-1)
    exact = attention_weights(q, k, None, c) @ v
    total = 0
    for seed in range(3):
        buckets = hash_vectors(q, 2 * T // c, n_rounds, seed)
        out = lsh_attention(q, k, v, buckets, c, duplicates=duplicates)
        total += ((out - exact).norm(dim=-1).mean() / exact.norm(dim=-1).mean()).item()
    return total / 3


rounds = [1, 2, 4, 8, 16]
errors = {
    "with $N_{i,j}$ (the paper)": [error(n, True) for n in rounds],
    "without $N_{i,j}$ (later code)": [error(n, False) for n in rounds],
}

# %%
figure, axes = plt.subplots()
figures.curves(
    axes, range(len(rounds)), errors, marker="o",
    xlabel="hash rounds", ylabel="relative error of the output",
)
axes.set_xticks(range(len(rounds)), labels=rounds)
axes.set_ylim(bottom=0)
axes.set_title("Clustered vectors, length 1,024, chunks of 64")
figures.show(
    figure,
    "Relative error of hashed attention against the number of rounds. With the duplicates term it falls "
    "towards zero; without it the curve levels off above.",
)

# %%
for name, values in zip(("with N_ij", "without"), errors.values()):
    print(f"{name:9}", "  ".join(f"{n}: {e:.2f}" for n, e in zip(rounds, values)))
right, wrong = errors.values()
assert right[-1] < 0.5 * right[0] and right[-1] < 0.7 * wrong[-1] and abs(right[0] - wrong[0]) < 1e-6

# %% [markdown]
# ### The layer
#
# The settings stand in one place, so that you can train with one number of rounds and evaluate with
# another. The layer hashes, attends, and hands out its buckets: you will see soon who needs them.
# In training every step draws new rotations, from PyTorch's random numbers, so that a pair which is
# parted once is not parted for ever. In evaluation they are the same for all texts of one length:
# the number of buckets, and with it the rotations, depends on the length. (Lines that begin with
# `inputs.` refuse what cannot work and name what would, in the same words for all models.)

# %% tags=["from-module"]
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

# %% tags=["from-module"]
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

# %%
torch.manual_seed(SEED)
attention = LSHAttention(d_model=32, n_heads=2, settings=Settings(chunk_len=8, n_rounds=4))
for T in (16, 50):
    out, buckets = attention(torch.randn(3, T, 32))
    print(f"T = {T}: out {tuple(out.shape)}, buckets {None if buckets is None else tuple(buckets.shape)}")

# %% [markdown]
# ## 4.4 Layers that run backwards
#
# An ordinary residual layer computes $y = x + F(x)$, and backpropagation needs $x$ again. So every
# layer keeps its input, and all that $F$ computes inside. A **reversible** layer works on two
# streams:
#
# $$
# \begin{aligned}
# Y_1 &= X_1 + \text{Attention}(X_2) , & \quad Y_2 &= X_2 + \text{FeedForward}(Y_1) , \\
# X_2 &= Y_2 - \text{FeedForward}(Y_1) , & \quad X_1 &= Y_1 - \text{Attention}(X_2) .
# \end{aligned}
# $$
#
# The second line undoes the first. The inputs follow from the outputs, so you may forget them. In
# the backward pass you rebuild them layer by layer, from the top down, computing each block a
# second time. You pay with time and gain memory.
#
# Seen as single blocks it is even simpler. One stream is read, the other gets something added, and
# then they change roles: $(x_1, x_2) \to (x_2,\; x_1 + f(x_2))$, where $f$ is attention and
# feed-forward in turn.
#
# Two things must be *the same* the second time. **Dropout**, and whatever else a block draws: the
# state of the random numbers is saved before each block, and put back. And the **buckets**: rebuilt inputs differ from the first ones by a rounding
# error, and a vector that stands between two buckets could fall into the other one. So the buckets
# are kept: one byte (two above 256 buckets) for each token, head and round.

# %% tags=["from-module"]
def random_state(device, state=None):
    """The states of the random numbers on the CPU and on the device; sets them to `state`."""
    here = {"cuda": torch.cuda, "mps": torch.mps}.get(device.type)
    where = [device] if device.type == "cuda" else []
    if state is not None:
        torch.set_rng_state(state[0])
        if here:
            here.set_rng_state(state[1], *where)
    return torch.get_rng_state(), here.get_rng_state(*where) if here else None

# %% [markdown]
# A feed-forward network treats every position by itself, so it need not treat them all at once.
# `couple` and `uncouple` take `piece_len` tokens at a time where a block allows it; the wide hidden
# layer then never exists for the whole window.

# %% tags=["from-module"]
def couple(block, x, y, kept=None):
    """y + block(x), in pieces of block.piece_len tokens; and what the block wants kept."""
    length, pieces = block.piece_len or x.size(1), []
    for read, changed in zip(x.split(length, dim=1), y.split(length, dim=1)):
        change, kept = block(read, kept)
        pieces.append(changed + change)
    return torch.cat(pieces, dim=1), kept

# %% tags=["from-module"]
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

# %% [markdown]
# The way back, for one block. Autograd does the inside of the block, on a small graph that is
# thrown away at once.

# %% tags=["from-module"]
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

# %% [markdown]
# If the model went from training to evaluation in between, its settings changed, or a parameter
# was frozen, the second computation would not be the first one again. That must be an error and
# not a wrong gradient.

# %% tags=["from-module"]
def modes(blocks):
    """What must not change between forward and backward."""
    return [
        (b.training, str(getattr(b, "settings", "")), [p.requires_grad for p in b.parameters()])
        for b in blocks
    ]

# %% tags=["from-module"]
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

# %% [markdown]
# ### The rest of the model
#
# The feed-forward block, and positions. For a very long window a table with one vector for each
# position would be larger than the rest of the model. **Axial positions** factorise it: write position $n$ as a row and a column of a grid,
# give each row and each column half a vector, and join the two halves.

# %% tags=["from-module"]
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

# %% tags=["from-module"]
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

# %%
positions = AxialPositions((4, 8), 6)
print("positions", tuple(positions(32).shape), "from", sum(p.numel() for p in positions.parameters()), "numbers")

# %% tags=["from-module"]
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

# %% tags=["from-module"]
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

# %% [markdown]
# Does it give the right gradients? Compare with `reversible=False`, where autograd keeps
# everything, in training mode: with dropout, fresh rotations, feed-forward in pieces, and two
# forward passes before one backward pass.

# %%
def all_gradients(reversible):
    """Gradients of all parameters after two forward passes and one backward pass."""
    torch.manual_seed(SEED)
    small = dict(vocab_size=10, d_model=16, n_heads=2, n_layers=6, d_ff=32, chunk_len=4, axial_shape=(5, 8))
    model = Reformer(**small, piece_len=8, dropout=0.2, reversible=reversible).double()
    one, two = torch.randint(10, (2, 3, 40))
    loss = model(one)[0].logsumexp(-1).sum() + model(two)[0].square().sum()
    loss.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters()])


mine, right = all_gradients(True), all_gradients(False)
relative = ((mine - right).norm() / right.norm()).item()
print(f"{len(mine):,} gradients, relative difference {relative:.0e}")
assert relative < 1e-10

# %% [markdown]
# ## 4.5 Train it
#
# The same loop as in every chapter. The window is eight times as long as a chunk: longer than
# two chunks, so all attention is hashed.

# %%
T, STEPS = 128, 600
SIZES = dict(vocab_size=len(corpus.vocab), d_model=96, n_heads=4, n_layers=3, d_ff=384)
torch.manual_seed(SEED)
reformer = Reformer(**SIZES, chunk_len=16, n_rounds=2, axial_shape=(8, 16)).to(device)
history = training.train(reformer, corpus.train, steps=STEPS, batch_size=8, segment_len=T)

figure, axes = plt.subplots()
figures.curves(
    axes, range(20, STEPS + 1), {"loss": figures.smooth(history["loss"], 20)},
    xlabel="training step", ylabel="training loss (nats per character)",
)
axes.set_title(f"Running mean over 20 steps ({corpus.name})")
figures.show(figure, "Training loss of the Reformer against the training step, falling steeply and then slowly.")

# %%
assert sum(history["loss"][-50:]) / 50 < 2.4 < history["loss"][0]

# %%
text = training.generate(reformer, corpus.valid[:64], 200, temperature=0.8, top_k=10, seed=SEED)
print(corpus.vocab.decode(text[64:]))

# %% [markdown]
# ## 4.6 The claims, one by one
#
# ### The duplicate task
#
# The paper's own test (section 5, Table 2). A sequence has the form `0 w 0 w`, where `w` is a
# string of random symbols, new each time. Whoever reads the second `w` can predict all of it, but
# must look back exactly half the sequence for every symbol: nothing nearer helps. Train with exact
# attention, and with 4, 2 and 1 rounds; then evaluate each model with exact attention and with 8,
# 4, 2 and 1 rounds.
#
# The positions of this model are one full table (a grid of one column). Along two axes, a symmetric
# similarity such as shared QK cannot tell one column to the right from one to the left.

# %%
HALF, SYMBOLS = 32, 63
evaluated = [0, 8, 4, 2, 1]  # rounds; 0 is exact attention
called = lambda n: "exact" if n == 0 else f"{n} round{'s' * (n > 1)}"


def duplicate_model(n_rounds, steps=260):
    """A one-layer Reformer trained on the duplicate task."""
    torch.manual_seed(SEED)
    model = Reformer(
        SYMBOLS + 1, d_model=128, n_heads=4, n_layers=1, d_ff=128,
        chunk_len=8, n_rounds=n_rounds, axial_shape=(2 * HALF, 1),
    ).to(device)  # fmt: skip
    for table in (model.embedding, model.positions):
        for parameter in table.parameters():
            nn.init.normal_(parameter, std=0.02)
    stream = tasks.duplicate(length=2 * HALF, n_symbols=SYMBOLS, seed=SEED)
    training.train(model, stream, steps=steps, warmup=20, weight_decay=0.0)
    return model


@torch.no_grad()
def accuracy(model, n_rounds):
    """Share of the second w that the model predicts, on strings that it has not seen."""
    model.settings.n_rounds = n_rounds
    tokens, targets, _ = next(tasks.duplicate(batch_size=64, length=2 * HALF, n_symbols=SYMBOLS, seed=SEED + 999))
    best, targets = model(tokens.to(device))[0].argmax(dim=-1), targets.to(device)
    return (best == targets)[targets != -100].float().mean().item()

# %%
table = {}
for trained in (0, 4, 2, 1):
    model = duplicate_model(trained)
    table[trained] = [accuracy(model, n) for n in evaluated]

paper = {
    0: [100, 94.8, 92.5, 76.9, 52.5], 4: [0.8, 100, 99.9, 99.4, 91.9],
    2: [0.8, 100, 99.9, 98.1, 86.8], 1: [0.8, 99.9, 99.6, 94.8, 77.9],
}  # fmt: skip
print("accuracy in %, here | in the paper (Table 2, length 1024)\n")
print("trained with \\ evaluated with " + "".join(f"{called(n):>16}" for n in evaluated))
for trained, row in table.items():
    cells = (f"{100 * a:.1f} | {b}".rjust(16) for a, b in zip(row, paper[trained]))
    print(f"{called(trained):30}" + "".join(cells))

# %%
here = {trained: dict(zip(evaluated, row)) for trained, row in table.items()}
for name, rows, unit in (("here", table, 100), ("paper", paper, 1)):
    gaps = [unit * (rows[n][-1] - rows[0][-1]) for n in (4, 2, 1)]
    print(f"{name:5} under 1 round, who never saw a hash is behind by", ", ".join(f"{gap:.1f}" for gap in gaps), "points")
assert here[0][0] > 0.99 and here[4][4] > 0.97  # both solve the task as they were trained
assert all(row[8] >= row[1] for row in here.values())  # more rounds are better, whatever it was trained with
assert here[0][1] < min(here[n][1] for n in (4, 2, 1))  # who never saw a hash suffers most
assert min(row[2] for row in here.values()) > 0.9  # two rounds solve it, whatever it was trained with
assert min(here[4][0], here[2][0]) > 0.97  # and exact attention is best: here the paper says 0.8 %

# %% [markdown]
# What agrees: the task is solved with hashing from two rounds on. Training with one round is enough
# for that, evaluating with one is not. Every model does better with more rounds than with one,
# whatever it was trained with. And the model that never saw a hash does worst with one round: here
# by a few points, in the paper by far more, as the last lines say. So you may train with few rounds
# and evaluate with many.
#
# What does not: in the paper, models trained with hashing fail under exact attention (0.8 %, which
# is guessing), and a model trained with exact attention loses a good deal under 8 rounds. Here a
# model trained with hashing does best under exact attention, as one would expect of a method whose
# output converges to it. A [published replication](https://github.com/arampacha/reformer_fastai)
# got other numbers again: its model trained with exact attention fails with any number of rounds,
# and those trained with hashing keep a part of their accuracy under exact attention. Our task is
# 16 times shorter, and our model smaller: the paper has $d_{\text{model}} = d_{ff} = 256$, we have
# half of that. Our attention masks other buckets and counts duplicates, as the paper's text says;
# we do not know what its code did in that experiment.
#
# ### More rounds, on text
#
# Figure 4 of the paper: with 8 rounds, hashed attention is nearly as good as exact attention. Here
# is the model that you trained above with two rounds, evaluated with others.

# %%
def with_rounds(n):
    """Validation loss of the trained model with another number of rounds."""
    trained, reformer.settings.n_rounds = reformer.settings.n_rounds, n
    loss = training.evaluate(reformer, corpus.valid[: 16 * 8 * T + 1], batch_size=8, segment_len=T)
    reformer.settings.n_rounds = trained
    return loss


losses = {called(n): with_rounds(n) for n in (1, 2, 4, 8, 0)}

# %%
figure, axes = plt.subplots()
axes.plot(list(losses), list(losses.values()), marker="o")
axes.set(xlabel="evaluated with", ylabel="validation loss (nats per character)")
axes.set_title(f"Trained with 2 rounds ({corpus.name})")
figures.show(
    figure,
    "Validation loss of a model trained with two rounds, evaluated with 1, 2, 4 and 8 rounds and exactly.",
)

# %%
print("  ".join(f"{n}: {loss:.3f}" for n, loss in losses.items()))
assert losses["1 round"] > losses["8 rounds"] - 0.005 and abs(losses["8 rounds"] - losses["exact"]) < 0.03

# %% [markdown]
# It comes out as the paper says. One round is clearly worse than two, with which the model was
# trained. More rounds help although it never saw them, and with 8 the loss is that of exact
# attention.
#
# ### Shared QK and reversible layers cost little
#
# Figure 3 of the paper: curves with shared QK, and with reversible layers, lie on those without.
# For the comparison all models use exact attention, and windows of 64 characters. Two variants
# have to be written for it. One is an ordinary attention: keys projected apart, not normalised,
# scores divided by $\sqrt{d_{\text{head}}}$, yourself allowed. The other is ordinary residuals
# with a single stream.

# %%
class SeparateQK(LSHAttention):
    """An ordinary attention, whose keys have a projection of their own."""

    def __init__(self, d_model, *args, **kw):
        super().__init__(d_model, *args, **kw)
        self.key = nn.Linear(d_model, d_model, bias=False)

    def forward(self, x, buckets=None):
        q, _, v = self.heads(x)  # (B, H, T, d_head)
        k = self.key(self.norm(x)).unflatten(-1, (self.n_heads, -1)).transpose(1, 2)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.dropout(self.out(y.transpose(1, 2).flatten(2))), None


class OneStream(Reformer):
    """The same blocks around one stream, as in an ordinary transformer."""

    def forward(self, tokens, memory=None):
        x = self.embedding(tokens) + self.positions(tokens.size(1))
        for block in self.blocks:
            x = x + block(x)[0]
        return self.head(self.norm(torch.cat([x, x], dim=-1))), None

# %%
def exact_model(kind, separate=False):
    """A model with exact attention on windows of 64 characters."""
    torch.manual_seed(SEED)
    model = kind(**SIZES, n_rounds=0, axial_shape=(8, 8))
    for n in range(0, 2 * SIZES["n_layers"], 2):
        if separate:
            model.blocks[n] = SeparateQK(SIZES["d_model"], SIZES["n_heads"], model.settings)
    return model.to(device)


CURVE_STEPS = 250
variants = {
    "reversible, shared QK": exact_model(Reformer),
    "reversible, separate QK": exact_model(Reformer, separate=True),
    "ordinary, shared QK": exact_model(OneStream),
}
curves, seconds = {}, {}
for label, model in variants.items():
    start = time.perf_counter()
    curves[label] = training.train(model, corpus.train, steps=CURVE_STEPS, batch_size=16)["loss"]
    seconds[label] = time.perf_counter() - start

# %%
figure, axes = plt.subplots()
smooth = {label: figures.smooth(losses, 20) for label, losses in curves.items()}
figures.curves(
    axes, range(20, CURVE_STEPS + 1), smooth,
    xlabel="training step", ylabel="training loss (nats per character)",
)
for line, width, style in zip(axes.lines, (7, 3.5, 1.5), ("-", "-", "--")):  # all three show
    line.set(linewidth=width, linestyle=style)
axes.lines[-1].set_color("black")
axes.legend()
axes.set_title(f"Running mean over 20 steps ({corpus.name})")
figures.show(
    figure,
    "Training losses of three models with exact attention, which nearly lie on one another: reversible with "
    "shared QK, reversible with separate QK, ordinary residuals with shared QK.",
)

# %%
last = {label: losses[-1].item() for label, losses in smooth.items()}
for label in variants:
    print(f"{label:24} loss {last[label]:.3f}, {seconds[label]:.0f} s")
assert max(last.values()) - min(last.values()) < 0.15

# %% [markdown]
# The three curves lie on one another, as in the paper. Neither shared keys nor reversible layers
# cost anything that you could see in one run.
#
# ### Time against length
#
# Keep the number of tokens in a batch at 8,192 and make the texts longer and fewer. The time of
# exact attention grows with the length; that of hashed attention should not. Attention alone,
# forward and backward, hashing and sorting included; `fused` is PyTorch's
# `scaled_dot_product_attention`.

# %%
TOKENS = 8192
lengths = [256, 1024, 4096, 8192]


def attention_time(T, n_rounds):
    """Seconds for attention of 4 heads of 32 over 8,192 tokens in texts of length T, forward and backward."""
    torch.manual_seed(SEED)
    q, v = (torch.randn(TOKENS // T, 4, T, 32, device=device, requires_grad=True) for _ in range(2))

    def run():
        k = F.normalize(q, dim=-1)
        if n_rounds == 0:
            return F.scaled_dot_product_attention(q, k, v, is_causal=True).sum().backward()
        buckets = hash_vectors(q.detach(), 2 * T // 64, n_rounds, seed=SEED)
        lsh_attention(q, k, v, buckets, c=64).sum().backward()

    return measure.seconds(run, warmup=1, rounds=3 if T < 4096 or n_rounds else 1, device=device)


times = {
    "fused" if n == 0 else called(n): [attention_time(T, n) for T in lengths] for n in (0, 1, 2, 4)
}

# %%
figure, axes = plt.subplots()
figures.curves(
    axes, lengths, {label: [1e3 * t for t in ts] for label, ts in times.items()}, marker="o",
    xlabel="length of the texts (tokens)", ylabel="time for 8,192 tokens (ms)",
)
axes.set(xscale="log", yscale="log")
axes.set_xticks(lengths, labels=[f"{T:,}" for T in lengths])
axes.yaxis.set_major_locator(plt.LogLocator(subs=(1, 2, 5)))
axes.yaxis.set_major_formatter(lambda y, _: f"{y:,g}")
axes.minorticks_off()
axes.margins(y=0.2)
axes.legend(loc="upper left", ncols=2)
axes.set_title("Attention, forward and backward")
figures.show(
    figure,
    "Time of attention over 8,192 tokens against the length of the texts, both logarithmic. Fused attention "
    "rises steeply from far below; the curves of 1, 2 and 4 hash rounds are nearly level, and it crosses them.",
)

# %%
for label, ts in times.items():
    print(f"{label:9}", "  ".join(f"{T:,}: {1e3 * t:4.0f} ms" for T, t in zip(lengths, ts)))
assert times["fused"][-1] > 4 * times["fused"][0] and times["1 round"][-1] < 2.5 * times["1 round"][0]
assert times["fused"][0] < times["4 rounds"][0] and times["1 round"][-1] < times["fused"][-1]

# %%
def crossing(ts):
    """The length at which fused attention takes as long, by a straight line between logarithms."""
    for n in range(1, len(lengths)):
        a, b = (math.log(times["fused"][m] / ts[m]) for m in (n - 1, n))
        if a < 0 <= b:
            return math.exp(math.log(lengths[n - 1]) + math.log(lengths[n] / lengths[n - 1]) * a / (a - b))
    return math.nan


for n in (1, 2, 4):
    print(f"{called(n):9} faster than fused attention from about {crossing(times[called(n)]):,.0f} tokens on")

# %% [markdown]
# The level curves are the paper's claim, and it holds. But mind where the lines cross. In 2020
# attention meant a matrix of `T * T` weights, written to memory and read again. Fused attention
# never writes it, and for short texts hashing loses to it clearly. Where hashing begins to pay
# depends on the number of rounds, and on your machine: the lengths above are those of this run.
# They are for attention alone; in a whole model the rest of each layer weighs as well, and
# reversible layers add their own cost.
#
# ### Memory against depth
#
# Table 3 of the paper: a transformer needs $\max(b\,l\,d_{ff},\; b\,n_h\,l^2)\,n_l$ numbers, a
# Reformer $\max(b\,l\,d_{\text{model}},\; b\,n_h\,l\,n_r\,c)$ (with batch $b$, length $l$, heads
# $n_h$, layers $n_l$, rounds $n_r$, and $c$ the paper's constant for the scores of a row: it writes
# $c = (4l/n_c)^2 = 128^2$, with $n_c$ chunks, though a row has $4l/n_c$ scores. Our rows have two
# chunks of 64, so we put 128). The depth has gone.
#
# Measure what autograd keeps for a training step at length 1,024: with reversible layers, and with
# `reversible=False`, which computes the same; each with hashed and with exact attention. The
# vanilla model stands beside them.

# %%
def reformer_of(T, n_layers=4, **kw):
    """An untrained Reformer for windows of T tokens, with chunks of 64 and two rounds."""
    return Reformer(**WIDE | dict(n_layers=n_layers), chunk_len=64, axial_shape=(T // 64, 64), **kw).to(device)


kinds = {
    "two streams, kept, exact": dict(reversible=False, n_rounds=0),
    "two streams, kept, hashed": dict(reversible=False),
    "reversible, hashed": {},
    "reversible, exact": dict(n_rounds=0),
}
depths, tokens = [1, 2, 4, 8, 12], text_of(1024)
by_depth = {name: [kept(reformer_of(1024, n, **kw), tokens) for n in depths] for name, kw in kinds.items()}
by_depth["vanilla"] = [
    kept(VanillaTransformer(**WIDE | dict(n_layers=n), max_len=1024).to(device), tokens) for n in depths
]

# %%
figure, axes = plt.subplots()
figures.curves(axes, depths, by_depth, marker="o", xlabel="layers", ylabel="kept for backward (MiB)")
axes.lines[2].set(linewidth=6, markersize=9)  # under the next one
axes.legend()
axes.set_xticks(depths)
axes.set_ylim(bottom=0)
axes.set_title("A window of 1,024 tokens")
figures.show(
    figure,
    "MiB kept for the backward pass against the number of layers: two streams that are kept, exact or hashed, and "
    "the vanilla model rise in straight lines; reversible layers, exact or hashed, stay together near the bottom.",
)

# %%
for label, values in by_depth.items():
    print(f"{label:25}", "  ".join(f"{n} layers: {value:6.2f}" for n, value in zip(depths, values)))
growth = by_depth["reversible, hashed"][-1] / by_depth["reversible, hashed"][0]
print(f"reversible, 12 layers against 1: {growth:.3f} times")
assert growth < 1.1 and by_depth["two streams, kept, hashed"][-1] > 8 * by_depth["two streams, kept, hashed"][0]
assert abs(by_depth["reversible, exact"][-1] / by_depth["reversible, hashed"][-1] - 1) < 0.1

# %% [markdown]
# With reversible layers, what is left to keep does not depend on depth: the last states, and what
# the output layer needs. Only the buckets grow with it. What is kept falls by reversibility alone:
# hashed or exact, it is nearly the same.
#
# Why do two streams that are kept need more than the vanilla model? It is not the streams. Hashed
# attention lays the vectors of all heads out as rows, so queries, values and outputs are kept
# twice. Exact attention keeps its mask, $T \times T$ numbers a layer: a mask of its own, because
# you must not look at yourself.
#
# ### Memory against length
#
# Four layers, longer and longer windows. For the vanilla model there are two numbers: as it is,
# with fused attention, and with the weights stored as everybody did in 2020. (The recorder of this
# course opens fused attention up to see the weights, and then autograd keeps them.) The black
# lines are the formulas of Table 3, times 4 bytes. In the second panel, the four kinds of before.

# %%
lengths = [256, 512, 1024, 2048]
by_length = {name: [] for name in ("vanilla, weights stored", "vanilla, fused", *kinds)}
for T in lengths:
    vanilla, tokens = VanillaTransformer(**WIDE, max_len=T).to(device), text_of(T)
    by_length["vanilla, fused"].append(kept(vanilla, tokens))
    with measure.record_attention(vanilla):
        by_length["vanilla, weights stored"].append(kept(vanilla, tokens))
    for name, kw in kinds.items():
        by_length[name].append(kept(reformer_of(T, **kw), tokens))

H, n_layers, d_ff, d_model, R = 4, 4, WIDE["d_ff"], WIDE["d_model"], 2
scores_of_row = 2 * 64  # two chunks
formula = {
    "transformer": [4 * max(T * d_ff, H * T**2) * n_layers / MiB for T in lengths],
    "Reformer": [4 * max(T * d_model, H * T * R * scores_of_row) / MiB for T in lengths],
}

# %%
figure, both = plt.subplots(1, 2, figsize=(7.6, 4), sharey=True)
panels = (["vanilla, weights stored", "vanilla, fused", "reversible, hashed"], list(kinds))
for axes, names in zip(both, panels):
    figures.curves(
        axes, lengths, {name: by_length[name] for name in names}, marker="o",
        xlabel="length (tokens)", ylabel="kept for backward (MiB)" if axes is both[0] else "",
    )
    axes.set(xscale="log", yscale="log", ylim=(0.3, 20_000))
    axes.set_xticks(lengths, labels=[f"{T:,}" for T in lengths])
    axes.minorticks_off()
for (label, values), style in zip(formula.items(), (":", "--")):
    both[0].plot(lengths, values, color="black", linestyle=style, label=f"Table 3, {label}")
both[1].lines[2].set(linewidth=6, markersize=9)  # under the next one
for axes, title in zip(both, ("Four layers", "Reversible or kept, exact or hashed")):
    axes.set_title(title)
    axes.legend()
figures.show(
    figure,
    "MiB against length, both logarithmic. First: stored weights rise with the square of the length, as the formula "
    "for the transformer; fused attention and the reversible model rise in proportion to it, the latter lowest, below "
    "its formula. Second: two streams that are kept lie far above reversible layers; exact or hashed, those agree.",
)

# %%
for label, values in by_length.items():
    print(f"{label:25}", "  ".join(f"{T:,}: {value:.1f}" for T, value in zip(lengths, values)))
assert by_length["vanilla, weights stored"][-1] > 3 * by_length["vanilla, weights stored"][-2]
assert by_length["vanilla, fused"][-1] > 5 * by_length["reversible, hashed"][-1]
assert all(k < f for k, f in zip(by_length["reversible, hashed"], formula["Reformer"]))

# %% [markdown]
# The formula for the transformer counts the largest tensor of each layer, times the layers; that
# for the Reformer the largest tensor of one layer. The measurement counts everything that is kept.
# The Reformer's largest tensor is its scores, $l\,n_r\,c$ for each head. They exist here only for
# a moment and a few chunks at a time, and none is kept. So its line lies above what is kept.
#
# And again, what is kept falls by reversibility alone. Two streams that are kept and hashed grow
# in proportion to the length, as the vanilla model does; with exact attention they grow faster,
# because of the masks.
#
# So what is kept is one side of the account. The other is the **peak**: the most that is held at
# any moment of a training step.

# %%
def peak(model, tokens):
    """MiB at the peak of a forward and a backward pass."""
    run = lambda: F.cross_entropy(model(tokens)[0].flatten(0, 1), tokens.flatten()).backward()
    model.zero_grad()
    return measure.peak_bytes(run, device) / MiB


T, DEEP = 2048, 8
vanilla = VanillaTransformer(**WIDE | dict(n_layers=DEEP), max_len=T).to(device)
peaks = {
    "vanilla": peak(vanilla, text_of(T)),
    "two streams,\nkept": peak(reformer_of(T, DEEP, reversible=False), text_of(T)),
    "reversible": peak(reformer_of(T, DEEP), text_of(T)),
    "parameters\nand gradients": 2 * sum(p.nbytes for p in vanilla.parameters()) / MiB,
}

# %%
figure, axes = plt.subplots()
figures.bars(axes, peaks, ylabel="MiB at the peak", number="{:.0f}")
axes.set_title(f"A training step, eight layers, a window of {T:,} tokens")
figures.show(
    figure,
    "Bars of the peak memory of a training step: two streams that are kept are highest, the vanilla model next, and "
    "the reversible model much lower. The parameters and gradients of the model are shown for comparison.",
)

# %%
assert peaks["reversible"] < 0.75 * min(peaks["vanilla"], peaks["two streams,\nkept"])

# %% [markdown]
# The reversible model is far below the others, though not as far as in what it keeps. What sets
# its peak is one layer at work, most of all the backward pass of attention. The feed-forward block
# would come next, with its hidden layer of four times the width, if it were not for the pieces.
# Look at it alone, there and back:

# %%
def block_peak(piece_len, T=4096):
    """MiB at the peak of a feed-forward block, forward and then undone, in pieces."""
    block, x = FeedForward(128, 512, piece_len).to(device), torch.randn(1, T, 128, device=device)

    def there_and_back():
        with torch.no_grad():
            y, _ = couple(block, x, x)
            uncouple(block, x, y, x, y, None, dict(enabled=False))

    return measure.peak_bytes(there_and_back, device) / MiB


pieces = {f"{n:,}": block_peak(n) for n in (4096, 1024, 256, 64)}

# %%
figure, axes = plt.subplots()
figures.bars(axes, pieces, ylabel="MiB at the peak", number="{:.0f}")
axes.set(title="Feed-forward, 4,096 tokens in pieces", xlabel="tokens in a piece")
figures.show(
    figure,
    "Bars of the peak memory of a feed-forward block at 4,096 tokens, in pieces of 4,096, 1,024, 256 and 64 tokens: "
    "falling steeply at first, and levelling off.",
)

# %%
assert pieces["256"] < 0.5 * pieces["4,096"]

# %% [markdown]
# What does it cost in time? The same model with and without rebuilding:

# %%
there, back = (
    step_time(reformer_of(1024, reversible=r), text_of(1024), rounds=5) for r in (False, True)
)
print(f"a reversible step takes {back / there:.2f} times as long")
assert back / there < 3

# %% [markdown]
# ### Where it looks
#
# `look` gives the weights of every layer, in the order of the text.

# %%
T = 128
for n, weights in enumerate(look(reformer, text_of(T))):  # (B, H, T, T)
    rows = weights.sum(dim=-1)  # (B, H, T)
    print(f"layer {n + 1}: weights {tuple(weights.shape)}, rows sum to {rows.min():.3f} ... {rows.max():.3f}")

# %% [markdown]
# Two questions to the trained model. Does hashing find the keys that exact attention would have
# chosen? And does it look as far? For both you need exact and hashed weights of the same queries.
#
# First, attention mass by bucket. Hash the queries of some windows, compute *exact* attention, and
# add up its weights by the bucket of the query and the bucket of the key. What lies on the
# diagonal, one round can find. The rest it misses.

# %%
@torch.no_grad()
def both_attentions(model, tokens):
    """For each layer: exact weights and hashed weights (B, H, T, T), and buckets (R, B, H, T)."""
    found, inputs = [], []
    hooks = [a.register_forward_pre_hook(lambda m, args: inputs.append(args[0])) for a in model.blocks[::2]]
    model(tokens)
    for hook in hooks:
        hook.remove()
    for attention, x in zip(model.blocks[::2], inputs):
        q, k, _ = attention.heads(x)
        buckets, c = attention.hash(q), attention.settings.chunk_len
        found.append((attention_weights(q, k, None, c), attention_weights(q, k, buckets, c), buckets))
    return found


found = both_attentions(reformer, text_of(T, B=8))
n_buckets = 2 * T // reformer.settings.chunk_len

by_bucket, chance = [], []
for exact, _, buckets in found:
    h = F.one_hot(buckets[0].long(), n_buckets).float()  # (B, H, T, n_buckets)
    mass = (h.mT @ exact @ h).sum(dim=(0, 1))  # (n_buckets, n_buckets)
    blind = (h.mT @ torch.ones_like(exact).tril(-1) @ h).sum(dim=(0, 1))
    by_bucket.append((mass / mass.sum()).cpu())
    chance.append((blind.trace() / blind.sum()).item())

# %%
figure, axes = plt.subplots(1, 3, figsize=(7.6, 3.2), sharey=True)
shares = [mass / mass.sum(dim=1, keepdim=True) for mass in by_bucket]
for n, (ax, share) in enumerate(zip(axes, shares)):
    image = figures.matrix(
        ax, share, title=f"layer {n + 1}", cmap="Blues", vmin=0, vmax=torch.stack(shares).max().item(),
        xlabel="bucket of the key", ylabel="bucket of the query" if n == 0 else "",
    )
    ax.set(xticks=range(0, n_buckets, 5), yticks=range(0, n_buckets, 5))
figure.colorbar(image, ax=axes, label="share of the query's attention")
figure.suptitle(f"Exact attention by bucket ({corpus.name})", fontsize=11)
figures.show(
    figure,
    "For each of three layers, the attention of exact attention by bucket of the query and bucket of the key, "
    "rows summing to one. The diagonal stands out, but much lies off it, thinly spread.",
)

# %%
for n, mass in enumerate(by_bucket):
    inside = f"{mass.trace():.0%} of exact attention, {chance[n]:.0%} of the earlier keys"
    print(f"layer {n + 1}: inside the query's own bucket lie {inside} ({mass.trace() / chance[n]:.1f} times as much)")
assert all(1.5 * share < mass.trace() < 0.5 for mass, share in zip(by_bucket, chance))

# %% [markdown]
# One round can find about a third of the attention, with few of the keys: two to four times what a
# blind choice of as many keys would find, but less than half. That is why rounds are added up.
#
# Second, attention by distance, hashed beside exact.

# %%
edges = [0, 1, 2, 4, 8, 16, 32, 64, 128]
distance = torch.arange(T)[:, None] - torch.arange(T)  # (T, T)


def by_distance(weights):
    """Share of attention in each bucket of distances, over the second half of the window."""
    mean, d = weights.mean(dim=(0, 1)).cpu()[T // 2 :], distance[T // 2 :]  # (T / 2, T)
    shares = [mean[(d >= a) & (d < b)].sum() / len(d) for a, b in zip(edges, edges[1:])]
    return torch.stack(shares)


exact, hashed = (sum(by_distance(layer[n]) for layer in found) / len(found) for n in (0, 1))

# %%
figure, axes = plt.subplots()
figures.buckets(
    axes, edges, {"exact": exact, "hashed, 2 rounds": hashed},
    xlabel="distance of the key (characters)", ylabel="share of attention",
)
axes.set_title(f"Mean of three layers ({corpus.name})")
figures.show(
    figure,
    "Share of attention by distance of the key, in buckets that double in width, for exact and hashed attention "
    "of the same trained model: the two profiles are alike.",
)

# %%
difference = (exact - hashed).abs().sum().item() / 2
print(f"the two profiles differ in {difference:.0%} of the mass")
print(f"keys at a distance of {edges[-2]} or more get {exact[-1]:.0%} of exact attention, {hashed[-1]:.0%} of hashed")
assert difference < 0.3 and abs(hashed.sum() - 1) < 1e-3

# %% [markdown]
# So hashed attention looks nearly as far. The farthest keys get a little less than in exact
# attention, the near ones a little more.
#
# ### What a hash gives away
#
# A language model must not know the future. The mask sees to it that no query looks at a later key.
# Is that enough? Change one token of a window and see whether earlier logits change. In exact
# attention none does. With hashing the changed token may fall into another bucket; then it stands
# elsewhere in the sorted row, everything between moves by one place, and some chunks begin at
# another token. So a query may lose or gain a key from *its own past*, because of something in its
# future.

# %%
@torch.no_grad()
def change(model, tokens, position):
    """Largest change of the logits before `position`, when the token there becomes another one."""
    other = tokens.clone()
    other[:, position] = (other[:, position] + 1) % len(corpus.vocab)
    before, after = model(tokens)[0][:, :position], model(other)[0][:, :position]
    return (after - before).abs().amax(dim=-1)  # (B, position)


model = reformer.double().eval()
tokens = text_of(T, B=8)
leaks = {}
for n in (1, 2, 4, 8, 0):
    model.settings.n_rounds = n
    leaks[called(n)] = torch.cat([change(model, tokens, p).flatten() for p in (50, 90, 125)])
for label, leak in leaks.items():
    print(f"{label:9} {(leak > 1e-9).double().mean():6.1%} of the earlier logits move, by {leak.mean():.4f} on average")
assert leaks["exact"].max() < 1e-9 < leaks["2 rounds"].max() and leaks["2 rounds"].mean() < 0.02

# %% [markdown]
# So hashed attention is not strictly causal: *which* past keys a query sees depends a little on the
# whole window, future included. No later value or key flows into an earlier output, and for fixed
# buckets nothing changes at all:

# %%
model.settings.n_rounds = 2
for attention in model.blocks[::2]:  # buckets (R, B, H, T) that do not depend on the text
    attention.hash = lambda q, seed: (7 * torch.arange(T, device=q.device) % 16).expand(2, *q.shape[:3])
strict = torch.cat([change(model, tokens, p).flatten() for p in (50, 90, 125)])
for attention in model.blocks[::2]:
    del attention.hash
reformer = model.float()
print(f"buckets by position alone: largest change {strict.max():.0e}")
assert strict.max() < 1e-9

# %% [markdown]
# This is a property of the algorithm, in the paper and in every implementation that hashes the
# whole window. For the same reason generation, which has no future to hash, may see slightly other
# sets than training did. More rounds do not stop it: there are more sets that may change, though
# each has less to say.
#
# ## 4.7 Departures from the paper
#
# | here | the paper | why |
# | --- | --- | --- |
# | rounds are added up as sums and weighted sums | as log-sum-exps | the same numbers; for tokens that can only look at themselves, at $-10^5$, it is more exact |
# | above 32 buckets, two small hashes are put together | one hash | the authors' code does so: one hash with many directions is expensive |
# | windows of up to two chunks get exact attention | always hashed | costs no more, and finds more |
# | rotations differ by step in training, and are fixed in evaluation | random | evaluation can be repeated |
# | no dropout on attention weights | some | the scores are never held whole; dropout is on the outputs of the blocks |
# | buckets are kept for the backward pass | not said | a rebuilt vector may fall into another bucket |
# | short windows, small models, minutes | 64K tokens, 12 to 20 layers, days on accelerators | what a notebook can do |
#
# ## 4.8 What became of it
#
# - **Hashed attention** was soon followed by simpler ways to make attention sparse or cheap: fixed
# patterns with windows and a few global tokens (Longformer, BigBird), clusters in place of hashes
# (Routing Transformer), linear attention (Performer). Then FlashAttention made *exact* attention
# fast and small in memory, and for most lengths took away the reason to approximate it. The thought
# that a query needs only a few keys, found by a cheap search, has come back with windows of a
# million tokens: in retrieval from the key-value cache, and in sparse attention that learns to
# select its keys.
# - **Reversible layers** are used where depth or width would not fit otherwise. More common is
# checkpointing, which keeps the inputs of some layers and recomputes the rest: it needs no second
# stream.
# - **Chunked feed-forward** and **chunked losses** are everyday tools for long windows. **Axial
# positions** have given way to rotary ones, which need no table.
#
# ## 4.9 Exercises
#
# 1. *(15 minutes)* Write `my_sets(buckets, c)` that returns, for one head and one round, `buckets`
# being a list of T numbers, the list of sets $\mathcal P_i$ as sorted lists, without sorting by
# code: from the words of section 4.3. Check it with `check_sets`.
# 2. *(10 minutes)* Set `reformer.settings.duplicates = False` and evaluate with 1, 2, 4 and 8
# rounds. What do you expect at 1 round?
# 3. *(15 minutes)* Break the buckets: let `LSHAttention.forward` ignore the ones that it is given.
# How wrong do the gradients of the check in section 4.4 become, and why so much in training mode?
# 4. *(20 minutes)* Print how far the rebuilt embedding is from the true one in float32, for 2, 6,
# 12 and 24 layers.
# 5. *(30 minutes)* Make hashed attention strictly causal. One way: hash in blocks, so that a query
# only ever looks at tokens sorted together with its own past. What does it cost?

# %%
def check_sets(my_sets):
    """Exercise 1: compares with the codes of sort_buckets."""
    for seed in range(20):
        T, c = 5 + seed, 1 + seed % 6
        buckets = torch.randint(4, (T,), generator=torch.Generator().manual_seed(seed))
        code = sort_buckets(buckets.view(1, 1, 1, T), c)[1][0].tolist()
        right = [[j for j in range(i + 1) if 0 <= code[i] - code[j] <= 1] for i in range(T)]
        mine = [sorted(s) for s in my_sets(buckets.tolist(), c)]
        assert mine == right, f"T = {T}, c = {c}: {mine}, should be {right}"
    print("right")

# %% [markdown]
# <details><summary>A solution of exercise 1</summary>
#
# ```python
# def my_sets(buckets, c):
#     order = sorted(range(len(buckets)), key=lambda i: (buckets[i], i))
#     chunk = {i: place // c for place, i in enumerate(order)}
#     near = lambda i, j: chunk[i] - chunk[j] in (0, 1) and buckets[i] == buckets[j]
#     return [[j for j in range(i + 1) if near(i, j)] for i in range(len(buckets))]
# ```
#
# </details>
#
# ## References
#
# - N. Kitaev, Ł. Kaiser, A. Levskaya: [Reformer: The Efficient
# Transformer](https://arxiv.org/abs/2001.04451). ICLR 2020.
# - A. N. Gomez, M. Ren, R. Urtasun, R. B. Grosse: [The Reversible Residual
# Network](https://arxiv.org/abs/1707.04585). NeurIPS 2017.
# - A. Andoni, P. Indyk, T. Laarhoven, I. Razenshteyn, L. Schmidt: [Practical and Optimal LSH for
# Angular Distance](https://arxiv.org/abs/1509.02897). NeurIPS 2015.
# - T. Dao, D. Y. Fu, S. Ermon, A. Rudra, C. Ré: [FlashAttention](https://arxiv.org/abs/2205.14135).
# NeurIPS 2022.

# %%
minutes = (time.perf_counter() - started) / 60
peak_memory = measure.process_peak_bytes() / 2**30
print(f"this run: {minutes:.1f} minutes, peak memory {peak_memory:.2f} GiB, text: {corpus.name}")
