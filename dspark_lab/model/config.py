"""The configuration of a drafter, as its ``config.json`` holds it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, fields
from typing import Annotated, Any, Literal

from dspark_lab.attention import View
from dspark_lab.blocks import Layout, predicted_slots
from dspark_lab.checks import Count, NonNegative, NotEmpty, Positive, Size, Within, checked
from dspark_lab.model.heads import check_kind

ARCHITECTURE = "Qwen3DSparkModel"
# Fields that a config.json may leave out; with another value it is another model's.
_FIXED = {
    "architectures": [ARCHITECTURE],
    "model_type": "qwen3",
    "hidden_act": "silu",
    "partial_rotary_factor": 1,
}
_PLAIN_ROPE = {"rope_type": "default", "type": "default", "partial_rotary_factor": 1}


LayerType = Literal["full_attention", "sliding_attention"]


@checked
@dataclass(frozen=True)
class Yarn:
    """RoPE scaled to longer rows than the layers were made for (YaRN, arXiv 2309.00071).

    Names and defaults are transformers': ``beta_fast`` and ``beta_slow`` are in rotations over
    ``original_max_position_embeddings`` tokens, and cosine and sine are multiplied by
    ``attention_factor``; where that is None, it follows from ``factor``, ``mscale`` and
    ``mscale_all_dim``. ``truncate`` rounds the limits of the ramp to whole pairs.
    """

    factor: Annotated[float, Within(1)]
    original_max_position_embeddings: Count
    beta_fast: Positive = 32.0
    beta_slow: Positive = 1.0
    attention_factor: Positive | None = None
    mscale: NonNegative | None = None
    mscale_all_dim: NonNegative | None = None
    truncate: bool = True


@checked
@dataclass(frozen=True)
class DrafterConfig:
    """The shape of a drafter; names and defaults are those of the published checkpoints.

    ``target_layer_ids`` are the target's layers whose states are the context feature (see
    :func:`dspark_lab.common.extract_context_feature`), each ``target_hidden_size`` wide, which is
    ``hidden_size`` where None. A training forward draws ``num_anchors`` for each row.
    ``markov_rank`` 0 or ``markov_head_type`` "none" leaves the Markov head out.
    ``num_target_layers`` is there for other readers of a checkpoint.

    Where ``sample_from_anchor`` is False, slot 0 of a block is the anchor and predicts nothing
    (``layout``). Layers whose ``layer_types`` are "sliding_attention", by default none, see of the
    context a ``sliding_window`` alone. Layers that are causal (``is_causal``; where None, those
    with a window, as trainers and servers have it) see of their block no later slot. With a
    ``draft_vocab_size`` the drafter predicts that many tokens of the vocabulary. Its logits are
    ``logit_scale`` times the sum of the Markov bias and of the LM head's product under the soft cap
    ``final_logit_softcapping``.
    """

    vocab_size: Count
    hidden_size: Count
    intermediate_size: Count
    num_hidden_layers: Count
    num_attention_heads: Count
    num_key_value_heads: Count
    head_dim: Count
    target_layer_ids: Annotated[Sequence[Annotated[int, Within(-1)]], NotEmpty()]
    block_size: Count
    mask_token_id: Size
    num_anchors: Count = 512
    markov_rank: Size = 256
    markov_head_type: str = "vanilla"
    enable_confidence_head: bool = True
    confidence_head_with_markov: bool = True
    rms_norm_eps: Positive = 1e-6
    rope_theta: Positive = 1e6
    max_position_embeddings: Count = 32768
    target_hidden_size: Count | None = None
    num_target_layers: Count | None = None
    attention_bias: bool = False
    initializer_range: Positive = 0.02
    sample_from_anchor: bool = True
    sliding_window: Count | None = None
    layer_types: Sequence[LayerType] | None = None
    draft_vocab_size: Count | None = None
    yarn: Yarn | None = None
    final_logit_softcapping: Positive | None = None
    logit_scale: Positive | None = None
    is_causal: bool | None = None

    def __post_init__(self) -> None:
        mask, last = self.mask_token_id, self.vocab_size - 1
        if mask > last:
            raise ValueError(f"mask_token_id must lie in the vocabulary, [0, {last}], got {mask}")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                "num_key_value_heads must divide num_attention_heads, "
                f"{self.num_attention_heads}, got {self.num_key_value_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim must be even, got {self.head_dim}")
        ids = tuple(self.target_layer_ids)
        if list(ids) != sorted(set(ids)):
            raise ValueError(f"target_layer_ids must be strictly increasing, got {ids}")
        object.__setattr__(self, "target_layer_ids", ids)
        check_kind(self.markov_head_type)
        predicted_slots(self.block_size, self.layout)
        self._check_windows()
        most = self.draft_vocab_size
        if most is not None and most > self.vocab_size:
            wanted = f"draft_vocab_size must be at most vocab_size, {self.vocab_size}"
            raise ValueError(f"{wanted}, got {most}")
        if self.reads_markov and not self.has_markov_head:
            raise ValueError(
                "confidence_head_with_markov needs a Markov head, got markov_rank "
                f"{self.markov_rank} and markov_head_type {self.markov_head_type!r}"
            )

    def _check_windows(self) -> None:
        """Refuse layer types that do not fit; those of full attention alone are left out."""
        kinds = tuple(self.layer_types or ())
        if kinds and len(kinds) != self.num_hidden_layers:
            wanted = f"layer_types must be one for each of {self.num_hidden_layers} layers"
            raise ValueError(f"{wanted}, got {len(kinds)}")
        slides = "sliding_attention" in kinds
        if slides and self.sliding_window is None:
            wanted = "layer_types with 'sliding_attention' need a sliding_window"
            raise ValueError(f"{wanted}, got none")
        object.__setattr__(self, "layer_types", kinds if slides else None)
        object.__setattr__(self, "sliding_window", self.sliding_window if slides else None)
        if not slides and not self.is_causal:
            object.__setattr__(self, "is_causal", None)

    @property
    def layout(self) -> Layout:
        return "anchor_predicts" if self.sample_from_anchor else "anchor_given"

    @property
    def predicted(self) -> int:
        """Slots of a block that predict a token."""
        return predicted_slots(self.block_size, self.layout)

    @property
    def views(self) -> list[View]:
        """What the slots of each layer see of context and block."""
        kinds = self.layer_types or ["full_attention"] * self.num_hidden_layers
        windows = [self.sliding_window if kind == "sliding_attention" else None for kind in kinds]
        causal = self.is_causal
        return [
            View(window, window is not None if causal is None else causal) for window in windows
        ]

    @property
    def output_size(self) -> int:
        """Tokens that the drafter can predict."""
        return self.draft_vocab_size or self.vocab_size

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
        values |= {name: value for name, value in asdict(self).items() if value is not None}
        values["target_layer_ids"] = list(self.target_layer_ids)
        if not self.has_markov_head:
            values["markov_rank"] = 0  # as published checkpoints say it
        return values

    @classmethod
    @checked
    def from_dict(cls, values: Mapping[str, Any]) -> DrafterConfig:
        """Read the content of a ``config.json``; unknown keys are metadata.

        ``rope_theta`` may stand by itself or in ``rope_parameters`` or ``rope_scaling``. Fields for
        training alone, as ``attention_dropout``, and those that a draft inherits from its target's
        config without following them, as ``quantization_config``, are not read. Another
        architecture or activation, sliding windows, scaled or partial RoPE are refused.
        """
        for name, allowed in _FIXED.items():
            if values.get(name) not in (None, allowed):
                raise ValueError(f"{name} must be {allowed!r} or absent, got {values[name]!r}")
        known = {field.name: values[field.name] for field in fields(cls) if field.name in values}
        known["rope_theta"] = _read_rope_theta(values)
        missing = [f.name for f in fields(cls) if f.name not in known and f.default is MISSING]
        if missing:
            raise ValueError(f"config must hold {', '.join(missing)}, which it does not")
        config = cls(**known)
        _refuse_windows(values, config.num_hidden_layers)
        return config


def _refuse_windows(values: Mapping[str, Any], num_hidden_layers: int) -> None:
    """Refuse a layer with a sliding window; ``use_sliding_window`` alone does not make one."""
    kinds = values.get("layer_types")
    if kinds is None:
        windows = values.get("use_sliding_window") and values.get("sliding_window") is not None
        full = values.get("max_window_layers", 0) if windows else num_hidden_layers
        kinds = ["full_attention" if i < full else "sliding" for i in range(num_hidden_layers)]
    if not isinstance(kinds, list):
        raise TypeError(f"layer_types must be a list, got {kinds!r}")
    if any(kind != "full_attention" for kind in kinds[:num_hidden_layers]):
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
    first, *others = found.values()
    if any(other != first for other in others):
        raise ValueError(f"rope_theta must be one number, got {found}")
    return float(first) if type(first) is int else first
