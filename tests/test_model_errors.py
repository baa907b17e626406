"""What the model refuses: one wrong argument at a time, in one table for each door.

That kinds, shapes and devices are checked by annotation is the subject of `test_checks`; here each
door shows it once or twice, and every check that is written by hand.
"""

import math
import re
from dataclasses import replace

import pytest
import torch

from dspark_lab.blocks import draw_blocks
from dspark_lab.chats import Batch
from dspark_lab.model import (
    DrafterConfig,
    Slots,
    build_markov_head,
    dspark_objective,
    load_drafter,
    output_objective,
    save_drafter,
)
from tests.samples import tiny_drafter, tiny_target

pytestmark = pytest.mark.usefixtures("one_thread")

IDS = torch.arange(9).view(1, 9)
YES = torch.ones(1, 9, dtype=torch.bool)


def config(**changes):
    """A drafter's configuration as its file holds it; ``...`` leaves a field out."""
    values = tiny_drafter().config.to_dict() | changes
    return DrafterConfig.from_dict({k: v for k, v in values.items() if v is not ...})


def forward(**changes):
    given = {"input_ids": IDS, "loss_mask": YES, "target_hidden_states": torch.zeros(1, 9, 64)}
    given["target_last_hidden_states"] = torch.zeros(1, 9, 32)
    return tiny_drafter()(**given | changes)


def forward_of_blocks(block_size=3, mask_token_id=63, features=None):
    blocks = draw_blocks(Batch.of_tokens(IDS, YES), 2, block_size, mask_token_id=mask_token_id)
    return tiny_drafter().slots(blocks, torch.zeros(1, 9, 64) if features is None else features)


def objective(**changes):
    """Options of the objective; the rest are the slots' fields and the weights."""
    given = {
        "hidden": torch.zeros(2, 3, 4, 5),
        "latent": torch.zeros(2, 3, 4, 3),
        "confidence_pred": torch.zeros(2, 3, 4),
        "target_hidden": torch.zeros(2, 3, 4, 5),
        "target_ids": torch.zeros(2, 3, 4, dtype=torch.long),
        "prev_ids": torch.zeros(2, 3, 4, dtype=torch.long),
        "eval_mask": torch.ones(2, 3, 4, dtype=torch.bool),
        "block_keep_mask": torch.ones(2, 3, dtype=torch.bool),
        "lm_head_weight": torch.zeros(11, 5),
        "markov_w2_weight": torch.zeros(11, 3),
    } | changes
    slots = Slots(**{name: given.pop(name) for name in Slots.__dataclass_fields__})
    return dspark_objective(slots, **given)


def without_teacher(function, **options):
    return function(forward(target_last_hidden_states=None), **options)


def features(**changes):
    given = {"input_ids": IDS, "layer_ids": [0]} | changes
    return tiny_target(max_position_embeddings=12).features(**given)


NARROW = dict.fromkeys(("embed_weight", "head_weight"), torch.zeros(64, 31))
HEAD_SIZES = {"vocab_size": 23, "markov_rank": 3, "hidden_size": 12}
INT8 = {"drafter": tiny_drafter(), "folder": "x", "dtype": torch.int8}
LENGTHS = torch.tensor([[4, 3]])
NO_ROPE = {"rope_theta": ..., "rope_parameters": ...}
TWICE = {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}
LINEAR = {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e6}}
YARN = {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6}}
SCALED = {"rope_parameters": {"rope_type": "default", "factor": 4.0, "rope_theta": 1e6}}
SLIDING = {"layer_types": ["full_attention", "sliding_attention"]}
NO_WINDOW = SLIDING | {"use_sliding_window": True}
UNUSED_WINDOW = SLIDING | {"use_sliding_window": False, "sliding_window": 9}
STRANGE = {"layer_types": ["full_attention", "sliding"]}
HALF_ROPE = {"rope_theta": 1e6, "partial_rotary_factor": 0.5}
TABLES = {
    config: [
        ({"head_dim": ..., "block_size": ...}, ValueError, "must hold head_dim, block_size,"),
        ({"num_key_value_heads": 3}, ValueError, "num_key_value_heads must divide .* 4, got 3"),
        ({"head_dim": 5}, ValueError, "head_dim must be even, got 5"),
        ({"mask_token_id": 64}, ValueError, r"in the vocabulary, \[0, 63\], got 64"),
        ({"target_layer_ids": [2, 0]}, ValueError, r"strictly increasing, got \(2, 0\)"),
        ({"markov_head_type": "lstm"}, ValueError, "markov_head_type must be one of .*'lstm'"),
        ({"markov_rank": 0}, ValueError, "confidence_head_with_markov needs a Markov head"),
        ({"architectures": ["Qwen3ForCausalLM"]}, ValueError, "architectures .*Qwen3ForCausalLM"),
        ({"model_type": "llama"}, ValueError, "model_type must be 'qwen3' .*, got 'llama'"),
        ({"partial_rotary_factor": 0.5}, ValueError, "partial_rotary_factor .*, got 0.5"),
        (STRANGE, ValueError, "layer_types must be .*'sliding_attention', got 'sliding'"),
        (NO_WINDOW, ValueError, "layer_types with 'sliding_attention' need a sliding_window"),
        (UNUSED_WINDOW, ValueError, "use_sliding_window false contradicts layer_types"),
        ({"layer_types": 2}, TypeError, "layer_types must be a list or None, got 2"),
        (TWICE, ValueError, "scaled in one way, got rope_parameters .* and rope_scaling .*yarn"),
        (LINEAR, ValueError, "rope_parameters must be of rope_type 'default' or 'yarn' .*linear"),
        (YARN, ValueError, "rope_parameters of rope_type 'yarn' must hold factor"),
        (SCALED, ValueError, "rope_type .default. must not be scaled"),
        ({"rope_parameters": HALF_ROPE}, ValueError, "rope_parameters .*partial_rotary_factor"),
        ({"rope_parameters": "default"}, TypeError, "rope_parameters must be an object"),
        (NO_ROPE, ValueError, "must hold rope_theta"),
        ({"rope_theta": 5e5}, ValueError, "rope_theta must be one number, got .*500000"),
        (NO_ROPE | {"rope_theta": [1e6]}, TypeError, "rope_theta must be a number"),
    ],
    build_markov_head: [
        ({"markov_head_type": "lstm", **HEAD_SIZES}, ValueError, "must be one of .*'lstm'")
    ],
    forward: [
        ({"input_ids": IDS.float()}, TypeError, "input_ids must hold integers"),
        ({"input_ids": IDS + 60}, ValueError, r"the vocabulary, \[0, 63\], got ids from 60 to 68"),
        ({"target_hidden_states": torch.zeros(1, 9, 63)}, ValueError, r"64\), got \(1, 9, 63\)"),
        ({"anchor_positions": IDS[:, :1]}, ValueError, "go together, got no block_keep_mask"),
        ({"block_keep_mask": YES[:, :1]}, ValueError, "go together, got no anchor_positions"),
        ({"seq_lens": LENGTHS}, ValueError, "go together, got no doc_remaining, position_ids"),
    ],
    forward_of_blocks: [
        ({"block_size": 4}, ValueError, "block_size of blocks must be the drafter's, 3, got 4"),
        ({"mask_token_id": 0}, ValueError, "mask_token_id of blocks must be .* 63, got 0"),
        ({"features": torch.zeros(1, 8, 64)}, ValueError, r"\(1, 9, 64\), got \(1, 8, 64\)"),
        ({"features": torch.zeros(1, 9, 64, device="meta")}, ValueError, "device .* cpu, got meta"),
    ],
    tiny_drafter().use_target_embeddings: [(NARROW, ValueError, r"64, 32\), got shape \(64, 31\)")],
    objective: [
        ({"lm_head_weight": torch.zeros(11, 6)}, ValueError, r"hidden = 5 .* shape \(11, 6\)"),
        ({"lm_head_weight": torch.zeros(11, 5, device="meta")}, ValueError, "on meta"),
        ({"markov_w2_weight": None}, ValueError, "slots.latent alone"),
        ({"latent": None}, ValueError, "markov_w2_weight alone"),
        ({"latent": torch.zeros(2, 3, 4, 2)}, ValueError, r"rank = 2 .* got shape \(11, 3\)"),
        ({"target_hidden": None}, ValueError, "must be 0, got 0.9 and 1.0"),
        ({"target_hidden": None, "l1_weight": 0}, ValueError, "must be 0, got 0 and 1.0"),
        ({"loss_decay_gamma": 0.0}, ValueError, "loss_decay_gamma must be > 0, .* got 0.0"),
        ({"loss_decay_gamma": 1e-300}, ValueError, "at least 1.18e-38, got 1e-300"),
        ({"loss_decay_gamma": math.nan}, ValueError, "loss_decay_gamma must be .* got nan"),
    ],
    without_teacher: [({"function": output_objective}, ValueError, "must be 0, got 0.9 and 1.0")],
    features: [
        ({"layer_ids": []}, ValueError, "layer_ids must not be empty"),
        ({"layer_ids": [3]}, ValueError, r"must lie in \[-1, 2\]"),
        ({"input_ids": IDS[:, :0]}, ValueError, "input_ids must hold tokens"),
        ({"input_ids": IDS - 1}, ValueError, r"the vocabulary, \[0, 63\], got ids from -1 to 7"),
        ({"input_ids": IDS.repeat(1, 2)}, ValueError, "at most 12 tokens .* got 18"),
        ({"attention_mask": IDS > 2}, ValueError, "on the right only"),
        ({"position_ids": IDS}, ValueError, "position_ids must come with seq_lens"),
        ({"seq_lens": LENGTHS, "position_ids": IDS[:, 1:]}, ValueError, "position_ids must be"),
        ({"seq_lens": LENGTHS + 2}, ValueError, "lengths of documents in rows of 9 tokens, got"),
        ({"seq_lens": LENGTHS[:, :0]}, ValueError, "lengths of documents in rows of 9 tokens"),
        ({"seq_lens": LENGTHS - 4}, ValueError, "lengths of documents in rows of 9 tokens, got"),
    ],
    load_drafter: [({"folder": ".", "dtype": torch.int8}, ValueError, "of .*, got torch.int8")],
    save_drafter: [(INT8, ValueError, "dtype must be one of .*, got torch.int8")],
}
ROWS = [(call, *row) for call, rows in TABLES.items() for row in rows]


@pytest.mark.parametrize(
    ("call", "arguments", "error", "said"),
    ROWS,
    ids=[f"{call.__name__}({', '.join(arguments)})" for call, arguments, *_ in ROWS],
)
def test_a_wrong_argument_is_named_with_what_was_given(call, arguments, error, said):
    with pytest.raises(error) as caught:
        call(**arguments)
    assert caught.type is error
    assert re.search(said, str(caught.value)), str(caught.value)


def test_what_is_right_is_not_refused():
    config(), forward(), forward_of_blocks(), objective(), features(seq_lens=LENGTHS)
    assert replace(tiny_drafter().config, target_layer_ids=[0, 1]).target_layer_ids == (0, 1)
