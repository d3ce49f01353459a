"""The command `nano-batch`."""

import argparse
import io
import logging
import re
import secrets
import sys
import time
from dataclasses import replace
from typing import Any, NoReturn

from nano_batch import Engine, InvalidRequestError, NanoBatchError, SamplingParams, __version__
from nano_batch.bench import command as bench

_EXIT_FAILURE, _EXIT_USAGE, _EXIT_INTERRUPTED = 1, 2, 130
# The codes of errors that are about a flag's value, not about the prompt or the model.
_WRONG_VALUES = ("invalid_config", "invalid_sampling_params", "unsupported_parameter")

# Keywords of `Engine` and of `SamplingParams` are flags where somebody at a terminal, with one
# prompt, has a use for them, and this is how argparse reads them.
_ENGINE: dict[str, dict[str, Any]] = {
    "device": {"default": "auto", "help": "auto, cpu, cuda or cuda:N"},
    "dtype": {"default": "auto", "help": "auto, float32 or bfloat16"},
    "max_model_len": {"type": int, "help": "tokens of prompt and output together"},
    "gpu_memory_utilization": {
        "type": float,
        "default": 0.9,
        "help": "share that may be in use",
    },
    "num_blocks": {"type": int, "help": "blocks of the KV cache"},
    "kv_cache_gib": {"type": float, "help": "size of the KV cache"},
    "num_threads": {"type": int, "help": "threads of a step (default: one per core)"},
    "deterministic": {
        "action": "store_true",
        "help": "the same bits in any batch, slower on a GPU",
    },
    "load_format": {"default": "auto", "help": "auto, or dummy for random weights"},
    "revision": {"help": "branch, tag or commit of a hub id"},
}
# Where neither a flag nor the model says something these hold, and else `SamplingParams`'s own.
_UNASKED: dict[str, Any] = {"max_tokens": 128, "temperature": 0.8}
_ORDER = (
    "A flag wins over the model's generation_config.json, and that over the default in brackets."
)
_SAMPLING: dict[str, dict[str, Any]] = {
    "max_tokens": {"type": int, "help": "tokens generated at most (128)"},
    "min_tokens": {"type": int, "help": "tokens generated before a stop (0)"},
    "temperature": {"type": float, "help": "0 is greedy (0.8)"},
    "top_p": {"type": float, "help": "nucleus sampling (1.0)"},
    "top_k": {"type": int, "help": "most likely tokens kept; 0 is all (0)"},
    "min_p": {"type": float, "help": "least share of the best token's probability (0.0)"},
    "seed": {
        "type": int,
        "help": "the same seed gives the same tokens (default: another each time)",
    },
    "stop": {"action": "append", "help": "a string that ends the text; may be repeated"},
    "ignore_eos": {"action": "store_true", "help": "go on after the end of the text"},
}


def main(argv: list[str] | None = None) -> NoReturn:
    """Run one command and exit: 0, 1 on failure, 2 on wrong flags or values, 130 on Ctrl-C."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        # What a terminal has no character for is still to be read.
        sys.stdout.reconfigure(errors="backslashreplace")
    args = _parser().parse_args(argv)
    logging.basicConfig(
        level=logging.INFO if args.verbose else logging.WARNING,
        format="%(levelname)s %(name)s: %(message)s",
        stream=sys.stderr,
    )
    try:
        sys.exit(args.run(args))
    except KeyboardInterrupt:
        sys.exit(_EXIT_INTERRUPTED)
    except OSError as error:
        # Whoever read our output has seen enough, or its device is full: the latter is told once,
        # and nothing when the interpreter flushes.
        if not isinstance(error, BrokenPipeError):
            print(f"nano-batch: {error}", file=sys.stderr)
        sys.stdout = None
        sys.exit(_EXIT_FAILURE)
    except NanoBatchError as error:
        print(f"nano-batch: {error}", file=sys.stderr)
        sys.exit(_EXIT_USAGE if error.code in _WRONG_VALUES else _EXIT_FAILURE)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="nano-batch", description=__doc__)
    parser.add_argument("--version", action="version", version=f"nano-batch {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    generate = commands.add_parser(
        "generate",
        help="stream the continuation of a prompt to stdout",
        description="Stream the continuation of a prompt to stdout.",
    )
    generate.set_defaults(run=_generate)
    add = generate.add_argument
    add("model", nargs="?", metavar="MODEL", help="a directory or hub id (default: embedded)")
    add("-p", "--prompt", help="the prompt (default: read from stdin)")
    add("-v", "--verbose", action="store_true", help="log what is loaded")
    for title, flags, about in (("engine", _ENGINE, None), ("sampling", _SAMPLING, _ORDER)):
        group = generate.add_argument_group(title, about)
        for name, how in flags.items():
            group.add_argument("--" + name.replace("_", "-"), **how)
    bench.add(commands)
    return parser


def _generate(args: argparse.Namespace) -> int:
    # There is none if its descriptor is closed.
    if args.prompt is None and (sys.stdin is None or sys.stdin.isatty()):
        print("nano-batch generate: give --prompt, or a text on stdin", file=sys.stderr)
        return _EXIT_USAGE
    if args.seed is None:
        args.seed = secrets.randbits(31)
    flags = {name: getattr(args, name) for name in _SAMPLING}
    given = {name: value for name, value in flags.items() if value is not None}
    # What is wrong whatever the model says is told before it is loaded.
    SamplingParams(**{"max_tokens": None, **given})
    prompt = _read_stdin() if args.prompt is None else args.prompt
    with Engine(args.model, **{name: getattr(args, name) for name in _ENGINE}) as engine:
        num_tokens, start, first_token_s, code = 0, time.perf_counter(), 0.0, 0
        params = replace(engine.get_default_sampling_params(**_UNASKED), **given)
        stream = engine.stream(prompt, params)
        try:
            print(prompt, end="", flush=True)
            for output in stream:
                num_tokens += len(output.outputs[0].token_ids)
                first_token_s = output.metrics.first_token_s
                print(output.outputs[0].text, end="", flush=True)
        except KeyboardInterrupt:
            # Without the seed nobody could repeat what was interrupted.
            code = _EXIT_INTERRUPTED
        elapsed = time.perf_counter() - start
        # Ctrl-C ends a reader of our output, too.
        print(file=sys.stderr if code else sys.stdout, flush=True)
    rate = f"{num_tokens / elapsed:.1f} tok/s"
    first = f"first token after {1e3 * first_token_s:.0f} ms, " if num_tokens else ""
    print(f"{num_tokens} tokens, {rate}, {first}seed {args.seed}", file=sys.stderr)
    return code


def _read_stdin() -> str:
    with open(0, "rb", closefd=False) as stdin:
        content = stdin.read()
    try:
        text = content.decode()
    except UnicodeDecodeError as error:
        position = error.start
        message = f"stdin is not UTF-8: byte 0x{content[position]:02x} at position {position}"
        raise InvalidRequestError(message, "invalid_prompt") from None
    # The shell ends a line with it; it is no part of what was written.
    return re.sub(r"\r?\n\Z", "", text)
