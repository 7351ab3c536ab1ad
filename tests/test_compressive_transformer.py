"""What the Compressive Transformer promises (Rae et al. 2020): two memories, five f_c, three losses."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from memtx_minimal import compressive_transformer as module
from memtx_minimal.compressive_transformer import (
    COMPRESSIONS,
    CompressiveTransformer,
    attention_reconstruction,
    by_content,
    usage,
)
from memtx_minimal.measure import kept_alive, record_attention
from memtx_minimal.transformer_xl import TransformerXL
from test_models import COMPRESSED, SMALL, read, tokens


def make(**kw):
    torch.manual_seed(0)
    model = CompressiveTransformer(**SMALL | COMPRESSED | kw).double().eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def states(*shape, seed=3):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


# ------------------------------------------------------------------ compression functions


@pytest.mark.parametrize("name", COMPRESSIONS)
@pytest.mark.parametrize("rate", [1, 2, 3])
def test_every_function_makes_one_state_of_c(name, rate):
    old, used = states(2, 6 * rate, 8), states(2, 6 * rate)
    assert COMPRESSIONS[name](8, rate).double()(old, used).shape == (2, 6, 8)


def test_pooling_takes_groups_of_neighbours():
    old = torch.tensor([[[1.0, 8.0], [2.0, 4.0], [5.0, 0.0], [7.0, 6.0]]])  # (1, 4, 2)
    assert COMPRESSIONS["max"](2, 2)(old).tolist() == [[[2, 8], [7, 6]]]
    assert COMPRESSIONS["mean"](2, 2)(old).tolist() == [[[1.5, 6], [6, 3]]]


def test_convolution_has_kernel_and_stride_c():
    conv = COMPRESSIONS["conv"](8, 3).double()
    kernel = conv.kernel.weight.unflatten(1, (3, 8)).mT  # (d_out, d_in, c)
    old = states(2, 12, 8)
    expected = F.conv1d(old.mT, kernel, conv.kernel.bias, stride=3).mT
    torch.testing.assert_close(conv(old), expected)


def test_dilated_convolution_sees_past_its_group_and_no_farther_than_its_gaps():
    f_c, old = COMPRESSIONS["dilated"](4, 2).double(), states(1, 20, 4).abs().requires_grad_()
    for parameter in f_c.parameters():
        torch.nn.init.ones_(parameter)  # no unit of the ReLU is silent
    f_c(old)[0, 5].sum().backward()  # the group of the states 10 and 11
    felt = old.grad[0].abs().sum(dim=1).nonzero().flatten()
    assert felt.min() == 10 - 3 and felt.max() == 11 + 3


def test_dilated_convolution_adds_to_each_state_what_its_neighbours_say():
    f_c, old = COMPRESSIONS["dilated"](4, 2).double(), states(1, 20, 4)

    def convolve(conv, x, t, gap):
        return (conv.bias + sum(conv.weight[:, :, n + 1] @ x[t + n * gap] for n in (-1, 0, 1))).relu()

    near = {t: convolve(f_c.near, old[0], t, gap=1) for t in range(8, 14)}
    group = torch.cat([old[0, t] + convolve(f_c.far, near, t, gap=2) for t in (10, 11)])
    torch.testing.assert_close(f_c(old)[0, 5], f_c.kernel(group))


def test_most_used_keeps_the_most_used_in_their_order():
    old = torch.arange(6.0)[None, :, None]  # (1, 6, 1)
    used = torch.tensor([[0.1, 0.7, 0.2, 0.9, 0.05, 0.8]])
    assert COMPRESSIONS["most-used"](1, 2)(old, used).flatten().tolist() == [1, 3, 5]


def test_usage_is_the_attention_of_the_segment_by_content():
    """The states that the segment looks at survive; those that it does not look at go."""
    model = make(compression="most-used", loss=None, mem_len=4, compression_rate=4)
    layer, remember = model.layers[0], model.memories[0]
    h, recent = states(1, 4, 16), states(1, 4, 16, seed=4)
    q, k, _ = by_content(layer, h, recent)
    weights = (q @ k.mT / 8**0.5).softmax(dim=-1).mean(dim=(1, 2))  # (1, M)
    torch.testing.assert_close(usage(layer, h, recent), weights)
    compressed, _, _ = remember(layer, h, h[:, :0], recent, model.mem_len, 99)
    torch.testing.assert_close(compressed[0, 0], recent[0, weights.argmax()])


# ------------------------------------------------------------------ the two memories


@given(lengths=st.lists(st.integers(1, 9), min_size=1, max_size=12), rate=st.sampled_from([1, 2, 4]))
@settings(max_examples=30, deadline=None)
def test_no_state_is_lost_or_invented(lengths, rate):
    """Whatever the lengths: the memories hold the stream, the oldest part as means of c neighbours."""
    model = make(compression="mean", loss=None, n_layers=1, compressed_len=100, compression_rate=rate)
    text, memory = tokens(2, sum(lengths)), None
    for segment in text.split(lengths, dim=1):
        _, memory = model(segment, memory)
    (compressed, recent), embedded = memory[0], model.embedding(text)
    n_old = sum(lengths) - recent.size(1)
    assert n_old % rate == 0 and max(0, sum(lengths) - 4) <= n_old < max(1, sum(lengths) - 4 + rate)
    torch.testing.assert_close(recent, embedded[:, n_old:])
    expected = embedded[:, :n_old].unflatten(1, (n_old // rate, rate)).mean(dim=2)
    torch.testing.assert_close(compressed, expected)


def test_the_latest_compressed_states_are_kept():
    model = make(compression="mean", loss=None, n_layers=1)  # compressed_len 3, rate 2, mem_len 4
    text = tokens(2, 24)
    _, memory = read(model, text, 4)
    embedded = model.embedding(text)
    expected = embedded[:, 14:20].unflatten(1, (3, 2)).mean(dim=2)
    torch.testing.assert_close(memory[0][0], expected)


@pytest.mark.parametrize("segment_len", [1, 3, 4, 7, 16])
def test_memories_grow_to_their_size_and_stay_there(segment_len):
    model, memory = make(), None
    for _ in range(30):
        _, memory = model(tokens(2, segment_len), memory)
        for compressed, recent in memory:
            assert compressed.size(1) <= 3 and 1 <= recent.size(1) <= 4
            assert kept_alive([compressed, recent]) == (compressed.numel() + recent.numel()) * 8
    assert compressed.size(1) == 3 and recent.size(1) >= 3


@given(segment_len=st.integers(1, 8))
@settings(max_examples=8, deadline=None)
@pytest.mark.parametrize("compression", ["max", "mean"])
def test_rate_one_is_transformer_xl_with_the_longer_memory(segment_len, compression):
    """A group of one is its own maximum and mean: nothing is compressed, the memories are one."""
    sizes = dict(mem_len=8, compressed_len=6, compression_rate=1, compression=compression)
    model = make(**sizes, loss=None)
    xl = TransformerXL(**SMALL, mem_len=14).double().eval()
    xl.load_state_dict(model.state_dict())
    text = tokens(2, 40)
    torch.testing.assert_close(read(model, text, segment_len)[0], read(xl, text, segment_len)[0])


def test_long_texts_are_read_in_pieces_of_mem_len():
    for loss in ("attention", "auto-encoding", "bptt", None):
        model, text = make(loss=loss), tokens(2, 16)
        at_once, segments = read(model, text, 16), read(model, text, 4)
        torch.testing.assert_close(at_once, segments)


def test_distances_do_not_depend_on_how_full_the_memory_is():
    """The same latest states give the same logits, whatever compressed states lie behind the reach."""
    model = make(compressed_len=0, loss=None, n_layers=1)
    old, recent = tokens(1, 16), tokens(1, 8, seed=2)
    fresh, _ = read(model, recent, 4)
    full, _ = read(model, torch.cat([old, recent], dim=1), 4)
    torch.testing.assert_close(full[:, -4:], fresh[:, -4:])


@torch.no_grad()
def test_a_memory_slot_keeps_its_distance_while_compressed_memory_fills():
    """Scores of memory and segment are the same with no, some and all compressed states before them."""
    model = make(n_layers=1, loss=None)
    recent, ratios = states(1, 4, 16), []
    for n in (0, 1, 3):
        with record_attention(model) as weights:
            model(tokens(1, 4), [(states(1, n, 16, seed=5), recent)])
        w = weights[0][0, 0, :, n:]  # (T, M + T)
        ratios.append(w / w.sum(dim=1, keepdim=True))
    torch.testing.assert_close(ratios[0], ratios[1])
    torch.testing.assert_close(ratios[0], ratios[2])


@torch.no_grad()
@pytest.mark.parametrize("part", [0, 1])
def test_order_of_both_memories_matters(part):
    model = make()
    _, memory = read(model, tokens(2, 24), 4)
    flipped = [list(parts) for parts in memory]
    for parts in flipped:
        parts[part] = parts[part].flip(1)
    text = tokens(2, 4, seed=2)
    assert not torch.allclose(model(text, memory)[0], model(text, flipped)[0])


def test_temporal_range_is_layers_times_memory_plus_rate_times_compressed():
    """Section 3.1: l * (n_m + c * n_cm), and the segment itself."""
    L, M, C, c, T, n = 2, 4, 4, 2, 4, 48
    model, text = make(n_layers=L, compressed_len=C, loss=None, compression="mean"), tokens(1, n)
    before, felt = read(model, text, T)[0][:, -1], []
    for position in range(n):
        other = text.clone()
        other[:, position] = (other[:, position] + 1) % 11
        if (read(model, other, T)[0][:, -1] - before).abs().max() > 1e-12:
            felt.append(position)
    assert felt == list(range(n - T - L * (M + c * C), n))


@torch.no_grad()
@pytest.mark.parametrize("compression", COMPRESSIONS)
def test_recorded_attention_covers_both_memories_and_the_segment(compression):
    model = make(compression=compression)
    _, memory = read(model, tokens(2, 24), 4)
    plain = model(tokens(2, 4, seed=2), memory)[0]
    with record_attention(model) as weights:
        assert torch.equal(model(tokens(2, 4, seed=2), memory)[0], plain)
    assert [w.shape for w in weights] == [(2, 2, 4, 3 + 4 + 4)] * 3
    for w in weights:
        torch.testing.assert_close(w.sum(dim=-1), torch.ones(2, 2, 4, dtype=w.dtype))
        assert (w.triu(7 + 1) == 0).all() and (w[..., 0, :8] > 0).all()


# ------------------------------------------------------------------ what each loss touches


def touched(loss, compression="conv", which="own"):
    """Names of the parameters that a loss reaches: its own, or the one of the logits."""
    model = make(loss=loss, compression=compression).train()
    _, memory, *_ = model(tokens(2, 12))
    logits, _, *aux = model(tokens(2, 12, seed=2), memory)  # three pieces
    (aux[0] if which == "own" else logits.logsumexp(-1).sum()).backward()
    return {n for n, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}


NAMES = {name for name, _ in make(loss="auto-encoding").named_parameters()}
COMPRESS = {name for name in NAMES if ".compress." in name}
DECODE = {name for name in NAMES if ".decode." in name}


def test_attention_reconstruction_reaches_f_c_and_nothing_else():
    assert touched("attention") == COMPRESS
    assert all(".compress." in name for name in touched("attention", "dilated"))
    assert len(touched("attention", "dilated")) == 3 * 6


def test_auto_encoding_reaches_f_c_and_its_decoder():
    assert touched("auto-encoding") == COMPRESS | DECODE


@pytest.mark.parametrize("loss", ["attention", "auto-encoding", None])
def test_the_logits_do_not_reach_f_c(loss):
    assert touched(loss, which="logits") == NAMES - COMPRESS - DECODE


def test_under_bptt_they_do():
    assert touched("bptt", which="logits") >= COMPRESS - {"memories.2.compress.kernel.bias"}


def test_but_not_in_calls_of_one_piece():
    """What f_c makes is read in the next call, and is detached by then."""
    model, memory = make(loss="bptt").train(), None
    for step in range(4):
        logits, memory = model(tokens(2, 4, seed=step), memory)  # mem_len 4
        logits.logsumexp(-1).sum().backward()
    assert all(p.grad is None for p in model.memories.parameters())


def test_what_pools_returns_a_loss_that_trains_nothing():
    for compression in ("max", "mean", "most-used"):
        model = make(compression=compression).train()
        _, memory, _ = model(tokens(2, 12))
        _, _, loss = model(tokens(2, 12, seed=2), memory)
        assert loss > 0 and not loss.requires_grad


def test_bptt_has_no_loss_of_its_own_and_leaves_no_graph():
    model, memory = make(loss="bptt").train(), None
    for _ in range(3):
        logits, memory, *aux = model(tokens(2, 12), memory)
        assert aux == [] and not any(part.requires_grad for parts in memory for part in parts)
        logits.sum().backward()


def test_groups_of_clipping_are_the_model_and_the_compression():
    model = make(loss="auto-encoding")
    names = {p: name for name, p in model.named_parameters()}
    language, compression = ({names[p] for p in group} for group in model.clip_groups())
    assert compression == COMPRESS | DECODE and language == NAMES - compression


def test_keys_and_values_go_on_learning_after_compression():
    model, memory = make().train(), None
    for step in range(4):
        model.zero_grad()
        logits, memory, loss = model(tokens(2, 8, seed=step), memory)
        (logits.logsumexp(-1).sum() + loss).backward()
        for layer in model.layers:
            for weight in (layer.attention.key_value.weight, layer.norm_attention.weight):
                assert weight.requires_grad and weight.grad.abs().sum() > 0


@torch.no_grad()
def test_attention_reconstruction_follows_the_paper():
    """A loop over heads: softmax((hQ)(mK)^T)(mV) for the old and for the new states, content only."""
    model = make()
    layer, h, old, new = model.layers[1], states(1, 4, 16), states(1, 6, 16, seed=4), states(1, 3, 16, seed=5)
    W_q = layer.attention.query.weight.view(2, 8, 16)
    W_k, W_v = layer.attention.key_value.weight.view(2, 2, 8, 16)
    norm, errors = layer.norm_attention, []
    for head in range(2):
        reads = []
        for m in (old, new):
            q, k, v = norm(h[0]) @ W_q[head].T, norm(m[0]) @ W_k[head].T, norm(m[0]) @ W_v[head].T
            reads.append((q @ k.T / 8**0.5).softmax(dim=-1) @ v)
        errors.append((reads[0] - reads[1]).square())
    expected = torch.stack(errors).mean()
    torch.testing.assert_close(attention_reconstruction(layer, h, old, new), expected)
    assert attention_reconstruction(layer, h, old, old) == 0


def test_auto_encoding_compares_each_old_state_with_its_own_decoding():
    old, new = states(2, 6, 4), states(2, 2, 4, seed=4)
    scaled = module.auto_encoding(lambda x: torch.cat([x, 2 * x, 3 * x], dim=-1), old, new)
    decoded = torch.stack([new, 2 * new, 3 * new], dim=2).flatten(1, 2)  # (B, O, d_model)
    torch.testing.assert_close(scaled, F.mse_loss(decoded, old))


def test_only_what_leaves_the_memory_is_reconstructed(monkeypatch):
    """With a memory longer than the segment, the loss compares the oldest states, as many as leave."""
    seen = []
    monkeypatch.setattr(
        module, "attention_reconstruction",
        lambda layer, h, old, new: seen.append((old, new)) or new.sum(),
    )  # fmt: skip
    model, text = make(n_layers=1, mem_len=8).train(), tokens(2, 20)
    read(model, text, 4)
    embedded = model.embedding(text)
    assert len(seen) == 3
    for step, (old, new) in enumerate(seen):
        torch.testing.assert_close(old, embedded[:, 4 * step : 4 * step + 4])
        assert new.shape == (2, 2, 16)


def test_the_loss_is_the_sum_over_layers_and_pieces():
    model, text = make().train(), tokens(2, 12)
    _, memory, first = model(text[:, :4])
    _, memory, second = model(text[:, 4:8], memory)
    _, _, third = model(text[:, 8:], memory)
    assert first == 0 and second > 0
    torch.testing.assert_close(model(text)[2], second + third)


def test_the_compression_loss_comes_in_training_only():
    for loss, n_losses in [("attention", 1), ("auto-encoding", 1), ("bptt", 0), (None, 0)]:
        model = make(loss=loss)
        assert len(model(tokens(2, 12))) == 2
        assert len(model.train()(tokens(2, 12))) == 2 + n_losses


# ------------------------------------------------------------------ what is refused


def test_invalid_arguments_are_refused_early():
    make(mem_len=1, compression_rate=1, compressed_len=0)  # the smallest
    with pytest.raises(ValueError, match="mem_len=30 is not a multiple of compression_rate=4: use 28 or 32"):
        make(mem_len=30, compression_rate=4)
    with pytest.raises(ValueError, match="mem_len=2 is not a multiple of compression_rate=4: use 4$"):
        make(mem_len=2, compression_rate=4)
    with pytest.raises(ValueError, match="mem_len=0 is not a multiple of compression_rate=4: use 4$"):
        make(mem_len=0, compression_rate=4)
    with pytest.raises(ValueError, match="compression='sum' is not one of 'max', 'mean', 'conv'"):
        make(compression="sum")
    with pytest.raises(ValueError, match="loss='l2' is not one of 'attention', .*, None"):
        make(loss="l2")
    with pytest.raises(ValueError, match="c by c, and how each was used"):
        make(compression="most-used").memories[0].compress(states(1, 4, 16), None)
    with pytest.raises(AttributeError, match="loss"):
        make().loss = "bptt"  # its parameters were chosen when the model was built


@pytest.mark.parametrize("lengths", [dict(mem_len=2), dict(compressed_len=1), dict(compressed_len=9)])
def test_lengths_may_be_changed_at_any_time(lengths):
    """A model whose lengths are changed goes on like one that was built with them."""
    model, other, text = make(loss=None), make(loss=None, **lengths), tokens(2, 48)
    memory = read(model, text[:, :24], 4)[1]
    for name, n in lengths.items():
        setattr(model, name, n)
        memory = [(c[:, -model.compressed_len :], r) for c, r in memory]
    logits, after = read(model, text[:, 24:], 4)
    expected = read(other, text, 4)
    assert [c.shape for c, _ in after] == [c.shape for c, _ in expected[1]]
    for given in (model, other):
        before = read(given, text, 4)[1]
        torch.testing.assert_close(given(text[:, :4], before)[0], other(text[:, :4], before)[0])
    model.mem_len = 3
    with pytest.raises(ValueError, match="mem_len=3 is not a multiple of compression_rate=2"):
        model(text)
