"""Costs of a mixture of experts: experts touched by chance, and sizes from a config."""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dspark_lab.serving import Experts

MOE = {
    "model_type": "qwen3_moe",
    "vocab_size": 100,
    "hidden_size": 16,
    "intermediate_size": 40,
    "moe_intermediate_size": 8,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "num_experts": 6,
    "num_experts_per_tok": 2,
    "mlp_only_layers": [0],
    "decoder_sparse_step": 1,
    "tie_word_embeddings": False,
}
TWO = Experts(experts=4, top_k=2, layers=3, expert_parameters=10, other_parameters=100)


def test_experts_touched_are_the_mean_over_all_routings() -> None:
    choices = list(itertools.combinations(range(4), 2))
    for tokens in (1, 2, 3):
        routings = itertools.product(choices, repeat=tokens)
        counts = [len(set(itertools.chain(*routing))) for routing in routings]
        assert TWO.touched(tokens) == pytest.approx(np.mean(counts))


@given(experts=st.integers(1, 300), tokens=st.integers(1, 1000), data=st.data())
def test_experts_touched_grow_from_top_k_to_all(experts: int, tokens: int, data: st.DataObject):
    top_k = data.draw(st.integers(1, experts))
    one = Experts(experts, top_k, 1, 1, 0)
    assert one.touched(1) == pytest.approx(top_k)
    assert top_k - 1e-9 <= one.touched(tokens) <= min(experts, tokens * top_k) + 1e-9
    assert one.touched(tokens + 1) >= one.touched(tokens)


def test_a_step_is_bound_by_memory_and_then_by_arithmetic() -> None:
    steps = TWO.steps([1, 2, 1000], bandwidth=100.0, flops=1e4, bytes_per_parameter=1.0)
    # One token: 100 + 3 * 10 * 2 bytes; two: 3 experts of a layer.
    assert steps.seconds(1) == pytest.approx(160 / 100)
    assert steps.seconds(2) == pytest.approx(190 / 100)
    assert steps.seconds(1000) == pytest.approx(2 * 1000 * 160 / 1e4)
    later = TWO.steps([1], bandwidth=100.0, flops=1e4, bytes_per_parameter=1.0, fixed_seconds=0.5)
    assert later.seconds(1) == pytest.approx(2.1)
    table = TWO.table(steps, measured=later)
    assert table["growth"].tolist()[1] == pytest.approx(190 / 160)
    assert table["measured"].tolist() == pytest.approx([2.1] * 3)
    assert TWO.table(steps)["measured"].isna().all()


def test_sizes_are_those_of_the_model_on_the_meta_device(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(MOE))
    for source in (MOE, tmp_path, str(tmp_path / "config.json")):
        found = Experts.of(source)
        assert (found.experts, found.top_k, found.layers) == (6, 2, 2)
        assert found.expert_parameters == 3 * 16 * 8
    # Heads: queries and output 16 x 16, keys and values 16 x 8, two norms of 8; norms of 16.
    attention = 2 * 16 * 16 + 2 * 16 * 8 + 2 * 8
    others = 3 * (attention + 2 * 16) + 3 * 16 * 40 + 2 * 6 * 16 + 16 + 100 * 16
    assert found.other_parameters == others
    tied = Experts.of({**MOE, "tie_word_embeddings": True})
    assert tied.other_parameters == others


def test_targets_without_experts_are_refused() -> None:
    dense = {"model_type": "llama", "hidden_size": 16, "num_attention_heads": 2}
    dense |= {"intermediate_size": 32, "num_hidden_layers": 1, "vocab_size": 50}
    with pytest.raises(ValueError, match="must have experts"):
        Experts.of(dense)
    with pytest.raises(ValueError, match="family that transformers knows"):
        Experts.of({"model_type": "no such thing"})
    with pytest.raises(ValueError, match="top_k must be at most 4"):
        Experts(4, 5, 1, 1, 1)
