"""Tokens a second, by how many requests run at once."""

import statistics
import sys
from collections.abc import Iterable
from typing import Any

from nano_batch.bench import result as results
from nano_batch.bench.result import Result
from nano_batch.bench.roofline import (
    Limits,
    Shapes,
    decode_step,
    least_seconds,
    middle_context,
    prefill_operations,
)
from nano_batch.bench.side import Answer, Run, Side, Task, in_turns
from nano_batch.bench.summary import median, rates
from nano_batch.bench.workload import Workload
from nano_batch.exceptions import NanoBatchError

_NUM_COMPARED = 4


def measure(
    workload: Workload, task: Task, options: dict[str, Any], llama: list[str] | None = None
) -> Result:
    """Bursts of nano_batch, and of transformers one request at a time and one static batch."""

    at_once = {"nano_batch": workload.concurrency, "transformers": (workload.static_batch,)}

    def bursts(side: Side, run: int, counts: Iterable[int]) -> Answer:
        if run == 0:
            warm_up(side, workload, counts)
        answer = {}
        for count in counts:
            prompts = workload.prompts(
                count, workload.prompt_len, f"{options['seed']} {run} {count}"
            )
            answer[str(count)] = side.burst(prompts, workload.output_len)
            rate = count * workload.output_len / answer[str(count)]["elapsed_s"]
            note(f"run {run + 1} of {options['runs']}: {side.name}, {count}: {rate:.1f} tok/s")
        return answer

    def compared(side: Side, run: int) -> Answer:
        if run > 0 or not same_weights:
            return {}
        prompts = workload.prompts(_NUM_COMPARED, workload.prompt_len, "compared")
        return side.call("logits", prompts=prompts)

    def nano_batch(side: Side, run: int) -> Answer:
        answer = bursts(side, run, at_once["nano_batch"])
        prompts = workload.prompts(*workload.prefill, f"prefill {options['seed']} {run}")
        answer["prefill"] = side.burst(prompts, 1)
        return answer | compared(side, run) | side.call("memory")

    def transformers(side: Side, run: int) -> Answer:
        answer = bursts(side, run, at_once["transformers"])
        num = workload.serial[0]
        prompts = workload.prompts(num, workload.prompt_len, f"serial {options['seed']} {run}")
        serial = [side.burst([prompt], workload.output_len)["elapsed_s"] for prompt in prompts]
        rate = num * workload.output_len / sum(serial)
        note(f"run {run + 1} of {options['runs']}: {side.name}, one by one: {rate:.1f} tok/s")
        return answer | {"serial": serial} | compared(side, run)

    def llama_cpp(side: Side, run: int) -> Answer:
        return bursts(side, run, workload.concurrency) | compared(side, run)

    same_weights = workload.name != "cuda"
    plan: dict[str, Run] = {
        "limits": lambda side, _: side.call("limits"),
        "nano_batch": nano_batch,
        "transformers": transformers,
    }
    if llama:
        plan["llama.cpp"] = llama_cpp
    runs, facts = in_turns(task, plan, options["runs"], {"llama.cpp": llama} if llama else None)
    result = results.header("throughput", workload, options, facts, runs["limits"], at_once)
    result["workload"] |= {
        "concurrency": list(workload.concurrency),
        "static_batch": workload.static_batch,
        "serial_requests_per_run": workload.serial[0],
    }
    result["nano_batch"] = _nano_batch(workload, runs["nano_batch"], facts["nano_batch"])
    prefill_s = median(run["prefill"]["elapsed_s"] for run in runs["nano_batch"])
    operations = prefill_operations(Shapes(workload.config), *workload.prefill)
    result["machine"]["prefill_gflop_per_s"] = operations / prefill_s / 1e9
    result["transformers"] = _transformers(workload, runs["transformers"])
    if llama:
        result["llama.cpp"] = _scale(workload, runs["llama.cpp"])
        result["versions"]["llama.cpp"] = facts["llama.cpp"]["version"]
    if same_weights:
        result["agreement"] = {
            name: _agreement(name, side[0]["logits"], runs["transformers"][0]["logits"])
            for name, side in runs.items()
            if name not in ("limits", "transformers")
        }
    limits = results.limits_of(result)
    result["limit"] = {
        f"scale{count}_toks": count * workload.output_len / least_seconds(workload, limits, count)
        for count in workload.concurrency
    }
    result["steps"] = [
        _step(workload, limits, count, median(result["nano_batch"][f"scale{count}_step_ms"]))
        for count in workload.concurrency
    ]
    return result


def note(text: str) -> None:
    """Tell whoever waits."""
    print(text, file=sys.stderr, flush=True)


def warm_up(side: Side, workload: Workload, counts: Iterable[int]) -> None:
    """Run what a side will run, as `settings` of its result say."""
    # One request whole, as long sequences may bring what short ones do not.
    for count, output_len in [(1, workload.output_len), *((count, 4) for count in counts)]:
        side.burst(workload.prompts(count, workload.prompt_len, "warm-up"), output_len)


def _scale(workload: Workload, runs: list[Answer]) -> Result:
    scale: Result = {}
    for count in workload.concurrency:
        elapsed = [run[str(count)]["elapsed_s"] for run in runs]
        scale[f"scale{count}_toks"] = median(rates(count * workload.output_len, elapsed))
        scale[f"scale{count}_s"] = elapsed
    return scale


def _nano_batch(workload: Workload, runs: list[Answer], facts: Answer) -> Result:
    scale = _scale(workload, runs)
    for count in workload.concurrency:
        scale[f"scale{count}_step_ms"] = [
            1e3 * _step_s(run[str(count)], workload.output_len) for run in runs
        ]
    num, length = workload.prefill
    seconds = [run["prefill"]["elapsed_s"] for run in runs]
    return {
        **scale,
        f"prefill_{num}x{length}_toks": median(rates(num * length, seconds)),
        f"prefill_{num}x{length}_s": seconds,
        "ready_s": facts["ready_s"],
        "peak_bytes": runs[-1]["peak_bytes"],
    }


def _transformers(workload: Workload, runs: list[Answer]) -> Result:
    static = workload.static_batch
    elapsed = [run[str(static)]["elapsed_s"] for run in runs]
    serial = [sum(run["serial"]) / len(run["serial"]) for run in runs]
    return {
        "serial_toks": median(rates(workload.output_len, serial)),
        "serial_s": [run["serial"] for run in runs],
        f"static{static}_toks": median(rates(static * workload.output_len, elapsed)),
        f"static{static}_s": elapsed,
    }


def _step_s(burst: Answer, output_len: int) -> float:
    """Seconds of a step that decodes: from the latest first token to that request's last one."""
    latest = max(range(len(burst["first_s"])), key=lambda index: burst["first_s"][index])
    between: float = burst["last_s"][latest] - burst["first_s"][latest]
    return between / (output_len - 1)


def _step(workload: Workload, limits: Limits, count: int, measured_ms: float) -> Result:
    context = middle_context(workload)
    step = decode_step(Shapes(workload.config), limits, count, context)
    return {
        "num_seqs": count,
        "context": context,
        "weights_ms": 1e3 * step.weights_s,
        "kv_cache_ms": 1e3 * step.kv_cache_s,
        "arithmetic_ms": 1e3 * step.arithmetic_s,
        "bound_ms": 1e3 * step.bound_s,
        "measured_ms": measured_ms,
    }


def _agreement(name: str, ours: list[list[float]], theirs: list[list[float]]) -> Result:
    """All sides must compute the same thing, or their times mean nothing."""
    furthest, num_same = 0.0, 0
    for a, b in zip(ours, theirs, strict=True):
        apart = max(abs(x - y) for x, y in zip(a, b, strict=True))
        furthest = max(furthest, apart / statistics.pstdev(b))
        num_same += a.index(max(a)) == b.index(max(b))
    if furthest > 0.2:
        message = f"logits of {name} are {furthest:.3g} standard deviations from transformers'"
        raise NanoBatchError(message, "bench_failed")
    return {
        "furthest_logit_by_spread": furthest,
        "same_first_tokens": num_same,
        "num_prompts": len(theirs),
    }
