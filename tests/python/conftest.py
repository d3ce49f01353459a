"""What all tests share: model directories, made once, and engines that are closed behind them."""

import gc
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

# Set before torch is imported: the tests run on machines with few cores beside other work.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import nano_batch
import random_models
import recital_model
from devices import EXACT
from hypothesis import settings
from nano_batch import Engine, SamplingParams
from recital_model import EOS_ID, TEXT

settings.register_profile("fixed", derandomize=True, deadline=None, print_blob=True)
settings.load_profile("fixed")
# A shell that runs the tests in the background has it ignored, and so would what they start.
signal.signal(signal.SIGINT, signal.default_int_handler)

ROOT = Path(__file__).resolve().parents[2]
PLAIN: dict[str, Any] = EXACT["cpu"]


@pytest.fixture(scope="session")
def root() -> Path:
    return ROOT


@pytest.fixture(scope="session")
def embedded_model() -> Path:
    """The directory of the model that ships inside the package."""
    return Path(nano_batch.__file__).parent / "models" / "austen"


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The directory of a model of `random_models`, written when first asked for."""
    all_models = random_models.MODELS | random_models.GPU_MODELS
    written: dict[str, Path] = {}

    def directory(name: str) -> Path:
        if name not in written:
            path = tmp_path_factory.mktemp("model")
            written[name] = random_models.write(all_models[name], path)
        return written[name]

    return directory


@pytest.fixture(scope="session")
def reciting_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return recital_model.write(tmp_path_factory.mktemp("recital"))


@pytest.fixture
def open_engine() -> Iterator[Callable[..., Engine]]:
    """Opens engines on the CPU in f32 with a small cache, and closes them after the test.

    One thread is enough for so small models, and several processes do not get in each other's way.
    """
    engines = []

    def open_one(model: Path | str | None = None, **options: Any) -> Engine:
        options = {"num_blocks": 256, **PLAIN, **options}
        engine = Engine(model if model is None else str(model), **options)
        engines.append(engine)
        return engine

    yield open_one
    for engine in engines:
        engine.close()
    gc.collect()


@pytest.fixture(scope="session")
def reciting(reciting_dir: Path) -> Iterator[Engine]:
    """An engine on the reciting model, whose cache holds two requests of the longest kind."""
    num_blocks = 2 * recital_model.MAX_MODEL_LEN // 16
    with Engine(str(reciting_dir), num_blocks=num_blocks, **PLAIN) as engine:
        yield engine


@pytest.fixture(scope="session")
def austen() -> Iterator[Engine]:
    """The embedded model in f32."""
    with Engine(num_blocks=1024, **PLAIN) as engine:
        yield engine


@pytest.fixture
def wait_until() -> Callable[[Callable[[], bool], str], None]:
    """Waits for what other threads do; the deadline only keeps a broken engine from hanging."""

    def wait(is_true: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + 60
        while not is_true():
            assert time.monotonic() < deadline, f"did not happen within a minute: {what}"
            time.sleep(0.005)

    return wait


@pytest.fixture
def unharmed(reciting):
    """Requests, one at any time, from before the test's first line to after its last."""
    begun, over = threading.Event(), threading.Event()
    with ThreadPoolExecutor(1) as pool:
        recital = pool.submit(_recite, reciting, begun, over)
        assert begun.wait(60) or recital.result()
        yield
        assert not recital.done() or recital.result()
        over.set()
        assert recital.result() >= 100


def _recite(engine, begun, over) -> int:
    """Recites until it is over, and the last request on to 100 tokens; returns those."""
    params = SamplingParams(temperature=0, max_tokens=60000, ignore_eos=True)
    recital = [*engine.get_tokenizer().encode(TEXT, add_special_tokens=False), EOS_ID]
    num_seen = 0
    while not (over.is_set() and num_seen >= 100):
        num_seen, text = 0, ""
        for piece in engine.stream("?", params):
            tokens = piece.outputs[0].token_ids
            start = num_seen % len(recital)
            rounds = len(tokens) // len(recital) + 2
            assert tokens == (recital * rounds)[start : start + len(tokens)]
            num_seen += len(tokens)
            text += piece.outputs[0].text
            begun.set()
            if over.is_set() and num_seen >= 100:
                break
            time.sleep(0.01)
        # A character that is not whole is held back, and replaced at the very end.
        assert (TEXT * (num_seen // len(recital) + 1)).startswith(text.rstrip("\ufffd"))
    return num_seen
