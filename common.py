"""What the scripts share, in the order of a run: config, distributed, video, data set, augmentation,
backbones, optimizers, evaluation, the run.

Letters in shapes: B videos on this rank, W ranks, rho clips per video, V = max(2, rho) views,
T frames, H x W pixels, D feature width. Clips are (B, V, 3, T, H, W), features (B, V, D): the view
is always axis 1. "Released" means SlowFast at commit 287ec00, cited as file and line.
"""

import argparse
import atexit
import contextlib
import copy
import csv
import dataclasses
import glob
import hashlib
import itertools
import json
import math
import multiprocessing
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
import types
import typing
import warnings
from collections import OrderedDict
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import av
import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, Dataset, Subset, default_collate
from torchvision.transforms import v2
from tqdm import tqdm

# --- config


def arg(default, help, choices=None):
    """A field of a Config: the flag's default, its text in --help and the values it may take."""
    return dataclasses.field(default=default, metadata={"help": help, "choices": choices})


@dataclass
class Config:
    """The flags of every script. A script's own Config adds the numbers of its recipe."""

    data: str = arg(
        "", "videos: a folder, a list (.txt, .csv) or one file; the demo's if not given"
    )
    out: str = arg("", "output folder; out/<script>-<data>-... if not given")
    small: bool = arg(False, "use the demo's small network and settings on your own --data")
    seed: int = arg(0, "seed of weights, video order, clips and augmentation")
    max_steps: int = arg(0, "stop after this step of the unchanged schedule (0: never)")
    log_every: int = arg(10, "steps per line of the log")
    workers: int = arg(-1, "decoding processes per rank (0: none, -1: chosen from the CPU cores)")
    low_memory: bool = arg(
        False, "recompute activations in backward: memory of one clip at any rho"
    )
    compile: bool = arg(False, "compile the backbone with torch.compile")
    show_views: str = arg("", "write a PNG of what the model sees and stop")

    @property
    def num_views(self):
        """V, views per video: with rho = 1 one clip is augmented twice."""
        return max(2, self.rho)

    @property
    def clip_seconds(self):
        """Length of a clip in seconds; strides count frames at 30 fps."""
        return self.frames * self.stride / 30


def parse_args(config, demo, argv=None):
    """Read the flags of a Config class.

    demo: {field: value} that replaces the defaults with --small or without --data; a flag that is
    given always wins. The names of the given flags are in cfg.given. Settings that cannot work end
    the process with one line and exit code 2."""
    module = sys.modules[config.__module__]
    parser = argparse.ArgumentParser(
        usage="%(prog)s [--flag value ...]",
        description=module.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    parser.error = fail
    name = Path(module.__file__).name
    own = " --weights out/byol-demo-rho2" if "weights" in config.__dataclass_fields__ else ""
    examples = f"python {name}{own}\npython {name}{own} --data my/videos --small"
    shared = parser.add_argument_group("every run", examples)
    recipe = parser.add_argument_group("recipe")
    for field in dataclasses.fields(config):
        is_shared = field.name in Config.__dataclass_fields__
        _add_flag(shared if is_shared else recipe, field, demo)
    given = vars(parser.parse_args(argv))
    for flag, value in given.items():
        given[flag] = tuple(value) if isinstance(value, list) else value
    if given.get("small") or not given.get("data"):
        cfg = config(**{**demo, **given})
    else:
        cfg = config(**given)
    cfg.given = set(given)
    cfg.script = Path(module.__file__).stem
    cfg.data = cfg.data and os.path.normpath(cfg.data)
    if not cfg.out:
        cfg.out = f"out/{cfg.script}-{data_name(cfg)}-rho{cfg.rho}"
    _check(cfg)
    return cfg


def _add_flag(group, field, demo):
    text = field.metadata["help"]
    if field.default not in ("", None, False):
        text += f" [{_words(field.default)}]"
    if demo.get(field.name, field.default) != field.default:
        text += f" [demo: {_words(demo[field.name])}]"
    options = {"help": text.replace("%", "%%")}
    if field.type is bool:
        options["action"] = argparse.BooleanOptionalAction
    elif typing.get_origin(field.type) is tuple:
        options |= {"type": typing.get_args(field.type)[0], "nargs": "+", "metavar": "X"}
    elif field.metadata["choices"]:
        options["choices"] = list(field.metadata["choices"])
    else:
        options |= {"type": field.type, "metavar": "X"}
    group.add_argument("--" + field.name.replace("_", "-"), **options)


def _words(value):
    """A value as it is typed on the command line."""
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def data_name(cfg):
    """A short name of the data, for folders."""
    return Path(cfg.data).absolute().stem if cfg.data else "demo"


def _check(cfg):
    """End the process if settings cannot work, before anything long starts."""
    ranks, (shortest, longest) = world_size(), _pair("short_side", cfg.short_side)
    for name, value in vars(cfg).items():
        numbers = value if isinstance(value, tuple) else (value,)
        for number in numbers:
            least = -1 if name == "workers" else 0
            if isinstance(number, (int, float)) and not least <= number < math.inf:
                fail(f"--{name.replace('_', '-')} must be {least} or more, not {number}")
    for name in ("rho", "frames", "stride", "size", "epochs", "log_every", "lr", "temperature"):
        if getattr(cfg, name, 1) == 0:
            fail(f"--{name.replace('_', '-')} must be above 0")
    for name in ("warmup", "target_momentum", "target_momentum_end", "dropout"):
        if getattr(cfg, name, 0) > 1:
            fail(f"--{name.replace('_', '-')} must be at most 1, not {getattr(cfg, name)}")
    if os.environ.get("WORLD_SIZE", "1") != "1" and "LOCAL_RANK" not in os.environ:
        fail("WORLD_SIZE is set, but not by torchrun: start with torchrun, or unset it")
    if not cfg.small or "batch_size" in cfg.given:
        _check_batch(cfg)
    if cfg.warmup == 1:
        fail("--warmup must be less than 1, the whole run")
    if shortest > longest:
        fail(f"--short-side {shortest} {longest}: the first must not exceed the second")
    if shortest < cfg.size:
        fail(f"--short-side {shortest} is less than --size {cfg.size}")
    smallest, largest = _pair("crop_area", getattr(cfg, "crop_area", (1, 1)))
    if not smallest <= largest <= 1:
        fail(f"--crop-area {smallest} {largest}: two fractions of the frame, the smaller first")
    if cfg.backbone.startswith("s3d") and (cfg.frames < 5 or cfg.size < 17):
        fail(f"--backbone {cfg.backbone} needs 5 or more --frames and a --size of 17 or more")
    if cfg.compile and cfg.low_memory and ranks > 1:
        fail("--compile with --low-memory works on one process only")
    if cfg.show_views and not os.path.isdir(os.path.dirname(cfg.show_views) or "."):
        fail(f"--show-views {cfg.show_views}: no such folder")
    if cfg.workers > 64:
        fail(f"--workers {cfg.workers}: at most 64")
    train_transform(cfg)


def _pair(name, values):
    if len(values) != 2:
        fail(f"--{name.replace('_', '-')} takes two numbers")
    return values


def _check_batch(cfg):
    batch, ranks = cfg.batch_size, world_size()
    if batch % ranks:
        near = max(2, round(batch / ranks)) * ranks
        fail(f"--batch-size {batch} does not divide by {ranks} processes; try {near}")
    if batch < 2 * ranks:
        fail(f"--batch-size {batch}: each of {ranks} processes needs 2 videos for BN")


def fail(message, code=2):
    """End with one line on stderr. Rank 0 speaks; another rank only if rank 0 has not failed."""
    if rank() > 0:
        time.sleep(5)  # by then torchrun has ended this process if rank 0 failed too
    print(f"{Path(sys.argv[0]).name}: error: {message}", file=sys.stderr, flush=True)
    sys.exit(code)


def print_main(message):
    """Print on rank 0, above the progress bar."""
    if rank() == 0:
        with contextlib.suppress(BrokenPipeError):  # as when piped into head: the run goes on
            tqdm.write(message.encode(errors="backslashreplace").decode())  # any file name
            sys.stdout.flush()


# --- distributed


def init_distributed(cfg):
    """Seed this process, give it its device and its share of the cores, join the other ranks, and
    make the output folder."""
    signal.signal(signal.SIGINT, _exit_quietly)  # until training, which saves first
    torch.manual_seed(cfg.seed)
    torch.backends.cudnn.benchmark = True
    on_cpu = device().type == "cpu"
    local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if not on_cpu:
        if local_ranks > torch.cuda.device_count():
            fail(f"{local_ranks} processes, but only {torch.cuda.device_count()} GPUs here")
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    affinity = getattr(os, "sched_getaffinity", None)  # absent on macOS
    cores = len(affinity(0)) if affinity else os.cpu_count()
    cores = max(1, cores // local_ranks)
    if cfg.workers < 0:
        most = 16 if multiprocessing.get_start_method() == "fork" else 4  # each imports torch
        cfg.workers = cores // 2 if on_cpu else cores  # on a CPU the network needs cores as well
        cfg.workers = max(1, min(most, cfg.workers))
    if on_cpu:
        cores = max(1, cores - cfg.workers)
    torch.set_num_threads(min(torch.get_num_threads(), cores))
    if world_size() > 1 and not dist.is_initialized():
        dist.init_process_group("gloo" if on_cpu else "cpu:gloo,cuda:nccl")
        atexit.register(_leave_group)
    if rank() == 0 and not cfg.show_views:
        _make_folder(cfg.out)
    hardware = "CPU" if on_cpu else torch.cuda.get_device_name()
    print_main(f"{versions()}; {world_size()} x {hardware}, {cfg.workers} workers each")
    changed = [f"{name} {_words(getattr(cfg, name))}" for name in sorted(cfg.given)]
    print_main(f"flags: {', '.join(changed) or 'none'}; all settings are in {cfg.out}/last.pth")


def _exit_quietly(*_):
    sys.exit(130)


def _kill_workers():
    """Workers ignore SIGTERM (see worker_init), so Python would wait for them for ever at exit."""
    for child in multiprocessing.active_children():
        child.kill()


atexit.register(_kill_workers)  # after the import of torch: handlers run last in, first out


def _leave_group():
    if not hasattr(sys, "last_value"):  # after an error, other ranks may never answer
        dist.destroy_process_group()


def _make_folder(path):
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path).close()  # fails if the folder cannot be written to
    except OSError as error:
        fail(f"--out {path}: {error.strerror}")


def versions():
    """Of the packages that a result may depend on."""
    return ", ".join(f"{m.__name__} {m.__version__}" for m in (torch, torchvision, av, np))


def rank():
    """This process's number among all; 0 without torchrun."""
    return int(os.environ.get("RANK", 0)) if world_size() > 1 else 0


def world_size():
    """How many processes train together; 1 without torchrun."""
    return int(os.environ.get("WORLD_SIZE", 1))


def device():
    """This process's GPU, or the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def autocast():
    """bfloat16 on GPUs that compute in it; float32 on others and on a CPU, where it is slow."""
    on_gpu = device().type == "cuda"
    enabled = on_gpu and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.autocast(device().type, torch.bfloat16, enabled=enabled)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        parts = [torch.empty_like(x) for _ in range(world_size())]
        dist.all_gather(parts, x)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, grad):
        grad = grad.contiguous()
        dist.all_reduce(grad)
        return local_part(grad)


def gather(x):
    """(B, ...) of each rank -> (W * B, ...) on every rank, rank by rank.

    If each rank computes the same loss from the result, the mean over ranks that DDP takes is the
    gradient of that loss on the joint batch."""
    if world_size() == 1:
        return x
    return _Gather.apply(x.contiguous())


def local_part(x):
    """This rank's (B, ...) of a joint (W * B, ...)."""
    return x.chunk(world_size())[rank()]


def wrap_ddp(model, cfg):
    """Return what to call for the forward pass: the model, in DDP if there are several ranks.

    Each rank keeps its own BN statistics, or all share them (SyncBN, on GPUs) if cfg.sync_bn."""
    model.to(memory_format=torch.channels_last_3d)
    for p in model.parameters():
        if p.ndim == 5 and p.shape[2:].numel() == 1:  # both layouts at once; DDP wants this one
            p.data = p.data.clone(memory_format=torch.contiguous_format)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    own = sum(p.numel() for p in model.encoder.backbone.parameters())
    print_main(f"model: {cfg.backbone}, {own:,} parameters; {trained:,} are trained, with heads")
    if world_size() > 1 and cfg.sync_bn and device().type == "cuda":
        nn.SyncBatchNorm.convert_sync_batchnorm(model)  # in place
    if cfg.compile:
        for module in model.modules():
            if isinstance(module, Backbone):
                module.compile()
    if world_size() == 1:
        return model
    with warnings.catch_warnings():  # torch 2.14 renames broadcast_buffers
        warnings.simplefilter("ignore", FutureWarning)
        return nn.parallel.DistributedDataParallel(model, broadcast_buffers=False)


# --- video

_FORMATS = "mov,matroska,avi,mpegts,mpeg,mpegvideo,flv,asf,ogg,h264,hevc,m4v,ivf,obu,mxf,nut,dv,wtv"


@contextlib.contextmanager
def _reasons(path):
    """What goes wrong inside becomes a ValueError of one line that begins with the path."""
    try:
        yield
    except (av.FFmpegError, OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ValueError(f"{path}: {reason}") from None


def _open(path):
    """One local media file: no network, no playlist that names other files."""
    options = {"protocol_whitelist": "file", "format_whitelist": _FORMATS}
    return av.open(f"file:{path}", options=options)


class VideoReader:
    """A video file, read in one thread. All times are seconds from its first frame.

    short_side: pixels, to which frames are scaled; the long side is at most 16 times as long.
    Opening, `read` and `duration` raise a ValueError that begins with the path if they cannot."""

    def __init__(self, path, short_side=None):
        self.path = path
        self.short_side = short_side
        with _reasons(path):
            self._open()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def close(self):
        self._container.close()

    def _open(self):
        """Open the file and decode the first frame, which says where time begins."""
        self._container = _open(self.path)
        self._stream = self._container.streams.best("video")
        if self._stream is None or self._stream.codec_context is None:  # or of an unknown codec
            raise ValueError("no video stream")
        self._stream.thread_type = "NONE"
        self._stream.codec_context.thread_count = 1
        self._second = 1 / self._stream.time_base  # in ticks, the unit of a time stamp (pts)
        self._start_decoding()
        self._first = self._coming
        if self._first is None:
            raise ValueError("no frame with a time stamp can be decoded")
        self._been_read = False

    @cached_property
    def duration(self):
        """Seconds; from the header if it says, else from all packets."""
        if self._stream.duration:
            return float(self._stream.duration / self._second)
        if self._container.duration:  # counted from 0, wherever the first frame is
            return self._container.duration / av.time_base - float(max(0, self._first.time))
        with _reasons(self.path), _open(self.path) as scan:
            packets = scan.demux(scan.streams.best("video"))
            last = max(packet.pts for packet in packets if packet.pts is not None)
        return float((last - self._first.pts) / self._second)

    def read(self, times):
        """The frames on display at times of any shape, in any order, in one pass through the file.

        At time t that is the last frame whose time stamp is at most t + 1 ms; past the end the
        last one. Returns (*times.shape, H, W, 3) uint8 RGB, upright, of the first frame's size
        before scaling."""
        times = np.asarray(times, float)
        seconds = np.clip(times.ravel(), 0, 1e9) + 1e-3
        with _reasons(self.path):
            if self._been_read:
                self.close()
                self._open()
            self._been_read = True
            limits = self._first.pts + (seconds * float(self._second)).astype(int)
            pictures = self._pictures(limits.tolist())
        return pictures.reshape(*times.shape, *pictures.shape[1:])

    def _pictures(self, limits):
        """(N, H, W, 3): for each of N time stamps the last frame up to it."""
        height, width = self._size()
        pictures = np.empty((len(limits), height, width, 3), np.uint8)
        reformatter = av.video.reformatter.VideoReformatter()
        shown = None
        for k in np.argsort(limits, kind="stable"):
            frame = self._frame_at(limits[k])
            if frame is not shown:  # converted and scaled in one go
                shown = frame
                picture = reformatter.reformat(frame, width, height, "rgb24", threads=1)
                picture = picture.to_ndarray()
            pictures[k] = picture
        degrees = self._first.rotation
        if abs(degrees) > 360:  # the matrix is damaged
            return pictures
        return np.rot90(pictures, round(degrees / 90), axes=(1, 2))

    def _size(self):
        """Height and width of what is returned, before rotation."""
        sides = self._first.height, self._first.width
        if self.short_side is None:
            return sides
        scale = self.short_side / min(sides)
        longest = 16 * self.short_side  # 4096 x 2 would become huge
        return [min(round(side * scale), longest) for side in sides]

    def _frame_at(self, limit):
        """The last frame up to a time stamp, not before the one of the call before."""
        if self._worth_seeking(limit):
            self._seek(limit)
        while self._coming and self._coming.pts <= limit:
            self._shown = self._coming
            self._coming = self._next_frame()
        return self._shown

    def _start_decoding(self):
        """From where the container is now."""
        self._packets = self._container.demux(self._stream)
        self._decoded = []
        self._coming = self._next_frame()

    def _next_frame(self):
        """The next one that has a time stamp; None at the end."""
        while not self._decoded:
            try:
                packet = next(self._packets, None)
                if packet is None:
                    return None
                self._decoded += [frame for frame in packet.decode() if frame.pts is not None]
            except av.error.InvalidDataError:  # a damaged packet
                continue
            except IndexError:  # of a stream that begins here, which a new demuxer knows
                self._packets = self._container.demux(self._stream)
        return self._decoded.pop(0)

    def _worth_seeking(self, limit):
        """Whether a key frame lies between the coming frame and a time stamp, or is likely to."""
        if self._coming is None or self._coming.pts > limit:
            return False
        if self._container.format.name == "mpeg":
            return False  # it has too few time stamps to know where a seek has led
        here = self._coming.pts
        index = self._stream.index_entries
        if len(index):
            i = index.search_timestamp(limit)
            if i >= 0 and index[i].timestamp > here:
                return True
            here = max(here, index[len(index) - 1].timestamp)
        return limit - here > 2 * self._second  # the index, if any, ends before

    def _seek(self, limit):
        """Go on from a key frame at or before a time stamp."""
        # an index in decoding order may lead too far, and the first packet be for an earlier moment
        for seconds in (0, 2, 20):
            place = max(math.floor(limit - seconds * self._second), self._first.pts)
            try:
                self._container.seek(place, stream=self._stream)
            except av.FFmpegError:
                continue
            self._start_decoding()
            if self._coming and self._coming.pts <= limit:
                return
        self.close()
        self._open()


def read_clips(path, starts, frames, stride, size=None):
    """Clips of one video: frame i lies i * stride / 30 seconds after its start.

    starts: seconds from the first frame, (clips,), or the times of all frames, (clips, T). size:
    the short side in pixels. Returns (clips, T, H, W, 3) uint8 RGB in the order of starts; raises
    ValueError. See VideoReader."""
    with VideoReader(path, size) as reader:
        return reader.read(frame_times(np.asarray(starts, float), frames, stride))


def frame_times(starts, frames, stride):
    """(clips,) starts, or the (clips, T) times themselves -> (clips, T)."""
    if starts.ndim == 2:
        return starts
    return starts[:, None] + np.arange(frames) * stride / 30


# --- data set

SUFFIXES = set(".mp4 .m4v .mov .mkv .webm .avi .mpg .mpeg .ts .mts .flv .wmv .3gp .ogv".split())


def find_data(cfg):
    """(training videos, test videos) that --data names: two folders train/ and val/, two splits of
    one csv, or all of them and "" for the test videos."""
    if not cfg.data:
        demo = _demo_videos("data/demo")
        return demo / "train", demo / "val"
    root = Path(cfg.data)
    if (root / "train").is_dir() and (root / "val").is_dir():
        return root / "train", root / "val"
    if root.name == "train" and root.with_name("val").is_dir():
        return root, root.with_name("val")
    if root.suffix == ".csv" and root.is_file() and list_videos(root, "val")[0]:
        return root, root
    return root, ""


def list_videos(source, split=None):
    """List the videos of a source: (paths, labels), "" for no label.

    source: a folder, searched at any depth (the folder that a video lies in is its label), a video
    file, a text list (`path` or `path<TAB>label` lines, # comments), or a csv with a header (columns
    path, label, split: "train" takes the rows train, "val" the rows val or test). A listed path is
    relative to its list. Ends the process if the source cannot be read."""
    source = Path(source)
    try:
        if source.is_dir():
            found = glob.iglob("**/*", root_dir=source, recursive=True)
            names = sorted(name for name in found if Path(name).suffix.lower() in SUFFIXES)
            rows = [(name, os.path.dirname(name)) for name in names]
        elif source.suffix.lower() in SUFFIXES and source.is_file():
            return [str(source)], [""]
        elif source.suffix == ".csv":
            rows = _csv_rows(source, split)
        else:
            rows = _text_rows(source)
    except OSError as error:
        fail(f"{source}: {error.strerror}")
    root = source if source.is_dir() else source.parent
    return [os.path.join(root, name) for name, _ in rows], [label for _, label in rows]


def _read_list(source):
    return source.read_text(encoding="utf-8-sig", errors="surrogateescape")


def _text_rows(source):
    rows = []
    for line in _read_list(source).split("\n"):
        path, _, label = line.partition("\t")
        if path.strip() and not path.startswith("#"):
            rows.append((path.strip(), label.strip()))
    return rows


def _csv_rows(source, split):
    wanted = {"train": ("train",), "val": ("val", "test")}.get(split)
    reader = csv.DictReader(_read_list(source).splitlines())
    columns = reader.fieldnames or []
    if "youtube_id" in columns:
        fail(f"{source} is a Kinetics annotation: make a csv with columns path and label of it")
    if "path" not in columns:
        fail(f"{source}: the first line must name the columns: path, label, split")
    if split == "val" and "split" not in columns:
        return []
    rows = []
    for row in reader:
        if wanted is None or row.get("split", "train") in wanted:
            rows.append(((row["path"] or "").strip(), (row.get("label") or "").strip()))
    return rows


def _demo_videos(folder):
    """Make the demo's videos, once; other processes of this machine wait for them."""
    folder = Path(folder)
    if rank() == 0 or os.environ["LOCAL_RANK"] == "0":
        if not folder.exists():
            script = Path(__file__).with_name("tests") / "demo_videos.py"
            if subprocess.run([sys.executable, script, folder]).returncode:
                fail(f"cannot make the demo's videos in {folder}: give --data")
    while not folder.exists():  # if the process that makes them dies, torchrun ends this one
        time.sleep(0.2)
    return folder


class BadVideo(Exception):
    """A video that cannot be read; str() says which one and why."""


class VideoClips(Dataset):
    """The rho clips of each video, augmented, indexed by (epoch, index).

    An item is a dict: clips (V, 3, T, H, W) float32, label (-1: none), index (of the video), starts
    (V,) seconds (or (V, T): of all frames), bad (reasons of videos that could not be read). It
    depends on (cfg.seed, epoch, index) alone. A video that cannot be read is replaced by another.

    sample_clips(duration, clip_seconds, rho, timespan, rng): the starts of the clips, (rho,), or the
    times of all frames, (rho, T), in seconds. transform: the whole augmentation of a clip,
    (T, 3, H, W) uint8 -> (T, 3, h, w) float32, instead of cfg.augment. videos: (paths, labels).

    Override open() to read anything else than video files, views() to make other tensors.
    """

    def __init__(self, cfg, sample_clips, transform=None, videos=None):
        self.cfg, self.sample_clips, self.transform = cfg, sample_clips, transform
        source = cfg.data
        if videos is None:
            source, _ = find_data(cfg)
            videos = list_videos(source, "train")
        paths, labels = videos
        if not paths:
            fail(f"no videos in {source} (looked for {' '.join(sorted(SUFFIXES))})")
        self.classes = sorted(set(labels) - {""})
        self._keep(paths, labels)
        self.crop, self.color = train_transform(cfg)
        self.color_on_device = device().type == "cuda" and transform is None
        print_main(f"data: {len(paths)} videos, {len(self.classes)} classes, {source or 'demo'}")
        if "rho" in cfg.__dataclass_fields__:
            fit_to_videos(cfg, len(paths))

    def _keep(self, paths, labels):
        # one array of bytes: a million Python strings would be copied into each worker, page by
        # page, as their reference counts change
        self._paths = np.array([os.fsencode(path) for path in paths])  # (n,)
        numbers = {label: number for number, label in enumerate(self.classes)}
        self.labels = np.array([numbers.get(label, -1) for label in labels])  # (n,)

    def subset(self, paths, labels):
        """This data set with other videos, its classes numbered as here (-1: another label)."""
        other = copy.copy(self)
        other._keep(paths, labels)
        return other

    def __len__(self):
        return len(self._paths)

    def path(self, index):
        return os.fsdecode(self._paths[index])

    def open(self, index, short_side):
        """A reader of a video: .duration in seconds, .read(times) -> (N, H, W, 3) uint8 RGB whose
        short side is short_side pixels, .close(). ValueError if it cannot be read."""
        return VideoReader(self.path(index), short_side)

    def read(self, index, short_side, choose):
        """Frames of a video, (clips, T, H, W, 3) uint8, and their starts, which choose(duration)
        gives: (clips,) or (clips, T). Raises BadVideo."""
        try:
            reader = self.open(index, short_side)
            duration = reader.duration
        except ValueError as error:
            raise BadVideo(error) from None
        starts = np.asarray(choose(duration), float)  # not guarded: a mistake here is one in code
        times = frame_times(starts, self.cfg.frames, self.cfg.stride)
        try:
            frames = reader.read(times.ravel())
        except ValueError as error:
            raise BadVideo(error) from None
        finally:
            reader.close()
        return frames.reshape(*times.shape, *frames.shape[1:]), starts

    def views(self, frames, rng):
        """Frames (rho, T, H, W, 3) uint8 -> the tensors of an item: {"clips": (V, 3, T, H, W)}."""
        clips = torch.from_numpy(frames).permute(0, 1, 4, 2, 3)  # (rho, T, 3, H, W)
        clips = clips.expand(self.cfg.num_views, *clips.shape[1:])  # rho = 1: the one clip twice
        seeds = torch.from_numpy(rng.integers(2**62, size=(2, len(clips))))  # crop, color
        if self.transform:
            pairs = zip(clips, seeds[0], strict=True)
            return {
                "clips": torch.stack([_draw(self.transform, *p) for p in pairs]).transpose(1, 2)
            }
        cropped = torch.stack([_draw(self.crop, *p) for p in zip(clips, seeds[0], strict=True)])
        if self.color_on_device:
            return {"clips": cropped, "seeds": seeds[1]}  # Run.batches() does the rest
        return {"clips": augment(cropped, seeds[1], self.color)}

    def __getitem__(self, key):
        cfg, (epoch, index) = self.cfg, key
        bad = []
        for attempt in range(10):
            rng = np.random.default_rng((cfg.seed, epoch, index, attempt))
            chosen = index if attempt == 0 else int(rng.integers(len(self)))
            short_side = int(rng.integers(*cfg.short_side, endpoint=True))

            def choose(duration, rng=rng):
                return self.sample_clips(duration, cfg.clip_seconds, cfg.rho, cfg.timespan, rng)

            try:
                frames, starts = self.read(chosen, short_side, choose)
            except BadVideo as error:
                bad.append(str(error))
                continue
            starts = torch.from_numpy(starts)  # (rho,) or (rho, T)
            item = {"label": int(self.labels[chosen]), "index": chosen, "bad": "\n".join(bad)}
            item["starts"] = starts.expand(cfg.num_views, *starts.shape[1:])
            return item | self.views(frames, rng)
        return {"bad": "\n".join(bad)}


def collate(items):
    """A batch of the items; of one without clips only the reasons are left."""
    if all("clips" in item for item in items):
        return default_collate(items)
    return {"bad": [item["bad"] for item in items]}


def fit_to_videos(cfg, n):
    """Fit batch size and epochs to n videos: with --small (if they are not given) to at most a
    quarter of the videos and at least 400 steps. Ends the process if the batch does not fit."""
    ranks = world_size()
    if cfg.small or not cfg.data:
        if "batch_size" not in cfg.given:
            cfg.batch_size = max(2, min(40, n // 4) // ranks) * ranks
        steps = n // cfg.batch_size
        if "epochs" not in cfg.given and steps:
            cfg.epochs = math.ceil(400 / steps)
        print_main(f"chosen for {n} videos: batch size {cfg.batch_size}, {cfg.epochs} epochs")
    _check_batch(cfg)
    if cfg.show_views:
        cfg.batch_size = min(cfg.batch_size, max(2, n // ranks) * ranks)
    if cfg.batch_size > n:
        fail(f"--batch-size {cfg.batch_size}: there are only {n} videos")


class TrainSampler:
    """Batches of (epoch, index) for this rank, from any step on.

    Each epoch has its own order of all n videos; rank r takes the contiguous slice r of a batch."""

    def __init__(self, cfg, n, first, last):
        self.cfg, self.n, self.first, self.last = cfg, n, first, last

    def __len__(self):
        return self.last - self.first

    def __iter__(self):
        batch, share = self.cfg.batch_size, self.cfg.batch_size // world_size()
        for step in range(self.first, self.last):
            epoch, i = divmod(step, self.n // batch)
            order = np.random.default_rng((self.cfg.seed, epoch)).permutation(self.n)
            begin = i * batch + rank() * share
            yield [(epoch, int(index)) for index in order[begin : begin + share]]


def worker_init(_=None):
    """Signals are the main process's affair: under torchrun they reach workers first, and a rank
    that lost its workers could not save. FFmpeg keeps silent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    av.logging.set_level(None)


def _loader(cfg, dataset, **how):
    pin = device().type == "cuda"
    how |= {"num_workers": cfg.workers, "worker_init_fn": worker_init, "pin_memory": pin}
    return DataLoader(dataset, **how)


# --- augmentation

MEAN, STD = 0.45, 0.225  # of every channel (released defaults.py, lines 687 and 693)


def train_transform(cfg):
    """(crop, color): transforms of a clip (T, 3, H, W); each draws once for all its frames.

    The order is fixed, whatever the order in cfg.augment: crop, flip, jitter, gray, blur, tint,
    rotate, cutout, noise, sobel (released transform.py, lines 1073 and 1102)."""
    strength = 0.8 * getattr(cfg, "color_strength", 0.75)
    table = {
        "flip": v2.RandomHorizontalFlip(0.5),
        "jitter": v2.RandomApply([v2.ColorJitter(*[strength] * 3, strength / 4)], p=0.8),
        "gray": v2.RandomGrayscale(0.2),
        "blur": v2.RandomApply([v2.GaussianBlur(13, (0.1, 2.0))], p=0.5),  # 13: 3 sigma each side
        "tint": v2.Compose([v2.RandomGrayscale(0.2), v2.ColorJitter(0.4, 0.4, 0.4, 0.1)]),
        "rotate": v2.RandomChoice([v2.RandomRotation((d, d)) for d in (0, 90, 180, 270)]),
        "cutout": v2.RandomErasing(p=1.0),  # a black box of 2 to 33 % of the area
        "noise": _noise,
        "sobel": _sobel,
    }
    names = set(cfg.augment.split(",")) - {"none"}
    if unknown := names - {"crop", *table}:
        choices = ", ".join(["crop", *table, "none"])
        fail(f"--augment: unknown augmentation {min(unknown)}; choose from {choices}")
    area = getattr(cfg, "crop_area", (0, 0))
    crop = v2.Compose([v2.Resize(cfg.size), v2.CenterCrop(cfg.size)])
    if "crop" in names and any(area):
        crop = v2.RandomResizedCrop(cfg.size, scale=area, ratio=(3 / 4, 4 / 3))
    elif "crop" in names:
        crop = v2.RandomCrop(cfg.size)
    color = [transform for name, transform in table.items() if name in names]
    return crop, v2.Compose(color or [v2.Identity()])


def _noise(clip):
    """Gaussian, standard deviation 0.1, the same in all frames; drawn on the CPU."""
    return (clip + 0.1 * torch.randn(clip.shape[1:]).to(clip.device)).clamp(0, 1)


def _sobel(clip):
    """(T, 3, H, W) -> the length of the gray picture's gradient, in all three channels."""
    x = torch.tensor([[1.0, 0.0, -1.0], [2.0, 0.0, -2.0], [1.0, 0.0, -1.0]], device=clip.device) / 4
    gray = F.pad(v2.functional.rgb_to_grayscale(clip), (1, 1, 1, 1), mode="replicate")
    gradient = F.conv2d(gray, torch.stack([x, x.T])[:, None])  # (T, 2, H, W)
    return gradient.norm(dim=1, keepdim=True).clamp(max=1).expand_as(clip)


def _draw(transform, clip, seed):
    torch.default_generator.manual_seed(int(seed))  # the one that transforms.v2 draws from
    return transform(clip)


def augment(clips, seeds, color):
    """Flip, color and blur: (..., T, 3, H, W) uint8 and seeds (...) -> (..., 3, T, H, W) float32,
    normalised, on the same device."""
    clips = v2.functional.to_dtype(clips, torch.float32, scale=True)
    for place in np.ndindex(*seeds.shape):
        clips[place] = _draw(color, clips[place], seeds[place])
    return normalize(clips).transpose(-3, -4)


def normalize(pictures):
    """Pictures in [0, 1] -> what a network takes."""
    return (pictures - MEAN) / STD


def save_views(path, clips, starts, cfg):
    """Write a picture of up to 4 videos: a row for each view, a column for each frame."""
    pictures = (clips[:4].cpu() * STD + MEAN).transpose(2, 3).clamp(0, 1).flatten(0, 2)
    pictures = F.interpolate(pictures, scale_factor=math.ceil(96 / pictures.shape[-1]))
    times = frame_times(starts[:4].flatten(0, 1).numpy(), cfg.frames, cfg.stride).flatten()
    corner = torch.tensor([[0, 0, 1, 1]])
    marked = []
    for picture, seconds in zip(pictures, times, strict=True):
        label = [f"{seconds:.2f} s"]
        marked.append(torchvision.utils.draw_bounding_boxes(picture, corner, label))
    grid = torchvision.utils.make_grid(marked, nrow=cfg.frames)
    write_file(path, lambda file: torchvision.utils.save_image(grid, file, format="png"))
    print_main(f"wrote {path}: {len(clips[:4])} videos, {clips.shape[1]} views each")


# --- backbones


class Backbone(nn.Sequential):
    """Named stages in a row: (B, 3, T, H, W) of any size -> (B, feature_dim) float32, the average
    over time and space of the last map, which features(x) returns."""

    def __init__(self, feature_dim, stages):
        super().__init__(OrderedDict(stages))
        self.feature_dim = feature_dim

    def features(self, x):
        return super().forward(x)

    def forward(self, x):
        return self.features(x).mean(dim=(2, 3, 4), dtype=torch.float32)


def _conv(inputs, outputs, kernel, stride=(1, 1, 1)):
    """A convolution that keeps the size but for its stride (weight_init_helper.py, lines 21-33)."""
    padding = [k // 2 for k in kernel]
    conv = nn.Conv3d(inputs, outputs, kernel, stride, padding, bias=False)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    return conv


class Bottleneck(nn.Module):
    """Convolutions 1x1x1 or 3x1x1, then 1x3x3, then 1x1x1, and a shortcut; the released names
    (resnet_helper.py, line 259)."""

    def __init__(self, inputs, width, time_kernel, stride):
        super().__init__()
        outputs = 4 * width
        self.branch1 = None
        if inputs != outputs:
            self.branch1 = _conv(inputs, outputs, (1, 1, 1), (1, stride, stride))
            self.branch1_bn = nn.BatchNorm3d(outputs)
        self.branch2 = nn.Sequential(
            OrderedDict(
                a=_conv(inputs, width, (time_kernel, 1, 1)),
                a_bn=nn.BatchNorm3d(width),
                a_relu=nn.ReLU(inplace=True),
                b=_conv(width, width, (1, 3, 3), (1, stride, stride)),
                b_bn=nn.BatchNorm3d(width),
                b_relu=nn.ReLU(inplace=True),
                c=_conv(width, outputs, (1, 1, 1)),
                c_bn=nn.BatchNorm3d(outputs),
            )
        )

    def forward(self, x):
        shortcut = x
        if self.branch1 is not None:
            shortcut = self.branch1_bn(self.branch1(x))
        return F.relu(shortcut + self.branch2(x), inplace=True)


def slow(blocks):
    """SlowFast's Slow pathway: no stride in time, kernels 3x1x1 in the last two stages.

    blocks: residual blocks per stage."""
    stem = OrderedDict(
        conv=_conv(3, 64, (1, 7, 7), (1, 2, 2)),
        bn=nn.BatchNorm3d(64),
        relu=nn.ReLU(inplace=True),
        pool=nn.MaxPool3d((1, 3, 3), (1, 2, 2), (0, 1, 1)),
    )
    stages = {"s1": nn.Sequential(OrderedDict(pathway0_stem=nn.Sequential(stem)))}
    inputs = 64
    for s, width in enumerate((64, 128, 256, 512)):
        stage = OrderedDict()
        for i in range(blocks[s]):
            time_kernel = 3 if s >= 2 else 1
            stride = 2 if i == 0 and s > 0 else 1
            stage[f"pathway0_res{i}"] = Bottleneck(inputs, width, time_kernel, stride)
            inputs = 4 * width
        stages[f"s{s + 2}"] = nn.Sequential(stage)
    return Backbone(inputs, stages)


def slow_r50():
    return slow((3, 4, 6, 3))


def slow_r101():
    return slow((3, 4, 23, 3))


def tiny():
    """The demo's: five convolutions, 0.2 M parameters; space shrinks faster than time."""
    stages = {}
    inputs = 3
    plan = [(16, 5, (1, 2, 2)), (32, 3, (1, 2, 2)), (32, 3, (2, 1, 1)), (64, 3, (1, 2, 2))]
    plan += [(64, 3, (2, 1, 1))]
    for i, (width, kernel, stride) in enumerate(plan):
        conv = _conv(inputs, width, (3, kernel, kernel), stride)
        stages[f"stage{i}"] = nn.Sequential(conv, nn.BatchNorm3d(width), nn.ReLU(inplace=True))
        inputs = width
    return Backbone(inputs, stages)


def r2plus1d_18():
    """torchvision's R(2+1)D-18, 31.3 M parameters (the study's table says 15.4 M)."""
    stages = dict(torchvision.models.video.r2plus1d_18().named_children())
    feature_dim = stages.pop("fc").in_features
    del stages["avgpool"]
    return Backbone(feature_dim, stages)


def s3d():
    """torchvision's S3D."""
    network = torchvision.models.video.s3d()
    return Backbone(network.classifier[1].in_channels, network.features.named_children())


class Gate(nn.Module):
    """Channels times a sigmoid of their averages over time and space."""

    def __init__(self, width):
        super().__init__()
        self.conv = nn.Conv3d(width, width, 1)

    def forward(self, x):
        return x * self.conv(x.mean(dim=(2, 3, 4), keepdim=True)).sigmoid()


def s3d_g():
    """S3D-G: S3D with a gate on each branch of its inception blocks."""
    network = s3d()
    for block in network:
        for name, branch in list(block.named_children()):
            if name.startswith("branch"):
                gate = Gate(_norms(branch)[-1].num_features)
                setattr(block, name, nn.Sequential(branch, gate))
    return network


# a line more, and every --backbone knows it
BACKBONES = {
    "slow_r50": slow_r50,
    "slow_r101": slow_r101,
    "r2plus1d_18": r2plus1d_18,
    "s3d": s3d,
    "s3d_g": s3d_g,
    "tiny": tiny,
}


def backbone(name):
    """A new network of BACKBONES: (B, 3, T, H, W) -> (B, .feature_dim); .features(x)."""
    return BACKBONES[name]()


def mlp(widths, bn):
    """Linear layers with ReLU, and BN if asked for, between them: (N, widths[0]) ->
    (N, widths[-1]) (released head_helper.py, line 147)."""
    layers = []
    for i in range(1, len(widths)):
        hidden = i < len(widths) - 1
        linear = nn.Linear(widths[i - 1], widths[i], bias=not (bn and hidden))  # BN has its own
        nn.init.kaiming_uniform_(linear.weight, a=1)
        if linear.bias is not None:
            nn.init.zeros_(linear.bias)
        layers.append(linear)
        if hidden and bn:
            layers.append(nn.BatchNorm1d(widths[i]))
        if hidden:
            layers.append(nn.ReLU(inplace=True))
    return nn.Sequential(*layers)


def encode_views(network, clips, low_memory=False):
    """Run a network on one view after the other, so that BN sees the B clips of one view:
    (B, V, 3, T, H, W) -> (B, V, ...) float32. low_memory: keep only the inputs for backward."""

    def contexts():  # of the first forward pass, of the second
        return contextlib.nullcontext(), _frozen_bn(network)

    outputs = []
    for view in clips.unbind(1):
        view = view.contiguous(memory_format=torch.channels_last_3d)  # (B, 3, T, H, W)
        if low_memory and torch.is_grad_enabled():
            output = checkpoint(network, view, use_reentrant=False, context_fn=contexts)
        else:
            output = network(view)
        outputs.append(output.float())
    return torch.stack(outputs, dim=1)


@contextlib.contextmanager
def _frozen_bn(network):
    """While activations are recomputed: BN must not count the same batch twice."""
    norms = _norms(network)
    before = [(norm.momentum, norm.num_batches_tracked.clone()) for norm in norms]
    for norm in norms:
        norm.momentum = 0.0
    try:
        yield
    finally:  # torch leaves by an exception when it has what it needs
        for norm, (momentum, count) in zip(norms, before, strict=True):
            norm.momentum = momentum
            norm.num_batches_tracked.copy_(count)


def _norms(network):
    kinds = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
    return [module for module in network.modules() if isinstance(module, kinds)]


def read_file(path):
    """What torch.save wrote, on the CPU, without running code in it; ValueError if unreadable."""
    if str(path).endswith(".pkl"):
        raise ValueError(f"cannot read {path}: a pickle, as in SlowFast's model zoo, may run code")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch has no common class for what a damaged file raises
        reason = (str(error).strip() or type(error).__name__).split("\n")[0]
        raise ValueError(f"cannot read {path}: {reason}") from None


def write_file(path, save):
    """save(file), on rank 0. Whoever reads, after a kill too, finds the old file or the new one."""
    if rank() > 0:
        return
    if os.path.exists(path) and not os.path.isfile(path):
        fail(f"cannot write {path}: it exists and is not a regular file", code=1)
    temporary = Path(f"{path}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            save(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # a full disk is a RuntimeError of torch's writer
        temporary.unlink(missing_ok=True)
        fail(f"cannot write {path}: {error}; the previous file is unchanged", code=1)


def load_backbone(path):
    """The backbone of a run's folder or backbone.pth, in eval, on the CPU, and its settings:
    backbone, cfg with cfg.frames, cfg.stride, cfg.size and the rest. ValueError if unreadable."""
    path = Path(path)
    if path.is_dir():
        path = path / "backbone.pth"
    content = read_file(path)
    cfg = types.SimpleNamespace(**content["config"])
    network = backbone(cfg.backbone)
    network.load_state_dict(content["state_dict"])
    return network.eval(), cfg


def load_clip(path, cfg, start=0.0):
    """A clip of a video from `start` seconds on, its middle square: (1, 3, T, S, S), normalised,
    where S is the side at which such a backbone is tested."""
    side = test_size(cfg.size)
    frames = read_clips(path, [start], cfg.frames, cfg.stride, side)  # (1, T, H, W, 3)
    return normalize(cut_squares(torch.from_numpy(frames), side, 1) / 255)


# --- optimizers


class LARS(torch.optim.Optimizer):
    """SGD with Nesterov momentum, each weight's step in proportion to the weight's norm (released
    optimizer.py, line 262).

    A tensor of two or more dimensions: g <- (g + wd w) trust |w| / (|g| + wd |w| + 1e-8), if both
    norms are above 0. Biases and BN: the plain gradient, no weight decay."""

    def __init__(self, params, lr, momentum=0.9, weight_decay=0.0, trust_coefficient=0.001):
        defaults = dict(lr=lr, momentum=momentum, weight_decay=weight_decay)
        super().__init__(params, dict(**defaults, trust_coefficient=trust_coefficient))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for w in group["params"]:
                if w.grad is None:
                    continue
                g = w.grad
                if w.ndim > 1:
                    g = self.scaled(w, g, group["weight_decay"], group["trust_coefficient"])
                if w not in self.state:
                    self.state[w]["momentum_buffer"] = torch.zeros_like(w)
                v = self.state[w]["momentum_buffer"]
                v.mul_(group["momentum"]).add_(g)
                w.add_(g + group["momentum"] * v, alpha=-group["lr"])

    def scaled(self, w, g, weight_decay, trust_coefficient):
        w_norm, g_norm = w.norm(), g.norm()
        scale = trust_coefficient * w_norm / (g_norm + weight_decay * w_norm + 1e-8)
        both = (w_norm > 0) & (g_norm > 0)  # on the device: an `if` would wait for the GPU
        return torch.where(both, (g + weight_decay * w) * scale, g)


OPTIMIZERS = ("lars", "sgd", "adamw")


def make_optimizer(model, cfg):
    """LARS, SGD with Nesterov momentum 0.9, or AdamW of what is trained; no weight decay on BN
    (released optimizer.py, line 41). The learning rate is 0 until Run sets it before each step."""
    bn = {p for norm in _norms(model) for p in norm.parameters()}
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p not in bn]},
        {"params": [p for p in trained if p in bn], "weight_decay": 0.0},
    ]
    if cfg.optimizer == "lars":
        return LARS(groups, lr=0.0, weight_decay=cfg.weight_decay)
    if cfg.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=0.0, weight_decay=cfg.weight_decay)
    decay = cfg.weight_decay
    return torch.optim.SGD(groups, lr=0.0, momentum=0.9, nesterov=True, weight_decay=decay)


def peak_learning_rate(cfg):
    """--lr is for 64 videos of 2 views (in an evaluation of 1); scaled with the views of a step."""
    return cfg.lr * cfg.batch_size / 64 * max(1, cfg.num_views / 2)


def learning_rate(cfg, progress):
    """Learning rate at a share of the run, 0 to 1: half a cosine, or a tenth after each of
    cfg.lr_steps (shares of the run), under a linear warm-up from 0.001 of what it leads to
    (released lr_policy.py, line 9)."""
    after = max(progress, cfg.warmup)
    lr = peak_learning_rate(cfg) * 0.5 * (1 + math.cos(math.pi * after))
    if steps := getattr(cfg, "lr_steps", ()):
        lr = peak_learning_rate(cfg) * 0.1 ** sum(after >= step for step in steps)
    if progress < cfg.warmup:
        lr *= 0.001 + 0.999 * progress / cfg.warmup
    return lr


# --- evaluation


def test_size(size):
    """Side of a test crop for a training crop, in pixels: 256 for 224."""
    return round(size * 256 / 224)


def cut_squares(frames, side, crops):
    """(N, T, H, W, 3) -> (N * crops, 3, T, side, side): squares evenly along the long side, the
    middle one if it is one."""
    frames = frames.permute(0, 4, 1, 2, 3)  # (N, 3, T, H, W)
    long = 3 if frames.shape[3] > frames.shape[4] else 4
    places = np.linspace(0, 1, crops) if crops > 1 else [0.5]
    room = frames.shape[long] - side
    return torch.cat([frames.narrow(long, round(place * room), side) for place in places])


class TestClips(Dataset):
    """The test views of each video of a VideoClips: an item is a dict of clips
    (clips * crops, 3, T, S, S) uint8, index, and bad (why the video cannot be read, else "").

    clips: how many, at 0, 1/clips, 2/clips, ... of the last possible start (released kinetics.py,
    line 217), or a function of the duration that gives the starts. crops: squares of a clip."""

    __test__ = False  # this is no test case

    def __init__(self, dataset, clips, crops=1, size=None, indices=None):
        self.dataset, self.clips, self.crops = dataset, clips, crops
        self.size = size or dataset.cfg.size
        self.indices = np.arange(len(dataset)) if indices is None else indices

    def __len__(self):
        return len(self.indices)

    def starts(self, duration):
        if callable(self.clips):
            return self.clips(duration)
        return np.arange(self.clips) / self.clips * max(0, duration - self.dataset.cfg.clip_seconds)

    def __getitem__(self, i):
        index = int(self.indices[i])
        try:
            frames, _ = self.dataset.read(index, self.size, self.starts)
        except BadVideo as error:
            return {"index": index, "bad": str(error)}
        clips = cut_squares(torch.from_numpy(frames), self.size, self.crops)
        return {"clips": clips, "index": index, "bad": ""}


def extract_features(network, test_clips, allow_missing=False):
    """Run a network, in the mode that it is in, on the test views of each video.

    network: (views, 3, T, S, S) float32 -> a tensor of any one shape. Each video is read once, on
    one rank. Returns on every rank outputs (n, ...) float32 on the CPU and indices (n,) of the
    videos that can be read. Another one ends the process, unless allow_missing leaves it out."""
    mine = range(rank(), len(test_clips), world_size())
    loader = _loader(test_clips.dataset.cfg, Subset(test_clips, mine), batch_size=None)
    outputs, problems = {}, []
    for item in tqdm(loader, "videos", disable=rank() > 0 or None):
        if item["bad"]:
            problems.append(item["bad"])
            if not allow_missing:
                fail(f"{item['bad']}; --allow-missing leaves such videos out")
            continue
        clips = normalize(item["clips"].to(device()) / 255)
        clips = clips.contiguous(memory_format=torch.channels_last_3d)
        with torch.no_grad(), autocast():
            outputs[item["index"]] = network(clips).float().cpu()
    parts = [(outputs, problems)] * world_size()
    if world_size() > 1:
        dist.all_gather_object(parts, (outputs, problems))
    outputs = {index: output for part, _ in parts for index, output in part.items()}
    problems = [problem for _, part in parts for problem in part]
    for problem in problems:
        print_main(f"WARN left out: {problem}")
    if not outputs:
        fail(f"none of {len(test_clips)} videos can be read; the first: {problems[0]}")
    indices = [int(index) for index in test_clips.indices if int(index) in outputs]
    return torch.stack([outputs[index] for index in indices]), torch.tensor(indices)


def knn_accuracy(bank, bank_labels, queries, labels, k=20, temperature=0.07):
    """Percent of queries (m, D) whose label wins a vote of the k nearest of a bank (n, D): cosine
    similarity s, weight exp(s / temperature). Labels (n,), (m,) are integers from 0."""
    bank = F.normalize(bank, dim=-1)
    hits = 0
    for part, label in zip(F.normalize(queries, dim=-1).split(256), labels.split(256), strict=True):
        near, index = (part @ bank.T).topk(min(k, len(bank)), dim=-1)  # (256, k)
        votes = torch.zeros(len(part), int(bank_labels.max()) + 1)
        votes.scatter_add_(1, bank_labels[index], (near / temperature).exp())
        hits += (votes.argmax(-1) == label).sum().item()
    return 100 * hits / len(queries)


def knn_sets(cfg, dataset):
    """[bank, queries] for kNN while training, at most 4000 and 1000 videos with 2 clips each.

    Queries are the test videos of a known class, else every fifth training video with a label."""
    _, test = find_data(cfg)
    labelled = np.flatnonzero(dataset.labels >= 0)
    fifth = np.arange(len(labelled)) % 5 == 0
    bank, queries, query_set = labelled[~fifth], labelled[fifth], dataset
    if test:
        beside = dataset.subset(*list_videos(test, "val"))
        known = np.flatnonzero(beside.labels >= 0)
        if len(known):
            bank, queries, query_set = labelled, known, beside
    if not len(bank) or not len(queries):
        print_main("WARN no labels (class folders, or lists with labels): no kNN accuracy")
        return []
    bank = bank[:: math.ceil(len(bank) / 4000)]
    queries = queries[:: math.ceil(len(queries) / 1000)]
    return [TestClips(dataset, 2, indices=bank), TestClips(query_set, 2, indices=queries)]


# --- the run

FREE = {"out", "max_steps", "log_every", "workers", "low_memory", "compile", "show_views"}
FREE |= {"knn_every", "allow_missing", "test_clips", "test_crops", "test_size", "neighbours"}


class Run:
    """A training run. A script writes out the step; Run owns what is no algorithm: learning rate,
    log, checkpoints, resume, stop signals, kNN.

    step: optimizer steps done. epoch: passes over the videos done, fractional. progress: the share
    of the run that is over after this step, 1 after the last. finished: all steps are done.
    chance: the loss of features that know nothing."""

    def __init__(self, cfg, dataset, model, optimizer, chance):
        self.cfg, self.dataset, self.chance = cfg, dataset, chance
        self.model, self.optimizer = model, optimizer
        self.steps_per_epoch = len(dataset) // cfg.batch_size
        self.total = cfg.epochs * self.steps_per_epoch
        self.last = min(self.total, cfg.max_steps or self.total)
        self.step = 0
        self.losses = []  # of each step since the last line of the log, averaged over ranks
        self.new_losses = []  # the same, on the device and of this rank: not looked at yet
        self.bad_videos = []  # reasons
        self.stop_asked = self.stopped = False  # by a signal to this rank; agreed by all ranks
        self.warned, self.history = set(), []
        self.log_file, self.header_printed = None, False
        self.knn_sets = []
        if not cfg.show_views:
            self.resume()
            self.announce()
            if getattr(cfg, "knn_every", 0):
                self.knn_sets = knn_sets(cfg, dataset)

    @property
    def epoch(self):
        return self.step / self.steps_per_epoch

    @property
    def progress(self):
        return (self.step + 1) / self.total

    @property
    def finished(self):
        return self.step == self.total

    def announce(self):
        cfg, n, views = self.cfg, len(self.dataset), self.cfg.num_views
        batch, peak = cfg.batch_size, peak_learning_rate(self.cfg)
        per_rank = batch // world_size()
        print_main(f"batch: {batch} videos = {world_size()} x {per_rank}, {views} views each")
        arithmetic = f"{cfg.lr:g} x {batch} videos x {views} views / {64 * min(2, views)}"
        warm = learning_rate(cfg, cfg.warmup)
        print_main(f"lr: {arithmetic} = {peak:g} at its peak; {warm:g} when warm-up ends")
        if self.total < 200:
            print_main(f"WARN only {self.total} steps: a network learns little; more --epochs help")
        if left := n - self.steps_per_epoch * batch:
            print_main(f"WARN each epoch leaves out {left} of {n} videos: no whole batch is left")

    # the loop

    def batches(self):
        """Yield the batches of the run, dicts of tensors on the device: clips (B, V, 3, T, H, W),
        label (B,), index (B,), starts (B, V) or (B, V, T). The script takes the optimizer's step
        and calls record() before it asks for the next one."""
        if self.cfg.show_views:
            batch = self.next_batch(iter(self.loader(last=1)))
            save_views(self.cfg.show_views, batch["clips"], batch["starts"].cpu(), self.cfg)
            return
        if self.step >= self.last:
            self.say_finished()
            return
        before = {s: signal.signal(s, self.ask_stop) for s in (signal.SIGTERM, signal.SIGINT)}
        silent = rank() > 0 or None  # None: silent unless it is a terminal
        bar = tqdm(total=self.last, initial=self.step, desc=self.cfg.script, disable=silent)
        self.logged, self.waited = self.step, 0.0
        self.since = self.saved = time.monotonic()
        batches = iter(self.loader(last=self.last))
        try:
            while self.step < self.last and not self.stopped:
                batch = self.next_batch(batches)
                self.before_step()
                yield batch
                self.after_step(bar)
        finally:
            bar.close()
            for number, handler in before.items():
                signal.signal(number, handler)
        self.say_end()

    def loader(self, last):
        sampler = TrainSampler(self.cfg, len(self.dataset), self.step, last)
        timeout = 600 if self.cfg.workers else 0  # seconds; a file system that hangs is an error
        how = dict(batch_sampler=sampler, collate_fn=collate, timeout=timeout)
        return _loader(self.cfg, self.dataset, **how)

    def next_batch(self, batches):
        begun = time.monotonic()
        batch = next(batches)
        self.waited = getattr(self, "waited", 0.0) + time.monotonic() - begun
        for reason in itertools.chain(*(reasons.split("\n") for reasons in batch.pop("bad"))):
            if reason and reason not in self.bad_videos:
                self.bad_videos.append(reason)
                words = f"WARN bad video, another takes its place: {reason}"
                print(words, file=sys.stderr, flush=True)
        if "clips" not in batch:
            fail(f"ten videos in a row cannot be read; the first: {self.bad_videos[0]}")
        batch = {name: value.to(device(), non_blocking=True) for name, value in batch.items()}
        if "seeds" in batch:
            seeds = batch.pop("seeds").cpu()
            batch["clips"] = augment(batch["clips"], seeds, self.dataset.color)
        self.starts = batch["starts"]
        return batch

    def before_step(self):
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.cfg, self.step / self.total)
        self.recorded = False
        rng = np.random.default_rng((self.cfg.seed, self.step, rank()))
        torch.manual_seed(int(rng.integers(2**62)))  # of dropout

    def record(self, loss, features, **numbers):
        """Note the step's loss, features (B, V, D) and any numbers for the log; nothing else."""
        self.new_losses.append(loss.detach())
        self.features, self.numbers = features.detach(), numbers
        self.recorded = True

    def after_step(self, bar):
        if not self.recorded:
            raise RuntimeError("call run.record(loss, features=...) once in each step")
        self.step += 1
        epochs, part = divmod(self.step, self.steps_per_epoch)
        if part == 0:
            self.share_bn()
        self.stopped, save = self.agree()
        save = save or self.stopped or part == 0 or self.step == self.last
        every = getattr(self.cfg, "knn_every", 0)
        measure = self.knn_sets and part == 0 and (epochs % every == 0 or self.finished)
        if measure or self.finished or self.step % self.cfg.log_every == 0:
            self.log(knn_top1=self.measure_knn() if measure else None)
            bar.set_postfix(loss=f"{self.history[-1]['loss']:.3f}", refresh=False)
        if save:
            self.save()
        if self.step == self.last and self.losses:
            self.log()  # part of an interval; a resume cuts it off and writes the whole one
        bar.update()

    def agree(self):
        """(stop, save): whether any rank was told to stop or has not saved for ten minutes."""
        flags = torch.tensor([self.stop_asked, time.monotonic() - self.saved > 600]).int()
        if world_size() > 1:
            dist.all_reduce(flags, dist.ReduceOp.MAX)  # on the CPU, not a wait for the GPU
        return [bool(flag) for flag in flags.tolist()]

    def ask_stop(self, *_):
        self.stop_asked = True

    def share_bn(self):
        """Give all ranks the BN statistics of rank 0, which are saved and evaluated."""
        for norm in _norms(self.model) if world_size() > 1 else ():
            for buffer in norm.buffers():
                dist.broadcast(buffer, 0)

    def say_finished(self):
        print_main(f"{self.cfg.out}: all {self.step} steps were done before; nothing was trained")
        print_main("to train anew, delete that folder or give another --out")

    def say_end(self):
        cfg = self.cfg
        if self.stopped and self.step < self.last:
            print_main(f"stopped after step {self.step}; the same command goes on from there")
            return
        print_main(f"done, {self.step} of {self.total} steps: {cfg.out}/backbone.pth")
        if "rho" in cfg.__dataclass_fields__:
            command = f"python eval_linear.py --weights {shlex.quote(cfg.out)}"
            if cfg.data:
                command += f" --data {shlex.quote(cfg.data)}" + " --small" * cfg.small
                _, test = find_data(cfg)
                command += "" if test else " --val TEST_VIDEOS"
            print_main(f"evaluate: {command}")

    # the log

    def look(self):
        """Read the losses since the last look; end the run if one is not finite. This waits for the
        device, so it happens at log lines and saves only."""
        if self.new_losses:
            losses = torch.stack(self.new_losses)
            if world_size() > 1:
                dist.all_reduce(losses)
            self.losses += (losses / world_size()).tolist()
            self.new_losses = []
        for i, loss in enumerate(self.losses):
            if not math.isfinite(loss):
                self.diverge(f"non-finite loss at step {self.step - len(self.losses) + i + 1}")

    def diverge(self, what):
        write_file(f"{self.cfg.out}/diverged", lambda file: file.write(what.encode()))
        hint = f"the last checkpoint is good, and takes a --lr below {self.cfg.lr:g}"
        fail(f"{what}; {hint}", code=1)

    def log(self, **more):
        """A line of JSON in log.jsonl, a row on the terminal, a warning if a number looks wrong."""
        self.look()
        unit = F.normalize(self.features.float(), dim=-1).flatten(0, 1)  # (B * V, D)
        seconds, steps = time.monotonic() - self.since, self.step - self.logged
        entry = {
            "step": self.step,
            "epoch": self.epoch,
            "loss": sum(self.losses) / len(self.losses),
            "chance": self.chance,
            "lr": self.optimizer.param_groups[0]["lr"],
            "feature_std": unit.std(dim=0).mean().item() * unit.shape[1] ** 0.5,
            "videos_per_second": steps * self.cfg.batch_size / seconds,
            "data_wait": min(1.0, self.waited / seconds),
            "clip_distance": clip_distance(self.starts),
            "bad_videos": self.count_bad_videos(),
        }
        entry |= {name: float(value) for name, value in self.numbers.items()}
        entry |= {name: value for name, value in more.items() if value is not None}
        entry = {k: float(f"{v:.5g}") if isinstance(v, float) else v for k, v in entry.items()}
        if self.log_file:
            self.write_line(json.dumps(entry).encode() + b"\n")
        self.print_row(entry)
        self.history.append(entry)
        self.losses, self.waited, self.since, self.logged = [], 0.0, time.monotonic(), self.step
        self.warn(self.history[-15:])

    def write_line(self, line):
        try:
            written = self.log_file.write(line)
        except OSError as error:
            fail(f"cannot write {self.cfg.out}/log.jsonl: {error.strerror}", code=1)
        if written < len(line):
            fail(f"cannot write {self.cfg.out}/log.jsonl: no space left", code=1)

    def count_bad_videos(self):
        if world_size() == 1:
            return len(self.bad_videos)
        each = [None] * world_size()
        dist.all_gather_object(each, self.bad_videos)
        return len(set(itertools.chain(*each)))

    def print_row(self, entry):
        if not self.header_printed:
            print_main(f"chance level of the loss: {self.chance:.4f}")
            print_main("    step   epoch       loss  feature std    kNN  videos/s")
            self.header_printed = True
        row = "{step:8d} {epoch:7.1f} {loss:10.4f} {feature_std:12.3f}".format(**entry)
        row += f"{entry['knn_top1']:7.1f}" if "knn_top1" in entry else "      -"
        print_main(row + f"{entry['videos_per_second']:10.1f}")

    def warn(self, lines):
        """Say once, in words, what looks wrong in the last lines of the log."""
        if len(self.history) < 3:
            return
        views = self.cfg.num_views
        trained = views > 1 and self.step / self.total > self.cfg.warmup  # alike when young
        std, wait, distance = (
            [line[name] for line in lines[-3:]]
            for name in ("feature_std", "data_wait", "clip_distance")
        )
        ratios = [line["loss"] / max(self.chance, 1e-9) for line in lines]
        self.warn_if(trained and max(std) < 0.2, "collapsed: all videos get the same features")
        at_chance = trained and len(ratios) == 15 and min(ratios) > 0.98
        self.warn_if(at_chance, "the loss stays at chance")
        self.warn_if(min(wait) > 0.3, "waiting for data: more --workers or smaller videos help")
        same = views > 1 and self.cfg.rho > 1 and max(distance) == 0
        self.warn_if(same, "the clips of a video start at the same time: a smaller --stride helps")

    def warn_if(self, wrong, words):
        if wrong and words not in self.warned:
            self.warned.add(words)
            print_main(f"WARN {words} (README: is my loss normal?)")

    def measure_knn(self):
        """kNN accuracy of the backbone, in percent."""
        begun, network = time.monotonic(), self.model.encoder.backbone.eval()
        sides = []
        for test_clips in self.knn_sets:
            features, indices = extract_features(network, test_clips, allow_missing=True)
            labels = torch.from_numpy(test_clips.dataset.labels)[indices]
            sides += [features.mean(1), labels]  # (n, D): the mean over views
        network.train(self.model.training)
        self.since += time.monotonic() - begun  # this is not the speed of training
        return knn_accuracy(*sides)

    # checkpoints

    def save(self):
        """last.pth, all that a resume needs, and backbone.pth, what others load."""
        self.look()
        self.saved = time.monotonic()
        if rank() > 0:
            return
        network, out = self.model.encoder.backbone, self.cfg.out
        content = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
        if not all_finite(content):
            self.diverge(f"weights are not finite after step {self.step}")
        settings = dataclasses.asdict(self.cfg) | {"script": self.cfg.script}
        content |= {"step": self.step, "losses": self.losses, "bad_videos": self.bad_videos}
        content |= {"cfg": settings, "code": code_hashes(self.cfg), "videos": len(self.dataset)}
        content |= {"log_bytes": self.log_file.tell(), "finished": self.finished}
        config = settings | {"step": self.step, "feature_dim": network.feature_dim}
        state = {name: tensor.cpu() for name, tensor in network.state_dict().items()}
        backbone = {"state_dict": state, "config": config | {"finished": self.finished}}
        write_file(f"{out}/backbone.pth", lambda file: torch.save(backbone, file))
        write_file(f"{out}/last.pth", lambda file: torch.save(content, file))
        Path(out, "diverged").unlink(missing_ok=True)

    def resume(self):
        """Go on from last.pth if there is one, on all ranks from the same step."""
        out = Path(self.cfg.out)
        path, end = out / "last.pth", 0
        if path.exists():
            try:
                content = read_file(path)
                self.restore(path, content)
                end = content["log_bytes"]
            except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
                reason = str(error).split("\n")[-1].strip() or error
                fail(f"{path} cannot go on in this run ({reason}); choose another --out")
        if world_size() > 1:
            steps = [None] * world_size()
            dist.all_gather_object(steps, self.step)
            if len(set(steps)) > 1:
                fail(f"the ranks found other steps in {path}, {steps}: a disk that is not shared?")
        if rank() == 0:
            for orphan in out.glob("*.pth.*.tmp"):  # of a killed save
                orphan.unlink(missing_ok=True)
            try:
                self.log_file = open(out / "log.jsonl", "ab", buffering=0)
            except OSError as error:
                fail(f"cannot write {out}/log.jsonl: {error.strerror}")
            size = self.log_file.seek(0, os.SEEK_END)
            self.log_file.truncate(min(end, size))  # what came later is logged again
            self.log_file.seek(0, os.SEEK_END)

    def restore(self, path, content):
        settings = dataclasses.asdict(self.cfg) | {"script": self.cfg.script}
        lower_lr = (path.parent / "diverged").exists() and self.cfg.lr < content["cfg"]["lr"]
        for name in sorted(settings, key=lambda name: name != "script"):
            was, now = content["cfg"].get(name), settings[name]
            if was == now or name in FREE or (name == "lr" and lower_lr):
                continue
            flag = name.replace("_", "-")
            fail(f"{path} was made with --{flag} {was!r}, not {now!r}; choose another --out")
        if content["videos"] != len(self.dataset):
            both = f"{content['videos']} videos, not {len(self.dataset)}"
            fail(f"{path} was made with --data of {both}; choose another --out")
        code = code_hashes(self.cfg)
        changed = [name for name in code if content["code"].get(name) != code[name]]
        if changed and content["finished"]:
            fail(f"{path} is of a finished run, and {changed[0]} has changed: choose another --out")
        if not all_finite({"model": content["model"], "optimizer": content["optimizer"]}):
            raise ValueError("some of its weights are not finite")
        if not 0 <= content["step"] <= self.total or content["log_bytes"] < 0:
            raise ValueError(f"step {content['step']}, log of {content['log_bytes']} bytes")
        self.model.load_state_dict(content["model"])
        self.optimizer.load_state_dict(content["optimizer"])
        self.step, self.losses = content["step"], content["losses"]
        self.bad_videos = content["bad_videos"]
        print_main(f"{path}: going on after step {self.step}")
        for name in changed:
            print_main(f"WARN {name} has changed since that run began")


def clip_distance(starts):
    """Mean seconds between the starts of two clips of a video; starts (B, V) or (B, V, T)."""
    first = starts.flatten(2)[:, :, 0] if starts.ndim == 3 else starts  # (B, V)
    views = first.shape[1]
    if views == 1:
        return 0.0
    distances = (first[:, :, None] - first[:, None, :]).abs()  # (B, V, V)
    return distances.sum().item() / (len(first) * views * (views - 1))


def all_finite(content):
    """Whether all tensors of the state dicts of a model and an optimizer are."""
    states = [content["model"], *content["optimizer"]["state"].values()]
    values = [torch.as_tensor(value) for state in states for value in state.values()]
    return all(torch.stack([value.isfinite().all().cpu() for value in values]).tolist())


def code_hashes(cfg):
    """{file name: digest} of the script and of this file."""
    files = [sys.modules[type(cfg).__module__].__file__, __file__]
    return {Path(f).name: hashlib.sha256(Path(f).read_bytes()).hexdigest()[:16] for f in files}
