"""Conversations from files: JSON lines, a JSON array, Parquet, a saved Hugging Face data set."""

from __future__ import annotations

import gzip
import io
import json
import os
import re
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

from dspark_lab.chats.chat import Chat, Encoded
from dspark_lab.chats.records import parse_json, read_record
from dspark_lab.checks import checked
from dspark_lab.files import DATA, read_json

SHIPPED_CHATS = DATA / "conversations.jsonl"

# How files of other kinds begin.
_OTHER_KINDS = {
    b"\xff\xfe": "UTF-16 or UTF-32 text, and must be UTF-8",
    b"\xfe\xff": "UTF-16 text, and must be UTF-8",
    b"\x00\x00\xfe\xff": "UTF-32 text, and must be UTF-8",
    b"PAR1": "a compressed Parquet file, and must be unpacked",
    b"PK\x03\x04": "a zip archive (a torch file, a spreadsheet), and must be unpacked",
    b"\x28\xb5\x2f\xfd": "compressed with zstd, and must be unpacked",
    b"\xfd7zXZ": "compressed with xz, and must be unpacked",
    b"BZh": "compressed with bzip2, and must be unpacked",
    b"version https://git-lfs": "a pointer of Git LFS, and the file itself must be fetched",
    b"\x80": "a pickle, which is not read: it may run code",
}

# Characters of a JSON array that are read at once.
_PIECE = 2**20

# Where a row is ("line 3", "row 3"), and what it holds, a line of JSON or a value, or why that
# cannot be read.
Row = tuple[str, Any]


class Skipped(NamedTuple):
    """A row that was left out, and why."""

    file: str
    line: int
    reason: str


@checked
class Chats(list[Chat | Encoded]):
    """Conversations of a file; ``skipped`` are the rows that could not be read."""

    def __init__(self, chats: Iterable[Chat | Encoded] = (), skipped: Iterable[Skipped] = ()):
        super().__init__(chats)
        self.skipped = list(skipped)

    @property
    def conversations(self) -> list[Chat]:
        """The words of all of them; a row that holds tokens alone has none, and is refused."""
        chats = []
        for item in self:
            chat = item if isinstance(item, Chat) else item.chat
            if chat is None:
                raise ValueError(f"conversation {item.id!r} must have messages, got tokens alone")
            chats.append(chat)
        return chats


@checked
def load_chats(
    path: str | os.PathLike[str] | None = None, *, on_error: Literal["raise", "skip"] = "raise"
) -> Chats:
    """Read a file of conversations, one a row; without a path, the shipped conversations.

    The file is JSON lines or one JSON array, either perhaps compressed with gzip, Parquet, Arrow,
    or the folder of a saved Hugging Face data set; what it is shows in its first bytes. A row has

    - ``messages`` or ``conversations``: a list of ``{"role", "content"}``, or of ShareGPT's
      ``{"from", "value"}``. ``content`` is a string, or a list of ``{"type": "text", "text": ...}``
      parts, which are joined. What else a message has (``reasoning_content``, ``tool_calls``) is
      for the chat template, and refused on encoding where that does not write it.
    - ``prompt`` and ``completion`` or ``response``: texts or lists of messages. The loss leaves out
      answers in a prompt.
    - ``instruction``, ``input``, ``output``, ``history``.
    - ``turns``, or ``prompt`` alone: a prompt, which has no answer.
    - ``input_ids`` with ``loss_mask`` (or ``labels``): a trainer's own row, an :class:`Encoded`,
      with the conversation as its ``chat`` where the row has that too.

    Beside these: ``system``; ``tools``, a list or its JSON text; ``finished``, or a
    ``finish_reason`` (``"length"``: cut off); ``id``, a string or an integer, by default
    ``"<file stem>:<line>"``; ``domain``. ``weight``, ``train``, ``training``, ``loss`` and
    ``loss_mask`` of a message or the row, or a list ``loss_mask`` of the row, say what the loss
    leaves out. Other keys say nothing of the conversation and are not read, except those that would
    make it another one, which are refused by name: images, ``chosen`` and the like. Blank lines may
    end a file.

    Args:
        path: the file or folder.
        on_error: what to do at a row that cannot be read or repeats an id: stop with a ValueError,
            "FILE, line N: reason", or leave it out and tell it in the list's ``skipped``.
    """
    path = Path(SHIPPED_CHATS if path is None else path)
    chats, place_of_id = Chats(), {}
    places = 0
    for place, chat in read_chats(path):
        places += 1
        error = chat if isinstance(chat, ValueError) else None
        if not isinstance(chat, ValueError):
            if chat.id not in place_of_id:
                place_of_id[chat.id] = place
                chats.append(chat)
                continue
            error = ValueError(f"id {chat.id!r} is already that of {place_of_id[chat.id]}")
        if on_error == "raise":
            raise ValueError(f"{path}, {place}: {error}") from None
        chats.skipped.append(Skipped(str(path), int(place.split()[1]), str(error)))
    if not places:
        raise ValueError(f"{path}: no conversations, expected one JSON object a line")
    return chats


def read_chats(path: Path) -> Iterator[tuple[str, Chat | Encoded | ValueError]]:
    """Each row of a file in turn: where it is, and its conversation or why there is none."""
    for place, record in _read_rows(path):
        yield place, _chat_of(record, path, place)


def raw_rows(path: Path) -> Iterator[tuple[str, bytes]]:
    """Each row of a file in turn: where it is, and what :func:`read_raw` reads it from.

    Lines of JSON are handed on as they are: whoever reads them may be another process.
    """
    for place, record in _read_rows(path):
        if isinstance(record, ValueError):
            yield place, b"!" + str(record).encode()
        else:
            yield place, record if isinstance(record, bytes) else _written(record, path, place)


def _written(record: Any, path: Path, place: str) -> bytes:
    try:
        return json.dumps(record).encode()
    except TypeError:
        # A table has values that JSON has not. Where they matter the row is refused, as it is.
        chat = _chat_of(record, path, place)
        refused = isinstance(chat, ValueError)
        return (f"!{chat}" if refused else json.dumps(record, default=str)).encode()


def read_raw(raw: bytes, path: Path, place: str) -> Chat | Encoded | ValueError:
    """The conversation of a row of :func:`raw_rows`, or why there is none."""
    # No JSON begins so.
    return ValueError(raw[1:].decode()) if raw[:1] == b"!" else _chat_of(raw, path, place)


def _chat_of(record: Any, path: Path, place: str) -> Chat | Encoded | ValueError:
    try:
        if isinstance(record, ValueError):
            return record
        if isinstance(record, bytes):
            record = _parsed(record)
        return read_record(record, f"{path.stem}:{place.split()[1]}")
    except ValueError as error:
        return error


def _parsed(line: bytes) -> Any:
    try:
        return parse_json(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"not valid UTF-8: {error.reason} at byte {error.start}") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not valid JSON: {error}") from None


def _read_rows(path: Path) -> Iterator[Row]:
    if path.is_dir():
        yield from _number(record for file in _arrow_files(path) for record in _table_rows(file))
        return
    with path.open("rb") as file:
        start = file.peek(16)[:16]
        if start.startswith((b"PAR1", b"ARROW1", b"\xff\xff\xff\xff")):
            yield from _number(_table_rows(path))
        elif start.startswith(b"\x1f\x8b"):
            try:
                yield from _text_rows(path, io.BufferedReader(gzip.GzipFile(fileobj=file)))
            except (EOFError, OSError, zlib.error) as error:
                raise ValueError(f"{path} is a broken gzip file: {error}") from error
        else:
            yield from _text_rows(path, file)


def _number(records: Iterable[Any]) -> Iterator[Row]:
    return ((f"row {number}", record) for number, record in enumerate(records, start=1))


def _text_rows(path: Path, file: io.BufferedReader) -> Iterator[Row]:
    start = file.peek(4096)[:4096]
    for begin, other in _OTHER_KINDS.items():
        if start.startswith(begin):
            raise ValueError(f"{path} is {other}")
    if b"\x00" in start:
        other = "no text, or UTF-16 without its mark: it holds zero bytes, and must be UTF-8"
        raise ValueError(f"{path} is {other}")
    start = start.removeprefix(b"\xef\xbb\xbf").lstrip()
    if start.startswith(b"["):
        yield from _array_rows(path, file)
        return
    if re.match(rb"\{\s*\n", start):
        what = "an object that goes on over several lines"
        raise ValueError(f"{path} begins with {what}: write one object a line, or an array of them")
    blank = None
    for number, line in enumerate(file, start=1):
        if number == 1:
            line = line.removeprefix(b"\xef\xbb\xbf")
        if not line.strip():
            blank = blank or number
            continue
        if blank is not None:
            yield f"line {blank}", ValueError("blank line, which only the end of a file may have")
            blank = None
        yield f"line {number}", line.removesuffix(b"\n")


def _array_rows(path: Path, file: io.BufferedReader) -> Iterator[Row]:
    """The text of each value of an array, of which a piece at a time is in memory."""
    text = io.TextIOWrapper(file, "utf-8-sig", errors="surrogateescape")
    decode = json.JSONDecoder().raw_decode
    buffer, number, behind = text.read(4096), 0, ""
    at = buffer.index("[") + 1
    while behind != "]":
        try:
            begin = end = _behind_space(buffer, at)
            if number or buffer[begin : begin + 1] != "]":
                _, end = decode(buffer, begin)
            following = _behind_space(buffer, end)
            behind = buffer[following : following + 1]
            if behind not in ("]", ","):
                raise ValueError(f"a comma or the array's end must follow value {number + 1}")
        except (ValueError, RecursionError) as error:
            more = text.read(max(_PIECE, len(buffer) - at))
            if not more:
                raise _no_array(path, error) from None
            buffer, at = buffer[at:] + more, 0
            continue
        if end > begin:
            number += 1
            yield f"row {number}", buffer[begin:end].encode("utf-8", "surrogateescape")
        at = following + 1
    if (buffer[at:] + text.read()).strip():
        raise _no_array(path, "more follows on its end")


def _behind_space(text: str, at: int) -> int:
    while text[at : at + 1] in (" ", "\t", "\n", "\r"):
        at += 1
    return at


def _no_array(path: Path, why: object) -> ValueError:
    return ValueError(f"{path} begins as a JSON array, but is none: {why}")


def _table_rows(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a Parquet file, an Arrow file or a stream of Arrow batches."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    kind = "Arrow"
    try:
        with pa.OSFile(str(path)) as file:
            start = file.read(6)
            file.seek(0)
            if start.startswith(b"PAR1"):
                kind = "Parquet"
                batches = pq.ParquetFile(file).iter_batches(batch_size=1024)
            elif start == b"ARROW1":
                reader = pa.ipc.open_file(file)
                batches = map(reader.get_batch, range(reader.num_record_batches))
            else:
                batches = pa.ipc.open_stream(file)
            for batch in batches:
                yield from map(_without_nulls, batch.to_pylist())
    except FileNotFoundError:
        raise
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path} is a broken {kind} file: {error}") from error


def _without_nulls(value: Any) -> Any:
    """A row without the fields that it has only because other objects of its column have them."""
    if isinstance(value, dict):
        return {key: _without_nulls(part) for key, part in value.items() if part is not None}
    if isinstance(value, list) and any(isinstance(part, (dict, list)) for part in value[:8]):
        return [_without_nulls(part) for part in value]
    return value


def _arrow_files(folder: Path) -> list[Path]:
    """The files of a data set that ``save_to_disk`` of Hugging Face's ``datasets`` wrote."""
    if (folder / "dataset_dict.json").exists():
        splits = read_json(folder / "dataset_dict.json").get("splits")
        raise ValueError(f"{folder} holds a data set's splits: give the folder of one of {splits}")
    if not (folder / "state.json").exists():
        wanted = "a file, or the folder of a saved Hugging Face data set, which has a state.json"
        raise ValueError(f"{folder} must be {wanted}")
    state: dict[str, Any] = read_json(folder / "state.json")
    if state.get("_indices_data_files"):
        raise ValueError(f"{folder} holds indices of rows: save the data set after flatten_indices")
    files = state.get("_data_files") or []
    names = [file.get("filename") for file in files if isinstance(file, dict)]
    if not names or not all(isinstance(name, str) for name in names):
        raise ValueError(f"{folder / 'state.json'} must list the data set's files")
    return [folder / str(name) for name in names]
