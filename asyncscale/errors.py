"""Every error that asyncscale raises on purpose, in one tree::

AsyncScaleError
├── InvalidRequestError (ValueError)      the call was wrong; nothing was sent
├── ModelLoadError                        the model cannot be found, read or supported
├── OverloadedError                       no room, and the caller asked not to wait
├── RequestTimeoutError (TimeoutError)    the request's own timeout ran out
├── RequestAbortedError                   the request was aborted before it finished
├── ClientStateError (RuntimeError)       used before start, or from another event loop
│   └── ClientClosedError                 you closed the client
├── EngineError                           an engine failed
│   ├── EngineStartError                  it never became ready
│   └── EngineDeadError                   it was ready, and died
└── FrontendError                         a front end ended without a result or an exception to raise
"""

from __future__ import annotations


class AsyncScaleError(Exception):
    """Base of every error that asyncscale raises on purpose."""


class InvalidRequestError(AsyncScaleError, ValueError):
    """A request's arguments are wrong. Raised by the call itself, before anything is sent."""


class ModelLoadError(AsyncScaleError):
    """The model cannot be found, read, or is of an architecture that is not supported."""


class OverloadedError(AsyncScaleError):
    """There is no room for the request, and the caller asked not to wait for any."""


class RequestTimeoutError(AsyncScaleError, TimeoutError):
    """The request's `timeout` ran out; it was aborted on its engine."""


class RequestAbortedError(AsyncScaleError):
    """The request was aborted (by `abort()` or by leaving its stream early) before it finished."""


class ClientStateError(AsyncScaleError, RuntimeError):
    """The client was used before it was started, or from an event loop that it was not started on."""


class ClientClosedError(ClientStateError):
    """The client was closed by its user; requests that were under way end with this."""


class EngineError(AsyncScaleError):
    """An engine process failed.

    engine_id: which engine. exit_code: of its process, negative for a signal, None while unknown.
    stderr_tail: the end of what the process wrote to stderr.
    """

    def __init__(self, message: str, *, engine_id: int, exit_code: int | None = None, stderr_tail: str = "") -> None:
        super().__init__(message)
        self.engine_id = engine_id
        self.exit_code = exit_code
        self.stderr_tail = stderr_tail

    def __str__(self) -> str:
        text = super().__str__()
        return (
            f"{text}\n--- end of engine {self.engine_id}'s stderr ---\n{self.stderr_tail}" if self.stderr_tail else text
        )


class EngineStartError(EngineError):
    """An engine did not become ready: the message carries the child's traceback, if it had one."""


class EngineDeadError(EngineError):
    """An engine that had been ready died."""


class FrontendError(AsyncScaleError):
    """A front end of `run_frontends` ended without a result, or with one, or an exception, that cannot be pickled.

    index: which front end. exit_code: of its process, negative for a signal, None while it runs.
    """

    def __init__(self, message: str, *, index: int, exit_code: int | None = None) -> None:
        super().__init__(message)
        self.index = index
        self.exit_code = exit_code
