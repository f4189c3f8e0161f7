"""MoCo with rho clips per video.

Paper    He et al., 2020 (arXiv 1911.05722); rho clips: Feichtenhofer et al., 2021 (arXiv
         2104.14558), sections 3 and 4; released code: SlowFast, commit 287ec00.
Idea     Match a query clip to another clip of the same video among many negatives. The negatives
         are keys from earlier steps, kept in a queue. A slow copy of the encoder (the target)
         computes the keys, so that old and new keys stay comparable. The batch can be small.
Loss     -log(e^s_ij / (e^s_ij + sum of e^s_in over the queue's keys n)), the mean over videos and
         ordered pairs of views i != j; s_ij = cos(q_i, k_j) / temperature; k from the target.
rho      V = max(2, rho) views of a video: rho clips or, at rho 1, one clip augmented twice. Each of
         the V (V - 1) ordered pairs has its own softmax; eq. (1) of the paper has one for all
         positives of a query (the same at V = 2). V keys per video enter the queue.
Recipe   torchrun --nproc_per_node=8 moco.py --data kinetics/train
         The released configuration. K400 linear at rho 2, 4: released 66.6, 71.0; paper 65.8, 67.8.
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
    optimizer: str = arg("sgd", "the optimizer", choices=common.OPTIMIZERS)
    lr: float = arg(0.05, "base learning rate per 128 views of the global batch; half a cosine")
    warmup: float = arg(0.175, "linear warm-up, as a share of the run, to the cosine's value then")
    weight_decay: float = arg(1e-4, "weight decay, of all parameters but BN's")
    knn_every: int = arg(0, "run the kNN evaluation every N epochs (0: never)")
    sync_bn: bool = arg(False, "on GPUs: BN statistics over all ranks")
    projector: tuple[int, ...] = arg((2048, 2048, 128), "layer widths of the projector")
    projector_bn: bool = arg(False, "BN after the projector's hidden layers")
    temperature: float = arg(0.1, "softmax temperature")
    target_momentum: float = arg(0.994, "initial EMA momentum of the target network")
    target_momentum_end: float = arg(1.0, "final EMA momentum (equal to the initial one: constant)")
    queue: int = arg(65536, "queue length, in keys")


# defaults if --data is missing or --small is given: they learn in minutes on a CPU
DEMO = common.DEMO | dict(lr=4.8e-3, projector=(256, 64), projector_bn=True)
DEMO |= dict(temperature=0.2, target_momentum=0.95, queue=240)


# --- method


def sample_clips(duration, clip_seconds, rho, timespan, rng):
    """Starts (rho,) of the clips in seconds: i.i.d. uniform, in a random window of `timespan`."""
    first, last = 0.0, max(0.0, duration - clip_seconds)
    if timespan < last:
        first = rng.uniform(0.0, last - timespan)
        last = first + timespan
    return rng.uniform(first, last, size=rho)


def info_nce(q, k, queue, temperature):
    """InfoNCE: each query must tell the key of another view of its video from the queue's. q, k
    (B, V, D), queue (K, D), its rows of unit length -> the mean over pairs i != j; 0 if K = 0."""
    B, V, _ = q.shape
    q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
    negatives = (torch.einsum("bid,nd->bin", q, queue) / temperature).logsumexp(dim=-1)  # (B, V)
    positives = torch.einsum("bid,bjd->bij", q, k) / temperature  # (B, V, V)
    losses = F.softplus(negatives[:, :, None] - positives)  # -log(e^p / (e^p + sum e^n))
    different_views = 1 - torch.eye(V, device=q.device)  # (V, V)
    return (losses * different_views).sum() / (B * V * (V - 1))


class MoCo(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        backbone = common.backbone(cfg.backbone)
        projector = common.mlp((backbone.feature_dim, *cfg.projector), cfg.projector_bn)
        self.encoder = nn.Sequential(OrderedDict(backbone=backbone, projector=projector))
        self.target = copy.deepcopy(self.encoder).requires_grad_(False)
        self.register_buffer("queue", torch.zeros(cfg.queue, cfg.projector[-1]))
        self.enqueued = 0  # keys so far, of all ranks; a Python int, to avoid a GPU sync
        self.low_memory = cfg.low_memory

    def forward(self, clips):
        """(B, V, 3, T, H, W) -> queries, keys, each (B, V, D), float32."""
        q = common.encode_views(self.encoder, clips, self.low_memory)
        with torch.no_grad():
            k = encode_shuffled(self.target, clips, seed=self.enqueued)  # which all ranks share
        return q, k

    def get_extra_state(self):  # for the checkpoint
        return torch.tensor(self.enqueued)

    def set_extra_state(self, state):
        self.enqueued = int(state)


def encode_shuffled(network, clips, seed):
    """Shuffling BN (MoCo, section 3.3): (B, V, ...) -> (B, V, D). Each rank encodes a random share
    of all ranks' videos: in one batch, BN statistics could tell a query which key is its own."""
    if common.world_size() == 1:  # one batch: nothing to shuffle
        return common.encode_views(network, clips)
    bf16 = torch.is_autocast_enabled("cuda")  # the network would convert them: send half the bytes
    clips = common.gather(clips.bfloat16() if bf16 else clips)  # (W * B, V, ...)
    order = torch.randperm(len(clips), generator=torch.Generator().manual_seed(seed))  # (W * B,)
    order = order.to(clips.device, non_blocking=True)  # else each use would wait for the GPU
    keys = common.encode_views(network, clips[common.local_part(order)])  # (B, V, D), shuffled
    return common.local_part(common.gather(keys)[order.argsort()])  # unshuffled


def target_momentum(start, end, progress):
    """EMA momentum: half a cosine from start to end (released contrastive.py, line 245)."""
    return end - (end - start) * (math.cos(math.pi * progress) + 1) / 2


@torch.no_grad()
def update_target(target, encoder, momentum):
    """target <- momentum * target + (1 - momentum) * encoder; BN has its own statistics."""
    for slow, fast in zip(target.parameters(), encoder.parameters(), strict=True):
        slow.lerp_(fast, 1 - momentum)


@torch.no_grad()
def enqueue(model, keys):
    """Replace the oldest keys by unit keys (W * B, V, D): rank by rank, video by video."""
    keys = keys.flatten(0, 1)
    K = len(model.queue)
    places = (model.enqueued + torch.arange(len(keys), device=keys.device)) % K
    model.queue[places[-K:]] = keys[-K:]  # at most the last K
    model.enqueued += len(keys)


# --- training


def main(argv=None):
    cfg = common.parse_args(Config, DEMO, argv)
    if cfg.queue < 1:
        common.fail("--queue must be 1 or more")
    common.init_distributed(cfg)
    dataset = common.VideoClips(cfg, sample_clips)
    model = MoCo(cfg).to(common.device())
    network = common.wrap_ddp(model, cfg)
    optimizer = common.make_optimizer(model, cfg)
    chance = math.log(cfg.queue + 1)  # equal keys, a full queue; while it fills: log(filled + 1)
    run = common.Run(cfg, dataset, model, optimizer, chance)
    if cfg.queue > cfg.num_views * len(dataset):
        common.print_main("WARN the queue will hold a video's own old keys; use a smaller --queue")
    for batch in run.batches():  # sets the lr, logs, saves, resumes; ends at a NaN in the log
        with common.autocast():
            q, k = network(batch["clips"])  # (B, V, D) each, float32
        filled = min(model.enqueued, cfg.queue)
        loss = info_nce(q, k, model.queue[:filled], cfg.temperature)
        optimizer.zero_grad()
        (cfg.num_views * loss).backward()  # sum over a video's V queries, as in the released code
        optimizer.step()
        m = target_momentum(cfg.target_momentum, cfg.target_momentum_end, run.progress)
        update_target(model.target, model.encoder, m)
        enqueue(model, common.gather(F.normalize(k, dim=-1)))
        run.record(loss, features=q, target_momentum=m, queue_filled=filled / cfg.queue)


if __name__ == "__main__":
    main()
