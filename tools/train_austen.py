#!/usr/bin/env python3
"""Builds the model that ships inside the package: a small Mistral trained on Jane Austen.

    python tools/train_austen.py prepare     # novels -> clean text, tokenizer
    python tools/train_austen.py train       # text -> model directory, loss curve
    python tools/train_austen.py evaluate    # bits per byte on the held-out novel, samples

`prepare` needs Debian's `apt-get` and `dpkg-deb` (or `--package FILE.deb`), `train` needs torch,
`evaluate` also needs transformers. tools/README.md tells how the shipped model was made.
"""

import argparse
import bz2
import csv
import gzip
import json
import lzma
import math
import shutil
import time
from pathlib import Path

from austen_text import read_novels

ROOT = Path(__file__).resolve().parent.parent
WORK = ROOT / ".train"
MODEL = ROOT / "python" / "nano_batch" / "models" / "austen"
HELD_OUT_TEXT = ROOT / "tests" / "data" / "persuasion.txt"

HELD_OUT = "persuasion"
VOCAB_SIZE = 4096
CONTEXT = 1024
BOS, EOS = "<s>", "</s>"
BOS_ID, EOS_ID = 0, 1


# ---------------------------------------------------------------------------------- prepare


def prepare(args):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    novels = read_novels(args.package)
    for name, chapters in novels.items():
        print(f"{name:17} {len(chapters):3} chapters {sum(map(len, chapters)):7} characters")
    HELD_OUT_TEXT.parent.mkdir(parents=True, exist_ok=True)
    HELD_OUT_TEXT.write_text("\n\n".join(novels.pop(HELD_OUT)) + "\n", encoding="utf-8")
    WORK.mkdir(exist_ok=True)
    (WORK / "novels.json").write_text(json.dumps(novels), encoding="utf-8")

    # A byte-level BPE: every byte is a token, so any text round-trips.
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[BOS, EOS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator((c for chapters in novels.values() for c in chapters), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A",
        pair=f"{BOS} $A {BOS}:1 $B:1",
        special_tokens=[(BOS, BOS_ID)],
    )
    assert (tokenizer.token_to_id(BOS), tokenizer.token_to_id(EOS)) == (BOS_ID, EOS_ID)
    assert tokenizer.get_vocab_size() == VOCAB_SIZE
    tokenizer.save(str(WORK / "tokenizer.json"))


# ------------------------------------------------------------------------------------ model


def define_model():
    """Returns the training model's class (so that `prepare` can do without torch).

    It is Mistral with dropout; its parameters bear Hugging Face's names.
    """
    import torch
    from torch import nn
    from torch.nn import functional as F

    class Attention(nn.Module):
        def __init__(self, config):
            super().__init__()
            width, self.head_dim = config["hidden_size"], config["head_dim"]
            self.heads = config["num_attention_heads"]
            self.kv_heads = config["num_key_value_heads"]
            self.dropout = config["dropout"]
            self.q_proj = nn.Linear(width, self.heads * self.head_dim, bias=False)
            self.k_proj = nn.Linear(width, self.kv_heads * self.head_dim, bias=False)
            self.v_proj = nn.Linear(width, self.kv_heads * self.head_dim, bias=False)
            self.o_proj = nn.Linear(self.heads * self.head_dim, width, bias=False)

        def forward(self, x, cos, sin):
            batch, length, _ = x.shape

            def split(y, heads):
                return y.view(batch, length, heads, self.head_dim).transpose(1, 2)

            def rotate(y):
                low, high = y.chunk(2, dim=-1)
                return (y * cos + torch.cat((-high, low), dim=-1) * sin).to(y.dtype)

            q = rotate(split(self.q_proj(x), self.heads))
            k = rotate(split(self.k_proj(x), self.kv_heads))
            v = split(self.v_proj(x), self.kv_heads)
            k, v = (y.repeat_interleave(self.heads // self.kv_heads, dim=1) for y in (k, v))
            dropout = self.dropout if self.training else 0.0
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=dropout)
            return self.o_proj(y.transpose(1, 2).reshape(batch, length, -1))

    class MLP(nn.Module):
        def __init__(self, config):
            super().__init__()
            width, inner = config["hidden_size"], config["intermediate_size"]
            self.gate_proj = nn.Linear(width, inner, bias=False)
            self.up_proj = nn.Linear(width, inner, bias=False)
            self.down_proj = nn.Linear(inner, width, bias=False)
            self.dropout = config["dropout"]

        def forward(self, x):
            y = F.silu(self.gate_proj(x)) * self.up_proj(x)
            return self.down_proj(F.dropout(y, self.dropout, self.training))

    class Layer(nn.Module):
        def __init__(self, config):
            super().__init__()
            width, eps = config["hidden_size"], config["rms_norm_eps"]
            self.input_layernorm = nn.RMSNorm(width, eps=eps)
            self.self_attn = Attention(config)
            self.post_attention_layernorm = nn.RMSNorm(width, eps=eps)
            self.mlp = MLP(config)
            self.dropout = config["dropout"]

        def forward(self, x, cos, sin):
            y = self.self_attn(self.input_layernorm(x), cos, sin)
            x = x + F.dropout(y, self.dropout, self.training)
            y = self.mlp(self.post_attention_layernorm(x))
            return x + F.dropout(y, self.dropout, self.training)

    class Mistral(nn.Module):
        def __init__(self, config):
            super().__init__()
            width, dim = config["hidden_size"], config["head_dim"]
            self.model = nn.Module()
            self.model.embed_tokens = nn.Embedding(config["vocab_size"], width)
            self.model.layers = nn.ModuleList(
                Layer(config) for _ in range(config["num_hidden_layers"])
            )
            self.model.norm = nn.RMSNorm(width, eps=config["rms_norm_eps"])
            self.dropout = config["dropout"]
            frequency = config["rope_theta"] ** (-torch.arange(0, dim, 2).float() / dim)
            angle = torch.arange(config["max_position_embeddings"])[:, None] * frequency
            angle = torch.cat((angle, angle), dim=-1)
            self.register_buffer("cos", angle.cos(), persistent=False)
            self.register_buffer("sin", angle.sin(), persistent=False)
            for name, parameter in self.named_parameters():
                if parameter.dim() == 2:
                    scale = 0.02
                    if name.endswith(("o_proj.weight", "down_proj.weight")):
                        scale /= math.sqrt(2 * config["num_hidden_layers"])
                    nn.init.normal_(parameter, std=scale)

        def forward(self, tokens):
            cos, sin = self.cos[: tokens.shape[1]], self.sin[: tokens.shape[1]]
            x = self.model.embed_tokens(tokens)
            x = F.dropout(x, self.dropout, self.training)
            for layer in self.model.layers:
                x = layer(x, cos, sin)
            x = F.dropout(self.model.norm(x), self.dropout, self.training)
            return F.linear(x, self.model.embed_tokens.weight)

    return Mistral


# ------------------------------------------------------------------------------------ train


def encode(chapters, tokenizer, dropout):
    """Encodes chapters into one stream, `</s>` after each; a BPE dropout varies the splits.

    Returns the stream and the places in it where paragraphs begin.
    """
    tokenizer.model.dropout = dropout or None
    stream, paragraphs = [], []
    for encoding in tokenizer.encode_batch(chapters, add_special_tokens=False):
        offset, after_break = len(stream), True
        for i, token in enumerate(encoding.tokens):
            if after_break and token[0] != "\u010a":
                paragraphs.append(offset + i)
            after_break = token[-1] == "\u010a"  # the byte-level alphabet's line feed
        stream += [*encoding.ids, EOS_ID]
    tokenizer.model.dropout = None
    return stream, paragraphs


def strided_windows(stream, context, stride):
    """Yields (inputs, targets, scored): windows over a stream of tokens.

    A window is `<s>`, then up to `context - 1` tokens; its last `scored` targets are the ones no
    earlier window has predicted, and each of them sees at least `context - stride` tokens (where
    the stream has as many before it).
    """
    for start in range(0, len(stream), stride):
        end = min(start + stride, len(stream))
        first = max(0, end - context)
        targets = stream[first:end]
        yield [BOS_ID, *targets[:-1]], targets, end - start


def split_novels(novels):
    """Splits novels (lists of chapters) into training and validation: each one's last chapter."""
    train = [chapter for chapters in novels.values() for chapter in chapters[:-1]]
    return train, [chapters[-1] for chapters in novels.values()]


def hugging_face_config(args):
    return {
        "architectures": ["MistralForCausalLM"],
        "model_type": "mistral",
        "vocab_size": VOCAB_SIZE,
        "hidden_size": args.hidden,
        "intermediate_size": args.ffn,
        "num_hidden_layers": args.layers,
        "num_attention_heads": args.heads,
        "num_key_value_heads": args.kv_heads,
        "head_dim": args.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": CONTEXT,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "sliding_window": None,
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "tie_word_embeddings": True,
        "use_cache": True,
        "bos_token_id": BOS_ID,
        "eos_token_id": EOS_ID,
        "torch_dtype": "bfloat16",
    }


def save_model(directory, config, state):
    import torch
    from safetensors.torch import save_file

    def write_json(name, value):
        (directory / name).write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")

    directory.mkdir(parents=True, exist_ok=True)
    write_json("config.json", config)
    write_json("generation_config.json", {"bos_token_id": BOS_ID, "eos_token_id": EOS_ID})
    write_json(
        "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": BOS,
            "eos_token": EOS,
            "model_max_length": CONTEXT,
            "clean_up_tokenization_spaces": False,
        },
    )
    shutil.copyfile(WORK / "tokenizer.json", directory / "tokenizer.json")
    tensors = {name: tensor.to(torch.bfloat16).contiguous() for name, tensor in state.items()}
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def train(args):
    import torch
    from tokenizers import Tokenizer
    from torch.nn import functional as F

    torch.manual_seed(args.seed)
    torch.set_float32_matmul_precision("high")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    novels = json.loads((WORK / "novels.json").read_text(encoding="utf-8"))
    tokenizer = Tokenizer.from_file(str(WORK / "tokenizer.json"))
    training, validation = split_novels(novels)

    # Several encodings of the same text, laid end to end; only the first is without dropout.
    # A window starts at a paragraph or anywhere, and stays inside one encoding.
    streams, starts, offset = [], [], 0
    for variant in range(1 + args.bpe_variants):
        stream, paragraphs = encode(training, tokenizer, args.bpe_dropout if variant else 0.0)
        last = len(stream) - CONTEXT
        streams.append(torch.tensor(stream, dtype=torch.int16))
        at_paragraphs = torch.tensor([offset + p for p in paragraphs if 0 < p < last])
        starts.append((at_paragraphs, torch.arange(offset + 1, offset + last)))
        offset += len(stream)
        if not variant:
            epoch = len(stream)
    tokens = torch.cat(streams).to(device)
    span = torch.arange(CONTEXT, device=device)

    def draw(batch, plain):
        """Draws windows: inputs and targets. Nine in ten begin with `<s>`, as a prompt does."""
        anchored = torch.rand(batch) < 0.5
        variants = torch.zeros(batch, dtype=torch.long)
        if args.bpe_variants:
            noisy = torch.randint(1, 1 + args.bpe_variants, (batch,))
            variants = torch.where(torch.rand(batch) < plain, variants, noisy)
        begin = []
        for variant, at_paragraph in zip(variants.tolist(), anchored.tolist(), strict=True):
            places = starts[variant][0 if at_paragraph else 1]
            begin.append(places[torch.randint(len(places), ())])
        begin = torch.stack(begin).to(device)
        targets = tokens[begin[:, None] + span].long()
        before = tokens[begin - 1].long()
        keep = torch.rand(batch, device=device) < 0.1
        first = torch.where(keep, before, BOS_ID)
        return torch.cat((first[:, None], targets[:, :-1]), dim=1), targets

    validation_stream, _ = encode(validation, tokenizer, 0.0)
    validation_windows = [
        (torch.tensor([x], device=device), torch.tensor(y[-n:], device=device))
        for x, y, n in strided_windows(validation_stream, CONTEXT, CONTEXT)
    ]

    config = hugging_face_config(args)
    model = define_model()({**config, "dropout": args.dropout}).to(device)
    parameters = dict(model.named_parameters())
    print(f"{sum(p.numel() for p in parameters.values())} parameters")
    average = {name: p.detach().clone() for name, p in parameters.items()}

    def autocast():
        return torch.autocast(device, dtype=torch.bfloat16)

    def mean_loss(inputs, targets):
        return F.cross_entropy(model(inputs).float().flatten(0, 1), targets.flatten())

    if args.compile:
        mean_loss = torch.compile(mean_loss)

    @torch.no_grad()
    def validate():
        """Nats per token of the averaged weights on the validation chapters."""
        current = {name: p.detach().clone() for name, p in parameters.items()}
        for name, p in parameters.items():
            p.copy_(average[name].to(torch.bfloat16))
        model.eval()
        total = 0.0
        for inputs, targets in validation_windows:
            with autocast():
                logits = model(inputs)[0, -len(targets) :].float()
            total += F.cross_entropy(logits, targets, reduction="sum").item()
        model.train()
        for name, p in parameters.items():
            p.copy_(current[name])
        return total / len(validation_stream)

    # Muon for the layers' matrices, AdamW for the embedding and the norms' gains.
    layers = [p for name, p in parameters.items() if p.dim() == 2 and "embed" not in name]
    others = [p for name, p in parameters.items() if p.dim() == 1 or "embed" in name]
    optimizers = [
        torch.optim.Muon(layers, lr=args.muon_lr, weight_decay=args.weight_decay),
        torch.optim.AdamW(
            others, lr=args.lr, betas=(0.9, 0.98), weight_decay=0.0, fused=device == "cuda"
        ),
    ]
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    peaks = [group["lr"] for group in groups]

    rows, best, recent, began = [], None, [], time.time()
    for step in range(1, args.steps + 1):
        done = step / args.steps
        rate = min(step / args.warmup, 0.5 + 0.5 * math.cos(math.pi * done))
        for group, peak in zip(groups, peaks, strict=True):
            group["lr"] = peak * rate
        # The last quarter of the training sees the text only as it will be split at inference.
        inputs, targets = draw(args.batch, 1.0 if done > 0.75 else args.plain)
        with autocast():
            loss = mean_loss(inputs, targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters.values(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        blend = 1 - min(args.average, step / (step + 10))
        torch._foreach_lerp_(list(average.values()), [p.data for p in parameters.values()], blend)
        recent.append(loss.detach())
        if step % args.every == 0 or step == args.steps:
            trained = torch.stack(recent).mean().item()
            recent.clear()
            validated = validate()
            rows.append((step, trained, validated, args.lr * rate))
            seconds = time.time() - began
            print(
                f"step {step:5} epoch {step * args.batch * CONTEXT / epoch:6.1f}"
                f" train {trained:.4f} validation {validated:.4f} {seconds:6.1f} s",
                flush=True,
            )
            if best is None or validated < best:
                best = validated
                save_model(args.out, config, average)
    print(f"best validation {best:.4f} nats per token")
    with args.curve.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("step", "train_loss", "validation_loss", "learning_rate"))
        writer.writerows((s, f"{t:.4f}", f"{v:.4f}", f"{lr:.3e}") for s, t, v, lr in rows)


# --------------------------------------------------------------------------------- evaluate


def evaluate(args):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model).to(device, torch.float32).eval()
    text = HELD_OUT_TEXT.read_text(encoding="utf-8")
    size = len(text.encode("utf-8"))
    stream = tokenizer.encode(text, add_special_tokens=False)

    bits = 0.0
    with torch.no_grad():
        for inputs, targets, scored in strided_windows(stream, CONTEXT, args.stride):
            logits = model(torch.tensor([inputs], device=device)).logits[0, -scored:]
            targets = torch.tensor(targets[-scored:], device=device)
            loss = torch.nn.functional.cross_entropy(logits, targets, reduction="sum")
            bits += loss.item() / math.log(2)
    print(f"{size} bytes, {len(stream)} tokens")
    print(f"model    {bits / size:.4f} bits per byte (float32, stride {args.stride})")
    compressors = {
        "bzip2 -9": lambda data: bz2.compress(data, 9),
        "xz -9e": lambda data: lzma.compress(data, preset=9 | lzma.PRESET_EXTREME),
        "gzip -9": lambda data: gzip.compress(data, 9),
    }
    for name, compress in compressors.items():
        print(f"{name:8} {8 * len(compress(text.encode())) / size:.4f} bits per byte")

    for index, prompt in enumerate(args.prompt):
        torch.manual_seed(index)
        inputs = tokenizer(prompt, return_tensors="pt").input_ids.to(device)
        sampling = {"do_sample": False}
        if args.temperature:
            sampling = {"do_sample": True, "temperature": args.temperature, "top_k": 0}
        output = model.generate(inputs, max_new_tokens=args.tokens, pad_token_id=EOS_ID, **sampling)
        print(f"\n--- sample {index}, temperature {args.temperature}")
        print(tokenizer.decode(output[0], skip_special_tokens=True))


PROMPTS = ["It was", '"My dear', "Elizabeth"]


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(required=True)

    command = commands.add_parser(
        "prepare", help="decode and clean the novels, train the tokenizer"
    )
    command.add_argument("--package", type=Path, help="the Debian package, if already downloaded")
    command.set_defaults(run=prepare)

    command = commands.add_parser("train", help="train the model")
    command.add_argument("--out", type=Path, default=MODEL)
    command.add_argument("--curve", type=Path, default=ROOT / "tools" / "austen_loss.csv")
    command.add_argument("--hidden", type=int, default=256)
    command.add_argument("--layers", type=int, default=5)
    command.add_argument("--heads", type=int, default=4)
    command.add_argument("--kv-heads", type=int, default=2)
    command.add_argument("--head-dim", type=int, default=64)
    command.add_argument("--ffn", type=int, default=704)
    command.add_argument("--dropout", type=float, default=0.2)
    command.add_argument("--bpe-dropout", type=float, default=0.1, help="merges left out")
    command.add_argument("--bpe-variants", type=int, default=16, help="encodings with dropout")
    command.add_argument("--plain", type=float, default=0.3, help="share of windows without it")
    command.add_argument("--steps", type=int, default=3000)
    command.add_argument("--batch", type=int, default=32, help="windows in a step")
    command.add_argument("--lr", type=float, default=3e-3, help="AdamW's peak rate")
    command.add_argument("--warmup", type=int, default=200)
    command.add_argument("--muon-lr", type=float, default=2e-2, help="Muon's peak rate")
    command.add_argument("--weight-decay", type=float, default=0.1)
    command.add_argument("--average", type=float, default=0.99, help="decay of the weights' mean")
    command.add_argument("--every", type=int, default=100, help="steps between validations")
    command.add_argument("--seed", type=int, default=1)
    command.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    command.set_defaults(run=train)

    command = commands.add_parser("evaluate", help="bits per byte on the held-out novel, samples")
    command.add_argument("--model", type=Path, default=MODEL)
    command.add_argument("--stride", type=int, default=512)
    command.add_argument("--temperature", type=float, default=0.8)
    command.add_argument("--tokens", type=int, default=150)
    command.add_argument("--prompt", nargs="*", default=PROMPTS)
    command.set_defaults(run=evaluate)

    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
