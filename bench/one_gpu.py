"""Which small models fit one device: --dtype bfloat16, GRPO of 16 x 8 responses of 512 tokens.

    python -m bench.one_gpu                 a Markdown table, in some minutes

A cell: tokens of a micro-batch x rows decoded at once, and what it takes (docs/one-gpu.md).
"""

from nanocascade.engine.distributed import Layout
from nanocascade.model.model import ModelConfig
from nanocascade.plan.meter import imaginary_node
from nanocascade.plan.plan import Plan, Sampling, Work
from nanocascade.plan.report import GB, ONE_DEVICE, fitting, flags_of

MEMORY = (8, 16, 24, 48, 80)  # GB
ROWS = 128
WORK = Work(
    sequence=1024,
    width=1024,
    micro=8192,
    tokens=128 * 768,
    rollouts=128,
    sampling={"rollout": Sampling(ROWS, prompt=512, new=512)},
)
SHAPES = {  # of SmolLM2 and Qwen3: width, layers, heads, key heads, head_dim, MLP, vocabulary
    "135M": (576, 30, 9, 3, 64, 1536, 49152),
    "0.6B": (1024, 28, 16, 8, 128, 3072, 151936),
    "1.7B": (2048, 28, 16, 8, 128, 6144, 151936),
    "4B": (2560, 36, 32, 8, 128, 9728, 151936),
    "8B": (4096, 36, 32, 8, 128, 12288, 151936),
}


def config_of(name: str) -> ModelConfig:
    width, layers, heads, kv_heads, head_dim, inner, vocabulary = SHAPES[name]
    return ModelConfig(
        model_type="qwen3",
        vocab_size=vocabulary,
        hidden_size=width,
        pattern="*-" * layers,
        tie_word_embeddings=name != "8B",
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        rope_theta=1e6,
        intermediate_size=inner,
        gated_mlp=True,
    )


def cell(plan: Plan, memory: float) -> str:
    found = fitting(plan, memory, ONE_DEVICE)
    if found is None:
        return "-"
    micro, rows, changes = found
    flags = "".join(f", `{flag}`" for flag in flags_of(changes).split())
    return f"{micro:,} x {min(rows, ROWS)}{flags}"


def main() -> None:
    print("| model | " + " | ".join(f"{x} GB" for x in MEMORY) + " |")
    print("|" + " --- |" * (len(MEMORY) + 1))
    with imaginary_node():
        for name in SHAPES:
            for lora_rank in (0, 16):
                layout = Layout(dtype="bfloat16")
                plan = Plan(config_of(name), WORK, layout, 1, False, lora_rank)
                title = f"{name}, `--lora_rank 16`" if lora_rank else name
                cells = [title, *(cell(plan, memory * GB) for memory in MEMORY)]
                print("| " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
