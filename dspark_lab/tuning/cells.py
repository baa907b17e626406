"""Sweeps: drafters trained over anchors x block size, and their accepted length by decoding.

A cell is (budget, num_anchors, block_size, seed). Its drafter is trained for as many steps as the
budget pays: until it has seen ``slots`` supervised slots, in expectation, or for ``seconds`` of a
training step's own time, which is measured once for each (num_anchors, block_size). Then it decodes
the same held-out prompts as every other. A finished cell is one file in the work folder; the same
call goes on where it stopped.
"""

from __future__ import annotations

import json
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from itertools import product
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import pandas as pd
import torch
from tqdm import tqdm

from dspark_lab.chats import Chat, Encoded, load_chats
from dspark_lab.checks import Count, NonNegative, NotEmpty, Positive, Size, checked
from dspark_lab.decoding import decode
from dspark_lab.files import read_csv, read_json, shipped, write_json
from dspark_lab.model import Drafter, Target, load_target
from dspark_lab.pairs import in_turns, load_pair, question
from dspark_lab.training import (
    ChatsLike,
    History,
    TrainConfig,
    encode_chats,
    mask_token_id,
    new_drafter,
    train,
)
from dspark_lab.tuning.coverage import supervision
from dspark_lab.tuning.jobs import run_jobs
from dspark_lab.tuning.spans import Spans, training_steps

Budget = Literal["slots", "seconds"]
BUDGETS: tuple[Budget, ...] = get_args(Budget)
# The columns that a table of results is sorted by.
_BY = ["budget", "temperature", "block_size", "num_anchors", "seed"]


@dataclass(frozen=True)
class Cell:
    """One drafter of the sweep."""

    budget: Budget
    num_anchors: int
    block_size: int
    seed: int

    @property
    def key(self) -> str:
        return f"{self.budget}-n{self.num_anchors}-k{self.block_size}-seed{self.seed}"


@checked
@dataclass(frozen=True)
class SweepConfig:
    """The settings to sweep, and the budget of each drafter.

    Args:
        num_anchors: blocks of a row.
        block_sizes: slots of a block.
        seeds: drafters of each kind.
        slots: supervised slots of the first budget.
        seconds: training time of the second budget.
        prompts: held-out questions to decode, domains in turn.
        max_new_tokens: of an answer.
        temperatures: at which every prompt is decoded.
        target: pocket, or a folder or hub id, which needs data and held_out.
        data: file of conversations to learn from.
        held_out: file of conversations whose questions are asked.
        device: of target and drafters.
        features: of the target, stored first or asked for every batch.
        training: all other settings of a run; steps, anchors, seed and warmup are the cell's.
    """

    num_anchors: Annotated[tuple[Count, ...], NotEmpty()] = (4, 12, 32, 96)
    block_sizes: Annotated[tuple[Count, ...], NotEmpty()] = (4, 7, 12)
    seeds: Annotated[tuple[Size, ...], NotEmpty()] = (0, 1, 2)
    slots: Count = 250_000
    seconds: Positive = 75.0
    prompts: Count = 60
    max_new_tokens: Count = 64
    temperatures: Annotated[tuple[NonNegative, ...], NotEmpty()] = (0.0, 1.0)
    target: str = "pocket"
    data: str | None = None
    held_out: str | None = None
    device: str = "cpu"
    features: Literal["cached", "live"] = "cached"
    training: TrainConfig = TrainConfig(
        steps=1,
        batch_size=16,
        max_length=512,
        learning_rate=3e-3,
        weight_decay=0.01,
        precision="bf16",
        checkpoint_every=100,
        keep_checkpoints=1,
    )

    def __post_init__(self) -> None:
        for name in ("num_anchors", "block_sizes", "seeds", "temperatures"):
            values = getattr(self, name)
            if len(set(values)) != len(values):
                raise ValueError(f"{name} must hold each value once, got {values}")
        if self.target != "pocket" and not (self.data and self.held_out):
            raise ValueError(f"target {self.target!r} needs data and held_out")

    def cells(self) -> list[Cell]:
        """Seed by seed, so that a sweep that was stopped early has whole tables."""
        every = product(self.seeds, BUDGETS, self.block_sizes, self.num_anchors)
        return [Cell(budget, n, block_size, seed) for seed, budget, block_size, n in every]


@checked
def run_sweep(
    config: SweepConfig,
    work: str | Path,
    *,
    processes: int = 1,
    address: str | None = None,
    progress: bool = True,
    run: Callable[..., list[dict[str, Any]]] | None = None,
) -> pd.DataFrame:
    """Trains and decodes every cell that ``work`` does not hold yet; returns :func:`sweep_table`.

    Args:
        config: the sweep; ``work`` must hold no other.
        work: for results, unfinished runs, and cached features; nodes of a cluster that do not see
            it use one of the same name of their own for the latter two.
        processes, address: see :func:`dspark_lab.tuning.run_jobs`.
        run: called for each cell, :func:`run_cell` by default.
    """
    work = Path(work).absolute()
    (work / "cells").mkdir(parents=True, exist_ok=True)
    _require_same_sweep(work / "sweep.json", config)
    cells = config.cells()
    left = [cell for cell in cells if not (work / "cells" / f"{cell.key}.json").exists()]
    if left:
        steps = _planned_steps(config, work)
        jobs = {
            cell.key: (cell, config, steps[cell.budget, cell.num_anchors, cell.block_size], work)
            for cell in left
        }
        with tqdm(total=len(cells), initial=len(cells) - len(left), disable=not progress) as bar:
            for key, rows in run_jobs(run or run_cell, jobs, processes=processes, address=address):
                write_json(work / "cells" / f"{key}.json", rows, indent=1)
                shutil.rmtree(work / "runs" / key, ignore_errors=True)
                bar.set_postfix_str(key)
                bar.update()
    return sweep_table(work)


@checked
def run_cell(cell: Cell, config: SweepConfig, steps: int, work: Path) -> list[dict[str, Any]]:
    """Trains one drafter, decodes with it, and returns a line for each temperature."""
    torch.set_num_threads(1)
    target, _, held_out = _materials(config)
    drafter, history = _trained(cell, config, steps, work, work / "runs" / cell.key)
    if history.interrupted:
        raise KeyboardInterrupt
    spent = history.table()[["slots", "seconds"]].sum()
    slots, seconds = int(spent["slots"]), round(float(spent["seconds"]), 1)
    questions = [question(chat) for chat in held_out]
    sampling: dict[str, Any] = {"max_new_tokens": config.max_new_tokens, "seed": cell.seed}
    lines = []
    for temperature in config.temperatures:
        decoded = decode(target, drafter, questions, temperature=temperature, **sampling)
        line = {**asdict(cell), "temperature": temperature, "steps": steps, "slots": slots}
        tau, rounds = round(decoded.tau, 4), decoded.rounds
        line |= {"seconds": seconds, "tau": tau, "rounds": len(rounds)}
        # Blocks cut at the end of an answer say nothing of the slots that were not there.
        accepted = rounds["accepted"][rounds["drafted"] == cell.block_size]
        for slot in range(cell.block_size):
            line[f"accepted_{slot}"] = round(float((accepted > slot).mean()), 4)
        lines.append(line)
    return lines


@checked
def sweep_table(work: str | Path) -> pd.DataFrame:
    """The results of the finished cells in a work folder, one line per cell and temperature.

    ``slots`` are supervised, ``seconds`` the clock's; ``tau`` (tokens per round) is by decoding;
    ``accepted_0``, ...: the share of whole blocks whose slot was accepted, with all before it.
    """
    files = sorted((Path(work) / "cells").glob("*.json"))
    lines = [line for path in files for line in read_json(path, list)]
    if not lines:
        return pd.DataFrame()
    return pd.DataFrame(lines).sort_values(_BY, ignore_index=True)


@checked
def load_sweep(path: str | Path | None = None) -> pd.DataFrame:
    """A table of :func:`sweep_table` from CSV; the shipped one of the pocket target by default."""
    return read_csv(path or shipped("pocket/sweep.csv"), [*_BY, "tau"])


@checked
def cell_table(sweep: pd.DataFrame) -> pd.DataFrame:
    """Means over the seeds of each cell, with Student's 95 % interval of tau, ``low`` to ``high``.

    Its standard deviation is pooled over the cells of a budget and temperature, and NaN where none
    of them has two seeds.
    """
    from scipy import stats

    by = ["budget", "temperature"]
    columns = [*by, "block_size", "num_anchors", "tau", "steps", "slots", "seconds"]
    missing = [name for name in columns if name not in sweep]
    if missing:
        raise ValueError(f"sweep must have the columns {columns}, got no {missing}")
    groups = sweep.groupby([*by, "block_size", "num_anchors"])
    table = groups[["tau", "steps", "slots", "seconds"]].mean()
    table.insert(1, "seeds", groups.size())
    squares = (sweep["tau"] - groups["tau"].transform("mean")) ** 2
    freedom = sweep.groupby(by).size() - table.groupby(by).size()
    freedom = freedom.where(freedom > 0).astype(float)
    spread = (squares.groupby([sweep[name] for name in by]).sum() / freedom) ** 0.5
    quantile = freedom.map(lambda v: stats.t.ppf(0.975, v))
    index = table.index.droplevel(["block_size", "num_anchors"])
    half = standard_error((spread * quantile).reindex(index).to_numpy(), table["seeds"])
    table.insert(1, "low", table["tau"] - half)
    table.insert(2, "high", table["tau"] + half)
    return table.reset_index()


def standard_error(spread: Any, seeds: Any) -> Any:
    """The standard error of the mean of so many drafters, each with this standard deviation."""
    return spread / seeds**0.5


def _planned_steps(config: SweepConfig, work: Path) -> dict[tuple[Budget, int, int], int]:
    """Steps by budget, anchor count and block size; measured times are kept in ``work``."""
    _, chats, _ = _materials(config)
    training = config.training
    spans = Spans.of(chats, row_length=training.pack_length)
    per: dict[str, Any] = {"per": training.anchors_per}
    trained, batches = training_steps(spans, training.batch_size, **per)
    measured = work / "step_seconds.json"
    seconds = read_json(measured) if measured.exists() else {}
    steps: dict[tuple[Budget, int, int], int] = {}
    for block_size, anchors in product(config.block_sizes, config.num_anchors):
        name = f"n{anchors}-k{block_size}"
        if name not in seconds:
            seconds[name] = _step_seconds(config, anchors, block_size, work)
            write_json(measured, seconds, indent=1)
        per_pass = supervision(trained, anchors, block_size, **per).expected
        slots = per_pass / batches * training.accumulate
        steps["slots", anchors, block_size] = max(1, round(config.slots / slots))
        steps["seconds", anchors, block_size] = max(1, round(config.seconds / seconds[name]))
    return steps


def _step_seconds(config: SweepConfig, num_anchors: int, block_size: int, work: Path) -> float:
    """The median time of a training step: on a CPU that of one thread's own work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    on_cpu = _materials(config)[0].device.type == "cpu"
    clock = time.process_time if on_cpu else time.perf_counter
    times: list[float] = []
    cell = Cell("seconds", num_anchors, block_size, 0)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        _trained(cell, config, 9, work, out, on_metrics=lambda row: times.append(clock()))
    torch.set_num_threads(threads)
    return statistics.median(b - a for a, b in zip(times[1:], times[2:], strict=False))


def _trained(
    cell: Cell, config: SweepConfig, steps: int, work: Path, out: Path, **options: Any
) -> tuple[Drafter, History]:
    target, chats, _ = _materials(config)
    torch.manual_seed(cell.seed)
    mask, anchors = mask_token_id(None, target, chats), cell.num_anchors
    drafter = new_drafter(
        target, mask_token_id=mask, block_size=cell.block_size, num_anchors=anchors
    )
    warmup = max(1, steps // 20)
    training = replace(
        config.training, steps=steps, num_anchors=anchors, seed=cell.seed, warmup_steps=warmup
    )
    options |= {"out": out, "cache": work / "features", "features": config.features}
    return drafter, train(drafter, target, chats, training, progress=False, **options)


@lru_cache(maxsize=1)
def _materials(config: SweepConfig) -> tuple[Target, Sequence[Encoded], list[Chat]]:
    """The target, the conversations to learn from, and those whose questions are asked."""
    if config.target == "pocket":
        pair = load_pair(device=config.device)
        target, others = pair.target, pair.held_out
        chats: ChatsLike = pair.chats
    else:
        assert config.data is not None and config.held_out is not None
        target = load_target(config.target, device=config.device)
        chats, others = config.data, load_chats(config.held_out).conversations
    encoded = encode_chats(chats, target.tokenizer, config.training.max_length)
    return target, encoded, in_turns(others)[: config.prompts]


def _require_same_sweep(path: Path, config: SweepConfig) -> None:
    # As JSON has it: tuples are lists there.
    given = json.loads(json.dumps(asdict(config)))
    if not path.exists():
        write_json(path, given, indent=1)
    saved = read_json(path)
    other = ", ".join(name for name in given if saved.get(name) != given[name])
    if other:
        wanted = "a new folder or one of the same sweep"
        raise ValueError(f"{path.parent} must be {wanted}, got one with other {other}")
