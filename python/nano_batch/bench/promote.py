"""Results become the README's: copied, drawn, and written into its tables."""

import re
import shutil
from datetime import datetime
from pathlib import Path

from nano_batch.bench import latency, pictures, throughput
from nano_batch.bench import result as results
from nano_batch.bench.result import COMMITTED, Result
from nano_batch.bench.summary import median
from nano_batch.exceptions import NanoBatchError

PICTURES = Path("docs/pictures")
_DEVICES = ("cpu", "cuda")
_KINDS = ("throughput", "latency")


def promote(paths: list[Path], root: Path) -> list[Path]:
    """Take these results into a checkout; return what was written.

    Raises:
        NanoBatchError: A result is none that a README can show.

    """
    if not (root / results.SCHEMA).exists():
        raise NanoBatchError(f"{root} is no checkout of nano_batch: {results.SCHEMA} is not there")
    written = []
    for path in paths:
        result = results.read(path)
        name = f"{result.get('preset')}-{result.get('benchmark')}.json"
        if result.get("preset") not in _DEVICES or result.get("benchmark") not in _KINDS:
            raise NanoBatchError(f"{path} is no figure to keep: it is of {name!r}")
        target = root / COMMITTED / name
        if path.resolve() != target.resolve():
            shutil.copyfile(path, target)
        written.append(target)
    for name, svg in drawn(root).items():
        picture = root / PICTURES / f"{name}.svg"
        picture.parent.mkdir(parents=True, exist_ok=True)
        picture.write_text(svg, encoding="utf-8")
        written.append(picture)
    readme = root / "README.md"
    readme.write_text(rewritten(readme.read_text(encoding="utf-8"), root), encoding="utf-8")
    return [*written, readme]


def committed(root: Path) -> dict[str, Result]:
    """The results that a checkout holds, by name without its end."""
    names = [f"{device}-{kind}" for device in _DEVICES for kind in _KINDS]
    paths = {name: root / COMMITTED / f"{name}.json" for name in names}
    return {name: results.read(path) for name, path in paths.items() if path.exists()}


def drawn(root: Path) -> dict[str, str]:
    """The pictures of a checkout's results, by name."""
    svgs: dict[str, str] = {}
    for name, result in committed(root).items():
        svgs |= pictures.draw(result, f"{name}.json", peer(result, root))
    return svgs


def peer(result: Result, root: Path) -> Result | None:
    """What vLLM reached on the same card, as it is noted in a checkout."""
    path = root / COMMITTED / "vllm.json"
    if not path.exists():
        return None
    vllm = results.read(path)
    card = vllm["cards"].get(result["machine"].get("card"))
    return {**card, **{key: vllm[key] for key in ("name", "version", "date")}} if card else None


def rewritten(readme: str, root: Path) -> str:
    """The README with what stands between its markers made from the checkout's results."""
    for name, text in sections(root).items():
        begin, end = f"<!-- bench:{name} -->", f"<!-- /bench:{name} -->"
        if begin not in readme or end not in readme:
            raise NanoBatchError(f"README.md has no {begin} … {end}")
        between = re.compile(f"{re.escape(begin)}.*?{re.escape(end)}", re.DOTALL)
        whole = f"{begin}\n\n{text}\n\n{end}"
        readme = between.sub(whole.replace("\\", r"\\"), readme)
    return readme


def sections(root: Path) -> dict[str, str]:
    """What the README says, by marker."""
    found = committed(root)
    texts = {}
    for device in _DEVICES:
        parts = []
        if f"{device}-throughput" in found:
            result = found[f"{device}-throughput"]
            parts += [_heading(result), _throughput(result, peer(result, root))]
            parts += [_picture(device, kind) for kind in ("throughput", "scaling")]
        if f"{device}-latency" in found:
            result = found[f"{device}-latency"]
            parts += [_latency(result), _picture(device, "latency")]
        if parts:
            texts[device] = "\n\n".join(parts)
    old = root / COMMITTED / "cuda-h100-end-to-end.json"
    if old.exists():
        texts["vllm"] = _beside_vllm(results.read(old), results.read(old.with_name("vllm.json")))
    return texts


def _heading(result: Result) -> str:
    machine, workload, theirs = (result[key] for key in ("machine", "workload", "settings"))
    day = datetime.fromisoformat(result["time"]).date().isoformat()
    limits = results.limits_of(result)
    settings = ", ".join(f"{key} {value}" for key, value in theirs["transformers"].items())
    data = " and ".join(f"[{kind}]({COMMITTED}/{result['preset']}-{kind}.json)" for kind in _KINDS)
    return (
        f"{results.device_name(result)}, {day}: memory {limits.bytes_per_s / 1e9:,.0f} GB/s, "
        f"matrix products {limits.operations_per_s / 1e12:.2f} TFLOP/s, both measured; load "
        f"{machine['load_at_start']:.1f} before. {result['model']['name']} in bfloat16, "
        f"{workload['prompt_len']} tokens in and {workload['output_len']} out, greedy, median of "
        f"{result['runs']} runs; torch {result['versions']['torch']}. transformers: {settings}. "
        f"Raw data: {data}."
    )


def _throughput(result: Result, vllm: Result | None) -> str:
    serial = result["transformers"]["serial_toks"]
    rows = [(*row, rate / serial) for row in throughput.rows(result) for rate in [row[1]]]
    lines = [
        "| | tok/s | against one at a time | hardware's limit |",
        "| --- | ---: | ---: | ---: |",
    ]
    for name, rate, limit, times in rows:
        bound = f"{limit:,.0f}" if limit else ""
        lines.append(f"| {name} | {rate:,.1f} | {times:.1f} | {bound} |")
    for count in result["workload"]["concurrency"] if vllm else []:
        if vllm and f"scale{count}_toks" in vllm:
            rate = vllm[f"scale{count}_toks"]
            name = f"{vllm['name']} {vllm['version']} on {vllm['date']}, {count} at once"
            limit = result["limit"][f"scale{count}_toks"]
            lines.append(f"| {name} | {rate:,.0f} | {rate / serial:.1f} | {limit:,.0f} |")
    return "\n".join(lines)


def _latency(result: Result) -> str:
    most = str(result["workload"]["load"][-1])
    how = result["transformers"]["load"][most]["how"]
    lines = [
        "Requests that arrive at once, milliseconds, p50 · p99; transformers serves them one after "
        f"the other (at {most}: {how}), and time per token is (end - arrival) / tokens:",
        "",
        "| at once | first token: transformers | nano_batch | per token: transformers "
        "| nano_batch |",
        "| ---: | ---: | ---: | ---: | ---: |",
    ]
    values = {(side, count): rest for side, count, _, *rest in latency.rows(result)}
    for count in result["workload"]["load"]:
        theirs, ours = values["transformers", count], values["nano_batch", count]
        cells = [
            f"{side[at]:,.1f} · {side[at + 1]:,.1f}" for at in (0, 2) for side in (theirs, ours)
        ]
        lines.append(f"| {count} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _picture(device: str, kind: str) -> str:
    words = {
        "throughput": "Throughput beside transformers",
        "scaling": "Throughput by the number of requests at once",
        "latency": "Latency under load beside transformers",
    }
    where = "a GPU" if device == "cuda" else "a CPU"
    return f"![{words[kind]}, on {where}]({PICTURES}/{device}-{kind}.svg)"


def _beside_vllm(ours: Result, vllm: Result) -> str:
    theirs = vllm["cards"][ours["card"]]
    counts = (1, 16, 64, 256)
    mix = median(value for key, value in ours.items() if re.fullmatch(r"nano_run\d+_toks", key))

    def bursts(side: Result) -> str:
        return " · ".join(f"{side[f'scale{count}_toks']:,.0f}" for count in counts)

    rows = [
        ("time between tokens, one stream", "itl_bs1_ms", "{:.2f} ms"),
        ("first token", "ttft512_ms", "{:.1f} ms"),
        (f"{' · '.join(map(str, counts))} at once, tok/s", "", ""),
        ("256 requests of 100 to 1024 tokens in and out, tok/s", "nano_run_toks", "{:,.0f}"),
        ("prefill of 16 prompts of 2048, tok/s", "prefill_16x2048_toks", "{:,.0f}"),
    ]
    ours = {**ours, "nano_run_toks": mix}
    lines = [f"| | nano_batch | {vllm['name']} {vllm['version']} |", "| --- | ---: | ---: |"]
    for name, key, form in rows:
        cells = [form.format(side[key]) if key else bursts(side) for side in (ours, theirs)]
        lines.append(f"| {name} | {cells[0]} | {cells[1]} |")
    return "\n".join(lines)
