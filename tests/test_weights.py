"""The trained weights that come with the package are what their JSON says they are."""

import json
import os
import subprocess
import sys
import warnings
import zipfile
from pathlib import Path

import pytest
import torch
import weights

import memtx_minimal
from memtx_minimal import checkpoints, corpora, training

NAMES = list(checkpoints.MODELS)
FOLDER = checkpoints.WEIGHTS
INFOS = {name: checkpoints.read(FOLDER / name)[0] for name in NAMES}

each = pytest.mark.parametrize("name", NAMES)


def test_all_models_and_no_other_file():
    there = sorted(path.name for path in FOLDER.iterdir())
    assert there == sorted(f"{n}.{end}" for n in NAMES for end in ("json", "safetensors"))


@pytest.fixture(scope="module")
def valid():
    """The validation text of Tiny Shakespeare; skipped where it cannot be had."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", corpora.SyntheticTextWarning)
        corpus = corpora.tiny_shakespeare()
    if corpus.name != "Tiny Shakespeare":
        pytest.skip("Tiny Shakespeare is not here")
    assert all(info["corpus"]["sha256"] == corpus.digest for info in INFOS.values())
    return corpus.valid


@each
def test_the_recorded_loss_is_found_again(name, valid):
    """On the whole validation text, memory going along from its start to its end."""
    torch.manual_seed(0)  # of the Reformer's rotations, which move its last digit
    model, _ = memtx_minimal.load(name)
    lanes = {key: INFOS[name]["settings"][key] for key in ("batch_size", "segment_len")}
    (step, nats), *more = INFOS[name]["valid"]
    assert step == INFOS[name]["steps_done"] == INFOS[name]["steps"] and not more
    assert abs(training.evaluate(model, valid, **lanes) - nats) < 2e-3


def test_transformer_xl_reaches_its_loss():
    assert INFOS["transformer_xl"]["valid"][-1][1] <= 1.55


def test_equal_numbers_of_parameters():
    sizes = [weights.facts(name)["parameters"] for name in NAMES]
    assert max(sizes) <= 1.05 * min(sizes)


@each
def test_small_files_made_within_minutes(name):
    assert (FOLDER / f"{name}.safetensors").stat().st_size <= 4_000_000
    assert INFOS[name]["cpu_seconds"] <= 20 * 60 and INFOS[name]["threads"] <= 2


@each
def test_the_command_is_the_one_that_is_listed(name):
    assert INFOS[name]["command"] == weights.command(name)


@each
def test_settings_were_chosen_on_training_text(name):
    """The loss of the part held out was noted on the way, the validation text's once;
    those that read little had no dropout, as the page says."""
    info = INFOS[name]
    parts, noted = info["characters"], [step for step, _ in info["held_out"]]
    assert parts["held_out"] == round(0.05 * (parts["held_out"] + parts["train"]))
    assert len(noted) > 1 and noted[-1] == info["steps"] and len(info["valid"]) == 1
    passes = weights.facts(name)["read"] / parts["train"]
    assert info["sizes"]["dropout"] == (0.1 if passes > 3 else 0)


def test_the_page_is_written_from_the_files():
    """If this fails, run: python book/weights.py --page"""
    assert weights.PAGE.read_text(encoding="utf-8") == weights.page()


@each
def test_load_needs_no_text_and_no_network(name, tmp_path):
    """In a process of its own, with nowhere to find the text, and no socket."""
    code = f"""
import socket, sys, time
def refused(*args, **kw): raise AssertionError("no network is needed")
socket.socket.connect = socket.getaddrinfo = refused
import memtx_minimal
assert "torch" not in sys.modules
from memtx_minimal import checkpoints
start = time.perf_counter()
model, vocab = memtx_minimal.load({name!r})
seconds = time.perf_counter() - start
assert type(model) is checkpoints.MODELS[{name!r}] and not model.training
assert {{p.device.type for p in model.parameters()}} == {{"cpu"}}
text = "ROMEO:\\n"
assert vocab.decode(vocab.encode(text)) == text and len(vocab) == 65
logits, *_ = model(vocab.encode(text)[None])
assert logits.shape == (1, len(text), 65)
print(seconds)
"""
    away = {"MEMTX_CACHE_DIR": str(tmp_path), "OMP_NUM_THREADS": "1"}
    environment = {k: v for k, v in os.environ.items() if k != "MEMTX_DATA_DIR"} | away
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, encoding="utf-8"
    )
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 1 and not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["transformerxl", "xl", "./transformer_xl"])
def test_an_unknown_name_lists_the_valid_ones(name, tmp_path, monkeypatch):
    """A path is a path: the name of a model with a folder before it is not the model."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=", ".join(NAMES)):
        memtx_minimal.load(name)


def test_the_wheel_holds_them(tmp_path):
    code = f"from flit_core.buildapi import build_wheel; build_wheel({str(tmp_path)!r})"
    subprocess.run([sys.executable, "-c", code], cwd=weights.sync.ROOT, check=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as files:
        for path in FOLDER.iterdir():
            packed = files.read(f"memtx_minimal/weights/{path.name}")
            assert packed == Path(path).read_bytes()


def test_make_lists_the_commands(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["weights.py"])
    weights.main()
    lines = capsys.readouterr().out.splitlines()
    assert lines == [json.loads((FOLDER / f"{n}.json").read_text(encoding="utf-8"))["command"] for n in NAMES]
