"""Tables made by hand, as the library gives them, and a gallery of the pictures of them."""

import warnings
from collections.abc import Callable
from functools import cache
from itertools import product

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from torch import Tensor

from dspark_lab import explore, serving
from dspark_lab.blocks import Blocks, draw_blocks
from dspark_lab.chats import Batch, pack
from dspark_lab.decoding import OTHERS
from dspark_lab.explore import REGIONS, mask_regions, sorting_table
from dspark_lab.serving import StepsPerSecond
from dspark_lab.training import TrainConfig
from dspark_lab.tuning import Advice, Forecast, forecast
from tests.pictures import pixels
from tests.samples import documents

NAN = float("nan")
SEEN, OWN, DUMMY = (REGIONS.index(name) for name in ("context prefix", "own block", "dummy block"))


def small_batch() -> Batch:
    return pack(documents("...aaa", "..a"), 10, 0)


def small_blocks() -> Blocks:
    """Two kept blocks and a dummy."""
    return draw_blocks(small_batch(), 3, 2, seed=0)


def table(columns: str, *rows: tuple) -> pd.DataFrame:
    """A table of these rows; words of ``columns`` are its columns."""
    return pd.DataFrame(rows, columns=columns.split())


COVERAGE = table(
    "block_size num_anchors expected sampled",
    *((4, 8, 0.2, 0.21), (4, 16, 0.4, 0.39), (4, 64, 0.8, 0.81)),
    *((7, 8, 0.3, 0.29), (7, 16, 0.55, 0.57), (7, 64, 0.95, 0.94)),
)
PACKING = table(
    "row anchors_per num_anchors expected",
    *(("unpacked", "document", 16, 0.5), ("unpacked", "document", 64, 0.9)),
    *(("packed, 1024", "row", 16, 0.2), ("packed, 1024", "row", 64, 0.45)),
).rename(columns={"anchors_per": "anchors per"})
TILES = torch.tensor([[0, 1, 2, 2], [0, 0, 1, 2]], dtype=torch.int8)


def large_regions() -> Tensor:
    """A mask of three blocks of 30 slots, the last of them a dummy, on 200 context tokens."""
    regions = torch.zeros(90, 290, dtype=torch.int8)
    for block, anchor in enumerate((60, 150)):
        regions[30 * block : 30 * block + 30, :anchor] = SEEN
    for block, region in enumerate((OWN, OWN, DUMMY)):
        first = 30 * block
        regions[first : first + 30, 200 + first : 230 + first] = region
    return regions


def named_regions() -> Tensor:
    """A mask with as many cells as are named at most: a block of 6 slots on 32 context tokens."""
    regions = torch.full((6, 38), OWN, dtype=torch.int8)
    regions[:, :32] = SEEN
    return regions


KINDS = ("on policy", "empirical", "predicted", "teacher-forced", "predicted, teacher-forced")


def rates(drafters: list[str], slots: int = 3) -> pd.DataFrame:
    """As `rate_table` gives them; every number is another one."""
    rates = table("kind drafter slot", *product(KINDS, drafters, range(slots)))
    rate = 0.4 + 0.005 * np.arange(len(rates))
    lived = rate / (2 + rates["slot"])
    rates = rates.assign(conditional=rate, low=rate - 0.03, high=rate + 0.02)
    return rates.assign(survival=lived, survival_low=lived - 0.01, survival_high=lived + 0.02)


def bins(*counts: int) -> pd.DataFrame:
    """As `reliability_table` gives them, bins of equal width; an empty one has no means."""
    edges = np.linspace(0, 1, len(counts) + 1)
    bins = pd.DataFrame({"low": edges[:-1], "high": edges[1:], "count": counts})
    confidence = bins[["low", "high"]].mean(axis=1).where(bins["count"] > 0)
    outcome = confidence**2
    return bins.assign(confidence=confidence, outcome=outcome, gap=confidence - outcome)


def biases(*columns: tuple[str, list]) -> pd.DataFrame:
    names = [name for name, _ in columns]
    table = pd.DataFrame(product(*(values for _, values in columns)), columns=names)
    bias = 0.05 - 0.02 * np.arange(len(table))
    return table.assign(bias=bias, bias_low=bias - 0.03, bias_high=bias + 0.01)


def sweep(scale: float = 1.0) -> pd.DataFrame:
    cuts = np.linspace(0, 1, 21)
    verified = 6 * (1 - cuts) * scale
    rate = np.where(verified > 0, 0.3 + 0.7 * cuts, NAN)
    known = {"threshold": cuts, "acceptance_rate": rate, "verified": verified}
    return pd.DataFrame(known | {"accepted": np.nan_to_num(rate) * verified})


REPORT = table(
    "slot ece ece_scaled auroc auroc_scaled",
    (0, 0.08, 0.02, 0.8, 0.8),
    (1, 0.06, 0.07, 0.7, 0.7),
    (2, NAN, NAN, NAN, NAN),
    ("all", 0.05, 0.01, 0.78, 0.79),
)
DRIFT = table(
    "start rounds ece_raw ece_static ece_online",
    (-100, 100, 0.05, 0.02, 0.03),
    (0, 100, 0.12, 0.09, 0.08),
    (100, 100, 0.11, 0.1, 0.01),
)
GAIN = table(
    "values threshold gain_percent gain_low gain_high",
    ("everything", NAN, -6.4, -8.4, -4.1),
    ("raw", 0.38, 0.0, 0.0, 0.0),
    ("scaled", 0.395, 0.2, -0.3, 0.7),
    ("oracle", 0.27, 7.2, 5.9, 8.5),
)
# All outcomes, in two rounds.
ANSWER = table(
    "round slot outcome text",
    (-1, -1, "first", "To"),
    (0, 0, "accepted", " add"),
    (0, 1, "rejected", " <b>"),
    (0, 2, "not reached", "\n"),
    (0, -1, "corrected", " we"),
    (1, 0, "accepted", "\n"),
    (1, 1, "not verified", " x"),
    (1, -1, "bonus", "!"),
)
ANSWER["kept"] = ANSWER["outcome"].isin(["accepted", "corrected", "bonus", "first"])
REJECTED = table(
    "token text draft target overlap residual drafted drawn",
    (3, " the", 0.6, 0.2, 0.2, 0.0, True, False),
    (1, "$x$", 0.1, 0.5, 0.1, 0.875, False, True),
    (2, "\n", 0.25, 0.2, 0.2, 0.0, False, False),
    (-1, OTHERS, 0.05, 0.1, 0.04, 0.125, False, False),
)
UNASKED = REJECTED.assign(target=NAN, overlap=NAN, residual=NAN, drawn=False)
BONUS = REJECTED.assign(draft=0.0, overlap=0.0, residual=REJECTED["target"], drafted=False)


def fit(*numbers: int, block_size: int = 7) -> pd.DataFrame:
    """As `fit_table` gives them, rows of 256, 512, ...; where the row is the limit, all but one."""
    rows = [(256 * 2**i, block_size, number, 10**9) for i, number in enumerate(numbers)]
    fits = table("seq_len block_size num_anchors held", *rows)
    return fits.assign(full=fits["num_anchors"] < fits["seq_len"] - 1)


FIT = pd.concat([fit(255, 511, 600, 500), fit(255, 300, 290, 200, block_size=15)])
NONE_LEFT = fit(255, 100, 3, 0)
COST = table("part operations", ("target forward", 6e12), ("MLP", 3.999e12), ("optimiser", 1e9))
MEMORY = table("part held", ("weights", 3_000_000_000), ("gradients", 0))
MEMORY["moment"] = "heads backward"


def options(fits: int = 5, seq_lens: tuple[int, ...] = (4096,)) -> pd.DataFrame:
    """As `training` gives them for 4, 8, ..., 64 anchors, of which the first few fit."""
    rate, fitting = np.array([10.0, 30.0, 40.0, 50.0, 35.0]), np.arange(5) < fits
    options = pd.DataFrame({"num_anchors": [4, 8, 16, 32, 64], "share": [0.1, 0.3, 0.5, 0.7, 0.8]})
    options = options.assign(block_size=7, seconds=[0.1, 0.2, 0.3, 0.4567, 0.5])
    options = options.assign(gain_per_second=rate, gain_per_byte=rate[::-1] * 1e-9)
    options = options.assign(fits=fitting)
    return pd.concat([options.assign(seq_len=n) for n in seq_lens], ignore_index=True)


def progress(rows: tuple[int, ...] = (2, 8), sizes: tuple[int, ...] = (4, 7, 15)) -> pd.DataFrame:
    """As `progress_table` gives it; each block size has another best number of anchors."""
    lines = list(product((100,), ("row",), rows, (4, 8, 16, 32, 64, 128), sizes))
    table_of = table("seq_len per batch_size num_anchors block_size", *lines)
    order = np.log2(table_of["num_anchors"]) - 6.5 + table_of["block_size"] / 3.5
    rate = 1 + 3 / table_of["block_size"] + 0.02 * table_of["batch_size"] - 0.04 * order**2
    best = rate == rate.groupby(table_of["block_size"]).transform("max")
    spread = table_of.assign(rate=rate, low=0.8 * rate, high=1.1 * rate)
    return spread.assign(best=np.where(best, 0.75, 0.0), fits=spread["num_anchors"] < 128)


OPTIONS = table(
    "batch_size num_anchors block_size prior piloted forecast tau low high",
    (2, 4, 4, 1.8, 0.0, NAN, 1.9, 1.7, 2.1),
    (2, 16, 7, 2.2, 0.1, 2.6, 2.5, 2.4, 2.7),
    (8, 4, 7, 2.1, 0.05, 2.0, 2.05, 1.9, 2.2),
    (8, 96, 15, 1.5, 0.0, NAN, 1.4, 1.2, 1.6),
)


def advice(piloted: bool = True) -> Advice:
    """What a pilot has found about four options; the second is the best."""
    shown = OPTIONS if piloted else OPTIONS.assign(piloted=0.0, forecast=NAN)
    figures = {"lead": 0.2, "lead_low": 0.1, "lead_high": 0.3, "sure": 0.9, "spent": 3.0}
    best, other = shown.iloc[1], shown.iloc[2]
    return Advice(best, other, steps=100, table=shown, curves=shown, surer="", **figures)


REACHED = OPTIONS.assign(held_out=[1.95, 2.55, 2.1, 1.45])
STRETCHES = pd.DataFrame(
    {"begin": [0, 17, 40], "end": [16, 39, 62], "tau": [3.1, 2.9, 2.4], "low": [2.8, 2.6, 2.0]}
).assign(high=[3.4, 3.2, 2.8])
SUMS_ONLY = STRETCHES.assign(low=np.nan, high=np.nan)
SERVING_OPTIONS = table(
    "draft_length threshold gain_percent gain_low gain_high faster",
    *((7, NAN, 0.0, 0.0, 0.0, False), (4, NAN, 3.1, -0.4, 6.6, False)),
    *((7, 0.45, 8.0, 5.0, 11.0, True), (0, NAN, -21.0, -26.0, -15.0, False)),
)
SERVING_OPTIONS.insert(0, "option", ["draft 7", "draft 4", "threshold 0.45", "plain decoding"])
CAUSES = pd.DataFrame(
    {
        "cause": ["stale cache", "no Markov head", "nothing wrong", "harder prompts", "window"],
        "share": [0.62, 0.2, 0.11, 0.05, 0.02],
    }
)
RECORD_RATES = table(
    "record slot conditional low high",
    *(
        ("server", slot, 0.5 + 0.04 * slot, 0.46 + 0.04 * slot, 0.54 + 0.04 * slot)
        for slot in range(7)
    ),
    *(
        ("trained", slot, 0.7 + 0.03 * slot, 0.68 + 0.03 * slot, 0.72 + 0.03 * slot)
        for slot in range(7)
    ),
)
RECORD_RATES = RECORD_RATES.assign(
    survival=RECORD_RATES["conditional"] ** (1 + RECORD_RATES["slot"]),
    survival_low=NAN,
    survival_high=NAN,
)
WATCHED = pd.DataFrame(
    {
        "seconds": [5.0, 10.0, 15.0, 20.0],
        "rounds": 100.0,
        "tau": [3.1, 2.9, 3.3, 3.2],
        "survival": [[0.8, 0.6, 0.45, 0.35]] * 4,
    }
)
JUDGED = table(
    "advisor mix budget amount lost low high",
    ("pilot", "all", "seconds", 20.0, 0.01, -0.01, 0.03),
    ("pilot", "code", "slots", 2e5, 0.0, 0.0, 0.0),
    ("coverage", "all", "seconds", 20.0, 0.1, 0.08, 0.12),
    ("coverage", "code", "slots", 2e5, 0.06, 0.05, 0.07),
)


def budget(fits: int = 5, num_anchors: int = 16) -> Figure:
    return explore.plot_budget(
        options(fits), COST, NONE_LEFT, num_anchors=num_anchors, at=(300, num_anchors)
    )


def speedup(*rates: float, replay: bool = False, rollback: float = 0.0) -> pd.DataFrame:
    """As `speedup_table` gives it, with intervals made up."""
    seconds = {"plain_seconds": 0.010, "draft_seconds": 0.004, "overhead_seconds": 0.001}
    verify = [0.010, 0.011, 0.012, 0.013, 0.014]
    costs = serving.RoundCosts.of(
        4, verify_seconds=verify, replay=replay, rollback_seconds=rollback, **seconds
    )
    by_length = np.where(np.tri(4, dtype=bool), rates, np.nan)
    profile = serving.AcceptanceProfile(by_length, np.empty((0, 4, 4)))
    table = serving.speedup_table(profile, costs)
    speed = table["speedup"]
    return table.assign(speedup_low=speed - 0.05, speedup_high=speed + 0.04)


# 4 is the fastest of the first; nothing of the second pays.
GOOD, BAD = speedup(0.9, 0.9, 0.9, 0.9), speedup(0.4, 0.3, 0.3, 0.3)
REPLAYED = speedup(0.9, 0.8, 0.6, 0.5, replay=True, rollback=0.001)
TEMPERATURES = table(
    "temperature draft_length accept_rate break_even_rate break_even_without_replay "
    "speedup speedup_low speedup_high without_replay",
    (0.0, 4, 0.8, 0.6, 0.5, 1.3, 1.2, 1.45, 1.5),
    (0.5, 4, 0.7, 0.65, 0.55, 1.1, 0.95, 1.2, 1.2),
    (1.0, 4, 0.5, np.inf, 0.6, 0.8, 0.7, 0.9, 0.95),
)
THRESHOLDS = table(
    "draft_length threshold verified speedup",
    *((2, 0.0, 2.0, 1.1), (2, 0.4, 1.5, 1.2), (2, 0.8, 0.5, 0.7)),
    *((4, 0.0, 4.0, 0.9), (4, 0.4, 2.5, 1.3), (4, 0.8, 0.7, 0.8)),
)
THRESHOLDS = THRESHOLDS.assign(
    speedup_low=THRESHOLDS["speedup"] - 0.1, speedup_high=THRESHOLDS["speedup"] + 0.2
)
POLICIES = ("plain decoding", "fixed 4", "threshold 0.3", "prefix scheduler")
LEVELS = (1, 2, 4, 8, 16, 32, 64)
LOAD = table("policy concurrency", *product(POLICIES, LEVELS))
_number, _level = LOAD["policy"].map(POLICIES.index), LOAD["concurrency"]
LOAD = LOAD.assign(
    throughput=100.0 * _level / (1 + _level / (10 + 5 * _number)),
    per_user=(100.0 + _number) / (1 + _level / 10),
    verified_per_request=20.0 * _number + _level / 16 * (_number == 3),
)
STEPS = StepsPerSecond(np.array([1, 2, 3]), np.array([1.0, 0.5, 0.45]), 0, "imaginary $x$ $y$")
# Slot 1 raises Theta only with the slot behind it.
SCHEDULE = serving.schedule_table(np.array([[0.8, 0.9]]), STEPS)
SMOOTH = StepsPerSecond(np.array([1, 64]), np.array([100.0, 50.0]), 128, "cpu")


def composite(replay: bool = False) -> Figure:
    tables = {"T 0": REPLAYED if replay else GOOD, "T 1": BAD}
    return explore.plot_serving(tables, LOAD, bold="T 0", draft_length=3, requests=4, replay=replay)


TRAINING = table(
    "step loss accept_rate tau", (1, 3.0, 0.1, 1.1), (2, 2.0, 0.2, 1.2), (3, 1.0, 0.4, 1.4)
)


def training_forecast() -> Forecast:
    return forecast(TRAINING.assign(lr=1e-3), config=TrainConfig(steps=9, warmup_steps=1))


ONE_KIND = rates(["one", "two"]).query("kind == 'on policy'")

PICTURES: dict[str, Callable[[], Figure]] = {
    "tokens": lambda: explore.plot_tokens(
        explore.token_table(small_batch(), small_blocks(), lambda token_id: f"word {token_id} ")
    ),
    "coverage": lambda: explore.plot_coverage(COVERAGE),
    "packing": lambda: explore.plot_packing(PACKING),
    "small mask": lambda: explore.plot_mask(mask_regions(small_blocks()), seq_len=10, block_size=2),
    "large mask": lambda: explore.plot_mask(large_regions(), seq_len=200, block_size=30),
    "named mask": lambda: explore.plot_mask(named_regions(), seq_len=32, block_size=6),
    "tiles": lambda: explore.plot_tiles(TILES, seq_len=48, tile_size=16),
    "mask and tiles": lambda: explore.mask_and_tiles(
        large_regions(), TILES, seq_len=200, block_size=30, tile_size=64
    ),
    "sorting": lambda: explore.plot_sorting(sorting_table(small_blocks(), tile_sizes=(2, 4))),
    "training": lambda: explore.plot_training(TRAINING),
    "training with its forecast": lambda: explore.plot_training(TRAINING, training_forecast()),
    "rates": lambda: explore.plot_rates(rates(["one", "two", "three", "four", "five"])),
    "survival": lambda: explore.plot_rates(rates(["one", "two"]), "survival"),
    "rates of one": lambda: explore.plot_rates(rates(["one"]).drop(columns="drafter")),
    "rates of one kind": lambda: explore.plot_rates(ONE_KIND),
    "reliability": lambda: explore.plot_reliability(
        {"raw": bins(5, 0, 40, 90), "scaled": bins(9, 9, 9)}
    ),
    "bias": lambda: explore.plot_bias(biases(("domain", ["math", "code", "chat"])), "domain"),
    "bias by two": lambda: explore.plot_bias(
        biases(("domain", ["math", "code"]), ("drafter", list("abcdefgh"))), ["domain", "drafter"]
    ),
    "thresholds": lambda: explore.plot_thresholds({"raw": sweep(), "scaled": sweep(0.9)}),
    "calibration": lambda: explore.plot_calibration(REPORT),
    "drift": lambda: explore.plot_drift(DRIFT),
    "gain": lambda: explore.plot_gain(GAIN),
    "distributions": lambda: explore.plot_distributions(REJECTED),
    "outcomes": lambda: explore.plot_outcomes(ANSWER, drafts=True),
    "not asked": lambda: explore.plot_distributions(UNASKED),
    "fit": lambda: explore.plot_fit(FIT, at=(512, 64)),
    "nothing fits": lambda: explore.plot_fit(NONE_LEFT),
    "parts": lambda: explore.plot_parts(COST),
    "parts and memory": lambda: explore.plot_parts(COST, MEMORY, limit=4e9),
    "budget": budget,
    "budget, little fits": lambda: budget(2, 64),
    "progress": lambda: explore.plot_progress(progress()),
    "progress of one": lambda: explore.plot_progress(
        progress((1, 2), (7,)), at=(1, 16), coverage=(1, 128)
    ),
    "budget by progress": lambda: explore.plot_budget(
        *(options(), COST, NONE_LEFT),
        num_anchors=16,
        at=(300, 16),
        progress=progress((1, 2, 4), (7,)),
        rows=2,
        coverage=64,
    ),
    "advice": lambda: explore.plot_advice(advice(), REACHED),
    "advice without pilots": lambda: explore.plot_advice(advice(False), most=3),
    "judged": lambda: explore.plot_judged(JUDGED),
    "watch": lambda: explore.plot_watch(WATCHED),
    "stretches": lambda: explore.plot_stretches(STRETCHES),
    "stretches of sums": lambda: explore.plot_stretches(SUMS_ONLY, "requests at once"),
    "options": lambda: explore.plot_options(SERVING_OPTIONS),
    "causes": lambda: explore.plot_causes(CAUSES),
    "record": lambda: explore.plot_record(
        RECORD_RATES, SERVING_OPTIONS, STRETCHES, CAUSES, title="Something is wrong: stale cache"
    ),
    "record of totals": lambda: explore.plot_record(RECORD_RATES.head(0), SERVING_OPTIONS.head(0)),
    "record of sums": lambda: explore.plot_record(
        RECORD_RATES[RECORD_RATES["record"] == "server"].assign(conditional=NAN, low=NAN, high=NAN),
        SERVING_OPTIONS.assign(gain_low=NAN, gain_high=NAN),
    ),
    "speedup": lambda: explore.plot_speedup({"T 0": GOOD, "T 1": BAD}, chosen=2),
    "speedup of one": lambda: explore.plot_speedup(REPLAYED),
    "bold": lambda: explore.plot_speedup({"T 0": REPLAYED, "T 1": BAD}, bold="T 0"),
    "rounds": lambda: explore.plot_round(REPLAYED),
    "round": lambda: explore.plot_round(BAD, draft_length=2),
    "temperatures": lambda: explore.plot_temperatures(TEMPERATURES),
    "speed by threshold": lambda: explore.plot_thresholds_speed(THRESHOLDS, chosen=0.4),
    "load": lambda: explore.plot_load(LOAD, concurrency=16),
    "schedule": lambda: explore.plot_schedule(SCHEDULE),
    "steps": lambda: explore.plot_steps(SMOOTH),
    "serving": composite,
    "serving with replay": lambda: composite(replay=True),
    "serving at five": lambda: explore.plot_serving(
        {f"T 0.{i}": REPLAYED for i in range(5)}, LOAD, bold="T 0.2", draft_length=4, requests=64
    ),
}


@cache
def picture_of(name: str) -> Figure:
    """A picture of the gallery, made once and without a warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return PICTURES[name]()


@cache
def pixels_of(name: str) -> np.ndarray:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return pixels(picture_of(name))
