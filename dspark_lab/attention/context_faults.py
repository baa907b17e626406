"""What a mask shows and hides of the context."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from dspark_lab.attention import regions
from dspark_lab.attention.findings import Finding
from dspark_lab.attention.mask_view import MaskView

_CONTEXT = "the context before the anchor is visible"
_ANCHOR = "the anchor itself is hidden"
_AFTER = "what follows the anchor is hidden"
_DOCUMENTS = "other documents are hidden"
_PADDING = "padding is hidden"
_WINDOW = "the context is cut off at the window"
_DUMMY_CONTEXT = "dummy blocks see no context"
_END = "nothing is visible behind the last slot"


def context_findings(view: MaskView) -> Iterator[Finding]:
    """The regions of the context, of kept blocks alone."""
    seats, kept = view.seats, view.seats.kept
    blocks = view.of_blocks(kept)
    if not blocks.any():
        for rule in (_CONTEXT, _ANCHOR, _AFTER, _DOCUMENTS, _PADDING):
            yield view.held(rule, 0)
    else:
        yield from _prefix(view, kept & (seats.anchor > seats.start), blocks)
        for rule, cases in (
            (_ANCHOR, ((regions.ANCHOR, "the context includes the anchor"),)),
            (_AFTER, ((regions.AFTER, "tokens after the anchor are visible"),)),
        ):
            yield from _visible(view, rule, cases, kept)
        earlier = view.count(regions.EARLIER_DOCUMENT)
        last = seats.start - 1 == view.seen.first[..., regions.EARLIER_DOCUMENT]
        one_early = (last | (earlier == 0) | ~kept).all()
        before = "an earlier document is visible"
        if one_early:
            before = "the context begins one token early, in the document before"
        documents = (
            (regions.EARLIER_DOCUMENT, before),
            (regions.LATER_DOCUMENT, "a later document is visible"),
        )
        yield from _visible(view, _DOCUMENTS, documents, kept)
        padding = view.count(regions.PADDING) > 0
        if seats.padding.any() or padding.any():
            cases = ((regions.PADDING, "padding is visible"),)
            yield from _visible(view, _PADDING, cases, kept)
        else:
            yield view.held(_PADDING, 0)
    if view.mask.extra:
        past_end = ((regions.PAST_END, "keys behind the last slot are visible"),)
        yield from _visible(view, _END, past_end, np.ones_like(kept))


def _visible(
    view: MaskView, rule: str, cases: tuple[tuple[int, str], ...], among: np.ndarray
) -> Iterator[Finding]:
    """What should be hidden from some queries, and is not."""
    held = True
    for region, finding in cases:
        count = view.count(region) * among
        if count.any():
            held, first = False, view.seen.first[..., region]
            blocks = view.of_blocks(among)
            yield view.broken(rule, finding, count > 0, first, among=blocks, pairs=count.sum())
    if held:
        yield view.held(rule, view.of_blocks(among))


@dataclass(frozen=True)
class _Fit:
    """A context prefix that begins ``late``, ends ``short``, and is cut off at a window."""

    late: int = 0
    short: int = 0
    window: int | None = None
    of_anchor: bool = False  # the window is that of the anchor, not of each slot


def _prefix(view: MaskView, asked: np.ndarray, blocks: np.ndarray) -> Iterator[Finding]:
    """What is missing of the context, and what a window should cut off."""
    seats, seen = view.seats, view.seen
    missing = np.where(asked, seats.anchor - seats.low - view.count(regions.CONTEXT), 0)
    beyond = view.count(regions.CUT_OFF) * asked
    broken = {"among": view.of_blocks(asked), "pairs": missing.sum()}
    if not missing.any() and not beyond.any():
        yield view.held(_CONTEXT, blocks)
        if view.window is not None:
            yield view.held(_WINDOW, blocks)
        elif view.asked("window"):
            yield Finding(_WINDOW, "broken", "no window is seen, one was asked for")
        return
    count = view.count(regions.CUT_OFF, regions.CONTEXT)
    cut = seen.count[..., regions.CUT_OFF] > 0
    first = np.where(cut, seen.first[..., regions.CUT_OFF], seen.first[..., regions.CONTEXT])
    inner = seen.count[..., regions.CONTEXT] > 0
    last = np.where(inner, seen.last[..., regions.CONTEXT], seen.last[..., regions.CUT_OFF])
    names = seats.start, seats.anchor, seats.slot, count, first, last
    fit = _fit(*(values[asked] for values in names))
    hidden = missing > 0
    if fit is None:
        whole = hidden & (count == 0)
        if hidden.any() and (whole == asked).all():
            yield view.broken(_CONTEXT, "no context is visible", hidden, view.missing, **broken)
        elif hidden.any():
            part = "part of the context is hidden"
            yield view.broken(_CONTEXT, part, hidden, view.missing, **broken)
        else:
            yield view.held(_CONTEXT, blocks)
        if view.window is not None and beyond.any():
            cut_off = "context beyond the window is visible"
            broken["pairs"] = beyond.sum()
            yield view.broken(_WINDOW, cut_off, beyond > 0, first, **broken)
        elif view.window is not None:
            yield view.held(_WINDOW, blocks)
        return
    broken["pairs"] = None
    tokens = {1: "one token"}
    if fit.short:
        short = f"the context ends {tokens.get(fit.short, f'{fit.short} tokens')} short"
        yield view.broken(
            _CONTEXT, short, hidden, lambda r, q: int(seats.anchor[r, q]) - 1, **broken
        )
    if fit.late:
        late = f"the context begins {tokens.get(fit.late, f'{fit.late} tokens')} late"
        begins = asked & (seats.low < seats.start + fit.late)
        yield view.broken(_CONTEXT, late, begins, seats.start, **broken)
    if not fit.short and not fit.late:
        yield view.held(_CONTEXT, blocks)
    yield from _window(view, fit, asked, first, blocks)


def _window(
    view: MaskView, fit: _Fit, asked: np.ndarray, first: np.ndarray, blocks: np.ndarray
) -> Iterator[Finding]:
    """The window that explains the context, against the one that is meant."""
    seats, among = view.seats, view.of_blocks(asked)
    if fit.window is None:
        bound = asked & (seats.low > seats.start)
        if view.window is not None and bound.any():
            absent = f"the window of {view.window} is not applied"
            yield view.broken(_WINDOW, absent, bound, first, among=among)
        elif view.window is not None:
            yield view.held(_WINDOW, blocks)
        return
    reach = 0 if fit.of_anchor else seats.slot
    low = seats.anchor + reach + 1 - fit.window
    cut = asked & (low > seats.start)
    key = np.clip(low - 1, seats.start, None)
    if fit.of_anchor:
        odd = f"a window of {fit.window} is counted from the anchor, not from each slot"
        yield view.broken(_WINDOW, odd, cut, key, among=among)
    elif view.window is None:
        named = f"the context is cut off at a window of {fit.window}"
        yield view.broken(_WINDOW, named, cut, key, among=among, verdict=view.meant("window"))
    elif fit.window == view.window:
        yield view.held(_WINDOW, blocks)
    else:
        odd = f"the window is {fit.window}, not {view.window}"
        moved = cut | (asked & (seats.low > seats.start))
        yield view.broken(_WINDOW, odd, moved, among=among)


def _fit(
    start: np.ndarray,
    anchor: np.ndarray,
    slot: np.ndarray,
    count: np.ndarray,
    first: np.ndarray,
    last: np.ndarray,
) -> _Fit | None:
    """The one way to begin and end that gives each query just the context that it sees."""
    seen = count > 0
    if not seen.any():
        return None
    short = int((anchor - 1 - last)[seen][0])
    late = int((first - start)[seen].min())
    by_slot, by_anchor = (0, "slot"), (0, "anchor")
    ways = [(late, None), by_slot, (late, "slot"), by_anchor, (late, "anchor")]
    # Contexts of one length cannot tell a late begin from a window: late by much is a window.
    if late and len(np.unique(anchor - start)) == 1:
        ways = [by_slot, (late, None)]
    for begins, window_of in ways:
        low, window = start + begins, None
        if window_of is not None:
            reach = anchor + 1 + (slot if window_of == "slot" else 0)
            bound = seen & (first > low)
            if bound.any():
                window = int((reach - first)[bound][0])
            elif not seen.all():  # cut off whole, at the least
                window = int((reach - anchor + short)[~seen].min())
            else:
                continue
            low = np.maximum(low, reach - window)
        length = np.clip(anchor - short - low, 0, None)
        if (length == count).all() and (low == first)[seen].all():
            return _Fit(begins, short, window, window_of == "anchor")
    return None


def dummy_context_findings(view: MaskView) -> Iterator[Finding]:
    seats, dummy = view.seats, ~view.seats.kept
    blocks = view.of_blocks(dummy)
    if not dummy.any():
        yield view.held(_DUMMY_CONTEXT, 0)
        return
    context = range(regions.PADDING + 1)
    count, first = view.count(*context) * dummy, view.seen.first[..., : regions.PADDING + 1]
    if count.any():
        key = np.where(first < 0, view.mask.keys, first).min(-1)
        reach = view.seen.last[..., [regions.CUT_OFF, regions.CONTEXT]].max(-1)
        prefixed = dummy & (seats.anchor > seats.low)
        as_kept = prefixed.any() and (reach >= np.maximum(seats.anchor - 2, 0))[prefixed].all()
        what = "dummy blocks see context" + (", as if they were kept" if as_kept else "")
        pairs = count.sum()
        yield view.broken(_DUMMY_CONTEXT, what, count > 0, key, among=blocks, pairs=pairs)
    else:
        yield view.held(_DUMMY_CONTEXT, blocks)
