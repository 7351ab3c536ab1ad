"""Text, vocabulary and lanes: what corpora.py promises."""

import contextlib
import hashlib
import http.server
import itertools
import math
import os
import re
import statistics
import threading
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from requests import ConnectionError as NoNetwork

from memtx_minimal import corpora
from memtx_minimal.corpora import Corpus, SyntheticTextWarning, Vocabulary, lanes, synthetic_play, tiny_shakespeare

SMALL_TEXT = "To be written,\nor not.\n" * 20


# ---------------------------------------------------------------- vocabulary and split


@given(st.text(min_size=1))
def test_decoding_gives_back_what_was_encoded(text):
    vocab = Vocabulary(text)
    tokens = vocab.encode(text)
    assert tokens.shape == (len(text),) and tokens.dtype == torch.int64
    assert vocab.decode(tokens) == vocab.decode(tokens.tolist()) == text
    assert set(tokens.tolist()) == set(range(len(vocab)))  # no token without a character
    assert vocab.characters == "".join(sorted(set(text)))


def test_nothing_encodes_to_nothing():
    vocab = Vocabulary("ab")
    assert vocab.encode("").shape == (0,) and vocab.encode("").dtype == torch.int64
    assert vocab.decode([]) == vocab.decode(vocab.encode("")) == ""


@pytest.mark.parametrize(
    "text, index, line, column",
    [("é", 0, 1, 1), ("abé", 2, 1, 3), ("ab\né", 3, 2, 1), ("a\n\nbbé\né", 5, 3, 3), ("\té", 0, 1, 1)],
)
def test_an_unknown_character_is_shown_with_its_place(text, index, line, column):
    with pytest.raises(ValueError) as caught:
        Vocabulary("ab\n").encode(text)
    message = str(caught.value)
    assert f"{text[index]!r} at index {index} (line {line}, column {column})" in message
    assert r"knows 3 characters: '\nab'" in message


@pytest.mark.parametrize("tokens", [[0, 2], [-1], torch.tensor([0, 1, 2]), torch.tensor([-1])])
def test_a_token_out_of_range_is_an_error(tokens):
    with pytest.raises(ValueError, match=r"token (2|-1) at index \d is out of range: valid are 0 ... 1"):
        Vocabulary("ab").decode(tokens)


@pytest.mark.parametrize("tokens", [torch.zeros(2, 3, dtype=torch.int64), torch.tensor(0), torch.zeros(3)])
def test_decode_takes_one_row_of_integers(tokens):
    with pytest.raises(ValueError, match=r"integers \(N,\), not torch.*decode a batch row by row"):
        Vocabulary("ab").decode(tokens)


@given(st.text(min_size=1, max_size=300), st.floats(0, 1, exclude_min=True, exclude_max=True))
def test_the_split_is_the_whole_text_in_order(text, valid_fraction):
    n_valid = round(len(text) * valid_fraction)
    if not 2 <= n_valid <= len(text) - 2:
        with pytest.raises(ValueError, match=f"{len(text) - n_valid} to train on and {n_valid} to validate on"):
            Corpus.from_text("a text", text, valid_fraction)
        return
    corpus = Corpus.from_text("a text", text, valid_fraction)
    assert len(corpus.valid) == n_valid
    assert corpus.vocab.decode(torch.cat([corpus.train, corpus.valid])) == corpus.text == text


@pytest.mark.parametrize("valid_fraction", [-0.1, 0, 1, 1.5, math.nan])
def test_a_fraction_is_between_0_and_1(valid_fraction):
    with pytest.raises(ValueError, match="valid_fraction"):
        Corpus.from_text("a text", SMALL_TEXT, valid_fraction)


def test_an_empty_text_is_an_error():
    with pytest.raises(ValueError, match="empty"):
        Corpus.from_text("nothing", "")


def test_a_corpus_does_not_print_its_text():
    corpus = Corpus.from_text("a text", SMALL_TEXT)
    assert repr(corpus) == "<a text: 414 characters to train on, 46 to validate on, 13 distinct>"


# ---------------------------------------------------------------- Tiny Shakespeare: found, downloaded or refused


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache, no data folder, and SMALL_TEXT in the part of Tiny Shakespeare."""
    monkeypatch.delenv("MEMTX_DATA_DIR", raising=False)
    monkeypatch.setenv("MEMTX_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(corpora, "SHA256", hashlib.sha256(SMALL_TEXT.encode()).hexdigest())
    monkeypatch.setattr(corpora, "synthetic_play", lambda **options: Corpus.from_text("synthetic play", SMALL_TEXT[::-1], **options))
    return tmp_path / "cache"


@pytest.fixture
def serve(monkeypatch):
    """serve(body, status, length) answers every request for Tiny Shakespeare, on this machine; counts the requests."""
    servers = []

    def start(body, status=200, length=None, wait=None):
        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                requests.append(self.path)
                if wait:
                    wait.wait(5)
                self.send_response(status)
                self.send_header("Content-Length", str(length or len(body)))
                self.end_headers()
                with contextlib.suppress(OSError):  # the reader may have gone
                    self.wfile.write(body)

            def log_message(self, *arguments):
                pass

        requests = []
        servers.append(http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler))
        threading.Thread(target=servers[-1].serve_forever, args=(0.01,), daemon=True).start()
        monkeypatch.setattr(corpora, "URL", f"http://127.0.0.1:{servers[-1].server_port}/input.txt")
        return requests

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def files_in(folder):
    return sorted(path.name for path in folder.rglob("*")) if folder.exists() else []


def test_a_download_is_kept_and_used_again(cache, serve, capsys):
    requests = serve(SMALL_TEXT.encode())
    corpus = tiny_shakespeare()
    assert corpus.name == "Tiny Shakespeare" and corpus.text == SMALL_TEXT
    assert files_in(cache) == ["tinyshakespeare.txt"]
    assert tiny_shakespeare(valid_fraction=0.5).valid.shape == (230,)
    assert len(requests) == 1
    assert "Tiny Shakespeare" in capsys.readouterr().err  # the progress bar


def test_a_download_with_a_wrong_hash_is_an_error_and_not_kept(cache, serve):
    serve(b"<html>Please log in to this network</html>")
    with pytest.raises(ValueError) as caught:
        tiny_shakespeare()
    assert files_in(cache) == []
    assert corpora.URL in str(caught.value) and corpora.SHA256 in str(caught.value)
    assert "MEMTX_DATA_DIR" in str(caught.value)


def test_a_download_that_breaks_off_leaves_nothing(cache, serve):
    serve(SMALL_TEXT.encode()[:100], length=len(SMALL_TEXT))
    with pytest.warns(SyntheticTextWarning):
        assert tiny_shakespeare().name == "synthetic play"
    assert files_in(cache) == []


def test_without_a_network_the_play_is_used_and_said_so(cache, monkeypatch):
    def fail(*arguments, **options):
        raise NoNetwork("no route to host")

    monkeypatch.setattr(corpora.pooch.HTTPDownloader, "__call__", fail)
    with pytest.warns(SyntheticTextWarning) as caught:
        corpus = tiny_shakespeare(valid_fraction=0.25)
    assert corpus.name == "synthetic play" and len(corpus.valid) == 115
    message = str(caught[0].message)
    for part in ("no route to host", corpora.URL, "synthetic play", "MEMTX_DATA_DIR", "tinyshakespeare.txt"):
        assert part in message
    assert caught[0].filename == __file__  # it points to the caller's line
    assert files_in(cache) == []


def test_a_server_that_refuses_or_sleeps_is_no_network(cache, serve, monkeypatch):
    serve(b"", status=404)
    with pytest.warns(SyntheticTextWarning, match="404"):
        assert tiny_shakespeare().name == "synthetic play"
    monkeypatch.setattr(corpora, "READ_SECONDS", 0.2)
    awake = threading.Event()
    serve(SMALL_TEXT.encode(), wait=awake)
    with pytest.warns(SyntheticTextWarning, match="timed out"):
        assert tiny_shakespeare().name == "synthetic play"
    awake.set()
    assert files_in(cache) == []


def test_patience_is_short():
    assert corpora.CONNECT_SECONDS <= 10 and corpora.READ_SECONDS <= 30


def test_interrupting_a_download_leaves_nothing(cache, monkeypatch):
    def interrupt(self, url, output_file, pooch):
        with open(output_file, "w") as file:
            file.write("half of it")
        raise KeyboardInterrupt

    monkeypatch.setattr(corpora.pooch.HTTPDownloader, "__call__", interrupt)
    with pytest.raises(KeyboardInterrupt):
        tiny_shakespeare()
    assert files_in(cache) == []


def test_the_log_of_pooch_is_quiet_only_meanwhile(cache, serve, capsys):
    level = corpora.pooch.get_logger().level
    serve(SMALL_TEXT.encode())
    tiny_shakespeare()
    assert corpora.pooch.get_logger().level == level
    assert "Downloading data from" not in capsys.readouterr().err


def test_a_cache_that_cannot_be_written_is_an_error(cache, serve, tmp_path):
    serve(SMALL_TEXT.encode())
    cache.write_text("a file where the folder should be")
    with pytest.raises(OSError, match="MEMTX_CACHE_DIR"):
        tiny_shakespeare()


@pytest.fixture(params=["MEMTX_DATA_DIR", "MEMTX_CACHE_DIR"])
def folder(request, cache, tmp_path, monkeypatch):
    """A folder that is looked into, with a network that must not be asked."""
    monkeypatch.setattr(corpora, "_download", lambda path: pytest.fail("there is a file, nothing to download"))
    monkeypatch.setenv(request.param, str(tmp_path / "folder"))
    (tmp_path / "folder").mkdir()
    return tmp_path / "folder"


def test_a_file_in_the_folder_is_used(folder):
    (folder / "tinyshakespeare.txt").write_bytes(SMALL_TEXT.encode())
    assert tiny_shakespeare().text == SMALL_TEXT


@pytest.mark.parametrize("content, what", [(b"", "is empty"), (SMALL_TEXT.encode() + b" ", "is not Tiny Shakespeare")])
def test_a_file_with_a_wrong_hash_is_an_error(folder, content, what):
    path = folder / "tinyshakespeare.txt"
    path.write_bytes(content)
    with pytest.raises(ValueError) as caught:
        tiny_shakespeare()
    message = str(caught.value)
    assert f"{path} {what}" in message and corpora.SHA256 in message and "Remove it" in message
    assert path.read_bytes() == content  # it is not ours to delete


def test_an_unreadable_file_is_an_error(folder):
    (folder / "tinyshakespeare.txt").mkdir()
    with pytest.raises(OSError, match=r"tinyshakespeare\.txt cannot be read"):
        tiny_shakespeare()


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read every file")
def test_a_forbidden_file_is_an_error(folder):
    (folder / "tinyshakespeare.txt").write_bytes(SMALL_TEXT.encode())
    (folder / "tinyshakespeare.txt").chmod(0)
    with pytest.raises(OSError, match=r"tinyshakespeare\.txt cannot be read"):
        tiny_shakespeare()


@pytest.mark.parametrize("exists", [True, False])
def test_a_data_folder_without_the_file_is_an_error(cache, tmp_path, monkeypatch, exists):
    if exists:
        (tmp_path / "data").mkdir()
    monkeypatch.setenv("MEMTX_DATA_DIR", str(tmp_path / "data"))
    with pytest.raises(FileNotFoundError) as caught:
        tiny_shakespeare()
    message = str(caught.value)
    assert "MEMTX_DATA_DIR" in message and str(tmp_path / "data" / "tinyshakespeare.txt") in message and corpora.URL in message


def test_an_empty_setting_is_no_setting(cache, monkeypatch):
    monkeypatch.setenv("MEMTX_DATA_DIR", "")
    cache.mkdir()
    (cache / "tinyshakespeare.txt").write_bytes(SMALL_TEXT.encode())
    assert tiny_shakespeare().text == SMALL_TEXT


@pytest.mark.skipif(not os.environ.get("MEMTX_DATA_DIR"), reason="MEMTX_DATA_DIR does not name a folder with the real text")
def test_the_real_text():
    corpus = tiny_shakespeare()
    assert corpus.name == "Tiny Shakespeare" and corpus.text.startswith("First Citizen:\nBefore we proceed")
    assert len(corpus.text) == 1_115_394 and len(corpus.vocab) == 65
    assert corpus.train.shape == (1_003_855,) and corpus.valid.shape == (111_539,)
    assert corpus.vocab.decode(corpus.valid) == corpus.text[-111_539:]


# ---------------------------------------------------------------- the synthetic play


@pytest.fixture(scope="module")
def play():
    return synthetic_play()


def test_the_play_is_the_same_on_every_machine(play):
    assert len(play.text) == 1_115_394 and play.name == "synthetic play"
    assert hashlib.sha256(play.text[:10_000].encode()).hexdigest() == "a8c2ce4722dbc8b905fb336b404ee81a9ccad47f024bf89d923650b843214801"
    assert hashlib.sha256(play.text.encode()).hexdigest() == "0a0f8c662e59a15eceb3440140247869ba1cd4b71798fcdc7ea2e8ea9cc73f20"


def test_a_longer_play_begins_with_the_shorter_and_a_seed_makes_another(play):
    assert synthetic_play(5_000).text == play.text[:5_000]
    assert synthetic_play(5_000, seed=1).text != play.text[:5_000]
    assert len(synthetic_play(5_000, valid_fraction=0.2).valid) == 1_000


@pytest.mark.parametrize("n_characters", [-1, 0, 1, 10])
def test_a_play_too_short_to_split_is_an_error(n_characters):
    with pytest.raises(ValueError):
        synthetic_play(n_characters)


def test_the_play_looks_like_shakespeare(play):
    shakespeare = set("\n !$&',-.3:;?ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz")
    assert set(play.text) <= shakespeare and 55 <= len(play.vocab) <= 65
    assert set(play.vocab.decode(play.valid)) == set(play.text)  # nothing in validation that training has not, and the reverse
    speeches = play.text.split("\n\n")[:-1]
    for speech in speeches:
        assert re.fullmatch(r"[A-Z]+:(\n[A-Z'].{1,79})+", speech), speech
        assert speech[-1] in ".!?"
    lines = [len(line) for speech in speeches for line in speech.split("\n")[1:]]
    assert 25 < sum(lines) / len(lines) < 50 and 100 < len(play.text) / len(speeches) < 250
    assert "  " not in play.text and " \n" not in play.text


def test_words_are_as_frequent_as_in_a_language(play):
    counts = Counter(re.findall(r"[a-z']+", play.text.lower())).most_common()
    n_words = len(play.text.split())
    shares = [count / n_words for _, count in counts]
    assert 5_000 < len(counts) < 20_000  # 12,600 in Tiny Shakespeare
    assert 0.3 < sum(shares[:50]) < 0.6  # half of the text is made of a few words, 0.42 there
    assert 6.5 < -sum(share * math.log(share) for share in shares) < 7.5  # nats a word, 6.8 there


def test_the_cast_returns_after_long_gaps(play):
    entrances = {}
    for match in re.finditer(r"(?:^|\n\n)([A-Z]+):\n", play.text):
        entrances.setdefault(match[1], []).append(match.start())
    assert 40 <= len(entrances) <= 60
    for places in entrances.values():
        gaps = sorted(b - a for a, b in itertools.pairwise(places))
        assert gaps[len(gaps) // 2] < 1_000  # on the stage, speaking often
        assert gaps[-5] > 10_000  # away for several scenes, and back, five times or more
    in_both = [name for name, places in entrances.items() if places[0] < len(play.train) < places[-1]]
    assert len(in_both) > 0.7 * len(entrances)  # validation meets the characters that training knows


def word_loss(train, valid, n_back):
    """Nats a word on `valid`, guessed from the frequencies in `train` and from the n_back words before, in the best mixture."""
    frequency, total = Counter(train), len(train) + 10_000
    guesses = [
        ((frequency[word] + 0.5) / total, valid[i - n_back : i].count(word) / max(1, n_back))
        for i, word in enumerate(valid[:12_000])
        if i >= 50
    ]
    return min(
        -sum(math.log((1 - share) * often + share * lately) for often, lately in guesses) / len(guesses)
        for share in ((0.03, 0.06, 0.1, 0.15) if n_back else (0,))
    )


def test_it_pays_to_remember_the_play(play):
    words = [re.findall(r"[a-z']+", play.vocab.decode(part).lower()) for part in (play.train, play.valid)]
    loss = [word_loss(*words, n_back) for n_back in (0, 6, 12, 24, 48)]  # 0, 35, 70, 140 and 280 characters
    assert all(shorter > longer + 0.02 for shorter, longer in itertools.pairwise(loss)), loss


def test_a_line_is_as_long_as_the_lines_before(play):
    """Who remembers the lines of the speaker knows where the next one breaks: within a word or so."""
    widths = {}
    for speaker, lines in re.findall(r"(?:^|\n\n)([A-Z]+):\n((?:.+\n)+)", play.text):
        widths.setdefault(speaker, []).extend(len(line) for line in lines.split("\n")[:-2])  # all but the last line of the speech
    typical = {speaker: statistics.median(lengths) for speaker, lengths in widths.items()}
    assert max(typical.values()) - min(typical.values()) > 10  # speakers differ
    for speaker, lengths in widths.items():
        assert sum(abs(length - typical[speaker]) <= 6 for length in lengths) > 0.9 * len(lengths)


# ---------------------------------------------------------------- lanes

streams = st.builds(torch.arange, st.integers(2, 400))


@settings(max_examples=300)
@given(streams, st.integers(1, 40), st.integers(1, 70))
def test_lanes_put_together_are_the_stream(stream, batch_size, segment_len):
    batch_size = min(batch_size, len(stream) - 1)
    segments = list(lanes(stream, batch_size, segment_len))
    for tokens, targets in segments:
        assert tokens.shape == targets.shape and tokens.size(0) == batch_size
        assert tokens.dtype == targets.dtype == torch.int64
        assert torch.equal(targets, tokens + 1)  # the stream counts up: the next token is one more
    assert all(tokens.size(1) == segment_len for tokens, _ in segments[:-1])
    assert 1 <= segments[-1][0].size(1) <= segment_len
    joined = torch.cat([tokens for tokens, _ in segments], dim=1).flatten()  # lane after lane
    assert torch.equal(joined, stream[: len(joined)])
    assert len(stream) - 1 - len(joined) in range(batch_size)  # what is left over, but for the very last target


def test_seams():
    segments = list(lanes(torch.arange(13), batch_size=2, segment_len=4))
    assert [tokens.tolist() for tokens, _ in segments] == [[[0, 1, 2, 3], [6, 7, 8, 9]], [[4, 5], [10, 11]]]
    assert [targets.tolist() for _, targets in segments] == [[[1, 2, 3, 4], [7, 8, 9, 10]], [[5, 6], [11, 12]]]


def test_lanes_are_views_of_the_stream_and_read_once():
    stream = torch.arange(100)
    segments = lanes(stream, 4, 8)
    for tokens, targets in segments:
        assert tokens.untyped_storage().data_ptr() == targets.untyped_storage().data_ptr() == stream.untyped_storage().data_ptr()
    assert next(segments, None) is None


def test_lanes_of_every_second_token():
    tokens, _ = next(lanes(torch.arange(40)[::2], 2, 3))
    assert tokens.tolist() == [[0, 2, 4], [18, 20, 22]]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
def test_lanes_stay_on_the_gpu():
    tokens, targets = next(lanes(torch.arange(100, device="cuda"), 4, 8))
    assert tokens.is_cuda and targets.is_cuda


@pytest.mark.parametrize(
    "stream, batch_size, segment_len, message",
    [
        (torch.arange(10), 10, 4, "10 tokens do not fill 10 lanes.* use a batch_size of 1 to 9"),
        (torch.arange(10), 0, 4, "do not fill 0 lanes.* use a batch_size of 1 to 9"),
        (torch.arange(10), -2, 4, "do not fill -2 lanes"),
        (torch.arange(1), 1, 4, "a stream of 1 tokens has nothing to predict: use 2 tokens or more"),
        (torch.arange(0), 1, 4, "use 2 tokens or more"),
        (torch.arange(10), 2, 0, "segment_len 0 is too short: use 1 or more"),
        (torch.arange(10), 2, -3, "segment_len -3"),
        (torch.arange(10).view(2, 5), 2, 4, r"stream \(N,\) of torch.int64, not \(2, 5\) of torch.int64"),
        (torch.tensor(3), 1, 1, r"not \(\) of torch.int64"),
        (torch.rand(10), 2, 4, r"not \(10,\) of torch.float32"),
        (torch.arange(10).int(), 2, 4, "torch.int32"),
    ],
)
def test_lanes_complain_at_once(stream, batch_size, segment_len, message):
    with pytest.raises(ValueError, match=message):
        lanes(stream, batch_size, segment_len)  # before the first segment is asked for
