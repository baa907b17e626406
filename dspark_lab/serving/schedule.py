"""Which drafted slots are worth verifying when many requests share the target's steps.

    a_{r,j} = c_{r,0} * ... * c_{r,j}      slot j of request r survives, says its confidence head;
    B       = R + admitted slots           every request's own token is read in any case;
    tau     = R + sum of admitted a        tokens that the step is expected to yield;
    Theta   = tau * SPS(B)                 tokens per second: the thing to raise.

The prefix scheduler (DSpark, arXiv 2607.05147) takes the slots by falling a and admits them while
Theta rises. It stops at the first slot that does not raise it, for then whether slot j is verified
hangs on what was known before its token was drawn, and the answers stay the target's own. A search
for the best Theta looks past that slot, at confidences that depend on its token: the token then has
a say in its own verification, and the answers are biased. The worked example at the end shows both.

SPS(B), steps per second at B tokens per step, is measured here or read from a table. This file
knows confidences and speeds; it does not know whether the confidences are true, nor when requests
come and go.
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, overload

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dspark_lab.checks import require_int
from dspark_lab.decoding import Scheduler, distribution
from dspark_lab.files import now, written_whole
from dspark_lab.model import Target
from dspark_lab.rates import as_numbers

__all__ = [
    "Speed",
    "StepsPerSecond",
    "measure_steps_per_second",
    "output_distribution",
    "prefix_schedule",
    "prefix_scheduler",
    "retrospective_schedule",
    "schedule_table",
    "seconds_at",
    "simulate_output",
    "simulate_worked_example",
    "worked_example",
]

# Steps per second at each of several numbers of tokens per step.
Speed = Callable[[np.ndarray], np.ndarray]
Confidence = (
    Float[np.ndarray, "request slot"] | Float[Tensor, "request slot"] | Sequence[Sequence[float]]
)

# Candidates that a schedule looks at first, at least.
_FEW = 256
_COLUMNS = ["tokens", "steps_per_second", "context_length", "device", "target"]


@dataclass(frozen=True, eq=False)
class StepsPerSecond:
    """SPS(B): how many steps a second a target makes with B tokens per step.

    Called with B, a number or an array, it returns as many speeds. Between measured points the
    seconds per step are linear in B, as they are where each further token costs the same. Below the
    first point its speed holds: a step is never taken to be faster than one that was measured.
    Above the last point the seconds go on as between the last two, or stay where those fall or
    there is one point alone.

    Args:
        tokens: ``[point]``, B, rising.
        steps_per_second: ``[point]``, at each B.
        context_length: tokens that each request had read before the step.
        device: in words, the precision with it.
        target: whose steps, in words.

    Raises:
        TypeError, ValueError: no point, arrays of another shape, tokens that are not whole numbers
            of at least 1 or do not rise, speeds that are not positive and finite, facts of another
            kind.
    """

    tokens: Int[np.ndarray, " point"]
    steps_per_second: Float[np.ndarray, " point"]
    context_length: int
    device: str
    target: str = ""

    def __post_init__(self) -> None:
        tokens = as_numbers("tokens", self.tokens)
        speeds = as_numbers("steps_per_second", self.steps_per_second)
        if tokens.ndim != 1 or tokens.size == 0 or tokens.shape != speeds.shape:
            raise ValueError(
                "tokens and steps_per_second must be [point] with one or more points, "
                f"got shapes {tokens.shape} and {speeds.shape}"
            )
        whole = np.isfinite(tokens) & (tokens >= 1) & (tokens == np.floor(tokens))
        if not whole.all():
            raise ValueError(
                f"tokens must be whole numbers >= 1, got {tokens[~whole][0]} at point "
                f"{(~whole).argmax()}"
            )
        still = np.diff(tokens) <= 0
        if still.any():
            first = int(still.argmax())
            raise ValueError(
                f"tokens must rise from point to point, got {tokens[first]:.0f} and then "
                f"{tokens[first + 1]:.0f}"
            )
        bad = ~(np.isfinite(speeds) & (speeds > 0))
        if bad.any():
            raise ValueError(
                "steps_per_second must be positive and finite, got "
                f"{speeds[bad][0]} at {tokens[bad][0]:.0f} tokens"
            )
        require_int("context_length", self.context_length, 0)
        for name in ("device", "target"):
            if not isinstance(getattr(self, name), str):
                raise TypeError(f"{name} must be text, got {getattr(self, name)!r}")
        for name, array in (("tokens", tokens.astype(np.int64)), ("steps_per_second", speeds)):
            array.flags.writeable = False
            object.__setattr__(self, name, array)

    @overload
    def __call__(self, tokens: float) -> float: ...

    @overload
    def __call__(self, tokens: np.ndarray) -> np.ndarray: ...

    def __call__(self, tokens: Any) -> Any:
        """Steps per second at ``tokens`` per step, a number or an array of any shape.

        Raises:
            ValueError: fewer than 0 tokens, or NaN.
        """
        return 1 / self.seconds(tokens)

    @overload
    def seconds(self, tokens: float) -> float: ...

    @overload
    def seconds(self, tokens: np.ndarray) -> np.ndarray: ...

    def seconds(self, tokens: Any) -> Any:
        """Seconds per step at ``tokens`` per step; see :meth:`__call__`."""
        asked = np.asarray(tokens)
        if asked.size and not asked.min() >= 0:
            raise ValueError(f"tokens per step must be >= 0, got {asked.min()}")
        found = seconds_at(asked, self.tokens, 1 / self.steps_per_second)
        return found if asked.ndim else float(found)

    @property
    def smooth(self) -> bool:
        """Whether further tokens cost more seconds, each at least as many as the one before.

        Early stopping then finds the best Theta there is: tau grows ever less from slot to slot and
        the seconds ever more, so Theta rises once, then falls. Where a step from B to B + 1 tokens
        costs more than the next ones do, a cliff, early stopping may halt in front of it.
        """
        taken = 1 / self.steps_per_second
        slopes = np.append(0, np.diff(taken) / np.diff(self.tokens))
        # As far as rounding lets one see.
        return bool((np.diff(slopes) >= -1e-12 * taken.max()).all())

    def smoothed(self) -> StepsPerSecond:
        """Those points between which the seconds are :attr:`smooth`, with no point below them.

        The lower convex envelope of the seconds, from the fastest step on. What noise or a cliff
        has lifted is left out, so this is a hopeful curve, but one on which a scheduler is not
        halted by a bump of the measurement.
        """
        taken = 1 / self.steps_per_second
        kept: list[int] = []
        for point in range(int(taken.argmin()), len(taken)):
            while len(kept) > 1 and self._slope(kept[-2], kept[-1]) >= self._slope(kept[-1], point):
                kept.pop()
            kept.append(point)
        return StepsPerSecond(
            self.tokens[kept],
            self.steps_per_second[kept],
            self.context_length,
            self.device,
            self.target,
        )

    def _slope(self, low: int, high: int) -> float:
        seconds = 1 / self.steps_per_second
        return float((seconds[high] - seconds[low]) / (self.tokens[high] - self.tokens[low]))

    @property
    def table(self) -> pd.DataFrame:
        """One row per measured point: ``tokens``, ``steps_per_second``, and the facts,
        ``context_length``, ``device`` and ``target``, the same in every row.
        """
        facts = [self.context_length, self.device, self.target]
        points = {"tokens": self.tokens, "steps_per_second": self.steps_per_second}
        return pd.DataFrame(points | dict(zip(_COLUMNS[2:], facts, strict=True)))

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

        ``context_length``, ``device`` and ``target`` are read from columns of that name where they
        are not given here. The first two must be known: a speed without them says nothing.

        Raises:
            TypeError, ValueError: as :class:`StepsPerSecond`; a column or a fact is missing, or the
                rows differ in a fact.
        """
        missing = [name for name in _COLUMNS[:2] if name not in table]
        if missing:
            raise ValueError(
                f"table must have the columns tokens and steps_per_second, got no "
                f"{' and no '.join(missing)}"
            )
        given = {"context_length": context_length, "device": device, "target": target}
        facts: dict[str, Any] = {}
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

    @classmethod
    def timed(
        cls, target: Target, seconds: Mapping[int, float], context_length: int
    ) -> StepsPerSecond:
        """Of a target whose steps took so many seconds, by tokens."""
        tokens = np.array(sorted(seconds))
        speeds = 1 / np.array([seconds[int(size)] for size in tokens])
        # Of a folder's path no more than tells what it holds.
        name = "/".join(Path(target.name).parts[-2:])
        return cls(tokens, speeds, context_length, _device(target), name)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes :attr:`table` as CSV, whole or not at all."""
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
        """From a CSV file, one that :meth:`save` wrote or any with the columns of :meth:`of`.

        Raises:
            FileNotFoundError: there is no such file.
            TypeError, ValueError: as :meth:`of`.
        """
        # A device may be called "NA" or "7"; "nan" is no number, and is refused as one.
        table = pd.read_csv(
            path,
            dtype={"device": "object", "target": "object"},
            keep_default_na=False,
            na_values={"tokens": ["", "nan"], "steps_per_second": ["", "nan"]},
        )
        return cls.of(table, context_length=context_length, device=device, target=target)


def seconds_at(
    asked: Any, points: Int[np.ndarray, " point"], seconds: Float[np.ndarray, " point"]
) -> Any:
    """Seconds at numbers, from those measured at points: linear between, the first point's below.

    Above the last point they go on as between the last two, or stay where those fall or there is
    one point alone.
    """
    found = np.interp(asked, points, seconds)
    if len(points) > 1:
        slope = max(0.0, (seconds[-1] - seconds[-2]) / (points[-1] - points[-2]))
        found = found + slope * np.maximum(asked - points[-1], 0)
    return found


@torch.inference_mode()
def measure_steps_per_second(
    target: Target,
    tokens: Sequence[int] = (1, 2, 4, 8, 16, 32, 64, 128),
    *,
    context_length: int = 256,
    tokens_per_row: int = 8,
    warm_up: int = 2,
    repeats: int = 5,
    seed: int = 0,
) -> StepsPerSecond:
    """SPS(B) of a target on the device that it is on.

    A step is what :func:`dspark_lab.decoding.loop.decode` does to verify: every row reads its tokens
    behind ``context_length`` cached ones, and each token gets its probabilities over the
    vocabulary. B tokens are R rows, requests, of n tokens each: n is the largest divisor of B that
    is at most ``tokens_per_row``, as in a server that verifies blocks of n - 1 slots. A target
    that decodes one row at a time reads all B in it. After each step, outside the clock, the cache
    is cut back, so the context keeps its length. The time is the median over ``repeats`` steps; a
    GPU's work is waited for.

    Args:
        tokens: B, rising.
        context_length: of every row; drawn at random once and shared by all rows.
        tokens_per_row: the most tokens that a row reads in a step.
        warm_up: steps before those that count, at each B.
        repeats: steps that count, at each B.
        seed: of the tokens.

    Raises:
        TypeError, ValueError: a number of the wrong kind or too low, tokens that do not rise, or a
            context that with a row's tokens is too long for the model.
    """
    require_int("context_length", context_length, 1)
    require_int("tokens_per_row", tokens_per_row, 1)
    require_int("warm_up", warm_up, 0)
    require_int("repeats", repeats, 1)
    require_int("seed", seed, 0)
    sizes = list(tokens)
    # Refuses what is wrong with the sizes before time is spent on them.
    StepsPerSecond(np.array(sizes), np.ones(len(sizes)), context_length, "")
    per_row = {size: _per_row(target, int(size), tokens_per_row) for size in sizes}
    limit = getattr(target.model.config.get_text_config(), "max_position_embeddings", None)
    longest = context_length + max(per_row.values())
    if limit is not None and longest > limit:
        raise ValueError(
            f"context_length and a row's tokens must be at most {limit} together "
            f"(max_position_embeddings), got {longest}"
        )
    generator = torch.Generator().manual_seed(seed)

    def drawn(rows: int, length: int) -> Tensor:
        ids = torch.randint(target.vocab_size, (rows, length), generator=generator)
        return ids.to(target.device)

    context = drawn(1, context_length)
    seconds: dict[int, float] = {}
    for size, count in per_row.items():
        rows = size // count
        cache = target.start_cache(1)
        target.advance(context, cache, [])
        cache.commit([context_length], [0] * rows)
        times = []
        for _ in range(warm_up + repeats):
            ids = drawn(rows, count)
            begin = now(target.device)
            last = target.advance(ids, cache, []).last
            distribution(torch.nn.functional.linear(last, target.head_weight), 1.0)
            times.append(now(target.device) - begin)
            cache.commit([0] * rows)
        seconds[size] = statistics.median(times[warm_up:])
    return StepsPerSecond.timed(target, seconds, context_length)


def _per_row(target: Target, size: int, most: int) -> int:
    if not target.decodes_batches:
        return size
    return next(count for count in range(min(most, size), 0, -1) if size % count == 0)


def _device(target: Target) -> str:
    precision = str(target.dtype).removeprefix("torch.")
    if target.device.type == "cuda":
        return f"{torch.cuda.get_device_name(target.device)}, {precision}"
    threads = torch.get_num_threads()
    return f"{target.device.type}, {threads} thread{'s' * (threads != 1)}, {precision}"


def prefix_schedule(confidence: Confidence, sps: Speed) -> Int[np.ndarray, " request"]:
    """How many slots of each request to verify: the prefix scheduler, which keeps decoding exact.

    Slots are taken by falling survival a and admitted while Theta = tau * SPS(B) rises; the first
    that does not raise it ends the schedule. Of equal a the earlier slot comes first, then the
    request of the lower number; since a never rises along a request, what is admitted of it is a
    prefix. Where SPS is :attr:`StepsPerSecond.smooth`, no other choice of prefixes has a higher
    Theta. B counts the admitted slots alone: rows that are padded to the longest cost more.

    Args:
        confidence: ``[request, slot]``, in [0, 1]: that a slot is accepted given that all before it
            were. 0 where a request has no such slot.
        sps: steps per second at each of an array of whole numbers of tokens per step, such as
            :class:`StepsPerSecond`.

    Returns:
        ``[request]``, int64, between 0 and the number of slots.

    Raises:
        TypeError, ValueError: confidences of another shape or outside [0, 1], NaN among them, or
            speeds that are not positive, finite and as many as asked for.
    """
    requests, survival = _survivals(confidence)
    most = max(requests, _FEW)
    while True:
        # To sort them all takes longest, and rarely are so many admitted.
        walk = _walk(requests, survival, sps, most)
        if walk.admitted < len(walk.order) or len(walk.order) == len(survival):
            return walk.lengths(walk.admitted)
        most *= 8


def retrospective_schedule(confidence: Confidence, sps: Speed) -> Int[np.ndarray, " request"]:
    """How many slots of each request have the highest Theta of all: **biased**, to compare with.

    No choice of prefixes has a higher Theta, whatever the SPS curve, cliffs included; of equally
    good ones the shortest. But whether a slot is admitted may hang on its own token, through the
    confidences of the slots behind it, so decoding by it does not give the target's own answers:
    see :func:`worked_example`. Nothing in this package decodes by it.

    Args, returns and raises as :func:`prefix_schedule`.
    """
    walk = _walk(*_survivals(confidence), sps)
    return walk.lengths(int(walk.theta.argmax()))


def prefix_scheduler(sps: Speed) -> Scheduler:
    """:func:`prefix_schedule` as the ``scheduler`` of :func:`dspark_lab.decoding.loop.decode`.

    Each round's batch shares a step. decode itself pads the batch to its longest row, so the time
    that a scheduler saves shows where an engine does not.
    """

    def scheduler(confidence: Float[Tensor, "batch slot"]) -> Int[Tensor, " batch"]:
        return torch.from_numpy(prefix_schedule(confidence, sps))

    return scheduler


def schedule_table(confidence: Confidence, sps: Speed) -> pd.DataFrame:
    """The walk of :func:`prefix_schedule`, one row per slot in the order of admission.

    ``request``, ``slot``, ``survival`` a; with the slots up to here admitted: ``tokens`` B,
    ``tau``, ``theta``, and ``theta_before``, without this one; ``admitted`` by the prefix
    scheduler, and ``retrospective``, by :func:`retrospective_schedule`.

    Raises:
        TypeError, ValueError: as :func:`prefix_schedule`.
    """
    walk = _walk(*_survivals(confidence), sps)
    number = np.arange(len(walk.survival))
    return pd.DataFrame(
        {
            "request": walk.order % max(walk.requests, 1),
            "slot": walk.order // max(walk.requests, 1),
            "survival": walk.survival,
            "tokens": walk.requests + number + 1,
            "tau": walk.tau[1:],
            "theta_before": walk.theta[:-1],
            "theta": walk.theta[1:],
            "admitted": number < walk.admitted,
            "retrospective": number < walk.theta.argmax(),
        }
    )


@dataclass(frozen=True, eq=False)
class _Walk:
    """Candidates by falling survival; ``tau`` and ``theta`` with the first n of them admitted.

    ``order`` ``[candidate]`` is slot * requests + request.
    """

    requests: int
    order: Int[np.ndarray, " candidate"]
    survival: Float[np.ndarray, " candidate"]
    tau: Float[np.ndarray, " admitted"]
    theta: Float[np.ndarray, " admitted"]

    @property
    def admitted(self) -> int:
        """How many come before the first that does not raise Theta."""
        rises: Bool[np.ndarray, " candidate"] = self.theta[1:] > self.theta[:-1]
        return len(rises) if rises.all() else int(rises.argmin())

    def lengths(self, admitted: int) -> Int[np.ndarray, " request"]:
        """Slots of each request among the first ``admitted``."""
        chosen = self.order[:admitted] % max(self.requests, 1)
        return np.bincount(chosen, minlength=self.requests).astype(np.int64, copy=False)


def _survivals(confidence: Confidence) -> tuple[int, Float[np.ndarray, " candidate"]]:
    """The number of requests, and a of every candidate, at slot * requests + request."""
    given = confidence.detach().cpu().double() if isinstance(confidence, Tensor) else confidence
    array = as_numbers("confidence", given)
    if array.ndim != 2:
        raise ValueError(f"confidence must be [request, slot], got shape {array.shape}")
    if array.size and not (array.min() >= 0 and array.max() <= 1):
        raise ValueError(
            f"confidence must lie in [0, 1], got values from {array.min()} to {array.max()}"
        )
    # A product of numbers of at most 1 never rises, rounding included.
    return len(array), array.cumprod(axis=1).T.ravel()


def _walk(
    requests: int, survival: Float[np.ndarray, " candidate"], sps: Speed, most: int | None = None
) -> _Walk:
    """Over all candidates, or the likeliest ``most`` and those that are as likely as the last."""
    order = np.arange(len(survival))
    if most is not None and most < len(survival):
        order = np.flatnonzero(survival >= np.partition(survival, -most)[-most])
    # Stable: of equal ones the earlier slot stays in front.
    order = order[np.argsort(-survival[order], kind="stable")]
    survival = survival[order]
    tau = np.append(requests, survival).cumsum()
    sizes = np.arange(requests, requests + len(tau))
    speeds = np.asarray(sps(sizes), dtype=np.float64)
    if speeds.shape != sizes.shape or not (speeds.min() > 0 and speeds.max() < np.inf):
        raise ValueError(
            f"sps must return {len(sizes)} positive and finite steps per second, one for each "
            f"number of tokens, got {speeds}"
        )
    return _Walk(requests, order, survival, tau, tau * speeds)


_TOKENS = ("A", "B")
_TARGET = (Fraction(7, 10), Fraction(3, 10))
_DRAFT = (Fraction(1, 2), Fraction(1, 2))
_FIRST, _NEXT = 0.8, (0.9, 0.0)
_SPEEDS = StepsPerSecond(np.array([1, 2, 3]), np.array([1.0, 0.5, 0.45]), 0, "imaginary")
_SCHEDULERS = {"early stopping": prefix_schedule, "retrospective": retrospective_schedule}


def output_distribution(
    target_probs: Sequence[float | Fraction],
    draft_probs: Sequence[float | Fraction],
    first_confidence: float,
    next_confidence: Sequence[float],
    sps: Speed,
    scheduler: Callable[[np.ndarray, Speed], np.ndarray] = prefix_schedule,
) -> list[Fraction]:
    """How the next token of a lone request is distributed, with two drafted slots and a scheduler.

    By enumeration over the first slot's token, in exact fractions. Lossless means that it is
    ``target_probs``.

    Args:
        target_probs: ``[vocab]``, p of the first slot.
        draft_probs: ``[vocab]``, q of the first slot, positive.
        first_confidence: of the first slot.
        next_confidence: ``[vocab]``, of the second slot after each token in the first.
        sps, scheduler: as :func:`prefix_schedule`.

    Raises:
        TypeError, ValueError: as the scheduler.
    """
    p, q = [Fraction(one) for one in target_probs], [Fraction(one) for one in draft_probs]
    rest = [max(one - other, Fraction(0)) for one, other in zip(p, q, strict=True)]
    rest = [part / sum(rest) for part in rest] if any(rest) else p
    result = [Fraction(0)] * len(p)
    for token, length in enumerate(_lengths(first_confidence, next_confidence, sps, scheduler)):
        # A slot that is not verified is thrown away, and the target draws its own token.
        kept = min(p[token] / q[token], Fraction(1)) if length else Fraction(0)
        result[token] += q[token] * kept
        for own, prob in enumerate(rest if length else p):
            result[own] += q[token] * (1 - kept) * prob
    return result


def simulate_output(
    target_probs: Sequence[float | Fraction],
    draft_probs: Sequence[float | Fraction],
    first_confidence: float,
    next_confidence: Sequence[float],
    sps: Speed,
    scheduler: Callable[[np.ndarray, Speed], np.ndarray] = prefix_schedule,
    *,
    draws: int = 100_000,
    seed: int = 0,
) -> Float[np.ndarray, " vocab"]:
    """:func:`output_distribution` by drawing: draft, schedule, accept or reject, correct.

    Returns:
        ``[vocab]``, the frequency of each token among ``draws``.

    Raises:
        TypeError, ValueError: ``draws`` is not an int of at least 1, or ``seed`` of at least 0, and
            as the scheduler.
    """
    require_int("draws", draws, 1)
    require_int("seed", seed, 0)
    rng = np.random.default_rng(seed)
    p, q = (np.array(probs, dtype=np.float64) for probs in (target_probs, draft_probs))
    rest = np.maximum(p - q, 0)
    rest = rest / rest.sum() if rest.any() else p
    drafted = rng.choice(len(q), draws, p=q)
    lengths = np.array(_lengths(first_confidence, next_confidence, sps, scheduler))
    verified = lengths[drafted] > 0
    accepted = verified & (rng.random(draws) < (p / q)[drafted])
    corrected, undrafted = (rng.choice(len(p), draws, p=probs) for probs in (rest, p))
    said = np.where(accepted, drafted, np.where(verified, corrected, undrafted))
    return np.bincount(said, minlength=len(p)) / draws


def worked_example() -> pd.DataFrame:
    """Why the scheduler must stop early: two tokens, two slots, one request, worked out exactly.

    The target says A with 0.7 and B with 0.3, the drafter 0.5 each. The first slot's confidence is
    0.8; the second's is 0.9 after A and 0 after B. SPS(1, 2, 3) = 1.0, 0.5, 0.45.

    Theta is 1 with nothing admitted and (1 + 0.8) * 0.5 = 0.9 with the first slot. Early stopping
    ends here, whatever was drafted, and the target draws its own token. A retrospective search sees
    that after A both slots give (1 + 0.8 + 0.72) * 0.45 = 1.134 and verifies A, which is always
    accepted; after B it verifies nothing, and the target draws A or B as it likes. So A is said
    with 0.5 + 0.5 * 0.7 = 0.85.

    Returns:
        one row per ``scheduler``: ``verified_after_A`` and ``verified_after_B``, slots, by the
        token drafted first; ``A`` and ``B``, the probabilities of the token that comes out;
        ``bias``, their total variation distance from the target's.
    """
    rows = []
    for name, scheduler in _SCHEDULERS.items():
        lengths = _lengths(_FIRST, _NEXT, _SPEEDS, scheduler)
        found = output_distribution(_TARGET, _DRAFT, _FIRST, _NEXT, _SPEEDS, scheduler)
        bias = sum(abs(one - own) for one, own in zip(found, _TARGET, strict=True))
        rows.append(
            {"scheduler": name}
            | {f"verified_after_{t}": n for t, n in zip(_TOKENS, lengths, strict=True)}
            | {token: float(prob) for token, prob in zip(_TOKENS, found, strict=True)}
            | {"bias": float(bias / 2)}
        )
    return pd.DataFrame(rows)


def simulate_worked_example(draws: int = 100_000, *, seed: int = 0) -> pd.DataFrame:
    """:func:`worked_example` by drawing, see :func:`simulate_output`.

    Returns:
        one row per ``scheduler``: ``draws``, the frequencies ``A`` and ``B``, and
        ``standard_error`` of either.

    Raises:
        TypeError, ValueError: ``draws`` is not an int of at least 1, or ``seed`` of at least 0.
    """
    rows = []
    for number, (name, scheduler) in enumerate(_SCHEDULERS.items()):
        example = (_TARGET, _DRAFT, _FIRST, _NEXT, _SPEEDS, scheduler)
        found = simulate_output(*example, draws=draws, seed=seed + number)
        error = float((found[0] * found[1] / draws) ** 0.5)
        shares = dict(zip(_TOKENS, found.tolist(), strict=True))
        rows.append({"scheduler": name, "draws": draws} | shares | {"standard_error": error})
    return pd.DataFrame(rows)


def _lengths(
    first_confidence: float,
    next_confidence: Sequence[float],
    sps: Speed,
    scheduler: Callable[[np.ndarray, Speed], np.ndarray],
) -> list[int]:
    """Slots verified after each token in the first slot."""
    blocks = [np.array([[first_confidence, after]]) for after in next_confidence]
    return [int(scheduler(block, sps)[0]) for block in blocks]
