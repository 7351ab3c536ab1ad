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
# # 6. Memory today

# %% [markdown] tags=["badges"]
# No links to Colab and Kaggle here: the project has no public address yet.
# To run this notebook, type `make lab` in your copy of the project.

# %% [markdown]
# The four papers of this book are from 2019 and 2020. What became of their ideas? This chapter builds five
# memories that are in use today, small enough to read in an afternoon and to train in minutes. All of them sit in
# the same transformer, chapter 0's, and differ only in what a layer remembers.
#
# **When you have read it, you can**
# - say what a cache may throw away, and by which rule of thumb it chooses;
# - let a model learn by itself how to pool old states into one;
# - write and read a state of fixed size with the *delta rule*, token by token and in parallel;
# - show why such a state can follow a ball under swapped cups, which took Feedback a step at a time;
# - name the heirs of each of the four papers.
#
# **You need** chapter 0, and sections 2.1 and 3.1 for the two tasks (recall, cups); both are said again here in a
# sentence.
#
# **Time and memory.** About 5 minutes and 1 GiB on two CPU cores. The last cell prints what it took on your
# machine.

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
import torch
import torch.nn.functional as F
from torch import nn

from memtx_minimal import (
    bands, corpora, exercises, figures, inputs, measure, tasks, training,
    vanilla_transformer,
)  # fmt: skip

SEED = 0
started = time.perf_counter()
device = training.best_device()
figures.use_style()
corpus = corpora.tiny_shakespeare()
print(f"PyTorch {torch.__version__} on {device}")

# %% jupyter={"source_hidden": true} tags=["hide-input"]
def strip(axes, row, held, label, color, height=0.6):
    """One row of a picture: which tokens a memory holds; (first, width) of each slot."""
    axes.broken_barh([(0, 40)], (row, height), color="#eeeeee")
    for first, width in held:
        box = dict(facecolor=color, edgecolor="white", linewidth=0.8)
        axes.broken_barh([(first, width)], (row, height), **box)
    axes.text(-0.6, row + height / 2, label, ha="right", va="center", fontsize=9)


figure, axes = plt.subplots(figsize=(6.4, 2.8))
rows = {
    "window": ([(n, 1) for n in range(32, 40)], figures.ORANGE),
    "window and sinks": ([(n, 1) for n in (0, 1, *range(34, 40))], figures.ORANGE),
    "what is used": ([(n, 1) for n in (3, 9, 17, 22, *range(36, 40))], figures.ORANGE),
    "gated pooling": (
        [(n, 4) for n in range(16, 32, 4)] + [(n, 1) for n in range(32, 40)],
        figures.GREEN,
    ),
    "delta rule": ([(0, 40)], "#332288"),
}
for row, (label, (held, color)) in enumerate(rows.items()):
    strip(axes, row, held, label, color)
axes.text(20, 4.3, "one state for all", color="white", ha="center", va="center")
axes.set(xlim=(0, 40), ylim=(4.8, -0.2), yticks=[], xlabel="token of the text")
axes.grid(False)
axes.set_title("After 40 tokens: what is still there?")
figures.show(
    figure,
    "Five memories after 40 tokens. A window holds the last eight tokens; with sinks "
    "also the first two; a cache of what is used holds four old ones that it chose; "
    "gated pooling holds older tokens four to a slot; the delta rule holds one state "
    "made of all of them.",
)

# %% [markdown]
# The letters:
#
# | letter | meaning | letter | meaning |
# | --- | --- | --- | --- |
# | `B` | batch: texts side by side | `H` | attention heads |
# | `T` | tokens in the segment | `d_model` | width of a hidden state |
# | `M` | states in memory | `d_head` | width of a head, `d_model / H` |
# | `C` | states in compressed memory | `c` | compression rate |
# | `K` | keys: memory, then segment | `L` | layers |
# | `G` | chunks | `w` | tokens in a chunk |
#
# ## 6.1 What slots cannot do
#
# Chapter 2 asked how far back a memory can answer. In its **recall task** a token such as `b=5` gives a value to
# a key, and a later one, `b?`, asks for the latest value of `b`. There are four keys and eight values, so a guess
# is right once in eight times. Here is what chapter 2 recorded, five seeds of each model, at 8 KiB of state a
# layer:

# %%
chapter_2 = bands.load("02_recall_scores", text=None).values
old_ways = {
    "Transformer-XL": chapter_2["Transformer-XL"],  # (seeds, 12)
    "Compressive": chapter_2["conv, attention, c = 4"],
}
AGES = [16 * n + 8.5 for n in range(12)]  # the middles of 1 to 16, 17 to 32, ...

# %% jupyter={"source_hidden": true} tags=["hide-input"]
LOOK = {
    "Transformer-XL": dict(color=figures.ORANGE, marker="s"),
    "Compressive": dict(color=figures.GREEN, marker="o"),
    "window": dict(color="#56B4E9", marker="v"),
    "last queries": dict(color="#8C510A", marker="D"),
    "all queries": dict(color="#999999", marker="d", linestyle=":"),
    "pooled": dict(color="#117733", marker="P", linestyle="--"),
    "delta rule": dict(color="#332288", marker="*", markersize=9),
    "looped window": dict(color="#882255", marker="X", linestyle=":"),
}


def ages_axes(axes, title):
    """What the figures of recall by age have in common."""
    axes.axhline(1 / 8, color="black", linewidth=0.8)
    axes.text(1, 0.14, "guessing", fontsize=8)
    axes.set(xlabel="age of the answer (tokens)", ylabel="right answers (share)")
    axes.set(ylim=(0, 1.05), xlim=(0, 196), title=title, xticks=range(0, 193, 32))


figure, axes = plt.subplots(figsize=(6.4, 3.8))
for name, values in old_ways.items():
    label = "five recorded seeds of each" if name == "Compressive" else "_"
    figures.band(axes, AGES, values, label)
    axes.plot(AGES, values.mean(axis=0), label=f"{name}, their mean", **LOOK[name])
ages_axes(axes, "What 8 KiB a layer remember")
axes.legend()
figures.show(
    figure,
    "Transformer-XL is right up to an age of 64 tokens and guesses from 80 on. The "
    "Compressive Transformer is right most of the time up to 96, and falls to guessing "
    "near 192.",
)

# %%
for values in old_ways.values():
    assert values[:, 0].min() > 0.9 and values[:, -1].max() < 0.25

# %% [markdown]
# Both answer until their slots run out. Then the answer is gone, though only four values need to be known at any
# time. A slot is taken by whatever was read, important or not, and given up when it is old. So there are two ways
# out: *choose* what gets a slot (sections 6.3 and 6.4), or do without slots (6.5).
#
# Memories of today keep keys and values, as the cache of chapter 0 does, and not states, as chapters 1 and 2 do.
# A slot then takes twice the space, but nothing is computed twice. We build each memory as a module that gets the
# queries, keys and values of a segment and what it remembers, and gives back what the heads read and what it
# remembers now:
#
# `heads, memory = remember(x, q, k, v, memory)`
#
# ## 6.2 Positions that turn
#
# Chapter 1 computed a term of the score from the distance between query and key. Today's models turn the vectors
# instead (**rotary positions**, Su et al., 2021). Take two dimensions of a query at place $m$ and rotate them by the
# angle $m\theta$, and those of a key at place $n$ by $n\theta$. A product of two vectors depends on the angle
# between them, so the score changes with $(m - n)\,\theta$, the *distance*:
#
# $$
# (R_{m} q)^\top (R_{n} k) = q^\top R_{n-m}\, k , \qquad
# R_{m} = \begin{pmatrix} \cos m\theta & -\sin m\theta \\ \sin m\theta & \cos m\theta \end{pmatrix} .
# $$
#
# Each pair of dimensions has a $\theta$ of its own, from 1 down to nearly 1 / 10,000, like the wavelengths of
# chapter 0's sinusoids.

# %% tags=["from-module"]
def rotate(x, positions):
    """Turn x (B, K, H, d_head) by angles in proportion to positions (K,): products then
    depend on distances. Su et al., "RoFormer" (2021), section 3.4.2, by halves."""
    half, exact = x.size(-1) // 2, torch.promote_types(x.dtype, torch.float32)
    steps = torch.arange(half, dtype=exact, device=x.device) / half
    angles = positions[:, None, None] * 10_000**-steps  # (K, 1, d_head / 2)
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    a, b = x.chunk(2, dim=-1)  # (B, K, H, d_head / 2) each
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)

# %% tags=["from-module"]
def scores_of(q, k, queries, keys):
    """q (B, T, H, d_head), k (B, K, H, d_head), their positions -> (B, H, T, K)."""
    q, k = rotate(q, queries).transpose(1, 2), rotate(k, keys).transpose(1, 2)
    return q.size(-1) ** -0.5 * q @ k.mT

# %%
torch.manual_seed(SEED)
q, k = torch.randn(2, 1, 1, 1, 8)  # one query and one key of eight dimensions
rows = []
for shift in (0, 10, 100):
    at = [torch.tensor([4 + shift]), torch.tensor([1 + shift])]
    far = [torch.tensor([4 + shift]), torch.tensor([shift])]
    rows.append([4 + shift, f"{scores_of(q, k, *at):.4f}", f"{scores_of(q, k, *far):.4f}"])
figures.table("Scores of one query and one key", ["query at", "distance 3", "4"], rows)
assert len({row[1] for row in rows}) == len({row[2] for row in rows}) == 1

# %% [markdown]
# The same distance gives the same score wherever the two stand. Nothing is learned, and nothing is stored: a key in
# the cache is kept as it is and turned when it is read. We number the places anew at each reading, from the oldest
# slot on. If slots in between have been thrown away, the others move closer together, and no distance is longer
# than the cache.
#
# ## 6.3 A cache that chooses
#
# The cache of chapter 0 grows with the text. A **window** keeps the latest `mem_len` slots, Transformer-XL's way.
# Two other rules came out of looking at what trained models attend to:
#
# - **Sinks** (StreamingLLM, 2023): many heads of large models put most of their weight on the very first tokens, whatever these
#   say. The weights of a softmax sum to 1, so a head that has nothing to look for must put them somewhere. Throw
#   these tokens away, and such heads are disturbed. So keep them, and then the latest. Section 6.9 shows this in
#   a model of one head.
# - **Most used** (H2O, 2023; SnapKV, 2024): keep what queries have attended to, $\text{got}_j = \sum_i w_{ij}$, the
#   weights of query $i$ on slot $j$. H2O sums over all queries so far, SnapKV over the latest. One number makes both: what a slot
#   got before counts `decay` times, 1 or 0.

# %% tags=["from-module"]
def after(old, new):
    return torch.cat([old, new], dim=1)

# %% tags=["from-module"]
class Cache(nn.Module):
    """Attention over mem_len kept keys and values, then over the segment's own.

    Each head keeps the first n_sinks of a stream (StreamingLLM, Xiao et al. 2023), the
    n_used that got most attention, and the latest. What a slot got before counts decay
    times: 0, this segment's queries alone (SnapKV, Li et al. 2024); 1, all (H2O, Zhang
    et al. 2023). Positions are places in the cache. Settings may change. Memory: k, v
    (B, M, H, d_head) and what each slot got (B, M, H).
    """

    def __init__(self, d_model, n_heads, mem_len=64, n_sinks=0, n_used=0, decay=1.0):
        super().__init__()
        inputs.check_sizes(locals())
        inputs.check_number("n_sinks + n_used", n_sinks + n_used, 0, mem_len)
        inputs.check_number("decay", decay, 0, 1)
        self.mem_len, self.decay = mem_len, decay
        self.n_sinks, self.n_used = n_sinks, n_used

    def empty(self, k):
        return k[:, :0], k[:, :0], k[:, :0, :, 0]

    def stays(self, got):
        """Which of K slots stay, got (B, K, H) -> places (B, M, H), in their order."""
        K, n_latest = got.size(1), self.mem_len - self.n_sinks - self.n_used
        place = torch.arange(K, device=got.device)[:, None]  # (K, 1)
        always = (place < self.n_sinks) | (place >= K - n_latest)
        rank = got.masked_fill(always, float("inf"))
        return rank.topk(min(K, self.mem_len), dim=1).indices.sort(dim=1).values

    def forward(self, x, q, k, v, memory):
        """q, k, v (B, T, H, d_head) -> what is read (B, H, T, d_head), memory."""
        past_k, past_v, got = memory
        k, v = after(past_k, k), after(past_v, v)  # (B, K, H, d_head)
        place = torch.arange(k.size(1), device=x.device)  # (K,)
        now = place[past_k.size(1) :]  # (T,)
        scores, future = scores_of(q, k, now, place), place > now[:, None]
        weights = scores.masked_fill(future, float("-inf")).softmax(dim=-1)
        got = self.decay * F.pad(got, (0, 0, 0, len(now))) + weights.detach().sum(2).mT
        stay = self.stays(got)  # (B, M, H)
        kept = (part.take_along_dim(stay[..., None], dim=1) for part in (k, v))
        return weights @ v.transpose(1, 2), (*kept, got.take_along_dim(stay, dim=1))

# %% [markdown]
# `stays` does the choosing. Slots that stay in any case get the rank infinity; the others are ranked by what they
# got; the best `mem_len` stay, in their order. Ten slots of one head, of which six may stay:

# %%
got = torch.tensor([0.9, 0.1, 0.2, 0.8, 0.1, 0.7, 0.3, 0.2, 0.1, 0.1])
rules = {
    "window": Cache(8, 1, mem_len=6),
    "2 sinks": Cache(8, 1, mem_len=6, n_sinks=2),
    "4 most used": Cache(8, 1, mem_len=6, n_used=4),
    "1 sink, 3 most used": Cache(8, 1, mem_len=6, n_sinks=1, n_used=3),
}
held = {name: rule.stays(got[None, :, None])[0, :, 0] for name, rule in rules.items()}
figures.table(
    "Which slots stay",
    ["slot", *range(10)],
    [
        ["got", *(f"{x:.1f}" for x in got.tolist())],
        *([name, *("x" if n in at else "" for n in range(10))] for name, at in held.items()),
    ],
)
assert held["4 most used"].tolist() == [0, 3, 5, 6, 8, 9]
assert held["2 sinks"].tolist() == [0, 1, 6, 7, 8, 9]

# %% [markdown]
# The first check: as long as nothing has been thrown away, a cache gives what one long window gives.

# %%
def by_parts(remember, parts, sizes):
    """What heads read when a text is read in parts: parts is (x, q, k, v) of all of it."""
    memory, read = remember.empty(parts[2]), []
    for part in zip(*(x.split(sizes, dim=1) for x in parts)):
        heads, memory = remember(*part, memory)
        read.append(heads)
    return torch.cat(read, dim=2)


torch.manual_seed(SEED)
text = [torch.randn(2, 40, 16, dtype=torch.float64)]  # x: B = 2, T = 40
text += torch.randn(3, 2, 40, 2, 8, dtype=torch.float64)  # q, k, v: two heads of 8
whole = by_parts(Cache(16, 2, mem_len=40), text, 40)
for size in (1, 7, 16):
    read = by_parts(Cache(16, 2, mem_len=40), text, size)
    torch.testing.assert_close(read, whole, atol=1e-10, rtol=0)
print("token by token, by 7 and by 16: the same as in one window")

# %% [markdown]
# What does the rule of the *latest* queries have to do with old values? A value that is asked for often gets
# attention often, and so it stays, however old it is. And what nobody asks for is lost. Section 6.7 trains a model
# with each rule.
#
# ## 6.4 Pooling by a gate
#
# The Compressive Transformer pressed `c` old states into one, by a function with a loss of its own, because the
# gradient of the language loss did not reach it (chapter 2). Native Sparse Attention and DeepSeek-V4 compress too
# (2025, 2026), with two changes. The pooling is a weighted mean whose weights are learned, a **gate**:
#
# $$
# \tilde k = \sum_{i=1}^{c} g_i\, k_i , \quad \tilde v = \sum_{i=1}^{c} g_i\, v_i , \qquad
# g = \text{softmax}\left(k_1^\top a + b_1, \ldots, k_c^\top a + b_c\right) .
# $$
#
# The vector $a$ asks whether a key is important, and $b_i$ whether its place in the block is.

# %% tags=["from-module"]
def pool(k, v, gate, gate_place):
    """k, v of n * c tokens, gate (H, d_head), gate_place (c, H, 1) -> of n slots."""
    k, v = (part.unflatten(1, (-1, len(gate_place))) for part in (k, v))
    gate = (k * gate).sum(dim=-1, keepdim=True) + gate_place
    gate = gate.softmax(dim=2)  # (B, n, c, H, 1)
    return (gate * k).sum(dim=2), (gate * v).sum(dim=2)  # (B, n, H, d_head) each

# %% [markdown]
# And the compressed blocks are read *in the same call* in which they are made. Chapter 2's model compressed what
# left the memory at the end of a segment, when all of the segment's queries were done. Here each query has its own
# view: the latest `mem_len` tokens (and what is missing to a whole block) one by one, all before that by blocks. So
# later tokens of a segment read what earlier ones were pooled to, and the language loss trains the gate.

# %% tags=["from-module"]
def in_view(now, end, place, mem_len, compressed_len, c):
    """Which blocks (T, C), by their end, and tokens (T, M + T) queries at `now` see."""
    left = ((now + 1 - mem_len) // c * c).clamp(min=0)[:, None]  # the window, (T, 1)
    blocks = (end <= left) & (end > left - c * compressed_len)
    return blocks, (place >= left) & (place <= now[:, None])

# %%
place, end = torch.arange(24), torch.arange(4, 25, 4)
blocks, tokens = in_view(place, end, place, mem_len=8, compressed_len=3, c=4)

# %% jupyter={"source_hidden": true} tags=["hide-input"]
figure, (left, right) = plt.subplots(
    1, 2, figsize=(6.4, 3.6), width_ratios=[1, 3], sharey=True
)
figures.matrix(left, blocks, title="blocks", xlabel="block", cmap="Greens", vmax=1.4)
figures.matrix(right, tokens, title="tokens", xlabel="token", cmap="Oranges", vmax=1.4)
left.set(xticks=range(6), yticks=range(0, 24, 4))
right.set(xticks=range(0, 24, 4), ylabel="")
figures.show(
    figure,
    "What 24 queries see. Each sees its latest eight to eleven tokens one by one, and "
    "of the three blocks of four before these one slot each. The oldest block is out of "
    "view from query 23 on.",
)

# %%
seen = blocks.repeat_interleave(4, dim=1) | tokens  # (24, 24): in one way or the other
once = blocks.repeat_interleave(4, dim=1).int() + tokens.int()
assert once.max() == 1 and torch.equal(seen[:22], torch.ones(24, 24).tril().bool()[:22])

# %% [markdown]
# Each earlier token is in view exactly once, as a token or in a block, until blocks are more than `compressed_len`.
#
# There is more that can be done with the slots: use them to *find* what to read. Each query looks at all slots
# first, and then reads the `top_k` best blocks token by token. (Chapter 4's hashing looked for alike keys by
# chance; here a mean of keys stands for its block, and the choice is made by the score itself.) All tokens must be
# kept for that. It saves reading, not space.

# %% tags=["from-module"]
def closer(scores, blocks, n_tokens, top_k, c):
    """The tokens in the top_k best blocks of each query, (B, H, T, C + n_tokens)."""
    coarse = scores[..., : blocks.size(1)].masked_fill(~blocks, float("-inf"))
    best = coarse.topk(min(top_k, blocks.size(1))).indices  # (B, H, T, top_k)
    chosen = torch.zeros_like(coarse, dtype=torch.bool).scatter(-1, best, True)
    tokens = (chosen & blocks).repeat_interleave(c, dim=-1)  # (B, H, T, C * c)
    return F.pad(tokens, (blocks.size(1), n_tokens - tokens.size(-1)))

# %% tags=["from-module"]
class Pooled(nn.Module):
    """Attention over a window of mem_len tokens, and blocks of c tokens before it.

    A block is one slot, a mean weighted by a gate. The language loss alone trains it: a
    block that leaves the window is read in the same call. With top_k a query reads its
    best blocks token by token too, and tokens stay. After "Native Sparse Attention" by
    Yuan et al. (2025). Memory: k, v (B, C, H, d_head), and of tokens (B, M, H, d_head).
    """

    def __init__(self, d_model, n_heads, mem_len=32, compressed_len=32,
                 compression_rate=4, top_k=None):  # fmt: skip
        super().__init__()
        inputs.check_sizes(locals())
        inputs.check_number("mem_len", mem_len, 1)
        self.sizes, self.top_k = (mem_len, compressed_len, compression_rate), top_k
        self.gate = nn.Parameter(torch.zeros(n_heads, d_model // n_heads))
        self.gate_place = nn.Parameter(torch.zeros(compression_rate, n_heads, 1))

    def empty(self, k):
        return (k[:, :0],) * 4

    def forward(self, x, q, k, v, memory):
        mem_len, compressed_len, c = self.sizes
        slot_k, slot_v, past_k, past_v = memory
        k, v = after(past_k, k), after(past_v, v)  # (B, M + T, H, d_head)
        C, n_tokens = slot_k.size(1), k.size(1)
        first = c * C if self.top_k else 0  # the first token that is in no slot yet
        n = max(0, n_tokens - first - mem_len) // c  # so many blocks leave the window
        old_k, old_v = (part[:, first : first + n * c] for part in (k, v))
        new = pool(old_k, old_v, self.gate, self.gate_place)
        slot_k, slot_v = map(after, (slot_k, slot_v), new)  # (B, C + n, H, d_head)
        place = torch.arange(n_tokens, device=x.device) - first  # of each token
        end = c * torch.arange(1 - C, n + 1, device=x.device)  # of each block
        now = place[n_tokens - q.size(1) :]  # (T,)
        scores = scores_of(q, after(slot_k, k), now, torch.cat([end - 1, place]))
        blocks, tokens = in_view(now, end, place, *self.sizes)
        seen = after(blocks, tokens).expand_as(scores)  # (B, H, T, K)
        if self.top_k:
            seen = seen | closer(scores, blocks, n_tokens, self.top_k, c)
        weights = scores.masked_fill(~seen, float("-inf")).softmax(dim=-1)
        heads = weights @ after(slot_v, v).transpose(1, 2)
        old = max(0, C + n - compressed_len)  # slots that go
        gone = c * (old if self.top_k else n)  # tokens that go
        return heads, (slot_k[:, old:], slot_v[:, old:], k[:, gone:], v[:, gone:])

# %% [markdown]
# Most of `forward` is bookkeeping: which blocks leave the window now, where tokens and blocks stand, what is
# dropped at the end. The checks: any segmentation gives the same; and the gate gets a gradient from what is read.

# %%
for top_k in (None, 2):
    torch.manual_seed(SEED)
    remember = Pooled(16, 2, mem_len=8, compressed_len=4, top_k=top_k).double()
    whole = by_parts(remember, text, 40)
    for size in (1, 7, 16):
        read = by_parts(remember, text, size)
        torch.testing.assert_close(read, whole, atol=1e-10, rtol=0)
    whole.square().sum().backward()
    gradient = remember.gate.grad.norm().item()
    print(f"top_k {top_k}: the same in any parts; gradient of the gate {gradient:.2f}")
    assert gradient > 0

# %% [markdown]
# ## 6.5 A state that is corrected
#
# Now without slots. **Linear attention** (Katharopoulos et al., 2020) leaves out the softmax. What a query reads is
# then $\sum_i v_i\,(k_i^\top q) = S q$, with one matrix for the whole past, $S = \sum_i v_i k_i^\top$ of
# `d_head` times `d_head` numbers. Each token adds to it, and it never grows. Let us store that key $b$ has the value
# 5, and then that it has the value 2:

# %%
b, five, two = torch.eye(4)[1], 5.0, 2.0  # b is a key of length 1; values are numbers here
S = five * b + two * b  # one row of S, since a value is one number
print(f"adding: after b=5 and b=2, what is b? {S @ b:.0f}")

# %% [markdown]
# It says 7. Adding does not replace. The **delta rule** does: first look what the state says for this key, $S k$,
# then write the *difference* between the value and that,
#
# $$
# S_t = S_{t-1} + \beta_t\,(v_t - S_{t-1} k_t)\, k_t^\top .
# $$
#
# With $\beta = 1$ and a key of length 1, afterwards $S_t k_t = v_t$ exactly; what $S$ says in directions at right angles to
# $k_t$ does not change. With $\beta = 0$ nothing is written. (It is a step of gradient descent on $\frac{1}{2} \lVert S k -
# v \rVert^2$: such a memory learns while it reads.)

# %%
S = torch.zeros(4)
for value in (five, two):
    S = S + 1.0 * (value - S @ b) * b
    print(f"the delta rule: b={value:.0f} written, what is b? {S @ b:.0f}")
assert S @ b == two

# %% [markdown]
# Two more numbers a token and head are learned: how strongly it writes, $\beta_t$, and how much of the old state is
# left before that, the **gate** $\alpha_t$ between 0 and 1. Together they are the gated delta rule (Yang et al., 2024),
#
# $$
# S_t = \alpha_t\, S_{t-1}\,(I - \beta_t k_t k_t^\top) + \beta_t v_t k_t^\top , \qquad y_t = S_t q_t ,
# $$
#
# which is what the code says, with $\alpha_t S_{t-1}$ in the place of $S_{t-1}$ above:

# %% tags=["from-module"]
def delta_rule(q, k, v, alpha, beta, S):
    """S <- alpha S (I - beta k k^T) + beta v k^T, then S q. Yang et al., "Gated Delta
    Networks" (2024), equation 10. q, k, v and S q (B, H, T, d_head), alpha and beta
    (B, H, T), S (B, H, d_head, d_head)."""
    read = []
    for t in range(q.size(2)):
        q_t, k_t, v_t = (part[:, :, t, :, None] for part in (q, k, v))  # columns
        S = alpha[:, :, t, None, None] * S
        S = S + beta[:, :, t, None, None] * (v_t - S @ k_t) @ k_t.mT
        read.append(S @ q_t)  # (B, H, d_head, 1)
    return torch.cat(read, dim=-1).mT, S

# %% [markdown]
# Token after token: a loop in Python, and no two tokens at once. The same numbers come from a form that takes a
# *chunk* of `w` tokens in one go. Let $S_0$ be the state before the chunk, $\gamma_t = \alpha_1 \cdots \alpha_t$
# what is left of it at token $t$, and $u_t = \beta_t\,(v_t - \alpha_t S_{t-1} k_t)$ what token $t$ writes. Then
# $S_t$ is what is left of everything written so far,
#
# $$
# S_t = \gamma_t S_0 + \sum_{i \le t} \frac{\gamma_t}{\gamma_i}\, u_i k_i^\top ,
# $$
#
# and if you put $S_{t-1}$ of this form into $u_t$, you get an equation for each token in which only earlier ones
# stand:
#
# $$
# u_t + \beta_t \sum_{i < t} \frac{\gamma_t}{\gamma_i}\,(k_i^\top k_t)\, u_i = \beta_t\,(v_t - \gamma_t S_0 k_t) .
# $$
#
# That is a triangular system of linear equations for all $u_t$ of the chunk, and one call solves it. Its matrix does
# not depend on $S_0$, so the systems of *all* chunks are solved at once. From chunk to chunk only the state is
# handed on. In the code, `decay` holds $\gamma_t / \gamma_i$.

# %% tags=["from-module"]
def chunked_delta_rule(q, k, v, alpha, beta, S, chunk_len=32):
    """The same, chunk by chunk: all that a chunk's tokens write solves one system."""
    T, log_alpha = q.size(2), alpha.clamp(min=1e-30).log()
    parts = q, k, v, log_alpha[..., None], beta[..., None]
    padded = (F.pad(part, (0, 0, 0, -T % chunk_len)) for part in parts)
    q, k, v, log_alpha, beta = (x.unflatten(2, (-1, chunk_len)) for x in padded)
    since = log_alpha.cumsum(dim=3)  # (B, H, G, w, 1): log of what is left by then
    decay, gamma = (since - since.mT).tril().exp().tril(), since.exp()
    system = (beta * decay * (k @ k.mT)).tril(-1)  # (B, H, G, w, w)
    right = beta * torch.cat([v, gamma * k], dim=-1)
    u = torch.linalg.solve_triangular(system, right, upper=False, unitriangular=True)
    own, of_S = u.chunk(2, dim=-1)  # (B, H, G, w, d_head) each
    look, read = decay * (q @ k.mT), []
    for g in range(q.size(2)):  # chunk after chunk, only S is handed on
        writes = own[:, :, g] - of_S[:, :, g] @ S.mT  # (B, H, w, d_head)
        of_before = gamma[:, :, g] * (q[:, :, g] @ S.mT)
        read.append(of_before + look[:, :, g] @ writes)
        new = (decay[:, :, g, -1, :, None] * writes).mT @ k[:, :, g]
        S = gamma[:, :, g, -1:] * S + new
    return torch.cat(read, dim=2)[:, :, :T], S

# %%
torch.manual_seed(SEED)
B, H, T, d_head = 2, 2, 100, 8
q, k, v = torch.randn(3, B, H, T, d_head, dtype=torch.float64)
alpha, beta = torch.rand(2, B, H, T, dtype=torch.float64)
S = torch.randn(B, H, d_head, d_head, dtype=torch.float64)
given = [x.requires_grad_() for x in (q, k, v, alpha, beta, S)]
results = []
for rule in (delta_rule, chunked_delta_rule):
    y, last = rule(q, F.normalize(k, dim=-1), v, alpha, 2 * beta, S)
    gradients = torch.autograd.grad(y.square().sum() + last.sum(), given)
    results.append([y, last, *gradients])
apart = max((a - b).abs().max().item() for a, b in zip(*results))
print(f"values, state and gradients differ by at most {apart:.0e}")
assert apart < 1e-10

# %% [markdown]
# And the time? Forward and backward through 1,024 tokens:

# %%
def forward_and_backward(rule, T):
    """A call of one of the rules, with four heads of 32 and its gradients."""
    x = torch.randn(3, 1, 4, T, 32, device=device, requires_grad=True)
    gates = torch.full((2, 1, 4, T), 0.9, device=device)
    S = torch.zeros(1, 4, 32, 32, device=device)

    def run():
        q, k, v = F.normalize(x, dim=-1)
        rule(q, k, v, *gates, S)[0].sum().backward()

    return run


timing = dict(warmup=1, rounds=3, device=device)
slow, fast = (
    measure.seconds(forward_and_backward(rule, 1024), **timing)
    for rule in (delta_rule, chunked_delta_rule)
)
print(f"token by token {1000 * slow:.0f} ms, in chunks {1000 * fast:.0f} ms")
print(f"in chunks it is {slow / fast:.0f} times as fast")
assert slow > 3 * fast

# %% [markdown]
# The module takes keys and queries at length 1, and learns $\alpha$ and $\beta$ from the state of each token.
# `strength` is the most that $\beta$ can be. Why it might be 2, section 6.8 will show.

# %% tags=["from-module"]
class Delta(nn.Module):
    """One state in each head, written by the gated delta rule.

    beta lies in 0 ... strength: at 1 the old value of a key goes, at 2 it becomes its
    opposite (Grazzi et al. 2024). Memory: S (B, H, d_head, d_head), keys in columns.
    """

    def __init__(self, d_model, n_heads, strength=1.0):
        super().__init__()
        inputs.check_number("strength", strength, 0, 2)
        self.strength, self.gates = strength, nn.Linear(d_model, 2 * n_heads)
        self.gates.bias.data[:n_heads] = 5.0  # alpha = .993: little is forgotten
        self.norm = nn.LayerNorm(d_model // n_heads)

    def empty(self, k):
        return (k.new_zeros(len(k), *k.shape[2:], k.size(-1)),)

    def forward(self, x, q, k, v, memory):
        four, wide = (q, k, v, self.gates(x)), torch.promote_types(x.dtype, torch.float)
        q, k, v, gates = (p.to(wide).transpose(1, 2) for p in four)
        alpha, beta = gates.sigmoid().chunk(2, dim=1)  # (B, H, T) each
        q, k, S = F.normalize(q, dim=-1), F.normalize(k, dim=-1), memory[0].to(wide)
        heads, S = chunked_delta_rule(q, k, v, alpha, self.strength * beta, S)
        return self.norm(heads.to(x.dtype)), (S.to(x.dtype),)

# %% [markdown]
# ## 6.6 The model, and depth by looping
#
# The layer is chapter 0's, class and all. Only its attention is given away: queries, keys and values go to
# `remember`, and what comes back goes on as always.

# %% tags=["from-module"]
class Layer(vanilla_transformer.Layer):
    """Chapter 0's layer, in which the heads read what `remember` remembers."""

    def __init__(self, remember, d_model, n_heads, d_ff, dropout):
        super().__init__(d_model, n_heads, d_ff, dropout)
        self.remember = remember

    def forward(self, x, memory):
        """x (B, T, d_model) -> (B, T, d_model), memory; None: of nothing."""
        attention, y = self.attention, self.norm_attention(x)
        qkv = attention.query_key_value(y).to(x.dtype)  # (B, T, 3 * d_model)
        q, k, v = qkv.unflatten(-1, (3, attention.n_heads, -1)).unbind(2)
        memory = inputs.checked_memory(memory, self.remember.empty(k))
        heads, memory = self.remember(y, q, k, v, memory)  # (B, H, T, d_head)
        x = x + self.dropout(attention.out(heads.transpose(1, 2).flatten(2)))
        return x + self.dropout(self.feed_forward(self.norm_feed_forward(x))), memory

# %% [markdown]
# The fifth idea of today is one line in the model: run the layers several times (**looped depth**). Feedback let
# the lowest layer read what the highest found, at the next token. A looped model lets the lowest layer read it *at
# the same token*, once more through the same weights. Huginn and Ouro (2025) do that at scale. It makes a
# deeper model with no more parameters, and each loop has a memory of its own:
#
# $$
# x \leftarrow \text{layers}(x) \quad \text{n\_loops times.}
# $$

# %% tags=["from-module"]
class MemoryToday(nn.Module):
    """A language model whose layers remember in one of the ways of KINDS.

    tokens (B, T) int64, memory -> logits (B, T, vocab_size), memory: the kind's, for
    each layer of each loop, detached. The layers run n_loops times. Settings: its own.
    """

    KINDS = {"cache": Cache, "pooled": Pooled, "delta": Delta}

    def __init__(
        self, vocab_size, kind="cache", d_model=128, n_heads=4, n_layers=4, d_ff=512,
        n_loops=1, dropout=0.0, **settings,
    ):  # fmt: skip
        super().__init__()
        inputs.check_sizes(locals())
        inputs.check_one_of("kind", kind, self.KINDS)
        inputs.check_even("d_model / n_heads", d_model // n_heads)
        self.n_loops, self.dropout = n_loops, nn.Dropout(dropout)
        self.embedding = nn.Embedding(vocab_size, d_model)
        remember, sizes = self.KINDS[kind], (d_model, n_heads, d_ff, dropout)
        memories = [remember(d_model, n_heads, **settings) for _ in range(n_layers)]
        self.layers = nn.ModuleList(Layer(memory, *sizes) for memory in memories)
        self.norm, self.head = nn.LayerNorm(d_model), nn.Linear(d_model, vocab_size)

    def forward(self, tokens, memory=None):
        inputs.check_tokens(tokens, self.embedding.num_embeddings)
        x = self.dropout(self.embedding(tokens))  # (B, T, d_model)
        updated, stack = [], [*self.layers] * self.n_loops
        for layer, past in zip(stack, inputs.by_layer(memory, len(stack))):
            x, new = layer(x, past)
            updated.append(tuple(part.detach().clone() for part in new))
        return self.head(self.norm(x)), updated

# %%
def numbers(model):
    """How many numbers a model learns."""
    return sum(p.numel() for p in model.parameters())


torch.manual_seed(SEED)
once = MemoryToday(10, d_model=32, n_heads=2, n_layers=2, d_ff=64, mem_len=8)
looped = MemoryToday(10, d_model=32, n_heads=2, n_layers=2, d_ff=64, mem_len=8, n_loops=3)
looped.load_state_dict(once.state_dict())
unrolled = MemoryToday(10, d_model=32, n_heads=2, n_layers=6, d_ff=64, mem_len=8)
unrolled.load_state_dict(once.state_dict(), strict=False)
for n, layer in enumerate(unrolled.layers):
    layer.load_state_dict(once.layers[n % 2].state_dict())
tokens = torch.randint(10, (2, 20))
torch.testing.assert_close(looped(tokens)[0], unrolled(tokens)[0])
print("three loops of two layers compute what six layers of equal weights compute,")
print(f"with {numbers(looped):,} parameters in place of {numbers(unrolled):,}")

# %% [markdown]
# ## 6.7 Recall by age
#
# Back to the recall task, with five seeds of each memory, at the 8 KiB a layer of section 6.1. That is 16 keys and
# values of 64 numbers. Or it is two heads whose states are 32 x 32: one state for all of the past in the space of 16
# slots. The looped model has two loops, so two memories a layer, of half the length.

# %% tags=["band"]
RECALL = dict(vocab_size=tasks.RECALL_VOCAB, d_model=64, n_heads=4, n_layers=2)
RECALL |= dict(d_ff=256)
MEMORIES = {
    "window": dict(mem_len=16),
    "last queries": dict(mem_len=16, n_used=12, decay=0.0),
    "all queries": dict(mem_len=16, n_used=12, decay=1.0),
    "pooled": dict(kind="pooled", mem_len=8, compressed_len=8),
    "delta rule": dict(kind="delta", n_heads=2),
    "looped window": dict(mem_len=8, n_loops=2),
}


def recaller(name, seed, steps=2500):
    """A model with one of the memories, trained on the recall task."""
    torch.manual_seed(seed)
    model = MemoryToday(**RECALL | MEMORIES[name]).to(device)
    stream = tasks.recall(32, 16, seed=1000 + seed)
    training.train(model, stream, steps=steps, lr=2e-3, progress=False)
    return model


@torch.no_grad()
def exam(model, n_segments=80, skip=20):
    """Shares of right answers at ages 1 to 16, ..., 177 to 192, in a new stream."""
    memory, right, ages = None, [], []
    stream = tasks.recall(64, 16, seed=10**6)
    for n, (tokens, targets, _, age) in zip(range(n_segments), stream):
        logits, memory = model(tokens.to(device), memory)
        if n >= skip:  # the memories are full
            asked = targets >= 0
            right.append((logits.argmax(dim=-1).cpu() == targets)[asked])
            ages.append((age[asked] - 1) // 16)
    right, bucket = torch.cat(right), torch.cat(ages)
    n_asked = bucket.bincount(minlength=12)[:12]
    return (bucket[right].bincount(minlength=12)[:12] / n_asked).tolist()


def recall_scores(seed):
    return {name: exam(recaller(name, seed)) for name in MEMORIES}

# %%
live = {name: recaller(name, SEED) for name in ("last queries", "pooled", "delta rule")}
recall = {name: exam(model) for name, model in live.items()}
recall_band = bands.load("06_recall_scores", text=None)
recall_band.check(recall, margin=0.15)

# %% jupyter={"source_hidden": true} tags=["hide-input"]
def recall_figure(names, title, alt):
    """Right answers by age: seeds in grey, this run or the mean of the seeds on top."""
    figure, axes = plt.subplots(figsize=(6.4, 3.8))
    for name in names:
        values = {**old_ways, **recall_band.values}[name]
        figures.band(axes, AGES, values, "recorded seeds" if name == names[-1] else "_")
        run = recall.get(name, values.mean(axis=0))
        label = name if name in recall else f"{name} (mean of the seeds)"
        axes.plot(AGES, run, label=label, **LOOK[name])
    ages_axes(axes, title)
    axes.legend(fontsize=8, loc=(0.36, 0.5))
    figures.show(figure, alt)


recall_figure(
    ["Transformer-XL", "Compressive", "last queries", "pooled", "delta rule"],
    "8 KiB a layer: how far back?",
    "The delta rule is right at all ages up to 192. The cache of what the last queries "
    "used is right seven times in ten for young answers and nearly half of the time for "
    "the oldest. Pooling is right up to an age of 64 and guesses from 80 on, earlier than the "
    "Compressive Transformer.",
)

# %%
def state_bytes(model, n_tokens=64):
    """Bytes that a model holds of one text after n_tokens."""
    text = torch.zeros(1, n_tokens, dtype=torch.int64, device=device)
    memory = None
    for part in text.split(16, dim=1):
        _, memory = model(part, memory)
    return measure.nbytes(memory)


def recall_row(name):
    values = recall_band.values[name].mean(axis=0)  # (12,)
    space = state_bytes(MemoryToday(**RECALL | MEMORIES[name]).to(device))
    return [name, f"{space / 1024:.1f}", *(f"{values[n]:.2f}" for n in (0, 4, 7, 11))]


figures.table(
    "Right answers by age, mean of the recorded seeds",
    ["", "state (KiB)", "1 to 16", "65 to 80", "113 to 128", "177 to 192"],
    [recall_row(name) for name in MEMORIES],
)

# %% tags=["band"]
LESSONS = [(2, 100), (4, 100), (8, 150), (16, 200), (32, 250)]  # swaps in a game, steps
STRENGTHS = {"up to 1": 1.0, "up to 2": 2.0}
COUNTS = [1, 2, 4, 8, 16, 32, 64, 128]


def tracker(name, seed):
    """A delta rule of one layer that has taken the lessons."""
    torch.manual_seed(seed)
    sizes = dict(d_model=64, n_heads=4, n_layers=1, d_ff=256)
    model = MemoryToday(10, "delta", **sizes, strength=STRENGTHS[name]).to(device)
    for length, steps in LESSONS:
        games = tasks.cups(128, length, seed=1000 * seed + length)
        how = dict(warmup=20, clip=0.1, progress=False)
        training.train(model, games, steps=steps, **how)
    return model


@torch.no_grad()
def followed(model):
    """Shares of right answers after each of COUNTS swaps, in 500 new games of 128."""
    tokens, targets, _ = next(tasks.cups(500, COUNTS[-1], seed=10**6))
    answers = model.eval()(tokens.to(device))[0].argmax(dim=-1).cpu()
    right = (answers == targets).float().mean(dim=0)
    return [right[n - 1].item() for n in COUNTS]


def ball_scores(seed):
    return {name: followed(tracker(name, seed)) for name in STRENGTHS}

# %% tags=["band"]
N_SYMBOLS, TRIGGERS, START = 32, 4, 32
TABLE = 2.5 * torch.randn(32, 32, generator=torch.Generator().manual_seed(5))


def echoes(batch_size, length, seed):
    """Texts of a start token and symbols that follow a fixed table of chances. After one
    of the symbols 0 to 3, the symbol before it comes once more."""
    dice = torch.Generator().manual_seed(seed)
    chances = TABLE.softmax(dim=-1)
    while True:
        first = torch.randint(N_SYMBOLS, (batch_size,), generator=dice)
        text = [torch.full((batch_size,), START), first]
        while len(text) <= length:
            new = torch.multinomial(chances[text[-1]], 1, generator=dice)[:, 0]
            echo = (text[-1] < TRIGGERS) & (text[-2] != START)
            text.append(torch.where(echo, text[-2], new))
        text = torch.stack(text, dim=1)  # (B, length + 1)
        yield text[:, :-1], text[:, 1:], True

# %% tags=["band"]
SPANS = [0, 32, 64, 128, 256, 512]  # tokens read


def lone_head(seed):
    """One layer with one head, trained on texts of 64 tokens, each read whole."""
    torch.manual_seed(seed)
    sizes = dict(d_model=64, n_heads=1, n_layers=1, d_ff=128, mem_len=64)
    model = MemoryToday(N_SYMBOLS + 1, **sizes).to(device)
    how = dict(steps=800, lr=1e-2, weight_decay=0.0, progress=False)
    training.train(model, echoes(64, 64, seed), **how)
    return model


@torch.inference_mode()
def streamed(model, mem_len, n_sinks):
    """Nats in each of SPANS, along texts of 512 that are read token by token."""
    cache, memory, losses = model.layers[0].remember, None, []
    cache.mem_len, cache.n_sinks = mem_len, n_sinks
    tokens, targets, _ = next(echoes(64, SPANS[-1], seed=10**6))
    for n in range(SPANS[-1]):
        logits, memory = model(tokens[:, n : n + 1].to(device), memory)
        new = F.cross_entropy(logits[:, 0].cpu(), targets[:, n], reduction="none")
        losses.append(new.mean().item())
    return [sum(losses[a:b]) / (b - a) for a, b in zip(SPANS, SPANS[1:])]


def sink_scores(seed):
    model = lone_head(seed)
    ways = {"window": (63, 0), "window and sink": (63, 1), "everything": (512, 0)}
    return {name: streamed(model, *way) for name, way in ways.items()}

# %% tags=["band"]
SIZES = dict(d_model=64, n_heads=4, n_layers=2, d_ff=256)
STEPS = 250  # of 512 characters, as in chapter 5
MINUTES = {  # steps that take as long as 300 of vanilla
    "window": 225, "last queries": 225, "pooled": 210, "delta rule": 180,
    "looped window": 140,
}  # fmt: skip


def fit(name, seed, steps):
    """A model with one of the memories, trained on text in segments of 32."""
    torch.manual_seed(seed)
    model = MemoryToday(len(corpus.vocab), **SIZES | MEMORIES[name]).to(device)
    how = dict(batch_size=16, segment_len=32, progress=False)
    training.train(model, corpus.train, steps=steps, **how)
    return model


def text_loss(model):
    """Nats per character on the part of the validation text that chapter 5 takes."""
    text = corpus.valid[: 16 * 1024 + 1]
    return training.evaluate(model, text, batch_size=16, segment_len=32)


def text_scores(seed):
    values = {name: text_loss(fit(name, seed, STEPS)) for name in MINUTES}
    races = {f"{name}, minutes": fit(name, seed, n) for name, n in MINUTES.items()}
    return values | {name: text_loss(model) for name, model in races.items()}
