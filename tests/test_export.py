"""A choice is exported in the names of each trainer (notebook 06) and server, and read back."""

import ast
import json
import shlex

import pytest
import tyro

from dspark_lab.training.__main__ import Options
from dspark_lab.tuning import SERVERS, TRAINERS, ServingSettings, TrainingSettings, export

CHOSEN = TrainingSettings(
    num_anchors=384, block_size=7, seq_len=2048, batch_size=3, loss_decay_gamma=5.0
)
SERVED = ServingSettings(draft_length=5, drafter="my drafter's folder")


def test_json_is_read_back_as_the_same_settings():
    assert TrainingSettings(**json.loads(export(CHOSEN))) == CHOSEN
    assert ServingSettings(**json.loads(export(SERVED))) == SERVED


def test_the_labs_own_flags_are_understood_by_its_trainer():
    words = ["--out", "run", "--steps", "1", *shlex.split(export(CHOSEN, "dspark-lab"))]
    options = tyro.cli(Options, args=words)
    training = options.training
    assert (training.num_anchors, options.block_size, training.max_length) == (384, 7, 2048)
    assert (training.batch_size, training.loss_decay_gamma) == (3, 5.0)


def test_tensorrt_llm_gets_a_fragment_of_its_options():
    assert export(SERVED, "tensorrt-llm") == (
        "speculative_config:\n"
        "  decoding_type: DSpark\n"
        '  speculative_model: "my drafter\'s folder"\n'
        "  max_draft_len: 5\n"
    )


def test_vllm_gets_one_flag_of_json_that_a_shell_passes_on_whole():
    flag, value = shlex.split(export(SERVED, "vllm"))
    expected = {"method": "dspark", "model": "my drafter's folder", "num_speculative_tokens": 5}
    assert flag == "--speculative-config" and json.loads(value) == expected


@pytest.mark.parametrize(("threshold", "given"), [(0.0, {}), (0.4, {"threshold": 0.4})])
def test_the_lab_is_called_with_length_and_threshold(threshold, given):
    call = ast.parse(export(ServingSettings(5, threshold), "dspark-lab")).body[0].value
    named = {keyword.arg: ast.literal_eval(keyword.value) for keyword in call.keywords}
    assert named == {"draft_length": 5} | given


@pytest.mark.parametrize("server", sorted(SERVERS))
def test_not_drafting_is_said_without_a_drafter(server):
    text = export(ServingSettings(0), server)
    assert "None" in text if server == "dspark-lab" else text.startswith("# without")


@pytest.mark.parametrize("server", ["tensorrt-llm", "vllm"])
def test_a_server_without_thresholds_is_not_given_one(server):
    with pytest.raises(ValueError, match=f"{server} has no threshold .* got 0.3"):
        export(ServingSettings(5, 0.3), server)


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
