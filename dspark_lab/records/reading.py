"""Open a record of acceptance and find out what it is, by its content."""

from __future__ import annotations

import gzip
import io
import itertools
import json
import os
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any
from urllib.parse import urlsplit
from urllib.request import urlopen

import pandas as pd

from dspark_lab.checks import Positive, checked
from dspark_lab.files import require_found
from dspark_lab.records.logs import LOGS, MADE_UP, LogReader
from dspark_lab.records.record import AcceptanceRecord, Tally
from dspark_lab.records.requests import (
    Object,
    dump_payloads,
    read_dump,
    read_requests,
    request_form,
)
from dspark_lab.records.summaries import (
    CSV_HEAD,
    is_iteration,
    python_literal,
    read_csv_table,
    read_iterations,
    summary_reader,
)

KINDS = """the logs of vLLM, SGLang and llama.cpp, the text of their /metrics and of TensorRT-LLM's,
requests with speculative_decoding, spec_decode_acceptance, meta_info or timings, SGLang's debug
record, TensorRT-LLM's iterations, speculators' acceptance.csv, DeepSpec's metrics.json and what
AutoModel's and vLLM's benchmarks write""".replace("\n", " ")
# The longest line of a log that is looked at.
_LONGEST = 1 << 20


@checked
def load_acceptance(
    source: str | os.PathLike[str], *, texts: bool = False, timeout: Positive = 10.0
) -> AcceptanceRecord:
    """Read what a server or a trainer wrote of acceptance; its content says what it is.

        record = lab.load_acceptance("vllm.log")
        record.tau, record.survival, record.table()

    Args:
        source: a file, gzipped or not, or an address such as "http://localhost:8000/metrics".
        texts: keep the prompts and answers that stand beside requests, as columns ``prompt`` and
            ``answer``; nothing of them is kept otherwise.
        timeout: seconds to wait for a server.

    Raises:
        OSError: there is no such file, or no answer from the server.
        ValueError: it holds no acceptance that is known, or what it holds contradicts itself.
    """
    name = os.fspath(source)
    if urlsplit(name).scheme in ("http", "https"):
        with urlopen(name, timeout=timeout) as answer:
            return _read(io.BufferedReader(answer), name, texts)
    require_found(source)
    with Path(source).expanduser().open("rb") as file:
        if file.peek(2)[:2] != b"\x1f\x8b":
            return _read(file, name, texts)
        try:
            return _read(io.BufferedReader(gzip.GzipFile(fileobj=file)), name, texts)
        except (EOFError, zlib.error) as error:
            raise ValueError(f"{name} is a broken gzip file: {error}") from error


def _read(file: io.BufferedReader, name: str, texts: bool) -> AcceptanceRecord:
    start = file.peek(4096)[:4096].removeprefix(b"\xef\xbb\xbf").lstrip()
    if start.startswith(b"PK\x03\x04"):
        raise ValueError(
            f"{name} is a torch or zip file, which may run code when it is read: save its tensors "
            "as safetensors, or its counts as JSON"
        )
    text = io.TextIOWrapper(file, "utf-8-sig", errors="replace", newline="\n")
    try:
        if start.startswith(CSV_HEAD.encode()):
            tally, truncated = read_csv_table(pd.read_csv(text)), None
        elif start[:1] in (b"{", b"[") and not start.startswith(b"[20"):
            tally, truncated = _objects(text, texts)
        else:
            tally, truncated = _lines(text)
        if not tally.count:
            raise ValueError("it counts no round")
        return tally.record(truncated)
    except (KeyError, TypeError, ValueError) as error:
        told = f"it has no {error}" if isinstance(error, KeyError) else str(error)
        raise ValueError(f"{name} must hold a record of acceptance: {told}") from error


def _lines(text: IO[str]) -> tuple[Tally, str | None]:
    """A log or Prometheus' text, of one program."""
    reader: LogReader | None = None
    number, truncated = 0, None
    while line := text.readline(_LONGEST):
        number += 1
        found = next((one for one in LOGS if one.mark in line), None)
        if found is None:
            if MADE_UP in line:
                raise ValueError(f"line {number} says that acceptance was made up, not measured")
            continue
        if reader is None or isinstance(reader, found):
            own = reader or found()
            if not own.read(line) and not line.endswith("\n"):
                truncated = f"line {number}"
            if own.used:
                reader = own
    if reader is None:
        raise ValueError(f"known are {KINDS}")
    return reader.tally, truncated


def _objects(text: IO[str], texts: bool) -> tuple[Tally, str | None]:
    """JSON: an object a line, an array of them, or one object."""
    end: list[str] = []
    rows = _rows(text, end)
    first = next(rows, None)
    if first is None:
        raise ValueError(f"known are {KINDS}")
    rows = itertools.chain([first], rows)
    # Records of requests may begin with rows that have none.
    ahead = list(itertools.islice(rows, 1000))
    rows = itertools.chain(ahead, rows)
    if payloads := dump_payloads(first):
        tally = read_dump(payloads)
    elif any(is_iteration(row) for row in ahead):
        tally = read_iterations(rows)
    elif reader := summary_reader(first):
        tally = reader(first)
    else:
        form = next((found for row in ahead if (found := request_form(row))), None)
        if form is None:
            raise ValueError(f"known are {KINDS}")
        tally = read_requests(rows, form, texts=texts)
    return tally, end[0] if end else None


def _rows(text: IO[str], end: list[str]) -> Iterator[Object]:
    """The objects of a file; where the last one is cut off, ``end`` says so."""
    first = text.readline()
    while first and not first.strip():
        first = text.readline()
    if first.lstrip().startswith("["):
        yield from _objects_of(_array(first + text.read(), end))
        return
    try:
        value = json.loads(first)
    except ValueError:
        whole = first + text.read()
        value = _whole(whole)
        if value is None:
            raise ValueError("it begins as JSON, but is none") from None
        yield from _objects_of([value])
        return
    yield from _objects_of([value])
    for number, line in enumerate(text, start=2):
        if line.strip():
            try:
                yield from _objects_of([json.loads(line)])
            except ValueError:
                if line.endswith("\n"):
                    raise ValueError(f"line {number} is no JSON") from None
                end.append(f"line {number}")


def _array(text: str, end: list[str]) -> list[Any]:
    value = _whole(text)
    if value is not None:
        return value if isinstance(value, list) else [value]
    found, decode = [], json.JSONDecoder().raw_decode
    at = text.index("[") + 1
    while True:
        at += len(text[at:]) - len(text[at:].lstrip(" \t\r\n,"))
        try:
            one, at = decode(text, at)
        except ValueError:
            break
        found.append(one)
    if not found:
        raise ValueError("it begins as a JSON array, but is none")
    end.append(f"value {len(found) + 1}")
    return found


def _whole(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return python_literal(text)


def _objects_of(values: Iterable[Any]) -> Iterator[Object]:
    for value in values:
        if isinstance(value, list):
            yield from _objects_of(value)
        elif isinstance(value, dict):
            yield value
