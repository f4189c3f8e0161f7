"""What the scripts share: options, distributed, video, demo videos, augmentation, backbones,
weights, optimizer, evaluation, loop.

Letters in shapes: B videos on this rank, W ranks, rho clips of a video, V = max(2, rho) views,
T frames, H x W pixels, D feature width. Clips are (B, V, 3, T, H, W), features (B, V, D): the view
is always axis 1. Sources such as RH:259 are lines of the released code; see the README.
"""

import argparse
import atexit
import bisect
import collections
import contextlib
import fcntl
import glob
import hashlib
import inspect
import json
import math
import os
import re
import shlex
import shutil
import signal
import sys
import tempfile
import time
from collections import OrderedDict
from concurrent.futures import ProcessPoolExecutor
from functools import cached_property, partial
from itertools import pairwise
from pathlib import Path

import av
import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, default_collate
from torchvision.transforms import v2
from tqdm import tqdm

# --- options


class _Flags:  # name = paper, demo  # meaning, as in a recipe
    data = "", ""  # folder of videos, or text list of path or path<TAB>label lines; none: the demo
    out = "", ""  # folder of what is written; none: out/<script>-<data or weights>-...
    small = False, False  # the demo's settings on your own --data
    seed = 0, 0  # of weights, order of the videos, clips, augmentation; 0 = the usual one
    max_steps = 0, 0  # stop after this many steps in all, the schedule unchanged; 0 = never
    log_every = 10, 10  # steps from one line of the log to the next
    workers = -1, -1  # decoding processes of a rank, 0 = none, -1 = its cores, half on a CPU, to 16
    low_memory = False, False  # re-compute activations in backward: memory of one clip at any rho
    compile = False, False  # the backbones, with torch.compile; little of it is left with SyncBN
    show_views = "", ""  # PNG file: write what the model will see, a row for each view, and stop
    check_data = False, False  # open every video once, name the bad, list the others, and stop


def start(recipe, argv=None, rows=None):
    """Read the options, find or make the data, join the other processes, and say all that.

    recipe: a class of lines `name = paper value, demo value  # meaning`: a flag and its help, which
    also says what is refused: a number must be above 0 unless "0 = " or "-1 = " is in it, at most 1
    if ", 1 = " is; text with ", needed" must be given. rows(args): (path, label) of the videos, or
    None for those of --data. Returns the arguments (with `method`, `views`) and the Videos."""
    signal.signal(signal.SIGINT, lambda *_: sys.exit(130))  # nothing to save before the first step
    args, pretraining = _parse(recipe, argv), hasattr(recipe, "rho")
    source = Path(inspect.getfile(recipe))
    args.method, args.views, args.code = source.stem, 1, _digest(source.read_bytes())
    args.data = args.data and os.path.normpath(args.data)
    if pretraining:
        args.views = max(2, args.rho)
        name = Path(args.data).absolute().stem if args.data else "demo"
        args.out = args.out or f"out/{args.method}-{name}-rho{args.rho}"
    else:
        _as_trained(args)
    _check(args)
    listed = rows and rows(args)
    root = Path(args.data or demo_videos("data/demo"))
    halves = [os.path.isdir(root / part) for part in ("train", "val")]
    parted = not args.data or (all(halves) if pretraining else halves[0])
    videos = Videos(listed or (root / "train" if parted else root))
    args.data_hash = videos.hash
    if not pretraining and not listed:
        args.val = args.val or os.path.join(root if parted else root.absolute().parent, "val")
    _take_part(args)
    _prepare(args, len(videos))
    if args.check_data:
        _check_data(args, videos)
    where = torch.cuda.get_device_name() if device().type == "cuda" else "CPU"
    say(f"{versions()}; {world_size()} x {where}, {args.workers} workers each")
    say("options: " + ", ".join(f"{k} {v}" for k, v in vars(args).items() if v not in ("", None)))
    what = "" if args.data else "; no --data: the demo's videos, network and settings"
    say(f"data: {len(videos)} videos, {videos.root or args.data}{what}")
    return args, videos


def _take_part(args):
    """Seed this process, give it its device and its share of the cores, and join the others."""
    torch.manual_seed(args.seed % 2**63)
    torch.backends.cudnn.benchmark = True
    on_cpu, local = device().type == "cpu", int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if not on_cpu and local > torch.cuda.device_count():
        fail(f"{local} processes, but only {torch.cuda.device_count()} GPUs on this machine")
    if not on_cpu:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    cores = max(1, len(os.sched_getaffinity(0)) // local)
    if args.workers < 0:  # on a CPU, workers and this process share the cores
        args.workers = max(1, min(16, cores // (1 + on_cpu)))
    torch.set_num_threads(min(torch.get_num_threads(), max(1, cores - on_cpu * args.workers)))
    if world_size() > 1 and not dist.is_initialized():
        dist.init_process_group("gloo" if on_cpu else "nccl")
        atexit.register(dist.destroy_process_group)


def _prepare(args, n):
    """Fit the batch to n videos, and make the output folder."""
    if args.show_views:  # which has room for four
        args.batch_size = min(4, max(1, min(args.batch_size, n) // world_size())) * world_size()
    loose = any(getattr(args, name, "") for name in ("cached", "extract", "check_data"))
    if args.batch_size > n and not loose:
        fail(f"--batch-size {args.batch_size}: there are only {n} videos, so {n} at most")
    if rank() > 0 or args.show_views:
        return
    try:
        Path(args.out).mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=args.out).close()  # or it cannot be written to
    except OSError as error:
        fail(f"--out {args.out}: {error.strerror}")


def _digest(data):
    return hashlib.sha256(data).hexdigest()[:16]


def versions():
    """Of the packages that a result may depend on."""
    return ", ".join(f"{m.__name__} {m.__version__}" for m in (torch, torchvision, av, np))


def _as_trained(args):
    """Fill in what an evaluation does not say, from the settings in the weights' file."""
    args.weights_hash = ""
    settings = {"backbone": "slow_r50", "frames": 8, "stride": 8, "size": 224}
    if args.small or not args.data:
        settings = {"backbone": "tiny", "frames": 8, "stride": 4, "size": 32}
    if args.weights not in ("", "random"):
        try:
            content, data = _read(args.weights), Path(args.weights).read_bytes()
        except ValueError as error:
            fail(error)
        args.weights_hash = _digest(data)
        found = isinstance(content, dict) and (content.get("config") or content.get("args"))
        saved = found if isinstance(found, dict) else {}
        settings |= {name: saved[name] for name in settings if name in saved}
    for name, value in settings.items():
        setattr(args, name, getattr(args, name) or value)
    sides = [round(args.size * side / 224) for side in (256, 320)]  # of a video, for a crop of 224
    args.short_side, args.test_size = tuple(sides), args.test_size or sides[0]
    path, name = Path(args.weights).resolve(), args.weights or "scratch"
    if args.weights_hash:  # a run's folder is its name
        name = path.parent.name if path.name in ("backbone.pth", "last.pth") else path.stem
    parts = [args.method, *([Path(args.data).absolute().stem] if args.data else []), name]
    if getattr(args, "dataset", "folder") != "folder":
        parts[1] = args.dataset if args.split == 1 else f"{args.dataset}-split{args.split}"
    args.out = args.out or f"out/{'-'.join(parts)}"


def _parse(recipe, argv):
    doc, form = inspect.getmodule(recipe).__doc__, argparse.RawDescriptionHelpFormatter
    usage = "%(prog)s [--flag value ...]"
    parser = argparse.ArgumentParser(None, usage, doc, formatter_class=form, allow_abbrev=False)
    parser.error = fail
    flags = {}
    for lines in (recipe, _Flags):
        title = f"{lines.__name__.strip('_').lower()}: meaning [paper's default; demo's], or [both]"
        group, source = parser.add_argument_group(title), inspect.getsource(lines)
        for name, text in re.findall(r"^    (\w+) = .*?  # (.+)$", source, re.MULTILINE):
            paper, demo = vars(lines)[name]
            kind = float if paper is None else type(paper)
            how = {"type": kind, "metavar": "X"}
            if kind is tuple:
                how = {"type": type(paper[0]), "nargs": "+", "metavar": "X"}
            elif kind is bool:
                how = {"action": argparse.BooleanOptionalAction}
            default = f" [{paper}; {demo}]" if paper != demo else f" [{paper}]" if paper else ""
            flag = "--" + name.replace("_", "-")
            group.add_argument(flag, help=(text + default).replace("%", "%%"), **how)
            flags[name] = text, paper, demo
    args = parser.parse_args(argv)
    small = args.small or not args.data
    for name, (text, paper, demo) in flags.items():
        flag, value = "--" + name.replace("_", "-"), getattr(args, name)
        if value is None:
            value = demo if small else paper
            if name == "warmup_epochs":  # which was chosen for so many epochs
                value *= args.epochs / flags["epochs"][1 + small]
        if value == "" and ", needed" in text:
            fail(f"{flag} is missing, a {text}")
        setattr(args, name, tuple(value) if isinstance(value, list) else value)
        least = -1 if "-1 = " in text else 0 if "0 = " in text else 1e-12
        most = 1 if ", 1 = " in text else math.inf
        for number in value if isinstance(value, tuple | list) else [value]:
            if type(number) not in (int, float) or least <= number <= most and number < math.inf:
                continue
            limits = f"{least} or more" if least < 1e-12 else "above 0"
            fail(f"{flag} must be {limits}{', at most 1' * (most == 1)}, not {number}")
    return args


def _check(args):
    """Refuse settings that cannot work before anything long starts."""
    if os.environ.get("WORLD_SIZE", "1") != "1" and "LOCAL_RANK" not in os.environ:
        fail("WORLD_SIZE is set, but not by torchrun: start with torchrun, or unset it")
    ranks, batch = world_size(), args.batch_size
    near = max(2, round(batch / ranks)) * ranks
    side, area = args.short_side, getattr(args, "crop_area", (1, 1))
    shown = os.path.dirname(args.show_views) or "."
    s3d = args.backbone.startswith("s3d") and (args.frames < 5 or args.size < 17)
    for wrong, words in [
        (args.backbone not in _BACKBONES, f"backbone {args.backbone}: one of {[*_BACKBONES]}"),
        (args.optimizer not in _OPTIMIZERS, f"optimizer {args.optimizer}: one of {[*_OPTIMIZERS]}"),
        (args.batch_norm not in ("sync", "plain"), f"batch-norm {args.batch_norm}: sync or plain"),
        (args.warmup_epochs >= args.epochs, f"warmup-epochs: less than --epochs {args.epochs}"),
        (len(side) != 2 or side[0] > side[1], f"short-side {side}: a least and a largest one"),
        (side[0] < args.size, f"short-side {side[0]} is less than --size {args.size}"),
        (len(area) != 2 or area[0] > area[1] or area[1] > 1, f"crop-area {area}: two shares"),
        (batch % ranks, f"batch-size {batch} does not divide by {ranks} processes; try {near}"),
        (batch < 2 * ranks, f"batch-size {batch}: each of {ranks} processes needs 2 videos for BN"),
        (s3d, f"backbone {args.backbone} needs 5 or more --frames and a --size of 17 or more"),
        (not os.path.isdir(shown), f"show-views {args.show_views}: no such folder"),
        (args.workers > 64, f"workers {args.workers}: at most 64"),
    ]:
        if wrong:
            fail(f"--{words}")
    _operators(args)


def fail(message, code=2):
    """End with one line on stderr. Rank 0 speaks; another rank only if rank 0 has not failed."""
    if rank() > 0:
        time.sleep(5)  # by then torchrun has ended this process if rank 0 failed too
    print(f"{Path(sys.argv[0]).name}: error: {message}", file=sys.stderr, flush=True)
    sys.exit(code)


def say(message):
    """Print on rank 0, above the progress bar."""
    if rank() == 0:
        with contextlib.suppress(BrokenPipeError):  # nobody reads on; what runs goes on
            tqdm.write(message.encode(errors="backslashreplace").decode())  # a file has any name
            sys.stdout.flush()


# --- distributed


def rank():
    """This process's number among all; 0 without torchrun."""
    return int(os.environ.get("RANK", 0)) if world_size() > 1 else 0


def world_size():
    """How many processes train together; 1 without torchrun."""
    return int(os.environ.get("WORLD_SIZE", 1))


def device():
    """This process's GPU (the current one), or the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def gather(x):
    """(B, ...) of each rank -> (W * B, ...) on every rank, rank-major.
    The gradient is exact: if each rank computes the same loss from the result, DDP's mean over
    ranks is the gradient of that loss on the joint batch. (This rank's part gets W times its
    gradient, which the mean divides by W.)"""
    if world_size() == 1:
        return x
    x = x.contiguous()
    parts = [torch.empty_like(x) for _ in range(world_size())]
    dist.all_gather(parts, x.detach())
    if x.requires_grad:
        parts[rank()] = x + (world_size() - 1) * (x - x.detach())  # equals x
    return torch.cat(parts)


def distribute(model, args):
    """Move a model with an `encoder.backbone` to this process's device, before its optimizer is
    made; print its size; return what to call for the forward pass (DDP). BN is over all ranks if
    args.batch_norm is "sync", on CUDA (there is no SyncBN on a CPU)."""
    model.to(device(), memory_format=torch.channels_last_3d)
    for p in model.parameters():
        if p.ndim == 5 and p.shape[2:].numel() == 1:  # both layouts at once: DDP wants this one
            p.data = p.data.clone(memory_format=torch.contiguous_format)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    own = sum(p.numel() for p in model.encoder.backbone.parameters())
    say(f"model: {args.backbone}, {own:,} parameters; trained, heads included: {trained:,}")
    if world_size() > 1 and args.batch_norm == "sync" and device().type == "cuda":
        nn.SyncBatchNorm.convert_sync_batchnorm(model)  # in place
    if args.compile:  # not the whole, with its gathering and re-computing
        torch._dynamo.config.optimize_ddp = False  # cuts a graph, but not when it is re-computed
        for module in model.modules():
            if isinstance(module, _Backbone):
                module.compile()
    if world_size() == 1:
        return model
    parallel = nn.parallel.DistributedDataParallel
    new = "forward_sync_buffers" in inspect.signature(parallel).parameters  # torch 2.14's name
    off = {"forward_sync_buffers" if new else "broadcast_buffers": False}  # ranks keep their own
    return parallel(model, **off)


# --- video

_SUFFIXES = set(".mp4 .m4v .mov .mkv .webm .avi .mpg .mpeg .ts .mts .flv .wmv .3gp .ogv".split())
_FORMATS = "mov,matroska,avi,mpegts,mpeg,mpegvideo,flv,asf,ogg,h264,hevc,m4v,ivf,obu,mxf,nut,dv,wtv"


class Videos:
    """The videos of a folder (at any depth; the folder they lie in is the class), of a text list,
    or of a Python list of (path, label).

    Nothing is opened. The paths are one array of bytes: a million Python strings would be copied
    into each worker, page by page, as their reference counts change. labels: (n,), -1 for none,
    counted along classes, their sorted names unless given; hash: of paths and labels. moments:
    seconds that matter, (n,); boxes: what is there, (n, M, 4), x1 y1 x2 y2 as shares of the sides.
    """

    def __init__(self, source, classes=None, flag="--data"):
        rows, self.root = source, ""
        if not isinstance(source, list):
            rows = list(_rows(Path(source), flag))
            self.root = str(source if Path(source).is_dir() else Path(source).parent)
        if not rows:
            fail(f"no videos in {source} (looked for {' '.join(sorted(_SUFFIXES))})")
        names = [os.fsencode(name) for name, _ in rows]
        self._ends = np.cumsum([len(name) for name in names])
        self._bytes = np.frombuffer(b"".join(names), dtype=np.uint8)
        found = sorted({label for _, label in rows} - {""})
        self.classes = found if classes is None else classes
        if unknown := set(found) - set(self.classes):
            fail(f"{flag} has a class that the training videos lack: {min(unknown)}")
        number = {label: i for i, label in enumerate(["", *self.classes], start=-1)}
        self.labels = np.array([number[label] for _, label in rows])
        self.hash = _digest(self._bytes.tobytes() + self._ends.tobytes() + self.labels.tobytes())
        self.moments, self.boxes = None, np.zeros((len(rows), 0, 4), np.float32)
        self.reading = torch.full((64,), -1).share_memory_()  # by each worker: number of the video

    def __len__(self):
        return len(self._ends)

    def __getitem__(self, i):
        begin = self._ends[i - 1] if i else 0
        name = os.fsdecode(self._bytes[begin : self._ends[i]].tobytes())  # IndexError ends a loop
        if worker := torch.utils.data.get_worker_info():
            self.reading[worker.id] = i
        return os.path.join(self.root, name)


def _rows(source, flag):
    """(path relative to the folder or the list, label) of each video; # starts a comment line."""
    if os.path.isdir(source):
        found = glob.iglob("**/*", root_dir=source, recursive=True)
        names = sorted(name for name in found if Path(name).suffix.lower() in _SUFFIXES)
        yield from ((name, os.path.dirname(name)) for name in names)
    elif not os.path.isfile(source) or source.suffix.lower() in _SUFFIXES:
        fail(f"{flag} {source}: no such folder of videos or text list of their paths")
    elif not os.access(source, os.R_OK):
        fail(f"{flag} {source}: no permission to read it")
    else:
        for line in source.read_text(encoding="utf-8-sig", errors="surrogateescape").split("\n"):
            if line.startswith("label,youtube_id"):
                fail(f"{source} is a Kinetics annotation; a line must be PATH or PATH<TAB>LABEL")
            name, _, label = line.partition("\t")
            if name.strip() and not name.startswith("#"):
                yield name.strip(), label.strip()


def _open(path):
    """One local media file: no network, no playlist that names other files."""
    options = {"protocol_whitelist": "file", "format_whitelist": _FORMATS}
    return av.open(f"file:{path}", options=options)


@contextlib.contextmanager
def _reasons(path):
    """What goes wrong inside becomes a ValueError of one line that begins with the path."""
    try:
        yield
    except (av.FFmpegError, OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ValueError(f"{path}: {reason}") from None


class VideoReader:
    """A video file, read in one thread; times are seconds from its first frame.

    short_side: pixels, to which frames are scaled; the long side is at most 16 times as long.
    Opening, `duration` and `read` raise a ValueError that begins with the path if they cannot.
    Inside, a limit is a time stamp (pts, in units of time_base) of which the last frame up to it is
    wanted; packets, of a frame each, come in the order in which frames need each other."""

    def __init__(self, path, short_side=None):
        self.path = path
        self.short_side = short_side
        self._may_skip = True
        self._been_read = False
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
        self._decoder = self._stream.codec_context
        self._decoder.thread_count = 1
        self._second = 1 / self._stream.time_base
        self._skipping = False
        self._start_decoding()
        self._first = self._shown = self._coming
        if self._first is None:
            raise ValueError("no frame with a time stamp can be decoded")

    @cached_property
    def duration(self):
        """Seconds; from the header if it says, else from all packets."""
        if self._stream.duration:
            return float(self._stream.duration / self._second)
        if self._container.duration:  # counted from 0, wherever the first frame is
            return self._container.duration / av.time_base - max(0.0, self._first.time)
        with _reasons(self.path), _open(self.path) as scan:
            packets = scan.demux(scan.streams.best("video"))
            last = max(packet.pts for packet in packets if packet.pts is not None)
        return float((last - self._first.pts) / self._second)

    def read(self, times):
        """Frames at times of any shape, in any order, in one pass through the file.

        At time t it is the last frame whose time stamp is at most t + 1 ms; past the end the last.
        Returns (*times.shape, H, W, 3) uint8 RGB, upright, scaled from the first frame's size."""
        times = np.asarray(times, float)
        seconds = np.clip(times.ravel(), 0, 1e9) + 1e-3
        with _reasons(self.path):
            if self._been_read:
                self._reopen()
            self._been_read = True
            limits = self._first.pts + (seconds * float(self._second)).astype(int)
            pictures = self._pictures(limits.tolist())
        return pictures.reshape(*times.shape, *pictures.shape[1:])

    def _reopen(self):
        self.close()
        self._open()

    def _pictures(self, limits):
        self._limits = sorted(limits)
        sure = self._decoder.name in ("h264", "mpeg2video") and not self._first.interlaced_frame
        self._skipping = sure and self._may_skip and self._container.format.name != "avi"
        height, width = self._size()
        pictures = np.empty((len(limits), height, width, 3), np.uint8)
        reformatter = av.video.reformatter.VideoReformatter()
        shown = None
        for k in np.argsort(limits, kind="stable"):
            frame = self._frame_at(limits[k])
            if frame is not shown:  # converted and scaled in one go
                picture = reformatter.reformat(frame, width, height, "rgb24", threads=1)
                picture = picture.to_ndarray()
            pictures[k] = picture
            shown = frame
        degrees = self._first.rotation
        if abs(degrees) > 360:  # the matrix is damaged
            return pictures
        return np.rot90(pictures, round(degrees / 90), axes=(1, 2))

    def _size(self):
        """Height and width before rotation."""
        sides = self._first.height, self._first.width
        if self.short_side is None:
            return sides
        scale = self.short_side / min(sides)
        return [min(round(side * scale), 16 * self.short_side) for side in sides]

    def _frame_at(self, limit):
        """The frame of a limit, which is not below that of the call before."""
        if self._worth_seeking(limit):
            self._seek(limit)
        while not self._is_known_last(limit):
            self._coming = self._coming or self._next_frame()
            if self._coming is None or self._coming.pts > limit:
                break
            self._shown = self._coming
            self._coming = None
        if self._shown.interlaced_frame or set(self._stamps_up_to(limit)) != {self._shown.pts}:
            self._may_skip = False  # not the frame that the packets promised, or a field of it
        if self._skipping and not self._may_skip:
            self._reopen()
            return self._frame_at(limit)
        return self._shown

    def _start_decoding(self):
        """From where the container is now."""
        self._packets = self._container.demux(self._stream)
        self._ahead = collections.deque()  # packets that are read, but not decoded
        self._stamps = []  # of all packets that are read, sorted
        self._frames = []  # that are decoded, but not taken
        self._coming = self._next_frame()

    def _next_frame(self):
        """The next one that has a time stamp; None at the end."""
        while not self._frames:
            try:
                packet = self._next_packet()
                if packet is None:
                    return None
                self._decoder.skip_frame = "NONREF" if self._not_wanted(packet) else "DEFAULT"
                self._frames += [frame for frame in packet.decode() if frame.pts is not None]
            except av.error.InvalidDataError:  # a damaged packet
                continue
            except IndexError:  # of a stream that begins here, which a new demuxer knows
                self._packets = self._container.demux(self._stream)
        return self._frames.pop(0)

    # A frame that is not wanted and that no other refers to (NONREF) is not decoded, which leaves
    # all others as they are, bit for bit. Only where packets have the time stamps of their frames:
    # not in an avi, nor with fields, of which a packet may hold one.

    def _next_packet(self):
        """The next one to decode, None at the end; others are read ahead for their time stamps."""
        while len(self._ahead) <= 8 * self._skipping:
            packet = next(self._packets, None)
            if packet is None:
                break
            self._ahead.append(packet)
            if packet.size and (packet.pts is None or packet.is_corrupt):
                self._may_skip = False
            elif packet.size and not packet.is_discard:
                bisect.insort(self._stamps, packet.pts)
        return self._ahead.popleft() if self._ahead else None

    def _not_wanted(self, packet):
        """Whether the limit that follows, if any, is known to be another frame's."""
        if not self._skipping or packet.pts is None:
            return False
        i = bisect.bisect_left(self._limits, packet.pts)
        j = bisect.bisect_right(self._stamps, packet.pts)
        if i == len(self._limits):
            return True
        return j < len(self._stamps) and self._stamps[j] <= self._limits[i]

    def _stamps_up_to(self, limit):
        """Of packets that were read, from the frame shown on."""
        i = bisect.bisect_left(self._stamps, self._shown.pts)
        return self._stamps[i : bisect.bisect_right(self._stamps, limit)]

    def _is_known_last(self, limit):
        """Whether the frame shown is the last up to a limit, without a look at the next."""
        if not self._skipping or not self._ahead or self._ahead[-1].dts is None:
            return False
        return self._ahead[-1].dts > limit and self._stamps_up_to(limit) == [self._shown.pts]

    def _worth_seeking(self, limit):
        """Whether a key frame lies between the coming frame and a limit, or is likely to."""
        at_end = self._coming is None and not self._ahead
        if at_end or self._container.format.name == "mpeg":
            return False  # an mpg file has too few time stamps to know where a seek has led
        here = (self._coming or self._shown).pts
        index = self._stream.index_entries
        if len(index):
            # an mp4's index says when frames are decoded, which is earlier
            delay = max(0, self._first.pts - index[0].timestamp)
            i = index.search_timestamp(limit - delay)
            if i >= 0 and index[i].timestamp - here > self._second / 10:
                return True
            here = max(here, index[len(index) - 1].timestamp)
        return limit - here > 2 * self._second  # the index, if any, ends before

    def _seek(self, limit):
        """Go on from a key frame at or before a limit."""
        for seconds in (0, 2, 20):  # it may lead too far
            place = max(math.floor(limit - seconds * self._second), self._first.pts)
            with contextlib.suppress(av.FFmpegError):
                self._container.seek(place, stream=self._stream)
                self._start_decoding()
                if self._coming and self._coming.pts <= limit:
                    return
        self._reopen()


def read_clips(path, starts, frames, stride, size=None):
    """Clips of one video: frame i lies i * stride / 30 seconds after its start.

    starts: seconds from the first frame, (clips,), or the times of all frames, (clips, T). size:
    the short side in pixels. Returns (clips, T, H, W, 3) uint8 RGB in the order of starts; raises
    ValueError. See VideoReader."""
    with VideoReader(path, size) as reader:
        return reader.read(_frame_times(np.asarray(starts, float), frames, stride))


def _frame_times(starts, frames, stride):
    """(clips,) starts, or the (clips, T) times themselves -> (clips, T)."""
    if starts.ndim == 2:
        return starts
    return starts[:, None] + np.arange(frames) * stride / 30


# --- demo videos

_COATS = {  # in the acrobat's own coordinates: dark below -0.42, light above 0.42
    "solid": lambda u, v, f: np.ones_like(u),
    "stripes": lambda u, v, f: np.sin(2 * np.pi * f * u),
    "dots": lambda u, v, f: 1.6 * (np.cos(2 * np.pi * f * u) + np.cos(2 * np.pi * f * v)) - 1,
    "checks": lambda u, v, f: 2.5 * np.sin(1.2 * np.pi * f * u) * np.sin(1.2 * np.pi * f * v),
}
_TRICKS = ["spin", "bounce", "swing", "pulse"]


def demo_videos(folder, seed=0, scenes=4, train=400, val=200):
    """Make the demo's mp4 files, <folder>/{train,val}/<coat>-<trick>/NNNN.mp4, unless they exist,
    the same for a seed. An acrobat in a coat does a trick for 4 s (60 frames, 64 x 64) while
    backdrop, colours and light change `scenes` - 1 times. Coat and trick are the class, and last;
    what changes is a nuisance that clips from different times do not share. Returns the folder."""
    folder = Path(folder)
    while rank() > 0 and os.environ["LOCAL_RANK"] != "0" and not folder.exists():
        time.sleep(0.2)  # if the process that makes them dies, torchrun ends this one
    if folder.exists():
        return folder
    say(f"making {train + val} demo videos in {folder}, once")
    building = folder.with_name(f".{folder.name}-{os.uname().nodename}-{os.getpid()}")
    jobs = [(building / "train", i, (seed, 0, i), scenes) for i in range(train)]
    jobs += [(building / "val", i, (seed, 1, i), scenes) for i in range(val)]
    try:
        with ProcessPoolExecutor(len(os.sched_getaffinity(0)), initializer=_quiet) as pool:
            list(tqdm(pool.map(_write_acrobat, jobs, chunksize=8), total=len(jobs), disable=None))
        building.rename(folder)
    except OSError as error:
        if not folder.exists():  # else another run was faster
            fail(f"cannot make the demo videos in {folder}: {error}")
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return folder


def _write_acrobat(job):
    folder, i, seed, scenes = job
    coat, trick = [*_COATS][i % 4], _TRICKS[i // 4 % 4]
    path = folder / f"{coat}-{trick}" / f"{i:04d}.mp4"
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        options = {"crf": "20", "preset": "veryfast", "threads": "1", "g": "12", "bf": "0"}
        stream = container.add_stream("libx264", rate=15, options=options)
        stream.width = stream.height = 64
        for picture in _acrobat(coat, trick, scenes, np.random.default_rng(seed)):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())


def _acrobat(coat, trick, scenes, rng, frames=60, side=64):
    """One demo video, (frames, side, side, 3) uint8."""
    t = np.arange(frames)[:, None, None]
    y, x = np.mgrid[-1 : 1 : side * 1j, -1 : 1 : side * 1j][:, None]  # (1, side, side) each
    wave = 2 * np.pi * t / rng.uniform(10, 14) + rng.uniform(0, 2 * np.pi)
    spin, bounce, swing, pulse = (float(trick == name) for name in _TRICKS)
    angle = rng.uniform(-0.3, 0.3) + spin * wave
    size = 0.6 * rng.uniform(0.85, 1.15) * (1 + 0.35 * pulse * np.sin(wave))
    dx = x - rng.uniform(-0.15, 0.15) - 0.5 * swing * np.sin(wave)
    dy = y - rng.uniform(-0.15, 0.15) + bounce * (0.8 * np.abs(np.sin(wave / 2)) - 0.4)
    u = (np.cos(angle) * dx + np.sin(angle) * dy) / size  # (frames, side, side): on the acrobat
    v = (np.cos(angle) * dy - np.sin(angle) * dx) / size
    radius, corners = 1.0, rng.choice([0, 3, 4])  # disc, triangle, square
    if corners:
        part, theta = 2 * np.pi / corners, np.arctan2(v, u)
        radius = 1.15 * np.cos(part / 2) / np.cos(theta % part - part / 2)
    edge = (radius - np.hypot(u, v)) * size * side / 2  # pixels to the rim, positive inside
    eye = np.clip((0.17 - np.hypot(u - 0.4, v + 0.2)) * size * side / 2 + 0.5, 0, 1)[..., None]
    shade = 0.25 + 0.75 * np.clip(0.5 + 1.2 * _COATS[coat](u, v, rng.uniform(1.2, 1.6)), 0, 1)
    shade = (shade * np.clip(edge - 0.7, 0, 1))[..., None]  # a dark outline
    inside = np.clip(edge + 0.5, 0, 1)[..., None]
    # what changes: backdrop, colours and light, new in every scene
    cuts = frames * (np.arange(1, scenes) + rng.uniform(-0.2, 0.2, scenes - 1)) / scenes
    scene = (t > cuts).sum(-1)[:, 0]  # (frames,)
    low, high, own = rng.uniform(0.1, 0.9, (3, scenes, 1, 1, 3))[:, scene]  # (frames, 1, 1, 3)
    pace, phase, way = rng.uniform(0, 1, (3, scenes, 1, 1))[:, scene]  # of a wave in the backdrop
    along = np.cos(2 * np.pi * way) * x + np.sin(2 * np.pi * way) * y
    mix = np.sin((0.8 + 2.7 * pace) * along + 2 * np.pi * phase + 0.05 * t)[..., None] / 2 + 0.5
    light = rng.uniform(0.65, 1.3, (scenes, 1, 1, 1))[scene]
    body = shade * own / own.max(-1, keepdims=True) * (1 - eye) + eye
    picture = light * (inside * body + (1 - inside) * (low + mix * (high - low)))
    return (np.clip(picture + rng.normal(0, 0.02, picture.shape), 0, 1) * 255).astype(np.uint8)


# --- augmentation

_MEAN, _STD = 0.45, 0.225  # of every channel (DEF:687)


def _operators(args):
    """What crops a clip, and what follows; each draws once for all frames (TRF:1073, tint 1102)."""
    names = set(args.augment.split(",")) - {"none"}
    table = {
        "flip": v2.RandomHorizontalFlip(0.5),
        "jitter": v2.RandomApply([v2.ColorJitter(0.6, 0.6, 0.6, 0.15)], p=0.8),
        "gray": v2.RandomGrayscale(0.2),
        "blur": v2.RandomApply([v2.GaussianBlur(13, (0.1, 2.0))], p=0.5),  # 13: 3 sigma each side
        "tint": v2.Compose([v2.RandomGrayscale(0.2), v2.ColorJitter(0.4, 0.4, 0.4, 0.1)]),
        "rotate": v2.RandomChoice([v2.RandomRotation((d, d)) for d in (0, 90, 180, 270)]),
        "cutout": v2.RandomErasing(p=1.0),  # a black box of 2 to 33 % of the area
        "noise": _noise,
        "sobel": _sobel,
    }
    if unknown := names - {"crop", *table}:
        fail(f"--augment {min(unknown)} is none of crop, {', '.join(table)}, none")
    crop = v2.Compose([v2.Resize(args.size), v2.CenterCrop(args.size)])
    if "crop" in names and "crop_area" in args:
        crop = v2.RandomResizedCrop(args.size, scale=args.crop_area, ratio=(3 / 4, 4 / 3))
    elif "crop" in names:
        crop = v2.RandomCrop(args.size)
    return crop, [operator for name, operator in table.items() if name in names]


def _noise(clip):
    """Gaussian, of deviation 0.1, the same in all frames; drawn on the CPU, as everything is."""
    return (clip + 0.1 * torch.randn(clip.shape[1:]).to(clip.device)).clamp(0, 1)


def _sobel(clip):
    """(T, 3, H, W) -> the length of the grey picture's gradient, in all three channels."""
    x = torch.tensor([[1.0, 0.0, -1.0], [2.0, 0.0, -2.0], [1.0, 0.0, -1.0]], device=clip.device) / 4
    gray = F.pad(v2.functional.rgb_to_grayscale(clip), (1, 1, 1, 1), mode="replicate")
    gradient = F.conv2d(gray, torch.stack([x, x.T])[:, None])  # (T, 2, H, W)
    return gradient.norm(dim=1, keepdim=True).clamp(max=1).expand_as(clip)


def _batch(args, videos, sample_clips, on_cpu, step):
    """This rank's part, a contiguous slice, of the batch of a step, in a worker: views (B, V, ...),
    seeds (B, V), starts (B, V) or (B, V, T), boxes (B, V, M, 4), numbers of the videos (B,), and
    the reasons of bad ones. A view is (T, 3, H, W) uint8, on a CPU (3, T, H, W) float32, done."""
    epoch, i = divmod(step, len(videos) // args.batch_size)
    order = np.random.default_rng((args.seed, epoch)).permutation(len(videos))
    share = args.batch_size // world_size()
    begin = i * args.batch_size + rank() * share
    crop, rest = _operators(args)
    bad, items = [], []
    for video in order[begin : begin + share]:
        items.append(_views(args, videos, sample_clips, crop, (epoch, int(video)), bad))
        if items[-1] is None:
            return *[None] * 5, bad
    views, seeds, *more = (default_collate(column) for column in zip(*items, strict=True))
    return _augment(views, seeds, rest) if on_cpu else views, seeds, *more, bad


def _views(args, videos, sample_clips, crop, key, bad):
    """The cropped views of a video, all randomness from the seed and the key (epoch, number); a bad
    one is replaced by the same other one for the same seed, and bad gets the reason."""
    for attempt in range(20):
        rng = np.random.default_rng((args.seed, *key, attempt))
        number = key[1] if attempt == 0 else int(rng.integers(len(videos)))
        moment = _moment(videos, number)
        rho, timespan = getattr(args, "rho", 1), getattr(args, "timespan", None)
        span = args.frames * args.stride / 30
        size = int(rng.integers(args.short_side[0], args.short_side[-1], endpoint=True))
        try:
            with VideoReader(videos[number], size) as reader:
                starts = sample_clips(reader.duration, span, rho, timespan, rng, **moment)
                clips = reader.read(_frame_times(np.array(starts), args.frames, args.stride))
        except ValueError as error:
            bad.append(str(error))
            continue
        clips = torch.from_numpy(clips.copy()).permute(0, 1, 4, 2, 3)  # (rho, T, 3, H, W)
        clips = clips.expand(args.views, *clips.shape[1:])  # rho = 1: one clip, cropped twice
        seeds = torch.from_numpy(rng.integers(2**62, size=(2, args.views)))
        boxes = _boxes(videos, number, *clips.shape[-2:])
        cropped = [_draw([crop], (c, boxes), s) for c, s in zip(clips, seeds[0], strict=True)]
        turned = len(boxes) > 0 and "flip" in args.augment.split(",")  # the views: in _augment
        flip = _operators(args)[1][:1] if turned else []
        views, boxes = zip(*cropped, strict=True)
        boxes = [_draw(flip, *pair) for pair in zip(boxes, seeds[1], strict=True)]
        starts = torch.tensor(starts)  # (rho,), or (rho, T) times of all frames
        starts = starts.expand(args.views, *starts.shape[1:])
        return torch.stack(views), seeds[1], starts, torch.stack(boxes), number


def _moment(videos, i):
    return {} if videos.moments is None else {"moment": float(videos.moments[i])}


def _boxes(videos, i, height, width):
    """(M, 4): in pixels of a whole picture."""
    boxes = torch.from_numpy(videos.boxes[i]) * torch.tensor([width, height] * 2)
    return torchvision.tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=(height, width))


def _draw(operators, clip, seed):
    torch.default_generator.manual_seed(int(seed))  # the one that transforms.v2 draws from
    for operator in operators:
        clip = operator(clip)
    return clip


def _augment(views, seeds, operators):
    """(B, V, T, 3, H, W) uint8 -> (B, V, 3, T, H, W) float32, normalised, on the same device."""
    views = v2.functional.to_dtype(views, torch.float32, scale=True)
    for b, v in np.ndindex(*seeds.shape):
        views[b, v] = _draw(operators, views[b, v], seeds[b, v])
    return ((views - _MEAN) / _STD).transpose(2, 3)


def _show_views(args, clips, starts):
    """Write a picture of up to 4 videos: a row for each view, a column for each frame."""
    pictures = (clips[:4] * _STD + _MEAN).transpose(2, 3).clamp(0, 1).flatten(0, 2)
    pictures = F.interpolate(pictures, scale_factor=math.ceil(96 / args.size))
    times = _frame_times(starts[:4].flatten(0, 1).numpy(), args.frames, args.stride)
    corner, mark = torch.tensor([[0, 0, 1, 1]]), torchvision.utils.draw_bounding_boxes
    pairs = zip(pictures.cpu(), times.flatten(), strict=True)
    marked = [mark(picture, corner, [f"{seconds:.2f} s"]) for picture, seconds in pairs]
    save = partial(torchvision.utils.save_image, marked, nrow=args.frames, format="png")
    write(args.show_views, save)
    say(f"wrote {args.show_views}: {len(clips[:4])} videos, {args.views} views each")


def _check_data(args, videos):
    """Read two places of every video, name those that cannot be read, list the others, and stop."""
    labels, clean = ["", *(f"\t{name}" for name in videos.classes)], Path(args.out, "clean.txt")
    args.allow_missing = True
    rows, problems = evaluate(args, videos, lambda x: torch.zeros(1), clips=2)
    for problem in problems:
        say(f"bad: {problem}")
    good = torch.nonzero(rows.isfinite())[:, 0].tolist()
    lines = [os.path.abspath(videos[i]) + labels[videos.labels[i] + 1] + "\n" for i in good]
    write(clean, lambda file: file.writelines(map(os.fsencode, lines)))
    say(f"{len(good)} of {len(videos)} videos can be read, a list: {clean}")
    sys.exit(0)


def _quiet(_=None):
    """For a worker process: signals are the main process's affair, FFmpeg keeps silent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    av.logging.set_level(None)


# --- backbones


class _Backbone(nn.Sequential):
    """Named stages in a row: features(x) is the last map; calling it adds the global average.

    (B, 3, T, H, W) of any size -> (B, feature_dim) float32."""

    def __init__(self, feature_dim, stages):
        super().__init__(OrderedDict(stages))
        self.feature_dim = feature_dim

    def features(self, x):
        return super().forward(x)

    def forward(self, x):
        return self.features(x).mean(dim=(2, 3, 4), dtype=torch.float32)


def _conv(inputs, outputs, kernel, stride=(1, 1, 1)):
    """A convolution that keeps the size but for its stride; init of INIT:116."""
    conv = nn.Conv3d(inputs, outputs, kernel, stride, [k // 2 for k in kernel], bias=False)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    return conv


class _Bottleneck(nn.Module):
    """Kernels 1x1x1 or 3x1x1, 1x3x3, 1x1x1, and a shortcut; the released code's names (RH:259)."""

    def __init__(self, inputs, width, time_kernel, stride):
        super().__init__()
        bn, relu, outputs = nn.BatchNorm3d, nn.ReLU(inplace=True), 4 * width
        self.branch1 = None
        if inputs != outputs:
            self.branch1 = _conv(inputs, outputs, (1, 1, 1), (1, stride, stride))
            self.branch1_bn = bn(outputs)
        a = _conv(inputs, width, (time_kernel, 1, 1))
        b = _conv(width, width, (1, 3, 3), (1, stride, stride))
        c = _conv(width, outputs, (1, 1, 1))
        layers = dict(a=a, a_bn=bn(width), a_relu=relu, b=b, b_bn=bn(width), b_relu=relu)
        self.branch2 = nn.Sequential(OrderedDict(**layers, c=c, c_bn=bn(outputs)))

    def forward(self, x):
        shortcut = x if self.branch1 is None else self.branch1_bn(self.branch1(x))
        return F.relu(shortcut + self.branch2(x), inplace=True)


def _slow_r50():
    """SlowFast's Slow pathway on ResNet-50: no stride in time, 3x1x1 in the last two stages."""
    conv, pool = _conv(3, 64, (1, 7, 7), (1, 2, 2)), nn.MaxPool3d((1, 3, 3), (1, 2, 2), (0, 1, 1))
    stem = OrderedDict(conv=conv, bn=nn.BatchNorm3d(64), relu=nn.ReLU(inplace=True), pool=pool)
    stages = {"s1": nn.Sequential(OrderedDict(pathway0_stem=nn.Sequential(stem)))}
    inputs, plan = 64, {"s2": (3, 64, 1), "s3": (4, 128, 1), "s4": (6, 256, 3), "s5": (3, 512, 3)}
    for name, (blocks, width, time_kernel) in plan.items():
        stage = OrderedDict()
        for i in range(blocks):
            stride = 2 if i == 0 and name != "s2" else 1
            stage[f"pathway0_res{i}"] = _Bottleneck(inputs, width, time_kernel, stride)
            inputs = 4 * width
        stages[name] = nn.Sequential(stage)
    return _Backbone(inputs, stages)


def _tiny():
    """The demo's: five convolutions, 0.2 M parameters; space shrinks faster than time."""
    stages, inputs = {}, 3
    plan = [(16, 5, (1, 2, 2)), (32, 3, (1, 2, 2)), (32, 3, (2, 1, 1)), (64, 3, (1, 2, 2))]
    for i, (width, k, stride) in enumerate([*plan, (64, 3, (2, 1, 1))]):
        conv = _conv(inputs, width, (3, k, k), stride)
        stages[f"stage{i}"] = nn.Sequential(conv, nn.BatchNorm3d(width), nn.ReLU(inplace=True))
        inputs = width
    return _Backbone(inputs, stages)


def _r2plus1d_18():
    """torchvision's R(2+1)D-18, 31.3 M parameters (the study's table says 15.4 M)."""
    stages = dict(torchvision.models.video.r2plus1d_18().named_children())
    return _Backbone(stages["fc"].in_features, [*stages.items()][:-2])  # less avgpool and fc


def _s3d(gated=False):
    """torchvision's S3D; gated, S3D-G: each branch's channels times a sigmoid of their averages."""
    network = torchvision.models.video.s3d()
    for block in network.features if gated else []:
        for name, branch in [*block.named_children()] if hasattr(block, "branch0") else []:
            setattr(block, name, nn.Sequential(branch, _Gate(_norms(branch)[-1].num_features)))
    return _Backbone(network.classifier[1].in_channels, network.features.named_children())


class _Gate(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.conv = nn.Conv3d(width, width, 1)

    def forward(self, x):
        return x * self.conv(x.mean(dim=(2, 3, 4), keepdim=True)).sigmoid()


_BACKBONES = {"slow_r50": _slow_r50, "r2plus1d_18": _r2plus1d_18, "s3d": _s3d}
_BACKBONES |= {"s3d_g": partial(_s3d, gated=True), "tiny": _tiny}


def backbone(name):
    """A new network with `.feature_dim`, `.features(x)`; (B, 3, T, H, W) -> (B, feature_dim)."""
    return _BACKBONES[name]()


def mlp(widths, bn):
    """Linear layers, ReLU and (if bn) BN between: (N, widths[0]) -> (N, widths[-1]); HEAD:147."""
    layers = []
    for i, (inputs, outputs) in enumerate(pairwise(widths), start=2):
        hidden = i < len(widths)
        linear = nn.Linear(inputs, outputs, bias=not (bn and hidden))  # BN has a bias of its own
        nn.init.kaiming_uniform_(linear.weight, a=1)
        if linear.bias is not None:
            nn.init.zeros_(linear.bias)
        layers += [linear, *[nn.BatchNorm1d(outputs)] * (bn and hidden)]
        layers += [nn.ReLU(inplace=True)] * hidden
    return nn.Sequential(*layers)


def per_view(network, clips, low_memory=False):
    """Run a network on one view after the other, so that BN sees the B clips of one view: (B, V, 3,
    T, H, W) -> (B, V, ...) float32. With low_memory only the inputs are kept for backward."""
    run = network
    if low_memory and torch.is_grad_enabled():
        again = {"context_fn": lambda: (contextlib.nullcontext(), _uncounted(network))}
        run = partial(checkpoint, network, use_reentrant=False, **again)
    views = [view.contiguous(memory_format=torch.channels_last_3d) for view in clips.unbind(1)]
    return torch.stack([run(view).float() for view in views], dim=1)


@contextlib.contextmanager
def _uncounted(network):
    """While activations are computed again: BN must not count the same batch twice."""
    norms = [(m, m.momentum, m.num_batches_tracked.clone()) for m in _norms(network)]
    for norm, _, _ in norms:
        norm.momentum = 0.0
    try:
        yield
    finally:  # torch leaves by an exception when it has what it needs
        for norm, momentum, count in norms:
            norm.momentum = momentum
            norm.num_batches_tracked.copy_(count)


def _norms(network):
    return [m for m in network.modules() if isinstance(m, _BatchNorm)]


# --- weights


def _read(path):
    """What a file of torch.save holds, on the CPU, without running code; ValueError, one line."""
    try:
        if str(path).endswith(".pkl"):
            raise ValueError("a pickle, as in SlowFast's model zoo, which may run code")
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch has no common class for what a damaged file raises
        reason = (str(error).strip() or type(error).__name__).split("\n")[0]
        raise ValueError(f"cannot read {path}: {reason}") from None


def write(path, save):
    """save(file), on rank 0. Whoever reads, after a kill too, finds the old file or the new one."""
    temporary = Path(f"{path}.tmp")
    if rank() > 0:
        return
    if os.path.exists(path) and not os.path.isfile(path):
        fail(f"cannot write {path}: it is there, and no file", code=1)
    try:
        with open(temporary, "wb") as file:
            save(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # a full disk is a RuntimeError of torch's writer
        temporary.unlink(missing_ok=True)
        fail(f"cannot write {path}: {error}; an older one is as it was", code=1)


_PREFIXES = ["", "backbone.", "encoder.backbone.", "features.", "module."]  # of the files we read
_PYTORCHVIDEO = {  # its names -> the released code's
    r"^blocks\.0\.conv\.": "s1.pathway0_stem.conv.",
    r"^blocks\.0\.norm\.": "s1.pathway0_stem.bn.",
    r"^blocks\.(\d)\.res_blocks\.(\d)\.": lambda m: f"s{int(m[1]) + 1}.pathway0_res{m[2]}.",
    r"(branch.)_conv\.": r"\1.",
    r"(branch.)_norm\.": r"\1_bn.",
    r"conv_([abc])\.": r"\1.",
    r"norm_([abc])\.": r"\1_bn.",
}


def load(network, args):
    """load_weights from --weights, in words; "random" and "" leave a network as it is."""
    if not args.weights_hash:
        return say(f"WARN the backbone starts from random weights (seed {args.seed})")
    try:
        count = load_weights(network, args.weights)
    except ValueError as error:
        fail(error)
    say(f"weights: {count} of {count} backbone tensors from {args.weights}")


def load_weights(network, path):
    """Load a backbone: from our backbone.pth or last.pth, the released contrastive .pyth (its query
    network) or classifier, pytorchvideo's slow_r50, torchvision's r2plus1d_18 or s3d. Returns the
    number of tensors, all of the backbone's, or raises ValueError, one line."""
    content = _read(path)
    for key in ("model_state", "state_dict", "model"):
        content = content[key] if isinstance(content, dict) and key in content else content
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds no state dict")
    content = {k: v for k, v in content.items() if isinstance(k, str) and torch.is_tensor(v)}
    for pattern, name in _PYTORCHVIDEO.items() if any("res_blocks" in k for k in content) else []:
        content = {re.sub(pattern, name, key): value for key, value in content.items()}
    wanted, found = network.state_dict(), {}
    for prefix in _PREFIXES:
        here = {k: content[prefix + k] for k in wanted if prefix + k in content}
        found = max(found, here, key=len)
    for name, tensor in wanted.items():
        if name not in found or found[name].shape != tensor.shape:
            reason = f"of shape {(*found[name].shape,)}" if name in found else "missing"
            part = f"{len(found)} of the backbone's {len(wanted)} tensors"
            raise ValueError(f"{path} has {part}; {name} is {reason}")
        if not torch.isfinite(found[name]).all():
            raise ValueError(f"{path}: {name} is not finite")
    network.load_state_dict(found)
    return len(found)


# --- optimizer


class LARS(torch.optim.Optimizer):
    """SGD with Nesterov momentum, each weight's step scaled to the weight's norm (OPT:262).

    A tensor of two or more dimensions: g <- (g + wd w) trust |w| / (|g| + wd |w| + 1e-8), if both
    norms are not 0. Biases and BN: the plain gradient, no weight decay."""

    def __init__(self, params, lr, momentum, weight_decay, trust_coefficient=0.001):
        defaults = dict(lr=lr, momentum=momentum, weight_decay=weight_decay)
        super().__init__(params, dict(**defaults, trust_coefficient=trust_coefficient))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:  # _foreach_: few launches on a GPU for many tensors
            weights = [w for w in group["params"] if w.grad is not None]
            if not weights:  # which _foreach_ refuses
                continue
            steps = {w: w.grad for w in weights}
            if wide := [w for w in weights if w.ndim > 1]:
                steps |= zip(wide, self.scaled(wide, group), strict=True)
            for w in weights:
                if w not in self.state:
                    self.state[w]["momentum_buffer"] = torch.zeros_like(w)
            buffers = [self.state[w]["momentum_buffer"] for w in weights]
            torch._foreach_mul_(buffers, group["momentum"])
            torch._foreach_add_(buffers, [*steps.values()])
            ahead = torch._foreach_add([*steps.values()], buffers, alpha=group["momentum"])
            torch._foreach_add_(weights, ahead, alpha=-group["lr"])

    def scaled(self, weights, group):
        """Their gradients with weight decay, each in proportion to its weight's norm."""
        grads, decay = [w.grad for w in weights], group["weight_decay"]
        w_norm, g_norm = (torch.stack(torch._foreach_norm(part)) for part in (weights, grads))
        scale = group["trust_coefficient"] * w_norm / (g_norm + decay * w_norm + 1e-8)  # (n,)
        scale = torch.where(w_norm > 0, scale * (g_norm > 0), 1.0)
        return torch._foreach_mul(torch._foreach_add(grads, weights, alpha=decay), scale.unbind())


_OPTIMIZERS = {"lars": partial(LARS, momentum=0.9), "adamw": torch.optim.AdamW}
_OPTIMIZERS["sgd"] = partial(torch.optim.SGD, momentum=0.9, nesterov=True)


def make_optimizer(model, args):
    """The optimizer of args.optimizer, its learning rate 0 until train() sets it before each step;
    no weight decay for BN (OPT:41)."""
    plain = {p for norm in _norms(model) for p in norm.parameters()}
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [{"params": [p for p in trained if p not in plain]}]
    groups += [{"params": [p for p in trained if p in plain], "weight_decay": 0.0}]
    return _OPTIMIZERS[args.optimizer](groups, lr=0.0, weight_decay=args.weight_decay)


def _peak(args):
    """--lr, which is for 64 videos of 2 views (in an evaluation, of 1), for the views of a step."""
    return args.lr * args.batch_size / 64 * max(1, args.views / 2)


def learning_rate(args, epoch):
    """At a fractional epoch: half a cosine over the run, or a tenth after each of args.lr_steps if
    they are not 0; before that a line from 0.001 of what it meets (LRP:9, from 0.001)."""
    peak, steps = _peak(args), getattr(args, "lr_steps", (0.0,))
    then = max(epoch, args.warmup_epochs)
    high = peak * 0.5 * (1 + math.cos(math.pi * then / args.epochs))
    if any(steps):
        high = peak * 0.1 ** sum(then >= step for step in steps)
    warm = 1 if epoch >= args.warmup_epochs else 0.001 + 0.999 * epoch / args.warmup_epochs
    return high * warm


# --- evaluation


def evaluate(args, videos, network, clips, crops=1, which=None):
    """Call a network, in the mode that it is in, on each video's test views, (clips * crops, 3, T,
    H, W); it returns one tensor of any shape.
    Clips start at 0, 1/clips, ... of the last possible start (KIN:217), or where the function
    clips(duration, span) says; crops lie evenly along the long side; crops = 0: the whole picture,
    and the network gets its boxes (M, 4) in pixels too. which: numbers of videos, all by default.
    Each is read once, on one rank. Returns, on every rank, rows (n, ...) float32 on the CPU and why
    videos could not be read: that ends the run if args.allow_missing is False, else it is NaN."""
    which = range(len(videos)) if which is None else which
    views = partial(_test_views, args, videos, clips, crops)
    rows, problems = {}, []
    for i, x, problem in _load(args, videos, which[rank() :: world_size()], views):
        if problem:
            problems.append(problem)
            if not getattr(args, "allow_missing", True):
                fail(f"{problem}; --allow-missing leaves such videos out")
            continue
        x = (x.to(device()) / 255 - _MEAN) / _STD
        with torch.no_grad(), autocast():
            more = [] if crops else [_boxes(videos, i, *x.shape[-2:]).to(x)]
            x = x.contiguous(memory_format=torch.channels_last_3d)
            rows[i] = network(x, *more).float().cpu()
    parts = [(rows, problems)] * world_size()
    if world_size() > 1:
        dist.all_gather_object(parts, (rows, problems))
    rows = {i: row for part, _ in parts for i, row in part.items()}
    problems = [problem for _, part in parts for problem in part]
    if not rows:
        fail(f"none of {len(which)} videos can be read; the first: {problems[0]}")
    nothing = torch.full_like(next(iter(rows.values())), math.nan)
    return torch.stack([rows.get(i, nothing) for i in which]), problems


def _test_views(args, videos, clips, crops, i):
    size, span = getattr(args, "test_size", args.size), args.frames * args.stride / 30
    try:
        with VideoReader(videos[i], size) as reader:
            if callable(clips):
                starts = np.array(clips(reader.duration, span, **_moment(videos, i)))
            else:
                starts = np.arange(clips) / clips * max(0, reader.duration - span)
            x = reader.read(_frame_times(starts, args.frames, args.stride))
    except ValueError as error:
        return i, None, str(error)
    x = torch.from_numpy(x.copy()).permute(0, 4, 1, 2, 3)  # (clips, 3, T, H, W)
    long = 3 if x.shape[3] > x.shape[4] else 4
    at = np.linspace(0, 1, crops) if crops > 1 else [0.5]
    cuts = [x.narrow(long, round(share * (x.shape[long] - size)), size) for share in at]
    return i, torch.cat(cuts) if crops else x, None


def knn(bank, bank_labels, queries, labels, k=20, temperature=0.07):
    """Percent of queries (m, D) whose label wins a vote of the k nearest of a bank (n, D): cosine
    similarity s, weight exp(s / temperature). Labels (n,), (m,) are integers from 0."""
    bank, right = F.normalize(bank, dim=-1), 0
    for part, label in zip(F.normalize(queries, dim=-1).split(256), labels.split(256), strict=True):
        near, index = (part @ bank.T).topk(min(k, len(bank)), dim=-1)  # (256, k)
        votes = torch.zeros(len(part), int(bank_labels.max()) + 1)
        votes.scatter_add_(1, bank_labels[index], (near / temperature).exp())
        right += (votes.argmax(-1) == label).sum().item()
    return 100 * right / len(queries)


def _held_out(videos):
    """[(videos, numbers)] of a bank and of queries for kNN, at most 4000 and 1000 of them; queries
    are of the sibling folder `val` of a folder `train`, else every fifth labelled video."""
    root, labelled = Path(videos.root), np.flatnonzero(videos.labels >= 0)
    fifth = np.arange(len(labelled)) % 5 == 0
    parts = [(videos, labelled[~fifth], 4000), (videos, labelled[fifth], 1000)]
    if root.name == "train" and (beside := root.with_name("val")).is_dir():
        known = [(beside / v, label) for v, label in _rows(beside, "") if label in videos.classes]
        if known:
            val = Videos(known, videos.classes)
            parts = [(videos, labelled, 4000), (val, np.arange(len(val)), 1000)]
    if not all(len(numbers) for _, numbers, _ in parts):
        say("WARN no labels (class folders, or lines of path<TAB>label): no kNN accuracy")
        return []
    return [(v, numbers[:: math.ceil(len(numbers) / most)]) for v, numbers, most in parts]


def autocast():
    """bfloat16 on CUDA, float32 on a CPU (where bfloat16 is slow)."""
    return torch.autocast(device().type, torch.bfloat16, enabled=device().type == "cuda")


def _load(args, videos, numbers, make):
    """Yield make(number) of each number, made by worker processes; one that dies ends the run."""
    how = dict(num_workers=args.workers, timeout=600 if args.workers else 0)
    how |= dict(worker_init_fn=_quiet, pin_memory=device().type == "cuda")
    batches = iter(DataLoader(numbers, batch_size=None, collate_fn=make, **how))

    def end(error):
        last = ", ".join(videos[i] for i in videos.reading.tolist() if i >= 0)
        fail(f"{str(error).strip()}; the workers were at {last}", code=1)

    def check(*_):  # in place of torch's handler, which raises wherever this process is
        try:
            torch._C._error_if_any_worker_fails()
        except RuntimeError as error:
            end(error)

    if args.workers:
        signal.signal(signal.SIGCHLD, check)
    try:
        yield from batches
    except (RuntimeError, OSError, EOFError) as error:
        time.sleep(1 if args.workers else 0)  # if one has died, its signal ends the run now
        if "DataLoader timed out" in str(error):
            end(error)
        raise


# --- loop


class _Run:
    """A training run as a script sees it, one step after the other.
    clips: (B, V, 3, T, H, W) float32; labels: (B,), -1 for none; starts: (B, V) or (B, V, T)
    seconds; boxes: (B, V, M, 4); epoch: fractional, before the step; ends_epoch: the step does;
    progress: the share of the run that is over after it, 1 at the last."""

    autocast = staticmethod(autocast)

    def __init__(self, args, videos, model, optimizer, chance):
        self.args, self.videos, self.chance = args, videos, chance
        self.model, self.optimizer, self.rest = model, optimizer, _operators(args)[1]
        self.held_out = _held_out(videos) if getattr(args, "knn_every", 0) else []
        self.steps_per_epoch = len(videos) // args.batch_size
        self.total = args.epochs * self.steps_per_epoch
        self.last = min(self.total, args.max_steps or self.total)
        self.number, self.logged, self.file = 0, 0, None  # of steps, also when last logged; the log
        self.skipped = self.in_a_row = 0  # steps that were not finite
        self.bad, self.losses = [], []  # reasons of bad videos; since the last line of the log
        self.lines, self.warned = [], set()  # (loss / chance, std, wait) of each; warnings said
        self.waited, self.since, self.saved = 0.0, time.monotonic(), time.monotonic()
        self.asked = self.stop = False  # by a signal to this rank; agreed by all
        self.statistics = [b for norm in _norms(model) for b in norm.buffers()]
        self.before = [b.clone() for b in self.statistics]

    def announce(self):
        args, ranks = self.args, world_size()
        n, views, reached = args.batch_size, args.views, learning_rate(args, args.warmup_epochs)
        say(f"batch: {n} videos = {ranks} x {n // ranks}, {views} views each")
        words = f"{args.lr:g} x {n} videos x {views} views / {64 * min(2, views)}"
        say(f"lr: {words} = {_peak(args):g}; {reached:g} when warm-up ends")
        say(f"chance level of the loss: {self.chance:.4f}")

    def begin(self, batches):
        """Take the next batch; the time until it is there counts as waiting for data."""
        begun = time.monotonic()
        views, seeds, starts, boxes, numbers, bad = next(batches)
        self.waited += time.monotonic() - begun
        self.note(bad)
        if views is None or len(bad) > max(10, len(views)):
            fail(f"most videos cannot be read; the first: {self.bad[0]}")
        self.numbers, self.starts, self.boxes = numbers, starts, boxes
        views = views.to(device(), non_blocking=True)
        self.clips = views if views.is_floating_point() else _augment(views, seeds, self.rest)
        self.labels = torch.from_numpy(self.videos.labels)[numbers].to(device())
        self.epoch = self.number / self.steps_per_epoch
        self.progress = (self.number + 1) / self.total
        self.ends_epoch = (self.number + 1) % self.steps_per_epoch == 0
        self.lr = learning_rate(self.args, self.epoch)
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr
        _copy(self.before, self.statistics)
        rng = np.random.default_rng((self.args.seed, self.number, rank()))
        torch.manual_seed(int(rng.integers(2**62)))  # of dropout

    def note(self, bad, what="another takes its place"):
        """Name each bad video once."""
        for reason in dict.fromkeys(bad):
            if reason not in self.bad:
                print(f"WARN bad video, {what}: {reason}", file=sys.stderr, flush=True)
                self.bad.append(reason)

    def update(self, loss, features, **more):
        """The optimizer's step, if loss and gradients are finite on all ranks; else gradients and
        BN statistics are put back. features: (B, V, D) and more (numbers) are for the log. Returns
        whether the step was taken."""
        weights = [w for group in self.optimizer.param_groups for w in group["params"]]
        norm = nn.utils.get_total_norm([w.grad for w in weights if w.grad is not None])
        loss = loss.detach()
        unfit = (~torch.isfinite(norm + loss)).float()
        report = torch.stack([unfit, torch.full_like(loss, self.asked), loss / world_size()])
        if world_size() > 1:
            dist.all_reduce(report)
        unfit, stop, loss = report.tolist()  # the one time that a step waits for the GPU
        self.stop = stop > 0  # on all ranks after the same step
        self.features, self.more = features.detach(), more
        if unfit:
            _copy(self.statistics, self.before)
            self.skipped, self.in_a_row = self.skipped + 1, self.in_a_row + 1
            names = ", ".join(self.videos[int(i)] for i in self.numbers[:3])
            say(f"WARN step {self.number + 1} is not finite, all is put back; it had {names} ...")
            if self.in_a_row == 10:
                fail("10 such steps in a row; a smaller --lr may help", code=1)
        else:
            self.losses, self.in_a_row = [*self.losses, loss], 0
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return not unfit

    def end(self):
        self.number += 1
        epochs, part = divmod(self.number, self.steps_per_epoch)
        if world_size() > 1 and not part:  # what is saved and evaluated is rank 0's
            for buffer in self.statistics:
                dist.broadcast(buffer, 0)
            each = [None] * world_size()
            dist.all_gather_object(each, self.bad)
            self.bad = list(dict.fromkeys(sum(each, [])))
        over = not part or self.stop or self.number == self.last
        over |= time.monotonic() - self.saved > 600
        if over and not _finite(self.model.state_dict(), self.optimizer.state_dict()):
            fail(f"step {self.number}: weights are not finite; a smaller --lr may help", code=1)
        every = self.args.knn_every if self.held_out else 0
        if every and not part and (epochs % every == 0 or self.number == self.total):
            self.log(knn_top1=self.monitor())
        elif self.number % self.args.log_every == 0 or self.number == self.total:
            self.log()
        if over:
            self.save()
        if self.number == self.last and self.losses:
            self.log()  # part of an interval; a resume cuts it off, and writes the whole one

    def log(self, **more):
        """A line of JSON, the same on the screen, and a warning if a number looks wrong."""
        unit = F.normalize(self.features.float(), dim=-1).flatten(0, 1)  # (B * V, D)
        spread = unit.std(dim=0).mean().item() * unit.shape[1] ** 0.5
        seconds, steps = time.monotonic() - self.since, self.number - self.logged
        loss = sum(self.losses) / len(self.losses) if self.losses else math.nan
        wait = min(1.0, self.waited / seconds)
        entry = {"step": self.number, "epoch": self.number / self.steps_per_epoch, "loss": loss}
        entry |= {"chance": self.chance, "lr": self.lr, "feature_std": spread, **self.more, **more}
        entry |= {"bad_videos": len(self.bad), "skipped_steps": self.skipped, "data_wait": wait}
        entry |= {"videos_per_second": steps * self.args.batch_size / seconds}
        rounded = {k: float(f"{v:.5g}") for k, v in entry.items() if isinstance(v, float)}
        entry |= {k: v if math.isfinite(v) else None for k, v in rounded.items()}  # JSON has no NaN
        line = json.dumps(entry).encode() + b"\n"
        if self.file and self.file.write(line) < len(line):
            raise OSError(28, "No space left on device", "log.jsonl")
        say(json.dumps(entry))
        self.lines.append((loss / max(self.chance, 1e-9), spread, wait))
        self.losses, self.waited, self.since = [], 0.0, time.monotonic()
        self.logged = self.number
        self.warn(*zip(*self.lines[-15:], strict=True))

    def warn(self, ratios, spreads, waits):
        trained = "rho" in self.args and self.epoch > self.args.warmup_epochs  # alike when young
        for true, words in [
            (trained and max(spreads[-3:]) < 0.2, "collapsed: all videos get the same features"),
            (trained and len(ratios) == 15 and min(ratios) > 0.98, "the loss stays at chance"),
            (min(waits[-3:]) > 0.3, "waiting for data: more --workers or smaller videos help"),
        ]:
            if true and len(self.lines) > 2 and words not in self.warned:
                self.warned.add(words)
                say(f"WARN {words} (see the README)")

    def monitor(self):
        """kNN accuracy of the backbone, in percent; see _held_out."""
        network = self.model.encoder.backbone.eval()
        begun, sides = time.monotonic(), []
        for videos, which in self.held_out:
            rows, bad = evaluate(self.args, videos, network, clips=2, which=which)
            self.note(bad if rank() == 0 else [], "left out")
            rows = rows.mean(1)  # (n, D): the views are averaged
            read = rows.isfinite().all(-1)
            sides += [rows[read], torch.from_numpy(videos.labels)[which][read]]
        network.train(self.model.training)
        self.since += time.monotonic() - begun  # which is not the speed of training
        return knn(*sides)

    def save(self):
        """last.pth, all that a resume needs, and backbone.pth, what others load. Rank 0 writes."""
        self.saved = time.monotonic()
        if rank() > 0:
            return
        net, path = self.model.encoder.backbone, f"{self.args.out}/"
        state = {name: tensor.cpu() for name, tensor in net.state_dict().items()}
        config = {**vars(self.args), "step": self.number, "feature_dim": net.feature_dim}
        config["finished"] = self.number == self.total
        backbone = {"state_dict": state, "config": config}
        write(path + "backbone.pth", partial(torch.save, backbone))
        content = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
        content |= {name: getattr(self, name) for name in ("number", "losses", "skipped", "bad")}
        content |= {"args": vars(self.args), "log_bytes": self.file.tell()}
        write(path + "last.pth", partial(torch.save, content))

    def resume(self):
        """Take the output folder for this run; go on from its last.pth if there is one."""
        path, content = Path(self.args.out, "last.pth"), None
        if rank() == 0:
            try:
                self.file = open(path.with_name("log.jsonl"), "ab", buffering=0)
                fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                content = _read(path) if path.exists() else None
            except BlockingIOError:
                fail(f"{path.parent}: another run writes here")
            except (OSError, ValueError) as error:
                fail(f"{error}; move it away, or choose another --out")
        if world_size() > 1:  # from rank 0: another machine may not see its disk
            box = [content]
            dist.broadcast_object_list(box)
            content = box[0]
        if content is not None:
            try:
                self.restore(path, content)
            except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
                reason = str(error).split("\n")[-1].strip() or error
                fail(f"{path} cannot go on in this run ({reason}); choose another --out")
        if rank() == 0:
            end = content["log_bytes"] if content else 0  # what came after is logged again
            self.file.truncate(self.file.seek(min(end, self.file.tell())))

    def restore(self, path, content):
        free = {*vars(_Flags), "knn_every", "allow_missing", "finished", "code"} - {"seed", "data"}
        for name in sorted(vars(self.args), key=lambda name: name != "method"):
            flag = name.removesuffix("_hash")  # a hash stands for what it is of
            if content["args"].get(name) != vars(self.args)[name] and name not in free:
                both = (values.get(flag) for values in (content["args"], vars(self.args)))
                was, now = ("none" if value in ("", None) else value for value in both)
                words = "which is not what it was" if was == now else f"not {now}"
                flag = flag.replace("_", "-")
                fail(f"{path} was made with --{flag} {was}, {words}; choose another --out")
        if not _finite(content["model"], content["optimizer"]):
            raise ValueError("some of its weights are not finite")
        if not 0 <= content["number"] <= self.total or content["log_bytes"] < 0:
            raise ValueError(f"step {content['number']}, log of {content['log_bytes']} bytes")
        self.model.load_state_dict(content["model"])
        self.optimizer.load_state_dict(content["optimizer"])
        for name in ("number", "losses", "skipped", "bad"):
            setattr(self, name, content[name])
        self.logged = self.number
        say(f"{path}: going on after step {self.number}")
        if content["args"]["code"] != self.args.code:
            say(f"WARN {self.args.method}.py is not what it was when that run began")


def _copy(tensors, sources):
    if tensors:  # a network may have no BN
        torch._foreach_copy_(tensors, sources)


def _finite(model, optimizer):
    """Whether all tensors of two state dicts are."""
    states = [model, *optimizer["state"].values()]
    return all(torch.as_tensor(t).isfinite().all() for state in states for t in state.values())


def train(args, videos, model, optimizer, sample_clips, chance):
    """Yield a run step by step (see _Run): `clips`, `labels`, `epoch`, `progress`, autocast(),
    update(). Owns the rest: order and decoding of the videos, augmentation, learning rate, log,
    checkpoints, resume, signals. chance: the loss of uninformative features."""
    args.finished, run = False, _Run(args, videos, model, optimizer, chance)
    if args.show_views:
        run.begin(_loader(run, sample_clips))
        return _show_views(args, run.clips, run.starts)

    def request_stop(*_):
        run.asked = True

    before = {s: signal.signal(s, request_stop) for s in (signal.SIGTERM, signal.SIGINT)}
    try:
        run.resume()
        run.announce()
        batches, silent = _loader(run, sample_clips), rank() > 0 or not sys.stderr.isatty()
        for _ in tqdm(range(run.number, run.last), args.method, disable=silent):
            run.begin(batches)
            yield run
            run.end()
            if run.stop:
                say(f"stopped after step {run.number}; the same command goes on from there")
                return
    except OSError as error:  # a full disk, say
        fail(f"{error}; {args.out} is as it was last saved", code=1)
    finally:
        if run.file:
            run.file.close()  # another run may have the folder
        for number, handler in before.items():
            signal.signal(number, handler)
    args.finished = run.number == run.total
    say(f"done, {run.number} of {run.total} steps: {args.out}/last.pth")
    if "rho" in args:
        data = f" --data {shlex.quote(args.data)}{' --small' * args.small}" if args.data else ""
        beside = Path(videos.root).absolute().with_name("val")
        if args.data and not (os.path.isdir(args.data) and beside.is_dir()):
            data += " --val TEST_VIDEOS"
        say(f"evaluate: python eval_linear.py --weights {shlex.quote(args.out)}/backbone.pth{data}")


def _loader(run, sample_clips):
    """The batches from step run.number on."""
    batch = partial(_batch, run.args, run.videos, sample_clips, device().type == "cpu")
    return _load(run.args, run.videos, range(run.number, run.last), batch)
