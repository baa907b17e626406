"""`dspark_lab.tuning.cost` and `shape`: against PyTorch's own counters, and by counting.

Operations are compared with `torch.utils.flop_counter` on the lab's own models; attention's pairs
with the dense mask, its tiles with the block mask, as means over every possible draw.

The counter knows matrix products and SDPA's CUDA kernels, but not the CPU's fused SDPA, `addmm_`,
or the custom operators (chunked objective, blockwise attention): formulas given here count these.
"""

import json
from dataclasses import replace
from itertools import combinations, product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count
from transformers import AutoConfig, AutoModelForCausalLM

from dspark_lab.attention import block_attention, training_block_mask, training_dense_mask
from dspark_lab.model import Drafter, DrafterConfig, objective, output_objective
from dspark_lab.tuning import TARGETS, Layers, Shape, cost, expected_work, training_cost
from tests.samples import slots_of, tiny_drafter, tiny_target

pytestmark = pytest.mark.usefixtures("one_thread")

KINDS = ["none", "vanilla", "gated", "rnn"]
PROJECTIONS = ["context projection", "attention projections", "MLP", "heads"]
BATCH, SEQ_LEN, ANCHORS, BLOCK = 2, 20, 6, 3
SIZES: dict[str, Any] = {"seq_len": SEQ_LEN, "num_anchors": ANCHORS, "block_size": BLOCK}
SIZES |= {"batch_size": BATCH, "features": "cached"}


def drafter_of(kind: str, confidence: bool = True) -> Drafter:
    return tiny_drafter(
        markov_head_type=kind,
        enable_confidence_head=confidence,
        confidence_head_with_markov=confidence and kind != "none",
    )


def step_of(drafter: Drafter, backend: str = "blockwise") -> tuple[Any, Any]:
    """Inputs and blocks of a training forward, all supervised."""
    torch.manual_seed(1)
    c = drafter.config
    inputs = (
        torch.randint(60, (BATCH, SEQ_LEN)),
        torch.randn(BATCH, SEQ_LEN, c.context_size),
        torch.ones(BATCH, SEQ_LEN, dtype=torch.bool),
        torch.randn(BATCH, SEQ_LEN, c.hidden_size),
    )
    anchors = torch.stack([torch.randperm(SEQ_LEN - BLOCK)[:ANCHORS].sort().values for _ in "ab"])
    keep = torch.ones_like(anchors, dtype=torch.bool)
    return inputs, {"anchor_positions": anchors, "block_keep_mask": keep, "backend": backend}


def counted(call: Any, **formulas: Any) -> float:
    """What PyTorch's counter finds, with formulas for more operators."""
    extra = {getattr(torch.ops.aten, name): formula for name, formula in formulas.items()}
    with FlopCounterMode(display=False, custom_mapping=extra) as counter:
        call()
    return counter.get_total_flops()


def line(table: Any, part: str) -> Any:
    return table.set_index("part").loc[part]


@pytest.mark.parametrize("name", sorted(TARGETS))
def test_a_preset_has_the_parameters_of_the_real_models(name):
    shape = TARGETS[name]
    layers = shape.target
    assert layers is not None
    config = AutoConfig.for_model(
        "qwen3" if layers.qk_norm else "llama",
        vocab_size=shape.vocab_size,
        hidden_size=layers.hidden_size,
        intermediate_size=layers.intermediate_size,
        num_hidden_layers=layers.count,
        num_attention_heads=layers.heads,
        num_key_value_heads=layers.kv_heads,
        head_dim=layers.head_dim,
        tie_word_embeddings=shape.tied,
    )
    with torch.device("meta"):
        target = AutoModelForCausalLM.from_config(config)
    assert shape.target_parameters == sum(p.numel() for p in target.parameters())
    # Read from its own file, the target has the same shape.
    read = Shape.of(config.to_dict())
    for size in ("vocab_size", "tied", "target_parameters"):
        assert getattr(read, size) == getattr(shape, size)


@pytest.mark.parametrize("name, billions", [("qwen3-4b", 4.0), ("qwen3-8b", 8.2)])
def test_a_published_target_is_as_large_as_its_name_says(name, billions):
    assert TARGETS[name].target_parameters / 1e9 == pytest.approx(billions, rel=0.01)


@pytest.mark.parametrize("confidence", [True, False])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bias", [True, False])
def test_the_trained_parameters_are_the_drafters(kind, confidence, bias):
    drafter = drafter_of(kind, confidence)
    config = DrafterConfig.from_dict(drafter.config.to_dict() | {"attention_bias": bias})
    shape = Shape.of(config)
    trained = [p.numel() for p in Drafter(config).parameters() if p.requires_grad]
    assert shape.sizes.trained_parameters == sum(trained)
    assert Shape.of(shape.drafter_config()) == shape


def test_a_shape_is_read_from_a_file_a_folder_or_its_content(tmp_path: Path):
    config = tiny_target().model.config.to_dict()
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config))
    shapes = [Shape.of(given) for given in (config, path, str(path), tmp_path)]
    shapes.append(Shape.of(tiny_drafter().config, target=config))
    assert len({(s.target, s.context_size) for s in shapes}) == 1
    assert shapes[0].target == Layers(3, 32, 48, 4, 2, 8, qk_norm=False)
    # Three layers of a target of three; context features of all but its last.
    assert shapes[0].drafter == Layers(3, 32, 48, 4, 2, 8)
    assert (shapes[0].context_layers, shapes[0].context_size) == (2, 64)
    path.write_text(json.dumps(config)[:-9])
    with pytest.raises(ValueError, match=f"{path} must be a JSON file"):
        Shape.of(tmp_path)


def test_the_numbers_of_a_model_of_text_and_images_lie_deeper():
    text = {"model_type": "gemma3_text", "hidden_size": 32, "intermediate_size": 64}
    text |= {"num_hidden_layers": 12, "num_attention_heads": 4, "num_key_value_heads": 2}
    text |= {"head_dim": 16, "sliding_window": 8, "sliding_window_pattern": 6, "vocab_size": 100}
    shape = Shape.of({"model_type": "gemma3", "text_config": text, "vision_config": {}})
    assert shape.target == Layers(12, 32, 64, 4, 2, 16, window=8, sliding=10)
    assert shape.tied
    kinds = ["sliding_attention"] * 7 + ["full_attention"] * 5
    shape = Shape.of({"text_config": text | {"layer_types": kinds}})
    assert shape.target is not None and shape.target.sliding == 7


def test_what_a_caller_says_changes_the_drafter_alone():
    sizes = {"num_hidden_layers": 2, "context_layers": 3, "block_size": 15, "markov_rank": 0}
    shape = Shape.of("qwen3-4b", **sizes, enable_confidence_head=False)
    assert (shape.drafter.count, shape.context_size, shape.block_size) == (2, 3 * 2560, 15)
    assert shape.markov_head_type == "none" and not shape.reads_markov
    assert shape.sizes.confidence_width == 0
    assert shape.target == TARGETS["qwen3-4b"].target


@pytest.mark.parametrize(
    "source, options, error, match",
    [
        ("qwen9", {}, ValueError, "must be one of .* or a config.json, got 'qwen9'"),
        ("none.json", {}, FileNotFoundError, "none.json"),
        (7, {}, TypeError, "source must be .*got 7"),
        ({"hidden_size": 8}, {}, ValueError, "config must hold num_attention_heads"),
        ({"num_experts": 8}, {}, ValueError, "layers must be dense, got num_experts=8"),
        ({"layer_types": ["mamba"]}, {}, ValueError, "attention alone, got .'mamba'."),
        ("qwen3-4b", {"markov_head_type": "x"}, ValueError, "markov_head_type must be one of"),
        ("qwen3-4b", {"target": "qwen3-8b"}, ValueError, "target goes with a drafter's"),
    ],
)
def test_what_is_no_shape_is_refused(source, options, error, match):
    with pytest.raises(error, match=match):
        Shape.of(source, **options)


@pytest.mark.parametrize("confidence", [True, False], ids=["confidence", "plain"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_drafters_products_are_those_that_pytorch_counts(kind, confidence):
    drafter = drafter_of(kind, confidence)
    table = training_cost(Shape.of(drafter.config), **SIZES)
    parts = table[table["part"].isin(PROJECTIONS)]
    inputs, blocks = step_of(drafter)
    kept: list[Any] = []
    # The blockwise attention is one operator that the counter does not know.
    forward = counted(lambda: kept.append(slots_of(drafter, *inputs, **blocks)))
    assert forward == parts["forward"].sum() == parts["tile_forward"].sum()
    slots = kept[0]
    ends = slots.hidden.sum() + (0 if slots.latent is None else slots.latent.sum())
    ends = ends + (0 if slots.confidence_pred is None else slots.confidence_pred.sum())
    assert counted(ends.backward) == parts["backward"].sum() == parts["tile_backward"].sum()


@pytest.mark.parametrize("kind", ["none", "vanilla"])
def test_the_textbook_objectives_products_are_those_that_pytorch_counts(kind):
    drafter = drafter_of(kind)
    cost_of_head = line(training_cost(Shape.of(drafter.config), **SIZES), "LM head")
    inputs, blocks = step_of(drafter)
    slots = slots_of(drafter, *inputs, **blocks)
    whole = counted(lambda: drafter(*inputs, **blocks))
    before = counted(lambda: slots_of(drafter, *inputs, **blocks))
    assert whole - before == cost_of_head["forward"]
    leaves = [x.detach().requires_grad_() for x in (slots.hidden, slots.latent) if x is not None]
    hidden, latent = leaves[0], leaves[1] if len(leaves) > 1 else None
    output = drafter.output(replace(slots, hidden=hidden, latent=latent, confidence_pred=None))
    loss = output_objective(output, confidence_weight=0).loss
    assert counted(loss.backward) == cost_of_head["backward"]


@pytest.mark.parametrize("kind", ["none", "vanilla"])
def test_the_chunked_objectives_products_are_those_inside_its_operator(kind):
    drafter = drafter_of(kind)
    inputs, blocks = step_of(drafter)
    slots = slots_of(drafter, *inputs, **blocks)
    head = drafter.lm_head.weight.detach()
    w2 = None if slots.latent is None else drafter.markov_w2_weight.detach()
    latent = None if slots.latent is None else slots.latent.detach().flatten(0, 2)
    hidden, last = slots.hidden.detach().flatten(0, 2), slots.target_hidden.flatten(0, 2)
    ids, counted_slots = slots.target_ids.flatten(), slots.eval_mask.flatten()
    assert counted_slots.all()
    weights = torch.full((len(ids),), 1 / len(ids))
    given = (hidden, latent, last, ids, counted_slots, weights)
    plain = (None, None, None, 1.0, None, 1.0)

    def addmm_(total, left, right, *_, out_shape=None, **options):
        return 2 * left[0] * left[1] * right[1]

    inside = counted(
        lambda: objective._chunked._init_fn(*given, head, w2, *plain, 0.1, 0.9, 10, True, False),
        addmm_=addmm_,
    )
    part = line(training_cost(Shape.of(drafter.config), **SIZES), "LM head")
    assert inside == part["forward"] + part["backward"]


def test_a_cpu_computes_the_logits_of_supervised_slots_alone():
    shape = Shape.of(tiny_drafter().config)
    whole = line(training_cost(shape, **SIZES), "LM head")
    half = line(training_cost(shape, **SIZES, supervised=0.5, device="cpu"), "LM head")
    assert half["operations"] == whole["operations"] / 2
    on_gpu = line(training_cost(shape, **SIZES, supervised=0.5), "LM head")
    assert on_gpu["operations"] == whole["operations"]
    few = line(training_cost(shape, **SIZES, vocabulary=16), "LM head")
    assert few["operations"] == whole["operations"] / 4


def test_attention_is_what_pytorch_counts_for_the_pairs_that_the_mask_shows():
    drafter = tiny_drafter()
    c = drafter.config
    _, blocks = step_of(drafter, "dense")
    part = line(training_cost(Shape.of(c), **SIZES), "attention")
    q, k, v = (
        torch.randn(BATCH, heads, length, c.head_dim, requires_grad=True)
        for heads, length in (
            (c.num_attention_heads, ANCHORS * BLOCK),
            *((c.num_key_value_heads, SEQ_LEN + ANCHORS * BLOCK),) * 2,
        )
    )

    def flash(q, k, v, *_, out_shape=None, **options):
        return sdpa_flop_count(q, k, v)

    def flash_backward(d_out, q, k, v, *_, out_shape=None, **options):
        return sdpa_backward_flop_count(d_out, q, k, v)

    kept: list[Any] = []
    sizes = {"seq_len": SEQ_LEN, "block_size": BLOCK, **blocks}
    name = "_scaled_dot_product_flash_attention_for_cpu"
    forward = counted(lambda: kept.append(block_attention(q, k, v, **sizes)), **{name: flash})
    backward = counted(kept[0].sum().backward, **{f"{name}_backward": flash_backward})
    # The counter takes every slot to see every key.
    dense = BATCH * ANCHORS * BLOCK * (SEQ_LEN + ANCHORS * BLOCK)
    work, layers = expected_work(SEQ_LEN, ANCHORS, BLOCK, BATCH), c.num_hidden_layers
    assert part["forward"] == pytest.approx(layers * forward * work.pairs / dense, rel=1e-12)
    assert part["backward"] == pytest.approx(layers * backward * work.pairs / dense, rel=1e-12)
    assert part["tile_backward"] == pytest.approx(layers * backward * work.tiled / dense)


# Tokens, anchors, slots.
DRAWN = [(1, 2, 3), (2, 1, 1), (9, 1, 3), (9, 3, 1), (10, 2, 5), (11, 4, 3), (8, 9, 3), (12, 3, 4)]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("window", [None, 2, 4, 7])
@pytest.mark.parametrize("seq_len, num_anchors, block_size", DRAWN)
def test_the_expected_work_is_the_mean_over_every_draw(
    monkeypatch: pytest.MonkeyPatch, seq_len, num_anchors, block_size, window, causal
):
    """Tiles under a window: at most the mean over every draw of those from first to last."""
    monkeypatch.setattr(cost, "TILE", 4)
    kept = min(num_anchors, seq_len - 1)
    draws = []
    for chosen in combinations(range(seq_len - 1), kept):
        anchors = torch.tensor([[*chosen, *(0,) * (num_anchors - kept)]])
        keep = torch.arange(num_anchors).unsqueeze(0) < kept
        sizes: dict[str, Any] = {"seq_len": seq_len, "block_size": block_size}
        sizes |= {"window": window, "causal": causal}
        mask = training_block_mask(anchors, keep, tile_size=4, **sizes)
        tiles = int(mask.kv_num_blocks.sum() + mask.full_kv_num_blocks.sum())
        draws.append((int(training_dense_mask(anchors, keep, **sizes).sum()), 16 * tiles))
    pairs, tiled = np.mean(draws, axis=0)
    work = expected_work(seq_len, num_anchors, block_size, 3, window, causal)
    assert work.pairs == pytest.approx(3 * pairs, rel=1e-12)
    if window is None:
        assert work.tiled == pytest.approx(3 * tiled, rel=1e-12)
    else:
        assert 3 * tiled * (1 - 1e-12) <= work.tiled <= 3 * tiled * 1.6


def test_tiles_under_a_window_are_exact_where_anchors_stand_close():
    anchors = torch.arange(1023)[None]
    keep = torch.ones_like(anchors, dtype=torch.bool)
    mask = training_block_mask(anchors, keep, seq_len=1024, block_size=7, window=300)
    tiles = int(mask.kv_num_blocks.sum() + mask.full_kv_num_blocks.sum())
    work = expected_work(1024, 1023, 7, 1, 300)
    assert work.tiled == pytest.approx(tiles * 128**2, rel=1e-9)


def test_a_drafters_layers_cost_what_they_see_and_given_anchors_have_no_logits():
    """Each layer by its own view; slot 0 of a given anchor goes through the layers alone."""
    window = {"layer_types": ("sliding_attention", "full_attention"), "sliding_window": 4}
    shape = Shape.of(tiny_drafter(sample_from_anchor=False, **window).config)
    found = line(training_cost(shape, **SIZES), "attention")["forward"]
    full = expected_work(SEQ_LEN, ANCHORS, BLOCK, BATCH)
    seen = expected_work(SEQ_LEN, ANCHORS, BLOCK, BATCH, 4, True)
    assert found == pytest.approx(4 * 4 * 8 * (full.pairs + seen.pairs), rel=1e-12)
    plain = Shape.of(tiny_drafter().config)
    for part, share in (("LM head", 2 / 3), ("heads", 2 / 3), ("MLP", 1.0)):
        of_all, of_given = (line(training_cost(s, **SIZES), part) for s in (plain, shape))
        assert of_given["forward"] == pytest.approx(share * of_all["forward"], rel=1e-12)


def test_a_reduced_vocabulary_halves_the_drafters_part_of_the_head():
    whole, half = (
        line(
            training_cost(Shape.of(tiny_drafter(draft_vocab_size=size).config), **SIZES), "LM head"
        )
        for size in (None, 32)
    )
    slots = BATCH * ANCHORS * BLOCK
    assert whole["forward"] - half["forward"] == 2 * slots * 32 * (32 + 8)
    assert half["backward"] == whole["backward"] / 2


def test_large_draws_lose_no_precision():
    # With every candidate drawn nothing is left to chance: anchors are 0, 1, ... 1022.
    anchors = torch.arange(1023)[None]
    keep = torch.ones_like(anchors, dtype=torch.bool)
    mask = training_block_mask(anchors, keep, seq_len=1024, block_size=7)
    work = expected_work(1024, 1023, 7)
    assert work.pairs == 7 * (1022 * 1023 / 2) + 1023 * 7 * 7
    tiles = int(mask.kv_num_blocks.sum() + mask.full_kv_num_blocks.sum())
    assert work.tiled == pytest.approx(tiles * 128**2, rel=1e-9)


def test_the_targets_forward_is_what_pytorch_counts_with_causal_attention():
    target = tiny_target()
    shape = Shape.of(tiny_drafter().config, target=target.model.config.to_dict())
    ids = torch.randint(60, (BATCH, SEQ_LEN))
    with sdpa_kernel(SDPBackend.MATH):
        found = counted(lambda: target.features(ids, (0, 1)))
    table = training_cost(shape, **(SIZES | {"features": "live"}))
    # The counter takes every token to see every other one.
    hidden = BATCH * SEQ_LEN * (SEQ_LEN - 1) / 2
    assert line(table, "target forward")["forward"] == found - 4 * 32 * 3 * hidden


@pytest.mark.parametrize("window, sliding", [(1, 4), (5, 2), (30, 3), (None, 0)])
def test_a_window_hides_what_lies_before_it(window, sliding):
    layers = Layers(4, 16, 16, 2, 1, 8, window=window, sliding=sliding)
    pairs = 0
    for layer, token in product(range(4), range(SEQ_LEN)):
        first = max(0, token - window + 1) if layer < sliding else 0
        pairs += token + 1 - first
    shape = Shape("x", 32, layers, layers, 1, 16)
    products = 2 * SEQ_LEN * 4 * (layers.attention_weights + layers.mlp_weights)
    table = training_cost(shape, seq_len=SEQ_LEN, num_anchors=2)
    assert line(table, "target forward")["forward"] == products + 4 * 16 * pairs


def test_the_optimiser_and_the_softmaxes_are_said_not_to_be_counted():
    table = training_cost(Shape.of("pocket"))
    assert table[~table["counted"]]["part"].tolist() == ["objective", "optimiser"]
    assert (table.drop(columns=["part"]) >= 0).all(axis=None)
    whole = table["tile_forward"] + table["tile_backward"]
    assert table["operations"].to_numpy() == pytest.approx(whole.to_numpy())
    # Attention by tiles is more than by pairs, and nothing else differs.
    other = table["part"] != "attention"
    assert (table["tile_forward"] == table["forward"])[other].all()
    assert line(table, "attention")["tile_forward"] > line(table, "attention")["forward"]


def test_every_operand_of_a_product_crosses_memory_once():
    shape = Shape.of(tiny_drafter().config)
    table = training_cost(shape, dtype="bf16", **SIZES)
    slots, tokens = BATCH * ANCHORS * BLOCK, BATCH * SEQ_LEN

    def trained(rows: int, inputs: int, outputs: int, products: int = 3) -> int:
        x, w, y = rows * inputs, inputs * outputs, rows * outputs
        forward, of_weight, of_input = 2 * (x + w + y), 2 * (x + y) + 4 * w, 2 * (x + w + y)
        return forward + of_weight + (of_input if products == 3 else 0)

    mlp = trained(slots, 32, 2 * 48) + trained(slots, 48, 32)
    assert line(table, "MLP")["bytes_moved"] == 2 * mlp
    expected = trained(tokens, 64, 32, products=2)
    assert line(table, "context projection")["bytes_moved"] == expected
