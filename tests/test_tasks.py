"""Streams made up as they go: right answers, and a seed that fixes them."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from memtx_minimal import tasks


def test_recall_targets_are_the_latest_values_and_ages_their_distances():
    stream, T = tasks.recall(3, 7, seed=1), 7
    batches = [next(stream) for _ in range(60)]
    for lane in range(3):
        words = [word for tokens, *_ in batches for word in tasks.recall_text(tokens[lane])]
        targets = torch.cat([batch[1][lane] for batch in batches]).tolist()
        ages = torch.cat([batch[3][lane] for batch in batches]).tolist()
        latest = {}
        for n, word in enumerate(words):
            if "=" in word:
                latest[word[0]] = (n, int(word[2]))
            if "?" in word and word[0] in latest:
                said, value = latest[word[0]]
                assert (targets[n], ages[n]) == (value, n - said)
            else:
                assert (targets[n], ages[n]) == (-100, 0)
    assert [batch[2] for batch in batches] == [True] + [False] * 59
    assert all(batch[0].shape == (3, T) and batch[0].max() < tasks.RECALL_VOCAB for batch in batches)


def test_recall_has_the_shares_that_it_promises():
    words = [w for _, (tokens, *_) in zip(range(20), tasks.recall(16, 64)) for row in tokens for w in tasks.recall_text(row)]
    for mark, share in [("=", 0.06), ("?", 0.4), ("-", 0.54)]:
        assert abs(sum(mark in word for word in words) / len(words) - share) < 0.01


def test_a_task_is_the_same_for_a_seed_and_leaves_the_global_generator_alone():
    state = torch.get_rng_state()
    first, again, other = (next(tasks.recall(4, 16, seed)) for seed in (5, 5, 6))
    assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])
    assert not torch.equal(first[0], other[0])
    assert torch.equal(torch.get_rng_state(), state)


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


def test_card_answers_are_those_of_the_game():
    pairs = list(itertools.combinations(range(5), 2))
    tokens, targets, at_start = next(tasks.card(20, 30, seed=1))
    assert tokens.shape == targets.shape == (20, 36) and at_start is True
    assert tokens.max() < tasks.CARD_VOCAB
    for game, answers in zip(tokens.tolist(), targets.tolist()):
        card = dict(divmod(token, 16) for token in game[:5])
        ball = game[5] - 91
        assert sorted(card) == list(range(5)) and answers[:6] == [-100] * 5 + [16 + ball]
        for token, answer in zip(game[6:], answers[6:]):
            if token == 90:
                assert answer == card[ball]
            else:
                a, b = pairs[token - 80]
                ball = {a: b, b: a}.get(ball, ball)
                assert answer == 16 + ball
    asked = (tokens[:, 6:] == 90).float().mean().item()
    assert 0.4 < asked < 0.6


def test_card_is_fixed_by_its_seed():
    first, again, other = (next(tasks.card(4, 6, seed=seed))[0] for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)
