"""NVIDIA's compiler and products for a GPU, found where pip puts them."""

import ctypes
import logging
from importlib.util import find_spec
from pathlib import Path

# In the order of who needs whom: the compiler does not find its builtins by itself.
_NAMES = ("libnvrtc-builtins.so.13*", "libnvrtc.so.13", "libcublasLt.so.13")
_LOGGER = logging.getLogger("nano_batch")


def map_cuda_libraries() -> None:
    """Map NVRTC and cuBLASLt of pip's `nvidia` packages, so that the engine finds them by name.

    Without a driver there is no GPU to need them; without the packages the system's are left to
    be found.
    """
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return
    nvidia = find_spec("nvidia")
    for folder in (nvidia and nvidia.submodule_search_locations) or []:
        for name in _NAMES:
            for path in Path(folder).glob(f"cu13/lib/{name}"):
                ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
                _LOGGER.debug("mapped %s", path)
