"""The exceptions of nano_batch. `code` is a stable word; the message names limit and value."""


class NanoBatchError(Exception):
    """The base of all."""

    def __init__(self, message: str, code: str = "error") -> None:
        """Take the message and the stable word."""
        super().__init__(message)
        self.code = code


class InvalidRequestError(NanoBatchError, ValueError):
    """A prompt, sampling parameter or engine option that does not hold."""


class ModelLoadError(NanoBatchError):
    """A model directory that cannot be loaded."""


class RequestFailedError(NanoBatchError):
    """A request has failed on its way, through no fault of its own; the engine serves on."""


class EngineClosedError(NanoBatchError):
    """The engine was closed, or belongs to another process."""


class EngineFailedError(NanoBatchError):
    """A step failed and the engine has ended; make a new one."""
