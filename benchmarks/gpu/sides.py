"""Time and peak memory of calls that do the same, each side in its own way."""

from __future__ import annotations

import gc
import traceback
from collections.abc import Callable, Mapping
from functools import partial
from typing import TypeVar

import torch

from benchmarks.gpu.child import Report, reason
from benchmarks.measure import peak_bytes, seconds, take_turns
from dspark_lab.attention.backends import flex

Result = TypeVar("Result")


def compare(
    report: Report,
    label: str,
    sides: Mapping[str, Callable[[], object]],
    *,
    memory: bool = True,
    beside: Mapping[str, float] = {},
) -> dict[str, list[float]]:
    """First call, peak memory and time of each side, and the times as ratios to the first side's.

    The first call compiles; the peak is what a later one holds beyond what was allocated before
    it. A side that fails or has too little memory is left out of the turns. ``beside`` is shown
    beside the first side's peak. Returns the seconds of each side.
    """

    def warm_up(name: str, call: Callable[[], object]) -> bool:
        report.figure(f"{label}: {name}, first call", "s", [seconds(call)])
        if memory:
            peak = peak_bytes(call, report.device) / 1e9
            others = beside if name == next(iter(sides)) else {}
            report.figure(f"{label}: {name}, peak memory", "GB", [peak], "", others)
        else:
            call()
        return True

    ready = {}
    for name, call in sides.items():
        if attempt(report, f"{label}: {name}", partial(warm_up, name, call)):
            ready[name] = call
    times = attempt(report, f"{label}, in turns", lambda: take_turns(ready, report.runs)) or {}
    for name, some in times.items():
        report.figure(f"{label}: {name}", "ms", [1e3 * value for value in some])
    first, *others = times or [""]
    for name in others:
        ratios = [b / a for a, b in zip(times[first], times[name], strict=True)]
        report.figure(f"{label}: {name} / {first}", "x", ratios)
    return times


def require_flex() -> None:
    """Refuse what was measured with a dense mask, since FlexAttention does not compile here."""
    if flex.failed:
        raise RuntimeError("FlexAttention does not compile here, see the first failure")


def attempt(report: Report, name: str, call: Callable[[], Result]) -> Result | None:
    """What the call returns; None and a row that says why where it fails or memory runs out."""
    try:
        return call()
    except torch.OutOfMemoryError:
        report.note(name, "out of memory")
    except Exception as error:
        traceback.print_exc()
        report.fail(name, reason(error))
    finally:
        gc.collect()
        if not report.dry:
            torch.cuda.empty_cache()
    return None
