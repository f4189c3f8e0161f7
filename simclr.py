"""SimCLR with rho clips per video.

Paper    Chen et al., 2020 (arXiv 2002.05709); rho clips: Feichtenhofer et al., 2021 (arXiv
         2104.14558), sections 3 and 4; released code: SlowFast, commit 287ec00.
Idea     Clips of one video, from different times, are pulled together; clips of all other videos of
         the batch, on all GPUs, are pushed away, which keeps the features from becoming the same.
Loss     -log(e^s_ij / (e^s_ij + sum over views n of other videos of e^s_in)), mean over videos and
         ordered pairs of views i != j; s = z_i . z_j / temperature.
rho      Clips decoded and encoded; rho (rho - 1) positive pairs of a video, none of which is in the
         denominator of another. rho = 1: one clip, augmented twice.
Differs  From the released code: crop before colour; frames 8 apart, not 9; bfloat16 on GPUs; all
         ordered pairs, not a chain of neighbours; SyncBN over all ranks, not the 8 of a machine.
         The demo, to learn in 400 steps: AdamW, BN in the projector, no colour jitter and blur.
Recipe   torchrun --nproc_per_node=8 simclr.py --data kinetics/train
         Kinetics-400 linear: the released model 61.5 at rho 2; not run here.
"""

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
    short_side = (224, 224), (64, 64)  # least and largest of a decoded video, in pixels
    size = 224, 32  # height and width of a clip, cut out of that, in pixels
    augment = "crop,flip,jitter,gray,blur", "crop,flip,gray"  # also rotate,cutout,noise,sobel,none
    crop_area = (0.2, 0.766), (0.4, 1.0)  # least and largest share of the picture in a crop
    epochs = 200, 40  # passes over the videos
    batch_size = 64, 40  # videos of a step, over all processes
    optimizer = "lars", "adamw"  # lars, sgd or adamw
    lr = 0.6, 4.8e-3  # per 128 views; a step's is lr x videos x views / 128
    warmup_epochs = 35.0, 3.0  # of linear warm-up, 0 = none; in proportion to the epochs
    weight_decay = 1e-6, 1e-4  # on all weights but those of BN, 0 = none
    knn_every = 0, 10  # epochs from one kNN accuracy on the labels to the next, 0 = never
    batch_norm = "sync", "sync"  # sync: over all GPUs; plain: over each GPU's share
    projector = (2048, 2048, 128), (256, 64)  # widths of its layers
    projector_bn = False, True  # BN after its hidden layers
    temperature = 0.1, 0.2  # of the softmax over one positive and all negatives


# --- method


def sample_clips(duration, span, rho, timespan, rng):
    """Start times (seconds) of rho clips: i.i.d. uniform, within `timespan` of each other."""
    first, last = 0.0, max(0.0, duration - span)
    if timespan is not None and timespan < last:
        first = rng.uniform(0.0, last - timespan)
        last = first + timespan
    return rng.uniform(first, last, size=rho).tolist()


def nt_xent(z, temperature):
    """Find view j of the same video by view i among the views of all other videos: z (B, V, D) of
    unit length; mean over i != j."""
    B, V, _ = z.shape
    similarity = torch.einsum("bid,njd->binj", z, z) / temperature  # (B, V, B, V)
    own = torch.eye(B, dtype=torch.bool, device=z.device)[:, None, :, None]  # (B, 1, B, 1)
    negatives = similarity.masked_fill(own, -math.inf).flatten(2).logsumexp(dim=-1)  # (B, V)
    positives = similarity.diagonal(dim1=0, dim2=2).permute(2, 0, 1)  # (B, V, V)
    others = ~torch.eye(V, dtype=torch.bool, device=z.device)  # (V, V): pairs of different views
    losses = F.softplus(negatives[:, :, None] - positives)  # softplus(n - p) = -log softmax
    return losses[:, others].mean()


class SimCLR(nn.Module):
    def __init__(self, args):
        super().__init__()
        backbone = common.backbone(args.backbone)
        projector = common.mlp((backbone.feature_dim, *args.projector), args.projector_bn)
        self.encoder = nn.Sequential(OrderedDict(backbone=backbone, projector=projector))
        self.low_memory = args.low_memory

    def forward(self, clips):
        """(B, V, 3, T, H, W) -> projections (B, V, D) of unit length."""
        z = common.per_view(self.encoder, clips, self.low_memory)
        return F.normalize(z, dim=-1)


# --- training


def main(argv=None):
    args, videos = common.start(Recipe, argv)
    model = SimCLR(args)
    network = common.distribute(model, args)
    optimizer = common.make_optimizer(model, args)
    chance = math.log(1 + args.views * (args.batch_size - 1))  # all views alike
    for step in common.train(args, videos, model, optimizer, sample_clips, chance):
        with step.autocast():
            z = network(step.clips)  # (B, V, D), float32
        z = common.gather(z)  # (W * B, V, D): the negatives are those of all ranks
        loss = nt_xent(z, args.temperature)
        loss.backward()
        step.update(loss, features=z)


if __name__ == "__main__":
    main()
