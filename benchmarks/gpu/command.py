"""Run the parts, each in a process of its own with a time limit, and keep what they measure.

With the standard library alone, so that it can say what is missing. A figure is printed and stored
as soon as it is measured: a part that fails, hangs or is cut off has told what it had.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from importlib.util import find_spec
from pathlib import Path
from threading import Timer
from time import monotonic
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
BASIC = ("torch", "numpy", "jaxtyping", "lazy_loader")
MODELS = (*BASIC, "jinja2", "pandas", "safetensors", "tqdm", "transformers")
TESTS = (*MODELS, "hypothesis", "pytest")


@dataclass(frozen=True)
class Part:
    """``limit`` is in seconds; ``needs`` are packages, named as Python imports them."""

    number: int
    title: str
    module: str
    limit: float
    needs: tuple[str, ...] = BASIC
    default: bool = True


# All limits but the last are 300 seconds together; what a part leaves over is added to the next
# one's.
CARD = Part(0, "the card", "benchmarks.gpu.card", 40, ("torch",))
PARTS = (
    Part(1, "the tests marked gpu", "benchmarks.gpu.marked_tests", 100, TESTS),
    Part(2, "block mask", "benchmarks.gpu.mask", 25),
    Part(3, "attention", "benchmarks.gpu.attention", 20),
    Part(4, "objective", "benchmarks.gpu.objective", 30),
    Part(5, "a training step of Qwen3-4B's drafter", "benchmarks.gpu.step", 60, MODELS),
    Part(6, "decoding", "benchmarks.gpu.decoding", 25, MODELS),
    Part(7, "three minutes of training", "benchmarks.gpu.training", 240, MODELS, False),
)
# What every figure has; more of it is printed beside it.
FIELDS = ("name", "unit", "median", "lowest", "highest", "runs", "note")


def main(arguments: Sequence[str], parts: Sequence[Part] = PARTS) -> int:
    """Run the parts that are asked for; 1 if one of them failed or none could run."""
    options = _options(arguments, parts)
    dry = options.dry_run
    missing = _missing([CARD, *options.parts])
    if "torch" in missing:
        print(f"{sys.executable} has no torch: name a Python that has it, `make gpu PYTHON=...`")
        return 1
    if missing:
        print(f"not installed: {', '.join(missing)}; `pip install {' '.join(missing)}` gets them")
    # A busy CPU may be slow.
    scale = 10 if dry else 1
    found, spare = _run(CARD, CARD.limit * scale, dry, lambda figure: None)
    if found["state"] != "ok":
        print(f"torch does not work here: {found['state']}")
        return 1
    facts = found["figures"][0]
    if not (facts["card"] or dry):
        print("no CUDA device: `make gpu` measures on a card, `make gpu DRY=1` tries it on a CPU")
        return 1
    facts["card"] = "dry run on a CPU" if dry else facts["card"]
    facts["python"] = platform.python_version()
    facts["date"] = datetime.now().astimezone().isoformat(timespec="seconds")
    results = _others(options.out, facts, options.parts)
    print(", ".join(f"{name} {value}" for name, value in facts.items() if value))
    for part in options.parts:
        print(f"\n{part.number}. {part.title}", flush=True)
        figures: list[dict[str, Any]] = []
        result = {"part": part.number, "title": part.title, "state": "cut off", "figures": figures}
        results.append(result)
        results.sort(key=lambda result: result["part"])
        _write(options.out, facts | {"parts": results})

        def keep(figure: dict[str, Any], figures: list[Any] = figures) -> None:
            figures.append(figure)
            _write(options.out, facts | {"parts": results})
            print(f"  {_row(figure)}", flush=True)

        if lacks := _missing([part]):
            result |= {"state": f"left out: needs {', '.join(lacks)}", "seconds": 0.0}
        else:
            ran, spare = _run(part, part.limit * scale + spare, dry, keep)
            result.update(ran)
        print(f"  {result['state']}, {result['seconds']:.0f} s", flush=True)
        _write(options.out, facts | {"parts": results})
    print(f"\nwritten to {options.out}")
    chosen = {part.number for part in options.parts}
    states = [result["state"] for result in results if result["part"] in chosen]
    bad = any(state.startswith(("failed", "timed out")) for state in states)
    return int(bad or "ok" not in states)


def _others(path: Path, facts: dict[str, Any], parts: Sequence[Part]) -> list[dict[str, Any]]:
    """What an earlier call measured of the other parts, on the same card with the same torch."""
    if not path.exists():
        return []
    record, chosen = json.loads(path.read_text()), {part.number for part in parts}
    if any(record.get(name) != facts[name] for name in ("card", "torch")):
        return []
    return [result for result in record["parts"] if result["part"] not in chosen]


def _run(
    part: Part, limit: float, dry: bool, keep: Callable[[dict[str, Any]], None]
) -> tuple[dict[str, Any], float]:
    """The part's state, seconds and figures, each handed to ``keep`` at once; what time is left."""
    begin, late, end = monotonic(), False, None
    figures: list[dict[str, Any]] = []
    command = [sys.executable, "-m", "benchmarks.gpu.child", part.module, *["dry"] * dry]
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    with tempfile.TemporaryFile("w+", errors="replace") as log:
        child = subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            start_new_session=True,
        )
        assert child.stdout is not None

        def cut() -> None:
            nonlocal late
            late = True
            _kill(child)

        timer = Timer(limit, cut)
        timer.start()
        try:
            for line in child.stdout:
                message = json.loads(line) if line.endswith("\n") else {}
                if "failures" in message:
                    end = message["failures"]
                    break
                if message:
                    figures.append(message)
                    keep(message)
            else:
                child.wait()
        finally:
            timer.cancel()
            _kill(child)
            child.wait()
        log.seek(0)
        lines = [line.rstrip() for line in log if line.strip()]
    seconds = monotonic() - begin
    state = "ok"
    if end:
        state = f"failed: {'; '.join(end)}"
    elif end is None:
        last = lines[-1] if lines else "it said nothing"
        state = f"failed: ended with status {child.returncode}: {last}"
        if late:
            state = f"timed out after {limit:.0f} s"
    result: dict[str, Any] = {"state": state, "seconds": round(seconds, 1), "figures": figures}
    if state != "ok":
        result["log"] = lines[-30:]
    return result, max(0.0, limit - seconds)


def _kill(child: subprocess.Popen[str]) -> None:
    """End a child and all that it started."""
    with suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)


def _options(arguments: Sequence[str], parts: Sequence[Part]) -> argparse.Namespace:
    by_number = {str(part.number): part for part in parts}

    def part_named(number: str) -> Part:
        if number not in by_number:
            raise argparse.ArgumentTypeError(
                f"a part must be one of {' '.join(by_number)}, got {number!r}"
            )
        return by_number[number]

    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("parts", nargs="*", type=part_named, help="numbers; all but 7 if none")
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes on the CPU")
    parser.add_argument("--out", type=Path, help="by default gpu.json, gpu-dry-run.json if dry")
    options = parser.parse_args(arguments)
    if options.out is not None and not options.out.parent.is_dir():
        parser.error(f"--out must lie in a folder that exists, got {options.out}")
    chosen = options.parts or [part for part in parts if part.default]
    options.parts = [part for part in parts if part in chosen]
    options.out = options.out or ROOT / ("gpu-dry-run.json" if options.dry_run else "gpu.json")
    return options


def _missing(parts: Sequence[Part]) -> list[str]:
    """Packages that the parts need and this Python lacks, as pip names them."""
    needs = dict.fromkeys(name for part in parts for name in part.needs)
    return [name.replace("_", "-") for name in needs if find_spec(name) is None]


def _row(figure: dict[str, Any]) -> str:
    shown = {k: v for k, v in figure.items() if k not in FIELDS}
    text = f"{figure['name']:<66}"
    if figure["median"] is not None:
        text += f" {figure['median']:>9.4g} {figure['unit']:<8}"
        if figure["runs"] > 1:
            text += f" ({figure['lowest']:.4g} to {figure['highest']:.4g}, {figure['runs']} runs)"
    extra = [f"{name} {value:.4g}" for name, value in shown.items()]
    return f"{text}  {', '.join([*extra, *filter(None, [figure['note']])])}".rstrip()


def _write(path: Path, record: dict[str, Any]) -> None:
    """Write the record whole or not at all."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    os.replace(partial, path)
