"""Streams with a known right answer, made up as they go: what a memory must hold is known to the token.

Each yields endlessly what `training.train` takes in place of a stream: (tokens, targets, at_start), tokens and
targets (B, T) int64. Targets of -100 do not count.
"""

import torch


def duplicate(*, batch_size=32, length=64, n_symbols=63, seed=0):
    """The task of the Reformer paper, section 5: 0 w 0 w, where w is length / 2 - 1 random symbols.

    Symbols are 1 ... n_symbols, so the vocabulary has n_symbols + 1. Only the second w is to be predicted:
    each of its tokens stands length / 2 before, for those who can look there.
    """
    if length < 4 or length % 2:
        raise ValueError(f"{length=} is not an even number from 4 on")
    generator = torch.Generator().manual_seed(seed)
    half = length // 2
    while True:
        w = torch.randint(1, n_symbols + 1, (batch_size, half), generator=generator)
        w[:, 0] = 0
        tokens = torch.cat([w, w], dim=1)  # (B, length)
        targets = torch.full_like(tokens, -100)
        targets[:, half:-1] = tokens[:, half + 1 :]
        yield tokens, targets, True
