"""Benchmarks, one line of JSON a measurement: python tests/bench.py [--quick] [--only NAME ...]

decode   CPU time of a clip of 8 frames, stride 8, at rho 1, 2, 4: ours, torchcodec (approximate and
         exact mode) and decord, each with one thread, on encodes like those of data sets (x264
         medium, B-frames, noise and motion at the bit rate of real files) and on real ones:
         --videos FILE|FOLDER ... The others need `pip install torchcodec decord`, and torchcodec
         the system's FFmpeg libraries: `apt install ffmpeg`.
memory   growth of a process over thousands of decodes; start-up on a list of a million lines.
augment  the default augmentation of a clip beside its decoding, or beside a step on a GPU.
step     one training step: ours beside contiguous tensors (fp16 on a GPU); on a GPU clips a second
         and share of the measured peak, of a batch that fills it, and peak memory by rho, with and
         without --low-memory.
compute  memory, FLOPs and hours of every method, computed without a GPU; kernel launches.
loader   videos a second of one worker on the files in --videos, beside torchcodec + transforms.v2
         and pytorchvideo's data set, where they are installed; cores that feed one GPU.

Ratios of one run on one machine can be compared, absolute numbers only with their hardware.
"""

import argparse
import contextlib
import functools
import gc
import importlib.metadata
import itertools
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from unittest import mock

import av
import numpy as np
import torch
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from torchvision.transforms import v2

sys.path.insert(0, str(Path(__file__).parent.parent))
import byol
import common
import fake_gpu
import moco
import simclr
import swav
from videos import make_video

FRAMES, STRIDE, FPS = 8, 8, 30
SPAN = FRAMES * STRIDE / 30
METHODS = {"simclr": simclr, "moco": moco, "byol": byol, "swav": swav}
CLASSES = {"simclr": simclr.SimCLR, "moco": moco.MoCo, "byol": byol.BYOL, "swav": swav.SwAV}
FLOP = 2 * 41.74e9  # of slow_r50's forward pass of one 8 x 224 x 224 clip


def say(name, **numbers):
    numbers = {k: round(v, 4) if isinstance(v, float) else v for k, v in numbers.items()}
    print(json.dumps({"name": name, **numbers}), flush=True)


# --- decode

LAYOUTS = [  # (width, height), bits a second, seconds, frames from one key frame to the next
    ((340, 256), 800_000, 10, 12),
    ((340, 256), 800_000, 10, 48),
    ((340, 256), 800_000, 10, 250),
    ((340, 256), 800_000, 60, 250),
    ((1280, 720), 3_000_000, 10, 12),
    ((1280, 720), 3_000_000, 10, 48),
    ((1280, 720), 3_000_000, 10, 250),
]


@functools.cache
def texture(width, height, seed):
    """Random blocks at all scales, as natural pictures have them: (height, width, 3) float32."""
    rng = np.random.default_rng(seed)
    picture = np.zeros((height, width, 3), np.float32)
    for side in (128, 64, 32, 16, 8, 4, 2):
        coarse = rng.normal(0, 6 * side**0.5, (height // side + 2, width // side + 2, 3))
        blocks = np.kron(coarse, np.ones((side, side, 1)))
        picture += blocks[:height, :width].astype(np.float32)
    return (picture + 128).clip(0, 255)


def moving_scene(counter, width, height):
    """A background that a hand-held camera sees, four things that move over it, and the noise of a
    sensor: what a codec has to do for a video from the street."""
    rng = np.random.default_rng(counter)
    margin = height // 4
    scene = texture(width + 2 * margin, height + 2 * margin, 0)
    x = margin + round(margin * 0.8 * np.sin(counter / 47) + rng.normal(0, 0.7))
    y = margin + round(margin * 0.8 * np.sin(counter / 31) + rng.normal(0, 0.7))
    picture = scene[y : y + height, x : x + width].copy()
    side = height // 3
    for thing in range(1, 5):
        x = round((width - side) * (0.5 + 0.5 * np.sin(counter / (9 * thing) + thing)))
        y = round((height - side) * (0.5 + 0.5 * np.cos(counter / (7 * thing + 9))))
        picture[y : y + side, x : x + side] = texture(side, side, thing)
    picture += rng.normal(0, 4, (height, width, 1))
    return picture.clip(0, 255).astype(np.uint8)


def encode(path, size, bits, seconds, gop):
    # crf -1: not the constant quality of make_video, but the bit rate
    options = {"preset": "medium", "crf": "-1", "b": str(bits), "x264-params": "threads=1"}
    return make_video(
        path,
        n=seconds * FPS,
        size=size,
        gop=gop,
        bframes=3,
        draw=moving_scene,
        codec_options=options,
    )


def with_torchcodec(mode, path, times):
    from torchcodec.decoders import VideoDecoder

    decoder = VideoDecoder(path, seek_mode=mode, num_ffmpeg_threads=1)
    begin, end = decoder.metadata.begin_stream_seconds, decoder.metadata.end_stream_seconds
    seconds = np.minimum(times.ravel() + begin, end - 0.02)
    return decoder.get_frames_played_at(seconds.tolist()).data


def with_decord(path, times):
    import decord

    reader = decord.VideoReader(path, num_threads=1)
    numbers = (times.ravel() * reader.get_avg_fps()).astype(int)
    return reader.get_batch(np.minimum(numbers, len(reader) - 1).tolist()).asnumpy()


def ours(path, times):
    return common.read_clips(path, times, FRAMES, STRIDE)


READERS = {
    "ours": ours,
    "torchcodec_approximate": functools.partial(with_torchcodec, "approximate"),
    "torchcodec_exact": functools.partial(with_torchcodec, "exact"),
    "decord": with_decord,
}


def decode(quick, folder, videos=()):
    """Encodes first, then the real files."""
    path = make_video(folder / "try.mp4", n=3 * FPS)
    times = np.arange(FRAMES)[None] * STRIDE / 30
    readers = {}
    for name, reader in READERS.items():
        try:
            reader(path, times)
            readers[name] = reader
        except Exception as error:  # not installed, or it does not find its libraries
            say("decode", left_out=name, reason=str(error).strip().split("\n")[0][:90])
    for name in ("torchcodec", "decord"):
        if name in sys.modules:
            say("decode", package=name, version=importlib.metadata.version(name))
    rounds = 6 if quick else 24
    for (width, height), bits, seconds, gop in LAYOUTS[:3] if quick else LAYOUTS:
        name = f"x264-{width}x{height}-gop{gop}-{seconds}s.mp4"
        path = encode(folder / name, (width, height), bits, seconds, gop)
        measure(path, readers, rounds)
    for video in videos:
        for path in sorted(Path(video).rglob("*.*")) if Path(video).is_dir() else [Path(video)]:
            if path.suffix in common.SUFFIXES:
                measure(str(path), readers, rounds)


def describe(path):
    """What decides about the cost of a file."""
    with av.open(path) as container:
        stream = container.streams.best("video")
        packets = [p for p in container.demux(stream) if p.pts is not None]
        keys = [i for i, packet in enumerate(packets) if packet.is_keyframe] + [len(packets)]
        ahead = np.maximum.accumulate([packet.pts for packet in packets])
        size = np.mean([packet.size for packet in packets])
        return dict(
            codec=stream.codec_context.name,
            size=[stream.codec_context.width, stream.codec_context.height],
            fps=float(stream.average_rate),
            kilobits=round(8 * size * float(stream.average_rate) / 1000),  # a second
            longest_gop=int(np.diff(keys).max()),
            b_frames=float(np.mean([p.pts < a for p, a in zip(packets, ahead, strict=True)])),
        )


def measure(path, readers, rounds):
    """Medians over the same random clips; the readers take turns, in an order that is shuffled."""
    with common.VideoReader(path) as reader:
        seconds = reader.duration
    told = dict(file=Path(path).name, seconds=round(seconds, 1), **describe(path))
    for rho in (1, 2, 4):
        rng = np.random.default_rng(rho)
        spent = {name: [] for name in readers}
        for _ in range(rounds):
            starts = rng.uniform(0, max(0.0, seconds - SPAN), rho)
            times = starts[:, None] + np.arange(FRAMES) * STRIDE / 30
            for name in rng.permutation(list(readers)):
                begun = time.process_time()
                readers[name](path, times)
                spent[name].append(1000 * (time.process_time() - begun) / rho)
        ms = {f"{name}_ms": float(np.median(values)) for name, values in spent.items()}
        both = [ms[name] for name in ms if name.startswith("torchcodec")]
        if both:
            ms["ours_to_torchcodec"] = ms["ours_ms"] / min(both)
        if "decord_ms" in ms:
            ms["ours_to_decord"] = ms["ours_ms"] / ms["decord_ms"]
        say("decode", **told, rho=rho, clips=rounds * rho, **ms)


# --- memory


def megabytes(key, pid="self"):
    """Rss or Pss of a process."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(key)).split()[1]) / 1024


def memory(quick, folder):
    paths = [
        make_video(folder / f"m{i}.{e}", n=60, size=(340, 256), bframes=2)
        for i, e in enumerate(["mp4", "mkv", "ts"])
    ]
    count = 600 if quick else 3000
    for i in range(count):
        if i == count // 10:
            before = megabytes("Rss")
        common.read_clips(paths[i % 3], [0.1, 0.9], FRAMES, 2, 128)
    say("memory", decodes=count, growth_mb=megabytes("Rss") - before)
    lines = 100_000 if quick else 1_000_000
    listed = folder / "list.txt"
    with open(listed, "w") as file:
        for i in range(lines):
            file.write(f"videos/class {i % 400}/a video with a name {i}.mp4\t{i % 400}\n")
    begun, before = time.perf_counter(), megabytes("Pss")
    videos = common.VideoClips(config(byol, data=str(listed)), byol.sample_clips)
    took = time.perf_counter() - begun
    say("memory", list_lines=lines, start_up_s=took, held_mb=megabytes("Pss") - before)
    children = []
    for _ in range(4):  # workers that go through all paths
        if (pid := os.fork()) == 0:
            for i in range(len(videos)):
                videos.paths[i]
            time.sleep(60)
        children.append(pid)
    time.sleep(3 if quick else 25)
    sizes = [round(megabytes("Pss", pid), 1) for pid in children]
    say("memory", list_lines=lines, worker_pss_mb=sizes)
    for pid in children:
        os.kill(pid, 9)
        os.waitpid(pid, 0)


# --- augment


def config(script, **changes):
    """The released settings of a script, with some changed."""
    cfg = script.Config(**changes)
    cfg.given, cfg.script = set(changes), script.__name__
    return cfg


def seconds_of(function, rounds):
    """Seconds of a call, the median, GPU included."""
    times = []
    for i in range(rounds + 2):
        if common.device().type == "cuda":
            torch.cuda.synchronize()
        begun = time.perf_counter()
        function()
        if common.device().type == "cuda":
            torch.cuda.synchronize()
        if i > 1:
            times.append(time.perf_counter() - begun)
    return float(np.median(times))


def augment(quick, folder):
    device = common.device()
    B = 2 if quick or device.type == "cpu" else 32
    views = torch.randint(255, (B, 2, 8, 3, 224, 224), dtype=torch.uint8, device=device)
    seeds = torch.arange(2 * B).reshape(B, 2)
    crop, color = common.train_transform(config(byol))
    clip = torch.randint(255, (8, 3, 256, 340), dtype=torch.uint8)
    rounds = 3 if quick else 20
    took = seconds_of(lambda: common.augment(views, seeds, color), rounds) / (2 * B)
    cropped = seconds_of(lambda: crop(clip), 10)
    path = make_video(folder / "a.mp4", n=300, size=(340, 256), draw=moving_scene)
    read = seconds_of(lambda: common.read_clips(path, [3.0], FRAMES, STRIDE, 256), 5)
    ms = {"color_ms_a_clip": 1000 * took, "crop_ms_a_clip": 1000 * cropped}
    say("augment", device=device.type, **ms, decode_ms_a_clip=1000 * read)


# --- step


def loss_of(name, cfg, model, out):
    if name == "simclr":
        return simclr.nt_xent(out, cfg.temperature)
    if name == "moco":
        return cfg.num_views * moco.info_nce(*out, model.queue, cfg.temperature)
    if name == "byol":
        return cfg.num_views * byol.regression_loss(*out)
    codes = swav.assign(out[1], cfg.epsilon, cfg.sinkhorn_iterations)
    return swav.swapped_prediction(out[1], codes, cfg.temperature)


def contiguous_views(network, clips, low_memory=False):
    """What encode_views is without its memory format."""
    return torch.stack([network(view).float() for view in clips.unbind(1)], dim=1)


def stepper(name, batch, rho, low_memory=False, size=224, plain=False):
    """A function that does one training step of a method, as its script has it.

    plain: contiguous tensors, on a GPU fp16 autocast, instead of channels_last_3d and bf16."""
    cfg = config(METHODS[name], rho=rho, low_memory=low_memory)
    torch.manual_seed(0)
    device = common.device()
    model = CLASSES[name](cfg).to(device)
    optimizer = common.make_optimizer(model, cfg)
    clips = torch.randn(batch, cfg.num_views, 3, FRAMES, size, size, device=device)
    half = torch.float16 if plain else torch.bfloat16
    encode = contiguous_views if plain else common.encode_views

    def step():
        autocast = torch.autocast(device.type, half, enabled=device.type == "cuda")
        with mock.patch.object(common, "encode_views", encode), autocast:
            out = model(clips)
        loss = loss_of(name, cfg, model, out)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if hasattr(model, "target"):
            METHODS[name].update_target(model.target, model.encoder, 0.99)

    return step


def filling(name, rho):
    """The step of the largest batch, of 2^n clips, that fits the GPU, and its number of videos."""
    for clips in (512, 256, 128, 64, 32, 16):
        once = None  # here, where no traceback holds the tensors of the last try
        free()
        with contextlib.suppress(RuntimeError):  # out of memory, or no algorithm that fits
            once = stepper(name, clips // rho, rho)
            once()  # the optimizer's state comes with the first step
            once()
            return once, clips // rho
    raise SystemExit(f"{name}: not even 16 clips fit")


def free():
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()


def step(quick, folder):
    if common.device().type == "cpu":
        size, batch = (64, 2) if quick else (112, 4)
        return ordinary(quick, size, batch)
    torch.backends.cudnn.benchmark = True
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    peak = 2 * 8192**3 / seconds_of(lambda: a @ b, 10)
    say("step", gpu=torch.cuda.get_device_name(), peak_tflops=peak / 1e12)
    for name in METHODS:
        for rho in (2, 4):
            once, batch = filling(name, rho)
            took = seconds_of(once, 5 if quick else 15)
            passes = 4 if name in ("moco", "byol") else 3  # forward, backward twice; the target's
            share = passes * FLOP * batch * rho / took / peak
            numbers = {"clips_a_second": batch * rho / took, "share_of_peak": share}
            say("step", method=name, rho=rho, videos=batch, **numbers)
            once = None
    ordinary(quick, size=224, batch=32)
    for name in METHODS:
        for rho in (1, 2, 4, 8):
            for low_memory in (False, True):
                free()
                once = stepper(name, 8, rho, low_memory)
                once()
                once()
                peak_gb = torch.cuda.max_memory_allocated() / 2**30
                say("step", method=name, rho=rho, videos=8, low_memory=low_memory, peak_gb=peak_gb)
                once = None


def ordinary(quick, size, batch):
    """SimCLR's step as it is, beside contiguous tensors (on a GPU in fp16): times in turn."""
    steppers = {
        "ours_s": stepper("simclr", batch, 2, size=size),
        "ordinary_s": stepper("simclr", batch, 2, size=size, plain=True),
    }
    times = {name: [] for name in steppers}
    for _ in range(3 if quick else 9):
        for name, once in steppers.items():
            times[name].append(seconds_of(once, 1))
    medians = {name: float(np.median(values)) for name, values in times.items()}
    ratio = medians["ordinary_s"] / medians["ours_s"]
    kind = common.device().type
    say("step", device=kind, size=size, videos=batch, **medians, ordinary_to_ours=ratio)


# --- compute

GPUS, VIDEOS, EPOCHS, TRAINING_VIDEOS = 8, 8, 200, 240_000  # VIDEOS: a GPU and step
PEAK, SHARE = 990e12, 0.3  # FLOP/s of an H100, dense bf16; what a network is assumed to reach
WORDS = "computed, not measured"


def size_of(tensors):
    """Bytes of tensors, each storage once."""
    storages = {tensor.untyped_storage()._cdata: tensor.untyped_storage() for tensor in tensors}
    return sum(storage.nbytes() for storage in storages.values())


def saved_for_backward(model, forward):
    """Bytes that a forward pass keeps for backward, each storage once, without the model's own."""
    own = {t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers())}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage  # held, so that no other gets its address
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        forward()
    return sum(storage.nbytes() for storage in kept.values())


def flop_of(forward):
    with FlopCounterMode(display=False) as counter:
        forward()
    return counter.get_total_flops()


def computed(name, rho):
    """Memory and work of a step of VIDEOS videos on a GPU that is not there: two lines, without and
    with --low-memory."""
    cfg = config(METHODS[name], rho=rho, batch_size=GPUS * VIDEOS)
    mode = FakeTensorMode()
    model = fake_gpu.move(mode, CLASSES[name](cfg))
    trained = [p for p in model.parameters() if p.requires_grad]
    kept = [t for t in (*model.parameters(), *model.buffers()) if not t.requires_grad]
    optimizer = common.make_optimizer(model, cfg)
    autocast = fake_gpu.with_bfloat16(common.autocast)
    with mode, mock.patch.object(common, "device", lambda: fake_gpu.CUDA):
        shape = (VIDEOS, cfg.num_views, 3, cfg.frames, cfg.size, cfg.size)
        clips = torch.empty(shape, device=fake_gpu.CUDA)

        def forward():
            with autocast():
                out = model(clips)
            return loss_of(name, cfg, model, out)

        def one_view():
            with autocast():
                return common.encode_views(model.encoder, clips[:, :1])

        def target():
            if hasattr(model, "target"):
                with autocast(), torch.no_grad():
                    common.encode_views(model.target, clips)

        saved, saved_of_a_view = (saved_for_backward(model, f) for f in (forward, one_view))
        target_flop = flop_of(target)
        online_flop = flop_of(forward) - target_flop
        for p in trained:
            p.grad = torch.empty_like(p)
        optimizer.step()
        state = [t for values in optimizer.state.values() for t in values.values()]
        sizes = {
            "parameters": size_of(trained),
            "gradients": size_of([p.grad for p in trained]),
            "optimizer": size_of(state),
            "target_and_buffers": size_of(kept),
            "clips": clips.nbytes,
        }
    for low_memory in (False, True):
        passes = 3 + low_memory  # forward, backward twice as much; forward once more
        sizes["saved"] = saved
        if low_memory:  # the inputs of all views, and what one view saves, at a time
            sizes["saved"] = clips.nbytes + saved_of_a_view
        flop = passes * online_flop + target_flop
        seconds = flop / (SHARE * PEAK)
        steps = EPOCHS * (TRAINING_VIDEOS // (GPUS * VIDEOS))
        memory = {f"{part}_gib": size / 2**30 for part, size in sizes.items()}
        memory["total_gib"] = sum(sizes.values()) / 2**30
        work = {"forward_tflop": (online_flop + target_flop) / 1e12, "step_tflop": flop / 1e12}
        work |= {"step_ms": 1000 * seconds, "hours": steps * seconds / 3600}
        setting = {"method": name, "rho": rho, "low_memory": low_memory}
        say("compute", **setting, **memory, **work, note=WORDS)


class Launches(TorchDispatchMode):
    """Counts operations that launch a kernel on a GPU: no views, no allocations, and none on at
    most `small` numbers, which augmentation draws on the CPU."""

    def __init__(self, small):
        super().__init__()
        self.count, self.small = 0, small

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        first = result[0] if isinstance(result, (tuple, list)) else result
        name = function.overloadpacket.__name__
        aliases = [r.alias_info for r in function._schema.returns]
        view = any(alias is not None and not alias.is_write for alias in aliases)
        idle = name.startswith(("empty", "new_empty", "detach", "unsqueeze_", "_unsafe_view"))
        if isinstance(first, torch.Tensor) and first.numel() > self.small:
            self.count += not view and not idle
        return result


def launches(rho=4):
    """Kernels of a BYOL step by its parts, counted on small tensors on the CPU."""
    cfg = config(byol, rho=rho)
    _, color = common.train_transform(cfg)
    clips = torch.randint(255, (VIDEOS, rho, FRAMES, 3, 48, 48), dtype=torch.uint8)
    seeds = torch.arange(VIDEOS * rho).reshape(VIDEOS, rho)
    model = byol.BYOL(cfg)
    views = torch.randn(2, rho, 3, 4, 64, 64)
    with Launches(small=4) as augmentation:
        common.augment(clips, seeds, color)
    with Launches(small=0) as forward:
        loss = byol.regression_loss(*model(views))
    with Launches(small=0) as backward:
        loss.backward()
    counts = {"augmentation": augmentation.count, "forward": forward.count}
    counts["backward"] = backward.count
    share = augmentation.count / (forward.count + backward.count)
    setting = {"method": "byol", "rho": rho, "videos": VIDEOS}
    say("compute", **setting, launches=counts, augmentation_to_network=share, note=WORDS)


def compute(quick, folder):
    """Memory and FLOPs of a step, and hours, of every method, without a GPU."""
    setting = f"{VIDEOS} videos a GPU, slow_r50, 8 x 224 x 224, bf16"
    hours = f"{EPOCHS} epochs of {TRAINING_VIDEOS} videos on {GPUS} GPUs"
    rate = f"{SHARE:.0%} of {PEAK / 1e12:.0f} TFLOP/s (H100, dense bf16)"
    left = "workspaces, allocator, CUDA's own, data loading, communication, augmentation"
    say("compute", setting=setting, hours_of=hours, rate=rate, left_out=left, note=WORDS)
    for name in METHODS:
        for rho in (1, 2, 4):
            computed(name, rho)
    launches()


# --- loader


class WithTorchcodec(torch.utils.data.Dataset):
    """The views of a VideoClips, made of torchcodec and transforms.v2."""

    def __init__(self, cfg, paths):
        self.cfg, self.paths = cfg, paths
        self.crop = v2.RandomResizedCrop(cfg.size, scale=cfg.crop_area, ratio=(3 / 4, 4 / 3))

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, i):
        from torchcodec.decoders import VideoDecoder

        cfg = self.cfg
        decoder = VideoDecoder(self.paths[i], seek_mode="approximate", num_ffmpeg_threads=1)
        duration = decoder.metadata.duration_seconds
        starts = np.random.uniform(0, max(0, duration - cfg.clip_seconds), cfg.rho)
        times = starts[:, None] + np.arange(cfg.frames) * cfg.stride / 30  # (rho, T)
        times = times.clip(max=duration - 0.01)
        frames = decoder.get_frames_played_at(times.ravel().tolist()).data  # (N, 3, H, W)
        clips = frames.unflatten(0, times.shape)  # (rho, T, 3, H, W)
        return torch.stack(
            [self.crop(clip) for clip in clips.expand(cfg.num_views, *clips.shape[1:])]
        )


def with_pytorchvideo(cfg, paths):
    """The same made of pytorchvideo's data set: an endless source of videos (V, T, 3, H, W)."""
    from pytorchvideo.data import LabeledVideoDataset, make_clip_sampler

    crop = v2.RandomResizedCrop(cfg.size, scale=cfg.crop_area, ratio=(3 / 4, 4 / 3))
    sampler = make_clip_sampler("random", cfg.clip_seconds)
    while True:
        rows = [(path, {"label": 0}) for path in paths for _ in range(cfg.rho)]
        order = torch.utils.data.SequentialSampler
        views = []
        for item in LabeledVideoDataset(rows, sampler, order, decode_audio=False):
            frames = item["video"].transpose(0, 1)  # (all frames of the clip, 3, H, W), float
            chosen = torch.linspace(0, len(frames) - 1, cfg.frames).long()
            clip = frames[chosen].byte()
            for _ in range(cfg.num_views // cfg.rho):
                views.append(crop(clip))
            if len(views) == cfg.num_views:
                yield torch.stack(views)
                views = []


def ours_of(cfg, paths):
    dataset = common.VideoClips(cfg, byol.sample_clips, videos=(paths, [""] * len(paths)))
    dataset.color_on_device = True  # as beside a GPU, which does the rest
    return dataset


def cores_of_a_gpu(rho, videos_a_second):
    """How many cores, each reading so many videos a second, feed a GPU that trains BYOL at SHARE of
    PEAK: 8 videos need 4 passes (forward, backward twice, the target's) of their views."""
    step_seconds = 4 * FLOP * VIDEOS * max(2, rho) / (SHARE * PEAK)
    return VIDEOS / step_seconds, VIDEOS / step_seconds / videos_a_second


def version_of(package):
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(package)
    return "not installed"


def cpu_name():
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.split(": ")[1] for line in lines if line.startswith("model name")), "?")


def loader(quick, folder, videos, stride):
    """Videos a second of one worker: decoding, crop, resize, collating; CPU time of one thread."""
    torch.set_num_threads(1)
    if not videos:
        say("loader", left_out="all", reason="no --videos DIR")
        return
    files, _ = common.list_videos(videos)
    paths = files * math.ceil(64 / len(files))  # a batch, at least
    packages = ("torchcodec", "pytorchvideo")
    versions = {name: version_of(name) for name in packages}
    say(
        "loader",
        folder=Path(videos).name,
        cpu=cpu_name(),
        load_average=os.getloadavg()[0],
        **versions,
    )
    rounds, batches = (1, 2) if quick else (3, 2)
    for rho in (1, 2, 4):
        cfg = config(byol, rho=rho, data=videos, stride=stride, workers=0)
        sources = {}
        ours = ours_of(cfg, paths)
        sources["ours"] = (ours[divmod(i, len(paths))]["clips"] for i in itertools.count())
        try:
            theirs = WithTorchcodec(cfg, paths)
            theirs[0]
            sources["torchcodec"] = (theirs[i % len(paths)] for i in itertools.count())
        except (ImportError, RuntimeError, OSError) as error:
            say("loader", left_out="torchcodec", reason=str(error).strip().split("\n")[0][:90])
        try:
            source = with_pytorchvideo(cfg, paths)
            next(source)
            sources["pytorchvideo"] = source
        except Exception as error:
            say("loader", left_out="pytorchvideo", reason=repr(error)[:90])
        spent = {name: [] for name in sources}
        for _ in range(rounds):
            for name, source in sources.items():
                begun = time.process_time()
                for _ in range(batches):
                    torch.utils.data.default_collate(list(itertools.islice(source, VIDEOS)))
                spent[name].append((time.process_time() - begun) / batches / VIDEOS)
        rate = {name: 1 / float(np.median(times)) for name, times in spent.items()}
        needed, cores = cores_of_a_gpu(rho, rate["ours"])
        numbers = {f"{name}_videos_a_second": value for name, value in rate.items()}
        say("loader", rho=rho, files=len(files), stride=cfg.stride, **numbers)
        words = f"BYOL, 8 videos a step, {SHARE:.0%} of {PEAK / 1e12:.0f} TFLOP/s"
        say("loader", rho=rho, assumed=words, videos_a_second_of_a_gpu=needed, cores=cores)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--quick", action="store_true", help="small sizes, under 3 minutes on a CPU"
    )
    parser.add_argument("--stride", type=int, default=STRIDE, help="of loader's clips")
    benchmarks = {f.__name__: f for f in (decode, memory, augment, step, compute, loader)}
    parser.add_argument("--only", nargs="+", choices=benchmarks, default=[*benchmarks])
    parser.add_argument(
        "--videos", nargs="+", default=[], help="decode: real files or folders; loader: a folder"
    )
    options = parser.parse_args()
    folder = options.videos[0] if options.videos else ""
    benchmarks["loader"] = functools.partial(loader, videos=folder, stride=options.stride)
    benchmarks["decode"] = functools.partial(decode, videos=options.videos)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    cores = len(os.sched_getaffinity(0))
    processor = cpu_name()
    versions = common.VERSIONS
    say("bench", versions=versions, cpu=processor, cores=cores, commit=commit.stdout.strip())
    with tempfile.TemporaryDirectory() as folder:
        for name in options.only:
            benchmarks[name](options.quick, Path(folder))


if __name__ == "__main__":
    main()
