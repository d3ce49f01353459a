from os import PathLike
from typing import Any, TypeAlias, final

from nano_batch.sampling_params import SamplingParams

__all__ = [
    "BlockAllocator",
    "Engine",
    "RequestStream",
    "Tokenizer",
    "__version__",
    "check_sampling_params",
]
__version__: str

_Delta: TypeAlias = tuple[list[int], str, str | None, int | str | None, float, float]
"""token_ids, text, finish_reason, stop_reason, first_token_s, last_token_s."""

@final
class BlockAllocator:
    """Hands out the blocks `0 .. num_blocks` of a KV cache, each with a reference count."""

    def __new__(cls, num_blocks: int) -> BlockAllocator: ...
    @property
    def num_blocks(self) -> int: ...
    @property
    def num_free(self) -> int: ...
    def ref_count(self, block: int) -> int: ...
    def allocate(self) -> int | None: ...
    def retain(self, block: int) -> None: ...
    def free(self, block: int) -> bool: ...

def check_sampling_params(params: SamplingParams) -> None:
    """Raise what is out of range."""

@final
class RequestStream:
    """Reads deltas; dropping it aborts the request."""

    @property
    def request_id(self) -> str: ...
    @property
    def prompt_token_ids(self) -> list[int]: ...
    def next(self) -> _Delta | None: ...
    def collect(self) -> _Delta: ...
    def collect_logits(self) -> bytearray: ...

@final
class Tokenizer:
    """Text to tokens and back, as the engine does it."""

    @property
    def vocab_size(self) -> int: ...
    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]: ...
    def decode(self, token_ids: list[int], *, skip_special_tokens: bool = True) -> str: ...

@final
class Engine:
    """A running engine behind `nano_batch.Engine`."""

    def __new__(
        cls,
        model_dir: str | PathLike[str],
        *,
        device: str,
        dtype: str,
        max_model_len: int | None,
        gpu_memory_utilization: float,
        max_num_seqs: int,
        max_num_batched_tokens: int | None,
        block_size: int,
        num_blocks: int | None,
        kv_cache_bytes: int | None,
        num_threads: int | None,
        max_itl_ns: int | None,
        deterministic: bool,
        seed: int,
        dummy_weights: bool,
    ) -> Engine: ...
    def submit(self, prompt: str | list[int], params: SamplingParams) -> RequestStream: ...
    def submit_logits(self, token_ids: list[int]) -> RequestStream: ...
    def abort(self, request_id: str) -> None: ...
    def stats(self) -> tuple[int, int, int, int]: ...
    def tokenizer(self) -> Tokenizer: ...
    def default_sampling_params(self) -> dict[str, Any]: ...
    @property
    def vocab_size(self) -> int: ...
    @property
    def max_model_len(self) -> int: ...
    @property
    def num_blocks(self) -> int: ...
    @property
    def block_size(self) -> int: ...
    @property
    def device(self) -> str: ...
    @property
    def weight_bytes(self) -> int: ...
    @property
    def dtype(self) -> str: ...
    def close(self) -> None: ...
