"""Rollouts: from rows of data to scored groups of responses, tool calls included.

A rollout is one episode: the prompt, what the model wrote, and, where the row has an environment
(environments.py), the tool results in between. Only what the model wrote carries loss.
"""

import time
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial

from nanocascade.data.episode import Rollout, Sampling
from nanocascade.data.rows import conversation
from nanocascade.engine.distributed import Dist
from nanocascade.engine.layout import unsharded
from nanocascade.environments.loop import answer
from nanocascade.rewards import kind_of
from nanocascade.rollouts.scoring import book_rewards
from nanocascade.sampler import generate
from nanocascade.tokenizer.chat import parse_response


def roll_out(model, tokenizer, rows, num_samples, sampling, seed, row_ids, scorer=None, dist=None):
    """`num_samples` episodes of each row: groups[p][r], scored where a scorer is given.

    seed already holds the training step, row_ids name the rows for the sampler's hash. Returns the
    groups and {"time/rollout", "time/score"} in seconds.
    """
    start, dist = time.perf_counter(), dist or Dist()
    prompts = [tokenizer.render(*conversation(x), sampling.thinking, True)[0] for x in rows]
    groups = [
        [
            Rollout(row, list(ids), len(ids), [False] * len(ids), [0.0] * len(ids))
            for _ in range(num_samples)
        ]
        for row, ids in zip(rows, prompts, strict=True)
    ]
    verdicts: dict[int, Future] = {}

    calls_tool = partial(wants_tool, sampling=sampling)

    def scored(rollout: Rollout) -> bool:
        graded = scorer is not None and scorer.grades(rollout.row)
        return graded and kind_of(rollout.row) != "preference"

    def finish(p: int, r: int, sample) -> None:
        """Book a turn; a finished episode goes to the scorer while others are still sampled."""
        rollout = groups[p][r]
        rollout.extend(sample.tokens, sample.logprobs)
        rollout.stop_reason = sample.stop_reason
        rollout.remember(sample.experts)
        text = tokenizer.said(sample.tokens, sampling.thinking)
        rollout.turns.append({"role": "assistant", "content": text})
        if scored(rollout) and not calls_tool(rollout):
            verdicts[id(rollout)] = scorer.submit(rollout)

    options = {
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "stop_ids": tokenizer.eos_ids,
        "max_rows": sampling.max_rows,
        "seed": seed,
        "return_experts": sampling.return_experts,
        "keep_going": dist.keep_going(),
    }
    with unsharded(model):
        generate(
            model,
            prompts,
            num_samples=num_samples,
            max_new_tokens=[sampling.room(len(x)) for x in prompts],
            row_ids=row_ids,
            on_sample=finish,
            **options,
        )
        pending = [(p, r) for p in range(len(rows)) for r in range(num_samples)]
        while dist.together(pending := [(p, r) for p, r in pending if calls_tool(groups[p][r])]):
            # the next turn of every episode whose last one called a tool
            answer_calls([groups[p][r] for p, r in pending], tokenizer, sampling)
            pending = [(p, r) for p, r in pending if not groups[p][r].truncated]
            texts = [groups[p][r] for p, r in pending]
            left = [sampling.room(x.prompt_length) - len(x.tokens) + x.prompt_length for x in texts]
            generate(
                model,
                [x.tokens for x in texts],
                max_new_tokens=left,
                # a name of its own for each episode; positions differ from turn to turn
                row_ids=[(row_ids[p] + 1) * (1 << 20) + r for p, r in pending],
                on_sample=lambda i, _, sample, who=tuple(pending): finish(*who[i], sample),
                **options,
            )
    sampled = time.perf_counter()
    for group in groups if scorer is not None else ():
        book_rewards(group, verdicts, scorer, tokenizer)
    spent = {"time/rollout": sampled - start, "time/score": time.perf_counter() - sampled}
    return groups, spent


def wants_tool(rollout: Rollout, sampling: Sampling) -> bool:
    """Whether the episode's last turn calls a tool and there is a turn left to read the result."""
    more = len(rollout.turns) < 2 * sampling.max_turns - 1  # turns alternate with results
    if "environment" not in rollout.row or not more or rollout.truncated:
        return False
    return bool(parse_response(rollout.turns[-1]["content"])["tool_calls"])


def run_calls(rollout: Rollout) -> list[str]:
    """The results of the calls of the last turn; the environment goes on where it was."""
    results = []
    tools = conversation(rollout.row)[1]
    for call in parse_response(rollout.turns[-1]["content"], tools)["tool_calls"]:
        rollout.played, result = answer(rollout.row, rollout.played, call["function"])
        results.append(result)
    return results


def answer_calls(rollouts: list[Rollout], tokenizer, sampling: Sampling) -> None:
    """What the tools say to the last turns, without loss, up to where the next turns begin."""
    with ThreadPoolExecutor(2) as threads:  # each waits for a process where programs are run
        called = list(threads.map(run_calls, rollouts))
    for rollout, results in zip(rollouts, called, strict=True):
        told = tokenizer.tool_result_ids(results, sampling.thinking)
        room = sampling.room(rollout.prompt_length)
        if len(rollout.tokens) + len(told) - rollout.prompt_length >= room:
            rollout.stop_reason = "length"  # no room to answer: the episode ends with its call
            continue
        rollout.extend(told)
        rollout.turns.append({"role": "tool", "content": "\n".join(results)})
