"""Numbers in, matplotlib axes out. No model and no training in here.

Each function draws on an axes that it is given, so that a reader can put the pieces together anew.
`show` displays a finished figure, `show_animation` a list of them, both with a text for those who cannot see it.
"""

import base64
import html
import io
import json
import re
import zlib
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from IPython.display import HTML, Image, display
from matplotlib import ticker
from PIL import Image as Picture

STYLE = Path(__file__).with_name("memtx.mplstyle")
BLUE, ORANGE, GREEN, PINK, GREY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#d0d0d0"
DARK_GREY = "#8a8a8a"
COLOUR = {  # of each model, in the whole book
    "vanilla": BLUE, "Transformer-XL": ORANGE, "Compressive": GREEN, "Feedback": PINK,
    "Reformer": "#E69F00",
}  # fmt: skip
ZONES = {  # of what attention can read: the model that brought it, and so its colour
    "segment": "vanilla", "memory": "Transformer-XL", "compressed": "Compressive",
    "vectors": "Feedback", "bucket": "Reformer",
}  # fmt: skip


def use_style():
    """The style sheet of the course, for all figures that follow."""
    plt.style.use(STYLE)


def png(figure):
    """A figure as PNG bytes; the figure is closed."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    plt.close(figure)
    return buffer.getvalue()


def show(figure, alt):
    """Display a figure in the notebook; alt says in words what it shows."""
    width = int(figure.get_figwidth() * 100)
    display(Image(png(figure), format="png", alt=alt, width=width))


def show_animation(figures, alt, seconds=1.2, still=-1):
    """Display figures of equal size as one looping GIF, `seconds` a frame, and figure
    number `still` below it: GitHub, print and readers who want no motion get that."""
    width = int(figures[0].get_figwidth() * 100)
    pictures = [png(figure) for figure in figures]
    frames = [
        Picture.open(io.BytesIO(p)).convert("P", palette=Picture.Palette.ADAPTIVE, colors=32)
        for p in pictures
    ]
    buffer = io.BytesIO()
    frames[0].save(
        buffer, format="gif", save_all=True, append_images=frames[1:], duration=int(1000 * seconds), loop=0, optimize=True,
    )  # fmt: skip
    display(Image(buffer.getvalue(), format="gif", alt=alt, width=width))
    display(Image(pictures[still], format="png", alt=alt, width=width))


def curves(axes, x, ys, *, xlabel, ylabel, marker=None):
    """Several curves over the same x: ys is {label: values}."""
    for label, y in ys.items():
        axes.plot(x, list(y), marker=marker, label=label)
    axes.set(xlabel=xlabel, ylabel=ylabel)
    _legend(axes)


def _legend(axes):
    """Name what is drawn, if it is more than one thing."""
    if len(axes.get_legend_handles_labels()[1]) > 1:
        axes.legend()


def plain_ticks(axis):
    """A logarithmic axis, such as axes.yaxis, with plain numbers at 1, 2 and 5."""
    axis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(lambda x, _: f"{x:,g}")
    axis.set_minor_locator(ticker.NullLocator())


def legend_below(axes):
    """One legend for the whole figure, of what is drawn in `axes`, under it."""
    handles_labels = axes.get_legend_handles_labels()
    for panel in axes.figure.axes:
        if panel.get_legend():
            panel.get_legend().remove()
    where = dict(loc="outside lower center", ncols=2, fontsize=9)
    axes.figure.legend(*handles_labels, **where)


def band(axes, x, values, label="{} recorded seeds"):
    """A curve of several seeds in grey: values (n, len(x)), and what they span.

    Draw the live run's curve over it. If there are no seeds, nothing is drawn."""
    values = np.asarray(values)
    if not len(values):
        return
    axes.plot(x, values.T, color=DARK_GREY, linewidth=0.6, zorder=1.2)
    axes.fill_between(
        x, values.min(axis=0), values.max(axis=0),
        color=GREY, linewidth=0, zorder=1.1, label=label.format(len(values)),
    )  # fmt: skip
    _legend(axes)


def points(axes, values, seeds=None, *, xlabel, number="{:.2f}", colors=None):
    """One value a label, on a line of its own, with its number: values is {label:
    value}.

    seeds is {label: (n,)}, the values of recorded seeds: grey strokes, and what they
    span. colors is {label: colour}, blue where it says nothing. The axis need not begin
    at zero."""
    for row, (label, value) in enumerate(values.items()):
        some = np.asarray((seeds or {}).get(label, ()))
        if len(some):
            name = f"{len(some)} recorded seeds" if not row else None
            span = [some.min(), some.max()]
            axes.plot(
                span, [row, row], color=GREY, linewidth=9, zorder=1.1,
                solid_capstyle="butt",
            )  # fmt: skip
            axes.plot(
                some, [row] * len(some), "|", color=DARK_GREY,
                markersize=16, zorder=1.2, label=name,
            )  # fmt: skip
        name = "this run" if not row else None
        color = (colors or {}).get(label, BLUE)
        axes.plot(value, row, "o", color=color, markersize=7, label=name)
        axes.annotate(
            number.format(value), (value, row), xytext=(0, 11),
            textcoords="offset points", ha="center",
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5},
        )  # fmt: skip
    axes.set_yticks(range(len(values)), labels=list(values))
    axes.set_ylim(len(values) - 0.5, -0.7)  # the first label on top
    axes.margins(x=0.1)
    axes.grid(axis="y", visible=False)
    axes.set(xlabel=xlabel)
    _legend(axes)


def table(caption, header, rows):
    """Display an HTML table: columns of words to the left, of numbers to the right, and
    in the middle where all are short and some are marks."""
    rows = [list(row) for row in rows]
    columns = [[str(cell) for cell in column] for column in zip(*rows)][1:]
    is_number = lambda cell: bool(re.match(r"\W*(\d|$)", cell))

    def side(cells):
        return "right" if 2 * sum(map(is_number, cells)) > len(cells) else "left"

    cells = [cell for column in columns for cell in column]
    if max(map(len, cells), default=4) <= 3 and not all(map(is_number, cells)):
        sides = ["left"] + ["center"] * len(columns)
    else:
        sides = ["left", *map(side, columns)]

    def line(cells, tag):
        cell = '<{0} style="text-align: {1}">{2}</{0}>'
        return "".join(cell.format(tag, side, text) for side, text in zip(sides, cells))

    body = "".join(f"<tr>{line(row, 'td')}</tr>" for row in rows)
    head = f"<thead><tr>{line(header, 'th')}</tr></thead>"
    caption = f"<caption>{caption}</caption>"
    display(HTML(f"<table>{caption}{head}<tbody>{body}</tbody></table>"))


def smooth(values, width):
    """Running mean of a sequence over `width` values; the first width - 1 have no mean and are left out."""
    return np.convolve(values, np.ones(width) / width, mode="valid")


def bars(axes, values, *, ylabel, number="{:.2f}"):
    """One bar a label, from zero, with its value on top: values is {label: value}."""
    shown = axes.bar(list(values), list(values.values()), color=BLUE, width=0.6)
    on_white = {"facecolor": "white", "edgecolor": "none", "pad": 1}  # a line may run behind it
    axes.bar_label(shown, [number.format(v) for v in values.values()], padding=3, bbox=on_white)
    axes.margins(y=0.12)
    axes.grid(axis="x", visible=False)
    axes.set(ylabel=ylabel)


def matrix(
    axes, values, *, title="", xlabel="key", ylabel="query", numbers=False, crossed=None, **imshow
):
    """A matrix as colours, queries down and keys across; entries where `crossed` is True are hidden."""
    values = np.asarray(values, dtype=float)
    crossed = np.zeros(values.shape, bool) if crossed is None else np.asarray(crossed)
    image = axes.imshow(values, aspect="auto", interpolation="nearest", **imshow)
    middle = (np.nanmin(values) + np.nanmax(values)) / 2
    for (i, j), value in np.ndenumerate(values):
        if crossed[i, j]:
            look = dict(facecolor="#eeeeee", edgecolor="#999999", hatch="xxx", linewidth=0)
            axes.add_patch(plt.Rectangle((j - 0.5, i - 0.5), 1, 1, **look))
        elif numbers:
            color = "white" if value < middle else "black"
            axes.text(j, i, f"{value:.0f}", ha="center", va="center", color=color)
    axes.grid(False)
    axes.set(title=title, xlabel=xlabel, ylabel=ylabel)
    return image


def buckets(axes, edges, mass, *, xlabel, ylabel):
    """Attention mass by age: bucket i holds the ages edges[i] <= age < edges[i + 1].

    mass is {label: one value a bucket}; each bucket is a group of bars, one a label.
    """
    n, width = len(edges) - 1, 0.8 / len(mass)
    for k, (label, values) in enumerate(mass.items()):
        middle = np.arange(n) + (k - (len(mass) - 1) / 2) * width
        axes.bar(middle, values, width=width, label=label)
    names = [f"{a}" if b == a + 1 else f"{a}–{b - 1}" for a, b in zip(edges, edges[1:])]
    axes.set_xticks(range(n), labels=names)
    axes.grid(axis="x", visible=False)
    axes.set(xlabel=xlabel, ylabel=ylabel)
    axes.legend()


def rows(text, rows):
    """Characters side by side in rows, one below the other: a new figure.

    rows: (title, order, colours, c): which character comes n-th, the colour of each
    character of the text, and, if not None, the length of chunks: gaps between them,
    and arrows from each chunk to the one before.
    """
    figure, axes = plt.subplots(figsize=(5.4, 0.6 + 0.8 * len(rows)))
    for y, (title, order, colours, c) in enumerate(reversed(rows)):
        axes.text(-0.4, y + 0.42, title)
        for place, i in enumerate(order):
            x = place + (0.7 * (place // c) if c else 0)
            axes.scatter(x, y, marker="s", s=270, color=colours[i])
            look = dict(ha="center", va="center", color="white", fontsize=13)
            axes.text(x, y, text[i], **look)
        for n in range(1, len(text) // c if c else 0):
            here, look = n * (c + 0.7) + (c - 1) / 2, dict(arrowstyle="->", color="black")
            look |= dict(connectionstyle="arc3,rad=-0.12")
            ends = (here - c - 0.7, y - 0.3), (here, y - 0.3)
            axes.annotate("", *ends, arrowprops=look)
    axes.set(xlim=(-0.7, len(text) + 1), ylim=(-0.75, len(rows) - 0.2))
    axes.axis("off")
    return figure


def unrolled(axes, n_layers, n_positions, *, now, cached=(), sees=lambda i: (), title=""):
    """A network unrolled over the text: positions across, layers up (0 is the embedding).

    now      positions whose states are being computed (blue)
    cached   positions whose states are remembered (orange)
    sees(i)  positions that the query at i attends to, one layer below
    """
    for layer in range(1, n_layers + 1):
        for i in now:
            for j in sees(i):
                color = ORANGE if j in cached else BLUE
                axes.plot(
                    [j, i], [layer - 1, layer], color=color, linewidth=0.9, alpha=0.55, zorder=1
                )
    for layer in range(n_layers + 1):
        kept = cached if layer < n_layers else ()  # nobody reads the outputs of the last layer
        colors = [BLUE if i in now else ORANGE if i in kept else GREY for i in range(n_positions)]
        axes.scatter(range(n_positions), [layer] * n_positions, s=60, color=colors, zorder=2)
    axes.set(title=title, xlim=(-0.7, n_positions - 0.3), ylim=(-0.4, n_layers + 0.4))
    axes.set_yticks(
        range(n_layers + 1), labels=["text", *(f"layer {n}" for n in range(1, n_layers + 1))]
    )
    axes.set_xticks([])
    axes.grid(False)
    for spine in axes.spines.values():
        spine.set_visible(False)


def unrolled_feedback(axes, n_layers, *, now):
    """A Feedback Transformer at step `now`: each earlier step has mixed its states into a
    square on top (orange), and each layer of now (blue) reads all squares."""
    top, steps = n_layers + 1, range(now + 1)
    for i in steps:
        color = BLUE if i == now else GREY
        axes.plot([i] * (top + 1), range(top + 1), color=color, linewidth=2.5, zorder=0)
        axes.scatter([i] * top, range(top), s=60, color=color, zorder=2)
        square = BLUE if i == now else ORANGE
        axes.scatter([i], [top], s=80, marker="s", color=square, zorder=2)
    look = {"color": ORANGE, "linewidth": 0.9, "alpha": 0.55, "zorder": 1}
    for j in range(now):
        for layer in range(1, top):
            axes.plot([j, now], [top, layer], **look)
    names = ["text", *(f"layer {n}" for n in range(1, top)), "memory"]
    axes.set_yticks(range(top + 1), labels=names)
    axes.set(title="Feedback: all layers of all steps before", xticks=[])
    axes.set(xlim=(-0.7, now + 0.7), ylim=(-0.4, top + 0.4))
    axes.grid(False)
    axes.spines[:].set_visible(False)


FOUR_ANSWERS = (
    "What the latest tokens read. Vanilla: their window alone. Transformer-XL: also the "
    "states of the segment before, layer by layer. Compressive: also squares that stand "
    "for several older states. Feedback: one square for each earlier step, read by every "
    "layer. Reformer: all tokens in one long window, but only those of the same colour."
)


def four_answers():
    """What a token reads, in the vanilla transformer and in the papers: a new figure."""
    figure, axes = plt.subplots(5, 1, figsize=(6.4, 8.8))
    window, memory, alike = range(8, 12), range(4, 8), [0, 1, 0, 2] * 3
    title = "0 Vanilla: the window is all there is"
    unrolled(axes[0], 2, 12, now=window, sees=lambda i: range(8, i + 1), title=title)
    look = {"now": window, "cached": memory, "sees": lambda i: range(4, i + 1)}
    title = "1 Transformer-XL: and the states of the segment before"
    unrolled(axes[1], 2, 12, title=title, **look)
    title = "2 Compressive: and squares, each made of two older states"
    unrolled(axes[2], 2, 12, title=title, **look)
    for old, layer in [(0.5, 0), (2.5, 0), (0.5, 1), (2.5, 1)]:
        axes[2].scatter([old], [layer], s=110, marker="s", color=GREEN, zorder=3)
        for i in window:
            line = {"color": GREEN, "linewidth": 0.9, "alpha": 0.55, "zorder": 1}
            axes[2].plot([old, i], [layer, layer + 1], **line)
    unrolled_feedback(axes[3], 2, now=11)
    axes[3].set_title("3 Feedback: all layers of all steps before")
    sees = lambda i: [j for j in range(i + 1) if alike[j] == alike[i]]
    title = "4 Reformer: a long window, and only what is alike"
    unrolled(axes[4], 2, 12, now=range(12), sees=sees, title=title)
    colors = [(BLUE, ORANGE, GREEN)[n] for n in alike]
    for line in axes[4].lines:  # from a token of this colour, to one
        line.set_color(colors[line.get_xdata()[0]])
    for layer in range(3):
        axes[4].scatter(range(12), [layer] * 12, s=60, color=colors, zorder=3)
    return figure


# ---------------------------------------------------------------- look inside

EXPLORER = Path(__file__).with_name("explorer.html")
MOST_TOKENS, MOST_BYTES = 400, 300_000


def explorer(reads, vocab, at=None):
    """Display a text in which each character shows what models read at it.

    Point at a character, or step to it with the keys: a bar stands over each slot that
    is read, a tray under each slot that the model has, all across the characters that
    it stands for.

        tokens = corpus.valid[:300]
        seen = measure.reads(model, tokens, segment_len=32)
        figures.explorer({"Transformer-XL": seen}, corpus.vocab)

    reads: {name: measure.Reads}, of one text, side by side. A name is one of COLOUR, or
    begins with it: "Transformer-XL, memory of 64". vocab decodes the tokens. at: the
    token shown first, and in the still picture that stands in where no script runs;
    None takes one soon after a segment began. The HTML has at most 300 kB and loads
    nothing. Its weights are less than 1/255 off; where that would be too long, 1/127,
    then 1/63, then it has the mean over the heads alone. ValueError for other names,
    different or overlong texts, and what does not fit.
    """
    for name in reads:
        _colour_of(name)
    if not reads:
        raise ValueError("nothing to show: pass {name: measure.reads(...)}")
    first, *others = reads.values()
    N = len(first.tokens)
    if any(first.tokens.tolist() != other.tokens.tolist() for other in others):
        raise ValueError("the models read different texts: pass the same tokens")
    if not 1 <= N <= MOST_TOKENS:
        raise ValueError(f"a text of {N} tokens: pass 1 to {MOST_TOKENS}")
    if at is None:
        zone, start, *_ = first.slots[-1][-1]
        at = min(start + 2, N - 1) if zone == "segment" and start else 3 * N // 4
    if not 0 <= at < N:
        raise ValueError(f"at={at}: this text has the tokens 0 ... {N - 1}")
    text = [vocab.decode([token]) for token in first.tokens]

    still, alt = _still(reads, text, at), _in_words(reads, text, at)
    width = int(still.get_figwidth() * 100)
    picture = base64.b64encode(_few_colours(png(still))).decode()
    filled = {"ALT": html.escape(alt), "WIDTH": str(width), "STILL": picture}
    page = _page(reads, text, at, filled)
    bundle = {"text/html": page, "image/png": picture, "text/plain": alt}
    about = {"image/png": {"alt": alt, "width": width}}
    display(bundle, raw=True, metadata=about)


def _page(reads, text, at, filled):
    """explorer.html with its places filled in, as exact as fits in MOST_BYTES."""
    zones = "; ".join(f"--{zone}: {COLOUR[name]}" for zone, name in ZONES.items())
    for levels, by_head in (255, True), (127, True), (63, True), (127, False):
        page = EXPLORER.read_text(encoding="utf-8")
        data = _packed(reads, text, at, levels, by_head)
        for name, value in (filled | {"COLOURS": zones, "DATA": data}).items():
            page = page.replace(f"@{name}@", value)
        if len(page.encode()) <= MOST_BYTES:
            return page
    size = f"{len(page.encode()) // 1000} kB, more than {MOST_BYTES // 1000}"
    raise ValueError(f"{size}: fewer models or tokens would fit")


def _colour_of(name):
    for model, colour in COLOUR.items():
        if name == model or name.startswith(model + ","):
            return colour
    raise ValueError(f"{name!r} is not one of {', '.join(COLOUR)}, nor begins with one")


def _packed(reads, text, at, levels, by_head):
    """What explorer.html unpacks: a line of JSON, then the weights, a byte each."""
    models, weights = [], []
    for name, one in reads.items():
        exact = [w.numpy() for w in one.weights]  # (L, H, K) each
        if not by_head:
            exact = [w.mean(axis=1, keepdims=True) for w in exact]
        L, H, _ = exact[0].shape
        numbers = {  # tensors as nested lists
            key: None if (tensor := getattr(one, key)) is None else tensor.tolist()
            for key in ("mixture", "buckets", "chunks")
        }
        rounds = [] if one.buckets is None else list(range(one.buckets.size(1)))
        sizes = {"layers": L, "heads": H, "levels": levels, "rounds": rounds}
        about = {"name": name, "colour": _colour_of(name), "slots": one.slots}
        models.append(about | sizes | numbers)
        flat = np.concatenate([_whole(w, levels) for w in exact], axis=-1)
        weights.append(flat.astype(np.uint8).tobytes())
    line = json.dumps({"text": text, "at": at, "models": models}, separators=(",", ":"))
    packed = zlib.compress(line.encode() + b"\n" + b"".join(weights), level=9)
    return base64.b64encode(packed).decode()


def _whole(weights, levels):
    """Shares of 1 as whole numbers that add up to `levels`, each less than 1 off."""
    exact = weights.astype(float) * levels
    down = np.floor(exact)
    left = levels - down.sum(axis=-1, keepdims=True)  # for the largest remainders
    rank = (down - exact).argsort(axis=-1, kind="stable").argsort(axis=-1)
    return down + (rank < left.round())


def _top_layer(one, t):
    """(zone, first, width, share) of each slot: the mean of the top layer's heads."""
    shares = iter(one.weights[t][-1].mean(dim=0).tolist())
    return [
        (zone, first + width * i, width, next(shares))
        for zone, first, width, n in one.slots[t]
        for i in range(n)
    ]


def _shares(one, t):
    """How much of each zone the top layer reads, in words."""
    share = {}
    for zone, _, _, weight in _top_layer(one, t):
        share[zone] = share.get(zone, 0) + weight
    parts = (f"{zone} {value:.0%}" for zone, value in share.items())
    return ", ".join(parts) or "nothing"


def _in_words(reads, text, at):
    """What the still picture shows, for those who cannot see it."""
    each = ". ".join(f"{name}: {_shares(one, at)}" for name, one in reads.items())
    return f"What {text[at]!r} at {at} reads in the top layer. {each}."


def _few_colours(picture):
    """A PNG with a palette, a third as long."""
    buffer = io.BytesIO()
    whole = Picture.open(io.BytesIO(picture)).convert("RGB")
    few = whole.quantize(64, Picture.Quantize.FASTOCTREE)  # keeps the models' colours
    few.save(buffer, format="png", optimize=True)
    return buffer.getvalue()


def _still(reads, text, at, per_row=75):
    """One moment of the explorer as a picture: a new figure."""
    n_rows = -(-len(text) // per_row)
    figure, every = plt.subplots(
        len(reads), 1, squeeze=False, layout="constrained",
        figsize=(6.4, (0.45 + 0.3 * n_rows) * len(reads)),
    )  # fmt: skip
    for axes, (name, one) in zip(every[:, 0], reads.items()):
        axes.set_title(f"{name}: {_shares(one, at)}", loc="left")
        axes.set(xlim=(-0.5, per_row), ylim=(n_rows - 0.4, -0.8))
        axes.axis("off")
        slots, held = _top_layer(one, at), {at}
        most = max((share for *_, share in slots), default=1)
        for zone, first, width, share in slots:
            if zone == "bucket" and share == 0:
                continue
            color = COLOUR[ZONES[zone]]
            for n in range(first, first + width):
                y, x = divmod(n, per_row)
                sides = x + 0.1 * (n == first), x + 1 - 0.1 * (n == first + width - 1)
                axes.plot(sides, [y + 0.25] * 2, color=color, solid_capstyle="butt")
                height = 0.42 * share / most
                box = (sides[0], y - 0.25 - height), sides[1] - sides[0], height
                axes.add_patch(plt.Rectangle(*box, color=color, linewidth=0))
                held.add(n)
        for n, token in enumerate(text):
            y, x = divmod(n, per_row)
            look = {"family": "monospace", "fontsize": 8.5, "parse_math": False}
            look |= {"ha": "center", "va": "center", "color": "#707070"}
            look |= {"color": "black", "weight": "bold"} if n in held else {}
            axes.text(x + 0.5, y, token.replace("\n", "↵"), **look)
        y, x = divmod(at, per_row)
        here = plt.Rectangle((x, y - 0.24), 1, 0.46, fill=False, color="black")
        axes.add_patch(here)
    return figure
