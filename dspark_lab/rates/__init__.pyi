from .acceptance import rate_table, tau_table, trace_sums
from .calibration import calibration_report, drift_table, reliability_tables, split_prompts, study
from .claims import claims_table
from .intervals import bootstrap, interval, ratio_interval, resampled
from .scaling import (
    TEMPERATURE_GRID,
    SequentialTemperatures,
    disjoint_rounds,
    fit_identifiable_slots,
    non_identifiable_slots,
    online_temperatures,
    temperature_scale,
)
from .scores import (
    Binning,
    as_numbers,
    as_probabilities,
    auroc,
    brier,
    expected_calibration_error,
    reliability_table,
)
from .survival import prefix_survival
from .teacher_forced import (
    BlockRates,
    block_sums,
    compare_drafters,
    drafter_table,
    evaluate,
    slot_table,
    teacher_forced_answers,
    teacher_forced_sums,
    whole_block_anchors,
)
from .thresholds import THRESHOLDS, highest_threshold, sums_by_threshold, threshold_sweep

__all__ = [
    "BlockRates",
    "block_sums",
    "Binning",
    "SequentialTemperatures",
    "TEMPERATURE_GRID",
    "THRESHOLDS",
    "as_numbers",
    "as_probabilities",
    "auroc",
    "bootstrap",
    "brier",
    "calibration_report",
    "claims_table",
    "compare_drafters",
    "disjoint_rounds",
    "drafter_table",
    "drift_table",
    "evaluate",
    "expected_calibration_error",
    "fit_identifiable_slots",
    "highest_threshold",
    "interval",
    "non_identifiable_slots",
    "online_temperatures",
    "prefix_survival",
    "rate_table",
    "ratio_interval",
    "reliability_table",
    "reliability_tables",
    "resampled",
    "slot_table",
    "split_prompts",
    "study",
    "sums_by_threshold",
    "tau_table",
    "teacher_forced_sums",
    "teacher_forced_answers",
    "temperature_scale",
    "threshold_sweep",
    "trace_sums",
    "whole_block_anchors",
]
