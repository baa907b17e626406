from .config import TrainConfig
from .loop import Run, train
from .order import BatchOrder, row_groups
from .processes import Processes
from .start import init_from_target, mask_token_id, new_drafter
from .state import History, checkpoints

__all__ = [
    "BatchOrder",
    "History",
    "Processes",
    "Run",
    "TrainConfig",
    "checkpoints",
    "init_from_target",
    "mask_token_id",
    "new_drafter",
    "row_groups",
    "train",
]
