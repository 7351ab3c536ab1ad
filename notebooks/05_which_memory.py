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
# # 5. Which memory?

# %% [markdown] tags=["badges"]
# No links to Colab and Kaggle here: the project has no public address yet.
# To run this notebook, type `make lab` in your copy of the project.

# %% [markdown]
# You have a task, and several models that remember. Which do you take? Each paper compares its own model with the
# one before it, on its own data, at its own size. This chapter puts all side by side: equally many parameters,
# the same text and tasks, one machine. It ends in a **decision table** (5.9), whose last column leads back to the
# figures.
#
# **When you have read it, you can**
# - name the four ways in which a comparison of such models can be fair, and say what each hides;
# - say what a model holds of a long past, what the next token costs, and what training costs;
# - read from a figure which memory to take for a chat, a book, a state machine, a deep model or long documents;
# - compute bytes and operations at sizes that you cannot run.
#
# **You need** chapter 0, and of chapters 1 to 4 the first page each. Whatever this chapter takes from them is
# said again in a sentence.
#
# **Time and memory.** About 3 minutes and 1 GiB on two CPU cores. The last cell prints what it took on your
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
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import memtx_minimal
from memtx_minimal import (
    bands, corpora, exercises, fast_feedback, fast_lsh, figures, measure, tasks,
    training,
)  # fmt: skip
from memtx_minimal.compressive_transformer import CompressiveTransformer
from memtx_minimal.feedback_transformer import Cached, FeedbackTransformer
from memtx_minimal.reformer import Reformer
from memtx_minimal.transformer_xl import TransformerXL, sinusoid
from memtx_minimal.vanilla_transformer import VanillaTransformer

SEED = 0
started = time.perf_counter()
device = training.best_device()
figures.use_style()
corpus = corpora.tiny_shakespeare()
print(f"PyTorch {torch.__version__} on {device}")

# %% [markdown]
# The letters:
#
# | letter | meaning | letter | meaning |
# | --- | --- | --- | --- |
# | `B` | batch: texts side by side | `H` | attention heads |
# | `T` | tokens in the segment | `d_model` | width of a hidden state |
# | `L` | layers | `d_head` | width of a head, `d_model / H` |
# | `K` | keys: memory, then segment | `c` | compression rate (chapter 2) |
# | `P` | hash rounds (chapter 4) | `w` | tokens in a chunk (chapter 4) |
# | `M` | states in memory | `C` | states in compressed memory |
#
# ## 5.1 Four races
#
# "Model A is better than model B" says nothing until you say what they had in common. There are four candidates:
#
# | equal | asks | hides | fair to someone who |
# | --- | --- | --- | --- |
# | **parameters** | what does the architecture do with its weights? | time: some weights are used more often for each token | stores or ships models |
# | **tokens** | what does it learn from the same text? | time again: you wait for a slow model | has little text |
# | **minutes** | what have I got after an hour? | the machine: another may rank them differently | pays for computing |
# | **bytes of state** | what does it remember in the same space? | what it costs to use that space | serves many texts, or one on a small device |
#
# No model wins all four, and the choice of the race decides more than the seed does. Here parameters are equal
# (but for the costs of section 5.7, at equal widths, and two recorded models in 5.5). Text is raced by tokens
# (5.3) and by minutes (5.4), copying and recall by bytes of state (5.5). Each training was run with five seeds
# beforehand (`text_scores` and its like), drawn in grey; your own run is on top.
#
# ## 5.2 Six ways to remember
#
# - **Vanilla** (chapter 0) sees a window of text and reads it all again whenever something is added. (With a cache
# it writes like the sliding window, until its window is full.)
# - **Sliding window**: each token attends to a fixed number of latest tokens, whose keys and values are kept in
# a cache. It is chapter 0's cache, with distances in place of positions (chapter 1), so that it can slide.
# - **Transformer-XL** keeps the *states* of the latest tokens, layer by layer, and makes keys and values of
# them anew.
# - The **Compressive Transformer** keeps fewer of these, and behind them older ones pressed four into one.
# - The **Feedback Transformer** keeps one vector a token, mixed from all layers and read by all layers.
# - **Reformer** sees a window as vanilla does, a long one, but each token looks only at those that hashing
# finds to be alike.
#
# All are called alike, `logits, memory = model(tokens, memory)`. (`*_` and `*aux` would take a compression
# loss; no model here has one.) Two of them have no memory. To read a stream they must hold the text itself, and
# this small class makes that their memory:

# %% tags=["band"]
class Reread(nn.Module):
    """A model without memory, called like those with one: what it remembers is the text
    itself, of which it reads the latest max_len tokens again each time."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, tokens, memory=None):
        text = tokens if memory is None else torch.cat([memory, tokens], dim=1)
        text = text[:, -self.model.max_len :]  # (B, T), with what was read before
        return self.model(text)[0][:, -tokens.size(1) :], text

# %% [markdown]
# So *the state* of a text is what must be held of it between two calls; *states* are hidden vectors.
# Each model gets at most 16 KiB, at width 64, with two layers and four bytes a number: 32 states a layer for
# Transformer-XL, 16 and 16 compressed ones for the Compressive Transformer, 64 vectors for Feedback, and 16
# tokens for the sliding window, since a key and a value are two vectors. (In training the window is a
# Transformer-XL in which each query sees its latest `mem_len` keys, `same_length`.) Vanilla and Reformer hold up
# to 256 tokens, further back than 5.5 asks, at eight bytes each: 2 KiB. (Reformer's table of positions,
# `axial_shape`, has 16 times 16.)

# %% tags=["band"]
SIZES = dict(d_model=64, n_heads=4, n_layers=2)
POOLED = dict(compression_rate=4, compression="mean", loss=None)
MODELS = {  # each with at most 16 KiB of state a text
    "vanilla": (VanillaTransformer, dict(max_len=256)),
    "sliding window": (TransformerXL, dict(mem_len=16, same_length=True)),
    "Transformer-XL": (TransformerXL, dict(mem_len=32)),
    "Compressive": (
        CompressiveTransformer, dict(mem_len=16, compressed_len=16) | POOLED,
    ),
    "Feedback": (FeedbackTransformer, dict(mem_len=64)),
    "Reformer": (Reformer, dict(axial_shape=(16, 16), chunk_len=16)),
}  # fmt: skip
REREAD = "vanilla", "Reformer"

# %% [markdown]
# (`POOLED`: the Compressive Transformer takes the mean of four states, which does well in chapter 2 and has no
# parameters.) Transformer-XL has a matrix more in each layer than vanilla, Feedback has fewer. To make
# parameters equal, `make` widens or narrows the feed-forward blocks. Feedback and Reformer come in their fast
# versions (appendices A and B), which compute the same; Reformer's embeddings and positions start with small
# numbers, as in chapter 4.

# %% tags=["band"]
def count(model):
    """How many numbers a model learns."""
    return sum(p.numel() for p in model.parameters())


def build(name, vocab_size, d_ff=256, **other):
    """One of the models, untrained, each as fast as this book has it."""
    kind, options = MODELS[name]
    model = kind(vocab_size, d_ff=d_ff, **SIZES | options | other)
    if name == "Feedback":
        fast_feedback.speed_up(model)
    if name == "Reformer":
        for p in [*model.embedding.parameters(), *model.positions.parameters()]:
            nn.init.normal_(p, std=0.02)
        fast_lsh.speed_up(model)
    return model.to(device)


def make(name, vocab_size, seed=SEED, like="vanilla"):
    """The same from a seed, d_ff such that it has as many parameters as another."""
    spare = count(build(like, vocab_size)) - count(build(name, vocab_size))
    unit = 2 * SIZES["d_model"] + 1  # numbers that one more of d_ff adds to a layer
    torch.manual_seed(seed)
    return build(name, vocab_size, 256 + spare // (unit * SIZES["n_layers"]))

# %% tags=["band"]
def reader(name, model):
    """The model as it reads a stream in segments."""
    return Reread(model) if name in REREAD else model

# %% [markdown]
# And the sliding window as it generates: tokens come one by one, so keys and values can be kept. The scores are
# chapter 1's: `q + u` with the keys, `q + v` with `r`, a vector for each distance. (You may skip
# this code.)

# %%
class CachedWindow(nn.Module):
    """Sliding-window attention, of a Transformer-XL with same_length, for generation.

    token (B, 1), memory -> logits, memory: for each layer the latest mem_len keys and
    values, (2, B, H, K, d_head).
    """

    def __init__(self, model):
        super().__init__()
        self.model, d_model = model, model.embedding.embedding_dim
        ages = torch.arange(model.mem_len - 1, -1, -1, device=training.device_of(model))
        R, layers = sinusoid(ages, d_model), [m.attention for m in model.layers]
        self.r = [a.heads(a.position(R)).detach() for a in layers]  # (H, K, d_head)

    @torch.no_grad()
    def forward(self, token, memory=None):
        model, kept = self.model, []
        x = model.embedding(token)  # (B, 1, d_model)
        for n, (layer, r) in enumerate(zip(model.layers, self.r)):
            a, y = layer.attention, layer.norm_attention(x)
            kv = torch.stack([a.heads(part) for part in a.key_value(y).chunk(2, -1)])
            if memory is not None:
                kv = torch.cat([memory[n], kv], dim=3)[:, :, :, -model.mem_len :]
            (k, v), q = kv, a.heads(a.query(y))  # q (B, H, 1, d_head)
            scores = (q + a.u) @ k.mT + (q + a.v) @ r[:, -k.size(2) :].mT
            weights = (scores * q.size(-1) ** -0.5).softmax(dim=-1)  # (B, H, 1, K)
            x = x + a.out((weights @ v).transpose(1, 2).flatten(2))
            x = x + layer.feed_forward(layer.norm_feed_forward(x))
            kept.append(kv)
        return model.head(model.norm(x)), kept

# %%
window = make("sliding window", len(corpus.vocab)).eval()
cached, states, cache = CachedWindow(window), None, None
for token in corpus.valid[None, :40].to(device).split(1, dim=1):
    with torch.no_grad():
        logits, states = window(token, states)
    from_cache, cache = cached(token, cache)
    torch.testing.assert_close(from_cache, logits, atol=1e-4, rtol=1e-4)
print(f"40 characters in a window of {window.mem_len}: the same logits from the cache")

# %% [markdown]
# The last column of the next table counts how many layers run *one after the other* when 64 tokens are read (a
# layer of Reformer is two blocks, counted once). Where that number does not grow with the tokens, a GPU computes
# all tokens side by side.

# %%
@torch.no_grad()
def state_of(name, n=320):
    """Bytes that one of the models holds of a text once it is full."""
    model, memory = make(name, 64).eval(), None
    cached = name == "sliding window"
    read = CachedWindow(model) if cached else reader(name, model)
    text = torch.zeros(1, n, dtype=torch.int64, device=device)
    for part in text.split(1 if cached else 16, dim=1):
        _, memory, *_ = read(part, memory)
    return measure.nbytes(memory)


@torch.no_grad()
def calls(name, n):
    """How many layers run one after the other when n tokens are read."""
    kind, options = MODELS[name]
    model, found = kind(64, **SIZES | options).eval(), []
    for layer in model.blocks[::2] if name == "Reformer" else model.layers:
        layer.register_forward_hook(lambda *_: found.append(name))
    model(torch.zeros(1, n, dtype=torch.int64))
    return len(found)


# %%
parameters = {name: count(make(name, len(corpus.vocab))) for name in MODELS}
state = {name: state_of(name) for name in MODELS}
turns = {name: calls(name, 64) for name in MODELS}
figures.table(
    "The models of this chapter",
    ["", "parameters", "state (KiB a text)", "layers in turn, 64 tokens"],
    [[n, f"{parameters[n]:,}", f"{state[n] / 1024:.0f}", turns[n]] for n in MODELS],
)
assert max(parameters.values()) < 1.01 * min(parameters.values())
assert max(state.values()) == state["Feedback"] == 16 * 1024
assert turns["Feedback"] == 64 * turns["vanilla"] == 16 * turns["Compressive"]

# %% [markdown]
# Feedback takes its tokens one by one, layer after layer. The Compressive Transformer reads pieces as long as its
# memory. The others read a segment in as many turns as they have layers. When they *write*, all six are alike:
# each token waits for the one before.
#
# ## 5.3 Equal tokens
#
# Each model is trained on the same number of characters, 512 a step, and then reads validation text. Models with
# a memory read segments of 32. Vanilla reads windows of 64, as long as segment and memory of Transformer-XL;
# Reformer reads windows of 128, eight of its chunks; both in fewer lanes, to keep to 512 characters a step.

# %% tags=["band"]
T, STEPS, LANES = 32, 250, 16
MINUTES = {  # steps that take as long as 300 of vanilla
    "vanilla": 300, "sliding window": 225, "Transformer-XL": 210, "Compressive": 160,
    "Feedback": 90, "Reformer": 100,
}  # fmt: skip
LONG = {"vanilla": 2, "Reformer": 4}  # windows, in segments of the others


def fit(name, seed, steps):
    """Train one of the models on text, 512 characters a step."""
    model = make(name, len(corpus.vocab), seed)
    long = LONG.get(name, 1)
    how = dict(batch_size=LANES // long, segment_len=T * long, progress=False)
    training.train(model, corpus.train, steps=steps, **how)
    return model


def text_loss(name, model):
    """Nats per character on a part of the validation text, read as in training."""
    text = corpus.valid[: 16 * 1024 + 1]
    return training.evaluate(
        model, text, batch_size=16, segment_len=T * LONG.get(name, 1)
    )

# %% tags=["band"]
CONTEXTS = [1, 2, 4, 8, 16, 32, 64]
PLACES = torch.linspace(64, len(corpus.valid) - 1, 1000).long()


@torch.inference_mode()
def by_context(model):
    """Loss at 1,000 places when n characters are read before, for each of CONTEXTS."""
    losses = []
    for n in CONTEXTS:
        windows = torch.stack([corpus.valid[p - n : p + 1] for p in PLACES]).to(device)
        logits = model(windows[:, :-1])[0][:, -1].float()  # (1000, vocab_size)
        losses.append(F.cross_entropy(logits, windows[:, -1]).item())
    return losses

# %% tags=["band"]
def text_scores(seed):
    """Losses at equal tokens and at equal minutes, and by context."""
    values = {}
    for name in MODELS:
        model = fit(name, seed, STEPS)
        values[name] = text_loss(name, model)
        values[f"{name}, context"] = by_context(model)
        model = fit(name, seed, MINUTES[name])
        values[f"{name}, minutes"] = text_loss(name, model)
    return values

# %%
models = {name: fit(name, SEED, STEPS) for name in MODELS}
tokens_race = {name: text_loss(name, model) for name, model in models.items()}
text_band = bands.load("05_text_scores", corpus.name)
text_band.check(tokens_race, margin=0.1)

# %% jupyter={"source_hidden": true} tags=["hide-input"]
COLOUR = figures.COLOUR | {"sliding window": "#56B4E9"}
MARKER = dict(zip(MODELS, "DvsPo^"))
figure, axes = plt.subplots(figsize=(6.4, 4.2))
figures.points(
    axes, tokens_race, text_band.values, colors=COLOUR,
    xlabel=f"validation loss (nats per character, {corpus.name})",
)  # fmt: skip
axes.legend(loc="center right")  # beside no point
axes.set_title(f"The same text: {STEPS} steps of 512 characters")
figures.show(
    figure,
    "The sliding window, Transformer-XL, the Compressive Transformer and Feedback have "
    "the lowest validation loss after the same text, close together; vanilla, then "
    "Reformer, which start each window from nothing, are clearly behind.",
)

# %%
if text_band.seeds:
    for name in ("sliding window", "Transformer-XL", "Compressive", "Feedback"):
        assert text_band.high(name) < text_band.low("vanilla")
        assert text_band.high("vanilla") < text_band.low("Reformer")
assert tokens_race["Transformer-XL"] < tokens_race["vanilla"]

# %% [markdown]
# The four with a memory beyond their segment are ahead of both that start each window from nothing, though the
# segments are shorter than those windows. Among the four the differences are small.
#
# How much of the past does each use? At a thousand places of the validation text, let the model read `n`
# characters from nothing and predict the next one:

# %%
contexts = {f"{name}, context": by_context(model) for name, model in models.items()}
text_band.check(contexts, margin=0.5)

# %% jupyter={"source_hidden": true} tags=["hide-input"]
figure, axes = plt.subplots(figsize=(6.4, 4.6))
for n, name in enumerate(MODELS):
    label = "{} recorded seeds of each" if n == 0 else ""
    values = text_band.values.get(f"{name}, context", [])
    figures.band(axes, CONTEXTS, values, label=label)
    look = dict(color=COLOUR[name], marker=MARKER[name])
    axes.plot(CONTEXTS, contexts[f"{name}, context"], label=name, **look)
axes.set(xscale="log", xlabel="characters read before", ylabel="loss (nats)")
axes.set_xticks(CONTEXTS, labels=CONTEXTS)
axes.minorticks_off()
axes.set_title(f"Loss against context ({corpus.name})")
figures.legend_below(axes)
figures.show(
    figure,
    "For the four models with memory the loss falls steeply over the first eight "
    "characters of context and is level from sixteen on. Vanilla gains little from "
    "more than two; Reformer is best at one character and again at 32.",
)

# %%
if text_band.seeds:
    for name in MODELS:
        curve = text_band.values[f"{name}, context"].mean(axis=0)  # of 1, 2 ... 64
        if name not in REREAD:
            assert curve[3] < curve[0] - 0.2 and abs(curve[-1] - curve[4]) < 0.1
        assert name != "Reformer" or curve[-1] > curve[0] - 0.1

# %% [markdown]
# The four with memory fall steeply over the first eight characters (they seldom meet so few in training), and
# hardly move after 16, which all of them hold. So text of this kind, read by models of this size, cannot tell
# long memories apart, and it is not the length of theirs that puts the four ahead. They are also told how far
# away a token stands, the other two at which place of the window; whether that is the cause was not tried. In
# 250 steps vanilla has learned to use a few characters (64 serve it worse than 8), and Reformer predicts no
# better from 64 than from one. (Why Reformer does worst with 2 to 8, we do not know.)
#
# ## 5.4 Equal minutes
#
# A step of Feedback takes several times as long as one of vanilla. Give each model the same *time*: as long as
# vanilla needs for 300 steps. Since your machine is not ours, the recorded seeds and your run take fixed numbers
# of steps, `MINUTES`, from ratios measured once. The next two cells measure the ratios on your machine.

# %%
def one_step(name):
    """A step of training on 512 characters, with a full memory, as a function."""
    model, memory, long = make(name, len(corpus.vocab)).train(), None, LONG.get(name, 1)
    optimizer = training.adamw(model, 3e-3, 0.01)
    lanes = corpora.lanes(corpus.train[:8192].to(device), 16 // long, 32 * long)
    segments = [tokens for tokens, _ in lanes][:3]
    with torch.no_grad():
        for tokens in segments:
            _, memory, *_ = model(tokens, memory)

    def step():
        logits, _, *aux = model(tokens, memory)
        optimizer.zero_grad()
        sum(aux, training.cross_entropy(logits, tokens)).backward()
        optimizer.step()

    return step


# %%
steps = {name: one_step(name) for name in MODELS}
seconds = {name: [] for name in MODELS}
for turn in range(15):
    for name, step in steps.items():
        timing = dict(warmup=turn == 0, rounds=1, device=device)
        seconds[name].append(measure.seconds(step, **timing))
median = {name: sorted(values)[7] for name, values in seconds.items()}
ratio = {name: median[name] / median["vanilla"] for name in MODELS}

# %%
minutes_race = {}
for name in MODELS:
    minutes_race[f"{name}, minutes"] = text_loss(name, fit(name, SEED, MINUTES[name]))
text_band.check(minutes_race, margin=0.12)
figures.table(
    f"Equal minutes ({corpus.name}): nats per character",
    ["", "a step here, vanilla = 1", "as recorded", "steps taken", "loss"],
    [
        [
            name, f"{ratio[name]:.1f}", f"{MINUTES['vanilla'] / MINUTES[name]:.1f}",
            MINUTES[name], f"{minutes_race[f'{name}, minutes']:.2f}",
        ]
        for name in MODELS
    ],
)  # fmt: skip
assert ratio["Feedback"] > ratio["vanilla"]

# %% jupyter={"source_hidden": true} tags=["hide-input"]
figure, axes = plt.subplots(figsize=(6.4, 4.2))
short = lambda key: key.removesuffix(", minutes")
seeds = {short(key): text_band.values.get(key, []) for key in minutes_race}
figures.points(
    axes, {short(key): loss for key, loss in minutes_race.items()}, seeds,
    colors=COLOUR, xlabel=f"validation loss (nats per character, {corpus.name})",
)  # fmt: skip
axes.legend(loc="center right")
axes.set_title("The same time: as long as 300 steps of vanilla")
figures.show(
    figure,
    "In the same time the sliding window and Transformer-XL come first; Feedback and "
    "Reformer, whose steps take about three times as long, are last.",
)

# %%
if text_band.seeds:
    low, high = text_band.low, text_band.high
    for name in ("sliding window", "Transformer-XL", "Compressive"):
        assert high(f"{name}, minutes") < low("vanilla, minutes")
    assert high("vanilla, minutes") < low("Feedback, minutes")
    assert high("Feedback") < low("vanilla")

# %% [markdown]
# Now Feedback, well ahead of vanilla at equal tokens, is behind it: it has read less than a third as much. The
# other three with a memory, whose steps take at most about twice as long, stay ahead. On another machine the
# ratios differ, most of all on a GPU (5.10).
#
# ## 5.5 Equal bytes of state
#
# Such text asks little of a memory. The next two tasks ask for exact things from a known distance. Each
# model has its state of at most 16 KiB, and answers in segments of 16. (In training, vanilla and Reformer read
# whole strings.)
#
# ### Copying at a distance
#
# The duplicate task of the Reformer paper: a string of random symbols, then the same once more, each symbol
# exactly 32 tokens after its first time. Chance is one in 31. (`n == 0`: here a new string begins.)

# %% tags=["band"]
COPY = dict(length=64, n_symbols=31)


def in_segments(strings):
    """Each string of the duplicate task in four segments of 16, read one by one."""
    for tokens, targets, _ in strings:
        parts = zip(tokens.split(16, dim=1), targets.split(16, dim=1))
        yield from ((*part, n == 0) for n, part in enumerate(parts))


def learn_copy(name, seed):
    """One of the models, trained on the duplicate task, 512 tokens a step."""
    model = make(name, COPY["n_symbols"] + 1, seed)
    strings = tasks.duplicate(8 if name in REREAD else 32, **COPY, seed=seed)
    stream = strings if name in REREAD else in_segments(strings)
    training.train(model, stream, steps=300, progress=False)
    return model


@torch.no_grad()
def copied(name, model):
    """The share of the second half that is right, in new strings."""
    model, memory, right = reader(name, model), None, []
    strings = tasks.duplicate(256, **COPY, seed=10**6)
    for _, (tokens, targets, _) in zip(range(4), in_segments(strings)):
        logits, memory, *_ = model(tokens.to(device), memory)
        asked = targets >= 0
        right.append((logits.argmax(dim=-1).cpu() == targets)[asked])
    return torch.cat(right).float().mean().item()


def copy_scores(seed):
    return {name: copied(name, learn_copy(name, seed)) for name in MODELS}

# %%
copying = {name: copied(name, learn_copy(name, SEED)) for name in MODELS}
copy_band = bands.load("05_copy_scores", None)
copy_band.check(copying, margin=0.2)

# %% jupyter={"source_hidden": true} tags=["hide-input"]
figure, axes = plt.subplots(figsize=(6.4, 4.2))
look = dict(colors=COLOUR, xlabel="right answers (share)")
figures.points(axes, copying, copy_band.values, **look)
axes.legend(loc="center")
axes.set(xlim=(-0.05, 1.08), title="Copying from 32 tokens back")
figures.show(
    figure,
    "Transformer-XL and Feedback copy everything from 32 tokens back, Reformer most of "
    "it, vanilla a quarter, the Compressive Transformer less, and the sliding window "
    "is at chance.",
)

# %%
for name in ("Transformer-XL", "Feedback"):
    assert copy_band.low(name) > 0.95 and copying[name] > 0.9
assert copy_band.high("sliding window") < 0.1
assert copy_band.high("Compressive") < 0.7 * copy_band.low("Transformer-XL")

# %% [markdown]
# The sliding window is blind: each token sees itself and 15 before it, so two layers reach 30 tokens back, and
# the answer stands further away. With the same bytes Transformer-XL reaches it, since it holds one vector a token
# and layer where a cache of keys and values holds two. Feedback holds one vector a token for all layers, and
# reaches it with room to spare. The Compressive Transformer *reaches* the answer too, but in a state that stands
# for four tokens, and their mean says little about which came first. Vanilla and Reformer hold all 64 tokens, and
# yet, after 300 steps, copy only a quarter and three quarters. That they are told places, not distances, may be
# why.
#
# ### Recall by age
#
# In the recall stream (chapter 2) one token, `b=5`, gives one of four keys one of eight values; `b?` asks for the
# latest; the rest is noise. The older an answer, the further back the model must look. All six train for 4,000
# steps of 512 tokens: those with a memory in segments of 16, vanilla and Reformer on windows of 256. Feedback
# begins with short games, as in chapter 3. (`age`: how many tokens ago the answer stood, 0 where there is none.)

# %% tags=["band"]
def short_games(length, seed):
    """Games of `length` tokens: the recall stream in pieces, each of which asks for
    what it has said itself."""
    for tokens, targets, _, age in tasks.recall(512 // length, length, seed):
        before = torch.arange(length)  # so many tokens lie before each
        yield tokens, targets.masked_fill(age > before, -100), True


def learn_recall(name, seed):
    """One of the models, trained on the recall stream."""
    model, steps = make(name, tasks.RECALL_VOCAB, seed), 4000
    how = dict(lr=2e-3, progress=False)
    if name == "Feedback":
        for length, n in (4, 300), (8, 300), (16, 400):
            lesson = dict(steps=n, lr=5e-3, clip=0.1, warmup=20, progress=False)
            training.train(model, short_games(length, seed + length), **lesson)
            steps, how["clip"] = steps - n, 0.1
    n_lanes, length = (2, 256) if name in REREAD else (32, 16)
    stream = tasks.recall(n_lanes, length, seed=1000 + seed)
    training.train(model, stream, steps=steps, **how)
    return model


@torch.no_grad()
def recalled(name, model, n_segments=80, skip=20):
    """Shares of right answers of ages 1 to 16, 17 to 32, ..., 177 to 192, once the
    memory is full: (12,)."""
    model, memory, right, ages = reader(name, model).eval(), None, [], []
    stream = tasks.recall(64, 16, seed=10**6)
    for n, (tokens, targets, _, age) in zip(range(n_segments), stream):
        logits, memory, *_ = model(tokens.to(device), memory)
        if n >= skip:
            asked = targets >= 0
            right.append((logits.argmax(dim=-1).cpu() == targets)[asked])
            ages.append((age[asked] - 1) // 16)
    asked, right = torch.cat(ages), torch.cat(right)
    count = lambda bucket: bucket.bincount(minlength=12)[:12]
    return (count(asked[right]) / count(asked)).tolist()


def recall_scores(seed):
    names = [name for name in MODELS if name not in ("Transformer-XL", "Compressive")]
    return {name: recalled(name, learn_recall(name, seed)) for name in names}

# %% [markdown]
# Chapter 2 has recorded five seeds of Transformer-XL and of the Compressive Transformer with means of four, on
# the same stream with as many steps and bytes (and a few more parameters: `d_ff` is still 256). The other four
# were recorded for this chapter. Only the sliding window is trained here again; coloured lines are means of seeds.

# %%
recall_band = bands.load("05_recall_scores", None)
chapter_2 = bands.load("02_recall_scores", None).values
recall = recall_band.values | {  # (seeds, 12) each
    "Transformer-XL": chapter_2["Transformer-XL"],
    "Compressive": chapter_2["mean, c = 4"],
}
name = "sliding window"
live_recall = recalled(name, learn_recall(name, SEED))
recall_band.check({name: live_recall}, margin=0.1)

# %% jupyter={"source_hidden": true} tags=["hide-input"]
figure, axes = plt.subplots(figsize=(6.4, 4.6))
AGES = [16 * n + 8 for n in range(12)]
for name in MODELS:
    values = recall[name]
    figures.band(axes, AGES, values, "recorded seeds" if name == "vanilla" else "_")
    look = dict(color=COLOUR[name], marker=MARKER[name])
    axes.plot(AGES, values.mean(axis=0), label=name, **look)
axes.plot(AGES, live_recall, "k:", label="sliding window, this run")
axes.axhline(1 / 8, color="black", linewidth=0.8)
axes.text(192, 1 / 8 - 0.05, "chance", fontsize=9, ha="right")
axes.set(xlabel="age of the answer (tokens)", ylabel="right answers (share)")
axes.set(ylim=(0, 1.02), title="At most 16 KiB of state: how far back?")
figures.legend_below(axes)
figures.show(
    figure,
    "Feedback is right at every age up to 192. Vanilla and Reformer, which hold 256 "
    "tokens, are right about five times in six, less at the oldest ages. The "
    "sliding window guesses beyond 32 and Transformer-XL beyond 80; the Compressive "
    "Transformer is right most of the time up to 100 and then falls.",
)

# %%
old = {name: recall[name][:, 5:8].mean(axis=1) for name in MODELS}
young = {name: recall[name][:, :3].mean(axis=1) for name in MODELS}
figures.table(
    "Right answers, mean of the seeds",
    ["", "ages 1 to 48", "ages 81 to 128"],
    [[n, f"{young[n].mean():.2f}", f"{old[n].mean():.2f}"] for n in MODELS],
)
for name, reach in {"sliding window": 32, "Transformer-XL": 80}.items():
    assert recall[name][:, reach // 16 :].max() < 0.2  # guesses beyond
assert recall["Feedback"].min() > 0.95
for name in REREAD:
    assert recall[name][:, :8].min() > 0.65 and recall[name].min() > 0.35
assert old["Compressive"].min() > old["Transformer-XL"].max() + 0.2
assert young["Compressive"].mean() < young["Transformer-XL"].mean()

# %% [markdown]
# The sliding window and Transformer-XL end where their memories end: the second layer reads states that have
# themselves looked back, so Transformer-XL reaches twice its 32 tokens, and up to a segment more. The Compressive
# Transformer has as many slots, but half of them stand for four tokens each. It still answers where
# Transformer-XL guesses, and is a little worse where Transformer-XL can answer: in the same bytes, a *longer* past
# less *exactly*. Vanilla and Reformer have all 256 tokens before them, and yet miss one answer in six, more of
# the oldest, vanilla also of the youngest. Why was not tested.
#
# Feedback holds one vector for each of the latest 64 tokens, and is right at an age of 192. No vector in its
# memory is as old as the answer, so newer ones must have taken it over: what it holds is not only what *was said*,
# but what is *true now*, four values for four keys, handed on from step to step. That is little to hand on. A
# hundred keys would ask for more, and were not tried; nor was it tried whether the others gain from short games.
#
# ## 5.6 Following the ball
#
# A ball lies under one of five cups, cups are swapped, and after each swap the model says where the ball is
# (chapter 3). Nothing needs to be looked up; the past must be *worked out*, one swap after the other. A game is
# one short segment and nothing comes before it, so the sliding window and the Compressive Transformer compute
# what Transformer-XL computes:

# %%
torch.manual_seed(SEED)
same = {name: build(name, 10).eval() for name in MODELS if name not in REREAD}
games, xl = next(tasks.cups(4, 8))[0].to(device), same["Transformer-XL"]
for name in ("sliding window", "Compressive"):
    same[name].load_state_dict(xl.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(same[name](games)[0], xl(games)[0])
print("three models, the same weights, the same logits")

# %% [markdown]
# So four models play. Lessons begin with games of two swaps, and end with eight. Feedback learns at 1e-2, the
# others at 3e-3: the rates of Feedback and vanilla in chapter 3.

# %% tags=["band"]
LESSONS = [(2, 150), (4, 250), (8, 150)]  # swaps in a game, steps
PLAYERS = "vanilla", "Transformer-XL", "Feedback", "Reformer"


def learn_ball(name, seed):
    """One of the models, trained on ever longer games of the cups."""
    model = make(name, 10, seed)
    for length, steps in LESSONS:
        games = tasks.cups(128, length, seed=1000 * seed + length)
        how = dict(warmup=20, clip=0.1, lr=1e-2 if name == "Feedback" else 3e-3)
        training.train(model, games, steps=steps, progress=False, **how)
    return model


@torch.no_grad()
def followed(model):
    """The shares of right answers after each swap, in new games of 8."""
    tokens, targets, _ = next(tasks.cups(1000, 8, seed=10**6))
    answers = model.eval()(tokens.to(device))[0].argmax(dim=-1).cpu()
    return (answers == targets).float().mean(dim=0).tolist()


def ball_scores(seed):
    return {name: followed(learn_ball(name, seed)) for name in PLAYERS}

# %%
balls = {name: followed(learn_ball(name, SEED)) for name in PLAYERS}
ball_band = bands.load("05_ball_scores", None)
ball_band.check(balls, margin=0.15)

# %% jupyter={"source_hidden": true} tags=["hide-input"]
figure, axes = plt.subplots()
SWAPS = range(1, 9)
for n, name in enumerate(PLAYERS):
    label = "{} recorded seeds of each" if n == 0 else ""
    figures.band(axes, SWAPS, ball_band.values[name], label=label)
    look = dict(color=COLOUR[name], marker=MARKER[name])
    axes.plot(SWAPS, balls[name], label=name, **look)
axes.axhline(1 / 5, color="black", linewidth=0.8)
axes.text(8, 0.22, "chance", ha="right", fontsize=9)
axes.set(xlabel="swaps so far", ylabel="right answers (share)", ylim=(0, 1.05))
axes.set_title("Where is the ball?")
figures.legend_below(axes)
figures.show(
    figure,
    "Feedback is right after each of eight swaps, in all seeds. Vanilla, "
    "Transformer-XL and Reformer fall from certain to about four in ten.",
)

# %%
for name in PLAYERS:
    last = ball_band.values[name][:, -1]
    assert last.min() > 0.9 if name == "Feedback" else last.max() < 0.65

# %% [markdown]
# Feedback follows the ball to the end in every seed. The parallel models are lost after a few swaps: two layers
# give them two rounds of looking, where going swap by swap takes eight. More layers buy more swaps, some at a time
# (chapter 3). More memory could not help: the whole game lies in the segment.
#
# ## 5.7 What it costs
#
# Give each model a state that covers `n` tokens: `n` states a layer for Transformer-XL and the window, `n / 5`
# and `n / 5` of four tokens each for the Compressive Transformer, `n` vectors for Feedback, a text of `n` for
# those that read again. Weights and states are made up: time and bytes do not depend on what is in them.

# %%
def covering(name, n, n_layers):
    """An untrained model that covers n tokens, a multiple of 100."""
    other = {
        "Compressive": dict(mem_len=n // 5, compressed_len=n // 5),
        "vanilla": dict(max_len=n),
        "Reformer": dict(axial_shape=(n // 10, 10), chunk_len=32),
    }.get(name, dict(mem_len=n))
    return build(name, 64, n_layers=n_layers, **other)


def full(name, n, L, writing):
    """A made-up state of one text that covers n tokens, for writing or training."""
    d_model, H = SIZES["d_model"], SIZES["n_heads"]
    random = lambda *shape: torch.randn(shape, device=device)
    if name in REREAD:
        return torch.zeros(1, n, dtype=torch.int64, device=device)
    if name == "Compressive":
        parts = range(2)  # compressed memory, memory
        return [tuple(random(1, n // 5, d_model) for _ in parts) for _ in range(L)]
    if name == "Feedback" and writing:
        return random(1, n, 1, 2, H, d_model // H)  # keys and values for all layers
    if name == "Feedback":
        return random(1, n, d_model)
    if name == "sliding window" and writing:
        return [random(2, 1, H, n, d_model // H) for _ in range(L)]
    return [random(1, n, d_model) for _ in range(L)]


# %% [markdown]
# ### Writing
#
# One more token after `n`, with eight layers. Feedback and the window hold keys and values (`Cached`, chapter 3:
# now Feedback, too, keeps two vectors a token); Transformer-XL and the Compressive Transformer make them from
# their states at each call; vanilla and Reformer read the `n` tokens again. At 30,000 tokens only Feedback and
# the Compressive Transformer are run, whose vectors take the fewest bytes.

# %%
DEEP = 8


def writer(name, n):
    """A deep model that covers n tokens, as it writes."""
    if name == "Feedback":  # plain: one token at a time, that is as fast
        sizes = SIZES | dict(n_layers=DEEP, d_ff=256, mem_len=n)
        return Cached(FeedbackTransformer(64, **sizes).to(device)).eval()
    model = covering(name, n, DEEP).eval()
    if name == "sliding window":
        return CachedWindow(model)
    return Reread(model) if name in REREAD else model


@torch.no_grad()
def writing(name, n):
    """Tokens a second after n tokens, and the bytes of state."""
    model, memory = writer(name, n), full(name, n, DEEP, writing=True)
    token = torch.zeros(1, 1, dtype=torch.int64, device=device)
    slow = name in REREAD and n > 1000  # a second or so for each token
    timing = dict(warmup=not slow, rounds=1 if slow else 15, device=device)
    seconds = measure.seconds(lambda: model(token, memory), **timing)
    return 1 / seconds, measure.nbytes(memory)


# %%
REACH, LONGER = [100, 1000, 10_000], 30_000
wrote = {name: {n: writing(name, n) for n in REACH} for name in MODELS}
for name in ("Compressive", "Feedback"):
    wrote[name][LONGER] = writing(name, LONGER)

# %% jupyter={"source_hidden": true} tags=["hide-input"]
figures.table(
    f"Tokens written a second, one text ({DEEP} layers, d_model {SIZES['d_model']})",
    ["tokens covered", *(f"{n:,}" for n in REACH)],
    [[name, *(f"{wrote[name][n][0]:,.2f}" for n in REACH)] for name in MODELS],
)
figures.table(
    "Bytes of state: for each token covered, and in all",
    ["tokens covered", "a token, at 10,000", *(f"{n:,} (KiB)" for n in REACH)],
    [
        [name, f"{wrote[name][10_000][1] / 10_000:,.0f}"]
        + [f"{wrote[name][n][1] / 1024:,.0f}" for n in REACH]
        for name in MODELS
    ],
)

# %% [markdown]
# The smallest state is the text itself, eight bytes a token. The price is to read it all again for each new one.
# Among the others Feedback holds the least, with eight layers: its keys and values serve all layers. (With few
# layers the Compressive Transformer holds less; exercise 5.3 finds the border.)
#
# ### Training
#
# A step of training with two layers: forward and backward, for one text. Vanilla and Reformer take all `n`
# tokens in one window, and gradients go through all of it. The others read a segment of 64 after a state that
# covers `n`, to which no gradient goes.

# %%
def training_step(name, n):
    """A model's step as a function, and how many tokens it reads."""
    model = covering(name, n, 2).train()
    memory = None if name in REREAD else full(name, n, 2, writing=False)
    size = n if name in REREAD else 64
    tokens = torch.zeros(1, size, dtype=torch.int64, device=device)

    def step():
        logits, _, *aux = model(tokens, memory)
        sum(aux, training.cross_entropy(logits, tokens)).backward()

    return step, size


def trained(name, n):
    """Tokens a second, and the most bytes held in the step (0: not measured)."""
    step, size = training_step(name, n)
    rounds = {100: 15, 1000: 5}.get(n, 1)
    timing = dict(warmup=n <= 1000, rounds=rounds, device=device)
    peak = measure.peak_bytes(step, device) if n <= 1000 else 0
    return size / measure.seconds(step, **timing), peak


# %%
took = {name: {n: trained(name, n) for n in REACH} for name in MODELS}
for name in MODELS:
    if name != "vanilla":  # nine times as long as at 10,000
        took[name][LONGER] = trained(name, LONGER)

# %% jupyter={"source_hidden": true} tags=["hide-input"]
figures.table(
    "Tokens trained a second, one text (2 layers)",
    ["tokens covered", *(f"{n:,}" for n in REACH)],
    [[name, *(f"{took[name][n][0]:,.0f}" for n in REACH)] for name in MODELS],
)
figures.table(
    "The most that a step of training holds (MiB)",
    ["tokens covered", *(f"{n:,}" for n in REACH[:2])],
    [[n, *(f"{took[n][size][1] / 2**20:.1f}" for size in REACH[:2])] for n in MODELS],
)

# %% jupyter={"source_hidden": true} tags=["hide-input"]
figure, axes = plt.subplots(2, 1, figsize=(6.4, 6.8), sharex=True)
for ax, costs, title in [
    (axes[0], wrote, f"writing, {DEEP} layers"), (axes[1], took, "training, 2 layers"),
]:  # fmt: skip
    for name, values in costs.items():
        ms = [1000 / speed for speed, _ in values.values()]
        ax.plot(list(values), ms, color=COLOUR[name], marker=MARKER[name], label=name)
    ax.set(xscale="log", yscale="log", ylabel="ms a token", title=title)
axes[1].set(xlabel="tokens covered")
axes[1].set_xticks([*REACH, LONGER], labels=["100", "1,000", "10,000", "30,000"])
axes[1].minorticks_off()
handles = axes[0].get_legend_handles_labels()
figure.legend(*handles, loc="outside lower center", ncols=3, fontsize=9)
figures.show(
    figure,
    "Time for a token against the tokens covered, both axes logarithmic. Writing: "
    "vanilla and Reformer, which read all again, are slowest from 1,000 tokens on; "
    "Feedback is fastest at 10,000. Training: vanilla is fastest at 100 tokens and is "
    "overtaken by Reformer at 10,000; Feedback is slowest.",
)

# %%
speed = {name: wrote[name][10_000][0] for name in MODELS}
assert speed["Feedback"] > 5 * max(speed["vanilla"], speed["Reformer"])
windows = {name: took[name][10_000][0] for name in REREAD}
assert windows["Reformer"] > 1.2 * windows["vanilla"]
assert took["vanilla"][100][0] > took["Reformer"][100][0]
assert took["Feedback"][100][0] < took["Transformer-XL"][100][0]

# %% [markdown]
# - **Writing.** The time of vanilla rises most steeply; Reformer's less so, but from a slow start. With Feedback
# and the window it rises slowly: only attention grows. Transformer-XL and the Compressive Transformer make the
# keys and values of every slot anew, and lie between. After 10,000 tokens Feedback writes fastest. What made it
# slow in training, one token after the other, is how every model writes.
# - **Training, short.** At 100 tokens vanilla is by far the fastest: fused attention, no memory, nothing to
# sort. Feedback is the slowest.
# - **Training, long.** In a window of 10,000 tokens hashing has overtaken exact attention, with gradients through
# all of the text. The memory models train a segment of 64 at a time, which attends to all they hold. So their
# cost grows with `n`, and is lower for the Compressive Transformer, which has `2 n / 5` slots. (At 100 tokens its
# memory is 20, so it reads a segment in pieces of 20.) But no gradient goes into their past: what should be kept
# is learned from the segment alone.
#
# ### Deep models
#
# With two layers and one text Reformer holds the most (last table above). What does each further layer add? Now
# all read 1,024 tokens: one window, or a segment of 64 from each of 16 texts, with the memory of section 5.2.

# %%
def peak_of(name, n_layers):
    """The most bytes that a step on 1,024 tokens holds."""
    window = {"vanilla": dict(max_len=1024), "Reformer": dict(axial_shape=(32, 32))}
    model = build(name, 64, n_layers=n_layers, **window.get(name, {})).train()
    shape = (1, 1024) if name in REREAD else (16, 64)
    tokens = torch.zeros(shape, dtype=torch.int64, device=device)
    with torch.no_grad():
        _, memory, *_ = model(tokens)

    def step():
        logits, _, *aux = model(tokens, memory)
        sum(aux, training.cross_entropy(logits, tokens)).backward()

    return measure.peak_bytes(step, device)


# %%
DEPTHS = [2, 4, 8]
peaks = {name: [peak_of(name, L) / 2**20 for L in DEPTHS] for name in MODELS}
growth = {name: (p[-1] - p[0]) / (DEPTHS[-1] - DEPTHS[0]) for name, p in peaks.items()}
figures.table(
    "The most that a step of training holds (MiB), 1,024 tokens",
    ["layers", *DEPTHS, "for each further layer"],
    [[n, *(f"{p:.1f}" for p in peaks[n]), f"{growth[n]:.2f}"] for n in MODELS],
)
assert all(growth["Reformer"] < 0.5 * growth[n] for n in MODELS if n != "Reformer")

# %% [markdown]
# Reformer's layers are run backwards and keep nothing (chapter 4). What a further layer adds is hardly more than
# the gradients of its weights. (Gradient checkpoints do nearly as well and go with any model: chapter 4.)
#
# ## 5.8 At sizes that do not fit here
#
# Bytes and operations can be computed. First the formulas, for writing one token when `K` slots are held; a
# product of matrices $(m, n)$ and $(n, p)$ counts $2\,m\,n\,p$ operations, and all else is left out. The first
# function counts the buckets of Reformer's hash, twice as many as chunks; above 32, those of its two small
# hashes, added (chapter 4). In Transformer-XL the new token makes `K + 1` keys, and chapter 1's shift of the
# scores needs one distance more than keys.

# %%
def hash_size(n_chunks):
    """Buckets of a hash, or, above 32, of the two small ones that it is made of."""
    n = 2 * n_chunks
    if n <= 32:
        return n
    first = 2 * round(math.sqrt(n) / 2)
    return first + 2 * round(n / first / 2)

# %%
def held(name, K, L, d_model):
    """Numbers held by a model of K slots; for those that read again, tokens."""
    if name in REREAD:
        return K
    if name == "Feedback":  # a key and a value for all layers
        return 2 * K * d_model
    return (2 if name == "sliding window" else 1) * L * K * d_model


def operations(name, K, L, d_model, d_ff, vocab_size=64, P=2, w=32):
    """Operations for one more token, as `writer` computes it."""
    d, feed_forward, head = d_model, 4 * d_model * d_ff, 2 * d_model * vocab_size
    if name == "vanilla":  # for each token again: q, k, v, out; attention to K
        return K * (L * (8 * d * d + feed_forward + 4 * d * K) + head)
    if name == "Reformer":  # again, too; T: K in whole chunks; the head reads 2 * d
        T = -(-K // w) * w
        attention = P * (K * d * hash_size(T // w) + 8 * w * d * T)
        return K * (L * (6 * d * d + feed_forward) + 2 * head) + L * attention
    if name == "Feedback":  # q, out, attention; once: key and value, mixture, head
        layer = 4 * d * d + feed_forward + 4 * d * K
        return L * layer + 4 * d * d + 2 * (L + 1) * d + head
    if name == "sliding window":  # q, k, v, out; scores by content and place, values
        return L * (8 * d * d + feed_forward + 6 * d * K) + head
    # q, out; keys and values of K + 1, places of K + 2; the same three of attention
    layer = d * d * (4 + 4 * (K + 1) + 2 * (K + 2)) + feed_forward + 2 * d * (3 * K + 4)
    return L * layer + head


# %% [markdown]
# PyTorch counts the operations that it runs, but on a CPU not those of fused attention, so `SDPBackend.MATH`
# switches that off. Compare counts and formulas at small sizes:

# %%
@torch.no_grad()
def counted(name, n, n_layers=DEEP):
    """(numbers held, operations) of writing one token after n, as they are."""
    model, memory = writer(name, n), full(name, n, n_layers, writing=True)
    token = torch.zeros(1, 1, dtype=torch.int64, device=device)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(token, memory)
    size = 8 if name in REREAD else 4  # bytes of a token, of a number
    return measure.nbytes(memory) // size, counter.get_total_flops()


rows = []
for n in (200, 600):
    for name in MODELS:
        K = 2 * n // 5 if name == "Compressive" else n
        numbers, found = counted(name, n)
        computed = operations(name, K, DEEP, SIZES["d_model"], 256)
        assert numbers == held(name, K, DEEP, SIZES["d_model"])
        assert abs(found / computed - 1) < 0.02, (name, n, found, computed)
        rows.append([name, n, f"{found / 1e6:,.1f}", f"{computed / 1e6:,.1f}"])
header = ["", "tokens covered", "counted (millions)", "computed"]
figures.table("Operations for one more token", header, rows)

# %% [markdown]
# Now the sizes of the papers, all for enwik8, text of single bytes: 24 layers of width
# 1,024 and a memory of 3,800 for Transformer-XL in evaluation; a memory of 768 and 1,152 compressed states at
# rate 3 for the Compressive Transformer (its width is taken to be that of Transformer-XL); 12 layers of width
# 512 and at most 8,192 tokens back in the released code of the Feedback Transformer; a window of 65,536 in 12
# layers of width 1,024, two rounds, chunks of 256, for Reformer.

# %%
PAPERS = {  # K, L, d_model, d_ff, tokens covered in each layer
    "Transformer-XL": (3800, 24, 1024, 3072, 3800),
    "Compressive": (768 + 1152, 24, 1024, 3072, 768 + 3 * 1152),
    "Feedback": (8192, 12, 512, 4096, 8192),
    "Reformer": (65_536, 12, 1024, 4096, 65_536),
}


def row(name, K, L, d_model, d_ff, covers):
    """A row of the tables below, at 2 bytes a number and 1 byte a token."""
    size = held(name, K, L, d_model) * (1 if name in REREAD else 2)
    work = operations(name, K, L, d_model, d_ff, vocab_size=256, w=256)
    return [name, f"{covers:,}", f"{size / 2**20:,.2f}", f"{work / 1e9:,.1f}"]


header = ["", "tokens covered", "state (MiB)", "billions of operations a token"]
rows = [row(name, *sizes) for name, sizes in PAPERS.items()]
figures.table("One text, at the papers' sizes for enwik8", header, rows)

# %% [markdown]
# Feedback, here also the smallest model, holds the least of the three that keep states, and computes by far the
# least: its keys and values are kept. Now a million tokens, with 24 layers of width 1,024 for all, as if each
# could be trained to use them:

# %%
WIDE = 24, 1024, 4096
MILLION = {name: 10**6 * 2 // 5 if name == "Compressive" else 10**6 for name in MODELS}
rows = [row(name, K, *WIDE, 10**6) for name, K in MILLION.items()]
figures.table("One text of a million tokens", header, rows)
million = {name: operations(name, K, *WIDE, w=256) for name, K in MILLION.items()}
sizes = {name: held(name, K, *WIDE[:2]) for name, K in MILLION.items()}
assert min(million, key=million.get) == "Feedback"
assert sizes["sliding window"] == 24 * sizes["Feedback"]
assert sizes["Compressive"] > 4 * sizes["Feedback"]
assert million["vanilla"] > 100 * million["Reformer"] > 100 * million["Feedback"]

# %% [markdown]
# Keys and values of all 24 layers take 24 times what Feedback holds. Making them anew is out of the question at
# this length, and so is reading again. A sliding window of fixed length costs no more after a million
# tokens than after ten thousand, but does not hold them all.
#
# ### At a glance
#
# Nine measurements, recall as means of seeds. Each chart has its own scale, from zero; more is better unless the
# title says less. The best bar is filled (too short to see in "state"), the others are pale. For the ball, the
# sliding window and the Compressive Transformer stand where Transformer-XL does (5.6). "Training after 10,000" is
# a window of 10,000 for vanilla and Reformer, a segment of 64 for the others.

# %% jupyter={"source_hidden": true} tags=["hide-input"]
losses = {short(key): loss for key, loss in minutes_race.items()}
last = {name: values[-1] for name, values in balls.items()}
last |= dict.fromkeys(("sliding window", "Compressive"), last["Transformer-XL"])
GLANCE = {  # title: ({model: value}, number, is more better?)
    "loss, equal tokens\n(nats, less is better)": (tokens_race, "{:.2f}", False),
    "loss, equal minutes\n(nats, less is better)": (losses, "{:.2f}", False),
    "copied from 32 back\n(share right)": (copying, "{:.2f}", True),
    "recalled, ages 81–128\n(share right)": (
        {name: values.mean() for name, values in old.items()}, "{:.2f}", True,
    ),
    "ball after 8 swaps\n(share right)": (last, "{:.2f}", True),
    "state for 10,000\n(MiB, less is better)": (
        {name: wrote[name][10_000][1] / 2**20 for name in MODELS}, "{:.1f}", False,
    ),
    "writing after 10,000\n(tokens a second)": (speed, "{:.1f}", True),
    "training after 10,000\n(tokens a second)": (
        {name: took[name][10_000][0] for name in MODELS}, "{:,.0f}", True,
    ),
    "a further layer\n(MiB, less is better)": (growth, "{:.2f}", False),
}  # fmt: skip

# %% jupyter={"source_hidden": true} tags=["hide-input"]
figure, grid = plt.subplots(5, 2, figsize=(5.4, 10.5), sharey=True)
grid[-1, -1].axis("off")
for ax, (title, (values, number, more)) in zip(grid.flat, GLANCE.items()):
    best = (max if more else min)(values.values())
    for y, name in enumerate(MODELS):
        fill = dict(color=COLOUR[name], alpha=1 if values[name] == best else 0.35)
        ax.barh(y, values[name], height=0.7, **fill)
        text = f" {number.format(values[name])}"
        ax.text(values[name], y, text, va="center", fontsize=10)
    ax.set_title(title)
    ax.set_xlim(0, 1.45 * max(values.values()))
    ax.set(xticks=[], yticks=range(6))
    ax.set_yticklabels(list(MODELS))
    ax.grid(False)
grid[0, 0].invert_yaxis()
figures.show(
    figure,
    "Nine small bar charts, one a measurement, six models in each. No model is best "
    "in all: the filled bars, the best, change from chart to chart.",
)

# %% [markdown]
# ### Look inside
#
# What does each model hold when it reads a character? Here three larger ones, trained for longer (the book's page
# on trained weights), read the same text. Point at a character. Bold is what the model holds. A tray below is a
# slot, for one character or four; the bar above is its share of attention (added up in the titles), in the top
# layer unless you choose another.

# %%
seen = {}
for name, weights in {
    "Transformer-XL": "transformer_xl",
    "Compressive": "compressive_transformer",
    "Feedback": "feedback_transformer",
}.items():
    loaded, vocab = memtx_minimal.load(weights)  # on the CPU
    text = vocab.encode(corpus.vocab.decode(corpus.valid[:300]))
    seen[name] = measure.reads(loaded, text)
figures.explorer(seen, vocab)

# %% [markdown]
# ## 5.9 Decide
#
# Each row is computed from the sections that its last column names. The cell fails if a row is wrong. The first
# three leave out vanilla and Reformer, which read everything again at each call (yet, on average, recall more than
# the third row's model).

# %%
streams = [name for name in MODELS if name not in REREAD]  # states of a fixed size
parallel = [name for name in streams if turns[name] < 64]  # all but Feedback
kept = {name: wrote[name][10_000][1] for name in streams}
far = {name: old[name].mean() for name in streams}
best = {
    "least state": min(kept, key=kept.get),
    "fastest writer": max(speed, key=speed.get),
    "recalls most": max(far, key=far.get),
    "recalls most, in parallel": max(parallel, key=far.get),
    "follows the ball": max(last, key=last.get),
    "grows least": min(growth, key=growth.get),
    "long windows": max(windows, key=windows.get),
    "text": min(tokens_race, key=tokens_race.get),
}
if text_band.seeds:  # not the one run, but the mean of the seeds decides
    by_tokens = {name: text_band.values[name].mean() for name in MODELS}
    by_minutes = {name: text_band.values[f"{name}, minutes"].mean() for name in MODELS}
    best["text"] = min(by_tokens, key=by_tokens.get)
    assert best["text"] == min(by_minutes, key=by_minutes.get)
assert best["least state"] == best["fastest writer"]

# %%
DECISIONS = [
    (
        "chat with a long history on a small device", best["least state"],
        "writes fastest after 10,000 tokens and, with eight layers, holds least but "
        "for those that read all again (5.7)",
    ),
    (
        "a whole book, read once, of which a few facts matter", best["recalls most"],
        "recalls most of what is old, in equal bytes, but reads token by token (5.5)",
    ),
    (
        "the same, a segment at a time", best["recalls most, in parallel"],
        "of those with a state of fixed size that read a segment in parallel, it "
        "recalls most of what is old (5.5)",
    ),
    (
        "a state machine", best["follows the ball"],
        "follows the ball to the last swap (5.6)",
    ),
    (
        "a deep model, trained in little memory", best["grows least"],
        "a further layer adds least to a step of training (5.7)",
    ),
    (
        "long documents, trained in parallel", best["long windows"],
        "trains a window of 10,000 fastest, gradients through all of it (5.7)",
    ),
    (
        "ordinary text, of which a line or two matters", best["text"],
        "lowest loss at equal tokens and minutes, mean of the seeds (5.3, 5.4)",
    ),
]  # fmt: skip
figures.table("Which memory?", ["you want", "take", "because"], DECISIONS)
taken = [take for _, take, _ in DECISIONS]
assert taken[:4] == ["Feedback", "Feedback", "Compressive", "Feedback"]
assert taken[4:6] == ["Reformer", "Reformer"]
assert not text_band.seeds or taken[6] == "sliding window"

# %% [markdown]
# Read a row as advice. "Feedback" stands three times: one vector for all layers is small, and hands on what each
# step found. If you must *train* such a model on much text, section 5.4 is the price. With texts of up to
# 1,000 tokens vanilla trains fastest (5.7); the sliding window learned more here, per token and per minute.
#
# ## 5.10 What this chapter does not show
#
# - **Size.** Two layers of width 64, a hundred thousand parameters, seconds of training. What is a matter of
# construction (bytes, operations, what waits for what, which ages are out of reach) holds at any size. Losses on
# text do not carry over: chapters 1 to 4 quote the papers'.
# - **Settings.** One learning rate for all (but for the cups and Feedback's short games), no search for each
# model.
# - **The compression.** Means of four, not the paper's convolution with its own loss (chapter 2).
# - **Time** on two cores of a CPU. On a GPU, what runs in parallel gains far more than what waits: expect
# Feedback to fall back in training, and vanilla's fused attention to hold out longer against hashing.
# - **Today's models** are none of these. Most have windows and caches, and many mix a few layers that see
# everything with many that see a window.
#
# ## 5.11 Exercises
#
# Write your answer where the dots stand and run the cell. `exercises.check` says that it is right, or names the
# case that fails, what was expected and what came. All [solutions](solutions/05_which_memory.ipynb), worked out
# in words and code.
#
# **5.1 Side by side?** *(predict; easy; 5 minutes)* In training, does a model compute all tokens of a segment
# side by side, layer by layer, if the segment is no longer than its memory (if any)? Write True or False.

# %% tags=["exercise"]
my_answers = {
    "vanilla": ..., "Transformer-XL": ..., "Compressive": ..., "Feedback": ...,
    "Reformer": ...,
}  # fmt: skip

exercises.check("5.1", my_answers)

# %% [markdown]
# <details><summary>Hint</summary>
#
# What does layer 1 of token 10 have to wait for?
#
# </details>
#
# **5.2 What fits?** *(derive; easy; 10 minutes)* How many tokens of the past fit into `space` bytes, at four
# bytes a number? For the Compressive Transformer take `M = C`, rate 4, both lengths multiples of 4; Feedback
# keeps keys and values.

# %% tags=["exercise"]
def my_tokens(space, L, d_model):
    """{"sliding window": a number, "Transformer-XL": one, "Compressive", "Feedback"}"""
    return ...


exercises.check("5.2", my_tokens)

# %% [markdown]
# <details><summary>Hint</summary>
#
# Section 5.2 says what each holds of a token. In a Compressive Transformer half of the states stand for four
# tokens each.
#
# </details>
#
# **5.3 How deep?** *(derive; easy; 10 minutes)* A Compressive Transformer with `M = C` and rate `c`, and a
# Feedback Transformer that keeps keys and values, cover the same tokens. From how many layers on does Feedback
# hold fewer numbers?

# %% tags=["exercise"]
def my_depth(c):
    """The least number of layers."""
    return ...


exercises.check("5.3", my_depth)

# %% [markdown]
# <details><summary>Hint</summary>
#
# To cover $n$ tokens, how long must $M = C$ be? Count the numbers of both, in $n$ and $L$.
#
# </details>
#
# **5.4 Who ties?** *(read a band; middle; 15 minutes)* Which models cannot be told from the best? Take those
# whose span of seeds overlaps the span of the model with the lowest mean. Then: who ties in the race of tokens,
# who in that of minutes (`text_band.values`)?

# %% tags=["exercise"]
def my_ties(values):
    """{name: losses of some seeds} -> a set of names, the best among them."""
    return ...


exercises.check("5.4", my_ties)

# %% [markdown]
# <details><summary>Hint</summary>
#
# Two spans overlap if the lower end of the worse one is not above the upper end of the better one.
#
# </details>
#
# **5.5 How far back?** *(build; middle; 30 minutes)* `read` takes tokens `(1, N)` and gives logits after the last
# one, `(1, vocab_size)`. Find the age of the oldest token whose change changes them; the last token has age 0.
# Then try it on the models of this chapter, `reader(name, make(name, 10).eval())`, in segments of 16. Which reach
# further back than their state, and why?

# %% tags=["exercise"]
def my_reach(read, tokens):
    """An age."""
    return ...


exercises.check("5.5", my_reach)

# %% [markdown]
# <details><summary>Hint</summary>
#
# Change one token at a time, the oldest first, and stop at the first change that is felt.
#
# </details>
#
# **5.6 Where they cross** *(experiment; hard; 15 minutes)* Hashing replaces `K` scores a query by `2 * w * P`,
# but Reformer projects less, hashes, and has two streams. With `operations` of section 5.8: at which of 64, 128,
# 256, ... tokens does Reformer (`w = 32`, two rounds, two layers, `d_ff = 4 * d_model`) first take fewer
# operations than vanilla? Compare with the crossing of the *times* in section 5.7. What does counting leave out?

# %% tags=["exercise"]
def my_crossing(operations, d_model):
    """A number of tokens."""
    return ...


exercises.check("5.6", my_crossing, operations)

# %% [markdown]
# <details><summary>Hint</summary>
#
# Double the number of tokens until `operations("Reformer", n, L=2, d_model=..., d_ff=...)` is the smaller one.
#
# </details>

# %% [markdown]
# ## References
#
# - Z. Dai et al.: [Transformer-XL](https://arxiv.org/abs/1901.02860). ACL 2019.
# - J. W. Rae et al.: [Compressive Transformers for Long-Range Sequence
# Modelling](https://arxiv.org/abs/1911.05507). ICLR 2020.
# - A. Fan et al.: [Addressing Some Limitations of Transformers with Feedback
# Memory](https://arxiv.org/abs/2002.09402). 2020.
# - N. Kitaev, Ł. Kaiser, A. Levskaya: [Reformer](https://arxiv.org/abs/2001.04451). ICLR 2020.

# %%
minutes = (time.perf_counter() - started) / 60
peak = measure.process_peak_bytes() / 2**30
print(f"this run: {minutes:.1f} minutes, peak memory {peak:.2f} GiB,", end=" ")
print(f"text: {corpus.name}")
