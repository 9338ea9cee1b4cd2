"""What goes out: text without characters that a terminal obeys; an output that takes no more."""

import contextlib
import os
import re
import signal
import sys

CLOSED = 128 + signal.SIGPIPE
"""The exit code where nobody reads the output any more."""
_UNSEEN = re.compile(
    "[\x00-\x1f\x7f-\x9f\xad\u061c\u180e\u200b-\u200f\u2028-\u202e\u2060-\u206f\ud800-\udfff"
    "\ufeff\ufff9-\ufffb\U000e0000-\U000e007f]"
)
"""Control, bidirectional and zero-width characters; surrogates of file names that are no UTF-8."""


def visible(text: str, keep: str = "") -> str:
    r"""The text with characters that a terminal or a browser would obey written out: U+202E becomes
    \u202e. keep: characters that stay as they are.
    """
    return _UNSEEN.sub(lambda m: m[0] if m[0] in keep else ascii(m[0])[1:-1], text)


def cannot_write(error: OSError) -> tuple[str, str]:
    """Cause and remedy of an output that takes nothing more."""
    return f"cannot write the output: {error.strerror}", "Send it somewhere else."


def drop_output() -> None:
    """Let what is left of the output go nowhere: the interpreter would try again at its end."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
