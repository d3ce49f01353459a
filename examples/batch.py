"""Many prompts at once: they share every step, and come back in their order."""

from nano_batch import Engine, SamplingParams

PROMPTS = [
    "It is a truth universally acknowledged, that",
    "Captain Wentworth",
    "The ball at Netherfield",
    "My dear Emma,",
]

with Engine() as engine:  # the embedded model; or a directory, or a hub id
    params = SamplingParams(temperature=0.8, top_p=0.95, max_tokens=40, seed=7)
    for output in engine.generate(PROMPTS, params):
        answer = output.outputs[0]
        print(f"{output.prompt} -> {answer.text!r} ({answer.finish_reason})")
    print(engine.stats())
