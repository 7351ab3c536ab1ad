"""What the memories of today keep, show and compute, against definitions and each other."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from test_models import SMALL, read, tokens

from memtx_minimal import measure
from memtx_minimal import memory_today as today
from memtx_minimal.memory_today import Cache, MemoryToday, Pooled

POOLED = dict(kind="pooled", mem_len=5, compression_rate=3)
EXACT = {  # their state holds all of 30 tokens, so that pieces are one text
    "cache": dict(kind="cache", mem_len=30, n_sinks=2, n_used=3),
    "pooled": dict(**POOLED, compressed_len=2),
    "pooled, rate 1": dict(kind="pooled", mem_len=1, compressed_len=3, compression_rate=1),
    "pooled, top_k": dict(**POOLED, compressed_len=4, top_k=2),
    "pooled, top_k, forgets": dict(**POOLED, compressed_len=3, top_k=2),
    "delta": dict(kind="delta"),
    "delta, strong, looped": dict(kind="delta", strength=2.0, n_loops=2),
}


def model_of(**kw):
    torch.manual_seed(0)
    model = MemoryToday(**SMALL, **kw).double().eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def heads_of(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


# ------------------------------------------------------------------ positions


def test_products_depend_on_distances_alone():
    q, k = heads_of(2, 3, 2, 8), heads_of(2, 5, 2, 8, seed=1)
    near, far = torch.arange(5.0), torch.arange(5.0) + 1000
    scores = today.scores_of(q, k, near[2:], near)
    torch.testing.assert_close(today.scores_of(q, k, far[2:], far), scores)
    assert not torch.allclose(today.scores_of(q, k, far[2:], near), scores)


def test_a_turn_keeps_lengths_and_place_0_is_no_turn():
    x = heads_of(2, 5, 2, 8)
    turned = today.rotate(x, torch.arange(5))
    torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1))
    assert torch.equal(turned[:, 0], x[:, 0])
    assert not torch.allclose(turned[:, 1:], x[:, 1:])


def test_places_are_exact_in_bfloat16():
    x = torch.ones(1, 3, 1, 8, dtype=torch.bfloat16)
    turned = today.rotate(x, torch.tensor([1000, 1001, 1002]))
    assert turned.dtype == torch.bfloat16 and len(turned[0, :, 0].unique(dim=0)) == 3


# ------------------------------------------------------------------ the cache


def places(got, **kw):
    cache = Cache(8, got.size(2), **kw)
    return cache.stays(got)[0].T.tolist()


def test_a_cache_keeps_the_latest():
    assert places(torch.rand(1, 9, 2), mem_len=4) == 2 * [[5, 6, 7, 8]]
    assert places(torch.rand(1, 3, 2), mem_len=4) == 2 * [[0, 1, 2]]
    assert places(torch.rand(1, 9, 1), mem_len=0) == [[]]


def test_sinks_and_the_latest_whatever_they_got():
    assert places(torch.rand(1, 9, 2), mem_len=5, n_sinks=2) == 2 * [[0, 1, 6, 7, 8]]
    assert places(torch.rand(1, 9, 1), mem_len=2, n_sinks=2) == [[0, 1]]


def test_the_most_used_of_each_head():
    got = torch.tensor([[[9.0, 1, 5, 2, 8, 3, 0, 0]], [[0, 7, 1, 6, 5, 4, 9, 9.0]]]).mT
    got = got.permute(2, 1, 0)  # (1, 8, 2)
    assert places(got, mem_len=4, n_used=4) == [[0, 2, 4, 5], [1, 3, 6, 7]]
    kept = places(got, mem_len=5, n_sinks=1, n_used=2)
    assert kept == [[0, 2, 4, 6, 7], [0, 1, 3, 6, 7]]


def through(cache, lengths):
    """The states after each of some segments of random heads."""
    memory, out = None, []
    for n, T in enumerate(lengths):
        q, k, v = heads_of(3, 2, T, 2, 4, seed=n)
        memory = cache.empty(k) if memory is None else memory
        out.append((memory := cache(q.flatten(2), q, k, v, memory)[1]))
    return out


def test_what_slots_got_is_counted_as_decay_says():
    first, none = (memory[2] for memory in through(Cache(8, 2, 99, decay=0.0), [5, 4]))
    for decay in (0.25, 1.0):
        got = through(Cache(8, 2, 99, decay=decay), [5, 4])[1][2]
        torch.testing.assert_close(got, none + decay * F.pad(first, (0, 0, 0, 4)))
    torch.testing.assert_close(first.sum(1), torch.full((2, 2), 5.0).double())
    torch.testing.assert_close(none.sum(1), torch.full((2, 2), 4.0).double())


@pytest.mark.parametrize("decay, kept", [(0.0, [1, 3, 7, 8, 9]), (1.0, [1, 2, 7, 8, 9])])
def test_the_past_counts_or_does_not(decay, kept):
    """Slot 1 is read now and was read before, 2 was read, 3 is read a little."""
    cache = Cache(8, 1, mem_len=5, n_used=2, decay=decay)
    slow = torch.eye(8)[3]  # the dimension that hardly turns
    k, got = torch.zeros(1, 6, 1, 8), torch.zeros(1, 6, 1)
    k[:, 1], k[:, 3], got[:, 1], got[:, 2] = 3 * slow, 2 * slow, 9, 9
    q, new = slow.expand(1, 4, 1, 8), torch.zeros(1, 4, 1, 8)
    memory = cache(q.flatten(2), q, new, new, (k, k, got))[1]
    total = F.pad(got, (0, 0, 0, 4)) * decay + spent(cache, q, k, new)
    assert cache.stays(total).flatten().tolist() == kept
    torch.testing.assert_close(memory[2], total[:, kept])
    assert torch.equal(memory[0][:, :2], k[:, kept[:2]])


def spent(cache, q, k, new):
    """The attention that four queries spend on all keys, by the definition."""
    keys, place = torch.cat([k, new], dim=1), torch.arange(10)
    scores = today.scores_of(q, keys, place[6:], place)
    for t in range(4):
        scores[:, :, t, 7 + t :] = float("-inf")
    return scores.softmax(-1).sum(2).mT


def test_a_cache_goes_on_from_what_it_kept():
    """After the slots were chosen, they are ordinary keys and values, in a row."""
    cache = Cache(8, 2, mem_len=4, n_sinks=1, n_used=1)
    k, v, _ = through(cache, [9])[0]
    q, new_k, new_v = heads_of(3, 2, 3, 2, 4, seed=7)
    read = cache(q.flatten(2), q, new_k, new_v, (k, v, k[..., 0]))[0]
    k, v = today.after(k, new_k), today.after(v, new_v)
    q, k = today.rotate(q, torch.arange(4, 7)), today.rotate(k, torch.arange(7))
    seen = torch.ones(3, 7, dtype=torch.bool).tril(4)
    heads = (x.transpose(1, 2) for x in (q, k, v))
    torch.testing.assert_close(read, F.scaled_dot_product_attention(*heads, seen))


# ------------------------------------------------------------------ pooling


def test_a_pooled_slot_is_a_mean_weighted_by_the_gate():
    k, v, gate, place = heads_of(2, 6, 2, 4), heads_of(2, 6, 2, 4, seed=1), heads_of(2, 4), heads_of(3, 2, 1)
    slots = today.pool(k, v, gate, place)
    for n in range(2):
        for h in range(2):
            own = range(3 * n, 3 * n + 3)
            weights = torch.stack([k[:, t, h] @ gate[h] + place[t - 3 * n, h] for t in own], dim=1).softmax(1)
            for slot, parts in zip(slots, (k, v)):
                mean = torch.einsum("bc,bcd->bd", weights, parts[:, own, h])
                torch.testing.assert_close(slot[:, n, h], mean)
    even = today.pool(k, v, 0 * gate, 0 * place)[0]
    torch.testing.assert_close(even, k.unflatten(1, (2, 3)).mean(2))
    assert torch.equal(today.pool(k, v, gate, place[:1])[1], v)


def test_a_query_reads_blocks_at_the_place_of_their_last_token():
    """By the definition, one query after the other: three blocks of 2, a window of 3."""
    memory = Pooled(8, 2, mem_len=3, compressed_len=3, compression_rate=2).double()
    for parameter in memory.parameters():
        torch.nn.init.normal_(parameter)
    q, k, v = heads_of(3, 1, 12, 2, 4)
    read = memory(q.flatten(2), q, k, v, memory.empty(k))[0]  # (1, H, T, d_head)
    slots = today.pool(k, v, memory.gate, memory.gate_place)
    for t in range(12):
        left = max(0, t + 1 - 3) // 2  # blocks that have left the window
        own = range(max(0, left - 3), left)
        keys, values = (torch.cat([a[:, own], b[:, 2 * left : t + 1]], dim=1) for a, b in zip(slots, (k, v)))
        place = torch.tensor([2 * n + 1 for n in own] + [*range(2 * left, t + 1)])
        weights = today.scores_of(q[:, t : t + 1], keys, torch.tensor([t]), place).softmax(-1)
        torch.testing.assert_close(read[:, :, t : t + 1], weights @ values.transpose(1, 2))


@given(st.integers(1, 9), st.integers(1, 5), st.integers(0, 6), st.integers(0, 40))
@settings(max_examples=80, deadline=None)
def test_blocks_and_window_share_out_the_past(mem_len, c, compressed_len, t):
    """Each token once, until blocks run out; then a stretch without a gap."""
    place, end = torch.arange(t + 6), c * torch.arange(1, (t + 6) // c + 1)
    blocks, seen = today.in_view(place[t : t + 1], end, place, mem_len, compressed_len, c)
    own = [s for e in end[blocks[0]].tolist() for s in range(e - c, e)]
    window = place[seen[0]].tolist()
    first = max(0, (t + 1 - mem_len) // c * c)
    assert window == list(range(first, t + 1))
    assert own + window == list(range(max(0, first - c * compressed_len), t + 1))
    assert len(window) == t + 1 or mem_len <= len(window) < mem_len + c


def shown(top_k, compressed_len=8):
    """Which tokens' values the last of 24 queries reads, where the first token of a
    block stands for the whole of it, (24,) for each head."""
    memory = Pooled(8, 2, mem_len=4, compressed_len=compressed_len, compression_rate=4, top_k=top_k).double()
    memory.gate_place.data[0] = 1000.0
    q, k, v = heads_of(3, 1, 24, 2, 4).requires_grad_()
    heads, _ = memory(q.flatten(2), q, k, v, memory.empty(k))
    reads = [torch.autograd.grad(heads[0, h, -1].sum(), v, retain_graph=True)[0][0, :, h] for h in range(2)]
    return [(read.abs().sum(-1) > 0).tolist() for read in reads]


def test_top_k_of_all_blocks_sees_all_tokens():
    alone = [t % 4 == 0 or t >= 20 for t in range(24)]
    assert shown(None) == [alone, alone]
    assert shown(5) == shown(99) == [[True] * 24] * 2
    for k in (1, 2):
        for seen in shown(k):
            blocks = [seen[t : t + 4] for t in range(0, 20, 4)]
            assert blocks.count([True] * 4) == k and blocks.count([True, False, False, False]) == 5 - k
    assert shown(2, compressed_len=2) == 2 * [[t >= 12 for t in range(24)]]


def test_the_best_block_is_the_one_with_the_best_score():
    scores = torch.tensor([[[[1.0, 9, 5, 7, 0, 0, 0, 0, 0, 0, 0]]]])
    blocks = torch.tensor([[True, True, True, False]])  # the last does not exist yet
    chosen = today.closer(scores, blocks, 7, 1, 1)[0, 0, 0]
    assert chosen.nonzero().flatten().tolist() == [5]
    chosen = today.closer(scores, blocks, 7, 4, 1)[0, 0, 0]
    assert chosen.nonzero().flatten().tolist() == [4, 5, 6]


@pytest.mark.parametrize("top_k", [None, 1])
def test_the_language_loss_alone_trains_the_gate(top_k):
    model, text = model_of(**POOLED, compressed_len=2, top_k=top_k), tokens(2, 13)
    logits, _, *aux = model(text[:, :-1])
    F.cross_entropy(logits.flatten(0, 1), text[:, 1:].flatten()).backward()
    assert not aux
    for layer in model.layers:
        assert layer.remember.gate.grad.abs().min() > 0
        assert layer.remember.gate_place.grad.abs().min() > 0
    model.zero_grad()
    model(text[:, :5])[0].sum().backward()  # nothing leaves the window
    assert not model.layers[0].remember.gate.grad.any()


# ------------------------------------------------------------------ the delta rule


def sizes_of_gates(case, B, H, T):
    """Logits of alpha, and beta."""
    alpha, beta = heads_of(B, H, T, seed=4), heads_of(B, H, T, seed=5).sigmoid()
    return {
        "ordinary": (alpha + 3, beta),
        "strong": (alpha + 3, 2 * beta),
        "reflections": (alpha + 40, 2 + 0 * beta),
        "forgets at once": (alpha - 30, 2 * beta),
        "forgets now and then": (70 * alpha, 2 * beta),
        "writes nothing": (alpha, 0 * beta),
    }[case]


@pytest.mark.parametrize("T, chunk_len", [(1, 32), (32, 32), (33, 32), (70, 32), (20, 7), (9, 1)])
@pytest.mark.parametrize("case", ["ordinary", "strong", "reflections", "forgets at once",
                                  "forgets now and then", "writes nothing"])  # fmt: skip
def test_chunks_are_the_plain_rule(case, T, chunk_len):
    B, H, d = 2, 3, 5
    q, k, v = heads_of(3, B, H, T, d, seed=1)
    given = [q, F.normalize(k, dim=-1), v, *sizes_of_gates(case, B, H, T), heads_of(B, H, d, d, seed=9)]
    weights, weights_S = heads_of(B, H, T, d, seed=6), heads_of(B, H, d, d, seed=7)
    found = []
    for rule, more in ((today.delta_rule, ()), (today.chunked_delta_rule, (chunk_len,))):
        leaves = [x.clone().requires_grad_() for x in given]
        q, k, v, alpha, beta, S = leaves
        read, S = rule(q, k, v, alpha.sigmoid(), beta, S, *more)
        ((read * weights).sum() + (S * weights_S).sum()).backward()
        found.append([read, S, *(x.grad for x in leaves)])
    for plain, chunked in zip(*found):
        torch.testing.assert_close(chunked, plain, rtol=1e-10, atol=1e-10)


def test_a_rate_of_zero_forgets_all_and_stays_finite():
    q, k, v = heads_of(3, 1, 1, 40, 4, seed=1)
    alpha, beta = torch.zeros(1, 1, 40).double().requires_grad_(), torch.ones(1, 1, 40).double()
    read, S = today.chunked_delta_rule(q, k, v, alpha, beta, heads_of(1, 1, 4, 4))
    torch.testing.assert_close(S, v[:, :, -1, :, None] @ k[:, :, -1, None])
    torch.testing.assert_close(read, v * (k * q).sum(-1, keepdim=True))
    read.sum().backward()
    assert alpha.grad.isfinite().all()


def rule(S, k, v, beta, alpha=1.0):
    """One step of the plain rule: S (d, d), k (d,), v (d,)."""
    one = torch.ones(1, 1, 1, dtype=torch.float64)
    k, v = k[None, None, None], v[None, None, None]
    return today.delta_rule(k, k, v, alpha * one, beta * one, S[None, None])[1][0, 0]


def test_a_new_value_takes_the_place_of_the_old():
    S, k, u = heads_of(4, 4), *F.normalize(heads_of(2, 4), dim=-1)
    u = F.normalize(u - (u @ k) * k, dim=-1)  # a key that k does not touch
    v = heads_of(4, seed=1)
    S = rule(S, u, 2 * v, beta=1.0)
    S = rule(S, k, v, beta=1.0)
    torch.testing.assert_close(S @ k, v)
    torch.testing.assert_close(S @ u, 2 * v)
    torch.testing.assert_close(rule(S, k, -v, beta=1.0) @ k, -v)
    torch.testing.assert_close(rule(S, k, 0 * v, beta=0.5) @ k, 0.5 * v)
    torch.testing.assert_close(rule(S, k, 0 * v, beta=0.0, alpha=0.9), 0.9 * S)


def test_a_swap_is_a_reflection():
    S, none, e = heads_of(5, 5), torch.zeros(5).double(), torch.eye(5).double()
    k = (e[1] - e[3]) / 2**0.5
    swapped = rule(S, k, none, beta=2.0)
    torch.testing.assert_close(swapped, S[:, [0, 3, 2, 1, 4]], rtol=0, atol=1e-14)
    torch.testing.assert_close(rule(swapped, k, none, beta=2.0), S, rtol=0, atol=1e-14)
    half = rule(S, k, none, beta=1.0)  # both columns become their mean: which was which?
    mean = S[:, [1, 3]].mean(dim=1)
    torch.testing.assert_close(half[:, 1], mean)
    torch.testing.assert_close(half[:, 3], mean)
    assert not torch.allclose(rule(half, k, none, beta=1.0), S)


@pytest.mark.parametrize("strength", [0.0, 1.0, 2.0])
def test_strength_bounds_what_is_written(strength, monkeypatch):
    seen, plain = [], today.chunked_delta_rule
    watch = lambda q, k, v, alpha, beta, S: seen.append((alpha, beta, k)) or plain(q, k, v, alpha, beta, S)
    monkeypatch.setattr(today, "chunked_delta_rule", watch)
    model = MemoryToday(**SMALL, kind="delta", strength=strength).double()
    for layer in model.layers:
        assert layer.remember.gates.bias[:2].tolist() == [5.0, 5.0]
        layer.remember.gates.bias.data[2:] = 50.0
    model(tokens(2, 8))
    for alpha, beta, k in seen:
        torch.testing.assert_close(beta, torch.full_like(beta, strength))
        torch.testing.assert_close(k.norm(dim=-1), torch.ones_like(beta))
        assert 0.95 < alpha.min() and alpha.max() < 1


# ------------------------------------------------------------------ the model


@pytest.mark.parametrize("name", EXACT)
@pytest.mark.parametrize("piece", [1, 7, 11])
def test_it_does_not_matter_where_the_text_is_cut(name, piece):
    model, text = model_of(**EXACT[name]), tokens(2, 30)
    whole, end = read(model, text, 30)
    logits, memory = read(model, text, piece)
    torch.testing.assert_close(logits, whole, rtol=1e-10, atol=1e-10)
    if EXACT[name]["kind"] == "delta":
        torch.testing.assert_close(memory, end, rtol=1e-10, atol=1e-10)


def test_it_matters_once_the_cache_is_full():
    model, text = model_of(kind="cache", mem_len=4), tokens(2, 30)
    assert not torch.allclose(read(model, text, 30)[0], read(model, text, 7)[0])


@pytest.mark.parametrize(
    "kw, slots",
    [
        (dict(kind="cache", mem_len=6, n_sinks=1, n_used=2), [{6}] * 3),
        (dict(kind="pooled", mem_len=5, compressed_len=2, compression_rate=3), [{2}] * 2 + [{5, 6, 7}] * 2),
        (dict(kind="pooled", mem_len=5, compressed_len=2, compression_rate=3, top_k=1), [{2}] * 2 + [{11, 12, 13}] * 2),
        (dict(kind="delta"), [{2}]),  # heads
    ],
)
def test_a_memory_of_fixed_size_that_keeps_no_graph(kw, slots):
    model, memory, lengths = model_of(**kw), None, []
    for n, T in enumerate([30, *range(1, 9), 1, 1, 1, 30]):
        _, memory = model(tokens(2, T, seed=n), memory)
        for layer in memory:
            lengths.append([part.size(1) for part in layer])
            for part in layer:
                assert not part.requires_grad
                assert part.untyped_storage().nbytes() == part.nbytes  # nothing behind it
    assert [set(part) for part in zip(*lengths)] == slots


def test_loops_use_the_same_layers_and_have_a_memory_each():
    once, looped = (model_of(kind="delta", n_loops=n) for n in (1, 3))
    assert [p.shape for p in once.parameters()] == [p.shape for p in looped.parameters()]
    looped.load_state_dict(once.state_dict())
    logits, memory = looped(tokens(2, 8))
    assert len(memory) == 9 and len(once(tokens(2, 8))[1]) == 3
    deep = MemoryToday(**SMALL | {"n_layers": 9}, kind="delta").double().eval()
    own = once.state_dict()
    layer = lambda n: {f"layers.{n}.{m}": p for m, p in once.layers[n % 3].state_dict().items()}
    for n in range(9):
        own |= layer(n)
    deep.load_state_dict(own)
    assert torch.equal(deep(tokens(2, 8))[0], logits)
    assert all(torch.equal(a[0], b[0]) for a, b in zip(deep(tokens(2, 8))[1], memory))
    assert not torch.allclose(once(tokens(2, 8))[0], logits)


def test_settings_of_a_cache_may_change():
    model = model_of(kind="cache", mem_len=8)
    memory = model(tokens(2, 8))[1]
    for layer in model.layers:
        layer.remember.mem_len, layer.remember.n_sinks = 5, 2
    after = model(tokens(2, 1, seed=3), memory)[1]
    assert after[0][0].shape == (2, 5, 2, 8)
    assert torch.equal(after[0][0][:, :2], memory[0][0][:, :2])


@pytest.mark.parametrize("name", ["cache", "pooled", "pooled, top_k"])
def test_attention_can_be_recorded(name):
    model = model_of(**EXACT[name])
    memory = model(tokens(2, 12))[1]
    with measure.record_attention(model) as weights:
        model(tokens(2, 5), memory)
    assert len(weights) == 3
    for of_layer in weights:
        assert of_layer.shape[:3] == (2, 2, 5)
        torch.testing.assert_close(of_layer.sum(-1), torch.ones(2, 2, 5).double())
        assert not of_layer[..., -4:].triu().diagonal(dim1=2, dim2=3).any()


@pytest.mark.parametrize(
    "kw, words",
    [
        (dict(kind="mamba"), "kind='mamba' is not one of 'cache', 'pooled', 'delta'"),
        (dict(n_heads=16), "d_model / n_heads=1 is odd: use 0 or 2"),
        (dict(mem_len=2.5), "mem_len=2.5 is not a whole number >= 0"),
        (dict(n_sinks=-1), "n_sinks=-1 is not a whole number >= 0"),
        (dict(mem_len=4, n_sinks=2, n_used=3), r"n_sinks \+ n_used=5 is not a number in 0 ... 4"),
        (dict(decay=1.5), "decay=1.5 is not a number in 0 ... 1"),
        (dict(kind="pooled", mem_len=0), "mem_len=0 is not a number >= 1"),
        (dict(kind="pooled", compression_rate=0), "compression_rate=0 is not a whole number >= 1"),
        (dict(kind="pooled", top_k=0), "top_k=0 is not a whole number >= 1, nor None"),
        (dict(kind="delta", strength=2.5), "strength=2.5 is not a number in 0 ... 2"),
        (dict(n_loops=0), "n_loops=0 is not a whole number >= 1"),
    ],
)
def test_errors_name_what_is_valid(kw, words):
    with pytest.raises(ValueError, match=words):
        MemoryToday(**SMALL | kw)


def test_a_setting_of_another_kind_is_refused():
    with pytest.raises(TypeError, match="strength"):
        MemoryToday(**SMALL, kind="cache", strength=2.0)


@pytest.mark.parametrize("kind", MemoryToday.KINDS)
def test_the_memory_of_another_is_refused(kind):
    model = model_of(kind=kind)
    for other in MemoryToday.KINDS:
        memory = model_of(kind=other)(tokens(2, 4))[1]
        if other != kind:
            with pytest.raises(ValueError, match="memory is a tuple .*, this model's (is )?.*or None"):
                model(tokens(2, 4), memory)
    memory = model(tokens(2, 4))[1]
    with pytest.raises(ValueError, match="memory is a list of 2.*this model's a list of 3"):
        model(tokens(2, 4), memory[:2])
    with pytest.raises(ValueError, match="of 2 streams, tokens of 3"):
        model(tokens(3, 4), memory)
