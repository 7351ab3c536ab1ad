"""Streams made up as they go: right answers, and a seed that fixes them."""

import itertools

import pytest
import torch

from memtx_minimal import tasks


@pytest.mark.parametrize("n_cups", [2, 3, 5])
def test_cups_follow_the_ball(n_cups):
    """Against a table of cups that are swapped one pair after the other."""
    pairs = list(itertools.combinations(range(n_cups), 2))
    tokens, targets, at_start = next(tasks.cups(20, 12, n_cups=n_cups, seed=3))
    assert tokens.shape == targets.shape == (20, 12) and tokens.dtype == targets.dtype == torch.int64 and at_start
    assert int(tokens.max()) < len(pairs)
    for game, answers in zip(tokens.tolist(), targets.tolist()):
        cups = ["ball"] + ["nothing"] * (n_cups - 1)
        for token, answer in zip(game, answers):
            a, b = pairs[token]
            cups[a], cups[b] = cups[b], cups[a]
            assert cups[answer] == "ball"


def test_cups_have_every_swap_and_every_place():
    tokens, targets, _ = next(tasks.cups(500, 16))
    assert tokens.unique().tolist() == list(range(10)) and targets.unique().tolist() == list(range(5))
    assert torch.bincount(targets[:, -1], minlength=5).min() > 60  # no place to guess after many swaps


def test_cups_repeat_with_a_seed_and_differ_without():
    def some(seed):
        return torch.stack([tokens for tokens, _, _ in itertools.islice(tasks.cups(4, 6, seed=seed), 3)])

    torch.manual_seed(7)
    first = some(1)
    torch.manual_seed(8)
    assert torch.equal(first, some(1)) and not torch.equal(first, some(2)) and not torch.equal(first[0], first[1])
