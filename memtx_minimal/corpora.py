"""Text to train on: where it comes from, how it becomes numbers, and how it is cut into lanes.

    corpus = tiny_shakespeare()                         # or synthetic_play(), or Corpus.from_text(name, text)
    for tokens, targets in lanes(corpus.train, batch_size=16, segment_len=64):
        ...                                             # (16, 64) each, int64; every segment continues the one before

Shapes: N tokens in a stream, B lanes side by side, T tokens in a segment.
"""

import hashlib
import os
import random
import warnings
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pooch
import torch
from requests import RequestException  # what pooch raises when the network fails; pooch depends on requests
from torch import Tensor
from tqdm import tqdm

FILE_NAME = "tinyshakespeare.txt"
URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
CONNECT_SECONDS, READ_SECONDS = 5, 20  # patience with the server: to answer at all, and between two pieces


class SyntheticTextWarning(UserWarning):
    """Tiny Shakespeare could not be downloaded; the corpus is the synthetic play instead."""


# ---------------------------------------------------------------- characters and numbers


class Vocabulary:
    """The distinct characters of `text`, sorted; a character's token is its place in that order.

    Raises ValueError if `text` is empty.
    """

    def __init__(self, text: str):
        if not text:
            raise ValueError("a vocabulary needs a text with at least one character, this one is empty")
        self.characters = "".join(sorted(set(text)))
        self._token_of = {character: token for token, character in enumerate(self.characters)}

    def __len__(self) -> int:
        return len(self.characters)

    def __repr__(self) -> str:
        return f"<Vocabulary of {len(self)} characters: {self.characters!r}>"

    def encode(self, text: str) -> Tensor:
        """The tokens of `text`: (len(text),) int64. Raises ValueError at the first unknown character."""
        try:
            return torch.tensor([self._token_of[character] for character in text], dtype=torch.int64)
        except KeyError:
            index = next(i for i, character in enumerate(text) if character not in self._token_of)
        line, column = text.count("\n", 0, index) + 1, index - text.rfind("\n", 0, index)
        raise ValueError(
            f"unknown character {text[index]!r} at index {index} (line {line}, column {column}); "
            f"this vocabulary knows {len(self)} characters: {self.characters!r}"
        )

    def decode(self, tokens: Tensor | Sequence[int]) -> str:
        """The text of `tokens`: (N,) integers, a tensor on any device or a list. Raises ValueError for any other
        shape or type, and for a token outside 0 ... len(self) - 1."""
        if isinstance(tokens, Tensor):
            if tokens.dim() != 1 or tokens.is_floating_point():
                raise ValueError(
                    f"decode takes integer tokens in one dimension (N,), not {tokens.dtype} of shape "
                    f"{tuple(tokens.shape)}: decode a batch row by row"
                )
            tokens = tokens.tolist()
        for index, token in enumerate(tokens):
            if not 0 <= token < len(self):
                raise ValueError(f"token {token} at index {index} is out of range: valid are 0 ... {len(self) - 1}")
        return "".join(self.characters[token] for token in tokens)


@dataclass(frozen=True, eq=False)
class Corpus:
    """A text and its tokens, the first part to train on and the rest to validate on.

    name   what figures call it, such as "Tiny Shakespeare" or "synthetic play"
    text   the whole text            vocab  its characters
    train  (N,) int64                valid  (N',) int64; train followed by valid is the whole text
    """

    name: str
    text: str
    vocab: Vocabulary
    train: Tensor
    valid: Tensor

    @classmethod
    def from_text(cls, name: str, text: str, valid_fraction: float = 0.1) -> "Corpus":
        """Encode `text` and keep its last `valid_fraction` (0 to 1) for validation. Raises ValueError if the text is
        empty or a part would hold fewer than two tokens, the least that has something to predict."""
        vocab = Vocabulary(text)
        n_train = len(text) - round(len(text) * valid_fraction)
        if n_train < 2 or len(text) - n_train < 2:
            raise ValueError(
                f"valid_fraction {valid_fraction} splits {len(text)} characters into {n_train} for training and "
                f"{len(text) - n_train} for validation: each part needs at least 2"
            )
        tokens = vocab.encode(text)
        return cls(name, text, vocab, tokens[:n_train], tokens[n_train:])

    def __repr__(self) -> str:
        return (
            f"<{self.name}: {len(self.text):,} characters, {len(self.vocab)} distinct; "
            f"{len(self.train):,} to train on, {len(self.valid):,} to validate on>"
        )


# ---------------------------------------------------------------- Tiny Shakespeare


def tiny_shakespeare(valid_fraction: float = 0.1) -> Corpus:
    """Tiny Shakespeare: 1,115,394 characters, 65 distinct, checked against its SHA-256.

    Looked for in the folder that the environment variable MEMTX_DATA_DIR names, if it is set; else in the user's
    cache (MEMTX_CACHE_DIR moves it); else downloaded into the cache. If the download fails, warns with
    SyntheticTextWarning and returns `synthetic_play()`: the corpus's name says which text it is.

    Raises FileNotFoundError if MEMTX_DATA_DIR does not hold the file, OSError if a file cannot be read or written,
    ValueError if its content is empty or not the published one.
    """
    data_folder = os.environ.get("MEMTX_DATA_DIR")
    if data_folder:
        path = Path(data_folder).expanduser() / FILE_NAME
        if not path.exists():
            raise FileNotFoundError(
                f"MEMTX_DATA_DIR is set to {data_folder!r}, but there is no {path}: "
                f"put the file of {URL} there under that name, or unset MEMTX_DATA_DIR"
            )
    else:
        path = Path(os.environ.get("MEMTX_CACHE_DIR") or pooch.os_cache("memtx_minimal")).expanduser() / FILE_NAME
        if not path.exists():
            try:
                _download(path)
            except RequestException as error:
                warnings.warn(
                    f"NOT SHAKESPEARE. Tiny Shakespeare could not be downloaded from {URL} ({error}). The synthetic "
                    "play is used instead, a text that the code writes itself, and every number and figure will "
                    f"differ. For the real text, save that file as {FILE_NAME} in a folder of yours and set "
                    "MEMTX_DATA_DIR to the folder, or try again with a network.",
                    SyntheticTextWarning,
                    stacklevel=2,
                )
                return synthetic_play(valid_fraction=valid_fraction)
    return Corpus.from_text("Tiny Shakespeare", _read_checked(path), valid_fraction)


def _read_checked(path: Path) -> str:
    """The text at `path`, if it is the published one to the last byte."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise OSError(f"{path} cannot be read ({error}): make it a readable file, or remove it") from error
    found = hashlib.sha256(content).hexdigest()
    if found != SHA256:
        raise ValueError(
            f"{path} is {'empty' if not content else 'not Tiny Shakespeare'}: its SHA-256 is {found}, expected "
            f"{SHA256}. Remove it (a file in the cache is then downloaded again) or replace it with {URL}"
        )
    return content.decode("utf-8")


def _download(path: Path) -> None:
    """Download Tiny Shakespeare to `path`: complete and checked, or not at all."""
    log = pooch.get_logger()
    level = log.level
    log.setLevel("WARNING")  # the bar says it all, and leaves nothing behind
    try:
        with tqdm(desc="Tiny Shakespeare", unit="B", unit_scale=True, leave=False) as bar:
            fetch = pooch.HTTPDownloader(timeout=(CONNECT_SECONDS, READ_SECONDS), progressbar=bar)
            pooch.retrieve(URL, known_hash=SHA256, fname=path.name, path=path.parent, downloader=fetch)
    except RequestException:
        raise
    except ValueError as error:
        raise ValueError(
            f"what {URL} sent is not Tiny Shakespeare, expected SHA-256 {SHA256} ({error}). Nothing was kept. Try "
            "again, or set MEMTX_DATA_DIR to a folder that holds the file"
        ) from error
    except OSError as error:
        raise OSError(f"{path} cannot be written ({error}): set MEMTX_CACHE_DIR to a folder that can") from error
    finally:
        log.setLevel(level)


# ---------------------------------------------------------------- a play that the code writes

# Symbols in capitals are looked up here or in the word lists; "|" separates alternatives, the first ones are taken most
# often; "+" glues an ending to the word before it.
GRAMMAR = {
    "SENTENCE": "CLAUSE . | CLAUSE , JOIN CLAUSE . | OPENING , CLAUSE . | CLAUSE ; CLAUSE . | ASK WHOM VERB THING ? | "
    "VERB THING , NAME . | if CLAUSE , CLAUSE . | ADJ NOUN , ADJ NOUN ! | CLAUSE : CLAUSE . | ASK AUX WHO VERB PLACE ? | "
    "NAME , CLAUSE ! | O ADJ NOUN , VERB THING !",
    "CLAUSE": "WHO AUX VERB THING | WHO VERB THING PLACE | THING VERB +s THING | THING is ADJ | WHO AUX VERB PLACE | "
    "WHO AUX not VERB THING | 'tis THING PLACE | THING is VERB +ed PLACE | NAME VERB +s THING",
    "THING": "THE NOUN | THE ADJ NOUN | THE NOUN of THE NOUN | NOUN +s | NAME +'s NOUN | THE ADJ - VERB +ing NOUN | NAME",
    "PLACE": "WHERE THING",
    "WHO": "I | you | he | we | she | they | thou | it",
    "WHOM": "WHO | THING",
    "THE": "the | my | a | thy | his | this | your | our | her | that | no | their | every | some",
    "AUX": "will | shall | must | would | may | can | did | do | should | might",
    "JOIN": "and | but | for | that | so | as | or | when | till | nor | where | though",
    "WHERE": "in | to | with | of | for | from | by | upon | at | before | under | against | without",
    "ASK": "what | why | how | where | when | who",
    "OPENING": "no | now | come | then | well | yet | nay | ay | good | here | O | alas | peace",
}
RULES = {symbol: [choice.split() for choice in choices.split("|")] for symbol, choices in GRAMMAR.items()}
ONSETS = "s t b m w h l f d p r c n g th st br sh k gr v wh tr pr fl ch cl j y sp bl qu gl cr dr z".split()
VOWELS = "e a o i ea u ou ai oo ee ie au".split()
CODAS = "r n t l d st m s nd ll th ck ng rt p ss w ve y ft x rk sh".split()
RANKS = "First Second Third Old Young".split()


def synthetic_play(n_characters: int = 1_115_394, seed: int = 0, valid_fraction: float = 0.1) -> Corpus:
    """A play of `n_characters` in an invented language, the same for a seed on every machine.

    Layout and alphabet are like Tiny Shakespeare's; a longer play begins with the shorter one. What a reader gains from
    remembering: a word just said is said again, a scene keeps to its subject, a speaker has favourite words, two
    speakers answer each other by turns, and a character returns after many scenes with the same favourites.
    """
    text, length = [], 0
    for speech in _speeches(random.Random(seed).random):
        text.append(speech)
        length += len(speech)
        if length >= n_characters:
            return Corpus.from_text("synthetic play", "".join(text)[: max(n_characters, 0)], valid_fraction)


def _speeches(dice) -> Iterator[str]:
    """Speech after speech, without end. `dice()` is uniform in [0, 1): random.Random promises that this one method
    gives the same numbers in every version of Python."""

    def pick(items):
        return items[int(dice() * len(items))]

    def pick_early(items):  # the earlier, the likelier, as word frequencies are: chance of the first n of N: (n/N)**(1/3)
        u = dice()
        return items[int(u * u * u * len(items))]

    def invent(n_syllables):
        return "".join(pick_early(ONSETS) + pick_early(VOWELS) for _ in range(n_syllables)) + pick_early(CODAS)

    def invent_many(count):  # short words first: they will be the frequent ones
        words = {}
        while len(words) < count:
            words[invent(1 + int(dice() * (1 + 2 * len(words) / count)))] = None
        return list(words)

    words = {"NOUN": invent_many(600), "VERB": invent_many(300), "ADJ": invent_many(200)}
    names = [word.capitalize() for word in invent_many(60)]
    speaker_of = {n: f"{pick(RANKS)} {n}" if i % 4 == 3 else n.upper() for i, n in enumerate(names)}
    favourites = {name: {kind: [pick(words[kind]) for _ in range(4)] for kind in words} for name in names}
    n_subjects = 12

    def say(symbol):
        if symbol in RULES:
            for part in pick_early(RULES[symbol]):
                yield from say(part)
        elif symbol == "NAME":
            yield pick(present)
        elif symbol in words:
            source = dice()
            if source < 0.35 and lately[symbol]:
                word = pick(lately[symbol])
            elif source < 0.5:
                word = pick(favourites[speaker][symbol])
            elif source < 0.85:
                word = pick_early(words[symbol][subject::n_subjects])
            else:
                word = pick_early(words[symbol])
            lately[symbol].append(word)
            yield word
        else:
            yield symbol

    while True:  # one scene
        subject = int(dice() * n_subjects)
        present = list(dict.fromkeys(pick_early(names) for _ in range(6)))
        lately = {kind: deque(maxlen=5) for kind in words}
        speaker, before = pick(present), pick(present)
        for _ in range(20 + int(dice() * 40)):  # one speech
            others = [name for name in present if name != speaker] or present
            speaker, before = (before if before in others and dice() < 0.6 else pick(others)), speaker
            said = ""
            width = pick((36, 40, 44))
            lines = [""]
            for _ in range(1 + int(dice() * dice() * 8)):
                start = True
                for word in say("SENTENCE"):
                    if start:
                        word, start = word[0].upper() + word[1:], False
                    if word[0] in "+-,.;:!?" or lines[-1].endswith("-"):
                        lines[-1] += word.lstrip("+")
                    elif len(lines[-1]) + len(word) > width:
                        lines.append(word[0].upper() + word[1:])
                    else:
                        lines[-1] += (" " if lines[-1] else "") + word
            said = "\n".join(lines)
            yield f"{speaker_of[speaker]}:\n{said}\n\n"


# ---------------------------------------------------------------- lanes


def lanes(stream: Tensor, batch_size: int, segment_len: int) -> Iterator[tuple[Tensor, Tensor]]:
    """One pass over `stream`, cut into `batch_size` contiguous lanes read side by side, segment after segment.

        stream         a b c d e f g h i j k l m          batch_size 2, segment_len 4
        lane 0   [a b c d] [e f]   targets  [b c d e] [f g]
        lane 1   [g h i j] [k l]            [h i j k] [l m]

    stream: (N,) int64, on any device. Yields (tokens, targets), each (B, T) int64 and a view of the stream; targets are
    the tokens one step later. Row b of a segment continues row b of the segment before, so a memory stays valid; the
    last segment may be shorter than `segment_len`. A lane's last target is the next lane's first token; up to
    `batch_size - 1` tokens at the end of the stream are left over. Raises ValueError, at the call, for a stream that is
    not (N,) int64 or too short for the lanes, and for sizes below 1.
    """
    if stream.dim() != 1 or stream.dtype != torch.int64:
        raise ValueError(f"lanes need a stream (N,) of int64, not {tuple(stream.shape)} of {stream.dtype}")
    if segment_len < 1:
        raise ValueError(f"segment_len {segment_len} is too small: use 1 or more")
    if not 1 <= batch_size < len(stream):
        raise ValueError(
            f"batch_size {batch_size} does not fit a stream of {len(stream)} tokens, where each lane needs a token and "
            f"its target: " + (f"use 1 to {len(stream) - 1}" if len(stream) > 1 else "use a longer stream")
        )
    lane_len = (len(stream) - 1) // batch_size
    used = batch_size * lane_len
    tokens, targets = stream[:used].view(batch_size, lane_len), stream[1 : used + 1].view(batch_size, lane_len)  # (B, L)
    starts = range(0, lane_len, segment_len)
    return ((tokens[:, i : i + segment_len], targets[:, i : i + segment_len]) for i in starts)
