"""Does everything work on a GPU? The three stages on the digits there, against this CPU's numbers.

    python -m benchmarks.gpu --smoke
    python -m benchmarks.gpu --smoke --device cpu    the same code against itself

What only moves bytes must be equal. Numbers may differ by the order of sums: by no more than
`CLOSE`. A student's first weights are drawn on the CPU
for every device, so that its losses can be compared step by step.
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from benchmarks.gpu_jpegs import decoded_on_gpu
from benchmarks.parts import Found, Part, SkippedError, Where
from benchmarks.smoke_runs import (
    CLOSE,
    STEPS,
    VIEWS,
    cached,
    check,
    close,
    digits,
    fresh,
    losses_of,
    same_weights,
    student,
    trained,
    trainer_of,
)
from stages.inputs.feed import ViewFeed
from stages.inputs.views import view_policy
from stages.settings import (
    BiasMode,
    BiasSettings,
    Dtype,
    LossSettings,
    SeedSettings,
)
from stages.targets.reader import Upload
from stages.train_student import train_together

POLICIES = (
    "pad-crop:pad=2",
    "pad-crop-flip",
    "pad-crop-flip+erasing:p=0.5",
    "pad-crop-flip+mixup:alpha=0.8",
    "pad-crop-flip+cutmix:alpha=1",
)
LOSSES: tuple[tuple[str, BiasMode], ...] = (
    ("ce", "none"),
    ("kd", "none"),
    ("kd", "eliminate"),
    ("kd", "rectify"),
    ("dkd", "none"),
    ("dist", "none"),
    ("ctkd", "none"),
    ("rld", "none"),
)


# ---- stage one ----------------------------------------------------------------------------------


def reference(where: Where) -> Found:
    """What the other parts compare with."""
    cpu = cached(where, "cpu")
    wrong = sum(int(cpu.read_view(v).wrong(cpu.dataset_index).sum()) for v in range(VIEWS))
    return f"teacher and cache of the CPU; {wrong / VIEWS / len(cpu.labels):.0%} wrong", []


def views(where: Where) -> Found:
    """Images in memory, cropped on the device: the same bytes."""
    train, compared = digits().train, 0
    for spec in POLICIES:
        policy, order = view_policy(spec), torch.randperm(len(train))
        feeds = [ViewFeed(train, policy, torch.device(d)) for d in ("cpu", where.device)]
        for view in (0, 5):
            for one, other in zip(*(f.batches(order, view, 128) for f in feeds), strict=True):
                check(
                    other.pixels.device.type == where.device.partition(":")[0], "not on the device"
                )
                if "mixup" in spec:  # grey levels are blended in float32
                    off = int((one.pixels.int() - other.pixels.cpu().int()).abs().max())
                    check(off <= 1, f"{spec}: off by {off} grey levels")
                else:
                    check(torch.equal(one.pixels, other.pixels.cpu()), f"{spec}: bytes differ")
                compared += len(one.pixels)
    return f"{compared:,} images of {len(POLICIES)} policies", []


def stage_one(where: Where, dtype: Dtype) -> Found:
    """The teacher's rows, and which of them are wrong, but for near-ties."""
    cpu, ours = cached(where, "cpu"), cached(where, where.device, dtype)
    samples, worst, flips = cpu.dataset_index, 0.0, 0
    for view in range(VIEWS):
        theirs, own = cpu.read_view(view), ours.read_view(view)
        exact, rows = theirs.rows(samples), own.rows(samples)
        off = (rows - exact).double()
        worst = max(
            worst, float(off.square().mean().sqrt() / exact.double().square().mean().sqrt())
        )
        check(worst <= CLOSE[dtype], f"logits differ by {worst:.2%}")
        best = exact.topk(2).values
        tie = (best[:, 0] - best[:, 1]) <= 2 * off.abs().amax(1)
        differ = theirs.wrong(samples) != own.wrong(samples)
        check(not bool((differ & ~tie).any()), "rows are wrong that are no near-ties")
        flips += int(differ.sum())
        both = theirs.wrong(samples) & own.wrong(samples) & ~tie
        raised = ours.read_view(view, "pairwise-T4").rectified_rows(samples)[both]
        labels = ours.read_view(view).labels[ours.row_of[samples]][both]
        changed = (raised - rows[both]).gather(1, labels[:, None])
        check(bool((changed > 0).all()), "the label of a rectified row was not raised")
    return f"logits within {worst:.2g}, {flips} of {VIEWS * len(samples):,} masks flip", []


# ---- stage three --------------------------------------------------------------------------------


def student_steps(where: Where, dtype: Dtype, cases: tuple[tuple[str, BiasMode], ...]) -> Found:
    """Losses of a student's first steps."""
    worst = 0.0
    for loss, bias in cases:
        settings = {"loss": LossSettings(name=loss), "bias": BiasSettings(mode=bias)}
        runs = [
            losses_of(trainer_of(where, student(where, device, dtype=dtype, **settings)))
            for device in ("cpu", where.device)
        ]
        worst = max(worst, close(runs[1], runs[0], dtype, f"{loss}, {bias}"))
    return f"{len(cases)} losses, {STEPS} steps, within {worst:.2g}", []


def faster_steps(where: Where, *ways: str) -> Found:
    """A student whose steps are compiled, captured or both, against one whose steps are not."""
    if "capture" in ways and not where.on_gpu:
        raise SkippedError("needs CUDA")
    found, changed = [], dict.fromkeys(ways, True)
    dtypes: tuple[Dtype, ...] = ("float32",) if "compile" in ways else ("float32", "bfloat16")
    for dtype in dtypes:
        plain, fast = (
            losses_of(trainer_of(where, student(where, where.device, dtype=dtype, **changes)))
            for changes in ({}, changed)
        )
        found.append(f"{dtype} within {close(fast, plain, dtype, ' and '.join(ways)):.2g}")
    trained(where, student(where, where.device, **changed))  # evaluates and saves as well
    return ", ".join(found), []


def resumed(where: Where) -> Found:
    """A run that was stopped by a signal in its second epoch ends with the same bits."""
    config = student(where, where.device, deterministic=True)
    off = same_weights(trained(where, config), trained(where, config, stop_after=STEPS + 7))
    check(off == 0, f"weights differ by {off:.2g}")
    return "the same bits", []


def together(where: Where) -> Found:
    """Three students of one stream have the weights that each has alone."""
    configs = [
        student(where, where.device, deterministic=True, loss=loss, seed=SeedSettings(init=init))
        for init, loss in enumerate([LossSettings("ce"), LossSettings("kd"), LossSettings("dkd")])
    ]
    outs = [where.folder / f"together-{fresh(where).name}-{n}" for n in range(len(configs))]
    train_together(configs, outs, splits=digits())
    off = max(same_weights(trained(where, c), o) for c, o in zip(configs, outs, strict=True))
    check(off == 0, f"weights differ by {off:.2g}")
    return "the same bits as alone", []


# ---- moving bytes, several processes ----------------------------------------------------------


def streamed(where: Where) -> Found:
    """Images that processes render, sent from pinned memory while the device has other work."""
    policy, device = view_policy("pad-crop-flip"), torch.device(where.device)
    order = torch.randperm(len(digits().train))
    held = ViewFeed(digits().train, policy, torch.device("cpu")).batches(order, 3, 64)
    feed = ViewFeed(digits("stream", 2).train, policy, device, workers=2)
    busy = torch.randn(2048, 2048, device=device) if where.on_gpu else None
    try:
        for one, other in zip(held, feed.batches(order, 3, 64), strict=True):
            if busy is not None:
                busy = busy @ busy / 100
            check(torch.equal(one.pixels, other.pixels.cpu()), "bytes differ")
            check(torch.equal(one.samples, other.samples.cpu()), "samples differ")
    finally:
        feed.close()
    pinned = "from pinned memory" if where.on_gpu else "not pinned: no CUDA here"
    return f"{len(order):,} images by 2 processes, {pinned}", []


def uploads(where: Where) -> Found:
    """A thread's copies on a stream of its own, while the device has other work, are whole."""
    if not where.on_gpu:
        raise SkippedError("needs CUDA")
    from concurrent.futures import ThreadPoolExecutor

    device = torch.device(where.device)
    upload, busy = Upload(device), torch.randn(4096, 4096, device=device)
    sent = [torch.randint(0, 256, (1_000_000 + n,), dtype=torch.uint8) for n in range(12)]
    with ThreadPoolExecutor(1) as pool:
        arriving = [pool.submit(upload, tensor) for tensor in sent]
        for tensor, future in zip(sent, arriving, strict=True):
            for _ in range(8):
                busy = busy @ busy / 100
            moved = future.result()
            check(torch.equal(moved.cpu(), tensor), "bytes differ")
            del moved  # its memory is given out again
    return f"{len(sent)} tensors of a megabyte", []


def ddp(where: Where) -> Found:
    """One rank with the collectives of several: DDP's steps are those of the plain model."""
    device = torch.device(where.device)
    if where.on_gpu:
        device = torch.device("cuda", torch.cuda.current_device())
    backend = "cpu:gloo,cuda:nccl" if where.on_gpu else "gloo"
    plain = losses_of(trainer_of(where, student(where, where.device)))
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    try:
        for place in {"cpu", str(device)}:
            value = torch.arange(5.0, device=place)
            dist.all_reduce(value)
            dist.broadcast(value, src=0)
            check(torch.equal(value.cpu(), torch.arange(5.0)), f"a sum of one rank on {place}")
        trainer = trainer_of(where, student(where, where.device))
        learner = trainer.learner
        learner.passes.training = DistributedDataParallel(
            learner.module, device_ids=[device] if where.on_gpu else None
        )
        worst = close(losses_of(trainer), plain, "float32", "DDP")
    finally:
        dist.destroy_process_group()
    return f"{backend}, one rank, {STEPS} steps within {worst:.2g}", []


def _part(name: str, limit: float, run: Callable[[Where], Found]) -> Part:
    return Part(f"smoke: {name}", limit, run)


KD: tuple[tuple[str, BiasMode], ...] = (("kd", "none"), ("kd", "rectify"))
SMOKE = (
    _part("reference", 60, reference),
    _part("views", 20, views),
    _part("stage one, float32", 20, partial(stage_one, dtype="float32")),
    _part("student, float32", 40, partial(student_steps, dtype="float32", cases=LOSSES)),
    _part("stage one, bfloat16", 20, partial(stage_one, dtype="bfloat16")),
    _part("student, bfloat16", 20, partial(student_steps, dtype="bfloat16", cases=KD)),
    _part("stage one, float16", 20, partial(stage_one, dtype="float16")),
    _part("student, float16", 20, partial(student_steps, dtype="float16", cases=KD)),
    _part("capture", 30, lambda where: faster_steps(where, "capture")),
    _part("resume", 20, resumed),
    _part("together", 30, together),
    _part("uploads", 15, uploads),
    _part("streamed images", 30, streamed),
    _part("JPEGs decoded on the GPU", 30, decoded_on_gpu),
    _part("DDP", 30, ddp),
    _part("compile", 60, lambda where: faster_steps(where, "compile")),
    _part("both", 60, lambda where: faster_steps(where, "compile", "capture")),
)
"""In the order of how much depends on them; compiling takes longest and comes last."""
