"""nano_batch: continuous batching and a paged KV cache in Rust, behind a slim Python package.

>>> from nano_batch import Engine, SamplingParams
>>> with Engine() as engine:  # the embedded model
...     outputs = engine.generate(["It is a truth"], SamplingParams(max_tokens=16))
"""

from nano_batch._native import BlockAllocator, __version__
from nano_batch.engine import Engine, RequestStream
from nano_batch.exceptions import (
    EngineClosedError,
    EngineFailedError,
    InvalidRequestError,
    ModelLoadError,
    NanoBatchError,
    RequestFailedError,
)
from nano_batch.outputs import (
    CompletionOutput,
    EngineStats,
    RequestMetrics,
    RequestOutput,
)
from nano_batch.sampling_params import SamplingParams

LLM = Engine

__all__ = [
    "LLM",
    "BlockAllocator",
    "CompletionOutput",
    "Engine",
    "EngineClosedError",
    "EngineFailedError",
    "EngineStats",
    "InvalidRequestError",
    "ModelLoadError",
    "NanoBatchError",
    "RequestFailedError",
    "RequestMetrics",
    "RequestOutput",
    "RequestStream",
    "SamplingParams",
    "__version__",
]
