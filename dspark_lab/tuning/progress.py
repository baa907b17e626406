"""Expected progress a second: what a training step of each setting teaches over what it takes.

A step whose gradient has the noise x (see :mod:`dspark_lab.tuning.noise`) makes the share
(1 + x)^-EXPONENT of the progress of one whose gradient has none, of the same objective and from the
same weights.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Annotated

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float

from dspark_lab.blocks import Per
from dspark_lab.checks import Count, NotEmpty, Size, checked
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

# The loss falls by this power of 1 / (1 + noise): McCandlish et al. 2018, arXiv 1812.06162,
# equation 2.7, with the best learning rate for each noise. Where the rate is the same for all and
# the noise large, Adam's steps have one length and the power would be 1/2.
EXPONENT = 1.0
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
    drawn = np.minimum(num_anchors, unit)
    blocks = float((own * drawn / unit.clip(min=1)).sum()) / steps
    if not blocks:
        raise ValueError("no row has a candidate: no two supervised tokens are next to each other")
    chance = drawn * (drawn - 1) / (unit * (unit - 1)).clip(min=1)
    pairs = float((chance * own * (own - 1)).sum()) / steps
    apart = np.arange(1, len(overlap) + 1)
    neighbours = 2 * (trained.run_kept[:, None] - 1 - apart).clip(min=0) @ overlap
    near = float((chance[trained.run_document] * neighbours).sum()) / steps
    return Dilution(blocks, (blocks + pairs) / blocks**2, 1 / blocks, near / blocks**2)


@checked
def progress_table(
    noise: GradientNoise,
    spans: Spans | Mapping[int, Spans],
    seconds: StepTime | pd.DataFrame,
    *,
    batch_sizes: Annotated[Sequence[Count], NotEmpty()] = (8,),
    num_anchors: Annotated[Sequence[Count], NotEmpty()] = (4, 8, 16, 32, 64, 128),
    block_sizes: Annotated[Sequence[Count], NotEmpty()] | None = None,
    per: Per | Sequence[Per] = "row",
    shape: Shape | None = None,
    step: Step | None = None,
    memory: float | Card | str | None = None,
    resamples: Count = 1000,
    seed: Size = 0,
) -> pd.DataFrame:
    """The expected progress a second of every combination of rows, anchors and block size.

    Args:
        noise: as measured; ``block_sizes`` are all of its own where None.
        spans: of the conversations, in rows as they are trained on; or several by the row's length,
            of which the noise is then taken to be the same.
        seconds: of a step: a table with ``seconds`` of each option, told by ``batch_size``,
            ``num_anchors``, ``block_size``, and, where it has them, ``seq_len`` and ``per``; its
            ``error`` is their relative standard deviation, 0 where absent. Or a fit, which needs
            the ``shape``, and ``step`` for all that is no option (its sizes do not matter).
        per: what ``num_anchors`` counts for.
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
    sizes = noise.block_sizes if block_sizes is None else list(block_sizes)
    if not set(sizes) <= set(noise.block_sizes):
        raise ValueError(f"block_sizes must be of {noise.block_sizes}, as measured, got {sizes}")
    if isinstance(spans, Spans):
        spans = {int(spans.row_tokens.max()): spans}
    pers = [per] if isinstance(per, str) else list(per)
    drawn = {size: _estimates(noise, size, resamples, seed) for size in sizes}
    lines, variances = [], []
    for (length, own), unit, rows, anchors, size in product(
        spans.items(), pers, batch_sizes, num_anchors, sizes
    ):
        share = dilution(own, anchors, rows, noise.wholes[size].overlap, unit)
        signal, between, within, shared = drawn[size].T
        parts = share.rows * between, share.alone * within + share.shared * shared
        variances.append(parts[0] + parts[1])
        effective = within[0] / parts[1][0] / rows if parts[1][0] else math.nan
        known = bool((signal[1:] > 0).mean() >= 0.975)
        lines.append((length, unit, rows, anchors, size, share.blocks, effective, parts[0], known))
    table = pd.DataFrame(lines, columns=[*_OPTION, "blocks", "effective", "rows_noise", "known"])
    variance = np.stack(variances)
    signal = np.stack([drawn[size][:, 0] for size in table["block_size"]]).clip(min=0)
    with np.errstate(divide="ignore"):
        table["noise"] = variance[:, 0] / signal[:, 0]
        table["rows_noise"] = np.stack(table["rows_noise"])[:, 0] / signal[:, 0]
    total = signal + variance
    progress = np.divide(signal, total, out=np.zeros_like(total), where=total > 0) ** EXPONENT
    table["progress"] = progress[:, 0]
    table = table.join(_step_seconds(table, seconds, spans, shape, step))
    table["fits"] = _fits(table, memory, spans, shape, step)
    random = np.random.default_rng((seed, 1)).standard_normal(variance.shape)
    random[:, 0] = 0
    # The mean error is 0, so the times are as likely too long as too short.
    times = table[["seconds"]].to_numpy() * np.exp(table[["error"]].to_numpy() * random)
    rates = progress / times
    table["rate"] = rates[:, 0]
    table["low"], table["high"] = np.quantile(rates[:, 1:], [0.025, 0.975], axis=1)
    # The same order as that of the rates, and known even where |G|^2 is not told from 0.
    slowness = EXPONENT * np.log(total) + np.log(times)
    table["best"] = 0.0
    for _, lines_of in table[table["fits"]].groupby("block_size").groups.items():
        places = np.asarray(lines_of)
        found = slowness[places, 1:].argmin(axis=0)
        table.loc[places, "best"] = np.bincount(found, minlength=len(places)) / resamples
    columns = [*_OPTION, "blocks", "effective", "noise", "rows_noise", "progress", "seconds"]
    return table[[*columns, "rate", "low", "high", "best", "known", "fits"]]


def _estimates(
    noise: GradientNoise, size: int, resamples: int, seed: int
) -> Float[np.ndarray, "resample moment"]:
    """Moments as measured, then of each resample; variances are 0 where they came out below."""
    moments = noise.wholes[size]
    times = resampled(moments.conversations, resamples, seed).astype(float)
    found = np.concatenate([moments.estimates(), moments.estimates(times)])
    found[:, 1:] = found[:, 1:].clip(min=0)
    found[:, 3] = np.minimum(found[:, 3], found[:, 2])
    return found


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

    What one more anchor would do is told from the next larger number in the table.
    """
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
        said += f": another anchor costs {cost:.1%} of a step's time and adds {gain:.1%} to what it"
        said += f" teaches, since {_why(best)}"
    elif len(fewer):
        cost, gain = _marginal(fewer.iloc[-1], best)
        said += f", the most that was asked for: the last ones cost {cost:.1%} of a step's time"
        said += f" each and added {gain:.1%} to what it teaches"
    if not best["known"]:
        said += "; how noisy a step is compared with what it teaches is not known yet"
    return f"{said}."


def _marginal(fewer: pd.Series, more: pd.Series) -> tuple[float, float]:
    """What one anchor adds to the time and to the progress of a step, relative to both."""
    added = more["num_anchors"] - fewer["num_anchors"]
    rises = (more[name] / fewer[name] if fewer[name] else 1.0 for name in ("seconds", "progress"))
    cost, gain = (rise ** (1 / added) - 1 for rise in rises)
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
