"""llama.cpp as a side of `nano-batch bench throughput --llama-python PYTHON`.

Runs in an environment that has llama_cpp and gguf, and needs neither nano_batch nor torch there.
"""

import importlib.util
import sys
import time
from pathlib import Path

import gguf_model
import llama_context
import llama_cpp

_WORKER = Path(__file__).resolve().parents[1] / "python/nano_batch/bench/worker.py"


class LlamaCpp:
    """A context for each number of sequences over the same weights as a bf16 GGUF."""

    def __init__(self, task):
        directory = Path(task.model)
        path = directory.parent / f"{directory.name}.gguf"
        if not path.exists():
            gguf_model.write(directory, path)
        model = llama_context.load(str(path))
        self._contexts = {
            count: llama_context.Context(model, count, task.answer_len, task.num_threads)
            for count in {1, *task.concurrency}
        }
        settings = {"flash_attention": True, "kv_unified": False, "kv_cache": "float16"}
        settings |= {"dtype": "bfloat16", "num_threads": task.num_threads}
        self.facts = {"settings": settings, "version": llama_cpp.__version__}

    def burst(self, prompts, output_len):
        """All prompts in one batch, then a token of every sequence in one batch a step."""
        start = time.perf_counter()
        steps = self._contexts[len(prompts)].greedy(prompts, output_len)
        elapsed = time.perf_counter() - start
        worker.require_counts([len(row) for row in zip(*steps, strict=True)], output_len)
        return {"elapsed_s": elapsed}

    def logits(self, prompts):
        """Logits behind the last token of each prompt."""
        return {"logits": [self._contexts[1].logits([it])[0].tolist() for it in prompts]}


# By its path: nano_batch itself is not installed in this environment.
spec = importlib.util.spec_from_file_location("worker", _WORKER)
worker = importlib.util.module_from_spec(spec)
spec.loader.exec_module(worker)

if __name__ == "__main__":
    worker.serve(LlamaCpp, sys.argv[1])
