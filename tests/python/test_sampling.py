"""The distribution that tokens are drawn from, by counting the draws of fixed seeds."""

import numpy as np
import pytest
from nano_batch import SamplingParams
from random_models import random_tokens

NUM_DRAWS = 1500
PROMPT = random_tokens(12, 151, 4)


def draw(engine, **params):
    """The first token of as many requests as there are seeds."""
    requests = [
        SamplingParams(max_tokens=1, ignore_eos=True, seed=seed, **params)
        for seed in range(NUM_DRAWS)
    ]
    outputs = engine.generate([PROMPT] * NUM_DRAWS, requests, use_tqdm=False)
    return np.array([output.outputs[0].token_ids[0] for output in outputs])


def softmax(logits):
    weights = np.exp(logits.astype(np.float64) - logits.max())
    return weights / weights.sum()


@pytest.fixture
def engine(model_dir, open_engine):
    return open_engine(model_dir("v0.2"), max_num_batched_tokens=2048)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_frequencies_are_the_softmax_at_the_temperature(temperature, engine):
    expected = NUM_DRAWS * softmax(engine.logits(PROMPT)[-1] / temperature)
    counts = np.bincount(draw(engine, temperature=temperature), minlength=151)
    # Tokens too rare to be counted alone are counted together.
    order = np.argsort(-expected)
    num_common = int((expected >= 8).sum())
    bins = [*np.split(order[:num_common], num_common), order[num_common:]]
    observed = np.array([counts[tokens].sum() for tokens in bins])
    wanted = np.array([expected[tokens].sum() for tokens in bins])
    chi_square = ((observed - wanted) ** 2 / np.maximum(wanted, 1e-9)).sum()
    # Five standard deviations: with correct sampling, one set of seeds in a million fails.
    degrees = len(bins) - 1
    assert chi_square < degrees + 5 * np.sqrt(2 * degrees)


THRESHOLDS = {
    "top_k 5": ({"top_k": 5}, lambda p, order: order[:5]),
    "top_k 1": ({"top_k": 1}, lambda p, order: order[:1]),
    "top_p 0.6": ({"top_p": 0.6}, lambda p, order: order[: 1 + (p[order].cumsum() < 0.6).sum()]),
    "top_p of almost nothing": ({"top_p": 1e-50}, lambda p, order: order[:1]),
    "min_p 0.2": ({"min_p": 0.2}, lambda p, order: order[p[order] >= 0.2 * p.max()]),
    "min_p 1": ({"min_p": 1.0}, lambda p, order: order[:1]),
}


@pytest.mark.parametrize("name", THRESHOLDS)
def test_exactly_the_tokens_that_a_threshold_leaves_are_drawn(name, engine):
    limit, allowed = THRESHOLDS[name]
    probabilities = softmax(engine.logits(PROMPT)[-1] / 1.5)
    kept = allowed(probabilities, np.argsort(-probabilities))
    drawn = draw(engine, temperature=1.5, **limit)
    assert set(drawn) <= set(kept)
    likely = kept[probabilities[kept] / probabilities[kept].sum() > 0.02]
    assert set(drawn) >= set(likely)


def test_draws_of_neighbouring_positions_are_independent(engine):
    """The same seed must not repeat its noise from token to token."""
    params = SamplingParams(temperature=1e300, max_tokens=300, ignore_eos=True, seed=3)
    tokens = engine.generate(PROMPT, params, use_tqdm=False)[0].outputs[0].token_ids
    assert len(set(tokens)) > 100


def test_a_seed_repeats_and_another_seed_differs(engine):
    def sample(seed):
        params = SamplingParams(seed=seed, max_tokens=20, ignore_eos=True)
        return list(engine.generate(PROMPT, params, use_tqdm=False)[0].outputs[0].token_ids)

    assert sample(11) == sample(11)
    assert sample(11) != sample(12)
    assert sample(0) == sample(0)


def test_unseeded_requests_differ_and_repeat_with_the_engines_seed(model_dir, open_engine):
    params = SamplingParams(max_tokens=20, ignore_eos=True)

    def sample(seed):
        engine = open_engine(model_dir("v0.2"), seed=seed)
        outputs = engine.generate([PROMPT] * 3, params, use_tqdm=False)
        return [list(output.outputs[0].token_ids) for output in outputs]

    first = sample(5)
    assert first[0] != first[1] != first[2]
    assert sample(5) == first
    assert sample(6) != first
