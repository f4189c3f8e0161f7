"""SwAV with rho clips per video.

Paper    Caron et al., 2020 (arXiv 2006.09882); rho clips: Feichtenhofer et al., 2021 (arXiv
         2104.14558), sections 3 and 4; released code: SlowFast, commit 287ec00.
Idea     Assign each clip to prototypes and predict its assignment, the code, from another clip of
         the same video. Codes use all prototypes equally over the batch, by the Sinkhorn algorithm,
         which keeps all clips from being assigned to one.
Loss     - sum over prototypes of code_i log softmax(scores_j / temperature), mean over videos and
         ordered pairs of views i != j.
rho      Clips decoded and encoded; rho (rho - 1) pairs; rho assignment problems, each over view i
         of the videos of all ranks. rho = 1: one clip, augmented twice.
Differs  From the paper: no crops of other sizes, no queue. From the released code: crop before
         colour; frames 8 apart, not 9; bfloat16 on GPUs; codes of all views, not of the first two;
         Sinkhorn over all ranks also on one machine, in the log domain; SyncBN over all ranks. The
         demo, to learn in 400 steps: AdamW, no colour jitter and blur.
Recipe   torchrun --nproc_per_node=8 swav.py --data kinetics/train
         Kinetics-400 linear: the released model 62.6 at rho 2; not run here.
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
    projector_bn = True, True  # BN after its hidden layers
    prototypes = 1000, 300  # to which clips are assigned
    freeze_prototypes = 1.0, 1.0  # epochs in which the prototypes do not learn, 0 = none
    epsilon = 0.05, 0.05  # of Sinkhorn: smaller is nearer to one prototype a clip
    sinkhorn_iterations = 3, 3  # 0 = codes are not balanced
    temperature = 0.1, 0.1  # of the softmax over prototypes that predicts a code


# --- method


def sample_clips(duration, span, rho, timespan, rng):
    """Start times (seconds) of rho clips: i.i.d. uniform, within `timespan` of each other."""
    first, last = 0.0, max(0.0, duration - span)
    if timespan is not None and timespan < last:
        first = rng.uniform(0.0, last - timespan)
        last = first + timespan
    return rng.uniform(first, last, size=rho).tolist()


@torch.no_grad()
def sinkhorn(scores, epsilon, iterations):
    """Codes (B, K) of scores (B, K): rows sum to 1, columns to B / K in the limit (CON:824).

    In the log domain: exp(score / epsilon) overflows if epsilon is below 0.0113. Log-softmax down a
    column is the normalisation of a prototype, along a row that of a clip; constant factors cancel.
    """
    log_codes = scores / epsilon
    for _ in range(iterations):
        log_codes = F.log_softmax(F.log_softmax(log_codes, dim=0), dim=1)
    return F.softmax(log_codes, dim=1)


def swapped_prediction(scores, codes, temperature):
    """Cross-entropy of view i's codes with view j's scores, both (B, V, K); mean over i != j."""
    V = scores.shape[1]
    log_p = F.log_softmax(scores / temperature, dim=-1)  # (B, V, K)
    cross = -torch.einsum("bik,bjk->bij", codes, log_p)  # (B, V, V)
    others = ~torch.eye(V, dtype=torch.bool, device=scores.device)  # (V, V): of different views
    return cross[:, others].mean()


class SwAV(nn.Module):
    def __init__(self, args):
        super().__init__()
        backbone = common.backbone(args.backbone)
        projector = common.mlp((backbone.feature_dim, *args.projector), args.projector_bn)
        self.encoder = nn.Sequential(OrderedDict(backbone=backbone, projector=projector))
        self.prototypes = nn.Linear(args.projector[-1], args.prototypes, bias=False)
        normalize_prototypes(self.prototypes)
        self.low_memory = args.low_memory

    def forward(self, clips):
        """(B, V, 3, T, H, W) -> projections (B, V, D) of unit length, scores (B, V, K)."""
        z = common.per_view(self.encoder, clips, self.low_memory)
        z = F.normalize(z, dim=-1)
        with torch.autocast(z.device.type, enabled=False):  # too coarse to divide by epsilon
            return z, self.prototypes(z)


@torch.no_grad()
def normalize_prototypes(prototypes):
    """To unit length, in place."""
    prototypes.weight.copy_(F.normalize(prototypes.weight, dim=-1))


@torch.no_grad()
def assign(scores, epsilon, iterations):
    """Codes (B, V, K) of this rank's scores (B, V, K), balanced over view i of all ranks."""
    joint = common.gather(scores)  # (W * B, V, K)
    codes = [sinkhorn(view, epsilon, iterations) for view in joint.unbind(1)]
    return torch.stack(codes, dim=1).chunk(common.world_size())[common.rank()]


# --- training


def main(argv=None):
    args, videos = common.start(Recipe, argv)
    model = SwAV(args)
    network = common.distribute(model, args)
    optimizer = common.make_optimizer(model, args)
    chance = math.log(args.prototypes)  # all prototypes alike
    if args.prototypes > args.batch_size and args.freeze_prototypes < args.epochs:
        common.say(
            f"WARN {args.prototypes} prototypes learn from {args.batch_size} videos a step: fewer "
            f"--prototypes, a larger --batch-size or --freeze-prototypes {args.epochs} may help"
        )
    for step in common.train(args, videos, model, optimizer, sample_clips, chance):
        with step.autocast():
            z, scores = network(step.clips)  # (B, V, D), (B, V, K), float32
        codes = assign(scores, args.epsilon, args.sinkhorn_iterations)  # (B, V, K)
        loss = swapped_prediction(scores, codes, args.temperature)
        loss.backward()
        if step.epoch < args.freeze_prototypes:
            model.prototypes.weight.grad = None
        if step.update(loss, features=z):
            normalize_prototypes(model.prototypes)


if __name__ == "__main__":
    main()
