"""A processor with fewer vector instructions gives the same logits but for rounding."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from nano_batch import Engine

TEXT = "It is a truth universally acknowledged, that a single man in possession"
PROGRAM = """
import sys
import numpy as np
from nano_batch import Engine

with Engine(device="cpu", dtype=sys.argv[1], num_blocks=16) as engine:
    ids = engine.get_tokenizer().encode(sys.argv[2])
    np.save(sys.argv[3], engine.logits(ids))
"""

CPU_INFO = Path("/proc/cpuinfo").read_text(encoding="utf-8")
FLAGS = {flag for line in re.findall(r"^flags\s*:(.*)$", CPU_INFO, re.M) for flag in line.split()}
HAS_AVX2 = {"avx2", "fma"} <= FLAGS
HAS_AVX512 = {"avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_bf16"} <= FLAGS


@pytest.mark.parametrize("isa", ["avx2", "portable"])
@pytest.mark.parametrize(("dtype", "bound"), [("float32", 1e-4), ("bfloat16", 0.06)])
def test_fewer_instructions_change_only_the_rounding(isa, dtype, bound, tmp_path, monkeypatch):
    monkeypatch.delenv("NANO_BATCH_CPU_ISA", raising=False)
    with Engine(device="cpu", dtype=dtype, num_blocks=16) as engine:
        expected = engine.logits(engine.get_tokenizer().encode(TEXT))
    path = tmp_path / "logits.npy"
    environment = {**os.environ, "NANO_BATCH_CPU_ISA": isa}
    subprocess.run(
        [sys.executable, "-c", PROGRAM, dtype, TEXT, str(path)], check=True, env=environment
    )
    difference = np.abs(np.load(path) - expected).max()
    assert difference < bound
    # Without FMA a multiplication rounds apart from its addition, and pairs of bfloat16 are added
    # in another way than by the instruction for them.
    if HAS_AVX2 if isa == "portable" else HAS_AVX512 and dtype == "bfloat16":
        assert difference > 0
    assert expected.std() > 1


def test_an_unknown_name_is_refused(tmp_path):
    environment = {**os.environ, "NANO_BATCH_CPU_ISA": "sse9"}
    command = [sys.executable, "-c", PROGRAM, "float32", TEXT, str(tmp_path / "logits.npy")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode != 0
    assert "avx512, avx2 or portable, got sse9" in done.stderr
