"""Check the output of a trainer's forward pass: labels, supervision, confidence and teacher."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from dspark_lab.attention.findings import Finding, Findings, Verdict, token_shown
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
_TEACHER = "the teacher is the target's distribution behind the token before the label"
_OVERLAP = "teachers agree where blocks overlap"
_MEANING = "what other slots hold has no meaning"

# Logits that are looked at together, and slots that are enough to know a shift.
_CHUNK, _SAMPLE = 2**24, 512
# Positions that a claim from likelihoods needs, and their paired difference in standard errors.
_POSITIONS, _SURE = 32, 6.0


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
    view = _View(rule, batch, given, to_text)
    found += [*_kept(view), *_labels(view), *_supervision(view), *_finite(view)]
    found += [*_confidence(view), *_teacher(view, target_logits), *_meaning(view)]
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
            of = {"count": int(counted.sum()), "of": counted.numel()}
            found.append(Finding(_GIVEN, "broken", "the given anchor itself is supervised", **of))
        else:
            found.append(Finding(_GIVEN, "held", of=counted.numel()))
        each = ((n, t if n == "block_keep_mask" else t[:, :, 1:]) for n, t in given.items())
        given = dict(each)
    return given, found or [Finding(_SHAPES, "held", of=len(given), unit="tensors")]


class _View:
    """The output and the rule as arrays, and how a finding is made from slots."""

    def __init__(
        self,
        rule: Blocks,
        batch: Batch,
        given: dict[str, Tensor],
        to_text: Callable[[int], str] | None,
    ) -> None:
        self.rule, self.given, self.to_text = rule, given, to_text
        self.tokens, self.docs = batch.input_ids.numpy(), rule.doc_ids.numpy()
        self.loss = (batch.loss_mask.double() > 0.5).numpy()
        anchor = rule.anchor_positions.long().numpy()
        self.last = anchor + np.take_along_axis(batch.doc_remaining.numpy(), anchor, 1)
        self.labels, self.right = rule.label_indices.numpy(), rule.eval_mask.numpy()
        self.kept = np.broadcast_to(rule.block_keep_mask.numpy()[..., None], self.right.shape)
        self.mine = (given["eval_mask"].cpu().double() > 0.5).numpy()
        self.row = np.broadcast_to(np.arange(len(self.tokens))[:, None, None], self.right.shape)

    def at(self, values: np.ndarray, places: np.ndarray) -> np.ndarray:
        """A row's values at places of it, those past its ends at its ends."""
        return values[self.row, places.clip(0, values.shape[1] - 1)]

    def in_row(self, places: np.ndarray) -> np.ndarray:
        return (places >= 0) & (places < self.tokens.shape[1])

    def found(
        self,
        rule: str,
        finding: str,
        slots: np.ndarray,
        among: np.ndarray,
        verdict: Verdict = "broken",
    ) -> Finding:
        row, block, slot = map(int, np.argwhere(slots)[0])
        key, token, shown = int(self.labels[row, block, slot]), None, ""
        if key < self.tokens.shape[1]:
            token, shown = token_shown(int(self.tokens[row, key]), self.to_text)
        words = [f"row {row}"] if len(self.tokens) > 1 else []
        first = self.rule.block_size - self.rule.predicted
        words += [f"block {block}", f"slot {slot + first}", f"label {key}{shown}"]
        place = {"row": row, "block": block, "slot": slot + first, "key": key, "token": token}
        counted = {"count": int(slots.sum()), "of": int(among.sum()), "unit": "slots"}
        return Finding(rule, verdict, finding, **counted, **place, place=", ".join(words))

    def held(self, rule: str, among: Any) -> Finding:
        of = int(np.sum(among))
        return Finding(rule, "held" if of else "no case", of=of, unit="slots")


def _kept(view: _View) -> Iterator[Finding]:
    keep = view.given["block_keep_mask"].bool().cpu().numpy()
    wrong = keep != view.kept[..., 0]
    if wrong.any():
        row, block = map(int, np.argwhere(wrong)[0])
        place = {"row": row, "block": block, "place": f"row {row}, block {block}"}
        finding = "block_keep_mask differs from that of the blocks"
        yield Finding(_KEEP, "broken", finding, int(wrong.sum()), wrong.size, **place)
    else:
        yield Finding(_KEEP, "held", of=wrong.size)


def _labels(view: _View) -> Iterator[Finding]:
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


def _supervision(view: _View) -> Iterator[Finding]:
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


def _supervised(view: _View, labels: np.ndarray) -> np.ndarray:
    """What would be supervised if these were the labels' places."""
    good = view.kept & view.in_row(labels) & (labels <= view.last[..., None])
    return np.cumprod(good & view.at(view.loss, labels), axis=2).astype(bool)


def _finite(view: _View) -> Iterator[Finding]:
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
            for part, chosen in _chunks(values, slots):
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


def _chunks(values: Tensor, slots: np.ndarray) -> Iterator[tuple[Tensor, tuple[Tensor, ...]]]:
    """Logits of chosen slots, a few slots at a time, with their places."""
    places = torch.from_numpy(np.argwhere(slots))
    for part in places.split(max(1, _CHUNK // values.shape[-1])):
        chosen = part.unbind(1)
        yield values.detach()[tuple(axis.to(values.device) for axis in chosen)], chosen


def _confidence(view: _View) -> Iterator[Finding]:
    """A probability in a logit's place: many numbers, none below 0 or above 1."""
    given = view.given.get("confidence_pred")
    values = np.zeros(0) if given is None else given.detach().double().cpu().numpy()[view.right]
    values = values[np.isfinite(values)]
    if len(values) < 16:
        yield Finding(_LOGIT, "no case")
    elif values.min() >= 0 and values.max() <= 1 and values.max() - values.min() > 0.01:
        finding = "the confidence looks like a probability: all lie in [0, 1]"
        counted = {"count": len(values), "of": len(values), "unit": "slots"}
        yield Finding(_LOGIT, "likely broken", finding, **counted)
    else:
        yield view.held(_LOGIT, len(values))


def _teacher(view: _View, target_logits: Tensor | None) -> Iterator[Finding]:
    """The teacher's place: exactly from the target's logits, or from what teachers say."""
    teacher = view.given.get("aligned_target_logits")
    usable = view.right & view.mine
    if teacher is not None:
        finite = [~part.isnan().any(1).cpu() for part, _ in _chunks(teacher, usable)]
        good = np.zeros_like(usable)
        good[usable] = torch.cat(finite).numpy() if finite else False
        usable = good
    if teacher is None or not usable.any():
        yield Finding(_TEACHER, "no case")
        return
    if target_logits is not None:
        rows, wanted = tuple(view.tokens.shape), target_logits.shape[2]
        if tuple(target_logits.shape[:2]) != rows or teacher.shape[-1] != wanted:
            size = f"[{rows[0]}, {rows[1]}, {teacher.shape[-1]}]"
            raise ValueError(f"target_logits must be {size}, got {tuple(target_logits.shape)}")
        yield _against_target(view, teacher, target_logits, usable)
        return
    yield _against_each_other(view, teacher, usable)
    yield _against_tokens(view, teacher, usable)


def _gap(left: Tensor, right: Tensor) -> np.ndarray:
    """How far apart the distributions of rows are: the mean difference of log-probabilities."""
    difference = left.float().log_softmax(-1) - right.to(left.device).float().log_softmax(-1)
    return difference.abs().nan_to_num(0.0, 0.0).mean(-1).cpu().numpy()


def _sample(slots: np.ndarray, most: int = _SAMPLE) -> np.ndarray:
    """Some of the slots, evenly, as places."""
    places = np.argwhere(slots)
    return places[np.unique(np.linspace(0, len(places) - 1, min(most, len(places))).astype(int))]


def _at(logits: Tensor, *places: np.ndarray) -> Tensor:
    return logits.detach()[tuple(torch.from_numpy(p).to(logits.device) for p in places)]


def _against_target(view: _View, teacher: Tensor, target: Tensor, usable: np.ndarray) -> Finding:
    """Every teacher against the target's logits at its place; if they differ, at others' places."""
    behind = view.labels - 1
    sample = _sample(usable)
    places = behind[tuple(sample.T)]
    mine, row = _at(teacher, *sample.T), sample[:, 0]
    shifts = {}
    for shift in (0, -1, 1, -2, 2):
        inside = (places + shift >= 0) & (places + shift < target.shape[1])
        if inside.any():
            other = _at(target, row[inside], places[inside] + shift)
            shifts[shift] = float(
                _gap(mine[torch.from_numpy(inside).to(mine.device)], other).mean()
            )
    next_place = np.where(places + 1 < target.shape[1], places + 1, places - 1).clip(0)
    usual = float(_gap(_at(target, row, places), _at(target, row, next_place)).mean())
    limit = 0.1 * usual
    wrong = np.zeros_like(usable)
    parts = []
    for part, chosen in _chunks(teacher, usable):
        at = torch.from_numpy(behind[tuple(axis.numpy() for axis in chosen)])
        parts.append(_gap(part, _at(target, chosen[0].numpy(), at.numpy())) > max(limit, 1e-4))
    wrong[usable] = np.concatenate(parts)
    if not wrong.any():
        return view.held(_TEACHER, usable)
    best = min(shifts, key=lambda shift: shifts[shift])
    finding = "the teacher is another distribution than the target's"
    if best and shifts[best] <= limit:
        count = {1: "one position", 2: "two positions"}[abs(best)]
        finding = f"the teacher is {count} {'late' if best > 0 else 'early'}"
    return view.found(_TEACHER, finding, wrong, usable)


def _against_each_other(view: _View, teacher: Tensor, usable: np.ndarray) -> Finding:
    """Slots of different blocks that predict the same token have the same teacher."""
    places = np.argwhere(usable)
    label = view.labels[usable] + places[:, 0] * view.tokens.shape[1]
    order = np.argsort(label, kind="stable")
    again = np.nonzero(label[order][1:] == label[order][:-1])[0]
    if len(again) == 0:
        return Finding(_OVERLAP, "no case")
    again = again[np.unique(np.linspace(0, len(again) - 1, min(_SAMPLE, len(again))).astype(int))]
    first, second = places[order[again]], places[order[again + 1]]
    gap = _gap(_at(teacher, *first.T), _at(teacher, *second.T))
    different = places[_unlike(label)]
    usual = _gap(_at(teacher, *different[:-1].T), _at(teacher, *different[1:].T)).mean()
    bad = gap > max(0.1 * float(usual), 1e-4)
    judged, wrong = np.zeros_like(usable), np.zeros_like(usable)
    judged[tuple(second.T)] = True
    wrong[tuple(second[bad].T)] = True
    if not bad.any():
        return view.held(_OVERLAP, judged)
    finding = "the teachers of one and the same label differ between blocks"
    return view.found(_OVERLAP, finding, wrong, judged)


def _unlike(label: np.ndarray) -> np.ndarray:
    """Some slots, no two of which have the same label; all slots where there is one label."""
    _, first = np.unique(label, return_index=True)
    return first[:_SAMPLE] if len(first) > 1 else np.arange(min(2, len(label)))


@dataclass(frozen=True)
class _Likelihood:
    """How much more probable the teachers find tokens ``shift`` places on than their labels."""

    better: int
    mean: float
    errors: float
    wide: bool  # probabilities are low here and near 1 there, as a trained model's are


def _against_tokens(view: _View, teacher: Tensor, usable: np.ndarray) -> Finding:
    """Whether the teachers find another token than their labels clearly more probable.

    One teacher for each place: those of one place are no independent evidence.
    """
    places = np.argwhere(usable)
    label = view.labels[usable]
    inside = (label - 1 >= 0) & (label + 1 < view.tokens.shape[1])
    row, near = places[:, 0], label.clip(1, max(1, view.tokens.shape[1] - 2))
    last = view.tokens.shape[1] - 1
    same = [view.docs[row, label] == view.docs[row, (near + s).clip(0, last)] for s in (-1, 1)]
    inside &= same[0] & same[1]
    _, first = np.unique((label + row * view.tokens.shape[1])[inside], return_index=True)
    chosen = np.nonzero(inside)[0][first]
    if len(chosen) < _POSITIONS:
        return Finding(_TEACHER, "no case")
    chosen = chosen[np.unique(np.linspace(0, len(chosen) - 1, min(2048, len(chosen))).astype(int))]
    parts = []
    for part in np.array_split(chosen, -(-len(chosen) * teacher.shape[-1] // _CHUNK)):
        log_probs = _at(teacher, *places[part].T).float().log_softmax(-1)
        around = np.stack([view.tokens[row[part], label[part] + shift] for shift in (-1, 0, 1)], 1)
        index = torch.from_numpy(around).to(log_probs.device).clamp(0, log_probs.shape[1] - 1)
        parts.append(log_probs.gather(1, index).double().cpu().numpy())
    early, right, late = np.concatenate(parts).clip(-100).T
    judged = {"early": _surer(early, right), "late": _surer(late, right)}
    for side, token in (("late", "after"), ("early", "before")):
        found = judged[side]
        if found.errors > _SURE and found.mean > 0.1:
            sure = side == "late" or found.wide
            finding = f"the teacher is one position {side}"
            if not sure:
                finding += ", or the target repeats its input (target_logits= would tell)"
            finding += f": it finds the token {token} the label more probable"
            counted = {"count": found.better, "of": len(right), "unit": "positions"}
            return Finding(_TEACHER, "likely broken" if sure else "unsure", finding, **counted)
    if all(found.errors < -_SURE for found in judged.values()):
        return Finding(_TEACHER, "held", of=len(right), unit="positions")
    return Finding(_TEACHER, "no case")


def _surer(other: np.ndarray, right: np.ndarray) -> _Likelihood:
    difference = other - right
    error = difference.std() / np.sqrt(len(difference))
    probability = np.exp(other)
    wide = (probability > 0.9).mean() >= 0.2 and (probability < 0.3).mean() >= 0.05
    mean = float(difference.mean())
    return _Likelihood(int((difference > 0).sum()), mean, mean / max(error, 1e-9), bool(wide))


def _meaning(view: _View) -> Iterator[Finding]:
    idle = ~view.right
    if idle.any():
        finding = "slots past the row, behind a gap and of dummy blocks may hold anything"
        counted = {"count": int(idle.sum()), "of": idle.size, "unit": "slots"}
        yield Finding(_MEANING, "note", finding, **counted)
