from .backends import Backend, MaskForm, attend, block_attention, choose_backend, mask_form
from .compiled import Compiled
from .findings import Finding, Findings
from .forward_check import check_forward
from .given_mask import Runs, visible_runs
from .mask import (
    FULL,
    ContextRanges,
    View,
    block_mask,
    context_ranges,
    dense_mask,
    mask_mod,
    training_block_mask,
    training_dense_mask,
    training_mask_mod,
)
from .mask_check import check_mask
from .mask_rules import Variant

__all__ = [
    "FULL",
    "Backend",
    "Compiled",
    "ContextRanges",
    "Finding",
    "Findings",
    "MaskForm",
    "Runs",
    "Variant",
    "View",
    "attend",
    "block_attention",
    "block_mask",
    "check_forward",
    "check_mask",
    "choose_backend",
    "context_ranges",
    "dense_mask",
    "mask_form",
    "mask_mod",
    "training_block_mask",
    "training_dense_mask",
    "training_mask_mod",
    "visible_runs",
]
