"""An existing Dask cluster."""

import contextlib
import logging
from collections.abc import Iterator
from typing import Any

from stages.errors import ConfigError


@contextlib.contextmanager
def existing_cluster(address: str) -> Iterator[Any]:
    """A Dask client of a scheduler whose workers see the same paths. Raises ConfigError."""
    from distributed import Client
    from distributed.utils import silence_logging_cmgr

    with silence_logging_cmgr(logging.CRITICAL + 1):  # errors are reported once, below
        try:
            client = Client(address, timeout=10, set_as_default=False)
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"the Dask scheduler at {address} does not answer: {error}",
                "Start one with `dask scheduler`, or leave --scheduler out.",
            ) from error
        with client:
            if not client.nthreads():
                raise ConfigError(
                    f"the Dask scheduler at {address} has no workers",
                    f"Start some with `dask worker {address} --nthreads 1`.",
                )
            yield client
