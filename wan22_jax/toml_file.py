"""How is a TOML file read and overridden, and what is said of what is wrong in it?"""

import difflib
import json
import tomllib
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from wan22_jax.errors import BadInput


class Table(BaseModel):
    """One TOML table: frozen, no unknown keys, no silent conversion of types, no inf or nan."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


def read_toml(path: Path) -> dict[str, Any]:
    """Reads a file; BadInput if it cannot be read or is not TOML."""
    try:
        return tomllib.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise BadInput(f"{path}: no such config file") from None
    except IsADirectoryError:
        raise BadInput(f"{path}: is a folder, a TOML file was expected") from None
    except ValueError as error:  # of tomllib, of the encoding, of a number with too many digits
        raise BadInput(f"{path}: is not valid TOML ({error})") from None
    except RecursionError:
        raise BadInput(f"{path}: is not valid TOML (nested too deeply)") from None


def apply_override(tree: dict[str, Any], override: str) -> None:
    """Sets what ``key.path=value`` says; BadInput if it is not of that form."""
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise BadInput(f"override {override!r}: expected key.path=value")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text
    *tables, last = key.strip().split(".")
    for name in tables:
        tree = tree.setdefault(name, {})
        if not isinstance(tree, dict):
            raise BadInput(f"override {override!r}: {name} is not a table")
    tree[last] = value


def describe_problem(table: type[BaseModel], problem: Any) -> str:
    """Puts an error of pydantic's into words, with the nearest known key."""
    key = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        known = _keys(table)
        near = difflib.get_close_matches(key, known, n=1) or difflib.get_close_matches(
            key.rpartition(".")[2], [name.rpartition(".")[2] for name in known], n=1
        )
        return f"unknown key {key}" + (f", did you mean {near[0]}?" if near else "")
    if problem["type"] == "missing":
        return f"key {key} is missing"
    if problem["type"] == "model_type":
        return f"key {key}: a table expected, got {json.dumps(problem['input'], default=str)}"
    return f"key {key}: {problem['msg']}, got {json.dumps(problem['input'], default=str)}"


def _keys(table: type[BaseModel], prefix: str = "") -> list[str]:
    keys = []
    for name, field in table.model_fields.items():
        keys.append(prefix + name)
        for candidate in (field.annotation, *getattr(field.annotation, "__args__", ())):
            if isinstance(candidate, type) and issubclass(candidate, BaseModel):
                keys += _keys(candidate, f"{prefix}{name}.")
    return keys
