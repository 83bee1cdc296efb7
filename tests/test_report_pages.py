"""The page of a report in a browser: accessible by axe in every dress, self-contained, fit for a phone and for paper."""

import re

import nbformat
import pytest

from visrec_nb.core.errors import ParameterError
from visrec_nb.reports.render import print_page, render_notebook


def shown(value):
    "A cell with what a notebook would show of a value."
    data = {"text/html": value.data} if value._repr_html_() else {"text/markdown": value.data}
    return nbformat.v4.new_code_cell("show()", outputs=[nbformat.v4.new_output("display_data", data)])


@pytest.fixture(scope="module")
def notebook():
    "Everything that a template can put on a page."
    import matplotlib.pyplot as plt
    import numpy as np
    import polars as pl
    from visrec_nb.reports.show import cards, figure, pictures, strips, table

    fig, ax = plt.subplots(figsize=(5, 2))
    ax.bar(["hat", "shoe"], [12, 73])
    many = pl.DataFrame(
        {"label": ["hat", "shoe"] * 120, "path": ["photos/of/a/very/long/name/that/does/not/end.jpg"] * 240, "recall": [0.75, None] * 120}
    )
    text = nbformat.v4.new_output("stream", name="stdout", text="printed " * 60)
    fault = nbformat.v4.new_output(
        "error", ename="ValueError", evalue="wrong", traceback=["\x1b[31mValueError\x1b[39m: wrong", "\x1b[32m1\x1b[0m / 0"]
    )
    image = np.full((60, 90, 3), 90, np.uint8)
    rest = nbformat.v4.new_markdown_cell(
        "## Details\n\nA [link](#details), `code`, *words*.\n\n> a note\n\n1. one\n2. two\n\n| a | b |\n|---|---|\n| 1 | 2 |"
    )

    class Frame:  # as polars and pandas show a table by themselves
        data = many.head(3)._repr_html_()

        def _repr_html_(self):
            return self.data

    class Words:
        data = "**18 of 20** photos were recognised; at least 14 in 20 of cases like these."

        def _repr_html_(self):
            return None

    return nbformat.v4.new_notebook(
        cells=[
            nbformat.v4.new_markdown_cell("# Photos of clothes"),
            shown(Words()),
            shown(
                cards(
                    [("What is on a photo?", 0.874, "of unseen photos named correctly", "#details"), ("How many?", "1,513", "photos", "#")]
                )
            ),
            shown(figure(fig, "Six times as many shoes as hats.")),
            shown(table(many, {"recall": ".0%"}, caption="Every photo.")),
            shown(table(many.head(2))),
            shown(pictures([image, image], ["a hat", "a shoe"])),
            shown(strips([np.stack([image] * 3)], ["a clip"])),
            rest,
            shown(Frame()),
            nbformat.v4.new_code_cell("print()", outputs=[text, fault]),
        ]
    )


@pytest.fixture(scope="module")
def pages(notebook, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pages")
    for name, failed in (("good", None), ("failed", "failed with ValueError: wrong")):
        render_notebook(notebook, folder / f"{name}.html", {"seed": 42, "numpy": "2.4.6"}, failed=failed)
    return folder


@pytest.fixture(scope="module")
def path(pages):
    return pages / "good.html"


@pytest.mark.browser
@pytest.mark.parametrize(
    "name, scheme, width", [("good", "light", 1300), ("good", "dark", 390), ("failed", "dark", 1300), ("failed", "light", 390)]
)
def test_accessible(pages, browser, name, scheme, width):
    "axe finds nothing: WCAG 2.2 A and AA, and its best practices."
    axe = pytest.importorskip("axe_playwright_python.sync_playwright")
    page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    page.goto((pages / f"{name}.html").as_uri(), wait_until="load")
    found = axe.Axe().run(page, options={"runOnly": ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa", "best-practice"]}).response
    assert len(found["passes"]) > 15
    assert not found["violations"], "\n".join(
        f"{v['id']}: {v['help']}: {[n['html'][:160] for n in v['nodes'][:3]]}" for v in found["violations"]
    )
    assert page.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth")
    page.close()


@pytest.mark.browser
def test_on_paper(path, browser):
    "Dark screens print black on white, and nothing is cut off."
    page = browser.new_page(viewport={"width": 720, "height": 1000}, color_scheme="dark")
    page.goto(path.as_uri(), wait_until="load")
    page.emulate_media(media="print", color_scheme="dark")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert page.evaluate("getComputedStyle(document.body).color") == "rgb(0, 0, 0)"
    assert page.evaluate("getComputedStyle(document.querySelector('th')).backgroundColor") not in ("rgb(29, 36, 43)", "rgb(20, 25, 30)")
    assert page.evaluate("[...document.querySelectorAll('.table')].every(t => t.scrollWidth <= t.clientWidth + 1)")
    page.close()


def test_one_file_that_fetches_nothing(path):
    text = path.read_text()
    assert not re.findall(r"""(?:src|href)=["'](?!data:|#)[^"']+|@import|url\((?!["']?data:)""", text) and "show()" not in text


@pytest.mark.browser
def test_pdf(path, browser, tmp_path, monkeypatch):
    print_page(path, tmp_path / "report.pdf")
    assert (tmp_path / "report.pdf").read_bytes().startswith(b"%PDF-") and (tmp_path / "report.pdf").stat().st_size > 5000


def test_pdf_without_a_browser_is_told_in_a_sentence(tmp_path, monkeypatch):
    monkeypatch.setenv("VISREC_BROWSER", "no-such-browser")
    with pytest.raises(ParameterError, match="install Chromium"):
        print_page(tmp_path / "x.html", tmp_path / "x.pdf")
