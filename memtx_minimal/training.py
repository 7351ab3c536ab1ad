"""One visible loop for all the models: train on a stream, evaluate along it, generate
from it.

All that is asked of a model: `logits, memory, *aux = model(tokens, memory)`. The memory
is handed from one segment to the next and never looked into; aux are losses to be added
to the cross-entropy.
"""

import math
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from memtx_minimal import inputs
from memtx_minimal.corpora import lanes


def best_device():
    """CUDA, else Apple's MPS, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def device_of(model):
    """Where the model's parameters lie."""
    return next(model.parameters()).device


def autocast(device):
    """bfloat16 matrix products on CUDA, float32 everywhere else."""
    if device.type != "cuda":
        return nullcontext()
    return torch.autocast(device.type, torch.bfloat16)


def unwrapped(model):
    """The model inside wrappers that call it `module`, as DistributedDataParallel does."""
    while isinstance(getattr(model, "module", None), nn.Module):
        model = model.module
    return model


def warmup_cosine(step, steps, warmup):
    """Factor on the learning rate: up from 0 to 1 in `warmup` steps, then half a cosine
    down."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def endless(stream, batch_size, segment_len):
    """(tokens, targets, at_start) over and over; at_start: the stream starts anew."""
    while True:
        for k, (tokens, targets) in enumerate(lanes(stream, batch_size, segment_len)):
            yield tokens, targets, k == 0


def batches(stream, device, batch_size, segment_len):
    """What a model is trained on, (tokens, targets, at_start): a stream (N,) in lanes,
    over and over, or what an iterator yields, as long as it does."""
    if isinstance(stream, torch.Tensor):
        stream = endless(stream.to(device), batch_size, segment_len)
    valid = "pass a tensor (N,), or an iterator of (tokens, targets, at_start)"
    if not hasattr(stream, "__iter__"):
        raise ValueError(f"{stream!r} is no stream: {valid}")
    for batch in stream:
        if not isinstance(batch, (tuple, list)) or len(batch) < 3:
            raise ValueError(f"the stream yields a {type(batch).__name__}: {valid}")
        yield batch[0].to(device), batch[1].to(device), batch[2]


def adamw(model, lr, weight_decay):
    """AdamW that decays matrices alone: no biases, no norms, no embeddings."""
    inputs.check_number("lr", lr, 0)
    inputs.check_number("weight_decay", weight_decay, 0)
    matrices = {
        m.weight for m in model.modules() if isinstance(m, (nn.Linear, nn.Conv1d))
    }
    matrices -= {m.weight for m in model.modules() if isinstance(m, nn.Embedding)}
    rest = [p for p in model.parameters() if p not in matrices]
    groups = [
        {
            "params": [p for p in model.parameters() if p in matrices],
            "weight_decay": weight_decay,
        },
        {"params": rest, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([group for group in groups if group["params"]], lr=lr)


def clip_groups(model):
    """Lists of parameters whose gradients are clipped apart: one, unless the model says
    more.

    A model that trains a part with a loss of its own says so by a method `clip_groups`:
    the size of one loss then never changes the step that another takes.
    """
    model = unwrapped(model)
    return (
        model.clip_groups()
        if hasattr(model, "clip_groups")
        else [list(model.parameters())]
    )


def cross_entropy(logits, targets):
    """Nats per target, over the targets that count: those that are not -100.

    logits (B, T, vocab_size), targets (B, T) -> scalar; 0 if none counts.
    """
    total = F.cross_entropy(
        logits.float().flatten(0, 1), targets.flatten(), reduction="sum"
    )
    return total / (targets != -100).sum().clamp(min=1)


def check_finite(losses, step, lr):
    """FloatingPointError, with the likely cause, if a loss is not a finite number."""
    if not all(loss.isfinite() for loss in losses):
        values = ", ".join(f"{loss.item():.4g}" for loss in losses)
        cause = (
            f"lower lr ({lr})"
            if step
            else "the weights were not finite before any step"
        )
        raise FloatingPointError(f"loss {values} at step {step}: {cause}")


def bits_per_character(nats):
    """A loss in nats per character in bits, as papers on characters give it."""
    return nats / math.log(2)


class Groups(list):
    """A memory of streams that did not all start together: (rows, their memory) for
    each group of streams that did."""


def read(model, tokens, memory, at_start=False):
    """A segment by the model: logits (B, T, vocab_size), memory, losses.

    at_start, a bool or one for each stream (B,), forgets what came before. Streams with
    memories of unequal length are read apart, so that each sees what it would see
    alone; as soon as their lengths agree, they are read together again.
    """
    starts = torch.as_tensor(at_start).cpu().expand(len(tokens))  # (B,)
    if starts.all():
        return model(tokens, None)
    if not isinstance(memory, Groups):
        if not starts.any():
            return model(tokens, memory)
        memory = Groups([(torch.arange(len(tokens)), memory)])
    groups = {}  # by the shapes of their memories, of which None is one
    if starts.any():
        groups[None] = [(torch.where(starts)[0], None)]
    for rows, past in memory:
        go_on = ~starts[rows]
        if go_on.any():
            past = by_tensor(lambda m: m[go_on], past)
            groups.setdefault(shapes(past), []).append((rows[go_on], past))
    memory, outputs = Groups(), []
    for group in groups.values():
        rows, pasts = (
            torch.cat([rows for rows, _ in group]),
            [past for _, past in group],
        )
        past = by_tensor(lambda *parts: torch.cat(parts), *pasts)
        logits, past, *aux = model(tokens[rows], past)
        memory.append((rows, past))
        outputs.append((logits, [len(rows) / len(tokens) * loss for loss in aux]))
    order = torch.cat([rows for rows, _ in memory]).argsort()
    logits = torch.cat([logits for logits, _ in outputs])[order]
    aux = [sum(losses) for losses in zip(*(aux for _, aux in outputs))]
    if len(memory) == 1:
        memory = by_tensor(lambda m: m[order], memory[0][1])
    return logits, memory, *aux


def by_tensor(work, *memories):
    """Memories of one form -> a memory of that form, made of them tensor by tensor."""
    first = memories[0]
    if isinstance(first, torch.Tensor):
        return work(*memories)
    if first is None:
        return None
    return type(first)(by_tensor(work, *parts) for parts in zip(*memories))


def shapes(memory):
    """The shapes of a memory's tensors, but for the number of streams."""
    if isinstance(memory, torch.Tensor):
        return tuple(memory.shape[1:])
    return memory and tuple(shapes(part) for part in memory)


def train(
    model, stream, *, steps, batch_size=32, segment_len=64, lr=3e-3, warmup=50,
    weight_decay=0.01, clip=1.0, valid=None, valid_every=None, progress=True,
):  # fmt: skip
    """Train a model on a stream of tokens (N,), in place, memory going along.

    In place of a stream you may pass an iterator of (tokens, targets, at_start, ...),
    such as a task made up as it goes; it ends the training where it ends. Targets of
    -100 do not count. at_start, one bool or one for each stream (B,), forgets the
    memory. AdamW, no decay on norms, biases and embeddings; warm-up and cosine;
    gradients clipped at `clip`. With `valid`, another stream, the model is evaluated
    every `valid_every` steps and at the end, in segments as long as those of the
    training. Returns the history: "loss", nats per token, one a step (nan where no
    target counted); "aux", a tuple of the other losses, one a step; "valid", [(steps
    done, nats per token), ...]. A loss that is not finite raises FloatingPointError.
    Ctrl-C returns the history so far.
    """
    sizes = {"batch_size": batch_size, "segment_len": segment_len}
    whole = {"steps": steps, "warmup": warmup, "valid_every": valid_every}
    inputs.check_sizes(sizes | whole)
    inputs.check_positive("clip", clip)
    device, memory = device_of(model), None
    history = {"loss": [], "aux": [], "valid": []}
    optimizer = adamw(model, lr, weight_decay)
    bar = tqdm(range(steps), leave=False, disable=not progress, mininterval=0.5)
    model.train()
    try:
        for step, batch in zip(bar, batches(stream, device, **sizes)):
            tokens, targets, at_start = batch
            for group in optimizer.param_groups:
                group["lr"] = lr * warmup_cosine(step, steps, warmup)
            with autocast(device):
                logits, memory, *aux = read(model, tokens, memory, at_start)
            loss = cross_entropy(logits, targets)
            check_finite([loss, *aux], step, lr)
            counts = bool((targets != -100).any())
            if counts or aux:
                optimizer.zero_grad()
                sum(aux, loss).backward()
                for parameters in clip_groups(model):
                    nn.utils.clip_grad_norm_(parameters, clip)
                optimizer.step()

            history["loss"].append(loss.item() if counts else math.nan)
            history["aux"].append(tuple(value.item() for value in aux))
            bar.set_postfix_str(f"loss {history['loss'][-1]:.3f}", refresh=False)
            if valid_every and (step + 1) % valid_every == 0:
                validate(model, valid, history, sizes)
        if valid is not None:
            validate(model, valid, history, sizes)
        if len(history["loss"]) < steps:
            print(f"the stream ended after {len(history['loss'])} of {steps} steps")
    except KeyboardInterrupt:
        print(f"stopped after {len(history['loss'])} of {steps} steps")
    model.eval()
    return history


def validate(model, valid, history, sizes):
    """Append the loss along another stream to the history, once a step."""
    step = len(history["loss"])
    if [done for done, _ in history["valid"][-1:]] != [step]:
        fitting = sizes | {"batch_size": min(sizes["batch_size"], len(valid) - 1)}
        history["valid"].append((step, evaluate(model, valid, **fitting)))
        model.train()


@torch.inference_mode()
def token_losses(model, stream, *, batch_size=32, segment_len=64):
    """Loss of each token of the stream's lanes, (batch_size, tokens a lane), in nats,
    on the CPU.

    The stream is read once from its start; the memory goes along, and is nobody else's.
    """
    device, memory, losses = device_of(model), None, []
    model.eval()
    for tokens, targets in lanes(stream.to(device), batch_size, segment_len):
        with autocast(device):
            logits, memory, *_ = model(tokens, memory)
        losses.append(
            F.cross_entropy(logits.float().mT, targets, reduction="none")
        )  # (B, T)
    return torch.cat(losses, dim=1).cpu()


def evaluate(model, stream, *, batch_size=32, segment_len=64):
    """Mean loss along a stream in nats per token, memory going along from segment to
    segment."""
    return (
        token_losses(model, stream, batch_size=batch_size, segment_len=segment_len)
        .mean()
        .item()
    )


def remembers(memory):
    """Whether a memory holds anything."""
    if isinstance(memory, torch.Tensor):
        return memory.numel() > 0
    return isinstance(memory, (list, tuple)) and any(map(remembers, memory))


@torch.inference_mode()
def generate(
    model, prompt, n_tokens, *, temperature=1.0, top_k=None, seed=0, stop=None
):
    """Continue a prompt (N,), or several of one length (B, N), by n_tokens sampled
    tokens.

    Returns prompt and continuation, (N + n_tokens,) or (B, N + n_tokens), on the CPU. A
    model with memory is fed each token once; one without reads its last max_len tokens,
    or all, anew for each. temperature 0 takes the likeliest token; top_k keeps only the
    k likeliest. A text ends with the token `stop`; where others go on, it is filled up
    with that token, and when all have ended, so does the generation.
    """
    if (
        not isinstance(prompt, torch.Tensor)
        or prompt.dim() not in (1, 2)
        or not prompt.numel()
    ):
        raise ValueError(
            "the prompt must be tokens (N,) or (B, N), N >= 1, in a tensor"
        )
    inputs.check_sizes({"n_tokens": n_tokens, "top_k": top_k})
    inputs.check_number("temperature", temperature, 0)
    model.eval()
    device = device_of(model)
    generator = torch.Generator().manual_seed(seed)
    text, memory = torch.atleast_2d(prompt).to(device), None  # (B, N)
    window = getattr(unwrapped(model), "max_len", text.size(1) + n_tokens)
    ended = torch.zeros(len(text), 1, dtype=torch.bool)
    for _ in range(n_tokens):
        unread = text[:, -1:] if remembers(memory) else text[:, -window:]
        with autocast(device):
            logits, memory, *_ = model(unread, memory)
        scores = logits[:, -1].float().cpu()  # (B, vocab_size)
        if top_k is not None:
            least = scores.topk(min(top_k, scores.size(-1))).values[:, -1:]
            scores[scores < least] = -math.inf
        if temperature == 0:
            new = scores.argmax(dim=-1, keepdim=True)  # (B, 1)
        else:
            new = torch.multinomial(
                (scores / temperature).softmax(-1), 1, generator=generator
            )
        if stop is not None:
            new[ended] = stop
            ended |= new == stop
        text = torch.cat([text, new.to(device)], dim=1)
        if ended.all():
            break
    return text.view(*prompt.shape[:-1], -1).cpu()
