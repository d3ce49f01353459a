"""Results in words and tables, for the terminal and for the README."""

import re
import textwrap
from collections.abc import Iterable
from datetime import datetime

from nano_batch.bench.result import Result, device_name, limits_of, memory_rates
from nano_batch.bench.summary import median


def describe(result: Result) -> str:
    """Say what was measured, on what, and with which settings."""
    workload = result["workload"]
    settings = ", ".join(
        f"{key} {value}" for key, value in result["settings"]["transformers"].items()
    )
    return (
        f"{result['model']['name']}, bfloat16, {workload['prompt_len']} tokens in and "
        f"{workload['output_len']} out, greedy. {conditions(result)} "
        f"Settings of transformers: {settings}."
    )


def conditions(result: Result) -> str:
    """Say when and on what a result was measured, and how often."""
    limits = limits_of(result)
    day = datetime.fromisoformat(result["time"]).date().isoformat()
    versions = ", ".join(f"{name} {number}" for name, number in result["versions"].items())
    commit, *changes = result["commit"].split(" ", 1)
    return (
        f"Median of {result['runs']} runs, {device_name(result)}, {day}: "
        f"memory {memory_rates(result)} GB/s and matrix products "
        f"{limits.operations_per_s / 1e12:.3g} TFLOP/s, both measured; "
        f"{result['machine']['busy_cores_at_start']:.1f} cores busy before; commit "
        f"{' '.join([commit[:12], *changes])}; {versions}."
    )


def table(result: Result, peer: Result | None = None) -> str:
    """The table of a result, whatever was measured."""
    return _latency(result) if result["benchmark"] == "latency" else _throughput(result, peer)


def _throughput(result: Result, peer: Result | None) -> str:
    theirs, static = result["transformers"], result["workload"]["static_batch"]
    serial = theirs["serial_toks"]
    sides = [("nano_batch", result["nano_batch"])]
    if "llama.cpp" in result:
        sides.append(("llama.cpp", result["llama.cpp"]))
    if peer:
        sides.append((f"{peer['name']} {peer['version']}, {peer['date']}", peer))
    sides.append(("hardware's limit", result["limit"]))
    lines = []
    for count in result["workload"]["concurrency"]:
        key = f"scale{count}_toks"
        transformers = {1: _rate(serial), static: _rate(theirs[f"static{static}_toks"])}
        row = [str(count), transformers.get(count, "")]
        row += [_rate(side[key]) if key in side else "" for _, side in sides]
        row.insert(3, f"{result['nano_batch'][key] / serial:,.1f} x")
        lines.append(row)
    head = ["at once, tok/s", "transformers", *(name for name, _ in sides)]
    head.insert(3, "beside one at a time")
    text = (
        f"transformers runs one request at a time, and {static} as one static batch; limits are "
        f"those of arithmetic and of memory, of which a step reads "
        f"{result['model']['weight_bytes_per_step'] / 1e6:,.0f} MB of parameters."
    )
    return f"{_markdown(head, lines)}\n\n{wrapped(text)}"


def _rate(tokens_per_s: float) -> str:
    return f"{tokens_per_s:,.1f}" if tokens_per_s < 1000 else f"{tokens_per_s:,.0f}"


def _latency(result: Result) -> str:
    sides = ("transformers", "nano_batch")
    metrics = (("ttft_ms", "first token"), ("latency_per_token_ms", "per token"))
    lines = []
    for count in result["transformers"]["load"]:
        row = [count]
        for key, _ in metrics:
            values = [result[side]["load"][count][key] for side in sides]
            row += [f"{readable(it['p50'])} · {readable(it['p99'])}" for it in values]
            row.append(f"{100 * (1 - values[1]['p50'] / values[0]['p50']):.1f} %")
        lines.append(row)
    head = ["at once, p50 · p99"]
    for _, metric in metrics:
        head += [f"{metric}: transformers", "nano_batch", "less"]
    text = (
        f"Requests arrive at once; transformers serves one after the other ({queued(result)}). "
        f"Per token is (end - arrival) / tokens; less compares p50; {behind_p99(result)}"
    )
    return f"{_markdown(head, lines)}\n\n{wrapped(text)}"


def queued(result: Result) -> str:
    """At which loads transformers' waiting was computed, and from what."""
    load = result["transformers"]["load"]
    computed = [count for count, it in load.items() if it["how"].startswith("computed")]
    if not computed:
        return "measured at every load"
    return f"at {' and '.join(computed)}: {load[computed[0]]['how']}"


def behind_p99(result: Result) -> str:
    """How many values stand behind a p99."""
    counts = [
        sum(map(len, result[side]["alone"])) if count == "1" else int(count) * result["runs"]
        for side in ("nano_batch", "transformers")
        for count in result[side]["load"]
    ]
    return f"p99 is of {min(counts)} to {max(counts)} values."


def readable(milliseconds: float) -> str:
    """Three digits and a unit."""
    value, unit = (milliseconds, "ms") if milliseconds < 1000 else (milliseconds / 1e3, "s")
    return f"{value:,.0f} {unit}" if value >= 100 else f"{value:.3g} {unit}"


def beside_vllm(ours: Iterable[Result], vllm: Result) -> str:
    """The figures of benches/cuda_end_to_end.py beside those noted of vLLM on such cards."""
    counts = (1, 4, 16, 64, 256)
    sides, head = [], [""]
    for result in ours:
        mix = [value for key, value in result.items() if re.fullmatch(r"nano_run\d+_toks", key)]
        sides += [{**result, "nano_run_toks": median(mix)}, vllm["cards"][result["card"]]]
        card = " ".join(result["card"].split()[1:2])
        head += [f"{card}: nano_batch", f"{vllm['name']} {vllm['version']}"]
    rows = [
        ("time between tokens, one stream", "itl_bs1_ms", "{:.2f} ms"),
        ("first token", "ttft512_ms", "{:.1f} ms"),
        *((f"{count} at once, tok/s", f"scale{count}_toks", "{:,.0f}") for count in counts),
        ("256 requests of 100 to 1024 tokens in and out, tok/s", "nano_run_toks", "{:,.0f}"),
        ("prefill of 16 prompts of 2048, tok/s", "prefill_16x2048_toks", "{:,.0f}"),
    ]
    lines = [[name, *(form.format(side[key]) for side in sides)] for name, key, form in rows]
    return _markdown(head, lines)


def wrapped(text: str) -> str:
    """Lines as long as those of the pages."""
    return textwrap.fill(text, 105, break_long_words=False, break_on_hyphens=False)


def _markdown(head: list[str], rows: Iterable[list[str]]) -> str:
    ruler = ["---", *["---:"] * (len(head) - 1)]
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ruler, *rows))
