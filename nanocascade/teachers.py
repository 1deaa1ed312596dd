"""The teachers of MOPD: the checkpoint that teaches each domain."""

import os
from collections import Counter
from pathlib import Path

from nanocascade.checkpoint.weights import open_model
from nanocascade.data.episode import Rollout
from nanocascade.engine.frozen import FrozenModel
from nanocascade.files import read_json, sha256_of
from nanocascade.model.model import Model
from nanocascade.stages import DOMAINS, TEACHER_OF
from nanocascade.tokenizer.tokenizer import Tokenizer

DEFAULT = "default"  # name of the teacher of all domains without one of their own


def read_teachers(items: tuple[str, ...]) -> dict[str, str]:
    """--teachers: ("math=sft", "default=start") -> {"math": "sft", "default": "start"}.

    NAME is a domain, a group of domains of TEACHER_OF, or DEFAULT.
    """
    known = sorted({*DOMAINS, *TEACHER_OF.values()}) + [DEFAULT]
    paths = {}
    for item in items:
        name, _, path = item.partition("=")
        if name not in known or not path or name in paths:
            raise ValueError(f"--teachers {item}: expected NAME=DIR once, NAME one of {known}")
        paths[name] = path
    if not paths:
        raise ValueError(f"--teachers is needed: NAME=DIR, NAME one of {known}")
    return paths


def assign_teachers(names, domains) -> dict[str, str]:
    """{domain: teacher}: the one named after the domain, else after its group, else the default.

    {"math", "default"}, ("math", "code") -> {"math": "math", "code": "default"}. Domains without
    any of the three are left out.
    """
    choices = {domain: (domain, TEACHER_OF.get(domain), DEFAULT) for domain in domains}
    found = {d: [x for x in choice if x in names] for d, choice in choices.items()}
    return {domain: x[0] for domain, x in found.items() if x}


class Teachers:
    """The teacher of each domain, checked before anything is trained.

    items: --teachers. wanted: --domains, all that have a teacher if empty. drawn: the domains that
    prompts may come from. If a teacher's directory is the student's start, it keeps its domains
    from drifting (self-anchor). Teachers of one directory share one frozen copy.

    Raises ValueError for an unknown name, a missing directory, or wanted domains without a teacher.
    A teacher for whose domains there are no prompts is named and left out.
    """

    def __init__(self, items: tuple[str, ...], wanted: tuple[str, ...], drawn, dist):
        given = read_teachers(items)
        for item in items:
            for path in item.partition("=")[2].split("+"):
                if not Path(path).is_dir():
                    raise ValueError(f"--teachers {item}: no directory {path}")
        taught = assign_teachers(given, drawn)
        if untaught := set(wanted) - set(taught):
            raise ValueError(f"--domains {sorted(untaught)}: no teacher given for them")
        self.teacher_of = {d: x for d, x in taught.items() if not wanted or d in wanted}
        self.domains = tuple(self.teacher_of)
        if (idle := set(given) - set(self.teacher_of.values())) and dist.is_main:
            print("teachers without prompts of their domains, not used:", ", ".join(sorted(idle)))
        self.paths = {}
        for name in sorted(set(self.teacher_of.values())):
            domains = [d for d, x in self.teacher_of.items() if x == name]
            self.paths[name] = best_checkpoint(given[name].split("+"), domains)
        copies = {os.path.realpath(x): FrozenModel(x, dist) for x in self.paths.values()}
        self.models = {name: copies[os.path.realpath(x)] for name, x in self.paths.items()}
        known = {x: {"path": path, "sha256": sha256_of(path)} for x, path in self.paths.items()}
        self.manifest = {d: known[x] for d, x in self.teacher_of.items()}

    def share_base(self, model: Model, base: Path, rank: int) -> None:
        """Teachers that are LoRA adapters of the student's base need no second copy of it."""
        for teacher in self.models.values():
            teacher.share_base(model, base, rank)

    def check_tokenizer(self, tokenizer, vocab_size: int) -> None:
        """Raise ValueError unless every teacher has the student's vocabulary, specials, template.

        vocab_size: of the student's model, which may sample any of so many ids.
        """
        for name, path in self.paths.items():
            model, *_ = open_model(path)  # a damaged directory is refused here
            if model.config.vocab_size < vocab_size:
                raise ValueError(
                    f"teacher {name} ({path}): its vocab_size {model.config.vocab_size} is less"
                    f" than the student's {vocab_size}, of which any id may be sampled"
                )
            if Tokenizer(path).fingerprint() != tokenizer.fingerprint():
                raise ValueError(
                    f"teacher {name} ({path}): its tokenizer, special ids or chat template differ "
                    "from the student's, so its log-probs would be of other tokens"
                )

    def split(self, rollouts: list[Rollout]):
        """(teacher, its rollouts) of every teacher, on all ranks in one order, some without any."""
        taught = {name: [] for name in self.paths}
        for x in rollouts:
            taught[self.teacher_of[x.domain]].append(x)
        return taught.items()


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
    """Metrics mopd/token_share and mopd/prompt_share: each domain's share of the loss."""
    tokens, prompts = Counter(), Counter()
    for part in dist.gather([(x.domain, x.num_loss_tokens) for x in rollouts]):
        for domain, num_tokens in part:
            tokens[domain] += num_tokens
            prompts[domain] += 1
    shares = {f"mopd/token_share/{d}": n / max(tokens.total(), 1) for d, n in tokens.items()}
    return shares | {f"mopd/prompt_share/{d}": n / prompts.total() for d, n in prompts.items()}
