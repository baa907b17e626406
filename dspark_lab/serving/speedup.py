"""How long a block pays off when a drafter serves: speed-up against K, and where it breaks even.

A round drafts K tokens, has the target read the anchor and those of them that it verifies, and
yields what was accepted and one token more. In words, per round:

    tokens:   tau = 1 + sum_k P(slots 0..k are verified and accepted);
    seconds:  draft(K) + verify(slots verified + 1) + overhead,
              and after a rejection with a tokens accepted, rollback + replay(a + 1);
    speed-up: tau * seconds of a plain step / seconds of a round.

*Rollback* is what it costs to cut the rejected tokens off the target's cache. A cache that cannot
be cut (recurrent layers, sliding windows) goes back to where it was before the round, and the
target reads the anchor and the accepted tokens once more: that is *replay*. Both are rarer, and
replay dearer, the more is accepted, so neither is a fixed cost: a model that leaves them out is
wrong most where drafts are bad, which is where it decides.

Acceptance is counted as lifetimes are (Kaplan and Meier 1958): slot k's rate is over the rounds
that reached it, and survival is the product of the rates. A round that the end of its answer cut
short counts up to the cut and says nothing about what would have come after, so tau is that of
rounds in the middle of an answer, and short answers cost nothing but precision. Rates belong to one
drafter at one temperature. What is kept fixed is where rounds begin: rounds of another length begin
elsewhere, shorter ones more often at easy tokens, so that a trace of long blocks promises a little
less of short blocks than they keep; :func:`decode_check` shows how much.

This file knows rates, seconds and traces, and one loop around :func:`dspark_lab.decoding.loop.decode`; it
knows nothing of several requests that share a step (``dspark_lab.serving.schedule``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dspark_lab.checks import require_int, require_number
from dspark_lab.decoding import (
    Decoded,
    Prompt,
    Rounds,
    column,
    decode_rounds,
    encode_prompt,
    read_trace,
    rounds_of,
)
from dspark_lab.files import now
from dspark_lab.model import Drafter, Target, TargetCache
from dspark_lab.rates import (
    SequentialTemperatures,
    as_probabilities,
    interval,
    resampled,
    trace_sums,
)
from dspark_lab.serving.speed import break_even_rate, speed_table

__all__ = [
    "AcceptanceProfile",
    "RoundCosts",
    "acceptance_profile",
    "advice",
    "best_length",
    "best_threshold",
    "break_even",
    "decode_check",
    "measure_costs",
    "random_prompt",
    "speedup_table",
    "temperature_table",
    "threshold_table",
    "timed_rounds",
]

# To look at, and to choose from.
_THRESHOLDS = tuple(step / 20 for step in range(20))
_FINE_THRESHOLDS = tuple(step / 100 for step in range(101))

# What decoding tells of a round.
_ROUND_PARTS = ("draft", "verify", "rest")
# Rounds of one kind that are timed before it is another's turn.
_AT_A_STRETCH = 12

# Seconds: the same for every length, one for each, or worked out from it.
Seconds = float | Sequence[float] | Callable[[int], float]


@dataclass(frozen=True, eq=False)
class AcceptanceProfile:
    """How often each slot is accepted, given that all before it were.

    ``rates`` ``[slot]``: NaN where no round reached the slot. ``samples`` ``[resample, slot]``: the
    same of conversations drawn again, without rows where there are none. ``conversations``: how
    many of them. ``temperature`` and ``drafter`` say whose rates these are, None where unknown.
    Made by :func:`acceptance_profile` or :meth:`of`.
    """

    rates: Float[np.ndarray, " slot"]
    samples: Float[np.ndarray, "resample slot"]
    conversations: int = 0
    temperature: float | None = None
    drafter: str | None = None

    @classmethod
    def of(cls, rates: Sequence[float], *, temperature: float | None = None) -> AcceptanceProfile:
        """Of plain numbers, such as published ones; without intervals.

        Raises:
            TypeError, ValueError: not one or more probabilities.
        """
        values = as_probabilities("rates", list(rates))
        return cls(values, np.empty((0, len(values))), temperature=temperature)

    @property
    def survival(self) -> Float[np.ndarray, " slot"]:
        """How often each slot and all before it are accepted."""
        return _chain(self.rates)

    def tau(self, draft_length: int, tokens: int | None = None) -> float:
        """Tokens that a round of so many slots yields on average, the target's own among them.

        Args:
            draft_length: K.
            tokens: of an answer, its first one, which no round yields, left out. Its last rounds
                draft no more than is left to say and yield less; None is an answer without end.

        Raises:
            TypeError, ValueError: lengths that are no whole numbers of at least 1, or more slots
                than there are rates of.
        """
        _require_lengths([draft_length], len(self.rates))
        if tokens is None:
            return float(1 + self.survival[:draft_length].sum())
        require_int("tokens", tokens, 1)
        return float(tokens / _rounds_needed(self.survival[:draft_length], tokens)[tokens])

    def table(self) -> pd.DataFrame:
        """``slot``, ``rate`` and ``survival``, each of these with ``_low`` and ``_high``."""
        found: dict[str, Any] = {"slot": np.arange(len(self.rates))}
        for name, value, sample in (
            ("rate", self.rates, self.samples),
            ("survival", self.survival, _chain(self.samples)),
        ):
            low, high = self._interval(sample)
            found |= {name: value, f"{name}_low": low, f"{name}_high": high}
        return pd.DataFrame(found)

    def _interval(self, samples: np.ndarray) -> np.ndarray:
        if len(samples) == 0:
            return np.full((2, *samples.shape[1:]), np.nan)
        return interval(samples, self.conversations)


def acceptance_profile(
    trace: pd.DataFrame,
    *,
    drafter: str | None = None,
    temperature: float | None = None,
    resamples: int = 1000,
    seed: int = 0,
) -> AcceptanceProfile:
    """The rates of a trace, of one drafter at one temperature.

    A rate is the mean of the analytic c* = sum_v min(p, q) over the slots that were reached: what
    the share of accepted ones converges to, with less noise. At temperature 0 the two are the same.

    Args:
        trace: of whole blocks, as of :func:`dspark_lab.decoding.trace.read_trace`; with a column ``drafter``
            or ``temperature`` where it holds several of them.
        drafter, temperature: which rows to take; for a trace without the column, a label.
        resamples, seed: of the bootstrap over conversations.

    Raises:
        TypeError, ValueError: as :func:`dspark_lab.decoding.trace.read_trace`; a trace of several drafters
            or temperatures of which none is chosen, or without the chosen one; a trace in which no
            slot was verified, or that a threshold or scheduler cut short: the slots that it let
            through are better than those of whole blocks.
    """
    trace, drafter, temperature = _selected(trace, drafter, temperature)
    rounds, row = read_trace(trace)
    _require_whole(rounds, row >= 0)
    sums = trace_sums(trace)
    sums = sums[sums["kind"] == "on policy"]
    passed, reached = (
        sums.pivot(index="conversation", columns="slot", values=name).to_numpy(float)
        for name in ("passed", "reached")
    )
    count = len(reached)
    drawn = resampled(count, resamples, seed)
    return AcceptanceProfile(
        rates=_ratio(passed.sum(axis=0), reached.sum(axis=0)),
        samples=_ratio(drawn @ passed, drawn @ reached),
        conversations=count,
        temperature=temperature,
        drafter=drafter,
    )


@dataclass(frozen=True)
class RoundCosts:
    """What a round costs, in seconds, and a plain step of the same target beside it.

    ``plain_seconds``: of a step without a drafter, one token. ``draft_seconds`` ``[K]``: of
    drafting 1, 2, ..., K tokens. ``verify_seconds`` ``[K + 1]``: of a target pass over 1, 2, ...,
    K + 1 tokens, the anchor and the drafted ones. ``replay_seconds`` ``[K]``: of reading 1, 2, ...,
    K tokens again after a rejection, the anchor and the accepted ones; empty where the cache can be
    cut. ``rollback_seconds``: more after every rejection, for cutting the cache.
    ``overhead_seconds``: more in every round. ``source`` says where the numbers come from.

    Raises:
        TypeError, ValueError: numbers that are none, negative or not finite, a plain step or a
            verification that takes no time, or lengths that do not fit.
    """

    plain_seconds: float
    draft_seconds: tuple[float, ...]
    verify_seconds: tuple[float, ...]
    replay_seconds: tuple[float, ...] = ()
    rollback_seconds: float = 0.0
    overhead_seconds: float = 0.0
    source: str = "given"

    def __post_init__(self) -> None:
        for name in ("draft_seconds", "verify_seconds", "replay_seconds"):
            object.__setattr__(self, name, tuple(map(float, getattr(self, name))))
        _require_seconds("plain_seconds", self.plain_seconds, positive=True)
        for name in ("rollback_seconds", "overhead_seconds"):
            _require_seconds(name, getattr(self, name))
        for name in ("draft_seconds", "verify_seconds", "replay_seconds"):
            for value in getattr(self, name):
                _require_seconds(f"each of {name}", value, positive=name == "verify_seconds")
        longest = len(self.draft_seconds)
        if longest == 0 or len(self.verify_seconds) != longest + 1:
            raise ValueError(
                "draft_seconds must be of 1 or more lengths, and verify_seconds of one more, "
                f"got {longest} and {len(self.verify_seconds)}"
            )
        if len(self.replay_seconds) not in (0, longest):
            raise ValueError(
                f"replay_seconds must be of no length or of {longest}, "
                f"got {len(self.replay_seconds)}"
            )

    @classmethod
    def of(
        cls,
        longest: int,
        *,
        plain_seconds: float,
        draft_seconds: Seconds,
        verify_seconds: Seconds,
        replay: bool = False,
        rollback_seconds: float = 0.0,
        overhead_seconds: float = 0.0,
        source: str = "given",
    ) -> RoundCosts:
        """For blocks of up to ``longest`` tokens, each cost a number, a list or a function.

        Args:
            draft_seconds: of drafting so many tokens.
            verify_seconds: of a target pass over so many tokens, the anchor among them.
            replay: whether a rejection is followed by reading again what was accepted, at the price
                of verifying as many tokens.

        Raises:
            TypeError, ValueError: as :class:`RoundCosts`.
        """
        require_int("longest", longest, 1)
        costs = cls(
            plain_seconds=plain_seconds,
            draft_seconds=_each(draft_seconds, longest),
            verify_seconds=_each(verify_seconds, longest + 1),
            rollback_seconds=rollback_seconds,
            overhead_seconds=overhead_seconds,
            source=source,
        )
        return costs.replaying() if replay else costs

    @classmethod
    def from_steps(
        cls,
        steps_per_second: Callable[[int], float],
        longest: int,
        *,
        draft_seconds: Seconds,
        requests: int = 1,
        **options: Any,
    ) -> RoundCosts:
        """From the target's steps per second at so many tokens a step.

        Args:
            steps_per_second: of a step that reads so many tokens of all requests together, such as
                ``dspark_lab.serving.schedule.StepsPerSecond``.
            longest: of the blocks.
            draft_seconds: as in :meth:`of`, for all requests together.
            requests: that take their rounds together, each with a block of its own. More of them
                make each token of a block dearer.
            options: ``replay``, ``rollback_seconds``, ``overhead_seconds``, as in :meth:`of`.

        Raises:
            TypeError, ValueError: as :meth:`of`, or steps per second that are not positive.
        """
        require_int("requests", requests, 1)
        require_int("longest", longest, 1)
        speeds = [float(steps_per_second(requests * n)) for n in range(1, longest + 2)]
        if not all(np.isfinite(speed) and speed > 0 for speed in speeds):
            raise ValueError(f"steps_per_second must give positive numbers, got {speeds}")
        verify = [1 / speed for speed in speeds]
        return cls.of(
            longest,
            plain_seconds=verify[0],
            draft_seconds=draft_seconds,
            verify_seconds=verify,
            **{"source": f"steps per second, {requests} requests", **options},
        )

    @property
    def longest(self) -> int:
        """The most tokens of a block that the costs are known of."""
        return len(self.draft_seconds)

    def replaying(self) -> RoundCosts:
        """The same for a target that has to read again: at the price of verifying as many."""
        return replace(self, replay_seconds=self.verify_seconds[:-1])

    def cutting(self) -> RoundCosts:
        """The same for a target whose cache is cut in no time: no replay and no rollback."""
        return replace(self, replay_seconds=(), rollback_seconds=0.0)


def measure_costs(
    target: Target,
    drafter: Drafter,
    *,
    context_length: int = 128,
    draft_lengths: Sequence[int] | None = None,
    temperature: float = 0.0,
    replay: bool = False,
    repeats: int = 20,
    warm_up: int = 3,
    seed: int = 0,
) -> RoundCosts:
    """The costs of this lab's decoding on the devices of these models, for one request.

    Plain decoding and decoding at each length are timed in turns, see :func:`timed_rounds`.
    ``verify_seconds`` hold the target's distributions as well, and ``overhead_seconds`` all the
    rest of a round, the drafter's reading of what was accepted and the cutting of both caches among
    it.

    Args:
        context_length: tokens of a random prompt; rounds add to it.
        draft_lengths: to measure, by default all up to the drafter's block; the costs of those in
            between are interpolated.
        temperature: of decoding; drawing costs more than taking the likeliest.
        replay: measure what it takes to read again, without a distribution, as a target would have
            to whose cache cannot be cut.
        repeats, warm_up: rounds that count, and rounds before these that do not.

    Raises:
        TypeError, ValueError: as :func:`dspark_lab.decoding.loop.decode_rounds`, or settings out of range.
    """
    lengths = _require_lengths(draft_lengths, drafter.config.block_size)
    longest = max(lengths)
    prompt = random_prompt(target, context_length, seed)
    tokens, slots = range(1, longest + 2), range(1, longest + 1)
    again: list[list[float]] = []
    cache = _context(target, prompt.tolist())

    def read_again() -> None:
        first = prompt.tolist()[:1]
        again.append([_read_again(target, cache, first * n, 0) for n in slots])

    spent = timed_rounds(
        target,
        drafter,
        [(1, k) for k in (0, *lengths)],
        prompt,
        temperature=temperature,
        repeats=repeats,
        warm_up=warm_up,
        seed=seed,
        in_turn=read_again if replay else None,
    )
    known = sorted(lengths)
    verify = [spent[1, k]["verify"] for k in (0, *known)]
    draft = [spent[1, k]["draft"] for k in known]
    place = f"{target.device.type}, {str(target.dtype)[6:]}"
    return RoundCosts(
        plain_seconds=sum(spent[1, 0].values()),
        draft_seconds=tuple(np.interp(slots, known, draft)),
        verify_seconds=tuple(np.interp(tokens, [1, *(k + 1 for k in known)], verify)),
        replay_seconds=tuple(np.median(again[warm_up:], axis=0)) if replay else (),
        overhead_seconds=float(np.median([spent[1, k]["rest"] for k in known])),
        source=f"measured: {place}, context {context_length}, temperature {temperature:g}",
    )


def random_prompt(target: Target, context_length: int, seed: int) -> Int[Tensor, " context"]:
    """Tokens drawn from the whole vocabulary, to time decoding behind.

    Raises:
        TypeError, ValueError: a length below 1, or a seed below 0.
    """
    require_int("context_length", context_length, 1)
    require_int("seed", seed, 0)
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(target.vocab_size, (context_length,), generator=generator)


def timed_rounds(
    target: Target,
    drafter: Drafter,
    kinds: Sequence[tuple[int, int]],
    prompt: Int[Tensor, " context"],
    *,
    temperature: float,
    repeats: int,
    warm_up: int,
    seed: int,
    in_turn: Callable[[], None] | None = None,
) -> dict[tuple[int, int], dict[str, float]]:
    """Seconds of the parts of a round, "draft", "verify" and "rest", for each kind of decoding.

    The kinds go on in turns, so that a machine's moods fall on all of them alike, a few rounds at a
    stretch, so that each finds its weights in the processor's caches as it would alone. No round is
    the last one of an answer.

    Args:
        kinds: how many requests decode together, all the same prompt, and how many tokens are
            drafted; 0 is plain decoding.
        repeats, warm_up: rounds whose median counts, and rounds before these that do not.
        in_turn: called once for each round of a kind, when all kinds have had theirs.

    Raises:
        TypeError, ValueError: as :func:`dspark_lab.decoding.loop.decode_rounds`, or numbers out of range.
    """
    require_int("repeats", repeats, 1)
    require_int("warm_up", warm_up, 0)
    rounds = warm_up + repeats
    runs = {
        (count, k): decode_rounds(
            target,
            drafter if k else None,
            [prompt] * count,
            draft_length=k or None,
            max_new_tokens=1 + rounds * (k + 1),
            temperature=temperature,
            end_ids=(),
            seed=seed,
        )
        for count, k in kinds
    }
    # Every entry is a sum since the beginning.
    sums: dict[tuple[int, int], list[list[float]]] = {
        kind: [[0.0] * len(_ROUND_PARTS)] for kind in runs
    }
    for begin in range(0, rounds, _AT_A_STRETCH):
        stretch = range(min(_AT_A_STRETCH, rounds - begin))
        for (count, k), run in runs.items():
            for _ in stretch:
                for _ in range(count):
                    next(run)
                sums[count, k].append([run.seconds[part] for part in _ROUND_PARTS])
        if in_turn:
            for _ in stretch:
                in_turn()
    return {
        kind: dict(
            zip(_ROUND_PARTS, np.median(np.diff(each, axis=0)[warm_up:], axis=0), strict=True)
        )
        for kind, each in sums.items()
    }


def speedup_table(
    profile: AcceptanceProfile, costs: RoundCosts, draft_lengths: Sequence[int] | None = None
) -> pd.DataFrame:
    """What drafting so many tokens a round would bring.

    Args:
        profile: of the temperature that the drafter will serve at.
        draft_lengths: by default all that have both a rate and a cost.

    Returns:
        a row for each ``draft_length``: ``tau``, tokens per round; the expected seconds of a round
        and of its parts, ``draft_seconds``, ``verify_seconds``, ``replay_seconds``,
        ``rollback_seconds``, ``overhead_seconds`` and ``round_seconds``; ``tokens_per_second``;
        ``speedup`` over plain decoding; the same as a model would have it that forgets
        (``without_replay``) replay and rollback, or (``without_overhead``) the fixed overhead as
        well; ``break_even_rate``, see :func:`break_even`, and ``break_even_without_replay``; and
        ``best_share``, in what part of the profile's resamples the length is the fastest. ``tau``
        and ``speedup`` have 95 % bootstrap intervals ``_low`` to ``_high``. They and the share are
        NaN for a profile without resamples, and take the costs as given.

    Raises:
        TypeError, ValueError: lengths without a rate or a cost.
    """
    lengths = _require_lengths(draft_lengths, min(len(profile.rates), costs.longest))
    rows, speeds = [], []
    for k in lengths:
        figures = _figures(costs, _fixed(profile.rates[:k]))
        sample = _figures(costs, _fixed(profile.samples[:, :k]))
        row = {"draft_length": k, **{name: float(value) for name, value in figures.items()}}
        for name in ("tau", "speedup"):
            row[f"{name}_low"], row[f"{name}_high"] = profile._interval(sample[name])
        row["break_even_rate"] = break_even(costs, k)
        row["break_even_without_replay"] = break_even(costs.cutting(), k)
        rows.append(row)
        speeds.append(np.nan_to_num(sample["speedup"], nan=-np.inf))
    fastest = np.argmax(speeds, axis=0)
    share = [float(np.mean(fastest == i)) if len(fastest) else np.nan for i in range(len(rows))]
    return pd.DataFrame(rows).assign(best_share=share)


def best_length(
    profile: AcceptanceProfile, costs: RoundCosts, draft_lengths: Sequence[int] | None = None
) -> int:
    """How many tokens to draft a round for the most speed; 0 where plain decoding is as fast.

    Raises:
        TypeError, ValueError: as :func:`speedup_table`.
    """
    best = _best(speedup_table(profile, costs, draft_lengths))
    return int(best["draft_length"]) if best["speedup"] > 1 else 0


def threshold_table(
    trace: pd.DataFrame | Rounds,
    costs: RoundCosts,
    *,
    thresholds: Iterable[float] = _THRESHOLDS,
    draft_lengths: Sequence[int] | None = None,
    calibrated: SequentialTemperatures | None = None,
    drafter: str | None = None,
    temperature: float | None = None,
    resamples: int = 200,
    seed: int = 0,
) -> pd.DataFrame:
    """What a static threshold on each slot's confidence would bring, replayed on a trace.

    All of a block is drafted, and paid for; verification stops before the first slot whose
    confidence lies below the threshold. At threshold 0 a row is that of :func:`speedup_table`.

    Args:
        trace: of whole blocks, of one drafter that has a confidence head, at one temperature.
        thresholds: in [0, 1].
        draft_lengths: by default the longest that has both a slot and a cost.
        calibrated: scales the confidences first.
        drafter, temperature: as in :func:`acceptance_profile`; not for rounds.
        resamples, seed: of the bootstrap over conversations.

    Returns:
        a row for each draft length and threshold: ``draft_length``, ``threshold``, ``verified``
        slots per round, and the columns of :func:`speedup_table` from ``tau`` to
        ``without_overhead``, with the two intervals.

    Raises:
        TypeError, ValueError: as :func:`acceptance_profile` and
            :func:`dspark_lab.decoding.trace.rounds_of`, or thresholds outside [0, 1].
    """
    counts = _Counts.of(trace, thresholds, calibrated, drafter, temperature)
    longest = min(counts.slots, costs.longest)
    lengths = [longest] if draft_lengths is None else _require_lengths(draft_lengths, longest)
    drawn = resampled(counts.conversations, resamples, seed)
    each = np.arange(len(counts.cuts))
    tables = [counts.table(costs, k, each, drawn) for k in lengths]
    return pd.concat(tables, ignore_index=True)


def best_threshold(
    trace: pd.DataFrame | Rounds,
    costs: RoundCosts,
    *,
    test: pd.DataFrame | Rounds | None = None,
    thresholds: Iterable[float] = _FINE_THRESHOLDS,
    draft_lengths: Sequence[int] | None = None,
    calibrated: SequentialTemperatures | None = None,
    drafter: str | None = None,
    temperature: float | None = None,
    resamples: int = 1000,
    seed: int = 0,
) -> pd.Series:
    """The fastest pair of draft length and static threshold.

    The fastest of many is faster on the trace that it was chosen on than elsewhere, by more the
    smaller the trace; with ``test``, a trace of other conversations, the figures are of that one.

    Args:
        trace, calibrated, drafter, temperature, resamples, seed: as in :func:`threshold_table`.
        test: to report on, the trace itself where None.
        thresholds: to choose from, the lowest of those that are equally fast.
        draft_lengths: to choose from, by default all.

    Returns:
        a row of :func:`threshold_table`.

    Raises:
        TypeError, ValueError: as :func:`threshold_table`.
    """
    counts = _Counts.of(trace, thresholds, calibrated, drafter, temperature)
    lengths = _require_lengths(draft_lengths, min(counts.slots, costs.longest))
    whole = np.ones((1, counts.conversations), dtype=np.int64)
    speeds = np.array([_figures(costs, counts.outcomes(k, whole))["speedup"][0] for k in lengths])
    if np.isnan(speeds).all():
        raise ValueError("trace must reach the slots of one draft length at least, got none")
    length, cut = np.unravel_index(np.nanargmax(speeds), speeds.shape)
    if test is not None:
        counts = _Counts.of(test, counts.cuts, calibrated, drafter, temperature)
    drawn = resampled(counts.conversations, resamples, seed)
    return counts.table(costs, lengths[length], np.array([cut]), drawn).iloc[0]


def break_even(costs: RoundCosts, draft_length: int) -> float:
    """The accept rate, the same at every slot, from which on drafting pays.

    At this rate a round is exactly as fast as plain steps; at any higher one, faster. inf where
    even rate 1 is slower, 0 where every rate pays. Without a cost after rejections the round's
    seconds do not depend on the rate, and this is :func:`dspark_lab.serving.speed.break_even_rate`. With
    one, the balance of a round is a polynomial in the rate, and this is its last root.

    Raises:
        TypeError, ValueError: a length without a cost.
    """
    _require_lengths([draft_length], costs.longest)
    k = draft_length
    fixed = costs.draft_seconds[k - 1] + costs.verify_seconds[k] + costs.overhead_seconds
    after = np.full(k, costs.rollback_seconds) + (costs.replay_seconds[:k] or 0.0)
    if not after.any():
        return break_even_rate(fixed / costs.plain_seconds, k)
    # plain * (1 + r + ... + r^K) - fixed - sum_a (r^a - r^(a + 1)) * after_a
    balance = np.full(k + 1, costs.plain_seconds, dtype=np.float64)
    balance[0] -= fixed
    balance[:k] -= after
    balance[1:] += after
    at = np.polynomial.Polynomial(balance)
    if at(1.0) < 0:
        return float("inf")
    roots = at.roots()
    real = roots.real[np.abs(roots.imag) < 1e-9]
    edges = [0.0, *sorted(real[(real > 0) & (real < 1)]), 1.0]
    from_here = 1.0
    for low, high in zip(edges[-2::-1], edges[:0:-1], strict=True):
        if at((low + high) / 2) < 0:
            break
        from_here = low
    return float(from_here)


def temperature_table(
    trace: pd.DataFrame | Sequence[AcceptanceProfile],
    costs: RoundCosts | Mapping[float, RoundCosts],
    *,
    drafter: str | None = None,
    draft_length: int | None = None,
    resamples: int = 1000,
    seed: int = 0,
) -> pd.DataFrame:
    """The same drafter and the same costs at each temperature of a trace.

    Args:
        trace: of one drafter, or with ``drafter`` chosen, with a column ``temperature``; or a
            profile of each temperature, for which the last three arguments say nothing.
        costs: of all temperatures, or of each.
        draft_length: the one to follow; by default the fastest at the lowest temperature, as for
            someone who chose it there.
        resamples, seed: of the bootstrap over conversations.

    Returns:
        a row for each ``temperature``, lowest first: ``draft_length``; ``accept_rate``, the rate
        that would give the same tau if it were the same at every slot, beside ``break_even_rate``
        and ``break_even_without_replay``; ``tau``, ``speedup`` with their intervals,
        ``without_replay`` and ``without_overhead`` as in :func:`speedup_table`; ``best_length`` of
        this temperature (0: do not draft) and its ``best_speedup`` (1 where that is 0).

    Raises:
        TypeError, ValueError: as :func:`acceptance_profile`; no costs of a temperature.
    """
    if isinstance(trace, pd.DataFrame):
        profiles = [
            acceptance_profile(
                trace, drafter=drafter, temperature=value, resamples=resamples, seed=seed
            )
            for value in column(trace, "temperature", complete=True).unique().tolist()
        ]
    else:
        profiles = list(trace)
    by_temperature = {profile.temperature: profile for profile in profiles}
    if not profiles or None in by_temperature or len(by_temperature) < len(profiles):
        raise ValueError(
            "profiles must be one or more, each of another known temperature, got "
            f"{[profile.temperature for profile in profiles]}"
        )
    values = sorted(value for value in by_temperature if value is not None)
    if isinstance(costs, RoundCosts):
        costs = dict.fromkeys(values, costs)
    missing = [value for value in values if value not in costs]
    if missing:
        raise ValueError(f"costs must be of every temperature, got none of {missing}")
    rows = []
    for value in values:
        profile = by_temperature[value]
        table = speedup_table(profile, costs[value])
        best = _best(table)
        pays = bool(best["speedup"] > 1)
        if draft_length is None:
            draft_length = int(best["draft_length"])
        _require_lengths([draft_length], len(table))
        row = table.iloc[draft_length - 1]
        rows.append(
            {
                "temperature": value,
                "draft_length": draft_length,
                "accept_rate": break_even_rate(row["tau"], draft_length),
                **row[["break_even_rate", "break_even_without_replay"]],
                **row[["tau", "tau_low", "tau_high"]],
                **row[["speedup", "speedup_low", "speedup_high"]],
                **row[["without_replay", "without_overhead"]],
                "best_length": int(best["draft_length"]) if pays else 0,
                "best_speedup": best["speedup"] if pays else 1.0,
            }
        )
    return pd.DataFrame(rows)


def advice(
    profile: AcceptanceProfile, costs: RoundCosts, draft_lengths: Sequence[int] | None = None
) -> str:
    """How many tokens to draft and why, in one sentence; it says so where nothing pays.

    Raises:
        TypeError, ValueError: as :func:`speedup_table`.
    """
    table = speedup_table(profile, costs, draft_lengths)
    best = _best(table)
    length, speed = int(best["draft_length"]), best["speedup"]
    where = "" if profile.temperature is None else f" at temperature {profile.temperature:g}"
    spread = ""
    if not np.isnan(best["speedup_low"]):
        spread = f" ({best['speedup_low']:.2f} to {best['speedup_high']:.2f})"
    rate, need = break_even_rate(best["tau"], length), best["break_even_rate"]
    forgot = best["without_replay"]
    if speed <= 1:
        needed = "no accept rate would pay" if np.isinf(need) else f"it pays from {need:.2f} on"
        reason = (
            f"even the best length, {length}, gives {speed:.2f}{spread} times the speed of plain "
            f"decoding{where}: slots are accepted at a rate of {rate:.2f}, and {needed}"
        )
        if forgot > 1:
            reason += f"; only a model that forgets the cost of rejections would say {forgot:.2f}"
        return f"Do not draft: {reason}."
    reason = (
        f"{speed:.2f}{spread} times the speed of plain decoding{where}, with {best['tau']:.2f} "
        f"tokens a round: slots are accepted at a rate of {rate:.2f}, and it pays from "
        f"{need:.2f} on"
    )
    others = table[table["draft_length"] != length].dropna(subset=["speedup"])
    if len(others):
        next_ = _best(others)
        reason += f"; {int(next_['draft_length'])} comes next with {next_['speedup']:.2f}"
        if not np.isnan(best["best_share"]):
            reason += f", and {length} is the fastest in {best['best_share']:.0%} of resamples"
    return f"Draft {length} a round: {reason}."


def decode_check(
    target: Target,
    drafter: Drafter,
    prompts: Sequence[Prompt],
    trace: pd.DataFrame,
    *,
    draft_lengths: Sequence[int] | None = None,
    temperatures: Sequence[float] = (0.0, 1.0),
    max_new_tokens: int = 64,
    replay: bool = False,
    costs: Mapping[float, RoundCosts] | None = None,
    repeats: int = 20,
    resamples: int = 1000,
    seed: int = 0,
) -> pd.DataFrame:
    """What was predicted from a trace and from costs, beside what decoding really does.

    Prompts are decoded one at a time, plainly and at each length in turns. Predicted for answers as
    long as those that came out, and their last, shorter rounds counted with the rest. The seconds
    of this process are compared with each other alone; on a busy machine their errors are its.

    Args:
        prompts: to decode; where the trace is of others, the two differ in what they say as well.
        trace: of this drafter alone, with a column ``temperature`` that holds all of
            ``temperatures``.
        draft_lengths: by default all that the trace has.
        replay: after each rejection have the target read again what was accepted, in a cache beside
            its own, as if the latter could not be cut.
        costs: of each temperature, measured first where None.
        repeats: of that measurement.

    Returns:
        a row for each ``temperature`` and ``draft_length``: ``rounds`` that were decoded; ``tau``
        predicted with its bootstrap interval ``tau_low`` to ``tau_high``, ``tau_decoded``, and
        ``tau_error``, the predicted over the decoded less 1; the same for ``speedup``; and
        ``without_replay`` and ``without_overhead``, the predictions of models that forget them.

    Raises:
        TypeError, ValueError: as :func:`acceptance_profile`, :func:`measure_costs` and
            :func:`dspark_lab.decoding.loop.decode`.
    """
    ids = [encode_prompt(target, prompt) for prompt in prompts]
    rows = []
    for temperature in temperatures:
        profile = acceptance_profile(trace, temperature=temperature, resamples=resamples, seed=seed)
        lengths = _require_lengths(draft_lengths, len(profile.rates))
        if costs is None:
            # Half an answer behind a prompt of middling length.
            context = int(np.median([len(tokens) for tokens in ids])) + max_new_tokens // 2
            here = measure_costs(
                target,
                drafter,
                context_length=context,
                draft_lengths=lengths,
                temperature=temperature,
                replay=replay,
                repeats=repeats,
            )
        else:
            here = costs[temperature]
        runs: dict[int, list[Decoded]] = {k: [] for k in (0, *lengths)}
        for number, prompt in enumerate(ids):
            for k, done in runs.items():
                options: dict[str, Any] = {
                    "temperature": temperature,
                    "max_new_tokens": max_new_tokens,
                    "seed": seed + number,
                }
                if k:
                    options["draft_length"] = k
                done.append(_decoded(target, drafter if k else None, prompt, replay, options))
        for k in lengths:
            real = speed_table(runs[0], runs[k], k)
            figures = speedup_table(profile, here, [k]).iloc[0]
            answers = np.array([len(one.tokens[0]) - 1 for one in runs[k]])
            tau = float(_tau_of_answers(profile.survival[:k], answers))
            low, high = profile._interval(_tau_of_answers(_chain(profile.samples[:, :k]), answers))
            row = {"temperature": temperature, "draft_length": k}
            row["rounds"] = sum(len(one.rounds) for one in runs[k])
            row |= {"tau": tau, "tau_low": low, "tau_high": high}
            row |= {"tau_decoded": real["tau"], "tau_error": tau / real["tau"] - 1}
            # The last rounds yield less and cost as much.
            for name in ("speedup", "speedup_low", "speedup_high", "without_replay"):
                row[name] = figures[name] * tau / figures["tau"]
            row["without_overhead"] = figures["without_overhead"] * tau / figures["tau"]
            row["speedup_decoded"] = real["gain"]
            row["speedup_error"] = row["speedup"] / real["gain"] - 1
            rows.append(row)
    return pd.DataFrame(rows)


@dataclass(frozen=True, eq=False)
class _Outcomes:
    """Of a round's slots, ``[..., slot]``: how often each is verified, accepted, rejected."""

    verified: np.ndarray
    accepted: np.ndarray
    rejected: np.ndarray


def _fixed(rates: Float[np.ndarray, "*axes slot"]) -> _Outcomes:
    """Where every slot is verified."""
    accepted = _chain(rates)
    return _Outcomes(np.ones_like(accepted), accepted, _before(accepted) - accepted)


def _figures(costs: RoundCosts, outcomes: _Outcomes) -> dict[str, Any]:
    """Tokens, seconds and speed of a round, ``[...]`` each, numbers for one profile."""
    k = outcomes.accepted.shape[-1]
    verify = np.array(costs.verify_seconds[: k + 1])
    replay = np.array(costs.replay_seconds[:k] or [0.0] * k)
    tau = 1 + outcomes.accepted.sum(axis=-1)
    parts = {
        "draft_seconds": np.full_like(tau, costs.draft_seconds[k - 1]),
        "verify_seconds": verify[0] + outcomes.verified @ np.diff(verify),
        "replay_seconds": outcomes.rejected @ replay,
        "rollback_seconds": costs.rollback_seconds * outcomes.rejected.sum(axis=-1),
        "overhead_seconds": np.full_like(tau, costs.overhead_seconds),
    }
    total = sum(parts.values())
    after = parts["replay_seconds"] + parts["rollback_seconds"]
    plain = tau * costs.plain_seconds
    return {
        "tau": tau,
        **parts,
        "round_seconds": total,
        "tokens_per_second": tau / total,
        "speedup": plain / total,
        "without_replay": plain / (total - after),
        "without_overhead": plain / (total - after - costs.overhead_seconds),
    }


@dataclass(frozen=True, eq=False)
class _Counts:
    """Of each conversation, what a threshold leaves at each slot, ``[conversation, cut, slot]``.

    ``drafted``: rounds that have the slot and passed the one before; ``passed`` of these, with the
    slot above the threshold. ``open``: rounds that reached the slot and passed the one before;
    ``reached`` of these, with the slot above it; ``accepted``, the sum of c* of these. What ends a
    round's count is so told from what ends the round (the answer's end), as with lifetimes.
    """

    cuts: Float[np.ndarray, " cut"]
    drafted: np.ndarray
    passed: np.ndarray
    open: np.ndarray
    reached: np.ndarray
    accepted: np.ndarray

    @classmethod
    def of(
        cls,
        trace: pd.DataFrame | Rounds,
        thresholds: Iterable[float],
        calibrated: SequentialTemperatures | None,
        drafter: str | None,
        temperature: float | None,
    ) -> _Counts:
        if not isinstance(trace, Rounds):
            trace, _, _ = _selected(trace, drafter, temperature)
        rounds = rounds_of(trace)
        cuts = as_probabilities("thresholds", list(thresholds))
        confidence = rounds.confidence
        if calibrated is not None:
            confidence = calibrated.apply(confidence)
        exists, reached = ~np.isnan(confidence), rounds.reached
        _require_whole(rounds, exists)
        level = np.minimum.accumulate(np.where(exists, confidence, -1), axis=1)
        before = np.concatenate([np.ones((len(rounds), 1)), level[:, :-1]], axis=1)
        worth = np.where(reached, rounds.accept_rate, 0)
        # Rounds are ordered by their prompts.
        first = np.unique(rounds.conversation, return_index=True)[1]

        def count(level: np.ndarray, weight: np.ndarray) -> np.ndarray:
            each = [np.add.reduceat((level >= cut) * weight, first, axis=0) for cut in cuts]
            return np.stack(each, axis=1).astype(np.float64)

        return cls(
            cuts=cuts,
            drafted=count(before, exists),
            passed=count(level, exists),
            open=count(before, reached),
            reached=count(level, reached),
            accepted=count(level, worth),
        )

    @property
    def conversations(self) -> int:
        return len(self.drafted)

    @property
    def slots(self) -> int:
        return self.drafted.shape[2]

    def outcomes(
        self,
        draft_length: int,
        drawn: Int[np.ndarray, "resample conversation"],
        chosen: Int[np.ndarray, " cut"] | slice = slice(None),
    ) -> _Outcomes:
        """What happens to the slots, ``[resample, cut, slot]``."""

        def total(counts: np.ndarray) -> np.ndarray:
            return np.tensordot(drawn, counts[:, chosen, :draft_length], axes=1)

        opened, taken = total(self.open), total(self.accepted)
        accepted = _chain(_ratio(taken, opened))
        before = _before(accepted)
        refused = _ratio(total(self.reached) - taken, opened)
        return _Outcomes(
            verified=_chain(_ratio(total(self.passed), total(self.drafted))),
            accepted=accepted,
            rejected=np.where(before == 0, 0, before * refused),
        )

    def table(
        self,
        costs: RoundCosts,
        draft_length: int,
        chosen: Int[np.ndarray, " cut"],
        drawn: Int[np.ndarray, "resample conversation"],
    ) -> pd.DataFrame:
        whole = np.ones((1, self.conversations), dtype=np.int64)
        found = self.outcomes(draft_length, whole, chosen)
        sample = _figures(costs, self.outcomes(draft_length, drawn, chosen))
        table: dict[str, Any] = {
            "draft_length": np.full(len(chosen), draft_length),
            "threshold": self.cuts[chosen],
            "verified": found.verified.sum(axis=-1)[0],
        }
        table |= {name: value[0] for name, value in _figures(costs, found).items()}
        for name in ("tau", "speedup"):
            bounds = interval(sample[name], self.conversations)
            table[f"{name}_low"], table[f"{name}_high"] = bounds
        return pd.DataFrame(table)


def _selected(
    trace: pd.DataFrame, drafter: str | None, temperature: float | None
) -> tuple[pd.DataFrame, str | None, float | None]:
    """The rows of one drafter at one temperature, and which these are."""
    if not isinstance(trace, pd.DataFrame):
        raise TypeError(f"trace must be a pandas DataFrame, got {type(trace).__name__}")
    if temperature is not None:
        require_number("temperature", temperature)
    labels: list[Any] = []
    for name, wanted in (("drafter", drafter), ("temperature", temperature)):
        if name in trace.columns:
            held = column(trace, name, complete=True).unique().tolist()
            if wanted is None and len(held) > 1:
                raise ValueError(
                    f"trace must be of one {name}, or {name} must say which, got {sorted(held)}"
                )
            if wanted is not None and wanted not in held:
                raise ValueError(f"{name} must be one of the trace's {sorted(held)}, got {wanted}")
            if len(held) > 1:
                trace = trace[trace[name] == wanted]
            wanted = held[0] if wanted is None and held else wanted
        labels.append(wanted)
    return trace, *labels


def _require_whole(rounds: Rounds, drafted: Bool[np.ndarray, "round slot"]) -> None:
    """Refuse a trace that something but the end of an answer cut.

    An answer's end leaves a slot that was drafted unverified only behind an accepted one.
    """
    verified = rounds.verified
    if not verified[:, 0].any():
        raise ValueError("trace must have a verified slot, got none")
    after = np.concatenate([np.zeros((len(rounds), 1), bool), rounds.accepted[:, :-1]], axis=1)
    seen = np.concatenate([np.ones((len(rounds), 1), bool), verified[:, :-1]], axis=1)
    cut = drafted & ~verified & seen & ~after
    if cut.any():
        number, slot = np.argwhere(cut)[0]
        raise ValueError(
            "trace must be of whole blocks, without a threshold or scheduler, got one in which "
            f"slot {slot} of a round of prompt {rounds.prompt[number]} was drafted but not verified"
        )


def _chain(rates: Float[np.ndarray, "*axes slot"]) -> Float[np.ndarray, "*axes slot"]:
    """The product of the rates up to each slot: 0 behind a 0, though nothing was seen there."""
    never = np.logical_or.accumulate(_before(rates) == 0, axis=-1)
    return np.where(never, 0, rates).cumprod(axis=-1)


def _before(survival: Float[np.ndarray, "*axes slot"]) -> Float[np.ndarray, "*axes slot"]:
    """The value of the slot before; 1 for the first."""
    return np.concatenate([np.ones_like(survival[..., :1]), survival[..., :-1]], axis=-1)


def _ratio(
    part: Float[np.ndarray, "*axes"], whole: Float[np.ndarray, "*axes"]
) -> Float[np.ndarray, "*axes"]:
    """NaN where there is nothing to divide by."""
    return part / np.where(whole == 0, np.nan, whole)


def _rounds_needed(
    survival: Float[np.ndarray, "*axes slot"], tokens: int
) -> Float[np.ndarray, "tokens *axes"]:
    """Rounds that 0, 1, ..., ``tokens`` more tokens take on average, when the last one is cut."""
    ends = -np.diff(np.concatenate([survival, np.zeros_like(survival[..., :1])], axis=-1))
    # ends[k]: exactly k + 2 tokens; one token is what is left.
    yields = np.concatenate([1 - survival[..., :1], ends], axis=-1)
    rounds = [np.zeros(survival.shape[:-1])]
    for left in range(1, tokens + 1):
        after = sum(
            (
                yields[..., n - 1] * rounds[left - n]
                for n in range(1, min(left, yields.shape[-1]) + 1)
            ),
            start=np.zeros(survival.shape[:-1]),
        )
        rounds.append(1 + after)
    return np.stack(rounds)


def _tau_of_answers(
    survival: Float[np.ndarray, "*axes slot"], answers: Int[np.ndarray, " answer"]
) -> Any:
    """Tokens over rounds of answers of so many tokens, the first ones left out."""
    rounds = _rounds_needed(survival, int(answers.max()))
    return answers.sum() / rounds[answers].sum(axis=0)


def _best(table: pd.DataFrame) -> pd.Series:
    """The fastest row, the first of several."""
    return table.loc[table["speedup"].idxmax()]


def _context(target: Target, tokens: Sequence[int]) -> TargetCache:
    """A cache of one row that holds these tokens."""
    cache = target.start_cache(1)
    _read_again(target, cache, tokens, len(tokens))
    return cache


def _read_again(target: Target, cache: TargetCache, tokens: Sequence[int], kept: int) -> float:
    """Seconds that the target takes to read the tokens; its cache keeps the first ``kept``."""
    with torch.inference_mode():
        rows = torch.tensor([list(tokens)], device=target.device)
        begin = now(target.device)
        target.advance(rows, cache, [])
        spent = now(target.device) - begin
        cache.commit([kept])
    return spent


def _decoded(
    target: Target,
    drafter: Drafter | None,
    prompt: list[int],
    replay: bool,
    options: dict[str, Any],
) -> Decoded:
    """An answer; with ``replay``, the seconds of reading again are among those of the rest."""
    run = decode_rounds(target, drafter, [prompt], **options)
    if drafter is None or not replay:
        for _ in run:
            pass
        return run.result()
    cache, spent = _context(target, prompt), 0.0
    anchor: int | None = None
    for round_ in run:
        if anchor is None:
            anchor = run.result().tokens[0][0]
        kept = [anchor, *round_.drafted[: round_.accepted]]
        seconds = _read_again(target, cache, kept, len(kept))
        if round_.accepted < round_.verified:
            spent += seconds
        anchor = round_.tokens[-1]
    done = run.result()
    return replace(done, seconds=done.seconds | {"rest": done.seconds["rest"] + spent})


def _each(seconds: Seconds, count: int) -> tuple[float, ...]:
    """One for each of 1, 2, ..., ``count`` tokens."""
    if callable(seconds):
        return tuple(float(seconds(n)) for n in range(1, count + 1))
    if isinstance(seconds, (int, float)):
        return (float(seconds),) * count
    if len(seconds) < count:
        raise ValueError(f"seconds must be given for {count} lengths, got {len(seconds)}")
    return tuple(map(float, seconds[:count]))


def _require_lengths(lengths: Sequence[int] | None, longest: int) -> list[int]:
    """Draft lengths in the order given; all of them where None."""
    if lengths is None:
        return list(range(1, longest + 1))
    found = list(lengths)
    if not found:
        raise ValueError("draft_lengths must hold at least one length, got none")
    for length in found:
        require_int("draft_length", length, 1)
        if length > longest:
            raise ValueError(f"draft_length must be at most {longest}, got {length}")
    return found


def _require_seconds(name: str, value: float, positive: bool = False) -> None:
    require_number(name, value)
    if not (np.isfinite(value) and (value > 0 if positive else value >= 0)):
        raise ValueError(f"{name} must be {'>' if positive else '>='} 0 and finite, got {value}")
