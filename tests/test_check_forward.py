"""`check_forward` names every planted fault, alone and in pairs, and is silent on right outputs."""

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

import dspark_lab as lab
from dspark_lab.attention import Findings
from dspark_lab.blocks import Blocks, cut_blocks, draw_blocks
from dspark_lab.chats import Batch, collate, encode, pack
from dspark_lab.common import DSparkForwardOutput
from dspark_lab.pairs import load_pair
from tests import oracle
from tests.draws import PAD, Draw, cuts, draws
from tests.samples import documents, random_chats, tiny_target

pytestmark = pytest.mark.usefixtures("one_thread")

VOCAB = 80


@pytest.fixture(scope="module")
def rows() -> tuple[Batch, Blocks]:
    """A packed row and a padded one; gaps, ends of documents and of the row, a dummy block."""
    batch = pack(documents("..aaaa.aaaa", "aaaaaaa", ".aaa.aaaaaa", "aaaaaaaa"), 22, 0)
    anchors = torch.tensor([[3, 4, 8, 9, 13, 17, 20, 0], [1, 2, 5, 6, 9, 11, 13, 0]])
    kept = torch.tensor([[True] * 7 + [False]]).expand(2, -1)
    return batch, cut_blocks(batch, anchors, kept, 4)


def forward(batch: Batch, blocks: Blocks, vocab: int = VOCAB) -> tuple[dict[str, Tensor], Tensor]:
    """A right output with random logits, and the target's logits."""
    rng = torch.Generator().manual_seed(0)
    shape = blocks.eval_mask.shape
    target = torch.randn(*batch.input_ids.shape, vocab, generator=rng)
    rows = torch.arange(shape[0])[:, None, None]
    output = {
        "draft_logits": torch.randn(*shape, vocab, generator=rng),
        "target_ids": blocks.target_ids.clone(),
        "eval_mask": blocks.eval_mask.clone(),
        "block_keep_mask": blocks.block_keep_mask.clone(),
        "confidence_pred": torch.randn(shape, generator=rng),
        "aligned_target_logits": target[rows, blocks.prev_indices],
    }
    return output, target


def found(check: Findings) -> set[str]:
    return {finding.finding for finding in check.found if finding.verdict != "note"} - {""}


def shifted(batch: Batch, blocks: Blocks, shift: int) -> Tensor:
    places = (blocks.label_indices + shift).clamp(0, batch.input_ids.shape[1] - 1)
    return batch.input_ids[:, None].take_along_dim(places, 2)


def moved_teacher(output: dict[str, Tensor], blocks: Blocks, target: Tensor, shift: int) -> Tensor:
    places = (blocks.label_indices - 1 + shift).clamp(0, target.shape[1] - 1)
    return target[torch.arange(len(target))[:, None, None], places]


def plant(name: str, output: dict[str, Tensor], batch: Batch, blocks: Blocks, target: Tensor):
    """Change the output as this fault would."""
    mask, labels = output["eval_mask"], blocks.label_indices
    inside = labels.clamp(max=batch.input_ids.shape[1] - 1)
    learnt = batch.loss_mask[:, None].take_along_dim(inside, 2) & (labels == inside)
    last = blocks.anchor_positions + batch.doc_remaining.gather(1, blocks.anchor_positions)
    own = (labels <= last[..., None]) & blocks.block_keep_mask[..., None]
    if name.startswith("labels"):
        shift = {"labels early": -1, "labels late": 1}.get(name)
        ids = blocks.target_ids.roll(1, 1) if shift is None else shifted(batch, blocks, shift)
        output["target_ids"] = ids
    elif name == "one label":
        output["target_ids"][0, 0, 0] += 1
    elif name == "gap":
        mask |= learnt & own
    elif name == "next document":
        reach = labels[..., :1] <= last[..., None]
        mask |= (learnt & reach & blocks.block_keep_mask[..., None]).cumprod(2).bool()
    elif name == "loss mask ignored":
        mask |= own & (labels == inside) & (labels - 1 < 7)
    elif name == "past the row":
        mask |= (labels > inside) & blocks.block_keep_mask[..., None]
    elif name == "dummies":
        mask[:, -1, 0] = True
    elif name == "slot 0 missing":
        mask[..., 0] = False
    elif name == "blocks missing":
        mask[:, 2] = False
    elif name == "keep":
        output["block_keep_mask"][1, 0] = False
    elif name == "probability":
        output["confidence_pred"] = output["confidence_pred"].sigmoid()
    elif name == "confidence axis":
        output["confidence_pred"] = output["confidence_pred"].unsqueeze(3)
    elif name == "NaN logits":
        output["draft_logits"][1, 1, 0, 5] = torch.nan
    elif name == "NaN confidence":
        output["confidence_pred"][0, 0, 0] = torch.nan
    elif name == "infinite teacher":
        output["aligned_target_logits"][0, 1, 0, 3] = torch.inf
    elif name.startswith("teacher"):
        shift = {"teacher late": 1, "teacher early": -1, "teacher two late": 2}.get(name)
        if shift is None:
            output["aligned_target_logits"] = output["aligned_target_logits"].flip(2)
        else:
            output["aligned_target_logits"] = moved_teacher(output, blocks, target, shift)
    return output


FAULTS = {
    "labels early": "the labels are one token too early",
    "labels late": "the labels are one token too late",
    "labels of the block before": "the labels are those of the block before",
    "one label": "labels are other tokens",
    "gap": "supervision jumps over a gap",
    "next document": "supervision crosses into the next document",
    "loss mask ignored": "tokens that are not supervised are learnt",
    "past the row": "supervision reaches past the end of the row",
    "dummies": "dummy blocks are supervised",
    "slot 0 missing": "slot 0 is never supervised",
    "blocks missing": "whole blocks are not supervised",
    "keep": "block_keep_mask differs from that of the blocks",
    "probability": "the confidence looks like a probability: all lie in [0, 1]",
    "confidence axis": "confidence_pred has an axis too many, of length 1",
    "NaN logits": "draft_logits holds NaN or inf",
    "NaN confidence": "confidence_pred holds NaN or inf",
    "infinite teacher": "aligned_target_logits holds NaN or inf",
    "teacher late": "the teacher is one position late",
    "teacher early": "the teacher is one position early",
    "teacher two late": "the teacher is two positions late",
    "teacher reversed": "the teacher is another distribution than the target's",
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_named(name, rows):
    output, target = forward(*rows)
    check = lab.check_forward(plant(name, output, *rows, target), *rows, target_logits=target)
    assert found(check) == {FAULTS[name]}
    assert not check.ok


@pytest.mark.parametrize(("shift", "side"), [(-1, "early"), (1, "late")])
def test_supervision_beside_its_place_is_named(shift, side, rows):
    batch, blocks = rows
    output, target = forward(*rows)
    anchors = blocks.anchor_positions + shift
    output["eval_mask"] = torch.tensor(
        oracle.eval_mask(
            22,
            batch.loss_mask.tolist(),
            anchors.tolist(),
            blocks.block_keep_mask.tolist(),
            4,
            batch.doc_remaining.tolist(),
        )
    )
    check = lab.check_forward(output, *rows, target_logits=target)
    assert found(check) == {f"supervision is taken one token too {side}"} and not check.ok


def test_a_shift_is_named_where_it_explains_what_most_slots_have(rows):
    batch, blocks = rows
    # A shift that fits as well as no shift does: all tokens are one.
    alike = replace(batch, input_ids=torch.full_like(batch.input_ids, 7))
    same = cut_blocks(alike, blocks.anchor_positions, blocks.block_keep_mask, 4)
    output, _ = forward(alike, same)
    assert found(lab.check_forward(plant("one label", output, *rows, None), alike, same)) == {
        "labels are other tokens"
    }
    # The block before explains one block, of three that are wrong.
    kept = torch.tensor([[True, True, False, True, False, False, False, False]] * 2)
    some = cut_blocks(batch, blocks.anchor_positions, kept, 4)
    output, _ = forward(batch, some)
    output["target_ids"] += 1
    output["target_ids"][:, 1] = some.target_ids[:, 0]
    assert found(lab.check_forward(output, batch, some)) == {"labels are other tokens"}


def test_minus_infinity_may_rule_out_other_tokens_alone(rows):
    for name, token, said in (
        ("draft_logits", 70, set()),
        ("draft_logits", 4, {"draft_logits holds NaN or inf"}),
        ("aligned_target_logits", 4, set()),
        ("aligned_target_logits", slice(None), {"aligned_target_logits holds NaN or inf"}),
    ):
        output, _ = forward(*rows)
        output[name][0, 0, 0, token] = -torch.inf
        assert found(lab.check_forward(output, *rows)) == said


def test_a_confidence_may_be_constant_or_small(rows):
    output, _ = forward(*rows)
    share = output["confidence_pred"].sigmoid()
    share[~rows[1].eval_mask] = -7  # where it has no meaning
    for values, said in (
        (torch.zeros_like(share), set()),
        (share - 0.5, set()),
        (share, {FAULTS["probability"]}),
    ):
        output["confidence_pred"] = values
        assert found(lab.check_forward(output, *rows)) == said


def test_what_is_wrongly_supervised_is_judged_and_what_is_not_supervised_is_not(rows):
    output, target = forward(*rows)
    output = plant("gap", output, *rows, target)
    output["target_ids"][output["eval_mask"] & ~rows[1].eval_mask] += 1
    said = {FAULTS["gap"], "labels are other tokens"}
    assert found(lab.check_forward(output, *rows, target_logits=target)) == said
    output, target = forward(*rows)
    output = plant("slot 0 missing", output, *rows, target)
    output["aligned_target_logits"][:, :, 0] = 0
    check = lab.check_forward(output, *rows, target_logits=target)
    assert found(check) == {FAULTS["slot 0 missing"]}


# A fault that hides another, or is one with it.
SAME = ("labels", "one label"), ("teacher", "infinite teacher"), ("probability", "NaN confidence")


def pairs() -> list[tuple[str, str]]:
    kinds = {name: name.split()[0] for name in FAULTS}
    return [
        pair
        for pair in itertools.combinations(FAULTS, 2)
        if kinds[pair[0]] != kinds[pair[1]]
        and not any(p[0].startswith(a) and p[1] == b for a, b in SAME for p in (pair, pair[::-1]))
    ]


@pytest.mark.parametrize("first", FAULTS)
def test_of_two_planted_faults_both_are_named(first, rows):
    for pair in pairs():
        if pair[0] != first:
            continue
        output, target = forward(*rows)
        # What takes slots away comes behind what adds some, dummy blocks' come last.
        late = ["slot 0 missing", "blocks missing", "dummies"]
        for name in sorted(pair, key=lambda name: (name in late, name == "dummies")):
            output = plant(name, output, *rows, target)
        check = lab.check_forward(output, *rows, target_logits=target)
        assert found(check) == {FAULTS[name] for name in pair}, pair


# Right outputs


@settings(max_examples=40)
@given(draws())
def test_right_outputs_of_random_draws_raise_no_alarm(draw: Draw):
    no_alarm(draw.batch, draw.blocks)


@settings(max_examples=40)
@given(cuts())
def test_right_outputs_of_blocks_anywhere_raise_no_alarm(draw: Draw):
    no_alarm(draw.batch, draw.blocks)


def no_alarm(batch: Batch, blocks: Blocks) -> None:
    """Whatever the slots hold that have no meaning, with the target's logits and without."""
    output, target = forward(batch, blocks)
    idle = ~blocks.eval_mask
    for name in ("draft_logits", "aligned_target_logits", "confidence_pred"):
        output[name][idle] = torch.nan
    output["target_ids"][idle] = -100
    for logits in (target, None):
        check = lab.check_forward(output, batch, blocks, target_logits=logits)
        assert check.ok and not found(check), check


@pytest.mark.parametrize("kept_slots", [3, 4])
def test_where_the_anchor_is_given_slot_0_may_be_there_or_not(kept_slots):
    batch = collate(documents("..aaaaaaaaaa", ".aaaaa"), PAD)
    blocks = draw_blocks(batch, 3, 4, seed=1, layout="anchor_given")
    output, target = forward(batch, blocks)
    if kept_slots == 4:
        for name, value in output.items():
            if name != "block_keep_mask":
                output[name] = torch.cat([torch.zeros_like(value[:, :, :1]), value], 2)
    assert lab.check_forward(output, batch, blocks, target_logits=target).ok
    output["target_ids"] = output["target_ids"].roll(1, 2)
    check = lab.check_forward(output, batch, blocks, target_logits=target)
    assert not check.ok
    if kept_slots == 4:
        output["eval_mask"][:, :, 0] = True
        check = lab.check_forward(output, batch, blocks, target_logits=target)
        assert "the given anchor itself is supervised" in found(check)


def test_a_dataclass_and_tensors_of_less_precision_are_checked_too(rows):
    output, target = forward(*rows)
    output["aligned_target_logits"] = output["aligned_target_logits"].bfloat16()
    check = lab.check_forward(DSparkForwardOutput(**output), *rows, target_logits=target)
    assert check.ok and not found(check)


def test_the_sentence_has_the_first_place_and_its_token(rows):
    output, _ = forward(*rows)
    output = plant("one label", output, *rows, None)
    check = lab.check_forward(output, *rows, to_text=lambda token: f"<{token}>")
    label = "row 0, block 0, slot 0, label 4 '<4>'"
    assert f"first {label}" in str(check) and "labels are other tokens: 1 of " in str(check)
    first = check.table.query("verdict == 'broken'").iloc[0]
    assert (first["row"], first["block"], first["slot"], first["key"]) == (0, 0, 0, 4)


# The teacher without the target's logits


@pytest.fixture(scope="module")
def trained() -> tuple[Batch, Blocks, Tensor]:
    """The shipped pair's target on its own conversations."""
    pair = load_pair()
    encoded = [encode(chat, pair.tokenizer) for chat in pair.held_out[:6]]
    batch = collate(encoded, pair.tokenizer.pad_token_id or 0)
    with torch.no_grad():
        logits = pair.target.model(input_ids=batch.input_ids).logits
    return batch, draw_blocks(batch, 24, 5, seed=0), logits


def without_target(trained: Any, shift: int, nan: bool = False) -> Findings:
    batch, blocks, logits = trained
    output, _ = forward(batch, blocks, vocab=4)
    output["draft_logits"] = logits[:, :1, None].expand(*blocks.eval_mask.shape, -1)
    output["aligned_target_logits"] = moved_teacher(output, blocks, logits, shift)
    if nan:
        output["aligned_target_logits"][0, 0, 0, 0] = torch.nan
    return lab.check_forward(output, batch, blocks)


def test_a_trained_target_in_its_place_holds(trained):
    for nan in (False, True):
        check = without_target(trained, 0, nan)
        assert found(check) == ({FAULTS["infinite teacher"]} if nan else set())
        (teacher,) = [found for found in check.found if found.unit == "positions"]
        assert teacher.verdict == "held" and teacher.of > 100


def test_positions_are_counted_once_and_inside_of_their_documents():
    batch = pack(documents(*["a" * 20] * 4), 40, PAD)
    blocks = draw_blocks(batch, 30, 4, seed=0)
    output, _ = forward(batch, blocks)
    vocab = int(batch.input_ids.max()) + 1
    teacher = 20.0 * torch.nn.functional.one_hot(blocks.target_ids, vocab)
    output["aligned_target_logits"] = teacher
    check = lab.check_forward(output, batch, blocks)
    (held,) = [finding for finding in check.found if finding.unit == "positions"]
    docs, labels = blocks.doc_ids.tolist(), blocks.label_indices.tolist()
    places = {
        (row, label)
        for row, block, slot in blocks.eval_mask.nonzero().tolist()
        for label in [labels[row][block][slot]]
        if label < 39 and docs[row][label - 1] == docs[row][label] == docs[row][label + 1]
    }
    assert held.verdict == "held" and held.of == len(places) > 50
    # Of teachers that know nothing there is nothing to tell.
    output, _ = forward(batch, blocks)
    rules = lab.check_forward(output, batch, blocks).table.set_index("rule")["verdict"]
    assert rules["the teacher is the target's distribution behind the token before the label"] == (
        "no case"
    )


@pytest.mark.parametrize(("shift", "side"), [(1, "late"), (-1, "early")])
def test_a_trained_target_beside_its_place_is_seen_by_its_tokens(trained, shift, side):
    check = without_target(trained, shift)
    (odd,) = [finding for finding in check.found if finding.verdict == "likely broken"]
    assert odd.finding.startswith(f"the teacher is one position {side}: ")
    assert not check.ok and odd.unit == "positions" and odd.count > 0.8 * odd.of


def test_a_random_target_that_repeats_its_input_is_not_called_wrong():
    batch = collate(random_chats(6, low=30), 0)
    target = tiny_target(tie_word_embeddings=True)
    with torch.no_grad():
        target.model.get_input_embeddings().weight.mul_(3)
        logits = target.model(input_ids=batch.input_ids).logits
    check = without_target((batch, draw_blocks(batch, 12, 5, seed=0), logits), 0)
    assert check.ok
    assert any("or the target repeats its input" in finding for finding in found(check))


def test_teachers_that_differ_where_blocks_overlap_are_seen(rows):
    output, _ = forward(*rows)
    output["aligned_target_logits"] = output["aligned_target_logits"].flip(2)
    said = "the teachers of one and the same label differ between blocks"
    assert found(lab.check_forward(output, *rows)) == {said}


BAD: list[tuple[dict[str, Any], str]] = [
    ({"target_ids": None}, "output must hold target_ids"),
    ({"target_ids": torch.zeros(2, 8, 3).long()}, "target_ids must be [2, 8, 4], got"),
    ({"eval_mask": torch.zeros(2, 32)}, "eval_mask must be [2, 8, 4], got shape (2, 32)"),
    ({"draft_logits": torch.zeros(2, 8, 4)}, "draft_logits must be [2, 8, 4, vocab], got"),
    ({"confidence_pred": torch.zeros(2, 8, 4).long()}, "confidence_pred must hold floats, got"),
    ({"block_keep_mask": [True]}, "block_keep_mask must be a tensor, got list"),
    ({"target_logits": torch.zeros(2, 9, VOCAB)}, "target_logits must be [2, 22, 80], got"),
]


@pytest.mark.parametrize(("change", "sentence"), BAD, ids=str)
def test_what_is_no_output_of_these_blocks_is_refused(change, sentence, rows):
    output, target = forward(*rows)
    given = output | change
    target = given.pop("target_logits", target)
    with pytest.raises((ValueError, TypeError)) as refused:
        lab.check_forward(given, *rows, target_logits=target)
    assert sentence in str(refused.value)


def test_rows_of_other_blocks_are_refused(rows):
    output, _ = forward(*rows)
    other = collate(documents("aaa", "aa"), 0)
    with pytest.raises(ValueError, match="batch must be the rows of blocks"):
        lab.check_forward(output, other, rows[1])
