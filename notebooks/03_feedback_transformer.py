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
# No links to Colab and Kaggle here: the project has no public address yet.
# To run this notebook, type `make lab` in your copy of the project.

# %% [markdown]
# In a transformer, layer 1 never learns what layer 4 found out, not even one token later: each layer reads only the layer
# below it. The **Feedback Transformer** ([Fan et al., 2020](https://arxiv.org/abs/2002.09402)) lifts this limit. At each
# token the outputs of *all* layers are mixed into one memory vector, and *every* layer of every later token attends to
# these vectors. The price: unlike in *parallel* transformers, tokens cannot be computed side by side.
#
# **After this chapter you can**
# - say what a transformer of fixed depth does not learn, and show it in an experiment;
# - write a transformer with feedback memory, with keys and values per layer or shared;
# - name a task that neither a small recurrent network nor a parallel transformer does well, and why feedback does;
# - measure what training, generation and memory cost, and generate with a cache.
#
# **You need** PyTorch, and attention with queries, keys and values. Chapter 1 helps but is not required. Two words from
# it: a text is read in *segments* of `T` tokens; and a *Transformer-XL* is a transformer whose layers also attend to what
# the layer below them computed in the segment before.
#
# **Time and memory.** About 6 minutes and 1 GiB on two CPU cores. The notebook trains some twenty-five small models while
# you read. The last cell prints what it took on your machine.

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
import time
from functools import partial

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import memtx_minimal
from memtx_minimal import (
    bands, corpora, exercises, figures, inputs, measure, tasks, training,
)  # fmt: skip
from memtx_minimal.transformer_xl import TransformerXL
from memtx_minimal.vanilla_transformer import VanillaTransformer, sinusoid

SEED = 0
started = time.perf_counter()
device = training.best_device()
figures.use_style()
LOOK = {  # of each model, in all figures
    "Feedback": dict(marker="o", color=figures.COLOUR["Feedback"]),
    "Transformer-XL": dict(marker="s", color=figures.COLOUR["Transformer-XL"]),
    "Elman network": dict(marker="x", color="black"),
    "vanilla": dict(marker="D", color=figures.COLOUR["vanilla"]),
}
print(f"PyTorch {torch.__version__} on {device}")

# %% [markdown]
# The letters in the shape comments:
#
# | letter | meaning | letter | meaning |
# | --- | --- | --- | --- |
# | `B` | batch: texts side by side | `H` | attention heads |
# | `T` | tokens in the segment | `d_model` | width of a hidden state |
# | `M` | states in memory: one vector a step | `d_head` | width of a head, `d_model / H` |
# | `L` | layers | `mem_len` | the most states that memory holds |
# | `N` | tokens in a whole text | `d_ff` | width inside the feed-forward |
#
# The idea in one picture: who may look at whom, at *one* step. (*Vanilla* is the plain transformer of chapter 0: it sees
# only its own segment, the window.) Positions run across, layers go up. The blue step is being computed; it reads what is
# orange. In the last picture the grey columns had to be finished, one after the other, before their orange squares
# existed. That is the price.

# %% jupyter={"source_hidden": true} tags=["hide-input"]
figure, axes = plt.subplots(3, 1, figsize=(6.4, 7.2))
title = "Vanilla: the layer below, in the window"
sees = dict(cached=range(4, 7), sees=lambda i: range(4, 8))
figures.unrolled(axes[0], 3, 8, now=[7], title=title, **sees)
title = "Transformer-XL: the layer below, and its past"
sees = dict(cached=range(7), sees=lambda i: range(8))
figures.unrolled(axes[1], 3, 8, now=[7], title=title, **sees)
figures.unrolled_feedback(axes[2], 3, now=7)
figures.show(
    figure,
    "Only with feedback do lines run from the top of earlier steps down to layer 1 of "
    "the current step. In the vanilla transformer and in Transformer-XL each layer "
    "reads the layer below it, within the window or beyond.",
)

# %% [markdown]
# ## 3.1 The problem: depth is the only clock
#
# A ball lies under cup 0, the first of five. A token swaps two of them, so there are ten tokens. Where is the ball after
# each swap? (The stream of games gives tokens, targets, and a third item that tells the training loop that new games
# begin, so that memory starts empty.) The task is easy for anyone who can remember one number: keep the place, and update
# it at each swap. Counting how often each swap has occurred is not enough, since their order matters.

# %%
pairs = torch.combinations(torch.arange(5))  # (10, 2): what the ten tokens mean
tokens, targets, _ = next(tasks.cups(batch_size=1, segment_len=6, seed=SEED))
for token, cup in zip(tokens[0], targets[0]):
    a, b = pairs[token].tolist()
    print(f"token {token}: swap cups {a} and {b}   the ball is now under cup {cup}")

# %% [markdown]
# All models get the same *lessons*, the first with games of two swaps, the last with games of 32. A lesson is one run of
# the course's training loop, with its own warm-up and decay; `scale` multiplies its learning rate. (`clip` bounds the
# gradients. It was chosen once for each task and not varied.)

# %% tags=["band"]
GAMES = dict(vocab_size=10, d_model=64, n_heads=4, d_ff=256)
LESSONS = [(2, 150, 1e-2), (4, 250, 1e-2), (8, 150, 1e-2)]  # swaps, steps, rate
LESSONS += [(16, 80, 5e-3), (32, 40, 1e-3)]


def train(model, games, **options):
    """The course's training loop, without its progress bar -> the model."""
    training.train(model, games, warmup=20, progress=False, **options)
    return model


def learn(model, lessons, scale=1.0, seed=SEED):
    """Train on games: lessons is a list of (length of a game, steps, learning rate)."""
    for length, steps, lr in lessons:
        games = tasks.cups(128, length, seed=1000 * seed + length)
        train(model, games, steps=steps, lr=scale * lr, clip=0.1)
    return model


def n_parameters(model):
    return sum(p.numel() for p in model.parameters())


@torch.no_grad()
def exam(model, length=32, n_games=1000):
    """The share of right answers after each swap, in new games: a list of `length`."""
    tokens, targets, _ = next(tasks.cups(n_games, length, seed=10**6))
    logits = model.eval()(tokens.to(device))[0].cpu()  # (n_games, length, vocab_size)
    return (logits.argmax(dim=-1) == targets).float().mean(dim=0).tolist()

# %% [markdown]
# The vanilla transformer takes these lessons with 1, 2, 4 and 8 layers, at 0.3 of the learning rates. Is that too low, or
# too high? `rate_scores` trains four layers at the full rates and at 0.1 of them, too.

# %% tags=["band"]
def depth_scores(seed):
    """Right answers by swap, for vanilla transformers of four depths."""
    scores = {}
    for n_layers in (1, 2, 4, 8):
        torch.manual_seed(seed)
        model = VanillaTransformer(**GAMES, n_layers=n_layers, max_len=32).to(device)
        model = learn(model, LESSONS, scale=0.3, seed=seed)
        scores[f"vanilla, {n_layers}"] = exam(model)
    return scores

# %% tags=["band"]
def rate_scores(seed):
    """[right over all swaps, right over the last eight], 4 layers, by learning rate."""
    scores = {}
    for scale in (1.0, 0.3, 0.1):
        torch.manual_seed(seed)
        model = VanillaTransformer(**GAMES, n_layers=4, max_len=32).to(device)
        shares = exam(learn(model, LESSONS, scale=scale, seed=seed))
        scores[f"{scale}"] = [sum(shares) / 32, sum(shares[24:]) / 8]
    return scores

# %% [markdown]
# One run proves little. So both functions were run for the seeds 0 to 4 beforehand, and `bands.load` reads what came out.
# Your run is drawn over these *bands*, and `check` asks it to lie in them, give or take a margin: other machines round
# differently, and training amplifies the difference. (`rate_scores` is not trained live.)

# %%
by_depth = depth_scores(SEED)
depth_band = bands.load("03_depth_scores", text=None)  # made-up games, no text
rate_band = bands.load("03_rate_scores", text=None)

# %% jupyter={"source_hidden": true} tags=["hide-input"]
def span(values, digits=2):
    """What recorded seeds (n,) span, in words."""
    ends = (f"{end(values):.{digits}f}" for end in (min, max))
    return " to ".join(ends) if len(values) else "none"


def swaps_axes(axes, title):
    """What the figures of the ball have in common."""
    axes.axhline(0.2, color="black", linestyle=":", label="guessing")
    axes.set(xlabel="swaps so far", ylabel="share of right answers")
    axes.set(ylim=(0, 1.03), title=title)
    axes.set_xticks([1, 4, 8, 16, 24, 32])
    axes.legend()


figure, axes = plt.subplots()
for (name, shares), marker in zip(by_depth.items(), "o^sD"):
    layers, label = name.split(", ")[1], "{} recorded seeds" if marker == "o" else "_"
    figures.band(axes, range(1, 33), depth_band.values[name], label)
    label = f"{layers} layer{'s' * (layers != '1')}"
    axes.plot(range(1, 33), shares, marker=marker, label=label)
swaps_axes(axes, "More layers hold the ball longer, then lose it (vanilla)")
figures.show(
    figure,
    "Each vanilla transformer answers right after the first swaps and then falls to "
    "guessing, one in five. With more layers it falls later: the curves of 1, 2, 4 "
    "and 8 layers lie in this order.",
)

# %%
mean = {name: sum(shares) / 32 for name, shares in by_depth.items()}
print("right over all swaps:", {name: round(share, 2) for name, share in mean.items()})
depth_band.check(by_depth, margin=0.1)
assert mean["vanilla, 1"] < mean["vanilla, 2"] < mean["vanilla, 8"] < 0.6
assert all(shares[-1] < 0.4 for shares in by_depth.values())
after_8 = [shares[7] for shares in by_depth.values()]
assert after_8 == sorted(after_8)  # practised in the last 270 steps

rates = rate_band.values  # {"0.1": (n, 2), ...}
figures.table(
    "Vanilla, 4 layers, five recorded seeds: share of right answers",
    ["learning rates times", "all swaps", "swaps 25 to 32"],
    [[scale, *(span(column) for column in rates[scale].T)] for scale in rates],
)
late = sum(by_depth["vanilla, 4"][24:]) / 8
rate_band.check({"0.3": [mean["vanilla, 4"], late]}, margin=0.1)
low, high = rate_band.low, rate_band.high
assert low("0.3")[0] > max(high("1.0")[0], high("0.1")[0])
assert max(high(scale)[1] for scale in rates) < 0.25

# %% [markdown]
# More layers follow the ball a little longer, and then guess too. With four layers another learning rate does not help:
# of the three factors 0.3 is the best, and at all of them the last swaps are guesses. (Positions beyond 16 occur in the
# last 40 steps only, which may be part of the fall there. But the curves part within the first eight swaps.)
#
# A state of layer $l$ is made of states of layer $l-1$. One layer can merge a few swaps into one, and the next can merge
# what the first has merged. In principle the number of layers need only grow with the logarithm of the length (Liu et
# al., 2023), so eight could do 32 swaps; trained like this, they do not find out how. And for games of any length, no
# fixed number of layers is enough, as far as anyone knows: a layer is one tick of the clock.
#
# ## 3.2 One memory for all layers
#
# Let $x_t^0$ be the embedding of token $t$, and $x_t^1 \ldots x_t^L$ the outputs of the layers. The paper changes what
# layer $l$ attends to: no longer the layer below, but memory vectors of the steps before,
#
# $$
# z_t^l = \text{Attention}\left(x_t^{l-1},\; \left[m_{t-\tau}, \ldots, m_{t-1}\right]\right) , \qquad
# m_t = \sum_{l=0}^{L} \text{softmax}(w)_l \; x_t^l .
# $$
#
# Here $\tau$ is the length of the memory, `mem_len` in the code (in chapter 1, $\tau$ counted segments), and $w$ are
# $L+1$ learned numbers, one set for the whole model. From $z_t^l$ the layer goes on as always, through residual and
# feed-forward, to $x_t^l$. Attention ends at $m_{t-1}$: step $t$ cannot read its own memory vector, which does not exist
# yet.
#
# **Why one vector?** One could keep all $L+1$ states of each step. Attention would then have $L+1$ times as many keys to
# compute and to store. The mixture is the cheap way to hand on something of every layer.
#
# ### The layer
#
# It is an ordinary transformer layer, except that it computes *one* step, and that its keys and values are handed in. The
# norms stand before attention and before the feed-forward, inside the residual branch (pre-norm, or pre-LN). The score of
# a query $q$ with key $k_j$ is $q^\top k_j / \sqrt{d_{\text{head}}}$.

# %% tags=["from-module"]
class Layer(nn.Module):
    """One layer at one step: attention to memory, then feed-forward."""

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
        """x (B, d_model), keys and values (B, H, M, d_head) -> like x."""
        q = self.query(x).unflatten(-1, (self.n_heads, 1, -1))  # (B, H, 1, d_head)
        scores = q.size(-1) ** -0.5 * q @ keys.mT  # (B, H, 1, M)
        weights = self.dropout(scores.softmax(dim=-1))
        return self.out((weights @ values).flatten(1))  # (B, d_model)

    def forward(self, x, keys, values):
        """The state x (B, d_model) and what it sees -> the next state (B, d_model)."""
        x = x + self.dropout(self.attention(self.norm_attention(x), keys, values))
        return x + self.dropout(self.feed_forward(self.norm_feed_forward(x)))

# %%
torch.manual_seed(SEED)
layer = Layer(d_model=16, n_heads=2, d_ff=32, dropout=0.0)
x = torch.randn(3, 16)  # (B, d_model): one step of three texts
for M in (5, 0):
    out = layer(x, keys=torch.randn(3, 2, M, 8), values=torch.randn(3, 2, M, 8))
    print(f"M = {M}: x", tuple(x.shape), "-> out", tuple(out.shape))

# %% [markdown]
# `M = 0` is the first step of a text. The softmax of no scores is no weights, and a sum of no values is zero: attention
# adds nothing, and the feed-forward does what it can.
#
# ### The memory
#
# The class `Memory` has three methods. `vector` makes the mixture $m_t$. `keys_values` turns memory vectors into `n_kv`
# sets of keys and values; they are **normalised first**, like everything that enters attention in a pre-norm layer. With
# `shared_kv` all layers share one projection (`n_kv` is 1), so that each vector is projected *once*, whatever the depth;
# otherwise each layer has its own (`n_kv` is `L`). (The paper recommends sharing.)
#
# `seen` adds the order. Without it, memory would be a set: attention could not tell yesterday from last year. Let $a =
# t-j$ be the age of memory vector $j$ at step $t$. The score becomes
#
# $$
# \frac{1}{\sqrt{d_{\text{head}}}}\; q^\top \left(k_j + p_a\right) ,
# $$
#
# with one vector $p_a$ for each age, learned from a random start and shared by all layers and heads, as in the authors'
# code. They stand in `positions` in the order of the keys, the oldest first.

# %% tags=["from-module"]
class Memory(nn.Module):
    """From the states of a step to its memory vector, then to keys and values."""

    def __init__(self, d_model, n_heads, n_layers, mem_len, shared_kv):
        super().__init__()
        self.n_heads = n_heads
        self.layer_weights = nn.Parameter(torch.zeros(n_layers + 1))  # w
        self.norm = nn.LayerNorm(d_model)
        n_kv = 1 if shared_kv else n_layers
        self.key_value = nn.Linear(d_model, n_kv * 2 * d_model, bias=False)
        self.positions = nn.Parameter(torch.randn(mem_len, d_model // n_heads))

    def vector(self, states):
        """The mixture of L + 1 states (B, d_model), embedding first -> (B, d_model)."""
        weights = self.layer_weights.softmax(dim=0)
        return torch.einsum("l,lbd->bd", weights, torch.stack(states))

    def keys_values(self, vectors):
        """Vectors (B, M, d_model) -> kv (B, M, n_kv, 2, H, d_head)."""
        kv = self.key_value(self.norm(vectors))  # (B, M, n_kv * 2 * d_model)
        return kv.unflatten(-1, (-1, 2, self.n_heads, self.positions.size(1)))

    def seen(self, kv):
        """Keys with their ages added, and values, (n_kv, B, H, M, d_head) each."""
        keys, values = kv.permute(3, 2, 0, 4, 1, 5)
        oldest = len(self.positions) - keys.size(-2)
        keys = keys + self.positions[oldest:]  # ages M ... 2, 1
        return keys.contiguous(), values.contiguous()  # not in each layer anew

# %%
torch.manual_seed(SEED)
small = Memory(d_model=16, n_heads=2, n_layers=3, mem_len=5, shared_kv=True)
states = [torch.randn(1, 16) for _ in range(4)]  # the embedding and three layers
vector = small.vector(states)  # (B, d_model)
assert torch.allclose(vector, torch.stack(states).mean(dim=0))  # w = 0: a plain mean
kv = small.keys_values(torch.stack([vector] * 5, dim=1))  # five steps, all alike
keys, values = small.seen(kv)
assert keys.shape == values.shape
print("kv", tuple(kv.shape), "-> keys and values", tuple(keys.shape))
assert torch.allclose(kv[:, 0], kv[:, 4])  # equal vectors have equal keys ...
assert not torch.allclose(keys[..., 0, :], keys[..., 4, :])  # ... until ages are added

# %% [markdown]
# ### Step after step
#
# `embed` looks up $x_t^0$, and checks the tokens and `mem_len`, which you may lower in a trained model. `step` takes one
# token up through all layers and leaves one memory vector.

# %% tags=["from-module"]
def embed(model, tokens):
    """Tokens (B, T), checked -> what the steps begin with, (B, T, d_model)."""
    inputs.check_number("mem_len", model.mem_len, 1, len(model.memory.positions))
    inputs.check_tokens(tokens, model.embedding.num_embeddings)
    return model.dropout(model.embedding(tokens))

# %% tags=["from-module"]
def step(model, x, kv):
    """One token x (B, d_model) -> its output and memory vector, (B, d_model) each."""
    keys, values = model.memory.seen(kv)
    states = [x]
    for n, layer in enumerate(model.layers):
        n_kv = n % len(keys)  # which set: 0 for every layer if they share one
        states.append(layer(states[-1], keys[n_kv], values[n_kv]))
    return states[-1], model.memory.vector(states)

# %% [markdown]
# The rest is a `loop`, one token after the other. Each new vector gets its keys and values, which join those of the past.
#
# Between two calls the memory is the **vectors** $m$ themselves, the latest `mem_len` of them. The next call makes their
# keys and values anew. No gradient flows into the old vectors, but the projections still learn from them. For a new text,
# where memory is None, `checked_memory` returns its second argument, no vectors.

# %% tags=["from-module"]
class FeedbackTransformer(nn.Module):
    """A language model whose layers all read one memory of what all layers found.

    tokens (B, T) int64, memory -> logits (B, T, vocab_size), memory: the latest mem_len
    vectors, (B, M, d_model), detached. Pass None at the start of a stream. mem_len may
    be lowered at any time. shared_kv: one projection to keys and values for all layers,
    or one for each.
    """

    def __init__(
        self, vocab_size, d_model=128, n_heads=4, n_layers=4, d_ff=512,
        mem_len=64, shared_kv=True, dropout=0.0,
    ):  # fmt: skip
        super().__init__()
        inputs.check_sizes(locals())
        inputs.check_number("mem_len", mem_len, 1)
        self.mem_len, self.shared_kv = mem_len, shared_kv
        self.embedding = nn.Embedding(vocab_size, d_model)
        self.dropout = nn.Dropout(dropout)
        stack = (Layer(d_model, n_heads, d_ff, dropout) for _ in range(n_layers))
        self.layers = nn.ModuleList(stack)
        self.memory = Memory(d_model, n_heads, n_layers, mem_len, shared_kv)
        self.norm, self.head = nn.LayerNorm(d_model), nn.Linear(d_model, vocab_size)

    def loop(self, x, kv):
        """x (B, T, d_model), step by step -> outputs, vectors, the latest kv."""
        outputs, vectors = [], []
        for x_t in x.unbind(dim=1):
            output, vector = step(self, x_t, kv)
            new = self.memory.keys_values(vector[:, None])  # (B, 1, n_kv, 2, H, d_head)
            kv = torch.cat([kv, new], dim=1)[:, -self.mem_len :]
            outputs.append(output)
            vectors.append(vector)
        return torch.stack(outputs, dim=1), torch.stack(vectors, dim=1), kv

    def forward(self, tokens, memory=None):
        x = embed(self, tokens)  # (B, T, d_model)
        memory = inputs.checked_memory(memory, x[:, :0].detach())  # none yet: M = 0
        old = memory[:, -self.mem_len :]  # (B, M, d_model)
        outputs, new, _ = self.loop(x, self.memory.keys_values(old))
        memory = torch.cat([old, new], dim=1)[:, -self.mem_len :].detach()
        return self.head(self.norm(outputs)), memory.clone()

# %%
torch.manual_seed(SEED)
tiny = FeedbackTransformer(10, d_model=16, n_heads=2, n_layers=3, d_ff=32, mem_len=6)
text = torch.randint(10, (2, 12))  # (B, 12)
memory = None
for segment in text.split(4, dim=1):
    logits, memory = tiny(segment, memory)
    print("logits", tuple(logits.shape), " memory", tuple(memory.shape))

# %% [markdown]
# That is the whole model. (The `clone` at its end makes the memory a tensor of its own; a slice would keep all of what it
# was cut from.) Is it right? Every step sees the latest `mem_len` vectors, so it must not matter where the text is cut:
# token by token, in segments, or not at all.

# %%
@torch.no_grad()
def read(model, text, segment_len):
    """Logits of a text (B, N), read in segments, with memory from one to the next."""
    memory, logits = None, []
    for segment in text.split(segment_len, dim=1):
        out, memory = model(segment, memory)
        logits.append(out)
    return torch.cat(logits, dim=1)  # (B, N, vocab_size)


tiny = tiny.double()
whole = read(tiny, text, 12)
for segment_len in (1, 3, 5):
    difference = (read(tiny, text, segment_len) - whole).abs().max()
    print(f"segments of {segment_len}: largest difference {difference:.1e}")
    assert difference < 1e-12

# %% [markdown]
# ## 3.3 Train it
#
# Tiny Shakespeare, one million characters, and the training loop that all chapters share (`memtx_minimal/training.py`):
# AdamW, memory handed from segment to segment.

# %% tags=["band"]
corpus = corpora.tiny_shakespeare()
T, STEPS = 32, 160
SIZES = dict(vocab_size=len(corpus.vocab), d_model=64, n_heads=4, d_ff=256, mem_len=T)


def fit(model, seed, steps=STEPS):
    """Train on segments of T characters: the model, its losses in nats, the seconds."""
    torch.manual_seed(seed)
    start = time.perf_counter()
    options = dict(steps=steps, segment_len=T, clip=0.5, progress=False)
    history = training.train(model.to(device), corpus.train, **options)
    return model, history["loss"], time.perf_counter() - start


def valid_loss(model):
    """Nats per character on the validation text."""
    return training.evaluate(model, corpus.valid[:20_000], segment_len=T)

# %%
torch.manual_seed(SEED)
feedback, losses, seconds = fit(FeedbackTransformer(**SIZES, n_layers=2), SEED)
print(f"{corpus.name}, {STEPS} steps: {seconds:.0f} seconds")
by_forty = [sum(losses[n : n + 40]) / 40 for n in range(0, STEPS, 40)]
print("nats per character, means of 40 steps:", [round(loss, 2) for loss in by_forty])
print(f"validation: {valid_loss(feedback):.3f}")

# %%
prompt = corpus.valid[:64]
text = training.generate(feedback, prompt, 160, temperature=0.8)
print(corpus.vocab.decode(text[64:]))

# %% [markdown]
# It has learned what words look like, and not much more.
#
# ## 3.4 One layer follows the ball
#
# Back to the cups, with the same lessons at full rates. Expected: a Feedback Transformer hands the place of the ball from
# memory vector to memory vector, so that a *single* layer is enough. But any recurrent network could do the same. So we
# train an Elman network as well. Its one state is updated at each token: $s_t = \tanh(W x_t + U s_{t-1} + b)$.

# %% tags=["band"]
class Recurrent(nn.Module):
    """An Elman network, called like the other models. Its memory is its state."""

    def __init__(self, vocab_size, d_model):
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, d_model)
        self.rnn = nn.RNN(d_model, d_model, batch_first=True)
        self.head = nn.Linear(d_model, vocab_size)

    def forward(self, tokens, memory=None):
        states, memory = self.rnn(self.embedding(tokens), memory)
        return self.head(states), memory.detach()

# %% tags=["band"]
def trackers(seed):
    """Two models that took the lessons, and their right answers by swap."""
    torch.manual_seed(seed)
    models = {
        "Feedback, 1 layer": FeedbackTransformer(**GAMES, n_layers=1, mem_len=32),
        "Elman network": Recurrent(GAMES["vocab_size"], GAMES["d_model"]),
    }
    for model in models.values():
        learn(model.to(device), LESSONS, seed=seed)
    return models, {name: exam(model) for name, model in models.items()}


def far(models):
    """Right answers from swap 400 to swap 500, in 50 long games."""
    rows = {f"{name}, far": exam(model, 500, 50) for name, model in models.items()}
    return {name: sum(row[400:]) / 100 for name, row in rows.items()}


def tracker_scores(seed):
    models, scores = trackers(seed)
    return scores | far(models)

# %%
tracking, by_swap = trackers(SEED)
tracker_band = bands.load("03_tracker_scores", text=None)

# %% jupyter={"source_hidden": true} tags=["hide-input"]
figure, axes = plt.subplots()
recorded = tracker_band.values | {"vanilla, 8 layers": depth_band.values["vanilla, 8"]}
for name, shares in (by_swap | {"vanilla, 8 layers": by_depth["vanilla, 8"]}).items():
    label = "{} recorded seeds" if name == "vanilla, 8 layers" else "_"
    figures.band(axes, range(1, 33), recorded[name], label)
    axes.plot(range(1, 33), shares, label=name, **LOOK[name.split(",")[0]])
swaps_axes(axes, "The recurrent models keep the ball (cups)")
figures.show(
    figure,
    "The Feedback Transformer with one layer and the Elman network stay near 1 for "
    "all 32 swaps; the vanilla transformer with eight layers falls to guessing.",
)

# %%
by_far = far(tracking)
tracker_band.check(by_swap, margin=0.1)
assert all(min(shares) > 0.85 for shares in by_swap.values())
figures.table(
    "Right answers, far beyond the lessons",
    ["", "parameters", "swaps 1 to 32", "swaps 400 to 500", "the same, recorded seeds"],
    [
        [
            name, f"{n_parameters(model):,}", f"{sum(by_swap[name]) / 32:.3f}",
            f"{by_far[name + ', far']:.3f}", span(tracker_band.values[name + ", far"]),
        ]
        for name, model in tracking.items()
    ],
)  # fmt: skip

# %% [markdown]
# With one layer the ball is hardly ever lost, even in games fifteen times longer than any lesson. Up to 32 swaps the
# little Elman network does it nearly as well: here the two lines coincide, and the band that sinks a little is the Elman
# network's. From swap 400 to 500, it depends on the seed (last column). So the ball shows what *parallel* transformers do
# not learn. It does not show that you need *this* architecture.
#
# ## 3.5 State and recall at once
#
# A recurrent network keeps one state. A transformer looks things up in its past. A Feedback Transformer should do both.
# The game: first a *card* gives each of five places one of 16 letters (two may have the same). Then the ball is put
# somewhere, and *events* follow. About half are swaps, as before, after which the place is asked for. The others are
# questions: which letter is on the card for the place where the ball is *now*? So one keeps a state, and looks something
# up by it.

# %% jupyter={"source_hidden": true} tags=["hide-input"]
tokens, targets, _ = next(tasks.card(1, 6, seed=13))
letters, words = "ABCDEFGHIJKLMNOP", []
for token in tokens[0].tolist():
    if token < 80:
        words.append(f"card: place {token // 16} has {letters[token % 16]}")
    elif token < 90:
        words.append(f"swap {pairs[token - 80].tolist()}")
    else:
        words.append("which letter?" if token == 90 else f"start at place {token - 91}")
answers = [
    "" if t < 0 else letters[t] if t < 16 else f"place {t - 16}"
    for t in targets[0].tolist()
]
figures.table("One game of the card task", ["token", "answer"], zip(words, answers))

# %% [markdown]
# Three models learn it, first in games of 2 events, finally in games of 24 (30 tokens): a Feedback Transformer of two
# layers (one look for the place of the ball, the next for the letter of that place), a vanilla transformer of the same
# depth, and an Elman network of about as many parameters. The other two get 0.6 of the learning rates. Is that too low?
# `card_full_scores` trains them at the full rates (recorded, not run here).

# %% tags=["band"]
CARD_LESSONS = [(2, 500, 5e-3), (4, 300, 5e-3), (12, 100, 3e-3), (24, 80, 2e-3)]
CARD = dict(vocab_size=tasks.CARD_VOCAB, d_model=64, n_heads=4, d_ff=256, n_layers=2)


@torch.no_grad()
def card_exam(model, n_events=24):
    """The shares of right places and of right letters in the second half of games."""
    tokens, targets, _ = next(tasks.card(1000, n_events, seed=10**6))
    answers = model.eval()(tokens.to(device))[0].argmax(dim=-1).cpu()
    late = slice(-n_events // 2, None)  # targets below tasks.LETTERS are letters
    right, places = (answers == targets)[:, late], (targets >= tasks.LETTERS)[:, late]
    return [right[places].float().mean().item(), right[~places].float().mean().item()]

# %% tags=["band"]
def card_scores(seed):
    """[right places, right letters] of three models that learned the card game."""
    torch.manual_seed(seed)
    models = {
        "Feedback": FeedbackTransformer(**CARD, mem_len=30),
        "vanilla": VanillaTransformer(**CARD, max_len=30),
        "Elman network": Recurrent(tasks.CARD_VOCAB, 190),  # about as many parameters
    }
    scores = {}
    for name, model in models.items():
        scale = 1.0 if name == "Feedback" else 0.6
        for n_events, steps, lr in CARD_LESSONS:
            games = tasks.card(64, n_events, seed=1000 * seed + n_events)
            model = train(model.to(device), games, steps=steps, lr=scale * lr, clip=1.0)
        scores[name] = card_exam(model)
    return scores

# %% tags=["band"]
def card_full_scores(seed):
    """The two other models once more, at the full rates. (Recorded, not run here.)"""
    torch.manual_seed(seed)
    others = {
        "vanilla": VanillaTransformer(**CARD, max_len=30).to(device),
        "Elman network": Recurrent(tasks.CARD_VOCAB, 190).to(device),
    }
    for other in others.values():
        for n_events, steps, lr in CARD_LESSONS:
            games = tasks.card(64, n_events, seed=1000 * seed + n_events)
            train(other, games, steps=steps, lr=lr, clip=1.0)
    return {name: card_exam(other) for name, other in others.items()}

# %%
on_card = card_scores(SEED)
card_band = bands.load("03_card_scores", text=None)
full_band = bands.load("03_card_full_scores", text=None)

# %% jupyter={"source_hidden": true} tags=["hide-input"]
def by_question(scores):
    """{model: (..., 2)} -> {"place: model": (...), ..., "letter: model": (...)}."""
    return {
        f"{kind}: {name}": np.array(values)[..., k]
        for k, kind in enumerate(("place", "letter"))
        for name, values in scores.items()
    }


figure, axes = plt.subplots(figsize=(6.4, 4.4))
right = by_question(on_card), by_question(card_band.values)
figures.points(axes, *right, xlabel="share of right answers")
axes.set(title="The card game, events 13 to 24", xlim=(0, 1.05))
axes.plot([1 / 5] * 2, [-0.4, 2.4], "k:", label="guessing")
axes.plot([1 / 16] * 2, [2.6, 5.4], "k:")
axes.legend(loc="center")
figures.show(
    figure,
    "Only the Feedback Transformer answers nearly all questions for places and for "
    "letters. The Elman network knows the places but not the letters; the vanilla "
    "transformer loses the places, and with them the letters.",
)

# %%
card_band.check(on_card, margin=0.1)
# What was recorded at the full rates is no farther from this run, at 0.6 of them:
full_band.check({name: on_card[name] for name in full_band.values}, margin=0.1)
assert on_card["Feedback"][1] > 0.8
assert on_card["Elman network"][0] > 0.9 and on_card["Elman network"][1] < 0.12
assert max(on_card["vanilla"][1], on_card["Elman network"][1]) < 0.6
figures.table(
    "The same at the full rates, five recorded seeds: share of right answers",
    ["", "places", "letters"],
    [[name, *map(span, seeds.T)] for name, seeds in full_band.values.items()],
)

# %% [markdown]
# The Elman network keeps the state, and its letters are guesses: after these lessons, at either rate, it does not keep
# the card. The vanilla transformer mostly does not know where the ball is, and so cannot know the letter of that place.
# Its letters are above guessing all the same: one of the five letters on the card is right one time in five, and more
# often if two places have it. Feedback alone has both: a state, and a memory that is looked up by content.
#
# The paper makes its case with larger tasks of this kind: little programs that assign, change and print variables, with
# conditions. With 3 variables a parallel transformer of 8 layers gives 33.7% right answers, Feedback with 4 layers 99.1%.
# With 5 variables they give 37.5% and 92.6%.
#
# ## 3.6 What memory must be made of
#
# Which layers have to be in the mixture? Two layers, games of up to 8 swaps, and layer weights that are fixed on the
# embedding alone or on one layer alone, or else learned. Beside them, a vanilla transformer of two layers.

# %% tags=["band"]
def mixture_scores(seed):
    """Right answers in games of 8 swaps, by what memory is made of."""
    none, scores = -1e9, {}  # softmax makes -1e9 a weight of zero
    fixed = {
        "embedding": [0.0, none, none],
        "layer 1": [none, 0.0, none],
        "layer 2": [none, none, 0.0],
        "learned": None,
    }
    for name, weights in fixed.items():
        torch.manual_seed(seed)
        model = FeedbackTransformer(**GAMES, n_layers=2, mem_len=32).to(device)
        if weights is not None:
            model.memory.layer_weights.data.copy_(torch.tensor(weights))
            model.memory.layer_weights.requires_grad_(False)
        scores[name] = sum(exam(learn(model, LESSONS[:3], seed=seed), 8)) / 8
    torch.manual_seed(seed)
    model = VanillaTransformer(**GAMES, n_layers=2, max_len=32).to(device)
    scores["(vanilla)"] = (
        sum(exam(learn(model, LESSONS[:3], scale=0.3, seed=seed), 8)) / 8
    )
    return scores

# %%
made_of = mixture_scores(SEED)
mixture_band = bands.load("03_mixture_scores", text=None)

# %% jupyter={"source_hidden": true} tags=["hide-input"]
figure, axes = plt.subplots()
figures.points(axes, made_of, mixture_band.values, xlabel="share of right answers")
axes.set_title("Memory made of ... (2 layers, games of 8 swaps)")
figures.show(
    figure,
    "With memory made of the embedding alone, fewer answers are right than with "
    "either layer alone or a learned mixture, where nearly all are; a vanilla "
    "transformer of two layers gives fewer right answers than these, too.",
)
mixture_band.check(made_of, margin=0.1)
others = [made_of[name] for name in ("layer 1", "layer 2", "learned")]
assert made_of["embedding"] < min(others) - 0.1
assert mixture_band.high("embedding") < mixture_band.low("(vanilla)")

# %% [markdown]
# As soon as a layer's output is in the mixture, feedback works; for so simple a task it does not matter which layer. With
# the embedding alone, nothing that a layer has found is ever handed on. Such a model gives fewer right answers than a
# vanilla transformer, whatever the seed: each of its layers reads the bare text again, where vanilla's second layer reads
# what the first has made of it.
#
# ## 3.7 Text
#
# ### Loss at equal depth
#
# Does text profit? The paper finds that shallow Feedback Transformers do as well as deeper parallel ones. Here are 1, 2
# and 4 layers. The parallel baseline is the Transformer-XL of chapter 1, in which each query sees the latest 32 keys too
# (`same_length`). It differs also in its positions, and it has keys and values for each layer, hence more parameters. So
# we also train Feedback with keys and values for each layer (`shared_kv=False`), four layers deep. Because Feedback is
# slow, we train Transformer-XL with four times as many steps, which is nearer to equal *seconds*.

# %% tags=["band"]
def text_models(seed, known={}):
    """{"name, number of layers": (model, losses, seconds)}; known ones stay."""
    XL = partial(TransformerXL, same_length=True)
    per_layer = partial(FeedbackTransformer, shared_kv=False)
    variants = {
        "Feedback": (FeedbackTransformer, STEPS, (1, 2, 4)),
        "Feedback, per layer": (per_layer, STEPS, (4,)),
        "Transformer-XL": (XL, STEPS, (1, 2, 4)),
        "Transformer-XL, 4 x steps": (XL, 4 * STEPS, (4,)),
    }
    trained = {}
    for name, (make, steps, depths) in variants.items():
        for n_layers in depths:
            torch.manual_seed(seed)
            key, model = f"{name}, {n_layers}", make(**SIZES, n_layers=n_layers)
            trained[key] = known.get(key) or fit(model, seed, steps)
    return trained


def text_scores(seed):
    """Validation loss of each variant."""
    return {key: valid_loss(model) for key, (model, *_) in text_models(seed).items()}

# %%
known = {"Feedback, 2": (feedback, losses, seconds)}  # from section 3.3
trained = text_models(SEED, known)
loss = {key: valid_loss(model) for key, (model, *_) in trained.items()}
text_band = bands.load("03_text_scores", corpus.name)

# %% jupyter={"source_hidden": true} tags=["hide-input"]
figure, axes = plt.subplots(figsize=(6.4, 5.2))
xlabel = "validation loss (nats per character)"
colors = {name: LOOK[name.split(",")[0]]["color"] for name in loss}
look = dict(xlabel=xlabel, number="{:.3f}", colors=colors)
figures.points(axes, loss, text_band.values, **look)
axes.set_title(f"Equal depth: model, layers ({corpus.name})")
figures.show(
    figure,
    "Validation loss falls with depth for both models. At equal steps Feedback and "
    "Transformer-XL are close; Transformer-XL with four times as many steps is well "
    "below both.",
)
figures.table(
    f"Validation loss of the recorded seeds, and what this run took ({corpus.name})",
    ["model, layers", "parameters", "recorded seeds", "seconds"],
    [
        [name, f"{n_parameters(m):,}", span(text_band.values[name], 3), f"{took:.1f}"]
        for name, (m, _, took) in trained.items()
    ],
)

# %%
text_band.check(loss, margin=0.05)
low, high = text_band.low, text_band.high
for name in ("Feedback", "Transformer-XL"):
    assert loss[f"{name}, 4"] < loss[f"{name}, 1"]  # depth helps
model = trained["Feedback, 4"][0]  # for the next section
for n in (1, 2, 4) if text_band.seeds else ():
    a, b = f"Feedback, {n}", f"Transformer-XL, {n}"
    assert low(a) <= high(b) and low(b) <= high(a)  # the two bands overlap
    if n == 4:
        assert low(b) <= high("Feedback, per layer, 4") < high(a)
longer = "Transformer-XL, 4 x steps, 4"
assert high(longer) < low("Feedback, 4") and loss[longer] < loss["Feedback, 4"]

# %% [markdown]
# Depth helps both. At equal depth and equal steps the bands of the two overlap: the paper's gain on text does **not**
# show here. With keys and values for each layer, Feedback's band of four layers is a little lower than with shared ones,
# and only just overlaps Transformer-XL's: a gain, if any, is small. Transformer-XL with four times as many steps, in
# about as many seconds, is far ahead of both. The paper's models are far larger and train for days.
#
# ### Where it looks
#
# We record the attention of the model with four layers, and add up what falls into each bucket of ages. From the second
# on, the buckets double in width.

# %%
@torch.no_grad()
def attention_by_age(model, n_segments=4):
    """Mean attention of each layer at each age 1 ... mem_len, (L, mem_len)."""
    L, M, memory, total = len(model.layers), model.mem_len, None, 0
    segments = corpora.lanes(corpus.valid.to(device), 32, M)
    for n, (tokens, _) in zip(range(1 + n_segments), segments):
        with measure.record_attention(model) as weights:  # T * L tensors (B, H, 1, M)
            _, memory = model(tokens, memory)
        if n > 0:  # memory is full from here on
            steps = torch.stack([w.mean(dim=(0, 1, 2)) for w in weights])  # (T * L, M)
            total = total + steps.unflatten(0, (-1, L)).mean(dim=0) / n_segments
    return total.flip(-1).cpu()  # the oldest key comes first, so turn it round


by_age = attention_by_age(model)
assert torch.allclose(by_age.sum(dim=-1), torch.ones(4), atol=1e-4)

# %% jupyter={"source_hidden": true} tags=["hide-input"]
edges = [1, 2, 3, 5, 9, 17, 33]
mass = {
    f"layer {n + 1}": [row[a - 1 : b - 1].sum() for a, b in zip(edges, edges[1:])]
    for n, row in enumerate(by_age)
}
figure, axes = plt.subplots()
for n, (a, b) in enumerate(zip(edges, edges[1:])):
    label = "even share" if n == 0 else None
    axes.plot([n - 0.45, n + 0.45], [(b - a) / T] * 2, "k:", label=label)
age = "age of the memory vector (characters)"
figures.buckets(axes, edges, mass, xlabel=age, ylabel="share of attention")
axes.set_title(f"Attention by age ({corpus.name})")
figures.show(
    figure,
    "On the mean of the layers, the vector of age 1 gets several times an even share "
    "of attention; the oldest vectors, 17 to 32 characters back, get less than an "
    "even share.",
)
print("age 1, in even shares:", [round((T * row[0]).item(), 1) for row in by_age])
assert by_age[:, 0].mean() > 2 / T and by_age[:, 16:].mean() < 1 / T

# %% [markdown]
# A bucket is tall also because it is wide. The dotted lines are what each would get if attention were spread evenly. The
# vector of age 1 stands out. It alone knows the letter before the current one, and through its own attention it has read
# all the others.
#
# Look for yourself, in a model that was trained for longer (see the book's page on trained weights). Point at a
# character, or step to one with the arrow keys; it gets a box. The bars show how its attention, at first that of the top
# layer (mean over the heads), is shared among the vectors in memory, which are underlined. (They get 100% of it: a
# Feedback Transformer reads nothing else.) Below are the weights of the mixture.

# %%
ready, vocab = memtx_minimal.load("feedback_transformer")  # on the CPU
text = vocab.encode(corpus.vocab.decode(corpus.valid[:300]))
figures.explorer({"Feedback": measure.reads(ready, text)}, vocab)
mixture = ready.memory.layer_weights.softmax(dim=0).tolist()
print("weights, embedding first:", [round(weight, 2) for weight in mixture])
assert max(mixture) == mixture[0] and min(mixture) > 0.1

# %% [markdown]
# The embedding has the largest weight, and no layer has less than a tenth. (Layers add to what they read, so the
# embedding is in each of the other states, too.)
#
# Attention is not use. What is *needed* shows when it is taken away. Lower `mem_len`, and a model sees the latest vectors
# only; here, our own four layers.

# %%
needs = {}
for n in (1, 2, 4, 8, 16, 32):
    model.mem_len = n
    needs[n] = valid_loss(model)
print("nats per character by mem_len:", {n: round(x, 3) for n, x in needs.items()})
assert needs[32] < needs[4] < needs[1]

# %% [markdown]
# With less memory the loss rises, so vectors beyond the latest four are used. How much they are worth stays open: a
# vector carries older text along, and the model never trained with a short memory.
#
# ## 3.8 What it costs to train
#
# A vanilla transformer computes all positions of a layer in one matrix product; here `T` steps wait for each other.
# Measure one forward and backward pass: its seconds, and the bytes that autograd keeps between the two.

# %%
NO_MEMORY = {name: size for name, size in SIZES.items() if name != "mem_len"}


def costs(model, T):
    """(seconds, bytes kept for backward) of one pass over T tokens of 16 texts."""
    tokens = torch.randint(len(corpus.vocab), (16, T), device=device)

    def forward_backward():
        model.zero_grad()
        loss = model(tokens)[0].logsumexp(dim=-1).sum()  # stands in for a loss
        loss.backward()

    seconds = measure.seconds(forward_backward, warmup=1, rounds=3, device=device)
    return seconds, measure.bytes_for_backward(model, lambda: model(tokens)[0])

# %%
lengths = [16, 32, 64, 128]
both = {
    "Feedback": FeedbackTransformer(**NO_MEMORY, n_layers=2, mem_len=128).to(device),
    "vanilla": VanillaTransformer(**NO_MEMORY, n_layers=2, max_len=128).to(device),
}
priced = {name: [costs(model, n) for n in lengths] for name, model in both.items()}
(s, b), (s_vanilla, b_vanilla) = priced["Feedback"][-1], priced["vanilla"][-1]
assert s > 2 * s_vanilla and b > 2 * b_vanilla

# %% jupyter={"source_hidden": true} tags=["hide-input"]
figure, axes = plt.subplots(1, 2, figsize=(6.4, 3.4))
labels = {"forward and backward (ms)": 1e3, "kept for backward (MiB)": 2**-20}
for k, (ax, (label, unit)) in enumerate(zip(axes, labels.items())):
    for name, values in priced.items():
        ax.plot(lengths, [unit * v[k] for v in values], label=name, **LOOK[name])
    ax.set(xscale="log", yscale="log", xlabel="tokens in the segment", ylabel=label)
    ax.set_xticks(lengths, labels=lengths)
    ax.minorticks_off()
    figures.plain_ticks(ax.yaxis)
axes[0].legend()
figures.show(
    figure,
    "Feedback takes several times as long as vanilla for a training step, at every "
    "length of the segment. It keeps more bytes for the backward pass, and the longer "
    "the segment, the larger their ratio.",
)

# %% [markdown]
# The time goes into many small products where vanilla has a few large ones. The bytes grow faster than the length,
# because each step keeps a copy of the keys and values that it saw: with the whole segment in reach, of $0 + 1 + \ldots +
# (T - 1)$ vectors. A backward pass written by hand makes both cheaper: [appendix A](a_feedback_by_hand.ipynb).
#
# ## 3.9 Short games first
#
# The paper starts with short sequences and lengthens them, as our lessons do. Is it worth it? The lessons read $150 \cdot
# 2 + 250 \cdot 4 + \ldots = 5{,}060$ swaps in each row of the batch. Read about as many, but in games of 32 swaps from
# the start, at a low rate and at that of the first lessons.

# %% tags=["band"]
def impatient_exam(rate, seed):
    """Right answers by swap after games of 32 swaps alone, as many swaps in all."""
    torch.manual_seed(seed)
    model = FeedbackTransformer(**GAMES, n_layers=1, mem_len=32).to(device)
    return exam(learn(model, [(32, 160, rate)], seed=seed))


def impatient_scores(seed):
    """The same, at two learning rates."""
    return {f"rate {rate}": impatient_exam(rate, seed) for rate in (3e-3, 1e-2)}

# %%
impatient = {"rate 0.003": impatient_exam(3e-3, SEED)}  # the other is recorded only
impatient_band = bands.load("03_impatient_scores", text=None)

# %% jupyter={"source_hidden": true} tags=["hide-input"]
figure, axes = plt.subplots()
first = by_swap["Feedback, 1 layer"]
axes.plot(range(1, 33), first, label="short games first", **LOOK["Feedback"])
for (name, shares), style in zip(impatient_band.values.items(), ("-", "--")):
    label = "{} recorded seeds" if style == "-" else "_"
    figures.band(axes, range(1, 33), shares, label)
    shares = impatient.get(name, shares.mean(axis=0))
    label = f"only 32 swaps, {name}" + ("" if name in impatient else " (mean of seeds)")
    axes.plot(range(1, 33), shares, "kv" + style, label=label)
swaps_axes(axes, "The same number of swaps read (Feedback, 1 layer)")
figures.show(
    figure,
    "After short games first, nearly all answers are right at all 32 swaps; after "
    "long games from the start, at either rate, the model follows only the first few.",
)
impatient_band.check(impatient, margin=0.1)
assert all(impatient_band.high(rate)[8:].max() < 0.3 for rate in impatient_band.values)

# %% [markdown]
# With short games first, about as many swaps teach the whole game; with long ones, the first few swaps, at either rate.
# The length of the games is not the only difference: long games also mean fewer updates, 160 in place of 670.
#
# ## 3.10 Generating
#
# To generate, the model reads one token a call. Memory goes in and comes out, so no token is read twice. But each call
# projects all vectors of the memory to keys and values anew. While the weights do not change, the keys and values do not
# change either (their ages do, but `seen` adds those afterwards, to a copy): so let *them* be the memory. `Cached` wraps
# a trained model. It is used in the same way, for generating and evaluating only.

# %% tags=["from-module"]
class Cached(nn.Module):
    """A FeedbackTransformer for generation: its memory is keys and values, made once.

    tokens (B, T) int64, memory -> logits (B, T, vocab_size), memory: one tensor
    (B, M, n_kv, 2, H, d_head). Pass None at the start of a stream. Several texts may go
    on from one memory, since nothing is written in place. There are no gradients.
    """

    def __init__(self, model):
        super().__init__()
        self.model = model

    @torch.no_grad()
    def forward(self, tokens, memory=None):
        model = self.model
        x = embed(model, tokens)  # (B, T, d_model)
        nothing_yet = model.memory.keys_values(x[:, :0])
        kv = inputs.checked_memory(memory, nothing_yet)[:, -model.mem_len :]
        outputs, _, kv = model.loop(x, kv)
        return model.head(model.norm(outputs)), kv

# %%
cached = Cached(feedback.eval())
text = training.generate(cached, prompt, 100)
assert torch.equal(text, training.generate(feedback, prompt, 100))  # the same seed
_, memory = cached(prompt[None].to(device))
print("memory", tuple(memory.shape))  # (B, M, n_kv, 2, H, d_head)

# %% [markdown]
# ### Time per token
#
# How long does one more token take, after $n$ others? Three ways: Feedback from its vectors; Feedback from its cache; and
# a vanilla transformer of the same size with a cache of its own, that of chapter 0, with keys and values in one tensor:

# %%
@torch.inference_mode()
def vanilla_step(model, token, cache):
    """One more token (B, 1) -> logits (B, 1, vocab_size), cache.

    cache: for each layer its keys and values so far, (2, B, H, n, d_head).
    """
    position = torch.tensor([cache[0].size(-2)], device=token.device)
    x = model.embedding(token)  # (B, 1, d_model)
    x, grown = x + sinusoid(position, x.size(-1)), []
    for layer, past in zip(model.layers, cache):
        attention, x_hat = layer.attention, layer.norm_attention(x)
        qkv = attention.query_key_value(x_hat).unflatten(-1, (3, attention.n_heads, -1))
        q, *kv = qkv.permute(2, 0, 3, 1, 4)  # (B, H, 1, d_head) each
        grown.append(torch.cat([past, torch.stack(kv)], dim=-2))
        heads = F.scaled_dot_product_attention(q, *grown[-1])  # (B, H, 1, d_head)
        x = x + attention.out(heads.transpose(1, 2).flatten(2))
        x = x + layer.feed_forward(layer.norm_feed_forward(x))
    return model.head(model.norm(x)), grown

# %%
vanilla = VanillaTransformer(**NO_MEMORY, n_layers=2, max_len=64).to(device).eval()
cache, parts = [torch.zeros(2, 1, 4, 0, 16, device=device)] * 2, []
for token in prompt.to(device):
    out, cache = vanilla_step(vanilla, token.view(1, 1), cache)
    parts.append(out)
torch.testing.assert_close(torch.cat(parts, dim=1), vanilla(prompt[None].to(device))[0])

# %%
BIG = NO_MEMORY | dict(d_model=128, d_ff=512, n_layers=4)
read_before = [32, 128, 512, 2048]


@torch.inference_mode()
def milliseconds(call, memory):
    """Median time of one more token, memory growing."""
    token = torch.zeros(1, 1, dtype=torch.int64, device=device)

    def one_more():
        nonlocal memory
        _, memory = call(token, memory)

    return 1e3 * measure.seconds(one_more, warmup=3, rounds=15, device=device)

# %%
@torch.inference_mode()
def per_token(n):
    """Milliseconds for one more token after n tokens, by the way it is done."""
    writer = FeedbackTransformer(**BIG, mem_len=2100).to(device).eval()
    parallel = VanillaTransformer(**BIG, max_len=2100).to(device).eval()
    # Memories of n tokens, made up: 4 layers, 4 heads of 32, d_model 128.
    vectors = torch.randn(1, n, 128, device=device)  # (B, M, d_model)
    kv = torch.randn(1, n, 1, 2, 4, 32, device=device)  # (B, M, n_kv, 2, H, d_head)
    layers = [torch.randn(2, 1, 4, n, 32, device=device)] * 4  # (2, B, H, n, d_head)
    return {
        "Feedback, vectors": milliseconds(writer, vectors),
        "Feedback, cache": milliseconds(Cached(writer), kv),
        "vanilla, cache": milliseconds(partial(vanilla_step, parallel), layers),
    }

# %%
took = {n: per_token(n) for n in read_before}
figures.table(
    "Milliseconds for one more token (4 layers, all in memory)",
    ["", *(f"after {n:,}" for n in read_before)],
    [[name, *(f"{took[n][name]:.2f}" for n in read_before)] for name in took[32]],
)
assert took[2048]["Feedback, cache"] < 10 * took[2048]["vanilla, cache"]

# %% [markdown]
# What is slow about Feedback is training. One token after the other is how *every* model generates: compare the two rows with a cache. (Without one, a vanilla transformer reads all again: chapter 0.) What Feedback's cache saves over its
# vectors shows when memory is long.
#
# ### Bytes per token
#
# What must a model hold of each token of the past? Exercise 3.4 asks for the numbers by formula; here they are counted.
# With keys and values for each layer, Feedback holds as much as vanilla; with shared ones, the depth no longer matters,
# and the vectors alone are half of that.

# %%
@torch.no_grad()
def bytes_per_token(n_layers, n=32):
    """What each of n tokens leaves behind, by kind of memory."""
    text = corpus.valid[None, :n].to(device)
    shared = FeedbackTransformer(**SIZES, n_layers=n_layers).to(device)
    each = FeedbackTransformer(**SIZES, n_layers=n_layers, shared_kv=False).to(device)
    parallel = VanillaTransformer(**NO_MEMORY, n_layers=n_layers, max_len=n).to(device)
    cache = [torch.zeros(2, 1, 4, 0, 16, device=device)] * n_layers
    for token in text[0]:
        _, cache = vanilla_step(parallel, token.view(1, 1), cache)
    kinds = {"vanilla": cache, "Feedback, per layer": Cached(each)(text)[1]}
    kinds["Feedback, shared"] = Cached(shared)(text)[1]
    kinds["Feedback, vectors"] = shared(text)[1]
    return {kind: measure.nbytes(memory) // n for kind, memory in kinds.items()}


held = {n: bytes_per_token(n) for n in (1, 2, 4, 8)}
figures.table(
    "Bytes that a token of the past takes (d_model 64, float32)",
    ["", *(f"{n} layer{'s' * (n > 1)}" for n in held)],
    [[kind, *(f"{h[kind]:,}" for h in held.values())] for kind in held[1]],
)
for n, h in held.items():
    assert h["vanilla"] == h["Feedback, per layer"] == n * h["Feedback, shared"]
    assert h["Feedback, shared"] == 2 * h["Feedback, vectors"]

# %% [markdown]
# ## 3.11 Departures from the paper
#
# | here | the paper and its code | why |
# | --- | --- | --- |
# | the memory has a norm of its own | pre-norm: each layer's own norm is applied to the memory too (one for all layers where keys and values are shared) | the memory is made once for all layers; its norm can be too |
# | a memory vector is normalised once, when keys and values are made | what is stored at the end of a segment is already normalised, and is normalised again at the next | the cut of a text into segments should change nothing |
# | dropout on the embedding, on attention weights, and on what each sub-layer adds | on attention weights and inside the feed-forward | as in the other chapters |
# | the first step sees nothing | the released code starts from a memory of zero vectors, which take part in the softmax | a text should not depend on how many empty slots there are |
# | a fixed window of `mem_len` | for text, a window whose length each head learns (adaptive span) | one idea at a time |
# | the last projections of attention and feed-forward start as PyTorch starts them | divided by $\sqrt{2L}$ in the released code | one idea at a time |
# | trained from fresh weights | on text, also from the weights of a trained parallel model | a notebook's training takes seconds |
# | models of some hundred thousand parameters, seconds of training | up to 139 million (WikiText-103), days | what a notebook can do |
#
# ## 3.12 What became of it
#
# Strictly sequential training did not last. On hardware that thrives on large matrix products, its price is what you
# measured above; linear recurrences, which can be computed side by side (chapter 6), gave up expressive power to get rid
# of it. The way back from the top did last. A chain of thought that is written out and read again is feedback through the
# text: the top layer's output becomes the bottom layer's input.
#
# Some works that took an idea of this chapter further, with the year in which each was first public. Which idea each goes
# back to is our reading, not always its authors'.
#
# - [Staircase attention](https://arxiv.org/abs/2106.04279) (2021), co-written by an author of Feedback, takes the states
#   of earlier tokens through the same layers again, together with new tokens, and solves tracking tasks on which ordinary
#   transformers fail.
# - The [Block-Recurrent Transformer](https://arxiv.org/abs/2203.07852) (2022) hands state vectors from block to block
#   through gates like those of an LSTM, and computes the tokens of a block in parallel.
# - [TransformerFAM](https://arxiv.org/abs/2404.09173) (2024) feeds a model's own states back to it as a working memory,
#   without new weights.
# - [YOCO](https://arxiv.org/abs/2405.05254) (2024), "you only cache once", makes one set of keys and values in its lower
#   layers, and all upper layers read it.
# - [Cross-Layer Attention](https://arxiv.org/abs/2405.12981) (2024) lets neighbouring layers share keys and values, which
#   halves the cache at nearly the same accuracy.
# - [Coconut](https://arxiv.org/abs/2412.06769) (2024) reasons without words: instead of choosing a token, it takes its
#   last hidden state as the next input.
# - [Huginn](https://arxiv.org/abs/2502.05171) (2025) runs the same block of layers again and again before it answers, as
#   often as you ask; more rounds help most where it has to reason.

# %% [markdown]
# ## 3.13 Exercises
#
# Write your answer where the dots stand and run the cell. `exercises.check` says that it is right, or names the case that
# fails, what was expected and what your code gave. All [solutions](solutions/03_feedback_transformer.ipynb), worked out
# in words and code.
#
# **3.1 The clock** *(derive; easy; 10 minutes)* At most how many layers can information pass on its way from a token to
# the prediction made `n` tokens later? `kind` is "vanilla" (inside one window) or "feedback".

# %% tags=["exercise"]
def my_clock(n_layers, n, kind):
    return ...


exercises.check("3.1", my_clock)

# %% [markdown]
# <details><summary>Hint</summary>
#
# `n = 0` is the prediction made at the token itself. Draw the columns of `n = 2` with two layers, as in the first and in
# the last picture at the top of the chapter, and look for the longest way.
#
# </details>
#
# **3.2 The memory vector** *(fill in; easy; 10 minutes)* Write the mixture $m_t$ without `Memory`.

# %% tags=["exercise"]
def my_vector(states, layer_weights):
    """L + 1 states (B, d_model), embedding first; (L + 1,) -> (B, d_model)."""
    return ...


exercises.check("3.2", my_vector)

# %% [markdown]
# <details><summary>Hint</summary>
#
# $m_t = \sum_l \operatorname{softmax}(w)_l \, x^l_t$, and $l = 0$ is the embedding.
#
# </details>
#
# **3.3 The wrong ages** *(find the fault; middle; 10 minutes)* A colleague adds the positions to the keys like this. The
# model trains, and its losses look normal while the memory is full. What is wrong while it fills, and why does it hurt?
# Mend it.

# %% tags=["exercise"]
def my_keys(keys, positions):
    """Keys (M, d_head) of the latest M steps, positions (mem_len, d_head) of the ages
    mem_len ... 2, 1 -> keys with their ages (M, d_head); M is at most mem_len."""
    return keys + positions[: len(keys)]


exercises.check("3.3", my_keys)

# %% [markdown]
# <details><summary>Hint</summary>
#
# What is the age of the newer of two keys if `mem_len` is 4? Which row of `positions` is that? And mind an empty memory.
#
# </details>
#
# **3.4 The price of a cache** *(predict; easy; 10 minutes)* How many numbers does a model hold of `M` tokens of the past?
# The kinds: "vanilla", "per layer" and "shared" (Feedback with the keys and values of each layer, and with shared ones),
# and "vectors", the memory of Feedback without keys and values. (Afterwards compare with the table in section 3.10.)

# %% tags=["exercise"]
def my_numbers(kind, n_layers, M, d_model):
    return ...


exercises.check("3.4", my_numbers)

# %% [markdown]
# <details><summary>Hint</summary>
#
# A key has `d_model` numbers over all heads, a value as many. Who needs them once for each layer?
#
# </details>
#
# **3.5 A memory of one vector** *(experiment; middle; 10 minutes)* Train a new model with one layer and `mem_len=1` on
# the `LESSONS` of section 3.1. How well do you think it will do? What is left of attention?

# %% tags=["exercise"]
my_tracker = ...  # learn(FeedbackTransformer(**GAMES, ...).to(device), LESSONS)

exercises.check("3.5", my_tracker)

# %% [markdown]
# <details><summary>Hint</summary>
#
# What is the softmax of one score?
#
# </details>
#
# **3.6 Blocks** *(build; hard; 40 minutes)* There is a dial between "one token a step" and "all tokens side by side": a
# step that takes a block of `S` tokens. They all see the memory before the block, in which the newest vector has age 1
# for each of them, and do not see each other. Write it, without a loop over the tokens of a block. Then give a new model
# `model.loop = partial(my_blocks, model, S=4)` (from `functools`) and the lessons: how much faster are they, and what
# becomes of the ball?

# %% tags=["exercise"]
def my_blocks(model, x, kv, S):
    """x (B, T, d_model), kv as in loop -> what loop returns: outputs, vectors, kv."""
    return ...


exercises.check("3.6", my_blocks, tiny)

# %% [markdown]
# <details><summary>Hint</summary>
#
# For `step`, the tokens of a block are just more texts: `flatten` them into the batch, and repeat `kv` for each of them
# with `repeat_interleave`.
#
# </details>
#
# **Without a check.** *(15 minutes, of which 2 for the computer)* Does the model of section 3.9 that began with long
# games merely need more training? Give a new one 1,000 steps of games of 32 swaps at a rate of 3e-3, and compare
# `exam(model)` with the figure. *(20 minutes)* Let step `t` read its own memory vector. Why is that impossible in one
# pass, and what would two passes give?

# %% [markdown]
# ## References
#
# - A. Fan, T. Lavril, E. Grave, A. Joulin, S. Sukhbaatar (2020): [Addressing Some Limitations of Transformers with
#   Feedback Memory](https://arxiv.org/abs/2002.09402).
# - J. L. Elman (1990): [Finding Structure in Time](https://doi.org/10.1207/s15516709cog1402_1). Cognitive Science 14.
# - B. Liu et al. (ICLR 2023): [Transformers Learn Shortcuts to Automata](https://arxiv.org/abs/2210.10749).
# - Z. Dai et al. (ACL 2019): [Transformer-XL: Attentive Language Models Beyond a Fixed-Length
#   Context](https://arxiv.org/abs/1901.02860).

# %%
minutes = (time.perf_counter() - started) / 60
peak = measure.process_peak_bytes() / 2**30
print(
    f"this run: {minutes:.1f} minutes, peak memory {peak:.2f} GiB, text: {corpus.name}"
)
