"""Every flag of the train scripts does something: runs without and with it, and what differs."""

import hashlib
import json
import re

import pytest
from fixtures import toy_runs
from fixtures.toy_runs import lasting, run_here

from nanocascade.toy import tasks

rows, sft, skilled, refused = toy_runs.rows, toy_runs.sft, toy_runs.skilled, toy_runs.refused
RL = (
    "train_rl.py",
    "--stage",
    "if_rl",
    "--init",
    "SKILLED",
    "--data",
    "ROWS",
    "--prompts",
    4,
    "--rollouts",
    4,
    "--steps",
    2,
    "--show_every",
    0,
)
RLHF = (
    "train_rl.py",
    "--stage",
    "rlhf",
    "--init",
    "SKILLED",
    "--prompts",
    3,
    "--rollouts",
    4,
    "--steps",
    2,
    "--toy_rows",
    12,
    "--show_every",
    0,
)
MOPD = (
    "train_mopd.py",
    "--init",
    "SKILLED",
    "--teachers",
    "multi_domain=SFT",
    "--data",
    "UNEVEN",
    "--prompts",
    6,
    "--rollouts",
    2,
    "--steps",
    2,
    "--show_every",
    0,
)
SFT = ("train_sft.py", "--data", "ROWS", "--batch_tokens", 400, "--steps", 2, "--warmup", 1)
EVAL = (
    "--eval_data",
    "toy",
    "--eval_samples",
    2,
    "--own_eval_samples",
    3,
    "--eval_max_new_tokens",
    8,
    "--reference_samples",
    2,
)


@pytest.fixture(scope="module")
def outcome_of(tmp_path_factory, sft, skilled, rows):
    """outcome_of(args): what a run left, by kind; each command line runs once."""
    known, folder = {}, tmp_path_factory.mktemp("rows")
    found = [x for d, n in (("if", 4), ("mcqa", 12)) for x in tasks.make_rows(d, n)]
    rated = [json.loads(x) | {"pass_rate": i % 5 / 4} for i, x in enumerate(rows.open())]
    paths = {"SKILLED": skilled, "SFT": sft, "ROWS": rows}
    for name, part in (("UNEVEN", found), ("RATED", rated)):
        paths[name] = folder / name
        paths[name].write_text("".join(json.dumps(x) + "\n" for x in part))

    def outcome(args, capsys):
        if args not in known:
            out = tmp_path_factory.mktemp("run") / "out"
            words = [str(paths.get(x, x)).replace("=SFT", f"={sft}") for x in args]
            words += [] if "--eval_data" in words else ["--eval_data", ""]
            capsys.readouterr()
            with pytest.MonkeyPatch.context() as patch:
                run_here(patch, *words, "--out", out)
            records = [json.loads(x) for x in (out / "metrics.jsonl").open()]
            known[args] = {
                "weights": hashlib.sha256((out / "model.safetensors").read_bytes()).hexdigest(),
                "metrics": [lasting(x) for x in records],
                "rollouts": (out / "rollouts.jsonl").read_text(),
                "manifest": json.loads((out / "manifest.json").read_text()),
                "printed": capsys.readouterr().out,
            }
        return known[args]

    return outcome


CHANGES = [  # command line, flag and value, what must differ
    (RL, ("--betas", "0.1,0.1"), "weights"),
    (RL, ("--bias_rate", 0), "weights"),
    (RL, ("--weight_decay", 5), "weights"),
    (RL, ("--max_norm", 1e-6), "weights"),
    (RL, ("--normalize_std", "false"), "weights"),
    (RL, ("--train_router",), "weights"),
    ((*RL, "--rollouts", 2), ("--dynamic_filtering", "false"), "metrics"),
    (RL, ("--top_p", 0.3), "rollouts"),
    (RL, ("--schedule", "linear", "--min_lr", 1e-2), "weights"),
    (RL, ("--seed", 3), "rollouts"),
    (RL, ("--max_tokens", 30), "rollouts"),
    (RL, ("--thinking", "false"), "rollouts"),
    ((*RL, "--eval_data", "ROWS", "--own_eval_samples", 8), ("--thinking", "false"), "manifest"),
    (MOPD, ("--denominator", "token"), "weights"),
    (RL, ("--mask_unsolved", 1), "weights"),
    (RL, ("--log_groups", 0), "rollouts"),
    (RL, ("--show_every", 1), "printed"),
    (RL, ("--warmup", 2), "weights"),
    (RL, ("--keep_unsolved", 0, "--data", "RATED"), "rollouts"),
    ((*RL, "--max_pass_rate", 0.3), ("--pass_samples", 1), "rollouts"),
    (RLHF, ("--kl_coef", 0), "weights"),
    (RLHF, ("--pairing", "circle"), "weights"),
    (MOPD, ("--balance",), "metrics"),
    (MOPD, ("--warmup_from", 1e-2), "weights"),
    ((*MOPD, "--warmup", 0), ("--schedule", "constant"), "weights"),
    ((*MOPD, "--warmup", 0), ("--min_lr", 1e-2), "weights"),
    (MOPD, ("--gate", "none", "--gate_low", 0.9999999, "--gate_high", 1.0), "metrics"),
    ((*MOPD, "--max_new_tokens", 12), ("--overlong", "filter"), "weights"),
    (RL, ("--max_sequence_error", 1.0), "weights"),
    (MOPD, ("--max_sequence_error", 1.0), "weights"),
    (SFT, ("--strip_thinking", 1), "weights"),
    (SFT, ("--micro_tokens", 64), "weights"),
    ((*SFT, *EVAL), ("--eval_max_new_tokens", 1), "manifest"),
    ((*SFT, *EVAL), ("--own_eval_samples", 2), "manifest"),
]


@pytest.mark.parametrize("args, flag, kind", CHANGES, ids=lambda x: x[0] if "--" in x[0] else "")
def test_flag_changes(args, flag, kind, outcome_of, capsys):
    """With the flag the run's weights, metrics, rollouts, manifest or output are others."""
    assert outcome_of(args, capsys)[kind] != outcome_of((*args, *flag), capsys)[kind]


def test_flags_close_the_loss(outcome_of, capsys):
    """A gate that no ratio passes, and masking all prompts, leave no gradient."""
    closed = ("--gate_low", 0.1, "--gate_high", 0.9)
    for flag in (("--gate_low", 1.5), ("--mask_unsolved", 1), closed):
        assert all(x["grad_norm"] == 0 for x in outcome_of((*RL, *flag), capsys)["metrics"]), flag
    assert any(x["grad_norm"] > 0 for x in outcome_of(RL, capsys)["metrics"])


def texts_of(lines: str) -> list[dict]:
    """Logged rollouts without the values of their tokens, whose last bits depend on the batch."""
    return [{k: v for k, v in json.loads(x).items() if k != "tokens"} for x in lines.splitlines()]


def test_flags_that_only_cost(outcome_of, capsys):
    """Rows decoded at once and tokens of a micro-batch change neither samples nor, but for the last
    bits, gradients; replayed experts are those that were chosen."""
    plain = outcome_of(RL, capsys)
    for flag in (("--max_rows", 3), ("--micro_tokens", 64), ("--routing_replay",)):
        other = outcome_of((*RL, *flag), capsys)
        for x, y in zip(plain["metrics"], other["metrics"], strict=True):
            assert {k: pytest.approx(v, rel=1e-3, abs=1e-5) for k, v in x.items()} == y, flag
        assert texts_of(other["rollouts"]) == texts_of(plain["rollouts"])


def test_flags_of_judges(refused, sft, skilled, tmp_path, outcome_of, capsys):
    """Preference and judged rows need a named judge; stored answers turn outcomes into wins."""
    row = tasks.make_rows("preference", 1)[0]
    (tmp_path / "rows").write_text(json.dumps(row))
    args = ("train_rl.py", "--stage", "rlhf", "--init", skilled, "--data", tmp_path / "rows")
    refused("preference rows need --judge_url and --judge_model", *args)
    refused("expected an address like http", *args, "--judge_url", "here", "--judge_model", "x")
    refused(
        "preference rows need --judge_url",
        "train_sft.py",
        "--init",
        sft,
        "--eval_data",
        tmp_path / "rows",
    )
    judged = {
        "expected_answer": "five",
        "agent_ref": {"name": "equivalence_llm_judge"},
        "responses_create_params": {"input": "How many?"},
    }
    (tmp_path / "rows").write_text(json.dumps(judged))
    refused("as do rows that a judge grades", *args[:2], "long_context_rl", *args[3:])
    judged = outcome_of(RLHF, capsys)["metrics"]  # by pairs: rewards, but nothing that is right
    assert all("outcome/preference" not in x and x["reward/mean"] > 0 for x in judged)
    refused(
        r"--mask_unsolved: preference rows \(.*\) have no outcome",
        "train_rl.py",
        "--stage",
        "rlhf",
        "--init",
        skilled,
        "--mask_unsolved",
        0.5,
    )
    stored = [{"question": f"Tell me about the {x}.", "answer": "<think>\nno"} for x in tasks.NOUNS]
    (tmp_path / "stored").write_text("".join(json.dumps(x) + "\n" for x in stored))
    compared = outcome_of((*RLHF, "--references", tmp_path / "stored"), capsys)["metrics"]
    assert all(x["outcome/preference"] >= 0.5 for x in compared)  # nobody loses to half a thought


def test_flags_of_no_judge(refused, sft, tmp_path, monkeypatch):
    """MOPD trains on rows that need a judge without one: they have no outcome and leave those of
    other domains alone. An evaluation on them is refused."""
    unjudged, easy = tasks.make_rows("preference", 1), tasks.make_rows("math", 1)
    judged = {
        "agent_ref": {"name": "equivalence_llm_judge"},
        "expected_answer": "five",
        "responses_create_params": {"input": "How many?"},
        "domain": "math",
    }
    (tmp_path / "rows").write_text("".join(json.dumps(x) + "\n" for x in [*unjudged, *easy]))
    args = (
        "train_mopd.py",
        "--init",
        sft,
        "--teachers",
        f"preference={sft},math={sft}",
        "--data",
        tmp_path / "rows",
    )
    refused("preference rows need --judge_url", *args, "--eval_data", tmp_path / "rows")
    found = []
    for name, rows in (("some", [*unjudged, *easy]), ("none", [*unjudged, judged])):
        (tmp_path / "rows").write_text("".join(json.dumps(x) + "\n" for x in rows))
        run_here(
            monkeypatch,
            *args,
            "--out",
            tmp_path / name,
            "--steps",
            1,
            "--eval_data",
            "",
            "--prompts",
            4,
            "--max_new_tokens",
            8,
        )
        found.append(json.loads((tmp_path / name / "metrics.jsonl").read_text()))
        logged = map(json.loads, (tmp_path / name / "rollouts.jsonl").open())
        assert "not scored: no judge" in {x["reason"] for x in logged}
    some, none = found
    assert some["outcome/drawn"] == some["outcome/math"] == 0 == some["reward/mean"]
    assert some["group/all_wrong"] == 1 and some["mopd/prompt_share/preference"] == 0.5
    assert "outcome/preference" not in some and some["grad_norm"] >= 0
    assert not [x for x in none if x.startswith(("outcome", "reward"))]


def test_flags_of_devices(refused, sft):
    """A device that does not exist, or is not here, is named."""
    stage = ("train_rl.py", "--stage", "if_rl", "--init", sft)
    refused("--device tpu: expected cuda, mps or cpu", *stage, "--device", "tpu")
    refused("--device cuda: torch does not find this device", *stage, "--device", "cuda")


def test_flags_of_difficulty(skilled, rows, tmp_path, monkeypatch, capsys):
    """Rows rated by sample.py are those it read, each with the share of its samples that were
    right."""
    words = ("--tasks", rows, "--num_samples", 4, "--limit", 24, "--max_new_tokens", 30)
    run_here(monkeypatch, "sample.py", "--model", skilled, *words, "--pass_rates", tmp_path / "r")
    rated = [json.loads(x) for x in (tmp_path / "r").open()]
    rates = [x.pop("pass_rate") for x in rated]
    assert rated == [json.loads(x) for x in rows.open()][:24]
    assert {x * 4 % 1 for x in rates} == {0} and 0 < sum(rates) < 24
    average = re.search(r"if +24 +(0\.\d+)", capsys.readouterr().out)
    assert float(average[1]) == pytest.approx(sum(rates) / 24, abs=1e-3)
