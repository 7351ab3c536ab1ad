"""Checks for the exercises: they say "right", or what was expected and what came."""

import math

import torch

from memtx_minimal import tasks
from memtx_minimal.reformer import in_set

# ---------------------------------------------------------------- chapter 3


def longest_path(n_layers, n, kind):
    """The most layers on a path from token 0 to the output n tokens later."""
    longest = {(0, 0): 0}  # (position, layer): the most layers passed since token 0
    for t in range(n + 1):
        for layer in range(1, n_layers + 1):
            read = [(i, layer - 1) for i in range(t + 1)]
            if kind == "feedback":
                read = [(i, below) for i in range(t) for below in range(n_layers + 1)]
                read.append((t, layer - 1))
            before = [longest[place] for place in read if place in longest]
            if before:
                longest[t, layer] = 1 + max(before)
    return longest[n, n_layers]


def check_clock(my_clock):
    """Chapter 3, exercise 1."""
    cases = [(4, 0, "vanilla"), (4, 1, "vanilla"), (4, 9, "vanilla")]
    for case in [*cases, (1, 0, "feedback"), (3, 7, "feedback")]:
        mine, right = my_clock(*case), longest_path(*case)
        if mine != right:
            raise AssertionError(f"my_clock{case} is {mine}; {right} layers are passed")
    print("right")


@torch.no_grad()
def check_tracker(model):
    """Chapter 3, exercise 2."""
    if model.mem_len != 1:
        raise AssertionError(f"mem_len is {model.mem_len}, not 1")
    tokens, targets, _ = next(tasks.cups(1000, 32, seed=10**6))
    logits = model.eval()(tokens.to(next(model.parameters()).device))[0].cpu()
    share = (logits.argmax(dim=-1) == targets).float().mean().item()
    if share < 0.9:
        raise AssertionError(f"{share:.2f} right; after all LESSONS it is above 0.9")
    print(f"right: {share:.2f}")


@torch.no_grad()
def check_blocks(blocks, model):
    """Chapter 3, exercise 5; model is a FeedbackTransformer in float64."""
    d_model = model.embedding.embedding_dim
    x, vectors = (torch.randn(2, n, d_model).double() for n in (10, 3))
    kv = model.memory.keys_values(vectors)
    pairs = zip(blocks(model, x, kv, 1), model.loop(x, kv))
    for name, (mine, right) in zip(("outputs", "vectors", "kv"), pairs):
        if mine.shape != right.shape:
            shapes = f"{tuple(mine.shape)}, not {tuple(right.shape)}"
            raise AssertionError(f"{name}: {shapes}")
        if not torch.allclose(mine, right):
            raise AssertionError(f"{name}: with C = 1 not those of loop")
    changed = x.clone()
    changed[:, 4] = torch.randn(2, d_model)
    both = blocks(model, x, kv, 4)[0], blocks(model, changed, kv, 4)[0]
    touched = [t for t in range(10) if not torch.allclose(both[0][:, t], both[1][:, t])]
    if touched != [4, 8, 9]:
        right = "not on 4, and 8 and 9 behind its block"
        raise AssertionError(f"C = 4: token 4 has an effect on {touched}, {right}")
    print("right")


# ---------------------------------------------------------------- chapter 4


def check_sets(my_sets):
    """Chapter 4, exercise 1."""
    for seed in range(20):
        T, c = 5 + seed, 1 + seed % 6
        h = torch.randint(4, (T,), generator=torch.Generator().manual_seed(seed))
        chunk = h.argsort(stable=True).argsort() // c
        queries, keys = (h[:, None], chunk[:, None]), (h, chunk)
        found = in_set(*queries, *keys).tril()  # (T, T)
        mine = my_sets(h.tolist(), c)
        for i, row in enumerate(found):
            right = row.nonzero().flatten().tolist()
            if sorted(mine[i]) != right:
                given = f"buckets {h.tolist()}, c = {c}"
                raise AssertionError(f"{given}: the set of {i} is {right}: {mine[i]}")
    print("right")


def check_once(with_N, without_N):
    """Chapter 4, exercise 2."""
    if len(with_N) != 4 or len(without_N) != 4:
        raise AssertionError("pass two lists of four losses: 1, 2, 4 and 8 rounds")
    if abs(with_N[0] - without_N[0]) > 1e-4:
        expected = "one round finds no key twice, so nothing changes"
        raise AssertionError(f"{with_N[0]:.4f} and {without_N[0]:.4f}: {expected}")
    if all(abs(a - b) < 1e-6 for a, b in zip(with_N[1:], without_N[1:])):
        raise AssertionError("equal with more rounds, too: was count_once switched?")
    print("right")


def check_broken(relative):
    """Chapter 4, exercise 3."""
    if not relative > 1e-3:
        expected = "other numbers are dropped: an error of some percent"
        raise AssertionError(f"{relative:.0e}; where nothing is put back, {expected}")
    print(f"right: {relative:.0%} off")


def check_places(my_places):
    """Chapter 4, exercise 4."""
    for seed in range(5):
        h = torch.randint(32, (1024,), generator=torch.Generator().manual_seed(seed))
        right = sum(16 * math.ceil(n / 16) for n in torch.bincount(h).tolist())
        mine = my_places(h.tolist(), 16)
        if mine != right:
            sizes = torch.bincount(h).tolist()
            raise AssertionError(f"{mine} places for {sizes}, not {right}")
    print(f"right: {right} places for 1,024 tokens")


# ---------------------------------------------------------------- appendix B


def check_pair(pairs):
    """Appendix B, exercise 1."""
    (bucket_i, chunk_i), (bucket_j, chunk_j) = pairs
    if bucket_i == bucket_j:
        raise AssertionError(f"both are of bucket {bucket_i}: the buckets must differ")
    if (bucket_i - bucket_j) * (chunk_i - chunk_j) < 0:
        raise AssertionError(f"{pairs}: a later bucket never lies in an earlier chunk")
    difference = bucket_i + chunk_i - bucket_j - chunk_j
    if difference not in (0, 1):
        raise AssertionError(f"bucket + chunk differ by {difference}, not by 0 or 1")
    print("right")


def check_rounds(add_rounds):
    """Appendix B, exercise 2."""
    generator = torch.Generator().manual_seed(0)
    scores = 3 * torch.randn(3, 5, 4, generator=generator)
    values = torch.randn(3, 4, 2, generator=generator)
    tops = list(scores.amax(dim=-1, keepdim=True))
    p = [(s - top).exp2() for s, top in zip(scores, tops)]
    totals, outs = [x.sum(dim=-1, keepdim=True) for x in p], list(map(torch.mm, p, values))
    weights = (torch.cat(list(scores), dim=-1) * math.log(2)).softmax(dim=-1)
    right, mine = weights @ values.flatten(0, 1), add_rounds(tops, totals, outs)
    if not torch.allclose(mine, right, atol=1e-5):
        why = "are all rounds brought to one largest score?"
        raise AssertionError(f"off by {(mine - right).abs().max():.1e}: {why}")
    print("right")
