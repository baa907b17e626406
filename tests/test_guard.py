"""The notebooks guard the library: with a fault planted in it, running them fails.

A fault is planted in the process that runs its notebook as `make test` does: a cell whose output is
no longer the stored one is a failure. No fault makes anything crash, so the output alone tells.
That the notebooks pass without a fault is shown by `make test`, on which `make test-all` depends.
"""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.faults import NOTEBOOKS, environment_with

ROOT = Path(__file__).resolve().parents[1]

pytestmark = pytest.mark.guard


def run_notebook(name: str, fault: str) -> subprocess.CompletedProcess:
    """Run a notebook up to the first failure."""
    command = [sys.executable, "-m", "pytest", "--nbval", "--nbval-current-env", "--exitfirst"]
    command += ["-p", "no:cacheprovider", "--color=no", f"notebooks/{name}"]
    environment = environment_with(fault) | {"HF_HUB_OFFLINE": "1", "PYTEST_ADDOPTS": ""}
    both = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    return subprocess.run(command, cwd=ROOT, env=environment, text=True, **both)


@pytest.mark.parametrize(
    ("notebook", "name"), [(file, name) for file, faults in NOTEBOOKS.items() for name in faults]
)
def test_with_a_planted_fault_its_notebook_shows_another_output(notebook: str, name: str) -> None:
    run = run_notebook(notebook, fault=name)
    assert run.returncode != 0, f"{notebook} does not notice that {name}"
    assert "Cell outputs differ" in run.stdout and "1 failed" in run.stdout, run.stdout
