"""Export settings as JSON, command-line flags or config fragments.

Names are those of the trainers' and servers' published configurations; what they leave out keeps
its default. SpecForge counts the anchor among the slots of a block; the others count the slots that
predict.
"""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dspark_lab.checks import Count, Positive, Share, Size, checked
from dspark_lab.files import written_whole


@checked
@dataclass(frozen=True)
class TrainingSettings:
    """The settings behind coverage and cost; ``batch_size`` rows on each device."""

    num_anchors: Count
    block_size: Count
    seq_len: Count
    batch_size: Count = 1
    loss_decay_gamma: Positive = 4.0


@checked
@dataclass(frozen=True)
class ServingSettings:
    """How a drafter, by its checkpoint's folder or hub id, is to be served.

    ``draft_length`` 0 means not to draft, ``threshold`` 0 no threshold on the confidence.
    """

    draft_length: Size
    threshold: Share = 0.0
    drafter: str = "DRAFTER"


@checked
def export(
    settings: TrainingSettings | ServingSettings,
    kind: str = "json",
    path: str | os.PathLike[str] | None = None,
) -> str:
    """The settings as text, which is also written to ``path`` where one is given.

    ``kind`` is "json", or one of ``TRAINERS`` (for training) or ``SERVERS`` (for serving).
    """
    writers = TRAINERS if isinstance(settings, TrainingSettings) else SERVERS
    if kind not in ("json", *writers):
        raise ValueError(f"kind must be one of {['json', *writers]}, got {kind!r}")
    threshold = getattr(settings, "threshold", 0)
    if threshold and kind not in ("json", "dspark-lab"):
        lacking = f"{kind} has no threshold on the confidence of a slot"
        raise ValueError(f"{lacking}: choose threshold 0, got {threshold}")
    text = json.dumps(asdict(settings), indent=2) if kind == "json" else writers[kind](settings)
    text += "\n"
    if path is not None:
        with written_whole(Path(path)) as partial:
            partial.write_text(text, encoding="utf-8")
    return text


def slots_with_anchor(block_size: int) -> int:
    """A block's length where its first slot is the anchor's own and predicts nothing."""
    return block_size + 1


def _flags(block_size: int, s: TrainingSettings) -> str:
    return (
        f"--num-anchors {s.num_anchors} --block-size {block_size} --max-length {s.seq_len} "
        f"--batch-size {s.batch_size} --loss-decay-gamma {s.loss_decay_gamma}"
    )


def _nemo(s: TrainingSettings) -> str:
    return _yaml(
        "recipe_args",
        seq_length=s.seq_len,
        micro_batch_size=s.batch_size,
        block_size=s.block_size,
        num_anchors=s.num_anchors,
        loss_decay_gamma=s.loss_decay_gamma,
    )


def _deepspec(s: TrainingSettings) -> str:
    values = {
        "model.block_size": s.block_size,
        "model.num_anchors": s.num_anchors,
        "model.loss_decay_gamma": s.loss_decay_gamma,
        "data.max_length": s.seq_len,
        "train.local_batch_size": s.batch_size,
    }
    return " ".join(f'--opts "{name}={value}"' for name, value in values.items())


def _decode(s: ServingSettings) -> str:
    if s.draft_length == 0:
        return "decode(target, None, prompts)"
    threshold = f", threshold={s.threshold}" if s.threshold else ""
    return f"decode(target, drafter, prompts, draft_length={s.draft_length}{threshold})"


def _vllm(s: ServingSettings) -> str:
    if s.draft_length == 0:
        return "# without --speculative-config"
    config = {"method": "dspark", "model": s.drafter, "num_speculative_tokens": s.draft_length}
    return f"--speculative-config {shlex.quote(json.dumps(config))}"


def _tensorrt_llm(s: ServingSettings) -> str:
    if s.draft_length == 0:
        return "# without speculative_config"
    return _yaml(
        "speculative_config",
        decoding_type="DSpark",
        speculative_model=json.dumps(s.drafter),
        max_draft_len=s.draft_length,
    )


def _yaml(head: str, **values: Any) -> str:
    return "\n".join([f"{head}:", *(f"  {name}: {value}" for name, value in values.items())])


TRAINERS: dict[str, Callable[[Any], str]] = {
    "dspark-lab": lambda s: _flags(s.block_size, s),
    "nemo-automodel": _nemo,
    "deepspec": _deepspec,
    "specforge": lambda s: _flags(slots_with_anchor(s.block_size), s),
}
SERVERS: dict[str, Callable[[Any], str]] = {
    "dspark-lab": _decode,
    "vllm": _vllm,
    "tensorrt-llm": _tensorrt_llm,
}
