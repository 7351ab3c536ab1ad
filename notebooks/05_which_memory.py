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
# INTRO

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

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from torch import nn

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


# %% tags=["band"]
SIZES = dict(d_model=64, n_heads=4, n_layers=2)
POOLED = dict(compression_rate=4, compression="mean", loss=None)
MODELS = {  # each with at most 16 KiB of state a text
    "vanilla": (VanillaTransformer, dict(max_len=256)),
    "sliding window": (TransformerXL, dict(mem_len=16, same_length=True)),
    "Transformer-XL": (TransformerXL, dict(mem_len=32)),
    "Compressive": (CompressiveTransformer, dict(mem_len=16, compressed_len=16) | POOLED),
    "Feedback": (FeedbackTransformer, dict(mem_len=64)),
    "Reformer": (Reformer, dict(axial_shape=(16, 16), chunk_len=16)),
}
REREAD = "vanilla", "Reformer"


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
T, STEPS, LANES = 32, 400, 16
MINUTES = {  # steps that take as long as 400 of vanilla
    "vanilla": 400, "sliding window": 300, "Transformer-XL": 280, "Compressive": 210,
    "Feedback": 120, "Reformer": 130,
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
    return training.evaluate(model, text, batch_size=16, segment_len=T * LONG.get(name, 1))


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


# %% tags=["band"]
def reader(name, model):
    """The model as it reads a stream in segments."""
    return Reread(model) if name in REREAD else model


RECALLERS = "sliding window", "Feedback"


def learn_recall(name, seed):
    """A model trained on the recall task as those of chapter 2, and as large."""
    model = make(name, tasks.RECALL_VOCAB, seed, like="Transformer-XL")
    stream = tasks.recall(32, 16, seed=1000 + seed)
    training.train(model, stream, steps=4000, lr=2e-3, progress=False)
    return model


@torch.no_grad()
def recall_by_age(model):
    """Shares of right answers of ages 1 to 16, 17 to 32 ... 177 to 192, (12,)."""
    memory, right, ages = None, [], []
    stream = tasks.recall(64, 16, seed=10**6)
    for n, (tokens, targets, _, age) in zip(range(80), stream):
        logits, memory, *_ = model(tokens.to(device), memory)
        if n >= 20:  # the memory is full
            asked = targets >= 0
            right.append((logits.argmax(dim=-1).cpu() == targets)[asked])
            ages.append((age[asked] - 1) // 16)
    right, ages = torch.cat(right), torch.cat(ages)
    asked, known = ages.bincount(minlength=12), ages[right].bincount(minlength=12)
    return (known[:12] / asked[:12]).tolist()


def recall_scores(seed):
    """Right answers by age, for the models that chapter 2 does not try."""
    return {n: recall_by_age(learn_recall(n, seed)) for n in RECALLERS}


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
    training.train(model, stream, steps=500, progress=False)
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
