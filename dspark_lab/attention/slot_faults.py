"""What a mask shows and hides of the blocks' own slots."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from dspark_lab.attention import regions
from dspark_lab.attention.findings import Finding
from dspark_lab.attention.mask_view import MaskView
from dspark_lab.attention.regions import Seats

_OWN = "a block sees all of itself, in both directions"
_OTHERS = "other blocks are hidden"
_DUMMY_OWN = "dummy blocks see themselves"


def slot_findings(view: MaskView) -> Iterator[Finding]:
    """Own and other blocks; dummy blocks' own slots are another rule's."""
    seats, kept = view.seats, view.seats.slot_kept
    query = np.arange(view.mask.queries)
    before, behind = query - seats.slot_first, seats.slot_past - 1 - query
    saw = [view.count(region) for region in (regions.BEFORE, regions.ITSELF, regions.BEHIND)]
    hidden = [kept & (wanted > got) for wanted, got in zip((before, 1, behind), saw, strict=True)]
    blocks = view.of_blocks(kept)
    if not any(part.any() for part in hidden):
        yield view.held(_OWN, blocks)
        if view.asked("causal") and (kept & (behind > 0)).any():
            both = "blocks see both directions, causal ones were asked for"
            yield view.broken(_OWN, both, kept & (behind > 0), among=blocks)
    else:
        yield from _own_pattern(view, behind, blocks)
    names = {
        (True, False): "earlier blocks are visible",
        (False, True): "later blocks are visible",
        (True, True): "other blocks are visible",
    }
    sides = [view.count(regions.EARLIER_BLOCK) > 0, view.count(regions.LATER_BLOCK) > 0]
    if any(side.any() for side in sides):
        first = np.where(sides[0], view.seen.first[..., regions.EARLIER_BLOCK], 0)
        first = np.where(sides[0], first, view.seen.first[..., regions.LATER_BLOCK])
        pairs = view.count(regions.EARLIER_BLOCK, regions.LATER_BLOCK).sum()
        what = names[bool(sides[0].any()), bool(sides[1].any())]
        yield view.broken(_OTHERS, what, sides[0] | sides[1], first, pairs=pairs)
    else:
        yield view.held(_OTHERS)


def _own_pattern(view: MaskView, behind: np.ndarray, blocks: np.ndarray) -> Iterator[Finding]:
    """What is hidden of the own blocks: a triangle, the diagonal, a slot, or anything."""
    first, kept, own = view.seats.slot_first, view.seats.slot_kept, view.seen.own
    place = np.arange(own.shape[2])
    size = (view.seats.slot_past - first)[..., None]
    inside = (place < size) & kept[..., None]
    mine = (np.arange(view.mask.queries) - first)[..., None]
    parts = {"earlier": place < mine, "itself": place == mine, "later": place > mine}
    unseen = inside & ~own
    where = first + view.mask.seq_len
    report: list[tuple[str, np.ndarray, np.ndarray]] = []
    gone = {name: _gone(view, part & inside, unseen) for name, part in parts.items()}
    nothing = _block_all(view, ~(own & inside).any(2)) & kept
    alone = gone["earlier"] & gone["later"] & ~gone["itself"] & ~nothing
    rest = {name: is_gone & ~nothing & ~alone for name, is_gone in gone.items()}
    report.append(("a block does not see itself", nothing, unseen))
    report.append(("each slot sees itself alone of its block", alone, unseen))
    causal = rest["later"]
    report.append(
        ("blocks are causal against their order", rest["earlier"], unseen & parts["earlier"])
    )
    report.append(("slots do not see themselves", rest["itself"], unseen & parts["itself"]))
    told = np.zeros_like(unseen)
    for name, part in parts.items():
        told |= gone[name][..., None] & part
    left = unseen & ~told & ~nothing[..., None]
    if left.any():
        for slot in place:
            column = inside[..., slot] & kept
            all_of_it = _block_all(view, unseen[..., slot] | ~column)
            some = _block_any(view, left[..., slot])
            hides = all_of_it & some & column
            if hides.any():
                text = f"slot {slot} is hidden from its own block"
                report.append((text, hides & unseen[..., slot], _only(unseen, int(slot))))
                left[..., slot] &= ~hides
        for slot in place:
            blind = left.any(2) & (mine[..., 0] == slot) & ~(own & inside).any(2)
            if blind.any():
                report.append((f"slot {slot} sees nothing of its block", blind, left))
                left &= ~blind[..., None]
        report.append(("part of the own block is hidden", left.any(2), left))

    if causal.any():
        every = (causal | ~kept | (_block_max(view, behind) == 0)).all()
        verdict = view.meant("causal") if every else "broken"
        name = "blocks are causal, as JetSpec's" if every else "some blocks are causal"
        yield view.broken(_OWN, name, causal & (behind > 0), among=blocks, verdict=verdict)
    elif view.asked("causal") and (kept & (behind > 0)).any():
        both = "blocks are not causal, as was asked for"
        yield view.broken(_OWN, both, kept & (behind > 0), among=blocks)
    for text, queries, pairs in report:
        queries = queries & pairs.any(2)
        if queries.any():
            key = where + pairs.argmax(2)
            among = {"among": blocks, "pairs": (pairs & queries[..., None]).sum()}
            yield view.broken(_OWN, text, queries, key, **among)


def _only(pairs: np.ndarray, slot: int) -> np.ndarray:
    chosen = np.zeros_like(pairs)
    chosen[..., slot] = pairs[..., slot]
    return chosen


def _gone(view: MaskView, part: np.ndarray, unseen: np.ndarray) -> np.ndarray:
    """Queries of blocks of which a part is hidden altogether."""
    whole = np.all(unseen | ~part, axis=2)
    return _block_all(view, whole) & _block_any(view, np.any(part, axis=2))


def _block_all(view: MaskView, flags: np.ndarray) -> np.ndarray:
    return ~_block_any(view, ~flags)


def _block_any(view: MaskView, flags: np.ndarray) -> np.ndarray:
    return _block_max(view, flags.astype(np.int64)) > 0


def _block_max(view: MaskView, values: np.ndarray) -> np.ndarray:
    """For each query the most that a slot of its block has."""
    edges = np.unique(view.seats.slot_first[0])
    most = np.maximum.reduceat(values, edges, axis=1)
    return np.repeat(most, np.diff([*edges, values.shape[1]]), axis=1)


def dummy_slot_findings(view: MaskView) -> Iterator[Finding]:
    seats, dummy = view.seats, ~view.seats.slot_kept
    blocks = view.of_blocks(dummy)
    if not dummy.any():
        yield view.held(_DUMMY_OWN, 0)
        return
    got = view.count(regions.BEFORE, regions.ITSELF, regions.BEHIND)
    full = seats.slot_past - seats.slot_first
    if dummy.all() and (got == _place_in_block(seats) + 1).all() and (full > 1).any():
        what, verdict = "dummy blocks are causal", view.meant("causal")
        yield view.broken(_DUMMY_OWN, what, dummy, among=blocks, verdict=verdict)
        return
    # What is odd about kept blocks is said of them, and no second time of dummies.
    own, odd, whole = view.seen.own, np.zeros_like(dummy), np.zeros_like(dummy)
    kept = [own[place] for place in _blocks_where(seats, ~dummy)]
    patterns = {size: {one[:size, :size].tobytes() for one in kept} for size in set(full.flat)}
    for place in _blocks_where(seats, dummy):
        size = int(full[place][0])
        pattern = own[place][:, :size].tobytes()
        if (got[place] != size).any() and pattern not in patterns[size]:
            (odd if got[place].any() else whole)[place] = True
    if odd.any():
        what = "dummy blocks see part of themselves alone"
        yield view.broken(_DUMMY_OWN, what, odd, among=blocks)
    if whole.any():
        what, verdict = "dummy blocks do not see themselves", view.meant("hidden_dummies")
        yield view.broken(_DUMMY_OWN, what, whole, among=blocks, verdict=verdict)
    elif view.asked("hidden_dummies"):
        what = "dummy blocks see themselves, hidden ones were asked for"
        yield view.broken(_DUMMY_OWN, what, dummy, among=blocks)
    elif not odd.any():
        yield view.held(_DUMMY_OWN, blocks)


def _place_in_block(seats: Seats) -> np.ndarray:
    """Each query's place in its own block."""
    return np.arange(seats.slot.shape[1]) - seats.slot_first


def _blocks_where(seats: Seats, flags: np.ndarray) -> Iterator[tuple[int, slice]]:
    """Row and queries of each own block whose first query is flagged."""
    for row in range(len(flags)):
        for first in np.unique(seats.slot_first[row]):
            if flags[row, first]:
                yield row, slice(int(first), int(seats.slot_past[row, first]))
