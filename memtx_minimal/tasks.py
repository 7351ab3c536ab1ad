"""Streams with a known right answer, made up as they go: what a memory must hold is known to the token.

Each yields endlessly what `training.train` takes in place of a stream: (tokens, targets, at_start, ...), tokens
and targets (B, T) int64. Targets of -100 do not count.
"""

import torch

NOISE, KEYS, VALUES = 8, 4, 8
RECALL_VOCAB = NOISE + KEYS * VALUES + KEYS  # 44 tokens


def recall(batch_size, segment_len, seed=0):
    """Endless lanes in which values are given to keys and asked for later; chance is 1 / 8.

    Of the tokens 6 % say "this key has now this value" (one token a pair), 40 % ask for a key, and the rest
    is noise. The target of a question is the latest value of its key, 0 ... 7; all other targets, and questions
    before the first answer, are -100. Yields (tokens, targets, at_start, age), (B, T) each but at_start: age is
    how many tokens ago the answer stood, 0 where there is no target.
    """
    dice = torch.Generator().manual_seed(seed)
    latest, since = torch.full((batch_size, KEYS), -100), torch.zeros(batch_size, KEYS, dtype=torch.int64)
    at_start, rows = True, torch.arange(batch_size)
    while True:
        kind = torch.rand(batch_size, segment_len, generator=dice)
        key, value, noise = (
            torch.randint(n, (batch_size, segment_len), generator=dice) for n in (KEYS, VALUES, NOISE)
        )
        says, asks = kind < 0.06, kind > 0.6
        tokens = torch.where(says, NOISE + key * VALUES + value, noise)
        tokens = torch.where(asks, NOISE + KEYS * VALUES + key, tokens)
        targets, ages = torch.full_like(tokens, -100), torch.zeros_like(tokens)
        for t in range(segment_len):
            since += 1
            k, told = key[:, t], says[:, t]
            latest[rows[told], k[told]] = value[told, t]
            since[rows[told], k[told]] = 0
            known = asks[:, t] & (latest[rows, k] >= 0)
            targets[known, t] = latest[rows, k][known]
            ages[known, t] = since[rows, k][known]
        yield tokens, targets, at_start, ages
        at_start = False


def recall_text(tokens):
    """Tokens (T,) of the recall task as words: `b=5` sets a key, `b?` asks for it, `-` is noise."""
    words = []
    for token in tokens.tolist():
        pair = token - NOISE
        if pair < 0:
            words.append("-")
        elif pair < KEYS * VALUES:
            words.append(f"{'abcd'[pair // VALUES]}={pair % VALUES}")
        else:
            words.append(f"{'abcd'[pair - KEYS * VALUES]}?")
    return words


def cups(batch_size, segment_len, n_cups=5, seed=0):
    """A ball lies under the first of n_cups cups; each token swaps two cups, the target is where the ball is then.

    Tokens count the pairs of cups: 0 is (0, 1), 1 is (0, 2) and so on, n_cups * (n_cups - 1) / 2 in all. Each
    segment is a game of its own. Fan et al. test models with tasks of this kind: the order of the swaps matters,
    so counting them is not enough.
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


PLACES, COLOURS, LETTERS = 5, 2, 8
CARD_VOCAB = PLACES * COLOURS * LETTERS + 10 + COLOURS  # 92 tokens: entries, swaps, colours


def card(batch_size, n_events, seed=0):
    """Cups with a card: where the ball is must be worked out, what lies there looked up.

    A game begins with a card of PLACES * COLOURS entries in random order, one token each:
    "at this place, this colour has this letter". Then n_events follow, half of them swaps
    of two cups, as in `cups`, half of them colours. The target of a swap is the place of
    the ball, LETTERS + 0 ... 4; that of a colour is the letter that the card gives for it
    at the place where the ball is, 0 ... 7. Entries have no target. Each segment is a game
    of its own. Yields (tokens, targets, at_start), T = 10 + n_events.
    """
    pairs = torch.combinations(torch.arange(PLACES))
    dice, n = torch.Generator().manual_seed(seed), PLACES * COLOURS
    while True:
        letters = torch.randint(LETTERS, (batch_size, n), generator=dice)
        order = torch.rand(batch_size, n, generator=dice).argsort(dim=1)
        entries = (torch.arange(n) * LETTERS + letters).gather(1, order)
        swap, colour = (
            torch.randint(k, (batch_size, n_events), generator=dice)
            for k in (len(pairs), COLOURS)
        )
        asks = torch.rand(batch_size, n_events, generator=dice) < 0.5
        events = torch.where(asks, len(pairs) + colour, swap) + n * LETTERS
        ball, targets = torch.zeros(batch_size, dtype=torch.int64), []
        for t in range(n_events):
            a, b = pairs[swap[:, t]].T  # (B,) each
            moved = torch.where(ball == a, b, torch.where(ball == b, a, ball))
            ball = torch.where(asks[:, t], ball, moved)
            letter = letters.gather(1, (ball * COLOURS + colour[:, t])[:, None])[:, 0]
            targets.append(torch.where(asks[:, t], letter, LETTERS + ball))
        nothing = torch.full_like(entries, -100)
        tokens = torch.cat([entries, events], dim=1)  # (B, 10 + n_events)
        yield tokens, torch.cat([nothing, torch.stack(targets, dim=1)], dim=1), True
