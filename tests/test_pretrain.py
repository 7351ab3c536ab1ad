"""A training that is stopped, killed or short of disk goes on as if nothing had been."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from test_models import SMALL

import memtx_minimal
from memtx_minimal import checkpoints, corpora, pretrain, training

TEXT = corpora.synthetic_play(20_000)
TINY = {name: size for name, size in SMALL.items() if name != "vocab_size"}
RUN = dict(steps=12, batch_size=4, segment_len=16, warmup=3, progress=False)
OWN = {
    "transformer_xl": dict(mem_len=20),
    "compressive_transformer": dict(mem_len=8, compressed_len=8),
    "feedback_transformer": dict(mem_len=20),
    "reformer": dict(chunk_len=4, axial_shape=(4, 8)),
}


def sizes(name, dropout=0.1):
    return TINY | OWN.get(name, {}) | dict(dropout=dropout)


def weights(path):
    return checkpoints.load(path)[0].state_dict()


def assert_same(a, b):
    assert a.keys() == b.keys()
    for name, tensor in a.items():
        assert torch.equal(tensor, b[name]), name


def after(n):
    """Says stop after n steps."""
    asked = []
    return lambda: asked.append(None) or len(asked) == n


@pytest.mark.parametrize("name", checkpoints.MODELS)
def test_a_resumed_training_ends_with_the_same_weights(name, tmp_path):
    """Bit by bit, with dropout, memory, rotations, and a wrap of the text in between."""
    short = corpora.Corpus.from_text("short", TEXT.text[:800])
    kw = RUN | dict(sizes=sizes(name))
    whole = pretrain.pretrain(name, short, tmp_path / "whole", **kw)
    for stop in (after(3), after(5)):
        with pytest.raises(KeyboardInterrupt):
            pretrain.pretrain(name, short, tmp_path / "parts", stop=stop, **kw)
        torch.manual_seed(99)  # whatever happens in between
    parts = pretrain.pretrain(name, short, tmp_path / "parts", **kw)
    assert_same(weights(tmp_path / "whole"), weights(tmp_path / "parts"))
    assert parts["loss"] == whole["loss"] and parts["aux"] == whole["aux"]
    assert parts["valid"] == whole["valid"]


@pytest.mark.parametrize("name", checkpoints.MODELS)
def test_it_trains_as_train_does(name, tmp_path):
    torch.manual_seed(0)
    kw = sizes(name, dropout=0.0) | (
        dict(max_len=16) if name.startswith("vanilla") else {}
    )
    model = checkpoints.MODELS[name](len(TEXT.vocab), **kw)
    expected = training.train(model, TEXT.train, **RUN)
    info = pretrain.pretrain(name, TEXT, tmp_path / "a", sizes=sizes(name, 0.0), **RUN)
    assert info["loss"] == [round(loss, 4) for loss in expected["loss"]]
    assert_same(weights(tmp_path / "a"), model.state_dict())


def test_accumulated_segments_are_one_step(tmp_path):
    """Two segments in an update: half as many steps read the same text, memory going on."""
    kw = dict(sizes=sizes("transformer_xl", 0.0))
    info = pretrain.pretrain(
        "transformer_xl", TEXT, tmp_path / "a", accumulate=2, **RUN, **kw
    )
    torch.manual_seed(0)
    model = checkpoints.build(info)
    optimizer, memory = training.adamw(model, 3e-3, 0.01), None
    batches = training.endless(TEXT.train, 4, 16)
    for step in range(12):
        optimizer.zero_grad()
        for _ in range(2):
            text, targets, at_start = next(batches)
            logits, memory = model(text, None if at_start else memory)
            (training.cross_entropy(logits, targets) / 2).backward()
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * training.warmup_cosine(step, 12, 3)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    assert_same(weights(tmp_path / "a"), model.state_dict())


def test_minutes_become_steps(tmp_path, monkeypatch):
    """Each step takes a second by this clock: a minute is sixty of them."""
    clock = [0.0]

    def tick():
        clock[0] += 1.0  # asked twice a step, and once at the start
        return clock[0]

    monkeypatch.setattr(pretrain.time, "monotonic", tick)
    kw = RUN | dict(steps=None, minutes=1, warmup=30, sizes=sizes("transformer_xl"))
    info = pretrain.pretrain("transformer_xl", TEXT, tmp_path / "a", **kw)
    assert info["steps"] == info["steps_done"] == 60 and info["seconds"] == 60
    again = pretrain.pretrain("transformer_xl", TEXT, tmp_path / "b", **RUN | dict(
        steps=60, warmup=30, sizes=sizes("transformer_xl")))  # fmt: skip
    assert again["loss"] == info["loss"]  # as if the steps had been given


def test_a_checkpoint_at_least_once_a_minute(tmp_path, monkeypatch):
    clock, written = [0.0], []

    def tick():
        clock[0] += 5.0
        return clock[0]

    monkeypatch.setattr(pretrain.time, "monotonic", tick)
    write = checkpoints.write
    monkeypatch.setattr(
        checkpoints, "write", lambda *a: written.append(clock[0]) or write(*a)
    )
    pretrain.pretrain(
        "transformer_xl",
        TEXT,
        tmp_path / "a",
        **RUN | dict(steps=40),
        sizes=sizes("transformer_xl"),
    )
    assert len(written) > 5
    assert all(b - a <= 65 for a, b in zip(written, written[1:]))


# ------------------------------------------------------------------ kill -9, as it happens


def command(out, steps):
    return [
        sys.executable, "-c",
        "from memtx_minimal import pretrain; pretrain.SAVE_SECONDS = 0; pretrain.main()",
        "transformer_xl", "--out", str(out), "--steps", str(steps), "--text", str(out) + ".txt",
        "--threads", "1", "--batch-size", "4", "--segment-len", "16", "--d-model", "16",
        "--n-heads", "2", "--n-layers", "2", "--d-ff", "32", "--dropout", "0.1", "--device", "cpu",
    ]  # fmt: skip


def test_killed_three_times(tmp_path):
    """kill -9, each time as soon as it has come further, at whatever it is doing then."""
    out, steps = tmp_path / "run", 400
    Path(str(out) + ".txt").write_text(TEXT.text, encoding="utf-8")
    done = 0
    for _ in range(3):
        process = subprocess.Popen(command(out, steps), stderr=subprocess.DEVNULL)
        deadline, target = time.monotonic() + 60, done + 20
        while done < target:
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.01)
            try:
                done = json.loads((tmp_path / "run.json").read_text("utf-8"))[
                    "steps_done"
                ]
            except FileNotFoundError:
                pass
        process.kill()
        process.wait()
        info, _ = checkpoints.read(out)  # whole, whenever it was killed
        assert target <= info["steps_done"] < steps
    subprocess.run(
        command(out, steps), check=True, stdout=subprocess.DEVNULL, timeout=120
    )
    info, _ = checkpoints.read(out)
    text = corpora.from_file(str(out) + ".txt")
    kw = dict(RUN, steps=steps, warmup=50, sizes=info["sizes"])
    pretrain.pretrain("transformer_xl", text, tmp_path / "whole", **kw)
    assert_same(weights(out), weights(tmp_path / "whole"))
    left = sorted(p.name for p in tmp_path.iterdir() if not p.name.endswith(".part"))
    assert left == [
        "run.json",
        "run.safetensors",
        "run.txt",
        "whole.json",
        "whole.safetensors",
    ]


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such signals")
def test_sigterm_saves_and_the_same_command_goes_on(tmp_path):
    out = tmp_path / "run"
    Path(str(out) + ".txt").write_text(TEXT.text, encoding="utf-8")
    long = [word if word != "300" else "100000" for word in command(out, 300)]
    process = subprocess.Popen(
        long, stderr=subprocess.PIPE, text=True, encoding="utf-8"
    )
    while not (tmp_path / "run.json").exists():
        time.sleep(0.01)
    process.terminate()
    assert "stopped; the same command goes on" in process.communicate(timeout=60)[1]
    assert process.returncode == 1 and checkpoints.read(out)[0]["steps_done"] >= 0


# ------------------------------------------------------------------ what goes wrong


@pytest.fixture
def saved(tmp_path):
    """A training stopped after five steps."""
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "run", stop=after(5))
    return tmp_path / "run"


def train(out, **kw):
    given = RUN | dict(sizes=sizes("transformer_xl")) | kw
    return pretrain.pretrain("transformer_xl", TEXT, out, **given)


def test_a_full_disk_leaves_the_last_good_checkpoint(saved, monkeypatch):
    before = {p.name: p.read_bytes() for p in saved.parent.iterdir()}

    def full(*_):
        raise OSError(28, "No space left on device")

    for broken in ("fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(checkpoints.os, broken, full)
            with pytest.raises(
                OSError, match="bytes cannot be written .No space left on device.*stays"
            ):
                train(saved, stop=after(2))
        assert {p.name: p.read_bytes() for p in saved.parent.iterdir()} == before
    assert train(saved)["steps_done"] == 12


def test_a_kill_between_the_two_files(saved, monkeypatch):
    """The numbers are written and the JSON is not: the old checkpoint is the one that counts."""
    replace = checkpoints.replace

    def killed(path, content):
        if path.suffix == ".json":
            raise SystemExit("killed")
        replace(path, content)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "replace", killed)
        with pytest.raises(SystemExit):
            train(saved, stop=after(2))
    assert checkpoints.read(saved)[0]["steps_done"] == 5
    train(saved)
    left = sorted(p.name for p in saved.parent.iterdir())
    assert left == ["run.json", "run.safetensors"]


@pytest.mark.parametrize(
    "damage, words",
    [
        (
            lambda content: content[:-1],
            "is damaged: it is not the file that was written",
        ),
        (
            lambda content: content[:500] + b"?" + content[501:],
            "is damaged: it is not the file",
        ),
        (lambda content: b"", "is damaged: it is not the file"),
    ],
)
def test_damaged_numbers(saved, damage, words):
    (path,) = saved.parent.glob("*.safetensors")
    path.write_bytes(damage(path.read_bytes()))
    for use in (memtx_minimal.load, train):
        with pytest.raises(ValueError, match=words):
            use(saved)


@pytest.mark.parametrize(
    "damage, words",
    [
        (lambda info: "", "run.json is damaged"),
        (lambda info: json.dumps(info)[:-9], "run.json is damaged"),
        (lambda info: "[]", "run.json is damaged"),
        (lambda info: json.dumps({**info, "format": 99}), "99|newer"),
        (
            lambda info: json.dumps({k: v for k, v in info.items() if k != "sizes"}),
            "'sizes'",
        ),
        (
            lambda info: json.dumps({**info, "model": "gpt"}),
            "model='gpt' is not one of 'vanilla",
        ),
        (
            lambda info: json.dumps({**info, "sizes": {"depth": 3}}),
            "does not fit this version.*depth",
        ),
        (
            lambda info: json.dumps({**info, "sizes": info["sizes"] | {"n_heads": 3}}),
            "multiple of n_heads",
        ),
        (
            lambda info: json.dumps({**info, "sizes": info["sizes"] | {"d_ff": 7}}),
            "weights do not fit",
        ),
        (lambda info: json.dumps({**info, "vocabulary": "abc"}), "weights do not fit"),
    ],
)
def test_a_description_that_does_not_fit(saved, damage, words):
    path = saved.with_name("run.json")
    path.write_text(damage(json.loads(path.read_text("utf-8"))), encoding="utf-8")
    with pytest.raises(ValueError, match=words):
        memtx_minimal.load(saved)


def test_what_is_not_there(saved, tmp_path):
    with pytest.raises(
        FileNotFoundError, match="no checkpoint .*other.json; checkpoints there: run"
    ):
        memtx_minimal.load(tmp_path / "other")
    with pytest.raises(FileNotFoundError, match="no checkpoint .*nowhere"):
        memtx_minimal.load(tmp_path / "nowhere" / "x")
    next(tmp_path.glob("*.safetensors")).unlink()
    with pytest.raises(FileNotFoundError, match="is missing: .*run.json names it"):
        memtx_minimal.load(saved)


@pytest.mark.parametrize(
    "kw, words",
    [
        (dict(steps=13), "another settings: {'steps': 12}, not {'steps': 13}"),
        (dict(lr=1e-3), "another settings: {'lr': 0.003}, not {'lr': 0.001}"),
        (dict(seed=1), "another seed: 0, not 1"),
        (
            dict(sizes=sizes("transformer_xl", 0.2)),
            "another sizes: {'dropout': 0.1}, not",
        ),
    ],
)
def test_going_on_with_other_settings_is_refused(saved, kw, words):
    with pytest.raises(ValueError, match=words):
        train(saved, **kw)


def test_going_on_with_another_text_is_refused(saved):
    other = corpora.Corpus.from_text(TEXT.name, TEXT.text[:-5])
    with pytest.raises(ValueError, match="another corpus: {'sha256'"):
        pretrain.pretrain(
            "transformer_xl", other, saved, **RUN, sizes=sizes("transformer_xl")
        )


@pytest.mark.parametrize(
    "kw, words",
    [
        (dict(steps=None), "give either steps or minutes"),
        (dict(minutes=1), "give either steps or minutes"),
        (dict(steps=None, minutes=0), "minutes=0 is not above 0"),
        (dict(batch_size=0), "batch_size=0 is not a whole number >= 1"),
        (dict(accumulate=0), "accumulate=0 is not a whole number >= 1"),
        (dict(seed=-1), "seed=-1 is not a whole number >= 0"),
        (dict(clip=0), "clip=0 is not above 0"),
        (dict(sizes=dict(depth=3)), "size='depth' is not one of 'd_model', 'n_heads'"),
    ],
)
def test_odd_settings(tmp_path, kw, words):
    with pytest.raises(ValueError, match=words):
        train(tmp_path / "run", **kw)
    assert not list(tmp_path.iterdir())


def test_an_ended_training_is_not_trained_again(saved):
    info = train(saved)
    assert train(saved) == info and info["file"]["holds"] == "weights"


# ------------------------------------------------------------------ load, and the command line


@pytest.mark.parametrize("name", checkpoints.MODELS)
def test_load_gives_back_the_model_and_its_vocabulary(name, tmp_path):
    pretrain.pretrain(
        name, TEXT, tmp_path / "sub" / "a", **RUN | dict(steps=2), sizes=sizes(name)
    )
    for path in ("a", "a.json", "a.safetensors"):
        model, vocab = memtx_minimal.load(tmp_path / "sub" / path)
    assert vocab.characters == TEXT.vocab.characters and not model.training
    assert type(model) is checkpoints.MODELS[name]
    info = json.loads((tmp_path / "sub" / "a.json").read_text("utf-8"))
    assert info["version"] == memtx_minimal.__version__ and info["model"] == name
    assert info["corpus"] == {"name": TEXT.name, "sha256": TEXT.digest}
    loss = training.evaluate(model, TEXT.valid, batch_size=4, segment_len=16)
    assert info["valid"] == [[2, round(loss, 4)]]


def test_an_unfinished_training_can_be_loaded(saved):
    model, vocab = memtx_minimal.load(saved)
    text = training.generate(model, vocab.encode("the "), 5)
    assert len(vocab.decode(text)) == 9


def test_the_command_line(tmp_path, capsys):
    Path(tmp_path / "my.txt").write_text(TEXT.text, encoding="utf-8")
    pretrain.main([
        "compressive_transformer", "--out", str(tmp_path / "a"), "--steps", "2", "--text",
        str(tmp_path / "my.txt"), "--d-model", "16", "--n-heads", "2", "--loss", "none",
        "--compression", "mean", "--valid-every", "1", "--batch-size", "4", "--segment-len", "8",
    ])  # fmt: skip
    info = checkpoints.read(tmp_path / "a")[0]
    assert info["sizes"]["loss"] is None and info["sizes"]["compression"] == "mean"
    assert info["command"].startswith(
        "python -m memtx_minimal.pretrain compressive_transformer"
    )
    assert [step for step, _ in info["valid"]] == [1, 2]
    out = capsys.readouterr().out
    nats = info["valid"][-1][1]
    assert (
        f"2 steps, validation loss {nats:.3f} nats, {nats / 0.693147:.3f} bits" in out
    )


def test_every_option_of_every_model_is_explained(capsys):
    for name in checkpoints.MODELS:
        assert set(checkpoints.sizes_of(name)) <= set(pretrain.SIZES)
        with pytest.raises(SystemExit):
            pretrain.main([name, "--help"])
        assert "(default: 128)" in capsys.readouterr().out


@pytest.mark.parametrize(
    "argv, words",
    [
        (["transformer_xl", "--d-model", "30"], "error: d_model=30 is not a multiple"),
        (["transformer_xl", "--text", "{}/no.txt"], "error: .*no.txt"),
        (["reformer", "--segment-len", "1100", "--batch-size", "2"], "pass 1 to 1024"),
    ],
)
def test_errors_of_the_command_line_are_one_line(tmp_path, argv, words):
    (tmp_path / "my.txt").write_text(TEXT.text, encoding="utf-8")
    always = ["--out", "{}/a", "--steps", "1", "--text", "{}/my.txt"]
    with pytest.raises(SystemExit) as error:
        pretrain.main([word.format(tmp_path) for word in argv[:1] + always + argv[1:]])
    assert re.search(words, str(error.value)) and "\n" not in str(error.value)


def test_importing_the_package_is_quick():
    """`import memtx_minimal` loads no torch: a version or a help text does not wait for it."""
    code = "import sys, memtx_minimal; print(memtx_minimal.__version__, 'torch' in sys.modules)"
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, encoding="utf-8"
    )
    assert out.stdout.split() == [memtx_minimal.__version__, "False"]


def test_the_memory_of_a_checkpoint_is_that_of_all_streams(saved):
    info, tensors = checkpoints.read(saved)
    memory = checkpoints.part(tensors, "memory.")
    assert len(memory) == 3 and all(m.shape == (4, 20, 16) for m in memory.values())
    assert info["steps_done"] == 5


# --------------------------------------------------------------------------- a part held out


def test_a_part_of_the_training_text_is_held_out(tmp_path, monkeypatch):
    """It is not trained on, its loss is noted on the way, and the validation text is
    read once, at the end."""
    n = len(TEXT.train) // 10
    seen, read = [], []
    endless, evaluate = training.endless, training.evaluate
    monkeypatch.setattr(
        training, "endless", lambda s, *a: seen.append(s) or endless(s, *a)
    )
    monkeypatch.setattr(
        training, "evaluate", lambda m, s, **kw: read.append(s) or evaluate(m, s, **kw)
    )
    kw = RUN | dict(steps=4, valid_every=2, sizes=sizes("transformer_xl", 0.0))
    info = pretrain.pretrain("transformer_xl", TEXT, tmp_path / "a", holdout=0.1, **kw)
    assert [torch.equal(s, TEXT.train[n:]) for s in seen] == [True]
    assert [len(s) for s in read] == [n, n, len(TEXT.valid)]
    assert torch.equal(read[0], TEXT.train[:n]) and torch.equal(read[2], TEXT.valid)
    assert [step for step, _ in info["held_out"]] == [2, 4]
    assert [step for step, _ in info["valid"]] == [4]
    model, _ = memtx_minimal.load(tmp_path / "a")
    loss = evaluate(model, TEXT.train[:n], batch_size=4, segment_len=16)
    assert info["held_out"][-1][1] == round(loss, 4)
    with pytest.raises(ValueError, match="settings: {'holdout': 0.1}, not {'holdout'"):
        pretrain.pretrain("transformer_xl", TEXT, tmp_path / "a", holdout=0.2, **kw)
    for share, words in ((0.9, "holdout=0.9 is not a number in 0 ... 0.5"),
                         (1e-5, "holdout=1e-05 of this text is under 2 tokens")):  # fmt: skip
        with pytest.raises(ValueError, match=words):
            pretrain.pretrain("transformer_xl", TEXT, tmp_path / "b", holdout=share, **kw)
