"""The report of a cascade: what each stage gained, what it forgot, what MOPD brought back.

    python runs/report.py runs/out          writes report.md and scores.csv

Everything is read from the runs' manifest.json and metrics.jsonl.
"""

import csv
import json
import math
import sys
from itertools import pairwise
from pathlib import Path

from nanocascade.cli import run_main
from nanocascade.files import read_json, read_text
from nanocascade.stages import RL_STAGES, TEACHER_OF

GAP_ERRORS = 5  # smallest gap between teacher and start that counts, in standard errors

NOTES = {  # text above the table of a section
    "What was forgotten": "The largest fall of each domain below its best score so far.\n\n",
    "What MOPD brought back": "recovery = (MOPD - start) / (teacher - start), where teacher - start"
    f" is at least {GAP_ERRORS} standard errors; start is the run that MOPD started from.\n\n",
    "Each run": "First -> last step. Mismatch: mean exp abs(train - sampler log-prob) - 1.\n\n",
}


def read_run(path: Path) -> dict | None:
    """{"manifest": {...}, "metrics": [a dict for each step]} of a finished run."""
    if not (path / "manifest.json").exists():
        return None
    metrics = [json.loads(line) for line in read_text(path / "metrics.jsonl").splitlines()]
    return {"manifest": read_json(path / "manifest.json"), "metrics": metrics}


def read_runs(argv: list[str]) -> tuple[Path, dict]:
    """The directory of the command line and its finished runs by name, parents first."""
    if len(argv) != 2:
        raise ValueError(f"usage: python {argv[0]} DIRECTORY")
    out = Path(argv[1])
    runs = {x.parent.name: read_run(x.parent) for x in sorted(out.glob("*/manifest.json"))}
    if not runs:
        raise ValueError(f"{out}: no finished run in it")
    return out, {name: runs[name] for name in sorted(runs, key=lambda x: len(line_to(runs, x)))}


def start_of(runs: dict, name: str) -> str | None:
    """The run that this one started from; None if it is not among these."""
    parent = runs[name]["manifest"]["parent"] or {"path": ""}
    return Path(parent["path"]).name if Path(parent["path"]).name in runs else None


def line_to(runs: dict, name: str) -> list[str]:
    """The chain of parents of a run, and the run itself."""
    start = start_of(runs, name)
    return [*line_to(runs, start), name] if start else [name]


def main_line(runs: dict) -> list[str]:
    """The longest chain of runs that start one from another: the cascade without its branches."""
    return max((line_to(runs, name) for name in runs), key=len)


def score(runs: dict, name: str, domain: str) -> dict | None:
    """{"mean", "interval", "n"} of a domain after a run."""
    return runs[name]["manifest"]["evaluation"].get(domain, {}).get("after")


def difference(a: dict, b: dict) -> tuple[float, float]:
    """(score b - score a, its interval)."""
    return b["mean"] - a["mean"], math.hypot(a["interval"], b["interval"])


def cell(x: dict | None) -> str:
    return f"{x['mean']:.2f} +-{x['interval']:.2f}" if x else "-"


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def own_domains(runs: dict, name: str) -> list[str]:
    """The domains that a run trained by reward or, in MOPD, by a teacher of the report."""
    manifest = runs[name]["manifest"]
    if manifest["stage"] in RL_STAGES:
        chosen = manifest["config"].get("domains") or RL_STAGES[manifest["stage"]]["domains"]
        return list(chosen)
    return [domain for domain in TEACHER_OF if domain in manifest["teachers"]]


def domains_of(runs: dict) -> list[str]:
    """The domains with a score after every run of the main line."""
    names = main_line(runs)
    domains = runs[names[0]]["manifest"]["evaluation"]
    return [d for d in domains if all(score(runs, name, d) for name in names)]


def score_table(runs: dict) -> str:
    """Every domain after every stage; the stage's own domains in bold."""
    rows, names = [], main_line(runs)
    own = {name: own_domains(runs, name) for name in names}
    for domain in domains_of(runs):
        cells = {name: cell(score(runs, name, domain)) for name in names}
        cells = [f"**{x}**" if domain in own[name] else x for name, x in cells.items()]
        rows.append([domain, *cells])
    rows.append(["mean", *(f"{mean_score(runs, name):.3f}" for name in names)])
    return table(["domain", *names], rows)


def gains(runs: dict):
    """(run, domain, before, after, gain, its interval) of every RL stage and own domain."""
    for name, run in runs.items():
        start = start_of(runs, name) if run["manifest"]["stage"] in RL_STAGES else None
        for domain in own_domains(runs, name) if start else ():
            before, after = score(runs, start, domain), score(runs, name, domain)
            if before and after:
                yield name, domain, before, after, *difference(before, after)


def gain_table(runs: dict) -> str:
    """Own-domain score before and after each RL stage."""
    rows = []
    for name, domain, before, after, gain, error in gains(runs):
        minutes = f"{runs[name]['manifest']['seconds'] / 60:.1f}"
        change = f"{gain:+.2f} +-{error:.2f}"
        rows.append([name, domain, cell(before), cell(after), change, minutes])
    return table(["stage", "own domain", "before", "after", "gain", "minutes"], rows)


def falls(runs: dict):
    """(domain, largest drop from its best score so far, the stage of most of it, its interval)."""
    names = main_line(runs)
    for domain in domains_of(runs):
        scores = [score(runs, name, domain) for name in names]
        steps = [0.0] + [difference(a, b)[0] for a, b in pairwise(scores)]
        best, worst = 0, (0.0, "-", 0.0)
        for i in range(1, len(names)):
            steepest = min(range(best + 1, i + 1), key=lambda j: steps[j])
            drop, error = difference(scores[best], scores[i])
            worst = min(worst, (drop, names[steepest], error))
            best = i if drop > 0 else best
        yield domain, *worst


def forgetting_table(runs: dict) -> str:
    rows = [
        [domain, f"{drop:+.2f} +-{error:.2f}", stage] for domain, drop, stage, error in falls(runs)
    ]
    return table(["domain", "largest drop", "most of it in"], rows)


def recoveries(runs: dict):
    """(domain, teacher, start, goal, end, recovery, its interval) of MOPD; None without a gap.

    recovery = (MOPD - start) / (teacher - start), where the gap is GAP_ERRORS errors or more.
    """
    found = [x for x in main_line(runs) if runs[x]["manifest"]["stage"] == "mopd"]
    mopd = found[0] if found else None
    for domain in own_domains(runs, mopd) if mopd else ():
        teacher = Path(runs[mopd]["manifest"]["teachers"][domain]["path"]).name
        start, end = score(runs, start_of(runs, mopd), domain), score(runs, mopd, domain)
        goal = score(runs, teacher, domain) if teacher in runs else None
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


def mean_score(runs: dict, name: str) -> float:
    return sum(score(runs, name, d)["mean"] for d in domains_of(runs)) / len(domains_of(runs))


def stage_table(runs: dict) -> str:
    """First and last steps of each run: length, entropy, mismatch, gradient norm; time, memory."""
    rows = []
    for name, run in runs.items():
        metrics, cells = run["metrics"], [name]
        for key, form in (
            ("response/length", ".1f"),
            ("entropy", ".2f"),
            ("grad_norm", ".2f"),
            ("mismatch/prob_error", ".0e"),
            ("moe/load_max", ".1f"),
        ):
            ends = [m[key] for m in (metrics[0], metrics[-1]) if key in m]
            cells.append(" -> ".join(format(x, form) for x in ends) or "-")
        steps = len(metrics)
        times = [sum(m.get(f"time/{x}", 0) for m in metrics) for x in ("rollout", "score", "train")]
        memory = f"{run['manifest']['peak_kib'] / 2**20:.2f}"
        rows.append(cells + [str(steps), " / ".join(f"{t:.0f}" for t in times), memory])
    head = [
        "run",
        "length",
        "entropy",
        "grad norm",
        "mismatch",
        "load max",
        "steps",
        "s: rollout / score / train",
        "GiB a rank",
    ]
    return table(head, rows)


def write_scores(runs: dict, path: Path) -> None:
    """Write the numbers of the tables as CSV."""
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["run", "domain", "mean", "interval", "n"])
        for name, run in runs.items():
            for domain, x in run["manifest"]["evaluation"].items():
                if x.get("after"):
                    after = [f"{x['after'][key]:.4f}" for key in ("mean", "interval")]
                    writer.writerow([name, domain, *after, x["after"]["n"]])


def main():
    out, runs = read_runs(sys.argv)
    sections = [
        ("Scores after every stage", score_table(runs)),
        ("What each RL stage gained", gain_table(runs)),
        ("What was forgotten", forgetting_table(runs)),
        ("What MOPD brought back", recovery_table(runs)),
        ("Each run", stage_table(runs)),
    ]
    start = runs[main_line(runs)[0]]["manifest"]
    minutes = sum(run["manifest"]["seconds"] for run in runs.values()) / 60
    text = f"# The cascade in {out.name}, seed {start['seed']}, commit {start['commit'][:10]}\n\n"
    text += f"{minutes:.1f} minutes of training (evaluations apart). Scores are means at "
    text += "temperature 1 with 95 % intervals; bold is a stage's own domain.\n"
    for title, body in sections:
        text += f"\n## {title}\n\n{NOTES.get(title, '')}"
        text += body + "\n"
    (out / "report.md").write_text(text)
    write_scores(runs, out / "scores.csv")
    print("\n\n".join(f"{title}\n{body}" for title, body in sections[:-1]))
    print(f"\nwritten: {out / 'report.md'}, {out / 'scores.csv'}")


if __name__ == "__main__":
    run_main(main)
