"""How tokens are chosen: greedily, from what is likely, and the same again with the same seed."""

from nano_batch import Engine, SamplingParams

WAYS = {
    "greedy": SamplingParams(temperature=0, max_tokens=20),
    "temperature 0.7": SamplingParams(temperature=0.7, max_tokens=20, seed=1),
    "the same seed": SamplingParams(temperature=0.7, max_tokens=20, seed=1),
    "another seed": SamplingParams(temperature=0.7, max_tokens=20, seed=2),
    "nucleus": SamplingParams(temperature=1.2, top_p=0.8, max_tokens=20, seed=1),
    "until a full stop": SamplingParams(temperature=0.7, max_tokens=80, seed=1, stop="."),
}

with Engine() as engine:
    # A prompt a way: parameters are each request's own, also within a batch.
    outputs = engine.generate(["Emma was"] * len(WAYS), list(WAYS.values()))
    for way, output in zip(WAYS, outputs, strict=True):
        print(f"{way}: {output.outputs[0].text!r}")
    texts = [output.outputs[0].text for output in outputs]
    assert texts[1] == texts[2] != texts[3]
