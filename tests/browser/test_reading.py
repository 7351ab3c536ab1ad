"""The book as its readers use it."""

import checks
import pytest

CHAPTER = "notebooks/01_transformer_xl"


@pytest.fixture
def chapter(page, site):
    page.goto(f"{site}/{CHAPTER}.html")
    return page


def test_the_first_screen_says_where_to_start(page, folder):
    page.goto(f"{folder}/index.html")
    for width, height in (1280, 800), (390, 844):
        page.set_viewport_size({"width": width, "height": height})
        start = page.locator("article a[href*='00_attention']").first
        assert start.bounding_box()["y"] < height - 50, width


def test_code_that_draws_is_folded(chapter):
    folded = chapter.locator("details.hide").first
    code = folded.locator("pre").first
    assert folded.locator("summary").inner_text().strip() == "Show the code"
    assert not code.is_visible()
    folded.locator("summary").click()
    assert code.is_visible()
    assert folded.locator("summary").inner_text().strip() == "Hide the code"


def test_code_can_be_copied(chapter, site):
    chapter.context.grant_permissions(["clipboard-read", "clipboard-write"], origin=site)
    cell = chapter.locator("div.cell_input .highlight").first
    cell.hover()
    cell.locator("button.copybtn").click()
    copied = chapter.evaluate("navigator.clipboard.readText()")
    assert copied.strip() == cell.locator("pre").text_content().strip()


def test_copy_buttons_are_seen_on_touch(browser, site):
    context = browser.new_context(has_touch=True, is_mobile=True, viewport={"width": 390, "height": 800})
    page = context.new_page()
    page.goto(f"{site}/{CHAPTER}.html")
    button = page.locator("button.copybtn").first
    shown = "button => getComputedStyle(button).opacity"
    page.wait_for_function(f"document.querySelector('button.copybtn') && ({shown})(document.querySelector('button.copybtn')) === '1'")
    assert button.evaluate(shown) == "1"
    context.close()


@pytest.mark.parametrize("root", ["folder", "site"])
def test_search_opens_at_the_place(page, root, request):
    page.goto(f"{request.getfixturevalue(root)}/index.html")
    page.keyboard.press("Control+k")
    page.keyboard.type("context fragmentation")
    page.keyboard.press("Enter")
    results = page.locator("#search-results li")
    results.first.wait_for()
    for result in results.all():
        text = result.inner_text().lower()
        assert "toggle" not in text and "back to top" not in text and "skip to main" not in text
    first = results.first.locator("a")
    heading = first.inner_text()
    first.click()
    page.wait_for_url("**/*#*")
    anchor = page.evaluate("location.hash.slice(1)")
    found = page.locator(f"[id='{anchor}']")
    assert heading in found.locator("h1, h2, h3").first.inner_text()
    page.wait_for_function("scrollY > 0")


def test_search_for_nothing_and_for_what_is_not_there(page, site):
    page.goto(f"{site}/search.html")
    assert page.locator("#search-results li").count() == 0
    page.goto(f"{site}/search.html?q=<b>zebra</b>")
    icon, field = page.locator("main .bd-search svg"), page.locator("main .bd-search input")
    room = field.evaluate("(field) => field.getBoundingClientRect().x + parseFloat(getComputedStyle(field).paddingLeft)")
    assert icon.bounding_box()["x"] + icon.bounding_box()["width"] <= room  # not over what is typed
    assert page.locator("#search-results").inner_text() == "No sections with “<b>zebra</b>”."


def test_the_theme_is_switched_and_kept(chapter, site):
    themes = []
    for _ in range(3):
        chapter.locator("button.theme-switch-button").first.click()
        themes.append(chapter.evaluate("document.documentElement.dataset.mode"))
    assert sorted(themes) == ["auto", "dark", "light"]
    while chapter.evaluate("document.documentElement.dataset.theme") != "dark":
        chapter.locator("button.theme-switch-button").first.click()
    chapter.goto(f"{site}/book/glossary.html")
    assert chapter.evaluate("document.documentElement.dataset.theme") == "dark"


def test_the_player(chapter):
    player = chapter.locator("figure.player").first
    picture, button = player.locator("img"), player.locator("button")
    still = picture.get_attribute("src")
    assert still.endswith(".png") and button.inner_text() == "▶ Play"
    with chapter.expect_response("**/*.gif"):
        button.click()
    assert picture.get_attribute("src").endswith(".gif") and button.inner_text() == "■ Stop"
    assert button.get_attribute("aria-pressed") == "true"
    button.click()
    assert picture.get_attribute("src").endswith(still.split("/")[-1])
    button.focus()
    chapter.keyboard.press("Space")
    assert picture.get_attribute("src").endswith(".gif")
    chapter.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert picture.get_attribute("src").endswith(".png")


def test_who_wants_no_motion_gets_none(page, site):
    page.emulate_media(reduced_motion="reduce")
    page.goto(f"{site}/{CHAPTER}.html")
    assert not checks.moves(page)
    page.locator("details.hide summary").first.click()
    assert page.evaluate("document.getAnimations().length") == 0


def test_the_keyboard_through_the_first_screen(chapter):
    """The first stop skips to the text, and each stop can be seen."""
    stops = []
    for _ in range(30):
        chapter.keyboard.press("Tab")
        stops.append(
            chapter.evaluate(
                """() => {
                    const at = document.activeElement, box = at.getBoundingClientRect();
                    const style = getComputedStyle(at);
                    return [at.textContent.trim() || at.ariaLabel || at.title, at.matches(":focus-visible"),
                        style.outlineStyle !== "none" && parseFloat(style.outlineWidth) >= 2,
                        box.width > 0 && box.height > 0];
                }"""
            )
        )
    assert stops[0][0] == "Skip to main content"
    assert not [stop for stop in stops if not stop[0] or not all(stop[1:])]
    assert len({stop[0] for stop in stops}) > 20


def test_words_lead_to_where_they_are_explained(chapter, site):
    chapter.locator("article a.term").first.click()
    assert "glossary.html#term-" in chapter.url
    chapter.goto(f"{site}/{CHAPTER}.html")
    chapter.locator("article .solution a").first.click()
    assert "notebooks/solutions/" in chapter.url
    heading = chapter.url.partition("#")[2]
    assert chapter.locator(f"section#{heading} pre").first.is_visible()


def test_the_page_for_missing_pages_leads_back(page, site):
    page.goto(f"{site}/404.html")
    page.locator("a").first.click()
    assert page.url == f"{site}/index.html"
