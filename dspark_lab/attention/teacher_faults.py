"""Whether the teacher of each slot is the target's distribution at the right place."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dspark_lab.attention.findings import Finding
from dspark_lab.attention.output_view import CHUNK, OutputView, chunks

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
        finite = [~part.isnan().any(1).cpu() for part, _ in chunks(teacher, usable)]
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


def _against_target(
    view: OutputView, teacher: Tensor, target: Tensor, usable: np.ndarray
) -> Finding:
    """Every teacher against the logits at its place; where they differ, at places beside it."""
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
    for part, chosen in chunks(teacher, usable):
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


def _against_each_other(view: OutputView, teacher: Tensor, usable: np.ndarray) -> Finding:
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


def _against_tokens(view: OutputView, teacher: Tensor, usable: np.ndarray) -> Finding:
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
    for part in np.array_split(chosen, -(-len(chosen) * teacher.shape[-1] // CHUNK)):
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
            counted = found.better, len(right), "positions"
            return Finding(_TEACHER, "likely broken" if sure else "unsure", finding, *counted)
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
