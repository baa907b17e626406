"""The ``config.json`` of other programs, to and from this library's own.

What the files of each program call the same thing:

    dspark       DeepSpec's published files and this library's own, flat
    automodel    NeMo AutoModel's: as dspark, weights always with an index
    speculators  backbone under ``transformer_layer_config``; ``aux_hidden_state_layer_ids`` count
                 the embedding as 0: one more than ``target_layer_ids``
    specforge    backbone flat, what is of the draft under ``dflash_config`` (or ``dspark_config``)

What a block is in them. ``block_size`` counts the slots that the backbone reads, in all of them;
where the anchor is given, slot 0 predicts nothing, so that N tokens need a block of 1 + N:

    key                              anchor_predicts    anchor_given    where it is absent
    sample_from_anchor               true               false           what the family does
    dspark_bonus_anchor              false              true            says nothing
    shift_label (DFlash)             true               -               says nothing
    speculative_tokens (speculators) block_size         block_size - 1  says nothing; a smaller
                                                                        number says nothing either
    family                           DSpark             DFlash

What slots see of their block is ``is_causal`` (or ``dflash_config.causal``): true, in no layer a
later slot; false, in all layers every slot; absent, every slot but in sliding layers, which are
causal. speculators has ``sliding_window_non_causal`` instead, of the sliding layers alone.

A file that says a thing twice, differently, is refused with both places. Names that mean nothing
for the draft, as ``quantization_config`` of an FP8 target, are passed over.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

from dspark_lab.checks import checked, require

Format = Literal["dspark", "automodel", "speculators", "specforge"]

ARCHITECTURE = "Qwen3DSparkModel"
# Those that are loaded, with their family.
ARCHITECTURES = {
    ARCHITECTURE: "DSpark",
    "DSparkSpeculator": "DSpark",
    "DSparkDraftModel": "DSpark",
    "DFlashSpeculator": "DFlash",
    "DFlashDraftModel": "DFlash",
}
# By a part of the architecture's name or of speculators_model_type, the first that fits.
_OTHERS = {
    "dflash2": "DFlash 2",
    "domino": "Domino",
    "jetspec": "JetSpec",
    "d2sd": "D2SD",
    "eagle3": "EAGLE-3",
    "peagle": "P-EAGLE",
    "eagle": "EAGLE",
    "medusa": "Medusa",
    "hydra": "Hydra",
    "mtp": "multi-token prediction",
    "dspark": "DSpark on another backbone",
    "dflash": "DFlash on another backbone",
}
_NESTED = ("dflash_config", "dspark_config")
# Own name: other names. These and those of the backbone may also stand in dflash_config and
# dspark_config.
_DRAFT_KEYS = {
    "block_size": ("dspark_block_size",),
    "mask_token_id": ("dspark_noise_token_id",),
    "target_layer_ids": ("dspark_target_layer_ids",),
    "markov_rank": ("dspark_markov_rank",),
    "markov_head_type": ("dspark_markov_head_type",),
    "enable_confidence_head": (),
    "confidence_head_with_markov": (),
    "sample_from_anchor": (),
    "num_anchors": ("max_anchors",),
    "draft_vocab_size": (),
    "target_hidden_size": (),
    "num_target_layers": (),
    "is_causal": ("causal",),
}
_LAYER_IDS_FROM_1 = ["aux_hidden_state_layer_ids", "eagle_aux_hidden_state_layer_ids"]
_BACKBONE = """
    model_type hidden_act attention_dropout vocab_size hidden_size intermediate_size
    num_hidden_layers num_attention_heads head_dim num_key_value_heads rms_norm_eps
    max_position_embeddings attention_bias initializer_range rope_theta rope_parameters
    rope_scaling layer_types use_sliding_window sliding_window final_logit_softcapping logit_scale
""".split()
# AutoModel's drafter predicts every token, with full attention, its logits as they are.
_NOT_IN_AUTOMODEL = """
    draft_vocab_size final_logit_softcapping logit_scale target_hidden_size sliding_window is_causal
""".split()
# What keys may say that a file may leave out; with another value it is another model's.
_ALLOWED: dict[str, tuple[Any, ...]] = {
    "model_type": ("qwen3",),
    "hidden_act": ("silu",),
    "partial_rotary_factor": (1,),
    **dict.fromkeys(("attention_mode", "attention_modes"), ("gqa", "mha")),
    **dict.fromkeys(("use_swa", "attention_sink_bias", "kv_lora_rank"), (False,)),
}
# Other names of one backbone: a draft has no experts where its target has some; SpecForge's own.
_QWEN3 = ("qwen3_moe", "dspark")
_NO_HEADS = {"markov_rank": 0, "markov_head_type": "none"}
_NO_HEADS |= {"enable_confidence_head": False, "confidence_head_with_markov": False}


def format_of(values: Mapping[str, Any]) -> Format:
    """The format of a ``config.json``; what AutoModel writes is called "dspark" too."""
    if "transformer_layer_config" in values or "speculators_model_type" in values:
        return "speculators"
    flat = values.get("architectures") in (None, [ARCHITECTURE])
    nested = any(_object(values, name) for name in _NESTED)
    return "specforge" if nested and not flat else "dspark"


@checked
def family_of(values: Mapping[str, Any]) -> str | None:
    """The family of drafters that a ``config.json`` is of, None for what is no drafter's."""
    kind, names = values.get("speculators_model_type"), values.get("architectures")
    if names is not None and not isinstance(names, list):
        raise TypeError(f"architectures must be a list, got {names!r}")
    projector = _object(values, "dflash_config").get("projector_type", values.get("projector_type"))
    if kind is None and not names:
        # Who writes flat files need not name an architecture; every drafter of blocks has a size.
        blocks = any(True for _ in _said(values, ("block_size", *_DRAFT_KEYS["block_size"])))
        medusa = [key for key in values if key.startswith("medusa")]
        names = [ARCHITECTURE] if blocks else [*medusa, values.get("model_type")]
    names = [kind] if kind else [ARCHITECTURES.get(str(name), name) for name in names or ()]
    said = [str(name).lower().replace("_", "") for name in (projector, *names) if name]
    for name in said:
        if name not in ("dspark", "dflash"):
            keys = ["dspark"] if any(key.startswith("dspark_") for key in values) else []
            words = [(part, word) for word in (name, *keys) for part in _OTHERS]
            return next((_OTHERS[part] for part, word in words if part in word), None)
    return {"dspark": "DSpark", "dflash": "DFlash"}.get(said[-1]) if said else None


def flat_config(values: Mapping[str, Any]) -> dict[str, Any]:
    """A ``config.json`` of any format with the names and the nesting of "dspark".

    Other keys stay as they are.

    Raises:
        ValueError: another family, what this library's drafter cannot do, or two keys that
            contradict each other.
    """
    family = _loaded_family(values)
    backbone = _object(values, "transformer_layer_config")
    flat = {k: v for k, v in values.items() if k not in ("transformer_layer_config", *_NESTED)}
    kind = backbone.get("model_type", flat.get("model_type"))
    for key, value in backbone.items():
        first = flat.get(key)
        if key in _BACKBONE and key != "model_type":
            flat[key] = _one_value(key, {key: first, f"transformer_layer_config.{key}": value})
        elif first is None:
            flat[key] = value
    flat |= {"architectures": [ARCHITECTURE], "model_type": "qwen3" if kind in _QWEN3 else kind}
    backbone_keys = {key: () for key in _BACKBONE if key != "model_type"}
    for key, others in {**backbone_keys, **_DRAFT_KEYS}.items():
        value = _one_value(key, dict(_said({**values, **flat}, (key, *others))))
        for other in others:
            flat.pop(other, None)
        if value is not None:
            flat[key] = value
    if family == "DFlash":
        keys = ("markov_rank", "enable_confidence_head")
        heads = " and ".join(f"{key} {flat[key]!r}" for key in keys if flat.get(key))
        if heads:
            raise ValueError(f"{heads} contradicts the family, DFlash, which has no heads")
        flat |= _NO_HEADS
    ids = _read_layer_ids(values, flat.pop("target_layer_ids", None))
    if ids is not None:
        flat["target_layer_ids"] = ids
    flat["sample_from_anchor"] = _read_layout(values, flat, family)
    _read_windows(flat)
    if flat.get("draft_vocab_size") == flat.get("vocab_size"):
        flat["draft_vocab_size"] = None  # speculators has the key in every file
    for key in (*_LAYER_IDS_FROM_1, "dspark_bonus_anchor", "shift_label"):
        flat.pop(key, None)
    for key, allowed in _ALLOWED.items():
        for name, value in _said({**values, **flat}, (key,)):
            if any(one not in allowed for one in (value if isinstance(value, list) else [value])):
                wanted = " or ".join(map(repr, allowed))
                raise ValueError(f"{name} must be {wanted} or absent, got {value!r}")
    return flat


def config_words(values: Mapping[str, Any]) -> list[str]:
    """The keys of a ``config.json`` for the draft that nothing here reads, by their places."""
    known = {*_DRAFT_KEYS, *(name for names in _DRAFT_KEYS.values() for name in names)}
    known |= {*_ALLOWED, *_BACKBONE, "projector_type", "dspark_bonus_anchor", "shift_label"}
    return [
        f"{place}.{name}"
        for place in _NESTED
        for name, value in _object(values, place).items()
        if name not in known and value is not None
    ]


def config_for(
    own: Mapping[str, Any], target: Format, *, speculators_config: Any = None
) -> dict[str, Any]:
    """The ``config.json`` of a format, from one of "dspark" with every field of the drafter.

    Args:
        speculators_config: for "speculators", that of its file where there is one.

    Raises:
        ValueError: the format has no words for a field of the drafter.
    """
    given = not own.get("sample_from_anchor", True)
    headless = not own["markov_rank"] and not own["enable_confidence_head"]
    if given and (target == "automodel" or (target == "specforge" and not headless)):
        needs = "a drafter whose anchor is given (sample_from_anchor false)"
        why = "in its files every slot predicts, and the weights were trained for other positions"
        raise ValueError(f"format {target!r} cannot hold {needs}: {why}")
    if target == "dspark":
        return dict(own)
    if target == "automodel":
        found = [f"{key} {own[key]}" for key in _NOT_IN_AUTOMODEL if own.get(key) is not None]
        if found:
            raise ValueError(f"format 'automodel' has no key for {', '.join(found)}")
        return dict(own)
    backbone = {key: own[key] for key in _BACKBONE if key in own}
    rest = {k: v for k, v in own.items() if k not in (*backbone, "dspark_bonus_anchor")}
    dflash = given and headless
    if dflash:
        rest = {key: value for key, value in rest.items() if key not in _NO_HEADS}
    elif not own["markov_rank"]:
        rest["markov_head_type"] = "vanilla"  # the one that speculators allows beside rank 0
    if target == "specforge":
        rest["architectures"] = ["DFlashDraftModel" if dflash else "DSparkDraftModel"]
        names = ("target_layer_ids", "mask_token_id", *_NO_HEADS)
        nested = {key: rest.pop(key) for key in names if key in rest}
        nested["projector_type"] = "dflash" if dflash else "dspark"
        rest.pop("sample_from_anchor", None)  # follows from the architecture
        return rest | backbone | {"dflash_config": nested}
    causal = own.get("is_causal")
    if causal and "full_attention" in own["layer_types"]:
        needs = "full_attention layers that are causal (is_causal true)"
        raise ValueError(f"format 'speculators' has no key for {needs}")
    if causal is False:
        del rest["is_causal"]  # which says the same as sliding_window_non_causal
    kind = "dflash" if dflash else "dspark"
    slots = own["block_size"]
    rest["architectures"] = ["DFlashDraftModel" if dflash else "DSparkDraftModel"]
    rest["aux_hidden_state_layer_ids"] = [i + 1 for i in rest.pop("target_layer_ids")]
    rest["max_anchors"] = rest.pop("num_anchors")
    rest["draft_vocab_size"] = own.get("draft_vocab_size") or own["vocab_size"]
    proposal = {"proposal_type": "greedy", "speculative_tokens": slots - given}
    described = {
        "algorithm": kind,
        "default_proposal_method": "greedy",
        "proposal_methods": [proposal],
        "verifier": {"name_or_path": "", "architectures": []},
    }
    return rest | {
        "speculators_model_type": kind,
        "sample_from_anchor": not given,
        "sliding_window_non_causal": causal is False,
        "transformer_layer_config": backbone,
        "speculators_config": speculators_config or described,
    }


def _loaded_family(values: Mapping[str, Any]) -> str:
    family = family_of(values)
    said = {k: values[k] for k in ("architectures", "speculators_model_type") if values.get(k)}
    names = ", ".join(f"{key} {value!r}" for key, value in said.items())
    if family is not None and family in ARCHITECTURES.values():
        others = {
            ARCHITECTURES.get(str(name), family) for name in values.get("architectures") or ()
        }
        if _object(values, "dflash_config").get("projector_type") == "dspark":
            others.add("DSpark")
            names += ", projector_type 'dspark'"
        if others - {family}:
            raise ValueError(f"{names} contradict each other: {', '.join(sorted(others))}")
        return family
    if family is not None:
        what = f"a drafter of {family}, which this library does not load"
        raise ValueError(f"{names or 'the config'} is {what}")
    wanted = ", ".join(f"[{name!r}]" for name in ARCHITECTURES)
    names = names or "none, and no block_size"
    raise ValueError(f"architectures must be one of {wanted} or absent, got {names}")


def _read_layer_ids(values: Mapping[str, Any], own: Any) -> Any:
    places = {"target_layer_ids": own}
    for name, ids in _said(values, _LAYER_IDS_FROM_1):
        require(name, ids, Sequence[int])
        if ids != sorted(set(ids)) or min(ids, default=0) < 0:
            raise ValueError(f"{name} must be strictly increasing, from 0 on, got {ids}")
        places[f"{name} - 1"] = [i - 1 for i in ids]
    return _one_value("target_layer_ids", places)


def _read_layout(values: Mapping[str, Any], flat: Mapping[str, Any], family: str) -> bool:
    """Whether a block's first slot predicts: ``sample_from_anchor``."""
    places = {"sample_from_anchor": flat.get("sample_from_anchor")}
    for name, bonus in _said(values, ("dspark_bonus_anchor",)):
        require(name, bonus, bool)
        places[f"not {name}"] = not bonus
    if family == "DFlash":
        places |= {name: True for name, shift in _said(values, ("shift_label",)) if shift is True}
    said = _one_value("sample_from_anchor", places)
    require("sample_from_anchor", said, bool | None)
    slots, tokens = flat.get("block_size"), _speculative_tokens(values)
    if said is None:
        # Files from before speculators had the key are of the layout that it had then.
        said = family == "DSpark" and not (tokens and tokens + 1 == slots)
    if tokens and type(slots) is int and tokens > slots - (not said):
        has = f"{slots - (not said)} of {slots} slots predict (sample_from_anchor {said})"
        raise ValueError(f"speculative_tokens {tokens} contradicts block_size: {has}")
    return said


def _read_windows(flat: dict[str, Any]) -> None:
    """Make ``layer_types``, ``sliding_window`` and ``is_causal`` those of this draft's layers.

    ``use_sliding_window`` alone makes no window, and a window needs a layer that slides. Without
    ``layer_types`` the layers from ``max_window_layers`` on slide, as transformers has it.
    """
    count, kinds = flat.get("num_hidden_layers", 0), flat.get("layer_types")
    require("num_hidden_layers", count, int)
    require("layer_types", kinds, list | None)
    if kinds is None and flat.get("use_sliding_window") and flat.get("sliding_window"):
        full = flat.get("max_window_layers", 28)
        require("max_window_layers", full, int)
        kinds = [("full_attention", "sliding_attention")[i >= full] for i in range(count)]
    kinds = (kinds or [])[:count]  # the draft may have fewer layers than the list of its target
    slide = "sliding_attention" in kinds
    flat |= {"layer_types": kinds or None}
    both_ways = flat.pop("sliding_window_non_causal", None)
    if not slide:
        flat["sliding_window"] = None
        return
    if flat.get("use_sliding_window") is False:
        says = "use_sliding_window false contradicts layer_types with 'sliding_attention'"
        raise ValueError(f"{says}, {kinds!r}")
    if both_ways is not None:
        require("sliding_window_non_causal", both_ways, bool)
        causal = flat.get("is_causal")
        if causal is not None and causal == both_ways:
            says = f"sliding_window_non_causal {both_ways} contradicts is_causal {causal}"
            raise ValueError(says)
        flat["is_causal"] = False if both_ways else causal


def _speculative_tokens(values: Mapping[str, Any]) -> int | None:
    methods = _object(values, "speculators_config").get("proposal_methods")
    first = methods[0] if isinstance(methods, list) and methods else None
    tokens = first.get("speculative_tokens") if isinstance(first, Mapping) else None
    return tokens if type(tokens) is int else None


def _said(values: Mapping[str, Any], names: Iterable[str]) -> Iterable[tuple[str, Any]]:
    """Where a ``config.json`` says one of ``names``, and what."""
    for name in names:
        for place in ("", *_NESTED):
            holder = _object(values, place) if place else values
            if holder.get(name) is not None:
                yield f"{place}.{name}" if place else name, holder[name]


def _one_value(key: str, places: Mapping[str, Any]) -> Any:
    found = [(place, value) for place, value in places.items() if value is not None]
    for place, value in found[1:]:
        if value != found[0][1]:
            first = f"{found[0][0]} {found[0][1]!r}"
            raise ValueError(f"{key} is said twice, differently: {first} and {place} {value!r}")
    return found[0][1] if found else None


def _object(values: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    value = values.get(name) or {}
    if not isinstance(value, Mapping):
        raise TypeError(f"{name} must be an object, got {value!r}")
    return value
