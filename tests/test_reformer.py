"""What the Reformer promises (Kitaev et al. 2020): sets found by hashing, each key once, layers that run backwards."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from test_models import SMALL, tokens

from memtx_minimal import lsh_attention as lsh
from memtx_minimal.lsh_attention import LSHAttention, attention_weights, exact_mask, hash_vectors, lsh_attention, sort_buckets
from memtx_minimal.measure import bytes_for_backward, peak_bytes, record_attention
from memtx_minimal.reformer import AxialPositions, Reformer, look
from memtx_minimal.training import generate


def make(bucket_mask=True, duplicates=True, **kw):
    torch.manual_seed(0)
    model = Reformer(**SMALL | dict(chunk_len=4, axial_shape=(5, 8), n_rounds=3, piece_len=7) | kw).double()
    model.settings.bucket_mask, model.settings.duplicates = bucket_mask, duplicates
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


def sets(buckets, c, bucket_mask=True):
    """For one head, buckets (R, T): for each round and query i, the list of keys in i's set."""
    found = []
    for row in buckets.tolist():
        order = sorted(range(len(row)), key=lambda i: (row[i], i))
        chunk = {i: n // c for n, i in enumerate(order)}
        found.append(
            [
                [j for j in range(i + 1) if chunk[j] in (chunk[i], chunk[i] - 1) and (row[j] == row[i] or not bucket_mask)]
                for i in range(len(row))
            ]
        )
    return found


def brute_weights(q, buckets, c, bucket_mask=True, duplicates=True):
    """Softmax over the union of the sets, key by key; without the duplicates term, over all sets laid end to end."""
    B, H, T, _ = q.shape
    weights = torch.zeros(B, H, T, T, dtype=q.dtype)
    for b in range(B):
        for h in range(H):
            found = sets(buckets[:, b, h], c, bucket_mask)
            for i in range(T):
                keys = [j for one in found for j in one[i]]
                keys = sorted(set(keys)) if duplicates else keys
                k = F.normalize(q[b, h, keys], dim=-1)
                scores = k @ q[b, h, i] - 1e5 * (torch.tensor(keys) == i)
                weights[b, h, i].index_add_(0, torch.tensor(keys), scores.softmax(0))
    return weights


def attend(q, v, buckets, c, **kw):
    return lsh_attention(q, F.normalize(q, dim=-1), v, buckets, c, **kw)


@given(
    T=st.integers(1, 21), c=st.integers(1, 7), R=st.integers(1, 4), n=st.integers(1, 6), seed=st.integers(0, 99),
    bucket_mask=st.booleans(), duplicates=st.booleans(),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_rounds_equal_the_softmax_over_the_union_of_the_sets(T, c, R, n, seed, bucket_mask, duplicates):
    """Any length, any chunk: values and gradients; each key counts once, however many rounds find it."""
    (q, v), buckets = vectors(T, seed=seed), buckets_of(R, T, n, seed=seed)
    switches = dict(bucket_mask=bucket_mask, duplicates=duplicates)
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
    assert torch.autograd.gradcheck(lambda q, k, v: lsh_attention(q, k, v, buckets, 3), (q, k, v))


@pytest.mark.parametrize("duplicates", [True, False])
def test_slabs_change_nothing(monkeypatch, duplicates):
    (q, v), buckets = vectors(40), buckets_of(2, 40, 5)
    whole = attend(q, v, buckets, 4, duplicates=duplicates)
    gradient = torch.autograd.grad(whole.square().sum(), (q, v))
    monkeypatch.setattr(lsh, "PAIRS", 3 * 32)  # 3 chunks at a time, out of 40
    parts = attend(q, v, buckets, 4, duplicates=duplicates)
    torch.testing.assert_close(parts, whole)
    torch.testing.assert_close(torch.autograd.grad(parts.square().sum(), (q, v)), gradient)


def test_one_bucket_is_exact_attention():
    q, v = vectors(12)
    exact = (q @ F.normalize(q, dim=-1).mT + exact_mask(q)).softmax(-1) @ v
    torch.testing.assert_close(attend(q, v, torch.zeros(1, 2, 2, 12).int(), 6), exact)
    torch.testing.assert_close(attend(q, v, torch.zeros(3, 2, 2, 12).int(), 12), exact)


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
        torch.testing.assert_close(out.to(dtype), v)
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


def test_many_heads_need_no_more_bits_than_one():
    """Codes count chunks of one head; int16 holds them however many heads lie in a row."""
    q, v = vectors(40, B=30, H=30)
    buckets = buckets_of(2, 40, 10, B=30, H=30)
    alone = attend(q[29:, 29:], v[29:, 29:], buckets[:, 29:, 29:], 4)
    torch.testing.assert_close(attend(q, v, buckets, 4)[29:, 29:], alone)


def test_long_texts_need_more_bits():
    q, v = vectors(40_000, B=1, H=1, dtype=torch.float32)
    near = torch.arange(40_000) // 4 % 2**13
    out = attend(q, v, near.expand(1, 1, 1, -1), 8)
    some = slice(36_000, 36_040)  # whole buckets, found again 32,768 tokens earlier
    early = slice(36_000 - 2**15, 36_040 - 2**15)
    pair = [torch.cat([x[:, :, early], x[:, :, some]], dim=2) for x in (q, v)]
    alone = attend(*pair, torch.cat([near[early], near[some]]).expand(1, 1, 1, -1), 8)
    torch.testing.assert_close(out[:, :, some], alone[:, :, 40:])


@pytest.mark.parametrize("T", [2**15 - 8, 2**15, 2**15 + 8])
def test_first_chunk_does_not_look_back_where_int16_ends(T):
    q, v = vectors(T, B=1, H=1, dtype=torch.float32)
    out = attend(q, v, torch.zeros(1, 1, 1, T).int(), 8)[:, :, :8]
    torch.testing.assert_close(out, attend(q[:, :, :8], v[:, :, :8], torch.zeros(1, 1, 1, 8).int(), 8))


# ------------------------------------------------------------------ hashing and sorting


def test_hash_depends_on_direction_alone():
    q = vectors(50)[0]
    buckets = hash_vectors(q, 8, 3, seed=0)
    assert buckets.shape == (3, 2, 2, 50) and buckets.unique().tolist() == list(range(8))
    assert torch.equal(buckets, hash_vectors(5 * q, 8, 3, seed=0))
    assert torch.equal((buckets + 4) % 8, hash_vectors(-q, 8, 3, seed=0))  # [xR ; -xR]


def test_hash_is_an_argmax_over_random_directions():
    q = vectors(9, H=1)[0]
    R = torch.randn(2, 1, 1, 4, 3, generator=torch.Generator().manual_seed(5))
    xR = torch.einsum("bhtd,rhdn->rbhtn", q, R[:, 0].double())
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


@given(T=st.integers(1, 30), c=st.integers(1, 8), n=st.integers(1, 5))
@settings(max_examples=30, deadline=None)
def test_codes_say_who_is_in_whose_set(T, c, n):
    buckets = buckets_of(2, T, n)
    order, code = sort_buckets(buckets, c)
    code = code.view(buckets.shape)
    for b in range(2):
        for h in range(2):
            right = sets(buckets[:, b, h], c)
            for r in range(2):
                mine = [[j for j in range(i + 1) if 0 <= code[r, b, h, i] - code[r, b, h, j] <= 1] for i in range(T)]
                assert mine == right[r]
    rows = buckets.flatten(1)
    for r in range(2):
        for head in order[r].view(4, T):
            assert head.tolist() == sorted(head.tolist(), key=lambda i: (rows[r, i].item(), i))


# ------------------------------------------------------------------ the layer and the model


@torch.no_grad()
@pytest.mark.parametrize("switch", [{}, {"bucket_mask": False}, {"duplicates": False}, {"n_rounds": 0}])
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
    weights = attention_weights(q, F.normalize(q, dim=-1), None, 4)
    assert (weights[..., 0, 0] == 1).all() and weights.isfinite().all()
    out = F.scaled_dot_product_attention(q, F.normalize(q, dim=-1), v, exact_mask(q), scale=1.0)
    torch.testing.assert_close(out[:, :, 0], v[:, :, 0])


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


@pytest.mark.parametrize("n_buckets", [-2, 0, 1, 7, 33])
def test_buckets_come_in_pairs(n_buckets):
    with pytest.raises(ValueError, match=f"n_buckets={n_buckets} is not even and >= 2"):
        hash_vectors(vectors(9)[0], n_buckets, 1, seed=0)


# ------------------------------------------------------------------ axial positions, pieces


def test_axial_positions_are_a_row_and_a_column():
    positions = AxialPositions((3, 4), 6)
    table = positions(12)
    assert table.shape == (12, 6) and torch.equal(positions(7), table[:7])
    for n in range(12):
        assert torch.equal(table[n], torch.cat([positions.rows[n // 4, 0], positions.columns[0, n % 4]]))
    assert sum(p.numel() for p in positions.parameters()) == (3 + 4) * 3


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
@pytest.mark.parametrize("kw", [{}, {"dropout": 0.4}, {"n_rounds": 0, "dropout": 0.4}, {"bucket_mask": False, "duplicates": False}])
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


# torch 2.4's own checkpoint calls its older name
@pytest.mark.filterwarnings("ignore:.*torch.cpu.amp.autocast:FutureWarning")
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
        ((q, q[:, :, 1:], q, buckets, 2), "differ"),
        ((q, q[..., 1:], q, buckets, 2), "use one number"),
        ((q, q, q, buckets[..., 1:], 2), "pass integers"),
        ((q, q, q, buckets.float(), 2), "pass integers"),
        ((q, q, q, buckets, 0), "chunk_len=0 is not a whole number >= 1"),
        ((q, q, q, buckets, 2.5), "chunk_len=2.5 is not"),
    ]:
        with pytest.raises(ValueError, match=words):
            lsh_attention(*handed)
    assert lsh_attention(*(x.half() for x in (q, q, q)), buckets, 2).dtype == torch.float16
    with pytest.raises(ValueError, match="T=41 is not a number in 1 ... 40"):
        make().positions(41)
