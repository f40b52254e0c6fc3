"""Files on the local disk: atomic writes, and JSON that says which file was wrong."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from hermes_dist.errors import SourceError


def write_bytes(path: Path, data: bytes) -> None:
    """Write atomically: a temporary file beside it, fsync, rename. Parent folders are made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically, indented by one."""
    write_bytes(path, (json.dumps(value, indent=1) + "\n").encode())


def read_json(path: Path) -> Any:
    """Parse a JSON file.

    Raises:
        SourceError: it is missing, not UTF-8 or not JSON; the message names file and line.
    """
    try:
        return json.loads(path.read_bytes())
    except OSError as error:
        raise SourceError(f"{path} cannot be read ({error.strerror or error}); check the path and its permissions") from None
    except (ValueError, RecursionError) as error:
        raise SourceError(f"{path} is not valid JSON ({error}); repair it") from None
