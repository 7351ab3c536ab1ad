"""Text to train on: where it comes from, how it becomes numbers, and how it is cut into lanes.

    corpus = tiny_shakespeare()                   # or synthetic_play(), or Corpus.from_text(name, text)
    for tokens, targets in lanes(corpus.train, batch_size=16, segment_len=64):
        ...                                       # (16, 64) each; every segment continues the one before

Letters of the shapes: N tokens in a stream, B lanes, T tokens in a segment.
"""

import hashlib
import math
import os
import random
import warnings
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from requests import RequestException
from torch import Tensor
from tqdm import tqdm

with warnings.catch_warnings():  # in a notebook pooch asks for widgets, which nothing here needs
    warnings.simplefilter("ignore")
    import pooch

FILE_NAME = "tinyshakespeare.txt"
URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
CONNECT_SECONDS, READ_SECONDS = 5, 20  # patience with the server: until it answers, and between two pieces of the file


class SyntheticTextWarning(UserWarning):
    """Tiny Shakespeare could not be downloaded, and the synthetic play is used instead."""


class Vocabulary:
    """The distinct characters of a text, sorted; the token of a character is its place among them. ValueError if there are none."""

    def __init__(self, text: str):
        if not text:
            raise ValueError("the text is empty: a vocabulary needs at least one character")
        self.characters = "".join(sorted(set(text)))
        self._token_of = {character: token for token, character in enumerate(self.characters)}

    def __len__(self) -> int:
        return len(self.characters)

    def encode(self, text: str) -> Tensor:
        """The tokens of a text, (len(text),) int64. ValueError at the first character that is not in the vocabulary."""
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
        """The text of tokens (N,): a tensor of integers, on any device, or a list. ValueError for any other shape or type, and
        for a token outside 0 ... len(self) - 1."""
        if isinstance(tokens, Tensor):
            if tokens.dim() != 1 or tokens.is_floating_point():
                shape = tuple(tokens.shape)
                raise ValueError(f"decode takes integers (N,), not {tokens.dtype} of shape {shape}: decode a batch row by row")
            tokens = tokens.tolist()
        for index, token in enumerate(tokens):
            if not 0 <= token < len(self):
                raise ValueError(f"token {token} at index {index} is out of range: valid are 0 ... {len(self) - 1}")
        return "".join(self.characters[token] for token in tokens)


@dataclass(frozen=True, eq=False)
class Corpus:
    """A text and its tokens: `train` (N,) int64, the first part, and `valid` (N',) int64, the rest. `name` is for figures."""

    name: str
    text: str
    vocab: Vocabulary
    train: Tensor
    valid: Tensor

    @classmethod
    def from_text(cls, name: str, text: str, valid_fraction: float = 0.1) -> "Corpus":
        """Encode a text and keep its last `valid_fraction`, between 0 and 1, for validation. ValueError if the text is empty or a
        part has fewer than 2 tokens, one to read and one to predict."""
        vocab = Vocabulary(text)
        if not 0 < valid_fraction < 1:
            raise ValueError(f"valid_fraction {valid_fraction} is not between 0 and 1")
        n_valid = round(len(text) * valid_fraction)
        n_train = len(text) - n_valid
        if min(n_train, n_valid) < 2:
            raise ValueError(
                f"valid_fraction {valid_fraction} splits {len(text)} characters into {n_train} to train on and {n_valid} to "
                "validate on: each part needs at least 2"
            )
        tokens = vocab.encode(text)
        return cls(name, text, vocab, tokens[:n_train], tokens[n_train:])

    def __repr__(self) -> str:
        return f"<{self.name}: {len(self.train):,} characters to train on, {len(self.valid):,} to validate on, {len(self.vocab)} distinct>"


# ---------------------------------------------------------------- lanes


def lanes(stream: Tensor, batch_size: int, segment_len: int) -> Iterator[tuple[Tensor, Tensor]]:
    """One pass over a stream, cut into `batch_size` contiguous lanes that are read side by side, segment after segment.

        stream a b c d e f g h i j k l m, batch_size 2, segment_len 4
        lane 0:  tokens [a b c d] [e f]   targets [b c d e] [f g]
        lane 1:  tokens [g h i j] [k l]   targets [h i j k] [l m]

    stream (N,) int64, on any device. Yields (tokens, targets), views (B, T) of it; a target is the token one step later. Row b
    continues row b of the segment before, so that a memory stays valid; the last segment may be shorter. A lane's last target
    is the next lane's first token; up to B - 1 tokens at the very end are left over. ValueError, at the call, for another shape
    or type of stream, for one too short, and for sizes below 1.
    """
    N = stream.numel()
    if stream.dim() != 1 or stream.dtype != torch.int64:
        raise ValueError(f"lanes need a stream (N,) of torch.int64, not {tuple(stream.shape)} of {stream.dtype}")
    if segment_len < 1:
        raise ValueError(f"segment_len {segment_len} is too short: use 1 or more")
    if N < 2:
        raise ValueError(f"a stream of {N} tokens has nothing to predict: use 2 tokens or more")
    if not 1 <= batch_size < N:
        raise ValueError(f"{N} tokens do not fill {batch_size} lanes, each with a token and its target: use a batch_size of 1 to {N - 1}")
    lane_len = (N - 1) // batch_size
    tokens, targets = (stream[i : i + batch_size * lane_len].view(batch_size, lane_len) for i in (0, 1))
    return zip(tokens.split(segment_len, dim=1), targets.split(segment_len, dim=1), strict=True)


# ---------------------------------------------------------------- Tiny Shakespeare


def tiny_shakespeare(valid_fraction: float = 0.1) -> Corpus:
    """Tiny Shakespeare: 1,115,394 characters, 65 distinct, checked against the published hash.

    Read from the folder that the environment variable MEMTX_DATA_DIR names, if it is set; else from the user's cache, which
    MEMTX_CACHE_DIR moves; else downloaded into it. With no way out: SyntheticTextWarning, and `synthetic_play()` is returned.
    FileNotFoundError if MEMTX_DATA_DIR is set but the file is not there, OSError if a file cannot be read or written,
    ValueError if it is empty or another text.
    """
    if folder := os.environ.get("MEMTX_DATA_DIR"):
        path = Path(folder).expanduser() / FILE_NAME
        if not path.exists():
            raise FileNotFoundError(f"MEMTX_DATA_DIR is set, but {path} is not there: save {URL} under that name, or unset it")
        return Corpus.from_text("Tiny Shakespeare", _read(path), valid_fraction)

    path = Path(os.environ.get("MEMTX_CACHE_DIR") or pooch.os_cache("memtx_minimal")).expanduser() / FILE_NAME
    try:
        if not path.exists():
            _download(path)
    except RequestException as error:  # no network, no answer, no such page
        warnings.warn(
            f"NOT SHAKESPEARE: {URL} could not be downloaded ({error}). The synthetic play, a text that the code writes itself, "
            f"is used instead: losses and figures will differ. For the real text save that file as {FILE_NAME} in a folder, "
            "and set MEMTX_DATA_DIR to the folder; or try again with a network.",
            SyntheticTextWarning,
            stacklevel=2,
        )
        return synthetic_play(valid_fraction=valid_fraction)
    return Corpus.from_text("Tiny Shakespeare", _read(path), valid_fraction)


def _read(path: Path) -> str:
    """The text of a file, if it is the published one to the last byte."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise OSError(f"{path} cannot be read ({error}): make it a readable file, or remove it") from error
    if (found := hashlib.sha256(content).hexdigest()) != SHA256:
        raise ValueError(
            f"{path} is {'not Tiny Shakespeare' if content else 'empty'}: SHA-256 {found}, expected {SHA256}. Remove it (what was "
            f"in the cache is downloaded again) or replace it by {URL}"
        )
    return content.decode()


def _download(path: Path) -> None:
    """Fetch the file, whole and checked, or leave nothing behind."""
    log = pooch.get_logger()
    level = log.level
    log.setLevel("WARNING")  # the bar says enough
    try:
        with tqdm(desc="Tiny Shakespeare", total=1_115_394, unit="B", unit_scale=True, leave=False) as bar:
            fetch = pooch.HTTPDownloader(timeout=(CONNECT_SECONDS, READ_SECONDS), progressbar=bar)
            pooch.retrieve(URL, known_hash=SHA256, fname=path.name, path=path.parent, downloader=fetch)
    except RequestException:
        raise
    except ValueError as error:  # a wrong hash
        hint = "Nothing was kept. Try again, or set MEMTX_DATA_DIR to a folder with the file"
        raise ValueError(f"what {URL} sent is not Tiny Shakespeare, expected SHA-256 {SHA256} ({error}). {hint}") from error
    except OSError as error:
        raise OSError(f"{path} cannot be written ({error}): set MEMTX_CACHE_DIR to a folder that can") from error
    finally:
        log.setLevel(level)


# ---------------------------------------------------------------- a play that the code writes itself

# A word in capitals stands for one of its alternatives, all equally likely; NOUN, VERB and ADJ for an invented word, NAME for
# someone on the stage. Marks, and endings with a "+", join the word before them.
GRAMMAR = {
    "SENTENCE": "CLAUSE . | CLAUSE . | CLAUSE , JOIN CLAUSE . | OPENING , CLAUSE . | CLAUSE ; CLAUSE . | CLAUSE : CLAUSE . | "
    "VERB THING , NAME , JOIN CLAUSE . | if CLAUSE , CLAUSE ; JOIN CLAUSE . | NAME , CLAUSE ! | VERB THING PLACE ! | "
    "O ADJ NOUN , ADJ NOUN ! | ASK AUX WHO VERB THING ? | ASK DOES THING PLACE ?",
    "CLAUSE": "WHO DOES THING | WHO AUX VERB THING | WHO DOES THING PLACE | WHO AUX VERB PLACE | WHO AUX not VERB THING | "
    "WHO AUX ADJ +ly VERB THING | WHO never VERB +ed THING | PLACE WHO DOES THING | THING DOES THING PLACE | THING is ADJ | "
    "THING is ADJ +er than THING | THING is VERB +ed PLACE | 'tis THING PLACE",
    "THING": "THE SORT | THE SORT | THE SORT | THE ADJ SORT | THE ADJ SORT | THE SORT of THE SORT | THE SORT and THE SORT | "
    "NOUN +s | ADJ NOUN +s | THE NOUN - VERB +ing SORT | NAME | NAME +'s SORT | WHOM",
    "SORT": "NOUN | NOUN | NOUN | NOUN | NOUN +s | NOUN +y | VERB +er | VERB +ing | ADJ +ness",
    "DOES": "VERB | VERB | VERB +s | VERB +ed | VERB +eth | VERB +est",
    "PLACE": "WHERE THING | WHERE THE NOUN",
}
RULES = {symbol: [choice.split() for choice in choices.split("|")] for symbol, choices in GRAMMAR.items()}
LITTLE_WORDS = {
    "WHO": "I you he we she they thou it",
    "WHOM": "me him you them her us thee it",
    "THE": "the my a thy his this your our her that no their every some",
    "AUX": "will shall must would may can did do should might",
    "JOIN": "and but for that so as or when till nor where though",
    "WHERE": "in to with of for from by upon at before under against without next",
    "ASK": "what why how where when who",
    "OPENING": "no now come then well yet nay ay good here O alas peace",
}
ONSETS = "s t b m w h l f d p r k g n th st br y v gr tr z fl pr ch cl j bl sw qu gl cr dr"  # likely ones first
VOWELS = "a e o u ea ou ee ie ai"
CODAS = "n r t l d nd m st th ll sh rk ft lm ld lt"


def synthetic_play(n_characters: int = 1_115_394, seed: int = 0, valid_fraction: float = 0.1) -> Corpus:
    """A play in an invented language, the same for a seed on every machine; a longer one begins with the shorter.

    Layout and alphabet are like Tiny Shakespeare's. What a reader gains from remembering: lines are as long as those before, a
    word just said is said again, a scene keeps to its subject and a speaker to a manner, speakers answer each other, and a
    character returns after many scenes, unchanged. ValueError if `Corpus.from_text` cannot split so few characters.
    """
    writer = _Playwright(seed)
    text = ""
    while len(text) < n_characters:
        text += "".join(writer.scene())
    return Corpus.from_text("synthetic play", text[: max(n_characters, 0)], valid_fraction)


class _Playwright:
    """Invents the words of a language and a cast, then writes scene after scene."""

    def __init__(self, seed):
        self.dice = random.Random(seed).random  # uniform in [0, 1); the one method whose numbers no version of Python changes
        self.words = {symbol: words.split() for symbol, words in LITTLE_WORDS.items()}
        self.words |= {"NOUN": self.invent(2000), "VERB": self.invent(1000), "ADJ": self.invent(1000)}
        self.cast = [word.capitalize() for word in self.invent(48, shortest=2)]
        self.width = {name: self.pick([40, 48, 56]) for name in self.cast}  # characters in a line
        self.manner = {name: self.pick([0, 0.25, 0.5, 0.75]) for name in self.cast}  # where favourite words begin in the lists

    def pick(self, items, bias=1, start=0.0):
        """One of the items: with bias 1 all alike, with more the first ones most, as with the words of a language. "First" begins at
        the fraction `start` of the list, which goes round. Products only: every machine rounds them alike."""
        place = start + math.prod(self.dice() for _ in range(bias))
        return items[int(place * len(items)) % len(items)]

    def invent(self, count, shortest=1):
        """A list of new words, the short ones, of `shortest` syllables, first."""
        onsets, vowels, codas, words = ONSETS.split(), VOWELS.split(), CODAS.split(), {}
        while len(words) < count:
            n_syllables = shortest + int(self.dice() * (1 + len(words) / count))
            syllables = [self.pick(onsets, bias=2) + self.pick(vowels, bias=2) for _ in range(n_syllables)]
            words["".join(syllables) + self.pick(codas, bias=2)] = None
        return list(words)

    def scene(self):
        """Speeches between a few of the cast on one subject."""
        self.subject = self.pick(range(6)) / 6
        self.stage = list({self.pick(self.cast): None for _ in range(6)})
        self.lately = {kind: deque(maxlen=8) for kind in ("NOUN", "VERB", "ADJ")}
        speaker = before = self.pick(self.stage)
        for _ in range(20 + int(self.dice() * 30)):
            others = [name for name in self.stage if name != speaker] or self.stage
            answers = before != speaker and self.dice() < 0.6
            speaker, before = before if answers else self.pick(others), speaker
            yield f"{speaker.upper()}:\n{self.speech(speaker)}\n\n"

    def speech(self, speaker):
        """A few sentences, broken into lines."""
        lines = [""]
        for _ in range(1 + int(self.dice() * self.dice() * 9)):
            for word in self.say("SENTENCE", speaker):
                if word[0] in "+-,.;:!?" or lines[-1].endswith("-"):
                    lines[-1] += word.lstrip("+")
                    continue
                if len(lines[-1]) + len(word) >= self.width[speaker]:
                    lines.append("")
                if lines[-1] == "" or lines[-1][-1] in ".!?":
                    word = word[0].upper() + word[1:]
                lines[-1] += f" {word}" if lines[-1] else word
        return "\n".join(lines)

    def say(self, symbol, speaker):
        """The words, marks and endings that a symbol of the grammar becomes."""
        if symbol in RULES:
            for part in self.pick(RULES[symbol]):
                yield from self.say(part, speaker)
        elif symbol in self.lately:  # a noun, verb or adjective: one of the last eight, or a new one
            lately, topic = self.lately[symbol], self.manner[speaker] if self.dice() < 0.3 else self.subject
            again = lately and self.dice() < 0.3
            lately.append(self.pick(lately) if again else self.pick(self.words[symbol], bias=3, start=topic))
            yield lately[-1]
        elif symbol in LITTLE_WORDS:
            yield self.pick(self.words[symbol], bias=3, start=self.manner[speaker])
        else:
            yield self.pick(self.stage) if symbol == "NAME" else symbol
