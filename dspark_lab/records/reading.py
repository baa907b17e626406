"""Open a record of acceptance and find out what it is, by its content."""

from __future__ import annotations

import gzip
import io
import itertools
import json
import os
import re
import zlib
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, Any
from urllib.error import URLError
from urllib.parse import urlsplit
from urllib.request import urlopen

import numpy as np
import pandas as pd

from dspark_lab.checks import Positive, checked
from dspark_lab.decoding import load_trace, read_trace
from dspark_lab.files import require_found
from dspark_lab.rates import trace_sums
from dspark_lab.records.dump import (
    STEP_MARK,
    DumpSums,
    Payload,
    dump_payloads,
    dump_trace,
    is_step,
    step_of_line,
)
from dspark_lab.records.logs import (
    MADE_UP,
    Exposition,
    LlamaLog,
    LlamaStatistics,
    LogReader,
    SglangLog,
    SglangSteps,
    VllmLog,
)
from dspark_lab.records.printed import LlamaPrinted, VllmPrinted
from dspark_lab.records.record import AcceptanceRecord, Tally
from dspark_lab.records.requests import Object, read_requests, request_form
from dspark_lab.records.summaries import (
    CSV_HEAD,
    is_iteration,
    python_literal,
    read_csv_lines,
    read_iterations,
    summary_reader,
)

KINDS = """the logs of vLLM, SGLang and llama.cpp, the text of their /metrics and of TensorRT-LLM's,
what vLLM's benchmark and example and llama.cpp's examples print, requests with
speculative_decoding, spec_decode_acceptance, meta_info or timings, SGLang's debug record and
server_info, TensorRT-LLM's iterations, speculators' acceptance.csv, DeepSpec's metrics.json and
what AutoModel's and vLLM's benchmarks write""".replace("\n", " ")
# A file is read as the first of these that its lines fit, which says most.
LOGS: tuple[type[LogReader], ...] = (
    VllmPrinted,
    VllmLog,
    SglangSteps,
    SglangLog,
    LlamaLog,
    LlamaStatistics,
    LlamaPrinted,
    Exposition,
)
_MARKS = [*(mark for reader in LOGS for mark in reader.marks), *MADE_UP]
# The longest line of a log that is looked at, and how much is to tell what a file is.
_LONGEST, _AHEAD = 1 << 20, 1 << 18
# So much of an array is read at once, and what stands between its values.
_CHUNK, _BETWEEN = 1 << 16, re.compile(r"[\s,]*")


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
    with _opened(source, timeout) as (name, file):
        return _read(file, name, texts)


@checked
def trace_of_dump(source: str | os.PathLike[str], *, timeout: Positive = 10.0) -> pd.DataFrame:
    """SGLang's debug record as a trace of the server's own rounds, its confidences among them.

        trace = records.trace_of_dump("http://localhost:30000/server_info")
        fit, test = rates.split_prompts(trace)
        rates.calibration_report(fit, test), rates.threshold_sweep(trace)

    A prompt is a request, numbered as they come, whose id is the column ``request``; ``position``
    counts from its first round in the record. The debug record holds no probabilities of the
    models: ``draft_prob``, ``target_prob``, ``accept_prob`` and ``accept_rate`` are NaN, so that
    outcomes are *empirical*; ``confidence`` is NaN and ``token`` -1 where it lacks them, too. Where
    a cap cut what a server had verified ("cap-accept"), slots are those of the whole block; where
    it verified less ("compact"), the others are not verified.

    Args:
        source, timeout: as of :func:`load_acceptance`, which reads the same as sums.
    """
    with _opened(source, timeout) as (_, file):
        trace = dump_trace(_payloads(file))
        read_trace(trace)
        return trace


@contextmanager
def _opened(
    source: str | os.PathLike[str], timeout: float
) -> Iterator[tuple[str, io.BufferedReader[Any]]]:
    """Open a file, gzipped or not, or a server's answer; errors while it is read name it."""
    name = os.fspath(source)
    with ExitStack() as stack:
        try:
            if urlsplit(name).scheme in ("http", "https"):
                answer = stack.enter_context(urlopen(name, timeout=timeout))
                yield name, io.BufferedReader(answer, _AHEAD)
                return
            require_found(source)
            raw = io.FileIO(Path(source).expanduser())
            file: io.BufferedReader[Any] = stack.enter_context(io.BufferedReader(raw, _AHEAD))
            if file.peek(2)[:2] == b"\x1f\x8b":
                file = io.BufferedReader(gzip.GzipFile(fileobj=file), _AHEAD)
            yield name, file
        except URLError as error:
            raise OSError(f"{name} gave no answer: {error}") from error
        except (EOFError, zlib.error) as error:
            raise ValueError(f"{name} is a broken gzip file: {error}") from error
        except (KeyError, TypeError, ValueError) as error:
            told = f"it has no {error}" if isinstance(error, KeyError) else str(error)
            raise ValueError(f"{name} must hold a record of acceptance: {told}") from error


def _start(file: io.BufferedReader[Any]) -> bytes:
    """The first lines of a file, none of them cut; refuses a file that may run code."""
    start = file.peek(_AHEAD)[:_AHEAD]
    if len(start) == _AHEAD:
        start = start[: max(start.rfind(b"\n"), 64)]
    start = start.removeprefix(b"\xef\xbb\xbf").lstrip()
    if start.startswith((b"PK\x03\x04", b"\x80")):
        raise ValueError(
            "it is a torch or zip file, which may run code when it is read: save its tensors as "
            "safetensors, or its counts as JSON"
        )
    return start


def _read(file: io.BufferedReader[Any], name: str, texts: bool) -> AcceptanceRecord:
    start = _start(file)
    if start.startswith(b"PAR1"):
        return record_of_trace(load_trace(name))
    text = _text(file)
    if start.startswith(CSV_HEAD.encode()):
        tally, truncated = read_csv_lines(text)
    elif _is_json(start):
        tally, truncated = _objects(text, texts)
    else:
        tally, truncated = _lines(text)
    if not tally.count:
        raise ValueError("it counts no round")
    return tally.record(truncated)


@checked
def record_of_trace(trace: pd.DataFrame) -> AcceptanceRecord:
    """A trace of the lab's own as a record, to hold it beside a server's: a line a prompt.

    ``output_tokens`` are those of the answer. An answer is taken to end with a drafted token where
    all that was verified of its last round was accepted, and more was drafted; where a block's
    last slot was the end, that is one token too many.
    """
    tally = Tally(
        "trace", "request", "Accepted slots of each round, the target's own token left out"
    )
    rounds, row = read_trace(trace)
    accepted, verified = rounds.accepted.sum(axis=1), rounds.verified.sum(axis=1)
    last = np.append(rounds.prompt[1:] != rounds.prompt[:-1], True)
    own_token = ~(last & (accepted == verified) & (verified < (row >= 0).sum(axis=1)))
    # An answer's first token belongs to no round.
    tokens = 1 + pd.Series(accepted + own_token).groupby(rounds.prompt).sum()
    temperature = None
    if "temperature" in trace:
        temperature = trace.groupby("prompt")["temperature"].first()
    sums = trace_sums(trace)
    for prompt, part in sums[sums["kind"] == "empirical"].groupby("conversation", sort=True):
        own = {name: part.sort_values("slot")[name].tolist() for name in ("passed", "reached")}
        about = {"line": str(prompt), "label": part["domain"].iloc[0]}
        about["output_tokens"] = int(tokens.loc[prompt])
        if temperature is not None:
            about["temperature"] = temperature.loc[prompt]
        tally.add(part["rounds"].iloc[0], sum(own["passed"]), **own, about=about)
    return tally.record()


def _text(file: io.BufferedReader[Any]) -> IO[str]:
    return io.TextIOWrapper(file, "utf-8-sig", errors="replace", newline="\n")


def _is_json(start: bytes) -> bool:
    """Whether a file is JSON, and no log that merely begins like it."""
    if start[:1] not in (b"{", b"["):
        return False
    for line in start.decode("utf-8", "replace").splitlines():
        if any(mark in line for reader in LOGS[:-1] for mark in reader.marks):
            try:
                json.loads(line.strip().rstrip(","))
            except ValueError:
                return line.lstrip().startswith('"')
    return True


def _payloads(file: io.BufferedReader[Any]) -> Iterator[Payload]:
    """The debug records in JSON, or the steps in a log."""
    start, text = _start(file), _text(file)
    if _is_json(start):
        rows = _rows(text, [])
        first = next((row for row in rows if dump_payloads(row)), None)
        yield from _dumps(first, rows) if first else ()
        return
    number = 0
    while line := text.readline(_LONGEST):
        number += 1
        found = step_of_line(line) if STEP_MARK in line else None
        if found is not None:
            yield found
        elif STEP_MARK in line and line.endswith("\n"):
            raise ValueError(f"line {number} holds no whole step")


def _dumps(first: Object, rows: Iterator[Object]) -> Iterator[Payload]:
    """The debug records in an object; all steps where it is one."""
    for row in itertools.chain([first], rows if is_step(first) else ()):
        yield from dump_payloads(row)


def _lines(text: IO[str]) -> tuple[Tally, str | None]:
    """A log, a program's output or Prometheus' text."""
    readers = {kind: kind() for kind in LOGS}
    block: LogReader | None = None
    number, truncated = 0, None
    while line := text.readline(_LONGEST):
        number += 1
        if block is None and not any(map(line.__contains__, _MARKS)):
            continue
        if any(mark in line for mark in MADE_UP):
            raise ValueError(f"line {number} says that acceptance was made up, not measured")
        kind = next((one for one in LOGS if any(mark in line for mark in one.marks)), None)
        asked = [one for one in (block, readers[kind] if kind else None) if one]
        try:
            block = next((one for one in asked if one.read(line)), None)
        except ValueError as error:
            raise ValueError(f"line {number}: {error}") from None
        if asked and block is None and not line.endswith("\n"):
            truncated = f"line {number}"
        if block is not None and not block.open:
            block = None
    try:
        used = [reader for reader in readers.values() if reader.used]
        tally = used[0].tally if used else None
    except ValueError as error:
        raise ValueError(f"in {number} lines: {error}") from None
    if tally is None:
        lacks = [reader.lacks for reader in readers.values() if reader.lacks]
        raise ValueError(lacks[0] if lacks else f"known are {KINDS}")
    for other in used[1:]:
        tally.notes[f"lines with {other.marks[0]!r} say less and are left out"] = None
    if used[0].lacks:
        tally.notes[used[0].lacks] = None
    return tally, truncated


def _objects(text: IO[str], texts: bool) -> tuple[Tally, str | None]:
    """JSON: an object a line, an array of them, or one object."""
    end: list[str] = []
    rows, before = _rows(text, end), 0
    for first in rows:
        all_rows = itertools.chain([first], rows)
        if dump_payloads(first):
            sums = DumpSums()
            for found in _dumps(first, rows):
                sums.add(found)
            tally = sums.tally()
        elif is_iteration(first):
            tally = read_iterations(all_rows)
        elif reader := summary_reader(first):
            tally = reader(row for row in all_rows if summary_reader(row) is reader)
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
    number, start = 1, text.read(1)
    while start.isspace():
        number, start = number + (start == "\n"), text.read(1)
    if start == "[":
        yield from _objects_of(_values(text, end))
        return
    first = start + text.readline()
    value = _whole(first)
    if value is None:
        value = _whole(first + text.read())
        if value is None:
            raise ValueError("it begins as JSON, but is none")
    yield from _objects_of([value])
    for place, line in enumerate(text, start=number + 1):
        if not line.strip():
            continue
        value = _whole(line)
        if value is None and line.endswith("\n"):
            raise ValueError(f"line {place} is no JSON")
        if value is None:
            end.append(f"line {place}")
        yield from _objects_of([value])


def _values(text: IO[str], end: list[str]) -> Iterator[Any]:
    """The values of an array behind its bracket, each as soon as it was read."""
    decode = json.JSONDecoder().raw_decode
    rest, at, count, size, closed = "", 0, 0, _CHUNK, False
    while True:
        gap = _BETWEEN.match(rest, at)
        at = gap.end() if gap else at
        try:
            value, behind = decode(rest, at)
        except ValueError:
            value, behind = None, len(rest)
        # A number at the end of what was read may go on.
        if behind < len(rest) or isinstance(value, (dict, list)):
            yield value
            at, count, size = behind, count + 1, _CHUNK
        elif rest.startswith("]", at):
            at, closed = at + 1, True
        elif more := text.read(size):
            rest, at, size = rest[at:] + more, 0, 2 * size
        else:
            break
    if closed and at == len(rest):
        return
    whole = None if count else python_literal("[" + rest)
    if isinstance(whole, list):
        yield from whole
    elif not count:
        raise ValueError("it begins as a JSON array, but is none")
    else:
        end.append(f"value {count + 1}")


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
