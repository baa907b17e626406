"""Work on all cores: requests go to forked processes as bytes, and results come back in order.

Forked, a worker shares what the function holds and imports nothing again, so a script needs no
``__main__`` guard and a notebook no module. A worker ends with the process that started it, however
that ends.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection, wait
from typing import Any

import torch

# Rust's own threads do not survive a fork; each worker is one of the cores.
_PARALLELISM = "TOKENIZERS_PARALLELISM"


def usable_cores() -> int:
    """Worker processes that can be of use here, 1 where a process cannot be forked."""
    forks = "fork" in multiprocessing.get_all_start_methods()
    if not forks or multiprocessing.current_process().daemon:
        return 1
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def in_order(
    work: Callable[[bytes], bytes], requests: Iterable[bytes], workers: int
) -> Iterator[bytes]:
    """The result of each request, in their order; with one worker in this very process.

    A request is taken when a worker is free, and few results wait for an earlier one.
    """
    if workers == 1:
        yield from map(work, requests)
        return
    with _forked(work, workers) as connections:
        idle, busy = list(connections), dict[Any, int]()
        done: dict[int, bytes] = {}
        first = 0
        for number, request in enumerate(requests):
            while not idle or number - first > 8 * workers:
                _collect(busy, idle, done)
                while first in done:
                    yield done.pop(first)
                    first += 1
            connection = idle.pop()
            connection.send_bytes(request)
            busy[connection] = number
        while busy or done:
            while first in done:
                yield done.pop(first)
                first += 1
            if busy:
                _collect(busy, idle, done)


def _collect(busy: dict[Any, int], idle: list[Any], done: dict[int, bytes]) -> None:
    """Wait for a worker, and take the results that there are."""
    for connection in wait(list(busy)):
        try:
            result = connection.recv_bytes()  # type: ignore[union-attr]
        except EOFError:
            raise OSError("a worker process ended unexpectedly; the same call goes on") from None
        if result[:1] != b"+":
            raise RuntimeError(f"a worker process failed: {result[1:].decode()}")
        done[busy.pop(connection)] = result[1:]
        idle.append(connection)


@contextmanager
def _forked(work: Callable[[bytes], bytes], workers: int) -> Iterator[list[Connection]]:
    context = multiprocessing.get_context("fork")
    before = os.environ.get(_PARALLELISM)
    os.environ[_PARALLELISM] = "false"
    ours: list[Connection] = []
    processes = []
    try:
        for _ in range(workers):
            mine, theirs = context.Pipe()
            ours.append(mine)
            process = context.Process(target=_serve, args=(theirs, ours, work), daemon=True)
            with warnings.catch_warnings():
                # From 3.12 on a fork beside threads warns. A worker touches none of their locks.
                warnings.simplefilter("ignore", DeprecationWarning)
                process.start()
            processes.append(process)
            theirs.close()
        yield ours
    finally:
        for connection in ours:
            connection.close()
        for process in processes:
            process.terminate()
            process.join()
        if before is None:
            os.environ.pop(_PARALLELISM, None)
        else:
            os.environ[_PARALLELISM] = before


def _serve(
    connection: Connection, parents: list[Connection], work: Callable[[bytes], bytes]
) -> None:
    # With a copy of the parent's ends, no worker would see the parent end.
    for parent in parents:
        parent.close()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    torch.set_num_threads(1)
    gc.freeze()  # else a collection would touch, and so copy, all that is shared
    while True:
        try:
            request = connection.recv_bytes()
        except (EOFError, OSError):
            return
        try:
            result = b"+" + work(request)
        except Exception as error:
            result = b"-" + f"{type(error).__name__}: {error}".encode()
        try:
            connection.send_bytes(result)
        except OSError:
            return
