"""MOPD with and without a teacher for every prompt, from finished cascades of the toy.

    python -m bench.anchor runs/out-seed0 runs/out-seed1 ...      (nightly.sh makes five of them)

Each directory is what toy.sh leaves. Without the anchor the teachers are the report's three; with
it `default` is the student's own start, so that code, repair and long context are held where they
were. Both arms are evaluated on the same prompts as their start. Runs and scores are kept in
DIRECTORY/anchor; given again, the command goes on where it stopped.
"""

import json
import subprocess
import sys
from pathlib import Path

from bench.evidence import over
from nanocascade.checkpoint.weights import load_model
from nanocascade.cli import run_main
from nanocascade.data.episode import Sampling
from nanocascade.files import read_json, write_json_atomic
from nanocascade.rollouts.scoring import Scorer
from nanocascade.run.evaluate import evaluate
from nanocascade.run.rows import References
from nanocascade.stages import MOPD_SHARES, TEACHER_OF
from nanocascade.tokenizer.tokenizer import Tokenizer
from nanocascade.toy import tasks
from nanocascade.toy.judge import rule_judge
from runs.report import table

SAMPLES = 2000  # evaluation prompts of each domain
ARMS = {"report": "", "anchor": ",default={0}/multi_domain_rl"}


def train(out: Path, arm: str) -> None:
    teachers = (
        "math={0}/sft,preference={0}/rlhf_side,multi_domain={0}/if_rl+{0}/multi_domain_rl"
        + ARMS[arm]
    ).format(out)
    seed = read_json(out / "multi_domain_rl" / "manifest.json")["seed"]
    words = ["--init", out / "multi_domain_rl", "--out", out / "anchor" / arm, "--seed", seed]
    words += ["--teachers", teachers, "--eval_data", "", "--show_every", 0, "--resume"]
    words += ["--references", out / "sft" / "references.jsonl"]  # where the cascade stands now
    subprocess.run([sys.executable, "train_mopd.py", *map(str, words)], check=True)


def scores_of(path: Path, references: References) -> dict[str, float]:
    """{domain: mean outcome} on held-out prompts; preference against SFT's stored answers."""
    model, tokenizer, scores = load_model(path).eval(), Tokenizer(path), {}
    for domain in MOPD_SHARES:
        rows = references.add_to(tasks.make_rows(domain, SAMPLES, "test", 0))
        found, _ = evaluate(model, tokenizer, rows, 1, Sampling(72), 1, Scorer(rule_judge))
        scores[domain] = found[domain]["mean"]
    return scores


def compare(out: Path) -> dict[str, dict[str, float]]:
    """{"start" and each arm: {domain: score}} of one cascade."""
    scores = {}
    for name in ("start", *ARMS):
        kept = out / "anchor" / f"{name}.json"
        if not kept.exists():
            kept.parent.mkdir(exist_ok=True)
            path = out / "multi_domain_rl" if name == "start" else out / "anchor" / name
            if name != "start" and not (path / "manifest.json").exists():
                train(out, name)
            references = References(str(out / "sft" / "references.jsonl"))
            write_json_atomic(kept, scores_of(path, references))
        scores[name] = json.loads(kept.read_text())
    return scores


def main():
    if len(sys.argv) < 2:
        raise ValueError("usage: python -m bench.anchor DIRECTORY ...")
    seeds = [compare(Path(x)) for x in sys.argv[1:]]
    rows = []
    for domain in MOPD_SHARES:
        start, report, anchor = ([x[name][domain] for x in seeds] for name in ("start", *ARMS))
        changes = [[b - a for a, b in zip(start, end, strict=True)] for end in (report, anchor)]
        gains = [b - a for a, b in zip(*changes, strict=True)]
        teacher = TEACHER_OF.get(domain, "-")
        rows.append([domain, teacher, *map(over, (start, report, anchor, *changes, gains))])
    head = ["domain", "teacher", "start", "report", "anchor", "change, report", "change, anchor"]
    print(table([*head, "anchor - report"], rows))


if __name__ == "__main__":
    run_main(main)
