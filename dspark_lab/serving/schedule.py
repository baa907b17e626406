"""Which drafted slots to verify when many requests share the target's steps.

    a_{r,j} = c_{r,0} * ... * c_{r,j}      predicted survival of slot j of request r;
    B       = R + admitted slots           every request's own token is read in any case;
    tau     = R + sum of admitted a        tokens that the step is expected to yield;
    Theta   = tau * SPS(B)                 tokens per second, to be maximised.

The prefix scheduler (DSpark, arXiv 2607.05147) admits slots by falling a and stops at the first
that does not raise Theta: whether slot j is verified then depends only on what was known before its
token was drawn, and the output stays the target's own. A search for the highest Theta looks past
that slot, at confidences that depend on its token, and biases the output.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from dspark_lab.checks import checked
from dspark_lab.decoding import Scheduler, residual
from dspark_lab.rates import as_numbers, as_probabilities
from dspark_lab.serving.steps import Speed

Confidence = (
    Shaped[np.ndarray, "request slot"] | Float[Tensor, "request slot"] | Sequence[Sequence[float]]
)

# Candidates sorted first: sorting takes longest, and rarely are many admitted.
_FEW = 256


@checked
def prefix_schedule(confidence: Confidence, sps: Speed) -> Int[np.ndarray, " request"]:
    """How many slots of each request the lossless prefix scheduler verifies.

    At equal a the earlier slot comes first, then the lower request. No choice of prefixes has a
    higher Theta where SPS is :attr:`~dspark_lab.serving.StepsPerSecond.smooth`.

    Args:
        confidence: in [0, 1], 0 where the request has no such slot.
        sps: steps per second at each of an array of tokens per step.
    """
    requests, survival = _candidates(confidence)
    most = max(requests, _FEW)
    while True:
        walk = _walk(requests, survival, sps, most)
        admitted, candidates = walk.admitted, len(walk.order)
        if admitted < candidates or candidates == np.count_nonzero(survival):
            return walk.lengths(admitted)
        most *= 8


@checked
def retrospective_schedule(confidence: Confidence, sps: Speed) -> Int[np.ndarray, " request"]:
    """The shortest schedule of the highest Theta of all: **biased**, for comparison."""
    walk = _walk(*_candidates(confidence), sps)
    return walk.lengths(int(walk.theta.argmax()))


@checked
def prefix_scheduler(sps: Speed) -> Scheduler:
    """:func:`prefix_schedule` as the ``scheduler`` of :func:`dspark_lab.decode`.

    ``decode`` pads a batch to its longest row and so saves less time than a serving engine.
    """

    def scheduler(confidence: Float[Tensor, "batch slot"]) -> Int[Tensor, " batch"]:
        return torch.from_numpy(prefix_schedule(confidence, sps))

    return scheduler


@checked
def schedule_table(confidence: Confidence, sps: Speed) -> pd.DataFrame:
    """The slots in the order of admission, and what each does to Theta.

    A row for each slot of survival > 0, whose ``tokens``, ``tau`` and ``theta`` include the slots
    before it, and whether either schedule takes it: ``admitted``, ``retrospective``.
    """
    walk = _walk(*_candidates(confidence), sps)
    number, requests = np.arange(len(walk.survival)), max(walk.requests, 1)
    return pd.DataFrame(
        {
            "request": walk.order % requests,
            "slot": walk.order // requests,
            "survival": walk.survival,
            "tokens": walk.requests + number + 1,
            "tau": walk.tau[1:],
            "theta_before": walk.theta[:-1],
            "theta": walk.theta[1:],
            "admitted": number < walk.admitted,
            "retrospective": number < walk.theta.argmax(),
        }
    )


@checked
def output_distribution(
    target_probs: Sequence[float], draft_probs: Sequence[float], verified: Sequence[bool | int]
) -> Float[np.ndarray, " vocab"]:
    """Exact distribution of a slot's output token when its draft decides whether it is verified.

    ``verified`` says so for each token that may be drafted. Lossless if the result is p, the
    ``target_probs``.
    """
    p = as_probabilities("target_probs", target_probs)
    q = as_probabilities("draft_probs", draft_probs)
    asked = np.asarray(verified, dtype=bool)
    kept = np.where(asked, np.minimum(p, q), 0)
    corrected = residual(torch.from_numpy(p), torch.from_numpy(q)).numpy()
    return kept + (q[asked].sum() - kept.sum()) * corrected + q[~asked].sum() * p


@dataclass(frozen=True, eq=False)
class _Walk:
    """Candidates (slot * requests + request) by falling survival; the first n of them admitted."""

    requests: int
    order: Int[np.ndarray, " candidate"]
    survival: Float[np.ndarray, " candidate"]
    tau: Float[np.ndarray, " admitted"]
    theta: Float[np.ndarray, " admitted"]

    @property
    def admitted(self) -> int:
        rises = self.theta[1:] > self.theta[:-1]
        return len(rises) if rises.all() else int(rises.argmin())

    def lengths(self, admitted: int) -> Int[np.ndarray, " request"]:
        chosen = self.order[:admitted] % max(self.requests, 1)
        return np.bincount(chosen, minlength=self.requests).astype(np.int64, copy=False)


def _candidates(confidence: Confidence) -> tuple[int, Float[np.ndarray, " candidate"]]:
    """The number of requests, and a of each slot at slot * requests + request."""
    given = confidence.detach().cpu().double() if isinstance(confidence, Tensor) else confidence
    array = as_numbers("confidence", given)
    if array.ndim != 2:
        raise ValueError(f"confidence must be [request, slot], got shape {array.shape}")
    if array.size and not (array.min() >= 0 and array.max() <= 1):
        span = f"from {array.min()} to {array.max()}"
        raise ValueError(f"confidence must lie in [0, 1], got values {span}")
    # A product of numbers of at most 1 never rises, rounding included.
    return len(array), array.cumprod(axis=1).T.ravel()


def _walk(
    requests: int, survival: Float[np.ndarray, " candidate"], sps: Speed, most: int | None = None
) -> _Walk:
    """The walk over slots of survival > 0, or the likeliest ``most`` and their equals."""
    least = np.partition(survival, -most)[-most] if most and most < len(survival) else 0.0
    order = np.flatnonzero(survival >= least if least > 0 else survival)
    # Stable: of equal ones the earlier slot stays in front.
    order = order[np.argsort(-survival[order], kind="stable")]
    survival = survival[order]
    tau = np.concatenate([[requests], survival]).cumsum()
    sizes = np.arange(requests, requests + len(tau))
    speeds = np.asarray(sps(sizes), dtype=np.float64)
    if speeds.shape != sizes.shape or not (speeds.min() > 0 and speeds.max() < np.inf):
        raise ValueError(
            f"sps must return {len(sizes)} positive and finite steps per second, one for each "
            f"number of tokens, got {speeds}"
        )
    return _Walk(requests, order, survival, tau, tau * speeds)
