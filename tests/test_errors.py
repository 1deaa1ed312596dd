"""Wrong input, a full disk, a NaN: one clear line and exit code 2, and nothing is lost."""

import json
import os
import re
import resource
import shutil
import time
from pathlib import Path

import pytest
import torch
from fixtures import toy_runs
from fixtures.toy_runs import environments, run, run_here, start

import nanocascade.grpo
from nanocascade.engine.distributed import Dist
from nanocascade.engine.optim import optimizer_step
from nanocascade.rollouts import rollout

rows, sft, skilled, refused = toy_runs.rows, toy_runs.sft, toy_runs.skilled, toy_runs.refused
WEIGHTS = "model.safetensors"


def math_row(text="What is 1+2?", **fields) -> dict:
    prompt = {"input": [{"role": "user", "content": text}]}
    return {
        "id": "sum",
        "responses_create_params": prompt,
        "expected_answer": "3",
        "solutions": {"off": [{"role": "assistant", "content": "3"}]},
        **fields,
    }


def test_errors_of_flags(refused, sft):
    """An unknown flag names the nearest ones, an unknown stage or value the known ones; a flag that
    is needed is asked for."""
    refused("unknown flag --stpes: did you mean --steps", "train_sft.py", "--stpes", 3)
    refused("unknown flag --teacher: did you mean --teachers", "train_mopd.py", "--teacher", "x")
    refused("--dtype fp8: expected float32 or bfloat16$", "train_sft.py", "--dtype", "fp8")
    refused("1 ranks do not divide into --replicas 2", "train_sft.py", "--replicas", 2)
    refused("--stage if: expected if_rl or multi_domain_rl", "train_rl.py", "--stage", "if")
    refused("--config full needs --init, --data", "train_sft.py", "--config", "full")
    stage = ("train_rl.py", "--stage", "if_rl", "--init", sft)
    refused("--overlong cut: expected penalty or filter", *stage, "--overlong", "cut")
    for flag, least in (("--rollouts", 2), ("--pass_samples", 1), ("--max_turns", 1)):
        refused(f"{flag} 0: expected int >= {least}", *stage, flag, 0)
    refused("--lr nan: expected float >= 0", *stage, "--lr", "nan")
    refused("--temperature 0: expected float >= 0.001", *stage, "--temperature", 0)
    refused("--top_p 1.5: expected float >= 0.001 and <= 1", *stage, "--top_p", 1.5)
    refused("--betas 0.9: expected float .*,float", *stage, "--betas", 0.9)
    refused("--gate_low 3.0: expected less than --gate_high", *stage, "--gate_low", 3)
    refused(
        "--gate hard: expected zero or clamp or none",
        "train_mopd.py",
        "--init",
        sft,
        "--gate",
        "hard",
        "--teachers",
        f"math={sft}",
    )


def test_errors_of_init(refused, sft, tmp_path):
    """A missing directory, and a model cut off anywhere, are refused."""
    stage, broken = ("train_rl.py", "--stage", "if_rl", "--init"), tmp_path / "broken"
    refused(r"nowhere.config\.json", *stage, tmp_path / "nowhere")
    for size in (0, 7, 3000, (sft / WEIGHTS).stat().st_size - 1):
        shutil.copytree(sft, broken, dirs_exist_ok=True)
        os.truncate(broken / WEIGHTS, size)
        refused("model.safetensors is missing, truncated or damaged", *stage, broken)
    for file, text, words in (
        ("tokenizer.json", '{"added_tokens": []}', r"tokenizer\.json is damaged"),
        ("tokenizer_config.json", "[]", r"tokenizer_config\.json holds a list"),
        ("config.json", "{", r"cannot read .*broken/config\.json"),
    ):
        (broken / file).write_text(text)
        refused(words, *stage, broken)


@pytest.mark.parametrize("script", ["train_sft.py", "train_rl.py", "train_mopd.py"])
def test_errors_of_data(script, refused, sft, tmp_path):
    """Rows that cannot be used are named by file and line, those too long by id; the rows of an
    evaluation too, although it comes last."""
    args = [script, "--init", sft, *(["--teachers", f"math={sft}"] if "mopd" in script else [])]
    lacking = {k: v for k, v in math_row().items() if k != "solutions"}
    lacking |= {} if "sft" in script else {"expected_answer": None}
    path = tmp_path / "data.jsonl"
    no_role = math_row(responses_create_params={"input": [{"content": "Hi"}]})
    no_text = math_row(responses_create_params={"input": [{"role": "user", "content": None}]})
    size = r"row long: \d+ tokens \+ (0 new ones; .* 256|\d+ new ones; .* 1024)$"
    for words, found in (
        (r"data\.jsonl:2: not JSON", (math_row(), '{"id": 3,')),
        (r"data\.jsonl:2: ", (math_row(), lacking, math_row())),
        (r"data\.jsonl: no rows", ()),
        (r"data\.jsonl:1: .*role", (no_role,)),
        (r"data\.jsonl:1: .*no content", (no_text,)),
        (size, (math_row(), math_row("word " * 600, id="long"))),
    ):
        lines = (x if isinstance(x, str) else json.dumps(x) for x in found)
        path.write_text("".join(line + "\n" for line in lines))
        refused(words, *args, "--data", path)
        if lacking not in found:  # it may lack a solution there
            refused(words, *args, "--eval_data", path)
    refused("no_such_file", *args, "--data", tmp_path / "no_such_file.jsonl")
    short = ("--eval_data", "toy", "--eval_max_new_tokens", 1020)  # which its own prompts exceed
    refused(r"row .*: \d+ tokens \+ 1020 new ones; the model's context is 1024$", *args, *short)
    if script == "train_sft.py":  # half of the draws are without the thought
        worked = {
            k: [{"role": "assistant", "content": x, "reasoning_content": ""}]
            for k, x in (("on", "3"), ("off", "and " * 300 + "3"))
        }
        path.write_text(json.dumps(math_row(id="long", solutions=worked)))
        refused(r"row long: \d+ tokens .* --row_tokens is 256$", *args, "--data", path)
    if script == "train_rl.py":  # the last file's rows are sums
        refused(r"row .* 1 new ones; --max_tokens is 9$", *args, "--max_tokens", 9)
        path.write_text(json.dumps(math_row("word " * 100, id="own")))  # asked as it is trained
        own = ("--stage", "math_rl", "--max_new_tokens", 940, "--eval_data", path)
        refused(r"row own: .* 940 new ones; the model's context is 1024$", *args, *own)
        words = "stage if_rl trains .*if.*; --data holds .*math"
        refused(words, *args, "--stage", "if_rl", "--data", path)
        # A misspelled domain beside a right one.
        own = ("--stage", "multi_domain_rl", "--domains", "math,mqca", "--data", path)
        refused("--domains mqca: --data has no rows of it", *args, *own)


def test_errors_of_teachers(refused, sft, tmp_path):
    """A teacher that reads other ids than the student writes is refused, as is one that is not
    there, that has no scores to be chosen by, or whose name or domain nobody knows."""
    mopd = ("train_mopd.py", "--init", sft, "--teachers")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        other = tmp_path / file.removesuffix(".json")
        shutil.copytree(sft, other)
        (other / "manifest.json").write_text("{}")
        content = json.loads((other / file).read_text())
        if file == "tokenizer.json":  # two letters change places
            vocab = content["model"]["vocab"]
            vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
        else:
            content["chat_template"] = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
        (other / file).write_text(json.dumps(content))
        words = f"teacher math .*{other.name}.*tokenizer, special ids or chat template differ"
        refused(words, *mopd, f"preference={sft},math={other}")
    refused("nowhere", *mopd, f"math={tmp_path / 'nowhere'}")
    shutil.copytree(sft, tmp_path / "cut")
    os.truncate(tmp_path / "cut" / WEIGHTS, 3000)
    refused("cut/model.safetensors is missing, truncated", *mopd, f"math={tmp_path / 'cut'}")
    refused("manifest.json has no evaluation of math", *mopd, f"math={sft}+{other}")
    refused("expected NAME=DIR once, NAME one of .*math", *mopd, f"maths={sft}")
    refused("expected NAME=DIR once", *mopd, f"math={sft},math={sft}")
    refused("no directory /nowhere", *mopd, f"math={sft},swe=/nowhere")  # not even an unused one
    refused("--domains .*code.* no teacher", *mopd, f"math={sft}", "--domains", "math,code")
    refused("--teachers is needed", "train_mopd.py", "--init", sft)


def test_errors_of_references(refused, sft, tmp_path, monkeypatch):
    """The stored answers of a parent are found where its directory was moved to, and asked for only
    where preference is trained or evaluated."""
    moved = tmp_path / "moved"
    shutil.copytree(sft, moved)
    manifest = json.loads((moved / "manifest.json").read_text()) | {"references": "/gone/answers"}
    (moved / "manifest.json").write_text(json.dumps(manifest))
    args = ("train_rl.py", "--init", moved, *toy_runs.UNREFUSED, "--stage")
    run_here(monkeypatch, *args, "rlhf", "--out", tmp_path / "out", "--dry_run")
    (moved / "references.jsonl").rename(tmp_path / "answers")
    run_here(monkeypatch, *args, "if_rl", "--out", tmp_path / "out", "--dry_run")
    refused("cannot read /gone/answers", *args, "rlhf")
    (tmp_path / "answers").write_text('{"question": "a", "answer": "b"}\n{"question": "a"}\n')
    words, answers = "answers:2: no question and answer", tmp_path / "answers"
    refused(words, *args, "rlhf", "--references", answers)


@pytest.mark.parametrize(
    "words, args",
    [
        ("--model DIR is needed", ()),
        ("unknown flag --modle: did you mean --model", ("--modle", "x")),
        ("nowhere has no tokenizer.json", ("--model", "nowhere")),
        ("expected int >= 1", ("--model", "SFT", "--prompt", "hi", "--num_samples", 0)),
        ("--dtype fp8: expected", ("--model", "SFT", "--prompt", "hi", "--dtype", "fp8")),
        ("must fit the context of 1024", ("--model", "SFT", "--prompt", "word " * 2000)),
        ("FILE: no prompts", ("--model", "SFT", "--prompts", "FILE")),
        ("FILE: no rows", ("--model", "SFT", "--tasks", "FILE")),
        ("give one of them", ("--model", "SFT", "--prompt", "hi", "--tasks", "toy:math")),
        ("need --tasks", ("--model", "SFT", "--prompt", "hi", "--limit", 3)),
        ("--show_mask needs --tasks", ("--model", "SFT", "--show_mask", 1)),
        ("expected single, majority", ("--model", "SFT", "--strategy", "x", "--tasks", "toy:math")),
        ("and --tasks", ("--model", "SFT", "--strategy", "refine", "--prompt", "hi")),
        ("one answer", ("--model", "SFT", "--strategy", "submit", "--tasks", "toy:tools")),
        ("needs a judge", ("--model", "SFT", "--tasks", "JUDGED")),
        ("needs a judge", ("--model", "SFT", "--strategy", "single", "--tasks", "JUDGED")),
        ("--rounds 0", ("--model", "SFT", "--strategy", "refine", "--rounds", 0)),
    ],
)
def test_errors_of_sampling(words, args, sft, tmp_path, monkeypatch, capsys):
    """sample.py refuses in one line what it cannot sample from or grade, before it samples."""
    names = {"SFT": sft, "FILE": tmp_path / "empty.jsonl", "JUDGED": tmp_path / "judged.jsonl"}
    names["FILE"].write_text("\n")
    names["JUDGED"].write_text(json.dumps(math_row(agent_ref={"name": "llm_judge"})))
    if "JUDGED" in args:
        monkeypatch.setattr(rollout, "generate", lambda *_, **__: pytest.fail("it sampled"))
    with pytest.raises(SystemExit) as stopped:
        run_here(monkeypatch, "sample.py", *(names.get(x, x) for x in args))
    line = capsys.readouterr().err
    assert stopped.value.code == 2 and line.count("\n") == 1
    assert line.startswith("error: ") and words.replace("FILE", str(names["FILE"])) in line


def test_errors_of_one_rank(tmp_path):
    """The process that goes wrong says why; one that waited for it adds a line, no traceback."""
    script = tmp_path / "script.py"
    script.write_text(
        "from nanocascade.cli import run_main\n"
        "from nanocascade.engine import distributed\n"
        "def main():\n"
        "    with distributed.start('cpu') as dist:\n"
        "        if dist.rank:\n"
        "            raise ValueError('loss is nan at step 2')\n"
        "        dist.sum(1)\n"
        "run_main(main)\n"
    )
    running = [start(script, env=x) for x in environments(2)]
    lines = [process.communicate()[1].splitlines()[-1:] for process in running]
    assert [process.returncode for process in running] == [2, 2], lines
    assert lines[1] == ["error: loss is nan at step 2"]
    assert lines[0] == ["error: another process of this run failed; its error is printed above"]


def test_errors_of_out(refused, sft, tmp_path):
    """What another run left is never touched, and a directory that cannot be written is said."""
    refused("holds a finished run", "train_sft.py", "--resume", out=sft)
    (tmp_path / "model").mkdir()
    shutil.copy(sft / WEIGHTS, tmp_path / "model")
    refused("holds a model that is not of this run", "train_sft.py", out=tmp_path / "model")
    refused("cannot be written", "train_sft.py", out=sft / "config.json" / "out")
    refused("cannot be written", "train_sft.py", out=Path("/proc/no_permission"))
    refused("needs --out", "train_sft.py", "--out", "")


def test_errors_of_a_nan(refused, skilled, rows, tmp_path, monkeypatch, capsys):
    """A loss that is NaN stops the run with its step and rows before the weights see it; the last
    checkpoint is good, and resumed it leaves the bits of a run without the mishap. Meanwhile the
    directory is refused to other runs."""
    args = (
        "train_rl.py",
        "--stage",
        "multi_domain_rl",
        "--init",
        skilled,
        "--data",
        rows,
        *toy_runs.UNREFUSED,
        "--steps",
        6,
        "--prompts",
        2,
        "--rollouts",
        2,
        "--save_every",
        1,
    )
    out, real, calls = tmp_path / "out", nanocascade.grpo.grpo_loss, []
    run_here(monkeypatch, *args, "--out", tmp_path / "whole")

    def poisoned(*tensors, **options):
        loss, metrics = real(*tensors, **options)
        calls.append(loss)
        return (loss * float("nan") if len(calls) == 3 else loss), metrics

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stop:
        patch.setattr(nanocascade.grpo, "grpo_loss", poisoned)
        run_here(patch, *args, "--out", out)
    line = capsys.readouterr().err.splitlines()[-1]
    assert re.fullmatch(r"error: loss is nan at step 2; rows mcqa-train-0-\d+(, mcqa\S+)*", line)
    assert stop.value.code == 2 and [x.name for x in out.glob("state/[0-9]*")] == ["1"]
    refused("go on with --resume", *args, out=out)
    refused("holds another run: .*seed was 0 and is 5", *args, "--seed", 5, "--resume", out=out)
    # More rows at once than there are: what only costs memory may change.
    run_here(monkeypatch, *args, "--out", out, "--resume", "--max_rows", 400)
    assert (out / WEIGHTS).read_bytes() == (tmp_path / "whole" / WEIGHTS).read_bytes()


def test_errors_of_a_gradient():
    """A gradient that is not finite although the loss was does not reach the weights either."""
    model = torch.nn.Linear(2, 2)
    before, optimizer = model.weight.detach().clone(), torch.optim.AdamW(model.parameters())
    model.weight.grad = torch.tensor([[1.0, float("inf")], [0.0, 0.0]])
    with pytest.raises(ValueError, match="gradient norm is inf after 0 steps"):
        optimizer_step(model, optimizer, 1e-3, 1.0, Dist())
    assert model.weight.equal(before)


@pytest.mark.skipif(not hasattr(resource, "prlimit"), reason="limits of other processes: Linux")
def test_errors_of_a_full_disk(rows, tmp_path):
    """A disk that fills up while a checkpoint, or the finished model, is written costs what came
    after the last checkpoint, which is still whole: with room again the run goes on and ends."""
    out, room = tmp_path / "out", (2_000_000, 2_000_000)  # bytes; the weights have 3.5 million
    args = (
        "train_sft.py",
        "--data",
        rows,
        "--batch_tokens",
        256,
        "--steps",
        12,
        "--warmup",
        1,
        "--eval_data",
        "",
        "--out",
        out,
        "--resume",
    )

    def stops(process) -> list[str]:
        line = process.communicate()[1].splitlines()[-1]
        assert process.returncode == 2 and line.startswith("error: "), line
        assert re.search(r"cannot write \S+/\.saving\S*: .*[Tt]oo large", line), line
        assert not (out / WEIGHTS).exists()
        return [x.name for x in out.glob("state/*") if x.is_dir()]  # .saving among them

    process = start(*args, "--save_every", 1)
    while not list(out.glob("state/[0-9]*")):
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.002)
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, room)
    (kept,) = stops(process)
    assert kept.isdigit() and int(kept) < 11
    limit = {"preexec_fn": lambda: resource.setrlimit(resource.RLIMIT_FSIZE, room)}
    assert stops(start(*args, "--save_every", 0, **limit)) == [kept]  # at the end, the model
    run(*args, "--save_every", 0)
    assert (out / "manifest.json").exists() and not (out / "state").exists()
