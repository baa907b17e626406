"""A choice is exported in the names of each trainer (notebook 06) and server, and read back."""

import argparse
import ast
import json
import shlex
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import tyro
import yaml

from dspark_lab.blocks import PER
from dspark_lab.training.__main__ import Options
from dspark_lab.tuning import (
    SERVERS,
    TRAINERS,
    ServingSettings,
    TrainingSettings,
    export,
    exports,
)

CHOSEN = TrainingSettings(
    num_anchors=384, block_size=7, seq_len=2048, batch_size=3, loss_decay_gamma=5.0
)
PACKED = replace(CHOSEN, batch_size=1, pack_length=2048)
SERVED = ServingSettings(draft_length=5, drafter="my drafter's folder")


def words(settings, kind: str) -> list[str]:
    """What a shell makes of the text: comments are no part of it."""
    return shlex.split(export(settings, kind), comments=True)


def flags(given: list[str], *known: str) -> dict[str, str]:
    """Values by flag; none may be unknown."""
    parser = argparse.ArgumentParser()
    for flag in known:
        parser.add_argument(flag)
    found = vars(parser.parse_args(given))
    return {name: value for name, value in found.items() if value is not None}


def dotted(given: list[str]) -> dict[str, str]:
    return dict(word.split("=", 1) for word in given)


def test_json_is_read_back_as_the_same_settings():
    for settings in (CHOSEN, PACKED, replace(CHOSEN, per="batch")):
        assert TrainingSettings(**json.loads(export(settings))) == settings
    for settings in (SERVED, ServingSettings(3, scheduled=True, cost_file="costs.json")):
        assert ServingSettings(**json.loads(export(settings))) == settings


@pytest.mark.parametrize("per", ["row", "document", "batch"])
@pytest.mark.parametrize("pack_length", [None, 4096])
def test_the_labs_own_flags_are_understood_by_its_trainer(per, pack_length):
    chosen = replace(CHOSEN, per=per, pack_length=pack_length)
    given = words(chosen, "dspark-lab")
    options = tyro.cli(Options, args=["--out", "run", "--steps", "1", *given])
    training = options.training
    assert (training.num_anchors, options.block_size, training.max_length) == (384, 7, 2048)
    assert (training.batch_size, training.loss_decay_gamma) == (3, 5.0)
    assert (training.pack_length, training.anchors_per) == (pack_length, per)


def test_automodel_gets_its_recipe_arguments():
    expected = {"seq_length": 2048, "micro_batch_size": 3, "block_size": 7, "num_anchors": 384}
    expected |= {"loss_decay_gamma": 5.0}
    assert yaml.safe_load(export(CHOSEN, "nemo-automodel")) == {"recipe_args": expected}
    packed = replace(CHOSEN, pack_length=4096)
    expected["packed_sequence_size"] = 4096
    text = export(packed, "nemo-automodel")
    assert yaml.safe_load(text) == {"recipe_args": expected}
    # Known of its targets under FlashAttention.
    assert "micro_batch_size 1 alone" in text
    assert "alone" not in export(PACKED, "nemo-automodel")


def test_deepspec_gets_one_option_each():
    given = words(CHOSEN, "deepspec")
    assert given[::2] == ["--opts"] * 5
    # The length counts there, where the target's features are stored first.
    assert "prepare the cache with these options" in export(CHOSEN, "deepspec")
    # It asserts that a global batch is whole micro-batches on every process.
    assert "global_batch_size must be a multiple of 3 x processes" in export(CHOSEN, "deepspec")
    assert dotted(given[1::2]) == {
        "model.block_size": "7",
        "model.num_anchors": "384",
        "model.loss_decay_gamma": "5.0",
        "data.max_length": "2048",
        "train.local_batch_size": "3",
    }


def test_specforge_gets_overrides_and_the_block_in_the_drafts_config():
    assert dotted(words(CHOSEN, "specforge")) == {
        "training.strategy": "dspark",
        "training.num_anchors": "384",
        "training.loss_decay_gamma": "5.0",
        "training.batch_size": "3",
        "data.max_length": "2048",
    }
    [comment] = [line for line in export(CHOSEN, "specforge").splitlines() if "JSON" in line]
    # The same count of slots as here.
    assert json.loads(comment[comment.index("{") :]) == {"block_size": 7}


def test_speculators_gets_the_flags_of_one_packed_row():
    known = "--speculator-type --block-size --max-anchors --total-seq-len --dflash-decay-gamma"
    for per in ("row", "batch"):
        assert flags(words(replace(PACKED, per=per), "speculators"), *known.split()) == {
            "speculator_type": "dspark",
            "block_size": "7",
            "max_anchors": "384",
            "total_seq_len": "2048",
            "dflash_decay_gamma": "5.0",
        }
    for change, sentence in (
        ({"batch_size": 2}, "one packed row a step, got batch_size 2"),
        ({"seq_len": 1024}, "seq_len must be pack_length 2048, got 1024"),
    ):
        with pytest.raises(ValueError, match=sentence):
            export(replace(PACKED, **change), "speculators")


def test_torchspec_gets_overrides_that_its_trainers_read():
    assert dotted(words(CHOSEN, "torchspec")) == {
        "training.dflash_block_size": "7",
        "training.dspark_num_anchors": "384",
        "training.dspark_loss_decay_gamma": "5.0",
        "training.dflash_num_anchors": "384",
        "training.dflash_loss_decay_gamma": "5.0",
        "training.micro_batch_size": "3",
        "training.max_seq_length": "2048",
        "inference.store_last_hidden_states": "true",
    }


PACK = ["dspark-lab", "nemo-automodel", "speculators"]


@pytest.mark.parametrize("kind", TRAINERS)
def test_rows_that_a_trainer_does_not_make_are_refused_with_those_that_do(kind):
    if kind in PACK:
        assert export(PACKED, kind)
    else:
        with pytest.raises(ValueError, match=f"got pack_length 2048; .* can: {', '.join(PACK)}$"):
            export(PACKED, kind)
    if kind == "speculators":
        with pytest.raises(ValueError, match=r"rows of as many as fit, got .* None; .*deepspec"):
            export(CHOSEN, kind)
    else:
        assert export(CHOSEN, kind)


@pytest.mark.parametrize("kind", TRAINERS)
def test_a_given_anchor_is_exported_where_the_trainer_can(kind):
    chosen = replace(PACKED if kind in PACK else CHOSEN, layout="anchor_given")
    if kind in ("dspark-lab", "speculators"):
        # Both count the anchor's own slot, as the settings do.
        given = words(chosen, kind)
        assert given[-1] == "--no-sample-from-anchor"
        assert given[given.index("--block-size") + 1] == "7"
    else:
        with pytest.raises(ValueError, match="got layout 'anchor_given'; .* can: dspark-lab"):
            export(chosen, kind)
    with pytest.raises(ValueError, match="block_size must be at least 2 where .* got 1"):
        TrainingSettings(8, 1, 64, layout="anchor_given")


def test_the_labs_trainer_is_told_of_a_given_anchor():
    for layout, predicts in (("anchor_predicts", True), ("anchor_given", False)):
        given = words(replace(CHOSEN, layout=layout), "dspark-lab")
        options = tyro.cli(Options, args=["--out", "run", "--steps", "1", *given])
        assert options.sample_from_anchor is predicts and options.block_size == 7


def test_a_refusal_names_those_alone_that_can_all_of_it():
    every = [
        TrainingSettings(8, 7, 64, batch_size, pack_length=pack_length, per=per, layout=layout)
        for batch_size, pack_length, per, layout in product(
            (1, 2), (None, 64, 128), PER, ("anchor_predicts", "anchor_given")
        )
    ]
    # Of servers, too.
    every += [ServingSettings(5, 0.3), ServingSettings(5, scheduled=True, scaling_file="t.json")]
    for settings in every:
        texts = exports(settings)
        able = [kind for kind, text in texts.items() if text.startswith("# names as of")]
        assert "dspark-lab" in able
        for kind in set(texts) - set(able):
            assert texts[kind].endswith(f" that can: {', '.join(able)}\n")


def test_numbers_of_a_table_are_as_good_as_python_s():
    chosen = TrainingSettings(np.int64(384), 7, np.int64(2048), 3, np.float32(5.0))
    for kind in ("json", *TRAINERS):
        if kind != "speculators":
            assert export(chosen, kind) == export(CHOSEN, kind)
    served = replace(SERVED, draft_length=np.int64(5))
    assert all(export(served, kind) == export(SERVED, kind) for kind in ("json", *SERVERS))


@pytest.mark.parametrize("gamma", [1e-5, 1.5e-5, 1e16, 2.5e20, 4.0, 3])
def test_a_number_stays_a_number_in_yaml(gamma):
    chosen = replace(CHOSEN, loss_decay_gamma=gamma)
    read = yaml.safe_load(export(chosen, "nemo-automodel"))["recipe_args"]
    assert read["loss_decay_gamma"] == gamma
    read = dotted(words(chosen, "deepspec")[1::2])
    assert yaml.safe_load(read["model.loss_decay_gamma"]) == gamma


@pytest.mark.parametrize("kind", TRAINERS)
def test_what_anchors_count_for_is_refused_where_the_trainer_has_another(kind):
    for per, settings in (("document", PACKED), ("batch", replace(CHOSEN, batch_size=2))):
        chosen = replace(settings, per=per)
        packs = (chosen.pack_length is not None) in TRAINERS[kind].packs
        if kind == "dspark-lab":
            assert f"--anchors-per {per}" in export(chosen, kind)
        elif packs:
            with pytest.raises(ValueError, match=f"got per '{per}'; trainers that can: dspark-lab"):
                export(chosen, kind)
    # In rows of one conversation, and in batches of one row, nothing else is meant.
    for chosen in (replace(CHOSEN, per="document"), replace(CHOSEN, per="batch", batch_size=1)):
        if kind != "speculators":
            plain = replace(chosen, per="row")
            text = export(chosen, kind).replace(f" --anchors-per {chosen.per}", "")
            assert text == export(plain, kind)


def test_tensorrt_llm_gets_a_fragment_of_its_options():
    expected = {"decoding_type": "DSpark", "speculative_model": "my drafter's folder"}
    expected["max_draft_len"] = 5
    text = export(replace(SERVED, block_size=5), "tensorrt-llm")
    assert yaml.safe_load(text) == {"speculative_config": expected}
    files = {"scaling_file": "sts.json", "cost_file": "sps.json"}
    expected |= {"enable_confidence_scheduling": True, "confidence_sts_path": "sts.json"}
    expected |= {"confidence_sps_table_path": "sps.json"}
    assert "1.4.0rc4" not in text
    text = export(replace(SERVED, scheduled=True, **files), "tensorrt-llm")
    # Its documented release calls them by other names.
    assert "confidence_calibration_path and confidence_cost_table_path in 1.4.0rc4" in text
    assert yaml.safe_load(text) == {"speculative_config": expected}
    with pytest.raises(ValueError, match="scheduled needs a cost_file or a scaling_file"):
        export(replace(SERVED, scheduled=True), "tensorrt-llm")


@pytest.mark.parametrize("drafter", ["müde/😀 x", 'a "b" \\c', "-x: #y", "a\nb"])
def test_any_name_of_a_drafter_is_read_back(drafter):
    settings = ServingSettings(5, drafter=drafter)
    read = yaml.safe_load(export(settings, "tensorrt-llm"))["speculative_config"]
    assert read["speculative_model"] == drafter
    assert json.loads(words(settings, "vllm")[1])["model"] == drafter
    for kind in ("sglang", "llama.cpp"):
        assert drafter in words(settings, kind)


@pytest.mark.parametrize(("temperature", "sampled"), [(0.0, "greedy"), (0.7, "probabilistic")])
def test_vllm_gets_one_flag_of_json_that_a_shell_passes_on_whole(temperature, sampled):
    flag, value = words(replace(SERVED, temperature=temperature), "vllm")
    expected = {"method": "dspark", "model": "my drafter's folder", "num_speculative_tokens": 5}
    expected["draft_sample_method"] = sampled
    assert flag == "--speculative-config" and json.loads(value) == expected
    _, value = words(replace(SERVED, temperature=temperature, scheduled=True), "vllm")
    assert json.loads(value) == expected | {"enable_adaptive_verification": True}
    with pytest.raises(ValueError, match="vllm takes no cost_file, got 'costs.json'"):
        export(replace(SERVED, scheduled=True, cost_file="costs.json"), "vllm")


def test_sglang_gets_flags_and_its_scheduler_a_table():
    names = ("algorithm", "draft-model-path", "dspark-block-size")
    names += ("dspark-sps-table-path", "dspark-confidence-sts-path")
    known = [f"--speculative-{name}" for name in names]
    expected = {"speculative_algorithm": "DSPARK", "speculative_dspark_block_size": "5"}
    expected["speculative_draft_model_path"] = "my drafter's folder"
    assert flags(words(SERVED, "sglang"), *known) == expected
    files = {"scaling_file": "sts.json", "cost_file": "my sps.json"}
    expected["speculative_dspark_sps_table_path"] = "my sps.json"
    expected["speculative_dspark_confidence_sts_path"] = "sts.json"
    scheduled = replace(SERVED, scheduled=True, **files)
    assert flags(words(scheduled, "sglang"), *known) == expected
    assert "SGLANG_RAGGED_VERIFY_MODE=compact" in export(scheduled, "sglang")
    with pytest.raises(ValueError, match="scheduled needs a cost_file"):
        export(replace(SERVED, scheduled=True), "sglang")


def test_llama_cpp_gets_flags_without_a_threshold_of_its_own():
    known = "--spec-type -md --spec-draft-n-max --spec-draft-p-min".split()
    expected = {"spec_type": "draft-dspark", "md": "my drafter's folder"}
    expected |= {"spec_draft_n_max": "5", "spec_draft_p_min": "0"}
    assert flags(words(SERVED, "llama.cpp"), *known) == expected
    with pytest.raises(ValueError, match="llama.cpp has no scheduler"):
        export(replace(SERVED, scheduled=True), "llama.cpp")


def test_the_lab_is_called_with_what_was_chosen():
    chosen = ServingSettings(5, 0.4, block_size=7, temperature=0.5)
    call = ast.parse(export(chosen, "dspark-lab")).body[0].value
    named = {keyword.arg: ast.literal_eval(keyword.value) for keyword in call.keywords}
    assert named == {"draft_length": 5, "threshold": 0.4, "temperature": 0.5}
    assert "threshold" not in export(SERVED, "dspark-lab")
    scheduled = export(ServingSettings(5, scheduled=True, scaling_file="t.json"), "dspark-lab")
    assert "scheduler=scheduler, confidence_temperatures=temperatures)" in scheduled


@pytest.mark.parametrize("server", SERVERS)
def test_not_drafting_is_said_without_a_drafter(server):
    text = export(ServingSettings(0), server).splitlines()[1]
    assert "None" in text if server == "dspark-lab" else text.startswith("# without")


@pytest.mark.parametrize("server", sorted(set(SERVERS) - {"dspark-lab"}))
def test_a_server_without_thresholds_is_not_given_one(server):
    with pytest.raises(ValueError, match=f"{server} has no threshold .* got 0.3"):
        export(ServingSettings(5, 0.3), server)


# Whether a draft shorter or longer than the block is refused; else it is said.
LENGTHS = {
    "dspark-lab": ("silent", "refused"),
    "vllm": ("said", "said"),
    "sglang": ("said", "said"),
    "tensorrt-llm": ("refused", "refused"),
    "llama.cpp": ("said", "said"),
}


@pytest.mark.parametrize("server", SERVERS)
def test_a_draft_of_another_length_than_the_block_is_refused_or_said(server):
    whole = export(ServingSettings(7, block_size=7), server)
    assert whole == export(ServingSettings(7), server)
    for length, outcome in zip((5, 9), LENGTHS[server], strict=True):
        settings = ServingSettings(length, block_size=7)
        if outcome == "refused":
            able = "; servers that can: dspark-lab, vllm, sglang, llama.cpp" if length < 7 else ""
            refused = f"the block of the drafter, 7 .* got {length}{able}$"
            with pytest.raises(ValueError, match=refused):
                export(settings, server)
            continue
        lines = export(settings, server).splitlines()
        said = [line for line in lines if line.startswith(f"# {length} slots of a block of 7: ")]
        assert len(said) == (outcome == "said")
        unsaid = [line for line in lines if line not in said]
        assert unsaid == export(replace(settings, block_size=None), server).splitlines()


def test_each_export_begins_with_the_state_of_the_program_that_was_looked_at():
    for settings, programs in ((CHOSEN, TRAINERS), (SERVED, SERVERS)):
        for kind, program in programs.items():
            given = PACKED if kind == "speculators" else settings
            first = export(given, kind).splitlines()[0]
            assert first == f"# names as of {program.name}, {program.source}" and program.source


def test_all_exports_hold_the_text_or_why_there_is_none():
    every = exports(PACKED)
    assert list(every) == list(TRAINERS)
    assert every["nemo-automodel"] == export(PACKED, "nemo-automodel")
    assert every["torchspec"].startswith("# TorchSpec always has a row for each conversation")
    assert all(text.endswith("\n") for text in every.values())
    assert list(exports(SERVED)) == list(SERVERS)


def test_the_text_is_written_where_a_path_is_given(tmp_path):
    path = tmp_path / "chosen.yaml"
    text = export(CHOSEN, "nemo-automodel", path)
    assert path.read_text() == text == export(CHOSEN, "nemo-automodel")
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("kind", sorted(set(SERVERS) - set(TRAINERS)))
def test_a_trainer_is_not_a_server(kind):
    with pytest.raises(ValueError, match=f"kind must be one of .*got '{kind}'"):
        export(CHOSEN, kind)


def test_settings_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match="loss_decay_gamma must be .*got 0.0"):
        TrainingSettings(1, 7, 64, 1, 0.0)
    with pytest.raises(ValueError, match="pack_length must be at least seq_len, 64, got 32"):
        TrainingSettings(1, 7, 64, pack_length=32)
    with pytest.raises(ValueError, match="per must be 'row', .*'chat'"):
        TrainingSettings(1, 7, 64, per="chat")
    with pytest.raises(ValueError, match="cost_file must come with scheduled=True"):
        ServingSettings(5, cost_file="costs.json")
