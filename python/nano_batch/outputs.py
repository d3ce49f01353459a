"""What the engine returns: vLLM's result objects."""

from dataclasses import dataclass


@dataclass(slots=True)
class CompletionOutput:
    """One continuation of a prompt."""

    index: int
    text: str
    token_ids: list[int]
    finish_reason: str | None = None
    """`"stop"`, `"length"`, `"abort"`, or None while it goes on."""
    stop_reason: int | str | None = None
    """The stop token or stop string; None for an end-of-sequence token."""
    cumulative_logprob: None = None
    logprobs: None = None


@dataclass(slots=True)
class RequestMetrics:
    """When the tokens of a request came, in seconds since its submission."""

    first_token_s: float
    last_token_s: float


@dataclass(slots=True)
class RequestOutput:
    """The answer to one prompt, whole or, from `stream`, the part that is new."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    """Shared by all outputs of a request."""
    outputs: list[CompletionOutput]
    finished: bool
    metrics: RequestMetrics
    prompt_logprobs: None = None
    num_cached_tokens: int = 0


@dataclass(frozen=True, slots=True)
class EngineStats:
    """The engine's load after its last step."""

    num_running: int
    num_waiting: int
    num_free_blocks: int
    num_blocks: int
    num_preemptions: int
