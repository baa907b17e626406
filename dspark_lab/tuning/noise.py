"""How gradients vary between conversations, and between anchors of one conversation.

The gradient of a block at anchor a of conversation r is that of the objective over this block
alone, divided by the block's own weights, and is modelled as

    g_ra = G + u_r + e_ra

with independent u_r and e_ra of mean zero. ``signal`` is |G|^2, ``between`` tr Var(u), ``within``
tr Var(e); the covariance of e at two anchors that are d tokens apart is within * rho(d), which is 0
between far anchors. A step of so many rows, each with N anchors, has a gradient whose variance is

    between / rows + within / (rows * N_eff),    N_eff = N / (1 + (N - 1) * rho_mean).

1 + (N - 1) * rho_mean is the design effect (Kish, Survey Sampling, 1965, section 5.4); rho_mean is
the mean of rho over all pairs of different candidates of the row, since anchors are drawn without
replacement, all pairs equally likely. Divided by |G|^2 it is the noise of a step: 1 where the batch
is as large as the noise scale (McCandlish et al. 2018, arXiv 1812.06162, equation 2.8).

A block that the end of its answer cuts short counts as much as any other here, and less in a step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated

import numpy as np
import pandas as pd
from jaxtyping import Float, Int

from dspark_lab.chats import Chat, Encoded
from dspark_lab.checks import Count, NotEmpty, Size, checked
from dspark_lab.model import Drafter, FeatureSource, Target
from dspark_lab.training import TrainConfig


@dataclass(frozen=True, eq=False)
class Moments:
    """Sums over the products of gradients, a conversation each, from which estimates follow."""


@dataclass(frozen=True, eq=False)
class GradientNoise:
    """What :func:`measure_noise` found: the moments of the objective of each block size.

    ``wholes`` has the objective of a block of so many slots, ``slots`` that of each slot alone
    where it was asked for.
    """

    wholes: Mapping[int, Moments]
    slots: Mapping[int, Moments]

    @property
    def block_sizes(self) -> list[int]:
        return sorted(self.wholes)

    def table(self) -> pd.DataFrame:
        """One line for each objective: moments and noise scales, with 95 % intervals."""
        raise NotImplementedError


@checked
def gradient_moments(
    gradients: Float[np.ndarray, "group dim"],
    conversation: Int[np.ndarray, " group"],
    anchors: Sequence[Int[np.ndarray, " anchor"]],
    distances: Sequence[Count] = (1, 2, 4, 8, 16),
) -> Moments:
    """The moments of gradients, each the mean over a group of blocks of one conversation."""
    raise NotImplementedError


@checked
def measure_noise(
    drafter: Drafter,
    target: Target,
    chats: Sequence[Chat | Encoded],
    config: TrainConfig,
    *,
    conversations: Count = 64,
    anchors: Count = 8,
    block_sizes: Annotated[Sequence[Count], NotEmpty()] | None = None,
    by_slot: bool = False,
    features: FeatureSource | None = None,
    seed: Size = 0,
) -> GradientNoise:
    """Measures the noise of ``drafter``'s gradients as it is now, which trains nothing.

    Args:
        drafter: at its start, or after a warm-up; its embedding and LM head become the target's.
        chats: to draw from; encoded already, or with the target's tokenizer here.
        config: of the training run: objective, precision, and the length conversations are cut to.
        conversations: so many are drawn, each a row of its own; all of them where there are fewer.
        anchors: blocks of each.
        block_sizes: of whose objectives the moments are asked for, none above the drafter's (whose
            own it is where None). A shorter block's gradient is that of the first slots of the
            drafter's block.
        by_slot: the moments of each slot's own objective, too, which takes longer.
        features: of the target; asked for each conversation where None. A source that reads them
            from disk must be of these ``chats`` (:func:`dspark_lab.model.cached_features`).
        seed: of the conversations and anchors.
    """
    raise NotImplementedError
