from .compare import compare_acceptance, counted_since, drift_over_time
from .reading import load_acceptance, record_of_trace
from .record import AcceptanceRecord

__all__ = [
    "AcceptanceRecord",
    "compare_acceptance",
    "counted_since",
    "drift_over_time",
    "load_acceptance",
    "record_of_trace",
]
