"""Where the supervised tokens of a data set are: its runs, documents and rows.

A *run* is a longest stretch of supervised tokens within one document. Its candidates for anchors
are all its tokens but the last, and its first token is never a label. *Per* row, document or
micro-batch ``num_anchors`` are drawn; unpacked, the first two are the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from jaxtyping import Bool, Int, Shaped

from dspark_lab.blocks import Per
from dspark_lab.chats import Batch, Encoded, packed_places, token_chunks, token_counts
from dspark_lab.checks import Count, Size, checked
from dspark_lab.training import row_groups


@dataclass(frozen=True, eq=False)
class Spans:
    """Supervised tokens of a data set.

    Documents are the conversations in the given order (of a batch: row by row), runs are in the
    order of the documents. ``run_start`` is a position in the run's document; ``run_tokens`` and
    ``document_tokens`` include what is beyond the cut, ``document_kept`` does not; ``row_tokens``
    include padding. ``row_batch`` numbers the micro-batches that rows are of, where it is known.
    """

    run_document: Int[np.ndarray, " run"]
    run_start: Int[np.ndarray, " run"]
    run_tokens: Int[np.ndarray, " run"]
    document_tokens: Int[np.ndarray, " document"]
    document_kept: Int[np.ndarray, " document"]
    document_row: Int[np.ndarray, " document"]
    row_tokens: Int[np.ndarray, " row"]
    row_batch: Int[np.ndarray, " row"] | None = None

    @classmethod
    @checked
    def of(
        cls, data: Data, *, seq_len: Count | None = None, row_length: Count | None = None
    ) -> Spans:
        """The spans of a batch with its rows as they are, or of conversations, each its own row.

        ``seq_len`` cuts each conversation to its first tokens; ``row_length`` packs them into rows
        of that many tokens, exactly as :func:`dspark_lab.chats.pack` does; none may be longer. A
        batch is one micro-batch; :meth:`in_batches` says which rows of conversations make one.
        """
        if isinstance(data, (Spans, Batch)):
            if seq_len is not None or row_length is not None:
                kind = "spans have their" if isinstance(data, Spans) else "a batch has its"
                raise ValueError(f"{kind} rows already: neither seq_len nor row_length")
            return data if isinstance(data, Spans) else cls._of_batch(data)
        encoded = [data] if isinstance(data, Encoded) else data
        if not len(encoded):
            raise ValueError("data must hold at least one conversation, got none")
        tokens = token_counts(encoded)
        kept = tokens if seq_len is None else np.minimum(tokens, seq_len)
        row, row_tokens = np.arange(len(tokens)), kept
        if row_length is not None:
            longest = int(kept.argmax())
            if kept[longest] > row_length:
                has = f"conversation {encoded[longest].id!r} has {kept[longest]} tokens"
                wanted = f"length {row_length} of a row; cut it with seq_len={row_length}"
                raise ValueError(f"{has}, more than {wanted}")
            row, _ = packed_places(kept, row_length)
            row_tokens = np.full(row.max() + 1, row_length)
        # The masks of all conversations are never in memory at once.
        found, documents = [], 0
        for chunk in token_chunks(encoded):
            starts = chunk.lengths.cumsum() - chunk.lengths
            document, start, length = _runs(chunk.loss_mask, starts)
            found.append((document + documents, start, length))
            documents += len(starts)
        document, start, length = map(np.concatenate, zip(*found, strict=True))
        return cls(document, start, length, tokens, kept, row, row_tokens)

    @classmethod
    def _of_batch(cls, batch: Batch) -> Spans:
        rows, seq_len = batch.loss_mask.shape
        lengths = batch.seq_lens.cpu().numpy()
        row, place = np.nonzero(lengths)
        tokens = lengths[row, place]
        start = (lengths.cumsum(axis=1) - lengths)[row, place]
        runs = _runs(batch.loss_mask.flatten().cpu().numpy(), row * seq_len + start)
        one = np.zeros(rows, dtype=np.int64)
        return cls(*runs, tokens, tokens, row, np.full(rows, seq_len), one)

    @checked
    def in_batches(self, rows: Count | Sequence[Sequence[Size]]) -> Spans:
        """The same rows in micro-batches: of so many rows in their order, or of the rows listed.

        The rows that are left over, or not listed, are a last micro-batch.
        """
        if isinstance(rows, int):
            return replace(self, row_batch=np.arange(self.rows) // rows)
        listed = [row for group in rows for row in group]
        if len(set(listed)) < len(listed) or max(listed, default=0) >= self.rows:
            wanted = f"each of the {self.rows} rows once at most"
            raise ValueError(f"rows must name {wanted}, got {len(listed)} up to {max(listed)}")
        row_batch = np.full(self.rows, len(rows))
        for number, group in enumerate(rows):
            row_batch[list(group)] = number
        return replace(self, row_batch=row_batch)

    @checked
    def of_rows(self, chosen: Bool[np.ndarray, " row"]) -> Spans:
        """The chosen rows alone, with their documents, in the same order."""
        documents = chosen[self.document_row]
        runs = documents[self.run_document]
        return replace(
            self,
            run_document=(documents.cumsum() - 1)[self.run_document[runs]],
            run_start=self.run_start[runs],
            run_tokens=self.run_tokens[runs],
            document_tokens=self.document_tokens[documents],
            document_kept=self.document_kept[documents],
            document_row=(chosen.cumsum() - 1)[self.document_row[documents]],
            row_tokens=self.row_tokens[chosen],
            row_batch=None if self.row_batch is None else self.row_batch[chosen],
        )

    @property
    def rows(self) -> int:
        return len(self.row_tokens)

    @property
    def documents(self) -> int:
        return len(self.document_tokens)

    @cached_property
    def run_kept(self) -> Int[np.ndarray, " run"]:
        """Tokens of each run before the cut."""
        room = self.document_kept[self.run_document] - self.run_start
        return np.clip(room, 0, self.run_tokens)

    @cached_property
    def supervised(self) -> int:
        return int(self.run_kept.sum())

    @cached_property
    def rows_without_label(self) -> int:
        """Rows that hold no candidate, from which nothing is learned."""
        return int((self.candidates("row") == 0).sum())

    def unit(self, per: Per) -> Int[np.ndarray, " document"]:
        """The row, document or micro-batch in which each document's anchors are drawn."""
        if per == "document":
            return np.arange(self.documents)
        if per == "row":
            return self.document_row
        if self.row_batch is None:
            known = "which rows are drawn from together: Spans.of(data).in_batches(rows)"
            raise ValueError(f"per 'batch' needs to know {known}")
        return self.row_batch[self.document_row]

    def candidates(self, per: Per) -> Int[np.ndarray, " unit"]:
        """Candidates of each row, document or micro-batch."""
        unit = self.unit(per)
        units = {"row": self.rows, "document": self.documents}.get(per)
        if units is None:
            units = int(unit.max(initial=-1)) + 1
        return sum_by(unit[self.run_document], np.maximum(self.run_kept - 1, 0), units)

    def groups(self, per: Per) -> tuple[Int[np.ndarray, " n"], ...]:
        """The runs in groups whose rows, documents or batches have equally many candidates.

        The candidates of each group, then the group and the length of each run.
        """
        if per not in self._groups:
            inside = self.run_kept > 0
            candidates = self.candidates(per)[self.unit(per)[self.run_document[inside]]]
            found, run_group = np.unique(candidates, return_inverse=True)
            self._groups[per] = (found, run_group.ravel(), self.run_kept[inside])
        return self._groups[per]

    @cached_property
    def _groups(self) -> dict[Per, tuple[Int[np.ndarray, " n"], ...]]:
        return {}


@checked
def in_training_batches(spans: Spans, batch_size: Count) -> Spans:
    """The spans' rows in the micro-batches of a training run's first epoch, of seed 0."""
    return spans.in_batches(row_groups(spans.row_tokens, batch_size))


@checked
def training_steps(spans: Spans, batch_size: Count, per: Per) -> tuple[Spans, float]:
    """The rows of an epoch's micro-batches, and how many of these there are, over many epochs.

    Rows that fill no batch have their turn in another epoch. Where anchors are drawn per batch,
    as many in a batch of fewer rows would be denser than any in training, so none is counted.
    """
    if spans.rows < batch_size:
        raise ValueError(
            f"batch_size must be at most the number of rows, {spans.rows}, got {batch_size}"
        )
    if per != "batch":
        return spans, spans.rows / batch_size
    steps = spans.rows // batch_size
    spans = in_training_batches(spans, batch_size)
    assert spans.row_batch is not None
    return spans.of_rows(spans.row_batch < steps), steps


# What coverage takes: spans, made once for many choices, or what they are made of.
Data = Spans | Batch | Encoded | Sequence[Encoded]


def sum_by(
    place: Int[np.ndarray, " item"], values: Shaped[np.ndarray, " item"], places: int
) -> Int[np.ndarray, " place"]:
    """The sum of the values at each place; exact, since sums stay far below 2^53."""
    return np.bincount(place, values, places).astype(np.int64)


def _runs(
    mask: Bool[np.ndarray, " token"], starts: Int[np.ndarray, " document"]
) -> tuple[Int[np.ndarray, " run"], Int[np.ndarray, " run"], Int[np.ndarray, " run"]]:
    """Document, start in it, and length of each run of documents that follow one another."""
    edges = np.flatnonzero(mask[1:] != mask[:-1]) + 1
    edges = np.concatenate([[0] if mask[0] else [], edges, [len(mask)] if mask[-1] else []])
    # A run ends with its document, though the next one may begin with a supervised token.
    later = starts[1:]
    split = later[mask[later - 1] & mask[later]]
    first, stop = (
        np.sort(np.concatenate([edges[side::2], split])).astype(np.int64) for side in (0, 1)
    )
    document = np.searchsorted(starts, first, side="right") - 1
    return document, first - starts[document], stop - first
