"""Figures show the numbers that they are given, and say in words what they show."""

import io
import re

import matplotlib
import numpy as np
import pytest
from PIL import Image as Picture

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

from memtx_minimal import figures  # noqa: E402


@pytest.fixture
def axes():
    with plt.style.context(figures.STYLE):
        figure, axes = plt.subplots()
        yield axes
        plt.close(figure)


@pytest.fixture
def shown(monkeypatch):
    """What was displayed, instead of displaying it."""
    outputs = []
    monkeypatch.setattr(figures, "display", outputs.append)
    return outputs


def test_curves_hold_their_values_and_names(axes):
    figures.curves(axes, [1, 2, 3], {"a": [4, 5, 6], "b": [7, 8, 9]}, xlabel="x (s)", ylabel="y (m)")
    assert [line.get_ydata().tolist() for line in axes.lines] == [[4, 5, 6], [7, 8, 9]]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["a", "b"]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("x (s)", "y (m)")


def labels(axes):
    return [text.get_text() for text in axes.get_legend().get_texts()]


def test_a_band_spans_its_seeds_beneath_the_live_curve(axes):
    seeds = [[1, 5, 2], [3, 4, 2]]
    figures.band(axes, [1, 2, 3], seeds)
    assert axes.get_legend() is None  # one thing needs no name
    figures.curves(axes, [1, 2, 3], {"live": [2, 4, 2]}, xlabel="x", ylabel="y")
    *grey, live = axes.lines
    assert [line.get_ydata().tolist() for line in grey] == seeds
    (span,) = axes.collections
    corners = {tuple(corner) for corner in span.get_paths()[0].vertices}
    assert {(1, 1), (1, 3), (2, 4), (2, 5), (3, 2)} == corners
    assert all(line.get_zorder() < live.get_zorder() for line in grey)
    assert span.get_zorder() < min(line.get_zorder() for line in grey)
    assert labels(axes) == ["2 recorded seeds", "live"]


def test_points_lie_upon_their_seeds(axes):
    seeds = {"a": [1.0, 1.5, 1.25], "b": [2, 3, 2]}
    figures.points(axes, {"a": 1.2, "b": 2.5}, seeds, xlabel="loss", number="{:.1f}")
    drawn = [[list(axis) for axis in line.get_data()] for line in axes.lines]
    assert drawn == [
        [[1.0, 1.5], [0, 0]], [[1.0, 1.5, 1.25], [0, 0, 0]], [[1.2], [0]],
        [[2, 3], [1, 1]], [[2, 3, 2], [1, 1, 1]], [[2.5], [1]],
    ]  # fmt: skip
    assert [tick.get_text() for tick in axes.get_yticklabels()] == ["a", "b"]
    assert [text.get_text() for text in axes.texts] == ["1.2", "2.5"]
    assert labels(axes) == ["3 recorded seeds", "this run"]
    assert axes.yaxis_inverted() and axes.get_xlabel() == "loss"


def test_points_take_the_colours_of_their_models(axes):
    colors = {"b": figures.COLOUR["Transformer-XL"]}
    figures.points(axes, {"a": 1.2, "b": 2.5}, xlabel="loss", colors=colors)
    assert [line.get_color() for line in axes.lines] == [figures.BLUE, figures.ORANGE]
    assert len(set(figures.COLOUR.values())) == len(figures.COLOUR)  # one a model


def test_no_seeds_draw_nothing(axes):
    figures.band(axes, [1, 2], np.empty((0, 2)))
    assert not axes.lines and not axes.collections
    figures.points(axes, {"a": 1.2}, {"a": np.empty(0)}, xlabel="loss")
    assert len(axes.lines) == 1 and axes.get_legend() is None


def test_smooth_is_a_running_mean():
    assert figures.smooth([1, 2, 3, 10], 2).tolist() == [1.5, 2.5, 6.5]


def test_bars_start_at_zero_and_carry_their_values(axes):
    figures.bars(axes, {"a": 1.7, "b": 2.2}, ylabel="loss")
    assert [bar.get_height() for bar in axes.patches] == [1.7, 2.2]
    assert axes.get_ylim()[0] == 0
    assert [text.get_text() for text in axes.texts] == ["1.70", "2.20"]


def test_matrix_crosses_out_what_is_not_to_be_read(axes):
    image = figures.matrix(axes, [[1, 2], [3, 4]], numbers=True, crossed=[[False, True], [False, False]])
    assert image.get_array().tolist() == [[1, 2], [3, 4]]
    assert [text.get_text() for text in axes.texts] == ["1", "3", "4"]
    assert len(axes.patches) == 1


def test_buckets_are_named_by_their_ages(axes):
    figures.buckets(axes, [0, 1, 4], {"layer 1": [0.25, 0.75]}, xlabel="age", ylabel="share")
    assert [label.get_text() for label in axes.get_xticklabels()] == ["0", "1–3"]
    assert [bar.get_height() for bar in axes.patches] == [0.25, 0.75]


def test_unrolled_draws_one_line_for_each_look(axes):
    figures.unrolled(axes, 2, 4, now=[2, 3], cached=[0, 1], sees=lambda i: range(i + 1))
    assert len(axes.lines) == 2 * (3 + 4)  # layers x (keys of position 2 + keys of position 3)
    from_memory = [line for line in axes.lines if line.get_color() == figures.ORANGE]
    assert len(from_memory) == 2 * (2 + 2)


def test_show_gives_a_picture_with_words_and_closes_the_figure(shown):
    figure, _ = plt.subplots()
    figures.show(figure, "a plot of nothing")
    assert Picture.open(io.BytesIO(shown[0].data)).format == "PNG"
    assert shown[0].alt == "a plot of nothing"
    assert not plt.fignum_exists(figure.number)


def test_animation_has_all_its_frames(shown):
    frames = []
    for n in range(3):
        figure, axes = plt.subplots(figsize=(2, 2))
        axes.plot([0, n])
        frames.append(figure)
    figures.show_animation(frames, "a line that rises", seconds=0.5)
    gif = Picture.open(io.BytesIO(shown[0].data))
    assert (gif.format, gif.n_frames, gif.info["duration"], gif.info["loop"]) == ("GIF", 3, 500, 0)


def test_an_animation_has_a_still_beside_it(shown):
    def drawn():
        for n in range(3):
            figure, axes = plt.subplots(figsize=(2, 2))
            axes.plot([0, n])
            yield figure

    figures.show_animation(list(drawn()), "a line that rises")
    figures.show_animation(list(drawn()), "a line that rises", still=1)
    expected = [figures.png(figure) for figure in drawn()]
    assert [shown[1].data, shown[3].data] == [expected[2], expected[1]]
    assert shown[1].alt == shown[0].alt == "a line that rises"


def test_a_table_has_its_caption_and_every_cell(shown):
    figures.table("the caption", ["model", "loss"], [["a", 1], ["b", "2.50"]])
    html = shown[0].data
    assert "<caption>the caption</caption>" in html and html.count("<tr>") == 3
    assert all(f">{cell}</t" in html for cell in ("model", "loss", "a", 1, "b", "2.50"))


def test_a_table_has_numbers_to_the_right_and_words_to_the_left(shown):
    rows = [["1", "-1.5", "a few words", ""], ["2", "(3 of 4)", "5 words", "7"], ["3", "none", "words", "–"]]
    figures.table("", ["n", "number", "why", "gaps"], rows)
    for line in shown[0].data.split("</tr>")[:-1]:
        assert re.findall(r"text-align: (\w+)", line) == ["left", "right", "left", "right"]


def test_a_table_of_marks_has_them_in_the_middle(shown):
    figures.table("", ["slot", 0, 1], [["got", "0.3", "0.1"], ["kept", "x", ""]])
    for line in shown[0].data.split("</tr>")[:-1]:
        assert re.findall(r"text-align: (\w+)", line) == ["left", "center", "center"]


def test_feedback_unrolled_leads_from_every_earlier_square_to_every_layer(axes):
    figures.unrolled_feedback(axes, 3, now=4)
    lines = [line.get_xydata().tolist() for line in axes.lines if len(line.get_xdata()) == 2]
    assert sorted(lines) == sorted([[j, 4], [4, n]] for j in range(4) for n in (1, 2, 3))


def test_the_four_answers_show_who_reads_what():
    figure = figures.four_answers()
    vanilla, xl, compressive, feedback, reformer = figure.axes
    n_lines = [len(axes.lines) for axes in figure.axes]
    assert n_lines[0] == 2 * (1 + 2 + 3 + 4)  # two layers, four queries
    assert n_lines[1] == n_lines[0] + 2 * 4 * 4 and n_lines[2] == n_lines[1] + 2 * 4 * 2
    assert len(feedback.lines) == 12 + 11 * 2
    assert len(reformer.lines) < 2 * 12 * 13 / 2  # far from all pairs
    assert [axes.get_title()[0] for axes in figure.axes] == list("01234")
    plt.close(figure)


def test_ticks_of_a_logarithmic_axis_are_plain_numbers():
    figure, axes = plt.subplots()
    axes.plot([1, 2, 3], [0.4, 30, 3000])
    axes.set_yscale("log")
    figures.plain_ticks(axes.yaxis)
    figure.canvas.draw()
    low, high = axes.get_ylim()
    shown = [t.get_text() for t in axes.get_yticklabels() if low <= t.get_position()[1] <= high]
    assert shown[:4] == ["0.5", "1", "2", "5"] and shown[-2:] == ["1,000", "2,000"]
    plt.close(figure)


def test_a_legend_below_is_the_only_one():
    figure, (left, right) = plt.subplots(1, 2)
    for axes in (left, right):
        axes.plot([1, 2], label="a")
        figures.band(axes, [0, 1], [[1, 2], [1, 3]])
    figures.legend_below(left)
    assert not left.get_legend() and not right.get_legend() and len(figure.legends) == 1
    assert {text.get_text() for text in figure.legends[0].get_texts()} == {"a", "2 recorded seeds"}
    plt.close(figure)
