"""The target gives what `output_hidden_states` gives, document by document, or says why not.

Small random models of transformers; the oracle is the model's own answer, or the same document
alone. Nothing here asks a network.
"""

import json
import subprocess
import sys
import warnings
import weakref
from itertools import accumulate, combinations
from pathlib import Path
from unittest import mock

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor

from dspark_lab import chats
from dspark_lab.common import extract_context_feature
from dspark_lab.model import Target, load_target, target
from tests.recorder import Recorder
from tests.samples import documents

pytestmark = pytest.mark.usefixtures("one_thread")

SHAPE = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3}
SHAPE |= {"num_attention_heads": 4, "num_key_value_heads": 2}
GPT2_SHAPE = {"vocab_size": 64, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64}
BLOOM_SHAPE = {"vocab_size": 64, "hidden_size": 32, "n_layer": 3, "n_head": 4}
MAMBA_SHAPE = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 3, "state_size": 4}
SOME_WINDOWS = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}
FAMILIES = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", SHAPE),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", SHAPE | {"head_dim": 8}),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", GPT2_SHAPE),
}
# Windows of four tokens and recurrent layers: a mask over all pairs would not do for these.
UNMASKED = {
    "windows": ("MistralForCausalLM", "MistralConfig", SHAPE | {"sliding_window": 4}),
    "some windows": ("Qwen3ForCausalLM", "Qwen3Config", SHAPE | SOME_WINDOWS),
    "recurrent": ("MambaForCausalLM", "MambaConfig", MAMBA_SHAPE),
    "alibi": ("BloomForCausalLM", "BloomConfig", BLOOM_SHAPE),
}
ALL = FAMILIES | UNMASKED
TYPES = {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: 0.1}
ROW = 14
LENGTHS = torch.tensor([[3, 8, 0], [2, 1, 9], [14, 0, 0]])
EVERY_ID = [-1, 0, 1, 2]
ID_SETS = [ids for size in (1, 2, 3, 4) for ids in combinations(EVERY_ID, size)]


def random_model(name: str, seed: int = 0, **options):
    """One whose layers and norms all change what they are given."""
    model_class, config_class, shape = ALL[name]
    config = getattr(transformers, config_class)(**(shape | options))
    model = getattr(transformers, model_class)(config)
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.data.add_(0.3 * noise if parameter.dim() == 1 else 0.15 * noise)
    return model


def random_target(name: str, dtype: torch.dtype = torch.float32, **options) -> Target:
    return Target(random_model(name, **options).to(dtype))


def random_ids(rows: int = 3, tokens: int = ROW, seed: int = 1) -> Tensor:
    return torch.randint(0, 64, (rows, tokens), generator=torch.Generator().manual_seed(seed))


def places(lengths: Tensor) -> list[tuple[int, slice]]:
    """Row and tokens of every document."""
    return [
        (row, slice(end - length, end))
        for row, of_row in enumerate(lengths.tolist())
        for length, end in zip(of_row, accumulate(of_row), strict=True)
        if length
    ]


def assert_as_alone(lab: Target, found, ids: Tensor, lengths: Tensor, tolerance: float) -> None:
    """The features of every document are those of a row that holds it alone."""
    assert found.context.isfinite().all() and found.last.isfinite().all()
    layer_ids = EVERY_ID if found.context.shape[2] == 4 * lab.hidden_size else [0, 2]
    for row, tokens in places(lengths):
        alone = lab.features(ids[row : row + 1, tokens], layer_ids)
        for name in ("context", "last"):
            expected = getattr(alone, name)[0]
            # The first layers of a random model are small beside its last ones.
            atol = tolerance * float(expected.abs().max())
            torch.testing.assert_close(
                getattr(found, name)[row, tokens], expected, rtol=tolerance, atol=atol
            )


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_context_is_extracted_from_the_output_hidden_states(family, dtype, tied):
    model = random_model(family, tie_word_embeddings=tied).to(dtype)
    lab, ids = Target(model), random_ids()
    assert (lab.embed_weight is lab.head_weight) == tied
    with torch.no_grad():
        expected = model.base_model(ids, output_hidden_states=True, use_cache=False)
    for layer_ids in ID_SETS:
        found = lab.features(ids, layer_ids)
        assert found.context.dtype == found.last.dtype == dtype == lab.dtype
        assert found.context.device == found.last.device == ids.device
        wanted = extract_context_feature(expected.hidden_states, layer_ids)
        assert torch.equal(found.context, wanted), layer_ids
        assert torch.equal(found.last, expected.last_hidden_state)


@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_packed_document_has_the_features_it_has_alone(family, dtype, kernel):
    lab = Target(random_model(family, attn_implementation=kernel).to(dtype))
    assert_packed_as_alone(lab, TYPES[dtype])


@pytest.mark.parametrize("name", UNMASKED)
def test_documents_stay_apart_where_a_mask_would_not_do(name):
    assert_packed_as_alone(random_target(name), 1e-5)


def test_kernel_that_takes_no_mask_gets_none(monkeypatch):
    lab = random_target("llama")
    monkeypatch.setattr(lab.model.config, "_attn_implementation_internal", "flash_attention_2")
    assert not lab.decodes_batches
    monkeypatch.undo()
    assert lab.decodes_batches
    monkeypatch.setattr(target, "_MASKED_FAMILIES", ())
    monkeypatch.setattr(target, "_additive", None)
    assert_packed_as_alone(lab, 1e-5)


def assert_packed_as_alone(lab: Target, tolerance: float) -> None:
    ids = random_ids()
    packed = lab.features(ids, EVERY_ID, seq_lens=LENGTHS)
    assert_as_alone(lab, packed, ids, LENGTHS, tolerance)
    joined = lab.features(ids, EVERY_ID)
    for row, tokens in places(LENGTHS):
        if tokens.start > 0:
            one, other = joined.context[row, tokens], packed.context[row, tokens]
            assert not torch.allclose(one, other, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", ["gpt2", "some windows"])
def test_given_positions_of_packed_rows_are_used(name):
    lab, ids = random_target(name), random_ids()
    positions = torch.tensor([[0, 1, 2, *range(8), 0, 0, 0]] * 3)
    lengths = LENGTHS[:1].expand(3, -1)
    counted = lab.features(ids, EVERY_ID, seq_lens=lengths)
    given = lab.features(ids, EVERY_ID, seq_lens=lengths, position_ids=positions)
    spread = lab.features(ids, EVERY_ID, seq_lens=lengths, position_ids=2 * positions)
    for row, tokens in places(lengths):
        assert torch.equal(given.context[row, tokens], counted.context[row, tokens])
        assert not torch.allclose(spread.last[row, tokens], counted.last[row, tokens])


@pytest.mark.parametrize("masked", [False, True], ids=["without mask", "with mask"])
@pytest.mark.parametrize("family", FAMILIES)
def test_padding_on_the_right_changes_nothing(family, masked):
    lab = random_target(family, torch.float64)
    ids, lengths = random_ids(), torch.tensor([[5], [14], [1]])
    mask = torch.arange(ROW) < lengths
    padded = lab.features(ids.where(mask, 0), EVERY_ID, attention_mask=mask if masked else None)
    assert_as_alone(lab, padded, ids, lengths, 1e-7)


@pytest.mark.parametrize("family", FAMILIES)
def test_batch_features_are_those_of_each_conversation(family):
    lab = random_target(family, torch.float64)
    encoded = documents("paaa", "paapaapaa", "pa", "paapaa")
    for batch in (
        chats.collate(encoded, pad_token_id=0),
        chats.pack(encoded, 12, pad_token_id=63),
        chats.pack(encoded, 12, pad_token_id=63).row(1),
    ):
        found = lab.batch_features(batch, [0, 2])
        assert_as_alone(lab, found, batch.input_ids, batch.seq_lens, 1e-7)


def test_only_rows_of_several_documents_need_a_mask():
    lab = random_target("llama")
    masks = []
    lab.model.model.register_forward_pre_hook(
        lambda _module, _args, inputs: masks.append(inputs.get("attention_mask")), with_kwargs=True
    )
    encoded = documents("paaaaaaaa", "pa", "paa")
    packed = chats.pack(encoded, 9, pad_token_id=0)
    assert packed.seq_lens.tolist() == [[9, 0], [3, 2]]
    for batch in (chats.collate(encoded, 0), packed, packed.row(0), packed.row(1)):
        lab.batch_features(batch, [0])
    assert [mask is None for mask in masks] == [True, False, True, False]


def on_meta(lab: Target) -> Target:
    """The same model where no tensor has a value: what asks for one fails."""
    return Target(lab.model.to("meta"))


without_values = pytest.mark.skipif(
    transformers.__version__.startswith("4."), reason="transformers 5 runs on the meta device"
)


@without_values
@pytest.mark.parametrize("family", [*FAMILIES, "windows", "some windows"])
def test_the_features_of_a_batch_are_made_on_its_device_and_ask_it_nothing(family):
    lab, encoded = on_meta(random_target(family)), documents("paaaaaaaa", "pa", "paa")
    for batch in (chats.collate(encoded, 0), chats.pack(encoded, 9, pad_token_id=0)):
        moved = batch.to("meta")
        with Recorder() as recorder:
            lab.batch_features(moved, [0, 2])
        assert recorder.devices == {"meta"}
    # Transformers itself does ask, unless there is a cache.
    with pytest.raises(RuntimeError, match="meta"):
        lab.model.base_model(moved.input_ids, use_cache=False)


@without_values
def test_reading_behind_rows_of_unequal_length_asks_the_device_nothing():
    lab = on_meta(random_target("llama"))
    cache, ids = lab.start_cache(3, 12), torch.zeros(3, 4, dtype=torch.long, device="meta")
    for kept, counts in (([0, 1, 2], [4, 4, 4]), ([0, 1, 2], [1, 3, 2]), ([2, 0], [1, 1, 1])):
        features = lab.advance(ids, cache, [0, 1])
        assert features.last.shape == (*ids.shape, lab.hidden_size)
        cache.commit(counts, kept)
        ids = ids[: len(kept)]
    assert cache.rows.lengths == [7, 6]
    with pytest.raises(ValueError, match="room for 12 tokens a row, got 13"):
        lab.advance(ids.new_zeros(2, 6), cache, [0])


class Streams(torch.nn.Module):
    """A layer with hyper-connections: on three streams, of which the last layer makes one again."""

    def __init__(self, layer, last):
        super().__init__()
        self.layer, self.last = layer, last

    def forward(self, hidden_states, **inputs):
        if hidden_states.dim() == 3:
            hidden_states = torch.stack([hidden_states * (1 + i) for i in range(3)], dim=2)
        streams = [self.layer(stream, **inputs) for stream in hidden_states.unbind(2)]
        hidden_states = torch.stack(streams, dim=2)
        return hidden_states.mean(dim=2) if self.last else hidden_states


def test_of_parallel_streams_the_mean_is_the_feature():
    """DeepSeek V4's layers pass on states [batch, seq, streams, hidden]."""
    model, ids = random_model("llama"), random_ids()
    layers = model.model.layers
    for index, layer in enumerate(layers):
        layers[index] = Streams(layer, last=index == 2)
    lab, seen = Target(model), []
    for layer in layers:
        layer.register_forward_hook(lambda _module, _args, output: seen.append(output))
    found = lab.features(ids, EVERY_ID)
    assert seen[0].shape == seen[1].shape == (3, ROW, 3, 32)
    expected = [lab.embed_weight[ids], seen[0].mean(2), seen[1].mean(2), found.last]
    assert torch.equal(found.context, torch.cat(expected, dim=-1))


def test_target_is_frozen_and_in_eval_mode():
    lab = Target(random_model("gpt2").train())
    assert not any(parameter.requires_grad for parameter in lab.model.parameters())
    assert not any(module.training for module in lab.model.modules())
    assert (lab.name, lab.tokenizer) == ("in memory", None)


def test_one_forward_without_the_lm_head_or_the_drafters_warnings_of_layer_ids():
    lab = random_target("llama")
    ran = []
    for name, module in lab.model.named_modules():
        module.register_forward_hook(lambda *_, name=name: ran.append(name))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lab.features(random_ids(), EVERY_ID, seq_lens=LENGTHS)
    assert "lm_head" not in ran and "" not in ran
    assert all(ran.count(name) == 1 for name in ("model", "model.layers.0", "model.layers.2"))


@pytest.mark.parametrize("family", FAMILIES)
def test_states_of_other_layers_are_not_kept(family):
    """At most so many layers' outputs exist at once, seen as each layer ends."""
    layers = {"n_layer" if family == "gpt2" else "num_hidden_layers": 12}
    lab, ids = random_target(family, **layers), random_ids()
    seen: list[weakref.ref] = []
    alive: list[int] = []

    def count(_module, _args, output):
        seen.append(weakref.ref(output[0] if isinstance(output, tuple) else output))
        alive.append(sum(state() is not None for state in seen))

    for layer in lab._layers:
        layer.register_forward_hook(count)
    with torch.no_grad():
        kept = lab.model.base_model(ids, output_hidden_states=True, use_cache=False)
    assert max(alive) == 12
    del kept
    alive.clear()
    lab.features(ids, [-1, 3, 7, 11])
    assert max(alive) <= 2


def test_context_is_a_copy_that_the_model_cannot_change():
    lab, ids = random_target("llama"), random_ids()
    before = lab.features(ids, [0, 1])
    lab.model.model.layers[1].register_forward_pre_hook(lambda _module, args: args[0].mul_(2))
    after = lab.features(ids, [0, 1])
    hidden = lab.hidden_size
    assert torch.equal(after.context[..., :hidden], before.context[..., :hidden])
    assert not torch.allclose(after.context[..., hidden:], before.context[..., hidden:])


@pytest.mark.parametrize("broken", [0, 1, 2])
def test_no_hook_stays_behind_when_the_model_fails(broken):
    lab = random_target("llama")

    def fail(*_):
        raise RuntimeError("out of memory")

    failing = lab.model.model.layers[broken].register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        lab.features(random_ids(), EVERY_ID)
    failing.remove()
    hooks = [(*m._forward_hooks, *m._forward_pre_hooks) for m in lab.model.modules()]
    assert not any(hooks)


def test_long_padding_and_long_rows_of_short_documents_are_fine():
    lab, ids = random_target("gpt2"), random_ids(1, 200)
    found = lab.features(ids, [0], seq_lens=torch.tensor([[64, 60]]))
    alone = lab.features(ids[:, 64:124], [0])
    torch.testing.assert_close(found.last[:, 64:124], alone.last)
    assert found.context.isfinite().all()


@pytest.mark.parametrize(
    ("name", "options", "match"),
    [
        ("Phi", {}, "must have no bias"),
        ("OPT", {"word_embed_proj_dim": 16, "ffn_dim": 32}, r"\(64, 32\), got shape \(64, 16\)"),
    ],
)
def test_target_whose_logits_are_not_its_heads_alone_is_refused(name, options, match):
    config = getattr(transformers, f"{name}Config")(**SHAPE, **options)
    with pytest.raises(ValueError, match=match):
        Target(getattr(transformers, f"{name}ForCausalLM")(config), name="odd")


@pytest.mark.parametrize(
    ("name", "options", "cap", "scale"),
    [
        ("Gemma2", {"final_logit_softcapping": 0.05}, 0.05, 1.0),
        ("Gemma2", {"final_logit_softcapping": None}, None, 1.0),
        ("Gemma3Text", {"final_logit_softcapping": 0.05}, 0.05, 1.0),
        ("Cohere", {}, None, 0.0625),
        ("Granite", {"logits_scaling": 4.0}, None, 0.25),
        ("HyperCLOVAX", {"logits_scaling": 4.0}, None, 4.0),
        ("RecurrentGemma", {"logits_soft_cap": 0.05}, 0.05, 1.0),
    ],
)
def test_a_soft_cap_and_a_factor_are_part_of_the_targets_logits(name, options, cap, scale):
    """They are those that the model itself gives, far from those without."""
    if not hasattr(transformers, f"{name}Config"):
        pytest.skip("transformers is older than the model")
    kind = name.removesuffix("Text")
    config = getattr(transformers, f"{name}Config")(**SHAPE, **options)
    torch.manual_seed(1)
    lab = Target(getattr(transformers, f"{kind}ForCausalLM")(config))
    assert (lab.logit_rule.cap, lab.logit_rule.scale) == (cap, scale)
    ids = random_ids()
    wanted = lab.model(ids, use_cache=False).logits
    found = lab.logits(lab.features(ids, [0]).last)
    torch.testing.assert_close(found, wanted, atol=1e-6, rtol=1e-4)
    bare = lab.features(ids, [0]).last @ lab.head_weight.T
    assert ((bare - wanted).abs().max() > 1e-3) == (cap is not None or scale != 1)


def test_factor_of_one_on_the_logits_is_fine():
    config = transformers.GraniteConfig(**SHAPE, logits_scaling=1.0, embedding_multiplier=3.0)
    lab, ids = Target(transformers.GraniteForCausalLM(config)), random_ids()
    embedded = lab.features(ids, [-1]).context
    torch.testing.assert_close(embedded, 3 * lab.embed_weight[ids])


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_logits_that_are_changed_under_any_other_name_are_refused(dtype):
    model = random_model("llama").to(dtype)
    Target(model)
    model.lm_head.register_forward_hook(lambda _module, _args, logits: 1.5 * logits)
    with pytest.raises(ValueError, match="whose logits are something else"):
        Target(model)


def test_model_without_a_head_or_without_a_list_of_layers_is_refused():
    model = random_model("llama")
    with pytest.raises(ValueError, match="under an LM head, got LlamaModel"):
        Target(model.model)
    model.config.num_hidden_layers = 5
    with pytest.raises(ValueError, match="a list of its 5 layers"):
        Target(model)
    config = transformers.T5Config(d_model=32, d_kv=8, d_ff=32, num_layers=3, num_heads=4)
    with pytest.raises(ValueError, match="a decoder alone, got T5ForConditionalGeneration"):
        Target(transformers.T5ForConditionalGeneration(config))
    with pytest.raises(TypeError, match="PreTrainedModel, got 'llama'"):
        Target("llama")


def test_layer_that_does_not_run_is_noticed():
    lab = random_target("llama")
    layer = lab.model.model.layers[1]
    layer.__class__ = type("Silent", (type(layer),), {"__call__": type(layer).forward})
    with pytest.raises(ValueError, match="must run once, got 1 states"):
        lab.features(random_ids(), [0, 1])


def small_tokenizer(*words: str) -> transformers.PreTrainedTokenizerFast:
    vocabulary = {word: number for number, word in enumerate(["<end>", *words])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<end>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<end>", chat_template="{{ messages }}"
    )


@pytest.fixture
def folder(tmp_path) -> Path:
    """A random Llama as `save_pretrained` writes it, without a tokenizer."""
    random_model("llama").save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize("size", ["20KB", "1GB"])
@pytest.mark.parametrize("family", FAMILIES)
def test_saved_model_is_the_same_target_again(family, size, tmp_path):
    first, ids = random_target(family), random_ids()
    first.model.save_pretrained(tmp_path, max_shard_size=size)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (size == "20KB")
    found = load_target(tmp_path, local_files_only=True)
    assert (found.name, found.tokenizer) == (str(tmp_path), None)
    assert not found.embed_weight.requires_grad and not found.model.training
    expected = first.features(ids, [-1, 1])
    torch.testing.assert_close(found.features(ids, [-1, 1]).context, expected.context)


def test_dtype_is_the_callers(folder):
    for dtype in TYPES:
        found = load_target(folder, dtype=dtype)
        assert {parameter.dtype for parameter in found.model.parameters()} == {dtype}
    with pytest.raises(ValueError, match="int8"):
        load_target(folder, dtype=torch.int8)


def test_tokenizer_comes_with_its_model(folder):
    small_tokenizer("one", "two", "three").save_pretrained(folder)
    assert load_target(str(folder)).tokenizer("two three one")["input_ids"] == [2, 3, 1]


@pytest.mark.parametrize("answer", [small_tokenizer(), OSError("not found"), ValueError("none")])
def test_hub_model_without_a_tokenizer_has_none(answer, monkeypatch):
    found = mock.Mock(side_effect=[answer])
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", found)
    assert target._tokenizer("owner/model", {}) is None


@pytest.mark.parametrize(
    ("file", "kept", "match"),
    [
        ("tokenizer.json", 0.99, "model: its tokenizer cannot be read: "),
        ("config.json", 0, "model/config.json must be a JSON file"),
        ("config.json", 0.5, "model/config.json must be a JSON file"),
        ("model.safetensors", 0.02, "damaged or cut off"),
        ("model.safetensors", 0.999, "damaged or cut off"),
    ],
)
def test_a_file_that_was_cut_off_is_said_to_be_broken(folder, file, kept, match):
    small_tokenizer("one", "two", "three").save_pretrained(folder)
    path = folder / file
    path.write_bytes(path.read_bytes()[: int(kept * path.stat().st_size)])
    with pytest.raises(ValueError, match=match):
        load_target(folder)


def test_checkpoints_below_are_named_and_what_is_missing_is_said(folder, tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match="checkpoints, load one of them: model$"):
        load_target(tmp_path)
    monkeypatch.chdir(tmp_path)
    for missing in (tmp_path / "no", str(tmp_path / "no"), "./no", "~/no/such/model", Path("a/b")):
        with pytest.raises(FileNotFoundError, match="there is no folder .* with a model"):
            load_target(missing)
    with pytest.raises(OSError):
        load_target("nobody/nothing", local_files_only=True)


def test_pickled_weights_are_refused_and_not_read_beside_safetensors(folder):
    (folder / "pytorch_model.bin").write_bytes(b"not even a pickle")
    load_target(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"\*\.safetensors, got none; pickled weights"):
        load_target(folder)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        (dict.fromkeys(["model.norm.weight", "lm_head.weight"]), r"missing: \['lm_head.*norm.w"),
        ({"model.norm.weight": torch.ones(31)}, r"other shapes .*: \['model.norm.weight'\]"),
    ],
)
def test_missing_and_misshapen_weights_are_named_instead_of_drawn(folder, changes, match):
    path = folder / "model.safetensors"
    weights = {k: v for k, v in (load_file(path) | changes).items() if v is not None}
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=match):
        load_target(folder)


def test_code_that_comes_with_a_model_is_never_run(folder, tmp_path):
    config = json.loads((folder / "config.json").read_text())
    auto = {"AutoConfig": "evil.EvilConfig", "AutoModelForCausalLM": "evil.EvilModel"}
    config |= {"model_type": "evil", "auto_map": auto}
    (folder / "config.json").write_text(json.dumps(config))
    ran = tmp_path / "ran"
    (folder / "evil.py").write_text(f"open({str(ran)!r}, 'w').close()\n")
    with pytest.raises(ValueError):
        load_target(folder)
    assert not ran.exists()


def test_only_the_target_imports_transformers():
    """Checkpoints reach neither it nor the hub."""
    code = "import sys; from dspark_lab.model import checkpoint, objective; print(*sys.modules)"
    root = Path(target.__file__).resolve().parents[2]
    loaded = subprocess.check_output([sys.executable, "-c", code], cwd=root, text=True).split()
    rooms = {"dspark_lab.model.objective", "dspark_lab.attention", "dspark_lab.chats.rows"}
    assert rooms | {"safetensors"} <= set(loaded)
    heavy = {"transformers", "tokenizers", "pandas", "matplotlib", "ipywidgets", "huggingface_hub"}
    assert not heavy & set(loaded)
