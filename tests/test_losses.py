"""Each loss against a loop from its definition, closed forms, and the image method at V = 2.

Losses normalise their inputs themselves; the keys of MoCo's queue have unit length already.
"""

import math
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from lightly.loss import NegativeCosineSimilarity, NTXentLoss, SwaVLoss
from lightly.loss.swav_loss import sinkhorn as lightly_sinkhorn

import byol
import moco
import simclr
import swav
from conftest import arguments, refused

B, D, K = 5, 7, 11  # primes, so that a wrong axis shows
VIEWS = [2, 3, 4]


def unit(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(*shape, generator=generator, dtype=torch.float64), dim=-1)


def stretched(x, seed=0):
    """The same directions with other lengths."""
    lengths = torch.rand(*x.shape[:-1], 1, generator=torch.Generator().manual_seed(seed))
    return x * (0.1 + 5 * lengths.to(x.dtype))


def pairs(V):
    return [(b, i, j) for b in range(B) for i in range(V) for j in range(V) if i != j]


@pytest.mark.parametrize("V", VIEWS)
def test_nt_xent_is_its_definition(V):
    """SimCLR: the positive against all views of other videos; other positives are left out."""
    z, t, total = unit(B, V, D), 0.3, 0.0
    for b, i, j in pairs(V):
        positive = math.exp(z[b, i] @ z[b, j] / t)
        negatives = sum(
            math.exp(z[b, i] @ z[c, v] / t) for c in range(B) for v in range(V) if c != b
        )
        total -= math.log(positive / (positive + negatives))
    for inputs in (z, stretched(z)):
        loss = simclr.nt_xent(inputs, t).item()
        assert loss == pytest.approx(total / len(pairs(V)), abs=1e-12)


@pytest.mark.parametrize("V", VIEWS)
@pytest.mark.parametrize("length", [1, K])
def test_info_nce_is_its_definition(V, length):
    """MoCo: each key in a softmax of its own against the queue."""
    q, k, queue, t, total = unit(B, V, D), unit(B, V, D, seed=1), unit(length, D, seed=2), 0.2, 0.0
    for b, i, j in pairs(V):
        positive = math.exp(q[b, i] @ k[b, j] / t)
        negatives = sum(math.exp(q[b, i] @ n / t) for n in queue)
        total -= math.log(positive / (positive + negatives))
    for queries, keys in [(q, k), (stretched(q), stretched(k, seed=1))]:
        loss = moco.info_nce(queries, keys, queue, t).item()
        assert loss == pytest.approx(total / len(pairs(V)), abs=1e-12)


@pytest.mark.parametrize("V", VIEWS)
def test_regression_loss_is_its_definition(V):
    """BYOL: the squared distance of unit vectors, prediction of i to target projection of j."""
    q, k, total = unit(B, V, D), unit(B, V, D, seed=1), 0.0
    for b, i, j in pairs(V):
        total += (q[b, i] - k[b, j]).square().sum().item()
    for prediction, target in [(q, k), (stretched(q), stretched(k, seed=1))]:
        loss = byol.regression_loss(prediction, target).item()
        assert loss == pytest.approx(total / len(pairs(V)), abs=1e-12)


@pytest.mark.parametrize("V", VIEWS)
def test_swapped_prediction_is_its_definition(V):
    """SwAV: cross-entropy of the code of view i with the softmax of the scores of view j."""
    scores, t, total = unit(B, V, K), 0.1, 0.0
    codes = torch.softmax(9 * unit(B, V, K, seed=1), -1)
    for b, i, j in pairs(V):
        p = [math.exp(s / t) for s in scores[b, j]]
        total -= sum(float(c) * math.log(x / sum(p)) for c, x in zip(codes[b, i], p, strict=True))
    loss = swav.swapped_prediction(scores, codes, t).item()
    assert loss == pytest.approx(total / len(pairs(V)), abs=1e-12)


def test_two_views_are_the_image_methods():
    """At V = 2: SimCLR's and MoCo's cross-entropy over logits, BYOL's and SwAV's two-way sum."""
    z, k, queue = unit(B, 2, D), unit(B, 2, D, seed=1), unit(K, D, seed=2)
    rows = torch.cat([z[:, 0], z[:, 1]])  # SimCLR: 2B rows, all but the row itself
    logits = (rows @ rows.T / 0.1).fill_diagonal_(-math.inf)
    expected = F.cross_entropy(logits, torch.arange(2 * B).roll(B))
    torch.testing.assert_close(simclr.nt_xent(z, 0.1), expected)
    expected = 0
    for i in (0, 1):  # MoCo: (K + 1)-way softmax, the positive first, symmetric
        positive = (z[:, i] * k[:, 1 - i]).sum(-1, keepdim=True)
        logits = torch.cat([positive, z[:, i] @ queue.T], dim=1) / 0.1
        expected += F.cross_entropy(logits, torch.zeros(B, dtype=torch.long)) / 2
    torch.testing.assert_close(moco.info_nce(z, k, queue, 0.1), expected)
    expected = sum(2 - 2 * F.cosine_similarity(z[:, i], k[:, 1 - i]).mean() for i in (0, 1)) / 2
    torch.testing.assert_close(byol.regression_loss(z, k), expected)
    scores, codes = unit(B, 2, K), torch.softmax(unit(B, 2, K, seed=1), -1)
    expected = sum(F.cross_entropy(scores[:, i] / 0.1, codes[:, 1 - i]) for i in (0, 1)) / 2
    torch.testing.assert_close(swav.swapped_prediction(scores, codes, 0.1), expected)


@pytest.mark.parametrize("V", VIEWS)
def test_chance_levels(V):
    """Uninformative features give exactly the chance level that a run prints."""
    same = unit(1, 1, D).expand(B, V, D)
    assert simclr.nt_xent(same, 0.1).item() == pytest.approx(math.log(1 + V * (B - 1)))
    queue = unit(1, D).expand(K, D)
    assert moco.info_nce(same, same, queue, 0.1).item() == pytest.approx(math.log(K + 1))
    axes = torch.eye(2 * B * V).reshape(2, B, V, -1)  # all directions orthogonal
    assert byol.regression_loss(axes[0], axes[1]).item() == pytest.approx(2)
    flat, codes = torch.zeros(B, V, K, dtype=torch.float64), torch.softmax(unit(B, V, K), -1)
    assert swav.swapped_prediction(flat, codes, 0.1).item() == pytest.approx(math.log(K))


def test_empty_queue():
    """MoCo before the first keys: loss 0, gradient 0, nothing non-finite."""
    q = unit(B, 2, D).requires_grad_()
    loss = moco.info_nce(q, unit(B, 2, D, seed=1), torch.empty(0, D, dtype=q.dtype), 0.1)
    loss.backward()
    assert loss.item() == 0 and q.grad.abs().max() == 0


def test_sinkhorn_margins():
    """Codes: rows sum to 1 always, columns to B / K in the limit."""
    codes = swav.sinkhorn(unit(13, K), 0.05, 3)
    torch.testing.assert_close(codes.sum(1), torch.ones(13, dtype=codes.dtype))
    codes = swav.sinkhorn(unit(13, K), 0.05, 500)
    columns = torch.full((K,), 13 / K, dtype=codes.dtype)
    torch.testing.assert_close(codes.sum(0), columns, atol=1e-6, rtol=0)


def test_sinkhorn_is_the_exponential_form():
    """On ordinary scores the log domain equals the paper's iterations on exp(scores / epsilon)."""
    scores = unit(13, K)
    m = torch.exp(scores / 0.05).T  # (K, B) as in the paper
    m = m / m.sum()
    for _ in range(3):
        m = m / m.sum(1, keepdim=True) / K
        m = m / m.sum(0, keepdim=True) / 13
    torch.testing.assert_close(swav.sinkhorn(scores, 0.05, 3), (m * 13).T)


@pytest.mark.parametrize("epsilon", [0.03, 0.05])
def test_sinkhorn_survives_large_scores(epsilon):
    """Finite at scores of +-100 in float32, and a constant added to all changes nothing."""
    scores = 100 * torch.sign(unit(13, K)).float()
    codes = swav.sinkhorn(scores, epsilon, 3)
    assert codes.isfinite().all()
    torch.testing.assert_close(codes.sum(1), torch.ones(13))
    small = unit(13, K)
    moved = swav.sinkhorn(small + 3, epsilon, 3)
    torch.testing.assert_close(moved, swav.sinkhorn(small, epsilon, 3))


def test_queue_wraps():
    """Any queue, any batch: the last K keys are kept, each in the place that its number gives."""
    for length, batches in [(10, [4] * 7), (3, [8, 2, 5]), (7, [7, 7]), (1, [4, 4])]:
        model = torch.nn.Module()
        model.register_buffer("queue", torch.full((length, 1), -1.0))
        model.enqueued = 0
        expected, count = [-1.0] * length, 0
        for n in batches:
            moco.enqueue(model, torch.arange(count, count + n).float().reshape(n, 1, 1))
            for _ in range(n):
                expected[count % length] = float(count)
                count += 1
        assert model.queue.flatten().tolist() == expected
        assert model.enqueued == count


@pytest.mark.parametrize(
    "script, flag", [(moco, "--queue 0"), (swav, "--prototypes 1"), (swav, "--prototypes 0")]
)
def test_nothing_to_tell_apart(script, flag, small, capfd):
    """Without keys, or with one prototype, there is nothing to learn: refused."""
    assert flag.split()[0] in refused(script, [*small, *flag.split()], capfd)


def test_keys_counted_are_in_the_checkpoint():
    """MoCo: how many keys were enqueued is part of the model's state, as a Python int in use."""
    cfg = arguments(moco, queue=5)
    model, other = moco.MoCo(cfg), moco.MoCo(cfg)
    moco.enqueue(model, unit(4, 2, 64).float())
    other.load_state_dict(model.state_dict())
    assert other.enqueued == 8 and type(other.enqueued) is int
    assert torch.equal(other.queue, model.queue)


def test_features_counted_are_in_the_checkpoint():
    """SwAV: a count of its feature queue that begins anew when a run goes on."""
    cfg = arguments(swav, feature_queue=5)
    model, other = swav.SwAV(cfg), swav.SwAV(cfg)
    swav.enqueue_features(model, unit(8, 2, 64).float())
    other.load_state_dict(model.state_dict())
    assert other.enqueued == 8 and type(other.enqueued) is int
    assert torch.equal(other.queue, model.queue)


def test_lightly_agrees():
    """An independent library's losses for two views of an image, and its Sinkhorn iterations."""
    z, k = unit(B, 2, D).float(), unit(B, 2, D, seed=1).float()
    expected = NTXentLoss(temperature=0.1)(z[:, 0], z[:, 1])
    torch.testing.assert_close(simclr.nt_xent(z, 0.1), expected)
    similarity = [NegativeCosineSimilarity()(z[:, i], k[:, 1 - i]) for i in (0, 1)]
    torch.testing.assert_close(byol.regression_loss(z, k), 2 + sum(similarity))
    contrast = NTXentLoss(temperature=0.1, memory_bank_size=(K, D))
    contrast(z[:, 0], z[:, 1])  # the bank is made at the first call
    queue = contrast.memory_bank.bank.clone()
    expected = sum(contrast(z[:, i], k[:, 1 - i]) for i in (0, 1)) / 2
    torch.testing.assert_close(moco.info_nce(z, k, queue, 0.1), expected)
    scores = unit(B, 2, K).float()
    codes = torch.stack([swav.sinkhorn(scores[:, i], 0.05, 3) for i in (0, 1)], dim=1)
    torch.testing.assert_close(codes[:, 0], lightly_sinkhorn(scores[:, 0], 3, 0.05))
    expected = SwaVLoss(0.1, 3, 0.05)([scores[:, 0], scores[:, 1]], []).squeeze()
    torch.testing.assert_close(swav.swapped_prediction(scores, codes, 0.1), expected)


def test_the_flags_of_sinkhorn(small, monkeypatch):
    """--epsilon and --sinkhorn-iterations that are not heard."""
    called = mock.Mock(wraps=swav.sinkhorn)
    monkeypatch.setattr(swav, "sinkhorn", called)
    flags = "--epsilon 0.07 --sinkhorn-iterations 2 --max-steps 1"
    swav.main([*small, *flags.split()])
    assert {call.args[1:] for call in called.call_args_list} == {(0.07, 2)}
