"""What ``decoding.js`` makes of an answer, asked in node, against the rounds read one by one."""

import json
import shutil
import subprocess
from functools import cache
from typing import Any

import pytest

from dspark_lab.decoding import OUTCOMES, Round, decode
from dspark_lab.explore import decoding_state
from dspark_lab.explore.widget import module
from tests.word_pair import TEXTS, drafter, target, to_text

pytestmark = [
    pytest.mark.usefixtures("one_thread", "unplaced"),
    pytest.mark.skipif(shutil.which("node") is None, reason="node is not installed"),
]
DRIVER = """
const cases = JSON.parse(require("fs").readFileSync(0, "utf8"));
const KEYS = ["ArrowLeft", "ArrowRight", "ArrowUp", "ArrowDown", "Home", "End"];
process.stdout.write(JSON.stringify(cases.map((state) => {
  const answer = readAnswer(state);
  const shown = (step, drafts) => shownAt(answer, step, drafts).map(([token, how]) =>
    [token.i, how]);
  const steps = [...Array(2 * answer.rounds.length + 1).keys()];
  const slots = slotsOf(answer);
  const byKey = (from) => Object.fromEntries(KEYS.map((key) => [key, from(key)]));
  return {
    outcomes: OUTCOMES, slots,
    places: answer.tokens.map((token) => [token.round, token.slot]),
    rounds: answer.rounds.map((one) => [one.accepted, one.verified, lastSlot(one)]),
    said: shown(null, false), whole: shown(null, true),
    steps: steps.map((step) => [shown(step, false), shown(step, true)]),
    rounds_at: [null, ...steps].map(roundAtStep),
    first: byKey((key) => nextSlot(answer, null, key)),
    next: slots.map((slot) => byKey((key) => nextSlot(answer, slot, key))),
    next_steps: steps.map((step) => byKey((key) => nextStep(answer, step, key))),
    held: [...slots, [99, 0], [0, 99]].map(([round, slot]) => slotHeld(answer, { round, slot })),
  };
})));
"""
RUNS: dict[str, dict[str, Any]] = {
    "everything verified": {"temperature": 1.0, "max_new_tokens": 30},
    "a threshold": {"temperature": 1.0, "threshold": 0.5, "max_new_tokens": 30},
    "accepted often": {"temperature": 8.0, "max_new_tokens": 40},
    "an early end": {"temperature": 8.0, "end_ids": list(range(0, 66, 3)), "seed": 7},
    "one token": {"max_new_tokens": 1},
    "nothing drafted": {"drafted": False, "max_new_tokens": 5},
}
every_run = pytest.mark.parametrize("name", RUNS)


@cache
def rounds_of(name: str) -> tuple[dict[str, Any], list[Round]]:
    """An answer as the browser is given it, and its rounds."""
    options = {"temperature": 0.0} | RUNS[name]
    one = drafter(2, block_size=3) if options.pop("drafted", True) else None
    rounds: list[Round] = []
    run = decode(target(), one, TEXTS[:1], on_round=rounds.append, **options)
    return decoding_state(run, to_text, rounds=rounds), rounds


@cache
def asked() -> dict[str, Any]:
    source = module("shared", "decoding")
    given = json.dumps([rounds_of(name)[0] for name in RUNS])
    command = ["node", "-e", source + DRIVER]
    done = subprocess.run(command, input=given, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return dict(zip(RUNS, json.loads(done.stdout), strict=True))


def tokens_of(rounds: list[Round]) -> list[tuple[int, int, bool, bool]]:
    """Round, slot, whether it is the target's own and whether it is said, of all tokens."""
    found = [(-1, -1, True, True)]
    for r in rounds:
        found += [(r.number, slot, False, slot < r.accepted) for slot in range(len(r.drafted))]
        if len(r.tokens) > r.accepted:
            found.append((r.number, r.accepted, True, True))
    return found


def slots_of(rounds: list[Round]) -> list[list[int]]:
    return [[-1, -1]] + [[r.number, slot] for r in rounds for slot in range(r.last_slot + 1)]


def test_the_runs_reach_every_case():
    every = [r for name in RUNS for r in rounds_of(name)[1]]
    assert any(len(r.tokens) == r.accepted == len(r.drafted) for r in every)
    assert any(r.drafted and r.accepted == len(r.drafted) < len(r.tokens) for r in every)
    assert any(r.accepted < r.verified for r in every)
    assert any(r.verified < len(r.drafted) for r in every) and any(not r.drafted for r in every)


@every_run
def test_tokens_rounds_and_slots_are_those_of_the_run(name):
    found, rounds = asked()[name], rounds_of(name)[1]
    assert found["outcomes"] == list(OUTCOMES)
    assert found["places"] == [[number, slot] for number, slot, *_ in tokens_of(rounds)]
    assert found["rounds"] == [[r.accepted, r.verified, r.last_slot] for r in rounds]
    assert found["slots"] == slots_of(rounds)
    assert found["held"] == [*slots_of(rounds), None, None]


@every_run
def test_the_answer_is_what_was_said_and_drafts_stand_where_they_were_refused(name):
    found, tokens = asked()[name], tokens_of(rounds_of(name)[1])
    assert found["said"] == [[i, "said"] for i, (*_, said) in enumerate(tokens) if said]
    assert found["whole"] == [[i, "said" if t[3] else "vain"] for i, t in enumerate(tokens)]


@every_run
def test_each_round_is_played_as_its_draft_and_then_its_verdict(name):
    found, rounds = asked()[name], rounds_of(name)[1]
    tokens = tokens_of(rounds)
    assert len(found["steps"]) == 2 * len(rounds) + 1
    for step, both in enumerate(found["steps"]):
        judged, drafted = step // 2, step % 2
        for drafts, shown in zip((False, True), both, strict=True):
            expected = []
            for i, (number, _, own, said) in enumerate(tokens):
                if number < judged and said:
                    expected.append([i, "said"])
                elif number < judged and (drafts or (number == judged - 1 and not drafted)):
                    expected.append([i, "vain"])
                elif number == judged and drafted and not own:
                    expected.append([i, "drafted"])
            assert shown == expected
    assert found["rounds_at"] == [-1, -1] + [i for r in range(len(rounds)) for i in (r, r)]


@every_run
def test_arrows_go_through_the_slots_and_from_round_to_round(name):
    found, rounds = asked()[name], rounds_of(name)[1]
    slots = slots_of(rounds)

    def decided(number: int) -> list[int]:
        """Where a round was decided; beyond the ends, of the last round and the first token."""
        if number < 0 or not rounds:
            return [-1, -1]
        number = min(number, len(rounds) - 1)
        return [number, rounds[number].accepted]

    last = len(rounds) - 1
    for i, ((number, _), keys) in enumerate(zip(slots, found["next"], strict=True)):
        assert keys == {
            "ArrowLeft": slots[max(i - 1, 0)],
            "ArrowRight": slots[min(i + 1, len(slots) - 1)],
            "ArrowUp": decided(number - 1),
            "ArrowDown": decided(number + 1),
            "Home": slots[0],
            "End": decided(last) if rounds else slots[0],
        }
    backward, forward = slots[-1], decided(0)
    assert found["first"] == {
        "ArrowLeft": backward, "ArrowUp": backward, "ArrowRight": forward, "ArrowDown": forward,
        "Home": slots[0], "End": decided(last) if rounds else slots[0],
    }  # fmt: skip


@every_run
def test_arrows_go_through_what_is_played(name):
    found, end = asked()[name], 2 * len(rounds_of(name)[1])
    for step, keys in enumerate(found["next_steps"]):
        whole = [at for at in range(0, end + 1, 2)]
        assert keys == {
            "ArrowLeft": max(step - 1, 0),
            "ArrowRight": min(step + 1, end),
            "ArrowUp": max([at for at in whole if at < step], default=0),
            "ArrowDown": min([at for at in whole if at > step], default=end),
            "Home": 0,
            "End": end,
        }
