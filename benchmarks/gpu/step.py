"""A training step of the drafter of Qwen3-4B: random weights, features given, bf16 products."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from benchmarks.cost import held_bytes, measured_peak, training_run
from benchmarks.gpu.card import published
from benchmarks.gpu.child import Report
from benchmarks.gpu.sides import attempt, compare, require_flex
from benchmarks.measure import take_turns
from dspark_lab.chats import Batch
from dspark_lab.files import now, upload
from dspark_lab.model import Features, FeatureSource
from dspark_lab.training import Run
from dspark_lab.tuning import TARGETS, Shape, memory_table, training_cost

NAMES = ("seq_len", "num_anchors", "block_size", "batch_size", "dtype")
STEP, DRY = (4096, 512, 7, 1, "bf16"), (64, 4, 7, 1, "bf16")
PEAKS = [(1024, 64, 7, 1, "bf16"), (1024, 64, 7, 1, "fp32"), (512, 32, 7, 4, "bf16")]
PEAKS += [(2048, 256, 7, 1, "bf16"), (2048, 128, 15, 2, "bf16"), (4096, 512, 7, 1, "fp32")]
PEAKS += [(4096, 1024, 4, 1, "bf16"), (8192, 1024, 7, 1, "bf16")]


def run(report: Report) -> None:
    shape = replace(TARGETS[report.pick("qwen3-4b", "pocket")], target=None)
    sizes: dict[str, Any] = dict(zip(NAMES, report.pick(STEP, DRY), strict=True))
    rates = _peak_rates(report)
    attempt(report, "step", lambda: _eager(report, shape, sizes, rates))
    for numbers in report.pick(PEAKS, [DRY, (64, 8, 4, 2, "fp32")]):
        some = dict(zip(NAMES, numbers, strict=True))
        label = "peak at S {}, N {}, K {}, B {}, {}".format(*numbers)
        attempt(report, label, partial(_peak, report, label, shape, some))
    # It takes longest to compile, so that it comes last.
    attempt(report, "compiled step", lambda: _compiled(report, shape, sizes, rates))


def _eager(report: Report, shape: Shape, sizes: dict[str, Any], rates: dict[str, float]) -> None:
    run = training_run(shape, **sizes, device=report.device)
    source = _from_host(shape, sizes, report.device)
    always, moving = _predicted(report, shape, sizes)
    sides, beside = {"eager": partial(_advance, run, source)}, {"predicted": moving / 1e9}
    times = compare(report, "step", sides, beside=beside)
    held = held_bytes(run) / 1e9
    report.figure("step: held between steps", "GB", [held], "", {"predicted": always / 1e9})
    _utilisation(report, "step", shape, sizes, rates, times)
    _shares(report, run, source)


def _compiled(report: Report, shape: Shape, sizes: dict[str, Any], rates: dict[str, float]) -> None:
    eager = training_run(shape, **sizes, device=report.device)
    settings = eager.drafter, eager.config, eager.order.tokens, eager.out, eager.processes
    compiled = Run(*settings, compile=True)
    compiled.optimizer = eager.optimizer
    source = _from_host(shape, sizes, report.device)
    runs = {"eager": eager, "compiled": compiled}
    sides = {name: partial(_advance, run, source) for name, run in runs.items()}
    times = compare(report, "compiled step", sides)
    _utilisation(report, "compiled step", shape, sizes, rates, times)


def _advance(run: Run, source: FeatureSource) -> None:
    run.advance(source)
    require_flex()


def _utilisation(
    report: Report,
    label: str,
    shape: Shape,
    sizes: dict[str, Any],
    rates: dict[str, float],
    times: dict[str, list[float]],
) -> None:
    """Operations of a step by its time, as a share of each rate."""
    operations = training_cost(shape, **sizes, features="cached")["operations"].sum()
    for against, rate in rates.items():
        for name, some in times.items():
            shares = [100 * operations / seconds / rate for seconds in some]
            report.figure(f"{label}: {name}, MFU by {against}", "%", shares)


def _from_host(shape: Shape, sizes: dict[str, Any], device: str) -> FeatureSource:
    """Random features in the host's memory, moved to the device whenever they are asked for."""
    rows = sizes["batch_size"], sizes["seq_len"]
    context, last = (
        torch.randn(*rows, size, device=device).bfloat16().cpu()
        for size in (shape.context_size, shape.drafter.hidden_size)
    )

    def source(batch: Batch) -> Features:
        return Features(upload(context, device), upload(last, device))

    return source


def _shares(report: Report, run: Run, source: FeatureSource) -> None:
    """Where the time of an eager step goes, with the device waited for after each part."""
    drafter, device = run.drafter, torch.device(report.device)
    spent: dict[str, float] = defaultdict(float)
    last = now(device)

    def after(part: str) -> Callable[..., None]:
        def mark(*_: Any) -> None:
            nonlocal last
            time = now(device)
            spent[part] += time - last
            last = time

        return mark

    def timed_source(batch: Batch) -> Features:
        after("rows and blocks")()
        features = source(batch)
        after("features move")()
        return features

    others = "mask, embedding, positions"
    drafter.fc.register_forward_pre_hook(after(others))
    drafter.hidden_norm.register_forward_hook(after("context projection"))
    drafter.layers[0].register_forward_pre_hook(after(others))
    drafter.norm.register_forward_hook(after("layers"))
    if drafter.confidence_head is not None:
        drafter.confidence_head.register_forward_hook(after("heads"))
    run.forward.register_forward_hook(after("objective"))
    shares: list[dict[str, float]] = []
    for _ in range(report.runs):
        spent.clear()
        last = now(device)
        run.backward(timed_source)
        after("backward")()
        torch.nn.utils.clip_grad_norm_(run.trained.values(), run.config.clip_norm)
        run.optimizer.step()
        run.optimizer.zero_grad()
        after("clipping and optimiser")()
        shares.append({part: 100 * time / sum(spent.values()) for part, time in spent.items()})
    for part in shares[0]:
        report.figure(f"step: eager, share of {part}", "%", [share[part] for share in shares])


def _peak_rates(report: Report) -> dict[str, float]:
    """Operations a second of a large bf16 product, and the card's peak as published."""
    size = report.pick(8192, 128)
    x = torch.randn(size, size, device=report.device, dtype=torch.bfloat16)
    torch.mm(x, x)
    times = take_turns({"product": lambda: torch.mm(x, x)}, report.runs)["product"]
    rates = [2 * size**3 / seconds for seconds in times]
    name = f"bf16 product of {size} x {size}"
    report.figure(name, "10^12/s", [rate / 1e12 for rate in rates])
    found = {"that product": statistics.median(rates)}
    card = None if report.dry else published(torch.cuda.get_device_name())
    if card is None:
        report.note("published peak", "tuning.CARDS does not name this card")
    else:
        found[f"the peak of {card.name}"] = card.operations_per_second
    return found


def _predicted(report: Report, shape: Shape, sizes: dict[str, Any]) -> tuple[int, int]:
    """Bytes held throughout, and the most that a step holds beside them."""
    options: dict[str, Any] = {"features": "cached", "target_dtype": "bf16"}
    table = memory_table(shape, **sizes, **options, device=report.device)
    return int(table["held"][:4].sum()), int(table["held"][4:].sum())


def _peak(report: Report, label: str, shape: Shape, sizes: dict[str, Any]) -> None:
    predicted = sum(_predicted(report, shape, sizes))
    measured = sum(measured_peak(shape, device=report.device, **sizes))
    require_flex()
    beside = {"predicted": predicted / 1e9, "ratio": predicted / measured}
    report.figure(label, "GB", [measured / 1e9], "", beside)
