"""Where modules are looked up: the current folder comes last. Imports nothing but os and sys."""

import os
import sys


def current_folder_last() -> None:
    """Look modules up in the current folder after the libraries: a `json.py` that lies beside data
    is not run, and `module:callable` is found. Processes that this one starts do likewise.
    """
    try:
        here = os.getcwd()
    except OSError:  # it was deleted
        return
    if sys.path[-1:] == [here]:  # done already
        return
    if sys.path and not sys.flags.safe_path and sys.path[0] in ("", here):
        del sys.path[0]  # of `python -m`
    sys.path.append(here)
    os.environ["PYTHONSAFEPATH"] = "1"
