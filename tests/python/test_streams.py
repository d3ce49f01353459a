"""Readers of streams: what one does not take, by an interrupt or an abort, is lost for none."""

import signal
import threading
from contextlib import contextmanager

import pytest
from nano_batch import Engine, SamplingParams
from nano_batch.exceptions import EngineClosedError
from recital_model import TEXT

LONG = SamplingParams(temperature=0, max_tokens=60000, ignore_eos=True)


@contextmanager
def ctrl_c(seconds=0.1):
    """Raises KeyboardInterrupt a moment after what is inside has begun."""
    before = signal.signal(signal.SIGALRM, signal.default_int_handler)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def test_an_interrupted_collect_takes_nothing(reciting):
    params = SamplingParams(temperature=0, max_tokens=30000, ignore_eos=True)
    stream = reciting.stream("?", params)
    with pytest.raises(KeyboardInterrupt), ctrl_c():
        stream.collect()
    output = stream.collect()
    assert output.finished
    assert len(output.outputs[0].token_ids) == 30000


@pytest.mark.parametrize("read", [lambda stream: stream.collect(), list], ids=["collect", "for"])
def test_what_broke_a_stream_off_is_told_to_every_reader(read, reciting_dir, open_engine):
    engine = open_engine(reciting_dir, num_blocks=8192)
    stream = engine.stream("?", LONG)
    next(stream)
    told = []

    def tell():
        try:
            told.append(read(stream))
        except EngineClosedError as error:
            told.append(error.code)

    threads = [threading.Thread(target=tell) for _ in range(4)]
    for thread in threads:
        thread.start()
    engine.close()
    for thread in threads:
        thread.join()
    assert told == ["engine_closed"] * 4


def test_a_stream_keeps_its_engine(reciting_dir):
    def ask():
        engine = Engine(str(reciting_dir), device="cpu", num_threads=1, num_blocks=64)
        return engine.stream("?", SamplingParams(temperature=0, max_tokens=60))

    assert ask().collect().outputs[0].text == TEXT
