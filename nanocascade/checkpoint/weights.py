"""Published checkpoints in and out: tensors by tensors, under the names of the five families.

A model directory is what transformers and vLLM read: config.json (hf_config.py), safetensors,
tokenizer. NAMES maps parameters to tensors and serves reading and writing, so what loads is what is
saved. A directory is judged by its headers before memory is taken for it.
"""

import os
import re
from collections import deque
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as torch_dist
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from nanocascade.checkpoint.hf_config import config_json, load_config
from nanocascade.checkpoint.state import write_tensors
from nanocascade.files import read_json, unfinished_dir, write_json_atomic
from nanocascade.model.layers import KEEP_FP32
from nanocascade.model.model import Model

IGNORED = re.compile(r"mtp\.|.*\.rotary_emb\.inv_freq$")  # multi-token prediction; old Llama files

# Prefix in memory -> on disk; {} is the layer: a block of nemotron_h, two blocks of the others.
# Below a mixer the names agree, but for routed experts: stacked in memory, `experts.up_proj`
# (e, d, u, f), one tensor each on disk, `experts.7.up_proj.weight` (f, d), and if u = 2 gate_proj.
NEMOTRON = {"embed": "backbone.embeddings", "norm": "backbone.norm_f", "head": "lm_head"}
NEMOTRON |= {f"{kind} norm": "backbone.layers.{}.norm" for kind in "ME*-"}
NEMOTRON |= {f"{kind} mixer": "backbone.layers.{}.mixer" for kind in "ME*-"}
LAYERED = {"embed": "model.embed_tokens", "norm": "model.norm", "head": "lm_head"}
LAYERED |= {"* norm": "model.layers.{}.input_layernorm", "* mixer": "model.layers.{}.self_attn"}
LAYERED |= {f"{kind} norm": "model.layers.{}.post_attention_layernorm" for kind in "E-"}
LAYERED |= {f"{kind} mixer": "model.layers.{}.mlp" for kind in "E-"}
NAMES = {"nemotron_h": NEMOTRON} | dict.fromkeys(("qwen2", "qwen3", "qwen3_moe", "llama"), LAYERED)

# Matrices that a CPU keeps column by column: a product with few rows, as decoding makes them, takes
# half the time (16 rows of 256: 14 us, by rows 23), one with many as long, and so the gradients.
MATRIX = re.compile(r"(_proj|head|gate)\.weight$")


class Stored(NamedTuple):
    """Where a published tensor lies: a stored tensor, or rows of one expert of a stacked one."""

    file: Path
    name: str
    shape: tuple  # of the published tensor
    expert: int | None = None
    first_row: int = 0

    def index(self, start: tuple, shape: tuple) -> tuple:
        """Index into the stored tensor of the block at `start`, of size `shape`, of this one.

        An up_proj of 16 rows behind a gate_proj of 16 in the stacked gate_up_proj of expert 3:
        index((8, 0), (8, 32)) = (3, rows 24 to 32, columns 0 to 32).
        """
        block = [slice(first, first + size) for first, size in zip(start, shape, strict=True)]
        if self.expert is None:
            return tuple(block) or (...,)
        rows, columns = block
        rows = slice(self.first_row + rows.start, self.first_row + rows.stop)
        return self.expert, rows, columns


def disk_names(model: Model) -> dict[str, list[str]]:
    """Parameter or buffer -> its tensors on disk: one, or one an expert. A tied head has none."""
    config, names = model.config, {}
    table = NAMES[config.model_type]
    for name in model.state_dict():
        part, _, rest = name.partition(".")
        prefix = table.get(part)  # embed, norm, head
        if part == "blocks":  # "blocks.4.mixer.experts.up_proj"
            i, part, rest = rest.split(".", 2)  # "4", "mixer", "experts.up_proj"
            layer = int(i) if table is NEMOTRON else int(i) // 2
            prefix = table[f"{config.pattern[int(i)]} {part}"].format(layer)
        proj = rest.removeprefix("experts.")  # but not of "shared_experts.up_proj.weight"
        if proj != rest:
            gated = ["gate_proj"] * (proj == "up_proj" and config.gated_mlp)
            names[name] = [
                f"{prefix}.experts.{k}.{x}.weight"
                for k in range(config.num_experts)
                for x in (proj, *gated)
            ]
        elif part != "head" or not config.tie_word_embeddings:
            names[name] = [f"{prefix}.{rest}"]
    return names


def experts_of(name: str, tensor: Tensor) -> tuple[Tensor, ...]:
    """What stands on disk for a parameter: views of its experts, or itself."""
    if ".experts." not in name:
        return (tensor,)
    halves = tensor.unbind(2) if tensor.ndim == 4 else [tensor]  # up and gate, or down
    return tuple(x.T for x in chain.from_iterable(zip(*(x.unbind(0) for x in halves), strict=True)))


def kept_dtype(name: str, dtype: torch.dtype) -> torch.dtype:
    """The dtype a parameter has, in memory or on disk, where `dtype` is asked."""
    return torch.promote_types(dtype, torch.float32) if name.endswith(KEEP_FP32) else dtype


def read_headers(path: Path) -> tuple[dict[str, Stored], dict]:
    """All tensors of a directory by published name, and its open files; no tensor is read."""
    single, index = path / "model.safetensors", path / "model.safetensors.index.json"
    if not single.exists() and not index.exists():
        raise ValueError(f"{path} has neither {single.name} nor {index.name}")
    where = {} if single.exists() else read_json(index).get("weight_map", {})
    if type(where) is not dict or not all(type(x) is str for x in where.values()):
        raise ValueError(f"{index}: weight_map must be an object of tensors and their files")
    stored, files = {}, {}
    for file in sorted(path / shard for shard in set(where.values()) or {single.name}):
        try:
            files[file] = safe_open(file, framework="pt")  # checks header against length
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{file} is missing, truncated or damaged: {error}") from None
        for name in files[file].keys():
            header = files[file].get_slice(name)
            if header.get_dtype() not in ("F64", "F32", "F16", "BF16"):
                raise ValueError(f"{file}: {name} is {header.get_dtype()}, want F16, BF16 or F32")
            for published, *place in unstack(name, tuple(header.get_shape())):
                if published in stored:
                    raise ValueError(f"{file}: {name} holds {published} a second time")
                if not IGNORED.match(published):
                    stored[published] = Stored(file, name, *place)
    return stored, files


def unstack(name: str, shape: tuple) -> Iterator[tuple]:
    """(published name, shape) of a tensor, or (name, shape, expert, first row) of each expert that
    is stacked in it.

    In memory transformers 5 calls nemotron_h's trunk `model` and stacks experts, SwiGLU's gate and
    up as one gate_up_proj (e, 2f, d); some tools write that to disk.
    """
    trunk = r"^model\.(?=embeddings\.|norm_f\.|layers\.\d+\.(norm|mixer)\.)"
    name = re.sub(trunk, "backbone.", name)
    match = re.fullmatch(r"(.*\.experts)\.(gate_up|gate|up|down)_proj", name)
    if not match or len(shape) != 3:
        yield name, shape
        return
    parts = ("gate", "up") if match[2] == "gate_up" else (match[2],)
    num_rows = shape[1] // len(parts)  # f, or d of down_proj
    for expert in range(shape[0]):
        for j, part in enumerate(parts):
            published = f"{match[1]}.{expert}.{part}_proj.weight"
            yield published, (num_rows, shape[2]), expert, j * num_rows


def check_fit(path: Path, model: Model, stored: dict[str, Stored]) -> None:
    """One error that lists every tensor that is missing, of another shape or left over."""
    names, tensors = disk_names(model), model.state_dict()
    shapes = {
        disk: tuple(part.shape)
        for name, disks in names.items()
        for disk, part in zip(disks, experts_of(name, tensors[name]), strict=True)
    }
    tied = {NAMES[model.config.model_type]["head"] + ".weight"}  # some files hold it all the same
    faults = {
        "missing": sorted(set(shapes) - set(stored)),
        "not of this model": sorted(set(stored) - set(shapes) - tied),
        "of another shape": [
            f"{name} {stored[name].shape} instead of {shape}"
            for name, shape in shapes.items()
            if name in stored and stored[name].shape != shape
        ],
    }
    texts = [
        f"{len(x)} {what}: {', '.join(x[:8])}{', ...' * (len(x) > 8)}"
        for what, x in faults.items()
        if x
    ]
    if texts:
        raise ValueError(f"{path}: tensors do not fit config.json; {'; '.join(texts)}")


def open_model(path) -> tuple[Model, dict[str, Stored], dict]:
    """A directory judged by config.json and headers: its model on the meta device (shapes only),
    its tensors by published name, its open files. Takes no memory; raises what is wrong."""
    path, config = Path(path), load_config(path)
    with torch.device("meta"):
        model = Model(config)
    stored, files = read_headers(path)
    check_fit(path, model, stored)
    return model, stored, files


def check_tied_head(model: Model, stored: dict[str, Stored], files: dict) -> None:
    """Raise ValueError where config.json ties the output head to the embedding, but the file has
    a head of its own: one of the two would have to be ignored."""
    names = NAMES[model.config.model_type]
    head, embed = (stored.get(f"{names[part]}.weight") for part in ("head", "embed"))
    if head is None or not model.config.tie_word_embeddings:
        return
    for first in range(0, head.shape[0], 8192):  # a part at a time, for they may be large
        rows = slice(first, first + 8192)
        parts = [files[x.file].get_slice(x.name)[rows].float() for x in (head, embed)]
        if not parts[0].equal(parts[1]):
            raise ValueError(
                f"{head.file}: config.json ties the head to the embedding (tie_word_embeddings),"
                f" but {head.name} differs from {embed.name}: set it to false to keep both"
            )


def load_model(path, dtype=torch.float32, device="cpu", place=None) -> Model:
    """The model of a published directory, read tensor by tensor into parameters of `dtype`.

    place: lays the model out over ranks while it has shapes only (distributed.parallelize); each
    rank then takes memory for its shards, and reads no more than these.
    """
    model, stored, files = open_model(path)
    check_tied_head(model, stored, files)
    names = disk_names(model)
    for name, x in model.state_dict(keep_vars=True).items():
        x.data = x.data.to(kept_dtype(name, dtype))
    model = place(model) if place else model
    model = model.to_empty(device=device)  # memory for this rank's shards
    if model.config.tie_word_embeddings:
        model.head.weight = model.embed.weight  # to_empty made two parameters of them
    state = model.state_dict(keep_vars=True)
    for name, published in names.items():
        local, start = local_part(name, state[name])
        # This rank's experts: its first row of the stacked parameter is its first expert.
        first = start[0] * len(published) // len(state[name])
        offset = (start[-1], start[1]) if ".experts." in name else start  # on disk one is (f, d)
        for key, target in zip(published[first:], experts_of(name, local), strict=False):
            place_on_disk = stored[key]
            tensor = files[place_on_disk.file].get_slice(place_on_disk.name)
            target.copy_(tensor[place_on_disk.index(offset, target.shape)])  # casts
            check_finite(target, place_on_disk)
    return model


def local_part(name: str, parameter: Tensor) -> tuple[Tensor, tuple]:
    """This rank's part of a parameter, and where in the whole that part begins."""
    if isinstance(parameter, DTensor):
        _, start = compute_local_shape_and_global_offset(
            parameter.shape, parameter.device_mesh, parameter.placements
        )
        return parameter.detach().to_local(), start
    if parameter.device.type == "cpu" and MATRIX.search(name):
        by_columns = torch.empty_like(parameter.T, memory_format=torch.contiguous_format).T
        parameter.data = by_columns
    return parameter.detach(), (0,) * parameter.ndim


def check_finite(x: Tensor, stored: Stored) -> None:
    """Raise ValueError for NaN or infinity. Both show in the extremes, without a mask as large as
    the tensor."""
    extremes = x.aminmax() if x.numel() else (x.sum(),)
    if not torch.isfinite(torch.stack(tuple(extremes))).all():
        raise ValueError(f"{stored.file}: {stored.name} holds NaN or infinity, read as {x.dtype}")


def save_model(model: Model, path, tokenizer=None, *, dtype=None, max_shard_bytes=5_000_000_000):
    """Write a directory that transformers loads, complete before anything of an old one goes.

    dtype None: as in memory. A save that fails or is killed leaves the old files. Between the
    renames of several weight files old and new would mix, so config.json is away meanwhile.
    """
    path, dtype = Path(path), dtype or model.embed.weight.dtype
    if torch_dist.is_initialized() and torch_dist.get_rank():  # only helps the first rank to gather
        return deque(whole_tensors(model, dtype), 0)
    config = config_json(model.config, dtype)
    sampling = {key: config[key] for key in ("eos_token_id", "pad_token_id") if config.get(key)}
    if model.config.model_type == "nemotron_h":  # as the model's card recommends
        sampling |= {"do_sample": True, "temperature": 1.0, "top_p": 0.95}
    with unfinished_dir(path) as new:
        weights = write_weights(model, new, dtype, max_shard_bytes)
        write_json_atomic(new / "generation_config.json", sampling)
        write_json_atomic(new / "config.json", config)
        if tokenizer is not None:
            tokenizer.save(new)
        old = {x.name for x in path.glob("model*.safetensors*")}
        if len(weights | old) > 1:  # more than one rename
            (path / "config.json").unlink(missing_ok=True)
        for name in {x.name for x in new.iterdir()} - {"config.json"}:
            os.replace(new / name, path / name)
        for name in old - weights:  # shards of another count
            (path / name).unlink()
        os.replace(new / "config.json", path / "config.json")


def whole_tensors(model: Model, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """Every tensor as it stands on disk, one parameter gathered at a time: all ranks must ask."""
    state = model.state_dict()
    for name, published in disk_names(model).items():
        x = state[name].to(kept_dtype(name, dtype))
        x = x.full_tensor() if isinstance(x, DTensor) else x
        yield from zip(published, experts_of(name, x), strict=True)


def shards_of(tensors, max_bytes: int) -> Iterator[dict[str, Tensor]]:
    """The tensors in groups of at most max_bytes, or of one that is larger."""
    shard, num_bytes = {}, 0
    for name, x in tensors:
        if shard and num_bytes + x.nbytes > max_bytes:
            yield shard
            shard, num_bytes = {}, 0
        shard[name] = x
        num_bytes += x.nbytes
    yield shard


def write_weights(model: Model, path: Path, dtype: torch.dtype, max_bytes: int) -> set[str]:
    """model.safetensors, or shards of at most max_bytes and their index; the names of the files."""
    contents, total_size = [], 0  # names of the tensors of each file
    for shard in shards_of(whole_tensors(model, dtype), max_bytes):
        write_tensors(path / str(len(contents)), shard)
        contents.append(list(shard))
        total_size += sum(x.nbytes for x in shard.values())
    count = len(contents)
    names = [f"model-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)]
    names = names if count > 1 else ["model.safetensors"]
    for i, name in enumerate(names):
        os.rename(path / str(i), path / name)
    if count > 1:
        where = {key: name for name, keys in zip(names, contents, strict=True) for key in keys}
        index = {"metadata": {"total_size": total_size}, "weight_map": where}
        write_json_atomic(path / "model.safetensors.index.json", index)
        names.append("model.safetensors.index.json")
    return set(names)
