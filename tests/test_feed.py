"""What a training run feeds: which videos in which order, which clips of them, on which rank."""

import numpy as np
import pytest

from conftest import METHODS, SMALL, run_ranks
from feed_adapter import batches_of, numbered, shown

FRAMES, STRIDE, LENGTH = 4, 4, 60
LAST = (LENGTH - FRAMES * STRIDE) / 30  # the latest start of a clip, in seconds
FLAGS = [*SMALL, *"--size 24 --short-side 24 24 --augment none --knn-every 0".split()]
FLAGS += ["--batch-size", "4", "--epochs", "4"]
AUGMENTED = ["--rho", "3", "--augment", "crop,flip,jitter,gray,blur"]


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """13 numbered videos of 2 s; even and odd numbers are the classes 0 and 1."""
    root = tmp_path_factory.mktemp("numbered")
    for i in range(13):
        numbered(root / f"{i:02d}.mp4", i, LENGTH)
    return listed(root, range(13))


def listed(root, numbers):
    lines = [f"{i:02d}.mp4\t{'odd' if i % 2 else 'even'}\n" for i in numbers]
    (root / "list.txt").write_text("".join(lines))
    return root / "list.txt"


@pytest.fixture
def argv(videos, tmp_path):
    return ["--data", str(videos), "--out", str(tmp_path / "out"), *FLAGS]


@pytest.fixture(scope="module")
def fed(videos, tmp_path_factory):
    """What BYOL is fed at rho 3, augmented: four epochs of three steps of four videos."""
    out = tmp_path_factory.mktemp("run")
    return batches_of("byol", ["--data", str(videos), "--out", str(out), *FLAGS, *AUGMENTED])


def order(batches):
    """The numbers of the videos of each epoch, as they came."""
    epochs = {batch.epoch: [] for batch in batches}
    for batch in batches:
        epochs[batch.epoch] += batch.indices.tolist()
    return list(epochs.values())


def starts(batches):
    """{(epoch, video): the starts of its clips}"""
    pairs = [(b.epoch, zip(b.indices, b.starts, strict=True)) for b in batches]
    return {(epoch, int(i)): row.tolist() for epoch, rows in pairs for i, row in rows}


def assert_same(one, two):
    assert len(one) == len(two)
    for a, b in zip(one, two, strict=True):
        for x, y in zip(a, b, strict=True):
            np.testing.assert_array_equal(x, y)


def test_each_video_once_an_epoch(fed):
    """A video that comes twice in an epoch, or one that is always left out."""
    epochs = order(fed)
    assert [len(epoch) for epoch in epochs] == [12] * 4
    for epoch in epochs:
        assert len(set(epoch)) == 12 and set(epoch) <= set(range(13))
    assert len({(set(range(13)) - set(epoch)).pop() for epoch in epochs}) > 1


def test_another_order_in_every_epoch(fed):
    """The same order in each epoch, that of the list, or the same videos together in a batch."""
    epochs = order(fed)
    assert len({tuple(epoch) for epoch in epochs}) == 4
    assert all(epoch != sorted(epoch) for epoch in epochs)
    together = [{frozenset(b.indices) for b in fed if b.epoch == epoch} for epoch in range(4)]
    assert not any(together[i] & together[j] for i in range(4) for j in range(i))


def test_other_clips_in_every_epoch(fed):
    """A video shows the same clips in each epoch: the seed lacks the epoch."""
    found = starts(fed)
    for video in range(13):
        times = [found[epoch, video] for epoch in range(4) if (epoch, video) in found]
        assert len(times) > 1 and len({tuple(row) for row in times}) == len(times)
    for epoch in range(4):  # nor do all videos of an epoch
        assert len({tuple(row) for (e, _), row in found.items() if e == epoch}) == 12


@pytest.mark.parametrize("method", METHODS)
def test_clips_come_from_the_whole_video(method, argv):
    """Clips of the beginning alone, or beyond the end."""
    own = ["--queue", "50"] if method == "moco" else []
    times = np.array([*starts(batches_of(method, [*argv, *own, "--rho", "3"])).values()])
    assert times.shape == (48, 3) and times.min() >= 0 and times.max() <= LAST
    assert times.min() < 0.05 * LAST and times.max() > 0.95 * LAST
    assert abs(times.mean() / LAST - 0.5) < 0.1


@pytest.mark.parametrize("method", METHODS)
def test_clips_of_one_video_in_one_sample(method, argv):
    """Views of several videos in one sample, a label or a start of another clip, one clip twice.

    Each frame says which one it is: it must be that of the sample's video, start and stride."""
    own = ["--queue", "50"] if method == "moco" else []
    for batch in batches_of(method, [*argv, *own, "--rho", "3", "--max-steps", "3"]):
        assert batch.clips.shape == (4, 3, 3, FRAMES, 24, 24)
        assert batch.labels.tolist() == [i % 2 for i in batch.indices]
        for b, v in np.ndindex(4, 3):
            video, frames, mirrored = shown(batch.clips[b, v])
            times = batch.starts[b, v] + np.arange(FRAMES) * STRIDE / 30
            assert video == batch.indices[b] and not mirrored
            assert frames == [int((time + 1e-3) * 30) for time in times]
        assert all(len(set(row)) == 3 for row in batch.starts.tolist())


@pytest.mark.parametrize("method", METHODS)
def test_rho_1_is_one_clip_augmented_twice(method, argv):
    """At rho 1 two clips, or one that is augmented once and copied."""
    own = ["--queue", "50"] if method == "moco" else []
    same, flips = [], set()
    for batch in batches_of(method, [*argv, *own, "--rho", "1", "--augment", "flip"]):
        assert batch.clips.shape == (4, 2, 3, FRAMES, 24, 24)
        for views, times in zip(batch.clips, batch.starts, strict=True):
            one, two = map(shown, views)
            assert one[:2] == two[:2] and times[0] == times[1]
            flips.add((one[2], two[2]))
            same.append((views[0] == views[1]).all())
    assert len(flips) == 4 and 0.2 < np.mean(same) < 0.8


def test_views_are_augmented_independently(argv):
    """One draw of the augmentation for all views of a video, all videos of a batch, all epochs."""
    flags = [*argv, "--rho", "3", "--augment", "flip"]
    flips = {}
    for batch in batches_of("simclr", flags):
        for i, views in zip(batch.indices, batch.clips, strict=True):
            flips[batch.epoch, int(i)] = tuple(shown(view)[2] for view in views)
    found = [*flips.values()]
    assert len({*found}) > 4 and 0.3 < np.mean(found) < 0.7
    for epoch in range(4):
        assert len({row for (e, _), row in flips.items() if e == epoch}) > 1
    videos = [{row for (_, i), row in flips.items() if i == video} for video in range(13)]
    assert sum(len(rows) > 1 for rows in videos) > 6


def test_crops_are_drawn_for_each_view(argv):
    """--augment crop that takes the same part of each view, or the whole picture."""
    flags = [*argv, "--rho", "1", "--augment", "crop", "--crop-area", "0.3", "0.5"]
    plain = batches_of("simclr", [*flags, "--augment", "none", "--max-steps", "2"])
    flags[flags.index("--out") + 1] += "-cropped"
    cropped = batches_of("simclr", [*flags, "--max-steps", "2"])
    apart = []
    for a, b in zip(plain, cropped, strict=True):
        np.testing.assert_array_equal(a.indices, b.indices)
        for whole, (one, two) in zip(a.clips, b.clips, strict=True):
            assert (whole[0] == whole[1]).all()  # one clip, twice the same
            pairs = (one, two), (one, whole[0]), (two, whole[0])
            apart += [np.abs(x - y).mean() > 0.1 for x, y in pairs]
    assert len(apart) == 24 and sum(apart) > 18


def test_the_same_for_the_same_seed(fed, argv):
    """Randomness that is not the seed's: a run that cannot be repeated."""
    assert_same(fed, batches_of("byol", [*argv, *AUGMENTED]))


def test_other_for_another_seed(fed, argv):
    """A seed that does not reach the order of the videos, or the clips."""
    other = batches_of("byol", [*argv, *AUGMENTED, "--seed", "1"])
    assert not any(a == b for a, b in zip(order(fed), order(other), strict=True))
    one, two = starts(fed), starts(other)
    both = one.keys() & two.keys()
    assert len(both) > 36 and not any(one[key] == two[key] for key in both)


def test_the_same_with_workers_and_after_a_stop(fed, argv):
    """Clips that depend on the worker, or on where the run began again: in mid-epoch."""
    flags = [*argv, *AUGMENTED, "--workers", "2"]
    begun = batches_of("byol", [*flags, "--max-steps", "4"])
    assert_same(fed, begun + batches_of("byol", flags))


@pytest.mark.parametrize("ranks", [2, 4])
def test_each_rank_has_its_slice_of_the_batch(ranks, fed, argv):
    """Ranks that get the same videos, interleaved ones, or other clips than one process does."""
    flags = [*argv, *AUGMENTED, "--max-steps", "4"]
    if ranks == 4:  # each needs two videos
        flags += ["--batch-size", "8"]
        (fed,) = run_ranks(1, batches_of, "simclr", [*flags, "--out", flags[3] + "-whole"])
    answers = run_ranks(ranks, batches_of, "simclr", flags)
    for step in range(4):
        for part in ("indices", "labels", "clips", "starts"):
            parts = [getattr(batches[step], part) for batches in answers]
            assert all(len(x) == len(fed[step].indices) // ranks for x in parts)
            np.testing.assert_array_equal(np.concatenate(parts), getattr(fed[step], part))


def test_timespan_bounds_the_clips(argv):
    """--timespan that does not reach the sampling, or ties the clips of all videos to one time."""
    batches = batches_of("swav", [*argv, "--rho", "3", "--timespan", "0.3"])
    times = np.array([*starts(batches).values()])
    spans = times.max(1) - times.min(1)
    assert 0.15 < spans.max() <= 0.3 and spans.min() > 0
    assert times.max() - times.min() > 0.9 * LAST


def test_a_replaced_video_brings_its_label(videos, tmp_path):
    """In the place of a bad video another one, with the bad one's label, or with its own clips
    beside those of a second one."""
    for i in range(13):
        (tmp_path / f"{i:02d}.mp4").symlink_to(videos.parent / f"{i:02d}.mp4")
    for i in (3, 6, 7):
        (tmp_path / f"{i:02d}.mp4").unlink()
        (tmp_path / f"{i:02d}.mp4").write_text("no video")
    data = listed(tmp_path, range(13))
    argv = ["--data", str(data), "--out", str(tmp_path / "out"), *FLAGS, "--rho", "3"]
    found = {0: [], 1: []}
    for batch in batches_of("byol", argv):
        for label, views in zip(batch.labels, batch.clips, strict=True):
            numbers = {shown(view)[0] for view in views}
            assert len(numbers) == 1 and not numbers & {3, 6, 7}
            found[int(label)] += numbers
    assert all(number % 2 == label for label, numbers in found.items() for number in numbers)
    assert len(found[0] + found[1]) == 48
