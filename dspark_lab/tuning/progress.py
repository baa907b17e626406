"""Expected progress a second: what a training step of each setting teaches over what it takes.

A step whose gradient has the noise x (see :mod:`dspark_lab.tuning.noise`) makes the share
(1 + x)^-EXPONENT of the progress of one whose gradient has none, of the same objective and from the
same weights. So progress counts noiseless steps. Noise grows as a drafter learns, since |G|^2 falls
faster than variances do: with several measurements in the course of a run, an option's noise is
taken as linear in the progress made, between them and beyond the last.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Annotated, Any

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float

from dspark_lab.blocks import Per
from dspark_lab.checks import Count, NotEmpty, Positive, Size, checked, require_columns
from dspark_lab.rates import resampled
from dspark_lab.tuning.choice import row_blocks
from dspark_lab.tuning.cost import step_cost
from dspark_lab.tuning.memory import usable_bytes
from dspark_lab.tuning.moments import StepBytes
from dspark_lab.tuning.noise import GradientNoise
from dspark_lab.tuning.shape import Card, Shape
from dspark_lab.tuning.spans import Spans, in_training_batches, training_steps
from dspark_lab.tuning.step import Step
from dspark_lab.tuning.steptime import StepTime

# Between two theories. The power is 1 where each noise has its best learning rate (McCandlish et
# al. 2018, arXiv 1812.06162, equation 2.7). It is 1/2 where the noise is large and one learning
# rate is kept: Adam's steps then have one length, of which the share 1 / sqrt(1 + noise) leads down
# (Malladi et al. 2022, arXiv 2205.10287). Over development runs at equal time, some of 16 rows and
# some of 4, 3/4 and 1/2 tell log(tau - 1) of a block size to 0.13, 1 to 0.17.
EXPONENT = 0.75
# What makes an option.
_OPTION = ["seq_len", "per", "batch_size", "num_anchors", "block_size"]


@dataclass(frozen=True)
class Dilution:
    """By what the variance of a block's gradient is divided in a step's.

    A step's gradient has the variance ``rows * between + alone * within + shared * within * s``,
    where s is the measured share of :class:`~dspark_lab.tuning.Moments`; ``blocks`` of a step.
    """

    blocks: float
    rows: float
    alone: float
    shared: float


@checked
def dilution(
    spans: Spans,
    num_anchors: Count,
    batch_size: Count,
    overlap: Float[np.ndarray, " distance"],
    per: Per = "row",
) -> Dilution:
    """How the anchors of a step fall on conversations and on neighbours, in expectation.

    A conversation with c blocks in the step adds c^2 between + c within + within * s * (overlap of
    its pairs), all divided by the squared number of blocks. Of a unit (row, document or
    micro-batch) with m candidates n = min(``num_anchors``, m) are drawn without replacement, so
    that each pair of its candidates is drawn with probability n (n - 1) / (m (m - 1)). Where every
    conversation has a row of N anchors this is 1 / rows, 1 / (rows N), and rho_mean (N - 1) / (rows
    N) over s. The number of blocks is taken at its mean over steps, and the blocks of different
    answers as without a common label.

    ``overlap`` is as :func:`~dspark_lab.tuning.label_overlap` gives it.
    """
    trained, steps = training_steps(spans, batch_size, per)
    own = trained.candidates("document").astype(float)
    unit = trained.candidates(per)[trained.unit(per)].astype(float)
    drawn = _anchors_drawn(num_anchors, unit)
    blocks = float((own * drawn / unit.clip(min=1)).sum()) / steps
    if not blocks:
        raise ValueError("no row has a candidate: no two supervised tokens are next to each other")
    chance = _pair_chance(drawn, unit)
    pairs = float((chance * own * (own - 1)).sum()) / steps
    apart = np.arange(1, len(overlap) + 1)
    neighbours = 2 * (trained.run_kept[:, None] - 1 - apart).clip(min=0) @ overlap
    near = float((chance[trained.run_document] * neighbours).sum()) / steps
    return Dilution(blocks, (blocks + pairs) / blocks**2, 1 / blocks, near / blocks**2)


def _anchors_drawn(
    num_anchors: int, candidates: Float[np.ndarray, " document"]
) -> Float[np.ndarray, " document"]:
    return np.minimum(num_anchors, candidates)


def _pair_chance(
    drawn: Float[np.ndarray, " document"], candidates: Float[np.ndarray, " document"]
) -> Float[np.ndarray, " document"]:
    """The probability of two different candidates to be drawn both."""
    return drawn * (drawn - 1) / (candidates * (candidates - 1)).clip(min=1)


@checked
def progress_table(
    noise: GradientNoise | Mapping[int, GradientNoise],
    spans: Spans | Mapping[int, Spans],
    seconds: StepTime | pd.DataFrame,
    *,
    batch_sizes: Annotated[Sequence[Count], NotEmpty()] = (8,),
    num_anchors: Annotated[Sequence[Count], NotEmpty()] = (4, 8, 16, 32, 64, 128),
    block_sizes: Annotated[Sequence[Count], NotEmpty()] | None = None,
    per: Per | Sequence[Per] = "row",
    budget: Positive | None = None,
    measured: tuple[Count, Count] | None = None,
    shape: Shape | None = None,
    step: Step | None = None,
    memory: float | Card | str | None = None,
    resamples: Count = 1000,
    seed: Size = 0,
) -> pd.DataFrame:
    """The expected progress a second of every combination of rows, anchors and block size.

    Args:
        noise: as measured, once, or by the steps after which it was, of one run whose rows and
            anchors are ``measured``; ``block_sizes`` are all that it has where None.
        spans: of the conversations, in rows as they are trained on; or several by the row's length,
            of which the noise is then taken to be the same.
        seconds: of a step: a table with ``seconds`` of each option, told by ``batch_size``,
            ``num_anchors``, ``block_size``, and, where it has them, ``seq_len`` and ``per``; its
            ``error`` is their relative standard deviation, 0 where absent. Or a fit, which needs
            the ``shape``, and ``step`` for all that is no option (its sizes do not matter).
        per: what ``num_anchors`` counts for.
        budget: seconds of the run over which the mean is taken, which several measurements need.
        memory: bytes, or a card, of which a step may take what :func:`usable_bytes` leaves; it
            needs the ``shape``. All options fit where None.
        resamples: of the conversations and step times, for the intervals.

    Returns:
        one line for each option: its ``seq_len`` (key of ``spans``, or longest row), ``per``,
        ``batch_size``, ``num_anchors`` and ``block_size``; ``blocks`` of a step; ``effective``
        anchors of a row; ``noise``, the variance of the step's gradient over its squared mean, with
        ``rows_noise``, the part that no anchors lower; ``progress`` of a step, its ``seconds``, and
        ``rate``, progress a second, with its 95 % interval ``low`` to ``high``; ``best``: the
        probability to have the highest rate of all options of its block size that fit. Rates of
        different block sizes are those of different objectives, and say nothing of each other.
        ``known``: whether the mean gradient is told from 0 (in 97.5 % of the resamples its square
        is above). ``fits``: into the memory.
    """
    by_step = {0: noise} if isinstance(noise, GradientNoise) else dict(sorted(noise.items()))
    known_sizes = set.intersection(*(set(one.wholes) for one in by_step.values()))
    sizes = sorted(known_sizes) if block_sizes is None else list(block_sizes)
    if not set(sizes) <= known_sizes:
        wanted = f"block_sizes must be of {sorted(known_sizes)}, as measured"
        raise ValueError(f"{wanted}, got {sizes}")
    if len(by_step) > 1 and (budget is None or measured is None):
        raise ValueError("several measurements need budget and measured, got None")
    if isinstance(spans, Spans):
        spans = {int(spans.row_tokens.max()): spans}
    pers = [per] if isinstance(per, str) else list(per)
    first = next(iter(spans.values()))
    drawn = {size: _Course.of(by_step, size, first, measured, resamples, seed) for size in sizes}
    options = product(spans, pers, batch_sizes, num_anchors, sizes)
    table = pd.DataFrame(list(options), columns=_OPTION)
    table = table.join(_step_seconds(table, seconds, spans, shape, step))
    table["fits"] = _fits(table, memory, spans, shape, step)
    random = np.random.default_rng((seed, 1)).standard_normal((len(table), resamples + 1))
    random[:, 0] = 0
    # Times are as likely too long as too short by a factor.
    times = table[["seconds"]].to_numpy() * np.exp(table[["error"]].to_numpy() * random)
    found, rates = [], np.empty_like(times)
    for place, (length, unit, rows, anchors, size) in enumerate(table[_OPTION].values.tolist()):
        course = drawn[size]
        share = dilution(spans[length], anchors, rows, course.overlap, unit)
        steps = np.ones(resamples + 1) if budget is None else budget / times[place]
        progress = course.progress(share, steps) / steps
        rates[place] = progress / times[place]
        noisy = progress[0] ** (-1 / EXPONENT) - 1
        if course.moments[:, 0, 0].min() <= 0:
            progress[0], rates[place, 0], noisy = 0, 0, math.inf
        _, between, within, shared = course.moments[-1, 0]
        parts = share.rows * between, share.alone * within + share.shared * shared
        of_rows = noisy * parts[0] / sum(parts) if sum(parts) else 0.0
        effective = within / parts[1] / rows if parts[1] else math.nan
        found.append((share.blocks, effective, noisy, of_rows, progress[0], course.known))
    columns = ["blocks", "effective", "noise", "rows_noise", "progress", "known"]
    table = table.join(pd.DataFrame(found, columns=columns))
    table["rate"] = rates[:, 0]
    table["low"], table["high"] = np.quantile(rates[:, 1:], [0.025, 0.975], axis=1)
    table["best"] = 0.0
    for own in table[table["fits"]].groupby("block_size").groups.values():
        places = np.asarray(own)
        fastest = rates[places, 1:].argmax(axis=0)
        table.loc[places, "best"] = np.bincount(fastest, minlength=len(places)) / resamples
    columns = [*_OPTION, "blocks", "effective", "noise", "rows_noise", "progress", "seconds"]
    return table[[*columns, "rate", "low", "high", "best", "known", "fits"]]


@dataclass(frozen=True, eq=False)
class _Course:
    """Moments in the course of a run, as measured and then of each resample, and where it was.

    ``made`` is the progress until each measurement. Variances that came out below 0 are 0.
    """

    moments: Float[np.ndarray, "measurement resample moment"]
    made: Float[np.ndarray, "measurement resample"]
    overlap: Float[np.ndarray, " distance"]

    @classmethod
    def of(
        cls,
        by_step: Mapping[int, GradientNoise],
        size: int,
        spans: Spans,
        measured: tuple[int, int] | None,
        resamples: int,
        seed: int,
    ) -> _Course:
        found = []
        for noise in by_step.values():
            own = noise.wholes[size]
            times = resampled(own.conversations, resamples, seed).astype(float)
            found.append(np.concatenate([own.estimates(), own.estimates(times)]))
        moments = np.stack(found)
        moments[..., 1:] = moments[..., 1:].clip(min=0)
        moments[..., 3] = np.minimum(moments[..., 3], moments[..., 2])
        course = cls(moments, np.zeros(moments.shape[:2]), own.overlap)
        if measured is None:
            return course
        noises = course.noises(dilution(spans, measured[1], measured[0], own.overlap))
        taken = np.diff([0, *by_step])
        gains = [_gain(taken[0], noises[0], 0 * noises[0])]
        for steps, before, after in zip(taken[1:], noises, noises[1:], strict=False):
            gains.append(steps / _steps_of_one(before, after))
        return replace(course, made=np.cumsum(gains, axis=0))

    @property
    def known(self) -> bool:
        return bool(((self.moments[:, 1:, 0] > 0).mean(axis=1) >= 0.975).all())

    def noises(self, share: Dilution) -> Float[np.ndarray, "measurement resample"]:
        """The noise of a step at each measurement; large but finite where |G|^2 is not above 0."""
        signal, between, within, shared = np.moveaxis(self.moments, -1, 0)
        least = 1e-9 * (between + within) + np.finfo(float).tiny
        variance = share.rows * between + share.alone * within + share.shared * shared
        return variance / np.maximum(signal, least)

    def progress(
        self, share: Dilution, steps: Float[np.ndarray, " resample"]
    ) -> Float[np.ndarray, " resample"]:
        """What so many steps of this dilution make, from the start of the run on."""
        noises = self.noises(share)
        # From and to which noise, and over how much progress, the last without an end.
        stretches = [(noises[0], noises[0], self.made[0])]
        for i in range(len(noises) - 1):
            stretches.append((noises[i], noises[i + 1], self.made[i + 1] - self.made[i]))
        total, slope = np.zeros_like(steps), np.zeros_like(steps)
        for before, after, length in stretches:
            here = np.minimum(steps, length * _steps_of_one(before, after))
            slope = (after - before) / np.maximum(length, np.finfo(float).tiny)
            total, steps = total + _gain(here, before, slope), steps - here
        return total + _gain(steps, noises[-1], slope.clip(min=0))


def _steps_of_one(
    before: Float[np.ndarray, " resample"], after: Float[np.ndarray, " resample"]
) -> Float[np.ndarray, " resample"]:
    """Steps for progress of 1 in the mean, while the noise goes evenly from one to the other."""
    power, rise = EXPONENT + 1, after - before
    flat = np.abs(rise) < 1e-6 * (1 + before)
    rise = np.where(flat, 1, rise)
    mean = ((1 + after) ** power - (1 + before) ** power) / (power * rise)
    return np.where(flat, (1 + before) ** EXPONENT, mean)


def _gain(
    steps: Any, noise: Float[np.ndarray, " resample"], slope: Float[np.ndarray, " resample"]
) -> Float[np.ndarray, " resample"]:
    """Progress of so many steps, while the noise rises by ``slope`` with each progress of 1."""
    power = EXPONENT + 1
    flat = np.abs(slope) * steps < 1e-6 * (1 + noise) ** power
    rise = np.where(flat, 1, slope)
    grown = (1 + noise) ** power + power * rise * steps
    end = np.maximum(grown, 0) ** (1 / power) - 1
    return np.where(flat, steps / (1 + noise) ** EXPONENT, (end - noise) / rise)


def _step_seconds(
    options: pd.DataFrame,
    seconds: StepTime | pd.DataFrame,
    spans: Mapping[int, Spans],
    shape: Shape | None,
    step: Step | None,
) -> pd.DataFrame:
    """The ``seconds`` of a step of each option, and their relative ``error``."""
    if isinstance(seconds, pd.DataFrame):
        by = [name for name in _OPTION if name in seconds]
        missing = {"batch_size", "num_anchors", "block_size", "seconds"} - set(seconds)
        if missing:
            raise ValueError(f"seconds must have the columns {sorted(missing)}, got none")
        own = seconds.assign(error=seconds["error"] if "error" in seconds else 0.0)
        found = options[_OPTION].merge(own[[*by, "seconds", "error"]], "left", on=by)
        lacking = found[~(found["seconds"] > 0)]
        if len(lacking) or len(found) > len(options):
            option = (lacking if len(lacking) else found)[_OPTION].iloc[0].to_dict()
            raise ValueError(f"seconds must hold one time > 0 of each option, not so for {option}")
        return found[["seconds", "error"]]
    if shape is None:
        raise ValueError("seconds as a fit need the shape of the models, got None")
    form, times = step or Step(1, 1, 1), []
    for length, per, rows, anchors, size in options[_OPTION].itertuples(index=False):
        own = spans[length]
        batched = own if per == "row" else in_training_batches(own, rows)
        blocks, _ = row_blocks(batched, anchors, per)
        mean = max(1, round(float(own.row_tokens.mean())))
        sizes = {"seq_len": mean, "num_anchors": blocks, "block_size": size, "batch_size": rows}
        operations = float(step_cost(shape, replace(form, **sizes))["operations"].sum())
        times.append(seconds.predict(operations))
    # A mean absolute error as a standard deviation.
    error = 0.0 if math.isnan(seconds.error) else seconds.error * math.sqrt(math.pi / 2)
    return pd.DataFrame({"seconds": times, "error": error})


def _fits(
    options: pd.DataFrame,
    memory: float | Card | str | None,
    spans: Mapping[int, Spans],
    shape: Shape | None,
    step: Step | None,
) -> Bool[np.ndarray, " option"]:
    """Whether a step of longest rows and most blocks holds no more than it may."""
    if memory is None:
        return np.ones(len(options), dtype=bool)
    if shape is None:
        raise ValueError("memory needs the shape of the models, got None")
    form, limit, held = step or Step(1, 1, 1), usable_bytes(memory), []
    for length, per, rows, anchors, size in options[_OPTION].itertuples(index=False):
        own = spans[length] if per == "row" else in_training_batches(spans[length], rows)
        _, most = row_blocks(own, anchors, per)
        sizes = {"seq_len": length, "num_anchors": most, "block_size": size, "batch_size": rows}
        held.append(StepBytes(shape, replace(form, **sizes)).peak)
    return np.array(held) <= limit


@checked
def best_option(table: pd.DataFrame, block_size: Count | None = None) -> pd.Series:
    """The option of :func:`progress_table` that is the best with the highest probability.

    Of those that fit and, where the table has several, of a ``block_size``; a ValueError where
    nothing fits.
    """
    require_columns("table", table, ["block_size", "rate", "best", "fits"])
    sizes = sorted(set(table["block_size"]))
    if block_size is None and len(sizes) > 1 or block_size not in (None, *sizes):
        raise ValueError(f"block_size must be one of {sizes}, got {block_size}")
    own = table[table["fits"] & (table["block_size"] == (block_size or sizes[0]))]
    if own.empty:
        raise ValueError("table must hold an option that fits, got none")
    return own.loc[own[["best", "rate"]].apply(tuple, axis=1).idxmax()]


@checked
def progress_reason(table: pd.DataFrame, block_size: Count | None = None) -> str:
    """Why :func:`best_option` of :func:`progress_table` is the best, in a sentence.

    What a tenth more anchors would do is told from the next larger number in the table.
    """
    noise = ["blocks", "effective", "noise", "rows_noise", "progress", "seconds"]
    require_columns("table", table, [*_OPTION, *noise, "rate", "best", "known", "fits"])
    best = best_option(table, block_size)
    own = table[table["fits"] & (table["block_size"] == best["block_size"])]
    others = own
    for name in ("seq_len", "per", "batch_size"):
        others = others[others[name] == best[name]]
    more = others[others["num_anchors"] > best["num_anchors"]].sort_values("num_anchors")
    fewer = others[others["num_anchors"] < best["num_anchors"]].sort_values("num_anchors")
    unit = {"row": "a row", "document": "a conversation", "batch": "a step"}[best["per"]]
    rows = f"{best['batch_size']} row" + ("s" if best["batch_size"] > 1 else "")
    said = f"{best['num_anchors']:,} anchors {unit} with {rows}"
    said += f" is the best of {len(own)} settings with probability {best['best']:.0%}"
    if len(more):
        cost, gain = _marginal(best, more.iloc[0])
        said += f": a tenth more of them cost {cost:.1%} of a step's time and add {gain:.1%} to"
        said += f" what it teaches, since {_why(best)}"
    elif len(fewer):
        cost, gain = _marginal(fewer.iloc[-1], best)
        said += f", the most that was asked for: the last tenth more cost {cost:.1%} of a step's"
        said += f" time and added {gain:.1%} to what it teaches"
    if not best["known"]:
        said += "; how noisy a step is compared with what it teaches is not known yet"
    return f"{said}."


def _marginal(fewer: pd.Series, more: pd.Series) -> tuple[float, float]:
    """What a tenth more anchors add to the time and to the progress of a step, relative to both."""
    part = math.log(1.1) / math.log(more["num_anchors"] / fewer["num_anchors"])
    rises = (more[name] / fewer[name] if fewer[name] else 1.0 for name in ("seconds", "progress"))
    cost, gain = (rise**part - 1 for rise in rises)
    return cost, gain


def _why(best: pd.Series) -> str:
    """What keeps more anchors from teaching more."""
    if best["noise"] < 1:
        return f"a step's gradient is hardly noisy any more (noise {best['noise']:.2g})"
    if best["rows_noise"] > best["noise"] / 2:
        share = best["rows_noise"] / best["noise"]
        return f"{share:.0%} of its noise is that of few conversations, which no anchor lowers"
    count = min(best["num_anchors"], best["blocks"] / best["batch_size"])
    if best["effective"] < count / 2:
        return f"anchors share their labels: {count:.0f} count as {best['effective']:.0f}"
    return f"a step has {best['noise']:.2g} times as much noise as signal, which falls slowly"
