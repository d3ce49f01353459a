"""A request or option that does not hold is refused at once, in a sentence with limit and value, by
the right class; requests that run meanwhile never notice."""

import subprocess
import sys

import numpy as np
import pytest
from nano_batch import Engine, SamplingParams
from nano_batch.exceptions import InvalidRequestError, ModelLoadError, NanoBatchError
from random_models import MODELS, write
from recital_model import MAX_MODEL_LEN, TEXT
from refusals import assert_names, refused

SHORT = SamplingParams(temperature=0, max_tokens=60)

REQUESTS = {
    "an empty list of tokens": ({"prompt_token_ids": []}, ["empty", "at least one"]),
    "a token id at the end of the vocabulary": ([5, 258], ["258", "position 1", "vocabulary"]),
    "a token id far outside": ([2**31, 5], [2**31, "position 0", 258]),
    "a token id beyond 32 bits": ([5, 5, 2**40], [2**40, "position 2", "vocabulary"]),
    "a token id beyond 64 bits": ([2**70], [2**70, "position 0", "vocabulary"]),
    "a negative token id": ([5, -1], ["-1", "position 1", "vocabulary"]),
    "a prompt longer than max_model_len": (
        [5] * (MAX_MODEL_LEN + 1),
        [MAX_MODEL_LEN + 1, "max_model_len", MAX_MODEL_LEN],
    ),
    "a prompt as long as max_model_len": (
        [5] * MAX_MODEL_LEN,
        [f"{MAX_MODEL_LEN} tokens", "max_model_len", "one more"],
    ),
    "a text longer than max_model_len": ("a" * 70000, [70001, "max_model_len", MAX_MODEL_LEN]),
    "a text that need not be encoded": (
        "a" * 400_000,
        ["400000 bytes", "at least 100000 tokens", "max_model_len", MAX_MODEL_LEN],
    ),
    "fractions": ([1.5, 2.0], ["position 0", "1.5"]),
    "booleans": ([True, False], ["position 0", "True"]),
    "an array of fractions": (np.array([0.5]), ["position 0", "0.5"]),
    "an array of two dimensions": (np.array([[1, 2], [3, 4]]), ["position 0"]),
    "a number": (7, ["int"]),
    "bytes": (b"abc", ["bytes"]),
    "a lone surrogate": ("a\ud800b", ["prompt", "surrogate", "position 1"]),
    "a lone surrogate at the end": ({"prompt": "日語\udcff"}, ["prompt", "position 2"]),
    "nothing": (None, ["NoneType"]),
    "a dictionary without a prompt": ({"text": "a"}, ["prompt", "text"]),
    "a dictionary with two prompts": (
        {"prompt": "a", "prompt_token_ids": [1]},
        ["prompt", "prompt_token_ids"],
    ),
    "a dictionary with keys of two types": ({1: 2, "a": 3}, ["1", "a"]),
    "a dictionary whose text is none": ({"prompt": 3}, ["prompt", "text, got int"]),
    "a dictionary whose text is tokens": ({"prompt": [3]}, ["prompt", "text, got list"]),
    "a dictionary whose tokens are none": ({"prompt_token_ids": "a"}, ["token ids, got str"]),
}


@pytest.mark.parametrize("name", REQUESTS)
@pytest.mark.usefixtures("unharmed")
def test_a_prompt_that_does_not_hold_is_refused(name, reciting):
    prompt, words = REQUESTS[name]
    message = refused(InvalidRequestError, lambda: reciting.stream(prompt, SHORT))
    assert_names(message, *words)


def test_the_tokenizer_refuses_a_lone_surrogate(reciting):
    encode = reciting.get_tokenizer().encode
    assert_names(refused(InvalidRequestError, lambda: encode("\ud800")), "text", "position 0")


def test_the_tokenizer_refuses_what_is_no_token(reciting):
    decode = reciting.get_tokenizer().decode
    assert_names(refused(InvalidRequestError, lambda: decode([5, -1])), -1, "position 1")
    for token in (258, 10**9, 2**32, 2**40):
        message = refused(InvalidRequestError, lambda token=token: decode([token]))
        assert_names(message, f"token {token}", "position 0", "vocabulary of 258")


@pytest.mark.usefixtures("unharmed")
def test_a_stop_token_outside_the_vocabulary_is_refused(reciting):
    params = SamplingParams(stop_token_ids=[5, 99999])
    message = refused(InvalidRequestError, lambda: reciting.stream("?", params))
    assert_names(message, "stop_token_ids", 99999, "position 1", "vocabulary of 258")


@pytest.mark.usefixtures("unharmed")
def test_one_bad_prompt_refuses_the_whole_list(reciting, wait_until):
    with pytest.raises(InvalidRequestError, match="token 999 at position 0") as error:
        reciting.generate(["?", "?", [999], "?"], SHORT, use_tqdm=False)
    assert error.value.__notes__ == ["prompts[2]"]
    wait_until(lambda: reciting.stats().num_running <= 1, "what was submitted is aborted")


@pytest.mark.parametrize("prompts", [None, 7, {"a", "b"}, b"abc", [1.5], np.array(5)], ids=repr)
@pytest.mark.usefixtures("unharmed")
def test_what_is_no_list_of_prompts_is_refused(prompts, reciting):
    refused(InvalidRequestError, lambda: reciting.generate(prompts, SHORT, use_tqdm=False))


def test_any_ordered_iterable_of_prompts_is_taken(reciting):
    outputs = reciting.generate((text for text in ("?", "!")), SHORT, use_tqdm=False)
    assert [output.prompt for output in outputs] == ["?", "!"]


@pytest.mark.usefixtures("unharmed")
def test_as_many_parameters_as_prompts_are_needed(reciting):
    message = refused(
        InvalidRequestError,
        lambda: reciting.generate(["a", "b", "c"], [SHORT, SHORT], use_tqdm=False),
    )
    assert_names(message, 3, 2, "sampling_params")


@pytest.mark.usefixtures("unharmed")
def test_parameters_of_another_type_are_refused(reciting):
    with pytest.raises((TypeError, InvalidRequestError)):
        reciting.generate("?", {"temperature": 0}, use_tqdm=False)
    with pytest.raises((TypeError, InvalidRequestError)):
        reciting.stream("?", "greedy")


@pytest.mark.usefixtures("unharmed")
def test_logits_of_a_bad_prompt_are_refused(reciting):
    assert_names(refused(InvalidRequestError, lambda: reciting.logits([])), "empty")
    assert_names(refused(InvalidRequestError, lambda: reciting.logits([258])), 258)
    long = [5] * (MAX_MODEL_LEN + 1)
    message = refused(InvalidRequestError, lambda: reciting.logits(long))
    assert_names(message, MAX_MODEL_LEN + 1, "max_model_len", MAX_MODEL_LEN)
    with pytest.raises(InvalidRequestError):
        reciting.logits("text")


@pytest.mark.parametrize("request_id", ["123456789", "no number", "-1", str(2**64), ""])
@pytest.mark.usefixtures("unharmed")
def test_abort_of_an_id_that_no_request_has_had_is_refused(request_id, reciting):
    message = refused(InvalidRequestError, lambda: reciting.abort(request_id))
    assert_names(message, f'"{request_id}"')


@pytest.mark.usefixtures("unharmed")
def test_a_request_that_can_never_fit_the_cache_is_refused(reciting_dir, open_engine):
    engine = open_engine(reciting_dir, num_blocks=4, max_model_len=64)
    fits = SamplingParams(temperature=0, max_tokens=60)
    assert engine.generate("?", fits, use_tqdm=False)[0].outputs[0].text == TEXT
    engine = open_engine(reciting_dir, num_blocks=4, max_model_len=None)
    # Without a limit of its own, max_model_len is lowered to what the cache holds.
    message = refused(InvalidRequestError, lambda: engine.stream([5] * 65, SHORT))
    assert_names(message, 65, "max_model_len", 64)


def test_a_limit_that_the_cache_cannot_hold_is_refused_with_both_numbers(reciting_dir):
    """Either the engine says so at once, or the request does."""

    def use():
        with Engine(str(reciting_dir), device="cpu", num_blocks=4, max_model_len=1000) as engine:
            engine.stream([5] * 900, SHORT)

    with pytest.raises(NanoBatchError) as error:
        use()
    assert_names(str(error.value), "num_blocks", 4)


@pytest.fixture
def without_tokenizer(model_dir, open_engine):
    return open_engine(model_dir("v0.2"))


@pytest.mark.usefixtures("unharmed")
def test_text_to_a_model_without_a_tokenizer_is_refused(without_tokenizer, model_dir):
    message = refused(InvalidRequestError, lambda: without_tokenizer.stream("text", SHORT))
    assert_names(message, "tokenizer.json", "token ids", model_dir("v0.2"))
    refused(InvalidRequestError, lambda: without_tokenizer.get_tokenizer())
    tokens = without_tokenizer.generate([5, 6], SHORT, use_tqdm=False)[0].outputs[0]
    assert tokens.text == ""
    assert len(tokens.token_ids) > 0


def test_stop_strings_without_a_tokenizer_are_refused(without_tokenizer):
    params = SamplingParams(stop=["a", "b"])
    message = refused(InvalidRequestError, lambda: without_tokenizer.stream([5], params))
    assert_names(message, "stop", 2, "tokenizer")


def test_a_sentencepiece_file_alone_is_named_with_a_hint(tmp_path, open_engine):
    directory = write(MODELS["v0.2"], tmp_path)
    (directory / "tokenizer.model").write_bytes(b"\n\x0e")
    engine = open_engine(directory)
    with pytest.raises(NanoBatchError) as error:
        engine.stream("text", SHORT)
    assert_names(str(error.value), "tokenizer.model", "tokenizer.json")


OPTIONS = {
    "device of no kind": ({"device": "tpu"}, ["device", "tpu"]),
    "device without a number": ({"device": "cuda:x"}, ["device", "cuda:x", "cuda:N"]),
    "dtype of no kind": ({"dtype": "int3"}, ["dtype", "int3", "bfloat16"]),
    "float16": ({"dtype": "float16"}, ["dtype", "float16", "bfloat16"]),
    "load_format": ({"load_format": "gguf"}, ["load_format", "gguf"]),
    "prefix caching": ({"enable_prefix_caching": True}, ["enable_prefix_caching", "supported yet"]),
    "quantization": ({"quantization": "int8"}, ["quantization", "int8", "not supported yet"]),
    "tensor parallelism": ({"tensor_parallel_size": 2}, ["tensor_parallel_size", "supported yet"]),
    "max_itl_ms 0": ({"max_itl_ms": 0}, ["max_itl_ms", 0.001, 0]),
    "max_itl_ms negative": ({"max_itl_ms": -2.5}, ["max_itl_ms", "-2.5"]),
    "max_itl_ms without end": ({"max_itl_ms": float("inf")}, ["max_itl_ms", 1000000, "inf"]),
    "max_itl_ms no number": ({"max_itl_ms": float("nan")}, ["max_itl_ms", "nan"]),
    "more than a GPU": ({"gpu_memory_utilization": 1.1}, ["gpu_memory_utilization", 1, 1.1]),
    "max_num_seqs 0": ({"max_num_seqs": 0}, ["max_num_seqs", 1, 0]),
    "max_num_seqs negative": ({"max_num_seqs": -4}, ["max_num_seqs", "-4"]),
    "max_num_batched_tokens 0": ({"max_num_batched_tokens": 0}, ["max_num_batched_tokens", 0]),
    "block_size 0": ({"block_size": 0}, ["block_size", 0]),
    "block_size huge": ({"block_size": 2**40}, ["block_size", 2**40]),
    "num_blocks 0": ({"num_blocks": 0}, ["num_blocks", 0]),
    "num_blocks beyond memory": ({"num_blocks": 2**31}, ["num_blocks"]),
    "num_threads 0": ({"num_threads": 0}, ["num_threads", 0]),
    "kv_cache_gib 0": ({"num_blocks": None, "kv_cache_gib": 0}, ["kv_cache_gib", 0]),
    "kv_cache_gib negative": ({"num_blocks": None, "kv_cache_gib": -1.5}, ["kv_cache_gib", -1.5]),
    "kv_cache_gib too small": ({"num_blocks": None, "kv_cache_gib": 1e-9}, ["kv_cache_gib"]),
    "max_model_len 0": ({"max_model_len": 0}, ["max_model_len", 0]),
    "max_model_len beyond the config": (
        {"max_model_len": MAX_MODEL_LEN + 1},
        ["max_model_len", MAX_MODEL_LEN + 1, MAX_MODEL_LEN],
    ),
}


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.usefixtures("unharmed")
def test_an_option_that_does_not_hold_is_refused(name, reciting_dir, open_engine):
    options, words = OPTIONS[name]
    with pytest.raises(NanoBatchError) as error:
        open_engine(reciting_dir, **options)
    assert type(error.value) in (InvalidRequestError, ModelLoadError)
    assert "\n" not in str(error.value)
    assert_names(str(error.value), *words)


@pytest.mark.parametrize(
    "options",
    [
        {"max_num_seqs": "3"},
        {"num_blocks": 1.5},
        {"seed": "x"},
        {"max_itl_ms": "12"},
        {"max_sequences": 3},
    ],
    ids=str,
)
def test_an_option_of_another_type_or_name_is_refused(options, reciting_dir, open_engine):
    (name,) = options
    with pytest.raises((TypeError, InvalidRequestError), match=name):
        open_engine(reciting_dir, **options)


@pytest.mark.parametrize(
    ("num_mib", "words"),
    [
        (0, ["thread_failed", "could not start a thread"]),
        (400, ["out_of_memory", "no memory for the KV cache", "blocks take", "set num_blocks or"]),
    ],
)
def test_what_the_system_does_not_give_is_named(num_mib, words):
    script = """
import resource, sys, nano_batch
pages = int(open("/proc/self/statm").read().split()[0])
limit = pages * resource.getpagesize() + (int(sys.argv[1]) << 20)
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
try:
    nano_batch.Engine(device="cpu", num_threads=1)
except nano_batch.NanoBatchError as error:
    print(error.code, error)
"""
    command = [sys.executable, "-c", script, str(num_mib)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert_names(done.stdout, *words)
