"""The published recipe: a script that trains one student on the set, without this package."""

from __future__ import annotations

from ncfm_core.catalog import DatasetFacts
from ncfm_core.spec import AugmentSpec, EvaluationSpec
from worker.recipe_network import network_source

SCRIPT = """\
import math
import random
from torch import nn
import torch.nn.functional as F

mean, std = (torch.tensor(each).view(1, -1, 1, 1) for each in ({mean}, {std}))
epochs, batch_size = {epochs}, {batch_size}

{operations}

def augment(x):
{augment}    return x

{network}optimizer = {optimizer}
milestones = [round(epochs * at) for at in {milestones}]
schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones, {gamma})
for epoch in range(epochs):
    for chosen in torch.randperm(len(images)).split(batch_size):
        logits = model(augment((images[chosen] - mean) / std))
        loss = {loss}
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    schedule.step()
{reset}# test it on pixels in [0, 1]: model{evaluation}((test_images - mean) / std).argmax(1)"""

OPTIMIZERS = {
    "adamw": "torch.optim.AdamW(model.parameters(), lr={lr}, weight_decay={decay})",
    "sgd": "torch.optim.SGD(model.parameters(), lr={lr}, momentum=0.9, weight_decay={decay})",
}


WARP = """\
def warp(x, matrix, shift=0.0):
    theta = torch.zeros(len(x), 2, 3)
    theta[:, :, :2], theta[:, :, 2] = matrix, shift
    return F.grid_sample(x, F.affine_grid(theta, list(x.shape), align_corners=False), align_corners=False)"""

OPERATIONS = {
    "flip": """\
def flip(x):
    return torch.where(torch.rand(len(x), 1, 1, 1) < 0.5, x.flip(3), x)""",
    "color": """\
def color(x):  # brightness, saturation and contrast of each image
    u = torch.rand(3, len(x), 1, 1, 1)
    x = x + (u[0] - 0.5)
    if x.shape[1] > 1:
        x = torch.lerp(x.mean(1, keepdim=True), x, 2 * u[1])
    return torch.lerp(x.mean((1, 2, 3), keepdim=True), x, u[2] + 0.5)""",
    "crop": """\
def crop(x):  # shifted by whole pixels
    reach = int(0.125 * x.shape[2] + 0.5)
    return warp(x, torch.eye(2), torch.randint(-reach, reach + 1, (len(x), 2)) * 2 / x.shape[2])""",
    "scale": """\
def scale(x):
    return warp(x, torch.diag_embed(1 / 1.2 + torch.rand(len(x), 2) * (1.2 - 1 / 1.2)))""",
    "rotate": """\
def rotate(x):
    angle = (torch.rand(len(x)) - 0.5) * math.pi / 6
    turn = [angle.cos(), -angle.sin(), angle.sin(), angle.cos()]
    return warp(x, torch.stack(turn, 1).view(-1, 2, 2))""",
    "cutout": """\
def cutout(x):  # a hole of half the size
    size, side = x.shape[2], int(0.5 * x.shape[2] + 0.5)
    start = torch.randint(size + 1 - side % 2, (2, len(x), 1)) - side // 2
    inside = (torch.arange(size) >= start) & (torch.arange(size) < start + side)
    return x * ~(inside[0].unsqueeze(2) & inside[1].unsqueeze(1)).unsqueeze(1)""",
}
GEOMETRIC = ("crop", "scale", "rotate")
LOSSES = {
    "cross_entropy": "F.cross_entropy(logits, labels[chosen])",
    "l1_logits": "(logits - soft_labels[chosen]).abs().mean()",
    "soft_cross_entropy": "F.cross_entropy(logits, soft_labels[chosen].softmax(1))",
    "kl": 'F.kl_div(logits.log_softmax(1), soft_labels[chosen].log_softmax(1), reduction="batchmean", log_target=True)',
}


def _augmentation(spec: AugmentSpec) -> tuple[str, str]:
    """Source of the operations that a specification names, and the lines that apply them to `x`."""
    ops = spec.ops if spec.policy != "none" else ()
    warp = [WARP] if set(ops) & set(GEOMETRIC) else []
    sources = "\n\n".join(warp + [source for name, source in OPERATIONS.items() if name in ops])
    if spec.policy == "single" and ops:
        return sources, f"    x = random.choice([{', '.join(ops)}])(x)\n"
    steps = [f"{name}(x)" for name in ("flip", "color") if name in ops]
    if geometric := [name for name in GEOMETRIC if name in ops]:
        steps.append(f"random.choice([{', '.join(geometric)}])(x)")
    steps += [f"{name}(x)" for name in ("cutout",) if name in ops]
    return sources, "".join(f"    x = {step}\n" for step in steps)


def training_script(facts: DatasetFacts, entry: EvaluationSpec) -> str:
    """Source of the script, with the numbers of a protocol in it.

    It is the protocol without its CutMix, in as few lines as will do; it expects `torch`, `images`, `labels` and, where the
    protocol trains on teacher logits, `soft_labels` to be there.

    Args:
        facts: the catalog's entry of the data.
        entry: the protocol and the student's network.
    """
    training = entry.training
    operations, augment = _augmentation(training.augment)
    return SCRIPT.format(
        mean=list(facts.mean),
        std=list(facts.std),
        epochs=training.epochs,
        batch_size=training.batch_size,
        operations=operations,
        augment=augment,
        reset="    if epoch + 1 in milestones:\n        optimizer.state.clear()\n" if training.reset_optimizer else "",
        network=network_source(facts, entry.model),
        evaluation=".eval()" if entry.model.batch_statistics else "",
        optimizer=OPTIMIZERS[training.optimizer].format(lr=training.lr, decay=training.weight_decay),
        milestones=list(training.milestones),
        gamma=training.gamma,
        loss=LOSSES[training.loss],
    )
