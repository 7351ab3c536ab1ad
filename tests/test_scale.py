"""Two processes of eight lanes train like one of sixteen. What they train is listed in
two_ranks.py, which one launch of two gloo processes runs."""

import os
import signal
import socket
import subprocess
import sys
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import two_ranks

from memtx_minimal import checkpoints, pretrain

ROOT = Path(__file__).resolve().parents[1]
SECONDS = 240  # for two processes to come up and end, on a busy machine
HIDDEN = "ACCELERATE_MIXED_PRECISION", "WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR"

needs_two = pytest.mark.skipif(
    find_spec("accelerate") is None or os.name == "nt",
    reason="several processes need accelerate, and were not tried on Windows",
)


@contextmanager
def launched(command, log):
    """A launcher with its processes, which must end well; what they print goes to a
    file."""
    environment = {name: v for name, v in os.environ.items() if name not in HIDDEN}
    environment |= {
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": str(ROOT),
        "PYTHONWARNINGS": "error",
    }
    with open(log, "wb") as out:
        process = subprocess.Popen(
            [sys.executable, "-m", *map(str, command)], env=environment, stdout=out,
            stderr=out, start_new_session=True,
        )  # fmt: skip
    try:
        yield
        process.wait(SECONDS)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    assert process.returncode == 0, log.read_text("utf-8", "replace")


@pytest.fixture(autouse=True)
def default_dtype():
    """two_ranks.train changes it."""
    dtype = torch.get_default_dtype()
    yield
    torch.set_default_dtype(dtype)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Where one process wrote, and where two did."""
    one, two = (tmp_path_factory.mktemp(name) for name in ("one", "two"))
    script = Path(two_ranks.__file__)
    command = "torch.distributed.run --standalone --nproc-per-node 2".split()
    dtype = torch.get_default_dtype()
    try:
        two_ranks.train("transformer_xl", two / "begun by one", stop_after=9)
        with launched([*command, script, two], two / "log"):
            for run in two_ranks.RUNS:
                two_ranks.train(run, one / run)
            two_ranks.train("transformer_xl", one / "stopped", stop_after=9)
    finally:
        torch.set_default_dtype(dtype)
    return one, two


def tensors(path):
    return checkpoints.read(path)[1]


def assert_close(a, b):
    assert a.keys() == b.keys()
    for name, tensor in a.items():
        torch.testing.assert_close(tensor, b[name], rtol=0, atol=1e-9, msg=name)


@needs_two
@pytest.mark.parametrize("run", [*two_ranks.MODELS, "accumulate"])
def test_two_ranks_train_like_one(run, folders):
    one, two = (checkpoints.read(folder / run) for folder in folders)
    assert_close(one[1], two[1])
    for history in ("loss", "aux", "valid"):
        a, b = (torch.tensor(info[history]) for info, _ in (one, two))
        assert torch.allclose(a, b, atol=2e-4)  # rounded to four places


@needs_two
def test_the_memories_of_all_ranks_stand_side_by_side_in_a_checkpoint(folders):
    one, two = (tensors(folders[0] / "stopped"), tensors(folders[1] / "stopped"))
    states = [all_numbers.pop("random.cpu") for all_numbers in (one, two)]
    assert [len(state) for state in states] == [1, 2]
    assert sum(name.startswith("memory.") for name in one) == 2
    assert_close(one, two)


@needs_two
def test_another_number_of_processes_goes_on(folders):
    """Begun by one and ended by two, and the other way round."""
    one, two = folders
    two_ranks.train("transformer_xl", two / "stopped")
    for path in (two / "begun by one", two / "stopped"):
        assert_close(tensors(path), tensors(one / "transformer_xl"))


@needs_two
def test_a_resumed_training_ends_with_the_same_weights(folders):
    """With dropout, so each rank has its own random numbers back."""
    parts, whole = (tensors(folders[1] / f"dropout{in_}") for in_ in (" in parts", ""))
    for name, tensor in whole.items():
        assert torch.equal(tensor, parts[name]), name


@needs_two
def test_bfloat16_trains_too(folders):
    one, two = (checkpoints.read(folder / "bfloat16") for folder in folders)
    assert all(tensor.isfinite().all() for tensor in two[1].values())
    assert one[0]["loss"] == pytest.approx(two[0]["loss"], abs=0.01)
    assert two[0]["loss"][-1] < two[0]["loss"][0] - 0.2
    assert two[0]["loss"] != checkpoints.read(folders[1] / "transformer_xl")[0]["loss"]


@needs_two
def test_the_clipping_bites(folders, monkeypatch):
    """Else the test above would not see it."""
    monkeypatch.setitem(two_ranks.RUN, "clip", 1e9)
    one, run = folders[0], "compressive_transformer"
    two_ranks.train(run, one / "unclipped")
    clipped, unclipped = tensors(one / run), tensors(one / "unclipped")
    for name in ("layers.0.attention.out.weight", "memories.0.compress.kernel.weight"):
        assert (clipped[name] - unclipped[name]).abs().max() > 1e-3, name


@needs_two
def test_the_command_line(tmp_path):
    """As the page on scale has it, but for a port of its own."""
    text, out = tmp_path / "text.txt", tmp_path / "xl"
    text.write_text(two_ranks.TEXT.text, encoding="utf-8")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = (
        f"accelerate.commands.launch --multi_gpu --num_processes 2 --main_process_port "
        f"{port} -m memtx_minimal.pretrain transformer_xl --steps 3 --batch-size 4 "
        "--segment-len 16 --d-model 16 --n-layers 1 --device cpu"
    ).split()
    with launched([*command, "--text", text, "--out", out], tmp_path / "log"):
        pass
    info, _ = checkpoints.read(out)
    assert info["steps_done"] == 3 and info["file"]["holds"] == "weights"
    said = (tmp_path / "log").read_text("utf-8")
    assert said.count("xl.safetensors: 3 steps, validation loss") == 1


# --------------------------------------------------------------------- what goes wrong


@needs_two
def test_a_launcher_that_starts_one_process_for_two(tmp_path, monkeypatch):
    """accelerate launch --cpu --num_processes 2: these variables, and one process."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    with pytest.raises(ValueError, match="--cpu starts one process.*pass --multi_gpu"):
        two_ranks.train("transformer_xl", tmp_path / "a")
    assert not list(tmp_path.iterdir())


def test_lanes_that_do_not_split(tmp_path, monkeypatch):
    monkeypatch.setattr(pretrain.Alone, "n_ranks", 3)
    with pytest.raises(ValueError, match="batch_size=16 lanes do not split .* 3 proc"):
        two_ranks.train("transformer_xl", tmp_path / "a")


def test_without_accelerate(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setitem(sys.modules, "accelerate", None)
    with pytest.raises(ValueError, match=r"pip install .memtx-minimal\[scale\]"):
        two_ranks.train("transformer_xl", tmp_path / "a")
