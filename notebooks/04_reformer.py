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
# No links to Colab and Kaggle here: the project has no public address yet.
# To run this notebook, type `make lab` in your copy of the project.

# %% [markdown]
# The other chapters give a transformer a memory beyond its window. **Reformer** ([Kitaev, Kaiser and Levskaya,
# 2020](https://arxiv.org/abs/2001.04451)) goes the other way: it makes the window itself long. Two things stand in the way. Attention compares
# every token with every other, and training keeps every activation of every layer. Reformer has an answer to each: attention among *likely* keys
# only, found by hashing, and layers that can be *run backwards*, so that almost nothing has to be kept.
#
# **When you have read it, you can**
# - say what attention and training cost in memory and time, and measure it;
# - find near vectors by hashing, and turn that into attention over the keys that were found;
# - write a residual layer that is undone in the backward pass, with dropout and all;
# - say where hashing beats exact attention today, where it does not, and what it gives away about the future.
#
# **You need** PyTorch, and attention with queries, keys and values. The chapter stands by itself, but for *nats* and the *bands* of recorded seeds:
# chapter 0 explains both.
#
# **Time and memory.** At most 6 minutes and 2 GiB on two CPU cores. The last cell prints what it took on your machine.

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
from dataclasses import dataclass

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import memtx_minimal
from memtx_minimal import (
    bands, corpora, exercises, figures, inputs, measure, tasks, training,
)  # fmt: skip
from memtx_minimal.vanilla_transformer import VanillaTransformer

figures.use_style()
started, device = time.perf_counter(), training.best_device()
SEED, corpus = 0, corpora.tiny_shakespeare()
print(f"PyTorch {torch.__version__} on {device}, {corpus.name}")

# %% [markdown]
# The letters for shapes, as in the other chapters, and four more:
#
# | letter | meaning | letter | meaning |
# | --- | --- | --- | --- |
# | `B` | batch: texts side by side | `d_head` | width of a head, `d_model / H` |
# | `T` | tokens in the segment: the whole window | `P` | hash rounds (passes) |
# | `H` | attention heads | `b` | buckets of one hash |
# | `d_model` | width of a hidden state | `w` | tokens in a chunk |
# | `L` | layers | `G` | chunks, `T / w` |
#
# One example goes with us through the chapter: the twelve tokens of `abracadabra!`, each with a vector. Colours are hash buckets: similar vectors
# mostly get the same colour. Sort the tokens by colour, cut the sorted row into chunks of equal length, and let each token attend to those of its
# colour in its own chunk and in the one before. Then put the results back in the order of the text.

# %% jupyter={"source_hidden": true} tags=["hide-input"]
TEXT, w = "abracadabra!", 4
COLOURS = [figures.BLUE, figures.ORANGE, figures.GREEN, figures.PINK]
COLOURS += ["#56B4E9", "#E69F00"]
buckets = [4, 4, 3, 4, 3, 0, 1, 4, 4, 3, 4, 0]  # section 4.2 computes them
text, by_bucket = range(12), sorted(range(12), key=lambda i: (buckets[i], i))
coloured = [COLOURS[n] for n in buckets]
rows = [
    ("the text", text, ["#999999"] * 12, None),
    ("1. hash: a colour for each token", text, coloured, None),
    ("2. sort by colour", by_bucket, coloured, None),
    ("3. cut, and look at two chunks", by_bucket, coloured, w),
    ("4. put the results back", text, coloured, None),
]
alt = (
    "Sorted by the colour of their bucket and cut into three chunks of four, each of "
    "which also looks at the chunk before, tokens of one colour meet even where a cut "
    "has parted them; then the order of the text is restored."
)
figures.show_animation([figures.rows(TEXT, [row]) for row in rows], alt, seconds=1.6)

# %% jupyter={"source_hidden": true} tags=["hide-input"]
figures.show(figures.rows(TEXT, rows), alt)

# %% [markdown]
# ## 4.1 The problem: memory and time
#
# Take the baseline of this course at three lengths, and ask autograd what it keeps between the forward and the backward pass:
# `measure.bytes_for_backward` counts every tensor that is saved. PyTorch's fused attention does not store its $T \times T$ weights; in 2020, when
# the paper was written, attention did. So count both ways. (The recorder of this course opens fused attention up to see the weights, and then
# autograd keeps them.)

# %%
MiB = 2**20
WIDE = dict(vocab_size=len(corpus.vocab), d_model=128, n_heads=4, n_layers=4, d_ff=512)


def text_of(T, B=1):
    """The start of the validation text as B windows of T tokens, on the device."""
    return corpus.valid[: B * T].clone().view(B, T).to(device)


def loss_of(model, tokens):
    logits, _ = model(tokens)  # the targets do not matter here, only bytes and seconds
    return F.cross_entropy(logits.flatten(0, 1), tokens.flatten())


def kept(model, tokens):
    """MiB that autograd keeps for the backward pass of a training step."""
    return measure.bytes_for_backward(model, lambda: loss_of(model, tokens)) / MiB


def step_time(model, tokens):
    """Seconds for a forward and a backward pass, after one that does not count."""
    step = lambda: loss_of(model, tokens).backward()
    return measure.seconds(step, warmup=1, rounds=3, device=device)


def vanilla_of(T, n_layers=4):
    return VanillaTransformer(**WIDE | dict(n_layers=n_layers, max_len=T)).to(device)

# %%
lengths, fused, stored, times = [512, 1024, 2048], [], [], []
for n in lengths:
    vanilla, tokens = vanilla_of(n), text_of(n)
    fused.append(kept(vanilla, tokens))
    with measure.record_attention(vanilla):
        stored.append(kept(vanilla, tokens))
    times.append(1e6 * step_time(vanilla, tokens) / n)
weights = sum(p.nbytes for p in vanilla.parameters()) / MiB
rows = {"kept (MiB)": fused, "kept, weights stored (MiB)": stored}
rows["microseconds a token"] = times
figures.table(
    f"A vanilla transformer of {weights:.1f} MiB, by the length of its window",
    ["", *(f"{n:,}" for n in lengths)],
    [[name, *(f"{x:.0f}" for x in row)] for name, row in rows.items()],
)
assert fused[1] > 5 * weights and 1.8 < fused[2] / fused[1] < 2.2
assert stored[2] > 3 * stored[1]

# %% [markdown]
# One window keeps many times the size of the model. That grows in proportion to the length, and stored weights grow with its square. The time a
# token takes (with fused attention) grows too, at first little, then more: attention compares each token with all earlier ones. If each looked at a
# fixed number of others, the last row would stay the same.
#
# ## 4.2 Hashing finds the likely keys
#
# The output of attention for query $q_i$ is a mean of the values, weighted by $\exp(q_i \cdot k_j)$. The exponential favours the keys that point in
# the direction of the query. If those few could be found without comparing with all, the rest could be left out.
#
# **Locality-sensitive hashing** (this kind: [Andoni et al., 2015](https://arxiv.org/abs/1509.02897)) finds them. Draw a random matrix $D$ of shape
# $[d_{\text{head}}, b/2]$ and give a vector $x$ the bucket
#
# $$
# h(x) = \arg\max \left( [xD \,;\, -xD] \right) ,
# $$
#
# where $[u\,;\,v]$ joins two vectors end to end. The columns of $D$ are $b/2$ random directions. $xD$ says how far $x$ goes in each, $-xD$ how far
# in the opposite ones, and $h(x)$ is the direction in which it goes farthest. Two vectors that point nearly the same way have nearly the same
# products, so they mostly agree on which is the largest. The length of $x$ does not matter.
#
# **Shared QK.** That a query and a key share a bucket means something only if they live in the same space. Reformer makes them the same vector, but
# for its length: $k_j = q_j / \lVert q_j \rVert$. There is no key projection.
#
# For our example we choose the vectors by hand: two dimensions, one direction for each letter, and a little noise.

# %%
angle = dict(a=20, b=80, r=140, c=200, d=260) | {"!": 320}  # degrees
noise = 8 * torch.randn(12, generator=torch.Generator().manual_seed(SEED))
degrees = torch.tensor([float(angle[letter]) for letter in TEXT]) + noise
radians = degrees * math.pi / 180
q = 3 * torch.stack([radians.cos(), radians.sin()], dim=-1)[None, None]
k = F.normalize(q, dim=-1)  # both (B, H, T, d_head) = (1, 1, 12, 2)

# %% [markdown]
# The function below hashes the vectors of all texts and heads, in several independent **rounds**: each round and each head has a matrix of its own
# (which the paper calls $R$). With many buckets, one product for each direction would be dear, so above 32 buckets two small hashes are put
# together, $h = h_1 + b_1 h_2$ with $b_1 b_2 \approx b$. The numbers come from a seed, direction by direction, so that, up to 32 buckets, a text
# that grows and gets more of them keeps the directions that it had.

# %% tags=["from-module"]
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

# %%
buckets = hash_vectors(q, n_buckets=6, n_rounds=2, seed=SEED)  # (P, B, H, T)
print("text   ", *TEXT)
for r in range(2):
    print(f"round {r + 1}", *buckets[r, 0, 0].tolist())
assert buckets[0, 0, 0].tolist() == [4, 4, 3, 4, 3, 0, 1, 4, 4, 3, 4, 0]  # as drawn

# %% jupyter={"source_hidden": true} tags=["hide-input"]
angles = torch.linspace(0, 2 * math.pi, 721)
circle = torch.stack([angles.cos(), angles.sin()], dim=-1)[None, None]  # (1, 1, 721, 2)
regions = hash_vectors(circle, n_buckets=6, n_rounds=2, seed=SEED)[:, 0, 0]
generator = torch.Generator().manual_seed(SEED)  # as in hash_vectors
half = torch.randn(3, 2, 2, generator=generator)  # (b / 2, P, d_head)
figure, both = plt.subplots(1, 2, figsize=(6.8, 3.8))
for r, axes in enumerate(both):
    axes.scatter(*circle[0, 0].T, c=[COLOURS[n] for n in regions[r].tolist()], s=9)
    tips = 0.9 * F.normalize(torch.cat([half[:, r], -half[:, r]]), dim=-1).T
    look = dict(angles="xy", scale_units="xy", scale=1, width=0.008)
    axes.quiver([0] * 6, [0] * 6, *tips, color=COLOURS, **look)
    for i, letter in enumerate(TEXT):
        at = (1.16 + 0.17 * (i % 3)) * k[0, 0, i]
        axes.text(*at, letter, ha="center", va="center", fontsize=13)
    axes.set(xlim=(-1.6, 1.6), ylim=(-1.6, 1.6), aspect="equal", title=f"round {r + 1}")
    axes.axis("off")
figures.show(
    figure,
    "In round 1 a border runs through the letters a: one a falls into another bucket, "
    "and b, a letter away, joins the others. In round 2 all five a are together, with "
    "!. Two of the six directions have no arc of the circle.",
)

# %% [markdown]
# An arrow is a direction; an arc has the colour of the direction whose product is largest there. (Arrows are drawn at equal length; two of the six
# directions have no arc, since longer ones win everywhere.) Each round makes its mistakes. Round 1 parts one `a` from the others and joins `b` to
# them instead; round 2 has all the `a` together, and `!` with them. So several rounds help: two vectors meet if *any* round puts them together. How
# often, by angle? Here in 24 dimensions with 16 buckets, as in the model of section 4.7.

# %%
g = torch.Generator().manual_seed(SEED)
x, other = F.normalize(torch.randn(2, 400, 24, generator=g), dim=-1)
other = F.normalize(other - (other * x).sum(-1, keepdim=True) * x, dim=-1)
angles = torch.arange(0, 181, 10)  # between x and each of the y; other is at 90
y = [math.cos(a) * x + math.sin(a) * other for a in angles * math.pi / 180]
h = hash_vectors(torch.stack([x, *y])[:, None], 16, n_rounds=20, seed=SEED)[:, :, 0]
p = (h[:, 1:] == h[:, :1]).float().mean(dim=(0, 2))  # how often in one bucket

# %% jupyter={"source_hidden": true} tags=["hide-input"]
figure, axes = plt.subplots()
meet = {f"{n} round{'s' * (n > 1)}": 1 - (1 - p) ** n for n in (1, 2, 4, 8)}
figures.curves(axes, angles, meet, xlabel="angle (degrees)", ylabel="chance to meet")
axes.set_title("24 dimensions, 16 buckets")
figures.show(
    figure,
    "The chance that two vectors meet falls with the angle between them and rises with "
    "the number of rounds.",
)

# %% [markdown]
# More rounds find more of the near vectors, and of the others too: unrelated vectors, at right angles, seldom meet in one round, and fewer than
# half of them in eight.
#
# ## 4.3 Who may look at whom: two comparisons
#
# Let $\mathcal P_i$ be the set of keys that query $i$ may look at. In causal attention it is all $j \le i$. With hashing it would be those in its
# bucket: $\{j \le i : h(q_j) = h(q_i)\}$. The output is a softmax over the set,
#
# $$
# o_i = \sum_{j \in \mathcal P_i} \exp\left( q_i \cdot k_j - z(i, \mathcal P_i) \right) v_j ,
# \qquad z(i, \mathcal P_i) = \log \sum_{j \in \mathcal P_i} \exp (q_i \cdot k_j) .
# $$
#
# (There is no division by $\sqrt{d_{\text{head}}}$: keys have length one, and the network sets the scale by the length of its queries.)
#
# Buckets are of uneven size, and hardware likes even ones. So sort the tokens by bucket and, within a bucket, by position; then cut the row into
# chunks of $w$. With $b = 2T/w$ buckets, a chunk holds two average buckets. A bucket may be cut, so each chunk also sees the chunk before it; what
# lies farther back is lost in this round. In our example $T = 12$, $b = 6$, $w = 4$.

# %%
order = buckets.argsort(dim=-1, stable=True)  # (P, B, H, T): which token comes n-th
place = order.argsort(dim=-1)  # the inverse: at which place each token comes
chunk = place // w
print("sorted", *[TEXT[i] for i in order[0, 0, 0]])
print("bucket", *buckets[0, 0, 0][order[0, 0, 0]].tolist())
print("chunk ", *chunk[0, 0, 0][order[0, 0, 0]].tolist())

# %% [markdown]
# So a key is in the set if two comparisons hold: same bucket, and the same chunk or the one before.

# %% tags=["from-module"]
def in_set(bucket, chunk, key_bucket, key_chunk, same_bucket=True):
    """Whether queries may look at keys, the future aside: two comparisons."""
    near = (key_chunk == chunk) | (key_chunk == chunk - 1)
    return near & (key_bucket == bucket) if same_bucket else near

# %%
queries = buckets[..., None], chunk[..., None]  # (P, B, H, T, 1)
keys = buckets[..., None, :], chunk[..., None, :]  # (P, B, H, 1, T)
found = in_set(*queries, *keys)  # (P, B, H, T, T)
past = torch.ones(12, 12, dtype=torch.bool).tril()
seen = (found[0, 0, 0] & past)[10].nonzero().flatten()
print("the last a may look at:", *[f"{TEXT[j]}{j}" for j in seen])

# %% jupyter={"source_hidden": true} tags=["hide-input"]
near = in_set(*queries, *keys, same_bucket=False)[0, 0, 0]
steps = {"its chunk, and the\none before": near}
steps["... and the\nsame bucket"] = found[0, 0, 0]
steps["... and not\nthe future"] = found[0, 0, 0] & past
rows = {"": torch.arange(12), ", sorted": order[0, 0, 0]}
figure, axes = plt.subplots(3, 2, figsize=(5.4, 8.4))
for column, (which, at) in zip(axes.T, rows.items()):
    letters = [TEXT[i] for i in at]
    for ax, (title, mask) in zip(column, steps.items()):
        look = dict(cmap="Blues", vmax=1.5, xlabel="key" + which)
        title, look["ylabel"] = "" if which else title, "query" + which
        figures.matrix(ax, mask[at][:, at], title=title, **look)
        ax.set_xticks(range(12), labels=letters)
        ax.set_yticks(range(12), labels=letters)
figures.show(
    figure,
    "Allowed pairs are scattered in the order of the text; in sorted order they are "
    "blocks along the diagonal, two chunks wide at first, then squares of one bucket, "
    "then their lower triangles.",
)

# %% [markdown]
# Blue pairs are allowed. In the order of the text (left) they are scattered; sorted (right) they lie along the diagonal, and that is what makes
# them cheap. Note the last row: when tokens of a bucket are sorted by position, "not the future" is a triangle.
#
# One more rule. A query is always nearest to its own key, and would look at little else. So $-10^5$ is added to the score of $i = j$: a token looks
# at itself only if nothing else is there.
#
# With several rounds, the set of a query is the **union** of its sets in all rounds. Here is the whole definition: all scores, what is hidden, one
# softmax. One small object, shared by all layers of a model, says how keys are found. Its last two switches imitate other code (section 4.5).

# %% tags=["from-module"]
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

# %% tags=["band"]
SELF = -1e5  # added to the score of a token with itself: the last resort

# %% tags=["from-module"]
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

# %% [markdown]
# `N_ij` is the number of rounds that find $j$ for $i$. Where it is 0, the key is hidden; otherwise it is there, once. (With `count_once=False` a
# key that two rounds find counts as two equal keys.)

# %%
settings = Settings(chunk_len=w)
one = attention_weights(q, k, buckets[:1], settings)[0, 0]  # (T, T)
two = attention_weights(q, k, buckets, settings)[0, 0]
exact = attention_weights(q, k, None, settings)[0, 0]
for name, weights in [("round 1 alone", one), ("two rounds", two), ("exact", exact)]:
    row = enumerate(weights[10].tolist())
    row = [f"{TEXT[j]}{j} {p:.2f}" for j, p in row if p > 0.005]
    print(f"{name:13}: the last a looks at", ", ".join(row))

# %% [markdown]
# Round 2 adds `a5`, and together they come close to exact attention here. (`a10` itself, the last resort, has no weight.)
#
# ## 4.4 One round, chunk by chunk
#
# The definition computes $T \times T$ scores and hides most of them. To compute only the blocks on the diagonal, the tokens must really be sorted.
# Two small functions do it. The first puts the tokens of each head in another order, the second joins each chunk to the one before it.

# %% tags=["from-module"]
def rearrange(x, order):
    """The tokens of each head in another order: x (B, H, T, ...), order (B, H, T)."""
    B, H, T = order.shape
    head = torch.arange(B * H, device=x.device).view(B, H, 1)
    return x.flatten(0, 2).index_select(0, (order + T * head).flatten()).view(x.shape)

# %% tags=["from-module"]
def look_back(x, nothing=0):
    """Each chunk after the one before it: (B, H, G, w, ...) -> (B, H, G, 2w, ...)."""
    before_first = torch.full_like(x[:, :, :1], nothing)
    return torch.cat([torch.cat([before_first, x[:, :, :-1]], dim=2), x], dim=3)

# %%
letters = torch.arange(12).view(1, 1, 12)  # (B, H, T)
chunks = rearrange(letters, order[0]).unflatten(2, (-1, w))  # (B, H, G, w)
print("chunks    ", ["".join(TEXT[i] for i in chunk) for chunk in chunks[0, 0]])
wider = look_back(chunks, nothing=-1)[0, 0]  # (G, 2w)
print("looks back", ["".join((TEXT + "-")[i] for i in chunk) for chunk in wider])

# %% [markdown]
# Before the first chunk lies nothing. Now a round is: sort, cut, score, mask, softmax, and back to the order of the text. Here it is for our
# example, line by line:

# %%
v = torch.randn(1, 1, 12, 3, generator=torch.Generator().manual_seed(SEED))


def round_by_hand(q, k, v, bucket, order, w):
    """One round of hashed attention: everything (1, 1, T, ...)."""
    cut = lambda x: rearrange(x, order).unflatten(2, (-1, w))  # (B, H, G, w, ...)
    scores = cut(q) @ look_back(cut(k)).mT  # (B, H, G, w, 2w)
    same = cut(bucket)[..., None] == look_back(cut(bucket), nothing=-1)[..., None, :]
    position = order.unflatten(2, (-1, w))
    i, j = position[..., None], look_back(position, nothing=12)[..., None, :]
    scores = (scores + SELF * (i == j)).masked_fill(~same | (j > i), -math.inf)
    o = scores.softmax(dim=-1) @ look_back(cut(v))  # (B, H, G, w, d_head)
    return rearrange(o.flatten(2, 3), order.argsort(dim=-1))


by_hand = round_by_hand(q, k, v, buckets[0].int(), order[0], w)  # a byte holds no -1
print(f"largest difference from the definition: {(by_hand - one @ v).abs().max():.0e}")
assert torch.allclose(by_hand, one @ v, atol=1e-6)

# %% [markdown]
# Only $T \cdot 2w$ scores were computed. In a long text that is a small part.
#
# ## 4.5 Several rounds, each key once
#
# Every round is a softmax of its own, over its own set $\mathcal P_i^{(r)}$: with it, the formulas of section 4.3 give the output $o_i^{(r)}$ and
# the normaliser $\exp z_i^{(r)}$ of round $r$. How do they become one softmax over the union?
#
# If the rounds found *different* keys, undo the division by each normaliser, add up, and divide by the sum of the normalisers (equations 13 to 15):
#
# $$
# o_i = \sum_{r} \exp\left( z_i^{(r)} - z_i \right) o_i^{(r)} , \qquad z_i = \log \sum_r \exp z_i^{(r)} :
# $$
#
# **the outputs of the rounds, weighted by a softmax of their logsumexps.** A round that found little gets little weight.
#
# And keys that several rounds find? They would count several times. If $N_{i,j}$ rounds find $j$ for $i$, let each give it a share of $1 /
# N_{i,j}$, that is, $-\log N_{i,j}$ in the score. That completes equation 16, what is added to $q_i \cdot k_j$ in round $r$:
#
# $$
# m_{i,j}^{(r)} = \begin{cases}
# -\infty & \text{if } j \notin \mathcal P_i^{(r)} , \\
# -10^5 & \text{if } i = j , \\
# -\log N_{i,j} & \text{otherwise.}
# \end{cases}
# $$
#
# (The own key needs no share: it counts only where it is alone.) The first line holds for another bucket, for a chunk that is neither the query's
# nor the one before it, and for the future. The next function builds all three. To know $N_{i,j}$ it looks up, for each pair of the sorted chunks,
# what the *other* rounds say about it.

# %% tags=["from-module"]
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

# %% [markdown]
# (What `look_back` puts before the first chunk counts as the future.) Now a round is what you wrote by hand, and its logsumexp:

# %% tags=["from-module"]
def one_round(q, k, v, mask, order, place):
    """Attention in one round: o (B, H, T, d_head) and z (B, H, T, 1). Eq. 13, 14."""
    cut = lambda x: rearrange(x, order).unflatten(2, (-1, mask.size(3)))
    scores = cut(q) @ look_back(cut(k)).mT + mask  # (B, H, G, w, 2w)
    o = scores.softmax(dim=-1) @ look_back(cut(v))  # (B, H, G, w, d_head)
    z = scores.logsumexp(dim=-1, keepdim=True)  # (B, H, G, w, 1)
    return rearrange(o.flatten(2, 3), place), rearrange(z.flatten(2, 3), place)

# %% [markdown]
# All rounds together, at any length: the end is filled up with tokens that are last in position and in a bucket of their own. Half-precision inputs
# are computed in float32, where $-10^5$ is not infinity.

# %% tags=["from-module"]
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

# %%
joined = lsh_attention(q, k, v, buckets, settings)
print(f"two rounds, against the definition: {(joined - two @ v).abs().max():.0e}")

torch.manual_seed(SEED)
q_, v_ = torch.randn(2, 2, 3, 50, 8, dtype=torch.float64, requires_grad=True)
k_, h = F.normalize(q_, dim=-1), hash_vectors(q_.detach(), 14, n_rounds=3, seed=SEED)
ways = [lsh_attention(q_, k_, v_, h, Settings(8))]
ways += [attention_weights(q_, k_, h, Settings(8)) @ v_]
pull = torch.randn_like(v_)
both = [(o, *torch.autograd.grad(o, (q_, v_), pull, retain_graph=True)) for o in ways]
errors = [(a - b).abs().max() for a, b in zip(*both)]
print("three rounds, length 50, with gradients:", *(f"{e:.0e}" for e in errors))
assert max(errors) < 1e-10

# %% [markdown]
# ### How many rounds does it take?
#
# Take 1,024 vectors scattered around 64 directions, and measure how far hashed attention is from exact attention, in three ways:
#
# - the paper's;
# - without $N_{i,j}$: a key found eight times counts eight times;
# - **later code**, among it what the authors published: without $N_{i,j}$, and a query looks at all that the two chunks hold, of any bucket.

# %%
g = torch.Generator().manual_seed(SEED + 1)
x = torch.randn(64, 32, generator=g)[torch.randint(64, (1024,), generator=g)]
x = x + 0.08 * torch.randn(1024, 32, generator=g)  # around 64 directions
q_ = 6 * F.normalize(x, dim=-1)[None, None].to(device)  # (1, 1, 1024, 32)
k_ = F.normalize(q_, dim=-1)
v_ = torch.randn(q_.shape, generator=torch.Generator().manual_seed(SEED)).to(device)
target = attention_weights(q_, k_, None, Settings(64)) @ v_


def error(n_rounds, **switches):
    """Distance from exact attention, relative to its size; the mean of three seeds."""
    total = 0
    for seed in range(3):
        h = hash_vectors(q_, 32, n_rounds, seed)
        out = lsh_attention(q_, k_, v_, h, Settings(64, **switches))
        total += (out - target).norm(dim=-1).mean().item()
    return total / 3 / target.norm(dim=-1).mean().item()

# %%
rounds = [1, 2, 4, 8, 16]
ways = {"the paper": {}, "without N": dict(count_once=False)}
ways["later code"] = dict(count_once=False, same_bucket=False)
errors = {way: [error(n, **switches) for n in rounds] for way, switches in ways.items()}
assert errors["the paper"][-1] < 0.7 * errors["later code"][-1]
assert errors["later code"][-1] < errors["without N"][-1]

# %% jupyter={"source_hidden": true} tags=["hide-input"]
figure, axes = plt.subplots()
for (way, values), look in zip(errors.items(), ("o-", "s--", "^:")):
    axes.plot(range(len(rounds)), values, look, label=way)
axes.set(xlabel="hash rounds", ylabel="relative error of the output")
axes.set(title="Clustered vectors, length 1,024, chunks of 64", ylim=(0, None))
axes.set_xticks(range(len(rounds)), labels=rounds)
axes.legend()
figures.show(
    figure,
    "Where each key counts once, as in the paper, the error falls towards zero as "
    "rounds are added; without N and in later code, where keys count once a round, it "
    "levels off.",
)

# %% [markdown]
# What makes the error keep falling is counting each key once. Without $N_{i,j}$ a key's weight is multiplied by the number of rounds that find it,
# and near keys are found more often, so with ever more rounds the result tends to something other than exact attention. The comparison of buckets
# saves no time in this code, and costs accuracy: without it a query sees more keys. It is here because the paper defines its sets so. (These are
# artificial vectors in tight clusters; exercise 4.2 leaves $N$ out of a trained model.)
#
# ### What it costs: $O(T \log T)$
#
# Per head and round, with $d = d_{\text{head}}$:
#
# | step | operations | with $b = 2T/w$ and $w$ fixed |
# | --- | --- | --- |
# | hash, one product for each pair of directions | $T\,b\,d / 2$ | $O(T^2)$, if it were one hash |
# | hash, in two small ones of $\sqrt b$ buckets | $T \sqrt b\, d$ | $O(T^{3/2})$, yet at $T$ = 65,536 and $w$ = 64 less than the last row: $\sqrt b$ is 45, $4w$ is 256 |
# | sort | $T \log T$ | $O(T \log T)$ |
# | scores and sums, $2w$ for each token | $4\,T\,w\,d$ | $O(T)$ |
#
# The paper's $O(L \log L)$ (its $L$ is our $T$) is the third row: it takes rounds, chunk and cost of a hash as constants. (Counting $N$ takes
# $2\,T\,w\,P^2$ comparisons more in all, so four rounds can cost more than twice as much as two.) Section 4.8 measures the total.
#
# ### The layer
#
# The layer projects, hashes and attends. It also returns its buckets, and takes them if they are known already: section 4.6 needs that. In training
# each step draws new random matrices, from PyTorch's random numbers, so that a pair that is parted once is not parted for ever. In evaluation each
# layer has a seed of its own, and the same text is always hashed alike. Up to two chunks, attention is exact, which costs no more there and finds
# more. (The number of buckets follows the length, $b = 2T/w$: what a token looks at depends on how long the text is, in evaluation too.)

# %% tags=["from-module"]
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

# %% [markdown]
# ## 4.6 Layers that run backwards
#
# An ordinary residual layer computes $y = x + f(x)$, and the backward pass needs $x$ and all that $f$ computed inside. So every layer keeps them. A
# **reversible** block works on two streams (two such blocks, attention and feed-forward, are equation 9): one is read, the other gets something
# added, and they change roles,
#
# $$
# y_1 = x_2 , \qquad y_2 = x_1 + f(x_2) ,
# $$
#
# with attention and feed-forward as $f$ in turn. Back: $x_2 = y_1$, $x_1 = y_2 - f(y_1)$. And the gradients, by the chain rule, with $dy$ for the
# gradient of the loss with respect to $y$:
#
# $$
# dx_1 = dy_2 , \qquad dx_2 = dy_1 + \left( \frac{\partial f}{\partial x_2} \right)^{\!\top} dy_2 .
# $$
#
# In ten lines, for a function without parameters or randomness:

# %%
def forth(f, x1, x2):
    return x2, x1 + f(x2)


def back(f, y1, y2, dy1, dy2):
    """x1, x2 and their gradients, from y1, y2 and theirs."""
    x2 = y1.detach().requires_grad_()
    with torch.enable_grad():
        change = f(x2)
    (through_f,) = torch.autograd.grad(change, x2, dy2)
    return y2 - change.detach(), y1, dy2, dy1 + through_f

# %%
x1, x2 = (torch.randn(5, dtype=torch.float64, requires_grad=True) for _ in range(2))
y1, y2 = forth(torch.sin, x1, x2)
(y1.square().sum() + y2.exp().sum()).backward()
again = back(torch.sin, y1.detach(), y2.detach(), 2 * y1.detach(), y2.detach().exp())
for mine, right in zip(again, [x1, x2, x1.grad, x2.grad]):
    assert torch.allclose(mine, right)

# %% [markdown]
# That is the idea. What is left is to make sure that $f$ is *the same function* the second time:
#
# - **Dropout** must drop the same numbers. The state of PyTorch's random numbers is saved before each block and put back for the second
#   computation, whatever draws from it, dropout or a hash (`inputs.random_states(device)` returns the states of the CPU's and the device's
#   generators; given states, it sets them), and at the end everything is as if nothing had been drawn. (That is also why the layer draws its seed
#   even when the buckets are known.)
# - **Buckets** must be the same ones. Rebuilt inputs differ from the first ones by rounding errors, and a vector on the border of two buckets could
#   fall on the other side. So buckets are kept: one byte for each token, head and round (two above 256 buckets).
# - **Autocast** must be set as it was, and modes (train or eval) and settings unchanged. `inputs.modes` lists what may not change, and
#   `inputs.check_unchanged` says so if it did: an error, not a wrong gradient.
#
# The feed-forward block saves in its own way: it treats every position by itself, so it need not treat them all at once. It computes a long text in
# **pieces**, and each piece again when its gradient is needed, so that the hidden layer, four times as wide, never exists for the whole text.

# %% tags=["from-module"]
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

# %% [markdown]
# Forward, both streams start as copies of the embedding, $x_1 = x_2 = x$. Back, one block is `back` from above, and the gradients of the
# parameters.

# %% tags=["from-module"]
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

# %% tags=["from-module"]
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

# %% [markdown]
# An autograd function holds the two directions together. It keeps the last streams, and for each block its random state and buckets. The parameters
# are handed to it so that autograd asks it for their gradients.

# %% tags=["from-module"]
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

# %% [markdown]
# ### The rest of the model
#
# For a long window, a table with a vector for each position would be larger than the rest of the model. **Axial positions** factorise it: write
# position $n$ as row and column of a grid, give each row and each column half a vector, and join the halves. A grid of 4 by 8 has 12 half vectors,
# in place of 32 whole ones.

# %% tags=["from-module"]
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

# %% tags=["from-module"]
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

# %% [markdown]
# Does it give the right gradients? Compare with `reversible=False`, where autograd keeps everything, in training mode: with dropout, fresh random
# matrices, feed-forward in pieces, and two forward passes before one backward pass.

# %%
def all_gradients(reversible):
    torch.manual_seed(SEED)
    small = dict(vocab_size=10, d_model=16, n_heads=2, n_layers=6, d_ff=32, dropout=0.2)
    how = dict(chunk_len=4, axial_shape=(5, 8), piece_len=8, reversible=reversible)
    model = Reformer(**small, **how).double()
    one, two = torch.randint(10, (2, 3, 40))
    loss = model(one)[0].logsumexp(-1).sum() + model(two)[0].square().sum()
    loss.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters()])


mine, right = all_gradients(True), all_gradients(False)
relative = ((mine - right).norm() / right.norm()).item()
print(f"{len(mine):,} gradients, relative difference {relative:.0e}")
assert relative < 1e-10

# %% [markdown]
# ## 4.7 Train it
#
# The same loop as in every chapter, with windows of 128 characters and chunks of 16. Eight models: a Reformer with 1, 2 and 4 rounds; one with
# exact attention; the vanilla transformer; and three that need a few lines of their own. A plain **local window** does not search at all: put all
# tokens into one bucket. Sorting then leaves the order of the text, and a chunk looks at itself and at the one before, so each character sees the
# latest 16 to 31 before it. The last two are exact, and each leaves out one of the paper's ideas. *Keys apart*: an ordinary attention, with a
# projection for keys, scores divided by $\sqrt{d_{\text{head}}}$ and a look at itself. *One stream*: ordinary residuals, doubled only for the
# output layer.

# %% tags=["band"]
def one_bucket(q, seed):
    """In place of LSHAttention.hash: a window of the latest tokens."""
    return torch.zeros(1, *q.shape[:3], dtype=torch.uint8, device=q.device)


class KeysApart(LSHAttention):
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

    checkpointed = False  # section 4.8 sets it

    def forward(self, tokens, memory=None):
        x = self.embedding(tokens) + self.positions(tokens.size(1))
        for block in self.blocks:
            if self.checkpointed:
                x = x + checkpoint(block, x, use_reentrant=False)[0]
            else:
                x = x + block(x)[0]
        return self.head(self.norm(torch.cat([x, x], dim=-1))), None

# %% tags=["band"]
T, STEPS = 128, 250
SIZES = dict(vocab_size=len(corpus.vocab), d_model=96, n_heads=4, n_layers=3, d_ff=384)
ROUNDS = {"1 round": 1, "2 rounds": 2, "4 rounds": 4, "local window": 1}
KINDS = [*ROUNDS, "exact", "exact, keys apart", "exact, one stream", "vanilla"]


def text_model(kind, seed):
    """A model of one kind, trained on text."""
    torch.manual_seed(seed)
    make = OneStream if kind == "exact, one stream" else Reformer
    how = dict(chunk_len=16, n_rounds=ROUNDS.get(kind, 0), axial_shape=(8, 16))
    model = make(**SIZES, **how)
    for n in range(0, len(model.blocks), 2):
        if kind == "local window":
            model.blocks[n].hash = one_bucket
        if kind == "exact, keys apart":
            model.blocks[n] = KeysApart(96, 4, model.settings)
    if kind == "vanilla":
        model = VanillaTransformer(**SIZES, max_len=T)
    how = dict(steps=STEPS, batch_size=8, segment_len=T)
    training.train(model.to(device), corpus.train, **how)
    return model

# %% tags=["band"]
def text_loss(model, n_rounds=None):
    """Validation loss, with as many rounds as in training or with another number."""
    if n_rounds is None:
        text = corpus.valid[: 8 * 8 * T + 1]
        return training.evaluate(model, text, batch_size=8, segment_len=T)
    trained, model.settings.n_rounds = model.settings.n_rounds, n_rounds
    loss = text_loss(model)
    model.settings.n_rounds = trained
    return loss


def text_losses(seed):
    """One seed of the band: the loss of each kind of model."""
    return {kind: text_loss(text_model(kind, seed)) for kind in KINDS}

# %%
models = {kind: text_model(kind, SEED) for kind in KINDS}
live = {kind: text_loss(model) for kind, model in models.items()}
reformer = models["2 rounds"]
text_band = bands.load("04_text_losses", corpus.name)
text_band.check(live, margin=0.05)

# %% [markdown]
# ## 4.8 The claims, one by one
#
# ### Few rounds or many, on text
#
# Figure 4 of the paper trains with 1, 2, 4 and 8 rounds, and finds that more rounds come nearer to exact attention; Figure 3, that neither shared
# QK nor reversible layers cost anything. Here is the validation loss of each model above, drawn over those of five recorded seeds.

# %% jupyter={"source_hidden": true} tags=["hide-input"]
figure, axes = plt.subplots(figsize=(6.4, 5))
label = "validation loss (nats per character)"
figures.points(axes, live, text_band.values, xlabel=label, number="{:.3f}")
axes.set_title(f"Trained with ... ({corpus.name})")
figures.show(
    figure,
    "The fewer the rounds that a Reformer trains with, the higher its validation loss; "
    "exact attention is below all of them, and so is a plain local window, which does "
    "not search at all. No two of the recorded bands of 1, 2 and 4 rounds overlap.",
)

# %%
hashed = ["1 round", "2 rounds", "4 rounds", "exact"]
low, high = text_band.low, text_band.high
for fewer, more in zip(hashed, hashed[1:]):
    assert live[fewer] > live[more] and low(fewer) > high(more)
assert high("local window") < min(low(kind) for kind in hashed)
for kind in ("exact, keys apart", "exact, one stream") if text_band.seeds else ():
    assert low(kind) <= high("exact") and low("exact") <= high(kind)

# %% [markdown]
# Can a model trained with few rounds win back what it lost when evaluated with many? Beside these models stands one of four layers that was trained
# for longer and comes with the package (see the book's page on trained weights).

# %%
trained, vocab = memtx_minimal.load("reformer")  # longer, with 2 rounds; on the CPU
compared = {kind: models[kind] for kind in hashed}
if corpus.name == "Tiny Shakespeare":  # which the last one has learned
    compared["2 rounds, for longer"] = trained
rows = {name: [text_loss(m, n) for n in (None, 8, 0)] for name, m in compared.items()}
figures.table(
    f"Loss on the first validation windows, nats per character ({corpus.name})",
    ["trained with", "evaluated with as many", "with 8 rounds", "with exact attention"],
    [[name, *(f"{loss:.3f}" for loss in row)] for name, row in rows.items()],
)
own, eight, exact = rows.get("2 rounds, for longer", [1, 0, 0])
assert own > eight + 0.02 and abs(eight - exact) < 0.02  # the longer one

# %% [markdown]
# So on this text hashing costs: each halving of the rounds in training raises the loss (figure above). The paper advises to train with few rounds
# and evaluate with more. Our short training gains next to nothing by that; the longer one gains, and with 8 rounds is as good as with exact
# attention, which it was not trained with. As in the paper, keys apart or one stream make no difference that five seeds could show. (Vanilla
# differs in more: in its positions, and in an output layer half as wide. What costs it more than four rounds of hashing, we did not take apart.)
#
# And the local window? It does not search, and yet it does better than every other model, exact attention included, at least after 250 steps. So
# this text cannot show what hashing is *for*: for that you need a task whose answer stands far away.
#
# ### The duplicate task: far away, at two lengths
#
# The paper's own test (section 5, Table 2). A sequence is `0 s 0 s`, where `s` is a string of random symbols, new each time. To predict the second
# `s` you must look back half the sequence for every symbol; nothing nearer helps. What do query and key have in common there? Only their places:
# the query stands at some $n$, the key at $n - T/2 + 1$, where the symbol that comes next stood the first time. The model has to learn vectors that
# are alike at two such places.

# %%
tokens, targets, _ = next(tasks.duplicate(batch_size=1, length=16, seed=SEED))
print("0 s 0 s:", *tokens[0].tolist())
print("targets:", *("." if t == -100 else t for t in targets[0].tolist()))

# %% [markdown]
# Train at length 64 with exact attention and with 4, 2 and 1 rounds, and at length 128, where one round shows a query at most 16 of the 128 keys,
# with exact attention and 4 rounds. (Eight rounds compute as many scores as a full row has: at this length hashing finds, and saves nothing.)
# Evaluate each model with all of them, and through a local window. The positions are a grid of one column, so that each has a half vector of its
# own. (With two axes, positions that share a row or a column would be alike from the start.) Embeddings and positions start small, at 0.02 in place
# of 1: in a trial with 1, the model with one round learned nothing in these 260 steps.

# %% tags=["band"]
CALLED = {0: "exact", 8: "8 rounds", 4: "4 rounds", 2: "2 rounds", 1: "1 round"}
TRAINED = [(64, 0), (64, 4), (64, 2), (64, 1), (128, 0), (128, 4)]  # length, rounds


def duplicate_model(length, n_rounds, seed):
    """A one-layer Reformer that has trained on the duplicate task."""
    torch.manual_seed(seed)
    sizes = dict(vocab_size=64, d_model=128, n_heads=4, n_layers=1, d_ff=128)
    how = dict(chunk_len=8, n_rounds=n_rounds, axial_shape=(length, 1))
    model = Reformer(**sizes, **how).to(device)
    for parameter in [*model.embedding.parameters(), *model.positions.parameters()]:
        nn.init.normal_(parameter, std=0.02)
    stream = tasks.duplicate(batch_size=16, length=length, seed=seed)
    training.train(model, stream, steps=260, warmup=20, weight_decay=0.0)
    return model.eval()


@torch.no_grad()
def accuracy(model, n_rounds):
    """Share of the second s that is predicted, in strings that were not trained on."""
    model.settings.n_rounds = n_rounds
    tokens, targets, _ = next(tasks.duplicate(length=model.max_len, seed=999))
    best, targets = model(tokens.to(device))[0].argmax(dim=-1), targets.to(device)
    return (best == targets)[targets != -100].float().mean().item()

# %% tags=["band"]
def duplicate_table(seed):
    """{length and rounds of training: accuracies with each of CALLED and a window}."""
    table = {}
    for length, trained in TRAINED:
        model = duplicate_model(length, trained, seed)
        row = [accuracy(model, n) for n in CALLED]
        model.blocks[0].hash = one_bucket  # read through a local window
        table[f"{length}, {CALLED[trained]}"] = [*row, accuracy(model, 1)]
    return table

# %%
table = duplicate_table(SEED)
duplicate_band = bands.load("04_duplicate_table", text=None)
paper = {
    "exact": [100, 94.8, 92.5, 76.9, 52.5], "4 rounds": [0.8, 100, 99.9, 99.4, 91.9],
    "2 rounds": [0.8, 100, 99.9, 98.1, 86.8], "1 round": [0.8, 99.9, 99.6, 94.8, 77.9],
}  # fmt: skip
rows = [[name, *(f"{100 * a:.1f}" for a in row)] for name, row in table.items()]
rows += [[f"(paper) 1,024, {name}", *row, ""] for name, row in paper.items()]
figures.table(
    "Accuracy in %. The last rows are the paper's Table 2",
    ["length, trained with", *CALLED.values(), "local window"], rows,
)  # fmt: skip
duplicate_band.check(table, margin=0.15)
for seeds in duplicate_band.values.values():  # (seeds, 6) each
    exact, eight, _, two, one, window = seeds.T
    assert min(exact) > 0.99 and min(two) > 0.9 > 9 * max(window) and all(eight > one)

# %% [markdown]
# A local window knows nothing (one in 63 is guessing); hashing finds what stands far away. At length 64, a model trained with hashing and evaluated
# with two rounds or more has nearly all right, and every model does better with eight rounds than with one, as in the paper. What does not agree:
# in the paper, models trained with hashing fail under exact attention (0.8 %, which is guessing among their 128 symbols), and one trained with
# exact attention gets no further than 76.9 % with two rounds. Here exact attention is perfect for all, as one would expect of a method that
# converges to it. (A [published replication](https://github.com/arampacha/reformer_fastai) got other numbers again. Our task and model are smaller,
# and what the paper's code did in these experiments we do not know.)
#
# ### Time against length
#
# Keep the number of tokens in a batch at 8,192 and make the texts longer and fewer. Attention alone, forward and backward, hashing and sorting
# included; `fused` is PyTorch's `scaled_dot_product_attention`.

# %%
TOKENS, lengths = 8192, [256, 1024, 4096, 8192]


def attention_time(T, n_rounds):
    """Seconds for attention of 4 heads of 32 over 8,192 tokens in texts of length T."""
    torch.manual_seed(SEED)
    q, v = torch.randn(2, TOKENS // T, 4, T, 32, device=device, requires_grad=True)

    def run():
        k = F.normalize(q, dim=-1)
        if n_rounds == 0:
            o = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            return o.sum().backward()
        h = hash_vectors(q.detach(), 2 * T // 64, n_rounds, seed=SEED)
        lsh_attention(q, k, v, h, Settings(64)).sum().backward()

    return measure.seconds(run, warmup=1, rounds=3, device=device)


times = {CALLED[n]: [attention_time(T, n) for T in lengths] for n in (0, 1, 2, 4)}
times["fused"] = times.pop("exact")
assert times["fused"][-1] > 2 * times["fused"][0]
assert times["1 round"][-1] < 5 * times["1 round"][0]

# %% jupyter={"source_hidden": true} tags=["hide-input"]
SHADES = "#F5C767", figures.COLOUR["Reformer"], "#8A5F00", figures.COLOUR["vanilla"]
figure, axes = plt.subplots()
for (label, ts), marker, colour in zip(times.items(), "os^D", SHADES):
    axes.plot(lengths, [1e3 * t for t in ts], marker=marker, color=colour, label=label)
axes.set(xlabel="length of the texts (tokens)", ylabel="time for 8,192 tokens (ms)")
axes.set(xscale="log", yscale="log", title="Attention, forward and backward")
figures.plain_ticks(axes.yaxis)
axes.set_xticks(lengths, labels=[f"{T:,}" for T in lengths])
axes.minorticks_off()
axes.legend(ncols=2)
figures.show(
    figure,
    "Fused attention starts far below hashing and rises steeply with the length of the "
    "texts, until it crosses the curves of 1, 2 and 4 hash rounds, which are nearly "
    "level.",
)

# %% [markdown]
# The level lines are the paper's claim, and it holds. But see in the figure where they are crossed on this machine. In 2020 attention wrote $T
# \times T$ weights to memory and read them again. Fused attention does not, and for short texts hashing loses clearly. The code of this chapter is
# the plainest, not the fastest; appendix B makes it about twice as fast with the same results.
#
# ### Memory against depth
#
# Table 3 of the paper, in our letters: memory has the size $\max(B\,T\,d_{ff},\; B\,H\,T^2)\,L$ in a transformer, where every layer keeps its
# largest tensor for the backward pass, and $\max(B\,T\,d_{\text{model}},\; B\,H\,T\,P \cdot 2w)$ in a Reformer: hashing takes $T^2$ away, pieces
# $d_{ff}$, and reversible layers $L$. To see the last, measure what autograd keeps between the passes at length 1,024, by depth: reversible or not,
# hashed or exact, and vanilla.

# %%
def reformer_of(T, n_layers=4, kind=Reformer, **kw):
    """An untrained Reformer for windows of T tokens: chunks of 64, two rounds."""
    sizes = WIDE | dict(n_layers=n_layers, chunk_len=64, axial_shape=(T // 64, 64))
    return kind(**sizes, **kw).to(device)


depths, text_1024 = [1, 2, 4, 8, 12], text_of(1024)
makers = {
    "kept, hashed": lambda n: reformer_of(1024, n, reversible=False),
    "reversible, hashed": lambda n: reformer_of(1024, n),
    "reversible, exact": lambda n: reformer_of(1024, n, n_rounds=0),
    "vanilla": lambda n: vanilla_of(1024, n),
}
by_depth = {
    name: [kept(make(n), text_1024) for n in depths] for name, make in makers.items()
}
few, many = by_depth["reversible, hashed"], by_depth["kept, hashed"]
assert few[-1] < 1.1 * few[0] and many[-1] > 8 * many[0]

# %% jupyter={"source_hidden": true} tags=["hide-input"]
figure, axes = plt.subplots()
looks = zip(by_depth.items(), "os^D", SHADES, (2, 6, 2, 2))
for (label, values), marker, colour, width in looks:
    look = dict(marker=marker, color=colour, linewidth=width)
    axes.plot(depths, values, label=label, **look)
axes.set(xlabel="layers", ylabel="kept for backward (MiB)", yscale="log")
axes.set(title="A window of 1,024 tokens", xticks=depths)
figures.plain_ticks(axes.yaxis)
figures.legend_below(axes)
figures.show(
    figure,
    "Reversible layers, hashed or exact, stay level at the bottom, whatever the depth; "
    "where everything is kept, MiB for the backward pass grow in proportion to depth.",
)

# %% [markdown]
# With reversible layers what is kept (the last streams, and what the output layer needs) does not grow with depth, except for buckets and random
# states. Kept and hashed, a plain round costs a lot: autograd keeps masks, scores and softmaxes of all rounds. Reversible layers hold them for one
# block at a time only. For that moment look at the **peak**, the most that is held during a step; beside it, the time.
#
# Is there no simpler way? There is: **gradient checkpointing** keeps the input of each block, one stream and no more, and computes the block again
# in the backward pass. The table has all kept, checkpoints and reversible layers, all without pieces.

# %%
rivals = {"keep all": OneStream, "checkpoints": OneStream, "reversible": Reformer}
costs = {}
for name, kind in rivals.items():
    model = reformer_of(1024, 8, kind, piece_len=1024)
    model.checkpointed = name == "checkpoints"
    step = lambda: loss_of(model, text_1024).backward()
    peak = measure.peak_bytes(step, device) / MiB
    costs[name] = kept(model, text_1024), peak, step_time(model, text_1024)
figures.table(
    "One step of training: 8 layers, 1,024 tokens",
    ["", "kept (MiB)", "peak (MiB)", "seconds"],
    [[name, f"{k:.1f}", f"{p:.1f}", f"{s:.2f}"] for name, (k, p, s) in costs.items()],
)
assert costs["reversible"][0] < costs["checkpoints"][0] < costs["keep all"][0]

# %% [markdown]
# Checkpoints keep one input a block, so they grow with depth, but slowly. Both pay with a second computation. Reversible layers keep less, but the
# peak, which is what has to fit, is much the same, since most of it is one block at work; and any model can be checkpointed, without a second
# stream: that is what most people do.
#
# ## 4.9 Where it looks
#
# How much of what exact attention would look at lies in the query's own bucket, where one round can find it? Take the model trained with two
# rounds, and in each layer the first round's buckets. Add up the weights of *exact* attention by the bucket of the query and of the key. The
# diagonal is the most that this round can find; the rest it misses.

# %%
@torch.no_grad()
def exact_and_buckets(model, tokens):
    """Of each layer exact attention (B, H, T, T), and round 1's buckets as one-hot."""
    x1 = x2 = model.embedding(tokens) + model.positions(T)
    for n, block in enumerate(model.blocks):
        if n % 2 == 0:
            q, k, _ = block.heads(x2)
            h = block.hash(q, block.seed)[0].long()  # (B, H, T)
            one_hot = F.one_hot(h, 2 * T // block.settings.chunk_len).float()
            yield attention_weights(q, k, None, block.settings), one_hot
        x1, x2 = x2, x1 + block(x2)[0]  # as in `run`


shares = []
for weights, one_hot in exact_and_buckets(reformer, text_of(T, B=8)):
    between = lambda pairs: (one_hot.mT @ pairs @ one_hot).sum(dim=(0, 1))  # (b, b)
    mass, earlier = between(weights), between(torch.ones_like(weights).tril(-1))
    found, blind = (x.trace() / x.sum() for x in (mass, earlier))
    print(f"in its own bucket: {found:.0%} of attention, {blind:.0%} of earlier keys")
    assert found > 1.3 * blind
    shares.append((mass / mass.sum(dim=1, keepdim=True)).cpu())

# %% jupyter={"source_hidden": true} tags=["hide-input"]
figure, axes = plt.subplots(1, 3, figsize=(7.6, 3.2), sharey=True)
look = dict(cmap="Blues", vmin=0, vmax=torch.stack(shares).max().item(), ylabel="")
for n, (ax, share) in enumerate(zip(axes, shares)):
    look |= dict(title=f"layer {n + 1}", xlabel="bucket of the key")
    image = figures.matrix(ax, share, **look)
    ax.set(xticks=range(0, len(share), 5), yticks=range(0, len(share), 5))
axes[0].set_ylabel("bucket of the query")
figure.colorbar(image, ax=axes, label="share of the query's attention")
figure.suptitle(f"Exact attention by bucket ({corpus.name})", fontsize=11)
figures.show(
    figure,
    "In each of three layers the diagonal, which hashing can find, stands out of the "
    "exact attention by bucket of query and key; but more than half lies off it, "
    "thinly spread.",
)

# %% [markdown]
# One round can find only a part of the attention, though more than a blind choice of as many keys would. That is why rounds are added up.
#
# Look for yourself, in the model trained for longer. Point at a character, or step to one with the arrow keys. The bars show its attention, at
# first that of the top layer (mean over the heads); what is underlined its rounds may find. All that it reads lies there: `bucket` is always 100 %.

# %%
seen = measure.reads(trained, vocab.encode(corpus.vocab.decode(corpus.valid[:256])))
figures.explorer({"Reformer": seen}, vocab)

# %% [markdown]
# ## 4.10 What a hash gives away
#
# A language model must not know the future, and no query looks at a later key. Is that enough? Change one token of a window and see whether earlier
# logits change.

# %%
@torch.no_grad()
def change(model, tokens, position):
    """Largest change of the logits before `position` if another token stands there."""
    other = tokens.clone()
    other[:, position] = (other[:, position] + 1) % len(corpus.vocab)
    before, after = model(tokens)[0][:, :position], model(other)[0][:, :position]
    return (after - before).abs().amax(dim=-1).flatten()  # (B * position,)


model = reformer.double().eval()  # so that rounding stays below 1e-9
for n in (2, 0):
    model.settings.n_rounds = n
    leak = torch.cat([change(model, text_of(T, B=8), p) for p in (50, 90, 125)])
    moved = (leak > 1e-9).double().mean()
    print(f"{CALLED[n]}: logits move at {moved:.1%} of earlier positions,", end=" ")
    print(f"by {leak.mean():.4f} on average, by {leak.max():.2f} at most")
assert leak.max() < 1e-9  # exact attention
reformer.float().settings.n_rounds = 2

# %% [markdown]
# The changed token may fall into another bucket. Then it stands elsewhere in the sorted row, everything between moves by one place, and some chunks
# begin at another token. So a query may lose or gain a key *of its own past*, because of something in its future. No later value or key flows into
# an earlier output, but *which* past keys are seen depends on the whole window. That is so wherever a whole window is hashed and sorted. For the
# same reason generation, which has no future to hash, may see slightly other sets than training did.
#
# It is the chunks that leak, not the buckets: a bucket depends on the token's own query, which comes from the token and its past (above the first
# layer, with what the chunks below have leaked). (The number of buckets depends on the length alone.) Exercise 4.4 counts chunks in a way that no
# later token can move, and its solution shows what that costs.
#
# ## 4.11 Departures from the paper
#
# | here | the paper | why |
# | --- | --- | --- |
# | above 32 buckets, two small hashes are put together | one hash; the authors' code splits it above 128 buckets when it picks the number itself | a hash with many directions is dear |
# | before the first chunk lies nothing | in the authors' code all rounds form one row, and a round's first chunk sees the last of the round before | each round has its own buckets, so where they are compared nothing changes; with `same_bucket=False` first chunks differ from later code |
# | windows of up to two chunks get exact attention | always hashed | costs no more, and finds more |
# | every layer hashes | in the authors' configuration for enwik8 one layer of four; the others look at a local window | one idea at a time |
# | the random matrices are new at each step of training, and fixed in evaluation | random | evaluation can be repeated |
# | buckets and random states are kept for the backward pass | not said | a rebuilt vector may fall into another bucket |
# | short windows, small models, minutes, no dropout on attention weights | 64K tokens, up to 20 layers, days on accelerators | what a notebook can do |
#
# ## 4.12 What became of it
#
# Hashed attention was soon followed by simpler ways to make attention sparse, such as windows with a few global tokens
# ([Longformer](https://arxiv.org/abs/2004.05150), [BigBird](https://arxiv.org/abs/2007.14062)). Then
# [FlashAttention](https://arxiv.org/abs/2205.14135) made *exact* attention fast and small in memory, and for most lengths took away the reason to
# approximate it. Reversible layers, which come from [reversible residual networks](https://arxiv.org/abs/1707.04585), are rarer than
# [checkpointing](https://arxiv.org/abs/1604.06174), and axial positions have given way to [rotary ones](https://arxiv.org/abs/2104.09864).
#
# But texts grew to a million tokens, and the question of which few keys to read came back. Some works, with the year in which each was first public
# (that they go back to this chapter's ideas is our reading, not always their authors'):
#
# - The [Routing Transformer](https://arxiv.org/abs/2003.05997) (2020) puts learned clusters in the place of hash buckets: each query attends only
#   to keys of its own cluster.
# - [MoBA](https://arxiv.org/abs/2502.13189) (2025) cuts the past into blocks, and each query picks the few that suit it best, with no parameters
#   for the choice.
# - [Reversing LLMs](https://arxiv.org/abs/2512.02056) (2025) brings reversible layers to language models, and turns trained models into reversible
#   ones by fine-tuning them.
# - [DeepSeek Sparse Attention](https://arxiv.org/abs/2512.02556) (2025) scores all earlier tokens by a small indexer and attends to the 2,048 with
#   the highest scores.

# %% [markdown]
# ## 4.13 Exercises
#
# Write your answer where the dots stand and run the cell. `exercises.check` says that it is right, or names the case that fails, what was expected
# and what came. All [solutions](solutions/04_reformer.ipynb), worked out in words and code.
#
# **4.1 A hash** *(fill in; easy; 10 minutes)* Write $h(x)$ for one head and one round, without `hash_vectors`.

# %% tags=["exercise"]
def my_hash(x, D):
    """Vectors x (T, d), directions D (d, b / 2) -> buckets (T,), 0 ... b - 1."""
    return ...


exercises.check("4.1", my_hash)

# %% [markdown]
# <details><summary>Hint</summary>
#
# $h(x) = \arg\max\,([xD\,;\,-xD])$: how far does each vector go in each direction, and in the opposite ones?
#
# </details>
#
# **4.2 Is $N$ needed?** *(predict, then measure; easy; 10 minutes)* Evaluate `reformer` (with `text_loss`) with 1, 2, 4 and 8 rounds, with
# `reformer.settings.count_once` True and False. What do you expect with 1 round? Does leaving out $N$ hurt it, as it hurts the clustered vectors?

# %% tags=["exercise"]
my_losses_with_N = ...  # four losses: 1, 2, 4 and 8 rounds
my_losses_without_N = ...

exercises.check("4.2", my_losses_with_N, my_losses_without_N)

# %% [markdown]
# <details><summary>Hint</summary>
#
# `[text_loss(reformer, n) for n in (1, 2, 4, 8)]`. Set `count_once` back to True afterwards.
#
# </details>
#
# **4.3 Rounds that are all the same** *(find the fault; middle; 10 minutes)* A colleague joins the rounds like this. With one round all is well.
# With more, tokens that found a good key in only one round get too little of it. Mend it.

# %% tags=["exercise"]
def my_join(o, z):
    """Results o (P, T, d_head) of P rounds, logsumexps z (P, T) -> (T, d_head)."""
    return o.mean(dim=0)


exercises.check("4.3", my_join)

# %% [markdown]
# <details><summary>Hint</summary>
#
# Equation 15: a round that found little gets little weight.
#
# </details>
#
# **4.4 Strictly causal** *(build; middle; 20 minutes)* Let a token's chunk be its *rank in its own bucket*, the number of tokens of that bucket
# before it, divided by $w$ and rounded down. No later token can move it (section 4.10). For one head and one round, write the sets $\mathcal P_i$
# with these chunks, $i$ included. What becomes of the even blocks that made hashing fast?

# %% tags=["exercise"]
def my_sets(buckets, w):
    """T buckets in a list, chunks of w -> T sorted lists: whom each may see."""
    return ...


exercises.check("4.4", my_sets)

# %% [markdown]
# <details><summary>Hint</summary>
#
# `buckets[:i].count(buckets[i])` tokens of the bucket of token `i` came before it. The two comparisons are those of section 4.3.
#
# </details>
#
# **4.5 There and back** *(fill in; middle; 10 minutes)* A whole layer of the paper (equation 9): $y_1 = x_1 + F(x_2)$, then $y_2 = x_2 + G(y_1)$.
# Undo it.

# %% tags=["exercise"]
def my_undo(y1, y2, F, G):
    """From y1, y2 back to x1, x2; F and G are functions."""
    return ...


exercises.check("4.5", my_undo)

# %% [markdown]
# <details><summary>Hint</summary>
#
# Which of the two lines was computed last? Of that line you know all but $x_2$.
#
# </details>
#
# **4.6 Nothing put back** *(experiment; hard; 20 minutes)* Replace `inputs.random_states` by a function that never puts anything back. How wrong do
# the gradients of the check in section 4.6 become, and why? And why is nothing wrong if, instead, `LSHAttention.forward` ignores the buckets that
# it is given?

# %% tags=["exercise"]
my_relative = ...  # the relative difference, a number

exercises.check("4.6", my_relative)

# %% [markdown]
# <details><summary>Hint</summary>
#
# Keep the old function, `put_back = inputs.random_states`, and assign a new one that calls it without `states`. Put the old one back at the end.
#
# </details>

# %% [markdown]
# ## References
#
# - N. Kitaev, Ł. Kaiser, A. Levskaya: [Reformer: The Efficient Transformer](https://arxiv.org/abs/2001.04451). ICLR 2020.
# - A. N. Gomez, M. Ren, R. Urtasun, R. B. Grosse: [The Reversible Residual Network](https://arxiv.org/abs/1707.04585). NeurIPS 2017.

# %%
minutes = (time.perf_counter() - started) / 60
peak_memory = measure.process_peak_bytes() / 2**30
print(f"this run: {minutes:.1f} minutes, {peak_memory:.2f} GiB, {corpus.name}")
