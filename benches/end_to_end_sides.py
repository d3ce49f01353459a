"""What `end_to_end.py` measures, each side in a process of its own.

    python benches/end_to_end_sides.py SIDE TASK

prints one line of JSON. Whatever a side needs is imported by that side alone: llama.cpp may live in
another environment than nano_batch and transformers.
"""

import json
import os
import random
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

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
# Prompts whose logits must be the same on all sides.
NUM_COMPARED = 4
BLOCK_SIZE = 16
WEIGHTS = "model.safetensors"


@dataclass(frozen=True)
class Task:
    """What a subprocess measures."""

    model: str
    num_threads: int
    concurrent: list[int]
    # Differs between rounds, so that no round sees the prompts of another.
    seed: int


def in_subprocess(side, task, python=sys.executable):
    """Measures one side in a fresh process of an interpreter."""
    threads = str(task.num_threads)
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": threads,
        "MKL_NUM_THREADS": threads,
        "RAYON_NUM_THREADS": threads,
    }
    output = subprocess.run(
        [python, __file__, side, json.dumps(vars(task))],
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    ).stdout
    return json.loads(output.splitlines()[-1])


def label(workload):
    return f"{workload[0]} in, {workload[1]} out"


def prompts(workload, count, seed):
    """Random tokens, the same for all sides."""
    generator = random.Random(f"{workload} {count} {seed}")
    vocabulary = range(3, CONFIG["vocab_size"])
    return [generator.choices(vocabulary, k=workload[0]) for _ in range(count)]


def compared_prompts():
    return prompts(WORKLOADS[0], NUM_COMPARED, "logits")


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


def first_tokens(first_token, seed, settle=lambda: None):
    """Seconds to the first token, of several prompts of every workload."""

    def one(workload, index):
        (prompt,) = prompts(workload, 1, (seed, index))
        took = seconds(lambda: first_token(prompt))
        settle()
        return took

    return {label(it): [one(it, index) for index in range(NUM_FIRST_TOKENS)] for it in WORKLOADS}


# ------------------------------------------------------------------------------------ nano_batch


def open_nano(task):
    from nano_batch import Engine

    most = max(task.concurrent)
    longest = max(map(sum, WORKLOADS))
    return Engine(
        task.model,
        device="cpu",
        dtype="bfloat16",
        num_threads=task.num_threads,
        max_model_len=longest,
        block_size=BLOCK_SIZE,
        num_blocks=-(-longest // BLOCK_SIZE) * most,
        max_num_seqs=most,
    )


def nano_generate(engine, workload, count, seed):
    from nano_batch import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=workload[1], ignore_eos=True)
    outputs = engine.generate(prompts(workload, count, seed), params, use_tqdm=False)
    for output in outputs:
        assert len(output.outputs[0].token_ids) == workload[1]


def measure_nano(task):
    from nano_batch import SamplingParams

    with open_nano(task) as engine:

        def generate(workload, count, seed):
            nano_generate(engine, workload, count, seed)

        def first_token(prompt):
            params = SamplingParams(temperature=0, max_tokens=64, ignore_eos=True)
            # Dropping the stream ends the request.
            next(engine.stream(prompt, params))

        def settle():
            while engine.stats().num_running > 0:
                time.sleep(0.001)

        counts = {f"nano_batch, {count} at once": count for count in task.concurrent}
        warm_up(generate, counts)
        return {
            "logits": [engine.logits(prompt)[-1].tolist() for prompt in compared_prompts()],
            "first_token_s": first_tokens(first_token, task.seed, settle),
            "elapsed_s": elapsed(generate, counts, task.seed),
        }


def measure_start(task):
    """How long nano_batch takes to be ready, and the memory it needs at its fullest."""
    import nano_batch  # noqa: F401, imports are no part of the start

    weights = Path(task.model) / WEIGHTS
    read_through(weights)
    baseline = resident_bytes("VmRSS")
    start = time.perf_counter()
    with open_nano(task) as engine:
        ready_s = time.perf_counter() - start
        loaded = resident_bytes("VmHWM")
        for workload in WORKLOADS:
            nano_generate(engine, workload, max(task.concurrent), task.seed)
        num_slots = engine.stats().num_blocks * BLOCK_SIZE
        slot_bytes = 2 * 2 * CONFIG["num_key_value_heads"] * CONFIG["head_dim"]
        return {
            "ready_s": ready_s,
            "loaded_bytes": loaded - baseline,
            "peak_bytes": resident_bytes("VmHWM") - baseline,
            "weights_bytes": weights.stat().st_size,
            "kv_cache_bytes": num_slots * CONFIG["num_hidden_layers"] * slot_bytes,
        }


def read_through(path):
    """Leaves a file in the page cache, and as little as possible in this process."""
    buffer = bytearray(2**20)
    with path.open("rb", buffering=0) as file:
        while file.readinto(buffer):
            pass


def resident_bytes(name):
    """VmRSS is what is resident, VmHWM the most that ever was."""
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {name}")


# -------------------------------------------------------------------------------- the other sides


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
    def answers(rows, num_tokens):
        ids = torch.tensor(rows)
        config = GenerationConfig(
            max_new_tokens=num_tokens,
            do_sample=False,
            use_cache=True,
            pad_token_id=0,
        )
        output = model.generate(ids, config, attention_mask=torch.ones_like(ids))
        tokens = output[:, ids.shape[1] :].tolist()
        assert [len(row) for row in tokens] == [num_tokens] * len(rows)

    def generate(workload, count, seed):
        answers(prompts(workload, count, seed), workload[1])

    counts = {
        "transformers, 1 at a time": 1,
        f"transformers, batch of {STATIC_BATCH}": STATIC_BATCH,
    }
    warm_up(generate, counts)
    with torch.inference_mode():
        logits = model(torch.tensor(compared_prompts()), logits_to_keep=1).logits[:, -1]
    return {
        "logits": logits.float().tolist(),
        "first_token_s": first_tokens(lambda prompt: answers([prompt], 1), task.seed),
        "elapsed_s": elapsed(generate, counts, task.seed),
    }


def measure_llama(task):
    """llama.cpp, with a context for each number of sequences."""
    import gguf_model
    import llama_context

    directory = Path(task.model)
    path = directory.parent / f"{directory.name}.gguf"
    if not path.exists():
        gguf_model.write(directory, path)
    model = llama_context.load(str(path))
    longest = max(map(sum, WORKLOADS))
    contexts = {
        count: llama_context.Context(model, count, longest, task.num_threads)
        for count in {1, *task.concurrent}
    }

    def generate(workload, count, seed):
        rows = prompts(workload, count, seed)
        tokens = contexts[count].greedy(rows, workload[1])
        assert [len(step) for step in tokens] == [count] * workload[1]

    counts = {f"llama.cpp, {count} at once": count for count in task.concurrent}
    warm_up(generate, counts)
    return {
        "logits": [contexts[1].logits([prompt])[0].tolist() for prompt in compared_prompts()],
        "first_token_s": first_tokens(lambda it: contexts[1].greedy([it], 1), task.seed),
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
    "transformers": measure_transformers,
    "nano_batch": measure_nano,
    "llama.cpp": measure_llama,
    "start": measure_start,
    "memory": measure_memory,
}

if __name__ == "__main__":
    _, side, task = sys.argv
    print(json.dumps(SIDES[side](Task(**json.loads(task)))))
