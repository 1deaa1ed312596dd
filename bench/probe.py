"""What the models of one cascade do: strategies at test time, and which experts serve a domain.

python -m bench.probe runs/out        writes strategies.csv and experts.csv there, once
"""

import csv
import sys
from pathlib import Path

import torch

from nanocascade.checkpoint.weights import load_model
from nanocascade.cli import run_main
from nanocascade.data.episode import Sampling
from nanocascade.rollouts.rollout import roll_out
from nanocascade.rollouts.strategies import STRATEGIES
from nanocascade.tokenizer.tokenizer import Tokenizer
from nanocascade.toy import tasks
from sample import Config, play

MODELS = ("sft", "mopd", "swe_rl")  # where strategies are tried; experts: first and last
PROBLEMS = 256  # of each domain for strategies
PROMPTS = 64  # of each domain for the experts


def try_strategies(out: Path):
    """(model, domain, strategy, round, samples a problem, score): 4 rounds of 4, 4 checks each."""
    for name in MODELS:
        model, tokenizer = load_model(out / name).eval(), Tokenizer(out / name)
        for domain in ("math", "code"):
            rows = tasks.make_rows(domain, PROBLEMS, "test", 0)
            for strategy in STRATEGIES:
                cfg = Config(strategy=strategy, num_samples=4, top_p=1.0, max_new_tokens=72)
                for i, (spent, scores) in enumerate(play(cfg, model, tokenizer, rows), 1):
                    yield name, domain, strategy, i, f"{spent:.2f}", sum(scores) / len(scores)


def expert_shares(out: Path):
    """(model, domain, layer, expert, share of the layer's choices) on the model's own responses."""
    for name in (MODELS[0], MODELS[-1]):
        model, tokenizer = load_model(out / name).eval(), Tokenizer(out / name)
        sampling = Sampling(72, return_experts=True)
        for domain in tasks.DOMAINS:
            rows = tasks.make_rows(domain, PROMPTS, "test", 0)
            groups, _ = roll_out(model, tokenizer, rows, 1, sampling, 0, range(PROMPTS))
            # an episode's last token is never read, so it has no experts
            chosen = [g[0].experts[torch.tensor(g[0].mask[: len(g[0].experts)])] for g in groups]
            chosen = torch.cat(chosen)  # (o, l, a)
            for layer in range(chosen.shape[1]):
                count = chosen[:, layer].flatten().bincount(minlength=model.config.num_experts)
                for expert, share in enumerate((count / count.sum()).tolist()):
                    yield name, domain, layer, expert, share


def write(path: Path, head: tuple, rows) -> None:
    if path.exists():
        return
    rows = list(rows)
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows([head, *rows])
    print(f"written: {path}")


def main():
    if len(sys.argv) != 2:
        raise ValueError("usage: python -m bench.probe DIRECTORY")
    out = Path(sys.argv[1])
    head = ("model", "domain", "strategy", "round", "samples", "score")
    write(out / "strategies.csv", head, try_strategies(out))
    head = ("model", "domain", "layer", "expert", "share")
    write(out / "experts.csv", head, expert_shares(out))


if __name__ == "__main__":
    run_main(main)
