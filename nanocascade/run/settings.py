"""The flags that the train scripts share; those of a stage's recipe stand in stages.py."""

from dataclasses import dataclass
from typing import Literal

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
    judge_concurrency: Positive = 16  # questions to the judge at a time, of each rank
    # ---- Memory and speed ----
    device: str = ""  # cuda, mps or cpu (default: the best one found)
    micro_tokens: Positive = 8192  # tokens of a micro-batch; changes no gradient
    max_rows: Positive = 512  # rows decoded at once
    score_workers: Count = 0  # programs a rank verifies at once (0 = its share of the cores)
    share_prompts: bool = True  # train on a prompt once for all its responses; changes no gradient
    memory_gb: NonNegative = 0.0  # lower memory until a device of this size holds it (0: the GPU's)
    # ---- Advanced ----
    judge_seconds: NonNegative = 0.0  # seconds of one judge call, for --dry_run's prediction
    cluster: str = ""  # cluster that --dry_run plans for: 8xH200, 16xH100 (default: this machine)
    toy_rows: Positive = 1500  # generated rows of each domain
    save_dtype: Literal["memory", "float32", "bfloat16"] = "memory"  # of the trained model's file
    save_every: Count = 10  # steps between checkpoints of the training state (0 = none)
    log_groups: Count = 1  # groups of each domain and step written to rollouts.jsonl
    track: tuple[str, ...] = ()  # trackers that get a copy of the log: tensorboard, wandb
    show_every: Count = 10  # steps between rollouts printed in full (0 = never)
    allow_unprotected: bool = False  # run programs even where the sandbox cannot be enforced


@dataclass
class EvalSettings:
    """Evaluation"""

    eval_data: tuple[str, ...] = ()  # JSONL files of rows to evaluate on; "toy" generates them
    eval_samples: Count = 256  # evaluation prompts of each domain that is not trained
    own_eval_samples: Count = 2000  # evaluation prompts of each domain that is trained
    eval_max_new_tokens: Positive = 72  # maximum tokens of a response in evaluations


def read_settings(recipe_class, doc=None, argv=None) -> list:
    """[recipe, RunSettings, Layout, EvalSettings] of the command line."""

    def preset(values: dict) -> dict:
        return stages.preset(values.get("stage", recipe_class.stage), values["config"])

    groups = recipe_class, RunSettings, Layout, EvalSettings
    return parse_args(*groups, preset=preset, doc=doc, argv=argv)


def starts_from_nothing(run: RunSettings, stage: str) -> bool:
    """Whether the run starts from random weights: the toy's SFT, unless --init names a model."""
    return not run.init and run.config == TOY and stage == "sft"


def require_flags(run: RunSettings, stage: str) -> None:
    """Raise ValueError for a required flag that is missing, before any process is started."""
    needed = [] if starts_from_nothing(run, stage) else ["init"]
    needed += ["data"] if run.dry_run else ["out", "data"]
    check_trackers(run.track)
    if missing := [f"--{name}" for name in needed if not getattr(run, name)]:
        raise ValueError(f"--config {run.config} needs {', '.join(missing)}")
