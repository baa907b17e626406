"""The card, its driver, and the torch that drives it."""

from __future__ import annotations

import re
import subprocess
from typing import TYPE_CHECKING

import torch

from benchmarks.gpu.child import Report

if TYPE_CHECKING:
    from dspark_lab.tuning import Card


def run(report: Report) -> None:
    card = torch.cuda.is_available()
    name = torch.cuda.get_device_name() if card else None
    driver = _driver() if card else None
    versions = {"torch": torch.__version__, "cuda": torch.version.cuda}
    report.send({"card": name, "driver": driver, **versions})


def published(device_name: str) -> Card | None:
    """The card of ``tuning.CARDS`` all words of whose name are in the device's."""
    # Here and not above: it takes seconds to import.
    from dspark_lab.tuning import CARDS

    words = set(re.findall(r"\w+", device_name))
    return next((card for card in CARDS.values() if words >= set(card.name.split())), None)


def _driver() -> str | None:
    """The driver's version, None where ``nvidia-smi`` does not tell it."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10).stdout.split()[0]
    except (OSError, IndexError, subprocess.TimeoutExpired):
        return None
