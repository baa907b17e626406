"""Checkpoints: what stands in the files, what comes back, and what is refused, by name.

The layout is written out by hand here, names, shapes and fields, as published checkpoints have it.
"""

import json
import pickle
import re
import resource
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import huggingface_hub
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from dspark_lab.model import Drafter, DrafterConfig, load_drafter, save_drafter

pytestmark = pytest.mark.usefixtures("one_thread", "no_pickle")

LAYER = {
    "input_layernorm.weight": (8,),
    "mlp.down_proj.weight": (8, 12),
    "mlp.gate_proj.weight": (12, 8),
    "mlp.up_proj.weight": (12, 8),
    "post_attention_layernorm.weight": (8,),
    "self_attn.k_norm.weight": (6,),
    "self_attn.k_proj.weight": (12, 8),
    "self_attn.o_proj.weight": (8, 24),
    "self_attn.q_norm.weight": (6,),
    "self_attn.q_proj.weight": (24, 8),
    "self_attn.v_proj.weight": (12, 8),
}
BACKBONE = {f"layers.{i}.{name}": shape for i in (0, 1) for name, shape in LAYER.items()}
BACKBONE |= {"fc.weight": (8, 24), "hidden_norm.weight": (8,), "norm.weight": (8,)}
EMBEDDING, HEAD = "embed_tokens.weight", "lm_head.weight"
EMBEDDINGS = {EMBEDDING: (20, 8), HEAD: (20, 8)}
MARKOV = {"markov_head.markov_w1.weight": (20, 5), "markov_head.markov_w2.weight": (20, 5)}
GATE = {"markov_head.gate_proj.weight": (5, 13), "markov_head.gate_proj.bias": (5,)}
JOINT = {"markov_head.joint_proj.weight": (15, 18), "markov_head.joint_proj.bias": (15,)}
HEADS = {"none": {}, "vanilla": MARKOV, "gated": MARKOV | GATE, "rnn": MARKOV | JOINT}
CONFIDENCE = {
    "off": {},
    "plain": {"confidence_head.proj.weight": (1, 8), "confidence_head.proj.bias": (1,)},
    "markov": {"confidence_head.proj.weight": (1, 13), "confidence_head.proj.bias": (1,)},
}
KINDS = [(h, c) for h in HEADS for c in CONFIDENCE if (h, c) != ("none", "markov")]

# As a trainer of its own would have written it: a field more, another order, another dtype.
PUBLISHED_CONFIG = """{
  "architectures": ["Qwen3DSparkModel"], "attention_bias": false, "attention_dropout": 0.0,
  "block_size": 3, "bos_token_id": 1, "confidence_head_with_markov": true, "dtype": "bfloat16",
  "enable_confidence_head": true, "eos_token_id": 2, "head_dim": 6, "hidden_act": "silu",
  "hidden_size": 8, "initializer_range": 0.02, "intermediate_size": 12,
  "layer_types": ["full_attention", "full_attention"], "markov_head_type": "gated",
  "markov_rank": 5, "mask_token_id": 19, "max_position_embeddings": 40960,
  "max_window_layers": 36, "model_type": "qwen3", "num_anchors": 512, "num_attention_heads": 4,
  "num_hidden_layers": 2, "num_key_value_heads": 2, "num_target_layers": 4,
  "rms_norm_eps": 1e-06, "rope_parameters": {"rope_theta": 1000000, "rope_type": "default"},
  "sliding_window": null, "target_layer_ids": [0, 2, 3], "tie_word_embeddings": false,
  "transformers_version": "5.2.0", "use_cache": true, "use_sliding_window": false,
  "vocab_size": 20
}"""
SIZES = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 6}
SIZES |= {"vocab_size": 20, "hidden_size": 8, "intermediate_size": 12, "markov_rank": 5}
SIZES |= {"target_layer_ids": (0, 2, 3), "block_size": 3, "mask_token_id": 19, "num_anchors": 4}
CONFIG = DrafterConfig(**SIZES, rope_theta=5e5)


@pytest.fixture
def no_pickle(monkeypatch):
    def refuse(*args, **kwargs):
        pytest.fail("a pickle was opened")

    for module in (torch, pickle):
        monkeypatch.setattr(module, "load", refuse)
    monkeypatch.setattr(pickle, "loads", refuse)
    monkeypatch.setattr(pickle, "Unpickler", type("Unpickler", (), {"__init__": refuse}))


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "drafter"


@pytest.fixture
def whole(folder):
    """The folder of a checkpoint with embeddings."""
    save_drafter(make_drafter(), folder, include_embeddings=True)
    return folder


def make_drafter(config=CONFIG, seed=0, dtype=torch.float32):
    """A drafter in which every parameter matters."""
    drafter = Drafter(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in drafter.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return drafter.to(dtype).eval()


def target_with(embedding, head, num_layers=4):
    return SimpleNamespace(embed_weight=embedding, head_weight=head, num_layers=num_layers)


def target_of(drafter):
    weights = drafter.embed_tokens.weight, drafter.lm_head.weight
    return target_with(*(weight.detach().clone() for weight in weights))


def outputs(drafter):
    generator = torch.Generator().manual_seed(1)
    states = (
        torch.randn(1, 11, width, generator=generator).to(drafter.device, drafter.dtype)
        for width in (drafter.config.context_size, 8)
    )
    ids = torch.arange(11, device=drafter.device).view(1, 11)
    blocks = {"anchor_positions": ids[:, [2, 7]], "block_keep_mask": ids[:, :2] >= 0}
    with torch.no_grad():
        output = drafter(ids, next(states), torch.ones_like(ids), next(states), **blocks)
    logits = [output.draft_logits, output.aligned_target_logits, output.confidence_pred]
    return [value for value in logits if value is not None]


def assert_same(one, other):
    """The same configuration, parameters to the bit, and outputs, all of them finite."""
    assert one.config == other.config
    first, second = one.state_dict(), other.state_dict()
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert value.dtype == second[name].dtype and torch.equal(value, second[name]), name
    for value, expected in zip(outputs(one), outputs(other), strict=True):
        assert torch.equal(value, expected) and value.isfinite().all()


def change_config(folder, **changes):
    """Replaces fields, and leaves out those that are ``...``."""
    path = folder / "config.json"
    values = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: value for k, value in values.items() if value is not ...}))


def change_tensors(folder, changes):
    """Replaces tensors, and leaves out those that are None."""
    path = folder / "model.safetensors"
    tensors = load_file(path) | changes
    save_file({name: value for name, value in tensors.items() if value is not None}, path)


def contents(folder):
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def shapes(path):
    with safe_open(path, framework="pt") as file:
        return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}


def refused(folder, match, kind=ValueError, **arguments):
    """Loading is refused with this message, which names the folder."""
    with pytest.raises(kind) as caught:
        load_drafter(folder, **arguments)
    assert caught.type is kind
    assert str(folder) in str(caught.value)
    assert re.search(match, str(caught.value)), str(caught.value)


# What stands in the files, and what comes back.


@pytest.mark.parametrize(("head", "confidence"), KINDS)
@pytest.mark.parametrize("include", [False, True])
def test_published_names_and_shapes_come_back_with_every_bit(folder, head, confidence, include):
    config = replace(
        CONFIG,
        markov_head_type=head,
        markov_rank=0 if head == "none" else 5,
        enable_confidence_head=confidence != "off",
        confidence_head_with_markov=confidence == "markov",
    )
    drafter = make_drafter(config)
    save_drafter(drafter, folder, include_embeddings=include)
    assert sorted(contents(folder)) == ["config.json", "model.safetensors"]
    expected = BACKBONE | HEADS[head] | CONFIDENCE[confidence] | (EMBEDDINGS if include else {})
    assert shapes(folder / "model.safetensors") == expected
    assert_same(load_drafter(folder, target=None if include else target_of(drafter)), drafter)


def test_the_config_holds_the_published_fields_and_rank_zero_without_a_markov_head(folder):
    save_drafter(make_drafter(), folder)
    metadata = ("bos_token_id", "eos_token_id", "max_window_layers", "num_target_layers")
    metadata += ("sliding_window", "transformers_version", "use_cache")
    values = {k: v for k, v in json.loads(PUBLISHED_CONFIG).items() if k not in metadata}
    assert json.loads((folder / "config.json").read_text()) == values | {
        "dtype": "float32",
        "markov_head_type": "vanilla",
        "max_position_embeddings": 32768,
        "num_anchors": 4,
        "rope_parameters": {"rope_theta": 5e5, "rope_type": "default"},
        "rope_theta": 5e5,
    }
    config = replace(CONFIG, markov_head_type="none", confidence_head_with_markov=False)
    assert config.to_dict()["markov_rank"] == 0


def test_transformers_and_safetensors_read_the_same_backbone(whole):
    """As readable as the config, and marked as of torch."""
    from transformers import Qwen3Config

    assert len({path.stat().st_mode for path in whole.iterdir()}) == 1
    with safe_open(whole / "model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
    config = Qwen3Config.from_pretrained(whole)
    rope = getattr(config, "rope_parameters", None) or {"rope_theta": config.rope_theta}
    assert rope["rope_theta"] == 5e5
    assert config.head_dim == 6 and config.num_key_value_heads == 2
    assert list(config.layer_types) == ["full_attention", "full_attention"]


@pytest.mark.parametrize("include", [False, True])
def test_a_loaded_drafter_is_in_eval_mode_and_its_embeddings_are_frozen(folder, include):
    drafter = make_drafter().train()
    save_drafter(drafter, folder, include_embeddings=include)
    assert drafter.training
    target = target_of(drafter)
    loaded = load_drafter(folder, target=target)
    assert not any(module.training for module in loaded.modules())
    frozen = {n for n, value in loaded.named_parameters() if not value.requires_grad}
    assert frozen == EMBEDDINGS.keys()
    assert all(value.is_leaf for value in loaded.parameters())
    shared = loaded.embed_tokens.weight.data_ptr() == target.embed_weight.data_ptr()
    assert shared == (loaded.lm_head.weight.data_ptr() == target.head_weight.data_ptr())
    assert shared != include


@pytest.mark.parametrize("absent", [{EMBEDDING}, {HEAD}, set()], ids=str)
def test_only_what_is_left_out_comes_from_the_target(whole, absent):
    change_tensors(whole, dict.fromkeys(absent))
    other = make_drafter(seed=5)
    state = load_drafter(whole, target=target_of(other)).state_dict()
    for name, expected in make_drafter().state_dict().items():
        assert torch.equal(state[name], other.state_dict()[name] if name in absent else expected)
    if absent:
        refused(whole, f"leaves out {' '.join(absent)}; pass target=")


def test_a_tied_target_is_saved_under_both_names(folder):
    drafter = make_drafter()
    drafter.use_target_embeddings(*[target_of(drafter).embed_weight] * 2)
    save_drafter(drafter, folder, include_embeddings=True)
    assert shapes(folder / "model.safetensors").keys() > EMBEDDINGS.keys()
    assert_same(load_drafter(folder), drafter)


@pytest.mark.parametrize(("kept", "other"), [(EMBEDDING, HEAD), (HEAD, EMBEDDING)])
def test_one_tensor_of_a_tied_checkpoint_stands_for_both_which_may_be_equal(whole, kept, other):
    weight = make_drafter().state_dict()[kept]
    change_config(whole, tie_word_embeddings=True)
    change_tensors(whole, {other: weight.clone()})
    assert torch.equal(load_drafter(whole).state_dict()[other], weight)
    change_tensors(whole, {other: None})
    loaded = load_drafter(whole, target=target_of(make_drafter(seed=5)))
    assert torch.equal(loaded.embed_tokens.weight, weight)
    assert loaded.embed_tokens.weight.data_ptr() == loaded.lm_head.weight.data_ptr()
    assert not loaded.lm_head.weight.requires_grad and not loaded.embed_tokens.weight.requires_grad


def test_a_published_checkpoint_loads(folder):
    folder.mkdir()
    (folder / "config.json").write_text(PUBLISHED_CONFIG)
    generator = torch.Generator().manual_seed(3)
    tensors = {
        name: torch.randn(shape, generator=generator).bfloat16()
        for name, shape in (BACKBONE | HEADS["gated"] | CONFIDENCE["markov"] | EMBEDDINGS).items()
    }
    save_file(tensors, folder / "model.safetensors")
    # What a trainer leaves beside its weights is never looked at.
    torch.save({"step": 3}, folder / "optimizer.pt")
    drafter = load_drafter(folder)
    published = {"markov_head_type": "gated", "num_anchors": 512, "num_target_layers": 4}
    published |= {"rope_theta": 1e6, "max_position_embeddings": 40960}
    assert drafter.config == replace(CONFIG, **published)
    state = drafter.state_dict()
    assert state.keys() == tensors.keys()
    assert all(value.dtype == torch.bfloat16 for value in state.values())
    assert all(torch.equal(state[name], value) for name, value in tensors.items())
    assert all(value.isfinite().all() for value in outputs(drafter))


@pytest.mark.parametrize(
    "place",
    [
        {"rope_theta": 7e5},
        {"rope_parameters": {"rope_theta": 7e5, "rope_type": "default"}},
        {"rope_theta": 7e5, "rope_scaling": {"type": "default", "factor": None}},
        {"rope_theta": 7e5, "rope_scaling": None, "partial_rotary_factor": 1.0},
        {"rope_theta": 700_000, "rope_parameters": {"rope_theta": 7e5}},
    ],
    ids=str,
)
def test_a_rope_base_is_read_wherever_it_stands(place):
    values = {k: v for k, v in CONFIG.to_dict().items() if not k.startswith("rope")}
    assert DrafterConfig.from_dict(values | place).rope_theta == 7e5


WINDOWS = {"use_sliding_window": True, "sliding_window": 4096}


@pytest.mark.parametrize(
    "inherited",
    [
        {"attention_dropout": 0.1, "use_cache": False, "sliding_window": 4096},
        WINDOWS | {"max_window_layers": 1},
        WINDOWS | {"layer_types": ["full_attention"] * 36},
        {"use_sliding_window": True, "sliding_window": None, "layer_types": None},
        {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}},
    ],
    ids=", ".join,
)
def test_settings_that_the_draft_does_not_follow_are_not_read(inherited):
    """Settings of the training alone, and of the target whose config it is made from."""
    assert DrafterConfig.from_dict(CONFIG.to_dict() | inherited) == CONFIG


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16, torch.float64])
def test_a_file_of_another_dtype_comes_back_in_it_or_as_asked(folder, stored):
    drafter = make_drafter()
    save_drafter(drafter, folder, include_embeddings=True, dtype=stored)
    named = json.loads((folder / "config.json").read_text())["dtype"]
    assert f"torch.{named}" == str(stored)
    assert {value.dtype for value in load_file(folder / "model.safetensors").values()} == {stored}
    assert drafter.fc.weight.dtype == torch.float32
    assert_same(load_drafter(folder), make_drafter(dtype=stored))
    assert_same(load_drafter(folder, dtype=torch.float32), make_drafter(dtype=stored).float())


def test_embeddings_of_the_target_come_in_the_dtype_of_the_drafter(folder):
    drafter = make_drafter(dtype=torch.bfloat16)
    save_drafter(drafter, folder)
    assert_same(load_drafter(folder, target=target_of(make_drafter())), drafter)


@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_of_several_dtypes_the_config_names_one(whole, key):
    change_tensors(whole, {"norm.weight": torch.ones(8, dtype=torch.bfloat16)})
    change_config(whole, **({"dtype": ...} | {key: "bfloat16"}))
    assert {value.dtype for value in load_drafter(whole).parameters()} == {torch.bfloat16}
    assert load_drafter(whole, dtype=torch.float64).norm.weight.dtype == torch.float64
    change_config(whole, **{key: "auto"})
    refused(whole, "BF16 and F32, and config.json names none .* got auto; pass dtype=")


def test_a_file_overwritten_later_does_not_change_the_drafter(whole):
    drafter = load_drafter(whole)
    path = whole / "model.safetensors"
    with path.open("r+b") as file:
        file.write(bytes(path.stat().st_size))
    assert_same(drafter, make_drafter())


# Several files.


def test_a_sharded_checkpoint_is_indexed_and_comes_back(folder):
    drafter, limit = make_drafter(), 1000
    save_drafter(drafter, folder, include_embeddings=True, max_shard_bytes=limit)
    files = sorted(path.name for path in folder.glob("*.safetensors"))
    count = len(files)
    assert count > 4
    assert files == [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
    sizes = [sum(t.nbytes for t in load_file(folder / file).values()) for file in files]
    assert max(sizes) <= limit
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_size": sum(v.nbytes for v in drafter.state_dict().values())}
    assert index["weight_map"] == {name: file for file in files for name in shapes(folder / file)}
    assert index["weight_map"].keys() == drafter.state_dict().keys()
    assert_same(load_drafter(folder), drafter)


FIRST, SECOND = (f"model-0000{i}-of-00006.safetensors" for i in (1, 2))


@pytest.fixture
def sharded(folder):
    save_drafter(make_drafter(), folder, include_embeddings=True, max_shard_bytes=2000)
    return folder


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"norm.weight": FIRST}, f"{FIRST} must hold norm.weight"),
        ({"other.weight": FIRST}, f"{FIRST} must hold other.weight"),
        *(
            ({"norm.weight": file}, f"index.json: norm.weight must .* beside, got {file!r}")
            for file in ("../model.safetensors", "/model.safetensors", "pytorch_model.bin", 3)
        ),
    ],
)
def test_an_index_that_names_a_wrong_file_is_refused(sharded, changes, match):
    torch.save({}, sharded / "pytorch_model.bin")
    save_file({"norm.weight": torch.ones(8)}, sharded.parent / "model.safetensors")
    path = sharded / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"] |= changes
    path.write_text(json.dumps(index))
    refused(sharded, match)


def test_a_missing_or_damaged_shard_and_a_damaged_index_are_named(sharded):
    path = sharded / SECOND
    path.write_bytes(path.read_bytes()[:-1])
    refused(sharded, f"{SECOND} must .* truncated or damaged")
    path.unlink()
    refused(sharded, f"index.json names {SECOND}, which is not there", FileNotFoundError)
    (sharded / "model.safetensors.index.json").write_text("{}")
    refused(sharded, "index.json must hold a weight_map")


# What is refused.

TIED, NEITHER = {"tie_word_embeddings": True}, {EMBEDDING: None, HEAD: None}


@pytest.mark.parametrize(
    ("changes", "tensors", "match"),
    [
        ({"hidden_act": "gelu"}, {}, "config.json: hidden_act must be 'silu' .*, got 'gelu'"),
        ({}, {"fc.weight": None, "norm.weight": None}, "must hold fc.weight, norm.weight, as conf"),
        ({"num_hidden_layers": 4, "layer_types": None}, {}, r"layers\.2\..*, and 14 more, as"),
        ({"enable_confidence_head": False}, {}, r"alone, got confidence.*bias, .*weight too$"),
        (
            {},
            {"fc.weight": torch.ones(8, 16), HEAD: torch.ones(21, 8)},
            r"fc\.weight must be \[8, 24\], got \[8, 16\]; lm_head\.weight .*, got \[21, 8\]",
        ),
        ({}, {"fc.weight": torch.ones(8, 24).char()}, "fc.weight must be of BF16, .*, got I8"),
        (TIED, {}, f"tie_word_embeddings, but {EMBEDDING} and {HEAD} differ"),
        ({}, NEITHER, f"leaves out {EMBEDDING} and {HEAD}; pass target="),
        (TIED, NEITHER, f"leaves out {EMBEDDING} and {HEAD}; pass target="),
    ],
)
def test_config_and_tensors_that_do_not_fit_are_named(whole, changes, tensors, match):
    change_config(whole, **changes)
    change_tensors(whole, tensors)
    refused(whole, match)


def test_a_field_of_a_wrong_kind_is_named_with_its_file(whole):
    change_config(whole, hidden_size="8")
    refused(whole, "config.json: hidden_size must be an int, got '8'", TypeError)


@pytest.mark.parametrize("include", [False, True])
@pytest.mark.parametrize(
    ("vocab", "hidden", "layers", "match"),
    [
        (21, 8, 4, "vocab_size 20 and hidden_size 8, .* got 21 and 8"),
        (20, 16, 4, "vocab_size 20 and hidden_size 8, .* got 20 and 16"),
        (20, 8, 3, r"layers \[0, 2, 3\], got one of 3 layers"),
    ],
)
def test_a_target_that_does_not_fit_is_refused(folder, include, vocab, hidden, layers, match):
    save_drafter(make_drafter(), folder, include_embeddings=include)
    weight = torch.zeros(vocab, hidden)
    refused(folder, match, target=target_with(weight, weight, layers))


def test_a_target_as_wide_as_the_features_fits(folder):
    drafter = make_drafter(replace(CONFIG, target_hidden_size=10))
    save_drafter(drafter, folder, include_embeddings=True)
    weight = torch.zeros(20, 10)
    assert_same(load_drafter(folder, target=target_with(weight, weight)), drafter)


@pytest.mark.parametrize("keep", [0, 5, 40, -1])
def test_a_truncated_file_is_named(whole, keep):
    path = whole / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    refused(whole, "model.safetensors must be a safetensors file, .* truncated or damaged")


@pytest.mark.parametrize(
    ("file", "content", "match"),
    [
        ("model.safetensors", b"version https://git-lfs.github.com/spec/v1\noid", "git-lfs"),
        ("config.json", b"{", "must be a JSON file"),
        ("config.json", b"[]", "must hold a JSON object, got list"),
    ],
)
def test_a_file_that_holds_something_else_is_named(whole, file, content, match):
    (whole / file).write_bytes(content)
    refused(whole, f"{file} .*{match}")


@pytest.mark.parametrize("form", ["zip", "legacy", 2, 3, 4, 5])
def test_a_pickle_under_another_name_is_never_loaded(whole, form):
    path = whole / "model.safetensors"
    if isinstance(form, int):
        path.write_bytes(pickle.dumps({"fc.weight": [1.0]}, protocol=form))
    else:
        torch.save({"fc.weight": [1.0]}, path, _use_new_zipfile_serialization=form == "zip")
    refused(whole, "model.safetensors must be a safetensors file, got a pickle, which is")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pth", "last.ckpt"])
def test_a_folder_of_pickles_is_refused_by_name(whole, name):
    (whole / "model.safetensors").rename(whole / name)
    refused(whole, f"got a pickle, which is never loaded: {name}")
    refused(whole / name, "got a pickle, which is never loaded")


def test_a_folder_without_weights_or_config_and_a_path_that_is_no_folder_are_refused(whole):
    refused(whole / "config.json", "must be a folder .*, got a file")
    refused(whole.parent / "elsewhere", "there is no folder", FileNotFoundError)
    (whole / "model.safetensors").unlink()
    match = "must hold model.safetensors or model.safetensors.index.json, got neither"
    refused(whole, match, FileNotFoundError)
    (whole / "config.json").unlink()
    refused(whole, "must hold config.json", FileNotFoundError)
    (whole / "config.json").mkdir()
    refused(whole, "must hold config.json", FileNotFoundError)


def test_a_folder_that_holds_checkpoints_names_them(tmp_path):
    for name in ("run/checkpoint-000030", "run/checkpoint-000060", "epoch/model/consolidated"):
        save_drafter(make_drafter(), tmp_path / name)
    said = "checkpoints, load one of them: "
    refused(tmp_path / "run", f"{said}checkpoint-000030, checkpoint-000060$", FileNotFoundError)
    refused(tmp_path / "epoch", f"{said}model/cons", FileNotFoundError)


# Replacing what is there.


def test_a_checkpoint_is_replaced_as_a_whole(folder, tmp_path):
    save_drafter(make_drafter(seed=1), folder, max_shard_bytes=1000)
    save_drafter(make_drafter(), folder, include_embeddings=True)
    assert sorted(contents(folder)) == ["config.json", "model.safetensors"]
    assert_same(load_drafter(folder), make_drafter())
    assert list(tmp_path.iterdir()) == [folder]


def test_parents_are_made_an_empty_folder_is_filled_and_a_link_stays_a_link(tmp_path):
    empty, link = tmp_path / "empty", tmp_path / "latest"
    empty.mkdir()
    link.symlink_to(empty, target_is_directory=True)
    for seed, folder in enumerate((tmp_path / "a" / "b", str(empty), link)):
        save_drafter(make_drafter(seed=seed), folder, include_embeddings=True)
        assert_same(load_drafter(folder), make_drafter(seed=seed))
    assert link.is_symlink()
    assert_same(load_drafter(empty), make_drafter(seed=2))


ANOTHER = "without a config.json of architecture Qwen3DSpark"


@pytest.mark.parametrize(
    ("file", "text", "match"),
    [
        ("notes.txt", "precious", "got notes.txt"),
        ("model-00001-of-00002.safetensors.bak", "", "got .*bak"),
        ("sub/weights", "precious", "got sub"),
        *(("config.json", text, ANOTHER) for text in ('{"architectures": ["Llama"]}', "{", "[]")),
    ],
)
def test_what_is_no_drafters_checkpoint_is_not_replaced(whole, file, text, match):
    (whole / file).parent.mkdir(exist_ok=True)
    (whole / file).write_text(text)
    before = contents(whole)
    with pytest.raises(ValueError, match=f"{whole} must be empty or hold a drafter.*{match}"):
        save_drafter(make_drafter(seed=1), whole)
    with pytest.raises(ValueError, match=f"{file} must be a folder .*, got a file"):
        save_drafter(make_drafter(seed=1), whole / file)
    assert contents(whole) == before


def test_a_disk_that_takes_no_more_is_an_error_of_the_system(whole):
    before = contents(whole)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4000, hard))
    try:
        with pytest.raises(OSError, match=f"could not write a drafter to {whole}"):
            save_drafter(make_drafter(seed=1), whole)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert contents(whole) == before
    assert list(whole.parent.iterdir()) == [whole]


def test_what_a_killed_save_left_is_loaded_with_a_warning_and_cleared_by_the_next(whole):
    """Killed while it wrote, and between the old folder and the new."""
    whole.rename(whole.parent / ".drafter.previous")
    (whole.parent / ".drafter.partial-1").mkdir()
    with pytest.warns(UserWarning, match=f"a save to {whole} was interrupted; loading"):
        assert_same(load_drafter(whole), make_drafter())
    save_drafter(make_drafter(seed=2), whole, include_embeddings=True)
    assert_same(load_drafter(whole), make_drafter(seed=2))
    assert list(whole.parent.iterdir()) == [whole]


# The hub.


def test_a_name_of_the_hub_is_fetched_without_code_or_pickles(whole, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    download = mock.Mock(return_value=str(whole))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert_same(load_drafter("owner/a-drafter_0.5"), make_drafter())
    shutil.copytree(whole, tmp_path / "owner" / "drafter")
    load_drafter("owner/drafter")
    for path in ("no-owner", "./owner/other", "a/b/c", "/a/b", "other/", Path("owner/other")):
        with pytest.raises(FileNotFoundError, match="there is no folder"):
            load_drafter(path)
    patterns = ["*.json", "*.safetensors"]
    download.assert_called_once_with("owner/a-drafter_0.5", allow_patterns=patterns)
    download.side_effect = ConnectionError("offline")
    match = "runs/drafter with a drafter, and none .* from the Hugging Face hub: offline"
    with pytest.raises(FileNotFoundError, match=match):
        load_drafter("runs/drafter")
