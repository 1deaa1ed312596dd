"""Formal proofs: coqc's word for it, on the statement that was given, from nothing assumed."""

import shutil

import pytest
from fixtures.machine import confinement

from nanocascade.rewards import Reward, check_row, kind_of, proof, score

ROW = {"formal_statement": "Theorem t : forall n : nat, n + 0 = n."}
HARD = {"formal_statement": "Theorem t : 0 = 1."}  # what no trick may prove
DATUM = {
    "formal_statement": "Theorem t : {n : nat | n = 2}.",  # no proposition
    "header": "(* Axiom a : False. *) Declare Scope s. Definition Class := 1.",
}
STATED, PROOF = ROW["formal_statement"], "Proof. induction n; simpl; congruence. Qed."
needs_coq = pytest.mark.skipif(
    not (shutil.which("coqc") and confinement()[1]), reason="needs coqc, and Landlock to confine it"
)


def grade(row, source):
    return score(row, f"<think>\nhm\n</think>\nSo:\n```coq\n{source}\n```")


@needs_coq
@pytest.mark.parametrize(
    ("row", "source"),
    [
        (ROW, f"{STATED}\n{PROOF}"),
        (ROW, "Require Import Lia. Lemma t (n : nat) : n + 0 = n. lia. Qed."),
        (DATUM, "Theorem t : {n : nat | n = 2}. exact (exist _ 2 eq_refl). Qed."),
        (
            ROW,
            f"Lemma help : forall n, n = n + 0. {PROOF}\n{STATED} intro; now rewrite <- help. Qed.",
        ),
        pytest.param(
            {
                "header": "Require Import Reals. Open Scope R_scope.",
                "formal_statement": "Lemma t : forall x : R, x + 0 = x.",
            },  # the reals rest on axioms
            "Require Import Reals.\n"
            "Lemma t : forall x, (x + 0 = x)%R. intro; apply Rplus_0_r. Qed.",
            marks=pytest.mark.nightly,
        ),
    ],
    ids=range(5),
)
def test_proofs(row, source):
    """A proof earns 1 with helpers, another spelling of the statement, or the library's axioms."""
    assert kind_of(row) == "proof" and grade(row, source) == Reward(1.0, "proved")


REFUSED, OTHER = "coqc refuses the file", "no such theorem"
BYPASS = "Fixpoint f (n : nat) : 0 = 1 := f n. Theorem t : 0 = 1. exact (f 0). Qed."


@needs_coq
@pytest.mark.parametrize(
    ("row", "source", "reason"),
    [
        (HARD, "Theorem t : 0 = 1. Proof. auto. Qed.", REFUSED),
        (ROW, f"{STATED} Admitted.", "rests on Answer.t"),
        (ROW, f"{STATED} Proof. admit. Admitted.", "rests on Answer.t"),
        (ROW, STATED, REFUSED),
        (ROW, f"Axiom t : {STATED[12:]}", "rests on Answer.t"),
        (ROW, "Check 1.", OTHER),
        (ROW, "Theorem t : True. exact I. Qed.", OTHER),
        (ROW, f"Theorem s{STATED[9:]} {PROOF}", OTHER),
        (HARD, "Parameter h : 0 = 1. Theorem t : 0 = 1. exact h. Qed.", "rests on Answer.h"),
        (HARD, "Section s. Variable h : 0 = 1. Theorem t : 0 = 1. exact h. Qed. End s.", OTHER),
        (
            HARD,
            "Module Given. Axiom t : 0 = 1. End Given.\nDefinition t := Given.t.",
            "rests on Ans",
        ),
        (
            HARD,
            "Module Type M. Axiom h : 0 = 1. End M. Declare Module D : M. Definition t := D.h.",
            "rests on Answer.D.h",
        ),
        (
            HARD,
            "Require Import Coq.Compat.AdmitAxiom. Theorem t : 0 = 1. case proof_admitted. Qed.",
            "rests on AdmitAxiom.proof_admitted",
        ),
        (
            HARD,
            "Module Classical_Prop. Axiom classic : 0 = 1. End Classical_Prop.\n"
            "Definition t := Classical_Prop.classic.",
            "rests on Answer.Classical_Prop.classic",
        ),
        # what the words mean: numbers, equality, notations, coercions
        (HARD, 'Notation "0 = 1" := True. Theorem t : 0 = 1. exact I. Qed.', OTHER),
        (
            HARD,
            'Definition eq {A} (a b : A) := True. Infix "=" := eq : type_scope.'
            " Theorem t : 0 = 1. exact I. Qed.",
            OTHER,
        ),
        (
            HARD,
            "Inductive nat := O : nat | S (_ : nat). Theorem t : O = O. reflexivity. Qed.",
            OTHER,
        ),
        (HARD, "Axiom c : True -> 0 = 1. Coercion c : True >-> eq. Definition t := I.", ""),
        (
            HARD,
            "Require Import Program.Tactics. Global Set Program Mode. "
            "#[global] Obligation Tactic := idtac. Definition t := I.",
            OTHER,
        ),
        # the kernel's checks switched off
        (HARD, f"Global Unset Guard Checking. {BYPASS}", "rests on"),
        (HARD, f"#[bypass_check(guard)] {BYPASS}", "rests on"),
        (ROW, f"Global Unset Universe Checking. {STATED} {PROOF}", "rests on"),
        (
            HARD,
            "Unset Positivity Checking. Inductive D := d : (D -> 0 = 1) -> D. Definition g (x : D)"
            " := match x with d h => h x end. Definition t := g (d g).",
            "rests on",
        ),
        # the machine: files, plugins, time, memory, output
        (HARD, 'Declare ML Module "unknown_plugin".', REFUSED),
        (HARD, "Drop.", REFUSED),
        (HARD, 'Load "/etc/passwd".', REFUSED),
        (HARD, 'Redirect "x" Print nat.', REFUSED),
        (HARD, 'Redirect "/tmp/nanocascade" Print nat.', REFUSED),
        (HARD, 'Redirect "../given/Given" Print nat.', REFUSED),
        (HARD, 'Print Universes "Answer.vo". Theorem t : 0 = 1.', REFUSED),
        (HARD, 'Cd "/". Print Universes "tmp/nanocascade".', REFUSED),
        (ROW, f"{STATED}\n{PROOF}\n" + "(*" * 100_000, REFUSED),
        (ROW, "\0\ud800", REFUSED),
        (
            ROW,
            'Goal True. idtac "cannot be confined". Abort.\nfoo.',
            REFUSED,
        ),  # our launcher's words
        (DATUM, "Theorem t : {n : nat | n = 3}. exact (exist _ 3 eq_refl). Qed.", OTHER),
    ],
    ids=range(35),
)
def test_attacks(row, source, reason):
    """No unproved, assumed, changed, bypassed or smuggled theorem earns anything."""
    reward = grade(row, source)
    assert reward.value == 0 and reason in reward.reason, reward


@needs_coq
@pytest.mark.parametrize(
    "source",
    [
        "Theorem t : 0 = 1. repeat (pose proof I). Qed.",
        "Goal True. do 9999999 idtac. exact I. Qed.",
        "Theorem t : 0 = 1. let rec f := f in f. Qed.",
        "Compute (fix f n := match n with 0 => 1 | S m => f m + f m end) 60.",
        "Fixpoint p n := match n with 0 => I = I | S m => p m /\\ p m end. Goal p 40. vm_compute."
        " repeat split. Qed.",
    ],
    ids=["context", "loop", "recursion", "compute", "term"],
)
def test_endless(source):
    """Tactics without an end are ended at the CPU limit."""
    assert grade(HARD | {"cpu_seconds": 1}, source).reason.startswith(REFUSED)


@needs_coq
def test_files_elsewhere_are_not_read(tmp_path):
    """A proof that lies in a readable folder cannot be loaded from there."""
    tmp_path.joinpath("S.v").write_text(f"{STATED}\n{PROOF}\n")
    assert REFUSED in grade(ROW, f'Load "{tmp_path}/S".').reason


def test_rows(monkeypatch):
    """Lean, a goal that is no theorem, headers that say what an answer cannot repeat, a limit that
    is no time, and a machine without coqc are errors of the row."""
    monkeypatch.setattr(proof.shutil, "which", lambda name: None)
    monkeypatch.setattr(proof, "given_file", None)  # a header is refused before anything runs
    for row, words in [
        (ROW, "apt install coq"),
        ({"formal_statement": "theorem t : 1 = 1 := by sorry"}, "Lean"),
        (ROW | {"language": "lean4"}, "lean4"),
        ({"formal_statement": "Goal 1 = 1."}, "must be"),
    ]:
        with pytest.raises(ValueError, match=f"row 'r7'.*{words}"):
            check_row(row | {"id": "r7"})
    monkeypatch.setattr(proof.shutil, "which", lambda name: name)
    for change, words in [
        ({"header": "Inductive e := a."}, "Inductive"),
        ({"cpu_seconds": "4"}, "'4'"),
        ({"header": "Open Scope nat_scope. #[local] Axiom a : 0 = 1."}, "Axiom"),
        ({"header": "Section s.\n Local Variables x y : nat."}, "Variables"),
    ]:
        with pytest.raises(ValueError, match=words):
            check_row(ROW | change)


@needs_coq
def test_statement_that_is_none():
    """A statement which coqc does not understand is an error when data are read, not a 0."""
    with pytest.raises(ValueError, match="coqc refuses the formal statement"):
        check_row({"formal_statement": "Theorem t : nonsense."})
