"""Choosing for serving: how many tokens to draft, from what confidence on, under which load."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import cache
from html import escape
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any, NamedTuple

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from dspark_lab import serving, tuning
from dspark_lab.checks import Count, NonNegative, NotEmpty, Share, Size, checked
from dspark_lab.decoding import Rounds, load_trace, rounds_of
from dspark_lab.explore import controls as make
from dspark_lab.explore import style
from dspark_lab.explore.explorer import Explorer
from dspark_lab.explore.frame import Frame, export_texts
from dspark_lab.explore.models import DrafterLike, Models, Prompts, TargetLike, open_models
from dspark_lab.explore.speed import plot_load, plot_round, plot_speedup
from dspark_lab.explore.work import Progress, threads_for
from dspark_lab.files import require_found
from dspark_lab.pairs import drafter_names, load_traces, pair_folder
from dspark_lab.rates import SequentialTemperatures
from dspark_lab.records import AcceptanceRecord, load_acceptance, read_engine
from dspark_lab.serving import (
    AcceptanceProfile,
    Answers,
    Engine,
    FixedLength,
    Policy,
    PrefixScheduler,
    RoundCosts,
    StaticThreshold,
)

EngineLike = Engine | str | os.PathLike[str]
# Requests that share a step, and those at which the load is simulated.
CONCURRENCY = (1, 2, 4, 8, 16, 32, 64)
# What is said where nothing is known of the server that a record is of.
SHIPPED_ENGINE = "What a round costs is that of the shipped pocket pair: give engine= for your own."
# What is said where plain steps are not known apart from drafting.
WHOLE_STEPS = (
    "What a round costs is of a server's step-cost table, whose plain steps hold a part of the "
    "drafting: it says how much to verify, but not whether to draft at all."
)
# What stands for a drafter without a name.
_UNNAMED = tuning.ServingSettings(0).drafter


def plot_serving(
    speedups: Mapping[str, pd.DataFrame],
    load: pd.DataFrame,
    *,
    bold: str,
    draft_length: int,
    requests: int,
    replay: bool = False,
) -> Figure:
    """:func:`plot_speedup`, :func:`plot_round` of the ``bold`` table, and :func:`plot_load`.

    ``draft_length`` and ``requests`` are marked. ``replay`` says whether the tables of speed-up
    count it; the simulated load never does.
    """
    # Places are fixed: finding the best ones would take longer than all the drawing. Legends have
    # two lines, but for those of many temperatures.
    more = max(0, len(speedups) + replay - 3) // 2
    top = 0.87 - 0.03 * more
    places: dict[str, Any] = {"left": 0.095, "right": 0.985, "bottom": 0.09, "top": top}
    figure, axes = style.new_figure(
        style.WIDEST, 5.6, columns=2, rows=2, layout="none", hspace=0.75, wspace=0.28, **places
    )
    for ax in axes:
        ax.xaxis.set_label_coords(0.5, -0.17)
        ax.yaxis.set_label_coords(-0.15, 0.5)
        ax.yaxis.set_major_locator(MaxNLocator(3))
    plot_speedup(speedups, chosen=draft_length, bold=bold, ax=axes[0])
    plot_round(speedups[bold], draft_length=draft_length, ax=axes[1])
    plot_load(load, concurrency=requests, axes=axes[2:])
    titles = (
        f"{requests} request{'s' * (requests != 1)} a step",
        f"a round, {style.plain_text(bold)}",
        f"simulated load{', without replay' * replay}",
    )
    for ax, title in zip(axes[:3], titles, strict=True):
        ax.xaxis.set_major_locator(MaxNLocator(4, integer=True))
        style.add_title(ax, title, y=1, pad=32 + 12 * more * (ax is not axes[2]))
    return figure


@checked
def explore_serving(
    target: TargetLike | None = None,
    drafter: DrafterLike | Mapping[str, DrafterLike] | None = None,
    prompts: Prompts | None = None,
    *,
    trace: pd.DataFrame | str | os.PathLike[str] | None = None,
    record: AcceptanceRecord | str | os.PathLike[str] | None = None,
    engine: EngineLike | None = None,
    temperatures: Annotated[Sequence[NonNegative], NotEmpty()] = (0.0, 1.0),
    draft_length: Count | None = None,
    temperature: float | None = None,
    requests: int = 1,
    threshold: Share = 0.3,
    replay: bool = False,
    calibrated: SequentialTemperatures | None = None,
    max_new_tokens: Count = 64,
    requests_simulated: Count = 64,
    export: str = "dspark-lab",
    seed: Size = 0,
) -> Explorer:
    """How fast a drafter serves, by draft length, temperature, load and policy.

    The picture is :func:`plot_serving`; below it stand what to choose and the chosen values for a
    server. Threshold and scheduler work on whole blocks, and need a drafter with a confidence head.

    Args:
        target, drafter, prompts: as in :func:`explore_acceptance`, with one drafter. Prompts alone
            are put to the pocket pair. Without a target, ``drafter`` names one in the trace.
        trace: of whole blocks, or its file, with a column ``temperature`` unless ``temperature`` is
            given; decoded where None.
        record: instead of a trace, what a server counted by slot, or its file
            (:func:`dspark_lab.load_acceptance`). Where its lines say temperatures, those without
            one are left out; where none does, ``temperature`` says at which one it was served, by
            default 1. Answers of which no length is known have ``max_new_tokens``.
        engine: what a round costs, or its file, a CSV or a server's step-cost table
            (:func:`dspark_lab.records.read_engine`); measured where None, but that of the pocket
            pair without a target. Loads that it was not measured at are extrapolated.
        draft_length, temperature, requests, threshold, replay, export: where the controls start. By
            default the longest draft whose slots the trace or record reached at each temperature
            and that the engine has, and the highest temperature. A threshold of 0 is none.

    Returns:
        an explorer whose ``table`` is :func:`dspark_lab.serving.speedup_table` at the chosen
        temperature and load. ``tables`` also has ``load``, ``temperatures`` (of the length that is
        fastest at the lowest), ``thresholds`` (with a confidence head), ``profile``, ``steps`` of
        the engine, and ``settings`` (those exported).
    """
    given = dict(locals())
    at_once = [
        make.selection_slider("requests", requests, CONCURRENCY),
        make.number_slider("threshold", threshold, 0.0, 1.0),
        make.checkbox("replay", replay),
        make.dropdown("export", export, ("json", *tuning.SERVERS)),
    ]
    if isinstance(trace, (str, os.PathLike)):
        require_found(trace)
        trace = load_trace(trace)
    if isinstance(engine, (str, os.PathLike)):
        # The slots of a block are known only later; a bad file is refused before any decoding.
        read_engine(engine, block_size=1)
    if isinstance(record, (str, os.PathLike)):
        record = load_acceptance(record)
    if record is not None and not (target is None and trace is None and prompts is None):
        raise ValueError("a record must stand alone, got a target, a trace or prompts beside it")
    if target is None and trace is not None and engine is None:
        raise ValueError("engine must be given with a trace, or a target to measure, got neither")
    if isinstance(drafter, Mapping) and len(drafter) != 1:
        raise ValueError(f"drafter must be one, got {list(drafter)}")
    if target is None and trace is None and record is None:
        drafter = drafter or "dspark-k7"
        engine = engine or serving.load_engine()
        trace = load_traces() if prompts is None else None
    name = _name(next(iter(drafter)) if isinstance(drafter, Mapping) else drafter)

    def tables_of(trace: pd.DataFrame, engine: EngineLike) -> _Tables:
        parts = _traced(_of_one_drafter(trace, name, temperature), calibrated, seed)
        return tables_from(parts, engine)

    def tables_from(parts: dict[float, _Part], engine: EngineLike) -> _Tables:
        if not isinstance(engine, Engine):
            engine = read_engine(engine, block_size=_slots(parts))
        made = _Tables(parts, engine, calibrated, requests_simulated, seed)
        if draft_length is not None and draft_length > made.longest:
            raise ValueError(f"draft_length must be at most {made.longest}, got {draft_length}")
        return made

    def controls_of(made: _Tables) -> list[make.Control]:
        held = list(made.profiles)
        if made.lacking:
            at_once[1].reason = made.lacking
        return [
            make.slider("draft_length", draft_length or made.longest, 1, made.longest),
            make.dropdown("temperature", held[-1] if temperature is None else temperature, held),
            *at_once,
        ]

    found: list[_Tables] = []

    def controls(progress: Progress) -> list[make.Control]:
        options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "seed": seed}
        found.append(tables_of(*_made(models, trace, engine, temperatures, progress, **options)))
        return controls_of(found[0])

    def draw(chosen: SimpleNamespace, progress: Progress) -> Frame:
        [made] = found
        made.fill(threshold, progress)
        return _frame(made, chosen, name)

    def reasons(_chosen: SimpleNamespace) -> dict[str, str]:
        return dict.fromkeys(["threshold"], found[0].lacking) if found else {}

    options: dict[str, Any] = {"slow": True, "reasons": reasons, "given": given}
    if record is not None:
        own = engine or serving.load_engine()
        found.append(tables_from(_recorded(record, temperature, max_new_tokens), own))
        found[0].taken += SHIPPED_ENGINE * (engine is None)
    elif trace is not None and engine is not None:
        found.append(tables_of(trace, engine))
    if found:
        return Explorer("explore_serving", controls_of(found[0]), draw, **options)
    if trace is None and temperature is not None:
        style.require_one_of("temperature", temperature, temperatures)
    models = open_models(*_asked(target, drafter, prompts, name), draft_length)
    return Explorer("explore_serving", controls, draw, **options)


def _frame(made: _Tables, chosen: SimpleNamespace, name: str) -> Frame:
    """What the explorer shows of one setting of its controls, for a drafter of this name."""
    t, k, load = chosen.temperature, chosen.draft_length, (chosen.requests, chosen.replay)
    tables = {
        "speedup": made.speedups[t, load],
        "load": made.load(t, k, chosen.threshold),
        "temperatures": made.by_temperature[load],
    }
    if not made.lacking:
        tables["thresholds"] = made.thresholds(t, load, k)
    tables["profile"] = made.profiles[t].table()
    tables["steps"] = made.engine.sps.table
    best = _recommended(made, t, load)
    now = {"draft_length": k, "threshold": 0.0 if made.lacking else chosen.threshold}
    shown = {}
    for which, values in (("settings", now), ("recommended", best)):
        shown[which] = tuning.ServingSettings(
            *(values["draft_length"], values.get("threshold", 0.0), name),
            block_size=made.block_size,
            temperature=t,
        )
        tables[which] = pd.DataFrame([asdict(shown[which])])
    sentences = [
        made.advice[t, load],
        "" if made.engine.plain_known else WHOLE_STEPS,
        made.lacking or _threshold_in_words(made.thresholds(t, load, best["draft_length"])),
        _load_in_words(tables["load"], chosen.requests),
        made.taken,
    ]
    html = "".join(f"<p>{escape(text)}</p>" for text in sentences if text)
    pays = made.speedups[t, load]["speedup"].max() > 1
    label = "recommended" if pays else "the least slow, where drafting must be"
    both = shown["recommended"], shown["settings"]
    html += export_texts(chosen.export, *both, tuning.export, label)

    def figure() -> Figure:
        speedups = {f"T {value:g}": made.speedups[value, load] for value in made.profiles}
        marked: dict[str, Any] = {"draft_length": k, "requests": load[0], "replay": load[1]}
        return plot_serving(speedups, tables["load"], bold=f"T {t:g}", **marked)

    alt = "speed-up by draft length, where a round's time goes, and policies under load"
    return Frame(tables, figure, alt=alt, html=html, recommended=best)


def _recommended(made: _Tables, t: float, load: tuple[int, bool]) -> dict[str, Any]:
    """The fastest draft length, and the fastest threshold with it."""
    speed = made.speedups[t, load]
    known = speed.dropna(subset="speedup")
    fastest = known if len(known) else speed.head(1)
    length = int(fastest.loc[fastest["speedup"].fillna(0).idxmax(), "draft_length"])
    if made.lacking:
        return {"draft_length": length}
    table = made.thresholds(t, load, length)
    return {
        "draft_length": length,
        "threshold": float(table.loc[table["speedup"].idxmax(), "threshold"]),
    }


def _asked(target: Any, drafter: Any, prompts: Any, name: str) -> tuple[Any, Any, Any]:
    """The models to load: the pocket pair's where no target is given, with the named drafter."""
    if target is not None:
        return target, drafter, prompts
    style.require_one_of("drafter", name, drafter_names("pocket"))
    folder = pair_folder("pocket")
    return folder / "target", {name: folder / name}, prompts


def _made(
    models_of: Callable[[Progress], Models],
    trace: pd.DataFrame | None,
    engine: EngineLike | None,
    temperatures: Sequence[float],
    progress: Progress,
    **options: Any,
) -> tuple[pd.DataFrame, EngineLike]:
    """Trace and engine, where one of them is not given."""
    models = models_of(progress)
    [(name, loaded)] = models.drafters.items()
    if trace is None:
        traces = []
        for t in temperatures:
            run = models.decode(name, 40, progress, temperature=t, **options)
            if run.trace.empty:
                raise ValueError(
                    f"at temperature {t:g} every answer ended before a round: max_new_tokens must "
                    f"be larger, or prompts must be others, got {options['max_new_tokens']}"
                )
            traces.append(run.trace.assign(temperature=float(t)))
        trace = pd.concat(traces, ignore_index=True)
    if engine is None:

        def timed(done: float, total: float) -> None:
            progress(done, total, "measuring what a round costs here: round")

        with threads_for(models.target.model):
            engine = serving.measure_engine(
                models.target, loaded, seed=options["seed"], progress=timed
            )
    return trace, engine


def _name(drafter: Any) -> str:
    """How a drafter is exported: by its folder, its hub id, or what stands for it."""
    return os.fspath(drafter) if isinstance(drafter, (str, os.PathLike)) else _UNNAMED


def _of_one_drafter(trace: pd.DataFrame, name: str, temperature: float | None) -> pd.DataFrame:
    """The rows of the named drafter, or of the only one, with their temperatures."""
    if "drafter" in trace:
        held = sorted(trace["drafter"].unique())
        own = held[0] if name == _UNNAMED and len(held) == 1 else Path(name).name
        if own not in held:
            raise ValueError(f"drafter must be the name of one of {held}, got {own!r}")
        trace = trace[trace["drafter"] == own]
    if "temperature" not in trace:
        if temperature is None:
            raise ValueError("trace or call must have a temperature, got neither")
        trace = trace.assign(temperature=float(temperature))
    return trace


class _Part(NamedTuple):
    """What was accepted at one temperature; ``rounds`` of whole blocks, with confidences.

    ``lacking``: why there are no confidences; ``taken``: what was taken for granted.
    """

    profile: AcceptanceProfile
    answers: Answers
    rounds: Rounds | None
    lacking: str = ""
    taken: str = ""


def _traced(trace: pd.DataFrame, calibrated: Any, seed: int) -> dict[float, _Part]:
    """A trace of one drafter, by temperature."""
    if trace.empty:
        raise ValueError("trace must hold a drafted slot, got none")
    blind = bool(trace["confidence"].isna().all())
    lacking = "The drafter has no confidence head: no threshold and no scheduler." if blind else ""
    found = {}
    for t in sorted(trace["temperature"].unique().tolist()):
        part = trace[trace["temperature"] == t]
        profile = serving.acceptance_profile(part, temperature=t)
        answers = serving.answers_of(part, calibrated, seed=seed)
        found[t] = _Part(profile, answers, None if blind else rounds_of(part), lacking)
    return found


def _slots(parts: dict[float, _Part]) -> int:
    """Slots of a block, as far as rounds of any temperature reached."""
    return max(len(part.profile.rates) for part in parts.values())


def _recorded(
    record: AcceptanceRecord, temperature: float | None, tokens: int
) -> dict[float, _Part]:
    """What a server counted, by temperature where its lines say it."""
    held = record.values("temperature")
    if not held:
        taken = "The record says no temperature: it is taken to be 1. " * (temperature is None)
        served = 1.0 if temperature is None else float(temperature)
        return {served: _counted(record, served, tokens, taken)}
    without = int(record.lines["temperature"].isna().sum())
    taken = f"{without:,} of {len(record.lines):,} lines say no temperature and are left out. "
    taken *= without > 0
    return {float(t): _counted(record.part(temperature=t), float(t), tokens, taken) for t in held}


def _counted(record: AcceptanceRecord, temperature: float, tokens: int, taken: str) -> _Part:
    """What a server counted at one temperature, as if all its blocks were alike."""
    profile = replace(record.profile(), temperature=temperature)
    lengths = np.full(1, tokens)
    if record.requests is not None:
        lengths = (record.lines["rounds"] + record.lines["accepted"]).to_numpy().round().astype(int)
        if "output_tokens" in record.lines:
            said = record.lines["output_tokens"].astype(float)
            lengths = said.fillna(pd.Series(lengths)).to_numpy().astype(int)
    count = len(lengths)
    rates = np.tile(profile.rates, (count, 1))
    each = np.ones(count, dtype=np.int64)
    answers = Answers(
        accept_prob=rates,
        confidence=np.full_like(rates, np.nan),
        first=np.arange(count),
        count=each,
        tokens=np.maximum(lengths, 1),
        domain=np.full(count, ""),
    )
    lacking = "A record has no confidences: no threshold and no scheduler."
    return _Part(profile, answers, None, lacking, taken)


class _Tables:
    """What one drafter had accepted on an engine, and the tables of both, each made once.

    Keys are a temperature and a load, which is the requests that share a step and whether replay
    counts. ``lacking`` says why there is neither threshold nor scheduler; "" where there are.
    """

    def __init__(
        self, parts: dict[float, _Part], engine: Engine, calibrated: Any, requests: int, seed: int
    ) -> None:
        self.profiles = {t: part.profile for t, part in parts.items()}
        answers = {t: part.answers for t, part in parts.items()}
        first = next(iter(parts.values()))
        slots = _slots(parts)
        self.block_size = slots
        reached = (profile.longest for profile in self.profiles.values())
        self.longest = longest = min(*reached, engine.longest)
        self.lacking, self.taken = first.lacking, first.taken
        if not self.lacking and engine.longest < slots:
            self.lacking = (
                f"Blocks have {slots} slots and the engine knows {engine.longest}: no threshold "
                "and no scheduler, which work on whole blocks."
            )
        self.engine = engine
        self.speedups: dict[tuple[float, tuple[int, bool]], pd.DataFrame] = {}
        self.advice: dict[tuple[float, tuple[int, bool]], str] = {}
        self.by_temperature: dict[tuple[int, bool], pd.DataFrame] = {}
        costs: dict[tuple[int, bool], RoundCosts] = {}
        self._costs = costs

        @cache
        def thresholds(t: float, load: tuple[int, bool], draft_length: int) -> pd.DataFrame:
            options: dict[str, Any] = {"draft_lengths": [draft_length], "calibrated": calibrated}
            rounds = parts[t].rounds
            assert rounds is not None
            return serving.threshold_table(rounds, costs[load], **options)

        @cache
        def simulated(t: float, policy: Policy) -> pd.DataFrame:
            # Plain decoding drafts nothing, and the simulator charges nothing for it.
            drafted = (policy.slots or 1) if isinstance(policy, FixedLength) else longest
            options: dict[str, Any] = {"draft_length": drafted, "requests": requests}
            return serving.load_table(
                answers[t], engine, [policy], CONCURRENCY, seed=seed, **options
            )

        self.thresholds, self._simulated = thresholds, simulated

    def fill(self, threshold: float, progress: Progress) -> None:
        """Make all tables but those of thresholds; other calls of it find them made."""
        loads = list(product(CONCURRENCY, (False, True)))
        profiles = self.profiles
        for done, load in enumerate(loads):
            if load in self.by_temperature:
                continue
            progress(done, len(loads), "counting the speed-up: load")
            self._costs[load] = cost = self.engine.costs(load[0], replay=load[1])
            for t, profile in profiles.items():
                self.speedups[t, load] = serving.speedup_table(profile, cost)
                self.advice[t, load] = serving.advice(profile, cost)
            self.by_temperature[load] = serving.temperature_table(list(profiles.values()), cost)
        # Simulations take long: with these, controls other than the threshold move at once.
        settings = list(product(profiles, range(1, self.longest + 1)))
        for done, (t, length) in enumerate(settings):
            progress(done, len(settings), "simulating requests: draft length")
            self.load(t, length, threshold)

    def load(self, temperature: float, draft_length: int, threshold: float) -> pd.DataFrame:
        """All policies under load, plain decoding first."""
        policies: list[Policy] = [FixedLength(0), FixedLength(draft_length)]
        if not self.lacking:
            policies += [StaticThreshold(threshold), PrefixScheduler()]
        tables = [self._simulated(temperature, policy) for policy in policies]
        return pd.concat(tables, ignore_index=True)


def _threshold_in_words(table: pd.DataFrame) -> str:
    best = table.loc[table["speedup"].idxmax()]
    return (
        f"With {best['draft_length']:.0f} drafted, the best static threshold is "
        f"{best['threshold']:g}: {best['speedup']:.2f} ({best['speedup_low']:.2f} to "
        f"{best['speedup_high']:.2f}) times, with {best['verified']:.2f} slots verified a round."
    )


def _load_in_words(table: pd.DataFrame, requests: int) -> str:
    here = table[table["concurrency"] == requests]
    here = here.sort_values("throughput", ascending=False, kind="stable")
    first, *others = [
        f"{row.policy} {row.throughput:.0f} tokens/s, {row.per_user:.0f} for each user"
        for row in here.itertuples(index=False)
    ]
    return f"With {requests} in the batch, simulated: {first}; then {'; '.join(others)}."
