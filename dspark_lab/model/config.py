"""The configuration of a drafter, as its ``config.json`` holds it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, fields
from typing import Annotated, Any, Literal

from dspark_lab.attention import View
from dspark_lab.blocks import Layout, predicted_slots
from dspark_lab.checks import Count, NonNegative, NotEmpty, Positive, Size, Within, checked, require
from dspark_lab.model.formats import ARCHITECTURE, flat_config
from dspark_lab.model.heads import check_kind

# Keys of a RoPE beside its type's; mrope_section shares axes out that are one and the same in text.
_ROPE = "rope_type type rope_theta partial_rotary_factor mrope_section mrope_interleaved".split()
_ROPES, _ORIGINAL = ("rope_parameters", "rope_scaling"), "original_max_position_embeddings"
_FLOATS = ("factor", "beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim")


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
    ``markov_rank`` 0 or ``markov_head_type`` "none" leaves the Markov head out, and reads as both.
    ``num_target_layers`` bounds the ids, and is there for other readers of a checkpoint.

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
        check_kind(self.markov_head_type)
        predicted_slots(self.block_size, self.layout)
        vocabulary, mask = f"the vocabulary, [0, {self.vocab_size - 1}]", self.mask_token_id
        _refuse_unless(mask < self.vocab_size, f"mask_token_id must lie in {vocabulary}", mask)
        heads, shared = self.num_attention_heads, self.num_key_value_heads
        divides = f"num_key_value_heads must divide num_attention_heads, {heads}"
        _refuse_unless(heads % shared == 0, divides, shared)
        _refuse_unless(self.head_dim % 2 == 0, "head_dim must be even", self.head_dim)
        ids, above = tuple(self.target_layer_ids), self.num_target_layers
        ascending = "target_layer_ids must be strictly increasing"
        _refuse_unless(list(ids) == sorted(set(ids)), ascending, ids)
        below = f"target_layer_ids must be below num_target_layers, {above}"
        _refuse_unless(above is None or ids[-1] < above, below, ids)
        kinds, layers = tuple(self.layer_types or ()), self.num_hidden_layers
        each = f"layer_types must be one for each of {layers} layers"
        _refuse_unless(len(kinds) in (0, layers), each, len(kinds))
        slides = "sliding_attention" in kinds
        needs = "layer_types with 'sliding_attention' need a sliding_window"
        _refuse_unless(not slides or self.sliding_window is not None, needs, "none")
        most = self.draft_vocab_size or self.vocab_size
        few = f"draft_vocab_size must be at most vocab_size, {self.vocab_size}"
        _refuse_unless(most <= self.vocab_size, few, most)
        needs, none = "confidence_head_with_markov needs a Markov head", "rank 0 or kind 'none'"
        _refuse_unless(self.has_markov_head or not self.reads_markov, needs, none)
        # One form for each drafter, so that equal ones compare equal.
        one: dict[str, Any] = {"target_layer_ids": ids, "layer_types": kinds if slides else None}
        one["confidence_head_with_markov"] = self.reads_markov
        if not self.has_markov_head:
            one |= {"markov_rank": 0, "markov_head_type": "none"}
        if not slides:
            one |= {"sliding_window": None, "is_causal": self.is_causal or None}
        own = {"draft_vocab_size": self.vocab_size, "target_hidden_size": self.hidden_size}
        for name, same in {**own, "logit_scale": 1}.items():
            one[name] = None if getattr(self, name) == same else getattr(self, name)
        for name, value in one.items():
            object.__setattr__(self, name, value)

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
        said = self.is_causal
        return [View(width, width is not None if said is None else said) for width in windows]

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
        kinds = list(self.layer_types or ["full_attention"] * self.num_hidden_layers)
        values: dict[str, Any] = {
            "architectures": [ARCHITECTURE],
            "model_type": "qwen3",
            "hidden_act": "silu",
            "attention_dropout": 0.0,
            "use_sliding_window": "sliding_attention" in kinds,
            "tie_word_embeddings": False,
        }
        values |= {name: value for name, value in asdict(self).items() if value is not None}
        values |= {"layer_types": kinds, "target_layer_ids": list(self.target_layer_ids)}
        if values["sample_from_anchor"]:
            del values["sample_from_anchor"]  # what readers of published files take for granted
        else:
            values["dspark_bonus_anchor"] = True
        scaled = {k: v for k, v in values.pop("yarn", {}).items() if v is not None}
        rope = {"rope_type": "yarn" if scaled else "default", **scaled}
        # Where transformers looks for it from version 5 on; before, in fields of their own.
        values["rope_parameters"] = rope | {"rope_theta": self.rope_theta}
        if scaled:
            values["rope_scaling"] = rope
        return values

    @classmethod
    @checked
    def from_dict(cls, values: Mapping[str, Any]) -> DrafterConfig:
        """Read the content of a ``config.json`` of any format; unknown keys are metadata.

        RoPE may stand in ``rope_parameters`` or ``rope_scaling``, its base by itself. Fields for
        training alone, as ``attention_dropout``, and those that a draft inherits from its target's
        config without following them, as ``quantization_config``, are not read.

        Raises:
            ValueError: another architecture or activation, a RoPE that is partial or scaled other
                than by YaRN, or two fields that contradict each other.
        """
        flat = flat_config(values)
        known = {field.name: flat[field.name] for field in fields(cls) if field.name in flat}
        missing = [f.name for f in fields(cls) if f.name not in known and f.default is MISSING]
        if missing:
            raise ValueError(f"config must hold {', '.join(missing)}, which it does not")
        return cls(**known | _read_rope(flat))


def _refuse_unless(holds: bool, wanted: str, given: Any) -> None:
    if not holds:
        raise ValueError(f"{wanted}, got {given}")


def _read_rope(flat: Mapping[str, Any]) -> dict[str, Any]:
    """``rope_theta`` and ``yarn``, wherever they stand."""
    scalings = {name: read_scaling(name, flat) for name in _ROPES if flat.get(name)}
    bases = {"rope_theta": flat.get("rope_theta")}
    bases |= {f"{name}.rope_theta": flat[name].get("rope_theta") for name in scalings}
    found = {name: value for name, value in bases.items() if value is not None}
    if not found:
        raise ValueError("config must hold rope_theta, by itself or in rope_parameters")
    first, *others = found.values()
    if any(other != first for other in others):
        raise ValueError(f"rope_theta must be one number, got {found}")
    yarn, *others = scalings.values() or [None]
    if any(other != yarn for other in others):
        both = " and ".join(f"{name} {dict(flat[name])}" for name in scalings)
        raise ValueError(f"RoPE must be scaled in one way, got {both}")
    return {"rope_theta": float(first) if type(first) is int else first, "yarn": yarn}


@checked
def read_scaling(name: str, config: Mapping[str, Any]) -> Yarn | None:
    """How the RoPE ``name`` of a ``config.json`` is scaled; None where it is not.

    As transformers has it, the original length is by default the longest row, and a factor that is
    null is how many times longer that row is.
    """
    rope = config[name]
    if not isinstance(rope, Mapping):
        raise TypeError(f"{name} must be an object, got {rope!r}")
    said = [kind for kind in (rope.get("rope_type"), rope.get("type")) if kind] or ["default"]
    # One position a token, as text has it, makes of three axes' angles the plain ones.
    kind, *others = ["default" if kind == "mrope" else kind for kind in said]
    if any(other != kind for other in others):
        raise ValueError(f"{name} must be of one type, got {dict(rope)!r}")
    rest: dict[str, Any] = {k: v for k, v in rope.items() if k not in _ROPE and v is not None}
    partial = rope.get("partial_rotary_factor") not in (None, 1)
    names = {field.name for field in fields(Yarn)}
    if partial or kind not in ("default", "yarn") or not rest.keys() <= names:
        wanted = "of rope_type 'default' or 'yarn' over whole heads"
        raise ValueError(f"{name} must be {wanted}, got {dict(rope)!r}")
    if kind == "default":
        if rest:
            unscaled = f"{name} of rope_type 'default' must not be scaled"
            raise ValueError(f"{unscaled}, got {dict(rope)!r}")
        return None
    if "factor" not in rope:
        raise ValueError(f"{name} of rope_type 'yarn' must hold factor, got {dict(rope)!r}")
    longest = config.get("max_position_embeddings", DrafterConfig.max_position_embeddings)
    outside = config.get(_ORIGINAL)
    original = rest.setdefault(_ORIGINAL, longest if outside is None else outside)
    if outside not in (None, original):
        both = f"{outside} and in {name} {original}"
        raise ValueError(f"{_ORIGINAL} must be one number, got {both}")
    if rope["factor"] is None:
        require("max_position_embeddings", longest, Count)
        require(_ORIGINAL, original, Count)
        rest["factor"] = longest / original
    whole = [key for key in _FLOATS if type(rest.get(key)) is int]
    return Yarn(**rest | {key: float(rest[key]) for key in whole})
