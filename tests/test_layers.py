"""The architecture: which folder may import which, and what needs no torch."""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterator
from pathlib import Path

import qunlearn

PACKAGE = Path(qunlearn.__file__).parent
# From the ground up; what shares a line knows nothing of the others on it. A name may be a folder or a module.
ORDER = (
    ("errors",),
    ("utils", "sandbox"),
    ("config",),
    ("data",),
    ("hub", "parallel"),
    ("memory", "runs"),
    ("model",),
    ("objectives",),
    ("evaluation",),
    ("roles",),
    ("guard",),
    ("training", "merging", "report"),
    ("attack",),
    ("recipe", "ask", "doctor"),
    ("api",),
    ("batch",),
    ("cli",),
    ("__main__",),
)
WITHOUT_TORCH = ("errors", "utils", "sandbox", "config", "data", "hub", "memory", "runs", "report", "cli")
HEAVY = {"torch", "transformers", "peft", "bitsandbytes", "accelerate", "tokenizers"}
_BATCHES = "qunlearn.data.batch"  # tensors of token ids: the one module of data/ that needs torch
RANKS = {name: rank for rank, names in enumerate(ORDER) for name in names}


@functools.cache
def modules() -> tuple[tuple[str, ast.Module], ...]:
    """Return every module of the package with its tree."""
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        found.append((name, ast.parse(path.read_text(encoding="utf-8"))))
    return tuple(found)


def imported(tree: ast.AST) -> Iterator[str]:
    """Yield what is imported anywhere in it, late imports included, those for type checking alone left out."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                yield full if full in names() else node.module
        else:
            yield from imported(node)


@functools.cache
def names() -> frozenset[str]:
    """Return every module of the package, and every folder of it."""
    return frozenset(name for name, _ in modules())


@functools.cache
def imported_at_once() -> dict[str, set[str]]:
    """Return for each module what it imports at its top."""
    return {
        name: {m for node in tree.body if not isinstance(node, ast.FunctionDef) for m in imported(_alone(node))}
        for name, tree in modules()
    }


def reached(name: str, seen: set[str]) -> set[str]:
    """Return what is imported with a module, by way of others too."""
    for other in imported_at_once().get(name, ()):
        if other not in seen:
            seen.add(other)
            reached(other, seen)
    return seen


def rank(module: str) -> int:
    return RANKS[module.split(".")[1]]


def test_every_module_has_its_place_and_none_imports_upwards() -> None:
    """Sideways neither: what shares a line stays apart, so that there is no circle of folders."""
    wrong = []
    for name, tree in modules():
        if name == "qunlearn":
            continue
        own = name.split(".")[1]
        for other in imported(tree):
            if not other.startswith("qunlearn."):
                continue
            folder = other.split(".")[1]
            if folder != own and rank(other) >= rank(name):
                wrong.append(f"{name} imports {other}")
    assert not wrong, "\n".join(wrong)


def test_no_two_modules_import_each_other() -> None:
    """Late imports count: a circle of them works until somebody moves a line."""
    graph = {name: {m for m in imported(tree) if m.startswith("qunlearn.") and m != name} for name, tree in modules()}
    done: set[str] = set()

    def walk(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " -> ".join([*path[path.index(name) :], name])
        if name in done:
            return
        for other in sorted(graph.get(name, ())):
            walk(other, (*path, name))
        done.add(name)

    for name in graph:
        walk(name, ())


def test_what_is_checked_before_loading_needs_no_torch() -> None:
    """Nor does anything that it imports at its top: `qunlearn --help` and refusals answer at once."""
    for name in imported_at_once():
        if name != "qunlearn" and name.split(".")[1] in WITHOUT_TORCH and name != _BATCHES:
            heavy = {m for m in reached(name, set()) if m.split(".")[0] in HEAVY}
            assert not heavy, f"{name} imports {sorted(heavy)}"


def test_training_in_one_process_imports_no_group_of_them() -> None:
    assert "qunlearn.parallel.ranks" in reached("qunlearn.training.forget", set())
    assert "qunlearn.parallel.group" not in reached("qunlearn.training.forget", set())


def _alone(node: ast.stmt) -> ast.Module:
    return ast.Module([node], [])
