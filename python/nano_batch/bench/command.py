"""The arguments of `nano-batch bench` and what they start."""

import argparse
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from nano_batch.bench import latency, result, tables, throughput, workload
from nano_batch.bench.side import Task
from nano_batch.exceptions import InvalidRequestError, NanoBatchError

_WHERE = f"{result.LOCAL}, or {result.ELSEWHERE} outside a checkout"


def add(commands: Any) -> None:
    """Add `bench` and its own commands to those of the program."""
    text = "measure nano_batch beside transformers, and draw the pictures"
    bench = commands.add_parser("bench", help=text, description=text)
    bench.set_defaults(verbose=False)
    kinds = bench.add_subparsers(required=True, metavar="WHAT")
    _add_measure(kinds, "throughput", _throughput, "tokens a second, by requests at once")
    _add_measure(kinds, "latency", _latency, "time to the first token and per token, under load")
    plot = _add(kinds, "plot", _plot, "draw pictures beside results (needs matplotlib)")
    promote = _add(
        kinds, "promote", _promote, "make results the README's, with pictures and tables"
    )
    for command in (plot, promote):
        command.add_argument(
            "results",
            nargs="*",
            type=Path,
            metavar="JSON",
            help=f"(default: those of the last runs, in {_WHERE})",
        )


def _add(kinds: Any, name: str, run: Callable[[argparse.Namespace], int], text: str) -> Any:
    command = kinds.add_parser(name, help=text, description=text)
    command.set_defaults(run=run)
    return command


def _add_measure(
    kinds: Any, name: str, run: Callable[[argparse.Namespace], int], text: str
) -> None:
    command = _add(kinds, name, run, text)
    option = command.add_argument
    option("--device", choices=("auto", "cpu", "cuda"), default="auto", help="(%(default)s)")
    option(
        "--quick", action="store_true", help="the embedded model, in seconds: no figures to keep"
    )
    option(
        "--runs", type=_positive, default=3, help="of each side, its median counts (%(default)s)"
    )
    option(
        "--serial",
        type=_positive,
        metavar="N",
        help="requests that transformers serves one after the other in each run",
    )
    option(
        "--threads",
        type=_positive,
        default=len(os.sched_getaffinity(0)),
        help="of a CPU (default: every core that the process may use)",
    )
    option("--input-len", type=_positive, metavar="N", help="tokens of a prompt")
    option("--output-len", type=_at_least_2, metavar="N", help="tokens of an answer")
    option("--seed", type=int, default=0, help="of the prompts (%(default)s)")
    option("--commit", type=_commit, help="noted where there is no git (default: git's)")
    option("--out", type=Path, metavar="JSON", help=f"(default: in {_WHERE})")
    if name == "throughput":
        option(
            "--concurrency",
            type=_positive,
            nargs="+",
            metavar="N",
            help="requests of nano_batch at once",
        )
        option(
            "--llama-python",
            metavar="PYTHON",
            help="measure llama.cpp too, with this interpreter, which has llama_cpp and gguf",
        )


def _require(package: str, why: str) -> None:
    if find_spec(package) is None:
        raise NanoBatchError(f"{package} is missing; it {why}")


def _positive(text: str, least: int = 1) -> int:
    value = int(text)
    if value < least:
        raise argparse.ArgumentTypeError(f"must be at least {least}, got {value}")
    return value


def _at_least_2(text: str) -> int:
    # Times between tokens need two of them.
    return _positive(text, 2)


def _commit(text: str) -> str:
    # Asked for now: the schema would refuse it once everything is measured.
    if not re.fullmatch(r"[0-9a-f]{7,40}", text):
        raise argparse.ArgumentTypeError(f"must be the hash of a commit, got {text!r}")
    return text


def _throughput(args: argparse.Namespace) -> int:
    return _measure(args, "throughput")


def _latency(args: argparse.Namespace) -> int:
    return _measure(args, "latency")


def _measure(args: argparse.Namespace, kind: str) -> int:
    _require("torch", "measures the machine: pip install '.[bench]'")
    _require("transformers", "is what is measured beside: pip install '.[bench]'")
    if args.quick and args.device == "cuda":
        raise InvalidRequestError("--quick is for the CPU: add --device cpu", "invalid_config")
    device = "cpu" if args.quick else _device(args.device)
    chosen = workload.quick() if args.quick else workload.PRESETS[device]
    llama = _llama(args.llama_python, chosen) if kind == "throughput" else None
    lengths = (args.input_len or chosen.prompt_len, args.output_len or chosen.output_len)
    name = f"{chosen.name}-{kind}"
    if lengths != (chosen.prompt_len, chosen.output_len):
        chosen = replace(chosen, prompt_len=lengths[0], output_len=lengths[1])
        name += f"-{lengths[0]}-{lengths[1]}"
    if args.serial:
        chosen = replace(chosen, serial=(args.serial, args.serial))
    if kind == "throughput" and args.concurrency:
        chosen = replace(chosen, concurrency=tuple(sorted(set(args.concurrency))))
    local = result.local()
    out = args.out or local / f"{name}.json"
    _require_writable(out)
    options = {**vars(args), "busy_cores_at_start": result.busy_cores()}
    if device == "cpu" and options["busy_cores_at_start"] > 0.1:
        busy = options["busy_cores_at_start"]
        throughput.note(f"the machine is busy ({busy:.1f} cores): figures will be low")
    model = workload.make_model(chosen, local)
    task = Task(
        model=str(model),
        device=device,
        num_threads=args.threads,
        longest=chosen.longest,
        answer_len=chosen.prompt_len + chosen.output_len,
        num_blocks=chosen.num_blocks,
        concurrency=chosen.concurrency,
    )
    if kind == "throughput":
        measured = throughput.measure(chosen, task, options, llama)
    else:
        measured = latency.measure(chosen, task, options)
    result.write(measured, out)
    print(f"{tables.describe(measured)}\n\n{tables.table(measured)}")
    print(out, file=sys.stderr)
    return 0


def _llama(python: str | None, chosen: workload.Workload) -> list[str] | None:
    """The command of llama.cpp's side, checked before anything is measured."""
    if python is None:
        return None
    script = result.checkout() / "benches/llama_cpp_side.py"
    if chosen.name != "cpu":
        message = f"--llama-python is for the CPU's workload, not for {chosen.name}"
    elif not script.exists():
        message = f"--llama-python needs a checkout of nano_batch: {script} is not there"
    elif shutil.which(python) is None:
        message = f"--llama-python: {python} is no program"
    else:
        return [python, str(script)]
    raise InvalidRequestError(message, "invalid_config")


def _require_writable(out: Path) -> None:
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out.parent):
            pass
        if out.exists() and not (out.is_file() and os.access(out, os.W_OK)):
            raise PermissionError(f"{out} cannot be replaced")
    except OSError as error:
        raise NanoBatchError(f"the result cannot be written to {out}: {error}") from None


def _device(asked: str) -> str:
    import torch

    if asked == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if asked == "cuda" and not torch.cuda.is_available():
        raise InvalidRequestError("--device cuda: torch finds no GPU", "no_cuda_device")
    return asked


def _plot(args: argparse.Namespace) -> int:
    _require("matplotlib", "draws the pictures: pip install '.[bench]'")
    from nano_batch.bench import pictures, promote

    chosen = _chosen(args)
    if not chosen:
        raise NanoBatchError(
            f"{result.local()} has no results: nano-batch bench throughput makes one"
        )
    for path in chosen:
        measured = result.read_measured(path)
        peer = promote.peer(measured, result.checkout())
        for name, svg in pictures.draw(measured, path.name, peer).items():
            picture = path.with_name(f"{name}.svg")
            picture.write_text(svg, encoding="utf-8")
            print(picture)
    return 0


def _promote(args: argparse.Namespace) -> int:
    _require("matplotlib", "draws the pictures: pip install '.[bench]'")
    from nano_batch.bench import promote

    for path in promote.promote(_chosen(args), result.checkout()):
        print(path)
    return 0


def _chosen(args: argparse.Namespace) -> list[Path]:
    if args.results:
        return list(args.results)
    local = result.local()
    kinds = [
        f"{device}-{kind}.json" for device in ("cpu", "cuda") for kind in ("throughput", "latency")
    ]
    return [local / name for name in kinds if (local / name).exists()]
