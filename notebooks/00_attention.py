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
# # 0. Attention from nothing

# %% [markdown] tags=["badges"]
# No links to Colab and Kaggle here: the project has no public address yet.
# To run this notebook, type `make lab` in your copy of the project.

# %% [markdown]
# The four papers of this book change one thing about the transformer: what it remembers. To see what
# they change, you need the transformer itself. This chapter builds it, from a line of text to a model
# that writes Shakespeare-like lines, and ends with the question that the rest of the book begins with:
# **what does it not remember?**
#
# **When you have read it, you can**
# - compute attention by hand, with numbers, and say what the scale, the mask and the heads are for;
# - write a transformer language model in a hundred lines, and say what each part does;
# - turn a text into batches, train on it, and read a loss in nats and in bits per character;
# - speed up generation with a key-value cache, and say what the cache costs.
#
# **You need** PyTorch: tensors, `nn.Module`, `backward`. You need not know transformers.
#
# **Time and memory.** 75 minutes to read and 90 for the exercises; to run on two CPU cores: about
# a minute, half a GiB.

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
import time

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from memtx_minimal import (
    bands, corpora, exercises, figures, inputs, measure, training,
)  # fmt: skip
from memtx_minimal.training import (
    adamw, autocast, batches, check_finite, clip_groups, cross_entropy, device_of,
    read, validate, warmup_cosine,
)  # fmt: skip

started = time.perf_counter()
figures.use_style()
device = training.best_device()
SEED = 0
print(f"PyTorch {torch.__version__} on {device}")

# %% [markdown]
# Code in this book says the shape of a tensor at the end of the line, as in `# (B, T, d_model)`. Each
# letter has one meaning, the same in all chapters; section 0.8 has the whole table. In this chapter:
#
# | letter | meaning | letter | meaning |
# | --- | --- | --- | --- |
# | `B` | batch: texts side by side | `H` | attention heads |
# | `T` | tokens in the segment | `d_model` | width of a hidden state |
# | `L` | layers | `d_head` | width of a head, `d_model / H` |
# | `d_ff` | width inside the feed-forward | | |
#
# (A *segment* is the piece of text that is read at once. In this chapter it is all that the model sees, and
# is also called the *window*. A *hidden state*, or state for short, is the vector of a token somewhere in the
# model.)
#
# ## 0.1 Text becomes numbers
#
# A model computes with numbers, so the text is cut into **tokens**, and each kind of token gets a
# number. Ours are single characters.

# %% tags=["setup"]
corpus = corpora.tiny_shakespeare()

# %%
print(f"{corpus.name}: {len(corpus.text):,} characters, {len(corpus.vocab)} different")
print(corpus.text[:75])
print("To be ->", corpus.vocab.encode("To be").tolist())

# %% [markdown]
# Large models use pieces of words instead, some 50,000 to 250,000 kinds. With characters the table of tokens is
# tiny, and the model fits two CPU cores. The price: a sentence is four or five times as many tokens long. For a book
# about memory that is no drawback: the end of the window is reached that much sooner.
#
# A **language model** reads tokens and predicts the next one. It does so at every position at once:
# after the first token it predicts the second, after the first two the third, and so on. The
# **targets** are thus the tokens themselves, one step later.

# %%
tokens, targets = corpus.train[:8], corpus.train[1:9]  # (T,) each
for n in range(4):
    seen = corpus.vocab.decode(tokens[: n + 1])
    print(f"has read {seen!r:8} should say {corpus.vocab.decode(targets[n : n + 1])!r}")

# %% [markdown]
# A prediction is a probability for each character of the vocabulary. How good is it? If the model
# gave probability $p$ to the character that really came, its **loss** there is $-\ln p$: zero if it
# was certain and right, large if it was surprised. The average over a text is the **cross-entropy**, in
# *nats* per character. Papers on characters use the logarithm to base 2 instead and speak of *bits*;
# a nat is $1 / \ln 2$, about 1.44 bits.
#
# Three simple models set the scale. They count in the training text, the first nine tenths of the file, and are
# measured on the rest, the validation text. The first gives all characters the same
# probability. The second knows how often each occurs. The third knows, for each character, how often
# each other one follows it.

# %%
size = len(corpus.vocab)
pairs = torch.zeros(size, size, dtype=torch.float64)
pairs.index_put_(
    (corpus.train[:-1], corpus.train[1:]), torch.tensor(1.0).double(), accumulate=True
)
followers = (pairs + 0.01) / (pairs + 0.01).sum(dim=1, keepdim=True)  # rows sum to 1
often = pairs.sum(dim=0) / pairs.sum()

now, later = corpus.valid[:-1], corpus.valid[1:]
simple = {
    "all alike": math.log(size),
    "how often each occurs": -often[later].log().mean().item(),
    "what follows what": -followers[now, later].log().mean().item(),
}
assert list(simple.values()) == sorted(simple.values(), reverse=True)
figures.table(
    f"Loss on validation text ({corpus.name})",
    ["the model knows", "nats", "bits"],
    [
        [name, f"{loss:.2f}", f"{training.bits_per_character(loss):.2f}"]
        for name, loss in simple.items()
    ],
)

# %% [markdown]
# (`index_put_` with `accumulate` counts the pairs. The 0.01 gives those that never occur in training a small
# probability, so that the loss stays finite.) Knowing the last character is worth a lot. To know more, a table would
# have to grow 65 times with each further character of context, and one for contexts of ten
# characters could never be filled. A model has to *choose* what it looks at.
#
# ## 0.2 One query, by hand
#
# **Attention** is the choosing. Take the word `hello`. Suppose the model stands at the `o` and wants
# to know where in the alphabet the vowels so far stand, on average. The `o` states what it looks for, in a vector called
# the **query**. Each letter offers a vector that says what it is, its **key**, and one that says
# what it has to tell, its **value**. We choose them by hand: a key is (vowel?, consonant?), and a
# value is simply the letter's place in the alphabet.

# %%
keys = torch.tensor([[0.0, 1], [1, 0], [0, 1], [0, 1], [1, 0]])  # h e l l o
values = torch.tensor([[8.0], [5], [12], [12], [15]])
query = torch.tensor([3.0, 0])  # "vowels, please", with emphasis 3

scores = keys @ query  # (5,)
print("scores ", scores.tolist())

# %% [markdown]
# A **score** is the dot product of the query with a key: large where the two point the same way. The
# **softmax** turns scores into weights, which are positive and sum to 1:
#
# $$
# \text{weight}_j = \frac{\exp(\text{score}_j)}{\sum_{j'} \exp(\text{score}_{j'})} .
# $$

# %%
weights = scores.exp() / scores.exp().sum()  # (5,)
for letter, weight in zip("hello", weights):
    print(f"{letter}  {weight:.3f}")
assert torch.allclose(weights, scores.softmax(dim=0))

# %% [markdown]
# The result is the mean of the values, each with its weight:

# %%
out = weights @ values  # (1,)
print(f"{out.item():.2f}: near 10, halfway between e, the 5th letter, and o, the 15th")
assert abs(out.item() - 10) < 0.2

# %% [markdown]
# So the query has fetched what the two vowels had to tell, and left the consonants nearly unread.
# *Nearly*, since weights are never zero. That is what makes it trainable. The result changes smoothly with
# query, keys and values, so gradients tell each of them how to become more useful. In a model all
# three are computed from the state of the token, by matrices that are learned.
#
# ### Why the scores are divided
#
# With two dimensions a score of 3 was plenty. The dot product of two random
# vectors of $d$ numbers is a sum of $d$ products, and its spread (standard deviation) grows like $\sqrt d$. Large scores
# make the softmax pick one key and ignore the rest. Then nothing is learned about the others: their
# weights, and with them their gradients, are almost zero. So the scores are divided by
# $\sqrt{d}$.

# %%
torch.manual_seed(SEED)
rows = []
for d in (4, 64, 1024):
    q, k = torch.randn(1000, 1, d), torch.randn(1000, 16, d)  # 1,000 queries, 16 keys
    scores = (q @ k.mT).squeeze(1)  # (1000, 16)
    largest = [s.softmax(-1).amax(-1).mean().item() for s in (scores, scores / d**0.5)]
    rows.append([d, f"{scores.std():.1f}", *(f"{weight:.2f}" for weight in largest)])
    assert 0.9 < scores.std() / d**0.5 < 1.1 and largest[1] < 0.35
assert largest[0] > 0.9
figures.table(
    "Random queries, 16 random keys: the largest weight, on average",
    ["d", "spread of the scores", "as they are", "divided by the root of d"],
    rows,
)

# %% [markdown]
# Divided, the largest weight hardly depends on $d$.
#
# ### All queries at once, and no look ahead
#
# Every token asks. Put the queries in the rows of a matrix $Q$, the keys in the rows of $K$ and
# the values in the rows of $V$, and all scores are one matrix product:
#
# $$
# \text{Attention}(Q, K, V) = \text{softmax}\left( \frac{Q K^\top}{\sqrt{d}} \right) V .
# $$
#
# But the model is trained to predict the next token at
# every position, and the next token stands right there, one row below. So each query sees the keys
# up to its own and none after: the **causal mask**. Before the softmax the scores of later keys
# become minus infinity, and $\exp(-\infty) = 0$.

# %%
T, d = 5, 2
torch.manual_seed(SEED)
Q, K, V = (torch.randn(T, d) for _ in range(3))
future = torch.ones(T, T, dtype=torch.bool).triu(1)  # (T, T): True where key > query


def attend(Q, K, V):
    """Causal attention: Q, K, V (T, d) each -> weights (T, T), result (T, d)."""
    scores = Q @ K.T / Q.size(-1) ** 0.5  # (T, T): a row for each query
    weights = scores.masked_fill(future, -math.inf).softmax(dim=-1)  # (T, T)
    return weights, weights @ V


weights, out = attend(Q, K, V)
print(weights.numpy().round(2))

# %% [markdown]
# Row by row: the first token can look at itself alone, the second at two, the last at all five. Each
# row sums to 1. Does the mask hold? Change the last token, and nothing before it may move:

# %%
K[-1], V[-1] = 100.0, 100.0
_, changed = attend(Q, K, V)
print("moved:", (changed != out).any(dim=1).tolist())
assert torch.equal(changed[:-1], out[:-1]) and not torch.equal(changed[-1], out[-1])

# %% [markdown]
# ## 0.3 Heads
#
# One softmax gives one mean. But a token may want several things at once: the last vowel, the start
# of the word, who is speaking. So the model does attention several times side by side, in `H`
# **heads**. Each has its own queries, keys and values, of `d_head = d_model / H` numbers (the $d$ under
# the root), so `H` heads cost as much as one large one. What they found is joined again, and a last matrix mixes it.
#
# In code, no loop over the heads is needed. The last dimension is cut into `H` parts, and the heads
# move next to the batch. Watch the shapes:

# %%
B, T, H, d_model = 2, 5, 4, 32
x = torch.randn(B, T, d_model)
step_1 = x.unflatten(-1, (H, d_model // H))
step_2 = step_1.transpose(1, 2)
back = step_2.transpose(1, 2).flatten(2)
print("a vector a token      ", tuple(x.shape), "       (B, T, d_model)")
print("cut into heads        ", tuple(step_1.shape), "     (B, T, H, d_head)")
print("heads before positions", tuple(step_2.shape), "     (B, H, T, d_head)")
print("and joined again      ", tuple(back.shape), "       (B, T, d_model)")
assert torch.equal(back, x)

# %% [markdown]
# In the model, queries, keys and values are computed from the whole state and then cut into heads.
# PyTorch's matrix product then works on the last two dimensions, `T` and `d_head`, for each text and
# each head by itself. The class below does just that. One matrix, `query_key_value`, makes queries,
# keys and values of all heads in one product. For the rest, PyTorch has a function,
# `scaled_dot_product_attention`: scores, division, mask, softmax and mean in one. It gives what
# `attend` gave, faster, since it never writes down the whole `T` by `T` matrix. (`dropout` sets
# some attention weights to zero at random, in training only, which keeps a model from learning a small text by
# heart. In this chapter it is 0.)

# %% tags=["from-module"]
class CausalAttention(nn.Module):
    """Multi-head attention in which position t sees the positions 0 ... t of its own
    window."""

    def __init__(self, d_model, n_heads, dropout):
        super().__init__()
        self.n_heads, self.dropout = n_heads, dropout
        self.query_key_value = nn.Linear(d_model, 3 * d_model, bias=False)
        self.out = nn.Linear(d_model, d_model, bias=False)

    def forward(self, x):
        """x (B, T, d_model) -> (B, T, d_model)."""
        qkv = self.query_key_value(x)  # (B, T, 3 * d_model)
        qkv = qkv.unflatten(-1, (3, self.n_heads, -1))  # (B, T, 3, H, d_head)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, H, T, d_head) each
        dropout = self.dropout if self.training else 0.0
        heads = F.scaled_dot_product_attention(
            q, k, v, is_causal=True, dropout_p=dropout
        )  # (B, H, T, d_head)
        return self.out(heads.transpose(1, 2).flatten(2))  # (B, T, d_model)

# %% [markdown]
# Check it against `attend`, head by head:

# %%
torch.manual_seed(SEED)
attention = CausalAttention(d_model, n_heads=H, dropout=0.0)
q, k, v = attention.query_key_value(x).chunk(3, dim=-1)  # (B, T, d_model) each
found = torch.zeros(B, T, d_model)
d = d_model // H
for text in range(B):
    for head in range(H):
        part = slice(head * d, (head + 1) * d)
        _, found[text, :, part] = attend(*(y[text, :, part] for y in (q, k, v)))
difference = (attention(x) - attention.out(found)).abs().max()
print(f"largest difference: {difference:.1e}")
assert difference < 1e-6

# %% [markdown]
# ## 0.4 A layer
#
# Attention moves information *between* tokens. To work with what it brought, each token also passes, by
# itself, through a small network, the same for all tokens: the **feed-forward**, two matrices with a
# ReLU between them,
#
# $$
# \text{FF}(x) = W_2 \max(0, W_1 x + b_1) + b_2 .
# $$
#
# Attention and feed-forward are the two **blocks** of a layer. Two more things let you stack such
# layers. The first is the **residual connection**: a
# block does not replace the state $x$ of a token, it *adds* to it, $x + \text{block}(x)$. So the gradient has a way
# back past every block. The second is
# the **layer norm**. Since every block adds, states grow. The norm gives each block inputs of the same
# size: it subtracts the mean of the `d_model` numbers of a state, divides by their standard deviation, and
# then applies a learned factor and shift to each number. It stands *before* each block (pre-norm, or pre-LN), and
# the block's output is added to the state without the norm: $x + \text{block}(\text{norm}(x))$. (The [original
# transformer](https://arxiv.org/abs/1706.03762) put it after the sum, which is [harder to
# train](https://arxiv.org/abs/2002.04745). `self.dropout`
# does to the outputs of blocks what `dropout` did to attention weights.)

# %% tags=["from-module"]
class Layer(nn.Module):
    """Attention, then a feed-forward network, each around a residual connection."""

    def __init__(self, d_model, n_heads, d_ff, dropout):
        super().__init__()
        self.attention = CausalAttention(d_model, n_heads, dropout)
        self.feed_forward = nn.Sequential(
            nn.Linear(d_model, d_ff), nn.ReLU(), nn.Linear(d_ff, d_model)
        )
        self.norm_attention = nn.LayerNorm(d_model)
        self.norm_feed_forward = nn.LayerNorm(d_model)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x):
        """x (B, T, d_model) -> (B, T, d_model)."""
        x = x + self.dropout(self.attention(self.norm_attention(x)))
        return x + self.dropout(self.feed_forward(self.norm_feed_forward(x)))

# %% [markdown]
# What do the two buy? Send 64 random tokens through 12 untrained layers. Without the residual, are they
# still different tokens at the end? Without the norm, what do layers do to states that have grown large?

# %%
class WithoutResidual(Layer):
    """The same layer, but each block replaces the state."""

    def forward(self, x):
        x = self.attention(self.norm_attention(x))
        return self.feed_forward(self.norm_feed_forward(x))


class WithoutNorm(Layer):
    """The same layer, but the blocks get the states as they are."""

    def forward(self, x):
        x = x + self.attention(x)
        return x + self.feed_forward(x)


# %%
@torch.no_grad()
def through_twelve(kind):
    """How alike the tokens come out; the size of what 12 layers add to states of size
    1 and 100."""
    torch.manual_seed(SEED)
    sizes = dict(d_model=32, n_heads=4, d_ff=128, dropout=0.0)
    stack = nn.Sequential(*(kind(**sizes) for _ in range(12)))
    x = torch.randn(1, 64, 32)  # (B, T, d_model)
    direction = F.normalize(stack(x), dim=-1)
    cosines = direction @ direction.mT  # (B, T, T)
    others = ~torch.eye(64, dtype=torch.bool)
    added = [(stack(size * x) - size * x).std().item() for size in (1, 100)]
    return [cosines[:, others].mean().item(), *added]


kinds = nn.Identity, Layer, WithoutResidual, WithoutNorm  # Identity hands x on as it is
twelve = {kind.__name__: through_twelve(kind) for kind in kinds}
twelve["WithoutResidual"][1:] = math.nan, math.nan  # there, nothing is added
figures.table(
    "12 untrained layers",
    ["", "cosine between tokens", "added to states of size 1", "of size 100"],
    [
        [name, *("–" if math.isnan(x) else f"{x:.2f}" for x in row)]
        for name, row in twelve.items()
    ],
)
assert twelve["Layer"][0] < 0.5 and twelve["WithoutResidual"][0] > 0.99
assert twelve["Layer"][2] < 2 and twelve["WithoutNorm"][2] > 100

# %% [markdown]
# `Identity` does nothing: its line shows how alike the tokens were at the start. With residuals they stay
# different. Without them, nothing carries a token's own vector past a block, and after twelve layers all
# tokens point the same way (a cosine of 1): there is nothing left to learn from. Without norms a block
# answers large states with large changes, which make the states larger still. With both, the twelve layers add
# about the same amount, however large the states.
#
# ## 0.5 Where a token stands
#
# Each kind of token has a learned vector of `d_model` numbers, its **embedding** (a row of PyTorch's
# `nn.Embedding`): that is the first state of the token. Attention, as it is now, does not see the order of these states. Shuffle the earlier tokens, and the last one collects
# the same mean:

# %%
x = torch.randn(1, 6, d_model)
shuffled = x[:, [3, 0, 4, 1, 2, 5]]  # the last one stays where it is
difference = (attention(x) - attention(shuffled))[:, -1].abs().max()
print(f"the last token notices the shuffle: {bool(difference > 1e-6)}")
assert difference < 1e-6

# %% [markdown]
# With words as tokens, *dog bites man!* and *man bites dog!* are the same to one layer of attention, at the last token.
# (More layers can guess something of the order from the mask.) So each position gets a vector too, which is added
# to the embedding. The original transformer takes sines and cosines of the position $p$,
# at $d_{\text{model}} / 2$ speeds from fast to slow:
#
# $$
# \sin\left(p \,/\, 10\,000^{\,2k / d_{\text{model}}}\right) , \quad
# \cos\left(p \,/\, 10\,000^{\,2k / d_{\text{model}}}\right) , \qquad k = 0, 1, \ldots, d_{\text{model}} / 2 - 1 .
# $$
#
# Think of clock hands: the fast ones tell neighbours apart, the slow ones the start of the window
# from its end. Nothing is learned. (Here all sines come first. Calls to `inputs` only refuse what cannot
# work, and say what would.)

# %% tags=["from-module"]
def sinusoid(positions, d_model):
    """Fixed embeddings of integer positions, shape (len(positions), d_model). Vaswani
    et al., section 3.5."""
    inputs.check_even("d_model", d_model)
    evens = torch.arange(0.0, d_model, 2, dtype=torch.float32, device=positions.device)
    wavelengths = 10_000 ** (evens / d_model)  # (d_model / 2,), in units of 2 * pi
    angles = positions[:, None] / wavelengths  # in float32, whatever the model's dtype
    return torch.cat([angles.sin(), angles.cos()], dim=-1)

# %%
U = sinusoid(torch.arange(64), d_model=64)  # (64, d_model)
alike = U @ U.T  # (64, 64): the dot product of each two positions
for distance in (0, 1, 8):
    products = alike.diagonal(distance)
    print(f"{distance} apart: {products.min():.3f} to {products.max():.3f}")
    assert products.max() - products.min() < 1e-3

# %% jupyter={"source_hidden": true} tags=["hide-input"]
figure, axes = plt.subplots(1, 2, figsize=(6.8, 3.2))
image = figures.matrix(
    axes[0], U.T, xlabel="position (tokens)", ylabel="dimension",
    title="sines, then cosines",
)  # fmt: skip
figure.colorbar(image, ax=axes[0])
image = figures.matrix(
    axes[1], alike, xlabel="position (tokens)", ylabel="position (tokens)",
    title="dot products",
)  # fmt: skip
figure.colorbar(image, ax=axes[1])
figures.show(
    figure,
    "The vectors of positions are stripes, narrow at the top of each half and ever "
    "wider below. Their dot products depend on the distance alone: the right matrix "
    "is the same along each diagonal, and largest where a position meets itself.",
)

# %% [markdown]
# The dot product of two of these vectors depends on their *distance* alone, and is largest for a
# position with itself. Since $\sin a \sin b + \cos a \cos b = \cos(a - b)$, it is, for the positions $p$ and $p + n$,
#
# $$
# \sum_k \cos\left(n \,/\, 10\,000^{\,2k / d_{\text{model}}}\right) ,
# $$
#
# which at distance 0 is a sum of $d_{\text{model}} / 2$ ones, 32 here. Chapter 1 builds on it.
#
# ### The whole model
#
# Characters and positions go in, `L` layers follow, then one more norm, and a last matrix, the **head** (not to be
# confused with the heads of attention), makes one number for each character of the vocabulary: the **logits**. Their softmax is the prediction. All models of
# this book are called in the same way, `logits, memory = model(tokens, memory)`. This one has no memory:
# it takes and returns `None`.

# %% tags=["from-module"]
class VanillaTransformer(nn.Module):
    """A language model with absolute positions and no memory.

    tokens (B, T) int64, T <= max_len -> logits (B, T, vocab_size), None. It has no
    memory: it takes and returns None, only to share the protocol of the other models.
    """

    def __init__(
        self, vocab_size, d_model=128, n_heads=4, n_layers=4, d_ff=512,
        max_len=64, dropout=0.0,
    ):  # fmt: skip
        super().__init__()
        inputs.check_sizes(locals(), even=["d_model"])
        self.max_len = max_len
        self.embedding = nn.Embedding(vocab_size, d_model)
        self.dropout = nn.Dropout(dropout)
        stack = (Layer(d_model, n_heads, d_ff, dropout) for _ in range(n_layers))
        self.layers = nn.ModuleList(stack)
        self.norm = nn.LayerNorm(d_model)
        self.head = nn.Linear(d_model, vocab_size)

    def forward(self, tokens, memory=None):
        inputs.check_tokens(tokens, self.embedding.num_embeddings, self.max_len)
        memory = inputs.checked_memory(memory, None)  # there is none
        x = self.embedding(tokens)  # (B, T, d_model)
        positions = torch.arange(x.size(1), device=x.device)
        x = self.dropout(x + sinusoid(positions, x.size(-1)).to(x.dtype))
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x)), memory

# %% tags=["band"]
T = 64
SIZES = dict(d_model=96, n_heads=4, n_layers=3, d_ff=384)
SIZES["vocab_size"] = len(corpus.vocab)

# %%
torch.manual_seed(SEED)
model = VanillaTransformer(**SIZES, max_len=T).to(device)
logits, _ = model(corpus.train[None, :T].to(device))
print("logits", tuple(logits.shape), "(B, T, vocab_size)")

# %%
def count(module):
    """How many numbers a module learns."""
    return sum(p.numel() for p in module.parameters())


d, d_ff, L = SIZES["d_model"], SIZES["d_ff"], SIZES["n_layers"]
of_attention = 4 * d * d  # queries, keys, values, and `out`
of_feed_forward = 2 * d * d_ff + d_ff + d
of_layer = of_attention + of_feed_forward + 4 * d  # two norms of 2 d numbers
total = size * d + L * of_layer + 2 * d + (d + 1) * size  # size: the vocabulary
print(f"{count(model):,} parameters: {L} layers of {of_layer:,}, embedding, norm, head")
assert count(model) == total

# %% [markdown]
# ## 0.6 Train it
#
# ### Lanes
#
# Training reads many pieces of text at once, `B` side by side. Instead of taking pieces from anywhere,
# this book cuts the text into `B` long **lanes** and reads them side by side, `T` tokens at
# a time. Row 0 of the second batch *continues* row 0 of the first. The vanilla model (the plain one, of this chapter)
# makes no use of that. The others, whose memory goes from batch to batch, depend on it.

# %%
alphabet = torch.arange(26)
for n, (tokens, targets) in enumerate(corpora.lanes(alphabet, 2, 4)):
    lane_0, lane_1 = ("".join(chr(97 + t) for t in row) for row in tokens.tolist())
    print(f"batch {n}:  lane 0  {lane_0:5} lane 1  {lane_1}")

# %% [markdown]
# Each lane has twelve letters, $(26 - 1) / 2$ without the remainder: the last letter of a lane needs a target too. So lane 0
# ends with `l`, whose target is the `m` that begins lane 1; `z` is left over. When the lanes end before the training
# does, they are read again from the start, with an empty memory.

# %% [markdown]
# ### The loop
#
# Its heart is five lines for each batch:
#
# ```python
# memory = None
# for tokens, targets in corpora.lanes(stream, batch_size, segment_len):
#     logits, memory = model(tokens, memory)
#     loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
#     optimizer.zero_grad()
#     loss.backward()
#     optimizer.step()
# ```
#
# The loop that trains every model of this book adds what makes such a training go well, and what the
# other chapters need:
#
# - The **learning rate** `lr` rises for `warmup` steps, then falls along half a cosine (`warmup_cosine`): large
# steps are dangerous while the weights are random, and small ones settle the model at the end.
# - **AdamW** (`adamw`) divides the step of each weight by the size of its recent gradients, and shrinks
# the matrices a little at each step.
# - **Clipping**: a gradient longer than `clip` is shortened to that length, so that one odd batch does no
# harm. (`clip_groups`: in chapter 2 two parts of a model are clipped apart.)
# - `at_start` says which rows of the batch begin a new text, and so forget their memory (`read`).
# - The streams of later chapters' tasks may end early, and their targets of -100 do not count.
# - `aux` are losses that a model adds of its own (chapter 2).
# - `autocast` computes in 16 bits on a GPU.
#
# This is the whole function of `memtx_minimal/training.py`, but for its docstring; its helpers are in that file. You may
# change it: the notebook trains with this version.

# %% tags=["as-in-training", "band"]
def train(
    model, stream, *, steps, batch_size=32, segment_len=64, lr=3e-3, warmup=50,
    weight_decay=0.01, clip=1.0, valid=None, valid_every=None, progress=True,
):  # fmt: skip
    sizes = {"batch_size": batch_size, "segment_len": segment_len}
    whole = {"steps": steps, "warmup": warmup, "valid_every": valid_every}
    inputs.check_sizes(sizes | whole)
    inputs.check_positive("clip", clip)
    device, memory = device_of(model), None
    history = {"loss": [], "aux": [], "valid": []}
    optimizer = adamw(model, lr, weight_decay)
    bar = tqdm(range(steps), leave=False, disable=not progress, mininterval=0.5)
    model.train()
    try:
        for step, batch in zip(bar, batches(stream, device, **sizes)):
            tokens, targets, at_start = batch
            for group in optimizer.param_groups:
                group["lr"] = lr * warmup_cosine(step, steps, warmup)
            with autocast(device):
                logits, memory, *aux = read(model, tokens, memory, at_start)
            loss = cross_entropy(logits, targets)
            check_finite([loss, *aux], step, lr)
            counts = bool((targets != -100).any())
            if counts or aux:
                optimizer.zero_grad()
                sum(aux, loss).backward()
                for parameters in clip_groups(model):
                    nn.utils.clip_grad_norm_(parameters, clip)
                optimizer.step()

            history["loss"].append(loss.item() if counts else math.nan)
            history["aux"].append(tuple(value.item() for value in aux))
            bar.set_postfix_str(f"loss {history['loss'][-1]:.3f}", refresh=False)
            if valid_every and (step + 1) % valid_every == 0:
                validate(model, valid, history, sizes)
        if valid is not None:
            validate(model, valid, history, sizes)
        if len(history["loss"]) < steps:
            print(f"the stream ended after {len(history['loss'])} of {steps} steps")
    except KeyboardInterrupt:
        print(f"stopped after {len(history['loss'])} of {steps} steps")
    model.eval()
    return history

# %% [markdown]
# Train for less than a minute, on 16 lanes; 1,200 steps read the text once and a fifth of it again. `by_position` is for
# section 0.8.

# %% tags=["band"]
STEPS, LANES = 1200, 16


def by_position(model):
    """Mean validation loss at each position of the window, (T,)."""
    losses = training.token_losses(model, corpus.valid, segment_len=T)  # (B, lane)
    whole = losses.size(1) // T * T
    return losses[:, :whole].unflatten(1, (-1, T)).mean(dim=(0, 1))  # (T,)

# %%
history = train(model, corpus.train, steps=STEPS, batch_size=LANES)
trained = training.evaluate(model, corpus.valid, segment_len=T)
bits = training.bits_per_character(trained)
latest = sum(history["loss"][-50:]) / 50
print(f"validation: {trained:.3f} nats, {bits:.3f} bits;", end=" ")
print(f"training, at the end: {latest:.3f} nats")
print(f"characters read: {STEPS * LANES * T:,} of a text of {len(corpus.train):,}")
assert trained < simple["what follows what"] - 0.4

# %% jupyter={"source_hidden": true} tags=["hide-input"]
figure, axes = plt.subplots()
axes.plot(history["loss"], color=figures.BLUE)
for name, loss in simple.items():
    axes.axhline(loss, color="black", linestyle=":", linewidth=1)
    axes.text(STEPS, loss + 0.03, name, ha="right", fontsize=9)
axes.set(xlabel="training step", ylabel="loss (nats per character)", ylim=(1.4, 4.6))
axes.set_title(f"Training ({corpus.name})")
figures.show(
    figure,
    "The training loss starts near that of guessing, passes the model that knows how "
    "often each character occurs within the first steps, then the one that knows what "
    "follows what, and goes on falling more and more slowly.",
)

# %% [markdown]
# The dotted lines are validation losses: compare them with the model's own, above.

# %%
prompt = corpus.vocab.encode("KING ")
text = training.generate(model, prompt, 300, temperature=0.8)
print(corpus.vocab.decode(text))

# %% [markdown]
# (The logits were divided by the `temperature` before the softmax: below 1, the likely become likelier.)
# It writes words, many of them English, and lines that look like a play. But it sees only the last 64 characters: who
# spoke before, or what was said, it cannot know.
#
# ## 0.7 The key-value cache
#
# How does `generate` work? It reads the text so far (at most the last `T` characters), draws the next character from the prediction,
# appends it, and reads it all again. The states of the earlier characters are computed anew each time,
# and come out the same each time, as long as the text fits the window, since the mask lets them see nothing new. That is a waste. All
# that the new character needs of the earlier ones is their keys and values, in each layer. So keep these.

# %%
@torch.inference_mode()
def one_more(model, token, cache):
    """Logits (B, vocab_size) after one more token (B, 1).

    cache: for each layer its keys and values so far, (B, H, n, d_head) each. They
    grow by one.
    """
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


def empty_cache(model, B=1):
    """Keys and values of no tokens, for each layer."""
    d_model, n_heads = model.embedding.embedding_dim, model.layers[0].attention.n_heads
    nothing = torch.zeros(B, n_heads, 0, d_model // n_heads, device=device_of(model))
    return [(nothing, nothing) for _ in model.layers]

# %% [markdown]
# No mask is needed: there is one query, and no key lies after it. Feed the trained model a window
# character by character, and compare with reading it at once:

# %%
window = corpus.valid[None, :T].to(device)  # (1, T)
cache = empty_cache(model)
steps = [one_more(model, token, cache) for token in window.split(1, dim=1)]
with torch.inference_mode():
    whole, _ = model(window)  # (1, T, vocab_size)
difference = (torch.stack(steps, dim=1) - whole).abs().max()
print(f"largest difference: {difference:.1e}")
assert difference < 1e-3

# %% [markdown]
# The same logits, up to rounding. And what does it cost? In each layer a key and a value, `d_model`
# numbers each, for every token: `2 * L * T * d_model` numbers a text, of 4 bytes here.

# %%
held = measure.nbytes(cache)
print(f"cache of {T} tokens: {held / 2**10:.0f} KiB, weights: ", end="")
print(f"{measure.nbytes(model.parameters()) / 2**10:,.0f} KiB")
assert held == 2 * L * T * d * 4

# %% [markdown]
# That is little. In a large model, with long texts and many users, the cache is
# often larger than the weights (exercise 0.2). How much time does it save? Take a model with a longer window
# (untrained: weights do not change the time), and measure *one more* character after `n`.

# %%
lengths = [16, 64, 256, 1024]
torch.manual_seed(SEED)
long = VanillaTransformer(**SIZES, max_len=max(lengths) + 1).to(device).eval()
token = corpus.valid[None, :1].to(device)


@torch.inference_mode()
def time_of_one(n, cached):
    """Seconds for one more character after n."""
    if not cached:
        text = corpus.valid[None, :n].to(device)
        return measure.seconds(lambda: long(text), rounds=9, device=device)
    shape = 1, SIZES["n_heads"], n, d // SIZES["n_heads"]
    full = [(torch.randn(shape, device=device),) * 2 for _ in range(L)]
    step = lambda: one_more(long, token, list(full))  # one_more alters its list
    return measure.seconds(step, rounds=9, device=device)


times = {
    "read it all again": [time_of_one(n, cached=False) for n in lengths],
    "with the cache": [time_of_one(n, cached=True) for n in lengths],
}
assert times["read it all again"][-1] > 3 * times["with the cache"][-1]

# %% jupyter={"source_hidden": true} tags=["hide-input"]
figure, axes = plt.subplots()
for (name, seconds), marker in zip(times.items(), "o^"):
    axes.plot(lengths, [1000 * s for s in seconds], marker=marker, label=name)
axes.set(xscale="log", yscale="log", xlabel="characters read so far (tokens)")
axes.set(ylabel="ms for one more", title="One more character")
axes.set_xticks(lengths, labels=lengths)
axes.minorticks_off()
axes.legend()
figures.show(
    figure,
    "Reading everything again takes longer the more there is to read. With the cache "
    "the time for one more character stays nearly the same.",
)

# %% [markdown]
# Reading everything again takes longer with each character. With the cache the time hardly grows.
#
# ## 0.8 What does it not remember?
#
# And when the window is full? The cache cannot help. If you count on, the model meets positions that it was never
# trained on. If you drop the oldest key, the others keep their old positions, one too high (exercise 0.4).
# The model can only start again, with a new window or with the last `T` characters moved to the front.
#
# So look at what starting afresh costs: the validation loss at each position, one window after the
# other, as in training. One training proves little,
# so `positions_of_seed` was run for five seeds beforehand. Their curves are
# drawn in grey: a *band*. Your run should lie in it, give or take a margin, since other machines round
# differently, and training amplifies that. (If it does not, `band.check` says so and stops the notebook.) All close
# comparisons of this book rest on such bands.

# %% tags=["band"]
def positions_of_seed(seed):
    """Validation loss at each position, for a model trained from this seed."""
    torch.manual_seed(seed)
    model = VanillaTransformer(**SIZES, max_len=T).to(device)
    how = dict(steps=STEPS, batch_size=LANES, progress=False)
    train(model, corpus.train, **how)
    return {"vanilla": by_position(model).tolist()}

# %%
live = {"vanilla": by_position(model).tolist()}
band = bands.load("00_positions_of_seed", corpus.name)
band.check(live, margin=0.15)

# %% jupyter={"source_hidden": true} tags=["hide-input"]
figure, axes = plt.subplots()
figures.band(axes, range(T), band.values["vanilla"])
axes.plot(range(T), live["vanilla"], marker="o", markersize=3, label="this run")
axes.set(xlabel="position in the window (tokens)", ylabel="loss (nats per character)")
axes.set_title(f"Each window starts nearly blind ({corpus.name})")
axes.legend()
figures.show(
    figure,
    "At the first position of a window, where one character has been read, the loss "
    "is 0.7 nats higher than later. It falls over three positions, and then no "
    "further: it goes up and down a little, the same way in all five recorded "
    "seeds.",
)

# %%
losses = live["vanilla"]
first, soon, late = losses[0], sum(losses[8:16]) / 8, sum(losses[16:]) / (T - 16)
print(f"first {first:.2f}, positions 8 to 15 {soon:.2f}, later {late:.2f} nats")
assert abs(first - simple["what follows what"]) < 0.2
assert first > late + 0.5 and abs(soon - late) < 0.1

# %% [markdown]
# At the first position the model has read a single character, and does no better than the table of what follows
# what. A few characters later it has seen the start of the word that it is in. (From there on the curve goes up and down
# in the same way for every seed, mostly because all read the same windows.) But the past *is* there, in the text, just before the
# window; the model cannot see it. Its answer is the same, whatever it has read before:

# %%
with torch.inference_mode():
    after = []
    for past in (corpus.train[:T], corpus.train[T : 2 * T]):
        model(past[None].to(device))
        after.append(model(window)[0])
print("the same after any past:", torch.equal(*after))
assert torch.equal(*after)

# %% [markdown]
# (Why does the curve not go on falling? A model of this size, trained for a minute, makes little use of more than the
# last few characters. Larger models do, and in chapter 1 you meet a stream where everything depends on what stands
# before the window.)
#
# ### Four answers
#
# A longer window is the plain remedy, and a costly one: attention compares every token with all before it, and
# the cache grows with every token. The four papers of this book each give another answer; the pictures bear their
# chapters' numbers. A line runs right, or straight up, to the state that reads. Blue is the current window, orange is memory,
# green is compressed memory, and grey is not read. In picture 3 a thick bar is one step, with all its layers mixed into the
# square on top, and only what the last step reads is drawn; in picture 4 colours mark groups of similar tokens.

# %% jupyter={"source_hidden": true} tags=["hide-input", "front-figure"]
figures.show(figures.four_answers(), figures.FOUR_ANSWERS)

# %% [markdown]
# - **Transformer-XL** (chapter 1) keeps the states of the previous segment and attends to them. Positions
# become distances, so that old states stay valid.
# - The **Compressive Transformer** (chapter 2) does not throw away what leaves that memory. It presses several
# old states into one, and keeps those.
# - The **Feedback Transformer** (chapter 3) asks *which* states to remember. It mixes all layers of a
# step into one vector, which every layer reads: even the lowest layer knows what the highest worked out one step before.
# - **Reformer** (chapter 4) has no memory: it makes the window long. Each token looks only at the few
# others that hashing finds to be similar.
#
# Chapter 5 runs them side by side, and says which to take for what.
#
# ### The letters of this book
#
# | letter | meaning | letter | meaning |
# | --- | --- | --- | --- |
# | `B` | batch: texts side by side | `d_model` | width of a hidden state |
# | `T` | tokens in the segment | `d_head` | width of a head, `d_model / H` |
# | `H` | attention heads | `d_ff` | width inside the feed-forward |
# | `L` | layers | `N` | tokens in a whole text |
# | `M` | states in memory (chapters 1 to 3) | `mem_len` | the most states that memory holds |
# | `K` | keys: memory, then segment | `R` | encodings of distances (chapter 1) |
# | `C` | states in compressed memory (chapter 2) | `c` | compression rate (chapter 2) |
# | `O` | old states that leave the memory (chapter 2) | `b` | buckets of one hash (chapter 4) |
# | `G` | chunks (chapter 4) | `w` | tokens in a chunk (chapter 4) |
# | `P` | hash rounds (chapter 4) | `S` | steps of a block (appendix A) |
# | `A` | slots that a step sees (appendix A) | `i` | query |
# | `j` | key | | |
#
# (As in the papers, $Q$, $K$ and $V$ in equations are the matrices of queries, keys and values.)

# %% [markdown]
# ## 0.9 What became of it
#
# The model of this chapter differs from a large language model of today in size, and in few
# other things. [Rotary embeddings](https://arxiv.org/abs/2104.09864), which turn queries and keys (exercise 0.7), have
# replaced added sinusoids; [RMSNorm](https://arxiv.org/abs/1910.07467), which omits mean and shift, has replaced
# the layer norm; [gated feed-forwards](https://arxiv.org/abs/2002.05202) have replaced those with a ReLU. Several heads
# often [share keys and values](https://arxiv.org/abs/1911.02150), to make the cache smaller. Causal attention, residuals, pre-norm and the cache have stayed.

# %% [markdown]
# ## 0.10 Exercises
#
# Write your answer where the dots stand and run the cell. `exercises.check` says that it is right, or names the
# case that fails, what was expected and what came. All [solutions](solutions/00_attention.ipynb), worked out in words and code.
#
# **0.1 Attention, one query at a time** *(fill in; easy; 10 minutes)* Query `t` gets only the keys that it may see, so no mask is
# needed.

# %% tags=["exercise"]
def my_attention(q, k, v):
    """q, k, v (T, d) -> (T, d)."""
    return ...


exercises.check("0.1", my_attention)

# %% [markdown]
# <details><summary>Hint</summary>
#
# For one query: `k[: t + 1] @ q[t]` are its scores. Then the root, the softmax, the mean of the values. `torch.stack` puts the rows together.
#
# </details>
#
# **0.2 The size of a cache** *(derive; easy; 10 minutes)* A model has 32 layers, `d_model` 4,096 and 32 heads, and keeps its weights (13 GB) and its cache
# in numbers of 2 bytes. How many bytes do `B` texts of `T` tokens take, if only `n_kv_heads` of the 32 heads have keys and values of their
# own, which the others share? And how many texts of 100,000 tokens fit into 80 GB set aside for the cache: with 32 key-value heads, and with 8?

# %% tags=["exercise"]
def my_cache(T, B, n_kv_heads):
    return ...


exercises.check("0.2", my_cache)

# %% [markdown]
# <details><summary>Hint</summary>
#
# A head of this model has 4,096 / 32 numbers. Count keys and values, layers, texts, tokens, heads, numbers, bytes.
#
# </details>
#
# **0.3 A mask in the wrong place** *(find the fault; middle; 10 minutes)* No weight lies on the future here, and yet the future is felt. How? Mend it.

# %% tags=["exercise"]
def my_weights(scores):
    """Scores (T, T) of queries and keys -> weights (T, T), the future hidden."""
    weights = scores.softmax(dim=-1)
    return weights.tril()


exercises.check("0.3", my_weights)

# %% [markdown]
# <details><summary>Hint</summary>
#
# Print the sum of each row. What happens to it when a future score grows?
#
# </details>
#
# **0.4 The cache cannot slide** *(experiment; middle; 15 minutes)* Fill a cache with the first 64 of 65 characters,
# drop the oldest key and value in each layer, and feed the last character. Compare the logits with those of the model on
# the last 64 characters. Besides the positions, what else differs?

# %% tags=["exercise"]
def my_slide(tokens):
    """tokens (1, 65) -> the logits of the last one (1, vocab_size)."""
    return ...


exercises.check("0.4", my_slide, model)

# %% [markdown]
# <details><summary>Hint</summary>
#
# `empty_cache` and `one_more` of section 0.7 do nearly everything; the position is the number of tokens in the cache. The cache is a list with a pair (k, v) for each layer, (B, H, tokens, d_head) each.
#
# </details>
#
# **0.5 What causes the blind start?** *(experiment; middle; 15 minutes)* As [Al-Rfou et al.](https://arxiv.org/abs/1808.04444)
# do, predict each of the `n` characters `stream[64 : 64 + n]` from the 64 before it, and take the mean loss. For
# `n = 6400`, 256 windows at a time, compare with the loss of the same characters in windows side by side, `training.token_losses(model, corpus.valid[: n + 65], batch_size=1,
# segment_len=64)[0, 63 : n + 63].mean()`. What is gained, and what does it cost?

# %% tags=["exercise"]
def my_sliding(model, stream, n):
    """stream (N,) -> the mean loss of n characters, in nats."""
    return ...


exercises.check("0.5", my_sliding, model, corpus.valid)

# %% [markdown]
# <details><summary>Hint</summary>
#
# `stream.unfold(0, 64, 1)` has all windows of 64, one step apart, as rows. Only the last logits of each are needed.
#
# </details>
#
# **0.6 Does it notice?** *(predict; middle; 10 minutes)* The first two tokens of a text of five are exchanged. Do the
# logits of the *last* token stay the same? All three models have a causal mask and random weights; the first two have
# no positions, the third has one layer and positions. Write True or False.

# %% tags=["exercise"]
my_same = {"one layer": ..., "two layers": ..., "with positions": ...}

exercises.check("0.6", my_same)

# %% [markdown]
# <details><summary>Hint</summary>
#
# What have the first and the second token seen, before and after the exchange? In which layer does the last token get to know it?
#
# </details>
#
# **0.7 Positions turn** *(derive; hard; 20 minutes)* Let $U_p$ be the vector of position $p$ (section 0.5). That of $p + n$ is the same vector, turned:
# $U_{p+n} = U_p \, W_n$ with the same matrix $W_n$ for all $p$. Which one?

# %% tags=["exercise"]
def my_turn(n, d_model):
    """The matrix W_n (d_model, d_model)."""
    return ...


exercises.check("0.7", my_turn)

# %% [markdown]
# <details><summary>Hint</summary>
#
# The sine and the cosine of a sum; each speed has an angle of its own. $U$ has all sines first, then all cosines, so $W_n$ has four
# blocks, each a diagonal.
#
# </details>

# %% [markdown]
# ## References
#
# - A. Vaswani et al.: [Attention Is All You Need](https://arxiv.org/abs/1706.03762). NeurIPS 2017.
# - R. Xiong et al.: [On Layer Normalization in the Transformer
# Architecture](https://arxiv.org/abs/2002.04745). ICML 2020.
# - R. Al-Rfou, D. Choe, N. Constant, M. Guo, L. Jones: [Character-Level Language Modeling with
# Deeper Self-Attention](https://arxiv.org/abs/1808.04444). AAAI 2019.
# - N. Shazeer: [Fast Transformer Decoding: One Write-Head is All You
# Need](https://arxiv.org/abs/1911.02150). 2019.

# %%
minutes = (time.perf_counter() - started) / 60
peak = measure.process_peak_bytes() / 2**30
print(f"this run: {minutes:.1f} minutes, peak memory {peak:.2f} GiB,", end=" ")
print(f"text: {corpus.name}")
