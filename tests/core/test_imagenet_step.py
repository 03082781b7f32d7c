"""A draw and a step on as many classes as ImageNet-1K has, at one image a class: a study of memory, run by hand."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

STEP = """
import sys, time
from pathlib import Path
import numpy as np, torch
from ncfm_core.bench.machine import held_mib, peak_mib, reset_peak
from ncfm_core.datasets import converted, dataset
from ncfm_core.distill import Distillation
from ncfm_core.pools import TeacherPool, TeacherTraining
from ncfm_core.submission import resolve

CPU = torch.device("cpu")
classes, real_batch, folder = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
labels = np.repeat(np.arange(classes), real_batch).astype(np.int64), np.arange(classes)

def own():
    # Mapped pages of the set's file count as nobody's: the system takes them back when it needs room.
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("RssAnon:")) / 2**10

def fill(train, test):
    rng = np.random.default_rng(0)
    block = rng.integers(0, 256, (1024, 3, 64, 64), dtype=np.uint8)
    for array in (train, test):
        for start in range(0, len(array), 1024):
            array[start : start + 1024] = block[: len(array) - start]

made = converted.convert(converted.Space(1 << 20, folder), name="imagenet", listing="made up", image_shape=(3, 64, 64),
    labels=lambda: labels, fill=fill)
data = dataset.Dataset("imagenet", made.train_images, made.train_labels, made.test_images, made.test_labels,
    tuple(map(str, range(classes))), torch.zeros(3), torch.ones(3), train_file=made.train_file, test_file=made.test_file)
job = resolve({"dataset": "imagenet", "ipc": 1, "preset": "quick", "model": {"width": 32}, "teachers": {"count": 1},
    "method": {"factor": 2, "real_batch": real_batch}})
print(job.model.label, f"{classes} classes, {real_batch} real images of each, {job.method.num_frequencies} frequencies")
teacher = TeacherTraining(data, job.model, job.teachers.training, seed=0, index=0, device=CPU, compiled=False)
pool = TeacherPool(job.model, data, [teacher.result()], CPU)
run = Distillation(data, pool, job.method, ipc=1, seed=0, device=CPU, memory_limit=256 << 20, compiled=False)
print(run.execution)
before, peak = own(), 0.0
forward = run._features_forward

def watched(*arguments):
    global peak
    peak = max(peak, own())
    return forward(*arguments)

run._features_forward = watched
reset_peak(CPU)
started = time.monotonic()
run._open_draw()
drawn = time.monotonic()
run._advance()
peak = max(peak, own())
number = pool.network.num_features
print(f"draw {drawn - started:.0f} s, step {time.monotonic() - drawn:.1f} s; features {number} numbers, real ones "
      f"{classes * real_batch * number / 2**18:.0f} MiB; RssAnon {before:.0f} MiB before, {peak:.0f} MiB at most; "
      f"VmHWM {peak_mib(CPU):.0f} MiB with the pages of the file")
print(peak - before)
"""


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the memory of a process is read from /proc")
@pytest.mark.parametrize(("classes", "real_batch"), [(300, 64), (1000, 64)])
def test_step_of_imagenet_at_one_image_a_class_needs_little_memory(
    classes: int, real_batch: int, tmp_path: Path
) -> None:
    if shutil.disk_usage(tmp_path).free < 3 << 30:
        pytest.skip("needs 3 GiB of disk")
    root = str(Path(__file__).resolve().parents[2])
    done = subprocess.run(
        [sys.executable, "-c", STEP, str(classes), str(real_batch), str(tmp_path / "cache")],
        env=os.environ | {"PYTHONPATH": root},
        capture_output=True,
        text=True,
        check=False,
    )
    shutil.rmtree(tmp_path / "cache", ignore_errors=True)
    assert done.returncode == 0, done.stderr
    sys.stdout.write(done.stdout)
    features_mib = classes * real_batch * 512 / 2**18
    assert float(done.stdout.split()[-1]) < features_mib + 700
