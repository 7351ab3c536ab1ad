"""The trained weights in memtx_minimal/weights: their commands, and the page on them.

    python book/weights.py           list the commands that trained them (`make weights`)
    python book/weights.py --page    write book/weights.md, from the JSON beside them

This is the only place where the commands stand; a test compares them with the JSON
files, and the page with what --page would write. To train a model anew, remove its two
files, run its command in the repository's root, and write the page.
"""

import argparse
import json

import sync

from memtx_minimal import checkpoints, training

PAGE = sync.ROOT / "book" / "weights.md"
TRIALS = sync.ROOT / "book" / "weights_trials.json"
FOLDER = "memtx_minimal/weights"
ALWAYS = "--holdout 0.05 --device cpu --threads 1"
OPTIONS = {  # the rest of the command, by model
    "vanilla_transformer": (
        "--steps 1500 --batch-size 16 --segment-len 128 --warmup 200 --valid-every 300 "
        "--weight-decay 0.1 --d-ff 576 --dropout 0.1 --bf16"
    ),
    "transformer_xl": (
        "--steps 3300 --batch-size 32 --segment-len 64 --warmup 200 --valid-every 300 "
        "--weight-decay 0.1 --dropout 0.1 --bf16"
    ),
    "compressive_transformer": (
        "--steps 2200 --batch-size 32 --segment-len 64 --warmup 200 --valid-every 200 "
        "--weight-decay 0.1 --d-ff 256 --dropout 0.1 --bf16"
    ),
    "feedback_transformer": (
        "--steps 1500 --batch-size 32 --segment-len 32 --warmup 100 --valid-every 300 "
        "--weight-decay 0.1 --d-ff 672"
    ),
    "reformer": (
        "--steps 2400 --batch-size 8 --segment-len 128 --warmup 200 --valid-every 300 "
        "--weight-decay 0.1 --d-ff 624 --bf16"
    ),
}
TITLES = {
    "vanilla_transformer": "Vanilla transformer",
    "transformer_xl": "Transformer-XL",
    "compressive_transformer": "Compressive Transformer",
    "feedback_transformer": "Feedback Transformer",
    "reformer": "Reformer",
}
NOT_FOR = {  # besides what none of them is good for
    "vanilla_transformer": (
        "It sees its window and nothing before it. The first characters of a window "
        "are read with hardly any context, and generation reads the window again for "
        "each character."
    ),
    "transformer_xl": (
        "It does not reach back without end: what has left the memory of the lowest "
        "layer can be seen only through what higher layers made of it."
    ),
    "compressive_transformer": (
        "Many of its parameters compress, so its layers are narrower than those of "
        "the others: at this size it is no proof for or against compression."
    ),
    "feedback_transformer": (
        "It takes one step after the other, so it read the least text in its time. "
        "Do not hold its loss against those of models that read more."
    ),
    "reformer": (
        "It has no memory from one segment to the next, and does not read more than "
        "its axial positions hold at once. Its texts are short here, where exact "
        "attention would cost little. Hashing draws random rotations: two readings of "
        "one text can differ."
    ),
}
HEAD = """\
# Trained weights

<!-- Written by `python book/weights.py --page` from memtx_minimal/weights/*.json -->

Five models come with the package, trained for longer than a chapter waits. Load one by
its name; no network is needed:

```python
import memtx_minimal
from memtx_minimal.training import generate

model, vocab = memtx_minimal.load("transformer_xl")
print(vocab.decode(generate(model, vocab.encode("ROMEO:"), 200, temperature=0.8)))
```

They are models of single characters, trained on {corpus}, and they have about the same
number of parameters. The loss is the mean over the whole validation text, in nats per
character; *million read* counts the characters of the training, those read twice too. A
model that has a memory carries it along; the others see one segment at a time.
"""
TABLE = """
| model | nats | parameters | million read | minutes |
| --- | --- | --- | --- | --- |
"""
CHOICE = """
## How the settings were chosen

The first {share} of the training text, {held_out:,} characters, were held out: no model
was trained on them, so that their loss can tell how long to train, and with how much
dropout. Transformer-XL was tried first, with the last 5 % held out
(`{options}`; the loss is that on the part held out):

| dropout | {steps} |
| --- |{line}
{trials}

The trial with dropout was stopped, as it was behind at the same step: over so little
text, dropout costs. So the models that read the text less than three times have none.
Two longer runs of Transformer-XL were discarded:

| dropout | held out | million characters read | loss held out | validation loss |
| --- | --- | --- | --- | --- |
{discarded}

With little dropout and with more, the losses held out came out alike (though not on the
same part), and the models that read the text more often got a share in between. But the validation loss of
both was far higher. The training text ends with the first pages of *The Taming of the
Shrew*, where the validation text goes on; a model that has not read them does not know
the names. That is the likely cause (it was not tested apart), so it is the start of the
text that is held out now. This was learned from the validation text, and nothing else.
"""
LIMITS = """
## What none of them is good for

- Text that says something. They learned spelling, names, verse and the form of a play.
- Other texts: they know the {n_characters} characters of Tiny Shakespeare, and its
  English.
- Ranking the five architectures. Each was trained once, from one seed, and they did
  not read equally much text.
"""


def command(name):
    """The command that trained a model, one line."""
    out = f"--out {FOLDER}/{name}"
    return f"python -m memtx_minimal.pretrain {name} {out} {OPTIONS[name]} {ALWAYS}"


def broken(line):
    """The same command with an option on each line: a browser would break it at a
    hyphen."""
    return line.replace(" --", " \\\n    --")


def facts(name):
    """The JSON of a model, and what follows from it."""
    info, tensors = checkpoints.read(checkpoints.WEIGHTS / name)
    settings = info["settings"]
    read = settings["batch_size"] * settings["segment_len"] * settings["accumulate"]
    return info | {
        "parameters": sum(tensor.numel() for tensor in tensors.values()),
        "read": info["steps_done"] * read,  # characters, those read twice too
        "minutes": info["seconds"] / 60,
        "cpu_minutes": info["cpu_seconds"] / 60,
        "nats": info["valid"][-1][1],
        "bits": training.bits_per_character(info["valid"][-1][1]),
    }


def card(name, info):
    """The section on a model."""
    sizes = ", ".join(f"`{key}={value}`" for key, value in info["sizes"].items())
    corpus, parts, times = info["corpus"], info["characters"], info["steps_done"]
    curve = ", ".join(f"{nats:.3f} after {step:,}" for step, nats in info["held_out"])
    epochs = info["read"] / parts["train"]
    return f"""
## {TITLES[name]}

```sh
{broken(command(name))}
```

- **Data**: {corpus["name"]}, {parts["train"]:,} characters to train on, \
{parts["held_out"]:,} held out, {parts["valid"]:,} to validate on. SHA-256 of the text:
  `{corpus["sha256"]}`
- **Sizes**: {sizes}; {info["parameters"]:,} parameters
- **Training**: {times:,} steps, {info["read"]:,} characters read, which is \
{epochs:.1f} times the training text; seed {info["seed"]}
- **Loss**: {info["nats"]:.3f} nats ({info["bits"]:.3f} bits) per character on the \
validation text. On the part held out: {curve} steps
- **Time**: {info["cpu_minutes"]:.1f} minutes of one CPU core, with PyTorch \
{info["torch"]} and {info["threads"]} thread; {info["minutes"]:.1f} minutes by the \
clock, on a machine that others used as well
- **Not good for**: {NOT_FOR[name]}
"""


def trials():
    """The words on what was tried, by the names that CHOICE has for them."""
    tried = json.loads(sync.read(TRIALS))
    steps = [step for step, _ in max(tried["held_out"].values(), key=len)]
    rows = []
    for dropout, curve in tried["held_out"].items():
        losses = [f"{nats:.3f}" for _, nats in curve]
        cells = [dropout, *losses, *["stopped"] * (len(steps) - len(curve))]
        rows.append(f"| {' | '.join(cells)} |")
    return {
        "options": tried["options"],
        "steps": " | ".join(f"after {step:,} steps" for step in steps),
        "line": " --- |" * len(steps),
        "trials": "\n".join(rows),
        "discarded": "\n".join(
            f"| {run['dropout']} | {run['part']} | {run['millions']} "
            f"| {run['held_out']:.3f} | {run['valid']:.3f} |"
            for run in tried["discarded"]
        ),
    }


def page():
    """The text of book/weights.md."""
    infos = {name: facts(name) for name in checkpoints.MODELS}
    one = infos["transformer_xl"]  # stands for all in what they share
    parts, share = one["characters"], one["settings"]["holdout"]
    head = HEAD.format(corpus=one["corpus"]["name"])
    rows = [
        f"| {TITLES[name]} | {info['nats']:.3f} | {info['parameters']:,} "
        f"| {info['read'] / 1e6:.1f} | {info['cpu_minutes']:.0f} |"
        for name, info in infos.items()
    ]
    choice = CHOICE.format(
        share=f"{100 * share:.0f} %", held_out=parts["held_out"], **trials()
    )
    limits = LIMITS.format(n_characters=len(one["vocabulary"]))
    cards = [card(name, info) for name, info in infos.items()]
    return "".join([head, TABLE, *(row + "\n" for row in rows), choice, limits, *cards])


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--page", action="store_true", help=f"write {PAGE.name}")
    if parser.parse_args().page:
        PAGE.write_text(page(), encoding="utf-8", newline="\n")
    else:
        print(*map(command, checkpoints.MODELS), sep="\n")


if __name__ == "__main__":
    main()
