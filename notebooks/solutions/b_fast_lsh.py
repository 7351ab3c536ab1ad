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
# # Solutions B. Fast hashed attention

# %% [markdown] tags=["badges"]
# No links to Colab and Kaggle here: the project has no public address yet.
# To run this notebook, type `make lab` in your copy of the project.

# %% [markdown]
# The exercises stand at the end of [appendix B](../b_fast_lsh.ipynb). Try them first: a solution that you have read is half as
# much worth as one that you have found. A few seconds to run.

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

import torch

from memtx_minimal import exercises

# %% [markdown]
# ## B.1 A softmax in base 2

# %% tags=["exercise"]
def my_softmax(scores):
    weights = (math.log2(math.e) * (scores - scores.max())).exp2()
    return weights / weights.sum()


exercises.check("B.1", my_softmax)

# %% [markdown]
# ## B.2 Why twice?
#
# The query's bucket is one larger, its chunk the same, so `bucket + chunk` differs by 1, as for a key one chunk earlier. Twice the bucket
# leaves room for the chunk: another bucket is at least 2 away.

# %% tags=["exercise"]
my_pairs = (1, 0), (0, 0)

exercises.check("B.2", my_pairs)

# %% [markdown]
# ## B.3 Back to the text
#
# `rows[order]` sorts a second time. What is needed is the inverse: the row in place `n` goes to `order[n]`. For an exchange the two are the same.

# %% tags=["exercise"]
def my_unsort(rows, order):
    text = torch.empty_like(rows)
    text[order] = rows
    return text


exercises.check("B.3", my_unsort)

# %% [markdown]
# ## B.4 The codes

# %% tags=["exercise"]
def my_codes(buckets, w):
    order = sorted(range(len(buckets)), key=lambda i: (buckets[i], i))
    codes = [None] * len(buckets)
    for place, i in enumerate(order):
        codes[i] = 2 * buckets[i] + place // w
    return codes


exercises.check("B.4", my_codes)

# %% [markdown]
# ## B.5 Add the rounds up

# %% tags=["exercise"]
def my_rounds(tops, totals, outs):
    tops, totals, outs = (torch.stack(x) for x in (tops, totals, outs))
    share = (tops - tops.amax(dim=0)).exp2()
    return (share * outs).sum(dim=0) / (share * totals).sum(dim=0)


exercises.check("B.5", my_rounds)

# %% [markdown]
# ## B.6 How many scores?
#
# Each query gets a score with the `2 w` keys of two chunks, in each round. That is less than $T^2$ if $T > 2 P w$: beyond 1,024 tokens for 8 rounds of
# chunks of 64.

# %% tags=["exercise"]
def my_count(T, w, P):
    return P * T * 2 * w


exercises.check("B.6", my_count)

# %%
assert my_count(1024, 64, 8) == 1024**2

# %% [markdown]
# ## Without a check
#
# `masked_scores` looks `PAIRS` up each time, so assigning another number in a cell is enough. Small numbers mean many short operations; large
# ones, more scores that are held at a time.
