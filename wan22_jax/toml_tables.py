"""How is a TOML file read, overridden from the command line, and checked key by key?"""

import tomllib
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from wan22_jax.errors import BadInput


class Table(BaseModel):
    """One TOML table: frozen, no unknown keys, no silent conversion of types, no inf or nan."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


def read_toml(path: Path) -> dict[str, Any]:
    """Reads a file; BadInput says what is wrong with it."""
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
    """Sets what ``key.path=value`` says, a value of TOML or bare text."""
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
