"""Tiny models with random weights, written by transformers: the golden reference's own files.

Each `ModelSpec` stands for one way in which checkpoints differ. `write` makes its directory;
`reference` loads it back through transformers.
"""

import json
import math
import os
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers
from transformers import AutoModelForCausalLM, GenerationConfig

# So small models gain nothing from more, and lose much where other work shares the cores.
torch.set_num_threads(1)
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

BASE = {
    "vocab_size": 151,
    "hidden_size": 96,
    "intermediate_size": 173,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "sliding_window": None,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def rope(kind: str, theta: float = 10000.0, **scaling: Any) -> dict[str, Any]:
    return {"rope_type": kind, "rope_theta": theta, **scaling}


@dataclass(frozen=True)
class ModelSpec:
    """What differs from `BASE`, and how the files are written."""

    changes: dict[str, Any] = field(default_factory=dict)
    family: str = "Mistral"
    # The layout of config.json: that of transformers 4 or of transformers 5.
    form: int = 5
    # Keys that an old config.json lacks, so that the reader has to know their defaults.
    absent: tuple[str, ...] = ()
    max_shard_size: str = "1GB"
    seed: int = 0


ALTERNATING = ["full_attention", "sliding_attention", "sliding_attention", "sliding_attention"]
LLAMA3 = {
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"factor": 4.0, "original_max_position_embeddings": 64}

MODELS = {
    # Mistral 7B v0.1: a window on every layer, shorter than the prompts; no head_dim in the file.
    "v0.1": ModelSpec({"sliding_window": 24}, form=4, absent=("head_dim",)),
    "v0.1 in the form of transformers 5": ModelSpec({"sliding_window": 24}),
    "window of one block": ModelSpec({"sliding_window": 16}),
    "window longer than the prompt": ModelSpec({"sliding_window": 300}),
    # Mistral 7B v0.2 and later: no window, another theta.
    "v0.2": ModelSpec({"rope_parameters": rope("default", 1e6)}, form=4, absent=("head_dim",)),
    "v0.2 in the form of transformers 5": ModelSpec({"rope_parameters": rope("default", 1e6)}),
    # Nemo: head_dim is its own number, the vocabulary is large beside the width.
    "Nemo": ModelSpec(
        {
            "vocab_size": 1031,
            "hidden_size": 80,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "rope_parameters": rope("default", 1e6),
        },
        form=4,
    ),
    "Nemo in the form of transformers 5": ModelSpec(
        {"hidden_size": 112, "num_attention_heads": 4, "num_key_value_heads": 2}
    ),
    "tied embeddings": ModelSpec({"tie_word_embeddings": True}),
    "tied embeddings in the form of transformers 4": ModelSpec(
        {"tie_word_embeddings": True}, form=4
    ),
    "sharded": ModelSpec({"num_hidden_layers": 3}, max_shard_size="60KB"),
    "sharded and tied": ModelSpec({"tie_word_embeddings": True}, max_shard_size="60KB"),
    "Ministral": ModelSpec(
        {"num_hidden_layers": 4, "sliding_window": 20, "layer_types": ALTERNATING},
        family="Ministral",
    ),
    "Ministral in the form of transformers 4": ModelSpec(
        {"num_hidden_layers": 4, "sliding_window": 20, "layer_types": ALTERNATING[::-1]},
        family="Ministral",
        form=4,
    ),
    "Ministral whose window no layer has": ModelSpec(
        {"sliding_window": 8, "layer_types": ["full_attention"] * 2}, family="Ministral"
    ),
    "six heads over two": ModelSpec(
        {"num_attention_heads": 6, "num_key_value_heads": 2, "hidden_size": 132}
    ),
    "as many key heads as heads": ModelSpec(
        {"num_attention_heads": 5, "num_key_value_heads": 5, "hidden_size": 75}
    ),
    "one layer, one head, head_dim 64": ModelSpec(
        {
            "num_hidden_layers": 1,
            "num_attention_heads": 1,
            "num_key_value_heads": 1,
            "head_dim": 64,
            "hidden_size": 51,
            "intermediate_size": 67,
            "vocab_size": 97,
        }
    ),
    "head_dim 80": ModelSpec({"head_dim": 80, "hidden_size": 240}),
    "head_dim 128": ModelSpec(
        {"head_dim": 128, "num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 160}
    ),
    "another epsilon and theta": ModelSpec(
        {"rms_norm_eps": 1e-2, "rope_parameters": rope("default", 123.0)}
    ),
    "linear rope": ModelSpec({"rope_parameters": rope("linear", factor=4.0)}),
    "linear rope in the form of transformers 4": ModelSpec(
        {"rope_parameters": rope("linear", factor=4.0)}, form=4
    ),
    "llama3 rope": ModelSpec({"rope_parameters": rope("llama3", **LLAMA3)}),
    "llama3 rope in the form of transformers 4": ModelSpec(
        {"rope_parameters": rope("llama3", 5e5, **LLAMA3)}, form=4
    ),
    "yarn rope": ModelSpec({"rope_parameters": rope("yarn", **YARN)}),
    "yarn rope in the form of transformers 4": ModelSpec(
        {"rope_parameters": rope("yarn", 1e6, **YARN)}, form=4
    ),
    "yarn rope with its own knobs": ModelSpec(
        {
            "rope_parameters": rope(
                "yarn", **YARN, beta_fast=16.0, beta_slow=2.0, attention_factor=0.9
            )
        }
    ),
}


def _for_gpu(spec: ModelSpec) -> ModelSpec:
    """The same with sizes that the kernels of a GPU have."""
    changes = {"hidden_size": 192, "intermediate_size": 176, "head_dim": 64, **spec.changes}
    if changes["head_dim"] != 128:
        changes["head_dim"] = 64
    for size in ("hidden_size", "intermediate_size"):
        changes[size] = math.ceil(changes[size] / 8) * 8
    return replace(spec, changes=changes)


GPU_MODELS = {f"{name} on a GPU": _for_gpu(spec) for name, spec in MODELS.items()}


def build(spec: ModelSpec) -> torch.nn.Module:
    """The model in f32, with weights so large that its logits tell tokens apart."""
    config_class = getattr(transformers, f"{spec.family}Config")
    config = config_class(**{**BASE, **spec.changes})
    config.dtype = torch.float32
    model = getattr(transformers, f"{spec.family}ForCausalLM")(config).float().eval()
    generator = torch.Generator().manual_seed(spec.seed)
    spread = 1.2 / math.sqrt(config.hidden_size)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() == 1:
                parameter.copy_(1 + 0.2 * noise)
            elif "embed" in name and not config.tie_word_embeddings:
                parameter.copy_(noise)
            else:
                parameter.copy_(spread * noise)
    return model


def write(spec: ModelSpec, directory: Path) -> Path:
    """Writes the files as transformers does, in the form that the spec asks for."""
    build(spec).save_pretrained(directory, max_shard_size=spec.max_shard_size)
    # Sampling defaults are no part of what is compared.
    (directory / "generation_config.json").unlink(missing_ok=True)
    if spec.form == 4:
        edit_config(directory, in_the_form_of_transformers_4)
    if spec.absent:
        edit_config(directory, lambda config: [config.pop(key) for key in spec.absent])
    return directory


def edit_config(directory: Path, change: Any) -> None:
    """Lets `change` edit the dictionary of config.json in place."""
    path = directory / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    change(config)
    path.write_text(json.dumps(config, indent=2), encoding="utf-8")


def in_the_form_of_transformers_4(config: dict[str, Any]) -> None:
    parameters = config.pop("rope_parameters")
    config["rope_theta"] = parameters.pop("rope_theta")
    kind = parameters.pop("rope_type")
    config["rope_scaling"] = None if kind == "default" else {"type": kind, **parameters}
    config["torch_dtype"] = config.pop("dtype")
    config["transformers_version"] = "4.40.0"


def reference(directory: Path, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    """The same files through transformers, with its plainest attention."""
    model = AutoModelForCausalLM.from_pretrained(
        directory, dtype=dtype, attn_implementation="eager"
    )
    # Not to be set in `generate`, where None means the model's own.
    model.generation_config.eos_token_id = None
    return model.eval()


def reference_logits(model: torch.nn.Module, tokens: list[int]) -> torch.Tensor:
    with torch.inference_mode():
        return model(torch.tensor([tokens])).logits[0].float()


def reference_greedy(model: torch.nn.Module, tokens: list[int], num_tokens: int) -> list[int]:
    """Greedy tokens of transformers' `generate`, which no end-of-sequence token stops."""
    config = GenerationConfig(max_new_tokens=num_tokens, do_sample=False, pad_token_id=0)
    prompt = torch.tensor([tokens])
    with torch.inference_mode():
        output = model.generate(prompt, config, attention_mask=torch.ones_like(prompt))
    return output[0, len(tokens) :].tolist()


def random_tokens(length: int, vocab_size: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, vocab_size, (length,), generator=generator).tolist()
