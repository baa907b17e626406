"""A checkpoint in one table, from its ``config.json`` and the headers of its weights alone.

What servers do with a file is from their sources of August and September 2026 (vLLM 0.29, SGLang,
TensorRT-LLM and llama.cpp of that time); where those say nothing, "not known".
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

from dspark_lab.checks import checked
from dspark_lab.model.checkpoint import (
    CALIBRATION,
    CONFIG,
    Stored,
    find_folder,
    read_checkpoint,
    read_config,
)
from dspark_lab.model.formats import ARCHITECTURES, config_words, family_of, format_of

if TYPE_CHECKING:
    import pandas as pd

Line = tuple[str, Any, str]
_SERVERS = ("vLLM", "SGLang", "TensorRT-LLM", "llama.cpp")


@checked
def describe_checkpoint(folder: str | os.PathLike[str]) -> pd.DataFrame:
    """What a checkpoint of a drafter is, and what each server will make of it.

    No weights are read. A family that this library does not load is named.

    Args:
        folder: as :func:`load_drafter`.

    Returns:
        pd.DataFrame: ``property``, ``value`` and ``source``, the file or key that says so.

    Raises:
        OSError, TypeError, ValueError: there is no ``config.json``, or none that can be read.
    """
    import pandas as pd

    path = find_folder(folder)
    values = read_config(path)
    try:
        lines: list[Line] = [("path", str(path), ""), *_kind(values)]
    except TypeError as error:
        raise TypeError(f"{path / CONFIG}: {error}") from None
    try:
        stored = read_checkpoint(path)
    except (OSError, TypeError, ValueError) as error:
        lines += [("loads here", f"no: {error}", ""), *_without_loading(values)]
        lines += [(name, "not known: not loaded here", "") for name in _SERVERS]
    else:
        needs = f", with target=, which has {' and '.join(stored.absent)}" if stored.absent else ""
        lines += [("loads here", f"yes{needs}", ""), *_model(stored), *_weights(stored)]
        lines += _servers(stored)
    return pd.DataFrame(lines, columns=["property", "value", "source"])


def _kind(values: dict[str, Any]) -> Iterator[Line]:
    said = [key for key in ("architectures", "speculators_model_type") if values.get(key)]
    family = family_of(values)
    source = ", ".join(f"{key} {values[key]}" for key in said)
    yield "family", family or "not a drafter's", f"{CONFIG}: {source or 'no architectures'}"
    if family in ARCHITECTURES.values():
        kind = format_of(values)
        yield "format", "dspark (DeepSpec, NeMo AutoModel)" if kind == "dspark" else kind, CONFIG


def _without_loading(values: dict[str, Any]) -> Iterator[Line]:
    """What a file says that is not loaded, in its own words."""
    for holder in ("", "transformer_layer_config", "dflash_config"):
        inside = values.get(holder, {}) if holder else values
        for key in ("block_size", "num_hidden_layers", "hidden_size", "vocab_size"):
            if isinstance(inside, dict) and inside.get(key) is not None:
                yield key, inside[key], f"{CONFIG}: {f'{holder}.' if holder else ''}{key}"


def _model(stored: Stored) -> Iterator[Line]:
    c, said = stored.config, partial(_source, stored.values)
    what = "every slot predicts" if c.sample_from_anchor else "slot 0 is the anchor itself"
    layout, family = said("sample_from_anchor", "dspark_bonus_anchor"), family_of(stored.values)
    by = "the family"
    if family == "DSpark" and not c.sample_from_anchor:
        by = "speculators_config, whose speculative_tokens are one less than block_size"
    elif family == "DFlash" and c.sample_from_anchor:
        by = "shift_label"
    yield "layout", f"{c.layout}: {what}", layout or f"{CONFIG}: {by}"
    predicted = f"{c.block_size} slots, {c.predicted} of them predict"
    yield "block", predicted, said("block_size", "dspark_block_size")
    heads = f"{c.num_attention_heads} heads, {c.num_key_value_heads} of keys, {c.head_dim} wide"
    size = f"{c.num_hidden_layers} layers of {c.hidden_size}, {c.intermediate_size}; {heads}"
    yield "layers", size, said("num_hidden_layers")
    sliding = [i for i, view in enumerate(c.views) if view.window is not None]
    window = f"{c.sliding_window} tokens in layers {sliding}" if sliding else "none"
    note = "; its training's window began one token earlier at slot 0, and did not move"
    if sliding and format_of(stored.values) == "speculators":
        window += note
    window += f"; {stored.cuts_blocks}" if stored.cuts_blocks else ""
    yield "window", window, said("layer_types", "sliding_window")
    causal = [i for i, view in enumerate(c.views) if view.causal]
    inside = f"earlier slots alone in layers {causal}" if causal else "all slots see each other"
    key = said("is_causal", "causal", "sliding_window_non_causal")
    yield "block attention", inside, key or f"{CONFIG}: by default"
    read = f"layers {list(c.target_layer_ids)}, {c.target_hidden_size or c.hidden_size} wide each"
    ids = "aux_hidden_state_layer_ids", "eagle_aux_hidden_state_layer_ids"
    yield "context", read, said("target_layer_ids", "dspark_target_layer_ids", *ids)
    vocabulary = f"{c.vocab_size}"
    if c.draft_vocab_size:
        vocabulary += f", of which it predicts {c.draft_vocab_size}"
    yield "vocabulary", vocabulary, said("vocab_size", "draft_vocab_size")
    yield "mask token", c.mask_token_id, said("mask_token_id", "dspark_noise_token_id")
    markov = f"{c.markov_head_type}, rank {c.markov_rank}" if c.has_markov_head else "none"
    yield "Markov head", markov, said("markov_head_type", "markov_rank")
    confidence = "reads the Markov embedding too" if c.reads_markov else "reads the hidden state"
    confidence = confidence if c.enable_confidence_head else "none"
    key = said("enable_confidence_head", "confidence_head_with_markov")
    yield "confidence head", confidence, key
    rope = f"base {c.rope_theta:g}, {c.max_position_embeddings} positions"
    if c.yarn:
        longer = c.yarn.original_max_position_embeddings
        rope += f", YaRN by {c.yarn.factor:g} from {longer}"
    yield "RoPE", rope, said("rope_theta", "rope_parameters", "rope_scaling")
    cap, scale = c.final_logit_softcapping, c.logit_scale
    logits = [f"soft cap {cap:g}"] if cap else []
    logits += [f"scale {scale:g}"] if scale else []
    key = said("final_logit_softcapping", "logit_scale") if logits else ""
    yield "logits", ", ".join(logits) or "as they are", key
    if stored.values.get("quantization_config"):
        yield "quantization", "none: the tensors are not quantized", "headers"
    unread = config_words(stored.values)
    if unread:
        yield "not read", ", ".join(unread), CONFIG


def _weights(stored: Stored) -> Iterator[Line]:
    parts = stored.parts
    kinds = sorted({part.get_dtype() for part in parts.values()})
    numbers = sum(math.prod(part.get_shape()) for part in parts.values())
    yield "tensors", f"{len(parts)} of {' and '.join(kinds)}, {numbers:,} numbers", "headers"
    if stored.not_read:
        yield "tensors not read", ", ".join(stored.not_read), "headers"
    calibrated = (stored.path / CALIBRATION).is_file()
    yield "calibration", "yes" if calibrated else "none", CALIBRATION if calibrated else ""


def _source(values: dict[str, Any], *keys: str) -> str:
    """Where a ``config.json`` says the keys that are there."""
    inner = {f"{place}.": holder for place, holder in values.items() if isinstance(holder, dict)}
    places = {"": values} | inner
    found = [
        f"{place}{key}"
        for key in keys
        for place, holder in places.items()
        if holder.get(key) is not None
    ]
    return f"{CONFIG}: {', '.join(found)}" if found else ""


def _servers(stored: Stored) -> Iterator[Line]:
    """What each server does: the first thing that keeps it from serving the drafter, or all else.

    Each sentence stands before whether it is so.
    """
    c, parts = stored.config, stored.parts
    theirs = format_of(stored.values) == "speculators"
    dflash = family_of(stored.values) == "DFlash"
    shifted, given = dflash and c.sample_from_anchor, not (dflash or c.sample_from_anchor or theirs)
    key = stored.values.get("sample_from_anchor")
    predicts = theirs and not dflash and c.sample_from_anchor
    headless, reduced = not (dflash or c.has_markov_head), c.draft_vocab_size is not None
    other = c.has_markov_head and c.markov_head_type != "vanilla"
    ends = sorted({-1, (c.num_target_layers or 0) - 1} & set(c.target_layer_ids))
    window, cap, scale = bool(c.layer_types), c.final_logit_softcapping, c.logit_scale
    factors = [name for name in ("final_logit_softcapping", "logit_scale") if getattr(c, name)]

    vanilla = f"refuses: it has the vanilla Markov head alone, not {c.markov_head_type!r}"
    misread = "reads as the other layout"
    unsaid = f"{misread}: without sample_from_anchor it takes the anchor as given"
    lacks = "refuses: a reduced vocabulary needs"
    capture = "refuses: it cannot capture the target's embedding and last layer"
    honours = "honours the window"
    servers: dict[str, tuple[dict[str, bool], dict[str, bool]]] = {
        "vLLM": (
            {
                vanilla: other,
                f"{lacks} lm_head.weight in the file": reduced and "lm_head.weight" not in parts,
                f"{lacks} d2t in the file": reduced and "d2t" not in parts,
                f"{misread}: its DFlash takes the anchor as given": shifted,
            },
            {
                "not known whether it loads DSpark without a Markov head": headless,
                f'loads as method "{"dflash" if dflash else "dspark"}"': not headless,
                unsaid: predicts and key is None,
                "versions before 0.27 read it as the other layout": predicts and key is not None,
                honours: window,
                "ignores the soft cap": cap is not None,
                f"up to {c.predicted} speculative tokens": True,
            },
        ),
        "SGLang": (
            {
                f"{capture}, {' and '.join(map(str, ends))}": bool(ends),
                "refuses or misreads a reduced vocabulary: it takes the target's whole LM head": (
                    reduced
                ),
                "refuses: its DSPARK needs a Markov head": headless,
                f"{misread}: outside speculators' files each slot predicts": given,
                f"{misread}: its DFLASH takes the anchor as given": shifted,
                unsaid: predicts and key is None,
            },
            {
                f"loads as {'DFLASH' if dflash else 'DSPARK'}": True,
                "its first versions refuse speculators' files": theirs and not dflash,
                honours: window,
                "older versions take sliding layers as causal, whatever is_causal says": (
                    window and c.is_causal is False
                ),
                "not known whether it honours is_causal in full layers": (
                    not window and bool(c.is_causal)
                ),
                f"ignores {' and '.join(factors)}": bool(factors),
            },
        ),
        "TensorRT-LLM": (
            {"loads DFlash drafters; not known of this one's options": dflash},
            {
                "not known: the sources at hand have DSpark as a part of DeepSeek V4 alone": True,
                f"max_draft_len must be the block, {c.block_size}": True,
            },
        ),
        "llama.cpp": (
            {
                vanilla: other,
                "refuses: draft-dspark needs markov_rank": headless,
                "not known whether it reads the layout outside speculators' files": given,
                unsaid: predicts and key is None,
                "not known whether its converter reads SpecForge's names": (
                    format_of(stored.values) == "specforge" and not dflash
                ),
            },
            {
                f"loads as draft-{'dflash' if dflash else 'dspark'}, "
                "converted with --target-model-dir": True,
                "not known whether it honours window and is_causal": window or bool(c.is_causal),
                "ignores soft cap and scale of this backbone": bool(cap or scale),
            },
        ),
    }
    for name, (stops, notes) in servers.items():
        said = [text for text, holds in stops.items() if holds][:1]
        said = said or [text for text, holds in notes.items() if holds]
        yield name, "; ".join(said), "its source"
