"""The official layouts of the labelled data sets, made of little videos that are light or dark."""

import json

import numpy as np
import pytest

from videos import make_video


def clip(path, light, n=10, fps=30, codec="mpeg4"):
    """A short noisy video, light or dark; or light for the first `light` frames."""

    def shade(counter, width, height):
        noise = np.random.default_rng(counter).integers(0, 60, (height, width, 3))
        return (noise + (150 if counter < light * (1 if light > 1 else n) else 20)).astype(np.uint8)

    path.parent.mkdir(parents=True, exist_ok=True)
    make_video(path, n=n, fps=fps, size=(40, 30), draw=shade, codec=codec)


@pytest.fixture(scope="session")
def ucf101(tmp_path_factory):
    """The layout of UCF101: UCF-101/Class/*.avi and ucfTrainTestlist/*.txt, two classes."""
    root = tmp_path_factory.mktemp("UCF101")
    train, test = [], []
    for g in range(1, 7):
        for number, name in enumerate(("LightUp", "Darken"), start=1):
            video = f"{name}/v_{name}_g{g:02d}_c01.avi"
            clip(root / "UCF-101" / video, light=number == 1)
            train.append(f"{video} {number}") if g > 2 else test.append(video)
    lists = root / "ucfTrainTestlist"
    lists.mkdir()
    (lists / "classInd.txt").write_text("1 LightUp\r\n2 Darken\r\n")
    (lists / "trainlist01.txt").write_text("\r\n".join(train) + "\r\n")
    (lists / "testlist01.txt").write_text("\r\n".join(test) + "\r\n")
    return root


@pytest.fixture(scope="session")
def hmdb51(tmp_path_factory):
    """The layout of HMDB51: class/*.avi, and a file of each class and split with 0, 1 or 2."""
    root = tmp_path_factory.mktemp("HMDB51")
    splits = root / "testTrainMulti_7030_splits"
    splits.mkdir()
    for name in ("light_up", "darken"):
        videos = [f"a_video_({i})_{name}_np1.avi" for i in range(7)]
        for video in videos:
            clip(root / name / video, light=name == "light_up")
        for split, marks in ((1, "2201111"), (2, "1111220")):
            lines = [f"{video} {mark} \n" for video, mark in zip(videos, marks, strict=True)]
            (splits / f"{name}_test_split{split}.txt").write_text("".join(lines))
    return root


TEMPLATES = ["Dimming [something] with [something]", "Lighting [something]"]


@pytest.fixture(scope="session")
def ssv2(tmp_path_factory):
    """The layout of Something-Something v2: id.webm (one is an mp4 here), three json files."""
    root = tmp_path_factory.mktemp("ssv2")
    names = [template.replace("[", "").replace("]", "") for template in TEMPLATES]
    for part, first in (("train", 100), ("validation", 200)):
        entries = []
        for i in range(first, first + 6):
            ending = "mp4" if i == 100 else "webm"
            clip(root / "videos" / f"{i}.{ending}", i % 2, codec="libvpx" if i > 100 else "mpeg4")
            entry = {"id": str(i), "label": "a caption", "template": TEMPLATES[i % 2]}
            entries.append({**entry, "placeholders": ["a lamp"]})
        (root / f"something-something-v2-{part}.json").write_text(json.dumps(entries))
    labels = {name: str(number) for number, name in enumerate(names)}
    (root / "something-something-v2-labels.json").write_text(json.dumps(labels))
    return root


@pytest.fixture(scope="session")
def charades(tmp_path_factory):
    """The layout of Charades: c003 when it is light, c100 when dark, c050 never, in videos of 2 s
    that are light, then dark; commas and semicolons in quoted columns."""
    root = tmp_path_factory.mktemp("charades")
    columns = "id,subject,scene,quality,relevance,verified,script,objects,descriptions,actions"
    for part, first in (("train", 0), ("test", 50)):
        lines = [f"{columns},length"]
        for i in range(first, first + 6):
            light = (60, 0, 30)[i % 3]
            clip(root / "Charades_v1_480" / f"V{i:04d}.mp4", light, n=60)
            actions = [f"c003 0.00 {light / 30:.2f}"] * (light > 0)
            actions += [f"c100 {light / 30:.2f} 2.00"] * (light < 60)
            texts = f'A,Attic,6,7,Yes,"A, then B; ""C""",lamp,"one\ntwo",{";".join(actions)},2.0'
            lines.append(f"V{i:04d},{texts}")
        (root / f"Charades_v1_{part}.csv").write_text("\n".join(lines) + "\n")
    return root


CLASSES = """label {
  name: "stand"
  label_id: 12
  label_type: PERSON_MOVEMENT
}
item {
  name: "watch (a person)"
  id: 80
}
label {
  name: "bend/bow (at the waist)"
  label_id: 1
  label_type: PERSON_MOVEMENT
}
"""


def halves(path, left, n=150, fps=30):
    """A video whose left half is light and right half dark, or the other way round."""

    def picture(counter, width, height):
        noise = np.random.default_rng(counter).integers(0, 60, (height, width, 3))
        return (noise + 130 * ((np.arange(width) < width / 2) == left)[:, None]).astype(np.uint8)

    path.parent.mkdir(parents=True, exist_ok=True)
    make_video(path, n=n, fps=fps, size=(40, 32), draw=picture, codec="mpeg4")


@pytest.fixture(scope="session")
def ava(tmp_path_factory):
    """The layout of AVA v2.2, in cuts of 5 s: who is in the light stands (12) and, unlisted in the
    60 classes, sings (64); who is in the dark watches (80). A third person is in no one's way."""
    root = tmp_path_factory.mktemp("ava")
    for part, names in (("train", "abcd"), ("val", "ef")):
        lines = []
        for name in names:
            halves(root / "clips" / f"-{name}_5BBWC4.mkv", left=name in "ace")
            for second in range(902, 905):
                for person, x in enumerate(("0.05,0.1,0.45,0.9", "0.55,0.1,0.95,0.9")):
                    actions = (12, 64) if (person == 0) == (name in "ace") else (80,)
                    lines += [f"-{name}_5BBWC4,{second:04d},{x},{a},{person}" for a in actions]
            lines.append(f"-{name}_5BBWC4,0905")
        (root / f"ava_{part}_v2.2.csv").write_text("\n".join(lines) + "\n")
    (root / "ava_action_list_v2.2_for_activitynet_2019.pbtxt").write_text(CLASSES)
    (root / "ava_val_excluded_timestamps_v2.2.csv").write_text("-e_5BBWC4,0903\n-z,0902\n")
    return root
