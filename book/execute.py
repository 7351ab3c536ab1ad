"""Run notebooks from top to bottom, with progress.

As a script (`make refresh`): keep the outputs in the committed files.
"""

import sys
import tempfile
import threading
import time

import nbformat
import sync
from jupyter_client import AsyncKernelManager
from jupyter_client.kernelspec import KernelSpecManager
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from traitlets import default


class ThisPython(AsyncKernelManager):
    """Starts kernels in the interpreter that runs this, not in whatever is installed on
    the machine as "python3"."""

    @default("kernel_spec_manager")
    def no_installed_kernels(self):
        return KernelSpecManager(kernel_dirs=[])


class Progress:
    """One line that says where the run is: redrawn each second on a terminal, printed once a cell elsewhere."""

    def __init__(self, label, n_cells):
        self.label, self.n_cells, self.start = label, n_cells, time.monotonic()
        self.cell, self.terminal, self.done = 0, sys.stdout.isatty(), threading.Event()

    def show(self):
        minutes, seconds = divmod(int(time.monotonic() - self.start), 60)
        line = f"{self.label}  cell {self.cell} of {self.n_cells}  {minutes}:{seconds:02}"
        print(f"\r{line}\033[K" if self.terminal else line, end="" if self.terminal else "\n", flush=True)

    def on_cell(self, **_):
        self.cell += 1
        self.show()

    def tick(self):
        while self.terminal and not self.done.wait(1):
            self.show()

    def __enter__(self):
        threading.Thread(target=self.tick, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.done.set()
        if self.terminal:
            print()


def execute(nb, folder, label):
    """Run a notebook in place, in a fresh kernel that works in `folder`.

    The outputs carry nothing of the machine or the hour."""
    n_code = sum(cell.cell_type == "code" and cell.source.strip() != "" for cell in nb.cells)
    with (
        Progress(label, n_code) as progress,
        tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as empty,
    ):
        client = NotebookClient(
            nb,
            timeout=None,
            kernel_name="python3",  # whatever the notebook asks for
            kernel_manager_class=ThisPython,
            extra_arguments=[
                "--log-level=ERROR",
                f"--ipython-dir={empty}",  # no start-up files of whoever runs this
                "--IPKernelApp.exec_PYTHONSTARTUP=False",
            ],
            record_timing=False,
            coalesce_streams=True,
            resources={"metadata": {"path": str(folder)}},
            on_cell_execute=progress.on_cell,
        )
        try:
            client.execute()
        except CellExecutionError as error:
            sys.exit(f"\n{label}, code cell [{progress.cell}] failed:\n\n{error}")
    nb.metadata.pop("widgets", None)
    nb.metadata.language_info = {"name": "python"}
    for cell in nb.cells:
        if cell.cell_type == "code":
            cell.outputs = [tidy(out) for out in cell.outputs if tidy(out)]


def tidy(out):
    """An output as a terminal would leave it: of each line, what was printed last; None if that is nothing."""
    if out.output_type == "stream":
        lines = [line.rstrip("\r").rsplit("\r", 1)[-1].rstrip() for line in out.text.split("\n")]
        out.text = "\n".join(lines)
        return out if out.text.strip() else None
    return out


def refresh(path, label):
    """Run one committed notebook and keep its outputs. Prose may be edited meanwhile; if code was, the outputs are not kept."""
    ran = nbformat.read(path, as_version=4)
    execute(ran, path.parent, label)
    sync.sync()  # what was edited while it ran
    now = nbformat.read(path, as_version=4)
    kept, run = ([c for c in nb.cells if c.cell_type == "code"] for nb in (now, ran))
    if [c.source for c in kept] != [c.source for c in run]:
        sys.exit(f"{path.name}: code was edited while it ran, so nothing is kept; run it again")
    for mine, new in zip(kept, run):
        mine.outputs, mine.execution_count = new.outputs, new.execution_count
    now.metadata.language_info = ran.metadata.language_info
    sync.write(path, nbformat.writes(now) + "\n")


def main():
    sync.escape_unprintable()
    _, broken = sync.sync()
    if broken:
        sys.exit("\n".join(broken))
    # All notebooks, or those of these: 03, a, 03_feed, reformer, solutions, solutions/03
    words = sys.argv[1:]
    names = [
        name
        for name in sync.notebooks() + sync.solutions()
        if not words or any(name.startswith(w) or w in name.split("_") for w in words)
    ]
    for i, name in enumerate(names, 1):
        path = sync.ROOT / "notebooks" / f"{name}.ipynb"
        refresh(path, f"notebook {i} of {len(names)}  {name}")
    drift, broken = sync.sync()
    for line in [*drift, *broken]:
        print(line)
    sys.exit(bool(broken))


if __name__ == "__main__":
    main()
