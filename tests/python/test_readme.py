"""The commands and examples of the README, of docs/ and of examples/ run as written."""

import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = {
    str(path.relative_to(ROOT)): path.read_text(encoding="utf-8")
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
}
README = PAGES["README.md"]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    page: str
    language: str
    content: str
    line: int

    def __str__(self):
        return f"{self.page}:{self.line}"


BLOCKS = [
    Block(page, match[1], match[2], text[: match.start()].count("\n") + 1)
    for page, text in PAGES.items()
    for match in FENCE.finditer(text)
]
PROGRAMS = [block for block in BLOCKS if block.language == "python"]
SHELL = ("sh", "bash", "shell", "console")


def commands_of(block):
    """The command lines of a block, without prompt signs, comments and, in a console, output."""
    lines = block.content.splitlines()
    if block.language == "console":
        lines = [line[2:] for line in lines if line.startswith("$ ")]
    without_comments = (re.sub(r"(^|\s)#.*$", "", line).strip() for line in lines)
    return [line for line in without_comments if line]


# In the order of the pages: a later one may need what an earlier one wrote.
COMMANDS = list(
    dict.fromkeys(
        command for block in BLOCKS if block.language in SHELL for command in commands_of(block)
    )
)


def environment():
    """That of a person's terminal: nothing of the `make` that may be running this test."""
    inherited = {"MAKEFLAGS", "MAKELEVEL", "MFLAGS", "MAKEOVERRIDES"}
    return {name: value for name, value in os.environ.items() if name not in inherited}


def run(command):
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", command],
        cwd=ROOT,
        env=environment(),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def check_make_run(command):
    """Runs it, unless something would have to be built first: then its recipe is looked at."""
    is_built = subprocess.run(
        ["make", "-q", f"{ROOT}/.venv/.built"], cwd=ROOT, env=environment(), capture_output=True
    )
    if is_built.returncode == 0:
        assert len(run(command)) > 100
    else:
        assert "nano-batch generate" in run(command.replace("make", "make -n", 1))


def check_make_test(command):
    """It is what runs this test; here its recipe must hold both halves."""
    recipe = run(command.replace("make", "make -n", 1))
    assert "cargo test" in recipe
    assert "-m pytest" in recipe


def check_named_in_ci(command):
    """Too heavy, or of no use, inside a test: CI runs it, word by word."""
    assert command in (ROOT / ".ci/run").read_text(encoding="utf-8").splitlines()


def check_make_bench(command):
    """It takes minutes; its commands do run here, with --quick."""
    recipe = run(command.replace("make", "make -n", 1))
    for what in ("throughput", "latency", "plot"):
        assert f"nano-batch bench {what}" in recipe


def check_make_bench_kernels(command):
    """It takes minutes; here every bench that it names must be there."""
    recipe = run(command.replace("make", "make -n", 1))
    manifests = "".join(path.read_text("utf-8") for path in ROOT.glob("crates/*/Cargo.toml"))
    names = re.findall(r'^\[\[bench\]\]\nname = "(\w+)"', manifests, re.MULTILINE)
    assert sorted(re.findall(r"--bench (\w+)", recipe)) == sorted(names)
    assert re.sub(r'^.*BENCH="(.*)"$', r"\1", command) in recipe or "BENCH" not in command


# What is not simply run.
SPECIAL = {
    "make run": check_make_run,
    "make test": check_make_test,
    "make lint": check_named_in_ci,
    "make bench": check_make_bench,
    "make bench-kernels": check_make_bench_kernels,
    'make bench-kernels BENCH="--save-baseline before"': check_make_bench_kernels,
    'make bench-kernels BENCH="--baseline before"': check_make_bench_kernels,
    "pip install .": check_named_in_ci,
}
# What is not run at all, by a part of the command, and why.
SKIPPED = {
    "--device cuda": "needs a GPU, and minutes of it",
    "bench promote": "changes README.md; test_bench.py runs it over a copy",
    "/tmp/llama": "compiles llama.cpp, and measures for minutes",
}


def test_the_readme_has_examples_of_every_kind():
    assert {"make run", "make test"} <= set(COMMANDS)
    assert any("nano-batch generate" in command for command in COMMANDS)
    assert len(PROGRAMS) >= 2
    known = {"python", "text", "", *SHELL}
    assert {block.language for block in BLOCKS} <= known, "what would this test do with them?"


def check_program(*arguments):
    done = subprocess.run(
        [sys.executable, "-W", "error", *arguments],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout.strip()
    return done.stdout


@pytest.mark.parametrize(
    ("prompt", "seed"), [("Elinor and Marianne", 2), ('"My dear Mr. Bennet," said his lady,', 3)]
)
def test_the_samples_come_as_they_stand(prompt, seed):
    options = ["--top-p", "0.95", "--max-tokens", "90", "--seed", str(seed)]
    text = check_program("-m", "nano_batch", "generate", "--prompt", prompt, *options)
    quoted = " ".join(re.findall(r"^> ?(.*)$", README, re.MULTILINE)).replace("**", "")
    # Other processors may round otherwise, and sooner or later choose another token.
    first_words = " ".join(text.split()[:30])
    assert first_words in " ".join(quoted.split())


@pytest.mark.parametrize("block", PROGRAMS, ids=str)
def test_a_python_example_runs_as_written(block):
    output = check_program("-c", block.content)
    # What an example claims to show is shown.
    assert "False" not in re.findall(r"the same \w+: (\w+)", output)
    claims = re.findall(r"running at the same time: (\d+)", output)
    assert claims == ["2"] * block.content.count("running at the same time:")


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*.py")), ids=lambda it: it.name)
def test_an_example_runs(path):
    check_program(path)


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_runs_as_written(command):
    for part, reason in SKIPPED.items():
        if part in command:
            pytest.skip(reason)
    check = SPECIAL.get(command)
    if check:
        check(command)
    else:
        assert run(command).strip()


def test_every_link_to_a_file_leads_somewhere():
    missing = [
        (page, link)
        for page, text in PAGES.items()
        for link in re.findall(r"\]\(([^)#]+)\)", text)
        if "://" not in link and not (ROOT / page).parent.joinpath(link).exists()
    ]
    assert missing == []


def test_every_file_that_a_page_names_is_there():
    """In backquotes, with a folder; a star stands for several, braces for each of them."""
    missing = []
    for page, text in PAGES.items():
        for name in re.findall(r"`((?:crates|python|benches|tests|docs)/[\w./*{},-]+)`", text):
            head, *rest = re.split(r"[{}]", name)
            names = [head + one + rest[1] for one in rest[0].split(",")] if rest else [name]
            # Where results go is made by the first of them.
            if "results/" not in name:
                missing += [(page, one) for one in names if not list(ROOT.glob(one))]
    assert missing == []


def test_no_placeholder_is_left():
    for page, text in PAGES.items():
        text = FENCE.sub("", text)
        assert re.findall(r"^[A-Z_]+$|TODO|TBD", text, re.MULTILINE) == [], page
