"""The device of this process."""

import os

import torch


def find_device(name: str) -> str:
    """The device of --device or of NANOCASCADE_DEVICE in the environment, else the best one found:
    cuda, mps (one process only), cpu."""
    name = name or os.environ.get("NANOCASCADE_DEVICE", "")
    alone = int(os.environ.get("WORLD_SIZE", 1)) == 1
    if name and name.split(":")[0] not in ("cpu", "cuda", "mps"):
        raise ValueError(f"--device {name}: expected cuda, mps or cpu")
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"--device {name}: torch does not find this device")
    if name == "mps" and not alone:
        raise ValueError(
            "--device mps: several processes need --device cpu, one process can use mps"
        )
    if name and name != "cuda":  # cuda: each process has its own
        return name
    if torch.cuda.is_available():
        return f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    return "mps" if alone and torch.backends.mps.is_available() else "cpu"
