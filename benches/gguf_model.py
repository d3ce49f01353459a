"""A model directory of Hugging Face's form as a bf16 GGUF, which llama.cpp reads.

    python benches/gguf_model.py DIRECTORY FILE

Needs the packages gguf and numpy and nothing else, so that it runs where llama.cpp is installed.
The file has no vocabulary: it is fed with token ids.
"""

import json
import sys
from pathlib import Path

import gguf
import numpy as np

BF16 = gguf.GGMLQuantizationType.BF16


def write(directory: Path, path: Path) -> None:
    """Write the Mistral in `directory`, which has one safetensors file of bfloat16, to `path`."""
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    num_heads, num_kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    # What a Mistral has beyond a Llama is its window.
    assert config["sliding_window"] is None, "sliding windows are not written"
    assert config["rope_parameters"]["rope_type"] == "default", "rope scaling is not written"

    # Only a whole file gets the name.
    part = path.with_suffix(".part")
    writer = gguf.GGUFWriter(part, "llama")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
    writer.add_vocab_size(config["vocab_size"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(num_heads)
    writer.add_head_count_kv(num_kv_heads)
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_tokenizer_model("none")

    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config["num_hidden_layers"])
    for name, bits in bf16_tensors(directory / "model.safetensors"):
        if name.endswith("q_proj.weight"):
            bits = pairs_together(bits, num_heads)
        elif name.endswith("k_proj.weight"):
            bits = pairs_together(bits, num_kv_heads)
        ours = names.get_name(name, try_suffixes=(".weight",))
        if bits.ndim == 1:
            # llama.cpp has norms in float32 only.
            writer.add_tensor(ours, (bits.astype(np.uint32) << 16).view(np.float32))
        else:
            writer.add_tensor(ours, np.ascontiguousarray(bits).view(np.uint8), raw_dtype=BF16)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    part.rename(path)


def bf16_tensors(path: Path):
    """Names and bits of the tensors of a safetensors file; numpy itself has no bfloat16."""
    content = np.memmap(path, np.uint8, "r")
    header_len = int(content[:8].view("<u8")[0])
    header = json.loads(content[8 : 8 + header_len].tobytes())
    header.pop("__metadata__", None)
    for name, tensor in header.items():
        assert tensor["dtype"] == "BF16", f"{name} is {tensor['dtype']}"
        start, end = (8 + header_len + offset for offset in tensor["data_offsets"])
        yield name, content[start:end].view(np.uint16).reshape(tensor["shape"])


def pairs_together(rows: np.ndarray, num_heads: int) -> np.ndarray:
    """Rows so that the two of a rotary pair, which lie half a head apart, become neighbours."""
    head_dim, width = rows.shape[0] // num_heads, rows.shape[1]
    halves = rows.reshape(num_heads, 2, head_dim // 2, width)
    return halves.swapaxes(1, 2).reshape(rows.shape)


if __name__ == "__main__":
    write(*map(Path, sys.argv[1:]))
