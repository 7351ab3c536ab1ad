"""The checks of the exercises pass what is right, and say what is wrong with the rest."""

import pytest
import torch

from memtx_minimal import exercises
from memtx_minimal.feedback_transformer import FeedbackTransformer, step


@pytest.fixture
def model():
    torch.manual_seed(0)
    return FeedbackTransformer(10, 16, 2, 2, 32, mem_len=6).double()


def blocks(model, x, kv, C, window=True):
    outputs, vectors = [], []
    for x_c in x.split(C, dim=1):
        n = x_c.size(1)
        together = x_c.flatten(0, 1), kv.repeat_interleave(n, dim=0)
        output, vector = (y.unflatten(0, (-1, n)) for y in step(model, *together))
        kv = torch.cat([kv, model.memory.keys_values(vector)], dim=1)
        kv = kv[:, -model.mem_len :] if window else kv
        outputs.append(output)
        vectors.append(vector)
    return torch.cat(outputs, dim=1), torch.cat(vectors, dim=1), kv


def test_clock():
    exercises.check_clock(lambda L, n, kind: L if kind == "vanilla" else L * (n + 1))
    with pytest.raises(AssertionError, match=r"my_clock\(4, 0, 'vanilla'\) is 1; 4 layers"):
        exercises.check_clock(lambda L, n, kind: min(L, n + 1) if kind == "vanilla" else L * (n + 1))


def test_tracker(model):
    with pytest.raises(AssertionError, match="mem_len is 6, not 1"):
        exercises.check_tracker(model)
    with pytest.raises(AssertionError, match="above 0.9"):
        exercises.check_tracker(FeedbackTransformer(10, 16, 2, 1, 32, mem_len=1))


def test_blocks(model):
    exercises.check_blocks(blocks, model)
    with pytest.raises(AssertionError, match="C = 4: token 4 has an effect on"):
        exercises.check_blocks(lambda model, x, kv, C: blocks(model, x, kv, 1), model)
    with pytest.raises(AssertionError, match="with C = 1 not those of loop"):
        exercises.check_blocks(lambda *a: tuple(2 * y for y in blocks(*a)), model)


# ---------------------------------------------------------------- chapter 4


def sets(buckets, c, before=(0, 1)):
    order = sorted(range(len(buckets)), key=lambda i: (buckets[i], i))
    chunk = {i: place // c for place, i in enumerate(order)}
    near = lambda i, j: chunk[i] - chunk[j] in before and buckets[i] == buckets[j]
    return [[j for j in range(i + 1) if near(i, j)] for i in range(len(buckets))]


def test_sets():
    exercises.check_sets(sets)
    for wrong in (lambda h, c: sets(h, c, (0,)), lambda h, c: sets([0] * len(h), c)):
        with pytest.raises(AssertionError, match="the set of"):
            exercises.check_sets(wrong)


def test_once():
    exercises.check_once([2.3, 2.2, 2.1, 2.0], [2.3, 2.25, 2.15, 2.05])
    with pytest.raises(AssertionError, match="finds no key twice"):
        exercises.check_once([2.3, 2.2, 2.1, 2.0], [2.4, 2.25, 2.15, 2.05])
    with pytest.raises(AssertionError, match="switched"):
        exercises.check_once([2.3, 2.2, 2.1, 2.0], [2.3, 2.2, 2.1, 2.0])
    with pytest.raises(AssertionError, match="two lists of four"):
        exercises.check_once([2.3], [2.3])


def test_broken():
    exercises.check_broken(0.2)
    with pytest.raises(AssertionError, match="other numbers are dropped"):
        exercises.check_broken(1e-12)


def test_places():
    places = lambda h, c: sum(c * -(-h.count(b) // c) for b in set(h))
    exercises.check_places(places)
    with pytest.raises(AssertionError, match="1024 places for"):
        exercises.check_places(lambda h, c: len(h))


# ---------------------------------------------------------------- appendix B


def test_pair():
    exercises.check_pair(((1, 0), (0, 0)))
    for wrong, why in [
        (((0, 1), (0, 0)), "buckets must differ"),
        (((1, 0), (0, 1)), "never lies in an earlier chunk"),
        (((1, 1), (0, 0)), "differ by 2"),
    ]:
        with pytest.raises(AssertionError, match=why):
            exercises.check_pair(wrong)


def test_rounds():
    def add(tops, totals, outs, top=None):
        tops, totals, outs = map(torch.stack, (tops, totals, outs))
        share = (tops - tops.amax(dim=0)).exp2() if top is None else top
        return (share * outs).sum(dim=0) / (share * totals).sum(dim=0)

    exercises.check_rounds(add)
    with pytest.raises(AssertionError, match="one largest score"):
        exercises.check_rounds(lambda *rounds: add(*rounds, top=1.0))
