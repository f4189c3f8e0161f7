"""What test_steps.py must know of common.py's internals, and nothing else does.

The witness reads a run through the five functions below. When the shared code changes its flags,
its loop or its files, this file changes and the witness does not.
"""

import copy
import importlib
import json
from argparse import Namespace
from pathlib import Path
from unittest import mock

import torch

import common


def command_line(data, out, max_steps, settings):
    """The flags of a run that reads its settings (a dict) from here and writes one log line.

    The names in `settings` are those of design.md; `warmup` is a share of the run."""
    argv = f"--data {data} --out {out} --max-steps {max_steps} --small --backbone tiny --workers 0"
    argv += " --frames 4 --stride 4 --size 16 --knn-every 0 --log-every 1000"
    argv = argv.split()
    for name, value in settings.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            argv += [f"--{flag}" if value else f"--no-{flag}"]
        elif isinstance(value, tuple):
            argv += [f"--{flag}", *map(str, value)]
        else:
            argv += [f"--{flag}", str(value)]
    return argv


def run_with_clips(method, argv, clips, bn_in_eval=False):
    """Run a method's script; its step number n trains on this rank's slice of clips[n].

    clips[n] is the global batch (B, V, 3, T, H, W). Returns a copy of the model before the first
    step. `bn_in_eval` makes BN use its running statistics, which then stay as they are."""
    start = []
    decoded_batches = common.Run.batches

    def given_batches(run):
        run.model.train(not bn_in_eval)
        start.append(copy.deepcopy(run.model))
        for batch in decoded_batches(run):
            yield {**batch, "clips": common.local_part(clips[run.step])}

    with mock.patch.object(common.Run, "batches", given_batches):
        importlib.import_module(method).main(argv)
    return start[0]


def parts(model):
    """The modules of a model by name: encoder, and target, predictor, prototypes if it has them."""
    return dict(model.named_children())


def checkpoint(out):
    """What last.pth says: step, model (name -> tensor), keys enqueued so far (None without a
    queue), learning rate of each group of the optimizer, sum of the losses of all steps."""
    content = torch.load(Path(out, "last.pth"), weights_only=True)
    model = dict(content["model"])
    enqueued = model.pop("_extra_state", None)
    if "queue" in model and not model["queue"].numel():  # SwAV's feature queue, which is off
        del model["queue"]
        enqueued = None
    return Namespace(
        step=content["step"],
        model=model,
        enqueued=None if enqueued is None else int(enqueued),
        lrs=[group["lr"] for group in content["optimizer"]["param_groups"]],
        loss_sum=sum_of_losses(out),
    )


def log_lines(out):
    return [json.loads(line) for line in Path(out, "log.jsonl").read_text().splitlines()]


def sum_of_losses(out):
    """Over all steps: a line of the log has the mean of the steps since the line before."""
    total, before = 0.0, 0
    for line in log_lines(out) if Path(out, "log.jsonl").exists() else ():
        total += line["loss"] * (line["step"] - before)
        before = line["step"]
    return total


def last_log_line(out):
    """The last object of log.jsonl, but `loss` is the mean over all steps of the run."""
    line = log_lines(out)[-1]
    return {**line, "loss": sum_of_losses(out) / line["step"]}
