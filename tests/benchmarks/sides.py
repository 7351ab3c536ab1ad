"""What the rows of several chapters share: sizes, a training step by phase, a notebook from top to bottom."""

import sys
import time
from contextlib import suppress
from pathlib import Path
from threading import Event, Thread

import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOKS, BOOK = ROOT / "notebooks", ROOT / "book"
VOCAB = 65
SIZE = {"d_model": 128, "n_heads": 4, "n_layers": 4, "d_ff": 512}
T = 64
BATCH = 16
STEP = "a training step (forward, backward, AdamW; no clipping), d_model 128, 4 heads, 4 layers, d_ff 512, T 64, batch 16, float32, in microseconds per token"


def training(name, model, batch_first=True, steps=10, batch_size=BATCH, T=T, warmup=6):
    """One side: microseconds per token of a training step, auxiliary losses included, in all and by phase, over the given number of steps."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4)
    stream = torch.randint(VOCAB, (steps, batch_size, T + 1), generator=torch.Generator().manual_seed(0))
    if not batch_first:
        stream = stream.transpose(1, 2).contiguous()
    time_dim = 1 if batch_first else 0
    memory = None

    def step(segment):
        nonlocal memory
        tokens, targets = segment.narrow(time_dim, 0, T), segment.narrow(time_dim, 1, T)
        marks = [time.perf_counter()]
        logits, memory, *aux = model(tokens, memory)
        loss = sum(aux, F.cross_entropy(logits.flatten(0, 1), targets.flatten()))
        marks.append(time.perf_counter())
        optimizer.zero_grad()
        loss.backward()
        marks.append(time.perf_counter())
        optimizer.step()
        return torch.tensor(marks + [time.perf_counter()], dtype=torch.float64).diff()

    def work():
        forward, backward, update = (sum(map(step, stream)) / (steps * batch_size * T) * 1e6).tolist()
        return {name: forward + backward + update, f"{name} forward": forward, f"{name} backward": backward, f"{name} AdamW": update}

    for segment in stream[:warmup]:  # and fill the memory
        step(segment)
    return work


def watch(stop, totals):
    """The bytes that the processes started here hold together, every twentieth of a second until told to stop."""
    import psutil

    while not stop.wait(0.05):
        total = 0
        for process in psutil.Process().children(recursive=True):
            with suppress(psutil.Error):  # it may just have ended
                total += process.memory_info().rss
        totals.append(total)


def notebook(name):
    """Minutes to run a notebook, such as "01_transformer_xl", from top to bottom in a
    kernel of its own, and the most memory that the kernel held."""
    import nbformat
    from nbclient import NotebookClient

    sys.path.append(str(BOOK))
    from execute import ThisPython

    content = nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4)
    stop, totals = Event(), [0]
    watcher = Thread(target=watch, args=(stop, totals))
    watcher.start()
    start = time.perf_counter()
    try:
        NotebookClient(
            content,
            timeout=None,
            kernel_name="python3",
            kernel_manager_class=ThisPython,
            resources={"metadata": {"path": str(NOTEBOOKS)}},
        ).execute()
    finally:
        stop.set()
        watcher.join()
    return {"minutes": (time.perf_counter() - start) / 60, "GiB": max(totals) / 2**30}
