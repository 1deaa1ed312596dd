"""Verdicts of episodes, computed while others are still sampled."""

from concurrent.futures import Future, ThreadPoolExecutor

from nanocascade.data.episode import Rollout
from nanocascade.data.rows import conversation
from nanocascade.rewards import Reward, compares_groups, needs_judge, verdict
from nanocascade.rewards.base import read_turn
from nanocascade.rewards.judge import EndpointJudge
from nanocascade.rewards.preference import group_rewards, make_pairs, win_rate
from nanocascade.sandbox.sandbox import share_of_cores

NOT_SCORED = "not scored: no judge"


class Scorer:
    """Verdicts in threads: programs wait for their sandbox, other questions for the judge.

    workers: programs at a time (0 = share_of_cores). judge_concurrency: questions to the judge.
    pairing: of the responses to a preference row, "all" pairs or a "circle".
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

    def against_reference(self, rollout: Rollout) -> float | None:
        """0, 1/2 or 1 for a preference answer against the row's reference answer, None without one.
        An answer that was cut off loses."""
        reference = rollout.row.get("reference")
        if reference is None:
            return None
        if rollout.stop_reason != "stop":
            return 0.0
        return win_rate(rollout.row, rollout.turns[-1], reference, self.judge)

    def judge_metrics(self, dist) -> dict[str, float]:
        """Shares of this step's questions to the endpoint that got no verdict."""
        return self.judge.metrics(dist) if isinstance(self.judge, EndpointJudge) else {}


class GroupVerdicts:
    """The verdicts of one prompt's rollouts: `add` each when it is finished, then `set_rewards`.

    A verifier grades each response alone. The responses to a preference row are compared two by
    two, which makes their rewards, and each with the row's reference, which makes its outcome.
    """

    def __init__(self, scorer: Scorer, group: list[Rollout]):
        self.scorer, self.group, self.row = scorer, group, group[0].row
        self.compares = compares_groups(self.row)
        self.ended: list[int] = []  # the responses whose episodes have ended
        self.verdicts: dict[int, Future] = {}  # of each response alone
        self.matches: dict[tuple[int, int], Future] = {}  # of pairs of responses

    def add(self, new: int) -> None:
        """Start the verdict of response `new`, whose episode has ended, and the matches that it
        makes possible."""
        self.ended = sorted([*self.ended, new])
        if self.scorer.grades(self.row):
            self.verdicts[new] = self.scorer.submit(self.group[new])
            answers = self.judged_answers() if self.compares else {}
            for i, j in self.new_pairs(new, [*answers]):
                ask = self.scorer.judge, conversation(self.row)[0], answers[i], answers[j]
                self.matches[i, j] = self.scorer.questions.submit(*ask)

    def judged_answers(self) -> dict[int, str]:
        """{response: the text that the judge compares}, of those that are complete."""
        complete = [i for i in self.ended if self.group[i].stop_reason == "stop"]
        done = {i: read_turn(self.group[i].turns[-1]) for i in complete}
        return {i: x["content"] for i, x in done.items() if not x["unfinished"]}

    def new_pairs(self, new: int, judged: list[int]) -> list[tuple[int, int]]:
        """All pairs: of `new` and each response that ended before. A circle: every pair, once the
        last response has ended. judged: responses that the judge compares."""
        if self.scorer.pairing == "all":
            return [(min(i, new), max(i, new)) for i in judged if i != new and new in judged]
        if len(self.ended) < len(self.group):
            return []
        pairs = make_pairs(len(judged), self.scorer.pairing)
        return [(judged[i], judged[j]) for i, j in pairs]

    def set_rewards(self, encode) -> None:
        """Wait for the verdicts and write rewards and outcomes into the rollouts."""
        if not self.scorer.grades(self.row):  # in MOPD, whose loss has no rewards
            for rollout in self.group:
                rollout.outcome, rollout.reason = None, NOT_SCORED
            return
        for i in range(len(self.group)):
            if i not in self.verdicts:  # no room for the result of its last call
                self.add(i)
        try:
            results = [self.verdicts[i].result() for i in range(len(self.group))]
            rewards = self.compare(encode) if self.compares else results
        except (ConnectionError, ValueError):  # the judge fails: ask nothing more
            self.scorer.questions.shutdown(wait=False, cancel_futures=True)
            raise
        for rollout, reward, result in zip(self.group, rewards, results, strict=True):
            rollout.reward, rollout.reason = reward
            rollout.outcome = result if self.compares else rollout.reward

    def compare(self, encode) -> list[Reward]:
        """Rewards from the matches; lengths are counted in tokens."""
        messages = [read_turn(x.turns[-1]) for x in self.group]
        thoughts = [len(encode(x["reasoning_content"] or "")) for x in messages]
        answers = [len(encode(x["content"])) for x in messages]
        verdicts = {pair: self.matches[pair].result() for pair in sorted(self.matches)}
        return group_rewards([*self.judged_answers()], verdicts, (thoughts, answers))
