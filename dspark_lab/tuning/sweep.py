"""The real sweep: drafters trained over anchors x block size, and how far they get by decoding.

    python -m dspark_lab.tuning.sweep                         the shipped table, anew
    python -m dspark_lab.tuning.sweep --processes 8           on more cores
    python -m dspark_lab.tuning.sweep --address auto          on a Ray cluster
    python -m dspark_lab.tuning.sweep --target my/model --data chats.jsonl --held-out other.jsonl

A cell is (budget, num_anchors, block_size, seed). Its drafter is trained for as many steps as the
budget pays: until it has seen ``slots`` supervised slots, in expectation, or for ``seconds`` of a
training step's own time, which is measured once for each (num_anchors, block_size) before the sweep
begins. Then it decodes the same held-out prompts as every other. A finished cell is one file in the
work folder; the same command goes on where it stopped.

This file knows what a cell is; how jobs spread over machines is known to ``dspark_lab.tuning.jobs``.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from tqdm import tqdm

from dspark_lab.chats import SHIPPED_CHATS, Chat, Encoded, encode, load_chats
from dspark_lab.checks import require_int, require_number
from dspark_lab.decoding import decode
from dspark_lab.files import written_whole
from dspark_lab.model import Drafter, Target, load_target
from dspark_lab.pairs import in_turns, load_pair, question
from dspark_lab.training import TrainConfig, mask_token_id, new_drafter, train
from dspark_lab.tuning.coverage import Spans, supervision
from dspark_lab.tuning.jobs import run_jobs

if TYPE_CHECKING:
    import pandas

__all__ = [
    "BUDGETS",
    "Cell",
    "SweepConfig",
    "cell_table",
    "load_sweep",
    "run_sweep",
    "sweep_table",
]

Budget = Literal["slots", "seconds"]
BUDGETS: tuple[Budget, ...] = get_args(Budget)
SHIPPED_SWEEP = SHIPPED_CHATS.parent / "pocket" / "sweep.csv"


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


@dataclass(frozen=True)
class SweepConfig:
    """What is swept, and what each drafter may spend.

    ``target``: "pocket", or a folder or hub id, with ``data`` and ``held_out`` (JSONL of
    conversations). ``slots``, ``seconds``: the two budgets. ``prompts`` held-out questions,
    domains in turn, are decoded at each of ``temperatures``. ``features``: see
    :func:`dspark_lab.training.train`. ``training`` holds every other setting
    of a run; its ``steps``, ``num_anchors``, ``seed`` and ``warmup_steps`` (a twentieth of the
    steps) are the cell's.

    Raises TypeError or ValueError for a value that cannot be.
    """

    num_anchors: tuple[int, ...] = (4, 12, 32, 96)
    block_sizes: tuple[int, ...] = (4, 7, 12)
    seeds: tuple[int, ...] = (0, 1, 2)
    slots: int = 250_000
    seconds: float = 75.0
    prompts: int = 60
    max_new_tokens: int = 64
    temperatures: tuple[float, ...] = (0.0, 1.0)
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
            if not values or len(set(values)) != len(values):
                raise ValueError(f"{name} must be one or more values, each once, got {values}")
        for name in ("num_anchors", "block_sizes"):
            for value in getattr(self, name):
                require_int(f"each of {name}", value, 1)
        for seed in self.seeds:
            require_int("each of seeds", seed, 0)
        for name in ("slots", "prompts", "max_new_tokens"):
            require_int(name, getattr(self, name), 1)
        require_number("seconds", self.seconds)
        if not 0 < self.seconds < float("inf"):
            raise ValueError(f"seconds must be a finite number > 0, got {self.seconds}")
        if self.target != "pocket" and not (self.data and self.held_out):
            raise ValueError(f"target {self.target!r} needs data and held_out")

    def cells(self) -> list[Cell]:
        """Seed by seed, so that a sweep that was stopped early has whole tables."""
        return [
            Cell(budget, anchors, block_size, seed)
            for seed in self.seeds
            for budget in BUDGETS
            for block_size in self.block_sizes
            for anchors in self.num_anchors
        ]


def run_sweep(
    config: SweepConfig,
    work: str | Path,
    *,
    processes: int = 1,
    address: str | None = None,
    progress: bool = True,
    run: Callable[..., list[dict[str, Any]]] | None = None,
) -> pandas.DataFrame:
    """Trains and decodes every cell that ``work`` does not hold yet; returns :func:`sweep_table`.

    Args:
        config: the sweep; ``work`` must hold no other.
        work: folder for results, unfinished runs, and cached features. Nodes of a cluster that do
            not see it use a folder of the same name of their own for the latter two.
        processes, address: see :func:`dspark_lab.tuning.jobs.run_jobs`.
        progress: whether to show a bar.
        run: what a cell does instead of training, for tests of the rest.

    Raises:
        TypeError, ValueError: settings that cannot be, or a work folder of another sweep.
    """
    work = Path(work).absolute()
    (work / "cells").mkdir(parents=True, exist_ok=True)
    _require_same_sweep(work / "sweep.json", config)
    cells = {cell.key: cell for cell in config.cells()}
    left = {key: cell for key, cell in cells.items() if not _result(work, key).exists()}
    if left:
        steps = _planned_steps(config, work)
        jobs = {
            key: (
                cell,
                config,
                steps[f"{cell.budget}-n{cell.num_anchors}-k{cell.block_size}"],
                work,
            )
            for key, cell in left.items()
        }
        with tqdm(total=len(cells), initial=len(cells) - len(left), disable=not progress) as bar:
            for key, rows in run_jobs(run or run_cell, jobs, processes=processes, address=address):
                with written_whole(_result(work, key)) as partial:
                    partial.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
                shutil.rmtree(work / "runs" / key, ignore_errors=True)
                bar.set_postfix_str(key)
                bar.update()
    return sweep_table(work)


def run_cell(cell: Cell, config: SweepConfig, steps: int, work: Path) -> list[dict[str, Any]]:
    """Trains one drafter, decodes with it, and returns a line for each temperature."""
    torch.set_num_threads(1)
    target, chats, held_out = _materials(config)
    training = replace(
        config.training,
        steps=steps,
        num_anchors=cell.num_anchors,
        seed=cell.seed,
        warmup_steps=max(1, steps // 20),
    )
    drafter = _fresh(target, chats, cell)
    history = train(
        drafter,
        target,
        chats,
        training,
        out=work / "runs" / cell.key,
        features=config.features,
        cache=work / "features",
        progress=False,
    )
    if history.interrupted:
        raise KeyboardInterrupt
    trained = history.table()
    lines = []
    for temperature in config.temperatures:
        decoded = decode(
            target,
            drafter,
            [question(chat) for chat in held_out],
            temperature=temperature,
            max_new_tokens=config.max_new_tokens,
            seed=cell.seed,
        )
        # At the end of an answer blocks are cut: they say nothing of the slots that were not there.
        whole = decoded.rounds[decoded.rounds["drafted"] == cell.block_size]
        lines.append(
            {
                **asdict(cell),
                "temperature": temperature,
                "steps": steps,
                "slots": int(trained["slots"].sum()),
                "seconds": round(float(trained["seconds"].sum()), 1),
                "tau": round(decoded.tau, 4),
                "rounds": len(decoded.rounds),
                **{
                    f"accepted_{slot}": round(float((whole["accepted"] > slot).mean()), 4)
                    for slot in range(cell.block_size)
                },
            }
        )
    return lines


def sweep_table(work: str | Path) -> pandas.DataFrame:
    """What the finished cells in a work folder found, one line per cell and temperature.

    ``budget``, ``num_anchors``, ``block_size``, ``seed``, ``temperature``; ``steps``, supervised
    ``slots`` and ``seconds`` of training; ``tau`` (tokens per round) by real decoding over
    ``rounds`` rounds, and ``accepted_0``, ...: the share of whole blocks whose slot was accepted,
    with all before it.
    """
    import pandas as pd

    lines = [
        line
        for path in sorted((Path(work) / "cells").glob("*.json"))
        for line in json.loads(path.read_text(encoding="utf-8"))
    ]
    if not lines:
        return pd.DataFrame()
    table = pd.DataFrame(lines)
    by = ["budget", "temperature", "block_size", "num_anchors", "seed"]
    return table.sort_values(by, ignore_index=True)


def load_sweep(path: str | Path = SHIPPED_SWEEP) -> pandas.DataFrame:
    """A table of :func:`sweep_table` from CSV; the shipped one of the pocket target by default."""
    import pandas as pd

    return pd.read_csv(path)


def cell_table(sweep: pandas.DataFrame) -> pandas.DataFrame:
    """A sweep's seeds together: tau of each cell, with 95 % intervals.

    Prompts are the same in every cell; what differs from seed to seed is the drafter's training and
    the draws of decoding. The standard deviation between seeds is pooled over the cells of a budget
    and temperature, which three seeds alone could not tell.

    Args:
        sweep: from :func:`sweep_table` or :func:`load_sweep`.

    Returns:
        one line per budget, temperature, block size and anchor count: ``tau`` (mean over
        ``seeds``), ``low``, ``high`` (Student's t; NaN where no cell has two seeds), ``steps``,
        ``slots`` and ``seconds`` (means).
    """
    by = ["budget", "temperature"]
    cell = [*by, "block_size", "num_anchors"]
    groups = sweep.groupby(cell)
    table = groups[["tau", "steps", "slots", "seconds"]].mean()
    table.insert(1, "seeds", groups.size())
    squares = ((sweep["tau"] - groups["tau"].transform("mean")) ** 2).groupby(
        [sweep[name] for name in by]
    )
    freedom = sweep.groupby(by).size() - table.groupby(by).size()
    spread = (squares.sum() / freedom.where(freedom > 0)) ** 0.5
    index = table.index.droplevel(["block_size", "num_anchors"])
    quantile = freedom.map(lambda v: _t_quantile(v) if v > 0 else float("nan"))
    half = (spread * quantile).reindex(index).to_numpy() / table["seeds"] ** 0.5
    table.insert(1, "low", table["tau"] - half)
    table.insert(2, "high", table["tau"] + half)
    return table.reset_index()


def _t_quantile(freedom: int) -> float:
    """The 0.975 quantile of Student's t, by Cornish-Fisher, good to 0.01 from 4 degrees on."""
    z = 1.959963985
    return (
        z
        + (z**3 + z) / (4 * freedom)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * freedom**3)
    )


def _planned_steps(config: SweepConfig, work: Path) -> dict[str, int]:
    """Steps of each budget, anchor count and block size; measured times are kept."""
    target, chats, _ = _materials(config)
    spans = Spans.of(chats)
    measured = work / "step_seconds.json"
    seconds = json.loads(measured.read_text(encoding="utf-8")) if measured.exists() else {}
    steps = {}
    for block_size in config.block_sizes:
        for anchors in config.num_anchors:
            name = f"n{anchors}-k{block_size}"
            if name not in seconds:
                seconds[name] = _step_seconds(config, anchors, block_size, work)
                with written_whole(measured) as partial:
                    partial.write_text(json.dumps(seconds, indent=1) + "\n", encoding="utf-8")
            per_pass = supervision(spans, anchors, block_size).expected
            slots = per_pass / len(chats) * config.training.batch_size
            steps[f"slots-{name}"] = max(1, round(config.slots / slots))
            steps[f"seconds-{name}"] = max(1, round(config.seconds / seconds[name]))
    return steps


def _step_seconds(
    config: SweepConfig, num_anchors: int, block_size: int, work: Path, steps: int = 9
) -> float:
    """The median time of a training step, which other work on the machine hardly changes.

    On a CPU that of one thread's own work, on a GPU the clock's.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    target, chats, _ = _materials(config)
    clock = time.process_time if target.device.type == "cpu" else time.perf_counter
    times: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        train(
            _fresh(target, chats, Cell("seconds", num_anchors, block_size, 0)),
            target,
            chats,
            replace(config.training, steps=steps, num_anchors=num_anchors, warmup_steps=1),
            out=folder,
            features=config.features,
            cache=work / "features",
            progress=False,
            on_metrics=lambda row: times.append(clock()),
        )
    torch.set_num_threads(threads)
    return statistics.median(b - a for a, b in zip(times[1:], times[2:], strict=False))


@lru_cache(maxsize=1)
def _materials(config: SweepConfig) -> tuple[Target, list[Encoded], list[Chat]]:
    """The target, what drafters learn from, and what is asked afterwards."""
    if config.target == "pocket":
        pair = load_pair(device=config.device)
        target, chats, others = pair.target, pair.chats, pair.held_out
    else:
        assert config.data is not None and config.held_out is not None
        target = load_target(config.target, device=config.device)
        chats, others = load_chats(config.data), load_chats(config.held_out)
    assert target.tokenizer is not None
    encoded = [encode(chat, target.tokenizer, config.training.max_length) for chat in chats]
    return target, encoded, in_turns(others)[: config.prompts]


def _fresh(target: Target, chats: Sequence[Encoded], cell: Cell) -> Drafter:
    torch.manual_seed(cell.seed)
    return new_drafter(
        target,
        mask_token_id=mask_token_id(None, target, chats),
        block_size=cell.block_size,
        num_anchors=cell.num_anchors,
    )


def _result(work: Path, key: str) -> Path:
    return work / "cells" / f"{key}.json"


def _require_same_sweep(path: Path, config: SweepConfig) -> None:
    # As JSON has it: tuples are lists there.
    given = json.loads(json.dumps(asdict(config)))
    if not path.exists():
        with written_whole(path) as partial:
            partial.write_text(json.dumps(given, indent=1) + "\n", encoding="utf-8")
        return
    saved = json.loads(path.read_text(encoding="utf-8"))
    other = [name for name in given if saved.get(name) != given[name]]
    if other:
        raise ValueError(
            f"{path.parent} must be a new folder or one of the same sweep, "
            f"got one with other {', '.join(other)}"
        )


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    default = SweepConfig()
    parser = argparse.ArgumentParser(
        prog="python -m dspark_lab.tuning.sweep",
        description=str(__doc__).splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument_group("the sweep, see SweepConfig").add_argument
    for name, kind in (("num_anchors", int), ("block_sizes", int), ("seeds", int)):
        add(_flag(name), type=kind, nargs="+", default=getattr(default, name))
    add("--temperatures", type=float, nargs="+", default=default.temperatures)
    for name, number in (("slots", int), ("seconds", float), ("prompts", int)):
        add(_flag(name), type=number, default=getattr(default, name))
    add("--max-new-tokens", type=int, default=default.max_new_tokens, help="of an answer")
    add("--target", default=default.target, help="pocket, or a folder or hub id")
    add("--data", help="JSONL of conversations to learn from")
    add("--held-out", help="JSONL of conversations whose questions are asked")
    add("--device", default=default.device, help="of target and drafters")
    add("--features", choices=("cached", "live"), default=default.features, help="of the target")
    add("--batch-size", type=int, default=default.training.batch_size, help="rows of a step")
    add("--max-length", type=int, default=default.training.max_length, help="tokens of a row")
    add("--learning-rate", type=float, default=default.training.learning_rate, help="at its height")
    add = parser.add_argument_group("how it runs").add_argument
    add("--work", type=Path, default=Path("build/sweep"), help="results so far, to go on from")
    add("--out", type=Path, default=SHIPPED_SWEEP, help="the table, as CSV")
    add("--processes", type=int, default=1, help="cells at once on this machine, a core each")
    add("--address", help="of a Ray cluster, auto for the one that this machine is part of")
    options = vars(parser.parse_args(arguments))
    work, out, processes, address = map(options.pop, ("work", "out", "processes", "address"))
    training = {name: options.pop(name) for name in ("batch_size", "max_length", "learning_rate")}
    settings: dict[str, Any] = {
        k: tuple(v) if isinstance(v, list) else v for k, v in options.items()
    }
    try:
        config = SweepConfig(**settings, training=replace(default.training, **training))
        table = run_sweep(config, work, processes=processes, address=address)
    except (ModuleNotFoundError, OSError, RuntimeError, ValueError) as error:
        parser.exit(1, f"{parser.prog}: {error}\n")
    except KeyboardInterrupt:
        parser.exit(1, f"stopped; the same command goes on from {work}\n")
    with written_whole(out) as partial:
        table.to_csv(partial, index=False)
    print(f"{len(table)} lines in {out}")


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


if __name__ == "__main__":
    main()
