"""A whole step of GRPO and of on-policy distillation, against TRL's GRPOTrainer and
DistillationTrainer.

    python -m bench.grpo_step [--short] [--pairs 7] [--tables whole training]

Same weights, prompts, group size, output lengths (forced) and reward function; fp32, one optimizer
step a batch of responses, no KL term. TRL runs its own train(); a callback runs our step between
two of its steps, with prompts computed once for all their responses and once for each, so the three
alternate in one process. Ours is the body of the loops in train_rl.py and train_mopd.py. TRL's
distillation compares whole distributions, ours the sampled tokens (Eq. 2-4): each is what its
recipe prescribes. The second table has our training step alone, for longer prompts.
"""

import logging
import statistics
import tempfile
import time
from functools import partial
from itertools import pairwise

import torch

from bench import common
from bench.common import ratios, spread
from bench.rollout import forced_decoder, forced_lengths, row_steps
from nanocascade.data.batch import make_batches
from nanocascade.data.episode import Rollout, Sampling
from nanocascade.engine.distributed import Dist
from nanocascade.engine.forward import new_routing, no_load, score_tokens
from nanocascade.engine.layout import load, load_frozen
from nanocascade.engine.optim import freeze_routers, make_optimizer, optimizer_step
from nanocascade.grpo import group_advantages, grpo_loss
from nanocascade.model.moe import update_correction_bias
from nanocascade.mopd import compute_mopd_loss
from nanocascade.plan.meter import Meter
from nanocascade.rewards import Reward
from nanocascade.rollouts.rollout import roll_out
from nanocascade.rollouts.scoring import Scorer
from nanocascade.tokenizer.tokenizer import Tokenizer
from nanocascade.toy.start import build_toy_tokenizer
from nanocascade.toy.tasks import make_rows, vocabulary

# Tokens of prompt and response, responses of a group, groups.
TRAINING = [(45, 18, 8, 16), (512, 64, 8, 2), (2048, 64, 16, 1), (16, 128, 8, 4), (512, 64, 4, 4)]
MICRO = 4096  # tokens of our micro-batches; TRL trains on the whole padded batch at once


def reward_of(text: str) -> float:
    return sum(x.isalpha() for x in text) / max(len(text), 1)


class LetterScorer(Scorer):
    """The share of letters in the response, in worker threads while sampling goes on."""

    def submit(self, rollout):
        text = rollout.turns[-1]["content"]
        return self.programs.submit(lambda: Reward(reward_of(text), "letters"))


class Ours:
    """One step as train_rl.py takes it, or, with a teacher, as train_mopd.py does."""

    def __init__(self, folder, teacher_folder, rows, rollouts, lengths, dist=None, share=True):
        self.dist = dist or Dist()
        self.model = load(folder, self.dist)
        self.tokenizer = Tokenizer(folder) if rows else None
        self.teacher = load_frozen(teacher_folder, self.dist) if teacher_folder else None
        freeze_routers(self.model)
        self.optimizer = make_optimizer(self.model, 1e-6, (0.9, 0.95), 0.0)
        self.rows, self.rollouts, self.lengths = rows, rollouts, lengths
        self.scorer, self.step, self.share = LetterScorer(), 0, share

    def __call__(self):
        model, self.step = self.model, self.step + 1
        with forced_decoder(self.lengths, self.rollouts):
            groups, _ = roll_out(
                model,
                self.tokenizer,
                self.rows,
                self.rollouts,
                Sampling(max(self.lengths)),
                self.step,
                range(len(self.rows)),
                self.scorer,
                self.dist,
            )
        rollouts = [x for group in groups for x in group]
        rewards = torch.tensor([x.reward for x in rollouts]).view(-1, self.rollouts)  # (p, r)
        advantages = group_advantages(rewards).flatten().tolist()
        for x, advantage in zip(rollouts, advantages, strict=True):
            x.advantage = advantage
        self.train(rollouts)

    def train(self, rollouts):
        """The training part of a step."""
        model, load = self.model, no_load(self.model)
        counts = [x.num_loss_tokens for x in rollouts]
        counts = torch.tensor(counts, device=self.dist.device)  # (o,)
        for batch in make_batches(rollouts, MICRO, self.dist.device, share=self.share):
            if self.teacher is not None:
                with torch.no_grad():
                    teacher_logprobs, _ = score_tokens(self.teacher, batch)
            routing = new_routing(model, batch)
            train_logprobs, _ = score_tokens(model, batch, 1.0, routing)
            if self.teacher is None:
                loss, _ = grpo_loss(
                    train_logprobs,
                    batch.advantages,
                    batch.mask,
                    num_tokens=int(counts.sum()),
                    sampler_logprobs=batch.sampler_logprobs,
                )
            else:
                loss, _ = compute_mopd_loss(
                    train_logprobs,
                    teacher_logprobs,
                    batch.sampler_logprobs,
                    batch.mask,
                    response_ids=batch.response_ids,
                    num_tokens=counts,
                    num_responses=len(rollouts),
                )
            loss.backward()
            load += routing.tokens_per_expert(batch.copies, model.config.num_experts)
        optimizer_step(model, self.optimizer, 1e-6, 1.0, self.dist)
        update_correction_bias(model, load, 1e-3)


def make_trainer(folder, teacher_folder, rows, rollouts, lengths, steps, callback, out):
    """TRL's trainer on the same directory, its generate forced to the same lengths."""
    import datasets
    import transformers
    import trl

    datasets.disable_progress_bars()
    logging.disable(logging.WARNING)
    tokenizer, reader = transformers.AutoTokenizer.from_pretrained(folder), Tokenizer(folder)
    prompts = [
        reader.render_text(x["responses_create_params"]["input"], None, True, True) for x in rows
    ]
    ids = [reader.render(x["responses_create_params"]["input"], None, True, True)[0] for x in rows]
    assert tokenizer(prompts[0], add_special_tokens=False).input_ids == ids[0], "other prompts"
    model = common.peer(folder)
    plain, eos = model.generate, reader.eos_ids[0]

    def generate(input_ids, **options):
        assert len(input_ids) == len(lengths), "TRL splits the batch"
        forced = forced_lengths(lengths, input_ids.shape[1], eos, tokenizer.pad_token_id)
        return plain(input_ids, logits_processor=forced, **options)

    model.generate = generate
    settings = dict(
        output_dir=out,
        per_device_train_batch_size=len(lengths),
        max_steps=steps,
        use_cpu=True,
        max_completion_length=max(lengths),
        temperature=1.0,
        top_p=1.0,
        top_k=0,
        bf16=False,
        learning_rate=1e-6,
        gradient_checkpointing=False,
        report_to="none",
        save_strategy="no",
        logging_steps=1000,
        disable_tqdm=True,
        log_level="error",
        optim="adamw_torch_fused",
        max_grad_norm=1.0,
    )
    data = datasets.Dataset.from_dict({"prompt": prompts * (2 if len(prompts) == 1 else 1)})
    shared = dict(train_dataset=data, processing_class=tokenizer, callbacks=[callback])
    if teacher_folder:
        return trl.DistillationTrainer(
            model, common.peer(teacher_folder), trl.DistillationConfig(**settings), **shared
        )
    args = trl.GRPOConfig(num_generations=rollouts, beta=0.0, **settings)

    def reward(completions, **_):
        return [reward_of(x) for x in completions]

    return trl.GRPOTrainer(model, reward, args, **shared)


def compare(name, folder, teacher_folder, rows, rollouts, lengths, cfg):
    """Alternates TRL's steps with ours; the first pair warms up and is not counted."""
    from transformers import TrainerCallback

    shared, separate = (
        Ours(folder, teacher_folder, rows, rollouts, lengths, share=share)
        for share in (True, False)
    )
    times, cpu = [], []  # seconds of (TRL, ours with shared prompts, ours without), each step

    class Alternate(TrainerCallback):
        begun = time.perf_counter()

        def on_step_begin(self, *_, **__):
            self.start = time.perf_counter(), time.process_time()

        def on_step_end(self, args, state, control, **__):
            ends = [(time.perf_counter(), time.process_time())]
            for step in (shared, separate):
                step()
                ends.append((time.perf_counter(), time.process_time()))
            spans = [(b[0] - a[0], b[1] - a[1]) for a, b in pairwise([self.start, *ends])]
            times.append([wall for wall, _ in spans])
            cpu.append([spent for _, spent in spans])
            late = time.perf_counter() - self.begun > cfg.seconds
            control.should_training_stop |= late and len(times) > 3

    pairs = 1 if cfg.short else cfg.pairs
    with tempfile.TemporaryDirectory() as out:
        make_trainer(
            folder, teacher_folder, rows, rollouts, lengths, pairs + 1, Alternate(), out
        ).train()
    assert pairs + 1 >= len(times) > min(pairs, 3) - 1
    trl, ours, each = zip(*times[1:], strict=True)
    trl_cpu, ours_cpu, each_cpu = zip(*cpu[1:], strict=True)
    padding = row_steps([[0]] * len(rows), rollouts, lengths, len(lengths)) / sum(lengths)
    common.row(
        name,
        f"{statistics.median(ours):.2f} s",
        spread(ratios(ours, trl)),
        spread(ratios(ours_cpu, trl_cpu)),
        spread(ratios(each_cpu, trl_cpu)),
        spread(ratios(ours_cpu, each_cpu)),
        str(len(ours)),
        f"{padding:.2f}",
    )


def stored_rollouts(prompt: int, lengths: list[int], size: int) -> list[Rollout]:
    """Random responses of these lengths in groups of `size`, to prompts of so many tokens."""
    texts = common.random_prompts(len(lengths) // size, prompt, prompt)
    rollouts = []
    for i, (n, answer) in enumerate(
        zip(lengths, common.random_prompts(len(lengths), max(lengths), max(lengths)), strict=True)
    ):
        mask = [False] * prompt + [True] * n
        x = Rollout({}, texts[i // size] + answer[:n], prompt, mask, [-6.0] * (prompt + n))
        x.advantage = i % size - (size - 1) / 2
        rollouts.append(x)
    return rollouts


def compare_training(name, folder, teacher_folder, rollouts, cfg):
    """Our training step alone: each prompt computed once, against once for each response."""
    sides = [Ours(folder, teacher_folder, [], 1, [1], share=share) for share in (True, False)]
    steps = [partial(x.train, rollouts) for x in sides]
    shared, separate, cpu = common.alternate(*steps, cfg, lambda: None)
    peaks = []
    for step in steps:  # a second step: the moments are there
        with Meter() as meter:
            step()
        peaks.append(meter.peak / 2**20)
    common.row(
        name,
        f"{statistics.median(shared):.2f} s",
        spread(ratios(shared, separate)),
        spread(cpu),
        str(len(shared)),
        f"{peaks[0]:.0f}, {peaks[1]:.0f}",
    )


def main():
    cfg = common.options(
        losses=(["grpo", "mopd"], "grpo, mopd"),
        shapes=(["equal", "unequal"], "equal, unequal"),
        tables=(["whole", "training"], "whole steps against TRL, our training step alone"),
        longest=(["128"], "the longest response"),
    )
    if "whole" in cfg.tables:
        whole_steps(cfg)
    if "training" in cfg.tables:
        training_steps(cfg)


def training_steps(cfg):
    """Prompt, response and group lengths: a toy's, longer prompts, and a prompt that is short."""
    common.table("case", "a step", "ratio", "of CPU time", "pairs", "peak MB: once, for each")
    cases = [(8, 8, 4, 2)] if cfg.short else TRAINING
    for family in cfg.families:
        with common.model_dir(family) as folder, common.model_dir(family, seed=1) as teacher:
            for prompt, response, size, groups in cases:
                rollouts = stored_rollouts(prompt, [response] * (size * groups), size)
                for loss in cfg.losses:
                    name = f"{family} {loss}: {prompt} + {response}, {groups} x {size}"
                    taught = teacher if loss == "mopd" else None
                    compare_training(name, folder, taught, rollouts, cfg)


def whole_steps(cfg):
    """Steps with their rollouts, against TRL's."""
    common.table(
        "case",
        "a step",
        "ratio to TRL",
        "of CPU time",
        "with a prompt for each response",
        "once to each",
        "pairs",
        "padding of responses alone",
    )
    p, r, longest = (2, 2, 8) if cfg.short else (8, 8, int(cfg.longest[0]))
    with tempfile.TemporaryDirectory() as folder:
        build_toy_tokenizer(folder, vocabulary())
        tokenizer = Tokenizer(folder)
    config = {
        "vocab_size": tokenizer.vocab_size,
        "eos_token_id": list(tokenizer.eos_ids),
        "pad_token_id": tokenizer.special_ids["<|endoftext|>"],
    }
    unequal = common.lengths(p * r, longest)
    for family in cfg.families:
        with (
            common.model_dir(family, tokenizer, **config) as folder,
            common.model_dir(family, tokenizer, seed=1, **config) as teacher,
        ):
            for loss in cfg.losses:
                for shape in cfg.shapes:
                    lengths = unequal
                    if shape == "equal":
                        lengths = [round(sum(unequal) / len(unequal))] * (p * r)
                    # TRL's distillation draws one response a prompt
                    prompts, rollouts = (p, r) if loss == "grpo" else (p * r, 1)
                    compare(
                        f"{family} {loss} {shape} {prompts}x{rollouts}",
                        folder,
                        teacher if loss == "mopd" else None,
                        make_rows("math", prompts),
                        rollouts,
                        lengths,
                        cfg,
                    )


if __name__ == "__main__":
    main()
