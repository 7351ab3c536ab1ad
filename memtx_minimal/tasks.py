"""Streams with a known right answer, made up as they go: what a memory must hold is known to the token.

Each yields endlessly what `training.train` takes in place of a stream: (tokens, targets, at_start), tokens and
targets (B, T) int64. Targets of -100 do not count.
"""

import torch


def cups(batch_size, segment_len, n_cups=5, seed=0):
    """A ball lies under the first of n_cups cups; each token swaps two cups, the target is where the ball is then.

    Tokens count the pairs of cups: 0 is (0, 1), 1 is (0, 2) and so on, n_cups * (n_cups - 1) / 2 in all. Each
    segment is a game of its own. Fan et al. test models with tasks of this kind: there is no shorter way to the
    answer than to follow the ball.
    """
    pairs = torch.combinations(torch.arange(n_cups))  # (pairs, 2)
    generator = torch.Generator().manual_seed(seed)
    while True:
        tokens = torch.randint(len(pairs), (batch_size, segment_len), generator=generator)
        ball, targets = torch.zeros(batch_size, dtype=torch.int64), []
        for a, b in zip(*pairs[tokens].permute(2, 1, 0)):  # (B,) each, one step of all games
            ball = torch.where(ball == a, b, torch.where(ball == b, a, ball))  # (B,)
            targets.append(ball)
        yield tokens, torch.stack(targets, dim=1), True
