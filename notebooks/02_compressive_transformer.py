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
# # 2. Compressive Transformer: keep the old in fewer states

# %% [markdown] tags=["badges"]
# No links to Colab and Kaggle here: the project has no public address yet.
# To run this notebook, type `make lab` in your copy of the project.

# %% [markdown]
# Transformer-XL (chapter 1) keeps the states of the last `M` tokens and drops what is older. The
# **Compressive Transformer** ([Rae et al., 2020](https://arxiv.org/abs/1911.05507)) does not drop
# it. What leaves the memory is *compressed*, several states into one, and kept in a second memory
# behind the first. The same number of slots then reaches much further back, with less detail.
#
# **When you have read it, you can**
# - write the memory pipeline, and say for any slot which tokens stand in it;
# - write the five compression functions of the paper and its three losses, and say which parameters
# each loss may touch and why;
# - measure how far back a model remembers, and what that costs, at equal numbers of slots;
# - read an attention-bucket figure.
#
# **You need** chapter 1: the memory of Transformer-XL and attention by distance. This chapter
# imports both and adds to them.
#
# **Time and memory.** The budget of the whole notebook is 8 minutes and 2 GiB on two CPU cores. It
# trains more than a dozen small models while you read. The last cell prints what it took on your
# machine.

# %% tags=["colab-install"]
import importlib.util

# Where memtx_minimal is installed, this cell does nothing.
if importlib.util.find_spec("memtx_minimal") is None:
    raise ModuleNotFoundError(
        "This notebook needs the package memtx_minimal and cannot fetch it: "
        "the project has no public address yet. In your copy of the project, "
        "type: pip install ."
    )

# %%
import copy
import math
import re
import time
from collections import Counter

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from torch import nn

from memtx_minimal import corpora, figures, inputs, measure, tasks, training
from memtx_minimal.transformer_xl import Layer, TransformerXL, attention_mask, distances, sinusoid

started = time.perf_counter()
figures.use_style()
device = training.best_device()
SEED = 0
print(f"PyTorch {torch.__version__} on {device}")

# %% [markdown]
# The letters of chapter 1, and three new ones:
#
# | letter | meaning | letter | meaning |
# | --- | --- | --- | --- |
# | `B` | batch: texts side by side | `H` | attention heads |
# | `T` | tokens in the segment ($n_s$ in the paper) | `d_model` | width of a hidden state |
# | `M` | states in memory ($n_m$) | `d_head` | width of a head, `d_model / H` |
# | `C` | states in compressed memory ($n_{cm}$) | `L` | layers |
# | `K` | keys: `C + M + T` | `c` | compression rate |
# | `O` | old states that leave the memory | | |
#
# Here is the pipeline in one picture, with the sizes of the paper's Figure 1: segments of 3, a memory
# of 6, a compressed memory of 6, and rate 3. Each box is one state; the numbers say which tokens
# it stands for.

# %%
def pipeline(n_segments, T=3, mem_len=6, compressed_len=6, c=3):
    """(compressed memory, memory, segment), as the token numbers of each slot."""
    compressed, memory = [], []
    for n in range(n_segments):
        segment = [[T * n + i] for i in range(T)]
        yield list(compressed), list(memory), segment
        memory += segment
        while len(memory) > mem_len:
            compressed.append(sum(memory[:c], []))  # c slots become one
            memory = memory[c:]
        compressed = compressed[-compressed_len:]


for compressed, memory, segment in pipeline(4):
    print("compressed", compressed, " memory", memory, " segment", segment)

# %%
def frame(n, compressed, memory, segment):
    """The boxes of one segment; a dark edge for the memories that are about to leave."""
    figure, axes = plt.subplots(figsize=(6.4, 1.9))
    zones = [
        ("compressed memory", compressed, 0, 6, figures.PINK),
        ("memory", memory, 6, 6, figures.ORANGE),
        ("segment", segment, 12, 3, figures.BLUE),
    ]
    for name, slots, start, size, color in zones:
        first = start + size - len(slots)  # the newest stands right
        for i, slot in enumerate(slots):
            leaves = name == "memory" and len(memory) == 6 and i < 3
            look = dict(facecolor=color, edgecolor="black", linewidth=2.5 if leaves else 0.5)
            axes.add_patch(plt.Rectangle((first + i, 0), 0.9, 0.9, **look))
            label = f"{slot[0]}" if len(slot) == 1 else f"{slot[0]}–{slot[-1]}"
            text = dict(ha="center", va="center", fontsize=8, color="white")
            axes.text(first + i + 0.45, 0.45, label, **text)
        axes.text(start + size / 2 - 0.05, 1.15, name, ha="center", color=color)
    axes.set(xlim=(-0.2, 15.1), ylim=(-0.2, 1.6))
    axes.set_title(f"Segment {n + 1}: the model sees all these boxes")
    axes.axis("off")
    return figure


figures.show_animation(
    [frame(n, *parts) for n, parts in enumerate(pipeline(10))],
    "Animation. Segments of three tokens enter the memory from the right. When its six slots are full, the three "
    "oldest become one slot of the compressed memory, to the left. After ten segments twelve slots stand for "
    "the last 24 tokens before the segment.",
)

# %% [markdown]
# ## 2.1 The problem: the memory ends
#
# How far back does Transformer-XL remember? Text does not tell you well, because nobody knows what
# it needs to remember when. So take a stream in which you know it: the **recall task**. A
# token such as `b=5` says that the key `b` has now the value 5. A token `b?` asks for the latest
# value of `b`. The rest is noise. Only answers count; a guess is right once in eight times.

# %%
for _, (tokens, targets, _, age) in zip(range(8), tasks.recall(1, 20, SEED)):
    pass  # the eighth segment: much has been said before it

answers = ["." if target < 0 else target.item() for target in targets[0]]
ages = ["." if target < 0 else n.item() for target, n in zip(targets[0], age[0])]
for name, row in [("reads", tasks.recall_text(tokens[0])), ("answer", answers), ("age", ages)]:
    print(f"{name:7}", "".join(f"{x:>4}" for x in row))

# %% [markdown]
# The **age** of an answer is how many tokens ago its value was said. Train a small Transformer-XL on it:
# two layers, segments of 16, a memory of 32. The model reads endless lanes, and memory goes
# along.

# %%
RECALL = dict(vocab_size=tasks.RECALL_VOCAB, d_model=64, n_heads=4, n_layers=2, d_ff=256)
RECALL_STEPS = 1000


def learn_recall(model):
    """Train on the recall task, in place; segments of 16, memory from one to the next."""
    _ = training.train(model.to(device), tasks.recall(32, 16, SEED + 1), steps=RECALL_STEPS, lr=2e-3)
    return model


AGES = [1, 17, 33, 49, 65, 81, 97, 113, 129, 145, 161]


@torch.inference_mode()
def accuracy_by_age(model, n_segments=150, skip=20):
    """Share of right answers in each bucket of ages, once the memories are full."""
    right, asked, memory = torch.zeros(AGES[-1]), torch.zeros(AGES[-1]), None
    for n, (tokens, targets, _, age) in zip(range(n_segments), tasks.recall(64, 16, SEED + 2)):
        logits, memory, *_ = model(tokens.to(device), memory)
        counts = (targets >= 0) & (age < AGES[-1]) & (n >= skip)
        hits = counts & (logits.argmax(dim=-1).cpu() == targets)
        right += age[hits].bincount(minlength=AGES[-1])
        asked += age[counts].bincount(minlength=AGES[-1])
    edges = list(zip(AGES, AGES[1:]))
    return torch.stack([right[a:b].sum() / asked[a:b].sum() for a, b in edges])


torch.manual_seed(SEED)
recall_xl = learn_recall(TransformerXL(**RECALL, mem_len=32))
recall = {"Transformer-XL": accuracy_by_age(recall_xl)}

# %%
def draw_recall(axes, recall):
    """Accuracy by age of the answer, a curve for each model."""
    middles = [(a + b) / 2 for a, b in zip(AGES, AGES[1:])]
    figures.curves(
        axes, middles, recall, marker="o",
        xlabel="age of the answer (tokens)", ylabel="share of right answers",
    )
    axes.axhline(1 / 8, color="black", linestyle=":")
    axes.set_ylim(0, 1)


figure, axes = plt.subplots()
draw_recall(axes, recall)
axes.set_title("Transformer-XL, 32 slots (recall task; dotted: chance)")
figures.show(
    figure,
    "Share of right answers by age of the answer for Transformer-XL: high for ages up to about the memory, then "
    "falling to chance, one in eight, at an age of about 90 tokens.",
)
print("up to age " + "".join(f"{b - 1:6d}" for b in AGES[1:]))
print("right     " + "".join(f"{x:6.2f}" for x in recall["Transformer-XL"]))
assert recall["Transformer-XL"][0] > 0.5 and recall["Transformer-XL"][6:].max() < 0.2

# %% [markdown]
# A query sees 32 slots of memory and its own segment. A second layer can carry an answer once more as
# far; then it is gone, for good. A longer memory would help, and cost in proportion. The paper's
# question: can the same number of slots reach further?
#
# ## 2.2 The idea in pieces
#
# For each layer, let $h$ be the layer's input for the segment, $m$ its memory and $cm$ its compressed memory; $\circ$
# joins along time, and $f_c$ is the compression function. The paper's Algorithm 1 says:
#
# 1. attend over compressed memory, memory and segment: $a = \text{attention}(h, [cm \circ m \circ h])$;
# 2. $old$ = the oldest states of the memory, as many as come in;
# 3. $new = f_c(old)$, with one state for every $c$;
# 4. $m \leftarrow [m \circ h]$, its latest `M` states; $cm \leftarrow [cm \circ new]$, its latest `C` states.
#
# Step 1 is Transformer-XL's attention as it stands, over more keys. Steps 2 to 4 are new. Look at
# $f_c$ first.
#
# ### Five ways to compress
#
# Each takes old states `(B, O, d_model)` and returns `(B, O / c, d_model)`. **Pooling** takes the
# largest value or the mean of each group of `c` neighbours, dimension by dimension:
#
# $$
# \text{max: } new_{k} = \max_{0 \le i < c} old_{ck + i} \qquad \text{mean: } new_{k} = \frac{1}{c} \sum_{i=0}^{c-1} old_{ck + i}
# $$

# %% tags=["from-module"]
class MaxPooling(nn.Module):
    """Of c old states, the largest value in each dimension."""

    def __init__(self, d_model, rate):
        super().__init__()
        self.rate = rate

    def forward(self, old, used=None):
        """(B, O, d_model) -> (B, O / c, d_model); so for all compression functions."""
        return old.unflatten(1, (-1, self.rate)).amax(dim=2)

# %% tags=["from-module"]
class MeanPooling(MaxPooling):
    """Of c old states, the mean."""

    def forward(self, old, used=None):
        return old.unflatten(1, (-1, self.rate)).mean(dim=2)

# %% [markdown]
# A **convolution** with kernel size and stride `c` learns how to mix. Its windows do not overlap, so it
# is one matrix, applied to the `c` states of a group side by side:
# $new_k = W\,[old_{ck}; \dots; old_{ck + c - 1}] + b$, where $;$ puts them side by side in one vector.

# %% tags=["from-module"]
class Convolution(nn.Module):
    """A convolution with kernel and stride c: one matrix for c states side by side."""

    def __init__(self, d_model, rate):
        super().__init__()
        self.rate, self.kernel = rate, nn.Linear(rate * d_model, d_model)

    def forward(self, old, used=None):
        return self.kernel(old.unflatten(1, (-1, self.rate)).flatten(2))

# %% [markdown]
# **Dilated convolutions** let a state look past the border of its group first. $D_1$ and $D_2$ are
# convolutions over time with kernels of width 3: $D_1$ takes in the next places, $D_2$ those two away (its kernel has
# gaps). The dilations are 1 and 2. What they find is added to the states, and the convolution from above follows:
#
# $$
# wide = \text{relu}\left(D_2 * \text{relu}(D_1 * old)\right), \qquad
# new_k = W\,[(old + wide)_{ck}; \dots; (old + wide)_{ck + c - 1}] + b .
# $$

# %% tags=["from-module"]
class DilatedConvolution(Convolution):
    """The same, after convolutions with dilations 1 and 2 have mixed neighbours in."""

    def __init__(self, d_model, rate):
        super().__init__(d_model, rate)
        self.near = nn.Conv1d(d_model, d_model, 3, dilation=1, padding="same")
        self.far = nn.Conv1d(d_model, d_model, 3, dilation=2, padding="same")

    def forward(self, old, used=None):
        wide = self.far(self.near(old.mT).relu()).relu().mT  # (B, O, d_model)
        return super().forward(old + wide)

# %% [markdown]
# **Most-used** mixes nothing. It keeps those states that got the most attention and forgets the
# others. The attention of an old state is the average over heads and queries:
#
# $$
# u_j = \frac{1}{H\,T} \sum_{\text{heads}} \sum_{i=1}^{T}
# \text{softmax}_j\left(\frac{q_i^\top k_j}{\sqrt{d_{\text{head}}}}\right) .
# $$
#
# It keeps the `O / c` old states with the largest $u_j$, in their order. It gets $u$ as `used`; you will see where that
# comes from.

# %% tags=["from-module"]
class MostUsed(MaxPooling):
    """The O / c old states that got the most attention, used (B, O), in their order."""

    def forward(self, old, used):
        n = old.size(1) // self.rate
        if used is None or n * self.rate != old.size(1):
            raise ValueError("most-used needs old states c by c, and how each was used")
        kept = used.topk(n, dim=1).indices.sort(dim=1).values  # (B, O / c)
        return old.take_along_dim(kept[:, :, None], dim=1)

# %%
old = torch.tensor([[[1.0, 8.0], [2.0, 4.0], [5.0, 0.0], [7.0, 6.0]]])  # (1, O = 4, d_model = 2)
used = torch.tensor([[0.4, 0.3, 0.1, 0.2]])  # (1, O)
print("old      ", old[0].tolist())
print("max      ", MaxPooling(2, rate=2)(old)[0].tolist())
print("mean     ", MeanPooling(2, rate=2)(old)[0].tolist())
print("most-used", MostUsed(2, rate=2)(old, used)[0].tolist())

# %% [markdown]
# ### What trains a compression
#
# Pooling and most-used have nothing to learn. Where should the gradient for the convolutions come from?
# The prediction of the next token uses compressed states only one segment later, and still many segments
# after that. To let the gradient flow back that way (**BPTT**, back-propagation through time) you
# have to keep the graph of several segments. The paper offers two losses that need no later
# segment.
#
# **Auto-encoding.** A second map $g$ decodes the compressed states; compare with what was there:
# $\mathcal L = \lVert old - g(new) \rVert^2$. All information counts, whether anyone reads it or not.
#
# **Attention reconstruction.** Only what attention *reads* counts. Let the segment $h$ attend to the old
# states, and to the new ones, and compare what comes out:
#
# $$
# \mathcal L = \lVert\, \text{attn}(h, old) - \text{attn}(h, new)\, \rVert^2, \qquad
# \text{attn}(h, m) = \text{softmax}\left((h W_Q)(m W_K)^\top / \sqrt{d_{\text{head}}}\right)(m W_V) .
# $$
#
# By content only: there is no term for the distance, because a compressed state has another one. And
# $h$, $old$, $W_Q$, $W_K$ and $W_V$ all stand under a stop-gradient. The loss is there to fit $f_c$
# to what the model wants to read, not to make the model want less. (The paper: without it, learning
# is prevented.) In code, stop-gradient on a parameter is `weight.detach()`, inside the expression. Not
# `weight.detach_()`: that one would switch off the training of keys and values for good.
#
# Our layers normalise what they read. So the code applies `F.layer_norm` to $h$ and to the states first, with the
# layer's own gain and bias, detached as well.

# %% tags=["from-module"]
def by_content(layer, h, states):
    """Queries of h (B, T, d_model), keys and values of states (B, S, d_model).

    Everything stands still but `states`: no gradient reaches h or the layer (3.2).
    """
    norm, attention = layer.norm_attention, layer.attention
    W_q, W_kv = attention.query.weight.detach(), attention.key_value.weight.detach()
    gain, bias = norm.weight.detach(), norm.bias.detach()
    h, states = (F.layer_norm(x, gain.shape, gain, bias) for x in (h.detach(), states))
    k, values = F.linear(states, W_kv).chunk(2, dim=-1)  # (B, S, d_model)
    q = F.linear(h, W_q)  # (B, T, d_model)
    return [attention.heads(x) for x in (q, k, values)]  # (B, H, ., d_head)

# %% tags=["from-module"]
def attention_reconstruction(layer, h, old, new):
    """How differently h reads old and new: softmax((h Q)(m K)^T)(m V), no positions."""
    read = F.scaled_dot_product_attention  # -> (B, H, T, d_head)
    before, after = (read(*by_content(layer, h, states)) for states in (old, new))
    return (before - after).square().mean()

# %% tags=["from-module"]
def auto_encoding(decode, old, new):
    """How far the old states are from what g, d_model -> c * d_model, makes of new."""
    return (decode(new).reshape(old.shape) - old).square().mean()

# %% [markdown]
# The same look by content says which states are in use:

# %% tags=["from-module"]
def usage(layer, h, old):
    """The average attention that each old state gets from h, (B, O)."""
    q, k, _ = (x.flatten(0, 1) for x in by_content(layer, h, old))  # (B * H, ., d_head)
    weights = (q.size(-1) ** -0.5 * q @ k.mT).softmax(dim=-1)  # (B * H, T, O)
    return weights.unflatten(0, (len(h), -1)).mean(dim=(1, 2))

# %%
torch.manual_seed(SEED)
layer = Layer(d_model=16, n_heads=2, d_ff=32, dropout=0.0)
h, old = torch.randn(1, 8, 16), torch.randn(1, 8, 16)  # (B, T, d_model), (B, O, d_model)
for f_c_class in (MaxPooling, MeanPooling, Convolution, DilatedConvolution, MostUsed):
    new = f_c_class(16, 4)(old, usage(layer, h, old))  # (B, O / c, d_model)
    error = attention_reconstruction(layer, h, old, new).item()
    shapes = f"{tuple(old.shape)} -> {tuple(new.shape)}"
    print(f"{f_c_class.__name__:18} {shapes}  reconstruction loss {error:.3f}")
print(f"{'no change':18} reconstruction loss {attention_reconstruction(layer, h, old, old).item():.3f}")

# %% [markdown]
# ### The pipeline
#
# All compressions and losses by their names. (In the model's constructor, lines that begin with `inputs.`
# refuse what cannot work and name what would, in the same words for all the models of the book.)

# %%
COMPRESSIONS = {
    "max": MaxPooling, "mean": MeanPooling, "conv": Convolution,
    "dilated": DilatedConvolution, "most-used": MostUsed,
}  # fmt: skip
LOSSES = "attention", "auto-encoding", "bptt", None

# %% [markdown]
# Now steps 2 to 4. Each layer has a `Memory` of its own, with its own $f_c$. Follow the lines:
# the segment enters, whole groups of `c` leave on the other side, they are compressed, the loss compares,
# and both memories are cut to their sizes. When a segment is not a multiple of `c`, one group leaves a little earlier, so that
# no state is lost and the memory never holds more than `mem_len`.
#
# `new.detach()` keeps the prediction of the next token away from $f_c$, except under BPTT.

# %% tags=["from-module"]
class Memory(nn.Module):
    """Memory and compressed memory of one layer, and how one becomes the other."""

    def __init__(self, d_model, rate, compression, loss):
        super().__init__()
        self.rate, self.loss = rate, loss
        self.compress = COMPRESSIONS[compression](d_model, rate)
        if loss == "auto-encoding":
            self.decode = nn.Linear(d_model, rate * d_model)  # g

    def forward(self, layer, h, compressed, recent, mem_len, compressed_len):
        """h (B, T, d_model) enters -> (B, C, d_model), (B, M, d_model), loss."""
        recent = torch.cat([recent, h.detach()], dim=1)  # (B, M + T, d_model)
        excess = max(0, recent.size(1) - mem_len)
        n_old = math.ceil(excess / self.rate) * self.rate  # whole groups leave
        if n_old == 0:
            return compressed, recent, h.new_zeros(())
        old, recent = recent[:, :n_old], recent[:, n_old:]
        used = usage(layer, h, old) if isinstance(self.compress, MostUsed) else None
        new = self.compress(old, used)  # (B, O / c, d_model)
        loss = h.new_zeros(())
        if self.training and self.loss == "attention":
            loss = attention_reconstruction(layer, h, old, new)
        elif self.training and self.loss == "auto-encoding":
            loss = auto_encoding(self.decode, old, new)
        if self.loss != "bptt":
            new = new.detach()
        compressed = torch.cat([compressed, new], dim=1)  # (B, C + O / c, d_model)
        first = max(0, compressed.size(1) - compressed_len)
        return compressed[:, first:], recent, loss

# %% [markdown]
# A longer text is read in pieces of `mem_len` tokens.

# %% tags=["from-module"]
def pieces(model, tokens):
    """Tokens (B, T) in pieces of mem_len; they and both lengths, checked."""
    rate = model.memories[0].rate
    inputs.check_sizes({"compressed_len": model.compressed_len})
    inputs.check_multiple("mem_len", model.mem_len, "compression_rate", rate)
    inputs.check_tokens(tokens, model.embedding.num_embeddings)
    return tokens.split(model.mem_len, dim=1)

# %% [markdown]
# A piece of text goes up through the layers as in Transformer-XL, with other bookkeeping. The distance of
# a slot is its place in the row of boxes, as in the paper: a compressed state of four tokens counts as one
# step.

# %% tags=["from-module"]
def read_piece(model, tokens, memory):
    """At most mem_len tokens -> states (B, T, d_model), memory, loss, with graphs."""
    x = model.dropout(model.embedding(tokens))  # (B, T, d_model)
    nothing_yet = [(x[:, :0], x[:, :0])] * len(model.layers)  # (B, 0, d_model) each
    memory = inputs.checked_memory(memory, nothing_yet)
    surplus = max(0, memory[0][0].size(1) - model.compressed_len)  # if it was lowered
    memory = [(compressed[:, surplus:], recent) for compressed, recent in memory]
    n_remembered = sum(part.size(1) for part in memory[0])  # C + M
    mask = attention_mask(distances(x.size(1), n_remembered, x.device))  # (T, K)
    columns = torch.arange(mask.size(1), -1, -1, device=x.device)  # K ... 0
    R = model.dropout(sinusoid(columns, x.size(-1)).to(x.dtype))  # (K + 1, d_model)
    updated, losses, sizes = [], [], (model.mem_len, model.compressed_len)
    stack = zip(model.layers, model.memories, memory, strict=True)
    for layer, remember, (compressed, recent) in stack:
        context = torch.cat([compressed, recent, x], dim=1)  # (B, K, d_model)
        *parts, loss = remember(layer, x, compressed, recent, *sizes)
        updated.append(tuple(parts)), losses.append(loss)
        x = layer(context, R, mask)
    return x, updated, sum(losses)

# %% [markdown]
# The model holds it together. A text longer than the memory is read in pieces, and all pieces of one call
# stand in one graph: that is what BPTT needs. What is handed out is detached.

# %% tags=["from-module"]
class CompressiveTransformer(nn.Module):
    """A language model with a memory in each layer, and a compressed memory behind it.

    tokens (B, T) int64, memory -> logits (B, T, vocab_size), memory, and in training
    a compression loss, a scalar. There is none with loss=None, nor with "bptt", which
    trains f_c by the logits of later pieces (pass two or more of mem_len at once).
    Memory, for each layer: detached (B, C, d_model), (B, M, d_model); both lengths may
    be changed. Until something is compressed f_c has no gradient, as DDP must know.
    """

    def __init__(
        self, vocab_size, d_model=128, n_heads=4, n_layers=4, d_ff=512,
        mem_len=64, compressed_len=64, compression_rate=4, compression="conv",
        loss="attention", dropout=0.0,
    ):  # fmt: skip
        super().__init__()
        inputs.check_sizes(locals(), even=["d_model"])
        inputs.check_one_of("compression", compression, COMPRESSIONS)
        inputs.check_one_of("loss", loss, LOSSES)
        inputs.check_multiple("mem_len", mem_len, "compression_rate", compression_rate)
        self.mem_len, self.compressed_len = mem_len, compressed_len
        self.embedding = nn.Embedding(vocab_size, d_model)
        self.dropout = nn.Dropout(dropout)
        stack = (Layer(d_model, n_heads, d_ff, dropout) for _ in range(n_layers))
        self.layers = nn.ModuleList(stack)
        sizes = d_model, compression_rate, compression, loss
        self.memories = nn.ModuleList(Memory(*sizes) for _ in range(n_layers))
        self.norm, self.head = nn.LayerNorm(d_model), nn.Linear(d_model, vocab_size)

    loss = property(lambda self: self.memories[0].loss)  # chosen when it was built

    def clip_groups(self):  # the language model's parameters, and those that compress
        compression = list(self.memories.parameters())
        ids = {id(p) for p in compression}
        return [[p for p in self.parameters() if id(p) not in ids], compression]

    def forward(self, tokens, memory=None):
        states, losses = [], []
        for piece in pieces(self, tokens):
            x, memory, loss = read_piece(self, piece, memory)
            states.append(x), losses.append(loss)
        logits = self.head(self.norm(torch.cat(states, dim=1)))  # (B, T, vocab_size)
        memory = [tuple(part.detach().clone() for part in parts) for parts in memory]
        own = self.training and self.loss in ("attention", "auto-encoding")
        return (logits, memory, sum(losses)) if own else (logits, memory)

# %%
torch.manual_seed(SEED)
tiny = CompressiveTransformer(
    vocab_size=10, d_model=16, n_heads=2, n_layers=3, d_ff=32,
    mem_len=6, compressed_len=4, compression_rate=3,
)
memory, text = None, torch.randint(10, (2, 24))  # (B, 24)
for segment in text.split(3, dim=1):
    logits, memory, loss = tiny(segment, memory)
    compressed, recent = memory[0]
    print(f"compressed {tuple(compressed.shape)}  memory {tuple(recent.shape)}  loss {loss.item():.3f}")

# %% [markdown]
# ### Nothing compressed, nothing changed
#
# At rate 1, the mean of a group is the state itself. Then the two memories are one, and the model must be
# Transformer-XL with a memory of `M + C`. The parameters even have the same names.

# %%
@torch.no_grad()
def read(model, text, segment_len):
    """Logits of a text (B, N), read in segments, with memory from one to the next."""
    memory, logits = None, []
    for segment in text.split(segment_len, dim=1):
        out, memory, *_ = model(segment, memory)
        logits.append(out)
    return torch.cat(logits, dim=1)  # (B, N, vocab_size)


sizes = dict(vocab_size=10, d_model=16, n_heads=2, n_layers=3, d_ff=32)
rate_one = CompressiveTransformer(
    **sizes, mem_len=6, compressed_len=4, compression_rate=1, compression="mean", loss=None
).double()
longer = TransformerXL(**sizes, mem_len=10).double()
longer.load_state_dict(rate_one.state_dict())
difference = (read(rate_one, text, 3) - read(longer, text, 3)).abs().max()
print(f"largest difference: {difference:.1e}")
assert difference < 1e-10

# %% [markdown]
# ### How far back?
#
# A compressed memory of `C` slots stands for `c * C` tokens. So the paper's **temporal range** is
# $L \cdot (M + c \cdot C)$, against $L \cdot M$ for Transformer-XL. Count it: change one token of the past,
# and see whether the last prediction feels it.

# %%
def felt(model, segment_len=4, n=72):
    """For each position of a text of n tokens: does changing it change the last logits?"""
    model, tokens = model.double().eval(), torch.randint(10, (1, n))
    before = read(model, tokens, segment_len)[:, -1]  # (1, vocab_size)
    changed = (tokens + torch.eye(n, dtype=torch.int64)) % 10  # (n, n): row p differs at position p
    difference = read(model, changed, segment_len)[:, -1] - before  # (n, vocab_size)
    return difference.abs().amax(dim=1) > 1e-12  # (n,): more than rounding


sizes = dict(vocab_size=10, d_model=16, n_heads=2, n_layers=2, d_ff=32)
cases = {"Transformer-XL, 8 slots": (TransformerXL(**sizes, mem_len=8), 4 + 2 * 8)}
for c in (1, 2, 4):
    model = CompressiveTransformer(
        **sizes, mem_len=4, compressed_len=4, compression_rate=c, compression="mean", loss=None
    )
    cases[f"4 + 4 slots, c = {c}"] = (model, 4 + 2 * (4 + c * 4))
rows = torch.stack([felt(model) for model, _ in cases.values()])

figure, axes = plt.subplots(figsize=(6.4, 2.4))
figures.matrix(axes, rows, xlabel="position in the text (tokens)", ylabel="", cmap="Blues", vmax=1.4)
axes.set_yticks(range(len(cases)), labels=list(cases))
axes.set_title("Dark: the last prediction feels a change here")
figures.show(
    figure,
    "One row a model, all with eight slots a layer and two layers. Transformer-XL and rate 1 feel the last 20 "
    "positions, rate 2 the last 28, rate 4 the last 44.",
)
for (name, (_, expected)), row in zip(cases.items(), rows):
    print(f"{name:24} reach {row.sum():2d} tokens, segment + L * (M + c * C) = {expected}")
    assert row.sum() == expected

# %% [markdown]
# ### Which parameters does each loss touch?
#
# A question that users of every public version ask. Take the gradient of each loss alone, and look where it arrives.

# %%
def part_of(name):
    """Which part of the model a parameter belongs to."""
    if ".compress." in name:
        return "f_c"
    if ".decode." in name:
        return "g"
    return "layers" if name.startswith("layers.") else "embedding, head"


def touched(loss, which):
    """Norm of the gradient that reaches each part: of the loss of the logits, or of the compression."""
    torch.manual_seed(SEED)
    slots = dict(mem_len=4, compressed_len=4, compression_rate=2)
    model = CompressiveTransformer(10, 16, 2, 2, 32, **slots, loss=loss)
    logits, _, *aux = model(text)  # 24 tokens: six pieces
    next_token = F.cross_entropy(logits[:, :-1].flatten(0, 1), text[:, 1:].flatten())
    (next_token if which == "logits" else aux[0]).backward()
    norms = dict.fromkeys(["embedding, head", "layers", "f_c", "g"], 0.0)
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            norms[part_of(name)] += parameter.grad.norm().item()
    return norms


cases = {
    "next token": touched("auto-encoding", "logits"),
    "next token, under BPTT": touched("bptt", "logits"),
    "attention reconstruction": touched("attention", "compression"),
    "auto-encoding": touched("auto-encoding", "compression"),
}

# %%
arrives = torch.tensor([[float(norm > 0) for norm in norms.values()] for norms in cases.values()])
figure, axes = plt.subplots(figsize=(6.4, 2.4))
figures.matrix(axes, arrives, xlabel="", ylabel="", cmap="Blues", vmax=1.4)
axes.set_yticks(range(4), labels=list(cases))
axes.set_xticks(range(4), labels=["embedding, head", "layers", "$f_c$", "$g$"])
axes.set_title("Dark: the gradient of this loss arrives here")
figures.show(
    figure,
    "A table of losses against parts of the model. The loss of the next token reaches embedding, head and "
    "layers, and the compression function only under BPTT. Attention reconstruction reaches the "
    "compression function alone, auto-encoding that and its decoder.",
)
assert arrives.tolist() == [[1, 1, 0, 0], [1, 1, 1, 0], [0, 0, 1, 0], [0, 0, 1, 1]]

# %% [markdown]
# One thing is left that could mix the two losses: clipping. If you clip all gradients together, a large
# compression gradient makes the step of the language model smaller. So the model tells the training loop, by
# `clip_groups`, to clip the two groups apart.
#
# ## 2.3 Train it
#
# Tiny Shakespeare, and two models with equal slots: Transformer-XL with a memory of 48, the
# Compressive Transformer with a memory of 24 and a compressed memory of 24, at rate 4, with the
# convolution and attention reconstruction. Segments have 24 characters, so that segment, memory
# and compressed memory are three zones of equal size.

# %%
corpus = corpora.tiny_shakespeare()
T = 24
STEPS = 800
SIZES = dict(vocab_size=len(corpus.vocab), d_model=96, n_heads=4, n_layers=3, d_ff=384)


def fit(model, steps=STEPS, **kw):
    """Train a model on segments of T characters; returns its losses in nats per character."""
    options = dict(batch_size=32, segment_len=T) | kw
    return training.train(model, corpus.train, steps=steps, **options)["loss"]


torch.manual_seed(SEED)
xl = TransformerXL(**SIZES, mem_len=48).to(device)
history = {"Transformer-XL": fit(xl)}
torch.manual_seed(SEED)
compressive = CompressiveTransformer(**SIZES, mem_len=24, compressed_len=24, compression_rate=4)
history["Compressive"] = fit(compressive.to(device))
for name, part in [("Transformer-XL", xl), ("Compressive", compressive), ("f_c", compressive.memories)]:
    print(f"{name:15} {sum(p.numel() for p in part.parameters()):,} parameters")

# %%
figure, axes = plt.subplots()
smooth = {label: figures.smooth(losses, 50) for label, losses in history.items()}
figures.curves(
    axes, range(50, STEPS + 1), smooth,
    xlabel="training step", ylabel="training loss (nats per character)",
)
axes.set_ylim(top=2.6)
axes.set_title(f"Running mean over 50 steps ({corpus.name})")
figures.show(
    figure,
    "Training loss of Transformer-XL and the Compressive Transformer over the steps: the two curves "
    "lie almost on each other.",
)
valid = {
    name: training.evaluate(model, corpus.valid, segment_len=T)
    for name, model in [("Transformer-XL", xl), ("Compressive", compressive)]
}
for name, loss in valid.items():
    print(f"{name:15} validation loss {loss:.3f} nats per character")
assert abs(valid["Compressive"] - valid["Transformer-XL"]) < 0.05

# %% [markdown]
# At equal slots the two do equally well on this text. Chapter 1 showed why: what stands more than
# one or two lines back helps a small model little. The paper's gain on books (PG-19: perplexity 33.6 against 36.3)
# needs long training on long texts. What compression does to *reach*, you will see in the recall task.
#
# A sample:

# %%
prompt = corpus.valid[:64]
sample = training.generate(compressive, prompt, 300, temperature=0.8)
print(corpus.vocab.decode(sample[64:]))

# %% [markdown]
# ## 2.4 The claims, one by one
#
# ### The same slots reach further
#
# Back to the recall task, with the 32 slots of section 2.1: a memory of 16 and a compressed memory of 16.
# First the convolution with attention reconstruction at rate 4, then mean pooling at the rates 2, 4
# and 8. The direct view of a query is then `16 + 16 * c` tokens and its segment.

# %%
def compressed_recall(rate, compression="mean", loss=None):
    """A Compressive Transformer with 16 + 16 slots, trained on the recall task."""
    torch.manual_seed(SEED)
    slots = dict(mem_len=16, compressed_len=16, compression_rate=rate)
    model = CompressiveTransformer(**RECALL, **slots, compression=compression, loss=loss)
    return learn_recall(model)


recallers = {"conv, attention, c = 4": compressed_recall(4, "conv", "attention")}
for rate in (2, 4, 8):
    recallers[f"mean, c = {rate}"] = compressed_recall(rate)
recall |= {name: accuracy_by_age(model) for name, model in recallers.items()}

# %%
figure, axes = plt.subplots(figsize=(6.4, 4.6))
draw_recall(axes, recall)
axes.get_legend().remove()
figure.legend(loc="outside lower center", ncols=2)
axes.set_title("32 slots each (recall task; dotted: chance)")
figures.show(
    figure,
    "Share of right answers by age for five models with 32 slots. Transformer-XL falls to chance first; with "
    "compression the fall comes later, the later the higher the rate.",
)
print("up to age              " + "".join(f"{b - 1:6d}" for b in AGES[1:]))
for name, values in recall.items():
    print(f"{name:23}" + "".join(f"{x:6.2f}" for x in values))

# %%
chance = 1 / 8
reach = 2 * 32  # of Transformer-XL: layers times memory
bucket = AGES.index(2 * reach + 1) - 1  # the ages up to twice that
print(f"ages {AGES[bucket]} to {AGES[bucket + 1] - 1}, in multiples of chance:")
for name, values in recall.items():
    print(f"{name:23}{values[bucket] / chance:.1f}")
xl_recall, mean_4, mean_8 = (recall[n] for n in ("Transformer-XL", "mean, c = 4", "mean, c = 8"))
assert xl_recall[bucket] < 1.4 * chance and mean_8[bucket] > 3 * chance  # twice the reach
conv_4 = recall["conv, attention, c = 4"]
assert min(mean_4[4], conv_4[4]) > xl_recall[4] + 0.2  # ages 65 to 80
assert mean_4[4] > conv_4[4] + 0.03  # learned, and no better
assert xl_recall[1] > mean_8[2:8].mean() + 0.1  # the price: detail

# %% [markdown]
# What came out is what the pipeline promises: the edge moves out with the rate. Each curve holds about to the end of its
# direct view. It does not break off there. It falls over the next buckets, since a second layer carries some answers
# on; the mean at rate 4 stays above chance to the end of the plot. At twice the reach of Transformer-XL, rate 8 still
# answers far more questions than a guess would, with the same 32 slots. You also see the price. Inside its memory
# Transformer-XL makes few mistakes; a state that is one of eight in a mean is read with more. Coarser, but further: that
# is the trade.
#
# The learned convolution does worse here than the plain mean. That is not the order of the paper, where the
# convolution with attention reconstruction is best. Why, this notebook does not settle. Its matrix starts
# at random, and learns to give back what attention reads *now*; the mean hands something of every state on from the first step.
#
# ### Where it looks: the attention-bucket figure
#
# The paper's Figure 2 cuts the three zones into six buckets each and averages the attention over
# 20,000 sequences. Buckets 1 to 6 are the compressed memory, oldest first; 7 to 12 the memory; 13 to 18 the
# segment. The paper found most attention on the segment, and an *increase* on the way from the oldest
# memory to the compressed memory: the model has something to do there. Here is ours. On the recall task a zone has 16
# slots, which do not divide by six: there it has four buckets, so that a bucket is four slots in both panels.

# %%
@torch.inference_mode()
def attention_by_bucket(model, segments, n_buckets, full=10):
    """Mean attention mass in each bucket of neighbouring slots, for each layer, (L, n_buckets)."""
    memory, total, n_counted = None, 0, 0
    for n, (tokens, *_) in enumerate(segments):
        with measure.record_attention(model) as weights:
            _, memory = model(tokens.to(device), memory)
        if n >= full:  # both memories hold all that they can
            total += torch.stack([w.mean(dim=(0, 1, 2)) for w in weights]).cpu()  # (L, K)
            n_counted += 1
    return (total / n_counted).unflatten(1, (n_buckets, -1)).sum(dim=2)


text_segments = (pair for _, pair in zip(range(70), corpora.lanes(corpus.valid, 32, T)))
recall_segments = (batch for _, batch in zip(range(70), tasks.recall(32, 16, SEED + 3)))
buckets = {
    f"{corpus.name}, c = 4": attention_by_bucket(compressive, text_segments, 18),
    "recall task, c = 8": attention_by_bucket(recallers["mean, c = 8"], recall_segments, 12),
}
for by_layer in buckets.values():
    assert torch.allclose(by_layer.sum(dim=1), torch.ones(len(by_layer)), atol=1e-4)  # all attention is there

# %%
def draw_buckets(axes, by_layer):
    """Bars: the mean over layers of the attention in each bucket; markers: the layers."""
    size = by_layer.size(1) // 3
    places = range(1, 3 * size + 1)
    colors = [color for color in (figures.PINK, figures.ORANGE, figures.BLUE) for _ in range(size)]
    axes.bar(places, by_layer.mean(dim=0), color=colors)
    for n, (row, marker) in enumerate(zip(by_layer, "o^s")):
        look = dict(color="black", markerfacecolor="white", markeredgewidth=0.8, markersize=4)
        axes.plot(places, row, marker, label=f"layer {n + 1}", **look)
    borders = [1, size, size + 1, 2 * size, 2 * size + 1, 3 * size]
    axes.set(ylim=(0, None), ylabel="share of attention", xticks=borders)
    axes.grid(axis="x", visible=False)


figure, axes = plt.subplots(2, 1, figsize=(6.4, 6.0))
for ax, (title, by_layer), corner in zip(axes, buckets.items(), ("upper left", "upper right")):
    draw_buckets(ax, by_layer)
    ax.legend(loc=corner)
    ax.set_title(f"Attention by bucket ({title})")
axes[1].set_xlabel("bucket, oldest first: compressed memory, memory, segment")
figures.show(
    figure,
    "Bars of mean attention by bucket: compressed memory, memory and segment, oldest first, for the text above and "
    "for the recall task below. A circle, a triangle and a square show the single layers. On the text the segment "
    "gets most; on the recall task the two memories do.",
)

# %%
zones = {}
for title, by_layer in buckets.items():
    mean = by_layer.mean(dim=0)
    size = len(mean) // 3
    zones[title] = mean.unflatten(0, (3, size)).sum(dim=1)
    shares = zip(("compressed memory", "memory", "segment"), zones[title])
    print(f"{title}: " + ", ".join(f"{zone} {share:.3f}" for zone, share in shares))
    newest_first = "  ".join(f"{share:.4f}" for share in mean[: 2 * size].flip(0))
    print(f"  buckets {2 * size} to 1: {newest_first}")
text_zones, recall_zones = zones.values()
if corpus.name == "Tiny Shakespeare":  # the synthetic play does not show it
    mean = next(iter(buckets.values())).mean(dim=0)
    assert mean[:6].mean() > mean[6:11].mean()  # without the newest bucket of the memory
    assert mean[0] > 1.1 * mean[6:12].min()
assert text_zones[2] > 0.5 > text_zones[:2].max()
assert recall_zones[0] > text_zones[0] + 0.1 and recall_zones[:2].sum() > 0.6

# %% [markdown]
# On Shakespeare the segment gets most of the attention, and what is left is spread over both memories. Go back from
# bucket 12: attention falls within the memory, then rises slowly all the way to the oldest compressed slots. The step at
# the border, from bucket 7 to bucket 6, hardly stands out from the rise around it. So the compressed memory is read, and
# a bucket of it as much as one of the memory (the newest apart). But the paper's rise *at the border* does not show.
#
# Within the segment the newest buckets get less. That is the mask: a late key is hidden from all queries before it, and
# only the last few see the newest bucket.
#
# And attention goes where there is something to find. On the recall task, where answers lie far back, the model lives
# off its two memories, and the compressed one gets about as much as the other.
#
# ### Which compression, which loss?
#
# The paper's Table 5 has seven rows. Here they are with smaller models and short training. Under BPTT, two pieces are read
# in each step, half as many side by side: the same number of characters.
#
# The reconstruction error is measured the same way for all rows, on the validation text: the attention
# reconstruction loss, divided by the mean square of what was to be reconstructed.

# %%
@torch.inference_mode()
def reconstruction_error(model, n_segments=20):
    """Relative error of what attention reads after compression, for each layer, (L,)."""
    errors = [[] for _ in model.layers]

    def compare(n, remember, handed, outputs):
        layer, h, _, recent, *_ = handed
        n_old = recent.size(1) + h.size(1) - outputs[1].size(1)
        if n_old:
            old, new = recent[:, :n_old], outputs[0][:, -n_old // remember.rate :]
            nothing = F.scaled_dot_product_attention(*by_content(layer, h, old)).square().mean()
            errors[n].append((attention_reconstruction(layer, h, old, new) / nothing).item())

    hooks = [
        remember.register_forward_hook(lambda *args, n=n: compare(n, *args))
        for n, remember in enumerate(model.memories)
    ]
    _ = training.evaluate(model, corpus.valid[: 32 * n_segments * T + 1], segment_len=T)
    for hook in hooks:
        hook.remove()
    return torch.tensor(errors).mean(dim=1)


# %%
SMALL = SIZES | dict(d_model=64, n_layers=2, d_ff=256)
paper = {
    ("conv", "bptt"): 0.996, ("max", None): 0.986, ("conv", "auto-encoding"): 0.984,
    ("mean", None): 0.982, ("most-used", None): 0.980, ("dilated", "attention"): 0.977,
    ("conv", "attention"): 0.973,
}  # bits per character on enwik8, Table 5

def try_out(compression, loss, seed):
    """Validation loss and reconstruction error after a short training."""
    torch.manual_seed(seed)
    slots = dict(mem_len=T, compressed_len=T, compression_rate=4)
    model = CompressiveTransformer(**SMALL, **slots, compression=compression, loss=loss).to(device)
    pieces = dict(segment_len=2 * T, batch_size=16) if loss == "bptt" else {}
    _ = fit(model, steps=300, **pieces)
    validation_loss = training.evaluate(model, corpus.valid, segment_len=T)
    return validation_loss, reconstruction_error(model).mean().item()


grid = {names: try_out(*names, SEED) for names in paper}
other_seeds = [try_out("conv", "attention", SEED + n)[0] for n in (1, 2)]

# %%
print("compression  loss            validation  reconstruction   the paper")
print("                             loss        error            (bits per character)")
for (compression, loss), (nats, error) in grid.items():
    bits = paper[compression, loss]
    print(f"{compression:12} {loss or '-':15} {nats:.3f}       {error:.3f}            {bits:.3f}")
nats, errors = ({names: values[n] for names, values in grid.items()} for n in (0, 1))
spread = max(nats.values()) - min(nats.values())
print(f"validation losses of the rows differ by up to {spread:.3f}")
same = [nats["conv", "attention"], *other_seeds]
print(f"three seeds of the last row differ by up to {max(same) - min(same):.3f}")

# %%
figure, axes = plt.subplots(1, 2, figsize=(6.4, 3.4), sharey=True)
names = [f"{compression}, {loss}" if loss else compression for compression, loss in grid]
for ax, values in zip(axes, (nats, errors)):
    ax.plot(list(values.values()), range(len(names)), "o")
axes[0].set_xlabel("validation loss\n(nats per character)")
axes[1].set_xlabel("reconstruction error\n(relative)")
axes[0].set_yticks(range(len(names)), labels=names)
axes[0].invert_yaxis()
figure.suptitle(f"Seven ways to compress, c = 4 ({corpus.name})")
figures.show(
    figure,
    "Two panels with a dot for each of the seven pairs of compression and loss: validation losses lie "
    "close together, reconstruction errors far apart.",
)
trained = [error for (_, loss), error in errors.items() if loss == "attention"]
others = [error for (_, loss), error in errors.items() if loss != "attention"]
assert max(trained) < min(others) - 0.1
poolings = [errors[name, None] for name in ("max", "mean", "most-used")]
assert min(errors["conv", "auto-encoding"], errors["conv", "bptt"]) > 1.1 * max(poolings) > 0.8
assert spread < 0.1

# %% [markdown]
# **Validation loss.** The paper's rows differ by 2 % after long training. Here seven rows lie wider apart than three
# seeds of a single row. But seven draws spread wider than three from noise alone, so their order says nothing. This text
# at this size cannot tell the compressions apart.
#
# **Reconstruction.** Here the rows do differ. What is trained by attention reconstruction is best at it, as it must be. An
# error of 1 means that attention might as well have read zeros: the mean stays just below that, maximum and most-used just
# above. The lesson is in the two convolutions with another loss, which are far beyond. Under auto-encoding the states may hold
# everything, since $g$ can decode them. But attention does not read through $g$. It reads with the layer's own keys and
# values, and nothing has told $f_c$ to write in their language. That explains auto-encoding only: under BPTT $f_c$ is
# trained through these very keys and values, but for what helps to predict, not for what attention read before.
#
# **Where the text is cut.** The poolings and the plain convolution see a group at a time. The dilated convolution sees
# only those states that leave together, with zeros beyond the first and the last. So its result depends on
# how the text is cut: a whole segment leaves at once in training, and a single group when you generate token by token.
# Most-used depends on the cut as well: it chooses among the states that leave together.
#
# ### Reconstruction, layer by layer
#
# The paper (section 5.4) finds its first layer highly compressible, and no clear trend with depth. Ours:

# %%
by_layer = reconstruction_error(compressive)
figure, axes = plt.subplots(figsize=(6.4, 2.8))
figures.bars(
    axes, {f"layer {n + 1}": error.item() for n, error in enumerate(by_layer)},
    ylabel="reconstruction error (relative)", number="{:.3f}",
)
axes.set_title(f"Error of what attention reads, c = 4 ({corpus.name})")
figures.show(figure, "Bars of the relative reconstruction error of each of the three layers.")
print("  ".join(f"layer {n + 1}: {error:.3f}" for n, error in enumerate(by_layer)))
assert by_layer.max() < 2 * by_layer.min()

# %% [markdown]
# No clear trend with depth here either. But our first layer is no easier to compress than the others: its states are
# single characters, and four of them do not fit into the place of one without loss.
#
# ### Rare words
#
# On WikiText-103 the paper's gain is largest for rare words (Table 7): a name that stood far back is worth
# remembering. On our scale: add up the losses of the characters of each word and of the character after it, which ends
# the word. Sort the words by how often they stand in the training text. The gain is in perplexity a word, as in the paper.
# Both models read the same words, so take the differences word by word: their mean has a standard error.

# %%
def word_losses(model):
    """[(word, loss in nats, its characters and the one after it), ...] for the validation text."""
    losses = training.token_losses(model, corpus.valid, segment_len=T).flatten()  # of character 1, 2, ...
    text = corpus.vocab.decode(corpus.valid[1 : len(losses) + 1])
    words = [(m.group(), m.start(), m.end() + 1) for m in re.finditer(r"[A-Za-z']+", text)]
    return [(word, losses[a:b].sum().item()) for word, a, b in words]


counts = Counter(re.findall(r"[A-Za-z']+", corpus.vocab.decode(corpus.train)))
groups = {
    "over 1,000": (1000, 10**9), "100–1,000": (100, 1000), "10–100": (10, 100),
    "1–10": (1, 10), "never": (0, 1),
}  # fmt: skip
of_xl, of_compressive = word_losses(xl), word_losses(compressive)
rows = []
print("seen in training   words   nats a word       difference         gain in")
print("                           XL     Compr.    (standard error)   perplexity (%)")
for name, (low, high) in {**groups, "all": (0, 10**9)}.items():
    here = [low <= counts[word] < high for word, _ in of_xl]
    a, b = (
        torch.tensor([loss for (_, loss), is_here in zip(words, here) if is_here])
        for words in (of_xl, of_compressive)
    )
    difference = (b - a).mean().item()
    error = (b - a).std().item() / math.sqrt(len(a))
    rows.append((a.mean().item(), difference))
    print(
        f"{name:15} {len(a):8,}   {a.mean():6.3f} {b.mean():6.3f}   {difference:+7.3f} ({error:.3f})"
        f"   {100 * (1 - math.exp(difference)):+10.1f}"
    )
cost_of, differences = zip(*rows)
assert list(cost_of[:5]) == sorted(cost_of[:5])  # rarer words cost more
assert max(map(abs, differences[:2])) < 0.2 and abs(differences[-1]) < 0.3  # nats a word

# %% [markdown]
# The paper's gains grow from 2.6 % for the most frequent words to about 20 % for the rare ones. Ours do not grow in any such
# order. Mind what the errors say: how far a mean would move with other words, not with another training. Change
# `SEED`, and the rows move by more than their errors, those of the rare words most of all. Even the sign over all words
# can turn. So no single percentage here is evidence, of either sign. Rare words do cost more, but a memory of a few
# lines does not hold the place where they stood before.
#
# ### Dropping the learning rate
#
# The paper's Figure 3 is a warning: lower the learning rate far in mid-training, or set it to 0, and the
# training loss gets *worse*. The authors put it down to "the online updating of parameters whilst processing long
# contiguous articles": weights that keep learning adapt to the article that is being read, and a tiny rate takes that
# away. Updating the weights less often (every four steps, with the gradients added up) helps instead. Try it: train at a
# constant rate, then go on in four ways from the same point, on the same text.

# %%
def go_on(model, optimizer, segments, n_steps, every=1):
    """Train on, with one update every `every` segments; returns the losses. The memory starts empty."""
    memory, losses = None, []
    for n in range(n_steps):
        tokens, targets, at_start = next(segments)
        logits, memory, aux = model(tokens, None if at_start else memory)
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
        ((loss + aux) / every).backward()
        if (n + 1) % every == 0:
            for group in model.clip_groups():
                nn.utils.clip_grad_norm_(group, 1.0)
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
    return losses


torch.manual_seed(SEED)
base = CompressiveTransformer(**SMALL, mem_len=T, compressed_len=T, compression_rate=4).to(device)
optimizer = torch.optim.AdamW(base.parameters(), lr=2e-3)
segments = list(zip(range(750), training.endless(corpus.train.to(device), 32, T)))
common = go_on(base, optimizer, iter([segment for _, segment in segments[:450]]), 450)

after = {}
ways = [("as before", 1, 1), ("rate / 30", 1 / 30, 1), ("rate 0", 0, 1), ("update every 4", 1, 4)]
for label, factor, every in ways:
    model, its_optimizer = copy.deepcopy((base, optimizer))
    for group in its_optimizer.param_groups:
        group["lr"] *= factor
    after[label] = go_on(model, its_optimizer, iter([segment for _, segment in segments[450:]]), 300, every)

# %%
figure, axes = plt.subplots()
shown = {label: figures.smooth(common[-100:] + losses, 50) for label, losses in after.items()}
figures.curves(
    axes, range(400, 751), shown,
    xlabel="training step", ylabel="training loss (nats per character)",
)
axes.axvline(450, color="black", linestyle=":")
axes.get_legend().remove()
figure.legend(loc="outside lower center", ncols=4)
axes.set_title(f"Four ways to go on from step 450 (dotted; {corpus.name})")
figures.show(
    figure,
    "Training loss before and after the change at step 450, as running means over 50 steps. The four curves share "
    "their ups and downs. To go on as before ends lowest, then to update less often, then the lower rate; rate 0 "
    "ends highest.",
)
means = {label: torch.tensor(losses).view(6, 50).mean(dim=1) for label, losses in after.items()}
print("steps after the change     " + "".join(f"{n:3}-{n + 49:<5}" for n in range(1, 300, 50)))
print("as before                  " + "".join(f"{x:<9.3f}" for x in means["as before"]))
more = {label: row - means["as before"] for label, row in means.items() if label != "as before"}
for label, row in more.items():
    print(f"{label:14} in addition " + "".join(f"{x:<+9.3f}" for x in row))
assert min(row.min() for row in more.values()) > -0.01  # on the same text, none is ever better
assert more["rate 0"][-1] > more["rate / 30"][-1] + 0.02 > more["update every 4"][-1] + 0.03
assert more["rate 0"][0] < more["rate 0"][-1] / 2  # the gap opens slowly

# %% [markdown]
# This does not reproduce here. All four read the same text, so the ups and downs that they share are the text's: look
# at the differences. Beside going on as before, the lower rate is better in no stretch of fifty steps. It falls behind,
# and rate 0 falls behind further. But the gap opens slowly, as it must where the others learn on: a model that had lived
# off its latest updates would lose at once. In the end, to update less often costs least, but it costs.
# The paper saw its effect in long trainings, at rates where the weights hardly move any more. Seven hundred steps are not
# that regime, so take this as "not seen", not as "refuted".
#
# ### What the memory costs
#
# What you pay for is **slots**. Each is a state to hold, `4 * B * d_model` bytes a layer, and a key to score,
# `B * H * T` scores a layer. What you get is **range**. Compare at equal range a layer: Transformer-XL with a
# memory of `n` against memories of `M = C = n / (1 + c)`.

# %%
@torch.inference_mode()
def cost(model, n_slots):
    """For B texts and a segment of T, all slots full: bytes held, scores computed, seconds."""
    B, memory = 4, None
    while memory is None or sum(part.size(1) for part in slots_of(memory[0])) < n_slots:
        _, memory = model(corpus.valid[: B * 192].view(B, 192).to(device), memory)
    tokens = corpus.valid[: B * T].view(B, T).to(device)
    with measure.record_attention(model) as weights:
        model(tokens, memory)
    scores = sum(w.numel() for w in weights)
    seconds = measure.seconds(lambda: model(tokens, memory), device=device)
    return measure.kept_alive(memory), scores, seconds


def slots_of(memory):
    """The tensors of one layer's memory: one for Transformer-XL, two for the Compressive Transformer."""
    return memory if isinstance(memory, tuple) else (memory,)


ranges = [240, 480, 960]
slots, costs = {}, {}
for c in (None, 2, 3, 4):
    label = "Transformer-XL" if c is None else f"Compressive, c = {c}"
    slots[label] = [n if c is None else 2 * n // (1 + c) for n in ranges]
    costs[label] = []
    for n_slots in slots[label]:
        half = n_slots // 2
        model = TransformerXL(**SIZES, mem_len=n_slots)
        if c is not None:
            squeezed = dict(mem_len=half, compressed_len=half, compression_rate=c)
            model = CompressiveTransformer(**SIZES, **squeezed)
        costs[label].append(cost(model.to(device).eval(), n_slots))

# %%
B, L, H, d_model = 4, SIZES["n_layers"], SIZES["n_heads"], SIZES["d_model"]
figure, axes = plt.subplots(1, 3, figsize=(6.4, 3.4))
for label, rows in costs.items():
    held, scores, seconds = zip(*rows)
    computed = (
        [4 * B * L * n * d_model for n in slots[label]],
        [B * L * H * T * (n + T) for n in slots[label]],
    )
    axes[0].plot(ranges, [n / 2**20 for n in held], "o", label=label)
    axes[1].plot(ranges, [n / 1e6 for n in scores], "o")
    axes[2].plot(ranges, [1000 * s for s in seconds], "o-")
    axes[0].plot(ranges, [n / 2**20 for n in computed[0]], ":", color="black", zorder=0)
    axes[1].plot(ranges, [n / 1e6 for n in computed[1]], ":", color="black", zorder=0)
    assert list(held) == computed[0] and list(scores) == computed[1]
for ax, title in zip(axes, ["held (MiB)", "scores (millions)", "forward (ms)"]):
    ax.set(title=title, xlabel="range a layer\n(tokens)", ylim=(0, None))
figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
figures.show(
    figure,
    "Three panels against the temporal range of a layer: bytes held, scores computed and time of a segment. "
    "All grow linearly with the range; the slope falls with the compression rate. Measured points lie on "
    "the dotted computed lines.",
)
pairs = zip(costs["Transformer-XL"], costs["Compressive, c = 4"])
ratio = [a[2] / b[2] for a, b in pairs]
shown = "  ".join(f"{n}: {r:.2f}" for n, r in zip(ranges, ratio))
print("time of Transformer-XL over Compressive at c = 4, by range:", shown)

# %% [markdown]
# At rate `c` the same range takes `2 / (1 + c)` of the slots, and of the bytes, exactly. The scores fall a little less:
# they also count the segment's own `T` keys. Time follows when attention is what takes the time, at long range; at short
# range the other layers do.
#
# ## 2.5 Departures from the paper
#
# | here | the paper | why |
# | --- | --- | --- |
# | layer norm before each block, and so before the two reads that the reconstruction loss compares | after each block | as in chapter 1 |
# | most-used counts attention by content, from the segment that pushes the states out | average attention weights | the same look that the loss takes; no bookkeeping of weights |
# | losses are mean squares, added up over layers | norms $\lVert \cdot \rVert_2$, added up over layers | the scale does not depend on the sizes; Adam and the clipping apart make it almost immaterial |
# | dilated: two convolutions of width 3, dilations 1 and 2, added to the states, then the convolution with stride `c` | not spelled out | the smallest version that looks past its group |
# | BPTT goes from piece to piece within one call | through a longer unroll | the same thing, under the protocol of this course |
# | clipped at norm 1, each group apart; 1 minute of training | clip norm 0.1, updates every 4 steps after 60,000; days | what a notebook can do |
#
# ## 2.6 What became of it
#
# - The **two-speed memory**, fine for the recent and coarse for the old, is everywhere: in caches that merge or evict old keys and values
# (H2O and SnapKV keep the most used ones, as `MostUsed` does), and in agents that summarise their old conversation.
# - **PG-19**, the collection of books that the paper published with the model, is a standard test for long texts.
# - The **∞-former** and **Memorizing Transformers** keep old states in other ways: as a continuous signal, and uncompressed, found by nearest neighbours.
# - Learned compression came back in language models as **gist tokens** and AutoCompressors: a model learns to say a long text in a
# few states, trained by the loss of the text that follows, the signal that was too costly here.
#
# ## 2.7 Exercises
#
# 1. *(10 minutes)* Write a compression `Newest` that keeps the newest of each `c` states. Check it with `check_f_c`. Where would you expect it on the recall curve?
# 2. *(10 minutes)* Evaluate `xl` with `mem_len = 24 + 4 * 24`, the range of the compressive model. What does the longer memory gain over the trained one, and what does it cost?
# 3. *(20 minutes)* Let the loss through: remove the five `detach` in `by_content` and train. Does the validation loss suffer? Does the reconstruction error fall? Why is that no success?
# 4. *(30 minutes)* The distance of a compressed slot is its place, not its age. Give it the mean age of its tokens: which function has to change? Try it on the recall task.
# 5. *(30 minutes)* Compress twice: a third memory, behind the second, with rate `c` again. What is its temporal range?

# %%
def check_f_c(f_c_class):
    """Exercise 1: the newest of each group, and nothing else."""
    for rate in (1, 2, 3):
        old = torch.randn(2, 6 * rate, 8)
        new = f_c_class(8, rate)(old)
        assert new.shape == (2, 6, 8), f"shape {tuple(new.shape)}, should be (2, 6, 8)"
        assert torch.equal(new, old[:, rate - 1 :: rate]), f"not the newest of each {rate}"
    print("right")


# %% [markdown]
# <details><summary>A solution of exercise 1</summary>
#
# ```python
# class Newest(MaxPooling):
#     def forward(self, old, used=None):
#         return old[:, self.rate - 1 :: self.rate]
# ```
#
# </details>
#
# ## References
#
# - J. W. Rae, A. Potapenko, S. M. Jayakumar, C. Hillier, T. P. Lillicrap: [Compressive Transformers for Long-Range
# Sequence Modelling](https://arxiv.org/abs/1911.05507). ICLR 2020.
# - Z. Dai, Z. Yang, Y. Yang, J. Carbonell, Q. V. Le, R. Salakhutdinov: [Transformer-XL: Attentive
# Language Models Beyond a Fixed-Length Context](https://arxiv.org/abs/1901.02860). ACL 2019.

# %%
minutes = (time.perf_counter() - started) / 60
peak = measure.process_peak_bytes() / 2**30
print(f"this run: {minutes:.1f} minutes, peak memory {peak:.2f} GiB, text: {corpus.name}")
