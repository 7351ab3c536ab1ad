"""Chapter 2, Compressive Transformer: what is right, and what often goes wrong."""

import inspect

import torch
import torch.nn.functional as F

from memtx_minimal.compressive_transformer import (
    LOSSES, CompressiveTransformer, MaxPooling, auto_encoding,
)  # fmt: skip
from memtx_minimal.exercises.core import (
    call,
    compare,
    differ,
    exercise,
    fail,
    kind,
    taught,
    value,
)
from memtx_minimal.transformer_xl import RelativeAttention, distances
from memtx_minimal.vanilla_transformer import sinusoid


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# ---------------------------------------------------------------- 2.1: a slot


def stands_in(slot, n, M, C, c):
    if slot >= C:
        return [n - M + slot - C]
    first = n - M - c * (C - slot)
    return list(range(first, first + c))


sizes = [(24, 6, 6, 3), (40, 8, 4, 2), (30, 4, 3, 4)]  # n, M, C, c
compare(
    "2.1",
    right=stands_in,
    cases=[(slot, *s) for s in sizes for slot in (s[2] + s[1] - 1, s[2], s[2] - 1, 0)],
    mistakes={
        "n tokens have been read: the last one is token n - 1": (
            lambda slot, n, M, C, c: stands_in(slot, n + 1, M, C, c)
        ),
        "slot 0 is the oldest": (
            lambda slot, n, M, C, c: (
                stands_in(C + M - 1 - slot, n, M, C, c)
                if slot >= C
                else stands_in(C - 1 - slot, n, M, C, c)
            )
        ),
        "a compressed slot stands for c tokens": (
            lambda slot, n, M, C, c: [n - M - C + slot]
        ),
        "the compressed tokens are those that have left the memory": (
            lambda slot, n, M, C, c: stands_in(slot, n if slot >= C else n + M, M, C, c)
        ),
    },
)

# ---------------------------------------------------------------- 2.2: what learns


def moved(compression, loss, n_pieces):
    """The parts of a small CompressiveTransformer that a step of training moves."""
    slots = dict(mem_len=4, compressed_len=4, compression_rate=2)
    how = dict(compression=compression, loss=loss)
    with torch.random.fork_rng(devices=[]):
        model = CompressiveTransformer(10, 16, 2, 2, 32, **slots, **how)
        tokens = torch.randint(10, (2, 16 + 4 * n_pieces))
    _, memory, *_ = model(tokens[:, :16])
    logits, _, *aux = model(tokens[:, 16:], memory)
    sum(aux, F.cross_entropy(logits.flatten(0, 1), tokens[:, 16:].flatten())).backward()
    parts = set()
    for name, p in model.named_parameters():
        if p.grad is not None and p.grad.any():
            inner = "layers" if name.startswith("layers.") else "embedding, head"
            inner = "f_c" if ".compress." in name else inner
            parts.add("g" if ".decode." in name else inner)
    return parts


def moves(
    compression, loss, n_pieces, *, learn=("conv", "dilated"), bptt=1, decode=True
):
    """The same in words; the options make the usual mistakes."""
    parts = {"embedding, head", "layers"}
    if compression in learn and loss and not (loss == "bptt" and n_pieces <= bptt):
        parts.add("f_c")
    return parts | ({"g"} if loss == "auto-encoding" and decode else set())


everything = ("conv", "dilated", "max", "mean", "most-used")
compare(
    "2.2",
    right=moved,
    cases=[(f_c, loss, n) for f_c in everything for loss in LOSSES for n in (1, 2)],
    mistakes={
        "in one piece, bptt reads compressed states that are detached": (
            lambda *case: moves(*case, bptt=0)
        ),
        "pooling and most-used have no parameters": (
            lambda *case: moves(*case, learn=everything)
        ),
        "under auto-encoding the decoder g learns": lambda *case: moves(
            *case, decode=False
        ),
        "f_c learns from its loss, too": lambda *case: moves(*case, learn=()),
    },
)

# ---------------------------------------------------------------- 2.3: even attention


def even(T, n_remembered):
    seen = torch.ones(T, n_remembered + T).tril(n_remembered)  # (T, K)
    return (seen / seen.sum(dim=1, keepdim=True)).mean(dim=0)


compare(
    "2.3",
    right=even,
    cases=[(1, 0), (3, 2), (24, 48)],
    mistakes={
        "the later a key of the segment, the fewer queries see it": (
            lambda T, n: torch.ones(n + T) / (n + T)
        ),
        "each query's row sums to 1": (
            lambda T, n: (
                torch.ones(T, n + T).tril(n).sum(dim=0)
                / torch.ones(T, n + T).tril(n).sum()
            )
        ),
        "the mean over the queries, not their sum": lambda T, n: T * even(T, n),
        "one share for each slot, the remembered ones too": lambda T, n: even(T, n)[n:],
    },
)

# ---------------------------------------------------------------- 2.4: the newest


@exercise("2.4")
def check_newest(Newest):
    """A compression that keeps the newest of each group, and nothing else."""
    if not isinstance(Newest, type):
        fail(f"hand in the class itself, not {kind(Newest)}")
    for rate in (1, 2, 3):
        old, f_c = random(2, 6 * rate, 8), call(Newest, (8, rate))
        try:
            inspect.signature(f_c.forward).bind(old, None)
        except TypeError:
            fail("hint: forward(self, old, used=None): Memory hands it both")
        mine = call(f_c, (old, None))
        right = old[:, rate - 1 :: rate]
        if not isinstance(mine, torch.Tensor):
            fail(f"should return a tensor, and returns {kind(mine)}")
        if not (difference := differ(right, mine, 1e-6)):
            continue
        hints = {
            "that is the oldest of each group": old[:, ::rate],
            "the groups stand in reverse: the oldest group comes first": right.flip(1),
            "one state for each group of c": old,
            "those are the newest of all; each group keeps its newest": old[:, -6:],
        }
        told = [
            f"\nhint: {h}"
            for h, wrong in hints.items()
            if not differ(wrong, mine, 1e-6)
        ]
        fail("".join([f"rate {rate}: {difference}", *told[:1]]))


# ---------------------------------------------------------------- 2.5: a fault


def pair(x):
    return x.unflatten(1, (-1, 2)).mean(dim=2)


def push(compressed, memory, x, M, C, first=True, keep_old=False, cut=True):
    """One step of both memories; the options make the usual mistakes."""
    memory = torch.cat([memory, x], dim=1)
    n_old = max(0, memory.size(1) - M)
    old, memory = memory[:, :n_old], memory[:, n_old:]
    parts = [pair(old), compressed] if first else [compressed, pair(old)]
    compressed = torch.cat(parts, dim=1)
    if cut:
        start = 0 if keep_old else max(0, compressed.size(1) - C)
        compressed = compressed[:, start : start + C]
    return compressed, memory


def given(compressed, memory, x, M, C):
    return push(compressed, memory, x, M, C, keep_old=True)


def row(*numbers):
    return torch.tensor(numbers, dtype=torch.float32).view(1, -1, 1)


compare(
    "2.5",
    right=lambda *case: push(*case, first=False),
    cases=[
        (row(), row(), row(0, 1, 2, 3), 4, 2),
        (row(), row(0, 1, 2, 3), row(4, 5, 6, 7), 4, 2),
        (row(0.5, 2.5), row(4, 5, 6, 7), row(8, 9, 10, 11), 4, 3),
        (row(0.5, 2.5), row(4, 5, 6, 7), row(8, 9, 10, 11), 4, 0),
    ],
    given=given,
    mistakes={
        "the oldest compressed states come first": push,
        "when there are more than C, the oldest go": (
            lambda *case: push(*case, first=False, keep_old=True)
        ),
        "no more than C compressed states": lambda *case: push(
            *case, first=False, cut=False
        ),
    },
)

# ---------------------------------------------------------------- 2.6: ages


def ages(T, M, C, c):
    slots = [range(c * n, c * n + c) for n in range(C)]  # tokens count from 0
    slots += [range(n, n + 1) for n in range(c * C, c * C + M + T)]
    now = torch.arange(T)[:, None] + c * C + M  # (T, 1)
    return now - torch.tensor([sum(s) / len(s) for s in slots])  # (T, K)


def shifted_ages(T, M, C, c, by):
    right = ages(T, M, C, c)
    right[:, :C] += by
    return right


compare(
    "2.6",
    right=ages,
    cases=[(2, 3, 2, 4), (3, 4, 5, 1), (1, 0, 2, 3), (4, 6, 0, 2)],
    mistakes={
        "that is the place of a slot; it stands for c tokens": (
            lambda T, M, C, c: distances(T, M + C)
        ),
        "the mean of c tokens, not the newest of them": (
            lambda T, M, C, c: shifted_ages(T, M, C, c, -(c - 1) / 2)
        ),
        "the mean of c tokens, not the oldest of them": (
            lambda T, M, C, c: shifted_ages(T, M, C, c, (c - 1) / 2)
        ),
        "a row for each query, a column for each key": lambda *case: ages(*case).T,
        "keys after the query have an age below 0": (
            lambda *case: ages(*case).clamp(min=0)
        ),
    },
)

# ---------------------------------------------------------------- 2.7: their scores


@exercise("2.7")
@torch.no_grad()
def check_scores(my_scores):
    """The terms with a distance, for any distances."""
    attention = RelativeAttention(16, 2, dropout=0.0)
    for n, parameter in enumerate(attention.parameters()):
        parameter.copy_(random(*parameter.shape, seed=n) / 4)
    q, ages = (
        random(2, 2, 3, 8),
        10 * random(3, 5, seed=1).abs(),
    )  # (B, H, T, d), (T, K)

    def scores(bias, ages, scale=8**0.5):
        right = torch.empty(2, 2, 3, 5)
        for i in range(3):
            for j in range(5):
                R = sinusoid(ages[i, j : j + 1], 16)
                r = attention.heads(attention.position(R))
                right[:, :, i, j] = ((q + bias)[:, :, i] * r[:, 0]).sum(-1) / scale
        return right

    mine = call(my_scores, (attention, q, ages), copied=False)
    if difference := differ(scores(attention.v, ages), mine, 1e-4):
        hints = {
            "add v to the query": scores(0, ages),
            "v asks for distances, u for contents": scores(attention.u, ages),
            "divide by the root of d_head": scores(attention.v, ages, scale=1),
            "each query has ages of its own": scores(
                attention.v, ages[:1].expand(3, 5)
            ),
        }
        told = [
            f"\nhint: {h}"
            for h, wrong in hints.items()
            if not differ(wrong, mine, 1e-4)
        ]
        fail("".join([f"my_scores(attention, q, ages): {difference}", *told[:1]]))


# ---------------------------------------------------------------- 2.8: twice

value(
    "2.8",
    right=4 + 2 * (4 + 2 * 2 + 2 * 2 * 2),
    mistakes={
        "that is the range with one compression of four slots": 4 + 2 * (4 + 2 * 4),
        "that is the range without the second compression": 4 + 2 * (4 + 2 * 2),
        "the segment counts, too": 2 * (4 + 2 * 2 + 2 * 2 * 2),
    },
)


# ---------------------------------------------------------------- for handouts

old, g = random(2, 6, 4), random(4, 12, seed=2)


def decode(new):
    return new @ g


taught("2.MaxPooling.forward", MaxPooling, [(old,)], args=(4, 3))
taught("2.auto_encoding", auto_encoding, [(decode, old, random(2, 2, 4, seed=1))])
