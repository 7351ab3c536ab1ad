"""Chapter 3, Feedback Transformer: what is right, and what often goes wrong."""

import torch

from memtx_minimal import tasks
from memtx_minimal.exercises.core import call, compare, exercise, fail, kind, taught
from memtx_minimal.feedback_transformer import FeedbackTransformer, Memory, step


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# ---------------------------------------------------------------- 3.1: the clock


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


depths = [(L, n) for L in (1, 2, 4) for n in (0, 1, 9)]
compare(
    "3.1",
    right=longest_path,
    cases=[(*depth, kind) for depth in depths for kind in ("vanilla", "feedback")],
    mistakes={
        "every token passes all the layers of its own step, also the last one": (
            lambda L, n, kind: L if kind == "vanilla" else L * n
        ),
        "with feedback all layers are passed again at each token": (
            lambda L, n, kind: L if kind == "vanilla" else L + n
        ),
        "a parallel model passes each layer once, however near the token": (
            lambda L, n, kind: min(L, n + 1) if kind == "vanilla" else L * (n + 1)
        ),
        "in a parallel model the way never leads down, so no layer is passed twice": (
            lambda L, n, kind: L * (n + 1)
        ),
    },
)

# ---------------------------------------------------------------- 3.2: a vector


def vector(states, layer_weights):
    return torch.einsum("l,lbd->bd", layer_weights.softmax(dim=0), torch.stack(states))


compare(
    "3.2",
    right=vector,
    cases=[
        (
            [torch.ones(1, 2), torch.zeros(1, 2), torch.zeros(1, 2)],
            torch.tensor([2.0, 0, 0]),
        ),
        (list(random(4, 2, 3)), random(4, seed=1)),
    ],
    without=["vector", "Memory"],
    mistakes={
        "the weights go through a softmax first": (
            lambda states, w: torch.einsum("l,lbd->bd", w, torch.stack(states))
        ),
        "that is the mean: the weights say how much of each layer": (
            lambda states, w: torch.stack(states).mean(dim=0)
        ),
        "the embedding is one of the states, too": (
            lambda states, w: vector(states[1:], w[1:])
        ),
        "the softmax is over the weights, not over the states": (
            lambda s, w: torch.einsum("l,lbd->bd", w, torch.stack(s).softmax(dim=0))
        ),
    },
)

# ---------------------------------------------------------------- 3.3: a fault


def aged(keys, positions):
    return keys + positions[len(positions) - len(keys) :]


def given(keys, positions):
    return keys + positions[: len(keys)]


ages = torch.tensor([[4.0], [3], [2], [1]])

compare(
    "3.3",
    right=aged,
    cases=[
        *((10.0 * torch.arange(1, M + 1)[:, None], ages) for M in (4, 2, 1)),
        (random(0, 2), random(3, 2)),
    ],
    given=given,
    mistakes={
        "both stand in the same order, the oldest first": (
            lambda keys, p: keys + p.flip(0)[: len(keys)]
        ),
        "each key has an age of its own": lambda keys, p: keys + p[-1:],
        "the ages are added to the keys": lambda keys, p: p[len(p) - len(keys) :],
        "positions[-0:] is all of them": lambda keys, p: keys + p[-len(keys) :],
    },
)

# ---------------------------------------------------------------- 3.4: the cache


def numbers(kind, n_layers, M, d_model):
    each = {
        "vanilla": 2 * n_layers,
        "per layer": 2 * n_layers,
        "shared": 2,
        "vectors": 1,
    }
    return each[kind] * M * d_model


compare(
    "3.4",
    right=numbers,
    cases=[
        (kind, L, 100, 64)
        for L in (1, 8)
        for kind in ("vanilla", "per layer", "shared", "vectors")
    ],
    mistakes={
        "a key and a value, so twice": (
            lambda kind, L, M, d: numbers(kind, L, M, d) // (1 + (kind != "vectors"))
        ),
        "shared by all layers, so the depth does not count": (
            lambda kind, L, M, d: 2 * L * M * d
        ),
        "a vector is kept once, without key and value": (
            lambda kind, L, M, d: (
                2 * M * d * (1 if kind in ("shared", "vectors") else L)
            )
        ),
        "each layer has keys and values of its own": lambda kind, L, M, d: 2 * M * d,
        "for all M tokens, not for one": lambda kind, L, M, d: numbers(kind, L, 1, d),
        "numbers, not bytes": lambda kind, L, M, d: 4 * numbers(kind, L, M, d),
    },
)

# ---------------------------------------------------------------- 3.5: one vector


@exercise("3.5")
@torch.no_grad()
def check_tracker(model):
    """A model of one layer with a memory of one vector, after the lessons."""
    if not hasattr(model, "memory"):
        fail(f"hand in a trained FeedbackTransformer, and not {kind(model)}")
    if (mem_len := len(model.memory.positions)) != 1:
        fail(f"made with mem_len={mem_len}, not 1: train a new model")
    if len(model.layers) != 1:
        fail(f"it has {len(model.layers)} layers, not 1")
    tokens, targets, _ = next(tasks.cups(1000, 32, seed=10**6))
    device = next(model.parameters()).device
    logits, _ = call(model.eval(), (tokens.to(device),))
    share = (logits.cpu().argmax(dim=-1) == targets).float().mean().item()
    if share < 0.9:
        fail(f"{share:.2f} right; after all LESSONS it is above 0.9")
    return f"{share:.2f} of the answers"


# ---------------------------------------------------------------- 3.6: blocks


def in_blocks(model, x, kv, S):
    """What `loop` returns, token by token, each with the memory of before its block."""
    outputs, vectors = [], []
    for part in x.split(S, dim=1):
        steps = [step(model, x_t, kv) for x_t in part.unbind(dim=1)]
        output, vector = (torch.stack(y, dim=1) for y in zip(*steps))
        kv = torch.cat([kv, model.memory.keys_values(vector)], dim=1)
        kv = kv[:, -model.mem_len :]
        outputs.append(output)
        vectors.append(vector)
    return torch.cat(outputs, dim=1), torch.cat(vectors, dim=1), kv


@exercise("3.6")
@torch.no_grad()
def check_blocks(blocks, model=None):
    """blocks(model, x, kv, S); model is a FeedbackTransformer in float64."""
    if not callable(blocks) or not hasattr(model, "memory"):
        fail("hand in your function and then a FeedbackTransformer, such as `tiny`")
    d_model = model.embedding.embedding_dim
    dtype, device = model.embedding.weight.dtype, model.embedding.weight.device
    x, vectors = (random(2, n, d_model).to(device, dtype) for n in (10, 3))
    kv = model.memory.keys_values(vectors)
    for S in (1, 4):
        right, calls = in_blocks(model, x, kv, S), []
        count = model.layers[0].register_forward_hook(lambda *_: calls.append(1))
        try:
            mine = call(blocks, (model, x, kv, S), copied=False)
        finally:
            count.remove()
        if not isinstance(mine, tuple) or len(mine) != 3:
            fail(
                f"return three things: outputs, vectors, kv; not {kind(mine)}"
            )
        for name, a, b in zip(("outputs", "vectors", "kv"), mine, right):
            where = f"S = {S}: {name}"
            if a.shape != b.shape:
                fail(f"{where} {tuple(a.shape)}, not {tuple(b.shape)}")
            off = (a - b).abs().flatten(2).amax(dim=(0, 2))  # token by token
            wrong = (off > 1e-6).nonzero().flatten().tolist()
            if wrong and torch.equal(mine[0], right[1]):
                fail(f"S = {S}: the outputs come first, then the vectors")
            if wrong:
                why = "each token sees its own text's memory of before its block"
                fail(f"{where} are wrong at {wrong}: {why}")
        if len(calls) > (steps := -(-10 // S)):
            fail(f"S = {S}: 10 tokens took {len(calls)} steps, in blocks {steps}")


# ---------------------------------------------------------------- for handouts

states = [random(2, 4, seed=n) for n in range(3)]
taught("3.Memory.vector", Memory, [(states,)], args=(4, 2, 2, 5, True))
with torch.random.fork_rng(devices=[]):
    torch.manual_seed(0)
    model = FeedbackTransformer(5, 4, 2, 2, 8, mem_len=5).requires_grad_(False)
kv = model.memory.keys_values(random(2, 3, 4, seed=3))
taught("3.step", step, [(model, random(2, 4, seed=4), kv)])
