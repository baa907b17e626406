from .config import TrainConfig
from .data import ChatsLike, encode_chats, open_chats
from .loop import Forward, Run, train
from .order import BatchOrder, row_groups
from .processes import Processes
from .start import init_from_target, mask_token_id, new_drafter
from .state import History, checkpoints, read_run

__all__ = [
    "BatchOrder",
    "ChatsLike",
    "Forward",
    "History",
    "Processes",
    "Run",
    "TrainConfig",
    "checkpoints",
    "encode_chats",
    "init_from_target",
    "mask_token_id",
    "new_drafter",
    "open_chats",
    "read_run",
    "row_groups",
    "train",
]
