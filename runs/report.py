"""The report of a cascade: what each stage gained, what it forgot, what MOPD brought back.

    python runs/report.py runs/out          writes report.md and scores.csv

Everything is read from the runs' manifest.json, metrics.jsonl and rollouts.jsonl.
"""

import csv
import json
import sys
from pathlib import Path

from nanocascade.cli import run_main
from nanocascade.stages import CASCADE, RL_STAGES, TEACHER_OF

MAIN = [name for name, _, _ in CASCADE if name != "rlhf_side"]  # the cascade without its branch
RACES = (("if", "if_rl"), ("preference", "rlhf_side"))  # domain, the RL run that made its teacher
SIDE_RUNS = ("mopd_from_sft", "math_rl")  # for comparison only: from SFT; from MOPD's own start
GAP_ERRORS = 5  # a gap between teacher and start is one from this many standard errors on

PICTURES = {"Scores after every stage": ("cascade",), "Distillation step by step": ("mopd",)}
NOTES = {  # how to read a section, where the table alone does not say
    "What was forgotten": "The largest fall of each domain below its best score so far.\n\n",
    "What MOPD brought back": "recovery = (MOPD - start) / (teacher - start), where teacher - start"
    f" is at least {GAP_ERRORS} standard errors; start is multi_domain_rl.\n\n",
    "MOPD against the RL that made the teacher, from the same start": "Level: the teacher's score"
    " less its interval. Reached: mean outcome of the training samples over three steps; RL's"
    " samples count the groups that dynamic filtering dropped; it is there at its last step at the"
    " latest, where the teacher was evaluated.\n\n",
    "Each run": "First -> last step. Mismatch: mean exp abs(train - sampler log-prob) - 1.\n\n",
    "Rollouts": "The first and the last one that each run logged of one domain.\n\n",
}


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
    names = [name for name, _, _ in CASCADE]
    runs = {x: run for x in (*names, *SIDE_RUNS) if (run := read_run(out / x))}
    if missing := [name for name in names if name not in runs]:
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
    """The cascade's domains; what only SFT teaches (checks and revisions) has no later score."""
    names = [x for x in MAIN if x in runs]
    return [
        d for d in runs["sft"]["manifest"]["evaluation"] if all(score(runs, x, d) for x in names)
    ]


def score_table(runs: dict) -> str:
    """Every domain after every stage; the stage's own domains in bold."""
    names = [x for x in MAIN if x in runs]
    rows = []
    for domain in domains_of(runs):
        cells = [cell(score(runs, x, domain)) for x in names]
        own = [domain in own_domains(x) for x in names]
        rows.append([domain] + [f"**{c}**" if o else c for c, o in zip(cells, own, strict=True)])
    rows.append(["mean"] + [f"{mean_score(runs, x):.3f}" for x in names])
    return table(["domain", *names], rows)


def gains(runs: dict):
    """(run, domain, before, after, gain, its interval) of every RL stage and own domain."""
    for name, stage, start in CASCADE:
        for domain in own_domains(name) if stage in RL_STAGES else ():
            a, b = score(runs, start, domain), score(runs, name, domain)
            error = (a["interval"] ** 2 + b["interval"] ** 2) ** 0.5
            yield name, domain, a, b, b["mean"] - a["mean"], error


def gain_table(runs: dict) -> str:
    """Own-domain score before and after each RL stage."""
    rows = [
        [
            name,
            domain,
            cell(a),
            cell(b),
            f"{gain:+.2f} +-{error:.2f}",
            f"{runs[name]['manifest']['seconds'] / 60:.1f}",
        ]
        for name, domain, a, b, gain, error in gains(runs)
    ]
    return table(["stage", "own domain", "before", "after", "gain", "minutes"], rows)


def falls(runs: dict):
    """(domain, largest drop from its best score so far, the stage of most of it, its interval)."""
    names = [x for x in MAIN if x in runs]
    for domain in domains_of(runs):
        scores = [score(runs, x, domain) for x in names]
        means, best, worst = [x["mean"] for x in scores], 0, (0.0, "-", 0.0)
        for i in range(1, len(names)):
            steepest = min(range(best + 1, i + 1), key=lambda j: means[j] - means[j - 1])
            error = (scores[i]["interval"] ** 2 + scores[best]["interval"] ** 2) ** 0.5
            worst = min(worst, (means[i] - means[best], names[steepest], error))
            best = i if means[i] > means[best] else best
        yield domain, *worst


def forgetting_table(runs: dict) -> str:
    rows = [
        [domain, f"{drop:+.2f} +-{error:.2f}", stage] for domain, drop, stage, error in falls(runs)
    ]
    return table(["domain", "largest drop", "most of it in"], rows)


def recoveries(runs: dict):
    """(domain, teacher, start, goal, end, recovery, its interval) of MOPD; None where no gap.

    recovery = (MOPD - start) / (teacher - start), where the gap is GAP_ERRORS errors or more.
    """
    teachers = runs["mopd"]["manifest"]["teachers"]
    by_path = {str(Path(r["manifest"]["config"]["out"])): name for name, r in runs.items()}
    for domain in TEACHER_OF:
        teacher = by_path[str(Path(teachers[domain]["path"]))]
        start, end = score(runs, "multi_domain_rl", domain), score(runs, "mopd", domain)
        goal = score(runs, teacher, domain)
        gap = goal["mean"] - start["mean"]
        error = ((goal["interval"] ** 2 + start["interval"] ** 2) ** 0.5) / 1.96
        part = spread = None
        if gap > 0 and gap >= GAP_ERRORS * error:
            part = (end["mean"] - start["mean"]) / gap
            # first-order error of the ratio, start being in both differences
            spread = (
                (
                    end["interval"] ** 2
                    + (part * goal["interval"]) ** 2
                    + ((1 - part) * start["interval"]) ** 2
                )
                ** 0.5
            ) / gap
        yield domain, teacher, start, goal, end, part, spread


def recovery_table(runs: dict) -> str:
    rows = []
    for domain, teacher, start, goal, end, part, spread in recoveries(runs):
        recovery = "no gap" if part is None else f"{part:.0%} +-{spread:.0%}"
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


def races(runs: dict):
    """(domain, level, RL's point, MOPD's point): where each first reaches the teacher's score, less
    its interval, both from SFT; RL by its last step at the latest, since its end is the teacher.
    MOPD's point is None where it never does."""
    for domain, teacher in RACES if "mopd_from_sft" in runs else ():
        goal = score(runs, teacher, domain)
        level = goal["mean"] - goal["interval"]
        rl, mopd = (curve(runs[name], domain) for name in (teacher, "mopd_from_sft"))
        yield domain, level, first_reach(rl, level) or rl[-1], first_reach(mopd, level)


def race_table(runs: dict) -> str:
    """MOPD against the RL that made the teacher: cost of the teacher's score."""
    rows = []
    for domain, level, a, b in races(runs):
        for label, i in (("steps", 0), ("samples", 1), ("seconds", 2)):
            cells = [f"{x[i]:.0f}" if x else "not reached" for x in (a, b)]
            times = f"{a[i] / b[i]:.1f}x" if a and b and b[i] else "-"
            rows.append([domain, f"{level:.2f}", label, *cells, times])
    if "math_rl" in runs:  # its teacher was made by SFT, so that no RL has shown what it costs
        ends = [
            f"{cell(score(runs, x, 'math'))} after {curve(runs[x], 'math')[-1][1]:.0f} samples"
            for x in ("math_rl", "mopd")
        ]
        rows.append(["math, from multi_domain_rl", "-", "(no target)", *ends, "-"])
    return table(["domain", "level", "to reach it", "RL", "MOPD", "RL / MOPD"], rows)


def mean_score(runs: dict, name: str) -> float:
    return sum(score(runs, name, d)["mean"] for d in domains_of(runs)) / len(domains_of(runs))


def claims(runs: dict) -> list[tuple]:
    """(claim, wanted, measured, whether it holds): what the cascade is meant to show."""
    taught = [score(runs, "sft", d)["mean"] for d in domains_of(runs) if d != "preference"]
    graded = [x for x in gains(runs) if x[1] != "preference"]
    least = min(graded, key=lambda x: x[4])
    wins = min(score(runs, x, "preference")["mean"] for x in ("rlhf_side", "rlhf"))
    found = list(recoveries(runs))
    parts = [(part, domain) for domain, *_, part, _ in found if part is not None]
    recovered = "least {:.0%} ({})".format(*min(parts)) if parts else "no gap"
    change = min([x[4]["mean"] - x[2]["mean"] for x in found if x[5] is None], default=0.0)
    times = [
        (domain, *(a[i] / b[i] if a and b and b[i] else 0.0 for i in (1, 2)))
        for domain, _, a, b in races(runs)
    ]
    rise = mean_score(runs, MAIN[-1]) - mean_score(runs, "sft")
    return [
        (
            "after SFT, domains with a right answer",
            "0.2 to 0.8",
            f"{min(taught):.2f} to {max(taught):.2f}",
            0.2 <= min(taught) and max(taught) <= 0.8,
        ),
        (
            "each RL stage on its own domains",
            "+0.10, beyond the interval",
            f"least {least[4]:+.2f} +-{least[5]:.2f} ({least[1]})",
            all(x[4] >= 0.1 and x[4] > x[5] for x in graded),
        ),
        ("win rate after RLHF", "0.60", f"{wins:.2f}", wins >= 0.6),
        ("MOPD recovers of each gap", "90 %", recovered, bool(parts) and min(parts)[0] >= 0.9),
        ("MOPD, taught domains without a gap", "-0.02 at most", f"{change:+.3f}", change >= -0.02),
        (
            "MOPD against the teacher's RL",
            "fewer samples and seconds",
            ", ".join(f"{x} {a:.1f}x, {b:.1f}x" for x, a, b in times) or "not run",
            bool(times) and all(min(x[1:]) > 1 for x in times),
        ),
        ("mean over domains, last stage against SFT", "+0.20", f"{rise:+.3f}", rise >= 0.2),
    ]


def claim_table(runs: dict) -> str:
    rows = [[*words, "yes" if holds else "**no**"] for *words, holds in claims(runs)]
    return table(["claim", "wanted", "measured", "holds"], rows)


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


def distillation_table(runs: dict) -> str:
    """Reverse KL to each teacher and gradient norm over the steps of MOPD."""
    metrics = runs["mopd"]["metrics"]
    kinds = sorted({k for m in metrics for k in m if k.startswith("mopd/reverse_kl")})
    picked = [m for i, m in enumerate(metrics) if i % max(len(metrics) // 8, 1) == 0] + metrics[-1:]
    rows = [
        [
            str(m["step"]),
            *(f"{m[k]:.4f}" if k in m else "-" for k in kinds),
            f"{m['grad_norm']:.3f}",
        ]
        for m in picked
    ]
    return table(["step", *[k.removeprefix("mopd/") for k in kinds], "grad norm"], rows)


def example_text(runs: dict) -> str:
    """A whole rollout of each run at its first step, and one of the same domain at its last."""
    parts = []
    for name, run in runs.items():
        alike = [x for x in run["rollouts"] if x["domain"] == run["rollouts"][0]["domain"]]
        for when, x in (("before", alike[0]), ("after", alike[-1])) if alike else ():
            text = ("[...] " + x["prompt"][-400:])[-len(x["prompt"]) :] + x["response"]
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
    sections = [
        ("What was to be shown", claim_table(runs)),
        ("Scores after every stage", score_table(runs)),
        ("What each RL stage gained", gain_table(runs)),
        ("What was forgotten", forgetting_table(runs)),
        ("What MOPD brought back", recovery_table(runs)),
        ("MOPD against the RL that made the teacher, from the same start", race_table(runs)),
        ("Distillation step by step", distillation_table(runs)),
        ("Each run", stage_table(runs)),
        ("Rollouts", example_text(runs)),
    ]
    ends = f"{mean_score(runs, 'sft'):.3f} after SFT, {mean_score(runs, MAIN[-1]):.3f} at the end"
    text = f"# The toy cascade, seed {runs['sft']['manifest']['seed']}, commit "
    text += f"{runs['sft']['manifest']['commit'][:10]}\n\n"
    text += f"{minutes:.1f} minutes of training (evaluations apart). Scores are means at "
    text += "temperature 1 with 95 % intervals; bold is a stage's own domain. Mean over domains: "
    text += ends + ".\n"
    for title, body in sections:
        text += f"\n## {title}\n\n{NOTES.get(title, '')}"
        text += "".join(
            f"![{x}]({x}.png)\n\n" for x in PICTURES.get(title, ()) if (out / f"{x}.png").exists()
        )
        text += body + "\n"
    (out / "report.md").write_text(text)
    write_scores(runs, out / "scores.csv")
    print("\n\n".join(f"{title}\n{body}" for title, body in sections[:6]))
    print(f"\nmean over domains: {ends}")
    print(f"written: {out / 'report.md'}, {out / 'scores.csv'}")


if __name__ == "__main__":
    run_main(main)
