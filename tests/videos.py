"""Little real video files for the tests: every frame shows its own number.

The number is drawn as a 6 x 4 grid of light and dark blocks (4 x 6 in a picture that is higher than
wide), which survives lossy coding and scaling. The four corners say which way up the picture is,
sixteen blocks are the number in binary and four are its check digit, so that a damaged, mirrored or
rotated picture is refused and not misread.

    make_video("a.mp4", n=60, fps=30)                     # two seconds, frames 0 ... 59
    make_video("b.mkv", pts=[0, 0.1, 0.15, 0.4])          # variable rate
    make_video("c.mp4", rotation=90)                      # upright once the rotation is applied
    read_counter(frame)                                   # -> int, from uint8 (H, W, 3)
"""

from fractions import Fraction

import av
import numpy as np

LIGHT, DARK = (255, 255, 150), (0, 0, 110)  # not grey: swapped channels can be told
LONG, SHORT = 6, 4  # blocks along the long and the short side
BITS, CHECK = 16, 15  # 2^16 numbers, and the check digit is the number modulo 15

# The cheapest settings at which the blocks stay readable.
CODEC_OPTIONS = {
    "libx264": {"preset": "ultrafast", "crf": "20", "x264-params": "scenecut=0:threads=1"},
    "libx265": {
        "preset": "ultrafast",
        "crf": "20",
        "x265-params": "log-level=none:scenecut=0:pools=1:frame-threads=1",
    },
    "libvpx": {"deadline": "realtime", "cpu-used": "8"},
    "libvpx-vp9": {"deadline": "realtime", "cpu-used": "8"},
    "libsvtav1": {"preset": "8", "crf": "20", "svtav1-params": "lp=1"},
}


def counter_grid(counter, upright=False):
    """The blocks (bool, True = light) that stand for `counter`: 4 x 6, or 6 x 4 if upright."""
    if not 0 <= counter < 2**BITS:
        raise ValueError(f"counter {counter} does not fit into {BITS} blocks")
    bits = [counter >> i & 1 for i in range(BITS)] + [(counter % CHECK) >> i & 1 for i in range(4)]
    rows, cols = (LONG, SHORT) if upright else (SHORT, LONG)
    grid = np.zeros((rows, cols), bool)
    grid[0, 0] = True  # only one corner is light
    grid[_data_blocks(rows, cols)] = bits
    return grid


def counter_picture(counter, width, height):
    """The picture of `counter`: uint8 RGB (height, width, 3)."""
    grid = counter_grid(counter, upright=height > width)
    rows = np.arange(height) * grid.shape[0] // height
    cols = np.arange(width) * grid.shape[1] // width
    return np.where(grid[rows][:, cols, None], np.uint8(LIGHT), np.uint8(DARK))


def read_counter(frame):
    """The number that a picture (H, W, 3) shows; ValueError if it is damaged or not upright."""
    height, width = frame.shape[:2]
    rows, cols = (LONG, SHORT) if height > width else (SHORT, LONG)
    # only the middle of each block: its edges are blurred by scaling and by coding
    inner = np.array([0.3, 0.4, 0.5, 0.6, 0.7])
    ys = ((np.arange(rows)[:, None] + inner) * height / rows).astype(int).ravel()
    xs = ((np.arange(cols)[:, None] + inner) * width / cols).astype(int).ravel()
    middle = frame[ys][:, xs].mean(axis=2).reshape(rows, len(inner), cols, len(inner)).mean((1, 3))
    if ((middle > 90) & (middle < 165)).any():
        raise ValueError("blocks that are neither light nor dark: a damaged picture")
    grid = middle > 127
    bits = grid[_data_blocks(rows, cols)]
    counter = sum(int(bit) << i for i, bit in enumerate(bits[:BITS]))
    if (counter_grid(counter, upright=height > width) != grid).any():
        raise ValueError("corners or check digit are wrong: a picture that is not upright")
    return counter


def read_counters(clip):
    """The numbers of a clip (T, H, W, 3), as a list."""
    return [read_counter(frame) for frame in clip]


def make_video(
    path,
    n=30,
    fps=30,
    size=(96, 64),
    *,
    codec="libx264",
    gop=12,
    bframes=0,
    pts=None,
    offset=0.0,
    rotation=0,
    pix_fmt="yuv420p",
    counters=None,
    draw=counter_picture,
    codec_options=None,
    container_options=None,
    format=None,
):
    """Write a video file and return its path as a string.

    path       its ending picks the container, unless `format` names one
    n, fps     number of frames and rate; fps may be a Fraction
    size       (width, height) as DISPLAYED, after the rotation
    gop        frames from one key frame to the next (1: intra only)
    bframes    most B frames in a row
    pts        times of the frames in seconds, increasing, to 0.1 ms, for a variable rate; n is
               then ignored
    offset     added to all times: the time stamp of the first frame
    rotation   0, 90, 180 or 270: the angle, counter-clockwise, by which a player turns the stored
               picture; what is stored is turned the other way, so that the result is upright
    counters   what the frames show, by default 0, 1, 2, ...
    draw       draw(counter, width, height) -> uint8 RGB (height, width, 3)
    codec_options, container_options   for FFmpeg, added to those that are set here
    """
    fps = Fraction(fps).limit_denominator(1001)
    if pts is None:
        time_base, ticks = 1 / fps, [i + round(offset * fps) for i in range(n)]
    else:
        time_base = Fraction(1, 10000)
        ticks = [round((t + offset) / time_base) for t in pts]
    counters = range(len(ticks)) if counters is None else counters
    width, height = size if rotation % 180 == 0 else size[::-1]
    options = CODEC_OPTIONS.get(codec, {}) | (codec_options or {})
    with av.open(str(path), "w", format=format, options=container_options or {}) as out:
        stream = out.add_stream(codec, rate=fps, options=options)
        stream.width, stream.height, stream.pix_fmt = width, height, pix_fmt
        stream.codec_context.time_base = time_base
        stream.codec_context.gop_size = gop
        stream.codec_context.max_b_frames = bframes
        stream.codec_context.thread_count = 1
        if rotation:
            stream.set_display_rotation(rotation)
        for tick, counter in zip(ticks, counters, strict=True):
            picture = np.rot90(draw(counter, *size), -rotation // 90)
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
            frame = frame.reformat(format=pix_fmt)
            frame.pts, frame.time_base = tick, time_base
            out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
    return str(path)


def _data_blocks(rows, cols):
    """Index of the blocks that are not corners, row by row."""
    inside = np.ones((rows, cols), bool)
    inside[[0, 0, -1, -1], [0, -1, 0, -1]] = False
    return np.nonzero(inside)
