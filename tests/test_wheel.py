"""The wheel carries what the lab needs, and works away from a checkout.

Built twice, from the working tree and from the sdist, in a temporary folder; installed without its
dependencies, which are those of the environment that runs the tests.
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
BUILD = "import sys, setuptools.build_meta as build; print(build.build_{}(sys.argv[1]))"
LEFT_OUT = (".git", ".venv", ".*_cache", "__pycache__", "build", "dist", "*.egg-info")


def build(kind: str, source: Path, out: Path) -> Path:
    command = [sys.executable, "-c", BUILD.format(kind), str(out)]
    done = subprocess.run(command, cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return out / done.stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """One built from the working tree, one from the sdist."""
    folder = tmp_path_factory.mktemp("packages")
    checkout = folder / "checkout"
    shutil.copytree(ROOT, checkout, ignore=shutil.ignore_patterns(*LEFT_OUT))
    with tarfile.open(build("sdist", checkout, folder)) as archive:
        archive.extractall(folder / "sdist", filter="data")
    (unpacked,) = (folder / "sdist").iterdir()
    return [build("wheel", source, folder / source.name) for source in (checkout, unpacked)]


@pytest.fixture(scope="module")
def installed(wheels: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site-packages")
    with zipfile.ZipFile(wheels[-1]) as wheel:
        wheel.extractall(folder)
    return folder


def call(installed: Path, folder: Path, program: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(installed)}
    command = [sys.executable, "-c", f"import dspark_lab as lab\n{program}"]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


def test_the_wheel_carries_all_data_but_what_is_too_large(wheels: list[Path]) -> None:
    shipped = {
        path.relative_to(ROOT / "data").as_posix()
        for path in (ROOT / "data").rglob("*")
        if path.is_file() and "make" not in path.relative_to(ROOT / "data").parts
    }
    expected = {name for name in shipped if not name.startswith(NOT_IN_WHEEL)}
    assert len(expected) < len(shipped)
    for wheel in wheels:
        with zipfile.ZipFile(wheel) as archive:
            names = set(archive.namelist())
        prefix = "dspark_lab/data/"
        assert {n.removeprefix(prefix) for n in names if n.startswith(prefix)} == expected
        sources = {p.relative_to(ROOT).as_posix() for p in (ROOT / "dspark_lab").rglob("*.py*")}
        assert {n for n in sources if "__pycache__" not in n} <= names
        assert wheel.stat().st_size <= 45_000_000


def test_the_main_calls_work_from_the_wheel_in_any_folder(installed: Path, tmp_path: Path) -> None:
    done = call(
        installed,
        tmp_path,
        "print(lab.__file__)\n"
        "anchors = lab.explore_anchors()\n"
        "pair = lab.load_pair()\n"
        "print(len(anchors.table), pair.drafter.config.block_size, len(lab.load_chats()))\n"
        "from dspark_lab.pairs import load_traces\n"
        "from dspark_lab.serving import load_engine\n"
        "from dspark_lab.tuning import load_sweep\n"
        "load_traces(), load_engine('smollm2'), load_sweep()\n",
    )
    assert done.returncode == 0, done.stderr[-3000:]
    file, found = done.stdout.splitlines()[-2:]
    assert Path(file) == installed / "dspark_lab" / "__init__.py"
    assert found.split()[1:] == ["7", "720"]


@pytest.mark.parametrize("program", ["lab.load_pair('smollm2')", "load_traces('smollm2')"])
def test_what_does_not_travel_says_where_to_get_it(
    program: str, installed: Path, tmp_path: Path
) -> None:
    done = call(installed, tmp_path, f"from dspark_lab.pairs import load_traces\n{program}")
    assert done.returncode == 1
    assert "does not come with the wheel; a checkout of the repository has it" in done.stderr
