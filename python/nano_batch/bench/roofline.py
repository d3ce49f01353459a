"""What the machine's memory and arithmetic allow, from bytes and operations counted by hand."""

from dataclasses import dataclass

from nano_batch.bench.workload import Config, Workload

_BF16_BYTES = 2


@dataclass(frozen=True)
class Limits:
    """Rates that were measured on this machine, and how nano_batch stores parameters there."""

    bytes_per_s: float
    operations_per_s: float
    bytes_per_parameter: float = _BF16_BYTES


@dataclass(frozen=True)
class Step:
    """The least seconds that the parts of a step take; arithmetic runs beside memory."""

    weights_s: float
    kv_cache_s: float
    arithmetic_s: float

    @property
    def bound_s(self) -> float:
        """Seconds that no implementation is below."""
        return max(self.weights_s + self.kv_cache_s, self.arithmetic_s)


class Shapes:
    """Counts of a Mistral's config."""

    def __init__(self, config: Config) -> None:
        """Take a config.json."""
        hidden, head_dim = config["hidden_size"], config["head_dim"]
        self.num_layers: int = config["num_hidden_layers"]
        self.heads_size: int = config["num_attention_heads"] * head_dim
        kv_size = config["num_key_value_heads"] * head_dim
        attention = hidden * (2 * self.heads_size + 2 * kv_size)
        mlp = 3 * hidden * config["intermediate_size"]
        self.layer_parameters: int = self.num_layers * (attention + mlp)
        self.head_parameters: int = hidden * config["vocab_size"]
        self.is_tied: bool = config.get("tie_word_embeddings", False)
        self.kv_bytes_per_token = 2 * self.num_layers * kv_size * _BF16_BYTES

    @property
    def parameters_read(self) -> int:
        """By one step: every matrix but the embedding, of which it picks a few rows."""
        return self.layer_parameters + self.head_parameters

    @property
    def num_parameters(self) -> int:
        """All of them but the norms'."""
        return self.layer_parameters + (1 if self.is_tied else 2) * self.head_parameters

    def attention_operations(self, num_keys: float) -> float:
        """A product with each key and one with each value, two operations a term."""
        return 4 * self.num_layers * self.heads_size * num_keys


def decode_step(shapes: Shapes, limits: Limits, num_seqs: int, context: float) -> Step:
    """One token for each of `num_seqs` sequences of `context` tokens."""
    operations: float = 2 * num_seqs * shapes.parameters_read
    operations += num_seqs * shapes.attention_operations(context)
    return Step(
        shapes.parameters_read * limits.bytes_per_parameter / limits.bytes_per_s,
        num_seqs * context * shapes.kv_bytes_per_token / limits.bytes_per_s,
        operations / limits.operations_per_s,
    )


def prefill_operations(shapes: Shapes, num_seqs: int, length: int) -> float:
    """All prompts; logits are needed behind the last token alone."""
    operations = 2 * num_seqs * (length * shapes.layer_parameters + shapes.head_parameters)
    return operations + num_seqs * shapes.attention_operations(length * (length + 1) / 2)


def least_seconds(workload: Workload, limits: Limits, num_seqs: int) -> float:
    """Of `num_seqs` requests at once: their prompts, then one step after the other."""
    shapes = Shapes(workload.config)
    operations = prefill_operations(shapes, num_seqs, workload.prompt_len)
    weights_s = shapes.parameters_read * limits.bytes_per_parameter / limits.bytes_per_s
    prefill_s = max(operations / limits.operations_per_s, weights_s)
    # Time is linear in the context, so the middle one stands for all.
    step = decode_step(shapes, limits, num_seqs, middle_context(workload))
    return prefill_s + (workload.output_len - 1) * step.bound_s


def middle_context(workload: Workload) -> float:
    """Tokens of a sequence halfway through its output."""
    return workload.prompt_len + workload.output_len / 2
