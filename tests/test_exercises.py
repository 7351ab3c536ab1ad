"""The checks of the exercises pass what is right, and say what is wrong with the rest.

Solutions run in notebooks/solutions; here are starters and wrong answers."""

import importlib
import math
import re
from types import SimpleNamespace

import jupytext
import nbformat
import numpy as np
import pytest
import sync
import torch
import torch.nn.functional as F

from memtx_minimal import exercises, transformer_xl, vanilla_transformer
from memtx_minimal.compressive_transformer import MaxPooling
from memtx_minimal.exercises.core import EXERCISES, NotRight, brief, called_by, check, differ, require, show
from memtx_minimal.feedback_transformer import FeedbackTransformer, step
from memtx_minimal.transformer_xl import RelativeAttention, TransformerXL, distances, rel_shift

CHAPTERS = {  # number of the exercises -> notebook
    (n.lstrip("0") or "0").upper(): name for name in sync.notebooks() for n in [sync.split_name(name)[0]]
}
GIVEN = [n for n, judge in EXERCISES.items() if getattr(judge, "right", None)]
FUNCTIONS = [n for n in GIVEN if callable(EXERCISES[n].right)]
MISTAKES = [(n, hint) for n in GIVEN for hint in EXERCISES[n].mistakes]


def chapter(number):
    return number.split(".")[0]


def cells(path):
    """{number: source} of the cells tagged exercise, by what they check."""
    found = {}
    for _, cell in sync.tagged(jupytext.read(path), "exercise"):
        for number in re.findall(r'exercises\.check\("([\w.]+)"', cell.source):
            assert number not in found, f"{path.name} checks {number} twice"
            found[number] = cell.source
    return found


@pytest.fixture(scope="module", params=sorted({chapter(n) for n in EXERCISES}))
def taught(request):
    """A chapter with exercises: its number and its notebook's name."""
    return request.param, CHAPTERS[request.param]


def test_starters_and_solutions_are_there(taught):
    number, name = taught
    mine = [n for n in EXERCISES if chapter(n) == number]
    assert 6 <= len(mine) <= 8
    for path in (f"{name}.py", f"solutions/{name}.py"):
        assert list(cells(sync.ROOT / "notebooks" / path)) == mine, path


def known(name):
    """What a starter finds in its chapter: the models' code, and small things."""
    torch.manual_seed(0)
    found = vars(vanilla_transformer) | vars(transformer_xl)
    for path in sync.chapter_modules(sync.ROOT, name):
        found |= vars(importlib.import_module(f"memtx_minimal.{path.stem}"))
    sizes = dict(d_model=16, n_heads=2, n_layers=2, d_ff=32)
    return found | {
        "torch": torch, "exercises": exercises, "__name__": "__main__",
        "model": vanilla_transformer.VanillaTransformer(10, **sizes).eval(),
        "corpus": SimpleNamespace(valid=torch.randint(10, (200,))),
        "tiny": FeedbackTransformer(10, **sizes, mem_len=6).double(),
        "own": 1.7, "none": 1.9, "operations": None,
    }  # fmt: skip


def test_starters_run_and_are_not_answered_yet(taught, capsys):
    _, name = taught
    for number, source in cells(sync.ROOT / "notebooks" / f"{name}.py").items():
        exec(source, known(name))
        assert capsys.readouterr().out == f"{number}: not answered yet\n"


def test_each_exercise_has_goal_minutes_difficulty_and_hint(taught):
    number, name = taught
    text = sync.read(sync.ROOT / "notebooks" / f"{name}.py")
    for n in [n for n in EXERCISES if chapter(n) == number]:
        start = text.index(f"# **{n} ") + 2
        words = text[start : text.index("# %%", start)]
        assert re.match(r"\*\*[\w.]+ [^*]+\*\* \*\([^;]+; (easy|middle|hard); \d+ minutes\)\*", words.replace("\n# ", " ")), n
        after = text[text.index(f'exercises.check("{n}"') :]
        assert after[: after.index("</details>")].count("<summary>Hint</summary>") == 1, n


def test_the_committed_solutions_are_right(taught):
    number, name = taught
    nb = nbformat.read(sync.ROOT / "notebooks" / "solutions" / f"{name}.ipynb", as_version=4)
    said = "".join(out.get("text", "") for c in nb.cells for out in c.get("outputs", []))
    for n in [n for n in EXERCISES if chapter(n) == number]:
        assert re.search(rf"(?m)^{re.escape(n)}: right", said), n


@pytest.mark.parametrize("number, hint", MISTAKES)
def test_a_known_mistake_gets_its_hint(number, hint):
    with pytest.raises(NotRight) as wrong:
        check(number, EXERCISES[number].mistakes[hint])
    assert str(wrong.value).endswith(f"hint: {hint}") and "not right yet" in str(wrong.value)


@pytest.mark.parametrize("number", FUNCTIONS)
def test_what_is_right_is_right_and_what_is_odd_is_told(number, capsys):
    def broken(*case):
        raise KeyError("oh")

    for odd, why in [
        (lambda *case: None, "returns nothing: is there a `return`"),
        (broken, r"fails with KeyError: 'oh'\nin the line: raise KeyError"),
        (lambda: 1, "takes 0 positional arguments"),
        (lambda *case: object(), "should"),
        (lambda *case: torch.zeros(9, 9, 9), "should"),
        (7, "hand in the function itself"),
    ]:
        with pytest.raises(NotRight, match=why):
            check(number, odd)
    check(number, lambda *case: ...)
    assert capsys.readouterr().out == f"{number}: not answered yet\n"


@pytest.mark.parametrize("number", GIVEN)
def test_at_least_three_wrong_answers(number):
    assert len(EXERCISES[number].mistakes) >= 2  # and what is odd, above


def refused(number, *answer, why):
    with pytest.raises(NotRight, match=why):
        check(number, *answer)


# ---------------------------------------------------------------- the core


def test_a_notebook_shows_the_words_alone():
    with pytest.raises(NotRight) as wrong:
        check("1.5", lambda M, L: 1 + L * M)
    assert wrong.value._render_traceback_() == [str(wrong.value)]
    assert str(wrong.value).splitlines() == [
        "1.5: not right yet", "<lambda>(4, 1): should be 4, and is 5",
        "expected: 4", "got:      5", "hint: a query sees M keys, and one of them is itself",
    ]  # fmt: skip


def test_an_unknown_number_names_the_others():
    with pytest.raises(ValueError, match="no exercise '1.99': choose from .*1.1, 1.2"):
        check("1.99", 1)


def test_a_handout_stops_where_nothing_is_written():
    with pytest.raises(NotRight, match="your code is still missing"):
        require("1.5", lambda M, L: ...)


def test_what_is_called_is_seen_through_helpers_and_other_names():
    def helper(x):
        return rel_shift(x)

    globals()["helper_of_a_student"] = helper
    assert "rel_shift" in called_by(lambda x: helper_of_a_student(x))  # noqa: F821
    assert "rel_shift" in called_by(rel_shift)
    del globals()["helper_of_a_student"]


def test_a_check_leaves_the_random_numbers_as_they_were():
    before = torch.manual_seed(1).get_state()
    check("1.6", Bias)
    check("2.2", lambda *case: ...)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_differences_are_named():
    a = torch.tensor([[1.0, 2.0], [3.0, math.nan]])
    assert not differ(a, torch.tensor([[1.0, 2.0], [3.0, 9.0]]), 1e-6)
    assert differ(a, a + 1, 1e-6) == "at [0, 0] should be 1, and is 2"
    assert differ(a, a[0], 1e-6) == "the shape should be (2, 2), and is (2,)"
    assert differ([1, 2], (1, 3), 0) == "number 1: should be 2, and is 3"
    assert differ(1, True, 0) and differ(1, "1", 0) and differ("a", "b", 0)
    assert not differ(1, torch.tensor(1), 0) and not differ(0.5, 0.5004, 1e-3)
    assert show(a) == brief(a) == "[[1, 2], [3, nan]]"
    assert brief([torch.zeros(5, 5)] * 9) == "[" + ", ".join(["a tensor (5, 5)"] * 9) + "]"
    assert show({2, 1}) == "{1, 2}" and show([1, 2]) == "[1, 2]"
    assert show({"a": a[0].numpy()}) == "{'a': [1, 2]}"
    refused("5.4", lambda values: list(my_ties(values)), why="should return a set, and returns a list")
    refused("B.1", lambda scores: scores.exp2() / scores.exp2().sum() * math.nan, why="got:      .nan, nan")


def test_dots_anywhere_are_no_answer(capsys):
    for number, *answer in [("B.2", ((1, 0), ...)), ("4.2", [2.3, 2.2, ..., 2.0], [2.3] * 4), ("5.2", dots_inside)]:
        check(number, *answer)
        assert capsys.readouterr().out == f"{number}: not answered yet\n"


def dots_inside(space, L, d_model):
    return {"sliding window": 1, "Transformer-XL": ..., "Compressive": ..., "Feedback": ...}


def my_ties(values):
    best = min(values, key=lambda name: values[name].mean())
    return {name for name in values if values[name].min() <= values[best].max()}


def test_of_large_arguments_the_message_names_the_shapes():
    with pytest.raises(NotRight) as wrong:
        check("A.2", EXERCISES["A.2"].mistakes["g_s: the line of the softmax in section A.1"])
    assert len(str(wrong.value)) < 500 and "number 0: at [" in str(wrong.value)


def test_an_answer_that_fails_like_a_known_mistake_gets_its_hint():
    with pytest.raises(NotRight, match=r"(?s)fails with RuntimeError.*hint: positions\[-0:\] is all"):
        check("3.3", lambda keys, positions: keys + positions[-len(keys) :])


# ---------------------------------------------------------------- chapter 1


def test_the_shift_must_be_written():
    refused("1.2", lambda s: rel_shift(F.pad(s, (1, 0))), why="without rel_shift")


def test_a_memory_with_faults():
    from memtx_minimal.exercises import chapter_1

    for hint, fault in list(chapter_1.faults.items())[1:]:
        refused("1.3", fault, why=re.escape(hint))
    refused("1.3", lambda *a: chapter_1.remembered(*a).requires_grad_(), why="no graph")


def test_cleared(capsys):
    check("1.4", 1.75, 1.9, 1.7)
    refused("1.4", 1.7, 1.9, 1.7, why="one segment in four has none")
    refused("1.4", 1.85, 1.9, 1.7, why="as if 75% of the segments")
    check("1.4", torch.tensor(1.75), 1.9, 1.7)
    refused("1.4", "1.75", 1.9, 1.7, why="a loss is a number, and this is a str")


@pytest.mark.parametrize("same_length", [False, True])
def test_longest_reach_is_what_is_felt(same_length):
    from memtx_minimal.exercises.chapter_1 import longest_reach

    for T, M, L in [(4, 1, 3), (4, 3, 2), (4, 6, 3), (3, 3, 2), (1, 5, 2)]:
        torch.manual_seed(0)
        model = TransformerXL(10, 16, 2, L, 32, mem_len=M, same_length=same_length).double()
        n = T * (40 // T)
        text = torch.randint(10, (1, n))
        changed = (text + torch.eye(n, dtype=torch.int64)) % 10
        memory = None
        for segment in torch.cat([text, changed]).split(T, dim=1):
            logits, memory = model(segment, memory)
        last = logits[:, -1]
        felt = ((last[1:] - last[0]).abs().amax(dim=1) > 1e-12).sum().item()
        assert longest_reach(T, M, L, same_length) == felt < n
        if not same_length:
            assert felt == T + M + T * math.ceil(M / T) * (L - 1)


class Bias(RelativeAttention):
    n, shared = 5, True

    def __init__(self, d_model, n_heads, dropout):
        super().__init__(d_model, n_heads, dropout)
        self.bias = torch.nn.Parameter(torch.zeros(n_heads, self.n))

    def forward(self, context, R, mask):
        T, K = mask.shape
        q = self.heads(self.query(context[:, -T:]))
        k, values = (self.heads(x) for x in self.key_value(context).chunk(2, dim=-1))
        far = distances(T, K - T).clamp(min=0)
        far = far.clamp(max=self.n - 1) if self.shared else far % self.n
        scores = (q + self.u) @ k.mT / q.size(-1) ** 0.5 + self.bias[:, far] + mask
        return self.out((scores.softmax(-1) @ values).transpose(1, 2).flatten(2))


def test_bias():
    check("1.6", type("Long", (Bias,), {"n": 64}))
    check("1.6", Bias)
    refused("1.6", RelativeAttention, why="a parameter `bias`")
    refused("1.6", type("Round", (Bias,), {"shared": False}), why="they share its last number")
    flipped = lambda self, context, R, mask: Bias.forward(self, context.flip(1), R, mask)
    refused("1.6", type("Wrong", (Bias,), {"n": 64, "forward": flipped}), why="while the table covers")
    refused("1.6", type("None_", (Bias,), {"forward": lambda *a: None}), why="returns nothing")
    refused("1.6", Bias(8, 2, 0.0), why="hand in the class itself, and not a Bias")


@torch.no_grad()
def test_a_bias_with_a_usual_mistake():
    class Mistaken(Bias):
        def forward(self, context, R, mask):
            kept = self.u.clone(), self.bias.clone()
            self.spoil()
            out = super().forward(context, R, mask)
            self.u.data, self.bias.data = kept
            return out

    for hint, spoil in {
        "add u to the queries": lambda self: self.u.zero_(),
        "is for the distance 0": lambda self: self.bias.copy_(self.bias.flip(1)),
    }.items():
        refused("1.6", type("M", (Mistaken,), {"spoil": spoil}), why=hint)
    see = lambda self, context, R, mask: Bias.forward(self, context, R, torch.zeros_like(mask))
    refused("1.6", type("See", (Bias,), {"forward": see}), why="is the mask added?")


def test_through():
    torch.manual_seed(0)
    sizes = dict(vocab_size=20, d_model=16, n_heads=2, n_layers=2, d_ff=32, mem_len=4)
    refused("1.7", TransformerXL(**sizes), why="is `detach` gone?")
    refused("1.7", TransformerXL, why="hand in a model")
    refused("1.7", 3, why="hand in a model, .*, and not an int")


# ---------------------------------------------------------------- chapter 0


@pytest.fixture
def vanilla():
    torch.manual_seed(0)
    return vanilla_transformer.VanillaTransformer(10, 16, 2, 2, 32, max_len=64).eval()


@torch.no_grad()
def slid(model, tokens, drop=True):
    """The last of 65 tokens, from keys and values of those before, less the oldest."""
    x, y = (
        model.embedding(part) + vanilla_transformer.sinusoid(places, 16)
        for part, places in ((tokens[:, :64], torch.arange(64)), (tokens[:, 64:], torch.tensor([63])))
    )
    for layer in model.layers:
        _, k, v = parts(layer, x)
        q, new_k, new_v = parts(layer, y)
        k, v = (torch.cat([old[:, :, drop:], new], dim=2) for old, new in ((k, new_k), (v, new_v)))
        y = y + layer.attention.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        y, x = y + layer.feed_forward(layer.norm_feed_forward(y)), layer(x)
    return model.head(model.norm(y))[:, -1]


def parts(layer, x):
    qkv = layer.attention.query_key_value(layer.norm_attention(x))
    return qkv.unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)


def test_slide(vanilla, capsys):
    check("0.4", lambda tokens: slid(vanilla, tokens), vanilla)
    assert "from the logits of the last 64, read anew" in capsys.readouterr().out
    refused("0.4", lambda tokens: slid(vanilla, tokens, drop=False), vanilla, why="the oldest of each layer out")
    refused("0.4", lambda tokens: vanilla(tokens[:, 1:])[0][:, -1], vanilla, why="read anew: go on from the cache")
    refused("0.4", lambda tokens: vanilla(tokens)[0], vanilla, why="fails with ValueError")
    refused("0.4", lambda tokens: slid(vanilla, tokens)[0], vanilla, why=r"shape should be \(1, 10\)")


@torch.no_grad()
def sliding(model, stream, n, first=0, width=64):
    windows = stream[first + 64 - width : first + n + 63].unfold(0, width, 1)
    return F.cross_entropy(model(windows)[0][:, -1], stream[64 + first : 64 + first + n]).item()


@torch.no_grad()
def of_windows(model, stream, n, last, ahead):
    """The mean loss of the last predictions of n windows, each of the token so far ahead."""
    windows, targets = (s[: n + 63].unfold(0, 64, 1) for s in (stream, stream[ahead:]))
    return F.cross_entropy(model(windows)[0][:, -last:].flatten(0, 1), targets[:, -last:].flatten()).item()


def test_sliding(vanilla):
    stream = torch.randint(10, (200,), generator=torch.Generator().manual_seed(0))
    check("0.5", sliding, vanilla, stream)
    refused("0.5", lambda *a: sliding(*a, first=1), vanilla, stream, why="character 64 is the first")
    refused("0.5", lambda *a: sliding(*a, width=63), vanilla, stream, why="not from 63")
    refused("0.5", lambda m, s, n: n * sliding(m, s, n), vanilla, stream, why="n = 30: .*\nhint: the mean")
    for last, ahead, why in [(64, 1, "the last prediction of each"), (1, 0, "the target comes after its window")]:
        refused("0.5", lambda *a: of_windows(*a, last, ahead), vanilla, stream, why=why)
    refused("0.5", lambda *a: math.nan, vanilla, stream, why="n = 1: ")


def turn(n, d_model, sign=1):
    half = d_model // 2
    angle = n / 10_000 ** (torch.arange(half) / half)
    sin, cos = sign * angle.sin().diag(), angle.cos().diag()
    return torch.cat([torch.cat([cos, -sin], dim=1), torch.cat([sin, cos], dim=1)])


def test_turn():
    check("0.7", turn)
    refused("0.7", lambda *a: turn(*a, sign=-1), why=r"(?s)my_turn\(1, 2\): 2 dimensions are wrong, first \[0, 1\].*it turns back")
    refused("0.7", lambda *a: turn(*a).T, why="it turns back")
    refused("0.7", lambda n, d: torch.eye(d // 2), why=r"a tensor \(2, 2\), and is a tensor \(1, 1\)")
    order = lambda d: torch.arange(d).view(2, -1).T.flatten()
    refused("0.7", lambda n, d: turn(n, d)[order(d)][:, order(d)], why="cosines in the second")


def test_choices_say_which_is_wrong(capsys):
    check("0.6", {"one layer": ..., "two layers": False, "with positions": False})
    assert capsys.readouterr().out == "0.6: not answered yet\n"
    refused("0.6", [True, False, False], why="hand in the dictionary with the keys one layer")
    refused("0.6", {"one layer": "yes", "two layers": 0, "with positions": 0}, why="should be True, and is 'yes'")


# ---------------------------------------------------------------- chapter 3


@pytest.fixture
def feedback():
    torch.manual_seed(0)
    return FeedbackTransformer(10, 16, 2, 2, 32, mem_len=6).double()


def test_tracker(feedback):
    feedback.mem_len = 1  # made with more
    refused("3.5", feedback, why="mem_len=6, not 1: train a new model")
    refused("3.5", FeedbackTransformer(10, 16, 2, 2, 32, mem_len=1), why="2 layers, not 1")
    refused("3.5", FeedbackTransformer(10, 16, 2, 1, 32, mem_len=1), why="above 0.9")
    refused("3.5", [0.9] * 32, why="hand in a trained FeedbackTransformer, and not a list")


def blocks(model, x, kv, S):
    outputs, vectors = [], []
    for part in x.split(S, dim=1):
        n = part.size(1)
        together = part.flatten(0, 1), kv.repeat_interleave(n, dim=0)
        output, vector = (y.unflatten(0, (-1, n)) for y in step(model, *together))
        kv = torch.cat([kv, model.memory.keys_values(vector)], dim=1)
        kv = kv[:, -model.mem_len :]
        outputs.append(output)
        vectors.append(vector)
    return torch.cat(outputs, dim=1), torch.cat(vectors, dim=1), kv


def mixed_up(model, x, kv, S):
    """The texts of a batch share their memories."""
    return blocks(model, x, kv.roll(1, dims=0), S)


def backwards_in_a_block(model, x, kv, S):
    turned = torch.cat([part.flip(1) for part in x.split(S, dim=1)], dim=1)
    *both, kv = blocks(model, turned, kv, S)
    back = [torch.cat([y.flip(1) for y in all.split(S, dim=1)], dim=1) for all in both]
    return *back, kv


def test_blocks(feedback):
    from memtx_minimal.exercises.chapter_3 import in_blocks

    check("3.6", blocks, feedback)
    for wrong, why in [
        (lambda model, x, kv, S: blocks(model, x, kv, 1), r"S = 4: outputs are wrong at"),
        (lambda *a: tuple(2 * y for y in blocks(*a)), "S = 1: outputs are wrong at"),
        (mixed_up, "own text's memory"),
        (backwards_in_a_block, "S = 4: outputs are wrong"),
        (lambda *a: blocks(*a)[:2], "return three things"),
        (lambda *a: blocks(*a)[0], "return three things.* not a tensor"),
        (lambda model, x, kv, S: blocks(model, x, kv, S / 2), "fails with TypeError"),
        (lambda *a: (lambda outputs, vectors, kv: (vectors, outputs, kv))(*blocks(*a)), "outputs come first"),
        (in_blocks, "S = 4: 10 tokens took 10 steps, in blocks 3"),
        (7, "hand in your function and then"),
    ]:
        refused("3.6", wrong, feedback, why=why)
    refused("3.6", blocks, why="hand in your function and then a FeedbackTransformer, such as `tiny`")
    assert not feedback.layers[0]._forward_hooks


# ---------------------------------------------------------------- chapter 2


@pytest.mark.parametrize("T, M, C, c", [(3, 6, 6, 3), (4, 8, 4, 2), (4, 4, 3, 4), (2, 6, 5, 1)])
def test_the_slots_are_those_of_the_pipeline(T, M, C, c):
    from memtx_minimal.exercises.chapter_2 import stands_in

    compressed, memory = [], []
    for n in range(T, 20 * T + 1, T):
        memory += [[t] for t in range(n - T, n)]
        while len(memory) > M:
            compressed.append(sum(memory[:c], []))
            memory = memory[c:]
        row = compressed[-C:] + memory
        if len(row) == C + M:
            assert [stands_in(slot, n, M, C, c) for slot in range(C + M)] == row


def test_the_words_on_what_training_moves_are_true():
    from memtx_minimal.exercises.chapter_2 import LOSSES, everything, moved, moves

    refused("2.2", lambda *case: list(moves(*case)), why="return a set, and returns a list")
    for f_c in everything:
        for loss in LOSSES:
            assert all(moves(f_c, loss, n) == moved(f_c, loss, n) for n in (1, 2))


def compression(forward):
    return type("Mine", (MaxPooling,), {"forward": forward})


def test_newest():
    check("2.4", compression(lambda self, old, used=None: old[:, self.rate - 1 :: self.rate]))
    for forward, why in [
        (lambda self, old, used=None: old[:, :: self.rate], "rate 2: .*\nhint: that is the oldest"),
        (lambda self, old, used=None: old.flip(1)[:, :: self.rate], "in reverse"),
        (lambda self, old: old, "used=None"),
        (lambda self, old, used=None: old, "one state for each group"),
        (lambda self, old, used=None: old[0], "the shape should be"),
        (lambda self, old, used=None: None, "returns nothing"),
        (lambda self, old, used=None: old.tolist(), "return a tensor, and returns a list"),
    ]:
        refused("2.4", compression(forward), why=why)
    refused("2.4", lambda old, used=None: old, why="hand in the class itself, not a function")


def my_scores(attention, q, ages):
    R = transformer_xl.sinusoid(ages.flatten(), q.size(1) * q.size(3))
    r = attention.heads(attention.position(R)).unflatten(1, ages.shape)
    return q.size(-1) ** -0.5 * torch.einsum("bhtd,htkd->bhtk", q + attention.v, r)


def test_scores():
    check("2.7", my_scores)
    for wrong, why in [
        (lambda a, q, ages: my_scores(a, q - a.v, ages), "add v to the query"),
        (lambda a, q, ages: my_scores(a, q - a.v + a.u, ages), "u for contents"),
        (lambda a, q, ages: my_scores(a, q, ages[:1].expand(3, 5)), "ages of its own"),
        (lambda a, q, ages: my_scores(a, q, ages) * 8**0.5, "the root of d_head"),
        (lambda a, q, ages: my_scores(a, q, ages).mT, "the shape should be"),
    ]:
        refused("2.7", wrong, why=why)


# ---------------------------------------------------------------- chapter 4


def test_once():
    check("4.2", [2.3, 2.2, 2.1, 2.0], [2.3, 2.25, 2.15, 2.05])
    for wrong, why in [
        (([2.3, 2.2, 2.1, 2.0], [2.4, 2.25, 2.15, 2.05]), "finds no key twice"),
        (([2.3, 2.2, 2.1, 2.0], [2.3, 2.2, 2.1, 2.0]), "switched"),
        (([2.3], [2.3]), "two lists of four"),
        ((2.3, 2.3), "two lists of four losses.*this is 2.3"),
        (([2.3, 2.2, 2.1, "2.0"], [2.3] * 4), "a loss is a number; this is '2.0'"),
        (([math.nan] * 4, [math.nan] * 4), "a loss is a number; this is nan"),
        (([9.0] * 4, [9, 1, 20, 5]), "more than 0.2"),
    ]:
        refused("4.2", *wrong, why=why)


def test_broken():
    check("4.6", 0.2)
    check("4.6", torch.tensor(0.2))
    for wrong in (1e-12, 5e9, float("inf")):
        refused("4.6", wrong, why="other numbers are dropped")
    refused("4.6", "20 %", why="a number; this is a str")


# ---------------------------------------------------------------- the appendices


def test_seconds():
    check("A.4", {1: 0.3, 4: 0.2, 16: 0.1, 64: 0.2})
    refused("A.4", [0.3, 0.2, 0.1, 0.2], why=r"hand in {1: .*this is \[0.3")
    refused("A.4", {1: 0.3, 4: 0.2, 16: 0.1}, why="this is {1: 0.3, 4: 0.2, 16: 0.1}")
    refused("A.4", {1: 0.3, 4: 0.3, 16: 0.3, 64: 0.3}, why="was BLOCK changed")
    refused("A.4", {1: "0.3", 4: 0.3, 16: 0.3, 64: 0.3}, why="seconds, numbers from 0 to 60")
    refused("A.4", {1: 300.0, 4: 200.0, 16: 100.0, 64: 200.0}, why="seconds, numbers from 0 to 60")


def test_pair():
    check("B.2", ((1, 0), (0, 0)))
    for wrong, why in [
        (((0, 1), (0, 0)), "buckets must differ"),
        (((1, 0), (0, 1)), "never lies in an earlier chunk"),
        (((1, 1), (0, 0)), "differ by 2"),
        ((1, 0), "two pairs"),
        ((("a", 0), (0, 0)), "whole numbers"),
    ]:
        refused("B.2", wrong, why=why)


def test_the_crossing_and_the_reach_of_chapter_5():
    quadratic = lambda name, n, L, d_model, d_ff: n * d_model if name == "vanilla" else 50_000
    refused("5.6", lambda operations, d_model: 128, quadratic, why="d_model = 64: 1024 tokens, not 128")
    refused("5.6", lambda operations, d_model: 512, quadratic, why="still needs more")
    refused("5.6", lambda operations, d_model: "1024", quadratic, why="not '1024'")
    reach = lambda read, tokens: 3
    refused("5.5", reach, why="reads back to age 0 it says 3")
    refused("5.5", lambda read, tokens: 1, why="the last token has age 0")
    refused("5.5", lambda read, tokens: "0", why="it says '0'")
    refused("5.5", youngest_first, why="every other token back to age 8 it says 0\nhint: a token that is not felt")
    refused("5.5", 3, why="the function itself")
    check("5.4", my_ties)


def youngest_first(read, tokens):
    for age in range(tokens.size(1)):
        changed = tokens.clone()
        changed[0, -1 - age] = 1 - changed[0, -1 - age].clamp(max=1)
        if torch.equal(read(changed), read(tokens)):
            return age - 1
    return age


# ---------------------------------------------------------------- chapter 6


def test_what_chapter_6_calls_right_is_what_its_module_does():
    from memtx_minimal import measure, memory_today
    from memtx_minimal.exercises import chapter_6 as six

    for got in ([4, 1, 2, 7, 3, 9, 5, 1, 8, 2], [5, 4, 3, 2, 1], [1, 2]):
        cache = memory_today.Cache(4, 1, mem_len=7, n_sinks=2, n_used=2)
        assert six.slots(got) == cache.stays(torch.tensor(got).float().view(1, -1, 1)).flatten().tolist()
    q, k = six.random(1, 1, 1, 8), six.random(1, 1, 1, 8, seed=1)
    for n in (0, 3, 40):
        score = 8**0.5 * memory_today.scores_of(q, k, torch.tensor([50]), torch.tensor([50 - n]))
        torch.testing.assert_close(six.product(q[0, 0, 0], k[0, 0, 0], n), score.squeeze())
    for n, mem_len, c in [(10, 4, 3), (12, 4, 3), (3, 4, 3), (9, 4, 2), (7, 2, 1)]:
        place, end = torch.arange(n), c * torch.arange(1, n // c + 1)
        shown, window = memory_today.in_view(place[-1:], end, place, mem_len, 99, c)
        blocks = [[*range(e - c, e)] for e in end[shown[0]].tolist()]
        assert six.view(n, mem_len, c) == (blocks, place[window[0]].tolist())
    for n in (1, 36, 75, 200):
        sizes = dict(vocab_size=9, d_model=16, n_heads=2, n_layers=2, d_ff=8)
        for kind, size in six.sizes(n, 16, 2, 2).items():
            model, memory = memory_today.MemoryToday(**sizes, kind=kind), None
            with torch.no_grad():
                for token in torch.zeros(n, 1, 1, dtype=torch.int64):
                    _, memory = model(token, memory)
            assert measure.nbytes(memory) == size, (n, kind)


def test_both_tokens_of_a_chunk_write_what_single_steps_write():
    from memtx_minimal.exercises import chapter_6 as six
    from memtx_minimal.memory_today import delta_rule

    S, k, v = six.random(4, 3), six.units(2, 3), six.random(2, 4, seed=1)
    alpha, beta = six.half_of(0.9), six.half_of(1.5)
    u = six.writes(S, k, v, alpha, beta)
    after = alpha.prod() * S + alpha[1] * torch.outer(u[0], k[0]) + torch.outer(u[1], k[1])
    plain = delta_rule(*(x[None, None] for x in (k, k, v, alpha, beta, S)))[1][0, 0]
    torch.testing.assert_close(after, plain)
    one = six.written(S, 3 * k[0], v[0], 0.9, 1.5)
    plain = delta_rule(*(x[None, None] for x in (k[:1], k[:1], v[:1], alpha[:1], beta[:1], S)))[1][0, 0]
    torch.testing.assert_close(one, plain)


def swap(a, b, n, sign=-1, beta=2.0, size=0.5**0.5):
    k = torch.zeros(n)
    k[a], k[b] = size, sign * size
    return k, beta


def test_swap(capsys):
    check("6.5", swap)
    check("6.5", lambda a, b, n: swap(b, a, n))
    check("6.5", lambda a, b, n: (swap(a, b, n)[0].tolist(), torch.tensor(2)))
    assert capsys.readouterr().out == 3 * "6.5: right\n"
    check("6.5", lambda a, b, n: ...)
    check("6.5", lambda a, b, n: (..., 2.0))
    assert capsys.readouterr().out == 2 * "6.5: not answered yet\n"
    for wrong, why in [
        (lambda *a: swap(*a, beta=1.0), r"(?s)a = 0, b = 1, 2 cups: .*0.5.*both cups get the mean"),
        (lambda *a: swap(*a, beta=1.5), "how far must beta push"),
        (lambda *a: swap(*a, sign=1), "another sign: take the difference"),
        (lambda *a: swap(*a, size=1.0), "k has the length 1.414\nhint: a key has length one"),
        (lambda a, b, n: (torch.eye(n)[a], 2.0), "what does a swap turn over"),
        (lambda a, b, n: swap(0, 1, n), "a = 3, b = 1, 5 cups"),
        (lambda a, b, n: swap(a, b, 9), r"shape \(2,\) and beta is a number, not \(9,\)"),
        (lambda a, b, n: swap(a, b, n)[0], "two things, k and beta, not a tensor"),
        (lambda a, b, n: ("k", 2.0), "k is a tensor and beta a number, not \\('k', 2\\)"),
        (lambda a, b, n: None, "returns nothing"),
        (lambda a, b, n: 1 / 0, "fails with ZeroDivisionError"),
        (swap(0, 1, 2), "hand in the function itself"),
    ]:
        refused("6.5", wrong, why=why)


def test_chapter_6_must_be_written():
    from memtx_minimal import memory_today
    from memtx_minimal.exercises import chapter_6 as six

    one = torch.zeros(1, 1, 1, 1)

    def a_step(S, k, v, alpha, beta):
        memory_today.delta_rule(*3 * [one], one[0], one[0], one)
        return six.written(S, k, v, alpha, beta)

    def a_product(q, k, n):
        memory_today.rotate(torch.zeros(1, 1, 1, 2), torch.arange(1))
        return six.product(q, k, n)

    def a_view(n, mem_len, c):
        memory_today.in_view(torch.arange(1), torch.arange(1), torch.arange(1), 1, 1, 1)
        return six.view(n, mem_len, c)

    for number, mine, name in [("6.2", a_product, "rotate"), ("6.3", a_step, "delta_rule"), ("6.6", a_view, "in_view")]:
        refused(number, mine, why=f"write it yourself, without {name}")
    shown = lambda got: six.slots(got, among_all=True)
    refused("6.1", shown, why=r"(?s)\[4, 1, 2, 7.*expected: \[0, 1, 3, 5, 7, 8, 9\].*sinks and the latest stay anyway")


@pytest.mark.parametrize("name", ["rotate", "pool", "delta_rule"])
def test_what_handouts_of_chapter_6_leave_blank(name, capsys):
    from memtx_minimal import memory_today

    true = getattr(memory_today, name)
    require(f"6.{name}", true)
    assert capsys.readouterr().out == f"6.{name}: right\n"

    def half(*case):
        found = true(*case)
        return found / 2 if isinstance(found, torch.Tensor) else (found[0], found[1] / 2)

    refused(f"6.{name}", half, why="should be")


def test_answers_of_chapter_6_that_once_passed(capsys):
    from memtx_minimal.exercises import chapter_6 as six

    def by_amount(got):  # finds the first place with this amount, a sink's perhaps
        most = sorted(got[2:-3])[-2:]
        return sorted({0, 1, *range(max(0, len(got) - 3), len(got)), *map(got.index, most)} & {*range(len(got))})

    refused("6.1", by_amount, why=r"\[9, 0, 1, 9")
    check("6.1", lambda got: list(np.array(six.slots(got))))
    assert capsys.readouterr().out == "6.1: right\n"

    def capped(n, d_model, H, L):
        right = six.sizes(n, d_model, H, L)
        return right | {"pooled": 8 * L * d_model * min(64, n - 3 * (max(0, n - 32) // 4))}

    refused("6.4", capped, why="163, 128")
    refused("6.4", lambda *case: six.sizes(*case) | {"pooled": torch.arange(3)}, why="should be")
    refused("6.2", lambda q, k, n: six.product(q, k, n, sign=0), why="takes a part of each number")
    refused("6.3", lambda *case: np.array(["a", "b"]), why="should be a tensor")
