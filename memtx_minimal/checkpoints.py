"""Checkpoints: a safetensors file with numbers, a JSON file that says what they are.

    weights/xl.json                  what was trained, on what, how far; the other file
    weights/xl.step-400.safetensors  until training ends: all that it needs to go on
    weights/xl.safetensors           when it has ended: the weights

A checkpoint comes to be at the moment when the JSON file is replaced, after the other
file is safely there. So whatever happens in between, the last good checkpoint stays.
"""

import hashlib
import inspect
import json
import os
from pathlib import Path

import safetensors
import safetensors.torch

from memtx_minimal import __version__, inputs
from memtx_minimal.compressive_transformer import CompressiveTransformer
from memtx_minimal.corpora import Vocabulary
from memtx_minimal.feedback_transformer import FeedbackTransformer
from memtx_minimal.reformer import Reformer
from memtx_minimal.transformer_xl import TransformerXL
from memtx_minimal.vanilla_transformer import VanillaTransformer

FORMAT = 1
WEIGHTS = Path(__file__).with_name("weights")  # of trained models, by their names
MODELS = {
    "vanilla_transformer": VanillaTransformer,
    "transformer_xl": TransformerXL,
    "compressive_transformer": CompressiveTransformer,
    "feedback_transformer": FeedbackTransformer,
    "reformer": Reformer,
}


def load(path):
    """A trained model, in evaluation mode on the CPU, and its vocabulary.

    path: the name of a model in MODELS, as "transformer_xl", for the weights that come
    with the package; or the path of a checkpoint, with or without an ending (write
    "./transformer_xl" for one of that name in the working folder). A checkpoint of a
    training that has not ended gives the model as it was then. FileNotFoundError if
    there is none; ValueError, which says what does not fit, if it is damaged or made
    for other code.
    """
    path = WEIGHTS / path if path in tuple(MODELS) else path
    info, tensors = read(path)
    try:
        model = build(info)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path} does not fit this version: {error}") from error
    if info["file"]["holds"] == "training":
        tensors = part(tensors, "model.")
    try:
        model.load_state_dict(tensors)
    except (
        RuntimeError
    ) as error:  # names what is missing, too much, or of another shape
        raise ValueError(
            f"{path}: the weights do not fit the model: {error}"
        ) from error
    return model.eval(), Vocabulary(info["vocabulary"])


def build(info):
    """The untrained model that a checkpoint's JSON describes."""
    inputs.check_one_of("model", info["model"], MODELS)
    return MODELS[info["model"]](len(info["vocabulary"]), **info["sizes"])


def part(tensors, prefix):
    """Of {name: tensor}, those whose names begin with a prefix, without it."""
    return {
        name[len(prefix) :]: tensor
        for name, tensor in tensors.items()
        if name.startswith(prefix)
    }


def base(path):
    """The path of a checkpoint without an ending."""
    path = Path(path).expanduser()
    return path.with_suffix("") if path.suffix in (".json", ".safetensors") else path


def file(path, ending):
    """A file of the checkpoint: weights/xl and ".json" -> weights/xl.json."""
    return base(path).with_name(base(path).name + ending)


def exists(path):
    """Whether there is a checkpoint."""
    return file(path, ".json").exists()


def read(path):
    """What the JSON of a checkpoint says, and its tensors {name: tensor}, both checked.
    """
    described = file(path, ".json")
    try:
        info = json.loads(described.read_text(encoding="utf-8"))
        name, digest = info["file"]["name"], info["file"]["sha256"]
        if info["format"] > FORMAT:
            raise ValueError(f"made by version {info['version']} of the package: newer")
        [info[key] for key in ("model", "sizes", "vocabulary", "steps_done")]
        inputs.check_one_of("holds", info["file"]["holds"], ("weights", "training"))
    except FileNotFoundError as error:
        there = sorted(p.stem for p in described.parent.glob("*.json"))
        found = f"; checkpoints there: {', '.join(there)}" if there else ""
        trained = f"trained models, by name: {', '.join(MODELS)}"
        raise FileNotFoundError(
            f"no checkpoint {described}{found}; {trained}"
        ) from error
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{described} is damaged ({error!r})") from error
    path = described.with_name(name)
    try:
        content = path.read_bytes()
        if hashlib.sha256(content).hexdigest() != digest:
            raise ValueError(f"{path} is damaged: it is not the file that was written")
        return info, safetensors.torch.load(content)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{path} is missing: {described} names it") from error
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path} is damaged ({error})") from error


def write(path, info, tensors, holds):
    """Make a checkpoint, of info, {name: anything that JSON knows}, and {name: tensor};
    returns what the JSON says.

    holds: "weights", the weights of a training that has ended, or "training", all that
    one needs to go on from info["steps_done"]. OSError if it cannot be written: the
    last good checkpoint is still there.
    """
    step = f".step-{info['steps_done']}" if holds == "training" else ""
    numbers = file(path, f"{step}.safetensors")
    content = safetensors.torch.save(
        {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    )
    digest = hashlib.sha256(content).hexdigest()
    made_by = {"format": FORMAT, "version": __version__}
    info = made_by | info | made_by  # on top, and as of now
    info["file"] = {"name": numbers.name, "sha256": digest, "holds": holds}
    lines = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in info.items()]
    try:
        numbers.parent.mkdir(parents=True, exist_ok=True)
        replace(numbers, content)
        text = "{\n" + ",\n".join(lines) + "\n}\n"
        replace(file(path, ".json"), text.encode("utf-8"))
    except OSError as error:
        raise OSError(
            f"the checkpoint {numbers} of {len(content):,} bytes cannot be written "
            f"({error.strerror or error}); the last good one stays"
        ) from error
    for old in numbers.parent.glob(base(path).name + ".step-*.safetensors"):
        if old != numbers:
            old.unlink(missing_ok=True)
    return info


def replace(path, content):
    """Write all of a file, down to the disk, or leave it as it was."""
    part = path.with_name(f".{path.name}.part")
    try:
        with open(part, "wb") as out:
            out.write(content)
            out.flush()
            os.fsync(out.fileno())
        os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def sizes_of(name):
    """The sizes of a model but for vocab_size, and their defaults: {name: default}."""
    parameters = inspect.signature(MODELS[name]).parameters.values()
    return {p.name: p.default for p in parameters if p.name != "vocab_size"}
