"""Jobs for workers to do. Nothing is imported that a new process would need seconds for."""

import os
import signal
from pathlib import Path


def double(number: int) -> int:
    return 2 * number


def die_once(folder: Path, name: str) -> str:
    """The first to come kills its process, and so every job that the pool has in hand."""
    try:
        (folder / "died").touch(exist_ok=False)
    except FileExistsError:
        return name
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def refuse(name: str) -> None:
    raise ValueError(f"{name} is refused")


def hold(pipe: Path) -> None:
    """Write to a pipe and hold it open until this process ends."""
    from dspark_lab.tuning import end_with_parent

    end_with_parent()
    file = pipe.open("w")
    file.write("here")
    file.flush()
    while True:
        signal.pause()
