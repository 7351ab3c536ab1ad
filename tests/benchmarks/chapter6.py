"""Chapter 6, memory today: the gated delta rule in chunks, token by token, and transformers'; the notebook. See run.py for what a row is."""

import sys
from types import FunctionType, SimpleNamespace

import torch
import torch.nn.functional as F
from sides import SIZE, notebook

LENGTH, TEXTS = 1024, 4
HEADS, D_HEAD = SIZE["n_heads"], SIZE["d_model"] // SIZE["n_heads"]
CASE = f"{LENGTH} tokens, {TEXTS} texts, {HEADS} heads of {D_HEAD}"


def numbers(dtype, T=LENGTH):
    """q, k, v, alpha, beta, S as a layer has them: keys and queries of length one, beta up to 2."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(TEXTS, HEADS, *shape, generator=generator, dtype=dtype)
    q, k, v, S = (draw(n, D_HEAD) for n in (T, T, T, D_HEAD))
    alpha, beta = (draw(T) + 5).sigmoid(), 2 * draw(T).sigmoid()
    return [x.requires_grad_() for x in (F.normalize(q, dim=-1), F.normalize(k, dim=-1), v, alpha, beta, S)]


def passes(rule, given):
    """What is read, the state at the end, and all gradients of a number made of both."""
    read, S = rule(*given)
    weights = torch.linspace(-1, 1, read.numel(), dtype=read.dtype).view_as(read)
    loss = (read * weights).sum() / D_HEAD + (S * S).sum() / 2
    return read, S, *torch.autograd.grad(loss, given)


# The rules, (q, k, v, alpha, beta, S) -> what is read, S: here as in memory_today.


def ours():
    from memtx_minimal import memory_today

    return {"plain": memory_today.delta_rule, "chunked": memory_today.chunked_delta_rule}


class Wide:
    """torch, in which float32 means float64."""

    float32 = torch.float64

    def __getattr__(self, name):
        return getattr(torch, name)


def transformers(dtype=torch.float32):
    """Those that Qwen3-Next falls back on where there is no kernel: plain PyTorch, in float32 whatever they get, hence Wide."""
    sys.modules["torchvision"] = None  # of no use here, and what pip brings may be built for another torch
    from transformers.models.qwen3_next import modeling_qwen3_next as module

    def rule(name):
        public = getattr(module, name)
        public = getattr(public, "__wrapped__", public)
        if dtype == torch.float64:
            public = FunctionType(public.__code__, vars(module) | {"torch": Wide()}, name, public.__defaults__, public.__closure__)

        def call(q, k, v, alpha, beta, S):
            q, k, v, g, beta = (x.transpose(1, 2) for x in (D_HEAD**0.5 * q, k, v, alpha.log(), beta))
            read, S = public(q, k, v, g=g, beta=beta, initial_state=S.mT, output_final_state=True)
            return read.transpose(1, 2), S.mT

        return call

    return SimpleNamespace(plain=rule("torch_recurrent_gated_delta_rule"), chunked=rule("torch_chunk_gated_delta_rule"))


# Sides.


def timed(name, rule):
    """Milliseconds of a forward and a backward pass in float32."""
    from memtx_minimal.measure import seconds

    given = numbers(torch.float32)
    return lambda: {name: 1e3 * seconds(lambda: passes(rule, given), warmup=1, rounds=3)}


def apart(name, rule, other, T=LENGTH):
    """The largest difference in values and gradients, in float64."""
    given = numbers(torch.float64, T)

    def side():
        pairs = zip(passes(rule, given), passes(other, given), strict=True)
        return {name: max((a - b).abs().max().item() for a, b in pairs)}

    return side


def chunks():
    rules = ours()
    odd = apart("difference, 1,000 tokens", rules["chunked"], rules["plain"], T=1000)
    return [timed(name, rule) for name, rule in rules.items()] + [apart("difference", rules["chunked"], rules["plain"]), odd]


def against_public():
    rules, public, exact = ours(), transformers(), transformers(torch.float64)
    return [
        timed("chunked", rules["chunked"]),
        timed("transformers", public.chunked),
        apart("difference, chunked", rules["chunked"], exact.chunked),
        apart("difference, plain", rules["plain"], exact.plain),
    ]


ROWS = [
    {
        "name": "delta-chunked",
        "compares": f"the gated delta rule in chunks of 32 and token by token, a forward and a backward pass in milliseconds, float32; {CASE}. "
        "difference: the largest between both in float64, in what is read, the state at the end, and the gradients of all six inputs, beta up to 2",
        "sides": chunks,
        "reach": ["plain / chunked >= 5", "difference <= 0.0000000001", "difference, 1,000 tokens <= 0.0000000001"],
    },
    {
        "name": "delta-public",
        "compares": f"the same in chunks, and transformers 5.23.0's, which Qwen3-Next falls back on without a kernel (chunks of 64); {CASE}. difference: "
        "as above, to its rules in chunks and token by token, which compute in float64 here in place of float32",
        "sides": against_public,
        "reach": ["transformers / chunked", "difference, chunked <= 0.0000000001", "difference, plain <= 0.0000000001"],
        "public": True,
    },
    {
        "name": "notebook-06",
        "compares": "the notebook from top to bottom: minutes, and the peak of the resident memory of its kernel and what that starts",
        "sides": lambda: [lambda: notebook("06_memory_today")],
        "reach": ["minutes <= 7", "GiB <= 2"],
        "rounds": 1,
    },
]
