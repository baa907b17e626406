"""A server's log read against its lines alone being looped over, and the memory that it takes."""

import json
import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from benchmarks.measure import seconds
from dspark_lab.records import load_acceptance

# Gigabytes of the logs: DSPARK_LAB_GB=0.05,1 for a long one.
GIGABYTES = "0.05,0.2"
# Of so many lines one is of acceptance, every tenth of a second in a log of a busy server.
EACH = 20
OTHER = "INFO 03-14 09:26:53 [logger.py:41] Received request cmpl-{}: prompt: None, params: {}\n"

MEASURED = "import sys\nfrom benchmarks.records import peak\npeak(sys.argv[1])"


def run() -> Iterator[str]:
    with tempfile.TemporaryDirectory() as folder:
        path, peaks = Path(folder) / "vllm.log", []
        for size in os.environ.get("DSPARK_LAB_GB", GIGABYTES).split(","):
            lines = _write(path, float(size))
            loop = seconds(lambda: _looped(path))
            ours = seconds(lambda: load_acceptance(path))
            given = [sys.executable, "-c", MEASURED, str(path)]
            told = subprocess.run(given, check=True, capture_output=True, text=True).stdout
            peaks.append(json.loads(told.splitlines()[-1]))
            yield (
                f"{size} GB, {lines:,} lines, {lines // EACH:,} of acceptance: {ours:.1f} s, "
                f"{ours / loop:.1f} x a loop over the lines; peak {peaks[-1]:,} MB"
            )


def peak(path: str) -> None:
    load_acceptance(path)
    print(json.dumps(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024))


def _looped(path: Path) -> None:
    with path.open(encoding="utf-8") as file:
        for _ in file:
            pass


def _write(path: Path, gigabytes: float) -> int:
    """A log of that size, a tenth of a second between its lines of acceptance."""
    words, number = "x" * 120, 0
    with path.open("w", encoding="utf-8") as file:
        while file.tell() < gigabytes * 1e9:
            for _ in range(1000):
                number += 1
                if number % EACH:
                    file.write(OTHER.format(number, words))
                    continue
                drafts = 100 + number % 57
                counts = [round(drafts * share) for share in (0.7, 0.5, 0.35, 0.25)]
                rates = ", ".join(f"{count / drafts:.3f}" for count in counts)
                tau = 1 + sum(counts) / drafts
                file.write(
                    f"INFO 03-14 09:{number // 60 % 60:02d}:{number % 60:02d} [metrics.py:100] "
                    f"SpecDecoding metrics: Mean acceptance length: {tau:.2f}, "
                    f"Accepted throughput: 1.00 tokens/s, Drafted throughput: 2.00 tokens/s, "
                    f"Accepted: {sum(counts)} tokens, Drafted: {4 * drafts} tokens, Per-position "
                    f"acceptance rate: {rates}, Avg Draft acceptance rate: 40.0%\n"
                )
    return number
