"""A user's mask of any form, read a few queries at a time as bool arrays on the host."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from dspark_lab.attention.mask import MaskMod
from dspark_lab.blocks import Blocks

# Pairs that are looked at together.
PIECE = 2**22


@dataclass(frozen=True)
class GivenMask:
    """A mask of the queries and keys of some blocks.

    ``queries_seen`` gives, for a row, a head and queries, which keys are visible: the context, the
    slots, and ``extra`` keys behind them, to which a ``BlockMask`` may be padded. The other fields
    say how the mask differs in form from the rule's: axes swapped; hidden pairs that are +inf;
    visible and hidden exchanged; slots before the context; queries slot after slot.
    """

    rows: int
    heads: int
    seq_len: int
    anchors: int
    block_size: int
    queries_seen: Callable[[int, int, np.ndarray], np.ndarray]
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
        given = self._slot_major(np.arange(self.queries)) if self.slot_major else None
        seen = self.queries_seen(row, head, queries if given is None else given[queries])
        real, behind = seen[:, : self.keys], seen[:, self.keys :]
        if self.inverted:
            real = ~real
        if self.slots_first:
            real = np.roll(real, self.seq_len, axis=1)
        if given is not None:
            real = np.concatenate([real[:, : self.seq_len], real[:, self.seq_len + given]], 1)
        return np.concatenate([real, behind], 1) if self.extra else real

    def _slot_major(self, query: np.ndarray) -> np.ndarray:
        """Where a query stands if those of slot 0 come first, of all blocks, and so on."""
        return query % self.block_size * self.anchors + query // self.block_size

    def pieces(self, unit: int = 1) -> Iterator[np.ndarray]:
        """All queries, in runs of a multiple of ``unit`` that are not too long."""
        step = max(1, PIECE // (self.keys + self.extra) // unit) * unit
        for low in range(0, self.queries, step):
            yield np.arange(low, min(low + step, self.queries))

    def readings(self) -> Iterator[GivenMask]:
        """The same mask as other forms would have it."""
        for inverted in (False, True):
            for slots_first in (False, True):
                for slot_major in (False, True):
                    if inverted or slots_first or slot_major:
                        yield replace(
                            self, inverted=inverted, slots_first=slots_first, slot_major=slot_major
                        )


def given_mask(mine: Tensor | BlockMask | MaskMod, blocks: Blocks, heads: int) -> GivenMask:
    """Read the user's mask; refuse one that is no mask or not of these blocks' sizes."""
    rows, anchors = blocks.anchor_positions.shape
    sizes: dict[str, Any] = {
        "rows": rows,
        "seq_len": blocks.seq_len,
        "block_size": blocks.block_size,
    }
    sizes["anchors"] = anchors
    queries, keys = anchors * blocks.block_size, blocks.seq_len + anchors * blocks.block_size
    if isinstance(mine, Tensor):
        return _dense(mine, sizes, queries, keys)
    if not isinstance(mine, BlockMask):
        read = _of_function(mine, blocks.anchor_positions.device, keys)
        return GivenMask(**sizes, heads=heads, queries_seen=read)
    tiled_rows, heads = mine.kv_num_blocks.shape[:2]
    if tiled_rows not in (1, rows):
        raise ValueError(f"mine must have 1 or {rows} rows, as blocks, got {tiled_rows}")
    length, width = map(int, mine.seq_lengths)
    for name, got, wanted, tile in zip(
        ("queries", "keys"), (length, width), (queries, keys), mine.BLOCK_SIZE, strict=True
    ):
        if got not in {wanted, _padded(wanted, 128), _padded(wanted, tile)}:
            raise ValueError(_wrong_size((length, width), (queries, keys), sizes, name))
    read = _of_function(mine.mask_mod, mine.kv_indices.device, width)
    return GivenMask(**sizes, heads=heads, queries_seen=read, extra=width - keys)


def _padded(size: int, tile: int) -> int:
    return -(-size // tile) * tile


def _dense(mine: Tensor, sizes: dict[str, Any], queries: int, keys: int) -> GivenMask:
    rows, shape = sizes["rows"], tuple(mine.shape)
    if mine.ndim not in (2, 3, 4):
        forms = "[query, key], [batch, query, key] or [batch, heads, query, key]"
        raise ValueError(f"mine must be {forms}, got shape {shape}")
    if mine.dtype != torch.bool and not mine.is_floating_point():
        wanted = "bool, True visible, or a float to add to scores, 0 visible"
        raise TypeError(f"mine must be {wanted}, got {mine.dtype}; mine.bool() if 1 is visible")
    transposed = shape[-2:] == (keys, queries) and keys != queries
    if shape[-2:] != (queries, keys) and not transposed:
        raise ValueError(_wrong_size(shape[-2:], (queries, keys), sizes, f"shape {shape}"))
    if mine.ndim > 2 and shape[0] not in (1, rows):
        raise ValueError(f"mine must have 1 or {rows} rows, as blocks, got shape {shape}")
    whole = mine.detach()
    whole = whole.reshape(-1 if mine.ndim > 2 else 1, *(shape[1:-2] or (1,)), *shape[-2:])
    whole = whole.transpose(2, 3) if transposed else whole

    def read(row: int, head: int, wanted: np.ndarray) -> np.ndarray:
        chosen = torch.from_numpy(wanted).to(whole.device)
        piece = whole[min(row, len(whole) - 1), head][chosen]
        return (piece if piece.dtype == torch.bool else piece == 0).cpu().numpy()

    given = GivenMask(**sizes, heads=whole.shape[1], queries_seen=read, transposed=transposed)
    positive = 0 if mine.dtype == torch.bool else sum(map(_positive, whole.flatten(0, 1)))
    return replace(given, positive=positive)


def _positive(mask: Tensor) -> int:
    """How many pairs of an additive mask are +inf; refuses values that are no mask's."""
    limits, count = torch.finfo(mask.dtype), 0
    for piece in mask.split(max(1, PIECE // max(1, mask.shape[1]))):
        high = (piece == torch.inf) | (piece == limits.max)
        known = (piece == 0) | (piece == -torch.inf) | (piece == limits.min) | high
        count += int(high.sum())
        if not bool(known.all()):
            value = float(piece[~known][0])
            wanted = "0 where visible and -inf, or the dtype's minimum, where hidden"
            hint = "; mine.bool() if 1 means visible" if value == 1 else ""
            raise ValueError(f"mine as a float mask must be {wanted}, got {value}{hint}")
    return count


def _wrong_size(
    got: tuple[int, ...], wanted: tuple[int, int], sizes: dict[str, int], what: str
) -> str:
    """A sentence on a mask of other sizes, with what they look like."""
    (queries, keys), (length, width) = wanted, got
    seq_len, anchors, block_size = sizes["seq_len"], sizes["anchors"], sizes["block_size"]
    hint = ""
    if width == seq_len and width != keys:
        hint = "; the blocks' own slots are keys too, behind the context"
    elif length % anchors == 0 and length // anchors in (block_size - 1, block_size + 1):
        hint = f"; this looks like blocks of {length // anchors} slots"
    elif length == queries and width > queries:
        hint = f"; this looks like a context of {width - queries} tokens"
    return (
        f"mine must have {queries} queries ({anchors} blocks of {block_size} slots) and {keys} "
        f"keys ({seq_len} tokens of context, then the slots), got {length} and {width} "
        f"({what}){hint}"
    )


def _of_function(
    rule: MaskMod, device: torch.device, keys: int
) -> Callable[[int, int, np.ndarray], np.ndarray]:
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
