"""What a model costs and where it looks: bytes, seconds, attention weights.

Nothing here changes the model.
"""

import operator
import statistics
import sys
import time
import weakref
from collections.abc import Iterator, Mapping, Sequence, Set, ValuesView
from contextlib import contextmanager
from dataclasses import dataclass
from numbers import Number

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from memtx_minimal import inputs
from memtx_minimal.reformer import attention_weights

# ---------------------------------------------------------------- bytes


def nbytes(tensors):
    """Bytes that tensors need: every byte that one of them shows, once.

    tensors: a tensor, or lists, tuples, sets, dicts and iterators of tensors, such as a
    memory; numbers and None among them count nothing. A view needs what it shows, not
    the whole storage behind it (that is `kept_alive`); an expanded tensor needs what it
    repeats, once. ValueError for anything else, and for tensors that are not dense.
    """
    views = _by_storage(tensors)
    return sum(_shown(storage, views[storage]) for storage in views)


def kept_alive(tensors):
    """Bytes that cannot be freed while the tensors live: whole storages, each once.

    A view of three numbers keeps alive all the numbers that it is a view of. Takes what
    `nbytes` takes, and is never less.
    """
    return sum(storage.nbytes() for storage in _by_storage(tensors))


def bytes_for_backward(model, run, count=nbytes):
    """Bytes that autograd keeps between `run()`, a forward pass, and the backward pass.

    run returns what the backward pass would start from, such as the logits or the loss.
    What was saved for it counts, inputs too, but not the parameters and buffers of the
    model. count says how: `nbytes`, what the backward pass reads, or `kept_alive`, the
    whole storages behind it.
    """
    saved = []

    def pack(tensor):
        tensor = tensor.detach()  # an output that led back to its graph would never go
        saved.append(weakref.ref(tensor))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = run()
    kept = [tensor for ref in saved if (tensor := ref()) is not None]  # by result
    own = _by_storage([*model.parameters(), *model.buffers()])
    total = count([tensor for tensor in kept if _storage(tensor) not in own])
    del result
    return total


def _by_storage(tensors):
    """{storage: the tensors that are views of it}; two views give the same storage."""
    views = {}
    for tensor in _tensors_in(tensors):
        views.setdefault(_storage(tensor), []).append(tensor)
    return views


_SEVERAL = Sequence, Set, ValuesView, Iterator


def _tensors_in(item):
    if isinstance(item, torch.Tensor):
        yield item
    elif isinstance(item, Mapping):
        yield from _tensors_in(item.values())
    elif isinstance(item, _SEVERAL) and not isinstance(item, (str, bytes)):
        for part in item:
            yield from _tensors_in(part)
    elif item is not None and not isinstance(item, Number):
        raise ValueError(
            f"cannot count the bytes of {type(item).__name__}: pass a tensor, or a "
            "list, tuple, set, dict or iterator of tensors"
        )


def _storage(tensor):
    if tensor.layout != torch.strided or tensor.is_nested:
        kind = "nested" if tensor.is_nested else tensor.layout
        raise ValueError(f"only dense tensors are counted, this one is {kind}")
    return tensor.untyped_storage()


def _shown(storage, views):
    """Bytes of the storage that lie in one of the views, or in several."""
    size = storage.nbytes()
    if size == 0 or any(v.is_contiguous() and v.nbytes == size for v in views):
        return size
    unit = min(view.element_size() for view in views)  # bytes; all are powers of 2
    shown = torch.zeros(-(-size // unit), dtype=torch.bool, device="cpu")
    for view in views:
        k = view.element_size() // unit
        shape = [n if s else min(n, 1) for n, s in zip(view.shape, view.stride())]
        strides = [k * s for s in view.stride()]
        offset = k * view.storage_offset()
        shown.as_strided((*shape, k), (*strides, 1), offset).fill_(True)
    return unit * int(shown.sum())


class _LiveBytes(TorchDispatchMode):
    """Counts the bytes of every storage that an operation allocates, while it lives."""

    def __init__(self):
        super().__init__()
        self.now, self.peak = 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        old = self.storages((args, kwargs))
        result = func(*args, **(kwargs or {}))
        for storage in self.storages(result) - old:
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self.free, storage.nbytes())
        return result

    def storages(self, tree):
        return {_storage(t) for t in tree_leaves(tree) if isinstance(t, torch.Tensor)}

    def free(self, size):
        self.now -= size


def peak_bytes(run, device="cpu"):
    """The most bytes that `run()` held at once, on top of what was there before.

    On CUDA this is the allocator's own count. Elsewhere it counts the tensors that
    operations return, not the scratch space inside one operation.
    """
    device = torch.device(device)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        run()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with _LiveBytes() as live:
        run()
    return live.peak


def process_peak_bytes():
    """The most physical memory that this process has had so far, in bytes.

    nan where the system does not say.
    """
    try:
        import resource  # not on Windows
    except ImportError:
        return float("nan")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def seconds(run, *, warmup=2, rounds=7, device="cpu"):
    """Median wall time of `run()` in seconds, after `warmup` runs that do not count.

    ValueError if warmup is below 0 or rounds, the runs that count, below 1.
    """
    if operator.index(warmup) < 0 or operator.index(rounds) < 1:
        raise ValueError(f"{warmup=} is not 0 or more, or {rounds=} not 1 or more")
    device = torch.device(device)
    waits = {  # their work goes on by itself
        "cuda": lambda: torch.cuda.synchronize(device),
        "mps": torch.mps.synchronize,
    }
    synchronize = waits.get(device.type, lambda: None)
    times = []
    for _ in range(warmup + rounds):
        synchronize()
        start = time.perf_counter()
        run()
        synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times[warmup:])


# ---------------------------------------------------------------- attention


class _Recorder(TorchFunctionMode):
    """Keeps every softmax over scores (B, H, T, K), that of fused attention too."""

    def __init__(self, weights):
        super().__init__()
        self.weights = weights

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            return self.attend(*args, **kwargs)
        result = func(*args, **kwargs)
        softmax = func in (torch.softmax, torch.Tensor.softmax, F.softmax)
        if softmax and result.dim() == 4:
            self.weights.append(result.detach())
        return result

    def attend(
        self, query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False,
        scale=None, enable_gqa=False,
    ):  # fmt: skip
        """The softmax that fused attention computes and throws away."""
        if enable_gqa:  # several heads of the queries share one of the keys and values
            shared_by = query.size(-3) // key.size(-3)
            key, value = (x.repeat_interleave(shared_by, -3) for x in (key, value))
        scale = query.size(-1) ** -0.5 if scale is None else scale
        scores = (query @ key.mT) * scale  # (B, H, T, K)
        if is_causal:
            attn_mask = scores.new_ones(scores.shape[-2:], dtype=torch.bool).tril()
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            scores = scores.masked_fill(~attn_mask, float("-inf"))
        elif attn_mask is not None:
            scores = scores + attn_mask
        blind = scores.isneginf().all(dim=-1, keepdim=True)  # rows that may see nothing
        weights = scores.masked_fill(blind, 0).softmax(dim=-1).masked_fill(blind, 0)
        self.weights.append(weights.detach())
        return F.dropout(weights, dropout_p) @ value


@contextmanager
def record_attention(model):
    """Inside the block, `weights` holds the attention of the model's latest forward.

    with record_attention(model) as weights:
        model(tokens, memory)
    weights[layer]  # (B, H, T, K), rows sum to 1, keys in their order in the text

    A model that reads in pieces or in steps gives them piece by piece, step by step. A
    Reformer that hashes never has them whole: ask look. A FeedbackTransformer
    that was sped up has none to show. Record in eval mode: in training, the looks of a
    CompressiveTransformer's own loss stand among them.
    """
    weights, modes = [], []

    def enter(*_):
        weights.clear()
        modes.append(_Recorder(weights))
        modes[-1].__enter__()

    def leave(*_):
        if modes:
            modes.pop().__exit__(None, None, None)

    hooks = [
        model.register_forward_pre_hook(enter),
        model.register_forward_hook(leave, always_call=True),
    ]
    try:
        yield weights
    finally:
        for hook in hooks:
            hook.remove()
        leave()


@torch.no_grad()
def look(model, tokens):
    """Where each layer of a Reformer looks in evaluation.

    One tensor of weights a layer, (B, H, T, T), in the order of the text.
    """
    weights, _ = _look(model, tokens)
    return weights


def _look(model, tokens):
    """The weights of each layer, and its buckets (P, B, H, T); None if it has none."""
    weights, hashes, training = [], [], model.training

    def record(block, args, _):
        q, k, _ = block.heads(args[0])
        hashes.append(block.hash(q, block.seed))
        weights.append(attention_weights(q, k, hashes[-1], block.settings))

    hooks = [block.register_forward_hook(record) for block in model.blocks[::2]]
    try:
        model.eval()(tokens)
    finally:
        model.train(training)
        for hook in hooks:
            hook.remove()
    return weights, hashes


# ---------------------------------------------------------------- what is read


@dataclass
class Reads:
    """What each layer and head of a model reads at each token of a text: see `reads`.

    A slot is what attention can read: one key and value. It stands for `width` tokens
    of the text, for one or, if compressed, for several.
    """

    tokens: torch.Tensor  # (N,)
    weights: list  # for each token (L, H, K): how much of each of K slots it reads
    slots: list  # for each token [(zone, first, width, n)]: n slots, side by side, the
    # first one for the tokens first ... first + width - 1; all K of them, oldest first
    mixture: torch.Tensor | None = None  # Feedback: weights of the states, (L + 1,)
    buckets: torch.Tensor | None = None  # Reformer, hashed: (L, P, H, N)
    chunks: torch.Tensor | None = None  # in which chunk of each round: like buckets

    def stands_for(self, t):
        """The tokens that each slot of token t stands for: K ranges of positions."""
        return [
            range(first + width * i, first + width * (i + 1))
            for _, first, width, n in self.slots[t]
            for i in range(n)
        ]


@torch.no_grad()
def reads(model, tokens, segment_len=None):
    """What each layer and head of a model reads at each token of a text: `Reads`.

    model: of any of the chapters 0 to 4. tokens: (N,), read from the start of a stream,
    segment by segment, in evaluation. segment_len: as in training; None takes the
    model's window or memory. A Reformer reads the whole text in one window.

    Zones of slots: "segment", states of this segment or window; "memory", remembered
    states; "compressed", compressed ones; "vectors", the Feedback Transformer's; and
    "bucket", what a Reformer's hashing may find. ValueError for what does not fit, and
    for a model that keeps its attention to itself, such as one that was sped up.
    """
    if tokens.dim() != 1:
        raise ValueError(f"tokens of shape {tuple(tokens.shape)}; pass one text, (N,)")
    if hasattr(model, "blocks"):
        return _hashed_reads(model, tokens)
    if hasattr(model, "n_loops"):
        name = type(model).__name__
        raise ValueError(f"{name} is not of the chapters 0 to 4: none to show")
    if segment_len is None:
        segment_len = getattr(model, "max_len", None) or model.mem_len
    inputs.check_sizes({"segment_len": segment_len})
    if hasattr(model, "memories"):
        inputs.check_number("segment_len", segment_len, 1, model.mem_len)
        if type(model.memories[0].compress).__name__ == "MostUsed":
            raise ValueError("most-used keeps other tokens in each layer: none to show")
    result, memory = Reads(tokens.cpu(), [], []), None
    read, training = 0, model.training
    model.eval()
    try:
        for segment in tokens[None].split(segment_len, dim=1):
            before = memory
            with record_attention(model) as recorded:
                _, memory = model(segment, before)
            rows = _by_token(model, recorded, segment.size(1))
            for i, weights in enumerate(rows):
                result.weights.append(weights.float().cpu())
                result.slots.append(_slots(model, before, read, i, weights.size(-1)))
            read += segment.size(1)
    finally:
        model.train(training)
    if hasattr(model, "memory"):
        result.mixture = model.memory.layer_weights.softmax(dim=0).cpu()
    return result


def _by_token(model, recorded, T):
    """What was recorded of a segment of T tokens: (L, H, K) for each of them."""
    L = len(model.layers)
    if hasattr(model, "memory") and len(recorded) == T * L:  # steps: (1, H, 1, M)
        steps = [recorded[L * i : L * (i + 1)] for i in range(T)]
        return [torch.cat(step)[:, :, 0] for step in steps]
    if len(recorded) != L:
        name = type(model).__name__
        raise ValueError(f"{name} does not show its attention: take the plain model")
    whole = torch.cat(recorded)  # (L, H, T, K)
    K = whole.size(3)
    return [whole[:, :, i, : K - T + i + 1] for i in range(T)]  # nothing of the future


def _slots(model, memory, read, i, K):
    """The K slots of token i of a segment that comes after `read` tokens."""
    if hasattr(model, "memory"):
        return [("vectors", read + i - K, 1, K)]
    M, C, rate = K - i - 1, 0, 1  # remembered states, C compressed ones among them
    if hasattr(model, "memories") and memory:
        M, rate = memory[0][1].size(1), model.memories[0].rate
        C = K - i - 1 - M
    zones = [
        ("compressed", read - M - rate * C, rate, C),
        ("memory", read - M, 1, M),
        ("segment", read, 1, i + 1),
    ]
    return [zone for zone in zones if zone[-1]]


def _hashed_reads(model, tokens):
    """The same of a Reformer: every earlier token is a slot, which hashing may find."""
    weights, buckets = _look(model, tokens[None])
    whole = torch.cat(weights).float().cpu()  # (L, H, N, N)
    hashed = buckets[0] is not None
    zone, N = "bucket" if hashed else "segment", len(tokens)
    rows = [whole[:, :, t, : t + 1] for t in range(N)]
    result = Reads(tokens.cpu(), rows, [[(zone, 0, 1, t + 1)] for t in range(N)])
    if hashed:
        buckets = torch.stack(buckets)[:, :, 0].int().cpu()  # (L, P, H, N)
        place = buckets.argsort(dim=-1, stable=True).argsort(dim=-1)
        result.chunks = place // model.settings.chunk_len
        result.buckets = buckets if model.settings.same_bucket else 0 * buckets
    return result
