"""Every job is done once, whatever dies: in processes, and on a Ray cluster of two."""

import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dspark_lab.tuning import (
    Cell,
    SweepConfig,
    run_cell,
    run_jobs,
    run_sweep,
    run_table,
    runs_table,
)
from tests import chores

NAMES = [f"job-{number}" for number in range(6)]


def test_every_result_comes_once_with_its_key():
    jobs = {name: (number,) for number, name in enumerate(NAMES)}
    results = list(run_jobs(chores.double, jobs, processes=2))
    assert sorted(results) == [(name, 2 * number) for number, name in enumerate(NAMES)]


def test_a_worker_that_dies_loses_no_job_and_none_is_counted_twice(tmp_path):
    jobs = {name: (tmp_path, name) for name in NAMES}
    results = list(run_jobs(chores.die_once, jobs, processes=2))
    assert (tmp_path / "died").exists()
    assert sorted(results) == [(name, name) for name in NAMES]


def test_a_job_that_always_kills_its_worker_ends_with_an_error_that_names_it():
    with pytest.raises(RuntimeError, match=r"workers died 3 times without a result; left: bad"):
        list(run_jobs(chores.die, {"bad": ()}))


@pytest.mark.slow
def test_no_worker_goes_on_when_the_process_that_waits_for_it_is_killed(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    code = "import sys; from pathlib import Path; from dspark_lab.tuning import run_jobs; "
    code += "from tests import chores; list(run_jobs(chores.hold, {'a': (Path(sys.argv[1]),)}))"
    here = Path(__file__).parents[1]
    waiting = subprocess.Popen([sys.executable, "-c", code, str(pipe)], cwd=here)
    held = os.open(pipe, os.O_RDONLY)
    assert os.read(held, 4) == b"here"
    waiting.kill()
    waiting.wait()
    # The pipe ends when nobody holds it any more; the limit is that of a test that fails.
    assert select.select([held], [], [], 60)[0] and os.read(held, 1) == b""
    os.close(held)


def test_an_error_in_a_job_is_raised_as_it_is():
    with pytest.raises(ValueError, match="job is refused"):
        list(run_jobs(chores.refuse, {"a": ("job",)}))


def test_no_jobs_are_no_results():
    assert list(run_jobs(chores.double, {})) == []


def test_an_address_without_ray_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ModuleNotFoundError, match=r"needs Ray: pip install 'dspark-lab\[ray\]'"):
        list(run_jobs(chores.double, {"a": (1,)}, address="auto"))


@pytest.fixture
def cluster(monkeypatch) -> Iterator:
    """Two nodes of one CPU each, the first of which this process is part of."""
    pytest.importorskip("ray", reason="Ray is not installed")
    # Where the workers find this file.
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1]))
    import ray
    from ray.cluster_utils import Cluster

    size = {"num_cpus": 1, "object_store_memory": 80 * 2**20}
    head = size | {"include_dashboard": False}
    nodes = Cluster(initialize_head=True, connect=True, head_node_args=head)
    nodes.second = nodes.add_node(**size)
    yield nodes
    ray.shutdown()
    nodes.shutdown()


def noted_cell(
    cell: Cell, config: SweepConfig, steps: int, seconds: float, work: Path
) -> dict[str, Any]:
    """A real cell that notes when it begins; the first on each node then waits for its death."""
    import ray

    node = ray.get_runtime_context().get_node_id()
    (work / "begun").mkdir(exist_ok=True)
    (work / "begun" / f"{time.time_ns()} {cell.key}").touch()
    if (work / "doomed" / node).exists():
        (work / "doomed" / node).rename(work / "waiting" / f"{node} {cell.key} {os.getpid()}")
        while True:
            signal.pause()
    return run_cell(cell, config, steps, seconds, work)


def first_cell(work: Path, node: str, sweep: threading.Thread) -> tuple[str, int]:
    """The cell that waits on a node, and its process."""
    while sweep.is_alive():
        for path in (work / "waiting").glob(f"{node} *"):
            _, key, process = path.name.split()
            return key, int(process)
        time.sleep(0.02)
    raise AssertionError("the sweep ended before a cell began on each node")


@pytest.mark.slow
def test_a_sweep_on_two_nodes_completes_each_cell_once_though_a_worker_and_a_node_die(
    cluster, tmp_path
):
    first, second = cluster.head_node.node_id, cluster.second.node_id
    (tmp_path / "waiting").mkdir()
    (tmp_path / "doomed").mkdir()
    for node in (first, second):
        (tmp_path / "doomed" / node).touch()
    sizes: dict[str, Any] = {"num_anchors": (4, 8), "block_sizes": (2, 3), "seeds": (0,)}
    sizes |= {"slots": (2_000,), "seconds": (0.5,), "evaluations": 1, "evaluate_chats": 3}
    sizes["batch_sizes"] = (16,)
    config = SweepConfig(**sizes, prompts=3, features="live")
    tables = []

    def run() -> None:
        options: dict[str, Any] = {"address": "auto", "progress": False, "run": noted_cell}
        tables.append(run_sweep(config, tmp_path, **options))

    sweep = threading.Thread(target=run, daemon=True)
    sweep.start()
    killed, process = first_cell(tmp_path, first, sweep)
    os.kill(process, signal.SIGKILL)
    gone, _ = first_cell(tmp_path, second, sweep)
    cluster.remove_node(cluster.second, allow_graceful=False)
    sweep.join()

    cells = sorted(cell.key for cell in config.cells())
    assert sorted(path.stem for path in (tmp_path / "cells").iterdir()) == cells
    assert len(tables[0]) == len(cells)
    # The two that were in hand when their worker and their node died began again, and no other.
    names = [path.name.split()[1] for path in (tmp_path / "begun").iterdir()]
    again = sorted(name for name in set(names) if names.count(name) > 1)
    assert again == sorted({killed, gone}) and len(names) == len(cells) + 2
    assert run_table(runs_table(tmp_path)).equals(tables[0])
