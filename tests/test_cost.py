"""`dspark_lab.tuning.cost`, `memory` and `shape`: against PyTorch's own counters, and by counting.

Operations are compared with `torch.utils.flop_counter` on the lab's own models; attention's pairs
with the dense mask, its tiles with the block mask, their expectations with every possible draw; the
predicted peak with what a real training step allocated.

The counter knows matrix products and SDPA's CUDA kernels. It does not see into custom operators, as
the chunked objective and the blockwise attention are, nor know the CPU's fused SDPA, nor a product
that adds in place (`addmm_`). These are counted here by looking inside with the missing formulas.
"""

import json
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import (
    FlopCounterMode,
    sdpa_backward_flop_count,
    sdpa_flop_count,
)
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.cost import measured_peak
from dspark_lab.attention import block_attention, training_block_mask, training_dense_mask
from dspark_lab.common import context_doc_ids
from dspark_lab.model import (
    Drafter,
    DrafterConfig,
    MarkovKind,
    dspark_objective,
    objective,
    output_objective,
)
from dspark_lab.tuning import (
    CARDS,
    TARGETS,
    Layers,
    Shape,
    Step,
    anchored_work,
    card_table,
    cost,
    drafting_cost,
    expected_work,
    fit_table,
    kept_bytes,
    logit_bytes,
    memory_table,
    training_cost,
    training_memory,
    verify_cost,
)
from tests.samples import slots_of, tiny_drafter, tiny_target

pytestmark = pytest.mark.usefixtures("one_thread")

KINDS = ["none", "vanilla", "gated", "rnn"]
PROJECTIONS = ["context projection", "attention projections", "MLP", "heads"]
BATCH, SEQ_LEN, ANCHORS, BLOCK = 2, 20, 6, 3
SIZES: dict[str, Any] = {
    "seq_len": SEQ_LEN,
    "num_anchors": ANCHORS,
    "block_size": BLOCK,
    "batch_size": BATCH,
    "features": "cached",
}


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
    blocks = {
        "anchor_positions": anchors,
        "block_keep_mask": torch.ones_like(anchors, dtype=torch.bool),
        "backend": backend,
    }
    return inputs, blocks


def counted(call: Any, **formulas: Any) -> float:
    """What PyTorch's counter finds, with formulas for more operators."""
    extra = {getattr(torch.ops.aten, name): formula for name, formula in formulas.items()}
    with FlopCounterMode(display=False, custom_mapping=extra) as counter:
        call()
    return counter.get_total_flops()


def line(table: Any, part: str) -> Any:
    return table.set_index("part").loc[part]


# Shapes


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
        drafter = Drafter(shape.drafter_config())
    assert shape.target_parameters == sum(p.numel() for p in target.parameters())
    trained = [p.numel() for p in drafter.parameters() if p.requires_grad]
    assert shape.trained_parameters == sum(trained)
    # Read from its own file, the target has the same shape.
    read = Shape.of(config.to_dict())
    assert (read.vocab_size, read.tied, read.target_parameters) == (
        shape.vocab_size,
        shape.tied,
        shape.target_parameters,
    )


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
    assert shape.trained_parameters == sum(trained)
    again = Shape.of(shape.drafter_config())
    assert again == shape


def test_a_shape_is_read_from_a_file_a_folder_or_its_content(tmp_path: Path):
    config = tiny_target().model.config.to_dict()
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config))
    shapes = [Shape.of(given) for given in (config, path, str(path), tmp_path)]
    assert len({(s.drafter, s.target, s.context_size) for s in shapes}) == 1
    assert shapes[0].target == Layers(3, 32, 48, 4, 2, 8, qk_norm=False)
    # Three layers of a target of three; context features of all but its last.
    assert shapes[0].drafter == Layers(3, 32, 48, 4, 2, 8)
    assert (shapes[0].context_layers, shapes[0].context_size) == (2, 64)


def test_the_numbers_of_a_model_of_text_and_images_lie_deeper():
    text = {
        "model_type": "gemma3_text",
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 12,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "sliding_window": 8,
        "sliding_window_pattern": 6,
        "vocab_size": 100,
    }
    shape = Shape.of({"model_type": "gemma3", "text_config": text, "vision_config": {}})
    assert shape.target == Layers(12, 32, 64, 4, 2, 16, window=8, sliding=10)
    assert shape.tied
    kinds = ["sliding_attention"] * 7 + ["full_attention"] * 5
    shape = Shape.of({"text_config": text | {"layer_types": kinds}})
    assert shape.target is not None and shape.target.sliding == 7


def test_what_a_caller_says_changes_the_drafter_alone():
    shape = Shape.of(
        "qwen3-4b",
        num_hidden_layers=2,
        context_layers=3,
        block_size=15,
        markov_rank=0,
        enable_confidence_head=False,
    )
    assert (shape.drafter.count, shape.context_size, shape.block_size) == (2, 3 * 2560, 15)
    assert (shape.markov_head_type, shape.reads_markov, shape.confidence_width) == ("none", 0, 0)
    assert shape.target == TARGETS["qwen3-4b"].target
    with_target = Shape.of(tiny_drafter().config, target=tiny_target().model.config.to_dict())
    assert with_target.target == Layers(3, 32, 48, 4, 2, 8, qk_norm=False)


@pytest.mark.parametrize(
    "source, options, error, match",
    [
        ("qwen9", {}, ValueError, "must be one of .* or a config.json, got 'qwen9'"),
        ("none.json", {}, FileNotFoundError, "none.json"),
        (7, {}, TypeError, "got int"),
        ({"hidden_size": 8}, {}, ValueError, "config must hold num_attention_heads"),
        ({"num_experts": 8}, {}, ValueError, "layers must be dense, got num_experts=8"),
        ({"layer_types": ["mamba"]}, {}, ValueError, "attention alone, got .'mamba'."),
        ("qwen3-4b", {"num_hidden_layers": 0}, ValueError, "num_hidden_layers must be >= 1"),
        ("qwen3-4b", {"markov_head_type": "x"}, ValueError, "markov_head_type must be one of"),
        ("qwen3-4b", {"target": "qwen3-8b"}, ValueError, "target goes with a drafter's"),
    ],
)
def test_what_is_no_shape_is_refused(source, options, error, match):
    with pytest.raises(error, match=match):
        Shape.of(source, **options)


# Operations of a training step


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
    kept: list[Any] = []
    whole = counted(lambda: kept.append(drafter(*inputs, **blocks)))
    before = counted(lambda: slots_of(drafter, *inputs, **blocks))
    assert whole - before == cost_of_head["forward"]
    leaves = [x.detach().requires_grad_() for x in (slots.hidden, slots.latent) if x is not None]
    hidden, latent = leaves[0], leaves[1] if len(leaves) > 1 else None
    output = kept[0]
    output.draft_logits = drafter.logits(hidden, latent)
    output.confidence_pred = None
    loss = output_objective(output, confidence_weight=0).loss
    assert counted(loss.backward) == cost_of_head["backward"]


@pytest.mark.parametrize("kind", ["none", "vanilla"])
def test_the_chunked_objectives_products_are_those_inside_its_operator(kind):
    drafter = drafter_of(kind)
    inputs, blocks = step_of(drafter)
    slots = slots_of(drafter, *inputs, **blocks)
    head = drafter.lm_head.weight.detach()
    w2 = None if slots.latent is None else drafter.markov_w2_weight.detach()
    count = slots.eval_mask.numel()
    given = (
        slots.hidden.detach().flatten(0, 2),
        None if slots.latent is None else slots.latent.detach().flatten(0, 2),
        slots.target_hidden.flatten(0, 2),
        slots.target_ids.flatten(),
        slots.eval_mask.flatten(),
        torch.full((count,), 1 / count),
    )
    assert slots.eval_mask.all()

    def addmm_(total, left, right, *_, out_shape=None, **options):
        return 2 * left[0] * left[1] * right[1]

    inside = counted(
        lambda: objective._chunked._init_fn(*given, head, w2, 0.1, 0.9, 10, True, False),
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


def flash_forward(q, k, v, *_, out_shape=None, **options):
    return sdpa_flop_count(q, k, v)


def flash_backward(d_out, q, k, v, *_, out_shape=None, **options):
    return sdpa_backward_flop_count(d_out, q, k, v)


def test_attention_is_what_pytorch_counts_for_the_pairs_that_the_mask_shows():
    drafter = tiny_drafter()
    c = drafter.config
    inputs, blocks = step_of(drafter, "dense")
    work = anchored_work(
        blocks["anchor_positions"].numpy(), seq_len=SEQ_LEN, block_size=c.block_size
    )
    part = line(training_cost(Shape.of(c), work=work, **SIZES), "attention")
    q, k, v = (
        torch.randn(BATCH, heads, length, c.head_dim, requires_grad=True)
        for heads, length in (
            (c.num_attention_heads, ANCHORS * BLOCK),
            *((c.num_key_value_heads, SEQ_LEN + ANCHORS * BLOCK),) * 2,
        )
    )
    kept: list[Any] = []
    sizes = {"seq_len": SEQ_LEN, "block_size": BLOCK, **blocks}
    name = "_scaled_dot_product_flash_attention_for_cpu"
    forward = counted(
        lambda: kept.append(block_attention(q, k, v, **sizes)), **{name: flash_forward}
    )
    backward = counted(kept[0].sum().backward, **{f"{name}_backward": flash_backward})
    dense = BATCH * ANCHORS * BLOCK * (SEQ_LEN + ANCHORS * BLOCK)
    assert work.dense == dense
    layers = c.num_hidden_layers
    assert part["forward"] == pytest.approx(layers * forward * work.pairs / dense, rel=1e-12)
    assert part["backward"] == pytest.approx(layers * backward * work.pairs / dense, rel=1e-12)
    assert part["tile_backward"] == pytest.approx(layers * backward * work.tiled / dense)


def test_attention_of_each_block_to_just_what_it_sees_has_as_many_operations():
    drafter = tiny_drafter()
    c = drafter.config
    _, blocks = step_of(drafter)
    total = 0.0
    with sdpa_kernel(SDPBackend.MATH):
        for anchor in blocks["anchor_positions"].flatten().tolist():
            q = torch.randn(1, c.num_attention_heads, BLOCK, c.head_dim)
            k = torch.randn(1, c.num_attention_heads, anchor + BLOCK, c.head_dim)
            total += counted(
                lambda q=q, k=k: torch.nn.functional.scaled_dot_product_attention(q, k, k)
            )
    work = anchored_work(blocks["anchor_positions"].numpy(), seq_len=SEQ_LEN, block_size=BLOCK)
    part = line(training_cost(Shape.of(c), work=work, **SIZES), "attention")
    assert part["forward"] == c.num_hidden_layers * total


@st.composite
def rows_of_blocks(draw: Any) -> dict[str, Any]:
    seq_len = draw(st.integers(2, 400))
    anchors = draw(st.integers(1, 40))
    batch = draw(st.integers(1, 2))
    seed = draw(st.integers(0, 2**20))
    rng = np.random.default_rng(seed)
    cuts = np.sort(rng.integers(0, seq_len + 1, (batch, draw(st.integers(0, 3)))), axis=1)
    edges = np.concatenate([np.zeros((batch, 1), int), cuts, np.full((batch, 1), seq_len)], axis=1)
    return {
        "seq_len": seq_len,
        "block_size": draw(st.integers(1, 20)),
        "anchors": rng.integers(0, seq_len, (batch, anchors)),
        "keep": rng.random((batch, anchors)) < 0.8,
        "seq_lens": np.diff(edges, axis=1),
    }


@given(rows_of_blocks())
@settings(max_examples=60)
def test_pairs_are_those_of_the_dense_mask_and_tiles_those_of_the_block_mask(row):
    anchors, keep = torch.tensor(row["anchors"]), torch.tensor(row["keep"])
    docs = context_doc_ids(torch.tensor(row["seq_lens"]), row["seq_len"], "cpu")
    starts = torch.searchsorted(docs, docs.gather(1, anchors)).numpy()
    sizes = {"seq_len": row["seq_len"], "block_size": row["block_size"]}
    work = anchored_work(row["anchors"], row["keep"], doc_starts=starts, **sizes)
    dense = training_dense_mask(anchors, keep, doc_ids=docs, **sizes)
    assert (work.pairs, work.dense) == (int(dense.sum()), dense.numel())
    mask = training_block_mask(anchors, keep, doc_ids=docs, **sizes)
    tiles = int(mask.kv_num_blocks.sum() + mask.full_kv_num_blocks.sum())
    assert work.tiled == tiles * 128 * 128


@pytest.mark.parametrize(
    "seq_len, num_anchors, block_size",
    [
        (2, 1, 1),
        (9, 1, 3),
        (9, 3, 1),
        (10, 2, 5),
        (11, 4, 3),
        (8, 7, 2),
        (8, 9, 3),
        (12, 3, 4),
        (7, 2, 2),
        (11, 1, 3),
    ],
)
def test_the_expected_work_is_the_mean_over_every_draw(
    monkeypatch: pytest.MonkeyPatch, seq_len, num_anchors, block_size
):
    monkeypatch.setattr(cost, "TILE", 4)
    kept = min(num_anchors, seq_len - 1)
    draws = []
    for chosen in combinations(range(seq_len - 1), kept):
        anchors = torch.tensor([[*chosen, *(0,) * (num_anchors - kept)]])
        keep = torch.arange(num_anchors).unsqueeze(0) < kept
        sizes = {"seq_len": seq_len, "block_size": block_size}
        mask = training_block_mask(anchors, keep, tile_size=4, **sizes)
        tiles = int(mask.kv_num_blocks.sum() + mask.full_kv_num_blocks.sum())
        draws.append((int(training_dense_mask(anchors, keep, **sizes).sum()), 16 * tiles))
    pairs, tiled = np.mean(draws, axis=0)
    work = expected_work(seq_len, num_anchors, block_size, batch_size=3)
    assert work.pairs == pytest.approx(3 * pairs, rel=1e-12)
    assert work.tiled == pytest.approx(3 * tiled, rel=1e-12)


def test_a_row_of_one_token_has_blocks_that_see_themselves_alone():
    work = expected_work(1, 2, 3)
    assert (work.pairs, work.dense) == (18, 6 * 7)
    assert work.tiled == 128**2


def test_large_draws_lose_no_precision():
    # With every candidate drawn nothing is left to chance: anchors are 0, 1, ... 8190.
    work = expected_work(8192, 8191, 7)
    exact = anchored_work(np.arange(8191)[None], seq_len=8192, block_size=7)
    assert work.pairs == exact.pairs
    assert work.tiled == pytest.approx(exact.tiled, rel=1e-9)


@pytest.mark.parametrize(
    "given, match",
    [
        ({"anchor_positions": np.zeros(3, int)}, "whole numbers, .batch, anchor., got int64 of"),
        ({"anchor_positions": np.zeros((1, 3))}, "got float64"),
        ({"block_keep_mask": np.ones((1, 2), bool)}, r"block_keep_mask must be .* = \(1, 3\)"),
        ({"doc_starts": np.zeros((2, 3), int)}, r"got shape \(2, 3\)"),
        ({"block_size": 0}, "block_size must be >= 1"),
    ],
)
def test_blocks_that_do_not_fit_are_refused(given, match):
    blocks = {"anchor_positions": np.zeros((1, 3), int), "seq_len": 5, "block_size": 2}
    with pytest.raises(ValueError, match=match):
        anchored_work(**(blocks | given))


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


# Steps of decoding


@pytest.mark.parametrize("confidence", [True, False], ids=["confidence", "plain"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_drafting_step_is_what_pytorch_counts(kind, confidence):
    drafter = drafter_of(kind, confidence).eval()
    c, batch, context, new = drafter.config, 2, 9, 4
    cache = drafter.start_cache(batch)
    drafter.read(torch.randn(batch, context - new, c.context_size), cache, [context - new] * batch)

    def draft() -> None:
        drafter.read(torch.randn(batch, new, c.context_size), cache, [new] * batch)
        previous = torch.ones(batch, dtype=torch.long)
        states = drafter.draft(previous, cache)
        state, embeddings = None, []
        for hidden, logits in zip(states.unbind(1), drafter.lm_head(states).unbind(1), strict=True):
            if drafter.markov_head is not None:
                embeddings.append(drafter.markov_head.embed(previous))
                state, latent = drafter.markov_head.step(state, embeddings[-1], hidden)
                logits = logits + drafter.markov_head.markov_w2(latent)
            previous = logits.argmax(-1)
        drafter.confidence(states, torch.stack(embeddings, 1) if embeddings else None)

    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        found = counted(draft)
    table = drafting_cost(
        Shape.of(c), context_length=context, batch_size=batch, new_tokens=new, dtype="fp32"
    )
    assert table["operations"].sum() == found
    matrices = [p.numel() for p in drafter.parameters() if p.dim() == 2]
    held = 4 * (sum(matrices) - drafter.embed_tokens.weight.numel())
    cached = [x.numel() for pair in cache.states for x in pair]
    own = batch * c.block_size * sum(x.numel() for pair in cache.states for x in pair)
    own //= batch * context
    assert table["bytes_held"].sum() == held + 4 * (sum(cached) + own)


@pytest.mark.parametrize("tokens", [1, 4])
def test_a_verification_is_what_pytorch_counts(tokens):
    target, batch, context = tiny_target(), 2, 7
    cache = target.start_cache(batch)
    target.advance(torch.ones(batch, context, dtype=torch.long), cache, [])
    cache.commit([context] * batch)

    def verify() -> None:
        ids = torch.ones(batch, tokens, dtype=torch.long)
        states = target.advance(ids, cache, []).last
        torch.nn.functional.linear(states, target.head_weight)

    with sdpa_kernel(SDPBackend.MATH):
        found = counted(verify)
    shape = Shape.of(tiny_drafter().config, target=target.model.config.to_dict())
    table = verify_cost(
        shape, context_length=context, tokens=tokens, batch_size=batch, dtype="fp32"
    )
    hidden = batch * tokens * (tokens - 1) / 2
    assert table["operations"].sum() == found - 4 * 32 * 3 * hidden
    weights = sum(p.numel() for p in target.model.parameters() if p.dim() == 2)
    kept = 3 * 2 * 16 * batch * (context + tokens)
    # Its embedding is not read, but for a row.
    assert table["bytes_held"].sum() == 4 * (weights - 64 * 32 + kept)


@given(st.integers(0, 30), st.integers(1, 12), st.integers(1, 20), st.integers(0, 4))
@settings(max_examples=40)
def test_a_window_hides_what_lies_before_it(context, tokens, window, sliding):
    layers = Layers(4, 16, 16, 2, 1, 8, window=window, sliding=sliding)
    shape = Shape("x", 32, layers, layers, 1, 16)
    table = verify_cost(shape, context_length=context, tokens=tokens)
    pairs, keys = 0, 0
    for layer in range(4):
        seen = set()
        for token in range(context, context + tokens):
            first = max(0, token - window + 1) if layer < sliding else 0
            pairs += token + 1 - first
            seen |= set(range(first, token + 1))
        keys += len(seen)
    assert line(table, "attention")["operations"] == pytest.approx(4 * 16 * pairs)
    assert line(table, "attention")["bytes_held"] == pytest.approx(2 * 2 * 8 * keys)


def test_a_verification_needs_a_target():
    with pytest.raises(ValueError, match="verification needs the target's shape"):
        verify_cost(Shape.of(tiny_drafter().config), context_length=3, tokens=2)
    with pytest.raises(ValueError, match="dtype must be one of .*, got 'int8'"):
        drafting_cost(Shape.of("pocket"), context_length=3, dtype="int8")  # type: ignore[arg-type]


# Memory

SMALL = Layers(2, 256, 704, 4, 2, 64)


def a_shape(
    vocab_size: int = 2048,
    layers: Layers = SMALL,
    rank: int = 64,
    kind: MarkovKind = "vanilla",
    context: int = 3,
    confidence: bool = True,
) -> Shape:
    return Shape(
        "test",
        vocab_size,
        layers,
        None,
        context,
        context * layers.hidden_size,
        markov_rank=rank,
        markov_head_type=kind,
        enable_confidence_head=confidence,
    )


THIN = Layers(2, 128, 384, 4, 1, 32)
MEASURED = {
    "usual": (a_shape(), (256, 16, 7, 1)),
    "one layer": (a_shape(layers=Layers(1, 256, 704, 4, 2, 64)), (256, 16, 7, 1)),
    "four rows": (a_shape(), (128, 16, 7, 4)),
    "long row, few blocks": (a_shape(), (1024, 8, 7, 1)),
    "long blocks": (a_shape(), (128, 24, 15, 1)),
    "next to no slots": (a_shape(), (128, 2, 1, 1)),
    "four layers": (a_shape(layers=Layers(4, 128, 256, 4, 4, 32)), (256, 48, 4, 1)),
    "gated": (a_shape(kind="gated"), (256, 24, 7, 1)),
    "rnn": (a_shape(kind="rnn"), (256, 24, 7, 1)),
    "no Markov head": (a_shape(kind="none"), (256, 24, 7, 1)),
    "no confidence head": (a_shape(confidence=False), (256, 24, 7, 1)),
    "large vocabulary": (a_shape(16384, THIN, context=5), (256, 24, 7, 1)),
    "large vocabulary, high rank": (a_shape(16384, THIN, 256), (128, 4, 7, 1)),
    "high rank, no confidence head": (a_shape(16384, THIN, 256, confidence=False), (128, 4, 7, 1)),
    "two chunks": (a_shape(49152, Layers(1, 64, 128, 2, 2, 32), 16), (128, 40, 7, 1)),
    "one chunk or two": (a_shape(49152, Layers(1, 64, 128, 2, 2, 32), 16), (128, 28, 7, 1)),
    "small and deep": (a_shape(4096, Layers(5, 64, 128, 2, 2, 32), 16), (256, 64, 7, 1)),
}


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("name", MEASURED)
def test_the_predicted_peak_is_the_measured_one(name, dtype):
    shape, (seq_len, anchors, block, batch) = MEASURED[name]
    sizes: dict[str, Any] = {
        "seq_len": seq_len,
        "num_anchors": anchors,
        "block_size": block,
        "batch_size": batch,
        "dtype": dtype,
    }
    always, of_step = measured_peak(shape, **sizes)
    table = memory_table(shape, features="cached", device="cpu", **sizes)
    predicted = training_memory(shape, features="cached", device="cpu", **sizes)
    assert table["held"].sum() == pytest.approx(predicted, abs=len(table))
    assert predicted == pytest.approx(always + of_step, rel=0.05)
    # Weights and optimiser are known to the byte, so the step alone says more.
    assert table["held"][:4].sum() == pytest.approx(always, abs=512)
    assert table["held"][4:].sum() == pytest.approx(of_step, rel=0.08)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_forward_pass_keeps_the_bytes_that_autograd_saves(kind, dtype):
    shape = a_shape(layers=Layers(2, 64, 192, 4, 2, 32), rank=16, kind=kind)
    torch.manual_seed(0)
    drafter = Drafter(shape.drafter_config(num_anchors=30))
    own = {p.untyped_storage().data_ptr() for p in drafter.parameters()}
    saved: dict[int, torch.Tensor] = {}

    def note(x: torch.Tensor) -> torch.Tensor:
        saved.setdefault(x.untyped_storage().data_ptr(), x)
        return x

    ids = torch.randint(60, (2, 100))
    context, last = (
        torch.randn(2, 100, size, dtype=torch.bfloat16) for size in (shape.context_size, 64)
    )
    with (
        torch.autograd.graph.saved_tensors_hooks(note, lambda x: x),
        torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bf16"),
    ):
        kept = [slots_of(drafter, ids, context, torch.ones(2, 100, dtype=torch.bool), last)]
    assert kept
    found = sum(x.untyped_storage().nbytes() for ptr, x in saved.items() if ptr not in own)
    step = Step(100, 30, shape.block_size, 2, dtype=dtype, features="cached", device="cpu")
    copies = 0
    if dtype == "bf16":
        matrices = [drafter.fc.weight, *(p for p in drafter.layers.parameters() if p.dim() == 2)]
        copies = 2 * (sum(p.numel() for p in matrices) + shape.latent_weights)
    assert sum(kept_bytes(shape, step).values()) + copies == pytest.approx(found, rel=0.01)


@pytest.mark.parametrize("target_dtype", ["fp32", "bf16"])
def test_the_predicted_peak_with_a_target_that_answers_is_the_measured_one(target_dtype):
    layers = Layers(3, 128, 512, 4, 2, 32, qk_norm=False)
    shape = Shape("x", 1024, THIN, layers, 2, 256, markov_rank=32, tied=True)
    for anchors, moment in ((1, "the target reads"), (32, "objective")):
        sizes: dict[str, Any] = {
            "seq_len": 512,
            "num_anchors": anchors,
            "block_size": 3,
            "dtype": "fp32",
            "target_dtype": target_dtype,
        }
        always, of_step = measured_peak(shape, **sizes)
        table = memory_table(shape, device="cpu", **sizes)
        assert table["held"][:4].sum() == pytest.approx(always, abs=2048)
        assert table["held"][4:].sum() == pytest.approx(of_step, rel=0.1)
        if target_dtype == "fp32":
            assert set(table["moment"]) == {moment}


def test_the_predicted_peak_of_few_tokens_softmaxes_is_the_measured_one():
    shape = a_shape(8192, THIN)
    sizes: dict[str, Any] = {"seq_len": 128, "num_anchors": 16, "block_size": 7, "dtype": "fp32"}
    always, of_step = measured_peak(shape, seen=128, **sizes)
    predicted = training_memory(shape, features="cached", device="cpu", vocabulary=128, **sizes)
    assert predicted == pytest.approx(always + of_step, rel=0.05)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_predicted_peak_of_full_logits_is_the_measured_one(dtype):
    shape = a_shape(8192, THIN)
    sizes: dict[str, Any] = {"seq_len": 128, "num_anchors": 16, "block_size": 7, "dtype": dtype}
    always, of_step = measured_peak(shape, full=True, **sizes)
    predicted = training_memory(shape, features="cached", device="cpu", objective="full", **sizes)
    assert predicted == pytest.approx(always + of_step, rel=0.15)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("anchors", [32, 128])
def test_the_predicted_peak_on_a_gpu_is_the_measured_one(dtype, anchors):
    sizes: dict[str, Any] = {
        "seq_len": 1024,
        "num_anchors": anchors,
        "block_size": 7,
        "dtype": dtype,
    }
    shape = a_shape(49152, Layers(2, 576, 1536, 9, 3, 64))
    always, of_step = measured_peak(shape, device="cuda", **sizes)
    predicted = training_memory(shape, features="cached", **sizes)
    assert predicted == pytest.approx(always + of_step, rel=0.15)


def test_logits_of_a_chunk_do_not_grow_with_the_anchors_and_full_ones_do():
    def logits(anchors: int, form: Any) -> int:
        return int(logit_bytes(Step(4096, anchors, 7, objective=form), 151936))

    assert logits(2048, "chunked") < 1.2 * logits(512, "chunked")
    assert logits(2048, "full") == 4 * logits(512, "full")


@pytest.mark.parametrize("name", ["pocket", "smollm2"])
@given(st.floats(0.05, 1.1), st.integers(2, 300), st.integers(1, 16), st.booleans())
@settings(max_examples=25)
def test_one_anchor_more_than_fits_does_not_fit(name, share, seq_len, block_size, on_cpu):
    shape = TARGETS[name]
    device: Any = "cpu" if on_cpu else "cuda"
    sizes: dict[str, Any] = {
        "seq_len": seq_len,
        "block_size": block_size,
        "dtype": "fp32",
        "device": device,
    }
    held = [training_memory(shape, num_anchors=anchors, **sizes) for anchors in range(1, seq_len)]
    memory = share * max(held)
    fits = [number for number, size in enumerate(held, start=1) if size <= memory]
    table = fit_table(
        shape, memory, (seq_len,), (block_size,), usable=1.0, dtype="fp32", device=device
    )
    assert len(table) == 1
    found = table.iloc[0]
    assert found["num_anchors"] == max(fits, default=0)
    assert found["held"] == held[max(max(fits, default=0), 1) - 1]
    assert found["full"] == (found["num_anchors"] < seq_len - 1)


def test_a_larger_card_takes_no_fewer_anchors():
    tables = [fit_table(TARGETS["qwen3-14b"], CARDS[name]) for name in ("RTX 4090", "H100", "H200")]
    counts = np.stack([table["num_anchors"] for table in tables])
    assert (np.diff(counts, axis=0) >= 0).all()
    # Weights and AdamW's state of the drafter alone are 22 GB, and the target in bf16 is 30 GB.
    assert (counts[0] == 0).all() and (counts[2] > 0).all()
    by_name = fit_table(TARGETS["qwen3-14b"], "H100")
    assert by_name.equals(tables[1])


@pytest.mark.parametrize(
    "options, error, match",
    [
        ({"num_anchors": 0}, ValueError, "num_anchors must be >= 1"),
        ({"dtype": "fp8"}, ValueError, "dtype must be one of .*, got 'fp8'"),
        ({"supervised": 1.5}, ValueError, "supervised must lie in"),
        ({"vocabulary": 4096}, ValueError, "vocabulary must be at most the model's, 2048"),
        ({"features": "alive"}, ValueError, "features must be one of"),
    ],
)
def test_a_step_that_cannot_be_is_refused(options, error, match):
    sizes: dict[str, Any] = {"seq_len": 8, "num_anchors": 2} | options
    for call in (training_cost, training_memory, memory_table):
        with pytest.raises(error, match=match):
            call(TARGETS["pocket"], **sizes)


def test_live_features_need_a_target_and_a_memory_is_a_positive_number():
    with pytest.raises(ValueError, match="features 'live' need the target's shape"):
        training_cost(Shape.of(tiny_drafter().config))
    with pytest.raises(ValueError, match="memory must be bytes or one of"):
        fit_table(TARGETS["pocket"], "abacus")
    with pytest.raises(ValueError, match="memory must be > 0"):
        fit_table(TARGETS["pocket"], 0)


def test_the_objective_is_the_real_one():
    """The name is imported for its chunk sizes; this keeps it the one that training calls."""
    assert objective.dspark_objective is dspark_objective


def test_cards_are_told_for_each_target_what_fits_and_how_much_of_it():
    table = card_table(["qwen3-4b", TARGETS["qwen3-8b"]], ["L4", CARDS["H100"]], seq_len=2048)
    assert table["target"].tolist() == ["qwen3-4b", "qwen3-4b", "qwen3-8b", "qwen3-8b"]
    assert table["card"].tolist() == ["L4", "H100"] * 2
    for line in table.itertuples():
        shape, card = TARGETS[line.target], CARDS[line.card]
        sizes = {"seq_len": 2048, "num_anchors": 512, "block_size": 7}
        assert line.held_gb == pytest.approx(training_memory(shape, **sizes) / 1e9)
        assert line.memory_gb == pytest.approx(card.memory_bytes / 1e9)
        assert line.fits == (line.held_gb <= 0.92 * line.memory_gb)
        assert line.most_anchors == fit_table(shape, card, [2048], [7])["num_anchors"].item()
    assert table["fits"].tolist() == [False, True, False, True]
    assert len(card_table()) == len(TARGETS) * len(CARDS)
    with pytest.raises(ValueError, match="memory must be bytes or one of"):
        card_table(["pocket"], ["abacus"])
