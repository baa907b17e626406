"""Atomic file writes, the shipped data, and a clock that waits for the device."""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

__all__ = ["DATA", "now", "shipped", "written_whole"]

_PACKAGE = Path(__file__).resolve().parent
_CHECKOUT = _PACKAGE.parent / "data"
# A checkout, and so an editable install, has its data beside the package, a wheel inside it.
DATA = _CHECKOUT if (_CHECKOUT / "SHA256SUMS").is_file() else _PACKAGE / "data"


def shipped(name: str) -> Path:
    """The path of a file or folder in ``data/``, such as ``"pocket/traces.parquet"``.

    Raises:
        FileNotFoundError: it is too large for a wheel, and this installation came from one.
    """
    path = DATA / name
    if not path.exists():
        raise FileNotFoundError(
            f"{name} does not come with the wheel; a checkout of the repository has it in data/: "
            f"install from there with `pip install -e .`, or copy it to {path}"
        )
    return path


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """A name beside ``path`` to write to, which takes its place at the end, or goes on an error."""
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def now(device: torch.device) -> float:
    """Seconds of a monotonic clock, after the queued work of a CUDA device has finished."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
