"""The published defaults and the quick ones: everything that a submission may leave out. Torch-free."""

from __future__ import annotations

from typing import Any

from pydantic import JsonValue

from ncfm_core.catalog import DatasetFacts, PresetName
from ncfm_core.geometry import padded, smallest_image
from ncfm_core.networks import NETWORKS, NetworkName
from ncfm_core.protocols import Document, augmentation, protocol
from ncfm_core.spec import ModelSpec


def preset(name: PresetName, facts: DatasetFacts, ipc: JsonValue) -> Document:
    """The whole spec for a data set but `dataset`, `ipc` and `evaluate`.

    Args:
        name: `paper` has the published values, `quick` a narrow network and few steps for two CPU cores.
        facts: the data set.
        ipc: images per class; may still be anything.
    """
    values = _quick(facts, ipc) if name == "quick" else _paper(facts)
    return _COMMON | values | {"preset": name, "experiment": facts.name}


def evaluation(name: PresetName, facts: DatasetFacts, ipc: JsonValue) -> Document:
    """An entry of `evaluate` but its model, of the protocol that the preset judges by."""
    return protocol("quick" if name == "quick" else "ncfm", facts, ipc)


def network(name: NetworkName, preset: PresetName, facts: DatasetFacts) -> Document:
    """A network by its name alone.

    Args:
        name: which.
        preset: `quick` makes it a quarter as wide as the literature does.
        facts: the data set: its image size sets the depth of a convnet, and rules out norms that would erase the last map.
    """
    known = NETWORKS[name]
    depth = facts.depth if name == "convnet" else None
    width = known.width // 4 if preset == "quick" else known.width
    models = [ModelSpec(name=name, depth=depth, width=width, norm=norm) for norm in known.norms]
    fitting = (model for model in models if smallest_image(model) <= padded(facts.image_size))
    return next(fitting, models[0]).model_dump(mode="json")


def overlay(base: JsonValue, over: JsonValue) -> Any:
    """`over` laid over `base`: objects merge key by key, anything else replaces."""
    if not (isinstance(base, dict) and isinstance(over, dict)):
        return over
    return base | {key: overlay(base[key], value) if key in base else value for key, value in over.items()}


def _paper(facts: DatasetFacts) -> Document:
    """NCFM as published (arXiv 2502.20653 and its released configurations).

    The papers step each class apart through one shared Adam, 2C steps an iteration; one joint step needs its rate times sqrt(2C)
    (docs/method.md), which gives 0.0045 at 10 classes.
    """
    return {
        "method": {
            "name": "ncfm",
            "steps": 20_000,
            "image_lr": round(1e-3 * (2 * facts.num_classes) ** 0.5, 4),
            "image_weight_decay": 5e-4,
            "schedule": "cosine",
            "init": "tiled",
            "factor": 2,
            "real_batch": 1024,
            "real_sampling": "random",
            "reuse": 1,
            "discrepancy": "characteristic",
            "sampler": "scale_mixture",
            "num_frequencies": 1024,
            "num_components": 64,
            "frequency_scale": 1.0,
            "sampler_lr": 1e-3,
            "sampler_steps": 1,
            "sampler_objective": "gap",
            "amplitude_weight": 0.5,
            "discrepancy_weight": 300.0,
            "calibration_weight": 1.0,
            "augment": augmentation(facts, "stack", "color", "crop", "cutout"),
            "labels": "hard",
            "precision": "float32",
        },
        "model": network("convnet", "paper", facts),
        "teachers": {
            "count": 20,
            "seed": 0,
            "training": {
                "epochs": 60,
                "batch_size": 128,
                "optimizer": "sgd",
                "lr": 0.01,
                "weight_decay": 5e-4,
                "milestones": [2 / 3, 5 / 6],
                "gamma": 0.2,
                "reset_optimizer": False,
                "augment": augmentation(facts, "stack", "color", "crop"),
                "cutmix": 0.5,
                "loss": "cross_entropy",
            },
        },
        "full_data": {
            "students": 3,
            "training": {
                "epochs": 100,
                "batch_size": 128,
                "optimizer": "sgd",
                "lr": 0.01,
                "weight_decay": 5e-4,
                "milestones": [0.6, 0.85],
                "gamma": 0.2,
                "reset_optimizer": False,
                "augment": augmentation(facts, "stack", "flip", "color", "crop"),
                "cutmix": 0.0,
                "loss": "cross_entropy",
            },
        },
    }


def _quick(facts: DatasetFacts, ipc: JsonValue) -> Document:
    """A narrow network and few steps: minutes on two CPU cores. Scale and weight are from held-out data (docs/results.md)."""
    small = facts.image_size < 16
    if small:
        scale, calibration = (1.0, 10.0) if ipc == 1 else (3.0, 1.0)
    else:
        scale, calibration = 1.0, 30.0 if ipc == 1 and facts.channels == 3 else 10.0
    quick: Document = {
        "method": {
            "steps": 1000 if small else 600,
            "image_lr": 0.01 if small else 0.005,
            # A quarter of 8x8 pixels holds too little of an image: one to one is 4 points better there (docs/results.md).
            "factor": 1 if small else 2,
            "real_batch": 128,
            "reuse": 5,
            "num_frequencies": 512,
            "frequency_scale": scale,
            "sampler_lr": 1e-2,
            "calibration_weight": calibration,
        },
        "model": network("convnet", "quick", facts),
        "teachers": {"count": 3, "training": {"epochs": 20 if small else 8, "lr": 0.02}},
        "full_data": {"students": 2, "training": {"epochs": 30 if small else 10, "lr": 0.02}},
        # Networks this small gain little from a second thread; two stages at once gain more.
        "resources": {"gpus": "auto", "cpus": 1 if small else 2, "memory_limit": None},
    }
    merged: Document = overlay(_paper(facts), quick)
    return merged


_COMMON: Document = {
    "baselines": ["random_real"],
    "search": None,
    "resources": {"gpus": "auto", "cpus": 2, "memory_limit": None},
    "checkpoint": {"every_steps": 500, "every_seconds": 30.0},
    "limits": {"wall_seconds": None},
    "seed": 0,
}

SEARCH: Document = {
    "trials": 16,
    "scheduler": "asha",
    "rungs": 3,
    "students": 2,
    "epochs": 150,
    "validation_fraction": 0.2,
}
"""Of a search; its `steps` are those of the method."""
