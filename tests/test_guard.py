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
    "labels are off by one": TextFault(
        "blocks.py", "torch.arange(1, block_size + 1, device", "torch.arange(block_size, device"
    ),
    "supervision jumps over gaps": TextFault(
        "common.py", "return supervised.cumprod(dim=-1).bool()", "return supervised"
    ),
    "supervision ignores the keep mask": TextFault(
        "common.py",
        "supervised = block_keep_mask.unsqueeze(-1) & (label_indices",
        "supervised = (label_indices",
    ),
    "supervision ignores the end of the document": TextFault(
        "common.py",
        "distance <= _take(doc_remaining, anchor_positions).unsqueeze(-1)",
        "distance > 0",
    ),
    "candidates need no second token": TextFault(
        "common.py", "supervised[:, :-1] & supervised[:, 1:]", "supervised[:, :-1].clone()"
    ),
    "candidates ignore the end of the document": TextFault(
        "common.py", "candidates & (doc_remaining[:, :-1] >= 1)", "candidates"
    ),
    "the largest random numbers become anchors": TextFault(
        "common.py", "noise = _uniform(candidates", "noise = 1 - _uniform(candidates"
    ),
    "positions are off by one": TextFault(
        "common.py",
        "offset = torch.arange(block_size, device",
        "offset = torch.arange(1, block_size + 1, device",
    ),
    "positions do not restart in a document": TextFault(
        "common.py", "base = _take(position_ids.long(), base)", "base = base + 0"
    ),
    "the anchor's token is in the last slot": TextFault(
        "common.py", "noise_ids[:, :, 0] =", "noise_ids[:, :, -1] ="
    ),
    "dummy blocks read a token": TextFault(
        "common.py", "torch.where(block_keep_mask, anchor_ids, mask_token_id)", "anchor_ids"
    ),
    "the context includes the anchor": TextFault(
        "attention/mask.py", "(key < end[batch, block])", "(key <= end[batch, block])"
    ),
    "the context leaves the document": TextFault(
        "attention/mask.py",
        "start = torch.searchsorted(doc_ids.contiguous(), anchor_doc)",
        "start = torch.zeros_like(anchor_doc)",
    ),
    "blocks see each other": TextFault(
        "attention/mask.py", "(key - seq_len) // block_size == block", "(key - seq_len) >= 0"
    ),
    "a block is causal": TextFault(
        "attention/mask.py",
        "own_block = (key >= seq_len)",
        "own_block = (key <= seq_len + query) & (key >= seq_len)",
    ),
    "dummy blocks do not see themselves": TextFault(
        "attention/mask.py",
        "own_block = (key >= seq_len)",
        "own_block = (end[batch, block] > 0) & (key >= seq_len)",
    ),
    "a tile is full where it is partial": TextFault(
        "attention/mask.py",
        "-(-end // tile_size), end // tile_size]",
        "-(-end // tile_size), -(-end // tile_size)]",
    ),
    "a tile is empty where it is partial": TextFault(
        "attention/mask.py",
        "-(-end // tile_size), end // tile_size]",
        "end // tile_size, end // tile_size]",
    ),
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
