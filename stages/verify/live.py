"""Whether the teacher still says what the cache says, of the pixels that it saw."""

import torch

from stages.cache import LogitCache
from stages.cache.encoding import row_kl
from stages.data import Splits, cached_policy, check_dataset
from stages.errors import DatasetError, IdentityError, ViewError
from stages.reporting import Reporter, Silent
from stages.teacher.job import CacheJob
from stages.teacher.logits import TeacherPass
from stages.verify.faults import Fault

_NOISE = {"float32": 1e-4, "bfloat16": 5e-3, "float16": 5e-3}
"""Mean KL at T=1 that a teacher may differ by from itself: other batches, other kernels."""


def verify_live(
    cache: LogitCache, job: CacheJob, pairs: int, seed: int = 0, reporter: Reporter | None = None
) -> list[Fault]:
    """Run the teacher on random (view, sample) pairs, and compare what it says with the cache.

    The mean KL at T=1 between its rows and the decoded ones may be twice what `fidelity` declares,
    and the noise of another batch or device on top.
    """
    generator = torch.Generator().manual_seed(seed)
    views = cache.complete_views
    shown = job.splits.train.shown
    pairs = min(pairs, len(views) * len(shown))
    if cache.fidelity is None or not views:
        return [Fault("fidelity", "nothing is declared: the cache is not finished")]
    which = torch.randint(len(views), (pairs,), generator=generator)
    samples = shown[torch.randint(len(shown), (pairs,), generator=generator)]
    teacher = TeacherPass.of(job)
    divergences = []
    for position in which.unique().tolist():
        asked = samples[which == position]
        try:
            live = teacher.logits(asked, views[position])
        except (DatasetError, ViewError) as error:
            return [Fault("live teacher", error.cause)]
        stored = cache.read_view(views[position]).rows(asked)
        divergences.append(row_kl(live, stored, 1.0))
    every = torch.cat(divergences)
    found = float(every.mean())
    noise = _NOISE[cache.identity.compute_dtype]
    allowed = 2 * (cache.fidelity.known_kl(1.0) or 0.0) + noise
    if found <= allowed:
        (reporter or Silent()).say(
            f"live teacher: {len(every):,} rows compared, KL to the cached rows {found:.2g} in the "
            f"mean ({allowed:.2g} is allowed), {float(every.max()):.2g} at the most"
        )
        return []
    return [
        Fault(
            "live teacher",
            f"mean KL {found:.2g} to the cached rows over {pairs} pairs, {allowed:.2g} is allowed",
        )
    ]


def verify_pixels(cache: LogitCache, splits: Splits) -> list[Fault]:
    """Compare samples and pixels with those that the teacher saw."""
    try:
        check_dataset(cache, splits, cached_policy(cache), accept_drift=False, reporter=Silent())
    except (IdentityError, DatasetError, ViewError) as error:
        return [Fault("pixels", error.cause)]
    return []
