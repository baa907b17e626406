"""The wheel carries what the lab needs, and works away from a checkout.

Built twice, from the working tree and, uncompressed, from the sdist, in a temporary folder;
installed without its dependencies, which are those of the environment that runs the tests.
"""

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from dspark_lab.pairs import NOT_IN_WHEEL

ROOT = Path(__file__).resolve().parents[1]
SDIST = "import setuptools; setuptools.setup()", "sdist", "--formats=tar", "--dist-dir"
WHEEL = "import sys, setuptools.build_meta as b; b.build_wheel(sys.argv[1], {})"
STORED = {"--build-option": ["--compression=stored"]}
PROGRAM = """
import dspark_lab as lab
from dspark_lab.pairs import load_traces
from dspark_lab.serving import load_engine
from dspark_lab.tuning import load_runs

print(lab.__file__)
anchors, pair = lab.explore_anchors(), lab.load_pair()
load_traces(), load_engine("smollm2"), load_runs()
print(len(anchors.table), pair.drafter.config.block_size, len(lab.load_chats()))
for load in (lab.load_pair, load_traces):
    try:
        load("smollm2")
    except FileNotFoundError as error:
        print(error)
"""
LEFT_OUT = (".git", ".venv", ".*_cache", "__pycache__", "build", "dist", "*.egg-info")


def build(source: Path, out: Path, *code: str) -> Path:
    command = [sys.executable, "-c", *code, str(out)]
    done = subprocess.run(command, cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    (built,) = out.iterdir()
    return built


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """One built from the working tree, one from the sdist."""
    folder = tmp_path_factory.mktemp("packages")
    checkout = folder / "checkout"
    shutil.copytree(ROOT, checkout, ignore=shutil.ignore_patterns(*LEFT_OUT))
    with tarfile.open(build(checkout, folder / "sdist", *SDIST)) as archive:
        archive.extractall(folder / "unpacked", filter="data")
    (unpacked,) = (folder / "unpacked").iterdir()
    return [
        build(checkout, folder / "wheel", WHEEL.format(None)),
        build(unpacked, folder / "stored", WHEEL.format(STORED)),
    ]


@pytest.fixture(scope="module")
def said(wheels: list[Path], tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """What ``PROGRAM`` prints in an empty folder, the wheel's package first."""
    installed, folder = (tmp_path_factory.mktemp(name) for name in ("site-packages", "empty"))
    with zipfile.ZipFile(wheels[-1]) as wheel:
        wheel.extractall(installed)
    environment = os.environ | {"PYTHONPATH": str(installed)}
    command = [sys.executable, "-c", PROGRAM]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    file, *lines = done.stdout.splitlines()
    assert Path(file) == installed / "dspark_lab" / "__init__.py"
    return lines


def test_the_wheel_carries_all_data_but_what_is_too_large(wheels: list[Path]) -> None:
    shipped = {
        path.relative_to(ROOT / "data").as_posix()
        for path in (ROOT / "data").rglob("*")
        if path.is_file() and "make" not in path.relative_to(ROOT / "data").parts
    }
    expected = {name for name in shipped if not name.startswith(NOT_IN_WHEEL)}
    assert len(expected) < len(shipped)
    contents = []
    for wheel in wheels:
        with zipfile.ZipFile(wheel) as archive:
            contents.append({info.filename: info.CRC for info in archive.infolist()})
        names, prefix = set(contents[-1]), "dspark_lab/data/"
        assert {n.removeprefix(prefix) for n in names if n.startswith(prefix)} == expected
        sources = {p.relative_to(ROOT).as_posix() for p in (ROOT / "dspark_lab").rglob("*.py*")}
        assert {n for n in sources if "__pycache__" not in n} <= names
    assert contents[0] == contents[1]
    assert wheels[0].stat().st_size <= 45_000_000


@pytest.mark.slow
def test_the_main_calls_work_from_the_wheel_in_any_folder(said: list[str]) -> None:
    assert said[0].split()[1:] == ["7", "720"]


def test_what_does_not_travel_says_where_to_get_it(said: list[str]) -> None:
    assert len(said) == 3
    for line in said[1:]:
        assert "does not come with the wheel; a checkout of the repository has it" in line
