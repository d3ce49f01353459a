"""Where tests run: on the CPU, and on a GPU where there is one."""

from typing import Any

import pytest
import torch

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
DEVICES = ["cpu", pytest.param("cuda", marks=needs_gpu)]
# What makes a sequence's numbers depend on nothing but itself.
EXACT: dict[str, dict[str, Any]] = {
    "cpu": {"device": "cpu", "dtype": "float32", "num_threads": 1},
    "cuda": {"device": "cuda", "dtype": "bfloat16", "deterministic": True},
}
