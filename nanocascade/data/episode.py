"""Types of an episode: how it is sampled, and its tokens, log-probs and reward."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from nanocascade.stages import OnPolicy


@dataclass
class Sampling:
    """Settings of sampling. Every log-prob of a stage is of softmax(logits / temperature)."""

    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    max_turns: int = 4  # assistant turns of an episode with tools
    max_rows: int = 512
    thinking: bool = True
    return_experts: bool = False  # routing replay
    max_tokens: int = 0  # limit of prompt plus response (0 = no such limit)

    @classmethod
    def of(cls, recipe: OnPolicy, max_rows: int) -> "Sampling":
        """How a stage samples."""
        return cls(
            recipe.max_new_tokens,
            recipe.temperature,
            recipe.top_p,
            max_turns=recipe.max_turns,
            max_rows=max_rows,
            thinking=recipe.thinking,
            return_experts=recipe.routing_replay,
            max_tokens=recipe.max_tokens,
        )

    def room(self, prompt: int) -> int:
        """Maximum tokens of a response to a prompt of `prompt` tokens."""
        total = self.max_tokens or prompt + self.max_new_tokens
        return min(self.max_new_tokens, total - prompt)

    @property
    def limits(self) -> dict[str, int]:
        """The settings that a score depends on; they are stored with it."""
        return {k: getattr(self, k) for k in ("max_new_tokens", "max_tokens", "max_turns")}


@dataclass
class Document:
    """Tokens to train on, with a loss mask. An SFT conversation needs only these; the other fields
    are set for responses, in Rollout."""

    row: dict  # of the data file
    tokens: list[int]
    prompt_length: int = 0
    mask: list[bool] = field(default_factory=list)
    sampler_logprobs: list[float] = field(default_factory=list)
    experts: Tensor | None = None  # (t, l, a) recorded while sampling
    advantage: float = 0.0
    loss: bool = True  # False: masked (overlong filter, unsolved prompt)
    token_values: dict[str, list[float]] | None = None  # per-token values of the loss, for logging

    @property
    def num_loss_tokens(self) -> int:
        return sum(self.mask) if self.loss else 0


@dataclass
class Rollout(Document):
    """One episode. tokens, mask and sampler_logprobs have one entry a token, prompt included.

    turns: [{"role": "assistant" | "tool", "content": text}, ...], the assistant's also "parsed"
    (rewards.base.read_turn). Advantages are computed from reward; outcome is the raw verdict before
    any shaping.
    """

    turns: list[dict] = field(default_factory=list)
    stop_reason: str = ""
    progress: tuple | None = None  # (number of calls, state) of the row's environment
    reward: float = 0.0
    outcome: float | None = 0.0  # None: no judge, or no stored answer to compare with
    reason: str = ""

    @property
    def domain(self) -> str:
        return self.row["domain"]

    @property
    def response_length(self) -> int:
        return sum(self.mask)

    @property
    def truncated(self) -> bool:
        return self.stop_reason == "length"

    def extend(self, tokens, logprobs=None) -> None:
        """Append sampled tokens with log-probs or, without logprobs, prompt or tool tokens."""
        self.tokens += tokens
        self.mask += [logprobs is not None] * len(tokens)
        self.sampler_logprobs += [0.0] * len(tokens) if logprobs is None else logprobs

    def remember(self, experts: Tensor | None) -> None:
        """Store the experts (t, l, a) of a turn. Earlier turns keep those of their own sampling."""
        if self.experts is not None:
            experts = torch.cat([self.experts, experts[len(self.experts) :]])
        self.experts = experts
