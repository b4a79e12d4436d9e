"""Ceilings that keep the code readable: size of a file, size of a function, positional parameters, annotations."""

import ast
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60
MAX_POSITIONAL = 3
FOLDERS = ("zo2trl", "recipes", "benchmarks", "tests")

Function = ast.FunctionDef | ast.AsyncFunctionDef


def python_files(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def functions(source: str) -> Iterator[Function]:
    return (node for node in ast.walk(ast.parse(source)) if isinstance(node, Function))


def is_kernel(function: Function) -> bool:
    """A Triton kernel: its parameters are positional by nature and typed by the compiler."""
    return any("jit" in ast.unparse(decorator) for decorator in function.decorator_list)


def positional(function: Function) -> list[str]:
    names = [arg.arg for arg in (*function.args.posonlyargs, *function.args.args)]
    return names[1:] if names[:1] in (["self"], ["cls"]) else names


def without_annotation(function: Function) -> list[str]:
    args = function.args
    own = [arg for arg in (*args.posonlyargs, *args.args) if arg.arg not in ("self", "cls")]
    variadic = [arg for arg in (args.vararg, args.kwarg) if arg is not None]
    bare = [arg.arg for arg in (*own, *args.kwonlyargs, *variadic) if arg.annotation is None]
    return bare + (["the return value"] if function.returns is None else [])


def too_long(source: str) -> list[str]:
    found = [f"file has {n} lines"] if (n := len(source.splitlines())) > MAX_FILE_LINES else []
    for function in functions(source):
        n_lines = (function.end_lineno or function.lineno) - function.lineno + 1
        if n_lines > MAX_FUNCTION_LINES:
            found.append(f"{function.lineno}: {function.name} has {n_lines} lines")
    return found


def too_many_positional(source: str) -> list[str]:
    return [
        f"{function.lineno}: {function.name}({', '.join(positional(function))})"
        for function in functions(source)
        if len(positional(function)) > MAX_POSITIONAL and not is_kernel(function)
    ]


def not_annotated(source: str) -> list[str]:
    return [
        f"{function.lineno}: {function.name}: {', '.join(bare)}"
        for function in functions(source)
        if (bare := without_annotation(function)) and not is_kernel(function)
    ]


def violations(check: Callable[[str], list[str]], paths: Iterable[Path]) -> list[str]:
    """What `check` finds in these files, one line a violation."""
    return [f"{path.relative_to(ROOT)}: {found}" for path in paths for found in check(path.read_text())]


def test_files_and_functions_fit_on_a_few_screens() -> None:
    found = violations(too_long, python_files(*FOLDERS))
    assert not found, "\n".join(found)


def test_beyond_three_parameters_arguments_are_named() -> None:
    # trainers/ override upstream hooks, and recipes follow TRL's scripts: those signatures are not ours to choose.
    ours = [path for path in python_files("zo2trl") if "trainers" not in path.relative_to(ROOT).parts]
    found = violations(too_many_positional, ours)
    assert not found, "\n".join(found)


def test_everything_outside_tests_is_annotated() -> None:
    found = violations(not_annotated, python_files("zo2trl", "recipes", "benchmarks"))
    assert not found, "\n".join(found)


def test_the_rules_catch_what_they_forbid() -> None:
    long_body = "def f() -> None:\n" + "    pass\n" * MAX_FUNCTION_LINES
    assert too_long(long_body) == [f"1: f has {MAX_FUNCTION_LINES + 1} lines"]
    assert too_long("\n" * (MAX_FILE_LINES + 1)) == [f"file has {MAX_FILE_LINES + 1} lines"]
    assert too_many_positional("def f(a, b, c, d): ...") == ["1: f(a, b, c, d)"]
    assert too_many_positional("class A:\n def f(self, a, b, c, *, d): ...") == []
    assert not_annotated("def f(a: int, *rest, b): ...") == ["1: f: b, rest, the return value"]
    assert not_annotated("@triton.jit\ndef f(a, b, c, d): ...") == []
