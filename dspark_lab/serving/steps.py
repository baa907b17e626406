"""SPS(B), a target's steps per second at B tokens per step: a few measured points in a CSV file."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float, Int

from dspark_lab.checks import Positive, Size, checked, require, require_columns
from dspark_lab.files import read_csv, written_whole
from dspark_lab.rates import as_numbers

# Steps per second at each of an array of whole numbers of tokens per step.
Speed = Callable[[np.ndarray], np.ndarray]

_COLUMNS = ["tokens", "steps_per_second", "context_length", "device", "target"]


@dataclass(frozen=True, eq=False)
class StepsPerSecond:
    """SPS(B), called with a number or an array of tokens per step; see :func:`seconds_at`.

    ``context_length`` is what each request had read before the step; ``device`` includes the
    precision.
    """

    tokens: Int[np.ndarray, " point"]
    steps_per_second: Float[np.ndarray, " point"]
    context_length: int
    device: str
    target: str = ""

    def __post_init__(self) -> None:
        tokens = measured_points("tokens", self.tokens)
        object.__setattr__(self, "tokens", tokens)
        name, given = "steps_per_second", self.steps_per_second
        object.__setattr__(self, name, measured_values(name, given, "point", len(tokens), Positive))
        require("context_length", self.context_length, Size)
        require("device", self.device, str)
        require("target", self.target, str)

    def __call__(self, tokens: Any) -> Any:
        return 1 / self.seconds(tokens)

    def seconds(self, tokens: Any) -> Any:
        """Seconds per step at ``tokens`` per step, a number or an array."""
        asked = np.asarray(tokens)
        if asked.size and not asked.min() >= 0:
            raise ValueError(f"tokens per step must be >= 0, got {asked.min()}")
        return seconds_at(asked, self.tokens, 1 / self.steps_per_second)

    @property
    def smooth(self) -> bool:
        """Whether each further token costs at least as many seconds as the one before.

        Early stopping then finds the best Theta.
        """
        seconds = 1 / self.steps_per_second
        slopes = np.append(0, np.diff(seconds) / np.diff(self.tokens))
        return bool((np.diff(slopes) >= -1e-12 * seconds.max()).all())

    def smoothed(self) -> StepsPerSecond:
        """The lower convex envelope of the seconds: no measured bump halts a scheduler on it."""
        seconds = 1 / self.steps_per_second

        def slope(low: int, high: int) -> float:
            return (seconds[high] - seconds[low]) / (self.tokens[high] - self.tokens[low])

        kept: list[int] = []
        for point in range(int(seconds.argmin()), len(seconds)):
            while len(kept) > 1 and slope(kept[-2], kept[-1]) >= slope(kept[-1], point):
                kept.pop()
            kept.append(point)
        return replace(self, tokens=self.tokens[kept], steps_per_second=self.steps_per_second[kept])

    @property
    def table(self) -> pd.DataFrame:
        return pd.DataFrame({name: getattr(self, name) for name in _COLUMNS})

    @classmethod
    @checked
    def of(
        cls,
        table: pd.DataFrame,
        *,
        context_length: int | None = None,
        device: str | None = None,
        target: str | None = None,
    ) -> StepsPerSecond:
        """From a table with the columns ``tokens`` and ``steps_per_second``.

        Facts that are not given are columns of their name; only ``target`` may be unknown.
        """
        require_columns("table", table, _COLUMNS[:2])
        facts: dict[str, Any] = {}
        given = {"context_length": context_length, "device": device, "target": target}
        for name, value in given.items():
            column = value is None and name in table
            found = table[name].unique().tolist() if column else [value]
            if len(found) > 1:
                raise ValueError(f"{name} must be the same in every row, got {found}")
            if found and found[0] is not None:
                facts[name] = found[0]
            elif name != "target":
                raise ValueError(f"{name} must be given, or be a column of the table; got neither")
        return cls(table["tokens"].to_numpy(), table["steps_per_second"].to_numpy(), **facts)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write :attr:`table` as CSV, atomically."""
        save_points(self.table, path)

    @classmethod
    @checked
    def read(
        cls,
        path: str | os.PathLike[str],
        *,
        context_length: int | None = None,
        device: str | None = None,
        target: str | None = None,
    ) -> StepsPerSecond:
        """From a CSV file with the columns of :meth:`of`, such as one of :meth:`save`."""
        table = read_points(path, _COLUMNS[:2])
        return cls.of(table, context_length=context_length, device=device, target=target)


def seconds_at(
    asked: Any, points: Int[np.ndarray, " point"], seconds: Float[np.ndarray, " point"]
) -> Any:
    """Seconds at ``asked`` from those at measured points: linear between them, constant below.

    Above the last point they go on as between the last two, but never fall.
    """
    found = np.interp(asked, points, seconds)
    if len(points) > 1:
        slope = max(0.0, (seconds[-1] - seconds[-2]) / (points[-1] - points[-2]))
        found = found + slope * np.maximum(asked - points[-1], 0)
    return found if np.ndim(asked) else float(found)


def measured_points(name: str, values: Any) -> Int[np.ndarray, " point"]:
    """The values as a read-only array of rising whole numbers >= 1; refused where they are none."""
    numbers = as_numbers(name, values)
    if numbers.ndim != 1 or len(numbers) == 0:
        raise ValueError(
            f"{name} must be [point] with one or more points, got shape {numbers.shape}"
        )
    whole = np.isfinite(numbers) & (numbers >= 1) & (numbers == np.floor(numbers))
    if not whole.all():
        raise ValueError(f"{name} must be whole numbers >= 1, got {numbers[~whole][0]}")
    points = numbers.astype(np.int64)
    if (np.diff(points) <= 0).any():
        raise ValueError(f"{name} must rise from point to point, got {points.tolist()}")
    points.flags.writeable = False
    return points


def measured_values(name: str, values: Any, axes: str, points: int, rule: Any) -> np.ndarray:
    """The values as a read-only array of numbers of these axes that ``rule`` allows."""
    numbers = as_numbers(name, values)
    if numbers.ndim != 1 + axes.count(",") or len(numbers) != points or numbers.size == 0:
        raise ValueError(f"{name} must be [{axes}] with {points} points, got shape {numbers.shape}")
    for place, number in np.ndenumerate(numbers):
        require(f"{name}{list(place)}", number, rule)
    numbers.flags.writeable = False
    return numbers


def save_points(table: pd.DataFrame, path: str | os.PathLike[str]) -> None:
    with written_whole(Path(path)) as partial:
        table.to_csv(partial, index=False)


def read_points(path: str | os.PathLike[str], columns: Sequence[str]) -> pd.DataFrame:
    """A CSV file of measured points; ``device`` and ``target`` are text, even "NA" or "7"."""
    text = dict.fromkeys(("part", "device", "target"), "object")
    missing = {name: ["", "nan"] for name in columns if name not in text}
    return read_csv(path, columns, dtype=text, keep_default_na=False, na_values=missing)
