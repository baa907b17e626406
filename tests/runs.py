"""Training runs that end badly, in processes of their own, and what a step's gradient must be.

The processes are forked from a server that has imported everything once, which saves seconds each.
"""

import json
import os
import pickle
import shutil
import signal
import threading
import time
import traceback
from collections.abc import Callable
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from dspark_lab.blocks import Blocks, draw_blocks
from dspark_lab.chats import Batch, Encoded
from dspark_lab.model import Drafter, Objective, Target, output_objective
from dspark_lab.training import BatchOrder, History, TrainConfig, checkpoints, loop, state, train
from dspark_lab.training.processes import whole
from tests.samples import random_chats, tiny_drafter, tiny_target

_PROCESSES = get_context("forkserver")
_PROCESSES.set_forkserver_preload(["tests.runs", "torch.distributed.fsdp"])


def in_processes(count: int, function: Callable[..., Any], *given: Any, folder: Path) -> list[Any]:
    """What ``function(rank, *given)`` returns in each process; its exit code where it died."""
    store = folder / "processes"
    store.unlink(missing_ok=True)
    started = []
    for rank in range(count):
        ours, theirs = _PROCESSES.Pipe(duplex=False)
        process = _PROCESSES.Process(
            target=_child, args=(rank, count, str(store), theirs, function, given), daemon=True
        )
        process.start()
        theirs.close()
        started.append((process, ours))
    results = []
    for process, ours in started:
        try:
            kind, value = pickle.loads(ours.recv_bytes())
        except EOFError:
            process.join()
            kind, value = "died", process.exitcode
        process.kill()
        assert kind in ("returned", "died"), value
        results.append(value)
    return results


def _child(
    rank: int, count: int, store: str, pipe: Connection, function: Callable, given: tuple
) -> None:
    _settle_in()
    try:
        if count > 1:
            os.environ["GLOO_SOCKET_IFNAME"] = "lo"
            torch.distributed.init_process_group(
                "gloo", init_method=f"file://{store}", rank=rank, world_size=count
            )
        result = ("returned", function(rank, *given))
    except BaseException:
        result = ("raised", traceback.format_exc())
    # Not send(), which hands tensors over as memory of this process, which ends here.
    pipe.send_bytes(pickle.dumps(result))


def joined_objective(
    drafter: Drafter, target: Target, parts: list[tuple[Batch, Blocks]], **options: Any
) -> Objective:
    """The objective by its definition, of several batches as the rows of one."""
    length = max(batch.input_ids.shape[1] for batch, _ in parts)
    docs = max(batch.seq_lens.shape[1] for batch, _ in parts)

    def rows(name: str, size: int) -> Tensor:
        of_parts = [getattr(batch, name) for batch, _ in parts]
        return torch.cat([F.pad(x, (0, size - x.shape[1])) for x in of_parts])

    packed = {name: rows(name, length) for name in ("position_ids", "doc_remaining")}
    packed["seq_lens"] = rows("seq_lens", docs)
    given = target.features(
        rows("input_ids", length),
        drafter.config.target_layer_ids,
        position_ids=packed["position_ids"],
        seq_lens=packed["seq_lens"],
    )
    output = drafter(
        rows("input_ids", length),
        given.context,
        rows("loss_mask", length),
        given.last,
        anchor_positions=torch.cat([blocks.anchor_positions for _, blocks in parts]),
        block_keep_mask=torch.cat([blocks.block_keep_mask for _, blocks in parts]),
        backend="dense",
        **packed,
    )
    return output_objective(output, **options)


def parts_of_step(
    tokens: list[Encoded], config: TrainConfig, drafter: Drafter, step: int, processes: int = 1
) -> list[tuple[Batch, Blocks]]:
    """Every micro-batch of a step, process after process, with its blocks."""
    parts = []
    for rank in range(processes):
        order = BatchOrder(tokens, config, rank=rank, processes=processes)
        for batch, seed in order.micro_batches(step):
            blocks = draw_blocks(
                batch, config.num_anchors, drafter.config.block_size, mask_token_id=63, seed=seed
            )
            parts.append((batch, blocks))
    return parts


def gradients(drafter: Drafter) -> dict[str, Tensor]:
    """By name, of what has one; shards are put together."""
    return {n: whole(p.grad) for n, p in drafter.named_parameters() if p.grad is not None}


STEPS = 7
CONFIG = TrainConfig(
    steps=STEPS,
    batch_size=2,
    num_anchors=4,
    learning_rate=1e-2,
    warmup_steps=2,
    weight_decay=0.1,
    checkpoint_every=2,
    keep_checkpoints=1,
    evaluate_every=2,
    evaluate_anchors=4,
)


def small_run(out: Path, config: TrainConfig = CONFIG, **options: Any) -> History:
    """A run that takes a moment, the same whenever and wherever it is called."""
    torch.manual_seed(3)
    chats, others = random_chats(11), random_chats(3, seed=9)
    held_out = options.pop("held_out", others)
    drafter = options.pop("drafter", None) or tiny_drafter(4)
    settings: dict[str, Any] = {"held_out": held_out, "progress": False} | options
    return train(drafter, tiny_target(), chats, config, out=out, **settings)


def ending(out: Path) -> tuple[bytes, bytes, list[dict[str, Any]]]:
    """Every byte of the last checkpoint's tensors, and the metrics but for the time taken."""
    last = checkpoints(out)[-1]
    lines = [json.loads(line) for line in (out / state.METRICS).read_bytes().splitlines()]
    for line in lines:
        line.pop("seconds", None)
    files = ("model.safetensors", "optimizer.safetensors")
    weights, optimizer = ((last / name).read_bytes() for name in files)
    return weights, optimizer, lines


def kill() -> None:
    """As the kernel does it to a process that takes too much memory: nothing is cleaned up."""
    os.kill(os.getpid(), signal.SIGKILL)


def on_call(number: int, function: Callable, instead: Callable) -> Callable:
    """``function``, but its call of that number, counted from 1, goes to ``instead``."""
    calls = 0

    def counted(*given: Any, **named: Any) -> Any:
        nonlocal calls
        calls += 1
        return (instead if calls == number else function)(*given, **named)

    return counted


def kill_after(function: Callable) -> Callable:
    def killed(*given: Any, **named: Any) -> None:
        function(*given, **named)
        kill()

    return killed


def _half_a_file(tensors: dict[str, Tensor], path: Path) -> None:
    path.write_bytes(b"\x40\0\0\0\0\0\0\0{")
    kill()


def _half_a_line(out: Path, row: dict[str, Any]) -> None:
    with (out / state.METRICS).open("a") as file:
        file.write(json.dumps(row)[:40])
    kill()


def _half_a_folder(folder: Path) -> None:
    (folder / "config.json").unlink()
    kill()


def _on_second_checkpoint(instead: Callable) -> Callable:
    """``Path.rename``, but ``instead`` where the second checkpoint gets its name."""
    rename = Path.rename
    second = on_call(2, rename, instead)

    def renamed(path: Path, to: Path) -> Path:
        final = to.name.removeprefix(state.CHECKPOINT).isdigit()
        return (second if final else rename)(path, to)

    return renamed


def killed_run(rank: int, out: Path, moment: str) -> None:
    """``small_run``, killed at a moment of its second save or in the step before it."""
    patched: Any = Path
    if moment == "in a step":
        source = loop.live_features

        def deadly(target: Target, ids: Any) -> Any:
            return on_call(4, source(target, ids), lambda batch: kill())

        loop.live_features = deadly
    elif moment == "in a line of the metrics":
        state.append_metrics = on_call(4, state.append_metrics, _half_a_line)
    elif moment == "between metrics and checkpoint":
        state.save_checkpoint = on_call(2, state.save_checkpoint, lambda *given: kill())
    elif moment == "after the drafter's file":
        state.save_drafter = on_call(2, state.save_drafter, kill_after(state.save_drafter))
    elif moment == "in the optimiser's file":
        state.save_file = on_call(2, state.save_file, _half_a_file)
    elif moment == "before the rename":
        patched.rename = _on_second_checkpoint(lambda path, to: kill())
    elif moment == "after the rename":
        patched.rename = _on_second_checkpoint(kill_after(Path.rename))
    elif moment == "as an old checkpoint goes":
        patched_shutil: Any = SimpleNamespace(rmtree=on_call(1, shutil.rmtree, _half_a_folder))
        state.shutil = patched_shutil
    small_run(out)


MOMENTS = (
    "in a step",
    "in a line of the metrics",
    "between metrics and checkpoint",
    "after the drafter's file",
    "in the optimiser's file",
    "before the rename",
    "after the rename",
    "as an old checkpoint goes",
)


def kill_when(step: int, out: Path, delay: float) -> int:
    """``small_run`` in a process that is killed ``delay`` seconds after it reported ``step``.

    It cannot end before: after its last step but one it waits for a word that never comes. Returns
    the exit code.
    """
    ours, theirs = _PROCESSES.Pipe()
    process = _PROCESSES.Process(target=_reporting_run, args=(out, theirs), daemon=True)
    process.start()
    theirs.close()
    while ours.recv() < step:
        pass
    time.sleep(delay)
    process.kill()
    process.join()
    assert process.exitcode is not None
    return process.exitcode


def _reporting_run(out: Path, pipe: Connection) -> None:
    _settle_in()

    def report(row: dict[str, Any]) -> None:
        pipe.send(row["step"])
        if row["step"] == STEPS - 1:
            pipe.recv()

    small_run(out, on_metrics=report)


def _settle_in() -> None:
    torch.set_num_threads(1)
    # tqdm's own lock is one between processes, which a killed process would leave behind.
    tqdm.set_lock(threading.RLock())
