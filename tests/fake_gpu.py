"""A GPU that is not there: torch's fake CUDA tensors have a device, a shape and a type, but no
numbers. Used by test_gpu.py and bench.py."""

from unittest import mock

import torch
from torch import nn

CUDA = torch.device("cuda")


def yes(**_):
    return True


def move(mode, model):
    """Module.to(CUDA): the registered tensors become fake ones, of a FakeTensorMode, on the GPU."""
    with mode:
        for module in model.modules():
            for name, p in module.named_parameters(recurse=False):
                fake = torch.empty(p.shape, dtype=p.dtype, device=CUDA)
                setattr(module, name, nn.Parameter(fake, p.requires_grad))
            for name, b in module.named_buffers(recurse=False):
                setattr(module, name, torch.empty(b.shape, dtype=b.dtype, device=CUDA))
    return model


def with_bfloat16(autocast):
    """A function that returns autocast() as on a GPU that computes in bfloat16. For the rest torch
    must not believe that there is a GPU: it would ask the driver."""

    def on_gpu():
        with mock.patch.multiple(torch.cuda, is_available=yes, is_bf16_supported=yes):
            return autocast()

    return on_gpu
