"""Check a trainer's attention mask against the rule, fault by fault.

The mask is first brought into the rule's form (not inverted, context first, ...), each query is
given the block whose context it has, and then the visible share of each region of its keys is
compared with the rule. What is odd in each step is a finding of its own, so that faults that come
together are named one by one.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from dspark_lab.attention import regions
from dspark_lab.attention.findings import Finding, Findings, Verdict, token_shown
from dspark_lab.attention.given_mask import GivenMask, given_mask
from dspark_lab.attention.mask import ContextRanges, MaskMod
from dspark_lab.attention.regions import Seats, Seen
from dspark_lab.blocks import Blocks
from dspark_lab.chats import Batch
from dspark_lab.checks import Count, checked

Variant = Literal["causal", "hidden_dummies", "window"]

_FORM = "queries are rows, keys are the context and then the slots, True (or 0) is visible"
_ROWS = "each row of the batch has its own mask"
_OWNERS = "each block has its own context"
_CONTEXT = "the context before the anchor is visible"
_ANCHOR = "the anchor itself is hidden"
_AFTER = "what follows the anchor is hidden"
_DOCUMENTS = "other documents are hidden"
_PADDING = "padding is hidden"
_WINDOW = "the context is cut off at the window"
_OWN = "a block sees all of itself, in both directions"
_OTHERS = "other blocks are hidden"
_DUMMY_CONTEXT = "dummy blocks see no context"
_DUMMY_OWN = "dummy blocks see themselves"
_EMPTY = "every slot sees something"
_HEADS = "all heads see the same"
_END = "nothing is visible behind the last slot"
_TILES = "the tile lists fit the rule"


@checked
def check_mask(
    mine: Tensor | BlockMask | MaskMod,
    blocks: Blocks,
    batch: Batch | None = None,
    *,
    window: Count | None = None,
    variants: Collection[Variant] | None = None,
    heads: Count = 1,
    to_text: Callable[[int], str] | None = None,
) -> Findings:
    """Hold a training mask against the rule: each rule in words, held or broken, where first.

    Args:
        mine: ``[query, key]``, ``[batch, query, key]`` or ``[batch, heads, query, key]`` (1 head is
            usual), bool with True visible, or a float to add to scores: 0 visible, -inf or the
            dtype's minimum hidden. Or a function as FlexAttention's ``mask_mod``, or a
            ``BlockMask``, whose tile lists are held against its function.
        blocks: the blocks that it is for, from ``draw_blocks``, ``cut_blocks`` or ``Blocks.of``.
        batch: their rows, for the tokens in sentences and for which of them are padding.
        window: the sliding window that is meant: slot k of the block at anchor a sees token j
            only where a + k - j < window.
        variants: the known differences that are meant: *causal* blocks (JetSpec's),
            *hidden_dummies* (dummy blocks do not see themselves), a *window* of any size. By
            default whichever is found passes, named as such; given, another one is a fault, and so
            is the lack of one.
        heads: how many heads to ask a function about.
        to_text: such as ``tokenizer.decode``, for the texts of tokens.

    Raises:
        TypeError, ValueError: ``mine`` is no mask, or is of other sizes.
    """
    rows, count = blocks.anchor_positions.shape
    if rows == 0 or count == 0:
        raise ValueError(f"blocks must hold a block, got {rows} rows of {count}")
    if batch is not None and batch.input_ids.shape != blocks.doc_ids.shape:
        wanted = f"the rows of blocks, {tuple(blocks.doc_ids.shape)}"
        raise ValueError(f"batch must be {wanted}, got {tuple(batch.input_ids.shape)}")
    anchors = blocks.anchor_positions
    if int(anchors.min()) < 0 or int(anchors.max()) >= blocks.seq_len:
        got = f"{int(anchors.min())} to {int(anchors.max())}"
        raise ValueError(f"blocks must have anchors in [0, {blocks.seq_len - 1}], got {got}")
    if variants is not None and window is not None:
        variants = {*variants, "window"}

    mask, rule = given_mask(mine, blocks, heads), _seats(blocks, batch, window)
    head, other_heads = _reference_head(mask)
    seats, seen = rule, regions.count_regions(mask, head, rule)
    if not _inside(seen, seats):
        form = regions.form_of(mask, head, rule)
        if form is not mask:
            mask, seen = form, regions.count_regions(form, head, rule)
    owners = None
    if _context_differs(seen, seats):
        ends = regions.context_ends(mask, head)
        owners = regions.owners_of_context(ends, rule, blocks.block_size)
        seats = owners.seats
    size = _size_of_blocks(mask, head, seats, seen)
    if size != blocks.block_size:
        seats = seats.blocks_of(size, blocks.block_size)
    if seats is not rule:
        seen = regions.count_regions(mask, head, seats)

    view = _View(mask, head, rule, seats, seen, window, variants, blocks, batch, to_text)
    found = [*_form(view), *_owners(view, owners, size), *_context(view)]
    found += [*_own_blocks(view), *_dummies(view), *_dummies_themselves(view), *_empty(view)]
    if mask.heads > 1:
        found += list(_heads(view, other_heads))
    if isinstance(mine, BlockMask):
        found += list(_tiles(view, mine))
    return Findings("the mask", tuple(found))


def _seats(blocks: Blocks, batch: Batch | None, window: int | None) -> Seats:
    """Where the rule has each query."""
    size = blocks.block_size
    doc_ids, anchor = blocks.doc_ids.cpu().numpy(), blocks.anchor_positions.long().cpu().numpy()
    kept = blocks.block_keep_mask.cpu().numpy()
    own = ContextRanges.of(blocks).start.cpu().numpy()
    start, past = np.zeros_like(anchor), np.zeros_like(anchor)
    for row, docs in enumerate(doc_ids):
        of = docs[anchor[row]]
        start[row] = np.where(kept[row], own[row], np.searchsorted(docs, of))
        past[row] = np.searchsorted(docs, of, side="right")
    if batch is not None:
        padding = ~batch.attention_mask.bool().cpu().numpy()
    else:
        padding = _padding(doc_ids, blocks.context_position_ids.cpu().numpy())
    query = np.arange(anchor.shape[1] * size)
    shape = len(anchor), len(query)
    spread = {"start": start, "anchor": anchor, "past": past, "kept": kept}
    return Seats(
        **{name: values.repeat(size, 1) for name, values in spread.items()},
        slot=np.broadcast_to(query % size, shape),
        slot_kept=kept.repeat(size, 1),
        slot_first=np.broadcast_to(query // size * size, shape),
        slot_past=np.broadcast_to(query // size * size + size, shape),
        padding=padding,
        window=window,
    )


def _padding(doc_ids: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """The padding of rows, where all positions are 0: known of two tokens and more."""
    padding = np.zeros(doc_ids.shape, dtype=bool)
    same = (doc_ids[:, 1:] == doc_ids[:, :-1]) & (positions[:, 1:] == 0) & (positions[:, :-1] == 0)
    padding[:, 1:] |= same
    padding[:, :-1] |= same
    return padding


def _context_differs(seen: Seen, seats: Seats) -> bool:
    """Whether a query sees another context than the rule's."""
    wanted = np.where(seats.kept, seats.anchor - seats.low, 0)
    context = seen.count[..., : regions.PADDING + 1].sum(-1)
    prefix = np.where(seats.kept, seen.count[..., regions.CONTEXT], 0)
    return bool((context != wanted).any() or (prefix != wanted).any())


def _inside(seen: Seen, seats: Seats) -> bool:
    """Whether something is visible, and nothing that the rule hides."""
    right = list(range(regions.BEFORE, regions.BEHIND + 1))
    shown = seen.count[..., right].sum(-1) + seen.count[..., regions.CONTEXT] * seats.kept
    return bool(shown.any()) and bool((shown == seen.count.sum(-1)).all())


def _size_of_blocks(mask: GivenMask, head: int, seats: Seats, seen: Seen) -> int:
    """How many slots the mask takes a block to have: the right number, or one more or less.

    Where one of these fits a triangle of the pairs of slots much better, also if the other is
    hidden.
    """
    size, queries = mask.block_size, mask.queries
    inside = seen.count[..., regions.BEFORE : regions.BEHIND + 1].sum(-1)
    others = seen.count[..., [regions.EARLIER_BLOCK, regions.LATER_BLOCK]].sum()
    if others == 0 or (inside == 0).all():
        return size
    sizes = [size, *(other for other in (size - 1, size + 1) if 0 < other <= queries)]
    wrong = dict.fromkeys(((s, side) for s in sizes for side in (0, 1)), 0)
    slot = np.arange(queries)
    for row in range(mask.rows):
        for chosen in mask.pieces():
            given = mask.seen(row, head, chosen)[:, mask.seq_len : mask.keys]
            for s in sizes:
                differs = given != (slot[chosen, None] // s == slot // s)
                wrong[s, 0] += int((differs & (slot <= chosen[:, None])).sum())
                wrong[s, 1] += int((differs & (slot >= chosen[:, None])).sum())
    least = {s: min(wrong[s, 0], wrong[s, 1]) for s in sizes}
    best = min(sizes, key=lambda s: least[s])
    return best if least[best] < 0.5 * least[size] else size


def _reference_head(mask: GivenMask) -> tuple[int, dict[int, tuple[int, tuple[int, int, int]]]]:
    """A head that most agree with, and for each other one its pairs that differ, and the first."""
    best: tuple[int, dict[int, tuple[int, tuple[int, int, int]]]] = 0, {}
    for reference in range(min(2, mask.heads)):
        different: dict[int, tuple[int, tuple[int, int, int]]] = {}
        for row in range(mask.rows):
            for queries in mask.pieces():
                right = mask.seen(row, reference, queries) if mask.heads > 1 else None
                for head in range(mask.heads) if right is not None else ():
                    query, key = np.nonzero(mask.seen(row, head, queries) != right)
                    if len(query):
                        place = row, int(queries[query[0]]), int(key[0])
                        count, first = different.get(head, (0, place))
                        different[head] = count + len(query), first
        if reference == 0 or len(different) < len(best[1]):
            best = reference, different
        if len(best[1]) <= mask.heads // 2:
            break
    return best


@dataclass(frozen=True)
class _View:
    """The mask as counted, and how a finding is made from it."""

    mask: GivenMask
    head: int
    rule: Seats
    seats: Seats
    seen: Seen
    window: int | None
    variants: Collection[Variant] | None
    blocks: Blocks
    batch: Batch | None
    to_text: Callable[[int], str] | None
    tokens: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "tokens", _known_tokens(self.blocks, self.batch))

    def count(self, *places: int) -> np.ndarray:
        """Visible keys of regions, by query."""
        return self.seen.count[..., list(places)].sum(-1)

    def of_blocks(self, by_query: np.ndarray, how: Any = np.any) -> np.ndarray:
        return how(by_query.reshape(self.mask.rows, -1, self.mask.block_size), 2)

    def held(self, rule: str, of: Any = None, unit: str = "blocks") -> Finding:
        of = int(np.sum(of)) if of is not None else self.mask.rows * self.mask.anchors
        return Finding(rule, "held" if of else "no case", of=of, unit=unit)

    def broken(
        self,
        rule: str,
        finding: str,
        by_query: np.ndarray,
        key: np.ndarray | Callable[[int, int], int | None] | None = None,
        *,
        among: np.ndarray | None = None,
        pairs: Any = None,
        verdict: Verdict = "broken",
    ) -> Finding:
        """A finding of some queries, counted in blocks, ``among`` some blocks alone."""
        blocks = self.of_blocks(by_query)
        row, query = map(int, np.argwhere(by_query)[0])
        at = key(row, query) if callable(key) else None if key is None else int(key[row, query])
        place = self.place(row, query, at)
        of = blocks.size if among is None else int(among.sum())
        pairs = None if pairs is None else int(pairs)
        return Finding(rule, verdict, finding, int(blocks.sum()), of, pairs=pairs, **place)

    def place(self, row: int, query: int, key: int | None = None) -> dict[str, Any]:
        """A pair as the fields of a finding."""
        block, slot = divmod(query, self.mask.block_size)
        words = [f"row {row}"] if self.mask.rows > 1 else []
        words += [f"block {block}", *([f"slot {slot}"] if slot else [])]
        token = None
        if key is not None and key < self.mask.seq_len:
            token, shown = token_shown(int(self.tokens[row, key]), self.to_text)
            words.append(f"key {key}{shown}")
        elif key is not None and key < self.mask.keys:
            other, place = divmod(key - self.mask.seq_len, self.mask.block_size)
            words.append(f"key {key} (slot {place} of block {other})")
        elif key is not None:
            words.append(f"key {key}")
        where = {"row": row, "block": block, "slot": slot, "key": key, "token": token}
        return where | {"place": ", ".join(words)}

    def missing(self, row: int, query: int) -> int | None:
        """The first key that the rule sees and the mask hides."""
        chosen = np.array([query])
        seen = self.mask.seen(row, self.head, chosen)[0, : self.mask.keys]
        rule = self.seats.visible(row, chosen, self.mask.seq_len, self.mask.keys)[0]
        hidden = np.nonzero(rule & ~seen)[0]
        return int(hidden[0]) if len(hidden) else None

    def meant(self, variant: Variant) -> Verdict:
        """The verdict on a variant that was found."""
        return "variant" if self.variants is None or variant in self.variants else "broken"

    def asked(self, variant: Variant) -> bool:
        return self.variants is not None and variant in self.variants


def _known_tokens(blocks: Blocks, batch: Batch | None) -> np.ndarray:
    """The rows' tokens, [row, key]; without the batch those that blocks hold, -1 elsewhere."""
    if batch is not None:
        return batch.input_ids.cpu().numpy()
    tokens = np.full(blocks.doc_ids.shape, -1, dtype=np.int64)
    kept = blocks.block_keep_mask.cpu().numpy()
    for place, ids in (
        (blocks.prev_indices, blocks.prev_ids),
        (blocks.safe_label_indices, blocks.target_ids),
    ):
        for row in range(len(tokens)):
            tokens[row, place[row].cpu().numpy()[kept[row]]] = ids[row].cpu().numpy()[kept[row]]
    return tokens


def _form(view: _View) -> Iterator[Finding]:
    mask = view.mask
    if mask.transposed:
        yield Finding(_FORM, "broken", "the mask is transposed: keys are rows, queries columns")
    if mask.positive:
        counted = {"count": mask.positive, "of": mask.rows * mask.queries * mask.keys}
        wrong_sign = "the sign is wrong: hidden pairs are +inf"
        yield Finding(_FORM, "broken", wrong_sign, **counted, unit="pairs")
    if mask.inverted:
        yield Finding(_FORM, "broken", "the mask is inverted: it hides what it should show")
    if mask.slots_first:
        yield Finding(_FORM, "broken", "the slots' keys come before the context's")
    if mask.slot_major:
        yield Finding(_FORM, "broken", "queries are ordered slot by slot, not block by block")
    odd = mask.transposed, mask.positive, mask.inverted, mask.slots_first, mask.slot_major
    if not any(odd):
        yield view.held(_FORM)


def _owners(view: _View, owners: regions.Owners | None, size: int) -> Iterator[Finding]:
    """Rows and blocks whose context is another's, and blocks that are cut at other places."""
    rows, query = view.mask.rows, np.arange(view.mask.queries)
    swapped = [] if owners is None else [r for r in range(rows) if owners.rows[r] != r]
    if owners is not None and swapped:
        first = swapped[0]
        place = {"row": first, "place": f"row {first}, which has that of row {owners.rows[first]}"}
        finding = "a row has another row's mask"
        yield Finding(_ROWS, "broken", finding, len(swapped), rows, "rows", **place)
    else:
        yield view.held(_ROWS, rows if rows > 1 else 0, "rows")
    right, steps = view.mask.block_size, 0
    sizes = {size}
    if owners is not None:
        sizes, steps = sizes | {owners.size}, owners.steps
    moved = np.broadcast_to(query >= 0, view.rule.slot.shape)
    for other in sorted(sizes - {right}):
        finding = f"a block is taken to have {other} slots, not {right}"
        yield view.broken(_OWNERS, finding, moved & (query // other != query // right))
    if steps != 0:
        whose = {1: "block after", -1: "block before"}.get(steps or 0, "another block")
        whose = f"the {whose}" if steps else whose
        other = (view.seats.anchor != view.rule.anchor) | (view.seats.kept != view.rule.kept)
        finding = f"the context is that of {whose}"
        yield view.broken(_OWNERS, finding, moved if swapped or not other.any() else other)
    elif sizes == {right}:
        yield view.held(_OWNERS)


def _context(view: _View) -> Iterator[Finding]:
    """The regions of the context, of kept blocks alone."""
    seats, kept = view.seats, view.seats.kept
    blocks = view.of_blocks(kept)
    if view.mask.rows and not blocks.any():
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
        yield from _visible(view, _END, past_end, kept | True)


def _visible(
    view: _View, rule: str, cases: tuple[tuple[int, str], ...], among: np.ndarray
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


def _prefix(view: _View, asked: np.ndarray, blocks: np.ndarray) -> Iterator[Finding]:
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
    view: _View, fit: _Fit, asked: np.ndarray, first: np.ndarray, blocks: np.ndarray
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


def _own_blocks(view: _View) -> Iterator[Finding]:
    """Own and other blocks; dummy blocks' own slots are another rule's."""
    seats, own = view.seats, view.seen.own
    kept = seats.slot_kept
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
        yield from _own_pattern(view, own, kept, before, behind, blocks)
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


def _own_pattern(
    view: _View,
    own: np.ndarray,
    kept: np.ndarray,
    before: np.ndarray,
    behind: np.ndarray,
    blocks: np.ndarray,
) -> Iterator[Finding]:
    """What is hidden of the own blocks: a triangle, the diagonal, a slot, or anything."""
    first = view.seats.slot_first
    place = np.arange(own.shape[2])
    size = (view.seats.slot_past - first)[..., None]
    inside = (place < size) & kept[..., None]
    mine = (np.arange(view.mask.queries) - first)[..., None]
    parts = {"earlier": place < mine, "itself": place == mine, "later": place > mine}
    unseen = inside & ~own
    where = first + view.mask.seq_len
    report: list[tuple[str, np.ndarray, np.ndarray]] = []
    gone = {name: _gone(view, part & inside, unseen) for name, part in parts.items()}
    whole = gone["earlier"] | (before == 0) & (behind == 0)
    nothing = _block_all(view, ~(own & inside).any(2)) & kept
    alone = gone["earlier"] & gone["later"] & ~gone["itself"] & ~nothing & whole
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
                report.append((text, hides & unseen[..., slot], _only(unseen, slot)))
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


def _gone(view: _View, part: np.ndarray, unseen: np.ndarray) -> np.ndarray:
    """Queries of blocks of which a part is hidden altogether."""
    return _block_all(view, (unseen | ~part).all(2)) & _block_any(view, part.any(2))


def _block_all(view: _View, flags: np.ndarray) -> np.ndarray:
    return ~_block_any(view, ~flags)


def _block_any(view: _View, flags: np.ndarray) -> np.ndarray:
    return _block_max(view, flags.astype(np.int64)) > 0


def _block_max(view: _View, values: np.ndarray) -> np.ndarray:
    """For each query the most that a slot of its block has."""
    edges = np.unique(view.seats.slot_first[0])
    most = np.maximum.reduceat(values, edges, axis=1)
    return np.repeat(most, np.diff([*edges, values.shape[1]]), axis=1)


def _dummies(view: _View) -> Iterator[Finding]:
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


def _dummies_themselves(view: _View) -> Iterator[Finding]:
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


def _empty(view: _View) -> Iterator[Finding]:
    """Rows of the mask in which nothing is visible, of kept blocks."""
    kept = view.seats.kept
    empty = kept & (view.seen.count.sum(-1) == 0)
    blocks = view.of_blocks(kept)
    if empty.any():
        what = "a slot sees nothing at all: its softmax is NaN"
        yield view.broken(_EMPTY, what, empty, among=blocks)
    else:
        yield view.held(_EMPTY, blocks)


def _heads(
    view: _View, different: dict[int, tuple[int, tuple[int, int, int]]]
) -> Iterator[Finding]:
    heads = view.mask.heads
    if not different:
        yield view.held(_HEADS, heads, "heads")
        return
    head, (_, (row, query, key)) = min(different.items())
    place = view.place(row, query, key)
    place["place"] = f"head {head}, {place['place']}"
    pairs = sum(count for count, _ in different.values())
    what = f"a head sees other pairs than head {view.head}"
    yield Finding(_HEADS, "broken", what, len(different), heads, "heads", pairs, **place)


def _tiles(view: _View, mine: BlockMask) -> Iterator[Finding]:
    """The tiles of a ``BlockMask`` against its own function."""
    tile, width = mine.BLOCK_SIZE
    columns = -(-int(mine.seq_lengths[1]) // width)
    partial = _listed(mine.kv_num_blocks, mine.kv_indices, columns)
    full = np.zeros_like(partial)
    if mine.full_kv_num_blocks is not None and mine.full_kv_indices is not None:
        full = _listed(mine.full_kv_num_blocks, mine.full_kv_indices, columns)
    mask = replace(view.mask, inverted=False, slots_first=False, slot_major=False)
    edges = np.arange(0, mask.keys, width)
    counts = {"empty": 0, "full": 0}
    firsts: dict[str, tuple[int, int, int]] = {}
    tiles = 0
    for row in range(mask.rows):
        for head in range(mask.heads):
            here = min(row, len(partial) - 1), head
            for queries in mask.pieces(tile):
                seen = mask.seen(row, head, queries)[:, : mask.keys]
                for low in range(0, len(queries), tile):
                    part, at = seen[low : low + tile], queries[low] // tile
                    some = np.logical_or.reduceat(part.any(0), edges)
                    every = np.logical_and.reduceat(part.all(0), edges)
                    listed = [lists[here][at, : len(edges)] for lists in (partial, full)]
                    wrong = {"empty": some & ~listed[0] & ~listed[1], "full": ~every & listed[1]}
                    tiles += len(edges)
                    for kind, flags in wrong.items():
                        counts[kind] += int(flags.sum())
                        if flags.any() and kind not in firsts:
                            start = int(edges[flags.argmax()])
                            inner = part[:, start : start + width]
                            pair = np.argwhere(inner if kind == "empty" else ~inner)[0]
                            place = int(queries[low] + pair[0]), start + int(pair[1])
                            firsts[kind] = row, *place
    for kind, sees in (("empty", "sees"), ("full", "hides in part")):
        if counts[kind]:
            what = f"the tile lists call a tile {kind} that its rule {sees}"
            place = view.place(*firsts[kind])
            yield Finding(_TILES, "broken", what, counts[kind], tiles, "tiles", **place)
    backward = _backward(mine, partial, full)
    if backward:
        tiles = partial.size
        what = "the lists for the backward pass differ from those for the forward pass"
        yield Finding(_TILES, "broken", what, backward, tiles, "tiles")
    if not any(counts.values()) and not backward:
        yield view.held(_TILES, tiles, "tiles")


def _backward(mine: BlockMask, partial: np.ndarray, full: np.ndarray) -> int:
    """Tiles that the lists by key have otherwise than the lists by query."""
    wrong = 0
    for which, tiles in (("q", partial), ("full_q", full)):
        numbers, places = (getattr(mine, f"{which}_{what}") for what in ("num_blocks", "indices"))
        if numbers is not None and places is not None:
            by_key = _listed(numbers, places, tiles.shape[2])
            wrong += int((by_key != tiles.swapaxes(2, 3)).sum())
    return wrong


def _listed(numbers: Tensor, places: Tensor, columns: int) -> np.ndarray:
    """Tile lists as bool, [row, head, tile row, tile column]."""
    counts, listed = numbers.cpu().numpy(), places.long().cpu().numpy()
    tiles = np.zeros((*counts.shape, columns), dtype=bool)
    used = np.arange(listed.shape[-1]) < counts[..., None]
    tiles[(*np.nonzero(used)[:3], listed[used])] = True
    return tiles
