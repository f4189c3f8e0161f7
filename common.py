"""What the scripts share, in the order of a run, which is the last class.

Letters in shapes: B videos on this rank, W ranks, rho clips per video, V = max(2, rho) views,
T frames, H x W pixels, D feature width. Clips are (B, V, 3, T, H, W), features (B, V, D): the view
is always axis 1. "Released" means SlowFast at commit 287ec00, cited as file and line."""

import argparse
import atexit
import bisect
import contextlib
import csv
import dataclasses
import functools
import glob
import hashlib
import json
import math
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter, OrderedDict, deque
from pathlib import Path

import av
import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2
from tqdm import tqdm

# --- config


def arg(default, help, choices=None):
    """A field of a Config, which is a flag of the default's type; a tuple takes several values."""
    options = {"type": type(default), "choices": choices}
    if isinstance(default, bool):
        options = {"action": argparse.BooleanOptionalAction}
    if isinstance(default, tuple):
        options = {"type": type(default[0]), "nargs": "+"}
    options["help"] = f"{help} [{default}]".removesuffix(" []")
    return dataclasses.field(default=default, metadata=options)


@dataclasses.dataclass
class Config:
    """The flags of every script; its own Config adds the numbers of its recipe."""

    data: str = arg("", "videos: a folder, a list (.txt, .csv) or one file; else the demo's")
    out: str = arg("", "output folder; else out/<script>-<data>-...")
    small: bool = arg(False, "the demo's small network and settings on your own --data")
    seed: int = arg(0, "seed of weights, video order, clips and augmentation")
    max_steps: int = arg(0, "stop after this step (0: the last); the schedule stays the full one")
    log_every: int = arg(10, "steps per line of the log")
    workers: int = arg(-1, "decoding processes per rank (-1: chosen from the CPU cores)")
    low_memory: bool = arg(False, "slower: keep activations of one view, recompute the others")

    @property
    def num_views(self):
        return max(2, self.rho)  # V: with rho = 1 one clip is augmented twice

    @property
    def clip_seconds(self):
        return self.frames * self.stride / 30  # strides count frames at 30 fps


DEMO = dict(backbone="tiny", stride=4, short_side=(64, 64), size=32, crop_area=(0.4, 1.0))
DEMO |= dict(augment="crop,flip,gray", epochs=40, batch_size=40, knn_every=10)
DEMO |= dict(optimizer="adamw", warmup=0.075, weight_decay=1e-4)

VERSIONS = ", ".join(f"{m.__name__} {m.__version__}" for m in (torch, torchvision, av, np))
EXAMPLES = """examples (eval_linear.py needs --weights, too):
  python %(prog)s                             the demo, with its own defaults (DEMO in the file)
  python %(prog)s --data my/videos --small    the same settings on your own videos
"""


def parse_args(config, demo, argv=None):
    """The config of argv; the values of demo replace defaults without --data or with --small."""
    script = sys.modules[config.__module__]
    how = dict(usage="%(prog)s [--flag value ...]", description=script.__doc__, epilog=EXAMPLES)
    how |= dict(argument_default=argparse.SUPPRESS, allow_abbrev=False)
    parser = argparse.ArgumentParser(formatter_class=argparse.RawDescriptionHelpFormatter, **how)
    parser.error = fail
    run = parser.add_argument_group("the run")
    recipe = parser.add_argument_group("the recipe")
    for field in dataclasses.fields(config):
        group = run if hasattr(Config, field.name) else recipe
        group.add_argument("--" + field.name.replace("_", "-"), **field.metadata)
    given = vars(parser.parse_args(argv))
    given |= {name: tuple(value) for name, value in given.items() if isinstance(value, list)}
    cfg = config(**given)
    if cfg.small or not cfg.data:
        cfg = config(**demo | given)
    cfg.given = set(given)  # names of flags, which win over any other default
    cfg.script = Path(script.__file__).stem
    cfg.out = cfg.out or f"out/{cfg.script}-{Path(cfg.data or 'demo').absolute().stem}-rho{cfg.rho}"
    if min(cfg.rho, cfg.frames, cfg.stride, cfg.size, cfg.epochs, cfg.log_every) < 1:
        fail("--rho, --frames, --stride, --size, --epochs and --log-every must be 1 or more")
    if not 0 < cfg.lr < math.inf or not 0 <= cfg.warmup < 1:
        fail(f"--lr {cfg.lr} must be above 0, and --warmup {cfg.warmup} from 0 to below 1")
    if len(cfg.short_side) != 2 or not cfg.size <= cfg.short_side[0] <= cfg.short_side[1]:
        fail(f"--short-side {cfg.short_side}: two numbers, at least --size {cfg.size}")
    return cfg


def fail(message, code=2):
    """End with one line on stderr. Rank 0 speaks; another rank only if rank 0 has not failed."""
    if rank() > 0:
        time.sleep(5)  # by then torchrun has ended this process if rank 0 failed too
    print(f"{Path(sys.argv[0]).name}: error:", *str(message).split(), file=sys.stderr, flush=True)
    sys.exit(code)


def print_main(message):
    """Print on rank 0, above the progress bar."""
    if rank() == 0:
        tqdm.write(message.encode(errors="backslashreplace").decode())  # any file name
        sys.stdout.flush()


# --- distributed


def init_distributed(cfg):
    """Seed this process, give it its GPU and its share of the cores, join the other ranks."""
    signal.signal(signal.SIGINT, lambda *_: sys.exit(130))  # until training, which saves first
    torch.manual_seed(cfg.seed)
    torch.backends.cudnn.benchmark = True
    affinity = getattr(os, "sched_getaffinity", None)  # absent on macOS
    cores = len(affinity(0)) if affinity else os.cpu_count()
    cores //= int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    on_gpu = device().type == "cuda"
    if on_gpu:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
        if not torch.cuda.is_bf16_supported(including_emulation=False):
            print_main("WARN this GPU lacks bfloat16: float32 is slower and takes twice the memory")
    else:
        cores //= 2  # half for the network, half for the workers
    if cfg.workers < 0:
        most = 16 if multiprocessing.get_start_method() == "fork" else 4  # each imports torch
        cfg.workers = max(1, min(most, cores))
    threads = cores if cfg.workers else 1  # else augmentation waits for threads of busy cores
    torch.set_num_threads(max(1, min(torch.get_num_threads(), threads)))
    if world_size() > 1 and not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo")
        os.register_at_fork(before=lambda: time.sleep(0.1))  # else gloo may hold a lock of Python's
    try:
        os.makedirs(cfg.out, exist_ok=True)
        tempfile.TemporaryFile(dir=cfg.out).close()  # fails if the folder cannot be written to
    except OSError as error:
        fail(f"--out {cfg.out}: {error.strerror}")
    changed = ", ".join(f"{k} {v}" for k, v in vars(cfg).items() if v != getattr(type(cfg), k, v))
    print_main(f"{VERSIONS}; {world_size()} x {device().type}\nnot the defaults: {changed}")


@atexit.register  # after the import of torch: handlers run last in, first out
def leave():
    """Workers ignore SIGTERM (see worker_init), so Python would wait for them for ever at exit."""
    for child in multiprocessing.active_children():
        with contextlib.suppress(RuntimeError):  # torch's word that a worker was killed
            child.kill()
            child.join()
    if dist.is_initialized() and not hasattr(sys, "last_value"):  # else others may never answer
        dist.destroy_process_group()


def rank():
    return int(os.environ.get("RANK", 0)) if world_size() > 1 else 0


def world_size():
    return int(os.environ.get("WORLD_SIZE", 1))


def device():
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def autocast():
    """bfloat16 on GPUs that compute in it; float32 on others and on a CPU, where it is slow."""
    enabled = device().type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.autocast(device().type, torch.bfloat16, enabled=enabled)


class Gather(torch.autograd.Function):
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
    """(B, ...) of each rank -> (W * B, ...) on every rank. With a gradient: if all compute the same
    loss from it, the mean over ranks, which DDP takes, is the gradient of the joint batch."""
    return Gather.apply(x.contiguous()) if world_size() > 1 else x


def gather_objects(value):
    """[value of rank 0, of rank 1, ...] on every rank."""
    values = [value] * world_size()
    if world_size() > 1:
        dist.all_gather_object(values, value)
    return values


def local_part(x):
    """This rank's (B, ...) of a joint (W * B, ...)."""
    return x.chunk(world_size())[rank()]


def wrap_ddp(model, cfg):
    """What the training step calls: the model, in DDP on several ranks; SyncBN if cfg.sync_bn."""
    if world_size() == 1:
        return model
    if cfg.sync_bn and device().type == "cuda":
        nn.SyncBatchNorm.convert_sync_batchnorm(model)  # in place
    network = nn.parallel.DistributedDataParallel(model)
    network.broadcast_buffers = False  # torch 2.14 warns of the argument of this name
    return network


# --- video

FORMATS = "mov,matroska,avi,mpegts,mpeg,mpegvideo,flv,asf,ogg,h264,hevc,m4v,ivf,obu,mxf,nut,dv,wtv"
LOCAL = {"protocol_whitelist": "file", "format_whitelist": FORMATS}  # no playlists, no network


class BadVideo(ValueError):
    """A video that cannot be read; its text says which one and why."""


@contextlib.contextmanager
def _reasons(path):
    """Raise any error inside as a BadVideo of one line that begins with the path."""
    try:
        yield
    except (av.FFmpegError, OSError, ValueError) as error:
        raise BadVideo(f"{path}: {getattr(error, 'strerror', None) or error}") from None


class VideoReader(contextlib.AbstractContextManager):
    """A video file, decoded in one thread; times are seconds after its first frame. Frames are
    resized to short_side pixels, with a long side of at most 16 times that. Raises BadVideo.
    H.264 and MPEG-2: frames that are neither wanted nor references are skipped. Time stamps of
    packets, read ahead, tell which; on any doubt about them read() starts over and skips none."""

    def __init__(self, path, short_side=None):
        self.path = path
        self._limits = []  # time stamps; the last frame up to each is wanted
        self._sure = True  # no doubt yet: each packet has the time stamp of its frame
        with _reasons(path):
            self._open()
            if self._coming is None:
                raise ValueError("no frame with a time stamp can be decoded")
        self._size = [self._first.height, self._first.width]
        if short_side:
            scale = short_side / min(self._size)
            self._size = [min(round(side * scale), 16 * short_side) for side in self._size]

    def close(self, *_):
        self._frames = None  # a generator, which refers to this object
        self._container.close()

    __exit__ = close

    def _open(self):
        self._container = av.open(f"file:{self.path}", options=LOCAL)
        self._stream = self._container.streams.best("video")
        decoder = getattr(self._stream, "codec_context", None)  # None if the codec is unknown
        if decoder is None:
            raise ValueError("no video stream")
        decoder.thread_count = 1
        self._second = float(1 / self._stream.time_base)  # in units of time stamps
        container = self._container.format.name
        self._sure &= decoder.name in ("h264", "mpeg2video") and container not in ("avi", "mpeg")
        self._frames = self._decode()
        self._first = self._coming = next(self._frames, None)

    @functools.cached_property
    def duration(self):
        """Seconds; from the header if it says, else from all packets."""
        if self._stream.duration:
            return self._stream.duration / self._second
        if self._container.duration:  # counted from 0, wherever the first frame is
            return self._container.duration / av.time_base - self._first.time
        with _reasons(self.path), av.open(f"file:{self.path}", options=LOCAL) as scan:
            last = max(packet.pts or 0 for packet in scan.demux(self._stream.index))
        return (last - self._first.pts) / self._second

    def read(self, times):
        """Frames at times (N,), in any order -> (N, H, W, 3) uint8 RGB, upright, of one size. At t
        it is the last frame whose time stamp is at most t + 1 ms; past the end the last of all."""
        seconds = np.clip(times, 0, 1e9) + 1e-3
        self._limits = (self._first.pts + (seconds * self._second).astype(int)).tolist()
        was_sure = self._sure
        pictures = np.empty((len(seconds), *self._size, 3), np.uint8)
        scaler = av.video.reformatter.VideoReformatter()
        with _reasons(self.path):
            if self._coming is not self._first:  # an earlier read has gone on from there
                self.close()
                self._open()
            for i in np.argsort(seconds):
                limit = self._limits[i]
                self._seek(limit)
                while self._coming and self._coming.pts <= limit:
                    shown, self._coming = self._coming, next(self._frames, None)
                if shown.pts != self._stamps[bisect.bisect_right(self._stamps, limit) - 1]:
                    self._sure = False  # a packet's frame has not come
                frame = scaler.reformat(shown, *self._size[::-1], "rgb24", threads=1)
                pictures[i] = frame.to_ndarray()
        if self._sure != was_sure:  # a wanted frame may have been skipped
            return self.read(times)
        turns = round(self._first.rotation / 90) if abs(self._first.rotation) <= 360 else 0
        return np.ascontiguousarray(np.rot90(pictures, turns, (1, 2)))  # as torch takes it

    def _seek(self, limit):
        """Go on from a key frame at or before a limit, if one lies after the coming frame."""
        if self._container.format.name == "mpeg" or self._coming is None:
            return  # an mpg file has too few time stamps to know where a seek has led
        index = self._stream.index_entries
        i = index.search_timestamp(int(limit - self._second / 10))
        # a guess where the index, if any, ends before
        key_frame = index[i].timestamp if 0 <= i < len(index) - 1 else limit - 2 * self._second
        if key_frame <= self._coming.pts:
            return
        for seconds in (0, 2, 20):  # it may lead too far
            with contextlib.suppress(av.FFmpegError):
                self._container.seek(int(limit - seconds * self._second), stream=self._stream)
                self._frames = self._decode()
                self._coming = next(self._frames, None)
                if self._coming and self._coming.pts <= limit:
                    return
        self.close()
        self._open()

    def _decode(self):
        """Yield frames in the order of display: all that are wanted, and some or all others."""
        for packet in self._packets():
            wanted = True
            if self._sure and self._limits and packet.pts is not None:
                after = self._stamps[bisect.bisect_right(self._stamps, packet.pts)]
                wanted = any(packet.pts <= limit < after for limit in self._limits)
            self._stream.codec_context.skip_frame = "DEFAULT" if wanted else "NONREF"
            with contextlib.suppress(av.error.InvalidDataError):
                for frame in packet.decode():
                    # a packet of an interlaced file may hold half a frame
                    if frame.pts not in self._stamps or frame.interlaced_frame:
                        self._sure = False
                    if frame.pts is not None:
                        yield frame

    def _packets(self):
        """Yield packets; 20 are read ahead, as at most 16 are decoded before one shown earlier."""
        self._stamps = [math.inf]  # sorted, of the last packets that were read
        ahead = deque()
        # a damaged file ends here; PyAV raises IndexError at the end if it met new streams
        with contextlib.suppress(av.error.InvalidDataError, IndexError):
            for packet in self._container.demux(self._stream):
                ahead.append(packet)
                if packet.pts is not None:
                    self._stamps = sorted([*self._stamps, packet.pts])[-64:]
                while len(ahead) > 20 * self._sure:
                    yield ahead.popleft()
        yield from ahead


def read_clips(video, starts, frames, stride, size=None):
    """Clips of a video, or of a reader, (clips, T, H, W, 3) uint8 RGB: frame i is i * stride / 30 s
    after the start. starts: seconds (clips,), or (clips, T) of all frames. size: the short side."""
    if isinstance(video, (str, os.PathLike)):
        with VideoReader(video, size) as reader:
            return read_clips(reader, starts, frames, stride)
    times = np.asarray(starts, float)
    if times.ndim == 1:
        times = times[:, None] + np.arange(frames) * stride / 30  # (clips, T)
    pictures = video.read(times.ravel())  # (clips * T, H, W, 3)
    return pictures.reshape(*times.shape, *pictures.shape[1:])


# --- data set and augmentation

SUFFIXES = tuple(".mp4 .m4v .mov .mkv .webm .avi .mpg .mpeg .ts .mts .flv .wmv .3gp .ogv".split())
TABS = dict(fieldnames=["path", "label"], delimiter="\t", quoting=csv.QUOTE_NONE)  # a text list's
MEAN, STD = 0.45, 0.225  # of every channel (released defaults.py, lines 687 and 693)


def find_data(cfg):
    """What holds the training videos: --data or its folder train/. Makes the demo's, once."""
    data = Path(cfg.data or "data/demo")
    if not cfg.data:
        if rank() == 0 and not data.exists():
            script = Path(__file__).with_name("tests") / "demo_videos.py"
            subprocess.run([sys.executable, script, data], check=True)
        gather_objects(None)  # the other ranks wait
    return data / "train" if (data / "train").is_dir() else data


def list_videos(source, split=None):
    """Paths and labels ("": none) of a folder, at any depth, whose folders are the labels; of a
    text list of `path` or `path<TAB>label`, # comments; of a csv with a header of path, label,
    split ("train": its rows train, "val": val or test); or of one video file."""
    folder, name = os.path.split(source)
    if os.path.isdir(source):
        folder = source
        files = sorted(glob.iglob("**/*", root_dir=source, recursive=True))
        videos = (file for file in files if file.lower().endswith(SUFFIXES))
        rows = [{"path": video, "label": os.path.dirname(video)} for video in videos]
    elif name.lower().endswith(SUFFIXES):
        rows = [{"path": name}]
    else:
        how = {} if name.endswith(".csv") else TABS
        try:
            with open(source, encoding="utf-8-sig", errors="surrogateescape") as file:
                lines = [line for line in file if line.strip() and line[0] != "#"]
            rows = list(csv.DictReader(lines, restval="", **how))
        except (OSError, csv.Error) as error:
            fail(f"--data {source}: {getattr(error, 'strerror', error)}")
    if rows and "path" not in rows[0]:
        fail(f"{source}: its first line must be a header: path, and maybe label, split")
    if split:
        wanted = ["train"] if split == "train" else ["val", "test"]
        rows = [row for row in rows if row.get("split", "train") in wanted]
    paths = [os.path.join(folder, row["path"].strip()) for row in rows]
    return paths, [row.get("label", "").strip() for row in rows]


class VideoClips(Dataset):
    """The rho clips of each video, augmented, indexed by (epoch, index). An item depends on these
    and cfg.seed alone. It is a dict: clips (V, 3, T, H, W) float32, label (-1: none), index, starts
    (V,) in seconds or (V, T) of all frames, bad: why another video replaces one (else "").
    sample_clips(duration, clip_seconds, rho, timespan, rng): the starts (rho,) or the times of all
    frames (rho, T), in seconds. transform: (T, 3, H, W) uint8 -> (T, 3, h, w) float32, the whole
    augmentation, instead of cfg.augment. videos: (paths, labels). classes: names of labels.
    Override open() for anything but video files; views(), item(), collate() for other tensors."""

    collate = None  # items -> a batch; None: torch's default

    def __init__(self, cfg, sample_clips, transform=None, videos=None, classes=None):
        self.cfg, self.sample_clips = cfg, sample_clips
        self.crop, self.color = (transform, None) if transform else train_transform(cfg)
        self.color_on_device = device().type == "cuda"  # a worker must not ask
        paths, labels = videos or list_videos(find_data(cfg), "train")
        if not paths:
            fail(f"no training videos in {cfg.data} (rows train, {' '.join(SUFFIXES)})")
        self.classes = classes or sorted(set(labels) - {""})
        numbers = {label: number for number, label in enumerate(self.classes)}
        self.labels = np.array([numbers.get(label, -1) for label in labels])  # (n,)
        self.paths = np.array(paths)  # (n,), not a list, which each worker would copy
        print_main(f"data: {len(paths)} videos, {len(self.classes)} classes")
        if cfg.num_views > 1:  # of a method
            fit_to_videos(cfg, len(paths))

    def __len__(self):
        return len(self.paths)

    def open(self, index, short_side):
        """A reader of a video, with .duration, .read(times), .close() as VideoReader has them."""
        return VideoReader(self.paths[index], short_side)

    def views(self, frames, rng):
        """Frames (rho, T, H, W, 3) uint8 -> the tensors of an item: {"clips": (V, 3, T, H, W)}."""
        frames = torch.from_numpy(frames).permute(0, 1, 4, 2, 3)  # (rho, T, 3, H, W)
        crop_seeds, seeds = torch.from_numpy(rng.integers(2**62, size=(2, self.cfg.num_views)))
        crops = []
        for i, seed in enumerate(crop_seeds.tolist()):
            torch.default_generator.manual_seed(seed)  # the one that transforms.v2 draws from
            crops.append(self.crop(frames[i % len(frames)]))  # rho = 1: the one clip twice
        clips = torch.stack(crops)  # (V, T, 3, H, W)
        if self.color is None:
            return {"clips": clips.transpose(1, 2)}
        if self.color_on_device:
            return {"clips": clips, "seeds": seeds}  # Run does the rest, on the GPU
        return {"clips": augment(clips, seeds, self.color)}

    def item(self, index, rng):
        """The dict of one video, as the random numbers of rng say; BadVideo if unreadable."""
        cfg = self.cfg
        short_side = int(rng.integers(*cfg.short_side, endpoint=True))
        with contextlib.closing(self.open(index, short_side)) as reader:
            settings = reader.duration, cfg.clip_seconds, cfg.rho, cfg.timespan
            starts = np.asarray(self.sample_clips(*settings, rng), float)
            frames = read_clips(reader, starts, cfg.frames, cfg.stride)
        starts = torch.from_numpy(starts).expand(cfg.num_views, *starts.shape[1:])
        item = {"label": int(self.labels[index]), "index": index, "starts": starts}
        return item | self.views(frames, rng)

    def __getitem__(self, key):
        epoch, wanted = key
        index, bad = wanted, ""
        for attempt in range(10):
            rng = np.random.default_rng((self.cfg.seed, epoch, wanted, attempt))
            if attempt > 0:
                index = int(rng.integers(len(self)))
            try:
                return self.item(index, rng) | {"bad": bad}
            except BadVideo as error:
                bad = bad or str(error)
        raise BadVideo(f"ten videos in a row cannot be read; the first: {bad}")


def fit_to_videos(cfg, n):
    """With --small, batch size and epochs, unless given: a step takes at most a quarter of the n
    videos, a run at least 400 steps. Ends the process if there can be no batch."""
    ranks = world_size()
    if cfg.small:
        if "batch_size" not in cfg.given:
            cfg.batch_size = max(2, min(40, n // 4) // ranks) * ranks
        if "epochs" not in cfg.given:
            cfg.epochs = math.ceil(400 / max(1, n // cfg.batch_size))
        print_main(f"for {n} videos: --batch-size {cfg.batch_size} --epochs {cfg.epochs}")
    if cfg.batch_size % ranks or not 2 * ranks <= cfg.batch_size <= n:
        bounds = f"a multiple of {ranks}, from {2 * ranks} to all {n} videos (--small chooses one)"
        fail(f"--batch-size {cfg.batch_size} must be {bounds}")


class TrainSampler:
    """Batches of (epoch, index) for this rank: steps `first` to `last` - 1. Each epoch has its own
    order of the n videos and drops the rest; rank r takes the contiguous slice r of a batch."""

    def __init__(self, cfg, n, first, last):
        self.cfg, self.n, self.steps = cfg, n, range(first, last)

    def __iter__(self):
        size = self.cfg.batch_size
        for step in self.steps:
            epoch, i = divmod(step, self.n // size)
            order = np.random.default_rng((self.cfg.seed, epoch)).permutation(self.n)
            batch = order[i * size : (i + 1) * size].reshape(world_size(), -1)[rank()]
            yield [(epoch, index) for index in batch.tolist()]


def worker_init(_):
    """Ignore signals, which torchrun sends to workers first: without them a rank cannot save."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    av.logging.set_level(None)


def train_transform(cfg):
    """(crop, color) of a clip (T, 3, H, W): one draw for all frames (transform.py:1073, 1102)."""
    strength = 0.8 * getattr(cfg, "color_strength", 0.75)
    table = {  # applied in this order, whatever the order in cfg.augment
        "flip": v2.RandomHorizontalFlip(0.5),
        "jitter": v2.RandomApply([v2.ColorJitter(strength, strength, strength, strength / 4)], 0.8),
        "gray": v2.RandomGrayscale(0.2),
        "blur": v2.RandomApply([v2.GaussianBlur(13, (0.1, 2.0))], 0.5),  # 13: 3 sigma each side
        "tint": v2.Compose([v2.RandomGrayscale(0.2), v2.ColorJitter(0.4, 0.4, 0.4, 0.1)]),
        "rotate": v2.RandomChoice([v2.RandomRotation((d, d)) for d in (0, 90, 180, 270)]),
        "cutout": v2.RandomErasing(1.0),  # a black box of 2 to 33 % of the area
        "noise": noise,
        "sobel": sobel,
    }
    names = set(cfg.augment.split(","))
    if unknown := names - {"crop", "none", *table}:
        fail(f"--augment: no {min(unknown)} among crop, {', '.join(table)}, none")
    area = getattr(cfg, "crop_area", ())
    crop = v2.RandomResizedCrop(cfg.size, area) if any(area) else v2.RandomCrop(cfg.size)
    if "crop" not in names:
        crop = v2.Compose([v2.Resize(cfg.size), v2.CenterCrop(cfg.size)])
    return crop, v2.Compose([table[name] for name in table if name in names] or [v2.Identity()])


def noise(clip):
    """Gaussian, standard deviation 0.1, the same in all frames; drawn on the CPU."""
    noise = 0.1 * torch.randn(clip.shape[1:])
    return (clip + noise.to(clip.device, non_blocking=True)).clamp(0, 1)


def sobel(clip):
    """(T, 3, H, W) -> the length of the gray picture's gradient, in all three channels."""
    x = torch.outer(torch.tensor([0.25, 0.5, 0.25]), torch.tensor([1.0, 0.0, -1.0]))
    kernels = torch.stack([x, x.T]).unsqueeze(1).to(clip.device, non_blocking=True)  # (2, 1, 3, 3)
    gray = v2.functional.pad(v2.functional.rgb_to_grayscale(clip), 1, padding_mode="edge")
    return F.conv2d(gray, kernels).norm(dim=1, keepdim=True).clamp(max=1).expand_as(clip)


def augment(clips, seeds, color):
    """(..., T, 3, H, W) uint8 and seeds (...) -> (..., 3, T, H, W) float32, normalised."""
    clips = v2.functional.to_dtype(clips, scale=True)
    for place in np.ndindex(*seeds.shape):
        torch.default_generator.manual_seed(int(seeds[place]))
        clips[place] = color(clips[place])
    return ((clips - MEAN) / STD).transpose(-3, -4)


# --- backbones and optimizers


class Backbone(nn.Sequential):
    """Named stages; (B, 3, T, H, W) -> (B, feature_dim) float32, the average of features(x)."""

    def __init__(self, feature_dim, stages):
        super().__init__(OrderedDict(stages))
        self.feature_dim = feature_dim

    def features(self, x):
        return super().forward(x)

    def forward(self, x):
        return self.features(x).mean((2, 3, 4), dtype=torch.float32)


def conv3d(inputs, outputs, kernel, stride=1):
    """A convolution that keeps the size but for its stride (weight_init_helper.py, lines 21-33)."""
    conv = nn.Conv3d(inputs, outputs, kernel, stride, [k // 2 for k in kernel], bias=False)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out")
    return conv


class Bottleneck(nn.Module):
    """A residual block: branch1 the shortcut, branch2 the convolutions (resnet_helper.py:259)."""

    def __init__(self, inputs, width, time_kernel, stride):
        super().__init__()
        outputs = 4 * width
        self.branch1 = self.branch1_bn = nn.Identity()
        if inputs != outputs:
            self.branch1 = conv3d(inputs, outputs, (1, 1, 1), stride)
            self.branch1_bn = nn.BatchNorm3d(outputs)
        layers = OrderedDict(
            a=conv3d(inputs, width, (time_kernel, 1, 1)),
            a_bn=nn.BatchNorm3d(width),
            a_relu=nn.ReLU(inplace=True),
            b=conv3d(width, width, (1, 3, 3), stride),
            b_bn=nn.BatchNorm3d(width),
            b_relu=nn.ReLU(inplace=True),
            c=conv3d(width, outputs, (1, 1, 1)),
            c_bn=nn.BatchNorm3d(outputs),
        )
        self.branch2 = nn.Sequential(layers)

    def forward(self, x):
        return F.relu(self.branch1_bn(self.branch1(x)) + self.branch2(x), inplace=True)


def slow(blocks):
    """SlowFast's Slow pathway; blocks (4,): the residual blocks of each stage."""
    stem = OrderedDict(
        conv=conv3d(3, 64, (1, 7, 7), (1, 2, 2)),
        bn=nn.BatchNorm3d(64),
        relu=nn.ReLU(inplace=True),
        pool=nn.MaxPool3d((1, 3, 3), (1, 2, 2), (0, 1, 1)),
    )
    stages = {"s1": nn.Sequential(OrderedDict(pathway0_stem=nn.Sequential(stem)))}
    inputs = 64
    for s, width in enumerate((64, 128, 256, 512), 2):
        stage = OrderedDict()
        for i in range(blocks[s - 2]):
            time_kernel = 3 if s >= 4 else 1
            stride = (1, 2, 2) if i == 0 and s > 2 else 1
            stage[f"pathway0_res{i}"] = Bottleneck(inputs, width, time_kernel, stride)
            inputs = 4 * width
        stages[f"s{s}"] = nn.Sequential(stage)
    return Backbone(inputs, stages)


def tiny():
    """The demo's: five convolutions, 0.2 M parameters; space shrinks faster than time."""
    stages = {}
    inputs = 3
    for i, width in enumerate((16, 32, 32, 64, 64)):
        kernel = (3, 5, 5) if i == 0 else (3, 3, 3)
        stride = (2, 1, 1) if i in (2, 4) else (1, 2, 2)
        conv = conv3d(inputs, width, kernel, stride)
        stages[f"stage{i}"] = nn.Sequential(conv, nn.BatchNorm3d(width), nn.ReLU(inplace=True))
        inputs = width
    return Backbone(inputs, stages)


def r2plus1d_18():
    """torchvision's R(2+1)D-18, 31.3 M parameters (the study's table says 15.4 M)."""
    network = torchvision.models.video.r2plus1d_18()
    return Backbone(512, list(network.named_children())[:-2])  # without avgpool and fc


class Gate(nn.Conv3d):
    def forward(self, x):  # channels times a sigmoid of their averages over time and space
        return x * super().forward(x.mean((2, 3, 4), keepdim=True)).sigmoid()


def s3d_g():
    """S3D-G: torchvision's S3D with a gate on each branch of its inception blocks."""
    network = torchvision.models.video.s3d()
    for block in network.features[5:]:  # inception blocks, and pools, which have no children
        for name, branch in list(block.named_children()):
            width = len(list(branch.parameters())[-1])  # of the last BN's bias
            setattr(block, name, nn.Sequential(branch, Gate(width, width, 1)))
    return Backbone(1024, network.features.named_children())


def mlp(widths, bn):
    """(N, widths[0]) -> (N, widths[-1]): linear, (BN,) ReLU, ..., linear (head_helper.py:147)."""
    layers = nn.Sequential()
    for i, (inputs, outputs) in enumerate(zip(widths, widths[1:], strict=False)):
        if layers and bn:
            layers.append(nn.BatchNorm1d(inputs))
        if layers:
            layers.append(nn.ReLU(inplace=True))
        linear = nn.Linear(inputs, outputs, bias=not bn or i == len(widths) - 2)
        nn.init.kaiming_uniform_(linear.weight, a=1)
        if linear.bias is not None:
            nn.init.zeros_(linear.bias)
        layers.append(linear)
    return layers


def encode_views(network, clips, low_memory=False):
    """(B, V, 3, T, H, W) -> (B, V, ...) float32; BN sees the B clips of one view at a time."""
    outputs = []
    for view in clips.unbind(1):
        if view.ndim == 5:  # clips (B, 3, T, H, W), and not features for a head
            view = view.contiguous(memory_format=torch.channels_last_3d)
        if low_memory:  # the backward pass computes the rest again, with copies of BN's statistics
            bn = {name: buffer.clone() for name, buffer in network.named_buffers()}
            output = checkpoint(torch.func.functional_call, network, bn, view, use_reentrant=False)
            network.load_state_dict(bn, strict=False)
        else:
            output = network(view)
        outputs.append(output.float())
    return torch.stack(outputs, dim=1)


def read_file(path):
    """What torch.save wrote, on the CPU, without running code in it; ValueError if unreadable."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # there is no common class for what a damaged file raises
        reason = getattr(error, "strerror", "no checkpoint, or damaged")
        raise ValueError(f"cannot read {path}: {reason}") from None


def write_file(path, save):
    """save(file), on rank 0. Whoever reads, after a kill too, finds the old file or the new one."""
    if rank() > 0:
        return
    temporary = Path(f"{path}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            save(file)
        temporary.replace(path)
    except (OSError, RuntimeError) as error:  # a full disk is a RuntimeError of torch's writer
        temporary.unlink(missing_ok=True)
        fail(f"cannot write {path}: {error}; the previous file is unchanged", code=1)


def load_backbone(path):
    """A run's folder or backbone.pth -> the network, in eval, on the CPU, and its settings cfg."""
    content = read_file(Path(path, "backbone.pth") if os.path.isdir(path) else path)
    cfg = argparse.Namespace(**content["config"])
    network = backbone(cfg.backbone)
    network.load_state_dict(content["state_dict"])
    return network.eval(), cfg


def load_clip(path, cfg, start=0.0):
    """A clip's middle square -> (1, 3, T, S, S), normalised, S = 256/224 size, as in testing."""
    side = round(cfg.size * 256 / 224)
    frames = read_clips(path, [start], cfg.frames, cfg.stride, side)  # (1, T, H, W, 3)
    return (cut_squares(torch.from_numpy(frames), side, 1) / 255 - MEAN) / STD


class LARS(torch.optim.SGD):
    """Nesterov SGD, where g <- (g + wd w) 0.001 |w| / (|g| + wd |w| + 1e-8) if both norms are above
    0 (released optimizer.py, line 262). Biases and BN: the plain gradient, no weight decay."""

    def __init__(self, params, lr, momentum=0.9, weight_decay=0.0):
        super().__init__(params, lr, momentum, nesterov=True)
        self.decay = weight_decay  # SGD's own weight_decay stays 0: it would add to biases

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for w in group["params"]:
                if w.grad is not None and w.ndim != 1:
                    w_norm, g_norm = w.norm(), w.grad.norm()
                    scale = 0.001 * w_norm / (g_norm + self.decay * w_norm + 1e-8)
                    both = (w_norm > 0) & (g_norm > 0)  # on the device: an `if` would be a wait
                    w.grad = torch.where(both, scale * (w.grad + self.decay * w), w.grad)
        super().step()


BACKBONES = {  # a line more, and every --backbone knows it
    "slow_r50": functools.partial(slow, (3, 4, 6, 3)),
    "slow_r101": functools.partial(slow, (3, 4, 23, 3)),
    "r2plus1d_18": r2plus1d_18,
    "s3d_g": s3d_g,
    "tiny": tiny,
}
OPTIMIZERS = {  # a line more, and every --optimizer knows it
    "lars": LARS,
    "sgd": functools.partial(torch.optim.SGD, momentum=0.9, nesterov=True),
    "adamw": torch.optim.AdamW,
}


def backbone(name):
    """A new network of BACKBONES: (B, 3, T, H, W) -> (B, .feature_dim); .features(x)."""
    return BACKBONES[name]()


def make_optimizer(model, cfg):
    """For trained parameters, no weight decay on BN (released optimizer.py:41); Run sets the lr."""
    bn, others = [], []
    for module in model.modules():
        group = bn if hasattr(module, "running_mean") else others
        group += [p for p in module.parameters(recurse=False) if p.requires_grad]
    groups = [{"params": others}, {"params": bn, "weight_decay": 0.0}]
    return OPTIMIZERS[cfg.optimizer](groups, lr=0.0, weight_decay=cfg.weight_decay)


def learning_rate(cfg, progress):
    """Half a cosine, or tenths by cfg.lr_steps, under linear warm-up (released lr_policy.py:9)."""
    lr = cfg.lr * cfg.batch_size / 64 * max(1, cfg.num_views / 2)  # 64 videos of 2 views (eval: 1)
    later = max(progress, cfg.warmup)  # the warm-up rises to the value at its end
    if steps := getattr(cfg, "lr_steps", ()):
        lr *= 0.1 ** sum(later >= step for step in steps)
    else:
        lr *= 0.5 * (1 + math.cos(math.pi * later))
    if progress < cfg.warmup:
        lr *= 0.001 + 0.999 * progress / cfg.warmup
    return lr


# --- evaluation


def cut_squares(frames, side, crops):
    """(N, T, H, W, 3) -> (crops * N, 3, T, side, side), evenly along the long side; 1: centre."""
    frames = frames.movedim(4, 1)  # (N, 3, T, H, W)
    long = 3 if frames.shape[3] > frames.shape[4] else 4
    room = frames.shape[long] - side
    places = np.linspace(0, room, crops) if crops > 1 else [room / 2]
    return torch.cat([frames.narrow(long, round(place), side) for place in places])


class TestClips(Dataset):
    """Items: clips (clips * crops, 3, T, S, S) uint8, index, bad (why, or ""). clips: how many, at
    i / clips of the last start (kinetics.py:217), or a function from the duration to starts."""

    def __init__(self, dataset, clips, crops=1, size=None):
        self.dataset, self.clips, self.crops = dataset, clips, crops
        self.size = size or dataset.cfg.size

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, index):
        cfg = self.dataset.cfg
        try:
            with contextlib.closing(self.dataset.open(index, self.size)) as reader:
                if callable(self.clips):
                    starts = self.clips(reader.duration)
                else:
                    room = max(0, reader.duration - cfg.clip_seconds)
                    starts = np.arange(self.clips) / self.clips * room
                frames = read_clips(reader, starts, cfg.frames, cfg.stride)
        except BadVideo as error:
            return {"index": index, "bad": str(error)}
        clips = cut_squares(torch.from_numpy(frames), self.size, self.crops)
        return {"clips": clips, "index": index, "bad": ""}


def extract_features(network, test_clips, allow_missing=False, indices=None):
    """A network on each video's (views, 3, T, S, S) float32 and item["more"] -> on every rank its
    outputs (n, ...) and indices (n,). A bad video ends the process, unless allow_missing."""
    mine = (indices or range(len(test_clips)))[rank() :: world_size()]
    how = {"num_workers": test_clips.dataset.cfg.workers, "worker_init_fn": worker_init}
    loader = DataLoader(test_clips, batch_size=None, sampler=mine, **how)
    outputs = {}
    for item in tqdm(loader, "videos", leave=False, disable=rank() > 0 or None):
        if reason := item["bad"]:
            if not allow_missing:
                fail(f"{reason}; --allow-missing leaves such videos out")
            if indices is None:  # else the training videos of kNN, which training names
                print(f"WARN left out: {reason}", flush=True)
            continue
        clips = (item["clips"].to(device()) / 255 - MEAN) / STD
        more = [tensor.to(device()) for tensor in item.get("more", ())]
        with torch.no_grad(), autocast():
            output = network(clips.contiguous(memory_format=torch.channels_last_3d), *more)
        outputs[item["index"]] = output.float().cpu()
    for part in gather_objects(outputs):
        outputs |= part
    if not outputs:
        fail("none of the videos can be read")
    indices = sorted(outputs)
    return torch.stack([outputs[index] for index in indices]), torch.tensor(indices)


def knn_accuracy(bank, bank_labels, queries, labels, k=20, temperature=0.07):
    """Percent of queries (m, D) whose label (m,) wins among the k nearest in a bank (n, D)."""
    bank = F.normalize(bank)
    hits = 0
    for query, label in zip(F.normalize(queries), labels, strict=True):
        similarity, nearest = (bank @ query).topk(min(k, len(bank)))  # (k,)
        votes = torch.bincount(bank_labels[nearest], (similarity / temperature).exp())  # (classes,)
        hits += int(votes.argmax() == label)
    return 100 * hits / len(queries)


# --- the run

FREE = "out max_steps log_every workers low_memory knn_every".split()  # may change in a resume
FREE += "allow_missing test_clips test_crops test_size neighbours".split()  # of evaluations
SAVE_EVERY = 200  # steps, beside the ends of epochs
HEADER = "    step   epoch       loss  feature std    kNN  videos/s"
ROW = "{step:8d} {epoch:7.1f} {loss:10.4f} {feature_std:12.3f} {knn:>6} {videos_per_second:9.1f}"


class Run:
    """A training run. The script writes out the step; Run owns what is no algorithm: learning rate,
    log, checkpoints, resume, stop signals, kNN. chance: the loss of features that know nothing."""

    def __init__(self, cfg, dataset, model, optimizer, chance):
        self.cfg, self.dataset, self.chance = cfg, dataset, chance
        self.model, self.optimizer = model, optimizer
        self.steps_per_epoch = len(dataset) // cfg.batch_size
        self.total = cfg.epochs * self.steps_per_epoch
        self.last = min(self.total, cfg.max_steps or self.total)
        self.losses = []  # of each step since the last line of the log
        self.bad_videos, self.log_bytes = [], 0  # why each cannot be read; of log.jsonl
        self.in_a_row = Counter()  # lines of the log with the same warning
        self.stop_asked = False
        self.labelled = np.flatnonzero(dataset.labels >= 0)[:5000].tolist()
        self.knn_every = getattr(cfg, "knn_every", 0) if len(self.labelled) > 1 else 0
        self.out = Path(cfg.out)
        self.count(0)
        self.resume(self.out / "last.pth")
        if self.total < 200:
            print_main(f"WARN only {self.total} steps: a network learns little; more --epochs help")
        if left := len(dataset) % cfg.batch_size:
            print_main(f"WARN each epoch leaves out {left} videos, too few for another batch")

    def count(self, step):
        self.step = step  # of the optimizer, done
        self.epoch = step / self.steps_per_epoch  # passes over the videos, done
        self.progress = (step + 1) / self.total  # share of the run after the present step
        self.finished = step == self.total

    def batches(self):
        """Yield dicts of tensors on the device: clips (B, V, 3, T, H, W), label (B,), index (B,),
        starts (B, V) or (B, V, T). Before the next one the script takes its step and records it."""
        cfg = self.cfg
        if self.step >= self.last:
            print_main(f"{cfg.out} is at step {self.step} of {self.last}: nothing was trained")
            print_main("to train anew, delete that folder or give another --out")
            return
        if rank() == 0:  # remove what a killed run has left: files, lines after its checkpoint
            for orphan in self.out.glob("*.tmp"):
                orphan.unlink()
            with open(self.out / "log.jsonl", "ab") as file:
                file.truncate(min(file.tell(), self.log_bytes))
        before = {s: signal.signal(s, self.ask_stop) for s in (signal.SIGTERM, signal.SIGINT)}
        sampler = TrainSampler(cfg, len(self.dataset), self.step, self.last)
        how = dict(num_workers=cfg.workers, worker_init_fn=worker_init, batch_sampler=sampler)
        how |= dict(collate_fn=self.dataset.collate, pin_memory=device().type == "cuda")
        data = DataLoader(self.dataset, **how)
        self.bar = tqdm(data, cfg.script, self.last, initial=self.step, disable=rank() > 0 or None)
        print_main(f"chance level of the loss: {self.chance:.4f}\n{HEADER}")
        self.since, self.waited = time.monotonic(), 0.0  # of the last line of the log; for data
        asked = self.since
        try:
            for batch in self.bar:
                self.waited += time.monotonic() - asked
                for group in self.optimizer.param_groups:
                    group["lr"] = learning_rate(cfg, self.step / self.total)
                torch.manual_seed(hash((cfg.seed, self.step, rank())))  # for dropout
                yield self.receive(batch)
                if self.after_step():
                    break
                asked = time.monotonic()
        except BadVideo as error:  # the loader raises it again, behind a worker's traceback
            fail(str(error).strip().split("\n")[-1].removeprefix("common.BadVideo: "))
        self.bar.close()
        for number, handler in before.items():
            signal.signal(number, handler)
        if self.step < self.last:
            print_main(f"stopped after step {self.step}; the same command goes on from there")
        else:
            print_main(f"done, {self.step} of {self.total} steps: {cfg.out}/backbone.pth")

    def ask_stop(self, *_):
        self.stop_asked = True

    def receive(self, batch):
        """Name bad videos, once; the batch on the device, augmented there if that is a GPU."""
        for reason in set(batch.pop("bad")) - {"", *self.bad_videos}:
            self.bad_videos.append(reason)
            print(f"WARN bad video, replaced: {reason}", file=sys.stderr, flush=True)
        seeds = batch.pop("seeds", None)  # stay on the CPU: to read one on the GPU would be a wait
        batch = {name: value.to(device(), non_blocking=True) for name, value in batch.items()}
        if seeds is not None:
            batch["clips"] = augment(batch["clips"], seeds, self.dataset.color)
        self.starts = batch["starts"]
        return batch

    def record(self, loss, features, **numbers):
        """Note the loss, features (B, V, D) and numbers; the log has the last step's, of rank 0."""
        self.losses.append(loss.detach())
        self.features, self.numbers = features.detach(), numbers

    def after_step(self):
        """Count the step; log, evaluate and save when it is time; return whether to stop."""
        self.count(self.step + 1)
        epochs, rest = divmod(self.step, self.steps_per_epoch)
        if rest == 0 and world_size() > 1:
            for buffer in self.model.buffers():  # BN's running statistics become those of rank 0
                dist.broadcast(buffer, 0)
        stop = gather(torch.tensor([int(self.stop_asked)])).sum().item() > 0  # all on the CPU
        last = stop or self.step == self.last
        knn = self.knn_every and rest == 0 and (epochs % self.knn_every == 0 or self.finished)
        if knn or last or self.step % self.cfg.log_every == 0:
            self.log(knn)
        if rest == 0 or last or self.step % SAVE_EVERY == 0:
            self.save()
        return stop

    def log(self, knn):
        """A line in log.jsonl, a row, warnings. Only here and in save() is the GPU waited for."""
        cfg = self.cfg
        losses = gather(torch.stack(self.losses)[None]).mean(0).tolist()  # (steps,)
        for step, loss in enumerate(losses, self.step - len(losses) + 1):
            if not math.isfinite(loss):
                self.diverge(f"non-finite loss at step {step}")
        self.bad_videos = sorted(set().union(*gather_objects(self.bad_videos)))
        unit = F.normalize(self.features.float(), dim=-1).flatten(0, 1)  # (B * V, D)
        starts = self.starts.reshape(*self.starts.shape[:2], -1)[:, :, :1]  # (B, V, 1)
        pairs = len(starts) * max(1, cfg.num_views * (cfg.num_views - 1))
        seconds = time.monotonic() - self.since
        line = {
            "step": self.step,
            "epoch": self.epoch,
            "loss": sum(losses) / len(losses),
            "chance": self.chance,
            "lr": self.optimizer.param_groups[0]["lr"],
            "feature_std": unit.std(dim=0).mean().item() * unit.shape[1] ** 0.5,
            "videos_per_second": len(losses) * cfg.batch_size / seconds,
            "data_wait": self.waited / seconds,
            "clip_distance": torch.cdist(starts, starts, p=1).sum().item() / pairs,  # seconds
            "bad_videos": len(self.bad_videos),
        }
        line |= {name: float(value) for name, value in self.numbers.items()}
        if knn:
            line["knn_top1"] = self.measure_knn()
        if rank() == 0:
            with open(self.out / "log.jsonl", "a") as file:
                file.write(json.dumps(line) + "\n")
                self.log_bytes = file.tell()
        print_main(ROW.format(knn=line.get("knn_top1", "-"), **line))
        self.bar.set_postfix_str(f"loss {line['loss']:.4f}", refresh=False)
        trained = cfg.num_views > 1 and self.step > cfg.warmup * self.total
        same = cfg.rho > 1 and line["clip_distance"] == 0
        for wrong, lines, what in (
            (trained and line["feature_std"] < 0.2, 3, "collapsed: all features are equal"),
            (trained and line["loss"] > 0.98 * self.chance, 15, "the loss stays at chance"),
            (line["data_wait"] > 0.3, 3, "waiting for data: more --workers or smaller videos help"),
            (same, 3, "the clips of a video start at the same time: a smaller --stride helps"),
        ):
            self.in_a_row[what] = self.in_a_row[what] + 1 if wrong else 0
            if self.in_a_row[what] == lines:
                print_main(f"WARN {what} (README: is my loss normal?)")
        self.losses, self.since, self.waited = [], time.monotonic(), 0.0

    def diverge(self, what):
        (self.out / "diverged").touch()
        fail(f"{what}; to go on from the last checkpoint, give a --lr below {self.cfg.lr:g}", 1)

    def measure_knn(self):
        """kNN accuracy in percent: every fifth of up to 5000 training videos against the others."""
        network = self.model.encoder.backbone
        clips = TestClips(self.dataset, 2)
        features, indices = extract_features(network.eval(), clips, True, self.labelled)
        network.train()
        z, labels = features.mean(1), torch.from_numpy(self.dataset.labels)[indices]  # (n, D), (n,)
        query = torch.arange(len(indices)) % 5 == 0
        return round(knn_accuracy(z[~query], labels[~query], z[query], labels[query]), 2)

    def settings(self):
        """What must be the same when a run goes on: {name: value}."""
        cfg = self.cfg
        settings = {"script": cfg.script, **dataclasses.asdict(cfg), "videos": len(self.dataset)}
        for path in (sys.modules[type(cfg).__module__].__file__, __file__):
            settings[Path(path).name] = hashlib.sha256(Path(path).read_bytes()).hexdigest()
        return settings

    def save(self):
        """Write last.pth, all that a resume needs, and backbone.pth, what others load."""
        model = self.model.state_dict()
        for state in (model, *self.optimizer.state.values()):
            if not all(torch.as_tensor(value).isfinite().all() for value in state.values()):
                self.diverge(f"weights are not finite after step {self.step}")
        settings = self.settings()
        last = {"model": model, "optimizer": self.optimizer.state_dict(), "cfg": settings}
        last |= {"step": self.step, "bad_videos": self.bad_videos, "log_bytes": self.log_bytes}
        config = settings | {"step": self.step, "finished": self.finished}
        backbone = {"state_dict": self.model.encoder.backbone.state_dict(), "config": config}
        write_file(self.out / "backbone.pth", functools.partial(torch.save, backbone))
        write_file(self.out / "last.pth", functools.partial(torch.save, last))
        (self.out / "diverged").unlink(missing_ok=True)

    def resume(self, path):
        if path.exists():
            try:
                saved = read_file(path)
                self.compare(saved["cfg"], saved["step"] == self.total)
                self.model.load_state_dict(saved["model"])
                self.optimizer.load_state_dict(saved["optimizer"])
                self.bad_videos, self.log_bytes = saved["bad_videos"], saved["log_bytes"]
                self.count(saved["step"])
            except Exception as error:
                fail(f"{path} cannot go on in this run ({error}); choose another --out")
            print_main(f"{path}: going on after step {self.step}")
        steps = set(gather_objects(self.step))
        if len(steps) > 1:
            fail(f"the ranks found steps {steps} in {path}: is its disk not shared?")

    def compare(self, before, finished):
        """End the process if these settings make another run; warn if only code has changed."""
        for name, now in self.settings().items():
            was = before.get(name)
            lower = name == "lr" and now < was and (self.out / "diverged").exists()
            if was == now or name in FREE or lower:
                continue
            if not name.endswith(".py"):  # which would be the hash of a file
                flag = f"--{name.replace('_', '-')} {was}, not {now}"
                fail(f"{self.out}/last.pth was made with {flag}; choose another --out")
            if finished:
                fail(f"{self.out} is finished, and {name} has changed since; choose another --out")
            print_main(f"WARN {name} has changed since that run began")
