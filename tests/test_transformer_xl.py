"""What Transformer-XL promises (Dai et al. 2019): the four terms, the shift, the recurrence."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from memtx_minimal.measure import kept_alive, record_attention
from memtx_minimal.transformer_xl import (
    RelativeAttention,
    TransformerXL,
    attention_mask,
    distances,
    rel_shift,
    sinusoid,
)
from test_models import SMALL, read, tokens


def make(**kw):
    torch.manual_seed(0)
    model = TransformerXL(**SMALL | kw).double().eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


# ------------------------------------------------------------------ distances, R, shift


def test_distance_is_query_position_minus_key_position():
    T, M = 3, 2  # keys stand at 0 ... 4, queries at 2 ... 4
    expected = [[(M + i) - j for j in range(M + T)] for i in range(T)]
    assert distances(T, M).tolist() == expected


@given(T=st.integers(1, 12), M=st.integers(0, 12))
def test_shift_puts_each_distance_under_its_key(T, M):
    K = M + T
    by_distance = torch.arange(K, -1, -1).expand(
        T, K + 1
    )  # every entry holds its column's distance
    shifted = rel_shift(by_distance.contiguous())
    distance = distances(T, M)
    assert shifted.shape == (T, K)
    assert torch.equal(shifted[distance >= 0], distance[distance >= 0])


def test_shift_is_a_view():
    scores = torch.randn(2, 3, 4, 8)
    assert rel_shift(scores).untyped_storage().data_ptr() == scores.untyped_storage().data_ptr()


def test_sinusoid_is_sines_then_cosines():
    R = sinusoid(torch.tensor([0, 3]), 8)
    assert R[0].tolist() == [0] * 4 + [1] * 4
    for i in range(4):
        angle = 3 / 10_000 ** (2 * i / 8)
        assert R[1, i].item() == pytest.approx(math.sin(angle), abs=1e-6)
        assert R[1, 4 + i].item() == pytest.approx(math.cos(angle), abs=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("M", [0, 3, 7])
def test_scores_are_the_four_terms_of_the_paper(M):
    """Attention equals a loop over heads, queries and keys that computes the terms (a) to (d) one by one."""
    torch.manual_seed(0)
    T, H, d_head = 5, 2, 4
    layer = RelativeAttention(H * d_head, H, dropout=0.0).double()
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter)
    context = torch.randn(1, M + T, H * d_head, dtype=torch.float64)
    mask = attention_mask(distances(T, M))
    R = sinusoid(torch.arange(M + T, -1, -1), H * d_head).double()
    heads = torch.zeros(T, H, d_head, dtype=torch.float64)
    W_k, W_v = layer.key_value.weight.view(2, H, d_head, -1)
    for h in range(H):
        W_q, W_R = (x.weight.view(H, d_head, -1)[h] for x in (layer.query, layer.position))
        for i in range(T):
            q, scores = W_q @ context[0, M + i], []
            for j in range(M + i + 1):
                k, r = (
                    W_k[h] @ context[0, j],
                    W_R @ sinusoid(torch.tensor([M + i - j]), H * d_head)[0].double(),
                )
                scores.append(
                    (q @ k + q @ r + layer.u[h, 0] @ k + layer.v[h, 0] @ r) / math.sqrt(d_head)
                )
            weights = torch.stack(scores).softmax(0)
            heads[i, h] = sum(w * (W_v[h] @ context[0, j]) for j, w in enumerate(weights))
    torch.testing.assert_close(layer(context, R, mask)[0], heads.flatten(1) @ layer.out.weight.mT)


# ------------------------------------------------------------------ recurrence


@given(segment_len=st.integers(1, 24))
@settings(max_examples=12, deadline=None)
def test_segments_with_memory_equal_one_long_window(segment_len):
    """A memory that holds everything: it does not matter how the text is cut."""
    model, text = make(mem_len=24), tokens(2, 24)
    torch.testing.assert_close(read(model, text, segment_len)[0], read(model, text, 24)[0])


@pytest.mark.parametrize("segment_len", [1, 2, 3, 8])
def test_same_length_makes_reach_independent_of_segments(segment_len):
    """With same_length every query sees mem_len keys: cutting differently changes nothing, whatever the memory."""
    model, text = make(mem_len=8, same_length=True), tokens(2, 24)
    torch.testing.assert_close(read(model, text, segment_len)[0], read(model, text, 24)[0])


def test_same_length_shows_every_query_exactly_mem_len_keys():
    for same_length, visible in [(True, [8] * 5), (False, [9, 10, 11, 12, 13])]:
        model = make(mem_len=8, same_length=same_length)
        _, memory = model(tokens(1, 8))
        with record_attention(model) as weights:
            model(tokens(1, 5, seed=2), memory)
        for w in weights:
            assert (w[0, 0] > 0).sum(dim=1).tolist() == visible


def test_offsets_do_not_depend_on_how_full_the_memory_is():
    """The same latest segments give the same logits, whatever has long left the reach of the model."""
    model = make(mem_len=4, n_layers=1)
    old, recent = tokens(1, 16), tokens(1, 8, seed=2)
    fresh, _ = read(model, recent, 4)
    full, _ = read(model, torch.cat([old, recent], dim=1), 4)
    torch.testing.assert_close(full[:, -4:], fresh[:, -4:])


def test_reach_is_layers_times_memory():
    """Section 3.2: the longest dependency grows with layers x memory, and not one token further."""
    L, M, T = 3, 4, 4
    model, text = make(mem_len=M, n_layers=L), tokens(1, 32)
    last = 31  # the last position of its segment
    before = read(model, text, T)[0][:, last]
    felt = []
    for position in range(32):
        other = text.clone()
        other[:, position] = (other[:, position] + 1) % 11
        if not torch.equal(read(model, other, T)[0][:, last], before):
            felt.append(position)
    assert felt == list(range(32 - T - L * M, 32))


def test_memory_is_the_latest_layer_inputs():
    model, text = make(mem_len=6), tokens(2, 20)
    _, memory = read(model, text, 4)
    assert torch.equal(memory[0], model.embedding(text)[:, -6:])


@pytest.mark.parametrize("mem_len", [0, 1, 3, 4, 5, 50])
def test_memory_grows_to_mem_len_and_stays_there(mem_len):
    model, memory = make(mem_len=mem_len), None
    for seen in range(4, 80, 4):
        logits, memory = model(tokens(2, 4), memory)
        assert [m.shape for m in memory] == [(2, min(mem_len, seen), 16)] * 3
        assert (
            kept_alive(memory) == 3 * 2 * min(mem_len, seen) * 16 * 8
        )  # no view that keeps more alive


def test_no_graph_survives_a_segment():
    model, memory = make(mem_len=8).train(), None
    for _ in range(3):
        logits, memory = model(tokens(2, 4), memory)
        assert all(not m.requires_grad and m.grad_fn is None for m in memory)
    logits.sum().backward()  # would fail if it led into the earlier, freed graphs


def test_keys_and_values_learn_from_memory():
    """SG stops the gradient at the cached states, not at the projections that read them."""
    model = make(mem_len=8, n_layers=1)
    _, memory = model(tokens(2, 8))
    grads = []
    for scale in (0.0, 1.0):
        model.zero_grad()
        model(tokens(2, 1, seed=2), [scale * m + m * 0 for m in memory])[0].logsumexp(
            -1
        ).sum().backward()
        grads.append(model.layers[0].attention.key_value.weight.grad.clone())
    assert not torch.allclose(*grads)


@torch.no_grad()
def test_order_of_memory_matters():
    model = make(mem_len=8)
    _, memory = model(tokens(2, 8))
    straight = model(tokens(2, 4, seed=2), memory)[0]
    shuffled = model(tokens(2, 4, seed=2), [m.flip(1) for m in memory])[0]
    assert not torch.allclose(straight, shuffled)


@torch.no_grad()
def test_mem_len_can_change_between_training_and_evaluation():
    model, text = make(mem_len=4), tokens(2, 24)
    model.mem_len = 24
    torch.testing.assert_close(read(model, text, 4)[0], read(model, text, 24)[0])


@torch.no_grad()
def test_clamp_len_merges_far_distances_and_leaves_near_ones():
    text = tokens(1, 12)
    free, clamped = make(mem_len=12), make(mem_len=12, clamp_len=5)
    a, b = free(text)[0], clamped(text)[0]
    torch.testing.assert_close(a[:, :6], b[:, :6])  # distances up to 5 are exact
    assert not torch.allclose(a[:, 6:], b[:, 6:])


@pytest.mark.parametrize("clamp_len, rows", [(None, [5, 4, 3, 2, 1, 0]), (3, [3, 3, 3, 2, 1, 0])])
def test_every_layer_gets_the_rows_of_R_by_distance(clamp_len, rows):
    """With dropout on them, as on the embeddings (the authors' code)."""
    model, seen = make(mem_len=2, clamp_len=clamp_len, dropout=0.5), []
    for layer in model.layers:
        layer.register_forward_pre_hook(lambda layer, args: seen.append(args[1]))
    memory = model(tokens(1, 2))[1]
    expected = sinusoid(torch.tensor(rows), 16).double()  # 2 in memory, 3 in the segment, and one distance more
    for train in False, True:
        seen.clear()
        model.train(train)(tokens(1, 3), memory)
        assert len(seen) == len(model.layers)
        for R in seen:
            dropped = R == 0 if train else torch.zeros_like(R, dtype=torch.bool)
            torch.testing.assert_close(R, (1 + train) * expected.masked_fill(dropped, 0))
    assert 0.2 < dropped.double().mean() < 0.8


def test_invalid_arguments_are_refused_early():
    make(clamp_len=1), make(mem_len=1, same_length=True)  # the smallest
    with pytest.raises(ValueError, match="mem_len=-1 is not a whole number >= 0"):
        make(mem_len=-1)
    with pytest.raises(ValueError, match="mem_len=0 is not a number >= 1"):
        make(mem_len=0, same_length=True)
    model = make(mem_len=4, same_length=True)
    model.mem_len = 0
    with pytest.raises(ValueError, match="limit=0 is not a number >= 1"):
        model(tokens(2, 4))
    with pytest.raises(ValueError, match="clamp_len=0 is not a whole number >= 1, nor None"):
        make(clamp_len=0)
