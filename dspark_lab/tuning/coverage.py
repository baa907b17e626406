"""How often each token is supervised, and whether at all: exact, for a whole data set at once.

A *run* is a longest stretch of supervised tokens within one document. All that training draws and
supervises follows from the runs:

    candidates: every token of a run but its last, so a run of L tokens holds L - 1;
    draw: n = min(num_anchors, C) of the C candidates of a row, without replacement;
    slot: the token at offset o of its run is at slot k of the block whose anchor stands at offset
        o - 1 - k, so it is reached from the min(o, block_size) candidates just before it;
    never a label: the first token of a run, which no anchor reaches.

Each candidate is drawn with probability n / C, so a token is expected n / C times at each slot at
which it is reached. One that c candidates reach is missed with the hypergeometric probability

    P(missed) = C(C - c, n) / C(C, n)

where C(a, b) is a binomial coefficient. Both depend on C and c alone, so tokens are counted by
these two and never looked at one by one. Where a row holds several documents, ``per="document"``
draws ``num_anchors`` in each document instead of in each row; for unpacked rows it is the same.

This file knows conversations, batches and counts; it knows nothing about models, text or plots.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, get_args

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from dspark_lab.blocks import draw_blocks, times_supervised
from dspark_lab.chats import Batch, Encoded, packed_places
from dspark_lab.checks import require_bool, require_int, require_number

__all__ = [
    "PER",
    "REASONS",
    "Per",
    "Spans",
    "Supervision",
    "anchors_needed",
    "coverage_table",
    "never_table",
    "packing_table",
    "reaching_anchors",
    "slot_table",
    "supervision",
    "supervision_table",
    "token_coverage",
    "token_supervision",
]

Per = Literal["row", "document"]
PER: tuple[Per, ...] = get_args(Per)

# Why a token can never be a label. The middle two are the "never a label" of token_table.
REASONS = ("prompt", "first of its run", "alone in its run", "cut off", "padding")


@dataclass(frozen=True, eq=False)
class Spans:
    """A data set as coverage sees it: where its supervised tokens are. All arrays are int64.

    ``document`` are the conversations in the given order (of a batch: row by row), ``run`` their
    runs in that order, and ``row`` what anchors are drawn from.

    ================= ==========================================================================
    run_document      [run] which document it belongs to
    run_start         [run] position of its first token in the document
    run_tokens        [run] how many supervised tokens it has, those beyond the cut included
    document_tokens   [document] its tokens, those beyond the cut included
    document_kept     [document] those before the cut, which are in the row
    document_row      [document] the row that it is in
    document_start    [document] position of its first token in the row
    document_domain   [document] index into ``domains``
    row_tokens        [row] tokens of the row, padding included
    domains           names, in order of appearance; "none" for conversations without one
    ================= ==========================================================================
    """

    run_document: Int[np.ndarray, " run"]
    run_start: Int[np.ndarray, " run"]
    run_tokens: Int[np.ndarray, " run"]
    document_tokens: Int[np.ndarray, " document"]
    document_kept: Int[np.ndarray, " document"]
    document_row: Int[np.ndarray, " document"]
    document_start: Int[np.ndarray, " document"]
    document_domain: Int[np.ndarray, " document"]
    row_tokens: Int[np.ndarray, " row"]
    domains: tuple[str, ...]

    @classmethod
    def of(
        cls,
        data: Batch | Encoded | Sequence[Encoded],
        *,
        seq_len: int | None = None,
        row_length: int | None = None,
    ) -> Spans:
        """The spans of conversations or of a batch.

        Args:
            data: a batch with its rows as they are, or conversations, each a row of its own.
            seq_len: cuts each conversation to its first ``seq_len`` tokens.
            row_length: packs the conversations into rows of that many tokens, exactly as
                :func:`dspark_lab.chats.pack` does.

        Raises:
            TypeError: ``data`` of another kind, or a length that is not an int.
            ValueError: no conversation, or one without tokens or longer than ``row_length``; a
                length below 1; a batch together with ``seq_len`` or ``row_length``.
        """
        for name, value in (("seq_len", seq_len), ("row_length", row_length)):
            if value is not None:
                require_int(name, value, 1)
        if isinstance(data, Batch):
            if seq_len is not None or row_length is not None:
                raise ValueError("a batch has its rows already: neither seq_len nor row_length")
            return cls._of_batch(data)
        encoded = [data] if isinstance(data, Encoded) else list(data)
        if not encoded:
            raise ValueError("data must hold at least one conversation, got none")
        for item in encoded:
            if not isinstance(item, Encoded):
                raise TypeError(f"data must be Encoded or a Batch, got {type(item).__name__}")
        tokens = np.array([item.loss_mask.numel() for item in encoded], dtype=np.int64)
        if not tokens.all():
            chat = encoded[int(tokens.argmin())].chat
            raise ValueError(f"conversation {chat.id!r} must have at least one token, got none")
        kept = tokens if seq_len is None else np.minimum(tokens, seq_len)
        row, start, row_tokens = np.arange(len(tokens)), np.zeros_like(tokens), kept
        if row_length is not None:
            longest = int(kept.argmax())
            if kept[longest] > row_length:
                raise ValueError(
                    f"conversation {encoded[longest].chat.id!r} has {kept[longest]} tokens, more "
                    f"than length {row_length} of a row; cut it with seq_len={row_length}"
                )
            row, start = packed_places(kept, row_length)
            row_tokens = np.full(row.max() + 1, row_length)
        domain, domains = pd.factorize(
            np.array([item.chat.domain or "none" for item in encoded], dtype=object)
        )
        return cls(
            *_runs(torch.cat([item.loss_mask for item in encoded]), tokens.cumsum() - tokens),
            document_tokens=tokens,
            document_kept=kept,
            document_row=row,
            document_start=start,
            document_domain=domain.astype(np.int64),
            row_tokens=row_tokens,
            domains=tuple(domains),
        )

    @classmethod
    def _of_batch(cls, batch: Batch) -> Spans:
        rows, seq_len = batch.loss_mask.shape
        lengths = batch.seq_lens.cpu().numpy()
        row, doc = np.nonzero(lengths)
        tokens = lengths[row, doc]
        start = (lengths.cumsum(axis=1) - lengths)[row, doc]
        return cls(
            *_runs(batch.loss_mask.flatten(), row * seq_len + start),
            document_tokens=tokens,
            document_kept=tokens,
            document_row=row,
            document_start=start,
            document_domain=np.zeros_like(row),
            row_tokens=np.full(rows, seq_len),
            domains=("none",),
        )

    @property
    def rows(self) -> int:
        """How many rows there are."""
        return len(self.row_tokens)

    @property
    def documents(self) -> int:
        """How many conversations there are."""
        return len(self.document_tokens)

    @cached_property
    def run_kept(self) -> Int[np.ndarray, " run"]:
        """How many tokens of each run are before the cut."""
        room = self.document_kept[self.run_document] - self.run_start
        return np.clip(room, 0, self.run_tokens)

    @cached_property
    def supervised(self) -> int:
        """How many supervised tokens are in the rows."""
        return int(self.run_kept.sum())

    @cached_property
    def idle_documents(self) -> int:
        """How many documents hold no candidate: training learns nothing from them."""
        return self.documents - len(np.unique(self.run_document[self.run_kept > 1]))

    def unit(self, per: Per) -> Int[np.ndarray, " document"]:
        """Which of the units that anchors are drawn from each document belongs to.

        Raises:
            ValueError: ``per`` is not one of ``PER``.
        """
        _require_per(per)
        return self.document_row if per == "row" else np.arange(self.documents)

    def candidates(self, per: Per) -> Int[np.ndarray, " unit"]:
        """How many candidates each unit has."""
        units = self.rows if per == "row" else self.documents
        run_unit = self.unit(per)[self.run_document]
        return _summed(run_unit, np.maximum(self.run_kept - 1, 0), units)

    def groups(self, per: Per) -> _Groups:
        """The runs as a choice of anchors sees them, worked out once."""
        _require_per(per)
        return self._row_groups if per == "row" else self._document_groups

    @cached_property
    def _row_groups(self) -> _Groups:
        return _Groups.of(self, "row")

    @cached_property
    def _document_groups(self) -> _Groups:
        return _Groups.of(self, "document")


@dataclass(frozen=True, eq=False)
class Supervision:
    """What one pass over a data set supervises, in expectation over the draws.

    ``rows``, ``supervised`` (tokens) and ``labels`` (supervised tokens that some draw supervises)
    describe the data; ``expected_by_slot`` is the number of supervised slots k = 0, 1, ... of all
    blocks, and ``covered`` the number of different tokens that are supervised at all.
    """

    num_anchors: int
    block_size: int
    gamma: float
    per: Per
    rows: int
    supervised: int
    labels: int
    expected_by_slot: Float[np.ndarray, " slot"]
    covered: float

    @property
    def expected(self) -> float:
        """How many slots are supervised."""
        return float(self.expected_by_slot.sum())

    @property
    def weights(self) -> Float[np.ndarray, " slot"]:
        """w_k = exp(-k / gamma), what slot k weighs in the loss (DSpark, section 3.4)."""
        return _weights(self.block_size, self.gamma)

    @property
    def weighted(self) -> float:
        """The summed weight of the supervised slots."""
        return float(self.expected_by_slot @ self.weights)

    @property
    def share(self) -> float:
        """The share of supervised tokens that are covered; NaN where there is none."""
        return self.covered / self.supervised if self.supervised else float("nan")

    @property
    def times(self) -> float:
        """How often a supervised token is supervised, on average; NaN where there is none."""
        return self.expected / self.supervised if self.supervised else float("nan")

    @property
    def blocks(self) -> float:
        """Kept blocks per row: slot 0 of each is supervised, and of no other."""
        return float(self.expected_by_slot[0]) / self.rows


def supervision(
    data: Spans | Batch | Encoded | Sequence[Encoded],
    num_anchors: int,
    block_size: int,
    *,
    gamma: float = 4.0,
    per: Per = "row",
) -> Supervision:
    """What one pass over the data supervises, in closed form.

    Args:
        data: spans, made once for many choices, or what they are made of.
        num_anchors: drawn in each unit, all of its candidates where there are fewer.
        block_size: slots per block.
        gamma: of the weights w_k = exp(-k / gamma), in slots.
        per: the unit, ``"row"`` or ``"document"``.

    Raises:
        TypeError, ValueError: a count that is not an int of at least 1, ``gamma`` not a number
            above 0, ``per`` not one of ``PER``, or what :meth:`Spans.of` refuses.
    """
    return _Reach.of(_spans(data), block_size, per).supervision(num_anchors, gamma)


def supervision_table(
    data: Spans | Batch | Encoded | Sequence[Encoded],
    num_anchors: Sequence[int] = (4, 8, 16, 32, 64, 128),
    block_sizes: Sequence[int] = (4, 7, 15),
    *,
    gamma: float = 4.0,
    per: Per | Sequence[Per] = "row",
    by_domain: bool = False,
) -> pd.DataFrame:
    """What one pass over the data supervises, for each choice.

    Returns:
        one line per unit, block size, anchor count and, if asked, domain: ``per``, ``block_size``,
        ``num_anchors``, (``domain``,) ``blocks`` (kept per row), ``supervised`` (tokens),
        ``labels`` (of these, those that can be one), ``expected`` (supervised slots), ``weighted``
        (their summed weight), ``covered`` (tokens supervised at all), ``share`` (covered over
        supervised) and ``times`` (expected over supervised), all of them exact expectations.

    Raises:
        TypeError, ValueError: as :func:`supervision`.
    """
    spans = _spans(data)
    lines = []
    for unit in [per] if isinstance(per, str) else per:
        for block_size in block_sizes:
            reach = _Reach.of(spans, block_size, unit)
            for anchors in num_anchors:
                for domain, name in enumerate(spans.domains) if by_domain else [(None, "all")]:
                    found = reach.supervision(anchors, gamma, domain)
                    lines.append(
                        {
                            "per": unit,
                            "block_size": block_size,
                            "num_anchors": anchors,
                            "domain": name,
                            "blocks": found.blocks,
                            "supervised": found.supervised,
                            "labels": found.labels,
                            "expected": found.expected,
                            "weighted": found.weighted,
                            "covered": found.covered,
                            "share": found.share,
                            "times": found.times,
                        }
                    )
    table = pd.DataFrame(lines)
    return table if by_domain else table.drop(columns="domain")


def slot_table(
    data: Spans | Batch | Encoded | Sequence[Encoded],
    num_anchors: int,
    block_size: int,
    *,
    gamma: float = 4.0,
    per: Per = "row",
) -> pd.DataFrame:
    """What one pass over the data supervises at each slot.

    Returns:
        one line per slot: ``slot``, ``weight`` (w_k), ``expected`` (supervised slots), ``weighted``
        and ``most`` (supervised slots if every candidate were an anchor).

    Raises:
        TypeError, ValueError: as :func:`supervision`.
    """
    reach = _Reach.of(_spans(data), block_size, per)
    found = reach.supervision(num_anchors, gamma)
    return pd.DataFrame(
        {
            "slot": np.arange(block_size),
            "weight": found.weights,
            "expected": found.expected_by_slot,
            "weighted": found.expected_by_slot * found.weights,
            "most": reach.slots.sum(axis=0),
        }
    )


def never_table(
    data: Spans | Batch | Encoded | Sequence[Encoded], *, by_domain: bool = False
) -> pd.DataFrame:
    """How many tokens can never be a label, whatever is drawn, and why.

    *Prompt* is everything that is not supervised. The first token of a run of two or more is an
    anchor, but no anchor stands before it; one alone in its run is neither. *Cut off* are the
    supervised tokens beyond ``seq_len``. *Padding* fills rows up.

    Returns:
        one line per reason (and domain: without padding, which has none): (``domain``,) ``reason``,
        one of ``REASONS``, ``tokens``, ``of_tokens`` (share of all tokens, padding and what was cut
        off included), ``of_supervised`` (share of supervised tokens, what was cut off included; NaN
        for prompt and padding) and ``documents`` (that hold such a token; 0 for padding).

    Raises:
        TypeError, ValueError: what :meth:`Spans.of` refuses.
    """
    spans = _spans(data)
    kept, run_document, documents = spans.run_kept, spans.run_document, spans.documents
    supervised = _summed(run_document, spans.run_tokens, documents)
    counts = {
        "prompt": spans.document_tokens - supervised,
        "first of its run": _summed(run_document, kept > 1, documents),
        "alone in its run": _summed(run_document, kept == 1, documents),
        "cut off": _summed(run_document, spans.run_tokens - kept, documents),
    }
    padding = int(spans.row_tokens.sum() - spans.document_kept.sum())
    lines = []
    for domain, name in enumerate(spans.domains) if by_domain else [(None, "all")]:
        of_domain = slice(None) if domain is None else spans.document_domain == domain
        tokens = int(spans.document_tokens[of_domain].sum()) + (0 if by_domain else padding)
        answers = int(supervised[of_domain].sum())
        for reason in REASONS[:-1] if by_domain else REASONS:
            in_document = counts[reason][of_domain] if reason in counts else np.zeros(0, np.int64)
            count = padding if reason == "padding" else int(in_document.sum())
            outside = reason in ("prompt", "padding") or not answers
            lines.append(
                {
                    "domain": name,
                    "reason": reason,
                    "tokens": count,
                    "of_tokens": count / tokens,
                    "of_supervised": float("nan") if outside else count / answers,
                    "documents": int((in_document > 0).sum()),
                }
            )
    table = pd.DataFrame(lines)
    return table if by_domain else table.drop(columns="domain")


def token_supervision(
    data: Spans | Batch | Encoded | Sequence[Encoded],
    num_anchors: int,
    block_size: int,
    *,
    document: int | None = None,
    gamma: float = 4.0,
    per: Per = "row",
) -> pd.DataFrame:
    """How often each token is supervised, at each slot, and whether at all.

    Args:
        data, num_anchors, block_size, gamma, per: as :func:`supervision`.
        document: the tokens of this document alone; of all documents where left out, which takes
            memory for each token of the data set.

    Returns:
        one line per token, those beyond the cut included: ``document``, ``position`` in it,
        ``supervised``, ``anchors`` (from how many candidates it is reached), ``slot_0``,
        ``slot_1``, ... (expected times at each slot), ``times`` (their sum), ``weighted`` (summed
        weight), ``p_covered`` (probability that it is supervised at all) and ``reason`` (why it can
        never be a label, one of ``REASONS``; empty where it can).

    Raises:
        TypeError, ValueError: as :func:`supervision`, or ``document`` not one of the data's.
    """
    spans = _spans(data)
    require_int("num_anchors", num_anchors, 1)
    require_int("block_size", block_size, 1)
    weights = _weights(block_size, gamma)
    unit, candidates = spans.unit(per), spans.candidates(per)
    runs, first, end = np.arange(len(spans.run_document)), 0, spans.documents
    if document is not None:
        require_int("document", document, 0)
        if document >= spans.documents:
            raise ValueError(f"document must lie in [0, {spans.documents - 1}], got {document}")
        first, end = document, document + 1
        runs = runs[slice(*np.searchsorted(spans.run_document, (first, end)))]
    tokens = spans.document_tokens[first:end]
    lines = tokens.cumsum() - tokens
    run, offset = _tokens_of(runs, spans.run_tokens)
    in_document = spans.run_document[run]
    line = lines[in_document - first] + spans.run_start[run] + offset
    kept = spans.run_kept[run]
    anchors = np.where(offset < kept, np.minimum(offset, block_size), 0)
    reason = np.select(
        [offset >= kept, offset > 0, kept > 1],
        ["cut off", "", "first of its run"],
        "alone in its run",
    )
    # A unit that the document does not draw from is not worked out.
    drawn_from, place = np.unique(unit[in_document], return_inverse=True)
    size = candidates[drawn_from]
    drawn = _drawn(size, num_anchors)[place]
    covered = _covered(size, num_anchors, block_size)[place, anchors]
    slots = (np.arange(block_size) < anchors[:, None]) * drawn[:, None]

    def spread(values: np.ndarray, otherwise: object) -> np.ndarray:
        filled = np.full((int(tokens.sum()), *values.shape[1:]), otherwise, dtype=values.dtype)
        filled[line] = values
        return filled

    times = spread(slots, 0)
    return pd.DataFrame(
        {
            "document": np.repeat(np.arange(first, end), tokens),
            "position": np.arange(tokens.sum()) - np.repeat(lines, tokens),
            "supervised": spread(np.ones(len(line), dtype=bool), False),
            "anchors": spread(anchors, 0),
            **{f"slot_{slot}": times[:, slot] for slot in range(block_size)},
            "times": times.sum(axis=1),
            "weighted": times @ weights,
            "p_covered": spread(covered, 0),
            "reason": spread(reason.astype(object), "prompt"),
        }
    )


def reaching_anchors(batch: Batch, block_size: int) -> Int[Tensor, "batch seq"]:
    """From how many candidate anchors a block of ``block_size`` slots supervises each token.

    Raises:
        TypeError, ValueError: ``block_size`` is not an int of at least 1.
    """
    require_int("block_size", block_size, 1)
    spans = Spans.of(batch)
    run, offset = _tokens_of(np.arange(len(spans.run_kept)), spans.run_kept)
    return _on_batch(batch, spans, run, offset, np.minimum(offset, block_size))


def token_coverage(batch: Batch, num_anchors: int, block_size: int) -> Float[Tensor, "batch seq"]:
    """The probability that a token is covered by one draw of ``num_anchors`` anchors in its row.

    Returns:
        float64 in [0, 1]; 0 on tokens that are not supervised or never a label.

    Raises:
        TypeError, ValueError: ``num_anchors`` or ``block_size`` is not an int of at least 1.
    """
    require_int("block_size", block_size, 1)
    spans = Spans.of(batch)
    covered = _covered(spans.candidates("row"), num_anchors, block_size)
    run, offset = _tokens_of(np.arange(len(spans.run_kept)), spans.run_kept)
    row = spans.document_row[spans.run_document[run]]
    return _on_batch(batch, spans, run, offset, covered[row, np.minimum(offset, block_size)])


def coverage_table(
    batch: Batch,
    num_anchors: Sequence[int] = (4, 8, 16, 32, 64, 128),
    block_sizes: Sequence[int] = (4, 7, 15),
    *,
    draws: int = 1,
    seed: int = 0,
) -> pd.DataFrame:
    """The share of supervised tokens that one pass over ``batch`` covers, for each choice.

    Returns:
        one line per block size and anchor count: ``block_size``, ``num_anchors``, ``blocks`` (kept
        blocks per row, mean), ``expected`` (closed form), ``sampled`` (mean over ``draws`` draws),
        and ``supervisions`` (expected number of supervised slots per supervised token).

    Raises:
        TypeError, ValueError: a count that is not an int of at least 1; no supervised token at all.
    """
    require_int("draws", draws, 1)
    spans = _some_supervised(Spans.of(batch))
    lines = []
    for block_size in block_sizes:
        reach = _Reach.of(spans, block_size, "row")
        for anchors in num_anchors:
            covered = sum(
                int((times_supervised(blocks) > 0).sum())
                for blocks in (
                    draw_blocks(batch, anchors, block_size, seed=seed + draw)
                    for draw in range(draws)
                )
            )
            found = reach.supervision(anchors)
            lines.append(
                {
                    "block_size": block_size,
                    "num_anchors": anchors,
                    "blocks": found.blocks,
                    "expected": found.share,
                    "sampled": covered / draws / found.supervised,
                    "supervisions": found.times,
                }
            )
    return pd.DataFrame(lines)


def packing_table(
    encoded: Sequence[Encoded],
    row_lengths: Sequence[int] = (1024, 4096),
    num_anchors: Sequence[int] = (16, 32, 64, 128, 256, 512),
    *,
    block_size: int = 7,
) -> pd.DataFrame:
    """What packing does to coverage when ``num_anchors`` counts per row, and when per document.

    Per document, coverage is that of unpacked rows, whatever the row's length.

    Returns:
        one line per kind of row and anchor count: ``row`` (as text), ``anchors per`` (``document``
        or ``row``), ``documents`` (per row, mean), ``num_anchors`` and ``expected``.

    Raises:
        TypeError, ValueError: as :func:`coverage_table`, or what :meth:`Spans.of` refuses.
    """
    rows: dict[str, tuple[Spans, Per]] = {"unpacked": (Spans.of(encoded), "document")}
    rows |= {f"packed, {n}": (Spans.of(encoded, row_length=n), "row") for n in row_lengths}
    lines = []
    for row, (spans, per) in rows.items():
        reach = _Reach.of(_some_supervised(spans), block_size, per)
        for anchors in num_anchors:
            lines.append(
                {
                    "row": row,
                    "anchors per": per,
                    "documents": spans.documents / spans.rows,
                    "num_anchors": anchors,
                    "expected": reach.supervision(anchors).share,
                }
            )
    return pd.DataFrame(lines)


def anchors_needed(
    data: Spans | Batch | Encoded | Sequence[Encoded],
    goals: Sequence[float] = (0.5, 0.8, 0.9, 0.95),
    block_sizes: Sequence[int] = (4, 7, 15),
    *,
    per: Per = "row",
) -> pd.DataFrame:
    """The smallest ``num_anchors`` whose expected coverage reaches a goal.

    Returns:
        one line per block size and goal: ``block_size``, ``goal``, ``num_anchors`` (missing where
        no number reaches it), ``expected`` at that number, and ``ceiling``, the coverage when every
        candidate is an anchor.

    Raises:
        ValueError: a goal outside (0, 1]; no supervised token at all.
    """
    spans = _some_supervised(_spans(data))
    lines = []
    for block_size in block_sizes:
        reach = _Reach.of(spans, block_size, per)

        def share(anchors: int, reach: _Reach = reach) -> float:
            return reach.supervision(anchors).share

        most = max(1, int(reach.candidates.max()))
        ceiling = share(most)
        for goal in goals:
            if not 0 < goal <= 1:
                raise ValueError(f"each goal must lie in (0, 1], got {goal}")
            enough = None
            if goal <= ceiling:
                enough = 1 + bisect_left(range(1, most), goal, key=share)
            lines.append(
                {
                    "block_size": block_size,
                    "goal": goal,
                    "num_anchors": enough,
                    "expected": share(enough) if enough else np.nan,
                    "ceiling": ceiling,
                }
            )
    return pd.DataFrame(lines).astype({"num_anchors": "Int64"})


@dataclass(frozen=True, eq=False)
class _Groups:
    """The runs, put together where their units have as many candidates and their domain is one."""

    candidates: Int[np.ndarray, " group"]
    domain: Int[np.ndarray, " group"]
    run_group: Int[np.ndarray, " run"]
    run_length: Int[np.ndarray, " run"]

    @classmethod
    def of(cls, spans: Spans, per: Per) -> _Groups:
        inside = spans.run_kept > 0
        document = spans.run_document[inside]
        candidates = spans.candidates(per)[spans.unit(per)[document]]
        key = candidates * len(spans.domains) + spans.document_domain[document]
        groups, run_group = np.unique(key, return_inverse=True)
        candidates, domain = np.divmod(groups, len(spans.domains))
        return cls(candidates, domain, run_group.ravel(), spans.run_kept[inside])


@dataclass(frozen=True, eq=False)
class _Reach:
    """How many tokens of each group c candidates reach, and slots there are to supervise them."""

    per: Per
    rows: int
    candidates: Int[np.ndarray, " group"]
    domain: Int[np.ndarray, " group"]
    tokens: Int[np.ndarray, "group reach"]
    slots: Int[np.ndarray, "group slot"]

    @classmethod
    def of(cls, spans: Spans, block_size: int, per: Per) -> _Reach:
        require_int("block_size", block_size, 1)
        groups = spans.groups(per)
        count, width = len(groups.candidates), block_size + 1
        last = groups.run_length - 1
        cell = groups.run_group * width + np.minimum(last, block_size)
        ends = np.bincount(cell, minlength=count * width).reshape(count, width)
        # A run has a token at each offset up to its last; those from block_size on are alike.
        tokens = _from_behind(ends)
        tokens[:, -1] += _summed(groups.run_group, np.maximum(last - block_size, 0), count)
        # A token that c candidates reach is the label of slots 0 to c - 1.
        slots = _from_behind(tokens)[:, 1:]
        return cls(per, spans.rows, groups.candidates, groups.domain, tokens, slots)

    def supervision(
        self, num_anchors: int, gamma: float = 4.0, domain: int | None = None
    ) -> Supervision:
        block_size = self.slots.shape[1]
        drawn = _drawn(self.candidates, num_anchors)
        covered = (self.tokens * _covered(self.candidates, num_anchors, block_size)).sum(axis=1)
        counted = (np.ones(len(drawn)) if domain is None else self.domain == domain).astype(float)
        _require_gamma(gamma)
        return Supervision(
            num_anchors=num_anchors,
            block_size=block_size,
            gamma=gamma,
            per=self.per,
            rows=self.rows,
            supervised=int(counted @ self.tokens.sum(axis=1)),
            labels=int(counted @ self.slots[:, 0]),
            expected_by_slot=(counted * drawn) @ self.slots,
            covered=float(counted @ covered),
        )


def _require_gamma(gamma: float) -> None:
    require_number("gamma", gamma)
    if not gamma > 0:
        raise ValueError(f"gamma must be > 0, got {gamma}")


def _require_per(per: Per) -> None:
    if per not in PER:
        raise ValueError(f"per must be one of {PER}, got {per!r}")


def _spans(data: Spans | Batch | Encoded | Sequence[Encoded]) -> Spans:
    return data if isinstance(data, Spans) else Spans.of(data)


def _some_supervised(spans: Spans) -> Spans:
    if spans.supervised == 0:
        raise ValueError("coverage needs a supervised token, got data without one")
    return spans


def _runs(
    loss_mask: Shaped[Tensor, " token"], starts: Int[np.ndarray, " document"]
) -> tuple[Int[np.ndarray, " run"], Int[np.ndarray, " run"], Int[np.ndarray, " run"]]:
    """Document, start in it, and length of each run; documents stand one after the other."""
    require_bool("loss_mask", loss_mask)
    mask = loss_mask.cpu().numpy()
    edges = np.flatnonzero(mask[1:] != mask[:-1]) + 1
    edges = np.concatenate([[0] if mask[0] else [], edges, [len(mask)] if mask[-1] else []])
    # A run ends with its document, though the next one may begin with a supervised token.
    later = starts[1:]
    split = later[mask[later - 1] & mask[later]]
    first, stop = (
        np.sort(np.concatenate([edges[side::2], split])).astype(np.int64) for side in (0, 1)
    )
    document = np.searchsorted(starts, first, side="right") - 1
    return document, first - starts[document], stop - first


def _tokens_of(
    runs: Int[np.ndarray, " chosen"], lengths: Int[np.ndarray, " run"]
) -> tuple[Int[np.ndarray, " token"], Int[np.ndarray, " token"]]:
    """Run and offset in it of each token of the chosen runs."""
    count = lengths[runs]
    offset = np.arange(count.sum()) - np.repeat(count.cumsum() - count, count)
    return np.repeat(runs, count), offset


def _on_batch(
    batch: Batch,
    spans: Spans,
    run: Int[np.ndarray, " token"],
    offset: Int[np.ndarray, " token"],
    values: Shaped[np.ndarray, " token"],
) -> Shaped[Tensor, "batch seq"]:
    """The values at their tokens' places, 0 elsewhere."""
    document = spans.run_document[run]
    grid = np.zeros(batch.loss_mask.shape, dtype=values.dtype)
    column = spans.document_start[document] + spans.run_start[run] + offset
    grid[spans.document_row[document], column] = values
    return torch.from_numpy(grid).to(batch.loss_mask.device)


def _drawn(candidates: Int[np.ndarray, " unit"], num_anchors: int) -> Float[np.ndarray, " unit"]:
    """The probability of each candidate to be an anchor."""
    require_int("num_anchors", num_anchors, 1)
    return np.minimum(candidates, num_anchors) / np.maximum(candidates, 1)


def _covered(
    candidates: Int[np.ndarray, " unit"], num_anchors: int, block_size: int
) -> Float[np.ndarray, "unit reach"]:
    """P(covered) of a token that 0, 1, ..., ``block_size`` candidates reach, for each unit."""
    require_int("num_anchors", num_anchors, 1)
    total = candidates[:, None]
    spared = np.maximum(total - num_anchors, 0)
    already = np.arange(block_size)
    # Missing c candidates in turn: each is left out of what the earlier ones left over.
    left_out = np.maximum(spared - already, 0) / np.maximum(total - already, 1)
    missed = np.ones((len(candidates), block_size + 1))
    np.cumprod(left_out, axis=1, out=missed[:, 1:])
    return 1 - missed


def _weights(block_size: int, gamma: float) -> Float[np.ndarray, " slot"]:
    _require_gamma(gamma)
    return np.exp(-np.arange(block_size) / gamma)


def _summed(
    place: Int[np.ndarray, " item"], values: Shaped[np.ndarray, " item"], places: int
) -> Int[np.ndarray, " place"]:
    """The values added up place by place; exact, since sums stay far below 2^53."""
    return np.bincount(place, values, places).astype(np.int64)


def _from_behind(counts: Int[np.ndarray, "group place"]) -> Int[np.ndarray, "group place"]:
    """At each place, the sum from there to the end."""
    return counts[:, ::-1].cumsum(axis=1)[:, ::-1].copy()
