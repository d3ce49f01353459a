"""What a request says depends on its prompt, its parameters and its seed, and on nothing else."""

import pytest
from devices import DEVICES, EXACT
from nano_batch import Engine, SamplingParams
from random_models import random_tokens

NUM_TOKENS = 32
LENGTHS = [1, 2, 3, 5, 8, 15, 16, 17, 21, 27, 31, 32, 33, 40, 47, 48]
PROMPTS = [random_tokens(length, 151, seed) for seed, length in enumerate(LENGTHS)]


def parameters(kind):
    if kind == "greedy":
        return [SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True)] * 16
    return [
        SamplingParams(
            temperature=0.8,
            top_p=0.9,
            top_k=50,
            seed=1000 + index,
            max_tokens=NUM_TOKENS,
            ignore_eos=True,
        )
        for index in range(16)
    ]


def tokens_of(outputs):
    return [list(output.outputs[0].token_ids) for output in outputs]


@pytest.fixture(scope="module", params=DEVICES)
def device(request):
    return request.param


@pytest.fixture(scope="module", params=["v0.1", "v0.2", "Ministral"])
def name(request, device):
    return request.param if device == "cpu" else f"{request.param} on a GPU"


@pytest.fixture
def open_exact(device, open_engine):
    """Opens engines whose numbers do not depend on the batch."""
    return lambda model, **options: open_engine(model, **{**EXACT[device], **options})


@pytest.fixture(scope="module", params=["greedy", "sampled"])
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def alone(device, name, kind, model_dir):
    """Each request's tokens when it has the engine to itself."""
    with Engine(str(model_dir(name)), num_blocks=64, **EXACT[device]) as engine:
        return [
            tokens_of(engine.generate(prompt, params, use_tqdm=False))[0]
            for prompt, params in zip(PROMPTS, parameters(kind), strict=True)
        ]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"max_num_batched_tokens": 16},
        {"max_num_batched_tokens": 8},
        {"max_num_batched_tokens": 1},
        {"max_num_seqs": 3},
    ],
    ids=str,
)
def test_a_batch_of_16_says_what_each_says_alone(options, name, kind, alone, model_dir, open_exact):
    engine = open_exact(model_dir(name), **options)
    together = tokens_of(engine.generate(PROMPTS, parameters(kind), use_tqdm=False))
    assert together == alone
    assert engine.stats().num_preemptions == 0


@pytest.mark.parametrize("max_num_batched_tokens", [8, 16, 8192])
def test_preemption_changes_nothing(
    max_num_batched_tokens, name, kind, alone, model_dir, open_exact
):
    engine = open_exact(
        model_dir(name), num_blocks=9, max_num_batched_tokens=max_num_batched_tokens
    )
    together = tokens_of(engine.generate(PROMPTS, parameters(kind), use_tqdm=False))
    stats = engine.stats()
    assert stats.num_preemptions > 0
    assert together == alone
    assert (stats.num_running, stats.num_waiting) == (0, 0)
    assert stats.num_free_blocks == stats.num_blocks == 9


# On a GPU a block has 16 tokens.
@pytest.mark.parametrize("device", ["cpu"], indirect=True, scope="module")
@pytest.mark.parametrize("block_size", [8, 32])
def test_the_block_size_changes_nothing(block_size, name, kind, alone, model_dir, open_exact):
    engine = open_exact(model_dir(name), block_size=block_size)
    assert tokens_of(engine.generate(PROMPTS, parameters(kind), use_tqdm=False)) == alone


@pytest.mark.parametrize("device", ["cpu"], indirect=True, scope="module")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_number_of_threads_changes_no_bit(dtype, name, model_dir, open_exact):
    tokens = random_tokens(100, 151, 99)
    one = open_exact(model_dir(name), dtype=dtype).logits(tokens)
    three = open_exact(model_dir(name), dtype=dtype, num_threads=3, max_num_batched_tokens=33)
    assert (three.logits(tokens) == one).all()


def test_a_late_request_finds_the_same_tokens(name, kind, alone, model_dir, open_exact):
    """Requests that join while others decode, in another order than before."""
    engine = open_exact(model_dir(name), max_num_batched_tokens=16)
    params = parameters(kind)
    order = [5, 15, 0, 9, 2, 12, 7]
    streams = []
    for index in order:
        stream = engine.stream(PROMPTS[index], params[index])
        streams.append((stream, list(next(stream).outputs[0].token_ids)))
    for index, (stream, tokens) in zip(order, streams, strict=True):
        for output in stream:
            tokens += output.outputs[0].token_ids
        assert tokens == alone[index]


def test_a_long_prompt_joins_running_streams_at_any_pace(name, kind, model_dir, open_exact):
    """No step is as quick as the first pace asks, every one as the second."""
    prompts = [*PROMPTS[:4], random_tokens(300, 151, 99)]
    params = parameters(kind)

    def tokens(**options):
        engine = open_exact(model_dir(name), **options)
        streams = []
        for prompt, its_params in zip(prompts, params, strict=False):
            stream = engine.stream(prompt, its_params)
            streams.append((stream, list(next(stream).outputs[0].token_ids)))
        return [start + list(stream.collect().outputs[0].token_ids) for stream, start in streams]

    expected = tokens()
    assert [len(answer) for answer in expected] == [NUM_TOKENS] * 5
    assert tokens(max_itl_ms=0.001) == expected
    assert tokens(max_itl_ms=1e6) == expected


def test_logits_do_not_depend_on_the_chunks(name, model_dir, open_exact):
    tokens = random_tokens(100, 151, 99)
    whole = open_exact(model_dir(name)).logits(tokens)
    for budget in (1, 8, 16, 33):
        chunked = open_exact(model_dir(name), max_num_batched_tokens=budget).logits(tokens)
        assert (chunked == whole).all(), f"chunks of {budget}"


def test_logits_do_not_depend_on_who_shares_the_batch(name, model_dir, open_exact):
    tokens = random_tokens(100, 151, 99)
    engine = open_exact(model_dir(name), max_num_batched_tokens=16)
    whole = engine.logits(tokens)
    streams = [engine.stream(p, q) for p, q in zip(PROMPTS, parameters("sampled"), strict=True)]
    crowded = engine.logits(tokens)
    assert (crowded == whole).all()
    assert all(len([*stream]) > 0 for stream in streams)


def test_a_repeated_run_gives_the_same_bits(name, model_dir, open_exact):
    tokens = random_tokens(60, 151, 99)
    engine = open_exact(model_dir(name))
    assert (engine.logits(tokens) == engine.logits(tokens)).all()
