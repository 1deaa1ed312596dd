"""The order in which prompts are drawn: endless, deterministic, by share of each domain."""

import random
from collections import defaultdict
from functools import lru_cache


@lru_cache(16)
def shuffled(num: int, seed: str) -> list[int]:
    order = list(range(num))
    random.Random(seed).shuffle(order)
    return order


class PromptStream:
    """An endless, deterministic order of prompts: a new shuffle of the rows every epoch.

    weights: {domain: share} (multi-domain RL: 55/30/15). Every batch has these shares, rounded by
    largest remainder; the next batch makes up for the rounding. Each domain has its own epochs.
    """

    def __init__(self, rows: list[dict], seed: int, weights: dict[str, float] | None = None):
        self.rows, self.seed = rows, seed
        self.members = defaultdict(list)  # domain -> indices of its rows
        for i, row in enumerate(rows):
            self.members[row["domain"] if weights else "all"].append(i)
        weights = weights or {"all": 1.0}
        if not weights.keys() <= self.members.keys() or min(weights.values()) <= 0:
            raise ValueError(f"{len(rows)} rows of {[*self.members]} cannot be drawn by {weights}")
        self.shares = {domain: x / sum(weights.values()) for domain, x in weights.items()}
        self.taken = dict.fromkeys(weights, 0)

    def take(self, n: int) -> list[tuple[int, dict]]:
        """The next n of (position in the stream, row)."""
        drawn, end = [], sum(self.taken.values()) + n
        for position in range(end - n, end):
            domain = max(self.shares, key=lambda x: self.shares[x] * end - self.taken[x])
            members = self.members[domain]
            epoch, place = divmod(self.taken[domain], len(members))
            order = shuffled(len(members), f"{self.seed} {domain} {epoch}")
            drawn.append((position, self.rows[members[order[place]]]))
            self.taken[domain] += 1
        return drawn

    def state(self) -> dict:
        return {"taken": dict(self.taken), "rows": len(self.rows), "seed": self.seed}

    def load_state(self, state: dict) -> None:
        if state | {"taken": set(state["taken"])} != self.state() | {"taken": set(self.taken)}:
            raise ValueError(f"the checkpoint is of other data: {state}, expected {self.state()}")
        self.taken = dict(state["taken"])
