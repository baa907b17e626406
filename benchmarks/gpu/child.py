"""Run one part of ``benchmarks.gpu`` and hand its figures to the command, one JSON object a line.

python -m benchmarks.gpu.child MODULE [dry]
"""

from __future__ import annotations

import importlib
import json
import math
import os
import statistics
import sys
import traceback
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TextIO, TypeVar

Size = TypeVar("Size")


@dataclass
class Report:
    """Where a part says what it measured; ``dry`` asks for tiny sizes on the CPU."""

    dry: bool
    stream: TextIO
    failures: list[str] = field(default_factory=list)

    @property
    def device(self) -> Literal["cpu", "cuda"]:
        return "cpu" if self.dry else "cuda"

    @property
    def runs(self) -> int:
        return self.pick(15, 2)

    def pick(self, on_card: Size, dry: Size) -> Size:
        return dry if self.dry else on_card

    def figure(
        self,
        name: str,
        unit: str,
        values: Sequence[float],
        note: str = "",
        beside: Mapping[str, float] = {},
    ) -> None:
        """A measured figure, and what is shown beside it, as an aim or a prediction."""
        if any(map(math.isnan, values)):
            return self.note(name, "undefined")
        spread = {"median": statistics.median(values), "lowest": min(values)}
        spread |= {"highest": max(values), "runs": len(values)}
        self.send({"name": name, "unit": unit, **spread, "note": note, **beside})

    def note(self, name: str, note: str) -> None:
        """A row without a figure."""
        empty = dict.fromkeys(("median", "lowest", "highest"))
        self.send({"name": name, "unit": "", **empty, "runs": 0, "note": note})

    def fail(self, name: str, reason: str) -> None:
        """A row that says why there is no figure; the part goes on and has failed at its end."""
        self.failures.append(name)
        self.note(name, f"failed: {reason}")

    def send(self, message: dict[str, Any]) -> None:
        print(json.dumps(message), file=self.stream, flush=True)


def reason(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def main(module: str, dry: bool) -> None:
    # What libraries print is no figure.
    stream = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    report = Report(dry, stream)
    if dry:
        os.environ["TORCHDYNAMO_DISABLE"] = "1"
    else:
        # A dense mask in place of what was to be measured is a failure.
        warnings.filterwarnings("error", message="torch.compile does not work here")
    try:
        importlib.import_module(module).run(report)
    except Exception as error:
        traceback.print_exc()
        report.failures.append(reason(error))
    report.send({"failures": report.failures})


if __name__ == "__main__":
    main(sys.argv[1], "dry" in sys.argv[2:])
