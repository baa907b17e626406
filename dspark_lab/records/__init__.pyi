from .causes import (
    CAUSES,
    FIGURES,
    HEALTHY,
    Diagnosis,
    diagnose,
    figures_of,
    likelihoods,
    trained_record,
)
from .compare import acceptance_over, compare_acceptance, counted_since, speedup_by
from .decision import OPTION_COLUMNS, Action, Decision, decide_serving, record_parts
from .exchange import (
    load_scaling,
    load_shards,
    load_step_costs,
    read_engine,
    save_scaling,
    save_step_costs,
)
from .reading import load_acceptance, record_of_trace, trace_of_dump
from .record import AcceptanceRecord
from .scalings import compare_scalings, fit_joint_temperatures, scaling_advice

__all__ = [
    "CAUSES",
    "FIGURES",
    "HEALTHY",
    "OPTION_COLUMNS",
    "AcceptanceRecord",
    "Action",
    "Decision",
    "Diagnosis",
    "acceptance_over",
    "compare_acceptance",
    "compare_scalings",
    "counted_since",
    "decide_serving",
    "diagnose",
    "figures_of",
    "fit_joint_temperatures",
    "likelihoods",
    "load_acceptance",
    "load_scaling",
    "load_shards",
    "load_step_costs",
    "read_engine",
    "record_of_trace",
    "record_parts",
    "save_scaling",
    "save_step_costs",
    "scaling_advice",
    "speedup_by",
    "trace_of_dump",
    "trained_record",
]
