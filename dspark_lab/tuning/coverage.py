"""How often each token is supervised, and whether at all: exact, for a whole data set at once.

All that training draws and supervises follows from the runs of :class:`~dspark_lab.tuning.Spans`:

    candidates: every token of a run but its last, so a run of L tokens holds L - 1;
    draw: n = min(num_anchors, C) of the C candidates of a row, without replacement;
    slot: the token at offset o of its run is at slot k of the block whose anchor stands at offset
        o - 1 - k, so it is reached from the min(o, block_size) candidates just before it;
    never a label: the first token of a run, which no anchor reaches.

Each candidate is drawn with probability n / C, so a token is expected n / C times at each slot at
which it is reached. One that c candidates reach is missed with the hypergeometric probability

    P(missed) = C(C - c, n) / C(C, n)

where C(a, b) is a binomial coefficient. Both depend on C and c alone, so tokens are counted by
these two and never visited one by one. With ``per="document"``, ``num_anchors`` are drawn in each
document of a packed row instead of in each row; with ``per="batch"``, in all rows of a micro-batch
together (:meth:`Spans.in_batches`). What is said of a row's C holds for theirs.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Annotated

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from dspark_lab.blocks import Layout, Per, draw_blocks, predicted_slots, times_supervised
from dspark_lab.chats import Batch, Encoded, offsets
from dspark_lab.checks import Count, Size, Within, checked
from dspark_lab.model import DecayGamma, decay_weights
from dspark_lab.tuning.spans import Data, Spans, sum_by

# Why a token can never be a label.
REASONS = ("prompt", "first of its run", "alone in its run", "cut off", "padding")
# The columns of a table of supervision.
_FOUND = (
    *("blocks", "supervised", "labels", "expected", "weighted", "covered", "share", "times"),
    "rows_without_label",
)


@dataclass(frozen=True, eq=False)
class Supervision:
    """The supervision of one pass over a data set, in expectation over the draws.

    ``labels`` are the ``supervised`` tokens that some draw supervises, and ``covered`` is the
    expected number of them, a ``share`` of the supervised tokens; ``expected_by_slot`` and
    ``weights`` are for slots k = 0, 1, ..., ``expected`` and ``weighted`` their sums; ``times`` is
    how often a supervised token is supervised, ``blocks`` how many a row keeps.
    """

    rows: int
    rows_without_label: int
    supervised: int
    labels: int
    expected_by_slot: Float[np.ndarray, " slot"]
    weights: Float[np.ndarray, " slot"]
    expected: float
    weighted: float
    covered: float
    share: float
    times: float
    blocks: float


@checked
def supervision(
    data: Data,
    num_anchors: Count,
    block_size: Count,
    *,
    gamma: DecayGamma = 4.0,
    per: Per = "row",
    layout: Layout = "anchor_predicts",
) -> Supervision:
    """The supervision of one pass over the data, in closed form.

    Each row, document or micro-batch (``per``) has ``num_anchors`` drawn, or all of its candidates
    where there are fewer. Slot k has the weight w_k = exp(-k / gamma). For micro-batches ``data``
    is a batch, or spans that know them. Where the anchor is given (``layout``), slots are counted
    behind it, and ``block_size`` with it.
    """
    slots = predicted_slots(block_size, layout)
    return _labelled(data, slots, per).supervision(num_anchors, gamma)


@checked
def supervision_table(
    data: Data,
    num_anchors: Sequence[Count] = (4, 8, 16, 32, 64, 128),
    block_sizes: Sequence[Count] = (4, 7, 15),
    *,
    gamma: DecayGamma = 4.0,
    per: Per | Sequence[Per] = "row",
    layout: Layout = "anchor_predicts",
) -> pd.DataFrame:
    """:func:`supervision` for each choice, a line each, the columns as :class:`Supervision`."""
    spans = Spans.of(data)
    lines = []
    for unit, block_size in product([per] if isinstance(per, str) else per, block_sizes):
        reach = _labelled(spans, predicted_slots(block_size, layout), unit)
        for anchors in num_anchors:
            found = reach.supervision(anchors, gamma)
            lines.append((unit, block_size, anchors, *(getattr(found, name) for name in _FOUND)))
    return pd.DataFrame(lines, columns=["per", "block_size", "num_anchors", *_FOUND])


@checked
def slot_supervision(
    data: Data,
    num_anchors: Count,
    block_size: Count,
    *,
    gamma: DecayGamma = 4.0,
    per: Per = "row",
    layout: Layout = "anchor_predicts",
) -> pd.DataFrame:
    """:func:`supervision` slot by slot; ``most`` is expected if every candidate were an anchor."""
    slots = predicted_slots(block_size, layout)
    reach = _labelled(data, slots, per)
    found = reach.supervision(num_anchors, gamma)
    return pd.DataFrame(
        {
            "slot": np.arange(slots),
            "weight": found.weights,
            "expected": found.expected_by_slot,
            "weighted": found.expected_by_slot * found.weights,
            "most": reach.slots.sum(axis=0),
        }
    )


@checked
def never_table(data: Data) -> pd.DataFrame:
    """Counts the tokens that can never be a label, whatever is drawn, by reason.

    *Prompt* is everything that is not supervised. The first token of a run of two or more is an
    anchor, but no anchor stands before it. *Cut off* are supervised tokens beyond ``seq_len``.

    Returns:
        one line per ``reason``: ``tokens``, their share ``of_tokens`` (padding and what was cut off
        included) and ``of_supervised`` tokens, and the ``documents`` that hold such a token.
    """
    spans = Spans.of(data)
    kept, run_document, documents = spans.run_kept, spans.run_document, spans.documents
    supervised = sum_by(run_document, spans.run_tokens, documents)
    in_document = {
        "prompt": spans.document_tokens - supervised,
        "first of its run": _first_tokens(spans),
        "alone in its run": sum_by(run_document, kept == 1, documents),
        "cut off": sum_by(run_document, spans.run_tokens - kept, documents),
    }
    padding = spans.row_tokens.sum() - spans.document_kept.sum()
    tokens = np.array([*(found.sum() for found in in_document.values()), padding])
    answer = np.isin(REASONS, ("prompt", "padding"), invert=True)
    return pd.DataFrame(
        {
            "reason": REASONS,
            "tokens": tokens,
            "of_tokens": tokens / (spans.document_tokens.sum() + padding),
            "of_supervised": np.where(answer, tokens, np.nan) / (supervised.sum() or np.nan),
            "documents": [*((found > 0).sum() for found in in_document.values()), 0],
        }
    )


@checked
def token_supervision(
    data: Data,
    num_anchors: Count,
    block_size: Count,
    *,
    document: Size | None = None,
    gamma: DecayGamma = 4.0,
    per: Per = "row",
    layout: Layout = "anchor_predicts",
) -> pd.DataFrame:
    """How often each token is supervised, at each slot, and whether at all.

    Arguments as in :func:`supervision`; ``document`` None stands for all.

    Returns:
        one line per token, those beyond the cut included; ``anchors`` are the candidates that reach
        it, ``slot_0``, ... the expected times at each slot, ``times`` their sum, ``reason`` is why
        it can never be a label, one of ``REASONS``, or empty.
    """
    spans, labels = Spans.of(data), predicted_slots(block_size, layout)
    if document is not None and document >= spans.documents:
        raise ValueError(f"document must lie in [0, {spans.documents - 1}], got {document}")
    documents = np.arange(spans.documents) if document is None else np.array([document])
    runs = np.flatnonzero(np.isin(spans.run_document, documents))
    tokens = spans.document_tokens[documents]
    of_run = spans.run_tokens[runs]
    run, offset = np.repeat(runs, of_run), offsets(of_run)
    in_document = spans.run_document[run]
    before = tokens.cumsum() - tokens
    line = before[in_document - documents[0]] + spans.run_start[run] + offset
    kept = spans.run_kept[run]
    anchors = np.where(offset < kept, np.minimum(offset, labels), 0)
    of_token = [offset >= kept, offset > 0, kept > 1]
    reason = np.select(of_token, ["cut off", "", "first of its run"], "alone in its run")
    # Only the units that the document draws from are worked out.
    drawn_from, place = np.unique(spans.unit(per)[in_document], return_inverse=True)
    size = spans.candidates(per)[drawn_from]
    drawn = _drawn(size, num_anchors)[place]
    covered = _covered(size, num_anchors, labels)[place, anchors]
    slots = (np.arange(labels) < anchors[:, None]) * drawn[:, None]

    def spread(values: np.ndarray, otherwise: object) -> np.ndarray:
        filled = np.full((int(tokens.sum()), *values.shape[1:]), otherwise, dtype=values.dtype)
        filled[line] = values
        return filled

    times = spread(slots, 0)
    return pd.DataFrame(
        {
            "document": np.repeat(documents, tokens),
            "position": offsets(tokens),
            "supervised": spread(np.ones(len(line), dtype=bool), False),
            "anchors": spread(anchors, 0),
            **{f"slot_{slot}": times[:, slot] for slot in range(labels)},
            "times": times.sum(axis=1),
            "weighted": times @ decay_weights(labels, gamma).numpy(),
            "p_covered": spread(covered, 0),
            "reason": spread(reason.astype(object), "prompt"),
        }
    )


@checked
def token_coverage(
    batch: Batch,
    num_anchors: Count,
    block_size: Count,
    *,
    per: Per = "row",
    layout: Layout = "anchor_predicts",
) -> Float[Tensor, "batch seq"]:
    """The probability, in float64, that one draw of anchors covers a token."""
    tokens = token_supervision(batch, num_anchors, block_size, per=per, layout=layout)
    coverage = torch.zeros(batch.loss_mask.shape, dtype=torch.float64)
    coverage[batch.attention_mask.cpu()] = torch.tensor(tokens["p_covered"].to_numpy())
    return coverage.to(batch.loss_mask.device)


@checked
def coverage_table(
    batch: Batch,
    num_anchors: Sequence[Count] = (4, 8, 16, 32, 64, 128),
    block_sizes: Sequence[Count] = (4, 7, 15),
    *,
    per: Per = "row",
    layout: Layout = "anchor_predicts",
    draws: Count = 1,
    seed: int = 0,
) -> pd.DataFrame:
    """The share of supervised tokens that one pass over ``batch`` covers, a line for each choice.

    ``blocks`` are kept per row; the share is ``expected`` in closed form, ``sampled`` over
    ``draws`` draws; ``supervisions`` are expected, per supervised token.
    """
    spans = _supervised(Spans.of(batch))
    lines = []
    for block_size in block_sizes:
        reach = _Reach.of(spans, predicted_slots(block_size, layout), per)
        for anchors in num_anchors:
            drawn = (
                draw_blocks(batch, anchors, block_size, seed=seed + draw, per=per, layout=layout)
                for draw in range(draws)
            )
            sampled = (times_supervised(blocks) > 0 for blocks in drawn)
            found = reach.supervision(anchors)
            share = sum(int(covered.sum()) for covered in sampled) / draws / found.supervised
            lines.append((block_size, anchors, found.blocks, found.share, share, found.times))
    columns = ["block_size", "num_anchors", "blocks", "expected", "sampled", "supervisions"]
    return pd.DataFrame(lines, columns=columns)


@checked
def packing_table(
    encoded: Sequence[Encoded],
    row_lengths: Sequence[Count] = (1024, 4096),
    num_anchors: Sequence[Count] = (16, 32, 64, 128, 256, 512),
    *,
    block_size: Count = 7,
    layout: Layout = "anchor_predicts",
) -> pd.DataFrame:
    """Coverage of packed rows when ``num_anchors`` counts per row, and when per document.

    Per document, coverage is that of unpacked rows, whatever the row's length. A line for each kind
    of ``row`` and ``num_anchors``; ``documents`` are the mean per row.
    """
    rows: dict[str, tuple[Spans, Per]] = {"unpacked": (Spans.of(encoded), "document")}
    rows |= {f"packed, {n}": (Spans.of(encoded, row_length=n), "row") for n in row_lengths}
    lines = []
    for row, (spans, per) in rows.items():
        reach = _Reach.of(_supervised(spans), predicted_slots(block_size, layout), per)
        documents = spans.documents / spans.rows
        lines += [(row, per, documents, n, reach.supervision(n).share) for n in num_anchors]
    columns = ["row", "anchors per", "documents", "num_anchors", "expected"]
    return pd.DataFrame(lines, columns=columns)


@checked
def anchors_needed(
    data: Data,
    goals: Sequence[Annotated[float, Within(0, 1, above=True)]] = (0.5, 0.8, 0.9, 0.95),
    block_sizes: Sequence[Count] = (4, 7, 15),
    *,
    per: Per = "row",
    layout: Layout = "anchor_predicts",
) -> pd.DataFrame:
    """The smallest ``num_anchors`` whose expected coverage reaches a goal, missing where none does.

    A line for each ``block_size`` and ``goal``; ``ceiling`` is the coverage of all candidates.
    """
    spans = _supervised(Spans.of(data))
    lines = []
    for block_size in block_sizes:
        reach = _Reach.of(spans, predicted_slots(block_size, layout), per)
        most = max(1, int(reach.candidates.max()))
        ceiling = reach.share(most)
        for goal in goals:
            enough, expected = None, np.nan
            if goal <= ceiling:
                enough = 1 + bisect_left(range(1, most), goal, key=reach.share)
                expected = reach.share(enough)
            lines.append((block_size, goal, enough, expected, ceiling))
    columns = ["block_size", "goal", "num_anchors", "expected", "ceiling"]
    return pd.DataFrame(lines, columns=columns).astype({"num_anchors": "Int64"})


@dataclass(frozen=True, eq=False)
class _Reach:
    """The tokens of each group of runs that c candidates reach, and the slots they supervise."""

    spans: Spans
    candidates: Int[np.ndarray, " group"]
    tokens: Int[np.ndarray, "group reach"]
    slots: Int[np.ndarray, "group slot"]

    @classmethod
    def of(cls, spans: Spans, labels: int, per: Per) -> _Reach:
        candidates, run_group, run_length = spans.groups(per)
        count, width, last = len(candidates), labels + 1, run_length - 1
        cell = run_group * width + np.minimum(last, labels)
        ends = np.bincount(cell, minlength=count * width).reshape(count, width)
        # A run has a token at each offset up to its last; those from labels on are alike.
        tokens = _sums_to_the_end(ends)
        tokens[:, -1] += sum_by(run_group, np.maximum(last - labels, 0), count)
        # A token that c candidates reach is the label of slots 0 to c - 1.
        return cls(spans, candidates, tokens, _sums_to_the_end(tokens)[:, 1:])

    def supervision(self, num_anchors: int, gamma: float = 4.0) -> Supervision:
        spans, slots = self.spans, self.slots.shape[1]
        by_slot = _drawn(self.candidates, num_anchors) @ self.slots
        weights = decay_weights(slots, gamma).numpy()
        expected = float(by_slot.sum())
        covered = self.tokens * _covered(self.candidates, num_anchors, slots)
        all_covered = float(covered.sum())
        return Supervision(
            *(spans.rows, spans.rows_without_label, spans.supervised),
            labels=int(self.slots[:, 0].sum()),
            expected_by_slot=by_slot,
            weights=weights,
            expected=expected,
            weighted=float(by_slot @ weights),
            covered=all_covered,
            share=all_covered / spans.supervised,
            times=expected / spans.supervised,
            # Slot 0 of each kept block is supervised, and of no other.
            blocks=float(by_slot[0]) / spans.rows,
        )

    def share(self, num_anchors: int) -> float:
        return self.supervision(num_anchors).share


def _labelled(data: Data, slots: int, per: Per) -> _Reach:
    reach = _Reach.of(Spans.of(data), slots, per)
    if not reach.slots.any():
        raise ValueError("no row has a label: no two supervised tokens are next to each other")
    return reach


def _supervised(spans: Spans) -> Spans:
    if spans.supervised == 0:
        raise ValueError("coverage needs a supervised token, got data without one")
    return spans


def _first_tokens(spans: Spans) -> Int[np.ndarray, " document"]:
    """First tokens of runs of two or more, in each document: supervised, and never a label."""
    return sum_by(spans.run_document, spans.run_kept > 1, spans.documents)


def _drawn(candidates: Int[np.ndarray, " unit"], num_anchors: int) -> Float[np.ndarray, " unit"]:
    """The probability that a candidate is an anchor."""
    return np.minimum(candidates, num_anchors) / np.maximum(candidates, 1)


def _covered(
    candidates: Int[np.ndarray, " unit"], num_anchors: int, slots: int
) -> Float[np.ndarray, "unit reach"]:
    """P(covered) of a token that 0, 1, ..., ``slots`` candidates reach, for each unit."""
    spared = np.maximum(candidates - num_anchors, 0)[:, None]
    missed = np.ones((len(candidates), slots + 1))
    left_out = _left_out(candidates[:, None], spared, np.arange(slots))
    np.cumprod(left_out, axis=1, out=missed[:, 1:])
    return 1 - missed


def _left_out(
    candidates: Int[np.ndarray, "unit 1"],
    spared: Int[np.ndarray, "unit 1"],
    before: Int[np.ndarray, " reach"],
) -> Float[np.ndarray, "unit reach"]:
    """The probability that a candidate is no anchor, given that ``before`` others are none."""
    return np.maximum(spared - before, 0) / np.maximum(candidates - before, 1)


def _sums_to_the_end(counts: Int[np.ndarray, "group place"]) -> Int[np.ndarray, "group place"]:
    """At each place, the sum from there to the end."""
    return counts[:, ::-1].cumsum(axis=1)[:, ::-1].copy()
