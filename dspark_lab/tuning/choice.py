"""Before the training run: how many anchors, which block size, how long a row.

    spans = Spans.of(encoded)
    choice = choose_training(spans, Shape.of("qwen3-4b"), time="H100", memory="H100")
    choice.reason, choice.table, choice.settings

An option's gain in a step is the number of different tokens that are supervised at all (a token's
second block of the same step teaches little that the first did not), times the summed weights
w_0 + ... + w_(K-1) of a block's slots, which is about the accepted length of a block whose slots
are accepted with probability exp(-1 / gamma). Its cost is known from operations, memory and step
times. The best option gains most a second among those that fit.

This models how much is supervised, not how much is learned: see
:func:`dspark_lab.tuning.progress_table`, and :func:`dspark_lab.tuning.judge_advice` for what either
loses against drafters that were really trained.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product
from statistics import NormalDist
from typing import Annotated, Any, Literal

import numpy as np
import pandas as pd

from dspark_lab.blocks import Layout, Per
from dspark_lab.chats import Batch, Encoded, token_counts
from dspark_lab.checks import Count, NotEmpty, Share, Within, checked
from dspark_lab.model import DecayGamma
from dspark_lab.tuning.cost import step_cost
from dspark_lab.tuning.coverage import supervision
from dspark_lab.tuning.memory import usable_bytes
from dspark_lab.tuning.moments import StepBytes
from dspark_lab.tuning.settings import TrainingSettings
from dspark_lab.tuning.shape import CARDS, Card, Shape
from dspark_lab.tuning.spans import Spans, in_training_batches, sum_by, training_steps
from dspark_lab.tuning.step import Dtype, Step
from dspark_lab.tuning.steptime import StepTime

# The share of a card's peak that training steps of transformers commonly reach; an assumption.
UTILISATION = 0.4
# The first columns of a table of options.
_OPTION = [
    *("seq_len", "block_size", "num_anchors", "row_tokens", "share", "tokens", "anchors"),
    *("covered", "weighted", "gain", "operations", "memory_bytes"),
]
_RATES = ("gain_per_second", "gain_per_byte", "gain_per_operation")


@dataclass(frozen=True, eq=False)
class TrainingChoice:
    """The result of :func:`choose_training`.

    ``best`` and ``runner_up`` are rows of ``table``, None where nothing fits, or nothing else does.
    ``sure`` is the probability that the best gains faster than the runner-up, given the error of
    the step times; NaN where that is not known. ``packed``: whether rows hold several
    conversations; ``per``: what the anchors count for; ``layout``: of the blocks; ``max_length``:
    what conversations were cut to before they were packed, None where that is the row's length.
    """

    table: pd.DataFrame
    best: pd.Series | None
    runner_up: pd.Series | None
    sure: float
    reason: str
    batch_size: int
    gamma: float
    packed: bool
    per: Per
    layout: Layout
    max_length: int | None = None

    @property
    def settings(self) -> TrainingSettings:
        """The best option, to be exported; a ValueError where nothing fits."""
        if self.best is None:
            raise ValueError(self.reason)
        anchors, block_size, seq_len = map(int, self.best[["num_anchors", "block_size", "seq_len"]])
        return TrainingSettings(
            *(anchors, block_size, self.max_length or seq_len, self.batch_size, self.gamma),
            pack_length=seq_len if self.packed else None,
            per=self.per,
            layout=self.layout,
        )


@checked
def card_time(
    card: Card | str, utilisation: Annotated[float, Within(0, 1, above=True)] = UTILISATION
) -> StepTime:
    """Step times on a card that is not at hand: a share of its peak, and nothing fixed.

    Their error is not known (NaN): measure where you can (:func:`measure_steps`).
    """
    if isinstance(card, str):
        if card not in CARDS:
            raise ValueError(f"card must be one of {list(CARDS)}, got {card!r}")
        card = CARDS[card]
    per_operation = 1 / (card.operations_per_second * utilisation)
    return StepTime(0.0, per_operation, math.nan, math.nan, 0)


@checked
def choose_training(
    data: Spans | Batch | Annotated[Sequence[Encoded], NotEmpty()],
    shape: Shape,
    *,
    time: StepTime | Card | str,
    memory: float | Card | str | None = None,
    num_anchors: Annotated[Sequence[Count], NotEmpty()] = (8, 16, 32, 64, 128, 256, 512),
    block_sizes: Annotated[Sequence[Count], NotEmpty()] = (7,),
    seq_lens: Annotated[Sequence[Count], NotEmpty()] | None = None,
    packed: bool = False,
    per: Per = "row",
    batch_size: Count = 1,
    gamma: DecayGamma = 4.0,
    usable: float = 0.92,
    dtype: Dtype = "bf16",
    features: Literal["live", "cached"] = "live",
    target_dtype: Dtype | None = None,
    objective: Literal["chunked", "full"] = "chunked",
    supervised: Share = 1.0,
    vocabulary: Count | None = None,
    device: Literal["cuda", "cpu"] = "cuda",
) -> TrainingChoice:
    """The gain and the cost of every combination of anchors, block size and row length.

    Args:
        data: conversations; or spans or a batch, whose rows are then as they are.
        time: of steps, as fitted; or a card, of whose peak :data:`UTILISATION` is assumed.
        memory: bytes, or a card; everything fits where None.
        seq_lens: tokens that conversations are cut to, or the length of packed rows, in which no
            conversation is cut further; the longest conversation where None.
        per: what ``num_anchors`` counts for; "batch" for the ``batch_size`` rows of a micro-batch,
            grouped as in the first epoch of a training run of seed 0.
        usable: share of the memory that tensors may take. All others as in
            :class:`~dspark_lab.tuning.Step`.

    Returns:
        a choice whose ``table`` has a line per option: ``share`` (of the supervised tokens that a
        pass covers); per step ``tokens`` (without padding), ``anchors`` (kept blocks), ``covered``
        (different tokens), ``weighted`` (summed weight of all supervised slots) and
        ``memory_bytes`` (of longest rows and most blocks); and three rates of ``gain``.
    """
    step_time = time if isinstance(time, StepTime) else card_time(time)
    limit = math.inf if memory is None else usable_bytes(memory, usable)
    options = (dtype, features, target_dtype, objective, supervised, vocabulary, device)
    lines = []
    rows = _rows(data, seq_lens, packed)
    for seq_len, spans in rows.items():
        trained, steps = training_steps(spans, batch_size, per)
        if per != "row":
            spans = in_training_batches(spans, batch_size)
        row_tokens = float(spans.row_tokens.mean())
        tokens = float(spans.document_kept.sum()) / spans.rows * batch_size
        for block_size, anchors in product(block_sizes, num_anchors):
            counted: dict[str, Any] = {"per": per, "layout": shape.layout}
            share = supervision(spans, anchors, block_size, **counted).share
            found = supervision(trained, anchors, block_size, gamma=gamma, **counted)
            covered, weighted = found.covered / steps, found.weighted / steps
            gain = covered * float(found.weights.sum())
            blocks, most = row_blocks(spans, anchors, per)
            longest = Step(seq_len, most, block_size, batch_size, *options)
            mean = replace(longest, seq_len=max(1, round(row_tokens)), num_anchors=blocks)
            operations = float(step_cost(shape, mean)["operations"].sum())
            held = int(StepBytes(shape, longest).peak)
            kept = found.blocks * found.rows / steps
            gained = (row_tokens, share, tokens, kept, covered, weighted, gain)
            lines.append((seq_len, block_size, anchors, *gained, operations, held))
    table = pd.DataFrame(lines, columns=_OPTION)
    table["seconds"] = step_time.predict(table["operations"])
    for rate, of in zip(_RATES, ("seconds", "memory_bytes", "operations"), strict=True):
        table[rate] = table["gain"] / table[of]
    table["fits"] = table["memory_bytes"] <= limit
    packed = packed or any(spans.documents > spans.rows for spans in rows.values())
    max_length = None
    if isinstance(data, Spans) and (data.document_kept < data.document_tokens).any():
        max_length = int(data.document_kept.max())
    settings = (batch_size, gamma, packed, per, shape.layout, max_length)
    return _choice(table, step_time.error, settings)


@checked
def row_blocks(spans: Spans, num_anchors: Count, per: Per) -> tuple[int, int]:
    """Blocks that a step has for each row, in the mean over micro-batches, and the most.

    Per row, ``num_anchors``. Otherwise as many as the fullest row of the micro-batch keeps: known
    per document; of a batch's total, from a few draws of seed 0 in up to 64 micro-batches. Without
    micro-batches (:meth:`Spans.in_batches`) each row is one.
    """
    if per == "row":
        return num_anchors, num_anchors
    if spans.row_batch is None:
        spans = spans.in_batches(1)
    assert spans.row_batch is not None
    if per == "document":
        kept = np.minimum(spans.candidates("document"), num_anchors)
        of_row = sum_by(spans.document_row, kept, spans.rows)
        fullest = np.zeros(spans.row_batch.max() + 1, dtype=np.int64)
        np.maximum.at(fullest, spans.row_batch, of_row)
    else:
        candidates, found = spans.candidates("row"), []
        batches = np.unique(spans.row_batch)
        for batch in batches[:: -(-len(batches) // 64)]:
            rows = candidates[spans.row_batch == batch]
            drawn = np.random.default_rng(int(batch)).multivariate_hypergeometric(
                rows, min(num_anchors, int(rows.sum())), size=16, method="marginals"
            )
            found.append(drawn.max(axis=1))
        fullest = np.concatenate(found)
    return max(1, round(float(fullest.mean()))), max(1, int(fullest.max()))


def _rows(
    data: Spans | Batch | Sequence[Encoded], seq_lens: Sequence[int] | None, packed: bool
) -> dict[int, Spans]:
    if isinstance(data, (Spans, Batch)):
        if seq_lens is not None or packed:
            raise ValueError("spans and batches have their rows already: no seq_lens, no packed")
        spans = Spans.of(data)
        return {int(spans.row_tokens.max()): spans}
    return {
        length: Spans.of(data, seq_len=length, row_length=length if packed else None)
        for length in seq_lens or [int(token_counts(data).max())]
    }


def _ranked(table: pd.DataFrame) -> pd.DataFrame:
    """The options that fit, the one that gains most a second first."""
    return table[table["fits"]].sort_values("gain_per_second", ascending=False, kind="stable")


def _choice(table: pd.DataFrame, error: float, settings: tuple[Any, ...]) -> TrainingChoice:
    order = _ranked(table)
    if order.empty:
        least = table["memory_bytes"].min() / 1e9
        reason = f"Nothing fits: the smallest of these steps takes {least:.1f} GB."
        return TrainingChoice(table, None, None, math.nan, reason, *settings)
    best = order.iloc[0]
    runner_up = order.iloc[1] if len(order) > 1 else None
    sure = math.nan
    reason = (
        f"{_option(best, table)} gains most a second, {best['gain_per_second']:,.0f}, and covers "
        f"{best['share']:.0%} of the supervised tokens in a pass"
    )
    if runner_up is not None:
        if error > 0:
            # A mean absolute error as a standard deviation; both times are off independently.
            spread = math.sqrt(2) * error * math.sqrt(math.pi / 2)
            lead = math.log(best["gain_per_second"] / runner_up["gain_per_second"])
            sure = NormalDist(0, spread).cdf(lead)
        elif error == 0:
            sure = 1.0
        reason += (
            f"; the runner-up, {_option(runner_up, table)}, would gain "
            f"{_more(runner_up['gain'] / best['gain'])} a step for "
            f"{_more(runner_up['seconds'] / best['seconds'])} of the time"
        )
        reason += " (speed assumed, not measured)" if math.isnan(sure) else f" ({sure:.0%} sure)"
    unfit = table[~table["fits"]]
    if len(unfit) and unfit["gain_per_second"].max() > best["gain_per_second"]:
        wanted = unfit.loc[unfit["gain_per_second"].idxmax()]
        reason += f"; {_option(wanted, table)} would gain more but does not fit"
    return TrainingChoice(table, best, runner_up, sure, f"{reason}.", *settings)


def _option(option: pd.Series, table: pd.DataFrame) -> str:
    names = (("num_anchors", "N"), ("block_size", "K"), ("seq_len", "S"))
    varied = [each for each in names if each[1] == "N" or table[each[0]].nunique() > 1]
    return ", ".join(f"{letter} {option[name]:,.0f}" for name, letter in varied)


def _more(ratio: float) -> str:
    return f"{abs(ratio - 1):.0%} {'more' if ratio >= 1 else 'less'}"
