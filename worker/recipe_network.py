"""The network of the published recipe as a few lines of PyTorch that need nothing of this package."""

from __future__ import annotations

from math import gcd

from ncfm_core.catalog import DatasetFacts
from ncfm_core.geometry import chain, pool_window, residual_stages
from ncfm_core.spec import ModelSpec

CONVNET = """\
def block(i, o, padding=1):
    return [nn.Conv2d(i, o, 3, padding=padding), {norm}nn.ReLU(), nn.AvgPool2d(2)]

layers = block({channels}, {width}, {padding}) + [layer for _ in range({depth} - 1) for layer in block({width}, {width})]
"""
CHAIN = """\
layers = []
for i, o, kernel, padding, pool in {stages}:
    layers += [nn.Conv2d(i, o, kernel, padding=padding), {norm}nn.ReLU()] + [nn.MaxPool2d(2)] * pool
"""
RESIDUAL = """\
class Block(nn.Module):
    def __init__(self, i, o, stride):
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(i, o, 3, {stride}, 1, bias=False), {norm}nn.ReLU(), {halve})
        self.second = nn.Sequential(nn.Conv2d(o, o, 3, 1, 1, bias=False), {norm})
        skip = [nn.Conv2d(i, o, 1, {stride}, bias=False), {halve}, {norm}]
        self.skip = nn.Sequential(*skip if i != o else [])

    def forward(self, x):
        return F.relu(self.second(self.first(x)) + self.skip(x))

o = {width}
layers = [nn.Conv2d({channels}, o, 3, padding={padding}, bias=False), {norm}nn.ReLU()]
layers += [Block(i, o, stride) for i, o, stride in {stages}] + [nn.AvgPool2d({window})]
"""
MODEL = """\
model = nn.Sequential(*layers, nn.Flatten(), nn.LazyLinear({classes}))
model(images[:{some}])
"""


def network_source(facts: DatasetFacts, model: ModelSpec) -> str:
    """Source that builds `model` for images of a data set; it expects `nn`, `F` and `images` to be there."""
    norm = {
        "instance": "nn.GroupNorm(o, o), ",
        "group": f"nn.GroupNorm({gcd(model.width, 4) if model.name == 'convnet' else 'math.gcd(o, 4)'}, o), ",
        "batch": "nn.BatchNorm2d(o), ",
        "none": "",
    }[model.norm]
    # A batch norm cannot take the statistics of one value, which is what one image leaves of a map of one pixel.
    tail = MODEL.format(classes=facts.num_classes, some=2 if model.batch_statistics else 1)
    extra = 2 if facts.image_size == 28 else 0
    if model.name == "convnet":
        values = {"width": model.width, "depth": model.depth, "channels": facts.channels, "padding": 1 + extra}
        return CONVNET.format(norm=norm, **values) + tail
    inputs = facts.channels
    if model.name in ("alexnet", "vgg11"):
        stages: list[tuple[int, ...]] = []
        for stage in chain(model):
            padding = stage.kernel // 2 + (0 if stages else extra)
            stages.append((inputs, stage.channels, stage.kernel, padding, int(stage.pool)))
            inputs = stage.channels
        return CHAIN.format(norm=norm, stages=stages) + tail
    blocks, inputs = [], model.width
    for outputs, stride in residual_stages(model):
        blocks.append((inputs, outputs, stride))
        inputs = outputs
    average = model.name == "resnet18_ap"
    residual = RESIDUAL.format(
        norm=norm,
        stride=1 if average else "stride",
        halve="nn.AvgPool2d(stride)" if average else "nn.Identity()",
        width=model.width,
        channels=facts.channels,
        padding=1 + extra,
        stages=blocks,
        window=pool_window(model, facts.image_size),
    )
    return residual + tail
