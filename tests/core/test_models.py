from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap
from torch.overrides import TorchFunctionMode

from ncfm_core.cost import forward
from ncfm_core.geometry import last_map, num_features, padded, smallest_image, whole_sizes
from ncfm_core.models import MODELS, Network, build_model
from ncfm_core.networks import NETWORKS, NetworkName, Norm
from ncfm_core.rng import generator
from ncfm_core.spec import ModelSpec

DEPTHS = {8: 2, 28: 3, 32: 3, 64: 4, 128: 5}
"""Blocks of a ConvNet for each image size."""
EVERY = [(facts.name, norm) for facts in NETWORKS.values() for norm in facts.norms]


def model_spec(name: NetworkName, *, size: int = 32, width: int = 4, norm: Norm = "instance") -> ModelSpec:
    return ModelSpec(name=name, depth=DEPTHS[size] if name == "convnet" else None, width=width, norm=norm)


def build(spec: ModelSpec, *, size: int = 32, channels: int = 3, seed: int = 0, classes: int = 5) -> Network:
    draw = generator(seed, "init")
    return build_model(spec, image_shape=(channels, size, size), num_classes=classes, draw=draw)


def random_images(count: int, *, size: int = 32, channels: int = 3) -> Tensor:
    return torch.randn((count, channels, size, size), generator=generator(0, "images"))


@pytest.mark.parametrize("size", DEPTHS)
@pytest.mark.parametrize(("name", "norm"), EVERY)
def test_maps_features_and_logits_have_the_shapes_that_the_geometry_says(
    name: NetworkName, norm: Norm, size: int
) -> None:
    spec = model_spec(name, size=size, norm=norm)
    if padded(size) < smallest_image(spec):
        assert (size, name, norm) in {
            *((8, "vgg11", norm) for norm in NETWORKS["vgg11"].norms),
            (8, "resnet18", "instance"),
            (8, "resnet18_ap", "instance"),
        }
        return
    channels = 1 if size in (8, 28) else 3
    model, images = build(spec, size=size, channels=channels), random_images(2, size=size, channels=channels)
    maps = model.maps(images)
    map_channels, side = last_map(spec, size)
    assert maps.shape == (2, map_channels, side, side)
    features = model.features(images)
    assert features.shape == (2, model.num_features) == (2, num_features(spec, size))
    assert features.min() >= 0
    # Neither vanishes: each of the two images leaves a trace of its own.
    assert not torch.allclose(features[0], features[1])
    assert model(images).shape == (2, 5)


@pytest.mark.parametrize(
    ("name", "size", "features"),
    [
        ("convnet", 32, 2048),
        ("convnet", 64, 2048),
        ("convnet", 128, 2048),
        ("alexnet", 32, 3072),
        ("vgg11", 32, 512),
        ("vgg11", 64, 2048),
        ("resnet18", 32, 512),
        ("resnet18", 64, 2048),
        ("resnet18_ap", 32, 8192),
    ],
)
def test_features_are_as_many_as_in_the_literature(name: NetworkName, size: int, features: int) -> None:
    assert num_features(model_spec(name, size=size, width=NETWORKS[name].width), size) == features


class Pools(TorchFunctionMode):
    """Sees whether a pool gets a map that its windows do not cover."""

    leave_out = False

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if function.__name__ in ("avg_pool2d", "max_pool2d"):
            self.leave_out |= args[0].shape[-1] % args[1] != 0
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", NETWORKS)
def test_sizes_of_which_no_pool_leaves_out_anything_are_known(name: NetworkName) -> None:
    spec = ModelSpec(name=name, depth=3 if name == "convnet" else None, width=4, norm="group")
    whole = {}
    for size in (*range(8, 73), 96, 100):
        if padded(size) < smallest_image(spec):
            continue
        with Pools() as pools:
            build(spec, size=size).features(torch.zeros(1, 3, size, size))
        whole[size] = not pools.leave_out
        assert (whole_sizes(spec, size) == ()) is whole[size], size
    for size in range(33, 64):
        if not whole[size]:
            below = max(each for each in whole if each < size and whole[each])
            above = min(each for each in whole if each > size and whole[each])
            assert whole_sizes(spec, size) == (below, above), size


def test_convnet_6_rounds_down_at_224_pixels() -> None:
    assert num_features(ModelSpec(name="convnet", depth=6, width=128, norm="instance"), 224) == 128 * 3 * 3


CHAIN_OF_VGG = (64, 128, 256, 256, 512, 512, 512, 512)
RESNET = (
    (3 * 9 * 64 + 2 * 64)
    + 4 * (64 * 9 * 64 + 2 * 64)
    + sum(
        (i * 9 * o + 2 * o) + 3 * (o * 9 * o + 2 * o) + (i * o + 2 * o) for i, o in ((64, 128), (128, 256), (256, 512))
    )
)
"""Stem; four convolutions of the first stage; in each other stage four and the projection. No biases, two numbers a norm channel."""


@pytest.mark.parametrize(
    ("name", "norm", "count"),
    [
        ("convnet", "instance", (3 * 9 + 1) * 128 + 2 * (128 * 9 + 1) * 128 + 3 * 2 * 128 + (2048 + 1) * 10),
        ("convnet", "none", (3 * 9 + 1) * 128 + 2 * (128 * 9 + 1) * 128 + (2048 + 1) * 10),
        (
            "alexnet",
            "none",
            (3 * 25 + 1) * 128
            + (128 * 25 + 1) * 192
            + (192 * 9 + 1) * 256
            + (256 * 9 + 1) * 192
            + (192 * 9 + 1) * 192
            + (192 * 16 + 1) * 10,
        ),
        (
            "vgg11",
            "batch",
            sum((i * 9 + 1 + 2) * o for i, o in zip((3, *CHAIN_OF_VGG), CHAIN_OF_VGG, strict=False)) + (512 + 1) * 10,
        ),
        ("resnet18", "batch", RESNET + (512 + 1) * 10),
        ("resnet18_ap", "instance", RESNET + (8192 + 1) * 10),
    ],
)
def test_parameters_are_as_many_as_the_architecture_has(name: NetworkName, norm: Norm, count: int) -> None:
    model = build(model_spec(name, width=NETWORKS[name].width, norm=norm), classes=10)
    assert sum(parameter.numel() for parameter in model.parameters()) == count


def test_well_known_totals() -> None:
    totals = {name: sum(p.numel() for p in build(literature(name), classes=10).parameters()) for name in MODELS}
    assert totals == {
        "convnet": 320_010,
        "alexnet": 1_872_202,
        "vgg11": 9_231_114,
        "resnet18": 11_173_962,
        "resnet18_ap": 11_250_762,
    }


def literature(name: NetworkName) -> ModelSpec:
    return model_spec(name, width=NETWORKS[name].width, norm=NETWORKS[name].norms[0])


@pytest.mark.parametrize("size", [28, 32, 48])
@pytest.mark.parametrize("name", MODELS)
def test_cost_counts_the_convolutions_that_run(name: NetworkName, size: int) -> None:
    spec = model_spec(name, norm="group")
    model, counted = build(spec, size=size), 0

    def count(module: nn.Module, _inputs: object, output: Tensor) -> None:
        nonlocal counted
        assert isinstance(module, nn.Conv2d)
        counted += 2 * module.weight.numel() * output.shape[2] * output.shape[3]

    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(count)
    model(random_images(1, size=size))
    assert forward(spec, size, 3) == counted


@pytest.mark.parametrize(("name", "norm"), EVERY)
def test_images_are_independent_unless_the_norm_is_batch(name: NetworkName, norm: Norm) -> None:
    spec = model_spec(name, norm=norm)
    model, images = build(spec), random_images(4)
    alone, together = model(images[:2]), model(images)[:2]
    assert torch.allclose(alone, together, atol=1e-5) != spec.batch_statistics
    model.eval()
    torch.testing.assert_close(model(images[:2]), model(images)[:2])


@pytest.mark.parametrize(("name", "norm"), EVERY)
def test_gradients_reach_the_images_and_frozen_networks_get_none(name: NetworkName, norm: Norm) -> None:
    model, images = build(model_spec(name, norm=norm)).requires_grad_(False), random_images(3).requires_grad_(True)
    torch.autograd.backward(model(images).square().sum())
    assert images.grad is not None
    assert (images.grad.abs().sum((1, 2, 3)) > 0).all()
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("name", MODELS)
def test_gradients_are_those_of_float64(name: NetworkName) -> None:
    """ReLU works in place: a backward pass that needed what it overwrote would show here or raise."""
    model, images = build(model_spec(name, norm="group")), random_images(2)
    single = torch.autograd.grad(model(images).square().sum(), list(model.parameters()))
    precise = build(model_spec(name, norm="group")).double()
    double = torch.autograd.grad(precise(images.double()).square().sum(), list(precise.parameters()))
    scale = max(right.abs().max() for right in double)
    for left, right in zip(single, double, strict=True):
        torch.testing.assert_close(left.double() / scale, right / scale, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize(("name", "norm"), EVERY)
def test_initial_state_depends_on_the_generator_alone(name: NetworkName, norm: Norm) -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first, again, other = (build(model_spec(name, norm=norm), seed=seed).state_dict() for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), before)
    assert first.keys() == again.keys()
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not torch.equal(first["classifier.weight"], other["classifier.weight"])


def test_initial_weights_have_pytorchs_range() -> None:
    model = build(ModelSpec(name="convnet", depth=3, width=16, norm="batch"))
    bound = (16 * 9) ** -0.5
    weight = model.get_parameter("convs.1.weight")
    assert weight.abs().max() <= bound
    assert weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.05)
    state = model.state_dict()
    assert all((state[f"norms.1.{name}"] == 1).all() for name in ("weight", "running_var"))
    assert all((state[f"norms.1.{name}"] == 0).all() for name in ("bias", "running_mean", "num_batches_tracked"))


@pytest.mark.parametrize("name", MODELS)
def test_functional_call_reaches_logits_features_and_maps(name: NetworkName) -> None:
    spec = model_spec(name)
    model, shell, images = build(spec), build(spec, seed=1), random_images(2)
    state = model.state_dict()
    assert torch.equal(functional_call(shell, state, (images,)), model(images))
    assert torch.equal(functional_call(shell, state, (images,), {"features_only": True}), model.features(images))
    maps = functional_call(shell, state, (images,), {"maps_only": True})
    assert torch.equal(maps, model.maps(images))
    assert torch.equal(shell.flat(maps), model.features(images))


@pytest.mark.parametrize("norm", ["instance", "batch", "group"])
@pytest.mark.parametrize("name", MODELS)
def test_vmap_over_stacked_weights_is_separate_calls(name: NetworkName, norm: Norm) -> None:
    spec = model_spec(name, norm=norm)
    models = [build(spec, seed=seed) for seed in (0, 1)]
    parameters, buffers = stack_module_state(list(models))
    shell, images = build(spec, seed=2), torch.stack((random_images(3), random_images(3).flip(0)))

    def call(weights: dict[str, Tensor], state: dict[str, Tensor], batch: Tensor) -> Tensor:
        logits: Tensor = functional_call(shell, (weights, state), (batch,))
        return logits

    stacked = vmap(call)(parameters, buffers, images)
    separate = torch.stack([model(batch) for model, batch in zip(models, images, strict=True)])
    torch.testing.assert_close(stacked, separate, atol=1e-4, rtol=1e-4)
    for model, index in zip(models, range(2), strict=True):
        for key, buffer in model.named_buffers():
            torch.testing.assert_close(buffers[key][index], buffer)


def test_batch_norm_takes_batch_statistics_in_training_and_running_ones_in_evaluation() -> None:
    model = build(ModelSpec(name="convnet", depth=1, width=4, norm="batch"), size=8)
    images, norm, conv = random_images(6, size=8), model.get_submodule("norms.0"), model.get_submodule("convs.0")
    maps = conv(images).detach()
    mean, variance = maps.mean((0, 2, 3)), maps.var((0, 2, 3))
    model.features(images)
    state = norm.state_dict()
    torch.testing.assert_close(state["running_mean"], 0.1 * mean)
    torch.testing.assert_close(state["running_var"], 0.9 + 0.1 * variance)
    assert state["num_batches_tracked"] == 1

    def expected(mean: Tensor, variance: Tensor) -> Tensor:
        normal = (maps - mean.view(-1, 1, 1)) / (variance.view(-1, 1, 1) + 1e-5).sqrt()
        return nn.functional.avg_pool2d(normal.relu(), 2).flatten(1)

    torch.testing.assert_close(
        model.features(images), expected(mean, maps.var((0, 2, 3), correction=0)), atol=1e-4, rtol=1e-4
    )
    model.eval()
    state = {name: tensor.clone() for name, tensor in norm.state_dict().items()}
    torch.testing.assert_close(
        model.features(images), expected(state["running_mean"], state["running_var"]), atol=1e-4, rtol=1e-4
    )
    assert all(torch.equal(tensor, state[name]) for name, tensor in norm.state_dict().items())


def test_compiler_traces_a_network_without_a_break() -> None:
    model, images = build(model_spec("convnet")), random_images(2).requires_grad_(True)
    state = {name: tensor.detach() for name, tensor in model.state_dict().items()}

    def features(weights: dict[str, Tensor], images: Tensor) -> Tensor:
        found: Tensor = functional_call(model, weights, (images,), {"features_only": True})
        return found

    compiled = torch.compile(features, backend="aot_eager", fullgraph=True)
    for call in (features, compiled):
        (gradient,) = torch.autograd.grad(call(state, images).square().sum(), images)
        torch.testing.assert_close(gradient, torch.autograd.grad(model.features(images).square().sum(), images)[0])


def test_table_of_models_is_that_of_the_networks() -> None:
    assert list(MODELS) == list(NETWORKS)
