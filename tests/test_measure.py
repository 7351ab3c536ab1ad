"""The measures count what they say they count."""

import weakref

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from test_models import MODELS, SMALL, tokens
from torch.nn.utils import parametrizations

from memtx_minimal import measure
from memtx_minimal.transformer_xl import TransformerXL
from memtx_minimal.vanilla_transformer import VanillaTransformer

FLOAT = 4  # bytes


# ------------------------------------------------------------------ bytes


def test_nbytes_and_kept_alive_count_everything_once():
    a, b = torch.zeros(10), torch.zeros(100)
    for count in (measure.nbytes, measure.kept_alive):
        assert count(None) == count([]) == count({}) == count(torch.zeros(0)) == 0
        assert count((a, 7, [3.5, None, np.float32(1)])) == count(a) == 10 * FLOAT
        assert count([a, {"x": (b, a)}]) == 110 * FLOAT
        assert count(iter([a, b])) == count({"a": a, "b": b}.values()) == 110 * FLOAT


def test_a_view_needs_what_it_shows_and_keeps_the_whole_alive():
    b = torch.zeros(100)
    assert measure.nbytes(b[:3]) == 3 * FLOAT
    assert measure.kept_alive(b[:3]) == 100 * FLOAT
    assert measure.nbytes(b[3:3]) == 0 and measure.kept_alive(b[3:3]) == 100 * FLOAT
    assert measure.nbytes([b[:3], b]) == measure.kept_alive([b[:3], b]) == 100 * FLOAT


def test_views_that_share_bytes_need_them_once():
    b, x = torch.zeros(100), torch.zeros(4, 6)
    assert measure.nbytes([b[:3], b[:3]]) == 3 * FLOAT  # identical
    assert measure.nbytes([b[:3], b[2:5], b[50:51]]) == 6 * FLOAT  # overlapping
    assert measure.nbytes([b[:90], b[10:]]) == 100 * FLOAT
    assert measure.nbytes([x[:, :2], x[:, :2].T, x[:, 1]]) == 8 * FLOAT  # turned
    assert measure.nbytes(x.T) == 24 * FLOAT
    assert measure.nbytes(b[:12].unfold(0, 4, 1)) == 12 * FLOAT  # windows
    assert measure.nbytes([b[:3].view(torch.uint8)[:5], b[1]]) == 8  # of other types
    assert measure.nbytes(b.view(torch.complex64)[1:3]) == 4 * FLOAT


def test_an_expanded_tensor_needs_what_it_repeats():
    assert measure.nbytes(torch.zeros(()).expand(5, 7)) == FLOAT
    assert measure.nbytes(torch.zeros(3, 1).expand(3, 1000)) == 3 * FLOAT
    assert measure.nbytes(torch.zeros(3)[1:].expand(0, 2)) == 0
    assert measure.nbytes(torch.zeros(4).as_strided((2, 2), (1, 1))) == 3 * FLOAT
    many = torch.zeros(3)[1:, None].expand(2, 10**12)
    assert measure.nbytes(many) == 2 * FLOAT  # and at once


@given(
    size=st.integers(0, 12),
    views=st.lists(st.tuples(*[st.integers(0, 3)] * 5), min_size=1, max_size=3),
)
@settings(max_examples=200, deadline=None)
def test_nbytes_against_the_places_of_all_elements(size, views):
    """Any shapes, strides and offsets that fit, against a list of the places."""
    base, tensors, places = torch.zeros(size, dtype=torch.int16), [], set()
    for rows, columns, down, right, start in views:
        shown = {
            start + down * i + right * j for i in range(rows) for j in range(columns)
        }
        if max(shown, default=start) < size:
            strided = base.as_strided((rows, columns), (down, right), start)
            tensors.append(strided)
            places |= shown
    assert measure.nbytes(tensors) == 2 * len(places)


def test_tensors_without_an_address_are_told_apart():
    """On meta, and where there is nothing to store, every address is 0."""
    a, b = torch.zeros(10, device="meta"), torch.zeros(10**15, device="meta")
    many = [torch.zeros(0), a, b, a[:4], torch.zeros(3), torch.zeros(0)]
    for count in (measure.nbytes, measure.kept_alive):
        assert count(many) == (10 + 10**15 + 3) * FLOAT
    assert measure.nbytes(a[:4]) == 4 * FLOAT


def test_nbytes_counts_on_the_cpu_wherever_tensors_are_made_by_default():
    with torch.device("meta"):
        assert measure.nbytes(torch.zeros(10)[:4]) == 4 * FLOAT


def test_a_tensor_whose_storage_was_given_back_needs_nothing():
    x = torch.zeros(10)
    views = [x, x[2:]]
    x.untyped_storage().resize_(0)
    needed, alive = measure.nbytes(views), measure.kept_alive(views)
    del x, views  # printing them would crash
    assert needed == alive == 0


@pytest.mark.parametrize("count", [measure.nbytes, measure.kept_alive])
@pytest.mark.parametrize(
    "odd, message",
    [
        ("text", "cannot count the bytes of str: pass a tensor"),
        (["text"], "the bytes of str"),
        (b"text", "the bytes of bytes"),
        (np.zeros(3), "the bytes of ndarray"),
        (torch.nn.Linear(2, 2), "the bytes of Linear"),
        (
            torch.eye(3).to_sparse(),
            "dense tensors are counted, this one is torch.sparse",
        ),
        (
            [torch.eye(3).to_mkldnn()],
            "dense tensors are counted, this one is torch._mkl",
        ),
    ],
)
def test_what_cannot_be_counted_is_refused(count, odd, message):
    with pytest.raises(ValueError, match=message):
        count(odd)


@pytest.mark.filterwarnings("ignore:.*nested tensors")
def test_nested_tensors_are_refused():
    nested = torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)])
    for count in (measure.nbytes, measure.kept_alive):
        with pytest.raises(ValueError, match="dense .* this one is nested"):
            count(nested)


# ------------------------------------------------------------------ for backward


def test_bytes_for_backward_of_a_product():
    """y = tanh(x W): autograd keeps x for W, y for tanh, and W, a parameter."""
    layer = torch.nn.Linear(5, 7, bias=False)
    x = torch.randn(3, 5)
    run = lambda: layer(x).tanh()  # noqa: E731
    assert measure.bytes_for_backward(layer, run) == (3 * 5 + 3 * 7) * FLOAT
    with torch.no_grad():
        assert measure.bytes_for_backward(layer, run) == 0


def test_bytes_for_backward_of_a_view_are_not_those_of_the_text_behind_it():
    model, text = VanillaTransformer(**SMALL, max_len=8), tokens(1, 5000)[0]
    views = lambda: model(text[1000:1020].view(2, 10)[:, 2:10])  # noqa: E731
    copies = lambda: model(text[1000:1020].view(2, 10)[:, 2:10].clone())  # noqa: E731
    kept = measure.bytes_for_backward(model, views)
    assert kept == measure.bytes_for_backward(model, copies)
    whole = measure.bytes_for_backward(model, views, count=measure.kept_alive)
    alone = measure.bytes_for_backward(model, copies, count=measure.kept_alive)
    assert whole - alone == (5000 - 16) * 8


def test_bytes_for_backward_count_a_half_that_is_read_and_the_whole_that_it_keeps():
    layer = torch.nn.Linear(5, 14, bias=False)
    x = torch.randn(3, 5)
    run = lambda: layer(x).chunk(2, dim=-1)[0].sin()  # noqa: E731
    count = measure.bytes_for_backward
    assert count(layer, run) == (3 * 5 + 3 * 7) * FLOAT
    assert count(layer, run, measure.kept_alive) == (3 * 5 + 3 * 14) * FLOAT


def test_bytes_for_backward_leave_out_what_the_run_let_go():
    layer, x = torch.nn.Linear(5, 7, bias=False), torch.randn(3, 5)

    def run():
        layer(x.clone()).tanh()  # nobody will ask for its gradient
        return layer(x).tanh()

    assert measure.bytes_for_backward(layer, run) == (3 * 5 + 3 * 7) * FLOAT


def test_bytes_for_backward_let_go_of_everything_when_done():
    layer, x, held = torch.nn.Linear(5, 7), torch.randn(3, 5), []

    def run():
        out = layer(x).tanh()  # its gradient is made of the output itself: a circle
        held.append(weakref.ref(out.untyped_storage()))
        return out

    measure.bytes_for_backward(layer, run)
    assert held[0]() is None


def test_parameters_and_buffers_do_not_count_in_any_guise():
    class Tied(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = torch.nn.Embedding(11, 6)
            self.head = torch.nn.Linear(6, 11, bias=False)
            self.head.weight = self.embedding.weight
            self.register_buffer("scale", torch.rand(4, 6))

        def forward(self, x):
            part = self.head.weight[2:9, :3].T  # (3, 7)
            return self.head(x * self.scale)[:, :3] @ part

    model, x = Tied(), torch.randn(4, 6, requires_grad=True)
    # x for nobody, since scale wants no gradient; x * scale; and what part is times
    assert (
        measure.bytes_for_backward(model, lambda: model(x)) == (4 * 6 + 4 * 3) * FLOAT
    )

    layer = parametrizations.weight_norm(torch.nn.Linear(6, 5, bias=False))
    kept = measure.bytes_for_backward(layer, lambda: layer(x))
    # x, the weight made of the parameters, and their norms: none of them is a parameter
    assert kept == (4 * 6 + 5 * 6 + 5) * FLOAT


def test_a_model_on_meta_keeps_as_much_as_a_real_one():
    kept = []
    for device in ("cpu", "meta"):
        with torch.device(device):
            layer, x = torch.nn.Linear(5, 7), torch.ones(3, 5)
        kept.append(measure.bytes_for_backward(layer, lambda: layer(x).tanh().tanh()))
    assert kept[0] == kept[1] == (3 * 5 + 2 * 3 * 7) * FLOAT


def test_bytes_for_backward_grow_with_depth_and_leave_gradients_alone():
    text, kept = tokens(2, 8), []
    for n_layers in (1, 2, 3):
        model = VanillaTransformer(**SMALL | dict(n_layers=n_layers), max_len=8)
        kept.append(measure.bytes_for_backward(model, lambda: model(text)))
        assert all(p.grad is None for p in model.parameters())
    assert kept[2] - kept[1] == kept[1] - kept[0] > 0


def test_peak_bytes_sees_what_is_alive_at_once():
    def one_after_the_other():
        torch.zeros(1000).sum()
        torch.zeros(1000).sum()

    def both():
        a, b = torch.zeros(1000), torch.zeros(1000)
        return a, b

    old = torch.zeros(5000)
    assert measure.peak_bytes(one_after_the_other) == 1001 * FLOAT
    assert measure.peak_bytes(both) == 2000 * FLOAT
    assert measure.peak_bytes(lambda: old.view(50, 100)) == 0
    assert measure.peak_bytes(lambda: old.add_(1)) == 0


def test_peak_bytes_tells_a_new_storage_from_the_one_that_it_replaces():
    """The old one is freed inside the operation, and its place is free for the new."""

    @torch.library.custom_op("memtx_tests::renew", mutates_args=["x"])
    def renew(x: torch.Tensor) -> torch.Tensor:
        new = torch.zeros(1000)
        x.data = torch.zeros(())
        return new

    for _ in range(100):  # the place is taken in one of four or so
        x = torch.zeros(1000)
        assert measure.peak_bytes(lambda: renew(x)) == 1000 * FLOAT


def test_peak_bytes_of_what_is_not_dense_is_refused():
    with pytest.raises(ValueError, match="only dense tensors are counted"):
        measure.peak_bytes(lambda: torch.eye(3).to_sparse())


def test_peak_bytes_includes_the_backward_pass():
    model, text = TransformerXL(**SMALL), tokens(4, 16)
    forward = measure.peak_bytes(lambda: model(text)[0].sum())
    backward = measure.peak_bytes(lambda: model(text)[0].sum().backward())
    kept = measure.bytes_for_backward(model, lambda: model(text))
    assert backward >= forward > kept > 0


def test_process_peak_is_more_than_what_is_held():
    held = torch.ones(30_000_000)
    assert measure.process_peak_bytes() > measure.nbytes(held)


def test_seconds_is_the_median_without_warm_up(monkeypatch):
    durations = iter([100, 50, 3, 1, 2, 9, 2])  # the first two are warm-up
    clock = [0.0]
    monkeypatch.setattr(measure.time, "perf_counter", lambda: clock[0])

    def run():
        clock[0] += next(durations)

    assert measure.seconds(run, warmup=2, rounds=5) == 2


@pytest.mark.parametrize("runs", [dict(rounds=0), dict(warmup=-1), dict(rounds=-3)])
def test_seconds_need_a_run_that_counts(runs):
    with pytest.raises(ValueError, match="warmup=.* rounds="):
        measure.seconds(lambda: pytest.fail("too late"), **runs)


def test_seconds_wait_for_the_device_that_was_named(monkeypatch):
    waited = []
    monkeypatch.setattr(
        torch.cuda, "synchronize", lambda device=None: waited.append(device)
    )
    measure.seconds(lambda: None, warmup=0, rounds=1, device="cuda:1")
    assert waited == [torch.device("cuda:1")] * 2


# ------------------------------------------------------------------ attention


@pytest.mark.parametrize(
    "name",
    [n for n in MODELS if n.split()[0] in ("vanilla", "xl") or n == "reformer short"],
)
def test_recording_changes_nothing_and_gives_every_layer(name):
    """One softmax a layer.

    The others have tests of their own: pieces, steps, and no whole softmax when hashed.
    """
    torch.manual_seed(0)
    model = MODELS[name]().double().eval()
    _, memory = model(tokens(2, 8))
    plain, _ = model(tokens(2, 8, seed=2), memory)
    with measure.record_attention(model) as weights:
        recorded, _ = model(tokens(2, 8, seed=2), memory)
    torch.testing.assert_close(recorded, plain)
    K = 8 + (memory[0].size(1) if memory else 0)
    assert [w.shape for w in weights] == [(2, 2, 8, K)] * 3
    for w in weights:
        assert not w.requires_grad
        torch.testing.assert_close(w.sum(-1), torch.ones(2, 2, 8, dtype=w.dtype))
        assert (w.triu(K - 8 + 1) == 0).all()  # nobody looks into the future


def test_recorded_weights_give_the_layer_its_output():
    """Weights times values is what attention returns, layer by layer in order."""
    torch.manual_seed(0)
    model, inputs = VanillaTransformer(**SMALL, max_len=8).double().eval(), []
    for layer in model.layers:
        layer.attention.register_forward_hook(
            lambda m, args, out: inputs.append((m, args[0], out))
        )
    with measure.record_attention(model) as weights:
        model(tokens(2, 8))
    for w, (attention, x, out) in zip(weights, inputs, strict=True):
        values = (
            attention.query_key_value(x)
            .chunk(3, -1)[2]
            .unflatten(-1, (2, -1))
            .transpose(1, 2)
        )
        torch.testing.assert_close(
            attention.out((w @ values).transpose(1, 2).flatten(2)), out
        )


def test_only_the_latest_pass_of_this_model_is_kept():
    model, other = (VanillaTransformer(**SMALL, max_len=8) for _ in range(2))
    with measure.record_attention(model) as weights:
        model(tokens(2, 8))
        model(tokens(1, 5))
        other(tokens(3, 8))
        torch.zeros(1, 1, 2, 2).softmax(-1)
    assert [w.shape for w in weights] == [(1, 2, 5, 5)] * 3
    model(tokens(2, 8))
    assert len(weights) == 3 and weights[0].shape == (1, 2, 5, 5)


def test_recording_ends_even_when_the_model_fails():
    model = VanillaTransformer(**SMALL, max_len=8)
    with measure.record_attention(model) as weights:
        with pytest.raises(ValueError):
            model(tokens(1, 99))
        torch.zeros(1, 1, 2, 2).softmax(-1)
    assert weights == []


@pytest.mark.parametrize("mask", ["none", "causal", "bool", "float"])
def test_opened_fused_attention_equals_the_fused_one(mask):
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 3, 5, 4, dtype=torch.float64) for _ in range(3))
    visible = torch.rand(5, 5) > 0.3
    visible |= torch.eye(5, dtype=torch.bool)
    bias = torch.randn(5, 5, dtype=torch.float64)
    kw = {
        "none": {},
        "causal": dict(is_causal=True),
        "bool": dict(attn_mask=visible),
        "float": dict(attn_mask=bias, scale=0.3),
    }[mask]

    class Fused(torch.nn.Module):
        def forward(self):
            return F.scaled_dot_product_attention(q, k, v, **kw)

    model = Fused()
    with measure.record_attention(model) as weights:
        out = model()
    torch.testing.assert_close(out, F.scaled_dot_product_attention(q, k, v, **kw))
    torch.testing.assert_close(weights[0] @ v, out)


class Calls(torch.nn.Module):
    """A model that is one call."""

    def __init__(self, call):
        super().__init__()
        self.forward = call


def test_opened_fused_attention_takes_keywords():
    q, k, v = (torch.randn(2, 3, 5, 4) for _ in range(3))
    call = Calls(lambda: F.scaled_dot_product_attention(query=q, key=k, value=v))
    with measure.record_attention(call):
        out = call()
    torch.testing.assert_close(out, F.scaled_dot_product_attention(q, k, v))


def test_opened_fused_attention_shares_keys_between_heads():
    fused = F.scaled_dot_product_attention
    if "enable_gqa" not in (fused.__doc__ or ""):
        pytest.skip("this version of torch cannot")
    q, k, v = (torch.randn(2, H, 5, 4) for H in (6, 2, 2))
    call = Calls(lambda: fused(q, k, v, is_causal=True, enable_gqa=True))
    with measure.record_attention(call) as weights:
        out = call()
    torch.testing.assert_close(out, call())
    assert weights[0].shape == (2, 6, 5, 5)


@pytest.mark.parametrize("kind", [torch.bool, torch.float32])
def test_a_query_that_may_see_nothing_gets_nothing_and_no_nan(kind):
    q, k, v = (torch.randn(1, 2, 3, 4, requires_grad=True) for _ in range(3))
    visible = torch.tensor([[1, 0, 0], [0, 0, 0], [1, 1, 1]], dtype=torch.bool)
    mask = visible if kind == torch.bool else visible.to(kind).log()  # 0 and -inf
    call = Calls(lambda: F.scaled_dot_product_attention(q, k, v, mask))
    with measure.record_attention(call) as weights:
        out = call()
    assert (weights[0][:, :, 1] == 0).all() and (out[:, :, 1] == 0).all()
    out.sum().backward()
    assert all(x.grad.isfinite().all() for x in (q, k, v))
