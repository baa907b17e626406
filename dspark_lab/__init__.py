"""A Jupyter workbench for DSpark, the semi-autoregressive drafter of speculative decoding."""

__version__ = "0.1.0"
