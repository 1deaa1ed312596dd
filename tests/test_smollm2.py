"""SmolLM2-135M-Instruct, a real pretrained model, gives the numbers that transformers gives.

NANOCASCADE_SMOLLM2 names its directory (llama family); skipped without it or transformers.
"""

import math
import os
from pathlib import Path

import pytest
import torch

from nanocascade.checkpoint.weights import load_model, save_model
from nanocascade.data.batch import make_batches
from nanocascade.data.episode import Rollout
from nanocascade.data.rows import read_rows
from nanocascade.engine.forward import score_tokens
from nanocascade.sampler import generate
from nanocascade.tokenizer.tokenizer import Tokenizer

SOURCE = os.environ.get("NANOCASCADE_SMOLLM2", "")
GSM8K = Path(__file__).parents[2] / "shared" / "data" / "gsm8k" / "train.jsonl"
needs_gsm8k = pytest.mark.skipif(not GSM8K.exists(), reason="GSM8K is not beside the repository")
pytestmark = [pytest.mark.nightly, pytest.mark.skipif(not SOURCE, reason="no NANOCASCADE_SMOLLM2")]
TEXTS = [
    "The capital of France is Paris, and",
    "def f(x):\n\treturn x ** 2\n",
    "12 * 12 = 144.",
    "caf\u00e9 \u4f60\u597d \U0001f600 <|im_end|>",
    "One sentence, several times over. " * 30,
]
QUESTIONS = ["What is 7 + 5?", "Hi", "Name three colours.", "Write a Python function that adds."]


@pytest.fixture(scope="module")
def pair():
    """(ours, theirs, tokenizer) in fp32."""
    auto = pytest.importorskip("transformers").AutoModelForCausalLM
    theirs = auto.from_pretrained(SOURCE, dtype=torch.float32).eval()
    with torch.no_grad():
        yield load_model(SOURCE).eval(), theirs, Tokenizer(SOURCE)


def test_logits_equal_transformers(pair, tmp_path):
    """Logits agree to 1e-4, and those of what save_model writes are bit for bit the same."""
    ours, theirs, tokenizer = pair
    save_model(ours, tmp_path, tokenizer)
    saved = type(theirs).from_pretrained(tmp_path, dtype=torch.float32).eval()
    for text in TEXTS:
        ids = torch.tensor([tokenizer.encode(text)])
        want = theirs(ids).logits
        assert (ours.logits(ours(ids)) - want).abs().max() < 1e-4
        assert saved(ids).logits.equal(want)


@needs_gsm8k
def test_bits_per_byte_equal_transformers(pair):
    """GSM8K packed as in training costs the bits that transformers counts document by document."""
    ours, theirs, tokenizer = pair
    rows = [row for row, _ in zip(read_rows(GSM8K), range(12), strict=False)]
    texts = [f"{row['question']}\n{row['answer']}" for row in rows]
    documents = [tokenizer.encode(text) for text in texts]
    num_bytes = sum(len(text.encode()) for text in texts)
    rollouts = [Rollout({}, ids, 0, [True] * len(ids)) for ids in documents]
    packed = sum(-score_tokens(ours, x)[0][x.mask].sum() for x in make_batches(rollouts, 1024))
    single = sum(
        theirs(x, labels=x).loss * (x.shape[1] - 1)
        for x in (torch.tensor([ids]) for ids in documents)
    )
    bits = [float(x) / math.log(2) / num_bytes for x in (packed, single)]
    assert bits[0] == pytest.approx(bits[1], rel=1e-5) and 0.5 < bits[0] < 1.5


def test_greedy_answers_equal_transformers(pair):
    """A batch of mixed lengths continues token for token as each prompt does in `generate`."""
    ours, theirs, tokenizer = pair
    prompts = [
        tokenizer.render([{"role": "user", "content": x}], add_generation_prompt=True)[0]
        for x in QUESTIONS
    ]
    samples = generate(
        ours, prompts, max_new_tokens=32, temperature=0.0, stop_ids=tokenizer.eos_ids
    )
    for prompt, (sample,) in zip(prompts, samples, strict=True):
        out = theirs.generate(torch.tensor([prompt]), max_new_tokens=32, do_sample=False)
        assert sample.tokens == out[0, len(prompt) :].tolist()
    assert "12" in tokenizer.decode(samples[0][0].tokens)
