"""Each check of the browser fails on its fault: the fault is made in a page, and found."""

import checks
import pytest

# (check, width, what is done to the page)
FAULTS = {
    "code is cut": (checks.wide, 1280, "style", "pre { white-space: pre !important; overflow: hidden } pre code, pre span { font-size: 3rem }"),
    "88 columns have no room": (checks.wraps, 1280, "style", ".bd-article-container { max-width: 500px !important }"),
    "an equation is cut": (checks.wide, 390, "html", "<div class='math' style='display:block'><div style='width: 900px'>x</div></div>"),
    "a table hides that more follows": (checks.wide, 390, "html", "<div class='pst-scrollable-table-container'><table><tr><td style='background: #eee !important; min-width: 900px'>x</td></tr></table></div>"),
    "an equation is too small": (checks.small, 390, "html", "<div class='math' style='display: block'><svg width='900px' height='20px'></svg></div>"),
    "code loses its indentation": (checks.outdented, 390, "style", ".bd-article pre.lines > .line { text-indent: 4ch !important }"),
    "a button covers a picture": (checks.covered, 390, "html", "<figure class='player'><img src='data:image/gif;base64,R0lGODlhAQABAAAAACw=' alt='x' style='height: 90px'><button style='margin-top: -60px'>x</button></figure>"),
    "an arrow is squeezed": (checks.covered, 390, "style", ".prev-next-footer svg.icon { width: 3px !important }"),
    "an equation is wrong": (checks.equations, 390, "html", "<span class='math'><mjx-container><mjx-merror title='Undefined'></mjx-merror></mjx-container></span>"),
    "an equation is not set": (checks.equations, 390, "html", r"<span class='math'>\(x\)</span>"),
    "the page is too wide": (checks.wide, 390, "html", "<p style='width: 600px'>x</p>"),
    "a picture is too wide": (checks.wide, 390, "style", ".bd-article img { max-width: none !important; width: 900px }"),
    "a year has become a list": (checks.lists, 390, "html", "<ol start='2022'><li>Block-Recurrent</li></ol>"),
    "an animation moves by itself": (checks.moves, 390, "html", "<img src='data:image/gif;base64,R0lGODlhAQABAAAAACw=' alt='x'>"),
    "print clips": (checks.clipped_in_print, 1280, "style", "pre { white-space: pre !important; overflow: auto !important; font-size: 3rem !important }"),
    "print leaves frames": (checks.clipped_in_print, 1280, "style", ".bd-article details.hide { display: block !important }"),
    "print folds answers": (checks.clipped_in_print, 1280, "style", "details::details-content { content-visibility: hidden !important; display: none !important }"),
    "a button has no name": (checks.axe, 1280, "html", "<button></button>"),
    "a list has other children": (checks.axe, 1280, "html", "<ul><div>x</div></ul>"),
    "grey on grey": (checks.axe, 1280, "style", ".bd-article p { color: #bbb }"),
    "a caption is faint": (checks.faint, 1280, "html", "<div style='background: #fff linear-gradient(#fff, #eee)'><table><caption style='color: #ccc'>x</caption></table></div>"),
    "a picture has no words": (checks.axe, 390, "html", "<img src='data:image/gif;base64,R0lGODlhAQABAAAAACw='>"),
}  # fmt: skip


@pytest.fixture(scope="module")
def sound(browser, folder):
    page = browser.new_page()
    page.set_default_timeout(120_000)
    yield page
    page.close()


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_found(sound, folder, fault):
    check, width, kind, what = FAULTS[fault]
    sound.goto(f"{folder}/notebooks/b_fast_lsh.html")
    assert not checks.equations(sound)
    checks.set_size(sound, width)
    if check is not checks.axe:  # for axe, test_pages sees that nothing is found
        assert not check(sound)
    else:
        sound.evaluate("document.querySelectorAll('div.cell').forEach((cell) => cell.remove())")
    if kind == "style":
        sound.add_style_tag(content=what)
    else:
        sound.evaluate("(html) => document.querySelector('article section').insertAdjacentHTML('beforeend', html)", what)
    assert check(sound)


def test_what_goes_wrong_on_a_page_is_seen(browser, site):
    page = browser.new_page()
    faults = checks.watch(page)
    page.goto(f"{site}/index.html")
    assert not faults
    page.evaluate("console.error('oh'); setTimeout(() => { throw new Error('ah') })")
    page.evaluate("fetch('https://example.org/x').catch(() => 0)")
    page.evaluate("fetch('/nowhere.js').catch(() => 0)")
    page.wait_for_timeout(300)
    text = "\n".join(faults)
    assert "oh" in text and "ah" in text and "example.org" in text and "404" in text
    page.close()
