"""MoCo with rho clips per video.

Paper    He et al., 2020 (arXiv 1911.05722); rho clips: Feichtenhofer et al., 2021 (arXiv
         2104.14558), sections 3 and 4; released code: SlowFast, commit 287ec00.
Idea     Find, for a clip, another clip of the same video among many of other videos. Those are
         remembered in a queue of keys from earlier steps, which a slowly moving copy of the network
         makes, so that old and new keys agree; the batch may be small.
Loss     -log(e^s_ij / (e^s_ij + sum over the queue of e^s_in)), mean over videos and ordered pairs
         of views i != j; s = q_i . k_j / temperature; k by the target network.
rho      Clips decoded and encoded by both networks; rho (rho - 1) pairs; rho keys of a video enter
         the queue. rho = 1: one clip, augmented twice. The gradient is that of V = max(2, rho)
         times the mean: a sum over the V query clips.
Differs  From the released code: crop before colour; frames 8 apart, not 9; bfloat16, not fp16; the
         keys of all ranks are enqueued, not rank 0's, and shuffled over all ranks, not the 8 of a
         machine; no step is skipped while the queue fills; the target moves after the step, not
         before the next. The demo, to learn in 400 steps: AdamW, BN in the projector, a faster
         target network, no colour jitter and blur.
Recipe   torchrun --nproc_per_node=8 moco.py --data kinetics/train
         Kinetics-400 linear: the released model 66.6 at rho 2, 71.0 at rho 4; not run here.
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
    optimizer = "sgd", "adamw"  # lars, sgd or adamw
    lr = 0.05, 4.8e-3  # per 128 views; a step's is lr x videos x views / 128
    warmup_epochs = 35.0, 3.0  # of linear warm-up, 0 = none; in proportion to the epochs
    weight_decay = 1e-4, 1e-4  # on all weights but those of BN, 0 = none
    knn_every = 0, 10  # epochs from one kNN accuracy on the labels to the next, 0 = never
    batch_norm = "plain", "plain"  # sync: over all GPUs; plain: over each GPU's share
    projector = (2048, 2048, 128), (256, 64)  # widths of its layers
    projector_bn = False, True  # BN after its hidden layers
    momentum = 0.994, 0.95  # of the target network at first, then up to 1; 0 = a copy, 1 = stays
    queue = 65536, 240  # keys that are remembered
    temperature = 0.1, 0.2  # of the softmax over one positive and the queue


# --- method


def sample_clips(duration, span, rho, timespan, rng):
    """Start times (seconds) of rho clips: i.i.d. uniform, within `timespan` of each other."""
    first, last = 0.0, max(0.0, duration - span)
    if timespan is not None and timespan < last:
        first = rng.uniform(0.0, last - timespan)
        last = first + timespan
    return rng.uniform(first, last, size=rho).tolist()


def info_nce(q, k, queue, temperature):
    """Tell keys k of a video's other views from the queue (K, D) by its queries q, both (B, V, D);
    all of unit length; mean over i != j, 0 for an empty queue."""
    V = q.shape[1]
    negatives = (torch.einsum("bid,nd->bin", q, queue) / temperature).logsumexp(dim=-1)  # (B, V)
    positives = torch.einsum("bid,bjd->bij", q, k) / temperature  # (B, V, V)
    others = ~torch.eye(V, dtype=torch.bool, device=q.device)  # (V, V): pairs of different views
    losses = F.softplus(negatives[:, :, None] - positives)  # softplus(n - p) = -log softmax
    return losses[:, others].mean()


class MoCo(nn.Module):
    def __init__(self, args):
        super().__init__()
        backbone = common.backbone(args.backbone)
        projector = common.mlp((backbone.feature_dim, *args.projector), args.projector_bn)
        self.encoder = nn.Sequential(OrderedDict(backbone=backbone, projector=projector))
        self.target = copy.deepcopy(self.encoder).requires_grad_(False)
        self.register_buffer("queue", torch.zeros(args.queue, args.projector[-1]))
        self.enqueued = 0  # keys so far; a number, so that no step waits for the GPU to know it
        self.low_memory = args.low_memory

    def forward(self, clips):
        """(B, V, 3, T, H, W) -> queries, keys, each (B, V, D) of unit length."""
        q = common.per_view(self.encoder, clips, self.low_memory)
        with torch.no_grad():
            k = shuffled(self.target, clips, seed=self.enqueued)
        return F.normalize(q, dim=-1), F.normalize(k, dim=-1)

    def get_extra_state(self):  # for the checkpoint
        return torch.tensor(self.enqueued)

    def set_extra_state(self, state):
        self.enqueued = int(state)


def shuffled(network, clips, seed):
    """Run the network on clips of other ranks, (B, V, ...) -> (B, V, D): a key's BN batch is not
    its query's, so that BN statistics do not tell which is the positive (CON:169)."""
    clips = common.gather(clips)  # (W * B, V, ...)
    order = torch.arange(len(clips))  # (W * B,): which clip is at each place
    if common.world_size() > 1:
        order = torch.randperm(len(clips), generator=torch.Generator().manual_seed(seed))
    mine = order.chunk(common.world_size())[common.rank()]  # (B,)
    keys = common.gather(common.per_view(network, clips[mine]))  # (W * B, V, D), shuffled
    return keys[order.argsort()].chunk(common.world_size())[common.rank()]


def momentum(start, progress):
    """Of the target network: from `start` to 1 along half a cosine (CON:245)."""
    return 1 - (1 - start) * (math.cos(math.pi * progress) + 1) / 2


@torch.no_grad()
def update_target(target, encoder, momentum):
    """target <- momentum * target + (1 - momentum) * encoder; it keeps its own BN statistics."""
    for slow, fast in zip(target.parameters(), encoder.parameters(), strict=True):
        slow.lerp_(fast, 1 - momentum)


@torch.no_grad()
def enqueue(model, keys):
    """The keys (W * B, V, D) of all ranks, video by video, take the place of the oldest."""
    keys, K = keys.flatten(0, 1), len(model.queue)
    places = (model.enqueued + torch.arange(len(keys), device=keys.device)) % K
    model.queue[places[-K:]] = keys[-K:]
    model.enqueued += len(keys)


# --- training


def main(argv=None):
    args, videos = common.start(Recipe, argv)
    model = MoCo(args)
    network = common.distribute(model, args)
    optimizer = common.make_optimizer(model, args)
    chance = math.log(args.queue + 1)  # all keys alike, the queue full
    if common.world_size() == 1:
        common.say("one process: keys are not shuffled for BN")
    if args.queue > args.views * len(videos):
        common.say(f"WARN the queue is longer than all views of {len(videos)} videos: --queue less")
    for step in common.train(args, videos, model, optimizer, sample_clips, chance):
        with step.autocast():
            q, k = network(step.clips)  # (B, V, D) each, float32
        filled = min(model.enqueued, args.queue)
        loss = info_nce(q, k, model.queue[:filled], args.temperature)
        (args.views * loss).backward()  # the released code sums over the query clips
        m = momentum(args.momentum, step.progress)
        if step.update(loss, features=q, momentum=m, queue_filled=filled / args.queue):
            update_target(model.target, model.encoder, m)
            enqueue(model, common.gather(k))


if __name__ == "__main__":
    main()
