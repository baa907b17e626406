"""The configuration of a drafter, as its ``config.json`` holds it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dspark_lab.checks import require_int, require_number

__all__ = ["ARCHITECTURE", "DrafterConfig"]

# What a config.json may say of this drafter, or leave out; anything else is another model's.
ARCHITECTURE = "Qwen3DSparkModel"
_FIXED = {
    "architectures": [ARCHITECTURE],
    "model_type": "qwen3",
    "hidden_act": "silu",
    "use_sliding_window": False,
    "partial_rotary_factor": 1,
    "quantization_config": None,
}
_PLAIN_ROPE = {"rope_type": "default", "type": "default", "partial_rotary_factor": 1}


@dataclass(frozen=True)
class DrafterConfig:
    """The shape of a drafter; names and defaults are those of the published checkpoints.

    ``target_layer_ids`` are the target's layers whose states are the context feature (see
    :func:`dspark_lab.common.extract_context_feature`), each ``target_hidden_size`` wide, which is
    ``hidden_size`` where None. ``num_anchors`` is what a training forward draws for each row.
    ``markov_rank`` 0 or ``markov_head_type`` "none" leaves the Markov head out.
    ``num_target_layers`` is there for other readers of a checkpoint.

    Raises TypeError or ValueError where sizes are not whole numbers of at least 1, where heads do
    not divide, or where the confidence head asks for a Markov embedding that is not there.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    target_layer_ids: tuple[int, ...]
    block_size: int
    mask_token_id: int
    num_anchors: int = 512
    markov_rank: int = 256
    markov_head_type: str = "vanilla"
    enable_confidence_head: bool = True
    confidence_head_with_markov: bool = True
    rms_norm_eps: float = 1e-6
    rope_theta: float = 1e6
    max_position_embeddings: int = 32768
    target_hidden_size: int | None = None
    num_target_layers: int | None = None
    attention_bias: bool = False
    initializer_range: float = 0.02

    def __post_init__(self) -> None:
        for name in (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "num_key_value_heads",
            "head_dim",
            "block_size",
            "num_anchors",
            "max_position_embeddings",
        ):
            require_int(name, getattr(self, name), 1)
        require_int("markov_rank", self.markov_rank, 0)
        for name in ("target_hidden_size", "num_target_layers"):
            if getattr(self, name) is not None:
                require_int(name, getattr(self, name), 1)
        require_int("mask_token_id", self.mask_token_id, 0)
        if self.mask_token_id >= self.vocab_size:
            raise ValueError(
                f"mask_token_id must lie in the vocabulary, [0, {self.vocab_size - 1}], "
                f"got {self.mask_token_id}"
            )
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                "num_key_value_heads must divide num_attention_heads, "
                f"{self.num_attention_heads}, got {self.num_key_value_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim must be even, got {self.head_dim}")
        ids = tuple(self.target_layer_ids)
        for layer_id in ids:
            require_int("each of target_layer_ids", layer_id, -1)
        if not ids or list(ids) != sorted(set(ids)):
            raise ValueError(
                f"target_layer_ids must be one or more ids, strictly increasing, got {ids}"
            )
        object.__setattr__(self, "target_layer_ids", ids)
        if self.reads_markov and not self.has_markov_head:
            raise ValueError(
                "confidence_head_with_markov needs a Markov head, got markov_rank "
                f"{self.markov_rank} and markov_head_type {self.markov_head_type!r}"
            )

    @property
    def has_markov_head(self) -> bool:
        return self.markov_rank > 0 and self.markov_head_type != "none"

    @property
    def reads_markov(self) -> bool:
        """Whether the confidence head reads the previous token's Markov embedding."""
        return self.enable_confidence_head and self.confidence_head_with_markov

    @property
    def context_size(self) -> int:
        """The width of a context feature."""
        return len(self.target_layer_ids) * (self.target_hidden_size or self.hidden_size)

    def to_dict(self) -> dict[str, Any]:
        """The content of a published ``config.json``."""
        values: dict[str, Any] = {
            "architectures": [ARCHITECTURE],
            "model_type": "qwen3",
            "hidden_act": "silu",
            "attention_dropout": 0.0,
            "layer_types": ["full_attention"] * self.num_hidden_layers,
            "use_sliding_window": False,
            "tie_word_embeddings": False,
            # Where transformers looks for it from version 5 on; before, it is a field of its own.
            "rope_parameters": {"rope_type": "default", "rope_theta": self.rope_theta},
        }
        values |= {name: getattr(self, name) for name in self.__dataclass_fields__}
        values["target_layer_ids"] = list(self.target_layer_ids)
        for name in ("target_hidden_size", "num_target_layers"):
            if values[name] is None:
                del values[name]
        if not self.has_markov_head:
            # Rank 0 is how published checkpoints say so.
            values["markov_rank"] = 0
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> DrafterConfig:
        """Reads the content of a ``config.json``; unknown keys are metadata.

        ``rope_theta`` may stand by itself or in ``rope_parameters`` or ``rope_scaling``. What
        concerns training alone, as ``attention_dropout``, is not read.

        Raises:
            TypeError, ValueError: a field that is missing or of the wrong kind, or one that asks
                for what this drafter does not do: another architecture or activation, sliding
                windows, scaled or partial RoPE, quantised weights.
        """
        _refuse_unsupported(values)
        known = {name: values[name] for name in cls.__dataclass_fields__ if name in values}
        known["rope_theta"] = _read_rope_theta(values)
        missing = [
            name
            for name, field in cls.__dataclass_fields__.items()
            if name not in known and field.default is field.default_factory
        ]
        if missing:
            raise ValueError(f"config must hold {', '.join(missing)}, which it does not")
        for name in ("attention_bias", "enable_confidence_head", "confidence_head_with_markov"):
            if not isinstance(known.get(name, False), bool):
                raise TypeError(f"{name} must be true or false, got {known[name]!r}")
        for name in ("rms_norm_eps", "initializer_range"):
            if name in known:
                _require_positive(name, known[name])
        if not isinstance(known["target_layer_ids"], (list, tuple)):
            raise TypeError(f"target_layer_ids must be a list, got {known['target_layer_ids']!r}")
        known["target_layer_ids"] = tuple(known["target_layer_ids"])
        return cls(**known)


def _refuse_unsupported(values: Mapping[str, Any]) -> None:
    for name, allowed in _FIXED.items():
        if values.get(name) not in (None, allowed):
            raise ValueError(f"{name} must be {allowed!r} or absent, got {values[name]!r}")
    kinds = values.get("layer_types") or []
    if any(kind != "full_attention" for kind in kinds):
        raise ValueError(f"layer_types must all be 'full_attention', got {kinds!r}")


def _read_rope_theta(values: Mapping[str, Any]) -> float:
    found: dict[str, Any] = {"rope_theta": values.get("rope_theta")}
    for name in ("rope_parameters", "rope_scaling"):
        rope = values.get(name) or {}
        if not isinstance(rope, Mapping):
            raise TypeError(f"{name} must be an object, got {rope!r}")
        for key, value in rope.items():
            if key != "rope_theta" and value not in (None, _PLAIN_ROPE.get(key)):
                raise ValueError(f"{name} must be of rope_type 'default' alone, got {dict(rope)!r}")
        found[f"{name}.rope_theta"] = rope.get("rope_theta")
    found = {name: value for name, value in found.items() if value is not None}
    if not found:
        raise ValueError("config must hold rope_theta, by itself or in rope_parameters")
    for name, value in found.items():
        _require_positive(name, value)
    if len(set(found.values())) > 1:
        raise ValueError(f"rope_theta must be one number, got {found}")
    return float(next(iter(found.values())))


def _require_positive(name: str, value: Any) -> None:
    require_number(name, value)
    if not 0 < value < float("inf"):
        raise ValueError(f"{name} must be a finite number > 0, got {value}")
