"""Shared by the benchmarks: two models, the peer on the same weights, alternation, peaks.

Every comparison runs both sides in one process, in turns, and reports the median of the paired
ratios: on a shared machine a minute's absolute numbers mean little. GOMP_SPINCOUNT=1000 must stand
in the environment before torch is imported (common sets it), or two threads fight for the cores.
"""

import argparse
import gc
import json
import os
import statistics
import subprocess
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

os.environ.setdefault("GOMP_SPINCOUNT", "1000")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch  # noqa: E402

from nanocascade.checkpoint.hf_config import load_config  # noqa: E402
from nanocascade.checkpoint.weights import load_model, save_model  # noqa: E402
from nanocascade.model.model import Model  # noqa: E402

torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", min(2, os.cpu_count() or 1))))
EOS = 1  # ends a response of the peer: forced at its length, forbidden before
VOCAB = 512

# A hybrid and an attention model of like size: width 256, 16 experts, two of them a token.
FAMILIES = {
    "nemotron_h": {
        "model_type": "nemotron_h",
        "hybrid_override_pattern": "MEMEM*EMEMEM*E",
        "hidden_size": 256,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "layer_norm_epsilon": 1e-5,
        "mamba_num_heads": 8,
        "mamba_head_dim": 64,
        "n_groups": 2,
        "ssm_state_size": 64,
        "conv_kernel": 4,
        "chunk_size": 128,
        "n_routed_experts": 16,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 256,
        "n_group": 1,
        "topk_group": 1,
        "moe_shared_expert_intermediate_size": 256,
        "norm_topk_prob": True,
        "routed_scaling_factor": 2.5,
        "tie_word_embeddings": False,
    },
    "qwen3_moe": {
        "model_type": "qwen3_moe",
        "num_hidden_layers": 6,
        "hidden_size": 256,
        "head_dim": 64,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "num_experts": 16,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 256,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "tie_word_embeddings": False,
        "intermediate_size": 512,
        "hidden_act": "silu",
    },
}
PAIR = list(FAMILIES)  # default families of the comparisons
DENSE = {
    "num_hidden_layers": 6,
    "hidden_size": 256,
    "head_dim": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": True,
    "intermediate_size": 512,
    "hidden_act": "silu",
}
FAMILIES["qwen3"] = DENSE | {"model_type": "qwen3", "rms_norm_eps": 1e-6}
FAMILIES["llama"] = DENSE | {"model_type": "llama", "rms_norm_eps": 1e-5}


def options(**flags) -> argparse.Namespace:
    """The command line: --short (seconds, to see that it runs) and the script's own flags."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--short", action="store_true", help="seconds instead of minutes")
    parser.add_argument("--pairs", type=int, default=7, help="alternations of ours and the peer")
    parser.add_argument(
        "--seconds",
        type=float,
        default=75.0,
        help="seconds after which a comparison ends, with at least 3 pairs",
    )
    parser.add_argument("--families", nargs="*", default=PAIR, choices=PAIR)
    for name, (default, text) in flags.items():
        parser.add_argument(f"--{name}", nargs="*", default=default, help=text)
    return parser.parse_args()


def lengths(count: int, longest: int) -> list[int]:
    """The committed output lengths (512 of 1 to 256, mean a quarter), scaled to `longest`."""
    stored = json.loads(Path(__file__).with_name("lengths.json").read_text())
    return [max(1, round(x * longest / 256)) for x in stored[:count]]


def random_prompts(count: int, low: int, high: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    sizes = torch.randint(low, high + 1, (count,), generator=generator).tolist()
    return [torch.randint(2, VOCAB, (n,), generator=generator).tolist() for n in sizes]


@contextmanager
def model_dir(family: str, tokenizer=None, seed=0, device="cpu", dtype=None, **changes):
    """A directory with random weights of a family, drawn on `device`, as save_model writes it."""
    raw = {
        "vocab_size": VOCAB,
        "eos_token_id": EOS,
        "pad_token_id": 0,
        "initializer_range": 0.02,
        "max_position_embeddings": 32768,
    }
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder) / "config.json"
        config.write_text(json.dumps(raw | FAMILIES[family] | changes))
        with torch.device(device):
            model = Model(load_config(folder)).reset_parameters(seed)
        save_model(model, folder, tokenizer, dtype=dtype)
        del model
        yield folder


def ours_and_peer(folder: str, dtype=torch.float32, device="cpu"):
    """The directory in nanocascade and in transformers, its fastest experts and attention."""
    return load_model(folder, dtype, device), peer(folder, dtype, device)


def peer(folder: str, dtype=torch.float32, device="cpu"):
    from transformers import AutoModelForCausalLM

    options = {"dtype": dtype, "attn_implementation": "sdpa"}
    if load_config(folder).num_moe_layers:
        options["experts_implementation"] = "grouped_mm"
    theirs = AutoModelForCausalLM.from_pretrained(folder, **options).eval()
    for module in theirs.modules():
        if hasattr(module, "time_step_limit"):  # 5.23 clamps dt by time_step_min: README
            module.time_step_limit = (0.0, float("inf"))
    return theirs.to(device)


def device_of(model) -> torch.device:
    return next(model.parameters()).device


def check_same_model(ours, theirs) -> None:
    """Assert equal logits of both sides, so that only their speed differs."""
    ids = torch.tensor(random_prompts(1, 40, 40), device=device_of(ours))
    with torch.no_grad():
        gap = (ours.logits(ours(ids)) - theirs(ids).logits.float()).abs().max().item()
    limit = 1e-3 if ours.embed.weight.dtype == torch.float32 else 0.2
    assert gap < limit, f"logits differ by {gap}"


def timed(function) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def alternate(ours, theirs, cfg, between) -> tuple[list[float], list[float], list[float]]:
    """Seconds of each side, in turns, who goes first changing; one warm-up of both before.

    cfg.pairs of them, or as many, 3 at least, as start within cfg.seconds.

    `between` runs before each pair, outside the clocks: the measurement of the machine's peaks.
    The third list has the ratio of CPU seconds (all threads) of each pair: on a machine where other
    work takes most of the cores it is steadier than the ratio of wall time.
    """
    ours(), theirs()
    times, cpu, start = ([], []), [], time.perf_counter()
    for i in range(1 if cfg.short else cfg.pairs):
        if i >= 3 and time.perf_counter() - start > cfg.seconds:
            break
        gc.collect()
        between()
        spent = [0.0, 0.0]
        for side in (0, 1) if i % 2 == 0 else (1, 0):
            before = time.process_time()
            times[side].append(timed((ours, theirs)[side]))
            spent[side] = time.process_time() - before
        cpu.append(spent[1] / spent[0])
    return *times, cpu


def spread(values) -> str:
    """median [lowest to highest]"""
    return f"{statistics.median(values):.2f} [{min(values):.2f} to {max(values):.2f}]"


def ratios(ours: list[float], theirs: list[float]) -> list[float]:
    """How many times faster we are, a number for each pair."""
    return [b / a for a, b in zip(ours, theirs, strict=True)]


def table(*titles: str) -> None:
    """The machine and the head of a markdown table; every result is then printed as a row of it."""
    print(f"{machine()}\n\n| {' | '.join(titles)} |\n|{' --- |' * len(titles)}", flush=True)


def row(*cells: str) -> None:
    print(f"| {' | '.join(cells)} |", flush=True)


class Peak:
    """Measured speed of a large matmul and a large copy on this machine at this moment."""

    def __init__(self, dtype=torch.float32):
        self.a, self.b = torch.randn(1024, 1024).to(dtype), torch.randn(1024, 1024).to(dtype)
        self.source = torch.empty(32 << 20)  # 128 MB, beyond every cache
        self.target = torch.empty_like(self.source)
        self.matmul, self.copy = [], []

    def measure(self) -> None:
        for _ in range(3):
            self.matmul.append(2 * 1024**3 / timed(lambda: self.a @ self.b) / 1e9)
            moved = 2 * self.source.numel() * 4
            self.copy.append(moved / timed(lambda: self.target.copy_(self.source)) / 1e9)

    @property
    def gflops(self) -> float:
        return statistics.median(self.matmul)

    @property
    def gbytes(self) -> float:
        return statistics.median(self.copy)


def token_flops(config, context: float) -> float:
    """Multiply-adds times two of one token's forward pass: active weights, attention, SSM state."""
    table = config.vocab_size * config.hidden_size
    weights = config.num_parameters(active=True) - table  # looking a row up costs nothing
    attention = 2 * config.num_heads * config.head_dim * context * config.pattern.count("*")
    state = config.mamba_inner * config.ssm_state_size
    return 2.0 * (weights + attention + 3 * state * config.pattern.count("M"))


def machine() -> str:
    """One line for the table: processor, threads, commit."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    model = next((x.split(":")[1].strip() for x in lines if x.startswith("model name")), "unknown")
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    try:
        commit = subprocess.run(command, capture_output=True, text=True).stdout.strip()
    except OSError:  # no git on this machine
        commit = ""
    load = os.getloadavg()[0]
    return (
        f"{model}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, torch "
        f"{torch.__version__}, commit {commit or 'unknown'}, load {load:.1f}"
    )
