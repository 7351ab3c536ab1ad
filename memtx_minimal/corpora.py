"""Text to train on: where it comes from, how it becomes numbers and is cut in lanes.

    corpus = tiny_shakespeare()  # or from_file(path), or synthetic_play()
    for tokens, targets in lanes(corpus.train, batch_size=16, segment_len=64):
        ...  # (16, 64) each; every segment continues the one before

Letters of the shapes: N tokens in a stream, B lanes, T tokens in a segment.
"""

import codecs
import hashlib
import io
import math
import os
import random
import warnings
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from numbers import Real
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from memtx_minimal import inputs

with warnings.catch_warnings():  # in a notebook pooch asks for widgets: no need of them
    warnings.simplefilter("ignore")
    import pooch

FILE_NAME = "tinyshakespeare.txt"
URL = (
    "https://raw.githubusercontent.com/karpathy/char-rnn/master/"
    "data/tinyshakespeare/input.txt"
)
SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
CONNECT_SECONDS = 5  # patience with the server, until it answers
READ_SECONDS = 20  # and between two pieces of the file


class SyntheticTextWarning(UserWarning):
    """Tiny Shakespeare cannot be downloaded; the synthetic play is used instead."""


class Vocabulary:
    """The distinct characters of a text; a character's token is its place among them.

    `characters`, a str, has them sorted. It says all: Vocabulary(vocab.characters) is
    the same vocabulary again. ValueError for an empty text, and for one with half of a
    surrogate pair in it, which UTF-8 cannot hold.
    """

    def __init__(self, text: str):
        _check_str("text", text)
        if not text:
            raise ValueError(
                "the text is empty: a vocabulary needs a character or more"
            )
        self.characters = "".join(sorted(set(text)))
        for character in self.characters:
            if "\ud800" <= character <= "\udfff":
                raise ValueError(
                    f"the text has {character!r}, half of a surrogate pair"
                )
        self._token_of = {c: token for token, c in enumerate(self.characters)}

    def __len__(self) -> int:
        return len(self.characters)

    def encode(self, text: str) -> Tensor:
        """The tokens of a text, (len(text),) int64.

        ValueError for what is not a str, and at the first character that is not in the
        vocabulary.
        """
        _check_str("text", text)
        try:
            return torch.tensor([self._token_of[c] for c in text], dtype=torch.int64)
        except KeyError:
            index = next(i for i, c in enumerate(text) if c not in self._token_of)
        line, column = _place(text[:index])
        raise ValueError(
            f"unknown character {text[index]!r} at index {index} (line {line}, column "
            f"{column}); this vocabulary knows {len(self)} characters: "
            f"{self.characters!r}"
        )

    def decode(self, tokens: Tensor | Iterable[int]) -> str:
        """The text of tokens (N,): a tensor on any device, or any iterable of integers.

        ValueError for another shape or type, and for a token outside
        0 ... len(self) - 1.
        """
        form = type(tokens).__name__
        if isinstance(tokens, Tensor):
            form = f"{tokens.dtype} of shape {tuple(tokens.shape)}"
        if hasattr(tokens, "tolist"):  # a tensor, or an array of numpy's
            tokens = tokens.tolist()
        if not isinstance(tokens, Iterable):
            raise ValueError(
                f"decode takes integers (N,), not {form}: decode a batch row by row"
            )
        characters = []
        for index, token in enumerate(tokens):
            token = token.tolist() if hasattr(token, "tolist") else token
            if not isinstance(token, int) or isinstance(token, bool):
                raise ValueError(
                    f"decode takes integers (N,), not {form} with {token!r} at index "
                    f"{index}: decode a batch row by row"
                )
            if not 0 <= token < len(self):
                raise ValueError(
                    f"token {token} at index {index} is out of range: valid are "
                    f"0 ... {len(self) - 1}"
                )
            characters.append(self.characters[token])
        return "".join(characters)


@dataclass(frozen=True, eq=False)
class Corpus:
    """A text and its tokens; `name` is for figures.

    train: (N,) int64, the first part. valid: (N',) int64, the rest.
    """

    name: str
    text: str
    vocab: Vocabulary
    train: Tensor
    valid: Tensor

    @classmethod
    def from_text(cls, name: str, text: str, valid_fraction: float = 0.1) -> "Corpus":
        """Encode a text and keep its last `valid_fraction` for validation.

        valid_fraction lies between 0 and 1. ValueError if the text is empty or a part
        has fewer than 2 tokens, one to read and one to predict.
        """
        _check_str("name", name)
        _check_fraction(valid_fraction)
        vocab = Vocabulary(text)
        n_valid = round(len(text) * valid_fraction)
        n_train = len(text) - n_valid
        if min(n_train, n_valid) < 2:
            raise ValueError(
                f"valid_fraction {valid_fraction} splits {len(text)} characters into "
                f"{n_train} to train on and {n_valid} to validate on: each part needs "
                "at least 2"
            )
        tokens = vocab.encode(text)
        return cls(name, text, vocab, tokens[:n_train], tokens[n_train:])

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the text in UTF-8, as 64 hexadecimal digits."""
        return hashlib.sha256(self.text.encode("utf-8")).hexdigest()

    def __repr__(self) -> str:
        return (
            f"<{self.name}: {len(self.train):,} characters to train on, "
            f"{len(self.valid):,} to validate on, {len(self.vocab)} distinct>"
        )


def _check_str(name, value):
    if not isinstance(value, str):
        kind = type(value).__name__
        raise ValueError(f"the {name} is not a str but of type {kind}")


def _check_fraction(valid_fraction):
    if not isinstance(valid_fraction, Real) or not 0 < valid_fraction < 1:
        raise ValueError(f"{valid_fraction=} is not between 0 and 1")


def _place(before):
    """Line and column, from 1 on, of what comes after this text."""
    return before.count("\n") + 1, len(before) - before.rfind("\n")


# ---------------------------------------------------------------- lanes


def lanes(
    stream: Tensor, batch_size: int, segment_len: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """One pass over a stream, cut into `batch_size` contiguous lanes.

    The lanes are read side by side, segment after segment.

        stream a b c d e f g h i j k l m, batch_size 2, segment_len 4
        lane 0:  tokens [a b c d] [e f]   targets [b c d e] [f g]
        lane 1:  tokens [g h i j] [k l]   targets [h i j k] [l m]

    stream (N,) int64, on any device. Yields (tokens, targets), views (B, T) of it; a
    target is the token one step later. Row b continues row b of the segment before, so
    that a memory stays valid; the last segment may be shorter. A lane's last target is
    the next lane's first token; up to B - 1 tokens at the very end are left over.
    ValueError, at the call, for another shape or type of stream, for one too short, and
    for sizes that are not whole numbers from 1 on.
    """
    if not isinstance(stream, Tensor):
        raise ValueError(
            "lanes need a stream, a tensor (N,) of torch.int64 like corpus.train, not "
            f"{type(stream).__name__}: torch.from_numpy makes a tensor of a numpy "
            "array, torch.tensor of a list"
        )
    if stream.dim() != 1 or stream.dtype != torch.int64:
        raise ValueError(
            f"lanes need a stream (N,) of torch.int64, not {tuple(stream.shape)} of "
            f"{stream.dtype}"
        )
    inputs.check_sizes({"batch_size": batch_size, "segment_len": segment_len})
    N, B, T = len(stream), int(batch_size), int(segment_len)
    if N < 2:
        raise ValueError(
            f"a stream of {N} tokens has nothing to predict: use 2 tokens or more"
        )
    if B >= N:
        raise ValueError(
            f"{N} tokens do not fill {B} lanes, each with a token and its target: use "
            f"a batch_size of 1 to {N - 1}"
        )
    lane_len = (N - 1) // B
    tokens, targets = (stream[i : i + B * lane_len].view(B, lane_len) for i in (0, 1))
    return zip(tokens.split(T, dim=1), targets.split(T, dim=1), strict=True)


# ---------------------------------------------------------------- one's own text


def from_file(path: str | os.PathLike, valid_fraction: float = 0.1) -> Corpus:
    """A text of one's own, from a file in UTF-8, with or without a byte order mark.

    All line ends become "\\n". The corpus is named after the file, without its ending.
    FileNotFoundError, IsADirectoryError or another OSError if there is no file to read;
    ValueError if it is empty, too short to split (see `Corpus.from_text`), or not in
    UTF-8: then it says where.
    """
    _check_fraction(valid_fraction)
    path = Path(path).expanduser()
    return Corpus.from_text(path.stem, _text(path), valid_fraction)


def _text(path):
    """The text of a file in UTF-8, its line ends all "\\n"."""
    content = _bytes(path)
    if codec := _wide(content):
        raise ValueError(
            f"{path} looks like {codec[:6].upper()}, not UTF-8. Save it as UTF-8, or "
            f"convert it: {_convert(path, codec)}"
        )
    start = len(codecs.BOM_UTF8) if content.startswith(codecs.BOM_UTF8) else 0
    try:
        text = _lines(content[start:].decode("utf-8"))
    except UnicodeDecodeError as error:
        end = start + error.start
        line, column = _place(_lines(content[start:end].decode("utf-8")))
        raise ValueError(
            f"{path} is not in UTF-8: byte 0x{content[end]:02x} at line {line}, column "
            f"{column} (byte {end} of the file, counted from 0), {error.reason}. Save "
            "it as UTF-8, or convert it. If it is in Windows-1252, as older files may "
            f"be: {_convert(path, 'cp1252')}"
        ) from error
    if not text:
        raise ValueError(f"{path} is empty")
    return text


def _bytes(path):
    try:
        return path.read_bytes()
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{path} is not there") from error
    except OSError as error:
        if os.path.isdir(path):
            raise IsADirectoryError(
                f"{path} cannot be read: it is a folder, not a file"
            ) from error
        raise OSError(
            f"{path} cannot be read ({error}): make it readable, or put another file "
            "in its place"
        ) from error


def _lines(text):
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _wide(content):
    """The codec of a file that looks like UTF-16 or UTF-32; else None."""
    for codec in ("utf-32-le", "utf-32-be", "utf-16-le", "utf-16-be"):
        if content.startswith("\ufeff".encode(codec)):
            return codec[:6]  # the byte order mark tells the codec the order
    zeros = [content[i::2].count(0) for i in (0, 1)]  # as in Latin text without a mark
    if 4 * max(zeros) > len(content):
        return "utf-16-be" if zeros[0] > zeros[1] else "utf-16-le"
    return None


def _convert(path, codec):
    """The line of Python that makes UTF-8 of a file."""
    text = f"Path({str(path)!r}).read_text({codec!r})"
    return f"Path('utf-8.txt').write_text({text}, 'utf-8')"


# ---------------------------------------------------------------- Tiny Shakespeare


def tiny_shakespeare(valid_fraction: float = 0.1) -> Corpus:
    """Tiny Shakespeare: 1,115,394 characters, 65 distinct, checked against its hash.

    Read from the folder that the environment variable MEMTX_DATA_DIR names, if it is
    set; else from the user's cache, which MEMTX_CACHE_DIR moves; else downloaded into
    it. With no way out: SyntheticTextWarning, and `synthetic_play()` is returned.
    FileNotFoundError if MEMTX_DATA_DIR is set but the file is not there, OSError if a
    file cannot be read or written, ValueError if it is empty or another text.
    """
    _check_fraction(valid_fraction)
    if folder := os.environ.get("MEMTX_DATA_DIR"):
        path = Path(folder).expanduser() / FILE_NAME
        if path.parent.is_file():
            raise NotADirectoryError(
                f"MEMTX_DATA_DIR is a file, {path.parent}: name the folder that it is "
                "in"
            )
        if not path.exists():
            raise FileNotFoundError(
                f"MEMTX_DATA_DIR is set, but {path} is not there: save {URL} under "
                "that name, or unset it"
            )
        return Corpus.from_text("Tiny Shakespeare", _published(path), valid_fraction)

    cache = os.environ.get("MEMTX_CACHE_DIR") or pooch.os_cache("memtx_minimal")
    path = Path(cache).expanduser() / FILE_NAME
    try:
        if not path.exists():
            _download(path)
    except ConnectionError as error:  # no network, no answer, no such page
        warnings.warn(
            f"NOT SHAKESPEARE: {URL} could not be downloaded ({error}). The synthetic "
            "play, a text that the code writes itself, is used instead: losses and "
            f"figures will differ. For the real text save that file as {FILE_NAME} in "
            "a folder, and set MEMTX_DATA_DIR to the folder; or try again with a "
            "network.",
            SyntheticTextWarning,
            stacklevel=2,
        )
        return synthetic_play(valid_fraction=valid_fraction)
    return Corpus.from_text("Tiny Shakespeare", _published(path), valid_fraction)


def _published(path):
    """The text of a file, if it is the published one to the last byte."""
    content = _bytes(path)
    if (found := hashlib.sha256(content).hexdigest()) != SHA256:
        raise ValueError(
            f"{path} is {'not Tiny Shakespeare' if content else 'empty'}: SHA-256 "
            f"{found}, expected {SHA256}. Remove it (what was in the cache is "
            f"downloaded again) or replace it by {URL}"
        )
    return content.decode("utf-8")


def _download(path):
    """Fetch the file, whole and checked, or leave nothing behind.

    ConnectionError if there is no way to it, ValueError if it is another text, OSError
    if it cannot be written.
    """
    bar = tqdm(
        desc="Tiny Shakespeare", total=1_115_394, unit="B", unit_scale=True, leave=False
    )
    patience = (CONNECT_SECONDS, READ_SECONDS)
    ask = pooch.HTTPDownloader(timeout=patience, progressbar=bar)

    def fetch(url, output_file, _):
        content = io.BytesIO()  # not yet on the disk: what fails now is the network
        try:
            ask(url, content, None)
        except (OSError, ValueError) as error:  # ValueError: a header that is nonsense
            raise ConnectionError(str(error)) from error
        Path(output_file).write_bytes(content.getvalue())

    log = pooch.get_logger()
    level = log.level
    log.setLevel("WARNING")  # the bar says enough
    try:
        with bar:
            pooch.retrieve(URL, SHA256, path.name, path.parent, downloader=fetch)
    except ConnectionError:
        raise
    except ValueError as error:  # a wrong hash
        raise ValueError(
            f"what {URL} sent is not Tiny Shakespeare, expected SHA-256 {SHA256} "
            f"({error}). Nothing was kept. Try again, or set MEMTX_DATA_DIR to a "
            "folder with the file"
        ) from error
    except OSError as error:
        raise OSError(
            f"{path} cannot be written ({error}): set MEMTX_CACHE_DIR to a folder that "
            "can"
        ) from error
    finally:
        log.setLevel(level)


# ---------------------------------------------------------------- an invented play

# A word in capitals stands for one of its alternatives, all equally likely; NOUN, VERB
# and ADJ for an invented word, NAME for someone on the stage. Marks, and endings with a
# "+", join the word before them.
GRAMMAR = {
    "SENTENCE": (
        "CLAUSE . | CLAUSE . | CLAUSE , JOIN CLAUSE . | OPENING , CLAUSE . | "
        "CLAUSE ; CLAUSE . | CLAUSE : CLAUSE . | VERB THING , NAME , JOIN CLAUSE . | "
        "if CLAUSE , CLAUSE ; JOIN CLAUSE . | NAME , CLAUSE ! | VERB THING PLACE ! | "
        "O ADJ NOUN , ADJ NOUN ! | ASK AUX WHO VERB THING ? | ASK DOES THING PLACE ?"
    ),
    "CLAUSE": (
        "WHO DOES THING | WHO AUX VERB THING | WHO DOES THING PLACE | "
        "WHO AUX VERB PLACE | WHO AUX not VERB THING | WHO AUX ADJ +ly VERB THING | "
        "WHO never VERB +ed THING | PLACE WHO DOES THING | THING DOES THING PLACE | "
        "THING is ADJ | THING is ADJ +er than THING | THING is VERB +ed PLACE | "
        "'tis THING PLACE"
    ),
    "THING": (
        "THE SORT | THE SORT | THE SORT | THE ADJ SORT | THE ADJ SORT | "
        "THE SORT of THE SORT | THE SORT and THE SORT | NOUN +s | ADJ NOUN +s | "
        "THE NOUN - VERB +ing SORT | NAME | NAME +'s SORT | WHOM"
    ),
    "SORT": (
        "NOUN | NOUN | NOUN | NOUN | NOUN +s | NOUN +y | VERB +er | VERB +ing | "
        "ADJ +ness"
    ),
    "DOES": "VERB | VERB | VERB +s | VERB +ed | VERB +eth | VERB +est",
    "PLACE": "WHERE THING | WHERE THE NOUN",
}
RULES = {
    symbol: [choice.split() for choice in choices.split("|")]
    for symbol, choices in GRAMMAR.items()
}
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
ONSETS = (  # likely ones first
    "s t b m w h l f d p r k g n th st br y v gr tr z fl pr ch cl j bl sw qu gl cr dr"
)
VOWELS = "a e o u ea ou ee ie ai"
CODAS = "n r t l d nd m st th ll sh rk ft lm ld lt"


def synthetic_play(
    n_characters: int = 1_115_394, seed: int = 0, valid_fraction: float = 0.1
) -> Corpus:
    """A play in an invented language, the same for a seed on every machine.

    A longer one begins with the shorter. Layout and alphabet are like Tiny
    Shakespeare's. What a reader gains from remembering: lines are as long as those
    before, a word just said is said again, a scene keeps to its subject and a speaker
    to a manner, speakers answer each other, and a character returns after many scenes,
    unchanged. n_characters and seed are whole numbers; ValueError if they are not, or
    if `Corpus.from_text` cannot split so few characters.
    """
    inputs.check_sizes({"n_characters": n_characters, "seed": seed})
    _check_fraction(valid_fraction)
    writer = _Playwright(int(seed))
    text = ""
    while len(text) < n_characters:
        text += "".join(writer.scene())
    return Corpus.from_text("synthetic play", text[:n_characters], valid_fraction)


class _Playwright:
    """Invents the words of a language and a cast, then writes scene after scene."""

    def __init__(self, seed):
        # uniform in [0, 1); the one method whose numbers no version of Python changes
        self.dice = random.Random(seed).random
        self.words = {symbol: words.split() for symbol, words in LITTLE_WORDS.items()}
        for kind, count in ("NOUN", 2000), ("VERB", 1000), ("ADJ", 1000):
            self.words[kind] = self.invent(count)
        self.cast = [word.capitalize() for word in self.invent(48, shortest=2)]
        # characters in a line, and where favourite words begin in the lists
        self.width = {name: self.pick([40, 48, 56]) for name in self.cast}
        self.manner = {name: self.pick([0, 0.25, 0.5, 0.75]) for name in self.cast}

    def pick(self, items, bias=1, start=0.0):
        """One of the items.

        With bias 1 all are equally likely, with more the first ones are likelier, as
        with the words of a language. "First" begins at the fraction `start` of the
        list, which goes round. Products only: every machine rounds them alike.
        """
        place = start + math.prod(self.dice() for _ in range(bias))
        return items[int(place * len(items)) % len(items)]

    def invent(self, count, shortest=1):
        """A list of new words, the short ones, of `shortest` syllables, first."""
        onsets, vowels, codas, words = ONSETS.split(), VOWELS.split(), CODAS.split(), {}
        while len(words) < count:
            n_syllables = shortest + int(self.dice() * (1 + len(words) / count))
            word = ""
            for _ in range(n_syllables):
                word += self.pick(onsets, bias=2) + self.pick(vowels, bias=2)
            words[word + self.pick(codas, bias=2)] = None
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
        elif symbol in self.lately:  # one of the last eight such words, or a new one
            topic = self.manner[speaker] if self.dice() < 0.3 else self.subject
            lately, words = self.lately[symbol], self.words[symbol]
            again = lately and self.dice() < 0.3
            word = self.pick(lately) if again else self.pick(words, bias=3, start=topic)
            lately.append(word)
            yield word
        elif symbol in LITTLE_WORDS:
            yield self.pick(self.words[symbol], bias=3, start=self.manner[speaker])
        else:
            yield self.pick(self.stage) if symbol == "NAME" else symbol
