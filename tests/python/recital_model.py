"""A model that recites one text for ever: every output of a test is known beforehand.

Attention and feed-forward add nothing (their last matrices are zero), so the next token is a
function of the last one alone: the row of lm_head that equals its embedding. The tokenizer has one
token for each byte, so every character beyond ASCII spans several tokens.
"""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

# No byte occurs twice: a byte has one successor.
TEXT = "wörld日語こ🙂 sing."
BOS, EOS = "<s>", "</s>"
BOS_ID, EOS_ID = 0, 1
HIDDEN_SIZE = 64
VOCAB_SIZE = 258
MAX_MODEL_LEN = 65536


def byte_tokenizer() -> Tokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([BOS, EOS, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([BOS, EOS])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, BOS_ID)]
    )
    return tokenizer


def write(directory: Path) -> Path:
    """Writes the model: after any byte that is not in `TEXT` the recital begins; it ends with the
    end-of-sequence token, after which it begins again."""
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer = byte_tokenizer()
    recital = tokenizer.encode(TEXT, add_special_tokens=False).ids
    assert len(set(recital)) == len(recital) == len(TEXT.encode()), "a byte occurs twice"
    assert tokenizer.get_vocab_size() == VOCAB_SIZE
    tokenizer.save(str(directory / "tokenizer.json"))

    successors = [recital[0]] * VOCAB_SIZE
    for token, successor in zip(recital, [*recital[1:], EOS_ID], strict=True):
        successors[token] = successor
    generator = torch.Generator().manual_seed(0)
    embedding = torch.randn(VOCAB_SIZE, HIDDEN_SIZE, generator=generator)
    embedding /= embedding.norm(dim=1, keepdim=True)
    # All tokens outside the recital, and its end, share one successor: the sum of their embeddings.
    lm_head = torch.zeros(VOCAB_SIZE, HIDDEN_SIZE)
    restarting = [t for t in range(VOCAB_SIZE) if successors[t] == recital[0]]
    embedding[restarting] = embedding[restarting[0]].clone()
    for token, successor in enumerate(successors):
        lm_head[successor] = embedding[token]

    config = {
        "architectures": ["MistralForCausalLM"],
        "model_type": "mistral",
        "vocab_size": VOCAB_SIZE,
        "hidden_size": HIDDEN_SIZE,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "num_key_value_heads": 1,
        "head_dim": 32,
        "hidden_act": "silu",
        "max_position_embeddings": MAX_MODEL_LEN,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "sliding_window": 64,
        "tie_word_embeddings": False,
        "bos_token_id": BOS_ID,
        "eos_token_id": EOS_ID,
        "torch_dtype": "float32",
    }
    (directory / "config.json").write_text(json.dumps(config), encoding="utf-8")
    layer = "model.layers.0"
    weights = {
        "model.embed_tokens.weight": embedding,
        "model.norm.weight": torch.ones(HIDDEN_SIZE),
        "lm_head.weight": lm_head,
        f"{layer}.input_layernorm.weight": torch.ones(HIDDEN_SIZE),
        f"{layer}.post_attention_layernorm.weight": torch.ones(HIDDEN_SIZE),
        f"{layer}.self_attn.q_proj.weight": torch.randn(32, HIDDEN_SIZE, generator=generator),
        f"{layer}.self_attn.k_proj.weight": torch.randn(32, HIDDEN_SIZE, generator=generator),
        f"{layer}.self_attn.v_proj.weight": torch.randn(32, HIDDEN_SIZE, generator=generator),
        f"{layer}.self_attn.o_proj.weight": torch.zeros(HIDDEN_SIZE, 32),
        f"{layer}.mlp.gate_proj.weight": torch.randn(64, HIDDEN_SIZE, generator=generator),
        f"{layer}.mlp.up_proj.weight": torch.randn(64, HIDDEN_SIZE, generator=generator),
        f"{layer}.mlp.down_proj.weight": torch.zeros(HIDDEN_SIZE, 64),
    }
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    return directory
