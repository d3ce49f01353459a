"""What a step's time on a GPU is made of, with Mistral 7B's shapes and random weights.

Kernels overlap, so a part is the time from the end of the kernel before to its own end: the parts
of a step add up to its span on the device. Beside them stands the wall clock without a profiler.
"""

import argparse
import json
import tempfile
import time
from collections import defaultdict
from itertools import pairwise
from pathlib import Path
from statistics import median

import torch
from nano_batch import Engine, SamplingParams
from nano_batch.bench.workload import MISTRAL_7B, random_prompts
from torch.profiler import ProfilerActivity, profile

PAUSE_S = 0.05  # before a lone prompt, or the card is warm from the one before


def generate(engine, num_prompts, length, max_tokens, seed):
    """The metrics of requests that arrive at once, with prompts that were never seen."""
    params = SamplingParams(temperature=0, ignore_eos=True, max_tokens=max_tokens, detokenize=False)
    prompts = random_prompts(num_prompts, length, 1000 * seed + 10 * num_prompts + length)
    return [it.metrics for it in engine.generate(prompts, params, use_tqdm=False)]


def steps_of(work):
    """For each step whether it has a prompt, and of each part milliseconds and launches."""
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        work()
    on_device = torch._C._autograd.DeviceType.CUDA
    kernels = sorted(
        (event.start_ns(), event.start_ns() + event.duration_ns(), event.name())
        for event in profiled.profiler.kineto_results.events()
        if event.device_type() == on_device
    )
    # A step begins with the copy of its inputs, or where there is none with the embedding.
    embeds = [at for at, (_, _, name) in enumerate(kernels) if "embed_tokens" in name]
    bounds = [at - ("HtoD" in kernels[at - 1][2]) for at in embeds] + [len(kernels)]
    for first, last in pairwise(bounds):
        parts, done = defaultdict(lambda: [0.0, 0]), kernels[first][0]
        for _, end, name in kernels[first:last]:
            part = parts[name.split("(")[0].split("<")[0][:40].strip()]
            part[0] += max(0, end - done) / 1e6
            part[1] += 1
            done = max(done, end)
        yield any("prefill_attention" in name for _, _, name in kernels[first:last]), parts


def report(name, steps, wall_ms):
    """The step of middle length."""

    def length(parts):
        return sum(ms for ms, _ in parts.values())

    middle = sorted(steps, key=length)[len(steps) // 2]
    parts = [
        {"part": part, "ms": round(ms, 3), "launches": launches}
        for part, (ms, launches) in sorted(middle.items(), key=lambda item: -item[1][0])
    ]
    print(f"{name}: {length(middle):.3f} ms, wall clock {wall_ms:.3f}")
    for part in parts:
        print(f"    {part['part']:40} {part['ms']:8.3f} in {part['launches']}")
    return {
        "wall_ms": round(wall_ms, 3),
        "sum_of_parts_ms": round(length(middle), 3),
        "parts": parts,
    }


def decode(engine, num_seqs):
    """Steps of `num_seqs` sequences at 512 tokens and more."""
    walls = []
    for seed in range(4):
        metrics = generate(engine, num_seqs, 512, 65, seed)
        first = max(it.first_token_s for it in metrics)
        last = max(it.last_token_s for it in metrics)
        walls.append(1e3 * (last - first) / 64)
    steps = steps_of(lambda: generate(engine, num_seqs, 512, 65, 9))
    decoding = [parts for has_prompt, parts in steps if not has_prompt]
    return report(f"decode {num_seqs} at 512", decoding[8:-8], median(walls[1:]))


def prefill(engine, length):
    """Lone prompts."""

    def first_tokens(seeds):
        for seed in seeds:
            time.sleep(PAUSE_S)
            (metrics,) = generate(engine, 1, length, 1, seed)
            yield 1e3 * metrics.first_token_s

    walls = list(first_tokens(range(8)))
    steps = steps_of(lambda: list(first_tokens(range(20, 26))))
    prompts = [parts for has_prompt, parts in steps if has_prompt]
    return report(f"prefill 1 x {length}", prompts, median(walls[1:]))


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="where the JSON goes")
    args = parser.parse_args()
    torch.zeros(1, device="cuda")  # the profiler wants a context of torch's
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(MISTRAL_7B))
        with Engine(
            folder, device="cuda", load_format="dummy", max_num_batched_tokens=8192
        ) as engine:
            result = {f"decode {num} at 512": decode(engine, num) for num in (1, 4, 16, 64, 128)}
            result |= {f"prefill 1 x {length}": prefill(engine, length) for length in (512, 2048)}
    if args.out:
        args.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
