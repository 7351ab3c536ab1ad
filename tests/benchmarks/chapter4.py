"""Chapter 4, Reformer, and appendix B: plain and fast against fused attention and public packages, bytes, length, the notebooks. See run.py for
what a row is."""

import sys

import torch
import torch.nn.functional as F
from sides import SIZE, VOCAB, notebook, training
from torch import nn

CHUNK = 64
STEP = (
    "a training step (forward, backward, AdamW), microseconds per token; whole models, d_model 128, 4 heads, 4 layers, d_ff 512, batch 1, float32, "
    "chunks of 64; MiB: the most that one step holds in tensors (memtx_minimal.measure.peak_bytes)"
)


# The models, tokens (1, T) -> logits.


def reformer(T, n_rounds, n_layers=SIZE["n_layers"]):
    from memtx_minimal.reformer import Reformer

    return Reformer(VOCAB, **SIZE | {"n_layers": n_layers}, axial_shape=(T // 64, 64), chunk_len=CHUNK, n_rounds=n_rounds)


def fast(T, n_rounds):
    from memtx_minimal.fast_lsh import speed_up

    return speed_up(reformer(T, n_rounds))


def vanilla(T):
    from memtx_minimal.vanilla_transformer import VanillaTransformer

    return VanillaTransformer(VOCAB, **SIZE, max_len=T)


class Logits(nn.Module):
    """A public model under the protocol of the house."""

    def __init__(self, model, pick):
        super().__init__()
        self.model, self.pick = model, pick

    def forward(self, tokens, memory=None):
        return self.pick(self.model(tokens)), None


def reformer_pytorch(T, n_rounds):
    from reformer_pytorch import ReformerLM

    model = ReformerLM(
        VOCAB, dim=SIZE["d_model"], depth=SIZE["n_layers"], max_seq_len=T, heads=SIZE["n_heads"],
        dim_head=SIZE["d_model"] // SIZE["n_heads"], bucket_size=CHUNK, n_hashes=n_rounds, ff_chunks=max(1, T // 512),
        causal=True, axial_position_emb=True, axial_position_shape=(T // 64, 64),
    )  # fmt: skip
    return Logits(model, lambda out: out)


def transformers(T, n_rounds):
    sys.modules["torchvision"] = None  # of no use here, and what pip brings may be built for another torch
    from transformers import ReformerConfig, ReformerModelWithLMHead

    config = ReformerConfig(
        vocab_size=VOCAB, hidden_size=SIZE["d_model"], num_attention_heads=SIZE["n_heads"],
        attention_head_size=SIZE["d_model"] // SIZE["n_heads"], feed_forward_size=SIZE["d_ff"], attn_layers=["lsh"] * SIZE["n_layers"],
        lsh_attn_chunk_length=CHUNK, num_hashes=n_rounds, axial_pos_shape=(T // 64, 64), axial_pos_embds_dim=(64, 64),
        max_position_embeddings=T, chunk_size_feed_forward=512, hidden_dropout_prob=0.0, lsh_attention_probs_dropout_prob=0.0,
        is_decoder=True, use_cache=False,
    )  # fmt: skip
    return Logits(ReformerModelWithLMHead(config).train(), lambda out: out.logits)


# Sides.


def step(name, model, T, memory=True):
    """Microseconds per token of a training step, and MiB at its peak, which are counted once, in a step that is not timed."""
    from memtx_minimal.measure import peak_bytes

    work, peak = training(name, model, steps=1, batch_size=1, T=T), {}
    if memory:
        tokens = torch.randint(VOCAB, (1, T))

        def forward_backward():
            F.cross_entropy(model(tokens)[0].flatten(0, 1), tokens.flatten()).backward()

        model.zero_grad()
        peak = {f"{name} MiB": peak_bytes(forward_backward) / 2**20}
    return lambda: {name: work()[name]} | peak


def forward_backward(name, model, T):
    """Microseconds per token of a forward and a backward pass."""
    from memtx_minimal.measure import seconds

    tokens = torch.randint(VOCAB, (1, T))
    run = lambda: F.cross_entropy(model(tokens)[0].flatten(0, 1), tokens.flatten()).backward()
    return lambda: {name: 1e6 / T * seconds(run, warmup=1, rounds=1)}


def plain_against_fused(T=16384):
    sides = [forward_backward("vanilla", vanilla(T), T)]
    return sides + [forward_backward(f"{n} rounds", reformer(T, n), T) for n in (1, 2, 4)]


def against_public(T):
    makers = {"ours": fast, "reformer-pytorch": reformer_pytorch, "transformers": transformers}
    return lambda: [step(name, make(T, n_rounds=4), T) for name, make in makers.items()]


def against_fused():
    sides = [step("vanilla 16384", vanilla(16384), 16384), step("4 rounds 16384", fast(16384, 4), 16384)]
    for T in (1024, 4096, 16384):
        if T < 16384:
            sides.append(step(f"vanilla {T}", vanilla(T), T, memory=False))
        sides.append(step(f"1 round {T}", fast(T, 1), T, memory=False))
    return sides


def lengths():
    return [step(f"4 rounds {T}", fast(T, 4), T, memory=False) for T in (1024, 4096, 32768)]


def kept(T=4096):
    """KiB a token that autograd keeps between forward and backward, cross-entropy included."""
    from memtx_minimal.measure import bytes_for_backward

    tokens = torch.randint(VOCAB, (1, T))

    def side(n_rounds, n_layers):
        model = reformer(T, n_rounds, n_layers)
        loss = lambda: F.cross_entropy(model(tokens)[0].flatten(0, 1), tokens.flatten())
        return lambda: {f"{n_rounds} rounds {n_layers} layers": bytes_for_backward(model, loss) / T / 1024}

    return [side(n_rounds, n_layers) for n_rounds in (1, 2, 4) for n_layers in (1, 12)]


def public_row(T, times):
    return {
        "name": f"reformer-{T}",
        "compares": f"{STEP}; length {T}, 4 rounds: Reformer with fast_lsh, reformer-pytorch 1.4.4 and transformers 5.23.0",
        "sides": against_public(T),
        "reach": [
            f"reformer-pytorch / ours >= {times}",
            f"transformers / ours >= {times}",
            "reformer-pytorch MiB / ours MiB >= 2",
            "transformers MiB / ours MiB >= 2",
        ],
        "rounds": 3,
        "public": True,
    }


ROWS = [
    public_row(4096, times=2.4),
    public_row(16384, times=2.6),
    {
        "name": "reformer-plain",
        "compares": "a forward and a backward pass, microseconds per token; the plain Reformer, as the chapter has it, and VanillaTransformer, which calls "
        "PyTorch's fused attention; length 16384, sizes as above",
        "sides": plain_against_fused,
        "reach": ["vanilla / 1 rounds >= 2.5", "vanilla / 2 rounds >= 1.7", "vanilla / 4 rounds >= 0.9"],
        "rounds": 3,
    },
    {
        "name": "reformer-fused",
        "compares": f"{STEP}; Reformer with fast_lsh and VanillaTransformer, which calls PyTorch's fused attention, by length",
        "sides": against_fused,
        "reach": [
            "vanilla 16384 / 4 rounds 16384 >= 2.5",
            "vanilla 16384 MiB / 4 rounds 16384 MiB >= 1",
            "vanilla 1024 / 1 round 1024",
            "vanilla 4096 / 1 round 4096 >= 1",
            "vanilla 16384 / 1 round 16384 >= 1",
        ],
        "rounds": 3,
    },
    {
        "name": "reformer-length",
        "compares": f"{STEP}; Reformer with fast_lsh and 4 rounds, by length",
        "sides": lengths,
        "reach": ["4 rounds 32768 / 4 rounds 1024 <= 1.3"],
        "rounds": 3,
    },
    {
        "name": "reformer-kept",
        "compares": "KiB a token that autograd keeps for the backward pass, 12 layers against 1, by hash rounds; length 4096, sizes as above. "
        "A layer keeps its buckets: one byte a token, head and round",
        "sides": kept,
        "reach": [
            "1 rounds 12 layers / 1 rounds 1 layers",
            "2 rounds 12 layers / 2 rounds 1 layers <= 1.05",
            "4 rounds 12 layers / 4 rounds 1 layers",
        ],
        "rounds": 1,
    },
    {
        "name": "notebook-04",
        "compares": "the notebook from top to bottom: minutes, and the peak of the resident memory of its kernel and what that starts",
        "sides": lambda: [lambda: notebook("04_reformer")],
        "reach": ["minutes <= 7", "GiB <= 3"],
        "rounds": 1,
    },
    {
        "name": "notebook-b",
        "compares": "the notebook from top to bottom: minutes, and the peak of the resident memory of its kernel and what that starts",
        "sides": lambda: [lambda: notebook("b_fast_lsh")],
        "reach": ["minutes <= 2", "GiB <= 2"],
        "rounds": 1,
    },
]
