"""The flags that the train scripts share, and what is refused before a run starts."""

from dataclasses import dataclass

CHOICES = {
    "overlong": ("penalty", "filter", "off"),
    "gate": ("zero", "clamp", "none"),
    "schedule": ("constant", "linear", "cosine"),
    "pairing": ("all", "circle"),
    "denominator": ("response", "token"),
}
# Least value that means something; a flag that is None is set by the stage.
LEAST = dict.fromkeys(
    "prompts rollouts steps batch_tokens row_tokens micro_tokens max_new_tokens eval_max_new_tokens"
    " max_rows max_turns num_samples pass_samples reference_samples toy_rows rounds checks"
    " keep stop_every".split(),
    1,
) | dict.fromkeys(
    "lr min_lr warmup temperature top_k kl_coef weight_decay bias_rate save_every show_every show"
    " show_mask limit log_groups eval_samples own_eval_samples max_tokens"
    " max_sequence_error".split(),
    0,
)


def check_settings(cfg) -> None:
    """Refuse before any training what would be refused, or divide by zero, in its midst."""
    for name, known in CHOICES.items():
        if getattr(cfg, name, known[0]) not in known:
            raise ValueError(f"--{name} {getattr(cfg, name)}: expected {' or '.join(known)}")
    for name, least in LEAST.items():
        x = getattr(cfg, name, least)
        if not isinstance(x, str) and not x >= least:  # nor is a NaN; sample.py's prompts are text
            raise ValueError(f"--{name} {x}: expected {least} or more")
    if hasattr(cfg, "rollouts") and cfg.temperature == 0:
        raise ValueError("--temperature 0: log-probs of training are of logits / temperature")
    if hasattr(cfg, "stage") and cfg.rollouts < 2:
        raise ValueError("--rollouts 1: a group of one has no advantage")
    if not 0 <= getattr(cfg, "gate_low", 0) < getattr(cfg, "gate_high", 2):
        raise ValueError(f"--gate_low {cfg.gate_low}: expected less than --gate_high")
    if not 0 < getattr(cfg, "top_p", 1) <= 1:
        raise ValueError(f"--top_p {cfg.top_p}: expected more than 0 and at most 1")
    if len(betas := getattr(cfg, "betas", (0, 0))) != 2 or not all(0 <= x < 1 for x in betas):
        raise ValueError(f"--betas {betas}: expected two numbers from 0 to below 1")


TOY = "toy"  # as a data source: rows of tasks.py


@dataclass
class RunConfig:
    """The flags that the three train scripts share; each script adds its own."""

    config: str = "toy"  # toy, small or full: where the defaults come from
    init: str = ""  # directory of the model to start from; the toy's SFT starts from random weights
    out: str = ""  # directory of the run and of the trained model
    data: tuple[str, ...] = ()  # JSONL files of rows; "toy" generates tasks
    eval_data: tuple[str, ...] = ()  # rows to evaluate on after training; "toy", or none
    resume: bool = False  # continue the run in --out exactly where its last checkpoint is
    dry_run: bool = False  # print the resolved run and its plan (memory, time), and exit
    cluster: str = ""  # of a dry run: 8xH200, 16xH100, ...; this machine if empty
    seed: int = 0  # of initial weights, data order and sampling
    # ---- advanced ----
    bias_rate: float = 1e-3  # step of the experts' correction bias after each update (0 = off)
    # OURS: AdamW in every stage; two rows of the report's table say Adam, equal without decay.
    betas: tuple[float, ...] = (0.9, 0.95)  # decay rates of AdamW's two moments
    weight_decay: float = 0.0  # of matrices
    max_norm: float = 1.0  # global gradient norm to clip to
    micro_tokens: int = 8192  # tokens of a micro-batch; changes memory and speed, not gradients
    max_rows: int = 512  # rows decoded at once
    device: str = ""  # cuda, mps or cpu; found if empty
    shard: bool = False  # FSDP2: weights, gradients and moments in shards over the ranks
    expert_parallel: int = 1  # ranks that share the experts of one copy (8: within a node)
    replicas: int = 1  # copies of the sharded weights, one a group of nodes
    dtype: str = "float32"  # of products: float32, or bfloat16 with fp32 master weights
    checkpoint_blocks: bool = False  # keep only the blocks' inputs for backward, and recompute
    offload_blocks: bool = False  # and keep these in host memory
    offload_optimizer: bool = False  # moments in host memory, on the device one at a time
    save_every: int = 10  # steps between checkpoints of the training state (0 = none)
    log_groups: int = 1  # groups a domain and step that go to rollouts.jsonl
    show_every: int = 10  # steps between rollouts printed in full (0 = never)
    eval_samples: int = 256  # evaluation prompts of a foreign domain
    own_eval_samples: int = 2000  # evaluation prompts of the domains trained on
    eval_max_new_tokens: int = 72  # of a response in evaluations
    references: str = ""  # JSONL of stored answers that preference answers are compared with
    judge_url: str = ""  # OpenAI-compatible endpoint of a generative reward model
    judge_model: str = ""  # its name there
    toy_rows: int = 1500  # generated rows a domain
    allow_unprotected: bool = False  # run programs even where the sandbox cannot be enforced


def starts_from_nothing(cfg, stage: str) -> bool:
    return not cfg.init and cfg.config == TOY and stage == "sft"


def require_flags(cfg, stage: str) -> None:
    """Raise ValueError for a required flag that is missing, before any process is started."""
    needed = [] if starts_from_nothing(cfg, stage) else ["init"]
    needed += ["data"] if cfg.dry_run else ["out", "data"]
    if missing := [f"--{name}" for name in needed if not getattr(cfg, name)]:
        raise ValueError(f"--config {cfg.config} needs {', '.join(missing)}")
