"""Sweeps: drafters trained over anchors, block size, rows and mixes, and what came of each.

A cell's drafter is trained for as many steps as its budget pays: until it has seen so many
supervised slots, in expectation, or for so many seconds of a training step's own time, which is
measured once for each kind of step. On its way it is evaluated on the same held-out blocks as every
other, which its budget does not pay for; then it decodes the same held-out prompts.

A finished cell is one file in the work folder, an unfinished one has its checkpoints there: the
same call goes on where it stopped.
"""

from __future__ import annotations

import json
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from dspark_lab.chats import Chat, Encoded, collate, load_chats
from dspark_lab.checks import Count, NonNegative, Positive, checked
from dspark_lab.decoding import decode
from dspark_lab.files import read_json, write_json
from dspark_lab.model import Drafter, Target, cached_features, load_target
from dspark_lab.pairs import in_turns, load_pair, question
from dspark_lab.rates import evaluate, whole_block_anchors
from dspark_lab.training import (
    ChatsLike,
    History,
    TrainConfig,
    encode_chats,
    mask_token_id,
    new_drafter,
    train,
)
from dspark_lab.tuning.cells import ALL, Cell, SweepConfig
from dspark_lab.tuning.coverage import supervision
from dspark_lab.tuning.jobs import end_with_parent, run_jobs
from dspark_lab.tuning.results import run_table, runs_table
from dspark_lab.tuning.spans import Spans, training_steps

# A step's time: the median over repeats, each the mean over at least so many steps and seconds
# behind the first few. The repeats of all kinds take turns, so that a disturbance hits many.
STEP_REPEATS, LEAST_STEPS, LEAST_SECONDS, FIRST_STEPS = 3, 5, 2.0, 2
# What a kill may cost: seconds of training between checkpoints.
CHECKPOINT_SECONDS = 30
# Windows of training metrics.
WINDOWS = 40
_MEANS = ["loss", "ce", "l1", "confidence", "accept_rate", "tau", "grad_norm"]
_TOTALS = ["slots", "tokens", "seconds"]


@checked
def run_sweep(
    config: SweepConfig,
    work: str | Path,
    *,
    processes: int = 1,
    address: str | None = None,
    progress: bool = True,
    run: Callable[..., dict[str, Any]] | None = None,
) -> pd.DataFrame:
    """Trains and decodes every cell that ``work`` does not hold yet; returns :func:`run_table`.

    Args:
        config: the sweep; ``work`` must hold no other.
        work: for results, unfinished runs, and cached features; nodes of a cluster that do not see
            it use one of the same name of their own for the latter two.
        processes, address: see :func:`dspark_lab.tuning.run_jobs`.
        progress: write a line for each finished cell, with the time that is left.
        run: called for each cell, :func:`run_cell` by default.
    """
    seconds = measure_sweep(config, work, progress=progress)["seconds"]
    work = Path(work).absolute()
    (work / "cells").mkdir(exist_ok=True)
    cells = {cell.key: cell for cell in config.cells()}
    left = [key for key in cells if not (work / "cells" / f"{key}.json").exists()]
    steps = {key: _planned_steps(cells[key], config, seconds) for key in left}
    own = {key: float(seconds[cells[key].step_kind]) for key in left}
    jobs = {key: (cells[key], config, steps[key], own[key], work) for key in left}
    planned = {key: steps[key] * own[key] for key in left}
    begin, whole = time.monotonic(), sum(planned.values())
    for key, result in run_jobs(run or run_cell, jobs, processes=processes, address=address):
        write_json(work / "cells" / f"{key}.json", result, indent=0)
        shutil.rmtree(work / "runs" / key, ignore_errors=True)
        del planned[key]
        if progress:
            rest = sum(planned.values())
            wait = (time.monotonic() - begin) * rest / (whole - rest)
            done = f"{len(cells) - len(planned)} of {len(cells)} cells, {key}"
            print(f"{done}; {timedelta(seconds=round(wait))} left", file=sys.stderr, flush=True)
    return run_table(runs_table(work))


@checked
def measure_sweep(config: SweepConfig, work: str | Path, *, progress: bool = True) -> pd.DataFrame:
    """Measures the step times that ``work`` does not hold yet; what it holds stays as it is.

    On a CPU a time is that of one thread's own work, but a busy machine makes this longer, too: its
    memory is shared. So this is for a quiet one, before the sweep.

    Returns:
        one line for each kind of step, by its name: ``seconds``, the median of the repeats, the
        ``fastest`` and the ``slowest`` of these, and ``clock``, the median by the wall's clock,
        which shows whether the machine was quiet.
    """
    work = Path(work).absolute()
    work.mkdir(parents=True, exist_ok=True)
    require_same_sweep(work / "sweep.json", config)
    path = work / "step_seconds.json"
    known: dict[str, list[list[float]]] = read_json(path) if path.exists() else {}
    kinds = {cell.step_kind: cell for cell in config.cells()}
    for repeat in range(STEP_REPEATS):
        for kind, cell in kinds.items():
            found = known.setdefault(kind, [])
            if len(found) > repeat:
                continue
            found.append(measure_cell(replace(cell, seed=repeat), config, work))
            write_json(path, known, indent=0)
            if progress:
                told = f"{kind}, repeat {repeat + 1} of {STEP_REPEATS}: {found[-1][0] * 1e3:.1f} ms"
                print(told, file=sys.stderr, flush=True)
    lines = {}
    for kind in kinds:
        own, clock = zip(*known[kind], strict=True)
        lines[kind] = (statistics.median(own), min(own), max(own), statistics.median(clock))
    columns = ["seconds", "fastest", "slowest", "clock"]
    return pd.DataFrame.from_dict(lines, orient="index", columns=columns)


@checked
def run_cell(
    cell: Cell,
    config: SweepConfig,
    steps: Count,
    step_seconds: Positive,
    work: Path,
    until: Count | None = None,
) -> dict[str, Any]:
    """Trains one drafter, evaluates it on the way, and decodes with it.

    With ``until`` it stops after that step, evaluated there and where earlier calls stopped, with
    the lines of each conversation in place of what it decodes at its end; a later call goes on.

    Returns its settings, ``run``, and its ``lines``, both as in :func:`load_runs`.
    """
    until = min(until or steps, steps)
    torch.set_num_threads(1)
    end_with_parent()
    materials, out = sweep_materials(config), work / "runs" / cell.key
    training = cell_training(cell, config, steps, step_seconds)
    drafter = cell_drafter(cell, materials)
    held_out = _HeldOut(config, materials, drafter, work)
    points = evaluation_steps(steps, config.evaluations) if until == steps else [until]

    def on_metrics(row: dict[str, Any]) -> None:
        # Before the checkpoint of its step, so that no checkpoint lacks an evaluation.
        if row["step"] in points:
            lines = held_out.lines(drafter, each=row["step"] in (until, steps))
            write_json(out / f"evaluation-{row['step']}.json", lines, indent=0)

    history = _train(drafter, cell, config, training, work, out, on_metrics, until)
    table = history.table()
    if len(table) < until:
        raise KeyboardInterrupt
    totals = table[_TOTALS].cumsum().set_index(table["step"]).round(3)
    lines = [line for line in _window_lines(table, steps) if line["step"] <= until]
    # A run that began as a pilot has not been evaluated before that one's end.
    for point in _evaluated(out, until):
        found = read_json(out / f"evaluation-{point}.json", list)
        last = point == points[-1]
        kept = (line for line in found if last or line["kind"] != "conversation")
        lines += [{**line, "step": point} for line in kept]
    for line in _decoded_lines(cell, config, materials, drafter) if until == steps else ():
        lines.append({**line, "step": steps})
    lines = [{**line, **totals.loc[line["step"]].to_dict()} for line in lines]
    run = {**asdict(cell), "steps": steps, "step_seconds": step_seconds}
    run |= {"learning_rate": training.learning_rate, "warmup_steps": training.warmup_steps}
    return {"run": run, "lines": lines}


@checked
def measure_evaluation(cell: Cell, config: SweepConfig, work: Path) -> float:
    """Seconds of an evaluation on the held-out conversations, by the time of this process.

    On a CPU; elsewhere by the clock. Of a drafter that has learned nothing, after a first one.
    """
    materials = sweep_materials(config)
    drafter = cell_drafter(cell, materials)
    drafter.to(materials.target.device)
    held_out = _HeldOut(config, materials, drafter, work)
    own = time.process_time if materials.target.device.type == "cpu" else time.perf_counter
    begin = own()
    held_out.lines(drafter, each=False)
    return own() - begin


@checked
def evaluation_steps(steps: Count, count: Count) -> list[int]:
    """At most ``count`` of the steps, evenly spaced in their logarithm, from 1 % to the last."""
    spaced = np.geomspace(steps, max(1, steps / 100), count)
    return sorted({round(step) for step in spaced.tolist()})


@checked
def window_ends(steps: Count, count: Count = WINDOWS) -> list[int]:
    """The last steps of at most ``count`` windows; half of them are in the first quarter."""
    return sorted({-(-steps * i * i // count**2) for i in range(1, count + 1)})


def _evaluated(out: Path, until: int) -> list[int]:
    """The steps at which a run was evaluated, up to one."""
    steps = (int(path.stem.partition("-")[2]) for path in out.glob("evaluation-*.json"))
    return sorted(step for step in steps if step <= until)


def _window_lines(table: pd.DataFrame, steps: int) -> list[dict[str, Any]]:
    """The means of each window's steps, tau's standard deviation, and the last learning rate."""
    ends = np.array(window_ends(steps))
    windows = table.groupby(ends[np.searchsorted(ends, table["step"])])
    means = windows[_MEANS].mean().round(5)
    means["tau_spread"] = windows["tau"].std().round(5)
    means["lr"] = windows["lr"].last()
    means.insert(0, "kind", "train")
    return means.rename_axis("step").reset_index().to_dict("records")


class _HeldOut:
    """The held-out conversations that every drafter of a sweep is evaluated on."""

    def __init__(
        self, config: SweepConfig, materials: Materials, drafter: Drafter, work: Path
    ) -> None:
        slots = max(config.block_sizes)
        self.target, self.encoded = materials.target, materials.evaluated
        self.options: dict[str, Any] = {"slots": slots, "num_anchors": config.evaluate_anchors}
        if config.features == "cached":
            layers, folder = drafter.config.target_layer_ids, work / "features"
            stored = None if self.target.dtype == torch.float64 else torch.bfloat16
            self.options["features"] = cached_features(
                self.target, self.encoded, layers, folder, dtype=stored, progress=False
            )

    def lines(self, drafter: Drafter, *, each: bool) -> list[dict[str, Any]]:
        """Means over all conversations and those of each domain; of ``each``, where asked for."""
        begin = time.perf_counter()
        table = evaluate(drafter, self.target, self.encoded, **self.options)
        spent = round(time.perf_counter() - begin, 3)
        slots = range(drafter.config.predicted)
        lines = []
        for domain, part in [(ALL, table), *table.groupby("domain", sort=False)]:
            line = {"kind": "held_out", "domain": domain, "conversations": len(part)}
            lines.append({**line, **_rates(part, slots)})
        lines[0]["spent"] = spent
        for row in range(len(table)) if each else ():
            one = table.iloc[[row]]
            line = {"kind": "conversation", **one[["domain", "conversation"]].iloc[0].to_dict()}
            lines.append({**line, "conversations": 1, **_rates(one, slots)})
        return lines


def _rates(table: pd.DataFrame, slots: range) -> dict[str, Any]:
    found: dict[str, Any] = {"blocks": int(table["blocks"].sum())}
    found["tau"] = round(float(table["tau"].mean()), 5)
    for name in ("accept", "survival"):
        columns = table[[f"{name}_{slot}" for slot in slots]]
        found[name] = columns.mean().round(5).tolist()
    return found


def _decoded_lines(
    cell: Cell, config: SweepConfig, materials: Materials, drafter: Drafter
) -> list[dict[str, Any]]:
    """Tau by decoding, and the share of whole blocks whose slot was accepted, at each temperature.

    Blocks cut at the end of an answer say nothing of the slots that were not there.
    """
    asked = materials.asked
    questions = [question(chat) for chat in asked]
    options: dict[str, Any] = {"max_new_tokens": config.max_new_tokens, "seed": cell.seed}
    options["domains"] = [chat.domain or "none" for chat in asked]
    lines = []
    for temperature in config.temperatures:
        begin = time.perf_counter()
        decoded = decode(materials.target, drafter, questions, temperature=temperature, **options)
        spent, rounds = time.perf_counter() - begin, decoded.rounds
        for domain, part in [(ALL, rounds), *rounds.groupby("domain", sort=False)]:
            accepted = part["accepted"][part["drafted"] == drafter.config.predicted]
            shares = [float((accepted > slot).mean()) for slot in range(drafter.config.predicted)]
            line = {"kind": "decoded", "temperature": temperature, "domain": domain}
            line |= {"conversations": part["prompt"].nunique(), "blocks": len(part)}
            line |= {"tau": round(float(part["tokens"].mean()), 4)}
            line |= {"spent": round(spent, 3)} if domain == ALL else {}
            lines.append({**line, "survival": [round(share, 4) for share in shares]})
    return lines


def _planned_steps(cell: Cell, config: SweepConfig, seconds: pd.Series) -> int:
    """As many steps as the cell's budget pays, one at least."""
    if cell.budget == "seconds":
        return max(1, round(cell.amount / seconds[cell.step_kind]))
    chats, training = sweep_materials(config).mix(cell.mix), config.training
    spans = Spans.of(chats, row_length=training.pack_length)
    per: dict[str, Any] = {"per": training.anchors_per}
    trained, batches = training_steps(spans, cell.batch_size, **per)
    per_pass = supervision(trained, cell.num_anchors, cell.block_size, **per).expected
    return max(1, round(cell.amount / (per_pass / batches * training.accumulate)))


class _Enough(Exception):
    """Raised by a measurement in the middle of training."""


@checked
def measure_cell(
    cell: Cell, config: SweepConfig, work: Path, least_seconds: NonNegative | None = None
) -> list[float]:
    """Seconds of a training step, by the time of this process and by the clock.

    The mean over at least so many seconds, by default :data:`LEAST_SECONDS`.
    """
    least = LEAST_SECONDS if least_seconds is None else least_seconds
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    materials = sweep_materials(config)
    on_cpu = materials.target.device.type == "cpu"
    own = time.process_time if on_cpu else time.perf_counter
    times: list[tuple[float, float]] = []

    def on_metrics(row: dict[str, Any]) -> None:
        times.append((own(), time.perf_counter()))
        behind = len(times) - FIRST_STEPS
        if behind >= LEAST_STEPS and times[-1][0] - times[FIRST_STEPS - 1][0] >= least:
            raise _Enough

    training = replace(cell_training(cell, config, 2**20, 1.0), checkpoint_every=0)
    drafter = cell_drafter(cell, materials)
    with tempfile.TemporaryDirectory() as folder:
        try:
            _train(drafter, cell, config, training, work, Path(folder), on_metrics)
        except _Enough:
            pass
    torch.set_num_threads(threads)
    first, last = times[FIRST_STEPS - 1], times[-1]
    return [(b - a) / (len(times) - FIRST_STEPS) for a, b in zip(first, last, strict=True)]


def cell_training(cell: Cell, config: SweepConfig, steps: int, step_seconds: float) -> TrainConfig:
    """The settings of a cell's run."""
    return replace(
        config.training,
        steps=steps,
        batch_size=cell.batch_size,
        num_anchors=cell.num_anchors,
        seed=cell.seed,
        warmup_steps=max(1, steps // 20),
        checkpoint_every=max(1, round(CHECKPOINT_SECONDS / step_seconds)),
    )


def cell_drafter(cell: Cell, materials: Materials) -> Drafter:
    """A cell's drafter before its first step."""
    torch.manual_seed(cell.seed)
    mask = mask_token_id(None, materials.target, materials.chats)
    sizes: dict[str, Any] = {"block_size": cell.block_size, "num_anchors": cell.num_anchors}
    return new_drafter(materials.target, mask_token_id=mask, **sizes)


def _train(
    drafter: Drafter,
    cell: Cell,
    config: SweepConfig,
    training: TrainConfig,
    work: Path,
    out: Path,
    on_metrics: Callable[[dict[str, Any]], None],
    until: int | None = None,
) -> History:
    materials = sweep_materials(config)
    options: dict[str, Any] = {"features": config.features, "cache": work / "features"}
    chats = materials.mix(cell.mix)
    options |= {"out": out, "progress": False, "on_metrics": on_metrics, "until": until}
    return train(drafter, materials.target, chats, training, **options)


@dataclass(frozen=True, eq=False)
class Materials:
    """The target, conversations to learn from, others to evaluate on, and those asked."""

    target: Target
    chats: Sequence[Encoded]
    evaluated: Sequence[Encoded]
    asked: list[Chat]

    def mix(self, name: str) -> Sequence[Encoded]:
        if name == ALL:
            return self.chats
        found = [item for item in self.chats if item.domain == name]
        if not found:
            domains = sorted({str(item.domain) for item in self.chats})
            raise ValueError(f"mixes must be {ALL!r} or a domain of {domains}, got {name!r}")
        return found


@lru_cache(maxsize=1)
def sweep_materials(config: SweepConfig) -> Materials:
    """What all drafters of a sweep share, loaded once."""
    if config.target == "pocket":
        pair = load_pair(device=config.device)
        target, others = pair.target, pair.held_out
        chats: ChatsLike = pair.chats
    else:
        assert config.data is not None and config.held_out is not None
        target = load_target(config.target, device=config.device)
        chats, others = config.data, load_chats(config.held_out).conversations
    longest, slots = config.training.max_length, max(config.block_sizes)
    encoded = encode_chats(chats, target.tokenizer, longest)
    turns = in_turns(others)
    rows = encode_chats(turns, target.tokenizer, longest)
    holds = [len(whole_block_anchors(collate([row], 0), slots)) > 0 for row in rows]
    # In turns again: the domains lose unequally many.
    found = in_turns(chat for chat, block in zip(turns, holds, strict=True) if block)
    evaluated = encode_chats(found[: config.evaluate_chats], target.tokenizer, longest)
    if not evaluated:
        wanted = f"a conversation with {slots + 1} supervised tokens in a row"
        raise ValueError(f"held_out must hold {wanted}, got none in {len(turns)}")
    return Materials(target, encoded, evaluated, turns[: config.prompts])


def require_same_sweep(path: Path, config: SweepConfig) -> None:
    """Note the sweep in a file of its work folder, or refuse the folder of another one."""
    # As JSON has it: tuples are lists there. More drafters of the same sweep may come later.
    given = json.loads(json.dumps(asdict(config)))
    chosen = ("seeds", "corners", "only")
    if not path.exists():
        write_json(path, given, indent=1)
    saved = read_json(path)
    compared = (name for name in given if name not in chosen)
    other = ", ".join(name for name in compared if saved.get(name) != given[name])
    if other:
        wanted = "a new folder or one of the same sweep"
        raise ValueError(f"{path.parent} must be {wanted}, got one with other {other}")
