from .loop import (
    History,
    TrainConfig,
    checkpoints,
    init_from_target,
    mask_token_id,
    new_drafter,
    train,
)

__all__ = [
    "History",
    "TrainConfig",
    "checkpoints",
    "init_from_target",
    "mask_token_id",
    "new_drafter",
    "train",
]
