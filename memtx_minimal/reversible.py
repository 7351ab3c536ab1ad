"""Reversible residual layers: the backward pass computes the activations again.

Kitaev, Kaiser, Levskaya, "Reformer: The Efficient Transformer", ICLR 2020, section 3, after
Gomez et al., "The Reversible Residual Network", NeurIPS 2017. Two streams run through the
blocks; each block reads one stream and changes the other.
"""

import torch
from torch.autograd.function import once_differentiable


def random_state(device, state=None):
    """The state of the device's random numbers, from now on `state` if one is given."""
    numbers = {"cuda": torch.cuda, "mps": torch.mps}.get(device.type, torch)
    where = [device] if device.type == "cuda" else []
    if state is not None:
        numbers.set_rng_state(state, *where)
    return numbers.get_rng_state(*where)


def couple(block, x, y, kept=None):
    """y + block(x), in pieces of block.piece_len tokens; and what the block wants kept."""
    length, pieces = block.piece_len or x.size(1), []
    for read, changed in zip(x.split(length, dim=1), y.split(length, dim=1)):
        change, kept = block(read, kept)
        pieces.append(changed + change)
    return torch.cat(pieces, dim=1), kept


def uncouple(block, x, y, dx, dy, kept):
    """Undoes `couple`, and goes back through it: (x, y before, dx before, parameters' grads).

    dy is the gradient of what came out and of what went in: y only had something added.
    """
    own, grads, ys, dxs = [p for p in block.parameters() if p.requires_grad], 0, [], []
    length = block.piece_len or x.size(1)
    for read, changed, d_read, d_changed in zip(*(t.split(length, dim=1) for t in (x, y, dx, dy))):
        with torch.enable_grad():
            read = read.detach().requires_grad_()
            change, _ = block(read, kept)
        d, *more = torch.autograd.grad(change, [read, *own], d_changed.to(change.dtype))
        ys.append(changed - change.detach())
        dxs.append(d_read + d)
        grads = [a + b for a, b in zip(grads, more)] if grads else more
    return torch.cat(ys, dim=1), torch.cat(dxs, dim=1), grads


class Reversible(torch.autograd.Function):
    """x -> [x1 ; x2] after all blocks, (B, T, d_model) -> (B, T, 2 * d_model). Eq. 7 to 9.

    A block is called as block(x, kept) -> (change, kept): what it returns as kept when
    called with None, hash buckets or nothing, it is given again in the backward pass.
    """

    @staticmethod
    def forward(ctx, x, blocks, random, *parameters):
        ctx.blocks, ctx.training, device = blocks, blocks.training, x.device.type
        enabled, dtype = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
        ctx.autocast = dict(enabled=enabled, dtype=dtype, cache_enabled=False)
        x1, x2, kept = x, x, []
        with torch.autocast(device, **ctx.autocast):
            for block in blocks:
                kept.append(random_state(x.device) if random else None)
                changed, buckets = couple(block, x2, x1)
                kept.append(buckets)
                x1, x2 = x2, changed
        y = torch.cat([x1, x2], dim=-1)
        ctx.save_for_backward(y, *kept, *parameters)  # whoever changes one in place is told
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        if ctx.blocks.training != ctx.training:
            raise RuntimeError("train() or eval() was called between forward and backward")
        y, *kept = ctx.saved_tensors
        (x1, x2), (d1, d2), grads = y.chunk(2, dim=-1), dy.chunk(2, dim=-1), []
        now = random_state(y.device)
        with torch.autocast(y.device.type, **ctx.autocast):
            for n, block in reversed(list(enumerate(ctx.blocks))):
                random_state(y.device, kept[2 * n])
                before, d, own = uncouple(block, x1, x2, d1, d2, kept[2 * n + 1])
                x1, x2, d1, d2, grads = before, x1, d2, d, own + grads
        random_state(y.device, now)
        return d1 + d2, None, None, *grads
