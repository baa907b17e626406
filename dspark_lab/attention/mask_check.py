"""Check a trainer's attention mask against the rule, fault by fault.

The mask is first brought into the rule's form (not inverted, context first, ...), and each query is
given the block whose context it has. What is odd in these steps is a finding of its own, so that
faults that come together are named one by one; the rest is held against :mod:`mask_rules`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator

import numpy as np
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from dspark_lab.attention.findings import Finding, Findings, Report, require_rows
from dspark_lab.attention.given_mask import GivenMask, Runs, given_mask
from dspark_lab.attention.mask import MaskMod
from dspark_lab.attention.mask_rules import SeatedMask, Variant, rule_findings
from dspark_lab.attention.seats import Owners, Seats, form_of, owners_of_context
from dspark_lab.attention.tile_faults import tile_findings
from dspark_lab.blocks import Blocks
from dspark_lab.chats import Batch
from dspark_lab.checks import Count, checked

_FORM = "queries are rows, keys are the context and then the slots, True (or 0) is visible"
_FORMS = {
    "transposed": "the mask is transposed: keys are rows, queries columns",
    "inverted": "the mask is inverted: it hides what it should show",
    "slots_first": "the slots' keys come before the context's",
    "slot_major": "queries are ordered slot by slot, not block by block",
}
_ROWS = "each row of the batch has its own mask"
_OWNERS = "each block has its own context"
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
    require_rows(blocks, batch)
    mask, rule = given_mask(mine, blocks, heads), Seats.of(blocks, batch, window)
    report = Report(
        (rows, count, blocks.block_size), _known_tokens(blocks, batch), to_text, "blocks"
    )
    head, of_heads = 0, list[Finding]()
    if mask.heads > 1:
        head, of_heads = _heads(mask, report)
    form = form_of(mask, head, rule)
    runs = form.runs(head)
    owners = owners_of_context(runs, rule, blocks.seq_len, blocks.block_size)
    seats, size = owners.seats, _size_of_blocks(form, runs)
    if size != blocks.block_size:
        seats = seats.blocks_of(size, blocks.block_size)
    found = [*_form(form, report), *_owners(form, report, rule, owners, size)]
    found += [*rule_findings(SeatedMask(form, runs, seats, variants, report)), *of_heads]
    if isinstance(mine, BlockMask):
        found += list(tile_findings(mask, report, mine))
    return Findings("the mask", tuple(found))


def _known_tokens(blocks: Blocks, batch: Batch | None) -> np.ndarray:
    """The rows' tokens, [row, key]; without the batch those that blocks hold, -1 elsewhere."""
    if batch is not None:
        return batch.input_ids.cpu().numpy()
    tokens = np.full(blocks.doc_ids.shape, -1, dtype=np.int64)
    rows, kept = np.arange(len(tokens))[:, None, None], blocks.block_keep_mask.cpu().numpy()
    names = ("prev_indices", "prev_ids"), ("safe_label_indices", "target_ids")
    for where, what in names:
        place, ids = (getattr(blocks, name).cpu().numpy() for name in (where, what))
        tokens[np.broadcast_to(rows, place.shape)[kept], place[kept]] = ids[kept]
    return tokens


def _size_of_blocks(mask: GivenMask, runs: Runs) -> int:
    """How many slots the mask takes a block to have: the right number, or one more or less.

    Where one of these fits a triangle of the pairs of slots much better, also if the other is
    hidden.
    """
    query, low, high = np.arange(mask.queries), mask.seq_len, mask.keys
    itself, first, least = low + query + 1, low + query // mask.block_size * mask.block_size, {}
    own = runs.count(first, first + mask.block_size).sum()
    if own in (0, runs.count(low, high).sum()):
        return mask.block_size
    for size in (mask.block_size, mask.block_size - 1, mask.block_size + 1):
        if 0 < size <= mask.queries:
            first = low + query // size * size
            past = np.minimum(first + size, high)
            sides = ((low, itself), (first, itself)), ((itself - 1, high), (itself - 1, past))
            least[size] = min(
                int((runs.count(*side) + part[1] - part[0] - 2 * runs.count(*part)).sum())
                for side, part in sides
            )
    best = min(least, key=lambda size: least[size])
    return best if least[best] < 0.5 * least[mask.block_size] else mask.block_size


def _heads(mask: GivenMask, report: Report) -> tuple[int, list[Finding]]:
    """A head that most agree with, and the finding of those that do not."""
    edges = [mask.runs(head).edges for head in range(mask.heads)]
    # The edges that only one of two masks has are those of the pairs in which they differ.
    for reference in (0, 1):
        differ = [np.setxor1d(of, edges[reference], assume_unique=True) for of in edges]
        odd = [head for head, edge in enumerate(differ) if len(edge)]
        if len(odd) <= mask.heads // 2:
            break
    if not odd:
        return reference, [Finding(_HEADS, "held", of=mask.heads, unit="heads")]
    query, key = divmod(int(differ[odd[0]][0]), mask.keys + mask.extra + 1)
    row, query = divmod(query, mask.queries)
    place = report.place(row, *divmod(query, mask.block_size), key)
    place["place"] = f"head {odd[0]}, {place['place']}"
    pairs = sum(int((edge[1::2] - edge[::2]).sum()) for edge in differ)
    what = f"a head sees other pairs than head {reference}"
    counted = len(odd), mask.heads, "heads", pairs
    return reference, [Finding(_HEADS, "broken", what, *counted, **place)]


def _form(mask: GivenMask, report: Report) -> Iterator[Finding]:
    odd = [name for form, name in _FORMS.items() if getattr(mask, form)]
    for name in odd:
        yield Finding(_FORM, "broken", name)
    if mask.positive:
        pairs = mask.rows * mask.queries * mask.keys
        wrong_sign = "the sign is wrong: hidden pairs are +inf"
        yield Finding(_FORM, "broken", wrong_sign, mask.positive, pairs, "pairs")
    elif not odd:
        yield report.held(_FORM)


def _owners(
    mask: GivenMask, report: Report, rule: Seats, owners: Owners, size: int
) -> Iterator[Finding]:
    """Rows and blocks whose context is another's, and blocks that are cut at other places."""
    rows, right, query = mask.rows, mask.block_size, np.arange(mask.queries)
    swapped = [row for row in range(rows) if owners.rows[row] != row]
    if swapped:
        first, finding = swapped[0], "a row has another row's mask"
        place = f"row {first}, which has that of row {owners.rows[first]}"
        counts = len(swapped), rows, "rows"
        yield Finding(_ROWS, "broken", finding, *counts, row=first, place=place)
    else:
        of = rows if rows > 1 else 0
        yield Finding(_ROWS, "held" if of else "no case", of=of, unit="rows")
    moved, sizes = np.ones_like(rule.kept), {size, owners.size} - {right}
    for other in sorted(sizes):
        finding = f"a block is taken to have {other} slots, not {right}"
        yield report.found(_OWNERS, finding, moved & (query // other != query // right))
    if owners.steps != 0:
        whose = {1: "the block after", -1: "the block before"}.get(owners.steps or 0)
        seats = owners.seats
        other_one = (seats.anchor != rule.anchor) | (seats.kept != rule.kept)
        flags = moved if swapped or not other_one.any() else other_one
        finding = f"the context is that of {whose or 'another block'}"
        yield report.found(_OWNERS, finding, flags)
    elif not sizes:
        yield report.held(_OWNERS)
