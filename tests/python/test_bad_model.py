"""Files that are no model are refused in a sentence that names file, tensor or key; requests of
another engine that run meanwhile never notice."""

import json
import struct
import subprocess
import sys

import huggingface_hub
import pytest
from nano_batch import Engine
from nano_batch.exceptions import InvalidRequestError, ModelLoadError, NanoBatchError
from random_models import MODELS, write
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


@pytest.mark.parametrize(
    ("content", "words"),
    [
        # Fields and their values are those of tests/rust/model_config.rs.
        ("{}", ["names no architecture", "MistralForCausalLM"]),
        ('{"architectures": ["GptForAll"]}', ["GptForAll", "Mistral"]),
        ('{"architectures": ["MistralForCausalLM"]}', ["hidden_size", "missing"]),
    ],
)
@pytest.mark.usefixtures("unharmed")
def test_a_config_that_does_not_hold_is_refused(content, words, directory):
    (directory / "config.json").write_text(content, encoding="utf-8")
    assert_names(load_fails(directory), *words)


def test_a_generation_config_that_does_not_hold_is_refused(directory):
    (directory / "generation_config.json").write_text('{"top_p": "most"}', encoding="utf-8")
    assert_names(load_fails(directory), "/generation_config.json: ", "top_p", "most")


@pytest.mark.usefixtures("unharmed")
def test_a_directory_without_weights_is_refused(directory):
    (directory / "model.safetensors").unlink()
    assert_names(load_fails(directory), "safetensors", directory)


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


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {}}'])
def test_an_index_that_is_none_is_refused(content, tmp_path):
    directory = write(MODELS["sharded"], tmp_path)
    (directory / "model.safetensors.index.json").write_text(content, encoding="utf-8")
    load_fails(directory)


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
