"""The pictures of a cascade: scores along the stages, and MOPD against RL. Needs matplotlib.

python -m bench.plot runs/out            writes cascade.png and mopd.png
"""

import sys
from pathlib import Path

try:
    import matplotlib.pyplot as plt
except ImportError:
    sys.exit("no plots: pip install matplotlib")

from bench.claims import RACES, curve
from nanocascade.stages import TEACHER_OF
from runs.report import domains_of, main_line, own_domains, read_runs, score


def draw_cascade(runs: dict, path: Path) -> None:
    """One small panel a domain: its score after every stage, its own stages in colour."""
    names, domains = main_line(runs), domains_of(runs)
    figure, axes = plt.subplots(3, 3, figsize=(11, 7), sharex=True, sharey=True)
    for ax, domain in zip(axes.flat, domains, strict=False):
        points = [score(runs, x, domain) for x in names]
        ax.errorbar(
            range(len(names)),
            [p["mean"] for p in points],
            [p["interval"] for p in points],
            color="0.45",
            lw=1.2,
            capsize=2,
        )
        for i, name in enumerate(names):
            if domain in own_domains(runs, name):
                color = "tab:green" if name == "mopd" else "tab:red"
                ax.plot(i, points[i]["mean"], "o", color=color, ms=6)
        ax.set_title(domain, fontsize=10)
        ax.set_ylim(0, 1.02)
        ax.grid(alpha=0.25)
    for ax in axes[-1]:
        ax.set_xticks(range(len(names)), names, rotation=60, ha="right", fontsize=8)
    figure.suptitle("Score of each domain after each stage (red: trained by RL, green: distilled)")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def draw_mopd(runs: dict, path: Path) -> None:
    """MOPD step by step, and its races against RL from the same start."""
    figure, axes = plt.subplots(2, 3, figsize=(12, 6.4))
    kl, norm, outcome, *others = axes.flat
    metrics = runs["mopd"]["metrics"]
    for name in sorted(set(TEACHER_OF.values())):
        points = [
            (m["step"], m[f"mopd/reverse_kl/{name}"])
            for m in metrics
            if f"mopd/reverse_kl/{name}" in m
        ]
        kl.plot(*zip(*points, strict=True), label=f"teacher {name}")
    kl.set(title="MOPD: reverse KL, nats a token", xlabel="step", ylim=(0, None))
    norm.plot([m["step"] for m in metrics], [m["grad_norm"] for m in metrics])
    norm.set(title="MOPD: gradient norm", xlabel="step", ylim=(0, None))
    for domain in TEACHER_OF:
        points = curve(runs["mopd"], domain)
        outcome.plot([p[0] for p in points], [p[3] for p in points], label=domain)
    outcome.set(title="MOPD: score of its own samples", xlabel="step", ylim=(0, 1.02))
    races = [(*x, "mopd_from_sft", "sft") for x in RACES] if "mopd_from_sft" in runs else []
    races += [("math", "math_rl", "mopd", "multi_domain_rl")] if "math_rl" in runs else []
    for ax, (domain, rl, mopd, start) in zip(others, races, strict=False):
        for name, label in ((rl, "RL"), (mopd, "MOPD")):
            points = curve(runs[name], domain)
            ax.plot([p[1] for p in points], [p[3] for p in points], label=label)
        teacher = score(runs, "sft" if domain == "math" else rl, domain)
        ax.axhline(teacher["mean"], color="0.6", ls="--", lw=1, label="teacher")
        ax.set(title=f"{domain}, both from {start}", xlabel="samples", ylim=(0, 1.02))
    for ax in axes.flat:
        ax.grid(alpha=0.25)
        if ax.get_legend_handles_labels()[0]:
            ax.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    plt.switch_backend("Agg")
    directory, finished = read_runs(sys.argv)
    draw_cascade(finished, directory / "cascade.png")
    draw_mopd(finished, directory / "mopd.png")
    print(f"written: {directory / 'cascade.png'}, {directory / 'mopd.png'}")
