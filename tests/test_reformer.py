"""What the Reformer promises (Kitaev et al. 2020): sets found by hashing, each key once, layers that run backwards."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from test_models import SMALL, tokens

from memtx_minimal.measure import bytes_for_backward, look, peak_bytes, record_attention
from memtx_minimal.reformer import (
    AxialPositions, FeedForward, LSHAttention, Reformer, Settings, attention_weights, hash_vectors, lsh_attention, one_round, round_mask,
)  # fmt: skip
from memtx_minimal.training import generate


def make(same_bucket=True, count_once=True, **kw):
    torch.manual_seed(0)
    model = Reformer(**SMALL | dict(chunk_len=4, axial_shape=(5, 8), n_rounds=3, piece_len=7) | kw).double()
    model.settings.same_bucket, model.settings.count_once = same_bucket, count_once
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def vectors(T, B=2, H=2, d=4, seed=0, dtype=torch.float64):
    """Queries, their unit-norm keys, and values, all with gradients."""
    generator = torch.Generator().manual_seed(seed)
    q, v = torch.randn(2, B, H, T, d, generator=generator).to(dtype)
    return q.requires_grad_(), v.requires_grad_()


def buckets_of(R, T, n, B=2, H=2, seed=0):
    return torch.randint(n, (R, B, H, T), generator=torch.Generator().manual_seed(seed))


# ------------------------------------------------------------------ by brute force, after the words of the paper


def sets(buckets, c, same_bucket=True):
    """For one head, buckets (R, T): for each round and query i, the list of keys in i's set."""
    found = []
    for row in buckets.tolist():
        order = sorted(range(len(row)), key=lambda i: (row[i], i))
        chunk = {i: n // c for n, i in enumerate(order)}
        found.append(
            [
                [j for j in range(i + 1) if chunk[j] in (chunk[i], chunk[i] - 1) and (row[j] == row[i] or not same_bucket)]
                for i in range(len(row))
            ]
        )
    return found


def brute_weights(q, buckets, c, same_bucket=True, count_once=True):
    """Softmax over the union of the sets, key by key; without -log N, over all sets laid end to end."""
    B, H, T, _ = q.shape
    weights = torch.zeros(B, H, T, T, dtype=q.dtype)
    for b in range(B):
        for h in range(H):
            found = sets(buckets[:, b, h], c, same_bucket)
            for i in range(T):
                keys = [j for one in found for j in one[i]]
                keys = sorted(set(keys)) if count_once else keys
                k = F.normalize(q[b, h, keys], dim=-1)
                scores = k @ q[b, h, i] - 1e5 * (torch.tensor(keys) == i)
                weights[b, h, i].index_add_(0, torch.tensor(keys), scores.softmax(0))
    return weights


def attend(q, v, buckets, c, **kw):
    return lsh_attention(q, F.normalize(q, dim=-1), v, buckets.long(), Settings(c, **kw))


@given(
    T=st.integers(1, 21), c=st.integers(1, 7), R=st.integers(1, 4), n=st.integers(1, 6), seed=st.integers(0, 99),
    same_bucket=st.booleans(), count_once=st.booleans(),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_rounds_equal_the_softmax_over_the_union_of_the_sets(T, c, R, n, seed, same_bucket, count_once):
    """Any length, any chunk: values and gradients; each key counts once, however many rounds find it."""
    (q, v), buckets = vectors(T, seed=seed), buckets_of(R, T, n, seed=seed)
    switches = dict(same_bucket=same_bucket, count_once=count_once)
    ours = attend(q, v, buckets, c, **switches)
    theirs = brute_weights(q, buckets, c, **switches) @ v
    torch.testing.assert_close(ours, theirs)
    direction = torch.randn(ours.shape, generator=torch.Generator().manual_seed(1), dtype=ours.dtype)
    for mine, right in zip(*(torch.autograd.grad(out, (q, v), direction) for out in (ours, theirs))):
        torch.testing.assert_close(mine, right)


def test_gradient_of_keys_apart_from_queries():
    q, v = vectors(12, B=1, H=1)
    k = torch.randn_like(q, requires_grad=True)
    buckets = buckets_of(2, 12, 3, B=1, H=1)
    assert torch.autograd.gradcheck(lambda q, k, v: lsh_attention(q, k, v, buckets, Settings(3)), (q, k, v))


@given(T=st.integers(1, 21), c=st.integers(1, 7), R=st.integers(1, 3), seed=st.integers(0, 99), same_bucket=st.booleans(), count_once=st.booleans())
@settings(max_examples=30, deadline=None)
def test_the_definition_is_the_softmax_over_the_union(T, c, R, seed, same_bucket, count_once):
    (q, _), buckets = vectors(T, seed=seed), buckets_of(R, T, 3, seed=seed)
    switches = dict(same_bucket=same_bucket, count_once=count_once)
    ours = attention_weights(q, F.normalize(q, dim=-1), buckets, Settings(c, **switches))
    torch.testing.assert_close(ours, brute_weights(q, buckets, c, **switches))


@given(T=st.integers(1, 6), c=st.integers(1, 4), n=st.integers(1, 4), seed=st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_a_round_is_a_softmax_and_its_logsumexp(T, c, n, seed):
    """Of the scores with what eq. 16 adds to them, -log N for the keys that n rounds find."""
    T, B = T * c, 1
    (q, v), buckets = vectors(T, B=B, seed=seed), buckets_of(n, T, 3, B=B, seed=seed)
    order = buckets.argsort(dim=-1, stable=True)
    place, k = order.argsort(dim=-1), F.normalize(q, dim=-1)
    mask = round_mask(0, q, buckets, order, place // c, Settings(c))
    o, z = one_round(q, k, v, mask, order[0], place[0])
    for h in range(2):
        found = sets(buckets[:, 0, h], c)
        for i in range(T):
            keys = found[0][i]
            N = torch.tensor([float(sum(j in one[i] for one in found)) for j in keys], dtype=q.dtype)
            scores = torch.where(torch.tensor(keys) == i, q[0, h, i] @ k[0, h, i] - 1e5, k[0, h, keys] @ q[0, h, i] - N.log())
            torch.testing.assert_close(z[0, h, i, 0], scores.logsumexp(0))
            torch.testing.assert_close(o[0, h, i], scores.softmax(0) @ v[0, h, keys])


def test_one_bucket_is_exact_attention():
    q, v = vectors(12)
    exact = attention_weights(q, F.normalize(q, dim=-1), None, None) @ v
    torch.testing.assert_close(attend(q, v, torch.zeros(1, 2, 2, 12), 6), exact)
    torch.testing.assert_close(attend(q, v, torch.zeros(3, 2, 2, 12), 12), exact)


def test_equal_rounds_count_as_one():
    (q, v), buckets = vectors(16), buckets_of(1, 16, 3)
    one, many = (attend(q, v, buckets.expand(R, -1, -1, -1), 4) for R in (1, 5))
    torch.testing.assert_close(one, many)


def test_first_chunk_does_not_look_back_to_the_last():
    """One bucket, three chunks: the wrap would show the end of the text to its beginning."""
    q, v = vectors(12)
    buckets = torch.zeros(2, 2, 2, 12, dtype=torch.int64)
    before = attend(q, v, buckets, 4)[:, :, :4]
    torch.testing.assert_close(before, attend(q[:, :, :4], v[:, :, :4], buckets[..., :4], 4))


def test_other_buckets_are_not_looked_at():
    q, v = vectors(16, B=1, H=1)
    buckets = torch.arange(16).expand(1, 1, 1, 16) % 4
    (gradient,) = torch.autograd.grad(attend(q, v, buckets, 4)[0, 0, 13].sum(), v)
    assert gradient[0, 0].abs().sum(-1).nonzero().flatten().tolist() == [1, 5, 9]  # not 13: others are there


def test_who_is_alone_looks_at_itself():
    for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        q, v = vectors(8, dtype=dtype)
        out = attend(q, v, torch.arange(8).expand(2, 2, 2, 8), 2)
        torch.testing.assert_close(out, v)
        (gradient,) = torch.autograd.grad(out.sum(), v)
        assert torch.equal(gradient, torch.ones_like(v))


@given(changed=st.integers(1, 19), seed=st.integers(0, 20))
@settings(max_examples=30, deadline=None)
def test_nothing_flows_back_from_the_future_within_given_buckets(changed, seed):
    (q, v), buckets = vectors(20, seed=seed), buckets_of(2, 20, 3, seed=seed)
    before = attend(q, v, buckets, 3)
    q, v = q.detach().clone(), v.detach().clone()
    q[:, :, changed:], v[:, :, changed:] = 7, -9
    assert torch.equal(attend(q, v, buckets, 3)[:, :, :changed], before[:, :, :changed])


# ------------------------------------------------------------------ hashing and sorting


def test_hash_depends_on_direction_alone():
    q = vectors(50)[0]
    buckets = hash_vectors(q, 8, 3, seed=0)
    assert buckets.shape == (3, 2, 2, 50) and buckets.unique().tolist() == list(range(8))
    assert torch.equal(buckets, hash_vectors(5 * q, 8, 3, seed=0))
    assert torch.equal((buckets + 4) % 8, hash_vectors(-q, 8, 3, seed=0))  # [xR ; -xR]


def test_hash_is_an_argmax_over_random_directions():
    q = vectors(9, H=1)[0]
    R = torch.randn(3, 2, 1, 1, 4, generator=torch.Generator().manual_seed(5))
    xR = torch.einsum("bhtd,nrhd->rbhtn", q, R[:, :, 0].double())
    assert torch.equal(hash_vectors(q, 6, 2, seed=5), torch.cat([xR, -xR], -1).argmax(-1))


def test_rounds_and_heads_have_rotations_of_their_own():
    x = torch.randn(1, 1, 100, 4).expand(1, 3, 100, 4)
    buckets = hash_vectors(x, 8, 2, seed=0).flatten(0, 2)
    assert all((a != b).any() for n, a in enumerate(buckets) for b in buckets[:n])


@pytest.mark.parametrize("n_buckets", [2, 14, 32, 34, 64, 100, 128, 250, 512, 4096])
def test_many_buckets_are_met_nearly(n_buckets):
    x = torch.randn(1, 1, 3000, 16)
    buckets = hash_vectors(x, n_buckets, 1, seed=0).int()
    assert buckets.min() >= 0 and buckets.max() < 1.25 * n_buckets
    assert len(buckets.unique()) > 0.25 * min(n_buckets, 3000)


@pytest.mark.parametrize("n_buckets, dtype", [(256, torch.uint8), (512, torch.int16), (2**15, torch.int16), (2**16, torch.int32)])
def test_buckets_take_few_bytes_and_do_not_overflow(n_buckets, dtype):
    buckets = hash_vectors(torch.randn(1, 1, 3000, 16), n_buckets, 1, seed=0)
    assert buckets.dtype == dtype and buckets.min() >= 0 and buckets.max() > n_buckets / 2


def test_near_vectors_meet_more_often():
    x = F.normalize(torch.randn(1, 1, 2000, 16, generator=torch.Generator().manual_seed(0)), dim=-1)
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    meet = [
        (hash_vectors(x, 64, 8, seed=0) == hash_vectors(x + e * noise, 64, 8, seed=0)).float().mean()
        for e in (0.02, 0.1, 0.5, 100)
    ]
    assert meet[0] > 0.8 and meet[0] > meet[1] > meet[2] > meet[3] and meet[3] < 0.1


def test_evaluation_leaves_the_random_numbers_of_others_alone():
    assert torch.equal(hash_vectors(vectors(9)[0], 8, 2, 3), hash_vectors(vectors(9)[0], 8, 2, 3))
    model = make().eval()
    before = torch.get_rng_state()
    model(tokens(1, 30))
    assert torch.equal(before, torch.get_rng_state())


def test_training_hashes_anew_and_evaluation_does_not():
    """The seed of torch governs both the rotations and the dropout of training."""
    model, runs = make(dropout=0.1), []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        runs.append(model(tokens(2, 30))[0])
    assert torch.equal(runs[0], runs[1]) and not torch.allclose(runs[0], runs[2])
    a, b = (make()(tokens(2, 30))[0] for _ in range(2))
    model = make()
    a, b = (model(tokens(2, 30))[0] for _ in range(2))
    assert not torch.allclose(a, b)
    model.eval()
    a, b = (model(tokens(2, 30))[0] for _ in range(2))
    assert torch.equal(a, b)


def test_a_longer_text_keeps_nearly_all_its_buckets():
    """In evaluation: more buckets are more directions, and the first ones stay."""
    q = vectors(400, H=1, d=16)[0]
    for few, many in [(12, 14), (30, 32)]:
        a, b = (hash_vectors(q, n, 1, seed=0)[0, :, 0].int() for n in (few, many))
        together = [(x[:, :, None] == x[:, None]) for x in (a, b)]
        assert (together[0] & together[1]).sum() > 0.75 * together[0].sum()


# ------------------------------------------------------------------ the layer and the model


@torch.no_grad()
@pytest.mark.parametrize("switch", [{}, {"same_bucket": False}, {"count_once": False}, {"n_rounds": 0}])
@pytest.mark.parametrize("T", [8, 9, 33])
def test_attention_weights_are_what_the_output_was_made_with(T, switch):
    """In the order of the text, all layers: weights times values are the heads."""
    model, heads, inputs = make(**switch).eval(), [], []
    weights = look(model, tokens(2, T))
    hooks = [a.out.register_forward_pre_hook(lambda m, args: heads.append(args[0])) for a in model.blocks[::2]]
    hooks += [a.norm.register_forward_hook(lambda m, args, out: inputs.append(args[0])) for a in model.blocks[::2]]
    model(tokens(2, T))
    for hook in hooks:
        hook.remove()
    for w, x, y, attention in zip(weights, inputs, heads, model.blocks[::2], strict=True):
        assert w.shape == (2, 2, T, T) and not w.triu(1).any()
        torch.testing.assert_close(w.sum(-1), torch.ones(2, 2, T, dtype=w.dtype))
        torch.testing.assert_close((w @ attention.heads(x)[2]).transpose(1, 2).flatten(2), y)


def test_looking_is_evaluation_and_leaves_the_model_as_it_was():
    """In training mode too, where a forward pass hashes anew; and where the forward pass fails."""
    model, right = make(dropout=0.5), look(make(dropout=0.5).eval(), tokens(2, 30))
    torch.testing.assert_close(look(model, tokens(2, 30)), right)
    with pytest.raises(ValueError, match="pass 1 to 40"):
        look(model, tokens(1, 41))
    assert all(module.training and not module._forward_hooks for module in model.modules())


@torch.no_grad()
def test_keys_have_unit_norm_and_scores_are_not_divided_further():
    attention = make().blocks[0]
    x = torch.randn(1, 6, 16, dtype=torch.float64)
    q, k, v = attention.heads(x)
    torch.testing.assert_close(k.norm(dim=-1), torch.ones_like(k[..., 0]))
    torch.testing.assert_close(k * q.norm(dim=-1, keepdim=True), q)
    scores = (q @ k.mT).masked_fill(torch.ones(6, 6).triu().bool(), -1e5)
    scores[..., 0, 1:] = -math.inf
    y = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
    torch.testing.assert_close(attention(x)[0], attention.out(y))


def test_short_texts_and_no_rounds_are_exact_and_recorded():
    model = make().eval()
    with record_attention(model) as weights:
        model(tokens(2, 8))
    torch.testing.assert_close(weights, look(model, tokens(2, 8)))
    assert (weights[0].tril(-1) > 0).sum() == 2 * 2 * 8 * 7 / 2
    longer, model.settings.n_rounds = model(tokens(2, 32))[0], 0
    assert not torch.allclose(longer, model(tokens(2, 32))[0])
    with record_attention(model) as weights:
        model(tokens(2, 32))
    assert (weights[0].tril(-1) > 0).sum() == 2 * 2 * 32 * 31 / 2


@torch.no_grad()
def test_more_rounds_come_nearer_to_exact_attention():
    text, model = tokens(4, 40), make(n_layers=1).eval()
    logits = []
    for model.settings.n_rounds in (0, 1, 4, 16):
        logits.append(model(text)[0])
    errors = [(some - logits[0]).abs().mean() for some in logits[1:]]
    assert errors[0] > errors[1] > errors[2]


@given(T=st.integers(1, 40))
@settings(max_examples=10, deadline=None)
def test_any_length(T):
    logits, memory = make().eval()(tokens(1, T))
    assert logits.shape == (1, T, 11) and memory is None and logits.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("T", [7, 30])
def test_half_precision_is_finite(dtype, T):
    model = make().to(dtype)
    logits, _ = model(tokens(2, T))
    logits.float().logsumexp(-1).sum().backward()
    assert logits.dtype == dtype and logits.isfinite().all()
    assert all(p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_first_token_looks_at_itself_in_half_precision(dtype):
    """-1e5 is minus infinity in float16: the first token would have nothing to look at."""
    q, v = vectors(6, dtype=dtype)
    weights = attention_weights(q, F.normalize(q, dim=-1), None, None)
    assert (weights[..., 0, 0] == 1).all() and weights.isfinite().all()
    assert attend(q, v, torch.zeros(1, 2, 2, 6), 2).dtype == dtype


def test_generation_re_reads_its_window():
    model = make().float()
    text = generate(model, tokens(1, 30)[0], 20)
    assert text.shape == (50,) and torch.equal(text[:30], tokens(1, 30)[0])


def test_invalid_arguments_are_refused_early():
    with pytest.raises(ValueError, match="pass 1 to 40"):
        make()(tokens(1, 41))
    with pytest.raises(ValueError, match="chunk_len=0 is not a whole number >= 1"):
        make(chunk_len=0)
    with pytest.raises(ValueError, match="n_rounds=-1 is not a whole number >= 0"):
        make(n_rounds=-1)
    with pytest.raises(AttributeError, match="rounds"):
        make().settings.rounds = 3
    with pytest.raises(ValueError, match="chunk_len=0 is not a whole number >= 1"):
        make().settings.chunk_len = 0
    for shape in [(2, 4, 5), (40,), 40]:
        with pytest.raises(ValueError, match="axial_shape=.* is not a pair"):
            make(axial_shape=shape)


@pytest.mark.parametrize("n_buckets", [-2, 0, 1, 7, 33, 4.0])
def test_buckets_come_in_pairs(n_buckets):
    with pytest.raises(ValueError, match=f"n_buckets={n_buckets} is not even and >= 2"):
        hash_vectors(vectors(9)[0], n_buckets, 1, seed=0)


def test_what_cannot_be_hashed_or_attended_is_refused():
    (q, v), buckets = vectors(9), buckets_of(2, 9, 3)
    k, right = q.detach(), Settings(3)
    nan = torch.full_like(k, math.nan)
    for x, message in [(torch.ones(2, 2, 9, 4, dtype=int), "torch.int64"), (nan, "nan or inf"), (k[0], "pass .B, H, T, d."), ([1.0], "list")]:
        with pytest.raises(ValueError, match=message):
            hash_vectors(x, 4, 1, seed=0)
    for rounds in (0, 2.5, -1):
        with pytest.raises(ValueError, match=f"n_rounds={rounds}"):
            hash_vectors(k, 4, rounds, seed=0)
    wrong = {
        "differ: k": (q, k[:, :, :8], v, buckets), "differ: v": (q, k, v[:1], buckets), "use one number": (q, k[..., :3], v, buckets),
        "buckets": (q, k, v, buckets[..., :8]), "pass integers": (q, k, v, buckets.float()), "no round": (q, k, v, buckets[:0]),
        "q: torch.int64": (k.long(), k, v, buckets), "v: torch.int64": (q, k, v.detach().long(), buckets), "none 0": (q[:0], k[:0], v[:0], buckets[:, :0]),
    }  # fmt: skip
    for message, given in wrong.items():
        with pytest.raises(ValueError, match=message):
            lsh_attention(*given, right)
    for c in (0, 2.5, -3):
        with pytest.raises(ValueError, match=f"chunk_len={c}"):
            Settings(c)


@pytest.mark.parametrize("kw", [dict(n_rounds=2.5), dict(chunk_len=0), dict(n_heads=0), dict(n_layers=0), dict(piece_len=0), dict(d_ff=1.5), dict(dropout=2)])
def test_sizes_that_cannot_work_are_refused_when_the_model_is_built(kw):
    with pytest.raises(ValueError, match=f"{next(iter(kw))}="):
        make(**kw)
    if "n_rounds" in kw:
        with pytest.raises(ValueError, match="n_rounds=2.5"):
            make().settings.n_rounds = 2.5


@pytest.mark.parametrize("wrong", [torch.ones(5, dtype=int), torch.ones(0, 5, dtype=int), torch.ones(1, 5), torch.full((1, 5), 11)])
def test_tokens_are_checked(wrong):
    with pytest.raises(ValueError):
        make()(wrong)
    with pytest.raises(ValueError, match="memory"):
        make()(tokens(1, 5), memory=[1])


# ------------------------------------------------------------------ axial positions, pieces


def test_axial_positions_are_a_row_and_a_column():
    positions = AxialPositions((3, 4), 6)
    table = positions(12)
    assert table.shape == (12, 6) and torch.equal(positions(7), table[:7])
    for n in range(12):
        assert torch.equal(table[n], torch.cat([positions.rows[n // 4, 0], positions.columns[0, n % 4]]))
    assert sum(p.numel() for p in positions.parameters()) == (3 + 4) * 3
    for T in (0, 13):
        with pytest.raises(ValueError, match=f"T={T} is not a number in 1 ... 12"):
            positions(T)


@pytest.mark.parametrize("piece_len", [1, 7, 30, 100])
def test_pieces_change_nothing(piece_len):
    text, results = tokens(2, 30), []
    for length in (piece_len, 1000):
        model = make(piece_len=length)
        logits, _ = model(text)
        logits.square().sum().backward()
        results.append([logits, *(p.grad for p in model.parameters())])
    torch.testing.assert_close(*results)


def test_pieces_bound_the_peak():
    """A wide feed-forward at 512 positions: in pieces of 32 the transient shrinks, backward included."""

    def peak(piece_len):
        model = Reformer(**SMALL | dict(d_ff=1024, n_layers=1), axial_shape=(16, 32), piece_len=piece_len)
        return peak_bytes(lambda: model(tokens(1, 512))[0].sum().backward())

    assert peak(32) < 0.5 * peak(512)


# ------------------------------------------------------------------ reversible layers


def gradients(model, work):
    model.zero_grad()
    torch.manual_seed(3)
    work(model).backward()
    return [p.grad.clone() for p in model.parameters()]


def once(model):
    return model(tokens(2, 30))[0].square().sum()


def several(model):
    """Three forwards, two of one shape, before one backward."""
    other = model(tokens(3, 39, seed=2))[0].logsumexp(-1).sum()
    return once(model) + other + model(tokens(2, 30, seed=4))[0].logsumexp(-1).sum()


def autocast(model):
    with torch.autocast("cpu", torch.bfloat16):
        return once(model).float()


class Inside:
    """A loss whose backward pass also runs under autocast, in the same block as the forward pass."""

    def __init__(self, model):
        self.model = model

    def backward(self):
        with torch.autocast("cpu", torch.bfloat16):
            once(self.model).float().backward()


@pytest.mark.parametrize("work", [once, several])
@pytest.mark.parametrize("kw", [{}, {"dropout": 0.4}, {"n_rounds": 0, "dropout": 0.4}, {"same_bucket": False, "count_once": False}])
def test_reversible_gradients_equal_ordinary_autograd(kw, work):
    """In training mode, where each forward draws new rotations: the saved buckets must be the ones used."""
    torch.testing.assert_close(gradients(make(**kw), work), gradients(make(reversible=False, **kw), work))


@pytest.mark.parametrize("work", [autocast, Inside])
def test_reversible_gradients_under_autocast(work):
    """The same bfloat16 products the second time, and none that forward had cached without gradients."""
    mine, right = (gradients(make(reversible=r, dropout=0.1).float(), work) for r in (True, False))
    for a, b in zip(mine, right):
        assert (a - b).norm() < 0.006 * b.norm()


def test_backward_under_autocast_changes_nothing():
    def inside(model):
        loss = once(model)
        return type("Loss", (), {"backward": lambda self: torch.autocast("cpu", torch.bfloat16)(loss.backward)()})()

    for reversible in (True, False):
        a, b = (gradients(make(reversible=reversible, n_layers=1, piece_len=99).float(), work) for work in (once, inside))
        attention = [n for n, _ in make(n_layers=1).named_parameters()].index("blocks.0.query_value.weight")
        assert (a[attention] - b[attention]).norm() < 0.02 * a[attention].norm()


def test_frozen_parameters_stay_out():
    model, ordinary = make(), make(reversible=False)
    for m in (model, ordinary):
        m.blocks[2].requires_grad_(False)
        m.embedding.requires_grad_(False)
        m.blocks[1].layers[1].bias.requires_grad_(False)
        torch.manual_seed(1)
        once(m).backward()
    for (name, p), q in zip(model.named_parameters(), ordinary.parameters()):
        assert (p.grad is None) == (q.grad is None) == (not p.requires_grad), name
        if p.requires_grad:
            torch.testing.assert_close(p.grad, q.grad)


def test_backward_hashes_nothing_and_draws_nothing(monkeypatch):
    model = make(dropout=0.3)
    loss = once(model)
    monkeypatch.setattr(LSHAttention, "hash", lambda *args: pytest.fail("hashed again"))
    torch.manual_seed(5)
    before = torch.get_rng_state()
    loss.backward()
    assert torch.equal(before, torch.get_rng_state())


def test_depth_costs_nothing_but_buckets():
    """A layer keeps one byte a token, head and round, and two states of the random numbers."""
    text, kept = tokens(2, 40), {}
    for n_layers in (1, 2, 12):
        for dropout in (0.0, 0.1):
            model = make(n_layers=n_layers, dropout=dropout)
            kept[n_layers, dropout] = bytes_for_backward(model, lambda m=model: m(text)[0])
    buckets, state = 3 * 2 * 2 * 40, torch.get_rng_state().nbytes
    for dropout in (0.0, 0.1):
        assert kept[12, dropout] - kept[2, dropout] == 10 * (buckets + 2 * state)
    ordinary = [make(n_layers=n, reversible=False) for n in (1, 12)]
    ordinary = [bytes_for_backward(m, lambda m=m: m(text)[0]) for m in ordinary]
    assert ordinary[1] > 5 * ordinary[0]


def test_tied_blocks_and_unused_parameters_are_right():
    """One block in two places gets the sum of both gradients; what is not used gets none."""

    class Unused(FeedForward):
        def __init__(self):
            super().__init__(16, 32, 7)
            self.extra = torch.nn.Parameter(torch.ones(3))

    grads = []
    for reversible in (True, False):
        model = make(reversible=reversible)
        torch.manual_seed(0)
        model.blocks[4], model.blocks[5], model.blocks[1] = model.blocks[0], model.blocks[3], Unused().double()
        torch.manual_seed(1)
        once(model).backward()
        assert model.blocks[1].extra.grad is None
        grads.append([p.grad for p in model.parameters() if p.grad is not None])
    for mine, right in zip(*grads, strict=True):
        torch.testing.assert_close(mine, right)


def test_randomness_anywhere_is_the_same_the_second_time():
    """Fault 1: dropout in the blocks alone, or blocks in training mode under an evaluating model."""

    def blocks_alone(model):
        model.dropout.p = 0.0

    def blocks_in_training(model):
        model.eval().blocks.train()

    def a_block_of_ones_own(model):
        draws = lambda module, args, out: (out[0] * torch.rand_like(out[0]), out[1])  # noqa: E731
        model.blocks[1].register_forward_hook(draws)
        model.blocks[2].register_forward_hook(draws)

    for change in (blocks_alone, blocks_in_training, a_block_of_ones_own):
        grads = []
        for reversible in (True, False):
            model = make(dropout=0.2, reversible=reversible)
            change(model)
            torch.manual_seed(1)
            grads.append(gradients(model, once))
        for mine, right in zip(*grads):
            torch.testing.assert_close(mine, right)


def test_a_resumed_run_equals_an_uninterrupted_one():
    """Fault 2: weights, optimizer and torch's random state are all there is to restore."""

    def steps(model, optimizer, n):
        for _ in range(n):
            optimizer.zero_grad()
            once(model).backward()
            optimizer.step()

    def begin():
        model = make(dropout=0.2)
        return model, torch.optim.AdamW(model.parameters(), lr=1e-2)

    model, optimizer = begin()
    steps(model, optimizer, 4)
    first, first_optimizer = begin()
    steps(first, first_optimizer, 2)
    saved = first.state_dict(), first_optimizer.state_dict(), torch.get_rng_state()
    again, again_optimizer = begin()
    again.load_state_dict(saved[0])
    again_optimizer.load_state_dict(saved[1])
    torch.set_rng_state(saved[2])
    steps(again, again_optimizer, 2)
    for mine, right in zip(again.parameters(), model.parameters()):
        assert torch.equal(mine, right)


def test_a_gradient_checkpoint_around_the_model_changes_nothing():
    """Fault 2: what is computed once more hashes as it did."""
    from torch.utils.checkpoint import checkpoint

    text = tokens(2, 30)
    plain = gradients(make(dropout=0.2), lambda m: m(text)[0].square().sum())
    again = gradients(make(dropout=0.2), lambda m: checkpoint(m, text, use_reentrant=False)[0].square().sum())
    for mine, right in zip(again, plain):
        torch.testing.assert_close(mine, right)


def test_streams_are_rebuilt_over_many_layers_in_float32():
    deep = dict(n_layers=12, chunk_len=8)
    mine, right = (gradients(make(reversible=r, **deep).float(), once) for r in (True, False))
    for a, b in zip(mine, right):
        assert (a - b).norm() < 1e-3 * b.norm()


def test_says_when_backward_cannot_work():
    model = make(dropout=0.2)
    loss = once(model)
    model.eval()
    with pytest.raises(RuntimeError, match="between forward and backward"):
        loss.backward()
    model.train()
    loss, model.settings.n_rounds = once(model), 0
    with pytest.raises(RuntimeError, match="between forward and backward"):
        loss.backward()
    loss = once(model)
    model.blocks[2].requires_grad_(False)
    with pytest.raises(RuntimeError, match="requires_grad changed between forward and backward"):
        loss.backward()
    model.requires_grad_()
    loss = once(model)
    with torch.no_grad():
        model.blocks[0].out.weight.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    loss = once(model)
    (gradient,) = torch.autograd.grad(loss, model.embedding.weight, create_graph=True)
    with pytest.raises(RuntimeError, match="twice"):
        gradient.sum().backward()


def test_without_gradients_nothing_is_kept():
    with torch.no_grad():
        assert not make()(tokens(1, 30))[0].requires_grad
    with torch.inference_mode():
        make()(tokens(1, 30))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_reversible_gradients_on_cuda():
    for work in (once, several):
        make_on = lambda r: make(dropout=0.4, reversible=r).cuda()
        torch.testing.assert_close(gradients(make_on(True), work), gradients(make_on(False), work))


def test_odd_vectors_and_buckets_are_refused():
    q = torch.randn(2, 2, 8, 4)
    buckets = buckets_of(1, 8, 4)
    for x, words in [
        (q.long(), "x: torch.int64; pass a tensor of floating point"),
        (q.tolist(), "x: list; pass a tensor of floating point"),
        (q[0], "pass .B, H, T, d., none 0"),
        (q * float("nan"), "x has numbers that are nan or inf"),
    ]:
        with pytest.raises(ValueError, match=words):
            hash_vectors(x, 4, 1, seed=0)
    for n_rounds, words in [(0, "without a round"), (2.5, "n_rounds=2.5 is not a whole number")]:
        with pytest.raises(ValueError, match=words):
            hash_vectors(q, 4, n_rounds, seed=0)
    for handed, words in [
        ((q, q[:, :, 1:], q, buckets), "differ"),
        ((q, q[..., 1:], q, buckets), "use one number"),
        ((q, q, q, buckets[..., 1:]), "pass integers"),
        ((q, q, q, buckets.float()), "pass integers"),
    ]:
        with pytest.raises(ValueError, match=words):
            lsh_attention(*handed, Settings(2))
    for c, words in [(0, "chunk_len=0 is not a whole number >= 1"), (2.5, "chunk_len=2.5 is not")]:
        with pytest.raises(ValueError, match=words):
            Settings(c)
    half = lsh_attention(*(x.half() for x in (q, q, q)), buckets, Settings(2))
    assert half.dtype == torch.float16
    with pytest.raises(ValueError, match="T=41 is not a number in 1 ... 40"):
        make().positions(41)
