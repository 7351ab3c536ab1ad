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
# # Solutions 4. Reformer

# %% [markdown] tags=["badges"]
# No links to Colab and Kaggle here: the project has no public address yet.
# To run this notebook, type `make lab` in your copy of the project.

# %% [markdown]
# The exercises stand at the end of [chapter 4](../04_reformer.ipynb). Try them first: a solution that you have read is half as
# much worth as one that you have found. Less than a minute to run.

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

from memtx_minimal import corpora, exercises, inputs, training
from memtx_minimal.reformer import SELF, Reformer, in_set

device, SEED = training.best_device(), 0

# %% [markdown]
# ## 4.1 A hash

# %% tags=["exercise"]
def my_hash(x, D):
    xD = x @ D  # (T, b / 2)
    return torch.cat([xD, -xD], dim=-1).argmax(dim=-1)


exercises.check("4.1", my_hash)

# %% [markdown]
# ## 4.2 Is $N$ needed?
#
# With a model of 100 steps; yours has had more.

# %%
corpus, T = corpora.tiny_shakespeare(), 128
sizes = dict(vocab_size=len(corpus.vocab), d_model=64, n_heads=4, n_layers=2, d_ff=256)
torch.manual_seed(SEED)
reformer = Reformer(**sizes, chunk_len=16, n_rounds=2, axial_shape=(8, 16)).to(device)
how = dict(steps=100, batch_size=8, segment_len=T, progress=False)
training.train(reformer, corpus.train, **how)


def text_loss(model, n_rounds):
    """Validation loss with this number of rounds."""
    trained, model.settings.n_rounds = model.settings.n_rounds, n_rounds
    text = corpus.valid[: 8 * 8 * T + 1]
    loss = training.evaluate(model, text, batch_size=8, segment_len=T)
    model.settings.n_rounds = trained
    return loss


# %% tags=["exercise"]
my_losses_with_N = [text_loss(reformer, n) for n in (1, 2, 4, 8)]
reformer.settings.count_once = False
my_losses_without_N = [text_loss(reformer, n) for n in (1, 2, 4, 8)]
reformer.settings.count_once = True
for losses in (my_losses_with_N, my_losses_without_N):
    print([round(loss, 4) for loss in losses])

exercises.check("4.2", my_losses_with_N, my_losses_without_N)

# %% [markdown]
# With one round nothing can be found twice. With more, the trained model hardly minds; its keys probably do not lie in tight clusters.

# %% [markdown]
# ## 4.3 Rounds that are all the same
#
# Each round has divided by its own sum, $e^{z}$. The mean of the rounds forgets how much each had found. The weights are a softmax of the
# logsumexps, over the rounds, for each token.

# %% tags=["exercise"]
def my_join(o, z):
    weights = z.softmax(dim=0)  # (P, T)
    return (weights[..., None] * o).sum(dim=0)


exercises.check("4.3", my_join)

# %% [markdown]
# ## 4.4 Strictly causal
#
# The two comparisons are those of section 4.3; only the chunks are others.

# %% tags=["exercise"]
def my_sets(buckets, w):
    chunk = [buckets[:i].count(bucket) // w for i, bucket in enumerate(buckets)]
    near = lambda i, j: chunk[i] - chunk[j] in (0, 1) and buckets[i] == buckets[j]
    return [[j for j in range(i + 1) if near(i, j)] for i in range(len(buckets))]


exercises.check("4.4", my_sets)

# %% [markdown]
# Is it strictly causal, and what does it cost? Put it into the model of 4.2, by definition, in place of `lsh_attention`.

# %%
def causal_attend(q, k, v, h, settings):
    """As lsh_attention, with chunks counted within each bucket."""
    same = h[..., None] == h[..., None, :]  # (P, B, H, T, T)
    chunk = same.tril(-1).sum(dim=-1) // settings.chunk_len  # (P, B, H, T)
    queries = h[..., None], chunk[..., None]  # (P, B, H, T, 1)
    keys = h[..., None, :], chunk[..., None, :]  # (P, B, H, 1, T)
    found = in_set(*queries, *keys).any(dim=0).tril()  # (B, H, T, T)
    scores = q @ k.mT + SELF * torch.eye(q.size(2)).to(q)
    return scores.masked_fill(~found, -math.inf).softmax(dim=-1) @ v


@torch.no_grad()
def change(model, position=90):
    """Largest change of the logits before `position` if another token stands there."""
    tokens = corpus.valid[: 8 * T].clone().view(8, T).to(device)
    other = tokens.clone()
    other[:, position] = (other[:, position] + 1) % len(corpus.vocab)
    before, after = model(tokens)[0][:, :position], model(other)[0][:, :position]
    return (after - before).abs().max().item()


reformer.double().eval()
results = {"chunks of the sorted row": (change(reformer), text_loss(reformer, 2))}
for attention in reformer.blocks[::2]:
    attention.attend = causal_attend
results["chunks within buckets"] = change(reformer), text_loss(reformer, 2)
for attention in reformer.blocks[::2]:
    del attention.attend
for name, (moved, loss) in results.items():
    print(f"{name}: earlier logits move by up to {moved:.0e}, loss {loss:.3f}")
(leak, before), (strict, after) = results.values()
assert leak > 1e-3 > 1e-9 > strict and abs(after - before) < 0.02

# %% [markdown]
# Not one earlier logit moves, and the loss is almost the same. The price is that chunks are no longer of one length: every bucket has a last
# chunk that is not full. If each is filled up:

# %%
def places(buckets, w):
    return sum(w * math.ceil(buckets.count(b) / w) for b in set(buckets))


generator = torch.Generator().manual_seed(SEED)
buckets = torch.randint(32, (1024,), generator=generator).tolist()
print(f"{places(buckets, 64):,} places for 1,024 tokens, 32 buckets, chunks of 64")

# %% [markdown]
# Buckets of about 32 tokens each take a whole chunk of 64: twice the places.

# %% [markdown]
# ## 4.5 There and back
#
# The line that was computed last is undone first: of it everything is known but $x_2$. Then $x_2$ is there, and $F(x_2)$ can be computed again.

# %% tags=["exercise"]
def my_undo(y1, y2, F, G):
    x2 = y2 - G(y1)
    x1 = y1 - F(x2)
    return x1, x2


exercises.check("4.5", my_undo)

# %% [markdown]
# ## 4.6 Nothing put back

# %%
def all_gradients(reversible):
    torch.manual_seed(SEED)
    small = dict(vocab_size=10, d_model=16, n_heads=2, n_layers=6, d_ff=32, dropout=0.2)
    how = dict(chunk_len=4, axial_shape=(5, 8), piece_len=8, reversible=reversible)
    model = Reformer(**small, **how).double()
    one, two = torch.randint(10, (2, 3, 40))
    loss = model(one)[0].logsumexp(-1).sum() + model(two)[0].square().sum()
    loss.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters()])


# %% tags=["exercise"]
put_back = inputs.random_states
inputs.random_states = lambda device, states=None: put_back(device)
mine, right = all_gradients(True), all_gradients(False)
inputs.random_states = put_back
my_relative = ((mine - right).norm() / right.norm()).item()

exercises.check("4.6", my_relative)

# %% [markdown]
# Dropout drops other numbers the second time, so the function that is differentiated is not the one that was computed. Ignoring the buckets
# does no harm here: the random state is put back, so the same rotations are drawn, and in double precision the rebuilt vectors are so near
# to the first ones that none of them changes its bucket.
