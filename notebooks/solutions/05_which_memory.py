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
# # Solutions 5. Which memory?

# %% [markdown] tags=["badges"]
# No links to Colab and Kaggle here: the project has no public address yet.
# To run this notebook, type `make lab` in your copy of the project.

# %% [markdown]
# The exercises stand at the end of [chapter 5](../05_which_memory.ipynb). Try them first: a solution that you have read is half as
# much worth as one that you have found. A moment to run.

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
import torch

from memtx_minimal import bands, exercises

# %% [markdown]
# ## 5.1 Side by side?
#
# All but one. A Feedback step reads, in its first layer already, what the last layer of the step before has found: so it waits.
# (The Compressive Transformer cuts a segment that is longer than its memory; each piece is computed side by side.)

# %% tags=["exercise"]
my_answers = {
    "vanilla": True, "Transformer-XL": True, "Compressive": True, "Feedback": False,
    "Reformer": True,
}  # fmt: skip

exercises.check("5.1", my_answers)

# %% [markdown]
# ## 5.2 What fits?

# %% tags=["exercise"]
def my_tokens(space, L, d_model):
    numbers = space // 4
    slots = numbers // (L * d_model)  # states in each layer
    half = slots // 2 // 4 * 4  # M = C, a multiple of 4
    return {
        "sliding window": numbers // (2 * L * d_model),
        "Transformer-XL": slots,
        "Compressive": half + 4 * half,
        "Feedback": numbers // (2 * d_model),
    }


exercises.check("5.2", my_tokens)

# %% [markdown]
# ## 5.3 How deep?
#
# To cover $n$ tokens, the Compressive Transformer has $M = C = n / (1 + c)$, and holds $2\,L\,d\,n / (1 + c)$
# numbers, with $d$ for `d_model`. Feedback holds $2\,d\,n$. That is fewer if $L > 1 + c$:

# %% tags=["exercise"]
def my_depth(c):
    return c + 2


exercises.check("5.3", my_depth)

# %% [markdown]
# ## 5.4 Who ties?

# %% tags=["exercise"]
def my_ties(values):
    best = min(values, key=lambda name: sum(values[name]) / len(values[name]))
    return {name for name in values if min(values[name]) <= max(values[best])}


exercises.check("5.4", my_ties)

# %%
MODELS = (
    "vanilla", "sliding window", "Transformer-XL", "Compressive", "Feedback",
    "Reformer",
)  # fmt: skip
band = bands.load("05_text_scores", "Tiny Shakespeare").values
for race in ("", ", minutes"):
    losses = {name: band[name + race] for name in MODELS}
    print(f"race of {race[2:] or 'tokens'}:", ", ".join(sorted(my_ties(losses))))

# %% [markdown]
# Overlap is a careful rule: spans of five seeds that do not touch are a difference, those that touch may still be one.

# %% [markdown]
# ## 5.5 How far back?

# %% tags=["exercise"]
def my_reach(read, tokens):
    before, N = read(tokens), tokens.size(1)
    for place in range(N):  # the oldest first
        changed = tokens.clone()
        changed[0, place] = 1 - changed[0, place].clamp(max=1)
        if not torch.equal(read(changed), before):
            return N - 1 - place


exercises.check("5.5", my_reach)

# %% [markdown]
# Transformer-XL, the window and the Compressive Transformer reach further than their states: a layer's states
# have themselves looked back. Feedback has no end, as each vector was made with a look at older ones. Vanilla
# and Reformer end with their text.

# %% [markdown]
# ## 5.6 Where they cross

# %% tags=["exercise"]
def my_crossing(operations, d_model):
    n = 64
    sizes = dict(L=2, d_model=d_model, d_ff=4 * d_model)
    while operations("Reformer", n, **sizes) >= operations("vanilla", n, **sizes):
        n *= 2
    return n


def pretended(name, n, L, d_model, d_ff):
    """In place of the chapter's `operations`: linear against quadratic."""
    return L * n * d_model * (n if name == "vanilla" else 4 * d_model)


exercises.check("5.6", my_crossing, pretended)

# %% [markdown]
# With the chapter's `operations`, Reformer takes fewer from 128 tokens on, at width 64. Its *times* cross only between 1,000 and 10,000
# tokens: sorting, gathering and masks are no products of matrices and are not counted, and a fused kernel runs many operations for each
# number that it fetches.
