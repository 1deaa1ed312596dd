"""How fast programs are verified, and how much of that is hidden behind sampling.

    python -m bench.verdicts runs/out/multi_domain_rl [--workers 1,2]

First 2,048 toy programs alone, as a step of the report's code RL has; then a step of 64 x 8 toy
programs with each number of workers, 112 of the responses sampled at a time as in the full run:
seconds of sampling, and of the verdicts that were not ready by its end. Verdicts are remembered
within a step only, so "alone" counts equal answers once, as a step does.
"""

import sys
import time

from nanocascade.checkpoint.weights import load_model
from nanocascade.cli import run_main
from nanocascade.data.episode import Rollout, Sampling
from nanocascade.rewards import code
from nanocascade.rollouts.rollout import roll_out
from nanocascade.rollouts.scoring import Scorer
from nanocascade.sandbox import sandbox
from nanocascade.tokenizer.tokenizer import Tokenizer
from nanocascade.toy import tasks

PROGRAMS, PROMPTS, ROLLOUTS = 2048, 64, 8


def verify(scorer: Scorer, rollouts: list[Rollout]) -> float:
    """Seconds until all verdicts are there."""
    code.verdicts.clear()
    start = time.perf_counter()
    for verdict in [scorer.submit(x) for x in rollouts]:
        verdict.result()
    return time.perf_counter() - start


def answers(count: int) -> list[Rollout]:
    """Episodes that hold the toy's own solutions, right and wrong, all of them different."""
    found = []
    for i, row in enumerate(tasks.make_rows("code", count)):
        turn = dict(row["solutions"]["off"][0])
        turn["content"] = turn["content"].replace("return", f"# {i}\n    return")
        turn["content"] = "<think></think>" + turn["content"]
        found.append(Rollout(row, [], 0, turns=[turn], stop_reason="stop"))
    return found


def main():
    if len(sys.argv) not in (2, 4):
        raise ValueError("usage: python -m bench.verdicts MODEL [--workers 1,2]")
    workers = [int(x) for x in (sys.argv[3] if len(sys.argv) == 4 else "1,2").split(",")]
    model, tokenizer = load_model(sys.argv[1]).eval(), Tokenizer(sys.argv[1])
    rows, many = tasks.make_rows("code", PROMPTS), answers(PROGRAMS)
    print("| workers | programs/s | sampling, s | verdicts alone, s | left over, s | hidden |")
    print("| --- | --- | --- | --- | --- | --- |")
    for n in workers:
        sandbox.shared.clear()
        scorer = Scorer(None, n)
        with sandbox.shared_sandbox(n):
            verify(scorer, many[:64])  # the servers are warm then
            speed = PROGRAMS / verify(scorer, many)
            code.verdicts.clear()
            args = (
                model,
                tokenizer,
                rows,
                ROLLOUTS,
                Sampling(40, max_rows=112),
                0,
                range(PROMPTS),
                scorer,
            )
            groups, spent = roll_out(*args)
            alone = verify(scorer, [x for group in groups for x in group])
        left = spent["time/score"]
        cells = f"{speed:.0f}", f"{spent['time/rollout']:.2f}", f"{alone:.2f}", f"{left:.2f}"
        print(f"| {n} | {' | '.join(cells)} | {1 - left / alone:.0%} |")


if __name__ == "__main__":
    run_main(main)
