"""The shipped pairs: what load_pair gives, and that the figures on the cards are theirs."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from dspark_lab.chats import encode, load_chats
from dspark_lab.evaluate import compare_drafters, evaluate
from dspark_lab.pairs import drafter_names, load_pair
from dspark_lab.recipes import (
    POCKET_DRAFTERS,
    SMOLLM2_TRAINING,
    make_smollm2_drafter,
)


def test_the_pocket_pair_has_six_drafters_and_a_default() -> None:
    assert drafter_names("pocket")[0] == "dspark-k7"
    assert set(drafter_names("pocket")) == set(POCKET_DRAFTERS)


def test_every_pocket_drafter_shares_the_targets_frozen_embedding() -> None:
    for name, recipe in POCKET_DRAFTERS.items():
        pair = load_pair("pocket", name)
        config = pair.drafter.config
        assert (config.block_size, config.has_markov_head) == (
            recipe.block_size,
            recipe.kind != "none",
        )
        for own, shared in (
            (pair.drafter.embed_tokens.weight, pair.target.embed_weight),
            (pair.drafter.lm_head.weight, pair.target.head_weight),
        ):
            assert own.data_ptr() == shared.data_ptr() and not own.requires_grad
        assert not any(p.requires_grad for p in pair.target.model.parameters())


def test_the_markov_head_pays_on_held_out_conversations() -> None:
    """The gain's interval, over 40 conversations, excludes zero by far: see the card."""
    ours, baseline = (load_pair("pocket", name) for name in ("dspark-k7", "dflash-k7"))
    chats = [encode(chat, ours.tokenizer, 512) for chat in ours.held_out[:40]]
    tables = [evaluate(p.drafter, p.target, chats, num_anchors=16) for p in (ours, baseline)]
    gain = compare_drafters(*tables)
    assert gain["low"] > 0
    assert gain["ours"] > 2.5


def test_no_held_out_question_was_trained_on() -> None:
    pair = load_pair()
    asked = [
        {chat.messages[-2]["content"] for chat in chats} for chats in (pair.chats, pair.held_out)
    ]
    assert not asked[0] & asked[1]


def test_a_name_that_does_not_ship_is_refused() -> None:
    with pytest.raises(ValueError, match="pair must be one of .*'smollm3'"):
        load_pair("smollm3")
    with pytest.raises(ValueError, match="drafter must be one of .*'dspark-k7'.*'eagle'"):
        load_pair("pocket", "eagle")


@pytest.mark.slow
def test_the_drafter_of_smollm2_predicts_its_answers() -> None:
    pair = load_pair("smollm2")
    assert pair.target.vocab_size == 49152
    chats = [encode(chat, pair.tokenizer, 512) for chat in pair.held_out[:12]]
    table = evaluate(pair.drafter, pair.target, chats, num_anchors=8)
    assert table["tau"].mean() > 1.5


@pytest.mark.slow
def test_the_recipe_of_smollm2_runs_in_a_reduced_form(tmp_path: Path) -> None:
    config = replace(
        SMOLLM2_TRAINING, steps=2, batch_size=2, num_anchors=4, max_length=96, checkpoint_every=0
    )
    make_smollm2_drafter(tmp_path, load_chats()[:6], config, progress=False)
    assert (tmp_path / "dspark-k7" / "model.safetensors").exists()
    facts = json.loads((tmp_path / "facts.json").read_text())
    assert (facts["steps"], facts["conversations"]) == (2, 6)
