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
# # Solutions 6. Memory today

# %% [markdown] tags=["badges"]
# No links to Colab and Kaggle here: the project has no public address yet.
# To run this notebook, type `make lab` in your copy of the project.

# %% [markdown]
# The exercises stand at the end of [chapter 6](../06_memory_today.ipynb). Try them first: a solution that you have read is half as
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
import torch.nn.functional as F

from memtx_minimal import exercises, figures, measure
from memtx_minimal.memory_today import MemoryToday

# %% [markdown]
# ## 6.1 Who stays?
#
# Places 0 and 1 are sinks, 7, 8 and 9 the latest. Of the rest, 2 to 6, number 5 got most (9), then number 3 (7). So 0, 1, 3, 5,
# 7, 8 and 9 stay. Number 8 got more than number 3, but it needs no help: it is one of the latest.

# %% tags=["exercise"]
def my_slots(got):
    places = range(len(got))
    always = {n for n in places if n < 2 or n >= len(got) - 3}
    rest = sorted(set(places) - always, key=lambda n: got[n], reverse=True)
    return sorted(always | set(rest[:2]))


exercises.check("6.1", my_slots)
print(my_slots([4, 1, 2, 7, 3, 9, 5, 1, 8, 2]))

# %% [markdown]
# ## 6.2 Without a place
#
# Let the query's pair be $(q_a, q_b)$ and the key's $(k_a, k_b)$. Turned back by the angle, the key's is $(k_a \cos + k_b \sin,\; k_b \cos - k_a \sin)$. The product is
#
# $$
# (q_a k_a + q_b k_b) \cos + (q_a k_b - q_b k_a) \sin .
# $$
#
# No place stands in it, only the angle, which is `n` times the pair's speed. At `n = 0` it is the ordinary product.

# %% tags=["exercise"]
def my_product(q, k, n):
    half = len(q) // 2
    angle = n * 10_000 ** (-torch.arange(half) / half)  # (half,)
    (q_a, q_b), (k_a, k_b) = q.view(2, half), k.view(2, half)
    along, across = q_a * k_a + q_b * k_b, q_a * k_b - q_b * k_a
    return (along * angle.cos() + across * angle.sin()).sum()


exercises.check("6.2", my_product)

# %% [markdown]
# ## 6.3 One step

# %% tags=["exercise"]
def my_step(S, k, v, alpha, beta):
    k = F.normalize(k, dim=-1)
    S = alpha * S  # what is forgotten
    old = S @ k  # what it says for this key now
    return S + beta * torch.outer(v - old, k)


exercises.check("6.3", my_step)

# %% [markdown]
# Without `- old` this is linear attention with decay: a second value for a key is added to the first. With a key of length 2 and $\beta
# = 1$ it would write four times the difference, and overshoot.

# %% [markdown]
# ## 6.4 Bytes
#
# A slot of the cache is a key and a value, `d_model` numbers each over all heads, and for each head what it got. Of the pooled memory, up
# to 32 slots and, once the window is full, 32 to 35 tokens are kept, a key and a value each. A delta rule has `H` states of `d_head` times
# `d_head`: that is `d_model * d_head` numbers, from the first token on.

# %% tags=["exercise"]
def my_bytes(n, d_model, H, L):
    blocks = max(0, n - 32) // 4
    pooled = min(32, blocks) + n - 4 * blocks
    return {
        "cache": 4 * L * min(n, 64) * (2 * d_model + H),
        "pooled": 4 * L * pooled * 2 * d_model,
        "delta": 4 * L * d_model * (d_model // H),
    }


exercises.check("6.4", my_bytes)

# %%
sizes = dict(vocab_size=65, d_model=128, n_heads=4, n_layers=4, d_ff=64)
rows = []
for kind, counted in my_bytes(200, 128, 4, 4).items():
    model, memory = MemoryToday(**sizes, kind=kind).eval(), None
    with torch.inference_mode():
        for token in torch.zeros(200, 1, 1, dtype=torch.int64):
            _, memory = model(token, memory)
    assert measure.nbytes(memory) == counted
    rows.append([kind, f"{counted:,}"])
caption = "Bytes of memory after 200 tokens, counted and measured"
figures.table(caption, ["kind", "bytes"], rows)

# %% [markdown]
# Pooled and cache hold about as much, the delta rule a quarter of that: a head's state of 32 by 32 takes the place of 16 keys and 16
# values.

# %% [markdown]
# ## 6.5 Two cups
#
# A swap leaves alone $e_a + e_b$ and all other cups, and turns $e_a - e_b$ over. So does the reflection $I - 2 k k^\top$ with
# that vector, at length one, as its key. Its sign does not matter, since $k$ stands there twice.

# %% tags=["exercise"]
def my_swap(a, b, n_cups):
    k = torch.zeros(n_cups)
    k[a], k[b] = 0.5**0.5, -(0.5**0.5)
    return k, 2.0


exercises.check("6.5", my_swap)

# %%
k, beta = my_swap(0, 2, 3)
cups = torch.tensor([[1.0, 2.0, 3.0]])  # under each cup a number
for strength in (beta, beta / 2):
    found = cups @ (torch.eye(3) - strength * torch.outer(k, k))
    print(f"beta = {strength:.0f}: {', '.join(f'{x:.1f}' for x in found[0].tolist())}")

# %% [markdown]
# With half of it, both cups have the mean of the two: which was which, nobody can tell any more. Any $\beta$ below 2 mixes them, and
# many swaps mix them more and more.

# %% [markdown]
# ## 6.6 A view with a fault
#
# With 12 tokens, `left` is 8. Two blocks hold the tokens 0 to 5, the window 8 to 11, and nobody reads 6 and 7: their block is not
# full yet. They have to wait in the window, which grows by up to `c - 1` tokens.

# %% tags=["exercise"]
def my_view(n, mem_len, c):
    left = max(0, n - mem_len) // c * c  # whole blocks alone leave the window
    blocks = [[*range(i, i + c)] for i in range(0, left, c)]
    return blocks, [*range(left, n)]


exercises.check("6.6", my_view)

# %% [markdown]
# ## 6.7 Two at once
#
# The first token finds $\alpha_1 S k_1$ and writes $u_1 = \beta_1 (v_1 - \alpha_1 S k_1)$. Then the state is $\alpha_1 S + u_1
# k_1^\top$. The second finds
#
# $$
# \alpha_2\, (\alpha_1 S + u_1 k_1^\top)\, k_2 = \alpha_1 \alpha_2\, S k_2 + \alpha_2\, (k_1^\top k_2)\, u_1
# $$
#
# and writes $\beta_2$ times the difference between $v_2$ and that. If the two keys stand at right angles, it need not know of
# the first at all.

# %% tags=["exercise"]
def my_writes(S, k, v, alpha, beta):
    first = beta[0] * (v[0] - alpha[0] * S @ k[0])
    found = alpha[0] * alpha[1] * S @ k[1] + alpha[1] * (k[0] @ k[1]) * first
    return torch.stack([first, beta[1] * (v[1] - found)])


exercises.check("6.7", my_writes)

# %%
torch.manual_seed(0)
S, k, v = torch.randn(4, 3), F.normalize(torch.randn(2, 3), dim=-1), torch.randn(2, 4)
alpha, beta = torch.rand(2, 2)
u = my_writes(S, k, v, alpha, beta)
after = alpha.prod() * S + alpha[1] * torch.outer(u[0], k[0]) + torch.outer(u[1], k[1])
for t in range(2):
    S = alpha[t] * S
    S = S + beta[t] * torch.outer(v[t] - S @ k[t], k[t])
torch.testing.assert_close(after, S)
print("the state after both is that of two single steps")
