"""Verdicts of episodes, computed while others are still sampled."""

from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial

from nanocascade.data.episode import Rollout
from nanocascade.data.rows import conversation
from nanocascade.rewards import compares_groups, needs_judge, score_group, verdict
from nanocascade.rewards.base import read_turn
from nanocascade.rewards.judge import EndpointJudge
from nanocascade.rewards.preference import make_pairs, win_rate
from nanocascade.sandbox.sandbox import share_of_cores

NOT_SCORED = "not scored: no judge"


class Scorer:
    """Verdicts in threads: programs wait for their sandbox, other questions for the judge.

    workers: programs at a time (0 = share_of_cores). judge_concurrency: questions to the judge.
    """

    def __init__(self, judge=None, workers: int = 0, judge_concurrency: int = 1, pairing="all"):
        self.judge, self.pairing = judge, pairing
        self.programs = ThreadPoolExecutor(workers or share_of_cores())
        self.questions = ThreadPoolExecutor(judge_concurrency)

    def grades(self, row: dict) -> bool:
        return self.judge is not None or not needs_judge(row)

    def submit(self, rollout: Rollout) -> Future:
        """Start scoring a finished episode; a preference row is compared with its reference."""
        if compares_groups(rollout.row):
            return self.questions.submit(self.against_reference, rollout)
        threads = self.questions if needs_judge(rollout.row) else self.programs
        options = {"finished": rollout.stop_reason == "stop", "judge": self.judge}
        return threads.submit(verdict, rollout.row, rollout.turns, **options)

    def judge_metrics(self, dist) -> dict[str, float]:
        """Shares of this step's questions to the endpoint that got no verdict."""
        return self.judge.metrics(dist) if isinstance(self.judge, EndpointJudge) else {}

    def match(self, group: list[Rollout], new: int) -> dict[tuple[int, int], Future]:
        """{(i, j): verdict} of the pairs that response `new` makes possible.

        All pairs: of `new` and each response that was finished before. A circle: every pair, once
        the last response is there. A response that was cut off is not judged.
        """
        row, answers = group[0].row, {i: judged_answer(x) for i, x in enumerate(group)}
        answers = {i: x for i, x in answers.items() if x is not None}
        if not compares_groups(row):
            return {}
        if self.pairing == "all":
            pairs = [(min(i, new), max(i, new)) for i in answers if i != new and new in answers]
        else:
            complete = all(x.stop_reason for x in group)
            places = sorted(answers)
            pairs = make_pairs(len(places), self.pairing) if complete else []
            pairs = [(places[i], places[j]) for i, j in pairs]
        ask = partial(self.questions.submit, self.judge, conversation(row)[0])
        return {(i, j): ask(answers[i], answers[j]) for i, j in pairs}

    def book(self, group: list[Rollout], verdicts: list[Future | None], matches, encode) -> None:
        """Write rewards and outcomes into the rollouts of one prompt.

        verdicts, matches: those that `submit` and `match` were asked for. If a verdict is None, the
        episode ran out of turns or tokens while a call was open, and is scored now.
        """
        row = group[0].row
        if not self.grades(row):  # in MOPD, whose loss has no rewards
            for rollout in group:
                rollout.outcome, rollout.reason = None, NOT_SCORED
            return
        verdicts = [y or self.submit(x) for x, y in zip(group, verdicts, strict=True)]
        try:
            results = [verdict.result() for verdict in verdicts]
            rewards = results
            if compares_groups(row):
                rewards = self.compare(group, matches, encode)
        except (ConnectionError, ValueError):  # the judge fails: ask nothing more
            self.questions.shutdown(wait=False, cancel_futures=True)
            raise
        for rollout, reward, result in zip(group, rewards, results, strict=True):
            rollout.reward, rollout.reason = reward
            rollout.outcome = result if compares_groups(row) else rollout.reward

    def compare(self, group: list[Rollout], matches, encode) -> list:
        """Pairwise rewards of one prompt's rollouts; lengths are counted in tokens."""
        responses = [x.turns[-1]["content"] for x in group]
        parts = [read_turn(text) for text in responses]
        known = {
            (parts[i]["content"], parts[j]["content"]): verdict
            for (i, j), verdict in matches.items()
        }
        return score_group(
            group[0].row,
            responses,
            lambda _, first, second: known[first, second].result(),
            pairing=self.pairing,
            thought_lengths=[len(encode(x["reasoning_content"] or "")) for x in parts],
            answer_lengths=[len(encode(x["content"])) for x in parts],
            finished=[x.stop_reason == "stop" for x in group],
        )

    def against_reference(self, rollout: Rollout) -> float | None:
        """0, 1/2 or 1 for a preference answer against the row's reference answer, None without one.
        An answer that was cut off loses."""
        reference = rollout.row.get("reference")
        if reference is None:
            return None
        if rollout.stop_reason != "stop":
            return 0.0
        return win_rate(rollout.row, rollout.turns[-1]["content"], reference, self.judge)


def judged_answer(rollout: Rollout) -> str | None:
    """The text that the judge compares; None if the response is unfinished or was cut off."""
    if rollout.stop_reason != "stop":
        return None
    message = read_turn(rollout.turns[-1]["content"])
    return None if message["unfinished"] else message["content"]
