"""One run of a train script: its directory, data, model, checkpoints, evaluation and manifest.

Everything here is bookkeeping that the three scripts share; the algorithm is in the scripts. A run
directory ends as a Hugging Face directory with manifest.json, metrics.jsonl and rollouts.jsonl
beside the weights; state/ exists until the run is finished.
"""

import json
import os
import platform
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

import torch
from tqdm import tqdm

from nanocascade.checkpoint.hf_config import load_config
from nanocascade.checkpoint.state import check_out_dir, load_state, remove_state, save_state
from nanocascade.checkpoint.weights import save_model
from nanocascade.data.episode import Rollout, Sampling
from nanocascade.data.rows import conversation, read_references, read_rows, sft_conversation
from nanocascade.data.stream import PromptStream
from nanocascade.engine.distributed import LAYOUT
from nanocascade.engine.layout import load, parallelize
from nanocascade.files import read_json, sha256_of, write_json_atomic
from nanocascade.model.layers import widest
from nanocascade.model.model import Model
from nanocascade.plan import plan
from nanocascade.rewards import kind_of, needs_judge
from nanocascade.rewards.judge import EndpointJudge
from nanocascade.run.evaluate import evaluate
from nanocascade.run.log import Log, commit, evaluation_table, peak_gib, show_rollout
from nanocascade.run.settings import TOY, check_settings, starts_from_nothing
from nanocascade.sandbox.sandbox import shared_sandbox
from nanocascade.tokenizer.tokenizer import Tokenizer
from nanocascade.toy import tasks
from nanocascade.toy.judge import rule_judge
from nanocascade.toy.start import build_toy_tokenizer, toy_model_config


class Run:
    """State of one run that is not the algorithm's: see the module's docstring.

    Raises ValueError before anything is trained: no --out, an --out that holds another run, a
    missing or damaged --init, rows that cannot be graded, prompts longer than the context.
    """

    def __init__(self, cfg, stage: str, dist, teachers: dict[str, dict] | None = None):
        self.cfg, self.stage, self.dist, self.teachers = cfg, stage, dist, teachers or {}
        self.toy_start = starts_from_nothing(cfg, stage)
        check_settings(cfg)
        # What a resumed run must share with the one that was cut off, to go on to the same bits.
        # Layouts are free too: other ranks go on with the same weights, moments and data order.
        free = ("out", "resume", "dry_run", "device", "save_every", "log_groups", "show_every")
        free += ("cluster",) + tuple(x for x in LAYOUT if x != "dtype")
        identity = {k: v for k, v in asdict(cfg).items() if k not in free}
        identity |= {"stage": stage, "teachers": self.teachers}
        self.out = Path(cfg.out)
        self.resumes = not cfg.dry_run and check_out_dir(self.out, cfg.resume, identity)
        self.parent, self.references, self.evaluation, self.eval_rows = {}, None, {}, {}
        if self.toy_start:
            with tempfile.TemporaryDirectory() as scratch:  # a dry run leaves nothing in --out
                path = scratch if cfg.dry_run else self.out
                if dist.is_main or cfg.dry_run:
                    build_toy_tokenizer(path, tasks.vocabulary())
                dist.barrier()
                self.tokenizer = Tokenizer(path)
            self.model_config = toy_model_config(self.tokenizer.vocab_size, self.tokenizer.eos_ids)
        else:
            self.model_config = load_config(cfg.init)
            self.tokenizer = Tokenizer(cfg.init)
            if (Path(cfg.init) / "manifest.json").exists():
                self.parent = read_json(Path(cfg.init) / "manifest.json")
        self.seconds, self.stopping = 0.0, False

    # ---- Data ----

    def train_rows(self, domains: tuple[str, ...], per_domain: int, sft: bool = False):
        """The rows of --data: every row of files, or `per_domain` generated ones a domain.

        Those of --eval_data are read too: what is wrong with them is said before the training.
        """
        self.evaluation_rows(domains)
        if self.cfg.data == (TOY,):
            seed = f"{self.cfg.seed} {self.stage}"  # each stage draws its own problems
            rows = [x for d in domains for x in tasks.make_rows(d, per_domain, "train", seed)]
        else:
            rows = list(read_rows(self.cfg.data, sft=sft))
            found = {r["domain"] for r in rows}
            if not sft and not set(domains) & found:
                raise ValueError(f"stage {self.stage} trains {domains}; --data holds {found}")
            if not sft and (others := found - set(domains)) and self.dist.is_main:
                print(f"left out, not of this stage: rows of {', '.join(sorted(others))}")
            rows = rows if sft else [r for r in rows if r["domain"] in domains]
        if not sft:
            total = getattr(self.cfg, "max_tokens", 0)
            self.check_lengths(rows, Sampling(self.cfg.max_new_tokens, max_tokens=total))
        elif self.cfg.data != (TOY,):
            self.check_lengths(rows)
        graded = [row for part in self.eval_rows.values() for row in part]
        self.check_sandbox(graded if sft else graded + rows)
        self.rows = self.with_references(rows)
        return self.rows

    def check_sandbox(self, rows: list[dict]) -> None:
        """If the rows run programs, print how these are confined, or raise OSError: before the
        training. The toy's functions of one number run everywhere (see Sandbox)."""
        cfg, run_programs = self.cfg, {"code", "swe", "swe_agentic"}
        rows = [
            x for x in rows if kind_of(x) in run_programs or "python" in str(x.get("environment"))
        ]
        if rows:
            toy = cfg.data == (TOY,) and cfg.eval_data in ((), (TOY,))
            plain = toy and not any("environment" in x for x in rows)
            sandbox = shared_sandbox(allow_unprotected=cfg.allow_unprotected, plain_only=plain)
            if self.dist.is_main:
                print(sandbox.describe())

    def evaluation_rows(self, own) -> dict[str, list[dict]]:
        """Held-out rows by domain: many of the run's own domains, fewer of the others."""
        cfg = self.cfg
        if not self.eval_rows and cfg.eval_data == (TOY,):
            for domain in dict.fromkeys((*tasks.DOMAINS, *own)):
                n = cfg.own_eval_samples if domain in own else cfg.eval_samples
                if n:
                    self.eval_rows[domain] = tasks.make_rows(domain, n, "test", 0)
        elif not self.eval_rows and cfg.eval_data:
            for row in read_rows(cfg.eval_data):
                n = cfg.own_eval_samples if row["domain"] in own else cfg.eval_samples
                if len(self.eval_rows.get(row["domain"], ())) < n:
                    self.eval_rows.setdefault(row["domain"], []).append(row)
        for domain, rows in self.eval_rows.items():
            self.check_lengths(rows, self.eval_sampling(domain, own))
        found = {d: self.with_references(rows) for d, rows in self.eval_rows.items()}
        # Preference has no score without an answer to compare with: SFT has none until its end.
        found = {
            d: [x for x in rows if kind_of(x) != "preference" or "reference" in x]
            for d, rows in found.items()
        }
        return {d: rows for d, rows in found.items() if rows}

    def eval_sampling(self, domain: str, own) -> Sampling:
        """How a held-out domain is answered: the run's own ones at least as they are trained."""
        cfg, mine = self.cfg, domain in own
        longest = max(cfg.eval_max_new_tokens, getattr(cfg, "max_new_tokens", 0) if mine else 0)
        turns, total = max(getattr(cfg, "max_turns", 4), 4), getattr(cfg, "max_tokens", 0)
        return Sampling(
            longest,
            max_turns=turns,
            max_tokens=total if mine else 0,
            max_rows=cfg.max_rows,
            thinking=getattr(cfg, "thinking", True),
        )

    def check_lengths(self, rows: list[dict], sampling: Sampling | None = None) -> None:
        """Raise ValueError for a row that does not fit: its prompt and all new tokens in the
        model's context, or one of them in --max_tokens; without `sampling`, of SFT, its
        conversation up to the last answer in --row_tokens, in each form that may be drawn."""
        most, new, forms = self.model_config.max_position_embeddings, 0, ()
        flag = "the model's context"
        if sampling is None:
            most, flag, off = self.cfg.row_tokens, "--row_tokens", self.cfg.strip_thinking
            forms = {x and self.tokenizer.thinks for x in (off < 1, off == 0)}
        elif sampling.max_tokens > most:
            raise ValueError(f"--max_tokens {sampling.max_tokens}: the model's context is {most}")
        elif sampling.max_tokens:
            most, new, flag = sampling.max_tokens, 1, "--max_tokens"
        else:
            new = sampling.max_new_tokens
        for row in rows:
            messages, tools = conversation(row)
            told = [(sft_conversation(row, x), tools, x, False) for x in forms]
            for rendered in told if sampling is None else [(messages, tools, True, True)]:
                # No token is shorter than a byte, so that few rows need to be encoded.
                if len(self.tokenizer.render_text(*rendered).encode()) + new <= most:
                    continue
                ids, mask = self.tokenizer.render(*rendered)
                size = len(ids) if sampling else len(mask) - [*mask[::-1], True].index(True)
                if size + new > most:
                    raise ValueError(
                        f"row {row['id']}: {size} tokens + {new} new ones; {flag} is {most}"
                    )

    def with_references(self, rows: list[dict]) -> list[dict]:
        """Rows whose question has stored answers get one of them, by their position. Where no row
        is of preference, a parent's answers need not be there any more."""
        if not self.cfg.references and all(row["domain"] != "preference" for row in rows):
            return rows
        if self.references is None:
            self.references = read_references(self.reference_path())
        out = []
        for i, row in enumerate(rows):
            answers = self.references.get(question_of(row))
            out.append(row | {"reference": answers[i % len(answers)]} if answers else row)
        return out

    def judge(self, rows: list[dict], needed=True):
        """The judge of preference rows: the toy's rule, or the endpoint of --judge_url; None where
        rewards are not `needed` (MOPD), no endpoint is given, and only rows of --data need one."""
        if self.cfg.judge_url:
            return EndpointJudge(self.cfg.judge_url, self.cfg.judge_model)
        trained = self.cfg.data != (TOY,) and any(map(needs_judge, rows))
        evaluated = any(needs_judge(row) for part in self.eval_rows.values() for row in part)
        if trained and (needed or evaluated) or evaluated and self.cfg.eval_data != (TOY,):
            raise ValueError("preference rows need --judge_url and --judge_model, so do judged")
        return None if trained else rule_judge

    # ---- Model and checkpoints ----

    @property
    def model(self) -> Model:
        """The model to start from (a resumed run overwrites its weights)."""
        if self.toy_start:
            model = Model(self.model_config).reset_parameters(self.cfg.seed).to(self.dist.device)
            return parallelize(model, self.dist)
        return load(self.cfg.init, self.dist)

    def resume(self, model, optimizer, rows, weights=None):
        """(rows, stream, first step): where the last checkpoint left off, or the beginning."""
        first = 0
        extra = load_state(self.out, model, optimizer) if self.resumes else None
        if extra is not None and extra["rows"] is not None:  # rows that were dropped as too easy
            rows = [self.rows[i] for i in extra["rows"]]
        shares = {d: w for d, w in (weights or {}).items() if any(r["domain"] == d for r in rows)}
        curriculum = getattr(self.cfg, "curriculum", ())
        stream = PromptStream(rows, self.cfg.seed, shares or None, curriculum)
        if extra is not None:
            stream.load_state(extra["stream"])
            first, self.evaluation, self.seconds = map(extra.get, ("step", "evaluation", "seconds"))
        self.log = Log(self.cfg.out, first) if self.dist.is_main else None
        self.started = time.perf_counter()
        return rows, stream, first

    def save(self, done: int, model, optimizer, stream, rows=None) -> None:
        """Checkpoint the training state every save_every steps, and where the run was told to stop;
        the last good one is kept."""
        every = self.cfg.save_every
        if not self.stopping and (not every or done % every):
            return
        at = {id(row): i for i, row in enumerate(self.rows)}  # names in files may repeat
        extra = {
            "step": done,
            "stream": stream.state(),
            "rows": None if rows is None else [at[id(row)] for row in rows],
            "evaluation": self.evaluation,
            "seconds": self.seconds + time.perf_counter() - self.started,
        }
        save_state(self.out, model=model, optimizer=optimizer, extra=extra)

    # ---- Seeing the run ----

    def progress(self, first: int, steps: int):
        """The steps left to do; after a SIGTERM (preemption) the one that was saved is the last."""
        self.bar = tqdm(
            range(first, steps),
            initial=first,
            total=steps,
            desc=self.stage,
            disable=not self.dist.is_main,
            dynamic_ncols=True,
        )
        for step in self.bar:
            yield step
            if self.stopping:
                raise SystemExit(0)

    def log_step(self, step: int, values: dict, groups: list[list[Rollout]], began: float) -> None:
        """metrics.jsonl, rollouts.jsonl, the bar, and now and then whole rollouts."""
        elapsed = time.perf_counter() - began
        device = torch.device(self.dist.device)
        told = torch.zeros(2 + self.dist.world_size, dtype=widest(device), device=device)
        told[0] = sum(len(x.tokens) for group in groups for x in group)
        told[1], told[2 + self.dist.rank] = self.dist.stop_asked, peak_gib(self.dist.device)
        tokens, stop, *values["memory/peak_gib"] = self.dist.sum(told).tolist()  # one collective
        self.stopping = stop > 0  # on all ranks after the same step
        tokens = values.get("batch/tokens", tokens)  # SFT has no groups
        values["tokens_per_s"] = tokens / elapsed
        values["time/train"] = elapsed - values.get("time/rollout", 0) - values.get("time/score", 0)
        values["time/elapsed"] = self.seconds + time.perf_counter() - self.started
        if not self.dist.is_main:
            return
        self.log.metrics(step, values)
        shown = ("outcome/drawn", "reward/mean", "mopd/reverse_kl", "loss/token")
        self.bar.set_postfix({k: f"{values[k]:.3g}" for k in shown if k in values})
        if not groups:
            return
        by_domain: dict[str, list] = {}
        for group in groups:
            by_domain.setdefault(group[0].domain, []).append(group)
        for found in by_domain.values():
            logged = [x for group in found[: self.cfg.log_groups] for x in group]
            self.log.rollouts(step, logged, self.tokenizer)
            if self.cfg.show_every and step % self.cfg.show_every == 0:
                tqdm.write(show_rollout(found[0][0], self.tokenizer, step))

    # ---- Evaluation ----

    def evaluate(self, model, scorer, own) -> dict[str, dict]:
        """{domain: {mean, n, interval}} at temperature 1 over the held-out rows."""
        results = {}
        for domain, rows in self.evaluation_rows(own).items():
            sampling = self.eval_sampling(domain, own)
            found, _ = evaluate(model, self.tokenizer, rows, 1, sampling, 1, scorer, self.dist)
            results[domain] = found[domain] | sampling.limits
        return results

    def evaluate_before(self, model, scorer, own) -> None:
        """What the model could do before: its parent's manifest says, or it is measured now."""
        if self.evaluation:  # resumed
            return
        known, settings = self.parent.get("evaluation", {}), self.parent.get("config", {})
        known = {d: x["after"] for d, x in known.items() if x.get("after")}
        same = settings.get("eval_data") == list(self.cfg.eval_data)
        same &= settings.get("thinking", True) == getattr(self.cfg, "thinking", True)
        same &= all(
            self.eval_sampling(d, own).limits.items() <= x.items()
            for d, x in known.items()
            if d in self.eval_rows
        )
        if known and same and set(own) & set(self.eval_rows) <= set(known):
            self.evaluation = {d: {"before": x} for d, x in known.items() if d in self.eval_rows}
        elif self.cfg.eval_data:
            found = self.evaluate(model, scorer, own)
            self.evaluation = {d: {"before": x} for d, x in found.items()}

    def finish(self, model, scorer, own) -> None:
        """Evaluate, write the model, its manifest, and remove the training state."""
        seconds = self.seconds + time.perf_counter() - self.started
        if self.stage == "sft" and self.eval_rows.get("preference"):
            self.write_references(model, scorer)
        save_model(model, self.out, self.tokenizer)  # of all ranks; before what may still fail
        after = self.evaluate(model, scorer, own) if self.cfg.eval_data else {}
        for domain, result in after.items():
            self.evaluation.setdefault(domain, {"before": None})["after"] = result
        peaks = self.dist.gather(peak_gib("cpu"))
        if not self.dist.is_main:
            return
        init, own_path = self.cfg.init, self.out / "references.jsonl"
        manifest = {
            "stage": self.stage,
            "parent": {"path": init, "sha256": sha256_of(init)} if init else None,
            "teachers": self.teachers,
            "data": list(self.cfg.data),
            "seed": self.cfg.seed,
            "config": asdict(self.cfg),
            "evaluation": self.evaluation,
            "references": str(own_path) if own_path.exists() else self.reference_path(),
            "seconds": seconds,
            "peak_kib": round(max(peaks) * 2**20),
            "commit": commit(),
            "versions": {"python": platform.python_version(), "torch": torch.__version__},
        }
        write_json_atomic(self.out / "manifest.json", manifest)
        remove_state(self.out)
        if self.evaluation:
            print(evaluation_table(self.evaluation))

    def reference_path(self) -> str:
        """--references, or the parent's, wherever its directory stands now. Not those that an SFT
        run wrote itself: cut off after that, it must go on as if it had none."""
        near = Path(self.cfg.init) / "references.jsonl"
        known = str(near) if self.cfg.init and near.exists() else self.parent.get("references", "")
        return self.cfg.references or known

    def write_references(self, model, scorer) -> None:
        """Store the SFT model's answers to the preference questions: later stages are judged by
        how often they are preferred to these."""
        rows = self.eval_rows["preference"]
        if self.cfg.eval_data == (TOY,):
            rows = tasks.make_rows("preference", self.cfg.reference_samples, "test", 0)
        sampling = Sampling(self.cfg.eval_max_new_tokens, max_rows=self.cfg.max_rows)
        _, groups = evaluate(model, self.tokenizer, rows, 1, sampling, 2, scorer, self.dist)
        records = [
            {"question": question_of(g[0].row), "answer": g[0].turns[-1]["content"]} for g in groups
        ]
        records = [x for part in self.dist.gather(records) for x in part]
        records.sort(key=lambda x: (x["question"], x["answer"]))  # whatever the number of ranks
        if self.dist.is_main:
            part = self.out / "references.jsonl.part"  # a kill leaves a whole file or none
            part.write_text("".join(json.dumps(x) + "\n" for x in records))
            os.replace(part, self.out / "references.jsonl")
        self.dist.barrier()
        self.references = read_references(self.out / "references.jsonl")

    def describe(self, rows: list[dict]) -> None:
        """--dry_run: the resolved run and what it costs, by the longest of some hundred prompts."""
        few = rows[:: max(len(rows) // 256, 1)]
        lengths = [len(self.tokenizer.render(*conversation(x), True, True)[0]) for x in few]
        plan.report(self.cfg, self.model_config, max(lengths))


def question_of(row: dict) -> str:
    return conversation(row)[0][-1]["content"]
