"""How cost grows: decoding with context, and a step with batch, group, experts and length.

    python -m bench.growth [--short] [--out assets/growth]         (writes .csv, and .png)

Each curve is fitted as seconds = a + b x by least squares on relative errors; a is what a step
costs whatever its size (dispatch, reading the weights), b what one more unit costs. The points of
all curves are measured in turns, so that a slow minute falls on all of them.
"""

import csv
import statistics
import time

import torch

from bench import common
from bench.common import timed
from bench.rollout import our_rollouts
from bench.train_step import documents
from nanocascade.data.batch import make_batches
from nanocascade.engine.forward import score_tokens
from nanocascade.model.cache import Cache
from nanocascade.model.model import Model

ATTENTION_ONLY = {"hybrid_override_pattern": "*E*E*E*E*E*E*E"}  # as many blocks as the hybrid


def build(**changes) -> Model:
    with common.model_dir("nemotron_h", **changes) as folder:
        return common.load_model(folder)


@torch.inference_mode()
def decode_step(model, rows: int, context: int) -> float:
    """Seconds of one decoding step of `rows` rows with `context` tokens behind them."""
    cache = Cache(model.config, rows, context + 4)
    cache.lengths += context
    ids = torch.ones(rows, 1, dtype=torch.long)
    return min(timed(lambda: model.logits(model(ids, cache=cache)[:, -1])) for _ in range(3))


def rollout(model, prompts: int, rollouts: int, prompt: int = 64, new: int = 16) -> float:
    sizes = [new] * (prompts * rollouts)
    rows = common.random_prompts(prompts, prompt, prompt)
    return timed(lambda: our_rollouts(model, rows, rollouts, sizes))


def train(model, rows: int, length: int) -> float:
    """Seconds of forward and backward of `rows` documents of `length` tokens."""

    def step():
        for batch in make_batches(documents([length + 1] * rows), 4096):
            score_tokens(model, batch)[0].sum().backward()
        model.zero_grad(set_to_none=True)

    return timed(step)


def curves(short: bool) -> dict[str, dict[int, object]]:
    """name -> {x: a function that takes the seconds of that point}."""
    hybrid, attention = build(), build(**ATTENTION_ONLY)
    experts = {e: build(n_routed_experts=e) for e in ((4, 8) if short else (4, 8, 16, 32, 64))}
    contexts = (32, 64) if short else (256, 512, 1024, 2048, 4096, 8192)
    batches, groups = ((1, 4), (1, 2)) if short else ((1, 4, 16, 64, 256), (1, 2, 4, 8, 16))
    lengths, total = ((16, 32), 4) if short else ((128, 256, 512, 1024, 2048), 64)
    return {
        "decode, hybrid: context": {x: lambda x=x: decode_step(hybrid, 8, x) for x in contexts},
        "decode, attention only: context": {
            x: lambda x=x: decode_step(attention, 8, x) for x in contexts
        },
        "decode, hybrid: batch": {x: lambda x=x: decode_step(hybrid, x, 256) for x in batches},
        # The group size is total / prompts: a prompt is prefilled once for its whole group.
        f"rollout of {total} rows: prompts": {
            total // x: lambda x=x: rollout(hybrid, total // x, x) for x in groups
        },
        "train, 1,024 tokens: experts": {
            e: lambda m=m: train(m, 1 if short else 4, 16 if short else 256)
            for e, m in experts.items()
        },
        "train, 2 documents: length": {x: lambda x=x: train(hybrid, 2, x) for x in lengths},
    }


def fit(points: dict[int, float]) -> tuple[float, float]:
    """(a, b) of seconds = a + b x with the least relative squared error."""
    x = torch.tensor(list(points), dtype=torch.float64)
    y = torch.tensor(list(points.values()), dtype=torch.float64)
    columns = torch.stack([1 / y, x / y], 1)
    a, b = torch.linalg.lstsq(columns, torch.ones(len(x), 1, dtype=torch.float64)).solution[:, 0]
    return a.item(), b.item()


def plot(measured: dict[str, dict[int, float]], path: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 5, figsize=(18, 3.6))
    panels = ["context", "batch", "prompts", "experts", "length"]
    for name, points in measured.items():
        axis = axes[panels.index(name.split(": ")[1])]
        a, b = fit(points)
        line = axis.plot(list(points), [1e3 * y for y in points.values()], "o", markersize=4)[0]
        axis.plot(
            list(points),
            [1e3 * (a + b * x) for x in points],
            color=line.get_color(),
            label=f"{name.split(':')[0]}\n{1e3 * a:.1f} + {1e3 * b:.3g} x ms",
        )
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.set_xlabel(name.split(": ")[1])
        axis.legend(fontsize=7)
    axes[0].set_ylabel("ms")
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main():
    cfg = common.options(out=(["assets/growth"], "path of the .csv and .png, without the ending"))
    print(common.machine())
    functions, out = curves(cfg.short), cfg.out[0]
    times = {name: {x: [] for x in points} for name, points in functions.items()}
    start = time.perf_counter()
    for repeat in range(1 if cfg.short else cfg.pairs + 1):
        if repeat > 3 and time.perf_counter() - start > 4 * cfg.seconds:
            break
        for name, points in functions.items():
            for x, function in points.items():
                seconds = function()
                if repeat or cfg.short:  # the first round warms up
                    times[name][x].append(seconds)
    measured = {
        name: {x: statistics.median(y) for x, y in points.items()} for name, points in times.items()
    }
    with open(out + ".csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["curve", "x", "seconds"])
        writer.writerows(
            [name, x, f"{y:.6f}"] for name, points in measured.items() for x, y in points.items()
        )
    for name, points in measured.items():
        a, b = fit(points)
        print(
            f"{name:<34} {1e3 * a:8.2f} + {1e3 * b:9.5f} x ms   "
            + "  ".join(f"{x}: {1e3 * y:.1f}" for x, y in points.items())
        )
    for name, changes in (("hybrid", {}), ("attention only", ATTENTION_ONLY)):
        config = build(**changes).config
        one, two = (Cache(config, 1, n).bytes for n in (1, 2))
        print(f"cache, {name}: {two - one:,} bytes a token and {2 * one - two:,} a row")
    plot(measured, out + ".png")


if __name__ == "__main__":
    main()
