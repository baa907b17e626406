"""Encoded conversations on disk: made in batches on all cores, read row by row.

A set lies in a folder whose name is a fingerprint of all that it was made from. Its columns are
plain arrays that only grow, a file each. Its journal gets a line for each part, once the part is in
the columns: what lies behind the last line that holds was torn, and is cut off before a run goes
on.
"""

from __future__ import annotations

import hashlib
import json
import os
import warnings
import zlib
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, field
from functools import cached_property, partial
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, overload

import numpy as np
import torch
from jaxtyping import Int, Shaped
from safetensors.numpy import load, save
from tqdm import tqdm

from dspark_lab.chats.answers import render
from dspark_lab.chats.chat import Chat, Encoded
from dspark_lab.chats.cores import in_order, usable_cores
from dspark_lab.chats.edges import ByteLevel
from dspark_lab.chats.plans import Plan, run_plans, tokenize
from dspark_lab.chats.reading import Skipped, raw_rows, read_raw
from dspark_lab.chats.stream import Chunk, RowFacts, chunks_of_rows, offsets
from dspark_lab.chats.tokens import LEFT_OUT, check_tokenizer, cut, row_arrays
from dspark_lab.chats.trainers import Like, trainer_plan
from dspark_lab.checks import Count, checked
from dspark_lab.files import read_json, remove_partial, sync, write_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer

# What a row is, in the order of a part's checksum. ``fact`` has four numbers a row: where it came
# from (a line of the file, an index of the list), its domain, left_out and marker_differences.
COLUMNS = {
    "input_id": np.dtype("<i4"),
    "loss_mask": np.dtype("?"),
    "row_end": np.dtype("<i8"),
    "id_byte": np.dtype("u1"),
    "id_end": np.dtype("<i8"),
    "fact": np.dtype("<i8"),
}
_FACTS = 4
_JOURNAL, _DONE, _LOCK = "journal.jsonl", "done.json", "lock"
# A part holds so many conversations, or fewer that are long.
_PART_ITEMS, _PART_BYTES = 256, 2**19


@dataclass(frozen=True)
class _Settings:
    """The options of :func:`dspark_lab.encode`."""

    max_length: int | None
    like: Like | None
    markers: bool
    last_answer_only: bool
    template_options: Mapping[str, Any] | None


@checked
class EncodedChats(Sequence[Encoded]):
    """Rows of :func:`encode_all`, each read from disk when it is asked for.

    A slice is such a sequence, too. ``skipped`` holds file, line and reason of what was left out.
    """

    # So that the check of an annotation need not read every row.
    elements = Encoded

    def __init__(
        self,
        folder: Path,
        chats: Sequence[Chat | Encoded] | None = None,
        rows: range | None = None,
        max_length: Count | None = None,
    ) -> None:
        self.folder, self._chats, self._max_length = folder, chats, max_length
        self._facts = read_json(folder / _DONE)
        self._rows = range(self._facts["ends"]["row_end"]) if rows is None else rows
        self.skipped = [Skipped(*entry) for entry in self._facts["skipped"]]

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, index: int) -> Encoded: ...

    @overload
    def __getitem__(self, index: slice) -> EncodedChats: ...

    def __getitem__(self, index: int | slice) -> Encoded | EncodedChats:
        if isinstance(index, slice):
            return EncodedChats(self.folder, self._chats, self._rows[index], self._max_length)
        row = self._rows[index]
        start, stop = self._span("row_end", row)
        if self._max_length is not None:
            stop = min(stop, start + self._max_length)
        source, domain, left_out, differences = self._read("fact", _FACTS * row, _FACTS).tolist()
        name_start, name_stop = self._span("id_end", row)
        name = json.loads(self._read("id_byte", name_start, name_stop - name_start).tobytes())
        chat = None if self._chats is None else self._chats[source]
        return Encoded(
            torch.from_numpy(self._read("input_id", start, stop - start).astype(np.int64)),
            torch.from_numpy(self._read("loss_mask", start, stop - start)),
            chat if isinstance(chat, Chat) else None,
            id=name,
            domain=self._facts["domains"][domain] if domain >= 0 else None,
            left_out=left_out,
            marker_differences=differences,
        )

    def __repr__(self) -> str:
        return f"EncodedChats({len(self)} rows, {str(self.folder)!r})"

    @cached_property
    def lengths(self) -> Int[np.ndarray, " row"]:
        """Tokens of each row."""
        if not len(self):
            return np.empty(0, np.int64)
        ends = np.memmap(self.folder / "row_end", COLUMNS["row_end"], "r")
        all_lengths = np.diff(ends, prepend=0)
        lengths = all_lengths[self._rows.start : self._rows.stop : self._rows.step]
        return lengths if self._max_length is None else np.minimum(lengths, self._max_length)

    def row_facts(self) -> RowFacts:
        """Of each row its domain, ``left_out`` and ``marker_differences``."""
        names = [*self._facts["domains"], None]
        facts = np.memmap(self.folder / "fact", COLUMNS["fact"], "r") if len(self) else np.empty(0)
        rows = facts.reshape(-1, _FACTS)[self._rows.start : self._rows.stop : self._rows.step]
        return [names[domain] for domain in rows[:, 1].tolist()], rows[:, 2], rows[:, 3]

    def chunks(self, tokens: int) -> Iterator[Chunk]:
        """The rows in stretches of about so many tokens."""
        if self._rows.step != 1 or not len(self):
            yield from chunks_of_rows(self, tokens)
            return
        whole = EncodedChats(self.folder, rows=self._rows).lengths
        ends = whole.cumsum()
        before = self._span("row_end", self._rows.start)[0]
        first = 0
        while first < len(self):
            start = ends[first] - whole[first]
            last = max(first + 1, int(np.searchsorted(ends, start + tokens, side="right")))
            count = int(ends[last - 1] - start)
            ids = self._read("input_id", before + int(start), count)
            mask = self._read("loss_mask", before + int(start), count)
            lengths = whole[first:last]
            if self._max_length is not None:
                kept = offsets(lengths) < self._max_length
                ids, mask, lengths = ids[kept], mask[kept], self.lengths[first:last]
            yield Chunk(lengths, ids, mask)
            first = last

    def cut(self, max_length: int | None) -> EncodedChats:
        """The same rows, cut to ``max_length`` tokens where they are longer."""
        both = [length for length in (max_length, self._max_length) if length is not None]
        return EncodedChats(self.folder, self._chats, self._rows, min(both, default=None))

    def _span(self, column: str, row: int) -> tuple[int, int]:
        ends = self._read(column, max(row - 1, 0), 2 if row else 1)
        return (int(ends[0]), int(ends[1])) if row else (0, int(ends[0]))

    def _read(self, column: str, start: int, count: int) -> Shaped[np.ndarray, " value"]:
        return _values(self.folder, column, start, count)


@checked
def encode_all(
    chats: str | os.PathLike[str] | Sequence[Chat | Encoded],
    tokenizer: Tokenizer,
    max_length: Count | None = None,
    *,
    like: Like | None = None,
    markers: bool = False,
    last_answer_only: bool = False,
    template_options: dict[str, Any] | None = None,
    cache: str | os.PathLike[str] | None = None,
    workers: Count | None = None,
    progress: bool = True,
    on_error: Literal["raise", "skip"] = "raise",
) -> EncodedChats:
    """The rows of :func:`encode`, made in batches on all cores and kept on disk.

    The first call makes the set, the same call later finds it; one that was interrupted, or killed,
    goes on where it stopped. Nothing of it stays in memory: a row is read when it is asked for. All
    that takes a list of encoded conversations takes the result.

    Args:
        chats: a file as of :func:`load_chats`, which is read piece by piece, or conversations. Of
            the latter the rows keep their ``chat``; of a file they have ``id`` and ``domain``.
        max_length, like, markers, last_answer_only, template_options: as in :func:`encode`. With
            ``like="speculators"`` there is a row for each answer.
        cache: the folder for sets, each in a folder named by a checksum of the conversations, the
            tokenizer with its template, the options and the code that makes rows, so a template
            that writes the date makes a set a day; by default ``~/.cache/dspark_lab``, or in
            ``$XDG_CACHE_HOME``. Any of them may be deleted.
        workers: processes; one for each core where None.
        progress: show a bar.
        on_error: stop at the first conversation that cannot be read or encoded, or leave it out,
            with its file, line and reason in ``skipped`` of the result.

    Raises:
        ValueError: "FILE, line N: reason", or what :func:`encode` says of a conversation; or there
            is no conversation.
        OSError: the file cannot be read, or ``cache`` not be written.
    """
    check_tokenizer(tokenizer)
    if like is not None and markers:
        raise ValueError(f"markers must be False with like={like!r}, which has a mask already")
    settings = _Settings(max_length, like, markers, last_answer_only, template_options)
    source = _File(Path(chats)) if isinstance(chats, (str, os.PathLike)) else _List(chats)
    base = _default_cache() if cache is None else Path(cache)
    # A call sets the backend's truncation and padding, which are written with it, to none.
    tokenize(["a"], tokenizer)
    backend = tokenizer.backend_tokenizer.to_str()
    folder = base / _fingerprint(source, tokenizer, backend, settings, on_error)
    folder.mkdir(parents=True, exist_ok=True)
    with _locked(folder):
        if not _is_whole(folder):
            new = _Set(folder, source, on_error == "skip")
            _make(new, tokenizer, backend, settings, workers or usable_cores(), progress)
    made = EncodedChats(folder, None if isinstance(source, _File) else source.chats)
    if np.any(made.row_facts()[1]):
        warnings.warn(LEFT_OUT, stacklevel=3)
    return made


class _List:
    """Conversations in memory, which forked workers share."""

    def __init__(self, chats: Sequence[Chat | Encoded]) -> None:
        self.chats, self.total, self.unit = chats, len(chats), "chat"

    def requests(self, done: int) -> Iterator[tuple[bytes, int]]:
        for start in range(done, len(self.chats), _PART_ITEMS):
            stop = min(start + _PART_ITEMS, len(self.chats))
            yield json.dumps([start, stop]).encode(), stop - start

    def items(self, request: bytes) -> Iterator[tuple[int, Chat | Encoded | ValueError]]:
        start, stop = json.loads(request)
        yield from ((index, self.chats[index]) for index in range(start, stop))

    def refusal(self, number: int, reason: str) -> ValueError:
        return ValueError(reason)

    def skipped(self, number: int, reason: str) -> Skipped:
        return Skipped("", number, reason)

    def update(self, digest: Any) -> None:
        """Put all that the rows follow from into a checksum."""
        for chat in self.chats:
            known = chat if isinstance(chat, Chat) else chat.chat
            facts: list[Any] = [None if known is None else asdict(known)]
            if isinstance(chat, Encoded):
                facts += [chat.id, chat.domain, chat.left_out, chat.marker_differences, len(chat)]
                digest.update(chat.input_ids.numpy().tobytes() + chat.loss_mask.numpy().tobytes())
            digest.update(json.dumps(facts, sort_keys=True).encode() + b"\n")


class _File:
    """A file of conversations, whose lines workers parse."""

    def __init__(self, path: Path) -> None:
        self.path, self.total, self.unit, self.rows = path, _bytes_of(path), "B", "line"

    def requests(self, done: int) -> Iterator[tuple[bytes, int]]:
        numbers: list[int] = []
        lines: list[bytes] = []
        size = 0
        for place, raw in islice(raw_rows(self.path), done, None):
            self.rows, number = place.split()
            numbers.append(int(number))
            lines.append(raw)
            size += len(raw) + 1
            if len(numbers) == _PART_ITEMS or size >= _PART_BYTES:
                yield b"\n".join([json.dumps(numbers).encode(), *lines]), size
                numbers, lines, size = [], [], 0
        if numbers:
            yield b"\n".join([json.dumps(numbers).encode(), *lines]), size

    def items(self, request: bytes) -> Iterator[tuple[int, Chat | Encoded | ValueError]]:
        numbers, *lines = request.split(b"\n")
        for number, raw in zip(json.loads(numbers), lines, strict=True):
            yield number, read_raw(raw, self.path, f"{self.rows} {number}")

    def refusal(self, number: int, reason: str) -> ValueError:
        return ValueError(f"{self.path}, {self.rows} {number}: {reason}")

    def skipped(self, number: int, reason: str) -> Skipped:
        return Skipped(str(self.path), number, reason)

    def update(self, digest: Any) -> None:
        digest.update(json.dumps([self.path.name]).encode())
        for path in _files_of(self.path):
            digest.update(json.dumps([path.name, path.stat().st_size]).encode())
            with path.open("rb") as file:
                while piece := file.read(2**20):
                    digest.update(piece)


_Source = _List | _File
_TokensOf = Callable[[list[str]], Sequence[Any]]


@dataclass
class _Part:
    """Rows of one part, as they are made."""

    ids: list[np.ndarray] = field(default_factory=list)
    masks: list[np.ndarray] = field(default_factory=list)
    names: list[bytes] = field(default_factory=list)
    facts: list[tuple[int, int, int, int]] = field(default_factory=list)
    domains: dict[str, int] = field(default_factory=dict)
    refused: list[tuple[int, str]] = field(default_factory=list)

    def add(
        self,
        number: int,
        item: Chat | Encoded,
        ids: Any,
        mask: Any,
        left_out: int,
        differences: int,
    ) -> None:
        self.ids.append(np.asarray(ids, COLUMNS["input_id"]))
        self.masks.append(np.asarray(mask, COLUMNS["loss_mask"]))
        self.names.append(json.dumps(item.id).encode())
        domain = -1
        if item.domain is not None:
            domain = self.domains.setdefault(item.domain, len(self.domains))
        self.facts.append((number, domain, left_out, differences))

    def saved(self, items: int) -> bytes:
        notes = {"items": items, "refused": self.refused, "domains": list(self.domains)}
        empty = {name: np.empty(0, kind) for name, kind in COLUMNS.items()}
        return save(
            {
                "input_id": np.concatenate([empty["input_id"], *self.ids]),
                "loss_mask": np.concatenate([empty["loss_mask"], *self.masks]),
                "row_end": np.cumsum([*map(len, self.ids)], dtype=np.int64),
                "id_byte": np.frombuffer(b"".join(self.names), np.uint8),
                "id_end": np.cumsum([*map(len, self.names)], dtype=np.int64),
                "fact": np.array(self.facts, np.int64).ravel(),
                "notes": np.frombuffer(json.dumps(notes).encode(), np.uint8),
            }
        )


def _encoded_part(
    request: bytes,
    source: _Source,
    tokenizer: Tokenizer,
    tokens_of: _TokensOf,
    settings: _Settings,
) -> bytes:
    """The columns of one part: its rows, and what of its conversations was refused."""
    items = list(source.items(request))
    chats = [item for _, item in items if isinstance(item, Chat)]
    made = iter(run_plans([_plan(chat, tokenizer, settings) for chat in chats], tokens_of))
    part = _Part()
    for number, item in items:
        found = next(made) if isinstance(item, Chat) else item
        if isinstance(found, ValueError):
            part.refused.append((number, str(found)))
        elif isinstance(item, ValueError):
            continue
        elif isinstance(found, Encoded):
            row = cut(found, settings.max_length)
            facts = row.left_out, row.marker_differences
            part.add(number, row, row.input_ids.numpy(), row.loss_mask.numpy(), *facts)
        else:
            for ids, mask, *others in found:
                part.add(number, item, ids, mask, *others)
    return part.saved(len(items))


def _plan(chat: Chat, tokenizer: Tokenizer, settings: _Settings) -> Plan[tuple[Any, ...]]:
    """What :func:`dspark_lab.encode` does with one conversation: ids, mask and counts."""
    length, like = settings.max_length, settings.like
    options: dict[str, Any] = {"last_answer_only": settings.last_answer_only}
    options["template_options"] = settings.template_options
    if like is not None:
        rows = yield from trainer_plan(chat, tokenizer, like, length, **options)
        return [(ids, mask, 0, 0) for ids, mask, *_ in rows]
    rendered = render(chat, tokenizer, markers=settings.markers, **options)
    (encoding,) = yield [rendered.text]
    ids, mask, differences = row_arrays(rendered, encoding, chat, length)
    return [(ids, mask, rendered.left_out, differences)]


def _make(
    made: _Set,
    tokenizer: Tokenizer,
    backend: str,
    settings: _Settings,
    workers: int,
    progress: bool,
) -> None:
    """Encode what the set does not hold yet."""
    source = made.source
    weights: deque[int] = deque()

    def requests() -> Iterator[bytes]:
        for request, weight in source.requests(made.items):
            weights.append(weight)
            yield request

    bar = tqdm(
        total=source.total,
        initial=made.weight,
        unit=source.unit,
        unit_scale=source.unit == "B",
        desc="encode",
        disable=not progress,
    )
    with bar, made.opened():
        feed = requests()
        ahead = list(islice(feed, 2))
        tokens_of: _TokensOf = partial(tokenize, tokenizer=tokenizer)
        if len(ahead) < 2:
            workers = 1  # what fits into one part is done before another process is there
        elif level := ByteLevel.of(tokenizer):
            tokens_of = level.encode
        given: dict[str, Any] = {"source": source, "tokenizer": tokenizer, "settings": settings}
        work = partial(_encoded_part, tokens_of=tokens_of, **given)
        for part in in_order(work, chain(ahead, feed), workers):
            weight = weights.popleft()
            made.append(load(part), weight)
            bar.update(weight)
    made.finish()


class _Set:
    """The columns of a set while it is made, and its journal."""

    def __init__(self, folder: Path, source: _Source, skip: bool) -> None:
        self.folder, self.source, self.skip = folder, source, skip
        self.items = self.weight = 0
        self.ends = dict.fromkeys(COLUMNS, 0)
        self.domains: list[str] = []
        self.skipped: list[Skipped] = []
        # Sorted checksums of a file's ids, 8 bytes each.
        self.known = np.empty(0, np.uint64)
        self.files: dict[str, Any] = {}
        self._resume()

    @contextmanager
    def opened(self) -> Iterator[None]:
        with ExitStack() as stack:
            for name in (*COLUMNS, _JOURNAL):
                self.files[name] = stack.enter_context((self.folder / name).open("ab"))
            yield

    def append(self, part: dict[str, np.ndarray], weight: int) -> None:
        """Write a part, then its line of the journal; nothing of it if it holds a refusal."""
        notes = json.loads(part.pop("notes").tobytes())
        refused: list[tuple[int, str]] = [(number, why) for number, why in notes["refused"]]
        facts = part["fact"].reshape(-1, _FACTS).copy()
        if isinstance(self.source, _File) and len(facts):
            refused = sorted([*refused, *self._repeated(part, facts)])
            part, facts = _without(part, facts, [number for number, _ in refused])
        if refused and not self.skip:
            raise self.source.refusal(*refused[0])
        new = [domain for domain in notes["domains"] if domain not in self.domains]
        self.domains += new
        place = np.array([*map(self.domains.index, notes["domains"]), -1])
        facts[:, 1] = place[facts[:, 1]]
        part["fact"] = facts.ravel()
        part["row_end"] = part["row_end"] + self.ends["input_id"]
        part["id_end"] = part["id_end"] + self.ends["id_byte"]
        checksum = 0
        for column, kind in COLUMNS.items():
            data = part[column].astype(kind, copy=False).tobytes()
            checksum = zlib.crc32(data, checksum)
            self.files[column].write(data)
            self.files[column].flush()
            self.ends[column] += len(part[column])
        skipped = [self.source.skipped(*entry) for entry in refused]
        self.items += notes["items"]
        self.weight += weight
        self.skipped += skipped
        line = {"items": self.items, "weight": self.weight, "ends": self.ends, "domains": new}
        line |= {"skipped": skipped, "checksum": checksum}
        self.files[_JOURNAL].write(json.dumps(line).encode() + b"\n")
        self.files[_JOURNAL].flush()

    def finish(self) -> None:
        if not self.items:
            where = self.source.path if isinstance(self.source, _File) else "chats"
            raise ValueError(f"{where} must hold at least one conversation, got none")
        for column in COLUMNS:
            sync(self.folder / column)
        facts = {"ends": self.ends, "domains": self.domains, "skipped": self.skipped}
        write_json(self.folder / _DONE, facts)

    def _resume(self) -> None:
        """Take what the journal vouches for, and cut off what lies behind it."""
        remove_partial(self.folder)
        (self.folder / _DONE).unlink(missing_ok=True)
        for name in (*COLUMNS, _JOURNAL):
            (self.folder / name).touch()
        good = 0
        for raw in (self.folder / _JOURNAL).read_bytes().splitlines(keepends=True):
            try:
                line = json.loads(raw)
                whole = raw.endswith(b"\n") and self._checksum(line["ends"]) == line["checksum"]
            except (ValueError, KeyError, TypeError):
                whole = False
            if not whole:
                break
            good += len(raw)
            self.items, self.weight, self.ends = line["items"], line["weight"], line["ends"]
            self.domains += line["domains"]
            self.skipped += [Skipped(*entry) for entry in line["skipped"]]
        for column, kind in COLUMNS.items():
            os.truncate(self.folder / column, self.ends[column] * kind.itemsize)
        os.truncate(self.folder / _JOURNAL, good)
        if isinstance(self.source, _File):
            rows = self.ends["id_end"]
            for first in range(0, rows, 2**16):
                count = min(2**16, rows - first)
                part = {"id_end": _values(self.folder, "id_end", first, count)}
                start = 0 if first == 0 else int(_values(self.folder, "id_end", first - 1, 1)[0])
                size = int(part["id_end"][-1]) - start
                part["id_byte"] = _values(self.folder, "id_byte", start, size)
                part["id_end"] = part["id_end"] - start
                facts = _values(self.folder, "fact", _FACTS * first, _FACTS * count)
                self._repeated(part, facts.reshape(-1, _FACTS))

    def _checksum(self, ends: Mapping[str, int]) -> int:
        """The checksum of the part from where the set ends now to ``ends``."""
        checksum = 0
        for column in COLUMNS:
            start, stop = self.ends[column], ends[column]
            values = _values(self.folder, column, start, stop - start)
            checksum = zlib.crc32(values.tobytes(), checksum)
        return checksum

    def _repeated(self, part: Mapping[str, np.ndarray], facts: np.ndarray) -> list[tuple[int, str]]:
        """The conversations of a part whose id an earlier one has; the others' ids are noted."""
        text = part["id_byte"].tobytes()
        starts = [0, *part["id_end"][:-1].tolist()]
        # The rows of one conversation have one id.
        firsts = np.flatnonzero(np.diff(facts[:, 0], prepend=-1))
        names = [text[starts[row] : part["id_end"][row]] for row in firsts]
        sums = [hashlib.blake2b(name, digest_size=8).digest() for name in names]
        hashes = np.frombuffer(b"".join(sums), np.uint64)
        places = np.searchsorted(self.known, hashes)
        old = np.zeros(len(hashes), bool)
        inside = places < len(self.known)
        old[inside] = self.known[places[inside]] == hashes[inside]
        _, first_of = np.unique(hashes, return_index=True)
        again = np.ones(len(hashes), bool)
        again[first_of] = False
        fresh = np.sort(hashes[~old & ~again])
        self.known = np.insert(self.known, np.searchsorted(self.known, fresh), fresh)
        return [
            (
                int(facts[firsts[i], 0]),
                f"id {json.loads(names[i])!r} is already that of an earlier one",
            )
            for i in np.flatnonzero(old | again)
        ]


def _without(
    part: dict[str, np.ndarray], facts: np.ndarray, numbers: Sequence[int]
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """A part without the rows of some conversations."""
    keep = ~np.isin(facts[:, 0], numbers)
    if keep.all():
        return part, facts
    left = dict(part)
    for values, end in (("input_id", "row_end"), ("loss_mask", "row_end"), ("id_byte", "id_end")):
        lengths = np.diff(part[end], prepend=0)
        left[values] = part[values][np.repeat(keep, lengths)]
        left[end] = lengths[keep].cumsum()
    return left, facts[keep]


def _values(folder: Path, column: str, start: int, count: int) -> np.ndarray:
    """Values of a column. Read and not mapped, so that nothing of them stays in memory."""
    kind = COLUMNS[column]
    return np.fromfile(folder / column, kind, count, offset=start * kind.itemsize)


def _is_whole(folder: Path) -> bool:
    if not (folder / _DONE).is_file():
        return False
    ends = read_json(folder / _DONE)["ends"]
    paths = {folder / column: ends[column] * kind.itemsize for column, kind in COLUMNS.items()}
    return all(path.is_file() and path.stat().st_size == size for path, size in paths.items())


def _fingerprint(
    source: _Source, tokenizer: Tokenizer, backend: str, settings: _Settings, on_error: str
) -> str:
    """A checksum of all that the rows follow from."""
    import transformers

    given: list[Any] = [transformers.__version__, asdict(settings), on_error]
    given += [tokenizer.chat_template, tokenizer.special_tokens_map, type(tokenizer).__name__]
    digest = hashlib.sha256(json.dumps(given, sort_keys=True, default=repr).encode())
    digest.update(backend.encode())
    for code in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(code.read_bytes())
    # A template may write what changes by itself, such as the date.
    for roles in (["user"], ["system", "user"]):
        with suppress(Exception):  # whatever templates raise
            said = [{"role": role, "content": "Hi"} for role in roles]
            options: dict[str, Any] = {**(settings.template_options or {}), "tokenize": False}
            digest.update(str(tokenizer.apply_chat_template(said, **options)).encode())
    source.update(digest)
    return digest.hexdigest()[:32]


def _default_cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dspark_lab"


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Only one process makes a set; the lock ends with the process, however that ends."""
    with (folder / _LOCK).open("w") as file:
        with suppress(ImportError):  # Windows has none
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _files_of(path: Path) -> list[Path]:
    """A file, or all of a folder (a saved data set)."""
    return sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]


def _bytes_of(path: Path) -> int:
    return sum(file.stat().st_size for file in _files_of(path))
