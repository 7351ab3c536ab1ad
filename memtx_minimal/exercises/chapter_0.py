"""Chapter 0, attention from nothing: what is right, and what often goes wrong."""

import math

import torch
import torch.nn.functional as F

from memtx_minimal.exercises.core import (
    call, choices, compare, differ, exercise, fail, kind, show, taught,
)  # fmt: skip
from memtx_minimal.vanilla_transformer import CausalAttention, sinusoid


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# ---------------------------------------------------------------- 0.1: attention


def attention(q, k, v):
    return F.scaled_dot_product_attention(q[None], k[None], v[None], is_causal=True)[0]


def one_by_one(q, k, v, last=1, scale=None):
    """Query by query, over the keys 0 ... t + last - 1."""
    scale, rows = q.size(1) ** 0.5 if scale is None else scale, []
    for t in range(len(q)):
        scores = k[: t + last] @ q[t] / scale
        rows.append(scores.softmax(dim=0) @ v[: t + last])
    return torch.stack(rows)


compare(
    "0.1",
    right=attention,
    cases=[
        tuple(random(3, T, d).round(decimals=1)) for T, d in [(1, 2), (2, 4), (7, 3)]
    ],
    without=["scaled_dot_product_attention", "CausalAttention"],
    mistakes={
        "divide the scores by the root of d": lambda *qkv: one_by_one(*qkv, scale=1),
        "query t may see the keys 0 ... t, and no later one": (
            lambda *qkv: one_by_one(*qkv, last=2)
        ),
        "no query may see a later key": lambda *qkv: one_by_one(*qkv, last=len(qkv[0])),
        "query t may see its own key, too": lambda *qkv: one_by_one(*qkv, last=0),
        "divide by the root of d, not by d": (
            lambda q, k, v: one_by_one(q, k, v, scale=q.size(1))
        ),
    },
)

# ---------------------------------------------------------------- 0.2: the cache


def cache(T, B, n_kv_heads):
    return 2 * 32 * T * B * n_kv_heads * 128 * 2


compare(
    "0.2",
    right=cache,
    cases=[(1, 1, 1), (100_000, 1, 32), (100_000, 6, 8)],
    mistakes={
        "half of it: there is a key and a value, and a number takes 2 bytes": (
            lambda *case: cache(*case) // 2
        ),
        "only n_kv_heads of the heads have keys and values": (
            lambda T, B, n: cache(T, B, 32)
        ),
        "each layer has its own": lambda *case: cache(*case) // 32,
        "there are B texts": lambda T, B, n: cache(T, 1, n),
    },
)

# ---------------------------------------------------------------- 0.3: a fault


def masked(scores):
    future = torch.ones_like(scores, dtype=torch.bool).triu(1)
    return scores.masked_fill(future, -math.inf).softmax(dim=-1)


def given(scores):
    return scores.softmax(dim=-1).tril()


def without_future(scores, number):
    return scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), number)


compare(
    "0.3",
    right=masked,
    cases=[(torch.zeros(3, 3),), (random(3, 3).round(decimals=1),), (random(5, 5),)],
    given=given,
    mistakes={
        "a score of 0 is not nothing: what softmax leaves out is minus infinity": (
            lambda s: without_future(s, 0.0).softmax(dim=-1)
        ),
        "a token may see itself: the diagonal stays": (
            lambda s: s.masked_fill(torch.ones_like(s).triu() > 0, -math.inf).softmax(-1)
        ),
        "each row sums to 1, not each column": (
            lambda s: without_future(s, -math.inf).softmax(dim=0)
        ),
        "the future lies above the diagonal": (
            lambda s: s.masked_fill(torch.ones_like(s).tril(-1) > 0, -math.inf).softmax(
                -1
            )
        ),
    },
)

# ---------------------------------------------------------------- 0.4: sliding a cache


@exercise("0.4")
@torch.inference_mode()
def check_slide(my_slide, model):
    """The last of 65 tokens, from a cache of 64 that lost its oldest."""
    (vocab_size, d_model), device = model.embedding.weight.shape, model.head.bias.device
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(vocab_size, (1, 65), generator=generator).to(device)
    positions = torch.arange(65, device=device).clamp(max=63)  # the last two share one
    mask = torch.ones(65, 65, dtype=torch.bool, device=device).tril()
    mask[64, 0] = False  # dropped before the last one came
    x = model.embedding(tokens) + sinusoid(positions, d_model)
    for layer in model.layers:
        attention = layer.attention
        qkv = attention.query_key_value(layer.norm_attention(x))
        qkv = qkv.unflatten(-1, (3, attention.n_heads, -1)).permute(2, 0, 3, 1, 4)
        heads = F.scaled_dot_product_attention(*qkv, attn_mask=mask)
        x = x + attention.out(heads.transpose(1, 2).flatten(2))
        x = x + layer.feed_forward(layer.norm_feed_forward(x))
    right, again = model.head(model.norm(x))[:, -1], model(tokens[:, 1:])[0][:, -1]
    mine = call(my_slide, (tokens,))
    if not (difference := differ(right, mine, 1e-3)):
        off = (right - again).abs().max()
        return f"{off:.2f} from the logits of the last 64, read anew"
    if not differ(again, mine, 1e-3):
        fail(
            "these are the last 64 characters read anew: go on from the cache"
        )
    fail(
        f"{difference}\n64 tokens in, the oldest of each layer out, then the last token"
    )


# ---------------------------------------------------------------- 0.5: windows


@exercise("0.5")
@torch.inference_mode()
def check_sliding(my_sliding, model, stream):
    """The mean loss of characters with 64 before them."""
    device = model.head.weight.device

    def loss(n, first=64, width=64, last=1, ahead=1):
        found = []
        for t in range(first, first + n):
            window, targets = stream[t - width : t], stream[t - width + ahead : t + ahead]
            logits = model(window[None].to(device))[0][0, -last:].cpu()
            found.append(F.cross_entropy(logits, targets[-last:].cpu()).item())
        return sum(found) / n

    for n in (1, 30):
        right, mine = loss(n), call(my_sliding, (model, stream, n), copied=False)
        if differ(right, mine, 1e-3):
            words = f"n = {n}: {differ(right, mine, 1e-3)}"
            hints = {
                "character 64 is the first that has 64 before it": loss(n, first=65)
            }
            hints["each from the 64 before it, not from 63"] = loss(n, width=63)
            hints["the mean, not the sum"] = n * right
            hints["what counts is the last prediction of each window"] = loss(n, last=64)
            hints["the target comes after its window"] = loss(n, ahead=0)
            told = [
                f"\nhint: {h}"
                for h, wrong in hints.items()
                if not differ(wrong, mine, 1e-3)
            ]
            fail("".join([words, *told[:1]]))


# ---------------------------------------------------------------- 0.6: who notices?

choices(
    "0.6",
    right={"one layer": True, "two layers": False, "with positions": False},
    why={
        "one layer": "the last query attends to the same keys; a sum has no order",
        "two layers": "the mask: the first token saw itself alone, the second saw both",
        "with positions": "now a key says where it stands",
    },
)

# ---------------------------------------------------------------- 0.7: a turn


@exercise("0.7")
def check_turn(my_turn):
    """The matrix that takes each position n further."""
    for n, d_model in [(1, 2), (0, 8), (1, 64), (9, 64)]:
        P, turn = sinusoid(torch.arange(40), d_model), call(my_turn, (n, d_model))
        case = f"my_turn({n}, {d_model})"
        if getattr(turn, "shape", None) != (d_model, d_model):
            fail(f"{case} should be a tensor {(d_model, d_model)}, and is {kind(turn)}")
        now, later = P[: 40 - n], P[n:]
        turn = turn.to(P)
        if not differ(later, now @ turn, 1e-3):
            continue
        off = (now @ turn - later).abs().amax(dim=0)  # (d_model,)
        wrong = (off > 1e-3).nonzero().flatten().tolist()
        words = f"{case}: {len(wrong)} dimensions are wrong, first {wrong[:4]}"
        words += f"\nmatrix: {show(turn)}" if d_model == 2 else ""
        if not differ(now, later @ turn, 1e-3):
            words += "\nhint: it turns back: the signs of the sines, or the transpose"
        elif d_model > 2:
            words += "\nhint: sines stand in the first half of U, cosines in the second"
        fail(words)


# ---------------------------------------------------------------- for handouts

x = random(2, 5, 8)
taught("0.CausalAttention.forward", CausalAttention, [(x,)], args=(8, 2, 0.0))
taught("0.sinusoid", sinusoid, [(torch.arange(3), 2), (torch.tensor([0, 7, 40]), 8)])
