"""Pilots: a few short real runs say which settings the rest of a training budget should go to.

Every finished part is a file of the work folder: step times, the noise of the gradient, and each
pilot up to each rung. The same call goes on where it stopped, and the run of the option that it
recommends goes on from where its pilot ended.
"""

from __future__ import annotations

import math
import os
import shlex
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields, replace
from itertools import combinations
from pathlib import Path
from typing import Annotated, Any, Literal

import pandas as pd
import torch

from dspark_lab.checks import Count, NotEmpty, Positive, Share, Size, checked
from dspark_lab.files import read_json, shipped, write_json
from dspark_lab.training import TrainConfig, train
from dspark_lab.tuning.cells import ALL, Cell, SweepConfig
from dspark_lab.tuning.choice import choose_training
from dspark_lab.tuning.extrapolation import Reference
from dspark_lab.tuning.growth import Growth, shipped_growth
from dspark_lab.tuning.jobs import run_jobs
from dspark_lab.tuning.judging import CELL
from dspark_lab.tuning.noise import GradientNoise, measure_noise
from dspark_lab.tuning.progress import progress_table
from dspark_lab.tuning.race import (
    EVALUATIONS,
    Advice,
    Contest,
    NoisePlan,
    Pilot,
    decide,
    known_noise,
    next_pilots,
    noise_plan,
    option_name,
    pilot_allowance,
    pilot_step,
    timed_options,
    usual_noise,
)
from dspark_lab.tuning.results import block_loss, result_table
from dspark_lab.tuning.runs import (
    cell_drafter,
    cell_training,
    measure_cell,
    measure_evaluation,
    require_same_sweep,
    run_cell,
    sweep_materials,
)
from dspark_lab.tuning.settings import TrainingSettings
from dspark_lab.tuning.shape import Shape
from dspark_lab.tuning.spans import Spans
from dspark_lab.tuning.steptime import StepTime, fit_step_time

# The relative error of a step's time where no fit says one.
_ERROR = 0.05


@checked
def pilot(
    target: str | os.PathLike[str] = "pocket",
    chats: str | os.PathLike[str] | None = None,
    *,
    minutes: Positive,
    held_out: str | os.PathLike[str] | None = None,
    num_anchors: Annotated[Sequence[Count], NotEmpty()] = (4, 16, 64),
    block_sizes: Annotated[Sequence[Count], NotEmpty()] = (4, 7, 15),
    batch_sizes: Annotated[Sequence[Count], NotEmpty()] = (2, 8),
    share: Share = 0.15,
    arms: Count = 5,
    work: str | os.PathLike[str] = "build/pilot",
    training: TrainConfig = SweepConfig.training,
    evaluate_chats: Count = 24,
    evaluate_anchors: Count = 8,
    device: str = "cpu",
    features: Literal["live", "cached"] = "cached",
    growth: Growth | None = None,
    reference: Reference | None = None,
    processes: Count = 1,
    address: str | None = None,
    seed: Size = 0,
    progress: bool = True,
) -> Advice:
    """Find the anchors, block size and rows that a training of so many ``minutes`` should have.

    Step times of a few options and the noise of the gradient say what each option makes of the
    time (:func:`progress_table`). Where that leaves open which is the best, and finding out is
    worth its cost, the few that may win are begun, each as the run of the whole budget that it
    would be, and those that fall behind are stopped (successive halving, by the forecast of their
    tau at the end). The winner's run goes on with the answer's ``command``.

    Args:
        target: "pocket", or a folder or hub id, which needs chats and held_out.
        chats: file of conversations to learn from.
        minutes: the budget, of training steps, measurements, and evaluations of the pilots; not
            counted is what the run that is advised does beside its steps.
        held_out: file of conversations to evaluate on.
        share: of the budget that pilots which lose may take; see :func:`pilot_allowance`.
        arms: pilots at most.
        work: folder of the parts, of one such question; all processes must see it.
        training: all other settings; steps, warm-up and checkpoints are the pilot's.
        evaluate_chats: held-out conversations to evaluate on, domains in turn.
        evaluate_anchors: blocks of each of them.
        features: of the target, stored first or asked for every batch.
        growth: how tau grows with progress, see :func:`fit_growth`.
        reference: how learning curves go on, see :func:`learn_curves`; both are those of the
            shipped runs where None.
        processes, address: see :func:`run_jobs`; in this process where there is one alone.
        progress: write a line for each finished part.

    Raises:
        ValueError: ``work`` is the folder of another question, or what is asked cannot be trained.
        KeyboardInterrupt: Ctrl-C, after the step that a run is in; the same call goes on.
    """
    config = SweepConfig(
        num_anchors=tuple(num_anchors),
        block_sizes=tuple(block_sizes),
        batch_sizes=tuple(batch_sizes),
        seeds=(seed,),
        slots=(),
        seconds=(60.0 * minutes,),
        evaluations=EVALUATIONS,
        evaluate_chats=evaluate_chats,
        evaluate_anchors=evaluate_anchors,
        target=os.fspath(target),
        data=None if chats is None else os.fspath(chats),
        held_out=None if held_out is None else os.fspath(held_out),
        device=device,
        features=features,
        training=training,
    )
    place = Path(work).absolute()
    place.mkdir(parents=True, exist_ok=True)
    require_same_sweep(place / "sweep.json", config)
    (budget,) = config.seconds
    options, measured, evaluation = _options(config, place, progress)
    allowed = pilot_allowance(budget, share)
    known: dict[str, Any] = {"growth": growth or shipped_growth(), "reference": reference}
    known["training"] = training
    contest = Contest(options, budget, allowed, measured, evaluation, arms, **known)
    cells = {
        int(label): _cell(config, option, contest.plan.seconds)
        for label, option in options.iterrows()
    }
    threads = torch.get_num_threads()
    try:
        pilots = _race(contest, config, cells, place, processes, address, progress)
    finally:
        torch.set_num_threads(threads)
    advice = decide(contest, pilots)
    chosen = int(advice.best.name)
    own = cell_training(cells[chosen], config, advice.steps, float(options["seconds"][chosen]))
    settings = TrainingSettings(
        own.num_anchors,
        cells[chosen].block_size,
        own.max_length,
        own.batch_size,
        own.loss_decay_gamma,
        own.pack_length,
        own.anchors_per,
    )
    out = place / "runs" / cells[chosen].key
    command = _command(config, cells[chosen].block_size, own, out, place / "features")
    return replace(advice, blocks=_blocks(pilots), settings=settings, command=command)


def _blocks(pilots: Mapping[int, Pilot]) -> str:
    """What long blocks lose where fewer of their slots are served, so far."""
    shares = {one.share for one in pilots.values()}
    if len(shares) != 1:
        return ""
    lines = pd.concat([one.lines for one in pilots.values()])
    for trained, served in combinations(sorted(set(lines["block_size"]), reverse=True), 2):
        loss = block_loss(lines, trained, served, by=())
        if len(loss):
            one = loss.iloc[0]
            return (
                f"Trained on blocks of {trained} slots, of which {served} are served, drafters "
                f"have {one['lost']:.1%} less tau so far than trained on {served} "
                f"({one['low']:.1%} to {one['high']:.1%})."
            )
    return ""


def _run(
    jobs: dict[str, tuple[Any, ...]],
    folder: Path,
    processes: int,
    address: str | None,
    progress: bool,
) -> dict[str, dict[str, Any]]:
    """The results of :func:`run_cell`, of which the folder has those that are finished."""
    folder.mkdir(exist_ok=True)
    left = {key: given for key, given in jobs.items() if not (folder / f"{key}.json").exists()}
    results: Iterable[tuple[str, dict[str, Any]]]
    if processes == 1 and address is None:
        results = ((key, run_cell(*given)) for key, given in left.items())
    else:
        results = run_jobs(run_cell, left, processes=processes, address=address)
    for key, result in results:
        write_json(folder / f"{key}.json", result, indent=0)
        if progress:
            print(f"pilot {key}", file=sys.stderr, flush=True)
    return {key: read_json(folder / f"{key}.json") for key in jobs}


def _command(
    config: SweepConfig, block_size: int, training: TrainConfig, out: Path, cache: Path
) -> str:
    """The command line that makes or goes on with a run."""
    files: dict[str, Any] = {"target": config.target, "data": config.data}
    if config.target == "pocket":
        pocket = shipped("pocket")
        files = {"target": pocket / "target", "data": pocket / "train.jsonl"}
    given: dict[str, Any] = {"out": out, **files, "device": config.device}
    given |= {"features": config.features, "cache": cache, "block-size": block_size}
    for field in fields(training):
        value = getattr(training, field.name)
        if value != field.default:
            given[field.name.replace("_", "-")] = value
    flags = " ".join(f"--{name} {shlex.quote(str(value))}" for name, value in given.items())
    return f"python -m dspark_lab.training {flags}"


def _options(config: SweepConfig, work: Path, progress: bool) -> tuple[pd.DataFrame, float, float]:
    """The options with their progress, the seconds that this took, and those of an evaluation."""
    path, columns = work / "options.json", [*CELL, "seconds", "noise", "rate", "low", "high"]
    if not path.exists():
        table, spent = _timed(config, work, progress)
        plan = noise_plan(table, config.seconds[0])
        if plan is None:
            options = usual_noise(table)
        else:
            noise, seconds = _noise(config, table, plan, work)
            spent += seconds
            training = config.training
            spans = Spans.of(sweep_materials(config).chats, row_length=training.pack_length)
            sizes: dict[str, Any] = {"batch_sizes": config.batch_sizes}
            sizes |= {"num_anchors": config.num_anchors, "block_sizes": config.block_sizes}
            options = progress_table(noise, spans, table, per=training.anchors_per, **sizes)
            options = known_noise(options)
        longest = table.loc[table["block_size"].idxmax()]
        evaluation = measure_evaluation(_cell(config, longest, config.seconds[0]), config, work)
        spent += evaluation
        found = {"seconds": spent, "evaluation": evaluation}
        write_json(path, found | {"options": options[columns].to_dict("records")}, indent=0)
    found = read_json(path)
    return pd.DataFrame(found["options"]), float(found["seconds"]), float(found["evaluation"])


def _timed(config: SweepConfig, work: Path, progress: bool) -> tuple[pd.DataFrame, float]:
    """Seconds of each option's step: measured of a few, which a fit carries over to the others."""
    table, (budget,) = _operations(config), config.seconds
    path = work / "step_seconds.json"
    known: dict[str, float] = read_json(path) if path.exists() else {}

    def measure(label: int) -> float:
        cell = _cell(config, table.loc[label], budget)
        if cell.step_kind not in known:
            known[cell.step_kind] = measure_cell(cell, config, work, 0.0)[0]
            write_json(path, known, indent=0)
            if progress:
                told = f"{option_name(table.loc[label])}: {known[cell.step_kind] * 1e3:.1f} ms"
                print(f"{told} a step", file=sys.stderr, flush=True)
        return known[cell.step_kind]

    found, spent = timed_options(table["operations"], budget, measure)
    measured = pd.Series(found)
    table["seconds"], table["error"] = measured.iloc[0], _ERROR
    if table["operations"][measured.index].nunique() > 1:
        fit = fit_step_time(table.loc[measured.index, ["operations"]].assign(seconds=measured))
        table["seconds"] = fit.predict(table["operations"])
        table["error"] = _ERROR if math.isnan(fit.error) else fit.error
    table.loc[measured.index, "seconds"] = measured
    return table, spent


def _cell(config: SweepConfig, option: pd.Series, seconds: float) -> Cell:
    rows, anchors, block_size = (int(option[name]) for name in CELL)
    amount, (seed,) = round(seconds, 3), config.seeds
    return Cell("seconds", amount, ALL, rows, anchors, block_size, seed)


def _operations(config: SweepConfig) -> pd.DataFrame:
    """Operations of a step of each option."""
    shared, training = sweep_materials(config), config.training
    cells = config.cells()
    shape = Shape.of(cell_drafter(cells[0], shared).config)
    given: dict[str, Any] = {"num_anchors": config.num_anchors, "block_sizes": config.block_sizes}
    given |= {"gamma": training.loss_decay_gamma, "dtype": training.precision}
    given |= {"per": training.anchors_per, "features": "cached"}
    if training.pack_length is not None:
        given |= {"seq_lens": (training.pack_length,), "packed": True}
    parts = []
    for rows in config.batch_sizes:
        time = StepTime(1.0, 0.0, 0.0, 0.0, 0)
        table = choose_training(shared.chats, shape, time=time, batch_size=rows, **given).table
        parts.append(table[[*CELL[1:], "operations"]].assign(batch_size=rows))
    return pd.concat(parts, ignore_index=True)


def _noise(
    config: SweepConfig, table: pd.DataFrame, plan: NoisePlan, work: Path
) -> tuple[GradientNoise, float]:
    """The noise of the gradient of a drafter that has learned a little, and what it took."""
    shared, line = sweep_materials(config), table.loc[plan.label]
    cell = _cell(config, line, config.seconds[0])
    training = cell_training(cell, config, plan.steps, float(line["seconds"]))
    drafter = cell_drafter(cell, shared)
    given: dict[str, Any] = {"features": config.features, "cache": work / "features"}
    given |= {"out": work / "runs" / "warm", "progress": False}
    if train(drafter, shared.target, shared.chats, training, **given).interrupted:
        raise KeyboardInterrupt
    begin = time.process_time()
    of = (drafter, shared.target, shared.chats, training)
    sizes: dict[str, Any] = {"block_sizes": config.block_sizes}
    noise = measure_noise(*of, conversations=plan.conversations, **sizes)
    return noise, plan.steps * float(line["seconds"]) + time.process_time() - begin


def _race(
    contest: Contest,
    config: SweepConfig,
    cells: Mapping[int, Cell],
    work: Path,
    processes: int,
    address: str | None,
    progress: bool,
) -> dict[int, Pilot]:
    """The pilots that were asked for, one rung after the other."""
    pilots: dict[int, Pilot] = {}
    while todo := next_pilots(contest, pilots):
        jobs: dict[str, tuple[Any, ...]] = {}
        for label, part in todo.items():
            steps, own = int(contest.steps[label]), float(contest.options["seconds"][label])
            until = pilot_step(steps, part)
            key = f"{cells[label].key}-step{until}"
            jobs[key] = (cells[label], config, steps, own, work, until)
        found = _run(jobs, work / "pilots", processes, address, progress)
        for (label, part), key in zip(todo.items(), jobs, strict=True):
            pilots[label] = Pilot(part, result_table([found[key]]))
    return pilots
