"""The state of decoding rows: keys and values, the conv window, the SSM state.

One row is one sequence. Slot j of its keys and values holds its token j, and `lengths` says how
many slots are filled. SSM and conv states have a constant size (no slot per token): a row of the
30B hybrid costs 6,144 bytes of KV a token and 49 MB of state.
"""

import torch
from torch import Tensor


class Cache:
    """States of `rows` sequences of at most `max_len` tokens, for the blocks of a ModelConfig.

    layers[i] is a dict for block i: {"k", "v"} (b, k, t, c) for attention, {"conv" (b, w-1, m),
    "ssm" (b, h, c, s)} for Mamba-2, {} otherwise. SSM states are at least fp32 (as the scan).
    """

    def __init__(self, config, rows: int, max_len: int, dtype=torch.float32, device="cpu"):
        self.max_len = max_len
        self.all_lengths = torch.zeros(rows, dtype=torch.long, device=device)  # (b,)
        self.all_layers: list[dict[str, Tensor]] = []
        wide = torch.promote_types(dtype, torch.float32)
        for kind in config.pattern:
            layer = {}
            if kind == "*":
                shape = (rows, config.num_kv_heads, max_len, config.head_dim)
                layer["k"] = torch.zeros(shape, dtype=dtype, device=device)  # (b, k, t, c)
                layer["v"] = torch.zeros(shape, dtype=dtype, device=device)  # (b, k, t, c)
            elif kind == "M":
                window = (rows, config.conv_kernel - 1, config.conv_dim)
                state = (rows, config.mamba_num_heads, config.mamba_head_dim, config.ssm_state_size)
                layer["conv"] = torch.zeros(window, dtype=dtype, device=device)  # (b, w-1, m)
                layer["ssm"] = torch.zeros(state, dtype=wide, device=device)  # (b, h, c, s)
            self.all_layers.append(layer)
        self.use(rows)

    def use(self, rows: int) -> None:
        """Use the first `rows` rows: `lengths` and `layers` are views of these."""
        self.lengths = self.all_lengths[:rows]  # (b,)
        self.layers = [{name: x[:rows] for name, x in layer.items()} for layer in self.all_layers]

    @property
    def bytes(self) -> int:
        """Bytes of the rows in use, over all blocks."""
        return sum(x.numel() * x.element_size() for layer in self.layers for x in layer.values())

    def write(self, index: Tensor, other: "Cache", source: Tensor) -> None:
        """Put rows `source` (b',) of another cache into rows `index` (b',); of keys and values
        only the slots that are filled."""
        filled = int(other.lengths[source].max()) if len(source) else 0
        self.lengths[index] = other.lengths[source]
        for layer, other_layer in zip(self.layers, other.layers, strict=True):
            for name, x in layer.items():
                if name in ("k", "v"):
                    x[index, :, :filled] = other_layer[name][source, :, :filled]
                else:
                    x[index] = other_layer[name][source]
