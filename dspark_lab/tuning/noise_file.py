"""The noise of gradients on disk: a safetensors file of the sums that all estimates follow from.

    block.7.cross       products of the conversations' mean gradients, upper triangle by rows
    block.7.design      of each conversation, upper triangle of a 3 by 3 matrix
    block.7.products    of each conversation, 3
    block.7.overlap     by distance

and the same for every other block size, and for slots (``slot.0.cross``, ...), in 32 bits.
"""

from __future__ import annotations

import os
import re
from collections import defaultdict
from pathlib import Path
from typing import Literal

import numpy as np
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.numpy import load, save

from dspark_lab.checks import checked
from dspark_lab.files import shipped, written_whole
from dspark_lab.tuning.noise import GradientNoise, Moments

# What the noise that ships was measured after, and the rows and anchors of its run.
NOISE_STEPS = (0, 100, 400)
NOISE_RUN = (8, 16)
_NAME = re.compile(r"(block|slot)\.(\d{1,4})\.(cross|design|products|overlap)")


@checked
def save_noise(noise: GradientNoise, path: str | os.PathLike[str]) -> None:
    """Write what was measured, for :func:`load_noise`; 11 kB an objective of 64 conversations.

    A ValueError where a number is not finite in 32 bits.
    """
    tensors: dict[str, Float[np.ndarray, "..."]] = {}
    for kind, objectives in (("block", noise.wholes), ("slot", noise.slots)):
        for number, moments in objectives.items():
            parts = {
                "cross": moments.cross[np.triu_indices(moments.conversations)],
                "design": moments.design[(slice(None), *np.triu_indices(3))],
                "products": moments.products,
                "overlap": moments.overlap,
            }
            for name, values in parts.items():
                with np.errstate(over="ignore"):
                    single = np.ascontiguousarray(values, dtype=np.float32)
                if not np.isfinite(single).all():
                    wanted = "numbers that are finite in 32 bits"
                    raise ValueError(f"noise must hold {wanted}, got others in {kind} {number}")
                tensors[f"{kind}.{number}.{name}"] = single
    with written_whole(Path(path)) as partial:
        partial.write_bytes(save(tensors))


@checked
def load_noise(path: str | os.PathLike[str]) -> GradientNoise:
    """Read a file of :func:`save_noise`; a ValueError where it is none, or is not complete."""
    path = Path(path)
    data = path.read_bytes()
    try:
        tensors = load(data)
    except (SafetensorError, ValueError, KeyError) as error:
        raise ValueError(
            f"{path} must be a safetensors file of noise, but is not: {error}"
        ) from error
    found: dict[str, dict[int, dict[str, Float[np.ndarray, "..."]]]] = defaultdict(dict)
    for name, values in tensors.items():
        parts = _NAME.fullmatch(name)
        if parts is None:
            raise ValueError(f"{path} must be of save_noise, got a tensor {name!r}")
        kind, number, part = parts.groups()
        found[kind].setdefault(int(number), {})[part] = values
    if 0 in found["block"] or not found["block"]:
        raise ValueError(f"{path} must hold the noise of a block of 1 slot or more, got none")
    wholes, slots = (
        {n: _moments(f"{path}: {kind} {n}", found[kind][n]) for n in sorted(found[kind])}
        for kind in ("block", "slot")
    )
    return GradientNoise(wholes, slots)


def _moments(where: str, parts: dict[str, Float[np.ndarray, "..."]]) -> Moments:
    missing = {"cross", "design", "products", "overlap"} - set(parts)
    if missing:
        raise ValueError(f"{where} must have all of its sums, got no {sorted(missing)}")
    count = len(parts["products"]) if parts["products"].ndim else 0
    shapes = {"cross": (count * (count + 1) // 2,), "design": (count, 6), "products": (count, 3)}
    shapes["overlap"] = (parts["overlap"].size,)
    for name, shape in shapes.items():
        values = parts[name]
        if count < 2 or values.shape != shape or values.dtype != np.float32:
            got = f"{values.dtype} {values.shape}"
            raise ValueError(f"{where} must have float32 {name} of {shape}, got {got}")
        if not np.isfinite(values).all():
            raise ValueError(f"{where} must have finite {name}, got NaN or infinite ones")
    cross, design = np.empty((count, count)), np.empty((count, 3, 3))
    rows, columns = np.triu_indices(count)
    cross[rows, columns] = cross[columns, rows] = parts["cross"]
    rows, columns = np.triu_indices(3)
    design[:, rows, columns] = design[:, columns, rows] = parts["design"]
    return Moments(
        cross, design, parts["products"].astype(np.float64), parts["overlap"].astype(np.float64)
    )


@checked
def shipped_noise(mix: Literal["all", "code"] = "all") -> dict[int, GradientNoise]:
    """The noise of the pocket pair's gradients, by the steps after which it was measured.

    Of one run on a ``mix`` of the conversations, with the rows and anchors of :data:`NOISE_RUN`, in
    blocks of 15 slots.
    """
    files = (Path("pocket") / f"noise-{mix}-{step}.safetensors" for step in NOISE_STEPS)
    return {
        step: load_noise(shipped(str(file))) for step, file in zip(NOISE_STEPS, files, strict=True)
    }
