"""How tokens are chosen and when a request ends: vLLM's names and defaults."""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from nano_batch import _native
from nano_batch.checks import check_flag, check_integer, check_number
from nano_batch.exceptions import InvalidRequestError

_MOST = 2**32 - 1


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How tokens are chosen and when a request ends.

    Frozen, and checked when it is made.

    Attributes:
        temperature: What logits are divided by; 0 takes the most likely token (greedy).
        top_p: The most likely tokens whose probabilities add up to this are kept; in (0, 1].
        top_k: As many of the most likely tokens are kept; 0 or -1 keeps all.
        min_p: Tokens below this share of the best token's probability are dropped; in [0, 1].
        seed: The same seed, prompt and parameters give the same tokens; None takes one that
            derives from the engine's seed. In [-2**63, 2**64).
        stop: A string or strings that end the text.
        stop_token_ids: Tokens that end the text.
        ignore_eos: Whether to go on after the model's end-of-sequence token.
        max_tokens: Tokens generated at most; None is as many as `max_model_len` leaves.
        min_tokens: Tokens generated before anything may end the text.
        detokenize: Whether outputs have text beside token ids.
        skip_special_tokens: Whether special tokens are left out of the text.
        include_stop_str_in_output: Whether the text keeps the stop string that ended it.
        n: Continuations of a prompt; 1, as every parameter from here on has its neutral value
            only until its feature is built.

    Raises:
        InvalidRequestError: A value is out of range or not supported yet.
        TypeError: A value is of another type, or a name is unknown.

    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop: str | Sequence[str] | None = None
    stop_token_ids: Sequence[int] | None = None
    ignore_eos: bool = False
    max_tokens: int | None = 16
    min_tokens: int = 0
    detokenize: bool = True
    skip_special_tokens: bool = True
    include_stop_str_in_output: bool = False

    # Parameters without their feature take their neutral value only, and are left out of the repr.
    n: int = field(default=1, repr=False)
    presence_penalty: float = field(default=0.0, repr=False)
    frequency_penalty: float = field(default=0.0, repr=False)
    repetition_penalty: float = field(default=1.0, repr=False)
    logprobs: int | None = field(default=None, repr=False)
    prompt_logprobs: int | None = field(default=None, repr=False)
    logit_bias: dict[int, float] | None = field(default=None, repr=False)
    allowed_token_ids: list[int] | None = field(default=None, repr=False)
    bad_words: list[str] | None = field(default=None, repr=False)
    output_kind: object = field(default=None, repr=False)
    structured_outputs: object = field(default=None, repr=False)
    truncate_prompt_tokens: int | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        """Give every value its plain type and check its range."""
        code = "invalid_sampling_params"
        for it in fields(self):
            value, neutral = getattr(self, it.name), it.default
            if not it.repr and not (value is neutral or value == neutral):
                message = f"{it.name} is not supported yet beyond {neutral!r}, got {value!r}"
                raise InvalidRequestError(message, "unsupported_parameter")

        def plain(name: str, value: object) -> None:
            object.__setattr__(self, name, value)

        for name in ("temperature", "top_p", "min_p"):
            plain(name, check_number(name, getattr(self, name)))
        for name in (
            "ignore_eos",
            "detokenize",
            "skip_special_tokens",
            "include_stop_str_in_output",
        ):
            check_flag(name, getattr(self, name))
        for name, least, most, nothing in (
            ("top_k", -1, _MOST, 0),
            ("min_tokens", 0, _MOST, 0),
            ("max_tokens", 1, _MOST, None),
            ("seed", -(2**63), 2**64 - 1, None),
        ):
            value = getattr(self, name)
            plain(name, nothing if value is None else check_integer(name, value, least, most, code))
        stop = [self.stop] if isinstance(self.stop, str) else self.stop
        plain("stop", _as_tuple("stop", stop))
        for position, text in enumerate(self.stop or []):
            if not isinstance(text, str):
                raise TypeError(f"stop must hold strings, got {text!r} at position {position}")
            if not text:
                message = f"stop string {position} is empty and would match everywhere"
                raise InvalidRequestError(message, code)
        if self.stop and not self.detokenize:
            message = f"{len(self.stop)} stop strings need detokenize=True"
            raise InvalidRequestError(message, code)
        ids = _as_tuple("stop_token_ids", self.stop_token_ids)
        name = "each of stop_token_ids"
        ids = tuple(check_integer(name, token, 0, _MOST, code) for token in ids)
        plain("stop_token_ids", ids)
        _native.check_sampling_params(self)


def _as_tuple(name: str, value: Any) -> tuple[Any, ...]:
    if value is None:
        return ()
    if not isinstance(value, list | tuple):
        kinds = "a string or a list" if name == "stop" else "a list"
        raise TypeError(f"{name} must be {kinds}, got {value!r}")
    return tuple(value)
