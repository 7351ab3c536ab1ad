"""Recorded seeds: the code they rest on, how they are made, what they say of a run."""

import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import warnings
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
import record
import sync
import torch

from memtx_minimal import bands, corpora, training

ROOT = Path(__file__).resolve().parent.parent


# ---------------------------------------------------------------- what is recorded


@pytest.mark.parametrize("name", record.names())
def test_recorded_bands_fit_the_code(name):
    changed = ", ".join(record.changed(name))
    assert not changed, f"{changed} changed since then: make record NAME={name}"


@pytest.mark.parametrize("name", record.names())
def test_recorded_bands_are_whole(name):
    path = Path(bands.FOLDER / f"{name}.json")
    content, seeds = record.read(name), record.read(name)["seeds"]
    assert path.read_bytes().decode("utf-8") == record.as_json(content) + "\n"
    assert len(seeds) >= 5 and content["text"] in (None, "Tiny Shakespeare")
    assert all(len(value) == len(seeds) for value in content["values"].values())


@pytest.mark.parametrize("name", record.names())
def test_recorded_bands_are_checked_in_their_notebook(name):
    page = sync.read(ROOT / "notebooks" / f"{record.notebook(name)}.py")
    variable = re.findall(rf'(\w+) = bands\.load\("{name}"', page)
    assert len(variable) == 1 and f"{variable[0]}.check(" in page


# ---------------------------------------------------------------- the code of a band

PAGE = '''# %% [markdown]
# # A notebook

# %% tags=["setup"]
import math

from memtx_minimal import training as loop
from memtx_minimal.tiny import half

print("set up")
SCALE = 2
SIZES = dict(width=3)

# %%
print("this cell is none of the band's")

# %% tags=["from-module"]
def shift(x):
    return x + 1

# %% tags=["band"]
def other(seed):
    return {}


def scores(seed):
    """What is recorded."""
    return {"one": loop.train(seed) * SCALE, "two": [shift(seed), half(seed) / 3]}
'''
TRAINING = '''"""A module."""
from memtx_minimal import inputs
from memtx_minimal.tiny import half as part

RATE, WARMUP = 0.1, 5
LIMITS = {"steps": 1}
LIMITS["lr"] = 2


@staticmethod
def train(steps, rate=RATE):
    """Train.

    Long."""
    inputs.check_steps(steps)  # refuse
    if steps > len(LIMITS):
        return Loop.run(inputs.whole(steps), f"{rate:.{WARMUP}f}")
    raise ValueError(words(steps))


class Loop:
    """A loop."""

    def run(steps, name):
        try:
            return [part(n) for n in range(steps)]
        except ValueError:
            return None


def words(steps):
    return f"{steps} are too few"


def generate(steps):
    return train(steps)
'''
TINY = "import torch\n\n\ndef half(x):\n    return torch.tensor(x / 2).item()\n"
INPUTS = "def check_steps(n):\n    pass\n\n\ndef whole(x):\n    return int(x)\n"
FILES = {
    "page": "notebooks/07_toy.py",
    "training": "memtx_minimal/training.py",
    "tiny": "memtx_minimal/tiny.py",
    "inputs": "memtx_minimal/inputs.py",
}


@pytest.fixture
def tree(tmp_path):
    """A small repository: one notebook, and a package."""
    for path, text in zip(FILES.values(), (PAGE, TRAINING, TINY, INPUTS)):
        (tmp_path / path).parent.mkdir(exist_ok=True)
        sync.write(tmp_path / path, text)
    return tmp_path


def edit(path, old, new):
    assert sync.read(path).count(old) == 1
    sync.write(path, sync.read(path).replace(old, new))


def test_a_band_rests_on_what_its_function_reaches(tree):
    assert set(record.code("07_scores", tree)) == {
        "07_toy.scores", "07_toy.SCALE", "07_toy.shift", "training.train",
        "training.RATE", "training.WARMUP", "training.LIMITS", "training.Loop",
        "tiny.half", "inputs.whole",
    }  # fmt: skip


@pytest.mark.parametrize(
    "file, old, new, changed",
    [
        ("page", "SCALE = 2", "SCALE = 3", "07_toy.SCALE"),
        ("page", "SCALE = 2", "SCALE = 2\nSCALE += 1", "07_toy.SCALE"),
        ("page", "SCALE = 2", "SCALE = 2\nloop.RATE = 1", "07_toy.loop"),
        ("page", "SCALE = 2", "if half:\n    SCALE = 2", "07_toy.SCALE"),
        ("page", "x + 1", "x + 1.0", "07_toy.shift"),
        ("page", "/ 3", "/ 4", "07_toy.scores"),
        ("page", '"one"', '"1"', "07_toy.scores"),
        ("page", "* SCALE", "* SIZES['width']",
         "07_toy.SCALE 07_toy.SIZES 07_toy.scores"),
        ("training", "0.1, 5", "0.1, 6", "training.RATE training.WARMUP"),
        ("training", '["lr"] = 2', '["lr"] = 3', "training.LIMITS"),
        ("training", "@staticmethod", "@property", "training.train"),
        ("training", "rate=RATE", "rate=2 * RATE", "training.train"),
        ("training", ":.{WARMUP}f", ":{WARMUP}f", "training.train"),
        ("training", "range(steps)", "range(1)", "training.Loop"),
        ("training", "return None", "raise", "training.Loop"),
        ("training", "tiny import half", "inputs import whole", "training.Loop"),
        ("tiny", "import torch", "import numpy as torch", "tiny.half"),
        ("tiny", "x / 2", "x // 2", "tiny.half"),
        ("inputs", "int(x)", "x", "inputs.whole"),
    ],
)  # fmt: skip
def test_a_change_of_code_is_named(tree, file, old, new, changed):
    write_record(tree, "07_scores", {"code": record.code("07_scores", tree)})
    edit(tree / FILES[file], old, new)
    assert record.changed("07_scores", tree) == changed.split()


@pytest.mark.parametrize(
    "file, old, new",
    [
        ("page", "# A notebook", "# A page"),
        ("page", "this cell", "that cell"),
        ("page", '"set up"', "half"),
        ("page", '"one"', "u'one'"),
        ("page", "return {}", "return {1: 2}"),
        ("page", "width=3", "width=4"),
        ("training", "# refuse", "# refuse what is too few"),
        ("training", "Train.\n\n    Long.", "Train for some steps."),
        ("training", '    """A loop."""\n\n', ""),
        ("training", "RATE, WARMUP = 0.1, 5", "(RATE,\n    WARMUP) = .10, 0x5"),
        ("training", '{"steps": 1}', "{\n    'steps': 1,  # one\n}"),
        ("training", "ValueError(words(steps))", "TypeError(f'{steps} are few')"),
        ("training", "are too few", "are few"),
        ("training", "return train(steps)", "return train(steps)[0]"),
        ("inputs", "    pass", "    assert n > 0"),
    ],
)
def test_what_makes_no_value_does_not_count(tree, file, old, new):
    before = record.code("07_scores", tree)
    edit(tree / FILES[file], old, new)
    assert record.code("07_scores", tree) == before


def test_the_synthetic_play_does_not_count():
    code = record.code("01_ablation")
    assert "corpora.tiny_shakespeare" in code and "corpora.lanes" in code
    for name in ("synthetic_play", "_download"):
        assert callable(getattr(corpora, name)) and f"corpora.{name}" not in code


ODDITIES = '''
async def f(a, /, b: int = 1_000, *c, d=0x1F, **e) -> "x":
    """Words."""
    async with a as (b, *c): pass
    x = f"{a!r:>{b}} {{}} {b=} {c:%H:%M}" "é" rf"\\d{d:.{a}f}" u"z" 'ſ\U0001f9ee', b"q"
    match x:
        case {"k": [1, *_], **r} | None if (y := r): global z; z = y @ 2j
        case Point(x=-1) | "s": del a[::2], b[..., 0]
    return lambda *, k=(), **o: {**o, **{i: [*j] for i, j in k if not i or j}}, 1 < 2e9
'''


def test_a_hash_is_the_same_in_every_python():
    """The constant was made by Python 3.11, and 3.10, 3.12 and 3.13 agreed."""
    text = " ".join(map(record.plain, record.Source("f", ODDITIES).definitions["f"]))
    assert hashlib.sha256(text.encode("utf-8")).hexdigest()[:16] == "eedb2924b8a51a71"


@pytest.mark.parametrize(
    "name, words",
    [
        ("07_shift_all", "no cell of 07_toy tagged `band` defines shift_all"),
        ("08_scores", "08_scores: there is no notebook 08_"),
    ],
)
def test_a_band_that_no_notebook_has(tree, name, words):
    with pytest.raises(ValueError, match=words):
        record.code(name, tree)


# ---------------------------------------------------------------- the recording

RUN = """# %% tags=["setup"]
import os
from types import SimpleNamespace

import torch

from memtx_minimal import training

device, calls = training.best_device(), []
corpus = SimpleNamespace(name="a text")
print("not to be seen")

# %%
raise SystemExit("this cell is none of the band's")

# %% tags=["band"]
def facts(seed):
    calls.append(seed)
    print("not to be seen")
    return {
        "seed": seed, "calls": len(calls), "process": os.getpid() % 10_000,
        "threads": torch.get_num_threads(), "cpu": device.type == "cpu",
        "curve": torch.tensor([seed, 1 / 3]), "text": len(corpus.name),
    }


def fails(seed):
    return {"one": 1 / (seed - 1)}


def waits(seed):
    while seed:
        pass
    return {"one": 1}
"""


def write_record(tree, name, content):
    path = tree / "memtx_minimal" / "recorded" / f"{name}.json"
    path.parent.mkdir(exist_ok=True)
    sync.write(path, record.as_json(content) + "\n")
    return path


@pytest.fixture
def page(tree):
    """A small repository whose notebook can be run."""
    sync.write(tree / FILES["page"], RUN)
    return tree


def test_recording_from_end_to_end(page, monkeypatch, capfd):
    record.record("07_facts", 3, page)
    out, err = capfd.readouterr()
    seen = sorted(re.findall(r"07_facts  seed (\d), \d of 3  \d+:\d\d\n", out))
    assert seen == ["0", "1", "2"] and len(out.splitlines()) == 3 and not err
    path = page / "memtx_minimal/recorded/07_facts.json"
    assert [p.name for p in path.parent.iterdir()] == ["07_facts.json"]
    content = path.read_bytes()
    assert content.endswith(b"\n}\n") and b"\r" not in content
    curve = b'"curve": [[0.0, 0.33333], [1.0, 0.33333], [2.0, 0.33333]],'
    assert curve in map(bytes.strip, content.splitlines())  # a line of its own
    found = json.loads(content)
    assert found["text"] == "a text" and found["seeds"] == [0, 1, 2]
    assert found["command"] == "make record NAME=07_facts SEEDS=3"
    assert found["versions"] == {"memtx-minimal": "0.1.0", "torch": version("torch")}
    values = found["values"]
    assert values["seed"] == [0, 1, 2] and values["calls"] == [1, 1, 1]
    assert values["threads"] == values["cpu"] == [1, 1, 1]
    processes = set(values["process"])
    assert len(processes) <= 2 and os.getpid() % 10_000 not in processes

    assert record.changed("07_facts", page) == []
    edit(page / FILES["page"], "1 / 3", "1 / 4")
    assert record.changed("07_facts", page) == ["07_toy.facts"]
    monkeypatch.setattr(bands, "FOLDER", path.parent)
    assert bands.load("07_facts", "a text").high("curve").tolist() == [2, 0.33333]


def test_a_seed_that_fails_leaves_the_record_as_it_was(page):
    path = write_record(page, "07_fails", {"code": {}})
    before = path.read_bytes()
    with pytest.raises(ZeroDivisionError):
        record.record("07_fails", 2, page)
    assert path.read_bytes() == before
    assert [p.name for p in path.parent.iterdir()] == ["07_fails.json"]


@pytest.mark.skipif(os.name == "nt", reason="Ctrl-C is no signal there")
def test_ctrl_c_ends_it_at_once_and_writes_nothing(page):
    script = page / "script.py"
    lines = [
        "import sys",
        "from pathlib import Path",
        f"sys.path.insert(0, {str(ROOT / 'book')!r})",
        "import record",
        "if __name__ == '__main__':",
        f"    record.record('07_waits', 5, Path({str(page)!r}))",
    ]
    sync.write(script, "\n".join(lines))
    process = subprocess.Popen(
        [sys.executable, script],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        assert process.stdout.readline().startswith(b"07_waits  seed 0, 1 of 5")
        os.killpg(process.pid, signal.SIGINT)
        assert process.wait(timeout=20) != 0
    finally:
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass  # all have ended
        process.stdout.close()
    assert not (page / "memtx_minimal/recorded").exists()


@pytest.fixture
def here(monkeypatch):
    """Run cells in this process, and leave nothing behind."""
    monkeypatch.setattr(training, "best_device", training.best_device)
    monkeypatch.setitem(sys.modules, "notebook", None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield record.run


def test_the_synthetic_play_is_refused(here):
    source = "import warnings\nfrom memtx_minimal import corpora\n"
    source += "warnings.warn('no network', corpora.SyntheticTextWarning)"
    with pytest.raises(corpora.SyntheticTextWarning):
        here(source, "f", 0)


def test_a_text_that_is_not_read_is_not_named(page):
    edit(page / FILES["page"], ', "text": len(corpus.name)', "")
    assert "07_toy.corpus" not in record.code("07_facts", page)


@pytest.mark.parametrize(
    "values, words",
    [
        ([1.0], "not \\[1.0\\]"),
        ({("a", "b"): 1}, "label: a number"),
        ({"a": float("nan")}, "a: nan is not finite"),
        ({"a": [1, None]}, "a: \\[1, None\\] is not finite"),
    ],
)
def test_what_cannot_be_a_band(values, words):
    with pytest.raises(ValueError, match=words):
        record.numbers(values)


def test_fewer_than_five_seeds_are_refused(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["record.py", "01_ablation", "--seeds", "4"])
    with pytest.raises(SystemExit):
        record.main()
    assert "a band needs 5 seeds or more" in capsys.readouterr().err


# ---------------------------------------------------------------- a live run


@pytest.fixture
def band(tmp_path, monkeypatch):
    """The name of a band of three seeds, recorded on "a text"."""
    monkeypatch.setattr(bands, "FOLDER", tmp_path)
    values = {"loss": [1.5, 1.25, 1.0], "curve": [[1, 5], [2, 6], [3, 4]]}
    content = {"seeds": [0, 1, 2], "text": "a text", "values": values}
    (tmp_path / "07_toy.json").write_text(json.dumps(content), encoding="utf-8")
    return "07_toy"


def test_a_band_knows_its_bounds(band, capsys):
    band = bands.load(band, "a text")
    assert (band.name, band.seeds) == ("07_toy", (0, 1, 2))
    assert (band.low("loss"), band.high("loss")) == (1.0, 1.5)
    assert band.low("curve").tolist() == [1, 4]
    assert band.high("curve").tolist() == [3, 6]
    assert capsys.readouterr().out == ""


def test_a_live_run_inside_passes(band):
    band = bands.load(band, "a text")
    band.check({"loss": 1.0}, margin=0)
    band.check({"loss": torch.tensor(1.74), "curve": [0.8, 6.2]}, margin=0.25)


@pytest.mark.parametrize(
    "live, words",
    [
        ({"loss": 1.7}, "loss: 1.7 is outside of 1 ... 1.5, the span of 3 seeds in "
         "07_toy, widened by 0.1"),
        ({"loss": 0.8}, "loss: 0.8 is outside of 1 ... 1.5"),
        ({"loss": float("nan")}, "loss: nan is outside"),
        ({"loss": 1.2, "curve": [3, 9]}, "curve[1]: 9 is outside of 4 ... 6"),
    ],
)  # fmt: skip
def test_a_live_run_outside_is_told_all(band, live, words):
    with pytest.raises(AssertionError, match=re.escape(words)):
        bands.load(band, "a text").check(live, margin=0.1)


def test_another_text_has_no_band(band, capsys):
    band = bands.load(band, "synthetic play")
    assert capsys.readouterr().out == (
        "no band for synthetic play: 07_toy was recorded on a text\n"
    )
    assert band.seeds == () and band.values["curve"].shape == (0, 2)
    band.check({"loss": 99, "curve": [0, 0]}, margin=0)
    assert band.low("loss") > band.high("loss")  # nothing lies between


@pytest.mark.parametrize(
    "live, margin, words",
    [
        ({"los": 1}, 0, "07_toy has no 'los': it has 'loss', 'curve'"),
        ({"curve": [1, 2, 3]}, 0, "'curve' has the shape (3,), in 07_toy (2,)"),
        ({"loss": 1}, -1, "margin=-1"),
        ({"loss": 1}, float("nan"), "margin=nan"),
    ],
)
def test_what_cannot_be_compared(band, live, margin, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        bands.load(band, "a text").check(live, margin)


def test_an_unknown_band_lists_the_known(band):
    with pytest.raises(ValueError, match="no band '07_to' is recorded, only 07_toy"):
        bands.load("07_to", "a text")
    assert bands.names() == ["07_toy"]


def test_values_are_numpy_arrays(band):
    values = bands.load(band, "a text").values
    assert all(isinstance(v, np.ndarray) and v.dtype == float for v in values.values())
