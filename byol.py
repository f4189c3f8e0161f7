"""BYOL with rho clips per video.

Paper    Grill et al., 2020 (arXiv 2006.07733); rho clips: Feichtenhofer et al., 2021 (arXiv
         2104.14558), sections 3 and 4; released code: SlowFast, commit 287ec00.
Idea     Predict, from one clip, what a slowly moving copy of the network (the target) outputs for
         another clip of the same video. The predictor, the slow copy and the stop-gradient keep
         training away from collapse (all features equal), which would minimise the loss. Why they
         suffice is not fully understood.
Loss     2 - 2 cos(q_i, k_j), the mean over videos and ordered pairs of views i != j; q is the
         prediction, k the projection by the target.
rho      V = max(2, rho) views of a video: rho clips or, at rho 1, one clip augmented twice. Each
         goes through both networks; V (V - 1) ordered positive pairs.
Recipe   torchrun --nproc_per_node=8 byol.py --data kinetics/train
         The released configuration. K400 linear, released model: 67.4 at rho 2, 70.1 at rho 4;
         paper: 65.8 and 68.9.
"""

import copy
import math
from collections import OrderedDict
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

import common
from common import arg

# --- config


@dataclass
class Config(common.Config):
    rho: int = arg(2, "clips per video, at different times (1: one clip, augmented twice)")
    timespan: float = arg(math.inf, "all clips of a video start within this many seconds")
    backbone: str = arg("slow_r50", "the network", choices=common.BACKBONES)
    frames: int = arg(8, "frames per clip")
    stride: int = arg(8, "temporal stride, in frames at 30 fps")
    short_side: tuple[int, int] = arg((256, 256), "range of the resized short side, in pixels")
    size: int = arg(224, "crop size in pixels")
    augment: str = arg("crop,flip,jitter,gray,blur", "a list; also rotate,cutout,noise,sobel; none")
    crop_area: tuple[float, float] = arg((0.2, 0.766), "min and max crop area / frame area")
    color_strength: float = arg(0.75, "strength of the color jitter")
    epochs: int = arg(200, "passes over the videos")
    batch_size: int = arg(64, "global batch size, in videos")
    optimizer: str = arg("lars", "the optimizer", choices=common.OPTIMIZERS)
    lr: float = arg(0.6, "base learning rate per 128 views of the global batch; half a cosine")
    warmup: float = arg(0.175, "linear warm-up, as a share of the run, to the cosine's value then")
    weight_decay: float = arg(1e-6, "weight decay, of all parameters but BN's")
    knn_every: int = arg(0, "run the kNN evaluation every N epochs (0: never)")
    sync_bn: bool = arg(True, "on GPUs: BN statistics over all ranks")
    projector: tuple[int, ...] = arg((4096, 256), "layer widths of the projector")
    projector_bn: bool = arg(True, "BN after the projector's hidden layers")
    predictor: tuple[int, ...] = arg((4096, 256), "layer widths of the predictor, with BN")
    target_momentum: float = arg(0.996, "initial EMA momentum of the target network")
    target_momentum_end: float = arg(1.0, "final EMA momentum (equal to the initial one: constant)")


# defaults if --data is missing or --small is given: they learn in minutes on a CPU
DEMO = common.DEMO | dict(lr=2.4e-3, batch_size=20, projector=(1024, 64), projector_bn=True)
DEMO |= dict(predictor=(1024, 64), target_momentum=0.9)


# --- method


def sample_clips(duration, clip_seconds, rho, timespan, rng):
    """Starts (rho,) of the clips in seconds: i.i.d. uniform, in a random window of `timespan`."""
    first, last = 0.0, max(0.0, duration - clip_seconds)
    if timespan < last:
        first = rng.uniform(0.0, last - timespan)
        last = first + timespan
    return rng.uniform(first, last, size=rho)


def regression_loss(q, k):
    """2 - 2 cos of predictions q and target projections k, (B, V, D) each: the mean over pairs
    i != j."""
    B, V, _ = q.shape
    q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
    losses = 2 - 2 * torch.einsum("bid,bjd->bij", q, k)  # (B, V, V)
    different_views = 1 - torch.eye(V, device=q.device)  # (V, V)
    return (losses * different_views).sum() / (B * V * (V - 1))


class BYOL(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        backbone = common.backbone(cfg.backbone)
        projector = common.mlp((backbone.feature_dim, *cfg.projector), cfg.projector_bn)
        self.encoder = nn.Sequential(OrderedDict(backbone=backbone, projector=projector))
        self.predictor = common.mlp((cfg.projector[-1], *cfg.predictor), bn=True)
        self.target = copy.deepcopy(self.encoder).requires_grad_(False)
        self.low_memory = cfg.low_memory

    def forward(self, clips):
        """(B, V, 3, T, H, W) -> predictions, target projections, each (B, V, D), float32."""
        online = nn.Sequential(self.encoder, self.predictor)  # one network: recomputed as one
        q = common.encode_views(online, clips, self.low_memory)
        with torch.no_grad():
            k = common.encode_views(self.target, clips)
        return q, k


def target_momentum(start, end, progress):
    """EMA momentum: half a cosine from start to end (released contrastive.py, line 245)."""
    return end - (end - start) * (math.cos(math.pi * progress) + 1) / 2


@torch.no_grad()
def update_target(target, encoder, momentum):
    """target <- momentum * target + (1 - momentum) * encoder; BN has its own statistics."""
    for slow, fast in zip(target.parameters(), encoder.parameters(), strict=True):
        slow.lerp_(fast, 1 - momentum)


# --- training


def main(argv=None):
    cfg = common.parse_args(Config, DEMO, argv)
    common.init_distributed(cfg)
    dataset = common.VideoClips(cfg, sample_clips)
    model = BYOL(cfg).to(common.device())
    network = common.wrap_ddp(model, cfg)
    optimizer = common.make_optimizer(model, cfg)
    chance = 2.0  # orthogonal features: cos = 0
    run = common.Run(cfg, dataset, model, optimizer, chance)
    for batch in run.batches():  # sets the lr, logs, saves, resumes; ends at a NaN in the log
        with common.autocast():
            q, k = network(batch["clips"])  # (B, V, D) each, float32
        loss = regression_loss(q, k)
        optimizer.zero_grad()
        (cfg.num_views * loss).backward()  # sum over a video's V queries, as in the released code
        optimizer.step()
        m = target_momentum(cfg.target_momentum, cfg.target_momentum_end, run.progress)
        update_target(model.target, model.encoder, m)
        run.record(loss, features=q, target_momentum=m)


if __name__ == "__main__":
    main()
