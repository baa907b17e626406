"""Uniform random numbers for decoding, a stream of its own for each prompt."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from dspark_lab.checks import Size, checked


@checked
class RandomNumbers:
    """Numbers in [0, 1) from a seed. A prompt's do not depend on the others in its batch.

    ``prompts`` are the numbers of the prompts that the batch's rows hold; prompt 0 has the stream
    of the prompt numbered ``first``.
    """

    def __init__(self, count: Size, seed: Size, block_size: Size, *, first: Size = 0) -> None:
        self._block_size = block_size
        numbers = range(first, first + count)
        self._draft, self._accept, self._target = (
            [_generator(seed, prompt, kind) for prompt in numbers] for kind in range(3)
        )

    def draft(self, prompts: Sequence[int]) -> Float[Tensor, " batch"]:
        """To draw the tokens of one slot of the block."""
        return _uniform(self._draft, prompts, 1).squeeze(1)

    def accept(self, prompts: Sequence[int]) -> Float[Tensor, "batch slot"]:
        """To accept or reject each slot; a whole block's, however many slots are verified."""
        return _uniform(self._accept, prompts, self._block_size)

    def target(self, prompts: Sequence[int]) -> Float[Tensor, " batch"]:
        """To draw the target's own tokens: the first, corrections and bonuses."""
        return _uniform(self._target, prompts, 1).squeeze(1)


def _generator(*key: int) -> torch.Generator:
    # torch reads 32 bits of a seed and no more.
    return torch.Generator().manual_seed(int(np.random.SeedSequence(key).generate_state(1)[0]))


def _uniform(
    streams: Sequence[torch.Generator], prompts: Sequence[int], count: int
) -> Float[Tensor, "batch count"]:
    draws = [torch.rand(count, generator=streams[i], dtype=torch.float64) for i in prompts]
    return torch.stack(draws)
