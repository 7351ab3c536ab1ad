"""The checks of the exercises pass what is right, and say what is wrong with the rest."""

import inspect
import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from memtx_minimal import exercises, transformer_xl
from memtx_minimal.compressive_transformer import MaxPooling
from memtx_minimal.feedback_transformer import FeedbackTransformer, step
from memtx_minimal.transformer_xl import (
    RelativeAttention,
    TransformerXL,
    distances,
    rel_shift,
)
from memtx_minimal.vanilla_transformer import VanillaTransformer, sinusoid


def attention(q, k, v, last=1, scale=True):
    rows = []
    for t in range(len(q)):
        scores = k[: t + last] @ q[t] / (q.size(1) ** 0.5 if scale else 1)
        rows.append(scores.softmax(dim=0) @ v[: t + last])
    return torch.stack(rows)


def test_attention():
    exercises.check_attention(attention)
    with pytest.raises(AssertionError, match=r"T = 2, d = 4: queries \[0\] are wrong"):
        exercises.check_attention(partial(attention, last=2))  # one look ahead
    with pytest.raises(AssertionError, match=r"T = 2, d = 4: queries \[1\] are wrong"):
        exercises.check_attention(partial(attention, scale=False))
    with pytest.raises(AssertionError, match=r"the shape is \(1, 4, 1\), not \(1, 4\)"):
        exercises.check_attention(lambda *qkv: attention(*qkv)[..., None])


def test_cache():
    exercises.check_cache(lambda T, B, n: 2 * 32 * B * T * n * (4096 // 32) * 2)
    with pytest.raises(AssertionError, match=r"\(1, 1, 1\): 8192, not 16384"):
        exercises.check_cache(lambda T, B, n: 32 * B * T * n * (4096 // 32) * 2)


def turn(k, d_model, sign=1):
    half = d_model // 2
    angle = k / 10_000 ** (torch.arange(half) / half)
    sin, cos = sign * angle.sin().diag(), angle.cos().diag()
    return torch.cat([torch.cat([cos, -sin], dim=1), torch.cat([sin, cos], dim=1)])


def test_turn():
    exercises.check_turn(turn)
    with pytest.raises(AssertionError, match=r"k = 1, d_model = 2: dimensions \[0, 1\]"):
        exercises.check_turn(partial(turn, sign=-1))
    with pytest.raises(AssertionError, match=r"the shape is \(1, 1\), not \(2, 2\)"):
        exercises.check_turn(lambda k, d_model: torch.eye(d_model // 2))


@pytest.fixture
def vanilla():
    torch.manual_seed(0)
    return VanillaTransformer(10, 16, 2, 2, 32, max_len=64).eval()


@torch.no_grad()
def slid(model, tokens, drop=True):
    """The last of 65 tokens, from keys and values of those before, less the oldest."""
    x, y = (
        model.embedding(part) + exercises.sinusoid(places, 16)
        for part, places in ((tokens[:, :64], torch.arange(64)), (tokens[:, 64:], torch.tensor([63])))
    )
    for layer in model.layers:
        _, k, v = parts(layer, x)
        q, new_k, new_v = parts(layer, y)
        k, v = (torch.cat([old[:, :, drop:], new], dim=2) for old, new in ((k, new_k), (v, new_v)))
        y = y + layer.attention.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        y, x = y + layer.feed_forward(layer.norm_feed_forward(y)), layer(x)
    return model.head(model.norm(y))[:, -1]


def parts(layer, x):
    qkv = layer.attention.query_key_value(layer.norm_attention(x))
    return qkv.unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)


def test_slide(vanilla, capsys):
    exercises.check_slide(partial(slid, vanilla), vanilla)
    assert "from those of the last 64 read anew" in capsys.readouterr().out
    for wrong in (partial(slid, vanilla, drop=False), lambda tokens: vanilla(tokens[:, 1:])[0][:, -1]):
        with pytest.raises(AssertionError, match="the logits are wrong by"):
            exercises.check_slide(wrong, vanilla)


@torch.no_grad()
def sliding(model, stream, n, first=0):
    windows = stream[first : first + n + 63].unfold(0, 64, 1)
    return F.cross_entropy(model(windows)[0][:, -1], stream[64 + first : 64 + first + n]).item()


def test_sliding(vanilla):
    stream = torch.randint(10, (200,), generator=torch.Generator().manual_seed(0))
    exercises.check_sliding(sliding, vanilla, stream)
    with pytest.raises(AssertionError, match="n = 1: "):
        exercises.check_sliding(partial(sliding, first=1), vanilla, stream)
    with pytest.raises(AssertionError, match="n = 1: nan"):
        exercises.check_sliding(lambda *_: math.nan, vanilla, stream)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return FeedbackTransformer(10, 16, 2, 2, 32, mem_len=6).double()


def blocks(model, x, kv, S):
    outputs, vectors = [], []
    for part in x.split(S, dim=1):
        n = part.size(1)
        together = part.flatten(0, 1), kv.repeat_interleave(n, dim=0)
        output, vector = (y.unflatten(0, (-1, n)) for y in step(model, *together))
        kv = torch.cat([kv, model.memory.keys_values(vector)], dim=1)
        kv = kv[:, -model.mem_len :]
        outputs.append(output)
        vectors.append(vector)
    return torch.cat(outputs, dim=1), torch.cat(vectors, dim=1), kv


def test_clock():
    exercises.check_clock(lambda L, n, kind: L if kind == "vanilla" else L * (n + 1))
    with pytest.raises(AssertionError, match=r"my_clock\(2, 0, 'vanilla'\) is 1; 2 layers"):
        exercises.check_clock(lambda L, n, kind: min(L, n + 1) if kind == "vanilla" else L * (n + 1))


def test_clock_in_every_depth():
    with pytest.raises(AssertionError, match=r"my_clock\(1, 0, 'vanilla'\) is 4; 1 layers"):
        exercises.check_clock(lambda L, n, kind: 4 if kind == "vanilla" else L * (n + 1))


def test_tracker(model):
    model.mem_len = 1  # made with more
    with pytest.raises(AssertionError, match="mem_len=6, not 1: train a new model"):
        exercises.check_tracker(model)
    with pytest.raises(AssertionError, match="2 layers, not 1"):
        exercises.check_tracker(FeedbackTransformer(10, 16, 2, 2, 32, mem_len=1))
    with pytest.raises(AssertionError, match="above 0.9"):
        exercises.check_tracker(FeedbackTransformer(10, 16, 2, 1, 32, mem_len=1))


def test_patience():
    exercises.check_patience([0.8] * 32)
    with pytest.raises(AssertionError, match="0.29 right"):
        exercises.check_patience([0.29] * 32)


def mixed_up(model, x, kv, S):
    """The texts of a batch share their memories."""
    return blocks(model, x, kv.roll(1, dims=0), S)


def backwards_in_a_block(model, x, kv, S):
    turned = torch.cat([part.flip(1) for part in x.split(S, dim=1)], dim=1)
    *both, kv = blocks(model, turned, kv, S)
    back = [torch.cat([y.flip(1) for y in all.split(S, dim=1)], dim=1) for all in both]
    return *back, kv


def test_blocks(model):
    exercises.check_blocks(blocks, model)
    for wrong, why in [
        (lambda model, x, kv, S: blocks(model, x, kv, 1), r"S = 4: outputs are wrong at"),
        (lambda *a: tuple(2 * y for y in blocks(*a)), "S = 1: outputs are wrong at"),
        (mixed_up, "own text's memory"),
        (backwards_in_a_block, "S = 4: outputs are wrong"),
    ]:
        with pytest.raises(AssertionError, match=why):
            exercises.check_blocks(wrong, model)


# ---------------------------------------------------------------- chapter 4


def sets(buckets, c, before=(0, 1)):
    order = sorted(range(len(buckets)), key=lambda i: (buckets[i], i))
    chunk = {i: place // c for place, i in enumerate(order)}
    near = lambda i, j: chunk[i] - chunk[j] in before and buckets[i] == buckets[j]
    return [[j for j in range(i + 1) if near(i, j)] for i in range(len(buckets))]


def test_sets():
    exercises.check_sets(sets)
    for wrong in (lambda h, c: sets(h, c, (0,)), lambda h, c: sets([0] * len(h), c)):
        with pytest.raises(AssertionError, match="the set of"):
            exercises.check_sets(wrong)
    with pytest.raises(AssertionError, match="the set of"):
        exercises.check_sets(lambda h, c: [s[::-1] for s in sets(h, c)])
    with pytest.raises(AssertionError, match="6 sets for 5 tokens"):
        exercises.check_sets(lambda h, c: [*sets(h, c), []])


def test_once():
    exercises.check_once([2.3, 2.2, 2.1, 2.0], [2.3, 2.25, 2.15, 2.05])
    with pytest.raises(AssertionError, match="finds no key twice"):
        exercises.check_once([2.3, 2.2, 2.1, 2.0], [2.4, 2.25, 2.15, 2.05])
    with pytest.raises(AssertionError, match="switched"):
        exercises.check_once([2.3, 2.2, 2.1, 2.0], [2.3, 2.2, 2.1, 2.0])
    with pytest.raises(AssertionError, match="two lists of four"):
        exercises.check_once([2.3], [2.3])
    with pytest.raises(AssertionError, match="more than 0.2"):
        exercises.check_once([9.0] * 4, [9, 1, 20, 5])


def test_broken():
    exercises.check_broken(0.2)
    for wrong in (1e-12, 5e9, float("inf")):
        with pytest.raises(AssertionError, match="other numbers are dropped"):
            exercises.check_broken(wrong)


def test_places():
    places = lambda h, c: sum(c * -(-h.count(b) // c) for b in set(h))
    exercises.check_places(places)
    with pytest.raises(AssertionError, match="1024 places for"):
        exercises.check_places(lambda h, c: len(h))


# ---------------------------------------------------------------- appendix A


def both_ways(g_m, x, keep, p, W_q, W_k, W_v, W_1, W_2, softmax=True):
    """The solutions of exercises 2 and 3 in one: the error at p last."""
    T, d = x.shape
    q, k, v, z, m, g_q, g_k, g_v, g_z, g_p = torch.zeros(10, T, d, dtype=x.dtype)
    h, g_h = torch.zeros(2, T, len(W_1), dtype=x.dtype)
    w, g_m, left = [None] * T, g_m.clone(), x.new_zeros(T, 2 * T)
    for t in range(T):
        q[t] = W_q @ x[t]
        w[t] = ((k[:t] + p[T - t :]) @ q[t]).softmax(dim=0)
        z[t] = x[t] + (keep[t, :t] * w[t]) @ v[:t]
        h[t] = (W_1 @ z[t]).relu()
        m[t] = z[t] + W_2 @ h[t]
        k[t], v[t] = W_k @ m[t], W_v @ m[t]
    for t in reversed(range(T)):
        g_m[t] += W_k.T @ g_k[t] + W_v.T @ g_v[t]
        g_h[t] = W_2.T @ g_m[t] * (h[t] > 0)
        g_z[t] = g_m[t] + W_1.T @ g_h[t]
        g_w = keep[t, :t] * (v[:t] @ g_z[t])
        g_s = w[t] * (g_w - w[t] @ g_w * softmax)
        g_q[t] = (k[:t] + p[T - t :]).T @ g_s
        g_k[:t] += torch.outer(g_s, q[t])
        g_v[:t] += torch.outer(keep[t, :t] * w[t], g_z[t])
        g_p[T - t :] += torch.outer(g_s, q[t])
        left[t, T : T + t] = g_s
    at_once = left.as_strided((T, T), (2 * T + 1, 1)).T @ q
    torch.testing.assert_close(at_once, g_p)
    weights = g_q.T @ x, g_k.T @ m, g_v.T @ m, g_h.T @ z, g_m.T @ h
    return g_z + g_q @ W_q, *weights, at_once


def test_dropout_backwards():
    def mine(g_m, x, keep, *weights, **wrong):
        return both_ways(g_m, x, keep, torch.zeros_like(x), *weights, **wrong)[:-1]

    exercises.check_dropout_backwards(mine)
    with pytest.raises(AssertionError, match="the error at x: expected"):
        exercises.check_dropout_backwards(lambda *given: mine(*given, softmax=False))
    with pytest.raises(AssertionError, match="1 errors; return those at x, W_q"):
        exercises.check_dropout_backwards(lambda *given: mine(*given)[:1])


def test_ages_backwards():
    def mine(g_m, x, p, *weights):
        ones = x.new_ones(len(x), len(x))
        g_x, *g_weights, g_p = both_ways(g_m, x, ones, p, *weights)
        return g_x, g_p, *g_weights

    exercises.check_ages_backwards(mine)
    with pytest.raises(AssertionError, match="the error at p: expected"):
        exercises.check_ages_backwards(
            lambda *given: [e.flip(0) if n == 1 else e for n, e in enumerate(mine(*given))]
        )


# ---------------------------------------------------------------- appendix B


def test_pair():
    exercises.check_pair(((1, 0), (0, 0)))
    for wrong, why in [
        (((0, 1), (0, 0)), "buckets must differ"),
        (((1, 0), (0, 1)), "never lies in an earlier chunk"),
        (((1, 1), (0, 0)), "differ by 2"),
    ]:
        with pytest.raises(AssertionError, match=why):
            exercises.check_pair(wrong)


def test_rounds():
    def add(tops, totals, outs, top=None):
        tops, totals, outs = map(torch.stack, (tops, totals, outs))
        share = (tops - tops.amax(dim=0)).exp2() if top is None else top
        return (share * outs).sum(dim=0) / (share * totals).sum(dim=0)

    exercises.check_rounds(add)
    with pytest.raises(AssertionError, match="one largest score"):
        exercises.check_rounds(lambda *rounds: add(*rounds, top=1.0))


# ---------------------------------------------------------------- chapter 1


def papers_shift(scores):
    T, K = scores.shape[-2:]
    padded = torch.nn.functional.pad(scores, (1, 0))
    return padded.reshape(*scores.shape[:-2], K + 1, T)[..., 1:, :].reshape(scores.shape)


def last_row_first(scores):
    padded = torch.nn.functional.pad(scores, (1, 0))
    T, K = scores.shape[-2:]
    return padded.reshape(*scores.shape[:-2], K + 1, T)[..., :-1, :].reshape(scores.shape)


def test_shift():
    exercises.check_shift(papers_shift)
    for wrong, why in [
        (lambda s: rel_shift(s), "without rel_shift"),
        (lambda s: s, r"T = 3, M = 2: row 0, key 0, at a distance of 2: should be row 0, column 2"),
        (last_row_first, "T = 3, M = 2: row 0, key 0"),
        (lambda s: s[0, 0], r"the shape is \(3, 5\); return \(2, 3, 3, 5\)"),
        (lambda s: None, r"the shape is \(\)"),
        (lambda s: s @ s, "it fails with RuntimeError"),
    ]:
        with pytest.raises(AssertionError, match=why):
            exercises.check_shift(wrong)


def test_cleared():
    exercises.check_cleared(1.75, 1.9, 1.7)
    with pytest.raises(AssertionError, match="is it cleared at all"):
        exercises.check_cleared(1.7, 1.9, 1.7)
    with pytest.raises(AssertionError, match="as if 75% of the segments"):
        exercises.check_cleared(1.85, 1.9, 1.7)


def test_reach_with_same_length():
    exercises.check_reach(lambda M, L: 1 + L * (M - 1))
    with pytest.raises(AssertionError, match=r"my_reach\(4, 1\) is 5, not 4"):
        exercises.check_reach(lambda M, L: 1 + L * M)


@pytest.mark.parametrize("same_length", [False, True])
def test_longest_reach_is_what_is_felt(same_length):
    for T, M, L in [(4, 1, 3), (4, 3, 2), (4, 6, 3), (3, 3, 2), (1, 5, 2)]:
        torch.manual_seed(0)
        model = TransformerXL(10, 16, 2, L, 32, mem_len=M, same_length=same_length).double()
        n = T * (40 // T)
        text = torch.randint(10, (1, n))
        changed = (text + torch.eye(n, dtype=torch.int64)) % 10
        memory = None
        for segment in torch.cat([text, changed]).split(T, dim=1):
            logits, memory = model(segment, memory)
        last = logits[:, -1]
        felt = ((last[1:] - last[0]).abs().amax(dim=1) > 1e-12).sum().item()
        assert exercises.longest_reach(T, M, L, same_length) == felt < n
        if not same_length:
            assert felt == T + M + T * math.ceil(M / T) * (L - 1)


class Bias(RelativeAttention):
    n, shared = 5, True

    def __init__(self, d_model, n_heads, dropout):
        super().__init__(d_model, n_heads, dropout)
        self.bias = torch.nn.Parameter(torch.zeros(n_heads, self.n))

    def forward(self, context, R, mask):
        T, K = mask.shape
        q = self.heads(self.query(context[:, -T:]))
        k, values = (self.heads(x) for x in self.key_value(context).chunk(2, dim=-1))
        far = distances(T, K - T).clamp(min=0)
        far = far.clamp(max=self.n - 1) if self.shared else far % self.n
        scores = (q + self.u) @ k.mT / q.size(-1) ** 0.5 + self.bias[:, far] + mask
        return self.out((scores.softmax(-1) @ values).transpose(1, 2).flatten(2))


def test_bias():
    exercises.check_bias(type("Long", (Bias,), {"n": 64}))
    exercises.check_bias(Bias)
    with pytest.raises(AssertionError, match="a parameter `bias`"):
        exercises.check_bias(RelativeAttention)
    with pytest.raises(AssertionError, match="they share its last number"):
        exercises.check_bias(type("Round", (Bias,), {"shared": False}))
    upside_down = lambda self, context, R, mask: Bias.forward(self, context.flip(1), R, mask)
    with pytest.raises(AssertionError, match="the output is wrong, when the table covers"):
        exercises.check_bias(type("Wrong", (Bias,), {"n": 64, "forward": upside_down}))


def test_through():
    source = inspect.getsource(TransformerXL).replace("TransformerXL", "Through", 1)
    names = vars(transformer_xl) | {}
    exec(source.replace(".detach()", ""), names)
    torch.manual_seed(0)
    sizes = dict(vocab_size=20, d_model=16, n_heads=2, n_layers=2, d_ff=32, mem_len=4)
    exercises.check_through(names["Through"](**sizes))
    with pytest.raises(AssertionError, match="is `detach` gone?"):
        exercises.check_through(TransformerXL(**sizes))


# ---------------------------------------------------------------- chapter 2


def my_slot(slot, n, M, C, c):
    if slot >= C:
        return [n - M + slot - C]
    first = n - M - c * (C - slot)
    return list(range(first, first + c))


def test_slot():
    exercises.check_slot(my_slot)
    with pytest.raises(AssertionError, match=r"my_slot\(0, 24, 6, 6, 3\) is \[3, 4, 5\], not \[0, 1, 2\]"):
        exercises.check_slot(lambda slot, n, M, C, c: my_slot(slot, n + 3 * (slot < C), M, C, c))


def my_moved(compression, loss, n_pieces):
    moved = {"embedding, head", "layers"}
    if compression in ("conv", "dilated") and loss is not None:
        if loss != "bptt" or n_pieces > 1:
            moved.add("f_c")
    if loss == "auto-encoding":
        moved.add("g")
    return moved


def test_moved():
    exercises.check_moved(my_moved)
    with pytest.raises(AssertionError, match=r"\('conv', 'bptt', 1\) is .*'f_c'.*; training moves \['emb"):
        exercises.check_moved(lambda compression, loss, n: my_moved(compression, loss, 2))
    with pytest.raises(AssertionError, match=r"'max', 'attention', 1\) is .*'f_c'"):
        exercises.check_moved(lambda f_c, loss, n: my_moved("conv" if f_c == "max" else f_c, loss, n))


def my_even(T, n_remembered):
    seen = torch.ones(T, n_remembered + T).tril(n_remembered)
    return (seen / seen.sum(dim=1, keepdim=True)).mean(dim=0)


def test_even():
    exercises.check_even(my_even)
    with pytest.raises(AssertionError, match=r"my_even\(3, 2\): slot 4 gets 0.0667, not 0.2000"):
        exercises.check_even(lambda T, n: torch.ones(n + T) / (n + T))
    with pytest.raises(AssertionError, match="one share a slot: 5"):
        exercises.check_even(lambda T, n: my_even(T, n)[:4])


def test_compression():
    class Newest(MaxPooling):
        def forward(self, old, used=None):
            return old[:, self.rate - 1 :: self.rate]

    class Oldest(MaxPooling):
        def forward(self, old, used=None):
            return old[:, :: self.rate]

    class Backwards(MaxPooling):
        def forward(self, old, used=None):
            return old.flip(1)[:, :: self.rate]

    class Alone(MaxPooling):
        def forward(self, old):
            return old[:, self.rate - 1 :: self.rate]

    class Whole(MaxPooling):
        def forward(self, old, used=None):
            return old

    exercises.check_compression(Newest)
    for wrong, why in [
        (Oldest, "rate 2: not the newest of each 2"), (Backwards, "in reverse"),
        (Alone, "used=None"), (Whole, "should be"),
    ]:  # fmt: skip
        with pytest.raises(AssertionError, match=why):
            exercises.check_compression(wrong)


def my_ages(T, M, C, c):
    newest = M + 1 + torch.arange(T)[:, None]
    groups = c * torch.arange(C - 1, -1, -1) + (c - 1) / 2
    return torch.cat([newest + groups, distances(T, M)], dim=1)


def test_ages():
    exercises.check_ages(my_ages)
    with pytest.raises(AssertionError, match=r"my_ages\(2, 3, 2, 4\): query 0 is 9.5 from key 0, not 5"):
        exercises.check_ages(lambda T, M, C, c: distances(T, M + C))
    with pytest.raises(AssertionError, match=r"not \(T, K\) = \(2, 7\)"):
        exercises.check_ages(lambda T, M, C, c: my_ages(T, M, C, c).T)


def my_scores(attention, q, ages):
    R = sinusoid(ages.flatten(), q.size(1) * q.size(3))
    r = attention.heads(attention.position(R)).unflatten(1, ages.shape)
    return q.size(-1) ** -0.5 * torch.einsum("bhtd,htkd->bhtk", q + attention.v, r)


def test_scores():
    exercises.check_scores(my_scores)
    for wrong, why in [
        (lambda attention, q, ages: my_scores(attention, q - attention.v, ages), r"query 0, key 0: it is \(q \+ v\)"),
        (lambda attention, q, ages: my_scores(attention, q, ages[:1].expand(3, 5)), "query 1, key 0"),
        (lambda attention, q, ages: my_scores(attention, q, ages).mT, r"not \(B, H, T, K\)"),
    ]:  # fmt: skip
        with pytest.raises(AssertionError, match=why):
            exercises.check_scores(wrong)


def test_twice():
    exercises.check_twice(4 + 2 * (4 + 2 * 2 + 4 * 2), 4, 2, 4, 2, 2, 2)
    with pytest.raises(AssertionError, match="28 tokens are felt, .* is 36"):
        exercises.check_twice(28, 4, 2, 4, 2, 2, 2)


def my_tokens(space, L, d_model, halves=2):
    numbers = space // 4
    slots = numbers // (L * d_model)
    half = slots // halves // 4 * 4
    return {
        "sliding window": numbers // (2 * L * d_model), "Transformer-XL": slots,
        "Compressive": half + 4 * half, "Feedback": numbers // (2 * d_model),
    }  # fmt: skip


def test_tokens():
    exercises.check_tokens(my_tokens)
    with pytest.raises(AssertionError, match="Compressive, 16384 bytes, 2 layers, d_model 64: 160, not 80"):
        exercises.check_tokens(partial(my_tokens, halves=1))
    with pytest.raises(AssertionError, match="Feedback, .*: None"):
        exercises.check_tokens(lambda *sizes: my_tokens(*sizes) | {"Feedback": None})


def test_depth():
    exercises.check_depth(lambda c: c + 2)
    with pytest.raises(AssertionError, match="c = 1: 2, not 3"):
        exercises.check_depth(lambda c: c + 1)


def my_ties(values, middle=lambda losses: sum(losses) / len(losses)):
    best = min(values, key=lambda name: middle(values[name]))
    return {name for name in values if min(values[name]) <= max(values[best])}


def test_ties():
    exercises.check_ties(my_ties)
    with pytest.raises(AssertionError, match=r"\['a', 'b', 'd'\] tie, not \['a', 'b', 'c', 'd'\]"):
        exercises.check_ties(partial(my_ties, middle=min))
    with pytest.raises(AssertionError, match=r"\['a', 'b'\] tie, not \['a'\]"):
        exercises.check_ties(lambda values: {"a"})


def my_reach(read, tokens, first=0):
    before, N = read(tokens), tokens.size(1)
    for place in range(first, N):
        changed = tokens.clone()
        changed[0, place] = 1 - changed[0, place].clamp(max=1)
        if not torch.equal(read(changed), before):
            return N - 1 - place


def test_reach():
    exercises.check_reach(my_reach)
    with pytest.raises(AssertionError, match="back to age 15: 14"):
        exercises.check_reach(partial(my_reach, first=1))


def test_crossing():
    operations = lambda name, n, L, d_model, d_ff: n * d_model if name == "vanilla" else 50_000

    def my_crossing(operations, d_model, n=64):
        sizes = dict(L=2, d_model=d_model, d_ff=4 * d_model)
        while operations("Reformer", n, **sizes) >= operations("vanilla", n, **sizes):
            n *= 2
        return n

    exercises.check_crossing(my_crossing, operations)
    with pytest.raises(AssertionError, match="d_model = 512: 1024 tokens, not 128"):
        exercises.check_crossing(lambda *_: my_crossing(operations, 64), operations)
