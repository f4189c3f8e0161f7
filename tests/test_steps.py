"""What one training step does: each method written a second time, and compared with its script.

The second version is as plain as possible: loops over videos b and views i, j, one method after
another, from the papers' pseudo-code. It shares nothing with the scripts but the network's forward
pass. Both start from the same weights and see the same clips, in float64, so that they must agree
to rounding errors after every step. `adapter.py` knows how to run a script on given clips.

Letters: B videos of a step (of all ranks), V views, K queue length or number of prototypes.
"""

import copy
import functools
import math
import os
from argparse import Namespace

import pytest
import torch
from torch import nn

import adapter
from conftest import METHODS, run_ranks

BATCH, STEPS, STEPS_PER_EPOCH = 6, 3, 2  # 13 videos: an epoch has two steps, one video is left out
TOLERANCE = 1e-9  # relative to the largest number of a tensor

# Numbers at which a mistake shows: step 1 and 2 are in warm-up, the queue wraps around in step 2,
# the prototypes are frozen for two steps, weight decay is large.
SHARED = dict(batch_size=BATCH, epochs=2, warmup=0.375, lr=0.5, weight_decay=0.01)
OWN = {
    "simclr": dict(projector=(16, 8), projector_bn=False, temperature=0.2),
    "moco": dict(
        projector=(16, 8), temperature=0.2, queue=17, target_momentum=0.7, target_momentum_end=0.9
    ),
    "byol": dict(
        projector=(16, 8), predictor=(16, 8), target_momentum=0.7, target_momentum_end=0.9
    ),
    "swav": dict(
        projector=(16, 8),
        temperature=0.2,
        prototypes=11,
        freeze_prototypes=1.0,
        epsilon=0.05,
        sinkhorn_iterations=3,
    ),
}


# used in the third step: full after two; full after one, but not to be used before
FEATURE_QUEUES = [dict(feature_queue=10, queue_from=0.0), dict(feature_queue=6, queue_from=1.0)]


# --- the second version: what all methods share


def learning_rate(settings, epoch, V):
    """Half a cosine over the run; during warm-up a line from a thousandth of what it meets."""
    epochs, warmup = settings["epochs"], settings["warmup"] * settings["epochs"]
    peak = settings["lr"] * BATCH * V / 128
    if epoch >= warmup:
        return peak * (1 + math.cos(math.pi * epoch / epochs)) / 2
    end_of_warmup = peak * (1 + math.cos(math.pi * warmup / epochs)) / 2
    return end_of_warmup * (0.001 + (1 - 0.001) * epoch / warmup)


def nesterov(weight, gradient, buffer, lr):
    """One step of SGD with Nesterov momentum 0.9, in place."""
    buffer.mul_(0.9).add_(gradient)
    weight.sub_(lr * (gradient + 0.9 * buffer))


def sgd(weight, gradient, buffer, lr, weight_decay, is_bn):
    """Weight decay is part of the gradient. BN has none."""
    if not is_bn:
        gradient = gradient + weight_decay * weight
    nesterov(weight, gradient, buffer, lr)


def lars(weight, gradient, buffer, lr, weight_decay, is_bn):
    """The length of a matrix's step follows the length of the matrix. Vectors (BN, biases) take
    the plain gradient without weight decay."""
    size, slope = weight.norm(), gradient.norm()
    if weight.ndim > 1 and size > 0 and slope > 0:
        trust = 0.001 * size / (slope + weight_decay * size + 1e-8)
        gradient = trust * (gradient + weight_decay * weight)
    nesterov(weight, gradient, buffer, lr)


def unit(x):
    """Each row divided by its length."""
    return torch.stack([row / row.square().sum().sqrt() for row in x])


def positive_pairs(V):
    """All (b, i, j): view i and view j of video b, i and j different."""
    return [(b, i, j) for b in range(BATCH) for i in range(V) for j in range(V) if i != j]


class Learner:
    """A method's weights, and what a step does with them."""

    modules = ["encoder"]  # that the optimizer trains

    def __init__(self, settings, start):
        self.settings = settings
        for name in self.modules:
            setattr(self, name, start[name])
        self.steps, self.loss_sum = 0, 0.0
        self.weights, self.buffers = {}, {}
        for name in self.modules:
            for place, module in getattr(self, name).named_modules():
                is_bn = isinstance(module, nn.BatchNorm1d | nn.BatchNorm3d)
                for key, weight in module.named_parameters(recurse=False):
                    self.weights[f"{name}.{place}.{key}"] = weight, is_bn

    def step(self, clips):
        """One step on clips (B, V, 3, T, H, W)."""
        views = list(clips.unbind(1))  # V views of (B, 3, T, H, W)
        self.epoch = self.steps / STEPS_PER_EPOCH
        self.lr = learning_rate(self.settings, self.epoch, len(views))
        loss = self.loss(views)
        weights = [weight for weight, _ in self.weights.values()]
        gradients = torch.autograd.grad(self.factor(len(views)) * loss, weights)
        update = {"sgd": sgd, "lars": lars}[self.settings["optimizer"]]
        with torch.no_grad():
            for (name, (weight, is_bn)), g in zip(self.weights.items(), gradients, strict=True):
                if not self.frozen(name):
                    buffer = self.buffers.setdefault(name, torch.zeros_like(weight))
                    update(weight, g, buffer, self.lr, self.settings["weight_decay"], is_bn)
            self.steps += 1
            self.loss_sum += float(loss)
            self.after_the_step()

    def factor(self, V):
        """What the loss is multiplied with before the backward pass."""
        return 1

    def frozen(self, name):
        return False

    def after_the_step(self):
        pass

    def tensors(self):
        """All weights and BN statistics, by their names in last.pth."""
        tensors = {}
        for name in ["encoder", "target", "predictor", "prototypes"]:
            if hasattr(self, name):
                for key, value in getattr(self, name).state_dict().items():
                    tensors[f"{name}.{key}"] = value.clone()
        return tensors

    def numbers(self, V):
        """What else the tests compare."""
        return dict(steps=self.steps, lr=self.lr, loss_sum=self.loss_sum, **self.own_numbers(V))


# --- the second version: the methods


class SimCLR(Learner):
    def loss(self, views):
        z = [unit(self.encoder(view)) for view in views]  # z[i][b]
        V, t, total = len(views), self.settings["temperature"], 0
        for b, i, j in positive_pairs(V):
            positive = torch.exp(z[i][b] @ z[j][b] / t)
            negatives = 0
            for n in range(BATCH):
                for v in range(V):
                    if n != b:
                        negatives = negatives + torch.exp(z[i][b] @ z[v][n] / t)
            total = total - torch.log(positive / (positive + negatives))
        return total / len(positive_pairs(V))

    def own_numbers(self, V):
        return dict(chance=math.log(1 + V * (BATCH - 1)))


class WithTarget(Learner):
    """A target network: at first a copy of the encoder, then its moving average."""

    def __init__(self, settings, start):
        super().__init__(settings, start)
        self.target = copy.deepcopy(self.encoder)

    def factor(self, V):
        return V  # the sum over the V query clips, as in the released code

    def after_the_step(self):
        """Weights are averaged, BN running statistics are not. The average slows down: in the
        last step of the run the momentum is the one of the end."""
        share = self.steps / (self.settings["epochs"] * STEPS_PER_EPOCH)
        start, end = self.settings["target_momentum"], self.settings["target_momentum_end"]
        self.m = end - (end - start) * (1 + math.cos(math.pi * share)) / 2
        online = dict(self.encoder.named_parameters())
        for name, weight in self.target.named_parameters():
            weight.copy_(self.m * weight + (1 - self.m) * online[name])


class MoCo(WithTarget):
    def __init__(self, settings, start):
        super().__init__(settings, start)
        self.queue, self.pointer, self.enqueued = [None] * settings["queue"], 0, 0

    def loss(self, views):
        q = [unit(self.encoder(view)) for view in views]
        with torch.no_grad():
            self.keys = [unit(self.target(view)) for view in views]
        negatives = [key for key in self.queue if key is not None]
        self.filled = len(negatives)
        V, t, total = len(views), self.settings["temperature"], 0
        for b, i, j in positive_pairs(V):
            positive = torch.exp(q[i][b] @ self.keys[j][b] / t)
            everything = positive
            for key in negatives:
                everything = everything + torch.exp(q[i][b] @ key / t)
            # not log(positive / everything): without negatives the gradient is exactly 0, which
            # LARS would scale up if it were a rounding error
            total = total + torch.log(everything) - torch.log(positive)
        return total / len(positive_pairs(V))

    def after_the_step(self):
        super().after_the_step()
        for b in range(BATCH):
            for view in self.keys:
                self.queue[self.pointer] = view[b]
                self.pointer = (self.pointer + 1) % len(self.queue)
                self.enqueued += 1

    def own_numbers(self, V):
        K = len(self.queue)
        filled = {place: key for place, key in enumerate(self.queue) if key is not None}
        return dict(
            chance=math.log(K + 1),
            target_momentum=self.m,
            queue_filled=self.filled / K,  # as the step's loss met it
            enqueued=self.enqueued,
            pointer=self.pointer,
            queue=filled,
        )


class BYOL(WithTarget):
    modules = ["encoder", "predictor"]

    def loss(self, views):
        q = [unit(self.predictor(self.encoder(view))) for view in views]
        with torch.no_grad():
            k = [unit(self.target(view)) for view in views]
        total = 0
        for b, i, j in positive_pairs(len(views)):
            total = total + (q[i][b] - k[j][b]).square().sum()
        return total / len(positive_pairs(len(views)))

    def own_numbers(self, V):
        return dict(chance=2.0, target_momentum=self.m)


class SwAV(Learner):
    modules = ["encoder", "prototypes"]

    def __init__(self, settings, start):
        super().__init__(settings, start)
        self.earlier = {}  # view -> its features of earlier steps, the oldest first

    def loss(self, views):
        self.z = [unit(self.encoder(view)) for view in views]
        scores = [z @ self.prototypes.weight.T for z in self.z]
        codes = []  # each view is a problem of its own
        for i, view in enumerate(scores):
            batch_and_queue = [*view.detach(), *self.queue_scores(i)]
            codes.append(self.codes(torch.stack(batch_and_queue))[:BATCH])
        V, t, total = len(views), self.settings["temperature"], 0
        for b, i, j in positive_pairs(V):
            p = torch.exp(scores[j][b] / t)
            total = total - (codes[i][b] * torch.log(p / p.sum())).sum()
        return total / len(positive_pairs(V))

    def queue_scores(self, i):
        """Scores of the last N features of view i, once there are N, and not before an epoch."""
        N, earlier = self.settings.get("feature_queue", 0), self.earlier.get(i, [])
        if N == 0 or len(earlier) < N or self.epoch < self.settings["queue_from"]:
            return []
        return [self.prototypes.weight.detach() @ feature for feature in earlier[-N:]]

    def codes(self, scores):
        """Sinkhorn, scores (B, K): each prototype gets the same share of the batch, each video
        has the same weight. The last division makes the codes of a video sum to 1."""
        Q = torch.exp(scores / self.settings["epsilon"])
        for _ in range(self.settings["sinkhorn_iterations"]):
            Q = Q / Q.sum(dim=0, keepdim=True) / Q.shape[1]
            Q = Q / Q.sum(dim=1, keepdim=True) / Q.shape[0]
        return Q * Q.shape[0]

    def frozen(self, name):
        return name.startswith("prototypes") and self.epoch < self.settings["freeze_prototypes"]

    def after_the_step(self):
        self.prototypes.weight.copy_(unit(self.prototypes.weight))
        for i, z in enumerate(self.z):
            self.earlier[i] = [*self.earlier.get(i, []), *z.detach()]

    def own_numbers(self, V):
        return dict(chance=math.log(self.settings["prototypes"]))


LEARNERS = {"simclr": SimCLR, "moco": MoCo, "byol": BYOL, "swav": SwAV}


# --- both versions side by side


def run_both(method, settings, data, out, ends, bn_in_eval):
    """Run the script from the start to each of the steps `ends`, its output in out/1, out/2, ...;
    then the second version, its state after 0, 1, ... steps in out/expected.pth. For a process of
    its own, which it turns to float64; of several ranks, only rank 0 runs the second version."""
    torch.set_default_dtype(torch.float64)
    torch.Tensor.float = torch.Tensor.double
    torch.float32 = torch.float64
    V = max(2, settings["rho"])
    generator = torch.Generator().manual_seed(5)
    clips = torch.randn(STEPS, BATCH, V, 3, 4, 16, 16, generator=generator)
    for steps in ends:
        argv = adapter.command_line(data, out / f"{steps}", steps, settings)
        start = adapter.run_with_clips(method, argv, clips, bn_in_eval)
    if os.environ.get("RANK", "0") != "0":
        return
    torch.save({k: v for k, v in start.state_dict().items() if torch.is_tensor(v)}, out / "0.pth")
    learner = LEARNERS[method](settings, adapter.parts(start))
    states = [dict(model=learner.tensors())]
    for batch in clips:
        learner.step(batch)
        states.append(dict(model=learner.tensors(), **learner.numbers(V)))
    torch.save(states, out / "expected.pth")


@pytest.fixture(scope="module")
def runs(folder, tmp_path_factory):
    """runs(method, rho, optimizer) -> (found, expected): lists of what the script and the second
    version have after 0, 1, ... steps; on several ranks after 0 and the last. Made once."""

    @functools.cache
    def run(method, rho, optimizer="sgd", ranks=1, queued=None):
        out = tmp_path_factory.mktemp(method)
        settings = {**SHARED, **OWN[method], "rho": rho, "optimizer": optimizer}
        settings |= {} if queued is None else FEATURE_QUEUES[queued]
        ends = list(range(1, STEPS + 1)) if ranks == 1 else [STEPS]
        run_ranks(ranks, run_both, method, settings, folder, out, ends, ranks > 1)
        expected = torch.load(out / "expected.pth", weights_only=True)
        found = [Namespace(model=torch.load(out / "0.pth", weights_only=True))]
        for steps in ends:
            found.append(adapter.checkpoint(out / f"{steps}"))
            found[-1].log = adapter.last_log_line(out / f"{steps}")
        return found, [expected[0], *(expected[steps] for steps in ends)]

    return run


def assert_tensors(found, expected, prefix, skip=()):
    """The tensors whose names begin with `prefix` are equal to rounding errors."""
    names = [name for name in expected if name.startswith(prefix)]
    names = [name for name in names if not name.endswith(tuple(skip))]
    assert names
    for name in names:
        ours, theirs = expected[name].double(), found[name].double()
        error = (ours - theirs).abs().max().item()
        # 1e-12: a bias before BN has no gradient but rounding errors
        assert error <= TOLERANCE * ours.abs().max().item() + 1e-12, (name, error)


def assert_logged(found, expected, name):
    """A number of the log, which has five digits."""
    assert found.log[name] == pytest.approx(expected[name], rel=1e-4, abs=1e-9), name


BN_BUFFERS = ["running_mean", "running_var", "num_batches_tracked"]
CASES = [(rho, "sgd") for rho in (1, 2, 3)] + [(2, "lars")]
every_case = pytest.mark.parametrize("rho, optimizer", CASES)
every_method = pytest.mark.parametrize("method", METHODS)
with_target = pytest.mark.parametrize("method", ["moco", "byol"])


@every_method
def test_start(method, runs):
    """A target network that is no copy of the encoder, e.g. has a projector of its own; prototypes
    that do not start at unit length; a queue that starts with keys in it."""
    found, expected = runs(method, 2)
    assert_tensors(found[0].model, expected[0]["model"], "")
    if method == "swav":
        lengths = found[0].model["prototypes.weight"].norm(dim=1)
        torch.testing.assert_close(lengths, torch.ones_like(lengths), rtol=0, atol=TOLERANCE)


@every_method
@every_case
def test_learning_rate(method, rho, optimizer, runs):
    """The learning rate of the step before or after; one that does not grow with the views."""
    for found, expected in list(zip(*runs(method, rho, optimizer), strict=True))[1:]:
        assert found.step == expected["steps"]
        assert found.lrs == pytest.approx([expected["lr"]] * len(found.lrs), rel=TOLERANCE)
        assert_logged(found, expected, "lr")


@every_method
@every_case
def test_loss(method, rho, optimizer, runs):
    """Other pairs, a sum for the mean, online targets, queries as keys, codes of all views at once:
    what a loss function cannot know. Also the chance level that is written beside the loss."""
    for found, expected in list(zip(*runs(method, rho, optimizer), strict=True))[1:]:
        equal = pytest.approx(expected["loss_sum"], rel=TOLERANCE, abs=1e-12)
        assert found.loss_sum == equal, f"after step {found.step}"
        mean = dict(loss=expected["loss_sum"] / expected["steps"])
        assert_logged(found, mean, "loss")
        assert_logged(found, expected, "chance")


@every_method
@every_case
def test_trained_weights(method, rho, optimizer, runs):
    """A gradient through targets, keys or codes; the factor V of MoCo and BYOL left out, or in
    SimCLR and SwAV; weight decay on BN, gradients of the step before, LARS without trust,
    prototypes that are never frozen or not normalised."""
    trained = {"byol": ["encoder", "predictor"], "swav": ["encoder", "prototypes"]}
    for found, expected in zip(*runs(method, rho, optimizer), strict=True):
        for name in trained.get(method, ["encoder"]):
            assert_tensors(found.model, expected["model"], name, skip=BN_BUFFERS)


@every_method
@every_case
def test_bn_statistics(method, rho, optimizer, runs):
    """BN over the clips of all views at once; views in another order; BN statistics averaged into
    the target, or a target in eval."""
    for found, expected in zip(*runs(method, rho, optimizer), strict=True):
        ours = {k: v for k, v in expected["model"].items() if k.endswith(tuple(BN_BUFFERS))}
        assert_tensors(found.model, ours, "")


@with_target
@every_case
def test_target(method, rho, optimizer, runs):
    """A target that moves before the optimizer's step, or by m where it should by 1 - m; a momentum
    that stays constant, or is that of another step."""
    for step, (found, expected) in enumerate(zip(*runs(method, rho, optimizer), strict=True)):
        assert_tensors(found.model, expected["model"], "target", skip=BN_BUFFERS)
        if step > 0:
            assert_logged(found, expected, "target_momentum")


@every_case
def test_queue(rho, optimizer, runs):
    """Queries or keys of the online network in the queue; keys of one view after those of another;
    a pointer that is one off; a queue that counts in full from the start."""
    for step, (found, expected) in enumerate(zip(*runs("moco", rho, optimizer), strict=True)):
        if step == 0:
            continue
        assert found.enqueued == expected["enqueued"]
        assert found.enqueued % len(found.model["queue"]) == expected["pointer"]
        rows = {f"row{place}": key for place, key in enumerate(found.model["queue"])}
        ours = {f"row{place}": key for place, key in expected["queue"].items()}
        assert_tensors(rows, ours, "row")
        assert_logged(found, expected, "queue_filled")


@every_case
def test_first_step_of_moco(rho, optimizer, runs):
    """Zeros of a queue that is still empty, or keys of the same step, taken as negatives."""
    found, _ = runs("moco", rho, optimizer)
    assert found[1].loss_sum == 0 and found[1].log["queue_filled"] == 0
    assert found[2].loss_sum > 0 and found[2].log["queue_filled"] > 0


@every_case
def test_prototypes(rho, optimizer, runs):
    """Prototypes that move in the first epoch or stay after it, or that lose their unit length."""
    found, _ = runs("swav", rho, optimizer)
    prototypes = [state.model["prototypes.weight"] for state in found]
    for weight in prototypes:
        lengths = weight.norm(dim=1)
        torch.testing.assert_close(lengths, torch.ones_like(lengths), rtol=0, atol=TOLERANCE)
    for step, (before, after) in enumerate(zip(prototypes, prototypes[1:], strict=False)):
        moved = (after - before).abs().max() > 1e-6
        assert moved == (step >= STEPS_PER_EPOCH), f"step {step + 1}"


@pytest.mark.parametrize("rho, ranks", [(3, 2), (2, 3)])
@every_method
def test_ranks_share_one_state(method, rho, ranks, runs):
    """Negatives, keys or codes of this rank alone; a gather without its gradient; slices in another
    order. BN uses its running statistics here, as there is no SyncBN on a CPU."""
    for step, (found, expected) in enumerate(zip(*runs(method, rho, ranks=ranks), strict=True)):
        assert_tensors(found.model, expected["model"], "")
        if step > 0:
            assert found.loss_sum == pytest.approx(expected["loss_sum"], rel=TOLERANCE, abs=1e-12)
            assert found.lrs == pytest.approx([expected["lr"]] * len(found.lrs), rel=TOLERANCE)
            assert_logged(found, expected, "chance")
        if step > 0 and method == "moco":
            assert found.enqueued == expected["enqueued"]
            ours = {f"{place}": key for place, key in expected["queue"].items()}
            rows = {f"{place}": key for place, key in enumerate(found.model["queue"])}
            assert_tensors(rows, ours, "")


@pytest.mark.parametrize("queued", [0, 1])
@pytest.mark.parametrize("rho, ranks", [(1, 1), (3, 1), (3, 2), (2, 3)])
def test_feature_queue(rho, ranks, queued, runs):
    """SwAV's feature queue used before it is full or before its epoch; one queue for all views, of
    this rank alone, or of scores with older prototypes; codes of the queue's own features."""
    plain = runs("swav", rho, ranks=ranks)[0][-1]
    found, expected = (states[-1] for states in runs("swav", rho, ranks=ranks, queued=queued))
    model = {name: tensor for name, tensor in found.model.items() if name != "queue"}
    assert_tensors(model, expected["model"], "")
    assert found.loss_sum == pytest.approx(expected["loss_sum"], rel=TOLERANCE)
    assert found.loss_sum != pytest.approx(
        plain.loss_sum, rel=1e-6
    )  # the third step's codes differ
    assert found.enqueued == STEPS * BATCH
