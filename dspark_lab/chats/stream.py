"""All tokens of a data set a stretch at a time, whether its rows are in memory or on disk."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from dspark_lab.chats.chat import Encoded

_TENSORS = ("input_ids", "loss_mask")


class Chunk(NamedTuple):
    """Rows one behind the other."""

    lengths: Int[np.ndarray, " row"]
    input_ids: Int[np.ndarray, " token"]
    loss_mask: Bool[np.ndarray, " token"]

    def of_token(self) -> Int[np.ndarray, " token"]:
        """The row of each token."""
        return np.repeat(np.arange(len(self.lengths)), self.lengths)


@runtime_checkable
class OnDisk(Protocol):
    """Rows that are cheaper to read in stretches than one by one."""

    @property
    def lengths(self) -> Int[np.ndarray, " row"]: ...

    def chunks(self, tokens: int) -> Iterator[Chunk]: ...


def token_chunks(encoded: Sequence[Encoded], tokens: int = 2**20) -> Iterator[Chunk]:
    """All rows in turn, about so many tokens at a time, whether they are in memory or on disk."""
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


def token_counts(encoded: Sequence[Encoded]) -> Int[np.ndarray, " row"]:
    """Tokens of each row."""
    if isinstance(encoded, OnDisk):
        return encoded.lengths
    return np.array([len(item) for item in encoded], dtype=np.int64)


def rows_with_labels(encoded: Sequence[Encoded]) -> Bool[np.ndarray, " row"]:
    """Whether each row has two supervised tokens, one after the other."""
    found = [np.zeros(0, bool)]
    for chunk in token_chunks(encoded):
        row, mask = chunk.of_token(), chunk.loss_mask
        pairs = mask[1:] & mask[:-1] & (row[1:] == row[:-1])
        found.append(np.zeros(len(chunk.lengths), bool))
        found[-1][row[1:][pairs]] = True
    return np.concatenate(found)


def seen_tokens(encoded: Sequence[Encoded], vocab_size: int) -> Bool[Tensor, " token"]:
    """Which tokens of a vocabulary the rows hold."""
    seen = np.zeros(vocab_size, bool)
    for chunk in token_chunks(encoded):
        seen[np.unique(chunk.input_ids)] = True
    return torch.from_numpy(seen)


def offsets(lengths: Int[np.ndarray, " row"]) -> Int[np.ndarray, " token"]:
    """0, 1, ... in each row."""
    return np.arange(lengths.sum()) - np.repeat(lengths.cumsum() - lengths, lengths)
