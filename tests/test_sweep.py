"""A sweep runs every cell once, on the budget it was given, and goes on where it stopped."""

import json
import math
import sys
from collections.abc import Callable
from dataclasses import asdict, astuple, replace
from itertools import product
from pathlib import Path
from runpy import run_module

import pandas as pd
import pytest

from dspark_lab import tuning
from dspark_lab.files import DATA
from dspark_lab.tuning import (
    BUDGETS,
    Cell,
    SweepConfig,
    cell_table,
    load_sweep,
    run_sweep,
    supervision,
)
from dspark_lab.tuning import cells as lab
from dspark_lab.tuning.sweep import main, parsed
from tests.runs import target_on_disk

SMALL = SweepConfig(num_anchors=(2, 3), block_sizes=(2,), seeds=(0, 1), slots=100, seconds=3)
SMALL = replace(SMALL, prompts=2, max_new_tokens=8, features="live")
SECONDS = {"n2-k2": 0.5, "n3-k2": 0.75}


def pretended(cell: Cell, config: SweepConfig, steps: int, work: Path) -> list[dict]:
    """What a cell returns, without training anything."""
    return [
        {**asdict(cell), "temperature": t, "steps": steps, "tau": 1 + cell.num_anchors / 10}
        for t in config.temperatures
    ]


def noting(asked: list[str], most: int = 99) -> Callable[..., list[dict]]:
    """Notes the cells that are run, of which only so many end well."""

    def run(cell: Cell, *others) -> list[dict]:
        if len(asked) == most:
            raise OSError("no space")
        asked.append(cell.key)
        return pretended(cell, *others)

    return run


@pytest.fixture
def here(monkeypatch, tmp_path) -> Path:
    """A work folder whose times are measured already, and jobs that run in this process."""

    def in_turn(function, jobs, *, processes, address):
        return ((key, function(*given)) for key, given in jobs.items())

    monkeypatch.setattr(lab, "run_jobs", in_turn)
    (tmp_path / "step_seconds.json").write_text(json.dumps(SECONDS))
    return tmp_path


def run(work: Path, cell=pretended, config: SweepConfig = SMALL) -> pd.DataFrame:
    return run_sweep(config, work, progress=False, run=cell)


def test_the_cells_are_all_combinations_seed_by_seed():
    cells = SweepConfig().cells()
    assert len(cells) == 2 * 4 * 3 * 3
    assert len({cell.key for cell in cells}) == len(cells)
    every = set(product(BUDGETS, (4, 12, 32, 96), (4, 7, 12), (0, 1, 2)))
    assert {astuple(cell) for cell in cells} == every
    assert [cell.seed for cell in cells] == sorted(cell.seed for cell in cells)


def test_a_sweep_that_stopped_goes_on_with_the_cells_that_are_missing(here):
    asked: list[str] = []
    assert tuning.sweep_table(here).empty
    with pytest.raises(OSError, match="no space"):
        run(here, noting(asked, 3))
    assert len(list((here / "cells").iterdir())) == 3
    table = run(here, noting(asked))
    assert sorted(asked) == sorted(cell.key for cell in SMALL.cells())
    assert len(table) == len(asked) * len(SMALL.temperatures)
    by = ["budget", "num_anchors", "block_size", "seed", "temperature"]
    assert not table.duplicated(by).any()
    assert table.equals(run(here, noting([], 0)))


def test_a_folder_of_another_sweep_is_refused_and_says_what_differs(here):
    run(here)
    other = replace(SMALL, slots=101, prompts=7)
    with pytest.raises(ValueError, match="got one with other slots, prompts"):
        run(here, config=other)


def test_steps_are_what_the_budgets_pay(here):
    table = run(here)
    _, chats, _ = lab._materials(SMALL)
    for anchors in SMALL.num_anchors:
        per_step = supervision(chats, anchors, 2).expected / len(chats) * SMALL.training.batch_size
        steps = table[table["num_anchors"] == anchors].groupby("budget")["steps"].first()
        assert steps["slots"] == max(1, round(100 / per_step))
        assert steps["seconds"] == round(3 / SECONDS[f"n{anchors}-k2"])


def test_the_slots_of_a_real_run_of_planned_steps_are_those_of_the_budget(tmp_path):
    target, data = target_on_disk(tmp_path)
    lines = data.read_text().splitlines()[:5]
    data.write_text("\n".join(lines))
    # Of five rows one is left over, in whose batch three anchors would be as many as in one of two.
    per = {"anchors_per": "batch", "batch_size": 2, "accumulate": 3}
    files = {"target": str(target), "data": str(data), "held_out": str(data)}
    options = {"slots": 400, "prompts": 1, "max_new_tokens": 2, "temperatures": (0.0,)}
    config = replace(SMALL, training=replace(SMALL.training, **per), **files, **options)
    (tmp_path / "step_seconds.json").write_text(json.dumps(SECONDS))
    steps = lab._planned_steps(config, tmp_path)["slots", 3, 2]
    (line,) = lab.run_cell(Cell("slots", 3, 2, 0), config, steps, tmp_path)
    assert line["slots"] == pytest.approx(config.slots, rel=0.05)


def test_a_real_cell_trains_so_many_steps_and_decodes_at_each_temperature(tmp_path):
    lines = lab.run_cell(Cell("slots", 2, 2, 0), SMALL, 2, tmp_path)
    assert [line["temperature"] for line in lines] == [0.0, 1.0]
    for line in lines:
        assert line["steps"] == 2 and line["slots"] > 0
        # Every answer has 8 tokens at most, the first of which belongs to no round.
        assert 1 <= line["tau"] <= 3 and 2 <= line["rounds"] <= 14
        assert line["accepted_0"] >= line["accepted_1"] >= 0
    again = lab.run_cell(Cell("slots", 2, 2, 0), SMALL, 2, tmp_path / "again")
    assert [line | {"seconds": 0} for line in again] == [line | {"seconds": 0} for line in lines]


def test_the_shipped_sweep_has_every_cell_three_times():
    table = load_sweep()
    cells = table.groupby(["budget", "num_anchors", "block_size", "temperature"])["seed"]
    assert len(cells) == 2 * 12 * 2 and (cells.nunique() == 3).all() and (cells.size() == 3).all()
    assert table["tau"].between(1, table["block_size"] + 1).all()
    plan = SweepConfig()
    slots = table[table["budget"] == "slots"]
    # What was drawn lies around what was expected, the closer the more steps there were.
    off = (slots["slots"] / plan.slots - 1).abs()
    assert (off < 0.2).all() and (off[slots["steps"] > 200] < 0.02).all()


def test_the_command_line_has_the_flags_that_it_always_had():
    options, config = parsed([]), SweepConfig()
    expected = {"num_anchors": (4, 12, 32, 96), "block_sizes": (4, 7, 12), "seeds": (0, 1, 2)}
    expected |= {"temperatures": (0.0, 1.0), "slots": 250000, "seconds": 75.0, "prompts": 60}
    expected |= {"max_new_tokens": 64, "target": "pocket", "data": None, "held_out": None}
    expected |= {"device": "cpu", "features": "cached", "batch_size": 16, "max_length": 512}
    expected |= {"learning_rate": 0.003, "training": config.training, "processes": 1}
    expected |= {"work": Path("build/sweep"), "out": DATA / "pocket" / "sweep.csv"}
    assert vars(options) == expected | {"address": None}
    assert options.config() == config
    changed = parsed("--num-anchors 2 3 --max-length 64 --temperatures 0.5 --address auto".split())
    assert changed.address == "auto"
    training = replace(config.training, max_length=64)
    given = {"num_anchors": (2, 3), "temperatures": (0.5,), "training": training}
    assert changed.config() == replace(config, **given)


@pytest.mark.slow
def test_the_command_runs_as_a_module_whose_jobs_workers_can_import(tmp_path, monkeypatch, capsys):
    """Jobs of ``__main__`` would be looked for in the worker's own ``__main__``.

    The worker is a new process that imports the module as ``python -m`` does, warnings as errors.
    """
    target, data = target_on_disk(tmp_path)
    command = ["--target", str(target), "--data", str(data), "--held-out", str(data)]
    command += "--num-anchors 2 --block-sizes 2 --seeds 0 --slots 4 --seconds 1".split()
    command += "--prompts 1 --max-new-tokens 4 --temperatures 0 --features live".split()
    command += ["--work", str(tmp_path / "work"), "--out", str(tmp_path / "table.csv")]
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "step_seconds.json").write_text('{"n2-k2": 1.0}')
    monkeypatch.setattr(sys, "argv", ["sweep", *command, "--batch-size", "2"])
    monkeypatch.setattr(sys, "warnoptions", ["error::RuntimeWarning"])
    monkeypatch.delitem(sys.modules, "dspark_lab.tuning.sweep")
    run_module("dspark_lab.tuning.sweep", run_name="__main__", alter_sys=True)
    assert capsys.readouterr().out == f"2 lines in {tmp_path / 'table.csv'}\n"
    assert load_sweep(tmp_path / "table.csv")["steps"].tolist() == [1, 1]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--seconds", "0"], "seconds must be > 0"),
        (["--seeds", "1", "1"], "seeds must hold each value once"),
        (["--target", "mine"], "target 'mine' needs data and held_out"),
    ],
)
def test_the_command_line_says_what_is_wrong(given, message, here):
    with pytest.raises(SystemExit, match=f"^python -m dspark_lab.tuning.sweep: .*{message}"):
        main([*given, "--work", str(here), "--out", str(here / "table.csv")])


def test_an_interval_is_students_over_the_pooled_spread():
    table = pd.DataFrame({"num_anchors": [8] * 3 + [16] * 3, "seed": [0, 1, 2] * 2})
    table = table.assign(budget="slots", temperature=0.0, block_size=4, steps=1, slots=1, seconds=1)
    table["tau"] = [1.0, 2.0, 3.0, 4.0, 4.0, 4.0]
    found = cell_table(table)
    # Squares 2 + 0 over four degrees of freedom; the quantile from a printed table.
    half = 2.776 * math.sqrt(2 / 4) / math.sqrt(3)
    assert found["tau"].tolist() == [2.0, 4.0]
    assert (found["high"] - found["tau"]).tolist() == pytest.approx([half, half], abs=1e-3)
    assert (found["tau"] - found["low"]).tolist() == pytest.approx([half, half], abs=1e-3)
    lone = cell_table(table[table["seed"] == 0])
    assert lone["low"].isna().all() and lone["tau"].tolist() == [1.0, 4.0]
