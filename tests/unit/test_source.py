"""The package's own text."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest_vmbottle

_DECLARED = ("abstractmethod", "hookspec", "click.group", ".group(", "overload")
"""Decorators of functions that something else does the work of."""


def _functions(tree: ast.AST, *, declared: bool = False) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    """Those that are not only declared, as all in a protocol are, and the defaults of a base class that do nothing."""
    for node in ast.iter_child_nodes(tree):
        port = isinstance(node, ast.ClassDef) and any(ast.unparse(base) in ("ABC", "Protocol") for base in node.bases)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            decorators = " ".join(ast.unparse(decorator) for decorator in node.decorator_list)
            if not declared and not any(word in decorators for word in _DECLARED):
                yield node
        yield from _functions(node, declared=port)


def _is_empty(function: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    return all(
        isinstance(statement, ast.Pass) or (isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant))
        for statement in function.body
    )


def test_a_function_without_a_body_is_found_but_for_those_that_are_declarations() -> None:
    text = """
class Running(Protocol):
    def close(self): ...
class Process:
    def close(self):
        "Gives it up."
    @abstractmethod
    def wait(self): ...
    def kill(self):
        def inner(): pass
        inner()
"""
    assert [function.name for function in _functions(ast.parse(text)) if _is_empty(function)] == ["close", "inner"]


def test_no_function_of_the_package_has_lost_its_body() -> None:
    folder = Path(pytest_vmbottle.__file__).parent
    empty = [
        f"{path.relative_to(folder)}:{function.lineno} {function.name}"
        for path in sorted(folder.rglob("*.py"))
        for function in _functions(ast.parse(path.read_text()))
        if _is_empty(function)
    ]
    assert empty == []
