"""Work on a thread of its own: its progress, its cancelling, and torch's threads meanwhile."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

# On a model of fewer parameters, threads wait for one another longer than they compute.
SMALL_MODEL = 30_000_000


class Cancelled(Exception):
    """Raised in a task that goes on after it was cancelled."""


class Progress:
    """What a task calls as it goes on: ``progress(done, total, words)``; a total of 0 is unknown.

    The words end in what is counted, such as "encoding conversation". Raises :class:`Cancelled`
    where the task was cancelled.
    """

    def __init__(self, report: Callable[[float, float, str], None] | None = None) -> None:
        self._report = report
        self.cancelled = threading.Event()

    def __call__(self, done: float, total: float, words: str) -> None:
        if self.cancelled.is_set():
            raise Cancelled
        if self._report is not None:
            self._report(done, total, words)


def count_text(done: float, total: float) -> str:
    """How far a task is, such as "3 of 10 (30 %)"; nothing of one that is not counted."""
    return f"{done:,.0f} of {total:,.0f} ({100 * done / total:.0f} %)" if total > 1 else ""


class Worker:
    """One thread at most, which does the newest task alone: starting one cancels the one before.

    A task is called with its :class:`Progress`; ``report`` is what that calls. What a task does at
    its end, such as showing a result, it does itself.
    """

    def __init__(self, report: Callable[[float, float, str], None]) -> None:
        self._report = report
        self._changed = threading.Condition()
        self._next: tuple[Callable[[Progress], None], Progress] | None = None
        self._progress = Progress()
        self._working = False
        self._error: BaseException | None = None

    @property
    def working(self) -> bool:
        """Whether a task goes on or is to begin."""
        return self._working

    def start(self, task: Callable[[Progress], None]) -> None:
        """Do a task in place of the one that goes on."""
        with self._changed:
            self._progress.cancelled.set()
            self._progress = Progress(self._report)
            self._next = task, self._progress
            if not self._working:
                self._working = True
                threading.Thread(target=self._work, name="dspark-lab", daemon=True).start()

    def cancel(self) -> None:
        """Let the task end when it next tells its progress."""
        self._progress.cancelled.set()

    def newest(self, progress: Progress) -> bool:
        """Whether no task was started after the one with this progress."""
        return progress is self._progress

    def wait(self) -> None:
        """Wait until there is no task left; raises what the last one raised."""
        with self._changed:
            while self._working:
                # A wait without an end could not be interrupted on Windows.
                self._changed.wait(0.5)
            error, self._error = self._error, None
        if error is not None:
            raise error

    def _work(self) -> None:
        while True:
            with self._changed:
                if self._next is None:
                    self._working = False
                    self._changed.notify_all()
                    return
                (task, progress), self._next = self._next, None
            try:
                task(progress)
            except BaseException as error:
                self._error = error


_threads_lock = threading.Lock()
_threads_held = [0, 0]


@contextmanager
def threads_for(model: torch.nn.Module) -> Iterator[None]:
    """One thread of torch's own while a small model works, and as many as before afterwards."""
    small = sum(one.numel() for one in model.parameters()) < SMALL_MODEL
    with _threads_lock:
        # Two explorers may work at a time: the last puts back what the first found.
        if small and not _threads_held[0]:
            _threads_held[1] = torch.get_num_threads()
        _threads_held[0] += small
        if small:
            torch.set_num_threads(1)
    try:
        yield
    finally:
        with _threads_lock:
            _threads_held[0] -= small
            if small and not _threads_held[0]:
                torch.set_num_threads(_threads_held[1])
