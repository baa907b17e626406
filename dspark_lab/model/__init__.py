"""The target, the drafter and its objective."""

from dspark_lab.model.checkpoint import CALIBRATION, load_drafter, save_drafter
from dspark_lab.model.drafter import ARCHITECTURE, Drafter, DrafterConfig, Slots
from dspark_lab.model.features import FeatureSource, cached_features, live_features
from dspark_lab.model.heads import MarkovHead, MarkovKind, build_markov_head
from dspark_lab.model.objective import (
    Objective,
    Sums,
    accept_rates,
    dspark_objective,
    output_objective,
    slot_weights,
    survival,
)
from dspark_lab.model.rows import Rows, take
from dspark_lab.model.target import (
    Features,
    Target,
    TargetCache,
    fetch_smollm2,
    load_smollm2,
    load_target,
    save_tokenizer,
    split_digits,
)

__all__ = [
    "ARCHITECTURE",
    "CALIBRATION",
    "Drafter",
    "DrafterConfig",
    "FeatureSource",
    "Features",
    "MarkovHead",
    "MarkovKind",
    "Objective",
    "Rows",
    "Slots",
    "Sums",
    "Target",
    "TargetCache",
    "accept_rates",
    "build_markov_head",
    "cached_features",
    "dspark_objective",
    "fetch_smollm2",
    "live_features",
    "load_drafter",
    "load_smollm2",
    "load_target",
    "output_objective",
    "save_drafter",
    "save_tokenizer",
    "slot_weights",
    "split_digits",
    "survival",
    "take",
]
