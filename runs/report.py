"""The report of a cascade: what each stage gained, what it forgot, what MOPD brought back.

    python runs/report.py runs/out          writes report.md and scores.csv

Everything is read from the runs' manifest.json and metrics.jsonl.
"""

import csv
import math
import sys
from itertools import combinations
from pathlib import Path

from nanocascade.cli import run_main
from nanocascade.run.read import UNKNOWN, chain, main_chain, read_runs
from nanocascade.stages import RL_STAGES, TEACHER_OF

GAP_ERRORS = 5  # smallest gap between teacher and start that counts, in standard errors
STEP_METRICS = {  # columns of the table of runs: (metric, format)
    "length": ("response/length", ".1f"),
    "entropy": ("entropy", ".2f"),
    "grad norm": ("grad_norm", ".2f"),
    "mismatch": ("mismatch/prob_error", ".0e"),
    "load max": ("moe/load_max", ".1f"),
}


def read_cascade(path: Path) -> dict[str, dict]:
    """The finished runs of a directory by name, parents first."""
    runs = {x["name"]: x for x in read_runs(path) if x["finished"]}
    if not runs:
        raise ValueError(f"{path}: no finished run in it")
    return {name: runs[name] for name in sorted(runs, key=lambda x: len(chain(runs, x)))}


def score(runs: dict, name: str, domain: str) -> dict | None:
    """{"mean", "interval", "n"} of a domain after a run."""
    return runs.get(name, UNKNOWN)["evaluation"].get(domain, {}).get("after")


def difference(a: dict, b: dict) -> tuple[float, float]:
    """(score b - score a, its interval)."""
    return b["mean"] - a["mean"], math.hypot(a["interval"], b["interval"])


def cell(x: dict) -> str:
    return f"{x['mean']:.2f} +-{x['interval']:.2f}"


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def own_domains(runs: dict, name: str) -> list[str]:
    """The domains that a run trained by reward or, in MOPD, by a teacher of the report."""
    run = runs[name]
    if run["stage"] in RL_STAGES:
        return list(run["config"].get("domains") or RL_STAGES[run["stage"]]["domains"])
    return [domain for domain in TEACHER_OF if domain in run["teachers"]]


def domains_of(runs: dict) -> list[str]:
    """The domains with a score after every run of the main chain."""
    names = main_chain(runs)
    domains = runs[names[0]]["evaluation"]
    return [d for d in domains if all(score(runs, name, d) for name in names)]


def mean_score(runs: dict, name: str) -> float:
    domains = domains_of(runs)
    return sum(score(runs, name, d)["mean"] for d in domains) / len(domains)


def score_table(runs: dict) -> str:
    """Every domain after every stage; the stage's own domains in bold."""
    rows, names = [], main_chain(runs)
    for domain in domains_of(runs):
        marks = ["**" * (domain in own_domains(runs, name)) for name in names]
        cells = [cell(score(runs, name, domain)) for name in names]
        rows.append([domain, *(f"{m}{x}{m}" for m, x in zip(marks, cells, strict=True))])
    rows.append(["mean", *(f"{mean_score(runs, name):.3f}" for name in names)])
    return table(["domain", *names], rows)


def gains(runs: dict):
    """(run, domain, before, after, gain, its interval) of every RL stage and own domain."""
    for name, run in runs.items():
        for domain in own_domains(runs, name) if run["stage"] in RL_STAGES else ():
            before, after = score(runs, run["parent"], domain), score(runs, name, domain)
            if before and after:
                yield name, domain, before, after, *difference(before, after)


def gain_table(runs: dict) -> str:
    """Own-domain score before and after each RL stage."""
    rows = []
    for name, domain, before, after, gain, error in gains(runs):
        change, minutes = f"{gain:+.2f} +-{error:.2f}", f"{runs[name]['seconds'] / 60:.1f}"
        rows.append([name, domain, cell(before), cell(after), change, minutes])
    return table(["stage", "own domain", "before", "after", "gain", "minutes"], rows)


def falls(runs: dict):
    """(domain, largest drop from its best score so far, the stage of most of it, its interval)."""
    names = main_chain(runs)
    for domain in domains_of(runs):
        scores = [score(runs, name, domain) for name in names]
        means = [x["mean"] for x in scores]
        pairs = combinations(range(len(names)), 2)
        best, end = min(pairs, key=lambda x: means[x[1]] - means[x[0]], default=(0, 0))
        drop, error = difference(scores[best], scores[end])
        steps = range(best + 1, end + 1)
        steepest = min(steps, key=lambda i: means[i] - means[i - 1], default=0)
        yield (domain, drop, names[steepest], error) if drop < 0 else (domain, 0.0, "-", 0.0)


def forgetting_table(runs: dict) -> str:
    rows = [
        [domain, f"{drop:+.2f} +-{error:.2f}", stage] for domain, drop, stage, error in falls(runs)
    ]
    return table(["domain", "largest drop", "most of it in"], rows)


def recoveries(runs: dict):
    """(domain, teacher, start, goal, end, recovery, its interval) of MOPD; None without a gap.

    recovery = (MOPD - start) / (teacher - start), where the gap is GAP_ERRORS errors or more.
    """
    mopd = next((x for x in main_chain(runs) if runs[x]["stage"] == "mopd"), None)
    for domain in own_domains(runs, mopd) if mopd else ():
        teacher = runs[mopd]["teachers"][domain]
        names = runs[mopd]["parent"], teacher, mopd
        start, goal, end = (score(runs, name, domain) for name in names)
        if not (start and goal and end):
            continue
        gap, interval = difference(start, goal)
        part = spread = None
        if gap > 0 and gap >= GAP_ERRORS * interval / 1.96:
            part = (end["mean"] - start["mean"]) / gap
            # first-order error of the ratio; the start is in both differences
            intervals = end["interval"], part * goal["interval"], (1 - part) * start["interval"]
            spread = math.hypot(*intervals) / gap
        yield domain, teacher, start, goal, end, part, spread


def recovery_table(runs: dict) -> str:
    rows = []
    for domain, teacher, start, goal, end, part, spread in recoveries(runs):
        recovery = "no gap" if part is None else f"{part:.0%} +-{spread:.0%}"
        change = f"{end['mean'] - start['mean']:+.2f}"
        rows.append([domain, teacher, cell(start), cell(goal), cell(end), change, recovery])
    head = ["domain", "teacher", "start", "teacher's score", "after MOPD", "change", "recovery"]
    return table(head, rows)


def stage_table(runs: dict) -> str:
    """First and last steps of each run: length, entropy, mismatch, gradient norm; time, memory."""
    rows = []
    for name, run in runs.items():
        metrics, cells = run["metrics"], []
        for key, form in STEP_METRICS.values():
            ends = [format(x[key], form) for x in (metrics[0], metrics[-1]) if key in x]
            cells.append(" -> ".join(ends) or "-")
        times = [sum(x.get(f"time/{y}", 0) for x in metrics) for y in ("rollout", "score", "train")]
        seconds, memory = " / ".join(f"{x:.0f}" for x in times), f"{run['peak_kib'] / 2**20:.2f}"
        rows.append([name, *cells, str(len(metrics)), seconds, memory])
    head = ["run", *STEP_METRICS, "steps", "s: rollout / score / train", "GiB a rank"]
    return table(head, rows)


def write_scores(runs: dict, path: Path) -> None:
    """Write the numbers of the tables as CSV."""
    rows = [["run", "domain", "mean", "interval", "n"]]
    for name, run in runs.items():
        for domain in run["evaluation"]:
            if x := score(runs, name, domain):
                rows.append([name, domain, f"{x['mean']:.4f}", f"{x['interval']:.4f}", x["n"]])
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows(rows)


def main():
    if len(sys.argv) != 2:
        raise ValueError(f"usage: python {sys.argv[0]} DIRECTORY")
    out = Path(sys.argv[1])
    runs = read_cascade(out)
    sections = [
        ("Scores after every stage", "", score_table(runs)),
        ("What each RL stage gained", "", gain_table(runs)),
        (
            "What was forgotten",
            "The largest fall of each domain below its best score so far.\n\n",
            forgetting_table(runs),
        ),
        (
            "What MOPD brought back",
            "recovery = (MOPD - start) / (teacher - start), where teacher - start is at least "
            f"{GAP_ERRORS} standard errors; start is the run that MOPD started from.\n\n",
            recovery_table(runs),
        ),
        (
            "Each run",
            "First -> last step. Mismatch: mean exp abs(train - sampler log-prob) - 1.\n\n",
            stage_table(runs),
        ),
    ]
    start = next(iter(runs.values()))
    minutes = sum(run["seconds"] for run in runs.values()) / 60
    text = f"# The cascade in {out.name}, seed {start['seed']}, commit {start['commit'][:10]}\n\n"
    text += f"{minutes:.1f} minutes of training (evaluations apart). Scores are means at "
    text += "temperature 1 with 95 % intervals; bold is a stage's own domain.\n"
    text += "".join(f"\n## {title}\n\n{note}{body}\n" for title, note, body in sections)
    (out / "report.md").write_text(text)
    write_scores(runs, out / "scores.csv")
    print("\n\n".join(f"{title}\n{body}" for title, _, body in sections[:-1]))
    print(f"\nwritten: {out / 'report.md'}, {out / 'scores.csv'}")


if __name__ == "__main__":
    run_main(main)
