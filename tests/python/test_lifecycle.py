"""Threads, processes and the ends of things: nothing hangs, nothing leaks."""

import gc
import logging
import os
import threading
from pathlib import Path

import nano_batch
import pytest
import random_models
from nano_batch import Engine, SamplingParams
from nano_batch.exceptions import EngineClosedError
from programs import OPEN, end_of, run_script
from random_models import MODELS, edit_config
from recital_model import TEXT

LONG = SamplingParams(temperature=0, max_tokens=60000, ignore_eos=True)
SHORT = SamplingParams(temperature=0, max_tokens=60)


def is_idle(engine):
    stats = engine.stats()
    return stats.num_running == stats.num_waiting == 0 and stats.num_free_blocks == stats.num_blocks


def test_dropping_a_stream_aborts_its_request(reciting, wait_until):
    stream = reciting.stream("?", LONG)
    next(stream)
    assert reciting.stats().num_running == 1
    del stream
    gc.collect()
    wait_until(lambda: is_idle(reciting), "the dropped request is gone and its blocks are free")


def test_leaving_a_loop_aborts_its_request(reciting, wait_until):
    for output in reciting.stream("?", LONG):
        if output.outputs[0].token_ids:
            break
    gc.collect()
    wait_until(lambda: is_idle(reciting), "the request left behind is gone")


def test_abort_from_another_thread_ends_the_stream(reciting, wait_until):
    stream = reciting.stream("?", LONG)
    next(stream)
    thread = threading.Thread(target=reciting.abort, args=(stream.request_id,))
    thread.start()
    last = [*stream][-1]
    thread.join()
    assert last.finished
    assert last.outputs[0].finish_reason == "abort"
    wait_until(lambda: is_idle(reciting), "the aborted request is gone")


def test_abort_of_a_request_that_has_ended_does_nothing(reciting):
    stream = reciting.stream("?", SHORT)
    request_id = stream.request_id
    assert [*stream][-1].outputs[0].finish_reason == "stop"
    reciting.abort(request_id)
    assert reciting.generate("?", SHORT, use_tqdm=False)[0].outputs[0].text == TEXT


def test_abort_spares_the_other_requests(reciting):
    streams = [reciting.stream("?", LONG if i == 1 else SHORT) for i in range(3)]
    reciting.abort(streams[1].request_id)
    texts = ["".join(output.outputs[0].text for output in stream) for stream in streams]
    assert (texts[0], texts[2]) == (TEXT, TEXT)


def test_a_stream_that_was_read_to_its_end_has_nothing_more(reciting):
    stream = reciting.stream("?", SHORT)
    assert "".join(output.outputs[0].text for output in stream) == TEXT
    assert list(stream) == []
    rest = stream.collect()
    assert rest.finished
    assert (rest.outputs[0].text, rest.outputs[0].token_ids) == ("", [])
    assert rest.outputs[0].finish_reason == "stop"


def test_what_broke_a_stream_off_is_told_each_time(reciting_dir, open_engine):
    engine = open_engine(reciting_dir)
    stream = engine.stream("?", SamplingParams(max_tokens=3000, ignore_eos=True))
    next(stream)
    engine.close()
    for read in (lambda: list(stream), stream.collect, lambda: next(stream)):
        with pytest.raises(EngineClosedError, match="closed"):
            read()


def test_a_slow_reader_holds_up_nobody(reciting):
    params = SamplingParams(temperature=0, max_tokens=3000, ignore_eos=True)
    slow = reciting.stream("?", params)
    first = next(slow)
    fast = "".join(output.outputs[0].text for output in reciting.stream("?", params))
    # What the slow reader has not taken is merged, and nothing of it is lost.
    rest = [*slow]
    text = first.outputs[0].text + "".join(output.outputs[0].text for output in rest)
    assert text == fast
    assert len(rest) < 1500


def test_the_gil_is_free_while_generate_waits(reciting):
    ticks, is_over = [], threading.Event()

    def tick():
        while not is_over.wait(0.001):
            ticks.append(None)

    thread = threading.Thread(target=tick)
    thread.start()
    before = len(ticks)
    params = SamplingParams(temperature=0, max_tokens=30_000, ignore_eos=True)
    reciting.generate("?", params, use_tqdm=False)
    during = len(ticks) - before
    is_over.set()
    thread.join()
    assert during > 20


def test_threads_share_an_engine(reciting):
    texts = {}

    def ask(index):
        params = SamplingParams(temperature=0, max_tokens=5 + index, ignore_eos=True)
        texts[index] = reciting.generate("?", params, use_tqdm=False)[0].outputs[0].text

    threads = [threading.Thread(target=ask, args=(index,)) for index in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index, text in texts.items():
        expected = ((TEXT * 2).encode()[: 5 + index]).decode(errors="replace")
        assert text == expected
    assert len(texts) == 20


def test_two_engines_live_in_one_process(reciting_dir, open_engine):
    one, two = open_engine(reciting_dir), open_engine(reciting_dir, block_size=8)
    streams = [engine.stream("?", SHORT) for engine in (one, two)]
    assert ["".join(o.outputs[0].text for o in stream) for stream in streams] == [TEXT, TEXT]
    one.close()
    assert two.generate("?", SHORT, use_tqdm=False)[0].outputs[0].text == TEXT


def test_closing_ends_a_stream_with_an_error(reciting_dir, open_engine):
    engine = open_engine(reciting_dir, num_blocks=8192)
    streams = [engine.stream("?", LONG) for _ in range(3)]
    next(streams[0])
    thread = threading.Thread(target=engine.close)
    thread.start()
    for stream in streams:
        with pytest.raises(EngineClosedError, match="closed") as error:
            for _ in stream:
                pass
        assert error.value.code == "engine_closed"
    thread.join()


def test_closing_ends_a_step_of_many_layers(open_engine, tmp_path, caplog, wait_until):
    """Its end is not waited for, nor is it left to run on after two seconds."""
    directory = random_models.write(MODELS["v0.2"], tmp_path)
    sizes = {"hidden_size": 128, "intermediate_size": 512, "num_attention_heads": 2}
    many = {**sizes, "num_hidden_layers": 200, "max_position_embeddings": 4096}
    edit_config(directory, lambda config: config.update(many, num_key_value_heads=2))
    caplog.set_level(logging.DEBUG, "nano_core")
    engine = open_engine(directory, load_format="dummy", max_num_batched_tokens=4096)
    stream = engine.stream([1] * 4000)
    wait_until(lambda: any("step=1" in it.message for it in caplog.records), "the step runs")
    engine.close()
    with pytest.raises(EngineClosedError, match="closed"):
        next(stream)
    assert [it for it in caplog.records if "closed" in it.message or it.levelname == "ERROR"] == []


def test_a_closed_engine_refuses_every_use(reciting_dir, open_engine):
    engine = open_engine(reciting_dir)
    engine.close()
    engine.close()
    for use in (
        lambda: engine.generate("?", SHORT, use_tqdm=False),
        lambda: engine.stream("?", SHORT),
        lambda: engine.logits([1, 2, 3]),
        lambda: engine.abort("0"),
        engine.stats,
    ):
        with pytest.raises(EngineClosedError, match="closed"):
            use()
    assert isinstance(repr(engine), str)


def test_a_with_block_closes_the_engine(reciting_dir):
    with Engine(str(reciting_dir), device="cpu", num_threads=1, num_blocks=64) as engine:
        assert engine.generate("?", SHORT, use_tqdm=False)[0].outputs[0].text == TEXT
    with pytest.raises(EngineClosedError):
        engine.generate("?", SHORT)


def test_engines_come_and_go_without_leaving_threads(reciting_dir):
    def num_threads():
        return len(os.listdir("/proc/self/task"))

    def come_and_go():
        with Engine(str(reciting_dir), device="cpu", num_threads=1, num_blocks=64) as engine:
            engine.generate("?", SHORT, use_tqdm=False)

    come_and_go()
    before = num_threads()
    for _ in range(5):
        come_and_go()
    assert num_threads() <= before + 1


def test_a_deleted_engine_gives_its_threads_back(reciting_dir, wait_until):
    def output_threads():
        threads = Path("/proc/self/task").glob("*/comm")
        return {path.parent.name for path in threads if path.read_text() == "nano-output\n"}

    others = output_threads()
    engine = Engine(str(reciting_dir), device="cpu", num_threads=1, num_blocks=64)
    wait_until(lambda: len(output_threads() - others) == 1, "the thread has its name")
    del engine
    gc.collect()
    wait_until(lambda: output_threads() <= others, "the engine's threads end")


def test_llm_is_another_name_of_engine():
    assert nano_batch.LLM is Engine


def test_a_program_may_end_with_an_engine_open_and_a_request_running(reciting_dir):
    script = f"""{OPEN}
    stream = engine.stream('?', LONG)
    next(stream)
    """
    with run_script(script, reciting_dir) as process:
        _, errors = end_of(process)
    assert (process.returncode, errors) == (0, "")


def test_use_after_a_fork_is_a_clear_error(reciting_dir):
    script = f"""{OPEN}
    from nano_batch.exceptions import EngineClosedError
    stream = engine.stream('?', LONG)
    next(stream)
    child = os.fork()
    if child == 0:
        uses = [
            lambda: engine.generate('?', LONG, use_tqdm=False),
            lambda: engine.stream('?', LONG),
            lambda: engine.logits([1, 2]),
        ]
        for use in uses:
            try:
                use()
            except EngineClosedError as error:
                assert 'fork' in str(error), error
                assert str(os.getpid()) in str(error), error
                assert error.code == 'used_after_fork', error.code
            else:
                os._exit(1)
        engine.close()
        os._exit(7)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 7, status
    next(stream)
    del stream
    short = SamplingParams(temperature=0, max_tokens=60)
    print(engine.generate('?', short, use_tqdm=False)[0].outputs[0].text, flush=True)
    """
    with run_script(script, reciting_dir) as process:
        output, errors = end_of(process)
    assert (process.returncode, output.strip()) == (0, TEXT), errors


def test_a_new_engine_works_after_a_fork(reciting_dir):
    """As `multiprocessing` with its fork method does it, before any engine exists."""
    script = """
    import os, sys
    from nano_batch import Engine, SamplingParams
    child = os.fork()
    with Engine(sys.argv[1], device="cpu", num_threads=1, num_blocks=64) as engine:
        params = SamplingParams(temperature=0, max_tokens=60)
        text = engine.generate("?", params, use_tqdm=False)[0].outputs[0].text
    if child:
        _, status = os.waitpid(child, 0)
        assert os.waitstatus_to_exitcode(status) == 0, status
        print(text)
    """
    with run_script(script, reciting_dir) as process:
        output, errors = end_of(process)
    assert (process.returncode, output.strip()) == (0, TEXT), errors


def test_the_bar_is_silent_when_stderr_is_no_terminal(reciting, capfd):
    reciting.generate(["?"] * 3, SHORT)
    assert capfd.readouterr() == ("", "")


def test_stats_count_what_runs(reciting_dir, open_engine, wait_until):
    engine = open_engine(reciting_dir, num_blocks=8192, max_num_seqs=2)
    assert is_idle(engine)
    streams = [engine.stream("?", LONG) for _ in range(5)]

    def is_full():
        stats = engine.stats()
        return (stats.num_running, stats.num_waiting) == (2, 3)

    wait_until(is_full, "two requests run and three wait")
    assert engine.stats().num_free_blocks < engine.stats().num_blocks == 8192
    del streams
    gc.collect()
    wait_until(lambda: is_idle(engine), "all is given back")
