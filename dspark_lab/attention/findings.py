"""The verdict on each rule of a check, as a table and as sentences."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, Literal

import numpy as np
import pandas as pd

from dspark_lab.blocks import Blocks
from dspark_lab.chats import Batch

Mark = Literal["held", "broken", "likely broken", "unsure", "variant", "no case", "note"]
# Verdicts with which a check still passes.
PASSED = ("held", "unsure", "variant", "no case", "note")


@dataclass
class Finding:
    """What a check found of one rule: how often, and the first place.

    ``count`` of ``of`` blocks (or what ``unit`` says) differ, in ``pairs`` pairs of query and key.
    ``place`` says the first one in words; ``key`` is a place of the row, or of the slots behind
    it, ``token`` its text, or its id.
    """

    rule: str
    verdict: Mark
    finding: str = ""
    count: int = 0
    of: int = 0
    unit: str = "blocks"
    pairs: int | None = None
    row: int | None = None
    block: int | None = None
    slot: int | None = None
    key: int | None = None
    token: str | None = None
    place: str = ""

    @property
    def sentence(self) -> str:
        if not self.finding:
            return self.rule
        counted = f": {self.count:,} of {self.of:,} {self.unit}" if self.of else ""
        return f"{self.finding}{counted}{', first ' + self.place if self.place else ''}"


@dataclass(frozen=True, eq=False, repr=False)
class Findings:
    """The outcome of :func:`check_mask` or :func:`check_forward`; it prints as sentences.

    ``found`` has a finding for each rule, or for each fault where several break one rule. A verdict
    is *held*, *broken*, *likely broken* (on statistical evidence), *unsure*, *variant* (a known and
    legitimate difference), *no case* (there was nothing to judge by) or *note*.
    """

    subject: str
    found: tuple[Finding, ...]

    @property
    def ok(self) -> bool:
        """Whether no rule is broken; a variant breaks none."""
        return all(finding.verdict in PASSED for finding in self.found)

    @property
    def table(self) -> pd.DataFrame:
        """A row for each finding: the fields of :class:`Finding`, but for ``place``."""
        names = [field.name for field in fields(Finding) if field.name != "place"]
        rows = [[getattr(finding, name) for name in names] for finding in self.found]
        places = ["pairs", "row", "block", "slot", "key"]
        return pd.DataFrame(rows, columns=names).astype(dict.fromkeys(places, "Int64"))

    @property
    def sentences(self) -> list[str]:
        """What differs from the rules, each with its verdict, and what could not be told."""
        told = [found for found in self.found if found.verdict not in ("held", "no case")]
        return [f"{found.verdict}: {found.sentence}" for found in told]

    def __repr__(self) -> str:
        held = sum(found.verdict == "held" for found in self.found)
        start = f"{self.subject} is {'right' if self.ok else 'wrong'}; {held} rules hold"
        return "\n".join([start, *(f"- {sentence}" for sentence in self.sentences)])


@dataclass(frozen=True)
class Report:
    """Makes findings from flags of slots, [row, block, slot], counted in blocks or in slots.

    Flags may also be [row, query]. ``tokens`` is [row, seq], -1 where one is not known; ``keys``
    are the slots' places in the row unless a finding has others.
    """

    shape: tuple[int, int, int]
    tokens: np.ndarray
    to_text: Callable[[int], str] | None
    unit: Literal["blocks", "slots"]
    first_slot: int = 0
    keys: np.ndarray | None = None

    def held(self, rule: str, among: Any = True) -> Finding:
        """A rule that holds, or has no case where there is nothing ``among`` which to look."""
        of = self._count(among)
        return Finding(rule, "held" if of else "no case", of=of, unit=self.unit)

    def found(
        self,
        rule: str,
        finding: str,
        slots: np.ndarray,
        among: Any = True,
        key: np.ndarray | None = None,
        *,
        pairs: Any = None,
        verdict: Mark = "broken",
    ) -> Finding:
        """A finding of some slots ``among`` others; each has a ``key``."""
        row, block, slot = map(int, np.argwhere(slots.reshape(self.shape))[0])
        key = self.keys if key is None else key
        at = None if key is None else int(key.reshape(self.shape)[row, block, slot])
        counted = self._count(slots), self._count(among), self.unit
        pairs, place = None if pairs is None else int(pairs), self.place(row, block, slot, at)
        return Finding(rule, verdict, finding, *counted, pairs, **place)

    def _count(self, slots: Any) -> int:
        flags = np.asarray(slots)
        flags = flags.reshape(self.shape) if flags.ndim else np.broadcast_to(flags, self.shape)
        return int((flags.any(2) if self.unit == "blocks" else flags).sum())

    def place(self, row: int, block: int, slot: int, key: int | None = None) -> dict[str, Any]:
        """The fields of a finding that say where."""
        of_labels, token, shown = self.unit == "slots", None, ""
        seq_len, slots = self.tokens.shape[1], self.shape[1] * self.shape[2]
        words = [f"row {row}"] if self.shape[0] > 1 else []
        words += [f"block {block}"]
        words += [f"slot {slot + self.first_slot}"] if slot or of_labels else []
        if key is not None and key < seq_len and (number := int(self.tokens[row, key])) >= 0:
            token = str(number) if self.to_text is None else self.to_text(number)
            shown = f" (token {token})" if self.to_text is None else f" {token!r}"
        elif key is not None and seq_len <= key < seq_len + slots and not of_labels:
            other, place = divmod(key - seq_len, self.shape[2])
            shown = f" (slot {place} of block {other})"
        words += [] if key is None else [f"{'label' if of_labels else 'key'} {key}{shown}"]
        where = {"row": row, "block": block, "slot": slot + self.first_slot, "key": key}
        return where | {"token": token, "place": ", ".join(words)}


def require_rows(blocks: Blocks, batch: Batch | None) -> None:
    """Refuse rows that are not those of the blocks, and anchors outside of them."""
    if batch is not None and batch.input_ids.shape != blocks.doc_ids.shape:
        wanted = f"the rows of blocks, {tuple(blocks.doc_ids.shape)}"
        raise ValueError(f"batch must be {wanted}, got {tuple(batch.input_ids.shape)}")
    anchors, last = blocks.anchor_positions, blocks.seq_len - 1
    if anchors.numel() and not 0 <= int(anchors.min()) <= int(anchors.max()) <= last:
        got = f"{int(anchors.min())} to {int(anchors.max())}"
        raise ValueError(f"blocks must have anchors in [0, {last}], got {got}")
