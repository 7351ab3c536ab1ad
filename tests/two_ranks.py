"""Trains all models in as many processes as start it: test_scale.py starts two, and
compares what they write with what one process makes of the same.

    torchrun --standalone --nproc-per-node 2 tests/two_ranks.py FOLDER
"""

import sys
from contextlib import suppress
from pathlib import Path

import torch

from memtx_minimal import corpora, pretrain

TEXT = corpora.synthetic_play(8_000)
WRAPS = corpora.Corpus.from_text("short", TEXT.text[:1_200])  # 9 segments: a step of
# two has the last and, with no memory, the first again
SMALL = dict(d_model=16, n_heads=2, n_layers=2, d_ff=32)
COMPRESSIVE = dict(mem_len=16, compressed_len=8)  # two segments compress nothing
RUN = dict(
    steps=20, batch_size=16, segment_len=8, warmup=3, clip=0.1, device="cpu",
    progress=False,
)  # fmt: skip
MODELS = {  # sizes of each
    "vanilla_transformer": {},
    "transformer_xl": dict(mem_len=12),
    "compressive_transformer": COMPRESSIVE,
    "feedback_transformer": dict(mem_len=12),
    "reformer": dict(chunk_len=2, axial_shape=(2, 4)),
}
RUNS = {  # name of the checkpoint -> model, text, sizes, other arguments
    **{name: (name, TEXT, sizes, {}) for name, sizes in MODELS.items()},
    "accumulate": (
        "compressive_transformer", WRAPS, COMPRESSIVE, dict(accumulate=2)
    ),
    "bfloat16": ("transformer_xl", TEXT, dict(mem_len=12), dict(bf16=True)),
    "dropout": (
        "compressive_transformer", TEXT, COMPRESSIVE | dict(dropout=0.1), {}
    ),
}  # fmt: skip


def train(run, out, stop_after=None):
    """One of RUNS, up to its end or to a step. In float64, so that rounding is no
    excuse, but where autocast makes bfloat16 of float32."""
    name, text, sizes, settings = RUNS[run]
    torch.set_default_dtype(torch.float32 if "bf16" in settings else torch.float64)
    asked = []
    stop = lambda: asked.append(None) or len(asked) == stop_after  # noqa: E731
    kw = RUN | settings | dict(sizes=SMALL | sizes, stop=stop)
    with suppress(KeyboardInterrupt):  # so ends a training that is told to stop
        pretrain.pretrain(name, text, out, **kw)


def main(folder):
    torch.set_num_threads(1)
    for run in RUNS:
        train(run, folder / run)
    for stop_after in (1, 8, None):
        train("dropout", folder / "dropout in parts", stop_after)
    train("transformer_xl", folder / "begun by one")
    train("transformer_xl", folder / "stopped", stop_after=9)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
