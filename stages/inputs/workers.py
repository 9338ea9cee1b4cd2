"""The processes that render views: a `DataLoader` over requests, pass after pass.

Images that a GPU decodes are rendered by threads of this process: a process that was forked has no
GPU.

A request asks for every view of some samples of a batch (`rendered.py`). Its pixels go into a place
in shared memory that is lent to it, and are copied out of there to where its batch lies; so neither
side is given new memory for every batch. Where no place is free or large enough, the pixels travel
in memory of their own.
"""

import pickle
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from stages.errors import PipelineError
from stages.inputs.buffers import Buffers, Slots
from stages.inputs.rendered import (
    Answer,
    RenderedViews,
    Request,
    as_it_is,
    sizes_differ,
    worker_error,
)
from stages.inputs.views import Shown, reseeds

_AHEAD = 2
"""Requests that each worker has at a time."""
_LEAST = 32
"""Images of a request, if its batch has as many: each request costs some of its own."""
_SPARE = 1.25
"""Places are larger than the first requests by this: views at once divide batches unevenly."""


@dataclass
class _Plan:
    """The requests of the next pass; set before each one, read by the loader in this process.

    pieces: int64 (n,) each, samples that are shown in every one of the views. free: places that no
    request has.
    """

    pieces: Sequence[Tensor] = ()
    views: Sequence[int] = ()
    slots: Slots | None = None
    free: list[int] = field(default_factory=list)

    def __iter__(self) -> Iterator[Request]:
        # Begun when all workers have done with the pass before.
        self.free = list(range(self.slots.count if self.slots else 0))
        for piece in self.pieces:
            slot = self.free.pop() if self.free else None
            yield Request(piece.tolist(), list(self.views), slot)

    def __len__(self) -> int:
        return len(self.pieces)


class Workers:
    """Renders views in `count` processes, or in this one where that is 0."""

    def __init__(self, rendered: RenderedViews, count: int, device: torch.device) -> None:
        """device: where views go. For a GPU they are made in memory from which it copies itself."""
        threads = rendered.dataset.decoder is not None and not reseeds(rendered.policy.name)
        self._threads = count if threads else 0
        self._rendered, self._device, self._pinned = rendered, device, device.type == "cuda"
        self._count = count if rendered.dataset.decoder is None else 0
        self._plan, self._buffers, self._passes = _Plan(), Buffers(), 0
        self._loader: DataLoader[Answer | PipelineError] | None = None
        self._channels: int | None = None

    def shown(self, parts: Sequence[Tensor], views: Sequence[int]) -> Iterator[list[Shown]]:
        """Each of these views of each part, int64 (b,). Raises the errors of images, and
        DatasetError where workers fail.
        """
        pieces = [part.split(-(-max(len(part), _LEAST) // len(views))) for part in parts]
        plan = self._plan
        plan.pieces, plan.views = [piece for some in pieces for piece in some], views
        self._passes += 1
        this_pass = self._passes
        if self._threads:
            answers = self._of_threads()
        else:
            answers = self._in_order(self._ready(max(map(len, plan.pieces)) * len(views)))
        for some in pieces:
            yield self._together(some, len(views), answers)
            if this_pass != self._passes:
                raise RuntimeError("another pass over this feed began; its workers serve one")

    def close(self) -> None:
        """Let the processes go; the next pass starts others. Found by the garbage collector, or
        left to the end of the program, each of them may be waited for, for seconds.
        """
        iterator: Any = getattr(self._loader, "_iterator", None)
        if hasattr(iterator, "_shutdown_workers"):  # without workers there is nothing to do
            iterator._shutdown_workers()
        self._loader = self._plan.slots = self._rendered.slots = None
        self._buffers = Buffers()

    # ---- details ------------------------------------------------------------------------

    def _ready(self, images: int) -> "DataLoader[Answer | PipelineError]":
        """The loader, started again where its places are too small. images: of a request."""
        slots, needed = self._plan.slots, self._bytes(images)
        if slots is not None and slots.size < needed:
            self.close()
        if self._loader is None:
            if needed:
                with suppress(RuntimeError):  # shared memory is short: images tell, one by one
                    self._plan.slots = Slots(_AHEAD * self._count + 1, int(needed * _SPARE))
            self._rendered.slots = self._plan.slots
            self._loader = DataLoader(
                self._rendered,
                batch_sampler=self._plan,  # type: ignore[arg-type]
                collate_fn=as_it_is,
                num_workers=self._count,
                prefetch_factor=_AHEAD if self._count else None,
                persistent_workers=self._count > 0,
                pin_memory=self._pinned,
                generator=torch.Generator(),  # or it would draw from the global one
            )
        return self._loader

    def _bytes(self, images: int) -> int:
        """Of so many images of a known size; 0 without workers, or where sizes are their own."""
        side = self._rendered.image_size
        if not self._count or side is None:
            return 0
        if self._channels is None:
            self._channels = len(self._rendered.dataset.load(int(self._plan.pieces[0][0])))
        return images * self._channels * side**2

    def _in_order(
        self, loader: "DataLoader[Answer | PipelineError]"
    ) -> Iterator[Answer | PipelineError]:
        """What workers answer. Raises DatasetError where they fail and not the images."""
        try:
            answers = iter(loader)
            while True:
                try:
                    answer = next(answers)
                except StopIteration:
                    return
                yield answer
        except (RuntimeError, OSError, MemoryError, pickle.PicklingError) as error:
            if not self._count:
                raise
            self.close()
            raise worker_error(error, self._count) from error

    def _of_threads(self) -> Iterator[Answer | PipelineError]:
        """What threads answer, each a request at a time, and some requests ahead."""
        with ThreadPoolExecutor(
            self._threads, initializer=_decode_on, initargs=(self._device,)
        ) as pool:
            ahead: deque[Future[Answer | PipelineError]] = deque()
            for request in self._plan:
                ahead.append(pool.submit(self._rendered.__getitems__, request))
                if len(ahead) > _AHEAD * self._threads:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()

    def _together(
        self, pieces: Sequence[Tensor], views: int, answers: Iterator[Answer | PipelineError]
    ) -> list[Shown]:
        """The answers to the requests of one part: its samples in each of the views."""
        size, start = sum(map(len, pieces)), 0
        pixels: Tensor | None = None  # (views, size, H, W, C)
        partners, shares = [], []
        for piece in pieces:
            answer = _checked(next(answers))
            of_piece, image = (views, len(piece)), tuple(answer.shape[1:])
            found = self._pixels(answer).view(*of_piece, *image)
            if pixels is None and answer.pixels is not None and len(pieces) == 1:
                pixels = found
            else:
                pixels = self._empty(views, size, *image) if pixels is None else pixels
                if image != pixels.shape[2:]:
                    raise sizes_differ(found[0, 0], pixels[0, 0])
                pixels[:, start : start + len(piece)] = found
            start += len(piece)
            if answer.slot is not None:
                self._plan.free.append(answer.slot)
            if answer.partners is not None and answer.shares is not None:
                partners.append(answer.partners.view(of_piece))
                shares.append(answer.shares.view(of_piece))
        assert pixels is not None
        images = pixels.permute(0, 1, 4, 2, 3).unbind()
        if not partners:
            return [Shown(of_view) for of_view in images]
        mixed = zip(images, torch.cat(partners, 1), torch.cat(shares, 1), strict=True)
        return [Shown(*of_view) for of_view in mixed]

    def _pixels(self, answer: Answer) -> Tensor:
        """(B, H, W, C); where they lie in a place, until that is free."""
        if answer.pixels is not None:
            return answer.pixels
        assert self._plan.slots is not None
        assert answer.slot is not None
        return self._plan.slots.at(answer.slot, answer.shape)

    def _empty(self, *shape: int) -> Tensor:
        if self._pinned:  # torch keeps such memory for the next time
            return torch.empty(shape, dtype=torch.uint8, pin_memory=True)
        return self._buffers.empty(*shape)


def _decode_on(device: torch.device) -> None:
    """Decode on the GPU of a rank, in a new thread."""
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)


def _checked(answer: Answer | PipelineError) -> Answer:
    """Raises the workers' own errors."""
    if isinstance(answer, PipelineError):
        try:
            raise answer
        finally:
            del answer  # a cycle through this frame would keep the workers alive
    return answer
