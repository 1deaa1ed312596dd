"""Results of nightly.sh: claims over seeds, ablations, the long run, strategies, experts.

    python -m bench.evidence runs/out-evidence assets      writes evidence.md, its CSVs and pictures

Intervals are 95 % over seeds, by Student's t: training again, not only sampling again.
"""

import csv
import sys
from collections import Counter, defaultdict
from pathlib import Path

from bench import claims
from nanocascade.cli import run_main
from nanocascade.run.read import is_finished, main_chain, read_run
from nanocascade.stages import TEACHER_OF
from runs import report
from runs.report import domains_of, own_domains, score, table

T95 = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36}  # quantiles by number
LONG_KEYS = (
    "outcome/drawn",
    "entropy",
    "response/length",
    "mismatch/prob_error",
    "moe/load_max",
    "grad_norm",
)


def over(values) -> str:
    """Mean and 95 % interval of the mean over seeds."""
    values = [float(x) for x in values]
    mean = sum(values) / max(len(values), 1)
    if len(values) < 2:
        return f"{mean:.2f}" if values else "-"
    std = (sum((x - mean) ** 2 for x in values) / (len(values) - 1)) ** 0.5
    return f"{mean:.2f} +-{T95[len(values)] * std / len(values) ** 0.5:.2f}"


def write_csv(path: Path, head: list[str], rows: list) -> None:
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows([head, *rows])


# ---- The cascade over seeds ----------------------------------------------------------------------


def seed_sections(seeds: list[dict], assets: Path) -> list[tuple[str, str]]:
    domains, rows, names = domains_of(seeds[0]), [], main_chain(seeds[0])
    for domain in domains:
        cells = [over(score(x, name, domain)["mean"] for x in seeds) for name in names]
        own = [domain in own_domains(seeds[0], name) for name in names]
        rows.append([domain, *(f"**{c}**" if o else c for c, o in zip(cells, own, strict=True))])
    means = [over(report.mean_score(x, name) for x in seeds) for name in names]
    rows.append(["mean", *means])
    scores = [
        [run["seed"], name, d, f"{x['after']['mean']:.4f}", f"{x['after']['interval']:.4f}"]
        for runs in seeds
        for name, run in runs.items()
        for d, x in run["evaluation"].items()
        if x.get("after")
    ]
    write_csv(assets / "seeds.csv", ["seed", "run", "domain", "mean", "interval"], scores)
    found = [claims.claims(x) for x in seeds]
    held = [
        [
            name,
            wanted,
            "; ".join(x[i][2] for x in found),
            f"{sum(x[i][3] for x in found)} of {len(found)}",
        ]
        for i, (name, wanted, *_) in enumerate(found[0])
    ]
    return [
        ("Scores after every stage, mean over seeds", table(["domain", *names], rows)),
        (
            "The claims, seed by seed",
            table(["claim", "wanted", "measured, seed by seed", "holds in"], held),
        ),
        ("What each RL stage gained", gain_rows(seeds)),
        ("What was forgotten", fall_rows(seeds)),
        ("What MOPD brought back", recovery_rows(seeds)),
        ("MOPD against the RL that made the teacher", race_rows(seeds)),
    ]


def gain_rows(seeds: list[dict]) -> str:
    found = defaultdict(list)
    for runs in seeds:
        for name, domain, _, _, gain, _ in report.gains(runs):
            found[name, domain].append(gain)
    return table(["stage", "own domain", "gain"], [[*k, over(x)] for k, x in found.items()])


def fall_rows(seeds: list[dict]) -> str:
    drops, stages = defaultdict(list), defaultdict(Counter)
    for runs in seeds:
        for domain, drop, stage, _ in report.falls(runs):
            drops[domain].append(drop)
            stages[domain][stage] += 1
    rows = [
        [d, over(x), ", ".join(f"{s} {n}" for s, n in stages[d].most_common())]
        for d, x in drops.items()
    ]
    head = ["domain", "largest drop below its best score so far", "most of it in (seeds)"]
    return table(head, rows)


def recovery_rows(seeds: list[dict]) -> str:
    """Each seed's part of its gap, averaged over the seeds that have one."""
    found = defaultdict(list)
    for runs in seeds:
        for domain, _, start, goal, end, part, _ in report.recoveries(runs):
            found[domain].append((start["mean"], goal["mean"], end["mean"], part))
    rows = []
    for domain, xs in found.items():
        parts = [x[3] for x in xs if x[3] is not None]
        rows.append(
            [
                domain,
                *(over(x[i] for x in xs) for i in range(3)),
                over(x[2] - x[0] for x in xs),
                over(parts),
                f"{len(parts)} of {len(xs)}",
            ]
        )
    head = ["domain", "start", "teacher", "after MOPD", "change", "part of the gap", "gaps"]
    return table(head, rows)


def race_rows(seeds: list[dict]) -> str:
    found = defaultdict(list)
    for runs in seeds:
        for domain, _, a, b in claims.races(runs):
            found[domain].append((a[1] / b[1], a[2] / b[2]) if a and b and b[1] else None)
    rows = [
        [
            d,
            f"{sum(x is not None for x in xs)} of {len(xs)}",
            *(over(x[i] for x in xs if x) for i in (0, 1)),
        ]
        for d, xs in found.items()
    ]
    text = table(["domain", "level reached", "fewer samples, times", "fewer seconds, times"], rows)
    ends = {
        x: over(report.score(runs, x, "math")["mean"] for runs in seeds)
        for x in ("math_rl", "mopd")
    }
    return text + (
        "\n\nMathematics was never taught by RL in the cascade, so that no RL has shown what its"
        f" teacher costs. GRPO on it, from where MOPD started: {ends['math_rl']}, MOPD:"
        f" {ends['mopd']}, for about as many samples (assets/report.md has them for seed 0)."
    )


# ---- Ablations -----------------------------------------------------------------------------------


def after(run: dict, domains) -> float:
    known = run["evaluation"]
    return sum(known[d]["after"]["mean"] for d in domains) / len(domains)


def arm_values(stage: str, run: dict) -> dict[str, float]:
    """Measures of an arm: scores of its own domains and all others, state of its training."""
    domains = run["evaluation"]
    scored = [d for d in domains if domains[d].get("after")]
    last = run["metrics"][-5:]

    def ending(key):
        return sum(x.get(key, 0.0) for x in last) / len(last)

    if stage == "if_rl":
        own = {"if": after(run, ["if"])}
    else:
        multi = [d for d, t in TEACHER_OF.items() if t == "multi_domain"]
        own = {d: after(run, [d]) for d in ("math", "preference")}
        own |= {"multi-domain": after(run, multi), "reverse KL": ending("mopd/reverse_kl")}
    others = [d for d in scored if d not in (("if",) if stage == "if_rl" else TEACHER_OF)]
    worst = max(x["grad_norm"] for x in run["metrics"])
    return own | {
        "other domains": after(run, others),
        "entropy": ending("entropy"),
        "mismatch": ending("mismatch/prob_error"),
        "load max": ending("moe/load_max"),
        "largest grad norm": worst,
    }


def ablation_sections(out: Path, assets: Path) -> list[tuple[str, str]]:
    found, flat = defaultdict(lambda: defaultdict(dict)), []
    for path in sorted(out.glob("arms*/*")):
        stage, _, arm = path.name.partition("-")
        if is_finished(path):
            values = arm_values(stage, read_run(path))
            found[stage][arm][path.parent.name] = values
            flat += [[path.parent.name[4:], stage, arm, k, f"{v:.6g}"] for k, v in values.items()]
    if flat:
        write_csv(assets / "ablations.csv", ["seed", "stage", "arm", "value of", "value"], flat)
    sections = []
    for stage, arms in found.items():
        rows, base = [], arms["recipe"]
        for arm in ["recipe", *(x for x in arms if x != "recipe")]:
            shared = [s for s in arms[arm] if s in base]
            cells = []
            for key in next(iter(base.values())):
                values = [arms[arm][s][key] for s in shared]
                if key in ("mismatch", "reverse KL"):
                    cells.append(f"{sum(values) / max(len(values), 1):.1e}")
                elif arm == "recipe":
                    cells.append(over(values))
                else:  # against the recipe of the same seed
                    gap = over(x - base[s][key] for x, s in zip(values, shared, strict=True))
                    cells.append(gap if gap.startswith("-") else "+" + gap)
            rows.append([arm, str(len(shared)), *cells])
        head = ["arm", "seeds", *next(iter(base.values()))]
        sections.append(
            (
                f"Ablations of {stage}: the recipe, and what each change adds to it",
                table(head, rows),
            )
        )
    return sections


# ---- The long run, strategies, experts -----------------------------------------------------------


def long_sections(out: Path, assets: Path) -> list[tuple[str, str]]:
    runs = {x.name: read_run(x) for x in sorted((out / "long").glob("*"))}
    if not runs:
        return []
    plt = pyplot()
    figure, axes = plt.subplots(2, 3, figsize=(12, 6))
    rows, flat = [], []
    for name, run in runs.items():
        for ax, key in zip(axes.flat, LONG_KEYS, strict=True):
            points = [(x["step"], x[key]) for x in run["metrics"] if key in x]
            bins = [points[i : i + 20] for i in range(0, len(points), 20)]
            means = [(b[0][0], sum(y for _, y in b) / len(b)) for b in bins]
            ax.plot(*zip(*means, strict=True), label=name)
            ax.set(title=key, xlabel="step")
            flat += [[name, key, x, f"{y:.6g}"] for x, y in means]
        count = len(run["metrics"])
        for start in [*range(0, count - 20, max(count // 5, 1)), max(count - 20, 0)]:
            part = run["metrics"][start : start + 20]
            cells = [f"{sum(x.get(k, 0.0) for x in part) / len(part):.3g}" for k in LONG_KEYS]
            rows.append([name, str(start), *cells])
    for ax in axes.flat:
        ax.grid(alpha=0.25)
    axes.flat[0].legend(fontsize=8)
    save(figure, assets / "long.png")
    write_csv(assets / "long.csv", ["arm", "metric", "step", "mean of 20 steps"], flat)
    body = "![long](long.png)\n\n" + table(["arm", "from step", *LONG_KEYS], rows)
    for name, run in runs.items():  # one that has not ended has no scores yet
        scores = run["evaluation"]
        found = [
            f"{d} {x['before']['mean']:.3f} -> {x['after']['mean']:.3f}"
            for d, x in scores.items()
            if x["before"] and x.get("after")
        ]
        body += f"\n\nHeld out, {name}: {', '.join(found) or 'not measured yet'}."
    return [("One stage for a long time (means of 20 steps)", body)]


def read_probes(out: Path, name: str) -> list[dict]:
    rows = []
    for path in sorted(out.glob(f"seed*/{name}.csv")):
        seed = path.parent.name.removeprefix("seed")
        with open(path) as file:
            rows += [x | {"seed": seed} for x in csv.DictReader(file)]
    return rows


def strategy_sections(out: Path, assets: Path) -> list[tuple[str, str]]:
    found = defaultdict(lambda: defaultdict(list))
    for x in (probes := read_probes(out, "strategies")):
        point = int(x["round"]), float(x["samples"]), float(x["score"])
        found[x["model"], x["domain"]][x["strategy"]].append(point)
    if not probes:
        return []
    models = list(dict.fromkeys(model for model, _ in found))
    plt = pyplot()
    figure, axes = plt.subplots(2, len(models), figsize=(4 * len(models), 6.4), squeeze=False)
    rows = []
    for (model, domain), by_strategy in found.items():
        ax = axes[("math", "code").index(domain)][models.index(model)]
        for strategy, points in by_strategy.items():
            rounds = sorted({r for r, _, _ in points})
            spent = [[s for q, s, _ in points if q == r] for r in rounds]
            scores = [[y for q, _, y in points if q == r] for r in rounds]
            ax.plot(
                [sum(x) / len(x) for x in spent],
                [sum(y) / len(y) for y in scores],
                "o-",
                ms=3,
                label=strategy,
            )
            cost = sum(spent[-1]) / len(spent[-1])
            rows.append([model, domain, strategy, f"{cost:.1f}", *map(over, scores)])
        ax.set(title=f"{domain}, {model}", xscale="log", xlabel="samples a problem", ylim=(0, 1.02))
        ax.grid(alpha=0.25)
    axes.flat[0].legend(fontsize=8)
    save(figure, assets / "strategies.png")
    head = list(probes[0])
    write_csv(assets / "strategies.csv", head, [[x[k] for k in head] for x in probes])
    head = ["model", "domain", "strategy", "samples", *(f"round {r}" for r in rounds)]
    return [("Strategies at test time", "![strategies](strategies.png)\n\n" + table(head, rows))]


def expert_sections(out: Path, assets: Path) -> list[tuple[str, str]]:
    probes = [x for x in read_probes(out, "experts") if x["seed"] == 0]
    if not probes:
        return []
    models, domains, layers, experts = (
        list(dict.fromkeys(x[k] for x in probes)) for k in ("model", "domain", "layer", "expert")
    )
    share = {(x["model"], x["domain"], x["layer"], x["expert"]): float(x["share"]) for x in probes}
    plt = pyplot()
    size = 10, 3.6 * len(layers)
    figure, axes = plt.subplots(len(layers), len(models), figsize=size, layout="constrained")
    rows = []
    for i, layer in enumerate(layers):
        for j, model in enumerate(models):
            grid = [[share[model, d, layer, e] for e in experts] for d in domains]
            picture = axes[i][j].imshow(grid, vmin=0, vmax=0.4, cmap="viridis", aspect="auto")
            axes[i][j].set(title=f"{model}, block of experts {layer}", xlabel="expert")
            axes[i][j].set_yticks(range(len(domains)), domains)
        moved = {
            d: sum(
                abs(share[models[0], d, layer, e] - share[models[-1], d, layer, e]) for e in experts
            )
            / 2
            for d in domains
        }
        rows.append([f"block {layer}", *(f"{moved[d]:.2f}" for d in domains)])
    figure.colorbar(picture, ax=axes, label="share of the choices of a domain's tokens")
    figure.savefig(assets / "experts.png", dpi=110)
    plt.close(figure)
    head = list(probes[0])
    write_csv(assets / "experts.csv", head, [[x[k] for k in head] for x in probes])
    text = "![experts](experts.png)\n\nShare of a domain's choices that went to other experts at "
    text += f"the end than after SFT (0 = as before, 1 = all), seed 0: {models[0]} to {models[-1]}."
    return [("Who serves a domain", f"{text}\n\n" + table(["", *domains], rows))]


def save(figure, path: Path) -> None:
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot().close(figure)


def pyplot():
    """Imported where something is drawn: the tables need no matplotlib."""
    import matplotlib.pyplot as plt

    plt.switch_backend("Agg")
    return plt


def main():
    if len(sys.argv) != 3:
        raise ValueError(f"usage: python {sys.argv[0]} DIRECTORY ASSETS")
    out, assets = Path(sys.argv[1]), Path(sys.argv[2])
    paths = [x for x in sorted(out.glob("seed*")) if is_finished(x / "math_rl")]
    seeds = [report.read_cascade(x) for x in paths]
    if not seeds:
        raise ValueError(f"{out}: no finished cascade seed*/")
    if len(seeds) > max(T95):
        raise ValueError(f"{out}: {len(seeds)} seeds, intervals are known for {max(T95)} at most")
    sections = seed_sections(seeds, assets) + ablation_sections(out, assets)
    sections += long_sections(out, assets) + strategy_sections(out, assets)
    sections += expert_sections(out, assets)
    commit = seeds[0]["sft"]["commit"][:10]
    text = f"# The toy cascade over {len(seeds)} seeds\n\n`bash runs/nightly.sh`, commit {commit}. "
    text += "Mean +- 95 % interval over seeds (Student's t).\n"
    text += "".join(f"\n## {title}\n\n{body}\n" for title, body in sections)
    (assets / "evidence.md").write_text(text)
    print(text)


if __name__ == "__main__":
    run_main(main)
