"""Results become the README's: copied, drawn, and written into its tables."""

import re
import shutil
from pathlib import Path

from nano_batch.bench import pictures
from nano_batch.bench import result as results
from nano_batch.bench.result import COMMITTED, Result
from nano_batch.bench.tables import beside_vllm, conditions, describe, table, wrapped
from nano_batch.bench.workload import PRESETS
from nano_batch.exceptions import NanoBatchError

PICTURES = Path("docs/pictures")
# Where results are shown, and by which markers.
PAGES = {"README.md": ("cpu", "cuda", "vllm"), "docs/benchmarks.md": ("steps",)}
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
    # All are looked at before any is copied.
    for path, name in [(path, _name(path)) for path in paths]:
        target = root / COMMITTED / name
        if path.resolve() != target.resolve():
            shutil.copyfile(path, target)
        written.append(target)
    for name, svg in drawn(root).items():
        picture = root / PICTURES / f"{name}.svg"
        picture.parent.mkdir(parents=True, exist_ok=True)
        picture.write_text(svg, encoding="utf-8")
        written.append(picture)
    for page, names in PAGES.items():
        path = root / page
        text = rewritten(path.read_text(encoding="utf-8"), names, root)
        path.write_text(text, encoding="utf-8")
        written.append(path)
    return written


def _name(path: Path) -> str:
    """What a result is called once it is the README's, which shows the presets' workloads alone."""
    result = results.read_measured(path)
    preset = PRESETS.get(result["preset"])
    if preset is None:
        raise NanoBatchError(f"{path} is no figure to keep: its preset is {result['preset']!r}")
    expected: Result = {"prompt_len": preset.prompt_len, "output_len": preset.output_len}
    if result["benchmark"] == "throughput":
        expected["concurrency"] = list(preset.concurrency)
    for key, value in expected.items():
        if result["workload"][key] != value:
            raise NanoBatchError(
                f"{path} is not the README's workload: its {key} is {result['workload'][key]}, "
                f"where {preset.name} has {value}"
            )
    if not re.fullmatch(r"[0-9a-f]{7,40}", result["commit"]):
        raise NanoBatchError(
            f"{path} is of no commit that others have: it says {result['commit']!r}"
        )
    return f"{result['preset']}-{result['benchmark']}.json"


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
    """What vLLM reached on such a card, as it is noted in a checkout."""
    path = root / COMMITTED / "vllm.json"
    if not path.exists():
        return None
    vllm = results.read(path)
    card = vllm["cards"].get(result["machine"].get("card"))
    return {**card, **{key: vllm[key] for key in ("name", "version", "date")}} if card else None


def rewritten(page: str, names: tuple[str, ...], root: Path) -> str:
    """A page with what stands between these markers made from the checkout's results."""
    texts = sections(root)
    for name in names:
        if name not in texts:
            continue
        begin, end = f"<!-- bench:{name} -->", f"<!-- /bench:{name} -->"
        if begin not in page or end not in page:
            raise NanoBatchError(f"a page has lost its {begin} … {end}")
        before, rest = page.split(begin, 1)
        page = f"{before}{begin}\n\n{texts[name]}\n\n{end}{rest.split(end, 1)[1]}"
    return page


def sections(root: Path) -> dict[str, str]:
    """What the pages say, by marker."""
    found = committed(root)
    texts = {}
    for device in _DEVICES:
        parts = []
        data = {kind: f"[Raw data]({COMMITTED}/{device}-{kind}.json)." for kind in _KINDS}
        first = found.get(f"{device}-throughput")
        if first:
            parts += [wrapped(f"{describe(first)} {data['throughput']}")]
            parts += [table(first, peer(first, root))]
            parts += [_picture(device, kind) for kind in ("throughput", "scaling")]
        if f"{device}-latency" in found:
            result = found[f"{device}-latency"]
            # Requests and settings are said once where both runs have the same.
            theirs = "transformers"
            same = first and first["settings"][theirs] == result["settings"][theirs]
            words = conditions(result) if same else describe(result)
            parts += [wrapped(f"{words} {data['latency']}")]
            parts += [table(result), _picture(device, "latency")]
        if parts:
            texts[device] = "\n\n".join(parts)
    steps = [
        _picture(device, "steps").replace("docs/", "")
        for device in _DEVICES
        if f"{device}-throughput" in found
    ]
    if steps:
        texts["steps"] = "\n\n".join(steps)
    by_card = sorted((root / COMMITTED).glob("cuda-*-end-to-end.json"), reverse=True)
    if by_card:
        ours = [results.read(path) for path in by_card]
        sources = [
            f"[{it['card']}]({COMMITTED}/{path.name}), commit {it['commit']}"
            for path, it in zip(by_card, ours, strict=True)
        ]
        vllm = results.read(root / COMMITTED / "vllm.json")
        words = wrapped(f"Raw data: {'; '.join(sources)}; [vLLM]({COMMITTED}/vllm.json).")
        texts["vllm"] = f"{beside_vllm(ours, vllm)}\n\n{words}"
    return texts


def _picture(device: str, kind: str) -> str:
    words = {
        "throughput": "Throughput beside transformers",
        "scaling": "Throughput by the number of requests at once",
        "latency": "Latency under load beside transformers",
        "steps": "Where the time of a decode step goes",
    }
    where = "a GPU" if device == "cuda" else "a CPU"
    return f"![{words[kind]}, on {where}]({PICTURES}/{device}-{kind}.svg)"
