"""What a model costs and where it looks: bytes, seconds, attention weights. Nothing here changes the model."""

import statistics
import sys
import time
import weakref
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from memtx_minimal.reformer import attention_weights


def nbytes(tensors):
    """Bytes of storage that a tensor, or a list, tuple or dict of them (such as a memory), keeps alive.

    Numbers among them count nothing.
    """
    storages = {}

    def visit(item):
        if isinstance(item, torch.Tensor):
            storages[item.untyped_storage().data_ptr()] = item.untyped_storage().nbytes()
        elif not isinstance(item, (int, float, type(None))):
            for part in item.values() if isinstance(item, dict) else item:
                visit(part)

    visit(tensors)
    return sum(storages.values())


def bytes_for_backward(model, run):
    """Bytes that autograd keeps between `run()`, a forward pass of the model, and its backward pass.

    Each storage counts once; the model's own parameters and buffers do not count.
    """
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = run()  # holds the graph, so that no storage is freed and its address used again
    total = nbytes([tensor for address, tensor in kept.items() if address not in own])
    del result
    return total


class _LiveBytes(TorchDispatchMode):
    """Counts the bytes of every storage that an operation allocates, for as long as it lives."""

    def __init__(self):
        super().__init__()
        self.now, self.peak, self.live = 0, 0, set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        old = {id(storage) for storage in self.storages((args, kwargs))}
        result = func(*args, **(kwargs or {}))
        for storage in self.storages(result):
            if id(storage) not in old | self.live:
                self.live.add(id(storage))
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self.free, id(storage), storage.nbytes())
        return result

    def storages(self, tree):
        return [t.untyped_storage() for t in tree_leaves(tree) if isinstance(t, torch.Tensor)]

    def free(self, key, size):
        self.live.discard(key)
        self.now -= size


def peak_bytes(run, device="cpu"):
    """The most bytes that `run()` held at once, on top of what was there before.

    On CUDA this is the allocator's own count. Elsewhere it counts the tensors that operations return,
    not the scratch space inside one operation.
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
    """The most physical memory that this process has had so far, in bytes; nan where the system does not say."""
    try:
        import resource  # not on Windows
    except ImportError:
        return float("nan")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def seconds(run, *, warmup=2, rounds=7, device="cpu"):
    """Median wall time of `run()` in seconds, after `warmup` runs that do not count."""
    waits = {"cuda": torch.cuda.synchronize, "mps": torch.mps.synchronize}  # their work goes on by itself
    synchronize = waits.get(torch.device(device).type, lambda: None)
    times = []
    for _ in range(warmup + rounds):
        synchronize()
        start = time.perf_counter()
        run()
        synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times[warmup:])


class _Recorder(TorchFunctionMode):
    """Keeps every softmax over scores (B, H, T, K), and opens up fused attention to see its softmax."""

    def __init__(self, weights):
        super().__init__()
        self.weights = weights

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            return self.attend(*args, **kwargs)
        result = func(*args, **kwargs)
        if func in (torch.softmax, torch.Tensor.softmax, F.softmax) and result.dim() == 4:
            self.weights.append(result.detach())
        return result

    def attend(self, q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None):
        """The softmax that fused attention computes and throws away."""
        scores = (q @ k.mT) * (q.size(-1) ** -0.5 if scale is None else scale)  # (B, H, T, K)
        if is_causal:
            attn_mask = scores.new_ones(scores.shape[-2:], dtype=torch.bool).tril()
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            scores = scores.masked_fill(~attn_mask, float("-inf"))
        elif attn_mask is not None:
            scores = scores + attn_mask
        weights = scores.softmax(dim=-1)
        self.weights.append(weights.detach())
        return F.dropout(weights, dropout_p) @ v


@contextmanager
def record_attention(model):
    """Inside the block, `weights` holds the attention of the model's latest forward pass.

    with record_attention(model) as weights:
        model(tokens, memory)
    weights[layer]  # (B, H, T, K), rows sum to 1, keys in their order in the text

    A model that reads in pieces or in steps gives them piece by piece, step by step. A Reformer that
    hashes never has them whole: ask look. A FeedbackTransformer shows them with by_hand=False.
    Record in eval mode: in training, the looks of a CompressiveTransformer's own loss stand among them.
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
    """Where each layer of a Reformer looks in evaluation: weights (B, H, T, T), in the order of the text."""
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
