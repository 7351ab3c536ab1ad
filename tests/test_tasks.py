"""Streams made up as they go: right answers, and a seed that fixes them."""

import hashlib
import itertools
import re

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from memtx_minimal import tasks


def test_recall_targets_are_the_latest_values_and_ages_their_distances():
    stream, T = tasks.recall(3, 7, seed=1), 7
    batches = [next(stream) for _ in range(60)]
    for lane in range(3):
        words = [w for tokens, *_ in batches for w in tasks.recall_text(tokens[lane])]
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
    for tokens, *_ in batches:
        assert tokens.shape == (3, T) and tokens.max() < tasks.RECALL_VOCAB


def test_recall_has_the_shares_that_it_promises():
    batches = itertools.islice(tasks.recall(16, 64), 20)
    rows = [row for tokens, *_ in batches for row in tokens]
    words = [word for row in rows for word in tasks.recall_text(row)]
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
    assert tokens.shape == targets.shape == (20, 12) and at_start
    assert tokens.dtype == targets.dtype == torch.int64
    assert int(tokens.max()) < len(pairs)
    for game, answers in zip(tokens.tolist(), targets.tolist()):
        cups = ["ball"] + ["nothing"] * (n_cups - 1)
        for token, answer in zip(game, answers):
            a, b = pairs[token]
            cups[a], cups[b] = cups[b], cups[a]
            assert cups[answer] == "ball"


def test_cups_have_every_swap_and_every_place():
    tokens, targets, _ = next(tasks.cups(500, 16))
    assert tokens.unique().tolist() == list(range(10))
    assert targets.unique().tolist() == list(range(5))
    last = torch.bincount(targets[:, -1], minlength=5)
    assert last.min() > 60  # no place to guess after many swaps


def test_cups_repeat_with_a_seed_and_differ_without():
    def some(seed):
        games = itertools.islice(tasks.cups(4, 6, seed=seed), 3)
        return torch.stack([tokens for tokens, _, _ in games])

    torch.manual_seed(7)
    first = some(1)
    torch.manual_seed(8)
    assert torch.equal(first, some(1))
    assert not torch.equal(first, some(2)) and not torch.equal(first[0], first[1])


@given(
    batch_size=st.integers(1, 4),
    half=st.integers(2, 20),
    n_symbols=st.integers(1, 9),
    seed=st.integers(0, 99),
)
def test_duplicate_says_everything_twice(batch_size, half, n_symbols, seed):
    sizes = dict(batch_size=batch_size, length=2 * half, n_symbols=n_symbols)
    stream = tasks.duplicate(**sizes, seed=seed)
    for tokens, targets, at_start in itertools.islice(stream, 3):
        assert tokens.shape == targets.shape == (batch_size, 2 * half)
        assert tokens.dtype == torch.int64 and at_start is True
        assert torch.equal(tokens[:, :half], tokens[:, half:])
        assert (tokens[:, 0] == 0).all()
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


# ---------------------------------------------------------------- echo


@pytest.mark.parametrize("T, lag", [(4, 4), (4, 3), (3, 7), (1, 1)])
def test_echo_asks_for_what_stood_lag_tokens_ago(T, lag):
    batches = list(itertools.islice(tasks.echo(3, T, lag, n_symbols=5, seed=1), 9))
    tokens, targets = (torch.cat(parts, dim=1) for parts in list(zip(*batches))[:2])
    assert tokens.shape == targets.shape == (3, 9 * T)
    assert (targets[:, :lag] == -100).all()
    assert torch.equal(targets[:, lag:], tokens[:, :-lag])
    assert tokens.min() >= 0 and tokens.max() < 5
    assert [batch[2] for batch in batches] == [True] + [False] * 8


def test_echo_is_fixed_by_its_seed():
    before = torch.get_rng_state()
    first, again, other = (next(tasks.echo(4, 6, 6, seed=s))[0] for s in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert torch.equal(before, torch.get_rng_state())


# ---------------------------------------------------------------- card


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


# ---------------------------------------------------------------- all of them


TASKS = {
    "recall": lambda **odd: tasks.recall(**dict(batch_size=2, segment_len=8) | odd),
    "echo": lambda **odd: tasks.echo(**dict(batch_size=2, segment_len=8, lag=5) | odd),
    "cups": lambda **odd: tasks.cups(**dict(batch_size=2, segment_len=8) | odd),
    "duplicate": lambda **odd: tasks.duplicate(**dict(batch_size=2, length=8) | odd),
    "card": lambda **odd: tasks.card(**dict(batch_size=2, n_events=8) | odd),
}


def digest(stream):
    """A hash of the first five segments."""
    parts = [part for batch in itertools.islice(stream, 5) for part in batch]
    whole = b"".join(np.asarray(part, dtype=np.int64).tobytes() for part in parts)
    return hashlib.sha256(whole).hexdigest()[:16]


@pytest.mark.parametrize(
    "name, odd, expected",
    [
        ("recall", dict(), "5e0fd09d58c4713d"),
        ("recall", dict(seed=7, batch_size=3), "d8b0acdd53e9e150"),
        ("cups", dict(), "45779e6f11908d4a"),
        ("cups", dict(n_cups=2, seed=2**64 - 1), "a7a8d03818194c57"),
        ("cups", dict(n_cups=7, seed=3), "968b4cd057fb9bf1"),
        ("duplicate", dict(), "04e33325599dd914"),
        ("duplicate", dict(n_symbols=1, length=4, seed=5), "330dc420b5b7c944"),
    ],
)
def test_a_seed_gives_the_stream_that_it_always_gave(name, odd, expected):
    assert digest(TASKS[name](**odd)) == expected


@pytest.mark.parametrize(
    "name, odd, message",
    [
        ("echo", dict(lag=0), "lag=0 is not a whole number >= 1"),
        ("echo", dict(lag=2.5), "lag=2.5"),
        ("echo", dict(n_symbols=0), "n_symbols=0 is not a whole number >= 1"),
        ("cups", dict(n_cups=1), "n_cups=1 is not a whole number >= 2"),
        ("cups", dict(n_cups=0), "n_cups=0"),
        ("cups", dict(n_cups=-3), "n_cups=-3"),
        ("cups", dict(n_cups=5.0), "n_cups=5.0"),
        ("cups", dict(n_cups=True), "n_cups=True"),
        ("cups", dict(segment_len=0), "segment_len=0 is not a whole number >= 1"),
        ("recall", dict(segment_len=0), "segment_len=0 is not a whole number >= 1"),
        ("recall", dict(segment_len="8"), "segment_len='8'"),
        ("duplicate", dict(length=2), "length=2 is not a whole number >= 4"),
        ("duplicate", dict(length=7), "length=7 is odd: use 6 or 8"),
        ("duplicate", dict(length=8.0), "length=8.0"),
        ("duplicate", dict(n_symbols=0), "n_symbols=0 is not a whole number >= 1"),
        ("duplicate", dict(n_symbols=1.5), "n_symbols=1.5"),
        ("card", dict(n_events=-1), "n_events=-1 is not a whole number >= 0"),
        *(
            (name, dict(batch_size=B), f"batch_size={B} ")
            for name in TASKS
            for B in (0, -1, 2.0, None)
        ),
        *(
            (name, dict(seed=seed), f"seed={seed} ")
            for name in TASKS
            for seed in (None, 1.5, True, -1)
        ),
    ],
)
def test_sizes_and_seeds_that_cannot_work_are_refused_at_the_call(name, odd, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        TASKS[name](**odd)  # before anything is asked for


@pytest.mark.parametrize("name", TASKS)
def test_numpy_integers_are_whole_numbers(name):
    lengths = {"duplicate": "length", "card": "n_events"}
    length = lengths.get(name, "segment_len")
    small = dict(batch_size=np.uint8(2), seed=np.int64(3)) | {length: np.int32(8)}
    if name == "duplicate":
        small["n_symbols"] = np.uint8(255)  # one more would not fit
    if name == "cups":
        small["n_cups"] = np.int16(4)
    plain = {size: int(value) for size, value in small.items()}
    assert digest(TASKS[name](**small)) == digest(TASKS[name](**plain))


def test_all_take_their_sizes_in_order():
    assert digest(tasks.recall(2, 8, 3)) == digest(TASKS["recall"](seed=3))
    assert digest(tasks.cups(2, 8, 4, 3)) == digest(TASKS["cups"](n_cups=4, seed=3))
    assert digest(tasks.duplicate(2, 8, 9, 3)) == digest(
        TASKS["duplicate"](n_symbols=9, seed=3)
    )


@pytest.mark.parametrize(
    "tokens", [torch.tensor([0, 8, 40]), [0, 8, 40], np.array([0, 8, 40])]
)
def test_recall_text_reads_a_row(tokens):
    assert tasks.recall_text(tokens) == ["-", "a=0", "a?"]


@pytest.mark.parametrize(
    "tokens, message",
    [
        (torch.zeros(2, 3, dtype=torch.int64), r"\(T,\), integers, a batch row by row"),
        (torch.tensor(3), r"not torch.int64 of shape \(\)"),
        (torch.zeros(3), r"not torch.float32 of shape \(3,\)"),
        (torch.tensor([3, 44]), "token 44: recall has 0 ... 43"),
        (torch.tensor([-100]), "token -100"),
    ],
)
def test_recall_text_refuses_what_it_cannot_read(tokens, message):
    with pytest.raises(ValueError, match=message):
        tasks.recall_text(tokens)
