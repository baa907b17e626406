"""All tokens of a data set a stretch at a time, whether its rows are in memory or on disk."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from dspark_lab.chats.chat import Encoded
from dspark_lab.checks import Count, checked

_TENSORS = ("input_ids", "loss_mask")
# Tokens of a stretch where nothing else is asked for.
STRETCH = 2**20


class Chunk(NamedTuple):
    """Rows one behind the other."""

    lengths: Int[np.ndarray, " row"]
    input_ids: Int[np.ndarray, " token"]
    loss_mask: Bool[np.ndarray, " token"]

    def of_token(self) -> Int[np.ndarray, " token"]:
        """The row of each token."""
        return np.repeat(np.arange(len(self.lengths)), self.lengths)


# Of each row its domain, ``left_out`` and ``marker_differences``.
RowFacts = tuple[list[str | None], Any, Any]


@runtime_checkable
class OnDisk(Protocol):
    """Rows that are cheaper to read in stretches than one by one."""

    @property
    def lengths(self) -> Int[np.ndarray, " row"]: ...

    def chunks(self, tokens: int) -> Iterator[Chunk]: ...

    def row_facts(self) -> RowFacts: ...


@checked
def token_chunks(encoded: Sequence[Encoded], tokens: Count | None = None) -> Iterator[Chunk]:
    """All rows in turn, about so many tokens at a time, whether they are in memory or on disk."""
    tokens = tokens or STRETCH
    if isinstance(encoded, OnDisk):
        return encoded.chunks(tokens)
    return chunks_of_rows(encoded, tokens)


def chunks_of_rows(encoded: Sequence[Encoded], tokens: int) -> Iterator[Chunk]:
    part: list[Encoded] = []
    count = 0
    for item in encoded:
        part.append(item)
        count += len(item)
        if count >= tokens:
            yield _chunk(part)
            part, count = [], 0
    if part:
        yield _chunk(part)


def _chunk(rows: list[Encoded]) -> Chunk:
    lengths = np.array([len(row) for row in rows])
    ids, mask = (torch.cat([getattr(row, name) for row in rows]) for name in _TENSORS)
    return Chunk(lengths, ids.cpu().numpy(), mask.cpu().numpy())


@checked
def token_counts(encoded: Sequence[Encoded]) -> Int[np.ndarray, " row"]:
    """Tokens of each row."""
    if isinstance(encoded, OnDisk):
        return encoded.lengths
    return np.array([len(item) for item in encoded], dtype=np.int64)


def row_facts(encoded: Sequence[Encoded]) -> RowFacts:
    if isinstance(encoded, OnDisk):
        return encoded.row_facts()
    left_out = [item.left_out for item in encoded]
    return [item.domain for item in encoded], left_out, [i.marker_differences for i in encoded]


@checked
def rows_with_labels(encoded: Sequence[Encoded]) -> Bool[np.ndarray, " row"]:
    """Whether each row has two supervised tokens, one after the other."""
    found = [np.zeros(0, bool)]
    for chunk in token_chunks(encoded):
        row, mask = chunk.of_token(), chunk.loss_mask
        pairs = mask[1:] & mask[:-1] & (row[1:] == row[:-1])
        found.append(np.zeros(len(chunk.lengths), bool))
        found[-1][row[1:][pairs]] = True
    return np.concatenate(found)


@checked
def seen_tokens(encoded: Sequence[Encoded], vocab_size: Count) -> Bool[Tensor, " token"]:
    """Which tokens of a vocabulary the rows hold."""
    if isinstance(encoded, OnDisk):
        parts = (torch.from_numpy(np.unique(part.input_ids)) for part in encoded.chunks(STRETCH))
    else:
        parts = (item.input_ids for item in encoded)
    seen = None
    for ids in parts:
        if seen is None:
            seen = torch.zeros(vocab_size, dtype=torch.bool, device=ids.device)
        try:
            seen[ids.long()] = True
        except IndexError as error:
            wanted = f"token ids must lie in [0, {vocab_size - 1}]"
            raise ValueError(f"{wanted}: {error}") from None
    return torch.zeros(vocab_size, dtype=torch.bool) if seen is None else seen


@checked
def offsets(lengths: Int[np.ndarray, " group"]) -> Int[np.ndarray, " token"]:
    """0, 1, ... in each of the groups."""
    return np.arange(lengths.sum()) - np.repeat(lengths.cumsum() - lengths, lengths)
