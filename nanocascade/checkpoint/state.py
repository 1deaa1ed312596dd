"""Files that survive a kill: JSON, tensors, the state from which a run goes on bit for bit.

Everything is written under another name, forced to the disk and renamed: what has its final name is
whole. No pickle: safetensors and JSON.
"""

import json
import os
import shutil
import warnings
from pathlib import Path

import torch
import torch.distributed as torch_dist
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException

from nanocascade.files import read_json, sync, write_json_atomic

warnings.filterwarnings("ignore", "torch.distributed is disabled")  # so it is at one rank


def check_out_dir(out, resume: bool, identity: dict) -> bool:
    """Before any training: may this run write to `out`, and does it go on from a state there?

    identity: what must be equal for a resumed run to mean anything: stage, data, seed, parent.
    """
    out, identity = Path(out), json.loads(json.dumps(identity))  # as the file gives it back
    note, states = out / "state" / "run.json", state_dirs(out)
    if (out / "manifest.json").exists():
        raise ValueError(f"--out {out} holds a finished run: choose another or delete it")
    if states:
        saved = read_json(note)
        differ = [
            f"{key} was {saved.get(key)!r} and is {identity.get(key)!r}"
            for key in saved | identity
            if saved.get(key) != identity.get(key)
        ]
        if differ:
            raise ValueError(f"--out {out} holds another run: {'; '.join(differ)}")
        if not resume:
            raise ValueError(f"--out {out} holds this run, unfinished: go on with --resume")
    elif any(out.glob("*.safetensors")):
        raise ValueError(f"--out {out} holds a model that is not of this run: choose another")
    try:
        note.parent.mkdir(parents=True, exist_ok=True)
        write_json_atomic(note, identity)
    except OSError as error:
        raise ValueError(f"--out {out} cannot be written: {error.strerror}") from None
    return bool(states)


def save_state(out, *, model: nn.Module, optimizer, extra: dict) -> None:
    """Save weights, optimizer state and `extra` (JSON) of a run in a new numbered directory.

    All ranks call it, each writes its shards. The directory gets its number when it is complete, by
    one rename, and only then its predecessor goes: killed at any instant, the highest number is a
    whole state, from which any number of ranks can go on.
    """
    several = torch_dist.is_initialized()
    main, new = not several or torch_dist.get_rank() == 0, Path(out) / "state" / ".saving"
    if main:
        shutil.rmtree(new, ignore_errors=True)  # left by a killed save
        new.mkdir(parents=True)
    if several:
        torch_dist.barrier()
    moments = {
        f"optimizer.{name}.{key}": x
        for name, p in model.named_parameters()
        for key, x in optimizer.state.get(p, {}).items()
    }
    writer = dcp.HuggingFaceStorageWriter(new, save_distributed=True)
    try:
        tensors = {key: x.contiguous() for key, x in (weights_of(model) | moments).items()}
        dcp.save(tensors, storage_writer=writer, no_dist=not several)
    except CheckpointException as error:
        shutil.rmtree(new, ignore_errors=True)
        causes = "; ".join(str(cause) for cause, _ in error.failures.values())
        raise OSError(f"cannot write {new}: {causes}") from None
    if not main:  # the save above ends when everyone's part is written
        return
    write_json_atomic(new / "state.json", extra)
    old = state_dirs(out)
    os.rename(new, new.with_name(str(int(old[-1].name) + 1 if old else 0)))
    for done in old:
        shutil.rmtree(done)


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """Buffers and trained parameters: a frozen one is as --init has it. A tied head is stored under
    the embedding's name alone, as named_parameters shows it."""
    trained = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    return {f"model.{name}": x for name, x in (trained | dict(model.named_buffers())).items()}


def load_state(out, model: nn.Module, optimizer) -> dict | None:
    """Put the newest state into model and optimizer and return its `extra`; None without any.

    Each rank reads what its own shards need, however many ranks wrote them.
    """
    if not state_dirs(out):
        return None
    last, home = state_dirs(out)[-1], getattr(optimizer, "home", None)
    tensors, moments = weights_of(model), {}
    try:
        reader = dcp.HuggingFaceStorageReader(last)
        known = reader.read_metadata().state_dict_metadata
        for name, p in model.named_parameters():
            for key in ("step", "exp_avg", "exp_avg_sq"):  # AdamW's, but for a frozen parameter
                if (full := f"optimizer.{name}.{key}") in known:
                    like = p.new_zeros(()) if key == "step" else torch.zeros_like(p)
                    tensors[full] = like.detach().to(home or p.device)
                    moments.setdefault(p, {})[key] = tensors[full]
        if tensors.keys() != known.keys():
            raise ValueError(f"other tensors: {sorted(tensors.keys() ^ known.keys())[:8]}")
        dcp.load(tensors, storage_reader=reader, no_dist=not torch_dist.is_initialized())
        optimizer.state.update(moments)
        return read_json(last / "state.json")
    except (CheckpointException, SafetensorError, OSError, RuntimeError, ValueError) as error:
        raise ValueError(f"{last} is not a state of this run: {error}") from None


def remove_state(out) -> None:
    shutil.rmtree(Path(out) / "state", ignore_errors=True)


def state_dirs(out) -> list[Path]:
    """Complete states, oldest first."""
    return sorted((Path(out) / "state").glob("[0-9]*"), key=lambda x: int(x.name))


def write_tensors(file: Path, tensors: dict[str, Tensor]) -> None:
    tensors = {key: x.detach().cpu().contiguous() for key, x in tensors.items()}
    file.touch()
    mode = file.stat().st_mode  # as any new file; safetensors would leave it to its owner alone
    try:
        save_file(tensors, file, metadata={"format": "pt"})
        file.chmod(mode)
    except SafetensorError as error:
        raise OSError(f"cannot write {file}: {error}") from None
    sync(file)
