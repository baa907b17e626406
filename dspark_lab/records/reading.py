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
from urllib.error import URLError
from urllib.parse import urlsplit
from urllib.request import urlopen

import pandas as pd

from dspark_lab.checks import Positive, checked
from dspark_lab.decoding import load_trace
from dspark_lab.files import require_found
from dspark_lab.rates import trace_sums
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
    read_csv_lines,
    read_iterations,
    summary_reader,
)

KINDS = """the logs of vLLM, SGLang and llama.cpp, the text of their /metrics and of TensorRT-LLM's,
requests with speculative_decoding, spec_decode_acceptance, meta_info or timings, SGLang's debug
record, TensorRT-LLM's iterations, speculators' acceptance.csv, DeepSpec's metrics.json and what
AutoModel's and vLLM's benchmarks write""".replace("\n", " ")
# The longest line of a log that is looked at, and how much is to tell what a file is.
_LONGEST, _AHEAD = 1 << 20, 1 << 18


@checked
def load_acceptance(
    source: str | os.PathLike[str], *, texts: bool = False, timeout: Positive = 10.0
) -> AcceptanceRecord:
    """Read what a server or a trainer wrote of acceptance; its content says what it is.

        record = lab.load_acceptance("vllm.log")
        record.tau, record.survival, record.table()

    Args:
        source: a file, gzipped or not, be it a trace of the lab's own, or an address, such as
            "http://localhost:8000/metrics".
        texts: keep the prompts and answers that stand beside requests, as columns ``prompt`` and
            ``answer``; nothing of them is kept otherwise.
        timeout: seconds to wait for a server.

    Raises:
        OSError: there is no such file, or no answer from the server.
        ValueError: it holds no acceptance that is known, or what it holds contradicts itself.
    """
    name = os.fspath(source)
    if urlsplit(name).scheme in ("http", "https"):
        try:
            with urlopen(name, timeout=timeout) as answer:
                return _read(io.BufferedReader(answer, _AHEAD), name, texts)
        except URLError as error:
            raise OSError(f"{name} gave no answer: {error}") from error
    require_found(source)
    with io.BufferedReader(io.FileIO(Path(source).expanduser()), _AHEAD) as file:
        if file.peek(2)[:2] != b"\x1f\x8b":
            return _read(file, name, texts)
        try:
            return _read(io.BufferedReader(gzip.GzipFile(fileobj=file), _AHEAD), name, texts)
        except (EOFError, zlib.error) as error:
            raise ValueError(f"{name} is a broken gzip file: {error}") from error


def _read(file: io.BufferedReader[Any], name: str, texts: bool) -> AcceptanceRecord:
    start = file.peek(_AHEAD)[:_AHEAD].removeprefix(b"\xef\xbb\xbf").lstrip()
    if start.startswith((b"PK\x03\x04", b"\x80")):
        raise ValueError(
            f"{name} is a torch or zip file, which may run code when it is read: save its tensors "
            "as safetensors, or its counts as JSON"
        )
    if start.startswith(b"PAR1"):
        return record_of_trace(load_trace(name))
    text = io.TextIOWrapper(file, "utf-8-sig", errors="replace", newline="\n")
    try:
        if start.startswith(CSV_HEAD.encode()):
            tally, truncated = read_csv_lines(text)
        elif start[:1] in (b"{", b"[") and not _is_log(start):
            tally, truncated = _objects(text, texts)
        else:
            tally, truncated = _lines(text)
        if not tally.count:
            raise ValueError("it counts no round")
        return tally.record(truncated)
    except (KeyError, TypeError, ValueError) as error:
        told = f"it has no {error}" if isinstance(error, KeyError) else str(error)
        raise ValueError(f"{name} must hold a record of acceptance: {told}") from error


@checked
def record_of_trace(trace: pd.DataFrame) -> AcceptanceRecord:
    """A trace of the lab's own as a record, to hold it beside a server's: a line a prompt."""
    tally = Tally(
        "trace", "request", "Accepted slots of each round, the target's own token left out"
    )
    sums = trace_sums(trace)
    for prompt, part in sums[sums["kind"] == "empirical"].groupby("conversation", sort=True):
        own = {name: part.sort_values("slot")[name].tolist() for name in ("passed", "reached")}
        about = {"line": str(prompt), "label": part["domain"].iloc[0]}
        tally.add(part["rounds"].iloc[0], sum(own["passed"]), **own, about=about)
    return tally.record()


def _is_log(start: bytes) -> bool:
    """Whether what begins as JSON holds a line of a log that is none."""
    for line in start.decode("utf-8", "replace").splitlines():
        if any(mark in line for reader in LOGS[:-1] for mark in reader.marks):
            try:
                json.loads(line.strip().rstrip(","))
            except ValueError:
                return not line.lstrip().startswith('"')
    return False


def _lines(text: IO[str]) -> tuple[Tally, str | None]:
    """A log or Prometheus' text, of one program."""
    reader: LogReader | None = None
    number, truncated = 0, None
    while line := text.readline(_LONGEST):
        number += 1
        found = next((one for one in LOGS if any(mark in line for mark in one.marks)), None)
        if found is None:
            if any(mark in line for mark in MADE_UP):
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
    rows, before = _rows(text, end), 0
    for first in rows:
        all_rows = itertools.chain([first], rows)
        if payloads := dump_payloads(first):
            tally = read_dump(payloads)
        elif is_iteration(first):
            tally = read_iterations(all_rows)
        elif reader := summary_reader(first):
            tally = reader(first)
        elif form := request_form(first):
            tally = read_requests(all_rows, form, texts=texts)
            if before:
                tally.notes[f"{before} rows before the first one have no record"] = None
        else:
            # Records of requests may begin with rows that have none.
            before += 1
            continue
        return tally, end[0] if end else None
    raise ValueError(f"known are {KINDS}")


def _rows(text: IO[str], end: list[str]) -> Iterator[Object]:
    """The objects of a file; where the last one is cut off, ``end`` says so."""
    first = text.readline()
    while first and not first.strip():
        first = text.readline()
    if first.lstrip().startswith("["):
        yield from _objects_of(_array(first + text.read(), end))
        return
    value = _whole(first)
    if value is None:
        value = _whole(first + text.read())
        if value is None:
            raise ValueError("it begins as JSON, but is none")
    yield from _objects_of([value])
    for number, line in enumerate(text, start=2):
        if not line.strip():
            continue
        value = _whole(line)
        if value is None and line.endswith("\n"):
            raise ValueError(f"line {number} is no JSON")
        if value is None:
            end.append(f"line {number}")
        yield from _objects_of([value])


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
