"""Variants of drafters: layouts, windows, reduced vocabularies, soft caps, YaRN."""

import itertools
import random
from typing import Any

import pytest
import torch
import transformers

from dspark_lab.blocks import Blocks, cut_blocks, draw_blocks, predicted_slots
from dspark_lab.chats import Batch
from dspark_lab.decoding import decode
from dspark_lab.model import Drafter, Target, Yarn, load_drafter, save_drafter
from dspark_lab.model.layers import rope
from dspark_lab.rates import evaluate
from dspark_lab.training import TrainConfig, train
from tests import oracle
from tests.samples import random_chats, tiny_drafter, tiny_target

pytestmark = pytest.mark.usefixtures("one_thread")

WINDOW = {"layer_types": ("sliding_attention", "full_attention"), "sliding_window": 5}
VARIANTS: dict[str, dict[str, Any]] = {
    "anchor given": {"sample_from_anchor": False},
    "anchor given, recurrent head": {"sample_from_anchor": False, "markov_head_type": "rnn"},
    "window": WINDOW,
    "window, both directions": WINDOW | {"is_causal": False},
    "causal": {"is_causal": True},
    "reduced vocabulary": {"draft_vocab_size": 20},
    "soft cap and factor": {"final_logit_softcapping": 3.0, "logit_scale": 0.5},
    "yarn": {"yarn": Yarn(factor=4.0, original_max_position_embeddings=64)},
    "all": WINDOW
    | {"sample_from_anchor": False, "draft_vocab_size": 20, "final_logit_softcapping": 3.0},
}
each_variant = pytest.mark.parametrize("name", VARIANTS)


def made(name: str, target: Target) -> Drafter:
    """A drafter with random heads, so that nothing of it is idle."""
    drafter = tiny_drafter(block_size=4, **VARIANTS[name])
    if drafter.d2t is not None:
        ids = torch.randperm(64, generator=torch.Generator().manual_seed(1))[:20].sort().values
        drafter.d2t.copy_(ids - torch.arange(20))
    drafter.use_target_embeddings(target.embed_weight, target.head_weight, target.logit_rule)
    for parameter in drafter.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.3)
    return drafter.eval()


@each_variant
@torch.no_grad()
def test_a_proposal_is_what_the_training_forward_predicts(name):
    """For rows of unequal length, each with the tokens that were drafted as its text."""
    target = tiny_target()
    drafter, lengths = made(name, target), [9, 4]
    layers = list(drafter.config.target_layer_ids)
    texts = [torch.randint(0, 60, (length + 1,)) for length in lengths]
    cache = drafter.start_cache(2, 20)
    features = [target.features(text[None, :-1], layers).context for text in texts]
    padded = torch.nn.utils.rnn.pad_sequence([x[0] for x in features], batch_first=True)
    drafter.read(padded, cache, lengths)
    seen: list[torch.Tensor] = []

    def choose(logits: torch.Tensor) -> torch.Tensor:
        seen.append(logits)
        return logits.argmax(dim=-1)

    proposal = drafter.propose(torch.stack([text[-1] for text in texts]), cache, choose)
    assert proposal.tokens.shape == (2, drafter.config.predicted)
    for row, text in enumerate(texts):
        whole = torch.cat([text, proposal.tokens[row]])[None]
        context = target.features(whole, layers).context
        anchor, keep = torch.tensor([[lengths[row]]]), torch.ones(1, 1, dtype=torch.bool)
        where = {"anchor_positions": anchor, "block_keep_mask": keep}
        output = drafter(whole, context, torch.ones_like(whole, dtype=torch.bool), **where)
        for slot, logits in enumerate(seen):
            expected = output.draft_logits[0, 0, slot]
            torch.testing.assert_close(logits[row], expected, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(
            proposal.confidence[row], output.confidence_pred[0, 0], atol=1e-4, rtol=1e-4
        )


@each_variant
def test_decoding_stays_the_targets_own(name):
    target, prompts = tiny_target(max_position_embeddings=64), [[1, 2, 3], [4, 5], [6] * 7]
    drafter = made(name, target)
    plain = decode(target, None, prompts, max_new_tokens=12, end_ids=())
    drafted = decode(target, drafter, prompts, max_new_tokens=12, end_ids=())
    assert drafted.tokens == plain.tokens
    assert drafted.trace["slot"].max() == drafter.config.predicted - 1
    ids = drafter.draft_ids
    if ids is not None:
        assert set(drafted.trace["token"]) <= set(ids.tolist())


def test_no_more_is_drafted_than_a_block_predicts():
    target = tiny_target(max_position_embeddings=64)
    drafter = made("anchor given", target)
    decode(target, drafter, [[1, 2]], max_new_tokens=5, draft_length=3)
    with pytest.raises(ValueError, match="at most block_size less the anchor, 3, got 4"):
        decode(target, drafter, [[1, 2]], max_new_tokens=5, draft_length=4)
    with pytest.raises(ValueError, match="block_size must be at least 2 .* got 1"):
        predicted_slots(1, "anchor_given")


@each_variant
def test_a_few_steps_of_training_lower_the_loss_and_evaluate(name, tmp_path):
    target, chats = tiny_target(), random_chats(8)
    drafter = made(name, target)
    config = TrainConfig(steps=6, batch_size=4, num_anchors=6, learning_rate=5e-3, warmup_steps=0)
    history = train(drafter, target, chats, config, out=tmp_path / "run", progress=False)
    losses = history.table()["loss"]
    assert losses.iloc[-1] < losses.iloc[0]
    table = evaluate(drafter, target, chats)
    slots = [column for column in table.columns if column.startswith("accept_")]
    assert len(slots) == drafter.config.predicted
    rates = table[slots].to_numpy()
    assert (0 <= rates).all() and (rates <= 1).all()


def granite() -> Target:
    """A random target that divides its logits."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.3}
    config = transformers.GraniteConfig(**sizes, logits_scaling=4.0)
    return Target(transformers.GraniteForCausalLM(config))


@pytest.mark.parametrize("name", ["anchor given", "reduced vocabulary"])
@pytest.mark.parametrize("head", ["the target's", "another"])
@torch.no_grad()
def test_the_teacher_is_the_target_whatever_the_drafter_was_loaded_with(name, head, tmp_path):
    target, (item,) = granite(), random_chats(1)
    drafter = made(name, target)
    if head == "another":
        drafter.lm_head.weight.copy_(torch.randn_like(drafter.lm_head.weight))
    save_drafter(drafter, tmp_path / "drafter", include_embeddings=True)
    alone = load_drafter(tmp_path / "drafter")
    table = evaluate(alone, target, [item])
    ids = item.input_ids[None]
    features = target.features(ids, drafter.config.target_layer_ids)
    q = target.model(ids).logits[0].softmax(dim=-1)
    first, place = [], alone.config.predicted
    for anchor in range(len(item.input_ids) - place):
        if not item.loss_mask[anchor : anchor + place + 1].all():
            continue
        where = {"anchor_positions": torch.tensor([[anchor]])}
        where["block_keep_mask"] = torch.ones(1, 1, dtype=torch.bool)
        output = alone(ids, features.context, item.loss_mask[None], **where)
        p = output.draft_logits[0, 0, 0].softmax(dim=-1)
        first.append(sum(min(a, b) for a, b in zip(p.tolist(), q[anchor].tolist(), strict=True)))
    assert table["accept_0"].item() == pytest.approx(sum(first) / len(first), rel=1e-4)


def test_a_drafter_of_another_vocabulary_is_not_evaluated():
    with pytest.raises(ValueError, match=r"must be \[vocab, hidden\] = \(60, 32\), got shape"):
        evaluate(tiny_drafter(vocab_size=60, mask_token_id=59), tiny_target(), random_chats(1))


def test_softmaxes_over_the_seen_tokens_alone_need_a_whole_vocabulary(tmp_path):
    target = tiny_target()
    drafter, config = made("reduced vocabulary", target), TrainConfig(steps=1, vocabulary="seen")
    with pytest.raises(ValueError, match="'full' for a drafter of a reduced vocabulary"):
        train(drafter, target, random_chats(8), config, out=tmp_path / "run", progress=False)


@pytest.mark.parametrize("factor, theta, size", [(4.0, 1e6, 128), (32.0, 1e4, 64), (1.0, 1e4, 8)])
@pytest.mark.parametrize(
    "given",
    [
        {},
        {"beta_fast": 16.0, "beta_slow": 2.0},
        {"attention_factor": 0.8},
        {"mscale": 1.0, "mscale_all_dim": 0.5},
        {"truncate": False},
    ],
    ids=str,
)
def test_yarn_turns_as_transformers_does(factor, theta, size, given):
    yarn = Yarn(factor=factor, original_max_position_embeddings=4096, **given)
    config = tiny_drafter(head_dim=size, rope_theta=theta, yarn=yarn).config
    parameters = {"rope_type": "yarn", "factor": factor, "rope_theta": theta, **given}
    parameters["original_max_position_embeddings"] = 4096
    theirs = transformers.Qwen3Config(
        head_dim=size, rope_parameters=parameters, max_position_embeddings=4096
    )
    function = transformers.modeling_rope_utils.ROPE_INIT_FUNCTIONS["yarn"]
    frequency, scale = function(theirs, "cpu")
    cos, sin = rope(torch.arange(50)[None], config, torch.float32)
    angle = torch.arange(50)[:, None] * frequency
    torch.testing.assert_close(cos[0, 0], scale * angle.cos(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(sin[0, 0], scale * angle.sin(), atol=1e-5, rtol=1e-5)


def test_where_the_anchor_is_given_slot_k_predicts_token_a_plus_k():
    """By a loop over slots: labels, previous tokens, supervision and inputs."""
    rng = random.Random(3)
    for _ in range(50):
        seq_len, size, count = rng.randint(2, 12), rng.randint(2, 5), rng.randint(1, 4)
        ids = torch.arange(100, 100 + seq_len)[None]
        supervised = torch.tensor([[rng.random() < 0.8 for _ in range(seq_len)]])
        anchors = sorted(rng.sample(range(seq_len), min(count, seq_len)))
        batch = Batch.of_tokens(ids, supervised)
        keep = torch.ones(1, len(anchors), dtype=torch.bool)
        at = torch.tensor([anchors]), keep
        blocks = cut_blocks(batch, *at, size, mask_token_id=7, layout="anchor_given")
        assert (blocks.block_size, blocks.predicted) == (size, size - 1)
        for n, anchor in enumerate(anchors):
            assert blocks.noise_ids[0, n].tolist() == [100 + anchor] + [7] * (size - 1)
            assert blocks.position_ids[0, n].tolist() == [anchor + k for k in range(size)]
            unbroken = True
            for k in range(1, size):
                label = anchor + k
                unbroken = unbroken and label < seq_len and bool(supervised[0, label])
                assert int(blocks.label_indices[0, n, k - 1]) == label
                assert bool(blocks.eval_mask[0, n, k - 1]) == unbroken
                if label < seq_len:
                    assert int(blocks.target_ids[0, n, k - 1]) == 100 + label
                    assert int(blocks.prev_ids[0, n, k - 1]) == 100 + label - 1


def test_blocks_of_anchors_alone_are_those_of_a_batch_that_is_all_supervised():
    for layout, packed in itertools.product(("anchor_predicts", "anchor_given"), (False, True)):
        lengths = [[4, 3, 5], [6, 6, 0]] if packed else [[12], [12]]
        ids = torch.arange(24).view(2, 12)
        remaining, positions = oracle.packed_rows(lengths, 12)
        batch = Batch.of_tokens(
            ids,
            torch.ones(2, 12, dtype=torch.bool),
            doc_remaining=torch.tensor(remaining),
            position_ids=torch.tensor(positions),
            seq_lens=torch.tensor(lengths),
        )
        drawn = draw_blocks(batch, 4, 3, seed=5, layout=layout)
        anchors, keep = drawn.anchor_positions, drawn.block_keep_mask
        sizes: dict[str, Any] = {"seq_len": 12, "block_size": 3, "layout": layout}
        found = Blocks.of(anchors, keep, doc_ids=drawn.doc_ids if packed else None, **sizes)
        for part in ("label_indices", "prev_indices", "position_ids", "eval_mask", "doc_ids"):
            assert torch.equal(getattr(found, part), getattr(drawn, part)), part
        assert (found.noise_ids == -1).all() and (found.target_ids == -1).all()
    with pytest.raises(ValueError, match=r"in the row, \[0, 11\], got 0 to 12"):
        Blocks.of(torch.tensor([[0, 12]]), keep[:1, :2], seq_len=12, block_size=3)
    falling = torch.tensor([[1, 0, 0]])
    with pytest.raises(ValueError, match="must never fall"):
        Blocks.of(torch.tensor([[1]]), keep[:1, :1], seq_len=3, block_size=3, doc_ids=falling)
