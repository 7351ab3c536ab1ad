"""The measures count what they say they count."""

import pytest
import torch
import torch.nn.functional as F
from test_models import MODELS, SMALL, tokens

from memtx_minimal import measure
from memtx_minimal.transformer_xl import TransformerXL
from memtx_minimal.vanilla_transformer import VanillaTransformer

FLOAT = 4  # bytes


def test_nbytes_counts_each_storage_once_and_all_of_it():
    a, b = torch.zeros(10), torch.zeros(100)
    assert measure.nbytes(None) == 0
    assert measure.nbytes((a, 7, [3])) == measure.nbytes(a)
    assert measure.nbytes([a, {"x": (b, a)}]) == 110 * FLOAT
    assert measure.nbytes(b[:3]) == 100 * FLOAT  # a view keeps the whole storage alive


def test_bytes_for_backward_of_a_product():
    """y = tanh(x W): autograd keeps x for W, y for tanh, and W itself, which is a parameter."""
    layer = torch.nn.Linear(5, 7, bias=False)
    x = torch.randn(3, 5)
    assert measure.bytes_for_backward(layer, lambda: layer(x).tanh()) == (3 * 5 + 3 * 7) * FLOAT
    with torch.no_grad():
        assert measure.bytes_for_backward(layer, lambda: layer(x).tanh()) == 0


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


def test_peak_bytes_includes_the_backward_pass():
    model, text = TransformerXL(**SMALL), tokens(4, 16)
    forward = measure.peak_bytes(lambda: model(text)[0].sum())
    backward = measure.peak_bytes(lambda: model(text)[0].sum().backward())
    assert backward >= forward > measure.bytes_for_backward(model, lambda: model(text)) > 0


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


# ------------------------------------------------------------------ attention


@pytest.mark.parametrize("name", [n for n in MODELS if n.split()[0] in ("vanilla", "xl") or n == "reformer short"])
def test_recording_changes_nothing_and_gives_every_layer(name):
    """One softmax a layer. The others have tests of their own: pieces, steps, and no whole softmax when hashed."""
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
    """Weights times values is what attention returns: layer by layer, in the order of the layers."""
    torch.manual_seed(0)
    model, inputs = VanillaTransformer(**SMALL, max_len=8).double().eval(), []
    for layer in model.layers:
        layer.attention.register_forward_hook(lambda m, args, out: inputs.append((m, args[0], out)))
    with measure.record_attention(model) as weights:
        model(tokens(2, 8))
    for w, (attention, x, out) in zip(weights, inputs, strict=True):
        values = attention.query_key_value(x).chunk(3, -1)[2].unflatten(-1, (2, -1)).transpose(1, 2)
        torch.testing.assert_close(attention.out((w @ values).transpose(1, 2).flatten(2)), out)


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
