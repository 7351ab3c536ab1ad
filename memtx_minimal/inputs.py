"""What every model is handed and built with: checked in one place, in the same words.

An error comes at the call, says what came, and names what would be valid. It is always
a ValueError. Nothing is converted and nothing is kept.
"""

from contextlib import nullcontext
from numbers import Integral, Real

import torch

LEAST = {  # the smallest valid value of each size, by the name of the argument
    "vocab_size": 1, "d_model": 1, "n_heads": 1, "n_layers": 1, "d_ff": 1, "mem_len": 0,
    "compressed_len": 0, "compression_rate": 1, "clamp_len": 1, "chunk_len": 1,
    "n_rounds": 0, "piece_len": 1, "max_len": 1, "batch_size": 1, "segment_len": 1,
    "steps": 0, "warmup": 0, "n_tokens": 0, "top_k": 1, "valid_every": 1, "n_cups": 2,
    "length": 4, "n_symbols": 1, "n_characters": 0, "accumulate": 1, "seed": 0,
    "n_events": 0, "lag": 1, "n_sinks": 0, "n_used": 0, "n_loops": 1,
}  # fmt: skip
MAY_BE_NONE = "clamp_len", "top_k", "valid_every"


def check_sizes(given, even=()):
    """Refuse sizes that cannot work; given is {name of the argument: value}.

    Sizes are whole numbers, numpy's too, from LEAST on; dropout lies in 0 ... 1;
    n_heads divides d_model; the names in `even` are even. Names that stand in no rule
    are passed over, so that a constructor may hand in its locals().
    """
    for name, value in given.items():
        least = LEAST.get(name)
        if least is None or (value is None and name in MAY_BE_NONE):
            continue
        if not isinstance(value, Integral) or isinstance(value, bool) or value < least:
            or_none = ", nor None" if name in MAY_BE_NONE else ""
            raise ValueError(
                f"{name}={value!r} is not a whole number >= {least}{or_none}"
            )
    check_number("dropout", given.get("dropout", 0), 0, 1)
    for name in even:
        check_even(name, given[name])
    if "n_heads" in given:
        check_multiple("d_model", given["d_model"], "n_heads", given["n_heads"])


def check_multiple(name, value, of, step):
    """Refuse a value that is not one, two, three ... times another."""
    if not isinstance(value, Integral):
        raise ValueError(f"{name}={value!r} is not a whole number")
    if value < 1 or value % step:
        below = value // step * step
        use = " or ".join(str(n) for n in (below, below + step) if n > 0)
        raise ValueError(f"{name}={value} is not a multiple of {of}={step}: use {use}")


def check_even(name, value):
    """Refuse an odd width where dimensions come in pairs, such as sine and cosine."""
    if value % 2:
        raise ValueError(f"{name}={value} is odd: use {value - 1} or {value + 1}")


def check_pair(name, value):
    """Refuse all but two whole numbers >= 1."""
    pair = isinstance(value, (list, tuple)) and len(value) == 2
    if not pair or not all(isinstance(n, Integral) and n >= 1 for n in value):
        raise ValueError(f"{name}={value!r} is not a pair of whole numbers >= 1")


def check_positive(name, value):
    """Refuse what is not a finite number above 0."""
    check_number(name, value, 0)
    if value == 0:
        raise ValueError(f"{name}={value} is not above 0")


def check_number(name, value, least, most=float("inf")):
    """Refuse what is not a finite number in least ... most."""
    number = isinstance(value, Real) and not isinstance(value, bool)
    if not number or not least <= value <= most or value == float("inf"):
        upto = f"in {least} ... {most}" if most < float("inf") else f">= {least}"
        raise ValueError(f"{name}={value!r} is not a number {upto}")


def check_added(name, mask):
    """Refuse a mask of True and False where one that is added to scores is due."""
    if not mask.is_floating_point():
        raise ValueError(
            f"{name} of {mask.dtype} is added to scores: 0 shows, -inf hides"
        )


def check_one_of(name, value, valid):
    """Refuse a choice that is not there."""
    if value not in valid:
        raise ValueError(
            f"{name}={value!r} is not one of {', '.join(map(repr, valid))}"
        )


def check_tokens(tokens, vocab_size, max_len=None):
    """Refuse all but tokens (B, T) int64, B and T >= 1, T <= max_len, in the
    vocabulary."""
    if not isinstance(tokens, torch.Tensor) or tokens.dtype != torch.int64:
        kind = getattr(tokens, "dtype", type(tokens).__name__)
        raise ValueError(f"tokens: {kind}; pass a tensor (B, T) of torch.int64")
    shape = tuple(tokens.shape)
    if len(shape) != 2 or 0 in shape:
        hint = ": a single text is tokens[None]" if len(shape) == 1 else ""
        raise ValueError(f"tokens of shape {shape}; pass (B, T), B and T >= 1{hint}")
    if max_len is not None and shape[1] > max_len:
        raise ValueError(
            f"{shape[1]} tokens do not fit the window: pass 1 to {max_len}"
        )
    if torch.compiler.is_compiling() or tokens.is_meta:
        return  # the numbers are not known there
    least, most = (int(extreme) for extreme in tokens.aminmax())
    if least < 0 or most >= vocab_size:
        worst = least if least < 0 else most
        raise ValueError(f"token {worst}: this vocabulary has 0 ... {vocab_size - 1}")


def check_vectors(**vectors):
    """Refuse all but floating-point vectors (B, H, T, d), B, H, T the same in all."""
    first, name = next(iter(vectors.values())), next(iter(vectors))
    for other, x in vectors.items():
        if not isinstance(x, torch.Tensor) or not x.is_floating_point():
            kind = getattr(x, "dtype", type(x).__name__)
            raise ValueError(f"{other}: {kind}; pass a tensor of floating point")
        if x.dim() != 4 or 0 in x.shape:
            shape = tuple(x.shape)
            raise ValueError(f"{other} of shape {shape}; pass (B, H, T, d), none 0")
        if x.shape[:3] != first.shape[:3]:
            shapes = f"{other} {tuple(x.shape[:3])}, {name} {tuple(first.shape[:3])}"
            raise ValueError(f"(B, H, T) differ: {shapes}")


def check_hash(x, n_buckets, n_rounds):
    """Refuse what cannot be hashed, and buckets that are not pairs of opposites."""
    check_vectors(x=x)
    whole = isinstance(n_buckets, Integral) and not isinstance(n_buckets, bool)
    if not whole or n_buckets < 2 or n_buckets % 2:
        why = "each direction has an opposite"
        raise ValueError(f"n_buckets={n_buckets!r} is not even and >= 2: {why}")
    check_sizes({"n_rounds": n_rounds})
    if n_rounds == 0:
        raise ValueError("n_rounds=0: without a round there is nothing to hash")
    if not x.is_meta and not torch.compiler.is_compiling() and not x.isfinite().all():
        raise ValueError("x has numbers that are nan or inf: they fall in no bucket")


def check_attention(q, k, v, buckets):
    """Refuse q, k, v (B, H, T, d) and buckets (R, B, H, T) that do not fit together."""
    check_vectors(q=q, k=k, v=v)
    if q.size(3) != k.size(3):
        raise ValueError(f"q has {q.size(3)} dimensions, k {k.size(3)}: use one number")
    whole = isinstance(buckets, torch.Tensor) and not buckets.is_floating_point()
    if not whole or buckets.dim() != 4 or buckets.shape[1:] != q.shape[:3]:
        given = tuple(getattr(buckets, "shape", ())), getattr(buckets, "dtype", buckets)
        raise ValueError(f"buckets {given}; pass integers (R, *{tuple(q.shape[:3])})")
    if len(buckets) == 0:
        raise ValueError("buckets of no round; pass (R, B, H, T), R >= 1")


def checked_memory(memory, empty):
    """The memory that a model was handed; where it is None, `empty`.

    empty is a memory that remembers nothing, in the form of this model's: tensors (B,
    0, ...), the parts of a layer in a tuple, the layers in a list. A memory must agree
    with it in all but the number of slots, which is one number for all layers. empty
    None: the model has no memory.
    """
    if memory is None:
        return empty
    if empty is None:
        raise ValueError(f"memory: {form(memory)}; this model has none: pass None")
    if fault := difference(memory, empty):
        raise ValueError(f"memory {fault}; pass what this model returned, or None")
    return memory


def by_layer(memory, n):
    """The memories of n layers, as a list; where there is none yet, n times None."""
    if memory is None:
        return [None] * n
    if not isinstance(memory, list) or len(memory) != n:
        fault = f"memory is {form(memory)}, this model's a list of {n}"
        raise ValueError(f"{fault}; pass what this model returned, or None")
    return memory


def difference(memory, empty):
    """What keeps a memory from being one like `empty`, in words; None if it is."""
    if isinstance(empty, torch.Tensor) and isinstance(memory, torch.Tensor):
        if memory.dim() != empty.dim() or memory.shape[2:] != empty.shape[2:]:
            return unlike(memory, empty)
        if len(memory) != len(empty):
            return f"of {len(memory)} streams, tokens of {len(empty)}"
        if memory.dtype != empty.dtype:
            return f"in {memory.dtype}, this model computes in {empty.dtype}"
        if memory.device != empty.device:
            return f"on {memory.device}, tokens on {empty.device}"
        return None
    kinds = {type(memory), type(empty)}
    if not kinds <= {list, tuple} or len(memory) != len(empty):
        return unlike(memory, empty)
    for part, like in zip(memory, empty):
        if fault := difference(part, like):
            return fault
    lengths = {slots(part): None for part in memory}
    if isinstance(empty, list) and len(lengths) > 1:
        return f"of {' and '.join(map(str, lengths))} slots in different layers"
    return None


def unlike(memory, empty):
    return f"is {form(memory)}, this model's is {form(empty)}"


def slots(part):
    """How many states a layer remembers: a number, or one for each of its parts."""
    return part.size(1) if isinstance(part, torch.Tensor) else tuple(map(slots, part))


def form(memory):
    """A memory in words: "a list of 4, each a tensor (2, 64, 128)"."""
    if isinstance(memory, torch.Tensor):
        return f"a tensor ({', '.join(map(str, memory.shape))})"
    if isinstance(memory, (list, tuple)) and memory:
        return f"a {type(memory).__name__} of {len(memory)}, each {form(memory[0])}"
    return f"{memory!r}" if memory in ([], ()) else f"a {type(memory).__name__}"


def autocast_settings(device_type):
    """How autocast is set at this moment: keywords for `autocast`."""
    try:
        dtype = torch.get_autocast_dtype(device_type)
        return {"enabled": torch.is_autocast_enabled(device_type), "dtype": dtype}
    except RuntimeError:  # this version of torch has none for this device
        return {"enabled": False, "dtype": None}


def autocast(device_type, enabled, dtype=None):
    """torch.autocast that keeps no copies; nothing at all where it is off and stays
    off."""
    if not enabled and not autocast_settings(device_type)["enabled"]:
        return nullcontext()
    return torch.autocast(device_type, dtype, enabled, cache_enabled=False)


def random_states(device, states=None):
    """The random states of the CPU and of a device; sets them to `states`, if given."""
    here = {"cuda": torch.cuda, "mps": torch.mps}.get(device.type)
    where = [device] if device.type == "cuda" else []
    if states is not None:
        torch.set_rng_state(states[0])
        if here:
            here.set_rng_state(states[1], *where)
    return torch.get_rng_state(), here.get_rng_state(*where) if here else None


def modes(blocks):
    """What must be the same when blocks are computed a second time."""
    return {
        "train or eval": [module.training for module in blocks.modules()],
        "settings": [str(getattr(block, "settings", "")) for block in blocks],
        "requires_grad": [p.requires_grad for p in blocks.parameters()],
    }


def check_unchanged(before, now):
    """RuntimeError if the `modes` of blocks are others in backward than in forward."""
    if changed := [what for what in before if before[what] != now[what]]:
        raise RuntimeError(f"{', '.join(changed)} changed between forward and backward")
