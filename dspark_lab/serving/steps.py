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

from dspark_lab.checks import Size, require
from dspark_lab.files import written_whole
from dspark_lab.rates import as_numbers

# Steps per second at each of an array of whole numbers of tokens per step.
Speed = Callable[[np.ndarray], np.ndarray]

_COLUMNS = ["tokens", "steps_per_second", "context_length", "device", "target"]


@dataclass(frozen=True, eq=False)
class StepsPerSecond:
    """SPS(B), called with a number or an array of tokens per step; see :func:`seconds_at`.

    Args:
        tokens: ``[point]``, B, rising whole numbers of at least 1.
        context_length: tokens that each request had read before the step.
        device: its name and the precision.
    """

    tokens: Int[np.ndarray, " point"]
    steps_per_second: Float[np.ndarray, " point"]
    context_length: int
    device: str
    target: str = ""

    def __post_init__(self) -> None:
        tokens = measured_points("tokens", self.tokens)
        speeds = as_numbers("steps_per_second", self.steps_per_second)
        if tokens.shape != speeds.shape:
            raise ValueError(
                f"steps_per_second must be [point] of {len(tokens)}, got shape {speeds.shape}"
            )
        bad = ~(np.isfinite(speeds) & (speeds > 0))
        if bad.any():
            raise ValueError(
                "steps_per_second must be positive and finite, got "
                f"{speeds[bad][0]} at {tokens[bad][0]} tokens"
            )
        require("context_length", self.context_length, Size)
        for name in ("device", "target"):
            if not isinstance(getattr(self, name), str):
                raise TypeError(f"{name} must be a string, got {getattr(self, name)!r}")
        speeds.flags.writeable = False
        object.__setattr__(self, "tokens", tokens)
        object.__setattr__(self, "steps_per_second", speeds)

    def __call__(self, tokens: Any) -> Any:
        """Steps per second at ``tokens`` per step, a number >= 0 or an array of any shape."""
        return 1 / self.seconds(tokens)

    def seconds(self, tokens: Any) -> Any:
        """Seconds per step at ``tokens`` per step, a number >= 0 or an array of any shape."""
        asked = np.asarray(tokens)
        if asked.size and not asked.min() >= 0:
            raise ValueError(f"tokens per step must be >= 0, got {asked.min()}")
        found = seconds_at(asked, self.tokens, 1 / self.steps_per_second)
        return found if asked.ndim else float(found)

    @property
    def smooth(self) -> bool:
        """Whether each further token costs at least as many seconds as the one before.

        Early stopping then finds the best Theta, which rises once, then falls. In front of a cliff,
        where one more token costs more than the next ones do, early stopping may halt.
        """
        seconds = 1 / self.steps_per_second
        slopes = np.append(0, np.diff(seconds) / np.diff(self.tokens))
        return bool((np.diff(slopes) >= -1e-12 * seconds.max()).all())

    def smoothed(self) -> StepsPerSecond:
        """The lower convex envelope of the seconds, from the fastest step on; it is :attr:`smooth`.

        Points that noise or a cliff lifts are left out: an optimistic curve, on which no bump of
        the measurement halts a scheduler.
        """
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
        """One row per measured point; ``context_length``, ``device`` and ``target`` in each."""
        return pd.DataFrame({name: getattr(self, name) for name in _COLUMNS})

    @classmethod
    def of(
        cls,
        table: pd.DataFrame,
        *,
        context_length: int | None = None,
        device: str | None = None,
        target: str | None = None,
    ) -> StepsPerSecond:
        """From a table with the columns ``tokens`` and ``steps_per_second``.

        The other facts are read from columns of their name where they are not given; the first two
        must be known.
        """
        if missing := [name for name in _COLUMNS[:2] if name not in table]:
            raise ValueError(
                f"table must have the columns tokens and steps_per_second, got no "
                f"{' and no '.join(missing)}"
            )
        facts: dict[str, Any] = {}
        given = {"context_length": context_length, "device": device, "target": target}
        for name, value in given.items():
            found = [value]
            if value is None and name in table:
                found = table[name].unique().tolist()
            if len(found) > 1:
                raise ValueError(f"{name} must be the same in every row, got {found}")
            if found and found[0] is not None:
                facts[name] = found[0]
            elif name != "target":
                raise ValueError(f"{name} must be given, or be a column of the table; got neither")
        return cls(table["tokens"].to_numpy(), table["steps_per_second"].to_numpy(), **facts)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write :attr:`table` as CSV, atomically."""
        with written_whole(Path(path)) as partial:
            self.table.to_csv(partial, index=False)

    @classmethod
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

    Above the last point they go on as between the last two, or stay where those fall or there is
    only one.
    """
    found = np.interp(asked, points, seconds)
    if len(points) > 1:
        slope = max(0.0, (seconds[-1] - seconds[-2]) / (points[-1] - points[-2]))
        found = found + slope * np.maximum(asked - points[-1], 0)
    return found


def measured_points(name: str, values: Any) -> Int[np.ndarray, " point"]:
    """The values as a read-only array of rising whole numbers >= 1; refused where they are none."""
    numbers = as_numbers(name, values)
    if numbers.ndim != 1 or len(numbers) == 0:
        raise ValueError(
            f"{name} must be [point] with one or more points, got shape {numbers.shape}"
        )
    whole = np.isfinite(numbers) & (numbers >= 1) & (numbers == np.floor(numbers))
    if not whole.all():
        raise ValueError(
            f"{name} must be whole numbers >= 1, got {numbers[~whole][0]} at point "
            f"{(~whole).argmax()}"
        )
    points = numbers.astype(np.int64)
    if (np.diff(points) <= 0).any():
        raise ValueError(f"{name} must rise from point to point, got {points.tolist()}")
    points.flags.writeable = False
    return points


def read_points(path: str | os.PathLike[str], numeric: Sequence[str]) -> pd.DataFrame:
    """A CSV file of measured points; ``device`` and ``target`` are text, even "NA" or "7"."""
    try:
        return pd.read_csv(
            path,
            dtype={"device": "object", "target": "object"},
            keep_default_na=False,
            na_values=dict.fromkeys(numeric, ["", "nan"]),
        )
    except (pd.errors.ParserError, pd.errors.EmptyDataError, UnicodeDecodeError) as error:
        raise ValueError(
            f"{os.fspath(path)} must be a CSV file with the columns {', '.join(numeric)}, "
            f"got one that cannot be read: {error}"
        ) from error
