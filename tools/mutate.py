"""Change one thing of a module at a time and see whether a test notices: `python tools/mutate.py --each 10 --seed 0`.

Nothing of the checkout is touched: the package is copied, a mutant is written into the copy, and the module's tests run
against it in a process forked from one that has the heavy libraries imported. Not part of the tests: it takes minutes.
"""

from __future__ import annotations

import argparse
import ast
import copy
import importlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# What pytest is given: the fastest tests that are about a module.
TESTS: dict[str, tuple[str, ...]] = {
    "training/checkpoint.py": ("tests/training/test_checkpoint.py",),
    "training/schedule.py": ("tests/training/test_schedule.py",),
    "training/loop.py": (
        "tests/training/test_stopping.py",
        "tests/training/test_loop.py",
        "tests/training/test_checkpoint.py",
    ),
    "training/stopping.py": (
        "tests/training/test_stopping.py",
        "tests/training/test_loop.py",
        "tests/training/test_checkpoint.py",
    ),
    "objectives/control.py": ("tests/objectives/test_objectives.py", "-k", "multiplier or budget"),
    "merging/compute.py": ("tests/merging/test_writer.py",),
    "merging/lora_tensors.py": ("tests/hub/test_module_patterns.py", "tests/merging/test_writer.py"),
}
HEAVY = (
    "torch",
    "transformers",
    "peft",
    "safetensors.torch",
    "numpy",
    "scipy.stats",
    "hypothesis",
    "typer",
    "rich.live",
)
_LIMIT_S = 300
_COMPARE: dict[type[ast.cmpop], tuple[type[ast.cmpop], ...]] = {
    ast.Lt: (ast.GtE, ast.LtE),
    ast.LtE: (ast.Gt, ast.Lt),
    ast.Gt: (ast.LtE, ast.GtE),
    ast.GtE: (ast.Lt, ast.Gt),
    ast.Eq: (ast.NotEq,),
    ast.NotEq: (ast.Eq,),
    ast.Is: (ast.IsNot,),
    ast.IsNot: (ast.Is,),
    ast.In: (ast.NotIn,),
    ast.NotIn: (ast.In,),
}
_ARITHMETIC: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
}


def changes(node: ast.AST) -> Iterator[tuple[str, ast.AST]]:
    """What a node may be replaced by, with words for it."""
    if isinstance(node, ast.Compare):
        for i, operator in enumerate(node.ops):
            for other in _COMPARE[type(operator)]:
                made = copy.deepcopy(node)
                made.ops[i] = other()
                yield f"{type(operator).__name__} to {other.__name__}", made
    elif isinstance(node, ast.BinOp) and type(node.op) in _ARITHMETIC:
        other_op = _ARITHMETIC[type(node.op)]
        yield (
            f"{type(node.op).__name__} to {other_op.__name__}",
            ast.BinOp(copy.deepcopy(node.left), other_op(), copy.deepcopy(node.right)),
        )
    elif isinstance(node, ast.BoolOp):
        swapped: ast.boolop = ast.Or() if isinstance(node.op, ast.And) else ast.And()
        yield f"{type(node.op).__name__} to {type(swapped).__name__}", ast.BoolOp(swapped, copy.deepcopy(node.values))
    elif isinstance(node, ast.Constant) and isinstance(node.value, (bool, int, float)):
        value = not node.value if isinstance(node.value, bool) else node.value + 1
        yield f"{node.value} to {value}", ast.Constant(value)
    elif isinstance(node, (ast.If, ast.IfExp, ast.While)):
        negated = copy.deepcopy(node)
        negated.test = ast.UnaryOp(ast.Not(), negated.test)
        yield f"{type(node).__name__} negated", negated
    elif isinstance(node, (ast.Assign, ast.AugAssign, ast.Raise)) or (
        isinstance(node, ast.Expr) and not isinstance(node.value, ast.Constant)
    ):
        yield f"{type(node).__name__} deleted", ast.Pass()


def mutants(source: str) -> Iterator[tuple[int, str, str]]:
    """Line, words and text of each mutant; annotations, and what stands outside functions and classes, stay."""
    tree = ast.parse(source)
    for top in tree.body:
        if isinstance(top, (ast.FunctionDef, ast.ClassDef, ast.Assign)):
            yield from _within(tree, top)


def _within(tree: ast.Module, parent: ast.AST) -> Iterator[tuple[int, str, str]]:
    for name, value in ast.iter_fields(parent):
        if name in ("annotation", "returns", "decorator_list"):
            continue
        children = value if isinstance(value, list) else [value]
        for i, child in enumerate(children):
            if not isinstance(child, ast.AST):
                continue
            for words, made in changes(child):
                place = ast.copy_location(made, child)
                if isinstance(value, list):
                    value[i] = place
                else:
                    setattr(parent, name, place)
                yield getattr(child, "lineno", 0), words, ast.unparse(ast.fix_missing_locations(tree))
                if isinstance(value, list):
                    value[i] = child
                else:
                    setattr(parent, name, child)
            yield from _within(tree, child)


def run(package: Path, tests: Sequence[str]) -> str:
    """Run tests against a package in a fork: passed, failed, or late."""
    child = os.fork()
    if child == 0:
        os.setsid()
        null = os.open(os.devnull, os.O_RDWR)
        for stream in (0, 1, 2):
            os.dup2(null, stream)
        os.chdir(ROOT)
        os.environ["PYTHONPATH"] = str(package.parent)
        sys.path[0] = str(package.parent)
        import pytest

        code = 70
        try:
            code = pytest.main(["-x", "-q", "-p", "no:cacheprovider", *tests])
            found = sys.modules["qunlearn"].__file__ or ""
            code = int(code) if found.startswith(str(package)) else 71  # of another checkout
        finally:
            os._exit(code)
    ends = time.monotonic() + _LIMIT_S
    while time.monotonic() < ends:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            code = os.waitstatus_to_exitcode(status)
            if code == 71:
                raise SystemExit("the tests imported another qunlearn")
            return "passed" if code == 0 else "failed"
        time.sleep(0.05)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return "late"


def main() -> None:
    """Draw mutants of each module, run them, and list those that no test noticed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--each", type=int, default=10, help="mutants of a module; 0: all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="*", default=list(TESTS), help="modules below qunlearn/")
    options = parser.parse_args()
    for name in HEAVY:
        importlib.import_module(name)
    with tempfile.TemporaryDirectory() as folder:
        package = Path(shutil.copytree(ROOT / "qunlearn", Path(folder) / "qunlearn"))
        total = survived = 0
        for name in options.only:
            if run(package, TESTS[name]) != "passed":
                raise SystemExit(f"{name}: its tests fail without a mutant")
            path, source = package / name, (ROOT / "qunlearn" / name).read_text(encoding="utf-8")
            found = list(mutants(source))
            drawn = random.Random(f"{options.seed} {name}").sample(found, min(options.each or len(found), len(found)))
            for line, words, text in sorted(drawn):
                path.write_text(text, encoding="utf-8")
                started, result = time.monotonic(), run(package, TESTS[name])
                total, survived = total + 1, survived + (result == "passed")
                shown = {
                    "of": f"{name}:{line}",
                    "change": words,
                    "tests": result,
                    "s": round(time.monotonic() - started),
                }
                sys.stdout.write(json.dumps(shown) + "\n")
                sys.stdout.flush()
            path.write_text(source, encoding="utf-8")
    sys.stdout.write(json.dumps({"mutants": total, "survived": survived}) + "\n")


if __name__ == "__main__":
    main()
