"""Records of the log reach Python's handlers, which hold nobody."""

import pytest
from programs import OPEN, end_of, run_script

FORKED = """
    import os, signal, sys
    from nano_batch import Engine
    Engine(sys.argv[1], device="cpu", num_threads=1, num_blocks=64)
    child = os.fork()
    if child:
        os._exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    # One that hangs has nobody to end it.
    signal.alarm(30)
"""


@pytest.mark.parametrize("before", ["", FORKED], ids=["alone", "in a fork of an engine's process"])
def test_a_handler_of_the_log_holds_neither_steps_nor_close(before, reciting_dir):
    script = f"""{before}
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
