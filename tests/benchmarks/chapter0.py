"""Chapter 0 and the engine room: what checks cost, what a checkpointed training costs, what an import costs."""

import subprocess
import sys
import tempfile
import time
from pathlib import Path

import sides
import torch

MODELS = {
    "vanilla": ("vanilla_transformer", {"max_len": sides.T}),
    "xl": ("transformer_xl", {"mem_len": sides.T}),
}


def checks():
    """Microseconds of a training step, and of all that a model checks in one."""
    from memtx_minimal import checkpoints, inputs  # rows on public packages lack pooch

    name, own = MODELS["xl"]
    model = checkpoints.MODELS[name](sides.VOCAB, **sides.SIZE | own)
    step = sides.training("step", model)
    tokens = torch.randint(sides.VOCAB, (sides.BATCH, sides.T))
    with torch.no_grad():
        _, memory = model(tokens)
    empty = [m[:, :0] for m in memory]

    def checking():
        start = time.perf_counter()
        for _ in range(1000):
            inputs.check_sizes({"mem_len": 64, "clamp_len": None})
            inputs.check_tokens(tokens, sides.VOCAB)
            inputs.checked_memory(memory, empty)
            for _ in range(sides.SIZE["n_layers"]):
                inputs.check_added("mask", model.head.bias)
        seconds = (time.perf_counter() - start) / 1000
        return {"checks": seconds * 1e6 / (sides.BATCH * sides.T)}

    return [lambda: {"step": step()["step"]}, checking]


STEPS = 200
SIZES = sides.SIZE | {"mem_len": sides.T, "dropout": 0.1}


def long_training():
    """Seconds of a training by pretrain, checkpoints included, and by train."""
    from memtx_minimal import checkpoints, corpora, pretrain, training

    corpus = corpora.synthetic_play(200_000)
    run = {"steps": STEPS, "batch_size": sides.BATCH, "segment_len": sides.T}

    def by_pretrain():
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "a"
            start = time.perf_counter()
            pretrain.pretrain("transformer_xl", corpus, out, sizes=SIZES, **run)
            return {"pretrain": time.perf_counter() - start}

    def by_train():
        torch.manual_seed(0)
        model = checkpoints.MODELS["transformer_xl"](len(corpus.vocab), **SIZES)
        start = time.perf_counter()
        training.train(model, corpus.train, valid=corpus.valid, **run)
        return {"train": time.perf_counter() - start}

    return [by_pretrain, by_train]


def imports():
    """Seconds until a fresh Python has imported the package, and all of its modules."""

    def side(name, code):
        start = time.perf_counter()
        subprocess.run([sys.executable, "-c", code], check=True)
        return {name: time.perf_counter() - start}

    every = "from memtx_minimal import pretrain, figures, measure, tasks"
    return [
        lambda: side("package", "import memtx_minimal"),
        lambda: side("everything", every),
    ]


ROWS = [
    {
        "name": "checks",
        "compares": f"what a TransformerXL checks in a step, and the step: {sides.STEP}",
        "sides": checks,
        "reach": ["checks / step <= 0.01"],
    },
    {
        "name": "pretrain",
        "compares": f"{STEPS} steps of a TransformerXL with dropout by pretrain, its "
        "checkpoints and validation included, and by train with validation; seconds",
        "sides": long_training,
        "reach": ["pretrain / train <= 1.03"],
    },
    {
        "name": "import",
        "compares": "a fresh Python that imports the package alone, or every module; seconds",
        "sides": imports,
        "reach": ["package <= 3", "everything"],
    },
    {
        "name": "notebook-00",
        "compares": "the notebook from top to bottom: minutes, and the peak of the resident "
        "memory of its kernel and what that starts",
        "sides": lambda: [lambda: sides.notebook("00_attention")],
        "reach": ["minutes <= 2", "GiB <= 1"],
        "rounds": 1,
    },
]
