"""Threads, signals, processes and the ends of things: nothing hangs, nothing leaks."""

import gc
import os
import signal
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import nano_batch
import pytest
import recital_model
from nano_batch import Engine, SamplingParams
from nano_batch.exceptions import EngineClosedError
from recital_model import TEXT

LONG = SamplingParams(temperature=0, max_tokens=60000, ignore_eos=True)
SHORT = SamplingParams(temperature=0, max_tokens=60)


def is_idle(engine):
    stats = engine.stats()
    return stats.num_running == stats.num_waiting == 0 and stats.num_free_blocks == stats.num_blocks


def run_script(script, *arguments, **options):
    """Starts a Python program of its own; the engine's model is its first argument."""
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script), *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


def end_of(process):
    """Its output and errors; a program that hangs is killed and fails the test."""
    try:
        return process.communicate(timeout=60)
    except subprocess.TimeoutExpired:
        process.kill()
        raise


OPEN = """
    import os, signal, sys, threading, time
    from nano_batch import Engine, SamplingParams
    engine = Engine(sys.argv[1], device="cpu", num_threads=1, num_blocks=8192)
    LONG = SamplingParams(temperature=0, max_tokens=60000, ignore_eos=True)
"""


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


INTERRUPTED = """
    def tell():
        while engine.stats().num_running == 0:
            time.sleep(0.01)
        print("running", flush=True)
    threading.Thread(target=tell).start()
"""


@pytest.mark.parametrize(
    "wait",
    [
        "engine.generate('?', LONG, use_tqdm=False)",
        "engine.generate(['?'] * 3, LONG)",
        "[None for _ in engine.stream('?', LONG)]",
    ],
)
def test_ctrl_c_interrupts_what_waits(wait, reciting_dir):
    script = f"""{OPEN}{INTERRUPTED}
    try:
        {wait}
    except KeyboardInterrupt:
        # Not after its end: the request still runs.
        print("interrupted", engine.stats().num_running > 0, flush=True)
    while engine.stats().num_running > 0:
        time.sleep(0.01)
    engine.close()
    sys.exit(130)
    """
    with run_script(script, reciting_dir) as process:
        assert process.stdout.readline().strip() == "running"
        process.send_signal(signal.SIGINT)
        output, errors = end_of(process)
    assert (output.strip(), process.returncode) == ("interrupted True", 130), errors


LOADING = """
    import os, sys, threading, time
    from pathlib import Path
    from nano_batch import Engine
    config = Path(sys.argv[1], "config.json")
    content = config.read_text()
    config.unlink()
    # Whoever reads it waits until somebody writes.
    os.mkfifo(config)
    def tell():
        global pipe
        pipe = config.open("w")
        print("loading", flush=True)
    threading.Thread(target=tell).start()
"""


def test_ctrl_c_interrupts_loading_and_what_is_loaded_after_it_goes(tmp_path):
    script = f"""{LOADING}
    try:
        Engine(sys.argv[1], device="cpu", num_threads=1, num_blocks=64)
    except KeyboardInterrupt:
        print("interrupted", flush=True)
    config.unlink()
    config.write_text(content)
    def names():
        return [comm.read_text() for comm in Path("/proc/self/task").glob("*/comm")]
    assert "nano-load\\n" in names()
    pipe.write(content)
    pipe.close()
    while any(name.startswith("nano-") and name != "nano-log\\n" for name in names()):
        time.sleep(0.01)
    print("gone", flush=True)
    """
    with run_script(script, recital_model.write(tmp_path)) as process:
        assert process.stdout.readline().strip() == "loading"
        process.send_signal(signal.SIGINT)
        output, errors = end_of(process)
    assert (output.split(), process.returncode) == (["interrupted", "gone"], 0), errors


def test_ctrl_c_ends_a_program_that_loads(tmp_path):
    script = f"""{LOADING}
    Engine(sys.argv[1], device="cpu", num_threads=1, num_blocks=64)
    """
    with run_script(script, recital_model.write(tmp_path)) as process:
        assert process.stdout.readline().strip() == "loading"
        process.send_signal(signal.SIGINT)
        _, errors = end_of(process)
    assert process.returncode in (-signal.SIGINT, 130)
    assert "KeyboardInterrupt" in errors


def test_ctrl_c_comes_through_where_another_thread_imported_threading(reciting_dir):
    """That thread is what `threading` takes for the main one."""
    script = f"""
    import _thread, sys
    assert "threading" not in sys.modules
    imported = _thread.allocate_lock()
    imported.acquire()
    def load():
        import threading, nano_batch
        imported.release()
    _thread.start_new_thread(load, ())
    imported.acquire()
    {OPEN.strip()}
    stream = engine.stream("?", LONG)
    def interrupt():
        time.sleep(0.2)
        os.kill(os.getpid(), signal.SIGINT)
    try:
        threading.Thread(target=interrupt).start()
        stream.collect()
    except KeyboardInterrupt:
        print("interrupted", next(stream).finished)
    """
    with run_script(script, reciting_dir) as process:
        output, errors = end_of(process)
    assert output == "interrupted False\n", errors


def test_ctrl_c_ends_a_program_that_does_not_catch_it(reciting_dir):
    script = f"""{OPEN}{INTERRUPTED}
    engine.generate('?', LONG, use_tqdm=False)
    """
    with run_script(script, reciting_dir) as process:
        assert process.stdout.readline().strip() == "running"
        process.send_signal(signal.SIGINT)
        _, errors = end_of(process)
    assert process.returncode in (-signal.SIGINT, 130)
    assert "KeyboardInterrupt" in errors


def test_a_handler_of_the_log_holds_neither_steps_nor_close(reciting_dir):
    script = f"""
    import logging, threading
    held, released = threading.Event(), threading.Event()
    class Holding(logging.Handler):
        def emit(self, record):
            held.set()
            released.wait()
    logger = logging.getLogger("nano_core")
    logger.addHandler(Holding())
    logger.setLevel(logging.DEBUG)
    {OPEN.strip()}
    stream = engine.stream("?", LONG)
    next(stream)
    assert held.wait(60)
    next(stream)
    engine.close()
    try:
        stream.collect()
    except Exception as error:
        print(error.code, released.is_set())
    released.set()
    """
    with run_script(script, reciting_dir) as process:
        output, errors = end_of(process)
    assert (output, process.returncode) == ("engine_closed False\n", 0), errors


def test_a_slow_handler_of_the_log_gets_every_record(reciting_dir):
    """More than it can be waited for at once, and the program ends as any other."""
    script = f"""
    import logging, sys, time
    class Slow(logging.StreamHandler):
        def emit(self, record):
            time.sleep(0.005)
            super().emit(record)
    logger = logging.getLogger("nano_core")
    logger.addHandler(Slow(sys.stdout))
    logger.setLevel(logging.DEBUG)
    {OPEN.strip()}
    engine.generate("?", SamplingParams(max_tokens=600, ignore_eos=True), use_tqdm=False)
    """
    with run_script(script, reciting_dir) as process:
        output, errors = end_of(process)
    assert (output.count("step="), process.returncode) == (600, 0), errors


def test_levels_that_are_set_between_two_engines_hold_for_the_second(reciting_dir):
    script = f"""{OPEN}
    import logging
    logging.basicConfig(level=logging.INFO, stream=sys.stdout, format="%(name)s")
    print("set")
    Engine(sys.argv[1], device="cpu", num_threads=1, num_blocks=64)
    """
    with run_script(script, reciting_dir) as process:
        output, errors = end_of(process)
    assert output.startswith("set\nnano_model.load\n"), errors


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
