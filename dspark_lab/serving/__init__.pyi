from .costs import RoundCosts, break_even, break_even_rate
from .decoded import decode_check, repeated_speeds, speed_table
from .engine import ENGINE, Engine, load_engine
from .experts import Experts
from .load import (
    FixedLength,
    LoadResult,
    Policy,
    PrefixScheduler,
    StaticThreshold,
    load_table,
    simulate,
)
from .profile import AcceptanceProfile, acceptance_profile, rows_of
from .requests import Answers, Geometric, Requests, answers_of, draw_requests
from .schedule import (
    output_distribution,
    prefix_schedule,
    prefix_scheduler,
    retrospective_schedule,
    schedule_table,
)
from .signals import signal_speeds
from .speedup import (
    advice,
    best_length,
    gain_by_length,
    speedup_table,
    temperature_table,
)
from .steps import Speed, StepsPerSecond
from .thresholds import best_threshold, gain_table, threshold_table
from .timing import measure_engine, measure_steps_per_second
from .turns import decode_lengths, length_loss, length_table

__all__ = [
    "AcceptanceProfile",
    "Answers",
    "ENGINE",
    "Engine",
    "Experts",
    "FixedLength",
    "Geometric",
    "LoadResult",
    "Policy",
    "PrefixScheduler",
    "Requests",
    "RoundCosts",
    "Speed",
    "StaticThreshold",
    "StepsPerSecond",
    "acceptance_profile",
    "advice",
    "answers_of",
    "best_length",
    "best_threshold",
    "break_even",
    "break_even_rate",
    "decode_check",
    "decode_lengths",
    "draw_requests",
    "gain_by_length",
    "gain_table",
    "length_loss",
    "length_table",
    "load_engine",
    "load_table",
    "measure_engine",
    "measure_steps_per_second",
    "output_distribution",
    "prefix_schedule",
    "prefix_scheduler",
    "retrospective_schedule",
    "schedule_table",
    "signal_speeds",
    "simulate",
    "repeated_speeds",
    "rows_of",
    "speed_table",
    "speedup_table",
    "temperature_table",
    "threshold_table",
]
