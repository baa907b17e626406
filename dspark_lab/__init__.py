"""A workbench for DSpark: anchors, block masks, accept rates, and how to choose them.

    import dspark_lab as lab

    lab.explore_anchors("my_chats.jsonl", "Qwen/Qwen3-4B")

Every explorer and every main call has its name here, loaded on first use. ``__init__.pyi`` lists
them.
"""

import lazy_loader

__version__ = "0.1.0"

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
