"""The demo's videos: acrobats under changing stage lights.

    python tests/demo_videos.py data/demo
    python tests/demo_videos.py data/one-scene --scenes 1 --seed 1

An acrobat in a coat does a trick for 4 s (60 frames, 64 x 64 pixels) while backdrop, colours and
light change three times. Coat and trick are the class and last for the whole video; what changes is
a nuisance that clips from different times do not share.
"""

import argparse
import multiprocessing
import os
import shutil
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import av
import numpy as np
from tqdm import tqdm

COATS = {  # in the acrobat's own coordinates: dark below -0.42, light above 0.42
    "solid": lambda u, v, f: np.ones_like(u),
    "stripes": lambda u, v, f: np.sin(2 * np.pi * f * u),
    "dots": lambda u, v, f: 1.6 * (np.cos(2 * np.pi * f * u) + np.cos(2 * np.pi * f * v)) - 1,
    "checks": lambda u, v, f: 2.5 * np.sin(1.2 * np.pi * f * u) * np.sin(1.2 * np.pi * f * v),
}
TRICKS = ["spin", "bounce", "swing", "pulse"]


def demo_videos(folder, seed=0, scenes=4, train=400, val=200):
    """Make <folder>/{train,val}/<coat>-<trick>/NNNN.mp4 unless the folder exists; the same bytes
    for the same seed. Returns the folder."""
    folder = Path(folder)
    if folder.exists():
        return folder
    print(f"making {train + val} demo videos in {folder}, once: a minute or more", flush=True)
    building = folder.with_name(f".{folder.name}-{os.getpid()}")
    jobs = [(building / "train", i, (seed, 0, i), scenes) for i in range(train)]
    jobs += [(building / "val", i, (seed, 1, i), scenes) for i in range(val)]
    try:
        with ProcessPoolExecutor(multiprocessing.cpu_count(), initializer=silence) as pool:
            made = pool.map(write_acrobat, jobs, chunksize=8)
            for _ in tqdm(made, "videos", total=len(jobs), disable=None):
                pass
        building.rename(folder)
    except OSError:
        if not folder.exists():  # else another process was faster
            raise
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return folder


def silence():
    av.logging.set_level(None)


def write_acrobat(job):
    folder, i, seed, scenes = job
    coat, trick = [*COATS][i % 4], TRICKS[i // 4 % 4]
    path = folder / f"{coat}-{trick}" / f"{i:04d}.mp4"
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        options = {"crf": "20", "preset": "veryfast", "threads": "1", "g": "12", "bf": "0"}
        stream = container.add_stream("libx264", rate=15, options=options)
        stream.width = stream.height = 64
        for picture in acrobat(coat, trick, scenes, np.random.default_rng(seed)):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())


def acrobat(coat, trick, scenes, rng, frames=60, side=64):
    """One demo video, (frames, side, side, 3) uint8."""
    t = np.arange(frames)[:, None, None]
    y, x = np.mgrid[-1 : 1 : side * 1j, -1 : 1 : side * 1j][:, None]  # (1, side, side) each
    wave = 2 * np.pi * t / rng.uniform(10, 14) + rng.uniform(0, 2 * np.pi)
    spin, bounce, swing, pulse = (float(trick == name) for name in TRICKS)
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
    shade = 0.25 + 0.75 * np.clip(0.5 + 1.2 * COATS[coat](u, v, rng.uniform(1.2, 1.6)), 0, 1)
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


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", help="where to write; nothing is done if it exists")
    parser.add_argument("--seed", type=int, default=0, help="other videos of the same kind [0]")
    parser.add_argument("--scenes", type=int, default=4, help="backdrops per video [4]")
    parser.add_argument("--train", type=int, default=400, help="training videos [400]")
    parser.add_argument("--val", type=int, default=200, help="test videos [200]")
    args = parser.parse_args(argv)
    try:
        demo_videos(args.folder, args.seed, args.scenes, args.train, args.val)
    except OSError as error:
        sys.exit(f"cannot make {args.folder}: {error}")


if __name__ == "__main__":
    main()
