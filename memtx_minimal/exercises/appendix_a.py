"""Appendix A, feedback by hand: what is right, and what often goes wrong."""

from functools import partial

import torch

from memtx_minimal.exercises.core import (
    NotAnswered,
    compare,
    exercise,
    fail,
    show,
    taught,
)
from memtx_minimal.fast_feedback import normalise


def random(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


# ---------------------------------------------------------------- A.1: the softmax


def softmax_back(y, g):
    return y * (g - y @ g)


compare(
    "A.1",
    right=softmax_back,
    cases=[
        (torch.tensor([0.25, 0.75]), torch.tensor([1.0, 0.0])),
        (random(5).softmax(dim=0), random(5, seed=1)),
    ],
    without=["grad", "backward", "_softmax_backward_data"],
    mistakes={
        "each weight depends on all scores, through the sum": lambda y, g: y * g,
        "that is the diagonal alone: y_i depends on the other scores, too": (
            lambda y, g: y * (1 - y) * g
        ),
        "the mean of g is weighted by y": lambda y, g: y * (g - g.mean()),
    },
)

# ---------------------------------------------------------------- A.2: two lines


def forwards(x, W_q, W_k, W_v, W_1, W_2, keep=None, p=None):
    """Section A.2's steps; with dropout on the weights, with ages added to keys."""
    T = len(x)
    keep = x.new_ones(T, T) if keep is None else keep
    p = torch.zeros_like(x) if p is None else p
    q, k, v, z, m = torch.zeros(5, *x.shape, dtype=x.dtype)
    h, w = x.new_zeros(T, len(W_1)), [None] * T
    for t in range(T):
        q[t] = W_q @ x[t]
        w[t] = ((k[:t] + p[T - t :]) @ q[t]).softmax(dim=0)
        z[t] = x[t] + (keep[t, :t] * w[t]) @ v[:t]
        h[t] = (W_1 @ z[t]).relu()
        m[t] = z[t] + W_2 @ h[t]
        k[t], v[t] = W_k @ m[t], W_v @ m[t]
    return m, q, k, v, z, h, w


def autograd(g_m, x, *weights, keep=None, p=None):
    """The errors at x, at p if it is there, and at the weights."""
    T, keep = len(x), x.new_ones(len(x), len(x)) if keep is None else keep
    given = [x, *weights] if p is None else [x, p, *weights]
    leaves = [a.clone().requires_grad_() for a in given]
    x, (W_q, W_k, W_v, W_1, W_2) = leaves[0], leaves[-5:]
    p, out = torch.zeros_like(x) if p is None else leaves[1], []
    for t, x_t in enumerate(x):
        past = torch.stack(out) if out else x[:0]
        w = ((past @ W_k.T + p[T - t :]) @ (W_q @ x_t)).softmax(dim=0)
        z = x_t + (keep[t, :t] * w) @ (past @ W_v.T)
        out.append(z + W_2 @ (W_1 @ z).relu())
    return torch.autograd.grad(torch.stack(out), leaves, g_m)


def backwards(
    g_m, x, W_q, W_k, W_v, W_1, W_2, m, q, k, v, z, h, w, *,
    keep=None, p=None, softmax=softmax_back, but=None,
):  # fmt: skip
    """By hand, as in section A.2; but: where one of the usual mistakes is made."""
    T = len(x)
    ages = torch.zeros_like(x) if p is None else p
    keep = x.new_ones(T, T) if keep is None else keep
    g_m, g_h, g_p = g_m.clone(), torch.zeros_like(h), torch.zeros_like(x)
    g_q, g_k, g_v, g_z = torch.zeros(4, *x.shape, dtype=x.dtype)
    for t in reversed(range(T)):
        kept, once = keep[t, :t], torch.ones(t, dtype=x.dtype)
        g_m[t] += W_k.T @ g_k[t] + W_v.T @ g_v[t]
        g_h[t] = W_2.T @ g_m[t] * (h[t] > 0)
        g_z[t] = g_m[t] * (but != "around") + W_1.T @ g_h[t] * (but != "through")
        g_w = (once if but == "at w" else kept) * (v[:t] @ g_z[t])
        g_s = softmax((kept if but == "at s" else once) * w[t], g_w)
        g_q[t] = (k[:t] + ages[T - t :] * (but != "at q")).T @ g_s
        g_k[:t] += torch.outer(g_s, q[t])
        g_v[:t] += torch.outer((once if but == "at v" else kept) * w[t], g_z[t])
        g_p[T - t :] += torch.outer(g_s, q[t])
    g_x = g_z + g_q @ W_q
    errors = g_q.T @ x, g_k.T @ m, g_v.T @ m, g_h.T @ z, g_m.T @ h
    return (g_x, *errors) if p is None else (g_x, g_p, *errors)


x, g_m = random(7, 4), random(7, 4, seed=1)
shapes = [(4, 4)] * 3 + [(8, 4), (4, 8)]
weights = [random(*shape, seed=2 + n) / 2 for n, shape in enumerate(shapes)]
compare(
    "A.2",
    right=lambda g_m, x, *rest: autograd(g_m, x, *rest[:5]),
    cases=[(g_m, x, *weights, *forwards(x, *weights))],
    without=["grad", "backward", "backwards"],
    atol=1e-8,
    mistakes={
        "g_z: m = z + W_2 @ h, so z has the error at m as well": (
            partial(backwards, but="around")
        ),
        "g_z: h was made of z, so its error comes back through W_1": (
            partial(backwards, but="through")
        ),
        "g_s: the line of the softmax in section A.1": (
            partial(backwards, softmax=lambda y, g: g)
        ),
        "g_s: each weight depends on all scores, through the sum": (
            partial(backwards, softmax=lambda y, g: y * g)
        ),
    },
)

# ---------------------------------------------------------------- A.3: near and far


def far(T, S):
    return sum(slot // S != step // S for step in range(T) for slot in range(step))


compare(
    "A.3",
    right=far,
    cases=[(16, 4), (64, 16), (8, 8), (8, 1), (10, 4)],
    mistakes={
        "those are near: a step and a slot of one block": (
            lambda T, S: T * (T - 1) // 2 - far(T, S)
        ),
        "a step adds nothing to later slots": lambda T, S: 2 * far(T, S),
        "of all pairs, those of one block are near": lambda T, S: T * (T - 1) // 2,
        "how many pairs, not which share of them": (
            lambda T, S: 2 * far(T, S) / (T * (T - 1))
        ),
        "the last block may be shorter, and has near pairs, too": (
            lambda T, S: T * (T - 1) // 2 - T // S * (S * (S - 1) // 2)
        ),
    },
)

# ---------------------------------------------------------------- A.4: blocks


@exercise("A.4")
def check_seconds(seconds):
    """{S: seconds} for blocks of 1, 4, 16 and 64 steps."""
    if not isinstance(seconds, dict) or set(seconds) != {1, 4, 16, 64}:
        fail(f"hand in {{1: ..., 4: ..., 16: ..., 64: ...}}; this is {show(seconds)}")
    if ... in seconds.values():
        raise NotAnswered
    if not all(isinstance(s, float) and 0 < s < 60 for s in seconds.values()):
        fail(f"the values are seconds, numbers from 0 to 60; these are {show(seconds)}")
    if len(set(seconds.values())) == 1:
        fail("all the same: was BLOCK changed before each measurement?")
    best = min(seconds, key=seconds.get)
    return f"on this machine blocks of {best} are the fastest"


# ---------------------------------------------------------------- A.5: dropout

keep = (random(7, 7, seed=9) < 0.5).double() / 0.7


def by_hand(g_m, x, given, *weights, name, **mistake):
    """Both ways: mine(g_m, x, keep or p, *weights)."""
    given = {name: given}
    return backwards(
        g_m, x, *weights, *forwards(x, *weights, **given), **given, **mistake
    )


dropped = partial(by_hand, name="keep")
compare(
    "A.5",
    right=lambda g_m, x, keep, *weights: autograd(g_m, x, *weights, keep=keep),
    cases=[(g_m, x, keep, *weights)],
    without=["grad", "backward"],
    atol=1e-8,
    mistakes={
        "the error at w goes through the mask, too": partial(dropped, but="at w"),
        "what v was multiplied by are the weights after dropout": (
            partial(dropped, but="at v")
        ),
        "the softmax line needs the weights before dropout": (
            partial(dropped, but="at s")
        ),
        "these are the errors without dropout": (
            lambda g_m, x, keep, *ws: autograd(g_m, x, *ws)
        ),
    },
)

# ---------------------------------------------------------------- A.6: ages

p = random(7, 4, seed=10)
aged = partial(by_hand, name="p")


def swapped(g_m, x, p, *weights, turn):
    """The errors, that at p turned."""
    g_x, g_p, *rest = aged(g_m, x, p, *weights)
    return g_x, turn(g_p), *rest


compare(
    "A.6",
    right=lambda g_m, x, p, *weights: autograd(g_m, x, *weights, p=p),
    cases=[(g_m, x, p, *weights)],
    without=["grad", "backward"],
    atol=1e-8,
    mistakes={
        "the query has met keys with their ages": partial(aged, but="at q"),
        "the oldest age comes first in p": partial(swapped, turn=lambda g: g.flip(0)),
        "an age is met by many steps: their errors add up": (
            partial(swapped, turn=torch.zeros_like)
        ),
        "the error at p stands behind that at x": (
            lambda *case: (lambda e: (e[0], *e[2:], e[1]))(aged(*case))
        ),
    },
)


# ---------------------------------------------------------------- for handouts

taught(
    "A.normalise", normalise, [(random(3, 4),), (random(3, 4), random(4), random(4))]
)
