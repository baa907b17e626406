"""The house: what imports what, where names are defined, and who offers them."""

import ast
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "dspark_lab"
FILES = sorted(PACKAGE.rglob("*.py"))
STUBS = sorted(PACKAGE.rglob("__init__.pyi"))
MAIN = {"__main__", "__init__"}


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


@cache
def listed(path: Path) -> list[str]:
    """The names in ``__all__``; none where the file has no such list."""
    for node in tree(path).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return ast.literal_eval(node.value)
    return []


@cache
def defined(path: Path) -> set[str]:
    """The names that a file's top level defines."""
    names = set()
    for node in tree(path).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.add(node.name)
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            parts = [part for target in targets for part in ast.walk(target)]
            names |= {part.id for part in parts if isinstance(part, ast.Name)}
    return names


@cache
def imported(path: Path) -> list[tuple[str, str]]:
    """Module and name of each ``from module import name`` of the library."""
    return [
        (node.module, alias.name)
        for node in ast.walk(tree(path))
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("dspark_lab")
        for alias in node.names
    ]


def offered(stub: Path) -> dict[str, str]:
    """What a package's stub imports: name -> the file or package it comes from."""
    return {
        alias.name: node.module or ""
        for node in tree(stub).body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }


def room(path: Path) -> str:
    return str(path.relative_to(ROOT))


def test_no_floor_imports_from_above():
    command = [str(Path(sys.executable).with_name("lint-imports")), "--no-cache"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("path", FILES, ids=room)
def test_no_underscore_name_crosses_a_file(path):
    assert not [name for _, name in imported(path) if name.startswith("_")]
    files = {file.stem for file in path.parent.glob("*.py")} - MAIN
    modules = {name for _, name in imported(path) if name in files}
    private = [
        ast.unparse(node)
        for node in ast.walk(tree(path))
        if isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Name)
        and node.value.id in modules
        and node.attr.startswith("_")
    ]
    assert not private


@pytest.mark.parametrize("stub", [s for s in STUBS if s.parent != PACKAGE], ids=room)
def test_a_package_offers_what_its_files_define_and_nothing_else(stub):
    names = offered(stub)
    assert sorted(listed(stub)) == sorted(names), "__all__ and the imports differ"
    for name, module in names.items():
        file = stub.parent / f"{module}.py"
        assert file.exists() and name in defined(file), f"{name} is not defined in {module}"
    files = {path.stem for path in stub.parent.glob("*.py")}
    assert not files & set(names), "a file hides a name that is offered"


def test_a_name_is_defined_in_one_file_which_lists_nothing_else():
    homes = {"main": "", "PROGRAM": "", "Options": ""}  # of each command
    for path in FILES:
        assert set(listed(path)) <= defined(path), room(path)
        for name in defined(path):
            home = homes.setdefault(name, room(path))
            assert name.startswith("_") or home in ("", room(path)), f"{name} in {home} too"


def test_outside_a_package_its_names_are_imported_from_the_package():
    rooms = {path.stem for path in PACKAGE.iterdir()}
    for path in FILES:
        assert not re.search(r"^(from|import) data\b", path.read_text(), re.M)
        for module, name in imported(path):
            parts = module.split(".")
            whole = module == "dspark_lab" and name in rooms
            own = path.parent != PACKAGE and parts[1:2] == [path.parent.name]
            assert len(parts) == 2 or whole or own, f"{room(path)} imports {name} from {module}"


def test_no_file_or_package_has_the_name_of_a_call_at_the_door():
    door = set(listed(PACKAGE / "__init__.pyi"))
    explorers = "acceptance anchors decoding masks serving training_budget".split()
    calls = "choose_training decode encode evaluate export load_chats load_drafter load_pair"
    calls += " load_target load_tokenizer train"
    assert {*calls.split(), *(f"explore_{name}" for name in explorers)} <= door
    assert not door & ({path.stem for path in FILES} | {path.parent.name for path in FILES})


def test_the_house_has_at_most_18_entries():
    entries = [entry.name for entry in PACKAGE.iterdir() if entry.name != "__pycache__"]
    assert len(entries) <= 18, entries


def test_the_utilities_pull_in_torch_and_nothing_heavy():
    code = "import sys, dspark_lab.common; print(*{name.partition('.')[0] for name in sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    heavy = {"transformers", "pandas", "matplotlib", "ipywidgets", "sklearn", "scipy"}
    loaded = set(done.stdout.split())
    assert "torch" in loaded and not heavy & loaded, heavy & loaded
