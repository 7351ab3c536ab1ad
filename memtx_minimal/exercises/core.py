"""How an exercise is judged, and what a student is told, for all chapters alike.

An exercise compares what the student's function gives with what is right, case by case,
or it is a function of its own that calls `fail`. Every message is made here.
"""

import copy
import math
import traceback
from numbers import Real
from pathlib import Path

import numpy as np
import torch

EXERCISES = {}  # {number, such as "1.3": what judges an answer}
TAUGHT = {}  # the same for what handouts leave blank: "1.rel_shift", "0.Layer.forward"


class NotRight(AssertionError):
    """An answer that is not right: a notebook shows its words alone, no traceback."""

    def _render_traceback_(self):
        return [str(self)]


class NotAnswered(Exception):
    """Where the starter stands as it was."""


def fail(message):
    raise NotRight(message)


def exercise(number):
    """Register the function below as the judge of an exercise. It takes the answer,
    calls `fail` if that is wrong, and may return a remark for one that is right."""

    def register(judge):
        if number in EXERCISES:
            raise ValueError(f"there are two exercises {number}")
        EXERCISES[number] = judge
        return judge

    return register


def compare(number, right, cases, **how):
    """Register an exercise whose answer is a function: see `by_cases`."""

    def judge(mine):
        by_cases(mine, right, cases, **how)

    judge.right, judge.mistakes, judge.given = (
        right,
        how.get("mistakes", {}),
        how.get("given"),
    )
    EXERCISES[number] = judge


def by_cases(mine, right, cases, *, mistakes=None, given=None, without=(), atol=1e-4):
    """Compare what a function gives with what is right, case by case.

    right: what gives the right result; nan in a tensor stands for "anything".
    cases: tuples of arguments. mistakes: {hint: a function with that mistake}.
    given: the starter, where it is a version with a fault. without: names of functions
    that the answer must not call.
    """
    if not callable(mine):
        fail(f"hand in the function itself, not what it returns: this is {show(mine)}")
    if given and all(alike(given, mine, case, atol) for case in cases):
        raise NotAnswered
    for case in cases:
        expected = right(*copy.deepcopy(case))
        try:
            got = call(mine, case)
        except NotRight as error:
            words = [str(error)]
            fail("\n".join(words + hint(mine, mistakes or {}, case, cases, atol)))
        if difference := differ(expected, got, atol):
            words = [f"{called(mine, case)}: {difference}"]
            wanted, came = brief(expected).replace("nan", "any"), brief(got)
            if wanted != came:
                words += [f"expected: {wanted}", f"got:      {came}"]
            fail("\n".join(words + hint(mine, mistakes or {}, case, cases, atol)))
    forbid(mine, without)


def hint(mine, mistakes, case, cases, atol):
    """The hint for the mistake that explains this case, and most of the others."""
    found = {
        words: sum(alike(wrong, mine, other, atol) for other in cases)
        for words, wrong in mistakes.items()
        if alike(wrong, mine, case, atol)
    }
    return [f"hint: {max(found, key=found.get)}"] if found else []


def value(number, right, mistakes, atol=0.0):
    """Register an exercise whose answer is a number. mistakes: {hint: the number that
    one gets by that mistake}."""

    def judge(mine):
        if difference := differ(right, mine, atol):
            hints = [
                h for h, wrong in mistakes.items() if not differ(wrong, mine, atol)
            ]
            if not hints and kind(mine) != kind(right):
                hints = [difference]  # it should be a number
            fail("\n".join([show(mine), *(f"hint: {hint}" for hint in hints[:1])]))

    judge.right, judge.mistakes, judge.given = right, mistakes, None
    EXERCISES[number] = judge


def choices(number, right, why):
    """Register an exercise whose answer is a dictionary with the keys of `right`.

    why: {key: the hint for those who have it wrong}."""

    def judge(mine):
        if not isinstance(mine, dict) or mine.keys() != right.keys():
            fail(f"hand in the dictionary with the keys {', '.join(map(str, right))}")
        for key, answer in right.items():
            if mine[key] is ...:
                raise NotAnswered
            if difference := differ(answer, mine[key], 0.0):
                told = f": {difference}" if kind(answer) != kind(mine[key]) else ""
                fail(f"{key}: {show(mine[key])} is not right{told}\nhint: {why[key]}")

    wrong = {bool: lambda a: not a, int: lambda a: a + 1, str: lambda a: a + "?"}
    judge.right, judge.given = right, None
    judge.mistakes = {
        why[key]: right | {key: wrong[type(answer)](answer)}
        for key, answer in right.items()
    }
    EXERCISES[number] = judge


def taught(number, right, cases, *, args=(), atol=1e-4):
    """Register a function of a chapter that handouts leave blank, such as 1.rel_shift,
    or a method, such as 0.Layer.forward: then right is the class, made with args.

    cases: tuples of arguments of the function or of the method."""

    def judge(mine):
        name, *method = number.split(".")[1:]
        if not method:
            return by_cases(mine, right, cases, atol=atol)
        theirs, mine = right(*args), call(mine, args)
        with torch.no_grad():
            for n, parameter in enumerate(theirs.parameters()):
                generator = torch.Generator().manual_seed(n)
                parameter.normal_(std=0.5, generator=generator)
        mine.load_state_dict(theirs.state_dict())
        pair = (getattr(module.eval(), method[0]) for module in (mine, theirs))
        return by_cases(*pair, cases, atol=atol)

    TAUGHT[number] = judge


def check(number, *answer):
    """Judge the answer to an exercise: print that it is right, or not answered yet, or
    raise NotRight with the case, what was expected and what came."""
    try:
        print(f"{number}: {judged(number, answer)}")
    except NotAnswered:
        print(f"{number}: not answered yet")


def require(number, *answer):
    """Like `check`, but without an answer the notebook stops here (in handouts)."""
    try:
        print(f"{number}: {judged(number, answer)}")
    except NotAnswered:
        words = f"{number}: your code is still missing. Write it in the cell above"
        raise NotRight(f"{words}, run that cell, then go on from here.") from None


def judged(number, answer):
    known = EXERCISES | TAUGHT
    if number not in known:
        raise ValueError(f"no exercise {number!r}: choose from {', '.join(known)}")
    if unfinished(answer):
        raise NotAnswered
    try:
        with torch.random.fork_rng(devices=[]):  # what comes after draws as before
            remark = known[number](*answer)
    except NotRight as error:
        raise NotRight(f"{number}: not right yet\n{error}") from None
    return f"right{': ' + remark if remark else ''}"


def unfinished(answer):
    """Whether dots are left anywhere in an answer."""
    if isinstance(answer, dict):
        answer = tuple(answer.values())
    if isinstance(answer, (tuple, list)):
        return any(map(unfinished, answer))
    return answer is ...


# ---------------------------------------------------------------- asking the answer


def call(mine, case, copied=True):
    """mine(*case), told in words if it fails."""
    try:
        got = mine(*(copy.deepcopy(case) if copied else case))
    except NotImplementedError:
        raise NotAnswered from None
    except Exception as error:
        if isinstance(error, TypeError) and "ellipsis" in str(error):
            raise NotAnswered from None  # x[t] = ...
        words = f"{called(mine, case)}\nfails with {in_words(error)}"
        raise NotRight(words) from None
    if unfinished(got):
        raise NotAnswered
    if got is None:
        fail(f"{called(mine, case)}\nreturns nothing: is there a `return`?")
    return got


def called(mine, case):
    """The call, as one would write it."""
    return f"{name(mine)}({brief(case)[1:-1]})"


def in_words(error):
    """An exception, and the line in which it came up."""
    lines = [f for f in traceback.extract_tb(error.__traceback__) if f.line]
    others = (str(Path(__file__).parent), str(Path(torch.__file__).parent))
    mine = [f for f in lines if not f.filename.startswith(others)]
    where = f"\nin the line: {mine[-1].line}" if mine else ""
    return f"{type(error).__name__}: {error}{where}"


def name(mine):
    return getattr(mine, "__name__", type(mine).__name__)


def called_by(function, seen=None):
    """The names of all that a Python function calls, in the functions that it calls,
    too, as far as they were written in the same notebook."""
    seen = set() if seen is None else seen
    found, codes = {name(function)}, [getattr(function, "__code__", None)]
    if codes[0] is None or function in seen:
        return found
    seen.add(function)
    while codes:
        code = codes.pop()
        found |= set(code.co_names)
        codes += [c for c in code.co_consts if hasattr(c, "co_names")]
    for other in [function.__globals__.get(n) for n in found]:
        if hasattr(other, "__code__") and other.__module__ == function.__module__:
            found |= called_by(other, seen)
    return found


def forbid(mine, names):
    if used := sorted(called_by(mine) & set(names)):
        fail(f"write it yourself, without {used[0]}")


# ---------------------------------------------------------------- comparing


def differ(expected, got, atol):
    """Words on the first difference between two results; "" if there is none."""
    if isinstance(expected, (tuple, list)):
        if not isinstance(got, (tuple, list)):
            return f"should return {kind(expected)}, and returns {kind(got)}"
        if len(expected) != len(got):
            return f"should return {len(expected)} things, and returns {len(got)}"
        for n, pair in enumerate(zip(expected, got)):
            if difference := differ(*pair, atol):
                return f"number {n}: {difference}"
        return ""
    if isinstance(expected, torch.Tensor):
        return differ_tensors(expected, got, atol)
    if isinstance(expected, (int, float)) and not isinstance(expected, bool):
        if number(got) is None:
            return f"should be a number, and is {kind(got)}"
        got = number(got)
        exact = isinstance(expected, int) and not atol
        same = (
            got == expected
            if exact
            else math.isclose(got, expected, abs_tol=atol, rel_tol=1e-6)
        )
        return "" if same else f"should be {show(expected)}, and is {show(got)}"
    if isinstance(expected, set) and not isinstance(got, set):
        return f"should return a set, and returns {kind(got)}"
    try:
        same = type(got) is type(expected) and bool(got == expected)
    except (RuntimeError, ValueError):  # it holds tensors, say, where numbers belong
        same = False
    return "" if same else f"should be {show(expected)}, and is {show(got)}"


def number(got):
    """A number, or that of a tensor with one; None for all else."""
    if isinstance(got, torch.Tensor) and got.numel() == 1:
        got = got.item()
    told = isinstance(got, Real) and not isinstance(got, bool)  # NumPy's, too
    return got if told else None


def differ_tensors(expected, got, atol):
    try:
        got = torch.as_tensor(got).detach().cpu()
    except (TypeError, ValueError, RuntimeError):
        return f"should be a tensor, and is {kind(got)}"
    if got.shape != expected.shape:
        shapes = f"{tuple(expected.shape)}, and is {tuple(got.shape)}"
        return f"the shape should be {shapes}"
    expected, got = expected.detach().cpu().double(), got.double()
    off = ~expected.isnan() & ~torch.isclose(got, expected, atol=atol, rtol=1e-4)
    if not off.any():
        return ""
    place = tuple(off.nonzero()[0].tolist())
    values = f"{show(expected[place].item())}, and is {show(got[place].item())}"
    return f"at {list(place)} should be {values}" if place else f"should be {values}"


def alike(wrong, mine, case, atol):
    """Whether a known mistake gives the same as mine in this case, or fails alike."""
    got = []
    for function in (wrong, mine):
        try:
            got.append(function(*copy.deepcopy(case)))
        except Exception as error:
            got.append(repr(error))
    try:
        return not differ(*got, atol)
    except Exception:  # they cannot be compared
        return False


# ---------------------------------------------------------------- showing


def kind(value):
    if isinstance(value, torch.Tensor):
        return f"a tensor {tuple(value.shape)}"
    if value is None:
        return "nothing"
    word = type(value).__name__
    return f"{'an' if word[0] in 'aeiou' else 'a'} {word}"


def brief(value, most=500):
    """show(value), or with the shapes of its tensors where that is over `most` long."""
    shown = show(value)
    return shown if len(shown) <= most else show(value, most=0)


def show(value, most=30):
    """A value in few words: tensors of up to `most` numbers in full, else the shape."""
    if isinstance(value, torch.Tensor):
        if value.numel() > most:
            return f"a tensor {tuple(value.shape)}"
        return show(value.tolist())
    if isinstance(value, bool) or value is None:
        return str(value)
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, (tuple, list)):
        inside = ", ".join(show(part, most) for part in value)
        return f"({inside})" if isinstance(value, tuple) else f"[{inside}]"
    if isinstance(value, set):
        return f"{{{', '.join(map(show, sorted(value, key=str)))}}}"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{show(k)}: {show(v)}' for k, v in value.items())}}}"
    if isinstance(value, (int, str)):
        return repr(value)
    if isinstance(value, np.ndarray):
        return show(value.tolist() if value.size <= most else f"an array {value.shape}")
    return name(value)
