"""Python programs of their own, for what a test's process cannot stand."""

import subprocess
import sys
import textwrap


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
