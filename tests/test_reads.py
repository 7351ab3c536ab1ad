"""What the explorer shows is what the models read, slot by slot."""

import base64
import io
import json
import re
import zlib

import matplotlib
import numpy as np
import pytest
import torch
from PIL import Image as Picture
from test_models import MODELS, tokens

matplotlib.use("Agg")

from memtx_minimal import corpora, figures, measure  # noqa: E402
from memtx_minimal.reformer import in_set  # noqa: E402

VOCAB = corpora.Vocabulary("abcdefgh \n'")
KINDS = {  # the name in the explorer: the model of test_models, and its segments
    "vanilla": ("vanilla", 5),
    "Transformer-XL": ("xl", 5),
    "Compressive": ("compressive mean", 4),
    "Feedback": ("feedback", 5),
    "Reformer": ("reformer hashed", None),
}


def built(name):
    torch.manual_seed(0)
    model = MODELS[KINDS[name][0]]()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def reads_of(name, N=22):
    return measure.reads(built(name), tokens(1, N)[0], KINDS[name][1])


@pytest.fixture
def shown(monkeypatch):
    """The bundle of types that was displayed, and what was said about it."""
    outputs = []

    def display(bundle, raw, metadata):
        outputs.append((bundle, metadata))

    monkeypatch.setattr(figures, "display", display)
    return outputs


def unpacked(page):
    """As explorer.html does it: the line of JSON, and the weights of each model."""
    packed = re.search('data-reads="([^"]*)"', page)[1]
    line, weights = zlib.decompress(base64.b64decode(packed)).split(b"\n", 1)
    data, weights = json.loads(line), np.frombuffer(weights, np.uint8)
    for model in data["models"]:
        total = sum(run[3] for runs in model["slots"] for run in runs)
        n = model["layers"] * model["heads"] * total
        model["weights"] = weights[:n].reshape(model["layers"], model["heads"], total)
        weights = weights[n:]
    assert not len(weights)
    return data


# ------------------------------------------------------------------ what is read


@pytest.mark.parametrize("name", KINDS)
def test_each_token_has_one_weight_for_each_slot(name):
    model, text = built(name).train(), tokens(1, 22)[0]
    one = measure.reads(model, text, KINDS[name][1])
    assert model.training and torch.equal(one.tokens, text)
    for t, weights in enumerate(one.weights):
        slots = one.stands_for(t)
        assert weights.shape == (3, 2, len(slots))
        if slots:  # the first step of Feedback has none
            torch.testing.assert_close(weights.sum(-1), torch.ones(3, 2))
        places = [place for slot in slots for place in slot]
        assert places == sorted(set(places))  # each token once, in its order
        assert all(0 <= place <= t for place in places)


def test_a_window_has_its_own_tokens_alone():
    one = reads_of("vanilla")
    assert one.slots[3] == [("segment", 0, 1, 4)]
    assert one.slots[11] == [("segment", 10, 1, 2)]


def test_weights_are_those_that_were_recorded():
    model, text = built("Transformer-XL").eval(), tokens(1, 22)
    one, memory = measure.reads(model, text[0], 5), None
    for first in range(0, 22, 5):
        with measure.record_attention(model) as weights:
            _, memory = model(text[:, first : first + 5], memory)
        for layer in range(3):
            for i, row in enumerate(weights[layer][0].movedim(1, 0)):  # (H, K)
                seen = one.weights[first + i][layer]
                assert torch.equal(seen, row[:, : seen.size(1)])
                assert not row[:, seen.size(1) :].any()


def states(model, text, slots, zone):
    """Embeddings of the tokens that each slot of a zone stands for, (n, width, d)."""
    own = [slot for slot in slots if slot[0] == zone]
    return [
        model.embedding(text[first + width * i : first + width * (i + 1)])
        for _, first, width, n in own
        for i in range(n)
    ]


@torch.no_grad()
def test_memory_is_the_embeddings_of_the_tokens_that_it_stands_for():
    """The lowest layer of a Transformer-XL remembers embeddings: here, whose."""
    model, text = built("Transformer-XL").eval(), tokens(1, 22)[0]
    one, memory = measure.reads(model, text, 5), None
    for first in range(0, 22, 5):
        for t in range(first, min(first + 5, 22)):
            own = states(model, text, one.slots[t], "memory")
            assert len(own) == (0 if memory is None else memory[0].size(1))
            for n, state in enumerate(own):
                torch.testing.assert_close(memory[0][0, n : n + 1], state)
        _, memory = model(text[None, first : first + 5], memory)
    assert len(own) == 6


@torch.no_grad()
@pytest.mark.parametrize("segment_len", [4, 3])
def test_a_compressed_slot_is_the_mean_of_the_tokens_that_it_stands_for(segment_len):
    model, text = built("Compressive").eval(), tokens(1, 30)[0]
    one, memory = measure.reads(model, text, segment_len), None
    for first in range(0, 30, segment_len):
        for t in range(first, min(first + segment_len, 30)):
            for part, zone in enumerate(["compressed", "memory"]):
                own = states(model, text, one.slots[t], zone)
                kept = () if memory is None else memory[0][part][0]
                assert len(own) == len(kept)
                for state, slot in zip(kept, own):
                    torch.testing.assert_close(state, slot.mean(dim=0))
        _, memory = model(text[None, first : first + segment_len], memory)
    assert {zone for zone, *_ in one.slots[-1]} == {"compressed", "memory", "segment"}


@torch.no_grad()
def test_a_vector_is_the_step_that_it_stands_for():
    """With all the weight on the embedding, the vectors are the embeddings."""
    model, text = built("Feedback").eval(), tokens(1, 22)[0]
    model.memory.layer_weights.copy_(torch.tensor([999.0, 0, 0, 0]))
    one, memory = measure.reads(model, text, 5), None
    assert one.mixture.tolist() == [1, 0, 0, 0]
    for t in range(22):
        own = states(model, text, one.slots[t], "vectors")
        assert len(own) == (0 if memory is None else memory.size(1))
        for n, state in enumerate(own):
            torch.testing.assert_close(memory[0, n : n + 1], state)
        _, memory = model(text[None, t : t + 1], memory)
    assert len(own) == 6


def test_a_bucket_holds_what_the_reformer_reads():
    one = reads_of("Reformer")
    assert one.buckets.shape == one.chunks.shape == (3, 2, 2, 22)
    queries = one.buckets[..., None], one.chunks[..., None]
    found = in_set(*queries, *(x.mT for x in queries)).any(dim=1)  # (L, H, N, N)
    for t, weights in enumerate(one.weights):
        seen = found[:, :, t, : t + 1]
        assert not weights[~seen].any()
        assert (weights[seen][:] > 0).sum() >= seen[:, :, :t].sum()  # but for itself
    assert found.float().mean() < 0.5


def test_a_reformer_that_need_not_hash_has_one_window():
    one = measure.reads(MODELS["reformer short"](), tokens(1, 20)[0])
    assert one.buckets is None and one.slots[7] == [("segment", 0, 1, 8)]


@pytest.mark.parametrize(
    "name, segment_len, message",
    [
        ("compressive", 5, "segment_len=5 is not a number in 1 ... 4"),
        ("xl", 0, "segment_len=0 is not a whole number >= 1"),
        ("xl without memory", None, "segment_len=0 is not"),
        ("feedback, fast", 5, "does not show its attention: take the plain model"),
        ("cache", 5, "MemoryToday is not of the chapters 0 to 4"),
        ("delta", None, "MemoryToday is not of the chapters 0 to 4"),
    ],
)
def test_what_cannot_be_read_is_refused(name, segment_len, message):
    model = MODELS[name]()
    with pytest.raises(ValueError, match=message):
        measure.reads(model, tokens(1, 20)[0], segment_len)
    assert model.training
    with pytest.raises(ValueError, match=r"tokens of shape \(2, 8\); pass one text"):
        measure.reads(model, tokens(2, 8))


# ------------------------------------------------------------------ what is shown


def test_the_explorer_holds_the_weights_slots_and_text_of_every_model(shown):
    seen = {name: reads_of(name) for name in KINDS}
    figures.explorer(seen, VOCAB, at=9)
    data = unpacked(shown[0][0]["text/html"])
    assert "".join(data["text"]) == VOCAB.decode(tokens(1, 22)[0]) and data["at"] == 9
    assert [model["name"] for model in data["models"]] == list(KINDS)
    for model, one in zip(data["models"], seen.values()):
        assert model["colour"] == figures.COLOUR[model["name"]]
        assert [[tuple(run) for run in runs] for runs in model["slots"]] == one.slots
        flat = torch.cat(one.weights, dim=-1).numpy()
        assert model["levels"] == 255
        assert np.abs(model["weights"] / 255 - flat).max() < 1 / 255
        for key in ("mixture", "buckets", "chunks"):
            if (tensor := getattr(one, key)) is not None:
                np.testing.assert_allclose(model[key], tensor.numpy())


def test_the_explorer_loads_nothing_and_two_do_not_clash(shown):
    for _ in range(2):
        figures.explorer({"vanilla": reads_of("vanilla")}, VOCAB)
    first, second = (bundle["text/html"] for bundle, _ in shown)
    assert first == second and len(first) < 60_000
    assert not re.search(r"//[\w.-]+\.\w+/|\bid=|\bsrc=\"(?!data:)", first)
    assert not re.search("@[A-Z]+@", first)


def test_a_still_picture_with_words_stands_in(shown):
    figures.explorer({"Compressive": reads_of("Compressive")}, VOCAB, at=21)
    bundle, about = shown[0]
    still = base64.b64decode(bundle["image/png"])
    assert Picture.open(io.BytesIO(still)).format == "PNG"
    alt = about["image/png"]["alt"]
    assert alt == bundle["text/plain"]
    assert re.search(r"at 21 .*Compressive: compressed \d+%, memory \d+%, segment", alt)
    assert f'src="data:image/png;base64,{bundle["image/png"]}"' in bundle["text/html"]


def spread(L, H, sharpness):
    """300 tokens, 64 keys each, and weights that have nothing in common."""
    torch.manual_seed(0)
    slots = [[("segment", max(0, t - 63), 1, min(t + 1, 64))] for t in range(300)]
    sizes = (min(t + 1, 64) for t in range(300))
    weights = [(sharpness * torch.randn(L, H, n)).softmax(dim=-1) for n in sizes]
    return measure.Reads(torch.randint(11, (300,)), weights, slots)


def test_five_models_and_300_characters_fit_in_300_kB(shown):
    one = spread(2, 4, sharpness=3)
    figures.explorer({name: one for name in KINDS}, VOCAB)
    page = shown[0][0]["text/html"]
    assert len(page.encode()) <= 300_000
    assert len(unpacked(page)["models"]) == 5


def test_shares_add_up_to_one_when_they_are_small(shown):
    """Each of 64 keys gets less than half a level."""
    one = spread(2, 1, sharpness=0)
    figures.explorer({"vanilla": one}, VOCAB)
    (model,) = unpacked(shown[0][0]["text/html"])["models"]
    ends = np.cumsum([runs[0][3] for runs in one.slots])
    for row in np.split(model["weights"], ends[:-1], axis=-1):
        assert (row.sum(axis=-1) == model["levels"]).all()


def test_heads_become_their_mean_where_they_would_not_fit(shown, monkeypatch):
    monkeypatch.setattr(figures, "MOST_BYTES", 45_000)
    one = spread(1, 4, sharpness=1)
    figures.explorer({"vanilla": one}, VOCAB)
    (model,) = unpacked(shown[0][0]["text/html"])["models"]
    flat = torch.cat(one.weights, dim=-1).mean(dim=1, keepdim=True).numpy()
    assert model["heads"] == 1
    assert np.abs(model["weights"] / model["levels"] - flat).max() < 1 / model["levels"]


def test_what_does_not_fit_is_refused(shown, monkeypatch):
    monkeypatch.setattr(figures, "MOST_BYTES", 30_000)
    with pytest.raises(ValueError, match=r"\d+ kB, more than 30: fewer models or tokens"):
        figures.explorer({name: reads_of(name) for name in KINDS}, VOCAB)
    assert not shown


def test_what_cannot_be_shown_is_refused(shown):
    one = reads_of("vanilla")
    for reads, message in [
        ({}, "nothing to show"),
        ({"Mamba": one}, "'Mamba' is not one of vanilla, Transformer-XL, Compressive"),
        ({"vanilla": one, "Feedback": reads_of("Feedback", 21)}, "different texts"),
    ]:
        with pytest.raises(ValueError, match=message):
            figures.explorer(reads, VOCAB)
    with pytest.raises(ValueError, match="at=22: this text has the tokens 0 ... 21"):
        figures.explorer({"vanilla": one}, VOCAB, at=22)
    long = measure.Reads(torch.zeros(401, dtype=torch.int64), one.weights, one.slots)
    with pytest.raises(ValueError, match="a text of 401 tokens: pass 1 to 400"):
        figures.explorer({"vanilla": long}, VOCAB)
    assert not shown
