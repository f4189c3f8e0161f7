"""Parts of common.py and of the methods against formulas that are worked out here."""

import math
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import byol
import common
import demo_videos
import moco
import simclr
import swav
from conftest import ROOT, arguments

SCRIPTS = [simclr, moco, byol, swav]
NAMES = ["SimCLR", "MoCo", "BYOL", "SwAV"]


@pytest.mark.parametrize("script", SCRIPTS)
def test_sample_clips(script):
    """rho starts, uniform and independent in what the clip leaves; all of them within timespan."""
    rng = np.random.default_rng(0)
    starts = np.array([script.sample_clips(10.0, 2.0, 4, math.inf, rng) for _ in range(3000)])
    assert starts.shape == (3000, 4) and 0 <= starts.min() and starts.max() <= 8
    assert np.allclose(starts.mean(0), 4, atol=0.2)
    assert np.allclose(starts.var(0), 64 / 12, rtol=0.1)
    assert np.abs(np.corrcoef(starts.T) - np.eye(4)).max() < 0.06
    assert (np.diff(starts, axis=1) < 0).any()  # unsorted
    near = np.array([script.sample_clips(10.0, 2.0, 3, 0.5, rng) for _ in range(1000)])
    assert 0.45 < np.ptp(near, axis=1).max() <= 0.5 and near.min() < 0.5 and near.max() > 7.5
    assert script.Config().timespan == math.inf  # the whole video
    for timespan in (math.inf, 5.0):  # a clip that is longer than its video begins with it
        assert script.sample_clips(1.0, 2.0, 2, timespan, rng).tolist() == [0, 0]
    same = [script.sample_clips(5.0, 2.0, 3, 1.0, np.random.default_rng(3)) for _ in "ab"]
    np.testing.assert_array_equal(*same)


def test_lars_is_its_formula():
    """Three Nesterov steps against a loop of the formula: a matrix, a bias and a zero weight."""
    torch.manual_seed(0)
    weights = [torch.randn(3, 5), torch.randn(7), torch.zeros(2, 3)]
    trained = [w.clone().requires_grad_() for w in weights]
    optimizer = common.LARS(trained, lr=0.3, momentum=0.9, weight_decay=0.01)
    weights = [w.double().numpy() for w in weights]
    buffers = [np.zeros_like(w) for w in weights]
    for _ in range(3):
        gradients = [torch.randn_like(w) for w in trained]
        for i, (w, g) in enumerate(zip(trained, gradients, strict=True)):
            w.grad = g.clone()
            g, v = g.double().numpy(), weights[i]
            norm, size = np.linalg.norm(v), np.linalg.norm(g)
            if g.ndim > 1 and norm > 0 and size > 0:
                g = (g + 0.01 * v) * 0.001 * norm / (size + 0.01 * norm + 1e-8)
            buffers[i] = 0.9 * buffers[i] + g
            weights[i] = v - 0.3 * (g + 0.9 * buffers[i])
        optimizer.step()
    for w, v in zip(trained, weights, strict=True):
        np.testing.assert_allclose(w.detach().numpy(), v, rtol=1e-5, atol=1e-7)


def test_lars_without_adaptation_is_sgd():
    """On biases alone LARS is torch's Nesterov SGD."""
    ours, theirs = torch.ones(4, requires_grad=True), torch.ones(4, requires_grad=True)
    lars = common.LARS([ours], lr=0.1, momentum=0.9, weight_decay=0.5)
    sgd = torch.optim.SGD([theirs], lr=0.1, momentum=0.9, nesterov=True)
    for _ in range(4):
        for w, optimizer in ((ours, lars), (theirs, sgd)):
            w.grad = w.detach() ** 2
            optimizer.step()
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("name", ["lars", "sgd", "adamw"])
def test_bn_has_no_weight_decay(name):
    """Each optimizer: two groups, one of BN's affine and one of the other trained weights. Decay
    moves the weights of the other group (LARS: the matrices) and nothing of BN or the target."""
    moved = []
    for decay in (0.0, 0.3):
        torch.manual_seed(0)
        cfg = arguments(byol, optimizer=name, weight_decay=decay)
        model = byol.BYOL(cfg)
        optimizer = common.make_optimizer(model, cfg)
        norms = [m for m in model.modules() if isinstance(m, torch.nn.modules.batchnorm._BatchNorm)]
        affine = {p for m in norms for p in m.parameters() if p.requires_grad}
        everything = {p for p in model.parameters() if p.requires_grad}
        decayed, plain = [set(group["params"]) for group in optimizer.param_groups]
        assert plain == affine and decayed == everything - affine
        assert not everything & set(model.target.parameters())
        for group in optimizer.param_groups:
            assert group["lr"] == 0  # until the run sets it
            group["lr"] = 0.1
        for p in everything:
            p.data.add_(0.1)  # no bias is 0
            p.grad = torch.ones_like(p)
        optimizer.step()
        moved.append({key: p.detach() for key, p in model.named_parameters()})
        kept = {key for key, p in model.named_parameters() if p in affine or not p.requires_grad}
    for key, before in moved[0].items():
        is_decayed = key not in kept and (name != "lars" or before.ndim > 1)
        assert torch.equal(before, moved[1][key]) != is_decayed, key


def test_learning_rate_is_the_released_schedule():
    """Half a cosine without offset, a linear warm-up that meets it, linear in the views."""
    cfg = byol.Config()
    assert (cfg.lr, cfg.batch_size, cfg.rho, cfg.warmup) == (0.6, 64, 2, 35 / 200)
    rate = [common.learning_rate(cfg, e / 200) for e in np.linspace(0, 200, 4001)]
    assert rate[-1] == pytest.approx(0, abs=1e-9)
    assert rate[4001 // 2] == pytest.approx(0.3)
    assert max(rate) == pytest.approx(0.926 * 0.6, rel=1e-3)
    assert np.allclose(np.diff(rate[:700]), rate[1] - rate[0])
    assert rate[0] == pytest.approx(0.001 * max(rate))
    for rho, factor in ((1, 1), (4, 2)):  # rho = 1 has two views as well
        more = byol.Config(rho=rho, batch_size=32)
        assert common.learning_rate(more, 0.5) == pytest.approx(0.3 * factor / 2)


@pytest.mark.parametrize("script", [moco, byol])
def test_target_momentum(script):
    """From its start to its end along half a cosine, exactly there at the last step; constant if
    both are the same."""
    shares = np.linspace(0, 1, 101)
    values = [script.target_momentum(0.9, 1.0, p) for p in shares]
    assert values[0] == pytest.approx(0.9) and values[-1] == 1.0
    assert (np.diff(values) >= 0).all() and values[50] == pytest.approx(0.95)
    np.testing.assert_allclose(values, 1 - 0.1 * (np.cos(np.pi * shares) + 1) / 2)
    values = [script.target_momentum(0.9, 0.98, p) for p in shares]
    assert values[-1] == 0.98 and values[50] == pytest.approx(0.94)
    assert {script.target_momentum(0.99, 0.99, p) for p in shares} == {0.99}
    assert script.Config().target_momentum_end == 1.0


@pytest.mark.parametrize("script", [moco, byol])
def test_update_target(script):
    """theta_k <- m theta_k + (1 - m) theta_q, parameters only, in place."""
    slow, fast = (torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2)) for _ in "ab")
    fast(torch.randn(5, 3))
    before = [p.clone() for p in slow.parameters()]
    script.update_target(slow, fast, 0.75)
    for p, old, new in zip(slow.parameters(), before, fast.parameters(), strict=True):
        torch.testing.assert_close(p, 0.75 * old + 0.25 * new)
    assert (slow[1].running_mean == 0).all()


@pytest.mark.parametrize("script, name", list(zip(SCRIPTS, NAMES, strict=True)))
def test_gradient_reaches_what_learns(script, name):
    """Every trained weight gets a gradient, the target and the queue none; a forward pass moves no
    weight."""
    torch.manual_seed(0)
    model = getattr(script, name)(arguments(script, rho=3))
    before = {k: v.clone() for k, v in model.named_parameters()}
    clips = torch.randn(5, 3, 3, 4, 16, 16)
    if name == "MoCo":
        script.enqueue(model, F.normalize(torch.randn(7, 1, 64), dim=-1))
    out = model(clips)
    assert all(torch.equal(before[k], v) for k, v in model.named_parameters())
    if name == "SimCLR":
        loss = script.nt_xent(out, 0.1)
    elif name == "MoCo":
        loss = script.info_nce(*out, model.queue[:7], 0.1)
    elif name == "BYOL":
        loss = script.regression_loss(*out)
    else:
        loss = script.swapped_prediction(out[1], script.assign(out[1], 0.05, 3), 0.1)
    loss.backward()
    for key, p in model.named_parameters():
        if key.startswith("target"):
            assert p.grad is None and not p.requires_grad, key
        else:
            assert p.grad is not None and p.grad.abs().sum() > 0, key


def released_names(blocks):
    """Names and shapes of the released trunk, from its plan: kernels, widths, strides by stage."""

    def bn(name, n):
        entries = {f"{name}.{x}": (n,) for x in ("weight", "bias", "running_mean", "running_var")}
        return {**entries, f"{name}.num_batches_tracked": ()}

    names = {"s1.pathway0_stem.conv.weight": (64, 3, 1, 7, 7), **bn("s1.pathway0_stem.bn", 64)}
    inputs = 64
    plan = zip(blocks, [64, 128, 256, 512], [1, 1, 3, 3], strict=True)
    for s, (count, width, kernel) in enumerate(plan, start=2):
        for i in range(count):
            at = f"s{s}.pathway0_res{i}"
            if i == 0:
                names[f"{at}.branch1.weight"] = (4 * width, inputs, 1, 1, 1)
                names |= bn(f"{at}.branch1_bn", 4 * width)
            names[f"{at}.branch2.a.weight"] = (width, inputs, kernel, 1, 1)
            names[f"{at}.branch2.b.weight"] = (width, width, 1, 3, 3)
            names[f"{at}.branch2.c.weight"] = (4 * width, width, 1, 1, 1)
            for letter, n in (("a", width), ("b", width), ("c", 4 * width)):
                names |= bn(f"{at}.branch2.{letter}_bn", n)
            inputs = 4 * width
    return names


@pytest.mark.parametrize(
    "name, blocks, entries", [("slow_r50", (3, 4, 6, 3), 318), ("slow_r101", (3, 4, 23, 3), 624)]
)
def test_slow_networks_are_the_released_ones(name, blocks, entries):
    """The released names and shapes, strides by stage; 31,634,496 parameters, and for slow_r101
    those of 17 more blocks."""
    network = common.backbone(name)
    state = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    assert state == released_names(blocks) and len(state) == entries
    block = 1024 * 256 * 3 + 256 * 256 * 9 + 256 * 1024 + 2 * (256 + 256 + 1024)
    expected = 31_634_496 + (blocks[2] - 6) * block
    assert sum(p.numel() for p in network.parameters()) == expected
    assert network.feature_dim == 2048
    with torch.no_grad():
        x, shapes = torch.randn(1, 3, 4, 64, 64), []
        for stage in network:
            x = stage(x)
            shapes.append(tuple(x.shape[1:]))
    sides = [(64, 16), (256, 16), (512, 8), (1024, 4), (2048, 2)]
    assert shapes == [(width, 4, side, side) for width, side in sides]


def test_initial_weights():
    """Convolutions: normal, of variance 2 / (outputs x pixels of the kernel) (released
    weight_init_helper.py, lines 21-33)."""
    torch.manual_seed(0)
    for conv in common.backbone("slow_r50").modules():
        if isinstance(conv, torch.nn.Conv3d) and conv.weight.numel() > 10_000:
            outputs, _, *kernel = conv.weight.shape
            std = (2 / (outputs * math.prod(kernel))) ** 0.5
            assert conv.weight.std().item() == pytest.approx(std, rel=0.03)


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_new_backbone_is_one_line(script, monkeypatch, capsys):
    """What is added to BACKBONES is a value of --backbone, in --help, and what trains."""

    def two():
        stages = {"a": torch.nn.Conv3d(3, 4, 3), "b": torch.nn.Conv3d(4, 6, 1)}
        return common.Backbone(6, stages)

    monkeypatch.setitem(common.BACKBONES, "two_convolutions", two)
    cfg = common.parse_args(script.Config, script.DEMO, ["--backbone", "two_convolutions"])
    network = common.backbone(cfg.backbone)
    assert network(torch.zeros(2, 3, 4, 16, 16)).shape == (2, 6)
    model = getattr(script, NAMES[SCRIPTS.index(script)])(cfg)
    assert model(torch.zeros(2, 2, 3, 4, 16, 16))[0].shape[0] == 2
    with pytest.raises(SystemExit) as stop:
        common.parse_args(script.Config, script.DEMO, ["--help"])
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in common.BACKBONES), shown


@pytest.mark.parametrize("name", ["slow_r50", "tiny"])
def test_backbones_take_any_size(name):
    """(B, 3, T, H, W) of any size -> (B, feature_dim), the average of the last map."""
    network = common.backbone(name).eval()
    x = torch.randn(2, 3, 4, 33, 47)
    with torch.no_grad():
        features, last = network(x), network.features(x)
    assert features.shape == (2, network.feature_dim) and features.dtype == torch.float32
    torch.testing.assert_close(features, last.mean((2, 3, 4)))


@pytest.mark.parametrize(
    "script, bn, expected",
    [(simclr, True, 8_659_072), (moco, False, 8_654_976)]
    + [(swav, True, 8_659_072), (byol, True, 9_445_632)],
)
def test_projectors_have_the_papers_size(script, bn, expected):
    """Parameters of the heads by default; SimCLR's has the paper's BN, which the released lacks."""
    cfg = script.Config()
    assert cfg.projector_bn == bn
    head = common.mlp((2048, *cfg.projector), cfg.projector_bn)
    assert sum(p.numel() for p in head.parameters()) == expected
    plain = common.mlp((2048, *cfg.projector), False)
    assert any(isinstance(m, torch.nn.BatchNorm1d) for m in head) == bn
    assert not any(isinstance(m, torch.nn.BatchNorm1d) for m in plain)


def test_predictor_has_the_papers_size():
    """2,105,600 parameters, with BN."""
    head = common.mlp((256, *byol.Config().predictor), True)
    assert sum(p.numel() for p in head.parameters()) == 2_105_600


@pytest.mark.parametrize("bn", [False, True])
def test_start_of_a_head(bn):
    """Weights of torch's own scale, or biases that do not begin at 0."""
    for module in common.mlp((64, 256, 32), bn):
        if isinstance(module, torch.nn.Linear):
            bound = math.sqrt(3 / module.in_features)  # the released code's, Caffe2's XavierFill
            assert 0.98 * bound < module.weight.abs().max() <= bound
        if getattr(module, "bias", None) is not None:
            assert not module.bias.any()


@pytest.mark.parametrize("projector_bn", [False, True])
def test_predictor_has_bn_whatever_the_projector_has(projector_bn):
    """A predictor whose BN follows --projector-bn."""
    model = byol.BYOL(arguments(byol, projector_bn=projector_bn))
    for head, bn in ((model.encoder.projector, projector_bn), (model.predictor, True)):
        assert [type(m) for m in head].count(torch.nn.BatchNorm1d) == bn


# --- augmentation


def transforms(augment, **changes):
    """(crop, color) of a configuration."""
    return common.train_transform(arguments(byol, augment=augment, **changes))


def draw(augment, clip, seed):
    """A clip (T, 3, H, W) after one draw of the color transforms of --augment."""
    torch.manual_seed(seed)
    return transforms(augment)[1](clip)


def make_clips(frames, **changes):
    """The views of one video's frames (rho, T, H, W, 3), as a data set makes them."""
    cfg = arguments(byol, **changes)
    dataset = common.VideoClips(cfg, byol.sample_clips, videos=(["a.mp4"] * 40, [""] * 40))
    return dataset, dataset.views(frames, np.random.default_rng(cfg.seed))["clips"]


@pytest.mark.parametrize(
    "augment",
    "crop,flip,jitter,gray,blur|crop|jitter|blur|none|tint|rotate|cutout|noise|sobel".split("|"),
)
def test_a_still_video_stays_still(augment):
    """One draw for all frames of a clip; another one for another clip."""
    rng = np.random.default_rng(3)
    picture = rng.integers(0, 255, (1, 1, 40, 50, 3), dtype=np.uint8)
    still = np.broadcast_to(picture, (16, 5, 40, 50, 3)).copy()
    _, clips = make_clips(still, rho=16, size=24, augment=augment)
    assert clips.shape == (16, 3, 5, 24, 24) and clips.dtype == torch.float32
    torch.testing.assert_close(clips, clips[:, :, :1].expand_as(clips))
    different = (clips[0] - clips[1:]).abs().amax(dim=(1, 2, 3, 4)) > 1e-3
    if augment in ("none", "sobel"):
        assert not different.any()
    else:
        assert different.any()


def test_one_clip_is_augmented_twice():
    """rho = 1: two views of the one clip, which differ."""
    frames = np.random.default_rng(0).integers(0, 255, (1, 4, 40, 50, 3), dtype=np.uint8)
    _, clips = make_clips(frames, rho=1, size=24)
    assert clips.shape == (2, 3, 4, 24, 24) and not torch.equal(clips[0], clips[1])


def test_clips_have_their_normalisation():
    """(x / 255 - 0.45) / 0.225, and augment keeps to it."""
    frames = np.random.default_rng(0).integers(0, 255, (2, 4, 32, 32, 3), dtype=np.uint8)
    _, clips = make_clips(frames, size=32, augment="none")
    expected = (torch.from_numpy(frames).permute(0, 4, 1, 2, 3) / 255 - 0.45) / 0.225
    torch.testing.assert_close(clips, expected)


def test_rotation_is_by_quarter_turns():
    """rotate: one of the four turns, for the whole clip, each about equally often."""
    clip, counts = torch.rand(2, 3, 8, 8), [0] * 4
    turns = [torch.rot90(clip, k, (2, 3)) for k in range(4)]
    for seed in range(200):
        turned = draw("rotate", clip, seed)
        (k,) = [k for k in range(4) if torch.allclose(turned, turns[k], atol=1e-5)]
        counts[k] += 1
    assert min(counts) > 25


def test_cutout_blackens_one_box():
    """cutout: a rectangle of 2 to 33 % of the picture is 0 in all frames, the rest untouched."""
    clip = torch.rand(3, 3, 40, 40) + 0.1
    for seed in range(50):
        cut = draw("cutout", clip.clone(), seed)
        gone = (cut == 0).all(dim=(0, 1))
        rows, columns = gone.any(1).sum(), gone.any(0).sum()
        assert gone.sum() == rows * columns and 0.015 < gone.float().mean() < 0.35
        assert torch.equal(cut[..., ~gone], clip[..., ~gone])


def test_noise_has_its_deviation():
    """noise: Gaussian of deviation 0.1 around a grey clip, the same in all frames."""
    noisy = draw("noise", torch.full((2, 3, 100, 100), 0.5), 1)
    assert noisy.std() == pytest.approx(0.1, rel=0.03)
    assert noisy.mean() == pytest.approx(0.5, abs=0.003)
    assert torch.equal(noisy[0], noisy[1])


def test_sobel_is_the_gradient():
    """sobel: a ramp of slope s has the value 2 s everywhere, a flat picture 0."""
    ramp = (torch.arange(20.0) / 40).expand(2, 3, 20, 20)
    edges = draw("sobel", ramp, 0)
    torch.testing.assert_close(edges[..., 1:-1], torch.full((2, 3, 20, 18), 2 / 40))
    assert draw("sobel", torch.full((1, 3, 9, 9), 0.3), 0).abs().max() < 1e-6


def test_augmentations_have_a_fixed_order():
    """Whatever the order in the flag: crop, flip, jitter, gray, blur."""
    names = "blur,gray,jitter,flip,crop"
    clip = torch.rand(2, 3, 40, 40)
    for seed in range(10):
        one = draw(names, clip, seed)
        torch.testing.assert_close(one, draw("crop,flip,jitter,gray,blur", clip, seed))
    kinds = [type(transform).__name__ for transform in transforms(names)[1].transforms]
    assert kinds == ["RandomHorizontalFlip", "RandomApply", "RandomGrayscale", "RandomApply"]


def test_augmentation_has_the_released_strengths():
    """Crops of 0.2 to 0.766 of the area; gray in a fifth of the clips; flips in half."""
    crop, color = common.train_transform(byol.Config())
    flip, jitter, gray, blur = color.transforms
    boxes = [crop.make_params([torch.zeros(3, 256, 340)]) for _ in range(2000)]
    areas = np.array([box["height"] * box["width"] / (256 * 340) for box in boxes])
    assert 0.19 < areas.min() < 0.23 and 0.72 < areas.max() < 0.78
    assert (flip.p, gray.p, jitter.p, blur.p) == (0.5, 0.2, 0.8, 0.5)
    (gauss,) = blur.transforms
    assert tuple(gauss.sigma) == (0.1, 2.0)


@pytest.mark.parametrize("strength", [None, 0.5, 1.0])
def test_color_strength(strength):
    """Jitter of strength s: brightness, contrast and saturation by 0.8 s, hue by 0.2 s; 0.75 by
    default."""
    changes = {} if strength is None else {"color_strength": strength}
    (jitter,) = common.train_transform(byol.Config(augment="jitter", **changes))[1].transforms
    (color,) = jitter.transforms
    s = 0.75 if strength is None else strength
    for values in (color.brightness, color.contrast, color.saturation):
        assert tuple(values) == pytest.approx((1 - 0.8 * s, 1 + 0.8 * s))
    assert tuple(color.hue) == pytest.approx((-0.2 * s, 0.2 * s))


def test_crop_area_0_is_a_plain_crop():
    """--crop-area 0 0: a square of --size at a random place of the frame, pixel for pixel."""
    rows, columns = np.mgrid[:20, :30]
    frame = np.stack([rows, columns, 0 * rows], axis=-1).astype(np.uint8)  # says where a pixel was
    frames = np.broadcast_to(frame, (200, 2, 20, 30, 3)).copy()
    how = dict(size=16, short_side=(20, 20), crop_area=(0.0, 0.0), augment="crop")
    _, clips = make_clips(frames, rho=200, **how)
    pixels = ((clips * 0.225 + 0.45) * 255).round().int()[:, :2, 0]  # (200, 2, 16, 16)
    corners = pixels[:, :, 0, 0]
    grid = torch.stack(torch.meshgrid(torch.arange(16), torch.arange(16), indexing="ij"))
    assert torch.equal(pixels, corners[:, :, None, None] + grid)  # the same scale, unscaled
    assert set(corners[:, 0].tolist()) == set(range(5))
    assert set(corners[:, 1].tolist()) == set(range(15))


# --- the demo's videos


def test_demo_videos(tmp_path):
    """Real files in class folders, identical for a seed, others for another; made once."""
    sizes = dict(train=16, val=1)
    folder = demo_videos.demo_videos(tmp_path / "a", **sizes)
    again = demo_videos.demo_videos(tmp_path / "b", **sizes)
    other = demo_videos.demo_videos(tmp_path / "c", seed=1, **sizes)
    one_scene = demo_videos.demo_videos(tmp_path / "d", scenes=1, **sizes)
    names = sorted(path.relative_to(folder) for path in folder.rglob("*.mp4"))
    assert len(names) == 17 and len({name.parent.name for name in names}) == 16
    assert {name.parts[0] for name in names} == {"train", "val"}
    for name in names:
        assert (folder / name).read_bytes() == (again / name).read_bytes()
        assert (folder / name).read_bytes() != (other / name).read_bytes()
        assert (folder / name).read_bytes() != (one_scene / name).read_bytes()
    twin = next(path for path in (folder / "val").rglob("0000.mp4"))  # number 0, as in train
    assert twin.read_bytes() != (folder / "train" / twin.parent.name / twin.name).read_bytes()
    clip = common.read_clips(folder / names[0], [0.0], 60, 2)
    assert clip.shape == (1, 60, 64, 64, 3) and len(np.unique(clip.reshape(60, -1), axis=0)) == 60
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*.mp4")}
    assert demo_videos.demo_videos(folder, **sizes) == folder
    assert before == {path: path.stat().st_mtime_ns for path in folder.rglob("*.mp4")}
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("scenes", [1, 4])
def test_demo_videos_have_their_scenes(scenes):
    """A backdrop that does not change, or changes in videos of one scene."""
    for seed in range(5):
        pictures = demo_videos.acrobat("solid", "spin", scenes, np.random.default_rng(seed)) / 255
        rim = np.concatenate([pictures[:, :3], pictures[:, -3:]], 1)  # (60, 6, 64, 3)
        changes = np.abs(np.diff(rim, axis=0)).mean((1, 2, 3))  # from frame to frame
        cuts = np.flatnonzero(changes > 2.5 * np.median(changes))
        assert len(cuts) == scenes - 1, (seed, np.sort(changes)[-5:], np.median(changes))
        assert np.abs(cuts - 60 * np.arange(1, scenes) / scenes).max(initial=0) <= 4


def test_demo_videos_show_their_class():
    """A coat that is drawn by chance, or a trick that is not done: two classes look alike."""
    tricks = [*demo_videos.TRICKS, "none"]
    classes = [(coat, trick) for coat in demo_videos.COATS for trick in tricks]
    pictures = [
        demo_videos.acrobat(*each, 4, np.random.default_rng(0), 20).astype(np.float32)
        for each in classes
    ]
    for i, one in enumerate(pictures):
        for j in range(i):
            difference = np.abs(one - pictures[j]).mean()
            assert difference > 1, (classes[i], classes[j], difference)


def test_demo_videos_as_a_command(tmp_path):
    """The command makes the same bytes as the function; done again it changes nothing, and a place
    that cannot be written to is one line."""
    script = [sys.executable, str(ROOT / "tests/demo_videos.py")]
    flags = ["--train", "16", "--val", "1", "--seed", "3", "--scenes", "2"]
    command = [*script, str(tmp_path / "a"), *flags]
    subprocess.run(command, check=True, capture_output=True)
    demo_videos.demo_videos(tmp_path / "b", seed=3, scenes=2, train=16, val=1)
    contents = [
        {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*.mp4")}
        for folder in (tmp_path / "a", tmp_path / "b")
    ]
    assert contents[0] == contents[1] and len(contents[0]) == 17
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "a").rglob("*")}
    subprocess.run(command, check=True, capture_output=True)
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "a").rglob("*")}
    done = subprocess.run([*script, "/dev/null/a", *flags], capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.strip().count("\n") == 0, done.stderr
    assert "cannot make /dev/null/a" in done.stderr


# --- features


def test_bfloat16_stays_out_of_the_loss():
    """Features leave the network as float32, also under autocast."""
    model = simclr.SimCLR(arguments(simclr))
    with torch.autocast("cpu", torch.bfloat16):
        z = model(torch.randn(2, 2, 3, 4, 16, 16))
    assert z.dtype == torch.float32
    assert math.isfinite(simclr.nt_xent(z, 0.1).item())


def test_scores_are_exact_under_autocast():
    """SwAV's scores are divided by 0.05: they are float32 products, not bfloat16 ones."""
    model = swav.SwAV(arguments(swav)).eval()
    with torch.autocast("cpu", torch.bfloat16):
        z, scores = model(torch.randn(2, 2, 3, 4, 16, 16))
    torch.testing.assert_close(scores, z @ model.prototypes.weight.T, atol=1e-6, rtol=0)


# --- clips of a data set


class Blank:
    """A reader of 5 s of black frames, twice as wide as high."""

    duration = 5.0

    def __init__(self, short_side):
        self.shape = short_side, 2 * short_side, 3

    def read(self, times):
        return np.zeros((len(times), *self.shape), np.uint8)

    def close(self):
        pass


class BlankVideos(common.VideoClips):
    """A data set that reads no files: the sides that it is asked for are kept."""

    def open(self, index, short_side):
        self.sides.append(short_side)
        return Blank(short_side)


@pytest.mark.parametrize("crop_area", [(0.4, 1.0), (0.0, 0.0)])
def test_short_side_is_drawn_between_its_two_values(crop_area):
    """Videos are decoded at every short side from the least to the largest; the clip is --size."""
    cfg = arguments(byol, short_side=(20, 22), size=16, crop_area=crop_area)
    videos = BlankVideos(cfg, byol.sample_clips, videos=(["a"] * 40, [""] * 40))
    videos.sides = []
    for epoch in range(40):
        assert videos[epoch, 5]["clips"].shape == (2, 3, 8, 16, 16)
    assert set(videos.sides) == {20, 21, 22} and len(videos.sides) == 40


def test_a_worker_and_the_device_finish_views_alike(folder, monkeypatch):
    """On a CPU the worker augments; the same function on the same seeds gives a GPU's views."""
    cfg = arguments(byol, seed=3, frames=4, size=16, short_side=(24, 24), batch_size=4)
    made = common.list_videos(folder)
    on_cpu = common.VideoClips(cfg, byol.sample_clips, videos=made)
    monkeypatch.setattr(common, "device", lambda: torch.device("cuda"))
    on_gpu = common.VideoClips(cfg, byol.sample_clips, videos=made)
    done = torch.utils.data.default_collate([on_cpu[1, index] for index in range(4)])
    raw = torch.utils.data.default_collate([on_gpu[1, index] for index in range(4)])
    assert raw["clips"].dtype == torch.uint8 and raw["clips"].shape == (4, 2, 4, 3, 16, 16)
    clips = common.augment(raw["clips"], raw["seeds"], on_gpu.color)
    assert torch.equal(clips, done["clips"])
    assert torch.equal(raw["starts"], done["starts"])


def test_operators_have_their_parameters():
    """A blur that is cut off, crops of other shapes, another tint."""
    crop, color = transforms("crop,blur,tint", crop_area=(0.2, 0.766))
    (gauss,), (gray, jitter) = (part.transforms for part in color.transforms)
    assert tuple(crop.ratio) == (3 / 4, 4 / 3) and tuple(gauss.kernel_size) == (13, 13)
    assert gray.p == 0.2 and tuple(jitter.hue) == pytest.approx((-0.1, 0.1))
    for values in (jitter.brightness, jitter.contrast, jitter.saturation):
        assert tuple(values) == pytest.approx((0.6, 1.4))


def test_the_methods_own_numbers():
    """Another recipe than the released one, where no flag is given."""
    assert (byol.Config().target_momentum, moco.Config().target_momentum) == (0.996, 0.994)
