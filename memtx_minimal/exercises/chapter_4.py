"""Chapter 4, Reformer: what is right, and what often goes wrong."""

import math

import torch

from memtx_minimal.exercises.core import (
    compare, exercise, fail, kind, number, show, taught,
)  # fmt: skip
from memtx_minimal.reformer import in_set, look_back


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def random_buckets(n, T, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(n, (T,), generator=generator).tolist()


# ---------------------------------------------------------------- 4.1: a hash


def joined(x, D):
    return torch.cat([x @ D, -(x @ D)], dim=-1)


compare(
    "4.1",
    right=lambda x, D: joined(x, D).argmax(dim=-1),
    cases=[
        (torch.tensor([[1.0, 0], [0, 1], [-1, 0.5]]), torch.eye(2)),
        (random(50, 8).round(decimals=1), random(8, 3, seed=1)),
    ],
    without=["hash_vectors"],
    mistakes={
        "the opposite directions are buckets, too": lambda x, D: (x @ D).argmax(dim=-1),
        "first xD, then -xD: b / 2 directions, then the opposite ones": (
            lambda x, D: joined(x, -D).argmax(dim=-1)
        ),
        "the largest of xD and -xD tells in which of the two it goes": (
            lambda x, D: (x @ D).abs().argmax(dim=-1)
        ),
        "a bucket for each token: the argmax goes over the directions": (
            lambda x, D: joined(x, D).argmax(dim=0)
        ),
    },
)

# ---------------------------------------------------------------- 4.2: counted once


@exercise("4.2")
def check_once(with_N, without_N):
    """Losses with 1, 2, 4 and 8 rounds."""
    for losses in (with_N, without_N):
        if not isinstance(losses, (list, tuple)) or len(losses) != 4:
            fail(f"two lists of four losses, please; this is {show(losses)}")
        for loss in losses:
            if number(loss) is None or not math.isfinite(loss):
                fail(f"a loss is a number; this is {show(loss)}")
    with_N, without_N = ([float(loss) for loss in x] for x in (with_N, without_N))
    if abs(with_N[0] - without_N[0]) > 1e-4:
        expected = "one round finds no key twice, so nothing changes"
        fail(f"{with_N[0]:.4f} and {without_N[0]:.4f} with one round: {expected}")
    if all(abs(a - b) < 1e-6 for a, b in zip(with_N[1:], without_N[1:])):
        fail("equal with more rounds, too: was settings.count_once switched?")
    if max(abs(a - b) for a, b in zip(with_N, without_N)) > 0.2:
        fail("the two differ by more than 0.2 nats: is it the same model?")


# ---------------------------------------------------------------- 4.3: a fault


def join(o, z):
    return (z.softmax(dim=0)[..., None] * o).sum(dim=0)


compare(
    "4.3",
    right=join,
    cases=[
        (torch.tensor([[[0.0]], [[1.0]]]), torch.tensor([[0.0], [2.0]])),
        (random(3, 4, 2).round(decimals=1), random(3, 4, seed=1).round(decimals=1)),
    ],
    given=lambda o, z: o.mean(dim=0),
    mistakes={
        "one softmax over the rounds, for each token": (
            lambda o, z: (z.softmax(dim=-1)[..., None] * o).sum(dim=0)
        ),
        "z is a logarithm: the weights are its exponentials": (
            lambda o, z: ((z / z.sum(dim=0))[..., None] * o).sum(dim=0)
        ),
        "the weights sum to 1: divide by the sum of the exponentials": (
            lambda o, z: (z.exp()[..., None] * o).sum(dim=0)
        ),
    },
)

# ---------------------------------------------------------------- 4.4: strictly causal


def by_rank(buckets, w):
    return [buckets[:i].count(bucket) // w for i, bucket in enumerate(buckets)]


def by_place(buckets, w):
    order = sorted(range(len(buckets)), key=lambda i: (buckets[i], i))
    return [order.index(i) // w for i in range(len(buckets))]


def causal_sets(buckets, w, near=(0, 1), alike=True, before=True, chunk_of=by_rank):
    """The options make the usual mistakes."""
    chunk, last = chunk_of(buckets, w), lambda i: i + 1 if before else len(buckets)

    def seen(i, j):
        return chunk[i] - chunk[j] in near and (buckets[i] == buckets[j] or not alike)

    return [[j for j in range(last(i)) if seen(i, j)] for i in range(len(buckets))]


compare(
    "4.4",
    right=causal_sets,
    cases=[([1, 0, 1, 1, 0, 1], 2), ([0, 1, 1, 0, 0, 1, 1, 0, 0], 2)]
    + [(random_buckets(4, 5 + n, n), 1 + n % 6) for n in range(20)]
    + [([0] * 6, 2)],
    without=["in_set", "attention_weights"],
    mistakes={
        "a chunk looks at the one before it, too": lambda h, w: causal_sets(
            h, w, near=(0,)
        ),
        "only keys of the same bucket": lambda h, w: causal_sets(h, w, alike=False),
        "no key of the future": lambda h, w: causal_sets(h, w, before=False),
        "no farther than one chunk back": lambda h, w: causal_sets(
            h, w, near=range(99)
        ),
        "chunks are counted within each bucket, not along the sorted row": (
            lambda h, w: causal_sets(h, w, chunk_of=by_place)
        ),
        "the rank counts earlier tokens only, so the first has rank 0": (
            lambda h, w: causal_sets(
                h,
                w,
                chunk_of=lambda h, w: [
                    h[: i + 1].count(bucket) // w for i, bucket in enumerate(h)
                ],
            )
        ),
    },
)

# ---------------------------------------------------------------- 4.5: back


def undo(y1, y2, F, G):
    x2 = y2 - G(y1)
    return y1 - F(x2), x2


def F_(x):
    return x.sin()


def G_(x):
    return x.square()


streams = [(torch.tensor([1.0]), torch.tensor([2.0])), (random(4), random(4, seed=1))]
compare(
    "4.5",
    right=undo,
    cases=[(*pair, F_, G_) for pair in streams],
    mistakes={
        "undo the second line first: F was applied to x2, not to y2": (
            lambda y1, y2, F, G: (y1 - F(y2), y2 - G(y1))
        ),
        "subtract what was added": (
            lambda y1, y2, F, G: (y1 + F(y2 + G(y1)), y2 + G(y1))
        ),
        "G was applied to y1": (lambda y1, y2, F, G: (y1 - F(y2), y2 - G(y1 - F(y2)))),
        "x1 first, then x2": lambda *case: undo(*case)[::-1],
    },
)

# ---------------------------------------------------------------- 4.6: not put back


@exercise("4.6")
def check_broken(relative):
    """How far gradients are off if the random state is not put back."""
    if number(relative) is None:
        fail(f"the relative difference, a number; this is {kind(relative)}")
    relative = float(relative)
    if not 0.01 < relative < 1:
        expected = "other numbers are dropped: an error of some percent"
        fail(f"{relative:.2g}; where nothing is put back, {expected}")
    return f"{relative:.0%} off"


# ---------------------------------------------------------------- for handouts

h, chunk = torch.tensor([0, 1, 1, 0, 1]), torch.tensor([0, 0, 1, 1, 2])
both = (h[:, None], chunk[:, None], h, chunk)
seen = lambda *case: in_set(*case).int()
taught("4.in_set", seen, [both, (*both, False)])
taught("4.look_back", look_back, [(torch.arange(1.0, 7).view(1, 1, 3, 2),)])
