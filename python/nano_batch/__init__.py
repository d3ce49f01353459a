"""nano_batch: continuous batching and a paged KV cache in Rust, behind a slim Python package.

>>> from nano_batch import Engine, SamplingParams
>>> with Engine() as engine:  # the embedded model
...     outputs = engine.generate(["It is a truth"], SamplingParams(max_tokens=16))
"""

from importlib.util import find_spec as _find_spec

_TORCH = "2.11.0"
if _find_spec("torch") is None:
    raise ImportError(f"nano_batch needs torch {_TORCH}: pip install torch=={_TORCH}")
# Importing torch maps libtorch, on which the extension is built.
import torch as _torch  # noqa: E402

if _torch.__version__.split("+")[0] != _TORCH:
    raise ImportError(
        f"nano_batch is built for torch {_TORCH}, but torch {_torch.__version__} is installed: "
        f"pip install torch=={_TORCH}"
    )

from nano_batch._native import BlockAllocator, __version__  # noqa: E402
from nano_batch.engine import Engine  # noqa: E402
from nano_batch.exceptions import (  # noqa: E402
    EngineClosedError,
    EngineFailedError,
    InvalidRequestError,
    ModelLoadError,
    NanoBatchError,
)
from nano_batch.outputs import (  # noqa: E402
    CompletionOutput,
    EngineStats,
    RequestMetrics,
    RequestOutput,
)
from nano_batch.sampling_params import SamplingParams  # noqa: E402

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
    "RequestMetrics",
    "RequestOutput",
    "SamplingParams",
    "__version__",
]
