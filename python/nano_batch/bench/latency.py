"""How long a request waits for its first token, and for each token, under load."""

from itertools import accumulate, chain, cycle, islice
from typing import Any

from nano_batch.bench import result as results
from nano_batch.bench.result import Result
from nano_batch.bench.side import Answer, Run, Side, Task, in_turns
from nano_batch.bench.summary import median, percentiles
from nano_batch.bench.throughput import note, warm_up
from nano_batch.bench.workload import Workload

# What one of nano_batch's runs takes alone is short: several make its percentiles steadier.
_NUM_ALONE = 3


def measure(workload: Workload, task: Task, options: dict[str, Any]) -> Result:
    """Requests that arrive at once: nano_batch runs them together, transformers in turn."""

    at_once = {"nano_batch": workload.load, "transformers": (1,)}

    def alone(side: Side, run: int, num: int) -> list[Answer]:
        if run == 0:
            warm_up(side, workload, at_once[side.name])
        prompts = workload.prompts(num, workload.prompt_len, f"alone {options['seed']} {run}")
        return [side.burst([prompt], workload.output_len) for prompt in prompts]

    def nano_batch(side: Side, run: int) -> Answer:
        answer: Answer = {"alone": alone(side, run, _NUM_ALONE)}
        for count in workload.load[1:]:
            prompts = workload.prompts(
                count, workload.prompt_len, f"{options['seed']} {run} {count}"
            )
            answer[str(count)] = side.burst(prompts, workload.output_len)
        note(f"run {run + 1} of {options['runs']}: {side.name} measured")
        return answer

    def transformers(side: Side, run: int) -> Answer:
        answer = {"alone": alone(side, run, workload.serial[1])}
        note(f"run {run + 1} of {options['runs']}: {side.name} measured")
        return answer

    plan: dict[str, Run] = {
        "limits": lambda side, _: side.call("limits"),
        "nano_batch": nano_batch,
        "transformers": transformers,
    }
    runs, facts = in_turns(task, plan, options["runs"])
    result = results.header("latency", workload, options, facts, runs["limits"], at_once)
    result["workload"] |= {
        "load": list(workload.load),
        "serial_requests_per_run": workload.serial[1],
    }
    for name in ("nano_batch", "transformers"):
        result[name] = _side(workload, name, runs[name])
    return result


def in_queue(alone: list[Answer], count: int) -> Answer:
    """`count` requests that arrive at once and are served one after the other.

    Each waits for those before it. Where fewer were measured, those that were stand for the rest.
    """
    first = [answer["first_s"][0] for answer in alone]
    last = [answer["last_s"][0] for answer in alone]
    ends = list(accumulate(islice(cycle(last), count)))
    starts = [0.0, *ends[:-1]]
    return {
        "first_s": [start + own for start, own in zip(starts, cycle(first), strict=False)],
        "last_s": ends,
    }


def _side(workload: Workload, name: str, runs: list[Answer]) -> Result:
    each = [answer for run in runs for answer in run["alone"]]
    first_s = [answer["first_s"][0] for answer in each]
    later = workload.output_len - 1
    between_s = [(answer["last_s"][0] - answer["first_s"][0]) / later for answer in each]
    side: Result = {
        f"ttft{workload.prompt_len}_ms": 1e3 * median(first_s),
        "itl_bs1_ms": 1e3 * median(between_s),
        "alone": [
            [{"first_s": it["first_s"][0], "last_s": it["last_s"][0]} for it in run["alone"]]
            for run in runs
        ],
        "load": {},
    }
    for count in workload.load:
        if count == 1:
            how = "measured, each alone"
            bursts = [
                {key: [it[key][0] for it in run["alone"]] for key in ("first_s", "last_s")}
                for run in runs
            ]
        elif name == "nano_batch":
            how = "measured, at once"
            bursts = [{key: run[str(count)][key] for key in ("first_s", "last_s")} for run in runs]
        else:
            measured = len(runs[0]["alone"])
            how = "measured, one after the other"
            if measured < count:
                how = f"computed from {measured} a run, measured one after the other"
            bursts = [in_queue(run["alone"], count) for run in runs]
        side["load"][str(count)] = {"how": how, **_percentiles(bursts, workload.output_len)}
    return side


def _percentiles(bursts: list[Answer], output_len: int) -> Result:
    """Over the requests of all runs, and of each run for the spread."""
    summary: Result = {}
    values = {
        "ttft_ms": [[1e3 * s for s in burst["first_s"]] for burst in bursts],
        "latency_per_token_ms": [
            [1e3 * s / output_len for s in burst["last_s"]] for burst in bursts
        ],
    }
    for name, runs in values.items():
        summary[name] = percentiles(chain.from_iterable(runs))
        summary[name]["runs"] = [percentiles(run) for run in runs]
    return summary
