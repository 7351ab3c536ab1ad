"""What the Feedback Transformer promises (Fan et al. 2020): its memory, and three ways to the same numbers."""

import copy
import math
from collections import Counter
from itertools import permutations

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from memtx_minimal import feedback_transformer as module
from memtx_minimal.feedback_segment import BLOCK, Segment
from memtx_minimal.feedback_transformer import ROOM, FeedbackTransformer, start_from_parallel
from memtx_minimal.measure import bytes_for_backward, kept_alive, record_attention
from memtx_minimal.vanilla_transformer import VanillaTransformer
from test_models import SMALL, read, tokens


def make(**kw):
    torch.manual_seed(0)
    model = FeedbackTransformer(**SMALL | dict(mem_len=6) | kw).double().eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def by_the_paper(model, text):
    """Logits (B, N, vocab) by the formulas, with loops: every step projects all of memory again, in every layer."""
    vectors, logits = [], []
    mix = model.memory.layer_weights.exp() / model.memory.layer_weights.exp().sum()
    for t in range(text.size(1)):
        x = model.embedding(text[:, t])  # (B, d_model)
        states = [x]
        for n, layer in enumerate(model.layers):
            W = model.memory.key_value.weight.view(-1, 2, x.size(1), x.size(1))
            W_k, W_v = W[n % len(W)]
            visible = vectors[-model.mem_len :]
            H, d_head = layer.n_heads, x.size(1) // layer.n_heads
            q = layer.query(layer.norm_attention(x)).view(-1, H, d_head)
            if visible:
                m = model.memory.norm(torch.stack(visible, dim=1))  # (B, K, d_model)
                k, v = ((m @ w.T).unflatten(-1, (H, d_head)) for w in (W_k, W_v))
                p = torch.stack([model.memory.positions[-age] for age in range(len(visible), 0, -1)])
                scores = torch.einsum("bhd,bjhd->bhj", q, k) + torch.einsum("bhd,jd->bhj", q, p)
                weights = (scores / math.sqrt(d_head)).softmax(-1)
                x = x + layer.out(torch.einsum("bhj,bjhd->bhd", weights, v).flatten(1))
            x = x + layer.feed_forward(layer.norm_feed_forward(x))
            states.append(x)
        vectors.append(sum(w * state for w, state in zip(mix, states)))
        logits.append(model.head(model.norm(x)))
    return torch.stack(logits, dim=1)


def gradients(model, run):
    """Logits and the gradients of all parameters by name; zeros where there is none."""
    model.zero_grad()
    logits = run()
    logits.logsumexp(-1).square().sum().backward()
    grads = {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}
    return logits.detach(), grads


def assert_same(a, b):
    torch.testing.assert_close(a[0], b[0], rtol=1e-9, atol=1e-10)
    for name in a[1]:
        torch.testing.assert_close(a[1][name], b[1][name], rtol=1e-9, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}")


# ------------------------------------------------------------------ the model of the paper


@pytest.mark.parametrize("shared_kv", [True, False])
@pytest.mark.parametrize("by_hand", [True, False])
@pytest.mark.parametrize("N", [1, 2, 5, 20])
def test_logits_and_gradients_are_those_of_the_formulas(shared_kv, by_hand, N):
    model, text = make(shared_kv=shared_kv, by_hand=by_hand), tokens(2, N)
    plain = gradients(model, lambda: by_the_paper(model, text))
    assert_same(gradients(model, lambda: model(text)[0]), plain)


@torch.no_grad()
def test_a_step_never_attends_to_itself():
    """The state after the token is not in the keys that the token's own step sees: step t has t keys."""
    model = make(by_hand=False, mem_len=9)
    with record_attention(model) as weights:
        model(tokens(2, 9))
    assert [w.shape for w in weights] == [(2, 2, 1, t) for t in range(9) for _ in model.layers]
    for w in weights[3:]:
        torch.testing.assert_close(w.sum(-1), torch.ones(2, 2, 1).double())


@torch.no_grad()
@pytest.mark.parametrize("by_hand", [True, False])
def test_the_first_token_has_nothing_to_attend_to(by_hand):
    """Without memory, attention at step 0 adds nothing: other weights of attention leave its logits."""
    model, text = make(by_hand=by_hand), tokens(2, 4)
    before = model(text)[0]
    for layer in model.layers:
        layer.query.weight.mul_(2), layer.out.weight.mul_(2)
    after = model(text)[0]
    assert torch.equal(before[:, 0], after[:, 0]) and not torch.allclose(before[:, 1], after[:, 1])


@torch.no_grad()
def test_the_lowest_layer_sees_the_highest_of_the_step_before():
    """With memory made of the top layer alone, one layer's output changes what the first layer reads next."""
    model = make(n_layers=2)
    model.memory.layer_weights.copy_(torch.tensor([-1e9, -1e9, 0.0]))
    model.by_hand, states, text = False, [], tokens(1, 2)
    model.layers[0].register_forward_hook(lambda module, args, out: states.append(out))
    model(text)
    model.layers[1].feed_forward[2].weight.mul_(2)
    model(text)
    assert torch.equal(states[0], states[2]) and not torch.allclose(states[1], states[3])


@torch.no_grad()
def test_layer_weights_start_even_and_cover_the_embedding():
    model = FeedbackTransformer(**SMALL)
    states = [torch.full((1, 16), float(n)) for n in range(4)]  # embedding and three layers
    torch.testing.assert_close(model.memory.vector(states), torch.full((1, 16), 1.5))
    assert model.memory.layer_weights.shape == (4,)


@torch.no_grad()
@pytest.mark.parametrize("by_hand", [True, False])
def test_memory_is_normalised_before_it_is_projected(by_hand):
    model, text = make(by_hand=by_hand), tokens(2, 8)
    vectors = torch.randn(2, 6, 16, dtype=torch.float64)
    once, twice = model(text, vectors)[0], model(text, 2 * vectors)[0]
    torch.testing.assert_close(once, twice, rtol=1e-3, atol=1e-4)  # but for the norm's epsilon


@torch.no_grad()
@pytest.mark.parametrize("by_hand", [True, False])
@pytest.mark.parametrize("T", [1, 4])
def test_order_of_memory_matters(by_hand, T):
    model, text = make(by_hand=by_hand), tokens(2, T)
    vectors = torch.randn(2, 6, 16, dtype=torch.float64)
    straight, shuffled = model(text, vectors)[0], model(text, vectors.flip(1))[0]
    assert (straight - shuffled)[:, 0].abs().max() > 1e-3


# ------------------------------------------------------------------ memory from segment to segment


@given(segment_len=st.integers(1, 24), by_hand=st.booleans(), mem_len=st.integers(1, 24))
@settings(max_examples=15, deadline=None)
def test_it_does_not_matter_where_the_text_is_cut(segment_len, by_hand, mem_len):
    """Every step sees the latest mem_len vectors, wherever the segments end: with the cache of no_grad ..."""
    model, text = make(mem_len=mem_len, by_hand=by_hand), tokens(2, 24)
    torch.testing.assert_close(read(model, text, segment_len)[0], read(model, text, 24)[0])


@pytest.mark.parametrize("segment_len", [1, 5, 24])
@pytest.mark.parametrize("shared_kv", [True, False])
def test_vectors_and_cache_are_the_same_memory(segment_len, shared_kv):
    """... and with vectors whose keys and values are computed again, as in training."""
    model, text = make(shared_kv=shared_kv), tokens(2, 24)
    memory, logits = None, []
    for segment in text.split(segment_len, dim=1):
        out, memory = model(segment, memory)
        logits.append(out.detach())
    assert memory.shape == (2, 6, 16)
    torch.testing.assert_close(torch.cat(logits, dim=1), read(model, text, segment_len)[0])
    with torch.no_grad():
        more = tokens(2, 3, seed=2)
        torch.testing.assert_close(model(more, memory)[0], model(more, read(model, text, 4)[1])[0])


@pytest.mark.parametrize("mem_len", [1, 3, 4, 5, 50])
@pytest.mark.parametrize("shared_kv", [True, False])
def test_memory_grows_to_mem_len_and_stays_there(mem_len, shared_kv):
    model, vectors, cache = make(mem_len=mem_len, shared_kv=shared_kv), None, None
    n_kv = 1 if shared_kv else 3
    for seen in range(4, 64, 4):
        _, vectors = model(tokens(2, 4), vectors)
        with torch.no_grad():
            _, cache = model(tokens(2, 4), cache)
        M = min(mem_len, seen)
        assert vectors.shape == (2, M, 16) and kept_alive(vectors) == 2 * M * 16 * 8  # no view of more
        assert cache.latest(mem_len).shape == (n_kv, 2, 2, 2, M, 8)
        assert kept_alive(cache) <= n_kv * 2 * 2 * (max(M, 4) + ROOM * (seen > 4)) * 16 * 8  # a first text just fits


@torch.no_grad()
@given(pieces=st.lists(st.integers(1, 70), min_size=2, max_size=6), mem_len=st.integers(1, 9))
@example(pieces=[3, 1, 1, 1, 1], mem_len=6)
@settings(max_examples=15, deadline=None)
def test_what_a_cache_holds_never_changes(pieces, mem_len):
    """Every memory on the way may be gone on from again, and again, by any text."""
    model, memories, logits = make(mem_len=mem_len), [None], []
    for n, T in enumerate(pieces):
        out, memory = model(tokens(2, T, seed=n), memories[-1])
        memories.append(memory)
        logits.append(out)
    held = [memory.latest(mem_len).clone() for memory in memories[1:]]
    for memory in memories:
        model(tokens(2, 2, seed=99), memory)  # another text goes on from here, and writes
    for memory, kv in zip(memories[1:], held):
        assert torch.equal(memory.latest(mem_len), kv)
    for n, (memory, T) in enumerate(zip(memories, pieces)):
        torch.testing.assert_close(model(tokens(2, T, seed=n), memory)[0], logits[n])


@torch.no_grad()
@pytest.mark.parametrize("by_hand", [True, False])
@pytest.mark.parametrize("T", [1, 30, 100, 300])
def test_a_cache_holds_little_more_than_mem_len(by_hand, T):
    model, memory = make(by_hand=by_hand), None
    for n in range(3):
        _, memory = model(tokens(2, T, seed=n), memory)
        assert memory.kv.size(-2) <= model.mem_len + ROOM
        assert kept_alive(memory) == kept_alive(memory.kv.clone())  # and no view of more


@torch.no_grad()
def test_generation_writes_in_place():
    """Token by token the cache moves once in ROOM tokens, and its size has a bound."""
    model, memory, places = make(), None, []
    for n in range(5 * ROOM):
        _, memory = model(tokens(2, 1, seed=n), memory)
        places.append(memory.kv.data_ptr())
        assert memory.kv.size(-2) <= model.mem_len + ROOM
    assert sum(a != b for a, b in zip(places, places[1:])) <= 6


class Operations(TorchDispatchMode):
    """Counts the operations that move or compute numbers, and the numbers that they return."""

    def __init__(self):
        super().__init__()
        self.count, self.returned = Counter(), Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if not func.is_view:
            self.count[func] += 1
            self.returned[func] += sum(t.numel() for t in tree_leaves(result) if isinstance(t, torch.Tensor))
        return result


@torch.no_grad()
def test_a_token_costs_the_same_at_any_depth():
    """Every token takes the same operations. What they return grows in attention alone, until memory is full."""
    model, cost = make(mem_len=200), {}
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
    model, text = make(), tokens(2, 9)
    _, memory = model(text[:, :4])
    expected, _ = model(text[:, 4:], memory)
    with torch.inference_mode(False), torch.no_grad():
        torch.testing.assert_close(model(text[:, 4:], memory)[0], expected)


@pytest.mark.parametrize("by_hand", [True, False])
def test_no_graph_survives_a_segment(by_hand):
    model, memory = make(by_hand=by_hand).train(), None
    for _ in range(3):
        logits, memory = model(tokens(2, 4), memory)
        assert not memory.requires_grad and memory.grad_fn is None
    logits.sum().backward()  # would fail if it led into the earlier, freed graphs


@pytest.mark.parametrize("by_hand", [True, False])
def test_keys_and_values_learn_from_memory(by_hand):
    """One token alone leaves no keys that anybody reads: what the projection learns, it learns from memory."""
    model = make(by_hand=by_hand)
    model(tokens(2, 1), torch.randn(2, 6, 16).double())[0].logsumexp(-1).sum().backward()
    assert model.memory.key_value.weight.grad.abs().sum() > 0 and model.memory.norm.weight.grad.abs().sum() > 0


@torch.no_grad()
def test_mem_len_may_be_lowered():
    model, text = make(mem_len=6), tokens(2, 24)
    model.mem_len = 3
    small = make(mem_len=3)
    state = model.state_dict()
    state["memory.positions"] = state["memory.positions"][-3:]
    small.load_state_dict(state)
    torch.testing.assert_close(read(model, text, 5)[0], read(small, text, 5)[0])
    assert read(model, text, 5)[1].kv.size(-2) <= 3 + ROOM


# ------------------------------------------------------------------ three ways, one gradient


@given(T=st.integers(1, 2 * BLOCK + 3), M=st.integers(0, 9), mem_len=st.integers(1, 40))
@example(T=2 * BLOCK + 3, M=9, mem_len=40)  # slots that several blocks look back at
@settings(max_examples=15, deadline=None)
def test_by_hand_is_autograd_to_rounding(T, M, mem_len):
    model, text = make(mem_len=mem_len), tokens(2, T)
    vectors = torch.randn(2, min(M, mem_len), 16, dtype=torch.float64)

    def run(by_hand):
        model.by_hand = by_hand
        return gradients(model, lambda: model(text, vectors)[0])

    assert_same(run(True), run(False))


def test_layers_that_share_collect_the_gradients_of_layers_that_do_not():
    one, text = make(), tokens(2, 12)
    each = make(shared_kv=False)
    state = one.state_dict()
    state["memory.key_value.weight"] = state["memory.key_value.weight"].repeat(3, 1)
    each.load_state_dict(state)
    a, b = gradients(one, lambda: one(text)[0]), gradients(each, lambda: each(text)[0])
    b[1]["memory.key_value.weight"] = b[1]["memory.key_value.weight"].unflatten(0, (3, -1)).sum(0)
    assert_same(a, b)


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

    model, text = make().float(), tokens(2, 20)
    memory = model(text)[1]
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(text, memory)[0].float().square().mean()
    loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())
    torch.testing.assert_close(loss, model(text, memory)[0].square().mean(), rtol=0.02, atol=0)

    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        cache = model(text, memory)[1]
        logits = model(text, cache)[0]
    assert cache.kv.dtype == torch.float32 and logits.isfinite().all()


def test_memory_vectors_carry_no_gradient_out_of_the_segment():
    outputs, vectors = Segment.apply(*arguments())
    assert outputs.requires_grad and not vectors.requires_grad


def test_a_second_derivative_is_refused():
    leaves = arguments()
    (grad,) = torch.autograd.grad(Segment.apply(*leaves)[0].square().sum(), leaves[0], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_several_forwards_before_a_backward_in_any_order():
    model = make()
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
    model, text = make(), tokens(2, 18)
    loss = model(text)[0].logsumexp(-1).square().sum()
    once = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
    twice = torch.autograd.grad(loss, list(model.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(once, twice))
    both = model(text)[0].logsumexp(-1).square().sum() + model(text)[0].logsumexp(-1).square().sum()
    for a, b in zip(once, torch.autograd.grad(both, list(model.parameters()))):
        torch.testing.assert_close(2 * a, b)


def test_no_grad_between_forward_and_backward_changes_nothing():
    model, text = make(), tokens(2, 18)
    _, grads = gradients(model, lambda: model(text)[0])
    loss = model(text)[0].logsumexp(-1).square().sum()
    with torch.no_grad():
        a, b = (model(tokens(2, 18, seed=3))[0] for _ in range(2))
    model.zero_grad()
    loss.backward()
    assert torch.equal(a, b) and not a.requires_grad
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, grads[name])


def test_dropout_at_work_takes_the_loop():
    """Dropout is in the loop alone; in evaluation by hand again."""
    model, text = make(dropout=0.5).train(), tokens(2, 8)
    torch.manual_seed(1)
    fast = gradients(model, lambda: model(text)[0])
    model.by_hand = False
    torch.manual_seed(1)
    assert_same(gradients(model, lambda: model(text)[0]), fast)


@pytest.mark.parametrize(
    "dropout, training, shared_kv, by_hand, way",
    [
        (0.0, True, True, True, "hand"),
        (0.5, False, True, True, "hand"),
        (0.5, True, True, True, "loop"),
        (0.0, True, False, True, "loop"),
        (0.0, True, True, False, "loop"),
    ],
)
def test_by_hand_wherever_it_applies(monkeypatch, dropout, training, shared_kv, by_hand, way):
    """The numbers are the same either way, so only the calls tell."""
    calls = []
    for name in ("loop", "run", "segment"):
        original = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *args, name=name, f=original: (calls.append(name), f(*args))[1])
    model = make(dropout=dropout, shared_kv=shared_kv, by_hand=by_hand).train(training)
    model(tokens(2, 3))
    with torch.no_grad():
        model(tokens(2, 3))
    assert calls == {"hand": ["segment", "run"], "loop": ["loop", "loop"]}[way]


@pytest.mark.parametrize("by_hand", [True, False])
def test_kept_for_backward_grows_evenly_with_the_segment(by_hand):
    """A step keeps what it sees, mem_len slots at most, and nothing of the slots that it does not see."""
    model = make(by_hand=by_hand)
    memory = model(tokens(2, 6))[1]
    kept = [bytes_for_backward(model, lambda T=T: model(tokens(2, T), memory)[0].sum()) for T in (8, 16, 24)]
    assert kept[2] - kept[1] == kept[1] - kept[0]


def test_a_frozen_part_gets_no_gradient_and_changes_no_other():
    model, text = make(), tokens(2, 8)
    _, grads = gradients(model, lambda: model(text)[0])
    model.layers[1].requires_grad_(False)
    _, frozen = gradients(model, lambda: model(text)[0])
    for name in grads:
        expected = torch.zeros_like(grads[name]) if name.startswith("layers.1.") else grads[name]
        torch.testing.assert_close(frozen[name], expected)


# ------------------------------------------------------------------ training aids


def test_starting_from_a_parallel_transformer_maps_every_weight(monkeypatch):
    """One layer, memory of the embedding alone, no positions: then Feedback is vanilla that cannot see itself."""
    torch.manual_seed(0)
    vanilla = VanillaTransformer(**SMALL | dict(n_layers=1), max_len=12).double()
    for p in vanilla.parameters():
        torch.nn.init.normal_(p, std=0.3)
    torch.nn.init.zeros_(vanilla.layers[0].norm_attention.bias)
    nowhere = lambda positions, d_model: torch.zeros(len(positions), d_model)  # noqa: E731
    monkeypatch.setattr("memtx_minimal.vanilla_transformer.sinusoid", nowhere)
    for shared_kv in (True, False):
        model = make(n_layers=1, mem_len=12, shared_kv=shared_kv)
        start_from_parallel(model, vanilla)
        with torch.no_grad():
            model.memory.layer_weights.copy_(torch.tensor([0.0, -1e9]))
            model.memory.positions.zero_()
        text = tokens(2, 12)
        layer = vanilla.layers[0]
        x = vanilla.embedding(text)
        q, k, v = layer.attention.query_key_value(layer.norm_attention(x)).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
        scores = q @ k.mT / 8**0.5 + torch.full((12, 12), -math.inf).triu()
        heads = (scores.softmax(-1).nan_to_num() @ v).transpose(1, 2).flatten(2)
        x = x + layer.attention.out(heads)
        x = x + layer.feed_forward(layer.norm_feed_forward(x))
        torch.testing.assert_close(model(text)[0], vanilla.head(vanilla.norm(x)))


def test_starting_from_a_parallel_transformer_keeps_layers_apart():
    torch.manual_seed(0)
    vanilla, model = VanillaTransformer(**SMALL).double(), make(shared_kv=False)
    fresh = copy.deepcopy(model.memory)
    start_from_parallel(model, vanilla)
    for theirs, ours in zip(vanilla.layers, model.layers):
        assert torch.equal(theirs.attention.query_key_value.weight[:16], ours.query.weight)
        assert torch.equal(theirs.feed_forward[2].weight, ours.feed_forward[2].weight)
    W = model.memory.key_value.weight.view(3, 2, 16, 16)
    for n, layer in enumerate(vanilla.layers):
        assert torch.equal(W[n].flatten(0, 1), layer.attention.query_key_value.weight[16:])
    assert torch.equal(model.memory.positions, fresh.positions)  # nothing in vanilla is like these


@pytest.mark.parametrize(
    "other, message",
    [
        (dict(n_layers=2), "n_layers: 2 here, 3 in vanilla"),
        (dict(n_heads=4), "n_heads: 4 here, 2 in vanilla"),
        (dict(d_ff=48), "d_ff: 48 here, 32 in vanilla"),
        (dict(vocab_size=12), "vocab_size, d_model: .12, 16. here, .11, 16. in vanilla"),
    ],
)
def test_weights_of_another_size_are_refused_and_nothing_is_copied(other, message):
    vanilla, model = VanillaTransformer(**SMALL).double(), make(**other)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=message):
        start_from_parallel(model, vanilla)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


# ------------------------------------------------------------------ errors


def test_invalid_arguments_are_refused_early():
    with pytest.raises(ValueError, match="mem_len=0 is not a number >= 1"):
        make(mem_len=0)
    with pytest.raises(ValueError, match="d_model=16 is not a multiple of n_heads=3"):
        make(n_heads=3)
    model = make()
    _, memory = model(tokens(2, 4))
    with pytest.raises(ValueError, match="memory of 2 streams, tokens of 3"):
        model(tokens(3, 4), memory)
    with torch.no_grad():
        _, cache = model(tokens(2, 4))
        with pytest.raises(ValueError, match="memory of 2 streams, tokens of 3"):
            model(tokens(3, 4), cache)
    with pytest.raises(ValueError, match="start with None"):
        model(tokens(2, 4), cache)
    model.mem_len = 7
    with pytest.raises(ValueError, match="mem_len=7 is not a number in 1 ... 6"):
        model(tokens(2, 4))


def test_a_saved_cache_loads_with_weights_alone(tmp_path):
    """Fault 11: no code is run to read a memory back."""
    model = make().eval()
    with torch.no_grad():
        _, cache = model(tokens(2, 4))
        torch.save(cache, tmp_path / "cache.pt")
        again = torch.load(tmp_path / "cache.pt", weights_only=True)
        expected = model(tokens(2, 4, seed=2), cache)[0]
        assert torch.equal(model(tokens(2, 4, seed=2), again)[0], expected)
