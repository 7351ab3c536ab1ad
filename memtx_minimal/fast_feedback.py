"""The Feedback Transformer, faster: a backward pass by hand, a cache with room.

Autograd records each small product of each step and replays the record backwards. Here
the loop backwards holds only what must wait for later steps: the errors (gradients of
the loss) at the states. What weights, keys and values need is formed from the errors of
a whole block of steps, in a few large matrix products. `speed_up(model)` installs it.

Letters as in feedback_transformer.py; also BH = B * H, each head of each text, K = M +
T slots for keys and values, memory and segment, A the slots that a step sees, at most
mem_len, and S, the steps of a block. A layer is its ten weights: gain_q and shift_q of
a norm, W_q and W_o of attention; gain_1 and shift_1 of a norm, W_1, b_1, W_2 and b_2
of the feed-forward.
"""

from typing import NamedTuple

import torch
from torch import nn
from torch.autograd.function import Function, once_differentiable
from torch.nn.functional import pad
from torch.nn.modules import module as every_module

from memtx_minimal import inputs
from memtx_minimal.feedback_transformer import FeedbackTransformer, Layer, Memory, embed

BLOCK = 16  # steps in a block
EPS = 1e-5  # of every layer norm
norm_back = torch.ops.aten.native_layer_norm_backward.default


def normalise(x, gain=None, shift=None):
    """Layer norm; also mean and 1 / deviation, for its backward."""
    return torch.native_layer_norm(x, x.shape[-1:], gain, shift, EPS)


def normalise_back(g, x, mean, rstd, gain):
    """The error at x, from the error g at normalise(x, gain, shift)."""
    only_x = [True, False, False]
    return norm_back(g, x, gain.shape, mean, rstd, gain, None, only_x)[0]


def by_layer(weights):
    """A flat list of weights -> ten for each layer."""
    return [weights[i : i + 10] for i in range(0, len(weights), 10)]


def outside_autocast(work):
    """Without autocast, so that the loops compute with the numbers they are given."""

    def work_outside(first, tensor, *rest):  # first is ctx in a backward pass
        with inputs.autocast(tensor.device.type, enabled=False):
            return work(first, tensor, *rest)

    return work_outside


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


class Errors(NamedTuple):
    """The errors of S steps, named as in Kept; at queries before they are scaled, and
    inside the feed-forward before the ReLU."""

    states: torch.Tensor  # (L + 1, S, B, d_model)
    middles: torch.Tensor  # (L, S, B, d_model)
    queries: torch.Tensor  # (L, S, B, d_model)
    hidden: torch.Tensor  # (L, S, B, d_ff)


def by_step(tensor):
    """(L, S, ...) -> for each step a tuple of its L parts."""
    return zip(*(layer.unbind() for layer in tensor.unbind()))


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


class Sums(NamedTuple):
    """The errors that block after block fills in, or adds to."""

    x: torch.Tensor  # (T, B, d_model)
    vectors: torch.Tensor  # (T, B, d_model)
    new: torch.Tensor  # (T, B, 2 * d_model): keys and values, as W_kv makes them
    slots: torch.Tensor  # (2 * BH, K, d_head): by slot, so far from later blocks
    positions: torch.Tensor  # (mem_len, d_head)
    layers: list  # seven, of all layers together: see add_weights


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


def behind_norm(G, g, gain, shift, W):
    """The errors at gain, shift and W of y = W @ (gain * x_hat + shift).

    G is the sum of (error at y) times x_hat, of W's shape; g the sum of errors at y.
    """
    return (G * W).sum(dim=0), g @ W, torch.addr(G * gain, g, shift)


def layer_errors(layer, sums):
    """The errors at a layer's ten weights, from its share of Sums.layers."""
    G_q, sum_q, G_o, G_1, sum_hidden, G_2, sum_output = sums
    at_query = behind_norm(G_q, sum_q, *layer[:3])
    at_hidden = behind_norm(G_1, sum_hidden, *layer[4:7])
    return *at_query, G_o, *at_hidden, sum_hidden, G_2, sum_output


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


def tree(module):
    """A module, its parts, their parts, and so on."""
    found = [module]
    for part in found:  # the list grows as we go
        found += part._modules.values()
    return found


def traits(module):
    """All that decides what a call of a module does, but the numbers in its weights."""
    own = module.__dict__  # its keys, too: is forward among them?
    weights = [*map(type, own["_parameters"].values())]
    hooks = len(own["_forward_pre_hooks"]) + len(own["_forward_hooks"])
    hooks += len(own["_backward_pre_hooks"]) + len(own["_backward_hooks"])
    dropout = "p" in own and own["training"] and own["p"] > 0
    return type(module), own.keys(), weights, hooks, own.get("eps"), dropout


TRAITS = "kind", "attributes", "weights", "hooks", "eps", "dropout at work"
PLAIN = {  # the traits of fresh ones; their sizes do not matter
    Layer: [traits(part) for part in tree(Layer(1, 1, 1, dropout=0.0))],
    Memory: [traits(part) for part in tree(Memory(1, 1, 1, 1, shared_kv=True))],
}


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


def said(trait):
    """A trait in words."""
    if isinstance(trait, (list, tuple)):
        return ", ".join(map(said, trait)) or "none"
    return trait.__name__ if isinstance(trait, type) else f"{trait}"


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


class FastFeedbackTransformer(FeedbackTransformer):
    """A FeedbackTransformer whose loop is one operation. Made by speed_up."""

    def loop(self, x, kv):
        check_plain(self)
        slots = kv[:, :, 0].permute(2, 0, 3, 1, 4)  # (2, B, H, M, d_head)
        outputs, vectors, slots = Segment.apply(x, slots, *weights_of(self))
        kv = slots.permute(1, 3, 0, 2, 4)[:, -self.mem_len :, None]
        return outputs, vectors, kv


def speed_up(model):
    """Install the fast loop in a FeedbackTransformer, and return it.

    It gives the numbers of the plain loop, in the weights' own precision. A model that
    computes anything else is refused with a ValueError that names the reason, here and
    at each call: something may have been changed in the meantime.
    """
    check_plain(model)
    model.__class__ = FastFeedbackTransformer
    return model


ROOM = 64  # slots that a cache keeps free for what comes next


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


torch.serialization.add_safe_globals([Cache])  # so that torch.load reads one


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
