"""The stubs say what the extension does, and a user's program is checked against them."""

import subprocess
import sys

import pytest

GOOD = """
import numpy as np
from nano_batch import BlockAllocator, Engine, RequestOutput, RequestStream, SamplingParams

params = SamplingParams(temperature=0.5, top_k=3, stop=["a"], seed=1, max_tokens=4)
with Engine("dir", dtype="float32", num_blocks=4) as engine:
    outputs: list[RequestOutput] = engine.generate(["a", [1, 2], {"prompt": "b"}], params)
    more = engine.generate(np.array([1, 2]), [params], use_tqdm=False)
    text: str = outputs[0].outputs[0].text
    tokens: list[int] = outputs[0].outputs[0].token_ids
    reason: str | None = outputs[0].outputs[0].finish_reason
    stream: RequestStream = engine.stream("a")
    for output in stream:
        engine.abort(stream.request_id)
        finished: bool = output.finished
    rows, width = engine.logits([1, 2]).shape
    free: int = engine.stats().num_free_blocks
    ids: list[int] = engine.get_tokenizer().encode("a")
allocator = BlockAllocator(3)
block = allocator.allocate()
if block is not None:
    became_free: bool = allocator.free(block)
"""

BAD = {
    'SamplingParams(temperature="hot")': "arg-type",
    "SamplingParams(0.5)": "call-arg",
    "Engine(3)": "arg-type",
    "Engine().generate(3.5)": "arg-type",
    "Engine().stats().num_runing": "attr-defined",
    "BlockAllocator(3).allocate() + 1": "operator",
}


SETTINGS = "[mypy]\n"


def mypy(*arguments, cwd):
    return subprocess.run(
        [sys.executable, "-m", *arguments], cwd=cwd, capture_output=True, text=True, timeout=300
    )


def test_the_stubs_are_those_of_the_extension(tmp_path):
    (tmp_path / "mypy.ini").write_text(SETTINGS, encoding="utf-8")
    arguments = ["mypy.stubtest", "--mypy-config-file", "mypy.ini", "nano_batch._native"]
    done = mypy(*arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def check(tmp_path_factory):
    """Checks a program strictly and returns what mypy says."""
    directory = tmp_path_factory.mktemp("typed")
    (directory / "mypy.ini").write_text(SETTINGS, encoding="utf-8")

    def check_program(program):
        (directory / "program.py").write_text(program, encoding="utf-8")
        done = mypy("mypy", "--strict", "program.py", cwd=directory)
        return done.returncode, done.stdout + done.stderr

    return check_program


def test_a_users_program_passes_in_strict_mode(check):
    status, said = check(GOOD)
    assert status == 0, said


def test_mistakes_are_found(check):
    lines = ["from nano_batch import BlockAllocator, Engine, SamplingParams", *BAD]
    status, said = check("\n".join(lines))
    assert status == 1
    for number, code in enumerate(BAD.values(), start=2):
        assert any(
            line.startswith(f"program.py:{number}:") and f"[{code}]" in line
            for line in said.splitlines()
        ), said
