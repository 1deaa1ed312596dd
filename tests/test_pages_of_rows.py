"""docs/rewards.md and docs/data.md: their worked example applies, and their rows are read."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from nanocascade.data.rows import read_rows
from nanocascade.rewards import VERIFIERS

ROOT = Path(__file__).parents[1]
TRY = """
import json, sys
from nanocascade.data.rows import normalize
from nanocascade.rewards import score
from nanocascade.stages import RL_STAGES
row = normalize(json.loads(sys.argv[1]), "rows:1")
values = [score(row, x).value for x in ("fig\\npear", "pear\\nfig", "<think>fig\\npear</think>")]
print(json.dumps([row["domain"], values, RL_STAGES["if_rl"]["domains"]]))
"""


def blocks(page, language):
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / "docs" / page).read_text("utf-8"), re.S)


def test_a_new_domain_is_one_file_one_entry_and_one_line(tmp_path):
    """The three blocks of docs/rewards.md, put where it says, make a domain that is graded."""
    module, entry, line = blocks("rewards.md", "python")
    (row,) = blocks("rewards.md", "json")
    package = tmp_path / "nanocascade"
    shutil.copytree(ROOT / "nanocascade", package, ignore=shutil.ignore_patterns("__pycache__"))
    (package / "rewards/sorting.py").write_text(module)
    for name, old, new in (
        ("rewards/__init__.py", "import choice,", "import sorting, choice,"),
        ("rewards/__init__.py", "VERIFIERS = {\n", "VERIFIERS = {\n" + entry),
        ("stages.py", '        domains={"if": 1.0},\n', line),
    ):
        text = (package / name).read_text()
        assert text.count(old) == 1, old
        (package / name).write_text(text.replace(old, new))
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    command = [sys.executable, "-c", TRY, row]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == ["sorting", [1, 0, 0], {"if": 0.8, "sorting": 0.2}]


def test_rows_of_the_page(tmp_path):
    """Every row of docs/data.md has the domain that the page says, and every verifier its line in
    the table of docs/rewards.md."""
    (rows,) = blocks("data.md", "json")
    path = tmp_path / "rows.jsonl"
    path.write_text(rows)
    page = (ROOT / "docs/data.md").read_text("utf-8")
    domains = re.search(r"Their domains are ([\w, ]+)\.", page)[1].split(", ")
    assert [row["domain"] for row in read_rows(path, sft=None)] == domains
    table = (ROOT / "docs/rewards.md").read_text("utf-8")
    assert not [x for x in VERIFIERS if not re.search(rf"^\| (?:\w+, )?{x}\b", table, re.M)]
