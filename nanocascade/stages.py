"""The cascade as data: one row a stage, the report's value and the toy's side by side.

    base -> SFT -> IF-RL -> multi-domain RL -> MOPD -> RLHF -> long-context RL -> code RL -> SWE RL

A pair (report, toy) is read by `settings`; a single value serves both. Sources are the sections of
the Nemotron-Cascade 2 report; where it prints two values, ours is named beside it.
"""

from dataclasses import dataclass, fields

THOUSAND = 1024  # the report's 49K is 49,152 tokens


@dataclass(frozen=True)
class Stage:
    """Settings of one RL stage. Those of SFT and MOPD stand at the top of their scripts."""

    domains: dict[str, float]  # share of each domain in a batch of prompts
    prompts: int  # a step
    rollouts: int  # a prompt: the report's G
    max_new_tokens: int  # of a response; with tools, of the whole episode
    lr: float
    steps: int
    min_lr: float = 0.0  # what a linear schedule falls towards, and would reach after the last step
    warmup: int = 0  # steps of linear warm-up
    schedule: str = "constant"
    temperature: float = 1.0
    top_p: float = 1.0
    overlong: str = "penalty"  # cut off at the limit: penalty = reward 0, filter = no loss
    dynamic_filtering: bool = False  # replace groups that are all right or all wrong
    mask_unsolved: float = -1.0  # mask prompts none of whose outcomes exceeds this
    max_pass_rate: float = 1.0  # before training, drop prompts solved more often than this
    keep_unsolved: float = 1.0  # and keep this share of those never solved
    pass_samples: int = 4  # tries a prompt that tell how often it is solved
    kl_coef: float = 0.0  # k3 against the start of the stage
    pairing: str = "all"  # preference: all pairs, or the circle of the Nano recipe
    thinking: bool = True  # responses open with a thought
    max_turns: int = 1  # assistant turns of an episode
    max_tokens: int = 0  # of prompt and response together, where the report limits their sum


# (report, toy). Toy learning rates are for a model of 1M parameters; steps are for minutes.
# OURS: no warm-up in RL, except in agentic SWE; the report does not say (Nano: 10 steps from 3e-7).
RL_STAGES = {
    "if_rl": dict(  # dynamic filtering, overlong penalty, thinking mode only
        domains={"if": 1.0},
        prompts=(128, 48),
        rollouts=(16, 8),
        max_new_tokens=(48 * THOUSAND, 40),
        lr=(3e-6, 4e-4),
        steps=(180, 25),
        dynamic_filtering=True,
    ),
    "multi_domain_rl": dict(  # 55 % multiple choice, 30 % tool calls, 15 % structured output
        domains={"mcqa": 0.55, "tools": 0.30, "structured": 0.15},
        prompts=(128, 48),
        rollouts=(16, 8),
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
        rollouts=(16, 8),
        max_new_tokens=(16 * THOUSAND, 48),
        lr=(3e-6, 3e-4),
        steps=(25, 25),
        kl_coef=0.03,
    ),
    # OURS: no overlong filter in long-context RL (the table says yes). Long questions only.
    "long_context_rl": dict(
        domains={"long_context": 1.0},
        prompts=(128, 16),
        rollouts=(16, 8),
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
        prompts=(128, 48),
        rollouts=(16, 8),
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
        prompts=(128, 48),
        rollouts=(16, 8),
        max_new_tokens=(96 * THOUSAND, 40),
        max_tokens=(96 * THOUSAND, 0),
        lr=(3e-6, 2e-4),
        steps=(45, 20),
        mask_unsolved=0.5,
    ),
    # Episodes in a repository (environments.py), its tests the reward; off the toy's cascade. What
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
        prompts=(128, 48),
        rollouts=(16, 8),
        max_new_tokens=(48 * THOUSAND, 40),
        lr=(3e-6, 4e-4),
        steps=(25, 30),
    ),
}

# How the 30B-A3B lies on a cluster, whatever the stage; --dry_run says what it holds and takes.
FULL_LAYOUT = dict(
    shard=True,
    expert_parallel=8,
    dtype="bfloat16",
    checkpoint_blocks=True,
    offload_optimizer=True,
    micro_tokens=49152,
    max_rows=112,
)

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


def settings(stage: str, toy: bool) -> Stage:
    """The Stage of a name, with the report's numbers or the toy's; ValueError for another name."""
    if stage not in RL_STAGES:
        raise ValueError(f"unknown stage {stage!r}: expected {', '.join(RL_STAGES)}")
    values = RL_STAGES[stage]
    return Stage(**{k: v[toy] if isinstance(v, tuple) else v for k, v in values.items()})


def apply_stage(cfg, stage: Stage) -> None:
    """Fill the fields of a script's config that were left at None with the stage's values."""
    for field in fields(Stage):
        if hasattr(cfg, field.name) and getattr(cfg, field.name) is None:
            setattr(cfg, field.name, getattr(stage, field.name))
