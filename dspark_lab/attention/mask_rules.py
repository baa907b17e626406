"""The rules of a training mask, each with what breaks it.

What must be hidden is a table of intervals of keys. What is missing of the context has to lie
outside of one interval that all blocks share, what is missing of the own blocks has to be one of a
table of patterns; or else just a part is missing.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Literal

import numpy as np

from dspark_lab.attention.findings import Finding, Mark, Report
from dspark_lab.attention.given_mask import GivenMask, Runs
from dspark_lab.attention.seats import Seats

Variant = Literal["causal", "hidden_dummies", "window"]

_CONTEXT = "the context before the anchor is visible"
_ANCHOR = "the anchor itself is hidden"
_AFTER = "what follows the anchor is hidden"
_DOCUMENTS = "other documents are hidden"
_PADDING = "padding is hidden"
_WINDOW = "the context is cut off at the window"
_DUMMY_CONTEXT = "dummy blocks see no context"
_OWN = "a block sees all of itself, in both directions"
_OTHERS = "other blocks are hidden"
_END = "nothing is visible behind the last slot"
_DUMMY_OWN = "dummy blocks see themselves"
_EMPTY = "every slot sees something"


@dataclass(frozen=True)
class SeatedMask:
    """A mask as runs of keys, beside where its queries belong and what is meant."""

    mask: GivenMask
    runs: Runs
    seats: Seats
    variants: Collection[Variant] | None
    report: Report

    def meant(self, variant: Variant) -> Mark:
        """The verdict on a variant that was found."""
        return "variant" if self.variants is None or variant in self.variants else "broken"

    def asked(self, variant: Variant) -> bool:
        return self.variants is not None and variant in self.variants


def rule_findings(view: SeatedMask) -> Iterator[Finding]:
    yield from _context(view)
    yield from _intervals(view)
    yield from _own_blocks(view)
    kept, report = view.seats.kept, view.report
    empty = kept & (view.runs.count(0, view.runs.stride) == 0)
    if empty.any():
        yield report.found(_EMPTY, "a slot sees nothing at all: its softmax is NaN", empty, kept)
    else:
        yield report.held(_EMPTY, kept)


def _intervals(view: SeatedMask) -> Iterator[Finding]:
    """What must be hidden and is not: the first key and the number of an interval's keys."""
    seats, runs, report = view.seats, view.runs, view.report
    kept, start, past = seats.kept, seats.start, seats.past
    slots, end = view.mask.seq_len, view.mask.keys
    after = seats.anchor + 1
    text, padding = np.minimum(seats.text, start), np.maximum(seats.padding, after)
    padded = kept & ((seats.text > 0) | (seats.padding < slots))
    before = "an earlier document is visible"
    if not runs.count(text, start - 1)[kept].any():
        before = "the context begins one token early, in the document before"
    earlier, later = (slots, slots + seats.slot_first), (slots + seats.slot_past, end)
    sides = [side for side, at in (("earlier", earlier), ("later", later)) if runs.count(*at).any()]
    others = f"{sides[0] if len(sides) == 1 else 'other'} blocks are visible"
    # Dummy blocks that see the context of their anchor.
    near = (runs.count(seats.anchor - 2, seats.anchor) > 0) | kept | (seats.anchor <= seats.low)
    ignored = near.all() and not (kept | (seats.anchor <= seats.low)).all()
    dummies = f"dummy blocks see context{', as if they were kept' if ignored else ''}"
    table: list[tuple[str, Any, str, list[tuple[Any, Any]]]] = [
        (_ANCHOR, kept, "the context includes the anchor", [(seats.anchor, after)]),
        (_AFTER, kept, "tokens after the anchor are visible", [(after, past.clip(None, padding))]),
        (_DOCUMENTS, kept, before, [(text, start)]),
        (_DOCUMENTS, kept, "a later document is visible", [(past, padding)]),
        (_PADDING, padded, "padding is visible", [(0, text), (padding, slots)]),
        (_DUMMY_CONTEXT, ~kept, dummies, [(0, slots)]),
        (_OTHERS, np.ones_like(kept), others, [earlier, later]),
    ]
    if view.mask.extra:
        behind = "keys behind the last slot are visible"
        table.append((_END, np.ones_like(kept), behind, [(end, runs.stride)]))
    for rule, cases in groupby(table, key=lambda case: case[0]):
        held, among = True, kept
        for _, among, name, intervals in cases:
            count = sum(runs.count(*interval) for interval in intervals) * among
            if count.any():
                firsts = np.stack([runs.first(*interval) for interval in intervals])
                key = np.where(firsts < 0, runs.stride, firsts).min(0)
                held = False
                yield report.found(rule, name, count > 0, among, key, pairs=count.sum())
        if held:
            yield report.held(rule, among)


@dataclass(frozen=True)
class _Fit:
    """A context that begins ``late``, ends ``short``, and is cut off at a window."""

    late: int = 0
    short: int = 0
    window: int | None = None
    of_anchor: bool = False  # the window is that of the anchor, not of each slot


def _context(view: SeatedMask) -> Iterator[Finding]:
    """What is missing of the context, and what a window should cut off."""
    seats, runs, report, wanted = view.seats, view.runs, view.report, view.seats.window
    asked = seats.kept & (seats.anchor > seats.start)
    bound = asked & (seats.low > seats.start)
    missing = np.where(asked, seats.anchor - seats.low - runs.count(seats.low, seats.anchor), 0)
    beyond = runs.count(seats.start, seats.low) * asked
    found: list[Finding] = []

    def broken(rule: str, name: str, flags: np.ndarray, key: Any = None, **more: Any) -> None:
        if flags.any():
            found.append(report.found(rule, name, flags, asked, key, **more))

    first = runs.first(seats.start, seats.anchor)
    if not missing.any() and not beyond.any():
        if wanted is None and view.asked("window") and seats.kept.any():
            found.append(Finding(_WINDOW, "broken", "no window is seen, one was asked for"))
    elif (fit := _fit(view, asked)) is None:
        gone = asked & (runs.count(seats.start, seats.anchor) == 0)
        part = "no context is visible" if (gone == asked).all() else "part of the context is hidden"
        broken(_CONTEXT, part, missing > 0, runs.hidden(seats.low), pairs=missing.sum())
        broken(
            _WINDOW, "context beyond the window is visible", beyond > 0, first, pairs=beyond.sum()
        )
    else:
        tokens = {n: f"{n} tokens" if n > 1 else "one token" for n in (fit.short, fit.late)}
        if fit.short:
            short = f"the context ends {tokens[fit.short]} short"
            broken(_CONTEXT, short, missing > 0, seats.anchor - 1)
        if fit.late:
            late = f"the context begins {tokens[fit.late]} late"
            broken(_CONTEXT, late, asked & (seats.low < seats.start + fit.late), seats.start)
        low = seats.anchor + (0 if fit.of_anchor else seats.slot) + 1 - (fit.window or 0)
        cut, edge = asked & (low > seats.start), np.maximum(low - 1, seats.start)
        if fit.window is None:
            broken(_WINDOW, f"the window of {wanted} is not applied", bound, first)
        elif fit.of_anchor:
            odd = f"a window of {fit.window} is counted from the anchor, not from each slot"
            broken(_WINDOW, odd, cut, edge)
        elif wanted is None:
            named = f"the context is cut off at a window of {fit.window}"
            broken(_WINDOW, named, cut, edge, verdict=view.meant("window"))
        elif fit.window != wanted:
            broken(_WINDOW, f"the window is {fit.window}, not {wanted}", cut | bound)
    for rule in (_CONTEXT, _WINDOW):
        if not any(finding.rule == rule for finding in found) and (rule, wanted) != (_WINDOW, None):
            found.append(report.held(rule, seats.kept))
    yield from found


def _fit(view: SeatedMask, asked: np.ndarray) -> _Fit | None:
    """The one way to begin and end that gives each query just the context that it sees."""
    seats, runs = view.seats, view.runs
    begin = runs.first(seats.start, seats.anchor)
    end = np.minimum(runs.hidden(begin), seats.anchor)
    number = runs.count(seats.start, seats.anchor)
    of = seats.start, seats.anchor, seats.slot, begin, end, number
    start, anchor, slot, begin, end, number = (values[asked] for values in of)
    seen = number > 0
    if not seen.any() or (end - begin != number)[seen].any():
        return None
    short, late = int((anchor - end)[seen][0]), int((begin - start)[seen].min())
    ways = [(late, ""), (0, "slot"), (late, "slot"), (0, "anchor"), (late, "anchor")]
    # Contexts of one length cannot tell a late begin from a window: late by much is a window.
    if late and len(np.unique(anchor - start)) == 1:
        ways = [(0, "slot"), (late, "")]
    for begins, window_of in ways:
        low, window = start + begins, None
        if window_of:
            reach = anchor + 1 + (slot if window_of == "slot" else 0)
            bound = seen & (begin > low)
            if bound.any():
                window = int((reach - begin)[bound][0])
            elif not seen.all():  # cut off whole, at the least
                window = int((reach - anchor + short)[~seen].min())
            else:
                continue
            low = np.maximum(low, reach - window)
        length = np.clip(anchor - short - low, 0, None)
        if (length == number).all() and (low == begin)[seen].all():
            return _Fit(begins, short, window, window_of == "anchor")
    return None


def _own_blocks(view: SeatedMask) -> Iterator[Finding]:
    """What is missing of the own blocks, as [row, own block, slot, other slot]."""
    mask, seats, report = view.mask, view.seats, view.report
    size = int((seats.slot_past - seats.slot_first).max())
    blocks = -(-mask.queries // size)

    def by_block(flags: np.ndarray) -> np.ndarray:
        """[row, query, ...] by blocks, of which the last may be cut off."""
        more = [(0, 0)] * (flags.ndim - 2)
        padded = np.pad(flags, [(0, 0), (0, blocks * size - mask.queries), *more])
        return padded.reshape(mask.rows, blocks, size, *flags.shape[2:])

    first = mask.seq_len + seats.slot_first
    seen = [view.runs.count(first + slot, first + slot + 1) > 0 for slot in range(size)]
    there = by_block(np.ones_like(seats.kept))
    inside = there[..., None] & there[..., None, :]
    own, kept = by_block(np.stack(seen, 2)) & inside, by_block(seats.slot_kept)[..., None] & inside
    dummy = inside & ~kept
    slot, other = np.indices((size, size))

    def found(rule: str, name: str, pairs: np.ndarray, verdict: Mark = "broken") -> Finding:
        flags, place = pairs.any(3), pairs.argmax(3)
        flags, place = (v.reshape(mask.rows, -1)[:, : mask.queries] for v in (flags, place))
        among = seats.slot_kept == (rule == _OWN)
        return report.found(
            rule, name, flags, among, first + place, pairs=pairs.sum(), verdict=verdict
        )

    patterns = {
        "a block does not see itself": slot >= 0,
        "each slot sees itself alone of its block": slot != other,
        "blocks are causal": slot < other,
        "blocks are causal against their order": slot > other,
        "slots do not see themselves": slot == other,
    }
    patterns |= {f"slot {k} is hidden from its own block": other == k for k in range(size)}
    patterns |= {f"slot {k} sees nothing of its block": slot == k for k in range(size)}
    unseen, later = kept & ~own, kept & (other > slot)
    left, causal = unseen.copy(), False
    for name, pattern in patterns.items():
        part = pattern & kept
        whole = (unseen | ~part).all((2, 3)) & (left & part).any((2, 3))
        pairs = unseen & part & whole[..., None, None]
        verdict: Mark = "broken"
        left &= ~pairs
        if name == "blocks are causal" and pairs.any():
            causal = True
            if (whole == later.any((2, 3))).all():
                name, verdict = "blocks are causal, as JetSpec's", view.meant("causal")
            else:
                name = "some blocks are causal"
        if pairs.any():
            yield found(_OWN, name, pairs, verdict)
    if left.any():
        yield found(_OWN, "part of the own block is hidden", left)
    if view.asked("causal") and not causal and later.any():
        yield found(_OWN, "blocks see both directions, causal ones were asked for", later)
    elif not unseen.any():
        yield report.held(_OWN, seats.slot_kept)

    if not kept.any() and (own == (inside & (other <= slot))).all() and size > 1:
        causal_dummies = view.meant("causal")
        yield found(_DUMMY_OWN, "dummy blocks are causal", inside & ~own, causal_dummies)
        return
    # What is odd about kept blocks is said of them, and no second time of dummies.
    alike = (own | ~inside).all((2, 3))
    for shape in np.unique(own[kept.any((2, 3))], axis=0):
        alike |= (own == (shape & inside)).all((2, 3))
    odd, some = dummy & ~alike[..., None, None], own.any((2, 3))[..., None, None]
    if (odd & some).any():
        yield found(_DUMMY_OWN, "dummy blocks see part of themselves alone", odd & some & ~own)
    if (odd & ~some).any():
        verdict = view.meant("hidden_dummies")
        yield found(_DUMMY_OWN, "dummy blocks do not see themselves", odd & ~some, verdict)
    elif view.asked("hidden_dummies") and dummy.any():
        what = "dummy blocks see themselves, hidden ones were asked for"
        yield found(_DUMMY_OWN, what, dummy)
    elif not (odd & some).any():
        yield report.held(_DUMMY_OWN, ~seats.slot_kept)
