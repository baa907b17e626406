"""Figures of a CUDA card by one command: ``make gpu``, or ``python -m benchmarks.gpu``."""
