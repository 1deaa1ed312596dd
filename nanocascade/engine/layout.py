"""A model laid out over ranks from outside: FSDP2, recomputed and offloaded blocks."""

from contextlib import contextmanager, nullcontext
from functools import partial

import torch
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.utils.checkpoint import checkpoint

from nanocascade.checkpoint.weights import load_model
from nanocascade.engine.distributed import Dist
from nanocascade.engine.experts import spread_experts
from nanocascade.model.layers import KEEP_FP32

# ---- Layout of a model ---------------------------------------------------------------------------


def parallelize(model: nn.Module, dist: Dist) -> nn.Module:
    """Lay the model out over the ranks, in place; on the meta device nothing is allocated.

    Each block is gathered before its forward and freed after it. Matrix products have dist.dtype;
    master weights, gradients and their sums are fp32. FSDP's mixed precision casts every parameter
    in forward, so the fp32 islands (router, A_log, D, dt_bias) are not sharded.
    Raises ValueError for a model that does not divide.
    """
    if dist.checkpoint_blocks:
        for block in model.blocks:
            block.forward = partial(checkpointed, block.forward, dist.offload_blocks)
    if not dist.sharded:
        return model
    islands = {p for name, p in model.named_parameters() if name.endswith(KEEP_FP32)}
    # Inputs have the right dtype already. Casting them would copy the cache's dict.
    policy = MixedPrecisionPolicy(
        param_dtype=None if dist.dtype == torch.float32 else dist.dtype,
        reduce_dtype=torch.float32,
        cast_forward_inputs=False,
    )
    if dist.expert_parallel > 1:
        spread_experts(model, dist, policy)
    for module in (*model.blocks, model):
        fully_shard(module, mesh=dist.dense_mesh, mp_policy=policy, ignored_params=islands)
    for module in fsdp_modules(model):
        module.set_gradient_divide_factor(1.0)  # denominators are global: sum, do not average
        module.set_force_sum_reduction_for_comms(True)
    return model


def load(path, dist: Dist, dtype=torch.float32) -> nn.Module:
    """The model of a directory, laid out over the ranks; each rank reads its shards."""
    return load_model(path, dtype, dist.device, partial(parallelize, dist=dist))


def load_frozen(path, dist: Dist) -> nn.Module:
    """A model that is never trained: in --dtype, without fp32 master weights."""
    return load(path, dist, dist.dtype).requires_grad_(False).eval()


def fsdp_modules(model: nn.Module) -> list[FSDPModule]:
    return [x for x in model.modules() if isinstance(x, FSDPModule)]


def checkpointed(forward, offload: bool, x: Tensor, ctx, layer=None) -> Tensor:
    """A block's forward that saves only its input x (b, t, d) and is recomputed in backward."""
    if not torch.is_grad_enabled():
        return forward(x, ctx, layer)
    host = save_on_cpu(pin_memory=x.is_cuda) if offload else nullcontext()
    with host:
        return checkpoint(forward, x, ctx, layer, use_reentrant=False, preserve_rng_state=False)


@contextmanager
def unsharded(model: nn.Module):
    """Gather the weights on every rank for a phase without gradients (experts: this rank's own).

    Enter it outside of inference mode: tensors made in inference mode could not be trained.
    """
    modules = fsdp_modules(model)
    for module in modules:
        module.set_reshard_after_forward(False, recurse=False)
        module.unshard()
    try:
        yield
    finally:
        for module in modules:
            module.reshard()
            # the root's weights are needed first in backward (and by the loss, beside forward)
            module.set_reshard_after_forward(module is not model, recurse=False)
