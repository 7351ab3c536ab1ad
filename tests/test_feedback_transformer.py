"""What the Feedback Transformer promises (Fan et al. 2020): the paper's formulas, its memory, and its cache."""

import io
import math
from collections import Counter

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from memtx_minimal import training
from memtx_minimal.feedback_transformer import Cached, FeedbackTransformer
from memtx_minimal.measure import bytes_for_backward, kept_alive, record_attention
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
@pytest.mark.parametrize("N", [1, 2, 5, 20])
def test_logits_and_gradients_are_those_of_the_formulas(shared_kv, N):
    model, text = make(shared_kv=shared_kv), tokens(2, N)
    plain = gradients(model, lambda: by_the_paper(model, text))
    assert_same(gradients(model, lambda: model(text)[0]), plain)


@torch.no_grad()
def test_a_step_never_attends_to_itself():
    """The state after the token is not in the keys that the token's own step sees: step t has t keys."""
    model = make(mem_len=9)
    with record_attention(model) as weights:
        model(tokens(2, 9))
    assert [w.shape for w in weights] == [(2, 2, 1, t) for t in range(9) for _ in model.layers]
    for w in weights[3:]:
        torch.testing.assert_close(w.sum(-1), torch.ones(2, 2, 1).double())


@torch.no_grad()
def test_the_first_token_has_nothing_to_attend_to():
    """Without memory, attention at step 0 adds nothing: other weights of attention leave its logits."""
    model, text = make(), tokens(2, 4)
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
    states, text = [], tokens(1, 2)
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
def test_memory_is_normalised_before_it_is_projected():
    model, text = make(), tokens(2, 8)
    vectors = torch.randn(2, 6, 16, dtype=torch.float64)
    once, twice = model(text, vectors)[0], model(text, 2 * vectors)[0]
    torch.testing.assert_close(once, twice, rtol=1e-3, atol=1e-4)  # but for the norm's epsilon


@torch.no_grad()
@pytest.mark.parametrize("T", [1, 4])
def test_order_of_memory_matters(T):
    model, text = make(), tokens(2, T)
    vectors = torch.randn(2, 6, 16, dtype=torch.float64)
    straight, shuffled = model(text, vectors)[0], model(text, vectors.flip(1))[0]
    assert (straight - shuffled)[:, 0].abs().max() > 1e-3


# ------------------------------------------------------------------ memory from segment to segment


@given(segment_len=st.integers(1, 24), mem_len=st.integers(1, 24), shared_kv=st.booleans())
@settings(max_examples=15, deadline=None)
def test_it_does_not_matter_where_the_text_is_cut(segment_len, mem_len, shared_kv):
    """Every step sees the latest mem_len vectors, wherever the segments end, and in any form of memory."""
    model, text = make(mem_len=mem_len, shared_kv=shared_kv), tokens(2, 24)
    whole = read(model, text, 24)[0]
    torch.testing.assert_close(read(model, text, segment_len)[0], whole)
    torch.testing.assert_close(read(Cached(model), text, segment_len)[0], whole)


@pytest.mark.parametrize("mem_len", [1, 3, 4, 5, 50])
@pytest.mark.parametrize("shared_kv", [True, False])
def test_memory_grows_to_mem_len_and_stays_there(mem_len, shared_kv):
    model, vectors, cache = make(mem_len=mem_len, shared_kv=shared_kv), None, None
    n_kv = 1 if shared_kv else 3
    for seen in range(4, 64, 4):
        _, vectors = model(tokens(2, 4), vectors)
        _, cache = Cached(model)(tokens(2, 4), cache)
        M = min(mem_len, seen)
        assert vectors.shape == (2, M, 16) and kept_alive(vectors) == 2 * M * 16 * 8  # no view of more
        assert cache.shape == (2, M, n_kv, 2, 2, 8)
        assert kept_alive(cache) <= n_kv * 2 * 2 * (M + 1) * 16 * 8  # of one slot more at most


def test_memory_is_the_vectors_with_gradients_and_without():
    model, text = make(), tokens(2, 9)
    _, memory = model(text)
    with torch.no_grad():
        _, silent = model(text)
    assert torch.equal(memory, silent) and memory.shape == (2, 6, 16)
    model(text, silent)[0].sum().backward()  # a memory made without gradients may be trained on


def test_no_graph_survives_a_segment():
    model, memory = make().train(), None
    for _ in range(3):
        logits, memory = model(tokens(2, 4), memory)
        assert not memory.requires_grad and memory.grad_fn is None
    logits.sum().backward()  # would fail if it led into the earlier, freed graphs


def test_keys_and_values_learn_from_memory():
    """One token alone leaves no keys that anybody reads: what the projection learns, it learns from memory."""
    model = make()
    model(tokens(2, 1), torch.randn(2, 6, 16).double())[0].logsumexp(-1).sum().backward()
    assert model.memory.key_value.weight.grad.abs().sum() > 0 and model.memory.norm.weight.grad.abs().sum() > 0


@torch.no_grad()
def test_mem_len_may_be_lowered():
    model, text = make(mem_len=6), tokens(2, 24)
    _, long = model(text)
    _, long_cache = Cached(model)(text)
    model.mem_len = 3
    small = make(mem_len=3)
    state = model.state_dict()
    state["memory.positions"] = state["memory.positions"][-3:]
    small.load_state_dict(state)
    for ours, theirs in [(model, small), (Cached(model), Cached(small))]:
        torch.testing.assert_close(read(ours, text, 5)[0], read(theirs, text, 5)[0])
    expected = small(text, long[:, -3:])[0]
    torch.testing.assert_close(model(text, long)[0], expected)  # of a longer memory, the latest
    torch.testing.assert_close(Cached(model)(text, long_cache)[0], expected)


def test_layers_that_share_collect_the_gradients_of_layers_that_do_not():
    one, text = make(), tokens(2, 12)
    each = make(shared_kv=False)
    state = one.state_dict()
    state["memory.key_value.weight"] = state["memory.key_value.weight"].repeat(3, 1)
    each.load_state_dict(state)
    a, b = gradients(one, lambda: one(text)[0]), gradients(each, lambda: each(text)[0])
    b[1]["memory.key_value.weight"] = b[1]["memory.key_value.weight"].unflatten(0, (3, -1)).sum(0)
    assert_same(a, b)


def test_kept_for_backward_grows_evenly_with_the_segment():
    """A step keeps what it sees, mem_len slots at most, and nothing of the slots that it does not see."""
    model = make()
    memory = model(tokens(2, 6))[1]
    kept = [bytes_for_backward(model, lambda T=T: model(tokens(2, T), memory)[0].sum()) for T in (8, 16, 24)]
    assert kept[2] - kept[1] == kept[1] - kept[0]


def test_layers_are_called():
    """Hooks, activations, adapters: what is changed in a layer, changes what is computed."""
    model, text, seen = make(), tokens(2, 5), []
    before = model(text)[0]
    model.layers[1].query.register_forward_hook(lambda module, args, out: seen.append(out))
    model.layers[0].feed_forward[1] = torch.nn.GELU()
    assert not torch.allclose(model(text)[0], before) and len(seen) == 5


def test_autocast():
    model, text = make().float(), tokens(2, 20)
    memory = model(text)[1]
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(text, memory)[0].float().square().mean()
        cached, cache = Cached(model)(text)
        assert Cached(model)(text, cache)[0].isfinite().all()
        _, memory = model(text, memory)
    loss.backward()
    assert memory.dtype == torch.float32 and all(p.grad.isfinite().all() for p in model.parameters())


# ------------------------------------------------------------------ generation


@torch.no_grad()
@given(pieces=st.lists(st.integers(1, 9), min_size=2, max_size=6), mem_len=st.integers(1, 9))
@example(pieces=[3, 1, 1, 1, 1], mem_len=6)
@settings(max_examples=15, deadline=None)
def test_what_a_memory_holds_never_changes(pieces, mem_len):
    """Every memory on the way may be gone on from again, and again, by any text."""
    model, memories, logits = Cached(make(mem_len=mem_len)), [None], []
    for n, T in enumerate(pieces):
        out, memory = model(tokens(2, T, seed=n), memories[-1])
        memories.append(memory)
        logits.append(out)
    held = [memory.clone() for memory in memories[1:]]
    for memory in memories:
        model(tokens(2, 2, seed=99), memory)
    for memory, kv in zip(memories[1:], held):
        assert torch.equal(memory, kv)
    for n, (memory, T) in enumerate(zip(memories, pieces)):
        torch.testing.assert_close(model(tokens(2, T, seed=n), memory)[0], logits[n])


def test_a_cache_is_a_tensor_that_loads_anywhere():
    model, buffer = Cached(make()), io.BytesIO()
    _, memory = model(tokens(2, 9))
    torch.save(memory, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=True)
    assert torch.equal(model(tokens(2, 3), loaded)[0], model(tokens(2, 3), memory)[0])


@pytest.mark.parametrize("mem_len", [3, 50])
def test_generation_is_the_same_by_vectors_by_cache_and_by_reading_all_again(mem_len):
    model, prompt = make(mem_len=mem_len), tokens(2, 5)
    by_cache = training.generate(Cached(model), prompt, 12)
    assert torch.equal(by_cache, training.generate(model, prompt, 12))
    text = prompt
    for _ in range(12):
        with torch.no_grad():
            text = torch.cat([text, model(text)[0][:, -1:].argmax(-1)], dim=1)
    assert torch.equal(text, training.generate(Cached(model), prompt, 12, temperature=0))


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
    """Every token takes the same operations. What they return grows with memory alone, until memory is full."""
    model, cost = Cached(make(mem_len=200)), {}
    for depth in (10, 150, 250, 400):
        _, memory = model(tokens(1, depth))
        with Operations() as cost[depth]:
            model(tokens(1, 1), memory)
    assert all(cost[10].count == other.count for other in cost.values())
    assert cost[250].returned == cost[400].returned
    projected = [op for op in cost[10].returned if op.overloadpacket.__name__ in ("mm", "addmm", "native_layer_norm")]
    assert projected and all(cost[10].returned[op] == cost[400].returned[op] for op in projected)  # nothing old


@torch.inference_mode()
def test_a_cache_of_inference_mode_goes_on_under_no_grad():
    model, text = Cached(make()), tokens(2, 9)
    _, memory = model(text[:, :4])
    expected, _ = model(text[:, 4:], memory)
    with torch.inference_mode(False):
        torch.testing.assert_close(model(text[:, 4:], memory)[0], expected)


# ------------------------------------------------------------------ errors


def test_invalid_arguments_are_refused_early():
    with pytest.raises(ValueError, match="mem_len=0 is not a number >= 1"):
        make(mem_len=0)
    with pytest.raises(ValueError, match="d_model=16 is not a multiple of n_heads=3"):
        make(n_heads=3)
    model = make()
    for reader in (model, Cached(model)):
        _, memory = reader(tokens(2, 4))
        with pytest.raises(ValueError, match="memory of 2 streams, tokens of 3"):
            reader(tokens(3, 4), memory)
        with pytest.raises(ValueError, match="in torch.float32, this model computes in torch.float64"):
            reader(tokens(2, 4), memory.float())
        with pytest.raises(ValueError, match="pass what this model returned, or None"):
            reader(tokens(2, 4), memory[..., :-1])
    with pytest.raises(ValueError, match="pass what this model returned, or None"):
        model(tokens(2, 4), Cached(model)(tokens(2, 4))[1])
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
