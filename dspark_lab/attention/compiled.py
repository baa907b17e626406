"""Functions that run compiled where the machine can compile, and otherwise as they are."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch


class Compiled:
    """A function as :func:`torch.compile` makes it, compiled whole and for shapes of every size.

    Where compilation is not to be had (no Triton, no C++ compiler, an old card), ``instead`` runs
    from then on, with the same arguments; the first such failure of a process warns.
    """

    _warned = False

    def __init__(
        self, function: Callable[..., Any], instead: Callable[..., Any], **options: Any
    ) -> None:
        self._function, self._instead, self._options = function, instead, options
        self._compiled: Callable[..., Any] | None = None
        self.failed = False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.failed:
            return self._instead(*args, **kwargs)
        if torch.compiler.is_compiling():
            return self._function(*args, **kwargs)
        if self._compiled is None:
            # Here and not before: it imports torch's compiler, which takes seconds.
            self._compiled = torch.compile(
                self._function, **{"dynamic": True, "fullgraph": True, **self._options}
            )
        try:
            return self._compiled(*args, **kwargs)
        except Exception as error:
            from torch._dynamo import exc

            # What the function itself raises, memory that is exhausted among it, is no failure.
            if not isinstance(error, (exc.TorchDynamoException, exc.FailOnRecompileLimitHit)):
                raise
            self.failed = True
            if not Compiled._warned:
                Compiled._warned = True
                reason = str(error).strip().splitlines()[0]
                warnings.warn(
                    f"torch.compile does not work here ({type(error).__name__}: {reason}): what it "
                    "would run goes on without it, attention with a dense mask, which takes more "
                    "time and memory",
                    stacklevel=2,
                )
        return self._instead(*args, **kwargs)
