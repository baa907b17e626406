from .loop import Decoding, decode, decode_rounds
from .outcomes import (
    OTHERS,
    OUTCOMES,
    TOKEN_KINDS,
    distribution_table,
    distribution_tables,
    greedy_differences,
    outcome_table,
    token_kind,
    token_kinds,
)
from .random_numbers import RandomNumbers
from .record import Decoded, Round
from .settings import Scheduler
from .text import Prompt, encode_prompt
from .trace import (
    TRACE_COLUMNS,
    Outcome,
    Rounds,
    column,
    load_trace,
    probabilities,
    read_trace,
    rounds_of,
    save_trace,
    slot_before,
)
from .verification import Verdict, distribution, residual, verify

__all__ = [
    "Decoded",
    "Decoding",
    "OTHERS",
    "OUTCOMES",
    "Outcome",
    "Prompt",
    "RandomNumbers",
    "Round",
    "Rounds",
    "Scheduler",
    "TOKEN_KINDS",
    "TRACE_COLUMNS",
    "Verdict",
    "column",
    "decode",
    "decode_rounds",
    "distribution",
    "distribution_table",
    "distribution_tables",
    "encode_prompt",
    "greedy_differences",
    "load_trace",
    "outcome_table",
    "probabilities",
    "read_trace",
    "residual",
    "rounds_of",
    "save_trace",
    "slot_before",
    "token_kind",
    "token_kinds",
    "verify",
]
