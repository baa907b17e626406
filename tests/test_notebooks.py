"""The stored notebooks read well before anything is run, and their sentences agree with them."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.notebooks import FILES, WIDGET_VIEW, bundles, code_cells, read, table_rows

# A table that is wider than this leaves the screen.
MOST_COLUMNS = 10
NOTEBOOKS = {file.stem[:2]: read(file) for file in FILES}

notebooks = pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)


def cell(place: str, row: str | tuple[str, ...], column: str) -> str:
    """What stands in a stored table, under a heading and behind the first cells of a row."""
    headings, *rows = table_rows(NOTEBOOKS[place[:2]], place)
    wanted = (row,) if isinstance(row, str) else row
    [found] = [r for r in rows if tuple(c for c in r if c)[: len(wanted)] == wanted]
    return found[headings.index(column)]


def at(place: str, *where: Any) -> Callable[[], str]:
    return lambda: cell(place, *where)


def equal_time(*, all_sizes: bool) -> Callable[[], list[float]]:
    """What the recommendation lost of tau in sweeps of equal time, where it lost for certain."""

    def values() -> list[float]:
        headings, *rows = table_rows(NOTEBOOKS["06"], "06-30")
        column, decided = headings.index("tau lost, %"), headings.index("decided")
        timed = [row for row in rows if row[0] == "seconds" and (row[2] == "all") == all_sizes]
        return [float(row[column]) for row in timed if row[decided] == "yes"]

    return values


def share_of_18(policy: str) -> Callable[[], str]:
    def value() -> str:
        ours, plain = (float(cell("07-35", "1", name)) for name in (policy, "plain decoding"))
        return f"{100 * (1 - ours / plain):.0f}"

    return value


def target_share() -> str:
    """Whether the target's own pass is more than half of all operations."""
    _, *rows = table_rows(NOTEBOOKS["06"], "06-13")
    done = {row[0]: float(row[3]) for row in rows if row[3]}
    return "More" if done["target forward"] > sum(done.values()) / 2 else "Less"


def ratio_of_steps() -> str:
    slow, quick = (float(cell("07-19", n, "steps a second")) for n in ("64", "8"))
    return "more" if quick > 2 * slow else "less"


# A sentence, with what its numbers are made of in the stored outputs.
SENTENCES: list[tuple[str, str, list[Callable[[], Any]]]] = [
    (
        "04",
        "over all slots it lowers the product error from {} to {} %",
        [
            at("04-13", "all", "product error, %"),
            at("04-13", "all", "product error, scaled, %"),
        ],
    ),
    (
        "04",
        "the slot error of slot 5 rises from {} to {} %, that of slot 6 from {} to {} %",
        [
            at("04-13", "5", "slot error, %"),
            at("04-13", "5", "slot error, scaled, %"),
            at("04-13", "6", "slot error, %"),
            at("04-13", "6", "slot error, scaled, %"),
        ],
    ),
    (
        "06",
        "lost {:.1f} to {:.1f} % of tau",
        [
            lambda: min(equal_time(all_sizes=False)()),
            lambda: max(equal_time(all_sizes=False)()),
        ],
    ),
    (
        "06",
        "and lost {:.1f} to {:.1f} %: these drafters",
        [
            lambda: min(equal_time(all_sizes=True)()),
            lambda: max(equal_time(all_sizes=True)()),
        ],
    ),
    ("06", "{} than half of the work is the target's own forward pass", [target_share]),
    (
        "07",
        "with {} tokens a second against {} of the scheduler and {} of whole blocks",
        [
            at("07-35", "1", "plain decoding"),
            at("07-35", "1", "prefix scheduler"),
            at("07-35", "1", "fixed 7"),
        ],
    ),
    (
        "07",
        "a fixed length of 3 and the threshold lose {} and {} %",
        [share_of_18("fixed 3"), share_of_18("threshold 0.4")],
    ),
    ("07", "a step of 64 tokens takes {} than twice as long as one of 8", [ratio_of_steps]),
]


@pytest.mark.parametrize(
    ("number", "sentence", "values"), SENTENCES, ids=lambda v: v[:40] if isinstance(v, str) else ""
)
def test_a_sentence_says_what_its_table_holds(number, sentence, values):
    text = "\n".join(c.source for c in NOTEBOOKS[number].cells if c.cell_type == "markdown")
    assert sentence.format(*(value() for value in values)) in text


def test_the_scheduler_stops_before_what_a_search_would_find():
    """The numbers of the sentence about the two are read from the table of all slots."""
    headings, *rows = table_rows(NOTEBOOKS["07"], "07-29")
    admitted, searched = headings.index("admitted"), headings.index("retrospective")
    assert any(row[admitted] == "no" and row[searched] == "yes" for row in rows)


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
        if plain.startswith(("explore_", "LiveCurve(", "<Figure")):
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
