"""How long a training step takes: two numbers, fitted to a few steps on the user's own device.

    seconds = seconds_per_step + seconds_per_operation * operations

The operations are those of :func:`~dspark_lab.tuning.training_cost`; the first number is all that a
step costs beside them (launches, small kernels, Python). The fit's error is that on steps that it
has not seen.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float

from dspark_lab.blocks import Blocks, draw_blocks
from dspark_lab.chats import Batch
from dspark_lab.checks import Count, Device, NonNegative, Size, checked
from dspark_lab.files import now
from dspark_lab.model import Drafter, Features, Target
from dspark_lab.tuning.cost import step_cost
from dspark_lab.tuning.shape import Shape
from dspark_lab.tuning.step import Dtype, Step


@checked
@dataclass(frozen=True)
class StepTime:
    """A fit of :func:`fit_step_time`.

    ``error`` is the mean and ``worst_error`` the largest relative error of predictions of steps
    that the fit has not seen, ``held_out`` of them; NaN where there were too few to hold any out.
    """

    seconds_per_step: NonNegative
    seconds_per_operation: NonNegative
    error: float
    worst_error: float
    held_out: int

    def predict(self, operations: Any) -> Any:
        """Seconds of a step of so many operations, or of each of several."""
        return self.seconds_per_step + self.seconds_per_operation * operations

    def __str__(self) -> str:
        rate = 1 / self.seconds_per_operation if self.seconds_per_operation else math.inf
        off = "unknown" if math.isnan(self.error) else f"{self.error:.0%}"
        return (
            f"{self.seconds_per_step * 1e3:.1f} ms a step and {rate / 1e9:.1f} billion operations "
            f"a second; error on {self.held_out} steps held out: {off}"
        )


@checked
def fit_step_time(table: pd.DataFrame, held_out: pd.DataFrame | None = None) -> StepTime:
    """The two numbers, neither below 0, that minimise the sum of squared relative errors.

    ``table`` has ``operations`` and ``seconds`` of some steps, as :func:`measure_steps` makes it.
    The error is taken on ``held_out``, other such steps; where None, each step of ``table`` is
    predicted from a fit to the others.
    """
    operations, seconds = _columns("table", table)
    if len(np.unique(operations)) < 2:
        wanted = "steps of two different numbers of operations at least"
        got = f"{len(operations)} of {sorted(set(operations.tolist()))}"
        raise ValueError(f"table must hold {wanted}, got {got}")
    fixed, per_operation = _fit(operations, seconds)
    errors = _left_out_errors(operations, seconds)
    if held_out is not None:
        others, times = _columns("held_out", held_out)
        errors = np.abs((fixed + per_operation * others) / times - 1)
    mean, worst = (errors.mean(), errors.max()) if len(errors) else (math.nan, math.nan)
    return StepTime(fixed, per_operation, float(mean), float(worst), len(errors))


@checked
def measure_steps(
    shape: Shape,
    seq_lens: Sequence[Count] = (256, 512),
    num_anchors: Sequence[Count] = (8, 32),
    block_sizes: Sequence[Count] | None = None,
    *,
    batch_size: Count = 1,
    dtype: Dtype = "fp32",
    target: Target | None = None,
    device: Device = "cpu",
    warmup: Size = 1,
    runs: Count = 5,
    seed: Size = 0,
) -> pd.DataFrame:
    """Times whole training steps of a drafter of this shape, on random tokens, all supervised.

    Forward, objective, backward, clipping and AdamW, as in ``dspark_lab.training``; the target's
    own forward too where it is given, on its own device, random features otherwise. A line for each
    combination of sizes (``block_sizes`` None is the shape's own); ``seconds`` are the median of
    ``runs`` steps after ``warmup``.
    """
    place = torch.device(device) if target is None else target.device
    features: Literal["cached", "live"] = "cached" if target is None else "live"
    kind: Literal["cuda", "cpu"] = "cuda" if place.type == "cuda" else "cpu"
    lines = []
    for block_size in block_sizes or [shape.block_size]:
        config = replace(shape, block_size=block_size).drafter_config()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            drafter = Drafter(config).to(place).train()
            if target is not None:
                heads = target.embed_weight, target.head_weight, target.logit_rule
                drafter.use_target_embeddings(*heads)
            elif config.draft_vocab_size is not None:
                # The objective reads a head of the target's whole vocabulary.
                embedding = drafter.embed_tokens.weight
                drafter.use_target_embeddings(embedding, torch.randn_like(embedding))
        optimizer = torch.optim.AdamW(_trained(drafter), lr=1e-5, fused=True)
        for seq_len, anchors in product(seq_lens, num_anchors):
            rows, generator = (batch_size, seq_len), torch.Generator().manual_seed(seed)
            ids = torch.randint(shape.vocab_size, rows, generator=generator)
            batch = Batch.of_tokens(ids, torch.ones(rows, dtype=torch.bool)).to(place)
            layout = config.layout
            blocks = draw_blocks(batch, anchors, block_size, seed=seed, layout=layout)
            read = _features(target, drafter, batch)
            run = partial(_train_once, drafter, optimizer, batch, blocks, read, dtype)
            sizes = (seq_len, anchors, block_size, batch_size)
            labelled = float(blocks.eval_mask.double().mean())
            step = Step(*sizes, dtype, features, supervised=labelled, device=kind)
            for _ in range(warmup):
                run()
            times = [_seconds(run, place) for _ in range(runs)]
            spread = (statistics.median(times), min(times), max(times))
            operations = step_cost(shape, step)["operations"].sum()
            lines.append((*sizes, operations, *spread, str(place), dtype))
    columns = ["seq_len", "num_anchors", "block_size", "batch_size", "operations"]
    columns += ["seconds", "fastest", "slowest", "device", "dtype"]
    return pd.DataFrame(lines, columns=columns)


def _train_once(
    drafter: Drafter,
    optimizer: torch.optim.Optimizer,
    batch: Batch,
    blocks: Blocks,
    features: Callable[[], Features],
    dtype: Dtype,
) -> None:
    read = features()
    with torch.autocast(batch.input_ids.device.type, torch.bfloat16, enabled=dtype == "bf16"):
        slots = drafter.slots(blocks, read.context, read.last)
        objective = drafter.objective(slots)
    objective.loss.backward()
    torch.nn.utils.clip_grad_norm_(_trained(drafter), 1.0)
    optimizer.step()
    optimizer.zero_grad()


def _trained(drafter: Drafter) -> list[torch.nn.Parameter]:
    return [p for p in drafter.parameters() if p.requires_grad]


def _fit(
    operations: Float[np.ndarray, " step"], seconds: Float[np.ndarray, " step"]
) -> tuple[float, float]:
    """(a, b) >= 0 that make the sum of ((a + b x) / t - 1)^2 smallest."""
    # In units of the largest, or the squares of operations would swamp those of steps.
    unit = operations.max()
    design = np.stack([1 / seconds, operations / unit / seconds], axis=1)
    both = np.linalg.lstsq(design, np.ones(len(seconds)), rcond=None)[0]
    # With the other at 0; its own best is positive, as all numbers here are.
    choices = list(np.diag(design.sum(axis=0) / (design**2).sum(axis=0)))
    if (both >= 0).all():
        choices.insert(0, both)
    fixed, slope = min(choices, key=lambda x: float(((design @ x - 1) ** 2).sum()))
    return float(fixed), float(slope / unit)


def _left_out_errors(
    operations: Float[np.ndarray, " step"], seconds: Float[np.ndarray, " step"]
) -> Float[np.ndarray, " error"]:
    """The relative error on each step of a fit to the others, where these can be fitted."""
    errors = []
    for out in range(len(operations)):
        others = np.arange(len(operations)) != out
        if len(np.unique(operations[others])) > 1:
            fixed, slope = _fit(operations[others], seconds[others])
            errors.append(abs((fixed + slope * operations[out]) / seconds[out] - 1))
    return np.array(errors)


def _columns(name: str, table: pd.DataFrame) -> list[Float[np.ndarray, " step"]]:
    found = []
    for column in ("operations", "seconds"):
        if column not in table:
            raise ValueError(f"{name} must have a column {column!r}, got {list(table.columns)}")
        values = table[column].to_numpy(dtype=float)
        if not len(values) or not (np.isfinite(values) & (values > 0)).all():
            raise ValueError(f"{name}'s {column} must be finite numbers > 0, got {values.tolist()}")
        found.append(values)
    return found


def _features(target: Target | None, drafter: Drafter, batch: Batch) -> Callable[[], Features]:
    """Asks the target anew at every call, or hands out the same random numbers."""
    if target is not None:
        return lambda: target.batch_features(batch, drafter.config.target_layer_ids)
    device = drafter.fc.weight.device
    generator = torch.Generator(device).manual_seed(0)
    context, last = (
        torch.randn(*batch.input_ids.shape, size, generator=generator, device=device)
        for size in (drafter.config.context_size, drafter.config.hidden_size)
    )
    return lambda: Features(context, last)


def _seconds(step: Callable[[], None], device: torch.device) -> float:
    begin = now(device)
    step()
    return now(device) - begin
