"""Ready for a GPU, without one: what runs on the device runs on fake CUDA tensors, which have a
device, a shape and a type but no numbers. A tensor that was left on the CPU raises there, as does a
look at a number (.item(), a boolean mask as an index), which would wait for a GPU. Backward passes
do not run on them, DDP and SyncBN's kernels neither: those need a GPU."""

import importlib
import os
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
    unset_fake_temporarily,
)
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.transforms import v2

import byol
import common
import eval_linear
from conftest import METHODS, arguments, run_ranks
from fake_gpu import CUDA, move, with_bfloat16, yes


class Transfers(TorchDispatchMode):
    """Notes what makes the CPU wait for a GPU although it looks at no number: a copy from one to
    the other that is not non_blocking, and a CPU tensor as the index of one on the GPU."""

    def __init__(self):
        super().__init__()
        self.waits = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        name = function.overloadpacket.__name__
        waits = False
        if name == "_to_copy":
            waits = args[0].device != result.device and not kwargs.get("non_blocking")
        elif name == "copy_":
            waits = args[0].device != args[1].device and args[2:3] != (True,)
        elif name in ("index", "index_put", "index_put_"):
            waits = any(i is not None and i.device != args[0].device for i in args[1])
        if waits:
            self.waits.append(name)
        return result


class FakeGPU:
    """Lets a script's own main() run: from its first batch on tensors are fake; its backward pass
    is left out, and what it would leave is filled in."""

    def __init__(self, monkeypatch):
        self.mode = FakeTensorMode()
        self.transfers = Transfers()
        self.model = None
        self.records = []  # loss, features, numbers of each step
        self.sent = []  # what a collective got
        monkeypatch.setattr(common, "device", lambda: CUDA)
        monkeypatch.setattr(common, "autocast", with_bfloat16(common.autocast))
        monkeypatch.setattr(common.Run, "batches", lambda run: self.batches(run))
        monkeypatch.setattr(common.Run, "record", lambda run, *a, **k: self.record(*a, **k))
        monkeypatch.setattr(torch.cuda, "set_device", lambda _: None)
        monkeypatch.setattr(torch.nn.Module, "to", lambda model, device: move(self.mode, model))
        monkeypatch.setattr(torch.nn.parallel, "DistributedDataParallel", lambda m, **_: m)
        monkeypatch.setattr(torch.Tensor, "backward", lambda loss: self.backward(loss))
        monkeypatch.setattr(dist, "all_gather", self.all_gather(dist.all_gather))

    def all_gather(self, original):
        def all_gather(parts, x):
            self.sent.append(x)
            original(parts, x)

        return all_gather

    def batches(self, run):
        cfg, self.model = run.cfg, run.model
        B = cfg.batch_size // common.world_size()
        shape = (B, cfg.num_views, 3, cfg.frames, cfg.size, cfg.size)
        for run.step in range(3):
            with self.mode, self.transfers:  # the step of the script runs in them, too
                label = torch.empty(B, dtype=torch.long, device=CUDA)
                yield {"clips": torch.empty(shape, device=CUDA), "label": label}

    def record(self, loss, features, **numbers):
        self.records.append((loss, features, numbers))

    def backward(self, loss):
        assert loss.requires_grad and loss.device.type == "cuda" and loss.ndim == 0
        for p in self.model.parameters():
            if p.requires_grad:
                p.grad = torch.empty_like(p)


@pytest.fixture
def gpu(monkeypatch):
    return FakeGPU(monkeypatch)


@pytest.fixture
def two_ranks(monkeypatch):
    """Rank 1 of two, the other one not there."""
    for name, value in dict(WORLD_SIZE=2, RANK=1, LOCAL_RANK=1, LOCAL_WORLD_SIZE=2).items():
        monkeypatch.setenv(name, str(value))
    dist.init_process_group("fake", rank=1, world_size=2, store=FakeStore())
    yield
    dist.destroy_process_group()


def test_fake_tensors_find_what_they_should():
    """The tools of this file: each fault raises or is noted."""
    transfers = Transfers()
    with FakeTensorMode(), transfers:
        x = torch.empty(4, 3, device=CUDA)
        with pytest.raises(Exception, match="same device|different devices"):
            x + torch.ones(4, 3)
        for look in (torch.Tensor.item, bool, float):
            with pytest.raises(DataDependentOutputException):
                look(x.sum())
        with pytest.raises(DynamicOutputShapeException):
            x[:, torch.ones(3, dtype=torch.bool, device=CUDA)]
        assert transfers.waits == []
        x.cpu(), x[torch.arange(2)], torch.ones(3).to(CUDA), x.copy_(torch.ones(4, 3))
        assert transfers.waits == ["_to_copy", "index", "_to_copy", "copy_"]
        torch.ones(3).to(CUDA, non_blocking=True)
        x.copy_(torch.ones(4, 3), non_blocking=True)
        assert len(transfers.waits) == 4


OWN = {"moco": ["--queue", "40"], "swav": "--feature-queue 12 --queue-from 0".split()}


def check_steps(gpu):
    assert len(gpu.records) == 3
    assert gpu.transfers.waits == []
    for loss, features, numbers in gpu.records:
        for tensor in (loss, features):
            assert tensor.device.type == "cuda" and tensor.dtype == torch.float32
        assert not any(isinstance(number, torch.Tensor) for number in numbers.values())


@pytest.mark.parametrize("optimizer", ["lars", "sgd"])
@pytest.mark.parametrize("method", METHODS)
def test_a_step_on_one_gpu(method, optimizer, gpu, small):
    """No tensor of a script's step is on the CPU, and nothing in it waits; with activations that
    are recomputed, too. (AdamW counts its steps on the CPU, which is no wait.)"""
    script = importlib.import_module(method)
    for more in ([], ["--rho", "3"], ["--low-memory"]):
        gpu.records.clear()
        argv = [*small, *OWN.get(method, []), "--optimizer", optimizer, "--lr", "0.1"]
        script.main([*argv, *more])
        check_steps(gpu)


@pytest.mark.parametrize("method", METHODS)
def test_a_step_on_two_gpus(method, gpu, two_ranks, small):
    """Collectives get tensors of the GPU; MoCo's clips go over the wire as the network takes them,
    in bfloat16."""
    script = importlib.import_module(method)
    script.main([*small, *OWN.get(method, []), "--no-sync-bn", "--rho", "3"])
    check_steps(gpu)
    assert bool(gpu.sent) == (method != "byol")
    assert all(x.device.type == "cuda" for x in gpu.sent)
    clips = [x.dtype for x in gpu.sent if x.ndim == 6]
    assert clips == [torch.bfloat16] * 3 * (method == "moco")
    assert all(x.dtype == torch.float32 for x in gpu.sent if x.ndim < 6)


def test_sync_bn_on_gpus_only(two_ranks, monkeypatch):
    """--sync-bn converts every BN on a GPU; on a CPU, where it does not run, none."""
    monkeypatch.setattr(torch.nn.parallel, "DistributedDataParallel", lambda m, **_: m)
    kinds = {}
    for kind in ("cpu", "cuda"):
        monkeypatch.setattr(common, "device", lambda kind=kind: torch.device(kind))
        cfg = arguments(byol, sync_bn=True)
        model = common.wrap_ddp(byol.BYOL(cfg), cfg)
        norms = [m for m in model.modules() if isinstance(m, torch.nn.modules.batchnorm._BatchNorm)]
        kinds[kind] = {type(norm) for norm in norms}
    assert torch.nn.SyncBatchNorm not in kinds["cpu"]
    assert kinds["cuda"] == {torch.nn.SyncBatchNorm}


@pytest.mark.parametrize("bf16", [True, False])
def test_the_type_that_a_gpu_computes_in(bf16, monkeypatch):
    """bfloat16 if the GPU has it, not if it is emulated; else float32."""
    asked = []

    def is_bf16_supported(**how):
        asked.append(how)
        return bf16

    monkeypatch.setattr(common, "device", lambda: CUDA)
    with mock.patch.multiple(torch.cuda, is_available=yes, is_bf16_supported=is_bf16_supported):
        context = common.autocast()
    with FakeTensorMode(), context:
        x = torch.empty(4, 4, device=CUDA)
        assert (x @ x).dtype == (torch.bfloat16 if bf16 else torch.float32)
    assert asked[0] == {"including_emulation": False}


def draw_outside(monkeypatch):
    """Operators of transforms.v2 draw real numbers, and always apply."""

    def outside(make_params):
        def drawn(self, inputs):
            with unset_fake_temporarily():
                params = make_params(self, inputs)
            if "fn_idx" in params:
                params["fn_idx"] = params["fn_idx"].tolist()
            if "v" in params:
                params["v"] = torch.zeros(1, 1, 1)  # what RandomErasing fills the box with
            return params

        return drawn

    for kind in (v2.ColorJitter, v2.GaussianBlur, v2.RandomErasing, v2.RandomRotation):
        monkeypatch.setattr(kind, "make_params", outside(kind.make_params))
    monkeypatch.setattr(torch, "rand", np.zeros)
    monkeypatch.setattr(torch, "multinomial", lambda *_: 1)


@pytest.mark.parametrize("name", "flip jitter gray blur tint rotate cutout noise sobel".split())
def test_augmentation_on_a_gpu(name, monkeypatch):
    """Every operator takes clips on the GPU; all but one do not wait for it."""
    draw_outside(monkeypatch)
    _, color = common.train_transform(arguments(byol, augment=name))
    seeds = np.arange(6).reshape(2, 3)
    transfers = Transfers()
    with FakeTensorMode():
        clips = torch.empty(2, 3, 8, 3, 32, 32, dtype=torch.uint8, device=CUDA)
        with transfers:
            clips = common.augment(clips, seeds, color)
    assert clips.shape == (2, 3, 3, 8, 32, 32)
    assert clips.dtype == torch.float32 and clips.device.type == "cuda"
    if name != "cutout":  # torchvision brings its color from the CPU
        assert transfers.waits == []


def test_a_batch_is_received_without_waiting(monkeypatch):
    """What the loader yields goes to the GPU and is augmented there; the seeds stay on the CPU."""
    draw_outside(monkeypatch)
    monkeypatch.setattr(common, "device", lambda: CUDA)
    run = common.Run.__new__(common.Run)
    run.bad_videos = []
    run.dataset = mock.Mock(color=common.train_transform(arguments(byol))[1])
    transfers = Transfers()
    with FakeTensorMode():
        batch = {
            "clips": torch.empty(2, 3, 8, 3, 32, 32, dtype=torch.uint8),
            "seeds": np.arange(6).reshape(2, 3),
            "label": torch.empty(2, dtype=torch.long),
            "starts": torch.empty(2, 3),
            "bad": ["", ""],
        }
        with transfers:
            batch = run.receive(batch)
    assert batch.keys() == {"clips", "label", "starts"} and transfers.waits == []
    assert all(tensor.device.type == "cuda" for tensor in batch.values())
    assert batch["clips"].shape == (2, 3, 3, 8, 32, 32) and batch["clips"].dtype == torch.float32


def test_the_stop_flag_is_shared_on_the_cpu(two_ranks, monkeypatch):
    """A GPU would be waited for in each step."""
    monkeypatch.setattr(common, "device", lambda: CUDA)
    run = common.Run.__new__(common.Run)
    run.cfg, run.knn_every, run.stop_asked = arguments(byol, log_every=1000), 0, False
    run.step, run.steps_per_epoch, run.total, run.last = 0, 100, 100, 100
    sent = []

    def all_gather(parts, x):
        sent.append(x)
        for part in parts:
            part.copy_(x)

    monkeypatch.setattr(dist, "all_gather", all_gather)
    assert run.after_step() is False
    assert [x.device.type for x in sent] == ["cpu"]


def backend_of_a_gpu(out):
    """What init_distributed asks torch for on two ranks with GPUs, and what it asks of a GPU."""
    asked = []
    os.environ.update(WORLD_SIZE="2", RANK="0")
    common.device = lambda: CUDA
    torch.cuda.set_device = lambda _: None
    torch.cuda.is_bf16_supported = yes
    dist.init_process_group = asked.append
    common.init_distributed(arguments(byol, out=out))
    return asked


def test_gpus_have_a_backend_for_the_cpu_too(tmp_path):
    """NCCL for tensors on GPUs; gloo for the stop flag, losses and Python objects."""
    assert run_ranks(1, backend_of_a_gpu, str(tmp_path)) == [["cpu:gloo,cuda:nccl"]]


class FakeClips(torch.utils.data.Dataset):
    """The test views of five videos, as a TestClips gives them; more: other inputs (boxes)."""

    def __init__(self, dataset, more=()):
        self.dataset, self.more = dataset, more

    def __len__(self):
        return 5

    def __getitem__(self, i):
        clips = torch.empty(2, 3, 4, 16, 16, dtype=torch.uint8)
        return {"clips": clips, "index": i, "bad": "", "more": self.more}


def one_by_one(dataset, **_):
    return [dataset[i] for i in range(len(dataset))]


def test_evaluation_on_a_gpu(gpu, monkeypatch):
    """Features and softmax are computed on the GPU and come back to the CPU, where kNN votes."""
    monkeypatch.setattr(common, "DataLoader", one_by_one)  # torch's looks at a random number
    cfg = arguments(eval_linear, backbone="tiny")
    dataset = mock.Mock(cfg=cfg)
    probe = move(gpu.mode, eval_linear.Probe(cfg, classes=7)).eval()
    seen = []

    def backbone(views, boxes):
        assert boxes.device.type == "cuda"
        seen.append(views)
        return probe.encoder.backbone(views)

    with gpu.mode:
        clips = FakeClips(dataset, more=[torch.empty(3, 5)])
        features, indices = common.extract_features(backbone, clips)
        scores, _ = common.extract_features(probe.softmax, FakeClips(dataset))
    assert all(views.device.type == "cuda" and views.dtype == torch.float32 for views in seen)
    assert features.shape == (5, 2, 64) and scores.shape == (5, 7)
    for tensor in (features, scores, indices):
        assert tensor.device.type == "cpu"
    features, labels = torch.randn(features.shape).mean(1), torch.arange(5) % 2
    assert 0 <= common.knn_accuracy(features, labels, features, labels) <= 100


def test_the_probe_on_a_gpu(gpu, folder, tmp_path, monkeypatch):
    """The linear probe's step on clips, as the methods' steps."""
    monkeypatch.setattr(eval_linear, "copy", mock.Mock())  # fake weights cannot be compared
    monkeypatch.setattr(eval_linear, "moved", lambda *_: [])
    cfg = arguments(eval_linear, data=str(folder), out=str(tmp_path / "out"), backbone="tiny")
    cfg.size, cfg.batch_size, cfg.workers, cfg.sync_bn = 16, 6, 0, False
    eval_linear.fill_settings(cfg)
    dataset = common.VideoClips(cfg, eval_linear.sample_clips)
    model = move(gpu.mode, eval_linear.Probe(cfg, classes=2))
    eval_linear.probe_on_clips(cfg, dataset, model)
    check_steps(gpu)


def workers_of(cores, kind, ranks, workers=-1):
    """What init_distributed chooses: decoding processes, threads of torch."""
    os.sched_getaffinity = lambda _: set(range(cores))
    os.environ["LOCAL_WORLD_SIZE"] = str(ranks)
    common.device = lambda: torch.device(kind)
    torch.cuda.set_device = lambda _: None
    torch.cuda.is_bf16_supported = yes
    torch.get_num_threads = lambda: cores
    threads = []
    torch.set_num_threads = threads.append
    cfg = arguments(byol, out=os.environ["TMPDIR"], workers=workers)
    common.init_distributed(cfg)
    return cfg.workers, threads


@pytest.mark.parametrize(
    "cores, kind, ranks, workers, threads",
    [
        (1, "cpu", 1, 1, 1),
        (2, "cpu", 1, 1, 1),
        (16, "cpu", 1, 8, 8),  # half for the network
        (16, "cpu", 4, 2, 2),
        (1, "cuda", 1, 1, 1),
        (16, "cuda", 1, 16, 16),
        (16, "cuda", 8, 2, 2),
        (96, "cuda", 2, 16, 48),
    ],
)
def test_the_default_number_of_workers(cores, kind, ranks, workers, threads, tmp_path, monkeypatch):
    """From the cores that this process may use, as taskset leaves them, shared by the ranks."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    assert run_ranks(1, workers_of, cores, kind, ranks) == [(workers, [threads])]


def test_no_workers_means_one_thread(tmp_path, monkeypatch):
    """Augmentation in the main process: two threads on a busy machine made it 5 times slower."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    assert run_ranks(1, workers_of, 16, "cpu", 1, 0) == [(0, [1])]


@pytest.mark.parametrize("bf16", [True, False])
def test_a_warning_without_bfloat16(bf16, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(common, "device", lambda: CUDA)
    monkeypatch.setattr(torch.cuda, "set_device", lambda _: None)

    def is_bf16_supported(including_emulation=True):
        return bf16 or including_emulation

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", is_bf16_supported)
    cfg = arguments(byol, out=str(tmp_path))
    common.init_distributed(cfg)
    assert ("WARN this GPU lacks bfloat16" in capfd.readouterr().out) == (not bf16)
