"""The rule of speculative decoding: which drafted tokens stand, and what is drawn behind them.

    accept:  the drafted token x with probability min(1, p(x) / q(x)), if all before it were;
    correct: draw the first rejected token anew from max(0, p - q), normalised; where there is none,
             draw one more token from p.

p is the target's distribution, q the drafter's (Leviathan et al. 2022, arXiv 2211.17192, algorithm
1). Pure functions: whatever q is, the tokens are distributed as p.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dspark_lab.checks import NonNegative, Within, checked
from dspark_lab.model import at_least_fp32

PerSlot = Float[Tensor, "batch slot"]
TopP = Annotated[float, Within(0, 1, above=True)]

# Below it, logits are moved so that dividing them by the temperature cannot overflow.
_COLD = 1e-6


@dataclass(frozen=True, eq=False)
class Verdict:
    """The target's decision on a block of each row.

    ``accepted``: how many drafted tokens stand. ``next_token``: the target's own token behind them.
    The rates of each slot: see :class:`dspark_lab.decoding.Decoded`.
    """

    accepted: Int[Tensor, " batch"]
    next_token: Int[Tensor, " batch"]
    target_prob: PerSlot
    accept_prob: PerSlot
    accept_rate: PerSlot


@checked
def verify(
    p: Float[Tensor, "batch read vocab"],
    q: Float[Tensor, "batch slot vocab"],
    tokens: Int[Tensor, "batch slot"],
    lengths: Int[Tensor, " batch"],
    accept_numbers: Float[Tensor, "batch slot"],
    next_numbers: Float[Tensor, " batch"],
) -> Verdict:
    """Accept a prefix of each row's drafted tokens and draw one token of the target's behind it.

    ``tokens`` were drawn from q; each row verifies the first ``lengths`` of them, and p has one
    place more than the longest row, or further ones. The numbers are uniform in [0, 1).
    """
    slots = p.shape[1] - 1
    drafted = tokens[:, :slots].unsqueeze(2)
    target_prob = p[:, :slots].gather(2, drafted).squeeze(2)
    draft_prob = q[:, :slots].gather(2, drafted).squeeze(2)
    accept_prob = acceptance(target_prob, draft_prob)
    accepted = accepted_prefix(accepts(accept_prob, accept_numbers[:, :slots]), lengths)
    return Verdict(
        accepted=accepted,
        next_token=draw(next_distribution(p, q, accepted, lengths), next_numbers),
        target_prob=target_prob,
        accept_prob=accept_prob,
        # A sum of probabilities may end a rounding above 1.
        accept_rate=torch.minimum(p[:, :slots], q[:, :slots]).sum(dim=2).clamp(max=1),
    )


def acceptance(target_prob: PerSlot, draft_prob: PerSlot) -> PerSlot:
    """The probability of accepting a drafted token, min(1, p(x) / q(x))."""
    return (target_prob / draft_prob).clamp(max=1)


def accepts(probability: PerSlot, numbers: PerSlot) -> Bool[Tensor, "batch slot"]:
    """Whether each token is accepted by itself, from a uniform number for each."""
    return numbers < probability


def accepted_prefix(
    accepted: Bool[Tensor, "batch slot"], lengths: Int[Tensor, " batch"]
) -> Int[Tensor, " batch"]:
    """How many of the first ``lengths`` slots are accepted before the first that is not."""
    verified = torch.arange(accepted.shape[1], device=accepted.device) < lengths.unsqueeze(1)
    return (accepted & verified).cumprod(dim=1).sum(dim=1)


def next_distribution(
    p: Float[Tensor, "batch read vocab"],
    q: Float[Tensor, "batch slot vocab"],
    accepted: Int[Tensor, " batch"],
    lengths: Int[Tensor, " batch"],
) -> Float[Tensor, "batch vocab"]:
    """The distribution behind the accepted tokens: the residual if one was rejected, else p."""
    row = torch.arange(len(p), device=p.device)
    behind = p[row, accepted]
    if q.shape[1] == 0:
        return behind
    # No draft is subtracted where no token was rejected, be it that none was verified.
    rejected = (accepted < lengths).unsqueeze(1)
    return residual(behind, q[row, accepted.clamp(max=q.shape[1] - 1)] * rejected)


@checked
def residual(
    p: Float[Tensor, "*axes vocab"], q: Float[Tensor, "*axes vocab"]
) -> Float[Tensor, "*axes vocab"]:
    """Return max(0, p - q), normalised: the distribution in place of a rejected token.

    Where p is q, no token is ever rejected, and p itself stands in.
    """
    rest = (p - q).clamp(min=0)
    total = rest.sum(dim=-1, keepdim=True)
    return torch.where(total > 0, rest / total, p)


@checked
def distribution(
    logits: Float[Tensor, "*axes vocab"], temperature: NonNegative, top_p: TopP = 1.0
) -> Float[Tensor, "*axes vocab"]:
    """Return probabilities, in fp32 at least: the softmax at a temperature, then top-p.

    Temperature 0 puts everything on the likeliest token, the first of several. Top-p keeps the
    smallest set of likeliest tokens whose probabilities sum to at least ``top_p``.
    """
    wide = logits.to(at_least_fp32(logits.dtype))
    if temperature == 0:
        return torch.zeros_like(wide).scatter_(-1, wide.argmax(dim=-1, keepdim=True), 1)
    if temperature < _COLD:
        wide = wide - wide.amax(dim=-1, keepdim=True)
        temperature = max(temperature, torch.finfo(wide.dtype).tiny)
    probs = (wide / temperature).softmax(dim=-1)
    if top_p < 1:
        values, order = probs.sort(dim=-1, descending=True)
        values = values.masked_fill(values.cumsum(dim=-1) - values >= top_p, 0)
        probs = torch.zeros_like(probs).scatter_(-1, order, values)
        probs = probs / probs.sum(dim=-1, keepdim=True)
    return probs


def top_and_margin(logits: Float[Tensor, "*axes vocab"]) -> Float[Tensor, "*axes 2"]:
    """The largest probability of a softmax, and the difference of the two largest logits.

    The difference is infinite where there are no two.
    """
    wide = logits.to(at_least_fp32(logits.dtype))
    best = wide.topk(min(2, wide.shape[-1]), dim=-1).values
    top = (best[..., 0] - wide.logsumexp(dim=-1)).exp()
    margin = best[..., 0] - best[..., 1] if best.shape[-1] > 1 else torch.full_like(top, torch.inf)
    return torch.stack([top, margin], dim=-1)


def draw(
    probs: Float[Tensor, "batch vocab"], numbers: Float[Tensor, " batch"]
) -> Int[Tensor, " batch"]:
    """The token in whose share of [0, 1) each row's number lies."""
    edges = probs.double().cumsum(dim=-1)
    point = numbers.to(edges.device).unsqueeze(1) * edges[:, -1:]
    return torch.searchsorted(edges, point, right=True).squeeze(1)
