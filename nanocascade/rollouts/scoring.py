"""Verdicts of episodes, computed while others are still sampled."""

from concurrent.futures import Future, ThreadPoolExecutor

from nanocascade.data.episode import Rollout
from nanocascade.rewards import kind_of, needs_judge, score, score_group
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

    def grades_alone(self, row: dict) -> bool:
        """Whether a response has a verdict without the others of its group."""
        return self.grades(row) and kind_of(row) != "preference"

    def submit(self, rollout: Rollout) -> Future:
        options = {"finished": rollout.stop_reason == "stop", "judge": self.judge}
        return self.pool.submit(score, rollout.row, rollout.turns, **options)

    def book(self, group: list[Rollout], verdicts: list[Future | None], encode) -> None:
        """Write rewards and outcomes into the rollouts of one prompt.

        verdicts: those that `submit` was asked for; where there is none yet, an episode ran out of
        turns or tokens while a call was open, and is scored now.
        """
        row = group[0].row
        if not self.grades(row):  # in MOPD, whose loss has no rewards
            for rollout in group:
                rollout.outcome, rollout.reason = None, NOT_SCORED
        elif kind_of(row) == "preference":
            for rollout, reward in zip(group, self.compare(group, encode), strict=True):
                rollout.reward, rollout.reason = reward
                rollout.outcome = self.against_reference(rollout)
        else:
            verdicts = [y or self.submit(x) for x, y in zip(group, verdicts, strict=True)]
            for rollout, verdict in zip(group, verdicts, strict=True):
                rollout.reward, rollout.reason = verdict.result()
                rollout.outcome = rollout.reward

    def compare(self, group: list[Rollout], encode) -> list:
        """Pairwise rewards of one prompt's rollouts; lengths are counted in tokens."""
        responses = [x.turns[-1]["content"] for x in group]
        parts = [parse_response(text) for text in responses]
        return score_group(
            group[0].row,
            responses,
            self.judge,
            thought_lengths=[len(encode(x["reasoning_content"] or "")) for x in parts],
            answer_lengths=[len(encode(x["content"])) for x in parts],
            finished=[x.stop_reason == "stop" for x in group],
            **self.group_options,
        )

    def against_reference(self, rollout: Rollout) -> float | None:
        """The score of a preference answer, if the row has a stored one: 0, 1/2 or 1 against that;
        cut off, the answer loses."""
        reference = rollout.row.get("reference")
        if reference is None:
            return None
        if rollout.stop_reason != "stop":
            return 0.0
        return win_rate(rollout.row, rollout.turns[-1]["content"], reference, self.judge)
