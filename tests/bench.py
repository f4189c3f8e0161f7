"""Benchmarks, one line of JSON a measurement: python tests/bench.py [--quick] [--only NAME ...]

decode   CPU time of a clip of 8 frames, stride 8, at rho 1, 2, 4: ours, torchcodec (approximate and
         exact mode) and decord, each with one thread, on encodes like those of data sets (x264
         medium, B-frames, noise and motion at the bit rate of real files) and on real ones:
         --videos FILE|FOLDER ... The others need `pip install torchcodec decord`, and torchcodec
         the system's FFmpeg libraries: `apt install ffmpeg`.
memory   growth of a process over thousands of decodes; start-up on a list of a million lines.
augment  the default augmentation of a clip beside its decoding, or beside a step on a GPU.
step     one training step: ours beside contiguous tensors (fp16 on a GPU) and beside --compile; on
         a GPU clips a second and share of the measured peak, of a batch that fills it, and peak
         memory by rho, with and without --low-memory.

Ratios of one run on one machine can be compared, absolute numbers only with their hardware.
"""

import argparse
import contextlib
import functools
import gc
import importlib.metadata
import json
import os
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from pathlib import Path

import av
import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import byol
import common
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
    options = {"preset": "medium", "b": str(bits), "x264-params": "threads=1"}
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
            if path.suffix in common._SUFFIXES:
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
    listed.write_text(
        "".join(
            f"videos/class {i % 400}/a video with a name {i}.mp4\t{i % 400}\n" for i in range(lines)
        )
    )
    begun, before = time.perf_counter(), megabytes("Pss")
    videos = common.Videos(listed)
    took = time.perf_counter() - begun
    say("memory", list_lines=lines, start_up_s=took, held_mb=megabytes("Pss") - before)
    children = []
    for _ in range(4):  # workers that go through all paths
        if (pid := os.fork()) == 0:
            for i in range(len(videos)):
                videos[i]
            time.sleep(60)
        children.append(pid)
    time.sleep(3 if quick else 25)
    say(
        "memory",
        list_lines=lines,
        worker_pss_mb=[round(megabytes("Pss", pid), 1) for pid in children],
    )
    for pid in children:
        os.kill(pid, 9)
        os.waitpid(pid, 0)


# --- augment


def arguments(script, **changes):
    """The paper's arguments of a script."""
    lines = {k: v[0] for k, v in vars(script.Recipe).items() if not k.startswith("_")}
    return Namespace(
        **{**lines, "views": max(2, lines["rho"]), "low_memory": False, "compile": False, **changes}
    )


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
        times += [time.perf_counter() - begun] * (i > 1)
    return float(np.median(times))


def augment(quick, folder):
    args, device = arguments(byol), common.device()
    B = 2 if quick or device.type == "cpu" else 32
    views = torch.randint(255, (B, 2, 8, 3, 224, 224), dtype=torch.uint8, device=device)
    seeds, (crop, rest) = torch.arange(2 * B).reshape(B, 2), common._operators(args)
    clip = torch.randint(255, (8, 3, 256, 340), dtype=torch.uint8)
    took = seconds_of(lambda: common._augment(views, seeds, rest), 3 if quick else 20) / (2 * B)
    cropped = seconds_of(lambda: common._draw([crop], clip, 0), 10)
    path = make_video(folder / "a.mp4", n=300, size=(340, 256), draw=moving_scene)
    read = seconds_of(lambda: common.read_clips(path, [3.0], FRAMES, STRIDE), 5)
    say(
        "augment",
        device=device.type,
        device_ms_a_clip=1000 * took,
        crop_ms_a_clip=1000 * cropped,
        decode_ms_a_clip=1000 * read,
    )


# --- step


def stepper(name, batch, rho, low_memory=False, size=224, plain=False, compiled=False):
    """A function that does one training step of a method.

    plain: contiguous tensors, on a GPU fp16 autocast, instead of channels_last_3d and bf16.
    """
    args = arguments(METHODS[name], rho=rho, views=max(2, rho), low_memory=low_memory)
    torch.manual_seed(0)
    model, device = CLASSES[name](args).to(common.device()), common.device()
    if not plain:
        model.to(memory_format=torch.channels_last_3d)
    for module in model.modules():
        if compiled and isinstance(module, common._Backbone):
            module.compile()
    optimizer = common.make_optimizer(model, args)
    clips = torch.randn(batch, args.views, 3, 8, size, size, device=device)
    half = torch.float16 if plain else torch.bfloat16
    V = args.views

    def step():
        with torch.autocast(device.type, half, enabled=device.type == "cuda"):
            out = model(clips)
        if name == "simclr":
            loss = simclr.nt_xent(out, args.temperature)
        elif name == "moco":
            loss = V * moco.info_nce(*out, model.queue, args.temperature)
        elif name == "byol":
            loss = V * byol.regression_loss(*out)
        else:
            codes = swav.assign(out[1], args.epsilon, args.sinkhorn_iterations)
            loss = swav.swapped_prediction(out[1], codes, args.temperature)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if name in ("moco", "byol"):
            METHODS[name].update_target(model.target, model.encoder, 0.99)

    return step


def filling(name, rho):
    """The step of the largest batch, of 2^n clips, that fits the GPU, and its number of videos."""
    for clips in (512, 256, 128, 64, 32, 16):
        with contextlib.suppress(RuntimeError):  # out of memory, or no algorithm that fits
            once = stepper(name, clips // rho, rho)
            once()  # the optimizer's state comes with the first step
            once()
            return once, clips // rho
        once = None  # here, where no traceback holds its tensors
        free()
    raise SystemExit(f"{name}: not even 16 clips fit")


def free():
    """Give memory back that nothing uses; a compiled network hangs in a cycle."""
    gc.collect()
    torch.cuda.empty_cache()
    torch._dynamo.reset()  # so that the next is compiled for its own sizes


def matrix_product(n):
    a, b = (torch.randn(n, n, device="cuda", dtype=torch.bfloat16) for _ in "ab")
    return lambda: a @ b


def contiguous_views(network, clips, low_memory=False):
    """What per_view is without its memory format."""
    return torch.stack([network(view).float() for view in clips.unbind(1)], dim=1)


def step(quick, folder):
    if common.device().type == "cpu":
        return step_on_cpu(quick)
    torch.backends.cudnn.benchmark = True
    peak = 2 * 8192**3 / seconds_of(matrix_product(8192), 10)
    say("step", gpu=torch.cuda.get_device_name(), torch=torch.__version__, peak_tflops=peak / 1e12)
    for name in METHODS:
        for rho in (2, 4):
            once, batch = filling(name, rho)
            took = seconds_of(once, 5 if quick else 15)
            once, compiled = None, None
            free()
            try:
                once = stepper(name, batch, rho, compiled=True)
                compiled = seconds_of(once, 5 if quick else 15)
            except Exception as error:  # it may not fit, or there is no compiler
                say("step", left_out="compiled", reason=str(error).strip().split("\n")[0][:90])
            once = None
            free()
            passes = 4 if name in ("moco", "byol") else 3  # forward, backward twice; the target's
            flop = passes * FLOP * batch * rho
            say(
                "step",
                method=name,
                rho=rho,
                videos=batch,
                clips_a_second=batch * rho / took,
                share_of_peak=flop / took / peak,
                compiled_speed_up=compiled and took / compiled,
            )
    ordinary(quick)
    for name in METHODS:
        for rho in (1, 2, 4, 8):
            for low_memory in (False, True):
                free()
                torch.cuda.reset_peak_memory_stats()
                once = stepper(name, 8, rho, low_memory)
                once()
                once()
                gigabytes = torch.cuda.max_memory_allocated() / 2**30
                say(
                    "memory",
                    method=name,
                    rho=rho,
                    videos=8,
                    low_memory=low_memory,
                    peak_gb=gigabytes,
                )
                once = None


def step_on_cpu(quick):
    """Our fp32 step beside the contiguous one."""
    size, batch = (64, 2) if quick else (112, 4)
    ordinary(quick, size=size, batch=batch)


def ordinary(quick, size=224, batch=32):
    """SimCLR's step as it is, beside contiguous tensors (on a GPU in fp16) and --compile: times
    taken in turn."""
    steppers = {
        "ours_s": stepper("simclr", batch, 2, size=size),
        "ordinary_s": stepper("simclr", batch, 2, size=size, plain=True),
    }
    if not quick:
        steppers["compiled_s"] = stepper("simclr", batch, 2, size=size, compiled=True)
    per_view, times = common.per_view, {name: [] for name in steppers}
    for _ in range(3 if quick else 9):
        for name, once in steppers.items():
            common.per_view = contiguous_views if name == "ordinary_s" else per_view
            times[name].append(seconds_of(once, 1))
    common.per_view = per_view
    medians = {name: float(np.median(values)) for name, values in times.items()}
    ratios = {f"{name}_to_ours": medians[name] / medians["ours_s"] for name in steppers}
    say("step", device=common.device().type, size=size, videos=batch, **medians, **ratios)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--quick", action="store_true", help="small sizes, under 3 minutes on a CPU"
    )
    benchmarks = {f.__name__: f for f in (decode, memory, augment, step)}
    parser.add_argument("--only", nargs="+", choices=benchmarks, default=[*benchmarks])
    parser.add_argument("--videos", nargs="+", default=[], help="for decode: real files or folders")
    options = parser.parse_args()
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    cores = len(os.sched_getaffinity(0))
    processor = next(line for line in open("/proc/cpuinfo") if line.startswith("model name"))
    processor = processor.split(":")[1].strip()
    versions = common.versions()
    say("bench", versions=versions, cpu=processor, cores=cores, commit=commit.stdout.strip())
    benchmarks["decode"] = functools.partial(decode, videos=options.videos)
    with tempfile.TemporaryDirectory() as folder:
        for name in options.only:
            benchmarks[name](options.quick, Path(folder))


if __name__ == "__main__":
    main()
