"""Memory that is used again: never while somebody still has it."""

import gc

import pytest
import torch
from noise import noise, noise_dataset

from stages.inputs import workers
from stages.inputs.buffers import Buffers, Slots
from stages.inputs.feed import ViewFeed
from stages.inputs.views import view_policy

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create 2 worker processes")

CPU = torch.device("cpu")


def test_memory_is_given_out_again_once_nobody_has_it() -> None:
    buffers = Buffers()
    first = buffers.empty(2, 3, 5)
    place, part = first.data_ptr(), first[1:].permute(2, 0, 1)
    del first
    gc.collect()
    other = buffers.empty(2, 3, 5)  # a part of the first is still there
    assert other.data_ptr() != place
    part.fill_(7)
    other.fill_(8)
    assert part.unique().tolist() == [7]
    del part
    again = buffers.empty(4, 7)  # smaller
    assert again.data_ptr() == place
    assert again.shape == (4, 7)
    assert buffers.empty(6, 7).data_ptr() not in (place, other.data_ptr())


def test_places_are_apart() -> None:
    slots = Slots(3, 24)
    for slot in range(3):
        slots.at(slot, (2, 3, 4)).fill_(slot)
    assert [slots.at(slot, (24,)).unique().tolist() for slot in range(3)] == [[0], [1], [2]]
    assert slots.at(1, (2, 2)).is_shared()


@pytest.mark.parametrize(
    ("spec", "short"),
    [("resized-crop-flip", True), ("resized-crop-flip+mixup:alpha=0.8", False)],
)
def test_batches_stay_what_they_are(
    spec: str, short: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All batches of several passes are kept, and compared with each view by itself."""
    if short:

        def none_left(count: int, size: int) -> Slots:
            raise RuntimeError("unable to allocate shared memory(shm)")

        monkeypatch.setattr(workers, "Slots", none_left)
    source, policy = noise_dataset(streamed=True), view_policy(spec)
    several = ViewFeed(source, policy, CPU, image_size=8, workers=2)
    alone = ViewFeed(source, policy, CPU, image_size=8, workers=0)
    order = torch.arange(21).roll(4)
    passes = [((0,), 4), ((3, 1, 2), 5), ((5, 6), 21)]  # the third needs more
    kept = [list(several.views(order, *given)) for given in passes]
    several.close()
    for found, (views, batch_size) in zip(kept, passes, strict=True):
        for place, view in enumerate(views):
            expected = list(alone.batches(order, view, batch_size))
            for batches, one in zip(found, expected, strict=True):
                assert batches[place].pixels.stride() == one.pixels.stride()
                for name in ("samples", "pixels", "partners", "shares"):
                    mine, theirs = getattr(batches[place], name), getattr(one, name)
                    assert mine is theirs is None or torch.equal(mine, theirs)


def test_a_place_is_lent_to_one_request_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also in a pass that begins while another was given up half way."""
    source, policy = noise_dataset(streamed=True), view_policy("resized-crop-flip")
    feed = ViewFeed(source, policy, CPU, image_size=8, workers=2)
    plan, lent = feed._workers._plan, []
    given_up = feed.views(torch.arange(21), (0, 1), 2)
    next(given_up)
    for _ in feed.views(torch.arange(21), (2, 3), 2):
        assert plan.slots is not None
        assert len(set(plan.free)) == len(plan.free) <= plan.slots.count == 5
        lent.append(plan.slots.count - len(plan.free))
    assert max(lent) <= 4  # two ahead for each worker
    assert lent[-1] == 0
    feed.close()
    assert torch.equal(noise(21, 3, 12, 12), source.load(torch.arange(21)))  # and no image changed
