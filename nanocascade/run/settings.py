"""Flags that all train scripts have. The flags of a stage's recipe are in stages.py."""

from dataclasses import dataclass
from typing import Literal, NamedTuple

from nanocascade import stages
from nanocascade.cli import Count, NonNegative, Positive, parse_args
from nanocascade.engine.distributed import Layout
from nanocascade.run.track import check_trackers

TOY = "toy"  # as a data source: rows of toy/tasks.py


@dataclass
class RunSettings:
    """Run and data"""

    config: Literal["toy", "small", "full"] = "toy"  # size of the run, which sets the defaults
    init: str = ""  # directory of the model to start from (the toy's SFT needs none)
    out: str = ""  # directory of this run and of the trained model
    data: tuple[str, ...] = ()  # JSONL files of rows to train on; "toy" generates them
    resume: bool = False  # continue the run in --out from its last checkpoint
    dry_run: bool = False  # print the settings and the plan (memory, time), and exit
    seed: int = 0  # seed of initial weights, data order and sampling
    references: str = ""  # JSONL of stored answers that preference answers are compared with
    judge_url: str = ""  # OpenAI-compatible endpoint of a generative reward model
    judge_model: str = ""  # name of the model at --judge_url
    judge_concurrency: Positive = 16  # concurrent requests to the judge, for each rank
    # ---- Memory and speed ----
    device: str = ""  # cuda, mps or cpu (default: the best one found)
    micro_tokens: Positive = 8192  # maximum tokens of a micro-batch (does not change gradients)
    max_rows: Positive = 512  # maximum responses decoded at once, on each rank
    score_workers: Count = 0  # programs verified at once, on each rank (0 = its share of the cores)
    share_prompts: bool = True  # compute a prompt once for its group (does not change gradients)
    memory_gb: NonNegative = 0.0  # GB that the run's memory flags are fitted to (0 = the GPU's)
    # ---- Advanced ----
    judge_seconds: NonNegative = 0.0  # seconds of one judge call, used by --dry_run only
    cluster: str = ""  # cluster that --dry_run plans for, as 8xH200 (default: this machine)
    toy_rows: Positive = 1500  # generated rows of each domain
    save_dtype: Literal["memory", "float32", "bfloat16"] = "memory"  # dtype of the saved weights
    save_every: Count = 10  # steps between checkpoints of the training state (0 = none)
    log_groups: Count = 1  # groups written to rollouts.jsonl, for each domain and step
    track: tuple[Literal["tensorboard", "wandb"], ...] = ()  # trackers that get a copy of the log
    show_every: Count = 10  # steps between full rollouts on the console (0 = never)
    allow_unprotected: bool = False  # run programs even where the sandbox cannot be enforced


@dataclass
class EvalSettings:
    """Evaluation"""

    eval_data: tuple[str, ...] = ()  # JSONL files of rows to evaluate on; "toy" generates them
    eval_samples: Count = 256  # evaluation prompts of each domain that is not trained
    own_eval_samples: Count = 2000  # evaluation prompts of each domain that is trained
    eval_max_new_tokens: Positive = 72  # maximum tokens of a response in evaluations


class Flags(NamedTuple):
    """The flags of a train script, in groups."""

    recipe: stages.SFT | stages.RL | stages.MOPD
    run: RunSettings
    layout: Layout
    evaluation: EvalSettings

    @property
    def toy_start(self) -> bool:
        """Whether the run starts from random weights: the toy's SFT, unless --init is given."""
        return not self.run.init and self.run.config == TOY and self.recipe.stage == "sft"


def read_settings(recipe_class, doc=None, argv=None) -> Flags:
    """The flags of the command line."""

    def preset(values: dict) -> dict:
        return stages.preset(values.get("stage", recipe_class.stage), values["config"])

    groups = recipe_class, RunSettings, Layout, EvalSettings
    return Flags(*parse_args(*groups, preset=preset, doc=doc, argv=argv))


def require_flags(flags: Flags) -> None:
    """Raise ValueError for a required flag that is missing, before any process is started."""
    run = flags.run
    needed = [] if flags.toy_start else ["init"]
    needed += ["data"] if run.dry_run else ["out", "data"]
    check_trackers(run.track)
    if missing := [f"--{name}" for name in needed if not getattr(run, name)]:
        raise ValueError(f"--config {run.config} needs {', '.join(missing)}")
