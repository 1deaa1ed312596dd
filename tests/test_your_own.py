"""docs/your-own.md: its diffs apply, its functions give the numbers it prints, its commands run."""

import json
import re
import runpy
import shlex
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from fixtures.toy_runs import ROOT

from nanocascade.checkpoint import save_model
from nanocascade.model import Model, ModelConfig
from nanocascade.tokenizer import Tokenizer
from nanocascade.toy.start import build_toy_tokenizer

SECTION = re.compile(r"^## (.*?)\n(.*?)(?=^## |\Z)", re.M | re.S)
BLOCK = re.compile(r"^```(\w+) ?(\S*)\n(.*?)^```$", re.M | re.S)
SECTIONS = dict(SECTION.findall((ROOT / "docs/your-own.md").read_text("utf-8")))
SHORT = (
    "--steps 1 --prompts 2 --rollouts 8 --max_new_tokens 8 --micro_tokens 512 --max_rows 16"
    " --device cpu --thinking false --max_norm 0 --eval_max_new_tokens 8 --own_eval_samples 2"
)
ROW = {"responses_create_params": {"input": [{"role": "user", "content": "Write A."}]}}


def blocks(section, language):
    """Texts of a section's code blocks in one language."""
    return [text for kind, _, text in BLOCK.findall(SECTIONS[section]) if kind == language]


def apply_diff(text, root):
    """Apply a unified diff below `root`. A hunk's old lines must stand once in its file, and the
    counts of its header must be right; its line numbers may be old, as for git apply."""
    hunk = r"^@@ -\d+,(\d+) \+\d+,(\d+) @@\n((?:[ +-].*\n)+?)(?=@@|--- a/|\Z)"
    for name, hunks in re.findall(
        r"^--- a/(\S+)\n\+\+\+ b/\1\n(.*?)(?=^--- a/|\Z)", text, re.M | re.S
    ):
        source = (root / name).read_text("utf-8")
        for num_old, num_new, body in re.findall(hunk, hunks, re.M):
            lines = body.splitlines(keepends=True)
            old = [line[1:] for line in lines if line[0] in " -"]
            new = [line[1:] for line in lines if line[0] in " +"]
            assert (len(old), len(new)) == (int(num_old), int(num_new)), body
            assert f"\n{source}".count("\n" + "".join(old)) == 1, f"{name} has not once:\n{body}"
            source = f"\n{source}".replace("\n" + "".join(old), "\n" + "".join(new))[1:]
        (root / name).write_text(source, "utf-8")


@pytest.fixture
def package(tmp_path, monkeypatch):
    """package(sections...): a copy of the program with their diffs and files, in the place of the
    imported package until the test ends. It is also the current directory."""

    def loaded():
        return {x: m for x, m in sys.modules.items() if x.split(".")[0] == "nanocascade"}

    def forget():
        for name in loaded():
            del sys.modules[name]

    originals = loaded()

    def make(*sections):
        copy = tmp_path / "copy"
        shutil.copytree(ROOT / "nanocascade", copy / "nanocascade")
        for script in ROOT.glob("train_*.py"):
            shutil.copy(script, copy)
        for section in sections:
            for _, name, text in BLOCK.findall(SECTIONS[section]):
                if name:
                    (copy / name).write_text(text, "utf-8")
            for diff in blocks(section, "diff"):
                apply_diff(diff, copy)
        forget()
        monkeypatch.syspath_prepend(copy)
        monkeypatch.chdir(copy)
        return copy

    yield make
    forget()  # the copy's modules
    sys.modules.update(originals)


def commands(section):
    return [shlex.split(x) for text in blocks(section, "bash") for x in text.splitlines()]


def execute(monkeypatch, command, *flags):
    """Run `python SCRIPT ...` or `python -m MODULE ...` of a page in this process."""
    assert command[0] == "python"
    if command[1] == "-m":
        monkeypatch.setattr(sys, "argv", command[2:])
        return runpy.run_module(command[2], run_name="__main__", alter_sys=True)
    monkeypatch.setattr(sys, "argv", [*command[1:], *flags])
    return runpy.run_path(command[1], run_name="__main__")


def make_model(path):
    """A model that ignores its prompt: A, B, a line end or the end of the turn, 23 % each.

    Embeddings of ones keep the last hidden state near ones, so a head row of 6 / 16 on 16 channels
    is a logit of about 6: e^6 = 403 against 259 other tokens of logit 0.
    """
    build_toy_tokenizer(path)
    tokenizer = Tokenizer(path)
    config = ModelConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=16,
        pattern="*-",
        head_dim=8,
        intermediate_size=16,
        max_position_embeddings=1024,
        eos_token_ids=tuple(tokenizer.eos_ids),
    )
    model = Model(config).reset_parameters(0)
    with torch.no_grad():
        model.embed.weight.fill_(1.0)
        model.head.weight.zero_()
        model.head.weight[[*b"AB\n", *tokenizer.eos_ids]] = 6 / 16
    save_model(model, path, tokenizer)


def write_rows(path, **fields):
    path.write_text("".join(json.dumps({"id": str(i), **ROW, **fields}) + "\n" for i in range(40)))


def metrics_of(out):
    return json.loads((Path(out) / "metrics.jsonl").read_text().splitlines()[0])


def test_numbers_reward(package):
    """Lines that begin with s, e, a earn 1, whatever their case; other lines 0; no word, no row."""
    package("A reward")
    from nanocascade.rewards import check_row, kind_of, score

    (row,) = map(json.loads, blocks("A reward", "json"))
    assert kind_of(row) == "acrostic"
    assert score(row, "Sand\n\n each\n  A wave").value == 1
    assert score(row, "<think>\nhm\n</think>\nsand\neach\nalga").value == 1
    bad = score(row, "sand\neach\nalga\nsea")
    assert bad.value == 0 and "'seas'" in bad.reason
    assert score(row, "").value == score(row, "<think>\ns\ne\na").value == 0
    with pytest.raises(ValueError, match="word of letters"):
        check_row(row | {"acrostic": "no word"})


def test_run_domain(package, monkeypatch, capsys):
    """The domain's commands run one after the other: rows split, a GRPO step, a MOPD step that the
    new teacher teaches."""
    copy = package("A reward", "A domain and its teacher in MOPD")
    make_model(copy / "MODEL_DIR")
    make_model(copy / "STUDENT_DIR")
    lines = [{"id": str(i), **ROW, "acrostic": "AB"[i % 2]} for i in range(40)]
    for i, line in enumerate(lines):  # a prompt of its own each, or the split would keep them whole
        line["responses_create_params"] = {"input": [{"role": "user", "content": f"Row {i}"}]}
    (copy / "acrostics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    split, *training = commands("A domain and its teacher in MOPD")
    execute(monkeypatch, split)
    assert "0 rows cannot be used" in capsys.readouterr().out
    for command in training:
        execute(monkeypatch, command, *SHORT.split())
    rl = metrics_of("runs/out-acrostic")
    assert 0 < rl["reward/mean/acrostic"] < 1 and rl["grad_norm"] > 0
    mopd = metrics_of("runs/out-mopd")
    assert mopd["mopd/token_share/acrostic"] == 1 and "mopd/reverse_kl/acrostic" in mopd


def test_run_dr_grpo(package, monkeypatch):
    """With the constant denominator the gradient is N / (R * L) of ours on the same samples:
    R = 16 responses of at most L = 8 tokens, N tokens in all."""
    (command,) = commands("Dr. GRPO")
    instruction = {"instruction_id_list": ["keywords:letter_frequency"]}
    kwargs = {"letter": "a", "let_frequency": 1, "let_relation": "at least"}
    norms = {}
    for sections in ((), ("Dr. GRPO",)):
        copy = package(*sections)
        make_model(copy / "MODEL_DIR")
        write_rows(copy / "rows.jsonl", **instruction, kwargs=[kwargs])
        execute(monkeypatch, command, "--domains", "if", *SHORT.split())
        metrics = metrics_of("runs/out-dr-grpo")
        norms[sections] = metrics["grad_norm"]
        shutil.rmtree(copy)
    num_tokens = metrics["response/length"] * 16
    ours, constant = norms.values()
    assert ours > 0 and num_tokens < 16 * 8
    assert constant / ours == pytest.approx(num_tokens / (16 * 8), rel=1e-4)


def test_dapo(package, monkeypatch):
    """384 of 512 tokens are not punished, 448 by 1/4, 512 by 1/2; the outcome stays. In a
    run of the command every reward is the verdict less the punishment."""
    copy = package("DAPO")
    changed = runpy.run_path(str(copy / "nanocascade/rollouts/groups.py"))
    punish_overlong = changed["punish_overlong"]
    lengths = (384, 448, 512)
    group = [SimpleNamespace(response_length=n, reward=1.0, outcome=1.0) for n in lengths]
    punish_overlong([group], limit=512, buffer=0)
    assert [x.reward for x in group] == [1.0, 1.0, 1.0]
    punish_overlong([group], limit=512, buffer=128)
    assert [x.reward for x in group] == [1.0, 0.75, 0.5] and {x.outcome for x in group} == {1.0}

    (command,) = commands("DAPO")
    make_model(copy / "MODEL_DIR")
    write_rows(copy / "rows.jsonl", instruction_id_list=["punctuation:no_comma"], kwargs=[{}])
    limits = "--max_new_tokens 2 --overlong_buffer 2 --domains if --log_groups 2"
    execute(monkeypatch, command, *SHORT.split(), *limits.split())
    records = [json.loads(x) for x in Path("runs/out-dapo/rollouts.jsonl").read_text().splitlines()]
    # Two tokens are the limit and the buffer: each token costs 1/4 of a verdict of 0 or 1.
    verdicts = [x["reward"] + 0.25 * len(x["tokens"]["text"]) for x in records]
    assert len(verdicts) == 16 and set(verdicts) == {0.0, 1.0}


def test_another_model(tmp_path, monkeypatch, capsys):
    """The block writes a qwen3 directory of the size that it prints, and the command trains it."""
    monkeypatch.chdir(tmp_path)
    run_block("Another model directory", tmp_path, capsys)
    config = json.loads(Path("tiny-qwen3/config.json").read_text())
    assert config["model_type"] == "qwen3" and config["num_hidden_layers"] == 2
    (command,) = commands("Another model directory")
    Path("rows.jsonl").write_text(json.dumps({"question": "3 + 4?", "answer": "7"}) + "\n")
    shutil.copy(ROOT / "train_rl.py", tmp_path)
    execute(monkeypatch, command, *SHORT.split())
    assert Path("runs/out-tiny/model.safetensors").exists()


def test_another_template(tmp_path, monkeypatch, capsys):
    """A template of the directory's own writes the text, and the mask covers the answer alone."""
    pytest.importorskip("jinja2")
    monkeypatch.chdir(tmp_path)
    run_block("Another chat template", tmp_path, capsys)


def run_block(section, path, capsys):
    """Run a section's Python block; it must print the text block that follows it."""
    (code,), (expected,) = blocks(section, "python"), blocks(section, "text")
    (path / "block.py").write_text(code, "utf-8")
    capsys.readouterr()
    runpy.run_path(str(path / "block.py"))
    assert capsys.readouterr().out == expected
