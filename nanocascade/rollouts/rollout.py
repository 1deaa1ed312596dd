"""Rollouts: from rows of data to scored groups of responses, tool calls included.

A rollout is one episode: the prompt, what the model wrote, and, where the row has an environment
(environments/), the tool results in between. Only what the model wrote carries loss.

Over ranks, each rank samples its own prompts (groups.py shards them), from weights that are
gathered once (`unsharded`). With expert parallelism the ranks of a group must make the same forward
calls: `keep_going` asks every few steps whether any of them has rows left (distributed.py), and a
rank without rows decodes padding (Decoder.step).
"""

import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from nanocascade.data.episode import Rollout, Sampling
from nanocascade.data.rows import conversation
from nanocascade.engine.distributed import Dist
from nanocascade.engine.layout import unsharded
from nanocascade.environments.loop import answer, end_episode
from nanocascade.rewards.base import read_turn
from nanocascade.rollouts.scoring import GroupVerdicts, Scorer
from nanocascade.sampler import Sample, generate
from nanocascade.sandbox.sandbox import share_of_cores
from nanocascade.tokenizer.tokenizer import Tokenizer


def roll_out(model, tokenizer, rows, num_samples, sampling, seed, row_ids, scorer=None, dist=None):
    """`num_samples` episodes of each row: groups[p][r], scored where a scorer is given.

    seed already holds the training step, row_ids name the rows for the sampler's hash. Returns the
    groups and {"time/rollout", "time/score"} in seconds.
    """
    start, dist = time.perf_counter(), dist or Dist()
    episodes = Episodes(tokenizer, rows, num_samples, sampling, scorer)
    sample_turns = partial(
        generate,
        model,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        stop_ids=tokenizer.eos_ids,
        max_rows=sampling.max_rows,
        seed=seed,
        return_experts=sampling.return_experts,
        keep_going=dist.keep_going(),
    )
    with unsharded(model):
        sample_turns(
            episodes.prompts,
            num_samples=num_samples,
            max_new_tokens=[sampling.room(len(x)) for x in episodes.prompts],
            row_ids=row_ids,
            on_sample=episodes.add_turn,
        )
        places = episodes.calling([(p, r) for p in range(len(rows)) for r in range(num_samples)])
        while dist.together(places):
            episodes.answer_calls(places)
            places = [place for place in places if not episodes.at(place).truncated]
            rollouts = [episodes.at(place) for place in places]
            sample_turns(
                [x.tokens for x in rollouts],
                max_new_tokens=[
                    sampling.room(x.prompt_length) + x.prompt_length - len(x.tokens)
                    for x in rollouts
                ],
                # an id for each episode; positions differ from turn to turn
                row_ids=[(row_ids[p] + 1) * (1 << 20) + r for p, r in places],
                on_sample=partial(episodes.add_later_turn, places),
            )
            places = episodes.calling(places)
    episodes.end()
    sampled = time.perf_counter()
    episodes.set_rewards()
    spent = {"time/rollout": sampled - start, "time/score": time.perf_counter() - sampled}
    return episodes.groups, spent


class Episodes:
    """The episodes of one roll_out: a turn of all, then the tools' results, then the next turn.

    A place (p, r) is rollout r of prompt p.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        rows: list[dict],
        num_samples: int,
        sampling: Sampling,
        scorer: Scorer | None,
    ):
        self.tokenizer, self.sampling = tokenizer, sampling
        self.prompts = [
            tokenizer.render(*conversation(row), sampling.thinking, True)[0] for row in rows
        ]
        self.groups = [
            [
                Rollout(row, list(ids), len(ids), [False] * len(ids), [0.0] * len(ids))
                for _ in range(num_samples)
            ]
            for row, ids in zip(rows, self.prompts, strict=True)
        ]
        self.verdicts = [GroupVerdicts(scorer, group) for group in self.groups] if scorer else []

    def at(self, place: tuple[int, int]) -> Rollout:
        p, r = place
        return self.groups[p][r]

    def add_turn(self, p: int, r: int, sample: Sample) -> None:
        """Add a sampled turn. A finished episode is scored while others are still sampled."""
        rollout = self.groups[p][r]
        rollout.extend(sample.tokens, sample.logprobs)
        rollout.stop_reason = sample.stop_reason
        rollout.remember(sample.experts)
        text = self.tokenizer.response_text(sample.tokens, self.sampling.thinking)
        parsed = read_turn(text, rollout.row["responses_create_params"].get("tools"))
        rollout.turns.append({"role": "assistant", "content": text, "parsed": parsed})
        if self.verdicts and not wants_tool(rollout, self.sampling):
            self.verdicts[p].add(r)

    def add_later_turn(self, places: list, i: int, _, sample: Sample) -> None:
        self.add_turn(*places[i], sample)

    def calling(self, places: list[tuple[int, int]]) -> list[tuple[int, int]]:
        """Those of the places whose last turn calls a tool."""
        return [place for place in places if wants_tool(self.at(place), self.sampling)]

    def answer_calls(self, places: list[tuple[int, int]]) -> None:
        """Add the tools' results, without loss, up to where the next turns begin."""
        rollouts = [self.at(place) for place in places]
        with ThreadPoolExecutor(share_of_cores()) as threads:  # each may wait for a program
            all_results = list(threads.map(run_calls, rollouts))
        for rollout, results in zip(rollouts, all_results, strict=True):
            ids = self.tokenizer.tool_result_ids(results, self.sampling.thinking)
            room = self.sampling.room(rollout.prompt_length)
            if len(rollout.tokens) + len(ids) - rollout.prompt_length >= room:
                rollout.stop_reason = "length"  # no room to answer: the episode ends with its call
                continue
            rollout.extend(ids)
            rollout.turns.append({"role": "tool", "content": "\n".join(results)})

    def end(self) -> None:
        """Close the environments: a session of the Python tool is a process."""
        for rollout in (x for group in self.groups for x in group):
            end_episode(rollout.row, rollout.progress)
            rollout.progress = None

    def set_rewards(self) -> None:
        for verdicts in self.verdicts:
            verdicts.set_rewards(self.tokenizer.encode)


def wants_tool(rollout: Rollout, sampling: Sampling) -> bool:
    """Whether the episode's last turn calls a tool and there is a turn left to read the result."""
    more = len(rollout.turns) < 2 * sampling.max_turns - 1  # turns alternate with results
    if "environment" not in rollout.row or not more or rollout.truncated:
        return False
    return bool(rollout.turns[-1]["parsed"]["tool_calls"])


def run_calls(rollout: Rollout) -> list[str]:
    """The results of the calls of the last turn; the environment goes on where it was."""
    results = []
    for call in rollout.turns[-1]["parsed"]["tool_calls"]:
        rollout.progress, result = answer(rollout.row, rollout.progress, call["function"])
        results.append(result)
    return results
