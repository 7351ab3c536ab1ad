"""Appendix B, fast hashed attention: what is right, and what often goes wrong."""

import math

import torch

from memtx_minimal.exercises.core import compare, exercise, fail, show, taught
from memtx_minimal.fast_lsh import inverse, windows


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# ---------------------------------------------------------------- B.1: base 2


def in_base_2(scores, factor=math.log2(math.e)):
    weights = (factor * (scores - scores.max())).exp2()
    return weights / weights.sum()


compare(
    "B.1",
    right=lambda scores: scores.softmax(dim=0),
    cases=[(torch.tensor([0.0, 1.0, 2.0]),), (3 * random(6),), (200 + 9 * random(6),)],
    without=["softmax", "exp", "exp_", "logsumexp"],
    mistakes={
        "a score in base 2 is log2(e) times one in base e": lambda s: in_base_2(s, 1),
        "multiply by log2(e), do not divide": lambda s: in_base_2(s, math.log(2)),
        "subtract the largest score first, or 2 to it is infinite": (
            lambda s: (
                (math.log2(math.e) * s).exp2() / (math.log2(math.e) * s).exp2().sum()
            )
        ),
        "divide by the sum": lambda s: (math.log2(math.e) * s).exp2(),
    },
)

# ---------------------------------------------------------------- B.2: a pair


@exercise("B.2")
def check_pair(pairs):
    """A query's and a key's (bucket, chunk) that their sums would take for one set."""
    try:
        (bucket_i, chunk_i), (bucket_j, chunk_j) = pairs
    except (TypeError, ValueError):
        fail(f"two pairs, ((bucket, chunk), (bucket, chunk)); this is {show(pairs)}")
    numbers = bucket_i, chunk_i, bucket_j, chunk_j
    if not all(isinstance(n, int) and n >= 0 for n in numbers):
        fail(f"buckets and chunks are whole numbers from 0; this is {show(pairs)}")
    if bucket_i == bucket_j:
        fail(f"both are of bucket {bucket_i}: the buckets must differ")
    if (bucket_i - bucket_j) * (chunk_i - chunk_j) < 0:
        fail(f"{pairs}: a later bucket never lies in an earlier chunk")
    difference = bucket_i + chunk_i - bucket_j - chunk_j
    if difference not in (0, 1):
        fail(f"bucket + chunk differ by {difference}, not by 0 or 1")


# ---------------------------------------------------------------- B.3: a fault


def unsorted(rows, order):
    return torch.empty_like(rows).index_copy(0, order, rows)


def given(rows, order):
    return rows[order]


compare(
    "B.3",
    right=unsorted,
    cases=[
        (torch.tensor([10, 20, 30]), torch.tensor([1, 0, 2])),
        (torch.tensor([10, 20, 30]), torch.tensor([2, 0, 1])),
        (random(6, 2).round(decimals=1), torch.tensor([3, 5, 0, 1, 4, 2])),
    ],
    given=given,
    mistakes={
        "they are still sorted: rows[n] belongs at order[n]": lambda rows, order: (
            rows
        ),
        "order is no mirror: look up where each row belongs": (
            lambda rows, order: rows.flip(0)
        ),
    },
)

# ---------------------------------------------------------------- B.4: codes


def codes(buckets, w, twice=2, sort=True):
    order = sorted(range(len(buckets)), key=lambda i: (buckets[i], i))
    place = {i: n for n, i in enumerate(order)} if sort else range(len(buckets))
    return [twice * buckets[i] + place[i] // w for i in range(len(buckets))]


example = [4, 4, 3, 4, 3, 0, 1, 4, 4, 3, 4, 0]
compare(
    "B.4",
    right=codes,
    cases=[(example, 4), ([1, 0, 1, 0], 2), ([0, 0, 0], 1)],
    without=["sort_and_code"],
    mistakes={
        "twice the bucket, plus the chunk": lambda b, w: codes(b, w, twice=1),
        "chunks are cut from the sorted row, not from the text": (
            lambda b, w: codes(b, w, sort=False)
        ),
        "in the order of the text, not in the sorted one": (
            lambda b, w: sorted(codes(b, w))
        ),
    },
)

# ---------------------------------------------------------------- B.5: rounds


def added(tops, totals, outs, share=lambda tops: (tops - tops.amax(dim=0)).exp2()):
    tops, totals, outs = map(torch.stack, (tops, totals, outs))
    return (share(tops) * outs).sum(dim=0) / (share(tops) * totals).sum(dim=0)


def rounds(n, seed):
    """What `attend` gives for each of n rounds, and a softmax over all their keys."""
    scores, values = 3 * random(n, 2, 4, seed=seed), random(n, 4, 2, seed=seed + 1)
    tops = list(scores.amax(dim=-1, keepdim=True))
    p = [(s - top).exp2() for s, top in zip(scores, tops)]
    return (
        tops,
        [x.sum(dim=-1, keepdim=True) for x in p],
        list(map(torch.mm, p, values)),
    )


compare(
    "B.5",
    right=added,
    cases=[rounds(2, 0), rounds(3, 2)],
    mistakes={
        "bring all rounds to one largest score": lambda *r: added(*r, torch.ones_like),
        "these scores are in base 2": (
            lambda *r: added(*r, lambda tops: (tops - tops.amax(dim=0)).exp())
        ),
        "first add up, then divide, once": (
            lambda tops, totals, outs: torch.stack(
                [o / total for o, total in zip(outs, totals)]
            ).mean(dim=0)
        ),
    },
)

# ---------------------------------------------------------------- B.6: how many scores

compare(
    "B.6",
    right=lambda T, w, P: P * T * 2 * w,
    cases=[(4096, 64, 1), (4096, 64, 8), (128, 16, 2)],
    mistakes={
        "a chunk looks at the one before it, too": lambda T, w, P: P * T * w,
        "each round computes its own": lambda T, w, P: T * 2 * w,
        "that is exact attention": lambda T, w, P: T * T,
        "that is for one chunk; there are T / w": lambda T, w, P: P * w * 2 * w,
    },
)


# ---------------------------------------------------------------- for handouts

order = torch.tensor([3, 5, 0, 1, 4, 2])
taught("B.inverse", inverse, [(order,), (torch.arange(3),)])
taught("B.windows", windows, [(random(6, 2), order, 2)])
