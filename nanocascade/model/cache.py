"""The state of decoding rows: keys and values, the conv window, the SSM state.

One row is one sequence. Keys and values are left-aligned: slot j of a row holds its token j,
however the input was padded, and `lengths` says how many slots are filled. The last slot is extra:
padding is written there and never read. SSM and conv states have a constant size (no slot per
token): a row of the 30B hybrid costs 6,144 bytes of KV a token and 49 MB of state.
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
        self.lengths = torch.zeros(rows, dtype=torch.long, device=device)  # (b,)
        self.layers: list[dict[str, Tensor]] = []
        wide = torch.promote_types(dtype, torch.float32)
        for kind in config.pattern:
            layer = {}
            if kind == "*":
                shape = (rows, config.num_kv_heads, max_len + 1, config.head_dim)
                layer["k"] = torch.zeros(shape, dtype=dtype, device=device)  # (b, k, t, c)
                layer["v"] = torch.zeros(shape, dtype=dtype, device=device)  # (b, k, t, c)
            elif kind == "M":
                window = (rows, config.conv_kernel - 1, config.conv_dim)
                state = (rows, config.mamba_num_heads, config.mamba_head_dim, config.ssm_state_size)
                layer["conv"] = torch.zeros(window, dtype=dtype, device=device)  # (b, w-1, m)
                layer["ssm"] = torch.zeros(state, dtype=wide, device=device)  # (b, h, c, s)
            self.layers.append(layer)

    @property
    def rows(self) -> int:
        return len(self.lengths)

    @property
    def bytes(self) -> int:
        return sum(x.numel() * x.element_size() for layer in self.layers for x in layer.values())

    def shrink(self, rows: int, source: Tensor, target: Tensor) -> None:
        """Keep the first `rows` places, rows `source` beyond them moved to free places `target`.

        Nothing else is copied, and of keys and values only the filled slots.
        """
        filled = int(self.lengths[source].max()) if len(source) else 0
        self.lengths[target] = self.lengths[source]
        self.lengths = self.lengths[:rows]
        for layer in self.layers:
            for name, x in layer.items():
                part = x[:, :, :filled] if name in ("k", "v") else x
                part[target] = part[source]
                layer[name] = x[:rows]

    def write(self, index: Tensor, other: "Cache", source: Tensor) -> None:
        """Put rows `source` of another cache into rows `index` of this one: free rows refilled."""
        self.lengths[index] = other.lengths[source]
        filled = min(other.max_len, self.max_len)
        for layer, other_layer in zip(self.layers, other.layers, strict=True):
            for name, x in layer.items():
                if name in ("k", "v"):  # only the prompt's slots: decoding writes the others
                    x[index, :, :filled] = other_layer[name][source, :, :filled]
                else:
                    x[index] = other_layer[name][source]
