"""Training runs that end badly, in processes of their own, and what a step's gradient must be.

The processes are forked from a server that has imported everything once, which saves seconds each.
"""

import gc
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
from transformers import LlamaConfig, LlamaForCausalLM

from data.make.pocket import train_tokenizer
from dspark_lab.blocks import Blocks, draw_blocks
from dspark_lab.chats import Batch, Encoded, load_chats
from dspark_lab.common import DSparkForwardOutput
from dspark_lab.model import Drafter, FeatureSource, Target
from dspark_lab.training import BatchOrder, History, TrainConfig, checkpoints, loop, state, train
from dspark_lab.training.processes import whole
from tests.samples import CHAT, random_chats, tiny_drafter, tiny_target

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


def double_pair(**shape: Any) -> tuple[Target, Drafter]:
    """A target and a drafter in float64, with no weight at zero that would hide a gradient."""
    target, drafter = tiny_target(), tiny_drafter(1, **shape)
    target.model.double(), drafter.double()
    torch.nn.init.normal_(drafter.markov_head.markov_w2.weight, std=0.3)
    torch.nn.init.normal_(drafter.confidence_head.proj.weight, std=0.3)
    drafter.use_target_embeddings(target.embed_weight, target.head_weight)
    return target, drafter


def uneven_chats(count: int) -> list[Encoded]:
    """Conversations of very different length; half of them have no answer."""
    chats = random_chats(count, low=8, high=40)
    silent = [Encoded(c.input_ids, torch.zeros_like(c.loss_mask), CHAT) for c in chats[::2]]
    return [*silent, *chats[1::2]]


def target_on_disk(folder: Path) -> tuple[Path, Path]:
    """A tiny target with a tokenizer of little more than bytes, and conversations, as files."""
    target, data = folder / "target", folder / "chats.jsonl"
    words = ("yes", "no", "green", "hello", "one", "two")
    lines = [{"prompt": f"Say {word}.", "response": f"{word} " * 6} for word in words]
    data.write_text("\n".join(map(json.dumps, lines)))
    train_tokenizer(load_chats(data), 300).save_pretrained(target)
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=300, num_hidden_layers=3, **shape)
    LlamaForCausalLM(config).save_pretrained(target)
    return target, data


def joined_output(
    drafter: Drafter, target: Target, parts: list[tuple[Batch, Blocks]]
) -> DSparkForwardOutput:
    """The training forward of several batches as the rows of one."""
    length = max(batch.input_ids.shape[1] for batch, _ in parts)
    docs = max(batch.seq_lens.shape[1] for batch, _ in parts)
    anchors = max(blocks.num_anchors for _, blocks in parts)

    def rows(name: str, size: int) -> Tensor:
        of_parts = [getattr(batch, name) for batch, _ in parts]
        return torch.cat([F.pad(x, (0, size - x.shape[1])) for x in of_parts])

    def drawn(name: str) -> Tensor:
        of_parts = [getattr(blocks, name) for _, blocks in parts]
        return torch.cat([F.pad(x, (0, anchors - x.shape[1])) for x in of_parts])

    packed = {name: rows(name, length) for name in ("position_ids", "doc_remaining")}
    packed["seq_lens"] = rows("seq_lens", docs)
    given = target.features(
        rows("input_ids", length),
        drafter.config.target_layer_ids,
        position_ids=packed["position_ids"],
        seq_lens=packed["seq_lens"],
    )
    return drafter(
        rows("input_ids", length),
        given.context,
        rows("loss_mask", length),
        given.last,
        anchor_positions=drawn("anchor_positions"),
        block_keep_mask=drawn("block_keep_mask"),
        backend="dense",
        **packed,
    )


def parts_of_step(
    tokens: list[Encoded], config: TrainConfig, drafter: Drafter, step: int, processes: int = 1
) -> list[tuple[Batch, Blocks]]:
    """Every micro-batch of a step, process after process, with its blocks."""
    parts = []
    for rank in range(processes):
        order = BatchOrder(tokens, config, rank=rank, processes=processes)
        for batch, seed in order.micro_batches(step):
            sizes = config.num_anchors, drafter.config.block_size
            per = config.anchors_per
            blocks = draw_blocks(batch, *sizes, mask_token_id=63, seed=seed, per=per)
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
    settings: dict[str, Any] = {"drafter": tiny_drafter(4), "target": tiny_target()}
    settings |= {"chats": random_chats(11), "held_out": random_chats(3, seed=9), "progress": False}
    return train(config=config, out=out, **(settings | options))


def interrupt_at(step: int) -> Callable[[dict[str, Any]], None]:
    """Presses Ctrl-C when the step before has just been reported."""

    def press(row: dict[str, Any]) -> None:
        if row["step"] == step - 1 and "loss" in row:
            signal.raise_signal(signal.SIGINT)

    return press


def losses(out: Path, config: TrainConfig = CONFIG, **options: Any) -> list[float]:
    """Those of all steps of :func:`small_run`."""
    return small_run(out, config, **options).table()["loss"].tolist()


def ending(out: Path) -> tuple[bytes, bytes, list[dict[str, Any]]]:
    """Every byte of the last checkpoint's tensors, and the metrics but for the time taken."""
    last = checkpoints(out)[-1]
    lines = [json.loads(line) for line in (out / state.METRICS).read_bytes().splitlines()]
    for line in lines:
        line.pop("seconds", None)
    files = ("model.safetensors", "optimizer.safetensors")
    weights, optimizer = ((last / name).read_bytes() for name in files)
    return weights, optimizer, lines


def count_lines(out: Path) -> int:
    """Lines of the metrics so far."""
    metrics = out / state.METRICS
    return metrics.read_bytes().count(b"\n") if metrics.exists() else 0


def kill(*_: Any) -> None:
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


def on_batch(number: int, instead: Callable[[FeatureSource, Batch], Any]) -> Callable:
    """``live_features``, but for the batch of that number ``instead(source, batch)``."""
    live = loop.live_features

    def features(*given: Any) -> FeatureSource:
        source = live(*given)
        return on_call(number, source, lambda batch: instead(source, batch))

    return features


def _kill_after(function: Callable) -> Callable:
    return lambda *given: (function(*given), kill())


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


def _deadly_patches() -> dict[str, tuple[Any, str, Any]]:
    """For each moment of the second save, or of the step before it, what to patch with what."""

    def in_state(name: str, number: int, instead: Callable) -> tuple[Any, str, Any]:
        return state, name, on_call(number, getattr(state, name), instead)

    rmtree = on_call(1, shutil.rmtree, _half_a_folder)
    return {
        "in a step": (loop, "live_features", on_batch(4, kill)),
        "in a line of the metrics": in_state("append_metrics", 4, _half_a_line),
        "between metrics and checkpoint": in_state("save_checkpoint", 2, kill),
        "after the drafter's file": in_state("save_drafter", 2, _kill_after(state.save_drafter)),
        "in the optimiser's file": in_state("save_file", 2, _half_a_file),
        "before the rename": (Path, "rename", _on_second_checkpoint(kill)),
        "after the rename": (Path, "rename", _on_second_checkpoint(_kill_after(Path.rename))),
        "as an old checkpoint goes": (state, "shutil", SimpleNamespace(rmtree=rmtree)),
    }


MOMENTS = tuple(_deadly_patches())


def killed_run(rank: int, out: Path, moment: str) -> None:
    """``small_run``, killed at a moment of its second save or in the step before it."""
    setattr(*_deadly_patches()[moment])
    small_run(out)


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
    # A collection of what the server imported would take most of a small run's time.
    gc.freeze()
    torch.set_num_threads(1)
    # tqdm's own lock is one between processes, which a killed process would leave behind.
    tqdm.set_lock(threading.RLock())
