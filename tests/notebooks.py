"""Stored notebooks: running them, what is kept of their outputs, and what is read from it.

A stored output must read well where no kernel runs and no widget lives: a page on the web, a file
that JupyterLab does not trust yet, a converter. So an explorer is stored as its picture and its
call, without the view of a widget and its state.
"""

import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode

FOLDER = Path(__file__).resolve().parents[1] / "notebooks"
FILES = sorted(FOLDER.glob("*.ipynb"))
WIDGET_VIEW = "application/vnd.jupyter.widget-view+json"


def read(file: Path) -> NotebookNode:
    return nbformat.read(file, as_version=4)


def code_cells(notebook: NotebookNode) -> Iterator[NotebookNode]:
    return (cell for cell in notebook.cells if cell.cell_type == "code")


def bundles(notebook: NotebookNode) -> Iterator[dict[str, str]]:
    """Each output that is not plain printing, by media type."""
    for cell in code_cells(notebook):
        yield from (output.data for output in cell.outputs if "data" in output)


def run_and_store(file: Path) -> None:
    """Run a notebook and replace its outputs."""
    notebook = read(file)
    client = NotebookClient(
        notebook,
        timeout=None,
        store_widget_state=False,
        record_timing=False,
        resources={"metadata": {"path": str(file.parent)}},
    )
    client.execute()
    notebook.metadata.pop("widgets", None)
    for bundle in bundles(notebook):
        bundle.pop(WIDGET_VIEW, None)
    nbformat.write(notebook, file)


class _Rows(HTMLParser):
    """The cells of a table of pandas, row by row; a cell that spans rows stands in each."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self._open = False
        self._spans: dict[int, tuple[int, str]] = {}
        self._span = 1
        self.feed(html)

    def _fill(self) -> None:
        while (column := len(self.rows[-1])) in self._spans:
            left, text = self._spans.pop(column)
            if left > 1:
                self._spans[column] = left - 1, text
            self.rows[-1].append(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self._fill()
            self._open, self._span = True, int(dict(attrs).get("rowspan") or 1)
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        if tag in ("td", "th"):
            self._open = False
            if self._span > 1:
                self._spans[len(self.rows[-1]) - 1] = self._span - 1, self.rows[-1][-1]

    def handle_data(self, data: str) -> None:
        if self._open:
            self.rows[-1][-1] += data


def table_rows(notebook: NotebookNode, cell_id: str) -> list[list[str]]:
    """The table that a cell shows, headings first."""
    cell = next(cell for cell in code_cells(notebook) if cell.id == cell_id)
    [html] = [o.data["text/html"] for o in cell.outputs if "text/html" in o.get("data", {})]
    return [row for row in _Rows("".join(html)).rows if row]


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        print(argument, flush=True)
        run_and_store(Path(argument))
