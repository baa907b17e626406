"""Calibration and cost files of SGLang and TensorRT-LLM, written and read.

Both multiply the calibrated confidences of a block, sigmoid(logit / temperature), to its survival,
and verify as many slots as bring the most tokens per second of a whole step.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Int

from dspark_lab.checks import (
    Count,
    Finite,
    NonNegative,
    Positive,
    Share,
    Size,
    Within,
    checked,
    require,
)
from dspark_lab.decoding import Rounds
from dspark_lab.files import files_of, read_json, require_found, write_json
from dspark_lab.rates import SequentialTemperatures
from dspark_lab.serving import Engine, StepsPerSecond

StepCostForm = Literal["steps", "additive", "tensorrt-llm"]

# Requests or tokens of a step, so many or more.
_FromOne, _FromZero = (Annotated[int, Within(low, 2**40)] for low in (1, 0))
_SHARDS = {".pt", ".pth", ".safetensors"}
_TENSORS = ("logits", "prefix_mask")


@checked
def save_scaling(
    scaling: SequentialTemperatures,
    path: str | os.PathLike[str],
    *,
    dataset: str = "",
    num_samples: Size = 0,
    ece_before: Sequence[Share] = (),
    ece_after: Sequence[Share] = (),
) -> None:
    """Write temperatures as SGLang's scaling file (JSON), whole or not at all.

    For ``--speculative-dspark-confidence-sts-path``; TensorRT-LLM reads it as
    ``confidence_sts_path``. Keys that are not given are left out.

    Args:
        dataset: where the rounds came from; SGLang's own fit names the files of its shards.
        num_samples: rounds that the temperatures were fitted on.
        ece_before, ece_after: expected calibration error of the product up to each slot, at
            temperatures of 1 and at these.

    Raises:
        ValueError: errors that are not of as many slots as the temperatures.
    """
    values: dict[str, Any] = {"temperatures": list(map(float, scaling.temperatures))}
    values |= {"dataset": dataset, "num_samples": int(num_samples)}
    for name, errors in (("ece_before", ece_before), ("ece_after", ece_after)):
        if len(errors) not in (0, len(scaling.temperatures)):
            wanted = f"of {len(scaling.temperatures)} slots, as the temperatures, or of none"
            raise ValueError(f"{name} must be {wanted}, got {len(errors)}")
        values[name] = list(map(float, errors))
    write_json(Path(path).expanduser(), {key: value for key, value in values.items() if value})


@checked
def load_scaling(
    path: str | os.PathLike[str], *, block_size: Count | None = None
) -> SequentialTemperatures:
    """Read the temperatures of a scaling file of SGLang or TensorRT-LLM; its errors are not kept.

    TensorRT-LLM's has ``sts_temperatures``, ``temperatures`` or both.

    Args:
        block_size: slots of the drafter's block; SGLang refuses a file of another number.

    Raises:
        OSError: there is no such file.
        ValueError: it has no temperatures, or not one that is positive and finite for each slot.
    """
    name, values = _read(path)
    keys = [key for key in ("temperatures", "sts_temperatures") if key in values]
    first, *others = (_held(name, values, key, list[Positive]) for key in keys or ["temperatures"])
    if not first or any(other != first for other in others):
        found = f"{first} and, as sts_temperatures, {others[0]}" if others else "none"
        raise ValueError(f"{name} must hold one list of temperatures, got {found}")
    if block_size not in (None, len(first)):
        wanted = f"{block_size} temperatures, one for each slot of the block"
        raise ValueError(f"{name} must hold {wanted}, got {len(first)}")
    return SequentialTemperatures(tuple(first))


@checked
def save_step_costs(
    costs: StepsPerSecond | Engine,
    path: str | os.PathLike[str],
    *,
    form: StepCostForm | None = None,
    draft_length: Count | None = None,
) -> None:
    """Write step costs as SGLang's or TensorRT-LLM's table (JSON), whole or not at all.

    In a step R requests verify M tokens, an anchor and the chosen slots of each. The file says how
    long the whole step takes:

    - ``"steps"``, SGLang: steps per second by M. Those of an engine are at M = R * (K + 1), as
      SGLang's profiler measures them, so that R and M cannot be told apart. A ``StepsPerSecond`` is
      written as it is; one of the target alone lacks the drafting, and SGLang then verifies too
      little.
    - ``"additive"``, SGLang: ``bias_seconds`` + alpha(R) + theta(M). Alpha is an engine's drafting
      and rest, theta the target's step; both are 0 at their first point.
    - ``"tensorrt-llm"``: the same sum in milliseconds, with the keys of its profiler. Its newer
      ``schema_version`` 2 is bound to one server by a fingerprint and is not written.

    No form has shorter drafts (engines draft whole blocks), drafting apart from the rest, a plain
    step, the context's length, device or target. Above the last point an engine's costs stay
    constant, where those of the lab go on rising: measure up to the largest M that is served.
    Between points ``"steps"`` and TensorRT-LLM's tokens keep the value of the point below.

    Args:
        form: by default ``"additive"`` for an engine, which alone has it, else ``"steps"``.
        draft_length: slots K of the block, by default the engine's longest.

    Raises:
        ValueError: a form that needs an engine, or a single point of ``"steps"``, which SGLang
            takes for a table that was never measured.
    """
    if isinstance(costs, StepsPerSecond):
        if form not in (None, "steps") or draft_length is not None:
            wanted = "an Engine, which knows the seconds of drafting"
            raise ValueError(f"with form {form!r} or a draft_length costs must be {wanted}")
        values = _steps(costs.tokens, costs.steps_per_second)
    else:
        slots = costs.longest if draft_length is None else draft_length
        requests, tokens = costs.requests, costs.sps.tokens
        own = costs.draft_seconds(requests, slots) + costs.rest
        step = 1 / costs.sps.steps_per_second
        if form == "steps":
            verified = requests * (slots + 1)
            values = _steps(verified, 1 / (own + costs.sps.seconds(verified)))
        elif form == "tensorrt-llm":
            values = {
                "token_counts": tokens.tolist(),
                "step_time_ms": (1000 * step).tolist(),
                "fixed_overhead_ms": float(1000 * own.min()),
                "batch_sizes": requests.tolist(),
                "batch_overhead_ms": (1000 * (own - own.min())).tolist(),
            }
        else:
            values = {
                "bias_seconds": float(own[0] + step[0]),
                "bs_probes": requests.tolist(),
                "alpha_seconds": (own - own[0]).tolist(),
                "m_probes": tokens.tolist(),
                "theta_seconds": (step - step[0]).tolist(),
            }
    write_json(Path(path).expanduser(), values)


@checked
def load_step_costs(
    path: str | os.PathLike[str],
    *,
    block_size: Count,
    context_length: Size,
    device: str,
    target: str = "",
) -> Engine:
    """Read a step-cost table in one of the forms of :func:`save_step_costs`.

    At the points of the file the engine's seconds of a step with a draft are the file's; between
    them they are linear, above the last ones they go on rising. What changes with the requests
    counts as drafting, of any length, all else as the target's step, :attr:`Engine.sps`; in
    ``"steps"`` that is everything. So the engine says how much to verify, not whether to draft: its
    plain steps hold a part of the drafting, and its ``plain_known`` is False.

    Args:
        block_size: slots of the drafter's block.
        context_length, device, target: how the file was measured, which it does not say; see
            :class:`StepsPerSecond`.

    Raises:
        OSError: there is no such file.
        ValueError: another form (TensorRT-LLM's ``schema_version`` 2 among them), or numbers that
            the servers refuse as well.
    """
    name, values = _read(path)
    requests, alpha = np.array([1]), np.zeros(1)
    if "bias_seconds" in values:
        bias = _held(name, values, "bias_seconds", Positive)
        requests, alpha = _points(name, values, "bs_probes", "alpha_seconds", _FromOne)
        tokens, theta = _points(name, values, "m_probes", "theta_seconds", _FromZero)
        if tokens[0] == 0:
            kept = np.union1d(tokens[1:], 1)
            tokens, theta = kept, np.interp(kept, tokens, theta)
    elif "sample_batch_tokens" in values:
        keys = ("sample_batch_tokens", "sample_steps_per_sec")
        tokens, speeds = _points(name, values, *keys, _FromOne, Positive)
        most = _held(name, values, "max_batch_tokens", Count)
        if most < tokens[-1] or len(tokens) == 1:
            wanted = "two or more points, the last one at most max_batch_tokens"
            raise ValueError(f"{name} must have {wanted}, got {tokens.tolist()} and {most}")
        sps = StepsPerSecond(tokens, speeds, context_length, device, target)
        return Engine.of(sps, block_size, draft_seconds=0.0, plain_known=False)
    elif "token_counts" in values:
        tokens, theta = _points(name, values, "token_counts", "step_time_ms", _FromOne, Positive)
        bias = _held(name, values, "fixed_overhead_ms", NonNegative, 0.0) / 1000
        if values.get("batch_sizes"):
            requests, alpha = _points(name, values, "batch_sizes", "batch_overhead_ms", _FromOne)
        theta, alpha = theta / 1000, alpha / 1000
    else:
        wanted = "bias_seconds, sample_batch_tokens or token_counts"
        raise ValueError(f"{name} must have {wanted}, got the keys {sorted(values)}")
    seconds = bias + alpha.min() + theta
    if not (np.isfinite(seconds) & (seconds > 0)).all():
        raise ValueError(f"{name}: a step must take more than 0 seconds, got {seconds.min()}")
    sps = StepsPerSecond(tokens, 1 / seconds, context_length, device, target)
    drafting = dict(zip(requests.tolist(), (alpha - alpha.min()).tolist(), strict=True))
    return Engine.of(sps, block_size, draft_seconds=drafting, plain_known=False)


@checked
def read_engine(path: str | os.PathLike[str], *, block_size: Count) -> Engine:
    """Read an engine's costs, in seconds, from a file of either form, by its content.

    - The CSV of :meth:`Engine.save` is read by :meth:`Engine.read`.
    - A JSON step-cost table of SGLang or TensorRT-LLM is read by :func:`load_step_costs`, with a
      context length of 0 and the file's name as device. It says how much to verify, not whether to
      draft: the engine's ``plain_known`` is False.

    Args:
        block_size: slots of the drafter's block, which a step-cost table does not say; a CSV file
            has its own draft lengths.

    Raises:
        OSError: there is no such file.
        ValueError: a file of neither form, or one whose numbers are refused.
    """
    require_found(path)
    place = Path(path).expanduser()
    with place.open("rb") as file:
        first = file.read(1024).lstrip()[:1]
    if first in (b"{", b"["):
        return load_step_costs(place, block_size=block_size, context_length=0, device=place.name)
    try:
        return Engine.read(place)
    except (TypeError, ValueError) as error:
        wanted = "an engine's CSV file or a JSON step-cost table of SGLang or TensorRT-LLM"
        raise ValueError(f"{place} must be {wanted}: {error}") from error


@checked
def load_shards(path: str | os.PathLike[str]) -> Rounds:
    """Read the rounds that SGLang's or TensorRT-LLM's collector wrote, without running any code.

    A shard holds ``logits`` and ``prefix_mask``, both ``[round, slot]``: of the confidence head,
    unscaled, and 1 where all slots up to this one were accepted. In SGLang's that means equal to
    the target's most likely token, even where the server samples. The requests are not known, so
    every round counts as a conversation of its own: intervals over conversations are too narrow.

    Args:
        path: a torch or safetensors file, or a folder with files ``.pt``, ``.pth`` or
            ``.safetensors``.

    Returns:
        all slots verified, accept rates NaN: what :func:`compare_scalings` and the calibration
        functions of ``rates`` take, as far as they need no accept rates.

    Raises:
        OSError: there is no such file or folder, or no shard in it.
        ValueError: a file with more than tensors, which could run code; other keys or shapes; a
            logit that is not finite; a mask that is not 0 and 1, falling along the block.
    """
    require_found(path)
    place = Path(path).expanduser()
    files = [file for file in files_of(place) if file == place or file.suffix in _SHARDS]
    if not files:
        raise FileNotFoundError(f"{place} must have files {sorted(_SHARDS)}, but has none")
    shards = [_read_shard(file) for file in files]
    slots = shards[0][0].shape[1]
    for file, (logits, _) in zip(files, shards, strict=True):
        if logits.shape[1] != slots:
            found = f"{logits.shape[1]} in {file}"
            raise ValueError(f"all shards must have {slots} slots, as {files[0]}, got {found}")
    logits, mask = (np.concatenate(parts) for parts in zip(*shards, strict=True))
    if len(logits) == 0:
        raise ValueError(f"{place} must hold at least one round, got 0")
    with np.errstate(over="ignore"):
        confidence = 1 / (1 + np.exp(-logits))
    # What is rounded to 0 or 1 would stay there at every temperature.
    confidence = confidence.clip(np.finfo(np.float64).tiny, np.nextafter(1, 0))
    return Rounds(
        confidence=confidence,
        accept_rate=np.full(mask.shape, np.nan),
        verified=np.ones_like(mask),
        accepted=mask,
        prompt=np.arange(len(mask)),
        domain=np.full(len(mask), "", dtype=object),
    )


def _read(path: str | os.PathLike[str]) -> tuple[str, dict[str, Any]]:
    require_found(path)
    return os.fspath(path), read_json(Path(path).expanduser())


def _held(
    name: str, values: Mapping[str, Any], key: str, rule: Any, default: float | None = None
) -> Any:
    """The value of ``key`` in the file ``name``, as ``rule`` allows it."""
    if key not in values and default is None:
        raise ValueError(f"{name} must have {key}, got the keys {sorted(values)}")
    value = values.get(key, default)
    try:
        require(f"{name}: {key}", value, rule)
        np.asarray(value, dtype=np.float64)
    except TypeError as error:
        raise ValueError(str(error)) from None
    except OverflowError:
        raise ValueError(f"{name}: {key} must be finite, got an int beyond any float") from None
    return value


def _points(
    name: str, values: Mapping[str, Any], probes: str, costs: str, rule: Any, cost: Any = Finite
) -> tuple[Int[np.ndarray, " point"], Float[np.ndarray, " point"]]:
    """Rising whole numbers that ``rule`` allows, and the cost at each."""
    at, found = _held(name, values, probes, list[rule]), _held(name, values, costs, list[cost])
    if not at or len(at) != len(found):
        wanted = f"as many {costs} as {probes}, and at least one"
        raise ValueError(f"{name} must have {wanted}, got {len(found)} and {len(at)}")
    if sorted(set(at)) != at:
        raise ValueError(f"{name}: {probes} must rise from point to point, got {at}")
    return np.array(at), np.array(found, dtype=np.float64)


def _steps(
    tokens: Int[np.ndarray, " point"], steps_per_second: Float[np.ndarray, " point"]
) -> dict[str, Any]:
    if len(tokens) == 1:
        raise ValueError("costs must have two or more points, got 1, which SGLang does not use")
    return {
        "sample_batch_tokens": tokens.tolist(),
        "sample_steps_per_sec": steps_per_second.tolist(),
        "max_batch_tokens": int(tokens[-1]),
    }


def _read_shard(
    path: Path,
) -> tuple[Float[np.ndarray, "round slot"], Bool[np.ndarray, "round slot"]]:
    from safetensors.torch import load

    content = path.read_bytes()
    try:
        # A safetensors file begins with the length of its header in eight bytes, and the header, {.
        if content[8:9] == b"{":
            stored = load(content)
        else:
            stored = torch.load(path, map_location="cpu", weights_only=True)
    except Exception:  # torch has no common class for the ways that a file can be bad
        raise ValueError(
            f"{path} must be a torch or safetensors file of tensors alone, but is damaged or holds "
            "other objects, which could run code and are not loaded; where you trust it, write "
            f"{' and '.join(_TENSORS)} with safetensors.torch.save_file"
        ) from None
    if not isinstance(stored, dict) or not set(_TENSORS) <= stored.keys():
        keys = list(stored) if isinstance(stored, dict) else type(stored).__name__
        raise ValueError(f"{path} must hold {' and '.join(_TENSORS)}, got {keys}")
    logits, mask = (_array(path, name, stored[name]) for name in _TENSORS)
    if logits.ndim != 2 or logits.shape != mask.shape or logits.shape[1] == 0:
        found = f"{logits.shape} and {mask.shape}"
        raise ValueError(f"{path} must hold {_TENSORS}, both [round, slot], got shapes {found}")
    if not np.isfinite(logits).all():
        raise ValueError(f"{path}: logits must be finite, got {logits[~np.isfinite(logits)][0]}")
    if not np.isin(mask, (0, 1)).all() or (np.diff(mask, axis=1) > 0).any():
        rule = "0 or 1, and 0 in every slot after a 0"
        raise ValueError(f"{path}: prefix_mask must be {rule}, got other rows")
    return logits, mask == 1


def _array(path: Path, name: str, value: Any) -> Float[np.ndarray, "..."]:
    plain = isinstance(value, torch.Tensor) and value.layout is torch.strided
    if not plain or value.is_complex() or value.is_quantized or value.device.type != "cpu":
        raise ValueError(f"{path}: {name} must be a plain tensor of numbers, got {type(value)}")
    return value.detach().double().numpy()
