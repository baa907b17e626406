"""Choosing for serving: how many tokens to draft, from what confidence on, under which load."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import cache
from html import escape
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any

import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from dspark_lab import serving, tuning
from dspark_lab.checks import Count, NotEmpty, Share, checked
from dspark_lab.decoding import load_trace, rounds_of
from dspark_lab.explore import controls as make
from dspark_lab.explore import explorer, style
from dspark_lab.explore.models import DrafterLike, Prompts, TargetLike, load_models
from dspark_lab.explore.speed import plot_load, plot_round, plot_speedup
from dspark_lab.pairs import load_pair, load_traces
from dspark_lab.rates import SequentialTemperatures
from dspark_lab.serving import Engine, FixedLength, Policy, PrefixScheduler, StaticThreshold

# Requests that share a step, and those at which the load is simulated.
CONCURRENCY = (1, 2, 4, 8, 16, 32, 64)
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
    # Places are fixed: finding the best ones would take longer than all the drawing.
    places = {"left": 0.075, "right": 0.985, "bottom": 0.09, "top": 0.87}
    figure, axes = style.new_figure(
        9.5, 5.6, columns=2, rows=2, layout="none", hspace=0.75, wspace=0.22, **places
    )
    for ax in axes:
        ax.xaxis.set_label_coords(0.5, -0.17)
        ax.yaxis.set_label_coords(-0.125, 0.5)
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
        style.add_title(ax, title, y=1, pad=32)
    return figure


@checked
def explore_serving(
    target: TargetLike | None = None,
    drafter: DrafterLike | Mapping[str, DrafterLike] | None = None,
    prompts: Prompts | None = None,
    *,
    trace: pd.DataFrame | str | os.PathLike[str] | None = None,
    engine: Engine | str | os.PathLike[str] | None = None,
    temperatures: Annotated[Sequence[float], NotEmpty()] = (0.0, 1.0),
    draft_length: Count | None = None,
    temperature: float | None = None,
    requests: int = 1,
    threshold: Share = 0.3,
    replay: bool = False,
    calibrated: SequentialTemperatures | None = None,
    max_new_tokens: Count = 64,
    requests_simulated: Count = 64,
    export: str = "dspark-lab",
    seed: int = 0,
) -> explorer.Explorer:
    """How fast a drafter serves, by draft length, temperature, load and policy.

    The picture is :func:`plot_serving`; below it stand what to choose and the chosen values for a
    server. Threshold and scheduler work on whole blocks, and need a drafter with a confidence head.

    Args:
        target, drafter, prompts: as in :func:`explore_acceptance`, with one drafter. Prompts alone
            are put to the pocket pair. Without a target, ``drafter`` names one in the trace.
        trace: of whole blocks, or its file, with a column ``temperature`` unless ``temperature`` is
            given; decoded where None.
        engine: what a round costs, or its file; measured where None, but that of the pocket pair
            without a target. Loads that it was not measured at are extrapolated.
        draft_length, temperature, requests, threshold, replay, export: where the controls start. By
            default the longest draft whose slots the trace reached at each temperature and that the
            engine has, and the trace's highest temperature. A threshold of 0 is none.

    Returns:
        an explorer whose ``table`` is :func:`dspark_lab.serving.speedup_table` at the chosen
        temperature and load. ``tables`` also has ``load``, ``temperatures`` (of the length that is
        fastest at the lowest), ``thresholds`` (with a confidence head), ``profile``, ``steps`` of
        the engine, and ``settings`` (those exported).
    """
    given = dict(locals())
    export_control = make.dropdown("export", export, ("json", *tuning.SERVERS))
    requests_control = make.selection_slider("requests", requests, CONCURRENCY)
    threshold_control = make.number_slider("threshold", threshold, 0.0, 1.0)
    if isinstance(trace, (str, os.PathLike)):
        trace = load_trace(trace)
    if isinstance(engine, (str, os.PathLike)):
        engine = Engine.read(engine)
    if trace is None or engine is None:
        options = {"max_new_tokens": max_new_tokens, "seed": seed}
        trace, engine, drafter = _made(
            target, drafter, prompts, trace, engine, temperatures, **options
        )
    name = _name(drafter)
    trace = _of_one_drafter(trace, name, temperature)
    made = _Tables(trace, engine, calibrated, requests_simulated, seed)
    held = list(made.profiles)
    draft_length = draft_length or made.longest
    if draft_length > made.longest:
        raise ValueError(f"draft_length must be at most {made.longest}, got {draft_length}")
    controls = [
        make.slider("draft_length", draft_length, 1, made.longest),
        make.dropdown("temperature", held[-1] if temperature is None else temperature, held),
        requests_control,
        threshold_control,
        make.checkbox("replay", replay),
        export_control,
    ]
    threshold_control.reason = made.lacking
    # Simulations take long: with these, controls other than the threshold move at once.
    for value, length in product(held, range(1, made.longest + 1)):
        made.load(value, length, threshold)

    def draw(chosen: SimpleNamespace) -> explorer.Frame:
        t, k, threshold = chosen.temperature, chosen.draft_length, chosen.threshold
        load = chosen.requests, chosen.replay
        settings = tuning.ServingSettings(
            *(k, 0.0 if made.lacking else threshold, name),
            block_size=made.block_size,
            temperature=t,
        )
        tables = {
            "speedup": made.speedups[t, load],
            "load": made.load(t, k, threshold),
            "temperatures": made.by_temperature[load],
        }
        if not made.lacking:
            tables["thresholds"] = made.thresholds(t, load, k)
        tables["profile"] = made.profiles[t].table()
        tables["steps"] = engine.sps.table
        tables["settings"] = pd.DataFrame([asdict(settings)])
        sentences = [
            made.advice[t, load],
            made.lacking or _threshold_in_words(tables["thresholds"]),
            _load_in_words(tables["load"], chosen.requests),
        ]
        html = "".join(f"<p>{escape(text)}</p>" for text in sentences)
        try:
            html += f"<pre>{escape(tuning.export(settings, chosen.export))}</pre>"
        except ValueError as problem:
            html += explorer.alert(problem)
        alt = "speed-up by draft length, where a round's time goes, and policies under load"

        def figure() -> Figure:
            speedups = {f"T {value:g}": made.speedups[value, load] for value in held}
            marked: dict[str, Any] = {"draft_length": k, "requests": load[0], "replay": load[1]}
            return plot_serving(speedups, tables["load"], bold=f"T {t:g}", **marked)

        return explorer.Frame(tables, figure, html=html, alt=alt)

    return explorer.Explorer("explore_serving", controls, draw, given=given)


def _made(
    target: TargetLike | None,
    drafter: DrafterLike | Mapping[str, DrafterLike] | None,
    prompts: Prompts | None,
    trace: pd.DataFrame | None,
    engine: Engine | None,
    temperatures: Sequence[float],
    **options: int,
) -> tuple[pd.DataFrame, Engine, Any]:
    """Trace, engine and drafter, where one of the first two is not given."""
    if target is None and trace is not None:
        raise ValueError("engine must be given with a trace, or a target to measure, got neither")
    if target is None:
        drafter = drafter or "dspark-k7"
        engine = engine or serving.load_engine()
        if prompts is None:
            return load_traces(), engine, drafter
        pair = load_pair("pocket", _name(drafter))
        models = load_models(pair.target, {_name(drafter): pair.drafter}, prompts)
    else:
        models = load_models(target, drafter, prompts)
    if len(models.drafters) != 1:
        raise ValueError(f"drafter must be one, got {list(models.drafters)}")
    [(name, loaded)] = models.drafters.items()
    if trace is None:
        traces = []
        for t in temperatures:
            run = models.decode(name, batch_size=40, temperature=t, **options)
            if run.trace.empty:
                raise ValueError(
                    f"at temperature {t:g} every answer ended before a round: max_new_tokens must "
                    f"be larger, or prompts must be others, got {options['max_new_tokens']}"
                )
            traces.append(run.trace.assign(temperature=float(t)))
        trace = pd.concat(traces, ignore_index=True)
    if engine is None:
        engine = serving.measure_engine(models.target, loaded, seed=options["seed"])
    return trace, engine, name if isinstance(drafter, Mapping) else drafter


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


class _Tables:
    """A trace of one drafter on an engine, and the tables of both, each made once.

    Keys are a temperature and a load, which is the requests that share a step and whether replay
    counts. ``lacking`` says why there is neither threshold nor scheduler; "" where there are.
    """

    def __init__(
        self, trace: pd.DataFrame, engine: Engine, calibrated: Any, requests: int, seed: int
    ) -> None:
        if trace.empty:
            raise ValueError("trace must hold a drafted slot, got none")
        temperatures = sorted(trace["temperature"].unique().tolist())
        parts = {t: trace[trace["temperature"] == t] for t in temperatures}
        self.profiles = {
            t: serving.acceptance_profile(part, temperature=t) for t, part in parts.items()
        }
        answers = {t: serving.answers_of(part, calibrated, seed=seed) for t, part in parts.items()}
        slots = len(self.profiles[temperatures[0]].rates)
        self.block_size = slots
        reached = (profile.longest for profile in self.profiles.values())
        self.longest = longest = min(*reached, engine.longest)
        self.lacking = ""
        if trace["confidence"].isna().all():
            self.lacking = "The drafter has no confidence head: no threshold and no scheduler."
        elif engine.longest < slots:
            self.lacking = (
                f"Blocks have {slots} slots and the engine knows {engine.longest}: no threshold "
                "and no scheduler, which work on whole blocks."
            )
        rounds = {} if self.lacking else {t: rounds_of(part) for t, part in parts.items()}
        self.speedups, self.advice, self.by_temperature = {}, {}, {}
        costs = {}
        for load in product(CONCURRENCY, (False, True)):
            costs[load] = cost = engine.costs(load[0], replay=load[1])
            profiles = list(self.profiles.values())
            self.by_temperature[load] = serving.temperature_table(profiles, cost)
            for t, profile in self.profiles.items():
                self.speedups[t, load] = serving.speedup_table(profile, cost)
                self.advice[t, load] = serving.advice(profile, cost)

        @cache
        def thresholds(t: float, load: tuple[int, bool], draft_length: int) -> pd.DataFrame:
            options: dict[str, Any] = {"draft_lengths": [draft_length], "calibrated": calibrated}
            return serving.threshold_table(rounds[t], costs[load], **options)

        @cache
        def simulated(t: float, policy: Policy) -> pd.DataFrame:
            # Plain decoding drafts nothing, and the simulator charges nothing for it.
            drafted = (policy.slots or 1) if isinstance(policy, FixedLength) else longest
            options: dict[str, Any] = {"draft_length": drafted, "requests": requests}
            return serving.load_table(
                answers[t], engine, [policy], CONCURRENCY, seed=seed, **options
            )

        self.thresholds, self._simulated = thresholds, simulated

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
