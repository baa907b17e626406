"""Whether the teacher of each slot is the target's distribution at the right place."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from dspark_lab.attention.findings import Finding
from dspark_lab.attention.output_view import CHUNK, OutputView, by_slot

_TEACHER = "the teacher is the target's distribution behind the token before the label"
_OVERLAP = "teachers agree where blocks overlap"

# Slots that are enough to know a shift.
_SAMPLE = 512
# Positions that a claim from likelihoods needs, and their paired difference in standard errors.
_POSITIONS, _SURE = 32, 6.0


def teacher_findings(view: OutputView, target_logits: Tensor | None) -> Iterator[Finding]:
    """The teacher's place: exactly from the target's logits, or from what teachers say."""
    teacher = view.given.get("aligned_target_logits")
    usable = view.right & view.mine
    if teacher is not None:
        usable = by_slot(teacher, usable, lambda part, _: ~part.isnan().any(1))
    if teacher is None or not usable.any():
        yield Finding(_TEACHER, "no case")
    elif target_logits is None:
        yield _against_each_other(view, teacher, usable)
        yield _against_tokens(view, teacher, usable)
    else:
        wanted = *view.tokens.shape, teacher.shape[-1]
        if tuple(target_logits.shape) != wanted:
            got = tuple(target_logits.shape)
            raise ValueError(f"target_logits must be {list(wanted)}, got {got}")
        yield _against_target(view, teacher, target_logits, usable)


def _against_target(
    view: OutputView, teacher: Tensor, target: Tensor, usable: np.ndarray
) -> Finding:
    """Every teacher against the logits at its place; where they differ, at places beside it."""
    behind, last = view.labels - 1, target.shape[1] - 1
    sample = _some(np.argwhere(usable), _SAMPLE)
    row, place = sample[:, 0], behind[tuple(sample.T)]
    beside = np.where(place < last, place + 1, place - 1).clip(0)
    limit = _limit(_at(target, row, place), _at(target, row, beside))

    def wrong_one(part: Tensor, places: np.ndarray) -> Tensor:
        return _gap(part, _at(target, places[:, 0], behind[tuple(places.T)])) > limit

    wrong = by_slot(teacher, usable, wrong_one)
    if not wrong.any():
        return view.report.held(_TEACHER, usable)
    gaps = {}
    for shift in (0, -1, 1, -2, 2):
        inside = (place + shift >= 0) & (place + shift <= last)
        if inside.any():
            other = _at(target, row[inside], place[inside] + shift)
            gaps[shift] = float(_gap(_at(teacher, *sample[inside].T), other).mean())
    best = min(gaps, key=lambda shift: gaps[shift])
    finding = "the teacher is another distribution than the target's"
    if best and gaps[best] <= limit:
        count = {1: "one position", 2: "two positions"}[abs(best)]
        finding = f"the teacher is {count} {'late' if best > 0 else 'early'}"
    return view.report.found(_TEACHER, finding, wrong, usable)


def _against_each_other(view: OutputView, teacher: Tensor, usable: np.ndarray) -> Finding:
    """Slots of different blocks that predict the same token have the same teacher."""
    places = np.argwhere(usable)
    label = view.labels[usable] + places[:, 0] * view.tokens.shape[1]
    order = np.argsort(label, kind="stable")
    again = _some(np.nonzero(np.diff(label[order]) == 0)[0], _SAMPLE)
    if len(again) == 0:
        return Finding(_OVERLAP, "no case")
    first, second = places[order[again]], places[order[again + 1]]
    # No two of these have one label, unless all have.
    unlike = places[np.unique(label, return_index=True)[1][:_SAMPLE]]
    unlike = unlike if len(unlike) > 1 else places[:2]
    limit = _limit(_at(teacher, *unlike[:-1].T), _at(teacher, *unlike[1:].T))
    bad = (_gap(_at(teacher, *first.T), _at(teacher, *second.T)) > limit).cpu().numpy()
    judged, wrong = np.zeros_like(usable), np.zeros_like(usable)
    judged[tuple(second.T)] = True
    wrong[tuple(second[bad].T)] = True
    if not bad.any():
        return view.report.held(_OVERLAP, judged)
    finding = "the teachers of one and the same label differ between blocks"
    return view.report.found(_OVERLAP, finding, wrong, judged)


def _against_tokens(view: OutputView, teacher: Tensor, usable: np.ndarray) -> Finding:
    """Whether the teachers find another token than their labels clearly more probable.

    One teacher for each place: those of one place are no independent evidence.
    """
    places, label = np.argwhere(usable), view.labels[usable]
    row, last = places[:, :1], view.tokens.shape[1] - 1
    around = label[:, None] + np.array([-1, 0, 1])
    docs, tokens = view.docs[row, around.clip(0, last)], view.tokens[row, around.clip(0, last)]
    inside = ((around >= 0) & (around <= last) & (docs == docs[:, 1:2])).all(1)
    _, first = np.unique((label + row[:, 0] * (last + 1))[inside], return_index=True)
    chosen = _some(np.nonzero(inside)[0][first], 2048)
    if len(chosen) < _POSITIONS:
        return Finding(_TEACHER, "no case")
    parts = []
    for part in np.array_split(chosen, -(-len(chosen) * teacher.shape[-1] // CHUNK)):
        log_probs = _at(teacher, *places[part].T).float().log_softmax(-1)
        index = torch.from_numpy(tokens[part]).to(log_probs.device)
        parts.append(log_probs.gather(1, index.clamp(0, log_probs.shape[1] - 1)).double().cpu())
    early, right, late = torch.cat(parts).numpy().clip(-100).T
    errors = []
    for side, token, other in (("late", "after", late), ("early", "before", early)):
        difference = other - right
        mean, error = difference.mean(), difference.std() / np.sqrt(len(difference))
        errors.append(mean / max(error, 1e-9))
        if errors[-1] <= _SURE or mean <= 0.1:
            continue
        # A model that repeats its input is nowhere as sure, and unsure elsewhere, as a trained one.
        probability = np.exp(other)
        wide = (probability > 0.9).mean() >= 0.2 and (probability < 0.3).mean() >= 0.05
        sure = side == "late" or bool(wide)
        finding = f"the teacher is one position {side}"
        if not sure:
            finding += ", or the target repeats its input (target_logits= would tell)"
        finding += f": it finds the token {token} the label more probable"
        counted = int((difference > 0).sum()), len(right), "positions"
        return Finding(_TEACHER, "likely broken" if sure else "unsure", finding, *counted)
    if max(errors) < -_SURE:
        return Finding(_TEACHER, "held", of=len(right), unit="positions")
    return Finding(_TEACHER, "no case")


def _gap(left: Tensor, right: Tensor) -> Tensor:
    """How far apart the distributions of rows are: the mean difference of log-probabilities."""
    difference = left.float().log_softmax(-1) - right.to(left.device).float().log_softmax(-1)
    return difference.abs().nan_to_num(0.0, 0.0).mean(-1)


def _limit(left: Tensor, right: Tensor) -> float:
    """A small part of the gap that there is between distributions of different places."""
    return max(0.1 * float(_gap(left, right).mean()), 1e-4)


def _some(values: np.ndarray, most: int) -> np.ndarray:
    """Some of the values, evenly."""
    return values[np.unique(np.linspace(0, len(values) - 1, min(most, len(values))).astype(int))]


def _at(logits: Tensor, *places: np.ndarray) -> Tensor:
    return logits.detach()[tuple(torch.from_numpy(p).to(logits.device) for p in places)]
