"""The tables over seeds, on made-up runs whose numbers are known."""

import json
import sys

import pytest
from fixtures.toy_runs import ROOT

from nanocascade.stages import CASCADE, MOPD_SHARES
from nanocascade.toy.tasks import DOMAINS


@pytest.fixture
def evidence(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    from bench import evidence

    return evidence


def write_run(path, scores, metrics=(), stage="if_rl", start=None, **config):
    """A finished run as the scripts leave it, with these scores after it."""
    path.mkdir(parents=True)
    after = {d: {"after": {"mean": x, "interval": 0.01, "n": 100}} for d, x in scores.items()}
    config |= {"out": str(path), "prompts": 4, "rollouts": 2}
    teachers = {
        d: {"path": str(path.parent / name)}
        for d, name in (dict.fromkeys(MOPD_SHARES, "if_rl") | {"math": "sft"}).items()
    }
    manifest = {
        "evaluation": after,
        "config": config,
        "seconds": 60.0,
        "peak_kib": 1 << 20,
        "seed": 0,
        "commit": "0123456789abcdef",
        "stage": stage,
        "parent": start and {"path": str(path.parent / start)},
        "teachers": teachers if stage == "mopd" else {},
    }
    (path / "manifest.json").write_text(json.dumps(manifest))
    (path / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in metrics))
    (path / "rollouts.jsonl").write_text("")


def step(i, **values):
    return {"step": i, "grad_norm": 2.0, "time/elapsed": 10.0 * (i + 1), **values}


def write_cascade(out, mathematics):
    """SFT has .8 in mathematics, the start of MOPD .4 and its end `mathematics`; the rest is .5.
    Instructions are at .8 from step 6 of RL and step 3 of MOPD on, .2 before."""
    rise = [step(i, **{"outcome/drawn": 0.2 + 0.6 * (i >= 6)}) for i in range(9)]
    faster = [
        step(
            i,
            **{
                "outcome/if": 0.2 + 0.6 * (i >= 3),
                "mopd/prompt_share/if": 0.5,
                "outcome/preference": 0.9,
                "mopd/prompt_share/preference": 0.5,
            },
        )
        for i in range(9)
    ]
    side = (("mopd_from_sft", "mopd", "sft"), ("math_rl", "math_rl", "multi_domain_rl"))
    for name, stage, start in CASCADE + side:
        scores = dict.fromkeys(DOMAINS, 0.5)
        scores["math"] = {"sft": 0.8, "if_rl": 0.8, "multi_domain_rl": 0.4}.get(name, mathematics)
        known = {"mopd_from_sft": faster, "if_rl": rise, "rlhf_side": rise}.get(name, [step(0)])
        filtered = name in ("if_rl", "rlhf_side")
        write_run(out / name, scores, known, stage, start, dynamic_filtering=filtered)


def test_numbers_over_seeds(evidence):
    """Mean of .2 and .4: .3; std .1414, 12.71 * .1414 / 2^.5 = 1.27. Of 1, 2, 3: 4.30 / 3^.5."""
    assert evidence.over([0.2, 0.4]) == "0.30 +-1.27" and evidence.over([1, 2, 3]) == "2.00 +-2.48"
    assert evidence.over([0.5]) == "0.50" and evidence.over([]) == "-"


def test_run_evidence(evidence, tmp_path, monkeypatch):
    """Two seeds: MOPD brings back 100 and 50 % of mathematics' .4, so 75 % +- 3.18; the 90 % hold
    in one of two. Three steps are averaged, so instructions reach .49 at RL's step 7, after 7 * 8
    samples and 80 s, and at MOPD's step 4, after 4 * 4 and 50 s. An arm stands beside the recipe by
    its mean difference in a seed: .1 - .2 and .1 - .4: -.2 +- 1.27."""
    for i, end in enumerate((0.8, 0.6)):
        write_cascade(tmp_path / f"seed{i}", end)
        for arm, ours in (("recipe", 0.2 + 0.2 * i), ("no_std", 0.1)):
            write_run(tmp_path / f"arms{i}/if_rl-{arm}", {"if": ours, "math": 0.5}, [step(0)])
    (tmp_path / "assets").mkdir()
    monkeypatch.setattr(sys, "argv", ["evidence.py", tmp_path, tmp_path / "assets"])
    evidence.main()
    text = (tmp_path / "assets/evidence.md").read_text()
    assert "| math | 0.40 +-0.00 | 0.80 +-0.00 | 0.70 +-1.27 | 0.30 +-1.27 | 0.75 +-3.18 |" in text
    assert "least 100% (math); least 50% (math) | 1 of 2 |" in text
    assert "| if | 2 of 2 | 3.50 +-0.00 | 1.60 +-0.00 |" in text
    assert "| math | -0.40 +-0.00 | multi_domain_rl 2 |" in text
    assert "| no_std | 2 | -0.20 +-1.27 | +0.00 +-0.00 |" in text
    assert (tmp_path / "assets/seeds.csv").read_text().count("\n") == 1 + 2 * 11 * 9


def test_anchor_table(evidence, tmp_path, monkeypatch, capsys):
    """Stored scores are not made again. Mathematics .5 -> .7 and .8 in one seed, .4 -> .6 and .7 in
    the other: changes +.2 and +.3 in both, and the anchor gives +.1 in both."""
    from bench import anchor

    for seed, start in (("a", 0.5), ("b", 0.4)):
        (tmp_path / seed / "anchor").mkdir(parents=True)
        for name, gain in (("start", 0.0), ("report", 0.2), ("anchor", 0.3)):
            scores = dict.fromkeys(MOPD_SHARES, 0.5) | {"math": start + gain}
            (tmp_path / seed / "anchor" / f"{name}.json").write_text(json.dumps(scores))
    monkeypatch.setattr(sys, "argv", ["anchor.py", tmp_path / "a", tmp_path / "b"])
    anchor.main()
    changes = "0.20 +-0.00 | 0.30 +-0.00 | 0.10 +-0.00 |"
    line = f"| math | math | 0.45 +-0.64 | 0.65 +-0.64 | 0.75 +-0.64 | {changes}"
    assert line in capsys.readouterr().out


def test_claims_need_a_whole_cascade(evidence, tmp_path, monkeypatch):
    from bench import claims

    write_run(tmp_path / "sft", {"math": 0.5}, [step(0)], "sft")
    write_run(tmp_path / "mopd", {"math": 0.5}, [step(0)], "mopd", "sft")
    monkeypatch.setattr(sys, "argv", ["claims.py", tmp_path])
    with pytest.raises(ValueError, match="finished runs of rlhf, rlhf_side"):
        claims.main()
