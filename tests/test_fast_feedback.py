"""Appendix A: the fast way gives the numbers of the plain one, or refuses."""

import copy
import io
from itertools import permutations

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import prune

from memtx_minimal import training
from memtx_minimal.fast_feedback import BLOCK, ROOM, CachedInPlace, FastFeedbackTransformer, Segment, check_plain, speed_up
from memtx_minimal.feedback_transformer import Cached, FeedbackTransformer, Layer
from memtx_minimal.measure import bytes_for_backward, nbytes
from test_feedback_transformer import Operations, assert_same, gradients, make
from test_models import SMALL, read, tokens


def both(**kw):
    """The same model twice: plain, and fast."""
    plain = make(**kw)
    return plain, speed_up(copy.deepcopy(plain))


# ------------------------------------------------------------------ the same numbers


@given(T=st.integers(1, 2 * BLOCK + 3), M=st.integers(0, 9), mem_len=st.integers(1, 40), n_layers=st.integers(1, 3))
@example(T=2 * BLOCK + 3, M=9, mem_len=40, n_layers=2)  # slots that several blocks look back at
@settings(max_examples=20, deadline=None)
def test_logits_memory_and_gradients_are_those_of_the_plain_loop(T, M, mem_len, n_layers):
    plain, fast = both(mem_len=mem_len, n_layers=n_layers)
    text, vectors = tokens(2, T), torch.randn(2, min(M, mem_len), 16, dtype=torch.float64)
    assert_same(gradients(fast, lambda: fast(text, vectors)[0]), gradients(plain, lambda: plain(text, vectors)[0]))
    torch.testing.assert_close(fast(text, vectors)[1], plain(text, vectors)[1], rtol=1e-9, atol=1e-10)


def test_segments_with_memory():
    (plain, fast), memories = both(), [None, None]
    for n, T in enumerate((5, 1, 18, 7)):
        for i, model in enumerate((plain, fast)):
            model.zero_grad()
            logits, memories[i] = model(tokens(2, T, seed=n), memories[i])
            logits.logsumexp(-1).square().sum().backward()
        torch.testing.assert_close(*memories, rtol=1e-9, atol=1e-10)
        for p, q in zip(plain.parameters(), fast.parameters()):
            grads = [torch.zeros_like(p) if g is None else g for g in (p.grad, q.grad)]
            torch.testing.assert_close(*grads, rtol=1e-9, atol=1e-10)
        assert not memories[1].requires_grad and memories[1].grad_fn is None


def test_mem_len_may_be_lowered():
    plain, fast = both(mem_len=6)
    plain.mem_len = fast.mem_len = 3
    text, vectors = tokens(2, 20), torch.randn(2, 6, 16).double()
    assert_same(gradients(fast, lambda: fast(text, vectors)[0]), gradients(plain, lambda: plain(text, vectors)[0]))


def test_under_autocast():
    """Autocast leaves float64 alone, so both are equal; in float32 the fast way computes in float32."""
    plain, fast = both()
    text, memory = tokens(2, 20), torch.randn(2, 6, 16).double()
    with torch.autocast("cpu", torch.bfloat16):
        a = gradients(fast, lambda: fast(text, memory)[0])
        b = gradients(plain, lambda: plain(text, memory)[0])
    assert_same(a, b)
    plain, fast, memory = plain.float(), fast.float(), memory.float()
    with torch.autocast("cpu", torch.bfloat16):
        a = gradients(fast, lambda: fast(text, memory)[0].float())
    b = gradients(plain, lambda: plain(text, memory)[0])
    torch.testing.assert_close(a[0], b[0], rtol=0.05, atol=0.05)  # the head is in bfloat16
    assert all(grad.isfinite().all() for grad in a[1].values())


def arguments(T=3, M=2, mem_len=4, L=2, d_model=4, H=2, d_ff=5):
    """Random arguments of Segment in float64; layer weights shared out as the model does."""
    generator = torch.Generator().manual_seed(0)

    def new(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).mul_(0.6).requires_grad_()

    d_head = d_model // H
    norm, square = 2 * [(d_model,)], (d_model, d_model)
    layer = [*norm, square, square, *norm, (d_ff, d_model), (d_ff,), (d_model, d_ff), (d_model,)]
    sizes = [(2, T, d_model), (2, 2, H, M, d_head), (L + 1,), (mem_len, d_head), *norm, (2 * d_model, d_model)]
    return [new(*size) for size in sizes + L * layer]


@pytest.mark.parametrize("T, M, mem_len", [(1, 2, 4), (4, 0, 4), (4, 2, 3), (3, 5, 2)])
def test_gradcheck(T, M, mem_len):
    torch.autograd.gradcheck(lambda *a: Segment.apply(*a)[0], arguments(T, M, mem_len), fast_mode=True)


def test_gradcheck_entry_by_entry():
    torch.autograd.gradcheck(lambda *a: Segment.apply(*a)[0], arguments(T=2, M=1, mem_len=2, L=1, d_ff=3))


def test_autocast_stays_outside():
    """In mixed precision the segment computes as without it, also from keys that autocast made, forwards and backwards."""

    def outputs_and_gradients(enabled):
        leaves = [a.detach().float().requires_grad_() for a in arguments(T=5)]
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            out = Segment.apply(*leaves)[0]
            return out, *torch.autograd.grad(out.square().sum(), leaves)

    for a, b in zip(outputs_and_gradients(True), outputs_and_gradients(False)):
        assert torch.equal(a, b) and a.dtype == torch.float32


def test_memory_vectors_carry_no_gradient_out_of_the_segment():
    outputs, vectors, slots = Segment.apply(*arguments())
    assert outputs.requires_grad and not vectors.requires_grad and not slots.requires_grad


def test_a_second_derivative_is_refused():
    leaves = arguments()
    (grad,) = torch.autograd.grad(Segment.apply(*leaves)[0].square().sum(), leaves[0], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_several_forwards_before_a_backward_in_any_order():
    model = both()[1]
    texts = tokens(2, 18), tokens(2, 7, seed=2), tokens(2, 18, seed=3)  # one length twice
    alone = [gradients(model, lambda text=text: model(text)[0])[1] for text in texts]
    for order in permutations(range(3)):
        losses = [model(text)[0].logsumexp(-1).square().sum() for text in texts]
        for n in order:
            model.zero_grad()
            losses[n].backward()
            for name, p in model.named_parameters():
                torch.testing.assert_close(p.grad, alone[n][name])


def test_a_backward_may_be_repeated_and_summed():
    model, text = both()[1], tokens(2, 18)
    loss = model(text)[0].logsumexp(-1).square().sum()
    once = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
    twice = torch.autograd.grad(loss, list(model.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(once, twice))
    summed = model(text)[0].logsumexp(-1).square().sum() + model(text)[0].logsumexp(-1).square().sum()
    for a, b in zip(once, torch.autograd.grad(summed, list(model.parameters()))):
        torch.testing.assert_close(2 * a, b)


def test_no_grad_between_forward_and_backward_changes_nothing():
    model, text = both()[1], tokens(2, 18)
    _, grads = gradients(model, lambda: model(text)[0])
    loss = model(text)[0].logsumexp(-1).square().sum()
    with torch.no_grad():
        a, b = (model(tokens(2, 18, seed=3))[0] for _ in range(2))
    model.zero_grad()
    loss.backward()
    assert torch.equal(a, b) and not a.requires_grad
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, grads[name])


def test_a_frozen_part_gets_no_gradient_and_changes_no_other():
    model, text = both()[1], tokens(2, 8)
    _, grads = gradients(model, lambda: model(text)[0])
    model.layers[1].requires_grad_(False)
    _, frozen = gradients(model, lambda: model(text)[0])
    for name in grads:
        expected = torch.zeros_like(grads[name]) if name.startswith("layers.1.") else grads[name]
        torch.testing.assert_close(frozen[name], expected)


def test_kept_for_backward_grows_evenly_with_the_segment():
    model = both()[1]
    memory = model(tokens(2, 6))[1]
    kept = [bytes_for_backward(model, lambda T=T: model(tokens(2, T), memory)[0].sum()) for T in (8, 16, 24)]
    assert kept[2] - kept[1] == kept[1] - kept[0]


def test_a_fast_model_is_copied_saved_and_trained_as_any_other():
    plain, fast = both()
    assert type(copy.deepcopy(fast)) is FastFeedbackTransformer and isinstance(fast, FeedbackTransformer)
    plain.load_state_dict(fast.state_dict())
    histories = [
        training.train(m.float(), tokens(1, 400)[0], steps=3, batch_size=2, segment_len=9, progress=False)["loss"] for m in (plain, fast)
    ]
    torch.testing.assert_close(*map(torch.tensor, histories))


# ------------------------------------------------------------------ what is not plain is refused


class OwnLinear(nn.Linear):
    pass


class OwnTensor(torch.Tensor):
    pass


def adapter(model):
    """As LoRA does it: the layer's projection inside a module that adds to it."""
    layer, old = model.layers[0], model.layers[0].query

    class Adapter(nn.Module):
        def __init__(self):
            super().__init__()
            self.old, self.new = old, nn.Linear(16, 16).double()

        def forward(self, x):
            return self.old(x) + self.new(x)

    layer.query = Adapter()


CHANGES = {
    "another activation": lambda m: m.layers[0].feed_forward.__setitem__(1, nn.GELU()),
    "a bias": lambda m: setattr(m.layers[0], "query", nn.Linear(16, 16).double()),
    "a bias given to a projection": lambda m: setattr(m.layers[0].out, "bias", nn.Parameter(torch.zeros(16))),
    "no bias": lambda m: setattr(m.layers[0].feed_forward[0], "bias", None),
    "another eps": lambda m: setattr(m.layers[0].norm_attention, "eps", 1e-6),
    "another eps of memory": lambda m: setattr(m.memory.norm, "eps", 1e-6),
    "a forward hook": lambda m: m.layers[1].out.register_forward_hook(lambda *a: None),
    "a forward hook with keywords": lambda m: m.layers[1].register_forward_hook(lambda *a: None, with_kwargs=True),
    "a forward pre-hook": lambda m: m.layers[1].dropout.register_forward_pre_hook(lambda *a: None),
    "a backward hook": lambda m: m.layers[1].register_full_backward_hook(lambda *a: None),
    "a backward pre-hook": lambda m: m.memory.norm.register_full_backward_pre_hook(lambda *a: None),
    "an adapter": adapter,
    "an added part": lambda m: m.layers[1].add_module("adapter", nn.Linear(16, 16)),
    "one part less": lambda m: m.layers[1].feed_forward.__delitem__(2),
    "a parametrisation": lambda m: nn.utils.parametrizations.weight_norm(m.layers[1].out),
    "pruning": lambda m: prune.random_unstructured(m.layers[1].out, "weight", amount=0.5),
    "a subclass": lambda m: setattr(m.layers[1], "out", OwnLinear(16, 16, bias=False).double()),
    "a subclass of the layer": lambda m: setattr(m.layers[1], "__class__", type("OwnLayer", (Layer,), {})),
    "a forward of its own": lambda m: setattr(m.layers[1], "forward", lambda x, keys, values: x),
    "an attention of its own": lambda m: setattr(m.layers[1], "attention", lambda x, keys, values: x),
    "a compiled layer": lambda m: m.layers.__setitem__(0, torch.compile(m.layers[0])),
    "a layer compiled in place": lambda m: m.layers[0].compile(),
    "a weight of another kind": lambda m: m.layers[0].query._parameters.update(weight=torch.randn(16, 16).double().as_subclass(OwnTensor)),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_model_is_refused_before_and_after(change):
    """At installation, and at each call: in training, in evaluation, in generation."""
    plain, fast = both()
    writer = CachedInPlace(make())
    for model in (plain, fast, writer.model):
        CHANGES[change](model)
    with pytest.raises(ValueError, match="the fast way does not compute this model: (layers|memory)"):
        speed_up(plain)
    with pytest.raises(ValueError, match="the fast way does not compute this model"):
        CachedInPlace(plain)
    for call in (fast, writer):
        with pytest.raises(ValueError, match="the fast way does not compute this model"):
            call(tokens(2, 3))
    assert type(plain) is FeedbackTransformer


@pytest.mark.filterwarnings("ignore")
def test_quantised_layers_are_refused():
    quantised = torch.ao.quantization.quantize_dynamic(make().float(), {nn.Linear}, dtype=torch.qint8)
    with pytest.raises(ValueError, match="does not compute"):
        speed_up(quantised)


def test_hooks_on_all_modules_are_refused():
    plain, fast = both()
    handle = nn.modules.module.register_module_forward_hook(lambda *a: None)
    try:
        with pytest.raises(ValueError, match="hooks on all modules"):
            fast(tokens(2, 3))
        with pytest.raises(ValueError, match="hooks on all modules"):
            speed_up(plain)
    finally:
        handle.remove()
    fast(tokens(2, 3))


def test_dropout_at_work_is_refused_wherever_it_is():
    model = speed_up(make(dropout=0.5))  # in evaluation there is none
    model(tokens(2, 3))
    model.layers[1].train()
    with pytest.raises(ValueError, match="layers.1.dropout: dropout at work"):
        model(tokens(2, 3))
    with pytest.raises(ValueError, match="dropout at work"):
        speed_up(make(dropout=0.5).train())
    model.eval()
    model.dropout.train()  # of the embedding: outside the loop
    torch.manual_seed(0)
    fast = model(tokens(2, 3))[0]
    model.__class__ = FeedbackTransformer
    torch.manual_seed(0)
    torch.testing.assert_close(model(tokens(2, 3))[0], fast)


def test_other_models_are_refused():
    class Own(FeedbackTransformer):
        def forward(self, tokens, memory=None):
            return super().forward(tokens.flip(1), memory)

    with pytest.raises(ValueError, match="a Own; pass a FeedbackTransformer"):
        speed_up(Own(**SMALL))
    with pytest.raises(ValueError, match="pass a FeedbackTransformer"):
        speed_up(Cached(make()))
    with pytest.raises(ValueError, match="shared_kv=False"):
        speed_up(make(shared_kv=False))
    fast = both()[1]
    assert speed_up(fast) is fast


def test_a_refusal_leaves_the_model_as_it_is_and_names_the_part():
    model = make(n_layers=12)
    model.layers[10].feed_forward[1] = nn.SiLU()
    with pytest.raises(ValueError, match=r"layers.10.feed_forward.1: kind SiLU, not ReLU"):
        speed_up(model)
    assert type(model) is FeedbackTransformer
    model.layers[10].feed_forward[1] = nn.ReLU()
    check_plain(model)


# ------------------------------------------------------------------ the cache that is written in place


@torch.no_grad()
@given(pieces=st.lists(st.integers(1, 70), min_size=2, max_size=6), mem_len=st.integers(1, 9))
@example(pieces=[3, 1, 1, 1, 1], mem_len=6)
@settings(max_examples=15, deadline=None)
def test_what_a_cache_holds_never_changes(pieces, mem_len):
    """Every memory on the way may be gone on from again, and again, by any text."""
    plain = make(mem_len=mem_len)
    model, memories, logits, memory = CachedInPlace(plain), [None], [], None
    for n, T in enumerate(pieces):
        out, new = model(tokens(2, T, seed=n), memories[-1])
        expected, memory = Cached(plain)(tokens(2, T, seed=n), memory)
        torch.testing.assert_close(out, expected)
        memories.append(new)
        logits.append(out)
    held = [memory.latest(mem_len).clone() for memory in memories[1:]]
    for memory in memories:
        model(tokens(2, 2, seed=99), memory)  # another text goes on from here, and writes
    for memory, kv in zip(memories[1:], held):
        assert torch.equal(memory.latest(mem_len), kv)
    for n, (memory, T) in enumerate(zip(memories, pieces)):
        torch.testing.assert_close(model(tokens(2, T, seed=n), memory)[0], logits[n])


@pytest.mark.parametrize("mem_len", [3, 50])
def test_generation_token_by_token_is_that_of_the_plain_model(mem_len):
    model, prompt = make(mem_len=mem_len), tokens(2, 5)
    expected = training.generate(model, prompt, 90)
    assert torch.equal(training.generate(CachedInPlace(model), prompt, 90), expected)
    assert torch.equal(training.generate(Cached(speed_up(model)), prompt, 90), expected)
    text = tokens(2, 30)
    torch.testing.assert_close(read(CachedInPlace(model), text, 1)[0], read(model, text, 30)[0])


@torch.no_grad()
@pytest.mark.parametrize("T", [1, 30, 100, 300])
def test_a_cache_holds_little_more_than_mem_len(T):
    model, memory = CachedInPlace(make()), None
    for n in range(3):
        _, memory = model(tokens(2, T, seed=n), memory)
        assert memory.kv.size(-2) <= 6 + ROOM
        assert nbytes(memory) == nbytes(memory.kv.clone())  # and no view of more


@torch.no_grad()
def test_generation_writes_in_place():
    """Token by token the cache moves once in ROOM tokens, and its size has a bound."""
    model, memory, places = CachedInPlace(make()), None, []
    for n in range(5 * ROOM):
        _, memory = model(tokens(2, 1, seed=n), memory)
        places.append(memory.kv.data_ptr())
        assert memory.kv.size(-2) <= 6 + ROOM
    assert sum(a != b for a, b in zip(places, places[1:])) <= 6


@torch.no_grad()
def test_a_token_costs_the_same_at_any_depth():
    """Every token takes the same operations. What they return grows in attention alone, until memory is full."""
    model, cost = CachedInPlace(make(mem_len=200)), {}
    for depth in (10, 150, 400, 4000):
        _, memory = model(tokens(1, depth))
        _, memory = model(tokens(1, 1), memory)  # moves to slots with room
        with Operations() as cost[depth]:
            model(tokens(1, 1), memory)
    short, long = cost[10], cost[150]
    assert all(short.count == other.count for other in cost.values())
    grown = {op.overloadpacket.__name__ for op in short.returned if short.returned[op] != long.returned[op]}
    assert grown == {"new_empty", "add", "bmm", "softmax"}  # a place for the weights; keys by age, scores, weights
    assert cost[400].returned == cost[4000].returned


@torch.inference_mode()
def test_a_cache_of_inference_mode_goes_on_under_no_grad():
    model, text = CachedInPlace(make()), tokens(2, 9)
    _, memory = model(text[:, :4])
    expected, _ = model(text[:, 4:], memory)
    with torch.inference_mode(False):
        torch.testing.assert_close(model(text[:, 4:], memory)[0], expected)


def test_a_cache_loads_with_weights_only():
    model, buffer = CachedInPlace(make()), io.BytesIO()
    _, memory = model(tokens(2, 9))
    torch.save(memory, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=True)
    torch.testing.assert_close(model(tokens(2, 3), loaded)[0], model(tokens(2, 3), memory)[0])


def test_a_cache_that_does_not_fit_is_refused():
    model = CachedInPlace(make())
    _, memory = model(tokens(2, 4))
    with pytest.raises(ValueError, match="memory of 2 streams, tokens of 3"):
        model(tokens(3, 4), memory)
    with pytest.raises(ValueError, match="pass what this model returned, or None"):
        model(tokens(2, 4), make()(tokens(2, 4))[1])
    with pytest.raises(ValueError, match="in torch.float64, this model computes in torch.float32"):
        model.float()(tokens(2, 4), memory)
