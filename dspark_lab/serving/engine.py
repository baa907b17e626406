"""What a serving engine takes for a step: the target by tokens, all else of a round by requests.

    engine = measure_engine(target, drafter)      on the devices that they are on
    engine.costs(requests=8)                      of a round, for dspark_lab.serving.speedup
    load_table(trace, engine.sps, policies, **engine.beside(7))

R requests that take their rounds together draft R blocks in one pass, and the target reads R + the
verified slots in one step. So the target's seconds go by the tokens of a step (SPS(B), see
``dspark_lab.serving.schedule``), those of drafting by requests and slots, and all else by requests: the
*rest* of a drafted round (drawing tokens, the drafter's reading of what was accepted, the cutting
of both caches), and what a plain step has of such, its *plain rest*.

An engine is a few small curves in a CSV file: whoever serves with another program writes their own
measurements into such a file, or says them in :meth:`Engine.of`. This file knows curves and how
this lab's decoding is timed for them; it knows nothing about acceptance or load.
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pandas as pd
from jaxtyping import Float, Int

from dspark_lab.checks import require_int
from dspark_lab.files import written_whole
from dspark_lab.model import Drafter, Target
from dspark_lab.pairs import pair_folder
from dspark_lab.rates import as_numbers
from dspark_lab.serving.schedule import StepsPerSecond, seconds_at
from dspark_lab.serving.speedup import RoundCosts, random_prompt, timed_rounds

__all__ = ["ENGINE", "Engine", "load_engine", "measure_engine"]

# In the folder of a pair that ships.
ENGINE = "engine.csv"
# Of a table: the target's steps, and what goes by requests.
_COLUMNS = ["part", "requests", "draft_length", "tokens", "seconds"]
_RESTS = {"rest": "rest", "plain rest": "plain_rest"}


@dataclass(frozen=True, eq=False)
class Engine:
    """A target's speed, and the seconds of drafting and of the rest of a round beside it.

    Between measured numbers of requests seconds are linear; below the first they are its own, and
    above the last they go on as between the last two, or stay where those fall or there is one
    alone.

    Args:
        sps: of the target, by tokens per step.
        requests: ``[point]``, rising.
        draft: ``[point, slot]``, seconds of drafting 1, 2, ..., K tokens for each of so many
            requests together.
        rest: ``[point]``, seconds of all else of a round with a draft.
        plain_rest: ``[point]``, seconds of all but the target's step without one.

    Raises:
        TypeError, ValueError: arrays of other shapes, requests that are not whole numbers of at
            least 1 or do not rise, seconds that are negative or not finite.
    """

    sps: StepsPerSecond
    requests: Int[np.ndarray, " point"]
    draft: Float[np.ndarray, "point slot"]
    rest: Float[np.ndarray, " point"]
    plain_rest: Float[np.ndarray, " point"]

    def __post_init__(self) -> None:
        if not isinstance(self.sps, StepsPerSecond):
            raise TypeError(f"sps must be StepsPerSecond, got {type(self.sps).__name__}")
        requests = as_numbers("requests", self.requests)
        seconds = {
            name: as_numbers(name, getattr(self, name)) for name in ("draft", *_RESTS.values())
        }
        draft = seconds["draft"]
        points = len(requests) if requests.ndim == 1 else 0
        if points == 0 or draft.ndim != 2 or draft.shape[1] == 0 or len(draft) != points:
            raise ValueError(
                "requests must be [point] and draft [point, slot], one or more each, "
                f"got shapes {requests.shape} and {draft.shape}"
            )
        for name in _RESTS.values():
            if seconds[name].shape != (points,):
                raise ValueError(
                    f"{name} must be [point] of {points}, got shape {seconds[name].shape}"
                )
        if not ((requests >= 1) & (requests == np.floor(requests))).all():
            raise ValueError(f"requests must be whole numbers >= 1, got {requests.tolist()}")
        if not (np.diff(requests) > 0).all():
            raise ValueError(f"requests must rise from point to point, got {requests.tolist()}")
        for name, values in seconds.items():
            bad = ~(np.isfinite(values) & (values >= 0))
            if bad.any():
                raise ValueError(f"{name} must be seconds >= 0 and finite, got {values[bad][0]}")
        for name, values in {"requests": requests.astype(np.int64), **seconds}.items():
            values.flags.writeable = False
            object.__setattr__(self, name, values)

    @classmethod
    def of(
        cls,
        sps: StepsPerSecond,
        longest: int,
        *,
        draft_seconds: float | Mapping[int, float],
        rest_seconds: float = 0.0,
    ) -> Engine:
        """From numbers that were measured elsewhere.

        Args:
            longest: slots of a block.
            draft_seconds: of drafting a block of any length, one number, or by requests.
            rest_seconds: of a round with a draft; a plain step has none.

        Raises:
            TypeError, ValueError: as :class:`Engine`.
        """
        require_int("longest", longest, 1)
        by_requests = draft_seconds if isinstance(draft_seconds, Mapping) else {1: draft_seconds}
        requests = sorted(by_requests)
        draft = np.array([[by_requests[count]] * longest for count in requests])
        rest = np.full(len(requests), rest_seconds)
        return cls(sps, np.array(requests), draft, rest, np.zeros(len(requests)))

    @property
    def longest(self) -> int:
        """The most slots of a block."""
        return self.draft.shape[1]

    def draft_seconds(self, requests: int, draft_length: int) -> float:
        """Of drafting a block of so many slots for each of the requests.

        Raises:
            TypeError, ValueError: not whole numbers of at least 1, or a longer block than is known.
        """
        self._require_length(draft_length)
        return self._at(requests, self.draft[:, draft_length - 1])

    def rest_seconds(self, requests: int) -> float:
        """Of all else of a round with a draft.

        Raises:
            TypeError, ValueError: not a whole number of at least 1.
        """
        return self._at(requests, self.rest)

    def plain_seconds(self, requests: int) -> float:
        """Of a whole step without a draft.

        Raises:
            TypeError, ValueError: not a whole number of at least 1.
        """
        return self._at(requests, self.plain_rest) + self.sps.seconds(requests)

    def costs(self, requests: int = 1, *, replay: bool = False) -> RoundCosts:
        """Of a round and of a plain step, of so many requests together.

        Args:
            replay: whether a rejection is followed by reading again what was accepted.

        Raises:
            TypeError, ValueError: not a whole number of at least 1.
        """
        costs = RoundCosts.from_steps(
            self.sps,
            self.longest,
            draft_seconds=[self.draft_seconds(requests, k + 1) for k in range(self.longest)],
            requests=requests,
            overhead_seconds=self.rest_seconds(requests),
            replay=replay,
            source=f"{self.sps.device}, context {self.sps.context_length}, {requests} requests",
        )
        return replace(costs, plain_seconds=self.plain_seconds(requests))

    def beside(self, draft_length: int) -> dict[str, Callable[[int], float]]:
        """What a step takes beside the target's, as :func:`dspark_lab.serving.load.simulate` takes it.

        ``overhead_seconds`` of every step, those of a plain one, and ``draft_seconds``, what a
        draft adds, each a function of the requests in the batch.

        Raises:
            TypeError, ValueError: a longer block than is known, or none.
        """
        self._require_length(draft_length)

        def plain(requests: int) -> float:
            return self._at(requests, self.plain_rest)

        def draft(requests: int) -> float:
            whole = self.draft_seconds(requests, draft_length) + self.rest_seconds(requests)
            return max(0.0, whole - plain(requests))

        return {"draft_seconds": draft, "overhead_seconds": plain}

    def _require_length(self, draft_length: int) -> None:
        require_int("draft_length", draft_length, 1)
        if draft_length > self.longest:
            raise ValueError(f"draft_length must be at most {self.longest}, got {draft_length}")

    def _at(self, requests: int, seconds: Float[np.ndarray, " point"]) -> float:
        require_int("requests", requests, 1)
        return float(seconds_at(requests, self.requests, seconds))

    @property
    def table(self) -> pd.DataFrame:
        """One row per measured point: ``part`` ("target", "draft", "rest", "plain rest"),
        ``requests`` and ``draft_length`` (0 where that does not apply), ``tokens`` of a target's
        step (else 0), ``seconds``; and ``context_length``, ``device``, ``target``, the same in
        every row.
        """
        points = list(enumerate(self.requests.tolist()))
        rows = [("target", 0, 0, n, self.sps.seconds(n)) for n in self.sps.tokens.tolist()]
        rows += [
            ("draft", count, k + 1, 0, self.draft[point, k])
            for point, count in points
            for k in range(self.longest)
        ]
        rows += [
            (part, count, 0, 0, getattr(self, name)[point])
            for part, name in _RESTS.items()
            for point, count in points
        ]
        return pd.DataFrame(rows, columns=_COLUMNS).assign(
            context_length=self.sps.context_length, device=self.sps.device, target=self.sps.target
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes :attr:`table` as CSV, whole or not at all."""
        with written_whole(Path(path)) as partial:
            self.table.to_csv(partial, index=False)

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> Engine:
        """From a CSV file that :meth:`save` wrote, or one with the columns of :attr:`table`.

        Raises:
            FileNotFoundError: there is no such file.
            TypeError, ValueError: as :class:`Engine`; columns, parts, lengths or numbers of
                requests are missing.
        """
        # A device may be called "NA" or "7"; "nan" is no number, and is refused as one.
        table = pd.read_csv(
            path,
            dtype={"device": "object", "target": "object"},
            keep_default_na=False,
            na_values=dict.fromkeys(_COLUMNS[1:], ["", "nan"]),
        )
        if missing := [name for name in _COLUMNS if name not in table]:
            raise ValueError(
                f"an engine's table must have the columns {_COLUMNS}, got no {missing}"
            )
        table["seconds"] = as_numbers("seconds", table["seconds"].to_numpy())
        twice = table.duplicated(_COLUMNS[:-1])
        if twice.any():
            raise ValueError(
                "an engine's table must have one row for each point, got two of "
                f"{table.loc[twice, _COLUMNS[:-1]].iloc[0].tolist()}"
            )
        parts = {part: table[table["part"] == part] for part in ("target", "draft", *_RESTS)}
        if missing := [part for part, rows in parts.items() if rows.empty]:
            raise ValueError(
                f"an engine's table must have the parts {list(parts)}, got no {missing}"
            )
        draft = parts["draft"].pivot(index="requests", columns="draft_length", values="seconds")
        if draft.columns.tolist() != list(range(1, draft.shape[1] + 1)):
            raise ValueError(
                f"draft must be of every length from 1 on, got {draft.columns.tolist()}"
            )
        rests = [parts[part].set_index("requests")["seconds"].sort_index() for part in _RESTS]
        for part, rest in zip(_RESTS, rests, strict=True):
            if rest.index.tolist() != draft.index.tolist():
                raise ValueError(
                    f"draft and {part} must be of the same numbers of requests, got "
                    f"{draft.index.tolist()} and {rest.index.tolist()}"
                )
        steps = parts["target"]
        sps = StepsPerSecond.of(steps.assign(steps_per_second=1 / steps["seconds"]))
        return cls(sps, draft.index.to_numpy(), *(each.to_numpy() for each in (draft, *rests)))


def load_engine(pair: str = "pocket") -> Engine:
    """The engine of a pair that ships, as it was measured; another is read by :meth:`Engine.read`.

    Raises:
        ValueError: no such pair.
    """
    return Engine.read(pair_folder(pair) / ENGINE)


def measure_engine(
    target: Target,
    drafter: Drafter,
    *,
    requests: Sequence[int] | None = None,
    context_length: int = 128,
    temperature: float = 0.0,
    repeats: int = 10,
    warm_up: int = 3,
    seed: int = 0,
) -> Engine:
    """The engine that this lab's decoding is, on the devices of these models.

    So many requests decode together, plainly, with blocks of one slot and with whole blocks, all of
    these in turns; a cost is the median of its rounds. The target's steps are those of all of them,
    by tokens, their distributions included; what drafting takes is linear between one slot and all.

    Args:
        requests: how many take their rounds together, rising; 1, 4 and 16 where None, or 1 alone
            for a target that decodes one row at a time.
        context_length: tokens of a random prompt; rounds add to it.
        temperature: of decoding.
        repeats, warm_up: rounds that count, and rounds before these that do not.

    Raises:
        TypeError, ValueError: as :func:`dspark_lab.decoding.loop.decode_rounds`, or settings out of range.
    """
    counts = list(requests or ((1, 4, 16) if target.decodes_batches else (1,)))
    for count in counts:
        require_int("requests", count, 1)
    if any(after <= before for before, after in pairwise(counts)):
        raise ValueError(f"requests must rise from point to point, got {counts}")
    if counts != [1] and not target.decodes_batches:
        raise ValueError(
            f"requests must be 1 for a target that decodes one row at a time, got {counts}"
        )
    longest = drafter.config.block_size
    lengths = sorted({0, 1, longest})
    spent = timed_rounds(
        target,
        drafter,
        [(count, k) for count in counts for k in lengths],
        random_prompt(target, context_length, seed),
        temperature=temperature,
        repeats=repeats,
        warm_up=warm_up,
        seed=seed,
    )
    steps: dict[int, list[float]] = {}
    for (count, k), seconds in spent.items():
        steps.setdefault(count * (k + 1), []).append(seconds["verify"])
    sps = {tokens: statistics.median(seconds) for tokens, seconds in steps.items()}
    drafting = [[spent[count, k]["draft"] for k in lengths[1:]] for count in counts]
    plain = [spent[count, 0] for count in counts]
    return Engine(
        sps=StepsPerSecond.timed(target, sps, context_length),
        requests=np.array(counts),
        draft=np.array(
            [np.interp(range(1, longest + 1), lengths[1:], seconds) for seconds in drafting]
        ),
        rest=np.array([spent[count, longest]["rest"] for count in counts]),
        plain_rest=np.array([seconds["draft"] + seconds["rest"] for seconds in plain]),
    )
