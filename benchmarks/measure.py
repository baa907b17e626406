"""Timing calls against each other in the same process, and counting the bytes a call holds."""

import statistics
import time
from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile


def seconds(call: Callable[[], object]) -> float:
    """How long one call takes, work queued on a GPU included."""
    _wait()
    begin = time.perf_counter()
    call()
    _wait()
    return time.perf_counter() - begin


def median_seconds(call: Callable[[], object], runs: int = 21) -> float:
    """The median of ``runs`` calls after a warm-up."""
    call()
    return statistics.median(seconds(call) for _ in range(runs))


def take_turns(calls: dict[str, Callable[[], object]], runs: int) -> dict[str, list[float]]:
    """Seconds of each of ``runs`` calls, one after the other, so that drift hits all alike."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(runs):
        for name, call in calls.items():
            times[name].append(seconds(call))
    return times


def compare(
    name: str, ours: Callable[[], object], baseline: Callable[[], object], runs: int = 11
) -> str:
    """Both medians, and the ratio pair by pair."""
    ours(), baseline()
    times = take_turns({"ours": ours, "theirs": baseline}, runs)
    ratios = sorted(b / a for a, b in zip(*times.values(), strict=True))
    own, theirs = map(statistics.median, times.values())
    return (
        f"{name:<58} {own * 1e3:9.2f} ms  {theirs * 1e3:9.2f} ms   "
        f"{statistics.median(ratios):7.1f} x  ({ratios[0]:.1f} to {ratios[-1]:.1f})"
    )


def peak_bytes(call: Callable[[], object], device: str = "cpu") -> int:
    """The most memory that tensors made during the call hold at one time, in bytes."""
    if device != "cpu":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        call()
    events = [e for e in trace.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
