"""`dspark_lab.tuning.noise`: products of gradients against plain loops, estimates by simulation."""

import math
from itertools import combinations_with_replacement
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dspark_lab.blocks import cut_blocks
from dspark_lab.chats import collate
from dspark_lab.model import cached_features, output_objective
from dspark_lab.training import TrainConfig
from dspark_lab.tuning import (
    Moments,
    gradient_moments,
    label_overlap,
    measure_noise,
    noise,
    noise_table,
)
from tests.runs import double_pair
from tests.samples import documents, random_chats, tiny_drafter, tiny_target

pytestmark = pytest.mark.usefixtures("one_thread")

NONE = label_overlap(1)


def rho(block_size: int, gamma: float, apart: int) -> float:
    """Blocks ``apart`` tokens from each other: the weights that fall on the same token, twice."""
    weights = [math.exp(-k / gamma) for k in range(block_size)]
    both = [weights[k] * weights[k + apart] for k in range(block_size) if k + apart < block_size]
    return sum(both) / sum(weight**2 for weight in weights)


@pytest.mark.parametrize("block_size", [1, 2, 5, 9])
@pytest.mark.parametrize("gamma", [0.5, 4.0, math.inf])
def test_label_overlap_is_that_of_two_blocks(block_size, gamma):
    expected = [rho(block_size, gamma, apart) for apart in range(1, block_size)]
    np.testing.assert_allclose(label_overlap(block_size, gamma), expected, atol=1e-12)


def test_single_blocks_give_means_over_pairs():
    """With one distance at which labels are shared, all unknowns are differences of means."""
    random = np.random.default_rng(0)
    where = [(0, 3), (0, 4), (0, 30), (1, 7), (1, 8), (1, 50), (2, 1), (2, 20)]
    gradients = random.normal(size=(len(where), 5))
    moments = gradient_moments(
        gradients,
        np.array([row for row, _ in where]),
        [np.array([place]) for _, place in where],
        np.array([0.5]),
    )
    kinds: dict[str, list[float]] = {"self": [], "next": [], "far": []}
    means: dict[int, list[np.ndarray]] = {}
    for i, (row, place) in enumerate(where):
        means.setdefault(row, []).append(gradients[i])
        for j, (other, there) in enumerate(where[: i + 1]):
            apart = abs(place - there)
            kind = {0: "self", 1: "next"}.get(apart, "far")
            if row == other:
                kinds[kind].append(float(gradients[i] @ gradients[j]))
    own = [sum(of) / len(of) for of in means.values()]
    signal = np.mean([own[0] @ own[1], own[0] @ own[2], own[1] @ own[2]])
    far = np.mean(kinds["far"])
    shared = (np.mean(kinds["next"]) - far) / 0.5
    expected = [signal, far - signal, np.mean(kinds["self"]) - far, shared]
    np.testing.assert_allclose(moments.estimates()[0], expected, rtol=1e-9)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 5))
def test_estimates_are_least_squares_over_products(seed, conversations):
    random = np.random.default_rng(seed)
    conversation, anchors = [], []
    for row in range(conversations):
        for size in random.integers(1, 5, size=3):
            conversation.append(row)
            anchors.append(random.choice(30, size=size, replace=False))
    gradients = random.normal(size=(len(anchors), 4))
    times = random.integers(0, 3, size=conversations)
    times[:2] = 1
    moments = gradient_moments(gradients, np.array(conversation), anchors, label_overlap(4))
    terms, products, weights, crossed, counted = [], [], [], 0.0, 0
    for i, j in combinations_with_replacement(range(len(anchors)), 2):
        if conversation[i] != conversation[j]:
            continue
        pairs = [abs(int(a) - int(b)) for a in anchors[i] for b in anchors[j]]
        same = sum(apart == 0 for apart in pairs) / len(pairs)
        shared = sum(rho(4, 4.0, apart) for apart in pairs if 0 < apart < 4) / len(pairs)
        terms.append([1, same, shared])
        products.append(gradients[i] @ gradients[j])
        weights.append(times[conversation[i]] * len(pairs))
    means = []
    for row in range(conversations):
        own = [i for i in range(len(anchors)) if conversation[i] == row]
        blocks = sum(len(anchors[i]) for i in own)
        means.append(sum(len(anchors[i]) * gradients[i] for i in own) / blocks)
    for r in range(conversations):
        for s in range(conversations):
            if r != s:
                crossed += times[r] * times[s] * float(means[r] @ means[s])
                counted += times[r] * times[s]
    root = np.sqrt(weights)
    solved = np.linalg.lstsq(root[:, None] * np.array(terms), root * products, rcond=None)[0]
    signal = crossed / counted
    found = moments.estimates(times[None].astype(float))[0]
    np.testing.assert_allclose(found[0], signal, rtol=1e-9, atol=1e-12)
    design = root[:, None] * np.array(terms)
    if np.linalg.cond(design) < 1e4:
        np.testing.assert_allclose(found[1] + signal, solved[0], rtol=1e-6, atol=1e-9)
        np.testing.assert_allclose(found[2:], solved[1:], rtol=1e-6, atol=1e-9)


def simulated(random: np.random.Generator, conversations: int) -> Moments:
    """Estimates from gradients of known moments: signal 1, between 3, within 20, shared 0.6."""
    size, dim = 4, 6
    overlap = label_overlap(size)
    gradients, conversation, anchors = [], [], []
    for row in range(conversations):
        places = np.concatenate([np.arange(4), np.arange(10, 14), random.permutation(40)[:6] + 20])
        apart = np.abs(places[:, None] - places)
        cover = np.eye(len(places)) + 0.6 * sum(
            overlap[d - 1] * (apart == d) for d in range(1, size)
        )
        noise = np.linalg.cholesky(cover) @ random.normal(size=(len(places), dim))
        own = 1 / math.sqrt(dim) + math.sqrt(3 / dim) * random.normal(size=dim)
        each = own + math.sqrt(20 / dim) * noise
        for group in (slice(0, 8), slice(8, 14)):
            gradients.append(each[group].mean(axis=0))
            conversation.append(row)
            anchors.append(places[group])
    return gradient_moments(np.array(gradients), np.array(conversation), anchors, overlap)


def test_estimates_are_unbiased():
    """Each mean is within four standard errors: 0.03 % of right code would fail."""
    random = np.random.default_rng(1)
    found = np.array([simulated(random, 6).estimates()[0] for _ in range(250)])
    error = found.std(axis=0) / math.sqrt(len(found))
    expected = np.array([1, 3, 20, 12])
    assert (np.abs(found.mean(axis=0) - expected) < 4 * error).all()
    # Precise enough to see a wrong formula.
    assert (error < [0.2, 0.7, 1.0, 1.7]).all()


@pytest.mark.slow
def test_intervals_cover_the_truth():
    """Of 300 intervals of 95 % at least 265 cover: right code has 285 or, as the bootstrap is a
    little narrow for 24 conversations, somewhat fewer."""
    random, covered = np.random.default_rng(2), 0
    for seed in range(300):
        moments = simulated(random, 24)
        table = noise.GradientNoise({4: moments}, {}).table(300, seed).iloc[0]
        covered += table["anchors_scale_low"] <= 20 <= table["anchors_scale_high"]
    assert covered >= 265


def test_a_signal_that_is_not_told_from_zero_has_no_upper_end():
    random = np.random.default_rng(0)
    gradients = random.normal(size=(12, 50))
    groups = [np.array([number % 2 * 30]) for number in range(12)]
    moments = gradient_moments(gradients, np.arange(12) // 2, groups, label_overlap(4))
    line = noise.GradientNoise({4: moments}, {}).table().iloc[0]
    assert line["anchors_scale_high"] == math.inf
    assert line["signal_error"] > 0.5


def test_a_table_joins_several_measurements():
    random = np.random.default_rng(3)
    first, second = (noise.GradientNoise({4: simulated(random, 5)}, {}) for _ in range(2))
    table = noise_table({100: second, 0: first})
    assert table["step"].tolist() == [0, 100]
    for line, one in zip(table.to_dict("records"), (first, second), strict=True):
        signal, between, within, shared = one.wholes[4].estimates()[0]
        assert math.isclose(line["signal"], signal)
        assert math.isclose(line["shared"], shared / within)
        expected = max(within, 0) / signal if signal > 0 else math.inf
        assert math.isclose(line["anchors_scale"], expected)
        expected = max(between, 0) / signal if signal > 0 else math.inf
        assert math.isclose(line["rows_scale"], expected)
    with pytest.raises(ValueError, match="noises must hold a measurement, got none"):
        noise_table({})


def test_a_short_list_of_groups_is_refused():
    one = [np.array([0]), np.array([1])]
    with pytest.raises(ValueError, match="conversation must name 2 conversations or more, got 1"):
        gradient_moments(np.ones((2, 3)), np.array([0, 0]), one, NONE)
    with pytest.raises(ValueError, match="anchors must be different tokens, one or more"):
        gradient_moments(np.ones((2, 3)), np.array([0, 1]), one[:1], NONE)
    with pytest.raises(ValueError, match="anchors must be different tokens, one or more"):
        gradient_moments(np.ones((2, 3)), np.array([0, 1]), [np.array([4, 4]), one[1]], NONE)


def exact_gradient(drafter: Any, target: Any, item: Any, anchors: list[int], slots: range) -> Any:
    """The gradient of the objective over these slots of the blocks, by its definition."""
    batch = collate([item], 0)
    own = drafter.config
    place = torch.tensor([anchors])
    keep = torch.ones_like(place, dtype=torch.bool)
    marks: dict[str, Any] = {"mask_token_id": own.mask_token_id, "layout": own.layout}
    blocks = cut_blocks(batch, place, keep, own.block_size, **marks)
    for slot in range(own.predicted):
        blocks.eval_mask[:, :, slot] &= slot in slots
    given = target.batch_features(batch, own.target_layer_ids)
    output = drafter.output(drafter.slots(blocks, given.context, given.last, backend="dense"))
    named = [(n, p) for n, p in drafter.named_parameters() if p.requires_grad]
    loss = output_objective(output).loss
    found = torch.autograd.grad(loss, [p for _, p in named], allow_unused=True)
    gradients = {
        name: torch.zeros_like(parameter) if gradient is None else gradient
        for (name, parameter), gradient in zip(named, found, strict=True)
    }
    return {n: g for n, g in gradients.items() if n.split(".")[0] != "confidence_head"}


def check_gradients(monkeypatch: pytest.MonkeyPatch, **shape: Any) -> None:
    """Their products, in units of the mean squares, with every gradient asked for by itself."""
    target, drafter = double_pair(**shape)
    predicted = drafter.config.predicted
    chats = random_chats(9)
    asked: list[tuple[int, list[int]]] = []
    groups: list[tuple[np.ndarray, np.ndarray, Any]] = []
    cut, moments = noise.cut_blocks, noise.gradient_moments

    def spied_cut(batch, place, *args, **kwargs):
        asked.append((int(batch.chat_index[0, 0]), place[0].tolist()))
        return cut(batch, place, *args, **kwargs)

    def spied_moments(gradients, conversation, anchors, overlap):
        groups.append((gradients, conversation, anchors))
        return moments(gradients, conversation, anchors, overlap)

    monkeypatch.setattr(noise, "cut_blocks", spied_cut)
    monkeypatch.setattr(noise, "gradient_moments", spied_moments)
    monkeypatch.setattr(noise, "SKETCH", 10**6)
    config = TrainConfig(steps=5, max_length=64)
    found = measure_noise(
        *(drafter, target, chats, config),
        **{"conversations": 3, "anchors": 3, "block_sizes": (2, predicted), "by_slot": True},
    )
    assert list(found.wholes) == [*sorted({2, predicted})]
    assert list(found.slots) == list(range(predicted))
    # Two of the nine say what the unit is.
    squares: dict[str, torch.Tensor] = {}
    for index, places in asked[:2]:
        exact = exact_gradient(drafter, target, chats[index], places, range(predicted))
        squares = {n: squares.get(n, 0) + g**2 for n, g in exact.items()}
    squares = {n: (total + total.mean() / 2) / 3 for n, total in squares.items()}
    parts = [range(size) for size in found.wholes]
    parts += [range(slot, slot + 1) for slot in range(predicted)]
    assert len(groups) == len(parts)
    for slots, (gradients, conversation, anchors) in zip(parts, groups, strict=True):
        exact = [
            exact_gradient(drafter, target, chats[index], places.tolist(), slots)
            for index, places in zip(conversation, anchors, strict=True)
        ]
        flat = torch.stack(
            [
                torch.cat([(g / squares[n].sqrt().sqrt()).flatten() for n, g in e.items()])
                for e in exact
            ]
        )
        products = gradients @ gradients.T
        np.testing.assert_allclose(products, (flat @ flat.T).detach().numpy(), rtol=1e-6)


def test_gradients_are_those_of_the_training_objective(monkeypatch):
    check_gradients(monkeypatch)


def test_gradients_of_blocks_whose_anchor_is_given(monkeypatch):
    check_gradients(monkeypatch, sample_from_anchor=False)


def test_stored_features_give_the_same_moments(tmp_path):
    target, drafter = double_pair()
    chats, config = random_chats(8), TrainConfig(steps=1, max_length=64)
    layers = drafter.config.target_layer_ids
    stored = cached_features(target, chats, layers, tmp_path, progress=False)
    found = [
        measure_noise(drafter, target, chats, config, anchors=2, features=source).wholes[3].cross
        for source in (None, stored)
    ]
    np.testing.assert_allclose(*found, rtol=1e-6)


def test_sketches_keep_products(monkeypatch):
    """Within six standard errors, which right code leaves once in a hundred million."""
    target, drafter = double_pair()
    found = []
    for size in (10**6, 997):
        monkeypatch.setattr(noise, "SKETCH", size)
        config = TrainConfig(steps=1, max_length=64)
        measured = measure_noise(drafter, target, random_chats(8), config, anchors=3)
        found.append(measured.wholes[3].cross)
    exact, sketched = found
    most = np.sqrt(np.outer(np.diag(exact), np.diag(exact)))
    assert (np.abs(sketched - exact) < 6 * math.sqrt(2 / 997) * most).all()
    assert not np.allclose(sketched, exact)


def test_measuring_leaves_the_drafter_as_it_was():
    target, drafter = tiny_target(), tiny_drafter()
    drafter.use_target_embeddings(target.embed_weight, target.head_weight)
    before = {name: value.clone() for name, value in drafter.state_dict().items()}
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    config = TrainConfig(steps=1, max_length=64)
    one = measure_noise(drafter, target, random_chats(10), config, anchors=2)
    assert torch.equal(torch.rand(3), expected)
    assert all(torch.equal(value, before[name]) for name, value in drafter.state_dict().items())
    assert all(parameter.grad is None for parameter in drafter.parameters())
    again = measure_noise(drafter, target, random_chats(10), config, anchors=2)
    assert np.array_equal(one.wholes[3].cross, again.wholes[3].cross)
    assert one.block_sizes == [3]


def test_groups_are_of_different_candidates_of_their_conversation(monkeypatch):
    groups: list[Any] = []
    moments = noise.gradient_moments

    def spied(gradients, conversation, anchors, overlap):
        groups.extend(zip(conversation.tolist(), anchors, strict=True))
        return moments(gradients, conversation, anchors, overlap)

    monkeypatch.setattr(noise, "gradient_moments", spied)
    marks = ["..aaaaaaaaaaaaaaaaaaaaaaaaaaa", ".aaa..aaaa", "aa", "..aa", ".", "aaa", "a.a", "aaaa"]
    chats = [item for item in documents(*marks) if len(item) > 1]
    config = TrainConfig(steps=1, max_length=64)
    measure_noise(tiny_drafter(), tiny_target(), chats, config, anchors=5, conversations=9)
    assert len(groups) == 2 * len({index for index, _ in groups})
    for (index, near), (again, others) in zip(groups[::2], groups[1::2], strict=True):
        assert index == again
        mask = chats[index].loss_mask.tolist()
        candidates = {p for p in range(len(mask) - 1) if mask[p] and mask[p + 1]}
        together = [*near.tolist(), *others.tolist()]
        assert len(set(together)) == len(together) and set(together) <= candidates
        assert len(near) == len(others) == min(5, len(candidates) // 2)


def test_too_long_blocks_and_too_few_conversations_are_refused():
    given = tiny_drafter(), tiny_target()
    config = TrainConfig(steps=1, max_length=64)
    with pytest.raises(ValueError, match="block_sizes must be at most the drafter's .* 3, got 4"):
        measure_noise(*given, random_chats(6), config, block_sizes=(2, 4))
    with pytest.raises(ValueError, match="chats must hold 4 conversations or more .* got 3 of 3"):
        measure_noise(*given, random_chats(3), config)
