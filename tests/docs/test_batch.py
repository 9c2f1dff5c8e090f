"""The batch recipe's program, killed and started again."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from leftovers import wait_until
from pages import DOCS, program_environment, save_files

NUM_PROMPTS = 600


def write_prompts(path: Path) -> None:
    prompts = [{"prompt": f"number {number}", "max_tokens": 20, "temperature": 0} for number in range(NUM_PROMPTS)]
    lines = [json.dumps(prompt) for prompt in prompts]
    lines[6] = "this is no JSON"
    lines[7] = '["nor", "is", "this", "an", "object"]'
    path.write_text("".join(f"{line}\n" for line in lines))


def start(folder: Path, answers: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "batch.py", "prompts.jsonl", answers]
    return subprocess.Popen(command, cwd=folder, env=program_environment(), stderr=subprocess.PIPE)


def read(path: Path) -> dict[int, str]:
    """The answers by line; fails if there are two to one."""
    answers = [json.loads(line) for line in path.read_text().splitlines()]
    by_line = {answer["line"]: answer.get("text", answer.get("error")) for answer in answers}
    assert len(by_line) == len(answers)
    return by_line


def test_a_batch_that_is_killed_goes_on_where_it_was(workspace: Path) -> None:
    save_files(DOCS / "recipes" / "batch.md", workspace)
    program = (workspace / "batch.py").read_text()
    model = "__import__('asyncscale').SimulatedModel(base_ms=5)"
    slowed = program.replace('"smollm2-135m-instruct"', model)
    assert slowed != program
    (workspace / "batch.py").write_text(slowed)
    write_prompts(workspace / "prompts.jsonl")
    answers = workspace / "answers.jsonl"

    with start(workspace, "answers.jsonl") as killed:
        wait_until(lambda: answers.exists() and answers.read_bytes().count(b"\n") > 100, "some are answered", 30)
        killed.kill()
    torn = answers.read_bytes().rstrip(b"\n")[:-5]
    answers.write_bytes(torn)
    num_kept = torn.count(b"\n")
    assert 100 <= num_kept < NUM_PROMPTS - 1

    with start(workspace, "answers.jsonl") as resumed:
        assert resumed.stderr is not None
        progress = resumed.stderr.read().decode()
    assert resumed.returncode == 0, progress
    assert f"{num_kept}/{NUM_PROMPTS}" in progress
    assert f"{NUM_PROMPTS}/{NUM_PROMPTS}" in progress
    assert answers.read_bytes().startswith(torn[: torn.rindex(b"\n")])

    with start(workspace, "whole.jsonl") as whole:
        whole.communicate()
    assert read(answers) == read(workspace / "whole.jsonl")
    assert read(answers).keys() == set(range(1, NUM_PROMPTS + 1))
    assert read(answers)[7].startswith("JSONDecodeError")
    assert read(answers)[8].startswith("ValueError")


def test_a_batch_that_is_done_starts_nothing_anew(workspace: Path) -> None:
    save_files(DOCS / "recipes" / "batch.md", workspace)
    (workspace / "prompts.jsonl").write_text('{"prompt": "x", "max_tokens": 1}\n')
    (workspace / "answers.jsonl").write_text('{"line": 1, "text": "kept"}\n')
    with start(workspace, "answers.jsonl") as program:
        program.communicate()
    assert program.returncode == 0
    assert read(workspace / "answers.jsonl") == {1: "kept"}
