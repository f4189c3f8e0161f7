"""SimCLR with rho clips per video.

Paper    Chen et al., 2020 (arXiv 2002.05709); rho clips: Feichtenhofer et al., 2021 (arXiv
         2104.14558), sections 3 and 4; released code: SlowFast, commit 287ec00.
Idea     Pull the clips of one video together and push them away from the clips of all other videos
         of the batch, on all GPUs. The push prevents collapse (all features equal).
Loss     -log(e^s_ij / (e^s_ij + sum over views n of other videos of e^s_in)), the mean over videos
         and ordered pairs of views i != j; s = cos(z_i, z_j) / temperature.
rho      V = max(2, rho) views of a video: rho clips or, at rho 1, one clip augmented twice. Each of
         the V (V - 1) ordered pairs has its own softmax, with no other positive in it; eq. (1) of
         the paper has one for all positives of a clip (the same at V = 2).
Recipe   torchrun --nproc_per_node=8 simclr.py --data kinetics/train
         The released configuration; BN in the projector is the paper's. K400 linear, released
         model: 61.5 at rho 2; paper: 60.5 at rho 2, 62.0 at rho 3.
"""

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
    short_side: tuple[int, int] = arg((224, 224), "range of the resized short side, in pixels")
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
    projector: tuple[int, ...] = arg((2048, 2048, 128), "layer widths of the projector")
    projector_bn: bool = arg(True, "BN after the projector's hidden layers")
    temperature: float = arg(0.1, "softmax temperature")


# defaults if --data is missing or --small is given: they learn in minutes on a CPU
DEMO = common.DEMO | dict(lr=4.8e-3, projector=(256, 64), projector_bn=True)
DEMO |= dict(temperature=0.2)


# --- method


def sample_clips(duration, clip_seconds, rho, timespan, rng):
    """Starts (rho,) of the clips in seconds: i.i.d. uniform, in a random window of `timespan`."""
    first, last = 0.0, max(0.0, duration - clip_seconds)
    if timespan < last:
        first = rng.uniform(0.0, last - timespan)
        last = first + timespan
    return rng.uniform(first, last, size=rho)


def nt_xent(z, temperature):
    """NT-Xent: view i must identify view j of the same video among all views of the other videos.

    z (B, V, D) -> the mean over pairs i != j."""
    B, V, _ = z.shape
    z = F.normalize(z, dim=-1)
    similarity = torch.einsum("bid,njd->binj", z, z) / temperature  # (B, V, B, V)
    same_video = torch.eye(B, dtype=torch.bool, device=z.device)[:, None, :, None]  # (B, 1, B, 1)
    negatives = similarity.masked_fill(same_video, -math.inf).flatten(2).logsumexp(-1)  # (B, V)
    positives = similarity.diagonal(dim1=0, dim2=2).permute(2, 0, 1)  # (B, V, V)
    losses = F.softplus(negatives[:, :, None] - positives)  # -log(e^p / (e^p + e^n))
    different_views = 1 - torch.eye(V, device=z.device)  # (V, V)
    return (losses * different_views).sum() / (B * V * (V - 1))


class SimCLR(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        backbone = common.backbone(cfg.backbone)
        projector = common.mlp((backbone.feature_dim, *cfg.projector), cfg.projector_bn)
        self.encoder = nn.Sequential(OrderedDict(backbone=backbone, projector=projector))
        self.low_memory = cfg.low_memory

    def forward(self, clips):
        """(B, V, 3, T, H, W) -> projections (B, V, D), float32."""
        return common.encode_views(self.encoder, clips, self.low_memory)


# --- training


def main(argv=None):
    cfg = common.parse_args(Config, DEMO, argv)
    common.init_distributed(cfg)
    dataset = common.VideoClips(cfg, sample_clips)
    model = SimCLR(cfg).to(common.device())
    network = common.wrap_ddp(model, cfg)
    optimizer = common.make_optimizer(model, cfg)
    chance = math.log(1 + cfg.num_views * (cfg.batch_size - 1))  # all views alike
    run = common.Run(cfg, dataset, model, optimizer, chance)
    for batch in run.batches():  # sets the lr, logs, saves, resumes; ends at a NaN in the log
        with common.autocast():
            z = network(batch["clips"])  # (B, V, D), float32
        z = common.gather(z)  # (W * B, V, D): the negatives are those of all ranks
        loss = nt_xent(z, cfg.temperature)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        run.record(loss, features=z)


if __name__ == "__main__":
    main()
