"""The README names what there is: its code, its table of modules, its links, its commands."""

import ast
import re
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest

import dspark_lab as lab

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "data").glob("**/README.md")]


def code() -> Iterator[ast.AST]:
    for block in re.findall(r"```python\n(.*?)```", README, re.DOTALL):
        yield from ast.walk(ast.parse(block))


def test_every_name_in_its_code_is_there() -> None:
    names = 0
    for node in code():
        if isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                getattr(import_module(node.module), alias.name)
                names += 1
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "lab":
            getattr(lab, node.attr)
            names += 1
    assert names > 20


def test_its_table_of_modules_is_complete() -> None:
    cells = re.findall(r"^\| ((?:`\w+`(?:, )?)+) \|", README, re.MULTILINE)
    listed = [name for cell in cells for name in re.findall(r"`(\w+)`", cell)]
    entries = {p.stem for p in (ROOT / "dspark_lab").iterdir() if p.stem[0] not in "_."}
    assert sorted(n for n in listed if not n[0].isdigit()) == sorted(entries)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_and_paths_lead_somewhere(page: Path) -> None:
    text = page.read_text()
    for link in re.findall(r"\]\((?!https?:)([^)#]+)", text):
        assert (page.parent / link).exists(), link
    for path in re.findall(r"`((?:dspark_lab|tests|data/make|explore)/[\w/.]+)`", text):
        assert (ROOT / path).exists() or (ROOT / "dspark_lab" / path).exists(), path


def test_every_explorer_stands_in_it() -> None:
    for name in lab.__all__:
        if name.startswith("explore_"):
            assert f"lab.{name}(" in README
