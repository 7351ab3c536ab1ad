"""The made-up tasks: their targets are what a careful reader would answer."""

import torch

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
