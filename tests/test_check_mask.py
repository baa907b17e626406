"""`check_mask` names every planted fault, alone and in pairs, and is silent on right masks."""

import functools
import itertools
import random
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

import dspark_lab as lab
from dspark_lab.attention import ContextRanges, Findings, View, block_mask, dense_mask, mask_mod
from dspark_lab.blocks import Blocks, cut_blocks, draw_blocks
from dspark_lab.chats import Batch, collate, pack
from dspark_lab.common import context_doc_ids
from tests.draws import MASK, PAD
from tests.masks import Problem, Rule
from tests.samples import documents

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:.*torch.jit.script_method"),
]

PROBLEM = Problem(
    anchors=[[2, 6, 13, 17, 26, 30, 19, 0], [7, 3, 11, 21, 24, 28, 0, 0]],
    keep=[[True] * 6 + [False] * 2, [True] * 6 + [False] * 2],
    docs=[
        [0] * 10 + [1] * 12 + [2] * 11 + [-1] * 3,
        [0] * 9 + [1] * 8 + [2] * 15 + [-1] * 4,
    ],
    size=4,
)
BLOCKS = PROBLEM.blocks
BATCH = replace(
    Batch.of_tokens(torch.arange(72).view(2, 36), torch.ones(2, 36)),
    attention_mask=torch.tensor(PROBLEM.docs) >= 0,
)
QUERIES, SEQ_LEN = 32, 36

# Each fault: what a rule or a form has otherwise, and what the check says.
FAULTS: dict[str, tuple[dict[str, Any], set[str]]] = {
    "includes the anchor": ({"end": 1}, {"the context includes the anchor"}),
    "one short": ({"end": -1}, {"the context ends one token short"}),
    "future": (
        {"to_document_end": True},
        {"the context includes the anchor", "tokens after the anchor are visible"},
    ),
    "begins late": ({"begin": 1}, {"the context begins one token late"}),
    "begins early": (
        {"begin": -1},
        {"the context begins one token early, in the document before"},
    ),
    "earlier documents": ({"earlier_documents": True}, {"an earlier document is visible"}),
    "later documents": ({"later_documents": True}, {"a later document is visible"}),
    "padding": ({"padding": True}, {"padding is visible"}),
    "block before": ({"context_of": -1}, {"the context is that of the block before"}),
    "block after": ({"context_of": 1}, {"the context is that of the block after"}),
    "shuffled": ({"shuffled": True}, {"the context is that of another block"}),
    "rows swapped": ({"swap_rows": True}, {"a row has another row's mask"}),
    "blocks of 5": ({"size": 5}, {"a block is taken to have 5 slots, not 4"}),
    "blocks of 3": ({"size": 3}, {"a block is taken to have 3 slots, not 4"}),
    "causal": ({"later": False}, {"blocks are causal, as JetSpec's"}),
    "anti-causal": ({"earlier": False}, {"blocks are causal against their order"}),
    "no diagonal": ({"itself": False}, {"slots do not see themselves"}),
    "slot 0 hidden": ({"hidden_slot": 0}, {"slot 0 is hidden from its own block"}),
    "earlier blocks": ({"earlier_blocks": True}, {"earlier blocks are visible"}),
    "later blocks": ({"later_blocks": True}, {"later blocks are visible"}),
    "all blocks": (
        {"earlier_blocks": True, "later_blocks": True},
        {"other blocks are visible"},
    ),
    "dummies see token 0": ({"dummies_see_token": 0}, {"dummy blocks see context"}),
    "keep ignored": ({"ignore_keep": True}, {"dummy blocks see context, as if they were kept"}),
    "dummies hidden": (
        {"hidden_dummies": True},
        {"dummy blocks do not see themselves"},
    ),
    "window": ({"window": 5}, {"the context is cut off at a window of 5"}),
    "window of the anchor": (
        {"window": 5, "window_of_anchor": True},
        {"a window of 5 is counted from the anchor, not from each slot"},
    ),
    "inverted": ({"form": "inverted"}, {"the mask is inverted: it hides what it should show"}),
    "transposed": (
        {"form": "transposed"},
        {"the mask is transposed: keys are rows, queries columns"},
    ),
    "sign": ({"form": "sign"}, {"the sign is wrong: hidden pairs are +inf"}),
    "slots first": ({"form": "slots first"}, {"the slots' keys come before the context's"}),
    "slot by slot": (
        {"form": "slot by slot"},
        {"queries are ordered slot by slot, not block by block"},
    ),
    "one head": ({"form": "one head"}, {"a head sees other pairs than head 0"}),
}
VARIANTS = {"causal", "dummies hidden", "window"}


def in_form(mask: torch.Tensor, form: str) -> torch.Tensor:
    if form == "inverted":
        return ~mask
    if form == "transposed":
        return mask.transpose(-1, -2)
    if form == "sign":
        return torch.zeros(mask.shape).masked_fill(~mask, torch.inf)
    if form == "slots first":
        return mask.roll(QUERIES, 2)
    if form == "one head":
        heads = mask[:, None].repeat(1, 3, 1, 1)
        heads[:, 1, 3, 2] ^= True
        return heads
    order = torch.arange(QUERIES).view(8, 4).T.flatten()
    return mask[:, order][:, :, torch.cat([torch.arange(SEQ_LEN), SEQ_LEN + order])]


FORMS = ["inverted", "slot by slot", "slots first", "one head", "transposed", "sign"]
# Pairs that plant the same thing twice, that hide each other, or in which one is the other's case.
ALONE = [
    {"includes the anchor", "future"},
    {"begins early", "earlier documents"},
    {"future", "shuffled"},  # blocks of one document see the same
    {"block before", "shuffled"},
    {"block after", "shuffled"},
    {"causal", "anti-causal"},
    {"earlier blocks", "later blocks"},
    {"dummies see token 0", "keep ignored"},
]


@functools.cache
def masked(changes: tuple[tuple[str, Any], ...]) -> torch.Tensor:
    return Rule(**dict(changes)).mask(PROBLEM)


def planted(*names: str) -> tuple[torch.Tensor, set[str]]:
    """The mask with these faults, and what is to be said of it."""
    changes = {key: value for name in names for key, value in FAULTS[name][0].items()}
    forms = [FAULTS[name][0]["form"] for name in names if "form" in FAULTS[name][0]]
    changes.pop("form", None)
    mask = masked(tuple(sorted(changes.items())))
    for form in sorted(forms, key=FORMS.index):
        mask = in_form(mask, form)
    return mask, set.union(*(FAULTS[name][1] for name in names))


def found(check: Findings) -> set[str]:
    return {finding.finding for finding in check.found} - {""}


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_named(name):
    mask, said = planted(name)
    check = lab.check_mask(mask, BLOCKS, BATCH)
    assert found(check) == said
    assert check.ok == (name in VARIANTS)


def pairs() -> list[tuple[str, str]]:
    """Two faults that do not plant the same thing and of which none hides the other."""
    return [
        pair
        for pair in itertools.combinations(FAULTS, 2)
        if (
            FAULTS[pair[0]][0].keys().isdisjoint(FAULTS[pair[1]][0]) or "form" in FAULTS[pair[0]][0]
        )
        and set(pair) not in ALONE
    ]


@pytest.mark.parametrize("first", list(FAULTS)[:-1])
def test_of_two_planted_faults_both_are_named(first):
    for pair in pairs():
        if pair[0] == first:
            mask, said = planted(*pair)
            assert found(lab.check_mask(mask, BLOCKS, BATCH)) == said, pair


def test_the_planted_faults_are_many():
    assert len(FAULTS) - len(VARIANTS) >= 20 and len(pairs()) > 400


def test_hidden_context_and_visible_blocks_are_no_other_form():
    anchors = torch.tensor([[12, 20, 28]])
    blocks = Blocks.of(anchors, anchors > 0, seq_len=32, block_size=4)
    mask = (torch.arange(44) >= 32).expand(12, -1)
    said = {"no context is visible", "other blocks are visible"}
    assert found(lab.check_mask(mask, blocks)) == said


def test_blocks_that_are_cut_one_slot_early_are_seen():
    slot, mask = torch.arange(QUERIES), Rule().mask(PROBLEM)
    mask[:, :, SEQ_LEN:] = (slot[:, None] + 1) // 4 == slot // 4
    said = {"later blocks are visible", "slot 3 sees nothing of its block"}
    assert found(lab.check_mask(mask, BLOCKS, BATCH)) == said


# The window that is meant


@pytest.mark.parametrize("window", [4, 6])
def test_a_window_is_held_against_the_one_that_is_meant(window):
    mask = Rule(window=5).mask(PROBLEM)
    assert not found(lab.check_mask(mask, BLOCKS, window=5))
    check = lab.check_mask(mask, BLOCKS, window=window)
    assert found(check) == {f"the window is 5, not {window}"} and not check.ok
    check = lab.check_mask(Rule().mask(PROBLEM), BLOCKS, window=window)
    assert found(check) == {f"the window of {window} is not applied"} and not check.ok


def test_a_window_comes_with_other_faults():
    check = lab.check_mask(Rule(window=5, end=1).mask(PROBLEM), BLOCKS, window=6)
    assert found(check) == {"the window is 5, not 6", "the context includes the anchor"}


def test_one_long_context_that_begins_late_is_cut_off_at_a_window():
    blocks = Blocks.of(torch.tensor([[9]]), torch.tensor([[True]]), seq_len=12, block_size=1)
    check = lab.check_mask(dense_mask(ContextRanges.of(blocks, View(3))), blocks)
    assert found(check) == {"the context is cut off at a window of 3"} and check.ok


# Variants


@pytest.mark.parametrize(
    ("name", "variant"),
    [("causal", "causal"), ("dummies hidden", "hidden_dummies"), ("window", "window")],
)
def test_a_variant_passes_unless_another_one_is_meant(name, variant):
    (mask, said), (right, _) = planted(name), planted("transposed")
    right = right.transpose(1, 2)
    for variants, ok in ((None, True), ([variant], True), ([], False)):
        check = lab.check_mask(mask, BLOCKS, variants=variants)
        assert found(check) == said and check.ok == ok
    assert lab.check_mask(right, BLOCKS, variants=[]).ok
    assert not lab.check_mask(right, BLOCKS, variants=[variant]).ok


# Forms


def test_a_function_and_a_block_mask_are_read_like_the_dense_mask():
    ranges = ContextRanges.of(BLOCKS)
    rule = mask_mod(ranges)

    def faulty(b, h, q, k):
        return rule(b, h, q, k) | (k == ranges.end[b, q // 4])

    tiles = create_block_mask(
        faulty, 2, None, QUERIES, SEQ_LEN + QUERIES, device="cpu", BLOCK_SIZE=16
    )
    for mine in (faulty, tiles):
        check = lab.check_mask(mine, BLOCKS)
        assert "the context includes the anchor" in found(check)
        if mine is tiles:
            verdicts = {finding.rule: finding.verdict for finding in check.found}
            assert verdicts["the tile lists fit the rule"] == "held"


def test_heads_of_a_function_are_compared():
    rule = mask_mod(ContextRanges.of(BLOCKS))
    for odd in range(3):
        check = lab.check_mask(
            lambda b, h, q, k, odd=odd: rule(b, h, q, k) & (h != odd), BLOCKS, heads=3
        )
        assert found(check) == {f"a head sees other pairs than head {int(odd == 0)}"}
        assert f"first head {odd}, row 0, block 0" in str(check)


def test_a_block_mask_may_be_padded_to_multiples_of_128():
    ranges = ContextRanges.of(BLOCKS)
    rule = mask_mod(ranges)

    def padded(b, h, q, k):
        inside = (q < QUERIES) & (k < SEQ_LEN + QUERIES)
        return rule(b, h, q.clamp(max=QUERIES - 1), k.clamp(max=ranges.keys - 1)) & inside

    def leaking(b, h, q, k):
        return padded(b, h, q, k) | (k == 100)

    for rule_of, said in ((padded, set()), (leaking, {"keys behind the last slot are visible"})):
        tiles = create_block_mask(rule_of, 2, None, 128, 128, device="cpu")
        assert found(lab.check_mask(tiles, BLOCKS)) == said


def tiles_with(change: str) -> BlockMask:
    tiles = block_mask(ContextRanges.of(BLOCKS), 8)
    lists = {name: getattr(tiles, name) for name in BLOCK_LISTS}
    if change == "empty":
        lists["kv_num_blocks"] = (lists["kv_num_blocks"] - 1).clamp(min=0)
    elif change == "full":
        numbers, indices = lists["kv_num_blocks"], lists["kv_indices"]
        lists["full_kv_num_blocks"], lists["full_kv_indices"] = numbers, indices
        lists["kv_num_blocks"] = torch.zeros_like(numbers)
    else:
        lists["q_num_blocks"] = torch.zeros_like(lists["q_num_blocks"])
    rest = {"BLOCK_SIZE": tiles.BLOCK_SIZE, "mask_mod": tiles.mask_mod}
    return BlockMask(seq_lengths=tiles.seq_lengths, **lists, **rest)


BLOCK_LISTS = [
    f"{which}_{what}"
    for which in ("kv", "full_kv", "q", "full_q")
    for what in ("num_blocks", "indices")
]
TILES = {
    "empty": "the tile lists call a tile empty that its rule sees",
    "full": "the tile lists call a tile full that its rule hides in part",
    "backward": "the lists for the backward pass differ from those for the forward pass",
}


@pytest.mark.parametrize("change", TILES)
def test_tile_lists_are_held_against_their_rule(change):
    check = lab.check_mask(tiles_with(change), BLOCKS)
    assert TILES[change] in found(check) <= set(TILES.values()) and not check.ok


def test_one_mask_for_all_rows_is_called_that_of_another_row():
    mask = Rule().mask(PROBLEM)
    check = lab.check_mask(mask[0], BLOCKS, BATCH)
    assert found(check) == {"a row has another row's mask"}
    assert "1 of 2 rows, first row 1, which has that of row 0" in str(check)


# What is said


def test_the_sentence_has_how_often_and_the_first_place_with_its_token():
    mask = Rule(end=1).mask(PROBLEM)
    said = "broken: the context includes the anchor: 12 of 12 blocks, first row 0, block 0, key 2"
    assert f"- {said}\n" in str(lab.check_mask(mask, BLOCKS)) + "\n"
    assert f"{said} (token 2)" in str(lab.check_mask(mask, BLOCKS, BATCH))
    check = lab.check_mask(mask, BLOCKS, BATCH, to_text=lambda token: f" <{token}>")
    assert f"{said} ' <2>'" in str(check)
    row = check.table.query("verdict == 'broken'").iloc[0]
    assert (row["count"], row["of"], row["unit"], row["pairs"]) == (12, 12, "blocks", 48)
    assert (row["row"], row["block"], row["slot"], row["key"]) == (0, 0, 0, 2)
    assert row["rule"] == "the anchor itself is hidden" and row["token"] == " <2>"


def test_blocks_that_were_drawn_know_the_tokens_around_their_anchors():
    batch = collate(documents("..aaaaaa"), PAD)
    blocks = draw_blocks(batch, 2, 2, seed=0)
    mask = dense_mask(ContextRanges.of(blocks))
    anchor = int(blocks.anchor_positions[0, 0])
    mask[0, 0, anchor] = True
    place = f"first block 0, key {anchor} (token {anchor})"
    assert f"1 of 2 blocks, {place}" in str(lab.check_mask(mask, blocks))


def test_padding_is_known_from_rows_or_from_positions():
    batch = collate(documents("aaaaaaaa", "aaaa"), PAD)
    blocks = draw_blocks(batch, 2, 2, seed=0)
    mask = dense_mask(ContextRanges.of(blocks))
    mask[1, :, 4] = True  # the first token of the padding
    for options in ({}, {"batch": batch}):
        assert found(lab.check_mask(mask, blocks, **options)) == {"padding is visible"}


def test_rules_that_hold_and_rules_without_a_case_are_in_the_table():
    table = lab.check_mask(Rule().mask(PROBLEM), BLOCKS).table.set_index("rule")["verdict"]
    assert table["other blocks are hidden"] == "held"
    assert table["padding is hidden"] == "no case"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_an_additive_mask_may_have_been_made_in_a_narrower_dtype(dtype):
    hidden = torch.finfo(dtype).min
    mask = torch.zeros(RIGHT.shape, dtype=torch.float64).masked_fill(~RIGHT, hidden)
    assert not found(lab.check_mask(mask, BLOCKS))


# Refusals

RIGHT = Rule().mask(PROBLEM)
ZEROS = torch.zeros(RIGHT.shape)
BAD: list[tuple[Any, str]] = [
    (RIGHT[:, :, :-1], "keys (36 tokens of context, then the slots), got 32 and 67"),
    (RIGHT[:, :, :36], "the blocks' own slots are keys too"),
    (RIGHT[:, :24, :60], "this looks like blocks of 3 slots"),
    (torch.zeros(2, 32, 100).bool(), "this looks like a context of 68 tokens"),
    (RIGHT[:, None].int(), "a float to add to scores, 0 visible, got torch.int32"),
    (RIGHT[0, 0], "[batch, heads, query, key], got shape (68,)"),
    (RIGHT.repeat(2, 1, 1)[:3], "mine must have 1 or 2 rows, as blocks, got shape (3, 32, 68)"),
    (RIGHT.float(), "0 where visible and -inf, or the dtype's minimum, where hidden, got 1.0; "),
    (ZEROS - 1e9, "got -1000000000.0"),
    (ZEROS * torch.nan, "got nan"),
    (lambda b, h, q, k: 1 / 0, "mine, called as a mask function, failed: division by zero"),
    (lambda b, h, q, k: q + k, "must return a bool, got torch.int64"),
    ("causal", "mine must be a tensor or a BlockMask or a function, got 'causal'"),
]


@pytest.mark.parametrize(("mine", "sentence"), BAD, ids=[said for _, said in BAD])
def test_what_is_no_mask_of_these_blocks_is_refused(mine, sentence):
    with pytest.raises((ValueError, TypeError)) as refused:
        lab.check_mask(mine, BLOCKS)
    assert sentence in str(refused.value)


def test_a_block_mask_of_other_sizes_is_refused():
    tiles = create_block_mask(lambda b, h, q, k: q >= k, 2, None, 36, 68, device="cpu")
    with pytest.raises(ValueError, match="mine must have 32 queries"):
        lab.check_mask(tiles, BLOCKS)


# Right masks


def random_blocks(rng: random.Random) -> tuple[Batch, Blocks]:
    """Blocks on packed, padded or single rows, sampled or anywhere, in any order, of a layout."""
    rows, seq_len, count = rng.randint(1, 3), rng.randint(2, 40), rng.randint(1, 9)
    size, layout = rng.randint(1, 6), rng.choice(["anchor_predicts", "anchor_given"])
    size = max(size, 2) if layout == "anchor_given" else size
    marks = ["".join(rng.choices("aaa.", k=rng.randint(1, seq_len))) for _ in range(rows)]
    if rng.random() < 0.5:
        more = ["".join(rng.choices("aaa.", k=rng.randint(1, min(seq_len, 12)))) for _ in range(6)]
        batch = pack(documents(*marks, *more), seq_len, PAD)
    else:
        batch = collate(documents(*marks), PAD, seq_len)
    if rng.random() < 0.6:
        seed = rng.randrange(10**6)
        return batch, draw_blocks(batch, count, size, mask_token_id=MASK, seed=seed, layout=layout)
    shape = len(batch.input_ids), count
    seed = torch.Generator().manual_seed(rng.randrange(10**6))
    anchors = torch.randint(seq_len, shape, generator=seed)
    kept = torch.rand(shape, generator=seed) < rng.choice([0.0, 0.7, 1.1])
    if rng.random() < 0.5:
        return batch, cut_blocks(batch, anchors, kept, size, mask_token_id=MASK, layout=layout)
    docs = context_doc_ids(batch.seq_lens, seq_len, "cpu") if rng.random() < 0.8 else None
    sizes = {"seq_len": seq_len, "block_size": size, "doc_ids": docs, "layout": layout}
    return batch, Blocks.of(anchors, kept, **sizes)


def right_mask(rng: random.Random) -> tuple[str, Any, Blocks, dict[str, Any]]:
    """A right mask of any form or variant, and what the caller says of it."""
    batch, blocks = random_blocks(rng)
    window = rng.choice([None, None, rng.randint(2, 40)])
    variant = rng.choice(["", "", "causal", "hidden"])
    ranges = ContextRanges.of(blocks, View(window, variant == "causal"))
    mask, options = dense_mask(ranges), {}
    if rng.random() < 0.5 and window is not None:
        options["window"] = window
    if rng.random() < 0.5:
        options["batch"] = batch
    if variant == "hidden":
        kept = blocks.block_keep_mask.repeat_interleave(blocks.block_size, 1)
        mask &= kept[:, :, None]
    form = rng.choice(["bool", "4-d", "additive", "minimum", "function", "tiles"])
    if variant == "hidden":
        form = rng.choice(["bool", "additive"])
    if form == "4-d":
        mask = mask[:, None]
    elif form in ("additive", "minimum"):
        dtype = rng.choice([torch.float32, torch.bfloat16])
        hidden = -torch.inf if form == "additive" else torch.finfo(dtype).min
        mask = torch.zeros(mask.shape, dtype=dtype).masked_fill(~mask, hidden)
    elif form == "function":
        mask = mask_mod(ranges)
    elif form == "tiles":
        mask = block_mask(ranges, rng.choice([8, 16, 128]))
    return f"{variant} {form}", mask, blocks, options


def false_alarms(seeds: range) -> list[str]:
    alarms = []
    for seed in seeds:
        name, mask, blocks, options = right_mask(random.Random(seed))
        check = lab.check_mask(mask, blocks, **options)
        named = {finding.verdict for finding in check.found} - {"held", "no case", "variant"}
        if not check.ok or named or ("window" in options and "window" in "".join(found(check))):
            alarms.append(f"{seed} {name}: {check}")
    return alarms


def test_right_masks_raise_no_alarm():
    assert false_alarms(range(250)) == []


@pytest.mark.slow
def test_ten_thousand_right_masks_raise_no_alarm():
    assert false_alarms(range(250, 10_000)) == []
