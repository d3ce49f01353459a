"""End to end on the CPU: nano_batch beside transformers' `generate`.

Both run the same random bf16 weights with the same number of threads, and are given and give the
same numbers of tokens: greedy, end-of-sequence ignored. Each is measured in a subprocess of its
own, in turns; a figure is the median over the rounds. Tokens count once Python has them.

    python benches/end_to_end.py                 # a table, and JSON in benches/results/local/
    python benches/end_to_end.py --concurrent 1 16 64 --runs 5 --out result.json

transformers runs with sdpa and its cache on. Neither side turns tokens into text.
"""

import argparse
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LOCAL = ROOT / "benches/results/local"

CONFIG = {
    "vocab_size": 32000,
    "hidden_size": 1024,
    "intermediate_size": 3584,
    "num_hidden_layers": 16,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "max_position_embeddings": 4096,
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-5,
    "sliding_window": None,
    "tie_word_embeddings": False,
}
# (tokens of the prompt, tokens generated): the first one is the one that goals are stated for.
WORKLOADS = [(32, 128), (128, 64)]
STATIC_BATCH = 16
NUM_FIRST_TOKENS = 5
# What one forward pass reads: every matrix but the embedding, of which it picks a few rows.
WEIGHTS_READ_BYTES = 2 * (
    16 * (1024 * (1024 + 256 + 256) + 1024 * 1024 + 3 * 1024 * 3584) + 32000 * 1024
)


@dataclass(frozen=True)
class Task:
    """What a subprocess measures."""

    model: str
    num_threads: int
    concurrent: list[int]
    # Differs between rounds, so that no round sees the prompts of another.
    seed: int


def prompts(workload, count, seed):
    """Random tokens, the same for both sides."""
    generator = random.Random(f"{workload} {count} {seed}")
    return [[generator.randrange(3, 32000) for _ in range(workload[0])] for _ in range(count)]


def seconds(work):
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def warm_up(generate, counts):
    for workload in WORKLOADS:
        for count in counts.values():
            generate((workload[0], 8), count, "warm-up")


def elapsed(generate, counts, seed):
    """Seconds of every workload and number of requests."""

    def row(workload, count):
        return seconds(lambda: generate(workload, count, seed))

    return {label(it): {name: row(it, n) for name, n in counts.items()} for it in WORKLOADS}


# ------------------------------------------------------------------------------ the two sides


def measure_nano(task):
    import numpy as np
    from nano_batch import Engine, SamplingParams

    with Engine(
        task.model,
        device="cpu",
        dtype="bfloat16",
        num_threads=task.num_threads,
        num_blocks=16 * max(task.concurrent),
        max_num_seqs=max(task.concurrent),
    ) as engine:

        def generate(workload, count, seed):
            params = SamplingParams(temperature=0, max_tokens=workload[1], ignore_eos=True)
            outputs = engine.generate(prompts(workload, count, seed), params, use_tqdm=False)
            for output in outputs:
                assert len(output.outputs[0].token_ids) == workload[1]

        def first_token(workload, seed):
            params = SamplingParams(temperature=0, max_tokens=workload[1], ignore_eos=True)
            (prompt,) = prompts(workload, 1, seed)
            stream = engine.stream(prompt, params)
            next(stream)

        def settle():
            while engine.stats().num_running > 0:
                time.sleep(0.001)

        def first_tokens(workload):
            times = []
            for index in range(NUM_FIRST_TOKENS):
                times.append(seconds(lambda i=index: first_token(workload, (task.seed, i))))
                settle()
            return times

        counts = {f"nano_batch, {count} at once": count for count in task.concurrent}
        warm_up(generate, counts)
        (prompt,) = prompts(WORKLOADS[0], 1, "logits")
        return {
            "logits": engine.logits(prompt)[-1].astype(np.float32).tolist(),
            "first_token_s": {label(it): first_tokens(it) for it in WORKLOADS},
            "elapsed_s": elapsed(generate, counts, task.seed),
        }


def measure_transformers(task):
    import torch
    import transformers
    from transformers import AutoModelForCausalLM, GenerationConfig

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(task.num_threads)
    model = AutoModelForCausalLM.from_pretrained(
        task.model, dtype=torch.bfloat16, attn_implementation="sdpa"
    ).eval()
    # Not to be set in `generate`, where None means the model's own.
    model.generation_config.eos_token_id = None

    @torch.inference_mode()
    def generate(workload, count, seed):
        ids = torch.tensor(prompts(workload, count, seed))
        config = GenerationConfig(
            max_new_tokens=workload[1],
            do_sample=False,
            use_cache=True,
            pad_token_id=0,
        )
        output = model.generate(ids, config, attention_mask=torch.ones_like(ids))
        tokens = output[:, workload[0] :].tolist()
        assert [len(row) for row in tokens] == [workload[1]] * count

    def first_tokens(workload):
        one = (workload[0], 1)
        seeds = [(task.seed, index) for index in range(NUM_FIRST_TOKENS)]
        return [seconds(lambda s=seed: generate(one, 1, s)) for seed in seeds]

    counts = {
        "transformers, 1 at a time": 1,
        f"transformers, batch of {STATIC_BATCH}": STATIC_BATCH,
    }
    warm_up(generate, counts)
    with torch.inference_mode():
        logits = model(torch.tensor(prompts(WORKLOADS[0], 1, "logits"))).logits[0, -1]
    return {
        "logits": logits.float().tolist(),
        "first_token_s": {label(it): first_tokens(it) for it in WORKLOADS},
        "elapsed_s": elapsed(generate, counts, task.seed),
    }


def measure_memory(task):
    """The rate at which all threads together read memory, by a plain sum."""
    import torch

    torch.set_num_threads(task.num_threads)
    numbers = torch.ones(2**28)
    numbers.sum()
    return numbers.nbytes / min(seconds(numbers.sum) for _ in range(7)) / 1e9


SIDES = {
    "nano_batch": measure_nano,
    "transformers": measure_transformers,
    "memory": measure_memory,
}


def in_subprocess(side, task):
    """Measures one side in a fresh process of this environment."""
    threads = str(task.num_threads)
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": threads,
        "MKL_NUM_THREADS": threads,
        "RAYON_NUM_THREADS": threads,
    }
    output = subprocess.run(
        [sys.executable, __file__, "--measure", side, json.dumps(vars(task))],
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    ).stdout
    return json.loads(output.splitlines()[-1])


# ------------------------------------------------------------------------------ around them


def label(workload):
    return f"{workload[0]} in, {workload[1]} out"


def make_model():
    """Random weights by transformers' own initialisation, drawn once."""
    directory = LOCAL / "model-16x1024"
    if (directory / "model.safetensors").exists():
        return directory
    import torch
    from transformers import MistralConfig, MistralForCausalLM

    torch.manual_seed(0)
    model = MistralForCausalLM(MistralConfig(**CONFIG))
    model.to(torch.bfloat16).save_pretrained(directory)
    return directory


def check_same_model(rounds):
    """Both sides must compute the same thing, or their times mean nothing."""
    ours, theirs = (rounds[0][side]["logits"] for side in ("nano_batch", "transformers"))
    spread = statistics.pstdev(theirs)
    furthest = max(abs(a - b) for a, b in zip(ours, theirs, strict=True))
    if furthest > 0.2 * spread:
        sys.exit(f"logits differ by {furthest:.3g} where they spread by {spread:.3g}")


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
        for side in ("transformers", "nano_batch"):
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


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=3, help="rounds (%(default)s)")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of both sides")
    parser.add_argument("--concurrent", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--out", type=Path, help="where the JSON goes")
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        side, task = args.measure
        print(json.dumps(SIDES[side](Task(**json.loads(task)))))
        return

    load = os.getloadavg()[0]
    if load > 0.3:
        print(f"the machine is busy (load {load:.1f}): figures will be low", file=sys.stderr)
    model = str(make_model())

    def task(seed):
        return Task(model, args.threads, args.concurrent, seed)

    memory = in_subprocess("memory", task(0))
    rounds = []
    for seed in range(args.runs):
        rounds.append({})
        for side in ("transformers", "nano_batch"):
            rounds[-1][side] = in_subprocess(side, task(seed))
            print(f"round {seed + 1} of {args.runs}: {side} measured", file=sys.stderr)
    check_same_model(rounds)
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
        "versions": {name: version(name) for name in ("nano_batch", "transformers", "torch")},
        "config": CONFIG,
        "dtype": "bfloat16",
        "num_threads": args.threads,
        "weights_read_bytes": WEIGHTS_READ_BYTES,
        "rows": medians(rounds),
        "rounds": rounds,
    }
    out = args.out or LOCAL / f"end_to_end-{now:%Y%m%d-%H%M%S}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print_table(result)
    print(f"\n{out}", file=sys.stderr)


if __name__ == "__main__":
    main()
