"""Check a trainer's forward pass: inputs, labels, supervision, confidence and teacher."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from dspark_lab.attention.findings import Finding, Findings, require_rows
from dspark_lab.attention.output_view import OutputView, by_slot
from dspark_lab.attention.teacher_faults import teacher_findings
from dspark_lab.blocks import Blocks, cut_blocks
from dspark_lab.chats import Batch
from dspark_lab.checks import checked
from dspark_lab.common import DSparkForwardOutput

_SHAPES = "each tensor has a place for each predicting slot"
_GIVEN = "slot 0, the given anchor, predicts nothing"
_KEEP = "block_keep_mask is that of the blocks"
_LABELS = "each slot's label is the token that it predicts"
_DUMMIES = "dummy blocks are not supervised"
_ROW = "nothing past the end of the row is supervised"
_DOCUMENT = "supervision ends with the document"
_LOSS = "only supervised tokens are learnt"
_PREFIX = "a block's supervision is one run from its first slot"
_COMPLETE = "every slot that may be supervised is"
_LOGIT = "the confidence is a logit"
_FINITE = "supervised slots hold finite numbers"
_MEANING = "what other slots hold has no meaning"
_NEEDED = "target_ids", "eval_mask", "block_keep_mask"


@checked
def check_forward(
    output: DSparkForwardOutput | Mapping[str, Any],
    batch: Batch,
    blocks: Blocks,
    *,
    target_logits: Float[Tensor, "batch seq vocab"] | None = None,
    to_text: Callable[[int], str] | None = None,
) -> Findings:
    """Hold a forward pass against the rules: each in words, held or broken, where first.

    Slots that are not supervised may hold anything. Where the anchor is given, tensors may have a
    place for slot 0 too.

    Args:
        output: a ``DSparkForwardOutput``, or a mapping of its tensors; without ``draft_logits``,
            ``confidence_pred`` or ``aligned_target_logits`` their rules have no case.
        batch, blocks: the rows and the blocks that went in; of the blocks only anchors, keep mask,
            size and layout count.
        target_logits: the target's logits of every token of the rows. With them the teacher is
            compared exactly. Without, teachers of the same place must agree, and a shift is
            claimed only where it makes the row's own tokens clearly more probable (*likely
            broken*); for one position early that can have another reason, then it is *unsure*.
        to_text: such as ``tokenizer.decode``, for the texts of tokens.

    Raises:
        TypeError, ValueError: a tensor is missing, or is of other sizes.
    """
    require_rows(blocks, batch)
    batch = batch.to("cpu")
    where = blocks.anchor_positions.cpu(), blocks.block_keep_mask.cpu(), blocks.block_size
    options: dict[str, Any] = {"mask_token_id": blocks.mask_token_id, "layout": blocks.layout}
    rule = cut_blocks(batch, *where, **options)
    given, found = _given(output, rule)
    view = OutputView(rule, batch, given, to_text)
    found += [_kept(view), _labels(view), *_supervision(view), *_finite(view), _confidence(view)]
    found += [*teacher_findings(view, target_logits), *_meaning(view)]
    return Findings("the forward pass", tuple(found))


def _given(
    output: DSparkForwardOutput | Mapping[str, Any], rule: Blocks
) -> tuple[dict[str, Tensor], list[Finding]]:
    """The tensors, of the predicting slots alone, and what is odd about their shapes."""
    names = [field.name for field in fields(DSparkForwardOutput)]
    if not isinstance(output, Mapping):
        output = {name: getattr(output, name) for name in names}
    given = {name: output[name] for name in names if output.get(name) is not None}
    missing = [name for name in _NEEDED if name not in given]
    if missing:
        got = ", ".join(given) or "none"
        raise ValueError(f"output must hold {', '.join(missing)}, got {got}")
    for name, value in given.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
        kind = "int" if name == "target_ids" else "" if name in _NEEDED else "float"
        if kind not in str(value.dtype):
            raise TypeError(f"{name} must hold {kind}s, got {value.dtype}")
    found = []
    rows, anchors, labels = rule.eval_mask.shape
    confidence = given.get("confidence_pred")
    if confidence is not None and confidence.ndim == 4 and confidence.shape[3] == 1:
        given["confidence_pred"] = confidence.squeeze(3)
        found = [Finding(_SHAPES, "broken", "confidence_pred has an axis too many, of length 1")]
    slots = rule.block_size if given["target_ids"].shape[2:3] == (rule.block_size,) else labels
    for name, value in given.items():
        wanted = (rows, anchors) if name == "block_keep_mask" else (rows, anchors, slots)
        logits = name.endswith("logits")
        if value.shape[: len(wanted)] != wanted or value.ndim != len(wanted) + logits:
            axes = ", ".join([*map(str, wanted), *(["vocab"] if logits else [])])
            raise ValueError(f"{name} must be [{axes}], got shape {tuple(value.shape)}")
    if slots != labels:
        counted = given["eval_mask"][:, :, 0].bool()
        number, of = int(counted.sum()), counted.numel()
        said = "the given anchor itself is supervised" if number else ""
        found.append(Finding(_GIVEN, "broken" if number else "held", said, number, of))
        given = {n: t if n == "block_keep_mask" else t[:, :, 1:] for n, t in given.items()}
    return given, found or [Finding(_SHAPES, "held", of=len(given), unit="tensors")]


def _kept(view: OutputView) -> Finding:
    keep = view.given["block_keep_mask"].bool().cpu().numpy()
    wrong = keep != view.kept[..., 0]
    if not wrong.any():
        return Finding(_KEEP, "held", of=wrong.size)
    row, block = map(int, np.argwhere(wrong)[0])
    place: dict[str, Any] = {"row": row, "block": block, "place": f"row {row}, block {block}"}
    finding = "block_keep_mask differs from that of the blocks"
    return Finding(_KEEP, "broken", finding, int(wrong.sum()), wrong.size, **place)


def _labels(view: OutputView) -> Finding:
    """Labels of supervised slots, and the shift or the block that explains wrong ones."""
    mine = view.given["target_ids"].long().cpu().numpy()
    judged = (view.right | view.mine) & view.kept & view.in_row(view.labels)
    wrong = judged & (mine != view.at(view.tokens, view.labels))
    if not wrong.any():
        return view.report.held(_LABELS, judged)
    ways = {
        f"the labels are {count} too {side}": (view.labels + sign * shift, judged)
        for shift, count in ((1, "one token"), (2, "two tokens"))
        for sign, side in ((-1, "early"), (1, "late"))
    }
    for side, step in (("before", 1), ("after", -1)):
        moved = np.roll(view.labels, step, axis=1), judged & np.roll(view.kept, step, axis=1)
        ways[f"the labels are those of the block {side}"] = moved
    fits = {"labels are other tokens": 0.95}
    for finding, (places, valid) in ways.items():
        valid = valid & view.in_row(places)
        if 2 * valid.sum() >= judged.sum() and wrong.sum() > 0.1 * judged.sum():
            fits[finding] = (mine == view.at(view.tokens, places))[valid].mean()
    return view.report.found(_LABELS, max(fits, key=lambda name: fits[name]), wrong, judged)


def _supervision(view: OutputView) -> Iterator[Finding]:
    """Which slots are supervised, and which of the conditions the others break."""
    mine, right, labels, report = view.mine, view.right, view.labels, view.report

    def good(places: np.ndarray) -> dict[str, np.ndarray]:
        """The conditions on labels at these places."""
        return {
            "dummy blocks are supervised": view.kept,
            "supervision reaches past the end of the row": view.in_row(places),
            "supervision crosses into the next document": places <= view.last[..., None],
            "tokens that are not supervised are learnt": view.at(view.loss, places),
        }

    for side, shift in (("early", -1), ("late", 1)):
        beside = np.all(list(good(labels + shift).values()), axis=0)
        if (mine != right).any() and (mine == np.cumprod(beside, axis=2)).all():
            finding = f"supervision is taken one token too {side}"
            yield report.found(_LOSS, finding, mine != right, mine | right)
            return
    extra, cases = mine & ~right, mine | right
    run = np.cumsum(~cases, axis=2) == 0
    conditions = good(labels) | {"supervision jumps over a gap": run}
    for rule, (finding, holds) in zip(
        (_DUMMIES, _ROW, _DOCUMENT, _LOSS, _PREFIX), conditions.items(), strict=True
    ):
        slots, extra = extra & ~holds, extra & holds
        yield report.found(rule, finding, slots, cases) if slots.any() else report.held(rule, cases)
    missing = right & ~mine
    if not missing.any():
        yield report.held(_COMPLETE, right)
    never = right.any((0, 1)) & ~(right & mine).any((0, 1))
    parts = {"whole blocks are not supervised": ~mine.any(2, keepdims=True)}
    if not never.all():
        slot = np.arange(right.shape[2])
        first = view.report.first_slot
        single = {f"slot {k + first} is never supervised": slot == k for k in np.nonzero(never)[0]}
        parts = single | parts
    for finding, part in (parts | {"slots that may be supervised are not": missing}).items():
        slots, missing = missing & part, missing & ~part
        if slots.any():
            yield report.found(_COMPLETE, finding, slots, right)


def _finite(view: OutputView) -> Iterator[Finding]:
    """NaN and infinities where they count; -inf may stand for a token that is ruled out."""
    slots, good = view.right | (view.mine & view.kept & view.in_row(view.labels)), False
    targets = view.given["target_ids"].long().cpu()
    for name in ("draft_logits", "aligned_target_logits", "confidence_pred"):
        if (values := view.given.get(name)) is None:
            continue

        def odd(part: Tensor, places: np.ndarray, name: str = name) -> Tensor:
            ruled_out = part == -torch.inf
            bad = (part.isnan() | (part == torch.inf)).any(1) | ruled_out.all(1)
            if name == "draft_logits":
                label = targets[tuple(places.T)].to(part.device).clamp(0, part.shape[1] - 1)
                bad |= ruled_out.gather(1, label[:, None])[:, 0]
            return bad

        bad = by_slot(values if values.ndim == 4 else values.unsqueeze(3), slots, odd)
        good |= not bad.any()
        if bad.any():
            yield view.report.found(_FINITE, f"{name} holds NaN or inf", bad, slots)
    if good:
        yield view.report.held(_FINITE, slots)


def _confidence(view: OutputView) -> Finding:
    """A probability in a logit's place: many numbers, none below 0 or above 1."""
    given = view.given.get("confidence_pred")
    if given is None:
        return Finding(_LOGIT, "no case")
    values = given.detach().double().cpu().numpy()
    judged = view.right & np.isfinite(values)
    values = values[judged]
    if len(values) < 16:
        return Finding(_LOGIT, "no case")
    if values.min() >= 0 and values.max() <= 1 and values.max() - values.min() > 0.01:
        finding = "the confidence looks like a probability: all lie in [0, 1]"
        return Finding(_LOGIT, "likely broken", finding, len(values), len(values), "slots")
    return view.report.held(_LOGIT, judged)


def _meaning(view: OutputView) -> Iterator[Finding]:
    idle = ~view.right
    if idle.any():
        finding = "slots past the row, behind a gap and of dummy blocks may hold anything"
        yield Finding(_MEANING, "note", finding, int(idle.sum()), idle.size, "slots")
