"""Costs of a round, speed-up, thresholds, schedules and load: a drafter in serving."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
