"""Check the output of a trainer's forward pass: labels, supervision, confidence and teacher."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from dspark_lab.attention.findings import Finding, Findings
from dspark_lab.attention.output_view import OutputView, chunks
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
    batch, rule = _rule(batch, blocks)
    given, found = _given(output, rule)
    view = OutputView(rule, batch, given, to_text)
    found += [*_kept(view), *_labels(view), *_supervision(view), *_finite(view)]
    found += [*_confidence(view), *teacher_findings(view, target_logits), *_meaning(view)]
    return Findings("the forward pass", tuple(found))


def _rule(batch: Batch, blocks: Blocks) -> tuple[Batch, Blocks]:
    """The rows and the blocks as they should be, on the host."""
    if batch.input_ids.shape != blocks.doc_ids.shape:
        wanted = f"the rows of blocks, {tuple(blocks.doc_ids.shape)}"
        raise ValueError(f"batch must be {wanted}, got {tuple(batch.input_ids.shape)}")
    batch = batch.to("cpu")
    where = blocks.anchor_positions.cpu(), blocks.block_keep_mask.cpu()
    seq_len = blocks.seq_len
    if where[0].numel() and not 0 <= int(where[0].min()) <= int(where[0].max()) < seq_len:
        got = f"{int(where[0].min())} to {int(where[0].max())}"
        raise ValueError(f"blocks must have anchors in [0, {seq_len - 1}], got {got}")
    options: dict[str, Any] = {"mask_token_id": blocks.mask_token_id, "layout": blocks.layout}
    return batch, cut_blocks(batch, *where, blocks.block_size, **options)


def _given(
    output: DSparkForwardOutput | Mapping[str, Any], rule: Blocks
) -> tuple[dict[str, Tensor], list[Finding]]:
    """The tensors, of the predicting slots alone, and what is odd about their shapes."""
    names = [field.name for field in fields(DSparkForwardOutput)]
    if not isinstance(output, Mapping):
        output = {name: getattr(output, name) for name in names}
    missing = [
        name for name in ("target_ids", "eval_mask", "block_keep_mask") if name not in output
    ]
    if missing:
        raise ValueError(
            f"output must hold {', '.join(missing)}, got {', '.join(output) or 'none'}"
        )
    given = {name: output[name] for name in names if output.get(name) is not None}
    for name, value in given.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
        kind = {"target_ids": "int", "eval_mask": "", "block_keep_mask": ""}.get(name, "float")
        if kind not in str(value.dtype):
            raise TypeError(f"{name} must hold {kind}s, got {value.dtype}")
    found = []
    rows, anchors, labels = rule.eval_mask.shape
    confidence = given.get("confidence_pred")
    if confidence is not None and confidence.ndim == 4 and confidence.shape[3] == 1:
        given["confidence_pred"] = confidence.squeeze(3)
        found.append(
            Finding(_SHAPES, "broken", "confidence_pred has an axis too many, of length 1")
        )
    slots = rule.block_size if given["target_ids"].shape[2:3] == (rule.block_size,) else labels
    for name, value in given.items():
        shape = (rows, anchors) if name == "block_keep_mask" else (rows, anchors, slots)
        right = value.shape[: len(shape)] == shape
        if not right or value.ndim != len(shape) + name.endswith("logits"):
            axes = ", ".join([*map(str, shape), *(["vocab"] if name.endswith("logits") else [])])
            raise ValueError(f"{name} must be [{axes}], got shape {tuple(value.shape)}")
    if slots != labels:
        counted = given["eval_mask"][:, :, 0].bool()
        if counted.any():
            of: dict[str, Any] = {"count": int(counted.sum()), "of": counted.numel()}
            found.append(Finding(_GIVEN, "broken", "the given anchor itself is supervised", **of))
        else:
            found.append(Finding(_GIVEN, "held", of=counted.numel()))
        each = ((n, t if n == "block_keep_mask" else t[:, :, 1:]) for n, t in given.items())
        given = dict(each)
    return given, found or [Finding(_SHAPES, "held", of=len(given), unit="tensors")]


def _kept(view: OutputView) -> Iterator[Finding]:
    keep = view.given["block_keep_mask"].bool().cpu().numpy()
    wrong = keep != view.kept[..., 0]
    if wrong.any():
        row, block = map(int, np.argwhere(wrong)[0])
        place: dict[str, Any] = {"row": row, "block": block, "place": f"row {row}, block {block}"}
        finding = "block_keep_mask differs from that of the blocks"
        yield Finding(_KEEP, "broken", finding, int(wrong.sum()), wrong.size, **place)
    else:
        yield Finding(_KEEP, "held", of=wrong.size)


def _labels(view: OutputView) -> Iterator[Finding]:
    """Labels of supervised slots, and the shift or the block that explains wrong ones."""
    mine = view.given["target_ids"].long().cpu().numpy()
    judged = (view.right | view.mine) & view.kept & view.in_row(view.labels)
    wrong = judged & (mine != view.at(view.tokens, view.labels))
    if not wrong.any():
        yield view.held(_LABELS, judged)
        return
    everywhere = np.ones_like(judged)
    ways = {
        f"the labels are {count} too {side}": (view.labels + sign * shift, everywhere)
        for shift, count in ((1, "one token"), (2, "two tokens"))
        for sign, side in ((-1, "early"), (1, "late"))
    }
    for side, step in (("before", 1), ("after", -1)):
        moved = np.roll(view.labels, step, axis=1), np.roll(view.kept, step, axis=1)
        ways[f"the labels are those of the block {side}"] = moved
    fits = {}
    for finding, (places, known) in ways.items():
        valid = judged & known & view.in_row(places)
        same = valid & (mine == view.at(view.tokens, places))
        fits[finding] = same.sum() / max(1, valid.sum()) if 2 * valid.sum() >= judged.sum() else 0
    best = max(fits, key=lambda finding: fits[finding])
    explained = fits[best] >= 0.95 and wrong.sum() > 0.1 * judged.sum()
    yield view.found(_LABELS, best if explained else "labels are other tokens", wrong, judged)


def _supervision(view: OutputView) -> Iterator[Finding]:
    """Which slots are supervised, and which of the conditions the others break."""
    mine, right, labels = view.mine, view.right, view.labels
    for side, shift in (("early", -1), ("late", 1)):
        if (mine != right).any() and (mine == _supervised(view, labels + shift)).all():
            finding = f"supervision is taken one token too {side}"
            yield view.found(_LOSS, finding, mine != right, mine | right)
            return
    extra, cases = mine & ~right, mine | right
    same_document = labels <= view.last[..., None]
    hole = np.cumsum(~mine & ~right, axis=2) > 0
    kinds = {
        _DUMMIES: ("dummy blocks are supervised", ~view.kept),
        _ROW: ("supervision reaches past the end of the row", ~view.in_row(labels)),
        _DOCUMENT: ("supervision crosses into the next document", ~same_document),
        _LOSS: ("tokens that are not supervised are learnt", ~view.at(view.loss, labels)),
        _PREFIX: ("supervision jumps over a gap", hole),
    }
    for rule, (finding, broken) in kinds.items():
        slots = extra & broken
        extra = extra & ~broken
        yield view.found(rule, finding, slots, cases) if slots.any() else view.held(rule, cases)
    missing = right & ~mine
    if not missing.any():
        yield view.held(_COMPLETE, right)
    never = right.any((0, 1)) & ~(right & mine).any((0, 1))
    for slot in np.nonzero(never)[0] if not never.all() else ():
        number = int(slot) + view.rule.block_size - view.rule.predicted
        slots = missing & (np.arange(right.shape[2]) == slot)
        yield view.found(_COMPLETE, f"slot {number} is never supervised", slots, right)
        missing = missing & ~slots
    whole = missing & ~mine.any(2, keepdims=True)
    for slots, finding in (
        (whole, "whole blocks are not supervised"),
        (missing & ~whole, "slots that may be supervised are not"),
    ):
        if slots.any():
            yield view.found(_COMPLETE, finding, slots, right)


def _supervised(view: OutputView, labels: np.ndarray) -> np.ndarray:
    """What would be supervised if these were the labels' places."""
    good = view.kept & view.in_row(labels) & (labels <= view.last[..., None])
    return np.cumprod(good & view.at(view.loss, labels), axis=2).astype(bool)


def _finite(view: OutputView) -> Iterator[Finding]:
    """NaN and infinities where they count; -inf may stand for a token that is ruled out."""
    slots, held = view.right | (view.mine & view.kept & view.in_row(view.labels)), 0
    targets = view.given["target_ids"].long().cpu()
    for name in ("draft_logits", "aligned_target_logits", "confidence_pred"):
        values = view.given.get(name)
        if values is None:
            continue
        bad = np.zeros_like(slots)
        if name == "confidence_pred":
            bad = slots & ~values.isfinite().cpu().numpy()
        else:
            parts = []
            for part, chosen in chunks(values, slots):
                wrong = part.isnan() | (part == torch.inf)
                odd = wrong.any(1) | (part == -torch.inf).all(1)
                if name == "draft_logits":
                    label = targets[chosen].to(part.device).clamp(0, part.shape[1] - 1)
                    odd |= part.gather(1, label[:, None])[:, 0] == -torch.inf
                parts.append(odd.cpu())
            bad[slots] = torch.cat(parts).numpy() if parts else False
        if bad.any():
            yield view.found(_FINITE, f"{name} holds NaN or inf", bad, slots)
        else:
            held += 1
    if held and not bad.any():
        yield view.held(_FINITE, slots)


def _confidence(view: OutputView) -> Iterator[Finding]:
    """A probability in a logit's place: many numbers, none below 0 or above 1."""
    given = view.given.get("confidence_pred")
    values = np.zeros(0) if given is None else given.detach().double().cpu().numpy()[view.right]
    values = values[np.isfinite(values)]
    if len(values) < 16:
        yield Finding(_LOGIT, "no case")
    elif values.min() >= 0 and values.max() <= 1 and values.max() - values.min() > 0.01:
        finding = "the confidence looks like a probability: all lie in [0, 1]"
        counted: dict[str, Any] = {"count": len(values), "of": len(values), "unit": "slots"}
        yield Finding(_LOGIT, "likely broken", finding, **counted)
    else:
        yield view.held(_LOGIT, len(values))


def _meaning(view: OutputView) -> Iterator[Finding]:
    idle = ~view.right
    if idle.any():
        finding = "slots past the row, behind a gap and of dummy blocks may hold anything"
        counted: dict[str, Any] = {"count": int(idle.sum()), "of": idle.size, "unit": "slots"}
        yield Finding(_MEANING, "note", finding, **counted)
