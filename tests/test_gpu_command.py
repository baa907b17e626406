"""`make gpu`: what is missing, what fails and what hangs is told, and all else is measured."""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from textwrap import indent
from typing import Any

import pytest
import torch

from benchmarks.gpu import command
from benchmarks.gpu.card import published
from benchmarks.gpu.child import Report
from benchmarks.gpu.command import CARD, FIELDS, PARTS, Part, main
from benchmarks.gpu.sides import attempt

ROOT = Path(__file__).resolve().parents[1]
# A machine with a card has no notebooks.
NO_NOTEBOOKS = ["jupyterlab", "ipywidgets", "nbval", "IPython", "matplotlib", "tyro"]
NO_MODELS = ["transformers", "safetensors", "huggingface_hub", "pandas", "pyarrow", "tqdm"]
NO_MODELS += ["scipy", "sklearn", "beartype", "pytest", "hypothesis"]
HIDE = """
import sys
from importlib.machinery import PathFinder

class Hide(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        hidden = name.partition(".")[0] in {hidden}
        return None if hidden else super().find_spec(name, path, target)

sys.meta_path[sys.meta_path.index(PathFinder)] = Hide
"""


def dry_run(folder: Path, parts: str, hidden: list[str]) -> tuple[dict[str, Any], str]:
    """What the command writes and prints where some packages are not installed."""
    (folder / "sitecustomize.py").write_text(HIDE.replace("{hidden}", repr(set(hidden))))
    out, environment = folder / "gpu.json", os.environ | {"PYTHONPATH": str(folder)}
    line = [sys.executable, "-m", "benchmarks.gpu", "--dry-run", *parts.split(), "--out", str(out)]
    done = subprocess.run(line, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(out.read_text()), done.stdout


def check_record(record: dict[str, Any], printed: str, parts: list[int]) -> None:
    assert record["card"] == "dry run on a CPU" and record["torch"] == torch.__version__
    assert {"driver", "cuda", "python", "date"} <= set(record)
    assert [part["part"] for part in record["parts"]] == parts
    for part in record["parts"]:
        assert part["state"] == "ok" and part["seconds"] > 0
        names = [figure["name"] for figure in part["figures"]]
        assert names and len(names) == len(set(names))
        for figure in part["figures"]:
            assert set(FIELDS) <= set(figure) and figure["name"] in printed
            if figure["runs"]:
                assert figure["lowest"] <= figure["median"] <= figure["highest"]


@pytest.mark.slow
def test_masks_attention_and_objective_are_measured_without_models_and_notebooks(tmp_path):
    record, printed = dry_run(tmp_path, "4 3 2", NO_NOTEBOOKS + NO_MODELS)
    check_record(record, printed, [2, 3, 4])
    figures = {f["name"]: f for part in record["parts"] for f in part["figures"]}
    assert figures["S 256, N 16, K 7: create_block_mask compiled / closed form"]["unit"] == "x"
    assert figures["S 256, N 16, K 7: dense SDPA, peak memory"]["median"] > 0
    assert figures["8 x 4 slots: chunked, peak memory"]["aim"] == 2.3
    assert any("liger-kernel" in name for name in figures)


@pytest.mark.slow
def test_everything_is_measured_without_notebooks(tmp_path):
    record, printed = dry_run(tmp_path, "1 2 3 4 5 6 7", NO_NOTEBOOKS)
    check_record(record, printed, [1, 2, 3, 4, 5, 6, 7])


@pytest.fixture
def out(tmp_path, monkeypatch) -> Path:
    """Where the command writes. It finds a card without torch, which takes long to import."""
    facts = 'def run(report): report.send({"card": "a card", "torch": "3"})'
    (tmp_path / "facts.py").write_text(facts)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{ROOT}")
    monkeypatch.setattr(command, "CARD", Part(0, "", "facts", 20, ()))
    return tmp_path / "gpu.json"


@pytest.fixture
def part(tmp_path) -> Callable[..., Part]:
    def write(number: int, body: str, limit: float = 600, needs: tuple[str, ...] = ()) -> Part:
        code = f"import os, time\ndef run(report):\n{indent(body, '    ')}"
        (tmp_path / f"part{number}.py").write_text(code)
        return Part(number, f"part {number}", f"part{number}", limit, needs)

    return write


FINE = 'report.figure("a figure", "ms", [3, 1, 2])'


def states(out: Path) -> list[str]:
    return [part["state"] for part in json.loads(out.read_text())["parts"]]


def test_a_part_that_fails_says_why_keeps_its_figures_and_the_others_go_on(out, part, capsys):
    parts = [
        part(1, f'{FINE}\nraise ValueError("no such\\n shape")'),
        part(2, f'report.fail("a side", "TypeError: no number")\n{FINE}'),
        part(3, 'os.write(2, b"the last word\\n")\nos._exit(3)'),
        part(4, f'print("what a library prints")\n{FINE}'),
    ]
    assert main(["--out", str(out)], parts) == 1
    reasons = ["ValueError: no such shape", "a side", "ended with status 3: the last word"]
    assert states(out) == [*(f"failed: {reason}" for reason in reasons), "ok"]
    record, printed = json.loads(out.read_text()), capsys.readouterr().out
    assert (record["card"], record["torch"]) == ("a card", "3")
    first, second, _, last = (part["figures"] for part in record["parts"])
    spread = {"median": 2, "lowest": 1, "highest": 3, "runs": 3}
    assert first == last == [{"name": "a figure", "unit": "ms", "note": "", **spread}]
    assert second[0]["note"] == "failed: TypeError: no number" and second[1:] == last
    assert all(reason in printed for reason in [*reasons, "TypeError: no number"])
    assert any("raise ValueError" in line for line in record["parts"][0]["log"])


def test_a_part_that_hangs_is_cut_keeps_its_figures_and_the_others_go_on(out, part, monkeypatch):
    limits: list[float] = []

    class WhenWritten(threading.Thread):
        """A timer of the first part that goes off as soon as its figure is written."""

        def __init__(self, seconds: float, function: Callable[[], None]) -> None:
            super().__init__(daemon=True)
            limits.append(seconds)
            self.function, self.cancelled = function, threading.Event()

        def run(self) -> None:
            while not self.cancelled.wait(0.01):
                if len(limits) == 2 and "a figure" in out.read_text():
                    return self.function()

        def cancel(self) -> None:
            self.cancelled.set()

    monkeypatch.setattr(command, "Timer", WhenWritten)
    hangs = part(1, f"{FINE}\nwhile True: time.sleep(1)", limit=100)
    assert main(["--out", str(out)], [hangs, part(2, "pass")]) == 1
    first, _ = json.loads(out.read_text())["parts"]
    assert states(out) == [f"timed out after {limits[1]:.0f} s", "ok"]
    assert first["figures"][0]["median"] == 2
    # What a part leaves over is the next one's.
    assert limits[0] == 20 and 100 <= limits[1] <= 120


def test_a_missing_package_is_named_and_the_rest_runs(out, part, capsys):
    lacks = part(1, FINE, needs=("json", "no_such_package"))
    assert main(["--out", str(out)], [lacks, part(2, FINE)]) == 0
    assert states(out) == ["left out: needs no-such-package", "ok"]
    assert "`pip install no-such-package`" in capsys.readouterr().out
    assert main(["--out", str(out)], [lacks]) == 1


def test_a_python_without_torch_is_told_to_name_another(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(command, "find_spec", lambda name: None)
    assert main(["--dry-run", "--out", str(tmp_path / "gpu.json")]) == 1
    assert "make gpu PYTHON=" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_without_a_card_the_command_says_so_and_fails(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert main(["2", "--out", str(tmp_path / "gpu.json")]) == 1
    assert "no CUDA device" in capsys.readouterr().out and not list(tmp_path.iterdir())


def test_a_dry_run_leaves_the_cards_file_alone(out, part, monkeypatch):
    monkeypatch.setattr(command, "ROOT", out.parent)
    out.write_text("of a card")
    assert main(["--dry-run"], [part(1, FINE)]) == 0
    assert out.read_text() == "of a card"
    assert states(out.with_name("gpu-dry-run.json")) == ["ok"]


def test_an_unknown_part_is_refused(capsys):
    with pytest.raises(SystemExit) as refused:
        main(["2", "9"])
    assert refused.value.code == 2
    assert "must be one of 1 2 3 4 5 6 7, got '9'" in capsys.readouterr().err


def test_parts_run_once_in_their_order_and_some_by_name_only(out, part):
    last = Part(3, "", "part2", 600, (), default=False)
    parts = [part(1, FINE), part(2, FINE), last]
    for asked, ran in (("2 1 2", [1, 2]), ("", [1, 2]), ("3", [3])):
        out.unlink(missing_ok=True)
        assert main(["--out", str(out), *asked.split()], parts) == 0
        assert [found["part"] for found in json.loads(out.read_text())["parts"]] == ran


def test_what_was_measured_of_other_parts_on_the_same_card_stays(out, part):
    fails = part(2, "raise OSError('no')")
    assert main(["--out", str(out)], [part(1, FINE), fails, part(3, FINE)]) == 1
    assert main(["2", "--out", str(out)], [part(2, FINE)]) == 0
    assert states(out) == ["ok"] * 3
    record = json.loads(out.read_text())
    out.write_text(json.dumps(record | {"card": "another"}))
    assert main(["--out", str(out)], [part(2, FINE)]) == 0
    assert states(out) == ["ok"]


def test_the_default_parts_take_at_most_five_minutes():
    assert CARD.limit + sum(part.limit for part in PARTS if part.default) <= 300
    assert [part.number for part in PARTS if not part.default] == [7]


def test_a_failing_test_is_named_with_its_last_line(out, part, tmp_path):
    few = tmp_path / "test_few.py"
    few.write_text(
        "import pytest\n@pytest.mark.gpu\n@pytest.mark.parametrize('x', [1, 2])\n"
        "def test_one(x): assert x == 1, 'x is two'\n"
        "@pytest.mark.gpu\ndef test_other(): pytest.skip()\ndef test_on_a_cpu(): assert False\n"
    )
    body = "from benchmarks.gpu import marked_tests"
    body += f"\nmarked_tests.FILES = [{str(few)!r}]\nmarked_tests.run(report)"
    assert main(["--dry-run", "--out", str(out)], [part(1, body)]) == 1
    (found,) = json.loads(out.read_text())["parts"]
    notes = {figure["name"]: figure["note"] for figure in found["figures"]}
    assert "x is two" in notes["test_one[2]"] or "assert 2 == 1" in notes["test_one[2]"]
    assert notes["test_one"] == "1 passed, 1 failed" and notes["test_other"] == "1 skipped"
    assert notes["all of them"] == "1 passed, 1 failed, 1 skipped"


def test_a_side_that_fits_in_no_memory_is_a_row_and_no_failure(tmp_path):
    def too_large() -> None:
        raise torch.OutOfMemoryError("tried to allocate 80 GB")

    with open(tmp_path / "figures", "w+") as stream:
        report = Report(True, stream)
        assert attempt(report, "a side", too_large) is None and not report.failures
        stream.seek(0)
        assert json.loads(stream.read())["note"] == "out of memory"


@pytest.mark.parametrize(
    "device, card",
    [
        ("NVIDIA H200", "H200"),
        ("NVIDIA A100-SXM4-80GB", "A100 80GB"),
        ("NVIDIA GeForce RTX 4090", "RTX 4090"),
        ("NVIDIA L40S", "L40S"),
        ("Quadro 4000", None),
    ],
)
def test_a_card_is_known_by_its_devices_name(device, card):
    assert getattr(published(device), "name", None) == card
