r"""Formal proofs: the last ```coq block of an answer must prove the row's `formal_statement`.

    {"formal_statement": "Theorem t : forall n, n + 0 = n.", "header": "Require Import Arith."}

The block is a whole file with a theorem of that name; what is in it cannot change what is asked.
Three runs of coqc, each confined by sandbox/launch.py, with a folder of its own to write:
    given    the header and the statement, admitted: what the names mean where the model had no say
    answer   the model's file
    check    ours: `answer`'s theorem has the type of `given`'s, and Print Assumptions finds, but
             for `given`, AXIOMS alone: no admit, no axiom, no check of the kernel switched off
Nothing of an answer is imported into the check, so its notations, hints and options do not act
there. A header that declares a type or assumes something is refused: the answer's copy is another.
Not covered: bugs of Coq's kernel. Lean cannot be tested here and is refused.
"""

import os
import re
import shutil
import subprocess
import sys
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory

from nanocascade.rewards.base import Reward
from nanocascade.rewards.code import last_program
from nanocascade.rewards.unit_tests import check_seconds

LAUNCH = str(Path(__file__).parents[1] / "sandbox" / "launch.py")
CPU_SECONDS, MEMORY, FILE_BYTES = 30, 2 << 30, 16 << 20  # of a run; row["cpu_seconds"] comes first
NAME = re.compile(r"\s*(?:Theorem|Lemma|Fact|Remark|Corollary|Proposition)\s+([A-Za-z_][\w']*)\b")
DECLARED = re.compile(  # as a sentence begins, comments and attributes aside
    r"(?:^|\.\s)\s*(?:#\[[^\]]*\]\s*|(?:Local|Global|Private|Polymorphic|Monomorphic|Cumulative|"
    r"NonCumulative|Declare)\s+)*((?:Co)?Inductive|Record|Structure|Class|Variant|Module\s+Type|"
    r"(?<=Declare\s)Module|Context|Axioms?|Conjectures?|Parameters?|Variables?|Hypothes[ei]s)\b"
)
SECTION = re.compile(r"(?s)\bSection\s+(\w+)\s*\..*?\bEnd\s+\1\s*\.")
ASSUMED = re.compile(r"\b(?:Context|Variables?|Hypothes[ei]s)\b")  # the section's own
AXIOMS = {  # of the standard library, consistent together; AdmitAxiom.proof_admitted is there too
    "Classical_Prop.classic",
    "FunctionalExtensionality.functional_extensionality_dep",
    "PropExtensionality.propositional_extensionality",
    "ClassicalDedekindReals.sig_not_dec",
    "ClassicalDedekindReals.sig_forall_dec",
    "Eqdep.Eq_rect_eq.eq_rect_eq",
}
CHECK = """Require given.Given answer.Answer.
Definition same {T : Type} (asked proof : T) : T := proof.
Definition check := same given.Given.%s answer.Answer.%s.
Print Assumptions check.
"""  # no tactics and no notations: those are what a file might have redefined


def compile_file(folder, name, source, seconds):
    """(whether coqc accepts folder/name/Name.v, what it printed); it reads `folder`'s others."""
    place, title = Path(folder, name), name.capitalize()
    place.mkdir(0o755)
    Path(place, title + ".v").write_text(source, "utf-8", "replace")
    for file in (f".{title}.aux", *(f"{title}.{x}" for x in ("vo", "vok", "vos"))):
        Path(place, file).touch()  # the only files that a run can write: it makes none
        Path(place, file).chmod(0o666)  # whoever it runs as
    known = {name, "given", "answer"} if name == "check" else {name}  # libraries, by folder
    command = [
        sys.executable,
        "-I",
        "-S",
        LAUNCH,
        str(seconds),
        str(MEMORY),
        str(FILE_BYTES),
        str(place),
        str(folder),
        os.path.realpath(shutil.which("coqc")),
        "-q",
        "-noglob",
        "-w",
        "none",
        *(x for y in known for x in ("-Q", f"../{y}", y)),
        title + ".v",
    ]
    with open(Path(folder, name + ".out"), "w+b") as output:
        code = subprocess.run(
            command,
            cwd=place,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            timeout=100 * seconds,
        ).returncode
        output.seek(0)
        text = output.read().decode("utf-8", "replace")
    if code and name == "given" and "cannot be confined" in text:  # elsewhere a model may say it
        raise OSError(text.strip())
    return code == 0, text


@lru_cache(4096)
def given_file(header, statement):
    """The compiled statement; ValueError if it is none. Answers to it share the file."""
    with TemporaryDirectory() as folder:
        os.chmod(folder, 0o711)
        done, text = compile_file(folder, "given", f"{header}\n{statement}\nAdmitted.", CPU_SECONDS)
        if not done:
            raise ValueError(f"coqc refuses the formal statement {statement!r:.200}: {text:.300}")
        return Path(folder, "given", "Given.vo").read_bytes()


def unproved(printed, name):
    """What Print Assumptions lists beyond the statement and AXIOMS, or None. It indents types."""
    lines = [x for x in printed.partition("Axioms:\n")[2].splitlines() if x[:1].strip()]
    names = [x.partition(" : ")[0].strip() for x in lines] or ["nothing known"]
    return next((x for x in names if x not in AXIOMS and x != f"Given.{name}"), None)


def verify_proof(row, message):
    """1 if coqc accepts the answer, and its theorem as a proof of the statement."""
    source, reason = last_program(message["content"], ("coq", "rocq", "v"))
    if reason:
        return Reward(0.0, reason)
    given = given_file(row.get("header") or "", row["formal_statement"])
    name, seconds = NAME.match(row["formal_statement"])[1], row.get("cpu_seconds", CPU_SECONDS)
    with TemporaryDirectory() as folder:
        os.chmod(folder, 0o711)
        if not compile_file(folder, "answer", source, seconds)[0]:
            return Reward(0.0, "coqc refuses the file, or a limit was reached")
        Path(folder, "given").mkdir()
        Path(folder, "given", "Given.vo").write_bytes(given)
        done, text = compile_file(folder, "check", CHECK % (name, name), seconds)
    if not done:
        return Reward(0.0, "no such theorem, or of another statement")
    rest = unproved(text, name)
    return Reward(0.0, f"rests on {rest:.80}") if rest else Reward(1.0, "proved")


def check_proof_row(row):
    """ValueError unless the row is Coq's, coqc is here and accepts the statement."""
    statement, language = row["formal_statement"], row.get("language", "coq")
    lean = re.search(r":=\s*(by\b|sorry\b)|^\s*(theorem|lemma|example|import Mathlib)\b", statement)
    if language not in ("coq", "rocq") or lean:
        raise ValueError(f"a proof in {'Lean' if lean else language}: only Coq can be checked")
    if not NAME.match(statement) or not statement.strip().endswith("."):
        raise ValueError(f"formal_statement must be `Theorem name ... .`, got {statement!r:.80}")
    if not shutil.which("coqc"):
        raise ValueError("formal proofs need coqc, which is not here (Debian: apt install coq)")
    header = re.sub(r"(?s)\(\*.*?\*\)", " ", row.get("header") or "")
    header = SECTION.sub(lambda x: ASSUMED.sub("", x[0]), header)
    if match := DECLARED.search(header):
        raise ValueError(f"a header with {match[1]}: the answer's own copy would be another")
    check_seconds(row)
    given_file(row.get("header") or "", statement)
