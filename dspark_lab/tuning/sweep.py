"""The sweep's command line.

python -m dspark_lab.tuning.sweep --target my/model --data chats.jsonl --held-out other.jsonl
python -m dspark_lab.tuning.sweep --measure          step times alone, on a quiet machine
python -m dspark_lab.tuning.sweep --processes 8      on more cores
python -m dspark_lab.tuning.sweep --address auto     on a Ray cluster
python -m dspark_lab.tuning.sweep --mixes all code   the runs that ship as runs.parquet
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Annotated

import tyro

from dspark_lab.checks import Count
from dspark_lab.training import TrainConfig
from dspark_lab.tuning.cells import SweepConfig
from dspark_lab.tuning.results import runs_table, save_runs
from dspark_lab.tuning.runs import measure_sweep, run_sweep

PROGRAM = "python -m dspark_lab.tuning.sweep"
_TRAINING = ("max_length", "learning_rate")


@dataclass(frozen=True)
class Options(SweepConfig):
    """Train and decode drafters over anchors, block size, rows and mixes; the same command goes on.

    Args:
        max_length: tokens that a conversation is cut to.
        learning_rate: AdamW's highest.
        work: folder of the results so far.
        out: every measurement of each run, as Parquet.
        measure: measure the step times that the work folder lacks, and stop.
        processes: cells at once on this machine, a core each.
        address: of a Ray cluster, auto for the one that this machine is part of.
    """

    batch_sizes: Annotated[tuple[Count, ...], tyro.conf.arg(aliases=("--batch-size",))] = (
        SweepConfig.batch_sizes
    )
    training: tyro.conf.Suppress[TrainConfig] = SweepConfig.training
    max_length: int = SweepConfig.training.max_length
    learning_rate: float = SweepConfig.training.learning_rate
    work: Path = Path("build/sweep")
    out: Path = Path("build/sweep/runs.parquet")
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
    return tyro.cli(Options, prog=PROGRAM, args=arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    try:
        options = parsed(arguments)
        config = options.config()
        if options.measure:
            table = measure_sweep(config, options.work)
            print(table.to_string())
            return
        run_sweep(config, options.work, processes=options.processes, address=options.address)
        table = runs_table(options.work)
        save_runs(table, options.out)
    except (ModuleNotFoundError, OSError, RuntimeError, TypeError, ValueError) as error:
        sys.exit(f"{PROGRAM}: {error}")
    except KeyboardInterrupt:
        sys.exit(f"{PROGRAM}: stopped; the same command goes on")
    print(f"{len(table)} lines in {options.out}")


if __name__ == "__main__":
    main()
