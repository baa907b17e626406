"""The cost of a round of speculative decoding, and the accept rate from which on it pays.

Per round of K drafted tokens:

    tokens:   tau = 1 + sum_k P(slots 0..k are verified and accepted);
    seconds:  draft(K) + verify(slots verified + 1) + overhead,
              and after a rejection with a tokens accepted, rollback + replay(a + 1);
    speed-up: tau * seconds of a plain step / seconds of a round.

*Rollback* cuts the rejected tokens off the target's cache. Where it cannot be cut (recurrent
layers, sliding windows), the target reads the anchor and the accepted tokens again: *replay*.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from jaxtyping import Float

from dspark_lab.checks import Count, NonNegative, Positive, checked
from dspark_lab.decoding import slot_before

# One number for every length, one for each, or a function of the length.
Seconds = float | Sequence[float] | Callable[[int], float]


@checked
@dataclass(frozen=True)
class RoundCosts:
    """Seconds of a round, and of a plain step of the same target, which yields one token.

    Args:
        draft_seconds: of 1, 2, ..., K tokens.
        verify_seconds: of a target pass over 1, 2, ..., K + 1 tokens, with the anchor.
        replay_seconds: of reading 1, 2, ..., K tokens again; empty where the cache can be cut.
        rollback_seconds, overhead_seconds: more after every rejection, and in every round.
        plain_known: False where plain steps hold a part of the drafting.
    """

    plain_seconds: Positive
    draft_seconds: Sequence[NonNegative]
    verify_seconds: Sequence[Positive]
    replay_seconds: Sequence[NonNegative] = ()
    rollback_seconds: NonNegative = 0.0
    overhead_seconds: NonNegative = 0.0
    source: str = "given"
    plain_known: bool = True

    def __post_init__(self) -> None:
        for name in ("draft_seconds", "verify_seconds", "replay_seconds"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        longest = len(self.draft_seconds)
        if longest == 0 or len(self.verify_seconds) != longest + 1:
            raise ValueError(
                "draft_seconds must be of 1 or more lengths, and verify_seconds of one more, "
                f"got {longest} and {len(self.verify_seconds)}"
            )
        if len(self.replay_seconds) not in (0, longest):
            given = len(self.replay_seconds)
            raise ValueError(f"replay_seconds must be of no length or of {longest}, got {given}")

    @classmethod
    @checked
    def of(
        cls,
        longest: Count,
        *,
        plain_seconds: float,
        draft_seconds: Seconds,
        verify_seconds: Seconds,
        replay: bool = False,
        rollback_seconds: float = 0.0,
        overhead_seconds: float = 0.0,
        source: str = "given",
    ) -> RoundCosts:
        """For blocks of up to ``longest`` tokens, each cost a number, a list or a function.

        With ``replay`` the target reads again after a rejection, as fast as it verifies.
        """
        costs = cls(
            plain_seconds=plain_seconds,
            draft_seconds=_for_each_length(draft_seconds, longest),
            verify_seconds=_for_each_length(verify_seconds, longest + 1),
            rollback_seconds=rollback_seconds,
            overhead_seconds=overhead_seconds,
            source=source,
        )
        return costs.replaying() if replay else costs

    @property
    def longest(self) -> int:
        return len(self.draft_seconds)

    def replaying(self) -> RoundCosts:
        """The same for a target that has to read again, as fast as it verifies."""
        return replace(self, replay_seconds=self.verify_seconds[:-1])

    def cutting(self) -> RoundCosts:
        """The same for a target whose cache is cut in no time: no replay and no rollback."""
        return replace(self, replay_seconds=(), rollback_seconds=0.0)

    def figures(
        self,
        accepted: Float[np.ndarray, "*axes slot"],
        verified: Float[np.ndarray, "*axes slot"] | None = None,
        rejected: Float[np.ndarray, "*axes slot"] | None = None,
    ) -> dict[str, Any]:
        """Expected tokens ``tau``, seconds and speed of a round, from how often each slot is so.

        By default every slot is verified. ``without_replay`` is the speed-up without replay and
        rollback, ``without_overhead`` that without overhead either.
        """
        k = accepted.shape[-1]
        if verified is None or rejected is None:
            verified, rejected = np.ones_like(accepted), slot_before(accepted) - accepted
        verify = np.array(self.verify_seconds[: k + 1])
        replay = np.array(self.replay_seconds[:k] or [0.0] * k)
        tau = 1 + accepted.sum(axis=-1)
        parts = {
            "draft_seconds": np.full_like(tau, self.draft_seconds[k - 1]),
            "verify_seconds": expected_verify_seconds(verify, verified),
            "replay_seconds": expected_replay_seconds(replay, rejected),
            "rollback_seconds": self.rollback_seconds * rejected.sum(axis=-1),
            "overhead_seconds": np.full_like(tau, self.overhead_seconds),
        }
        total = sum(parts.values())
        after = parts["replay_seconds"] + parts["rollback_seconds"]
        plain = tau * self.plain_seconds
        return {
            "tau": tau,
            **parts,
            "round_seconds": total,
            "tokens_per_second": tau / total,
            "speedup": plain / total,
            "without_replay": plain / (total - after),
            "without_overhead": plain / (total - after - self.overhead_seconds),
        }


def expected_verify_seconds(
    verify: Float[np.ndarray, " tokens"], verified: Float[np.ndarray, "*axes slot"]
) -> Float[np.ndarray, "*axes"]:
    """Mean seconds of a target pass, the anchor's token included."""
    return verify[0] + verified @ np.diff(verify)


def expected_replay_seconds(
    replay: Float[np.ndarray, " tokens"], rejected: Float[np.ndarray, "*axes slot"]
) -> Float[np.ndarray, "*axes"]:
    """Mean seconds of reading again; after a rejection at slot k, the anchor and k tokens."""
    return rejected @ replay


@checked
def break_even(costs: RoundCosts, draft_length: Count) -> float:
    """The accept rate, the same at every slot, at and above which drafting pays.

    inf where even rate 1 is slower than plain steps, 0 where every rate pays.
    """
    require_lengths([draft_length], costs.longest)
    k, plain = draft_length, costs.plain_seconds
    fixed = costs.draft_seconds[k - 1] + costs.verify_seconds[k] + costs.overhead_seconds
    after = np.full(k, costs.rollback_seconds) + (costs.replay_seconds[:k] or 0.0)
    # plain * (1 + r + ... + r^K) - fixed - sum_a (r^a - r^(a + 1)) * after_a, over plain.
    balance = np.ones(k + 1)
    balance[0] -= fixed / plain
    balance[:k] -= after / plain
    balance[1:] += after / plain
    return _pays_from(balance)


@checked
def break_even_rate(tau: float, block_size: Count) -> float:
    """The accept rate a of every slot at which a block yields ``tau`` = 1 + a + ... + a^K tokens.

    inf where even a = 1 yields fewer, 0 where ``tau`` is 1 or less.
    """
    if math.isnan(tau):
        raise ValueError("tau must be a number, got nan")
    if tau <= 1:
        return 0.0
    balance = np.ones(block_size + 1)
    balance[0] -= tau
    return _pays_from(balance)


def _pays_from(balance: Float[np.ndarray, " power"]) -> float:
    """The lowest rate from which on a polynomial in the rate is >= 0, up to rate 1."""
    at = np.polynomial.Polynomial(balance)
    if at(1.0) < 0:
        return float("inf")
    roots = at.roots()
    real = roots.real[np.abs(roots.imag) < 1e-9]
    edges = [0.0, *sorted(real[(real > 0) & (real < 1)]), 1.0]
    from_here = 1.0
    for low, high in zip(edges[-2::-1], edges[:0:-1], strict=True):
        if at((low + high) / 2) < 0:
            break
        from_here = low
    return float(from_here)


@checked
def require_lengths(draft_lengths: Sequence[Count] | None, longest: int) -> list[int]:
    """The lengths as given, or all up to ``longest``; longer ones are refused."""
    found = list(range(1, longest + 1)) if draft_lengths is None else list(draft_lengths)
    if not found:
        raise ValueError("draft_lengths must hold at least one length, got none")
    if max(found) > longest:
        raise ValueError(f"draft_length must be at most {longest}, got {max(found)}")
    return found


def _for_each_length(seconds: Seconds, count: int) -> tuple[float, ...]:
    if callable(seconds):
        return tuple(float(seconds(n)) for n in range(1, count + 1))
    if isinstance(seconds, (int, float)):
        return (float(seconds),) * count
    if len(seconds) < count:
        raise ValueError(f"seconds must be given for {count} lengths, got {len(seconds)}")
    return tuple(map(float, seconds[:count]))
