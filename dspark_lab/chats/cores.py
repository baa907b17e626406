"""Work on all cores: requests go to forked processes, and results come back in order.

Forked, a worker shares what the function holds and imports nothing again, so a script needs no
``__main__`` guard and a notebook no module. A worker ends with the process that started it, however
that ends.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import threading
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import Any, TypeVar

import torch

Request = TypeVar("Request")
Work = Callable[[Any], bytes]

# Rust's own threads do not survive a fork; each worker is one of the cores.
_PARALLELISM = "TOKENIZERS_PARALLELISM"


def usable_cores() -> int:
    """Worker processes that can be of use here, 1 where a process cannot be forked."""
    forks = "fork" in multiprocessing.get_all_start_methods()
    if not forks or multiprocessing.current_process().daemon:
        return 1
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def in_order(
    work: Work, requests: Iterable[Request], workers: int
) -> Iterator[tuple[Request, bytes]]:
    """Each request with its result, in their order; with one worker in this very process.

    Few requests are taken ahead of the result that is waited for.
    """
    if workers == 1:
        yield from ((request, work(request)) for request in requests)
        return
    ahead: deque[tuple[Request, Future[bytes]]] = deque()
    with _pool(work, workers) as pool:
        try:
            for request in requests:
                with warnings.catch_warnings():
                    # A fork beside threads warns; a worker touches none of their locks.
                    warnings.simplefilter("ignore", DeprecationWarning)
                    ahead.append((request, pool.submit(_answer, request)))
                if len(ahead) > 3 * workers:
                    first, result = ahead.popleft()
                    yield first, result.result()
            while ahead:
                first, result = ahead.popleft()
                yield first, result.result()
        except BrokenProcessPool:
            message = "a worker process ended unexpectedly; the same call goes on"
            raise OSError(message) from None


@contextmanager
def _pool(work: Work, workers: int) -> Iterator[ProcessPoolExecutor]:
    before = os.environ.get(_PARALLELISM)
    os.environ[_PARALLELISM] = "false"
    context = multiprocessing.get_context("fork")
    pool = ProcessPoolExecutor(workers, context, _begin, (work,))
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)
        if before is None:
            os.environ.pop(_PARALLELISM, None)
        else:
            os.environ[_PARALLELISM] = before


# What a worker process was forked for.
_work: list[Work] = []


def _begin(work: Work) -> None:
    _work[:] = [work]
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    gc.freeze()  # else a collection would touch, and so copy, all that is shared
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _answer(request: Any) -> bytes:
    return _work[0](request)
