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
from numbers import Number

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

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
    weights, training = [], model.training

    def record(block, args, _):
        q, k, _ = block.heads(args[0])
        weights.append(attention_weights(q, k, block.hash(q, block.seed), block.settings))

    hooks = [block.register_forward_hook(record) for block in model.blocks[::2]]
    try:
        model.eval()(tokens)
    finally:
        model.train(training)
        for hook in hooks:
            hook.remove()
    return weights
