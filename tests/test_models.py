"""What every model of the house promises: the protocol, causality, memory that is fixed in size and detached."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from memtx_minimal import fast_feedback
from memtx_minimal.compressive_transformer import CompressiveTransformer
from memtx_minimal.fast_lsh import speed_up
from memtx_minimal.feedback_transformer import FeedbackTransformer
from memtx_minimal.memory_today import MemoryToday
from memtx_minimal.reformer import Reformer
from memtx_minimal.transformer_xl import TransformerXL
from memtx_minimal.vanilla_transformer import VanillaTransformer

SMALL = dict(vocab_size=11, d_model=16, n_heads=2, n_layers=3, d_ff=32)
COMPRESSED = dict(mem_len=4, compressed_len=3, compression_rate=2)
POOLED = dict(kind="pooled", mem_len=4, compressed_len=2, compression_rate=2)
MODELS = {
    "vanilla": lambda **kw: VanillaTransformer(**SMALL, max_len=24, **kw),
    "xl": lambda **kw: TransformerXL(**SMALL, mem_len=6, **kw),
    "xl same_length": lambda **kw: TransformerXL(**SMALL, mem_len=6, same_length=True, **kw),
    "xl clamp_len": lambda **kw: TransformerXL(**SMALL, mem_len=6, clamp_len=4, **kw),
    "feedback": lambda **kw: FeedbackTransformer(**SMALL, mem_len=6, **kw),
    "feedback, fast": lambda **kw: fast_feedback.FastFeedbackTransformer(**SMALL, mem_len=6, **kw),
    "feedback per layer": lambda **kw: FeedbackTransformer(**SMALL, mem_len=6, shared_kv=False, **kw),
    "xl without memory": lambda **kw: TransformerXL(**SMALL, mem_len=0, **kw),
    "compressive": lambda **kw: CompressiveTransformer(**SMALL, **COMPRESSED, **kw),
    "compressive mean": lambda **kw: CompressiveTransformer(
        **SMALL, **COMPRESSED, compression="mean", loss=None, **kw
    ),
    "reformer short": lambda **kw: Reformer(**SMALL, chunk_len=12, axial_shape=(4, 6), **kw),
    "reformer hashed": lambda **kw: Reformer(**SMALL, chunk_len=2, axial_shape=(4, 6), **kw),
    "reformer hashed fast": lambda **kw: speed_up(Reformer(**SMALL, chunk_len=2, axial_shape=(4, 6), **kw)),
    "cache": lambda **kw: MemoryToday(**SMALL, kind="cache", mem_len=6, **kw),
    "cache used": lambda **kw: MemoryToday(**SMALL, kind="cache", mem_len=6, n_sinks=1, n_used=2, **kw),
    "pooled": lambda **kw: MemoryToday(**SMALL, **POOLED, **kw),
    "pooled top_k": lambda **kw: MemoryToday(**SMALL, **POOLED, top_k=1, **kw),
    "delta": lambda **kw: MemoryToday(**SMALL, kind="delta", strength=2.0, **kw),
    "delta looped": lambda **kw: MemoryToday(**SMALL, kind="delta", n_loops=2, **kw),
}


@pytest.fixture(params=MODELS)
def model(request):
    """A model in float64 whose every parameter is random, biases u and v included."""
    torch.manual_seed(0)
    model = MODELS[request.param]().double().eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def tokens(B, T, seed=1):
    return torch.randint(11, (B, T), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def read(model, text, segment_len):
    """Logits of a text (B, N), read segment by segment with memory; the memory after it."""
    memory, logits = None, []
    for segment in text.split(segment_len, dim=1):
        out, memory, *_ = model(segment, memory)
        logits.append(out)
    return torch.cat(logits, dim=1), memory


def test_protocol(model):
    logits, memory, *aux = model(tokens(3, 8))
    assert logits.shape == (3, 8, 11) and all(loss.shape == () for loss in aux)
    logits, memory, *aux = model(tokens(3, 8, seed=2), memory)
    assert logits.shape == (3, 8, 11)


@given(changed=st.integers(1, 19), segment_len=st.integers(1, 20))
@settings(max_examples=20, deadline=None)
@pytest.mark.parametrize("name", MODELS)
def test_a_changed_token_leaves_past_logits_untouched(name, changed, segment_len):
    torch.manual_seed(0)
    model = MODELS[name]().double().eval()
    if name.startswith("reformer hashed"):  # a bucket is a choice made of the content: what holds, holds for given buckets
        for attention in model.blocks[::2]:
            attention.hash = lambda q, seed: torch.arange(q.size(2)).expand(2, *q.shape[:3]) * 5 % 7
    text = tokens(2, 20)
    other = text.clone()
    other[:, changed] = (other[:, changed] + 1) % 11
    before, after = read(model, text, segment_len)[0], read(model, other, segment_len)[0]
    assert torch.equal(before[:, :changed], after[:, :changed])
    assert not torch.allclose(before[:, changed], after[:, changed])


def test_every_parameter_learns_and_none_stops(model):
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    memory = None
    for step in range(5):
        text = tokens(4, 9, seed=step)
        logits, memory, *aux = model(text[:, :-1], memory)
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), text[:, 1:].flatten())
        loss = sum(aux, loss)
        optimizer.zero_grad()
        loss.backward()
        for name, parameter in model.named_parameters():
            assert parameter.requires_grad, name
            assert parameter.grad.abs().sum() > 0, name
        optimizer.step()


def test_batch_rows_do_not_see_each_other(model):
    text = tokens(3, 20)
    alone = torch.cat([read(model, row[None], 5)[0] for row in text])
    torch.testing.assert_close(read(model, text, 5)[0], alone)


def test_dropout_is_silent_in_evaluation():
    for name, make in MODELS.items():
        if name == "feedback, fast":
            continue  # refuses dropout at work
        model = make(dropout=0.5)
        text = tokens(2, 8)
        assert not torch.equal(model(text)[0], model(text)[0])
        model.eval()
        assert torch.equal(model(text)[0], model(text)[0])


@pytest.mark.parametrize(
    "cls", [VanillaTransformer, TransformerXL, CompressiveTransformer, Reformer, MemoryToday]
)
def test_head_sizes_that_do_not_fit_are_refused(cls):
    with pytest.raises(ValueError, match="multiple of n_heads=3"):
        cls(vocab_size=11, d_model=20, n_heads=3)


def test_vanilla_refuses_windows_longer_than_max_len():
    with pytest.raises(ValueError, match="pass 1 to 24"):
        MODELS["vanilla"]()(tokens(1, 25))


def test_bfloat16_gives_finite_numbers(model):
    model = model.to(torch.bfloat16).train()
    _, memory, *_ = model(tokens(2, 8))
    logits, _, *aux = model(tokens(2, 8, seed=2), memory)
    sum(aux, logits.float().logsumexp(-1).sum()).backward()
    assert logits.isfinite().all()
    assert all(p.grad.isfinite().all() for p in model.parameters())
