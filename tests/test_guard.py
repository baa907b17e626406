"""The notebooks guard the library: with a fault planted in it, running them fails.

Each fault is planted in a copy of the package, and the notebooks run on the copy as `make test`
runs them: a cell whose output is no longer the stored one is a failure. No fault makes anything
crash, so it is the output alone that tells. Knows one piece of source per fault, and nothing about
what the notebooks show.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import nbformat
import pytest
from faults import FAULTS, TRAIN, TUNE, environment_with

ROOT = Path(__file__).resolve().parents[1]
COPIED = ("dspark_lab", "notebooks", "data", "pyproject.toml")
MINUTES = 60

pytestmark = pytest.mark.guard


class TextFault(NamedTuple):
    """A replacement in one file of the package, and the notebook that notices, or all of them."""

    file: str
    right: str
    wrong: str
    notebook: str = ""


TEXT_FAULTS = {
    "training starts without a warm-up": TextFault(
        "training/loop.py", "if step < self.warmup_steps:", "if step < 0:", TRAIN
    ),
    "each cell's interval is of one drafter": TextFault(
        "tuning/sweep.py", 'table["seeds"] ** 0.5', 'table["seeds"] ** 0', TUNE
    ),
    "all trainers count a block alike": TextFault(
        "tuning/settings.py", "block_size=s.block_size + 1", "block_size=s.block_size", TUNE
    ),
}


@pytest.fixture
def copy(tmp_path):
    """The package, its notebooks and its data in a folder of their own."""
    folder = tmp_path.resolve()
    for name in COPIED:
        source, target = ROOT / name, folder / name
        if source.is_dir():
            skipped = shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints")
            shutil.copytree(source, target, ignore=skipped)
        else:
            shutil.copy(source, target)
    return folder


def run_notebooks(folder, name="", environment=None):
    """Run a notebook of a copy, or every one, up to the first failure."""
    command = [sys.executable, "-m", "pytest", "--nbval", "--nbval-current-env", "--exitfirst"]
    command += ["-p", "no:cacheprovider", "--color=no", f"notebooks/{name}"]
    environment = environment or os.environ | {"PYTHONPATH": str(folder)}
    environment |= {"HF_HUB_OFFLINE": "1"}
    environment.pop("PYTEST_ADDOPTS", None)
    return subprocess.run(
        command,
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=10 * MINUTES,
    )


def plant(folder, fault):
    file = folder / "dspark_lab" / fault.file
    source = file.read_text()
    found = source.count(fault.right)
    assert found == 1, (
        f"{fault.file} holds {fault.right!r} {found} times, not once: the source has changed, so "
        "this test must plant its fault elsewhere"
    )
    file.write_text(source.replace(fault.right, fault.wrong))


def test_without_a_fault_the_notebooks_run_on_the_copy_and_pass(copy):
    cell = nbformat.v4.new_code_cell("import dspark_lab\n\nprint(dspark_lab.__file__)")
    where = f"{copy / 'dspark_lab' / '__init__.py'}\n"
    cell.execution_count = 1
    cell.outputs = [nbformat.v4.new_output("stream", name="stdout", text=where)]
    notebook = nbformat.v4.new_notebook(cells=[cell])
    nbformat.write(notebook, copy / "notebooks" / "00_which_package.ipynb")
    run = run_notebooks(copy)
    assert run.returncode == 0, run.stdout


@pytest.mark.parametrize("name", TEXT_FAULTS)
def test_with_a_fault_the_notebooks_show_another_output(name, copy):
    plant(copy, TEXT_FAULTS[name])
    run = run_notebooks(copy, TEXT_FAULTS[name].notebook)
    assert run.returncode != 0, f"no notebook notices that {name}"
    assert "Cell outputs differ" in run.stdout and "1 failed" in run.stdout, run.stdout


@pytest.mark.parametrize("name", FAULTS)
def test_with_a_planted_fault_its_notebook_shows_another_output(name):
    run = run_notebooks(ROOT, FAULTS[name].notebook, environment_with(name))
    assert run.returncode != 0, f"{FAULTS[name].notebook} does not notice that {name}"
    assert "Cell outputs differ" in run.stdout and "1 failed" in run.stdout, run.stdout
