"""BYOL with rho clips per video.

Paper    Grill et al., 2020 (arXiv 2006.07733); rho clips: Feichtenhofer et al., 2021 (arXiv
         2104.14558), sections 3 and 4; released code: SlowFast, commit 287ec00.
Idea     Predict, from one clip, how a slowly moving copy of the network sees another clip of the
         same video, taken at another time. No other video is pushed away; that all features become
         the same is prevented by the predictor, the slow copy and the stop-gradient.
Loss     2 - 2 cos(q_i, k_j), mean over videos and ordered pairs of views i != j; q = prediction,
         k = projection by the target network.
rho      Clips decoded and encoded by both networks; rho (rho - 1) pairs. rho = 1: one clip,
         augmented twice. The gradient is that of V = max(2, rho) times the mean: a sum over the V
         query clips.
Differs  From the released code: crop before colour; frames 8 apart, not 9; bfloat16 on GPUs; SyncBN
         over all ranks, not the 8 of a machine; the target moves after the step, not before the
         next; the loss has no temperature (0.5 there: the same factor 2). The demo, to learn in
         400 steps: AdamW, a faster target network, no colour jitter and blur.
Recipe   torchrun --nproc_per_node=8 byol.py --data kinetics/train
         Kinetics-400 linear: the released model 67.4 at rho 2, 70.1 at rho 4; not run here.
"""

import copy
import math
from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import nn

import common

# --- recipe


class Recipe:  # name = paper, demo  # meaning, which is the text of --help
    rho = 2, 2  # clips per video, from different times
    timespan = None, None  # seconds in which all rho clips start; None = the whole video
    backbone = "slow_r50", "tiny"  # slow_r50, r2plus1d_18, s3d, s3d_g or tiny
    frames = 8, 8  # frames of a clip
    stride = 8, 4  # from one frame to the next, in 1/30 s
    short_side = (256, 256), (64, 64)  # least and largest of a decoded video, in pixels
    size = 224, 32  # height and width of a clip, cut out of that, in pixels
    augment = "crop,flip,jitter,gray,blur", "crop,flip,gray"  # also rotate,cutout,noise,sobel,none
    crop_area = (0.2, 0.766), (0.4, 1.0)  # least and largest share of the picture in a crop
    epochs = 200, 40  # passes over the videos
    batch_size = 64, 40  # videos of a step, over all processes
    optimizer = "lars", "adamw"  # lars, sgd or adamw
    lr = 0.6, 2.4e-3  # per 128 views; a step's is lr x videos x views / 128
    warmup_epochs = 35.0, 3.0  # of linear warm-up, 0 = none; in proportion to the epochs
    weight_decay = 1e-6, 1e-4  # on all weights but those of BN, 0 = none
    knn_every = 0, 10  # epochs from one kNN accuracy on the labels to the next, 0 = never
    batch_norm = "sync", "sync"  # sync: over all GPUs; plain: over each GPU's share
    projector = (4096, 256), (1024, 64)  # widths of its layers
    projector_bn = True, True  # BN after its hidden layers
    predictor = (4096, 256), (1024, 64)  # widths after the projector's; BN between
    momentum = 0.996, 0.9  # of the target network at first, then up to 1; 0 = a copy, 1 = stays


# --- method


def sample_clips(duration, span, rho, timespan, rng):
    """Start times (seconds) of rho clips: i.i.d. uniform, within `timespan` of each other."""
    first, last = 0.0, max(0.0, duration - span)
    if timespan is not None and timespan < last:
        first = rng.uniform(0.0, last - timespan)
        last = first + timespan
    return rng.uniform(first, last, size=rho).tolist()


def regression_loss(q, k):
    """2 - 2 cos of predictions q and target projections k, both (B, V, D); mean over i != j."""
    V = q.shape[1]
    similarity = torch.einsum("bid,bjd->bij", F.normalize(q, dim=-1), F.normalize(k, dim=-1))
    others = ~torch.eye(V, dtype=torch.bool, device=q.device)  # (V, V): pairs of different views
    return (2 - 2 * similarity[:, others]).mean()


class BYOL(nn.Module):
    def __init__(self, args):
        super().__init__()
        backbone = common.backbone(args.backbone)
        projector = common.mlp((backbone.feature_dim, *args.projector), args.projector_bn)
        self.encoder = nn.Sequential(OrderedDict(backbone=backbone, projector=projector))
        self.predictor = common.mlp((args.projector[-1], *args.predictor), bn=True)
        self.target = copy.deepcopy(self.encoder).requires_grad_(False)
        self.low_memory = args.low_memory

    def forward(self, clips):
        """(B, V, 3, T, H, W) -> predictions, target projections, each (B, V, D)."""
        online = nn.Sequential(self.encoder, self.predictor)
        q = common.per_view(online, clips, self.low_memory)
        with torch.no_grad():
            k = common.per_view(self.target, clips)
        return q, k


def momentum(start, progress):
    """Of the target network: from `start` to 1 along half a cosine (CON:245)."""
    return 1 - (1 - start) * (math.cos(math.pi * progress) + 1) / 2


@torch.no_grad()
def update_target(target, encoder, momentum):
    """target <- momentum * target + (1 - momentum) * encoder; it keeps its own BN statistics."""
    for slow, fast in zip(target.parameters(), encoder.parameters(), strict=True):
        slow.lerp_(fast, 1 - momentum)


# --- training


def main(argv=None):
    args, videos = common.start(Recipe, argv)
    model = BYOL(args)
    network = common.distribute(model, args)
    optimizer = common.make_optimizer(model, args)
    chance = 2.0  # cos of unrelated directions is 0
    for step in common.train(args, videos, model, optimizer, sample_clips, chance):
        with step.autocast():
            q, k = network(step.clips)  # (B, V, D) each, float32
        loss = regression_loss(q, k)
        (args.views * loss).backward()  # the released code sums over the query clips
        m = momentum(args.momentum, step.progress)
        if step.update(loss, features=q, momentum=m):
            update_target(model.target, model.encoder, m)


if __name__ == "__main__":
    main()
