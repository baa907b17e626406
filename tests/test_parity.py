"""Drafter and objective agree with the unvectorised reference, in values and in every gradient.

Random small models over every combination of heads, each packed and not; sizes, layers, groups of
query heads and blocks differ from case to case, and all parameters are random: a fresh drafter's
Markov bias and confidence are zero, which would hide mistakes. Every second round of them has
variants: given anchors, windows, causal layers, YaRN, soft caps, reduced vocabularies.
"""

import random
from dataclasses import dataclass
from functools import cache

import pytest
import torch
from torch import Tensor

from dspark_lab.common import DSparkForwardOutput
from dspark_lab.model import (
    Drafter,
    DrafterConfig,
    Objective,
    Yarn,
    dspark_objective,
    output_objective,
)
from dspark_lab.model.slotwise import LogitRule, distance, rate_of_distance
from tests import oracle, reference
from tests.samples import slots_of

pytestmark = pytest.mark.usefixtures("one_thread")

BACKENDS = ["blockwise", "dense"]
HEADS = ["none", "vanilla", "gated", "rnn"]
CONFIDENCE = ["none", "hidden", "hidden + token"]
COMBINATIONS = [
    (head, confidence, packed)
    for head in HEADS
    for confidence in CONFIDENCE
    for packed in ("unpacked", "packed")
    if (head, confidence) != ("none", "hidden + token")
]
LENGTHS = [[[3, 2, 4], [9]], [[1, 6], [5, 3]], [[4, 4, 2]]]
NUM_ANCHORS = 4
CASES = [f"{i}: {', '.join(map(str, c))}" for i, c in enumerate(2 * COMBINATIONS)]
each_case = pytest.mark.parametrize("index", range(len(CASES)), ids=CASES)


@dataclass(frozen=True)
class Case:
    """A random drafter and its inputs, all exact in fp32, and the weights of the objective."""

    config: dict
    state: dict[str, Tensor]
    input_ids: Tensor
    features: Tensor
    loss_mask: Tensor
    last: Tensor
    anchors: Tensor
    keep: Tensor
    seq_lens: Tensor | None
    weights: dict[str, float]
    # The target's own head and rule, and the ids of a reduced vocabulary.
    target_head: Tensor
    target_rule: LogitRule
    draft_ids: list[int] | None


@cache
def case(index: int) -> Case:
    """Sizes cycle with the index, so that all of them occur; the rest is random."""
    head, confidence, packed = COMBINATIONS[index % len(COMBINATIONS)]
    torch.manual_seed(index)
    rng = random.Random(index)
    kv_heads = rng.choice([1, 2])
    vocab = rng.randrange(9, 17)
    config = {
        "vocab_size": vocab,
        "hidden_size": rng.choice([6, 7, 10]),
        "intermediate_size": rng.choice([5, 12]),
        "num_hidden_layers": [1, 2, 1, 3, 2][index % 5],
        "num_attention_heads": kv_heads * [1, 2, 4][index % 3],
        "num_key_value_heads": kv_heads,
        "head_dim": rng.choice([2, 4, 6]),
        "target_layer_ids": (0, 2, 5)[: rng.choice([1, 2, 3])],
        "block_size": [8, 3, 5, 1, 7, 2, 6, 4, 3][index % 9],
        "mask_token_id": rng.randrange(vocab),
        "markov_rank": 0 if head == "none" else rng.choice([3, 5]),
        "markov_head_type": head,
        "enable_confidence_head": confidence != "none",
        "confidence_head_with_markov": confidence == "hidden + token",
        "rms_norm_eps": rng.choice([1e-6, 1e-2]),
        "rope_theta": rng.choice([1e6, 100.0]),
        "target_hidden_size": rng.choice([None, 4, 8]),
        "attention_bias": rng.random() < 0.3,
    }
    target_rule, draft_ids = LogitRule(), None
    if index >= len(COMBINATIONS):
        config |= variant(random.Random(-index), config)
        target_rule = LogitRule([None, 1.5][index % 2], [1.0, 0.7][index // 2 % 2])
        if config["draft_vocab_size"] is not None:
            draft_ids = sorted(rng.sample(range(vocab), config["draft_vocab_size"]))
    state = {}
    for name, value in Drafter(DrafterConfig(**config)).state_dict().items():
        norm = name.endswith(("norm.weight", "layernorm.weight"))
        scale = 1.0 if name in ("embed_tokens.weight", "lm_head.weight") else 0.5
        state[name] = norm + scale * torch.randn(value.shape)
    target_head = state["lm_head.weight"]
    if draft_ids is not None:
        target_head = torch.randn(vocab, config["hidden_size"])
        state["lm_head.weight"] = target_head[draft_ids]
        state["d2t"] = torch.tensor([v - own for own, v in enumerate(draft_ids)])

    lengths = LENGTHS[index % 3] if packed == "packed" else [[10], [10]]
    seq_len = max(map(sum, lengths)) + (1 if packed == "packed" else 0)
    loss_mask = torch.rand(len(lengths), seq_len) < 0.9
    anchors, keep = [], []
    for b, row in enumerate(lengths):
        # The second token of the longest document is an anchor with context, and below also one
        # with a supervised slot, so that no parameter is idle; the other anchors fall anywhere.
        second = sum(row[: row.index(max(row))]) + 1
        others = [p for p in range(sum(row)) if p != second]
        kept = NUM_ANCHORS if b == 0 else rng.choice([1, NUM_ANCHORS - 1])
        dummies = NUM_ANCHORS - kept
        anchors.append(sorted([second, *rng.sample(others, kept - 1)]) + [0] * dummies)
        keep.append([True] * kept + [False] * dummies)
        loss_mask[b, second + 1] = True
    features = len(config["target_layer_ids"])
    features *= config["target_hidden_size"] or config["hidden_size"]
    documents = max(map(len, lengths))
    padded = [row + [0] * (documents - len(row)) for row in lengths]
    return Case(
        config=config,
        state=state,
        input_ids=torch.randint(vocab, (len(lengths), seq_len)),
        features=torch.randn(len(lengths), seq_len, features),
        loss_mask=loss_mask,
        last=torch.randn(len(lengths), seq_len, config["hidden_size"]),
        anchors=torch.tensor(anchors),
        keep=torch.tensor(keep),
        seq_lens=torch.tensor(padded) if packed == "packed" else None,
        weights={
            "ce_weight": rng.choice([0.1, 0.7]),
            "l1_weight": rng.choice([0.9, 0.3]),
            "confidence_weight": rng.choice([1.0, 0.4]),
            "loss_decay_gamma": rng.choice([4.0, 1.5]),
        },
        target_head=target_head,
        target_rule=target_rule,
        draft_ids=draft_ids,
    )


def variant(rng: random.Random, config: dict) -> dict:
    """What other drafters than DSpark's may have."""
    kinds = ["sliding_attention", "full_attention"]
    yarn = Yarn(factor=rng.choice([2.0, 8.0]), original_max_position_embeddings=64, beta_fast=4.0)
    return {
        "sample_from_anchor": rng.random() < 0.4,
        "block_size": max(2, config["block_size"]),
        "layer_types": tuple(rng.choice(kinds) for _ in range(config["num_hidden_layers"])),
        "sliding_window": rng.choice([3, 5, 9]),
        "is_causal": rng.choice([None, True, False]),
        "draft_vocab_size": rng.choice([None, config["vocab_size"] // 2]),
        "final_logit_softcapping": rng.choice([None, 2.0]),
        "logit_scale": rng.choice([None, 0.6]),
        "yarn": rng.choice([None, yarn]),
    }


@dataclass(frozen=True)
class Truth:
    """What the reference says: slots, objective, and the loss's gradient by parameter name."""

    slots: list
    objective: reference.Objective
    gradients: dict[str, Tensor]


@cache
def truth(index: int, teacher: bool = True) -> Truth:
    given = case(index)
    frozen = ("embed_tokens.weight", "lm_head.weight")
    state = {name: value.double() for name, value in given.state.items() if name != "d2t"}
    trained = {name: value.requires_grad_() for name, value in state.items() if name not in frozen}
    rule = {"target_cap": given.target_rule.cap, "target_scale": given.target_rule.scale}
    slots = reference.forward(
        state | {"target_head.weight": given.target_head.double()},
        given.config | rule | {"draft_ids": given.draft_ids},
        given.input_ids.tolist(),
        given.features.double(),
        given.loss_mask.tolist(),
        given.last.double() if teacher else None,
        given.anchors.tolist(),
        given.keep.tolist(),
        None if given.seq_lens is None else given.seq_lens.tolist(),
    )
    predicted = DrafterConfig(**given.config).predicted
    objective = reference.objective(slots, predicted, **given.weights)
    gradients = torch.autograd.grad(objective.loss, list(trained.values()), materialize_grads=True)
    return Truth(slots, objective, dict(zip(trained, gradients, strict=True)))


def model(given: Case, dtype: torch.dtype) -> Drafter:
    drafter = Drafter(DrafterConfig(**given.config)).to(dtype)
    drafter.load_state_dict(given.state)
    embedding = given.state["embed_tokens.weight"]
    drafter.use_target_embeddings(embedding, given.target_head, given.target_rule)
    return drafter


def inputs(given: Case, dtype: torch.dtype, teacher: bool = True) -> dict:
    arguments = {
        "input_ids": given.input_ids,
        "target_hidden_states": given.features.to(dtype),
        "loss_mask": given.loss_mask,
        "target_last_hidden_states": given.last.to(dtype) if teacher else None,
        "anchor_positions": given.anchors,
        "block_keep_mask": given.keep,
    }
    if given.seq_lens is not None:
        packed = oracle.packed_rows(given.seq_lens.tolist(), given.input_ids.shape[1])
        names = ("doc_remaining", "position_ids")
        arguments |= {name: torch.tensor(x) for name, x in zip(names, packed, strict=True)}
        arguments["seq_lens"] = given.seq_lens
    return arguments


def assert_near(got, expected, bound: float, what: str, scale: float = 1.0) -> None:
    """No difference exceeds the bound times the largest expected number, or times ``scale``."""
    got, expected = (torch.as_tensor(x, dtype=torch.float64).detach() for x in (got, expected))
    assert got.shape == expected.shape, what
    assert torch.equal(got.isnan(), expected.isnan()), what
    assert torch.equal(got.isneginf(), expected.isneginf()), what
    got, expected = (x.masked_fill(expected.isneginf(), 0) for x in (got, expected))
    error = float((got - expected).nan_to_num().abs().max())
    allowed = bound * max(scale, float(expected.nan_to_num().abs().max()))
    assert error <= allowed, f"{what}: off by {error:.1e}, allowed {allowed:.1e}"


def assert_slots(output: DSparkForwardOutput, expected: list, bound: float) -> None:
    """All that a forward returns, slot by slot. Dummy blocks: finite and unsupervised."""
    parts = {
        "logits": output.draft_logits,
        "confidence": output.confidence_pred,
        "teacher": output.aligned_target_logits,
    }
    for b, row in enumerate(expected):
        for n, block in enumerate(row):
            assert bool(output.block_keep_mask[b, n]) == (block is not None)
            if block is None:
                assert not output.draft_logits[b, n].isnan().any()
                assert not output.eval_mask[b, n].any()
                assert parts["confidence"] is None or parts["confidence"][b, n].isfinite().all()
                continue
            for k, slot in enumerate(block):
                where = b, n, k
                assert bool(output.eval_mask[where]) == slot.supervised, where
                if slot.label is not None:
                    assert int(output.target_ids[where]) == slot.label, where
                if slot.logits is None:
                    continue
                for name, got in parts.items():
                    value = getattr(slot, name)
                    assert (got is None) == (value is None), name
                    if got is not None:
                        assert_near(got[where], value, bound, f"{name} {where}")


def assert_objective(got: Objective, expected: reference.Objective, bound: float) -> None:
    """The loss, every figure and every sum, which are NaN where they have no value."""
    assert_near(got.loss, expected.loss, bound, "loss")
    summary = got.sums.summary()
    for name, figure in expected.figures.items():
        assert_near(summary[name], figure, bound, name)
    for name, values in expected.sums.items():
        assert_near(getattr(got.sums, name), values, bound, name)
    assert int(got.sums.blocks) == expected.blocks


def assert_gradients(drafter: Drafter, truth: Truth, bound: float) -> None:
    for name, parameter in drafter.named_parameters():
        if name not in truth.gradients:
            assert not parameter.requires_grad and parameter.grad is None, name
            continue
        got = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        assert_near(got, truth.gradients[name], bound, f"gradient of {name}", scale=1e-2)


def fused(drafter: Drafter, arguments: dict, weights: dict, chunk: int = 128) -> Objective:
    """The objective from hidden states, some slots at a time."""
    slots = slots_of(drafter, **arguments)
    heads = drafter.lm_head.weight, drafter.markov_w2_weight
    return dspark_objective(slots, *heads, chunk=chunk, **weights, **drafter.vocabulary)


@pytest.mark.parametrize("backend", BACKENDS)
@each_case
def test_float64_agrees_in_values_and_gradients(index: int, backend: str) -> None:
    given, expected = case(index), truth(index)
    drafter = model(given, torch.float64)
    arguments = {**inputs(given, torch.float64), "backend": backend}
    output = drafter(**arguments)
    assert_slots(output, expected.slots, 1e-9)
    accept = rate_of_distance(distance(output.draft_logits, output.aligned_target_logits))
    for b, row in enumerate(expected.slots):
        for n, block in enumerate(row):
            for k, slot in enumerate(block or []):
                if slot.logits is not None and slot.teacher is not None:
                    rate = reference.accept_rate(slot)
                    assert_near(accept[b, n, k], rate, 1e-9, f"accept rate {b, n, k}")

    assert_objective(output_objective(output, **given.weights), expected.objective, 1e-9)
    objective = fused(drafter, arguments, given.weights, chunk=[1, 5, 7, 128][index % 4])
    supervised = output.eval_mask
    assert_near(objective.accept[supervised], accept[supervised], 1e-9, "accept rates")
    assert_objective(objective, expected.objective, 1e-9)
    objective.loss.backward()
    assert_gradients(drafter, expected, 1e-9)


@each_case
def test_fp32_agrees_in_values_and_gradients(index: int) -> None:
    given, expected = case(index), truth(index)
    drafter = model(given, torch.float32)
    arguments = inputs(given, torch.float32)
    assert_slots(drafter(**arguments), expected.slots, 1e-5)
    objective = fused(drafter, arguments, given.weights)
    assert_objective(objective, expected.objective, 1e-5)
    objective.loss.backward()
    assert_gradients(drafter, expected, 1e-4)


@pytest.mark.parametrize("index", [0, 9, 17])
def test_without_a_teacher_cross_entropy_alone_agrees(index: int) -> None:
    given = case(index)
    expected = truth(index, teacher=False)
    drafter = model(given, torch.float64)
    arguments = inputs(given, torch.float64, teacher=False)
    output = drafter(**arguments)
    assert_slots(output, expected.slots, 1e-9)
    weights = {**given.weights, "l1_weight": 0.0, "confidence_weight": 0.0}
    for objective in (output_objective(output, **weights), fused(drafter, arguments, weights)):
        assert objective.accept.isnan().all()
        assert_objective(objective, expected.objective, 1e-9)
        drafter.zero_grad()
        objective.loss.backward()
        assert_gradients(drafter, expected, 1e-9)


def test_the_cases_reach_everything() -> None:
    """Sizes of every kind occur, dummies and idle blocks too, and every parameter matters."""
    cases = [case(index) for index in range(len(CASES))]
    configs = [given.config for given in cases]
    for name in ("num_key_value_heads", "attention_bias", "target_hidden_size"):
        assert len({config[name] for config in configs}) > 1
    names = ("sample_from_anchor", "is_causal", "final_logit_softcapping", "logit_scale", "yarn")
    for name in (*names, "layer_types", "draft_vocab_size"):
        assert len({config.get(name) for config in configs if name in config}) > 1
    assert not all(bool(given.keep.all()) for given in cases)
    deepest = {}
    idle = 0
    for index, given in enumerate(cases):
        blocks = [block for row in truth(index).slots for block in row if block is not None]
        depths = [k for block in blocks for k, slot in enumerate(block) if slot.supervised]
        head = given.config["markov_head_type"]
        deepest[head] = max(depths + [deepest.get(head, 0)])
        idle += sum(not block[0].supervised for block in blocks)
        for name, gradient in truth(index).gradients.items():
            assert gradient.abs().max() > 1e-5, (given.config, name)
    assert deepest.keys() == set(HEADS) and min(deepest.values()) >= 4
    assert idle > 0
