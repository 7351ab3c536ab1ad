"""Chapter 6, memory today: what is right, and what often goes wrong."""

import torch
import torch.nn.functional as F

from memtx_minimal.exercises.core import (
    call, compare, exercise, fail, kind, show, taught,
)  # fmt: skip
from memtx_minimal.memory_today import delta_rule, pool, rotate


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def units(*shape, seed=0):
    return F.normalize(random(*shape, seed=seed), dim=-1)


# ---------------------------------------------------------------- 6.1: who stays


def slots(got, sinks=2, used=2, latest=3, among_all=False, ordered=True, least=False):
    places = list(range(len(got)))
    always = {*places[:sinks], *places[max(0, len(got) - latest) :]}
    rest = [n for n in places if among_all or n not in always]
    most = sorted(rest, key=lambda n: got[n], reverse=not least)[:used]
    if not ordered:
        return [*sorted(always), *(n for n in most if n not in always)]
    return sorted(always | set(most))


got = [4, 1, 2, 7, 3, 9, 5, 1, 8, 2]
compare(
    "6.1",
    right=slots,
    cases=[
        (got,),
        ([9, 8, 1, 2, 3, 4, 7, 6, 5],),
        ([1, 2, 3, 4],),
        (got[::-1],),
        ([9, 0, 1, 9, 2, 3, 0, 0, 0, 0],),  # an amount of the middle is a sink's, too
    ],
    without=["Cache", "stays"],
    mistakes={
        "the most used are two of the rest: sinks and the latest stay anyway": (
            lambda got: slots(got, among_all=True)
        ),
        "the slots stay in the order of the text": (
            lambda got: slots(got, ordered=False)
        ),
        "the first two stay however little they got": (
            lambda got: slots(got, sinks=0, used=4)
        ),
        "the three latest stay however little they got": (
            lambda got: slots(got, used=5, latest=0)
        ),
        "those that got most stay, not least": lambda got: slots(got, least=True),
    },
)

# ---------------------------------------------------------------- 6.2: a product


def product(q, k, n, sign=1, halves=True, speeds=True):
    """The product of q and of k that stands n tokens before it, both turned."""
    half = len(q) // 2
    angle = n * 10_000 ** (-torch.arange(half) / half * speeds)
    pairs = (x.view(2, -1) if halves else x.view(-1, 2).T for x in (q, k))
    (q_a, q_b), (k_a, k_b) = pairs
    along, across = q_a * k_a + q_b * k_b, q_a * k_b - q_b * k_a
    return (angle.cos() * along + sign * angle.sin() * across).sum()


compare(
    "6.2",
    right=product,
    cases=[
        (torch.tensor([1.0, 0]), torch.tensor([1.0, 1]), 1),
        (torch.tensor([1.0, 2, 3, 4]), torch.tensor([4.0, 3, 2, 1]), 5),
        (random(8), random(8, seed=1), 0),
        (random(8), random(8, seed=1), 30),
    ],
    without=["rotate", "scores_of"],
    mistakes={
        "the key stands before the query: it is turned back by n": (
            lambda *case: product(*case, sign=-1)
        ),
        "number i goes with number i + half, not with its neighbour": (
            lambda *case: product(*case, halves=False)
        ),
        "each pair has a speed of its own": lambda *case: product(*case, speeds=False),
        "the angle grows with the distance n": lambda q, k, n: product(q, k, n > 0),
        "the turn also takes a part of each number to the other of its pair": (
            lambda *case: product(*case, sign=0)
        ),
        "that is the product without a turn": lambda q, k, n: q @ k,
    },
)

# ---------------------------------------------------------------- 6.3: one step


def written(S, k, v, alpha, beta, erase=True, unit=True, decay=True, decay_first=True):
    k = F.normalize(k, dim=-1) if unit else k
    start = alpha * S if decay else S
    old = start @ k if decay_first else S @ k
    return start + beta * torch.outer(v - erase * old, k)


def wrong_way_round(S, k, v, alpha, beta):
    k = F.normalize(k, dim=-1)
    return alpha * S + beta * torch.outer(k, v - alpha * S @ k)


step = random(3, 3), random(3, seed=1), random(3, seed=2), 0.5, 0.75
compare(
    "6.3",
    right=written,
    cases=[
        step,
        (torch.zeros(2, 2), torch.tensor([3.0, 4]), torch.tensor([1.0, 2]), 1.0, 1.0),
        (random(2, 4), random(4, seed=3), random(2, seed=4), 0.9, 2.0),
    ],
    without=["delta_rule", "chunked_delta_rule"],
    mistakes={
        "what the key had before is still there: write the value less that": (
            lambda *case: written(*case, erase=False)
        ),
        "the state decays first: S becomes alpha S": (
            lambda *case: written(*case, decay=False)
        ),
        "the key must have length one": lambda *case: written(*case, unit=False),
        "keys stand in columns: v k^T, not k v^T": wrong_way_round,
        "the old value is read from the state that has decayed": (
            lambda *case: written(*case, decay_first=False)
        ),
    },
)


# ---------------------------------------------------------------- 6.4: bytes


def sizes(n, d_model, H, L, number=4, both=2, got=True, in_window=None, grows=False):
    """Bytes of each kind's memory after n tokens."""
    kept, blocks = min(n, 64), max(0, n - 32) // 4
    tokens = n - 4 * blocks if in_window is None else min(n, in_window)
    state = (n if grows else 1) * d_model * d_model // H
    return {
        "cache": number * L * kept * (both * d_model + got * H),
        "pooled": number * L * both * d_model * (min(32, blocks) + tokens),
        "delta": number * L * state,
    }


compare(
    "6.4",
    right=sizes,
    cases=[
        (1, 16, 2, 3),
        (36, 64, 4, 1),
        (39, 128, 4, 4),
        (75, 64, 4, 1),
        (163, 128, 4, 4),
        (20_000, 128, 4, 4),
    ],
    mistakes={
        "a number takes four bytes": lambda *case: sizes(*case, number=1),
        "a slot is a key and a value": lambda *case: sizes(*case, both=1),
        "a cache also counts what each slot got, a number for each head": (
            lambda *case: sizes(*case, got=False)
        ),
        "tokens leave the window four at a time: it holds 32 to 35": (
            lambda *case: sizes(*case, in_window=32)
        ),
        "the state of a delta rule is as large after one token as after many": (
            lambda *case: sizes(*case, grows=True)
        ),
    },
)

# ---------------------------------------------------------------- 6.5: a swap


@exercise("6.5")
def check_swap(mine):
    """mine(a, b, n_cups) -> k (n_cups,) and beta: S (I - beta k k^T) swaps a and b."""
    if not callable(mine):
        fail(f"hand in the function itself, not what it returns: this is {kind(mine)}")
    for a, b, n in [(0, 1, 2), (3, 1, 5), (0, 5, 6)]:
        answer, called = call(mine, (a, b, n)), f"a = {a}, b = {b}, {n} cups: "
        if not isinstance(answer, (tuple, list)) or len(answer) != 2:
            fail(f"{called}return two things, k and beta, not {kind(answer)}")
        try:
            k, beta = (torch.as_tensor(part, dtype=torch.float64) for part in answer)
        except (TypeError, ValueError, RuntimeError):
            fail(f"{called}k is a tensor and beta a number, not {show(answer)}")
        if k.shape != (n,) or beta.shape != ():
            shapes = f"{tuple(k.shape)} and {tuple(beta.shape)}"
            fail(f"{called}k has the shape ({n},) and beta is a number, not {shapes}")
        if (k.norm() - 1).abs() > 1e-4:
            fail(f"{called}k has the length {k.norm():.4g}\nhint: a key has length one")
        swap = torch.eye(n, dtype=torch.float64)
        found, right = swap - beta * k.outer(k), swap.clone()
        right[[a, b]] = right[[b, a]]
        if not torch.allclose(found, right, atol=1e-4):
            fail(f"{called}the {hint_of_swap(found, k, beta, a, b)}")


def hint_of_swap(found, k, beta, a, b):
    """What I - beta k k^T does in place of the swap."""
    words = f"columns become those of\n{show(found)}\nhint: "
    if (k[a] + k[b]).abs() < 1e-4 and (k[a] ** 2 - 0.5).abs() < 1e-3:
        if (beta - 1).abs() < 1e-4:
            return words + "at beta = 1 both cups get the mean: go through the mirror"
        return words + "the key is right: how far must beta push?"
    if (k[a] - k[b]).abs() < 1e-4 and k[a].abs() > 0.1:
        return words + "this key gives both columns another sign: take the difference"
    return words + "a reflection turns its key over: what does a swap turn over?"


# ---------------------------------------------------------------- 6.6: a fault


def view(n, mem_len, c, left=None, blocks=None):
    """The tokens of each block, and those of the window."""
    rounded = max(0, n - mem_len) // c * c
    left = rounded if left is None else left
    blocks = rounded // c if blocks is None else blocks
    return [[*range(c * i, c * i + c)] for i in range(blocks)], [*range(left, n)]


def given(n, mem_len, c):
    return view(n, mem_len, c, left=max(0, n - mem_len))


def begun(n, mem_len, c):
    return -(-max(0, n - mem_len) // c)


compare(
    "6.6",
    right=view,
    cases=[(10, 4, 3), (12, 4, 3), (3, 4, 3), (9, 4, 2), (7, 2, 1)],
    given=given,
    without=["in_view"],
    mistakes={
        "now some tokens are read twice, in a block and in the window": (
            lambda n, mem_len, c: view(
                n, mem_len, c, max(0, n - mem_len), begun(n, mem_len, c)
            )
        ),
        "the window has at least mem_len tokens: a block waits until it has left": (
            lambda n, mem_len, c: view(
                n, mem_len, c, c * begun(n, mem_len, c), begun(n, mem_len, c)
            )
        ),
        "what has left the window is read in blocks": (
            lambda n, mem_len, c: view(n, mem_len, c, left=0, blocks=0)
        ),
    },
)

# ---------------------------------------------------------------- 6.7: two at once


def writes(S, k, v, alpha, beta, sees=True, decays=True, twice=True):
    """What both tokens of a chunk write, (2, d_v), from the state before them."""
    first = beta[0] * (v[0] - alpha[0] * S @ k[0])
    start = (alpha[0] if twice else 1) * alpha[1] * S @ k[1]
    of_first = (alpha[1] if decays else 1) * (k[0] @ k[1]) * first
    return torch.stack([first, beta[1] * (v[1] - start - sees * of_first)])


def half_of(number):
    return torch.tensor([number, number / 2])


compare(
    "6.7",
    right=writes,
    cases=[
        (random(2, 2), units(2, 2), random(2, 2, seed=1), half_of(0.8), half_of(1.5)),
        (random(4, 3), units(2, 3), random(2, 4, seed=1), half_of(0.9), half_of(1.0)),
        (torch.zeros(2, 2), torch.eye(2), torch.ones(2, 2), half_of(1.0), half_of(1.0)),
    ],
    without=["delta_rule", "chunked_delta_rule"],
    mistakes={
        "the second finds what the first has written, as far as their keys agree": (
            lambda *case: writes(*case, sees=False)
        ),
        "what the first has written decays once before the second reads": (
            lambda *case: writes(*case, decays=False)
        ),
        "the state before both decays twice before the second reads": (
            lambda *case: writes(*case, twice=False)
        ),
        "a token writes beta times the difference": (
            lambda S, k, v, alpha, beta: writes(S, k, v, alpha, torch.ones(2))
        ),
    },
)

# ---------------------------------------------------------------- for handouts

heads = random(2, 6, 2, 4), random(2, 6, 2, 4, seed=1)
places = torch.arange(6)
taught("6.rotate", rotate, [(heads[0], places), (heads[1], places + 9)])
taught("6.pool", pool, [(*heads, random(2, 4, seed=2), random(3, 2, 1, seed=3))])
taught(
    "6.delta_rule",
    delta_rule,
    [
        (
            random(2, 2, 5, 3), units(2, 2, 5, 3, seed=1), random(2, 2, 5, 3, seed=2),
            random(2, 2, 5, seed=3).sigmoid(), 2 * random(2, 2, 5, seed=4).sigmoid(),
            random(2, 2, 3, 3, seed=5),
        )
    ],
)  # fmt: skip
