"""The report of a cascade: what each stage gained, what it forgot, what MOPD brought back.

    python runs/report.py runs/out          writes report.md and scores.csv

Everything is read from the runs' manifest.json, metrics.jsonl and rollouts.jsonl.
"""

import csv
import json
import sys
from pathlib import Path

from nanocascade.config import run_main
from nanocascade.stages import CASCADE, RL_STAGES, TEACHER_OF

MAIN = [name for name, _, _ in CASCADE if name != "rlhf_side"]  # the cascade without its branch
GAP_ERRORS = 5  # a gap between teacher and start is one from this many standard errors on


def read_run(path: Path) -> dict | None:
    """{"manifest", "metrics": [...], "rollouts": [...]} of a finished run."""
    if not (path / "manifest.json").exists():
        return None
    lines = {}
    for name in ("metrics", "rollouts"):
        with open(path / f"{name}.jsonl") as file:
            lines[name] = [json.loads(x) for x in file]
    return {"manifest": json.loads((path / "manifest.json").read_text()), **lines}


def read_runs(argv: list[str]) -> tuple[Path, dict]:
    """The directory on the command line and its finished runs; ValueError if one is missing."""
    if len(argv) != 2:
        raise ValueError(f"usage: python {argv[0]} DIRECTORY")
    out = Path(argv[1])
    names = [name for name, _, _ in CASCADE] + ["mopd_from_sft"]
    runs = {name: run for name in names if (run := read_run(out / name))}
    if missing := [name for name in names[:-1] if name not in runs]:
        raise ValueError(f"{out}: no finished run of {', '.join(missing)}")
    return out, runs


def score(runs: dict, name: str, domain: str, which: str = "after") -> dict | None:
    return runs[name]["manifest"]["evaluation"].get(domain, {}).get(which)


def cell(x: dict | None) -> str:
    return f"{x['mean']:.2f} +-{x['interval']:.2f}" if x else "-"


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def own_domains(name: str) -> list[str]:
    if name == "mopd":
        return list(TEACHER_OF)
    return list(RL_STAGES[name.removesuffix("_side")]["domains"]) if name != "sft" else []


def domains_of(runs: dict) -> list[str]:
    return list(runs["sft"]["manifest"]["evaluation"])


def score_table(runs: dict) -> str:
    """Every domain after every stage; the stage's own domains in bold."""
    names = [x for x in MAIN if x in runs]
    rows = []
    for domain in domains_of(runs):
        cells = [cell(score(runs, x, domain)) for x in names]
        own = [domain in own_domains(x) for x in names]
        rows.append([domain] + [f"**{c}**" if o else c for c, o in zip(cells, own, strict=True)])
    mean = [sum(score(runs, x, d)["mean"] for d in domains_of(runs)) / len(rows) for x in names]
    rows.append(["mean"] + [f"{x:.3f}" for x in mean])
    return table(["domain", *names], rows)


def gain_table(runs: dict) -> str:
    """Own-domain score before and after each RL stage."""
    rows = []
    for name, _, start in CASCADE:
        if name in runs and name not in ("sft", "mopd"):
            for domain in own_domains(name):
                a, b = score(runs, start, domain), score(runs, name, domain)
                error = (a["interval"] ** 2 + b["interval"] ** 2) ** 0.5
                gain = f"{b['mean'] - a['mean']:+.2f} +-{error:.2f}"
                minutes = f"{runs[name]['manifest']['seconds'] / 60:.1f}"
                rows.append([name, domain, cell(a), cell(b), gain, minutes])
    return table(["stage", "own domain", "before", "after", "gain", "minutes"], rows)


def forgetting_table(runs: dict) -> str:
    """The largest drop of each domain from its best score so far, and the stage that did it."""
    names, rows = [x for x in MAIN if x in runs], []
    for domain in domains_of(runs):
        best, worst = score(runs, names[0], domain), (0.0, "-", 0.0)
        for name in names[1:]:
            now = score(runs, name, domain)
            error = (now["interval"] ** 2 + best["interval"] ** 2) ** 0.5
            worst = min(worst, (now["mean"] - best["mean"], name, error))
            best = max(best, now, key=lambda x: x["mean"])
        rows.append([domain, f"{worst[0]:+.2f} +-{worst[2]:.2f}", worst[1]])
    return table(["domain", "largest drop", "after stage"], rows)


def recovery_table(runs: dict) -> str:
    """recovery = (MOPD - start) / (teacher - start), where the gap is GAP_ERRORS errors or more."""
    teachers = runs["mopd"]["manifest"]["teachers"]
    by_path = {str(Path(r["manifest"]["config"]["out"])): name for name, r in runs.items()}
    rows = []
    for domain in TEACHER_OF:
        teacher = by_path.get(str(Path(teachers[domain]["path"])), "?")
        start, end = score(runs, "multi_domain_rl", domain), score(runs, "mopd", domain)
        goal = score(runs, teacher, domain)
        gap = goal["mean"] - start["mean"]
        error = ((goal["interval"] ** 2 + start["interval"] ** 2) ** 0.5) / 1.96
        recovery = "no gap"
        if gap > 0 and gap >= GAP_ERRORS * error:
            part = (end["mean"] - start["mean"]) / gap
            # first-order error of the ratio, start being in both differences
            spread = ((end["interval"] ** 2 + (part * goal["interval"]) ** 2
                       + ((1 - part) * start["interval"]) ** 2) ** 0.5) / gap  # fmt: skip
            recovery = f"{part:.0%} +-{spread:.0%}"
        change = f"{end['mean'] - start['mean']:+.2f}"
        rows.append([domain, teacher, cell(start), cell(goal), cell(end), change, recovery])
    head = ["domain", "teacher", "start", "teacher's score", "after MOPD", "change", "recovery"]
    return table(head, rows)


def curve(run: dict, domain: str, window: int = 3) -> list[tuple[int, float, float, float]]:
    """(step, samples so far, seconds so far, outcome averaged over `window` steps) while training.

    Outcomes are of the training samples themselves: on-policy, at temperature 1, new prompts.
    """
    samples, points, values = 0.0, [], []
    config = run["manifest"]["config"]
    for x in run["metrics"]:
        tried = x.get("group/tried", config["prompts"]) * config["rollouts"]
        share = x.get(f"mopd/prompt_share/{domain}", 1.0)
        # Dynamic filtering drops groups from the batch, so its outcomes are of what it kept.
        outcome = x.get("outcome/drawn" if config.get("dynamic_filtering") else f"outcome/{domain}")
        if outcome is None:
            continue
        values.append(outcome)
        recent = values[-window:]
        points.append((x["step"], samples, x["time/elapsed"], sum(recent) / len(recent)))
        samples += tried * share
    return points


def first_reach(points, goal: float):
    return next((p for p in points if p[3] >= goal), None)


def race_table(runs: dict) -> str:
    """MOPD against the RL that made the teacher, both from SFT: cost of the teacher's score."""
    if "mopd_from_sft" not in runs:
        return "(not run)"
    rows = []
    for domain, teacher in (("if", "if_rl"), ("preference", "rlhf_side")):
        goal = score(runs, teacher, domain)
        level = goal["mean"] - goal["interval"]
        rl, mopd = curve(runs[teacher], domain), curve(runs["mopd_from_sft"], domain)
        a, b = first_reach(rl, level), first_reach(mopd, level)
        for label, i in (("steps", 0), ("samples", 1), ("seconds", 2)):
            cells = [f"{x[i]:.0f}" if x else "not reached" for x in (a, b)]
            times = f"{a[i] / b[i]:.1f}x" if a and b and b[i] else "-"
            rows.append([domain, f"{level:.2f}", label, *cells, times])
    return table(["domain", "level", "to reach it", "RL", "MOPD", "RL / MOPD"], rows)


def stage_table(runs: dict) -> str:
    """First and last steps of each run: length, entropy, mismatch, gradient norm; time, memory."""
    rows = []
    for name, run in runs.items():
        metrics, cells = run["metrics"], [name]
        for key, form in (("response/length", ".1f"), ("entropy", ".2f"), ("grad_norm", ".2f"),
                          ("mismatch/prob_error", ".0e"), ("moe/load_max", ".1f")):  # fmt: skip
            ends = [m[key] for m in (metrics[0], metrics[-1]) if key in m]
            cells.append(" -> ".join(format(x, form) for x in ends) or "-")
        steps = len(metrics)
        times = [sum(m.get(f"time/{x}", 0) for m in metrics) for x in ("rollout", "score", "train")]
        memory = f"{run['manifest']['peak_kib'] / 2**20:.2f}"
        rows.append(cells + [str(steps), " / ".join(f"{t:.0f}" for t in times), memory])
    head = ["run", "length", "entropy", "grad norm", "mismatch", "load max", "steps",
            "s: rollout / score / train", "GiB a rank"]  # fmt: skip
    return table(head, rows)


def distillation_table(runs: dict) -> str:
    """Reverse KL to each teacher and gradient norm over the steps of MOPD."""
    metrics = runs["mopd"]["metrics"]
    kinds = sorted({k for m in metrics for k in m if k.startswith("mopd/reverse_kl")})
    picked = [m for i, m in enumerate(metrics) if i % max(len(metrics) // 8, 1) == 0] + metrics[-1:]
    rows = [[str(m["step"]), *(f"{m[k]:.4f}" if k in m else "-" for k in kinds),
             f"{m['grad_norm']:.3f}"] for m in picked]  # fmt: skip
    return table(["step", *[k.removeprefix("mopd/") for k in kinds], "grad norm"], rows)


def example_text(runs: dict) -> str:
    """One whole rollout of each RL stage at its first and at its last logged step."""
    parts = []
    for name, run in runs.items():
        if run["rollouts"]:
            for when, x in (("first", run["rollouts"][0]), ("last", run["rollouts"][-1])):
                text = x["prompt"][-400:] + x["response"]
                verdict = f"reward {x['reward']:.2f} ({x['reason']}), {x['stop_reason']}"
                parts.append(f"**{name}, {when}**: {verdict}\n\n````text\n{text}\n````")
    return "\n\n".join(parts)  # four ticks: an answer may hold a fence of three


def write_scores(runs: dict, path: Path) -> None:
    """The numbers behind the tables and the picture."""
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
    minutes = sum(run["manifest"]["seconds"] for run in runs.values()) / 60
    first, last = ("sft", "swe_rl")
    means = [sum(score(runs, x, d)["mean"] for d in domains_of(runs)) / len(domains_of(runs))
             for x in (first, last)]  # fmt: skip
    sections = [
        ("Scores after every stage", score_table(runs)),
        ("What each RL stage gained", gain_table(runs)),
        ("What was forgotten", forgetting_table(runs)),
        ("What MOPD brought back", recovery_table(runs)),
        ("MOPD against the RL that made the teacher, from the same start", race_table(runs)),
        ("Distillation step by step", distillation_table(runs)),
        ("Each run", stage_table(runs)),
        ("Rollouts", example_text(runs)),
    ]
    commit = runs["sft"]["manifest"]["commit"][:10]
    text = f"# The toy cascade, seed {runs['sft']['manifest']['seed']}, commit {commit}\n\n"
    text += f"{minutes:.1f} minutes of training (evaluations apart). Scores are means at "
    text += "temperature 1 with 95 % intervals; bold is a stage's own domain. Mean over domains: "
    text += f"{means[0]:.3f} after SFT, {means[1]:.3f} at the end.\n"
    for title, body in sections:
        text += f"\n## {title}\n\n{body}\n"
    (out / "report.md").write_text(text)
    write_scores(runs, out / "scores.csv")
    print("\n\n".join(f"{title}\n{body}" for title, body in sections[:5]))
    print(f"\nmean over domains: {means[0]:.3f} after SFT, {means[1]:.3f} at the end")
    print(f"written: {out / 'report.md'}, {out / 'scores.csv'}")


if __name__ == "__main__":
    run_main(main)
