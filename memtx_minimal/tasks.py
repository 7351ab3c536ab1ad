"""Streams with a known right answer, made up as they go.

What a memory must hold is known to the token. Each task yields endlessly what
`training.train` takes in place of a stream: (tokens, targets, at_start, ...), tokens
and targets (B, T) int64. Targets of -100 do not count. The same seed, 0, 1, 2 ...,
gives the same stream. Sizes and seeds that cannot work are a ValueError at the call.
"""

import torch

from memtx_minimal import inputs

NOISE, KEYS, VALUES = 8, 4, 8
RECALL_VOCAB = NOISE + KEYS * VALUES + KEYS  # 44 tokens


def recall(batch_size, segment_len, seed=0):
    """Endless lanes in which values are given to keys and asked for later.

    Of the tokens 6 % say "this key has now this value" (one token a pair), 40 % ask for
    a key, and the rest is noise. The target of a question is the latest value of its
    key, 0 ... 7, so chance is 1 / 8; all other targets, and those of questions before
    the first answer, are -100. Yields (tokens, targets, at_start, age), (B, T) each but
    at_start: age is how many tokens ago the answer stood, 0 where there is no target.
    """
    sizes = {"batch_size": batch_size, "segment_len": segment_len, "seed": seed}
    inputs.check_sizes(sizes)
    B, T = int(batch_size), int(segment_len)
    generator = torch.Generator().manual_seed(int(seed))

    def stream():
        latest = torch.full((B, KEYS), -100)
        since = torch.zeros(B, KEYS, dtype=torch.int64)
        at_start, rows = True, torch.arange(B)
        while True:
            kind = torch.rand(B, T, generator=generator)
            key, value, noise = (
                torch.randint(n, (B, T), generator=generator)
                for n in (KEYS, VALUES, NOISE)
            )
            says, asks = kind < 0.06, kind > 0.6
            tokens = torch.where(says, NOISE + key * VALUES + value, noise)
            tokens = torch.where(asks, NOISE + KEYS * VALUES + key, tokens)
            targets, ages = torch.full_like(tokens, -100), torch.zeros_like(tokens)
            for t in range(T):
                since += 1
                k, told = key[:, t], says[:, t]
                latest[rows[told], k[told]] = value[told, t]
                since[rows[told], k[told]] = 0
                known = asks[:, t] & (latest[rows, k] >= 0)
                targets[known, t] = latest[rows, k][known]
                ages[known, t] = since[rows, k][known]
            yield tokens, targets, at_start, ages
            at_start = False

    return stream()


def recall_text(tokens):
    """Tokens (T,) of the recall task as words.

    `b=5` sets a key, `b?` asks for it, `-` is noise. ValueError for tokens that are not
    a row of integers 0 ... RECALL_VOCAB - 1.
    """
    tokens = torch.as_tensor(tokens)
    if tokens.dim() != 1 or tokens.is_floating_point():
        form = f"{tokens.dtype} of shape {tuple(tokens.shape)}"
        raise ValueError(f"pass tokens (T,), integers, a batch row by row; not {form}")
    words = []
    for token in tokens.tolist():
        if not 0 <= token < RECALL_VOCAB:
            raise ValueError(f"token {token}: recall has 0 ... {RECALL_VOCAB - 1}")
        pair = token - NOISE
        if pair < 0:
            words.append("-")
        elif pair < KEYS * VALUES:
            words.append(f"{'abcd'[pair // VALUES]}={pair % VALUES}")
        else:
            words.append(f"{'abcd'[pair - KEYS * VALUES]}?")
    return words


def echo(batch_size, segment_len, lag, n_symbols=8, seed=0):
    """Endless lanes of random symbols: which one stood `lag` tokens ago?

    The target of each token is the symbol `lag` places before it in its lane; the first
    `lag` targets are -100. Chance is 1 / n_symbols, and nothing but the one token helps:
    who cannot look so far back can only guess. With lag = segment_len the answer never
    stands in the segment of the question.
    """
    sizes = {"batch_size": batch_size, "segment_len": segment_len, "lag": lag}
    inputs.check_sizes(sizes | {"n_symbols": n_symbols, "seed": seed})
    B, T, lag = int(batch_size), int(segment_len), int(lag)
    generator = torch.Generator().manual_seed(int(seed))

    def stream():
        past, at_start = torch.full((B, lag), -100), True  # the latest symbols
        while True:
            tokens = torch.randint(int(n_symbols), (B, T), generator=generator)
            past = torch.cat([past, tokens], dim=1)  # (B, lag + T)
            yield tokens, past[:, :T], at_start
            past, at_start = past[:, T:], False

    return stream()


def cups(batch_size, segment_len, n_cups=5, seed=0):
    """A ball lies under the first of n_cups cups, cups are swapped: where is it then?

    Each token swaps two cups, the target is where the ball is afterwards. Tokens count
    the pairs of cups: 0 is (0, 1), 1 is (0, 2) and so on, n_cups * (n_cups - 1) / 2 in
    all. Each segment is a game of its own. Fan et al. test models with tasks of this
    kind: the order of the swaps matters, so counting them is not enough.
    """
    sizes = {"batch_size": batch_size, "segment_len": segment_len, "n_cups": n_cups}
    inputs.check_sizes(sizes | {"seed": seed})
    B, T = int(batch_size), int(segment_len)
    generator = torch.Generator().manual_seed(int(seed))
    pairs = torch.combinations(torch.arange(int(n_cups)))  # (pairs, 2)

    def stream():
        while True:
            tokens = torch.randint(len(pairs), (B, T), generator=generator)
            ball, targets = torch.zeros(B, dtype=torch.int64), []
            swaps = pairs[tokens].permute(2, 1, 0)  # (2, T, B)
            for a, b in zip(*swaps):  # (B,) each, one step of all games
                others = torch.where(ball == b, a, ball)
                ball = torch.where(ball == a, b, others)  # (B,)
                targets.append(ball)
            yield tokens, torch.stack(targets, dim=1), True

    return stream()


def duplicate(batch_size=32, length=64, n_symbols=63, seed=0):
    """The task of the Reformer paper, section 5: 0 s 0 s.

    s is length / 2 - 1 random symbols, so length is even, 4 or more. Symbols are
    1 ... n_symbols, so the vocabulary has n_symbols + 1. Only the second s is to be
    predicted: each of its tokens stands length / 2 before, for those who can look so
    far back.
    """
    sizes = {"batch_size": batch_size, "length": length, "n_symbols": n_symbols}
    inputs.check_sizes(sizes | {"seed": seed}, even=["length"])
    B, half = int(batch_size), int(length) // 2
    generator = torch.Generator().manual_seed(int(seed))

    def stream():
        while True:
            s = torch.randint(1, int(n_symbols) + 1, (B, half), generator=generator)
            s[:, 0] = 0
            tokens = torch.cat([s, s], dim=1)  # (B, length)
            targets = torch.full_like(tokens, -100)
            targets[:, half:-1] = tokens[:, half + 1 :]
            yield tokens, targets, True

    return stream()


PLACES, LETTERS = 5, 16
CARD_VOCAB = PLACES * LETTERS + 10 + 1 + PLACES  # 96: entries, swaps, question, starts


def card(batch_size, n_events, seed=0):
    """Cups with a card: where the ball is must be worked out, what lies there looked up.

    A game begins with a card: one entry for each of five places, in random order, that
    gives it one of 16 letters. A token says where the ball starts. Then n_events follow:
    swaps of two cups, as in `cups`, and, for one half, the question "which letter has the
    ball's place now?". The target of a question is the letter, 0 ... 15; that of the
    start and of a swap is the ball's place, LETTERS + 0 ... 4; entries have none. Each
    segment is a game of its own, T = 6 + n_events.
    """
    sizes = {"batch_size": batch_size, "n_events": n_events, "seed": seed}
    inputs.check_sizes(sizes)
    B, dice = int(batch_size), torch.Generator().manual_seed(int(seed))
    pairs, rows = torch.combinations(torch.arange(PLACES)), torch.arange(B)

    def stream():
        while True:
            letters = torch.randint(LETTERS, (B, PLACES), generator=dice)
            order = torch.rand(B, PLACES, generator=dice).argsort(dim=1)
            entries = (torch.arange(PLACES) * LETTERS + letters).gather(1, order)
            ball = torch.randint(PLACES, (B,), generator=dice)
            swaps = torch.randint(len(pairs), (B, int(n_events)), generator=dice)
            asks = torch.rand(B, int(n_events), generator=dice) < 0.5
            events = torch.where(asks, len(pairs), swaps) + PLACES * LETTERS
            start = ball + PLACES * LETTERS + len(pairs) + 1
            targets = [*torch.full((PLACES, B), -100), LETTERS + ball]
            for t in range(int(n_events)):
                a, b = pairs[swaps[:, t]].T  # (B,) each
                others = torch.where(ball == b, a, ball)
                moved = torch.where(ball == a, b, others)
                ball = torch.where(asks[:, t], ball, moved)
                letter = letters[rows, ball]
                targets.append(torch.where(asks[:, t], letter, LETTERS + ball))
            tokens = torch.cat([entries, start[:, None], events], dim=1)
            yield tokens, torch.stack(targets, dim=1), True  # (B, 6 + n_events) each

    return stream()
