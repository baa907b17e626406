"""Check a trainer's attention mask against the rule, fault by fault.

The mask is first brought into the rule's form (not inverted, context first, ...), each query is
given the block whose context it has, and then the visible share of each region of its keys is
compared with the rule. What is odd in each step is a finding of its own, so that faults that come
together are named one by one.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator

import numpy as np
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from dspark_lab.attention import regions
from dspark_lab.attention.context_faults import context_findings, dummy_context_findings
from dspark_lab.attention.findings import Finding, Findings
from dspark_lab.attention.given_mask import GivenMask, given_mask
from dspark_lab.attention.mask import ContextRanges, MaskMod
from dspark_lab.attention.mask_view import MaskView, Variant
from dspark_lab.attention.regions import Seats, Seen
from dspark_lab.attention.slot_faults import dummy_slot_findings, slot_findings
from dspark_lab.attention.tile_faults import tile_findings
from dspark_lab.blocks import Blocks
from dspark_lab.chats import Batch
from dspark_lab.checks import Count, checked

_FORM = "queries are rows, keys are the context and then the slots, True (or 0) is visible"
_ROWS = "each row of the batch has its own mask"
_OWNERS = "each block has its own context"
_EMPTY = "every slot sees something"
_HEADS = "all heads see the same"


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

    view = MaskView(mask, head, rule, seats, seen, window, variants, blocks, batch, to_text)
    found = [*_form(view), *_owners(view, owners, size), *context_findings(view)]
    found += [*dummy_context_findings(view), *slot_findings(view), *dummy_slot_findings(view)]
    found += list(_empty(view))
    if mask.heads > 1:
        found += list(_heads(view, other_heads))
    if isinstance(mine, BlockMask):
        found += list(tile_findings(view, mine))
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


# Of heads: how many pairs differ from another head's, and the first: row, query, key.
_Different = dict[int, tuple[int, tuple[int, int, int]]]


def _reference_head(mask: GivenMask) -> tuple[int, _Different]:
    """A head that most agree with, and those that do not."""
    best: tuple[int, _Different] = 0, {}
    for reference in range(min(2, mask.heads) if mask.heads > 1 else 0):
        different: _Different = {}
        for row in range(mask.rows):
            for queries in mask.pieces():
                right = mask.seen(row, reference, queries)
                for head in range(mask.heads):
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


def _form(view: MaskView) -> Iterator[Finding]:
    mask = view.mask
    if mask.transposed:
        yield Finding(_FORM, "broken", "the mask is transposed: keys are rows, queries columns")
    if mask.positive:
        pairs = mask.rows * mask.queries * mask.keys
        wrong_sign = "the sign is wrong: hidden pairs are +inf"
        yield Finding(_FORM, "broken", wrong_sign, mask.positive, pairs, "pairs")
    if mask.inverted:
        yield Finding(_FORM, "broken", "the mask is inverted: it hides what it should show")
    if mask.slots_first:
        yield Finding(_FORM, "broken", "the slots' keys come before the context's")
    if mask.slot_major:
        yield Finding(_FORM, "broken", "queries are ordered slot by slot, not block by block")
    odd = mask.transposed, mask.positive, mask.inverted, mask.slots_first, mask.slot_major
    if not any(odd):
        yield view.held(_FORM)


def _owners(view: MaskView, owners: regions.Owners | None, size: int) -> Iterator[Finding]:
    """Rows and blocks whose context is another's, and blocks that are cut at other places."""
    rows, query = view.mask.rows, np.arange(view.mask.queries)
    swapped = [] if owners is None else [r for r in range(rows) if owners.rows[r] != r]
    if owners is not None and swapped:
        first, finding = swapped[0], "a row has another row's mask"
        place = f"row {first}, which has that of row {owners.rows[first]}"
        counts = len(swapped), rows, "rows"
        yield Finding(_ROWS, "broken", finding, *counts, row=first, place=place)
    else:
        yield view.held(_ROWS, rows if rows > 1 else 0, "rows")
    right = view.mask.block_size
    sizes = {size} if owners is None else {size, owners.size}
    steps = 0 if owners is None else owners.steps
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


def _empty(view: MaskView) -> Iterator[Finding]:
    """Rows of the mask in which nothing is visible, of kept blocks."""
    kept = view.seats.kept
    empty = kept & (view.seen.count.sum(-1) == 0)
    blocks = view.of_blocks(kept)
    if empty.any():
        what = "a slot sees nothing at all: its softmax is NaN"
        yield view.broken(_EMPTY, what, empty, among=blocks)
    else:
        yield view.held(_EMPTY, blocks)


def _heads(view: MaskView, different: _Different) -> Iterator[Finding]:
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
