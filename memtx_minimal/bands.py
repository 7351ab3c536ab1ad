"""What several seeds gave, recorded beforehand, to hold a live run against.

    band = load("01_ablation", text=corpus.name)
    figures.points(axes, live, band.values, ...)  # the live run upon the seeds, in grey
    band.check(live, margin=0.03)

Whoever has the repository records a band anew with `make record NAME=01_ablation`.

Letters of the shapes: n seeds, and in place of the dots the shape of a label's value.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

FOLDER = Path(__file__).with_name("recorded")


def names():
    """Of all bands that are recorded."""
    return sorted(path.stem for path in FOLDER.glob("*.json"))


def read(name):
    """All that is recorded with a band, as it stands in the file."""
    if name not in names():
        raise ValueError(f"no band {name!r} is recorded, only {', '.join(names())}")
    return json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))


def load(name, text):
    """A band by its name, for a live run on the text of this name; None: on no text.

    If the band was recorded on another text, it says nothing about the live run: that
    is printed, and the band that comes back has no seeds.
    """
    record = read(name)
    seeds = record["seeds"]
    if text != record["text"]:
        print(f"no band for {text}: {name} was recorded on {record['text']}")
        seeds = []
    values = {
        label: np.asarray(value, dtype=float)[: len(seeds)]
        for label, value in record["values"].items()
    }
    return Band(name, tuple(seeds), values)


@dataclass(frozen=True, eq=False)
class Band:
    """The values of each seed: {label: (n, ...)}. With no seeds there is nothing to
    draw, and every check passes."""

    name: str
    seeds: tuple
    values: dict

    def low(self, label):
        """The lowest value of any seed, (...)."""
        return self.values[label].min(axis=0, initial=np.inf)

    def high(self, label):
        """The highest value of any seed, (...)."""
        return self.values[label].max(axis=0, initial=-np.inf)

    def check(self, live, margin):
        """AssertionError unless each live value, {label: (...)}, lies in the band,
        widened by `margin` on both sides."""
        if not margin >= 0:
            raise ValueError(f"{margin=} is not a number >= 0")
        if unknown := [label for label in live if label not in self.values]:
            known = ", ".join(map(repr, self.values))
            raise ValueError(f"{self.name} has no {unknown[0]!r}: it has {known}")
        for label, value in live.items() if self.seeds else ():
            low, high, value = self.low(label), self.high(label), np.asarray(value)
            if value.shape != low.shape:
                raise ValueError(
                    f"{label!r} has the shape {value.shape}, in {self.name} {low.shape}"
                )
            inside = (low - margin <= value) & (value <= high + margin)
            for place in np.argwhere(~inside).tolist():  # the first says enough
                at = tuple(place)
                raise AssertionError(
                    f"{label}{place or ''}: {value[at]:.5g} is outside of "
                    f"{low[at]:.5g} ... {high[at]:.5g}, the span of "
                    f"{len(self.seeds)} seeds in {self.name}, widened by {margin}"
                )
