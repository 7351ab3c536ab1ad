"""The explorer in a browser: what stands over the text is what the models read."""

import math
import re

import matplotlib
import pytest
import torch

matplotlib.use("Agg")

from test_reads import KINDS, VOCAB, reads_of  # noqa: E402

from memtx_minimal import figures  # noqa: E402

N = 22
WIDTHS = [(1280, 800), (390, 800)]
THEMES = {"light": ("#323232", "#ffffff"), "dark": ("#ced6dd", "#14181e")}  # the book's


@pytest.fixture(scope="module")
def reads():
    return {name: reads_of(name, N) for name in KINDS}


@pytest.fixture
def opened(page, reads, monkeypatch):
    """Opens two explorers of all models in one page, of some width and theme."""
    bundles = []
    take = lambda bundle, raw, metadata: bundles.append(bundle)  # noqa: E731
    monkeypatch.setattr(figures, "display", take)

    def at(size=WIDTHS[0], theme="light", script=True):
        for at in (9, 3):
            figures.explorer(reads, VOCAB, at=at)
        ink, paper = THEMES[theme]
        body = "".join(bundle["text/html"] for bundle in bundles)
        if not script:
            body = re.sub("(?s)<script>.*?</script>", "", body)
        page.set_viewport_size({"width": size[0], "height": size[1]})
        page.set_content(
            f'<!doctype html><html lang="en"><title>Two</title>'
            f'<body style="color: {ink}; background: {paper}">{body}'
        )
        if script:
            page.wait_for_selector(".memtx-explorer.started >> nth=1")
        return page.locator(".memtx-explorer").first

    return at


def panel(explorer, name):
    return explorer.locator("section").nth(list(KINDS).index(name))


def drawn(explorer, name):
    """What stands over each character: its zone and its height in pixels."""
    return panel(explorer, name).evaluate(
        """section => [...section.querySelectorAll("[role=option]")].map(span => {
          const bar = span.querySelector("i");
          return bar && [bar.style.getPropertyValue("--zone"),
                         bar.getBoundingClientRect().height];
        })"""
    )


def due(one, t, layer, head):
    """The zone and the share of each character by the attention weights themselves."""
    weights, buckets, chunks = one.weights[t][layer], one.buckets, one.chunks
    read = weights.mean(dim=0) if head is None else weights[head]
    shares = [None] * N
    zones = [zone for zone, _, _, n in one.slots[t] for _ in range(n)]
    for zone, slot, share in zip(zones, one.stands_for(t), read.tolist()):
        if zone == "bucket":  # found in some round?
            same = buckets[layer, ..., t] == buckets[layer, ..., slot[0]]
            gap = chunks[layer, ..., t] - chunks[layer, ..., slot[0]]
            found = (same & (gap >= 0) & (gap <= 1)).any(dim=0)  # (H,)
            if not (found.any() if head is None else found[head]):
                continue
        for place in slot:
            shares[place] = zone, share
    return shares


def check(explorer, one, name, t, layer, head):
    here = panel(explorer, name).locator(".here")
    assert here.get_attribute("data-t") == str(t)
    shown, shares = drawn(explorer, name), due(one, t, layer, head)
    most = max((share for _, share in filter(None, shares)), default=0)
    highest = max((height for _, height in filter(None, shown)), default=0)
    assert (highest > 10) == (most > 0)
    for bar, due_here in zip(shown, shares, strict=True):
        assert (bar is None) == (due_here is None)
        if bar:
            assert bar[0] == f"var(--{due_here[0]})"
            assert abs(bar[1] / highest - due_here[1] / most) < 0.02


@pytest.mark.parametrize("size", WIDTHS)
@pytest.mark.parametrize("name", KINDS)
def test_bars_over_the_text_are_the_attention_weights(opened, reads, name, size):
    explorer, one = opened(size), reads[name]
    check(explorer, one, name, 9, layer=2, head=None)
    own = panel(explorer, name)
    for t, layer, head in [(0, 2, None), (13, 0, 1), (21, 1, 0)]:
        own.get_by_label("layer of").select_option(label=str(layer + 1))
        chosen = "all" if head is None else str(head + 1)
        own.get_by_label("head of").select_option(label=chosen)
        own.locator(f"[data-t='{t}']").hover()
        check(explorer, one, name, t, layer, head)
        other = next(n for n in KINDS if n != name)  # goes along
        check(explorer, reads[other], other, t, layer=2, head=None)


def test_it_works_in_a_sandboxed_frame_as_in_colab(page, reads, monkeypatch):
    bundles = []
    monkeypatch.setattr(figures, "display", lambda bundle, **_: bundles.append(bundle))
    figures.explorer({"Feedback": reads["Feedback"]}, VOCAB, at=9)
    page.set_content("<!doctype html><title>Outputs</title><iframe width=700 height=900>")
    page.locator("iframe").evaluate(
        """(frame, body) => {
          frame.sandbox = "allow-scripts";  // an origin of its own, no storage, no parent
          frame.srcdoc = "<!doctype html><body>" + body;
        }""",
        bundles[0]["text/html"],
    )
    frame = page.frame_locator("iframe")
    frame.locator(".memtx-explorer.started").wait_for()
    here, one = frame.locator("[data-t='13']"), reads["Feedback"]
    here.hover()
    assert "here" in here.get_attribute("class")
    shares = due(one, 13, 2, None)
    bars = frame.locator("[role=option]:has(i)")
    assert bars.count() == sum(share is not None for share in shares) > 0


def test_all_layers_together_are_their_mean(opened, reads):
    explorer = opened()
    panel(explorer, "Transformer-XL").get_by_label("layer of").select_option("all")
    shown = drawn(explorer, "Transformer-XL")
    mean = reads["Transformer-XL"].weights[9].mean(dim=(0, 1))
    heights = torch.tensor([height for _, height in filter(None, shown)])
    near = {"atol": 0.02, "rtol": 0}
    torch.testing.assert_close(heights / heights.max(), mean / mean.max(), **near)


def test_the_keyboard_steps_and_words_say_what_is_read(opened, reads, page):
    explorer = opened()
    own = panel(explorer, "Compressive")
    assert own.locator("[tabindex='0']").count() == 1
    own.locator("[tabindex='0']").focus()
    steps = [10, 9, 21, 21, 0, 0, 21]
    keys = "Right", "Left", "End", "Right", "Home", "Left", "End"
    for key, t in zip(keys, steps):
        page.keyboard.press(key if key in ("Home", "End") else f"Arrow{key}")
        assert page.evaluate("document.activeElement.dataset.t") == str(t)
        check(explorer, reads["Compressive"], "Compressive", t, layer=2, head=None)
    assert own.locator("[tabindex='0']").count() == 1
    said = explorer.locator("[aria-live=polite]").text_content()
    assert said.startswith("Compressive: ") and "at 21 reads most: " in said
    one = reads["Compressive"]
    slots = one.stands_for(21)
    best = one.weights[21][2].mean(dim=0).argmax()
    share, slot = one.weights[21][2].mean(dim=0)[best].item(), slots[best]
    first = said.split("reads most: ")[1].split(";")[0]
    place = f"at {slot[0]} " if len(slot) == 1 else f"{slot[0]} to {slot[-1]} "
    assert place in first and f"({round(100 * share)} %)" in first
    page.keyboard.press("Home")
    page.keyboard.press("ArrowDown")  # a short text is one line: nowhere to go
    assert page.evaluate("document.activeElement.dataset.t") == "0"


def test_the_zones_say_what_the_model_has_and_how_much_it_reads(opened, reads):
    explorer = opened()
    panel(explorer, "Compressive").locator("[data-t='21']").hover()
    lines = panel(explorer, "Compressive").locator(".lines div").all_inner_texts()
    one, lines = reads["Compressive"], [" ".join(line.split()) for line in lines]
    read, start = one.weights[21][2].mean(dim=0), 0
    for zone, _, width, n in one.slots[21]:
        begins = "this segment" if zone == "segment" else zone
        (line,) = [line for line in lines if line.startswith(begins)]
        share = read[start : start + n].sum().item()
        assert re.search(rf": {n} \w+", line)
        assert abs(int(re.search(r"(\d+) %$", line)[1]) - 100 * share) <= 1.5
        start += n
    samples = panel(explorer, "Compressive").locator(".lines i")
    heights = samples.evaluate_all("all => all.map(i => getComputedStyle(i).borderBottom)")
    assert len(heights) == 3 and all(one.startswith("3px solid") for one in heights)
    gone = 22 - sum(width * n for *_, width, n in one.slots[21])
    assert f"grey, before it: {gone} characters out of reach" in lines


def test_a_click_holds_a_slider_steps_and_play_goes_on(opened, page):
    explorer = opened()
    own = panel(explorer, "vanilla")
    own.locator("[data-t='5']").click()
    own.locator("[data-t='12']").hover()
    assert own.locator(".here").get_attribute("data-t") == "5"
    own.locator("[data-t='5']").click()
    own.locator("[data-t='12']").hover()
    assert own.locator(".here").get_attribute("data-t") == "12"
    explorer.locator("input").fill("7")
    assert own.locator(".here").get_attribute("data-t") == "7"
    explorer.locator("button").click()
    assert explorer.locator("button").text_content() == "Pause"
    own.locator(".here[data-t='21']").wait_for()  # to the end
    explorer.get_by_role("button", name="Play").wait_for()


def test_a_finger_moves_on_where_a_mouse_is_held(opened):
    own = panel(opened(WIDTHS[1]), "vanilla")
    own.locator("[data-t='5']").click()
    box = own.locator("[data-t='12']").bounding_box()
    place = {"clientX": box["x"] + 3, "clientY": box["y"] + 3, "bubbles": True}
    for kind, t in [("mouse", "5"), ("touch", "12")]:
        where = own.locator("[data-t='5']")  # a finger's events stay where it came down
        where.dispatch_event("pointermove", place | {"pointerType": kind})
        assert own.locator(".here").get_attribute("data-t") == t


def luminance(color):
    r, g, b = (
        c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in color
    )
    return 0.2126 * r + 0.7152 * g + 0.0722 * b


def contrast(one, other):
    dark, light = sorted((luminance(one), luminance(other)))
    return (light + 0.05) / (dark + 0.05)


def as_painted(page, colors, paper):
    """Colours of any notation, laid over the paper: (r, g, b), each 0 ... 1."""
    return page.evaluate(
        """([colors, paper]) => colors.map(color => {
          const context = document.createElement("canvas").getContext("2d");
          for (context.fillStyle of [paper, color]) context.fillRect(0, 0, 1, 1);
          const [r, g, b] = context.getImageData(0, 0, 1, 1).data;
          return [r / 255, g / 255, b / 255];
        })""",
        [colors, paper],
    )


@pytest.mark.parametrize("theme", THEMES)
def test_text_and_bars_are_seen_in_the_light_and_in_the_dark(opened, page, theme):
    explorer = opened(theme=theme)
    paper = THEMES[theme][1]
    for pick, style, least in [
        ("[role=option], .lines div, p, label, select, output, button", "color", 4.5),
        (".text i", "backgroundColor", 3),
        (".lines i", "borderBottomColor", 3),
    ]:
        each = "(all, style) => all.map(one => getComputedStyle(one)[style])"
        colors = sorted(set(explorer.locator(pick).evaluate_all(each, style)))
        assert colors
        for color in as_painted(page, colors, paper):
            assert contrast(color, as_painted(page, [paper], paper)[0]) >= least


@pytest.mark.parametrize("size", WIDTHS)
def test_models_stand_beside_or_below_each_other_and_fit(opened, page, size):
    explorer = opened(size)
    width, inside = page.evaluate("[innerWidth, document.documentElement.scrollWidth]")
    assert inside <= width
    boxes = [panel(explorer, name).bounding_box() for name in KINDS]
    beside = math.isclose(boxes[0]["y"], boxes[1]["y"])
    assert beside == (size[0] == 1280)
    page.emulate_media(media="print")
    assert explorer.locator("img").is_visible()
    assert not explorer.locator(".live").is_visible()


def test_nothing_moves_under_the_pointer(opened):
    explorer = opened(WIDTHS[1])  # where words take one line or three
    places = set()
    for t in (0, 9, 21):
        explorer.locator("input").fill(str(t))
        texts = [panel(explorer, name).locator(".text") for name in KINDS]
        places.add(tuple(text.bounding_box()["y"] for text in texts))
    assert len(places) == 1


def test_two_in_one_page_go_their_own_ways(opened, page):
    explorer = opened()
    second = page.locator(".memtx-explorer").nth(1)
    assert panel(second, "vanilla").locator(".here").get_attribute("data-t") == "3"
    panel(explorer, "vanilla").locator("[data-t='12']").hover()
    assert panel(second, "vanilla").locator(".here").get_attribute("data-t") == "3"


def test_without_script_the_picture_stands_in(opened):
    explorer = opened(script=False)
    picture = explorer.locator("img")
    assert picture.is_visible() and picture.evaluate("img => img.naturalWidth") > 500
    assert "at 9 reads in the top layer" in picture.get_attribute("alt")
