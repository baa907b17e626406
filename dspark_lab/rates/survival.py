"""Survival along a block: the product of the outcomes of its slots."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float

from dspark_lab.checks import checked


@checked
def prefix_survival(outcome: Float[np.ndarray, "*axes slot"]) -> Float[np.ndarray, "*axes slot"]:
    """Return whether, or how likely, all slots up to each one are accepted: a running product.

    Outcomes are 0 or 1, accept rates or confidences. Once one is 0 the product is 0, whatever is
    unknown (NaN) beyond it; otherwise it is NaN from the first unknown outcome on.
    """
    rejected = np.logical_or.accumulate(outcome == 0, axis=-1)
    return np.where(rejected, 0.0, np.cumprod(outcome, axis=-1))
