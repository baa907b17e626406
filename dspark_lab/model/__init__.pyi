from .checkpoint import (
    CALIBRATION,
    WEIGHTS,
    convert_checkpoint,
    load_drafter,
    require_checkpoint,
    save_drafter,
)
from .config import DrafterConfig, Yarn, read_scaling
from .describe import describe_checkpoint
from .drafter import Drafter, drafter_sizes
from .features import FeatureSource, cached_features, live_features
from .formats import ARCHITECTURES, Format, family_of
from .heads import MARKOV_HEADS, MarkovHead, MarkovKind, build_markov_head
from .objective import Objective, Sums, chunk_sizes, dspark_objective, most_slots, output_objective
from .protocol import BlockDrafter, DrafterSizes, Features, Proposal, Slots
from .slotwise import DecayGamma, LogitRule, at_least_fp32, decay_weights, slot_weights, survival
from .smollm2 import fetch_smollm2, load_smollm2, save_tokenizer, smollm2_cache, split_digits
from .target import Target, TargetCache, load_target, require_target

__all__ = [
    "ARCHITECTURES",
    "CALIBRATION",
    "MARKOV_HEADS",
    "WEIGHTS",
    "BlockDrafter",
    "DecayGamma",
    "Drafter",
    "DrafterConfig",
    "DrafterSizes",
    "FeatureSource",
    "Features",
    "Format",
    "LogitRule",
    "MarkovHead",
    "MarkovKind",
    "Objective",
    "Proposal",
    "Slots",
    "Sums",
    "Target",
    "TargetCache",
    "Yarn",
    "at_least_fp32",
    "build_markov_head",
    "cached_features",
    "chunk_sizes",
    "convert_checkpoint",
    "decay_weights",
    "describe_checkpoint",
    "drafter_sizes",
    "dspark_objective",
    "family_of",
    "fetch_smollm2",
    "live_features",
    "load_drafter",
    "load_smollm2",
    "load_target",
    "most_slots",
    "output_objective",
    "read_scaling",
    "require_checkpoint",
    "require_target",
    "save_drafter",
    "save_tokenizer",
    "slot_weights",
    "smollm2_cache",
    "split_digits",
    "survival",
]
