"""Streams made up as they go: what must be remembered stands where they say."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from memtx_minimal import tasks


@given(batch_size=st.integers(1, 4), half=st.integers(2, 20), n_symbols=st.integers(1, 9), seed=st.integers(0, 99))
def test_duplicate_says_everything_twice(batch_size, half, n_symbols, seed):
    stream = tasks.duplicate(batch_size=batch_size, length=2 * half, n_symbols=n_symbols, seed=seed)
    for tokens, targets, at_start in itertools.islice(stream, 3):
        assert tokens.shape == targets.shape == (batch_size, 2 * half) and tokens.dtype == torch.int64 and at_start is True
        assert torch.equal(tokens[:, :half], tokens[:, half:]) and (tokens[:, 0] == 0).all()
        assert tokens[:, 1:half].min() >= 1 and tokens.max() <= n_symbols
        counts = targets != -100
        assert counts[:, half:-1].all() and counts.sum() == batch_size * (half - 1)
        assert torch.equal(targets[:, half:-1], tokens[:, half + 1 :])


def test_duplicate_is_made_of_its_seed_alone():
    first = [next(tasks.duplicate(seed=seed))[0] for seed in (0, 0, 1)]
    assert torch.equal(first[0], first[1]) and not torch.equal(first[0], first[2])
    stream, before = tasks.duplicate(), torch.get_rng_state()
    a, b = next(stream)[0], next(stream)[0]
    assert not torch.equal(a, b) and torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("length", [2, 7])
def test_duplicate_needs_two_halves(length):
    with pytest.raises(ValueError, match="even number"):
        next(tasks.duplicate(length=length))
