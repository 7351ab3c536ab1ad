"""Checks for the exercises: they say "right", or what was expected and what came."""

import torch

from memtx_minimal import tasks


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
    x, vectors = (
        torch.randn(2, 10, d_model).double(),
        torch.randn(2, 3, d_model).double(),
    )
    kv = model.memory.keys_values(vectors)
    pairs = zip(blocks(model, x, kv, 1), model.loop(x, kv))
    for name, (mine, right) in zip(("outputs", "vectors", "kv"), pairs):
        if mine.shape != right.shape:
            raise AssertionError(
                f"{name}: {tuple(mine.shape)}, not {tuple(right.shape)}"
            )
        if not torch.allclose(mine, right):
            raise AssertionError(f"{name}: with C = 1 not those of loop")
    changed = x.clone()
    changed[:, 4] = torch.randn(2, d_model)
    both = blocks(model, x, kv, 4)[0], blocks(model, changed, kv, 4)[0]
    touched = [t for t in range(10) if not torch.allclose(both[0][:, t], both[1][:, t])]
    if touched != [4, 8, 9]:
        raise AssertionError(
            f"C = 4: token 4 has an effect on {touched}, not on 4, and 8 and 9 behind its block"
        )
    print("right")
