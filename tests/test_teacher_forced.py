"""Teacher-forced rates: which blocks count, what their rates and tau are, and how sure that is."""

import numpy as np
import pandas as pd
import pytest
import torch

from dspark_lab.chats import Encoded, collate
from dspark_lab.common import DSparkForwardOutput
from dspark_lab.decoding import decode
from dspark_lab.model import output_objective
from dspark_lab.rates import (
    BlockRates,
    block_sums,
    bootstrap,
    compare_drafters,
    drafter_table,
    evaluate,
    rate_table,
    slot_table,
    tau_table,
    teacher_forced_answers,
    teacher_forced_sums,
)
from tests.samples import CHAT, documents, random_chats, tiny_drafter, tiny_target


def with_target(**options):
    target, drafter = tiny_target(), tiny_drafter(1, **options)
    drafter.use_target_embeddings(target.embed_weight, target.head_weight)
    return target, drafter.eval()


def by_hand(target, drafter, item: Encoded) -> list[list[float]]:
    """The accept rates of every whole block, one block at a time, from full logits."""
    rates = []
    for anchor in range(len(item) - drafter.config.block_size):
        block = item.loss_mask[anchor : anchor + drafter.config.block_size + 1]
        if bool(block.all()):
            rates.append(true_rates(forward(target, drafter, item, [anchor]))[0, 0].tolist())
    return rates


def true_rates(output: DSparkForwardOutput) -> torch.Tensor:
    logits = output.draft_logits, output.aligned_target_logits
    return torch.minimum(*(x.softmax(dim=-1) for x in logits)).sum(dim=-1)


def forward(target, drafter, item: Encoded, anchors: list[int]) -> DSparkForwardOutput:
    batch = collate([item], 0)
    features = target.batch_features(batch, drafter.config.target_layer_ids)
    return drafter(
        batch.input_ids,
        features.context,
        batch.loss_mask,
        features.last,
        anchor_positions=torch.tensor([anchors]),
        block_keep_mask=torch.ones(1, len(anchors), dtype=torch.bool),
    )


@torch.no_grad()
def test_tau_is_one_plus_the_products_of_whole_blocks() -> None:
    target, drafter = with_target()
    chats = random_chats(3)
    table = evaluate(drafter, target, chats)
    for item, row in zip(chats, table.itertuples(), strict=True):
        rates = by_hand(target, drafter, item)
        taus = [1 + a + a * b + a * b * c for a, b, c in rates]
        assert row.blocks == len(rates)
        assert row.tau == pytest.approx(sum(taus) / len(taus), rel=1e-5)
        assert row.accept_1 == pytest.approx(np.mean([b for _, b, _ in rates]), rel=1e-5)
        assert row.survival_1 == pytest.approx(np.mean([a * b for a, b, _ in rates]), rel=1e-5)


def test_sums_of_the_same_blocks_give_the_same_rates() -> None:
    target, drafter = with_target()
    chats = random_chats(3)
    table = evaluate(drafter, target, chats, num_anchors=5)
    sums = teacher_forced_sums(drafter, target, chats, num_anchors=5)
    assert set(sums["kind"]) == {"teacher-forced", "predicted, teacher-forced"}
    sums = sums[sums["kind"] == "teacher-forced"]
    [tau] = tau_table(sums, resamples=10).itertuples()
    assert tau.rounds == table["blocks"].sum()
    assert tau.tau == pytest.approx(np.average(table["tau"], weights=table["blocks"]), rel=1e-5)
    each = tau_table(sums, "conversation", resamples=10)
    assert each["conversation"].tolist() == [0, 1, 2]
    assert each["tau"].tolist() == pytest.approx(table["tau"].tolist(), rel=1e-5)
    first = rate_table(sums, "conversation", resamples=10).query("slot == 0")
    assert first["conditional"].tolist() == pytest.approx(table["accept_0"].tolist(), rel=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("head", [True, False])
def test_sums_are_those_of_the_forward(head) -> None:
    """Survival and tau are the objective's, the prediction is the sigmoid of the head's logits."""
    target, drafter = with_target(enable_confidence_head=head, confidence_head_with_markov=head)
    [item] = random_chats(1, low=30)
    anchors = [a for a in range(len(item) - 3) if bool(item.loss_mask[a : a + 4].all())]
    output = forward(target, drafter, item, anchors)
    summary = output_objective(output, confidence_weight=0.0).sums.summary()
    sums = teacher_forced_sums(drafter, target, [item])
    taus = tau_table(sums, resamples=1).set_index("kind")["tau"]
    rates = rate_table(sums, resamples=1).set_index("kind")
    assert taus["teacher-forced"] == pytest.approx(summary["tau"], rel=1e-5)
    survival = rates.loc["teacher-forced", "survival"].tolist()
    assert survival == pytest.approx(summary["survival_by_slot"], rel=1e-5)
    predicted = rates.loc["predicted, teacher-forced", "survival"]
    if output.confidence_pred is None:
        assert predicted.isna().all() and np.isnan(taus["predicted, teacher-forced"])
    else:
        expected = output.confidence_pred[0].sigmoid().cumprod(dim=-1).mean(dim=0)
        assert predicted.tolist() == pytest.approx(expected.tolist(), rel=1e-5)


def some_blocks(seed: int, count: int) -> BlockRates:
    """Random rates; of each block a prefix of one slot or more is supervised."""
    rng = np.random.default_rng(seed)
    accept, confidence = rng.random((2, count, 3))
    return BlockRates(accept, confidence, np.arange(3) < rng.integers(1, 4, (count, 1)))


def test_sums_are_what_loops_over_blocks_find() -> None:
    found = [("b", "math", some_blocks(0, 5)), ("a", "code", some_blocks(1, 3))]
    sums = block_sums(found)
    domains = dict(zip(sums["conversation"], sums["domain"], strict=True))
    assert domains == {"b": "math", "a": "code"} and len(sums) == 2 * 2 * 3
    for label, _, rates in found:
        reached, passed, survived = (np.zeros((2, 3)) for _ in range(3))
        for accept, confidence, supervised in zip(
            rates.accept, rates.confidence, rates.supervised, strict=True
        ):
            reach = predicted = 1.0
            for k in range(supervised.sum()):
                reached[:, k] += reach
                passed[:, k] += reach * accept[k], reach * confidence[k]
                reach, predicted = reach * accept[k], predicted * confidence[k]
                survived[:, k] += reach, predicted
        own = sums[sums["conversation"] == label]
        assert (own["rounds"] == len(rates.accept)).all()
        for column, expected in (("reached", reached), ("passed", passed), ("survived", survived)):
            assert own[column].tolist() == pytest.approx(expected.ravel().tolist())


def test_sums_of_parts_and_kinds_can_be_concatenated() -> None:
    found = [(label, "none", some_blocks(label, 4)) for label in range(5)]
    whole = rate_table(block_sums(found))
    other = block_sums(found[1:3]).assign(kind="other")
    parts = pd.concat([block_sums(found[:2]), other, block_sums(found[2:])])
    together = rate_table(parts)
    both = together[together["kind"] != "other"].reset_index(drop=True)
    pd.testing.assert_frame_equal(both, whole)


def test_what_unsupervised_slots_hold_has_no_influence_and_a_missing_rate_is_not_left_out() -> None:
    rates = some_blocks(2, 12)
    before = block_sums([(0, "none", rates)])
    assert not rates.supervised.all()
    for values in (rates.accept, rates.confidence):
        values[~rates.supervised] = np.nan
    pd.testing.assert_frame_equal(block_sums([(0, "none", rates)]), before)
    rates.supervised[0] = True
    rates.accept[0] = 0.5, np.nan, 0.5
    table = rate_table(block_sums([(0, "none", rates)])).query("kind == 'teacher-forced'")
    assert table[["conditional", "survival"]].isna().all(axis=1).tolist() == [False, True, True]


def test_where_rounds_began_slot_0_has_the_rate_on_policy() -> None:
    target, drafter = with_target()
    prompts = [[1, 2, 3], [4], [5, 6]]
    decoded = decode(target, drafter, prompts, temperature=1.0, max_new_tokens=12, end_ids=[])
    sums = teacher_forced_answers(drafter, target, decoded, prompts)
    rates = rate_table(sums, ["anchors", "conversation"], resamples=10)
    rates = rates[(rates["kind"] == "teacher-forced") & (rates["slot"] == 0)]
    rates = rates.set_index(["anchors", "conversation"])["conditional"]
    first = decoded.trace[decoded.trace["slot"] == 0]
    on_policy = first.groupby("prompt")["accept_rate"].mean()
    for prompt, ids in enumerate(prompts):
        began = rates["where rounds began", prompt]
        assert began == pytest.approx(on_policy[prompt], rel=1e-5)
        every = rates["every token", prompt]
        text = ids + decoded.tokens[prompt]
        answered = torch.arange(len(text)) >= len(ids)
        item = Encoded(torch.tensor(text), answered, CHAT)
        # Blocks that the answer's end cuts have a slot 0 too.
        output = forward(target, drafter, item, list(range(len(ids), len(text) - 1)))
        assert every == pytest.approx(true_rates(output)[..., 0].mean().item(), rel=1e-5)
        assert every != pytest.approx(began, rel=1e-3)


def test_a_block_that_an_answers_end_cuts_does_not_count() -> None:
    target, drafter = with_target()
    # Of the answer's five tokens only the first two have three more behind them.
    [item] = documents("uuaaaaau")
    assert evaluate(drafter, target, [item])["blocks"].tolist() == [2]
    short = Encoded(item.input_ids[:5], item.loss_mask[:5], CHAT)
    table = evaluate(drafter, target, [short, item])
    assert table["blocks"].tolist() == [2]
    with pytest.raises(ValueError, match="4 supervised tokens in a row"):
        evaluate(drafter, target, [short])
    with pytest.raises(ValueError, match="4 supervised tokens in a row"):
        teacher_forced_sums(drafter, target, [short])


def test_a_draw_of_anchors_follows_from_seed_and_conversation_alone() -> None:
    target, drafter = with_target()
    _, other = with_target(markov_rank=0, confidence_head_with_markov=False)
    chats = random_chats(4, low=30)
    drawn = evaluate(drafter, target, chats, num_anchors=4)
    assert drawn["blocks"].tolist() == [4] * 4
    pd.testing.assert_frame_equal(drawn, evaluate(drafter, target, chats, num_anchors=4))
    assert not drawn["tau"].equals(evaluate(drafter, target, chats, num_anchors=4, seed=1)["tau"])
    assert evaluate(other, target, chats, num_anchors=4)["blocks"].tolist() == [4] * 4


def test_bootstrap_of_equal_values_has_no_width() -> None:
    assert bootstrap([2.5] * 7) == (2.5, 2.5, 2.5)
    with pytest.raises(ValueError, match="one or more numbers"):
        bootstrap([])


def frame(taus: list[float], names: list[str] | None = None) -> pd.DataFrame:
    names = names or [f"c{i}" for i in range(len(taus))]
    return pd.DataFrame({"conversation": names, "tau": taus})


def test_gain_is_paired_by_conversation() -> None:
    base = np.linspace(1.0, 9.0, 50)
    gain = compare_drafters(frame(list(1.1 * base)), frame(list(base)))
    # Conversations differ by a factor of nine, the gain by nothing: its interval has no width.
    assert gain["gain_percent"] == pytest.approx(10)
    assert gain["low"] == pytest.approx(10) and gain["high"] == pytest.approx(10)
    with pytest.raises(ValueError, match="same conversations"):
        compare_drafters(frame([1.0, 2.0]), frame([1.0, 2.0], ["c1", "c0"]))


def test_conditional_rate_is_the_ratio_of_survivals() -> None:
    names = ["accept_0", "accept_1", "survival_0", "survival_1"]
    table = pd.DataFrame([[0.5, 0.4, 0.5, 0.2], [1.0, 0.6, 1.0, 0.6]], columns=names)
    slots = slot_table({"mine": table})
    assert slots["accept"].tolist() == pytest.approx([0.75, 0.5])
    assert slots["survival"].tolist() == pytest.approx([0.75, 0.4])
    assert slots["conditional"].tolist() == pytest.approx([0.75, 0.4 / 0.75])
    assert (slots["low"] <= slots["conditional"]).all()
    assert (slots["high"] >= slots["conditional"]).all()


def test_drafter_table_has_all_and_each_domain() -> None:
    rows = [["a", 1, 1.0], ["b", 2, 2.0], ["a", 3, 4.0]]
    table = drafter_table({"mine": pd.DataFrame(rows, columns=["domain", "blocks", "tau"])})
    assert table["domain"].tolist() == ["all", "a", "b"]
    assert table["tau"].tolist() == pytest.approx([7 / 3, 2.5, 2.0])
    assert table["blocks"].tolist() == [6, 4, 2]
