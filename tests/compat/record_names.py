"""Record which names each module of the installed peft has, and where each of them is defined.

Running it prints what ``src/inlay/compat/names.json`` holds. Names and places only; the test
``test_namespace.py`` compares the file with the installed peft.
"""

from __future__ import annotations

import ast
import json
import pkgutil
import sys
from importlib.util import find_spec, resolve_name
from pathlib import Path


def modules() -> dict[str, Path]:
    """Return every module of peft with its file; nothing is imported but packages."""
    import peft

    found = {"peft": Path(peft.__file__)}
    for info in pkgutil.walk_packages(peft.__path__, "peft.", onerror=lambda name: None):
        spec = find_spec(info.name)
        if spec is not None and spec.origin is not None:
            found[info.name] = Path(spec.origin)
    return found


def statements(body: list[ast.stmt]) -> list[ast.stmt]:
    """Return the statements that run when a module is imported, those under a condition included."""
    flat: list[ast.stmt] = []
    for node in body:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        flat.append(node)
        for field in ("body", "orelse", "handlers", "finalbody"):
            if isinstance(node, (ast.If, ast.Try, ast.With, ast.ExceptHandler)):
                for child in getattr(node, field, []):
                    flat.extend(statements([child]) if isinstance(child, ast.stmt) else statements(child.body))
    return flat


def scan(name: str, path: Path) -> tuple[dict[str, str], dict[str, tuple[str, str]]]:
    """Return what a module defines (name -> what) and imports from peft (name -> module, name there)."""
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    defined: dict[str, str] = {}
    imported: dict[str, tuple[str, str]] = {}
    for node in statements(ast.parse(path.read_text(encoding="utf-8")).body):
        if isinstance(node, ast.ClassDef):
            defined[node.name] = "class"
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            defined[node.name] = "function"
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            defined.update((target.id, "value") for target in targets if isinstance(target, ast.Name))
        elif isinstance(node, ast.ImportFrom):
            source = resolve_name("." * node.level + (node.module or ""), package) if node.level else node.module or ""
            if source.partition(".")[0] == "peft":
                for alias in node.names:
                    imported[alias.asname or alias.name] = (source, alias.name)
    return defined, imported


def record() -> dict[str, dict[str, str]]:
    """Return module -> defining module -> names between spaces, without the leading ``peft``.

    A name is ``name:k`` or ``alias=name:k``; ``k`` is ``c`` for a class, ``f`` for a function, ``v`` for a value.
    """
    files = modules()
    scanned = {name: scan(name, path) for name, path in files.items()}

    def home(module: str, name: str) -> tuple[str, str, str] | None:
        defined, imported = scanned[module]
        if name in imported:
            source, original = imported[name]
            if f"{source}.{original}" in files:
                return None  # a module, which the import system finds by itself
            return home(source, original) if source in scanned else None
        return (module, name, defined[name]) if name in defined else None

    table: dict[str, dict[str, str]] = {}
    for module, (defined, imported) in scanned.items():
        held: dict[str, list[str]] = {}
        for name in sorted({*defined, *imported}):
            if name.startswith("__") and name != "__version__":
                continue
            found = home(module, name)
            if found is None:
                continue
            where, original, what = found
            label = name if original == name else f"{name}={original}"
            held.setdefault(where.removeprefix("peft").lstrip("."), []).append(f"{label}:{what[0]}")
        table[module.removeprefix("peft").lstrip(".")] = {where: " ".join(names) for where, names in held.items()}
    return table


if __name__ == "__main__":
    json.dump(record(), sys.stdout, indent=1, sort_keys=True)
    print()
