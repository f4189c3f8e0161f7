"""Read-outs of a frozen backbone: kNN and a linear classifier, on 4 clips of each video."""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parent.parent))
import common


def extract(backbone, videos, frames, stride, size, clips=4):
    """(n, clips, D) features, float32, and (n,) labels; clips evenly over a video, centre crop."""
    crop = common.v2.CenterCrop(size)
    span = frames * stride / 30
    features = []
    for path in (videos[i] for i in range(len(videos))):
        starts = lambda duration: np.linspace(0, max(0, duration - span), clips)  # noqa: E731
        clip = common.read_clips(path, starts, frames, stride, size)
        x = (
            crop(torch.from_numpy(clip.copy()).permute(0, 1, 4, 2, 3)).float() / 255
        )  # (clips, T, ...)
        x = ((x - 0.45) / 0.225).transpose(1, 2)
        with torch.no_grad():
            features.append(backbone(x.contiguous(memory_format=torch.channels_last_3d)))
    return torch.stack(features), torch.as_tensor(videos.labels)


def knn(train, train_labels, test, test_labels, k=20, temperature=0.07):
    """Accuracy of a cosine-weighted vote of the k nearest training videos; features (n, D)."""
    similarity = F.normalize(test, dim=-1) @ F.normalize(train, dim=-1).T
    near, index = similarity.topk(min(k, len(train)), dim=-1)
    votes = torch.zeros(len(test), int(train_labels.max()) + 1)
    votes.scatter_add_(1, train_labels[index], (near / temperature).exp())
    return (votes.argmax(-1) == test_labels).float().mean().item()


def linear(train, train_labels, test, test_labels, decay=3e-3):
    """Accuracy of multinomial logistic regression on standardised features (n, clips, D)."""
    mean, std = train.mean((0, 1)), train.std((0, 1)) + 1e-6
    train, test = (train - mean) / std, (test - mean) / std
    layer = torch.nn.Linear(train.shape[-1], int(train_labels.max()) + 1)
    torch.nn.init.zeros_(layer.weight)
    optimizer = torch.optim.LBFGS(layer.parameters(), max_iter=150, line_search_fn="strong_wolfe")
    repeated = train_labels.repeat_interleave(train.shape[1])

    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(layer(train.flatten(0, 1)), repeated)
        loss = loss + decay * layer.weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    scores = layer(test).softmax(-1).mean(1)
    return (scores.argmax(-1) == test_labels).float().mean().item()


def read_out(weights, data, seed=0):
    """{"knn", "linear", "coat", "trick"} in percent; weights: backbone.pth or None (random)."""
    config = {"backbone": "tiny", "frames": 8, "stride": 4, "size": 32}
    torch.manual_seed(seed)
    if weights:
        saved = torch.load(weights, weights_only=True)
        config |= saved["config"]
    backbone = common.backbone(config["backbone"])
    if weights:
        backbone.load_state_dict(saved["state_dict"])
    backbone.eval().to(memory_format=torch.channels_last_3d)
    sets = [common.Videos(Path(data, split)) for split in ("train", "val")]
    shape = (config["frames"], config["stride"], config["size"])
    (x, y), (x_val, y_val) = (extract(backbone, videos, *shape) for videos in sets)
    names = sets[0].classes
    result = {"knn": knn(x.mean(1), y, x_val.mean(1), y_val), "linear": linear(x, y, x_val, y_val)}
    for part, name in enumerate(("coat", "trick")):
        words = sorted({label.split("-")[part] for label in names})
        number = torch.tensor([words.index(label.split("-")[part]) for label in names])
        result[name] = linear(x, number[y], x_val, number[y_val])
    return {key: round(100 * value, 1) for key, value in result.items()}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--weights", nargs="*", default=[])
    parser.add_argument("--data", default="data/demo")
    parser.add_argument("--random", type=int, default=0, help="this many random backbones as well")
    options = parser.parse_args()
    for path in options.weights:
        print(json.dumps({"weights": path, **read_out(path, options.data)}), flush=True)
    for seed in range(options.random):
        print(json.dumps({"random": seed, **read_out(None, options.data, seed)}), flush=True)
