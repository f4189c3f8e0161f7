"""SwAV with rho clips per video.

Paper    Caron et al., 2020 (arXiv 2006.09882); rho clips: Feichtenhofer et al., 2021 (arXiv
         2104.14558), sections 3 and 4; released code: SlowFast, commit 287ec00.
Idea     Assign each clip to prototypes and predict its assignment, the code, from another clip of
         the same video. Sinkhorn balances the codes over the batch so that all prototypes are used,
         which rules out the trivial solution.
Loss     - sum over prototypes of code_i log softmax(scores_j / temperature), the mean over videos
         and ordered pairs of views i != j.
rho      V = max(2, rho) views of a video: rho clips or, at rho 1, one clip augmented twice. V
         assignments, each of view i of all ranks' videos; V (V - 1) ordered pairs.
Recipe   torchrun --nproc_per_node=8 swav.py --data kinetics/train
         The released configuration. K400 linear, released model: 62.6 at rho 2; paper: 61.6 at
         rho 2, 62.7 at rho 3.
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
    temperature: float = arg(0.1, "softmax temperature of the prediction")
    prototypes: int = arg(1000, "number of prototypes")
    freeze_prototypes: float = arg(1.0, "freeze the prototypes for the first N epochs")
    epsilon: float = arg(0.05, "Sinkhorn regularisation; smaller: nearer to one prototype a clip")
    sinkhorn_iterations: int = arg(3, "Sinkhorn iterations (0: codes are not balanced)")
    feature_queue: int = arg(0, "features per view, of earlier steps, that codes are balanced over")
    queue_from: float = arg(15.0, "use the feature queue from this epoch on, once it is full")


# defaults if --data is missing or --small is given: they learn in minutes on a CPU
DEMO = common.DEMO | dict(lr=4.8e-3, projector=(256, 64), projector_bn=True)
DEMO |= dict(prototypes=300)


# --- method


def sample_clips(duration, clip_seconds, rho, timespan, rng):
    """Starts (rho,) of the clips in seconds: i.i.d. uniform, in a random window of `timespan`."""
    first, last = 0.0, max(0.0, duration - clip_seconds)
    if timespan < last:
        first = rng.uniform(0.0, last - timespan)
        last = first + timespan
    return rng.uniform(first, last, size=rho)


@torch.no_grad()
def sinkhorn(scores, epsilon, iterations):
    """Codes (B, K) of scores (B, K): rows sum to 1, columns to B / K in the limit.

    In the log domain, as exp(score / epsilon) overflows for a small epsilon: log-softmax down a
    column normalises a prototype, along a row a clip; constant factors cancel (released
    contrastive.py, line 824, has the exponential form)."""
    log_codes = scores / epsilon
    for _ in range(iterations):
        log_codes = F.log_softmax(log_codes, dim=0)
        log_codes = F.log_softmax(log_codes, dim=1)
    return F.softmax(log_codes, dim=1)


def swapped_prediction(scores, codes, temperature):
    """Cross-entropy of view i's codes and view j's scores, (B, V, K) each: the mean over pairs
    i != j."""
    B, V, _ = scores.shape
    log_p = F.log_softmax(scores / temperature, dim=-1)  # (B, V, K)
    losses = -torch.einsum("bik,bjk->bij", codes, log_p)  # (B, V, V)
    different_views = 1 - torch.eye(V, device=scores.device)  # (V, V)
    return (losses * different_views).sum() / (B * V * (V - 1))


class SwAV(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        backbone = common.backbone(cfg.backbone)
        projector = common.mlp((backbone.feature_dim, *cfg.projector), cfg.projector_bn)
        self.encoder = nn.Sequential(OrderedDict(backbone=backbone, projector=projector))
        self.prototypes = nn.Linear(cfg.projector[-1], cfg.prototypes, bias=False)
        normalize_prototypes(self.prototypes)
        self.register_buffer(
            "queue", torch.zeros(cfg.num_views, cfg.feature_queue, cfg.projector[-1])
        )
        self.enqueued = 0  # features per view so far; a Python int, to avoid a GPU sync
        self.low_memory = cfg.low_memory

    def forward(self, clips):
        """(B, V, 3, T, H, W) -> projections (B, V, D) of unit length, scores (B, V, K), float32."""
        z = common.encode_views(self.encoder, clips, self.low_memory)
        z = F.normalize(z, dim=-1)
        with torch.autocast(z.device.type, enabled=False):  # bfloat16 / epsilon is too coarse
            return z, self.prototypes(z)

    def get_extra_state(self):  # for the checkpoint
        return torch.tensor(self.enqueued)

    def set_extra_state(self, state):
        self.enqueued = int(state)


@torch.no_grad()
def normalize_prototypes(prototypes):
    """To unit length, in place."""
    prototypes.weight.copy_(F.normalize(prototypes.weight, dim=-1))


@torch.no_grad()
def assign(scores, epsilon, iterations, queue_scores=None):
    """Codes (B, V, K) of this rank's scores (B, V, K), balanced over view i of all ranks and, if
    given, over the scores of earlier features, (V, N, K) (SwAV, section 3.1)."""
    joint = common.gather(scores)  # (W * B, V, K)
    codes = []
    for i, view in enumerate(joint.unbind(1)):
        if queue_scores is not None:
            view = torch.cat([view, queue_scores[i]])  # (W * B + N, K)
        codes.append(sinkhorn(view, epsilon, iterations)[: len(joint)])
    return common.local_part(torch.stack(codes, dim=1))


@torch.no_grad()
def enqueue_features(model, z):
    """Replace the oldest features of each view's queue by z (W * B, V, D) of all ranks."""
    N = model.queue.shape[1]
    places = (model.enqueued + torch.arange(len(z), device=z.device)) % N
    model.queue[:, places[-N:]] = z[-N:].transpose(0, 1)
    model.enqueued += len(z)


# --- training


def main(argv=None):
    cfg = common.parse_args(Config, DEMO, argv)
    if cfg.prototypes < 2:
        common.fail("--prototypes must be 2 or more")
    common.init_distributed(cfg)
    dataset = common.VideoClips(cfg, sample_clips)
    model = SwAV(cfg).to(common.device())
    network = common.wrap_ddp(model, cfg)
    optimizer = common.make_optimizer(model, cfg)
    chance = math.log(cfg.prototypes)  # all prototypes alike
    run = common.Run(cfg, dataset, model, optimizer, chance)
    balanced = cfg.batch_size + cfg.feature_queue  # features of a view that codes are balanced over
    if cfg.prototypes > balanced and cfg.freeze_prototypes < cfg.epochs:
        words = f"{cfg.prototypes} prototypes share {balanced} features a view"
        common.print_main(f"WARN {words}: try fewer, a larger --batch-size, or --feature-queue")
    for batch in run.batches():  # sets the lr, logs, saves, resumes; ends at a NaN in the log
        with common.autocast():
            z, scores = network(batch["clips"])  # (B, V, D), (B, V, K), float32
        queue_scores = None
        if 0 < cfg.feature_queue <= model.enqueued and run.epoch >= cfg.queue_from:
            queue_scores = model.prototypes(model.queue)  # (V, N, K)
        codes = assign(scores, cfg.epsilon, cfg.sinkhorn_iterations, queue_scores)  # (B, V, K)
        loss = swapped_prediction(scores, codes, cfg.temperature)
        optimizer.zero_grad()
        loss.backward()
        if run.epoch < cfg.freeze_prototypes:
            model.prototypes.weight.grad = None
        optimizer.step()
        normalize_prototypes(model.prototypes)
        if cfg.feature_queue:
            enqueue_features(model, common.gather(z.detach()))
        run.record(loss, features=z)


if __name__ == "__main__":
    main()
