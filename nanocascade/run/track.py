"""Trackers: copies of the log for TensorBoard and Weights & Biases. Both packages are optional."""

import importlib.util
import json
import uuid
from pathlib import Path
from textwrap import indent

CODE = "    "  # before each line, Markdown shows a text as it is


def check_trackers(names: tuple[str, ...]) -> None:
    """Raise ValueError for a tracker whose package is not installed."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise ValueError(f"--track {name} needs a package: pip install {name}")


class Trackers:
    """The trackers of a run. One that fails is switched off with a warning; the run goes on.

    names: --track. first: first step of a resumed run. config: the run's flags.
    """

    def __init__(self, names, out: Path, stage: str, config: dict, first: int):
        self.active: dict[str, TensorBoard | WandB] = {}
        for name in names:
            kind = {"tensorboard": TensorBoard, "wandb": WandB}[name]
            if tracker := self.attempt(name, kind, out, stage, config, first):
                self.active[name] = tracker

    def call(self, method: str, *args) -> None:
        """Call `step` or `finish` of every tracker."""
        for name, tracker in list(self.active.items()):
            self.attempt(name, getattr(tracker, method), *args)

    def attempt(self, name: str, function, *args):
        try:
            return function(*args)
        except Exception as error:  # a tracker may raise anything, and none of it ends a run
            self.active.pop(name, None)
            print(f"warning: --track {name} is off from here on: {' '.join(repr(error).split())}")


class TensorBoard:
    """Event files in `tensorboard/` of the run's directory."""

    def __init__(self, out: Path, stage: str, config: dict, first: int):
        from torch.utils.tensorboard import SummaryWriter

        # Steps that will run again are hidden; a first run has none.
        self.writer = SummaryWriter(out / "tensorboard", purge_step=first or None)
        self.writer.add_text(
            "config", indent(json.dumps({"stage": stage} | config, indent=2), CODE)
        )

    def step(self, step: int, values: dict, records: list[dict]) -> None:
        for name, x in scalars(values).items():
            self.writer.add_scalar(name, x, step)
        for domain, x in {record["domain"]: record for record in reversed(records)}.items():
            verdict = f"reward {x['reward']} ({x['reason']}), advantage {x['advantage']:+.3f}"
            text = f"{verdict}\n\n{x['prompt']}{x['response']}"
            self.writer.add_text(f"rollouts/{domain}", indent(text, CODE), step)
        self.writer.flush()

    def finish(self, manifest: dict) -> None:
        self.writer.add_text("manifest", indent(json.dumps(manifest, indent=2), CODE))
        self.writer.close()


class WandB:
    """A Weights & Biases run; WANDB_MODE=offline keeps it on the disk, below the run's directory.

    A resumed run continues the tracker's run whose id is in wandb_id.txt.
    """

    def __init__(self, out: Path, stage: str, config: dict, first: int):
        import wandb

        note = out / "wandb_id.txt"
        if not first or not note.exists():
            note.write_text(uuid.uuid4().hex[:12])
        options = {"project": "nanocascade", "name": f"{stage} {out.name}", "resume": "allow"}
        self.run = wandb.init(id=note.read_text(), dir=str(out), config=config, **options)
        self.table = wandb.Table

    def step(self, step: int, values: dict, records: list[dict]) -> None:
        columns = ["step", "domain", "prompt", "response", "reward", "reason", "advantage"]
        rows = [[record[name] for name in columns] for record in records]
        logged = scalars(values)
        if rows:
            logged["rollouts"] = self.table(columns=columns, data=rows)
        self.run.log(logged, step=step)

    def finish(self, manifest: dict) -> None:
        self.run.summary["manifest"] = manifest
        self.run.finish()


def scalars(values: dict) -> dict[str, float]:
    """Metrics of a step as single numbers: {"m": [1.0, 2.0]} -> {"m/0": 1.0, "m/1": 2.0}."""
    flat = {}
    for name, x in values.items():
        flat |= {f"{name}/{i}": y for i, y in enumerate(x)} if isinstance(x, list) else {name: x}
    return flat
