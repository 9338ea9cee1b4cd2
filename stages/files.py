"""Files that are whole whenever they are read."""

import contextlib
import os
from collections.abc import Iterable
from pathlib import Path


def replace_file(path: Path, content: bytes | Iterable[bytes], shared: bool = False) -> None:
    """Write a file as `<name>.partial`, and rename it once it is whole.

    content: its bytes, or parts of them. shared: other processes may write the same file now; each
    then has a partial file of its own. Raises OSError if it cannot be written; what was there
    before is kept.
    """
    owner = f".{os.getpid()}" if shared else ""
    temporary = path.with_name(f"{path.name}{owner}.partial")
    try:
        with temporary.open("wb") as file:
            file.writelines([content] if isinstance(content, bytes) else content)
        os.replace(temporary, path)
    except OSError:
        with contextlib.suppress(OSError):  # on a full disk it is in the way
            temporary.unlink()
        raise
