from .attention import check_forward, check_mask
from .chats import (
    compare_masks,
    encode,
    encode_all,
    encode_answers,
    load_chats,
    load_tokenizer,
)
from .decoding import decode
from .explore import (
    explore_acceptance,
    explore_anchors,
    explore_decoding,
    explore_masks,
    explore_record,
    explore_serving,
    explore_training_budget,
    readable,
    watch_acceptance,
)
from .model import convert_checkpoint, describe_checkpoint, load_drafter, load_target
from .pairs import load_pair
from .rates import evaluate
from .records import diagnose, load_acceptance
from .training import train
from .tuning import choose_training, export, forecast, pilot

__version__: str

__all__ = [
    "check_forward",
    "check_mask",
    "choose_training",
    "convert_checkpoint",
    "compare_masks",
    "decode",
    "describe_checkpoint",
    "diagnose",
    "encode",
    "encode_all",
    "encode_answers",
    "evaluate",
    "explore_acceptance",
    "explore_anchors",
    "explore_decoding",
    "explore_masks",
    "explore_record",
    "explore_serving",
    "explore_training_budget",
    "export",
    "forecast",
    "load_acceptance",
    "load_chats",
    "load_drafter",
    "load_pair",
    "load_target",
    "load_tokenizer",
    "pilot",
    "readable",
    "train",
    "watch_acceptance",
]
