"""A mask as counted by region, and how findings are made from it."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from dspark_lab.attention.findings import Finding, Mark, token_shown
from dspark_lab.attention.given_mask import GivenMask
from dspark_lab.attention.regions import Seats, Seen
from dspark_lab.blocks import Blocks
from dspark_lab.chats import Batch

Variant = Literal["causal", "hidden_dummies", "window"]


@dataclass(frozen=True)
class MaskView:
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

    def of_blocks(self, by_query: np.ndarray) -> np.ndarray:
        """[row, block]: whether any slot of a block is one of these queries."""
        return np.any(by_query.reshape(self.mask.rows, -1, self.mask.block_size), axis=2)

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
        verdict: Mark = "broken",
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

    def meant(self, variant: Variant) -> Mark:
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
