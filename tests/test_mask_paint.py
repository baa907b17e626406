"""Pixels that many cells share, as ``mask_paint.js`` adds them up in node, beside a plain loop."""

import json
import random
import subprocess
from typing import Any

import numpy as np
import pytest

from dspark_lab.explore.widget import module
from tests.rule_in_node import needs_node

_DRIVER = """
const cases = JSON.parse(require("fs").readFileSync(0, "utf8"));
const answer = ({ rectangles, looks, width, height, x, y, wide, high }) => {
  const context = {
    getTransform: () => ({ a: 1 }), putImageData() {},
    createImageData: (w, h) => ({ width: w, height: h, data: new Uint8ClampedArray(4 * w * h) }),
  };
  const box = { left: 0, top: 0, width, height };
  const layers = [{ rectangles: Int32Array.from(rectangles.flat()), looks }];
  // Twice: nothing of a frame may remain in the next.
  for (const again of [0, 1]) {
    paintShares(context, layers, box, { x, y }, [wide, high], { ground: "#f0f0f0" });
  }
  return [...imageData(context)];
};
const imageData = (context) => SHEETS.get(context).image.data;
process.stdout.write(JSON.stringify(cases.map(answer)));
"""
GROUND, COLOURS = 0xF0, ["#c02010", "#1040d0"]


def painted(cases: list[dict[str, Any]]) -> list[np.ndarray]:
    """Red, green and blue of each pixel of each case."""
    source = module("shared", "rule", "mask_paint") + _DRIVER
    command = ["node", "-e", source]
    done = subprocess.run(command, input=json.dumps(cases), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    answers = json.loads(done.stdout)
    return [
        np.array(answer).reshape(case["height"], case["width"], 4)[..., :3]
        for case, answer in zip(cases, answers, strict=True)
    ]


def look(colour: str, least: float = 0, **more: Any) -> dict[str, Any]:
    return {"colour": colour, "alpha": 1, "least": least, **more}


def overlap(start: float, end: float, low: float, high: float) -> float:
    return max(0.0, min(end, high) - max(start, low))


def mean_colours(case: dict[str, Any]) -> np.ndarray:
    """What a pixel shows: the ground, and on it each look with the share of cells that have it."""
    pixels = np.full((case["height"], case["width"], 3), float(GROUND))
    for line in range(case["height"]):
        query = case["y"] + line / case["high"]
        for column in range(case["width"]):
            key = case["x"] + column / case["wide"]
            for kind, one in enumerate(case["looks"]):
                share = sum(
                    overlap(first, past, query, query + 1 / case["high"])
                    * overlap(start, end, key, key + 1 / case["wide"])
                    for first, past, start, end, value in case["rectangles"]
                    if value == kind
                )
                share *= case["wide"] * case["high"]
                if share > 1e-4:
                    share = max(share, one["least"])
                    colour = [int(one["colour"][i : i + 2], 16) for i in (1, 3, 5)]
                    pixels[line, column] += share * (colour - pixels[line, column])
    return pixels


def random_case(seed: int) -> dict[str, Any]:
    luck = random.Random(seed)
    rectangles: list[list[int]] = []
    query = 0
    while query < 30:
        past = query + luck.randint(1, 4)
        start = luck.randint(0, 20)
        middle = start + luck.randint(1, 15)
        rectangles.append([query, past, start, middle, 0])
        if luck.random() < 0.7:
            rectangles.append([query, past, middle, middle + luck.randint(1, 15), 1])
        query = past
    looks = [look(COLOURS[0]), look(COLOURS[1], luck.choice([0, 0.4]))]
    view = {"x": luck.choice([0, 3.3]), "y": luck.choice([0, 2.6]), "wide": luck.choice([0.4, 0.7])}
    return {"rectangles": rectangles, "looks": looks, "width": 12, "height": 9, "high": 0.3} | view


@needs_node
def test_a_pixel_has_the_mean_colour_of_its_cells():
    cases = [random_case(seed) for seed in range(20)]
    for case, pixels in zip(cases, painted(cases), strict=True):
        assert np.abs(pixels - mean_colours(case)).max() <= 1.5


@needs_node
@pytest.mark.parametrize("slope", [1, -1])
def test_areas_that_differ_have_stripes_that_run_as_their_side_says(slope):
    case = {"rectangles": [[0, 400, 0, 400, 0]], "looks": [look(COLOURS[0], slope=slope)]}
    case |= {"width": 40, "height": 40, "x": 0, "y": 0, "wide": 0.1, "high": 0.1}
    [pixels] = painted([case])
    striped = (pixels == GROUND).all(-1)
    assert 0.2 <= striped.mean() <= 0.3
    for line in range(1, 40):
        assert (np.roll(striped[line], slope)[2:-2] == striped[line - 1][2:-2]).all()


@needs_node
def test_of_two_thin_lines_one_is_broken():
    line = {"rectangles": [[0, 400, 50, 70, 0]], "width": 20, "height": 40, "x": 0, "y": 0}
    line |= {"wide": 0.1, "high": 0.1}
    whole, broken = painted(
        [
            line | {"looks": [look(COLOURS[0], slope=1)]},
            line | {"looks": [look(COLOURS[0], slope=-1, thin=True)]},
        ]
    )
    assert not (whole[:, 5:7] == GROUND).all(-1).any()
    gaps = (broken[:, 5:7] == GROUND).all(-1)
    assert gaps.any() and not gaps.all()


@needs_node
def test_what_lies_under_another_layer_is_faint_between_ends_that_are_not():
    case = {"rectangles": [[0, 400, 50, 250, 0]], "width": 40, "height": 3, "x": 0, "y": 0}
    faint = look(COLOURS[0]) | {"alpha": 0.25}
    [pixels] = painted([case | {"looks": [faint], "wide": 0.1, "high": 0.1}])
    own, ground = np.array([0xC0, 0x20, 0x10]), np.array([GROUND] * 3)
    inside = 0.75 * ground + 0.25 * own
    expected = [ground] * 5 + [own] * 2 + [inside] * 16 + [own] * 2 + [ground] * 15
    assert np.abs(pixels - np.array(expected)).max() <= 1
