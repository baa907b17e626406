"""Functions that run compiled where the machine can compile, and otherwise as they are."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

# One for each kind of model and input; torch's own limit, 8, is of functions that nobody shares.
_MOST_GRAPHS = 256
_TOO_MANY = ("FailOnRecompileLimitHit", "FailOnCacheLimitHit")  # since torch 2.7, and before
_EARLY_BACKWARD = "force_non_lazy_backward_lowering"


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
        self._ran: set[bool] = set()  # with gradients, without
        self.failed = False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return self._function(*args, **kwargs)
        if self._compiled is None and not self.failed:
            try:
                options = {"dynamic": True, "fullgraph": True, **self._options}
                self._compiled = torch.compile(self._function, **options)
            except RuntimeError as error:  # a Python that the compiler does not know
                self._fail(error)
        if self._compiled is not None and not self.failed:
            # Here and not before: the import of torch's compiler takes seconds.
            from torch._dynamo import exc

            try:
                return self._run(self._compiled, *args, **kwargs)
            # What the function itself raises, memory that is exhausted among it, passes.
            except exc.TorchDynamoException as error:
                self._fail(error)
        return self._instead(*args, **kwargs)

    def _run(self, compiled: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        from torch._dynamo import config, exc

        too_many = tuple(getattr(exc, name) for name in _TOO_MANY if hasattr(exc, name))
        try:
            with self._first_time():
                return compiled(*args, **kwargs)
        except too_many:
            # To change the limit takes longer than a kernel, so only where it matters.
            with config.patch(cache_size_limit=_MOST_GRAPHS):
                return compiled(*args, **kwargs)

    def _first_time(self) -> AbstractContextManager[Any]:
        """Compile the backward pass with the forward pass, so that both fail in the same place."""
        from torch._functorch import config

        gradients = torch.is_grad_enabled()
        if gradients in self._ran or not hasattr(config, _EARLY_BACKWARD):
            return nullcontext()
        self._ran.add(gradients)
        return config.patch(_EARLY_BACKWARD, True)

    def _fail(self, error: Exception) -> None:
        self.failed = True
        if not Compiled._warned:
            Compiled._warned = True
            # A back end's error begins with a line that names the back end.
            inner = getattr(error, "inner_exception", error)
            reason = next(filter(None, map(str.strip, str(inner).splitlines())), "no reason given")
            warnings.warn(
                f"torch.compile does not work here ({type(inner).__name__}: {reason}): what it "
                "would run goes on without it, attention with a dense mask, which takes more "
                "time and memory",
                stacklevel=3,
            )
