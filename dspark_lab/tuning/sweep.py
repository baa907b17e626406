"""The sweep's command line.

python -m dspark_lab.tuning.sweep                         the shipped table, anew
python -m dspark_lab.tuning.sweep --processes 8           on more cores
python -m dspark_lab.tuning.sweep --address auto          on a Ray cluster
python -m dspark_lab.tuning.sweep --target my/model --data chats.jsonl --held-out other.jsonl
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

import tyro

from dspark_lab.files import DATA, written_whole
from dspark_lab.training import TrainConfig
from dspark_lab.tuning.cells import SweepConfig, run_sweep

PROGRAM = "python -m dspark_lab.tuning.sweep"
TRAINING = SweepConfig().training


@dataclass(frozen=True)
class Options(SweepConfig):
    """Train and decode drafters over anchors and block size; the same command goes on.

    Args:
        batch_size: conversations of a step.
        max_length: tokens that a conversation is cut to.
        learning_rate: AdamW's highest.
        work: folder of the results so far.
        out: the table, as CSV.
        processes: cells at once on this machine, a core each.
        address: of a Ray cluster, auto for the one that this machine is part of.
    """

    training: tyro.conf.Suppress[TrainConfig] = TRAINING
    batch_size: int = TRAINING.batch_size
    max_length: int = TRAINING.max_length
    learning_rate: float = TRAINING.learning_rate
    work: Path = Path("build/sweep")
    out: Path = DATA / "pocket" / "sweep.csv"
    processes: int = 1
    address: str | None = None

    def __post_init__(self) -> None:
        """The settings are checked in :meth:`config`, outside the parser."""

    def config(self) -> SweepConfig:
        names = ("batch_size", "max_length", "learning_rate")
        training = replace(TRAINING, **{name: getattr(self, name) for name in names})
        given = {field.name: getattr(self, field.name) for field in fields(SweepConfig)}
        return SweepConfig(**(given | {"training": training}))


def parsed(arguments: Sequence[str] | None = None) -> Options:
    return tyro.cli(Options, prog=PROGRAM, args=arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    try:
        options = parsed(arguments)
        table = run_sweep(
            options.config(), options.work, processes=options.processes, address=options.address
        )
    except (ModuleNotFoundError, OSError, RuntimeError, TypeError, ValueError) as error:
        sys.exit(f"{PROGRAM}: {error}")
    except KeyboardInterrupt:
        sys.exit(f"{PROGRAM}: stopped; the same command goes on")
    with written_whole(options.out) as partial:
        table.to_csv(partial, index=False)
    print(f"{len(table)} lines in {options.out}")


if __name__ == "__main__":
    main()
