"""All models say the same of odd input, early, in the same words, and name what is valid."""

import time

import numpy as np
import pytest
import torch
from test_models import MODELS, SMALL, tokens

from memtx_minimal import inputs
from memtx_minimal.compressive_transformer import CompressiveTransformer
from memtx_minimal.feedback_transformer import FeedbackTransformer
from memtx_minimal.memory_today import MemoryToday
from memtx_minimal.reformer import Reformer
from memtx_minimal.transformer_xl import TransformerXL
from memtx_minimal.vanilla_transformer import VanillaTransformer

CLASSES = [
    VanillaTransformer,
    TransformerXL,
    CompressiveTransformer,
    FeedbackTransformer,
    Reformer,
    MemoryToday,
]


def names(model):
    return [name for name in MODELS if name.split()[0] == model] or [model]


ONE_EACH = ["vanilla", "xl", "compressive", "feedback", "reformer hashed", "cache", "pooled", "delta"]
WITH_MEMORY = ["xl", "compressive", "feedback", "cache", "pooled", "delta"]

# ------------------------------------------------------------------ tokens


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    "odd, words",
    [
        (
            torch.zeros(5, dtype=torch.int64),
            r"tokens of shape \(5,\).*a single text is tokens",
        ),
        (
            torch.zeros(2, 3, 4, dtype=torch.int64),
            r"\(2, 3, 4\); pass \(B, T\), B and T >= 1",
        ),
        (torch.zeros((), dtype=torch.int64), r"tokens of shape \(\); pass \(B, T\)"),
        (
            torch.zeros(0, 4, dtype=torch.int64),
            r"tokens of shape \(0, 4\); pass \(B, T\)",
        ),
        (
            torch.zeros(2, 0, dtype=torch.int64),
            r"tokens of shape \(2, 0\); pass \(B, T\)",
        ),
        (
            torch.zeros(2, 4),
            r"tokens: torch.float32; pass a tensor \(B, T\) of torch.int64",
        ),
        (torch.zeros(2, 4, dtype=torch.int32), "tokens: torch.int32; pass a tensor"),
        (torch.zeros(2, 4, dtype=torch.bool), "tokens: torch.bool; pass a tensor"),
        ([[1, 2], [3, 4]], "tokens: list; pass a tensor"),
        ("to be", "tokens: str; pass a tensor"),
        (np.zeros((2, 4), dtype=np.int64), "tokens: int64; pass a tensor"),
        (torch.tensor([[1, 11]]), r"token 11: this vocabulary has 0 \.\.\. 10"),
        (torch.tensor([[1, -1]]), r"token -1: this vocabulary has 0 \.\.\. 10"),
        (torch.tensor([[2**40, 0]]), "token 1099511627776: this vocabulary has"),
    ],
)
def test_odd_tokens(name, odd, words):
    with pytest.raises(ValueError, match=words):
        MODELS[name]()(odd)


@pytest.mark.parametrize("name", WITH_MEMORY)
def test_no_tokens_behind_a_memory(name):
    model = MODELS[name]()
    memory = model(tokens(2, 4))[1]
    with pytest.raises(ValueError, match=r"tokens of shape \(2, 0\)"):
        model(tokens(2, 4)[:, :0], memory)


@pytest.mark.parametrize("name", ["vanilla", "reformer short", "reformer hashed"])
def test_a_text_longer_than_the_window(name):
    with pytest.raises(
        ValueError, match="25 tokens do not fit the window: pass 1 to 24"
    ):
        MODELS[name]()(tokens(1, 25))


# ------------------------------------------------------------------ memory


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("name", WITH_MEMORY)
@pytest.mark.parametrize("other", ONE_EACH)
def test_the_memory_of_another_model(name, other, grad):
    model = MODELS[name]()
    with torch.set_grad_enabled(grad):
        foreign = MODELS[other]()(tokens(2, 4))[1]
        if name != other and foreign is not None:
            with pytest.raises(
                ValueError, match="memory is .*, this model's (is )?.*or None"
            ):
                model(tokens(2, 4), foreign)


@pytest.mark.parametrize("name", ["vanilla", "reformer short", "reformer hashed"])
def test_memory_for_a_model_without_one(name):
    memory = MODELS["xl"]()(tokens(2, 4))[1]
    with pytest.raises(
        ValueError, match="memory: a list of 3.*this model has none: pass None"
    ):
        MODELS[name]()(tokens(2, 4), memory)


@pytest.mark.parametrize("odd", [7, "memory", {}, [], (), [None] * 3, object()])
@pytest.mark.parametrize("name", ONE_EACH)
def test_memory_that_is_none(name, odd):
    model = MODELS[name]().eval()
    if odd == [None] * 3 and name in ("cache", "pooled", "delta"):  # nothing yet, layer by layer
        return torch.testing.assert_close(model(tokens(1, 4), odd)[0], model(tokens(1, 4))[0])
    with pytest.raises(
        ValueError, match="memory.*pass (what this model returned, or )?None"
    ):
        model(tokens(2, 4), odd)


def changed(memory, work):
    """A memory with another tensor in place of each."""
    if isinstance(memory, torch.Tensor):
        return work(memory)
    return type(memory)(changed(part, work) for part in memory)


@pytest.mark.parametrize("name", WITH_MEMORY)
@pytest.mark.parametrize(
    "work, words",
    [
        (lambda m: m.repeat(4, *[1] * (m.dim() - 1)), "memory of 8 streams, tokens of 2"),
        (lambda m: m[..., :-1], r"memory is .*\d\), this model's is .*\d\)"),
        (lambda m: m[0], "memory is .*, this model's is "),
        (
            lambda m: m.double(),
            "memory in torch.float64, this model computes in torch.float32",
        ),
        (lambda m: m.to("meta"), "memory on meta, tokens on cpu"),
    ],
)
def test_a_memory_of_another_form(name, work, words):
    model = MODELS[name]()
    memory = model(tokens(2, 4))[1]
    with pytest.raises(ValueError, match=words):
        model(tokens(2, 4), changed(memory, work))


@pytest.mark.parametrize("name", ["xl", "compressive"])
def test_a_memory_of_other_layers(name):
    model = MODELS[name]()
    memory = model(tokens(2, 4))[1]
    for wrong in (memory[:-1], memory + memory[:1]):
        with pytest.raises(
            ValueError, match=f"memory is a list of {len(wrong)}.*a list of 3"
        ):
            model(tokens(2, 4), wrong)
    uneven = changed(memory[:1], lambda m: m[:, :1]) + memory[1:]
    with pytest.raises(ValueError, match="slots in different layers"):
        model(tokens(2, 4), uneven)


@pytest.mark.parametrize("name", ["xl", "feedback"])
def test_a_lowered_mem_len_bounds_what_is_seen(name):
    model = MODELS[name]().double().eval()
    memory = model(tokens(2, 9))[1]
    model.mem_len = 2
    short = changed(memory, lambda m: m[:, -2:])
    torch.testing.assert_close(
        model(tokens(2, 1, seed=3), memory)[0], model(tokens(2, 1, seed=3), short)[0]
    )


# ------------------------------------------------------------------ sizes

SIZES = [
    ("vocab_size", 0), ("d_model", 0), ("n_heads", 0), ("n_heads", -2), ("n_layers", 0),
    ("n_layers", -1), ("d_ff", 0), ("n_layers", 2.0), ("n_layers", True), ("d_ff", "8"),
    ("n_heads", None), ("vocab_size", 11.5),
]  # fmt: skip


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("size, value", SIZES)
def test_sizes_below_one_and_no_whole_numbers(cls, size, value):
    with pytest.raises(
        ValueError, match=f"{size}={value!r} is not a whole number >= 1"
    ):
        cls(**SMALL | {size: value})


@pytest.mark.parametrize("cls", CLASSES)
def test_sizes_that_all_models_have(cls):
    with pytest.raises(
        ValueError, match="d_model=16 is not a multiple of n_heads=3: use 15 or 18"
    ):
        cls(**SMALL | {"n_heads": 3})
    for dropout in (-0.1, 1.5, float("nan"), "0.1", None):
        with pytest.raises(ValueError, match="dropout=.* is not a number in 0 ... 1"):
            cls(**SMALL, dropout=dropout)


@pytest.mark.parametrize(
    "cls, kw, words",
    [
        (VanillaTransformer, dict(max_len=0), "max_len=0 is not a whole number >= 1"),
        (VanillaTransformer, dict(d_model=15, n_heads=3), "d_model=15 is odd: use 14 or 16"),
        (TransformerXL, dict(d_model=15, n_heads=3), "d_model=15 is odd"),
        (CompressiveTransformer, dict(d_model=15, n_heads=3), "d_model=15 is odd"),
        (TransformerXL, dict(mem_len=-1), "mem_len=-1 is not a whole number >= 0"),
        (TransformerXL, dict(mem_len=2.5), "mem_len=2.5 is not a whole number >= 0"),
        (TransformerXL, dict(clamp_len=0), "clamp_len=0 is not a whole number >= 1, nor None"),
        (TransformerXL, dict(clamp_len=1.5), "clamp_len=1.5 is not"),
        (CompressiveTransformer, dict(mem_len=4.0), "mem_len=4.0 is not a whole number"),
        (CompressiveTransformer, dict(compressed_len=-1), "compressed_len=-1 is not"),
        (CompressiveTransformer, dict(compression_rate=0), "compression_rate=0 is not"),
        (CompressiveTransformer, dict(compression_rate=2.5), "compression_rate=2.5 is not"),
        (FeedbackTransformer, dict(mem_len=0), "mem_len=0 is not a number >= 1"),
        (FeedbackTransformer, dict(mem_len=2.5), "mem_len=2.5 is not a whole number"),
        (Reformer, dict(chunk_len=0), "chunk_len=0 is not a whole number >= 1"),
        (Reformer, dict(n_rounds=2.5), "n_rounds=2.5 is not a whole number >= 0"),
        (Reformer, dict(n_rounds=-1), "n_rounds=-1 is not a whole number >= 0"),
        (Reformer, dict(piece_len=0), "piece_len=0 is not a whole number >= 1"),
        (Reformer, dict(axial_shape=(4, 0)), "axial_shape=.4, 0. is not a pair of whole numbers"),
        (Reformer, dict(axial_shape=(4, 2.5)), "axial_shape=.4, 2.5. is not a pair"),
    ],
)  # fmt: skip
def test_sizes_of_one_model(cls, kw, words):
    with pytest.raises(ValueError, match=words):
        cls(**SMALL | kw)


@pytest.mark.parametrize("cls", CLASSES)
def test_whole_numbers_of_numpy_are_whole_numbers(cls):
    model = cls(
        **{name: np.int64(size) for name, size in SMALL.items()},
        dropout=np.float32(0.1),
    )
    assert model(tokens(2, 4))[0].shape == (2, 4, 11)
    CompressiveTransformer(**SMALL, mem_len=np.int64(4), compression_rate=np.int32(2))


@pytest.mark.parametrize(
    "cls", [VanillaTransformer, TransformerXL, CompressiveTransformer]
)
def test_heads_of_odd_width(cls):
    """Only d_model must be even: the authors' own WikiText-103 base has 410 and 10 heads."""
    model = cls(11, d_model=410, n_heads=10, n_layers=1, d_ff=8)
    assert model(tokens(2, 4))[0].isfinite().all()


@pytest.mark.parametrize("name, kw", [("xl", {"clamp_len": 0}), ("xl", {"mem_len": 2.5}),
                                      ("compressive", {"mem_len": 0}),
                                      ("compressive", {"mem_len": 4.0}),
                                      ("compressive", {"compressed_len": -1}),
                                      ("feedback", {"mem_len": 0})])  # fmt: skip
def test_lengths_changed_later_are_checked_too(name, kw):
    model = MODELS[name]()
    for length, value in kw.items():
        setattr(model, length, value)
        with pytest.raises(ValueError, match=f"{length}={value} is not a "):
            model(tokens(2, 4))


def test_the_smaller_pieces_of_transformer_xl():
    from memtx_minimal import transformer_xl as xl

    with pytest.raises(ValueError, match="limit=0 is not a number >= 1"):
        xl.attention_mask(xl.distances(2, 2), limit=0)
    with pytest.raises(ValueError, match="d_model=7 is odd: use 6 or 8"):
        xl.sinusoid(torch.arange(3), 7)
    attention = xl.RelativeAttention(16, 2, 0.0)
    seen = torch.ones(4, 4, dtype=torch.bool).tril()
    with pytest.raises(
        ValueError, match="mask of torch.bool is added to scores: 0 shows"
    ):
        attention(torch.zeros(1, 4, 16), torch.zeros(5, 16), seen)


# ------------------------------------------------------------------ precision, and what checks cost


@pytest.mark.parametrize("name", ["vanilla_transformer", "transformer_xl"])
def test_positions_are_computed_in_float32(name):
    """Fault 8: in bfloat16 the distances 1000 to 1015 had five encodings."""
    import importlib

    sinusoid = importlib.import_module(f"memtx_minimal.{name}").sinusoid
    expected = sinusoid(torch.arange(1000, 1016), 64)
    for dtype in (torch.bfloat16, torch.float64):
        torch.set_default_dtype(dtype)
        try:
            encoding = sinusoid(torch.arange(1000, 1016), 64)
        finally:
            torch.set_default_dtype(torch.float32)
        assert encoding.dtype == torch.float32 and torch.equal(encoding, expected)
    assert len(expected.unique(dim=0)) == 16


def test_a_model_built_on_the_meta_device_is_whole_once_it_has_weights():
    """Fault 11: a buffer of positions stayed undefined after load_state_dict."""
    for cls in CLASSES:
        model = cls(**SMALL)
        with torch.device("meta"):
            hollow = cls(**SMALL)
        hollow.load_state_dict(model.state_dict(), assign=True)
        filled = hollow.eval()(tokens(2, 4))[0]
        torch.testing.assert_close(filled, model.eval()(tokens(2, 4))[0])
        with torch.device("meta"):
            hollow = cls(**SMALL)
        hollow = hollow.to_empty(device="cpu")
        hollow.load_state_dict(model.state_dict())
        torch.testing.assert_close(hollow.eval()(tokens(2, 4))[0], filled)


def test_no_autocast_where_it_is_off_already(monkeypatch):
    """Fault 6: torch 2.4 has none for MPS, not even to turn it off."""

    def refuse(*args, **kw):
        raise RuntimeError("User specified an unsupported autocast device_type 'mps'")

    monkeypatch.setattr(torch, "autocast", refuse)
    monkeypatch.setattr(torch, "is_autocast_enabled", refuse)
    with inputs.autocast("mps", enabled=False):
        pass
    for name in MODELS:
        model = MODELS[name]()
        model(tokens(2, 8))[0].sum().backward()
    with pytest.raises(RuntimeError, match="unsupported"):
        inputs.autocast("mps", enabled=True)


def test_autocast_that_is_on_is_turned_off():
    a = torch.ones(2, 2)
    with torch.autocast("cpu", torch.bfloat16):
        settings = inputs.autocast_settings("cpu")
        with inputs.autocast("cpu", enabled=False):
            assert (a @ a).dtype == torch.float32
        assert (a @ a).dtype == torch.bfloat16
    with inputs.autocast("cpu", **settings):
        assert (a @ a).dtype == torch.bfloat16


def test_memory_on_the_meta_device_needs_no_numbers():
    with torch.device("meta"):
        model = TransformerXL(**SMALL)
        logits, memory = model(torch.zeros(2, 4, dtype=torch.int64))
        assert model(torch.zeros(2, 4, dtype=torch.int64), memory)[0].shape == (
            2,
            4,
            11,
        )


def test_checks_cost_next_to_nothing():
    """The benchmark `checks` measures it; here only that they do not grow with the model."""
    text, memory = tokens(16, 64), [torch.zeros(16, 64, 128)] * 4
    empty = [torch.zeros(16, 0, 128)] * 4
    start = time.perf_counter()
    for _ in range(100):
        inputs.check_tokens(text, 11)
        inputs.checked_memory(memory, empty)
    assert (
        time.perf_counter() - start < 1
    )  # some 2 ms; a step takes 60 times as long as one
