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
