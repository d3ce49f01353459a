"""The engine against transformers on the same files: logits within 1e-4 in f32, the same tokens."""

import shutil

import pytest
import random_models
import torch
from devices import needs_gpu
from nano_batch import SamplingParams
from random_models import (
    GPU_MODELS,
    MODELS,
    edit_config,
    random_tokens,
    reference,
    reference_greedy,
    reference_logits,
)

LOGITS_BOUND = 1e-4
NUM_STEPS = 64
GREEDY = SamplingParams(temperature=0, max_tokens=NUM_STEPS, ignore_eos=True)
# One token, a prompt within a block, one that ends with its block, and one past every window.
PROMPT_LENGTHS = [1, 13, 32, 75]


def distance(engine, model, tokens):
    logits = torch.from_numpy(engine.logits(tokens))
    expected = reference_logits(model, tokens)
    assert logits.shape == expected.shape
    assert logits.dtype == torch.float32
    return (logits - expected).abs().max().item()


def assert_same_tokens(engine, model, prompts):
    outputs = engine.generate(prompts, GREEDY, use_tqdm=False)
    for prompt, output in zip(prompts, outputs, strict=True):
        expected = reference_greedy(model, prompt, NUM_STEPS)
        assert list(output.outputs[0].token_ids) == expected, f"prompt of {len(prompt)} tokens"


@pytest.mark.parametrize("name", MODELS)
def test_logits_and_greedy_tokens_are_those_of_transformers(name, model_dir, open_engine):
    directory = model_dir(name)
    model, engine = reference(directory), open_engine(directory)
    vocab_size = model.config.vocab_size
    prompts = [random_tokens(n, vocab_size, seed) for seed, n in enumerate(PROMPT_LENGTHS)]
    for prompt in prompts:
        spread = reference_logits(model, prompt).std().item()
        assert spread > 0.3, "logits this flat would hide mistakes"
        assert distance(engine, model, prompt) <= LOGITS_BOUND
    assert_same_tokens(engine, model, prompts)


def test_the_sharded_model_really_has_several_files(model_dir):
    directory = model_dir("sharded")
    assert len(list(directory.glob("*.safetensors"))) > 3
    assert (directory / "model.safetensors.index.json").exists()


@pytest.mark.parametrize(
    ("changed", "plain"),
    [
        ("v0.1 in the form of transformers 5", "v0.2 in the form of transformers 5"),
        ("linear rope", "v0.2 in the form of transformers 5"),
        ("yarn rope", "yarn rope with its own knobs"),
    ],
)
def test_the_reference_sees_a_difference_between_configs(changed, plain, model_dir):
    """Else the comparison above would prove nothing."""
    tokens = random_tokens(75, 151, 3)
    pair = [reference_logits(reference(model_dir(name)), tokens) for name in (changed, plain)]
    assert (pair[0] - pair[1]).abs().max() > 100 * LOGITS_BOUND


def test_the_embedded_model_is_that_of_transformers(embedded_model, austen):
    model = reference(embedded_model)
    text = "It was the best of walks,\n\nand Anne\u2019s spirits 🙂 were not to be depressed: "
    prompts = [austen.get_tokenizer().encode(text), random_tokens(150, 4096, 1), [0]]
    for prompt in prompts:
        assert distance(austen, model, prompt) <= LOGITS_BOUND
    assert_same_tokens(austen, model, prompts)


IN_BF16 = ["v0.1", "Nemo", "tied embeddings", "Ministral", "head_dim 128", "llama3 rope"]


@pytest.mark.parametrize(
    ("name", "device"),
    [(name, "cpu") for name in IN_BF16]
    + [pytest.param(name, "cuda", marks=needs_gpu) for name in GPU_MODELS],
)
def test_bf16_is_as_near_to_f32_as_that_of_transformers(name, device, model_dir, open_engine):
    """Rounding differs with the order of sums, so the bound is transformers' own distance between
    bf16 and f32 on the same weights: at most twice that, in the mean and at the worst logit."""
    directory = model_dir(name)
    tokens = random_tokens(75, 97, 3)
    exact = reference_logits(reference(directory), tokens)
    theirs = (reference_logits(reference(directory, torch.bfloat16), tokens) - exact).abs()
    engine = open_engine(directory, device=device, dtype="bfloat16")
    ours = (torch.from_numpy(engine.logits(tokens)) - exact).abs()
    assert ours.mean() <= 2 * theirs.mean()
    assert ours.max() <= 2 * theirs.max()


def test_dtype_auto_is_the_dtype_of_the_file(model_dir, open_engine, tmp_path):
    tokens = random_tokens(20, 151, 3)
    in_f32 = open_engine(model_dir("v0.2"), dtype="auto").logits(tokens)
    assert (in_f32 == open_engine(model_dir("v0.2")).logits(tokens)).all()

    model = random_models.build(MODELS["v0.2"]).to(torch.bfloat16)
    model.config.dtype = torch.bfloat16
    model.save_pretrained(tmp_path)
    in_bf16 = open_engine(tmp_path, dtype="auto").logits(tokens)
    assert (in_bf16 == open_engine(tmp_path, dtype="bfloat16").logits(tokens)).all()
    assert (in_bf16 != in_f32).any()


def test_bf16_weights_in_f32_are_computed_in_f32(open_engine, tmp_path):
    model = random_models.build(MODELS["v0.2"]).to(torch.bfloat16)
    model.config.dtype = torch.bfloat16
    model.save_pretrained(tmp_path)
    engine = open_engine(tmp_path, dtype="float32")
    assert distance(engine, reference(tmp_path), random_tokens(40, 151, 5)) <= LOGITS_BOUND


def test_generation_stops_at_each_of_several_eos_tokens(open_engine, tmp_path):
    """generation_config.json may list several, and its list counts beside config.json's."""
    directory = random_models.write(MODELS["v0.2"], tmp_path)
    prompt = random_tokens(9, 151, 7)
    model = reference(directory)
    greedy = reference_greedy(model, prompt, 12)
    first, later = greedy[4], greedy[8]
    assert first not in greedy[:4]
    (directory / "generation_config.json").write_text(
        f'{{"eos_token_id": [{later}, {first}], "bos_token_id": 1}}', encoding="utf-8"
    )
    engine = open_engine(directory)
    params = SamplingParams(temperature=0, max_tokens=12)
    output = engine.generate(prompt, params, use_tqdm=False)[0].outputs[0]
    assert list(output.token_ids) == greedy[:5]
    assert (output.finish_reason, output.stop_reason) == ("stop", None)


def test_the_samplings_defaults_of_the_model_hold_without_parameters(open_engine, tmp_path):
    directory = random_models.write(MODELS["v0.2"], tmp_path)
    (directory / "generation_config.json").write_text(
        '{"temperature": 0.7, "top_k": 1, "eos_token_id": 150, "max_new_tokens": 21}',
        encoding="utf-8",
    )
    engine = open_engine(directory)
    said = {"temperature": 0.7, "top_k": 1, "max_tokens": 21}
    assert engine.get_default_sampling_params() == SamplingParams(**said)
    unsaid = engine.get_default_sampling_params(temperature=0, min_p=0.5)
    assert unsaid == SamplingParams(min_p=0.5, **said)
    prompt = random_tokens(9, 151, 7)
    greedy = engine.generate(prompt, SamplingParams(temperature=0, max_tokens=21), use_tqdm=False)
    default = engine.generate(prompt, use_tqdm=False)
    assert default[0].outputs[0].token_ids == greedy[0].outputs[0].token_ids


def test_what_the_model_asks_for_in_vain_is_told_once(caplog, open_engine, tmp_path):
    directory = random_models.write(MODELS["v0.2"], tmp_path)
    (directory / "generation_config.json").write_text(
        '{"repetition_penalty": 1.1, "num_beams": 1, "min_length": 9}', encoding="utf-8"
    )
    open_engine(directory)
    (message,) = [it.message for it in caplog.records if "generation_config" in it.message]
    assert "asks for min_length 9, repetition_penalty 1.1: not supported yet" in message


def test_what_a_checkpoint_loses_is_told(caplog, open_engine, tmp_path, embedded_model):
    directory = random_models.write(MODELS["v0.2"], tmp_path)
    shutil.copy(embedded_model / "tokenizer.json", directory)
    edit_config(directory, lambda config: config.update(torch_dtype="float16"))
    open_engine(directory, dtype="float32")
    (of_tokenizer,) = [it.message for it in caplog.records if it.levelname == "WARNING"]
    assert "the tokenizer has 4096 tokens, but the model's vocab_size is 151" in of_tokenizer
    caplog.clear()
    open_engine(directory, dtype="auto")
    told = [it.message for it in caplog.records if it.levelname == "WARNING"]
    assert any("float16 is rounded to bfloat16" in message for message in told)


def test_logits_are_the_readers_own_memory(open_engine, tmp_path):
    engine = open_engine(random_models.write(MODELS["v0.2"], tmp_path))
    first, second = (engine.logits(random_tokens(10, 151, 0)) for _ in range(2))
    engine.close()
    first -= first.max(axis=-1, keepdims=True)
    assert first.max() == 0
    assert second.max() > 0


def test_dummy_weights_need_no_weight_files(open_engine, tmp_path):
    directory = random_models.write(MODELS["v0.2"], tmp_path)
    (directory / "model.safetensors").unlink()
    engine = open_engine(directory, load_format="dummy")
    logits = engine.logits(random_tokens(10, 151, 0))
    assert logits.shape == (10, 151)
    assert logits.std() > 0
