"""Verdicts of episodes, computed while others are still sampled."""

from concurrent.futures import Future, ThreadPoolExecutor

from nanocascade.data.episode import Rollout
from nanocascade.rewards import Reward, kind_of, needs_judge, score, score_group
from nanocascade.rewards.preference import win_rate
from nanocascade.tokenizer.chat import parse_response

NOT_SCORED = "not scored: no judge"


class Scorer:
    """Verdicts, computed in worker threads while sampling goes on (programs run in processes)."""

    def __init__(self, judge=None, workers: int = 2, **group_options):
        self.judge, self.group_options = judge, group_options
        self.pool = ThreadPoolExecutor(workers)

    def grades(self, row: dict) -> bool:
        return self.judge is not None or not needs_judge(row)

    def submit(self, rollout: Rollout) -> Future:
        options = {"finished": rollout.stop_reason == "stop", "judge": self.judge}
        return self.pool.submit(score, rollout.row, rollout.turns, **options)

    def group(self, rollouts: list[Rollout], encode) -> list[Reward]:
        """Pairwise rewards of one prompt's rollouts; lengths are counted in tokens."""
        responses = [x.turns[-1]["content"] for x in rollouts]
        parts = [parse_response(text) for text in responses]
        return score_group(
            rollouts[0].row,
            responses,
            self.judge,
            thought_lengths=[len(encode(x["reasoning_content"] or "")) for x in parts],
            answer_lengths=[len(encode(x["content"])) for x in parts],
            finished=[x.stop_reason == "stop" for x in rollouts],
            **self.group_options,
        )


def book_rewards(group: list[Rollout], verdicts, scorer: Scorer, tokenizer) -> None:
    if not scorer.grades(group[0].row):  # in MOPD, whose loss has no rewards
        for rollout in group:
            rollout.outcome, rollout.reason = None, NOT_SCORED
        return
    if kind_of(group[0].row) == "preference":
        rewards = scorer.group(group, tokenizer.encode)
        reference = group[0].row.get("reference")
        for rollout, reward in zip(group, rewards, strict=True):
            rollout.reward, rollout.reason = reward
            # The domain's score: 0, 1/2 or 1 against the SFT answer; cut off, the response loses.
            rollout.outcome = None if reference is None else 0.0
            if reference is not None and rollout.stop_reason == "stop":
                answer = rollout.turns[-1]["content"]
                rollout.outcome = win_rate(rollout.row, answer, reference, scorer.judge)
        return
    # Some ran out of turns or tokens while a call was open: they are scored only now.
    found = [verdicts.get(id(x)) or scorer.submit(x) for x in group]
    for rollout, verdict in zip(group, found, strict=True):
        rollout.reward, rollout.reason = verdict.result()
        rollout.outcome = rollout.reward
