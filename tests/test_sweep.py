"""A sweep runs every cell once, on the budget it was given, and goes on where it stopped."""

import json
import math
import sys
from collections.abc import Callable
from dataclasses import asdict, astuple, replace
from itertools import product
from pathlib import Path
from runpy import run_module
from typing import Any

import numpy as np
import pandas as pd
import pytest

from dspark_lab.chats import collate
from dspark_lab.rates import whole_block_anchors
from dspark_lab.tuning import (
    Cell,
    SweepConfig,
    evaluation_steps,
    load_runs,
    measure_sweep,
    run_cell,
    run_sweep,
    run_table,
    runs_table,
    save_runs,
    supervision,
    window_ends,
)
from dspark_lab.tuning import runs as lab
from dspark_lab.tuning.sweep import main, parsed
from tests.runs import target_on_disk

SMALL = SweepConfig(num_anchors=(2, 3), block_sizes=(2,), seeds=(0, 1), slots=(100,), seconds=(3,))
SMALL = replace(SMALL, batch_sizes=(16,), corners=False, features="live")
SMALL = replace(SMALL, prompts=2, max_new_tokens=8)
SMALL = replace(SMALL, evaluate_chats=3, evaluate_anchors=2, evaluations=3)
SECONDS = {"all-rows16-n2-k2": 0.5, "all-rows16-n3-k2": 0.75}
CELL = Cell("slots", 100, "all", 16, 2, 2, 0)
# Of the runs that ship.
JUDGED = SweepConfig(mixes=("all", "code"))


def pretended(
    cell: Cell, config: SweepConfig, steps: int, step_seconds: float, work: Path
) -> dict[str, Any]:
    """What a cell returns, without training anything."""
    line = {"kind": "decoded", "domain": "all", "tau": 1 + cell.num_anchors / 10, "survival": [0.5]}
    line |= {"step": steps, "slots": 7, "tokens": 9, "seconds": 1.5, "blocks": 4}
    run = {**asdict(cell), "steps": steps, "step_seconds": step_seconds, "warmup_steps": 1}
    lines = [{**line, "temperature": t} for t in config.temperatures]
    return {"run": run, "lines": [{**line, "kind": "held_out"}, *lines]}


def noting(asked: list[str], most: int = 99) -> Callable[..., dict[str, Any]]:
    """Notes the cells that are run, of which only so many end well."""

    def run(cell: Cell, *others) -> dict[str, Any]:
        if len(asked) == most:
            raise OSError("no space")
        asked.append(cell.key)
        return pretended(cell, *others)

    return run


def measured(work: Path, seconds: dict[str, float] = SECONDS) -> Path:
    """A work folder whose times are measured already."""
    repeats = {kind: [[own, own]] * lab.STEP_REPEATS for kind, own in seconds.items()}
    (work / "step_seconds.json").write_text(json.dumps(repeats))
    return work


@pytest.fixture
def here(monkeypatch, tmp_path) -> Path:
    """A work folder whose times are measured already, and jobs that run in this process."""

    def in_turn(function, jobs, *, processes, address):
        return ((key, function(*given)) for key, given in jobs.items())

    monkeypatch.setattr(lab, "run_jobs", in_turn)
    return measured(tmp_path)


def run(work: Path, cell=pretended, config: SweepConfig = SMALL) -> pd.DataFrame:
    return run_sweep(config, work, progress=False, run=cell)


def test_the_sweep_to_judge_by_has_three_seeds_at_its_corners_and_takes_five_hours_of_one_core():
    cells = JUDGED.cells()
    settings = set(product(("all", "code"), (2, 8), (4, 16, 96), (4, 7, 15)))
    corners = set(product(("all", "code"), (2, 8), (4, 96), (4, 15)))
    budgets = (20, 60, 180)
    expected = {("seconds", b, *setting, 0) for setting in settings for b in budgets}
    expected |= {("seconds", b, *corner, s) for corner in corners for b in budgets for s in (1, 2)}
    assert {astuple(cell) for cell in cells} == expected
    assert len(cells) == len(expected) == 3 * (36 + 2 * 16)
    assert sum(cell.amount for cell in cells) == 68 * (20 + 60 + 180)
    # Seed 0 first, and short budgets first within a seed.
    order = [(cell.seed, cell.amount) for cell in cells]
    assert order == sorted(order)


def test_a_sweep_that_stopped_goes_on_with_the_cells_that_are_missing(here):
    asked: list[str] = []
    with pytest.raises(OSError, match="no space"):
        run(here, noting(asked, 3))
    assert len(list((here / "cells").iterdir())) == 3
    table = run(here, noting(asked))
    assert sorted(asked) == sorted(cell.key for cell in SMALL.cells())
    assert len(table) == len(asked)
    assert not table.duplicated(["budget", "num_anchors", "block_size", "seed"]).any()
    assert (table[["held_out", "decoded_0", "decoded_1"]].nunique(axis=1) == 1).all()
    assert table.equals(run(here, noting([], 0)))


def test_more_drafters_of_some_kinds_come_into_the_same_folder(here):
    first = run(here)
    kind = SMALL.cells()[0].kind
    more = replace(SMALL, only=(kind,), seeds=(7, 8), corners=True)
    assert [cell.key for cell in replace(more, corners=False).cells()] == [
        f"{kind}-seed7",
        f"{kind}-seed8",
    ]
    table = run(here, config=replace(more, corners=False))
    assert len(table) == len(first) + 2
    assert set(table["seed"]) == {*first["seed"], 7, 8}
    with pytest.raises(
        ValueError, match="only must name drafters of the sweep, got \\['nobody'\\]"
    ):
        replace(SMALL, only=(kind, "nobody"))


def test_a_folder_of_another_sweep_is_refused_and_says_what_differs(here):
    run(here)
    other = replace(SMALL, slots=(101,), prompts=7)
    with pytest.raises(ValueError, match="got one with other slots, prompts"):
        run(here, config=other)


def test_steps_are_what_the_budgets_pay(here):
    table = run(here)
    chats = lab.sweep_materials(SMALL).chats
    for anchors in SMALL.num_anchors:
        per_step = supervision(chats, anchors, 2).expected / len(chats) * 16
        steps = table[table["num_anchors"] == anchors].groupby("budget")["steps"].first()
        assert steps["slots"] == max(1, round(100 / per_step))
        assert steps["seconds"] == round(3 / SECONDS[f"all-rows16-n{anchors}-k2"])


def test_the_slots_of_a_real_run_of_planned_steps_are_those_of_the_budget(tmp_path):
    target, data = target_on_disk(tmp_path)
    lines = data.read_text().splitlines()[:5]
    data.write_text("\n".join(lines))
    # Of five rows one is left over, in whose batch three anchors would be as many as in one of two.
    per = {"anchors_per": "batch", "accumulate": 3}
    files = {"target": str(target), "data": str(data), "held_out": str(data)}
    options = {"prompts": 1, "max_new_tokens": 2, "temperatures": (0.0,), "batch_sizes": (2,)}
    config = replace(SMALL, training=replace(SMALL.training, **per), **files, **options)
    cell = Cell("slots", 400, "all", 2, 3, 2, 0)
    steps = lab._planned_steps(cell, config, pd.Series(dtype=float))
    found = run_cell(cell, config, steps, 1.0, tmp_path)
    assert found["lines"][-1]["slots"] == pytest.approx(400, rel=0.05)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> SweepConfig:
    """A sweep of a tiny target, two rows a step, over conversations of two domains."""
    folder = tmp_path_factory.mktemp("tiny")
    target, data = target_on_disk(folder)
    lines = [json.loads(line) for line in data.read_text().splitlines()]
    domains = ["math", "code"] * 3
    lines = [{**line, "domain": domain} for line, domain in zip(lines, domains, strict=True)]
    data.write_text("\n".join(map(json.dumps, lines)))
    files = {"target": str(target), "data": str(data), "held_out": str(data)}
    return replace(SMALL, batch_sizes=(2,), **files)


TINY_CELL = replace(CELL, batch_size=2)


@pytest.fixture(scope="module")
def real(tmp_path_factory, tiny) -> pd.DataFrame:
    """The runs of two real cells, of four steps and of one."""
    work = tmp_path_factory.mktemp("work")
    (work / "cells").mkdir()
    for cell, steps in ((TINY_CELL, 4), (replace(TINY_CELL, mix="code"), 1)):
        found = run_cell(cell, tiny, steps, 0.5, work)
        (work / "cells" / f"{cell.key}.json").write_text(json.dumps(found))
    return runs_table(work)


def test_a_real_cell_is_trained_evaluated_on_its_way_and_decoded_at_each_temperature(real):
    own = real[real["mix"] == "all"]
    assert (own[["steps", "batch_size", "num_anchors", "seed"]] == [4, 2, 2, 0]).all(axis=None)
    assert own["learning_rate"].eq(3e-3).all() and own["warmup_steps"].eq(1).all()
    trained = own[own["kind"] == "train"]
    assert trained["step"].tolist() == [1, 2, 3, 4]
    assert (trained[["loss", "grad_norm", "tau"]] > 0).all(axis=None)
    # Two rows of two blocks of two slots, some cut at an answer's end.
    assert (np.diff([0, *trained["slots"]]) <= 8).all() and trained["slots"].is_monotonic_increasing
    held = own[own["kind"] == "held_out"]
    assert held["step"].tolist() == [step for step in (1, 2, 4) for _ in range(3)]
    assert held["domain"].tolist() == ["all", "math", "code"] * 3
    for line in own[own["kind"].isin(["held_out", "conversation"])].itertuples():
        assert line.tau == pytest.approx(1 + sum(line.survival), abs=1e-4)
        assert line.survival[0] == line.accept[0] and len(line.accept) == len(line.survival) == 2
    # A mean over the conversations, each of which is there at the end.
    last = held[(held["step"] == 4) & (held["domain"] == "all")].iloc[0]
    each = own[own["kind"] == "conversation"]
    assert each["step"].eq(4).all() and len(each) == last["conversations"] == 3
    assert last["tau"] == pytest.approx(each["tau"].mean(), abs=1e-4)
    assert last["blocks"] == each["blocks"].sum() == 3 * 2
    decoded = own[(own["kind"] == "decoded") & (own["domain"] == "all")]
    assert decoded["temperature"].tolist() == [0.0, 1.0] and decoded["step"].eq(4).all()
    # Every answer has 8 tokens at most, the first of which belongs to no round.
    assert decoded["tau"].between(1, 3).all() and decoded["blocks"].between(2, 14).all()
    # A running total has at a step the same value in every line.
    assert (own.groupby("step")[["slots", "tokens", "seconds"]].nunique() == 1).all(axis=None)


def test_drafters_of_all_block_sizes_meet_the_same_held_out_blocks(tiny, tmp_path):
    one = {"prompts": 1, "temperatures": (0.0,)}
    config = replace(tiny, block_sizes=(2, 5), evaluate_anchors=50, **one)
    short, long = (
        pd.DataFrame(
            run_cell(replace(TINY_CELL, block_size=size), config, 1, 1.0, tmp_path)["lines"]
        )
        for size in (2, 5)
    )
    by = ["kind", "domain", "conversation", "blocks"]
    met, other = (table.loc[table["accept"].notna(), by] for table in (short, long))
    pd.testing.assert_frame_equal(met, other)
    # Alone, the short one would find more of them.
    encoded = lab.sweep_materials(config).evaluated
    places = [len(whole_block_anchors(collate([row], 0), 5)) for row in encoded]
    assert met["blocks"].iloc[0] == sum(places)


def test_a_cell_that_was_killed_goes_on_from_its_checkpoint_and_ends_the_same(
    tiny, tmp_path, monkeypatch
):
    evaluate, calls = lab.evaluate, []

    def killed(*given, **named):
        calls.append(1)
        if len(calls) == 3:
            raise SystemExit
        return evaluate(*given, **named)

    whole = run_cell(TINY_CELL, tiny, 4, 0.5, tmp_path / "whole")
    monkeypatch.setattr(lab, "evaluate", killed)
    # A checkpoint every two steps.
    monkeypatch.setattr(lab, "CHECKPOINT_SECONDS", 1)
    with pytest.raises(SystemExit):
        run_cell(TINY_CELL, tiny, 4, 0.5, tmp_path / "killed")
    again = run_cell(TINY_CELL, tiny, 4, 0.5, tmp_path / "killed")
    # At steps 1 and 2, and twice at 4.
    assert len(calls) == 4
    for found in (whole, again):
        for line in found["lines"]:
            line.pop("spent", None), line.pop("seconds")
    np.testing.assert_equal(again, whole)


def test_a_cell_that_stops_at_a_step_has_the_lines_until_there_and_goes_on(tiny, tmp_path):
    whole = run_cell(TINY_CELL, tiny, 6, 0.5, tmp_path / "whole")
    begun = run_cell(TINY_CELL, tiny, 6, 0.5, tmp_path / "begun", 2)
    again = run_cell(TINY_CELL, tiny, 6, 0.5, tmp_path / "begun")
    for found in (whole, begun, again):
        for line in found["lines"]:
            line.pop("spent", None), line.pop("seconds")
    assert begun["run"] == whole["run"] == again["run"]
    # Evaluated where it stopped, and from there on as any other run.
    whole["lines"] = [
        line for line in whole["lines"] if line["kind"] != "held_out" or line["step"] >= 2
    ]
    np.testing.assert_equal(again["lines"], whole["lines"])
    until = [line for line in whole["lines"] if line["step"] <= 2]
    each = [line for line in begun["lines"] if line["kind"] == "conversation"]
    assert {line["kind"] for line in until} == {"train", "held_out"}
    others = [line for line in begun["lines"] if line["kind"] != "conversation"]
    np.testing.assert_equal(others, until)
    # In place of its end, where every conversation has a line.
    assert [line["step"] for line in each] == [2] * 3
    assert np.mean([line["tau"] for line in each]) == pytest.approx(
        next(line["tau"] for line in until if line["kind"] == "held_out" and line["step"] == 2),
        abs=1e-4,
    )


def test_evaluations_are_spaced_by_the_logarithm_and_windows_by_the_square_root():
    assert evaluation_steps(1000, 4) == [10, 46, 215, 1000]
    assert evaluation_steps(10_000, 12)[:2] + evaluation_steps(10_000, 12)[-1:] == [
        100,
        152,
        10_000,
    ]
    assert evaluation_steps(3, 12) == [1, 2, 3] and evaluation_steps(7, 1) == [7]
    assert window_ends(1600) == [i * i for i in range(1, 41)]
    assert window_ends(5) == [1, 2, 3, 4, 5] and window_ends(100, 2) == [25, 100]


def test_a_window_is_the_mean_of_its_steps(monkeypatch):
    monkeypatch.setattr(lab, "WINDOWS", 2)
    monkeypatch.setattr(lab, "window_ends", lambda steps: [1, 4])
    table = pd.DataFrame(dict.fromkeys(lab._MEANS, 1.0), index=range(4))
    table = table.assign(step=[1, 2, 3, 4], tau=[1.0, 2.0, 3.0, 4.0], lr=[0.1, 0.2, 0.3, 0.4])
    first, second = lab._window_lines(table, 4)
    assert (first["step"], second["step"]) == (1, 4)
    assert (first["tau"], second["tau"]) == (1.0, 3.0)
    assert second["tau_spread"] == 1.0 and math.isnan(first["tau_spread"])
    assert (first["lr"], second["lr"], second["loss"]) == (0.1, 0.4, 1.0)


def test_runs_are_the_same_in_a_file_which_says_which_sweep_they_are_of(real, tmp_path, here):
    run(here, config=replace(SMALL, slots=()))
    save_runs(runs_table(here), tmp_path / "planned.parquet")
    assert json.loads(load_runs(tmp_path / "planned.parquet").attrs["sweep"])["prompts"] == 2
    save_runs(real, tmp_path / "runs.parquet")
    found = load_runs(tmp_path / "runs.parquet")
    assert list(found) == list(real) and len(found) == len(real)
    for name in real:
        for one, other in zip(found[name], real[name], strict=True):
            if name in ("accept", "survival"):
                assert (one is None) == (not isinstance(other, list))
                assert one is None or one.tolist() == pytest.approx(other)
            elif isinstance(other, float):
                assert one == pytest.approx(other, nan_ok=True)
            else:
                assert (pd.isna(one) and pd.isna(other)) or one == other


def test_the_runs_of_the_sweep_to_judge_by_would_fill_less_than_three_megabytes(tmp_path):
    """Numbers without any pattern are as large as numbers can be in a file."""
    rng, runs = np.random.default_rng(0), []
    for cell in JUDGED.cells():
        rates = rng.random((48 + 48 + 8, 2, cell.block_size)).round(5)
        lines = [{"kind": "held_out", "accept": a, "survival": s} for a, s in rates.tolist()]
        lines += [dict(zip(lab._MEANS, rng.random(7).round(5), strict=True)) for _ in range(40)]
        runs += [
            asdict(cell) | dict.fromkeys(("steps", "warmup_steps", "step"), 1) | line
            for line in lines
        ]
    (tmp_path / "cells").mkdir()
    table = pd.DataFrame(runs).assign(slots=1, tokens=1, step_seconds=1.0, kind="held_out")
    save_runs(table.reindex(columns=list(runs_table(tmp_path))), tmp_path / "runs.parquet")
    assert (tmp_path / "runs.parquet").stat().st_size < 3_000_000


def test_step_times_are_measured_once_and_never_again(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(lab, "LEAST_SECONDS", 0.0)
    monkeypatch.setattr(lab, "LEAST_STEPS", 1)
    config = replace(tiny, num_anchors=(2,), seeds=(0,))
    table = measure_sweep(config, tmp_path, progress=False)
    assert list(table.index) == ["all-rows2-n2-k2"]
    (line,) = table.itertuples()
    assert 0 < line.fastest <= line.seconds <= line.slowest and line.clock > 0
    kept = (tmp_path / "step_seconds.json").read_bytes()
    monkeypatch.setattr(lab, "measure_cell", lambda *given: pytest.fail("measured again"))
    pd.testing.assert_frame_equal(measure_sweep(config, tmp_path, progress=False), table)
    assert (tmp_path / "step_seconds.json").read_bytes() == kept


def test_a_measurement_that_stopped_goes_on_with_the_repeats_that_are_missing(
    tmp_path, monkeypatch
):
    asked: list[tuple[str, int]] = []

    def pretend(cell: Cell, *others) -> list[float]:
        if len(asked) == 3:
            raise OSError("no space")
        asked.append((cell.step_kind, cell.seed))
        return [float(len(asked)), 9.0]

    monkeypatch.setattr(lab, "measure_cell", pretend)
    monkeypatch.setattr(lab, "STEP_REPEATS", 3)
    with pytest.raises(OSError, match="no space"):
        measure_sweep(SMALL, tmp_path, progress=False)
    before, asked = asked, []
    monkeypatch.setattr(lab, "measure_cell", lambda cell, *_: (asked.append(cell), [7.0, 8.0])[1])
    table = measure_sweep(SMALL, tmp_path, progress=False)
    first, second = SECONDS
    # Repeat by repeat, each on other batches.
    assert before == [(first, 0), (second, 0), (first, 1)]
    assert [(c.step_kind, c.seed) for c in asked] == [(second, 1), (first, 2), (second, 2)]
    assert table["seconds"].tolist() == [3.0, 7.0]
    assert table["fastest"].tolist() == [1.0, 2.0] and table["slowest"].tolist() == [7.0, 7.0]


def test_a_mix_is_a_domain_of_the_conversations(tiny):
    materials = lab.sweep_materials(tiny)
    assert [item.domain for item in materials.mix("code")] == ["code"] * 3
    assert len(materials.mix("all")) == 6
    with pytest.raises(ValueError, match=r"'all' or a domain of \['code', 'math'\], got 'x'"):
        materials.mix("x")


def test_the_command_line_has_the_flags_that_it_always_had():
    options, config = parsed([]), SweepConfig()
    expected = {"num_anchors": (4, 16, 96), "block_sizes": (4, 7, 15), "seeds": (0, 1, 2)}
    expected |= {"temperatures": (0.0, 1.0), "slots": (), "seconds": (20.0, 60.0, 180.0)}
    expected |= {"max_new_tokens": 64, "target": "pocket", "data": None, "held_out": None}
    expected |= {"device": "cpu", "features": "cached", "batch_sizes": (2, 8), "max_length": 512}
    expected |= {"mixes": ("all",), "corners": True, "only": (), "measure": False, "prompts": 60}
    expected |= {"evaluations": 12, "evaluate_chats": 48, "evaluate_anchors": 8}
    expected |= {"learning_rate": 0.003, "training": config.training, "processes": 1}
    expected |= {"work": Path("build/sweep"), "out": Path("build/sweep/runs.parquet")}
    assert vars(options) == expected | {"address": None}
    assert options.config() == config
    changed = parsed("--num-anchors 2 3 --max-length 64 --temperatures 0.5 --address auto".split())
    assert changed.address == "auto"
    training = replace(config.training, max_length=64)
    given = {"num_anchors": (2, 3), "temperatures": (0.5,), "training": training}
    assert changed.config() == replace(config, **given)
    assert parsed(["--batch-size", "4"]).batch_sizes == (4,)
    assert parsed(["--mixes", "all", "code"]).config() == JUDGED


def test_the_command_measures_alone_and_writes_the_runs(here, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(lab, "run_cell", pretended)
    command = "--num-anchors 2 3 --block-sizes 2 --batch-size 16 --seeds 0 --seconds 3 6".split()
    command += ["--work", str(here), "--out", str(tmp_path / "runs.parquet")]
    main([*command, "--measure"])
    assert "all-rows16-n3-k2     0.75" in capsys.readouterr().out
    assert not (tmp_path / "runs.parquet").exists()
    main(command)
    assert len(run_table(load_runs(tmp_path / "runs.parquet"))) == 4
    told = capsys.readouterr().err.splitlines()
    assert told[0].startswith("1 of 4 cells, seconds3-all-rows16-n2-k2-seed0; ")
    assert told[3].endswith("; 0:00:00 left") and len(told) == 4


@pytest.mark.slow
def test_the_command_runs_as_a_module_whose_jobs_workers_can_import(tmp_path, monkeypatch, capsys):
    """Jobs of ``__main__`` would be looked for in the worker's own ``__main__``.

    The worker is a new process that imports the module as ``python -m`` does, warnings as errors.
    """
    target, data = target_on_disk(tmp_path)
    command = ["--target", str(target), "--data", str(data), "--held-out", str(data)]
    command += "--num-anchors 2 --block-sizes 2 --seeds 0 --slots 4 --seconds 1".split()
    command += "--prompts 1 --max-new-tokens 4 --temperatures 0 --features live".split()
    command += ["--work", str(tmp_path / "work"), "--out", str(tmp_path / "runs.parquet")]
    (tmp_path / "work").mkdir()
    measured(tmp_path / "work", {"all-rows2-n2-k2": 1.0})
    monkeypatch.setattr(sys, "argv", ["sweep", *command, "--batch-size", "2"])
    monkeypatch.setattr(sys, "warnoptions", ["error::RuntimeWarning"])
    monkeypatch.delitem(sys.modules, "dspark_lab.tuning.sweep")
    run_module("dspark_lab.tuning.sweep", run_name="__main__", alter_sys=True)
    found = load_runs(tmp_path / "runs.parquet")
    assert capsys.readouterr().out == f"{len(found)} lines in {tmp_path / 'runs.parquet'}\n"
    assert run_table(found)["steps"].tolist() == [1, 1]


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
        main([*given, "--work", str(here), "--out", str(here / "runs.parquet")])


def test_a_run_stands_in_one_line_with_what_it_reached_at_its_end(real):
    table = run_table(real)
    assert table[["mix", "steps"]].values.tolist() == [["all", 4], ["code", 1]]
    ended = real[(real["mix"] == "all") & (real["step"] == 4) & (real["domain"] == "all")]
    first = table.iloc[0]
    taus = ended.set_index(["kind", "temperature"])["tau"]
    assert first["held_out"] == taus["held_out"].iloc[0]
    assert first["decoded_0"] == taus["decoded", 0.0]
    assert first["decoded_1"] == taus["decoded", 1.0]
    assert first["slots"] == ended["slots"].max() == real.loc[real["mix"] == "all", "slots"].max()
    held = real[(real["kind"] == "held_out") & (real["domain"] == "math")]
    assert run_table(real, domain="math")["held_out"].tolist() == held["tau"].iloc[[2, 3]].tolist()
    with pytest.raises(ValueError, match="domain must be one of .*, got 'x'"):
        run_table(real, domain="x")
