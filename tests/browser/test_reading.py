"""The book as its readers use it, page by page."""


def test_smoke(page, site, folder):
    page.goto(f"{site}/notebooks/00_attention.html")
    assert "Attention" in page.title()
    page.goto(f"{folder}/notebooks/00_attention.html")
    assert "Attention" in page.title()
