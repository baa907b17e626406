"""What a step of a mixture of experts costs: more tokens to verify touch more experts.

A token picks top_k of the E experts of a layer. With routing at random, and independent of the
other tokens', n tokens touch, on average,

    touched(n) = E * (1 - (1 - top_k / E) ** n)

experts of a layer. A step reads all weights that it touches once, and computes each token with its
own:

    seconds(n) = fixed + max(bytes touched / bandwidth, 2 * n * parameters of a token / flops)

Neighbouring tokens route alike, so that a measured step may cost less; a dense target has no such
slope until the step is bound by arithmetic.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float

from dspark_lab.checks import Count, NonNegative, Positive, Size, checked
from dspark_lab.files import read_json
from dspark_lab.serving.steps import StepsPerSecond, measured_points

# How many experts a layer has, by family.
_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts")


@checked
@dataclass(frozen=True)
class Experts:
    """The sizes of a mixture of experts that the cost of a step depends on.

    ``layers`` have ``experts`` each, of ``expert_parameters``, of which a token takes ``top_k``.
    ``other_parameters`` are read in every step: attention, dense layers, shared experts, the LM
    head.
    """

    experts: Count
    top_k: Count
    layers: Count
    expert_parameters: Count
    other_parameters: Size

    def __post_init__(self) -> None:
        if self.top_k > self.experts:
            raise ValueError(f"top_k must be at most {self.experts} experts, got {self.top_k}")

    @classmethod
    @checked
    def of(cls, source: str | os.PathLike[str] | Mapping[str, Any]) -> Experts:
        """From a target's ``config.json``, its folder or its content; no weights are needed.

        Raises:
            ValueError: a family that transformers does not know, or one without experts.
        """
        import transformers

        values = source
        if not isinstance(values, Mapping):
            path = Path(values).expanduser()
            values = read_json(path / "config.json" if path.is_dir() else path)
        kind = values.get("model_type")
        if kind not in transformers.models.auto.configuration_auto.CONFIG_MAPPING:
            raise ValueError(f"model_type must be a family that transformers knows, got {kind!r}")
        config = transformers.AutoConfig.for_model(**values).get_text_config()
        experts = next(
            (getattr(config, name, None) for name in _COUNTS if hasattr(config, name)), 0
        )
        top_k = getattr(config, "num_experts_per_tok", None)
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(config)
        sizes = {name: weight.numel() for name, weight in model.named_parameters()}
        routed = [name for name in sizes if ".experts." in name]
        if not experts or not top_k or not routed:
            raise ValueError(f"a target must have experts to count, got {kind!r} without")
        layers = len({name.split(".experts.")[0] for name in routed})
        of_experts = sum(sizes[name] for name in routed)
        others = sum(sizes.values()) - of_experts
        if not config.tie_word_embeddings:
            # Of the embedding a step reads its tokens' rows alone.
            others -= model.get_input_embeddings().weight.numel()
        return cls(experts, top_k, layers, of_experts // (layers * experts), others)

    def touched(self, tokens: Any) -> Any:
        """Experts of a layer that a step of so many tokens reads, on average; array or number."""
        return self.experts * (
            1 - (1 - self.top_k / self.experts) ** np.asarray(tokens, dtype=float)
        )

    @checked
    def steps(
        self,
        tokens: Any,
        *,
        bandwidth: Positive,
        flops: Positive,
        bytes_per_parameter: Positive = 2.0,
        fixed_seconds: NonNegative = 0.0,
        device: str = "computed, routing at random",
        target: str = "",
    ) -> StepsPerSecond:
        """Steps per second at rising numbers of ``tokens`` per step.

        Reading the context's keys and values is not in it.

        Args:
            bandwidth: bytes per second of memory.
            flops: arithmetic operations per second.
            fixed_seconds: of every step, whatever its size.
        """
        points = measured_points("tokens", tokens)
        own = self.layers * self.expert_parameters
        read = (self.other_parameters + own * self.touched(points)) * bytes_per_parameter
        computed = 2.0 * points * (self.other_parameters + own * self.top_k)
        seconds = fixed_seconds + np.maximum(read / bandwidth, computed / flops)
        return StepsPerSecond(points, 1 / seconds, 0, device, target)

    @checked
    def table(self, steps: StepsPerSecond, measured: StepsPerSecond | None = None) -> pd.DataFrame:
        """What each step reads and costs, beside what was ``measured``, NaN without.

        Returns:
            a row for each point of ``steps``: ``tokens``, ``touched`` experts of a layer,
            ``seconds``, ``measured``, and both as a multiple of those of the first point,
            ``growth`` and ``growth_measured``.
        """
        points = steps.tokens
        seconds = np.asarray(steps.seconds(points))
        found: Float[np.ndarray, " point"] = np.full(len(points), np.nan)
        if measured is not None:
            found = np.asarray(measured.seconds(points))
        columns = {"tokens": points, "touched": self.touched(points), "seconds": seconds}
        columns |= {"measured": found, "growth": seconds / seconds[0]}
        return pd.DataFrame(columns | {"growth_measured": found / found[0]})
