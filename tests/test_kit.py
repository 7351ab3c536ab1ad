"""The kit for a room without a network: one folder, and nothing of this machine in it."""

import shutil
import subprocess

import kit
import pytest
import sync

from memtx_minimal import corpora

committed = subprocess.run(["git", "rev-parse", "HEAD"], cwd=sync.ROOT, capture_output=True).returncode == 0
data = pytest.mark.skipif(not committed, reason="not in a clone")


@pytest.fixture
def asked(monkeypatch, tmp_path):
    """What would be run, and a text that is not checked."""
    commands = []
    monkeypatch.setattr(kit.handouts, "write", lambda folder: folder.mkdir())
    monkeypatch.setattr(corpora, "tiny_shakespeare", lambda: None)
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / corpora.FILE_NAME).write_text("To be", "utf-8")
    monkeypatch.setenv("MEMTX_DATA_DIR", str(tmp_path / "text"))
    run = subprocess.run

    def only_git(command, **how):
        commands.append([str(word) for word in command])
        return run(command, **how) if command[0] == "git" else None

    monkeypatch.setattr(kit.subprocess, "run", only_git)
    return commands


@data
def test_the_kit_has_all_that_the_room_needs(asked, monkeypatch, tmp_path):
    monkeypatch.setattr(kit.sys, "platform", "linux")
    kit.make(tmp_path / "kit")
    found = {path.name for path in (tmp_path / "kit").iterdir()} - {"book", "weights"}
    assert found == {"memtx-minimal", "wheels", "data", "handouts", "start.sh"}
    assert (tmp_path / "kit" / "data" / corpora.FILE_NAME).read_text("utf-8") == "To be"
    clone = {path.name for path in (tmp_path / "kit" / "memtx-minimal").iterdir()}
    assert {"Makefile", "notebooks", "requirements.txt"} <= clone
    assert not {".git", ".venv"} & clone
    _, torch, rest = asked
    assert "--no-deps" in torch and kit.CPU in torch and any(w.startswith("torch==") for w in torch)
    assert "-r" in rest and rest[rest.index("--find-links") + 1] == str(tmp_path / "kit" / "wheels")


@data
def test_without_packages_nothing_is_fetched(asked, tmp_path):
    kit.make(tmp_path / "kit", packages=False)
    assert [command[0] for command in asked] == ["git"]


@pytest.mark.skipif(shutil.which("sh") is None, reason="no shell")
def test_the_start_points_pip_and_the_notebooks_at_the_folder(monkeypatch, tmp_path):
    for name in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS"):  # `make test` hands them on: the kit's make would greet
        monkeypatch.delenv(name, raising=False)
    folder = tmp_path / "kit"
    (folder / "memtx-minimal").mkdir(parents=True)
    (folder / "start.sh").write_text(kit.START, "utf-8")
    (folder / "memtx-minimal" / "Makefile").write_text(
        "lab site:\n\t@echo $@ $(PIP_NO_INDEX) $(PIP_FIND_LINKS) $(MEMTX_DATA_DIR)\n", "utf-8"
    )
    for words, target in ([], "lab"), (["site"], "site"):
        done = subprocess.run(["sh", folder / "start.sh", *words], capture_output=True, text=True, encoding="utf-8", check=True)
        assert done.stdout.split() == [target, "1", str(folder / "wheels"), str(folder / "data")]
