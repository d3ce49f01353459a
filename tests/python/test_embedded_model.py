"""The model that ships inside the package has learned something."""

import bz2
import re

import numpy as np
from nano_batch import SamplingParams

CONTEXT = 1024
STRIDE = 768
NUM_CHARACTERS = 100_000


def bits_of(engine, text):
    """The bits that the model needs for `text`, each token predicted from those before it.

    Windows overlap, so that all but the first tokens see at least CONTEXT - STRIDE others.
    """
    bos, *tokens = engine.get_tokenizer().encode(text)
    bits = 0.0
    for start in range(0, len(tokens), STRIDE):
        end = min(start + STRIDE, len(tokens))
        first = max(0, end - CONTEXT)
        logits = engine.logits([bos, *tokens[first : end - 1]])[start - first :].astype(np.float64)
        peak = logits.max(axis=1, keepdims=True)
        log_sums = peak[:, 0] + np.log(np.exp(logits - peak).sum(axis=1))
        targets = logits[np.arange(end - start), tokens[start:end]]
        bits += (log_sums - targets).sum() / np.log(2)
    return bits


def test_it_predicts_the_held_out_novel_better_than_bzip2(root, austen, capsys):
    """On a part of the novel; `tools/train_austen.py` reports the whole."""
    text = (root / "tests/data/persuasion.txt").read_text(encoding="utf-8")[:NUM_CHARACTERS]
    num_bytes = len(text.encode())
    ours = bits_of(austen, text) / num_bytes
    theirs = 8 * len(bz2.compress(text.encode(), 9)) / num_bytes
    with capsys.disabled():
        print(f"\nbits per byte: {ours:.3f} by the embedded model, {theirs:.3f} by bzip2 -9")
    assert ours < theirs


def test_it_is_small(embedded_model):
    size = sum(path.stat().st_size for path in embedded_model.iterdir())
    assert size < 11_000_000
    assert (embedded_model / "model.safetensors").stat().st_size <= 10_000_000


def test_its_samples_are_made_of_the_novels_words(root, austen):
    novel = (root / "tests/data/persuasion.txt").read_text(encoding="utf-8")
    words = set(re.findall(r"[a-z]+", novel.lower()))
    prompts = ["It is a truth universally acknowledged", "Mr. Knightley", "“My dear,”"]
    params = SamplingParams(temperature=0.8, top_p=0.95, seed=1, max_tokens=150, ignore_eos=True)
    outputs = austen.generate(prompts, params, use_tqdm=False)
    said = re.findall(r"[a-z]+", " ".join(output.outputs[0].text for output in outputs).lower())
    assert len(said) > 200
    assert sum(word in words for word in said) > 0.85 * len(said)
