"""docs/your-model.md: its lines of Python run as they stand there."""

import os
import re

from conftest import ROOT, read_rows, write_rows
from forked import CONTEXT


def run_lines(lines: str, folder) -> None:
    os.chdir(folder)
    exec(compile(lines, "docs/your-model.md", "exec"), {})


def test_the_stages_run_from_python(tiny, tmp_path):
    page = (ROOT / "docs/your-model.md").read_text("utf-8")
    [lines] = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    (tmp_path / "MODEL").symlink_to(tiny)
    prompts = [{"prompt": f"question {i}"} for i in range(4)]
    write_rows(tmp_path / "better.jsonl", [{**row, "response": "good"} for row in prompts])
    write_rows(tmp_path / "worse.jsonl", [{**row, "response": "bad"} for row in prompts])
    # in a process of its own: the lines open a process group
    child = CONTEXT.Process(target=run_lines, args=(lines, tmp_path))
    child.start()
    child.join(120)
    assert child.exitcode == 0
    pairs = read_rows(tmp_path / "runs/mine/pairs.jsonl")
    assert [pair["chosen"] for pair in pairs] == ["good"] * 4
    assert (tmp_path / "runs/mine/policy/model.safetensors").is_file()
