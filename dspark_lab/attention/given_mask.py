"""A user's mask of any form, read a few queries at a time on the host, and as runs of keys."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import product

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from dspark_lab.attention.mask import MaskMod
from dspark_lab.blocks import Blocks
from dspark_lab.checks import checked

# Pairs that are looked at together.
PIECE = 2**22
# What hides a pair in an additive mask: -inf, or the minimum of a dtype in which it was made.
_FLOATS = torch.float16, torch.bfloat16, torch.float32, torch.float64
_HIDDEN = (-torch.inf, *(torch.finfo(dtype).min for dtype in _FLOATS))
# Given the row, the head and the queries: which keys are visible.
Reader = Callable[[int, int, np.ndarray], np.ndarray]


@dataclass(frozen=True)
class GivenMask:
    """A mask of the queries and keys of some blocks, as ``read`` gives it.

    Its keys are the context, the slots, and ``extra`` ones behind them, to which a ``BlockMask``
    may be padded. The other fields say how its form differs from the rule's: axes swapped; hidden
    pairs that are +inf; visible and hidden exchanged; slots before the context; queries slot after
    slot.
    """

    rows: int
    anchors: int
    seq_len: int
    block_size: int
    read: Reader
    heads: int = 1
    extra: int = 0
    transposed: bool = False
    positive: int = 0
    inverted: bool = False
    slots_first: bool = False
    slot_major: bool = False

    @property
    def queries(self) -> int:
        return self.anchors * self.block_size

    @property
    def keys(self) -> int:
        return self.seq_len + self.queries

    def seen(self, row: int, head: int, queries: np.ndarray) -> np.ndarray:
        """What queries see, in the rule's form."""
        query = np.arange(self.queries)
        if self.slot_major:
            query = query % self.block_size * self.anchors + query // self.block_size
        seen = self.read(row, head, query[queries])
        real, behind = seen[:, : self.keys], seen[:, self.keys :]
        real = ~real if self.inverted else real
        real = np.roll(real, self.seq_len, axis=1) if self.slots_first else real
        if self.slot_major:
            real = np.concatenate([real[:, : self.seq_len], real[:, self.seq_len + query]], 1)
        return np.concatenate([real, behind], 1) if self.extra else real

    def pieces(self, unit: int = 1) -> Iterator[np.ndarray]:
        """All queries, in runs of a multiple of ``unit`` that are not too long."""
        step = max(1, PIECE // (self.keys + self.extra) // unit) * unit
        for low in range(0, self.queries, step):
            yield np.arange(low, min(low + step, self.queries))

    def readings(self) -> Iterator[GivenMask]:
        """The same mask as other forms would have it."""
        for inverted, first, major in product((False, True), repeat=3):
            if inverted or first or major:
                yield replace(self, inverted=inverted, slots_first=first, slot_major=major)

    def runs(self, head: int) -> Runs:
        width, found = self.keys + self.extra, []
        for row in range(self.rows):
            for queries in self.pieces():
                seen = self.seen(row, head, queries)
                edge = np.empty((len(seen), width + 1), dtype=bool)
                edge[:, 0], edge[:, -1] = seen[:, 0], seen[:, -1]
                np.not_equal(seen[:, 1:], seen[:, :-1], out=edge[:, 1:-1])
                before = (row * self.queries + int(queries[0])) * (width + 1)
                found.append(before + np.flatnonzero(edge))
        return Runs(np.concatenate(found), width + 1, (self.rows, self.queries))


@dataclass(frozen=True)
class Runs:
    """A mask as where its runs of visible keys begin and end, query after query.

    An edge is ``key + stride * query``, of queries counted through all rows; each second one is
    behind a run's last key. Intervals of keys are given by arrays that broadcast to ``shape``,
    [row, query], of numbers that may differ from query to query.
    """

    edges: np.ndarray
    stride: int
    shape: tuple[int, int]

    @cached_property
    def _runs(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        query, low = np.divmod(self.edges[::2], self.stride)
        return query, low, self.edges[1::2] % self.stride

    def _each(self, edge: np.ndarray | int) -> np.ndarray:
        return np.broadcast_to(edge, self.shape).ravel()

    def _within(
        self, low: np.ndarray | int, high: np.ndarray | int
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The parts of runs in an interval: query, from, to."""
        query, begin, end = self._runs
        begin = np.maximum(begin, self._each(low)[query])
        end = np.minimum(end, self._each(high)[query])
        seen = begin < end
        return query[seen], begin[seen], end[seen]

    def count(self, low: np.ndarray | int, high: np.ndarray | int) -> np.ndarray:
        """Visible keys of an interval."""
        query, begin, end = self._within(low, high)
        number = np.bincount(query, end - begin, self.shape[0] * self.shape[1])
        return number.astype(np.int64).reshape(self.shape)

    def first(self, low: np.ndarray | int, high: np.ndarray | int) -> np.ndarray:
        """The first visible key of an interval, -1 where none is."""
        query, begin, _ = self._within(low, high)
        key = np.full(self.shape[0] * self.shape[1], -1)
        key[query[::-1]] = begin[::-1]  # of several values for one place the last one stays
        return key.reshape(self.shape)

    def hidden(self, low: np.ndarray | int) -> np.ndarray:
        """The first key from ``low`` on that is hidden."""
        query, begin, end = self._runs
        key = self._each(low).copy()
        covered = (begin <= key[query]) & (key[query] < end)
        key[query[covered]] = end[covered]
        return key.reshape(self.shape)


@checked
def visible_runs(mine: Tensor | BlockMask | MaskMod, blocks: Blocks) -> Runs:
    """The visible keys of a mask in any form that ``check_mask`` takes, of its first head."""
    return given_mask(mine, blocks, 1).runs(0)


def given_mask(mine: Tensor | BlockMask | MaskMod, blocks: Blocks, heads: int) -> GivenMask:
    """Read the user's mask; refuse one that is no mask or not of these blocks' sizes."""
    rows, anchors = blocks.anchor_positions.shape
    device = blocks.anchor_positions.device
    mask = GivenMask(rows, anchors, blocks.seq_len, blocks.block_size, _none, heads)
    if isinstance(mine, Tensor):
        return _dense(mine, mask)
    if not isinstance(mine, BlockMask):
        return replace(mask, read=_of_function(mine, device, mask.keys))
    tiled_rows, heads = mine.kv_num_blocks.shape[:2]
    if tiled_rows not in (1, rows):
        raise ValueError(f"mine must have 1 or {rows} rows, as blocks, got {tiled_rows}")
    length, width = map(int, mine.seq_lengths)
    sizes = ("queries", length, mask.queries), ("keys", width, mask.keys)
    for (name, got, wanted), tile in zip(sizes, mine.BLOCK_SIZE, strict=True):
        if got not in {wanted, *(-(-wanted // unit) * unit for unit in (128, tile))}:
            raise ValueError(_wrong_size((length, width), mask, name))
    read = _of_function(mine.mask_mod, mine.kv_indices.device, width)
    return replace(mask, heads=heads, read=read, extra=width - mask.keys)


def _none(row: int, head: int, queries: np.ndarray) -> np.ndarray:
    raise NotImplementedError


def _dense(mine: Tensor, mask: GivenMask) -> GivenMask:
    shape, wanted = tuple(mine.shape), (mask.queries, mask.keys)
    if mine.ndim not in (2, 3, 4):
        forms = "[query, key], [batch, query, key] or [batch, heads, query, key]"
        raise ValueError(f"mine must be {forms}, got shape {shape}")
    if mine.dtype != torch.bool and not mine.is_floating_point():
        kinds = "bool, True visible, or a float to add to scores, 0 visible"
        raise TypeError(f"mine must be {kinds}, got {mine.dtype}; mine.bool() if 1 is visible")
    transposed = shape[-2:] == wanted[::-1] and mask.keys != mask.queries
    if shape[-2:] != wanted and not transposed:
        raise ValueError(_wrong_size(shape[-2:], mask, f"shape {shape}"))
    if mine.ndim > 2 and shape[0] not in (1, mask.rows):
        raise ValueError(f"mine must have 1 or {mask.rows} rows, as blocks, got shape {shape}")
    whole = mine.detach()
    whole = whole.reshape(-1 if mine.ndim > 2 else 1, *(shape[1:-2] or (1,)), *shape[-2:])
    whole = whole.transpose(2, 3) if transposed else whole
    positive = 0 if mine.dtype == torch.bool else sum(map(_positive, whole.flatten(0, 1)))

    def read(row: int, head: int, wanted: np.ndarray) -> np.ndarray:
        chosen = torch.from_numpy(wanted).to(whole.device)
        piece = whole[min(row, len(whole) - 1), head].index_select(0, chosen)
        return (piece if piece.dtype == torch.bool else piece == 0).cpu().numpy()

    heads = whole.shape[1]
    return replace(mask, heads=heads, read=read, transposed=transposed, positive=positive)


def _positive(mask: Tensor) -> int:
    """How many pairs of an additive mask are +inf; refuses values that are no mask's."""
    highest, count = torch.finfo(mask.dtype).max, 0
    for piece in mask.split(max(1, PIECE // max(1, mask.shape[1]))):
        lowest = float(piece.min())
        if lowest in _HIDDEN and bool(((piece == 0) | (piece == lowest)).all()):
            continue
        high = (piece == torch.inf) | (piece == highest)
        count += int(high.sum())
        known = high | (piece == 0)
        for hidden in _HIDDEN:
            known |= piece == hidden
        if not bool(known.all()):
            value = float(piece[~known][0])
            wanted = "0 where visible and -inf, or the dtype's minimum, where hidden"
            hint = "; mine.bool() if 1 means visible" if value == 1 else ""
            raise ValueError(f"mine as a float mask must be {wanted}, got {value}{hint}")
    return count


def _wrong_size(got: tuple[int, ...], mask: GivenMask, what: str) -> str:
    """A sentence on a mask of other sizes, with what they look like."""
    (length, width), anchors, size = got, mask.anchors, mask.block_size
    hint = ""
    if width == mask.seq_len and width != mask.keys:
        hint = "; the blocks' own slots are keys too, behind the context"
    elif length % anchors == 0 and length // anchors in (size - 1, size + 1):
        hint = f"; this looks like blocks of {length // anchors} slots"
    elif length == mask.queries and width > length:
        hint = f"; this looks like a context of {width - length} tokens"
    return (
        f"mine must have {mask.queries} queries ({anchors} blocks of {size} slots) and {mask.keys} "
        f"keys ({mask.seq_len} tokens of context, then the slots), got {length} and {width} "
        f"({what}){hint}"
    )


def _of_function(rule: MaskMod, device: torch.device, keys: int) -> Reader:
    """The rule asked as FlexAttention asks it: with indices that are tensors without axes."""
    by_key = torch.vmap(rule, in_dims=(None, None, None, 0))
    by_pair = torch.vmap(by_key, in_dims=(None, None, 0, None))

    def read(row: int, head: int, wanted: np.ndarray) -> np.ndarray:
        places = torch.tensor(row, device=device), torch.tensor(head, device=device)
        try:
            chosen = torch.from_numpy(wanted).to(device), torch.arange(keys, device=device)
            seen = by_pair(*places, *chosen)
        except Exception as error:  # whatever the user's function raises
            reason = " ".join(str(error).split())
            raise ValueError(f"mine, called as a mask function, failed: {reason}") from error
        if seen.dtype != torch.bool or seen.shape != (len(wanted), keys):
            got = f"{seen.dtype} of shape {tuple(seen.shape[2:])}"
            raise TypeError(f"mine, called as a mask function, must return a bool, got {got}")
        return seen.cpu().numpy()

    return read
