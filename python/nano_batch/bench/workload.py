"""What is measured: models of random weights, prompts of random tokens, and how many at once."""

import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nano_batch.engine import EMBEDDED_MODEL

BLOCK_SIZE = 16

Config = dict[str, Any]

_COMMON: Config = {
    "architectures": ["MistralForCausalLM"],
    "model_type": "mistral",
    "vocab_size": 32000,
    "rms_norm_eps": 1e-5,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "initializer_range": 0.02,
    "torch_dtype": "bfloat16",
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MISTRAL_250M: Config = {
    **_COMMON,
    "hidden_size": 1024,
    "intermediate_size": 3584,
    "num_hidden_layers": 16,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "max_position_embeddings": 4096,
}
MISTRAL_7B: Config = {
    **_COMMON,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 32768,
    "rope_theta": 1000000.0,
}


@dataclass(frozen=True)
class Workload:
    """Requests of one length, greedy, the end of the text ignored."""

    name: str
    model: str
    """What its weights are, for the reader."""
    config: Config
    prompt_len: int
    output_len: int
    concurrency: tuple[int, ...]
    """Of nano_batch, for throughput."""
    static_batch: int
    """Of transformers, for throughput."""
    load: tuple[int, ...]
    """Requests that arrive at once, for latency."""
    prefill: tuple[int, int]
    """Prompts, and tokens of each, for the rate of long prompts."""
    serial: tuple[int, int]
    """Requests that transformers serves one after the other in a run: throughput, latency."""

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence."""
        return max(self.prompt_len + self.output_len, self.prefill[1] + 1)

    @property
    def num_blocks(self) -> int:
        """Blocks of a KV cache in which every burst fits."""
        answers = -(-(self.prompt_len + self.output_len) // BLOCK_SIZE) * max(self.concurrency)
        return max(answers, self.prefill[0] * -(-(self.prefill[1] + 1) // BLOCK_SIZE))

    def prompts(self, count: int, length: int, seed: str) -> list[list[int]]:
        """Prompts of random tokens; another seed gives others."""
        # The range is that of our benchmark of vLLM, whose keys are used.
        last = min(10_000, self.config["vocab_size"] - 1)
        return random_prompts(count, length, seed, last)


def random_prompts(count: int, length: int, seed: int | str, last: int = 10_000) -> list[list[int]]:
    """`count` prompts of `length` tokens from 3 to `last`."""
    generator = random.Random(seed)
    return [[generator.randint(3, last) for _ in range(length)] for _ in range(count)]


CPU = Workload(
    "cpu",
    "250 million random parameters (16 layers, hidden 1024)",
    MISTRAL_250M,
    prompt_len=32,
    output_len=128,
    concurrency=(1, 2, 4, 8, 16, 32, 64),
    static_batch=16,
    load=(1, 8, 32),
    prefill=(1, 1024),
    serial=(2, 4),
)
CUDA = Workload(
    "cuda",
    "Mistral 7B's shapes, random weights",
    MISTRAL_7B,
    prompt_len=512,
    output_len=128,
    concurrency=(1, 2, 4, 8, 16, 32, 64, 128, 256),
    static_batch=64,
    load=(1, 8, 32),
    prefill=(16, 2048),
    serial=(1, 1),
)
PRESETS = {preset.name: preset for preset in (CPU, CUDA)}


def quick() -> Workload:
    """A look at whether everything works, in seconds: the embedded model."""
    config = json.loads((EMBEDDED_MODEL / "config.json").read_text(encoding="utf-8"))
    return Workload(
        "quick",
        "the embedded model",
        config,
        prompt_len=16,
        output_len=8,
        concurrency=(1, 2, 4),
        static_batch=4,
        load=(1, 2, 4),
        prefill=(1, 128),
        serial=(2, 2),
    )


def make_model(workload: Workload, directory: Path) -> Path:
    """Return the workload's model directory, made in `directory` if it is not there.

    On a GPU it holds a config alone, and each side draws weights of these shapes; else all sides
    read the same checkpoint.
    """
    if workload.name == "quick":
        return EMBEDDED_MODEL
    path = directory / f"model-{workload.name}"
    if workload.name == "cuda":
        path.mkdir(parents=True, exist_ok=True)
        (path / "config.json").write_text(json.dumps(workload.config), encoding="utf-8")
    elif not (path / "model.safetensors").exists():
        import torch
        from transformers import MistralConfig, MistralForCausalLM
        from transformers.utils import logging

        logging.disable_progress_bar()
        torch.manual_seed(0)
        model = MistralForCausalLM(MistralConfig(**workload.config))
        model.to(torch.bfloat16).save_pretrained(path)
    return path
