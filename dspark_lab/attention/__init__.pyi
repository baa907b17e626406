from .mask import (
    Backend,
    block_attention,
    context_range,
    training_block_mask,
    training_dense_mask,
    training_mask_mod,
)

__all__ = [
    "Backend",
    "block_attention",
    "context_range",
    "training_block_mask",
    "training_dense_mask",
    "training_mask_mod",
]
