"""How tau grows with training: with steps, with what each of them teaches, and with the block.

A step whose gradient has the variance ``noise`` (over the squared length of its mean) makes
1 / (1 + noise) of the progress of a step on all data (McCandlish et al. 2018, arXiv 1812.06162,
equation 2.6, of a learning rate far below the optimal one). With L = log(steps / (1 + noise)) and
k = log(block size),

    log(tau - 1) = a + b L + c L^2 + d k + e k L + f log(1 + noise) + residual

where f is how far progress is from what the noise says. The coefficients are known from runs on
other data, up to the level a, which each data set has of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float

from dspark_lab.checks import Count, checked
from dspark_lab.tuning.results import run_table

# What decides a step, but for the data.
OPTION = ["batch_size", "num_anchors", "block_size"]
# The origin of L and of k.
_STEPS, _BLOCK = 200.0, 7.0


@dataclass(frozen=True, eq=False)
class Growth:
    """The coefficients a to f with their covariance.

    ``residual``: standard deviation of log(tau - 1) of a single run about the curve.
    """

    mean: Float[np.ndarray, " coefficient"]
    covariance: Float[np.ndarray, "coefficient coefficient"]
    residual: float

    @checked
    def predict(
        self, options: pd.DataFrame, steps: Sequence[float] | Float[np.ndarray, " option"]
    ) -> tuple[Float[np.ndarray, " option"], Float[np.ndarray, "option option"]]:
        """Log tau of each option (columns ``noise``, ``block_size``) after so many steps.

        Returns its mean and its covariance, both to first order.
        """
        design = features(options, np.asarray(steps, dtype=float))
        logit = design @ self.mean
        covariance = design @ self.covariance @ design.T
        covariance += self.residual**2 * np.eye(len(design))
        # d log(1 + exp(z)) / dz
        slope = 1 / (1 + np.exp(-logit))
        return np.log1p(np.exp(logit)), covariance * np.outer(slope, slope)


def features(
    options: pd.DataFrame, steps: Float[np.ndarray, " option"]
) -> Float[np.ndarray, "option coefficient"]:
    """The factors of the coefficients a to f."""
    noise = np.log1p(options["noise"].to_numpy(dtype=float))
    block = np.log(options["block_size"].to_numpy(dtype=float) / _BLOCK)
    progress = np.log(steps / _STEPS) - noise
    return np.stack(
        [np.ones(len(steps)), progress, progress**2, block, block * progress, noise], axis=1
    )


@checked
def fit_growth(
    runs: pd.DataFrame, progress: pd.DataFrame, prior: Growth | None = None
) -> Growth:
    """The growth that the ends of runs show (:func:`load_runs`), each mix with its own level.

    ``progress`` has the ``noise`` of each batch size, number of anchors and block size, and of each
    ``mix`` where it has such a column.
    """
    raise NotImplementedError
