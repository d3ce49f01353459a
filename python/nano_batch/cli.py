"""The command `nano-batch`."""

import argparse
import logging
import sys
import time
from typing import NoReturn

from nano_batch import Engine, NanoBatchError, SamplingParams, __version__

_EXIT_FAILURE, _EXIT_USAGE, _EXIT_INTERRUPTED = 1, 2, 130


def main(argv: list[str] | None = None) -> NoReturn:
    """Run one command and exit: 0, 1 on failure, 2 on wrong usage, 130 on Ctrl-C."""
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
    except BrokenPipeError:
        # Whoever read our output has seen enough; say nothing when the interpreter flushes.
        sys.stdout = None
        sys.exit(_EXIT_FAILURE)
    except NanoBatchError as error:
        print(f"nano-batch: {error}", file=sys.stderr)
        sys.exit(_EXIT_FAILURE)


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
    engine = generate.add_argument_group("engine")
    add = engine.add_argument
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    add("--dtype", default="auto", help="auto, float32 or bfloat16")
    add("--max-model-len", type=int, help="tokens of prompt and output together")
    add("--gpu-memory-utilization", type=float, default=0.9, help="share that may be in use")
    add("--num-blocks", type=int, help="blocks of the KV cache")
    add("--kv-cache-gib", type=float, help="size of the KV cache")
    add("--num-threads", type=int, help="threads of a step (default: one per core)")
    add("--deterministic", action="store_true", help="the same bits in any batch, slower on a GPU")
    add("--load-format", default="auto", help="auto, or dummy for random weights")
    add("--revision", help="branch, tag or commit of a hub id")
    sampling = generate.add_argument_group("sampling")
    add = sampling.add_argument
    add("--max-tokens", type=int, default=128, help="tokens generated at most (%(default)s)")
    add("--min-tokens", type=int, default=0, help="tokens generated before a stop")
    add("--temperature", type=float, default=0.8, help="0 is greedy (%(default)s)")
    add("--top-p", type=float, default=1.0, help="nucleus sampling (%(default)s)")
    add("--top-k", type=int, default=0, help="most likely tokens kept; 0 is all")
    add("--min-p", type=float, default=0.0, help="least share of the best token's probability")
    add("--seed", type=int, help="the same seed gives the same tokens")
    add("--stop", action="append", help="a string that ends the text; may be repeated")
    add("--ignore-eos", action="store_true", help="go on after the end of the text")
    return parser


def _generate(args: argparse.Namespace) -> int:
    if args.prompt is None and sys.stdin.isatty():
        print("nano-batch generate: give --prompt, or a text on stdin", file=sys.stderr)
        return _EXIT_USAGE
    params = SamplingParams(
        temperature=args.temperature,
        top_p=args.top_p,
        top_k=args.top_k,
        min_p=args.min_p,
        seed=args.seed,
        stop=args.stop,
        ignore_eos=args.ignore_eos,
        max_tokens=args.max_tokens,
        min_tokens=args.min_tokens,
    )
    prompt = sys.stdin.read() if args.prompt is None else args.prompt
    with Engine(
        args.model,
        device=args.device,
        dtype=args.dtype,
        max_model_len=args.max_model_len,
        gpu_memory_utilization=args.gpu_memory_utilization,
        num_blocks=args.num_blocks,
        kv_cache_gib=args.kv_cache_gib,
        num_threads=args.num_threads,
        deterministic=args.deterministic,
        load_format=args.load_format,
        revision=args.revision,
    ) as engine:
        print(prompt, end="", flush=True)
        num_tokens, start, first_token_s = 0, time.perf_counter(), 0.0
        for output in engine.stream(prompt, params):
            num_tokens += len(output.outputs[0].token_ids)
            first_token_s = output.metrics.first_token_s
            print(output.outputs[0].text, end="", flush=True)
        elapsed = time.perf_counter() - start
        print(flush=True)
    rate = f"{num_tokens / elapsed:.1f} tok/s"
    first = f"first token after {1e3 * first_token_s:.0f} ms"
    print(f"{num_tokens} tokens, {rate}, {first}", file=sys.stderr)
    return 0
