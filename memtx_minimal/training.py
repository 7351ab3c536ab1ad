"""One visible loop for all the models: train on a stream, evaluate along it, generate from it.

All that is asked of a model: `logits, memory, *aux = model(tokens, memory)`. The memory is handed from one
segment to the next and never looked into; aux are losses to be added to the cross-entropy.
"""

import math

import torch
import torch.nn.functional as F
from tqdm import tqdm

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
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


def warmup_cosine(step, steps, warmup):
    """Factor on the learning rate: a line from 0 to 1 over `warmup` steps, then half a cosine down to 0."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def endless(stream, batch_size, segment_len):
    """(tokens, targets, at_start) over and over; at_start is True where the stream starts anew."""
    while True:
        for k, (tokens, targets) in enumerate(lanes(stream, batch_size, segment_len)):
            yield tokens, targets, k == 0


def clip_groups(model):
    """Lists of parameters whose gradients are clipped apart: all in one, unless the model says otherwise.

    A model that trains a part with a loss of its own says so by a method `clip_groups`: the size of one
    loss then never changes the step that another takes.
    """
    return model.clip_groups() if hasattr(model, "clip_groups") else [list(model.parameters())]


def train(
    model, stream, *, steps, batch_size=32, segment_len=64, lr=3e-3, warmup=50,
    weight_decay=0.01, clip=1.0, valid=None, valid_every=None, progress=True,
):  # fmt: skip
    """Train a model on a stream of token ids (N,), in place, with memory from segment to segment.

    In place of a stream you may pass an endless iterator of (tokens, targets, at_start, ...), such as a
    task made up as it goes; targets of -100 do not count, and at_start True forgets the memory.
    AdamW, warm-up and cosine decay, gradients clipped at norm `clip`. With `valid` (another stream)
    the model is evaluated every `valid_every` steps and after the last, in as many lanes and in
    segments as long as those of the training. Returns the history:
    {"loss": nats per token, one a step; "valid": [(steps done, nats per token), ...]}.
    A loss that is not finite raises FloatingPointError. Ctrl-C returns the history so far.
    """
    device, history, memory = device_of(model), {"loss": [], "valid": []}, None
    if isinstance(stream, torch.Tensor):
        stream = endless(stream.to(device), batch_size, segment_len)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=weight_decay)
    bar = tqdm(range(steps), leave=False, disable=not progress, mininterval=0.5)
    model.train()
    try:
        for step in bar:
            tokens, targets, at_start, *_ = next(stream)
            tokens, targets = tokens.to(device), targets.to(device)
            if at_start:
                memory = None
            for group in optimizer.param_groups:
                group["lr"] = lr * warmup_cosine(step, steps, warmup)
            with autocast(device):
                logits, memory, *aux = model(tokens, memory)
            loss = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())
            if not all(value.isfinite() for value in (loss, *aux)):
                raise FloatingPointError(
                    f"loss {loss.item()} at step {step}: lower lr ({lr}) or clip ({clip})"
                )
            optimizer.zero_grad()
            sum(aux, loss).backward()
            for parameters in clip_groups(model):
                torch.nn.utils.clip_grad_norm_(parameters, clip)
            optimizer.step()

            history["loss"].append(loss.item())
            bar.set_postfix_str(f"loss {loss.item():.3f}", refresh=False)
            if valid is not None and (
                (valid_every and (step + 1) % valid_every == 0) or step + 1 == steps
            ):
                sizes = dict(batch_size=min(batch_size, len(valid) - 1), segment_len=segment_len)
                history["valid"].append((step + 1, evaluate(model, valid, **sizes)))
                model.train()
    except KeyboardInterrupt:
        print(f"stopped after {len(history['loss'])} of {steps} steps")
    model.eval()
    return history


@torch.inference_mode()
def token_losses(model, stream, *, batch_size=32, segment_len=64):
    """Loss of every token of the stream's lanes, (batch_size, tokens a lane), in nats, on the CPU.

    The stream is read once from its start; the memory goes along, and is nobody else's.
    """
    device, memory, losses = device_of(model), None, []
    model.eval()
    for tokens, targets in lanes(stream.to(device), batch_size, segment_len):
        with autocast(device):
            logits, memory, *_ = model(tokens, memory)
        losses.append(F.cross_entropy(logits.float().mT, targets, reduction="none"))  # (B, T)
    return torch.cat(losses, dim=1).cpu()


def evaluate(model, stream, *, batch_size=32, segment_len=64):
    """Mean loss along a stream in nats per token, with memory from segment to segment."""
    return token_losses(model, stream, batch_size=batch_size, segment_len=segment_len).mean().item()


@torch.inference_mode()
def generate(model, prompt, n_tokens, *, temperature=1.0, top_k=None, seed=0):
    """Continue a prompt (N,) of token ids by n_tokens sampled ones; returns prompt and continuation.

    A model with memory is fed each token once; one without re-reads its last max_len tokens at every
    step. temperature 0 takes the likeliest token; top_k keeps only the k likeliest.
    """
    if len(prompt) == 0:
        raise ValueError("the prompt is empty: give at least one token")
    if temperature < 0 or (top_k is not None and top_k < 1):
        raise ValueError(f"temperature {temperature} must be >= 0 and top_k {top_k} >= 1 (or None)")
    model.eval()
    device = device_of(model)
    generator = torch.Generator().manual_seed(seed)
    window = getattr(model, "max_len", len(prompt) + n_tokens)
    text, memory = prompt.to(device), None
    unread = text[-window:]
    for _ in range(n_tokens):
        logits, memory, *_ = model(unread[None], memory)
        scores = logits[0, -1].float().cpu()  # (vocab_size,)
        if top_k is not None:
            scores[scores < scores.topk(min(top_k, len(scores))).values[-1]] = -math.inf
        if temperature == 0:
            new = scores.argmax(dim=-1, keepdim=True)
        else:
            new = torch.multinomial((scores / temperature).softmax(-1), 1, generator=generator)
        text = torch.cat([text, new.to(device)])
        unread = text[-window:] if memory is None else text[-1:]
    return text.cpu()
