"""The command line of the scripts: flags, presets, help, and one line for whatever is wrong."""

import re
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import pytest
import torch

from nanocascade.cli import NonNegative, Share, describe, parse_args, run_main
from nanocascade.engine.device import find_device

ROOT = Path(__file__).parents[1]


@dataclass
class Base:
    out: str = ""  # where the run goes
    config: Literal["toy", "full"] = "toy"  # size of the run


@dataclass
class Config(Base):
    init: str = ""  # model directory to start from
    data: tuple[str, ...] = ()  # JSONL files, joined by commas
    lr: NonNegative = 1e-3  # peak learning rate, # as in Table 2
    steps: int = 3  # optimizer steps
    dry_run: bool = False  # print and exit


PRESETS = {"toy": {"out": "x"}, "full": {"lr": 3e-6, "steps": 180}}


@dataclass
class Other:
    """More"""

    gate: Literal["zero", "none"] = "zero"  # a choice
    # ---- Rare ----
    betas: tuple[Share, Share] = (0.9, 0.95)  # two numbers


def parse(argv):
    """An instance of Config; those of the other dataclass are not looked at."""
    return parse_args(Config, Other, preset=lambda x: PRESETS[x["config"]], argv=argv)[0]


@pytest.mark.parametrize(
    "argv, expected",
    [
        ([], {}),
        (["--lr", "2e-4", "--steps=7"], {"lr": 2e-4, "steps": 7}),
        (["--dry_run", "--init", "m"], {"dry_run": True, "init": "m"}),
        (["--dry_run", "false", "--init", ""], {}),
        (["--steps", "1", "--steps=2"], {"steps": 2}),
        (["--data", "a.jsonl,b.jsonl", "--lr", "0"], {"data": ("a.jsonl", "b.jsonl"), "lr": 0.0}),
        (
            ["--config", "full", "--steps", "9", "--out", "y"],
            {"config": "full", "lr": 3e-6, "steps": 9, "out": "y"},
        ),
    ],
)
def test_flags_and_presets(argv, expected):
    """Default < preset < flag, and every type is read as itself."""
    assert asdict(parse(argv)) == asdict(Config("x")) | expected


def test_device_is_found(monkeypatch):
    """A Mac's device is taken by one process; ranks could not talk there, so they take the CPU."""
    monkeypatch.delenv("NANOCASCADE_DEVICE")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert find_device("") == find_device("mps") == "mps"
    monkeypatch.setenv("NANOCASCADE_DEVICE", "cpu")
    assert find_device("") == "cpu" and find_device("mps") == "mps"
    monkeypatch.delenv("NANOCASCADE_DEVICE")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert find_device("") == "cpu"
    with pytest.raises(ValueError, match="--device mps: "):
        find_device("mps")


@pytest.mark.parametrize(
    "argv, words",
    [
        (["--stepz", "3"], ["unknown flag --stepz", "--steps"]),
        (["steps"], ["unknown flag steps"]),
        (["--zzzzzz"], ["unknown flag --zzzzzz", "--help"]),
        (["--steps", "1.5"], ["1.5", "int"]),
        (["--steps"], ["--steps needs", "int"]),
        (["--lr", "--dry_run"], ["--lr needs", "float"]),
        (["--dry_run", "maybe"], ["maybe", "true or false"]),
        (["--lr", "-1"], ["--lr -1", "float >= 0"]),
        (["--lr", "nan"], ["--lr nan", "float >= 0"]),
        (["--gate", "hard"], ["--gate hard", "zero or none"]),
        (["--betas", "0.9"], ["--betas 0.9", "float >= 0 and <= 1,float >= 0 and <= 1"]),
        (["--betas", "0.9,1.1"], ["--betas 0.9,1.1"]),
        (["--config", "huge"], ["--config huge", "toy or full"]),
    ],
)
def test_bad_flags_are_one_line(argv, words, capsys):
    """A wrong flag ends with code 2 and one line that says what would be right."""
    with pytest.raises(SystemExit) as stop:
        run_main(lambda: parse(argv))
    line = capsys.readouterr().err
    assert stop.value.code == 2 and line.startswith("error: ") and line.count("\n") == 1
    assert all(word in line for word in words), line


def test_help_shows_comments_and_the_presets_values(capsys):
    """--help prints the script's docstring and, under the headings of the dataclasses, each field's
    trailing comment, inherited ones too, with the value in force."""
    with pytest.raises(SystemExit) as stop:
        parse(["--config", "full", "--help"])
    text = capsys.readouterr().out
    assert stop.value.code == 0 and "The command line of the scripts" in text
    assert all(x in text for x in ("rate, # as in Table 2", "3e-06", "where the run"))
    assert re.search(r"\nMore:\n  --gate \(zero or none; now 'zero'\)\n +a choice\n\nRare:\n", text)


def test_run_main_turns_user_errors_into_one_line(capsys):
    """A missing file is one line and exit 2."""
    with pytest.raises(SystemExit) as stop:
        run_main(lambda: open("/nonexistent/model"))
    assert stop.value.code == 2 and "/nonexistent/model" in capsys.readouterr().err


def test_an_interrupt_is_one_line(capsys):
    """Ctrl-C prints no traceback and says how to go on."""

    def main():
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as stop:
        run_main(main)
    error = capsys.readouterr().err
    assert stop.value.code == 130 and "--resume" in error and "Traceback" not in error


def test_closed_pipe_is_no_error():
    """A reader that closes the pipe early, as in `--help | head`, leaves no message behind."""
    program = "from nanocascade.cli import run_main; run_main(lambda: print('x' * 10**6))"
    command = [sys.executable, "-c", program]
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        process.stdout.close()
        assert process.stderr.read() == "" and process.wait() == 1


def test_describe_holds_every_field():
    """What is printed is the resolved run: preset and flags, a line each."""
    cfg = parse(["--data", "a,b", "--config", "full", "--out", "y"])
    lines = describe(cfg).splitlines()
    assert len(lines) == len(asdict(cfg)) and "lr                   = 3e-06" in lines
