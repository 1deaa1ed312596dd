"""Check the claims on a cascade of the toy; compare MOPD with RL step by step.

    python -m bench.claims runs/out          prints it and writes claims.md

Seven claims on the tables of runs/report.py, each with the number that we demand of our recipe.
"""

import sys
from pathlib import Path

from nanocascade.cli import run_main
from nanocascade.run.read import main_chain
from runs.report import (
    cell,
    domains_of,
    gains,
    mean_score,
    read_cascade,
    recoveries,
    score,
    table,
)

RACES = (("if", "if_rl"), ("preference", "rlhf_side"))  # domain, the RL run that made its teacher


def curve(run: dict, domain: str, window: int = 3) -> list[tuple[int, float, float, float]]:
    """(step, samples so far, seconds so far, outcome averaged over `window` steps) while training.

    Outcomes are of the training samples themselves: on-policy, at temperature 1, new prompts.
    """
    samples, points, values = 0.0, [], []
    config = run["config"]
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


def claims(runs: dict) -> list[tuple]:
    """(claim, wanted, measured, whether it holds): what the cascade is meant to show."""
    taught = [score(runs, "sft", d)["mean"] for d in domains_of(runs) if d != "preference"]
    graded = [x for x in gains(runs) if x[1] != "preference" and x[0] != "math_rl"]
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
    rise = mean_score(runs, main_chain(runs)[-1]) - mean_score(runs, "sft")
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


NOTE = """Level: the teacher's score less its interval. Reached: mean outcome of the training
samples over three steps; RL's samples count the groups that dynamic filtering dropped; it is there
at its last step at the latest, where the teacher was evaluated.
"""


def main():
    if len(sys.argv) != 2:
        raise ValueError(f"usage: python {sys.argv[0]} DIRECTORY")
    out = Path(sys.argv[1])
    runs = read_cascade(out)
    if missing := {"sft", "rlhf_side", "mopd", "rlhf"} - set(runs):
        raise ValueError(
            f"{out}: the claims are about finished runs of {', '.join(sorted(missing))}"
        )
    text = f"## What was to be shown\n\n{claim_table(runs)}\n\n"
    text += "## MOPD against the RL that made the teacher, from the same start\n\n"
    text += f"{NOTE}\n{race_table(runs)}\n"
    (out / "claims.md").write_text(text)
    print(text)


if __name__ == "__main__":
    run_main(main)
