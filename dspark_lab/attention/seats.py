"""Where each query of a mask belongs: to which block's context, and to which block's slots."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from dspark_lab.attention.given_mask import GivenMask, Runs
from dspark_lab.blocks import Blocks
from dspark_lab.chats import Batch


@dataclass(frozen=True)
class Seats:
    """Each query's place, [row, query].

    Its block's document is ``start`` to ``past - 1``, the query ``slot`` of the block;
    ``slot_first`` to ``slot_past - 1`` are the slots of its own block, which is no dummy where
    ``slot_kept``. The row's tokens are ``text`` to ``padding - 1``, both [row, 1].
    """

    start: np.ndarray
    anchor: np.ndarray
    past: np.ndarray
    kept: np.ndarray
    slot: np.ndarray
    slot_first: np.ndarray
    slot_past: np.ndarray
    slot_kept: np.ndarray
    text: np.ndarray
    padding: np.ndarray
    window: int | None

    @classmethod
    def of(cls, blocks: Blocks, batch: Batch | None, window: int | None) -> Seats:
        """Where the rule has each query."""
        size, docs = blocks.block_size, blocks.doc_ids.cpu().numpy()
        anchor = blocks.anchor_positions.long().cpu().numpy().repeat(size, 1)
        kept = blocks.block_keep_mask.cpu().numpy().repeat(size, 1)
        rows = list(zip(docs, anchor, strict=True))
        query = np.broadcast_to(np.arange(anchor.shape[1]), anchor.shape)
        if batch is not None:
            text = batch.attention_mask.bool().cpu().numpy()
        else:  # all positions of padding are 0: known of two tokens and more
            still = blocks.context_position_ids.cpu().numpy() == 0
            pair = still[:, 1:] & still[:, :-1] & (docs[:, 1:] == docs[:, :-1])
            text = ~(np.pad(pair, ((0, 0), (1, 0))) | np.pad(pair, ((0, 0), (0, 1))))
        return cls(
            start=np.stack([np.searchsorted(doc, doc[of]) for doc, of in rows]),
            anchor=anchor,
            past=np.stack([np.searchsorted(doc, doc[of], "right") for doc, of in rows]),
            kept=kept,
            slot=query % size,
            slot_first=query // size * size,
            slot_past=query // size * size + size,
            slot_kept=kept,
            text=text.argmax(1)[:, None],
            padding=(text.any(1) * (text.shape[1] - text[:, ::-1].argmax(1)))[:, None],
            window=window,
        )

    @cached_property
    def low(self) -> np.ndarray:
        """Where the context prefix begins, which ends before the anchor."""
        if self.window is None:
            return self.start
        return np.clip(self.anchor + self.slot + 1 - self.window, self.start, self.anchor)

    def context_of(self, row: np.ndarray, query: np.ndarray, slot: np.ndarray) -> Seats:
        """The same, with each query's context that of another row's or block's query."""
        names = "start", "anchor", "past", "kept"
        taken = {name: getattr(self, name)[row, query] for name in names}
        edges = {name: getattr(self, name)[row[:, 0]] for name in ("text", "padding")}
        return replace(self, slot=slot, **taken, **edges)

    def blocks_of(self, size: int, block_size: int) -> Seats:
        """The same, with own blocks of another size."""
        queries = self.slot.shape[1]
        query = np.broadcast_to(np.arange(queries), self.slot.shape)
        first = query // size * size
        of = np.minimum(query // size * block_size, queries - 1)
        kept = np.take_along_axis(self.slot_kept, of, 1)
        past = np.minimum(first + size, queries)
        return replace(self, slot_first=first, slot_past=past, slot_kept=kept)

    def visible(self, row: int, queries: np.ndarray, seq_len: int, keys: int) -> np.ndarray:
        """The rule at every pair."""
        key = np.arange(keys)
        low, anchor = (v[row, queries, None] for v in (self.low, self.anchor))
        first, past = (v[row, queries, None] + seq_len for v in (self.slot_first, self.slot_past))
        context = (key >= low) & (key < anchor) & self.kept[row, queries, None]
        return context | ((key >= first) & (key < past))


def form_of(mask: GivenMask, head: int, seats: Seats) -> GivenMask:
    """The mask in the form in which it is most like the rule, its own unless that is far off."""
    own = _likeness(mask, head, seats)
    if own >= 0.75:
        return mask
    best, of_best = 0.0, mask
    for reading in mask.readings():
        gain = _likeness(reading, head, seats) - own
        # A form that differs in more has to explain more.
        if gain > max(best, 0.25 * (reading.inverted + reading.slots_first + reading.slot_major)):
            best, of_best = gain, reading
    return of_best


def _likeness(mask: GivenMask, head: int, seats: Seats) -> float:
    """Share visible of what the rule sees less that of what it hides: 1 right, -1 inverted.

    The mean over context and slots, of queries that are enough to tell a form.
    """
    queries = np.unique(np.linspace(0, mask.queries - 1, 128).astype(int))
    parts = []
    for row in range(min(mask.rows, 2)):
        seen = mask.seen(row, head, queries)
        rule = seats.visible(row, queries, mask.seq_len, mask.keys)
        for part in (slice(0, mask.seq_len), slice(mask.seq_len, mask.keys)):
            given, right = seen[:, part], rule[:, part]
            if right.any() and not right.all():
                parts.append(given[right].mean() - given[~right].mean())
    return float(np.mean(parts)) if parts else 1.0


@dataclass(frozen=True)
class Owners:
    """Whose context each query sees: that of the same place of row ``rows[row]``, of the block so
    many ``steps`` on (None: of any other), where a block is taken to have ``size`` slots."""

    seats: Seats
    rows: list[int]
    steps: int | None
    size: int


def owners_of_context(runs: Runs, seats: Seats, seq_len: int, block_size: int) -> Owners:
    """The rows and blocks to which the context belongs by where its first run ends.

    Its own row and block, unless others explain most of what these do not; of several that explain
    as much, the simplest.
    """
    first = runs.first(0, seq_len)
    ends = np.where(first < 0, -1, np.minimum(runs.hidden(first), seq_len))
    rows, queries = ends.shape
    blocks, query = queries // block_size, np.arange(queries)
    best = _misses(ends, seats, np.arange(rows), query).mean()
    chosen = Owners(seats, list(range(rows)), 0, block_size)
    if best == 0:
        return chosen
    sizes = [size for size in (block_size, block_size - 1, block_size + 1) if size > 0]
    for steps in (0, 1, -1, None) if blocks > 1 else (0,):
        if steps is None and best <= 0.2:
            break  # what is left are single blocks
        for size in sizes:
            # For each row, another one's contexts where these fit much better than its own.
            block, misses = np.zeros((rows, rows, queries), dtype=np.int64), np.zeros((rows, rows))
            for other in range(rows):
                if steps is None:
                    block[:, other] = [_matched(e, seats, other, block_size, size) for e in ends]
                else:
                    block[:, other] = (np.minimum(query // size, blocks - 1) + steps) % blocks
                there = np.full(rows, other)
                misses[:, other] = _misses(ends, seats, there, block[:, other] * block_size)
            better = misses.min(1) < 0.3 * misses.diagonal()
            choice = np.where(better, misses.argmin(1), np.arange(rows))
            share = misses[range(rows), choice].mean()
            if share < 0.3 * best:
                row = np.repeat(choice[:, None], queries, 1)
                slot = np.broadcast_to(query % size, ends.shape)
                moved = seats.context_of(row, block[range(rows), choice] * block_size, slot)
                best, chosen = share, Owners(moved, choice.tolist(), steps, size)
    return chosen


def _ends(seats: Seats, row: np.ndarray | int, query: np.ndarray) -> list[np.ndarray]:
    """Where the context would end: right, one longer, one shorter, and at the document's end."""
    anchor = seats.anchor[row, query]
    return [anchor, anchor + 1, anchor - 1, seats.past[row, query]]


def _misses(ends: np.ndarray, seats: Seats, row: np.ndarray, query: np.ndarray) -> np.ndarray:
    """For each row, the share of contexts that do not end as those of these rows' queries do.

    Of those that see context and should: at the anchor, or all of them in another one way. 1 where
    they are less than half of those that see context.
    """
    row = np.broadcast_to(row[:, None], ends.shape)
    seen = ends >= 0
    judged = seen & seats.kept[row, query]
    wrong = [((ends != end) & judged).sum(1) for end in _ends(seats, row, query)]
    enough = 2 * judged.sum(1) >= seen.sum(1)
    return np.where(enough, np.min(wrong, axis=0) / np.maximum(judged.sum(1), 1), 1.0)


def _matched(ends: np.ndarray, seats: Seats, row: int, block_size: int, size: int) -> np.ndarray:
    """For each query a block whose context ends where its own does; blocks have ``size`` slots.

    What matches none has the blocks that are left.
    """
    seen, query = ends[::size], np.arange(len(ends))
    places = query[::block_size]
    own = np.minimum(np.arange(len(seen)), len(places) - 1)
    best, most = own, -1
    kept = seats.kept[row, places]
    for target in _ends(seats, row, places)[:3]:
        order = np.lexsort((~kept, target))
        block = order[np.searchsorted(target[order], seen).clip(max=len(target) - 1)]
        block = np.where(seen == target[own], own, block)
        fits = (seen > 0) & (target[block] == seen)
        if fits.sum() > most and len(np.unique(block[fits])) >= 0.6 * fits.sum():
            left = np.setdiff1d(np.arange(len(places)), block[fits])
            rest = np.nonzero(~fits)[0][: len(left)]
            best, most = np.where(fits, block, own), fits.sum()
            best[rest] = left[: len(rest)]
    return best[query // size]
