"""What works of torch.compile and torch.export, model by model, as JSON lines:

    python tests/compiled.py BACKEND [ROW ...]

Each cell is tried in a process of its own, since one that fails may leave PyTorch unfit
for the next. test_compile.py compares the lines with the table of the book's page on
scale.
"""

import json
import os
import sys

import torch
import torch._inductor.config
from torch import nn

from memtx_minimal.compressive_transformer import CompressiveTransformer
from memtx_minimal.feedback_transformer import FeedbackTransformer
from memtx_minimal.memory_today import MemoryToday
from memtx_minimal.reformer import Reformer
from memtx_minimal.training import cross_entropy
from memtx_minimal.transformer_xl import TransformerXL
from memtx_minimal.vanilla_transformer import VanillaTransformer

SMALL = dict(vocab_size=11, d_model=8, n_heads=2, n_layers=2, d_ff=16)
T, M = 3, 4  # tokens in a segment, slots in memory
ROWS = {  # as in the page's table
    "Vanilla": lambda: VanillaTransformer(**SMALL, max_len=T),
    "Transformer-XL": lambda: TransformerXL(**SMALL, mem_len=M),
    "Compressive Transformer": lambda: CompressiveTransformer(
        **SMALL, mem_len=M, compressed_len=2, compression_rate=2
    ),
    "Feedback Transformer": lambda: FeedbackTransformer(**SMALL, mem_len=M),
    "Reformer, `reversible=False`": lambda: Reformer(
        **SMALL, chunk_len=1, axial_shape=(1, 3), reversible=False
    ),
    "Reformer": lambda: Reformer(**SMALL, chunk_len=1, axial_shape=(1, 3)),
    "Memory today, `cache`": lambda: MemoryToday(
        **SMALL, mem_len=M, n_sinks=1, n_used=1
    ),
    "Memory today, `pooled`": lambda: MemoryToday(
        **SMALL, kind="pooled", mem_len=2, compressed_len=2, compression_rate=2, top_k=1
    ),
    "Memory today, `delta`": lambda: MemoryToday(**SMALL, kind="delta", n_loops=2),
}


def made(row):
    torch.manual_seed(0)
    return ROWS[row]()


def segments():
    """Two of them, (B, T) each, and what comes next in both."""
    text = torch.randint(11, (2, 2 * T + 1), generator=torch.Generator().manual_seed(1))
    return [(text[:, t : t + T], text[:, t + 1 : t + T + 1]) for t in (0, T)]


@torch.no_grad()
def logits(model, memory=None):
    """Of both segments, the memory of the first going on to the second."""
    out = []
    for tokens, _ in segments():
        new, memory, *_ = model(tokens, memory)
        out.append(new)
    return out


def gradients(model, parameters):
    """Of both segments; the random numbers are the same for whoever asks."""
    torch.manual_seed(2)
    memory = None
    for tokens, targets in segments():
        new, memory, *aux = model(tokens, memory)
        sum(aux, cross_entropy(new, targets)).backward()
    gradients = [p.grad for p in parameters]
    for p in parameters:
        p.grad = None
    return gradients


def evaluation(row, backend, whole=False):
    model = made(row).eval()
    return logits(model), logits(torch.compile(model, backend=backend, fullgraph=whole))


def training(row, backend, whole=False):
    model = made(row).train()
    parameters = list(model.parameters())
    graph = torch.compile(model, backend=backend, fullgraph=whole)
    return gradients(model, parameters), gradients(graph, parameters)


@torch.no_grad()
def export(row, *_):
    model, memory, out = made(row).eval(), None, []
    for tokens, _ in segments():
        graph = torch.export.export(model, (tokens, memory), strict=False).module()
        out.append(graph(tokens, memory)[0])
        _, memory, *_ = model(tokens, memory)
    return logits(model), out


def one_graph(row, backend):
    pairs = [work(row, backend, whole=True) for work in (evaluation, training)]
    return [sum(side, []) for side in zip(*pairs)]


CELLS = {  # as in the table's head
    "evaluation": evaluation, "training": training, "one graph": one_graph,
    "export": export,
}  # fmt: skip


def fault(row, cell, backend):
    """Why a cell does not work; None if it does."""
    try:
        torch.testing.assert_close(*CELLS[cell](row, backend))
    except Exception as error:  # noqa: BLE001
        return f"{type(error).__name__}: {error}"[:5_000]
    return None


def apart(*cell):
    """The same, in another process."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(write, json.dumps(fault(*cell)).encode())
        os._exit(0)
    os.close(write)
    with open(read, encoding="utf-8") as answer:
        said = answer.read()
    os.waitpid(child, 0)
    return json.loads(said) if said else "the process died"


def main(backend, *rows):
    torch.set_num_threads(1)
    torch._inductor.config.fallback_random = True  # the random numbers that eager draws
    warm = nn.Linear(1, 1)  # what PyTorch loads at the first try, it loads once for all
    torch.compile(warm, backend=backend)(torch.ones(1, 1)).sum().backward()
    torch.export.export(warm, (torch.ones(1, 1),), strict=False)
    for row in rows or ROWS:
        faults = dict.fromkeys(CELLS)
        for cell in reversed(CELLS):
            if cell in ("one graph", "export") or faults["one graph"]:  # else: it does
                faults[cell] = apart(row, cell, backend)
        print(json.dumps({"row": row, "faults": faults}), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
