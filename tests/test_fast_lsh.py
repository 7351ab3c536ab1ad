"""Appendix B: what makes hashed attention fast changes nothing but the time, and refuses what it does not compute."""

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from test_models import tokens
from test_reformer import autocast, buckets_of, gradients, make, once, sets, several, vectors

from memtx_minimal import fast_lsh
from memtx_minimal.fast_lsh import fast_attention, sort_and_code, speed_up
from memtx_minimal.measure import look
from memtx_minimal.reformer import LSHAttention, Settings, lsh_attention
from memtx_minimal.vanilla_transformer import VanillaTransformer

EXACT = dict(rtol=1e-10, atol=1e-10)


def attend(q, v, buckets, c, **kw):
    return fast_attention(q, F.normalize(q, dim=-1), v, buckets.long(), Settings(c, **kw))


@given(
    T=st.integers(1, 41), c=st.integers(1, 7), R=st.integers(1, 4), n=st.integers(1, 6), seed=st.integers(0, 99),
    same_bucket=st.booleans(), count_once=st.booleans(),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_fast_attention_equals_the_plain_one(T, c, R, n, seed, same_bucket, count_once):
    """Any length, any chunk: values and gradients, of keys apart from queries too."""
    (q, v), buckets = vectors(T, seed=seed), buckets_of(R, T, n, seed=seed)
    k, how = F.normalize(vectors(T, seed=seed + 1)[0].detach(), dim=-1).requires_grad_(), Settings(c, R, same_bucket, count_once)
    fast, plain = (attend(q, k, v, buckets, how) for attend in (fast_attention, lsh_attention))
    torch.testing.assert_close(fast, plain, **EXACT)
    direction = torch.randn(fast.shape, generator=torch.Generator().manual_seed(1), dtype=fast.dtype)
    for mine, right in zip(*(torch.autograd.grad(out, (q, k, v), direction) for out in (fast, plain))):
        torch.testing.assert_close(mine, right, **EXACT)


@pytest.mark.parametrize("work", [once, several])
@pytest.mark.parametrize("kw", [{}, {"dropout": 0.4}, {"reversible": False, "dropout": 0.4}, {"same_bucket": False, "count_once": False}])
def test_a_fast_model_equals_the_plain_one(kw, work):
    """Logits and every gradient, in training mode, at odd lengths, with two forwards before a backward."""
    plain = make(**kw)
    fast = speed_up(copy.deepcopy(plain))
    for T in (9, 30, 39):
        logits = []
        for model in (plain, fast):
            torch.manual_seed(T)
            logits.append(model(tokens(2, T))[0])
        torch.testing.assert_close(*logits, **EXACT)
    for mine, right in zip(gradients(fast, work), gradients(plain, work)):
        torch.testing.assert_close(mine, right, **EXACT)


def test_a_fast_model_under_autocast_is_as_near_as_the_plain_one():
    plain = make(dropout=0.1).float()
    for mine, right in zip(gradients(speed_up(copy.deepcopy(plain)), autocast), gradients(plain, autocast)):
        assert (mine - right).norm() < 0.006 * right.norm()


def test_a_fast_model_is_looked_into_saved_and_copied_like_a_plain_one():
    plain = make()
    fast = speed_up(copy.deepcopy(plain))
    torch.testing.assert_close(look(plain, tokens(2, 30)), look(fast, tokens(2, 30)), **EXACT)
    assert fast.state_dict().keys() == plain.state_dict().keys()
    assert copy.deepcopy(fast).blocks[0].attend is fast_attention and plain.blocks[0].attend is lsh_attention
    assert speed_up(fast) is fast


def test_hooks_and_hashes_of_ones_own_go_on_working():
    plain, fast = make().eval(), speed_up(make()).eval()
    before = fast(tokens(2, 30))[0]
    for model in (plain, fast):
        model.blocks[0].query_value.register_forward_hook(lambda m, args, out: 2 * out)
        model.blocks[2].hash = lambda q, seed: torch.arange(q.size(2)).expand(2, *q.shape[:3]) % 7
    torch.testing.assert_close(fast(tokens(2, 30))[0], plain(tokens(2, 30))[0], **EXACT)
    assert not torch.allclose(fast(tokens(2, 30))[0], before)


def test_what_is_not_plain_is_refused():
    class Other(LSHAttention):
        def forward(self, x, buckets=None):
            return x, None

    with pytest.raises(ValueError, match="takes a Reformer, not a VanillaTransformer"):
        speed_up(VanillaTransformer(11, d_model=16, n_heads=2, n_layers=1, d_ff=16))
    model = make()
    model.blocks[2] = Other(16, 2, model.settings)
    with pytest.raises(ValueError, match="layer 1 is a Other, not a plain LSHAttention"):
        speed_up(model)
    assert model.blocks[0].attend is lsh_attention  # all or nothing
    model.blocks[2] = torch.nn.Linear(16, 16)
    with pytest.raises(ValueError, match="layer 1 is a Linear"):
        speed_up(model)
    model = make()
    model.blocks[0].forward = lambda x, buckets=None: (x, None)
    with pytest.raises(ValueError, match="layer 0 has a forward of its own"):
        speed_up(model)
    model = make()
    model.blocks[4].attend = lambda q, k, v, buckets, settings: v
    with pytest.raises(ValueError, match="layer 2 attends in a way of its own"):
        speed_up(model)


def test_what_cannot_be_attended_is_refused_as_the_plain_way_does():
    q, v = vectors(9)
    for given_buckets, message in [(buckets_of(2, 8, 3), "buckets"), (buckets_of(2, 9, 3).float(), "pass integers")]:
        with pytest.raises(ValueError, match=message):
            fast_attention(q, q, v, given_buckets, Settings(3))


@pytest.mark.parametrize("count_once", [True, False])
def test_slabs_change_nothing(monkeypatch, count_once):
    (q, v), buckets = vectors(40), buckets_of(2, 40, 5)
    whole = attend(q, v, buckets, 4, count_once=count_once)
    gradient = torch.autograd.grad(whole.square().sum(), (q, v))
    monkeypatch.setattr(fast_lsh, "PAIRS", 3 * 32)  # 3 chunks at a time, out of 40
    parts = attend(q, v, buckets, 4, count_once=count_once)
    torch.testing.assert_close(parts, whole)
    torch.testing.assert_close(torch.autograd.grad(parts.square().sum(), (q, v)), gradient)


def test_who_is_alone_looks_at_itself():
    for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        q, v = vectors(8, dtype=dtype)
        out = attend(q, v, torch.arange(8).expand(2, 2, 2, 8), 2)
        torch.testing.assert_close(out, v)


@given(T=st.integers(1, 30), c=st.integers(1, 8), n=st.integers(1, 5))
@settings(max_examples=30, deadline=None)
def test_codes_say_who_is_in_whose_set(T, c, n):
    buckets = buckets_of(2, T, n)
    order, code = sort_and_code(buckets, c)
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
    out = attend(q, v, torch.zeros(1, 1, 1, T), 8)[:, :, :8]
    torch.testing.assert_close(out, attend(q[:, :, :8], v[:, :, :8], torch.zeros(1, 1, 1, 8), 8))
