"""The README's commands and examples run as written."""

import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    language: str
    content: str
    line: int

    def __str__(self):
        return f"{self.language} at line {self.line}"


BLOCKS = [
    Block(match[1], match[2], README[: match.start()].count("\n") + 1)
    for match in FENCE.finditer(README)
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


COMMANDS = [
    command for block in BLOCKS if block.language in SHELL for command in commands_of(block)
]


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


# What is not simply run.
SPECIAL = {
    "make run": check_make_run,
    "make test": check_make_test,
    "make lint": check_named_in_ci,
    "pip install .": check_named_in_ci,
}


def test_the_readme_has_examples_of_every_kind():
    assert {"make run", "make test"} <= set(COMMANDS)
    assert any("nano-batch generate" in command for command in COMMANDS)
    assert len(PROGRAMS) >= 2
    known = {"python", "text", "", *SHELL}
    assert {block.language for block in BLOCKS} <= known, "what would this test do with them?"


@pytest.mark.parametrize("block", PROGRAMS, ids=str)
def test_a_python_example_runs_as_written(block):
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", block.content],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout.strip()


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_runs_as_written(command):
    check = SPECIAL.get(command)
    if check:
        check(command)
    elif command.startswith("make bench"):
        assert "benches/end_to_end.py" in run(command.replace("make", "make -n", 1))
    else:
        assert run(command).strip()


def test_every_link_to_a_file_leads_somewhere():
    links = re.findall(r"\]\(([^)#]+)\)", README)
    missing = [link for link in links if "://" not in link and not (ROOT / link).exists()]
    assert missing == []


def test_no_placeholder_is_left():
    text = FENCE.sub("", README)
    assert re.findall(r"^[A-Z_]+$|TODO|TBD", text, re.MULTILINE) == []
