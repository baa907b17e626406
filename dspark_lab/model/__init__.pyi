from .checkpoint import CALIBRATION, load_drafter, save_drafter
from .drafter import ARCHITECTURE, Drafter, DrafterConfig, Slots
from .features import FeatureSource, cached_features, live_features
from .heads import MarkovHead, MarkovKind, build_markov_head
from .objective import (
    Objective,
    Sums,
    accept_rates,
    dspark_objective,
    output_objective,
    slot_weights,
    survival,
)
from .rows import Rows, take
from .smollm2 import (
    fetch_smollm2,
    load_smollm2,
    save_tokenizer,
    smollm2_cache,
    split_digits,
)
from .target import (
    Features,
    Target,
    TargetCache,
    load_target,
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
    "smollm2_cache",
    "slot_weights",
    "split_digits",
    "survival",
    "take",
]
