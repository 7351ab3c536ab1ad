"""What only a GPU can show: right results there, and the speed. At most six minutes.

    python tests/gpu.py
    python tests/gpu.py --device cpu --quick     the same code, tried without a card

Prints a line for each check, "ok" or "FAILED", and a table of tokens a second. Where
OUT is set in the environment, OUT/gpu.md gets them too. Exit status 1 if any failed.
"""

import argparse
import copy
import os
import statistics
import sys
import time
from contextlib import contextmanager, nullcontext
from pathlib import Path
from unittest import mock

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import sides

from memtx_minimal import fast_feedback, fast_lsh, training
from memtx_minimal.checkpoints import MODELS

SMALL = dict(vocab_size=11, d_model=16, n_heads=2, n_layers=3, d_ff=32)
SMALL_T = 12  # a multiple of 4
CPU = torch.device("cpu")


def options(T):
    """What each model is built with, beside the sizes, for segments of T tokens."""
    return {
        "vanilla_transformer": dict(max_len=T),
        "transformer_xl": dict(mem_len=T),
        "compressive_transformer": dict(mem_len=T, compressed_len=T),
        "feedback_transformer": dict(mem_len=T),
        "reformer": dict(chunk_len=T // 4, axial_shape=(4, T // 4)),
    }


OWN_BACKWARD = {  # a backward pass of our own, and autograd's: how to make each
    "reversible layers": (
        lambda: small("reformer", dropout=0.2),
        lambda: small("reformer", dropout=0.2, reversible=False),
    ),
    "fast_lsh": (
        lambda: fast_lsh.speed_up(small("reformer")),
        lambda: small("reformer"),
    ),
    "fast_feedback": (
        lambda: fast_feedback.speed_up(small("feedback_transformer")),
        lambda: small("feedback_transformer"),
    ),
}


def small(name, **more):
    """A small model on the CPU, every parameter random, biases too."""
    torch.manual_seed(0)
    model = MODELS[name](**SMALL, **options(SMALL_T)[name] | more)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    return model


def some_tokens(B, T, vocab_size=SMALL["vocab_size"]):
    return torch.randint(vocab_size, (B, T), generator=torch.Generator().manual_seed(1))


# Memories, whatever their form.


def tensors(memory):
    """The tensors in a memory."""
    if isinstance(memory, torch.Tensor):
        return [memory]
    parts = memory if isinstance(memory, (list, tuple)) else []
    return [tensor for part in parts for tensor in tensors(part)]


def moved(memory, device):
    """The memory on another device."""
    if isinstance(memory, torch.Tensor):
        return memory.to(device)
    if not isinstance(memory, (list, tuple)):
        return memory
    parts = [moved(part, device) for part in memory]
    return type(memory)(*parts) if hasattr(memory, "_fields") else type(memory)(parts)


# (a) Right results.

lines, failed = [], []


def say(line):
    print(line, flush=True)
    lines.append(line)


@contextmanager
def check(device, name):
    """Say whether what stands inside went well; go on in any case."""
    try:
        yield
        wait(device)
    except Exception as error:
        failed.append(name)
        message = " ".join(str(error).split())[:300]
        say(f"FAILED {name}: {type(error).__name__}: {message}")
    else:
        say(f"ok     {name}")


def wait(device):
    """Until the device has done all that it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def float32():
    """training.generate uses bfloat16 on CUDA; not in here."""
    return mock.patch.object(training, "autocast", lambda device: nullcontext())


def learned(model, device):
    """Two segments, memory going along, and one backward pass: logits, memory,
    gradients and the states of the random numbers afterwards."""
    torch.manual_seed(2)
    model = copy.deepcopy(model).to(device).train()
    text = some_tokens(3, 2 * SMALL_T + 1).to(device)
    logits, memory, total = [], None, 0
    for start in (0, SMALL_T):
        tokens, targets = (text[:, n : n + SMALL_T] for n in (start, start + 1))
        out, memory, *aux = model(tokens, memory)
        total = total + sum(aux, training.cross_entropy(out, targets))
        logits.append(out.detach())
    total.backward()
    states = [torch.get_rng_state()]
    if device.type == "cuda":
        states.append(torch.cuda.get_rng_state(device))
    grads = {name: p.grad for name, p in model.named_parameters()}
    return torch.cat(logits, dim=1), tensors(memory), grads, states


def assert_same(ours, theirs):
    """Logits, memories and gradients agree, but for rounding."""
    torch.testing.assert_close(ours[0].cpu(), theirs[0].cpu(), rtol=1e-3, atol=1e-4)
    assert len(ours[1]) == len(theirs[1]), "memories of different form"
    for a, b in zip(ours[1], theirs[1]):
        torch.testing.assert_close(a.cpu(), b.cpu(), rtol=1e-3, atol=1e-4)
    largest = max(float(grad.abs().max()) for grad in theirs[2].values())
    for name, grad in theirs[2].items():
        assert ours[2][name] is not None, f"{name} has no gradient"
        torch.testing.assert_close(
            ours[2][name].cpu(), grad.cpu(), rtol=1e-3, atol=1e-4 * largest,
            msg=lambda message: f"gradient of {name}: {message}",
        )  # fmt: skip


def check_model(name, device):
    model, T = small(name), SMALL_T
    with check(device, f"{name}: forward and backward as on the CPU"):
        assert_same(learned(model, device), learned(model, CPU))

    there, text = copy.deepcopy(model).to(device).eval(), some_tokens(3, T).to(device)
    with check(device, f"{name}: generation as on the CPU"), float32():
        prompts = some_tokens(3, T)
        ours = training.generate(there, prompts, 2 * T, temperature=0)
        theirs = training.generate(model, prompts, 2 * T, temperature=0)
        assert torch.equal(ours, theirs), f"{ours.tolist()} not {theirs.tolist()}"

    with check(device, f"{name}: a token outside the vocabulary is refused"):
        wrong = text.clone()
        wrong[-1, -1] = SMALL["vocab_size"]
        assert_refused(there, text, lambda: there(wrong), "vocabulary")
        wrong[-1, -1] = -1
        assert_refused(there, text, lambda: there(wrong), "vocabulary")

    if tensors(model(text.cpu())[1]):  # it has a memory
        with check(device, f"{name}: memory stays on the device"):
            for grad in (True, False):
                with torch.set_grad_enabled(grad):
                    _, memory, *_ = there(text)
                    _, memory, *_ = there(text, memory)
                assert {m.device.type for m in tensors(memory)} == {device.type}

        other = "cpu" if device.type == "cuda" else "meta"
        with check(device, f"{name}: a memory of another device is refused"):
            for grad in (True, False):
                with torch.set_grad_enabled(grad):
                    away = moved(there(text)[1], other)
                    assert_refused(there, text, lambda: there(text, away), other)


def assert_refused(model, text, call, word):
    """A ValueError with the word in it; and the device still works."""
    before = model(text)[0]
    try:
        call()
    except ValueError as error:
        assert word in str(error), f"ValueError without {word!r}: {error}"
    else:
        raise AssertionError("no ValueError")
    wait(torch.device(before.device))
    torch.testing.assert_close(model(text)[0], before)


def check_training(name, device):
    kind = "bfloat16" if device.type == "cuda" else "float32"
    cycle = torch.arange(2000) % SMALL["vocab_size"]
    model = small(name).to(device)
    sizes = dict(steps=60, batch_size=8, segment_len=SMALL_T)
    with check(device, f"{name}: training in {kind} brings the loss down"):
        torch.manual_seed(0)
        history = training.train(
            model, cycle, **sizes, lr=1e-2, warmup=5, progress=False
        )
        first, last = history["loss"][0], statistics.mean(history["loss"][-5:])
        assert last < first / 2, f"from {first:.3f} to {last:.3f}"
        text = training.generate(model, cycle[:SMALL_T], 5, temperature=0)
        assert len(text) == SMALL_T + 5


def check_own_backward(what, make, make_plain, device):
    model, plain = make(), make_plain()
    with check(device, f"{what}: equal to ordinary autograd"):
        ours, theirs = learned(model, device), learned(plain, device)
        assert_same(ours, theirs)
    with check(device, f"{what}: leaves the same random state"):
        assert all(map(torch.equal, ours[3], theirs[3]))


# (b) Speed.


class Decoder(nn.Module):
    """PyTorch's own layers as a language model, to compare with."""

    def __init__(self, vocab_size, d_model, n_heads, n_layers, d_ff, max_len):
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, d_model)
        self.positions = nn.Embedding(max_len, d_model)
        layer = nn.TransformerEncoderLayer(
            d_model, n_heads, d_ff, dropout=0.0, batch_first=True, norm_first=True
        )
        self.layers = nn.TransformerEncoder(
            layer, n_layers, norm=nn.LayerNorm(d_model), enable_nested_tensor=False
        )
        self.head = nn.Linear(d_model, vocab_size)
        mask = nn.Transformer.generate_square_subsequent_mask(max_len)
        self.register_buffer("mask", mask)

    def forward(self, tokens, memory=None):
        T = tokens.size(1)
        x = self.embedding(tokens) + self.positions.weight[:T]
        x = self.layers(x, mask=self.mask[:T, :T], is_causal=True)
        return self.head(x), None


def built(name, sizes, T):
    torch.manual_seed(0)
    if name == "PyTorch's decoder":
        return Decoder(**sizes, max_len=T)
    return MODELS[name](**sizes, **options(T)[name])


def autocast(device, dtype):
    if dtype == torch.float32:
        return nullcontext()
    return torch.autocast(device.type, dtype)


def training_step(model, device, dtype, batch_size, T, vocab_size):
    """A function that takes one step of training; and its tokens."""
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=3e-4)
    text, memory = some_tokens(batch_size, T + 1, vocab_size).to(device), None

    def step():
        nonlocal memory
        with autocast(device, dtype):
            logits, memory, *aux = model(text[:, :-1], memory)
        loss = sum(aux, training.cross_entropy(logits, text[:, 1:]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step, batch_size * T


def generation_step(model, device, dtype, batch_size, T, vocab_size):
    """A function that generates one token of one text, after 2 * T; and its tokens.

    A model without memory reads the last T tokens anew.
    """
    model.eval()
    text, memory = some_tokens(1, T, vocab_size).to(device), None

    @torch.inference_mode()
    def step(unread=None):
        nonlocal text, memory
        if unread is None:
            unread = text[:, -1:] if training.remembers(memory) else text
        with autocast(device, dtype):
            logits, memory, *_ = model(unread, memory)
        text = torch.cat([text, logits[:, -1:].argmax(dim=-1)], dim=1)[:, -T:]

    for _ in range(2):
        step(some_tokens(1, T, vocab_size).to(device))
    return step, 1


def seconds(step, n, device):
    """Of one step, the mean of n."""
    wait(device)
    start = time.perf_counter()
    for _ in range(n):
        step()
    wait(device)
    return (time.perf_counter() - start) / n


def speeds(work, device, dtype, sizes, T, batch_size, rounds, span):
    """Tokens a second {name: median of the rounds}; the models take turns. A round of
    one model takes `span` seconds, or one step."""
    kind = f"{device.type}, {str(dtype).removeprefix('torch.')}"
    ready, times = {}, {}
    for name in [*MODELS, "PyTorch's decoder"]:
        with check(device, f"{name}: {work.__name__}, {kind}"):
            model = built(name, sizes, T).to(device)
            vocab_size = sizes["vocab_size"]
            step, tokens = work(model, device, dtype, batch_size, T, vocab_size)
            seconds(step, 3, device)  # warm up, and fill the memory
            n = max(1, int(span / seconds(step, 1, device)))
            ready[name], times[name] = (step, tokens, n), []
    for _ in range(rounds):
        for name, (step, tokens, n) in ready.items():
            times[name].append(tokens / seconds(step, n, device))
    return {name: statistics.median(rates) for name, rates in times.items()}


def table(device, quick):
    """The speeds as a Markdown table, and what was measured in words."""
    sizes = {"vocab_size": sides.VOCAB} | sides.SIZE
    T, batch_size = sides.T, sides.BATCH
    rounds, span = 5, 0.4
    if quick:
        sizes, T, batch_size, rounds, span = SMALL, SMALL_T, 2, 2, 0.0
    where = [(CPU, torch.float32), (device, torch.float32), (device, torch.bfloat16)]
    columns = {}
    for work in (training_step, generation_step):
        for at, dtype in dict.fromkeys(where):
            title = f"{work.__name__.removesuffix('_step')}, {at.type}, {dtype}"
            columns[title.replace("torch.", "")] = speeds(
                work, at, dtype, sizes, T, batch_size, rounds, span
            )
    rows = ["| | " + " | ".join(columns) + " |", "| --- |" + " ---: |" * len(columns)]
    for name in [*MODELS, "PyTorch's decoder"]:
        cells = [f"{c[name]:,.0f}" if name in c else "failed" for c in columns.values()]
        rows.append(f"| {name} | " + " | ".join(cells) + " |")
    card = "CPU"
    if device.type == "cuda":
        card = torch.cuda.get_device_name(device)
    shown = ", ".join(f"{name} {size}" for name, size in sizes.items())
    built_with = "; ".join(
        f"{name} " + ", ".join(f"{key} {value}" for key, value in more.items())
        for name, more in options(T).items()
    )
    words = (
        f"Tokens a second on {card}, torch {torch.__version__}, medians of {rounds} "
        f"rounds; CPU threads: {torch.get_num_threads()}; TF32 off. {shown}. Training: "
        f"batch {batch_size}, segments of {T}, forward, backward, AdamW. Generation: "
        f"one text, a token at a time after {2 * T}; models without memory read the "
        f"last {T} tokens anew. Options: {built_with}."
    )
    return "\n".join([words, "", *rows])


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, two rounds")
    args = parser.parse_args()
    device, start = torch.device(args.device), time.perf_counter()
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error("no CUDA here; --device cpu --quick tries the code without")
    torch.set_float32_matmul_precision("highest")  # no TF32
    torch.backends.cudnn.allow_tf32 = False
    for name in MODELS:
        check_model(name, device)
        check_training(name, device)
    for what, makers in OWN_BACKWARD.items():
        check_own_backward(what, *makers, device)
    say(f"checked in {time.perf_counter() - start:.0f} s")
    report = table(device, args.quick)
    print(f"\n{report}\n")
    end = f"{len(failed)} failed; {time.perf_counter() - start:.0f} s in all"
    print(end)
    if os.environ.get("OUT"):
        out = Path(os.environ["OUT"])
        out.mkdir(parents=True, exist_ok=True)
        checks = "\n".join(["```", *lines, end, "```"])
        (out / "gpu.md").write_text(f"# On a GPU\n\n{report}\n\n{checks}\n", "utf-8")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
