"""One run of a train script and its directory, from the first checks to the manifest.

The directory of a finished run is a Hugging Face directory with manifest.json, metrics.jsonl and
rollouts.jsonl beside the weights. state/ exists until the run is finished.
"""

import platform
import sys
import tempfile
from pathlib import Path

import torch

from nanocascade.checkpoint.hf_config import load_config
from nanocascade.checkpoint.state import check_out_dir, load_state, remove_state, save_state
from nanocascade.checkpoint.weights import save_model
from nanocascade.cli import merge
from nanocascade.data.episode import Sampling
from nanocascade.data.rows import conversation
from nanocascade.data.stream import PromptStream
from nanocascade.engine import distributed
from nanocascade.engine.distributed import DTYPES, LAYOUT, Dist
from nanocascade.engine.layout import load, parallelize
from nanocascade.engine.lora import base_of, load_adapted, merge_adapters, save_adapters
from nanocascade.files import read_json, sha256_of, write_json_atomic
from nanocascade.model.model import Model
from nanocascade.plan.report import fit_memory, report
from nanocascade.run.evaluate import Evaluation
from nanocascade.run.log import Log, commit, evaluation_table, peak_gib
from nanocascade.run.rows import (
    References,
    check_conversations,
    check_prompts,
    check_sandbox,
    read_training_rows,
)
from nanocascade.run.settings import TOY, Flags, read_settings, require_flags
from nanocascade.run.track import Trackers
from nanocascade.tokenizer.tokenizer import Tokenizer
from nanocascade.toy import tasks
from nanocascade.toy.start import build_toy_tokenizer, toy_model_config

# A resumed run reaches the same bits only if all other flags are the same. The layout may change:
# another number of ranks continues with the same weights, moments and data order.
MAY_CHANGE = {"out", "resume", "dry_run", "device", "save_every", "log_groups", "show_every"}
MAY_CHANGE |= {"score_workers", "judge_concurrency", "judge_seconds"}
MAY_CHANGE |= {"cluster", "track", *LAYOUT} - {"dtype"}
MAY_CHANGE |= {"micro_tokens", "max_rows", "memory_gb"}  # change memory and speed, no gradient


def launch(recipe_class, train) -> None:
    """Read the flags and call train(flags, dist) in each process of the run. A dry run without data
    needs the plan alone."""
    flags = read_settings(recipe_class, sys.modules[train.__module__].__doc__)
    fit_memory(*flags)
    if flags.run.dry_run and not flags.run.data:
        return report(*flags)
    require_flags(flags)
    frozen = flags.recipe.lora_rank > 0
    with distributed.start(flags.run.device, flags.layout, flags.run.dry_run, frozen) as dist:
        train(flags, dist)


class Run:
    """A run directory: initial model, rows, checkpoints, log, manifest.

    teachers: {domain: {"path", "sha256"}} of MOPD. Raises ValueError for a directory that holds
    another run and for a missing or damaged --init.
    """

    def __init__(self, flags: Flags, dist: Dist, teachers: dict | None = None):
        self.flags, self.dist, self.teachers = flags, dist, teachers or {}
        self.recipe, self.settings = flags.recipe, flags.run
        self.stage, self.init = self.recipe.stage, self.settings.init
        self.out, self.config = Path(self.settings.out), merge(*flags)
        identity = {k: v for k, v in self.config.items() if k not in MAY_CHANGE}
        identity |= {"stage": self.stage, "teachers": self.teachers}
        dry_run = self.settings.dry_run
        self.resumes = not dry_run and check_out_dir(self.out, self.settings.resume, identity)
        self.parent: dict = {}  # the manifest of --init
        if flags.toy_start:
            with tempfile.TemporaryDirectory() as scratch:  # a dry run writes nothing to --out
                path = scratch if dry_run else self.out
                if dist.is_main or dry_run:
                    build_toy_tokenizer(path, tasks.vocabulary())
                dist.barrier()
                self.tokenizer = Tokenizer(path)
            self.model_config = toy_model_config(self.tokenizer.vocab_size, self.tokenizer.eos_ids)
        else:
            self.model_config = load_config(self.init)
            self.tokenizer = Tokenizer(self.init)
            self.tokenizer.check_model(self.model_config.vocab_size, self.init)
            if (Path(self.init) / "manifest.json").exists():
                self.parent = read_json(Path(self.init) / "manifest.json")
        self.log = Log(self.settings, self.tokenizer, dist)

    def read_rows(self, domains, sampling: Sampling) -> list[dict]:
        """The rows to train on. These and the evaluation's are checked, so that a bad row cannot
        stop the run later."""
        settings, references = self.flags.evaluation, References(self.references_path())
        context = self.model_config.max_position_embeddings
        self.evaluation = Evaluation(
            settings, domains, sampling, self.tokenizer, references, context
        )
        rows = read_training_rows(self.settings, self.stage, domains, self.dist)
        asked = {*getattr(self.recipe, "domains", ())}  # SFT has no --domains
        if missing := sorted(asked - {row["domain"] for row in rows}):
            raise ValueError(f"--domains {','.join(missing)}: --data has no rows of it")
        graded = self.evaluation.all_rows()
        if self.stage != "sft":
            check_prompts(rows, self.tokenizer, sampling, context)
            graded, rows = graded + rows, references.add_to(rows)
        elif self.settings.data != (TOY,):
            check_conversations(rows, self.tokenizer, self.recipe)
        check_sandbox(graded, self.settings, settings.eval_data, self.dist)
        return rows

    def references_path(self) -> str:
        """--references, or the parent's, found in --init even if that was moved. Never those that
        an SFT run wrote itself, or a resumed run would differ."""
        stored = Path(self.init) / "references.jsonl"
        if self.init and stored.exists():
            return self.settings.references or str(stored)
        return self.settings.references or self.parent.get("references", "")

    def report(self, rows: list[dict]) -> None:
        """Print the plan of a dry run, with the longest of a few hundred prompts."""
        some = rows[:: max(len(rows) // 256, 1)]
        thinking = self.evaluation.sampling.thinking
        prompts = [self.tokenizer.render(*conversation(x), thinking, True)[0] for x in some]
        report(*self.flags, self.model_config, max(map(len, prompts)))

    # ---- Model and checkpoints ----

    def load_model(self) -> Model:
        """The model to start from (a resumed run overwrites its weights)."""
        rank, seed = self.recipe.lora_rank, self.settings.seed
        if rank and self.flags.toy_start:
            raise ValueError(f"--lora_rank {rank}: needs --init, a model to adapt")
        if rank:
            self.base = base_of(self.init, rank)
            return load_adapted(self.init, self.base, rank, seed, self.dist)
        if self.flags.toy_start:
            model = Model(self.model_config).reset_parameters(seed)
            return parallelize(model.to(self.dist.device), self.dist)
        return load(self.init, self.dist)

    def resume(self, model, optimizer, rows, weights=None, kept=None):
        """(stream of prompts, first step) of the last checkpoint, or of a new run.

        weights: {domain: share} of the prompts. kept: indices of the rows to draw from (None: all),
        which checkpoints store.
        """
        first, earlier = 0, 0.0
        state = load_state(self.out, model, optimizer) if self.resumes else None
        self.kept = state["rows"] if state else kept
        rows = rows if self.kept is None else [rows[i] for i in self.kept]
        present = {row["domain"] for row in rows}
        shares = {d: share for d, share in (weights or {}).items() if d in present}
        stream = PromptStream(rows, self.settings.seed, shares or None)
        if state:
            stream.load_state(state["stream"])
            self.evaluation.results = state["evaluation"]
            first, earlier = state["step"], state["seconds"]
        names = self.settings.track if self.dist.is_main else ()
        self.log.begin(first, earlier, Trackers(names, self.out, self.stage, self.config, first))
        return stream, first

    def save(self, done: int, model, optimizer, stream: PromptStream) -> None:
        """Save the training state every save_every steps and before a run exits on SIGTERM. The
        last good checkpoint is kept."""
        every = self.settings.save_every
        if self.dist.stopping or every and done % every == 0:
            extra = {
                "step": done,
                "stream": stream.state(),
                "rows": self.kept,
                "evaluation": self.evaluation.results,
                "seconds": self.log.elapsed,
            }
            save_state(self.out, model=model, optimizer=optimizer, extra=extra)

    def finish(self, model, scorer) -> None:
        """Write the model, evaluate it, write the manifest, remove the training state."""
        evaluation, seconds, rank = self.evaluation, self.log.elapsed, self.recipe.lora_rank
        if rank:
            if self.dist.is_main:
                save_adapters(model, self.out, self.base, rank)
            merge_adapters(model)
        dtype = DTYPES.get(self.settings.save_dtype)  # None: as in memory
        # Called on all ranks, before anything that may still fail.
        save_model(model, self.out, self.tokenizer, dtype=dtype)
        evaluation.after(model, scorer, self.dist)
        peaks = self.dist.gather(peak_gib("cpu"))
        if not self.dist.is_main:
            return
        manifest = {
            "stage": self.stage,
            "parent": {"path": self.init, "sha256": sha256_of(self.init)} if self.init else None,
            "teachers": self.teachers,
            "data": list(self.settings.data),
            "seed": self.settings.seed,
            "config": self.config,
            "evaluation": evaluation.results,
            "references": evaluation.references.path,
            "seconds": seconds,
            "peak_kib": round(max(peaks) * 2**20),
            "commit": commit(),
            "versions": {"python": platform.python_version(), "torch": torch.__version__},
        }
        write_json_atomic(self.out / "manifest.json", manifest)
        self.log.trackers.call("finish", manifest)
        remove_state(self.out)
        if evaluation.results:
            print(evaluation_table(evaluation.results))
