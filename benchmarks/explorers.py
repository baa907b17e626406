"""How long an explorer takes from a slider's move to the new picture, in the kernel."""

import statistics
from collections.abc import Iterator, Mapping, Sequence
from itertools import cycle, islice

from benchmarks.measure import seconds
from dspark_lab.explore import (
    Explorer,
    explore_anchors,
    explore_masks,
    explore_serving,
    explore_training_budget,
)
from dspark_lab.tuning import SERVERS, TRAINERS

MOVES = 41
# The values that each control takes in turn; it starts with the last one.
TRAINING = {
    "num_anchors": (256, 1024, 64, 512),
    "block_size": (4, 11, 7),
    "seq_len": (2048, 8192, 1024, 4096),
    "packed": (False, True),
    "per": ("document", "row"),
    "batch_size": (4, 16, 1),
    "card": ("L4", "B200", "H100"),
    "export": (*TRAINERS, "json"),
}
SERVING = {
    "draft_length": (3, 5, 1, 7),
    "temperature": (0.0, 1.0),
    "requests": (8, 64, 2, 1),
    "threshold": (0.5, 0.75, 0.0, 0.3),
    "replay": (True, False),
    "export": (*SERVERS, "json"),
}


def run() -> Iterator[str]:
    yield _redraws(explore_anchors(num_anchors=64, block_size=16))
    yield _redraws(explore_masks(num_anchors=64, block_size=16))
    yield _redraws(explore_masks(num_anchors=6, block_size=3, context=24, tile_size=16))
    yield _turns(explore_training_budget(export="json"), TRAINING)
    yield _turns(explore_serving(export="json"), SERVING)


def _redraws(explorer: Explorer) -> str:
    """Each move changes one control; the conversation changes too, so that S varies up to 512."""
    times = []
    anchors = explorer.controls["num_anchors"].value
    for move, value in enumerate(islice(cycle((anchors - 1, anchors, anchors - 2)), MOVES)):
        control = "conversation" if move % 4 == 3 else "num_anchors"
        explorer.controls["num_anchors"].value = anchors
        value = move if control == "conversation" else value - 3

        def turn(control=control, value=value):
            explorer.controls[control].value = value

        times.append(seconds(turn) * 1e3)
    return _said(repr(explorer), times)


def _turns(explorer: Explorer, values: Mapping[str, Sequence[object]]) -> str:
    """Each move turns the next control; those that were turned before stay where they are."""
    times: dict[str, list[float]] = {name: [] for name in values}
    turned = {name: cycle(each) for name, each in values.items()}
    start = repr(explorer)
    for name in islice(cycle(values), MOVES):
        control, value = explorer.controls[name], next(turned[name])

        def turn(control=control, value=value):
            control.value = value

        drawn = explorer.frames_drawn
        times[name].append(seconds(turn) * 1e3)
        assert explorer.frames_drawn == drawn + 1 and explorer.tables, explorer
    medians = {name: statistics.median(each) for name, each in times.items()}
    slowest = max(medians, key=medians.__getitem__)
    return (
        f"{_said(start, sum(times.values(), []))}; the slowest of its {len(times)} controls, "
        f"{slowest}: median {medians[slowest]:.0f} ms"
    )


def _said(explorer: str, times: Sequence[float]) -> str:
    return (
        f"{explorer}\n    redraw: median {statistics.median(times):.0f} ms, "
        f"{min(times):.0f} to {max(times):.0f} ms over {len(times)} moves"
    )
