"""The stored notebooks read well before anything is run, and their sentences agree with them."""

import re
from pathlib import Path
from typing import Any

import pytest

from tests.notebooks import FILES, WIDGET_VIEW, bundles, code_cells, read, table_rows
from tests.sentences import CLAIMS, NOTEBOOKS, OTHERS, Claim, markdown, unread

# A table that is wider than this leaves the screen.
MOST_COLUMNS = 10

notebooks = pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)


@pytest.mark.parametrize("claim", CLAIMS, ids=lambda claim: f"{claim.notebook} {claim.text[:40]}")
def test_a_sentence_says_what_its_cell_holds(claim: Claim):
    assert claim.text.format(*(value() for value in claim.values)) in markdown(claim.notebook)
    assert claim.holds()


@pytest.mark.parametrize("notebook", NOTEBOOKS)
def test_a_number_is_held_against_its_cell_or_listed_with_a_reason(notebook: str):
    assert not list(unread(notebook))


def test_what_is_listed_with_a_reason_is_still_said():
    text = "\n".join(map(markdown, NOTEBOOKS))
    assert not [one for ones in OTHERS.values() for one in ones if one not in text]


def test_the_first_mask_has_tiles_of_all_three_kinds():
    [source] = [c.source for c in code_cells(NOTEBOOKS["02"]) if c.id == "02-01"]
    names: dict[str, Any] = {}
    exec(source, names)
    assert (names["masks"].tables["tiles"]["tiles"] > 0).all()


@notebooks
def test_no_widget_is_stored(file: Path):
    notebook = read(file)
    assert "widgets" not in notebook.metadata
    assert not any(WIDGET_VIEW in bundle for bundle in bundles(notebook))


@notebooks
def test_every_explorer_is_stored_as_a_picture(file: Path):
    pictures = 0
    for bundle in bundles(read(file)):
        plain = "".join(bundle.get("text/plain", ""))
        if plain.startswith(("explore_", "LiveCurve(", "MaskView", "<Figure")):
            assert "image/png" in bundle, plain
            pictures += 1
        elif "text/html" in bundle:
            assert "<table" in bundle["text/html"]
    assert pictures


@notebooks
def test_the_first_picture_comes_within_three_cells(file: Path):
    notebook = read(file)
    first = next(i for i, c in enumerate(notebook.cells) if "image/png" in str(c.get("outputs")))
    assert first < 3


@notebooks
def test_tables_are_at_most_a_screen_wide(file: Path):
    notebook = read(file)
    for one in code_cells(notebook):
        if any("<table" in o.get("data", {}).get("text/html", "") for o in one.outputs):
            rows = table_rows(notebook, one.id)
            assert max(map(len, rows)) <= MOST_COLUMNS, one.id
            assert not any("_" in heading for heading in rows[0]), one.id
            # Above groups of columns, names stand once for each of a group.
            named = [heading for heading in rows[0] if heading]
            assert len(set(named)) == len(named), one.id


@notebooks
def test_links_lead_to_files_that_are_there(file: Path):
    for one in read(file).cells:
        if one.cell_type == "markdown":
            prose = re.sub(r"```.*?```", "", one.source, flags=re.DOTALL)
            for link in re.findall(r"\]\((?!https?:)([^)#]+)\)", prose):
                assert (file.parent / link).exists(), link
            assert not re.search(r"`\d\d_\w+", prose), "a notebook's name that is no link"


def test_the_start_links_every_notebook():
    text = "".join(c.source for c in NOTEBOOKS["00"].cells)
    assert set(re.findall(r"\((\d\d_\w+\.ipynb)\)", text)) == {f.name for f in FILES[1:]}


def test_no_stored_cell_failed():
    for number, notebook in NOTEBOOKS.items():
        for one in code_cells(notebook):
            assert all(o.output_type != "error" for o in one.outputs), (number, one.id)


@pytest.mark.slow
@notebooks
def test_a_page_without_a_network_shows_every_picture(file: Path):
    from nbconvert import HTMLExporter

    notebook = read(file)
    page, _ = HTMLExporter().from_notebook_node(notebook)
    sources = re.findall(r'<img[^>]*?src="([^"]*)', page)
    pictures = sum("image/png" in bundle for bundle in bundles(notebook))
    assert len(sources) == pictures > 0
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    assert "widget-view" not in page and "model_id" not in page
