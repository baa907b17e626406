"""Choosing for serving: how many tokens to draft, from what confidence on, under which load."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import lru_cache
from html import escape
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from dspark_lab.checks import Count, checked, require
from dspark_lab.decoding import decode, load_trace, rounds_of
from dspark_lab.explore.explorer import (
    Explorer,
    Frame,
    alert,
    checkbox,
    dropdown,
    number_slider,
    selection_slider,
    slider,
)
from dspark_lab.explore.models import DrafterLike, Models, Prompts, TargetLike, load_models
from dspark_lab.explore.speed import plot_load, plot_round, plot_speedup
from dspark_lab.explore.style import add_title, new_figure, plain_text, png
from dspark_lab.model import Drafter
from dspark_lab.pairs import load_pair, load_traces
from dspark_lab.rates import SequentialTemperatures
from dspark_lab.serving import (
    Engine,
    FixedLength,
    Policy,
    PrefixScheduler,
    StaticThreshold,
    acceptance_profile,
    advice,
    answers_of,
    load_engine,
    load_table,
    measure_engine,
    speedup_table,
    temperature_table,
    threshold_table,
)
from dspark_lab.tuning import SERVERS, ServingSettings
from dspark_lab.tuning import export as exported

# Requests that share a step, and those at which the load is simulated.
CONCURRENCY = (1, 2, 4, 8, 16, 32, 64)
_SHIPPED_DRAFTER = "dspark-k7"
# What stands for a drafter without a name.
_UNNAMED = ServingSettings(0).drafter
# Answers decoded together where a trace is made.
_BATCH_SIZE = 40


def plot_serving(
    speedups: Mapping[str, pd.DataFrame],
    load: pd.DataFrame,
    *,
    bold: str,
    draft_length: int,
    requests: int,
    replay: bool = False,
) -> Figure:
    """:func:`plot_speedup`, :func:`plot_round` and both panels of :func:`plot_load`.

    Args:
        speedups: at this load, by name.
        load: of the simulated policies.
        bold: the name of the table whose temperature was chosen.
        draft_length, requests: the chosen ones.
        replay: whether the tables of speed-up count it; the simulated load never does.
    """
    # Places are fixed: finding the best ones would take longer than all the drawing.
    places = {"left": 0.075, "right": 0.985, "bottom": 0.09, "top": 0.87}
    figure, axes = new_figure(
        9.5, 5.6, columns=2, rows=2, layout="none", hspace=0.75, wspace=0.22, **places
    )
    for ax in axes:
        ax.xaxis.set_label_coords(0.5, -0.17)
        ax.yaxis.set_label_coords(-0.125, 0.5)
        ax.yaxis.set_major_locator(MaxNLocator(3))
    plot_speedup(speedups, chosen=draft_length, bold=bold, ax=axes[0])
    plot_round(speedups[bold], draft_length=draft_length, ax=axes[1])
    plot_load(load, concurrency=requests, axes=axes[2:])
    for ax in axes[:3]:
        ax.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    for ax, title in zip(
        axes[:3],
        (
            f"{requests} request{'s' * (requests != 1)} a step",
            f"a round, {plain_text(bold)}",
            f"simulated load{', without replay' if replay else ''}",
        ),
        strict=True,
    ):
        add_title(ax, title, y=1, pad=32)
    return figure


@checked
def explore_serving(
    target: TargetLike | None = None,
    drafter: DrafterLike | Mapping[str, DrafterLike] | None = None,
    prompts: Prompts | None = None,
    *,
    trace: pd.DataFrame | str | os.PathLike[str] | None = None,
    engine: Engine | str | os.PathLike[str] | None = None,
    temperatures: Sequence[float] = (0.0, 1.0),
    draft_length: int | None = None,
    temperature: float | None = None,
    requests: int = 1,
    threshold: float = 0.3,
    replay: bool = False,
    calibrated: SequentialTemperatures | None = None,
    max_new_tokens: int = 64,
    requests_simulated: int = 64,
    export: str = "dspark-lab",
    seed: int = 0,
) -> Explorer:
    """How fast a drafter serves, by draft length, temperature, load and policy.

    The picture shows the speed-up against the draft length at this load; where a round's time goes,
    beside plain steps; and plain decoding, the chosen length, the chosen threshold and the prefix
    scheduler under simulated load. Threshold and scheduler work on whole blocks, and need a drafter
    with a confidence head. Below stand what to choose and the chosen values for a server.

    Args:
        target, drafter, prompts: as in :func:`explore_acceptance`, with one drafter. Prompts alone
            are put to the pocket pair. Without a target, ``drafter`` names one in the trace.
        trace: of whole blocks, or its file, with a column ``temperature``, or of the one that is
            given; decoded where None.
        engine: what a round costs, or its file; measured where None. Where neither it nor a target
            is given, the one that ships with the pocket pair, for traces of that pair alone. Loads
            that it was not measured at are extrapolated.
        temperatures: to decode at.
        draft_length, temperature, requests, threshold, replay, export: where the controls start. By
            default the longest draft that both trace and engine have, and the trace's highest
            temperature. A threshold of 0 is none.
        calibrated: scales the confidences.
        max_new_tokens: of each answer that is decoded.
        requests_simulated: of each simulation of load.
        seed: of decoding and of the simulated requests.

    Returns:
        an explorer whose ``table`` is :func:`dspark_lab.serving.speedup_table` at the chosen
        temperature and load. Its ``tables`` are besides it ``load``
        (:func:`dspark_lab.serving.load_table`), ``temperatures``
        (:func:`dspark_lab.serving.temperature_table`, of the length that is fastest at the lowest),
        ``thresholds`` (:func:`dspark_lab.serving.threshold_table`, for drafters with a confidence
        head), ``profile``, ``steps`` of the engine and ``settings``, those that are exported.
    """
    export_control = dropdown("export", export, ("json", *SERVERS))
    requests_control = selection_slider("requests", requests, CONCURRENCY)
    threshold_control = number_slider("threshold", threshold, 0.0, 1.0)
    if threshold > 1:
        raise ValueError(f"threshold must be in [0, 1], got {threshold}")
    if isinstance(trace, (str, os.PathLike)):
        trace = load_trace(trace)
    if isinstance(engine, (str, os.PathLike)):
        engine = Engine.read(engine)
    if trace is None or engine is None:
        trace, engine, drafter = _made(
            target, drafter, prompts, trace, engine, temperatures, max_new_tokens, seed
        )
    name = _name(drafter)
    trace = _of_one_drafter(trace, name, temperature)
    serving = _Serving(trace, engine, calibrated, requests_simulated, seed)
    if temperature is None:
        temperature = serving.temperatures[-1]
    if temperature not in serving.temperatures:
        raise ValueError(
            f"temperature must be one of the trace's {serving.temperatures}, got {temperature}"
        )
    if draft_length is None:
        draft_length = serving.longest
    require("draft_length", draft_length, Count)
    if draft_length > serving.longest:
        raise ValueError(f"draft_length must be at most {serving.longest}, got {draft_length}")
    controls = [
        slider("draft_length", draft_length, 1, serving.longest),
        dropdown("temperature", temperature, serving.temperatures),
        requests_control,
        threshold_control,
        checkbox("replay", replay),
        export_control,
    ]
    threshold_control.disabled = bool(serving.lacking)
    serving.prepare(threshold)

    @lru_cache(maxsize=8)
    def drawn(
        draft_length: int, temperature: float, requests: int, threshold: float, replay: bool
    ) -> bytes:
        figure = plot_serving(
            {f"T {t:g}": serving.speedups(t, requests, replay) for t in serving.temperatures},
            serving.load(temperature, draft_length, threshold),
            bold=f"T {temperature:g}",
            draft_length=draft_length,
            requests=requests,
            replay=replay,
        )
        return png(figure, dpi=100)

    def draw(chosen: SimpleNamespace) -> Frame:
        k, threshold = chosen.draft_length, chosen.threshold
        temperature, requests, replay = chosen.temperature, chosen.requests, chosen.replay
        tables = {
            "speedup": serving.speedups(temperature, requests, replay),
            "load": serving.load(temperature, k, threshold),
            "temperatures": serving.by_temperature(requests, replay),
        }
        if not serving.lacking:
            tables["thresholds"] = serving.thresholds(temperature, k, requests, replay)
        settings = ServingSettings(k, 0.0 if serving.lacking else threshold, name)
        tables |= {
            "profile": serving.profile(temperature).table(),
            "steps": engine.sps.table,
            "settings": pd.DataFrame([asdict(settings)]),
        }
        sentences = [
            serving.advice(temperature, requests, replay),
            serving.lacking or _threshold_in_words(tables["thresholds"]),
            _load_in_words(tables["load"], requests),
        ]
        return Frame(
            tables,
            html="".join(f"<p>{escape(text)}</p>" for text in sentences)
            + _export_as_html(settings, chosen.export),
            png=drawn(k, temperature, requests, threshold, replay),
            alt="speed-up by draft length, where a round's time goes, and policies under load",
        )

    return Explorer("explore_serving", controls, draw)


def _made(
    target: TargetLike | None,
    drafter: DrafterLike | Mapping[str, DrafterLike] | None,
    prompts: Prompts | None,
    trace: pd.DataFrame | None,
    engine: Engine | None,
    temperatures: Sequence[float],
    max_new_tokens: int,
    seed: int,
) -> tuple[pd.DataFrame, Engine, Any]:
    """Trace, engine and drafter, where one of the first two is not given."""
    if target is None and trace is not None:
        raise ValueError(
            "engine must be given with a trace, or a target and a drafter to measure, got neither"
        )
    if target is None:
        drafter = drafter or _SHIPPED_DRAFTER
        engine = engine or load_engine()
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
        trace = _decoded(models, loaded, temperatures, max_new_tokens, seed)
    if engine is None:
        engine = measure_engine(models.target, loaded, seed=seed)
    return trace, engine, name if isinstance(drafter, Mapping) else drafter


def _decoded(
    models: Models,
    drafter: Drafter,
    temperatures: Sequence[float],
    max_new_tokens: int,
    seed: int,
) -> pd.DataFrame:
    if len(temperatures) == 0:
        raise ValueError("temperatures must hold at least one temperature, got none")
    traces = [
        decode(
            models.target,
            drafter,
            models.prompts,
            domains=models.domains,
            temperature=temperature,
            max_new_tokens=max_new_tokens,
            batch_size=_BATCH_SIZE if models.target.decodes_batches else None,
            seed=seed,
        ).trace.assign(temperature=float(temperature))
        for temperature in temperatures
    ]
    return pd.concat(traces, ignore_index=True)


def _name(drafter: Any) -> str:
    """How a drafter is exported: by its folder, its hub id, or what stands for it."""
    return os.fspath(drafter) if isinstance(drafter, (str, os.PathLike)) else _UNNAMED


def _of_one_drafter(trace: pd.DataFrame, name: str, temperature: float | None) -> pd.DataFrame:
    """The rows of the named drafter, or of the only one, with their temperatures."""
    if not isinstance(trace, pd.DataFrame):
        raise TypeError(f"trace must be a pandas DataFrame or a file, got {type(trace).__name__}")
    if "drafter" in trace:
        held = sorted(trace["drafter"].unique())
        own = held[0] if name == _UNNAMED and len(held) == 1 else Path(name).name
        if own not in held:
            raise ValueError(f"drafter must be the name of one of {held}, got {own!r}")
        trace = trace[trace["drafter"] == own]
    if "temperature" not in trace:
        if temperature is None:
            raise ValueError(
                "trace must have a column temperature, or temperature must say its own, got neither"
            )
        trace = trace.assign(temperature=float(temperature))
    return trace


class _Serving:
    """A trace of one drafter on an engine, and the tables of both, each made once.

    ``lacking`` says why there is neither threshold nor scheduler, and is empty where there are.
    """

    def __init__(
        self,
        trace: pd.DataFrame,
        engine: Engine,
        calibrated: SequentialTemperatures | None,
        requests_simulated: int,
        seed: int,
    ) -> None:
        if not isinstance(engine, Engine):
            raise TypeError(f"engine must be an Engine or a file, got {type(engine).__name__}")
        self.temperatures = sorted(trace["temperature"].unique().tolist())
        parts = {t: trace[trace["temperature"] == t] for t in self.temperatures}
        self._engine = engine
        self._drawn: dict[str, Any] = {"requests": requests_simulated, "seed": seed}
        kept = lru_cache(maxsize=None)
        costs = kept(lambda requests, replay: engine.costs(requests, replay=replay))
        rounds = kept(lambda t: rounds_of(parts[t]))
        self._answers = kept(lambda t: answers_of(parts[t], calibrated, seed=seed))
        self._simulated = kept(self._simulate)
        self.profile = kept(lambda t: acceptance_profile(parts[t], temperature=t))
        self.speedups = kept(
            lambda t, requests, replay: speedup_table(self.profile(t), costs(requests, replay))
        )
        self.advice = kept(
            lambda t, requests, replay: advice(self.profile(t), costs(requests, replay))
        )
        self.by_temperature = kept(
            lambda requests, replay: temperature_table(
                [self.profile(t) for t in self.temperatures], costs(requests, replay)
            )
        )
        self.thresholds = kept(
            lambda t, draft_length, requests, replay: threshold_table(
                rounds(t),
                costs(requests, replay),
                draft_lengths=[draft_length],
                calibrated=calibrated,
            )
        )
        slots = len(self.profile(self.temperatures[0]).rates)
        self.longest = min(slots, engine.longest)
        self.lacking = ""
        if trace["confidence"].isna().all():
            self.lacking = "The drafter has no confidence head: no threshold and no scheduler."
        elif engine.longest < slots:
            self.lacking = (
                f"Blocks have {slots} slots and the engine knows {engine.longest}: no threshold "
                "and no scheduler, which work on whole blocks."
            )

    def load(self, temperature: float, draft_length: int, threshold: float) -> pd.DataFrame:
        """All policies under load, plain decoding first."""
        policies: list[Policy] = [FixedLength(0), FixedLength(draft_length)]
        if not self.lacking:
            policies += [StaticThreshold(threshold), PrefixScheduler()]
        tables = [self._simulated(temperature, policy) for policy in policies]
        return pd.concat(tables, ignore_index=True)

    def prepare(self, threshold: float) -> None:
        """What takes long and does not hang on a threshold, so that controls move at once."""
        for requests, replay in product(CONCURRENCY, (False, True)):
            self.by_temperature(requests, replay)
            for temperature in self.temperatures:
                self.speedups(temperature, requests, replay)
                self.advice(temperature, requests, replay)
        for temperature in self.temperatures:
            for draft_length in range(1, self.longest + 1):
                self.load(temperature, draft_length, threshold)

    def _simulate(self, temperature: float, policy: Policy) -> pd.DataFrame:
        # Plain decoding drafts nothing, and the simulator charges nothing for it.
        drafted = (policy.slots or 1) if isinstance(policy, FixedLength) else self.longest
        return load_table(
            self._answers(temperature),
            self._engine,
            [policy],
            CONCURRENCY,
            draft_length=drafted,
            **self._drawn,
        )


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


def _export_as_html(settings: ServingSettings, kind: str) -> str:
    try:
        return f"<pre>{escape(exported(settings, kind))}</pre>"
    except ValueError as problem:
        return alert(problem)
