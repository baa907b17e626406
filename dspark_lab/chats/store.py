"""Encoded conversations on disk: made in batches on all cores, read row by row.

A set lies in a folder whose name is a fingerprint of all that it was made from. It consists of
parts, each a file that is written whole, and named by its number and its checksum. A run that was
interrupted goes on behind the parts that are there.
"""

from __future__ import annotations

import hashlib
import json
import os
import warnings
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import cached_property, partial
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, overload

import numpy as np
import torch
from jaxtyping import Int, Shaped
from safetensors import safe_open
from safetensors.numpy import load, save
from tqdm import tqdm

from dspark_lab.chats.chat import Chat, Encoded
from dspark_lab.chats.cores import Work, in_order, usable_cores
from dspark_lab.chats.edges import ByteLevel
from dspark_lab.chats.plans import run_plans, tokenize
from dspark_lab.chats.reading import Skipped, raw_rows, read_raw
from dspark_lab.chats.stream import Chunk, RowFacts, chunks_of_rows, offsets
from dspark_lab.chats.tokens import LEFT_OUT, check_options, check_tokenizer, row_plan
from dspark_lab.chats.trainers import Like
from dspark_lab.checks import Count, checked
from dspark_lab.files import files_of, read_json, remove_partial, sync, write_json, written_whole

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer

_DONE, _LOCK = "done.json", "lock"
# How many conversations of a list, and bytes of a file, a part has at least and at most: enough
# parts for all cores to end together, but not too many files.
_PART_CHATS, _PART_BYTES = (64, 1024), (2**17, 2**21)
_LEAST_PARTS = 64
# Conversations that go through the tokenizer together.
_BATCH = 256


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
        facts = read_json(folder / _DONE)
        self._parts = [folder / name for name, _, _ in facts["parts"]]
        self._firsts = np.cumsum([0, *(count for _, _, count in facts["parts"])])
        self._rows = range(self._firsts[-1]) if rows is None else rows
        self.skipped = [Skipped(*entry) for entry in facts["skipped"]]

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
        part = int(np.searchsorted(self._firsts, row, side="right")) - 1
        row -= int(self._firsts[part])
        with safe_open(self._parts[part], "np") as file:
            start, stop = file.get_slice("row_start")[row : row + 2].tolist()
            if self._max_length is not None:
                stop = min(stop, start + self._max_length)
            ids = file.get_slice("input_ids")[start:stop].astype(np.int64)
            mask = file.get_slice("loss_mask")[start:stop]
            first, behind = file.get_slice("name_start")[row : row + 2].tolist()
            names = file.get_slice("name")[first:behind]
            source, left_out, differences = file.get_slice("fact")[row].tolist()
        ((id, domain),) = _names(names)
        chat = None if self._chats is None else self._chats[source]
        return Encoded(
            torch.from_numpy(ids),
            torch.from_numpy(mask),
            chat if isinstance(chat, Chat) else None,
            id=id,
            domain=domain,
            left_out=left_out,
            marker_differences=differences,
        )

    def __repr__(self) -> str:
        return f"EncodedChats({len(self)} rows, {str(self.folder)!r})"

    @cached_property
    def lengths(self) -> Int[np.ndarray, " row"]:
        """Tokens of each row."""
        found = [np.diff(starts) for starts in self.column("row_start")]
        lengths = np.concatenate([*found, np.empty(0, np.int64)])[self._rows]
        return lengths if self._max_length is None else np.minimum(lengths, self._max_length)

    def row_facts(self) -> RowFacts:
        """Of each row its domain, ``left_out`` and ``marker_differences``."""
        domains = [domain for names in self.column("name") for _, domain in _names(names)]
        facts = np.concatenate([*self.column("fact"), np.empty((0, 3), np.int64)])[self._rows]
        return [domains[row] for row in self._rows], facts[:, 1], facts[:, 2]

    def chunks(self, tokens: int) -> Iterator[Chunk]:
        """The rows in stretches of about so many tokens, or fewer."""
        if self._rows.step != 1:
            yield from chunks_of_rows(self, tokens)
            return
        for path, begin, end in zip(self._parts, self._firsts, self._firsts[1:], strict=False):
            row, last = max(self._rows.start, begin) - begin, min(self._rows.stop, end) - begin
            if row >= last:
                continue
            with safe_open(path, "np") as file:
                starts = file.get_slice("row_start")[row : last + 1]
                while row < last:
                    fitting = int(np.searchsorted(starts, starts[0] + tokens, side="right")) - 1
                    count = min(max(1, fitting), last - row)
                    place = slice(int(starts[0]), int(starts[count]))
                    ids, mask = (file.get_slice(name)[place] for name in ("input_ids", "loss_mask"))
                    lengths = np.diff(starts[: count + 1])
                    if self._max_length is not None:
                        kept = offsets(lengths) < self._max_length
                        ids, mask = ids[kept], mask[kept]
                        lengths = np.minimum(lengths, self._max_length)
                    yield Chunk(lengths, ids, mask)
                    row, starts = row + count, starts[count:]

    def cut(self, max_length: int | None) -> EncodedChats:
        """The same rows, cut to ``max_length`` tokens where they are longer."""
        both = [length for length in (max_length, self._max_length) if length is not None]
        return EncodedChats(self.folder, self._chats, self._rows, min(both, default=None))

    def column(self, name: str) -> Iterator[Shaped[np.ndarray, "..."]]:
        """The values of each part, of all its rows."""
        for path in self._parts:
            with safe_open(path, "np") as file:
                yield file.get_tensor(name)


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
    progress: bool | Callable[[float, float], None] = True,
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
        progress: show a bar; or what is told how much is done, and of how much, of the file's bytes
            or of the conversations, and may raise to end it.
        on_error: stop at the first conversation that cannot be read or encoded, or leave it out,
            with its file, line and reason in ``skipped`` of the result.

    Raises:
        ValueError: "FILE, line N: reason", or what :func:`encode` says of a conversation; or there
            is no conversation.
        OSError: the file cannot be read, or ``cache`` not be written.
    """
    check_tokenizer(tokenizer)
    check_options(like, markers)
    options: dict[str, Any] = {"max_length": max_length, "like": like, "markers": markers}
    options |= {"last_answer_only": last_answer_only, "template_options": template_options}
    source = _File(Path(chats)) if isinstance(chats, (str, os.PathLike)) else _List(chats)
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    base = Path(home) / "dspark_lab" if cache is None else Path(cache)
    # A call sets the backend's truncation and padding, which are written with it, to none.
    tokenize(["a"], tokenizer)
    backend = tokenizer.backend_tokenizer.to_str()
    folder = base / _fingerprint(source, tokenizer, backend, options, on_error)
    folder.mkdir(parents=True, exist_ok=True)
    with _locked(folder):
        if not _is_whole(folder):
            level = ByteLevel.of(tokenizer)
            work = partial(
                _encoded_part,
                source=source,
                plan=partial(row_plan, tokenizer=tokenizer, **options),
                tokens_of=level.encode if level else partial(tokenize, tokenizer=tokenizer),
            )
            skip = on_error == "skip"
            cores = workers or usable_cores()
            _make(folder, source, work, skip=skip, workers=cores, progress=progress)
    made = EncodedChats(folder, None if isinstance(source, _File) else source.chats)
    if any(facts[:, 1].any() for facts in made.column("fact")):
        warnings.warn(LEFT_OUT, stacklevel=3)
    return made


class _List:
    """Conversations in memory, which forked workers share."""

    def __init__(self, chats: Sequence[Chat | Encoded]) -> None:
        self.chats, self.name = chats, ""
        self.total, self.unit = len(chats), "chat"

    def requests(self) -> Iterator[Any]:
        size = _part_size(self.total, _PART_CHATS)
        for start in range(0, self.total, size):
            yield range(start, min(start + size, self.total))

    def weight(self, request: Any) -> int:
        return len(request)

    def items(self, request: Any) -> Iterator[tuple[int, Chat | Encoded | ValueError]]:
        yield from ((index, self.chats[index]) for index in request)

    def where(self, number: int) -> str:
        return ""

    def update(self, digest: Any) -> None:
        """Put all that the rows follow from into a checksum."""
        for chat in self.chats:
            known = chat if isinstance(chat, Chat) else chat.chat
            facts: list[Any] = [None if known is None else vars(known)]
            if isinstance(chat, Encoded):
                facts += [chat.id, chat.domain, chat.left_out, chat.marker_differences, len(chat)]
                digest.update(chat.input_ids.numpy().tobytes() + chat.loss_mask.numpy().tobytes())
            digest.update(json.dumps(facts, sort_keys=True).encode() + b"\n")


class _File:
    """A file of conversations, whose lines workers parse."""

    def __init__(self, path: Path) -> None:
        self.path, self.name, self.rows = path, str(path), "line"
        self.files = files_of(path)
        self.total, self.unit = sum(file.stat().st_size for file in self.files), "B"

    def requests(self) -> Iterator[Any]:
        lines: list[tuple[int, bytes]] = []
        left = size = _part_size(self.total, _PART_BYTES)
        for place, raw in raw_rows(self.path):
            self.rows, number = place.split()
            lines.append((int(number), raw))
            left -= len(raw)
            if left <= 0:
                yield lines
                lines, left = [], size
        if lines:
            yield lines

    def weight(self, request: Any) -> int:
        return sum(len(raw) + 1 for _, raw in request)

    def items(self, request: Any) -> Iterator[tuple[int, Chat | Encoded | ValueError]]:
        for number, raw in request:
            yield number, read_raw(raw, self.path, f"{self.rows} {number}")

    def where(self, number: int) -> str:
        return f"{self.path}, {self.rows} {number}: "

    def update(self, digest: Any) -> None:
        digest.update(json.dumps([self.path.name]).encode())
        for path in self.files:
            digest.update(json.dumps([path.name, path.stat().st_size]).encode())
            with path.open("rb") as file:
                while piece := file.read(2**20):
                    digest.update(piece)


_Source = _List | _File


def _part_size(total: int, bounds: tuple[int, int]) -> int:
    return min(max(total // _LEAST_PARTS, bounds[0]), bounds[1])


def _names(written: np.ndarray) -> list[tuple[str | None, str | None]]:
    """Id and domain of each row."""
    return json.loads(b"[" + written.tobytes()[:-1] + b"]")


def _encoded_part(
    request: Any, source: _Source, plan: Callable[..., Any], tokens_of: Callable[..., Any]
) -> bytes:
    """The rows of one part, and what of its conversations was refused, as a file's contents."""
    items = source.items(request)
    refused: list[tuple[int, str]] = []
    ids, masks, names, hashes, facts = [], [], [], [], []
    while batch := list(islice(items, _BATCH)):
        plans = [plan(item) for _, item in batch if not isinstance(item, ValueError)]
        made = iter(run_plans(plans, tokens_of))
        for number, item in batch:
            rows = item if isinstance(item, ValueError) else next(made)
            if isinstance(item, ValueError) or isinstance(rows, ValueError):
                refused.append((number, str(rows)))
                continue
            for row_ids, mask, *counts in rows:
                ids.append(np.asarray(row_ids, np.int32))
                masks.append(np.asarray(mask, bool))
                names.append(json.dumps([item.id, item.domain]).encode() + b",")
                hashes.append(hashlib.blake2b(str(item.id).encode(), digest_size=8).digest())
                facts.append((number, *counts))
    return save(
        {
            "input_ids": np.concatenate([np.empty(0, np.int32), *ids]),
            "loss_mask": np.concatenate([np.empty(0, bool), *masks]),
            "row_start": np.cumsum([0, *map(len, ids)], dtype=np.int64),
            "name": np.frombuffer(b"".join(names), np.uint8),
            "name_start": np.cumsum([0, *map(len, names)], dtype=np.int64),
            "id_hash": np.frombuffer(b"".join(hashes), np.uint64),
            # The number of the line or the conversation, left_out and marker_differences.
            "fact": np.array(facts, np.int64).reshape(-1, 3),
            "refused": np.frombuffer(json.dumps(refused).encode(), np.uint8),
        }
    )


def _make(
    folder: Path, source: _Source, work: Work, *, skip: bool, workers: int, progress: Any
) -> None:
    """Write the parts that a set does not hold yet, then the list of all."""
    (folder / _DONE).unlink(missing_ok=True)
    remove_partial(folder)
    parts, ids = [], _Ids()
    for path, part in _whole_parts(folder):
        parts.append(path)
        ids.repeated(part)
    feed = iter(source.requests())
    scale = source.unit == "B"
    with tqdm(
        None,
        "encode",
        source.total,
        leave=False,
        unit=source.unit,
        unit_scale=scale,
        disable=progress is not True,
    ) as bar:
        done = 0

        def count(weight: int) -> None:
            nonlocal done
            done += weight
            bar.update(weight)
            if callable(progress):
                progress(done, source.total)

        count(0)
        for request in islice(feed, len(parts)):
            count(source.weight(request))
        ahead = list(islice(feed, 2))
        # What fits into one part is done before another process is there.
        workers = workers if len(ahead) > 1 else 1
        for request, data in in_order(work, chain(ahead, feed), workers):
            part = load(data)
            if isinstance(source, _File) and (again := ids.repeated(part)):
                # A line that begins so is refused with what follows.
                told = {number: b"!" + reason.encode() for number, reason in again}
                data = work([(number, told.get(number, raw)) for number, raw in request])
                part = load(data)
            refused = json.loads(part["refused"].tobytes())
            if refused and not skip:
                raise ValueError(source.where(refused[0][0]) + refused[0][1])
            parts.append(folder / f"{len(parts):06}-{zlib.crc32(data):08x}.safetensors")
            with written_whole(parts[-1]) as partial:
                partial.write_bytes(data)
            count(source.weight(request))
    if not parts:
        raise ValueError(f"{source.name or 'chats'} must hold at least one conversation, got none")
    listed, skipped = [], []
    for path in parts:
        sync(path)
        with safe_open(path, "np") as file:
            rows = file.get_slice("fact").get_shape()[0]
            refused = json.loads(file.get_tensor("refused").tobytes())
        skipped += [Skipped(source.name, *entry) for entry in refused]
        listed.append([path.name, path.stat().st_size, rows])
    write_json(folder / _DONE, {"parts": listed, "skipped": skipped})


def _whole_parts(folder: Path) -> Iterator[tuple[Path, dict[str, np.ndarray]]]:
    """The parts from the first on that are as they were written; others are removed."""
    whole = 0
    for path in sorted(folder.glob("*.safetensors")):
        number, checksum = path.stem.split("-")
        data = path.read_bytes()
        if int(number) == whole and int(checksum, 16) == zlib.crc32(data):
            whole += 1
            yield path, load(data)
        else:
            path.unlink()


def _is_whole(folder: Path) -> bool:
    if not (folder / _DONE).is_file():
        return False
    parts = [(folder / name, size) for name, size, _ in read_json(folder / _DONE)["parts"]]
    return all(path.is_file() and path.stat().st_size == size for path, size in parts)


class _Ids:
    """The ids of a file's conversations so far: their checksums in order, 8 bytes each."""

    def __init__(self) -> None:
        self.known = np.array([2**64 - 1], np.uint64)

    def repeated(self, part: Mapping[str, np.ndarray]) -> list[tuple[int, str]]:
        """Number and reason of each conversation whose id an earlier one has; notes the others."""
        # The rows of one conversation have one id.
        numbers, rows = np.unique(part["fact"][:, 0], return_index=True)
        hashes = part["id_hash"][rows]
        again = self.known[np.searchsorted(self.known, hashes)] == hashes
        first_of = np.unique(hashes, return_index=True)[1]
        again |= ~np.isin(np.arange(len(hashes)), first_of)
        fresh = np.sort(hashes[~again])
        self.known = np.insert(self.known, np.searchsorted(self.known, fresh), fresh)
        if not again.any():
            return []
        names = _names(part["name"])
        return [
            (int(numbers[i]), f"id {names[rows[i]][0]!r} is already that of an earlier one")
            for i in np.flatnonzero(again)
        ]


def _fingerprint(
    source: _Source, tokenizer: Tokenizer, backend: str, options: Mapping[str, Any], on_error: str
) -> str:
    """A checksum of all that the rows follow from."""
    import transformers

    facts: list[Any] = [transformers.__version__, options, on_error]
    facts += [tokenizer.chat_template, tokenizer.special_tokens_map, type(tokenizer).__name__]
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True, default=repr).encode())
    digest.update(backend.encode())
    for code in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(code.read_bytes())
    # A template may write what changes by itself, such as the date.
    for roles in (["user"], ["system", "user"]):
        with suppress(Exception):  # whatever templates raise
            said = [{"role": role, "content": "Hi"} for role in roles]
            given: dict[str, Any] = {**(options["template_options"] or {}), "tokenize": False}
            digest.update(str(tokenizer.apply_chat_template(said, **given)).encode())
    source.update(digest)
    return digest.hexdigest()[:32]


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Only one process makes a set; the lock ends with the process, however that ends."""
    with (folder / _LOCK).open("w") as file:
        with suppress(ImportError):  # Windows has none
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX)
        yield
