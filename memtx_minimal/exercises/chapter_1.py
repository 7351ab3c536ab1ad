"""Chapter 1, Transformer-XL: what is right, and what often goes wrong."""

import functools
from copy import deepcopy

import torch
import torch.nn.functional as F

from memtx_minimal.exercises.core import (
    NotAnswered, by_cases, call, compare, differ, exercise, fail, kind, taught,
)  # fmt: skip
from memtx_minimal.transformer_xl import (
    RelativeAttention, attention_mask, distances, rel_shift, sinusoid,
)  # fmt: skip

# ---------------------------------------------------------------- 1.1: who sees what


def seen(T, M, limit):
    """How many keys each query sees, counted in the mask."""
    return attention_mask(distances(T, M), limit).exp().sum(dim=1).int().tolist()


compare(
    "1.1",
    right=seen,
    cases=[(3, 2, None), (1, 0, None), (4, 6, 6), (4, 1, 3)],
    without=["attention_mask", "distances"],
    mistakes={
        "a query sees itself, too": lambda T, M, limit: [M + i for i in range(T)],
        "the future is hidden: the first query sees fewer keys than the last": (
            lambda T, M, limit: [M + T] * T
        ),
        "with a limit, no query sees more keys than that": (
            lambda T, M, limit: [M + i + 1 for i in range(T)]
        ),
        "at distance limit a key is hidden already; the query's own distance is 0": (
            lambda T, M, limit: [min(M + i + 1, (limit or M + T) + 1) for i in range(T)]
        ),
    },
)

# ---------------------------------------------------------------- 1.2: the shift


def shifted(scores):
    """Each visible entry from the column of its distance; the future is nan."""
    T, K = scores.shape[-2:]
    distance = distances(T, K - T)
    column = (K - 1 - distance).clamp(max=K - 1)  # the columns are K - 1 ... 0
    moved = scores.gather(-1, column.expand_as(scores))
    return moved.masked_fill(distance < 0, float("nan"))


def cut_at_the_end(scores):
    T, K = scores.shape[-2:]
    rows = F.pad(scores, (1, 0)).reshape(*scores.shape[:-2], K + 1, T)
    return rows[..., :-1, :].reshape(scores.shape)


def pad_at_the_end(scores):
    T, K = scores.shape[-2:]
    rows = F.pad(scores, (0, 1)).reshape(*scores.shape[:-2], K + 1, T)
    return rows[..., 1:, :].reshape(scores.shape)


shapes = [(1, 3, 5), (2, 3, 4, 13), (2, 1, 5, 5), (1, 1)]
compare(
    "1.2",
    right=shifted,
    cases=[(torch.arange(float(torch.Size(s).numel())).view(s),) for s in shapes],
    without=["rel_shift", "gather", "take_along_dim"],
    mistakes={
        "each row has to move, by one place less than the row above it": lambda s: s,
        "cut the first row of the reshaped matrix, not the last": cut_at_the_end,
        "the column of zeros belongs at the front": pad_at_the_end,
    },
)

# ---------------------------------------------------------------- 1.3: a fault


def with_graph(memory):
    """What a memory function returns, and whether that keeps a graph alive."""

    @functools.wraps(memory)
    def both(past, x, mem_len):
        states = memory(past, x, mem_len)
        return states, "a graph" if getattr(states, "requires_grad", 0) else "no graph"

    return both


def given(past, x, mem_len):
    return torch.cat([past, x], dim=1)[:, -mem_len:]


def remembered(past, x, mem_len):
    context = torch.cat([past, x], dim=1)
    return context[:, max(0, context.size(1) - mem_len) :].detach()


past = torch.arange(4.0).view(1, 4, 1)
x = torch.arange(4.0, 7).view(1, 3, 1).requires_grad_()
memories = [(past, x, 4), (past[:, :0], x, 4), (past, x, 2), (past, x, 0)]
faults = {
    "it keeps the graph of all earlier segments alive": given,
    "with mem_len = 0, [:, -0:] is everything": lambda *case: given(*case).detach(),
    "the latest states come last": lambda past, x, n: given(x, past, n).detach(),
    "what is left of past counts, too": (
        lambda past, x, n: x[:, max(0, x.size(1) - n) :].detach()
    ),
    "a start below 0 counts from the end: nothing is dropped until memory is full": (
        lambda past, x, n: given(past, x, n - past.size(1) - x.size(1)).detach()
    ),
}


@exercise("1.3")
def check_memory(mine):
    by_cases(
        with_graph(mine) if callable(mine) else mine,
        with_graph(remembered),
        memories,
        given=with_graph(given),
        mistakes={hint: with_graph(fault) for hint, fault in faults.items()},
    )


# ---------------------------------------------------------------- 1.4: cleared


@exercise("1.4")
def check_cleared(loss, without, whole):
    """The loss expected, and those without and with all memory."""
    for number in (loss, without, whole):
        one = isinstance(number, torch.Tensor) and number.numel() == 1
        if isinstance(number, bool) or not (one or isinstance(number, (int, float))):
            fail(f"a loss is a number, and this is {kind(number)}")
    loss, without, whole = float(loss), float(without), float(whole)
    expected = (without + 3 * whole) / 4
    if not min(without, whole) < loss < max(without, whole):
        between = f"between {whole:.3f} (memory) and {without:.3f} (none)"
        fail(f"{loss:.3f} does not lie {between}: one segment in four has none")
    if abs(loss - expected) > 0.01:
        share = (loss - whole) / (without - whole)
        begin = f"as if {share:.0%} of the segments began without memory"
        fail(f"{loss:.3f}: {begin}; one in four does")
    return f"(without + 3 * with) / 4 = {expected:.3f}"


# ---------------------------------------------------------------- 1.5: the reach


def longest_reach(T, M, L, same_length):
    """How many of the latest tokens the last of several segments' logits can feel."""
    oldest = last = T * (M + 2) * (L + 1) - 1  # of a text that is long enough
    for _ in range(L):
        first = oldest // T * T - M  # the memory of its segment
        oldest = max(first, oldest - M + 1) if same_length else first
    return last - oldest + 1


compare(
    "1.5",
    right=lambda M, L: longest_reach(4, M, L, same_length=True),  # whatever T is
    cases=[(4, 1), (4, 3), (1, 5), (6, 2)],
    mistakes={
        "a query sees M keys, and one of them is itself": lambda M, L: 1 + L * M,
        "count the last token itself, too": lambda M, L: L * (M - 1),
        "each layer goes further back": lambda M, L: M,
        "each layer adds the M - 1 others, not all M": lambda M, L: L * M,
    },
)


# ---------------------------------------------------------------- 1.6: a bias


@exercise("1.6")
@torch.no_grad()
def check_bias(BiasAttention):
    """A class like RelativeAttention, with a parameter `bias` (H, n)."""
    torch.manual_seed(0)
    H, d_head = 2, 4
    if not isinstance(BiasAttention, type):
        fail(f"hand in the class itself, and not {kind(BiasAttention)}")
    layer = call(BiasAttention, (H * d_head, H, 0.0)).double()
    bias = getattr(layer, "bias", None)
    if bias is ...:
        raise NotAnswered
    if not isinstance(bias, torch.nn.Parameter) or bias.dim() != 2 or len(bias) != H:
        fail("give it a parameter `bias` (H, n), a number for each head and distance")
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter)
    for T, M in [(3, 4), (2, bias.size(1) + 3)]:
        K, context = M + T, torch.randn(2, M + T, H * d_head).double()
        mask, distance = attention_mask(distances(T, M)), distances(T, M)
        q = layer.heads(layer.query(context[:, -T:]))
        k, v = (layer.heads(x) for x in layer.key_value(context).chunk(2, dim=-1))
        far = distance.clamp(0, bias.size(1) - 1)
        a, a_c = (x @ k.mT / d_head**0.5 for x in (q, q + layer.u))
        b, turned = bias[:, far], bias.flip(1)[:, far]

        def out(scores):
            heads = scores.softmax(dim=-1) @ v
            return layer.out(heads.transpose(1, 2).flatten(2))

        wanted = [out(a_c + b + mask), out(a_c + b / d_head**0.5 + mask)]  # either
        mistakes = {
            "the term (c) is to be kept: add u to the queries": out(a + b + mask),
            "is the mask added?": out(a_c + b),
            "bias[:, 0] is for the distance 0": out(a_c + turned + mask),
        }
        R = torch.zeros(K + 1, H * d_head).double()
        mine = call(layer, (context, R, mask))
        if not all(differ(w, mine, 1e-6) for w in wanted):
            continue
        case = "while the table covers all distances"
        if K > bias.size(1):
            case = "where keys lie beyond the table: they share its last number"
        hints = [h for h, wrong in mistakes.items() if not differ(wrong, mine, 1e-6)]
        words = [f"T = {T}, M = {M}, {case}: {differ(wanted[0], mine, 1e-6)}"]
        fail("\n".join(words + [f"hint: {hint}" for hint in hints]))


# ---------------------------------------------------------------- 1.7: no detach


@exercise("1.7")
def check_through(model):
    """A TransformerXL whose memory keeps the graph."""
    if not hasattr(model, "mem_len"):
        fail(f"hand in a model, Through(...), and not {kind(model)}")
    T, model = model.mem_len, deepcopy(model).double().cpu().eval()
    generator = torch.Generator().manual_seed(0)
    vocab_size = model.embedding.num_embeddings
    tokens = torch.randint(vocab_size, (2, 2 * T), generator=generator)

    def gradient(segments):
        model.zero_grad()
        memory = None
        for segment in segments:
            logits, memory = call(model, (segment, memory), copied=False)
        logits[:, -1].logsumexp(-1).sum().backward()
        return model.embedding.weight.grad.clone()

    whole, mine = gradient([tokens]), gradient(tokens.split(T, dim=1))
    if not torch.allclose(mine, whole):
        old = tokens[:, :T].unique()
        only = old[~torch.isin(old, tokens[:, T:].unique())]
        cut = len(only) and not mine[only].any()
        why = "the first segment gets none: is `detach` gone?" if cut else "they differ"
        fail(f"two segments should give the gradient of one long window: {why}")


# ---------------------------------------------------------------- for handouts


def visible(scores):
    """What rel_shift gives, its garbage as nan."""
    moved, T = rel_shift(scores), scores.size(-2)
    return moved.masked_fill(distances(T, moved.size(-1) - T) < 0, float("nan"))


columns = torch.arange(5.0, -1, -1).expand(1, 3, 6).contiguous()
taught("1.distances", distances, [(3, 2), (1, 0)])
taught(
    "1.attention_mask",
    attention_mask,
    [(distances(3, 2), None), (distances(3, 2), 2)],
)
taught("1.rel_shift", visible, [(columns,), (torch.arange(84.0).view(2, 3, 2, 7),)])
generator = torch.Generator().manual_seed(0)
context = torch.randn(2, 7, 8, generator=generator)
R = sinusoid(torch.arange(7, -1, -1), 8)
taught(
    "1.RelativeAttention.forward",
    RelativeAttention,
    [(context, R, attention_mask(distances(4, 3)))],
    args=(8, 2, 0.0),
)
