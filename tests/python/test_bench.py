"""`nano-batch bench`: its results follow the schema, and README and pictures follow the results."""

import json
import re
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
from jsonschema import Draft202012Validator
from nano_batch import cli
from nano_batch.bench import latency, pictures, promote, roofline, summary, tables, workload
from nano_batch.bench import result as results
from nano_batch.bench.side import Side, Task
from nano_batch.exceptions import NanoBatchError

ROOT = Path(__file__).resolve().parents[2]
SCHEMA = Draft202012Validator(json.loads((ROOT / "benches/schema.json").read_text("utf-8")))
COMMITTED = promote.committed(ROOT)
# Also those of other shapes.
KEPT = {
    path.stem: json.loads(path.read_text("utf-8"))
    for kind in ("throughput", "latency")
    for path in sorted((ROOT / "benches/results").glob(f"*-{kind}*.json"))
}


def bench(directory, *arguments):
    done = subprocess.run(
        [sys.executable, "-m", "nano_batch", "bench", *map(str, arguments)],
        cwd=directory,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert "Traceback" not in done.stderr
    return done


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """One quick run of each benchmark: file and content by name."""
    directory = tmp_path_factory.mktemp("bench")
    results = {}
    for kind in ("throughput", "latency"):
        path = directory / f"{kind}.json"
        quick = ("--quick", "--runs", 1, "--device", "cpu", "--threads", 1)
        done = bench(directory, kind, *quick, "--out", path)
        assert done.returncode == 0, done.stderr
        assert "nano_batch |" in done.stdout
        assert "attn_implementation sdpa, use_cache True" in done.stdout
        results[kind] = (path, json.loads(path.read_text("utf-8")))
    return results


@pytest.mark.parametrize("kind", ["throughput", "latency"])
def test_a_result_follows_the_schema(kind, measured):
    _, result = measured[kind]
    SCHEMA.validate(result)
    assert result["benchmark"] == kind


def test_a_result_that_lacks_something_does_not_follow_the_schema(measured):
    for kind, key in [("throughput", "limit"), ("latency", "settings"), ("latency", "machine")]:
        result = dict(measured[kind][1])
        del result[key]
        assert not SCHEMA.is_valid(result)
    result = dict(measured["throughput"][1])
    result["nano_batch"] = result["nano_batch"] | {"scale1_toks": "fast"}
    assert not SCHEMA.is_valid(result)


def test_rates_are_those_of_the_raw_times(measured):
    _, result = measured["throughput"]
    for count in result["workload"]["concurrency"]:
        (elapsed,) = result["nano_batch"][f"scale{count}_s"]
        tokens = count * result["workload"]["output_len"]
        assert result["nano_batch"][f"scale{count}_toks"] == pytest.approx(tokens / elapsed)


def test_both_sides_compute_the_same_model(measured):
    agreement = measured["throughput"][1]["agreement"]["nano_batch"]
    assert agreement["furthest_logit_by_spread"] < 0.2


def test_a_result_says_with_how_many_requests_each_side_was_warmed_up(measured):
    for kind, theirs in [("throughput", 4), ("latency", 1)]:
        settings = measured[kind][1]["settings"]
        said = "one whole request, then {} at once, 4 tokens out"
        assert settings["nano_batch"]["warm_up"] == said.format("1, 2 and 4")
        assert settings["transformers"]["warm_up"] == said.format(theirs)


def test_both_sides_are_warm_before_their_latency_is_measured(monkeypatch):
    bursts = {"nano_batch": [], "transformers": []}

    class Side:
        def __init__(self, name):
            self.name = name

        def burst(self, prompts, output_len):
            bursts[self.name].append((len(prompts), output_len))

    def in_turns(_, plan, runs):
        for run in range(runs):
            for name in bursts:
                plan[name](Side(name), run)
        raise NanoBatchError("far enough")

    monkeypatch.setattr(latency, "in_turns", in_turns)
    with pytest.raises(NanoBatchError, match="far enough"):
        latency.measure(workload.quick(), None, {"seed": 0, "runs": 2})
    timed = {"nano_batch": [(1, 8)] * 3 + [(2, 8), (4, 8)], "transformers": [(1, 8)] * 2}
    warm_up = {"nano_batch": [(1, 8), (1, 4), (2, 4), (4, 4)], "transformers": [(1, 8), (1, 4)]}
    assert bursts == {name: warm_up[name] + 2 * timed[name] for name in bursts}


def test_pictures_are_drawn_beside_results_and_are_the_same_each_time(measured, tmp_path):
    copies = []
    for path, _ in measured.values():
        copies.append(tmp_path / path.name)
        copies[-1].write_bytes(path.read_bytes())
    done = bench(tmp_path, "plot", *copies)
    assert done.returncode == 0, done.stderr
    drawn = {path.stem: path.read_text("utf-8") for path in tmp_path.glob("*.svg")}
    kinds = ("throughput", "scaling", "steps", "latency")
    assert set(drawn) == {f"quick-{kind}" for kind in kinds}
    # In another process, and a second time in this one.
    for _ in range(2):
        for path, result in measured.values():
            for name, svg in pictures.draw(result, path.name).items():
                assert svg == drawn[name]


def test_a_picture_follows_light_and_dark_and_has_text_as_text(measured):
    path, result = measured["throughput"]
    for svg in pictures.draw(result, path.name).values():
        ElementTree.fromstring(svg)
        assert "prefers-color-scheme: dark" in svg
        assert "tokens a second</text>" in svg or "milliseconds</text>" in svg
        assert result["time"][:10] in svg
        # Every color has a name, so that none stays light on a dark page.
        styles, drawing = svg.split("</style>", 1)
        assert "#0969da" in styles
        assert not [color for color in ("#0969da", "#1f2328", "#000000") if color in drawing]


def test_a_quick_result_is_not_promoted(measured, tmp_path):
    done = bench(ROOT, "promote", measured["throughput"][0])
    assert done.returncode == 1
    assert "no figure to keep" in done.stderr
    done = bench(tmp_path, "promote", measured["throughput"][0])
    assert (done.returncode, len(done.stderr.splitlines())) == (1, 1)
    assert "no checkout" in done.stderr


def test_promotion_copies_draws_and_writes_the_readme(tmp_path):
    for name in ("benches/schema.json", "benches/results/vllm.json", *promote.PAGES):
        target = tmp_path / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes((ROOT / name).read_bytes())
    paths = []
    rate = 1234.5
    for kind in ("throughput", "latency"):
        result = json.loads(json.dumps(COMMITTED[f"cpu-{kind}"]))
        if kind == "throughput":
            result["nano_batch"]["scale4_toks"] = rate
        paths.append(tmp_path / f"{kind}.json")
        paths[-1].write_text(json.dumps(result), encoding="utf-8")
    done = bench(tmp_path, "promote", *paths)
    assert done.returncode == 0, done.stderr
    readme = (tmp_path / "README.md").read_text("utf-8")
    assert re.search(rf"^\| 4 \|.*\| {tables._rate(rate)} \|", readme, re.MULTILINE)
    assert (tmp_path / "benches/results/cpu-latency.json").exists()
    for name in ("throughput", "scaling", "latency"):
        assert f"docs/pictures/cpu-{name}.svg" in readme
        assert (tmp_path / f"docs/pictures/cpu-{name}.svg").exists()
    assert "pictures/cpu-steps.svg" in (tmp_path / "docs/benchmarks.md").read_text("utf-8")
    # Nothing is left to do.
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert bench(tmp_path, "promote", tmp_path / "benches/results/cpu-latency.json").returncode == 0
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"workload": {"prompt_len": 128}}, "prompt_len is 128"),
        ({"workload": {"output_len": 64}}, "output_len is 64"),
        ({"workload": {"concurrency": [1, 16]}}, "concurrency is [1, 16]"),
        ({"preset": "quick"}, "no figure to keep"),
        ({"commit": f"{'a' * 40} with changes"}, "with changes"),
        ({"commit": "unknown"}, "unknown"),
    ],
)
def test_a_result_that_is_not_the_readmes_is_not_promoted(change, word, tmp_path):
    result = COMMITTED["cpu-throughput"]
    for key, value in change.items():
        result = result | {key: result[key] | value if isinstance(value, dict) else value}
    path = tmp_path / "other.json"
    path.write_text(json.dumps(result), encoding="utf-8")
    with pytest.raises(NanoBatchError) as error:
        promote.promote([path], ROOT)
    assert word in str(error.value)


@pytest.mark.parametrize("name", KEPT)
def test_a_committed_result_follows_the_schema(name):
    SCHEMA.validate(KEPT[name])


@pytest.mark.parametrize("name", KEPT)
def test_the_command_of_a_committed_result_is_documented(name):
    command = " ".join(KEPT[name]["command"])
    # What says where it ran, not what.
    command = re.sub(r" --(commit|out) \S+", "", command)
    page = (ROOT / "docs/benchmarks.md").read_text("utf-8")
    commands = [
        " ".join(results.without_folders(it.split())) for it in re.findall(r"`([^`\n]+)`", page)
    ]
    assert f"nano-batch {command}" in commands


def test_a_command_is_kept_without_folders():
    command = ["--out", "/root/out/a.json", "--out=/b/c.json", "--seed", "1"]
    assert results.without_folders(command) == ["--out", "a.json", "--out=c.json", "--seed", "1"]


def test_words_name_every_load_that_was_computed_and_every_change():
    assert "at 8 and 32: computed from 4 a run" in tables.queued(COMMITTED["cpu-latency"])
    assert "at 8 and 32: computed from 6 a run" in tables.queued(COMMITTED["cuda-latency"])
    dirty = COMMITTED["cpu-latency"] | {"commit": f"{'a' * 40} with changes"}
    assert "commit aaaaaaaaaaaa with changes;" in tables.describe(dirty)


def test_words_tell_how_many_values_stand_behind_a_p99():
    assert tables.behind_p99(COMMITTED["cpu-latency"]) == "p99 is of 9 to 96 values."


@pytest.mark.parametrize("page", promote.PAGES)
def test_a_page_says_what_the_committed_results_say(page):
    text = (ROOT / page).read_text("utf-8")
    assert promote.rewritten(text, promote.PAGES[page], ROOT) == text


def test_the_pictures_are_those_of_the_committed_results():
    for name, svg in promote.drawn(ROOT).items():
        picture = ROOT / promote.PICTURES / f"{name}.svg"
        assert picture.read_text("utf-8") == svg, f"{picture}: nano-batch bench promote draws it"


def test_a_request_in_a_queue_waits_for_those_before_it():
    alone = [{"first_s": [1.0], "last_s": [10.0]}, {"first_s": [2.0], "last_s": [20.0]}]
    queue = latency.in_queue(alone, 5)
    assert queue["first_s"] == [1.0, 12.0, 31.0, 42.0, 61.0]
    assert queue["last_s"] == [10.0, 30.0, 40.0, 60.0, 70.0]


def test_percentiles_and_spread():
    assert summary.percentiles(range(101)) == {"p50": 50, "p99": 99}
    assert summary.spread([3.0, 1.0, 2.0]) == (2.0, 1.0, 1.0)


def test_bytes_and_operations_are_those_counted_by_hand():
    shapes = roofline.Shapes(workload.MISTRAL_7B)
    # 32 layers of qkv, o, gate_up and down, and the head; see docs/kernels.md.
    layer = 6144 * 4096 + 4096 * 4096 + 28672 * 4096 + 4096 * 14336
    assert shapes.parameters_read == 32 * layer + 32000 * 4096
    assert shapes.kv_bytes_per_token == 32 * 4096
    step = roofline.decode_step(shapes, roofline.Limits(1e12, 1e15), num_seqs=64, context=512)
    assert step.kv_cache_s == pytest.approx(64 * 512 * 32 * 4096 / 1e12)
    assert step.bound_s == pytest.approx(step.weights_s + step.kv_cache_s)


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["plot", "/no/such.json"], "/no/such.json"),
        (["plot"], "nano-batch-results"),
        (["plot", ROOT / "benches/results/vllm.json"], "not a result of throughput or latency"),
        (["plot", ROOT / "benches/results/cuda-h100-kernels.json"], "not a result of throughput"),
        (["latency", "--quick", "--out", "/dev/null/out.json"], "/dev/null/out.json"),
        (["latency", "--quick", "--out", "/"], "cannot be written to /"),
    ],
)
def test_a_failure_is_one_sentence(arguments, word, tmp_path):
    check_refused(tmp_path, arguments, word, 1)


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["throughput", "--device", "cpu", "--llama-python", "python"], "needs a checkout"),
        (["throughput", "--quick", "--device", "cuda"], "--device cpu"),
        (["throughput", "--quick", "--device", "cpu", "--llama-python", "python"], "llama"),
    ],
)
def test_a_wrong_value_is_one_sentence(arguments, word, tmp_path):
    check_refused(tmp_path, arguments, word, 2)


def check_refused(directory, arguments, word, code):
    done = bench(directory, *arguments)
    assert (done.returncode, len(done.stderr.splitlines())) == (code, 1)
    assert word in done.stderr


def test_an_interpreter_that_is_not_there_is_noticed_before_anything_is_measured():
    check_refused(ROOT, ["throughput", "--device", "cpu", "--llama-python", "/nope"], "/nope", 2)


def test_a_side_that_has_ended_is_a_failure_of_its_own():
    task = Task("", "cpu", 1, longest=1, answer_len=1, num_blocks=1, concurrency=(1,))
    with Side("peer", task, [sys.executable, "-c", "print('{}')"]) as side:
        side._process.wait(60)
        with pytest.raises(NanoBatchError, match="peer failed: it ended without an answer"):
            side.call("memory")


def test_a_quick_look_is_at_the_cpu_where_there_is_a_gpu(monkeypatch, tmp_path):
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    devices = []

    def measure(_, task, *others):
        devices.append(task.device)
        raise NanoBatchError("far enough")

    monkeypatch.setattr(latency, "measure", measure)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        cli.main(["bench", "latency", "--quick"])
    assert devices == ["cpu"]


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["speed"],
        ["latency", "--runs", "0"],
        ["latency", "--output-len", "1"],
        ["latency", "--commit", "main"],
    ],
)
def test_wrong_usage_exits_with_2(arguments, tmp_path):
    done = bench(tmp_path, *arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert "usage:" in done.stderr
