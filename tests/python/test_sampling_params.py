"""SamplingParams: what it accepts it keeps, and what it refuses it names."""

import copy
import math
import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from nano_batch import SamplingParams
from nano_batch.exceptions import InvalidRequestError, NanoBatchError

VALID = {
    "temperature": st.floats(0, allow_infinity=False),
    "top_p": st.floats(0, 1, exclude_min=True),
    "top_k": st.integers(-1, 2**31 - 1),
    "min_p": st.floats(0, 1),
    "seed": st.none() | st.integers(-(2**63), 2**63 - 1),
    "stop": st.lists(st.text(st.characters(exclude_categories=["Cs"]), min_size=1), max_size=4),
    "stop_token_ids": st.lists(st.integers(0, 2**32 - 1), max_size=4),
    "ignore_eos": st.booleans(),
    "max_tokens": st.integers(16, 2**31 - 1),
    "min_tokens": st.integers(0, 16),
    "skip_special_tokens": st.booleans(),
    "include_stop_str_in_output": st.booleans(),
}

BELOW_0 = st.floats(max_value=0, exclude_max=True)
BAD_FLOATS = st.sampled_from([math.nan, math.inf, -math.inf]) | BELOW_0
INVALID = {
    "temperature": BAD_FLOATS | st.just(10**400),
    "top_p": BAD_FLOATS | st.just(0.0) | st.floats(min_value=1, exclude_min=True),
    "top_k": st.integers(max_value=-2) | st.integers(min_value=2**32),
    "min_p": BAD_FLOATS | st.floats(min_value=1, exclude_min=True),
    "max_tokens": st.integers(max_value=0) | st.integers(min_value=2**32),
    "min_tokens": st.integers(max_value=-1) | st.integers(min_value=17),
    "stop_token_ids": st.lists(st.integers(max_value=-1), min_size=1, max_size=1),
    "n": st.integers().filter(lambda n: n != 1),
}


@given(st.fixed_dictionaries({}, optional=VALID))
def test_what_is_valid_is_kept(params):
    made = SamplingParams(**params)
    for name, value in params.items():
        kept = getattr(made, name)
        if name == "top_k" and value <= 0:
            assert kept <= 0
        elif name in ("stop", "stop_token_ids"):
            assert list(kept) == value
        else:
            assert kept == value, name
    assert made == SamplingParams(**params)
    assert repr(made).startswith("SamplingParams(")


@given(st.sampled_from(sorted(INVALID)).flatmap(lambda k: st.tuples(st.just(k), INVALID[k])))
def test_what_is_invalid_is_refused_by_name(pair):
    name, value = pair
    with pytest.raises(InvalidRequestError, match=name) as error:
        SamplingParams(**{name: value})
    assert isinstance(error.value, ValueError)
    assert isinstance(error.value, NanoBatchError)


@pytest.mark.parametrize(
    ("params", "limit", "value"),
    [
        ({"temperature": -1e-50}, "at least 0", "-0.0000"),
        ({"top_p": 1.00000001}, r"\(0, 1\]", "1.00000001"),
        ({"top_k": -7}, "-1", "-7"),
        ({"min_p": 2.0}, r"\[0, 1\]", "2"),
        ({"max_tokens": 0}, "1", "0"),
        ({"min_tokens": 20}, "max_tokens 16", "20"),
        ({"stop": [""]}, "empty", ""),
        ({"stop": ["a", ""]}, "empty", "1"),
        ({"stop": "a\ud800"}, "surrogate", "position 1"),
        ({"stop": ["a", "\udcff"]}, "stop string 1", "position 0"),
        ({"stop": ["a"], "detokenize": False}, "detokenize", "1"),
    ],
)
def test_a_refusal_names_limit_and_value(params, limit, value):
    with pytest.raises(InvalidRequestError, match=limit) as error:
        SamplingParams(**params)
    assert value in str(error.value)
    assert error.value.code == "invalid_sampling_params"


UNSUPPORTED = [
    {"n": 2},
    {"presence_penalty": 0.5},
    {"frequency_penalty": -0.5},
    {"repetition_penalty": 1.2},
    {"logprobs": 1},
    {"logprobs": 0},
    {"prompt_logprobs": 1},
    {"logit_bias": {1: 2.0}},
    {"allowed_token_ids": [1, 2]},
    {"bad_words": ["no"]},
    {"structured_outputs": {"json": {}}},
    {"output_kind": 1},
]


@pytest.mark.parametrize("params", UNSUPPORTED, ids=str)
def test_a_parameter_without_its_feature_says_that_it_is_not_supported_yet(params):
    (name,) = params
    with pytest.raises(InvalidRequestError, match=f"{name}.*not supported yet"):
        SamplingParams(**params)


@pytest.mark.parametrize(
    "params",
    [
        {"n": 1},
        {"presence_penalty": 0.0, "frequency_penalty": 0.0, "repetition_penalty": 1.0},
        {"logprobs": None, "prompt_logprobs": None, "logit_bias": None},
        {"bad_words": None, "allowed_token_ids": None, "structured_outputs": None},
    ],
    ids=str,
)
def test_the_neutral_value_of_such_a_parameter_is_accepted(params):
    assert SamplingParams(**params) == SamplingParams()


def test_an_unknown_name_is_refused():
    with pytest.raises((InvalidRequestError, TypeError), match="temprature"):
        SamplingParams(temprature=0.5)


@pytest.mark.parametrize(
    "params",
    [
        {"temperature": "hot"},
        {"temperature": True},
        {"top_p": None},
        {"max_tokens": True},
        {"max_tokens": 1.5},
        {"max_tokens": "3"},
        {"stop": 3},
        {"stop": [3]},
        {"stop": ["a", 3]},
        {"seed": "x"},
        {"stop_token_ids": 3},
        {"ignore_eos": "yes"},
    ],
    ids=str,
)
def test_a_value_of_another_type_is_refused_by_name(params):
    (name,) = params
    with pytest.raises((TypeError, InvalidRequestError), match=name):
        SamplingParams(**params)


def test_positional_arguments_are_refused():
    with pytest.raises(TypeError):
        SamplingParams(1, 0.5)


def test_the_defaults_are_vllms():
    params = SamplingParams()
    assert (params.n, params.temperature, params.top_p, params.min_p) == (1, 1.0, 1.0, 0.0)
    assert (params.max_tokens, params.min_tokens, params.seed) == (16, 0, None)
    assert params.top_k in (0, -1)
    assert (list(params.stop), list(params.stop_token_ids)) == ([], [])
    assert (params.ignore_eos, params.detokenize, params.skip_special_tokens) == (False, True, True)
    assert params.include_stop_str_in_output is False


def test_it_is_frozen():
    params = SamplingParams()
    with pytest.raises(AttributeError):
        params.temperature = 0.5
    assert params == SamplingParams()


def test_a_copy_is_equal():
    params = SamplingParams(temperature=0.5, stop=["a"], seed=3)
    assert (
        copy.copy(params) == copy.deepcopy(params) == pickle.loads(pickle.dumps(params)) == params
    )


def test_it_can_be_a_key():
    made = [SamplingParams(stop=["a", "b"], stop_token_ids=[1]) for _ in range(2)]
    assert len(set(made)) == 1


def test_numpys_numbers_are_numbers():
    params = SamplingParams(temperature=np.float32(0.5), max_tokens=np.int64(3))
    assert params == SamplingParams(temperature=0.5, max_tokens=3)
    assert repr(params) == repr(SamplingParams(temperature=0.5, max_tokens=3))


def test_a_decimal_fraction_is_given_back_as_it_was():
    """0.7 is no float32; what a user reads back is what the user wrote."""
    params = SamplingParams(temperature=0.7, top_p=0.9, min_p=0.05)
    assert (params.temperature, params.top_p, params.min_p) == (0.7, 0.9, 0.05)
