"""Parts of common.py and of the methods against formulas that are worked out here."""

import math
from argparse import Namespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import byol
import common
import moco
import simclr
import swav
from conftest import arguments

SCRIPTS = [simclr, moco, byol, swav]
NAMES = ["SimCLR", "MoCo", "BYOL", "SwAV"]


@pytest.mark.parametrize("script", SCRIPTS)
def test_sample_clips(script):
    """rho starts, uniform and independent in what the clip leaves; all of them within timespan."""
    rng = np.random.default_rng(0)
    starts = np.array([script.sample_clips(10.0, 2.0, 4, None, rng) for _ in range(3000)])
    assert starts.shape == (3000, 4) and 0 <= starts.min() and starts.max() <= 8
    assert np.allclose(starts.mean(0), 4, atol=0.2) and np.allclose(
        starts.var(0), 64 / 12, rtol=0.1
    )
    assert np.abs(np.corrcoef(starts.T) - np.eye(4)).max() < 0.06
    assert (np.diff(starts, axis=1) < 0).any()  # unsorted
    near = np.array([script.sample_clips(10.0, 2.0, 3, 0.5, rng) for _ in range(1000)])
    assert np.ptp(near, axis=1).max() <= 0.5 and near.min() < 0.5 and near.max() > 7.5
    assert script.sample_clips(1.0, 2.0, 2, None, rng) == [0, 0]
    assert script.sample_clips(1.0, 2.0, 2, 5.0, rng) == [0, 0]
    assert script.sample_clips(5.0, 2.0, 1, None, np.random.default_rng(3)) == (
        script.sample_clips(5.0, 2.0, 1, None, np.random.default_rng(3))
    )


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
    """Each optimizer: two groups, BN's affine in the one without decay, nothing of the target."""
    model = byol.BYOL(arguments(byol.Recipe))
    optimizer = common.make_optimizer(model, Namespace(optimizer=name, weight_decay=0.3))
    decayed, plain = optimizer.param_groups
    assert decayed["weight_decay"] == 0.3 and plain["weight_decay"] == 0
    norms = [m for m in model.modules() if isinstance(m, torch.nn.modules.batchnorm._BatchNorm)]
    affine = {p for m in norms for p in m.parameters() if p.requires_grad}
    assert set(plain["params"]) == affine
    everything = {p for p in model.parameters() if p.requires_grad}
    assert set(decayed["params"]) == everything - affine
    assert not everything & set(model.target.parameters())


def test_learning_rate_is_the_released_schedule():
    """Half a cosine without offset, a linear warm-up that meets it, linear in the views."""
    args = Namespace(lr=0.6, batch_size=64, views=2, epochs=200, warmup_epochs=35.0)
    rate = [common.learning_rate(args, e) for e in np.linspace(0, 200, 4001)]
    assert rate[-1] == pytest.approx(0, abs=1e-9)
    assert rate[4001 // 2] == pytest.approx(0.3)
    assert max(rate) == pytest.approx(0.926 * 0.6, rel=1e-3)
    assert np.allclose(np.diff(rate[:700]), rate[1] - rate[0])
    assert rate[0] == pytest.approx(0.001 * max(rate))
    args.views = 4
    assert common.learning_rate(args, 100) == pytest.approx(0.6)


@pytest.mark.parametrize("script", [moco, byol])
def test_target_momentum(script):
    """From its start to exactly 1 at the last step, never falling; 1 - (1 - m)(cos + 1) / 2."""
    values = [script.momentum(0.9, p) for p in np.linspace(0, 1, 101)]
    assert values[0] == pytest.approx(0.9) and values[-1] == 1.0
    assert (np.diff(values) >= 0).all() and values[50] == pytest.approx(0.95)


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
    args = arguments(script.Recipe, views=3)
    model = getattr(script, name)(args)
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


def slow_r50_names():
    """Names and shapes of the released trunk, from its plan: kernels, widths, strides by stage."""

    def bn(name, n):
        entries = {f"{name}.{x}": (n,) for x in ("weight", "bias", "running_mean", "running_var")}
        return {**entries, f"{name}.num_batches_tracked": ()}

    names = {"s1.pathway0_stem.conv.weight": (64, 3, 1, 7, 7), **bn("s1.pathway0_stem.bn", 64)}
    inputs = 64
    for s, (blocks, width, kernel) in enumerate(
        [(3, 64, 1), (4, 128, 1), (6, 256, 3), (3, 512, 3)]
    ):
        for i in range(blocks):
            at = f"s{s + 2}.pathway0_res{i}"
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


def test_slow_r50_is_the_released_one():
    """318 entries with the released names and shapes, 31,634,496 parameters, strides by stage."""
    network = common.backbone("slow_r50")
    state = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    assert state == slow_r50_names() and len(state) == 318
    assert sum(p.numel() for p in network.parameters()) == 31_634_496
    assert network.feature_dim == 2048
    with torch.no_grad():
        x, shapes = torch.randn(1, 3, 4, 64, 64), []
        for stage in network:
            x = stage(x)
            shapes.append(tuple(x.shape[1:]))
    sides = [(64, 16), (256, 16), (512, 8), (1024, 4), (2048, 2)]
    assert shapes == [(width, 4, side, side) for width, side in sides]


@pytest.mark.parametrize("name", ["slow_r50", "tiny"])
def test_backbones_take_any_size(name):
    """(B, 3, T, H, W) of any size -> (B, feature_dim), the average of the last map."""
    network = common.backbone(name).eval()
    x = torch.randn(2, 3, 4, 33, 47)
    with torch.no_grad():
        features, last = network(x), network.features(x)
    assert features.shape == (2, network.feature_dim) and features.dtype == torch.float32
    torch.testing.assert_close(features, last.mean((2, 3, 4)))


def test_projectors_have_the_papers_size():
    """Parameters of the heads: 8,654,976 MoCo and SimCLR, 8,659,072 SwAV, 9,445,632 + 2,105,600."""
    for script, batch_norm, expected in [
        (simclr, False, 8_654_976),
        (moco, False, 8_654_976),
        (swav, True, 8_659_072),
        (byol, True, 9_445_632),
    ]:
        assert script.Recipe.projector_bn[0] == batch_norm
        head = common.mlp((2048, *script.Recipe.projector[0]), batch_norm)
        assert sum(p.numel() for p in head.parameters()) == expected
    head = common.mlp((256, *byol.Recipe.predictor[0]), True)
    assert sum(p.numel() for p in head.parameters()) == 2_105_600


def still_views(augment):
    args = arguments(byol.Recipe, size=24, augment=augment)
    crop, rest = common._operators(args)
    torch.manual_seed(3)
    picture = torch.randint(0, 255, (1, 1, 1, 3, 40, 50), dtype=torch.uint8)
    still = picture.expand(16, 1, 5, 3, 40, 50)
    seeds = torch.arange(16).reshape(16, 1)
    views = torch.stack(
        [common._draw([crop], clip[0], seed)[None] for clip, seed in zip(still, seeds, strict=True)]
    )
    return common._augment(views, seeds, rest)  # (16, 1, 3, 5, 24, 24)


@pytest.mark.parametrize(
    "augment",
    "crop,flip,jitter,gray,blur|crop|jitter|blur|none|tint|rotate|cutout|noise|sobel".split("|"),
)
def test_a_still_video_stays_still(augment):
    """One draw for all frames of a clip; another one for another clip."""
    clips = still_views(augment)
    assert clips.shape == (16, 1, 3, 5, 24, 24)
    torch.testing.assert_close(clips, clips[:, :, :, :1].expand_as(clips))
    different = (clips[0] - clips[1:]).abs().amax(dim=(1, 2, 3, 4, 5)) > 1e-3
    assert different.any() if augment not in ("none", "sobel") else not different.any()


def operator_of(name):
    args = arguments(byol.Recipe, size=24, augment=name)
    return common._operators(args)[1][0]


def test_rotation_is_by_quarter_turns():
    """rotate: one of the four turns, for the whole clip, each about equally often."""
    clip, counts = torch.rand(2, 3, 8, 8), [0] * 4
    turns = [torch.rot90(clip, k, (2, 3)) for k in range(4)]
    for seed in range(200):
        turned = common._draw([operator_of("rotate")], clip, seed)
        (k,) = [k for k in range(4) if torch.allclose(turned, turns[k], atol=1e-5)]
        counts[k] += 1
    assert min(counts) > 25


def test_cutout_blackens_one_box():
    """cutout: a rectangle of 2 to 33 % of the picture is 0 in all frames, the rest untouched."""
    clip = torch.rand(3, 3, 40, 40) + 0.1
    for seed in range(50):
        cut = common._draw([operator_of("cutout")], clip.clone(), seed)
        gone = (cut == 0).all(dim=(0, 1))
        rows, columns = gone.any(1).sum(), gone.any(0).sum()
        assert gone.sum() == rows * columns and 0.015 < gone.float().mean() < 0.35
        assert torch.equal(cut[..., ~gone], clip[..., ~gone])


def test_noise_has_its_deviation():
    """noise: Gaussian of deviation 0.1 around a grey clip."""
    noisy = common._draw([operator_of("noise")], torch.full((2, 3, 100, 100), 0.5), 1)
    assert noisy.std() == pytest.approx(0.1, rel=0.03)
    assert noisy.mean() == pytest.approx(0.5, abs=0.003)


def test_sobel_is_the_gradient():
    """sobel: a ramp of slope s has the value 2 s everywhere, a flat picture 0."""
    ramp = (torch.arange(20.0) / 40).expand(2, 3, 20, 20)
    edges = common._draw([operator_of("sobel")], ramp, 0)
    torch.testing.assert_close(edges[..., 1:-1], torch.full((2, 3, 20, 18), 2 / 40))
    assert common._draw([operator_of("sobel")], torch.full((1, 3, 9, 9), 0.3), 0).abs().max() < 1e-6


def test_augmentation_has_the_papers_strengths():
    """Crops of 0.2 to 0.766 of the area; gray in a fifth of the clips; flips in half."""
    args = Namespace(**{k: v[0] for k, v in vars(byol.Recipe).items() if k[0] != "_"})
    crop, (flip, jitter, gray, blur) = common._operators(args)
    boxes = [crop.make_params([torch.zeros(3, 256, 340)]) for _ in range(2000)]
    areas = np.array([box["height"] * box["width"] / (256 * 340) for box in boxes])
    assert 0.19 < areas.min() < 0.23 and 0.72 < areas.max() < 0.78
    assert (flip.p, gray.p, jitter.p, blur.p) == (0.5, 0.2, 0.8, 0.5)
    colour, gauss = jitter.transforms[0], blur.transforms[0]
    for strength in (colour.brightness, colour.contrast, colour.saturation):
        assert tuple(strength) == pytest.approx((0.4, 1.6))
    assert tuple(colour.hue) == pytest.approx((-0.15, 0.15))
    assert tuple(gauss.sigma) == (0.1, 2.0)


def test_demo_videos(tmp_path):
    """Real files in class folders, identical for a seed, others for another; made once."""
    folder = common.demo_videos(tmp_path / "a", train=16, val=16)
    again = common.demo_videos(tmp_path / "b", train=16, val=16)
    other = common.demo_videos(tmp_path / "c", seed=1, train=16, val=16)
    names = sorted(path.relative_to(folder) for path in folder.rglob("*.mp4"))
    assert len(names) == 32 and len({name.parent.name for name in names}) == 16
    for name in names:
        assert (folder / name).read_bytes() == (again / name).read_bytes()
        assert (folder / name).read_bytes() != (other / name).read_bytes()
    clip = common.read_clips(folder / names[0], [0.0], 60, 2)
    assert clip.shape == (1, 60, 64, 64, 3) and len(np.unique(clip.reshape(60, -1), axis=0)) == 60
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*.mp4")}
    assert common.demo_videos(folder, train=16, val=16) == folder
    assert before == {path: path.stat().st_mtime_ns for path in folder.rglob("*.mp4")}
    assert not list(tmp_path.glob(".*"))


def test_bfloat16_stays_out_of_the_loss():
    """Features leave the network as float32, also under autocast."""
    model = simclr.SimCLR(arguments(simclr.Recipe))
    with torch.autocast("cpu", torch.bfloat16):
        z = model(torch.randn(2, 2, 3, 4, 16, 16))
    assert z.dtype == torch.float32
    assert math.isfinite(simclr.nt_xent(z, 0.1).item())


def test_scores_are_exact_under_autocast():
    """SwAV's scores are divided by 0.05: they are float32 products, not bfloat16 ones."""
    model = swav.SwAV(arguments(swav.Recipe)).eval()
    with torch.autocast("cpu", torch.bfloat16):
        z, scores = model(torch.randn(2, 2, 3, 4, 16, 16))
    torch.testing.assert_close(scores, z @ model.prototypes.weight.T, atol=1e-6, rtol=0)


def test_short_side_is_drawn_between_its_two_values(folder, monkeypatch):
    """Videos are decoded at every short side from the least to the largest; the clip is --size."""
    args, sizes = arguments(byol.Recipe, short_side=(20, 22), size=16, seed=0), []

    class Reader(common.VideoReader):
        def __init__(self, path, short_side):
            sizes.append(short_side)
            super().__init__(path, short_side)

    monkeypatch.setattr(common, "VideoReader", Reader)
    crop, videos = common._operators(args)[0], common.Videos(folder)
    for epoch in range(40):
        views, *_ = common._views(args, videos, byol.sample_clips, crop, (epoch, 5), [])
        assert views.shape == (2, 8, 3, 16, 16)
    assert set(sizes) == {20, 21, 22}


def test_a_worker_and_the_device_finish_views_alike(folder):
    """On a CPU the worker augments; the same function on the same seeds gives a GPU's views."""
    args = arguments(byol.Recipe, seed=3, batch_size=4, frames=4, size=16, short_side=(24, 24))
    videos = common.Videos(folder)
    done, *_ = common._batch(args, videos, byol.sample_clips, True, 1)
    views, seeds, *_ = common._batch(args, videos, byol.sample_clips, False, 1)
    assert views.dtype == torch.uint8 and views.shape == (4, 2, 4, 3, 16, 16)
    assert torch.equal(common._augment(views, seeds, common._operators(args)[1]), done)
