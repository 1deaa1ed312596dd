"""The cascade as data: the settings of every stage, the report's and the toy's side by side.

    base -> SFT -> IF-RL -> multi-domain RL -> MOPD -> RLHF -> long-context RL -> code RL -> SWE RL

First the numbers of each stage, then the meaning of each setting: a field of `SFT`, `RL` or `MOPD`
is a flag of that script. Sources are the sections of the Nemotron-Cascade 2 report; where it prints
two values, ours is named beside it.
"""

from dataclasses import dataclass
from typing import Annotated, Literal

from nanocascade.cli import Count, NonNegative, Positive, Share

THOUSAND = 1024  # the report's 49K is 49,152 tokens

# (report, toy), or one value for both. The toy has 1M parameters and minutes. A third value is that
# of --config small; where there is none it takes the report's. A stage lists what differs from
# RL_COMMON and from the defaults of its class below.
# OURS: no warm-up in RL, except in agentic SWE; the report does not say (Nano: 10 steps from 3e-7).
RL_COMMON = dict(prompts=(128, 48), rollouts=(16, 8))

RL_STAGES = {
    "if_rl": dict(  # dynamic filtering, overlong penalty, thinking mode only
        domains={"if": 1.0},
        max_new_tokens=(48 * THOUSAND, 40),
        lr=(3e-6, 4e-4),
        steps=(180, 25),
        dynamic_filtering=True,
    ),
    "multi_domain_rl": dict(  # 55 % multiple choice, 30 % tool calls, 15 % structured output
        domains={"mcqa": 0.55, "tools": 0.30, "structured": 0.15},
        max_new_tokens=(48 * THOUSAND, 72),
        lr=(3e-6, 4e-4),
        steps=(70, 40),
        overlong="filter",
        max_turns=(16, 4),
    ),
    # OURS: RLHF 25 steps (the text says about 30) and no overlong filter (the table says yes).
    "rlhf": dict(
        domains={"preference": 1.0},
        prompts=(128, 24),
        max_new_tokens=(16 * THOUSAND, 48),
        lr=(3e-6, 3e-4),
        steps=(25, 25),
        kl_coef=0.03,
    ),
    # OURS: no overlong filter in long-context RL (the table says yes). Long questions only.
    "long_context_rl": dict(
        domains={"long_context": 1.0},
        prompts=(128, 16),
        lr=(3e-6, 2e-4),
        max_new_tokens=(48 * THOUSAND, 24),
        max_tokens=(48 * THOUSAND, 0),
        steps=(30, 25),
    ),
    # OURS: code problems that the stage's own start always solves are dropped.
    # The report asks a strong model. Strict binary reward.
    # OURS: with top-p 0.95 the loss still scores the full distribution, a bias towards the nucleus.
    "code_rl": dict(
        domains={"code": 1.0},
        max_new_tokens=(116 * THOUSAND, 40),
        lr=(3e-6, 1.5e-4),
        steps=(22, 15),
        top_p=(0.95, 1.0),
        overlong="filter",
        max_pass_rate=0.99,
        pass_samples=(8, 4),
    ),
    "swe_rl": dict(  # agentless repair; a prompt none of whose rollouts exceeds 0.5 is masked
        domains={"swe": 1.0},
        max_new_tokens=(96 * THOUSAND, 40),
        max_tokens=(96 * THOUSAND, 0),
        lr=(3e-6, 2e-4),
        steps=(45, 20),
        mask_unsolved=0.5,
    ),
    # Episodes in a repository (environments/), its tests the reward; off the toy's cascade. What
    # is solved 16 of 16 times is removed, what never is kept with probability 0.1.
    # OURS: of the report's 256K tokens of context 16K are the prompt's; 40 steps (it does not say).
    # OURS: non-thinking, as agentic SWE's SFT data and evaluation are; RL's mode is not said.
    "swe_agentic_rl": dict(
        domains={"swe_agentic": 1.0},
        prompts=(16, 16),
        rollouts=(64, 8),
        max_new_tokens=(240 * THOUSAND, 200),
        lr=(3e-6, 1e-4),
        steps=(40, 15),
        warmup=(10, 2),
        schedule="linear",
        temperature=(0.8, 1.0),
        thinking=False,
        max_turns=(200, 4),
        max_pass_rate=(0.99, 1.0),
        keep_unsolved=(0.1, 1.0),
        pass_samples=16,
    ),
    "math_rl": dict(  # off the cascade: the report's comparison of GRPO with MOPD on mathematics
        domains={"math": 1.0},
        max_new_tokens=(48 * THOUSAND, 40),
        lr=(3e-6, 4e-4),
        steps=(25, 30),
    ),
}

SFT_STAGE = dict(
    steps=(33000, 800, 200),  # the report stops before the end of its cosine
    schedule_steps=(40000, 800, 200),
    batch_tokens=(64 * 256 * THOUSAND, 4096, 16384),
    row_tokens=(256 * THOUSAND, 256, 2048),
    micro_tokens=(8192, 8192, 4096),
    lr=(5e-5, 3e-3, 2e-5),
    min_lr=(5e-6, 3e-4, 2e-6),
    warmup=(200, 20, 10),
    schedule="cosine",
    betas=((0.9, 0.98), (0.9, 0.95), (0.9, 0.98)),
    weight_decay=0.1,
    toy_rows=8000,
    save_every=(10, 50, 10),
)

# Steps and rate of NeMo-RL, mopd-cascade. The report: 52 and 3e-6 (table), 40-50 and 2e-6 (text).
# The toy's rate falls to 0: at a constant one Adam's noise costs mathematics (LOG.md).
MOPD_STAGE = dict(
    steps=(52, 50),
    prompts=(128, 768, 32),
    rollouts=(4, 1),  # 512 x 1 is as good and steadier
    lr=(2e-6, 8e-4, 1e-6),
    warmup=(30, 8),  # the first gradients are large
    warmup_from=(2e-7, 8e-5, 1e-7),
    schedule=("constant", "linear"),
    max_new_tokens=(96 * THOUSAND, 72, 512),
    max_turns=(16, 4),
    gate_low=0.5,
    toy_rows=4000,
)

# Values of all RL stages with --config small.
SMALL_RL = dict(prompts=16, rollouts=8, max_new_tokens=512, lr=1e-6, steps=100)

# Layout of the 30B-A3B on a cluster, in every stage; --dry_run prints its memory and time.
FULL_LAYOUT = dict(
    shard=True,
    expert_parallel=8,
    dtype="bfloat16",
    checkpoint_blocks=True,
    offload_optimizer=True,
    micro_tokens=49152,
    max_rows=112,
)

# Values that --config sets in every stage.
CONFIGS = {
    "toy": dict(data=("toy",), eval_data=("toy",)),
    "small": dict(eval_max_new_tokens=512),
    "full": FULL_LAYOUT | dict(eval_max_new_tokens=48 * THOUSAND),
}

# Every domain that a stage trains.
DOMAINS = tuple(dict.fromkeys(d for stage in RL_STAGES.values() for d in stage["domains"]))

# The report's teachers: domain -> group of domains that share one (Nemotron-Cascade 2, MOPD).
TEACHER_OF = {
    "math": "math",
    "if": "multi_domain",
    "mcqa": "multi_domain",
    "tools": "multi_domain",
    "structured": "multi_domain",
    "preference": "preference",
}

# How many prompts of each domain MOPD draws (Nemotron-Cascade 2, MOPD: the rows it released).
# OURS: preference prompts come from a second file whose share is not said; here they are a tenth.
# OURS: the toy also draws the domains that no teacher of the report is for, if --teachers has a
# default=DIR for them; each is then a twentieth of the prompts.
MOPD_SHARES = {
    "math": 1853,
    "if": 1854,
    "mcqa": 927,
    "tools": 610,
    "structured": 927,
    "preference": 686,
    "long_context": 400,
    "code": 400,
    "swe": 400,
}

# The order of the toy's run and of the report's pages: (directory, stage, starts from).
CASCADE = (
    ("sft", "sft", None),
    ("if_rl", "if_rl", "sft"),
    ("multi_domain_rl", "multi_domain_rl", "if_rl"),
    # OURS: the side branch takes RLHF's 25 steps; the report says that it is short.
    ("rlhf_side", "rlhf", "sft"),  # the preference teacher
    ("mopd", "mopd", "multi_domain_rl"),
    ("rlhf", "rlhf", "mopd"),
    ("long_context_rl", "long_context_rl", "rlhf"),
    ("code_rl", "code_rl", "long_context_rl"),
    ("swe_rl", "swe_rl", "code_rl"),
)


def preset(stage: str, config: str) -> dict:
    """{field: value} that a stage has in a --config: toy, small or full."""
    if stage in RL_STAGES:
        given = RL_COMMON | RL_STAGES[stage] | (SMALL_RL if config == "small" else {})
    else:
        given = {"sft": SFT_STAGE, "mopd": MOPD_STAGE}[stage]
    column = ("full", "toy", "small").index(config)
    values = {
        name: x[column if column < len(x) else 0] if isinstance(x, tuple) else x
        for name, x in given.items()
        if name != "domains"
    }
    return values | CONFIGS[config]


@dataclass(kw_only=True)
class Stage:
    """Settings of every stage: steps, learning rate and optimizer."""

    # ---- Recipe ----
    steps: Positive  # optimizer steps
    lr: NonNegative  # peak learning rate
    min_lr: NonNegative = 0.0  # learning rate that a linear or cosine schedule falls to
    warmup: Count = 0  # steps of linear warm-up
    warmup_from: NonNegative = 0.0  # learning rate that the warm-up starts from
    schedule: Literal["constant", "linear", "cosine"] = "constant"  # learning rate after warm-up
    lora_rank: Count = 0  # rank of LoRA adapters on frozen weights (0 = train all weights)
    schedule_steps: Count = 0  # step at which the rate is at --min_lr (0 = one after the last)
    # ---- Advanced ----
    # OURS: AdamW in every stage; two rows of the report's table say Adam, equal without decay.
    betas: tuple[Share, Share] = (0.9, 0.95)  # AdamW's decay rates of its two moments
    weight_decay: NonNegative = 0.0  # AdamW's weight decay, of matrices only
    max_norm: NonNegative = 1.0  # clip the gradients to this global norm
    bias_rate: NonNegative = 1e-3  # step of the experts' correction bias after an update (0 = off)


@dataclass(kw_only=True)
class SFT(Stage):
    """Settings of train_sft.py."""

    # ---- Recipe ----
    stage = "sft"
    batch_tokens: Positive  # tokens a step, over all ranks
    row_tokens: Positive  # maximum tokens of a conversation, up to its last answer
    # OURS: no thought is cut short (the Nano recipe does so to 3 % of them, for budget control).
    strip_thinking: Share = 0.1  # share of conversations shown without their thought
    reference_samples: Positive = 2000  # stored answers to preference questions (toy)


@dataclass(kw_only=True)
class OnPolicy(Stage):
    """Settings of the stages whose responses the trained model samples itself."""

    # ---- Recipe ----
    prompts: Positive  # prompts a step, over all ranks
    rollouts: Positive  # responses a prompt
    domains: tuple[str, ...] = ()  # domains to train; RL: in equal shares (default: the stage's)
    thinking: bool = True  # open responses with a thought, in training and evaluation
    max_new_tokens: Positive  # maximum tokens of a response; with tools, of the whole episode
    max_tokens: Count = 0  # maximum tokens of prompt plus response (0 = no limit)
    max_turns: Positive = 1  # maximum assistant turns of an episode with tools
    temperature: Annotated[float, 1e-3] = 1.0  # of sampling; log-probs are of logits / temperature
    top_p: Annotated[float, 1e-3, 1] = 1.0  # nucleus of sampling; the loss ignores the cut
    # ---- Advanced ----
    # OURS: no gate in RL unless asked for (the Nano recipe masks tokens; Eq. 1 has no ratio).
    gate_low: NonNegative = 0.0  # smallest train/sampler ratio (0: in RL no gate, in MOPD no bound)
    gate_high: NonNegative = 2.0  # largest train/sampler ratio in the band
    max_sequence_error: NonNegative = 0.0  # mask responses of a larger mean exp|train - sampler|
    routing_replay: bool = False  # train with the experts that were chosen while sampling
    train_router: bool = False  # train router weights too (the recipe freezes them)

    def __post_init__(self):
        if self.gate_low >= self.gate_high:
            raise ValueError(f"--gate_low {self.gate_low}: expected less than --gate_high")


@dataclass(kw_only=True)
class RL(OnPolicy):
    """Settings of train_rl.py."""

    # ---- Recipe ----
    stage: Literal[tuple(RL_STAGES)] = "math_rl"  # the stage to train, a row of stages.py
    rollouts: Annotated[int, 2]  # responses a prompt; one alone has no advantage
    overlong: Literal["penalty", "filter"] = "penalty"  # responses cut off: reward 0, or no loss
    dynamic_filtering: bool = False  # replace groups whose outcomes are all equal
    mask_unsolved: float = -1.0  # mask prompts whose best outcome is at most this (-1 = off)
    max_pass_rate: Share = 1.0  # drop prompts that the initial model solves more often
    keep_unsolved: Share = 1.0  # share kept of the prompts that the initial model never solves
    pass_samples: Positive = 4  # responses to measure the pass rate of rows without pass_rate
    kl_coef: NonNegative = 0.0  # weight of the KL (k3) to the initial model
    pairing: Literal["all", "circle"] = "all"  # compare preference answers: all pairs, or a circle
    # ---- Advanced ----
    normalize_std: bool = True  # divide advantages by the group's standard deviation


@dataclass(kw_only=True)
class MOPD(OnPolicy):
    """Settings of train_mopd.py."""

    # ---- Recipe ----
    stage = "mopd"
    teachers: tuple[str, ...] = ()  # NAME=DIR; NAME: a domain, a group of stages.py, or default
    balance: bool = False  # draw equally many prompts of every domain, however many rows it has
    denominator: Literal["response", "token"] = "response"  # mean over: Eq. 4, or NeMo-RL
    overlong: Literal["off", "filter"] = "off"  # responses cut off: in the loss, or masked
    gate: Literal["zero", "clamp", "none"] = "zero"  # tokens outside the band (zero: the report)
