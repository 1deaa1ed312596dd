"""The order that prompts are drawn in: endless, deterministic, by share and curriculum."""

import math
import random
from collections import Counter, defaultdict
from functools import lru_cache


@lru_cache(16)
def shuffled(num: int, seed: str) -> list[int]:
    order = list(range(num))
    random.Random(seed).shuffle(order)
    return order


class PromptStream:
    """An endless, deterministic order of prompts: a new shuffle of the rows every epoch.

    weights: {domain: share} (multi-domain RL: 55/30/15) holds in every batch by largest remainder,
    and what rounding took from a domain comes back in the next; each domain has its own epochs.

    curriculum (first mean, last mean, std): instead of epochs, draws whose `pass_rate` is Gaussian,
    around a mean that moves with `progress` from 0 to 1.
    """

    def __init__(
        self,
        rows: list[dict],
        seed: int,
        weights: dict[str, float] | None = None,
        curriculum: tuple[float, ...] = (),
    ):
        self.rows, self.seed, self.curriculum, self.progress = rows, seed, curriculum, 0.0
        if curriculum and (len(curriculum) != 3 or curriculum[2] <= 0):
            raise ValueError(f"--curriculum {curriculum}: expected first mean, last mean, std")
        if curriculum and (lacking := [x for x in rows if "pass_rate" not in x]):
            raise ValueError(
                f"--curriculum: row {lacking[0]['id']} has no pass_rate, as"
                " sample.py --tasks ROWS --pass_rates OUT writes it"
            )
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
        drawn, end, chances = [], sum(self.taken.values()) + n, {}
        if self.curriculum:
            first, last, std = self.curriculum
            mean = first + (last - first) * self.progress
            chances = {
                domain: curriculum_weights([self.rows[i]["pass_rate"] for i in x], mean, std)
                for domain, x in self.members.items()
            }
        for position in range(end - n, end):
            domain = max(self.shares, key=lambda x: self.shares[x] * end - self.taken[x])
            members = self.members[domain]
            epoch, place = divmod(self.taken[domain], len(members))
            if chances:
                draw = random.Random(f"{self.seed} {domain} {self.taken[domain]}")
                chosen = draw.choices(members, chances[domain])[0]
            else:
                chosen = members[shuffled(len(members), f"{self.seed} {domain} {epoch}")[place]]
            drawn.append((position, self.rows[chosen]))
            self.taken[domain] += 1
        return drawn

    def state(self) -> dict:
        return {"taken": dict(self.taken), "rows": len(self.rows), "seed": self.seed}

    def load_state(self, state: dict) -> None:
        if state | {"taken": set(state["taken"])} != self.state() | {"taken": set(self.taken)}:
            raise ValueError(f"the run drew from other data: {state}, these are {self.state()}")
        self.taken = dict(state["taken"])


def curriculum_weights(pass_rates: list[float], mean: float, std: float) -> list[float]:
    """Probabilities of rows whose draws have Gaussian pass rates (Nemotron 3 Nano's curriculum).

    Rows of one rate share the Gaussian's value there: [1, 1, 0], 0.5, 1 -> [0.25, 0.25, 0.5].
    """
    alike = Counter(pass_rates)
    logs = {rate: -0.5 * ((rate - mean) / std) ** 2 for rate in alike}
    largest = max(logs.values())  # taken off, so that a mean far from every rate still works
    values = {rate: math.exp(log - largest) for rate, log in logs.items()}
    total = sum(values.values())
    return [values[rate] / total / alike[rate] for rate in pass_rates]
