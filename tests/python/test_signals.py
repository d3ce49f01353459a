"""Ctrl-C ends what waits, whoever waits, and takes nothing with it."""

import signal

import pytest
import recital_model
from programs import OPEN, end_of, run_script

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
