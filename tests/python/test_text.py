"""Tokens to text: streaming, stops and lengths.

The reciting model (`recital_model.py`) says a known text, one byte a token.
"""

import pytest
from nano_batch import SamplingParams
from recital_model import EOS_ID, TEXT

PROMPTS = [
    "🙂🙃👩‍👩‍👧‍👦 flags 🇳🇴🇯🇵",
    "日本語のテキストと中文文本",
    "Ünïcödé, עברית, العربية, ไทย",
    "plain words",
]


def generate(engine, prompt, **params):
    params = {"temperature": 0, "max_tokens": 60, **params}
    return engine.generate(prompt, SamplingParams(**params), use_tqdm=False)[0].outputs[0]


def stream(engine, prompt, **params):
    params = {"temperature": 0, "max_tokens": 60, **params}
    return [output.outputs[0] for output in engine.stream(prompt, SamplingParams(**params))]


@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("temperature", [0, 1.0, 3.0])
def test_the_pieces_of_a_stream_join_to_the_whole_text(prompt, temperature, austen):
    params = {"temperature": temperature, "seed": 7, "max_tokens": 80, "ignore_eos": True}
    whole = generate(austen, prompt, **params)
    pieces = stream(austen, prompt, **params)
    assert "".join(piece.text for piece in pieces) == whole.text
    assert [t for piece in pieces for t in piece.token_ids] == list(whole.token_ids)
    for piece in pieces:
        piece.text.encode()
    assert len(whole.token_ids) == 80


@pytest.mark.parametrize("seed", range(8))
def test_random_bytes_stream_as_the_text_that_they_decode_to(seed, reciting):
    """At this temperature the model draws bytes at random: most of them are no valid UTF-8."""
    params = {"temperature": 1000.0, "seed": seed, "max_tokens": 120, "ignore_eos": True}
    whole = generate(reciting, "🙂", **params)
    pieces = stream(reciting, "🙂", **params)
    assert "".join(piece.text for piece in pieces) == whole.text
    assert whole.text == reciting.get_tokenizer().decode(whole.token_ids)
    assert "\ufffd" in whole.text


@pytest.mark.parametrize("num_tokens", range(1, 26))
def test_a_text_cut_anywhere_shows_no_half_character_early(num_tokens, reciting):
    pieces = stream(reciting, "?", max_tokens=num_tokens, ignore_eos=True)
    text = "".join(piece.text for piece in pieces)
    assert text == TEXT.encode()[:num_tokens].decode(errors="replace")
    # Only what the end leaves unfinished may be replaced.
    assert "\ufffd" not in "".join(piece.text for piece in pieces[:-1])


def test_text_goes_through_the_tokenizer_and_back(reciting, austen):
    for engine in (reciting, austen):
        tokenizer = engine.get_tokenizer()
        for prompt in PROMPTS:
            assert tokenizer.decode(tokenizer.encode(prompt)) == prompt


def test_a_text_prompt_gets_its_bos_and_token_ids_stay_as_they_are(reciting):
    params = SamplingParams(max_tokens=1)
    text, tokens = reciting.generate(["a", [66]], params, use_tqdm=False)
    assert (text.prompt, text.prompt_token_ids[0]) == ("a", 0)
    assert len(text.prompt_token_ids) == 2
    assert (tokens.prompt, list(tokens.prompt_token_ids)) == (None, [66])


def test_the_output_is_that_of_the_recital(reciting):
    output = generate(reciting, "?", max_tokens=100)
    assert (output.text, output.finish_reason, output.stop_reason) == (TEXT, "stop", None)
    assert output.token_ids[-1] == EOS_ID
    assert len(output.token_ids) == len(TEXT.encode()) + 1


@pytest.mark.parametrize(
    ("stop", "shown"),
    [
        ("sing", "wörld日語こ🙂 "),
        ("d日", "wörl"),
        ("🙂", "wörld日語こ"),
        ("こ🙂 s", "wörld日語"),
        ("w", ""),
        (["never", "語", "日語"], "wörld日"),
        (["日語", "語"], "wörld"),
        (["singing", "sing"], "wörld日語こ🙂 "),
    ],
)
def test_a_stop_string_across_tokens_ends_the_text_before_it(stop, shown, reciting):
    output = generate(reciting, "?", stop=stop)
    assert (output.text, output.finish_reason) == (shown, "stop")
    assert output.stop_reason in ([stop] if isinstance(stop, str) else stop)
    pieces = stream(reciting, "?", stop=stop)
    assert "".join(piece.text for piece in pieces) == shown
    assert pieces[-1].finish_reason == "stop"
    assert pieces[-1].stop_reason == output.stop_reason


def test_a_stop_string_may_be_part_of_the_output(reciting):
    output = generate(reciting, "?", stop="こ🙂", include_stop_str_in_output=True)
    assert (output.text, output.stop_reason) == ("wörld日語こ🙂", "こ🙂")


def test_a_stop_string_in_the_prompt_does_not_count(reciting):
    output = generate(reciting, "sing", stop="sing", max_tokens=100, ignore_eos=True)
    assert output.text.count("sing") == 0
    # The prompt ends with "g", and the recital goes on after it.
    assert output.text == "." + TEXT[: TEXT.index("sing")]


def test_a_beginning_of_a_stop_string_is_shown_at_the_end(reciting):
    output = generate(reciting, "?", stop="wörld日本", max_tokens=9, ignore_eos=True)
    assert (output.text, output.finish_reason) == ("wörld日", "length")


def test_a_stop_string_within_a_token_of_many_characters(austen):
    """The embedded model's tokens are whole words."""
    params = {"max_tokens": 60, "ignore_eos": True, "seed": 3, "temperature": 0.8}
    whole = generate(austen, "Anne could not", **params)
    for stop in (whole.text[20:23], whole.text[41], whole.text[50:57]):
        output = generate(austen, "Anne could not", stop=stop, **params)
        assert output.text == whole.text[: whole.text.index(stop)]
        assert output.stop_reason == stop
        kept = generate(
            austen, "Anne could not", stop=stop, include_stop_str_in_output=True, **params
        )
        assert kept.text == output.text + stop


def test_a_stop_token_ends_the_request_without_its_text(reciting):
    (g,) = reciting.get_tokenizer().encode("g")[1:]
    output = generate(reciting, "?", stop_token_ids=[g])
    assert (output.text, output.finish_reason, output.stop_reason) == (TEXT[:-2], "stop", g)
    assert output.token_ids[-1] == g


def test_ignore_eos_goes_on_behind_the_end(reciting):
    output = generate(reciting, "?", max_tokens=60, ignore_eos=True)
    assert (output.finish_reason, len(output.token_ids)) == ("length", 60)
    assert EOS_ID in output.token_ids
    assert output.text.startswith(TEXT + TEXT)


def test_ignore_eos_leaves_stop_tokens_alone(reciting):
    output = generate(reciting, "?", ignore_eos=True, stop_token_ids=[EOS_ID], max_tokens=60)
    assert (output.text, output.stop_reason) == (TEXT, EOS_ID)


def test_special_tokens_show_on_request(reciting):
    params = {"max_tokens": 27, "ignore_eos": True}
    output = generate(reciting, "?", skip_special_tokens=False, **params)
    assert output.text == TEXT + "</s>w"


def test_min_tokens_keeps_eos_and_stop_tokens_from_being_drawn(reciting):
    (g,) = reciting.get_tokenizer().encode("g")[1:]
    output = generate(reciting, "?", min_tokens=40, max_tokens=400, stop_token_ids=[g])
    assert len(output.token_ids) > 40
    assert EOS_ID not in output.token_ids[:40]
    assert g not in output.token_ids[:40]
    assert output.finish_reason == "stop"


def test_min_tokens_equal_to_max_tokens_is_an_exact_length(austen):
    params = {"temperature": 2.0, "seed": 0}
    output = generate(austen, "The end.", min_tokens=200, max_tokens=200, **params)
    assert (len(output.token_ids), output.finish_reason) == (200, "length")


def test_a_stop_string_does_not_count_before_min_tokens(reciting):
    output = generate(reciting, "?", stop="w", min_tokens=5, ignore_eos=True)
    assert output.text == TEXT
    assert output.finish_reason == "stop"


def test_max_tokens_is_lowered_to_what_max_model_len_leaves(reciting_dir, open_engine):
    engine = open_engine(reciting_dir, max_model_len=40)
    output = generate(engine, [5] * 30, max_tokens=1000, ignore_eos=True)
    assert (len(output.token_ids), output.finish_reason) == (10, "length")
    longest = generate(engine, [5] * 39, max_tokens=1000, ignore_eos=True)
    assert (len(longest.token_ids), longest.finish_reason) == (1, "length")


def test_without_detokenize_there_are_tokens_and_no_text(reciting):
    output = generate(reciting, "?", detokenize=False, max_tokens=5)
    assert (output.text, len(output.token_ids)) == ("", 5)


def test_every_form_of_prompt_says_the_same(reciting):
    import numpy as np

    tokens = list(reciting.get_tokenizer().encode("?"))
    forms = [
        "?",
        tokens,
        np.array(tokens),
        np.array(tokens, dtype=np.uint16),
        {"prompt": "?"},
        {"prompt_token_ids": tokens},
    ]
    alone = [generate(reciting, form) for form in forms]
    assert {output.text for output in alone} == {TEXT}
    listed = reciting.generate(forms, SamplingParams(temperature=0, max_tokens=60), use_tqdm=False)
    assert {output.outputs[0].text for output in listed} == {TEXT}


def test_generate_keeps_the_order_and_takes_parameters_for_each(reciting):
    params = [SamplingParams(temperature=0, max_tokens=n) for n in (9, 1, 30, 4)]
    outputs = reciting.generate(["a", "b", "c", "d"], params, use_tqdm=False)
    assert [output.prompt for output in outputs] == ["a", "b", "c", "d"]
    assert [len(output.outputs[0].token_ids) for output in outputs] == [9, 1, 26, 4]
    assert len({output.request_id for output in outputs}) == 4


def test_generate_of_nothing_is_nothing(reciting):
    assert reciting.generate([], use_tqdm=False) == []


def test_results_carry_vllms_fields(reciting):
    (output,) = reciting.generate("?", SamplingParams(temperature=0, max_tokens=3), use_tqdm=False)
    assert output.finished
    assert output.prompt_logprobs is None
    assert output.num_cached_tokens == 0
    completion = output.outputs[0]
    assert (completion.index, completion.logprobs, completion.cumulative_logprob) == (0, None, None)
    assert "RequestOutput(" in repr(output)
    assert "CompletionOutput(" in repr(output)


def test_only_the_last_piece_of_a_stream_is_finished(reciting):
    outputs = [*reciting.stream("?", SamplingParams(temperature=0, max_tokens=9))]
    assert [output.finished for output in outputs] == [False] * (len(outputs) - 1) + [True]
    reasons = [output.outputs[0].finish_reason for output in outputs]
    assert reasons == [None] * (len(outputs) - 1) + ["length"]
    assert sum(len(output.outputs[0].token_ids) for output in outputs) == 9


def test_200_requests_stop_at_their_stop_although_only_the_first_is_waited_for(
    reciting, wait_until
):
    """The stop strings are found, and the engine told, while nobody reads."""
    params = SamplingParams(temperature=0, stop="sing", max_tokens=60000, ignore_eos=True)
    streams = [reciting.stream("?", params) for _ in range(200)]
    shown = "".join(output.outputs[0].text for output in streams[0])
    assert shown == TEXT[: TEXT.index("sing")]

    def is_idle():
        stats = reciting.stats()
        return stats.num_running == stats.num_waiting == 0

    wait_until(is_idle, "200 requests end at their stop")
    for stream in streams[1:]:
        pieces = [*stream]
        assert "".join(piece.outputs[0].text for piece in pieces) == shown
        assert pieces[-1].outputs[0].stop_reason == "sing"
    # A stream ends before the engine has heard of it.
    wait_until(is_idle, "the engine hears of the last stop")
    stats = reciting.stats()
    assert stats.num_free_blocks == stats.num_blocks
