"""Atomic writes of files and folders, JSON, the shipped data, and a device's clock and door."""

import json
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

_PACKAGE = Path(__file__).resolve().parent
_CHECKOUT = _PACKAGE.parent / "data"
# A checkout, and so an editable install, has its data beside the package, a wheel inside it.
DATA = _CHECKOUT if (_CHECKOUT / "SHA256SUMS").is_file() else _PACKAGE / "data"


def shipped(name: str) -> Path:
    """The path of a file or folder in ``data/``; those too large for a wheel need a checkout."""
    path = DATA / name
    if not path.exists():
        raise FileNotFoundError(
            f"{name} does not come with the wheel; a checkout of the repository has it in data/: "
            f"install from there with `pip install -e .`, or copy it to {path}"
        )
    return path


def require_found(path: str | os.PathLike[str]) -> None:
    """Refuse the path of a file or folder that is not there, with the folder that was searched."""
    found = Path(path).expanduser()
    if not found.exists():
        raise FileNotFoundError(f"{found.name} must be in {found.absolute().parent}, but is not")


def not_in_folder(path: Path, what: str) -> FileNotFoundError:
    """The error for a folder with ``what`` in it that is not there."""
    place = path.expanduser().absolute()
    return FileNotFoundError(f"there is no folder {place.name} with {what} in {place.parent}")


def files_of(path: Path) -> list[Path]:
    """A file, or all files of a folder, in order."""
    return sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """A file beside ``path`` to write, which replaces it at the end and is removed on error."""
    partial = _partial(path)
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def replaced_whole(folder: Path) -> Iterator[Path]:
    """An empty folder beside ``folder`` to fill, which takes its place at the end.

    On an error the old folder stays. A process that is killed leaves the old or the new folder
    complete, in the moment of replacement under the name ``previous_version(folder)``.
    """
    partial, previous = _partial(folder), previous_version(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    if previous.is_dir() and not folder.exists():
        previous.rename(folder)
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir()
        yield partial
        # The contents reach the disk before the name does.
        for path in (*partial.rglob("*"), partial):
            sync(path)
        shutil.rmtree(previous, ignore_errors=True)
        if folder.exists():
            folder.rename(previous)
        try:
            partial.rename(folder)
        except BaseException:
            if previous.exists():
                previous.rename(folder)
            raise
        shutil.rmtree(previous, ignore_errors=True)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def previous_version(folder: Path) -> Path:
    """Where the old folder is while :func:`replaced_whole` puts the new one in its place."""
    return folder.with_name(f".{folder.name}.previous")


def remove_partial(parent: Path) -> None:
    """Remove the partial files and folders that killed processes left in ``parent``."""
    for path in parent.glob(".*.partial-*"):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def read_json(path: Path, kind: type = dict) -> Any:
    """The contents of a JSON file; a ValueError if they cannot be read or are not of ``kind``."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} must be a JSON file, but is not: {error}") from None
    if not isinstance(values, kind):
        wanted = "object" if kind is dict else "array" if kind is list else kind.__name__
        raise ValueError(f"{path} must hold a JSON {wanted}, got {type(values).__name__}")
    return values


def write_json(path: Path, values: Any, indent: int = 2) -> None:
    """Write ``values`` as JSON to ``path``, whole or not at all."""
    with written_whole(path) as partial:
        partial.write_text(json.dumps(values, indent=indent) + "\n", encoding="utf-8")


def read_csv(path: str | os.PathLike[str], columns: Sequence[str], **options: Any) -> Any:
    """The table of a CSV file; a ValueError if it cannot be read or lacks one of ``columns``."""
    import pandas as pd

    try:
        table = pd.read_csv(path, **options)
        if missing := [name for name in columns if name not in table]:
            raise ValueError(f"it has no {', '.join(missing)}")
    except ValueError as error:  # those of pandas are among them
        wanted = f"a CSV file with the columns {', '.join(columns)}"
        raise ValueError(f"{os.fspath(path)} must be {wanted}: {error}") from error
    return table


def now(device: torch.device) -> float:
    """Seconds of a monotonic clock, after the queued work of a CUDA device has finished."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def upload(tensor: torch.Tensor, device: torch.device | str) -> torch.Tensor:
    """A tensor on a device; where that is CUDA, the host does not wait for its own to arrive."""
    device = torch.device(device)
    if device.type != "cuda" or tensor.device.type != "cpu":
        return tensor.to(device)
    # Pinning keeps the strides, and cannot copy into a tensor that was expanded.
    return tensor.contiguous().pin_memory().to(device, non_blocking=True)


def sync(path: Path) -> None:
    """Wait until a file or folder is on the disk."""
    with suppress(PermissionError):  # Windows opens no folders
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _partial(path: Path) -> Path:
    return path.with_name(f".{path.name}.partial-{os.getpid()}")
