"""The JSON of a benchmark: what every one of them says, where it lies, how it is read."""

import json
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from nano_batch import __version__
from nano_batch.bench.roofline import Limits, Shapes
from nano_batch.bench.side import Answer
from nano_batch.bench.workload import Workload
from nano_batch.exceptions import NanoBatchError

Result = dict[str, Any]

COMMITTED = Path("benches/results")
LOCAL = COMMITTED / "local"
ELSEWHERE = Path("nano-batch-results")
SCHEMA = Path("benches/schema.json")


def checkout() -> Path:
    """The checkout that the present directory is in, or the present directory itself."""
    here = Path.cwd()
    return next((path for path in (here, *here.parents) if (path / SCHEMA).exists()), here)


def local() -> Path:
    """Where results lie that nobody has chosen a place for."""
    root = checkout()
    return root / (LOCAL if (root / SCHEMA).exists() else ELSEWHERE)


def header(
    benchmark: str,
    workload: Workload,
    options: dict[str, Any],
    facts: dict[str, Answer],
    limits: list[Answer],
    at_once: Mapping[str, Iterable[int]],
) -> Result:
    """What every result begins with; `at_once` says with how many each side was warmed up."""
    machine = {
        "processor": _processor(),
        "num_cores": len(os.sched_getaffinity(0)),
        "busy_cores_at_start": options["busy_cores_at_start"],
        **facts["limits"],
        # A limit is what was seen at best.
        **{name: max(run[name] for run in limits) for name in limits[0]},
        "runs": limits,
    }
    shapes = Shapes(workload.config)
    bytes_per_parameter = facts["nano_batch"]["weight_bytes"] / shapes.num_parameters
    return {
        "benchmark": benchmark,
        "preset": workload.name,
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": options["commit"] or _commit(),
        "command": without_folders(sys.argv[1:]),
        "seed": options["seed"],
        "runs": options["runs"],
        "machine": machine,
        "versions": {
            "python": platform.python_version(),
            "nano_batch": __version__,
            **{name: version(name) for name in ("torch", "transformers")},
        },
        "model": {
            "name": workload.model,
            "config": workload.config,
            "dtype": "bfloat16",
            "weight_bytes_per_step": round(bytes_per_parameter * shapes.parameters_read),
            "same_weights": workload.name != "cuda",
        },
        "workload": {
            "prompt_len": workload.prompt_len,
            "output_len": workload.output_len,
            "temperature": 0,
            "ignore_eos": True,
        },
        "settings": {
            name: {
                **facts[name]["settings"],
                "warm_up": f"one whole request, then {_listed(counts)} at once, 4 tokens out",
            }
            for name, counts in at_once.items()
        },
    }


def _listed(counts: Iterable[int]) -> str:
    *others, last = map(str, counts)
    return f"{', '.join(others)} and {last}" if others else last


def without_folders(command: list[str]) -> list[str]:
    """A command whose paths are names alone: folders say nothing on another machine."""
    return [re.sub(r"[^\s=]*/", "", word) for word in command]


def limits_of(result: Result) -> Limits:
    """The rates that bound a result's times.

    Memory's is the better of reading and copying. Arithmetic's is the better of torch's product of
    large matrices and nano_batch's own prompts, which on some processors is quicker.
    """
    machine = result["machine"]
    model = result["model"]
    return Limits(
        1e9 * max(machine["read_gb_per_s"], machine["copy_gb_per_s"]),
        1e9 * max(machine["matmul_gflop_per_s"], machine.get("prefill_gflop_per_s", 0)),
        model["weight_bytes_per_step"] / Shapes(model["config"]).parameters_read,
    )


def memory_rates(result: Result) -> str:
    """The best rate, which is the limit, and the worst of a run where they are far apart."""
    rates = [max(run["read_gb_per_s"], run["copy_gb_per_s"]) for run in result["machine"]["runs"]]
    best = limits_of(result).bytes_per_s / 1e9
    return f"{best:,.0f}" if min(rates) > 0.9 * best else f"{min(rates):,.0f} to {best:,.0f}"


def write(result: Result, path: Path) -> None:
    """Write it for people to read, too."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def read(path: Path) -> Result:
    """Read a result, of whatever benchmark.

    Raises:
        NanoBatchError: There is none.

    """
    try:
        result: Result = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise NanoBatchError(f"{path} is no result of a benchmark: {error}") from None
    return result


def read_measured(path: Path) -> Result:
    """Read a result of `nano-batch bench`.

    Raises:
        NanoBatchError: It is none of throughput or latency.

    """
    result = read(path)
    if not isinstance(result, dict) or result.get("benchmark") not in ("throughput", "latency"):
        raise NanoBatchError(f"{path} is not a result of throughput or latency")
    return result


def device_name(result: Result) -> str:
    """The card, or the processor and its cores."""
    machine = result["machine"]
    cores = f"{machine['num_cores']} cores of an {machine['processor']}"
    return str(machine.get("card", cores))


def busy_cores() -> float:
    """Cores that other programs keep busy, over a second."""

    def times() -> tuple[int, int]:
        with open("/proc/stat", encoding="utf-8") as file:
            numbers = [int(word) for word in file.readline().split()[1:]]
        # The 4th and 5th are idle and waiting for disks.
        return sum(numbers[:8]), numbers[3] + numbers[4]

    total, idle = times()
    time.sleep(1)
    total_after, idle_after = times()
    # Of the machine, as the file is: also of cores that this process may not use.
    share = 1 - (idle_after - idle) / max(total_after - total, 1)
    return max(0.0, share) * (os.cpu_count() or 1)


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            return line.split(":")[1].strip()
    return platform.processor()


def _commit() -> str:
    def git(*arguments: str) -> str:
        done = subprocess.run(
            ["git", *arguments], cwd=checkout(), capture_output=True, text=True, check=True
        )
        return done.stdout.strip()

    try:
        changes = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "HEAD") + (" with changes" if changes else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
