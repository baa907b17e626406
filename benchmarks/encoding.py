"""encode_all against a file read whole and encoded in a loop, and its memory for two lengths."""

import json
import os
import resource
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from benchmarks.measure import seconds
from dspark_lab.chats import Chat, encode, encode_all, load_chats, load_tokenizer
from dspark_lab.tuning import supervision

# Conversations against the loop, and gigabytes of the files: DSPARK_LAB_GB=1,4 for long ones.
CONVERSATIONS, GIGABYTES = 10_000, "0.02,0.08"
RUNS = 3
# Of a made-up line so many characters say nothing of the conversation, as a source's record does.
REST = 9_000

MEASURED = """
import sys
from benchmarks.encoding import peak
peak(sys.argv[1], sys.argv[2])
"""


def run() -> Iterator[str]:
    warnings.simplefilter("ignore")
    tokenizer, shipped = load_tokenizer(), load_chats().conversations
    chats = [
        Chat(chat.messages, f"{chat.id}/{number}", chat.domain)
        for number in range(-(-CONVERSATIONS // len(shipped)))
        for chat in shipped
    ][:CONVERSATIONS]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "chats.jsonl"
        with path.open("w", encoding="utf-8") as file:
            for chat in chats:
                file.write(json.dumps({"id": chat.id, "messages": chat.messages}) + "\n")
        for number in range(RUNS):
            started = _cpu_seconds()
            loop = seconds(lambda: [encode(chat, tokenizer) for chat in load_chats(path)])
            between = _cpu_seconds()
            call = partial(encode_all, path, tokenizer, progress=False)
            ours = seconds(partial(call, cache=Path(folder) / str(number)))
            work = (between - started) / (_cpu_seconds() - between)
            tokens = int(call(cache=Path(folder) / str(number)).lengths.sum())
            yield (
                f"{len(chats):,} conversations, {tokens / 1e6:.1f} million tokens: "
                f"{tokens / ours:,.0f} tokens a second, file and loop {tokens / loop:,.0f}, "
                f"{loop / ours:.2f} x; CPU seconds {work:.2f} x fewer"
            )
    yield from memory()


def memory() -> Iterator[str]:
    """The peaks of processes that encode files of two lengths."""
    with tempfile.TemporaryDirectory() as folder:
        sizes = os.environ.get("DSPARK_LAB_GB", GIGABYTES).split(",")
        peaks = []
        for size in sizes:
            made = Path(folder) / f"{size}.jsonl"
            _write_lines(made, float(size))
            given = [sys.executable, "-c", MEASURED, str(made), str(Path(folder) / f"big {size}")]
            told = subprocess.run(given, check=True, capture_output=True, text=True).stdout
            peaks.append(json.loads(told.splitlines()[-1]))
            made.unlink()
            words = ", ".join(f"{name} {value:,}" for name, value in peaks[-1].items())
            yield f"{size} GB of lines: {words}"
        grown = max(p["peak_mb"] for p in peaks) / min(p["peak_mb"] for p in peaks) - 1
        yield f"peaks of memory differ by {grown:.1%}"


def peak(path: str, cache: str) -> None:
    """Encode a file and cover it; print the peak of this process and of its largest worker."""
    warnings.simplefilter("ignore")
    took = {}
    rows = []
    took["encode_seconds"] = round(
        seconds(
            lambda: rows.append(encode_all(path, load_tokenizer(), cache=cache, progress=False))
        )
    )
    took["rows"], took["tokens"] = len(rows[0]), int(rows[0].lengths.sum())
    took["encode_mb"] = _megabytes(resource.RUSAGE_SELF)
    took["worker_mb"] = _megabytes(resource.RUSAGE_CHILDREN)
    took["cover_seconds"] = round(seconds(lambda: supervision(rows[0].cut(2048), 64, 7)))
    took["peak_mb"] = took["encode_mb"] + took["worker_mb"]
    took["cover_mb"] = _megabytes(resource.RUSAGE_SELF)
    print(json.dumps(took))


def _cpu_seconds() -> float:
    """Of this process and of those that it waited for: what other programs take does not count."""
    usages = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def _megabytes(who: int) -> int:
    return resource.getrusage(who).ru_maxrss // 1024


def _write_lines(path: Path, gigabytes: float) -> None:
    """Made-up conversations, no two alike."""
    shipped = load_chats().conversations
    number, size = 0, 0
    with path.open("wb") as file:
        while size < gigabytes * 1e9:
            chat = shipped[number % len(shipped)]
            said = [m | {"content": f"{m['content']} ({number})"} for m in chat.messages]
            record = {"id": str(number), "messages": said, "record": f"{number} " * (REST // 8)}
            size += file.write(json.dumps(record).encode() + b"\n")
            number += 1
