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
# # A. Feedback by hand: a backward pass, and a cache with room

# %% [markdown] tags=["badges"]
# No links to Colab and Kaggle here: the project has no public address yet.
# To run this notebook, type `make lab` in your copy of the project.

# %% [markdown]
# You can skip this appendix. The Feedback Transformer of chapter 3 is right as it stands; here it is made faster, and
# you see how to write by hand the backward pass that autograd would otherwise derive: for a recurrent model, step by
# step, in full.
#
# **After this appendix you can**
# - write down the backward pass of a small recurrent model with attention, line by line;
# - say which of its products are needed at once and which can be put off and joined;
# - install a hand-written pass in a model, and refuse models for which it would compute something else;
# - generate from a cache that is not copied at each token.
#
# **You need** chapter 3. **Time and memory:** half a minute and 1 GiB on two CPU cores.

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
from copy import deepcopy
from typing import NamedTuple

import matplotlib.pyplot as plt
import torch
from matplotlib.colors import ListedColormap
from torch import nn
from torch.autograd.function import Function, once_differentiable
from torch.nn.functional import pad
from torch.nn.modules import module as every_module

from memtx_minimal import exercises, figures, inputs, measure, training
from memtx_minimal.feedback_transformer import (
    Cached,
    FeedbackTransformer,
    Layer,
    Memory,
    embed,
)
from memtx_minimal.vanilla_transformer import VanillaTransformer

SEED = 0
started = time.perf_counter()
figures.use_style()
_ = torch.manual_seed(SEED)

# %% [markdown]
# ## A.1 The chain rule in a table
#
# The *error* at a tensor is the gradient of the loss with respect to it. Every line of a forward pass has a line that
# hands the error at its result back to its inputs. Here is all that A.2 needs; `g` is the error at `y`.
#
# | forwards | error at the input | error at the weight |
# | --- | --- | --- |
# | `y = W @ x` | `W.T @ g` | `outer(g, x)` |
# | `y = a + b` | `g` at both | |
# | `y = relu(x)` | `g * (x > 0)` | |
# | `y = w @ V` | `V @ g` at `w` | `outer(w, g)` at `V` |
# | `y = softmax(s)` | `y * (g - y @ g)` | |
#
# Where a tensor is used several times, its errors add up. The last line is worth a check. A softmax has $\partial y_i
# / \partial s_j = y_i (\delta_{ij} - y_j)$, so the error at $s_j$ is $\sum_i g_i \, y_i (\delta_{ij} - y_j) = y_j
# (g_j - \sum_i y_i g_i)$.

# %%
s, g = torch.randn(5, requires_grad=True), torch.randn(5)
y = s.softmax(dim=0)
(expected,) = torch.autograd.grad(y, s, g)
assert torch.allclose(y * (g - y @ g), expected)

# %% [markdown]
# ## A.2 One layer, one head, one text
#
# A Feedback Transformer with all that is not needed left out: no norms, heads, batch, ages, scaling, biases or limit
# of memory, and one layer, whose output is the memory vector `m`. Each step fills one **slot** with its key and
# value. Forwards, each step reads the keys and values of the steps before, and adds its own.

# %%
def forwards(x, W_q, W_k, W_v, W_1, W_2):
    """x (T, d) -> what the steps leave: m (T, d), q, k, v, z, h, and the weights w."""
    q, k, v, z, m = torch.zeros(5, *x.shape, dtype=x.dtype)
    h, w = x.new_zeros(len(x), len(W_1)), [None] * len(x)
    for t in range(len(x)):
        q[t] = W_q @ x[t]
        w[t] = (k[:t] @ q[t]).softmax(dim=0)  # over the steps before
        z[t] = x[t] + w[t] @ v[:t]
        h[t] = (W_1 @ z[t]).relu()
        m[t] = z[t] + W_2 @ h[t]
        k[t], v[t] = W_k @ m[t], W_v @ m[t]
    return m, q, k, v, z, h, w

# %% [markdown]
# Backwards, from the last step to the first, each line is the line of `forwards` in reverse. A step's memory vector
# was read by *later* steps: their errors at its key and value are complete by the time we get there. The loop
# computes errors at the steps' vectors alone. The gradient of a weight, such as $\sum_t g_{q,t} \, x_t^\top$ for
# $W_q$, is a sum over all steps: stack the errors of all steps, and it is *one* matrix product at the end.

# %%
def backwards(g_m, x, W_q, W_k, W_v, W_1, W_2, m, q, k, v, z, h, w):
    """Errors at m, those of the loss -> the errors at x and at the five weights."""
    g_m, g_h = g_m.clone(), torch.zeros_like(h)
    g_q, g_k, g_v, g_z = torch.zeros(4, *x.shape, dtype=x.dtype)
    for t in reversed(range(len(x))):
        g_m[t] += W_k.T @ g_k[t] + W_v.T @ g_v[t]  # what later steps had to say
        g_h[t] = W_2.T @ g_m[t] * (h[t] > 0)  # before the ReLU
        g_z[t] = g_m[t] + W_1.T @ g_h[t]
        g_w = v[:t] @ g_z[t]
        g_s = w[t] * (g_w - w[t] @ g_w)
        g_q[t] = k[:t].T @ g_s
        g_k[:t] += torch.outer(g_s, q[t])
        g_v[:t] += torch.outer(w[t], g_z[t])
    g_x = g_z + g_q @ W_q
    return g_x, g_q.T @ x, g_k.T @ m, g_v.T @ m, g_h.T @ z, g_m.T @ h

# %%
def by_autograd(g_m, x, *weights):
    """The same errors, by autograd, of the same steps without in-place writing."""
    leaves = [tensor.clone().requires_grad_() for tensor in (x, *weights)]
    x, W_q, W_k, W_v, W_1, W_2 = leaves
    out = []
    for x_t in x:
        past = torch.stack(out) if out else x[:0]
        weight = (past @ W_k.T @ (W_q @ x_t)).softmax(dim=0)
        z = x_t + weight @ (past @ W_v.T)
        out.append(z + W_2 @ (W_1 @ z).relu())
    return torch.autograd.grad(torch.stack(out), leaves, g_m)


d, d_ff, T = 4, 8, 12
x, g_m = torch.randn(2, T, d, dtype=torch.float64)
weights = [
    torch.randn(*shape, dtype=torch.float64) / 2
    for shape in [(d, d)] * 3 + [(d_ff, d), (d, d_ff)]
]
kept = forwards(x, *weights)
errors = backwards(g_m, x, *weights, *kept)
worst = max(
    (a - b).abs().max().item() for a, b in zip(errors, by_autograd(g_m, x, *weights))
)
print(f"largest difference from autograd: {worst:.0e}")
assert worst < 1e-12

# %% [markdown]
# This is the whole idea. All that follows is the same with layers, norms, heads and a batch, and in an order that
# suits the machine.
#
# ## A.3 Which products can be put off?
#
# In `backwards`, the two lines with `outer` are many small products: step $t$ adds to *all* slots before it. But the
# error at slot $j$ is needed only when the loop arrives at step $j$. Everything farther back can be put off. Go
# through the steps in blocks of $S$. Inside a block, slots of the block itself are needed at once (**near**). What
# the block owes to all slots before it (**far**) can be added at its end, in one product.

# %% jupyter={"source_hidden": true} tags=["hide-input"]
n, S = 16, 4
step, slot = torch.meshgrid(torch.arange(n), torch.arange(n), indexing="ij")
kind = torch.where(slot >= step, 0, torch.where(slot // S == step // S, 2, 1)).float()
figure, axes = plt.subplots(figsize=(6.4, 4.2))
colors = ListedColormap(["white", figures.BLUE, figures.ORANGE])
figures.matrix(
    axes,
    kind,
    xlabel="slot whose key and value get an error",
    ylabel="step that it comes from",
    cmap=colors,
)
for edge in range(0, n + 1, S):
    axes.axhline(edge - 0.5, color="black", linewidth=0.7)
axes.text(2.5, 13.5, "far: one product a block", color="white", ha="center")
axes.annotate(
    "near: at once", (13.4, 14), (11.5, 5.5), arrowprops=dict(arrowstyle="->")
)
axes.set_title("Who adds to whose error (16 steps, blocks of 4)")
figures.show(
    figure,
    "A triangle: each step adds an error to all slots before it. Only the small "
    "triangles along the diagonal, inside a block of four steps, must be done at "
    "once; the rest is done in one product for each block.",
)

# %% [markdown]
# The weight matrices are not drawn: their products are needed by nobody before the end.
#
# ## A.4 The fast file
#
# A.4, A.5 and A.7, without their checks and figures, are `memtx_minimal/fast_feedback.py`. Read A.4 as an extended
# version of A.2, and come back to this picture, and to one that follows, where an index looks odd. Letters for
# shapes, beyond those of chapter 3: `BH = B * H`, each head of each text; `K = M + T` slots for keys and values,
# memory and segment; `A`, the slots that one step sees; `S`, the steps of a block.

# %%
BLOCK = 16  # steps in a block
EPS = 1e-5  # of every layer norm
norm_back = torch.ops.aten.native_layer_norm_backward.default

# %% [markdown]
# Layer norm and its backward are one operation each inside PyTorch. The backward computes, with $\hat x$ the
# normalised input, $\sigma$ its standard deviation, $\gamma$ the gain and $u = g \odot \gamma$,
#
# $$
# g_x = \tfrac{1}{\sigma} \left(u - \overline{u} - \hat x \; \overline{u \odot \hat x}\right) ,
# $$
#
# where a bar is a mean over the dimensions.

# %% tags=["from-module"]
def normalise(x, gain=None, shift=None):
    """Layer norm; also mean and 1 / deviation, for its backward."""
    return torch.native_layer_norm(x, x.shape[-1:], gain, shift, EPS)

# %% tags=["from-module"]
def normalise_back(g, x, mean, rstd, gain):
    """The error at x, from the error g at normalise(x, gain, shift)."""
    only_x = [True, False, False]
    return norm_back(g, x, gain.shape, mean, rstd, gain, None, only_x)[0]

# %%
x, g = torch.randn(2, 3, 8)
x_hat, center, rstd = normalise(x)
gain = torch.rand(8)
u = g * gain
formula = rstd * (
    u - u.mean(-1, keepdim=True) - x_hat * (u * x_hat).mean(-1, keepdim=True)
)
assert torch.allclose(normalise_back(g, x, center, rstd, gain), formula, atol=1e-6)

# %% [markdown]
# The weights of all layers come as one flat list, since an operation for autograd takes tensors, not modules. Each
# layer has ten: gain and shift of its first norm, $W_q$, $W_o$ (queries and output of attention), gain and shift of
# its second norm, and $W_1$, $b_1$, $W_2$, $b_2$ of the feed-forward. `alpha` is the softmax of chapter 3's layer
# weights $w$. And both passes must compute in the same precision, whatever mixed precision is on around them:
# `outside_autocast`, folded away, sees to that.

# %% tags=["from-module"]
def by_layer(weights):
    """A flat list of weights -> ten for each layer."""
    return [weights[i : i + 10] for i in range(0, len(weights), 10)]

# %% jupyter={"source_hidden": true} tags=["from-module", "hide-input"]
def outside_autocast(work):
    """Without autocast, so that the loops compute with the numbers they are given."""

    def work_outside(first, tensor, *rest):  # first is ctx in a backward pass
        with inputs.autocast(tensor.device.type, enabled=False):
            return work(first, tensor, *rest)

    return work_outside

# %% [markdown]
# ### Forwards
#
# What the steps leave for the way back, in one tensor per kind: layers first, then steps. So a block of steps is a
# slice, and all layers of a block go into one product.

# %% tags=["from-module"]
class Kept(NamedTuple):
    """What the steps forwards leave for the steps backwards."""

    states: torch.Tensor  # (L + 1, T, B, d_model): embedding, then the layers
    middles: torch.Tensor  # (L, T, B, d_model): between attention and feed-forward
    queries: torch.Tensor  # (L, T, B, d_model), scaled
    heads: torch.Tensor  # (L, T, B, d_model): out of attention
    hidden: torch.Tensor  # (L, T, B, d_ff): inside the feed-forward
    vectors: torch.Tensor  # (T, B, d_model): the memory vectors
    kv: torch.Tensor  # (2, B, H, K, d_head): keys and values
    attention: list  # T tensors (L, BH, 1, A): the weights

    def seen(self, t, positions):
        """What step t attends to: keys with ages, and values, (BH, A, d_head) each."""
        end = self.kv.size(3) - len(self.vectors) + t  # M + t slots are there
        A = min(end, len(positions))
        keys, values = self.kv.flatten(1, 2)[:, :, end - A : end].unbind()
        return keys + positions[len(positions) - A :], values

    def results(self):
        """Outputs and memory vectors, (B, T, d_model) each."""
        return self.states[-1].transpose(0, 1), self.vectors.transpose(0, 1)

# %% [markdown]
# `run` is `loop` of chapter 3 with the modules unfolded, each result written to its place. Even where autograd
# records nothing, it counts versions of tensors and tracks views; inference mode spares what is made inside it that,
# too. The places are made before, since autograd cannot save tensors that inference mode made. The lowest queries
# come from the text alone and wait for nobody: they are made at once, for all steps.

# %% tags=["from-module"]
@outside_autocast
def run(x, kv, alpha, positions, gain, shift, W_kv, *layers):
    """The steps forwards, in K slots: M old memory vectors are there, T are filled in.

    x (B, T, d_model), keys and values kv (2, B, H, K, d_head), alpha (L + 1), positions
    (mem_len, d_head); gain, shift and W_kv, from vectors to keys and values; then ten
    weights for each layer, whose matrices are transposed first -> Kept.
    """
    (B, T, d_model), (_, _, H, K, d_head) = x.shape, kv.shape
    layers = by_layer([w.T if w.dim() == 2 else w for w in layers])
    L, M, d_ff, scale = len(layers), K - T, len(layers[0][7]), d_head**-0.5
    kept = Kept(
        x.new_empty(L + 1, T, B, d_model),
        *x.new_empty(3, L, T, B, d_model).unbind(),
        x.new_empty(L, T, B, d_ff),
        x.new_empty(T, B, d_model),
        kv,
        [x.new_empty(L, B * H, 1, min(M + t, len(positions))) for t in range(T)],
    )
    kept.states[0] = x.transpose(0, 1)
    with torch.inference_mode():  # nothing here is for autograd to see
        gain_q, shift_q, W_q, *_ = layers[0]  # the lowest queries wait for no step
        normed = normalise(kept.states[0], gain_q, shift_q)[0]
        torch.mul(normed @ W_q, scale, out=kept.queries[0])  # (T, B, d_model)
        steps = zip(*(t.unbind(1) for t in kept[:5]), kept.vectors, kept.attention)
        for t, (states, *inside, vector, attention) in enumerate(steps):
            keys, values = kept.seen(t, positions)
            x_t, *outputs = states.unbind()
            rows = zip(layers, *(r.unbind() for r in [*inside, attention]), outputs)
            for n, (layer, middle, q, head, hidden, weights, output) in enumerate(rows):
                gain_q, shift_q, W_q, W_o, gain_1, shift_1, W_1, b_1, W_2, b_2 = layer
                if n > 0:
                    normed = normalise(x_t, gain_q, shift_q)[0]
                    q.addmm_(normed, W_q, beta=0, alpha=scale)  # beta=0: overwrites q
                scores = torch.bmm(q.view(B * H, 1, d_head), keys.mT)  # (BH, 1, A)
                torch.softmax(scores, dim=-1, out=weights)
                torch.bmm(weights, values, out=head.view(B * H, 1, d_head))
                torch.addmm(x_t, head, W_o, out=middle)
                normed = normalise(middle, gain_1, shift_1)[0]
                torch.addmm(b_1, normed, W_1, out=hidden).relu_()
                x_t = torch.addmm(middle, hidden, W_2, out=output).add_(b_2)
            torch.mv(states.flatten(1).T, alpha, out=vector.view(-1))
            new = normalise(vector, gain, shift)[0] @ W_kv.T  # (B, 2 * d_model)
            kept.kv[..., M + t, :] = new.view(B, 2, H, d_head).transpose(0, 1)
    return kept

# %% [markdown]
# ### One step backwards
#
# The errors have places of the same shape as what they are errors of. `by_step` cuts such tensors into the pieces of
# single steps.

# %% tags=["from-module"]
class Errors(NamedTuple):
    """The errors of S steps, named as in Kept; at queries before they are scaled, and
    inside the feed-forward before the ReLU."""

    states: torch.Tensor  # (L + 1, S, B, d_model)
    middles: torch.Tensor  # (L, S, B, d_model)
    queries: torch.Tensor  # (L, S, B, d_model)
    hidden: torch.Tensor  # (L, S, B, d_ff)

# %% tags=["from-module"]
def by_step(tensor):
    """(L, S, ...) -> for each step a tuple of its L parts."""
    return zip(*(layer.unbind() for layer in tensor.unbind()))

# %% [markdown]
# `step_back` goes from the top layer down, and each line undoes a line of `run`. Count layers from 0: state `n` is
# what layer `n` reads (state 0 is the embedding). The memory vector reads it too, with the share `alpha[n]`; so the
# error at it is the sum of two, and is filled in here. The error at the top state, from the loss and the memory
# vector, has been filled in by the caller. The loop stops at the lowest query; what lies below is the text, and no
# step waits for that. `rows[n]` holds, for layer `n`, seven things that the forward pass had inside (the slope of the
# ReLU, the state in the middle and the state at the input, each with the two numbers of its norm), and then five
# places to be filled in: the errors at the output (already there), inside the feed-forward, in the middle, at the
# query and at the input. The input of one layer is the output of the one below it, so its place is there twice.
# `torch._softmax_backward_data` is the last line of the table in A.1.

# %% tags=["from-module"]
def step_back(g_vector, alpha, layers, attention, rows, keys, values):
    """The errors of one step, from its last layer down to the lowest queries.

    g_vector (B, d_model) at the memory vector, in which state n, the input of layer n,
    has the share alpha[n]; rows with what each layer had inside, and with the places of
    its errors, the one at the top output filled in. Returns lists over the layers:
    errors at scores (BH, 1, A), at heads (BH, 1, d_head).
    """
    g_scores, g_heads, scale = [], [], keys.size(2) ** -0.5
    for n in reversed(range(len(layers))):
        gain_q, _, W_q, W_o, gain_1, _, W_1, _, W_2, _ = layers[n]
        slope, middle, middle_mean, middle_rstd, x, x_mean, x_rstd, *places = rows[n]
        g, g_hidden, g_middle, g_q, g_x = places
        torch.mm(g, W_2, out=g_hidden).mul_(slope)  # of the ReLU: 0 or 1
        stats = middle_mean, middle_rstd
        g_normed = normalise_back(g_hidden @ W_1, middle, *stats, gain_1)
        torch.add(g_normed, g, out=g_middle)
        g_head = (g_middle @ W_o).view(len(keys), 1, -1)  # (BH, 1, d_head)
        g_weights = torch.bmm(g_head, values.mT)  # (BH, 1, A)
        g_score = torch._softmax_backward_data(g_weights, attention[n], -1, g.dtype)
        g_q.view(g_head.shape).baddbmm_(g_score, keys, beta=0, alpha=scale)
        g_scores.append(g_score)
        g_heads.append(g_head)
        if n > 0:
            g_normed = normalise_back(g_q @ W_q, x, x_mean, x_rstd, gain_q)
            torch.add(g_normed, g_middle, out=g_x).add_(g_vector, alpha=alpha[n])
    return g_scores[::-1], g_heads[::-1]

# %% [markdown]
# ### A block
#
# The sums that grow from block to block. Ten weights of a layer need seven of them: four products (for $W_q$, $W_o$,
# $W_1$, $W_2$) and three plain sums of errors, at queries, hidden units and output. Gains and shifts follow from
# these at the end, in `behind_norm`.

# %% tags=["from-module"]
class Sums(NamedTuple):
    """The errors that block after block fills in, or adds to."""

    x: torch.Tensor  # (T, B, d_model)
    vectors: torch.Tensor  # (T, B, d_model)
    new: torch.Tensor  # (T, B, 2 * d_model): keys and values, as W_kv makes them
    slots: torch.Tensor  # (2 * BH, K, d_head): by slot, so far from later blocks
    positions: torch.Tensor  # (mem_len, d_head)
    layers: list  # seven, of all layers together: see add_weights

# %% tags=["from-module"]
def empty_sums(kept, positions, layers):
    """Sums to begin with."""
    (T, B, d_model), (_, _, H, K, d_head) = kept.vectors.shape, kept.kv.shape
    gain_q, _, W_q, W_o, _, _, W_1, b_1, W_2, b_2 = layers[0]
    summed = W_q, gain_q, W_o, W_1, b_1, W_2, b_2  # vectors: sums, of such shapes
    return Sums(
        *positions.new_empty(2, T, B, d_model).unbind(),
        positions.new_empty(T, B, 2 * d_model),
        positions.new_zeros(2 * B * H, K, d_head),
        torch.zeros_like(positions),
        [w.new_zeros(len(layers), *w.shape) for w in summed],
    )

# %% [markdown]
# And the first index trick. The errors at keys are (errors at scores)ᵀ times queries, those at values (weights)ᵀ
# times errors at heads. So both are put into one pair of matrices, `left` and `right`, index 0 for keys and 1 for
# values, with a row for each step and layer: layers share keys and values, so their errors add up. `left` has a
# column for each slot from `mem_len` slots before the block on. Then `left.mT @ right` is all of it, near and far.

# %% jupyter={"source_hidden": true} tags=["hide-input"]
S, L, mem_len = 4, 2, 6
left = torch.zeros(S * L, mem_len + S)
for r in range(S):
    left[r * L : (r + 1) * L, r : mem_len + r] = r + 1
figure, axes = plt.subplots(
    1, 2, figsize=(6.4, 3.4), gridspec_kw={"width_ratios": [10, 6]}
)
look = dict(cmap="Blues", vmin=0, vmax=S + 2)
figures.matrix(
    axes[0], left, xlabel="slot", ylabel="step and layer", title="left", **look
)
axes[0].axvline(mem_len - 0.5, color=figures.ORANGE)
axes[0].set_xticks(
    [mem_len / 2 - 0.5, mem_len + S / 2 - 0.5],
    labels=["far: before", "near: the block"],
)
rows = [f"step {r}, layer {n}" for r in range(S) for n in range(L)]
axes[0].set_yticks(range(S * L), labels=rows)
by_age = torch.stack([left[i].roll(-(i // L))[:mem_len] for i in range(S * L)])
figures.matrix(
    axes[1], by_age, xlabel="age (steps)", ylabel="", title="the same by age", **look
)
axes[1].set_xticks(range(mem_len), labels=range(mem_len, 0, -1))
axes[1].set_yticks([])
figures.show(
    figure,
    "Left: in the matrix left, the rows of each step fill mem_len columns and begin "
    "one column later than those of the step before. Right: shifted back by one "
    "column a step, the columns are ages, and no cell is empty.",
)

# %% [markdown]
# (Four steps of two layers, `mem_len` of 6, with a full memory.) `block_back` does this in order:
#
# - before the loop, what all its steps need: the norms once more, of all steps at once (their results were not kept),
#   places for the errors, and `near`, which begins as what *later* blocks have already found for the slots of this
#   one;
# - for each step, from the last: the errors at its key and value are complete (`near[:, r]`), so are those at its
#   vector and output, and `step_back` goes down through its layers; what comes out fills the step's rows of `left`
#   and `right`, from the last rows up, and the *near* columns are multiplied at once;
# - after the loop, all that could be put off: the error at the text, the far slots and ages (`add_slots`), and the
#   weight matrices (`add_weights`).
#
# The slope of the ReLU is the sign of what came out of it: 0 or 1 after `sign()`.

# %% tags=["from-module"]
def block_back(steps, g_outputs, alpha, positions, gain, W_kv, layers, kept, sums):
    """A slice of steps backwards, then the products of what they had with their errors.

    left holds the errors at the scores, and the attention weights; right the queries,
    and the errors at the heads; both a row for each step and layer, left a column for
    each slot from mem_len before the block on. left.mT @ right: errors at keys, values.
    """
    (_, B, H, K, d_head), mem_len, L = kept.kv.shape, len(positions), len(layers)
    S, first, BH = steps.stop - steps.start, K - len(kept.vectors) + steps.start, B * H
    states, middles, queries, heads, hidden = (tensor[:, steps] for tensor in kept[:5])
    x_hat, *x_stats = normalise(states[:-1])
    middle_hat, *middle_stats = normalise(middles)
    errors = Errors(*map(torch.empty_like, (states, middles, queries, hidden)))
    inside = hidden.sign(), middles, *middle_stats, states[:-1], *x_stats
    g, g_middles, g_queries, g_hidden = errors
    places = g[1:], g_hidden, g_middles, g_queries, g[:-1]
    rows = list(zip(*map(by_step, inside + places)))  # of a step: twelve, by layer

    left = positions.new_zeros(2, BH, S * L, mem_len + S)
    right = positions.new_empty(2, BH, S * L, d_head)
    right[0] = queries.reshape(L, S, BH, d_head).permute(2, 1, 0, 3).flatten(1, 2)
    near = sums.slots[:, first : first + S].clone()  # (2 * BH, S, d_head)
    vector_stats = normalise(kept.vectors[steps])[1:]
    *shares, share_of_output = alpha.tolist()
    for r in reversed(range(S)):
        t, row = steps.start + r, slice(r * L, (r + 1) * L)
        sums.new[t] = near[:, r].reshape(2, B, -1).transpose(0, 1).flatten(1)
        stats = (stat[r] for stat in vector_stats)
        g_vector = normalise_back(sums.new[t] @ W_kv, kept.vectors[t], *stats, gain)
        torch.add(g_outputs[t], g_vector, alpha=share_of_output, out=g[L, r])
        sums.vectors[t], attention = g_vector, kept.attention[t]
        inside_out = attention, [*zip(*rows[r])], *kept.seen(t, positions)  # by layer
        back = step_back(g_vector, shares, layers, *inside_out)
        g_scores, g_heads = (torch.cat(parts, dim=1) for parts in back)
        columns = slice(mem_len + r - attention.size(3), mem_len + r)
        left[0, :, row, columns] = g_scores
        left[1, :, row, columns] = attention.squeeze(2).transpose(0, 1)
        right[1, :, row] = g_heads
        near_columns, at_row = left[:, :, row, mem_len:], right[:, :, row]
        near.baddbmm_(near_columns.flatten(0, 1).mT, at_row.flatten(0, 1))
    (gain_q, _, W_q, *_), stats = layers[0], (stat[0] for stat in x_stats)
    g_normed = normalise_back(g_queries[0] @ W_q, states[0], *stats, gain_q)
    sums.x[steps] = g_normed + g_middles[0] + shares[0] * sums.vectors[steps]
    add_slots(first, left, right, S, sums)
    add_weights(errors, x_hat, heads, middle_hat, hidden, sums.layers)

# %% [markdown]
# The second trick is the right half of the picture of `left`. The error at the vector of an age is a sum over all
# steps, of errors at scores times queries, and these errors stand in *different* columns, one farther right at each
# step. `as_strided` reads the same memory with the way from the `L` rows of one step to those of the next one number
# longer: `L * width + 1` instead of `L * width`. So the columns become ages without an index; only the final
# `reshape` copies. With the matrices of the picture, `left` and `by_age` (`S` is 4, `L` 2, `mem_len` 6):

# %%
rows, width = left.shape
strided = left.as_strided((S, L, mem_len), (L * width + 1, width, 1)).reshape(
    -1, mem_len
)
assert torch.equal(strided, by_age)

# %% tags=["from-module"]
def add_slots(first, left, right, S, sums):
    """A block's share in the errors at keys and values before it, and at positions."""
    (BH, rows, width), mem_len = left.shape[1:], len(sums.positions)
    old = min(first, mem_len)  # slots before the block that it has seen
    far = left[..., mem_len - old : mem_len].flatten(0, 1).mT @ right.flatten(0, 1)
    sums.slots[:, first - old : first] += far  # (2 * BH, old, d_head)
    L = rows // S  # a step is L rows, and the ages of the next begin a column later
    strides = rows * width, L * width + 1, width, 1
    by_age = left[0].as_strided((BH, S, L, mem_len), strides).reshape(-1, mem_len)
    sums.positions.addmm_(by_age.T, right[0].flatten(0, 1))

# %% [markdown]
# The weight matrices, of all layers together. `flatten(1, 2)` puts the steps and texts of a block side by side; the
# product then sums over them.

# %% tags=["from-module"]
def add_weights(errors, x_hat, heads, middle_hat, hidden, sums):
    """A block's share in the sums of errors, and of products with them."""
    G_q, sum_q, G_o, G_1, sum_hidden, G_2, sum_output = sums
    errors = errors._replace(states=errors.states[1:])
    g, g_middle, g_q, g_hidden = (e.flatten(1, 2) for e in errors)  # (L, S * B, ...)
    G_q.baddbmm_(g_q.mT, x_hat.flatten(1, 2))
    G_o.baddbmm_(g_middle.mT, heads.flatten(1, 2))
    G_1.baddbmm_(g_hidden.mT, middle_hat.flatten(1, 2))
    G_2.baddbmm_(g.mT, hidden.flatten(1, 2))
    sum_q += g_q.sum(dim=1)
    sum_hidden += g_hidden.sum(dim=1)
    sum_output += g.sum(dim=1)

# %% [markdown]
# Three matrices ($W_q$, $W_1$ and `W_kv`) stand behind a norm: $y = W(\gamma \odot \hat x + \beta)$. With $g$ the
# error at $y$ and the two sums $G = \sum g\, \hat x^\top$ and $s = \sum g$ over the steps, the gradients are
#
# $$
# \sum g \, (\gamma \odot \hat x + \beta)^\top = G \, \text{diag}(\gamma) + s\, \beta^\top , \qquad
# \sum (W^\top g) \odot \hat x = \text{the column sums of } G \odot W , \qquad
# \sum W^\top g = W^\top s
# $$
#
# for $W$, $\gamma$ and $\beta$: nothing else is needed of the steps.

# %% tags=["from-module"]
def behind_norm(G, g, gain, shift, W):
    """The errors at gain, shift and W of y = W @ (gain * x_hat + shift).

    G is the sum of (error at y) times x_hat, of W's shape; g the sum of errors at y.
    """
    return (G * W).sum(dim=0), g @ W, torch.addr(G * gain, g, shift)

# %% tags=["from-module"]
def layer_errors(layer, sums):
    """The errors at a layer's ten weights, from its share of Sums.layers."""
    G_q, sum_q, G_o, G_1, sum_hidden, G_2, sum_output = sums
    at_query = behind_norm(G_q, sum_q, *layer[:3])
    at_hidden = behind_norm(G_1, sum_hidden, *layer[4:7])
    return *at_query, G_o, *at_hidden, sum_hidden, G_2, sum_output

# %% [markdown]
# ### One operation for autograd
#
# `forward` makes room for T slots and calls `run`, which transposes the matrices and reads them at each step: it is
# handed matrices whose transposes are contiguous. `backward` goes through the blocks from the last, then makes the
# gradients of the weights from the sums. Vectors and slots hand back no error as *results*: the model detaches its
# memory at the end of a segment. The errors at the old slots are handed back, since the projection to keys and values
# learns from them too.

# %% tags=["from-module"]
class Segment(Function):
    """A segment for autograd, all steps at once.

    Takes what run takes, with the M old slots alone -> outputs and memory vectors,
    (B, T, d_model) each, and all slots. Errors are taken at the outputs alone, and
    second derivatives are refused.
    """

    @staticmethod
    def forward(ctx, x, kv, *weights):
        slots = pad(kv.type_as(x), (0, 0, 0, x.size(1)))  # T more
        layers = (w.T.contiguous().T if w.dim() == 2 else w for w in weights[5:])
        kept = run(x, slots, *weights[:5], *layers)  # w.T, read T times: worth a copy
        ctx.save_for_backward(*weights, *kept[:7], *kept.attention)
        ctx.n = len(weights)
        outputs, vectors = kept.results()
        ctx.mark_non_differentiable(vectors, slots)
        return outputs, vectors, slots

    @staticmethod
    @once_differentiable
    @outside_autocast
    def backward(ctx, g, *_):
        weights, saved = ctx.saved_tensors[: ctx.n], ctx.saved_tensors[ctx.n :]
        (alpha, positions, *projection), layers = weights[:5], by_layer(weights[5:])
        kept, (gain, _, W_kv) = Kept(*saved[:7], saved[7:]), projection
        sums = empty_sums(kept, positions, layers)
        g, T = g.transpose(0, 1), g.size(1)  # (T, B, d_model)
        with torch.inference_mode():
            for start in reversed(range(0, T, BLOCK)):
                steps = slice(start, min(start + BLOCK, T))
                block_back(steps, g, alpha, positions, gain, W_kv, layers, kept, sums)
        old = sums.slots.view(kept.kv.shape)[..., :-T, :]
        g_alpha = kept.states.flatten(1) @ sums.vectors.flatten()
        g_run = sums.x.transpose(0, 1), old, g_alpha, sums.positions
        vectors_hat = normalise(kept.vectors)[0].flatten(0, 1)
        new = sums.new.flatten(0, 1)  # (T * B, 2 * d_model)
        g_projection = behind_norm(new.T @ vectors_hat, new.sum(dim=0), *projection)
        g_layers = map(layer_errors, layers, zip(*sums.layers))
        return *g_run, *g_projection, *(g for ten in g_layers for g in ten)

# %% tags=["from-module"]
def weights_of(model):
    """The tensors that a segment is computed with: five, then ten for each layer."""
    memory = model.memory
    flat = [memory.layer_weights.softmax(dim=0), memory.positions[-model.mem_len :]]
    flat += [memory.norm.weight, memory.norm.bias, memory.key_value.weight]
    for layer in model.layers:
        norm, feed_forward_norm = layer.norm_attention, layer.norm_feed_forward
        inner, _, outer = layer.feed_forward
        flat += [norm.weight, norm.bias, layer.query.weight, layer.out.weight]
        flat += [feed_forward_norm.weight, feed_forward_norm.bias]
        flat += [inner.weight, inner.bias, outer.weight, outer.bias]
    return flat

# %% [markdown]
# ## A.5 It refuses what it does not compute
#
# The fast loop reads weights and calls no module. Put another activation into a layer, a hook, an adapter, and it
# would compute what the layer *was*. So it compares the traits of each part with those of a fresh layer, at each
# call, and refuses what differs. (What it cannot see: a method that is replaced on the class itself, such as
# `Layer.forward`.) How the difference is found and put in words is folded away.

# %% jupyter={"source_hidden": true} tags=["from-module", "hide-input"]
def tree(module):
    """A module, its parts, their parts, and so on."""
    found = [module]
    for part in found:  # the list grows as we go
        found += part._modules.values()
    return found

# %% jupyter={"source_hidden": true} tags=["from-module", "hide-input"]
def traits(module):
    """All that decides what a call of a module does, but the numbers in its weights."""
    own = module.__dict__  # its keys, too: is forward among them?
    weights = [*map(type, own["_parameters"].values())]
    hooks = len(own["_forward_pre_hooks"]) + len(own["_forward_hooks"])
    hooks += len(own["_backward_pre_hooks"]) + len(own["_backward_hooks"])
    dropout = "p" in own and own["training"] and own["p"] > 0
    return type(module), own.keys(), weights, hooks, own.get("eps"), dropout

# %% jupyter={"source_hidden": true} tags=["hide-input"]
TRAITS = "kind", "attributes", "weights", "hooks", "eps", "dropout at work"
PLAIN = {  # the traits of fresh ones; their sizes do not matter
    Layer: [traits(part) for part in tree(Layer(1, 1, 1, dropout=0.0))],
    Memory: [traits(part) for part in tree(Memory(1, 1, 1, 1, shared_kv=True))],
}

# %% jupyter={"source_hidden": true} tags=["from-module", "hide-input"]
def difference(model):
    """How a model first differs from a fresh one, in words; None if it does not."""
    for kind, owner in [(Memory, model.memory), *((Layer, m) for m in model.layers)]:
        parts = tree(owner)
        if [traits(part) for part in parts] == PLAIN[kind]:
            continue
        names = {id(part): name for name, part in model.named_modules()}
        if type(owner) is kind and len(parts) != len(PLAIN[kind]):
            return f"{names[id(owner)]} has other parts"
        for part, plain in zip(parts, PLAIN[kind]):
            for trait, ours, theirs in zip(TRAITS, traits(part), plain):
                if ours != theirs:
                    change = f"{said(ours)}, not {said(theirs)}"
                    if trait == "attributes":
                        change = said(sorted(ours ^ theirs))
                    return f"{names[id(part)]}: {trait} {change}"
    return None

# %% jupyter={"source_hidden": true} tags=["from-module", "hide-input"]
def said(trait):
    """A trait in words."""
    if isinstance(trait, (list, tuple)):
        return ", ".join(map(said, trait)) or "none"
    return trait.__name__ if isinstance(trait, type) else f"{trait}"

# %% tags=["from-module"]
def check_plain(model):
    """Refuse a model whose steps are not exactly those of feedback_transformer.py."""
    if type(model) not in (FeedbackTransformer, FastFeedbackTransformer):
        raise ValueError(f"a {type(model).__name__}; pass a FeedbackTransformer")
    reason = difference(model)
    if not model.shared_kv:
        reason = "shared_kv=False: each layer has keys and values of its own"
    kinds = "forward_pre_hooks", "forward_hooks", "backward_pre_hooks", "backward_hooks"
    if any(getattr(every_module, f"_global_{kind}") for kind in kinds):
        reason = "there are hooks on all modules"
    if torch.compiler.is_compiling():
        reason = "torch.compile knows the plain one alone"
    if reason:
        raise ValueError(f"the fast way does not compute this model: {reason}")

# %% tags=["from-module"]
class FastFeedbackTransformer(FeedbackTransformer):
    """A FeedbackTransformer whose loop is one operation. Made by speed_up."""

    def loop(self, x, kv):
        check_plain(self)
        slots = kv[:, :, 0].permute(2, 0, 3, 1, 4)  # (2, B, H, M, d_head)
        outputs, vectors, slots = Segment.apply(x, slots, *weights_of(self))
        kv = slots.permute(1, 3, 0, 2, 4)[:, -self.mem_len :, None]
        return outputs, vectors, kv

# %% tags=["from-module"]
def speed_up(model):
    """Install the fast loop in a FeedbackTransformer, and return it.

    It gives the numbers of the plain loop, in the weights' own precision. A model that
    computes anything else is refused with a ValueError that names the reason, here and
    at each call: something may have been changed in the meantime.
    """
    check_plain(model)
    model.__class__ = FastFeedbackTransformer
    return model

# %%
def refusal(change, **options):
    """What speed_up says about a model that was changed."""
    model = FeedbackTransformer(10, 16, 2, 2, 32, **options)
    change(model)
    try:
        speed_up(model)
    except ValueError as error:
        return str(error).split("model: ")[1]


reasons = [
    refusal(lambda model: model.layers[1].feed_forward.__setitem__(1, nn.GELU())),
    refusal(lambda model: setattr(model.memory.norm, "eps", 1e-6)),
    refusal(lambda model: model.layers[0].out.register_forward_hook(print)),
    refusal(lambda model: None, dropout=0.1),
    refusal(lambda model: None, shared_kv=False),
]
assert all(reasons)
print("\n".join(reasons))

# %% [markdown]
# ## A.6 The same numbers, and the gain
#
# The plain model and the fast one, in double precision: logits, memory and the gradient of every parameter. 40 steps
# are two blocks and a part of one. All parameters are random, gains and shifts too: a fresh norm has ones and zeros,
# which would hide a mistake.

# %%
plain = FeedbackTransformer(10, 16, 2, 3, 32, mem_len=24).double()
for parameter in plain.parameters():
    nn.init.normal_(parameter, std=0.3)
fast = speed_up(deepcopy(plain))
text, vectors = torch.randint(10, (2, 40)), torch.randn(2, 24, 16).double()
results = []
for model in (plain, fast):
    logits, memory = model(text, vectors)
    logits.logsumexp(dim=-1).square().sum().backward()
    results.append([logits, memory, *(p.grad for p in model.parameters())])
worst = max((a - b).abs().max().item() for a, b in zip(*results))
print(f"largest difference: {worst:.0e}")
assert worst < 1e-10

# %% [markdown]
# What is gained on the CPU, forwards and backwards apart? And what do the two passes keep between them?

# %%
SIZES = dict(vocab_size=65, d_model=64, n_heads=4, n_layers=2, d_ff=256)


def seconds(model, T):
    """Seconds forwards and backwards, medians of five, and the bytes kept between."""
    tokens, times = torch.randint(65, (16, T)), []
    for _ in range(6):
        model.zero_grad()
        marks = [time.perf_counter()]
        loss = model(tokens)[0].logsumexp(dim=-1).sum()
        marks.append(time.perf_counter())
        loss.backward()
        times.append([marks[1] - marks[0], time.perf_counter() - marks[1]])
    kept = measure.bytes_for_backward(model, lambda: model(tokens)[0])
    return *torch.tensor(times[1:]).median(dim=0).values.tolist(), kept

# %%
lengths = [32, 64, 128]
plain = FeedbackTransformer(**SIZES, mem_len=128)
models = {"plain": plain, "fast": speed_up(deepcopy(plain))}
models["vanilla"] = VanillaTransformer(**SIZES, max_len=128)
costs = {name: [seconds(model, T) for T in lengths] for name, model in models.items()}

# %% jupyter={"source_hidden": true} tags=["hide-input"]
titles, units = ("forward (ms)", "backward (ms)", "kept (MiB)"), (1e3, 1e3, 2**-20)
figures.table(
    "One pass over a segment, 2 layers, d_model 64, batch 16",
    ["", "", *(f"T = {n}" for n in lengths)],
    [
        [title, name, *(f"{unit * cost[k]:.0f}" for cost in costs[name])]
        for k, (unit, title) in enumerate(zip(units, titles))
        for name in costs
    ],
)

# %%
(f, b, k), (f_fast, b_fast, k_fast) = costs["plain"][-1], costs["fast"][-1]
assert f > f_fast and b > b_fast and k > 3 * k_fast

# %% [markdown]
# Both directions gain, forwards too, where nothing is put off. Is it autograd's record that costs the plain loop so
# much? And do the blocks pay? Without a record, and with blocks of one step:

# %%
def once(run):
    return measure.seconds(run, warmup=0, rounds=1)


tokens, rounds = torch.randint(65, (16, 128)), []
plain, fast = models["plain"], models["fast"]
for _ in range(7):
    with torch.inference_mode():  # as within fast
        took = [once(lambda: plain(tokens)), once(lambda: fast(tokens))]
    for BLOCK in (1, 16):  # 16 stays
        loss = fast(tokens)[0].logsumexp(dim=-1).sum()  # before the clock runs
        took.append(once(loss.backward))
    rounds.append(took)
f, f_fast, by_1, by_16 = torch.tensor(rounds).median(dim=0).values.mul(1e3).tolist()
print(f"forward, without a record: plain {f:.0f} ms, fast {f_fast:.0f} ms")
print(f"fast, backward: blocks of 1 {by_1:.0f} ms, blocks of 16 {by_16:.0f} ms")
assert f > 1.3 * f_fast and by_1 > by_16

# %% [markdown]
# The record is not all: without it, too, the plain loop takes clearly longer. The rest is the unfolded loop's, with
# fewer calls and copies; which counts most is not measured here. And the blocks pay (exercise A.4: how long?). The
# bytes: the plain loop keeps, at each step, all keys and values that the step saw; the fast one keeps each once. What
# still grows with the square of the length are the attention weights, as in every attention here.
#
# ## A.7 A cache with room
#
# `Cached` of chapter 3 copies its memory at every token. With room behind the last slot, the next token writes its
# key and value there. But the caller holds the memory and may continue from it twice; the second would write over the
# first. One number, known to all caches that share the slots, prevents it: the first to go on takes the room, and the
# second gets a copy.

# %%
ROOM = 64  # slots that a cache keeps free for what comes next

# %% tags=["from-module"]
class Cache(NamedTuple):
    """Keys and values in slots, with room behind them.

    The first to go on with the text writes into the room. Anybody else who goes on from
    the same place gets a copy. So what a cache holds never changes.
    """

    kv: torch.Tensor  # (2, B, H, slots, d_head)
    end: int  # this text's slots are those before it
    taken: list  # of one number: the slots taken by any of the caches that share them

    @classmethod
    def of(cls, kv):
        """A cache with slots of its own, and no room yet."""
        n = kv.size(-2)
        return cls(kv.contiguous(), n, [n])

    def latest(self, n):
        """Keys and values of the latest n slots, or of all."""
        return self.kv[..., max(0, self.end - n) : self.end, :]

    def with_more(self, T, mem_len):
        """A cache with T more slots, to be filled in: these slots, if there is room."""
        end = self.end + T
        if self.taken[0] == self.end and end <= self.kv.size(-2):
            self.taken[0] = end
            return self._replace(end=end)
        kv = self.latest(mem_len)
        # Where a text begins there is no room to spare: it may never go on.
        room = max(T, ROOM) if self.end else T
        end = kv.size(-2) + T
        return Cache(pad(kv, (0, 0, 0, room)), end, [end])

# %%
cache = Cache(torch.zeros(2, 1, 1, 3, 4), end=3, taken=[3])  # three slots, all in use
first = cache.with_more(T=1, mem_len=6)  # no room: copied, and given some
second = first.with_more(T=1, mem_len=6)  # in place
other = first.with_more(T=1, mem_len=6)  # the slot behind `first` is taken: copied
for name, c in dict(first=first, second=second, other=other).items():
    print(f"{name:6} holds {c.end} slots; {c.taken[0]} of {c.kv.size(-2)} are taken")
assert second.kv.data_ptr() == first.kv.data_ptr() != other.kv.data_ptr()

# %% jupyter={"source_hidden": true} tags=["from-module", "hide-input"]
def checked_cache(memory, model, x):
    """The Cache that a caller handed in; where it is None, one without slots."""
    by_stream = (1, 3), (0, 1)  # (2, B, H, n, d_head) -> (B, n, 2, H, d_head)
    H, d_head = model.memory.n_heads, model.memory.positions.size(1)
    nothing_yet = x.new_empty(2, len(x), H, 0, d_head)
    if memory is None:
        return Cache.of(nothing_yet)
    kv = memory.kv.movedim(*by_stream) if isinstance(memory, Cache) else memory
    inputs.checked_memory(kv, nothing_yet.movedim(*by_stream))
    return memory

# %% tags=["from-module"]
class CachedInPlace(nn.Module):
    """What feedback_transformer.Cached computes; its memory is a Cache, moved only when
    its room is full.

    The model is checked at the start of a text and wherever several tokens come: what
    is changed in it between two single tokens goes unseen.
    """

    def __init__(self, model):
        super().__init__()
        check_plain(model)
        self.model = model

    @torch.no_grad()
    def forward(self, tokens, memory=None):
        model = self.model
        x = embed(model, tokens)  # (B, T, d_model)
        if memory is None or x.size(1) > 1:  # token by token it would cost a tenth
            check_plain(model)
        cache = checked_cache(memory, model, x).with_more(x.size(1), model.mem_len)
        outputs, _ = run(x, cache.latest(cache.end), *weights_of(model)).results()
        if cache.kv.size(-2) > model.mem_len + ROOM:  # of a long text, only the end
            cache = Cache.of(cache.latest(model.mem_len))
        return model.head(model.norm(outputs)), cache

# %%
writer = FeedbackTransformer(**SIZES, mem_len=1100)
prompt = torch.randint(65, (20,))
by_copying = training.generate(Cached(writer), prompt, 100)
assert torch.equal(training.generate(CachedInPlace(writer), prompt, 100), by_copying)

# %%
@torch.inference_mode()
def microseconds(model, n, B=16):
    """Median time of one more token of B texts, after n."""
    _, memory = model(torch.randint(65, (B, n)))

    def one_more():
        nonlocal memory
        _, memory = model(torch.zeros(B, 1, dtype=torch.int64), memory)

    return 1e6 * measure.seconds(one_more, warmup=3, rounds=7)


ways = {"Cached": Cached(writer), "CachedInPlace": CachedInPlace(writer)}
turns = [
    [[microseconds(way, n) for n in (10, 1000)] for way in ways.values()]
    for _ in range(3)
]
medians = torch.tensor(turns).median(dim=0).values.tolist()
prices = dict(zip(ways, medians))
figures.table(
    "Microseconds for one more token of 16 texts, on the CPU",
    ["", "after 10", "after 1,000"],
    [[name, *(f"{price:,.0f}" for price in row)] for name, row in prices.items()],
)
assert prices["Cached"][1] > prices["CachedInPlace"][1]

# %% [markdown]
# After a thousand tokens the cache with room, in the order in which attention reads, saves a large part of the time,
# far more than after 10, where there is little to copy. What still grows is attention itself, and adding the ages to
# the keys.

# %% [markdown]
# ## A.8 Exercises
#
# Write your answer where the dots stand and run the cell. `exercises.check` says that it is right, or names the case
# that fails, what was expected and what came. All [solutions](solutions/a_feedback_by_hand.ipynb), worked out in
# words and code.
#
# **A.1 Back through a softmax** *(fill in; easy; 5 minutes)* Without looking at the table of section A.1, and without
# autograd.

# %% tags=["exercise"]
def my_softmax_back(y, g):
    """y = softmax(s) (n,), g the error at y (n,) -> the error at s (n,)."""
    return ...


exercises.check("A.1", my_softmax_back)

# %% [markdown]
# <details><summary>Hint</summary>
#
# $\partial y_i / \partial s_j = y_i (\delta_{ij} - y_j)$. Multiply by $g_i$ and sum over $i$.
#
# </details>
#
# **A.2 Two lines are missing** *(fill in; middle; 10 minutes)* Fill in the two lines of `backwards` with dots.

# %% tags=["exercise"]
def my_backwards(g_m, x, W_q, W_k, W_v, W_1, W_2, m, q, k, v, z, h, w):
    """Errors at m -> the errors at x and at the five weights."""
    g_m, g_h = g_m.clone(), torch.zeros_like(h)
    g_q, g_k, g_v, g_z = torch.zeros(4, *x.shape, dtype=x.dtype)
    for t in reversed(range(len(x))):
        g_m[t] += W_k.T @ g_k[t] + W_v.T @ g_v[t]
        g_h[t] = W_2.T @ g_m[t] * (h[t] > 0)
        g_z[t] = ...  # m = z + W_2 @ h, and h was made of z
        g_w = v[:t] @ g_z[t]
        g_s = ...  # the softmax
        g_q[t] = k[:t].T @ g_s
        g_k[:t] += torch.outer(g_s, q[t])
        g_v[:t] += torch.outer(w[t], g_z[t])
    g_x = g_z + g_q @ W_q
    return g_x, g_q.T @ x, g_k.T @ m, g_v.T @ m, g_h.T @ z, g_m.T @ h


exercises.check("A.2", my_backwards)

# %% [markdown]
# <details><summary>Hint</summary>
#
# In `forwards`, $z_t$ is used twice: in $h_t = \text{relu}(W_1 z_t)$ and in $m_t = z_t + W_2 h_t$. Its errors add up.
#
# </details>
#
# **A.3 How much can wait?** *(fill in; middle; 10 minutes)* Each of `T` steps adds an error to all slots before it.
# How many of these pairs (step, slot) are far if the steps go in blocks of `S`, the last of which may be shorter?
# What share is that for 64 steps in blocks of 16?

# %% tags=["exercise"]
def my_far(T, S):
    return ...


exercises.check("A.3", my_far)

# %% [markdown]
# <details><summary>Hint</summary>
#
# Count the whole triangle, and take away the small triangles of the blocks. Or count with two loops.
#
# </details>
#
# **A.4 How long should a block be?** *(experiment; middle; 15 minutes)* Set `BLOCK` to 1, 4, 16 and 64 in a cell, and
# take the sum of the first two numbers of `seconds(models["fast"], 128)`. Why is neither end the best?

# %% tags=["exercise"]
my_seconds = ...  # {1: ..., 4: ..., 16: ..., 64: ...}

exercises.check("A.4", my_seconds)

# %% [markdown]
# <details><summary>Hint</summary>
#
# `Segment.backward` stands in this notebook and looks `BLOCK` up each time, so assigning another number is enough.
# Put 16 back at the end.
#
# </details>
#
# **A.5 With dropout** *(build; hard; 20 minutes)* Give `forwards` dropout on the attention weights, with a mask
# `keep` (T, T) of 0 and `1 / (1 - p)` that is handed in: step `t` uses `keep[t, :t]`. Which lines of `backwards`
# change?

# %% tags=["exercise"]
def my_dropout(g_m, x, keep, W_q, W_k, W_v, W_1, W_2):
    """Forwards and backwards -> the errors at x and at the five weights."""
    return ...


exercises.check("A.5", my_dropout)

# %% [markdown]
# <details><summary>Hint</summary>
#
# The line is `z[t] = x[t] + (keep[t, :t] * w[t]) @ v[:t]`. Write it as two: a product with a constant, then a product
# with `v`. Each has a row in the table of section A.1.
#
# </details>
#
# **A.6 With ages** *(build; hard; 40 minutes)* Give `forwards` ages: `p` (T, d), the oldest first as in chapter 3, of
# which step `t` adds `p[T - t :]` to its keys. First add up the error at `p` in the loop. Then see whether you can do
# it after the loop, all at once, with `as_strided`.

# %% tags=["exercise"]
def my_ages(g_m, x, p, W_q, W_k, W_v, W_1, W_2):
    """Forwards and backwards -> the errors at x, at p and at the five weights."""
    return ...


exercises.check("A.6", my_ages)

# %% [markdown]
# <details><summary>Hint</summary>
#
# `w[t] = ((k[:t] + p[T - t :]) @ q[t]).softmax(dim=0)`: the error at a sum goes to both of its parts, and `g_q` needs
# the keys with their ages.
#
# </details>

# %%
minutes = (time.perf_counter() - started) / 60
peak = measure.process_peak_bytes() / 2**30
print(f"this run: {minutes:.1f} minutes, peak memory {peak:.2f} GiB")
