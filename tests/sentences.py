"""What the notebooks' sentences say in numbers, and what in the stored outputs it follows from.

``CLAIMS`` are sentences, or parts of them, with what their numbers are made of. ``OTHERS`` have
numbers that no cell computes, by the reason for it. ``unread`` finds numbers that are in neither.
"""

import re
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any, NamedTuple

import numpy as np

from tests.notebooks import FILES, code_cells, read, table_rows

NOTEBOOKS = {file.stem[:2]: read(file) for file in FILES}
WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
WORDS += ("eleven", "twelve")
# "One" is a pronoun more often than a number.
_NUMBER = re.compile(
    rf"(?<![\w.,])[-−]?\d[\d,.]*\d|\d|\b({'|'.join(WORDS[2:])}|half|twice|thirty|hundreds?|thousand"
    r"|million|percent)\b",
    re.IGNORECASE,
)
# Code, formulas, where links lead, marks of emphasis, and names such as Qwen3-4B.
_NO_PROSE = re.compile(
    r"```.*?```|`[^`]*`|\$[^$]*\$|\[\d\d[^\]]*\]\([^)]*\)|\]\([^)]*\)|\b[A-Za-z]\w*\d[\w-]*|[*|]",
    re.DOTALL,
)


class Claim(NamedTuple):
    """A text of a notebook with places for ``values``; ``holds`` is of what it says without."""

    notebook: str
    text: str
    values: tuple[Callable[[], Any], ...] = ()
    holds: Callable[[], bool] = lambda: True


def markdown(notebook: str) -> str:
    return "\n".join(c.source for c in NOTEBOOKS[notebook].cells if c.cell_type == "markdown")


@cache
def table(place: str) -> list[list[str]]:
    return table_rows(NOTEBOOKS[place[:2]], place)


def cell(place: str, row: str | tuple[str, ...], column: str) -> str:
    """What stands in a stored table, under a heading and behind the first cells of a row."""
    headings, *rows = table(place)
    wanted = (row,) if isinstance(row, str) else row
    [found] = [r for r in rows if tuple(c for c in r if c)[: len(wanted)] == wanted]
    return found[headings.index(column)]


def number(text: str) -> float:
    return float(text.replace(",", "").replace("−", "-"))


def column(place: str, heading: str, **where: str) -> list[float]:
    """A column of a stored table as numbers; where others, by their headings, have these texts."""
    headings, *rows = table(place)
    wanted = {headings.index(name.replace("_", " ")): text for name, text in where.items()}
    found = [r for r in rows if len(r) == len(headings)]
    kept = [r for r in found if all(r[i] == text for i, text in wanted.items())]
    return [number(r[headings.index(heading)]) for r in kept if r[headings.index(heading)] != "–"]


def cell_code(place: str) -> str:
    [found] = [c.source for c in code_cells(NOTEBOOKS[place[:2]]) if c.id == place]
    return found


def source(place: str, pattern: str) -> str:
    """What a cell's code says."""
    found = re.search(pattern, cell_code(place))
    assert found is not None, (place, pattern)
    return found[1]


def printed(place: str) -> str:
    [one] = [c for c in code_cells(NOTEBOOKS[place[:2]]) if c.id == place]
    return "".join(o.text for o in one.outputs if o.output_type == "stream")


def at(place: str, *where: Any) -> Callable[[], str]:
    return lambda: cell(place, *where)


def code(place: str, pattern: str) -> Callable[[], str]:
    """A whole number of a cell's code, with its thousands separated."""
    return lambda: f"{int(source(place, pattern)):,}"


def in_words(value: Callable[[], Any]) -> Callable[[], str]:
    return lambda: WORDS[int(value())]


def alone_speeds(heading: str) -> list[float]:
    """Of each signal, one request at a time."""
    return column("04-54", heading, requests_together="1")


def slower(policy: str) -> Callable[[], str]:
    """By how many percent a policy is slower than plain decoding, one request at a time."""

    def value() -> str:
        ours, plain = (float(cell("07-35", "1", name)) for name in (policy, "plain decoding"))
        return f"{100 * (1 - ours / plain):.0f}"

    return value


def throughput(requests: int) -> dict[str, float]:
    """Tokens a second of each policy."""
    headings, *rows = table("07-35")
    [row] = [row for row in rows if row[0] == str(requests)]
    return {name: float(text) for name, text in zip(headings[1:], row[1:], strict=True)}


def best(requests: int) -> str:
    found = throughput(requests)
    return max(found, key=found.__getitem__)


def drafting(requests: int) -> dict[str, float]:
    return {name: one for name, one in throughput(requests).items() if name != "plain decoding"}


def target_share() -> str:
    """Whether the target's own pass is more than half of all operations."""
    done = {row[0]: float(row[3]) for row in table("06-07")[1:] if row[3]}
    return "More" if done["target forward"] > sum(done.values()) / 2 else "Less"


def steps_a_second(tokens: int) -> float:
    return number(cell("07-19", str(tokens), "steps a second"))


def admitted(heading: str) -> int:
    """Slots that the scheduler, or the search, admits of those of the stored table, and before."""
    headings, *rows = table("07-29")
    yes = [row for row in rows if row[headings.index(heading)] == "yes"]
    # Seven tokens are the requests' own.
    return int(yes[-1][headings.index("tokens")]) - 7


def advised(requests: int) -> float:
    """The speed-up that the advice for so many requests names."""
    found = re.search(rf"{requests} together\..*?(\d\.\d\d) \(", printed("07-38"))
    assert found is not None
    return float(found[1])


def conditional(drafter: str, slot: str) -> float:
    """The chance that a slot is accepted once it is reached."""
    [row] = [row for row in table("03-03") if row[1:3] == [drafter, slot]]
    return float(row[5])


def options_of_record() -> dict[str, float]:
    """The gain of each option of the record that is decided on, and its low bound."""
    headings, *rows = table("08-33")
    place = headings.index("gain, %")
    return {row[1]: number(row[place]) for row in rows}


def stretches(place: str) -> list[float]:
    return column(place, "tau")


def too_confident() -> tuple[float, float]:
    """What the drafter of SmolLM2 says of all slots, and what is true of them."""
    said, true = (float(cell("04-16", "all", name)) for name in ("confidence", "outcome"))
    return said, true


def first_slots(place: str, **where: str) -> list[tuple[str, str]]:
    """The blocks of a stored table whose first slots have these texts, with their positions."""
    headings, *rows = table(place)
    wanted = {headings.index(name): text for name, text in where.items()}
    position = headings.index("position")
    found = [row for row in rows if all(row[i] == text for i, text in wanted.items())]
    return [(row[0], row[position]) for row in found if row[1] == "0"]


@cache
def runs() -> Any:
    from dspark_lab.tuning import load_runs, run_table

    return run_table(load_runs())


def options() -> int:
    from dspark_lab.tuning import CELL

    return len(runs().drop_duplicates(CELL))


def block_losses(equal: str) -> list[float]:
    """What long blocks lose, in percent."""
    headings, *rows = table("06-17")
    return [number(row[headings.index("tau lost, %")]) for row in rows if row[0] == equal]


STEPS_ON_CODE = ("steps", "code", "60")


def noise_step(place: int) -> Callable[[], int]:
    def value() -> int:
        from dspark_lab.tuning import NOISE_STEPS

        return NOISE_STEPS[place]

    return value


def exponent() -> float:
    from dspark_lab.tuning.progress import EXPONENT

    return EXPONENT


def least_steps() -> int:
    from dspark_lab.tuning.race import PILOT_STEPS

    return PILOT_STEPS


@cache
def noise(mix: Any) -> Any:
    from dspark_lab.tuning import shipped_noise

    return shipped_noise(mix)


def usable_percent() -> float:
    from dspark_lab.tuning import CARDS, usable_bytes

    return 100 * usable_bytes("H100") / CARDS["H100"].memory_bytes


def card_memory(name: str) -> float:
    """What a card's name says: 2**30 bytes each."""
    from dspark_lab.tuning import CARDS

    return CARDS[name].memory_bytes / 2**30


@cache
def smollm2() -> Any:
    from dspark_lab.pairs import load_traces

    return load_traces("smollm2")


def calibrated(row: str, *columns: str) -> tuple[Callable[[], str], ...]:
    return tuple(at("04-13", row, one) for one in columns)


def causes() -> int:
    from dspark_lab.records import CAUSES

    return len(CAUSES)


@cache
def served() -> Any:
    from dspark_lab.files import shipped
    from dspark_lab.records import load_acceptance

    return load_acceptance(shipped("records/stale.jsonl"))


CLAIMS = [
    Claim(
        "01",
        "Past 90 % most of the work goes into tokens that were covered already",
        holds=lambda: all(
            times > 2 * share / 100
            for share, times in zip(
                column("01-11", "covered, expected, %"),
                column("01-11", "times a label"),
                strict=True,
            )
            if share > 90
        ),
    ),
    Claim("01", "all {} count the end", (in_words(lambda: len(table("01-mask-22")[0]) - 1),)),
    Claim("02", "A short chat of {} turns", (in_words(lambda: cell_code("02-05").count("user")),)),
    Claim(
        "02",
        "Blocks 6 and 7 are dummies: not kept, position 0",
        holds=lambda: first_slots("02-06", kept="no") == [("6", "0"), ("7", "0")],
    ),
    Claim(
        "02",
        "is packed twice into a row",
        holds=lambda: "[cut, cut]" in cell_code("02-11"),
    ),
    Claim(
        "02",
        "Block 5 ends its document: its second label would be the next one's first token",
        holds=lambda: cell("02-11", ("5", "1"), "label") == cell("02-11", ("6", "0"), "input"),
    ),
    Claim(
        "02",
        "Block 6 opens the second document, and its positions begin again",
        holds=lambda: cell("02-11", ("6", "0"), "position") == "0",
    ),
    Claim(
        "02",
        "Block 12 is a dummy: it sits at position 0",
        holds=lambda: first_slots("02-11", kept="no") == [("12", "0")],
    ),
    Claim(
        "02",
        "a row of {} tokens, packed with conversations as a trainer would, {} anchors, "
        "blocks of {}",
        (
            code("02-13", r"pack\(encoded, (\d+)"),
            code("02-13", r"num_anchors=(\d+)"),
            code("02-13", r"block_size=(\d+)"),
        ),
    ),
    Claim("02", "has {:.1f} million pairs", (lambda: sum(column("02-14", "pairs")) / 10**6,)),
    Claim(
        "03",
        "its rate drops right after slot 0",
        holds=lambda: conditional("dflash-k7", "1") < conditional("dflash-k7", "0"),
    ),
    Claim(
        "04", "has just answered {} questions", (at("04-03", ("empirical", "0"), "conversations"),)
    ),
    Claim(
        "04", "at temperature 1. For each", holds=lambda: "temperature=1.0" in cell_code("04-01")
    ),
    Claim(
        "04",
        "it agrees, at slot 0 to the digits shown",
        holds=lambda: (
            len(
                {row[-1] for row in table("04-06") if row[0] == "0"}
                | {row[-2] for row in table("04-06") if row[0] == "0"}
            )
            == 1
        ),
    ),
    Claim(
        "04",
        "over all slots it lowers the product error from {} to {} %",
        calibrated("all", "product error, %", "product error, scaled, %"),
    ),
    Claim(
        "04",
        "the slot error of slot 5 rises from {} to {} %",
        calibrated("5", "slot error, %", "slot error, scaled, %"),
    ),
    Claim(
        "04",
        "that of slot 6 from {} to {} %",
        calibrated("6", "slot error, %", "slot error, scaled, %"),
    ),
    Claim(
        "04",
        "though up to each single slot it moves by less than a point",
        holds=lambda: all(
            abs(raw - scaled) < 1
            for raw, scaled in zip(
                column("04-13", "product error, %"),
                column("04-13", "product error, scaled, %"),
                strict=True,
            )
        ),
    ),
    Claim(
        "04",
        "about ten points too confident",
        holds=lambda: round(100 * (too_confident()[0] - too_confident()[1])) in (9, 10, 11),
    ),
    Claim(
        "04",
        "where {:.1f} is said and {:.1f} is true",
        (lambda: too_confident()[0], lambda: too_confident()[1]),
    ),
    Claim(
        "04",
        "whose target pass costs 1, and {} for each token, and whose drafter costs {}",
        (
            lambda: round(number(source("04-29", r"\[1\.1, ([\d.]+)")) - 1.1, 6),
            lambda: source("04-29", r"draft_seconds=([\d.]+)"),
        ),
    ),
    Claim(
        "04",
        "At temperature 0 the margin sorts better than the trained head, by {} of AUROC for the "
        "pocket drafter and {} for that of SmolLM2",
        (
            at("04-51", ("0", "margin"), "over the head"),
            at("04-52", ("0.00", "margin"), "over the head"),
        ),
    ),
    Claim(
        "04",
        "At temperature 1 it is {} better for the one and {} worse for the other",
        (
            at("04-51", ("1", "margin"), "over the head"),
            lambda: cell("04-52", ("1.00", "margin"), "over the head").strip("−"),
        ),
    ),
    Claim(
        "04",
        "The largest probability is in no row behind the head",
        holds=lambda: (
            min(
                number
                for place in ("04-51", "04-52")
                for number in column(place, "over the head", signal="top_prob")
            )
            >= 0
        ),
    ),
    Claim(
        "04",
        "a slot error of {} % for the pocket drafter at temperature 1",
        (at("04-51", ("1", "top_prob"), "slot error, %"),),
    ),
    Claim(
        "04",
        "Margin and head together are nowhere beaten, to the digits shown.",
        holds=lambda: all(
            together == max(column(place, "auroc", temperature=temperature))
            for place, temperatures in (("04-51", "0 1"), ("04-52", "0.00 0.70 1.00"))
            for temperature in temperatures.split()
            for together in column(place, "auroc", temperature=temperature, signal="both")
        ),
    ),
    Claim(
        "04",
        "the speed-ups of all five signals lie within {} of one another",
        (lambda: f"{np.ptp(alone_speeds('speed-up')):.2f}",),
    ),
    Claim(
        "04",
        "each interval is wider than that",
        holds=lambda: (
            min(np.subtract(alone_speeds("high"), alone_speeds("low")))
            > np.ptp(alone_speeds("speed-up"))
        ),
    ),
    Claim("04", "the weight of a round halves every {}", (code("04-33", r"half_life=(\d+)"),)),
    Claim("04", "windows of {} rounds differ more by chance", (at("04-34", "0", "rounds"),)),
    Claim(
        "05",
        "tau is lower where the target draws",
        holds=lambda: (
            number(cell("05-14", ("1", "median"), "tau"))
            < number(cell("05-14", ("0", "median"), "tau"))
        ),
    ),
    Claim(
        "05",
        "above it drafting pays, and the speed-up is the one divided by the other",
        holds=lambda: all(
            abs(number(row[6]) - number(row[4]) / number(row[5])) < 0.1
            for row in table("05-14")[1:]
            if row[1] == "median"
        ),
    ),
    Claim(
        "07",
        "shipped traces of {} held-out questions",
        (lambda: smollm2()["prompt"].nunique(),),
    ),
    Claim(
        "07",
        "At temperature 0 the drafter wins a little; at 0.7 and 1 it loses, at any length",
        holds=lambda: [s > 1 for s in column("07-06", "speed-up")] == [True, False, False],
    ),
    Claim(
        "07",
        "a *best length* of 0 says: do not draft",
        holds=lambda: column("07-06", "best length")[1:] == [0, 0],
    ),
    Claim(
        "06",
        "Measured on {} conversations",
        (lambda: noise("all")[100].wholes[7].conversations,),
    ),
    Claim(
        "06",
        "(Qwen3-4B, S {}, N {}, K {})",
        (
            code("06-06", r"seq_len=(\d+)"),
            code("06-06", r"num_anchors=(\d+)"),
            code("06-06", r"block_size=(\d+)"),
        ),
    ),
    Claim("06", "of the {:.0f} % of an H100's memory", (usable_percent,)),
    Claim("06", "{} than half of the work is the target's own forward pass", (target_share,)),
    Claim("06", "on a card of {:.0f} GB", (lambda: card_memory("RTX 4090"),)),
    Claim(
        "06",
        "three minutes of training for the pocket target, {} options",
        (options,),
        lambda: source("06-14", r"\"all\"\], (\d+)") == "180",
    ),
    Claim(
        "06",
        "training on {} and serving {}, against training on {}",
        (
            code("06-17", r"trained=(\d+)"),
            code("06-17", r"served=(\d+)"),
            code("06-17", r"served=(\d+)"),
        ),
    ),
    Claim("06", "before the first step, after {} and after {}", (noise_step(1), noise_step(2))),
    Claim("06", "$(1 + \\text{{noise}})^{{-{}}}$", (exponent,)),
    Claim(
        "06",
        "In a budget this short no pilot pays: in their first {} steps",
        (least_steps,),
        lambda: "No pilot was worth its time" in printed("06-14"),
    ),
    Claim(
        "06",
        "In equal time it loses {} to {} % of tau",
        (lambda: min(block_losses("budget")), lambda: max(block_losses("budget"))),
    ),
    Claim(
        "06",
        "it loses next to nothing: between {} % and, where text is regular, a gain of {:.1f} %",
        (lambda: max(block_losses("steps")), lambda: -min(block_losses("steps"))),
        lambda: (
            -min(block_losses("steps")) == -number(cell("06-17", STEPS_ON_CODE, "tau lost, %"))
            and max(block_losses("steps")) < 3
        ),
    ),
    Claim(
        "06",
        "of {}, {} and {} seconds: for each mix",
        tuple(lambda row=row: table("06-17")[row][2] for row in (2, 3, 4)),
    ),
    Claim(
        "06",
        "as the three best, and those that were advised, were trained again with {} fresh seeds",
        (lambda: len(set(runs().query("seed >= 3")["seed"])),),
    ),
    Claim(
        "06",
        "Over {} settings the new advice loses {} and {} % of tau in the median, the older one "
        "{} %",
        (
            in_words(lambda: cell("06-21", ("mix", "pilot"), "settings")),
            at("06-21", ("mix", "pilot"), "tau lost, median, %"),
            at("06-21", ("amount", "pilot"), "tau lost, median, %"),
            at("06-21", ("mix", "coverage"), "tau lost, median, %"),
        ),
        lambda: table("06-21")[3][2:] == table("06-21")[5][2:],
    ),
    Claim(
        "06",
        "It is worst on code, by {} and {} %: there it chose blocks of {} slots, but code is so "
        "regular that {} pay within a minute",
        (
            at("06-21", ("mix", "pilot"), "at worst, %"),
            at("06-21", ("amount", "pilot"), "at worst, %"),
            at("06-20", ("mix", "code", "60"), "block K"),
            at("06-20", ("mix", "code", "60"), "best K"),
        ),
        lambda: (
            cell("06-21", ("mix", "pilot"), "where") == "code, 60 seconds"
            and cell("06-21", ("amount", "pilot"), "where") == "code, 180 seconds"
            and all(
                cell("06-20", ("amount", "code", "180"), name)
                == cell("06-20", ("mix", "code", "60"), name)
                for name in ("block K", "best K")
            )
        ),
    ),
    Claim(
        "06",
        "The forecast is off by {} and {} % in the median, the last value seen by {} %, and the "
        "intervals of 90 % hold {} and {} % of the ends",
        (
            at("06-23", "mix", "error, median, %"),
            at("06-23", "amount", "error, median, %"),
            at("06-23", "mix", "last value's error, %"),
            at("06-23", "mix", "in the interval, %"),
            at("06-23", "amount", "in the interval, %"),
        ),
        lambda: (
            cell("06-23", "mix", "last value's error, %")
            == cell("06-23", "amount", "last value's error, %")
        ),
    ),
    Claim("07", "Two requests together:", holds=lambda: "requests=2" in cell_code("07-08")),
    Claim(
        "07",
        "a win at every temperature. There is next to none at 0, and a loss at the others. Where "
        "the time of a round goes at temperature 1:",
        holds=lambda: (
            min(column("07-09", "speed-up without it")) > 1
            and 1 <= column("07-09", "speed-up")[0] < 1.05
            and max(column("07-09", "speed-up")[1:]) < 1
            and "profiles[1.0]" in cell_code("07-11")
        ),
    ),
    Claim("07", "traces of whole blocks of seven", holds=lambda: smollm2()["slot"].max() == 6),
    Claim(
        "07",
        "its own trace's questions at {} lengths, and at temperature 1",
        (in_words(lambda: len(set(column("07-14", "drafted K")))),),
    ),
    Claim(
        "07",
        "All decoded values lie within their intervals",
        holds=lambda: all(
            low <= real <= high
            for low, real, high in zip(
                *(column("07-14", name) for name in ("low", "tau decoded", "high")), strict=True
            )
        ),
    ),
    Claim(
        "07",
        "Two tokens take longer than four here",
        holds=lambda: steps_a_second(2) < steps_a_second(4),
    ),
    Claim(
        "07",
        "drafting gains most with two requests",
        holds=lambda: advised(2) == max(map(advised, (1, 2, 4, 8))),
    ),
    Claim(
        "07",
        "four requests together, temperature 0, blocks of seven:",
        holds=lambda: (
            "requests=4" in cell_code("07-23") and "temperature=0.0" in cell_code("07-23")
        ),
    ),
    Claim(
        "07",
        "its kink at 32 tokens stops the scheduler at {} slots, and a search that looks on finds "
        "its best at {}",
        (lambda: admitted("admitted"), lambda: admitted("retrospective")),
        holds=lambda: admitted("admitted") < 32 - 7 < admitted("retrospective"),
    ),
    Claim(
        "07",
        "all but plain decoding draft whole blocks of seven",
        holds=lambda: smollm2()["slot"].max() == 6,
    ),
    Claim("07", "Seven blocks of the trace", holds=lambda: "first[:7]" in cell_code("07-28")),
    Claim(
        "07",
        "A with probability {} and B with {}, the drafter {} each. The first slot's confidence is "
        "{}; the second's is {} after A and 0 after B",
        (
            lambda: source("07-31", r"output_distribution\(\[([\d.]+)"),
            lambda: source("07-31", r"output_distribution\(\[[\d.]+, ([\d.]+)"),
            lambda: source("07-31", r"\], \[([\d.]+), 0.5\]"),
            lambda: source("07-31", r"schedule\(\[\[([\d.]+), 0.9"),
            lambda: source("07-31", r"schedule\(\[\[0.8, ([\d.]+)"),
        ),
    ),
    Claim(
        "07",
        "Stopping early is exact; the retrospective search turns 0.7 into {}",
        (at("07-31", "retrospective_schedule", "A"),),
        holds=lambda: cell("07-31", "prefix_schedule", "A") == "0.70",
    ),
    Claim(
        "07",
        "**One request**: plain decoding is the fastest by a hair, with {} tokens a second against "
        "{} of the scheduler and {} of whole blocks",
        (
            at("07-35", "1", "plain decoding"),
            at("07-35", "1", "prefix scheduler"),
            at("07-35", "1", "fixed 7"),
        ),
        holds=lambda: best(1) == "plain decoding",
    ),
    Claim(
        "07",
        "a fixed length of 3 and the threshold lose {} and {} %, since they pay for drafts of "
        "seven",
        (slower("fixed 3"), slower("threshold 0.4")),
    ),
    Claim("07", "to {} together (left end)", (lambda: table("07-35")[-1][0],)),
    Claim(
        "07",
        "**Two together**: every way to draft wins",
        holds=lambda: min(drafting(2).values()) > throughput(2)["plain decoding"],
    ),
    Claim(
        "07",
        "**four**: whoever does not verify whole blocks; the scheduler most",
        holds=lambda: (
            best(4) == "prefix scheduler"
            and {n for n, one in drafting(4).items() if one < throughput(4)["plain decoding"]}
            == {"fixed 7"}
        ),
    ),
    Claim(
        "07",
        "**Eight or more**: plain decoding wins whatever the rule, because a step of 64 tokens "
        "takes more than twice as long as one of 8",
        holds=lambda: (
            best(8) == best(16) == "plain decoding" and steps_a_second(8) > 2 * steps_a_second(64)
        ),
    ),
    Claim(
        "07",
        "is the fastest of those that draft at every load",
        holds=lambda: all(
            max(drafting(n), key=drafting(n).__getitem__) == "prefix scheduler"
            for n in (1, 2, 4, 8, 16)
        ),
    ),
    Claim(
        "07", "The length for four requests together", holds=lambda: "four)" in cell_code("07-40")
    ),
    Claim(
        "07",
        "The drafter's block has seven slots",
        holds=lambda: "block_size=7" in cell_code("07-40"),
    ),
    Claim(
        "08",
        "{} requests at temperature 0",
        (lambda: table("08-16")[1][-1],),
        holds=lambda: served().values("temperature") == [0],
    ),
    Claim(
        "08",
        "yields far fewer tokens a round than it should",
        holds=lambda: (
            float(cell("08-03", "server", "high")) < 0.75 * float(cell("08-03", "trained", "low"))
        ),
    ),
    Claim(
        "08",
        "what to do about it: something is wrong",
        holds=lambda: number(cell("08-06", "stale cache", "share, %")) > 90,
    ),
    Claim(
        "08",
        "records of thirteen faults that were planted",
        holds=lambda: causes() == 13,
    ),
    Claim(
        "08",
        "There tau falls as well, from {} to {}",
        (lambda: f"{stretches('08-13')[0]:.2f}", lambda: f"{stretches('08-13')[-1]:.2f}"),
    ),
    Claim(
        "08",
        "The faulty server falls at once, from {} to {} with the tenth token, and is below the "
        "other in every stretch",
        (at("08-12", "1", "tau"), at("08-12", "10", "tau")),
        holds=lambda: all(
            ours < other for ours, other in zip(stretches("08-12"), stretches("08-13"), strict=True)
        ),
    ),
    Claim(
        "08",
        "what is left of {} requests in it",
        (at("08-19", "vllm_requests.jsonl", "lines"),),
    ),
    Claim(
        "08",
        "Most say the same: {} rounds and a tau of {}",
        (at("08-19", "vllm_requests.jsonl", "rounds"), at("08-19", "vllm_requests.jsonl", "tau")),
        holds=lambda: (
            sum(row[4:7:2] == table("08-19")[-1][4:7:2] for row in table("08-19"))
            > len(table("08-19")) / 2
        ),
    ),
    Claim(
        "08",
        "Survival falls from {} to {}",
        (at("08-24", "0", "survival"), at("08-24", "6", "survival")),
    ),
    Claim(
        "08",
        "accepted more often the later it stands, {} at first and {} at last",
        (at("08-24", "0", "accept rate"), at("08-24", "6", "accept rate")),
    ),
    Claim(
        "08", "four requests together; *speed-up*", holds=lambda: "requests=4" in cell_code("08-27")
    ),
    Claim(
        "08",
        "{} requests together, on the",
        (lambda: "Four",),
        holds=lambda: "requests=4" in cell_code("08-32"),
    ),
    Claim(
        "08",
        "Drafting pays for mathematics alone",
        holds=lambda: [row[1] for row in table("08-27")[1:] if row[-1] != "0"] == ["math"],
    ),
    Claim("08", "One setting for all three", holds=lambda: len(table("08-27")) == 4),
    Claim(
        "08",
        "A threshold gains {} %, two drafted tokens fewer {} %; plain decoding gains more than "
        "either",
        (
            lambda: f"{options_of_record()['threshold 0.41']}",
            lambda: f"{options_of_record()['draft 5']}",
        ),
        holds=lambda: (
            max(options_of_record(), key=lambda one: options_of_record()[one]) == "plain decoding"
        ),
    ),
    Claim(
        "08",
        "the same record has another answer at each load",
        holds=lambda: len(set(re.findall(r"together\. (\w+ \w+)", printed("08-35")))) > 1,
    ),
]
OTHERS = {
    "what is to come": [
        "Eight decisions",
        "Three regions:",
        "Three things to look for:",
        "**Three signs of a healthy run**",
        "The three signs as a check, the last tenth of the steps",
        "Two taus for one drafter",
        "Is a confidence of 80 % right 80 % of the time?",
        "Two rules only show",
        "Two things set the price",
        "and all that is shown here is of the other half",
    ],
    "what a word means": [
        "one of their places, counted from 0",
        "Slot 0 reads the anchor's own token",
        "predicts token anchor + *k* + 1",
        "that token enters through slot 0",
        "dummies at position 0",
        "(1 for its own, plus what it accepts)",
        "of a finite sample is never 0",
        "0.5 is guessing",
        "away from one half or towards it",
        "to the right of 0 the head promises too much",
        "At temperature 0 an accept rate is 0 or 1",
        "it was trained at temperature 1",
        "At temperature 0 the target accepts the token that it would have said itself",
        "At temperature 1 both draw",
        "The two together give exactly",
        "the **overlap** of the two distributions",
        "At temperature 0 the answers with a drafter are those without",
        "Two logits that are equal up to rounding",
        "A measurement at temperature 0 does not tell",
        "a best length of 0 says not to draft",
        "As long as a step of 8 tokens takes little longer than one of 1",
    ],
    "how all of the lab's intervals and splits are made, held by the tests of rates": [
        "learned on one half of the conversations and judged on the other",
        "95 % interval",
        "It is fitted on half of the conversations",
        "its best threshold on one half of the conversations",
        "The best one is chosen on half of the conversations",
        "chosen on half of the requests and judged on the others",
        "Two taus with overlapping intervals can still differ",
    ],
    "what was measured or made once, not by a cell": [
        "sorts slots better than the trained head (AUROC 0.884 against 0.839)",
        "up to 64 tokens each",
        "thirty (SmolLM2) to a thousand times smaller",
        "count 100,000 draws",
        "measured once on two x86-64 cores",
        "up to hundreds of tokens a step",
    ],
    "not about results": [
        "Every explorer takes the same two",
        "All three can be measured in minutes",
        "which tells much smaller differences than two averages do",
        "which tells it better than two speed-ups do",
        "on the two cores that these costs are of",
        "of the forty steps between two lines of SGLang's log",
    ],
}


def unread(notebook: str) -> Iterator[str]:
    """Numbers of a notebook's prose that are in no claim and in none of the others."""
    text = markdown(notebook)
    prose = _NO_PROSE.sub(lambda found: " " * len(found[0]), text)
    texts = [c.text.format(*(v() for v in c.values)) for c in CLAIMS if c.notebook == notebook]
    texts += [one for ones in OTHERS.values() for one in ones]
    known = [found.span() for one in texts for found in re.finditer(re.escape(one), text)]
    for found in _NUMBER.finditer(prose):
        if not any(start <= found.start() and found.end() <= end for start, end in known):
            yield " ".join(text[max(0, found.start() - 60) : found.end() + 40].split())
