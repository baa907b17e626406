"""What servers and trainers write down of acceptance, in the terms of a trace."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
