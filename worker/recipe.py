"""The published recipe: a script that trains one student on the set, without this package."""

from __future__ import annotations

from ncfm_core.catalog import DatasetFacts
from ncfm_core.spec import EvaluationSpec
from worker.recipe_network import network_source

SCRIPT = """\
import math
from torch import nn
import torch.nn.functional as F

mean, std = (torch.tensor(each).view(1, -1, 1, 1) for each in ({mean}, {std}))
epochs, batch_size = {epochs}, {batch_size}

def augment(x):  # brightness, saturation and contrast of each image; then the batch is shifted, stretched or turned
    {flip}u = torch.rand(3, len(x), 1, 1, 1)
    x = x + (u[0] - 0.5)
    if x.shape[1] > 1:
        x = torch.lerp(x.mean(1, keepdim=True), x, 2 * u[1])
    x = torch.lerp(x.mean((1, 2, 3), keepdim=True), x, u[2] + 0.5)
    theta, way = torch.eye(2, 3).repeat(len(x), 1, 1), torch.randint(3, ()).item()
    if way == 0:
        reach = int(0.125 * x.shape[2] + 0.5)
        theta[:, :, 2] = torch.randint(-reach, reach + 1, (len(x), 2)) * 2 / x.shape[2]
    elif way == 1:
        theta[:, [0, 1], [0, 1]] = 1 / 1.2 + torch.rand(len(x), 2) * (1.2 - 1 / 1.2)
    else:
        angle = (torch.rand(len(x)) - 0.5) * math.pi / 6
        turn = [angle.cos(), -angle.sin(), angle.sin(), angle.cos()]
        theta[:, :, :2] = torch.stack(turn, 1).view(-1, 2, 2)
    return F.grid_sample(x, F.affine_grid(theta, list(x.shape), align_corners=False), align_corners=False)

{network}optimizer = {optimizer}
schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [round(epochs * at) for at in {milestones}], {gamma})
for epoch in range(epochs):
    for chosen in torch.randperm(len(images)).split(batch_size):
        loss = F.cross_entropy(model(augment((images[chosen] - mean) / std)), labels[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    schedule.step()
# test it on pixels in [0, 1]: model{evaluation}((test_images - mean) / std).argmax(1)"""

OPTIMIZERS = {
    "adamw": "torch.optim.AdamW(model.parameters(), lr={lr}, weight_decay={decay})",
    "sgd": "torch.optim.SGD(model.parameters(), lr={lr}, momentum=0.9, weight_decay={decay})",
}


def training_script(facts: DatasetFacts, entry: EvaluationSpec) -> str:
    """Source of the script, with the numbers of a protocol in it.

    It is the protocol without its CutMix, in as few lines as will do; it expects `torch`, `images` and `labels` to be there.

    Args:
        facts: the catalog's entry of the data.
        entry: the protocol and the student's network.
    """
    training = entry.training
    return SCRIPT.format(
        mean=list(facts.mean),
        std=list(facts.std),
        epochs=training.epochs,
        batch_size=training.batch_size,
        flip="x = torch.where(torch.rand(len(x), 1, 1, 1) < 0.5, x.flip(3), x)\n    " if facts.flip else "",
        network=network_source(facts, entry.model),
        evaluation=".eval()" if entry.model.batch_statistics else "",
        optimizer=OPTIMIZERS[training.optimizer].format(lr=training.lr, decay=training.weight_decay),
        milestones=list(training.milestones),
        gamma=training.gamma,
    )
