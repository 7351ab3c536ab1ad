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
# # Solutions 2. Compressive Transformer

# %% [markdown] tags=["badges"]
# No links to Colab and Kaggle here: the project has no public address yet.
# To run this notebook, type `make lab` in your copy of the project.

# %% [markdown]
# The exercises stand at the end of [chapter 2](../02_compressive_transformer.ipynb). Try them first: a solution that you have read is worth
# half as much as one that you have found. A few seconds to run.

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

from memtx_minimal import exercises
from memtx_minimal.compressive_transformer import (
    CompressiveTransformer, MaxPooling, Memory,
)  # fmt: skip
from memtx_minimal.transformer_xl import distances, sinusoid

SEED = 0

# %% [markdown]
# ## 2.1 Which tokens stand in a slot?
#
# The last slot holds token `n - 1`, and slot `C` token `n - M`. Before it lie the compressed ones, with `c` tokens each.

# %% tags=["exercise"]
def my_slot(slot, n, M, C, c):
    if slot >= C:
        return [n - M + slot - C]
    first = n - M - c * (C - slot)
    return list(range(first, first + c))


exercises.check("2.1", my_slot)

# %% [markdown]
# ## 2.2 What does training move?

# %% tags=["exercise"]
def my_moved(compression, loss, n_pieces):
    moved = {"embedding, head", "layers"}
    if compression in ("conv", "dilated") and loss is not None:
        if loss != "bptt" or n_pieces > 1:
            moved.add("f_c")
    if loss == "auto-encoding":
        moved.add("g")
    return moved


exercises.check("2.2", my_moved)

# %% [markdown]
# With one piece a call, `"bptt"` moves nothing of $f_c$: its compressed states are first read in the next call, and
# are detached by then. The mean has nothing to move; with `loss="attention"` the model still computes and
# returns a loss, which you may watch, and which trains nothing. Under auto-encoding $g$ learns even then.

# %% [markdown]
# ## 2.3 How to read a bucket figure

# %% tags=["exercise"]
def my_even(T, n_remembered):
    seen = torch.ones(T, n_remembered + T).tril(n_remembered)  # (T, K)
    return (seen / seen.sum(dim=1, keepdim=True)).mean(dim=0)


exercises.check("2.3", my_even)

# %% [markdown]
# The mask does it: a late key is hidden from all queries before it, and the newest is seen by one
# query alone. A bucket of the segment says something only beside this line.

# %% [markdown]
# ## 2.4 Keep the newest

# %% tags=["exercise"]
class Newest(MaxPooling):
    def forward(self, old, used=None):
        return old[:, self.rate - 1 :: self.rate]


exercises.check("2.4", Newest)

# %% [markdown]
# One in `c` values survives the compression, whole. So one might expect one in `c` of the answers right beyond
# the memory, and a guess for the rest. In two seeds, at rate 4, it was more than half up to an age of 96, and
# hardly more than guesses beyond 112. (The states of the second layer have read others before they are
# compressed.)

# %% [markdown]
# ## 2.5 A pipeline with a fault
#
# The newest of the compressed states must stand next to the memory, at the end: keys stand in the order of the text, or their places mean nothing. The colleague puts them in front. And
# when there are more than `C`, the oldest must go. With the order put right, `[:, :C]` would keep the oldest for ever, and `[:, -C:]` would keep all
# of them if `C` is 0.

# %% tags=["exercise"]
def my_push(compressed, memory, x, M, C):
    memory = torch.cat([memory, x], dim=1)  # (B, M + T, d)
    n_old = max(0, memory.size(1) - M)
    old, memory = memory[:, :n_old], memory[:, n_old:]
    new = old.unflatten(1, (-1, 2)).mean(dim=2)  # (B, n_old / 2, d)
    compressed = torch.cat([compressed, new], dim=1)
    return compressed[:, max(0, compressed.size(1) - C) :], memory


exercises.check("2.5", my_push)

# %% [markdown]
# ## 2.6 The age of a slot

# %% tags=["exercise"]
def my_ages(T, M, C, c):
    newest = M + 1 + torch.arange(T)[:, None]  # (T, 1): the token before the memory
    groups = c * torch.arange(C - 1, -1, -1) + (c - 1) / 2  # (C,)
    return torch.cat([newest + groups, distances(T, M)], dim=1)


exercises.check("2.6", my_ages)

# %% [markdown]
# ## 2.7 Scores for ages

# %% tags=["exercise"]
def my_scores(attention, q, ages):
    R = sinusoid(ages.flatten(), q.size(1) * q.size(3))  # (T * K, d_model)
    r = attention.heads(attention.position(R))  # (H, T * K, d_head)
    r = r.unflatten(1, ages.shape)  # (H, T, K, d_head)
    scale = q.size(-1) ** -0.5
    return scale * torch.einsum("bhtd,htkd->bhtk", q + attention.v, r)


exercises.check("2.7", my_scores)

# %% [markdown]
# It costs `T` times as many encodings: the price of leaving the steps of one.

# %% [markdown]
# ## 2.8 Compress twice
#
# The range is $T + L\,(M + cC + c^2C_2)$. One way keeps the twice compressed states in front of the compressed
# ones, in one tensor of `C2 + C` slots. Here `C2 = C`, and segments are a multiple of `c * c`.

# %%
class TwiceMemory(Memory):
    def forward(self, layer, h, compressed, recent, mem_len, compressed_len):
        C = compressed_len // 2
        twice = compressed[:, : max(0, compressed.size(1) - C)]
        grown, recent, loss = super().forward(
            layer, h, compressed, recent, mem_len, 10**9
        )
        once = grown[:, twice.size(1) :]
        n_old = max(0, once.size(1) - C)
        new = self.compress(once[:, :n_old])
        twice = torch.cat([twice, new], dim=1)[:, -C:]
        return torch.cat([twice, once[:, n_old:]], dim=1), recent, loss


@torch.no_grad()
def read(model, tokens, segment_len):
    """Logits of a text (B, N), read in segments, with memory from one to the next."""
    memory, logits = None, []
    for segment in tokens.split(segment_len, dim=1):
        out, memory, *_ = model(segment, memory)
        logits.append(out)
    return torch.cat(logits, dim=1)  # (B, N, vocab_size)


def felt(model, segment_len=4, n=72):
    """For each position of a text of n tokens: does the last prediction feel it?"""
    model, tokens = model.double().eval(), torch.randint(10, (1, n))
    before = read(model, tokens, segment_len)[:, -1]  # (1, vocab_size)
    changed = (tokens + torch.eye(n, dtype=torch.int64)) % 10  # (n, n): row p at p
    difference = read(model, changed, segment_len)[:, -1] - before  # (n, vocab_size)
    return difference.abs().amax(dim=1) > 1e-12  # (n,): more than rounding


# %% tags=["exercise"]
torch.manual_seed(SEED)
sizes = dict(vocab_size=10, d_model=16, n_heads=2, n_layers=2, d_ff=32)
slots = dict(mem_len=4, compressed_len=4, compression_rate=2)  # C = C2 = 2
my_model = CompressiveTransformer(**sizes, **slots, compression="mean", loss=None)
for memory in my_model.memories:
    memory.__class__ = TwiceMemory
my_felt = felt(my_model).sum()
print(my_felt.item())

exercises.check("2.8", my_felt)

# %% [markdown]
# ## Without a check
#
# **Let the loss through.** The error falls, by about half in each of three seeds, and it looks like success.
# But both sides of the comparison can now be moved. Keys and values learn to give attention less to read, and what there is less of is easily
# reconstructed: the denominator fell to a fifth or less. And the validation loss suffered in each seed, by some
# hundredths of a nat. The loss was to fit $f_c$ to the model, and now the model is bent to fit $f_c$.
