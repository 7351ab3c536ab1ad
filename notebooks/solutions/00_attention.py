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
# # Solutions 0. Attention

# %% [markdown] tags=["badges"]
# No links to Colab and Kaggle here: the project has no public address yet.
# To run this notebook, type `make lab` in your copy of the project.

# %% [markdown]
# The exercises stand at the end of [chapter 0](../00_attention.ipynb). Try them first: a solution that you
# find is worth two that you read. Less than a minute to run.

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

from memtx_minimal import corpora, exercises, training
from memtx_minimal.vanilla_transformer import VanillaTransformer, sinusoid

device, SEED = training.best_device(), 0

# %% [markdown]
# ## 0.1 Attention, one query at a time

# %% tags=["exercise"]
def my_attention(q, k, v):
    rows = []
    for t in range(len(q)):
        scores = k[: t + 1] @ q[t] / q.size(1) ** 0.5  # (t + 1,)
        rows.append(scores.softmax(dim=0) @ v[: t + 1])
    return torch.stack(rows)


exercises.check("0.1", my_attention)

# %% [markdown]
# ## 0.2 The size of a cache

# %% tags=["exercise"]
def my_cache(T, B, n_kv_heads):
    return 2 * 32 * B * T * n_kv_heads * (4096 // 32) * 2


exercises.check("0.2", my_cache)

# %%
for n_kv_heads in (32, 8):
    one = my_cache(100_000, 1, n_kv_heads)
    print(f"{n_kv_heads:2} heads: {one / 1e9:.1f} GB a text, {80e9 // one:.0f} fit")

# %% [markdown]
# One text or six. (The weights are about $12 \cdot 32 \cdot 4096^2$ numbers: 13 GB. With 32 heads, a single text takes four
# times as much.)

# %% [markdown]
# ## 0.3 A mask in the wrong place
#
# The softmax divides by the sum over *all* keys, the future ones among them. Cutting their weights off afterwards leaves rows that
# do not sum to one: the larger a future score, the smaller the weights of the past. The mask must come before, as minus infinity.

# %% tags=["exercise"]
def my_weights(scores):
    future = torch.ones_like(scores, dtype=torch.bool).triu(1)
    return scores.masked_fill(future, float("-inf")).softmax(dim=-1)


exercises.check("0.3", my_weights)

# %% [markdown]
# ## 0.4 The cache cannot slide
#
# A small model to try it on, and the two functions of section 0.7.

# %%
corpus = corpora.tiny_shakespeare()
torch.manual_seed(SEED)
sizes = dict(vocab_size=len(corpus.vocab), d_model=64, n_heads=4, n_layers=2, d_ff=256)
model = VanillaTransformer(**sizes, max_len=64).to(device)
training.train(model, corpus.train, steps=300, segment_len=64, progress=False)
model = model.eval()


@torch.inference_mode()
def one_more(model, token, cache):
    """Logits (B, vocab_size) after one more token (B, 1); the cache grows by it."""
    n = cache[0][0].size(2)  # tokens read so far
    x = model.embedding(token)  # (B, 1, d_model)
    x = x + sinusoid(torch.tensor([n], device=x.device), x.size(-1))
    for i, layer in enumerate(model.layers):
        attention, y = layer.attention, layer.norm_attention(x)
        qkv = attention.query_key_value(y).unflatten(-1, (3, attention.n_heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, H, 1, d_head) each
        k, v = (torch.cat(pair, dim=2) for pair in zip(cache[i], (k, v)))
        cache[i] = k, v  # (B, H, n + 1, d_head)
        heads = F.scaled_dot_product_attention(q, k, v)  # (B, H, 1, d_head)
        x = x + attention.out(heads.transpose(1, 2).flatten(2))
        x = x + layer.feed_forward(layer.norm_feed_forward(x))
    return model.head(model.norm(x))[:, -1]


def empty_cache(model):
    nothing = torch.zeros(1, 4, 0, 16, device=device)
    return [(nothing, nothing) for _ in model.layers]


# %% tags=["exercise"]
def my_slide(tokens):
    cache = empty_cache(model)
    for token in tokens[:, :64].split(1, dim=1):
        one_more(model, token, cache)
    cache[:] = [(k[:, :, 1:], v[:, :, 1:]) for k, v in cache]
    return one_more(model, tokens[:, 64:], cache)


exercises.check("0.4", my_slide, model)

# %% [markdown]
# `one_more` takes the number of cached tokens, 63, for the new position, but the last cached key stands
# at 63 already: two tokens claim one place. And from the second layer on, the kept keys were computed
# from states that had *seen* the character that was dropped. The first fault needs other positions (chapter
# 1). The second is no fault: it is how a memory of states reaches further than its length.

# %% [markdown]
# ## 0.5 What causes the blind start?

# %% tags=["exercise"]
@torch.inference_mode()
def my_sliding(model, stream, n):
    windows = stream[: n + 63].unfold(0, 64, 1).to(device)  # (n, 64), one step apart
    last = [model(some)[0][:, -1] for some in windows.split(256)]  # (256, vocab_size)
    return F.cross_entropy(torch.cat(last), stream[64 : n + 64].to(device)).item()


exercises.check("0.5", my_sliding, model, corpus.valid)

# %%
n = 6400
how = dict(batch_size=1, segment_len=64)
side_by_side = training.token_losses(model, corpus.valid[: n + 65], **how)
side_by_side = side_by_side[0, 63 : n + 63].mean().item()
slid = my_sliding(model, corpus.valid, n)
print(f"side by side {side_by_side:.3f}, sliding {slid:.3f}")

# %% [markdown]
# With sliding windows every character has a full past, and it takes 64 times the work: 64 characters are read to predict one.
# Why is the mean not lower? Put the same thousand characters at three places of a window:

# %%
targets = corpus.valid[64:1064].to(device)
losses = {}
with torch.inference_mode():
    for place in (0, 31, 63):
        windows = corpus.valid[63 - place :].unfold(0, 64, 1)[:1000]  # (1000, 64)
        logits = model(windows.to(device))[0][:, place]  # (1000, vocab_size)
        losses[place] = F.cross_entropy(logits, targets).item()
        print(f"position {place:2}: {losses[place]:.3f}")
assert losses[0] > losses[63] > losses[31]

# %% [markdown]
# So the missing past causes the blind start: the characters are the same. But at the last position the model
# is worse than in the middle, and sliding windows predict nowhere else. That outweighs what they gain, since the blind
# start is a few positions of 64.

# %% [markdown]
# ## 0.6 Does it notice?
#
# With one layer and no positions the last token sees the same five keys and values, and a sum has no order. With two layers it notices: under
# the mask the first token saw itself alone and the second saw both, so their states after the first layer are not merely exchanged. A causal mask alone tells something
# about places. With positions, each key says where it stands.

# %% tags=["exercise"]
my_same = {"one layer": True, "two layers": False, "with positions": False}

exercises.check("0.6", my_same)

# %%
class WithoutPositions(VanillaTransformer):
    """The same model; x + U becomes x."""

    def forward(self, tokens):
        x = self.embedding(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x)), None


text, exchanged = torch.tensor([[0, 1, 2, 3, 4]]), torch.tensor([[1, 0, 2, 3, 4]])
for name, make, n_layers in [
    ("one layer", WithoutPositions, 1), ("two layers", WithoutPositions, 2),
    ("with positions", VanillaTransformer, 1),
]:  # fmt: skip
    torch.manual_seed(SEED)
    random = make(10, d_model=16, n_heads=2, n_layers=n_layers, d_ff=32).double()
    difference = random(text)[0][:, -1] - random(exchanged)[0][:, -1]
    print(f"{name:15} largest difference {difference.abs().max():.0e}")
    assert (difference.abs().max() < 1e-5) == my_same[name]

# %% [markdown]
# ## 0.7 Positions turn
#
# With $\sin(a + b) = \sin a \cos b + \cos a \sin b$ and $\cos(a + b) = \cos a \cos b - \sin a \sin b$:

# %% tags=["exercise"]
def my_turn(n, d_model):
    half = d_model // 2
    angle = n / 10_000 ** (torch.arange(half) / half)
    sin, cos = angle.sin().diag(), angle.cos().diag()
    return torch.cat([torch.cat([cos, -sin], dim=1), torch.cat([sin, cos], dim=1)])


exercises.check("0.7", my_turn)

# %% [markdown]
# Rotary embeddings turn queries and keys by just such matrices.
