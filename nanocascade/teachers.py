"""The teachers of MOPD: which checkpoint teaches a domain."""

from collections import Counter
from pathlib import Path

from nanocascade.checkpoint.weights import open_model
from nanocascade.data.episode import Rollout
from nanocascade.engine.frozen import FrozenModel
from nanocascade.files import read_json, sha256_of
from nanocascade.tokenizer.tokenizer import Tokenizer


class Teachers:
    """name -> directory, domain -> name (stages.TEACHER_OF); checked before anything is trained.

    Raises ValueError for an unknown teacher's name, a missing directory, or domains nobody teaches.
    """

    def __init__(self, cfg, teacher_of: dict[str, str], dist):
        names = sorted(set(teacher_of.values()))
        paths = {}
        for item in cfg.teachers:
            name, equals, path = item.partition("=")
            if name not in names or not equals or not path:
                raise ValueError(f"--teachers {item}: expected NAME=DIR, NAME one of {names}")
            paths[name] = path
        if not paths:
            raise ValueError(f"--teachers is needed: NAME=DIR, NAME one of {names}")
        taught = {d: name for d, name in teacher_of.items() if name in paths}
        if untaught := set(cfg.domains) - set(taught):
            raise ValueError(f"--domains {sorted(untaught)}: no teacher given for them")
        self.teacher_of = {d: x for d, x in taught.items() if not cfg.domains or d in cfg.domains}
        self.domains = tuple(self.teacher_of)
        self.paths = {}
        for name in sorted(set(self.teacher_of.values())):
            domains = [d for d, x in self.teacher_of.items() if x == name]
            self.paths[name] = best_checkpoint(paths[name].split("+"), domains)
        self.models = {name: FrozenModel(path, dist) for name, path in self.paths.items()}
        known = {x: {"path": path, "sha256": sha256_of(path)} for x, path in self.paths.items()}
        self.manifest = {d: known[x] for d, x in self.teacher_of.items()}

    def check_tokenizer(self, tokenizer) -> None:
        """A teacher must read the very ids the student writes: vocabulary, specials, template."""
        for name, path in self.paths.items():
            open_model(path)  # a damaged directory is refused here, not at its first turn
            if Tokenizer(path).fingerprint() != tokenizer.fingerprint():
                raise ValueError(
                    f"teacher {name} ({path}): its tokenizer, special ids or chat template differ "
                    "from the student's, so its log-probs would be of other tokens"
                )

    def of(self, domain: str) -> str:
        return self.teacher_of[domain]

    def split(self, rollouts: list[Rollout]):
        """(name, rollouts) of every teacher, on all ranks in one order, with none or many."""
        of = [self.of(x.domain) for x in rollouts]
        return [(t, [x for x, y in zip(rollouts, of, strict=True) if y == t]) for t in self.paths]


def best_checkpoint(paths: list[str], domains: list[str]) -> str:
    """The directory with the highest mean score over `domains`, by the manifests' evaluations."""
    if len(paths) == 1:
        return paths[0]
    scores = {}
    for path in paths:
        evaluation = read_json(Path(path) / "manifest.json").get("evaluation", {})
        if missing := [d for d in domains if not evaluation.get(d, {}).get("after")]:
            raise ValueError(f"{path}/manifest.json has no evaluation of {', '.join(missing)}")
        scores[path] = sum(evaluation[d]["after"]["mean"] for d in domains) / len(domains)
    return max(paths, key=lambda x: scores[x])


def token_shares(rollouts: list[Rollout], dist) -> dict[str, float]:
    """mopd/token_share and mopd/prompt_share of each domain: who the gradient listens to."""
    tokens, prompts = Counter(), Counter()
    for part in dist.gather([(x.domain, x.num_loss_tokens) for x in rollouts]):
        for domain, num_tokens in part:
            tokens[domain] += num_tokens
            prompts[domain] += 1
    shares = {f"mopd/token_share/{d}": n / max(tokens.total(), 1) for d, n in tokens.items()}
    return shares | {f"mopd/prompt_share/{d}": n / prompts.total() for d, n in prompts.items()}
