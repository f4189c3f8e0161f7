"""Several processes compute what one computes on the joint batch."""

import importlib
import json
import signal
import socket
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.distributed as dist

import common
from conftest import METHODS, ROOT, run_ranks


def trained(method, argv):
    importlib.import_module(method).main(argv)


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
    rank, ranks = common.rank(), common.world_size()
    torch.manual_seed(0)
    weight = torch.randn(5, 5, requires_grad=True)
    x = torch.randn(6, 5)
    z = common.gather(x.chunk(ranks)[rank] @ weight)  # (6, 5)
    (z @ z.T).square().mean().backward()
    dist.all_reduce(weight.grad)
    return z.detach().numpy(), (weight.grad / ranks).numpy()  # DDP's mean


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


@pytest.mark.parametrize("method", METHODS)
def test_real_bn_on_two_ranks(method, small):
    """rho 4 clips with BN in training on two ranks: several forwards of it before one backward."""
    run_ranks(2, trained, method, [*small, "--rho", "4", "--max-steps", "2"])


def _keys():
    import moco

    dist.init_process_group("gloo")
    clips = torch.arange(8.0).reshape(8, 1, 1, 1, 1, 1).chunk(2)[common.rank()]  # (B, V = 1, ...)
    seen = []

    def flat(view):
        seen.extend(view.flatten().tolist())
        return view.flatten(1)

    keys = moco.shuffled(flat, clips, seed=3)
    return keys.flatten().tolist(), seen


def test_keys_are_shuffled_and_put_back():
    """MoCo: a rank's key network sees clips of both ranks, yet each rank gets its own keys."""
    (first, seen), (second, _) = run_ranks(2, _keys)
    assert first == [0, 1, 2, 3] and second == [4, 5, 6, 7]
    assert set(seen) & {0, 1, 2, 3} and set(seen) & {4, 5, 6, 7}


@pytest.mark.parametrize("ranks, share", [(1, 64), (2, 32), (4, 16)])
def test_batch_and_lr_do_not_depend_on_ranks(ranks, share, folder, monkeypatch, capsys):
    """1 x 64, 2 x 32 and 4 x 16 videos are the same batch with the same learning rate."""
    import byol

    for name, value in {
        "WORLD_SIZE": ranks,
        "RANK": 0,
        "LOCAL_RANK": 0,
        "MASTER_ADDR": "a",
    }.items():
        monkeypatch.setenv(name, str(value))
    args = common._parse(byol.Recipe, ["--data", str(folder), "--warmup-epochs", "35"])
    args.views = 2
    common._check(args)
    assert args.batch_size == 64 and args.batch_size // ranks == share
    assert common.learning_rate(args, args.warmup_epochs) == pytest.approx(
        0.6 * 0.5 * (1 + np.cos(np.pi * 35 / 200))
    )


def test_signal_ends_both_ranks_at_one_step(small, tmp_path):
    """SIGTERM to one of two ranks: both stop after the same step, with a checkpoint."""
    argv = [*small, "--epochs", "50", "--log-every", "1"]
    result = run_ranks(2, _stopped, argv)
    assert result[0] == result[1] > 2
    assert torch.load(tmp_path / "out/last.pth", weights_only=True)["number"] == result[0]


def _stopped(argv):
    import os

    import byol

    steps = 0
    lerp = byol.update_target

    def count(*args):
        nonlocal steps
        steps += 1
        if steps == 3 and common.rank() == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        lerp(*args)

    byol.update_target = count
    byol.main(argv)
    return steps


def test_two_machines_are_one_job(small, tmp_path):
    """torchrun on two nodes (two agents, on two addresses of this machine) trains as on one."""
    base = ["--rho", "2", "--max-steps", "2", "--log-every", "1"]
    run_ranks(2, trained, "byol", [*small, *base, "--out", str(tmp_path / "one")])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    how = [
        "--nnodes=2",
        "--nproc_per_node=1",
        "--rdzv-backend=c10d",
        f"--rdzv-endpoint=127.0.0.1:{port}",
    ]
    how = [sys.executable, "-m", "torch.distributed.run", *how, "--rdzv-id=rho"]
    script = [str(ROOT / "byol.py"), *small, *base, "--out", str(tmp_path / "two")]
    agents = [
        subprocess.Popen(
            [*how, f"--local-addr=127.0.0.{i}", *script], stderr=subprocess.PIPE, text=True
        )
        for i in (1, 2)
    ]
    try:
        for agent in agents:
            _, errors = agent.communicate(timeout=120)
            assert agent.returncode == 0, errors
    finally:
        for agent in agents:
            agent.kill()
    logs = [(tmp_path / f"{name}/log.jsonl").read_text().splitlines() for name in ("one", "two")]
    losses = [[json.loads(line)["loss"] for line in lines] for lines in logs]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4) and len(losses[0]) == 2
