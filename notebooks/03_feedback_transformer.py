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
# # 3. The Feedback Transformer: let the bottom see the top

# %% [markdown] tags=["badges"]
# [Open in Colab](https://colab.research.google.com/github/memtx-minimal/memtx-minimal/blob/main/notebooks/03_feedback_transformer.ipynb) · [Download this notebook](https://github.com/memtx-minimal/memtx-minimal/raw/main/notebooks/03_feedback_transformer.ipynb)

# %% [markdown]
# In a transformer, layer 1 never learns what layer 4 found out, not even one token later. Each
# layer sees only the layer below it, so what a layer has found out can be worked on further by
# the layers above it, and by nothing else. The **Feedback Transformer** ([Fan et al.,
# 2020](https://arxiv.org/abs/2002.09402)) lifts this limit: at each token the outputs of *all*
# layers are mixed into one memory vector, and *every* layer of every later token attends to these
# vectors. The price is that tokens can no longer be computed side by side. The chapter shows what
# one gains, and how to keep the price low.
#
# **When you have read it, you can**
# - say what a transformer of fixed depth cannot compute, and show it in an experiment;
# - write a transformer with feedback memory, with keys and values for each layer or shared;
# - write a backward pass by hand for a whole segment of a recurrent model, and test it;
# - shorten its training with the two aids of the paper, and measure what generation and memory
# cost.
#
# **You need** PyTorch, and attention with queries, keys and values. Chapter 1 helps, and is not
# needed.
#
# **Time and memory.** The budget of the whole notebook is 8 minutes and 2 GiB on two CPU cores.
# It trains some twenty small models while you read. The last cell prints what it took on your
# machine.

# %% tags=["colab-install"]
import subprocess
import sys

if "google.colab" in sys.modules:  # anywhere else this cell does nothing; Colab keeps its own torch
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps"]
    subprocess.check_call([*pip, "pooch", "git+https://github.com/memtx-minimal/memtx-minimal"])

# %%
import math
import time
from functools import partial
from typing import NamedTuple

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import Function, once_differentiable
from torch.nn.functional import pad

from memtx_minimal import corpora, figures, inputs, measure, tasks, training
from memtx_minimal.transformer_xl import TransformerXL
from memtx_minimal.vanilla_transformer import VanillaTransformer

started = time.perf_counter()
figures.use_style()
device = training.best_device()
SEED = 0
print(f"PyTorch {torch.__version__} on {device}")

# %% [markdown]
# One legend of letters for all the shapes in this course:
#
# | letter | meaning | letter | meaning |
# | --- | --- | --- | --- |
# | `B` | batch: texts side by side | `H` | attention heads |
# | `T` | tokens in the segment | `d_model` | width of a hidden state |
# | `M` | vectors in memory | `d_head` | width of a head, `d_model / H` |
# | `K` | keys: what a step may see | `L` | layers |
#
# And one picture of the idea: who may look at whom. Positions run across, layers go up. Blue is
# computed now. Orange was computed earlier and is read. Grey is not read. Look at where the lines
# to layer 1 come from.

# %%
def unrolled_feedback(axes, n_layers, n_positions, now):
    """Feedback memory: each step mixes its states into one vector, on top; each layer reads the vectors."""
    top = n_layers + 1
    for i in range(now + 1):
        color = figures.BLUE if i == now else figures.GREY
        axes.plot([i] * (top + 1), range(top + 1), color=color, linewidth=2.5, zorder=0)
    for j in range(now):
        for layer in range(1, top):
            axes.plot([j, now], [top, layer], color=figures.ORANGE, linewidth=0.9, alpha=0.55, zorder=1)
    for layer in range(top):
        colors = [figures.BLUE if i == now else figures.GREY for i in range(n_positions)]
        axes.scatter(range(n_positions), [layer] * n_positions, s=60, color=colors, zorder=2)
    axes.scatter(range(now), [top] * now, s=80, marker="s", color=figures.ORANGE, zorder=2)
    axes.scatter([now], [top], s=80, marker="s", color=figures.BLUE, zorder=2)
    names = ["text", *(f"layer {n}" for n in range(1, top)), "memory"]
    axes.set_yticks(range(top + 1), labels=names)
    axes.set(title="Feedback: all layers of now read all layers of before", xticks=[])
    axes.set(xlim=(-0.7, n_positions - 0.3), ylim=(-0.4, top + 0.4))
    axes.grid(False)
    for spine in axes.spines.values():
        spine.set_visible(False)

# %%
figure, axes = plt.subplots(3, 1, figsize=(6.4, 7.2))
figures.unrolled(
    axes[0], 3, 8, now=range(4, 8), sees=lambda i: range(4, i + 1),
    title="Vanilla: the layer below, in the window",
)
figures.unrolled(
    axes[1], 3, 8, now=range(4, 8), cached=range(4), sees=lambda i: range(i + 1),
    title="Transformer-XL: the layer below, and its past",
)
unrolled_feedback(axes[2], 3, 8, now=7)
figures.show(
    figure,
    "Three networks unrolled over the text. Vanilla: each layer sees the layer below within the window. "
    "Transformer-XL: the same, and remembered states of the layer below. Feedback: each earlier step has one "
    "memory square above its layers, and lines lead from all squares down to every layer of the current step.",
)

# %% [markdown]
# ## 3.1 The problem: depth is the only clock
#
# A ball lies under the first of five cups. Each token swaps two cups. After each swap, where is
# the ball? The task is simple for anyone with a memory of one number: keep the place, update it
# at each swap. Counting the swaps does not help, since their order matters.

# %%
pairs = torch.combinations(torch.arange(5))  # (10, 2): what the ten tokens mean
tokens, targets, _ = next(tasks.cups(batch_size=1, segment_len=8, seed=SEED))
for token, cup in zip(tokens[0], targets[0]):
    a, b = pairs[token].tolist()
    print(f"token {token}: swap cups {a} and {b}   the ball is now under cup {cup}")

# %% [markdown]
# Now give it to a vanilla transformer of four layers. It learns from short games first and then
# from longer ones, up to 32 swaps; a later section asks whether such lessons help.

# %%
GAMES = dict(vocab_size=len(pairs), d_model=64, n_heads=4, d_ff=256)
LESSONS = [(2, 150, 1e-2), (4, 250, 1e-2), (8, 150, 1e-2), (16, 80, 5e-3), (32, 40, 1e-3)]


def learn(model, lessons, scale=1.0, seed=SEED):
    """Train on games: lessons is a list of (length of a game, steps, learning rate)."""
    for length, steps, lr in lessons:
        games = tasks.cups(batch_size=128, segment_len=length, seed=1000 * seed + length)
        training.train(model, games, steps=steps, lr=scale * lr, warmup=20, clip=0.1)


@torch.no_grad()
def exam(model, length=32):
    """After each swap, in new games: share of right answers, loss in nats, (length,) each."""
    tokens, targets, _ = next(tasks.cups(batch_size=1000, segment_len=length, seed=10**6 + SEED))
    logits = model.eval()(tokens.to(device))[0].cpu()  # (1000, length, vocab_size)
    right = (logits.argmax(dim=-1) == targets).float()  # (1000, length)
    return right.mean(dim=0), F.cross_entropy(logits.mT, targets, reduction="none").mean(dim=0)


torch.manual_seed(SEED)
deep = VanillaTransformer(**GAMES, n_layers=4, max_len=32).to(device)
learn(deep, LESSONS, scale=0.3)  # at the full rates it does worse
found = {"vanilla, 4 layers": exam(deep)[0]}

# %%
figure, axes = plt.subplots()
figures.curves(axes, range(1, 33), found, marker="o", xlabel="swaps so far", ylabel="share of right answers")
axes.axhline(0.2, color="black", linestyle=":")
axes.set(ylim=(0, 1.03), title="Four layers lose the ball (cups)")
figures.show(
    figure,
    "Share of right answers by number of swaps for the vanilla model with four layers: right after the first "
    "swaps, then falling towards the dotted line of pure guessing at one in five.",
)
print(f"right answers over all positions: {found['vanilla, 4 layers'].mean():.2f}")
assert found["vanilla, 4 layers"].mean() < 0.6 and found["vanilla, 4 layers"][-1] < 0.4

# %% [markdown]
# It follows a few swaps and then guesses. (The dotted line is pure guessing.) A state of layer
# $l$ depends on states of layer $l-1$ alone. One layer can merge a few swaps into one, and the next
# can merge what the first has merged. But a fixed number of layers merges only so many: the model
# has 32 tokens of text, and four ticks of a clock. Longer games take more layers (at best, the
# number grows with the logarithm of the length: Liu et al., 2023).
#
# ## 3.2 One memory for all layers
#
# Let $x_t^0$ be the embedding of token $t$, and $x_t^1 \ldots x_t^L$ the outputs of the layers.
# The paper changes what layer $l$ attends to. No longer the layer below, but memory vectors of
# the steps before:
#
# $$
# z_t^l = \text{Attention}\left(x_t^{l-1},\; \left[m_{t-\tau}, \ldots, m_{t-1}\right]\right) , \qquad
# m_t = \sum_{l=0}^{L} \text{softmax}(w)_l \; x_t^l .
# $$
#
# $\tau$ is the length of the memory, `mem_len` in the code, and $w$ are $L+1$ learned numbers,
# one set for the whole model. From $z_t^l$ the layer goes on as always, through residual and
# feed-forward, to $x_t^l$. The attention ends at $m_{t-1}$: step $t$ cannot read its own memory
# vector, which does not exist yet.
#
# The layer is an ordinary one, except that it looks at *one* step, and that it is handed its keys
# and values.

# %% tags=["from-module"]
class Layer(nn.Module):
    """One layer at one step: attention to memory, feed-forward; a residual around each."""

    def __init__(self, d_model, n_heads, d_ff, dropout):
        super().__init__()
        self.n_heads = n_heads
        self.query = nn.Linear(d_model, d_model, bias=False)
        self.out = nn.Linear(d_model, d_model, bias=False)
        self.feed_forward = nn.Sequential(
            nn.Linear(d_model, d_ff), nn.ReLU(), nn.Linear(d_ff, d_model)
        )
        self.norm_attention = nn.LayerNorm(d_model)
        self.norm_feed_forward = nn.LayerNorm(d_model)
        self.dropout = nn.Dropout(dropout)

    def attention(self, x, keys, values):
        """x (B, d_model), keys and values (B, H, K, d_head) -> like x."""
        q = self.query(x).unflatten(-1, (self.n_heads, 1, -1))  # (B, H, 1, d_head)
        scores = q.size(-1) ** -0.5 * q @ keys.mT  # (B, H, 1, K)
        weights = self.dropout(scores.softmax(dim=-1))
        return self.out((weights @ values).flatten(1))  # (B, d_model)

    def forward(self, x, keys, values):
        """x (B, d_model) and what the step sees -> the step's new state (B, d_model)."""
        x = x + self.dropout(self.attention(self.norm_attention(x), keys, values))
        return x + self.dropout(self.feed_forward(self.norm_feed_forward(x)))

# %%
torch.manual_seed(SEED)
layer = Layer(d_model=16, n_heads=2, d_ff=32, dropout=0.0)
x = torch.randn(3, 16)  # (B, d_model): one step of three texts
for K in (0, 5):
    out = layer(x, keys=torch.randn(3, 2, K, 8), values=torch.randn(3, 2, K, 8))
    print(f"K = {K}: x", tuple(x.shape), "-> out", tuple(out.shape))

# %% [markdown]
# With `K = 0` there is nothing to attend to, and attention adds nothing: that is the first step
# of a text.
#
# ### The memory
#
# `vector` is the mixture above. `keys_values` makes keys and values from memory vectors, side by
# side in one tensor: keys are `kv[:, 0]`, values are `kv[:, 1]`. Two details count. The vectors
# are **normalised first**, as the states in a pre-LN layer are. And `shared_kv` decides whether
# all layers share one projection to keys and values. In the paper's first version each layer has
# its own; its second version shares one, so that each vector is projected *once* and the cache
# holds one key and one value for each token, whatever the depth.
#
# `seen` picks the window and tells the order. The score of a query with the key of age $a = t -
# j$ is
#
# $$
# \frac{1}{\sqrt{d_{\text{head}}}}\; q^\top \left(k_j + p_a\right) ,
# $$
#
# with one learned vector $p_a$ for each age, shared by all layers and heads, as in the authors'
# released code. Without $p$ the memory would be a set: attention has no other way to tell
# yesterday from last year.

# %% tags=["from-module"]
class Memory(nn.Module):
    """From the states of a step to a memory vector, and from there to keys and values."""

    def __init__(self, d_model, n_heads, n_layers, mem_len, shared_kv):
        super().__init__()
        self.n_heads = n_heads
        self.layer_weights = nn.Parameter(torch.zeros(n_layers + 1))
        self.norm = nn.LayerNorm(d_model)
        n_kv = 1 if shared_kv else n_layers
        self.key_value = nn.Linear(d_model, n_kv * 2 * d_model, bias=False)
        self.positions = nn.Parameter(torch.randn(mem_len, d_model // n_heads))

    def vector(self, states):
        """The mixture: L + 1 states (B, d_model), embedding first -> (B, d_model)."""
        weights = self.layer_weights.softmax(dim=0)
        return torch.einsum("l,lbd->bd", weights, torch.stack(states))

    def keys_values(self, vectors):
        """(B, n, d_model) -> (n_kv, 2, B, H, n, d_head): keys and values."""
        kv = self.key_value(self.norm(vectors))  # (B, n, n_kv * 2 * d_model)
        kv = kv.unflatten(-1, (-1, 2, self.n_heads, self.positions.size(1)))
        return kv.permute(2, 3, 0, 4, 1, 5)  # (n_kv, 2, B, H, n, d_head)

    def seen(self, kv, mem_len):
        """The latest mem_len: keys with their ages, values, (n_kv, B, H, K, d_head)."""
        keys, values = kv[..., -mem_len:, :].unbind(1)
        positions = self.positions[len(self.positions) - keys.size(-2) :]  # ages K ... 1
        return keys + positions, values.clone()  # not a view, which would keep all of kv

# %%
torch.manual_seed(SEED)
small = Memory(d_model=16, n_heads=2, n_layers=3, mem_len=5, shared_kv=True)
states = [torch.randn(1, 16) for _ in range(4)]  # the embedding and three layers
vectors = torch.stack([small.vector(states)] * 7, dim=1)  # (B, 7, d_model): seven steps, all alike
kv = small.keys_values(vectors)
print("keys and values", tuple(kv.shape))
keys, values = small.seen(kv, mem_len=5)
print("seen: keys", tuple(keys.shape), " values", tuple(values.shape))
assert torch.allclose(small.vector(states), torch.stack(states).mean(dim=0))  # w = 0: a plain mean

# %% [markdown]
# Equal vectors have equal keys, but not once the ages are added:

# %%
figure, axes = plt.subplots(1, 2, figsize=(6.4, 2.8), sharey=True)
before = kv[0, 0, 0, 0].detach().T  # keys of the first head: (d_head, 7)
figures.matrix(axes[0], before, title="keys of equal vectors", xlabel="slot", ylabel="dimension")
figures.matrix(axes[1], keys[0, 0, 0].detach().T, title="as they are seen", xlabel="age", ylabel="")
axes[1].set_xticks(range(5), labels=range(5, 0, -1))
figures.show(
    figure,
    "Two heat maps of keys. Left: seven equal columns. Right: the latest five with the vector of their age "
    "added, and no two columns are alike.",
)

# %% [markdown]
# ### Step after step
#
# One token goes up through all layers and leaves one memory vector. A segment is one token after
# the other.

# %% tags=["from-module"]
def step(model, x, kv):
    """One token x (B, d_model) -> its output and its memory vector, (B, d_model) each."""
    keys, values = model.memory.seen(kv, model.mem_len)
    states = [x]
    for n, layer in enumerate(model.layers):
        n_kv = n % len(keys)  # 0 where the layers share keys and values
        states.append(layer(states[-1], keys[n_kv], values[n_kv]))
    return states[-1], model.memory.vector(states)

# %% tags=["from-module"]
def loop(model, x, kv):
    """Step by step: x (B, T, d_model) -> outputs, vectors, keys and values with T more."""
    outputs, vectors = [], []
    for x_t in x.unbind(dim=1):
        output, vector = step(model, x_t, kv)
        kv = torch.cat([kv, model.memory.keys_values(vector[:, None])], dim=-2)
        outputs.append(output)
        vectors.append(vector)
    return torch.stack(outputs, dim=1), torch.stack(vectors, dim=1), kv

# %% [markdown]
# What is the memory between two calls? While you train, it is the **vectors** $m$. Their keys and
# values are computed again at the start of the next segment: no gradient flows into the old
# vectors, but the projections still learn from them.
#
# Without gradients, it is the **keys and values themselves**, and nothing is ever computed twice.
# Nor should anything be copied twice: a cache that is joined anew for each token moves its whole
# past each time. So it has room at its end, and the next token writes its key and value there.
# But a memory is a value in the hands of the caller, who may go on from it twice, to compare two
# continuations of a text. The second would write over the first. One number, known to all who
# share the slots, prevents it: the first to go on takes the room, and the second gets a copy.

# %%
ROOM = 64  # slots that a cache keeps free for what comes next

# %% tags=["from-module"]
class Cache(NamedTuple):
    """Memory without gradients: keys and values in slots, with room behind them.

    The first to go on with the text writes into the room. Anybody else who goes on from
    the same place gets a copy. So what a cache holds never changes.
    """

    kv: torch.Tensor  # (n_kv, 2, B, H, slots, d_head)
    end: int  # this text's slots are those before it
    taken: list  # of one number: the slots taken by any of the caches that share them

    @classmethod
    def of(cls, kv):
        """A cache with slots of its own, and no room yet."""
        n = kv.size(-2)
        return cls(kv.contiguous(), n, [n])

    def latest(self, n):
        """Keys and values of the latest n slots, or of all."""
        return self.kv[..., max(0, self.end - n) : self.end, :]

    def with_more(self, T, mem_len):
        """A cache with T more slots, to be filled in: these slots, if there is room."""
        end = self.end + T
        if self.taken[0] == self.end and end <= self.kv.size(-2):
            self.taken[0] = end
            return self._replace(end=end)
        kv, room = self.latest(mem_len), max(T, ROOM) if self.end else T
        end = kv.size(-2) + T
        return Cache(pad(kv, (0, 0, 0, room)), end, [end])

# %%
cache = Cache(torch.zeros(1, 2, 1, 1, 3, 4), end=3, taken=[3])  # three slots, all of them in use
first = cache.with_more(T=1, mem_len=6)  # no room: copied, and given some
second = first.with_more(T=1, mem_len=6)  # in place
other = first.with_more(T=1, mem_len=6)  # the slot behind `first` is taken: copied
for name, c in [("cache", cache), ("first", first), ("second", second), ("other", other)]:
    print(f"{name:6} holds {c.end} slots; {c.taken[0]} of {c.kv.size(-2)} are taken")
assert second.kv.data_ptr() == first.kv.data_ptr() != other.kv.data_ptr()

# %% [markdown]
# `recall` takes what the caller hands in, and refuses what does not fit. Two short functions then
# run the steps, one for each kind of memory. (`by_hand`, `segment` and `run` are a faster way
# through the steps, the subject of section 3.3. Until then there is `loop`.)

# %% tags=["from-module"]
def recall(model, memory, x):
    """The caller's memory, checked -> vectors with gradients, a Cache without."""
    ages, trains = len(model.memory.positions), torch.is_grad_enabled()
    inputs.check_number("mem_len", model.mem_len, 1, ages)
    if trains and isinstance(memory, Cache):
        raise ValueError("a memory made under no_grad does not train: start with None")
    if isinstance(memory, Cache):
        by_stream = (2, 4), (0, 1)  # (B, slots, n_kv, 2, H, d_head)
        like = model.memory.keys_values(x[:, :0]).type_as(x).movedim(*by_stream)
        inputs.checked_memory(memory.kv.movedim(*by_stream), like)
        return memory
    memory = inputs.checked_memory(memory, x[:, :0].detach())  # nothing yet: (B, 0, d_model)
    return memory if trains else Cache.of(model.memory.keys_values(memory).type_as(x))

# %% tags=["from-module"]
def from_vectors(model, x, vectors, by_hand):
    """x (B, T, d_model) -> outputs, memory. Old vectors get keys and values anew."""
    run_steps = segment if by_hand else loop
    outputs, new, *_ = run_steps(model, x, model.memory.keys_values(vectors))
    memory = torch.cat([vectors, new], dim=1)[:, -model.mem_len :]
    return outputs, memory.detach().clone()

# %% tags=["from-module"]
def from_cache(model, x, cache, by_hand):
    """x (B, T, d_model) -> outputs, memory. Nothing is computed twice."""
    if by_hand:
        cache = cache.with_more(x.size(1), model.mem_len)
        outputs, _ = run(x, cache.latest(cache.end)[0], *weights_of(model)).results()
        if cache.kv.size(-2) <= model.mem_len + ROOM:
            return outputs, cache
        kv = cache.latest(model.mem_len)  # of a long text, only the end is remembered
    else:
        outputs, _, kv = loop(model, x, cache.latest(model.mem_len))
    return outputs, Cache.of(kv[..., -model.mem_len :, :])

# %% [markdown]
# The model holds it together, and keeps the protocol of this course: memory goes in and comes
# out, detached, and no step sees more than `mem_len` of it.

# %% tags=["from-module"]
class FeedbackTransformer(nn.Module):
    """A language model whose every layer reads one memory of what all layers found before.

    tokens (B, T) int64, memory -> logits (B, T, vocab_size), memory. Pass None at the start
    of a stream. With gradients memory is the latest mem_len vectors, (B, M, d_model),
    detached; without, it is a Cache of their keys and values. mem_len may be lowered at any
    time. shared_kv: one projection to keys and values for all layers, or one for each.
    by_hand: the backward pass of feedback_segment.py, where it applies (shared_kv, no
    dropout at work), or always autograd's.
    """

    def __init__(
        self, vocab_size, d_model=128, n_heads=4, n_layers=4, d_ff=512,
        mem_len=64, shared_kv=True, by_hand=True, dropout=0.0,
    ):  # fmt: skip
        super().__init__()
        inputs.check_sizes(locals())
        inputs.check_number("mem_len", mem_len, 1)
        self.mem_len, self.shared_kv, self.by_hand = mem_len, shared_kv, by_hand
        self.embedding = nn.Embedding(vocab_size, d_model)
        self.dropout = nn.Dropout(dropout)
        stack = (Layer(d_model, n_heads, d_ff, dropout) for _ in range(n_layers))
        self.layers = nn.ModuleList(stack)
        self.memory = Memory(d_model, n_heads, n_layers, mem_len, shared_kv)
        self.norm, self.head = nn.LayerNorm(d_model), nn.Linear(d_model, vocab_size)

    def forward(self, tokens, memory=None):
        inputs.check_tokens(tokens, self.embedding.num_embeddings)
        x = self.dropout(self.embedding(tokens))  # (B, T, d_model)
        memory = recall(self, memory, x)
        dropout = self.training and self.dropout.p > 0
        by_hand = self.by_hand and self.shared_kv and not dropout
        run_steps = from_vectors if torch.is_grad_enabled() else from_cache
        outputs, memory = run_steps(self, x, memory, by_hand)
        return self.head(self.norm(outputs)), memory

# %%
torch.manual_seed(SEED)
tiny = FeedbackTransformer(10, d_model=16, n_heads=2, n_layers=3, d_ff=32, mem_len=6, by_hand=False)
text = torch.randint(10, (2, 12))  # (B, 12)
memory = None
for segment_ in text.split(4, dim=1):
    logits, memory = tiny(segment_, memory)
    print("training:   logits", tuple(logits.shape), " memory", tuple(memory.shape))
with torch.no_grad():
    logits, memory = tiny(text)
print("generating: logits", tuple(logits.shape), " keys and values", tuple(memory.kv.shape))

# %% [markdown]
# Every step sees the latest `mem_len` vectors, and it does not matter where the text was cut:
# token by token, in segments, or all at once.

# %%
@torch.no_grad()
def read(model, text, segment_len):
    """Logits of a text (B, N), read in segments, with memory from one to the next."""
    memory, logits = None, []
    for part in text.split(segment_len, dim=1):
        out, memory = model(part, memory)
        logits.append(out)
    return torch.cat(logits, dim=1)  # (B, N, vocab_size)


tiny = tiny.double()
whole = read(tiny, text, 12)
for segment_len in (1, 3, 5):
    difference = (read(tiny, text, segment_len) - whole).abs().max()
    print(f"segments of {segment_len}: largest difference {difference:.1e}")
    assert difference < 1e-12

# %% [markdown]
# How far back does a prediction feel a change? In chapter 1 it was layers times memory, and no
# further. Here the memory vectors themselves were made by looking at memory. So a change is
# handed on from step to step, even with one layer and a memory of two vectors:

# %%
@torch.no_grad()
def felt(mem_len, n_layers, n=10):
    """How much a change of each token of a text changes the last logits, (n,)."""
    torch.manual_seed(SEED)
    model = FeedbackTransformer(10, 16, 2, n_layers, 32, mem_len=mem_len, by_hand=False).double()
    tokens = torch.randint(10, (1, n))
    changed = (tokens + torch.eye(n, dtype=torch.int64)) % 10  # (n, n): row p differs at position p
    difference = model(changed)[0][:, -1] - model(tokens)[0][:, -1]  # (n, vocab_size)
    return difference.abs().amax(dim=1)


reach = {f"M = {M}, L = {L}": felt(M, L) for M, L in [(1, 1), (2, 1), (2, 3)]}
figure, axes = plt.subplots()
figures.curves(
    axes, range(1, 11), reach, marker="o",
    xlabel="position in the text (tokens)", ylabel="change of the last logits",
)
axes.set(yscale="log", title="Every token before is felt (untrained models)")
figures.show(
    figure,
    "Change of the last logits when one token changes, by its position, on a logarithmic scale, for three "
    "models. All positions are felt, the far ones less, even with a memory of one vector and one layer.",
)
assert all((change > 1e-12).all() for change in reach.values())  # more than rounding

# %% [markdown]
# ## 3.3 Three ways to the same gradient
#
# The loop has a price. A vanilla transformer computes all positions of a layer in one matrix
# product; here `T` steps wait for each other. The paper's answer is to make each step cheap. We
# go further, in three stages that give the same numbers.
#
# **The first way** is the loop that one writes first. Every layer of every step makes keys and
# values of the whole memory again.

# %%
def plain_loop(model, tokens):
    """Logits (B, T, vocab_size); keys and values are made anew in each layer of each step."""
    vectors, logits = [], []
    for x in model.embedding(tokens).unbind(dim=1):
        states = [x]
        memory = torch.stack(vectors, dim=1) if vectors else x[:, None][:, :0]  # (B, t, d_model)
        for layer in model.layers:
            keys, values = model.memory.seen(model.memory.keys_values(memory), model.mem_len)
            states.append(layer(states[-1], keys[0], values[0]))
        vectors.append(model.memory.vector(states))
        logits.append(model.head(model.norm(states[-1])))
    return torch.stack(logits, dim=1)

# %% [markdown]
# **The second way** is `loop` above: a vector's key and value are made once, when the vector is
# made, and kept.
#
# **The third way** keeps the loop and takes autograd out of it. Autograd records every little
# product of every step, and replays the record backwards: for each step and layer it multiplies
# small matrices for the errors *and* small matrices for the gradients of the weights. (The
# *error* at some place is the gradient of the loss there.) But only the errors have to go step by
# step. The gradient of a weight, such as $W_q$, is a sum over all steps,
#
# $$
# \frac{\partial \mathcal L}{\partial W_q} = \sum_t g_t\, u_t^\top ,
# $$
#
# where $g_t$ is the error at the query of step $t$ and $u_t$ what $W_q$ was multiplied with. Keep the
# $g_t$, put them side by side, and the sum is *one* large matrix product. The same goes for the
# keys: the error at $k_j$ is a sum over all later steps and all layers of (error at the score)
# times (query).
#
# So the whole segment becomes one operation for autograd, a `torch.autograd.Function`, with its
# own backward pass. Without gradients, there is only the way forwards, `run`. An operation for
# autograd takes tensors, not modules, so the weights come as one flat list.

# %% tags=["from-module"]
def weights_of(model):
    """The tensors that a segment is computed with, as a flat list: ten at the end a layer."""
    memory = model.memory
    flat = [
        memory.layer_weights.softmax(dim=0),
        memory.positions[-model.mem_len :],
        memory.norm.weight, memory.norm.bias, memory.key_value.weight,
    ]  # fmt: skip
    for layer in model.layers:
        norm, feed_forward_norm = layer.norm_attention, layer.norm_feed_forward
        inner, _, outer = layer.feed_forward
        flat += [norm.weight, norm.bias, layer.query.weight, layer.out.weight]
        flat += [feed_forward_norm.weight, feed_forward_norm.bias]
        flat += [inner.weight, inner.bias, outer.weight, outer.bias]
    return flat

# %% tags=["from-module"]
def segment(model, x, kv):
    """What loop does, as one operation whose backward pass is written by hand."""
    return Segment.apply(x, kv[0], *weights_of(model))

# %% [markdown]
# The code that follows is `feedback_segment.py`. You can skip to the check and come back. Every
# step leaves errors, and a block of steps is as many as are worth one large product. Three more
# letters for shapes: `N = B * H`, each head of each text; `S = M + T` slots, memory and segment;
# `C`, the steps of a block.

# %%
BLOCK = 16  # steps in a block
norm_back = torch.ops.aten.native_layer_norm_backward.default

# %% [markdown]
# Layer norm, forwards and backwards, each as one operation of PyTorch. `g` is always an error.

# %% tags=["from-module"]
def normalise(x, gain=None, shift=None):
    """Layer norm; also mean and 1 / deviation, for its backward."""
    return torch.native_layer_norm(x, x.shape[-1:], gain, shift, 1e-5)

# %% tags=["from-module"]
def normalise_back(g, x, mean, rstd, gain):
    """The error at x, from the error g at normalise(x, gain, shift)."""
    only_x = [True, False, False]
    return norm_back(g, x, gain.shape, mean, rstd, gain, None, only_x)[0]

# %% [markdown]
# `by_layer` parts the flat list of weights into layers again. And where training runs in mixed
# precision, both passes have to compute in the same one.

# %% tags=["from-module"]
def by_layer(weights):
    """A flat list of weights -> ten for each layer."""
    return [weights[i : i + 10] for i in range(0, len(weights), 10)]

# %% tags=["from-module"]
def outside_autocast(work):
    """Without autocast, so that the loops compute with the numbers that they are given."""

    def work_outside(first, tensor, *rest):
        with inputs.autocast(tensor.device.type, enabled=False):
            return work(first, tensor, *rest)

    return work_outside

# %% [markdown]
# What the steps forwards leave behind, layer by layer: the input, the state between attention and
# feed-forward, the query, the heads, the hidden state of the feed-forward, and the attention
# weights. That is about what autograd keeps for a vanilla transformer; section 3.7 measures it.

# %% tags=["from-module"]
class Kept(NamedTuple):
    """What the steps forwards leave for the steps backwards."""

    states: torch.Tensor  # (L + 1, T, B, d_model): the embedding, the output of each layer
    middles: torch.Tensor  # (L, T, B, d_model): between attention and feed-forward
    queries: torch.Tensor  # (L, T, B, d_model), scaled
    heads: torch.Tensor  # (L, T, B, d_model): out of attention
    hidden: torch.Tensor  # (L, T, B, d_ff): inside the feed-forward
    vectors: torch.Tensor  # (T, B, d_model): the memory vectors
    kv: torch.Tensor  # (2, B, H, S, d_head): keys and values
    attention: list  # T tensors (L, N, 1, K): the weights

    def seen(self, t, positions):
        """What step t attends to: keys with their ages, and values, (N, K, d_head) each."""
        end = self.kv.size(3) - len(self.vectors) + t  # M + t slots are there
        K = min(end, len(positions))
        keys, values = self.kv.flatten(1, 2)[:, :, end - K : end].unbind()
        return keys + positions[len(positions) - K :], values

    def results(self):
        """Outputs and memory vectors, (B, T, d_model) each."""
        return self.states[-1].transpose(0, 1), self.vectors.transpose(0, 1)

# %% [markdown]
# The steps forwards are the loop that you know, written without modules, into tensors that are
# there already. In inference mode PyTorch leaves out its bookkeeping for autograd, which would cost
# time at each of these small products. The queries of the first layer come from the text alone and
# need not wait.

# %% tags=["from-module"]
@outside_autocast
def run(x, kv, alpha, positions, gain, shift, W_kv, *layers):
    """The steps forwards, in S slots: M old memory vectors are there, T are filled in.

    x (B, T, d_model), keys and values kv (2, B, H, S, d_head), alpha (L + 1), positions
    (mem_len, d_head); gain, shift and W_kv, from vectors to keys and values; ten weights
    for each layer -> Kept.
    """
    (B, T, d_model), (_, _, H, S, d_head) = x.shape, kv.shape
    layers = by_layer([w.T if w.dim() == 2 else w for w in layers])
    L, M, d_ff, scale = len(layers), S - T, len(layers[0][7]), d_head**-0.5
    kept = Kept(
        x.new_empty(L + 1, T, B, d_model),
        *x.new_empty(3, L, T, B, d_model).unbind(),
        x.new_empty(L, T, B, d_ff),
        x.new_empty(T, B, d_model),
        kv,
        [x.new_empty(L, B * H, 1, min(M + t, len(positions))) for t in range(T)],
    )
    kept.states[0] = x.transpose(0, 1)
    with torch.inference_mode():  # nothing here is for autograd to see
        gain_q, shift_q, W_q, *_ = layers[0]  # the lowest queries wait for no step: all at once
        normed = normalise(kept.states[0], gain_q, shift_q)[0]
        torch.mul(normed @ W_q, scale, out=kept.queries[0])  # (T, B, d_model)
        steps = zip(*(tensor.unbind(1) for tensor in kept[:5]), kept.vectors, kept.attention)
        for t, (states, *inside, vector, attention) in enumerate(steps):
            keys, values = kept.seen(t, positions)
            x_t, *outputs = states.unbind()
            rows = zip(layers, *(tensor.unbind() for tensor in [*inside, attention]), outputs)
            for n, (layer, middle, q, head, hidden, weights, output) in enumerate(rows):
                gain_q, shift_q, W_q, W_o, gain_1, shift_1, W_1, b_1, W_2, b_2 = layer
                if n > 0:
                    q.addmm_(normalise(x_t, gain_q, shift_q)[0], W_q, beta=0, alpha=scale)
                scores = torch.bmm(q.view(B * H, 1, d_head), keys.mT)  # (N, 1, K)
                torch.softmax(scores, dim=-1, out=weights)
                torch.bmm(weights, values, out=head.view(B * H, 1, d_head))
                torch.addmm(x_t, head, W_o, out=middle)
                normed = normalise(middle, gain_1, shift_1)[0]
                torch.addmm(b_1, normed, W_1, out=hidden).relu_()
                x_t = torch.addmm(middle, hidden, W_2, out=output).add_(b_2)
            torch.mv(states.flatten(1).T, alpha, out=vector.view(-1))
            new = normalise(vector, gain, shift)[0] @ W_kv.T  # (B, 2 * d_model)
            kept.kv[..., M + t, :] = new.view(B, 2, H, d_head).transpose(0, 1)
    return kept

# %% [markdown]
# The errors of a block of steps have a place each, of the same shape. `by_step` cuts such tensors
# into the pieces that the loop reads and writes.

# %% tags=["from-module"]
class Errors(NamedTuple):
    """The errors of C steps, at what Kept has under the same names."""

    states: torch.Tensor  # (L + 1, C, B, d_model)
    middles: torch.Tensor  # (L, C, B, d_model)
    queries: torch.Tensor  # (L, C, B, d_model)
    hidden: torch.Tensor  # (L, C, B, d_ff)

# %% tags=["from-module"]
def by_step(tensor):
    """(L, C, ...) -> for each step a tuple of its L parts."""
    return zip(*(layer.unbind() for layer in tensor.unbind()))

# %% [markdown]
# Now one step backwards, from the top layer down. Each line is the line of `run` in reverse. An
# error reaches a layer's output from the layer above *and*, through the memory vector, from all
# later steps. At the bottom it ends with the query: no step waits for the error at the text.

# %% tags=["from-module"]
def step_back(g_vector, alpha, layers, attention, rows, keys, values):
    """The errors of one step, from its last layer down to the lowest queries.

    g_vector (B, d_model) at the memory vector, of which the share alpha[n] is the input of
    layer n; rows with what each layer had inside, and with the places of its errors, the
    one at its output filled in. Returns lists over the layers: errors at scores (N, 1, K),
    at heads (N, 1, d_head).
    """
    g_scores, g_heads, scale = [], [], keys.size(2) ** -0.5
    for n in reversed(range(len(layers))):
        gain_q, _, W_q, W_o, gain_1, _, W_1, _, W_2, _ = layers[n]
        slope, middle, middle_mean, middle_rstd, x, x_mean, x_rstd, *places = rows[n]
        g, g_hidden, g_middle, g_q, g_x = places
        torch.mm(g, W_2, out=g_hidden).mul_(slope)  # of the ReLU: 1 where it let through, or 0
        g_normed = normalise_back(g_hidden @ W_1, middle, middle_mean, middle_rstd, gain_1)
        torch.add(g_normed, g, out=g_middle)
        g_head = (g_middle @ W_o).view(len(keys), 1, -1)  # (N, 1, d_head)
        g_weights = torch.bmm(g_head, values.mT)  # (N, 1, K)
        g_score = torch._softmax_backward_data(g_weights, attention[n], -1, g.dtype)
        g_q.view(g_head.shape).baddbmm_(g_score, keys, beta=0, alpha=scale)
        g_scores.append(g_score)
        g_heads.append(g_head)
        if n > 0:
            g_normed = normalise_back(g_q @ W_q, x, x_mean, x_rstd, gain_q)
            torch.add(g_normed, g_middle, out=g_x).add_(g_vector, alpha=alpha[n])
    return g_scores[::-1], g_heads[::-1]

# %% tags=["from-module"]
class Sums(NamedTuple):
    """The errors that block after block fills in, or adds to."""

    x: torch.Tensor  # (T, B, d_model)
    vectors: torch.Tensor  # (T, B, d_model)
    new: torch.Tensor  # (T, B, 2 * d_model): keys and values, as W_kv makes them
    slots: torch.Tensor  # (2 * N, S, d_head): the same by slot, old ones too
    positions: torch.Tensor  # (mem_len, d_head)
    layers: list  # seven, of all layers together: see add_weights

# %% tags=["from-module"]
def empty_sums(kept, positions, layers):
    """Sums to begin with."""
    (T, B, d_model), (_, _, H, S, d_head) = kept.vectors.shape, kept.kv.shape
    gain_q, _, W_q, W_o, _, _, W_1, b_1, W_2, b_2 = layers[0]
    summed = W_q, gain_q, W_o, W_1, b_1, W_2, b_2  # of these shapes
    return Sums(
        *positions.new_empty(2, T, B, d_model).unbind(),
        positions.new_empty(T, B, 2 * d_model),
        positions.new_zeros(2 * B * H, S, d_head),
        torch.zeros_like(positions),
        [w.new_zeros(len(layers), *w.shape) for w in summed],
    )

# %% [markdown]
# The steps go backwards in blocks. Before the loop comes what no step has to wait for, for all
# steps of the block at once. The loop collects errors. Only the keys and values of the block's own
# slots cannot wait, because the very next step backwards needs the errors there. They are summed up
# in `near`.

# %% tags=["from-module"]
def block_back(steps, g_outputs, alpha, positions, gain, W_kv, layers, kept, sums):
    """A slice of steps backwards, then the products of what they had with their errors.

    left holds the errors at the scores, and the attention weights: a row for each step
    and layer, a column for each slot, from mem_len slots before the block on. right holds
    the queries, and the errors at the heads. So the errors at keys and values are
    left.mT @ right.
    """
    (_, B, H, S, d_head), mem_len, L = kept.kv.shape, len(positions), len(layers)
    C, first, N = steps.stop - steps.start, S - len(kept.vectors) + steps.start, B * H
    states, middles, queries, heads, hidden = (tensor[:, steps] for tensor in kept[:5])
    x_hat, *x_stats = normalise(states[:-1])
    middle_hat, *middle_stats = normalise(middles)
    errors = Errors(*map(torch.empty_like, (states, middles, queries, hidden)))
    inside = hidden.sign(), middles, *middle_stats, states[:-1], *x_stats
    g, g_middles, g_queries, g_hidden = errors
    places = g[1:], g_hidden, g_middles, g_queries, g[:-1]
    rows = list(zip(*map(by_step, inside + places)))

    left = positions.new_zeros(2, N, C * L, mem_len + C)
    right = positions.new_empty(2, N, C * L, d_head)
    right[0] = queries.reshape(L, C, N, d_head).permute(2, 1, 0, 3).flatten(1, 2)
    near = sums.slots[:, first : first + C].clone()  # (2 * N, C, d_head): wanted at once
    vector_stats = normalise(kept.vectors[steps])[1:]
    *shares, share_of_output = alpha.tolist()
    for r in reversed(range(C)):
        t, row = steps.start + r, slice(r * L, (r + 1) * L)
        sums.new[t].view(B, 2, H, -1).copy_(near[:, r].view(2, B, H, -1).transpose(0, 1))
        stats = (stat[r] for stat in vector_stats)
        g_vector = normalise_back(sums.new[t] @ W_kv, kept.vectors[t], *stats, gain)
        torch.add(g_outputs[t], g_vector, alpha=share_of_output, out=g[L, r])
        sums.vectors[t], attention, seen = g_vector, kept.attention[t], kept.seen(t, positions)
        back = step_back(g_vector, shares, layers, attention, [*zip(*rows[r])], *seen)
        g_scores, g_heads = (torch.cat(parts, dim=1) for parts in back)
        columns = slice(mem_len + r - attention.size(3), mem_len + r)
        left[0, :, row, columns] = g_scores
        left[1, :, row, columns] = attention.squeeze(2).transpose(0, 1)
        right[1, :, row] = g_heads
        later, at_row = left[:, :, row, mem_len:], right[:, :, row]
        near.baddbmm_(later.flatten(0, 1).mT, at_row.flatten(0, 1))
    (gain_q, _, W_q, *_), stats = layers[0], (stat[0] for stat in x_stats)
    g_normed = normalise_back(g_queries[0] @ W_q, states[0], *stats, gain_q)
    sums.x[steps] = g_normed + g_middles[0] + shares[0] * sums.vectors[steps]
    add_slots(first, left, right, C, sums)
    add_weights(errors, x_hat, heads, middle_hat, hidden, sums.layers)

# %% [markdown]
# And the products that the errors are collected for: large ones, once a block. First for what was
# attended to, then for the weights, of all layers together.

# %% tags=["from-module"]
def add_slots(first, left, right, C, sums):
    """A block's share in the errors at keys and values before it, and at positions."""
    (N, rows, width), mem_len = left.shape[1:], len(sums.positions)
    old = min(first, mem_len)  # slots before the block that it has seen
    far = left[..., mem_len - old : mem_len].flatten(0, 1).mT @ right.flatten(0, 1)
    sums.slots[:, first - old : first] += far  # (2 * N, old, d_head)
    L = rows // C  # a step is L rows, and the ages of the next begin a column later
    strides = rows * width, L * width + 1, width, 1
    by_age = left[0].as_strided((N, C, L, mem_len), strides).reshape(-1, mem_len)
    sums.positions.addmm_(by_age.T, right[0].flatten(0, 1))

# %% tags=["from-module"]
def add_weights(errors, x_hat, heads, middle_hat, hidden, sums):
    """A block's share in the sums of errors, and of products with them, for the weights."""
    W_q, sum_q, W_o, W_1, sum_hidden, W_2, sum_output = sums
    errors = errors._replace(states=errors.states[1:])
    g, g_middle, g_q, g_hidden = (tensor.flatten(1, 2) for tensor in errors)  # (L, C * B, ...)
    W_q.baddbmm_(g_q.mT, x_hat.flatten(1, 2))
    W_o.baddbmm_(g_middle.mT, heads.flatten(1, 2))
    W_1.baddbmm_(g_hidden.mT, middle_hat.flatten(1, 2))
    W_2.baddbmm_(g.mT, hidden.flatten(1, 2))
    sum_q += g_q.sum(dim=1)
    sum_hidden += g_hidden.sum(dim=1)
    sum_output += g.sum(dim=1)

# %% [markdown]
# Three of the weights stand behind a norm: $y = W(\gamma \odot \hat x + \beta)$, where $\hat x$ is
# normalised and $\gamma$, $\beta$ are the norm's gain and shift. With $g$ the error at $y$, two sums
# over the steps, $G = \sum g\, \hat x^\top$ and $\sum g$, are enough for the gradients of all three.

# %% tags=["from-module"]
def behind_norm(G, g, gain, shift, W):
    """The errors at gain, shift and W of y = W @ (gain * x_hat + shift).

    G is the sum of (error at y) times x_hat, of W's shape; g is the sum of the errors at y.
    """
    return (G * W).sum(dim=0), g @ W, torch.addr(G * gain, g, shift)

# %% tags=["from-module"]
def layer_errors(layer, sums):
    """The errors at a layer's ten weights, from its share of Sums.layers."""
    W_q, sum_q, W_o, W_1, sum_hidden, W_2, sum_output = sums
    at_query = behind_norm(W_q, sum_q, *layer[:3])
    at_hidden = behind_norm(W_1, sum_hidden, *layer[4:7])
    return *at_query, W_o, *at_hidden, sum_hidden, W_2, sum_output

# %% [markdown]
# For autograd, all of this is one operation.

# %% tags=["from-module"]
class Segment(Function):
    """A segment for autograd, all steps at once.

    Takes what run takes, with the M old slots alone -> outputs and memory vectors,
    (B, T, d_model) each. Only the outputs have gradients; second derivatives are refused.
    """

    @staticmethod
    def forward(ctx, x, kv, *weights):
        slots = pad(kv.type_as(x), (0, 0, 0, x.size(1)))  # T more
        in_reading_order = (w.T.contiguous().T if w.dim() == 2 else w for w in weights[5:])
        kept = run(x, slots, *weights[:5], *in_reading_order)  # T times: worth the copies
        ctx.save_for_backward(*weights, *kept[:7], *kept.attention)
        ctx.n_weights = len(weights) - 5
        outputs, vectors = kept.results()
        ctx.mark_non_differentiable(vectors)
        return outputs, vectors

    @staticmethod
    @once_differentiable
    @outside_autocast
    def backward(ctx, g, _):
        (alpha, positions, *projection), saved = ctx.saved_tensors[:5], ctx.saved_tensors[5:]
        layers, saved = by_layer(saved[: ctx.n_weights]), saved[ctx.n_weights :]
        kept, (gain, _, W_kv) = Kept(*saved[:7], saved[7:]), projection
        sums = empty_sums(kept, positions, layers)
        g, T = g.transpose(0, 1), g.size(1)  # (T, B, d_model)
        with torch.inference_mode():
            for start in reversed(range(0, T, BLOCK)):
                steps = slice(start, min(start + BLOCK, T))
                block_back(steps, g, alpha, positions, gain, W_kv, layers, kept, sums)
        old = sums.slots.view(kept.kv.shape)[..., :-T, :]
        g_alpha = kept.states.flatten(1) @ sums.vectors.flatten()
        g_run = sums.x.transpose(0, 1), old, g_alpha, sums.positions
        vectors_hat, new = normalise(kept.vectors)[0].flatten(0, 1), sums.new.flatten(0, 1)
        g_projection = behind_norm(new.T @ vectors_hat, new.sum(dim=0), *projection)
        pairs = zip(layers, zip(*sums.layers))
        return *g_run, *g_projection, *(g for pair in pairs for g in layer_errors(*pair))

# %% [markdown]
# Does it hold? Compare the three ways, in double precision: logits, and the gradient of every
# parameter. 40 steps are two blocks and a part of one.

# %%
def gradients(run):
    """Logits of run() and the gradients of all parameters of `tiny`, as one list."""
    tiny.zero_grad()
    logits = run()
    logits.logsumexp(dim=-1).square().sum().backward()
    return [logits.detach(), *(p.grad.clone() for p in tiny.parameters())]


def largest_difference(ours, theirs):
    return max((a - b).abs().max().item() for a, b in zip(ours, theirs))


text = torch.randint(10, (2, 40))
tiny.by_hand = False
ways = {"plain loop": gradients(lambda: plain_loop(tiny, text)), "cache": gradients(lambda: tiny(text)[0])}
tiny.by_hand = True
ways["by hand"] = gradients(lambda: tiny(text)[0])
for name in ("cache", "by hand"):
    difference = largest_difference(ways[name], ways["plain loop"])
    print(f"{name:8} against the plain loop: {difference:.1e}")
    assert difference < 1e-10

# %% [markdown]
# And `gradcheck` compares the backward pass with differences of the forward pass, here for three
# steps of one small layer.

# %%
generator = torch.Generator().manual_seed(SEED)
shapes = [(1, 3, 4), (2, 1, 2, 2, 2), (2,), (3, 2)]  # x, keys and values, alpha, positions
shapes += [(4,), (4,), (8, 4)]  # gain, shift, W_kv
shapes += [(4,), (4,), (4, 4), (4, 4), (4,), (4,), (5, 4), (5,), (4, 5), (4,)]  # one layer
leaves = [torch.randn(s, generator=generator, dtype=torch.float64).requires_grad_() for s in shapes]
assert torch.autograd.gradcheck(lambda *given: Segment.apply(*given)[0], leaves)
print("gradcheck: right")

# %% [markdown]
# ### What a training step costs
#
# Seconds for one forward and backward pass, against the length of the segment, and the vanilla
# model beside them.

# %%
COSTS = dict(vocab_size=65, d_model=64, n_heads=4, n_layers=2, d_ff=256)


def forward_backward(model, run, T):
    """Seconds of one pass over a segment of T tokens, 16 texts side by side."""
    tokens = torch.randint(65, (16, T), device=device)

    def once():
        model.zero_grad()
        run(tokens).logsumexp(dim=-1).sum().backward()

    return measure.seconds(once, warmup=1, rounds=3, device=device)


lengths = [16, 32, 64, 128]
slow = FeedbackTransformer(**COSTS, mem_len=128, by_hand=False).to(device)
fast = FeedbackTransformer(**COSTS, mem_len=128).to(device)
parallel = VanillaTransformer(**COSTS, max_len=128).to(device)
costs = {
    "plain loop": [forward_backward(slow, lambda tokens: plain_loop(slow, tokens), T) for T in lengths],
    "cache": [forward_backward(slow, lambda tokens: slow(tokens)[0], T) for T in lengths],
    "by hand": [forward_backward(fast, lambda tokens: fast(tokens)[0], T) for T in lengths],
    "vanilla": [forward_backward(parallel, lambda tokens: parallel(tokens)[0], T) for T in lengths],
}

# %%
figure, axes = plt.subplots()
figures.curves(
    axes, lengths, {name: [1e3 * s for s in seconds] for name, seconds in costs.items()}, marker="o",
    xlabel="length of the segment (tokens)", ylabel="forward and backward (ms)",
)
axes.set(xscale="log", yscale="log", title="Three ways to train, and vanilla (2 layers, batch 16)")
axes.set_xticks(lengths, labels=lengths)
axes.minorticks_off()
figures.show(
    figure,
    "Milliseconds of a training step against segment length, on logarithmic axes. The plain loop is highest and "
    "steepest, the cached loop below it, the hand-written backward pass below that, and vanilla lowest.",
)
for name, seconds in costs.items():
    print(f"{name:10}", "  ".join(f"T = {T}: {1e3 * s:6.1f} ms" for T, s in zip(lengths, seconds)))
gains = [cache / by_hand for cache, by_hand in zip(costs["cache"], costs["by hand"])]
assert costs["plain loop"][-1] > 1.1 * costs["cache"][-1] and sorted(gains)[1] > 1.1

# %% [markdown]
# The cache takes away work that grows with the square of the length. The hand-written pass takes
# away most of autograd's many small steps. What remains above vanilla is the waiting itself: `T`
# times small products in place of one large one. `make bench` measures it against two public
# packages at a larger size.
#
# ## 3.4 Train it
#
# Tiny Shakespeare, one million characters. This is the loop that all the chapters share, in
# `memtx_minimal/training.py`.

# %%
corpus = corpora.tiny_shakespeare()
T, STEPS = 32, 160
SIZES = dict(vocab_size=len(corpus.vocab), d_model=64, n_heads=4, d_ff=256, mem_len=T)


def fit(model, steps=STEPS, seed=SEED):
    """Train on segments of T characters; returns losses in nats per character, and the seconds it took."""
    start = time.perf_counter()
    losses = training.train(model, corpus.train, steps=steps, batch_size=32, segment_len=T, clip=0.5)["loss"]
    return losses, time.perf_counter() - start


torch.manual_seed(SEED)
feedback = FeedbackTransformer(**SIZES, n_layers=2).to(device)
scratch = fit(feedback)
print(f"{corpus.name}, {STEPS} steps: {scratch[1]:.0f} seconds")
print(f"validation loss {training.evaluate(feedback, corpus.valid[:20_000], segment_len=T):.3f} nats per character")

# %%
figure, axes = plt.subplots()
figures.curves(
    axes, range(25, STEPS + 1), {"Feedback, 2 layers": figures.smooth(scratch[0], 25)},
    xlabel="training step", ylabel="training loss (nats per character)",
)
axes.set_title(f"Running mean over 25 steps ({corpus.name})")
figures.show(figure, "Training loss of the Feedback Transformer over the steps: a steep fall, then a slower one.")

# %%
prompt = corpus.valid[:64]
text = training.generate(feedback, prompt, 200, temperature=0.8)
print(corpus.vocab.decode(text[64:]))

# %% [markdown]
# It has learned the look of a play, and not much more: this is a small model after seconds of
# training.
#
# ## 3.5 The claims, one by one
#
# ### One layer follows the ball
#
# Expected: a Feedback Transformer hands the place of the ball from memory vector to memory
# vector, so a *single* layer is enough for games of any length. The lessons are those that the
# vanilla model had.

# %%
torch.manual_seed(SEED)
tracker = FeedbackTransformer(**GAMES, n_layers=1, mem_len=32).to(device)
spent, after_lessons = 0.0, []  # (seconds so far, share of right answers, loss), games of 32 swaps
for lesson in LESSONS:
    start = time.perf_counter()
    learn(tracker, [lesson])
    spent += time.perf_counter() - start
    found["Feedback, 1 layer"], loss = exam(tracker)
    after_lessons.append((spent, found["Feedback, 1 layer"].mean().item(), loss.mean().item()))

# %%
figure, axes = plt.subplots()
figures.curves(axes, range(1, 33), found, marker="o", xlabel="swaps so far", ylabel="share of right answers")
axes.axhline(0.2, color="black", linestyle=":")
axes.set(ylim=(0, 1.03), title="One layer with feedback keeps it (cups)")
figures.show(
    figure,
    "Share of right answers by number of swaps. The vanilla model with four layers falls towards guessing; "
    "the Feedback Transformer with one layer stays near one.",
)
for name, shares in found.items():
    model = deep if "vanilla" in name else tracker
    size = sum(p.numel() for p in model.parameters())
    print(f"{name:18} {size:7,} parameters: {shares.mean():.3f} right over all positions, {shares[-1]:.3f} after 32 swaps")
assert found["Feedback, 1 layer"].mean() > 0.9

# %% [markdown]
# A quarter of the layers, and the ball is not lost. (The paper makes the same point with a
# language of small programs: there, 8 vanilla layers answer 33.7 % right and 4 feedback layers
# 99.1 %, by the page of the released code.)
#
# ### What memory is made of
#
# Which layers must be in the mixture? Give a model of two layers shorter games, with the layer
# weights fixed to the embedding alone, to one of the layers alone, to a plain mean, or learned.

# %%
def of_mixture(weights=None):
    """A model whose mixture stays as it is, if weights are given: embedding, layer 1, layer 2."""
    torch.manual_seed(SEED)
    model = FeedbackTransformer(**GAMES, n_layers=2, mem_len=32).to(device)
    if weights is not None:
        model.memory.layer_weights.data.copy_(torch.tensor(weights))
        model.memory.layer_weights.requires_grad_(False)
    return model


SHORT = LESSONS[:3]  # games of up to 8 swaps
none = -1e9  # softmax makes it a weight of zero
mixtures = {
    "embedding": of_mixture([0.0, none, none]),
    "layer 1": of_mixture([none, 0.0, none]),
    "layer 2": of_mixture([none, none, 0.0]),
    "mean": of_mixture([0.0, 0.0, 0.0]),
    "learned": of_mixture(),
}
for model in mixtures.values():
    learn(model, SHORT)
made_of = {name: exam(model, length=8)[0].mean().item() for name, model in mixtures.items()}

# %%
figure, axes = plt.subplots()
figures.bars(axes, made_of, ylabel="share of right answers")
axes.axhline(0.2, color="black", linestyle=":")
axes.set_title("Memory made of ... (cups, 8 swaps)")
figures.show(
    figure,
    "Bars of the share of right answers by what memory is made of: low for the embedding alone, and "
    "higher for either layer alone, the plain mean, and the learned mixture.",
)
for name, share in made_of.items():
    print(f"{name:10} {share:.2f}")
with_layers = [made_of[name] for name in made_of if name != "embedding"]
assert made_of["embedding"] < min(with_layers) - 0.1

# %% [markdown]
# With the embedding alone nothing that a layer has found out is ever handed on: this is a vanilla
# model in disguise. As soon as the output of a layer is in the mixture, feedback works. Which
# layer, and whether the mixture is learned, makes no difference to so simple a task.
#
# ### Loss at equal depth
#
# Does text profit too? The paper finds that Feedback Transformers of few layers do as well as
# deeper parallel ones. Here are 1, 2 and 4 layers, two seeds each, all with the same text and the
# same number of steps. The parallel baseline is the Transformer-XL of chapter 1. A query sees the
# latest 32 keys in both (`same_length`). They also differ in their positions, and XL has keys and
# values for each layer, hence more parameters.

# %%
def run_once(make, n_layers, seed):
    """A fresh model, trained for STEPS steps: model, validation loss, seconds."""
    torch.manual_seed(seed)
    model = make(**SIZES, n_layers=n_layers).to(device)
    _, seconds = fit(model)
    return model, training.evaluate(model, corpus.valid[:20_000], segment_len=T), seconds


depths, seeds, trained = [1, 2, 4], [SEED, SEED + 1], {}
losses, took = {"Feedback": [], "Transformer-XL": []}, {}
for name, make in [("Feedback", FeedbackTransformer), ("Transformer-XL", partial(TransformerXL, same_length=True))]:
    for n_layers in depths:
        models, values, seconds = zip(*(run_once(make, n_layers, seed) for seed in seeds))
        trained[name, n_layers], took[name, n_layers] = models[0], sum(seconds) / len(seconds)
        losses[name].append(values)

# %%
figure, axes = plt.subplots()
for (name, values), color in zip(losses.items(), (figures.BLUE, figures.ORANGE)):
    axes.plot(range(3), [sum(pair) / 2 for pair in values], color=color, label=name)
    for n, pair in enumerate(values):
        axes.plot([n, n], pair, "o", color=color)
axes.set_xticks(range(3), labels=depths)
axes.set(xlabel="layers", ylabel="validation loss (nats per character)")
axes.set_title(f"Equal depth, equal steps; a dot a seed ({corpus.name})")
axes.legend()
figures.show(
    figure,
    "Validation loss of Feedback Transformer and Transformer-XL with 1, 2 and 4 layers, two seeds each as dots, "
    "with a line through their means.",
)
for name, values in losses.items():
    for L, (a, b) in zip(depths, values):
        size = sum(p.numel() for p in trained[name, L].parameters())
        print(f"{name:15} {L} layers, {size:7,} parameters: {a:.3f} and {b:.3f} nats per character, {took[name, L]:4.1f} seconds")
means = {name: [sum(pair) / 2 for pair in values] for name, values in losses.items()}
assert all(means[name][0] > means[name][2] for name in means)  # depth helps both
assert max(abs(a - b) for a, b in zip(*means.values())) < 0.15  # and at equal depth there is little between them

# %% [markdown]
# Depth helps both. But at equal depth the two models are about equal: the paper's gain on text
# does **not** show here. That is no surprise after the ball. These models have seen a small text
# for some seconds, and what they have learned so far is spelling, for which the last few letters
# are enough and no state has to be carried. The paper's models are hundreds of times larger and
# train for days. What shows even here is the price: compare the seconds.
#
# ### The learned mixture
#
# The layer weights start even. Where do they go?

# %%
model = trained["Feedback", 4]
weights = model.memory.layer_weights.detach().softmax(dim=0).cpu()  # (L + 1,)
names = ["embedding", *(f"layer {n}" for n in range(1, 5))]
figure, axes = plt.subplots()
figures.bars(axes, dict(zip(names, weights.tolist())), ylabel="weight in the memory vector", number="{:.3f}")
axes.axhline(0.2, color="black", linestyle=":")
axes.set_title(f"softmax(w) after training ({corpus.name})")
figures.show(
    figure,
    "Bars of the five weights of the mixture after training: embedding and four layers. A dotted line marks the "
    "even share that they start from.",
)
print(f"most: {names[weights.argmax()]}   least: {names[weights.argmin()]}")
assert (weights - 0.2).abs().max() > 0.005  # they have moved, a little

# %% [markdown]
# In so short a training the weights have not gone far from the even share, and of one seed: there
# is no sign yet of which layers the text wants in its memory. They are five numbers among many
# thousands, with the learning rate of all others, and any mixture can be undone in
# part by the projection behind it. Exercise 5 asks for more.
#
# ### Where it looks
#
# Every layer of every step attends to memory vectors of known age. Record the attention of the
# trained model (in the loop, where each softmax stands alone) and add up what falls in each
# bucket of ages. The buckets double in width.

# %%
@torch.inference_mode()
def attention_by_age(model, n_segments=4):
    """Mean attention of each layer at each age 1 ... mem_len, (L, mem_len)."""
    L, M, memory, total, steps = len(model.layers), model.mem_len, None, 0, 0
    model.by_hand = False
    for n, (tokens, _) in zip(range(1 + n_segments), corpora.lanes(corpus.valid.to(device), 32, M)):
        with measure.record_attention(model) as weights:  # T * L tensors (B, H, 1, K)
            _, memory = model(tokens, memory)
        if n > 0:  # memory is full: K = mem_len from here on
            by_layer = torch.stack([w.mean(dim=(0, 1, 2)) for w in weights]).unflatten(0, (-1, L))
            total, steps = total + by_layer.sum(dim=0), steps + len(by_layer)
    model.by_hand = True
    return (total / steps).flip(-1).cpu()  # the oldest key comes first, so turn it round


by_age = attention_by_age(trained["Feedback", 4])
assert torch.allclose(by_age.sum(dim=-1), torch.ones(4), atol=1e-4)  # all attention is accounted for

# %%
edges = [1, 2, 3, 5, 9, 17, 33]
mass = {f"layer {n + 1}": [row[a - 1 : b - 1].sum() for a, b in zip(edges, edges[1:])] for n, row in enumerate(by_age)}
figure, axes = plt.subplots()
for n, (a, b) in enumerate(zip(edges, edges[1:])):
    axes.plot([n - 0.45, n + 0.45], [(b - a) / T] * 2, "k:", label="even share" if n == 0 else None)
figures.buckets(axes, edges, mass, xlabel="age of the memory vector (characters)", ylabel="share of attention")
axes.set_title(f"Attention by age ({corpus.name})")
figures.show(
    figure,
    "Attention mass by age of the memory vector in buckets that double in width, for each of the four layers. A "
    "dotted line over each bucket marks an even share: far below the bars at age 1, above them for the oldest.",
)
print("times an even share, age 1:", "  ".join(f"layer {n + 1}: {T * row[0]:.1f}" for n, row in enumerate(by_age)))
print("    mean of the layers, age 2: {:.1f}  3 to 16: {:.1f}  17 to 32: {:.1f}".format(
    *(T * by_age[:, a:b].mean() for a, b in [(1, 2), (2, 16), (16, 32)])
))
assert by_age[:, 0].mean() > 2 / T and by_age[:, 16:].mean() < 1 / T  # the last vector, at the cost of the oldest

# %% [markdown]
# A bucket is tall also because it is wide: compare with the dotted lines. Only the vector of age 1
# gets far more than an even share, and the oldest get less. That vector is the only one that knows
# the letter before, and through its own attention it has read all the others.
#
# ## 3.6 Two aids for training
#
# ### Short games first
#
# The paper starts with short sequences and lengthens them. Is it worth it? Give the same model
# games of 32 swaps from the start, for about as many seconds as the lessons took: in rounds of 40
# steps, each with new games and, like each lesson, with a fresh optimizer.

# %%
torch.manual_seed(SEED)
impatient = FeedbackTransformer(**GAMES, n_layers=1, mem_len=32).to(device)
spent, direct = 0.0, []
while spent < after_lessons[-1][0]:
    start = time.perf_counter()
    learn(impatient, [(32, 40, 3e-3)], seed=SEED + len(direct))
    spent += time.perf_counter() - start
    direct.append((spent, *(values.mean().item() for values in exam(impatient))))

# %%
figure, axes = plt.subplots(1, 2, figsize=(6.4, 3.2))
for name, points in [("2, 4, 8, 16, then 32 swaps", after_lessons), ("32 swaps from the start", direct)]:
    seconds, shares, losses_ = zip(*points)
    axes[0].plot(seconds, shares, marker="o", label=name)
    axes[1].plot(seconds, losses_, marker="o", label=name)
for ax, guessing in zip(axes, (1 / 5, math.log(5))):
    ax.axhline(guessing, color="black", linestyle=":")
    ax.set_xlabel("seconds of training")
axes[0].set(ylabel="share of right answers", ylim=(0, 1.03), title="Cups, games of 32 swaps")
axes[1].set(ylabel="loss (nats per swap)", ylim=(0, None), title="One layer; dotted: guessing")
axes[0].legend(fontsize=8, loc="center right")
figures.show(
    figure,
    "Share of right answers and loss in games of 32 swaps against seconds of training. With games of growing length "
    "the share rises to near one, and the loss falls to near zero after a rise far above guessing; with long games "
    "from the start both leave pure guessing slowly.",
)
print(f"short games first: {after_lessons[-1][1]:.2f}   long games from the start: {direct[-1][1]:.2f}")
assert after_lessons[-1][1] > direct[-1][1] + 0.2

# %% [markdown]
# The order of lessons decides. In a long game that is lost after the first swaps, nearly all of
# the loss is noise. In a game of two swaps, the one update that must be learned stands alone. (After
# the first lessons the loss in long games is far above that of guessing: the model is as sure of
# itself as in the short ones, and wrong.) The learning rate falls as the games grow: a recurrence of
# many steps multiplies its errors, and at a high rate it may break.
#
# ### Start from a parallel model
#
# The other aid: train an ordinary transformer, in parallel and fast, and copy its weights.

# %% tags=["from-module"]
@torch.no_grad()
def start_from_parallel(model, vanilla):
    """Copy the weights of a trained VanillaTransformer of the same sizes into model.

    A layer's projection to keys and values is copied with the gain of the norm before it;
    where the layers share one, it is the mean of theirs. Vanilla knows no ages and no
    mixture of layers: the positions and the layer weights stay as they are.
    """
    for name, ours, theirs in [
        ("n_layers", len(model.layers), len(vanilla.layers)),
        ("n_heads", model.memory.n_heads, vanilla.layers[0].attention.n_heads),
        ("vocab_size, d_model", *(tuple(m.embedding.weight.shape) for m in (model, vanilla))),
        ("d_ff", *(m.layers[0].feed_forward[0].out_features for m in (model, vanilla))),
    ]:
        if ours != theirs:
            raise ValueError(f"{name}: {ours} here, {theirs} in vanilla: build both alike")
    for name in ("embedding", "norm", "head"):
        getattr(model, name).load_state_dict(getattr(vanilla, name).state_dict())
    projections = []
    for ours, theirs in zip(model.layers, vanilla.layers):
        W_q, *W_kv = theirs.attention.query_key_value.weight.chunk(3)
        ours.query.weight.copy_(W_q)
        ours.out.load_state_dict(theirs.attention.out.state_dict())
        for name in ("feed_forward", "norm_attention", "norm_feed_forward"):
            getattr(ours, name).load_state_dict(getattr(theirs, name).state_dict())
        projections.append(torch.cat(W_kv) * theirs.norm_attention.weight)
    W_kv = torch.stack(projections)  # (L, 2 * d_model, d_model)
    model.memory.norm.reset_parameters()
    weight = model.memory.key_value.weight
    weight.copy_(W_kv.mean(dim=0) if model.shared_kv else W_kv.flatten(0, 1))

# %%
torch.manual_seed(SEED)
vanilla_sizes = {name: size for name, size in SIZES.items() if name != "mem_len"}
vanilla = VanillaTransformer(**vanilla_sizes, n_layers=2, max_len=T).to(device)
first = fit(vanilla, steps=STEPS)

torch.manual_seed(SEED)
warm = FeedbackTransformer(**SIZES, n_layers=2).to(device)
start_from_parallel(warm, vanilla)
second = fit(warm, steps=STEPS // 2)

# %%
def times(history, after=0.0, width=5):
    """Seconds and smoothed losses of a training, which began `after` seconds."""
    losses, seconds = history
    smooth = figures.smooth(losses, width)
    return [after + seconds * (width + n) / len(losses) for n in range(len(smooth))], smooth


figure, axes = plt.subplots()
axes.plot(*times(scratch), label="Feedback from the start")
axes.plot(*times(first), color="black", linestyle="--", label="first in parallel (vanilla) ...")
axes.plot(*times(second, after=first[1]), label="... then Feedback")
axes.set(xlabel="seconds of training", ylabel="training loss (nats per character)")
axes.set_title(f"By way of a parallel model; means of 5 steps ({corpus.name})")
axes.legend()
figures.show(
    figure,
    "Training loss against seconds: Feedback from the start, and a vanilla model whose weights are then copied "
    "into a Feedback Transformer, which starts higher and falls again.",
)
fresh, copied = (sum(losses[:10]) / 10 for losses in (scratch[0], second[0]))
print(f"mean loss of the first ten steps: fresh weights {fresh:.2f}, copied weights {copied:.2f}")
for name, m, spent in [("from the start", feedback, scratch[1]), ("by way of vanilla", warm, first[1] + second[1])]:
    loss = training.evaluate(m, corpus.valid[:20_000], segment_len=T)
    print(f"{name:17} {loss:.3f} nats per character on the validation text, after {spent:.0f} seconds")
assert copied < fresh - 0.5

# %% [markdown]
# The copied weights are worth something: the model starts far below a fresh one, although its
# positions are new, and its mixture of layers is not what the copied projections were trained to
# read. But the parallel training took its own seconds, and at equal seconds the copy is not ahead. At
# this size a Feedback Transformer is only a few times slower than a parallel one, and there is
# little to save. The aid is meant for models and lengths where the difference is greater.
#
# ## 3.7 What it costs to generate, and to remember
#
# ### Seconds per token
#
# To generate, the model reads one token a call. With the cache, one more token is one more step,
# the same operations however long the text already is. Attention alone has more to read, until
# the memory is full (512 here). Without returned memory, as in some public versions, every token
# means reading the whole prefix again.

# %%
@torch.inference_mode()
def milliseconds_per_token(model, depth):
    """Time of one step after a text of `depth` tokens: with the cache, and reading all again."""
    text = corpus.valid[None, : depth + 1].to(device)
    _, memory = model(text[:, :-1])

    def one_more():
        nonlocal memory
        _, memory = model(text[:, -1:], memory)

    with_cache = measure.seconds(one_more, warmup=5, rounds=41, device=device)
    again = measure.seconds(lambda: model(text), warmup=1, rounds=1, device=device)
    return 1e3 * with_cache, 1e3 * again


writer = FeedbackTransformer(**SIZES | dict(mem_len=512), n_layers=4).to(device).eval()
depths_read = [32, 64, 128, 256, 512, 1024, 2048]
with_cache, again = zip(*(milliseconds_per_token(writer, n) for n in depths_read))

# %%
figure, axes = plt.subplots()
figures.curves(
    axes, depths_read, {"reading all again": again, "with the cache": with_cache}, marker="o",
    xlabel="tokens before", ylabel="time for one more token (ms)",
)
axes.set(xscale="log", yscale="log", title="Generation (4 layers, memory of 512)")
axes.set_xticks(depths_read, labels=depths_read)
axes.minorticks_off()
figures.show(
    figure,
    "Milliseconds for one more token against the number of tokens before, on logarithmic axes. Reading "
    "everything again rises in proportion; with the cache the curve is flat.",
)
for n, a, b in zip(depths_read, with_cache, again):
    print(f"after {n:4d} tokens: {a:5.2f} ms with the cache, {b:7.1f} ms without")
assert again[-1] > 20 * with_cache[-1] and with_cache[-1] < 5 * with_cache[0]  # a busy machine, too

# %% [markdown]
# ### Bytes per token
#
# What must a model hold for each token of the past, to go on generating? A parallel transformer:
# keys and values of every layer, `2 * L * d_model` numbers. Feedback with keys and values per
# layer: as many. Shared: `2 * d_model`. (A cache that goes on token by token also has its room for
# at most 64 more.) For vanilla, the keys and values are caught as the model makes them.

# %%
@torch.inference_mode()
def cache_bytes(model, n=32):
    """Bytes of keys and values that a model holds for each of n tokens."""
    text, caught = corpus.valid[None, :n].to(device), []
    if isinstance(model, FeedbackTransformer):
        return measure.kept_alive(model(text)[1]) / n  # a first text gets no room yet
    projections = [layer.attention.query_key_value for layer in model.layers]
    hooks = [p.register_forward_hook(lambda module, args, out: caught.append(out)) for p in projections]
    model(text)
    for hook in hooks:
        hook.remove()
    return sum(measure.kept_alive(qkv) * 2 / 3 for qkv in caught) / n  # two of query, key and value


d_model, layer_counts = SIZES["d_model"], [1, 2, 4, 8]
cache, computed = {}, {}
for name, make, per_token in [
    ("vanilla", lambda L: VanillaTransformer(**vanilla_sizes, n_layers=L, max_len=T), lambda L: 2 * L * d_model),
    ("Feedback, per layer", lambda L: FeedbackTransformer(**SIZES, n_layers=L, shared_kv=False), lambda L: 2 * L * d_model),
    ("Feedback, shared", lambda L: FeedbackTransformer(**SIZES, n_layers=L), lambda L: 2 * d_model),
]:
    cache[name] = [cache_bytes(make(L).to(device)) for L in layer_counts]
    computed[name] = [4 * per_token(L) for L in layer_counts]

# %% [markdown]
# The other bytes are those that autograd keeps for the backward pass.

# %%
def backward_bytes(model, length):
    tokens = corpus.valid[: 16 * length].view(16, length).clone().to(device)  # not all of the text's bytes
    return measure.bytes_for_backward(model, lambda: model(tokens)[0], count=measure.kept_alive)


kept = {
    "Feedback, autograd": [backward_bytes(slow, n) for n in lengths],
    "Feedback, by hand": [backward_bytes(fast, n) for n in lengths],
    "vanilla": [backward_bytes(parallel, n) for n in lengths],
}

# %%
figure, axes = plt.subplots(1, 2, figsize=(6.4, 3.6))
for marker, size, (name, values) in zip("osd", (11, 6, 6), cache.items()):
    (line,) = axes[0].plot(layer_counts, values, marker, markersize=size, label=name)
    axes[0].plot(layer_counts, computed[name], ":", color=line.get_color())
axes[0].set(xlabel="layers", ylabel="bytes per token", ylim=(0, None), title="cache; dotted: computed")
figures.curves(
    axes[1], lengths, {name: [b / 2**20 for b in values] for name, values in kept.items()}, marker="o",
    xlabel="length of the segment (tokens)", ylabel="kept for backward (MiB)",
)
axes[1].set(xscale="log", yscale="log", title="2 layers, batch 16")
axes[1].set_xticks(lengths, labels=lengths)
axes[1].set_yticks([2, 5, 10, 20, 50, 100], labels=["2", "5", "10", "20", "50", "100"])
axes[1].minorticks_off()
for ax in axes:
    ax.legend(fontsize=8)
figures.show(
    figure,
    "Left: cache bytes per token against layers; vanilla and Feedback per layer rise together on one dotted line, "
    "Feedback with shared keys and values stays level. Right: bytes kept for the backward pass against segment "
    "length; autograd's loop highest and steepest, the hand-written pass far below, near vanilla.",
)
assert cache == computed
for name, values in kept.items():
    print(f"{name:18}", "  ".join(f"T = {n}: {b / 2**20:6.1f} MiB" for n, b in zip(lengths, values)))
assert kept["Feedback, autograd"][-1] > 4 * kept["Feedback, by hand"][-1]
assert kept["Feedback, by hand"][-1] < 2 * kept["vanilla"][-1]

# %% [markdown]
# The shared cache does not grow with depth. And the hand-written pass keeps the states once,
# where autograd's loop keeps, step after step, the joined keys and values of all steps so far.
#
# ## 3.8 Departures from the paper
#
# | here | the paper and its code | why |
# | --- | --- | --- |
# | the memory has a norm of its own | pre-LN: the norm of the layer, tied across layers where keys and values are shared | the memory is made once for all layers; its norm can be too |
# | a hand-written backward pass for a segment | autograd, with a buffer that is written in place | speed; and nothing that is written in place can be wrong when two passes overlap |
# | the hand-written pass has no dropout: with dropout the loop runs | autograd, with dropout | a shorter file; at this size nothing overfits |
# | dropout on the embedding, on attention weights, and on what each sub-layer adds | on attention weights and inside the feed-forward | as in the other chapters |
# | the first step sees nothing | the released code starts from a memory of zero vectors, which take part in the softmax | a text should not depend on how many empty slots there are |
# | a fixed window of `mem_len` | for text, a window whose length each head learns (adaptive span) | one idea at a time |
# | the last projections of attention and feed-forward start as PyTorch starts them | divided by $\sqrt{2L}$ in the released code | not needed with four layers |
# | a copy of vanilla weights drops its positions | parallel and feedback models share their kind of position | chapter 1 has the kind that would fit; the baseline stays simple |
# | models of some hundred thousand parameters, seconds of training | up to 139 million (WikiText-103), days | what a notebook can do |
#
# ## 3.9 What became of it
#
# - **Keys and values shared by all layers** came back for the sake of the cache alone:
# cross-layer attention and YOCO ("you only cache once") share them between layers of parallel
# transformers.
# - **Recurrence in depth** was the point that lasted. Feedback is one answer to "how long may a
# thought be?"; looped transformers, and chains of thought that are written out and read again,
# are others. A written chain is feedback through the text: the top layer's output becomes the
# bottom layer's input.
# - **Block recurrence** took the middle way: the Block-Recurrent Transformer and the Staircase
# family (from one of the authors of this paper) hand states back once a block, so that a block stays
# parallel.
# - **Strictly sequential training** did not last. On hardware that lives off large products, its
# price is what you measured above; linear recurrences, such as state space models, gave up
# expressive power to get rid of it.

# %% [markdown]
# ## 3.10 Exercises
#
# 1. *(10 minutes)* How many layers can information pass on its way from a token to the prediction
# made `n` tokens later? Write `my_clock(n_layers, n, kind)` for `kind` "vanilla" (inside one
# window) and "feedback". Check it with `check_clock` below.
# 2. *(10 minutes)* Play with 7 cups. Which part of `LESSONS` do you have to change?
# 3. *(20 minutes)* Let step `t` read its own memory vector. Why is that impossible in one pass,
# and what would two passes give?
# 4. *(30 minutes)* Set `mem_len` to 1 for the ball. Is attention still needed? Compare with a
# recurrent network.
# 5. *(20 minutes)* Give `layer_weights` a learning rate a hundred times higher than the rest (you
# will need your own loop). Which layers does the text want in its memory? And the ball?
# 6. *(60 minutes)* Give `step_back` dropout on the attention weights: which tensor has to be
# kept, and which lines of `run` and `step_back` change? `gradcheck` tells you when you are done.

# %%
def check_clock(my_clock):
    """Exercise 1: compares with the longest path through the states of the unrolled network."""
    for n_layers, n, kind in [(1, 0, "vanilla"), (4, 9, "vanilla"), (1, 0, "feedback"), (3, 7, "feedback")]:
        longest = {(0, 0): 0}  # (position, layer): the most layers passed since the token at position 0
        for t in range(n + 1):
            for layer in range(1, n_layers + 1):
                if kind == "vanilla":
                    before = [longest.get((i, layer - 1)) for i in range(t + 1)]
                else:
                    before = [longest.get((i, l)) for i in range(t) for l in range(n_layers + 1)]
                    before.append(longest.get((t, layer - 1)))
                if any(b is not None for b in before):
                    longest[t, layer] = 1 + max(b for b in before if b is not None)
        mine = my_clock(n_layers, n, kind)
        assert mine == longest[n, n_layers], f"{kind}, {n_layers} layers, n = {n}: {mine}"
    print("right")


# %% [markdown]
# <details><summary>A solution of exercise 1</summary>
#
# ```python
# def my_clock(n_layers, n, kind):
#     return n_layers if kind == "vanilla" else n_layers * (n + 1)
# ```
#
# Each layer of the parallel model passes once. With feedback, all layers are passed again at each
# token.
#
# </details>
#
# ## References
#
# - A. Fan, T. Lavril, E. Grave, A. Joulin, S. Sukhbaatar: [Addressing Some Limitations of
# Transformers with Feedback Memory](https://arxiv.org/abs/2002.09402). 2020.
# - B. Liu et al.: [Transformers Learn Shortcuts to Automata](https://arxiv.org/abs/2210.10749).
# ICLR 2023.
# - D. Hutchins et al.: [Block-Recurrent Transformers](https://arxiv.org/abs/2203.07852). NeurIPS
# 2022.
# - D. Ju et al.: [Staircase Attention for Recurrent Processing of
# Sequences](https://arxiv.org/abs/2106.04279). 2021.
# - W. Brandon et al.: [Reducing Transformer Key-Value Cache Size with Cross-Layer
# Attention](https://arxiv.org/abs/2405.12981). 2024.
# - Y. Sun et al.: [You Only Cache Once: Decoder-Decoder Architectures for Language
# Models](https://arxiv.org/abs/2405.05254). NeurIPS 2024.
# - P. Shaw, J. Uszkoreit, A. Vaswani: [Self-Attention with Relative Position
# Representations](https://arxiv.org/abs/1803.02155). NAACL 2018.
# - Z. Dai et al.: [Transformer-XL: Attentive Language Models Beyond a Fixed-Length
# Context](https://arxiv.org/abs/1901.02860). ACL 2019.
# - A. Vaswani et al.: [Attention Is All You Need](https://arxiv.org/abs/1706.03762). NeurIPS
# 2017.

# %%
minutes = (time.perf_counter() - started) / 60
peak = measure.process_peak_bytes() / 2**30
print(f"this run: {minutes:.1f} minutes, peak memory {peak:.2f} GiB, text: {corpus.name}")
