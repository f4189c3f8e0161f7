"""Several processes compute what one computes on the joint batch."""

import importlib
import json
import os
import signal
import socket
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader

import byol
import common
import moco
from conftest import METHODS, ROOT, arguments, run_ranks


def run_script(method, argv):
    importlib.import_module(method).main(argv)


def read_log(out):
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


# --- gather


def _gathered_transposed():
    dist.init_process_group("gloo")
    x = torch.arange(24.0).reshape(2, 3, 4) + 100 * common.rank()
    return common.gather(x.transpose(1, 2)).numpy()


def test_gather_takes_any_layout():
    """A tensor that is not contiguous, as views are: the values, not the bytes, are gathered."""
    x = np.arange(24.0).reshape(2, 3, 4)
    expected = np.concatenate([x, x + 100]).transpose(0, 2, 1)
    for rows in run_ranks(2, _gathered_transposed):
        np.testing.assert_array_equal(rows, expected)


def _gathered_gradient():
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    weight = torch.randn(5, 5, requires_grad=True)
    x = torch.randn(6, 5)
    z = common.gather(common.local_part(x) @ weight)  # (6, 5)
    (z @ z.T).square().mean().backward()
    dist.all_reduce(weight.grad)
    return z.detach().numpy(), (weight.grad / common.world_size()).numpy()  # DDP's mean


@pytest.mark.parametrize("ranks", [2, 3])
def test_gather_has_the_joint_gradient(ranks):
    """gather: rank-major on all ranks, and after the mean over ranks the joint loss's gradient."""
    torch.manual_seed(0)
    weight = torch.randn(5, 5, requires_grad=True)
    z = torch.randn(6, 5) @ weight
    (z @ z.T).square().mean().backward()
    for z_rank, gradient in run_ranks(ranks, _gathered_gradient):
        np.testing.assert_allclose(z_rank, z.detach(), rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(gradient, weight.grad, rtol=1e-4, atol=1e-5)


def test_one_process_gathers_nothing():
    """Without torchrun gather and local_part are the tensor itself, its gradient included."""
    x = torch.randn(3, 2, requires_grad=True)
    assert common.gather(x) is x
    assert torch.equal(common.local_part(x), x)


# --- the methods


@pytest.mark.parametrize("method", METHODS)
def test_real_bn_on_two_ranks(method, small):
    """rho 4 clips with BN in training on two ranks: several forwards of it before one backward."""
    run_ranks(2, run_script, method, [*small, "--rho", "4", "--max-steps", "2"])


def _keys():
    dist.init_process_group("gloo")
    clips = common.local_part(torch.arange(8.0).reshape(8, 1, 1, 1, 1, 1))  # (B, V = 1, ...)
    seen = []

    def flat(view):
        seen.extend(view.flatten().tolist())
        return view.flatten(1)

    keys = moco.encode_shuffled(flat, clips, seed=3)
    return keys.flatten().tolist(), seen


def test_keys_are_shuffled_and_put_back():
    """MoCo: a rank's key network sees clips of both ranks, yet each rank gets its own keys."""
    (first, seen), (second, seen_second) = run_ranks(2, _keys)
    assert first == [0, 1, 2, 3] and second == [4, 5, 6, 7]
    assert set(seen) & {0, 1, 2, 3} and set(seen) & {4, 5, 6, 7}
    assert sorted(seen + seen_second) == list(range(8))


class _Flat(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.seen = []

    def forward(self, view):
        self.seen.append(view.flatten().tolist())
        return view.flatten(1)


def _seen_in_four_steps():
    dist.init_process_group("gloo")
    model = moco.MoCo(arguments(moco, projector=(1,), queue=24))
    model.encoder, model.target = _Flat(), _Flat()
    clips = common.local_part(torch.arange(8.0).reshape(8, 1, 1, 1, 1, 1))
    for _ in range(4):
        _, keys = model(clips)
        moco.enqueue(model, common.gather(keys))
    return model.target.seen


def test_keys_are_shuffled_anew_in_every_step():
    """The same shuffle in every step: a video's key would always be among the same places."""
    seen, _ = run_ranks(2, _seen_in_four_steps)
    assert len(seen) == 4 and len({tuple(sorted(batch)) for batch in seen}) > 1


# --- data


def _clips_of_a_loader(argv):
    """The clips of each step, by torch's own DataLoader."""
    cfg = common.parse_args(byol.Config, byol.DEMO, argv)
    common.init_distributed(cfg)
    dataset = common.VideoClips(cfg, byol.sample_clips)
    sampler = common.TrainSampler(cfg, len(dataset), 0, cfg.max_steps)
    how = dict(num_workers=cfg.workers, worker_init_fn=common.worker_init)
    loader = DataLoader(dataset, batch_sampler=sampler, **how)
    return [batch["clips"].numpy() for batch in loader]


def _clips_of_a_run(argv):
    """The same, as a method's main has them."""
    cfg = common.parse_args(byol.Config, byol.DEMO, argv)
    common.init_distributed(cfg)
    dataset = common.VideoClips(cfg, byol.sample_clips)
    model = byol.BYOL(cfg)
    optimizer = common.make_optimizer(model, cfg)
    run = common.Run(cfg, dataset, model, optimizer, chance=2.0)
    clips = []
    for batch in run.batches():
        clips.append(batch["clips"].numpy())
        run.record(torch.tensor(0.0), features=torch.ones(6, 3, 8))
    return clips


def test_same_views_for_all_workers_and_ranks(small):
    """0 or 2 workers, 1 or 2 ranks: the same views; another epoch, another video: others."""
    base = [*small, "--rho", "3", "--max-steps", "4"]
    (alone,) = run_ranks(1, _clips_of_a_loader, base)
    (workers,) = run_ranks(1, _clips_of_a_loader, [*base, "--workers", "2"])
    ranks = run_ranks(2, _clips_of_a_loader, base)
    (run,) = run_ranks(1, _clips_of_a_run, [*base, "--workers", "2"])
    assert len(alone) == 4
    for step, batch in enumerate(alone):
        assert batch.shape == (6, 3, 3, 4, 16, 16)
        np.testing.assert_array_equal(batch, workers[step])
        np.testing.assert_array_equal(batch, np.concatenate([r[step] for r in ranks]))
        np.testing.assert_array_equal(batch, run[step])
    assert not any((alone[0] == other).all() for other in alone[1:])
    assert not (alone[0][:, 0] == alone[0][:, 1]).all(axis=(1, 2, 3, 4)).any()


def test_sampler_is_exact_from_any_step(monkeypatch):
    """The batches from step k on are the tail of all; ranks hold contiguous slices; an epoch has
    each video at most once, in its own order."""
    cfg = byol.Config(batch_size=6, seed=4)
    whole = list(common.TrainSampler(cfg, 13, 0, 8))
    assert len(whole) == 8 and all(len(batch) == 6 for batch in whole)
    for first in range(8):
        assert list(common.TrainSampler(cfg, 13, first, 8)) == whole[first:]
    orders = []
    for epoch in range(4):
        keys = whole[2 * epoch] + whole[2 * epoch + 1]
        assert {e for e, _ in keys} == {epoch}
        assert len({index for _, index in keys}) == 12
        orders.append([index for _, index in keys])
    assert len({tuple(order) for order in orders}) == 4
    monkeypatch.setenv("WORLD_SIZE", "3")
    for rank in range(3):
        monkeypatch.setenv("RANK", str(rank))
        parts = list(common.TrainSampler(cfg, 13, 0, 8))
        assert parts == [batch[2 * rank : 2 * rank + 2] for batch in whole]


@pytest.mark.parametrize("ranks, share", [(1, 64), (2, 32), (4, 16)])
def test_batch_and_lr_do_not_depend_on_ranks(ranks, share, folder, monkeypatch):
    """1 x 64, 2 x 32 and 4 x 16 videos are the same batch with the same learning rate."""
    names = dict(WORLD_SIZE=ranks, RANK=0, LOCAL_RANK=0, LOCAL_WORLD_SIZE=ranks, MASTER_ADDR="a")
    for name, value in names.items():
        monkeypatch.setenv(name, str(value))
    cfg = common.parse_args(byol.Config, byol.DEMO, ["--data", str(folder)])
    (batch,) = common.TrainSampler(cfg, 100, 0, 1)
    assert cfg.batch_size == 64 and len(batch) == share
    expected = 0.6 * 0.5 * (1 + np.cos(np.pi * 35 / 200))
    assert common.learning_rate(cfg, 35 / 200) == pytest.approx(expected)


# --- signals and machines


def _stopped(argv):
    steps = 0
    update = byol.update_target

    def count(*args):
        nonlocal steps
        steps += 1
        if steps == 3 and common.rank() == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        update(*args)

    byol.update_target = count
    byol.main(argv)
    return steps


def test_signal_ends_both_ranks_at_one_step(small, tmp_path):
    """SIGTERM to one of two ranks: both stop after the same step, with a checkpoint."""
    argv = [*small, "--epochs", "50", "--log-every", "1"]
    result = run_ranks(2, _stopped, argv)
    assert result[0] == result[1] > 2
    assert torch.load(tmp_path / "out/last.pth", weights_only=True)["step"] == result[0]


def test_two_machines_are_one_job(small, tmp_path):
    """torchrun on two nodes (two agents, on two addresses of this machine) trains as on one."""
    base = [*small, "--rho", "2", "--max-steps", "2", "--log-every", "1"]
    run_ranks(2, run_script, "byol", [*base, "--out", str(tmp_path / "one")])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    how = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=1"]
    how += ["--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{port}", "--rdzv-id=rho"]
    script = [str(ROOT / "byol.py"), *base, "--out", str(tmp_path / "two")]
    agents = []
    for i in (1, 2):
        command = [*how, f"--local-addr=127.0.0.{i}", *script]
        agents.append(subprocess.Popen(command, stderr=subprocess.PIPE, text=True))
    try:
        for agent in agents:
            _, errors = agent.communicate(timeout=120)
            assert agent.returncode == 0, errors
    finally:
        for agent in agents:
            agent.kill()
    losses = [[line["loss"] for line in read_log(tmp_path / name)] for name in ("one", "two")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4) and len(losses[0]) == 2


def _opened(data):
    """The indices of the videos that this rank opens for their features, and of the features."""
    cfg = arguments(byol, data=data, out="out", batch_size=4, workers=0)
    common.init_distributed(cfg)
    opened = []

    class Noted(common.VideoClips):
        def open(self, index, short_side):
            opened.append(index)
            return super().open(index, short_side)

    views = common.TestClips(Noted(cfg, byol.sample_clips), 1)
    features, indices = common.extract_features(lambda clips: clips.mean((0, 2, 3, 4)), views)
    assert features.shape == (13, 3)
    return opened, indices.tolist()


def test_ranks_share_the_videos_of_an_evaluation(folder, tmp_path, monkeypatch):
    """Every rank reads all videos: the same numbers, in the time of one process."""
    monkeypatch.chdir(tmp_path)
    (one, both), (other, same) = run_ranks(2, _opened, str(folder))
    assert sorted(one + other) == both == same == list(range(13))
    assert abs(len(one) - len(other)) == 1
