"""Chapter 5, which memory: what is right, and what often goes wrong."""

import numpy as np
import torch

from memtx_minimal.exercises.core import (
    call, choices, compare, differ, exercise, fail, kind, show,
)  # fmt: skip

# ---------------------------------------------------------------- 5.1: in turn


waits = "each step reads the memory vector of the step before, in every layer"
at_once = "within a segment, keys and values of all tokens are known layer by layer"
names = ["vanilla", "Transformer-XL", "Compressive", "Feedback", "Reformer"]
choices(
    "5.1",
    right={name: name != "Feedback" for name in names},
    why={name: waits if name == "Feedback" else at_once for name in names},
)

# ---------------------------------------------------------------- 5.2: what fits


def tokens(space, L, d_model, per_number=4, both=2, rate=4, layers=None):
    numbers = space // per_number
    slots = numbers // (L * d_model)  # states in each layer
    half = slots // 2 // 4 * 4  # M = C, a multiple of 4
    return {
        "sliding window": numbers // (both * L * d_model),
        "Transformer-XL": slots,
        "Compressive": half + rate * half,
        "Feedback": numbers // (both * (layers or 1) * d_model),
    }


compare(
    "5.2",
    right=tokens,
    cases=[(2**14, 2, 64), (2**30, 12, 512), (10**6, 3, 40)],
    mistakes={
        "a number takes four bytes": lambda *c: tokens(*c, per_number=1),
        "window and Feedback hold a key and a value": lambda *c: tokens(*c, both=1),
        "a compressed state stands for four tokens": lambda *c: tokens(*c, rate=1),
        "the Feedback Transformer's layers share one memory": (
            lambda space, L, d_model: tokens(space, L, d_model, layers=L)
        ),
    },
)

# ---------------------------------------------------------------- 5.3: how deep


compare(
    "5.3",
    right=lambda c: c + 2,
    cases=[(1,), (3,), (4,), (8,)],
    mistakes={
        "at that depth they hold equally many: one layer more": lambda c: c + 1,
        "both of its memories have a state in each layer": lambda c: 2 * c + 3,
        "M = C = n / (1 + c), not n / c": lambda c: c + 3,
    },
)

# ---------------------------------------------------------------- 5.4: who ties


def mean(losses):
    return sum(losses) / len(losses)


def ties(values, middle=mean, reach=max):
    best = min(values, key=lambda name: middle(values[name]))
    return {name for name in values if min(values[name]) <= reach(values[best])}


a, b, c, d = np.array(  # as a band holds them
    [[2.0, 2.1, 2.3], [2.2, 2.4, 2.4], [2.31, 2.4, 2.5], [1.0, 3.0, 3.5]]
)
some = {"a": a, "b": b, "c": c}
compare(
    "5.4",
    right=ties,
    cases=[
        (some,),
        ({"c": c, "a": a},),
        (some | {"d": d},),
    ],
    mistakes={
        "the best has the lowest mean, not the lowest loss of any seed": (
            lambda values: ties(values, middle=min)
        ),
        "the spans have to overlap, not the means": (
            lambda values: ties(values, reach=mean)
        ),
        "the best ties with itself": (
            lambda values: ties(values) - {min(values, key=lambda n: mean(values[n]))}
        ),
    },
)

# ---------------------------------------------------------------- 5.5: how far back


@exercise("5.5")
def check_reach(mine):
    """mine(read, tokens) -> the age of the oldest token that is felt."""
    if not callable(mine):
        fail(f"hand in the function itself, not what it returns: this is {kind(mine)}")
    table = torch.randn(64, 5, generator=torch.Generator().manual_seed(0))
    text = torch.randint(64, (1, 16), generator=torch.Generator().manual_seed(0))
    for reach, step in [(0, 1), (1, 1), (7, 1), (15, 1), (8, 2)]:
        places = [-1 - age for age in range(0, reach + 1, step)]
        read = lambda tokens, places=places: table[tokens[:, places]].sum(dim=1)
        age = call(mine, (read, text), copied=False)
        if differ(reach, age, 0.0):
            reads = "reads" if step == 1 else "reads every other token"
            words = f"of a model that {reads} back to age {reach} it says {show(age)}"
            if step > 1:
                words += "\nhint: a token that is not felt may have older ones that are"
            elif age == reach + 1:
                words += "\nhint: the last token has age 0"
            elif reach == 15 and age == 14:
                words += "\nhint: try the very first token too"
            elif age == 15 - reach:
                words += "\nhint: an age, counted from the end, not a place"
            fail(words)


# ---------------------------------------------------------------- 5.6: the crossing


@exercise("5.6")
def check_crossing(mine, operations):
    """mine(operations, d_model) -> the shortest window at which Reformer needs less."""
    if not callable(mine):
        fail(f"hand in the function itself, not what it returns: this is {kind(mine)}")
    for d_model in (64, 512):
        found = call(mine, (operations, d_model), copied=False)
        sizes, n = dict(L=2, d_model=d_model, d_ff=4 * d_model), 64
        while operations("Reformer", n, **sizes) >= operations("vanilla", n, **sizes):
            n *= 2
        if differ(n, found, 0.0):
            words = f"d_model = {d_model}: {n} tokens, not {show(found)}"
            if found == n // 2:
                words += "\nhint: there Reformer still needs more, or as many"
            fail(words)
