"""The sweep's command line.

python -m dspark_lab.tuning.sweep                         the table that ships as sweep.csv, anew
python -m dspark_lab.tuning.sweep --processes 8           on more cores
python -m dspark_lab.tuning.sweep --address auto          on a Ray cluster
python -m dspark_lab.tuning.sweep --plan judge            the runs that ship as runs.parquet
python -m dspark_lab.tuning.sweep --plan judge --measure  its step times alone, on a quiet machine
python -m dspark_lab.tuning.sweep --target my/model --data chats.jsonl --held-out other.jsonl
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Literal

import tyro

from dspark_lab.checks import Count
from dspark_lab.files import DATA, written_whole
from dspark_lab.training import TrainConfig
from dspark_lab.tuning.cells import PLANS, SweepConfig
from dspark_lab.tuning.results import runs_table, save_runs
from dspark_lab.tuning.runs import measure_sweep, run_sweep

PROGRAM = "python -m dspark_lab.tuning.sweep"
_TRAINING = ("max_length", "learning_rate")
_OUT = {"first": DATA / "pocket" / "sweep.csv", "judge": DATA / "pocket" / "runs.parquet"}


@dataclass(frozen=True)
class Options(SweepConfig):
    """Train and decode drafters over anchors, block size, rows and mixes; the same command goes on.

    Args:
        plan: what is not given is as in the first sweep, whose table ships, or as in the one that
            advice is judged on.
        max_length: tokens that a conversation is cut to.
        learning_rate: AdamW's highest.
        work: folder of the results so far.
        out: a table of decoded taus, as CSV, or every measurement of each run, as Parquet.
        measure: measure the step times that the work folder lacks, and stop.
        processes: cells at once on this machine, a core each.
        address: of a Ray cluster, auto for the one that this machine is part of.
    """

    plan: Literal["first", "judge"] = "first"
    batch_sizes: Annotated[tuple[Count, ...], tyro.conf.arg(aliases=("--batch-size",))] = PLANS[
        "first"
    ].batch_sizes
    training: tyro.conf.Suppress[TrainConfig] = PLANS["first"].training
    max_length: int = PLANS["first"].training.max_length
    learning_rate: float = PLANS["first"].training.learning_rate
    work: Path = Path("build/sweep")
    out: Path = _OUT["first"]
    measure: bool = False
    processes: int = 1
    address: str | None = None

    def __post_init__(self) -> None:
        """The settings are checked in :meth:`config`, outside the parser."""

    def config(self) -> SweepConfig:
        training = replace(self.training, **{name: getattr(self, name) for name in _TRAINING})
        given = {field.name: getattr(self, field.name) for field in fields(SweepConfig)}
        return SweepConfig(**(given | {"training": training}))


def parsed(arguments: Sequence[str] | None = None) -> Options:
    plan = tyro.cli(Options, prog=PROGRAM, args=arguments).plan
    config = PLANS[plan]
    given = {field.name: getattr(config, field.name) for field in fields(SweepConfig)}
    given |= {name: getattr(config.training, name) for name in _TRAINING}
    default = Options(**given, plan=plan, out=_OUT[plan])
    return tyro.cli(Options, prog=PROGRAM, args=arguments, default=default)


def main(arguments: Sequence[str] | None = None) -> None:
    try:
        options = parsed(arguments)
        config = options.config()
        if options.measure:
            table = measure_sweep(config, options.work)
            print(table.to_string())
            return
        table = run_sweep(
            config, options.work, processes=options.processes, address=options.address
        )
        if options.out.suffix == ".parquet":
            table = runs_table(options.work)
            save_runs(table, options.out)
        else:
            with written_whole(options.out) as partial:
                table.to_csv(partial, index=False)
    except (ModuleNotFoundError, OSError, RuntimeError, TypeError, ValueError) as error:
        sys.exit(f"{PROGRAM}: {error}")
    except KeyboardInterrupt:
        sys.exit(f"{PROGRAM}: stopped; the same command goes on")
    print(f"{len(table)} lines in {options.out}")


if __name__ == "__main__":
    main()
