"""The page of a run or a cascade: what it reads, what it leaves out, and that texts stay texts."""

import base64
import hashlib
import json
import re
import shutil
from html.parser import HTMLParser

import pytest
from fixtures import toy_runs
from fixtures.toy_runs import ROOT, run

from nanocascade.run.read import UNKNOWN
from nanocascade.show import __main__ as show
from nanocascade.show.__main__ import main, render_page
from nanocascade.show.read import (
    MAX_CHARS,
    bound_groups,
    cut,
    healthy_range,
    metric_table,
    outside_runs,
    place_runs,
    read_page,
    sample_groups,
    split_turns,
)

rows, skilled = toy_runs.rows, toy_runs.skilled  # fixtures
OPEN = "<|im_start|>user\n%s<|im_end|>\n<|im_start|>assistant\n<think>\n"
HOSTILE = (
    "</script><script>document.title = 'owned'</script>",
    "<img src=x onerror=\"document.title='owned'\"><iframe src='file:///etc/passwd'></iframe>",
    "<!--<script>{{DATA}}{{POLICY}}\u2028\x00\ud800]]></style><link href=//example.org/x>",
)


def write_lines(path, records):
    path.write_text("".join(json.dumps(x) + "\n" for x in records))


def token_values(texts, **more):
    """Token records of a response: values grow from token to token, the last one has no loss."""
    grow = [round(0.1 * i - 0.2, 4) for i in range(len(texts))]
    values = {"text": texts, "loss": "1" * (len(texts) - 1) + "0", "logprob": [-1.0] * len(texts)}
    return values | {"log_ratio": [x * 1e-7 for x in grow], "entropy": [0.3] * len(texts)} | more


def write_run(
    path, name, parent="", teachers=None, groups=2, size=2, text="a</think>b", domain="math"
):
    """A finished run of three steps whose groups have rewards 0, 1, 0, 1, ..."""
    out = path / name
    out.mkdir(parents=True)
    scores = {"before": {"mean": 0.4, "n": 9, "interval": 0.1}} if parent else {"before": None}
    scores["after"] = {"mean": 0.8, "n": 9, "interval": 0.1}
    manifest = {
        "stage": name,
        "parent": {"path": f"/elsewhere/{parent}", "sha256": ""} if parent else None,
        "teachers": {d: {"path": f"/elsewhere/{x}"} for d, x in (teachers or {}).items()},
        "seed": 0,
        "config": {"steps": 3},
        "evaluation": {"math": scores},
        "seconds": 60.0,
        "commit": "0123456789abcdef",
    }
    (out / "manifest.json").write_text(json.dumps(manifest))
    steps = [{"step": i, "reward/mean/math": 0.5, "entropy": 0.1 * i} for i in range(3)]
    write_lines(out / "metrics.jsonl", steps)
    texts = re.findall(r"</think>|.", text, re.S)
    teacher = {"teacher": [-0.5] * len(texts)} if teachers else {}
    rollouts = [
        {
            "step": i % 3,
            "domain": domain,
            "group": i,
            "prompt": OPEN % f"question {i}",
            "response": text,
            "reward": float(j % 2),
            "reason": "correct" if j % 2 else "wrong answer",
            "advantage": 0.0 if size == 1 else 2.0 * (j % 2) - 1,
            "stop_reason": "stop",
            "tokens": token_values(texts, **teacher),
        }
        for i in range(groups)
        for j in range(size)
    ]
    write_lines(out / "rollouts.jsonl", rollouts)
    return out


@pytest.fixture
def cascade(tmp_path):
    out = tmp_path / "out"
    write_run(out, "sft")
    write_run(out, "rl", "sft")
    write_run(out, "side", "sft", text=HOSTILE[0], domain=HOSTILE[1])
    write_run(out, "mopd", "rl", {"math": "sft", "preference": "side"})
    return out


def test_metric_table():
    """The package's table is the one of docs/metrics.md; ranges at the start of a text are read."""
    document = (ROOT / "docs/metrics.md").read_text()
    table = "| metric |" + document.partition("| metric |")[2].partition("\n\n")[0] + "\n"
    copy = (ROOT / "nanocascade/show/metrics.md").read_text()
    assert table == copy, "copy the table of docs/metrics.md to nanocascade/show/metrics.md"
    known = {x["name"]: (x["low"], x["high"]) for x in metric_table()}
    assert known["group/all_right"] == (None, 0.5) and known["ratio/mean"] == (0.99, 1.01)
    assert known["mismatch/prob_error"] == (None, 0.01) and known["lr"] == (None, None)
    assert healthy_range("above 0: more") == (0.0, None) and healthy_range("3") == (None, None)


def test_size():
    """Its Python has at most 350 lines, and the template with its script and style 500."""
    lines = {
        x: len(x.read_text().splitlines())
        for x in (ROOT / "nanocascade/show").iterdir()
        if x.is_file()
    }
    assert sum(n for path, n in lines.items() if path.suffix == ".py") <= 350
    assert sum(n for path, n in lines.items() if path.suffix == ".html") <= 500


def test_turns():
    """Turns add up to the text; a thought that the prompt opened ends at its tag or never."""
    call = "lookup\n</think>\n<tool_call>\n</tool_call>\n<|im_end|>\n"
    result = "<|im_start|>user\n<tool_response>\n6\n</tool_response>\n<|im_end|>\n"
    last = "<|im_start|>assistant\n<think>\nsix\n</think>\n6<|im_end|>"
    turns = split_turns(call + result + last, "thought")
    assert [kind for kind, _ in turns] == ["thought", "answer", "tool", "thought", "answer"]
    assert "".join(text for _, text in turns) == call + result + last
    assert turns[3][1] == "<|im_start|>assistant\n<think>\nsix\n</think>\n"
    assert split_turns("never closed", "thought") == [["thought", "never closed"]]
    prompt = split_turns("<|im_start|>system\nS<|im_end|>\n" + OPEN % "Q", "user")
    assert [kind for kind, _ in prompt] == ["system", "user", "thought"]


def test_bounds():
    """Long texts are cut and say so; too many groups are thinned out evenly."""
    turns = cut([["thought", "a" * 10], ["answer", "b" * MAX_CHARS]])
    assert turns[1:] == [["answer", "b" * (MAX_CHARS - 10)], ["cut", "10 characters more"]]
    groups = [{"step": i} for i in range(10)]
    assert sample_groups(groups, 10_000) == groups
    assert sample_groups(groups, 50) == [{"step": i} for i in (0, 3, 6, 9)]  # 11 bytes each
    assert sample_groups(groups, 1) == groups[:1]
    runs = [{"groups": groups[:n]} for n in (10, 2)]  # JSON of 120 and of 24 bytes
    bound_groups(runs, 90)  # the small one is whole; 66 are left for 11 a group
    assert [len(run["groups"]) for run in runs] == [5, 2]


def test_place_runs():
    """The longest chain of parents is the cascade; a side run lies between its sources and pupils;
    a parent that is not there is shown as outside, with the scores that its child began with."""
    scores = {"math": {"before": 0.1}}
    runs = [
        UNKNOWN | {"name": "sft", "parent": "base", "evaluation": scores},
        UNKNOWN | {"name": "rl", "parent": "sft"},
        UNKNOWN | {"name": "mopd", "parent": "rl", "teachers": {"math": "sft", "if": "side"}},
        UNKNOWN | {"name": "side", "parent": "sft"},
        UNKNOWN | {"name": "other", "parent": "rl", "teachers": {"if": "side"}},
    ]
    runs += outside_runs(runs)
    place_runs(runs)
    places = {run["name"]: (run["col"], run["lane"]) for run in runs}
    main_chain = {"base": (0, 0), "sft": (1, 0), "rl": (2, 0), "mopd": (3, 0)}
    assert places == main_chain | {"side": (2, 1), "other": (3, 2)}
    base = next(run for run in runs if run["name"] == "base")
    assert base["outside"] and base["evaluation"] == {"math": {"after": 0.1}}


def test_read_page(cascade):
    """Runs, curves, groups with their rewards, and scores come from the files of the directory."""
    page = read_page(cascade)
    runs = {run["name"]: run for run in page["runs"]}
    assert set(runs) == {"sft", "rl", "side", "mopd"} and page["title"].endswith("/out")
    assert runs["mopd"]["teachers"] == {"math": "sft", "preference": "side"}
    assert runs["rl"]["parent"] == "sft" and runs["rl"]["trained"] == ["math"]
    assert runs["rl"]["curves"]["entropy"] == [0.0, 0.1, 0.2] and runs["rl"]["steps"] == [0, 1, 2]
    assert [[x["reward"] for x in g["rollouts"]] for g in runs["rl"]["groups"]] == [[0.0, 1.0]] * 2
    shown = {x["name"]: x["names"] for x in page["metrics"]}
    assert shown == {"reward/mean/DOMAIN": ["reward/mean/math"], "entropy": ["entropy"]}


def test_unfinished_run(tmp_path):
    """A run that goes on is shown from its state/run.json, without the line that is half written;
    what is no JSON number (NaN) is a gap."""
    (tmp_path / "run/state").mkdir(parents=True)
    identity = {"stage": "if_rl", "init": "out/sft", "steps": 9, "teachers": {}, "seed": 3}
    (tmp_path / "run/state/run.json").write_text(json.dumps(identity))
    lines = (
        '{"step": 0, "entropy": NaN, "new/metric": [1.0, 2.0]}\n{"step": 1, "entropy": 0.5}\n{"st'
    )
    (tmp_path / "run/metrics.jsonl").write_text(lines)
    page = read_page(tmp_path / "run")
    run = next(x for x in page["runs"] if x["name"] == "run")
    assert not run["finished"] and (run["done"], run["num_steps"], run["seed"]) == (2, 9, 3)
    assert run["curves"] == {"entropy": [None, 0.5], "new/metric": [2.0, None]}
    assert [x["name"] for x in page["metrics"]] == ["entropy", "new/metric"]
    assert {x["name"] for x in page["runs"]} == {"run", "sft"}
    render_page(page)


def test_command(cascade, tmp_path, capsys):
    """The command writes page.html beside the runs, or --out; without runs it is refused."""
    main([str(cascade)])
    assert (cascade / "page.html").stat().st_size > 10_000
    main([str(cascade / "rl"), "--out", str(tmp_path / "x.html"), "--watch"])  # finished: no wait
    assert "written" in capsys.readouterr().out and (tmp_path / "x.html").exists()
    assert not list(tmp_path.rglob("*.part"))
    with pytest.raises(ValueError, match="no metrics.jsonl"):
        main([str(tmp_path / "nothing")])
    with pytest.raises(ValueError, match="usage"):
        main(["--watch"])


def test_watch(tmp_path, monkeypatch):
    """--watch writes a page that reloads itself, again after each pause, and a last one that does
    not, once the run is finished."""
    out = write_run(tmp_path, "run")
    manifest = (out / "manifest.json").read_text()
    (out / "manifest.json").unlink()
    written = []

    def pause(seconds):
        written.append((out / "page.html").read_text())
        if len(written) == 2:
            (out / "manifest.json").write_text(manifest)

    monkeypatch.setattr(show.time, "sleep", pause)
    main([str(out), "--watch"])
    written.append((out / "page.html").read_text())
    reloads = [re.search(r'"watch":(\d+)', x)[1] for x in written]
    assert reloads == ["5", "5", "0"] and '"finished":true' in written[2]


class Elements(HTMLParser):
    """All start tags with their attributes, and the text of each script and style."""

    def __init__(self):
        super().__init__()
        self.tags, self.bodies, self.inside = [], [], False

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.inside = tag in ("script", "style")
        self.bodies += [""] * self.inside

    def handle_endtag(self, tag):
        self.inside = False

    def handle_data(self, data):
        if self.inside:
            self.bodies[-1] += data


def test_hostile_texts(tmp_path):
    """Texts of a model add no element, no attribute and no link to the page, and arrive unchanged;
    the policy permits only the template's own script and style, and no request at all."""
    write_run(tmp_path / "plain", "rl")
    hostile = write_run(tmp_path / "hostile", "rl", text="".join(HOSTILE), domain=HOSTILE[0])
    pages = {}
    for name in ("plain", "hostile"):
        pages[name] = Elements()
        pages[name].feed(render_page(read_page(tmp_path / name)))
    assert pages["hostile"].tags == pages["plain"].tags
    style, data, script = pages["hostile"].bodies
    group = json.loads(data)["runs"][0]["groups"][0]
    assert "".join(text for _, text in group["rollouts"][0]["turns"]) == "".join(HOSTILE)
    assert group["domain"] == HOSTILE[0]
    links = {"src", "href", "action", "srcset", "onclick", "onerror"}
    assert not [attrs for _, attrs in pages["hostile"].tags if links & attrs.keys()]
    assert "url(" not in style and "innerHTML" not in script
    policy = next(x["content"] for _, x in pages["hostile"].tags if "http-equiv" in x)
    for kind, body in (("style", style), ("script", script)):
        digest = base64.b64encode(hashlib.sha256(body.encode()).digest()).decode()
        assert f"{kind}-src 'sha256-{digest}'" in policy
    assert policy.startswith("default-src 'none'") and "unsafe" not in policy
    assert {x.name for x in hostile.iterdir()} == {
        "manifest.json",
        "metrics.jsonl",
        "rollouts.jsonl",
    }


# ---- In a browser ----

BACKGROUNDS = """[...document.querySelectorAll("#cards .token")].map((x) => x.style.background)"""
COUNT = """document.querySelectorAll("#list button").length"""


def pick(browser, name, value):
    """Choose an option as a person does, and say how many groups are listed then."""
    script = f"""(() => {{ const box = document.getElementById({json.dumps(name)});
        box.value = {json.dumps(value)}; box.onchange(); return {COUNT}; }})()"""
    return browser.run(script)


@pytest.mark.nightly
@pytest.mark.skipif(not shutil.which("chromium"), reason="needs Chromium")
def test_browser(cascade, tmp_path, monkeypatch):
    """In a real browser: no console message, the switch recolours tokens, filters filter, texts
    stay texts, and 2,000 rollouts are listed and scrolled to the last."""
    monkeypatch.syspath_prepend(str(ROOT))
    from bench.browser import Browser

    write_run(cascade, "many", "rl", groups=2000, size=1)
    main([str(cascade)])
    with Browser(tmp_path / "profile") as browser:
        browser.open(cascade / "page.html")
        assert browser.run("document.title").endswith("/out - nanocascade")
        assert browser.run("document.querySelectorAll('.node').length") == 5
        assert browser.run("document.querySelectorAll('.arrow.teacher').length") == 2
        assert browser.run(COUNT) == 2008
        # Every group of "many" has the one reward 0; elsewhere 0 and 1 differ.
        assert pick(browser, "reward", "differ") == 8
        assert pick(browser, "stage", "mopd") == 2
        assert pick(browser, "step", "1") == 1 and pick(browser, "domain", "math") == 1
        assert browser.run("document.querySelectorAll('.card').length") == 2
        assert browser.run("document.querySelectorAll('.turn.thought').length") == 2
        seen = {}
        for mode in ("teacher", "advantage", "ratio", "entropy", "off"):
            browser.run(f"document.querySelector('[data-mode={mode}]').click()")
            seen[mode] = browser.run(BACKGROUNDS)
        # a_t = -0.5 + 1 on tokens with loss; the last token of each response has none.
        assert seen["teacher"][0] == seen["teacher"][1] != "" and seen["teacher"][-1] == ""
        assert "--up" in seen["advantage"][0] and "--down" in seen["advantage"][-2]
        assert len(set(seen["ratio"])) > 2 and "--heat" in seen["entropy"][0]
        assert set(seen["off"]) == {""} and len({str(x) for x in seen.values()}) == 5
        tip = "document.querySelector('.token').onpointermove({clientX: 5, clientY: 5})"
        browser.run(f"void {tip}")
        assert "log-prob teacher" in browser.run("document.getElementById('tip').textContent")
        pick(browser, "reward", "")
        assert pick(browser, "stage", "side") == 2
        assert HOSTILE[0] in browser.run("document.querySelector('.card').textContent")
        assert pick(browser, "stage", "many") == 2000
        last = "document.querySelector('#list li:last-child')"
        browser.run(f"{last}.scrollIntoView(); {last}.firstChild.click()")
        assert "question 1999" in browser.run("document.getElementById('detail').textContent")
        bounds = f"{last}.getBoundingClientRect().bottom <= innerHeight + 1"
        assert browser.run(bounds)
        # Reloaded, as in --watch, the page shows the same group.
        browser.call("Page.reload")
        browser.run("new Promise((done) => setTimeout(done, 500))")
        assert "question 1999" in browser.run("document.getElementById('detail').textContent")
        assert browser.problems == []


@pytest.mark.nightly
@pytest.mark.skipif(not shutil.which("chromium"), reason="needs Chromium")
def test_browser_of_a_real_run(skilled, rows, tmp_path, monkeypatch):
    """The page of a run of train_rl.py: both log-probs and the entropy of each token are there, and
    the tokens of a card add up to the response that the run logged."""
    monkeypatch.syspath_prepend(str(ROOT))
    from bench.browser import Browser

    out = tmp_path / "out"
    words = ("--stage", "if_rl", "--init", skilled, "--data", rows, "--out", out, "--eval_data", "")
    run("train_rl.py", *words, "--steps", 2, "--prompts", 4, "--rollouts", 4)
    main([str(out)])
    records = [json.loads(x) for x in (out / "rollouts.jsonl").open()]
    with Browser(tmp_path / "profile") as browser:
        browser.open(out / "page.html")
        groups = {(x["step"], x["domain"], x["group"]) for x in records}
        assert browser.run(COUNT) == len(groups)
        cards = "[...document.querySelectorAll('.card')].map((card) => [...card.querySelectorAll("
        texts = browser.run(cards + "'.turn pre')].map((x) => x.textContent).join(''))")
        logged = {x["response"].replace("\n", "\u21b5\n") for x in records if not x["step"]}
        assert texts and set(texts) <= logged
        browser.run("document.querySelector('[data-mode=entropy]').click()")
        assert any("--heat" in x for x in browser.run(BACKGROUNDS))
        browser.run("void document.querySelector('.token').onpointermove({clientX: 5, clientY: 5})")
        shown = browser.run("document.getElementById('tip').textContent")
        assert all(name in shown for name in ("log-prob train", "log r_t", "entropy"))
        assert browser.problems == []
