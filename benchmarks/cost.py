"""Predicted against measured: the peak memory of a training step, and how long one takes.

The peak is that of the second step of ``dspark_lab.training`` with weights and optimiser added; the
target's features are zeros unless its shape is given and features are live. Time is fitted to four
steps and predicted for others.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.measure import median_seconds, peak_bytes
from dspark_lab.chats import Batch, Chat, Encoded
from dspark_lab.model import (
    Drafter,
    Features,
    FeatureSource,
    Target,
    live_features,
    output_objective,
)
from dspark_lab.training import Processes, Run, TrainConfig
from dspark_lab.tuning import (
    CARDS,
    TARGETS,
    Shape,
    fit_step_time,
    fit_table,
    measure_steps,
    training_cost,
    training_memory,
)

NOBODY = Chat(({"role": "assistant", "content": ""},), id="random")
# Row length, anchors, block, rows, of SmolLM2's drafter.
SHAPES = [(384, 32, 7, 2), (384, 8, 7, 2), (512, 64, 7, 1)]
SHAPES += [(1024, 16, 7, 1), (256, 16, 15, 2), (512, 32, 4, 1)]


def training_run(
    shape: Shape,
    *,
    seq_len: int,
    num_anchors: int,
    block_size: int,
    batch_size: int = 1,
    dtype: Any = "fp32",
    device: str = "cpu",
    seen: int | None = None,
    target: Target | None = None,
    **options: Any,
) -> Run:
    """A run with random weights, made on the device, on rows whose every token is supervised."""
    torch.manual_seed(0)
    with torch.device(device):
        drafter = Drafter(replace(shape, block_size=block_size).drafter_config()).train()
    if target is not None:
        heads = target.embed_weight, target.head_weight, target.logit_rule
        drafter.use_target_embeddings(*heads)
    words = torch.arange(seq_len).remainder(seen or shape.vocab_size)
    everything = torch.ones(seq_len, dtype=torch.bool)
    rows = [Encoded(words, everything, NOBODY) for _ in range(batch_size)]
    config = TrainConfig(
        steps=1000,
        batch_size=batch_size,
        num_anchors=num_anchors,
        max_length=seq_len,
        precision=dtype,
        vocabulary="full" if seen is None else "seen",
    )
    return Run(drafter, config, rows, Path("nowhere"), Processes(), **options)


def held_bytes(run: Run, target: Target | None = None) -> int:
    """Bytes that a run holds between its steps, optimiser and target included."""
    held = list(run.drafter.parameters()) + list(run.forward.__dict__.values())
    held += [x for state in run.optimizer.state.values() for x in state.values()]
    return _bytes(held + ([] if target is None else list(target.model.parameters())))


def measured_peak(
    shape: Shape,
    *,
    target_dtype: str = "bf16",
    device: str = "cpu",
    full: bool = False,
    **sizes: Any,
) -> tuple[int, int]:
    """Bytes that are held throughout, and the most that a training step holds beside them.

    ``sizes`` as in :func:`training_run`, the softmaxes over the first ``seen`` tokens. The target's
    features are computed where the shape knows it, and else zeros in bf16. ``full``: the objective
    by its definition.
    """
    target = _target(shape, target_dtype, device) if shape.target is not None else None
    run = training_run(shape, device=device, target=target, **sizes)
    source = _zeros(shape) if target is None else live_features(target, _ids(shape))

    def step() -> None:
        run.advance(source)

    by_definition = mock.patch("dspark_lab.training.loop.dspark_objective", _textbook(run.drafter))
    with by_definition if full else nullcontext():
        step()
        return held_bytes(run, target), peak_bytes(step, device)


def run() -> Iterator[str]:
    yield from _memory()
    yield from _redraw()
    yield from _times()


def _memory() -> Iterator[str]:
    """SmolLM2's shapes with random weights, features on disk."""
    shape = replace(TARGETS["smollm2"], target=None)
    yield f"{'S':>5} {'N':>4} {'K':>3} {'B':>2} {'':>5} {'predicted':>10} {'measured':>9} MB  ratio"
    worst = 0.0
    for seq_len, anchors, block, batch in SHAPES:
        for dtype in ("fp32", "bf16"):
            sizes: dict[str, Any] = {"seq_len": seq_len, "num_anchors": anchors}
            sizes |= {"block_size": block, "batch_size": batch, "dtype": dtype}
            predicted = training_memory(
                shape, features="cached", device="cpu", target_dtype="bf16", **sizes
            )
            measured = sum(measured_peak(shape, **sizes))
            worst = max(worst, abs(predicted / measured - 1))
            yield (
                f"{seq_len:>5} {anchors:>4} {block:>3} {batch:>2} {dtype:>5} "
                f"{predicted / 1e6:>10.1f} {measured / 1e6:>9.1f}     {predicted / measured:.3f}"
            )
    yield f"largest error: {worst:.1%}"


def _redraw() -> Iterator[str]:
    shape, card = TARGETS["qwen3-4b"], CARDS["H100"]
    calls: dict[str, Callable[[], Any]] = {
        "training_cost": lambda: training_cost(shape),
        "training_memory": lambda: training_memory(shape, seq_len=4096, num_anchors=512),
        "fit_table, 4 row lengths x 4 block sizes": lambda: fit_table(shape, card),
    }
    for name, call in calls.items():
        yield f"{name:<45} {median_seconds(call, 11) * 1e3:6.2f} ms"


def _times() -> Iterator[str]:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for name, other in (("pocket", (4, 7, 15)), ("smollm2", (7,))):
        shape = TARGETS[name]
        begin = time.perf_counter()
        few = measure_steps(shape, (128, 512), (8, 64), device=device, runs=3)
        took = time.perf_counter() - begin
        rest = measure_steps(shape, (256, 384), (16, 32), other, device=device, runs=3)
        fit = fit_step_time(few, rest)
        yield f"{name}: {fit} (at most {fit.worst_error:.0%}); measured in {took:.0f} s"


def _target(shape: Shape, dtype: str, device: str) -> Target:
    layers = shape.target
    assert layers is not None
    config = LlamaConfig(
        vocab_size=shape.vocab_size,
        hidden_size=layers.hidden_size,
        intermediate_size=layers.intermediate_size,
        num_hidden_layers=layers.count,
        num_attention_heads=layers.heads,
        num_key_value_heads=layers.kv_heads,
        head_dim=layers.head_dim,
        tie_word_embeddings=shape.tied,
    )
    kind = torch.float32 if dtype == "fp32" else torch.bfloat16
    model: Any = LlamaForCausalLM(config)
    return Target(model.to(device, kind))


def _ids(shape: Shape) -> tuple[int, ...]:
    return tuple(range(shape.context_layers))


def _zeros(shape: Shape) -> FeatureSource:
    def source(batch: Batch) -> Features:
        rows, like = tuple(batch.input_ids.shape), batch.input_ids
        context, last = (
            torch.zeros(*rows, size, dtype=torch.bfloat16, device=like.device)
            for size in (shape.context_size, shape.drafter.hidden_size)
        )
        return Features(context, last)

    return source


def _textbook(drafter: Drafter) -> Callable[..., Any]:
    """The objective from full logits, called like the chunked one."""

    def objective(slots: Any, head: Tensor, w2: Tensor | None, **options: Any) -> Any:
        own = {name: options[name] for name in options if name not in drafter.vocabulary}
        return output_objective(drafter.output(slots), **own)

    return objective


def _bytes(values: list[Any]) -> int:
    """The bytes of all tensors; memory that two of them share counts once."""
    storages = {
        value.untyped_storage().data_ptr(): value.untyped_storage().nbytes()
        for value in values
        if isinstance(value, Tensor)
    }
    return sum(storages.values())
