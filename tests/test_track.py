"""What a run leaves for people to look at: token records of rollouts, and trackers."""

import json
import os
import subprocess
import sys

import pytest
import tokenizers
from fixtures.toy_runs import ROOT
from tokenizers import decoders, models
from tokenizers.pre_tokenizers import ByteLevel

from nanocascade.data.batch import make_batches
from nanocascade.data.episode import Rollout
from nanocascade.engine.update import keep_token_values
from nanocascade.run import track
from nanocascade.run.records import LOGGED_TOKENS, rollout_record, token_texts
from nanocascade.run.settings import read_settings
from nanocascade.run.track import Trackers, check_trackers
from nanocascade.stages import RL


class Letters:
    """A tokenizer whose ids are the letters of the alphabet."""

    def decode(self, ids):
        return "".join(chr(97 + i) for i in ids)


def make_rollout(num_prompt, num_response, **more):
    tokens = [i % 26 for i in range(num_prompt + num_response)]
    mask = [False] * num_prompt + [True] * num_response
    values = {"row": {"id": "1", "domain": "math"}, "tokens": tokens, "prompt_length": num_prompt}
    return Rollout(**values, mask=mask, sampler_logprobs=[0.0] * len(tokens), **more)


def test_token_values_return_to_their_rollouts():
    """Values of packed batches reach the rollout whose tokens they belong to, in order; a rollout
    that is not logged, or has no loss, gets none. A token's value is its id plus 0.5."""
    sizes = ((2, 5), (3, 40), (1, 2), (2, 2))
    rollouts = [make_rollout(n, m, token_values={}) for n, m in sizes]
    rollouts[2].token_values, rollouts[3].loss = None, False
    for batch in make_batches(rollouts, micro_tokens=64):
        keep_token_values(batch, rollouts, {"train": batch.targets + 0.5})
    for x in rollouts[:2]:
        response = x.tokens[x.prompt_length :]
        assert x.token_values["train"][-len(response) :] == [i + 0.5 for i in response]
    assert rollouts[2].token_values is None and rollouts[3].token_values == {}


def test_rollout_record():
    """A record holds one entry for each response token, its loss, and values rounded to four
    digits: of tokens a b c | d e f with values 1 2 3 4 5 (of b to f), those of d to f."""
    values = [1.0, 2.0, 3.00004, 4.0, 0.123456789]
    x = make_rollout(3, 3, token_values={"entropy": values}, reward=1.0, stop_reason="stop")
    x.mask[4] = False
    record = rollout_record(x, 7, 1, Letters())
    assert record["prompt"] + record["response"] == "abcdef" and record["step"] == 7
    tokens = {"text": ["d", "e", "f"], "loss": "101", "entropy": [3.0, 4.0, 0.1235]}
    assert record["tokens"] == tokens
    x.loss = False  # an overlong response that the filter takes out of the loss
    assert rollout_record(x, 7, 1, Letters())["tokens"]["loss"] == "000"
    x.token_values = None
    assert "tokens" not in rollout_record(x, 7, 1, Letters())
    n = LOGGED_TOKENS + 9
    long = make_rollout(2, n, token_values={"entropy": [0.0] * (n + 1)})
    record = rollout_record(long, 0, 0, Letters())
    assert {len(x) for x in record["tokens"].values()} == {LOGGED_TOKENS}
    assert len(record["response"]) == n


@pytest.mark.parametrize("kind", ["bytes", "words"])
def test_token_texts(kind):
    """Texts of tokens add up to the decoded whole: a character of three tokens belongs to the last
    one, and a decoder that drops a leading space loses none."""
    if kind == "bytes":
        pieces = ByteLevel(add_prefix_space=False).pre_tokenize_str("a\u20acb")
        written = "".join(piece for piece, _ in pieces)
        vocabulary = {x: i for i, x in enumerate(written)}
        parts, ids = [decoders.ByteLevel()], [0, 1, 2, 3, 4]
        expected = ["a", "", "", "\u20ac", "b"]
    else:
        vocabulary = {x: i for i, x in enumerate(["\u2581two", "\u2581words", "s", "<unk>"])}
        parts, ids, expected = [decoders.Metaspace()], [0, 1, 2], ["two", " words", "s"]
    tokenizer = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token=None))
    tokenizer.decoder = decoders.Sequence(parts)
    assert token_texts(ids, tokenizer) == expected
    assert "".join(expected) == tokenizer.decode(ids)
    half = token_texts(ids[:3], tokenizer)  # cut off inside a character
    assert "".join(half) == tokenizer.decode(ids[:3])


def test_check_trackers(monkeypatch):
    """An unknown tracker and a missing package are refused by name, with the pip command."""
    with pytest.raises(ValueError, match="--track mlflow: expected tensorboard or wandb"):
        read_settings(RL, argv=["--track", "mlflow"])
    monkeypatch.setattr(track.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="--track wandb needs a package: pip install wandb"):
        check_trackers(("wandb",))


RECORDS = [
    {
        "step": 0,
        "domain": "math",
        "prompt": "1+1?",
        "response": f"answer {i}",
        "reward": 1.0,
        "reason": "correct",
        "advantage": 0.5,
    }
    for i in range(2)
]


def test_failing_tracker(monkeypatch, tmp_path, capsys):
    """A tracker that cannot start, or fails later, is switched off with one line of warning each;
    the other one goes on."""

    class Broken:
        def __init__(self, *args):
            self.steps = 0

        def step(self, *args):
            self.steps += 1
            raise ConnectionError("no\nnetwork")

    class Unstartable:
        def __init__(self, *args):
            raise PermissionError("not logged in")

    monkeypatch.setattr(track, "TensorBoard", Broken)
    monkeypatch.setattr(track, "WandB", Unstartable)
    trackers = Trackers(("tensorboard", "wandb"), tmp_path, "if_rl", {}, 0)
    broken = trackers.active["tensorboard"]
    trackers.call("step", 0, {"entropy": 1.0}, RECORDS)
    trackers.call("step", 1, {"entropy": 1.0}, RECORDS)
    trackers.call("finish", {})
    assert broken.steps == 1 and not trackers.active
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 and "wandb" in lines[0] and "no\\nnetwork" in lines[1]


def test_tensorboard(tmp_path):
    """Scalars, config, manifest and rollouts are read back from the event files; a run resumed at
    step 1 replaces what stood after it."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for first, values in ((0, (0.5, 0.6)), (1, (0.7,))):
        trackers = Trackers(("tensorboard",), tmp_path, "if_rl", {"lr": 1e-3}, first)
        for step, x in enumerate(values, first):
            metrics = {"entropy": x, "memory/peak_gib": [1.0, 2.0]}
            trackers.call("step", step, metrics, RECORDS)
    trackers.call("finish", {"stage": "if_rl", "seconds": 3})
    events = EventAccumulator(str(tmp_path / "tensorboard"), size_guidance={"tensors": 0})
    events.Reload()
    found = [(x.step, x.value) for x in events.Scalars("entropy")]
    assert found == [(0, pytest.approx(0.5)), (1, pytest.approx(0.7))]
    assert [x.value for x in events.Scalars("memory/peak_gib/1")] == [2.0, 2.0]
    texts = {
        tag: events.Tensors(tag)[0].tensor_proto.string_val[0].decode()
        for tag in events.Tags()["tensors"]
    }
    assert '"lr": 0.001' in texts["config/text_summary"]
    assert '"seconds": 3' in texts["manifest/text_summary"]
    assert "answer 0" in texts["rollouts/math/text_summary"]
    assert texts["rollouts/math/text_summary"].endswith("    1+1?answer 0")


def test_wandb(tmp_path):
    """In offline mode a Weights & Biases run leaves its file, with metrics, config and manifest,
    below the run's directory; a resumed run goes on under the same id."""
    pytest.importorskip("wandb")
    program = """if True:
        import sys
        from pathlib import Path
        from nanocascade.run.track import Trackers
        first = int(sys.argv[2])
        trackers = Trackers(("wandb",), Path(sys.argv[1]), "if_rl", {"lr_of_test": 1}, first)
        record = {"step": 0, "domain": "math", "prompt": "1+1?", "response": "two of test",
                  "reward": 1.0, "reason": "correct", "advantage": 0.5}
        trackers.call("step", first, {"entropy_of_test": 0.5, "list": [1.0, 2.0]}, [record])
        trackers.call("finish", {"manifest_of_test": 1})
        assert trackers.active, "a tracker failed"
    """
    ids = []
    for first in ("0", "1"):
        command = [sys.executable, "-c", program, tmp_path, first]
        offline = {"WANDB_MODE": "offline", "WANDB_SILENT": "true", "PYTHONPATH": str(ROOT)}
        subprocess.run(command, check=True, env=os.environ | offline, cwd=tmp_path, timeout=300)
        ids.append((tmp_path / "wandb_id.txt").read_text())
    assert ids[0] == ids[1] and len(ids[0]) == 12
    files = [*tmp_path.glob(f"wandb/offline-run-*-{ids[0]}/run-*.wandb")]
    assert len(files) == 2
    for name in (b"entropy_of_test", b"list/1", b"lr_of_test", b"manifest_of_test"):
        assert all(name in x.read_bytes() for x in files)
    tables = [*tmp_path.glob("wandb/offline-run-*/files/media/table/rollouts_*.json")]
    assert tables and "two of test" in json.dumps([json.loads(x.read_text()) for x in tables])
