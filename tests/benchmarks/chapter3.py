"""Chapter 3, Feedback Transformer: training, generation, a ball under cups, the notebook. See run.py for what a row is."""

import time
from statistics import median

import torch
from sides import BATCH, SIZE, STEP, VOCAB, T, notebook, training
from torch import nn

MEMORY = 64

# A training step.


class LabmlFeedback(nn.Module):
    """labml-nn's Feedback Transformer with embedding and generator as in its own experiment; tokens (T, B) as its loader gives them."""

    def __init__(self, shared_kv, d_model, n_heads, n_layers, d_ff):
        super().__init__()
        from labml_nn.transformers.feed_forward import FeedForward
        from labml_nn.transformers.feedback import FeedbackAttention, FeedbackTransformer, FeedbackTransformerKV, FeedbackTransformerLayer

        attention = FeedbackAttention(n_heads, d_model, 0.0, is_kv_precomputed=shared_kv)
        layer = FeedbackTransformerLayer(
            d_model=d_model, attn=attention, feed_forward=FeedForward(d_model, d_ff, dropout=0.0), dropout_prob=0.0
        )
        self.embedding = nn.Embedding(VOCAB, d_model)
        self.transformer = FeedbackTransformerKV(layer, n_layers, d_model, n_heads) if shared_kv else FeedbackTransformer(layer, n_layers)
        self.generator = nn.Linear(d_model, VOCAB)

    def forward(self, tokens, memory):
        return self.generator(self.transformer(self.embedding(tokens))), None


class Lucidrains(nn.Module):
    """feedback-transformer-pytorch one token at a time, as in the paper. Its memory would keep its graph: each segment starts without.

    Its feed-forward is gated: at the same d_ff, three matrices where the others have two. narrow: no more weights in all than ours.
    """

    def __init__(self, d_model, n_heads, n_layers, d_ff, mem_len=MEMORY, seq_len=1, narrow=False):
        super().__init__()
        from feedback_transformer_pytorch import FeedbackTransformer

        assert d_ff == 4 * d_model  # the package knows no other
        self.model = FeedbackTransformer(
            num_tokens=VOCAB, dim=d_model, depth=n_layers, mem_len=mem_len, seq_len=seq_len, heads=n_heads, dim_head=d_model // n_heads
        )
        if narrow:
            width = 2 * d_ff // 3 // 16 * 16  # whole vectors of the processor: 336 for 512
            for _, feed_forward in self.model.layers:
                net = feed_forward.fn.fn.net
                net[0], net[3] = nn.Linear(d_model, 2 * width), nn.Linear(width, d_model)

    def forward(self, tokens, memory):
        return self.model(tokens), None


class Restarted(nn.Module):
    """A model whose every segment starts without memory, as those of the public packages do."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, tokens, memory):
        return self.model(tokens, None)


def ours(restarted=True, fast=False):
    from memtx_minimal.fast_feedback import speed_up
    from memtx_minimal.feedback_transformer import FeedbackTransformer

    model = FeedbackTransformer(VOCAB, **SIZE, mem_len=MEMORY, dropout=0.0)
    model = speed_up(model) if fast else model
    return Restarted(model) if restarted else model


def against_public():
    return [
        training("plain", ours(), steps=2),
        training("fast", ours(fast=True), steps=4),
        training("fast with memory", ours(restarted=False, fast=True), steps=4),
        training("labml shared", LabmlFeedback(True, **SIZE), batch_first=False, steps=2),
        training("labml per layer", LabmlFeedback(False, **SIZE), batch_first=False, steps=2),
        training("lucidrains", Lucidrains(**SIZE), steps=2),
        training("lucidrains narrow", Lucidrains(**SIZE, narrow=True), steps=2),
    ]


def against_vanilla():
    from memtx_minimal.vanilla_transformer import VanillaTransformer

    return [
        training("plain", ours(), steps=2),
        training("plain with memory", ours(restarted=False), steps=2),
        training("fast", ours(fast=True), steps=5),
        training("fast with memory", ours(restarted=False, fast=True), steps=5),
        training("vanilla", VanillaTransformer(VOCAB, **SIZE, max_len=T, dropout=0.0), steps=5),
    ]


# Generation with the cache.


def generating(name, step, memory, batch_size):
    """One side: microseconds per token of a text, one token of each text at a time, after the memory that is given."""
    token = torch.zeros(batch_size, 1, dtype=torch.int64)

    @torch.inference_mode()
    def work():
        state, times = memory, []
        for _ in range(60):
            start = time.perf_counter()
            _, state = step(token, state)
            times.append(time.perf_counter() - start)
        return {name: median(times[10:]) / batch_size * 1e6}

    return work


@torch.inference_mode()
def generation(prefix, batch_size):
    depth, capacity = 1000, 1064  # tokens read before, and room in memory for those that are generated
    from memtx_minimal.fast_feedback import CachedInPlace
    from memtx_minimal.feedback_transformer import Cached, FeedbackTransformer

    text = torch.randint(VOCAB, (batch_size, depth))
    model = FeedbackTransformer(VOCAB, **SIZE, mem_len=capacity).eval()
    plain, fast = Cached(model), CachedInPlace(model)
    starts = {"plain": (plain, text), "fast": (fast, text), "fast at start": (fast, text[:, :10])}
    sides = [generating(prefix + name, step, step(start)[1], batch_size) for name, (step, start) in starts.items()]
    for seq_len in (1, 2):
        package = Lucidrains(**SIZE, mem_len=capacity, seq_len=seq_len).eval().model
        memory = package(text, return_memory=True)[1]
        step = lambda t, m, p=package: p(t, m, return_memory=True)
        sides.append(generating(f"{prefix}lucidrains {seq_len}", step, memory, batch_size))
    return sides


# A ball under cups.

GAMES = {"d_model": 64, "n_heads": 4, "d_ff": 256}
LESSONS = [(2, 150, 1e-2), (4, 250, 1e-2), (8, 150, 1e-2), (16, 80, 5e-3), (32, 40, 1e-3)]  # length, steps, learning rate


def accuracy(model, length=32):
    from memtx_minimal.tasks import cups

    tokens, targets, _ = next(cups(1000, length, seed=10**6))
    with torch.no_grad():
        return (model.eval()(tokens)[0].argmax(-1) == targets).float().mean().item()


def follow_the_ball():
    from memtx_minimal.feedback_transformer import FeedbackTransformer
    from memtx_minimal.tasks import cups
    from memtx_minimal.training import train
    from memtx_minimal.vanilla_transformer import VanillaTransformer

    models = {
        "one feedback layer": FeedbackTransformer(10, **GAMES, n_layers=1, mem_len=32),
        "four vanilla layers": VanillaTransformer(10, **GAMES, n_layers=4, max_len=32),
    }
    result = {}
    for name, model in models.items():
        for length, steps, lr in LESSONS:
            games = cups(128, length, seed=length)
            train(model, games, steps=steps, lr=0.3 * lr if "vanilla" in name else lr, warmup=20, clip=0.1, progress=False)
        result[name] = accuracy(model)
    return result


ROWS = [
    {
        "name": "feedback-train-public",
        "compares": f"{STEP}: FeedbackTransformer, plain and sped up (appendix A), each segment without memory from the one before as in the packages "
        "(and, to be told, with a full memory of 64); labml-nn 0.5.1's versions with keys and values shared and per layer; feedback-transformer-pytorch "
        "0.0.11 with seq_len 1, memory 64, whose feed-forward is gated and so has half as many weights again (and, to be told, narrow: with no more "
        "weights in all than ours)",
        "sides": against_public,
        "reach": [
            "labml shared / plain >= 1.2",
            "labml per layer / plain >= 1.2",
            "lucidrains / plain >= 1.2",
            "labml shared / fast >= 2.9",
            "labml per layer / fast >= 2.9",
            "lucidrains / fast >= 2.9",
            "lucidrains / fast with memory",
            "lucidrains narrow / fast",
            "lucidrains narrow / plain",
        ],
        "rounds": 5,
        "public": True,
    },
    {
        "name": "feedback-train-vanilla",
        "compares": f"{STEP}: FeedbackTransformer, plain and sped up (appendix A), and VanillaTransformer, all without anything from before the segment; to be "
        "told, both with a full memory of 64, and the gain of the fast way forwards and backwards apart",
        "sides": against_vanilla,
        "reach": [
            "fast / vanilla <= 3.5",
            "plain / vanilla",
            "fast with memory / vanilla",
            "plain with memory / vanilla",
            "plain forward / fast forward",
            "plain backward / fast backward",
        ],
    },
    {
        "name": "feedback-generate",
        "compares": "microseconds per generated token, one token of each text a call with the model's own cache, after 1,000 tokens (ours also "
        "at the start of a text): FeedbackTransformer with the cache that is written in place (appendix A) and, plain, with the one that is copied; "
        "feedback-transformer-pytorch 0.0.11 with seq_len 1 and 2; sizes and batch as in training, and a single text",
        "sides": lambda: generation("", BATCH) + generation("single ", 1),
        "reach": [
            "lucidrains 1 / fast >= 3",
            "lucidrains 2 / fast >= 3",
            "lucidrains 1 / plain",
            "fast / fast at start",
            "single lucidrains 1 / single fast >= 3",
            "single lucidrains 2 / single fast >= 3",
            "single lucidrains 1 / single plain",
            "single fast / single fast at start",
        ],
        "public": True,
    },
    {
        "name": "cups",
        "compares": "accuracy over all positions of games of 32 swaps of 5 cups, after the same lessons of growing length (the vanilla model's "
        "learning rates times 0.3, which suits it better): d_model 64, 4 heads, d_ff 256, batch 128",
        "sides": lambda: [follow_the_ball],
        "reach": ["one feedback layer >= 0.9", "four vanilla layers <= 0.6"],
        "rounds": 1,
    },
    {
        "name": "notebook-03",
        "compares": "the notebook from top to bottom: minutes, and the peak of the resident memory of its kernel and what that starts",
        "sides": lambda: [lambda: notebook("03_feedback_transformer")],
        "reach": ["minutes <= 6", "GiB <= 2"],
        "rounds": 1,
    },
    {
        "name": "notebook-a",
        "compares": "the appendix from top to bottom: minutes, and the peak of the resident memory of its kernel and what that starts",
        "sides": lambda: [lambda: notebook("a_feedback_by_hand")],
        "reach": ["minutes <= 2", "GiB <= 2"],
        "rounds": 1,
    },
]
