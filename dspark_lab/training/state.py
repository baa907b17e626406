"""A run on disk: configuration, metrics as JSON lines, checkpoints with the optimiser's state."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from dspark_lab import files
from dspark_lab.chats import Encoded, token_chunks
from dspark_lab.checks import checked
from dspark_lab.model import Drafter, save_drafter
from dspark_lab.training.config import TrainConfig

METRICS, CHECKPOINT, SETTINGS_FILE = "metrics.jsonl", "checkpoint-", "run.json"
STATE, OPTIMIZER = "state.json", "optimizer.safetensors"


@dataclass
class History:
    """The metrics of a run, a dictionary for each line of its ``metrics.jsonl``.

    ``interrupted``: whether steps are left. ``unlabelled``: how many of the conversations had no
    label to learn from; None where the run was read from disk.
    """

    out: Path
    rows: list[dict[str, Any]]
    interrupted: bool = False
    unlabelled: int | None = None

    @classmethod
    @checked
    def read(cls, out: str | os.PathLike[str]) -> History:
        """The history of a run on disk up to its last checkpoint, which there must be."""
        found = checkpoints(out)
        if not found:
            raise FileNotFoundError(f"{out} must hold a checkpoint of a run, got none")
        saved = read_state(found[-1])
        rows = read_metrics(Path(out), saved["step"])
        return cls(Path(out), rows, interrupted=saved["step"] < saved["config"].get("steps", 0))

    def table(self) -> pd.DataFrame:
        """One row for each training step."""
        return pd.DataFrame([row for row in self.rows if "loss" in row])

    def evaluations(self) -> pd.DataFrame:
        """One row for each evaluation of the held-out conversations."""
        return pd.DataFrame([row for row in self.rows if "held_out_tau" in row])

    def signs(self) -> dict[str, bool]:
        """Whether the run learns: its last tenth of steps, on average, against its first."""
        steps = self.table()
        if len(steps) < 2:
            raise ValueError(f"signs need at least 2 steps, got {len(steps)}")
        tenth = max(1, len(steps) // 10)
        change = steps[-tenth:].mean() - steps[:tenth].mean()
        return {
            "loss fell": bool(change["loss"] < 0),
            "accept rate rose": bool(change["accept_rate"] > 0),
            "tau rose": bool(change["tau"] > 0),
        }


def read_metrics(out: Path, steps: int) -> list[dict[str, Any]]:
    """The metrics of a run up to its last checkpoint, which has ``steps`` steps."""
    path = out / METRICS
    rows = [row for row in _read_rows(path) if row["step"] <= steps] if path.exists() else []
    missing = set(range(1, steps + 1)) - {row["step"] for row in rows if "loss" in row}
    if missing:
        raise ValueError(
            f"{path} must have a line for each of the {steps} steps of the last checkpoint, "
            f"got none for step {min(missing)}"
        )
    return rows


@checked
def read_run(
    path: str | os.PathLike[str],
) -> tuple[list[dict[str, Any]], TrainConfig | None]:
    """The metrics of a run so far, which may be going on, and its configuration.

    ``path`` is the run's folder or its ``metrics.jsonl``. The configuration stands in ``run.json``,
    or in the last checkpoint; None where there is neither.
    """
    path = Path(path)
    out = path if path.is_dir() else path.parent
    metrics = out / METRICS if path.is_dir() else path
    if not metrics.is_file():
        raise FileNotFoundError(f"{metrics} must be the metrics of a run, got no such file")
    rows = _read_rows(metrics)
    found = checkpoints(out)
    if (out / SETTINGS_FILE).exists():
        saved = files.read_json(out / SETTINGS_FILE)
    elif found:
        saved = read_state(found[-1])["config"]
    else:
        return rows, None
    try:
        return rows, TrainConfig(**saved)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{out} must hold a configuration of this version: {error}") from None


def write_run(out: Path, config: TrainConfig) -> None:
    """Write the configuration of a run, which its metrics alone do not tell."""
    with write_errors(out / SETTINGS_FILE):
        files.write_json(out / SETTINGS_FILE, asdict(config))


def append_metrics(out: Path, row: Mapping[str, Any]) -> None:
    """Add a line to the metrics."""
    with write_errors(out / METRICS), (out / METRICS).open("a", encoding="utf-8") as file:
        file.write(_to_json(row))


def cut_to_checkpoint(out: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Cut the metrics to ``rows``, and remove what killed processes left unfinished."""
    with write_errors(out / METRICS), files.written_whole(out / METRICS) as partial:
        partial.write_text("".join(map(_to_json, rows)), encoding="utf-8")
    files.remove_partial(out)


@checked
def checkpoints(out: str | os.PathLike[str]) -> list[Path]:
    """The checkpoints of a run, oldest first."""
    found = {path.name.removeprefix(CHECKPOINT): path for path in Path(out).glob(f"{CHECKPOINT}*")}
    return [found[number] for number in sorted(filter(str.isdigit, found), key=int)]


def save_checkpoint(
    out: Path, drafter: Drafter, moments: dict[str, Tensor], facts: Mapping[str, Any], keep: int
) -> None:
    """Write a checkpoint, complete or not at all, and remove the oldest beyond ``keep``."""
    folder = out / f"{CHECKPOINT}{facts['step']:06d}"
    files.sync(out / METRICS)
    with write_errors(folder), files.replaced_whole(folder) as partial:
        save_drafter(drafter, partial)
        save_file(moments, partial / OPTIMIZER)
        files.write_json(partial / STATE, facts)
    for old in checkpoints(out)[:-keep]:
        # Renamed first, so that what looks like a checkpoint is always whole.
        shutil.rmtree(old.rename(old.with_name(f".{old.name}.partial-old")))


def read_state(folder: Path) -> dict[str, Any]:
    """The ``state.json`` of a checkpoint: its step, configuration, data and processes."""
    saved = files.read_json(folder / STATE)
    for name, kind in (("step", int), ("config", dict)):
        if not isinstance(saved.get(name), kind):
            raise ValueError(f"{folder / STATE} must hold {name}, got {saved.get(name)!r}")
    if saved["config"].get("pack_length") is None:
        # Runs from before anchors could count for anything else do not say so; packed ones from
        # then had other batches.
        saved["config"].setdefault("anchors_per", "row")
    return saved


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file."""
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} must be a whole safetensors file: {error}") from None


def require_same(folder: Path, given: Mapping[str, Any], saved: Mapping[str, Any]) -> None:
    """Refuse to go on from a checkpoint of another run, naming the first setting that differs."""
    for name, value in given.items():
        if saved.get(name) != value:
            raise ValueError(
                f"{name} must be as in the run of {folder}, {saved.get(name)!r}, got {value!r}"
            )


def digest(tokens: Sequence[Encoded]) -> str:
    """A checksum of conversations."""
    sha = hashlib.sha256()
    for chunk in token_chunks(tokens):
        ids, start = chunk.input_ids.astype(np.int64, copy=False), 0
        for length in chunk.lengths.tolist():
            sha.update(length.to_bytes(8, "little"))
            sha.update(ids[start : start + length].tobytes())
            sha.update(chunk.loss_mask[start : start + length].tobytes())
            start += length
    return sha.hexdigest()[:32]


@contextmanager
def write_errors(path: Path) -> Iterator[None]:
    """Name what could not be written; safetensors has an error of its own for a full disk."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        message = f"could not write {path}, what was saved before is intact: {reason}"
        number = getattr(error, "errno", None)
        raise (OSError(number, message) if number else OSError(message)) from error


def _read_rows(path: Path) -> list[dict[str, Any]]:
    """The lines of the metrics; a last one without its end was torn, and is in no checkpoint."""
    lines = path.read_bytes().split(b"\n")[:-1]
    try:
        rows = [_from_json(line) for line in lines]
        for row in rows:
            if not isinstance(row["step"], int):
                raise TypeError(f"a step {row['step']!r}")
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} must hold a step's metrics in each line: {error!r}") from None
    return rows


def _to_json(row: Mapping[str, Any]) -> str:
    """A line of the metrics; JSON has no NaN, so it is null there."""
    values = {name: None if value != value else value for name, value in row.items()}
    return json.dumps(values) + "\n"


def _from_json(line: bytes) -> dict[str, Any]:
    return {k: math.nan if value is None else value for k, value in json.loads(line).items()}
