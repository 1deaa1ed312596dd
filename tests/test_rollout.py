"""Episodes: what carries loss over several turns, which groups a step keeps, what is measured."""

import random
import threading
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from fixtures import make_parity
from torch.nn import Identity

from nanocascade import teachers
from nanocascade.checkpoint.weights import load_model
from nanocascade.data.batch import make_batches
from nanocascade.data.episode import Rollout, Sampling
from nanocascade.data.rows import conversation
from nanocascade.data.stream import PromptStream
from nanocascade.engine.distributed import Dist
from nanocascade.rewards import checked_row, score_group
from nanocascade.rollouts import groups as drawing
from nanocascade.rollouts import rollout
from nanocascade.rollouts.groups import MAX_DRAWS
from nanocascade.rollouts.rollout import roll_out
from nanocascade.rollouts.scoring import NOT_SCORED, GroupVerdicts, Scorer
from nanocascade.run import evaluate as evaluation
from nanocascade.run.log import show_rollout
from nanocascade.run.rows import check_prompts
from nanocascade.sampler import Sample, step_seed
from nanocascade.sandbox import sandbox
from nanocascade.tokenizer.chat import parse_response
from nanocascade.tokenizer.tokenizer import Tokenizer
from nanocascade.toy import tasks
from nanocascade.toy.judge import rule_judge
from nanocascade.toy.start import build_toy_tokenizer
from nanocascade.toy.words import assistant, call_tool

ALONE = Dist(0, 1, "cpu")
ROWS = (tasks.tools(random.Random(i)) for i in range(40))  # (row, good, slip)
ROW, GOOD, _ = next(x for x in ROWS if len(x[0]["ground_truth"]) == 2)  # look, order
ROW = checked_row(ROW | {"domain": "tools"})
SPOKEN = [x for x in GOOD if x["role"] == "assistant"]
RIGHT, WRONG, MIXED = (1.0, 1.0), (0.0, 0.0), (0.0, 1.0)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer")
    build_toy_tokenizer(path, tasks.vocabulary())
    return Tokenizer(path)


def written(tokenizer, *messages):
    """The ids a model would sample for assistant messages, <|im_end|> included."""
    turns = [tokenizer.render([{"role": "user", "content": "q"}, x]) for x in messages]
    return [x for ids, mask in turns for x, own in zip(ids, mask, strict=True) if own]


def play(tokenizer, monkeypatch, limit, *scripts, max_turns=4, row=ROW):
    """The episodes of row in which prompt p says scripts[p], turn by turn."""
    turns = [iter(x) for x in scripts]

    def fake(model, prompts, *, num_samples=1, max_new_tokens, row_ids, on_sample, **_):
        for i, row_id in enumerate(row_ids):
            n = max_new_tokens if isinstance(max_new_tokens, int) else max_new_tokens[i]
            said = next(turns[row_id if row_id < 1 << 20 else (row_id >> 20) - 1])
            ids = written(tokenizer, said)[:n]
            reason = "stop" if ids[-1] in tokenizer.eos_ids else "length"
            experts = torch.zeros(len(prompts[i]) + len(ids) - 1, 1, 1)  # (t, l, a)
            logprobs = [-1.0 - j / 128 for j in range(len(ids))]
            on_sample(i, 0, Sample(ids, logprobs, None, reason, experts))

    monkeypatch.setattr(rollout, "generate", fake)
    sampling, ids = Sampling(limit, max_turns=max_turns), list(range(len(scripts)))
    groups, _ = roll_out(Identity(), tokenizer, [row] * len(ids), 1, sampling, 0, ids, Scorer())
    return [x for (x,) in groups]


def test_parity_episode(tokenizer, monkeypatch):
    """Three turns with tool results between them are, token by token, the rendered conversation,
    and exactly the model's own tokens carry loss and log-probs; the right calls earn 1."""
    (x,), (messages, tools) = play(tokenizer, monkeypatch, 500, SPOKEN), conversation(ROW)
    ids, mask = tokenizer.render(messages + GOOD, tools)
    n, said = len(x.tokens), written(tokenizer, *SPOKEN)
    assert x.tokens == ids[:n] and x.mask == [bool(y) for y in mask[:n]] and not any(mask[n:])
    assert [t["role"] for t in x.turns] == ["assistant", "tool", "assistant", "tool", "assistant"]
    assert (x.reward, x.outcome, x.reason, x.stop_reason) == (1.0, 1.0, "correct", "stop")
    assert x.response_length == x.num_loss_tokens == len(said)
    assert [y < 0 for y in x.sampler_logprobs] == x.mask
    expected = [-1.0 - j / 128 for turn in SPOKEN for j in range(len(written(tokenizer, turn)))]
    (batch,) = make_batches([x], 4096)
    assert batch.targets[batch.mask].tolist() == said
    assert batch.sampler_logprobs[batch.mask].tolist() == expected


def test_tool_loop_ends(tokenizer, monkeypatch):
    """An episode ends after max_turns turns, or where its own tokens are used up, whoever else is
    open, in a turn or by a tool's result: then it is cut off, and can still be replayed."""
    talk = partial(play, tokenizer, monkeypatch)
    for max_turns in (1, 2, 3):
        (x,) = talk(1000, SPOKEN[:1] * 9, max_turns=max_turns)
        assert len(x.turns) == 2 * max_turns - 1 and x.mask[-1] and x.reward == 0
    for limit in range(3, len(written(tokenizer, SPOKEN[0])) + 40):
        (x,) = talk(limit, SPOKEN)
        assert (x.stop_reason, x.reward, x.reason) == ("length", 0.0, "cut off"), limit
        (batch,) = make_batches([x], 4096, replay=True)
        assert batch.mask.sum() == x.response_length <= limit
    tensors = [
        v for v in vars(make_batches([x], 9, "meta", True)[0]).values() if hasattr(v, "device")
    ]
    assert len(tensors) == 10 and {v.device.type for v in tensors} == {"meta"}
    long = SPOKEN[0] | {"reasoning_content": "A B C D " * 10}
    limit = 2 * len(written(tokenizer, long))
    first, second = talk(limit, [long] * 4, SPOKEN)
    assert (first.stop_reason, second.stop_reason) == ("length", "stop")
    assert len(first.tokens) - first.prompt_length == limit


def test_episodes_in_a_repository(tokenizer, monkeypatch):
    """The toy's good episode of repair earns 1 and its slip 0, side by side: the edit of one is not
    there for the other to read; tool results carry no loss; and one in Python reads its output."""
    row, good, slip = tasks.agentic(random.Random(3))
    talk = partial(
        play,
        tokenizer,
        monkeypatch,
        400,
        row=row | {"domain": "swe_agentic", "kind": "swe_agentic"},
    )
    parts = [[x for x in part if x["role"] == "assistant"] for part in (good, slip)]
    again = [[*part[:2], part[0], part[2]] for part in parts]  # reads the file once more
    right, wrong = talk(*again)
    assert (right.reward, wrong.reward) == (1.0, 0.0)
    fixed, broken = ([t["content"] for t in x.turns if t["role"] == "tool"] for x in (right, wrong))
    assert fixed[0] == broken[0] == row["verifier_metadata"]["files"]["f.py"]
    fixes = [part[1]["reasoning_content"] for part in parts]
    for told, fix in zip((fixed, broken), fixes, strict=True):
        assert told[1:] == ["edited f.py", f"def f(x):\n    return {fix}\n"]
    assert right.response_length == len(written(tokenizer, *again[0]))
    row = tasks.math(random.Random(0))[0] | {"environment": {"name": "python"}}
    row |= {"domain": "math", "kind": "math"}
    program = f"print('{row['expected_answer']}')"
    program, _ = call_tool("run", "", "python", code=program)
    box = assistant("so", "\\boxed{%s}" % row["expected_answer"])
    (x,) = talk([program, box], row=row)
    assert x.turns[1] == {"role": "tool", "content": row["expected_answer"]} and x.reward == 1


def test_random_model_episodes(tokenizer, tmp_path):
    """A random model on every domain: aligned, with verdicts, and equal for equal seeds."""
    make_parity.write_checkpoint(tmp_path, make_parity.nemotron(vocab_size=tokenizer.vocab_size))
    model, rows = load_model(tmp_path), [x for d in tasks.DOMAINS for x in tasks.make_rows(d, 1)]
    sampling, ids = Sampling(6, return_experts=True), range(len(rows))
    runs = [roll_out(model, tokenizer, rows, 2, sampling, 7, ids, Scorer())[0] for _ in range(2)]
    for x, y in zip(*(sum(groups, []) for groups in runs), strict=True):
        assert x.tokens == y.tokens and 0 < x.response_length <= 6
        assert not any(x.mask[: x.prompt_length]) and len(x.experts) == len(x.tokens) - 1
        assert x.reason or x.domain == "preference"


def group(row, *outcomes):
    return [Rollout(row, [1, 2], 1, [False, True], outcome=y, reward=y) for y in outcomes]


def rows_of(*outcomes):
    prompt = {"responses_create_params": {"input": []}}
    return [{"id": i, "domain": "math", "outcomes": x, **prompt} for i, x in enumerate(outcomes)]


class Calls(list):
    """roll_out without a model: a row's outcomes stand in the row. It is a list of its calls."""

    def __call__(self, rows, num_samples, sampling=None, seed=0, row_ids=(), *_):
        self.append((len(rows), num_samples, seed, list(row_ids)))
        return [group(x, *x["outcomes"]) for x in rows], {"time/rollout": 1.0, "time/score": 0.5}


@pytest.fixture
def calls(monkeypatch):
    """roll_out without a model, in evaluations too."""
    heard = Calls()
    monkeypatch.setattr(evaluation, "roll_out", lambda model, tokenizer, *args: heard(*args))
    return heard


def collect(calls, rows, prompts, dynamic, dist=ALONE):
    args = PromptStream(rows, 0), prompts, 2, step_seed(0, 3), dist, dynamic
    groups, timing = drawing.collect_groups(calls, *args)
    order = [x["id"] for _, x in PromptStream(rows, 0).take(99)]
    return [g[0].row["id"] for g in groups], timing, order


@pytest.mark.parametrize("pairing", ["all", "circle"])
def test_pairs_are_asked_early(pairing):
    """A pair goes to the judge once both responses are there: 0 and 3 after the second one, a
    circle's when the group is complete; one that was cut off never. The rewards are score_group's
    own, and the outcome is that against the stored answer."""
    row = tasks.preference(random.Random(0))[0] | {
        "domain": "preference",
        "kind": "preference",
        "reference": "</think>no",
    }
    texts = ["<think>\na\n</think>\nThe cat is old.", "<think>\nb\n</think>\n", "<think>\nc"]
    texts += ["<think>\nd\n</think>\nThe cat is kind. It can swim. I hope this helps."]
    group = [Rollout(row, [1], 1) for _ in texts]
    asked, ends = [], ["stop", "stop", "length", "stop"]

    def judge(conversation, first, second):
        asked.append((first, second))
        return rule_judge(conversation, first, second)

    verdicts, seen = GroupVerdicts(Scorer(judge, 1, 1, pairing), group), []
    for r in (0, 3, 2, 1):
        group[r].turns, group[r].stop_reason = [{"role": "assistant", "content": texts[r]}], ends[r]
        known = {*verdicts.matches}
        verdicts.add(r)
        seen.append([pair for pair in verdicts.matches if pair not in known])
    late = {"all": [(0, 1), (1, 3)], "circle": [(0, 1), (1, 3), (3, 0)]}[pairing]
    assert seen == [[], [(0, 3)] * (pairing == "all"), [], late]
    verdicts.set_rewards(list)
    assert len(asked) == len(late) + (pairing == "all") + 2 * 3  # both orders with the reference
    expected = score_group(
        row,
        texts,
        rule_judge,
        pairing=pairing,
        finished=[x == "stop" for x in ends],
        thought_lengths=[1] * 4,
        answer_lengths=[len(parse_response(x)["content"]) for x in texts],
    )
    assert [(x.reward, x.reason) for x in group] == [tuple(x) for x in expected]
    assert [x.outcome for x in group] == [1.0, 0.5, 0.0, 1.0]  # a blank answer is as bad as "no"


@pytest.mark.parametrize("concurrency", [1, 3])
def test_judge_concurrency(concurrency):
    """As many questions as --judge_concurrency are with the judge at once, and no more."""
    (row,) = tasks.make_rows("preference", 1)
    turn = {"role": "assistant", "content": "</think>The cat is old."}
    group = [Rollout(row, [1], 1, turns=[turn], stop_reason="stop") for _ in range(4)]
    full, open_, most = threading.Event(), [], []

    def judge(conversation, first, second):
        open_.append(1)
        most.append(len(open_))
        if len(open_) == concurrency:
            full.set()
        assert full.wait(60)  # until all that may be asked are
        open_.pop()
        return rule_judge(conversation, first, second)

    verdicts = GroupVerdicts(Scorer(judge, judge_concurrency=concurrency), group)
    for i in range(4):
        verdicts.add(i)
    for verdict in verdicts.matches.values():
        verdict.result()
    assert max(most) == concurrency


def test_score_workers(monkeypatch):
    """--score_workers programs run at once; by default the cores, shared by the ranks."""
    monkeypatch.setattr(sandbox.os, "sched_getaffinity", lambda _: range(7), raising=False)
    for ranks, share in (("1", 7), ("2", 3), ("16", 1)):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", ranks)
        assert sandbox.share_of_cores() == share
    monkeypatch.setattr(sandbox, "shared", {})
    made = []
    monkeypatch.setattr(sandbox, "Sandbox", lambda n, **_: made.append(n) or SimpleNamespace(n=n))
    assert sandbox.shared_sandbox(5).n == 5 == sandbox.shared_sandbox(2).n  # made once
    sandbox.shared.clear()
    sandbox.shared_sandbox()
    assert made == [5, 1]
    barrier, scorer = threading.Barrier(3), Scorer(workers=3)  # none passes before three are there
    assert sorted(scorer.programs.map(lambda _: barrier.wait(60), range(3))) == [0, 1, 2]


def test_dynamic_filtering(calls):
    """Groups all right or all wrong are replaced by the stream's next prompts, in its order, each
    with a position of its own; after MAX_DRAWS times the prompts it stops with what it has."""
    rows = rows_of(RIGHT, MIXED, WRONG, MIXED, MIXED, RIGHT, MIXED, (0.5, 0.5))
    kept, timing, order = collect(calls, rows, 4, dynamic=True)
    assert kept == [i for i in order if rows[i]["outcomes"] == MIXED][:4]
    tried, outcomes = timing["group/tried"], sum(([*rows[i]["outcomes"]] for i in order), [])
    assert sum((x[3] for x in calls), []) == list(range(tried)) and tried > 4
    assert timing["outcome/drawn"] == pytest.approx(sum(outcomes[: 2 * tried]) / 2 / tried)
    drawn = [rows[i]["outcomes"] for i in order[:tried]]  # those that were dropped too
    for name, alike in (("right", RIGHT), ("wrong", WRONG)):
        assert timing[f"group/all_{name}"] == drawn.count(alike) / tried > 0
    assert calls[1][0] == 4 - sum(rows[i]["outcomes"] == MIXED for i in order[:4]) < 4
    assert {x[2] for x in calls} == {step_seed(0, 3)} != {step_seed(1, 3)}
    two = SimpleNamespace(**{k: getattr(ALONE, k) for k in ("shard", "sum")})  # ranks
    two.gather = lambda x: [x, ({"time/rollout": 9.0, "time/score": 0.0}, [])]
    slow, times = collect(calls, rows, 4, True, two)[1], ("time/rollout", "time/score")
    assert [slow[k] for k in times] == [9.0, 0.0] != [timing[k] for k in times]
    kept, timing, order = collect(calls, rows, 4, dynamic=False)
    assert kept == order[:4] and timing["group/tried"] == 4
    kept, timing, order = collect(calls, rows_of(*[WRONG] * 5), 3, dynamic=True)
    assert timing["group/tried"] == 3 * MAX_DRAWS and kept == order[: 3 * MAX_DRAWS][-3:]
    kept, timing, _ = collect(calls, rows_of(MIXED, *[RIGHT] * 7), 3, dynamic=True)
    assert kept in ([0], [0, 0]) and timing["group/tried"] >= 3 * MAX_DRAWS


def test_numbers_masks(calls):
    """penalty leaves cut off responses in the loss, filter does not; a prompt with no outcome above
    the threshold leaves it; rows solved more often than the maximum leave before training."""
    groups = [group({}, *MIXED), group({}, 0.5, 0.0)]
    groups[0][1].stop_reason = "length"
    kept = [[1, 1], [1, 1]]
    for mode, expected in (("penalty", kept), ("off", kept), ("filter", [[1, 0], [1, 1]])):
        drawing.mask_overlong(groups, mode)
        assert [[x.num_loss_tokens for x in g] for g in groups] == expected
    drawing.mask_unsolved(groups, 0.5)
    assert [[x.loss for x in g] for g in groups] == [[True, False], [False, False]]


def test_numbers_in_reach(calls):
    """Of rows solved 1, 3/4, 1/2 and 0 of the time those above the maximum leave, and of many that
    are never solved all but a tenth, the same ones again; a known pass_rate is not measured."""
    rows = rows_of(RIGHT, (1.0, 0.5), MIXED, *[WRONG] * 300) + [{"id": "known", "pass_rate": 1.0}]

    def reach(**limits):
        recipe = SimpleNamespace(pass_samples=2, **limits)
        kept = drawing.filter_by_pass_rate(calls, rows, recipe, 0, ALONE)
        return [rows[i] for i in kept]

    assert reach(max_pass_rate=0.74, keep_unsolved=1.0) == rows[2:-1]
    assert calls == [(303, 2, step_seed(0, -1), list(range(303)))]
    kept = reach(max_pass_rate=0.75, keep_unsolved=0.1)
    assert kept[:2] == rows[1:3] and 12 <= len(kept[2:]) <= 48
    assert kept == reach(max_pass_rate=0.75, keep_unsolved=0.1)
    assert reach(max_pass_rate=1.0, keep_unsolved=0.0) == [*rows[:3], rows[-1]]
    rows = rows[3:]
    with pytest.raises(ValueError, match="all 301 rows are too easy or too hard"):
        reach(max_pass_rate=0.5, keep_unsolved=0.0)


def test_numbers_metrics(calls):
    """Groups of math (1, 1), (0, 1/2) whose 0 has reward -1, and mcqa (0, 0): means over responses.
    Prompt means 1, 1/2, 0, 1/2: std^2 (1/4 + 1/4) / 3, interval 1.96 std / sqrt(4)."""
    domains = {"math": [RIGHT, (0.0, 0.5)], "mcqa": [WRONG]}
    groups = [group({"domain": d}, *x) for d, xs in domains.items() for x in xs]
    vars(groups[1][0]).update(stop_reason="length", reward=-1.0, mask=[False, True, True, True])
    assert drawing.rollout_metrics(groups, ALONE) == pytest.approx(
        {
            "reward/mean": 1.5 / 6,
            "reward/mean/math": 0.375,
            "reward/mean/mcqa": 0.0,
            "reward/std/math": (2.6875 / 4) ** 0.5,
            "reward/std/mcqa": 0.0,
            "outcome/math": 0.625,
            "outcome/mcqa": 0.0,
            "response/length": 8 / 6,
            "response/truncated": 1 / 6,
        }
    )
    for x in groups[2]:
        x.outcome, x.reason = None, NOT_SCORED
    assert "reward/mean/mcqa" not in drawing.rollout_metrics(groups, ALONE)
    rows = rows_of(RIGHT, MIXED, WRONG, MIXED) + [{"domain": "if", "outcomes": RIGHT}]
    result, _ = evaluation.evaluate(None, None, rows, 2, None, 5, None)
    assert result["math"] == pytest.approx({"mean": 0.5, "n": 4, "interval": 0.98 * (1 / 6) ** 0.5})
    assert result["if"] == pytest.approx({"mean": 1.0, "n": 1, "interval": 1.96})
    assert calls == [(5, 2, 5, [0, 1, 2, 3, 4])]


def test_numbers_teachers(monkeypatch, tmp_path):
    """A domain's own teacher comes before its group's and that before the default; two names of
    one directory share one frozen copy; the rollouts of a step are split by teacher."""
    given = {"if": "a", "multi_domain": "b", "default": "b"}
    domains = ("math", "if", "tools", "code")
    of = {"math": "default", "if": "if", "tools": "multi_domain", "code": "default"}
    assert teachers.assign_teachers(given, domains) == of
    assert teachers.assign_teachers({"if": "a"}, domains) == {"if": "if"}
    monkeypatch.setattr(teachers, "sha256_of", str)
    monkeypatch.chdir(tmp_path)
    for name in "ab":
        (tmp_path / name).mkdir()
    found = teachers.Teachers(("if=a", "multi_domain=b", "default=./b"), (), domains, ALONE)
    assert found.teacher_of == of and found.models["multi_domain"] is found.models["default"]
    assert found.models["if"] is not found.models["default"]
    parts = found.split([Rollout({"domain": d}, [], 0) for d in (*domains, "code")])
    assert {name: [x.domain for x in part] for name, part in parts} == {
        "default": ["math", "code", "code"],
        "if": ["if"],
        "multi_domain": ["tools"],
    }


def test_numbers_best_teacher(monkeypatch):
    """The checkpoint of the best mean score, and the shares of tokens and prompts."""
    means = {"a": {"if": 0.9, "mcqa": 0.1}, "b": {"if": 0.5, "mcqa": 0.6}, "c": {"if": 0.4}}
    evaluations = {k: {d: {"after": {"mean": y}} for d, y in x.items()} for k, x in means.items()}
    monkeypatch.setattr(teachers, "read_json", lambda x: {"evaluation": evaluations[x.parts[0]]})
    assert teachers.best_checkpoint(["a", "b"], ["if", "mcqa"]) == "b"
    assert teachers.best_checkpoint(["a", "b"], ["if"]) == "a"
    with pytest.raises(ValueError, match="no evaluation of mcqa"):
        teachers.best_checkpoint(["a", "c"], ["if", "mcqa"])
    sizes = [("math", 3), ("math", 1), ("math", 2), ("if", 6)]
    rollouts = [Rollout({"domain": d}, [], 0, [True] * n) for d, n in sizes]
    assert teachers.token_shares(rollouts, ALONE) == {
        "mopd/token_share/math": 0.5,
        "mopd/token_share/if": 0.5,
        "mopd/prompt_share/math": 0.75,
        "mopd/prompt_share/if": 0.25,
    }


def test_prompts_are_checked_as_they_will_be_rendered():
    """A template may write more where there is no thought: 19 tokens instead of 13."""

    class TwoLengths:
        def render_text(self, messages, tools, thinking, add_generation_prompt):
            return "x" * (13 if thinking else 19)

        def render(self, *arguments):
            return [0] * len(self.render_text(*arguments)), None

    row = {"id": "a", "responses_create_params": {"input": [{"role": "user", "content": "Hi"}]}}
    for thinking, context in ((True, 53), (False, 59)):
        sampling = Sampling(max_new_tokens=40, thinking=thinking)
        check_prompts([row], TwoLengths(), sampling, context)
        with pytest.raises(ValueError, match="row a: 1[39] tokens . 40 new ones"):
            check_prompts([row], TwoLengths(), sampling, context - 1)


def test_a_masked_response_is_not_painted(tokenizer):
    """Green are the tokens with a loss: none in a response that has left the loss."""
    rollout = Rollout({"domain": "math"}, [5, 6], 1, [False, True], [0.0, -1.0])
    assert "\033[32m" in show_rollout(rollout, tokenizer, 0)
    rollout.loss = False
    assert "\033[32m" not in show_rollout(rollout, tokenizer, 0)
