"""The command `nano-batch`: what it prints where, and its exit codes."""

import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
from pathlib import Path

import nano_batch
import pytest
from recital_model import TEXT

COMMANDS = {
    "nano-batch": [str(Path(sysconfig.get_path("scripts")) / "nano-batch")],
    "python -m nano_batch": [sys.executable, "-m", "nano_batch"],
}
GREEDY = ["--temperature", "0", "--device", "cpu", "--dtype", "float32"]


@pytest.fixture(params=COMMANDS)
def command(request):
    return COMMANDS[request.param]


def run(command, *arguments, text=None):
    return subprocess.run(
        [*command, *map(str, arguments)], input=text, capture_output=True, text=True, timeout=120
    )


def test_generate_streams_the_continuation_to_stdout(command, reciting_dir):
    done = run(command, "generate", reciting_dir, "--prompt", "?", *GREEDY)
    assert (done.returncode, done.stdout) == (0, f"?{TEXT}\n")
    assert "tok/s" in done.stderr
    assert "26 tokens" in done.stderr


@pytest.mark.parametrize(
    ("text", "prompt"), [("🙂?", "🙂?"), ("🙂?\n", "🙂?"), ("\n🙂?\n\n", "\n🙂?\n")]
)
def test_generate_reads_the_prompt_from_stdin_up_to_its_last_newline(text, prompt, reciting_dir):
    arguments = ["generate", reciting_dir, "--max-tokens", "5", *GREEDY]
    done = run(COMMANDS["nano-batch"], *arguments, text=text)
    assert (done.returncode, done.stdout) == (0, f"{prompt}wörl\n")


def test_bytes_that_are_no_text_are_refused_by_position(command, reciting_dir):
    generate = [*command, "generate", reciting_dir]
    for arguments, bytes_in in [(["--prompt", b"ab\xff"], b""), ([], b"ab\xff\n")]:
        done = subprocess.run(
            [*generate, *arguments], input=bytes_in, capture_output=True, timeout=120
        )
        assert (done.returncode, done.stdout) == (1, b"")
        assert len(done.stderr.splitlines()) == 1
        assert b"position 2" in done.stderr
        assert (b"stdin is not UTF-8: byte 0xff" in done.stderr) == bool(bytes_in)


@pytest.mark.parametrize(
    ("text", "prompt"), [(b"?\r\n?\r", b"?\r\n?\r"), (b"?\r\n?\r\n", b"?\r\n?")]
)
def test_newlines_within_stdin_stay_as_they_are(text, prompt, reciting_dir):
    arguments = ["generate", str(reciting_dir), "--max-tokens", "1", *GREEDY]
    done = subprocess.run(
        [*COMMANDS["nano-batch"], *arguments], input=text, capture_output=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(prompt)
    assert done.stdout[len(prompt) :][:1] not in (b"\r", b"\n")


def test_a_flag_wins_over_the_model_and_the_model_over_the_default(reciting_dir, tmp_path):
    directory = tmp_path / "model"
    shutil.copytree(reciting_dir, directory)
    path = directory / "generation_config.json"
    path.write_text('{"do_sample": false, "max_new_tokens": 5}', encoding="utf-8")
    arguments = ["generate", directory, "--prompt", "?", "--device", "cpu", "--dtype", "float32"]
    assert run(COMMANDS["nano-batch"], *arguments).stdout == "?wörl\n"
    whole = run(COMMANDS["nano-batch"], *arguments, "--max-tokens", "100")
    assert whole.stdout == f"?{TEXT}\n"
    hot = [*arguments, "--temperature", "1e6", "--seed", "1"]
    assert run(COMMANDS["nano-batch"], *hot).stdout != "?wörl\n"
    # Five is the model's, which a flag alone may contradict.
    refused = run(COMMANDS["nano-batch"], *arguments, "--min-tokens", "6")
    assert (refused.returncode, refused.stdout) == (2, "")
    assert "6 with max_tokens 5" in refused.stderr


def test_make_run_hands_over_a_prompt_as_it_is(tmp_path):
    prompt = """it's "a" `echo ran` $(echo ran) $HOME $$ # no comment"""
    (tmp_path / "bin").mkdir()
    command = tmp_path / "bin" / "nano-batch"
    command.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n', encoding="utf-8")
    command.chmod(0o755)
    for name in (".deps", ".built"):
        (tmp_path / name).touch()
    root = Path(__file__).resolve().parents[2]
    environment = {name: it for name, it in os.environ.items() if not name.startswith("MAKE")}
    for variables, settings in [([f"PROMPT={prompt}"], {}), ([], {"PROMPT": prompt})]:
        done = subprocess.run(
            ["make", "run", f"VENV={tmp_path}", *variables],
            cwd=root,
            env={**environment, **settings},
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.stdout == f"generate\n--prompt={prompt}\n", done.stderr


def test_generate_without_a_model_runs_the_embedded_one():
    arguments = ["generate", "--prompt", "It is a truth", "--max-tokens", "12", "--seed", "1"]
    first, second = (run(COMMANDS["nano-batch"], *arguments) for _ in range(2))
    assert first.returncode == 0, first.stderr
    assert first.stdout.startswith("It is a truth")
    assert len(first.stdout) > 20
    assert first.stdout == second.stdout


def test_without_a_seed_each_run_draws_one_and_tells_it():
    arguments = ["generate", "--prompt", "It is a truth", "--max-tokens", "12"]
    first, second = (run(COMMANDS["nano-batch"], *arguments) for _ in range(2))
    assert first.stdout != second.stdout
    seed = first.stderr.split("seed ")[1].strip()
    assert run(COMMANDS["nano-batch"], *arguments, "--seed", seed).stdout == first.stdout


def test_generate_takes_stop_strings(reciting_dir):
    stops = ["--stop", "never", "--stop", "こ🙂"]
    done = run(COMMANDS["nano-batch"], "generate", reciting_dir, "--prompt", "?", *stops, *GREEDY)
    assert (done.returncode, done.stdout) == (0, "?wörld日語\n")


@pytest.mark.parametrize(
    "arguments", [[], ["fly"], ["generate", "--max-tokens", "many"], ["generate", "--wings"]]
)
def test_wrong_usage_exits_with_2(arguments, command):
    done = run(command, *arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert "usage:" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["/no/such/model"], ["/no/such/model"]),
        (["--device", "cuda:77"], ["no CUDA device"]),
        (["--max-model-len", "3"], ["max_model_len", "3"]),
    ],
)
def test_a_failure_is_one_sentence_and_exits_with_1(arguments, words, command):
    check_refused(command, arguments, words, 1)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--temperature", "-1"], ["temperature", "-1"]),
        (["--top-p", "0"], ["top_p", "(0, 1]", "0"]),
        (["--max-tokens", "0"], ["max_tokens", "0"]),
        (["--dtype", "int3"], ["dtype", "int3"]),
        (["--device", "cpu", "--kv-cache-gib", "1e-9"], ["kv_cache_gib", "0.000000001"]),
        (["--num-blocks", "8", "--kv-cache-gib", "1"], ["exclude each other"]),
    ],
)
def test_a_wrong_value_is_one_sentence_and_exits_with_2(arguments, words, command):
    check_refused(command, arguments, words, 2)


def check_refused(command, arguments, words, code):
    done = run(command, "generate", *arguments, "--prompt", "a long prompt, as prompts go")
    assert done.returncode == code
    assert "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    for word in words:
        assert word in done.stderr


def test_ctrl_c_exits_with_130(command, reciting_dir):
    arguments = ["generate", reciting_dir, "--prompt", "?", "--ignore-eos", *GREEDY]
    with subprocess.Popen(
        [*command, *map(str, arguments), "--max-tokens", "60000"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        assert process.stdout.read(4) == b"?w\xc3\xb6"
        process.send_signal(signal.SIGINT)
        try:
            _, errors = process.communicate(timeout=60)
        except subprocess.TimeoutExpired:
            process.kill()
            raise
    assert process.returncode == 130, errors
    assert b"Traceback" not in errors
    # What repeats the run.
    assert re.search(rb"^\d+ tokens, .*, seed \d+$", errors, re.MULTILINE)


def test_a_reader_that_leaves_ends_the_program_quietly(command, reciting_dir):
    arguments = ["generate", reciting_dir, "--prompt", "?", "--ignore-eos", *GREEDY]
    with subprocess.Popen(
        [*command, *map(str, arguments), "--max-tokens", "60000"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        process.stdout.read(4)
        process.stdout.close()
        errors = process.stderr.read()
        process.wait(timeout=60)
    assert process.returncode != 0
    assert b"Traceback" not in errors
    assert b"Exception ignored" not in errors


def test_what_stdout_has_no_character_for_is_escaped(command, reciting_dir):
    generate = [*command, "generate", str(reciting_dir), "--prompt", "é?", *GREEDY]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "1"}
    done = subprocess.run(generate, env=environment, capture_output=True, timeout=120)
    assert done.returncode == 0, done.stderr
    escaped = f"é?{TEXT}\n".encode("ascii", errors="backslashreplace")
    assert done.stdout == escaped


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full on this system")
def test_a_full_device_is_told_in_one_line(command, reciting_dir):
    arguments = ["generate", reciting_dir, "--prompt", "?", *GREEDY]
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [*command, *map(str, arguments)], stdout=full, stderr=subprocess.PIPE, text=True
        )
    assert done.returncode == 1
    assert done.stderr.splitlines() == ["nano-batch: [Errno 28] No space left on device"]


def test_a_closed_stdin_is_no_input(command):
    done = run(["bash", "-c", '"$@" <&-', "bash", *command], "generate")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "nano-batch generate: give --prompt, or a text on stdin\n"


def test_it_tells_its_version(command):
    done = run(command, "--version")
    assert (done.returncode, done.stdout) == (0, f"nano-batch {nano_batch.__version__}\n")


def test_help_names_every_option_in_the_constructors_words():
    text = run(COMMANDS["nano-batch"], "generate", "--help").stdout
    for flag in ("--device", "--dtype", "--max-model-len", "--num-blocks"):
        assert flag in text
    # One prompt runs, beside which none joins.
    assert "--max-itl-ms" not in text
