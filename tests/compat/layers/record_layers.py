"""Record what the installed peft says of its layer classes: bases, names of weights, parameters of constructors.

``python tests/compat/layers/record_layers.py`` prints ``src/inlay/compat/layers/layers.json``. Names only; the
test ``test_layer_table.py`` compares the file with the installed peft. Files are read and not imported, because many
need a quantisation library.
"""

from __future__ import annotations

import ast
import json
from pathlib import Path
from typing import Any

ROOT = "tuners.tuners_utils.BaseTunerLayer"


def _parameters(function: ast.FunctionDef) -> str:
    """Return the parameters of a method as words: ``name``, ``name=default``, ``*args``, ``**kwargs``."""
    spec = function.args
    named = spec.posonlyargs + spec.args
    defaults: list[Any] = [None] * (len(named) - len(spec.defaults)) + list(spec.defaults)
    pairs = list(zip(named, defaults, strict=True))[1:]
    words = [arg.arg if default is None else f"{arg.arg}={ast.unparse(default)}" for arg, default in pairs]
    if spec.vararg is not None:
        words.append(f"*{spec.vararg.arg}")
    words += [
        a.arg if d is None else f"{a.arg}={ast.unparse(d)}"
        for a, d in zip(spec.kwonlyargs, spec.kw_defaults, strict=True)
    ]
    if spec.kwarg is not None:
        words.append(f"**{spec.kwarg.arg}")
    return " ".join(words)


def _names(value: ast.expr, known: dict[str, tuple[str, ...]]) -> tuple[str, ...]:
    """Return the tuple of names that an expression of literals and earlier names means."""
    if isinstance(value, ast.BinOp):
        return _names(value.left, known) + _names(value.right, known)
    if isinstance(value, ast.Name):
        return known[value.id]
    return tuple(ast.literal_eval(value))


def record() -> dict[str, dict[str, dict[str, str]]]:
    """Return module -> class -> what is recorded of it, for every layer class of ``peft.tuners``."""
    import peft

    root = Path(peft.__file__).parent
    found: dict[str, ast.ClassDef] = {}
    bases: dict[str, list[str]] = {}
    for path in sorted((root / "tuners").rglob("*.py")):
        home = ".".join(path.relative_to(root).with_suffix("").parts)
        package = home.rpartition(".")[0]
        if path.name == "__init__.py":
            continue
        places: dict[str, str] = {}
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom):
                source = (node.module or "").removeprefix("peft.")
                if node.level:
                    source = f"{package}.{source}".rstrip(".")
                places.update({alias.asname or alias.name: f"{source}.{alias.name}" for alias in node.names})
            elif isinstance(node, ast.ClassDef):
                name = f"{home}.{node.name}"
                found[name] = node
                places[node.name] = name
                bases[name] = [places.get(ast.unparse(base), ast.unparse(base)) for base in node.bases]
    short = {".".join((*name.split(".")[:2], name.rpartition(".")[2])): name for name in found}  # tuners.lora.LoraLayer
    for name, above in bases.items():
        bases[name] = [base if base in found else short.get(base, base) for base in above]

    def is_layer(name: str) -> bool:
        return name == ROOT or any(is_layer(base) for base in bases.get(name, ()))

    recorded: dict[str, dict[str, dict[str, str]]] = {}
    for name, node in found.items():
        if name == ROOT or not is_layer(name):
            continue
        entry: dict[str, str] = {"bases": " ".join(base for base in bases[name] if is_layer(base))}
        if len(bases[name]) > 1 or entry["bases"] == "":
            entry["module"] = "yes"
        for part in node.body:
            if isinstance(part, (ast.Assign, ast.AnnAssign)):
                target = part.targets[0] if isinstance(part, ast.Assign) else part.target
                key = {"adapter_layer_names": "weights", "other_param_names": "others"}.get(ast.unparse(target))
                if key is not None and part.value is not None:
                    entry[key] = " ".join(_names(part.value, {}))
            elif isinstance(part, ast.FunctionDef) and part.name in ("__init__", "update_layer"):
                entry[{"__init__": "init", "update_layer": "update"}[part.name]] = _parameters(part)
        home, _, leaf = name.rpartition(".")
        recorded.setdefault(home, {})[leaf] = entry
    return recorded


if __name__ == "__main__":
    print(json.dumps(record(), indent=1, sort_keys=True))
