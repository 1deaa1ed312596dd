"""Every script runs through its command line, leaves what it promises, and survives a kill."""

import hashlib
import json
import random
import re
import shutil
import signal
import sys
import time

import pytest
import torch
from fixtures import toy_runs
from fixtures.machine import confinement
from fixtures.toy_runs import ROOT, TINY_EVAL, lasting, run, run_here, start

from nanocascade.checkpoint.weights import load_model
from nanocascade.stages import MOPD_SHARES, RL_STAGES, TEACHER_OF
from nanocascade.toy import tasks

FILES = {
    "config.json",
    "generation_config.json",
    "manifest.json",
    "metrics.jsonl",
    "model.safetensors",
    "rollouts.jsonl",
    "tokenizer.json",
    "tokenizer_config.json",
}
rows, sft, skilled = toy_runs.rows, toy_runs.sft, toy_runs.skilled  # fixtures
MANIFEST = {
    "stage",
    "parent",
    "teachers",
    "data",
    "seed",
    "config",
    "evaluation",
    "references",
    "seconds",
    "peak_kib",
    "commit",
    "versions",
}

RECORD = {
    "step",
    "domain",
    "group",
    "prompt",
    "response",
    "reward",
    "reason",
    "advantage",
    "stop_reason",
    "tokens",
}

# The table of docs/metrics.md: what each script logs at every step.
ALWAYS = {
    "step",
    "entropy",
    "grad_norm",
    "lr",
    "moe/load_max",
    "tokens_per_s",
    "time/train",
    "time/elapsed",
    "memory/peak_gib",
}
ROLLOUT = {
    "reward/mean",
    "reward/mean/DOMAIN",
    "reward/std/DOMAIN",
    "outcome/DOMAIN",
    "outcome/drawn",
    "group/all_right",
    "group/all_wrong",
    "group/tried",
    "response/length",
    "response/truncated",
    "mismatch/prob_error",
    "mismatch/k3",
    "ratio/mean",
    "ratio/max",
    "time/rollout",
    "time/score",
}
METRICS = {
    "sft": ALWAYS | {"loss/token", "batch/tokens"},
    "rl": ALWAYS | ROLLOUT,
    # The fixture's few stored answers are to other questions: nothing is right or wrong here.
    "rlhf": ALWAYS | ROLLOUT - {"outcome/drawn", "outcome/DOMAIN"} | {"kl/reference"},
    "gated": ALWAYS | ROLLOUT | {"gate/out_of_band"},  # RL has no gate unless asked for one
    "mopd": ALWAYS
    | ROLLOUT
    | {
        "gate/out_of_band",
        "mopd/reverse_kl",
        "mopd/reverse_kl/TEACHER",
        "mopd/token_share/DOMAIN",
        "mopd/prompt_share/DOMAIN",
    },
}
LIMITS = {"max_new_tokens": 72, "max_tokens": 0, "max_turns": 4}  # of an evaluation
TINY_RL = ("--steps", 2, "--prompts", 2, "--rollouts", 2, "--toy_rows", 12, "--eval_data", "")


def metrics_of(out) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def sha256(out) -> str:
    return hashlib.sha256((out / "model.safetensors").read_bytes()).hexdigest()


def names_of(records: list[dict]) -> set[str]:
    """Names of metrics, domains and teachers generalised: "outcome/mcqa" -> "outcome/DOMAIN"."""
    ends = dict.fromkeys(TEACHER_OF.values(), "TEACHER")
    ends |= dict.fromkeys(tasks.GENERATORS, "DOMAIN")
    found = set()
    for name in (name for record in records for name in record):
        base, _, end = name.rpartition("/")
        kind = "TEACHER" if base == "mopd/reverse_kl" else ends.get(end, end)
        found.add(f"{base}/{kind}" if base else name)
    return found


def check_left(out, kind: str, extra=frozenset()) -> dict:
    """Files, manifest and names of metrics are the documented ones; the manifest."""
    assert {x.name for x in out.iterdir()} == FILES | extra
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest.keys() == MANIFEST and manifest["config"]["out"] == str(out)
    records = metrics_of(out)
    assert [x["step"] for x in records] == list(range(manifest["config"]["steps"]))
    assert names_of(records) == METRICS[kind]
    assert all(x["tokens_per_s"] > 0 for x in records)
    readme = (ROOT / "docs/metrics.md").read_text()
    assert not {x for x in names_of(records) - {"step"} if x.removesuffix("/TEACHER") not in readme}
    return manifest


def check_rollouts(out, *more: str) -> list[dict]:
    """Every logged rollout is whole: the documented keys, a text and a value for each token, and
    log-probs of the training forward that are the sampler's."""
    rollouts = [json.loads(x) for x in (out / "rollouts.jsonl").open()]
    assert rollouts and all(x.keys() == RECORD for x in rollouts)
    for x in rollouts:
        tokens = x["tokens"]
        assert "".join(tokens["text"]) == x["response"]
        if "1" in tokens["loss"]:
            assert tokens.keys() == {"text", "loss", "logprob", "log_ratio", "entropy", *more}
            assert len({len(values) for values in tokens.values()}) == 1
            assert max(tokens["logprob"]) <= 0 <= min(tokens["entropy"])
            assert max(map(abs, tokens["log_ratio"])) < 1e-3
    return rollouts


def test_run_sft(sft):
    """SFT leaves a model, scores of all that it teaches, and answers to be compared with later."""
    manifest = check_left(sft, "sft", {"references.jsonl"})
    assert manifest["stage"] == "sft" and manifest["parent"] is None
    assert manifest["evaluation"].keys() == tasks.SFT_SHARES.keys()
    assert manifest["evaluation"]["math"]["after"].keys() == {"mean", "n", "interval", *LIMITS}
    assert load_model(sft).config.pattern == "MEM*E"


@pytest.mark.parametrize("stage", RL_STAGES)
def test_run_rl(stage, sft, tmp_path, monkeypatch):
    """Every stage of the table trains from SFT, logs its own metrics and names its parent."""
    if stage == "swe_agentic_rl" and confinement()[0]:
        pytest.skip("programs of a repository need the sandbox")
    kind = {"math_rl": "gated", "rlhf": "rlhf"}.get(stage, "rl")
    evaluated = ("--eval_data", "toy", "--gate_low", 0.5, "--max_turns", 6, *TINY_EVAL)
    evaluated = evaluated if kind == "gated" else ()
    run_here(
        monkeypatch,
        "train_rl.py",
        "--stage",
        stage,
        "--init",
        sft,
        "--out",
        tmp_path / "o",
        *TINY_RL,
        *evaluated,
    )
    manifest = check_left(tmp_path / "o", kind)
    assert manifest["parent"] == {"path": str(sft), "sha256": manifest["parent"]["sha256"]}
    evaluation = manifest["evaluation"]
    assert evaluation.keys() == set(tasks.DOMAINS if evaluated else ())
    limits = LIMITS | {"n": 2, "max_turns": 6}  # the parent's scores, of 4, were not taken over
    assert all(y.items() >= limits.items() for x in evaluation.values() for y in x.values())
    rollouts = check_rollouts(tmp_path / "o")
    assert {x["domain"] for x in rollouts} <= RL_STAGES[stage]["domains"].keys()
    filters = RL_STAGES[stage].get("overlong") == "filter"
    kept = [x for x in rollouts if not filters or x["stop_reason"] == "stop"]
    trained = ["1" in x["tokens"]["loss"] for x in kept]
    assert all(trained) or stage == "swe_rl"  # which masks prompts that nobody solved


def test_run_mopd(sft, skilled, tmp_path, monkeypatch):
    """Of A+B the teacher whose manifest shows better scores in its domains; the report's shares,
    and with a default teacher also those of the domains that have no other."""
    for name, mean in (("a", 0.4), ("b", 0.6)):
        shutil.copytree(skilled, tmp_path / name)
        manifest = json.loads((sft / "manifest.json").read_text())
        for domain, x in manifest["evaluation"].items():
            x["after"]["mean"] = mean if domain != "code" else 0.9 - mean  # code is not taught
        (tmp_path / name / "manifest.json").write_text(json.dumps(manifest))
    given = f"math={sft},preference={skilled},multi_domain={tmp_path / 'a'}+{tmp_path / 'b'}"
    paths = {"math": str(sft), "preference": str(skilled), "multi_domain": str(tmp_path / "b")}
    paths = {domain: paths[name] for domain, name in TEACHER_OF.items()}
    for anchor in (False, True):
        out = tmp_path / f"out{anchor}"
        teachers = f"{given},default={sft}" if anchor else given
        words = ("--init", sft, "--teachers", teachers, "--out", out, *TINY_RL, "--prompts", 24)
        run_here(monkeypatch, "train_mopd.py", *words)
        manifest = check_left(out, "mopd")
        check_rollouts(out, "teacher")
        found = {domain: x["path"] for domain, x in manifest["teachers"].items()}
        untaught = {d: str(sft) for d in MOPD_SHARES if d not in TEACHER_OF}
        assert found == (paths | untaught if anchor else paths)
        last = metrics_of(out)[-1]
        assert last["grad_norm"] > 0 and last["mopd/reverse_kl/preference"] > 0.1
        assert abs(sum(last[f"mopd/prompt_share/{d}"] for d in found) - 1) < 1e-6
        for domain in found:  # of 24 prompts, to the next whole one
            expected = MOPD_SHARES[domain] / sum(MOPD_SHARES[d] for d in found)
            assert abs(last[f"mopd/prompt_share/{domain}"] - expected) < 1 / 24, domain
    assert last["mopd/reverse_kl/default"] < last["mopd/reverse_kl/preference"]


@pytest.mark.parametrize(
    "script, args",
    [
        ("train_sft.py", ()),
        ("train_rl.py", ("--stage", "if_rl", "--init", "SFT")),
        ("train_mopd.py", ("--teachers", "math=SFT", "--init", "SFT")),
    ],
)
def test_run_dry(script, args, sft, tmp_path, monkeypatch, capsys):
    """--dry_run prints every setting and the sizes, trains nothing, writes nothing, needs no --out
    and leaves alone one that it is given."""
    args = [x.replace("SFT", str(sft)) for x in args]
    for out in ((), ("--out", tmp_path / "o")):
        run_here(monkeypatch, script, *args, *out, "--toy_rows", 4, "--dry_run")
        printed = capsys.readouterr().out
        assert re.search(r"^steps +=", printed, re.M) and "parameters: 874,392 in all" in printed
    assert not (tmp_path / "o").exists()


def test_run_sample(skilled, rows, tmp_path, monkeypatch, capsys):
    """sample.py answers a prompt, a file of them, a chat; it grades tasks and shows loss masks."""

    def said(*args):
        run_here(monkeypatch, "sample.py", "--model", skilled, "--max_new_tokens", 24, *args)
        return capsys.readouterr().out

    question = "Which is an animal?\nA: cat\nB: red\nC: corn\nD: boat"
    assert question in said("--prompt", question, "--temperature", 0)
    (tmp_path / "prompts").write_text("What is 27+48?\n\nTell me about the fox.\n")
    both = run(
        "sample.py",
        "--model",
        skilled,
        "--prompts",
        tmp_path / "prompts",
        "--num_samples",
        2,
        "--max_new_tokens",
        4,
    )
    assert both.count("> What is 27+48?\n<think>") == both.count("> Tell me about the fox.") == 2
    table = said("--tasks", "toy:math", "--num_samples", 4, "--limit", 3, "--show", 0)
    assert re.search(r"domain +prompts +avg@4 +pass@4\nmath +3 +0\.\d+ \+- .* 0\.\d+ \+-", table)
    assert re.search(r"\nmcqa +60 +0\.\d+", said("--tasks", rows, "--show", 0, "--num_samples", 1))
    mask = said("--tasks", rows, "--show_mask", 2)
    assert mask.count("<|im_end|>\033[0m") == 2 and mask.count("\033[32m") == 2
    assert "<|im_start|>assistant\n<think>\n\033[32m" in mask
    answer = said("--prompt", "What is 27+48?", "--temperature", 0).partition("\n")[2].strip("\n")
    with open(tmp_path / "prompts") as lines:  # the empty line ends the chat, which streams
        monkeypatch.setattr(sys, "stdin", lines)
        assert said("--temperature", 0) == answer + "\n"
    with pytest.raises(SystemExit):
        said("--tasks", "toy:preference")
    assert "error: preference rows are graded against an answer" in capsys.readouterr().err


def test_parity_transformers(skilled):
    """transformers loads the directory as it stands, every tensor, and computes our logits."""
    transformers = pytest.importorskip("transformers")
    theirs, report = transformers.AutoModelForCausalLM.from_pretrained(
        skilled, output_loading_info=True, attn_implementation="eager"
    )
    assert not any(report.values())
    for module in theirs.modules():
        if hasattr(module, "time_step_limit"):  # 5.23 clamps by time_step_min, see the README
            module.time_step_limit = (0.0, float("inf"))
    ids = transformers.AutoTokenizer.from_pretrained(skilled)("What is 27+48?").input_ids
    ids, ours = torch.tensor([ids]), load_model(skilled)
    with torch.no_grad():
        torch.testing.assert_close(ours.logits(ours(ids)), theirs(ids).logits, rtol=0, atol=1e-4)


RL = ("--prompts", 4, "--rollouts", 4, "--init", "SKILLED")
KILLED = {
    "if_rl": ("train_rl.py", "--stage", "if_rl", *RL, "--data", "ROWS"),
    "mopd": (
        "train_mopd.py",
        *RL,
        "--teachers",
        "multi_domain=SFT,preference=SFT",
        "--domains",
        "mcqa,preference",
        "--toy_rows",
        20,
    ),
    "sft": ("train_sft.py", "--data", "ROWS", "--batch_tokens", 512, "--warmup", 1),
    "rlhf": ("train_rl.py", "--stage", "rlhf", *RL, "--toy_rows", 20),
    "dropped": (
        "train_rl.py",
        "--stage",
        "multi_domain_rl",
        "--max_pass_rate",
        0.5,
        *RL,
        "--data",
        "ROWS",
    ),
}


@pytest.mark.parametrize(
    "case", [pytest.param(x, marks=[pytest.mark.nightly][: i > 1]) for i, x in enumerate(KILLED)]
)
def test_run_killed(case, skilled, sft, rows, tmp_path):
    """Killed at a random instant and resumed, a run leaves the bits of one that was left alone."""
    paths = {"SKILLED": skilled, "SFT": sft, "ROWS": rows}
    script, *args = KILLED[case]
    for name, path in paths.items():
        args = [str(x).replace(name, str(path)) for x in args]
    args += ["--steps", 7, "--save_every", 2, "--eval_data", ""]
    whole = start(script, *args, "--out", tmp_path / "whole")
    out = tmp_path / "killed"
    process, step = start(script, *args, "--out", out), random.randint(2, 4)
    while not (list(out.glob("state/[0-9]*")) and len(metrics_of(out)) >= step):
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.002)
    time.sleep(random.uniform(0, 0.1))
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL and not (out / "manifest.json").exists()
    assert whole.communicate() and whole.returncode == 0
    run(script, *args, "--out", out, "--resume")

    assert {x.name for x in out.iterdir()} == FILES
    assert sha256(out) == sha256(tmp_path / "whole") != sha256(skilled)
    assert (out / "rollouts.jsonl").read_text() == (tmp_path / "whole/rollouts.jsonl").read_text()
    both = [[lasting(x) for x in metrics_of(path)] for path in (out, tmp_path / "whole")]
    assert both[0] == both[1] and len(both[0]) == 7
    assert any(x["grad_norm"] > 0 for x in both[0])
