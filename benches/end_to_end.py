"""End to end on the CPU: nano_batch beside transformers' `generate` and llama.cpp.

All run the same random bf16 weights with the same number of threads, and are given and give the
same numbers of tokens: greedy, end-of-sequence ignored. Each is measured in a subprocess of its
own, in turns; a figure is the median over the rounds. Tokens count once Python has them.

    python benches/end_to_end.py                 # a table, and JSON in benches/results/local/
    python benches/end_to_end.py --concurrent 1 16 64 --runs 5 --out result.json
    python benches/end_to_end.py --llama-python /path/to/its/venv/bin/python

transformers runs with sdpa and its cache on. llama.cpp is measured where the packages llama_cpp and
gguf can be imported. No side turns tokens into text.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

from end_to_end_sides import CONFIG, WEIGHTS, WORKLOADS, Task, in_subprocess, label

ROOT = Path(__file__).resolve().parents[1]
LOCAL = ROOT / "benches/results/local"
# What one forward pass reads: every matrix but the embedding, of which it picks a few rows.
WEIGHTS_READ_BYTES = 2 * (
    16 * (1024 * (1024 + 256 + 256) + 1024 * 1024 + 3 * 1024 * 3584) + 32000 * 1024
)


def make_model():
    """Random weights by transformers' own initialisation, drawn once."""
    directory = LOCAL / "model-16x1024"
    if (directory / WEIGHTS).exists():
        return directory
    import torch
    from transformers import MistralConfig, MistralForCausalLM

    torch.manual_seed(0)
    model = MistralForCausalLM(MistralConfig(**CONFIG))
    model.to(torch.bfloat16).save_pretrained(directory)
    return directory


def llama_version(python):
    """The version of llama.cpp's package in another environment, if it is there."""
    script = "import gguf, llama_cpp; print(llama_cpp.__version__)"
    done = subprocess.run([python, "-c", script], capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else None


def check_same_model(sides):
    """All sides must compute the same thing, or their times mean nothing.

    Returns how far each is from transformers, and on how many first tokens they agree.
    """
    theirs = sides["transformers"]["logits"]
    agreement = {}
    for name, side in sides.items():
        furthest, num_same = 0.0, 0
        for a, b in zip(side["logits"], theirs, strict=True):
            apart = max(abs(x - y) for x, y in zip(a, b, strict=True))
            furthest = max(furthest, apart / statistics.pstdev(b))
            num_same += a.index(max(a)) == b.index(max(b))
        if furthest > 0.2:
            sys.exit(f"logits of {name} differ by {furthest:.3g} of what they spread by")
        agreement[name] = {
            "furthest_logit_by_spread": furthest,
            "same_first_tokens": num_same,
            "num_prompts": len(theirs),
        }
    return agreement


def processor():
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            return line.split(":")[1].strip()
    return platform.processor()


def commit():
    def git(*arguments):
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
        return done.stdout.strip()

    return git("rev-parse", "HEAD") + (" with changes" if git("status", "--porcelain") else "")


def medians(rounds):
    """Rows of the table: workload, name, tok/s, GB/s of weights read, TTFT in ms."""
    rows = []
    for workload in WORKLOADS:
        for side in rounds[0]:
            first = [t for it in rounds for t in it[side]["first_token_s"][label(workload)]]
            for name in rounds[0][side]["elapsed_s"][label(workload)]:
                count = requests_of(name)
                elapsed = statistics.median(
                    it[side]["elapsed_s"][label(workload)][name] for it in rounds
                )
                rows.append(
                    {
                        "workload": label(workload),
                        "name": name,
                        "tokens_per_s": count * workload[1] / elapsed,
                        # A pass over the weights gives every running request a token.
                        "weights_gb_per_s": workload[1] * WEIGHTS_READ_BYTES / elapsed / 1e9,
                        "first_token_ms": 1e3 * statistics.median(first) if count == 1 else None,
                    }
                )
    return rows


def requests_of(name):
    return next(int(word) for word in name.split() if word.isdigit())


def print_table(result):
    machine = result["machine"]
    print(
        f"\n{machine['processor']}, {machine['num_cores']} cores, {result['num_threads']} threads, "
        f"memory reads at {machine['memory_gb_per_s']:.0f} GB/s; "
        + ", ".join(f"{name} {number}" for name, number in result["versions"].items())
        + f"; commit {result['commit'][:12]}; median of {len(result['rounds'])}\n"
    )
    print("| workload | | tok/s | against transformers | weights GB/s | first token ms |")
    print("|---|---|---|---|---|---|")
    serial = {}
    for row in result["rows"]:
        base = serial.setdefault(row["workload"], row["tokens_per_s"])
        first = f"{row['first_token_ms']:.0f}" if row["first_token_ms"] else ""
        print(
            f"| {row['workload']} | {row['name']} | {row['tokens_per_s']:.1f} | "
            f"{row['tokens_per_s'] / base:.2f} x | {row['weights_gb_per_s']:.1f} | {first} |"
        )


def print_start(starts):
    """How soon nano_batch is ready, and how much more than its imports was ever resident."""
    ready_s = statistics.median(start["ready_s"] for start in starts)
    loaded, peak = (max(start[key] for start in starts) for key in ("loaded_bytes", "peak_bytes"))
    weights, cache = (starts[0][key] for key in ("weights_bytes", "kv_cache_bytes"))
    print(
        f"\nnano_batch: ready {ready_s:.2f} s after its constructor is called, with a warm page "
        f"cache; weights and KV cache are {weights / 1e6:.0f} + {cache / 1e6:.0f} MB, and at most "
        f"{loaded / 1e6:.0f} MB were resident until it was ready, {peak / 1e6:.0f} MB "
        f"({peak / (weights + cache):.2f} x) until all requests had ended"
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=3, help="rounds (%(default)s)")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of each side")
    parser.add_argument("--concurrent", type=int, nargs="+", default=[1, 16])
    parser.add_argument(
        "--llama-python",
        default=sys.executable,
        metavar="PYTHON",
        help="the interpreter that has llama_cpp and gguf (default: this one)",
    )
    parser.add_argument("--out", type=Path, help="where the JSON goes")
    args = parser.parse_args()

    load = os.getloadavg()[0]
    if load > 0.3:
        print(f"the machine is busy (load {load:.1f}): figures will be low", file=sys.stderr)
    model = str(make_model())
    versions = {name: version(name) for name in ("nano_batch", "transformers", "torch")}
    pythons = {"transformers": sys.executable, "nano_batch": sys.executable}
    llama = llama_version(args.llama_python)
    if llama is None:
        print("llama.cpp: not installed")
    else:
        versions["llama_cpp_python"] = llama
        pythons["llama.cpp"] = args.llama_python

    def measure(side, seed, python=sys.executable):
        measured = in_subprocess(side, Task(model, args.threads, args.concurrent, seed), python)
        print(f"round {seed + 1} of {args.runs}: {side} measured", file=sys.stderr)
        return measured

    memory = measure("memory", 0)
    rounds, starts = [], []
    for seed in range(args.runs):
        rounds.append({side: measure(side, seed, python) for side, python in pythons.items()})
        starts.append(measure("start", seed))
    agreement = check_same_model(rounds[0])
    for it in rounds:
        for side in it.values():
            del side["logits"]
    now = datetime.now(UTC)
    result = {
        "benchmark": "end_to_end",
        "time": now.isoformat(timespec="seconds"),
        "commit": commit(),
        "command": sys.argv[1:],
        "machine": {
            "processor": processor(),
            "num_cores": os.cpu_count(),
            "memory_gb_per_s": memory,
            "load_at_start": load,
        },
        "versions": versions,
        "config": CONFIG,
        "dtype": "bfloat16",
        "num_threads": args.threads,
        "weights_read_bytes": WEIGHTS_READ_BYTES,
        "rows": medians(rounds),
        "rounds": rounds,
        "start": starts,
        "agreement": agreement,
    }
    out = args.out or LOCAL / f"end_to_end-{now:%Y%m%d-%H%M%S}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print_table(result)
    print_start(starts)
    print(f"\n{out}", file=sys.stderr)


if __name__ == "__main__":
    main()
