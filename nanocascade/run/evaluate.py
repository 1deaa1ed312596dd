"""Scores of held-out rows before and after a run, with intervals."""

import json
from pathlib import Path

import torch

from nanocascade.data.episode import Sampling
from nanocascade.data.rows import question_of
from nanocascade.engine.distributed import Dist
from nanocascade.files import write_text_atomic
from nanocascade.rewards import compares_groups, needs_judge
from nanocascade.rewards.judge import EndpointJudge
from nanocascade.rollouts.groups import mean
from nanocascade.rollouts.rollout import roll_out
from nanocascade.rollouts.scoring import Scorer
from nanocascade.run.rows import References, check_prompts, read_eval_rows
from nanocascade.run.settings import TOY, EvalSettings, RunSettings
from nanocascade.tokenizer.tokenizer import Tokenizer
from nanocascade.toy import tasks
from nanocascade.toy.judge import rule_judge


def evaluate(model, tokenizer, rows, num_samples, sampling, seed, scorer, dist=None):
    """({domain: {"mean", "n", "interval"}}, this rank's groups): mean outcomes of the rows.

    A prompt's samples are averaged first, since they are not independent.
    """
    dist = dist or Dist()
    indices = dist.shard(list(range(len(rows))))
    local_rows = [rows[i] for i in indices]
    groups, _ = roll_out(
        model, tokenizer, local_rows, num_samples, sampling, seed, indices, scorer, dist
    )
    outcomes = [
        (g[0].domain, mean(x.outcome for x in g)) for g in groups if g[0].outcome is not None
    ]
    outcomes = [x for part in dist.gather(outcomes) for x in part]
    domains = sorted({domain for domain, _ in outcomes})
    # Sorted, so that the sum does not depend on the number of ranks.
    return {d: mean_interval(sorted(x for y, x in outcomes if y == d)) for d in domains}, groups


def mean_interval(values: list[float]) -> dict:
    """Mean of values and its 95 % interval: 1.96 standard errors (one value: 1.96)."""
    x = torch.tensor(values, dtype=torch.float64)
    error = float(x.std() / len(x) ** 0.5) if len(x) > 1 else 1.0
    return {"mean": float(x.mean()), "n": len(x), "interval": 1.96 * error}


class Evaluation:
    """The held-out rows of a run by domain, and what its model scores on them.

    domains: those that the run trains. sampling: how the run samples; held-out rows of its own
    domains get at least as many tokens. results: {domain: {"before": score, "after": score}}.
    """

    def __init__(
        self,
        settings: EvalSettings,
        domains,
        sampling: Sampling,
        tokenizer: Tokenizer,
        references: References,
        context: int,
    ):
        self.settings, self.domains, self.sampling = settings, domains, sampling
        self.tokenizer, self.references = tokenizer, references
        self.results: dict[str, dict] = {}
        rows = read_eval_rows(settings, domains)
        self.rows = {domain: references.add_to(x) for domain, x in rows.items()}
        for domain, rows in self.rows.items():
            check_prompts(rows, tokenizer, self.sampling_of(domain), context)

    def sampling_of(self, domain: str) -> Sampling:
        """Sampling of a domain's held-out rows: temperature 1, top-p 1."""
        own, limit = domain in self.domains, self.settings.eval_max_new_tokens
        return Sampling(
            max(limit, self.sampling.max_new_tokens) if own else limit,
            max_turns=max(self.sampling.max_turns, 4),
            max_tokens=self.sampling.max_tokens if own else 0,
            max_rows=self.sampling.max_rows,
            thinking=self.sampling.thinking,
        )

    def all_rows(self) -> list[dict]:
        return [row for rows in self.rows.values() for row in rows]

    def measure(self, model, scorer, dist: Dist) -> dict[str, dict]:
        """{domain: {mean, n, interval, and the limits that the score depends on}}.

        A preference row needs a stored answer to compare with, which SFT writes only at its end.
        """
        scores = {}
        for domain, rows in self.rows.items():
            rows = [x for x in rows if not compares_groups(x) or "reference" in x]
            if rows:
                sampling = self.sampling_of(domain)
                found, _ = evaluate(model, self.tokenizer, rows, 1, sampling, 1, scorer, dist)
                scores[domain] = found[domain] | sampling.limits
        return scores

    def before(self, model, scorer, dist: Dist, parent: dict) -> None:
        """Scores of the initial model: from its parent's manifest if they fit, else measured."""
        if self.results:  # a resumed run has them
            return
        scores = self.scores_of_parent(parent)
        if scores is None:
            scores = self.measure(model, scorer, dist)
        self.results = {domain: {"before": x} for domain, x in scores.items()}

    def scores_of_parent(self, parent: dict) -> dict[str, dict] | None:
        """The scores at the end of the parent, if it was evaluated as this run is, on whatever
        number of rows it had: its --eval_samples of a domain that only this run trains."""
        results, config = parent.get("evaluation", {}), parent.get("config", {})
        scores = {d: x["after"] for d, x in results.items() if x.get("after") and d in self.rows}
        same = (
            config.get("eval_data") == list(self.settings.eval_data)
            and config.get("thinking", True) == self.sampling.thinking
            and set(self.domains) & set(self.rows) <= set(scores)
            and all(self.sampling_of(d).limits.items() <= x.items() for d, x in scores.items())
        )
        return scores if scores and same else None

    def after(self, model, scorer, dist: Dist) -> None:
        for domain, score in self.measure(model, scorer, dist).items():
            self.results.setdefault(domain, {"before": None})["after"] = score

    def store_references(self, model, scorer, dist: Dist, path: Path, num_rows: int) -> None:
        """Write the SFT model's answers to the preference questions. The score of a later stage is
        how often the judge prefers its answers to these."""
        rows = self.rows.get("preference", [])
        if not rows:
            return
        if self.settings.eval_data == (TOY,):
            rows = tasks.make_rows("preference", num_rows, "test", 0)
        sampling = self.sampling_of("preference")
        _, groups = evaluate(model, self.tokenizer, rows, 1, sampling, 2, scorer, dist)
        answers = [(question_of(g[0].row), g[0].turns[-1]["content"]) for g in groups]
        answers = sorted(x for part in dist.gather(answers) for x in part)  # for any ranks the same
        if dist.is_main:
            lines = [json.dumps({"question": x, "answer": y}) + "\n" for x, y in answers]
            write_text_atomic(path, "".join(lines))
        dist.barrier()
        self.references = References(str(path))
        self.rows["preference"] = self.references.add_to(self.rows["preference"])


def make_scorer(
    settings: RunSettings, rows, evaluation: Evaluation, needed=True, pairing="all"
) -> Scorer:
    """The scorer of a run. Its judge is the endpoint of --judge_url, or the toy's rule for the
    toy's rows.

    There is none if only rows of --data need a judge and the run can do without (`needed` is false:
    MOPD has no rewards in its loss).
    """
    if settings.judge_url:
        judge = EndpointJudge(settings.judge_url, settings.judge_model, workers=1)
    else:
        trained = settings.data != (TOY,) and any(map(needs_judge, rows))
        evaluated = any(map(needs_judge, evaluation.all_rows()))
        toy_eval = evaluation.settings.eval_data == (TOY,)
        if trained and (needed or evaluated) or evaluated and not toy_eval:
            raise ValueError(
                "preference rows need --judge_url and --judge_model, as do rows that a judge grades"
            )
        judge = None if trained else rule_judge
    return Scorer(judge, settings.score_workers, settings.judge_concurrency, pairing)
