"""Tokens as they come, of two requests at once, one of which is given up early."""

from nano_batch import Engine, SamplingParams

with Engine() as engine:
    params = SamplingParams(temperature=0.8, max_tokens=60, seed=3)
    kept = engine.stream("Mr. Knightley", params)
    dropped = engine.stream("Mrs. Bennet", params)
    print("first of the other:", repr(next(dropped).outputs[0].text))
    del dropped  # nobody reads it any more: the engine ends it and takes its blocks back

    print("Mr. Knightley", end="")
    for output in kept:
        print(output.outputs[0].text, end="", flush=True)
    print()
    print(f"first token after {1e3 * output.metrics.first_token_s:.1f} ms")
