"""Two processes over gloo, on this machine's loopback: what they do together is what one would."""

import os
import signal
import subprocess
import sys
import time
import warnings
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from dspark_lab.model import load_drafter, load_target, output_objective
from dspark_lab.training import Processes, Run, TrainConfig, checkpoints, loop, train
from dspark_lab.training.processes import whole
from tests import runs
from tests.runs import CONFIG, ending, in_processes, small_run
from tests.samples import random_chats, tiny_drafter, tiny_target

PARALLEL = ("ddp", "fsdp2")
GRADIENT = TrainConfig(4, batch_size=1, accumulate=2, num_anchors=5, ce_only_fraction=0.5)
TOGETHER = replace(CONFIG, steps=4, checkpoint_every=2, evaluate_every=4)

pytestmark = pytest.mark.usefixtures("one_thread")


def gradients_of_steps(rank: int, out: Path, parallel: Any, compile: bool) -> list[tuple[Any, ...]]:
    """Of four steps, with the same weights: gradients, and what this process had of them."""
    torch.compile = partial(torch.compile, backend="eager")
    warnings.filterwarnings("error", "torch.compile does not work here")
    target, drafter = runs.double_pair()
    if parallel == "fsdp2" and rank == 1:
        # The main process's weights are those that count.
        for p in drafter.parameters():
            if p.requires_grad:
                torch.nn.init.zeros_(p)
    run = Run(drafter, GRADIENT, runs.uneven_chats(16), out, Processes(parallel), compile=compile)
    found = []
    for step in range(4):
        run.step = step
        loss, stacked, _ = run.backward(loop.live_features(target, (0, 1)))
        found.append((runs.gradients(drafter), loss, stacked))
        run.optimizer.zero_grad()
    return found


@pytest.mark.parametrize("compile", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("parallel", PARALLEL)
def test_gradient_of_two_processes_is_that_of_the_joined_batch(
    parallel: str, compile: bool, tmp_path: Path
) -> None:
    given = tmp_path, parallel, compile
    of_ranks = in_processes(2, gradients_of_steps, *given, folder=tmp_path)
    target, drafter = runs.double_pair()
    slots = set()
    for step in range(4):
        parts = runs.parts_of_step(runs.uneven_chats(16), GRADIENT, drafter, step, processes=2)
        terms = GRADIENT.term_weights_at(step)
        joined = output_objective(runs.joined_output(drafter, target, parts), **terms)
        drafter.zero_grad()
        joined.loss.backward()
        expected = runs.gradients(drafter)
        for of_steps in of_ranks:
            gradients = of_steps[step][0]
            assert set(gradients) == set(expected)
            for name, gradient in gradients.items():
                torch.testing.assert_close(gradient, expected[name], rtol=1e-9, atol=1e-12)
        loss = sum(of_steps[step][1] for of_steps in of_ranks)
        torch.testing.assert_close(loss, joined.loss.detach(), rtol=1e-9, atol=1e-12)
        slots.add(tuple(int(of_steps[step][2][0].sum()) for of_steps in of_ranks))
    # Unequal numbers of supervised slots, none at all in one process among them.
    assert any(a != b and a and b for a, b in slots)
    assert any((a == 0) != (b == 0) for a, b in slots)


def trained(rank: int, out: Path, parallel: Any, config: TrainConfig) -> dict[str, Any]:
    """A run of two processes: its rows, and the weights that this one has at the end."""
    drafter = tiny_drafter(4 if rank == 0 else 5)
    history = small_run(out, config, drafter=drafter, parallel=parallel)
    weights = {n: whole(p.detach()) for n, p in drafter.named_parameters() if p.requires_grad}
    return {"rows": history.rows, "weights": weights}


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, list[Any]]]:
    """For "ddp" and "fsdp2" the folder of a run of two processes, and what each returned."""
    found = {}
    for parallel in PARALLEL:
        folder = tmp_path_factory.mktemp(parallel)
        results = in_processes(2, trained, folder / "run", parallel, TOGETHER, folder=folder)
        found[parallel] = (folder / "run", results)
    return found


@pytest.mark.parametrize("parallel", PARALLEL)
def test_a_run_of_two_processes_is_that_of_one_which_accumulates(
    parallel: str, together: dict[str, Any], tmp_path: Path
) -> None:
    out, results = together[parallel]
    drafter = tiny_drafter(4)
    alone = small_run(tmp_path, replace(TOGETHER, accumulate=2), drafter=drafter)
    for result in results:
        for name, weight in result["weights"].items():
            torch.testing.assert_close(
                weight, drafter.get_parameter(name).detach(), rtol=1e-3, atol=2e-4
            )
        assert len(result["rows"]) == len(alone.rows)
        for row, expected in zip(result["rows"], alone.rows, strict=True):
            assert list(row) == list(expected)
            for name in set(row) - {"seconds"}:
                assert row[name] == pytest.approx(expected[name], rel=2e-3, abs=1e-4), name
    # One line for each, though two processes were at work; and weights that are the same bits.
    assert len(ending(out)[2]) == len(alone.rows) == 5
    for name, weight in results[0]["weights"].items():
        assert torch.equal(weight, results[1]["weights"][name]), name


@pytest.mark.parametrize("parallel", PARALLEL)
def test_the_checkpoint_of_two_processes_is_a_whole_drafter(
    parallel: str, together: dict[str, Any]
) -> None:
    out, results = together[parallel]
    [checkpoint] = checkpoints(out)
    assert checkpoint.name == "checkpoint-000004"
    stored = load_drafter(checkpoint, target=tiny_target())
    for name, weight in results[0]["weights"].items():
        assert torch.equal(stored.get_parameter(name), weight), name


def trained_in_float64(rank: int, out: Path) -> None:
    target, drafter = runs.double_pair()
    config = TrainConfig(1, batch_size=1, num_anchors=4)
    train(drafter, target, random_chats(4), config, out=out, parallel="fsdp2", progress=False)


def test_shards_of_float64_are_stored_as_float64(tmp_path: Path) -> None:
    in_processes(2, trained_in_float64, tmp_path / "run", folder=tmp_path)
    [checkpoint] = checkpoints(tmp_path / "run")
    stored = load_file(checkpoint / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.float64}


def killed_together(rank: int, out: Path, parallel: Any) -> None:
    """Both processes die at once in the third step, after a checkpoint at the second."""
    loop.live_features = runs.on_batch(3, runs.kill)
    trained(rank, out, parallel, TOGETHER)


@pytest.mark.parametrize("parallel", PARALLEL)
def test_two_killed_processes_end_with_the_bits_of_two_that_were_not(
    parallel: str, together: dict[str, Any], tmp_path: Path
) -> None:
    out = tmp_path / "run"
    died = in_processes(2, killed_together, out, parallel, folder=tmp_path)
    assert -signal.SIGKILL in died
    assert [path.name for path in checkpoints(out)] == ["checkpoint-000002"]
    in_processes(2, trained, out, parallel, TOGETHER, folder=tmp_path)
    assert ending(out) == ending(together[parallel][0])


def test_another_number_of_processes_is_refused(together: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="processes must be as in the run .*, 2, got 1"):
        small_run(together["ddp"][0], TOGETHER)


def interrupted_in_one(rank: int, out: Path) -> tuple[bool, int]:
    def press(source: Any, batch: Any) -> Any:
        signal.raise_signal(signal.SIGINT)
        return source(batch)

    if rank == 1:
        loop.live_features = runs.on_batch(3, press)
    config = replace(TOGETHER, steps=9, evaluate_every=9)
    history = small_run(out, config, parallel="ddp", held_out=())
    return history.interrupted, history.rows[-1]["step"]


def test_an_interrupt_of_one_process_stops_all_after_the_same_step(tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert in_processes(2, interrupted_in_one, out, folder=tmp_path) == [(True, 3), (True, 3)]
    assert checkpoints(out)[-1].name == "checkpoint-000003"


@pytest.mark.slow
@pytest.mark.parametrize("parallel", PARALLEL)
def test_torchrun_trains_stops_and_goes_on(parallel: str, tmp_path: Path) -> None:
    target, data = runs.target_on_disk(tmp_path)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command += ["--standalone", "--local-addr", "127.0.0.1"]
    command += ["-m", "dspark_lab.training", "--parallel", parallel, "--device", "cpu"]
    command += ["--target", str(target), "--data", str(data), "--out", str(tmp_path / "run")]
    # More steps than any machine takes before it is interrupted.
    command += "--steps 1000000000 --batch-size 2 --num-anchors 2".split()
    command += "--layers 1 --markov-rank 4".split()
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    out, said = tmp_path / "run", tmp_path / "said"
    reached = [0]
    for _ in range(2):
        with said.open("w") as file:
            process = subprocess.Popen(command, env=environment, stderr=file)
        while process.poll() is None and runs.count_lines(out) <= reached[-1] + 3:
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        process.wait()
        assert "the same command goes on" in said.read_text(), said.read_text()[-3000:]
        last = checkpoints(out)[-1]
        reached.append(runs.count_lines(out))
        assert int(last.name.removeprefix("checkpoint-")) == reached[-1]
        load_drafter(last, target=load_target(target, local_files_only=True))
    assert reached[2] > reached[1] > 3
