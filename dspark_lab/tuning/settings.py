"""What was chosen, as whoever is to run it wants it: JSON, command-line flags, config fragments.

Trainers count a block differently. NeMo AutoModel, DeepSpec and this lab count the slots that
predict; SpecForge's DFlash trainer counts the anchor among them, so its block is one longer. Names
are those of the trainers' published configurations; what they leave out keeps their default.

This file knows names; it does not know how a choice is made.
"""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dspark_lab.checks import require_int, require_number
from dspark_lab.files import written_whole

__all__ = ["SERVERS", "TRAINERS", "ServingSettings", "TrainingSettings", "export"]


@dataclass(frozen=True)
class TrainingSettings:
    """What decides coverage and cost of a training run.

    ``batch_size`` rows a step on each device, ``seq_len`` tokens of a row, ``num_anchors`` blocks a
    row. Raises TypeError or ValueError where a count is not an int of at least 1, or
    ``loss_decay_gamma`` not a number above 0.
    """

    num_anchors: int
    block_size: int
    seq_len: int
    batch_size: int = 1
    loss_decay_gamma: float = 4.0

    def __post_init__(self) -> None:
        for name in ("num_anchors", "block_size", "seq_len", "batch_size"):
            require_int(name, getattr(self, name), 1)
        require_number("loss_decay_gamma", self.loss_decay_gamma)
        if not 0 < self.loss_decay_gamma < float("inf"):
            raise ValueError(
                f"loss_decay_gamma must be a finite number > 0, got {self.loss_decay_gamma}"
            )


@dataclass(frozen=True)
class ServingSettings:
    """How a drafter is to be served.

    ``draft_length`` slots are drafted; 0 means not to draft. ``threshold`` on the confidence, 0 for
    none. ``drafter``: the checkpoint's folder or hub id.
    """

    draft_length: int
    threshold: float = 0.0
    drafter: str = "DRAFTER"

    def __post_init__(self) -> None:
        require_int("draft_length", self.draft_length, 0)
        require_number("threshold", self.threshold)
        if not 0 <= self.threshold <= 1:
            raise ValueError(f"threshold must be in [0, 1], got {self.threshold}")
        if not isinstance(self.drafter, str):
            raise TypeError(f"drafter must be a string, got {type(self.drafter).__name__}")


def export(
    settings: TrainingSettings | ServingSettings,
    kind: str = "json",
    path: str | os.PathLike[str] | None = None,
) -> str:
    """The settings as text, which is also written to ``path`` where one is given.

    Args:
        settings: what was chosen.
        kind: "json", or one of ``TRAINERS`` (for training) or ``SERVERS`` (for serving).

    Raises:
        ValueError: there is no such kind, or the server cannot do what was chosen.
        TypeError: not settings.
    """
    if not isinstance(settings, (TrainingSettings, ServingSettings)):
        raise TypeError(
            f"settings must be TrainingSettings or ServingSettings, got {type(settings).__name__}"
        )
    writers = TRAINERS if isinstance(settings, TrainingSettings) else SERVERS
    if kind not in ("json", *writers):
        raise ValueError(f"kind must be one of {['json', *writers]}, got {kind!r}")
    text = json.dumps(asdict(settings), indent=2) if kind == "json" else writers[kind](settings)
    text += "\n"
    if path is not None:
        with written_whole(Path(path)) as partial:
            partial.write_text(text, encoding="utf-8")
    return text


def _flags(**values: Any) -> str:
    return " ".join(f"--{k.replace('_', '-')} {shlex.quote(str(v))}" for k, v in values.items())


def _yaml(head: str, **values: Any) -> str:
    return "\n".join([f"{head}:", *(f"  {name}: {value}" for name, value in values.items())])


def _dspark_lab(s: TrainingSettings) -> str:
    return _flags(
        num_anchors=s.num_anchors,
        block_size=s.block_size,
        max_length=s.seq_len,
        batch_size=s.batch_size,
        loss_decay_gamma=s.loss_decay_gamma,
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


def _specforge(s: TrainingSettings) -> str:
    # Its first slot is the anchor's own and predicts nothing.
    return _flags(
        block_size=s.block_size + 1,
        num_anchors=s.num_anchors,
        max_length=s.seq_len,
        batch_size=s.batch_size,
        loss_decay_gamma=s.loss_decay_gamma,
    )


def _decode(s: ServingSettings) -> str:
    if s.draft_length == 0:
        return "decode(target, None, prompts)"
    threshold = f", threshold={s.threshold}" if s.threshold else ""
    return f"decode(target, drafter, prompts, draft_length={s.draft_length}{threshold})"


def _vllm(s: ServingSettings) -> str:
    _require_no_threshold("vllm", s)
    if s.draft_length == 0:
        return "# without --speculative-config"
    config = {
        "method": "dspark",
        "model": s.drafter,
        "num_speculative_tokens": s.draft_length,
    }
    return f"--speculative-config {shlex.quote(json.dumps(config))}"


def _tensorrt_llm(s: ServingSettings) -> str:
    _require_no_threshold("tensorrt-llm", s)
    if s.draft_length == 0:
        return "# without speculative_config"
    return _yaml(
        "speculative_config",
        decoding_type="DSpark",
        speculative_model=json.dumps(s.drafter),
        max_draft_len=s.draft_length,
    )


def _require_no_threshold(server: str, s: ServingSettings) -> None:
    if s.threshold:
        raise ValueError(
            f"{server} has no threshold on the confidence of a slot: choose threshold 0, "
            f"got {s.threshold}"
        )


TRAINERS: dict[str, Callable[[Any], str]] = {
    "dspark-lab": _dspark_lab,
    "nemo-automodel": _nemo,
    "deepspec": _deepspec,
    "specforge": _specforge,
}
SERVERS: dict[str, Callable[[Any], str]] = {
    "dspark-lab": _decode,
    "vllm": _vllm,
    "tensorrt-llm": _tensorrt_llm,
}
