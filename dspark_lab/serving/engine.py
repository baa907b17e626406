"""The seconds of a serving engine: the target's by tokens of a step, all else by requests.

R requests draft R blocks in one pass, and the target reads R + the verified slots in one step. All
other seconds are the *rest* of a drafted round (drawing tokens, the drafter's reading of what was
accepted, the cutting of both caches), and the *plain rest* of a step without a draft.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float, Int

from dspark_lab.checks import Count, NonNegative, checked, require
from dspark_lab.pairs import pair_folder
from dspark_lab.rates import as_numbers
from dspark_lab.serving import steps
from dspark_lab.serving.costs import RoundCosts, require_lengths
from dspark_lab.serving.steps import StepsPerSecond

# In the folder of a pair that ships.
ENGINE = "engine.csv"
_COLUMNS = ["part", "requests", "draft_length", "tokens", "seconds"]
_RESTS = {"rest": "rest", "plain rest": "plain_rest"}


@dataclass(frozen=True, eq=False)
class Engine:
    """A target's speed, and the seconds of drafting and of the rest of a round.

    ``requests``, rising, take their rounds together; ``draft`` is of 1, 2, ..., K tokens for each.
    ``plain_known`` is False where plain steps hold a part of the drafting, as in a server's
    step-cost table: then it cannot be read whether to draft at all.
    """

    sps: StepsPerSecond
    requests: Int[np.ndarray, " point"]
    draft: Float[np.ndarray, "point slot"]
    rest: Float[np.ndarray, " point"]
    plain_rest: Float[np.ndarray, " point"]
    plain_known: bool = True

    def __post_init__(self) -> None:
        require("sps", self.sps, StepsPerSecond)
        require("plain_known", self.plain_known, bool)
        requests = steps.measured_points("requests", self.requests)
        object.__setattr__(self, "requests", requests)
        for name, axes in (("draft", "point, slot"), ("rest", "point"), ("plain_rest", "point")):
            given, points = getattr(self, name), len(requests)
            values = steps.measured_values(name, given, axes, points, NonNegative)
            object.__setattr__(self, name, values)

    @classmethod
    @checked
    def of(
        cls,
        sps: StepsPerSecond,
        longest: Count,
        *,
        draft_seconds: float | Mapping[int, float],
        rest_seconds: float = 0.0,
        plain_known: bool = True,
    ) -> Engine:
        """From numbers measured elsewhere, for blocks of up to ``longest`` slots of any length.

        ``draft_seconds`` are one number, or by requests; a plain step has no rest.
        """
        by_requests = draft_seconds if isinstance(draft_seconds, Mapping) else {1: draft_seconds}
        requests = sorted(by_requests)
        draft = np.array([[by_requests[count]] * longest for count in requests])
        rest = np.full(len(requests), rest_seconds)
        return cls(sps, np.array(requests), draft, rest, np.zeros(len(requests)), plain_known)

    @property
    def longest(self) -> int:
        return self.draft.shape[1]

    def draft_seconds(self, requests: Any, draft_length: int) -> Any:
        """Seconds of drafting so many slots for each of ``requests``, a number or an array."""
        require_lengths([draft_length], self.longest)
        return self._at(requests, self.draft[:, draft_length - 1])

    def rest_seconds(self, requests: Any) -> Any:
        return self._at(requests, self.rest)

    def plain_rest_seconds(self, requests: Any) -> Any:
        return self._at(requests, self.plain_rest)

    def plain_seconds(self, requests: Any) -> Any:
        """Seconds of a whole step without a draft."""
        return self.plain_rest_seconds(requests) + self.sps.seconds(requests)

    @checked
    def costs(self, requests: Count = 1, *, replay: bool = False) -> RoundCosts:
        """Costs of a round and of a plain step of so many requests together."""
        costs = RoundCosts.of(
            self.longest,
            plain_seconds=self.plain_seconds(requests),
            draft_seconds=lambda tokens: self.draft_seconds(requests, tokens),
            verify_seconds=lambda tokens: self.sps.seconds(requests * tokens),
            overhead_seconds=self.rest_seconds(requests),
            replay=replay,
            source=f"{self.sps.device}, context {self.sps.context_length}, {requests} requests",
        )
        return replace(costs, plain_known=self.plain_known)

    def _at(self, requests: Any, seconds: Float[np.ndarray, " point"]) -> Any:
        asked = np.asarray(requests)
        if asked.dtype.kind != "i":
            raise TypeError(f"requests must be an int or an array of ints, got {requests!r}")
        if asked.size and asked.min() < 1:
            raise ValueError(f"requests must be >= 1, got {asked.min()}")
        return steps.seconds_at(asked, self.requests, seconds)

    @property
    def table(self) -> pd.DataFrame:
        """A row for each measured point; 0 where a number does not apply.

        Where plain steps are not known, it has a column ``plain_known`` that says so.
        """
        rows: list[tuple[Any, ...]]
        rows = [("target", 0, 0, n, self.sps.seconds(n)) for n in self.sps.tokens.tolist()]
        for (point, slot), seconds in np.ndenumerate(self.draft):
            rows.append(("draft", self.requests[point], slot + 1, 0, seconds))
        for part, name in _RESTS.items():
            of_rest = zip(self.requests, getattr(self, name), strict=True)
            rows += [(part, count, 0, 0, seconds) for count, seconds in of_rest]
        facts = {name: getattr(self.sps, name) for name in ("context_length", "device", "target")}
        if not self.plain_known:
            facts["plain_known"] = False
        return pd.DataFrame(rows, columns=_COLUMNS).assign(**facts)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write :attr:`table` as CSV, atomically."""
        steps.save_points(self.table, path)

    @classmethod
    @checked
    def read(cls, path: str | os.PathLike[str]) -> Engine:
        """From a CSV file that :meth:`save` wrote, or one with the columns of :attr:`table`."""
        table = steps.read_points(path, _COLUMNS)
        parts = ["target", "draft", *_RESTS]
        if missing := [part for part in parts if part not in set(table["part"])]:
            raise ValueError(f"an engine's table must have the parts {parts}, got no {missing}")
        table["seconds"] = as_numbers("seconds", table["seconds"].to_numpy())
        twice = table.duplicated(_COLUMNS[:-1])
        if twice.any():
            point = table.loc[twice, _COLUMNS[:-1]].to_dict("records")[0]
            raise ValueError(f"an engine must have one row for each point, got two of {point}")
        target = table[table["part"] == "target"]
        sps = StepsPerSecond.of(target.assign(steps_per_second=1 / target["seconds"]))
        curves = table[table["part"].isin(parts[1:])].pivot(
            index="requests", columns=["part", "draft_length"], values="seconds"
        )
        if curves.isna().any(axis=None):
            part, length = curves.columns[curves.isna().any()][0]
            raise ValueError(
                f"an engine's table must have seconds of {part}, draft_length {length}, for each "
                f"of the requests {curves.index.tolist()}"
            )
        draft = curves["draft"].sort_index(axis=1)
        if draft.columns.tolist() != list(range(1, draft.shape[1] + 1)):
            given = draft.columns.tolist()
            raise ValueError(f"draft must be of every length from 1 on, got {given}")
        rest, plain_rest = (curves[part].iloc[:, 0].to_numpy() for part in _RESTS)
        known = "plain_known" not in table or bool(table["plain_known"].all())
        return cls(sps, draft.index.to_numpy(), draft.to_numpy(), rest, plain_rest, known)


def load_engine(pair: str = "pocket") -> Engine:
    """The measured engine of a pair that ships; another is read by :meth:`Engine.read`."""
    return Engine.read(pair_folder(pair) / ENGINE)
