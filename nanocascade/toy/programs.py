"""The toy's programming domains: write a function, repair one, repair one in a repository."""

import json
import math

from nanocascade.environments.repository import REPOSITORY_TOOLS
from nanocascade.toy.words import assistant, call_tool, user_row

PROGRAMS = {  # text of the request -> its solution, an expression
    "adds {a} to x": "x+{a}",
    "subtracts {a} from x": "x-{a}",
    "multiplies x by {a}": "x*{a}",
    "doubles x and adds {a}": "2*x+{a}",
    "squares x and adds {a}": "x*x+{a}",
    "multiplies x by {a} and adds {b}": "{a}*x+{b}",
    "multiplies x by {a} and subtracts {b}": "{a}*x-{b}",
    "is the larger of x and {a}": "max(x, {a})",
    "is the smaller of x and {a}": "min(x, {a})",
}
CODE = "```python\ndef f(x):\n    return %s\n```"
PATCH = "f.py\n<<<<<<< SEARCH\n    return {}\n=======\n    return {}\n>>>>>>> REPLACE"


def value(expression: str, x: int) -> int:
    """Value of an expression of PROGRAMS at x, without eval. A model's text never gets here."""
    if expression.startswith("m"):
        pick, bound = expression[:3], int(expression[7:-1])
        return max(x, bound) if pick == "max" else min(x, bound)
    terms = expression.replace("-", "+-").split("+")  # "2*x-3" -> "2*x", "-3"
    return sum(math.prod(x if y == "x" else int(y) for y in term.split("*")) for term in terms)


def unit_tests(expression: str, *inputs: int) -> dict:
    outputs = [json.dumps(value(expression, x)) for x in inputs]
    return {"fn_name": "f", "inputs": [json.dumps([x]) for x in inputs], "outputs": outputs}


def program(rng) -> tuple[int, int, str]:
    """Two constants and a request of PROGRAMS."""
    return *rng.sample(range(2, 10), 2), rng.choice(list(PROGRAMS))


def code(rng, problem=None):
    """Write a function from its description; the verifier runs it."""
    a, b, request = problem or program(rng)
    expression = PROGRAMS[request].format(a=a, b=b)
    if rng.random() < 0.5:  # another program, or another constant
        mistake = PROGRAMS[rng.choice([x for x in PROGRAMS if x != request])].format(a=a, b=b)
    else:
        mistake = PROGRAMS[request].format(a=b, b=a)
    tests = {"unit_tests": unit_tests(expression, -3, 0, 5, 11)}
    row = user_row(f"Write f(x) that {request.format(a=a, b=b)}.", verifier_metadata=tests)
    return row, *([assistant(x, CODE % x)] for x in (expression, mistake))


def repair(rng):
    """Repair a wrong operator or constant in a file, given a failing test; the answer is a diff."""
    a = rng.randint(2, 9)
    expressions = [f"x+{a}", f"x-{a}", f"x*{a}"]
    good, bad = rng.sample(expressions, 2)
    x = rng.randint(3, 9)
    third = next(y for y in expressions if y not in (good, bad))
    file = f"def f(x):\n    return {bad}\n"
    metadata = {"files": {"f.py": file}, "entry": "f.py"}
    metadata["unit_tests"] = unit_tests(good, x, -3, 11)
    prompt = f"f.py:\n{file}f({x}) must be {value(good, x)}. Fix it."
    row = user_row(prompt, verifier_metadata=metadata)
    return row, *([assistant(y, PATCH.format(bad, y))] for y in (good, third))


def agentic(rng):
    """Repair the same file in a repository: read it in one turn, edit it in the next."""
    row, *solutions = repair(rng)
    metadata = row["verifier_metadata"]
    tests, files = metadata["unit_tests"], metadata["files"]
    x, wanted = tests["inputs"][0].strip("[]"), tests["outputs"][0]
    files["test_f.py"] = f"from f import f\n\n\ndef test_f():\n    assert f({x}) == {wanted}\n"
    row |= user_row(f"f({x}) must be {wanted}. Fix it.", environment={"name": "repository"})
    tools = [y for y in REPOSITORY_TOOLS if y["function"]["name"] in ("read", "edit")]
    row["responses_create_params"]["tools"] = tools
    bad = files["f.py"].split("return ")[1][1]  # the operator, once in the file

    def solution(fix: str) -> list[dict]:
        change = {"path": "f.py", "old": bad, "new": fix[1]}
        return [
            *call_tool("f.py", files["f.py"], "read", path="f.py"),
            *call_tool(fix, "edited f.py", "edit", **change),
            assistant("done", "Done."),
        ]

    return row, *(solution(x[0]["reasoning_content"]) for x in solutions)
