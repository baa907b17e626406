"""Whether speculative decoding pays: speed beside plain decoding, and where it would break even.

A round costs what drafting, verifying and the rest of it cost, and yields tau tokens; a plain step
costs one pass of the target and yields one. So the gain is tau * plain / round, and a drafter
breaks even where tau is round / plain. This file knows times and counts; it knows nothing about
models.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from dspark_lab.checks import require_int, require_number
from dspark_lab.decoding import Decoded

if TYPE_CHECKING:
    import pandas

__all__ = ["break_even_rate", "speed_table"]


def speed_table(
    plain: Sequence[Decoded], drafted: Sequence[Decoded], block_size: int
) -> pandas.Series:
    """Speculative against plain decoding of the same prompts, in one process.

    ``tokens_per_second`` and ``plain_tokens_per_second``, without the reading of the prompts;
    ``gain``, their ratio; ``tau``, tokens that a round yields; ``draft``, ``verify`` and ``rest``,
    their shares of a round's time; ``break_even_tau`` at which both would be as fast, and
    ``break_even_rate``, the accept rate of every slot that gives it (above 1: there is none).

    Args:
        plain, drafted: what :func:`dspark_lab.decoding.loop.decode` returned without and with a drafter.
        block_size: slots that were drafted a round.

    Raises:
        ValueError: one of the two holds no round.
    """
    import pandas as pd

    tokens, rounds, parts = _sum(drafted, "drafted")
    plain_tokens, _, plain_parts = _sum(plain, "plain")
    seconds, plain_seconds = sum(parts.values()), sum(plain_parts.values())
    speed, plain_speed = tokens / seconds, plain_tokens / plain_seconds
    break_even = seconds / rounds * plain_speed
    return pd.Series(
        {
            "tokens_per_second": speed,
            "plain_tokens_per_second": plain_speed,
            "gain": speed / plain_speed,
            "tau": tokens / rounds,
            **{name: part / seconds for name, part in parts.items()},
            "break_even_tau": break_even,
            "break_even_rate": break_even_rate(break_even, block_size),
        }
    )


def break_even_rate(tau: float, block_size: int) -> float:
    """The accept rate a of every slot at which a block yields ``tau`` = 1 + a + ... + a^K tokens.

    inf where even a = 1 yields fewer, 0 where ``tau`` is 1 or less.

    Raises:
        TypeError, ValueError: ``tau`` is not a number, ``block_size`` not a whole number >= 1.
    """
    require_number("tau", tau)
    if math.isnan(tau):
        raise ValueError(f"tau must be a number, got {tau}")
    require_int("block_size", block_size, 1)
    if tau > block_size + 1:
        return float("inf")
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        yielded = sum(middle**k for k in range(block_size + 1))
        low, high = (middle, high) if yielded < tau else (low, middle)
    return low


def _sum(decoded: Sequence[Decoded], name: str) -> tuple[int, int, dict[str, float]]:
    """Tokens, rounds, and seconds of each part of a round."""
    tokens = sum(int(one.rounds["tokens"].sum()) for one in decoded)
    rounds = sum(len(one.rounds) for one in decoded)
    if rounds == 0:
        raise ValueError(f"{name} must hold at least one round, got none")
    parts = {
        part: sum(one.seconds[part] for one in decoded) for part in ("draft", "verify", "rest")
    }
    return tokens, rounds, parts
