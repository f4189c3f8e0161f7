"""What users do to the code, each as a script of theirs that changes nothing in common.py."""

import importlib.util
import json
import math
import re
import sys
import textwrap

import pytest
import torch
from PIL import Image
from torch.nn.functional import normalize

import common
import simclr
from conftest import run_ranks
from test_train import last_of, log_of
from videos import counter_picture


def called(path, argv):
    """Import a script and call its main, as a command does."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module.main(argv)


@pytest.fixture
def script(tmp_path):
    """Call script(text, argv): write a script, run it in a process of its own, return the lines of
    its log. ranks: how many processes."""

    def run(text, argv, ranks=1):
        path = tmp_path / "hack.py"
        path.write_text(textwrap.dedent(text))
        run_ranks(ranks, called, path, argv)
        return log_of(tmp_path / "out")

    return run


HEAD = """
    import numpy as np
    import torch
    import torch.nn.functional as F
    from torch import nn

    import common
    import simclr
    from simclr import Config, DEMO, SimCLR, nt_xent, sample_clips

    def start(argv, dataset_class=common.VideoClips, model_class=SimCLR, sampler=sample_clips):
        cfg = common.parse_args(Config, DEMO, argv)
        common.init_distributed(cfg)
        dataset = dataset_class(cfg, sampler)
        model = model_class(cfg).to(common.device())
        return cfg, dataset, model, common.wrap_ddp(model, cfg), common.make_optimizer(model, cfg)
"""

OWN_LOSS = """
    def alignment(z):
        # only that the clips of a video should be near each other: what would collapse
        a, b = F.normalize(z, dim=-1).unbind(1)  # (B, D) each
        return (a - b).square().sum(-1).mean()

    def main(argv=None):
        cfg, dataset, model, network, optimizer = start(argv)
        run = common.Run(cfg, dataset, model, optimizer, chance=2.0)
        for batch in run.batches():
            with common.autocast():
                z = network(batch["clips"])
            loss = alignment(z)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            run.record(loss, features=z)
"""


@pytest.mark.parametrize("ranks", [1, 2])
def test_own_loss(ranks, script, small):
    """Another loss than the four: the log has it, with the chance level that the script gives, and
    it is what goes down; so does the spread of the features, which nothing keeps up."""
    log = script(HEAD + OWN_LOSS, [*small, "--epochs", "10", "--lr", "0.02"], ranks)
    assert all(line["chance"] == 2.0 for line in log)
    assert log[-1]["loss"] < 0.5 * log[0]["loss"], [line["loss"] for line in log]
    assert log[-1]["feature_std"] < 0.8 * log[0]["feature_std"]


MINIMUM_GAP = """
    GAP = 0.2

    def sample_clips(duration, clip_seconds, rho, timespan, rng):
        # uniform, but two clips start at least GAP seconds apart
        last = max(0.0, duration - clip_seconds)
        gap = min(GAP, last / rho)
        starts = np.sort(rng.uniform(0.0, last - (rho - 1) * gap, size=rho)) + gap * np.arange(rho)
        return rng.permutation(starts)

    def main(argv=None):
        simclr.sample_clips = sample_clips
        simclr.main(argv)
"""


def distances_of(log):
    return [line["clip_distance"] for line in log]


def test_own_sampler_with_a_minimum_gap(script, small):
    """No two clips of the log start closer to each other; without the hack some do."""
    argv = [*small, "--batch-size", "2", "--log-every", "1"]
    assert min(distances_of(script(HEAD + MINIMUM_GAP, argv))) >= 0.2
    small[small.index("--out") + 1] += "/plain"
    simclr.main([*argv[:2], *small[2:4], *argv[4:]])
    assert min(distances_of(log_of(small[3]))) < 0.2


SPEED = """
    def sample_clips(duration, clip_seconds, rho, timespan, rng):
        # times of all frames (rho, T): each clip at normal or at double speed
        speeds = rng.integers(1, 3, size=rho)
        last = np.maximum(0.0, duration - speeds * clip_seconds)
        return rng.uniform(0.0, last)[:, None] + speeds[:, None] * STEP * np.arange(FRAMES)

    FRAMES, STEP = 4, 4 / 30

    class WithSpeed(SimCLR):
        def __init__(self, cfg):
            super().__init__(cfg)
            self.speed = nn.Linear(self.encoder.backbone.feature_dim, 2)

        def forward(self, clips):
            h = common.encode_views(self.encoder.backbone, clips, self.low_memory)  # (B, V, F)
            z = torch.stack([self.encoder.projector(view) for view in h.unbind(1)], dim=1)
            return z, self.speed(h)

    def main(argv=None):
        cfg, dataset, model, network, optimizer = start(
            argv, model_class=WithSpeed, sampler=sample_clips
        )
        run = common.Run(cfg, dataset, model, optimizer, chance=3.0)
        for batch in run.batches():
            starts = batch["starts"]  # (B, V, T)
            assert starts.shape[1:] == (cfg.rho, cfg.frames), starts.shape
            fast = ((starts[:, :, 1] - starts[:, :, 0]) / STEP > 1.5).long()  # (B, V)
            B, V, _ = starts.shape
            apart = (starts[:, :, None, 0] - starts[:, None, :, 0]).abs()  # (B, V, V)
            apart = apart.sum() / (B * V * (V - 1))
            with common.autocast():
                z, scores = network(batch["clips"])
            speed_loss = F.cross_entropy(scores.flatten(0, 1), fast.flatten())
            loss = nt_xent(z, cfg.temperature) + speed_loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            hits = (scores.argmax(-1) == fast).float().mean()
            numbers = dict(speed_accuracy=hits, fast=fast.float().mean(), apart=apart)
            run.record(loss, features=z, **numbers)
"""


@pytest.mark.parametrize("ranks, rho", [(1, 2), (2, 3)])
def test_auxiliary_head_on_playback_speed(ranks, rho, script, small, tmp_path):
    """The sampler gives all frames' times, the batch has them, and the head learns from them; it is
    in the checkpoint, and the run goes on from there."""
    argv = [*small, "--rho", str(rho), "--epochs", "3", "--log-every", "1"]
    log = script(HEAD + SPEED, [*argv, "--max-steps", "2"], ranks)
    before = last_of(tmp_path / "out")["model"]["speed.weight"]
    log = script(HEAD + SPEED, argv, ranks)
    after = last_of(tmp_path / "out")["model"]["speed.weight"]
    assert not torch.equal(before, after)
    assert [line["step"] for line in log] == [1, 2, 3, 4, 5, 6]
    assert all(0 <= line["speed_accuracy"] <= 1 for line in log)
    assert 0.1 < sum(line["fast"] for line in log) / len(log) < 0.9
    assert all(math.isclose(x["clip_distance"], x["apart"], rel_tol=1e-3) for x in log)


ACCUMULATION = """
    def main(argv=None):
        cfg, dataset, model, network, optimizer = start(argv)
        run = common.Run(cfg, dataset, model, optimizer, chance=3.0)
        norm = after = torch.zeros(())
        for batch in run.batches():
            with common.autocast():
                z = network(batch["clips"])
            loss = nt_xent(z, cfg.temperature)
            (loss / 2).backward()
            if run.step % 2 == 1:  # every second step
                norm = nn.utils.clip_grad_norm_(model.parameters(), 0.01)
                after = nn.utils.get_total_norm([p.grad for p in model.parameters()])
                optimizer.step()
                optimizer.zero_grad()
            run.record(loss, features=z, gradient=norm, clipped=after)
"""


def test_accumulation_and_clipping(script, small, tmp_path):
    """The optimizer's steps are half of the run's, and their gradients are clipped."""
    log = script(HEAD + ACCUMULATION, [*small, "--epochs", "4"])
    saved = last_of(tmp_path / "out")
    assert saved["step"] == 8
    assert {int(state["step"]) for state in saved["optimizer"]["state"].values()} == {4}
    assert all(line["gradient"] > 0.011 for line in log)
    assert all(math.isclose(line["clipped"], 0.01, rel_tol=1e-3) for line in log)


JPG = """
    from pathlib import Path
    from torchvision.io import decode_image
    from torchvision.transforms.v2.functional import resize

    class JpgReader:
        # a folder of 0001.jpg, 0002.jpg, ... at 30 fps
        def __init__(self, folder, short_side):
            self.files = sorted(Path(folder).glob("*.jpg"))
            if not self.files:
                raise common.BadVideo(f"{folder}: no jpg files")
            self.duration = len(self.files) / 30
            self.short_side = short_side

        def read(self, times):
            numbers = np.clip(30 * np.asarray(times) + 0.03, 0, len(self.files) - 1).astype(int)
            frames = [decode_image(self.files[number]) for number in numbers]
            return resize(torch.stack(frames), self.short_side).permute(0, 2, 3, 1).numpy()

        def close(self):
            pass

    class JpgClips(common.VideoClips):
        def open(self, index, short_side):
            return JpgReader(self.paths[index], short_side)

    # the end of the reader

    def main(argv=None):
        cfg, dataset, model, network, optimizer = start(argv, dataset_class=JpgClips)
        run = common.Run(cfg, dataset, model, optimizer, chance=3.0)
        for batch in run.batches():
            with common.autocast():
                z = network(batch["clips"])
            loss = nt_xent(z, cfg.temperature)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            run.record(loss, features=z, green=batch["clips"][:, :, 1].mean())
"""


@pytest.fixture
def jpg_list(tmp_path):
    """A list of 8 folders with 30 pictures each, and one without, in two classes."""
    rows = []
    for i in range(8):
        folder = tmp_path / f"frames/{i}"
        folder.mkdir(parents=True)
        for number in range(30):
            picture = Image.fromarray(counter_picture(30 * i + number, 48, 36))
            picture.save(folder / f"{number:04d}.jpg")
        rows.append(f"frames/{i}\t{'odd' if i % 2 else 'even'}\n")
    (tmp_path / "frames/empty").mkdir()
    (tmp_path / "list.txt").write_text("".join(rows) + "frames/empty\teven\n")
    return tmp_path / "list.txt"


def test_frames_from_folders_of_jpg_files(script, small, jpg_list, capfd):
    """A reader and a VideoClips that opens it, in under 20 lines; kNN reads through it too, and a
    folder that cannot be read is a bad video as any other."""
    lines = JPG.split("# the end of the reader")[0].split("class JpgReader")[1].splitlines()
    assert len([line for line in lines if line.strip()]) < 20
    argv = [*small, "--data", str(jpg_list), "--batch-size", "4", "--epochs", "4"]
    log = script(HEAD + JPG, [*argv, "--knn-every", "2", "--workers", "1"])
    assert log[-1]["step"] == 8 and "knn_top1" in log[-1] and log[-1]["bad_videos"] == 1
    assert len({line["green"] for line in log}) > 1
    assert "WARN bad video" in capfd.readouterr().err


EXTRA_NUMBER = """
    def main(argv=None):
        cfg, dataset, model, network, optimizer = start(argv)
        run = common.Run(cfg, dataset, model, optimizer, chance=3.0)
        for batch in run.batches():
            with common.autocast():
                z = network(batch["clips"])
            loss = nt_xent(z, cfg.temperature)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            own = F.cosine_similarity(z[:, 0], z[:, 1], dim=-1).mean()  # not detached
            squared = own.detach() ** 2
            run.record(loss, features=z, own=own, squared=squared, step_twice=2 * run.step)
"""


def test_an_extra_number_in_the_log(script, small, capfd):
    """A tensor, with or without a gradient, or a number: the log has it, without a word of torch's
    on the terminal."""
    log = script(HEAD + EXTRA_NUMBER, [*small, "--log-every", "1"])
    out, err = capfd.readouterr()
    assert "Warning" not in out + err
    for line in log:
        assert -1 <= line["own"] <= 1 and math.isclose(
            line["squared"], line["own"] ** 2, rel_tol=1e-4
        )
        assert line["step_twice"] == 2 * (line["step"] - 1)


BACKBONE = """
    def two_layers():
        stages = {"a": nn.Conv3d(3, 8, 3, 2), "b": nn.ReLU(), "c": nn.Conv3d(8, 24, 1)}
        return common.Backbone(24, stages)

    common.BACKBONES["two_layers"] = two_layers

    def main(argv=None):
        simclr.main(argv)
"""

FEATURES = """
    import json

    def main(argv):
        backbone, cfg = common.load_backbone(argv[0])
        with torch.no_grad():
            features = backbone(common.load_clip(argv[1], cfg, start=0.1))  # (1, feature_dim)
        with open(argv[2], "w") as file:
            json.dump(features.tolist(), file)
"""


def test_one_more_backbone(script, small, folder, tmp_path, capfd):
    """A line in BACKBONES: the flag takes it, --help and the error of a wrong name list it, it
    trains, and its file is loaded."""
    argv = [*small, "--backbone", "two_layers"]
    log = script(HEAD + BACKBONE, argv)
    assert log[-1]["step"] == 4 and math.isfinite(log[-1]["loss"])
    assert last_of(tmp_path / "out")["model"]["encoder.backbone.c.weight"].shape[:2] == (24, 8)
    capfd.readouterr()
    run_ranks(1, called, tmp_path / "hack.py", ["--help"])
    assert re.search(r"--backbone[^-]*two_layers", capfd.readouterr().out)
    assert run_ranks(1, called, tmp_path / "hack.py", ["--backbone", "three_layers"]) == [2]
    assert "two_layers" in capfd.readouterr().err


def test_features_of_one_video(script, small, folder, tmp_path):
    """load_backbone and load_clip, in a script that trains nothing: those of the trained backbone,
    of that moment of the video."""
    simclr.main([*small, "--max-steps", "1"])
    video = folder / "even/00.mp4"
    found = []
    for weights in (tmp_path / "out", tmp_path / "out/backbone.pth"):
        script(HEAD + FEATURES, [str(weights), str(video), str(tmp_path / "f.json")])
        found.append(json.loads((tmp_path / "f.json").read_text()))
    assert found[0] == found[1]
    backbone = common.backbone("tiny").eval()
    model = last_of(tmp_path / "out")["model"]
    names = backbone.state_dict()
    backbone.load_state_dict({name: model[f"encoder.backbone.{name}"] for name in names})
    side = round(16 * 256 / 224)
    frames = common.read_clips(str(video), [0.1], 4, 4, side)  # (1, T, H, W, 3)
    left = (frames.shape[3] - side) // 2
    clip = torch.from_numpy(frames[:, :, :, left : left + side]).permute(0, 4, 1, 2, 3) / 255
    with torch.no_grad():
        expected = backbone((clip - common.MEAN) / common.STD)
    assert expected.shape == (1, 64)
    torch.testing.assert_close(torch.tensor(found[0]), expected, atol=1e-4, rtol=1e-4)
    assert normalize(expected).norm() > 0
