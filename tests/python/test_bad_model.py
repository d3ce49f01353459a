"""Files that are no model are refused in a sentence that names file, tensor or key; requests of
another engine that run meanwhile never notice."""

import json
import os
import shutil
import struct
import subprocess
import sys

import huggingface_hub
import pytest
from nano_batch import Engine
from nano_batch.exceptions import InvalidRequestError, ModelLoadError, NanoBatchError
from random_models import MODELS, edit_config, in_the_form_of_transformers_4, write
from refusals import assert_names, refused
from safetensors.torch import load_file, save_file


@pytest.fixture
def directory(tmp_path):
    """A model to be damaged."""
    return write(MODELS["v0.2 in the form of transformers 5"], tmp_path / "model")


def load_fails(directory):
    return refused(ModelLoadError, lambda: Engine(str(directory), device="cpu", num_blocks=16))


@pytest.mark.usefixtures("unharmed")
def test_a_directory_that_is_not_there_is_refused(tmp_path):
    assert_names(load_fails(tmp_path / "nowhere"), "nowhere")


@pytest.mark.usefixtures("unharmed")
def test_a_directory_without_config_is_refused(directory):
    (directory / "config.json").unlink()
    assert_names(load_fails(directory), "config.json", directory)


@pytest.mark.parametrize("content", ["", "{", "[]", "null", "\xff"])
@pytest.mark.usefixtures("unharmed")
def test_a_config_that_is_none_is_refused(content, directory):
    (directory / "config.json").write_text(content, encoding="latin-1")
    assert_names(load_fails(directory), "config.json")


def test_an_empty_config_is_refused(directory):
    (directory / "config.json").write_text("{}", encoding="utf-8")
    assert_names(load_fails(directory), "names no architecture", "MistralForCausalLM")


CONFIGS = {
    "an empty list of architectures": ({"architectures": []}, ["names no architecture"]),
    "an unknown architecture": ({"architectures": ["GptForAll"]}, ["GptForAll", "Mistral"]),
    "heads that do not divide": (
        {"num_attention_heads": 3, "num_key_value_heads": 2},
        ["num_attention_heads", 3, "num_key_value_heads", 2],
    ),
    "no key heads": ({"num_key_value_heads": 0}, ["num_key_value_heads", 0]),
    "no heads": ({"num_attention_heads": 0}, ["num_attention_heads", 0]),
    "an odd head_dim": ({"head_dim": 33}, ["head_dim", 33]),
    "a width that heads do not divide": (
        {"head_dim": None, "hidden_size": 97},
        [97],
    ),
    "no layers": ({"num_hidden_layers": 0}, ["num_hidden_layers", 0]),
    "an absurd number of layers": ({"num_hidden_layers": 10**12}, ["num_hidden_layers"]),
    "a negative size": ({"intermediate_size": -5}, ["intermediate_size", "-5"]),
    "a size that is a text": ({"hidden_size": "wide"}, ["hidden_size"]),
    "a window of nothing": ({"sliding_window": 0}, ["sliding_window", 0]),
    "an epsilon of 0": ({"rms_norm_eps": 0}, ["rms_norm_eps", "above 0", "got 0"]),
    "a negative epsilon": ({"rms_norm_eps": -1e-5}, ["rms_norm_eps", "above 0", "-0.00001"]),
    "another activation": ({"hidden_act": "gelu"}, ["hidden_act", "gelu", "silu"]),
    "an unknown rope scaling": (
        {"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4, "factor": 2.0}},
        ["longrope", "yarn"],
    ),
    "a rope scaling without its factor": (
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4}},
        ["factor", "missing"],
    ),
    "a negative theta": ({"rope_parameters": {"rope_type": "default", "rope_theta": -1}}, ["-1"]),
    "an unknown dtype": ({"dtype": "float4"}, ["float4"]),
    "a quantised checkpoint": ({"quantization_config": {"quant_method": "awq"}}, ["quantiz"]),
    "an unknown layer type": (
        {
            "architectures": ["MinistralForCausalLM"],
            "model_type": "ministral",
            "layer_types": ["full_attention", "linear_attention"],
        },
        ["layer_types", "linear_attention"],
    ),
    "too few layer types": (
        {
            "architectures": ["MinistralForCausalLM"],
            "model_type": "ministral",
            "layer_types": ["full_attention"],
        },
        ["layer_types", 1, 2],
    ),
}


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.usefixtures("unharmed")
def test_a_config_that_does_not_hold_is_refused(name, directory):
    changes, words = CONFIGS[name]
    edit_config(directory, lambda config: config.update(changes))
    assert_names(load_fails(directory), *words)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('{"temperature": -3}', ["temperature", "at least 0", "-3"]),
        ('{"top_p": "most"}', ["top_p", "most"]),
        ("[]", ["JSON object"]),
    ],
)
def test_a_generation_config_that_does_not_hold_is_refused(content, words, directory):
    (directory / "generation_config.json").write_text(content, encoding="utf-8")
    assert_names(load_fails(directory), "/generation_config.json: ", *words)


def test_an_unknown_rope_scaling_in_the_form_of_transformers_4_is_refused(directory):
    edit_config(directory, in_the_form_of_transformers_4)
    edit_config(directory, lambda config: config.update(rope_scaling={"type": "su", "factor": 2.0}))
    assert_names(load_fails(directory), "su", "yarn")


@pytest.mark.parametrize("key", ["vocab_size", "hidden_size", "num_hidden_layers"])
def test_a_config_without_a_size_is_refused(key, directory):
    edit_config(directory, lambda config: config.pop(key))
    assert_names(load_fails(directory), key)


def test_a_size_that_disagrees_with_the_weights_is_refused(directory):
    edit_config(directory, lambda config: config.update(intermediate_size=174))
    assert_names(load_fails(directory), "mlp", "proj", 174, 173)


@pytest.mark.usefixtures("unharmed")
def test_a_directory_without_weights_is_refused(directory):
    (directory / "model.safetensors").unlink()
    assert_names(load_fails(directory), "safetensors", directory)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.gguf"])
def test_weights_of_another_kind_are_named(name, directory):
    (directory / "model.safetensors").rename(directory / name)
    assert_names(load_fails(directory), "safetensors", name)


@pytest.mark.parametrize("kept", [0, 5, 8, 100, 0.5, -1])
@pytest.mark.usefixtures("unharmed")
def test_a_truncated_file_is_refused(kept, directory):
    path = directory / "model.safetensors"
    size = path.stat().st_size
    os.truncate(path, int(kept * size) if isinstance(kept, float) else kept % size)
    assert_names(load_fails(directory), "model.safetensors")


@pytest.mark.parametrize(
    "header_len", [0, 1, 2**20, 2**40, 2**63, 2**64 - 1], ids=lambda n: f"{n:#x}"
)
@pytest.mark.usefixtures("unharmed")
def test_an_absurd_header_length_is_refused(header_len, directory):
    path = directory / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes(struct.pack("<Q", header_len) + content[8:])
    assert_names(load_fails(directory), "model.safetensors")


HEADERS = {
    "no json": b"{" * 64,
    "no object": b"[1, 2, 3]",
    "offsets beyond the file": {"dtype": "F32", "shape": [4], "data_offsets": [0, 2**50]},
    "offsets in reverse": {"dtype": "F32", "shape": [4], "data_offsets": [16, 0]},
    "a shape that overflows": {
        "dtype": "F32",
        "shape": [2**40, 2**40],
        "data_offsets": [0, 16],
    },
    "an unknown dtype": {"dtype": "Q4", "shape": [4], "data_offsets": [0, 16]},
    "a negative shape": {"dtype": "F32", "shape": [-4], "data_offsets": [0, 16]},
}


@pytest.mark.parametrize("name", HEADERS)
@pytest.mark.usefixtures("unharmed")
def test_an_absurd_header_is_refused(name, directory):
    header = HEADERS[name]
    if isinstance(header, dict):
        header = json.dumps({"model.norm.weight": header}).encode()
    path = directory / "model.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(16))
    assert_names(load_fails(directory), "model.safetensors")


def change_tensors(directory, change):
    path = directory / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


@pytest.mark.parametrize(
    "name",
    [
        "model.embed_tokens.weight",
        "lm_head.weight",
        "model.norm.weight",
        "model.layers.1.self_attn.k_proj.weight",
        "model.layers.0.mlp.down_proj.weight",
        "model.layers.1.post_attention_layernorm.weight",
    ],
)
@pytest.mark.usefixtures("unharmed")
def test_a_missing_tensor_is_named(name, directory):
    change_tensors(directory, lambda tensors: tensors.pop(name))
    assert_names(load_fails(directory), name)


def test_a_layer_beyond_the_configs_is_named(directory):
    edit_config(directory, lambda config: config.update(num_hidden_layers=1))
    message = load_fails(directory)
    assert_names(message, "model.layers.1.input_layernorm.weight", "num_hidden_layers is 1")


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("model.embed_tokens.weight", (151, 95)),
        ("lm_head.weight", (150, 96)),
        ("model.norm.weight", (97,)),
        ("model.layers.0.self_attn.q_proj.weight", (96, 97)),
        ("model.layers.1.self_attn.v_proj.weight", (64, 96)),
        ("model.layers.0.mlp.gate_proj.weight", (96, 173)),
        ("model.layers.0.input_layernorm.weight", (1, 96)),
    ],
)
@pytest.mark.usefixtures("unharmed")
def test_a_misshapen_tensor_is_named_with_both_shapes(name, shape, directory):
    expected = []

    def change(tensors):
        expected.append(list(tensors[name].shape))
        tensors[name] = tensors[name].new_zeros(shape)

    change_tensors(directory, change)
    message = load_fails(directory)
    assert_names(message, name, list(shape), expected[0])


def test_a_tensor_of_integers_is_named(directory):
    import torch

    name = "model.layers.0.self_attn.o_proj.weight"
    change_tensors(directory, lambda tensors: tensors.update({name: torch.zeros(96, 96).int()}))
    assert_names(load_fails(directory), name, "I32")


def test_a_shard_that_is_missing_is_named(tmp_path):
    directory = write(MODELS["sharded"], tmp_path)
    shard = sorted(directory.glob("model-*.safetensors"))[1]
    shard.unlink()
    assert_names(load_fails(directory), shard.name)


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {}}'])
def test_an_index_that_is_none_is_refused(content, tmp_path):
    directory = write(MODELS["sharded"], tmp_path)
    (directory / "model.safetensors.index.json").write_text(content, encoding="utf-8")
    load_fails(directory)


def test_an_index_that_leads_out_of_the_directory_is_refused(tmp_path):
    directory = write(MODELS["sharded"], tmp_path / "model")
    shutil.copy(next(directory.glob("*.safetensors")), tmp_path / "outside.safetensors")
    index = directory / "model.safetensors.index.json"
    content = json.loads(index.read_text(encoding="utf-8"))
    content["weight_map"]["model.norm.weight"] = "../outside.safetensors"
    index.write_text(json.dumps(content), encoding="utf-8")
    assert_names(load_fails(directory), "outside.safetensors")


@pytest.mark.parametrize("content", ["", "{", "[]", '{"version": "1.0"}'])
@pytest.mark.usefixtures("unharmed")
def test_a_tokenizer_that_is_none_is_refused(content, directory):
    (directory / "tokenizer.json").write_text(content, encoding="utf-8")
    assert_names(load_fails(directory), "tokenizer.json")


def test_a_file_instead_of_a_directory_is_refused(directory):
    assert_names(load_fails(directory / "config.json"), "config.json")


def test_a_hub_id_without_network_is_refused_by_name():
    """HF_HUB_OFFLINE is set for all tests."""
    assert_names(load_fails("nobody/no-such-model"), "nobody/no-such-model")


def test_the_hub_is_asked_for_what_is_loaded_and_for_nothing_else(monkeypatch, embedded_model):
    kept = ["config.json", "tokenizer.json", "model-00001-of-00002.safetensors"]
    rest = ["README.md", "chat_template.jinja", "consolidated.safetensors", "tokenizer.model"]

    def download(repo_id, *, revision, allow_patterns, ignore_patterns):
        patterns = {"allow_patterns": allow_patterns, "ignore_patterns": ignore_patterns}
        asked.extend(huggingface_hub.utils.filter_repo_objects(kept + rest, **patterns))
        return str(embedded_model)

    asked = []
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    Engine("nobody/model", device="cpu", num_threads=1, num_blocks=64).close()
    assert asked == kept


def test_the_package_needs_no_torch():
    script = "import sys, nano_batch; nano_batch.Engine().close(); print('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout == "False\n"


def test_every_exception_derives_from_the_one_base():
    from nano_batch import exceptions

    kinds = [kind for kind in vars(exceptions).values() if isinstance(kind, type)]
    assert len(kinds) == 6
    assert all(issubclass(kind, NanoBatchError) for kind in kinds)
    assert issubclass(InvalidRequestError, ValueError)
