"""Mistral 7B's shapes with random bf16 weights on one GPU: latency, bursts, prefill and a mix.

    python benches/cuda_end_to_end.py [--runs 3] [--case all] [--out benches/results/NAME.json]

The keys are those of our benchmark of vLLM with the same workloads, so that the two can be laid
side by side: `ttft512_ms` and `itl_bs1_ms` of one stream of a 512-token prompt, `scale{n}_toks`
of n such prompts at once with 128 tokens out, `prefill_16x2048_toks`, and `nano_run{i}_toks` of
256 requests with prompts and answers of 100 to 1024 tokens at temperature 0.6. Beside them: the
time between the items of `stream`, the time to load, the card and its measured copy bandwidth.

`streams_while_prompt_joins`: 64 streams of 512-token prompts run when a prompt of 4096 tokens
comes; their tokens a second in the second before and from then to its first token, without
`max_itl_ms` and with each of `--max-itl-ms`. `--case join` measures nothing else, `--case tiny`
the same in small on the CPU.
"""

import argparse
import json
import os
import platform
import random
import statistics
import sys
import tempfile
import threading
import time
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path

from nano_batch import Engine, SamplingParams, __version__
from nano_batch.bench.result import without_folders, write
from nano_batch.bench.side import Side, Task
from nano_batch.bench.workload import MISTRAL_7B, random_prompts

BURSTS = [1, 2, 3, 4, 8, 16, 24, 32, 64, 100, 128, 256]


def mix(seed):
    """256 prompts and the numbers of tokens out, both uniform in 100 to 1024."""
    generator = random.Random(seed)
    prompts = [
        [generator.randint(3, 10000) for _ in range(generator.randint(100, 1024))]
        for _ in range(256)
    ]
    return prompts, [generator.randint(100, 1024) for _ in range(256)]


class Bench:
    def __init__(self, engine, runs):
        self.engine = engine
        self.runs = runs
        self.seed = 0

    def fresh(self, count, length):
        """Prompts that no run has seen."""
        self.seed += 1
        last = min(10_000, self.engine.vocab_size - 1)
        return random_prompts(count, length, self.seed, last)

    def seconds(self, prompts, counts, temperature=0.0):
        params = [
            SamplingParams(
                temperature=temperature, ignore_eos=True, max_tokens=count, detokenize=False
            )
            for count in counts
        ]
        start = time.perf_counter()
        outputs = self.engine.generate(prompts, params, use_tqdm=False)
        elapsed = time.perf_counter() - start
        assert sum(len(output.outputs[0].token_ids) for output in outputs) == sum(counts)
        return elapsed

    def gaps(self, length, count):
        """Seconds between the items of a stream, its first one left out."""
        params = SamplingParams(temperature=0, ignore_eos=True, max_tokens=count, detokenize=False)
        times = []
        for output in self.engine.stream(self.fresh(1, length)[0], params):
            times += [time.perf_counter()] * len(output.outputs[0].token_ids)
        return [after - before for before, after in pairwise(times[1:])]

    def burst(self, count, length, out):
        times = [self.seconds(self.fresh(count, length), [out] * count) for _ in range(self.runs)]
        return statistics.median(times), times

    def measure(self):
        result = {}
        self.seconds(random_prompts(8, 64, 0), [16] * 8)
        self.burst(2, 512, 4)
        first = [self.seconds(self.fresh(1, 512), [1]) for _ in range(11)]
        full = [self.seconds(self.fresh(1, 512), [129]) for _ in range(4)]
        between = (statistics.median(full) - statistics.median(first)) / 128
        result["ttft512_ms"] = 1e3 * statistics.median(first)
        result["itl_bs1_ms"] = 1e3 * between
        result["stream_gap_ms"] = 1e3 * statistics.median(self.gaps(512, 129))
        for length in (8192, 30000):
            result[f"itl_{length}_ms"] = 1e3 * statistics.median(self.gaps(length, 33))
        self.report(result)
        for count in BURSTS:
            elapsed, times = self.burst(count, 512, 128)
            result[f"scale{count}_toks"] = count * 128 / elapsed
            result[f"scale{count}_s"] = times
            print(count, f"{result[f'scale{count}_toks']:.0f} tok/s", flush=True)
        elapsed, times = self.burst(16, 2048, 1)
        result["prefill_16x2048_toks"] = 16 * 2048 / elapsed
        result["prefill_16x2048_s"] = times
        for run in range(self.runs):
            prompts, counts = mix(run)
            elapsed = self.seconds(prompts, counts, temperature=0.6)
            result[f"nano_run{run}_s"] = elapsed
            result[f"nano_run{run}_toks"] = sum(counts) / elapsed
        self.report({name: value for name, value in result.items() if "nano" in name})
        return result

    def join(self, num_streams=64, stream_len=512, prompt_len=4096, window_s=1.0):
        """Figures of `num_streams` streams before and while one prompt joins them."""
        most = self.engine.max_model_len - stream_len
        endless = SamplingParams(temperature=0, ignore_eos=True, max_tokens=most, detokenize=False)
        streams = [
            self.engine.stream(prompt, endless) for prompt in self.fresh(num_streams, stream_len)
        ]
        times = [[] for _ in streams]

        def read(stream, times):
            for output in stream:
                times += [time.perf_counter()] * len(output.outputs[0].token_ids)

        readers = [
            threading.Thread(target=read, args=pair) for pair in zip(streams, times, strict=True)
        ]
        for reader in readers:
            reader.start()
        while not all(times):
            time.sleep(0.001)
        # Whoever came last has just had its first token, and its neighbours waited for it.
        time.sleep(1.5 * window_s)
        (prompt,) = self.fresh(1, prompt_len)
        one = SamplingParams(temperature=0, ignore_eos=True, max_tokens=1, detokenize=False)
        start = time.perf_counter()
        self.engine.stream(prompt, one).collect()
        end = time.perf_counter()
        assert all(reader.is_alive() for reader in readers), "a stream has ended too early"
        for stream in streams:
            self.engine.abort(stream.request_id)
        for reader in readers:
            reader.join()

        def rate(since, until):
            seen = sum(since < at <= until for stream in times for at in stream)
            return seen / (until - since)

        gaps = [
            after - before
            for stream in times
            for before, after in pairwise(at for at in stream if start < at <= end)
        ]
        before, during = rate(start - window_s, start), rate(start, end)
        return {
            "before_toks": before,
            "during_toks": during,
            "ratio": during / before,
            "prompt_ttft_ms": 1e3 * (end - start),
            "largest_gap_ms": 1e3 * max(gaps, default=end - start),
        }

    def report(self, result):
        for name, value in result.items():
            print(f"{name}: {value:.2f}", flush=True)


def measure_joins(open_engine, args, **sizes):
    """For each `max_itl_ms` the medians and the runs, after one that warms up kernels and pace."""
    result = []
    for max_itl_ms in [None, *args.max_itl_ms]:
        with open_engine(max_itl_ms=max_itl_ms) as engine:
            bench = Bench(engine, args.runs)
            joins = [bench.join(**sizes) for _ in range(args.runs + 1)][1:]
        median = {name: statistics.median(join[name] for join in joins) for name in joins[0]}
        print(f"max_itl_ms {max_itl_ms}:", {name: round(it, 2) for name, it in median.items()})
        result.append({"max_itl_ms": max_itl_ms, **median, "runs": joins})
    return {"streams_while_prompt_joins": result}


def measure_copy():
    """GB/s read and written, in a process of its own, so that its memory is gone."""
    task = Task("", "cuda", os.cpu_count(), longest=0, answer_len=0, num_blocks=0, concurrency=())
    with Side("limits", task) as side:
        return side.call("limits")["copy_gb_per_s"]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=3, help="of each burst (%(default)s)")
    parser.add_argument("--max-num-batched-tokens", type=int, default=8192, help="(%(default)s)")
    parser.add_argument("--deterministic", action="store_true")
    parser.add_argument("--case", choices=["all", "join", "tiny"], default="all")
    parser.add_argument("--max-itl-ms", type=float, nargs="*", default=[12, 15], metavar="MS")
    parser.add_argument("--out", type=Path, help="where the JSON goes")
    args = parser.parse_args()
    if args.case == "tiny":
        sizes = {"num_streams": 4, "stream_len": 32, "prompt_len": 400, "window_s": 0.05}
        joins = measure_joins(partial(Engine, device="cpu"), args, **sizes)
        print("RESULT", json.dumps(joins))
        return
    copy = measure_copy()
    with tempfile.TemporaryDirectory() as directory:
        (Path(directory) / "config.json").write_text(json.dumps(MISTRAL_7B), encoding="utf-8")
        open_engine = partial(
            Engine,
            directory,
            device="cuda",
            load_format="dummy",
            max_num_batched_tokens=args.max_num_batched_tokens,
            deterministic=args.deterministic,
        )
        loads = []
        # The first one may compile kernels and time products, if this machine never did.
        for _ in range(2):
            start = time.perf_counter()
            engine = open_engine()
            loads.append(time.perf_counter() - start)
            print(f"ready after {loads[-1]:.2f} s on {engine.device}", flush=True)
            if len(loads) < 2:
                engine.close()
        with engine:
            figures = Bench(engine, args.runs).measure() if args.case == "all" else {}
            card, num_blocks = engine.device, engine.stats().num_blocks
        figures |= measure_joins(open_engine, args)
        result = {
            "benchmark": "cuda_end_to_end",
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
            "command": without_folders(sys.argv[1:]),
            "card": card,
            "copy_gb_per_s": copy,
            "python": platform.python_version(),
            "versions": {"nano_batch": __version__, "torch": version("torch")},
            "config": MISTRAL_7B,
            "num_blocks": num_blocks,
            "load_s": loads,
            **figures,
        }
    print(f"{result['card']}, copy {copy:.0f} GB/s")
    print("RESULT", json.dumps(result))
    if args.out:
        write(result, args.out)


if __name__ == "__main__":
    main()
