"""Export settings as JSON, command-line flags or config fragments.

Names are those of the trainers' and servers' published configurations, and each export begins with
a comment that says which state of the program they were checked against; what is left out keeps its
default. What a program cannot do is refused, so that no export describes another run.

Servers count the slots of a block that predict; trainers all slots, an anchor that is given among
them, as this lab does.
"""

from __future__ import annotations

import json
import math
import os
import shlex
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, get_args

import numpy as np

import dspark_lab
from dspark_lab.blocks import PER, Layout, Per, predicted_slots
from dspark_lab.checks import Count, NonNegative, Positive, Share, Size, checked
from dspark_lab.files import written_whole


@checked
@dataclass(frozen=True)
class TrainingSettings:
    """The settings behind coverage and cost; ``batch_size`` rows on each device.

    A row is a conversation, cut to ``seq_len`` tokens; or, with ``pack_length``, holds that many
    tokens of as many conversations as fit. ``num_anchors`` counts ``per`` row, per document
    (conversation), or for all rows of a micro-batch together. ``block_size`` counts all slots of a
    block, one less of which predict in the ``layout`` "anchor_given".
    """

    num_anchors: Count
    block_size: Count
    seq_len: Count
    batch_size: Count = 1
    loss_decay_gamma: Positive = 4.0
    pack_length: Count | None = None
    per: Per = "row"
    layout: Layout = "anchor_predicts"

    def __post_init__(self) -> None:
        predicted_slots(self.block_size, self.layout)
        if self.pack_length is not None and self.pack_length < self.seq_len:
            wanted = f"pack_length must be at least seq_len, {self.seq_len}"
            raise ValueError(f"{wanted}, got {self.pack_length}")


@checked
@dataclass(frozen=True)
class ServingSettings:
    """How a drafter, by its checkpoint's folder or hub id, is to be served.

    ``draft_length`` 0 means not to draft, ``threshold`` 0 no threshold on the confidence.
    ``block_size`` counts the slots of the drafter's block that predict, None where that is not
    known. A choice made at a ``temperature`` above 0 supposes that drafted tokens are sampled.
    ``scheduled``: confidence and load decide how many slots are verified; ``scaling_file``
    (temperatures of the confidence) and ``cost_file`` (of a step) are in the server's own format.
    """

    draft_length: Size
    threshold: Share = 0.0
    drafter: str = "DRAFTER"
    block_size: Count | None = None
    temperature: NonNegative = 0.0
    scheduled: bool = False
    scaling_file: str | None = None
    cost_file: str | None = None

    def __post_init__(self) -> None:
        for name in ("scaling_file", "cost_file"):
            if getattr(self, name) is not None and not self.scheduled:
                raise ValueError(f"{name} must come with scheduled=True, got {name} alone")


@dataclass(frozen=True)
class Program:
    """A trainer or a server that settings are exported for.

    Attributes:
        name: as its users call it.
        source: the state of its public source that the names were checked against.
        write: the settings as text, without that.
        packs: whether its rows hold one conversation (False), several (True), or either.
        pers: what its anchors can count for.
        layouts: of the blocks that it trains.
    """

    name: str
    source: str
    write: Callable[[Any], str]
    packs: Sequence[bool] = (False,)
    pers: Sequence[Per] = ("row",)
    layouts: Sequence[Layout] = ("anchor_predicts",)


@checked
def export(
    settings: TrainingSettings | ServingSettings,
    kind: str = "json",
    path: str | os.PathLike[str] | None = None,
) -> str:
    """The settings as text, which is also written to ``path`` where one is given.

    ``kind`` is "json", or one of ``TRAINERS`` (for training) or ``SERVERS`` (for serving). A
    ValueError where that program cannot do what was chosen, or refuses it.
    """
    programs = _programs(settings)
    if kind not in ("json", *programs):
        raise ValueError(f"kind must be one of {['json', *programs]}, got {kind!r}")
    # Numbers from a table are numpy's, which JSON does not know.
    plain = {name: v.item() for name, v in vars(settings).items() if isinstance(v, np.generic)}
    settings = replace(settings, **plain)
    if kind == "json":
        text = json.dumps(asdict(settings), indent=2)
    else:
        try:
            text = _written(settings, programs[kind])
        except ValueError as refusal:
            able = ", ".join(name for name, other in programs.items() if _writes(settings, other))
            who = "trainers" if programs is TRAINERS else "servers"
            raise ValueError(
                f"{refusal}; {who} that can: {able}" if able else str(refusal)
            ) from None
    text += "\n"
    if path is not None:
        with written_whole(Path(path)) as partial:
            partial.write_text(text, encoding="utf-8")
    return text


@checked
def exports(settings: TrainingSettings | ServingSettings) -> dict[str, str]:
    """:func:`export` to every program; where one refuses, why, as a comment."""
    texts = {}
    for kind in _programs(settings):
        try:
            texts[kind] = export(settings, kind)
        except ValueError as refusal:
            texts[kind] = f"# {refusal}\n"
    return texts


def _programs(settings: TrainingSettings | ServingSettings) -> dict[str, Program]:
    return TRAINERS if isinstance(settings, TrainingSettings) else SERVERS


def _written(settings: TrainingSettings | ServingSettings, program: Program) -> str:
    if isinstance(settings, TrainingSettings):
        _require_rows(settings, program)
    return f"# names as of {program.name}, {program.source}\n{program.write(settings)}"


def _writes(settings: TrainingSettings | ServingSettings, program: Program) -> bool:
    if isinstance(settings, ServingSettings) and settings.draft_length > (
        settings.block_size or math.inf
    ):
        # Some servers do draft slots that were never trained.
        return False
    try:
        return bool(_written(settings, program))
    except ValueError:
        return False


def _require_rows(s: TrainingSettings, program: Program) -> None:
    """Refuse rows, anchors per something, and blocks that a trainer does not make."""
    packed = s.pack_length is not None
    if packed not in program.packs:
        has = "a row for each conversation" if packed else "rows of as many as fit"
        raise ValueError(f"{program.name} always has {has}, got pack_length {s.pack_length}")
    # In a row of one conversation, or a batch of one row, they are the same.
    alike = (s.per == "document" and not packed) or (s.per == "batch" and s.batch_size == 1)
    if s.per not in program.pers and not (alike and "row" in program.pers):
        counts = f"{program.name} counts anchors per {' or '.join(program.pers)}"
        raise ValueError(f"{counts}, got per {s.per!r}")
    if s.layout not in program.layouts:
        trains = f"{program.name} trains every slot of a dspark block to predict"
        raise ValueError(f"{trains}, got layout {s.layout!r}")


def _lab_trains(s: TrainingSettings) -> str:
    text = (
        f"--num-anchors {s.num_anchors} --block-size {s.block_size} --max-length {s.seq_len} "
        f"--batch-size {s.batch_size} --loss-decay-gamma {s.loss_decay_gamma}"
    )
    if s.pack_length is not None:
        text += f" --pack-length {s.pack_length}"
    if s.per != "row":
        text += f" --anchors-per {s.per}"
    return text if s.layout == "anchor_predicts" else f"{text} --no-sample-from-anchor"


def _automodel(s: TrainingSettings) -> str:
    values: dict[str, Any] = {"seq_length": s.seq_len, "micro_batch_size": s.batch_size}
    if s.pack_length is not None:
        values["packed_sequence_size"] = s.pack_length
    values |= {"block_size": s.block_size, "num_anchors": s.num_anchors}
    text = _yaml("recipe_args", **values, loss_decay_gamma=s.loss_decay_gamma)
    if s.pack_length is not None and s.batch_size > 1:
        text = f"# a target under FlashAttention packs with micro_batch_size 1 alone\n{text}"
    return text


def _deepspec(s: TrainingSettings) -> str:
    values = {
        "model.block_size": s.block_size,
        "model.num_anchors": s.num_anchors,
        "model.loss_decay_gamma": s.loss_decay_gamma,
        "data.max_length": s.seq_len,
        "train.local_batch_size": s.batch_size,
    }
    given = " ".join(f'--opts "{name}={_scalar(value)}"' for name, value in values.items())
    # Without its online target it never reads data.max_length in training.
    notes = "# to train from a target cache, prepare the cache with these options, too\n"
    notes += f"# train.global_batch_size must be a multiple of {s.batch_size} x processes\n"
    return notes + given


def _specforge(s: TrainingSettings) -> str:
    values = {
        "training.strategy": "dspark",
        "training.num_anchors": s.num_anchors,
        "training.loss_decay_gamma": s.loss_decay_gamma,
        "training.batch_size": s.batch_size,
        "data.max_length": s.seq_len,
    }
    draft = json.dumps({"block_size": s.block_size})
    return f"# in the draft's config JSON (model.draft_model_config): {draft}\n{_dotted(values)}"


def _speculators(s: TrainingSettings) -> str:
    if s.batch_size > 1:
        raise ValueError(f"speculators has one packed row a step, got batch_size {s.batch_size}")
    if s.seq_len != s.pack_length:
        wanted = f"packed rows, so that seq_len must be pack_length {s.pack_length}"
        raise ValueError(f"speculators cuts at the length of its {wanted}, got {s.seq_len}")
    text = (
        f"--speculator-type dspark --block-size {s.block_size} --max-anchors {s.num_anchors} "
        f"--total-seq-len {s.pack_length} --dflash-decay-gamma {s.loss_decay_gamma}"
    )
    return text if s.layout == "anchor_predicts" else f"{text} --no-sample-from-anchor"


def _torchspec(s: TrainingSettings) -> str:
    values: dict[str, Any] = {"training.dflash_block_size": s.block_size}
    for name in ("dspark", "dflash"):
        values[f"training.{name}_num_anchors"] = s.num_anchors
        values[f"training.{name}_loss_decay_gamma"] = s.loss_decay_gamma
    values["training.micro_batch_size"] = s.batch_size
    values["training.max_seq_length"] = s.seq_len
    # Teachers and confidences are made of them.
    values["inference.store_last_hidden_states"] = "true"
    draft = "# model.draft_model_config must be a dspark draft's (its DFlash trainer reads dflash_)"
    return f"{draft}\n{_dotted(values)}"


def _lab_decodes(s: ServingSettings) -> str:
    given: dict[str, Any] = {}
    if s.draft_length:
        if s.block_size is not None and s.draft_length > s.block_size:
            _refuse_length(s, "this lab", "at most")
        given["draft_length"] = s.draft_length
        given |= {"threshold": s.threshold} if s.threshold else {}
        given |= {"scheduler": "scheduler"} if s.scheduled else {}
        given |= {"confidence_temperatures": "temperatures"} if s.scaling_file else {}
    given |= {"temperature": s.temperature} if s.temperature else {}
    drafter = "drafter" if s.draft_length else "None"
    return f"decode(target, {drafter}, prompts{''.join(f', {k}={v}' for k, v in given.items())})"


def _vllm(s: ServingSettings) -> str:
    if s.draft_length == 0:
        return "# without --speculative-config"
    _refuse_what_is_lacking(s, "vllm", ("scaling_file", "cost_file"))
    config: dict[str, Any] = {
        "method": "dspark",
        "model": s.drafter,
        "num_speculative_tokens": s.draft_length,
        "draft_sample_method": "probabilistic" if s.temperature else "greedy",
    }
    if s.scheduled:
        config["enable_adaptive_verification"] = True
    return _said(
        s,
        f"--speculative-config {shlex.quote(json.dumps(config))}",
        fewer="vLLM 0.26 refuses that of checkpoints with a dspark_block_size, later ones draft it",
        more="vLLM drafts slots that were never trained, and refuses it where n_predict is known",
    )


def _sglang(s: ServingSettings) -> str:
    if s.draft_length == 0:
        return "# without --speculative-algorithm"
    _refuse_what_is_lacking(s, "sglang")
    if s.scheduled and s.cost_file is None:
        raise ValueError("sglang schedules by a table of step costs: scheduled needs a cost_file")
    flags = {
        "algorithm": "DSPARK",
        "draft-model-path": s.drafter,
        "dspark-block-size": str(s.draft_length),
        "dspark-sps-table-path": s.cost_file,
        "dspark-confidence-sts-path": s.scaling_file,
    }
    given = (f"--speculative-{name} {shlex.quote(v)}" for name, v in flags.items() if v is not None)
    note = "# schedules with SGLANG_RAGGED_VERIFY_MODE=compact in the environment alone\n"
    return _said(
        s,
        (note if s.scheduled else "") + " ".join(given),
        fewer="SGLang drafts and verifies as many as the flag says",
        more="SGLang drafts slots that were never trained",
    )


def _tensorrt_llm(s: ServingSettings) -> str:
    if s.draft_length == 0:
        return "# without speculative_config"
    _refuse_what_is_lacking(s, "tensorrt-llm")
    if s.block_size is not None and s.draft_length != s.block_size:
        _refuse_length(s, "tensorrt-llm", "")
    if s.scheduled and s.cost_file is None and s.scaling_file is None:
        needs = "scheduled needs a cost_file or a scaling_file"
        raise ValueError(f"tensorrt-llm refuses to schedule without either: {needs}")
    values: dict[str, Any] = {
        "decoding_type": "DSpark",
        "speculative_model": _quoted(s.drafter),
        "max_draft_len": s.draft_length,
    }
    if s.scheduled:
        values["enable_confidence_scheduling"] = "true"
        files = {"confidence_sts_path": s.scaling_file, "confidence_sps_table_path": s.cost_file}
        values |= {name: _quoted(file) for name, file in files.items() if file is not None}
    text = _yaml("speculative_config", **values)
    if s.scheduled:
        later = "confidence_calibration_path and confidence_cost_table_path in 1.4.0rc4"
        text = f"# the two files are {later}\n{text}"
    return text


def _llama_cpp(s: ServingSettings) -> str:
    if s.draft_length == 0:
        return "# without --spec-type"
    if s.scheduled:
        raise ValueError("llama.cpp has no scheduler of verification: choose scheduled=False")
    other = "--spec-draft-p-min is one on the drafter's own probability"
    _refuse_what_is_lacking(s, "llama.cpp", but=f"; its {other}")
    return _said(
        s,
        f"--spec-type draft-dspark -md {shlex.quote(s.drafter)} "
        f"--spec-draft-n-max {s.draft_length} --spec-draft-p-min 0",
        fewer="llama.cpp drafts the whole block and verifies as many as the flag says",
        more=f"llama.cpp drafts {s.block_size}",
    )


def _refuse_what_is_lacking(
    s: ServingSettings, server: str, names: Sequence[str] = (), but: str = ""
) -> None:
    if s.threshold:
        lacking = f"{server} has no threshold on the confidence of a slot{but}"
        raise ValueError(f"{lacking}: choose threshold 0, got {s.threshold}")
    for name in names:
        if getattr(s, name):
            raise ValueError(f"{server} takes no {name}, got {getattr(s, name)!r}")


def _refuse_length(s: ServingSettings, server: str, most: str) -> None:
    wanted = f"{most} the block of the drafter, {s.block_size} slots".strip()
    raise ValueError(f"draft_length must be {wanted}, for {server}, got {s.draft_length}")


def _said(s: ServingSettings, text: str, *, fewer: str, more: str) -> str:
    """``text`` under a comment where the drafter's block is known and of another length."""
    if s.block_size is None or s.draft_length == s.block_size:
        return text
    comment = fewer if s.draft_length < s.block_size else more
    return f"# {s.draft_length} slots of a block of {s.block_size}: {comment}\n{text}"


def _yaml(head: str, **values: Any) -> str:
    return "\n".join([f"{head}:", *(f"  {name}: {_scalar(v)}" for name, v in values.items())])


def _quoted(text: str) -> str:
    """In YAML's double quotes; JSON's escapes of characters beyond the first plane are not YAML."""
    return json.dumps(text, ensure_ascii=False)


def _scalar(value: Any) -> str:
    """As YAML reads it, to which a number without a point before its exponent is text."""
    text = str(value)
    bare = isinstance(value, float) and "." not in text
    return text.replace("e", ".0e") if bare else text


def _dotted(values: dict[str, Any]) -> str:
    return " ".join(f"{name}={value}" for name, value in values.items())


_OWN = f"version {dspark_lab.__version__}"
TRAINERS: dict[str, Program] = {
    "dspark-lab": Program("dspark-lab", _OWN, _lab_trains, (False, True), PER, get_args(Layout)),
    "nemo-automodel": Program("NeMo AutoModel", "commit 014468d", _automodel, (False, True)),
    "deepspec": Program("DeepSpec", "commit 8c483c7", _deepspec),
    "specforge": Program("SpecForge", "commit 0145bec", _specforge),
    # A step is one packed row, so a row's anchors are those of the batch.
    "speculators": Program(
        "speculators", "commit 4286800", _speculators, (True,), ("row", "batch"), get_args(Layout)
    ),
    "torchspec": Program("TorchSpec", "commit 7f1e090", _torchspec),
}
SERVERS: dict[str, Program] = {
    "dspark-lab": Program("dspark-lab", _OWN, _lab_decodes),
    "vllm": Program("vLLM", "commit 002e77c (later than 0.26)", _vllm),
    "sglang": Program("SGLang", "public source and cookbook of August to September 2026", _sglang),
    "tensorrt-llm": Program(
        "TensorRT-LLM", "public source of August to September 2026", _tensorrt_llm
    ),
    "llama.cpp": Program("llama.cpp", "pull requests 25173 and 25246", _llama_cpp),
}
