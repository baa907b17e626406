"""Many independent jobs at once: in processes of this machine, or on a Ray cluster.

Each result comes once, as soon as it is there. The job of a worker or a node that dies is done
again elsewhere.
"""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from functools import lru_cache
from multiprocessing.connection import wait
from typing import Any

from dspark_lab.checks import Count, checked

# A job that kills its process each time must not be tried for ever.
MOST_DEATHS = 3


@checked
def run_jobs(
    function: Callable[..., Any],
    jobs: Mapping[str, tuple[Any, ...]],
    *,
    processes: Count = 1,
    address: str | None = None,
) -> Iterator[tuple[str, Any]]:
    """Calls ``function(*arguments)`` for each job and yields ``(key, result)`` in order of arrival.

    A RuntimeError where workers died 3 times in a row without a result.

    Args:
        function: of a module that the workers can import.
        processes: at once, on this machine; on Ray a job asks for one CPU, and the cluster decides.
        address: of a Ray cluster, as ``ray.init`` takes it ("auto", "host:6379", "ray://..."); its
            nodes must have this package. Where a session of Ray is open already it is used.
    """
    if address is None:
        return _in_processes(function, jobs, processes)
    return _on_ray(function, jobs, address)


@lru_cache(maxsize=1)
def end_with_parent() -> None:
    """End this process when the one that started it as a worker is killed, or do nothing elsewhere.

    A job that writes files calls it, so that whoever starts anew finds nobody at work on them.
    """
    parent = multiprocessing.parent_process()
    if parent is None:
        return

    def watch(sentinel: int) -> None:
        wait([sentinel])
        os._exit(1)

    threading.Thread(target=watch, args=(parent.sentinel,), daemon=True).start()


def _in_processes(
    function: Callable[..., Any], jobs: Mapping[str, tuple[Any, ...]], processes: int
) -> Iterator[tuple[str, Any]]:
    left, deaths = dict(jobs), 0
    # A fork would inherit torch's threads, which it must not.
    context = multiprocessing.get_context("spawn")
    while left:
        pool = ProcessPoolExecutor(min(processes, len(left)), mp_context=context)
        try:
            futures = {pool.submit(function, *given): key for key, given in left.items()}
            deaths += 1
            for future in as_completed(futures):
                if isinstance(future.exception(), BrokenProcessPool):
                    continue
                result = future.result()
                del left[futures[future]]
                deaths = 0
                yield futures[future], result
        finally:
            pool.shutdown(cancel_futures=True)
        if deaths >= MOST_DEATHS:
            names = ", ".join(left)
            raise RuntimeError(f"workers died {deaths} times without a result; left: {names}")


def _on_ray(
    function: Callable[..., Any], jobs: Mapping[str, tuple[Any, ...]], address: str
) -> Iterator[tuple[str, Any]]:
    # Switch off Ray's usage statistics.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
    except ModuleNotFoundError:
        needs = f"address {address!r} needs Ray: pip install 'dspark-lab[ray]'"
        raise ModuleNotFoundError(needs) from None
    opened = not ray.is_initialized()
    if opened:
        ray.init(address=address, log_to_driver=False)
    remote = ray.remote(num_cpus=1, max_retries=-1)(function)
    waiting = {remote.remote(*given): key for key, given in jobs.items()}
    try:
        while waiting:
            (done,), _ = ray.wait(list(waiting), num_returns=1)
            yield waiting.pop(done), ray.get(done)
    finally:
        for reference in waiting:
            ray.cancel(reference, force=True)
        if opened:
            ray.shutdown()
