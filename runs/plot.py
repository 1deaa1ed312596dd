"""The pictures of a cascade: scores along the stages, and MOPD against RL. Needs matplotlib.

    python runs/plot.py runs/out            writes cascade.png and mopd.png
"""

import sys
from pathlib import Path

try:
    import matplotlib.pyplot as plt
except ImportError:
    sys.exit("no plots: pip install matplotlib")

from report import MAIN, RACES, TEACHER_OF, curve, domains_of, own_domains, read_runs, score


def draw_cascade(runs: dict, path: Path) -> None:
    """One small panel a domain: its score after every stage, its own stages in colour."""
    names, domains = [x for x in MAIN if x in runs], domains_of(runs)
    figure, axes = plt.subplots(3, 3, figsize=(11, 7), sharex=True, sharey=True)
    for ax, domain in zip(axes.flat, domains, strict=False):
        points = [score(runs, x, domain) for x in names]
        ax.errorbar(
            range(len(names)), [p["mean"] for p in points], [p["interval"] for p in points],
            color="0.45", lw=1.2, capsize=2,
        )  # fmt: skip
        for i, name in enumerate(names):
            if domain in own_domains(name):
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
    """Reverse KL and gradient norm of MOPD, and its races against RL from the same start."""
    races = [(*x, "mopd_from_sft") for x in RACES] if "mopd_from_sft" in runs else []
    races += [("math", "math_rl", "mopd")] if "math_rl" in runs else []
    figure, axes = plt.subplots(1, 2 + len(races), figsize=(4 * (2 + len(races)), 3.4))
    metrics = runs["mopd"]["metrics"]
    for name in sorted(set(TEACHER_OF.values())):
        points = [(m["step"], m[f"mopd/reverse_kl/{name}"]) for m in metrics
                  if f"mopd/reverse_kl/{name}" in m]  # fmt: skip
        axes[0].plot(*zip(*points, strict=True), label=f"teacher {name}")
    axes[0].set(title="MOPD: reverse KL, nats a token", xlabel="step", ylim=(0, None))
    axes[0].legend(fontsize=8)
    axes[1].plot([m["step"] for m in metrics], [m["grad_norm"] for m in metrics])
    axes[1].set(title="MOPD: gradient norm", xlabel="step", ylim=(0, None))
    for ax, (domain, rl, mopd) in zip(axes[2:], races, strict=True):
        for name, label in ((rl, "RL"), (mopd, "MOPD")):
            points = curve(runs[name], domain)
            ax.plot([p[1] for p in points], [p[3] for p in points], label=label)
        teacher = "sft" if domain == "math" else rl
        goal = score(runs, teacher, domain)["mean"]
        ax.axhline(goal, color="0.6", ls="--", lw=1, label="teacher")
        start = "multi_domain_rl" if domain == "math" else "sft"
        ax.set(title=f"{domain}: both from {start}", xlabel="samples", ylabel="training outcome")
        ax.legend(fontsize=8)
    for ax in axes:
        ax.grid(alpha=0.25)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    plt.switch_backend("Agg")
    directory, finished = read_runs(sys.argv)
    draw_cascade(finished, directory / "cascade.png")
    draw_mopd(finished, directory / "mopd.png")
    print(f"written: {directory / 'cascade.png'}, {directory / 'mopd.png'}")
