"""LoRA: low-rank adapters on the projections; the base weights stay frozen in their own dtype.

    y = W x + alpha / rank * B A x                     (Hu et al. 2021, arXiv 2106.09685)

A run with --lora_rank writes the merged model, as every other run does, and beside it the adapters
(adapters.safetensors) with the directory and hash of their base (adapters.json). The next stage
continues with these adapters on the same base. So a teacher or a KL reference with adapters on the
student's base needs no second copy of the base: its adapters replace the student's while it
computes log-probs.
"""

import math
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from nanocascade.checkpoint.state import write_tensors
from nanocascade.engine.distributed import Dist
from nanocascade.engine.layout import load
from nanocascade.files import read_json, sha256_of, write_json_atomic
from nanocascade.model.model import Model

ALPHA = 2  # alpha / rank, a constant: another rank then needs no other learning rate
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj") + (
    "in_proj",
    "out_proj",
)  # projections of attention, MLP and Mamba-2; routed experts get no adapters


class LoRALinear(nn.Linear):
    """A linear layer whose weight is frozen, plus a product of two trained matrices.

    lora_a (rank, in) starts random and lora_b (out, rank) at zero, so that training starts from the
    base's function. Both are fp32 at least; their products have the dtype of the input.
    """

    def __init__(self, linear: nn.Linear, rank: int, generator: torch.Generator):
        nn.Module.__init__(self)  # uses the layer's own weight and bias
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        wide = torch.promote_types(linear.weight.dtype, torch.float32)
        bound = 1 / math.sqrt(self.in_features)
        a = torch.empty(rank, self.in_features, dtype=wide)
        a.uniform_(-bound, bound, generator=generator)
        device = linear.weight.device
        self.lora_a = nn.Parameter(a.to(device))
        self.lora_b = nn.Parameter(torch.zeros(self.out_features, rank, dtype=wide, device=device))

    def forward(self, x: Tensor) -> Tensor:
        low = F.linear(x, self.lora_a.to(x.dtype))  # (..., rank)
        return super().forward(x) + ALPHA * F.linear(low, self.lora_b.to(x.dtype))

    def merged(self) -> nn.Linear:
        """The layer with W + ALPHA * B A as its only weight, in the base's dtype."""
        with torch.no_grad():
            whole = self.weight.to(self.lora_b.dtype) + ALPHA * self.lora_b @ self.lora_a
            self.weight.copy_(whole)
        linear = nn.Linear(1, 1, bias=False, device="meta")
        linear.in_features, linear.out_features = self.in_features, self.out_features
        linear.weight, linear.bias = self.weight, self.bias
        return linear


def layers_of(model: nn.Module, kind: type) -> list[tuple[nn.Module, str, nn.Module]]:
    """(parent, attribute name, layer) of the projections of exactly this class."""
    return [
        (parent, name, layer)
        for parent in model.modules()
        for name, layer in parent.named_children()
        if name in TARGETS and type(layer) is kind
    ]


def add_adapters(model: Model, rank: int, seed: int) -> Model:
    """Freeze the model and add adapters to its projections, in place."""
    model.requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for parent, name, layer in layers_of(model, nn.Linear):
        setattr(parent, name, LoRALinear(layer, rank, generator))
    return model


def adapters_of(model: Model) -> dict[str, Tensor]:
    """{name: parameter} of all adapters."""
    return {name: x for name, x in model.named_parameters() if ".lora_" in name}


def merge_adapters(model: Model) -> Model:
    """Merge the adapters into the weights, in place: the model has its published form again."""
    for parent, name, layer in layers_of(model, LoRALinear):
        setattr(parent, name, layer.merged())
    return model


def base_of(path, rank: int = 0) -> Path:
    """The base directory of the adapters in `path`. It is `path` itself if there are none, or if
    their rank is not `rank`.

    Raises ValueError if that directory is gone, or holds other weights than those trained on.
    """
    note = Path(path) / "adapters.json"
    if not note.exists() or rank and read_json(note)["rank"] != rank:
        return Path(path).resolve()
    base = read_json(note)["base"]
    if sha256_of(base["path"]) != base["sha256"]:
        raise ValueError(f"{note}: {base['path']} does not hold the weights it was trained on")
    return Path(base["path"])


def read_adapters(model: Model, path) -> dict[str, Tensor]:
    """The adapters of `path`; for a base without adapters, ones that change nothing.

    Raises ValueError for adapters of another rank or other layers.
    """
    own, file = adapters_of(model), Path(path) / "adapters.safetensors"
    if not file.exists():
        return {name: torch.zeros_like(x) for name, x in own.items()}
    read = load_file(file, device=str(next(iter(own.values())).device))
    if {k: x.shape for k, x in read.items()} != {k: x.shape for k, x in own.items()}:
        rank = read_json(Path(path) / "adapters.json")["rank"]
        raise ValueError(f"{file} holds adapters of rank {rank}: give --lora_rank {rank}")
    return read


def load_adapted(path, base: Path, rank: int, seed: int, dist: Dist) -> Model:
    """The base with the adapters of `path`, or with new adapters if `path` is the base."""
    model = add_adapters(load(base, dist, dist.dtype), rank, seed)
    if Path(path).resolve() != base:
        model.load_state_dict(read_adapters(model, path), strict=False)
    return model


@contextmanager
def swapped_adapters(model: Model, adapters: dict[str, Tensor]):
    """The model with other adapters, for forward passes without gradient."""
    own = adapters_of(model)
    kept = {name: x.data for name, x in own.items()}
    for name, x in own.items():
        x.data = adapters[name]
    try:
        yield model
    finally:
        for name, x in own.items():
            x.data = kept[name]


def save_adapters(model: Model, path, base, rank: int) -> None:
    """adapters.safetensors and adapters.json; `base` is the directory whose weights are frozen."""
    path = Path(path)
    write_tensors(path / "adapters.safetensors", adapters_of(model))
    known = {"path": str(Path(base).resolve()), "sha256": sha256_of(base)}
    write_json_atomic(path / "adapters.json", {"rank": rank, "base": known})
