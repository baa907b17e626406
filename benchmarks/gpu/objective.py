"""The chunked objective, forward and backward in bf16, against others that are fused or not."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch

from benchmarks.gpu.child import Report
from benchmarks.gpu.sides import attempt, compare
from benchmarks.objective import Problem, problem, textbook_loss

CARD = {"vocab": 151936, "hidden": 2560, "rank": 256}
DRY = {"vocab": 500, "hidden": 32, "rank": 8}
# Gigabytes beyond what was allocated before the call, at the most slots.
AIM = 2.3
# In place of the library's own choice.
MORE = 2048


def run(report: Report) -> None:
    compiled = torch.compile(textbook_loss, dynamic=False)
    sizes: dict[str, Any] = report.pick(CARD, DRY)
    for anchors, block in report.pick([(1024, 8), (512, 7)], [(8, 4)]):
        p = problem(1, anchors, block=block, device=report.device, dtype=torch.bfloat16, **sizes)
        aim = {} if block == 7 else {"aim": AIM}
        label = f"{anchors} x {block} slots"
        sides: dict[str, Callable[[], object]] = {
            "chunked": p.chunked,
            f"chunked, {MORE} slots at a time": partial(p.chunked, MORE),
            "textbook": p.textbook,
            "textbook compiled": partial(p.textbook, compiled),
        }
        theirs = f"{label}: liger-kernel JSD"
        if find_spec("liger_kernel") is None:
            report.note(theirs, "liger-kernel is not installed")
        elif call := attempt(report, theirs, partial(_liger, p)):
            sides["liger-kernel JSD"] = call
        compare(report, label, sides, beside=aim)


def _liger(p: Problem) -> Callable[[], object]:
    """Cross-entropy and Jensen-Shannon divergence of the same logits, from [head, w2] as one.

    It forms the gradient of this whole matrix, where the others leave out the frozen head's.
    """
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    loss = LigerFusedLinearJSDLoss()
    hidden, latent, _, w2 = (x.detach().flatten(0, -2) for x in p.inputs)
    assert p.slots.target_hidden is not None
    student = torch.cat([hidden, latent], dim=-1).requires_grad_()
    weight = torch.cat([p.head, w2], dim=-1).requires_grad_()
    teacher, labels = p.slots.target_hidden.flatten(0, -2), p.slots.target_ids.flatten()

    def call() -> object:
        value = loss(student, weight, teacher, p.head, labels)
        return torch.autograd.grad(value, (student, weight))

    return call
