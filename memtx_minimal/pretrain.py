"""One command that trains a model longer than a notebook waits, and can be interrupted.

    python -m memtx_minimal.pretrain transformer_xl --minutes 30 --out weights/xl

The same command again goes on where it was stopped, by Ctrl-C, by kill, by a power cut,
and ends with the weights of a training that was never stopped. Several processes, GPUs
or machines: `accelerate launch -m` in place of `python -m`; see the book's page on
scale.
"""

import argparse
import math
import os
import shlex
import signal
import statistics
import sys
import time
from contextlib import nullcontext
from dataclasses import replace
from itertools import islice

import torch
from torch import nn
from tqdm import tqdm

from memtx_minimal import checkpoints, corpora, inputs, training

SAVE_SECONDS = 45  # between two checkpoints: a kill costs less than a minute
TIMED = 20  # steps after which --minutes becomes a number of steps


class Alone:
    """One process. `Together` does the same for several."""

    rank, n_ranks = 0, 1

    def __init__(self, bf16=None, device=None, unused=False):
        self.device = torch.device(device) if device else training.best_device()
        self.bf16 = self.device.type == "cuda" if bf16 is None else bf16

    def prepare(self, model):
        return model.to(self.device)

    def autocast(self):
        if not self.bf16:
            return nullcontext()
        return torch.autocast(self.device.type, torch.bfloat16)

    def unsynchronised(self, model):
        """Inside, gradients are not averaged over the processes."""
        return nullcontext()

    def mean(self, values):
        """The mean over the processes of a tensor that each of them has."""
        return values

    def gather(self, tensor):
        """The tensors of all processes, one behind the other along dimension 0."""
        return tensor

    def wait(self):
        """Until all processes have come here."""


class Together(Alone):
    """One of several processes, which average their gradients. By Hugging Face
    Accelerate."""

    def __init__(self, bf16=None, device=None, unused=False):
        try:
            from accelerate import Accelerator, DistributedDataParallelKwargs
        except ImportError as error:
            hint = 'several processes need: pip install "memtx-minimal[scale]"'
            raise ValueError(hint) from error
        accelerator = Accelerator(
            mixed_precision="no",  # autocast is Alone's: no scaled float16 from outside
            cpu=device == "cpu" or not torch.cuda.is_available(),
            kwargs_handlers=[
                DistributedDataParallelKwargs(find_unused_parameters=unused)
            ],
        )
        if accelerator.num_processes == 1 and "MASTER_ADDR" in os.environ:
            raise ValueError(
                "accelerate launch --cpu starts one process, whatever --num_processes "
                "says: pass --multi_gpu in its place, which needs no GPU"
            )
        super().__init__(bf16, accelerator.device)
        self.rank, self.n_ranks = accelerator.process_index, accelerator.num_processes
        self.prepare, self.unsynchronised = accelerator.prepare, accelerator.no_sync
        self.gather, self.wait = accelerator.gather, accelerator.wait_for_everyone
        self.mean = lambda values: accelerator.reduce(values, "mean")


class Run:
    """A training that can stop after any step and go on as if it had not.

    info is what the checkpoint's JSON holds. Each process reads lanes of its own, keeps
    the memory of these alone, and draws random numbers of its own where there is
    dropout.
    """

    def __init__(self, info, corpus, team):
        settings, seed = info["settings"], info["seed"]
        self.info, self.team, self.memory, self.settings = info, team, None, settings
        if settings["batch_size"] % team.n_ranks:
            raise ValueError(
                f"batch_size={settings['batch_size']} lanes do not split evenly over "
                f"{team.n_ranks} processes"
            )
        torch.manual_seed(seed)
        self.model = team.prepare(checkpoints.build(info).train())
        self.bare = training.unwrapped(self.model)
        if team.rank and info["sizes"]["dropout"]:
            torch.manual_seed(seed + 1_000_003 * team.rank)
        self.optimizer = training.adamw(
            self.bare, settings["lr"], settings["weight_decay"]
        )
        self.stream = corpus.train.to(team.device)
        n = settings["batch_size"] // team.n_ranks  # lanes of this process
        self.lanes = slice(n * team.rank, n * (team.rank + 1))

    def batches(self):
        """Segments from where the training stands: tokens, targets, at_start."""
        sizes = self.settings["batch_size"], self.settings["segment_len"]
        done = self.info["steps_done"] * self.settings["accumulate"]
        everyones = islice(training.endless(self.stream, *sizes), done, None)
        for tokens, targets, at_start in everyones:
            yield tokens[self.lanes], targets[self.lanes], at_start

    def step(self, batches):
        """One update, from `accumulate` segments; their mean losses, a tensor."""
        accumulate, step = self.settings["accumulate"], self.info["steps_done"]
        steps = (
            self.info["steps"] or math.inf
        )  # not known yet: at the top of the schedule
        factor = training.warmup_cosine(step, steps, self.settings["warmup"])
        for group in self.optimizer.param_groups:
            group["lr"] = self.settings["lr"] * factor
        losses = 0
        for left in reversed(range(accumulate)):
            tokens, targets, at_start = next(batches)
            memory = None if at_start else self.memory
            with self.team.unsynchronised(self.model) if left else nullcontext():
                with self.team.autocast():
                    logits, self.memory, *aux = self.model(tokens, memory)
                loss = training.cross_entropy(logits, targets)
                training.check_finite([loss, *aux], step, self.settings["lr"])
                (sum(aux, loss) / accumulate).backward()
            losses += torch.stack([value.detach().float() for value in (loss, *aux)])
        for parameters in training.clip_groups(self.bare):
            nn.utils.clip_grad_norm_(parameters, self.settings["clip"])
        self.optimizer.step()
        self.optimizer.zero_grad()
        return losses / accumulate

    def tensors(self):
        """All the numbers of a checkpoint, {name: tensor}; every process has to ask."""
        tensors = {f"model.{name}": t for name, t in self.bare.state_dict().items()}
        for n, state in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{n}.{key}": t for key, t in state.items()}
        leaves = []
        training.by_tensor(leaves.append, self.memory)
        for n, leaf in enumerate(leaves):
            tensors[f"memory.{n:03}"] = self.team.gather(leaf.contiguous())
        for name, numbers in self.random_numbers().items():
            state = numbers.get_rng_state()[None].to(self.team.device)
            tensors[f"random.{name}"] = self.team.gather(state)  # (n_ranks, bytes)
        return tensors

    def random_numbers(self):
        """The sources of random numbers that this training draws from."""
        here = {"cuda": torch.cuda, "mps": torch.mps}.get(self.team.device.type)
        return {"cpu": torch} | ({self.team.device.type: here} if here else {})

    def restore(self, tensors):
        """Take over the numbers of a checkpoint."""
        part, device = checkpoints.part, self.team.device
        self.bare.load_state_dict(part(tensors, "model."))
        optimizer = self.optimizer.state_dict()
        for name, tensor in part(tensors, "optimizer.").items():
            n, key = name.split(".")
            optimizer["state"].setdefault(int(n), {})[key] = tensor
        self.optimizer.load_state_dict(optimizer)
        leaves = iter(sorted(part(tensors, "memory.").items()))
        if self.info["steps_done"]:
            n = self.lanes.stop - self.lanes.start
            tokens = torch.zeros(n, 1, dtype=torch.int64, device=device)
            _, like, *_ = self.bare.eval()(
                tokens
            )  # a memory of the right form, to be filled
            self.bare.train()
            own = lambda _: next(leaves)[1][self.lanes].to(device)  # noqa: E731
            self.memory = training.by_tensor(own, like)
        for name, states in part(tensors, "random.").items():
            numbers = self.random_numbers().get(name)
            if numbers and self.team.rank < len(states):
                state = states[self.team.rank].clone()  # a view is read from row 0 on
                numbers.set_rng_state(state)  # else: another device, a new rank

    def save(self, path, weights_alone=False):
        """Write a checkpoint: all that is needed to go on, or the weights."""
        tensors = self.bare.state_dict() if weights_alone else self.tensors()
        if self.team.rank == 0:
            holds = "weights" if weights_alone else "training"
            self.info |= checkpoints.write(path, self.info, tensors, holds)
        self.team.wait()  # until it is there for all


def validate(run, stream, name="valid"):
    """Note the loss along a stream (N,) under a name, if this step has none yet."""
    step, losses = run.info["steps_done"], run.info[name]
    if [done for done, _ in losses[-1:]] != [step]:
        sizes = {name: run.settings[name] for name in ("batch_size", "segment_len")}
        sizes["batch_size"] = min(sizes["batch_size"], len(stream) - 1)
        nats = 0.0
        if run.team.rank == 0:
            nats = training.evaluate(run.bare, stream, **sizes)
            run.bare.train()
        losses.append([step, round(nats, 4)])
        run.team.wait()


def hold_out(corpus, share):
    """The corpus without the first share of its training text, and that part.

    Not the last: the validation text goes on in the middle of a play, and whoever has
    not read the play's beginning does not know its names.
    """
    inputs.check_number("holdout", share, 0, 0.5)
    n = round(len(corpus.train) * share)
    if share and n < 2:
        raise ValueError(f"holdout={share} of this text is under 2 tokens")
    held_out, train = corpus.train.tensor_split([n])
    return replace(corpus, train=train), held_out


def describe(name, corpus, sizes, settings, seed, command=""):
    """The JSON of a checkpoint before the first step."""
    inputs.check_one_of("model", name, checkpoints.MODELS)
    known = checkpoints.sizes_of(name)
    for size in sizes:
        inputs.check_one_of("size", size, known)
    given = {key: value for key, value in settings.items() if value is not None}
    inputs.check_sizes(given | {"seed": seed})
    if (settings["steps"] is None) == (settings["minutes"] is None):
        raise ValueError("give either steps or minutes")
    if settings["minutes"] is not None:
        inputs.check_positive("minutes", settings["minutes"])
    inputs.check_positive("clip", settings["clip"])
    if "max_len" in known:
        known["max_len"] = settings["segment_len"]
    return {
        "model": name,
        "sizes": {key: plain(value) for key, value in (known | sizes).items()},
        "corpus": {"name": corpus.name, "sha256": corpus.digest},
        "vocabulary": corpus.vocab.characters,
        "seed": seed,
        "settings": {key: plain(value) for key, value in settings.items()},
        "command": command,
        "steps": settings["steps"],
        "steps_done": 0,
        "seconds": 0.0,
        "cpu_seconds": 0.0,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "loss": [],
        "aux": [],
        "held_out": [],
        "valid": [],
    }


def plain(value):
    """A number of numpy as one of Python, a tuple as a list: as JSON gives it back."""
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return value.item() if hasattr(value, "item") else value


def pretrain(
    name, corpus, out, *, steps=None, minutes=None, sizes=None, seed=0, batch_size=32,
    segment_len=64, accumulate=1, lr=3e-3, warmup=50, weight_decay=0.01, clip=1.0,
    valid_every=None, holdout=0.0, bf16=None, device=None, progress=True, command="",
    stop=None,
):  # fmt: skip
    """Train a model of checkpoints.MODELS on a corpus for so many steps, or minutes.

    sizes: of the model, by name. batch_size: lanes in all, which several processes
    share. A step is an update, from `accumulate` segments of each lane. Minutes become
    steps as soon as the speed is known. holdout: the share of the training text, at its
    start, that is not trained on, to choose settings by; the loss noted every
    `valid_every` steps is then that of this part, and the validation text is read only
    at the end. A checkpoint at `out` with the same settings is continued, one with
    others refused. stop() is asked after each step: True saves, and raises
    KeyboardInterrupt. Returns what the JSON of the last checkpoint says.
    """
    settings = {
        "steps": steps, "minutes": minutes, "batch_size": batch_size,
        "segment_len": segment_len, "accumulate": accumulate, "lr": lr,
        "warmup": warmup, "weight_decay": weight_decay, "clip": clip,
        "valid_every": valid_every, "holdout": holdout, "bf16": bf16,
    }  # fmt: skip
    corpus, held_out = hold_out(corpus, holdout)
    info = describe(name, corpus, sizes or {}, settings, seed, command)
    parts = {"train": corpus.train, "held_out": held_out, "valid": corpus.valid}
    info["characters"] = {name: len(stream) for name, stream in parts.items()}
    several = "ACCELERATE_MIXED_PRECISION" in os.environ  # by `accelerate launch`
    several |= int(os.environ.get("WORLD_SIZE", 1)) > 1  # or by `torchrun`
    unused = name == "compressive_transformer"  # whose first segments compress nothing
    team = (Together if several else Alone)(bf16=bf16, device=device, unused=unused)
    tensors = None
    if checkpoints.exists(out):
        found, tensors = checkpoints.read(out)
        refuse_others(out, info, found)
        info = found
        if found["file"]["holds"] == "weights":
            return found
    run = Run(info, corpus, team)
    if tensors is not None:
        run.restore(tensors)
    watched = (held_out, "held_out") if holdout else (corpus.valid, "valid")
    work(run, watched, out, progress, stop or (lambda: False))
    validate(run, *watched)
    validate(run, corpus.valid)
    run.save(out, weights_alone=True)
    return info


def refuse_others(out, asked, found):
    """Refuse to go on with a checkpoint that was made with other settings."""
    for key in ("model", "sizes", "corpus", "vocabulary", "seed", "settings"):
        if asked[key] != found[key]:
            a, b = asked[key], found[key]
            if isinstance(a, dict) and isinstance(b, dict):
                names = [n for n in a | b if a.get(n) != b.get(n)]
                a, b = ({n: d.get(n) for n in names} for d in (a, b))
            raise ValueError(
                f"{out} was made with another {key}: {b}, not {a}. Use the same to go "
                "on, another --out to train anew, or remove it"
            )


def work(run, watched, out, progress, stop):
    """All the steps that are left, with a checkpoint each SAVE_SECONDS; watched: what
    `validate` is asked every `valid_every` steps."""
    info, settings, team = run.info, run.settings, run.team
    batches, times = run.batches(), []
    per_step = settings["batch_size"] * settings["segment_len"] * settings["accumulate"]
    bar = tqdm(
        unit="tokens", unit_scale=True, leave=False, desc=info["model"],
        initial=info["steps_done"] * per_step,
        total=(info["steps"] or 0) * per_step or None,
        mininterval=0.5 if sys.stderr.isatty() else 20,
        disable=not progress or team.rank > 0,
    )  # fmt: skip
    if not info["steps_done"]:
        run.save(
            out
        )  # what cannot be written is better known before than after an hour
    saved = time.monotonic()
    with bar:
        while info["steps"] is None or info["steps_done"] < info["steps"]:
            start, cpu = time.monotonic(), time.process_time()
            losses = run.step(batches)
            times.append(time.monotonic() - start)
            cpu = info["cpu_seconds"] + time.process_time() - cpu
            info["cpu_seconds"] = round(cpu, 3)  # of all threads of this process
            news = [start - saved > SAVE_SECONDS, stop(), times[-1]]
            means = team.mean(torch.cat([losses, losses.new_tensor(news)])).tolist()
            loss, *aux, due, stopped, seconds = (
                means  # all processes do the same with them
            )
            info["steps_done"] += 1
            info["seconds"] = round(info["seconds"] + seconds, 3)
            info["loss"].append(round(loss, 4))
            info["aux"].append([round(value, 6) for value in aux])
            times[-1] = seconds
            if info["steps"] is None and len(times) == TIMED:
                info["steps"] = steps_for(settings["minutes"], info, times)
                bar.total = info["steps"] * per_step
            bar.set_postfix_str(f"loss {loss:.3f}", refresh=False)
            bar.update(per_step)
            every = settings["valid_every"]
            if every and info["steps_done"] % every == 0:
                validate(run, *watched)
            if due > 0 or stopped > 0:
                run.save(out)
                saved = time.monotonic()
            if stopped > 0:
                raise KeyboardInterrupt


def steps_for(minutes, info, times):
    """How many steps fit in so many minutes, as fast as the first steps were."""
    left = 60 * minutes - info["seconds"]
    return info["steps_done"] + max(1, int(left / statistics.median(times[3:])))


OPTIONS = [
    ("seed", 0, "of weights and dropout"),
    ("batch_size", 32, "lanes, shared by all processes"),
    ("segment_len", 64, "tokens in a segment"),
    ("accumulate", 1, "segments in an update"),
    ("lr", 3e-3, "learning rate at its top"),
    ("warmup", 50, "steps up to the top"),
    ("weight_decay", 0.01, "of matrices"),
    ("clip", 1.0, "largest norm of the gradients"),
    ("holdout", 0.0, "share of the training text, its start, to choose settings by"),
]
SIZES = {
    "d_model": "width of a hidden state", "n_heads": "attention heads",
    "n_layers": "layers", "d_ff": "width inside the feed-forward",
    "mem_len": "states remembered", "compressed_len": "compressed states remembered",
    "compression_rate": "old states that become one", "dropout": "share of zeros",
    "compression": "how states are compressed", "loss": "what trains the compression",
    "clamp_len": "distances above it share an encoding", "max_len": "the window",
    "same_length": "each token sees mem_len keys", "chunk_len": "tokens in a chunk",
    "n_rounds": "hash rounds", "axial_shape": "rows and columns of the positions",
    "piece_len": "tokens computed at once in the feed-forward",
    "shared_kv": "one projection to keys and values for all layers",
    "reversible": "keep no activations",
}  # fmt: skip


def parser():
    """The command line: a subcommand for each model, with its sizes."""
    top = argparse.ArgumentParser(
        prog="python -m memtx_minimal.pretrain",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    models = top.add_subparsers(dest="model", required=True, metavar="MODEL")
    for name, cls in checkpoints.MODELS.items():
        about = cls.__doc__.splitlines()[0]
        one = models.add_parser(name, help=about, description=about)
        one.add_argument("--out", required=True, help="the checkpoint: FOLDER/NAME")
        length = one.add_mutually_exclusive_group(required=True)
        length.add_argument("--steps", type=int, help="updates in all")
        length.add_argument(
            "--minutes", type=float, help="as many updates as fit, about"
        )
        run = one.add_argument_group("training")
        for option, default, about in OPTIONS:
            add_option(run, option, default, about)
        run.add_argument(
            "--text", help="a file of your own (default: Tiny Shakespeare)"
        )
        run.add_argument("--valid-every", type=int, help="steps (default: at the end)")
        run.add_argument("--device", help="cpu, cuda or mps (default: the best)")
        run.add_argument("--threads", type=int, help="(default: as torch decides)")
        yes_no = argparse.BooleanOptionalAction
        run.add_argument("--bf16", action=yes_no, help="bfloat16 (default: on CUDA)")
        sizes = one.add_argument_group("sizes")
        for size, default in checkpoints.sizes_of(name).items():
            add_option(sizes, size, default, SIZES.get(size, size), argparse.SUPPRESS)
    return top


def add_option(group, name, default, about, absent=None):
    """An option of the type that its default has; `absent` stands where it is not
    given."""
    if isinstance(default, bool):
        kind = {"action": argparse.BooleanOptionalAction}
    elif isinstance(default, tuple):
        kind = {"type": int, "nargs": len(default)}
    elif isinstance(default, str):
        kind = {"type": lambda word: None if word == "none" else word}
    else:
        kind = {"type": type(default) if default is not None else int}
    shown = "the segment" if name == "max_len" else default
    kind |= {"default": absent or default, "help": f"{about} (default: {shown})"}
    group.add_argument("--" + name.replace("_", "-"), **kind)


def stop_by_signal():
    """Ctrl-C and SIGTERM end the training after the step; a second one at once."""
    caught = []

    def catch(number, _):
        if caught and time.monotonic() - caught[0] > 1:  # launchers send two
            raise KeyboardInterrupt
        caught.append(time.monotonic())

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, catch)
    return lambda: bool(caught)


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    args = vars(parser().parse_args(argv))
    name, out, text = args.pop("model"), args.pop("out"), args.pop("text")
    sizes = {key: args.pop(key) for key in checkpoints.sizes_of(name) if key in args}
    if threads := args.pop("threads"):
        torch.set_num_threads(threads)
    args["stop"] = stop_by_signal()
    try:
        corpus = corpora.from_file(text) if text else corpora.tiny_shakespeare()
        command = shlex.join(["python", "-m", "memtx_minimal.pretrain", *argv])
        info = pretrain(name, corpus, out, sizes=sizes, command=command, **args)
    except KeyboardInterrupt:
        sys.exit("\nstopped; the same command goes on")
    except (ValueError, OSError, FloatingPointError) as error:
        sys.exit(f"error: {error}")
    (_, nats), bits = (
        info["valid"][-1],
        training.bits_per_character(info["valid"][-1][1]),
    )
    if int(os.environ.get("RANK", 0)) == 0:
        print(
            f"{checkpoints.file(out, '.safetensors')}: {info['steps_done']} steps, ",
            end="",
        )
        print(f"validation loss {nats:.3f} nats, {bits:.3f} bits per character")


if __name__ == "__main__":
    main()
