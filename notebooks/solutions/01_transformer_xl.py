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
# # Solutions 1. Transformer-XL

# %% [markdown] tags=["badges"]
# No links to Colab and Kaggle here: the project has no public address yet.
# To run this notebook, type `make lab` in your copy of the project.

# %% [markdown]
# The exercises stand at the end of [chapter 1](../01_transformer_xl.ipynb). Try them first: a solution that you have read is half as
# much worth as one that you have found. A minute or two to run.

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
import inspect

import torch
import torch.nn.functional as F
from torch import nn

from memtx_minimal import corpora, exercises, tasks, training, transformer_xl
from memtx_minimal.transformer_xl import RelativeAttention, TransformerXL, distances

device, SEED = training.best_device(), 0

# %% [markdown]
# ## 1.1 Who sees what
#
# Query `i` of the segment sees the whole memory, the `i` queries before it, and itself. A limit cuts off what is farther away:
# at most `limit` keys are left.

# %% tags=["exercise"]
def my_seen(T, M, limit):
    seen = [M + i + 1 for i in range(T)]
    return seen if limit is None else [min(n, limit) for n in seen]


exercises.check("1.1", my_seen)

# %% [markdown]
# ## 1.2 The authors' shift
#
# Dropping the first of `K + 1` rows of `T` is dropping the first `T` numbers, and the extra column does what the column for
# the distance `K` does in `rel_shift`. It costs a copy: the padding.

# %% tags=["exercise"]
def my_shift(scores):
    T, K = scores.shape[-2:]
    padded = F.pad(scores, (1, 0))  # (..., T, K + 1)
    turned = padded.reshape(*scores.shape[:-2], K + 1, T)
    return turned[..., 1:, :].reshape(scores.shape)


exercises.check("1.2", my_shift)

# %% [markdown]
# ## 1.3 A memory with two faults
#
# Minus zero is zero, and a slice that starts at zero is everything: for `mem_len = 0` the memory would
# keep all it gets. And without `detach` each state keeps the graph that made it, which holds the states before: `backward` after the
# second segment leads into the first, whose graph is gone, and fails.

# %% tags=["exercise"]
def my_memory(past, x, mem_len):
    context = torch.cat([past, x], dim=1)  # (B, M + T, d_model)
    first = max(0, context.size(1) - mem_len)
    return context[:, first:].detach()


exercises.check("1.3", my_memory)

# %% [markdown]
# ## 1.4 Cleared every four segments
#
# One segment in four has no memory; what of the three others? The memory of training is one segment long, so one
# segment fills it: the second segment after a clearing is already as good as any other. The prediction is
# `(none + 3 * own) / 4`. Here it is, measured with a model that has had 300 steps of training instead of 1,200.

# %%
corpus, T = corpora.tiny_shakespeare(), 32
some = corpus.valid[:20_001]  # a part is enough here, and quicker
SIZES = dict(vocab_size=len(corpus.vocab), d_model=96, n_heads=4, n_layers=3, d_ff=384)


def fit(make, steps=300, **options):
    """A new model, trained on segments of T characters."""
    torch.manual_seed(SEED)
    model = make(**SIZES, **options).to(device)
    how = dict(steps=steps, batch_size=32, segment_len=T, progress=False)
    training.train(model, corpus.train, **how)
    return model


@torch.inference_mode()
def loss_with(model, change):
    """Validation loss when change(memory) is read in place of the memory."""
    memory, losses = None, []
    for tokens, targets in corpora.lanes(some.to(device), 32, T):
        logits, memory = model(tokens, change(memory))
        losses.append(F.cross_entropy(logits.mT, targets, reduction="none"))
    return torch.cat(losses, dim=1).mean().item()  # of (B, characters of a lane)


# %% tags=["exercise"]
xl = fit(TransformerXL, mem_len=T)
own = loss_with(xl, lambda memory: memory)
none = loss_with(xl, lambda memory: None)
segment = iter(range(10**6))
my_loss = loss_with(xl, lambda memory: memory if next(segment) % 4 else None)
print(f"own {own:.3f}, none {none:.3f}, cleared {my_loss:.3f}")

exercises.check("1.4", my_loss, none, own)

# %% [markdown]
# ## 1.5 The reach of `same_length`
#
# From a state, the oldest key lies `M - 1` places back, wherever the segments begin. There are `L` such steps, and the last token itself counts.

# %% tags=["exercise"]
def my_reach(M, L):
    return 1 + L * (M - 1)


exercises.check("1.5", my_reach)

# %% [markdown]
# ## 1.6 One number for a distance

# %% tags=["exercise"]
class BiasAttention(RelativeAttention):
    def __init__(self, d_model, n_heads, dropout):
        super().__init__(d_model, n_heads, dropout)
        self.bias = nn.Parameter(torch.zeros(n_heads, 2 * T))

    def forward(self, context, R, mask):
        n_queries, K = mask.shape
        far = distances(n_queries, K - n_queries, context.device)
        far = far.clamp(0, self.bias.size(1) - 1)  # (T, K)
        q = self.heads(self.query(context[:, -n_queries:]))  # (B, H, T, d_head)
        k, values = (self.heads(x) for x in self.key_value(context).chunk(2, dim=-1))
        scores = q.size(-1) ** -0.5 * (q + self.u) @ k.mT + self.bias[:, far] + mask
        heads = scores.softmax(dim=-1) @ values  # (B, H, T, d_head)
        return self.out(heads.transpose(1, 2).flatten(2))


exercises.check("1.6", BiasAttention)

# %%
def with_bias(**sizes):
    model = TransformerXL(**sizes)
    for layer in model.layers:
        layer.attention = BiasAttention(sizes["d_model"], sizes["n_heads"], 0.0)
    return model


biased = fit(with_bias, mem_len=T)
for name, model in {"R, u and v": xl, "one number": biased}.items():
    for model.mem_len in (32, 64, 256):
        loss = training.evaluate(model, some, segment_len=T)
        print(f"{name:12} memory of {model.mem_len:3}: {loss:.3f}")

# %% [markdown]
# What you gain is simplicity: no second product, no $R$, no shift. What you lose shows at a memory of 32 already: the loss is
# higher. It shows most beyond the memory of training. The last
# number of the table is shared by all distances from 63 on, and training has seen just one of them, in one query of each segment:
# a long memory is weighed by a number that nobody has learned. (Train for 1,200 steps, as in the chapter, to see it become worse than no memory at all.)

# %% [markdown]
# ## 1.7 Let the gradient through
#
# The copy of the class, without `detach`. We let Python make it; you will have copied the cell.

# %% tags=["exercise"]
source = inspect.getsource(TransformerXL).replace(".detach()", "")
names = vars(transformer_xl) | {}
exec(source.replace("TransformerXL", "Through", 1), names)
Through = names["Through"]

ECHO = dict(vocab_size=8, d_model=64, n_heads=4, d_ff=128)
my_model = Through(**ECHO, n_layers=2, mem_len=16)

exercises.check("1.7", my_model)

# %%
def train_in_pairs(model, seed=SEED, updates=1000):
    """One update for every two segments, on the mean of their losses."""
    optimizer = training.adamw(model, lr=3e-3, weight_decay=0.01)
    stream, memory = tasks.echo(32, segment_len=T, lag=T, seed=seed), None
    for update in range(updates):
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * training.warmup_cosine(update, updates, 50)
        loss = 0
        for _ in range(2):
            tokens, targets, _ = next(stream)
            logits, memory = model(tokens.to(device), memory)
            loss = loss + training.cross_entropy(logits, targets.to(device)) / 2
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        memory = [states.detach() for states in memory]
    return model


@torch.no_grad()
def first_half(model):
    """The share of right answers in the first half of a segment."""
    memory, right = None, []
    for n, batch in zip(range(22), tasks.echo(64, segment_len=T, lag=T, seed=10**6)):
        tokens, targets = batch[0].to(device), batch[1].to(device)
        logits, memory = model(tokens, memory)
        right.append((logits.argmax(dim=-1) == targets)[:, : T // 2].float().mean())
    return torch.stack(right[2:]).mean().item()


# %%
answered = {}
for make in (Through, TransformerXL):
    torch.manual_seed(SEED)
    model = make(**ECHO, n_layers=2, mem_len=T // 2).to(device)
    answered[make.__name__] = first_half(train_in_pairs(model))
    print(f"{make.__name__:15}{answered[make.__name__]:.2f} right in the first half")
assert answered["Through"] > answered["TransformerXL"] + 0.1

# %% [markdown]
# It does answer, while `TransformerXL`, trained by the same loop, goes on guessing (1 in 8). So it was the stopped gradient. It takes its time: a state has to carry what nobody asks
# for yet, before anybody can learn to ask for it.
#
# Bytes do not tell the two apart: both keep two segments until the update, nearly twice as much as one segment. That is the price
# of training in pairs, not of the gradient.
