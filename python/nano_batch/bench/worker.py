"""One side of a benchmark, in a process of its own: `python -m nano_batch.bench.worker SIDE TASK`.

Reads one JSON object a line, `{"call": name, ...arguments}`, and answers with one. Only the
standard library is imported before a side is opened, so that the llama.cpp side, which lives in
another environment, shares this loop.
"""

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any


def serve(open_side: Callable[[SimpleNamespace], Any], task: str) -> None:
    """Open a side and answer until its input ends."""
    # Whatever else prints, prints to stderr.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def answer(value: dict[str, Any]) -> None:
        print(json.dumps(value), file=answers, flush=True)

    try:
        side = open_side(SimpleNamespace(**json.loads(task)))
        answer(side.facts)
        for line in sys.stdin:
            call = json.loads(line)
            answer(getattr(side, call.pop("call"))(**call))
    except (Exception, SystemExit) as error:
        answer({"error": f"{type(error).__name__}: {error}"})
        raise


def require_counts(counts: list[int], output_len: int) -> None:
    """Tokens out are as many as were asked for, or the time means nothing."""
    if set(counts) != {output_len}:
        raise ValueError(f"requests of {output_len} tokens gave {sorted(set(counts))}")


class NanoBatch:
    """This project."""

    def __init__(self, task: SimpleNamespace) -> None:
        """Load the model and say how long that took."""
        from nano_batch import Engine

        self._baseline_bytes = _resident_bytes("VmRSS")
        options: dict[str, Any] = {"device": task.device, "dtype": "bfloat16"}
        if task.device == "cpu":
            options |= {"num_threads": task.num_threads, "num_blocks": task.num_blocks}
        else:
            options |= {"load_format": "dummy"}
        options |= {"max_model_len": task.longest}
        start = time.perf_counter()
        self._engine = Engine(task.model, **options)
        self.facts = {
            "device": self._engine.device,
            "weight_bytes": self._engine.weight_bytes,
            "ready_s": time.perf_counter() - start,
            "settings": options,
        }

    def burst(self, prompts: list[list[int]], output_len: int) -> dict[str, Any]:
        """All prompts at once; times are since the submission of each."""
        from nano_batch import SamplingParams

        # Tokens are compared with those of sides that make no text.
        params = SamplingParams(
            temperature=0, max_tokens=output_len, ignore_eos=True, detokenize=False
        )
        start = time.perf_counter()
        outputs = self._engine.generate(prompts, params, use_tqdm=False)
        elapsed = time.perf_counter() - start
        require_counts([len(output.outputs[0].token_ids) for output in outputs], output_len)
        return {
            "elapsed_s": elapsed,
            "first_s": [output.metrics.first_token_s for output in outputs],
            "last_s": [output.metrics.last_token_s for output in outputs],
        }

    def logits(self, prompts: list[list[int]]) -> dict[str, Any]:
        """Logits behind the last token of each prompt."""
        return {"logits": [self._engine.logits(prompt)[-1].tolist() for prompt in prompts]}

    def memory(self) -> dict[str, Any]:
        """The most that was ever resident beyond the imports."""
        return {"peak_bytes": _resident_bytes("VmHWM") - self._baseline_bytes}


class Transformers:
    """Hugging Face's `generate`: sdpa, cache on, bfloat16."""

    def __init__(self, task: SimpleNamespace) -> None:
        """Load the checkpoint, or draw weights of the config's shapes on a GPU."""
        import torch
        import transformers

        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        torch.set_num_threads(task.num_threads)
        self._torch, self._device = torch, task.device
        settings = {"attn_implementation": "sdpa", "use_cache": True, "dtype": "bfloat16"}
        attention, dtype = "sdpa", torch.bfloat16
        if task.device == "cpu":
            settings["num_threads"] = task.num_threads
            self._model = transformers.AutoModelForCausalLM.from_pretrained(
                task.model, dtype=dtype, attn_implementation=attention
            )
        else:
            config = transformers.AutoConfig.from_pretrained(task.model)
            torch.set_default_dtype(dtype)
            with torch.device(task.device):
                self._model = transformers.AutoModelForCausalLM.from_config(
                    config, dtype=dtype, attn_implementation=attention
                )
            torch.set_default_dtype(torch.float32)
        self._model.eval()
        if self._model.dtype != dtype:
            raise TypeError(f"transformers' weights are {self._model.dtype}")
        # Not to be set in `generate`, where None means the model's own.
        self._model.generation_config.eos_token_id = None
        self._config = transformers.GenerationConfig(
            do_sample=False, use_cache=True, pad_token_id=0
        )
        self.facts = {"settings": settings}

    def burst(self, prompts: list[list[int]], output_len: int) -> dict[str, Any]:
        """One static batch; the streamer sees the first tokens, and the last come at the end."""
        torch, first = self._torch, _FirstToken()
        start = time.perf_counter()
        with torch.inference_mode():
            ids = torch.tensor(prompts, device=self._device)
            output = self._model.generate(
                ids,
                self._config,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=output_len,
                streamer=first,
            )
        tokens = output[:, ids.shape[1] :].tolist()
        elapsed = time.perf_counter() - start
        require_counts([len(row) for row in tokens], output_len)
        count = len(prompts)
        first_s = first.times[1] - start
        return {"elapsed_s": elapsed, "first_s": [first_s] * count, "last_s": [elapsed] * count}

    def logits(self, prompts: list[list[int]]) -> dict[str, Any]:
        """Logits behind the last token of each prompt."""
        torch = self._torch
        with torch.inference_mode():
            ids = torch.tensor(prompts, device=self._device)
            logits = self._model(ids, logits_to_keep=1).logits[:, -1]
        return {"logits": logits.float().tolist()}


class _FirstToken:
    """A streamer that notes when it is given the prompt, the first token and those behind it."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, _: Any) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


class Limits:
    """The machine itself: what it reads, copies and multiplies in a second, by torch."""

    def __init__(self, task: SimpleNamespace) -> None:
        """Name the machine."""
        import torch

        torch.set_num_threads(task.num_threads)
        self._torch, self._device = torch, task.device
        self.facts: dict[str, Any] = {}
        if task.device != "cpu":
            card = torch.cuda.get_device_properties(0)
            self.facts = {"card": card.name, "card_memory_bytes": card.total_memory}
            self.facts |= {"cuda": torch.version.cuda}

    def limits(self) -> dict[str, Any]:
        """Measure them, the best of several each."""
        torch, on_gpu = self._torch, self._device != "cpu"
        source = torch.ones(2**30 if on_gpu else 2**28, device=self._device)
        target = torch.empty_like(source)
        size = 8192 if on_gpu else 2048
        a, b = (torch.randn(size, size, device=self._device).bfloat16() for _ in range(2))
        return {
            "read_gb_per_s": source.nbytes / self._best(source.sum) / 1e9,
            "copy_gb_per_s": 2 * source.nbytes / self._best(lambda: target.copy_(source)) / 1e9,
            "matmul_gflop_per_s": 2 * size**3 / self._best(lambda: a @ b) / 1e9,
        }

    def _best(self, work: Callable[[], Any]) -> float:
        times = []
        for _ in range(8):
            start = time.perf_counter()
            work()
            if self._device != "cpu":
                self._torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
        return min(times)


def _resident_bytes(name: str) -> int:
    """VmRSS is what is resident, VmHWM the most that ever was."""
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {name}")


SIDES = {"nano_batch": NanoBatch, "transformers": Transformers, "limits": Limits}

if __name__ == "__main__":
    # Whoever pressed Ctrl-C hears of it from the process that waits for this one.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    serve(SIDES[sys.argv[1]], sys.argv[2])
