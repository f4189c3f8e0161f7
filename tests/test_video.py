"""common.read_clips: the right frames of real files, from anywhere in them, at a bounded cost.

Every file is written here and shows a frame counter. What is right comes from a reference that
shares no code with the reader: the file is decoded once from its first to its last frame, and the
rule of the contract is applied to that list.
"""

import contextlib
import math
import os
import time
from fractions import Fraction
from types import SimpleNamespace

import av
import numpy as np
import pytest

import common
from common import VideoReader
from videos import LIGHT, counter_picture, make_video, read_counter, read_counters

NTSC = Fraction(30000, 1001)
TOLERANCE = Fraction(1, 1000)
EDGE = Fraction(1, 10**6)  # nearer than this to the limit, rounding may decide either way


# --- files


def jitter(n, seed, smallest=0.004, largest=0.12):
    """Irregular times (n of them, seconds)."""
    gaps = np.random.default_rng(seed).uniform(smallest, largest, n - 1)
    return [0.0, *np.cumsum(gaps).round(4)]


def x264(**params):
    """Codec options that replace the default x264 parameters."""
    pairs = {"scenecut": 0, "threads": 1} | params
    return {"x264-params": ":".join(f"{k.replace('_', '-')}={v}" for k, v in pairs.items())}


LIVE = {"live": "1"}
NO_SHIFT = {"avoid_negative_ts": "disabled"}

CONSTANT = {  # every frame i shows i and lies at i / fps
    "mp4.mp4": dict(n=75),
    "mkv.mkv": dict(n=75),
    "mov.mov": dict(n=75),
    "vp9.webm": dict(n=75, codec="libvpx-vp9"),
    "vp8.webm": dict(n=75, codec="libvpx"),
    "mpeg4.avi": dict(n=75, codec="mpeg4"),
    "mpeg4-b.avi": dict(n=75, codec="mpeg4", bframes=2),
    "mjpeg.avi": dict(n=40, codec="mjpeg", pix_fmt="yuvj420p"),
    "mpegts.ts": dict(n=75, bframes=2),
    "fragmented.mp4": dict(n=75, container_options={"movflags": "frag_keyframe+empty_moov"}),
    "portrait.mp4": dict(n=40, size=(64, 96)),
    "rotated-90.mp4": dict(n=40, rotation=90),
    "rotated-180.mp4": dict(n=40, rotation=180),
    "rotated-270.mp4": dict(n=40, rotation=270),
    "rotated-portrait.mp4": dict(n=40, rotation=90, size=(64, 96)),
    "rotated.mkv": dict(n=40, rotation=270),
    "one-frame.mp4": dict(n=1),
    "one-frame.mkv": dict(n=1),
    "one-frame.webm": dict(n=1, codec="libvpx"),
    "two-frames.mp4": dict(n=2),
    "two-frames.avi": dict(n=2, codec="mpeg4"),
    "0.1-seconds.mp4": dict(n=3),
    "0.2-seconds.mkv": dict(n=6, bframes=2),
    "0.3-seconds.avi": dict(n=7, fps=24, codec="mpeg4"),
    "b-frames.mp4": dict(n=90, bframes=3),
    "b-frames.mkv": dict(n=90, bframes=3, gop=250),
    "long-gop.mp4": dict(n=300, gop=250),
    "intra.mp4": dict(n=60, gop=1),
    "hevc.mp4": dict(n=300, codec="libx265", gop=250),
    "hevc-open-gop.mp4": dict(n=300, codec="libx265", gop=15, bframes=3),
    "hevc-open-gop.mkv": dict(n=300, codec="libx265", gop=15, bframes=3),
    "h264-open-gop.mp4": dict(n=300, gop=15, bframes=3, codec_options=x264(open_gop=1)),
    "h264-open-gop.mkv": dict(n=300, gop=15, bframes=3, codec_options=x264(open_gop=1)),
    "h264-open-gop.ts": dict(n=300, gop=15, bframes=3, codec_options=x264(open_gop=1)),
    "10-fps.mp4": dict(n=40, fps=10),
    "24-fps.mkv": dict(n=60, fps=24),
    "25-fps.avi": dict(n=60, fps=25, codec="mpeg4"),
    "29.97-fps.mp4": dict(n=90, fps=NTSC),
    "29.97-fps.webm": dict(n=90, fps=NTSC, codec="libvpx"),
    "60-fps.mp4": dict(n=150, fps=60, bframes=2),
    "60-fps.mkv": dict(n=150, fps=60, gop=30),
    "240-fps.mp4": dict(n=240, fps=240, gop=30),
    "240-fps.mkv": dict(n=240, fps=240, gop=30),
    "starts-at-5.mp4": dict(n=75, offset=5, bframes=2),
    "starts-at-5.mkv": dict(n=75, offset=5),
    "starts-at-5.webm": dict(n=75, offset=5, codec="libvpx-vp9"),
    "starts-at-5.ts": dict(n=75, offset=5, bframes=2),
    "starts-at-5-long.mkv": dict(n=400, offset=5, gop=20, bframes=2),
    "starts-at-minus-1.ts": dict(n=75, offset=-1, container_options=NO_SHIFT),
    "live.webm": dict(n=75, codec="libvpx", container_options=LIVE),
    "live.mkv": dict(n=300, bframes=2, container_options=LIVE),
    "live-starts-at-5.mkv": dict(n=75, offset=5, container_options=LIVE),
    "one-key-frame.ts": dict(n=120, gop=250, bframes=2),
    "one-key-frame.webm": dict(n=120, gop=250, codec="libvpx"),
    "one-key-frame.avi": dict(n=120, gop=250, bframes=2, codec="mpeg4"),
    "key-frames.ts": dict(n=300, gop=30, bframes=2),
    "program.mpg": dict(n=300, gop=15, bframes=2, codec="mpeg2video"),
    "flash.flv": dict(n=150),
    "windows.wmv": dict(n=150, codec="wmv2"),
    "yuv444-odd.mp4": dict(n=40, pix_fmt="yuv444p", size=(97, 65)),
    "gray.mp4": dict(n=40, pix_fmt="gray"),
    "10-bit.mp4": dict(n=40, pix_fmt="yuv420p10le"),
    "10-bit-hevc.mkv": dict(n=40, codec="libx265", pix_fmt="yuv420p10le"),
    "odd.webm": dict(n=40, codec="libvpx-vp9", size=(95, 63)),
    "odd.avi": dict(n=40, codec="mpeg4", size=(99, 67)),
    "rgb.mkv": dict(n=20, codec="ffv1", pix_fmt="bgr0"),
    "av1.mp4": dict(n=40, codec="libsvtav1"),
    "av1.webm": dict(n=40, codec="libsvtav1"),
    "10-bit-av1.mkv": dict(n=40, codec="libsvtav1", pix_fmt="yuv420p10le"),
    "12-bit-yuv444.mp4": dict(n=20, codec="libx265", pix_fmt="yuv444p12le"),
    "16-bit-gray.mkv": dict(n=20, codec="ffv1", pix_fmt="gray16le"),
    "alpha.webm": dict(n=40, codec="libvpx-vp9", pix_fmt="yuva420p"),
    "alpha.mkv": dict(n=20, codec="ffv1", pix_fmt="bgra"),
    "alpha-prores.mov": dict(n=20, codec="prores_ks", pix_fmt="yuva444p10le"),
    "alpha-animation.mov": dict(n=20, codec="qtrle", pix_fmt="argb"),
    "interlaced.ts": dict(n=60, bframes=2, codec_options=x264(tff=1)),
    "interlaced.mp4": dict(n=60, codec_options=x264(tff=1)),
    "interlaced.mpg": dict(n=60, codec="mpeg2video", codec_options={"flags": "+ilme+ildct"}),
    "starts-after-12-days.mkv": dict(n=60, offset=10**6, bframes=2),
    "starts-after-12-days.mp4": dict(n=60, offset=10**6),
    "time-stamps-wrap-after-26-hours.ts": dict(n=90, offset=95442),
}
NO_DURATION = ["live.webm", "live.mkv", "live-starts-at-5.mkv"]
# Key frames that frames before them still need: after a seek those cannot be decoded.
OPEN_GOP = [name for name in CONSTANT if "open-gop" in name] + ["hevc.mp4"]
SEEKING = ["b-frames.mkv", "starts-at-5-long.mkv", "live.mkv", "key-frames.ts", "program.mpg"]
SEEKING += ["one-key-frame.ts", "one-key-frame.webm", "one-key-frame.avi", "flash.flv"]

HUGE_JUMP = [i / 30 + (9e4 if i > 30 else 0) for i in range(60)]
VARIABLE = {
    "variable.mp4": dict(pts=jitter(80, 1)),
    "variable-b.mp4": dict(pts=jitter(80, 2), bframes=3),  # its header says a wrong duration
    "variable.mkv": dict(pts=jitter(80, 3), bframes=2, gop=20),
    "variable.webm": dict(pts=jitter(80, 4), codec="libvpx-vp9"),
    "variable.ts": dict(pts=jitter(80, 5)),
    "variable-fast.mkv": dict(pts=jitter(200, 6, 0.001, 0.02)),
    "variable-late.mp4": dict(pts=jitter(80, 7), offset=2),
    "pause.mp4": dict(pts=[0, 0.1, 0.2, 4.0, 4.1, 9.0]),
    "pause.mkv": dict(pts=[0, 0.1, 0.2, 4.0, 4.1, 9.0], gop=2),
    "huge-jump.mp4": dict(pts=HUGE_JUMP),
    "huge-jump.mkv": dict(pts=HUGE_JUMP),
    "huge-jump.ts": dict(pts=HUGE_JUMP),
}

LONG = {  # 3 to 4 minutes
    "long-gop-30.mp4": dict(n=5400, fps=30, gop=30, size=(48, 32)),
    "long-gop-250.mkv": dict(n=3600, fps=15, gop=250, bframes=2, size=(48, 32)),
}
SHORT = {  # the same, 20 seconds
    "short-gop-30.mp4": LONG["long-gop-30.mp4"] | dict(n=600),
    "short-gop-250.mkv": LONG["long-gop-250.mkv"] | dict(n=600),
}


def cut_at_60_percent(path, **options):
    """A file whose last 40 % are missing."""
    make_video(path, **options)
    with open(path, "r+b") as file:
        file.truncate(os.path.getsize(path) * 6 // 10)


def two_resolutions_ts(path, sizes):
    """Two transport streams, one after the other; the frames go on counting."""
    with open(path, "wb") as whole:
        for part, size in enumerate(sizes):
            piece = f"{path}.{part}.ts"
            make_video(
                piece, n=60, size=size, offset=2 * part, counters=range(60 * part, 60 * part + 60)
            )
            with open(piece, "rb") as file:
                whole.write(file.read())


def two_resolutions_webm(path, sizes):
    """One VP8 stream that is encoded at one size and then at another."""
    with av.open(path, "w") as out:
        stream = out.add_stream("libvpx", rate=30, options={"deadline": "realtime"})
        stream.width, stream.height = sizes[0]
        stream.codec_context.time_base = Fraction(1, 30)
        for part, (width, height) in enumerate(sizes):
            encoder = stream.codec_context
            if part:
                encoder = av.CodecContext.create("libvpx", "w")
                encoder.width, encoder.height, encoder.pix_fmt = width, height, "yuv420p"
                encoder.time_base, encoder.options = Fraction(1, 30), {"deadline": "realtime"}
            frames = []
            for i in range(60 * part, 60 * part + 60):
                picture = counter_picture(i, width, height)
                frame = av.VideoFrame.from_ndarray(picture, "rgb24").reformat(format="yuv420p")
                frame.pts, frame.time_base = i, Fraction(1, 30)
                frames.append(frame)
            for frame in [*frames, None]:
                for packet in encoder.encode(frame):
                    packet.stream = stream
                    out.mux(packet)


def with_audio(path, seconds=4.0):
    """A sound track first, longer than the two seconds of video."""
    with av.open(path, "w") as out:
        sound = out.add_stream("aac", rate=16000, layout="mono")
        video = out.add_stream("libx264", rate=30, options={"preset": "ultrafast"})
        video.width, video.height, video.codec_context.gop_size = 96, 64, 12
        for i in range(60):
            picture = counter_picture(i, 96, 64)
            frame = av.VideoFrame.from_ndarray(picture, "rgb24").reformat(format="yuv420p")
            frame.pts, frame.time_base = i, Fraction(1, 30)
            out.mux(video.encode(frame))
        out.mux(video.encode(None))
        _encode_silence(out, sound, seconds)


def audio_only(path):
    """A sound track and nothing else."""
    with av.open(path, "w") as out:
        _encode_silence(out, out.add_stream("aac", rate=16000, layout="mono"), 1.0)


def damaged(path, options, change):
    """A file whose bytes were changed by a function of them."""
    make_video(path, **options)
    with open(path, "r+b") as file:
        data = bytearray(file.read())
        change(data)
        file.seek(0)
        file.write(data)


def repeat_time_stamps(data):
    """Matroska: frames 20 to 24 of 30 fps get the time stamp of frame 19."""
    for frame in range(20, 25):
        old, new = (b"\x81" + round(i * 1000 / 30).to_bytes(2, "big") for i in (frame, 19))
        places = [data.index(old + flag) for flag in (b"\0", b"\x80") if old + flag in data]
        assert len(places) == 1
        data[places[0] : places[0] + 3] = new


def wreck_index(start, skip, length):
    """Overwrite an index with noise: so many bytes, so far after its last name in the file."""

    def change(data):
        place = data.rindex(start) + skip
        data[place : place + length] = np.random.default_rng(0).bytes(length)

    return change


def _encode_silence(out, sound, seconds):
    for i in range(int(seconds * 16000) // 1024):
        silence = np.zeros((1, 1024), np.float32)
        frame = av.AudioFrame.from_ndarray(silence, format="fltp", layout="mono")
        frame.sample_rate, frame.pts, frame.time_base = 16000, 1024 * i, Fraction(1, 16000)
        out.mux(sound.encode(frame))
    out.mux(sound.encode(None))


SPECIAL = {
    "cut.mkv": lambda path: cut_at_60_percent(path, n=300),
    "cut-live.mkv": lambda path: cut_at_60_percent(path, n=300, container_options=LIVE),
    "cut.webm": lambda path: cut_at_60_percent(path, n=300, codec="libvpx"),
    "cut.ts": lambda path: cut_at_60_percent(path, n=300, bframes=2),
    "cut-index-first.mp4": lambda path: cut_at_60_percent(
        path, n=300, container_options={"movflags": "faststart"}
    ),
    "smaller-then-larger.ts": lambda path: two_resolutions_ts(path, [(48, 32), (96, 64)]),
    "larger-then-smaller.ts": lambda path: two_resolutions_ts(path, [(96, 64), (60, 44)]),
    "larger-then-smaller.webm": lambda path: two_resolutions_webm(path, [(96, 64), (60, 44)]),
    "with-audio.mp4": with_audio,
    "with-audio.mkv": with_audio,
    "repeated.mkv": lambda path: damaged(path, dict(n=60, gop=60), repeat_time_stamps),
    "no-cues.mkv": lambda path: damaged(path, dict(n=300), wreck_index(b"\x1c\x53\xbb\x6b", 0, 40)),
    "noise-in-cues.mkv": lambda path: damaged(
        path, dict(n=300), wreck_index(b"\x1c\x53\xbb\x6b", 12, 200)
    ),
    "no-index.avi": lambda path: damaged(
        path, dict(n=300, codec="mpeg4"), wreck_index(b"idx1", 0, 400)
    ),
    "noise-in-key-frames.mp4": lambda path: damaged(
        path, dict(n=300), wreck_index(b"stss", 12, 80)
    ),
}
CUT = [name for name in SPECIAL if name.startswith("cut")]
RESIZED = [name for name in SPECIAL if "-then-" in name]
BROKEN_INDEX = [name for name in SPECIAL if name.startswith("no")]
SPECIAL_TIMES = ["with-audio.mp4", "with-audio.mkv", "repeated.mkv"]
UNUSUAL = [n for n in CONSTANT if any(word in n for word in ("av1", "alpha", "interlaced", "-bit"))]
RAW = ["raw.h264", "raw-b.h264", "raw.hevc"]


@pytest.fixture(scope="session")
def video(tmp_path_factory):
    """video(name): the file of that name, written at its first use, and its reference."""
    folder, made = tmp_path_factory.mktemp("videos"), {}
    options = CONSTANT | VARIABLE | LONG | SHORT

    def get(name):
        if name not in made:
            path = str(folder / name)
            if name in SPECIAL:
                SPECIAL[name](path)
            else:
                make_video(path, **options[name])
            known = options[name] if name in LONG else None  # too long to decode here
            made[name] = SimpleNamespace(path=path, frames=reference(path, known))
        return made[name]

    return get


# --- reference


def reference(path, known=None):
    """[(seconds since the first frame, counter)] of all frames, read from first to last.

    known: options of a file whose frame i shows i; it is not decoded, the time stamps are enough.
    """
    found = []
    with av.open(path) as container:
        stream = container.streams.video[0]
        stream.thread_type = "NONE"
        if known:
            found = sorted(packet.pts for packet in container.demux(stream) if packet.size)
            found = [(pts, i) for i, pts in enumerate(found)]
        else:
            for packet in container.demux(stream):
                try:
                    decoded = packet.decode()
                except av.FFmpegError:  # the torn end of a cut file
                    continue
                for frame in decoded:
                    picture = np.rot90(frame.to_ndarray(format="rgb24"), frame.rotation // 90)
                    found.append((frame.pts, read_counter(picture)))
        return [((pts - found[0][0]) * stream.time_base, counter) for pts, counter in found]


def on_display(frames, seconds):
    """What the contract's rule may choose: one counter, or two if rounding decides."""
    seconds = seconds + TOLERANCE
    return {_last_before(frames, seconds - EDGE), _last_before(frames, seconds + EDGE)}


def _last_before(frames, limit):
    low, high = 0, len(frames)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if frames[middle][0] <= limit else (low, middle)
    return frames[low][1]


def check(video, starts, frames, stride, size=None):
    """Read clips, hold every frame against the reference, and return the clips."""
    clips = common.read_clips(video.path, starts, frames, stride, size)
    assert isinstance(clips, np.ndarray) and clips.dtype == np.uint8
    assert clips.ndim == 5 and clips.shape[:2] == (len(starts), frames) and clips.shape[4] == 3
    for start, clip in zip(starts, clips, strict=True):
        for i, counter in enumerate(read_counters(clip)):
            seconds = Fraction(float(start)) + Fraction(i * stride, 30)
            allowed = on_display(video.frames, seconds)
            assert counter in allowed, f"start {start}, frame {i}: {counter}, not {allowed}"
    return clips


def end(video):
    """Time of the last frame."""
    return float(video.frames[-1][0])


# --- which frames


@pytest.mark.parametrize("name", CONSTANT)
def test_helper_writes_what_it_says(video, name):
    """The helper writes n frames that show 0 ... n-1 at i/fps: the reference can be trusted."""
    options = CONSTANT[name]
    times, counters = zip(*video(name).frames, strict=True)
    assert list(counters) == list(range(options["n"]))
    for i, seconds in enumerate(times):
        assert abs(seconds - i / Fraction(options.get("fps", 30))) <= TOLERANCE


@pytest.mark.parametrize("name", UNUSUAL)
def test_helper_writes_unusual_files(video, name):
    """The files that are named after their codec, alpha channel, depth or fields have them."""
    with av.open(video(name).path) as container:
        stream = container.streams.video[0]
        frame = next(container.decode(stream))
        kind = {"av1": stream.codec_context.codec.canonical_name == "av1"}
        kind["alpha"] = any(part.is_alpha for part in stream.codec_context.format.components)
        kind["interlaced"] = frame.interlaced_frame
        kind["bit"] = stream.codec_context.format.components[0].bits > 8
    # a webm's alpha channel is a stream of its own, which FFmpeg's decoder leaves out
    assert all(kind[word] for word in kind if word in name and name != "alpha.webm")


@pytest.mark.parametrize("name", [*CONSTANT, *VARIABLE, *SPECIAL_TIMES, *BROKEN_INDEX])
def test_frames_follow_the_rule(video, name):
    """In every kind of file each frame is the one on display at its time, past the end included."""
    file = video(name)
    last = end(file)
    inside = [last * part for part in (0.62, 0.11, 0.37, 0.93, 0.37)]
    check(file, [0.0, *inside, last, last + 0.02, last + 7], 4, 3)
    check(file, [last * 0.45], 8, 1)
    check(file, [last * 0.8], 3, 8)


@pytest.mark.parametrize("name", [*OPEN_GOP, *SEEKING])
def test_any_start_in_one_read(video, name):
    """Wherever a single clip starts the frames are right, also just before and after key frames,
    where the frames that follow an open key frame in the file need the group before it."""
    file = video(name)
    for start in np.arange(0, end(file), 3.21 / 30):
        check(file, [start], 2, 1)


def test_start_on_between_and_beside_time_stamps(video):
    """A frame is on display from 1 ms before its time stamp until 1 ms before the next one's."""
    file = video("10-fps.mp4")
    for start, counter in [
        (0.0, 0),
        (0.05, 0),
        (0.0985, 0),
        (0.0995, 1),
        (0.1, 1),
        (0.15, 1),
        (0.1985, 1),
        (0.1995, 2),
        (3.8995, 39),
        (3.8985, 38),
    ]:
        clip = common.read_clips(file.path, [start], 1, 1)
        assert read_counters(clip[0]) == [counter], start


def test_tolerance_applies_to_every_frame_of_a_clip(tmp_path):
    """Time stamps that are 0.5 ms late still count, and 1.5 ms late no longer."""
    pts = [0, 0.1, 0.2005, 0.3015, 0.4005, 0.5015]
    path = make_video(tmp_path / "late.mp4", pts=pts)
    clip = common.read_clips(path, [0.0], 7, 3)[0]
    assert read_counters(clip) == [0, 1, 2, 2, 4, 4, 5]


@pytest.mark.parametrize("name", ["mp4.mp4", "mkv.mkv", "vp9.webm", "mpeg4.avi", "mpegts.ts"])
def test_past_the_end_the_last_frame_repeats(video, name):
    """A clip that runs over the end, starts at it or starts long after it, ends in the last one."""
    file = video(name)
    clips = check(file, [end(file) - 0.1, end(file), 1000.0], 8, 2)
    assert read_counters(clips[0])[-3:] == [74] * 3
    assert read_counters(clips[1]) == read_counters(clips[2]) == [74] * 8


@pytest.mark.parametrize("name", ["one-frame.mp4", "two-frames.mp4", "0.1-seconds.mp4"])
def test_shorter_than_a_clip(video, name):
    """A file of 1, 2 or 3 frames yields exactly T frames at the recipe's 8 x 8."""
    clips = check(video(name), [0.0, 0.05, 2.0], 8, 8)
    assert clips.shape == (3, 8, 64, 96, 3)


@pytest.mark.parametrize("name", LONG)
def test_long_file(video, name):
    """Minutes into a file, at random places, at its end and past it, the frames are right."""
    file = video(name)
    last = end(file)
    starts = np.random.default_rng(0).uniform(0, last, 20)
    for start in [*starts[:12], 0.0, last - 1.0, last, last + 3, last + 10000]:
        check(file, [start], 4, 4)
    check(file, starts, 3, 5)


@pytest.mark.parametrize(
    "name", ["long-gop-30.mp4", "variable.mkv", "h264-open-gop.mkv", "live.webm"]
)
def test_order_of_starts_is_kept(video, name):
    """Unsorted, overlapping and equal clips come in the order asked for, each as if read alone."""
    file = video(name)
    starts = [end(file) * part for part in (0.7, 0.1, 0.72, 0.1, 1.1, 0.0, 0.69)]
    clips = check(file, starts, 6, 4)
    for start, clip in zip(starts, clips, strict=True):
        assert (common.read_clips(file.path, [start], 6, 4)[0] == clip).all(), start
    turned = common.read_clips(file.path, starts[::-1], 6, 4)
    assert (turned[::-1] == clips).all()


@pytest.mark.parametrize("stride", [1, 2, 8])
def test_30_and_60_fps_show_the_same_moments(tmp_path_factory, stride):
    """Two encodes of one scene at 30 and at 60 fps show the same moments: time rules."""
    folder = tmp_path_factory.mktemp("scene")
    slow = make_video(folder / "30.mp4", n=60, fps=30, counters=range(0, 120, 2))
    fast = make_video(folder / "60.mp4", n=120, fps=60, bframes=2)
    starts = [0.0, 1.3, 0.517, 0.84, 1 / 3, 3.0]
    slow, fast = (common.read_clips(path, starts, 6, stride) for path in (slow, fast))
    for a, b in zip(slow, fast, strict=True):
        assert [n // 2 for n in read_counters(a)] == [n // 2 for n in read_counters(b)]


@pytest.mark.parametrize("name", RAW)
def test_raw_stream_without_time_stamps_is_refused(tmp_path, name):
    """A bare H.264 or HEVC stream has no time stamps: nobody knows what is on display when."""
    codec = "libx265" if "hevc" in name else "libx264"
    path = make_video(tmp_path / name, n=90, codec=codec, bframes=2 if "-b" in name else 0)
    with pytest.raises(ValueError, match="time stamp") as caught:
        VideoReader(path)
    assert str(caught.value).startswith(path)


@pytest.mark.parametrize("name", CUT)
def test_cut_file_is_read_as_far_as_it_goes(video, name):
    """A file that lost its last 40 % gives right frames before the cut and its last frame after."""
    file = video(name)
    assert 120 < len(file.frames) < 240  # of 300: the cut is where it should be
    for start in (0.0, 2.0, end(file) - 0.3, end(file), end(file) + 0.4, 8.0, 9.99, 50.0):
        check(file, [start], 4, 3)
    check(file, [8.0, 1.0, end(file) - 0.2, 3.0], 4, 3)


@pytest.mark.parametrize("name", RESIZED)
def test_resolution_that_changes_on_the_way(video, name):
    """All frames have the first frame's size, wherever the clip starts."""
    file = video(name)
    first = (32, 48) if name.startswith("smaller") else (64, 96)
    assert len(file.frames) == 120
    for starts in ([0.0, 1.5, 1.8, 3.0], [3.0], [2.1], [1.95], [9.0]):
        assert check(file, starts, 6, 3).shape[2:4] == first
        assert check(file, starts, 6, 3, size=16).shape[2:4] == (16, 24)


def pool_of_files(folder, rng):
    """Random short files of all kinds, each with its reference."""
    kinds = [
        ("mp4", "libx264"),
        ("mkv", "libx264"),
        ("ts", "libx264"),
        ("mp4", "libx265"),
        ("mkv", "libx265"),
        ("webm", "libvpx"),
        ("webm", "libvpx-vp9"),
        ("avi", "mpeg4"),
        ("mp4", "mpeg4"),
    ]
    files = []
    for k in range(36):
        ending, codec = kinds[k % len(kinds)]
        n = int(rng.integers(20, 200))
        options = dict(codec=codec, n=n, size=(48, 32) if codec != "libx265" else (96, 64))
        options["fps"] = [10, 24, 25, NTSC, 30, 50, 60, 240][rng.integers(8)]
        options["gop"] = int(rng.choice([1, 5, 12, 30, 250]))
        options["bframes"] = 0 if codec.startswith("libvpx") else int(rng.integers(4))
        if ending != "avi" and rng.random() < 0.4:
            options["pts"] = jitter(n, k)
        if ending in ("mkv", "mp4", "ts") and rng.random() < 0.3:
            options["offset"] = int(rng.integers(1, 20))
        if ending == "mkv" and rng.random() < 0.3:
            options["container_options"] = LIVE
        if ending == "mp4" and rng.random() < 0.3:
            options["rotation"] = int(rng.choice([90, 180, 270]))
        path = make_video(folder / f"{k}.{ending}", **options)
        files.append(SimpleNamespace(path=path, frames=reference(path), options=options))
    return files


def test_random_combinations(tmp_path_factory):
    """200 random choices of file, starts, length, stride and size agree with the reference."""
    rng = np.random.default_rng(2026)
    files = pool_of_files(tmp_path_factory.mktemp("pool"), rng)
    for case in range(200):
        file = files[case % len(files)]
        starts = rng.uniform(0, end(file) * 1.1 + 0.1, rng.integers(1, 6))
        if case % 3 == 0:  # near a time stamp, on either side of the tolerance
            stamp = float(file.frames[rng.integers(len(file.frames))][0])
            starts[0] = max(0.0, stamp + rng.choice([-0.0015, -0.0005, 0.0, 0.0005]))
        frames, stride = int(rng.integers(1, 9)), int(rng.choice([1, 2, 3, 8, 15]))
        size = None if case % 2 else int(rng.integers(24, 64))
        try:
            check(file, starts.tolist(), frames, stride, size)
        except AssertionError as error:
            raise AssertionError(f"case {case}, {file.path}, {file.options}: {error}") from None


# --- the reader


@pytest.mark.parametrize("name", [*CONSTANT, "with-audio.mp4"])
def test_duration(video, name):
    """The video's seconds, counted from its first frame whatever the header says (or does not
    say); asking for them changes nothing that is read."""
    file = video(name)
    with VideoReader(file.path) as reader:
        duration = reader.duration
        pictures = reader.read([duration / 2, 0.0])
    fps = float(CONSTANT.get(name, {}).get("fps", 30))
    assert isinstance(duration, float)
    slack = 0.5 if name.endswith(".mpg") else 0.01  # it has a time stamp only now and then
    assert abs(duration - len(file.frames) / fps) <= 1.5 / fps + slack
    assert (pictures == check(file, [duration / 2, 0.0], 1, 1)[:, 0]).all()


@pytest.mark.parametrize("name", [*VARIABLE, *CUT])
def test_duration_is_usable_where_the_header_lies(video, name):
    """With a variable rate or a cut file the duration is finite, and not below 0."""
    with VideoReader(video(name).path) as reader:
        assert math.isfinite(reader.duration) and reader.duration >= 0


@pytest.mark.parametrize(
    "name", ["b-frames.mp4", "live.mkv", "key-frames.ts", "program.mpg", "mpeg4-b.avi", "cut.ts"]
)
def test_a_reader_reads_again(video, name):
    """Whatever was read before, forward or back, a reader gives what a new one gives, of no, one or
    several times in any order."""
    file, rng = video(name), np.random.default_rng(5)
    with VideoReader(file.path, short_side=32) as reader:
        for n in (3, 8, 1, 0, 5):
            times = rng.uniform(0, end(file) + 0.5, n)
            pictures = reader.read(times)
            assert pictures.shape == (n, 32, 48, 3)
            assert pictures.dtype == np.uint8
            for time, picture in zip(times, pictures, strict=True):
                assert (picture == common.read_clips(file.path, [time], 1, 1, 32)[0, 0]).all()


# --- frames that are not decoded

PYRAMIDS = ["none", "strict", "normal"]


def noise_in_motion(counter, width, height):
    """A picture of which every frame differs from its neighbours everywhere, but can be predicted
    from them: a wrong or missing reference shows."""
    still = np.random.default_rng(0).integers(0, 256, (height + 64, width + 64, 3), np.uint8)
    new = np.random.default_rng(counter).integers(0, 60, (height, width, 3), np.uint8)
    x, y = counter * 3 % 64, counter * 2 % 64
    return still[y : y + height, x : x + width] // 2 + new


def whole_file(path, short_side):
    """[(seconds since the first frame, picture)] of all frames: nothing is sought or skipped."""
    found, converter = [], av.video.reformatter.VideoReformatter()
    with av.open(path) as container:
        stream = container.streams.video[0]
        stream.thread_type = "NONE"
        for packet in container.demux(stream):
            decoded = []
            with contextlib.suppress(av.FFmpegError):  # a damaged packet
                decoded = packet.decode()
            for frame in decoded:
                size = frame.width * short_side // frame.height, short_side
                picture = converter.reformat(frame, *size, "rgb24", threads=1).to_ndarray()
                found.append((frame.pts, picture))
        return [((pts - found[0][0]) * stream.time_base, picture) for pts, picture in found]


class Skipping(VideoReader):
    """Counts the frames that are decoded."""

    decoded = 0

    def _decode(self):
        for frame in super()._decode():
            self.decoded += 1
            yield frame


class Plain(Skipping):
    """Decodes all frames."""

    def _packets(self):
        self._sure = False
        yield from super()._packets()


def compare_with_whole_file(path, rng, rounds=4):
    """Clips of rho 1 to 4 at random, bit for bit. Returns how many frames were decoded for them,
    and how many would be if none were skipped."""
    decoded, plain = 0, 0
    frames = whole_file(path, 32)
    pictures = dict(enumerate(picture for _, picture in frames))
    numbered = [(seconds, i) for i, (seconds, _) in enumerate(frames)]
    for rho in range(1, rounds + 1):
        starts = rng.uniform(0, float(frames[-1][0]), rho)
        times = starts[:, None] + np.arange(5) * rng.choice([1, 2, 5, 8]) / 30
        with Skipping(path, short_side=32) as reader:
            pictures_read = reader.read(times.ravel())
            assert reader._sure
            decoded += reader.decoded
        with Plain(path, short_side=32) as reader:
            assert np.array_equal(reader.read(times.ravel()), pictures_read)
            plain += reader.decoded
        for seconds, picture in zip(times.ravel(), pictures_read, strict=True):
            allowed = on_display(numbered, Fraction(float(seconds)))
            assert any((picture == pictures[i]).all() for i in allowed), (path, seconds)
    return decoded, plain


@pytest.mark.parametrize("ending", ["mp4", "mkv", "ts"])
@pytest.mark.parametrize("bframes", range(9))
def test_skipping_changes_no_bit(tmp_path, bframes, ending):
    """Frames that are not wanted and to which no other refers are left out by the decoder; those
    that are wanted are, bit for bit, those of a file that is decoded whole: with any number of B
    frames, that others refer to or not, with open and closed groups."""
    rng = np.random.default_rng(bframes)
    for pyramid in PYRAMIDS if bframes > 1 else PYRAMIDS[:1]:
        for open_gop in (0, 1):
            params = x264(b_pyramid=pyramid, open_gop=open_gop, ref=4, b_adapt=0)
            path = make_video(
                tmp_path / f"{pyramid}-{open_gop}.{ending}",
                n=100,
                gop=24,
                bframes=bframes,
                draw=noise_in_motion,
                codec_options=params,
            )
            decoded, plain = compare_with_whole_file(path, rng)
            assert decoded < plain if bframes else decoded == plain


@pytest.mark.parametrize(
    "name, options",
    [
        ("variable.mkv", dict(pts=jitter(100, 8))),
        ("variable.mp4", dict(pts=jitter(100, 9), offset=3)),
        ("starts-at-5.ts", dict(offset=5)),
        ("fragmented.mp4", dict(container_options={"movflags": "frag_keyframe+empty_moov"})),
        ("flash.flv", dict()),
        ("live.mkv", dict(container_options=LIVE)),
        ("mpeg2.ts", dict(codec="mpeg2video")),
        ("mpeg2.mkv", dict(codec="mpeg2video")),
        ("mpeg2.mp4", dict(codec="mpeg2video")),
    ],
)
def test_skipping_changes_no_bit_elsewhere(tmp_path, name, options):
    """The same for variable rates, other starts and containers, and MPEG-2."""
    given = dict(n=100, gop=24, bframes=2, draw=noise_in_motion) | options
    path = make_video(tmp_path / name, **given)
    decoded, plain = compare_with_whole_file(path, np.random.default_rng(0), rounds=8)
    assert decoded < plain


def test_reading_again_still_skips(tmp_path):
    """What an earlier read did not want has no say in what the next one skips."""
    options = x264(b_pyramid="normal", b_adapt=0)
    path = make_video(tmp_path / "a.mp4", n=75, bframes=3, codec_options=options)
    with VideoReader(path) as reader:
        reader.read([2.0])
        assert read_counters(reader.read(np.arange(8) / 30)) == list(range(8))
        assert reader._sure


@pytest.mark.parametrize(
    "name", ["interlaced.ts", "mpeg4-b.avi", "mpeg4-b.mp4", "hevc.mp4", "h264.avi"]
)
def test_all_is_decoded_where_skipping_is_not_sure(tmp_path, name):
    """With fields, with other codecs, and in an avi file, whose packets have no time stamps."""
    more = {"mpeg4-b.mp4": dict(n=75, bframes=2, codec="mpeg4")}
    options = (CONSTANT | more).get(name, dict(n=75, bframes=2))
    path = make_video(tmp_path / name, **options)
    with VideoReader(path) as reader:
        reader.read([0.3, 1.1, 1.2])
        assert not reader._sure


@pytest.mark.parametrize("seed", range(12))
def test_what_lies_before_damage_is_as_it_was(tmp_path, seed):
    """Noise over 12 bytes of a file: up to the first frame that it changes, no bit changes. (After
    that a decoder conceals it with what it has decoded before, which skipping may change.)"""
    path = make_video(tmp_path / "a.mp4", n=100, gop=250, bframes=3, draw=noise_in_motion)
    good = [picture for _, picture in whole_file(path, 32)]
    rng = np.random.default_rng(seed)
    with open(path, "r+b") as file:
        file.seek(os.path.getsize(path) * int(rng.integers(10, 80)) // 100)
        file.write(rng.bytes(12))
    now = [picture for _, picture in whole_file(path, 32)]
    changed = next(i for i in range(100) if not np.array_equal(now[i], good[i]))
    times = np.sort(rng.integers(0, 100, 12)) / 30
    with VideoReader(path, short_side=32) as reader:
        pictures = reader.read(times)
    for seconds, picture in zip(times, pictures, strict=True):
        i = round(seconds * 30)
        assert i >= changed or np.array_equal(picture, good[i])


def test_frames_that_do_not_come_make_it_read_again(tmp_path):
    """If a frame that the packets promise does not come out of the decoder, all are decoded: here
    the promise of one that does not exist, 10 ms after each."""

    class Promising(VideoReader):
        def _packets(self):
            late = round(self._second / 100)
            for packet in super()._packets():
                if packet.pts is not None:
                    self._stamps = sorted([*self._stamps, packet.pts + late])
                yield packet

    path = make_video(tmp_path / "a.mp4", n=75, bframes=3)
    times = [1.52, 0.31, 2.1, 0.32]
    with Promising(path) as reader:
        pictures = reader.read(times)
        assert not reader._sure
        assert (reader.read(times) == pictures).all()
    assert read_counters(pictures) == [45, 9, 63, 9]


# --- pictures


@pytest.mark.parametrize("size", [(1, 1), (3, 5), (4096, 2), (2, 4096)])
@pytest.mark.parametrize(
    "name, codec, pix_fmt",
    [
        ("h264.mp4", "libx264", "yuv444p"),  # this build's x264 wants even sizes with yuv420p
        ("vp8.webm", "libvpx", "yuv420p"),
        ("vp9.webm", "libvpx-vp9", "yuv420p"),
        ("mpeg4.avi", "mpeg4", "yuv420p"),
        ("lossless.mkv", "ffv1", "bgr0"),
    ],
)
def test_odd_sizes(tmp_path, size, name, codec, pix_fmt):
    """From one pixel to the thinnest stripe: the right frames, which differ in brightness here;
    scaled, the short side is the size, and a stripe's long side at most 16 times that."""

    def shade(counter, width, height):
        return np.full((height, width, 3), 20 + 40 * counter, np.uint8)

    path = make_video(tmp_path / name, n=6, size=size, codec=codec, pix_fmt=pix_fmt, draw=shade)
    clips = common.read_clips(path, [0.0, 0.1], 3, 1)
    assert clips.shape == (2, 3, size[1], size[0], 3)
    wanted = np.array([[20, 60, 100], [140, 180, 220]])
    assert np.abs(clips.mean((2, 3, 4)) - wanted).max() < 10
    small = common.read_clips(path, [0.1], 3, 1, size=16)
    longest = round(min(16 * max(size) / min(size), 256))
    assert small.shape[2:4] == ((16, longest) if size[0] > size[1] else (longest, 16))
    assert np.abs(small.mean((2, 3, 4)) - wanted[1]).max() < 10


@pytest.mark.parametrize("rotation", [90, 180, 270])
@pytest.mark.parametrize("size", [(96, 64), (64, 96)])
def test_rotation_is_applied(tmp_path, rotation, size):
    """A rotated file comes out upright and with width and height exchanged before scaling."""
    path = make_video(tmp_path / "r.mp4", n=5, rotation=rotation, size=size)
    clip = common.read_clips(path, [0.0], 4, 1)[0]
    assert clip.shape == (4, size[1], size[0], 3)
    assert read_counters(clip) == [0, 1, 2, 3]
    small = common.read_clips(path, [0.0], 4, 1, size=32)[0]
    assert small.shape == (4, *((32, 48) if size[0] > size[1] else (48, 32)), 3)
    assert read_counters(small) == [0, 1, 2, 3]


@pytest.mark.parametrize("clockwise", [90, 180, 270])
def test_rotation_of_a_telephone(tmp_path, clockwise):
    """The matrix that telephones write (ISO 14496-12, patched into the file here) turns pictures
    the right way: 0 1 -1 0 is a quarter turn clockwise."""
    turns = clockwise // 90
    path = tmp_path / "telephone.mp4"

    def stored(counter, width, height):
        upright = (width, height) if turns == 2 else (height, width)
        return np.rot90(counter_picture(counter, *upright), turns)

    make_video(path, n=5, draw=stored)
    data = bytearray(path.read_bytes())
    place = data.index(b"tkhd") + 44
    one, minus, zero = (v.to_bytes(4, "big", signed=True) for v in (1 << 16, -1 << 16, 0))
    assert data[place : place + 20] == one + zero * 3 + one
    a, b, c, d = {
        90: (zero, one, minus, zero),
        180: (minus, zero, zero, minus),
        270: (zero, minus, one, zero),
    }[clockwise]
    data[place : place + 20] = a + b + zero + c + d
    path.write_bytes(data)
    clip = common.read_clips(str(path), [0.0], 3, 1)[0]
    assert clip.shape == (3, *((64, 96) if turns == 2 else (96, 64)), 3)
    assert read_counters(clip) == [0, 1, 2]


@pytest.mark.parametrize("stored", [(160, 90), (90, 160), (97, 65), (65, 97), (128, 30)])
@pytest.mark.parametrize("rotation", [0, 90])
@pytest.mark.parametrize("size", [24, 37, 64, 112])
def test_size_is_the_short_side(tmp_path, stored, rotation, size):
    """size sets the short side exactly, up or down; the other keeps the aspect to one pixel."""
    path = make_video(
        tmp_path / "s.mp4", n=2, size=stored, rotation=rotation, pix_fmt="yuv444p", gop=1
    )
    clip = common.read_clips(path, [0.0], 2, 1, size=size)[0]
    height, width = clip.shape[1:3]
    assert min(height, width) == size
    assert (width > height) == (stored[0] > stored[1])
    assert abs(max(height, width) - size * max(stored) / min(stored)) <= 1
    assert read_counters(clip) == [0, 1]


@pytest.mark.parametrize("name", ["mp4.mp4", "vp9.webm", "rgb.mkv", "yuv444-odd.mp4", "10-bit.mp4"])
def test_colours(video, name):
    """Channels are red, green, blue, and the colours are those that were drawn."""
    clip = common.read_clips(video(name).path, [0.0], 1, 1)[0]
    height, width = clip.shape[1:3]
    error = clip[0].astype(int) - counter_picture(0, width, height)
    assert np.abs(error).mean() < 12
    corner = clip[0, : height // 8, : width // 12].reshape(-1, 3).mean(axis=0)
    assert np.abs(corner - LIGHT).max() < 30


def test_a_still_video_stays_still(tmp_path):
    """Frames that show one and the same lossless picture come out equal, clip by clip."""
    path = make_video(tmp_path / "still.mkv", n=60, codec="ffv1", pix_fmt="bgr0", counters=[7] * 60)
    clips = common.read_clips(path, [1.0, 0.2, 5.0], 4, 2, size=32)
    assert (clips == clips[0, 0]).all()


# --- cost


class Counting:
    """A container that counts what is read from it and looks at the process meanwhile."""

    def __init__(self, container):
        self._container = container
        self.work = 0  # packets or frames
        self.tasks = 0  # most threads of the process
        self.alone = True  # the decoder is set to one thread

    def __getattr__(self, name):
        return getattr(self._container, name)

    def __enter__(self):
        self._container.__enter__()
        return self

    def __exit__(self, *exception):
        return self._container.__exit__(*exception)

    def demux(self, *streams):
        return self._count(self._container.demux(*streams))

    def decode(self, *streams):
        return self._count(self._container.decode(*streams))

    def _count(self, items):
        for item in items:
            context = self._container.streams.video[0].codec_context
            self.alone &= context.thread_count == 1 or context.thread_type.name == "NONE"
            self.work += 1
            self.tasks = max(self.tasks, threads())
            yield item


def threads():
    """Threads of this process."""
    return len(os.listdir("/proc/self/task"))


@pytest.fixture
def opened(monkeypatch):
    """The containers that common opens from now on."""
    containers, original = [], av.open

    def counting_open(*args, **kwargs):
        containers.append(Counting(original(*args, **kwargs)))
        return containers[-1]

    monkeypatch.setattr(common.av, "open", counting_open)
    return containers


@pytest.mark.parametrize("name", ["b-frames.mp4", "long-gop-30.mp4", "mpegts.ts", *NO_DURATION])
def test_one_open_for_all_clips(video, opened, name):
    """However many clips there are, and also if one asks for the duration first, the file is
    opened once; only a duration that the header lacks may be looked for in a second opening."""
    file = video(name)
    opened.clear()  # the file may have been written and decoded just now
    common.read_clips(file.path, [end(file) * part for part in (0.9, 0, 0.5, 0.5)], 2, 2)
    assert len(opened) == 1
    opened.clear()
    with VideoReader(file.path) as reader:
        reader.read(np.array([0.9, 0.0, 0.5]) * reader.duration)
    assert len(opened) <= (2 if name in NO_DURATION else 1)


@pytest.mark.parametrize("name", ["mp4.mp4", "hevc.mp4", "vp9.webm", "rotated-90.mp4"])
def test_one_thread(video, opened, name):
    """Decoding and conversion start no thread: frame threads hang, and workers share the cores."""
    file, before = video(name), threads()
    opened.clear()
    common.read_clips(file.path, [0.0, end(file) / 2], 8, 2, size=48)
    assert opened[0].work and all(container.alone for container in opened)
    assert max(container.tasks for container in opened) <= before
    assert threads() <= before


@pytest.mark.parametrize("long, short", list(zip(LONG, SHORT, strict=True)))
def test_cost_of_a_clip_does_not_grow_with_the_file(video, opened, long, short):
    """One clip costs at most a group of pictures and its own span (packets), in a file of minutes
    as in one of seconds."""
    options = LONG[long]
    span = 8 * 4 * options["fps"] // 30
    bound = options["gop"] + span + 40  # what is read ahead, and a second try
    worst = []
    for file in (video(short), video(long)):
        costs = []
        for part in np.random.default_rng(3).uniform(0, 1, 15):
            opened.clear()
            with VideoReader(file.path) as reader:
                reader.read(part * reader.duration + np.arange(8) * 4 / 30)
            costs.append(sum(container.work for container in opened))
        worst.append(max(costs))
    assert worst[1] <= bound and worst[0] <= bound


def test_many_clips_cost_at_most_the_file(video, opened):
    """Clips that lie close together are decoded in one pass, not each from its key frame."""
    file = video("long-gop.mp4")
    opened.clear()
    common.read_clips(file.path, [2.0, 1.0, 5.0, 3.0, 4.0, 2.5, 3.5, 4.5], 8, 4)
    assert sum(container.work for container in opened) <= 1.2 * len(file.frames)


def test_memory_does_not_grow(tmp_path):
    """Hundreds of reads, of good and of bad files, leave the process less than 30 MB larger."""
    good = [
        make_video(tmp_path / "a.mp4", n=20, size=(640, 384), bframes=2),
        make_video(tmp_path / "b.mkv", n=20, size=(640, 384), rotation=90),
        make_video(tmp_path / "c.webm", n=20, size=(640, 384), codec="libvpx"),
    ]
    bad = tmp_path / "bad.mp4"
    bad.write_bytes(open(good[0], "rb").read()[:3000])

    def resident():
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20

    for i in range(360):
        if i == 60:
            before = resident()
        common.read_clips(good[i % 3], [0.1, 0.3], 4, 2, size=128)
        with pytest.raises(ValueError):
            common.read_clips(str(bad), [0.0], 1, 1)
    assert resident() - before < 30


# --- what cannot be read


def _playlist(path):
    make_video(path.parent / "part.ts", n=5)
    path.write_text("#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\npart.ts\n#EXT-X-ENDLIST\n")


def _concat_script(path):
    make_video(path.parent / "part.mp4", n=5)
    path.write_text("ffconcat version 1.0\nfile part.mp4\n")


def _cut_before_index(path):
    make_video(path, n=30)
    path.write_bytes(path.read_bytes()[:-2000])


def _picture(path, codec, pix_fmt, format):
    make_video(path, n=1, codec=codec, pix_fmt=pix_fmt, format=format)


UNREADABLE = {
    "jpeg.mp4": lambda path: _picture(path, "mjpeg", "yuvj420p", "image2pipe"),
    "png.mp4": lambda path: _picture(path, "png", "rgb24", "image2pipe"),
    "gif.mp4": lambda path: _picture(path, "gif", "rgb8", "gif"),
    "webp.mkv": lambda path: _picture(path, "libwebp", "yuv420p", "image2pipe"),
    "missing.mp4": lambda path: None,
    "zero-bytes.mp4": lambda path: path.write_bytes(b""),
    "text.mp4": lambda path: path.write_text("this is no video\n" * 100),
    "noise.mp4": lambda path: path.write_bytes(np.random.default_rng(0).bytes(5000)),
    "noise.mkv": lambda path: path.write_bytes(b"\x1a\x45\xdf\xa3" + bytes(5000)),
    "no-index.mp4": _cut_before_index,
    "audio.mp4": lambda path: audio_only(str(path)),
    "audio.mkv": lambda path: audio_only(str(path)),
    "folder.mp4": lambda path: path.mkdir(),
    "playlist.m3u8": _playlist,
    "playlist.mp4": _playlist,
    "concat.ffconcat": _concat_script,
    "concat.mp4": _concat_script,
    # all its time stamps are negative: its edit list leaves nothing to show
    "no-frames.mp4": lambda path: make_video(path, n=20, offset=-1),
}


def assert_unreadable(path):
    for read in (read_start, read_middle):
        with pytest.raises(ValueError) as caught:
            read(path)
        message = str(caught.value)
        assert message.startswith(f"{path}: ")
        assert len(message) > len(f"{path}: ")
        assert "\n" not in message


def read_start(path):
    common.read_clips(path, [0.0], 2, 2)


def read_middle(path):
    with VideoReader(path) as reader:
        reader.read([reader.duration / 2])


@pytest.mark.parametrize("name", UNREADABLE)
def test_unreadable_is_a_value_error(tmp_path, name):
    """What holds no video, or stands for other files, is a ValueError of one line."""
    path = tmp_path / name
    UNREADABLE[name](path)
    assert_unreadable(str(path))


@pytest.mark.parametrize("kind", ["concat:{}", "concat:{}|{}", "subfile,,start,0,end,0,,:{}"])
def test_protocols_are_refused(tmp_path, kind):
    """A name that FFmpeg would take as an address is a file that does not exist."""
    path = make_video(tmp_path / "a.ts", n=5)
    assert_unreadable(kind.format(path, path))


def test_names_are_taken_literally(tmp_path, monkeypatch):
    """Spaces, colons, percent signs and letters of any script in a name are no address."""
    monkeypatch.chdir(tmp_path)
    for name in ["a b.mp4", "12:30.mp4", "50%d.mp4", "vidéo-日本.mp4", "-i.mp4", "a?b#c.mp4"]:
        path = make_video(tmp_path / "plain.mp4", n=3)
        os.rename(path, name)
        assert read_counters(common.read_clips(name, [0.0], 3, 1)[0]) == [0, 1, 2]


@pytest.mark.parametrize(
    "name, options",
    [
        ("index-last.mp4", {}),
        ("index-first.mp4", {"container_options": {"movflags": "faststart"}}),
        ("fragmented.mp4", {"container_options": {"movflags": "frag_keyframe+empty_moov"}}),
        ("cut.mkv", {}),
        ("cut.webm", {"codec": "libvpx-vp9"}),
        ("cut.avi", {"codec": "mpeg4"}),
        ("cut.ts", {"bframes": 2}),
        ("av1.mkv", {"codec": "libsvtav1"}),
        ("hevc.mp4", {"codec": "libx265", "container_options": {"movflags": "faststart"}}),
    ],
)
def test_truncated_at_every_tenth(tmp_path, name, options):
    """Whatever tenth a file ends at: the right frames as far as it goes, then its last one, or a
    ValueError, which an mp4 file gives whose index was last; within seconds."""
    data = open(make_video(tmp_path / name, n=120, **options), "rb").read()
    lengths = []
    for tenth in range(10):
        path = tmp_path / f"{tenth}-{name}"
        path.write_bytes(data[: len(data) * tenth // 10])
        begun = time.process_time()
        try:
            read_middle(str(path))
        except ValueError:
            assert_unreadable(str(path))
            continue
        file = SimpleNamespace(path=str(path), frames=reference(path))
        for starts in ([0.0, end(file), 1.0, 9.0], [end(file) - 0.1], [3.0]):
            check(file, starts, 3, 2)
        assert time.process_time() - begun < 10
        lengths.append(len(file.frames))
    assert lengths == sorted(lengths) and (not lengths or lengths[0] < 120)
    assert (len(lengths) >= 5) == (name != "index-last.mp4"), lengths


@pytest.mark.parametrize("name", ["mp4.mp4", "mkv.mkv", "vp8.webm", "mpeg4.avi", "mpegts.ts"])
def test_damaged_bytes_give_frames_or_a_value_error(video, tmp_path, name):
    """Bytes that were overwritten anywhere in a file lead to clips of the right shape or to a
    ValueError, to nothing else, within 10 s; 100 seeds a container."""
    with open(video(name).path, "rb") as file:
        data = np.frombuffer(file.read(), np.uint8)
    path = tmp_path / name
    for seed in range(100):
        begun = time.process_time()
        rng = np.random.default_rng(seed)
        damaged = data.copy()
        places = rng.integers(0, len(data), 20)
        damaged[places] = rng.integers(0, 256, len(places))
        path.write_bytes(damaged.tobytes())
        try:
            clips = common.read_clips(str(path), [0.0, 1.2, 2.6], 3, 2)
        except ValueError:
            continue
        finally:
            assert time.process_time() - begun < 10, seed
        assert clips.dtype == np.uint8 and clips.shape[:2] == (3, 3) and clips.shape[4] == 3
