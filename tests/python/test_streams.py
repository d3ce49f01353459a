"""Readers of streams: what one does not take, by an interrupt or an abort, is lost for none."""

import gc
import json
import signal
import threading
import time
import weakref
from contextlib import contextmanager
from pathlib import Path

import pytest
import recital_model
from nano_batch import Engine, SamplingParams
from nano_batch.exceptions import EngineClosedError, RequestFailedError
from recital_model import TEXT
from safetensors.torch import load_file, save_file

SHORT = SamplingParams(temperature=0, max_tokens=60)
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


@pytest.mark.parametrize("read", [lambda stream: stream.collect(), list], ids=["collect", "for"])
def test_a_stream_that_has_ended_lets_go_of_its_engine(read, reciting_dir):
    engine = Engine(str(reciting_dir), device="cpu", num_threads=1, num_blocks=64)
    stream, is_left = engine.stream("?", SHORT), weakref.ref(engine)
    del engine
    assert is_left() is not None
    read(stream)
    gc.collect()
    assert is_left() is None
    assert stream.collect().finished


def test_a_thread_without_signals_waits_without_waking(reciting_dir, open_engine, wait_until):
    engine = open_engine(reciting_dir, num_blocks=8192, max_num_seqs=1)
    streams = [engine.stream("?", LONG) for _ in range(30)]
    waiting = threading.Thread(target=streams[-1].collect)
    waiting.start()

    def status():
        return Path(f"/proc/self/task/{waiting.native_id}/status").read_text()

    def num_wakes():
        return int(status().split("\nvoluntary_ctxt_switches:")[1].split()[0])

    wait_until(lambda: "State:\tS" in status(), "it waits")
    time.sleep(0.1)
    before = num_wakes()
    time.sleep(0.5)
    assert num_wakes() <= before + 1
    for stream in reversed(streams):
        engine.abort(stream.request_id)
    waiting.join()


@pytest.mark.parametrize(
    "encode",
    [
        lambda engine, text: engine.generate(text, use_tqdm=False),
        lambda engine, text: engine.get_tokenizer().encode(text),
    ],
    ids=["generate", "encode"],
)
def test_ctrl_c_interrupts_what_encodes_a_long_text(encode, tmp_path, open_engine):
    path = recital_model.write(tmp_path) / "config.json"
    config = json.loads(path.read_text()) | {"max_position_embeddings": 1 << 24}
    path.write_text(json.dumps(config))
    engine = open_engine(tmp_path, max_model_len=1 << 24)
    with pytest.raises(KeyboardInterrupt), ctrl_c():
        encode(engine, "a " * (1 << 20))
    threads = [comm.read_text() for comm in Path("/proc/self/task").glob("*/comm")]
    assert "nano-encode\n" in threads, "it was interrupted after its end"
    assert engine.generate("?", SHORT, use_tqdm=False)[0].outputs[0].text == TEXT


@pytest.mark.parametrize(
    "use",
    [
        lambda engine: engine.generate(["?"] * 3, LONG, use_tqdm=False),
        lambda engine: engine.logits([5] * 65000),
    ],
    ids=["generate", "logits"],
)
def test_an_exception_aborts_what_was_asked_for_also_while_it_is_kept(
    use, reciting_dir, open_engine, wait_until
):
    # Each step has a token of the clock and one of the others: they would outlast it.
    engine = open_engine(reciting_dir, num_blocks=8192, max_num_batched_tokens=2)
    clock = engine.stream("?", LONG)
    next(clock)
    with pytest.raises(KeyboardInterrupt) as kept, ctrl_c():
        use(engine)

    def is_alone():
        return engine.stats().num_running + engine.stats().num_waiting <= 1

    wait_until(is_alone, "what was asked for is aborted")
    assert not next(clock).finished
    assert kept.value.__traceback__ is not None


def test_a_decoder_that_panics_fails_its_request_alone(tmp_path, open_engine):
    path = recital_model.write(tmp_path) / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    # It cuts a lone "s" at both ends, and there is only one to cut.
    strip = {"type": "Strip", "content": "s", "start": 1, "stop": 1}
    tokenizer["decoder"] = {"type": "Sequence", "decoders": [strip, tokenizer["decoder"]]}
    path.write_text(json.dumps(tokenizer))
    engine = open_engine(tmp_path)
    other = engine.stream("?", SamplingParams(temperature=0, max_tokens=60, detokenize=False))
    with pytest.raises(RequestFailedError, match="a panic") as error:
        engine.generate("?", SamplingParams(temperature=0, max_tokens=60), use_tqdm=False)
    assert error.value.code == "decode_failed"
    assert other.collect().outputs[0].finish_reason == "stop"
    few = SamplingParams(temperature=0, max_tokens=5)
    assert engine.generate("?", few, use_tqdm=False)[0].outputs[0].text == TEXT[:4]


def test_a_prompt_that_gives_no_number_fails_its_request_alone(tmp_path, open_engine):
    path = recital_model.write(tmp_path) / "model.safetensors"
    weights = load_file(path)
    weights["model.embed_tokens.weight"][7] = float("nan")
    save_file(weights, path, metadata={"format": "pt"})
    engine = open_engine(tmp_path)
    other = engine.stream("?", SamplingParams(temperature=0, max_tokens=60))
    with pytest.raises(RequestFailedError, match="no finite number") as error:
        engine.generate([7], use_tqdm=False)
    assert error.value.code == "logits_not_finite"
    assert other.collect().outputs[0].text == TEXT
