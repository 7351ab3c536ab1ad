"""Chapter 1, Transformer-XL: training, evaluation, a minute of learning, the notebook. See run.py for what a row is."""

import time

import torch
from sides import SIZE, STEP, VOCAB, T, notebook, training
from torch import nn

MEMORY = 64


# A training step.


class LabmlXL(nn.Module):
    """labml-nn's Transformer-XL with embedding, masks, memory and generator as in its own experiment; tokens (T, B) as its loader gives them."""

    def __init__(self, d_model, n_heads, n_layers, d_ff, mem_len):
        super().__init__()
        from labml import tracker

        tracker.debug = lambda *args: None  # labml-nn 0.5.1 calls it, the labml of today no longer has it
        from labml_nn.transformers.feed_forward import FeedForward
        from labml_nn.transformers.utils import subsequent_mask
        from labml_nn.transformers.xl import RelativeMultiHeadAttention, TransformerXL, TransformerXLLayer

        attention = RelativeMultiHeadAttention(n_heads, d_model, dropout_prob=0.0)
        layer = TransformerXLLayer(
            d_model=d_model, self_attn=attention, feed_forward=FeedForward(d_model, d_ff, dropout=0.0), dropout_prob=0.0
        )
        self.mem_len = mem_len
        self.embedding = nn.Embedding(VOCAB, d_model)
        self.transformer = TransformerXL(layer, n_layers)
        self.generator = nn.Linear(d_model, VOCAB)
        future = subsequent_mask(T)  # (T, T, 1)
        self.mask = torch.cat([future.new_ones(T, mem_len, 1), future], dim=1)  # (T, M + T, 1)

    def forward(self, tokens, memory):
        M = len(memory[0]) if memory else 0
        x, inputs = self.transformer(self.embedding(tokens), memory, self.mask[:, self.mem_len - M :])
        memory = [torch.cat(pair)[-self.mem_len :] for pair in zip(memory, inputs)] if memory else inputs
        return self.generator(x), memory


def our_training():
    from memtx_minimal.transformer_xl import TransformerXL

    return training("ours", TransformerXL(VOCAB, **SIZE, mem_len=MEMORY, dropout=0.0))


def against_labml():
    return [our_training(), training("labml", LabmlXL(**SIZE, mem_len=MEMORY), batch_first=False)]


def against_vanilla():
    from memtx_minimal.vanilla_transformer import VanillaTransformer

    return [our_training(), training("vanilla", VanillaTransformer(VOCAB, **SIZE, max_len=T, dropout=0.0))]


# Evaluation: cached segments against a sliding window.

# Scores of a segment are hundreds of megabytes. By default each such tensor is new memory from the system, page by page, and goes back
# when it is freed, which costs more than the softmax. Here glibc keeps what is freed, for both sides, as the allocator on a GPU does.
KEEP_FREED_MEMORY = {"GLIBC_TUNABLES": "glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=100000000000"}

WIDE = {"d_model": 4096, "n_heads": 16, "n_layers": 1, "d_ff": 16384}  # one layer as wide as GPT-J's


def seconds(work):
    start = time.perf_counter()
    with torch.inference_mode():
        work()
    return time.perf_counter() - start


def predicting(prefix, size, segment_lens):
    """Sides for each attention length L: ms per predicted token, which attends to exactly L tokens on both sides."""
    from memtx_minimal.transformer_xl import TransformerXL
    from memtx_minimal.vanilla_transformer import VanillaTransformer

    vanilla = VanillaTransformer(VOCAB, **size, max_len=max(segment_lens)).eval()
    xl = TransformerXL(VOCAB, **size, same_length=True).eval()

    def sliding_window(L):
        window = torch.randint(VOCAB, (1, L))  # read anew for every predicted token
        return lambda: {f"{prefix}vanilla {L}": seconds(lambda: vanilla(window)) * 1e3}

    def cached_segments(L, T):
        segment, memory = torch.randint(VOCAB, (1, T)), None

        def read():
            nonlocal memory
            xl.mem_len = L
            memory = xl(segment, memory)[1]

        for _ in range(-(-L // T)):
            seconds(read)  # until the memory is full
        return lambda: {f"{prefix}xl {L}": seconds(read) / T * 1e3}

    return [side for L, T in segment_lens.items() for side in (sliding_window(L), cached_segments(L, T))]


def evaluation():
    return predicting("", WIDE, {800: 512, 3800: 2048}) + predicting("small ", SIZE, {800: 256, 3800: 256})


# A minute of training.

LEARNER = {"d_model": 96, "n_heads": 4, "n_layers": 3, "d_ff": 384, "mem_len": 32}
LESSONS = {"batch_size": 32, "segment_len": 32, "lr": 3e-3}


def learn():
    """Validation loss after a minute of the package's own loop; beforehand, the number of steps is fitted to the machine."""
    from memtx_minimal.corpora import tiny_shakespeare
    from memtx_minimal.training import evaluate, train
    from memtx_minimal.transformer_xl import TransformerXL

    corpus = tiny_shakespeare()
    if corpus.name != "Tiny Shakespeare":
        raise FileNotFoundError("Tiny Shakespeare is not here: set MEMTX_DATA_DIR to the folder that holds it")

    def timed(steps):
        model = TransformerXL(len(corpus.vocab), **LEARNER)
        start = time.perf_counter()
        train(model, corpus.train, steps=steps, progress=False, **LESSONS)
        return time.perf_counter() - start, model

    timed(10)
    elapsed, model = timed(int(55 / timed(60)[0] * 60))
    return {"nats": evaluate(model, corpus.valid, segment_len=LESSONS["segment_len"]), "seconds": elapsed}


ROWS = [
    {
        "name": "xl-train-labml",
        "compares": f"{STEP}: TransformerXL and labml-nn 0.5.1's Transformer-XL, both with a full memory of 64; "
        "labml-nn's learned tables of 8192 positions are part of its step, as in its own experiment",
        "sides": against_labml,
        "reach": ["labml / ours >= 1.8"],
        "public": True,
    },
    {
        "name": "xl-train-vanilla",
        "compares": f"{STEP}: TransformerXL with a full memory of 64 and VanillaTransformer, which has none",
        "sides": against_vanilla,
        "reach": ["ours / vanilla <= 1.5"],
    },
    {
        "name": "xl-eval",
        "compares": "milliseconds per predicted token at attention length L, batch 1, float32, untrained. VanillaTransformer reads a window of L "
        "tokens for each predicted one; TransformerXL (same_length, memory full at L) reads segments, of 512 tokens at L 800, 2048 at L 3800. "
        "d_model 4096, 16 heads, 1 layer, d_ff 16384; small: d_model 128, 4 heads, 4 layers, d_ff 512, segments of 256. Both sides run in a "
        "process that keeps freed memory (glibc) for its next tensor",
        "sides": evaluation,
        "environment": KEEP_FREED_MEMORY,
        "reach": [
            "vanilla 800 / xl 800 >= 363",
            "vanilla 3800 / xl 3800 >= 1874",
            "small vanilla 800 / small xl 800",
            "small vanilla 3800 / small xl 3800",
        ],
        "rounds": 3,
    },
    {
        "name": "minute",
        "compares": "validation loss in nats per character after a minute of memtx_minimal.training.train on Tiny Shakespeare, as many steps as fit; "
        "d_model 96, 4 heads, 3 layers, d_ff 384, T 32, memory 32, batch 32",
        "sides": lambda: [learn],
        "reach": ["nats <= 1.65", "seconds <= 60"],
        "rounds": 1,
    },
    {
        "name": "notebook-01",
        "compares": "the notebook from top to bottom: minutes, and the peak of the resident memory of its kernel and what that starts",
        "sides": lambda: [lambda: notebook("01_transformer_xl")],
        "reach": ["minutes <= 6", "GiB <= 2"],
        "rounds": 1,
    },
]
