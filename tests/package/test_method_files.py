"""Files of methods hold a config and mathematics: they are short, and what repeats between them is in the engine."""

from __future__ import annotations

import ast
import io
import itertools
import keyword
import statistics
import tokenize
from collections import defaultdict
from pathlib import Path

METHODS = Path(__file__).parents[2] / "src" / "inlay" / "methods"
RUN = 6
SHAPES = {tokenize.NAME: "a", tokenize.NUMBER: "0"}
LAYOUT = {tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.COMMENT, tokenize.ENDMARKER}


def code_lines(source: str) -> list[tuple[int, str]]:
    """Return (number, text) of the lines with code on them, without imports and docstrings; names and numbers aside."""
    dropped: set[int] = set()
    for node in ast.walk(ast.parse(source)):
        body = getattr(node, "body", None)
        first = body[0] if isinstance(body, list) and body else None
        if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
            dropped |= set(range(first.lineno, (first.end_lineno or first.lineno) + 1))
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            dropped |= set(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    lines: dict[int, list[str]] = defaultdict(list)
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in LAYOUT and token.start[0] not in dropped:
            kept = keyword.iskeyword(token.string) or token.type not in SHAPES
            lines[token.start[0]].append(token.string if kept else SHAPES[token.type])
    return [(number, " ".join(tokens)) for number, tokens in sorted(lines.items())]


def repeats(sources: dict[str, str]) -> list[str]:
    """Return one sentence for each run of lines that two files share; runs that overlap count once."""
    files = {name: code_lines(source) for name, source in sources.items()}
    found = []
    for (one, a), (other, b) in itertools.combinations(sorted(files.items()), 2):
        runs = {tuple(text for _, text in b[j : j + RUN]): j for j in range(len(b) - RUN + 1)}
        end = -1
        for i in range(len(a) - RUN + 1):
            j = runs.get(tuple(text for _, text in a[i : i + RUN]))
            if j is not None and i > end:
                found.append(f"{one}:{a[i][0]} and {other}:{b[j][0]}")
                end = i + RUN
    return found


def test_a_shared_run_is_found() -> None:
    body = "\n".join(f"    x{i} = a{i}[{i}] + f(y)" for i in range(RUN))
    one = f"import a\n\n\ndef f(y):\n{body}\n    return y\n"
    other = f'def g(z):\n    """Says something else."""\n    # and more\n{body.replace("x", "q")}\n    return z * 2\n'
    assert repeats({"one": one, "other": other}) == ["one:4 and other:1"]
    assert repeats({"one": one, "other": other.replace("+ f(y)", "- f(y)", 1)}) == []


def test_no_two_methods_share_six_lines() -> None:
    found = repeats({path.name: path.read_text(encoding="utf-8") for path in METHODS.glob("*.py")})
    assert not found, "\n".join(found)


def test_files_of_methods_are_short() -> None:
    """Lines of the files as they are, with imports, docstrings and blank ones."""
    sizes = {
        p.stem: len(p.read_text(encoding="utf-8").splitlines()) for p in METHODS.glob("*.py") if p.stem != "__init__"
    }
    assert len(sizes) > 40
    assert statistics.median(sizes.values()) < 100
    assert {name: size for name, size in sizes.items() if size > 200 and name != "lora"} == {}
