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
# # Solutions 3. Feedback Transformer

# %% [markdown] tags=["badges"]
# No links to Colab and Kaggle here: the project has no public address yet.
# To run this notebook, type `make lab` in your copy of the project.

# %% [markdown]
# The exercises stand at the end of [chapter 3](../03_feedback_transformer.ipynb). Try them first: a solution that you have read is half as
# much worth as one that you have found. About a minute to run.

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

import torch

from memtx_minimal import exercises, tasks, training
from memtx_minimal.feedback_transformer import FeedbackTransformer, step

device, SEED = training.best_device(), 0

# %% [markdown]
# ## 3.1 The clock
#
# In a parallel model each layer is passed once, however far apart the tokens are. With feedback, all
# layers are passed again at each token: those of the first one, of the last one, and of all between.

# %% tags=["exercise"]
def my_clock(n_layers, n, kind):
    return n_layers if kind == "vanilla" else n_layers * (n + 1)


exercises.check("3.1", my_clock)

# %% [markdown]
# ## 3.2 The memory vector

# %% tags=["exercise"]
def my_vector(states, layer_weights):
    weights = layer_weights.softmax(dim=0)
    return sum(w * x for w, x in zip(weights, states))


exercises.check("3.2", my_vector)

# %% [markdown]
# ## 3.3 The wrong ages
#
# The last row of `positions` belongs to the age 1, so the newest key must get the last row: with `M` keys, the last `M` rows. The
# colleague counts from the front. While the memory is full the two are the same. While it fills, the newest key gets another row at each step, and the model
# learns two meanings of every row. The slice starts at `len(positions) - len(keys)`, not at `-len(keys)`: for an empty memory that would be all rows.

# %% tags=["exercise"]
def my_keys(keys, positions):
    return keys + positions[len(positions) - len(keys) :]


exercises.check("3.3", my_keys)

# %% [markdown]
# ## 3.4 The price of a cache
#
# A key and a value, `2 * d_model` numbers, for each token and for each set of keys and values. Vanilla has a set in each layer, Feedback with shared
# ones a single set, at any depth. The vectors alone are `d_model` numbers, and keys and values must be made again when they are read.

# %% tags=["exercise"]
def my_numbers(kind, n_layers, M, d_model):
    sets = {"vanilla": n_layers, "per layer": n_layers, "shared": 1, "vectors": 0.5}
    return int(2 * sets[kind] * M * d_model)


exercises.check("3.4", my_numbers)

# %% [markdown]
# ## 3.5 A memory of one vector

# %%
GAMES = dict(vocab_size=10, d_model=64, n_heads=4, d_ff=256)
LESSONS = [(2, 150, 1e-2), (4, 250, 1e-2), (8, 150, 1e-2)]  # swaps, steps, rate
LESSONS += [(16, 80, 5e-3), (32, 40, 1e-3)]


def learn(model, lessons):
    """Train on games: lessons is a list of (length of a game, steps, learning rate)."""
    for length, steps, lr in lessons:
        how = dict(steps=steps, lr=lr, clip=0.1, warmup=20, progress=False)
        training.train(model, tasks.cups(128, length, seed=length), **how)
    return model


# %% tags=["exercise"]
torch.manual_seed(SEED)
my_tracker = FeedbackTransformer(**GAMES, n_layers=1, mem_len=1).to(device)
start = time.perf_counter()
learn(my_tracker, LESSONS)
plain = time.perf_counter() - start

exercises.check("3.5", my_tracker)

# %% [markdown]
# The softmax over one score is 1, whatever the score. Attention hands on the one vector through two
# matrices, and the model is a recurrent network with a feed-forward inside. It follows the ball: that is all a ball asks for.

# %% [markdown]
# ## 3.6 Blocks

# %% tags=["exercise"]
def my_blocks(model, x, kv, S):
    outputs, vectors = [], []
    for part in x.split(S, dim=1):  # (B, S, d_model)
        n = part.size(1)
        together = part.flatten(0, 1), kv.repeat_interleave(n, dim=0)  # B * S rows
        output, vector = (y.unflatten(0, (-1, n)) for y in step(model, *together))
        kv = torch.cat([kv, model.memory.keys_values(vector)], dim=1)
        kv = kv[:, -model.mem_len :]
        outputs.append(output)
        vectors.append(vector)
    return torch.cat(outputs, dim=1), torch.cat(vectors, dim=1), kv


torch.manual_seed(SEED)
tiny = FeedbackTransformer(10, d_model=16, n_heads=2, n_layers=3, d_ff=32, mem_len=6)
tiny = tiny.double()

exercises.check("3.6", my_blocks, tiny)

# %%
torch.manual_seed(SEED)
model = FeedbackTransformer(**GAMES, n_layers=1, mem_len=32).to(device)
model.loop = partial(my_blocks, model, S=4)
start = time.perf_counter()
learn(model, LESSONS)
took = time.perf_counter() - start

tokens, targets, _ = next(tasks.cups(1000, 32, seed=10**6))
with torch.no_grad():
    answers = model.eval()(tokens.to(device))[0].argmax(dim=-1).cpu()
share = (answers == targets).float().mean().item()
print(f"blocks of 4: {took:.0f} s, one by one: {plain:.0f} s; {share:.2f} right")
assert share < 0.6

# %% [markdown]
# A quarter of the steps, in less time. But the ball is lost: two swaps of one block do not see
# each other, and what they do together depends on their order. Block-recurrent models therefore add
# ordinary causal attention inside the block.

# %% [markdown]
# ## Without a check
#
# **Only long games, but longer.** With 1,000 steps it gets much farther than with 160: more than half of the answers are right. Lessons save time; they are not the
# reason why the model can do it.
#
# **Reading one's own vector.** $m_t$ is made of the outputs of all layers; the first layer would read it before there are any. A
# second pass could read the $m_t$ of the first, and would make another one: twice the depth, at twice
# the cost, as in looped transformers.
