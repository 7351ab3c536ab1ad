"""Text, vocabulary and lanes: what corpora.py promises."""

import ast
import contextlib
import hashlib
import http.server
import itertools
import math
import os
import pickle
import re
import socket
import statistics
import string
import sys
import threading
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from memtx_minimal import corpora
from memtx_minimal.corpora import (
    Corpus,
    SyntheticTextWarning,
    Vocabulary,
    from_file,
    lanes,
    synthetic_play,
    tiny_shakespeare,
)

SMALL_TEXT = "To be written,\nor not.\n" * 20


# ---------------------------------------------------------------- vocabulary and split


@given(st.text(min_size=1))
def test_decoding_gives_back_what_was_encoded(text):
    vocab = Vocabulary(text)
    tokens = vocab.encode(text)
    assert tokens.shape == (len(text),) and tokens.dtype == torch.int64
    assert vocab.decode(tokens) == vocab.decode(tokens.tolist()) == text
    every = set(range(len(vocab)))
    assert set(tokens.tolist()) == every  # no token without a character
    assert vocab.characters == "".join(sorted(set(text)))


@given(st.text(min_size=1))
def test_a_vocabulary_is_made_again_of_its_characters(text):
    vocab = Vocabulary(text)
    again = Vocabulary(vocab.characters)
    assert again.characters == vocab.characters and len(again) == len(vocab)
    assert torch.equal(again.encode(text), vocab.encode(text))


def test_nothing_encodes_to_nothing():
    vocab = Vocabulary("ab")
    assert vocab.encode("").shape == (0,) and vocab.encode("").dtype == torch.int64
    assert vocab.decode([]) == vocab.decode(vocab.encode("")) == ""


@pytest.mark.parametrize(
    "text, index, line, column",
    [
        ("é", 0, 1, 1),
        ("abé", 2, 1, 3),
        ("ab\né", 3, 2, 1),
        ("a\n\nbbé\né", 5, 3, 3),
        ("\té", 0, 1, 1),
    ],
)
def test_an_unknown_character_is_shown_with_its_place(text, index, line, column):
    with pytest.raises(ValueError) as caught:
        Vocabulary("ab\n").encode(text)
    message = str(caught.value)
    assert f"{text[index]!r} at index {index} (line {line}, column {column})" in message
    assert r"knows 3 characters: '\nab'" in message


@pytest.mark.parametrize(
    "tokens", [[0, 2], [-1], torch.tensor([0, 1, 2]), torch.tensor([-1])]
)
def test_a_token_out_of_range_is_an_error(tokens):
    message = r"token (2|-1) at index \d is out of range: valid are 0 ... 1"
    with pytest.raises(ValueError, match=message):
        Vocabulary("ab").decode(tokens)


@pytest.mark.parametrize(
    "tokens", [torch.zeros(2, 3, dtype=torch.int64), torch.tensor(0), torch.zeros(3)]
)
def test_decode_takes_one_row_of_integers(tokens):
    message = r"integers \(N,\), not torch.*decode a batch row by row"
    with pytest.raises(ValueError, match=message):
        Vocabulary("ab").decode(tokens)


@pytest.mark.parametrize(
    "tokens",
    [
        iter([1, 0]),
        (token for token in (1, 0)),
        (1, 0),
        range(1, -1, -1),
        np.array([1, 0]),
        np.array([1, 0], dtype=np.uint8),
        [np.int64(1), np.int8(0)],
        list(torch.tensor([1, 0])),
        torch.tensor([1, 0], dtype=torch.uint8),
    ],
)
def test_decode_takes_any_integers(tokens):
    assert Vocabulary("ab").decode(tokens) == "ba"


@pytest.mark.parametrize(
    "tokens, message",
    [
        ([0.0], "not list with 0.0 at index 0"),
        ([0, 1.5], "not list with 1.5 at index 1"),
        ([True], "with True at index 0"),
        ([np.bool_(True)], "with True at index 0"),
        ([np.float64(1)], "with 1.0 at index 0"),
        ([None], "with None at index 0"),
        (["0"], "with '0' at index 0"),
        (iter([0, 0.5]), "with 0.5 at index 1"),
        ([[0, 1], [1, 0]], r"with \[0, 1\] at index 0: decode a batch row by row"),
        ([torch.tensor([0, 1])], r"with \[0, 1\] at index 0"),
        (np.zeros((2, 3), dtype=np.int64), "row by row"),
        (np.array(1), "decode takes integers"),
        (np.zeros(2), "with 0.0 at index 0"),
        (torch.tensor([True]), r"not torch.bool of shape \(1,\)"),
        (torch.zeros(1, dtype=torch.complex64), "not torch.complex64"),
        ("01", "not str"),
        (3, "not int"),
        (None, "not NoneType"),
    ],
)
def test_decode_refuses_what_is_no_row_of_integers(tokens, message):
    with pytest.raises(ValueError, match=message):
        Vocabulary("ab").decode(tokens)


@pytest.mark.parametrize("odd", [b"ab", ["a", "b"], None, 3, torch.tensor([0])])
def test_a_text_is_a_str(odd):
    message = f"is not a str but of type {type(odd).__name__}"
    for refuses in (
        Vocabulary,
        Vocabulary("ab").encode,
        lambda text: Corpus.from_text("a text", text),
        lambda name: Corpus.from_text(name, SMALL_TEXT),
    ):
        with pytest.raises(ValueError, match=message):
            refuses(odd)


def test_half_of_a_surrogate_pair_is_no_character():
    with pytest.raises(ValueError, match=r"'\\udc80', half of a surrogate pair"):
        Corpus.from_text("a text", SMALL_TEXT + "\udc80")


@given(
    st.text(min_size=1, max_size=300),
    st.floats(0, 1, exclude_min=True, exclude_max=True),
)
def test_the_split_is_the_whole_text_in_order(text, valid_fraction):
    n_valid = round(len(text) * valid_fraction)
    if not 2 <= n_valid <= len(text) - 2:
        message = f"{len(text) - n_valid} to train on and {n_valid} to validate on"
        with pytest.raises(ValueError, match=message):
            Corpus.from_text("a text", text, valid_fraction)
        return
    corpus = Corpus.from_text("a text", text, valid_fraction)
    assert len(corpus.valid) == n_valid
    whole = torch.cat([corpus.train, corpus.valid])
    assert corpus.vocab.decode(whole) == corpus.text == text


@pytest.mark.parametrize("odd", [-0.1, 0, 1, 1.5, math.nan, "0.1", None, True])
def test_a_fraction_is_between_0_and_1(odd, tmp_path, monkeypatch):
    """Said before anything is read, fetched or written."""
    monkeypatch.setattr(corpora, "_Playwright", lambda seed: pytest.fail("too late"))
    message = "valid_fraction=.* is not between 0 and 1"
    for refuses in (
        lambda fraction: Corpus.from_text("a text", SMALL_TEXT, fraction),
        lambda fraction: from_file(tmp_path / "missing.txt", fraction),
        lambda fraction: synthetic_play(valid_fraction=fraction),
        tiny_shakespeare,
    ):
        with pytest.raises(ValueError, match=message):
            refuses(odd)


def test_an_empty_text_is_an_error():
    with pytest.raises(ValueError, match="empty"):
        Corpus.from_text("nothing", "")


@pytest.mark.parametrize("text", [SMALL_TEXT, "Größe\n" * 9])
def test_the_digest_is_that_of_the_text_in_utf_8(text):
    corpus = Corpus.from_text("a text", text)
    expected = hashlib.sha256(text.encode("utf-8")).hexdigest()
    assert corpus.digest == corpus.digest == expected
    assert pickle.loads(pickle.dumps(corpus)).digest == expected
    assert corpus.digest != Corpus.from_text("a text", text + " ").digest


def test_a_corpus_does_not_print_its_text():
    corpus = Corpus.from_text("a text", SMALL_TEXT)
    expected = "<a text: 414 characters to train on, 46 to validate on, 13 distinct>"
    assert repr(corpus) == expected


# ---------------------------------------------------------------- one's own file

OWN_TEXT = "Größe,\nnaïve 日本.\n\nEnd 🙂\n" * 3


@pytest.fixture
def own(tmp_path):
    """own(content) is a file with these bytes in it."""

    def write(content):
        (tmp_path / "my own.notes.txt").write_bytes(content)
        return tmp_path / "my own.notes.txt"

    return write


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_a_file_is_read_whatever_its_mark_and_its_line_ends(own, mark, end):
    path = own(mark + OWN_TEXT.replace("\n", end).encode("utf-8"))
    corpus = from_file(path, valid_fraction=0.25)
    assert corpus.text == OWN_TEXT and corpus.name == "my own.notes"
    assert corpus.vocab.decode(torch.cat([corpus.train, corpus.valid])) == OWN_TEXT
    assert len(corpus.valid) == round(len(OWN_TEXT) / 4)
    assert corpus.digest == from_file(str(path)).digest  # of the text, not of the file


def test_line_ends_of_all_kinds_in_one_file(own):
    path = own(b"a\r\nb\rc\nd\r\r\ne\n\rf" * 9)
    assert from_file(path).text == "a\nb\nc\nd\n\ne\n\nf" * 9


def test_a_file_in_the_home_folder(own, monkeypatch):
    monkeypatch.setenv("HOME", str(own(OWN_TEXT.encode("utf-8")).parent))
    monkeypatch.setenv("USERPROFILE", os.environ["HOME"])  # on Windows
    assert from_file("~/my own.notes.txt").text == OWN_TEXT


@pytest.mark.parametrize(
    "content, byte, line, column, offset",
    [
        (b"\xe9 at the start", "0xe9", 1, 1, 0),
        (b"abc\n\nd\xe9", "0xe9", 3, 2, 6),
        (b"a\r\nb\rc\xff", "0xff", 3, 2, 6),
        (b"\xef\xbb\xbfab\xe9", "0xe9", 1, 3, 5),  # the mark is no character
        ("Größe".encode("utf-8") + b"\x80", "0x80", 1, 6, 7),
        ("🙂".encode("utf-8")[:3], "0xf0", 1, 1, 0),  # cut off in a character
        (b"\xed\xa0\x80", "0xed", 1, 1, 0),  # half of a surrogate pair
        (b"\xc0\x80", "0xc0", 1, 1, 0),
    ],
)
def test_what_is_not_utf_8_is_shown_with_its_place(
    own, content, byte, line, column, offset
):
    path = own(content)
    with pytest.raises(ValueError) as caught:
        from_file(path)
    message = str(caught.value)
    assert f"{path} is not in UTF-8: byte {byte} at line {line}, " in message
    assert (
        f"column {column} (byte {offset} of the file" in message
        and "Windows-1252" in message
    )


@pytest.mark.parametrize(
    "codec, mark, name",
    [
        ("utf-16-le", "\ufeff", "UTF-16"),
        ("utf-16-be", "\ufeff", "UTF-16"),
        ("utf-16-le", "", "UTF-16"),
        ("utf-16-be", "", "UTF-16"),
        ("utf-32-le", "\ufeff", "UTF-32"),
        ("utf-32-be", "\ufeff", "UTF-32"),
        ("cp1252", "", "Windows-1252"),
    ],
)
def test_another_encoding_is_named_and_how_to_convert_it(
    own, codec, mark, name, tmp_path, monkeypatch
):
    """The line of code that the error gives is run, and what it makes is read."""
    path = own(f"{mark}naïve\nand so on".encode(codec))
    with pytest.raises(ValueError, match=name) as caught:
        from_file(path)
    assert "Save it as UTF-8" in str(caught.value)
    monkeypatch.chdir(tmp_path)
    line = re.search(r"Path\('utf-8.txt'\).*", str(caught.value))[0]
    exec(line, {"Path": corpora.Path})
    assert from_file("utf-8.txt").text == "naïve\nand so on"


@pytest.mark.parametrize("content", [b"", b"\xef\xbb\xbf"])
def test_an_empty_file_is_an_error(own, content):
    with pytest.raises(ValueError, match=r"notes\.txt is empty"):
        from_file(own(content))


def test_a_file_too_short_to_split_is_an_error(own):
    with pytest.raises(ValueError, match="each part needs at least 2"):
        from_file(own(b"abc"))


def test_no_file_and_no_readable_file_are_errors(own, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"missing\.txt is not there"):
        from_file(tmp_path / "missing.txt")
    with pytest.raises(IsADirectoryError, match="cannot be read: it is a folder"):
        from_file(tmp_path)
    with pytest.raises(OSError, match="cannot be read"):
        from_file("a whole text in place of a path " * 1000)


def test_a_zero_among_other_characters_is_a_character(own):
    assert from_file(own(b"a\0b, and so on and on")).text == "a\0b, and so on and on"


# ---------------------------------------------------------------- Tiny Shakespeare


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache, no data folder, and SMALL_TEXT as if it were the real text."""
    monkeypatch.delenv("MEMTX_DATA_DIR", raising=False)
    monkeypatch.setenv("MEMTX_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")

    def play(**options):
        return Corpus.from_text("synthetic play", SMALL_TEXT[::-1], **options)

    digest = hashlib.sha256(SMALL_TEXT.encode()).hexdigest()
    monkeypatch.setattr(corpora, "SHA256", digest)
    monkeypatch.setattr(corpora, "synthetic_play", play)
    return tmp_path / "cache"


@pytest.fixture
def serve(monkeypatch):
    """serve(body, status, length) answers every request for Tiny Shakespeare.

    On this machine. It returns the list of the requests, which grows.
    """
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
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        servers.append(server)
        forever = dict(target=server.serve_forever, args=(0.01,), daemon=True)
        threading.Thread(**forever).start()
        url = f"http://127.0.0.1:{server.server_port}/input.txt"
        monkeypatch.setattr(corpora, "URL", url)
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
        raise socket.gaierror(-2, "no route to host")

    monkeypatch.setattr(socket, "getaddrinfo", fail)
    with pytest.warns(SyntheticTextWarning) as caught:
        corpus = tiny_shakespeare(valid_fraction=0.25)
    assert corpus.name == "synthetic play" and len(corpus.valid) == 115
    message = str(caught[0].message)
    for part in ("no route to host", corpora.URL, "tinyshakespeare.txt"):
        assert part in message
    assert "synthetic play" in message and "MEMTX_DATA_DIR" in message
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


@pytest.fixture
def answer(monkeypatch):
    """answer(bytes) sends these bytes to the first who asks for Tiny Shakespeare."""
    listening = socket.create_server(("127.0.0.1", 0))

    def start(content, protocol="http"):
        def serve_once():
            with contextlib.suppress(OSError), listening.accept()[0] as connection:
                connection.recv(10_000)
                connection.sendall(content)

        threading.Thread(target=serve_once, daemon=True).start()
        port = listening.getsockname()[1]
        monkeypatch.setattr(corpora, "URL", f"{protocol}://127.0.0.1:{port}/input.txt")

    yield start
    listening.close()


OK = b"HTTP/1.1 200 OK\r\n"
NO_ANSWERS = {
    "nothing": b"",
    "noise": b"this is no HTTP\n" * 9,
    "a length that is no number": OK + b"Content-Length: many\r\n\r\nTo be",
    "chunks that break off": OK + b"Transfer-Encoding: chunked\r\n\r\n9\r\nTo",
    "a code that is none": OK + b"Content-Encoding: gzip\r\n\r\nTo be",
    "a way to nowhere": b"HTTP/1.1 302 Found\r\nLocation: nowhere://\r\n\r\n",
    "an error of the server": b"HTTP/1.1 503 Busy\r\nContent-Length: 0\r\n\r\n",
}


@pytest.mark.parametrize("content", NO_ANSWERS.values(), ids=NO_ANSWERS)
def test_an_answer_that_is_none_is_no_network(cache, answer, content):
    answer(content)
    with pytest.warns(SyntheticTextWarning, match="could not be downloaded"):
        assert tiny_shakespeare().name == "synthetic play"
    assert files_in(cache) == []


def test_no_door_and_no_safe_way_are_no_network(cache, answer, monkeypatch):
    answer(b"this is no TLS\n" * 9, protocol="https")
    with pytest.warns(SyntheticTextWarning, match="SSL"):
        assert tiny_shakespeare().name == "synthetic play"
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", "/nowhere/certificates.pem")
    answer(b"", protocol="https")
    with pytest.warns(SyntheticTextWarning, match="certificates.pem"):
        assert tiny_shakespeare().name == "synthetic play"
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    monkeypatch.setattr(corpora, "URL", f"http://127.0.0.1:{port}/input.txt")
    with pytest.warns(SyntheticTextWarning, match="refused"):
        assert tiny_shakespeare().name == "synthetic play"
    assert files_in(cache) == []


def test_a_full_disk_is_not_taken_for_a_missing_network(cache, serve, capsys):
    resource = pytest.importorskip("resource")  # not on Windows
    serve(SMALL_TEXT.encode())
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))  # bytes in a file
    try:
        with pytest.raises(OSError, match="cannot be written.*MEMTX_CACHE_DIR"):
            tiny_shakespeare()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert files_in(cache) == []


def test_only_declared_packages_are_imported():
    """What pooch uses to ask the network is pooch's own affair."""
    source = Path(corpora.__file__).read_text(encoding="utf-8")
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module.split(".")[0])
    declared = {"torch", "pooch", "tqdm", "memtx_minimal"}
    assert names - set(sys.stdlib_module_names) == declared


def test_patience_is_short():
    assert corpora.CONNECT_SECONDS <= 10 and corpora.READ_SECONDS <= 30


def test_interrupting_a_download_leaves_nothing(cache, monkeypatch):
    def interrupt(self, url, output_file, pooch):
        output_file.write(b"half of it")
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
    cache.write_bytes(b"a file where the folder should be")
    with pytest.raises(OSError, match="MEMTX_CACHE_DIR"):
        tiny_shakespeare()


@pytest.fixture(params=["MEMTX_DATA_DIR", "MEMTX_CACHE_DIR"])
def folder(request, cache, tmp_path, monkeypatch):
    """A folder that is looked into, with a network that must not be asked."""

    def fail(path):
        pytest.fail("there is a file, nothing to download")

    monkeypatch.setattr(corpora, "_download", fail)
    monkeypatch.setenv(request.param, str(tmp_path / "folder"))
    (tmp_path / "folder").mkdir()
    return tmp_path / "folder"


def test_a_file_in_the_folder_is_used(folder):
    (folder / "tinyshakespeare.txt").write_bytes(SMALL_TEXT.encode())
    assert tiny_shakespeare().text == SMALL_TEXT


@pytest.mark.parametrize(
    "content, what",
    [(b"", "is empty"), (SMALL_TEXT.encode() + b" ", "is not Tiny Shakespeare")],
)
def test_a_file_with_a_wrong_hash_is_an_error(folder, content, what):
    path = folder / "tinyshakespeare.txt"
    path.write_bytes(content)
    with pytest.raises(ValueError) as caught:
        tiny_shakespeare()
    message = str(caught.value)
    assert f"{path} {what}" in message
    assert corpora.SHA256 in message and "Remove it" in message
    assert path.read_bytes() == content  # it is not ours to delete


def test_an_unreadable_file_is_an_error(folder):
    (folder / "tinyshakespeare.txt").mkdir()
    with pytest.raises(OSError, match=r"tinyshakespeare\.txt cannot be read"):
        tiny_shakespeare()


@pytest.mark.skipif(
    not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read every file"
)
def test_a_forbidden_file_is_an_error(folder):
    (folder / "tinyshakespeare.txt").write_bytes(SMALL_TEXT.encode())
    (folder / "tinyshakespeare.txt").chmod(0)
    with pytest.raises(OSError, match=r"tinyshakespeare\.txt cannot be read"):
        tiny_shakespeare()


@pytest.mark.parametrize("exists", [True, False])
def test_a_data_folder_without_the_file_is_an_error(
    cache, tmp_path, monkeypatch, exists
):
    if exists:
        (tmp_path / "data").mkdir()
    monkeypatch.setenv("MEMTX_DATA_DIR", str(tmp_path / "data"))
    with pytest.raises(FileNotFoundError) as caught:
        tiny_shakespeare()
    message = str(caught.value)
    assert "MEMTX_DATA_DIR" in message and corpora.URL in message
    assert str(tmp_path / "data" / "tinyshakespeare.txt") in message


def test_the_file_where_its_folder_should_be_named(cache, tmp_path, monkeypatch):
    (tmp_path / "tinyshakespeare.txt").write_bytes(SMALL_TEXT.encode())
    monkeypatch.setenv("MEMTX_DATA_DIR", str(tmp_path / "tinyshakespeare.txt"))
    with pytest.raises(NotADirectoryError, match="name the folder that it is in"):
        tiny_shakespeare()


def test_an_empty_setting_is_no_setting(cache, monkeypatch):
    monkeypatch.setenv("MEMTX_DATA_DIR", "")
    cache.mkdir()
    (cache / "tinyshakespeare.txt").write_bytes(SMALL_TEXT.encode())
    assert tiny_shakespeare().text == SMALL_TEXT


@pytest.mark.skipif(
    not os.environ.get("MEMTX_DATA_DIR"),
    reason="MEMTX_DATA_DIR does not name a folder with the real text",
)
def test_the_real_text():
    corpus = tiny_shakespeare()
    assert corpus.name == "Tiny Shakespeare"
    assert corpus.text.startswith("First Citizen:\nBefore we proceed")
    assert len(corpus.text) == 1_115_394 and len(corpus.vocab) == 65
    assert corpus.digest == corpora.SHA256
    assert corpus.train.shape == (1_003_855,) and corpus.valid.shape == (111_539,)
    assert corpus.vocab.decode(corpus.valid) == corpus.text[-111_539:]


# ---------------------------------------------------------------- the synthetic play


@pytest.fixture(scope="module")
def play():
    return synthetic_play()


def test_the_play_is_the_same_on_every_machine(play):
    assert len(play.text) == 1_115_394 and play.name == "synthetic play"
    for text, digest in [
        (
            play.text[:10_000],
            "a8c2ce4722dbc8b905fb336b404ee81a9ccad47f024bf89d923650b843214801",
        ),
        (
            play.text,
            "0a0f8c662e59a15eceb3440140247869ba1cd4b71798fcdc7ea2e8ea9cc73f20",
        ),
    ]:
        assert hashlib.sha256(text.encode()).hexdigest() == digest


def test_a_longer_play_begins_with_the_shorter_and_a_seed_makes_another(play):
    assert synthetic_play(5_000).text == play.text[:5_000]
    assert synthetic_play(5_000, seed=1).text != play.text[:5_000]
    assert len(synthetic_play(5_000, valid_fraction=0.2).valid) == 1_000


@pytest.mark.parametrize("n_characters", [-1, 0, 1, 10])
def test_a_play_too_short_to_split_is_an_error(n_characters):
    with pytest.raises(ValueError):
        synthetic_play(n_characters)


@pytest.mark.parametrize(
    "sizes, message",
    [
        (dict(n_characters=-1), "n_characters=-1 is not a whole number >= 0"),
        (dict(n_characters=1e4), "n_characters=10000.0 is not a whole number"),
        (dict(n_characters="100"), "n_characters='100'"),
        (dict(seed=None), "seed=None is not a whole number"),
        (dict(seed=-1), "seed=-1 is not a whole number >= 0"),  # would be as seed 1
        (dict(seed=0.5), "seed=0.5 is not a whole number"),
        (dict(seed="a seed"), "seed='a seed' is not a whole number"),
    ],
)
def test_a_play_is_made_of_whole_numbers(sizes, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        synthetic_play(**sizes)


def test_a_play_takes_integers_of_numpy(play):
    again = synthetic_play(np.int32(5_000), seed=np.int64(0))
    assert again.text == play.text[:5_000]
    assert again.digest == hashlib.sha256(play.text[:5_000].encode()).hexdigest()


def test_the_play_looks_like_shakespeare(play):
    shakespeare = set("\n !$&',-.3:;?" + string.ascii_letters)
    assert set(play.text) <= shakespeare and 55 <= len(play.vocab) <= 65
    for part in (play.train, play.valid):  # nothing is only in one of them
        assert set(play.vocab.decode(part)) == set(play.text)
    speeches = play.text.split("\n\n")[:-1]
    for speech in speeches:
        assert re.fullmatch(r"[A-Z]+:(\n[A-Z'].{1,79})+", speech), speech
        assert speech[-1] in ".!?"
    lines = [len(line) for speech in speeches for line in speech.split("\n")[1:]]
    assert 25 < sum(lines) / len(lines) < 50
    assert 100 < len(play.text) / len(speeches) < 250
    assert "  " not in play.text and " \n" not in play.text


def test_words_are_as_frequent_as_in_a_language(play):
    counts = Counter(re.findall(r"[a-z']+", play.text.lower())).most_common()
    n_words = len(play.text.split())
    shares = [count / n_words for _, count in counts]
    assert 5_000 < len(counts) < 20_000  # 12,600 in Tiny Shakespeare
    # half of the text is made of a few words, 0.42 there; nats a word, 6.8 there
    assert 0.3 < sum(shares[:50]) < 0.6
    assert 6.5 < -sum(share * math.log(share) for share in shares) < 7.5


def test_the_cast_returns_after_long_gaps(play):
    entrances = {}
    for match in re.finditer(r"(?:^|\n\n)([A-Z]+):\n", play.text):
        entrances.setdefault(match[1], []).append(match.start())
    assert 40 <= len(entrances) <= 60
    for places in entrances.values():
        gaps = sorted(b - a for a, b in itertools.pairwise(places))
        assert gaps[len(gaps) // 2] < 1_000  # on the stage, speaking often
        assert gaps[-5] > 10_000  # away for several scenes, five times or more
    seam = len(play.train)  # validation meets the characters that training knows
    in_both = [places[0] < seam < places[-1] for places in entrances.values()]
    assert sum(in_both) > 0.7 * len(entrances)


def word_loss(train, valid, n_back):
    """Nats a word on `valid`.

    Guessed from the frequencies in `train` and the n_back words before, in the best
    mixture.
    """
    frequency, total = Counter(train), len(train) + 10_000
    guesses = []
    for i in range(50, min(12_000, len(valid))):
        word, before = valid[i], valid[i - n_back : i]
        often = (frequency[word] + 0.5) / total
        guesses.append((often, before.count(word) / max(1, n_back)))

    def loss(share):
        mixed = [(1 - share) * often + share * lately for often, lately in guesses]
        return -sum(math.log(chance) for chance in mixed) / len(guesses)

    return min(loss(share) for share in ((0.03, 0.06, 0.1, 0.15) if n_back else (0,)))


def test_it_pays_to_remember_the_play(play):
    texts = [play.vocab.decode(part).lower() for part in (play.train, play.valid)]
    words = [re.findall(r"[a-z']+", text) for text in texts]
    n_backs = (0, 6, 12, 24, 48)  # 0, 35, 70, 140 and 280 characters
    loss = [word_loss(*words, n_back) for n_back in n_backs]
    for shorter, longer in itertools.pairwise(loss):
        assert shorter > longer + 0.02, loss


def test_a_line_is_as_long_as_the_lines_before(play):
    """Who remembers a speaker's lines knows within a word where the next one breaks."""
    widths = {}
    for speaker, lines in re.findall(r"(?:^|\n\n)([A-Z]+):\n((?:.+\n)+)", play.text):
        all_but_the_last = lines.split("\n")[:-2]
        widths.setdefault(speaker, []).extend(map(len, all_but_the_last))
    typical = {speaker: statistics.median(widths[speaker]) for speaker in widths}
    assert max(typical.values()) - min(typical.values()) > 10  # speakers differ
    for speaker, lengths in widths.items():
        near = [abs(length - typical[speaker]) <= 6 for length in lengths]
        assert sum(near) > 0.9 * len(lengths)


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
        assert torch.equal(targets, tokens + 1)  # the stream counts up
    assert all(tokens.size(1) == segment_len for tokens, _ in segments[:-1])
    assert 1 <= segments[-1][0].size(1) <= segment_len
    joined = torch.cat([tokens for tokens, _ in segments], dim=1)  # (B, lane_len)
    joined = joined.flatten()  # lane after lane
    assert torch.equal(joined, stream[: len(joined)])
    left_over = len(stream) - 1 - len(joined)  # but for the very last target
    assert left_over in range(batch_size)


def test_seams():
    segments = list(lanes(torch.arange(13), batch_size=2, segment_len=4))
    (first, after), (last, end) = segments
    assert first.tolist() == [[0, 1, 2, 3], [6, 7, 8, 9]]
    assert after.tolist() == [[1, 2, 3, 4], [7, 8, 9, 10]]
    assert last.tolist() == [[4, 5], [10, 11]]
    assert end.tolist() == [[5, 6], [11, 12]]


def test_lanes_are_views_of_the_stream_and_read_once():
    stream = torch.arange(100)
    segments, whole = lanes(stream, 4, 8), stream.untyped_storage().data_ptr()
    for tokens, targets in segments:
        assert tokens.untyped_storage().data_ptr() == whole
        assert targets.untyped_storage().data_ptr() == whole
    assert next(segments, None) is None


def test_lanes_take_integers_of_numpy():
    stream = torch.arange(2000)
    for B, T in [(np.uint8(3), np.int64(70)), (np.int8(100), np.uint8(255))]:
        expected = list(lanes(stream, int(B), int(T)))
        for ours, theirs in zip(lanes(stream, B, T), expected, strict=True):
            assert torch.equal(ours[0], theirs[0]) and torch.equal(ours[1], theirs[1])


def test_lanes_of_every_second_token():
    tokens, _ = next(lanes(torch.arange(40)[::2], 2, 3))
    assert tokens.tolist() == [[0, 2, 4], [18, 20, 22]]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
def test_lanes_stay_on_the_gpu():
    tokens, targets = next(lanes(torch.arange(100, device="cuda"), 4, 8))
    assert tokens.is_cuda and targets.is_cuda


TEN = torch.arange(10)


@pytest.mark.parametrize(
    "stream, batch_size, segment_len, message",
    [
        (TEN, 10, 4, "10 tokens do not fill 10 lanes.* use a batch_size of 1 to 9"),
        (TEN, 0, 4, "batch_size=0 is not a whole number >= 1"),
        (TEN, -2, 4, "batch_size=-2"),
        (TEN, 2.0, 4, "batch_size=2.0"),
        (TEN, True, 4, "batch_size=True"),
        (TEN, 2, 0, "segment_len=0 is not a whole number >= 1"),
        (TEN, 2, -3, "segment_len=-3"),
        (TEN, 2, 4.0, "segment_len=4.0"),
        (TEN, 2, None, "segment_len=None"),
        (TEN[:1], 1, 4, "a stream of 1 tokens has nothing to predict: use 2 tokens or"),
        (TEN[:0], 1, 4, "use 2 tokens or more"),
        (TEN.view(2, 5), 2, 4, r"stream \(N,\) of torch.int64, not \(2, 5\) of torch"),
        (TEN[3], 1, 1, r"not \(\) of torch.int64"),
        (TEN.float(), 2, 4, r"not \(10,\) of torch.float32"),
        (TEN.int(), 2, 4, "torch.int32"),
        (
            TEN.tolist(),
            2,
            4,
            r"a tensor \(N,\) of torch.int64.*not list: .*torch.tensor",
        ),
        (TEN.numpy(), 2, 4, "not ndarray: torch.from_numpy"),
        ("a text", 2, 4, "not str"),
        (Corpus.from_text("a text", SMALL_TEXT), 2, 4, "corpus.train, not Corpus"),
    ],
)
def test_lanes_complain_at_once(stream, batch_size, segment_len, message):
    with pytest.raises(ValueError, match=message):
        lanes(stream, batch_size, segment_len)  # before a segment is asked for
