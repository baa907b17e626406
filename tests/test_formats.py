"""Checkpoints of other programs: what their files mean, what is written, and what is refused.

Every file is written out by hand here, under the names that its program gives things.
"""

import copy
import json
import re
import traceback
from dataclasses import fields, replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from dspark_lab.files import shipped
from dspark_lab.model import (
    Drafter,
    DrafterConfig,
    convert_checkpoint,
    describe_checkpoint,
    load_drafter,
    save_drafter,
)
from dspark_lab.model import checkpoint as checkpoint_module
from dspark_lab.model.config import Yarn
from dspark_lab.model.formats import config_for
from dspark_lab.model.slotwise import LogitRule

pytestmark = pytest.mark.usefixtures("one_thread")

FORMATS = ("dspark", "automodel", "speculators", "specforge")
SIZES = {"vocab_size": 20, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 6}
# What all formats call the same, the last lines as in the config of a target that a draft was cut
# from: they say nothing of the draft.
BACKBONE = SIZES | {"model_type": "qwen3", "hidden_act": "silu", "rms_norm_eps": 1e-6}
BACKBONE |= {"max_position_embeddings": 64, "attention_bias": False, "attention_dropout": 0.0}
BACKBONE |= {"initializer_range": 0.02, "use_sliding_window": True, "sliding_window": 4096}
BACKBONE |= {"layer_types": ["full_attention"] * 36, "max_window_layers": 36, "use_cache": True}
MARKOV = {"markov_rank": 5, "markov_head_type": "vanilla"}
CONFIDENCE = {"enable_confidence_head": True, "confidence_head_with_markov": True}
THETA, PARAMETERS = {"rope_theta": 5e5}, {"rope_type": "default", "rope_theta": 5e5}
CONFIG = DrafterConfig(
    **SIZES,
    **MARKOV,
    **CONFIDENCE,
    target_layer_ids=(0, 2, 3),
    block_size=4,
    mask_token_id=19,
    rope_theta=5e5,
    max_position_embeddings=64,
)
GIVEN = replace(CONFIG, sample_from_anchor=False)
HEADLESS: dict[str, Any] = {"markov_rank": 0, "markov_head_type": "none"}
HEADLESS |= {"enable_confidence_head": False, "confidence_head_with_markov": False}
PLAIN = replace(GIVEN, **HEADLESS)

DSPARK = BACKBONE | MARKOV | CONFIDENCE | THETA | {"architectures": ["Qwen3DSparkModel"]}
DSPARK |= {"target_layer_ids": [0, 2, 3], "block_size": 4, "mask_token_id": 19, "dtype": "float32"}
DSPARK |= {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}
SPECULATORS = (
    MARKOV
    | CONFIDENCE
    | {
        "architectures": ["DSparkDraftModel"],
        "speculators_model_type": "dspark",
        "speculators_version": "0.6.0",
        "block_size": 4,
        "mask_token_id": 19,
        "draft_vocab_size": 20,
        "aux_hidden_state_layer_ids": [1, 3, 4],
        "sample_from_anchor": True,
        "sliding_window_non_causal": False,
        "shift_label": False,
        "projector_type": "dflash",
        "pure_draft_prefix_len": 1,
        "gru_hidden_dim": 1024,
        "target_hidden_size": None,
        "tie_word_embeddings": False,
        "dtype": "float32",
        "transformer_layer_config": BACKBONE
        | {"rope_parameters": PARAMETERS, "tie_word_embeddings": True, "dtype": "bfloat16"},
        "speculators_config": {
            "algorithm": "dspark",
            "default_proposal_method": "greedy",
            "proposal_methods": [{"proposal_type": "greedy", "speculative_tokens": 4}],
            "verifier": {"name_or_path": "a/target", "architectures": ["Qwen3ForCausalLM"]},
        },
    }
)
DFLASH_WORDS = {"target_layer_ids": [0, 2, 3], "mask_token_id": 19}
SPECFORGE = (
    BACKBONE
    | THETA
    | {
        "architectures": ["DSparkDraftModel"],
        "auto_map": {"AutoModel": "dspark.DSparkDraftModel"},
        "block_size": 4,
        "dtype": "float32",
        "rope_scaling": None,
        "dflash_config": DFLASH_WORDS
        | MARKOV
        | CONFIDENCE
        | {"projector_type": "dspark", "attention_mode": "gqa", "confidence_head_alpha": 1.0},
    }
)
SPLIT = SPECFORGE | {
    "dflash_config": DFLASH_WORDS | {"projector_type": "dspark"},
    "dspark_config": MARKOV | CONFIDENCE,
}
DFLASH = BACKBONE | THETA | {"architectures": ["DFlashDraftModel"], "block_size": 4}
DFLASH |= {"dflash_config": DFLASH_WORDS, "dtype": "float32"}
BONUS = DSPARK | {"dspark_bonus_anchor": True}
LEGACY = copy.deepcopy(SPECULATORS)
LEGACY["speculators_config"]["proposal_methods"][0]["speculative_tokens"] = 3
del LEGACY["sample_from_anchor"]
NO_HEADS = ("markov_rank", "markov_head_type", "enable_confidence_head")
THEIR_DFLASH = {
    k: v for k, v in LEGACY.items() if k not in (*NO_HEADS, "confidence_head_with_markov")
} | {"architectures": ["DFlashDraftModel"], "speculators_model_type": "dflash"}
FILES = {
    "dspark": (DSPARK, CONFIG),
    "bonus": (BONUS, GIVEN),
    "speculators": (SPECULATORS, CONFIG),
    "speculators, before it had the key": (LEGACY, GIVEN),
    "speculators dflash": (THEIR_DFLASH, PLAIN),
    "speculators, told apart from its backbone": (SPECULATORS | {"use_cache": False}, CONFIG),
    "words for what is so without them": (
        DSPARK | {"target_hidden_size": 8, "logit_scale": 1, "draft_vocab_size": 20},
        CONFIG,
    ),
    "specforge": (SPECFORGE, CONFIG),
    "specforge, split": (SPLIT, CONFIG),
    "specforge dflash": (DFLASH, PLAIN),
    "automodel, of a target with experts": (DSPARK | {"model_type": "qwen3_moe"}, CONFIG),
    "specforge, of a type of its own": (SPECFORGE | {"model_type": "dspark"}, CONFIG),
}


def tensors_of(config, seed=0, embeddings=True):
    """Every tensor of a drafter by its documented name."""
    d, wide, heads = config.hidden_size, config.intermediate_size, config.num_attention_heads
    keys, head, rank = config.num_key_value_heads, config.head_dim, config.markov_rank
    predicted = config.draft_vocab_size or config.vocab_size
    shapes = {"fc.weight": (d, 3 * d), "hidden_norm.weight": (d,), "norm.weight": (d,)}
    for i in range(config.num_hidden_layers):
        layer = {"input_layernorm": (d,), "post_attention_layernorm": (d,)}
        layer |= {"mlp.gate_proj": (wide, d), "mlp.up_proj": (wide, d), "mlp.down_proj": (d, wide)}
        layer |= {"self_attn.q_proj": (heads * head, d), "self_attn.o_proj": (d, heads * head)}
        layer |= dict.fromkeys(("self_attn.k_proj", "self_attn.v_proj"), (keys * head, d))
        layer |= dict.fromkeys(("self_attn.q_norm", "self_attn.k_norm"), (head,))
        shapes |= {f"layers.{i}.{name}.weight": shape for name, shape in layer.items()}
    if embeddings:
        shapes |= {"embed_tokens.weight": (config.vocab_size, d), "lm_head.weight": (predicted, d)}
    if config.has_markov_head:
        shapes["markov_head.markov_w1.weight"] = (config.vocab_size, rank)
        shapes["markov_head.markov_w2.weight"] = (predicted, rank)
    if config.enable_confidence_head:
        width = d + rank * config.confidence_head_with_markov
        shapes |= {"confidence_head.proj.weight": (1, width), "confidence_head.proj.bias": (1,)}
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def write(folder, values, tensors):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(values))
    save_file(tensors, folder / "model.safetensors")
    return folder


def changed(values, path, value):
    """A copy in which ``path``, with dots between objects, is ``value``, or is not where ...."""
    values = copy.deepcopy(values)
    *places, key = path.split(".")
    holder = values
    for place in places:
        holder = holder.setdefault(place, {})
    holder[key] = value
    if value is ...:
        del holder[key]
    return values


def target_of(tensors):
    weights = tensors["embed_tokens.weight"], tensors["lm_head.weight"]
    return SimpleNamespace(embed_weight=weights[0], head_weight=weights[1], num_layers=4)


def stored(folder):
    tensors = {}
    for file in folder.glob("*.safetensors"):
        tensors |= load_file(file)
    return json.loads((folder / "config.json").read_text()), tensors


def assert_equal(one, other):
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert value.dtype == other[name].dtype and torch.equal(value, other[name]), name


# What files mean.


@pytest.mark.parametrize(("values", "config"), FILES.values(), ids=FILES)
def test_a_file_of_each_program_loads_as_what_it_is(tmp_path, values, config):
    assert DrafterConfig.from_dict(values) == config
    tensors = tensors_of(config)
    drafter = load_drafter(write(tmp_path / "x", values, tensors))
    assert drafter.config == config
    assert_equal(dict(drafter.state_dict()), tensors)
    frozen = {name for name, value in drafter.named_parameters() if not value.requires_grad}
    assert frozen == {"embed_tokens.weight", "lm_head.weight"}


def test_a_consolidated_folder_of_automodel_loads(tmp_path):
    """Weights with an index even where they are one file, a tokenizer and a trainer's notes."""
    folder, tensors = tmp_path / "consolidated", tensors_of(CONFIG)
    write(folder, DSPARK | {"num_anchors": 512}, tensors)
    file = "model-00001-of-00001.safetensors"
    (folder / "model.safetensors").rename(folder / file)
    index = {"metadata": {}, "weight_map": dict.fromkeys(tensors, file)}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "tokenizer_config.json").write_text("{}")
    (folder / ".hf_metadata").mkdir()
    assert_equal(dict(load_drafter(folder).state_dict()), tensors)


SLIDING = ["sliding_attention", "full_attention"]
WINDOW = {"layer_types": SLIDING, "use_sliding_window": True, "sliding_window": 5}
WINDOWED = replace(CONFIG, layer_types=SLIDING, sliding_window=5)
BARE = {key: value for key, value in DSPARK.items() if key not in WINDOW}
THEIR_WINDOW = SPECULATORS | {"transformer_layer_config": BACKBONE | THETA | WINDOW}
BOTH_WAYS = {"is_causal": False}


@pytest.mark.parametrize(
    ("values", "causal"),
    [
        (DSPARK | WINDOW, None),
        (DSPARK | WINDOW | BOTH_WAYS, False),
        (DSPARK | WINDOW | {"is_causal": True}, True),
        (DSPARK | WINDOW | {"dflash_config": {"causal": False}}, False),
        (changed(BARE, "dflash_config", DFLASH_WORDS | WINDOW), None),
        (SPECFORGE | WINDOW, None),
        (SPECFORGE | WINDOW | BOTH_WAYS, False),
        (THEIR_WINDOW, None),
        (changed(THEIR_WINDOW, "sliding_window_non_causal", True), False),
        (changed(THEIR_WINDOW, "sliding_window_non_causal", ...), None),
        (changed(DSPARK | WINDOW, "layer_types", SLIDING + ["full_attention"] * 34), None),
        (changed(DSPARK | WINDOW, "layer_types", None) | {"max_window_layers": 0}, "all"),
    ],
)
def test_windows_and_what_slots_see_of_their_block_are_read(values, causal):
    config = DrafterConfig.from_dict(values)
    if causal == "all":
        assert config.layer_types == ("sliding_attention",) * 2
    else:
        assert config == replace(WINDOWED, is_causal=causal)


def test_a_window_narrower_than_a_block_is_said(tmp_path):
    folder = write(tmp_path / "x", DSPARK | WINDOW | {"sliding_window": 3}, tensors_of(CONFIG))
    with pytest.warns(UserWarning, match="sliding_window 3 is narrower than a block of 4: SpecF"):
        load_drafter(folder)
    assert "layers [0]; sliding_window 3 is narrower" in described(folder)["window"]


def test_full_attention_may_be_causal():
    for values in (DSPARK | {"is_causal": True}, changed(SPECFORGE, "dflash_config.causal", True)):
        assert DrafterConfig.from_dict(values) == replace(CONFIG, is_causal=True)
    assert DrafterConfig.from_dict(DSPARK | BOTH_WAYS) == CONFIG


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
MORE = {"beta_fast": 20, "beta_slow": 2, "attention_factor": 1.5, "truncate": False}


@pytest.mark.parametrize(
    ("rope", "yarn"),
    [
        ({"rope_scaling": YARN}, Yarn(4.0, 16)),
        ({"rope_scaling": {"type": "yarn", "factor": 4}}, Yarn(4.0, 64)),
        ({"rope_parameters": YARN | THETA}, Yarn(4.0, 16)),
        ({"rope_parameters": YARN | THETA, "rope_scaling": YARN}, Yarn(4.0, 16)),
        ({"rope_scaling": YARN | MORE}, Yarn(4.0, 16, 20.0, 2.0, 1.5, truncate=False)),
        ({"rope_scaling": YARN | {"mscale": 1.0, "mscale_all_dim": 0.5}},
         Yarn(4.0, 16, mscale=1.0, mscale_all_dim=0.5)),
        ({"rope_parameters": PARAMETERS | {"mrope_section": [1, 1, 1]}}, None),
        ({"rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 1]}}, None),
        ({"rope_scaling": {"type": "mrope", "rope_type": "default", "mrope_section": [3]}}, None),
        ({"rope_scaling": {"type": "yarn", "factor": 4}, "original_max_position_embeddings": 16},
         Yarn(4.0, 16)),
        ({"rope_scaling": YARN, "original_max_position_embeddings": 16}, Yarn(4.0, 16)),
        ({"rope_scaling": YARN | {"factor": None}}, Yarn(4.0, 16)),
        ({"rope_scaling": {"type": "yarn", "factor": None}}, Yarn(1.0, 64)),
        ({"original_max_position_embeddings": 16}, None),
    ],
)  # fmt: skip
def test_yarn_is_read_wherever_it_stands(rope, yarn):
    assert DrafterConfig.from_dict(DSPARK | rope) == replace(CONFIG, yarn=yarn)
    layer = {k: v for k, v in (BACKBONE | THETA | rope).items()}
    assert DrafterConfig.from_dict(SPECULATORS | {"transformer_layer_config": layer}).yarn == yarn


def test_names_of_servers_and_of_the_embedding_are_read():
    values = {k: v for k, v in DSPARK.items() if k not in ("block_size", "target_layer_ids")}
    values |= {"dspark_block_size": 4, "dspark_markov_rank": 5, "dspark_noise_token_id": 19}
    values["eagle_aux_hidden_state_layer_ids"] = [1, 3, 4]
    assert DrafterConfig.from_dict(values) == CONFIG
    ids = changed(SPECULATORS, "aux_hidden_state_layer_ids", [0, 3, 4])
    assert DrafterConfig.from_dict(ids).target_layer_ids == (-1, 2, 3)
    shifted = changed(DFLASH, "dflash_config.shift_label", True)
    assert DrafterConfig.from_dict(shifted) == replace(PLAIN, sample_from_anchor=True)


# A file that contradicts itself, or says what is not to be had here.

TOKENS = "speculators_config.proposal_methods"
CONTRADICTIONS = [
    (BONUS, "sample_from_anchor", True, "sample_from_anchor True and not dspark_bonus_anchor"),
    (DSPARK | {"sample_from_anchor": False}, "dspark_bonus_anchor", False, "bonus_anchor True"),
    (SPECFORGE | {"sample_from_anchor": True}, "dflash_config.sample_from_anchor", False,
     "sample_from_anchor True and dflash_config.sample_from_anchor False"),
    (DFLASH | {"shift_label": True}, "sample_from_anchor", False, "False and shift_label True"),
    (SPECULATORS, "sample_from_anchor", False, "tokens 4 contradicts block_size: 3 of 4 slots"),
    (SPECULATORS, TOKENS, [{"speculative_tokens": 5}], "tokens 5 .* 4 of 4 slots predict"),
    (DSPARK, "dflash_config.block_size", 5, "block_size 4 and dflash_config.block_size 5"),
    (DSPARK | WINDOW, "dflash_config.sliding_window", 6, "window 5 and dflash_config.sliding_win"),
    (SPECFORGE, "markov_rank", 4, "markov_rank 4 and dflash_config.markov_rank 5"),
    (DSPARK, "aux_hidden_state_layer_ids", [0, 2, 3], r"\[0, 2, 3\] and aux_hidden.* - 1 \[-1"),
    (DSPARK, "dspark_config.mask_token_id", 1, "mask_token_id 19 and dspark_config.mask_token"),
    (SPECULATORS, "hidden_size", 9, "hidden_size 9 and transformer_layer_config.hidden_size 8"),
    (SPECULATORS, "transformer_layer_config.rope_theta", 1.0, "rope_theta must be one number"),
    (DSPARK | WINDOW, "use_sliding_window", False, "use_sliding_window false contradicts layer"),
    (THEIR_WINDOW, "is_causal", False, "non_causal False contradicts is_causal False"),
    (DSPARK | {"is_causal": True}, "dflash_config.causal", False, "is_causal True and dflash"),
    (DFLASH, "markov_rank", 5, "markov_rank 5 contradicts the family, DFlash"),
    (DFLASH, "dspark_config.enable_confidence_head", True, "enable_confidence_head True contra"),
    (DSPARK, "rope_scaling", {"type": "yarn", "rope_type": "linear"}, "must be of one type"),
    (DSPARK | {"rope_scaling": YARN}, "original_max_position_embeddings", 32,
     "embeddings must be one number, got 32 and in rope_scaling 16"),
    (DSPARK, "architectures", ["DFlashDraftModel", "DSparkDraftModel"], "contradict each other: D"),
    (SPECULATORS, "architectures", ["DFlashDraftModel"], "'dspark' contradict each other: DFlash"),
    (SPECULATORS, "speculators_model_type", "dflash", "'dflash' contradict each other: DSpark"),
    (DFLASH, "dflash_config.projector_type", "dspark", "'dspark' contradict .*: DFlash, DSpark"),
    (DSPARK, "num_target_layers", 3, r"must be below num_target_layers, 3, got \(0, 2, 3\)"),
    (DSPARK, "layer_types", ["full_attention"], "one for each of 2 layers, got 1"),
]  # fmt: skip
REFUSED = [
    (SPECFORGE, "dflash_config.projector_type", "domino", "a drafter of Domino, which this lib"),
    (SPECFORGE, "dflash_config.attention_mode", "mla", "attention_mode must be 'gqa' or 'mha'"),
    (DSPARK, "dflash_config.use_swa", True, "use_swa must be False or absent, got True"),
    (DSPARK, "architectures", ["Gemma4DSparkModel"], "DSpark on another backbone, which this"),
    (DSPARK, "architectures", ["LlamaForCausalLMEagle3"], "Eagle3.* a drafter of EAGLE-3"),
    (DSPARK, "architectures", ["DFlash2DraftModel"], "a drafter of DFlash 2"),
    (SPECULATORS, "speculators_model_type", "peagle", "a drafter of P-EAGLE"),
    (DSPARK, "architectures", ["Qwen3ForCausalLM"], r"one of \['Qwen3DSparkModel'\], .*Qwen3For"),
    (SPECULATORS, "transformer_layer_config.model_type", "llama", "model_type must be 'qwen3'"),
    (SPECULATORS, "transformer_layer_config", ..., "config must hold vocab_size, hidden_size"),
    (SPECULATORS, "transformer_layer_config", 3, "transformer_layer_config must be an object"),
    (SPECULATORS, "aux_hidden_state_layer_ids", "1", "layer_ids must be a sequence, got '1'"),
    (SPECULATORS, "sample_from_anchor", "yes", "sample_from_anchor must be True or False"),
    (SPECULATORS, "aux_hidden_state_layer_ids", [4, 3, 1], r"ids must be strictly .*\[4, 3, 1\]"),
    (SPECULATORS, "aux_hidden_state_layer_ids", [-1, 3, 4], r"aux_hidden.* from 0 on, got \[-1"),
    (DSPARK, "rope_scaling", {"type": "yarn", "original_max_position_embeddings": 16},
     "of rope_type 'yarn' must hold factor"),
]  # fmt: skip


@pytest.mark.parametrize(("values", "path", "value", "match"), CONTRADICTIONS + REFUSED)
def test_what_contradicts_itself_or_is_another_drafter_is_refused(
    tmp_path, values, path, value, match
):
    folder = write(tmp_path / "x", changed(values, path, value), tensors_of(CONFIG))
    with pytest.raises((ValueError, TypeError)) as caught:
        load_drafter(folder)
    assert str(caught.value).startswith(f"{folder / 'config.json'}: ")
    assert re.search(match, str(caught.value)), str(caught.value)
    table = describe_checkpoint(folder).set_index("property")["value"]
    assert re.search(f"^no: .*{match}", table["loads here"])


STRANGE = [3, -1, 1.5, True, "x", None, [], [1], ["x"], {}, {"x": 1}]
KEYS = {
    name: [k for k in values if not isinstance(values[k], dict)]
    + [f"{k}.{inner}" for k, v in values.items() if isinstance(v, dict) for inner in v]
    for name, values in (("dspark", DSPARK | WINDOW), ("theirs", THEIR_WINDOW), ("forge", SPLIT))
}


@pytest.mark.parametrize("name", KEYS)
def test_a_value_of_a_wrong_kind_is_refused_by_the_library(name):
    values = {"dspark": DSPARK | WINDOW, "theirs": THEIR_WINDOW, "forge": SPLIT}[name]
    tried = [(key, value) for key in KEYS[name] for value in STRANGE]
    tried += [(key, value) for key in values for value in STRANGE if isinstance(values[key], dict)]
    for key, value in tried:
        try:
            DrafterConfig.from_dict(changed(values, key, value))
        except (TypeError, ValueError) as error:
            last = traceback.extract_tb(error.__traceback__)[-1]
            assert "dspark_lab" in last.filename, (key, value, error)
            assert (last.line or "").startswith("raise"), (key, value, error)


# What is written.

MIN_BLOCK = {"anchor_predicts": 1, "anchor_given": 2}


@st.composite
def configs(draw):
    """Any drafter of two layers; each has one form here."""
    given_anchor, head = draw(st.booleans()), draw(st.sampled_from(["none", "vanilla", "gated"]))
    confidence, rank = draw(st.booleans()), draw(st.sampled_from([0, 5]))
    kinds = draw(st.sampled_from([None, SLIDING, ["sliding_attention"] * 2]))
    optional = st.none() | st.floats(0.5, 50)
    yarn = st.none() | st.builds(
        Yarn, st.floats(1, 9), st.integers(1, 99), attention_factor=optional
    )
    return replace(
        CONFIG,
        sample_from_anchor=not given_anchor,
        block_size=draw(st.integers(2, 9)),
        markov_head_type=head,
        markov_rank=rank,
        enable_confidence_head=confidence,
        confidence_head_with_markov=bool(head != "none" and rank and draw(st.booleans())),
        layer_types=kinds,
        sliding_window=kinds and draw(st.integers(1, 99)),
        is_causal=draw(st.sampled_from([None, True, False])),
        draft_vocab_size=draw(st.none() | st.integers(1, 19)),
        target_layer_ids=tuple(sorted(draw(st.sets(st.integers(-1, 5), min_size=1)))),
        target_hidden_size=draw(st.none() | st.just(12)),
        rope_theta=draw(st.floats(1, 1e7)),
        yarn=draw(yarn),
        final_logit_softcapping=draw(optional),
        logit_scale=draw(optional),
        num_anchors=draw(st.integers(1, 600)),
        num_target_layers=draw(st.none() | st.just(7)),
    )


@settings(max_examples=150, deadline=None)
@given(configs(), st.sampled_from(FORMATS))
def test_a_written_config_reads_back_as_it_was_or_is_refused(config, target):
    try:
        values = config_for(config.to_dict(), target)
    except ValueError as error:
        assert re.match(f"format '{target}' (has no key for|cannot hold)", str(error))
        assert target != "dspark"
        return
    assert DrafterConfig.from_dict(json.loads(json.dumps(values))) == config
    if target == "speculators":
        assert values["draft_vocab_size"] == config.output_size
    if target in ("speculators", "specforge"):
        assert not {"target_layer_ids", "dspark_bonus_anchor"} & values.keys()


CHANGES = {
    **{name: getattr(CONFIG, name) * 2 for name in ("hidden_size", "intermediate_size")},
    **{"vocab_size": 40, "num_hidden_layers": 3, "num_attention_heads": 8, "head_dim": 4},
    **{"num_key_value_heads": 4, "target_layer_ids": (0, 3), "block_size": 5, "mask_token_id": 1},
    **{"num_anchors": 3, "markov_rank": 6, "markov_head_type": "rnn", "rms_norm_eps": 1e-5},
    **{"enable_confidence_head": False, "confidence_head_with_markov": False, "rope_theta": 1e4},
    **{"max_position_embeddings": 65, "target_hidden_size": 9, "num_target_layers": 9},
    **{"attention_bias": True, "initializer_range": 0.1, "sample_from_anchor": False},
    **{"sliding_window": 6, "layer_types": ["sliding_attention"] * 2, "draft_vocab_size": 7},
    **{"yarn": Yarn(2.0, 32), "final_logit_softcapping": 30.0, "logit_scale": 0.5},
    **{"is_causal": True},
}


@pytest.mark.parametrize("target", FORMATS)
def test_no_field_is_dropped(target):
    """A change of any field is read back, or refused by the field's name."""
    assert CHANGES.keys() == {field.name for field in fields(DrafterConfig)}
    refused = set()
    for name, value in CHANGES.items():
        base = WINDOWED if name in ("sliding_window", "layer_types") else CONFIG
        config = replace(base, **{name: value})
        assert config != base
        try:
            values = config_for(config.to_dict(), target)
        except ValueError as error:
            assert name in str(error) or "sliding_window" in str(error)
            refused.add(name)
            continue
        assert DrafterConfig.from_dict(values) == config, name
    windows = {"sliding_window", "layer_types", "is_causal"}
    logits = {"draft_vocab_size", "final_logit_softcapping", "logit_scale"}
    assert (
        refused
        == {
            "dspark": set(),
            "automodel": windows | logits | {"target_hidden_size", "sample_from_anchor"},
            "speculators": {"is_causal"},
            "specforge": {"sample_from_anchor"},
        }[target]
    )


def test_each_format_is_written_with_its_own_names():
    changes = {"is_causal": False, "draft_vocab_size": 7, "sample_from_anchor": False}
    own = replace(WINDOWED, **changes, logit_scale=0.5).to_dict()
    theirs = config_for(own, "speculators")
    assert theirs["architectures"] == ["DSparkDraftModel"]
    assert theirs["speculators_model_type"] == theirs["speculators_config"]["algorithm"] == "dspark"
    assert theirs["speculators_config"]["verifier"] == {"name_or_path": "", "architectures": []}
    method = theirs["speculators_config"]["proposal_methods"][0]
    assert method == {"proposal_type": "greedy", "speculative_tokens": 3}
    assert theirs["aux_hidden_state_layer_ids"] == [1, 3, 4]
    assert theirs["sliding_window_non_causal"] and not theirs["sample_from_anchor"]
    assert (theirs["block_size"], theirs["draft_vocab_size"], theirs["markov_rank"]) == (4, 7, 5)
    layer = theirs["transformer_layer_config"]
    assert (layer["vocab_size"], layer["sliding_window"], layer["logit_scale"]) == (20, 5, 0.5)
    assert layer["layer_types"] == SLIDING and layer["use_sliding_window"]
    assert (own["sample_from_anchor"], own["dspark_bonus_anchor"]) == (False, True)
    forge = config_for(CONFIG.to_dict(), "specforge")
    assert forge["architectures"] == ["DSparkDraftModel"] and forge["block_size"] == 4
    words = DFLASH_WORDS | MARKOV | CONFIDENCE | {"projector_type": "dspark"}
    assert forge["dflash_config"] == words and "target_layer_ids" not in forge
    flash = config_for(PLAIN.to_dict(), "specforge")
    assert flash["architectures"] == ["DFlashDraftModel"]
    assert flash["dflash_config"] == DFLASH_WORDS | {"projector_type": "dflash"}
    assert config_for(PLAIN.to_dict(), "speculators")["speculators_model_type"] == "dflash"


@pytest.mark.parametrize("target", ["dspark", "speculators", "specforge"])
def test_transformers_reads_the_same_windows_and_yarn(target):
    """From version 5 on in rope_parameters, before in rope_scaling beside rope_theta."""
    from transformers import Qwen3Config

    yarn = Yarn(4.0, 16, attention_factor=1.5, truncate=False)
    values = config_for(replace(WINDOWED, yarn=yarn).to_dict(), target)
    values = values.get("transformer_layer_config", values)
    scaled = YARN | {"attention_factor": 1.5, "truncate": False, "beta_fast": 32.0}
    scaled |= {"beta_slow": 1.0}
    assert values["rope_scaling"] == scaled and values["rope_theta"] == 5e5
    config = Qwen3Config(**copy.deepcopy(values))
    assert list(config.layer_types) == SLIDING and config.sliding_window == 5
    assert config.rope_parameters == scaled | THETA


@pytest.mark.parametrize("target", FORMATS)
@pytest.mark.parametrize("include", [True, False])
def test_a_drafter_saved_in_any_format_comes_back_with_every_bit(tmp_path, target, include):
    made, drafter = tensors_of(CONFIG, seed=3), Drafter(CONFIG)
    drafter.load_state_dict(made)
    save_drafter(drafter, tmp_path / "x", format=target, include_embeddings=include)
    names = {file.name for file in (tmp_path / "x").iterdir()}
    assert ("model.safetensors.index.json" in names) == (target == "automodel")
    loaded = load_drafter(tmp_path / "x", target=None if include else target_of(made))
    assert loaded.config == CONFIG
    assert_equal(dict(loaded.state_dict()), made)
    save_drafter(drafter, tmp_path / "x", format="dspark")  # another format's is replaced


# Conversion.


@pytest.mark.parametrize("first", FORMATS)
@pytest.mark.parametrize("second", FORMATS)
def test_a_conversion_there_and_back_keeps_every_bit_and_dtype(tmp_path, first, second):
    tensors = tensors_of(CONFIG, embeddings=False)
    tensors["norm.weight"] = tensors["norm.weight"].bfloat16()
    # Their own word stands above the target's.
    values = SPECULATORS | {"dtype": "bfloat16"}
    if first == second:
        del values["dtype"]
    source = write(tmp_path / "source", values, tensors)
    scales = '{"temperatures": [1.5]}'
    (source / "calibration.json").write_text(scales)
    for folder, out, target in (("source", "a", first), ("a", "b", second), ("b", "c", first)):
        convert_checkpoint(tmp_path / folder, tmp_path / out, format=target)
    assert stored(tmp_path / "a")[0] == stored(tmp_path / "c")[0] or second != first
    for out in "abc":
        values, found = stored(tmp_path / out)
        assert DrafterConfig.from_dict(values) == CONFIG
        assert_equal(found, tensors)
        assert values["dtype"] == "bfloat16"
        assert json.loads((tmp_path / out / "calibration.json").read_text()) == json.loads(scales)


def test_what_a_speculators_file_says_to_servers_stays(tmp_path):
    proposals = [{"proposal_type": "greedy", "speculative_tokens": 2, "verifier_accept_k": 3}]
    values = changed(SPECULATORS, TOKENS, proposals)
    source = write(tmp_path / "x", values, tensors_of(CONFIG))
    convert_checkpoint(source, tmp_path / "y", format="speculators")
    assert stored(tmp_path / "y")[0]["speculators_config"] == values["speculators_config"]


def test_what_a_slot_predicts_cannot_be_changed(tmp_path):
    trained = "the weights were trained for"
    source = write(tmp_path / "x", DSPARK, tensors_of(CONFIG))
    said = f"{source}: layout must stay 'anchor_predicts', got 'anchor_given': {trained} the other"
    with pytest.raises(ValueError, match=re.escape(said)):
        convert_checkpoint(source, tmp_path / "y", format="dspark", layout="anchor_given")
    convert_checkpoint(source, tmp_path / "y", format="dspark", layout="anchor_predicts")
    bonus = write(tmp_path / "z", BONUS, tensors_of(GIVEN))
    for target in ("automodel", "specforge"):
        with pytest.raises(ValueError, match=f"{bonus}: format {target!r} cannot hold .*{trained}"):
            convert_checkpoint(bonus, tmp_path / "w", format=target)
        with pytest.raises(ValueError, match=f"format {target!r} cannot hold .*{trained}"):
            save_drafter(Drafter(GIVEN), tmp_path / "w", format=target)
    assert not (tmp_path / "w").exists()


# Tensors.


def test_other_names_of_tensors_are_read_and_the_targets_own_passed_over(tmp_path):
    tensors = tensors_of(CONFIG)
    nested = {re.sub(r"^(markov|confidence)", r"logit_head.\1", k): v for k, v in tensors.items()}
    under = {k if "lm_head" in k else f"model.{k}": v for k, v in tensors.items()}
    extra = {"verifier_norm.weight": torch.ones(8), "rotary_emb.inv_freq": torch.ones(3)}
    for i, found in enumerate((nested, under, tensors | extra)):
        loaded = load_drafter(write(tmp_path / str(i), DSPARK, found))
        assert_equal(dict(loaded.state_dict()), tensors)
    twice = tensors | {"logit_head.markov_head.markov_w1.weight": torch.ones(20, 5)}
    with pytest.raises(ValueError, match=r"markov_w1\.weight once, got it under two names"):
        load_drafter(write(tmp_path / "twice", DSPARK, twice))


@pytest.mark.parametrize("suffix", ["_scale", "_packed", "_scale_inv"])
def test_quantized_tensors_are_refused_by_name(tmp_path, suffix):
    name = f"layers.0.mlp.up_proj.weight{suffix}"
    folder = write(tmp_path / "x", DSPARK, tensors_of(CONFIG) | {name: torch.ones(1)})
    with pytest.raises(ValueError, match=rf"{folder} must hold .*not quantized ones, got {name}"):
        load_drafter(folder)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, 1e6])
def test_a_tensor_that_is_not_finite_as_it_is_loaded_is_named(tmp_path, value):
    tensors = tensors_of(CONFIG)
    tensors["norm.weight"][3] = value
    folder = write(tmp_path / "x", DSPARK, tensors)
    with pytest.raises(ValueError, match=f"{folder}: norm.weight .*, got NaN or inf.*float16"):
        load_drafter(folder, dtype=torch.float16)
    if value == 1e6:
        assert load_drafter(folder).norm.weight[3] == value


# A reduced vocabulary.

KEPT = [1, 2, 5, 9, 11, 12, 19]
REDUCED = replace(CONFIG, draft_vocab_size=7)
D2T = torch.tensor([target - draft for draft, target in enumerate(KEPT)])
T2D = torch.tensor([token in KEPT for token in range(20)])
MAPS = {"d2t": D2T, "t2d": T2D}


@pytest.mark.parametrize(
    "maps", [{"d2t": D2T}, {"d2t": D2T.int()}, {"t2d": T2D}, {"t2d": T2D.int()}, MAPS]
)
@pytest.mark.parametrize("values", [DSPARK, SPECULATORS, SPECFORGE])
def test_a_reduced_vocabulary_is_mapped_by_either_tensor(tmp_path, values, maps):
    tensors = tensors_of(REDUCED)
    held = tensors | maps
    values = values | {"draft_vocab_size": 7, "tie_word_embeddings": True}
    drafter = load_drafter(write(tmp_path / "x", values, held))
    assert drafter.config == REDUCED
    assert_equal(dict(drafter.state_dict()), tensors | {"d2t": D2T})
    half = load_drafter(tmp_path / "x", dtype=torch.float16)
    assert half.d2t.dtype == torch.int64 and half.fc.weight.dtype == torch.float16


def test_rows_of_the_targets_head_stand_for_one_that_is_left_out(tmp_path):
    tensors, target = tensors_of(REDUCED), target_of(tensors_of(CONFIG, seed=8))
    left_out = {k: v for k, v in tensors.items() if k not in ("embed_tokens.weight",)}
    values = DSPARK | {"draft_vocab_size": 7}
    drafter = load_drafter(write(tmp_path / "x", values, left_out | MAPS), target=target)
    assert torch.equal(drafter.embed_tokens.weight, target.embed_weight)
    assert torch.equal(drafter.lm_head.weight, tensors["lm_head.weight"])
    del left_out["lm_head.weight"]
    drafter = load_drafter(write(tmp_path / "y", values, left_out | MAPS), target=target)
    assert torch.equal(drafter.lm_head.weight, target.head_weight[KEPT])
    assert torch.equal(drafter.target_head, target.head_weight)
    assert not drafter.lm_head.weight.requires_grad


@pytest.mark.parametrize("values", [DSPARK, DSPARK | {"draft_vocab_size": 7}])
def test_what_the_target_makes_of_its_logits_comes_with_it(tmp_path, values):
    config = DrafterConfig.from_dict(values)
    target = target_of(tensors_of(CONFIG))
    target.logit_rule = LogitRule(30.0, 0.5)
    maps = MAPS if config.draft_vocab_size else {}
    folder = write(tmp_path / "x", values, tensors_of(config) | maps)
    assert load_drafter(folder, target=target).target_rule == target.logit_rule
    assert load_drafter(folder).target_rule == LogitRule()


@pytest.mark.parametrize("target", ["dspark", "speculators", "specforge"])
def test_a_reduced_vocabulary_is_written_with_both_maps_and_its_head(tmp_path, target):
    tensors = tensors_of(REDUCED)
    values = SPECULATORS | {"draft_vocab_size": 7}
    source = write(tmp_path / "x", values, tensors | {"d2t": D2T.int()})
    convert_checkpoint(source, tmp_path / "y", format=target)
    save_drafter(load_drafter(source), tmp_path / "z", format=target)
    assert_equal(stored(tmp_path / "y")[1], tensors | MAPS)
    del tensors["embed_tokens.weight"]
    assert_equal(stored(tmp_path / "z")[1], tensors | MAPS)
    assert load_drafter(tmp_path / "y").config == REDUCED


def test_maps_of_a_whole_vocabulary_are_checked_and_left_out(tmp_path):
    whole = {"d2t": torch.zeros(20, dtype=torch.int64), "t2d": torch.ones(20, dtype=torch.bool)}
    tensors = tensors_of(CONFIG)
    source = write(tmp_path / "x", SPECULATORS, tensors | whole)
    assert_equal(dict(load_drafter(source).state_dict()), tensors)
    convert_checkpoint(source, tmp_path / "y", format="dspark")
    assert_equal(stored(tmp_path / "y")[1], tensors)


SHIFTED = D2T.clone()
SHIFTED[2:4] += torch.tensor([1, -3])
OTHER = torch.tensor([token in KEPT for token in range(19, -1, -1)])


@pytest.mark.parametrize(
    ("maps", "match"),
    [
        ({}, "must hold d2t or t2d, got neither: draft_vocab_size 7"),
        ({"d2t": D2T + 1}, r"increasing target ids in \[0, 19\], got \[2, 3"),
        ({"d2t": D2T - 2}, r"increasing target ids in \[0, 19\], got \[-1, 0"),
        ({"d2t": SHIFTED}, "d2t must map draft ids to increasing target ids"),
        ({"d2t": D2T[:6]}, r"d2t must be \[7\], got \[6\]"),
        ({"t2d": T2D[:19]}, r"t2d must be \[20\], got \[19\]"),
        ({"d2t": D2T.float()}, "d2t must be of I64, I32, got F32"),
        ({"t2d": ~T2D}, "t2d must mark with 1 as many of the target's ids .*, 7, .* got 13 with"),
        ({"t2d": T2D.long() * 3}, r"others with 0, got 7 with \[3\]"),
        ({"d2t": D2T, "t2d": OTHER}, "must agree, but draft id 0 is target id 1 by d2t, 0 by t2d"),
        (
            {"lm_head.weight": torch.ones(20, 8), **MAPS},
            r"lm_head.weight must be \[7, 8\], got \[20",
        ),
        (
            {"markov_head.markov_w2.weight": torch.ones(20, 5), **MAPS},
            r"markov_w2.* be \[7, 5\], got",
        ),
    ],
)
def test_maps_that_do_not_fit_are_named(tmp_path, maps, match):
    unsaid = write(tmp_path / "unsaid", DSPARK, tensors_of(REDUCED) | MAPS)
    with pytest.raises(ValueError, match=r"config.json must hold draft_vocab_size, as d2t .*\[7\]"):
        load_drafter(unsaid)
    values = DSPARK | {"draft_vocab_size": 7}
    folder = write(tmp_path / "x", values, tensors_of(REDUCED) | maps)
    with pytest.raises(ValueError, match=f"{folder}.*{match}"):
        load_drafter(folder)


# In one table.


def described(folder):
    table = describe_checkpoint(folder)
    assert list(table.columns) == ["property", "value", "source"]
    assert table["property"].is_unique
    return table.set_index("property")["value"].astype(str).to_dict()


def test_a_description_reads_no_weights(tmp_path, monkeypatch):
    folder = write(tmp_path / "x", SPECULATORS, tensors_of(CONFIG))
    expected, read = describe_checkpoint(folder), checkpoint_module._read_header

    class Header:
        def __init__(self, part):
            self.get_shape, self.get_dtype = part.get_shape, part.get_dtype

    def headers(path):
        return {name: Header(part) for name, part in read(path).items()}

    monkeypatch.setattr(checkpoint_module, "_read_header", headers)
    assert describe_checkpoint(folder).equals(expected)


def test_a_description_says_what_a_checkpoint_is(tmp_path):
    values = changed(THEIR_WINDOW, "sliding_window_non_causal", True) | {"draft_vocab_size": 7}
    values = changed(values, "dflash_config.future", 1)
    tensors = tensors_of(REDUCED, embeddings=False) | MAPS
    found = described(write(tmp_path / "x", values, tensors))
    assert found["family"] == "DSpark" and found["format"] == "speculators"
    assert found["loads here"].endswith("target=, which has embed_tokens.weight and lm_head.weight")
    assert found["layout"].startswith("anchor_predicts") and found["block"].startswith("4 slots, 4")
    assert found["window"].startswith("5 tokens in layers [0]")
    assert found["block attention"] == "all slots see each other"
    assert found["vocabulary"] == "20, of which it predicts 7" and found["mask token"] == "19"
    assert found["Markov head"] == "vanilla, rank 5" and "Markov" in found["confidence head"]
    assert found["context"] == "layers [0, 2, 3], 8 wide each"
    assert found["not read"] == "dflash_config.future"
    sources = describe_checkpoint(tmp_path / "x").set_index("property")["source"]
    assert sources["context"] == "config.json: aux_hidden_state_layer_ids"
    assert "transformer_layer_config.sliding_window" in sources["window"]


def test_a_description_says_what_the_layout_follows_from(tmp_path):
    for values, config, source in (
        (LEGACY, GIVEN, "speculators_config, whose speculative_tokens are one less than block_"),
        (BONUS, GIVEN, "dspark_bonus_anchor"),
        (THEIR_DFLASH, PLAIN, "the family"),
        (changed(DFLASH, "dflash_config.shift_label", True), PLAIN, "shift_label"),
        (SPECFORGE, CONFIG, "the family"),
    ):
        folder = write(tmp_path / "x", values, tensors_of(config))
        sources = describe_checkpoint(folder).set_index("property")["source"]
        assert sources["layout"].startswith(f"config.json: {source}")


VLLM, SGLANG, TRT, LLAMA = "vLLM", "SGLang", "TensorRT-LLM", "llama.cpp"
OTHER_LAYOUT = "reads as the other layout"


@pytest.mark.parametrize(
    ("values", "config", "server", "match"),
    [
        (DSPARK, CONFIG, VLLM, 'loads as method "dspark"; up to 4 speculative tokens'),
        (DSPARK, CONFIG, SGLANG, "^loads as DSPARK$"),
        (DSPARK, CONFIG, LLAMA, "^loads as draft-dspark, converted"),
        (DSPARK, CONFIG, TRT, "not known.*max_draft_len must be the block, 4"),
        (BONUS, GIVEN, VLLM, "up to 3 speculative tokens"),
        (BONUS, GIVEN, SGLANG, OTHER_LAYOUT),
        (SPECULATORS, CONFIG, VLLM, "versions before 0.27 read it as the other layout"),
        (SPECULATORS, CONFIG, SGLANG, "first versions refuse speculators' files"),
        (LEGACY, GIVEN, SGLANG, "^loads as DSPARK"),
        (DFLASH, PLAIN, VLLM, 'loads as method "dflash"; up to 3'),
        (DFLASH, PLAIN, SGLANG, "^loads as DFLASH$"),
        (DFLASH | WINDOW, replace(PLAIN, layer_types=SLIDING, sliding_window=5), SGLANG, "window"),
        (DFLASH | {"sample_from_anchor": True}, PLAIN, VLLM, OTHER_LAYOUT),
        (SPECFORGE, CONFIG, LLAMA, "not known"),
        (DSPARK | {"num_target_layers": 4}, CONFIG, SGLANG, "refuses: .* and last layer, 3$"),
        (DSPARK | {"target_layer_ids": [-1, 2, 3]}, CONFIG, SGLANG, "refuses: .* layer, -1$"),
        (DSPARK | {"logit_scale": 0.5}, CONFIG, SGLANG, "ignores logit_scale"),
        (DSPARK | {"final_logit_softcapping": 30.0}, CONFIG, VLLM, "ignores the soft cap"),
    ],
)
def test_a_description_says_what_servers_make_of_it(tmp_path, values, config, server, match):
    found = described(write(tmp_path / "x", values, tensors_of(config)))
    assert re.search(match, found[server]), found[server]


@pytest.mark.parametrize(
    ("values", "family"),
    [
        ({"architectures": ["LlamaForCausalLMEagle3"], "hidden_size": 8}, "EAGLE-3"),
        ({"speculators_model_type": "eagle3", "architectures": ["Eagle3Speculator"]}, "EAGLE-3"),
        ({"architectures": ["DFlash2DraftModel"], "block_size": 8}, "DFlash 2"),
        (changed(DFLASH, "dflash_config.projector_type", "domino"), "Domino"),
        ({"architectures": ["DeepseekV4DSparkModel"]}, "DSpark on another backbone"),
        ({"architectures": ["Qwen3ForCausalLM"]}, "not a drafter's"),
        ({"model_type": "qwen3", "hidden_size": 8}, "not a drafter's"),
        ({}, "not a drafter's"),
        ({"medusa_num_heads": 5, "base_model_name_or_path": "x"}, "Medusa"),
        ({"model_type": "medusa"}, "Medusa"),
        (
            {"architectures": ["DeepseekV4ForCausalLM"], "dspark_markov_rank": 4},
            "DSpark on another backbone",
        ),
    ],
)
def test_other_families_are_named_without_their_weights(tmp_path, values, family):
    (tmp_path / "config.json").write_text(json.dumps(values))
    found = described(tmp_path)
    assert found["family"] == family and found["loads here"].startswith("no: ")
    assert found["vLLM"].startswith("not known")
    assert ("block_size" in found) == ("block_size" in values)


@pytest.mark.parametrize("name", ["dspark-k7", "dflash-k15", "gated-k7", "rnn-k7"])
def test_shipped_checkpoints_are_described(name):
    found = described(shipped("pocket") / name)
    assert found["loads here"].startswith("yes, with target=")
    assert found["block"] == ("15 slots, 15" if "15" in name else "7 slots, 7") + " of them predict"


def test_a_folder_without_a_config_cannot_be_described(tmp_path):
    with pytest.raises(FileNotFoundError, match="must hold config.json, got none$"):
        describe_checkpoint(tmp_path)
    gguf = tmp_path / "draft.gguf"
    gguf.write_bytes(b"GGUF")
    for path, got in ((tmp_path, "got none; it holds what llama.cpp .*: draft"), (gguf, "a GGUF")):
        with pytest.raises((FileNotFoundError, ValueError), match=got):
            describe_checkpoint(path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ValueError, match="must hold a JSON object, got list"):
        describe_checkpoint(tmp_path)
