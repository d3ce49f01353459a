"""Our end of a side: starts its process, hands it work, and runs several sides in turns."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass
from typing import Any

from nano_batch.exceptions import NanoBatchError

Answer = dict[str, Any]


@dataclass(frozen=True)
class Task:
    """What a side has to know before it opens."""

    model: str
    device: str
    num_threads: int
    longest: int
    """Tokens of any sequence."""
    answer_len: int
    """Prompt and output of the bursts."""
    num_blocks: int
    concurrency: tuple[int, ...]


class Side:
    """A side in a process of its own; a context manager, whose end is the process's."""

    def __init__(self, name: str, task: Task, command: list[str] | None = None) -> None:
        """Start it: `command` is what runs it, if that is not this package."""
        threads = str(task.num_threads)
        limits = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "RAYON_NUM_THREADS")
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", **dict.fromkeys(limits, threads)}
        command = command or [sys.executable, "-m", "nano_batch.bench.worker", name]
        self.name = name
        self._process = subprocess.Popen(
            [*command, json.dumps(asdict(task))],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.facts = self._answer()

    def call(self, name: str, **arguments: Any) -> Answer:
        """Have it do something and wait for the answer."""
        assert self._process.stdin is not None
        # Of one that has ended, the answer is that.
        with suppress(BrokenPipeError):
            print(json.dumps({"call": name, **arguments}), file=self._process.stdin, flush=True)
        return self._answer()

    def burst(self, prompts: list[list[int]], output_len: int) -> Answer:
        """Run prompts at once: `elapsed_s`, and `first_s` and `last_s` of each."""
        return self.call("burst", prompts=prompts, output_len=output_len)

    def _answer(self) -> Answer:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        answer: Answer = json.loads(line) if line else {"error": "it ended without an answer"}
        if "error" in answer:
            raise NanoBatchError(f"{self.name} failed: {answer['error']}", "bench_failed")
        return answer

    def __enter__(self) -> "Side":
        """Return it."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close its input, which ends it."""
        self._process.communicate()


Run = Callable[[Side, int], Answer]


def in_turns(
    task: Task, plan: Mapping[str, Run], runs: int, commands: dict[str, list[str]] | None = None
) -> tuple[dict[str, list[Answer]], dict[str, Answer]]:
    """Give every side of a plan its runs; return those, and the facts of each side.

    On a CPU the sides take turns, run by run, since the rate of a machine's memory drifts with what
    else its host does. On a GPU each has the memory to itself, so they follow each other.
    """
    results: dict[str, list[Answer]] = {name: [] for name in plan}
    facts: dict[str, Answer] = {}
    groups = [list(plan)] if task.device == "cpu" else [[name] for name in plan]
    for group in groups:
        with ExitStack() as stack:
            sides = [
                stack.enter_context(Side(name, task, (commands or {}).get(name))) for name in group
            ]
            facts |= {side.name: side.facts for side in sides}
            for run in range(runs):
                for side in sides:
                    results[side.name].append(plan[side.name](side, run))
    return results, facts
