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
# # Solutions A. Feedback by hand

# %% [markdown] tags=["badges"]
# No links to Colab and Kaggle here: the project has no public address yet.
# To run this notebook, type `make lab` in your copy of the project.

# %% [markdown]
# The exercises stand at the end of [appendix A](../a_feedback_by_hand.ipynb). Try them first: a solution that you have read is half as
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
import time

import torch

from memtx_minimal import exercises, fast_feedback
from memtx_minimal.feedback_transformer import FeedbackTransformer

SEED = 0

# %% [markdown]
# ## A.1 Back through a softmax
#
# $\sum_i g_i \, y_i (\delta_{ij} - y_j) = y_j \left( g_j - \sum_i y_i g_i \right)$.

# %% tags=["exercise"]
def my_softmax_back(y, g):
    return y * (g - y @ g)


exercises.check("A.1", my_softmax_back)

# %% [markdown]
# ## A.2 Two lines are missing

# %% tags=["exercise"]
def my_backwards(g_m, x, W_q, W_k, W_v, W_1, W_2, m, q, k, v, z, h, w):
    g_m, g_h = g_m.clone(), torch.zeros_like(h)
    g_q, g_k, g_v, g_z = torch.zeros(4, *x.shape, dtype=x.dtype)
    for t in reversed(range(len(x))):
        g_m[t] += W_k.T @ g_k[t] + W_v.T @ g_v[t]
        g_h[t] = W_2.T @ g_m[t] * (h[t] > 0)
        g_z[t] = g_m[t] + W_1.T @ g_h[t]  # the first line
        g_w = v[:t] @ g_z[t]
        g_s = w[t] * (g_w - w[t] @ g_w)  # the second
        g_q[t] = k[:t].T @ g_s
        g_k[:t] += torch.outer(g_s, q[t])
        g_v[:t] += torch.outer(w[t], g_z[t])
    g_x = g_z + g_q @ W_q
    return g_x, g_q.T @ x, g_k.T @ m, g_v.T @ m, g_h.T @ z, g_m.T @ h


exercises.check("A.2", my_backwards)

# %% [markdown]
# ## A.3 How much can wait?

# %% tags=["exercise"]
def my_far(T, S):
    near = sum(n * (n - 1) // 2 for n in [S] * (T // S) + [T % S])
    return T * (T - 1) // 2 - near


exercises.check("A.3", my_far)

# %%
print(f"{my_far(64, 16) / (64 * 63 / 2):.0%} of the pairs are far")

# %% [markdown]
# ## A.4 How long should a block be?

# %%
def seconds(model, T):
    """Seconds forwards and backwards, the fastest of five."""
    tokens, times = torch.randint(65, (16, T)), []
    for _ in range(5):
        model.zero_grad()
        start = time.perf_counter()
        model(tokens)[0].logsumexp(dim=-1).sum().backward()
        times.append(time.perf_counter() - start)
    return min(times)


# %% tags=["exercise"]
torch.manual_seed(SEED)
sizes = dict(d_model=64, n_heads=4, n_layers=2, d_ff=128)
fast = fast_feedback.speed_up(FeedbackTransformer(65, **sizes, mem_len=128))
my_seconds = {}
for fast_feedback.BLOCK in (1, 4, 64, 16):
    my_seconds[fast_feedback.BLOCK] = seconds(fast, 128)
for steps, took in sorted(my_seconds.items()):
    print(f"blocks of {steps:2}: {1000 * took:.0f} ms")

exercises.check("A.4", my_seconds)

# %% [markdown]
# With small blocks there are many small products, each with its overhead. With large ones, the near part, which
# is multiplied after each step with all the block's columns, grows in proportion to the block.

# %% [markdown]
# ## A.5 With dropout
#
# One line changes in `forwards` and two in `backwards`: the error at `w` goes through the mask, and `v` was multiplied by the weights *after* dropout. The softmax line stays: it needs the weights *before* dropout.

# %% tags=["exercise"]
def my_dropout(g_m, x, keep, W_q, W_k, W_v, W_1, W_2):
    q, k, v, z, m = torch.zeros(5, *x.shape, dtype=x.dtype)
    h, w = x.new_zeros(len(x), len(W_1)), [None] * len(x)
    for t in range(len(x)):
        q[t] = W_q @ x[t]
        w[t] = (k[:t] @ q[t]).softmax(dim=0)
        z[t] = x[t] + (keep[t, :t] * w[t]) @ v[:t]  # changed
        h[t] = (W_1 @ z[t]).relu()
        m[t] = z[t] + W_2 @ h[t]
        k[t], v[t] = W_k @ m[t], W_v @ m[t]
    g_m, g_h = g_m.clone(), torch.zeros_like(h)
    g_q, g_k, g_v, g_z = torch.zeros(4, *x.shape, dtype=x.dtype)
    for t in reversed(range(len(x))):
        g_m[t] += W_k.T @ g_k[t] + W_v.T @ g_v[t]
        g_h[t] = W_2.T @ g_m[t] * (h[t] > 0)
        g_z[t] = g_m[t] + W_1.T @ g_h[t]
        g_w = keep[t, :t] * (v[:t] @ g_z[t])  # changed
        g_s = w[t] * (g_w - w[t] @ g_w)
        g_q[t] = k[:t].T @ g_s
        g_k[:t] += torch.outer(g_s, q[t])
        g_v[:t] += torch.outer(keep[t, :t] * w[t], g_z[t])  # changed
    g_x = g_z + g_q @ W_q
    return g_x, g_q.T @ x, g_k.T @ m, g_v.T @ m, g_h.T @ z, g_m.T @ h


exercises.check("A.5", my_dropout)

# %% [markdown]
# ## A.6 With ages
#
# The query has met the keys with their ages, so its error has them too. The error at the scores of step `t`, times the query, goes to the last `t` rows of `p`. In the loop that is one line. All at once: write
# the errors of step `t` into a row of length `2 T`, so that a view with a stride of `2 T + 1` shows each age in a column of its own.

# %% tags=["exercise"]
def my_ages(g_m, x, p, W_q, W_k, W_v, W_1, W_2):
    T = len(x)
    q, k, v, z, m = torch.zeros(5, *x.shape, dtype=x.dtype)
    h, w = x.new_zeros(T, len(W_1)), [None] * T
    for t in range(T):
        q[t] = W_q @ x[t]
        w[t] = ((k[:t] + p[T - t :]) @ q[t]).softmax(dim=0)  # changed
        z[t] = x[t] + w[t] @ v[:t]
        h[t] = (W_1 @ z[t]).relu()
        m[t] = z[t] + W_2 @ h[t]
        k[t], v[t] = W_k @ m[t], W_v @ m[t]
    g_m, g_h, left = g_m.clone(), torch.zeros_like(h), x.new_zeros(T, 2 * T)
    g_q, g_k, g_v, g_z, g_p = torch.zeros(5, *x.shape, dtype=x.dtype)
    for t in reversed(range(T)):
        g_m[t] += W_k.T @ g_k[t] + W_v.T @ g_v[t]
        g_h[t] = W_2.T @ g_m[t] * (h[t] > 0)
        g_z[t] = g_m[t] + W_1.T @ g_h[t]
        g_w = v[:t] @ g_z[t]
        g_s = w[t] * (g_w - w[t] @ g_w)
        g_q[t] = (k[:t] + p[T - t :]).T @ g_s  # changed
        g_k[:t] += torch.outer(g_s, q[t])
        g_v[:t] += torch.outer(w[t], g_z[t])
        g_p[T - t :] += torch.outer(g_s, q[t])  # in the loop
        left[t, T : T + t] = g_s  # for all at once
    at_once = left.as_strided((T, T), (2 * T + 1, 1)).T @ q
    assert torch.allclose(at_once, g_p)
    g_x = g_z + g_q @ W_q
    return g_x, at_once, g_q.T @ x, g_k.T @ m, g_v.T @ m, g_h.T @ z, g_m.T @ h


exercises.check("A.6", my_ages)
