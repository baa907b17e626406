"""Rows of tokens: one conversation each with padding, or several packed together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Annotated

import numpy as np
import torch
from jaxtyping import Bool, Int, Shaped
from torch import Tensor

from dspark_lab.chats.chat import Encoded
from dspark_lab.chats.stream import row_facts, rows_with_labels, token_chunks, token_counts
from dspark_lab.checks import Count, Device, NotEmpty, Size, Within, checked, require
from dspark_lab.files import upload

if TYPE_CHECKING:
    import pandas

Conversations = Annotated[Sequence[Encoded], NotEmpty()]


@dataclass(frozen=True, eq=False)
class Batch:
    """Rows of one length, each holding one conversation or several (``doc``), then padding.

    ============== ================== =========================================================
    input_ids      long [batch, seq]  the pad token on padding
    loss_mask      bool [batch, seq]  True on supervised tokens
    attention_mask bool [batch, seq]  False on padding
    position_ids   long [batch, seq]  0, 1, 2, ... from the start of each document; 0 on padding
    doc_remaining  long [batch, seq]  tokens left in the document after this one; 0 on padding
    seq_lens       long [batch, doc]  length of each document, in order; 0 where there is none
    chat_index     long [batch, doc]  which of the given conversations it is; -1 where none
    ============== ================== =========================================================
    """

    input_ids: Int[Tensor, "batch seq"]
    loss_mask: Bool[Tensor, "batch seq"]
    attention_mask: Bool[Tensor, "batch seq"]
    position_ids: Int[Tensor, "batch seq"]
    doc_remaining: Int[Tensor, "batch seq"]
    seq_lens: Int[Tensor, "batch doc"]
    chat_index: Int[Tensor, "batch doc"]

    @classmethod
    @checked
    def of_tokens(
        cls,
        input_ids: Int[Tensor, "batch seq"],
        loss_mask: Shaped[Tensor, "batch seq"],
        *,
        doc_remaining: Int[Tensor, "batch seq"] | None = None,
        position_ids: Int[Tensor, "batch seq"] | None = None,
        seq_lens: Int[Tensor, "batch doc"] | None = None,
    ) -> Batch:
        """Rows of tokens without padding, each one document or as the last three arguments say."""
        given = {"doc_remaining": doc_remaining, "position_ids": position_ids, "seq_lens": seq_lens}
        missing = [name for name, value in given.items() if value is None]
        if len(missing) in (1, 2):
            raise ValueError(f"{', '.join(given)} go together, got no {', '.join(missing)}")
        if doc_remaining is None or position_ids is None or seq_lens is None:
            rows, seq_len = input_ids.shape
            position_ids = torch.arange(seq_len, device=input_ids.device).expand(rows, -1)
            doc_remaining = seq_len - 1 - position_ids
            seq_lens = position_ids.new_full((rows, 1), seq_len)
        everywhere = torch.ones_like(input_ids, dtype=torch.bool)
        none = torch.full_like(seq_lens, -1)
        return cls(input_ids, loss_mask, everywhere, position_ids, doc_remaining, seq_lens, none)

    @property
    def documents(self) -> list[list[tuple[int, int]]]:
        """Conversation and length of each row's documents, on the host.

        A batch that :meth:`to` brought to a device knows them without asking it.
        """
        if "_documents" in vars(self):
            return vars(self)["_documents"]
        rows = zip(self.chat_index.tolist(), self.seq_lens.tolist(), strict=True)
        return [[pair for pair in zip(*row, strict=True) if pair[1]] for row in rows]

    @checked
    def to(self, device: Device) -> Batch:
        moved = self._changed(lambda tensor: upload(tensor, device))
        known = "_documents" in vars(self) or self.input_ids.device.type == "cpu"
        if known and moved.input_ids.device.type != "cpu":
            vars(moved)["_documents"] = self.documents
        return moved

    def row(self, row: int) -> Batch:
        require("row", row, Annotated[int, Within(0, len(self.input_ids) - 1)])
        return self._changed(lambda tensor: tensor[row : row + 1])

    def _changed(self, change: Callable[[Tensor], Tensor]) -> Batch:
        return Batch(**{field.name: change(getattr(self, field.name)) for field in fields(self)})


@checked
def collate(encoded: Conversations, pad_token_id: Size, length: Count | None = None) -> Batch:
    """One conversation a row, padded on the right to the longest or to ``length`` tokens.

    A tokenizer without a pad token can pad with its eos token.
    """
    length = int(token_counts(encoded).max()) if length is None else length
    _check_lengths(encoded, length)
    return _fill([[index] for index in range(len(encoded))], encoded, pad_token_id, length)


@checked
def pack(encoded: Conversations, length: Count, pad_token_id: Size) -> Batch:
    """Several conversations a row of ``length`` tokens; none is split, each is there once.

    First-fit decreasing: longest first (equal lengths in the given order), each goes into the first
    row with room.
    """
    _check_lengths(encoded, length)
    rows = packed_rows(token_counts(encoded), length)
    return _fill(rows, encoded, pad_token_id, length)


@checked
def one_row(encoded: Conversations, length: Count, pad_token_id: Size) -> Batch:
    """The given conversations in a single row of ``length`` tokens, in the given order."""
    tokens = sum(len(item) for item in encoded)
    if tokens > length:
        raise ValueError(f"length must hold all conversations, {tokens} tokens, got {length}")
    return _fill([list(range(len(encoded)))], encoded, pad_token_id, length)


@checked
def fill_rows(
    encoded: Conversations,
    rows: Annotated[Sequence[Annotated[Sequence[Size], NotEmpty()]], NotEmpty()],
    length: Count,
    pad_token_id: Size,
) -> Batch:
    """Rows of ``length`` tokens, each of which holds the conversations that it lists, in order."""
    for row in rows:
        if max(row) >= len(encoded):
            raise ValueError(f"rows must list indices below {len(encoded)}, got {max(row)}")
        tokens = sum(len(encoded[index]) for index in row)
        if tokens > length:
            raise ValueError(f"length must hold every row, of {tokens} tokens, got {length}")
    return _fill([list(row) for row in rows], encoded, pad_token_id, length)


@checked
def describe(encoded: Sequence[Encoded]) -> pandas.DataFrame:
    """One row for each domain ("none" for none), in order of appearance, and its counts of tokens.

    Conversations ``without_labels`` have nothing to train on. Where there are any, ``left_out``
    counts the answers of which the template leaves out a part because others follow, and
    ``marker_differences`` the tokens that only one of the rule and the template's
    ``{% generation %}`` markers supervises (:class:`Encoded`).
    """
    import pandas as pd

    domains, left_out, differences = row_facts(encoded)
    supervised = [
        np.bincount(chunk.of_token(), chunk.loss_mask, len(chunk.lengths)).astype(np.int64)
        for chunk in token_chunks(encoded)
    ]
    table = pd.DataFrame(
        {
            "domain": [domain or "none" for domain in domains],
            "length": token_counts(encoded),
            "supervised": np.concatenate([*supervised, np.empty(0, np.int64)]),
            "without_label": ~rows_with_labels(encoded),
        }
    )
    counts = {"left_out": left_out, "marker_differences": differences}
    counts = {name: counted for name, counted in counts.items() if any(counted)}
    return (
        table.assign(**counts)
        .groupby("domain", sort=False)
        .agg(
            conversations=("length", "size"),
            tokens=("length", "sum"),
            supervised_tokens=("supervised", "sum"),
            median_length=("length", "median"),
            longest=("length", "max"),
            without_labels=("without_label", "sum"),
            **{name: (name, "sum") for name in counts},
        )
    )


@checked
def packed_places(
    lengths: Int[np.ndarray, " document"], row_length: Count
) -> tuple[Int[np.ndarray, " document"], Int[np.ndarray, " document"]]:
    """In which row :func:`pack` puts documents of these lengths, and where in it each begins.

    All documents of one length go in one step: they fill the first row with room as far as it goes,
    then the next. No length may be above ``row_length``.
    """
    if len(lengths) and not 1 <= lengths.min() <= lengths.max() <= row_length:
        raise ValueError(
            f"lengths must lie in [1, {row_length}], got {lengths.min()} to {lengths.max()}"
        )
    order = np.argsort(-lengths, kind="stable")
    _, first = np.unique(-lengths[order], return_index=True)
    # One row for each document is always enough.
    room = np.full(len(lengths), row_length)
    row, start = np.empty_like(lengths), np.empty_like(lengths)
    used = 0
    for alike in np.split(order, first[1:]):
        length = lengths[alike[0]]
        new = -(-len(alike) // (row_length // length))
        left = room[: used + new]
        fit = left // length
        behind = fit.cumsum()
        number = np.arange(len(alike))
        into = np.searchsorted(behind, number, side="right")
        row[alike] = into
        start[alike] = row_length - left[into] + (number - behind[into] + fit[into]) * length
        left -= np.bincount(into, minlength=len(left)) * length
        used = max(used, int(into[-1]) + 1)
    return row, start


@checked
def packed_rows(lengths: Int[np.ndarray, " document"], row_length: Count) -> list[list[int]]:
    """The documents of each row of :func:`packed_places`, in the order in which they stand."""
    row, start = packed_places(lengths, row_length)
    rows: list[list[int]] = [[] for _ in range(int(row.max(initial=-1)) + 1)]
    for index in np.argsort(start, kind="stable").tolist():
        rows[row[index]].append(index)
    return rows


def _check_lengths(encoded: Sequence[Encoded], length: int) -> None:
    for index in np.flatnonzero(token_counts(encoded) > length)[:1]:
        item = encoded[int(index)]
        got = f"conversation {item.id!r} has {len(item)} tokens, more than length {length}"
        raise ValueError(f"{got}; truncate it with encode(..., max_length={length})")


def _fill(
    rows: list[list[int]], encoded: Sequence[Encoded], pad_token_id: int, length: int
) -> Batch:
    """The batch whose row r holds the conversations with the indices ``rows[r]``, in order."""
    docs = (len(rows), max(len(row) for row in rows))
    input_ids = torch.full((len(rows), length), pad_token_id)
    batch = Batch(
        input_ids,
        loss_mask=torch.zeros_like(input_ids, dtype=torch.bool),
        attention_mask=torch.zeros_like(input_ids, dtype=torch.bool),
        position_ids=torch.zeros_like(input_ids),
        doc_remaining=torch.zeros_like(input_ids),
        seq_lens=torch.zeros(docs, dtype=torch.long),
        chat_index=torch.full(docs, -1),
    )
    for row, indices in enumerate(rows):
        start = 0
        for doc, index in enumerate(indices):
            item = encoded[index]
            place = (row, slice(start, start + len(item)))
            batch.input_ids[place] = item.input_ids
            batch.loss_mask[place] = item.loss_mask
            batch.attention_mask[place] = True
            batch.position_ids[place] = torch.arange(len(item))
            batch.doc_remaining[place] = torch.arange(len(item)).flip(0)
            batch.seq_lens[row, doc] = len(item)
            batch.chat_index[row, doc] = index
            start += len(item)
    return batch
