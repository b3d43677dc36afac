"""TODO: say what this file is for."""

import json
import os
from pathlib import Path
from typing import Any


def write_text(path: Path, text: str) -> None:
    """Atomically: the old file or the new one stands at every moment."""
    temporary = path.with_name(f".{path.name}.writing")
    temporary.write_text(text)
    os.replace(temporary, path)


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Atomically, for a person to read."""
    write_text(path, json.dumps(values, indent=2) + "\n")


def truncate_after_step(path: Path, step: int) -> None:
    """Drop the lines of a .jsonl file that come after a step, those of test, which a run ends with and will write again, and a
    last line that was cut short."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines():
        try:
            row = json.loads(line)
            if row["step"] <= step and row.get("split") != "test":
                kept.append(line + "\n")
        except ValueError:
            break
    write_text(path, "".join(kept))


def read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.exists() else {}
