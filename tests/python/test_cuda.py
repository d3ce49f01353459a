"""The engine on a GPU beside the CPU's and transformers' numbers, and when things go wrong."""

import gc
import logging
import subprocess
import sys

import numpy as np
import pytest
import torch
from devices import needs_gpu
from nano_batch import Engine, ModelLoadError, NanoBatchError, SamplingParams
from random_models import GPU_MODELS, edit_config, random_tokens, reference, reference_logits, write
from safetensors.torch import load_file, save_file

# The GPU computes in bf16. Where the CPU's two best logits in f32 are further apart than this, both
# choose the same token: docs/kernels.md.
TIE_BOUND = 0.25
# Of the root-mean-square error of transformers in bf16.
ERROR_BOUND = 1.25
GREEDY = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True)


@pytest.fixture
def open_gpu(open_engine):
    def open_one(model=None, **options):
        return open_engine(model, **{"device": "cuda", "dtype": "auto", **options})

    return open_one


def free_mib():
    gc.collect()
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info()[0] / 2**20


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_cuda_is_refused_and_auto_is_the_cpu(embedded_model, open_engine, caplog):
    with pytest.raises(ModelLoadError, match="no CUDA device") as error:
        Engine(embedded_model, device="cuda")
    assert error.value.code == "no_cuda_device"
    caplog.set_level(logging.INFO)
    assert open_engine(device="auto").device == "cpu"
    (told,) = [it for it in caplog.records if "runs on the CPU" in it.message]
    assert told.levelname == "INFO"


# In a process that has opened no GPU before.
PASSED_OVER = """
import ctypes, sys
from nano_batch import Engine
cuda, flags, is_active = ctypes.CDLL("libcuda.so.1"), ctypes.c_uint(), ctypes.c_int()
Engine(sys.argv[1], device="auto", dtype="float32", num_threads=1, num_blocks=64)
assert cuda.cuInit(0) == 0
assert cuda.cuDevicePrimaryCtxGetState(0, ctypes.byref(flags), ctypes.byref(is_active)) == 0
print(is_active.value)
"""


@needs_gpu
def test_a_gpu_that_cannot_do_what_is_asked_is_not_opened(embedded_model):
    command = [sys.executable, "-c", PASSED_OVER, str(embedded_model)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.stdout == "0\n", done.stderr


@needs_gpu
def test_auto_is_the_gpu_unless_it_cannot_do_what_is_asked(open_engine, caplog):
    assert open_engine(device="auto", dtype="auto").device == torch.cuda.get_device_name()
    assert not any("runs on the CPU" in it.message for it in caplog.records)
    for options, words in (({"dtype": "float32"}, "dtype"), ({"block_size": 8}, "block_size")):
        caplog.clear()
        assert open_engine(**{"device": "auto", "dtype": "auto", **options}).device == "cpu"
        (told,) = [it for it in caplog.records if "runs on the CPU" in it.message]
        assert (told.levelname, words in told.message) == ("WARNING", True)


@needs_gpu
def test_the_embedded_model_chooses_the_cpus_tokens_but_for_ties(austen, open_gpu, capsys):
    prompt = austen.get_tokenizer().encode("It was a dark and stormy night, and Emma")
    params = SamplingParams(temperature=0, max_tokens=300, ignore_eos=True)
    tokens = list(austen.generate(prompt, params, use_tqdm=False)[0].outputs[0].token_ids)
    sequence = prompt + tokens[:-1]
    exact = austen.logits(sequence)
    best, second = np.sort(exact, axis=1)[:, :-3:-1].T
    worst = 0.0
    # At once, and fed one by one.
    for budget in (2048, 1):
        ours = open_gpu(max_num_batched_tokens=budget).logits(sequence)
        difference = np.abs(ours - exact)
        with capsys.disabled():
            print(f"\nlogits differ by {difference.max():.3f}, {difference.mean():.4f} on average")
        differs = ours.argmax(axis=1) != exact.argmax(axis=1)
        worst = max(worst, (best - second)[differs].max(initial=0))
    # Every prefix as a request of its own, in batches of all sizes: what a graph chooses.
    prefixes = [sequence[:end] for end in range(len(prompt), len(sequence) + 1)]
    outputs = open_gpu(num_blocks=4096).generate(prefixes, GREEDY, use_tqdm=False)
    chosen = np.array([output.outputs[0].token_ids[0] for output in outputs])
    gaps = (best - second)[len(prompt) - 1 :]
    worst = max(worst, gaps[chosen != np.array(tokens)].max(initial=0))
    with capsys.disabled():
        print(f"the clearest choice that differs has {worst:.3f} between the two best logits")
    assert worst < TIE_BOUND


@needs_gpu
def test_bans_of_one_row_are_no_other_rows(open_gpu):
    engine = open_gpu(deterministic=True)
    prompts = ["Emma was", "THE END", "It is a truth", "THE END"]
    # Without a ban the second and fourth may end at once; with it they may not for 60 tokens.
    params = [
        SamplingParams(temperature=0.8, seed=seed, max_tokens=60, min_tokens=60 * (seed % 2))
        for seed in range(len(prompts))
    ]
    together = engine.generate(prompts, params, use_tqdm=False)
    alone = [
        engine.generate(*each, use_tqdm=False)[0] for each in zip(prompts, params, strict=True)
    ]
    for one, of_many, asked in zip(alone, together, params, strict=True):
        assert one.outputs[0].token_ids == of_many.outputs[0].token_ids
        assert len(one.outputs[0].token_ids) >= asked.min_tokens


@needs_gpu
def test_a_batch_leaves_the_path_of_a_lone_request_only_at_ties(open_gpu):
    """Without `deterministic`: sums of other batch shapes round otherwise."""
    engine = open_gpu(num_blocks=4096)
    tokenizer = engine.get_tokenizer()
    prompts = [tokenizer.encode(text) for text in ["Anne", "Mr. Darcy said", "The ball"]] * 8
    params = SamplingParams(temperature=0, max_tokens=100, ignore_eos=True)
    together = engine.generate(prompts, params, use_tqdm=False)
    for prompt, output in zip(prompts[:3], together, strict=False):
        alone = list(engine.generate(prompt, params, use_tqdm=False)[0].outputs[0].token_ids)
        crowded = list(output.outputs[0].token_ids)
        if alone != crowded:
            pairs = zip(alone, crowded, strict=True)
            split = next(index for index, (a, b) in enumerate(pairs) if a != b)
            logits = engine.logits(prompt + alone[:split])[-1]
            assert abs(logits[alone[split]] - logits[crowded[split]]) < TIE_BOUND


@needs_gpu
def test_five_engines_in_a_row_give_all_memory_back(embedded_model, capsys):
    def serve():
        with Engine(embedded_model, device="cuda") as engine:
            engine.generate("Anne", SamplingParams(max_tokens=20), use_tqdm=False)

    torch.zeros(1, device="cuda")
    serve()
    before = free_mib()
    for number in range(5):
        serve()
        lost = before - free_mib()
        with capsys.disabled():
            print(f"\nengine {number}: {lost:.1f} MiB not given back")
        assert lost <= 64


# A kernel that traps makes every later call of its context fail, for good: in a process of its own.
TRAP = """
import ctypes
import sys

from nano_batch import Engine, NanoBatchError, SamplingParams

cuda = ctypes.CDLL("libcuda.so.1")
module, function, context, device = (ctypes.c_void_p() for _ in range(4))
source = b".version 7.0\\n.target sm_80\\n.address_size 64\\n.visible .entry broken() { trap; }"


def check(status):
    assert status == 0, status


engine = Engine(sys.argv[1], device="cuda")
check(cuda.cuDevicePrimaryCtxRetain(ctypes.byref(context), device))
check(cuda.cuCtxSetCurrent(context))
check(cuda.cuModuleLoadData(ctypes.byref(module), source))
check(cuda.cuModuleGetFunction(ctypes.byref(function), module, b"broken"))
params = SamplingParams(temperature=0, max_tokens=400, ignore_eos=True)
streams = [engine.stream(prompt, params) for prompt in ("Anne", "Emma", "The")]
tokens = [len(next(stream).outputs[0].token_ids) for stream in streams]
check(cuda.cuLaunchKernel(function, 1, 1, 1, 1, 1, 1, 0, None, None, None))
for stream in streams:
    try:
        for _ in stream:
            pass
    except NanoBatchError as error:
        print(error.code, error)
try:
    engine.generate("Anne", params, use_tqdm=False)
except NanoBatchError as error:
    print("afterwards", error.code)
engine.close()
print("closed")
"""


@needs_gpu
def test_a_cuda_error_in_a_step_ends_every_request_and_the_engine(embedded_model, capsys):
    command = [sys.executable, "-c", TRAP, str(embedded_model)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    lines = done.stdout.splitlines()
    with capsys.disabled():
        print(f"\n{lines[:1]}")
    assert done.returncode == 0, done.stderr
    assert all("engine_failed" in line and "CUDA error" in line for line in lines[:3]), lines
    assert lines[3:] == ["afterwards engine_failed", "closed"]


@needs_gpu
def test_two_engines_share_a_gpu_and_a_full_one_says_what_helps(tmp_path, open_gpu):
    engine = open_gpu(gpu_memory_utilization=0.5)
    assert open_gpu().generate("Anne", GREEDY, use_tqdm=False)
    too_large = {
        "hidden_size": 16384,
        "intermediate_size": 65536,
        "num_attention_heads": 128,
        "num_key_value_heads": 128,
        "head_dim": 128,
        "num_hidden_layers": 100,
    }
    directory = write(GPU_MODELS["v0.2 on a GPU"], tmp_path)
    edit_config(directory, lambda config: config.update(too_large))
    with pytest.raises(
        ModelLoadError, match=r"GiB .* the weights, but .* are free: .*device="
    ) as error:
        open_gpu(directory, load_format="dummy")
    assert error.value.code == "gpu_out_of_memory"
    assert engine.generate("Anne", GREEDY, use_tqdm=False)


@needs_gpu
def test_logits_that_are_no_numbers_end_their_own_request_and_no_other(tmp_path, open_gpu):
    directory = write(GPU_MODELS["v0.2 on a GPU"], tmp_path)
    tensors = load_file(directory / "model.safetensors")
    tensors["model.embed_tokens.weight"][9] = float("nan")
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    engine = open_gpu(directory, deterministic=True)
    params = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)

    def tokens(stream):
        return [token for output in stream for token in output.outputs[0].token_ids]

    def together():
        prompts = ([5, 6, 7], [5, 9, 7], [8, 6, 5])
        first, bad, last = [engine.stream(prompt, params) for prompt in prompts]
        with pytest.raises(NanoBatchError, match="no finite number") as error:
            list(bad)
        assert error.value.code == "logits_not_finite"
        return tokens(first), tokens(last)

    # The second time in blocks that held what is no number.
    assert together() == together()


@needs_gpu
def test_a_broken_or_unwritable_cache_of_kernels_is_done_without(tmp_path, monkeypatch, open_gpu):
    cache = tmp_path / "cache"
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    answers = [open_gpu().generate("Anne", GREEDY, use_tqdm=False)[0].outputs[0].token_ids]
    files = [*(cache / "nano_batch").iterdir()]
    assert len(files) > 10
    for file in files:
        file.write_bytes(b"broken")
    answers.append(open_gpu().generate("Anne", GREEDY, use_tqdm=False)[0].outputs[0].token_ids)
    assert all(file.read_bytes() != b"broken" for file in files)
    # A file where the folder should be cannot be written, even by root.
    nowhere = tmp_path / "file"
    nowhere.write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(nowhere))
    answers.append(open_gpu().generate("Anne", GREEDY, use_tqdm=False)[0].outputs[0].token_ids)
    assert answers[0] == answers[1] == answers[2]


@pytest.fixture(scope="module")
def wide_model(tmp_path_factory):
    """Mistral 7B's shapes with 4 layers, random, in bf16."""
    from transformers import MistralConfig, MistralForCausalLM

    config = MistralConfig(
        vocab_size=32000,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=4,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=8192,
        rope_theta=1e6,
        sliding_window=None,
    )
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = MistralForCausalLM(config).to(torch.bfloat16)
    directory = tmp_path_factory.mktemp("wide")
    model.cpu().save_pretrained(directory)
    return directory


@needs_gpu
@pytest.mark.parametrize("length", [1, 17, 512, 3000])
def test_logits_are_as_near_to_f32_as_transformers_in_bf16(length, wide_model, open_gpu, capsys):
    tokens = random_tokens(length, 32000, length)
    logits = {}
    for dtype in (torch.float32, torch.bfloat16):
        model = reference(wide_model, dtype).cuda()
        with torch.device("cuda"):
            logits[dtype] = reference_logits(model, tokens).cpu()
        del model
    free_mib()
    exact = logits[torch.float32]

    def error(found):
        return (found - exact).square().mean().sqrt().item()

    theirs = error(logits[torch.bfloat16])
    for options in [{}, {"max_num_batched_tokens": 256}, {"deterministic": True}]:
        engine = open_gpu(wide_model, num_blocks=512, **options)
        ours = error(torch.from_numpy(engine.logits(tokens)))
        engine.close()
        with capsys.disabled():
            print(f"\n{length} tokens {options}: error {ours:.5f}, {ours / theirs:.2f} of theirs")
        assert ours <= ERROR_BOUND * theirs
