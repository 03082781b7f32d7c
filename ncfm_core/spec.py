"""The spec of a job: one frozen, fully resolved document. Torch-free.

A `JobSpec` has no hidden defaults: `submission.resolve` fills in what is left out, once, when it is posted. Every number
has bounds and is finite, and unknown keys are refused, so that a spec that validates is a spec that means something.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import replace
from typing import Annotated, Literal

from pydantic import (
    Field,
    JsonValue,
    SerializerFunctionWrapHandler,
    ValidationInfo,
    field_validator,
    model_serializer,
    model_validator,
)

from ncfm_core.catalog import DatasetFacts, DatasetName, PresetName, dataset_facts
from ncfm_core.networks import NETWORKS, NetworkName, Norm
from ncfm_core.parts import BatchSize, Epochs, Fraction, Part, Rate, Seed, UnfitError, Weight
from ncfm_core.space import SearchSpec

ProtocolName = Literal["dc", "ncfm", "apm", "ddranking", "quick", "custom"]
CoresetName = Literal["herding", "k_center"]
CORESETS: tuple[CoresetName, ...] = ("herding", "k_center")
BaselineName = Literal["random_real", "herding", "k_center"]

AUGMENT_OPS = ("color", "crop", "cutout", "flip", "scale", "rotate")

BUCKET_SCHEMES = ("s3", "gs", "az")
"""Of URIs of archives in buckets, which the worker fetches."""
_EXAMPLE = '{"name": "imagefolder", "uri": "/data/birds.tar", "image_size": 64}'


class DatasetSpec(Part):
    """The real data: one of the catalog, or the user's own as `imagefolder`."""

    name: DatasetName
    """Name in the catalog."""
    uri: Annotated[str, Field(min_length=1, max_length=1000, pattern=r"^[^\x00-\x1f\x7f]+$")] | None = None
    """Of an `imagefolder` alone: a folder, .tar, .tar.gz, .tgz or .zip on the cluster, as a path or a file:// URI; an archive
    in a bucket (s3://, gs://, az://) that data may be read from; or `upload:` and the id that POST /datasets answered."""
    image_size: Annotated[int, Field(ge=8, le=512)] | None = None
    """Of an `imagefolder` alone: height and width in pixels that its images are brought to."""

    @field_validator("uri")
    @classmethod
    def _names_a_file(cls, uri: str | None) -> str | None:
        scheme = uri.partition("://")[0] if uri and "://" in uri else "file"
        if scheme not in ("file", *BUCKET_SCHEMES):
            known = ", ".join(f"{each}://" for each in BUCKET_SCHEMES)
            hint = (
                f"Copy the data to where the cluster reads files and give the path, or to a bucket ({known}); "
                "or upload it: POST /datasets."
            )
            raise UnfitError(f"{scheme}:// cannot be read here", hint)
        return uri

    @model_validator(mode="after")
    def _own_data_have_a_place(self) -> DatasetSpec:
        for name, value in (("uri", self.uri), ("image_size", self.image_size)):
            if self.name == "imagefolder" and value is None:
                raise UnfitError(f"imagefolder needs {name}", f"Write it as in {_EXAMPLE}.", field=name)
            if self.name != "imagefolder" and value is not None:
                message = f"{name} belongs to imagefolder; {self.name} has its own"
                raise UnfitError(message, "Leave it out.", field=name)
        return self

    @model_serializer(mode="wrap")
    def _without_what_is_absent(self, serialise: SerializerFunctionWrapHandler) -> dict[str, JsonValue]:
        return {name: value for name, value in serialise(self).items() if value is not None}

    @property
    def facts(self) -> DatasetFacts:
        """What is known before anything is loaded; for an `imagefolder` the counts are assumptions."""
        facts = dataset_facts(self.name)
        if self.uri is None or self.image_size is None:
            return facts
        size = self.image_size
        return replace(facts, image_size=size, title=f"{_stem(self.uri)}, {size}x{size} colour")


def _stem(uri: str) -> str:
    """The name of a folder or archive without its ending, with nothing in it that a heading could take for markup."""
    name = uri.rstrip("/").rpartition("/")[2]
    for ending in (".tar.gz", ".tgz", ".tar", ".zip"):
        name = name.removesuffix(ending)
    return re.sub(r"[^\w .-]+", "-", name)[:60] or "imagefolder"


class ModelSpec(Part):
    """A network of the distillation literature (docs/networks.md)."""

    name: NetworkName
    """Which network."""
    depth: Annotated[int, Field(ge=1, le=6)] | None
    """Blocks of a convnet; each halves the map. Null for the others, whose depth is fixed."""
    width: Annotated[int, Field(ge=4, le=1024)]
    """Channels of every block of a convnet (128 in the literature), of the narrowest stage of the others (64 there)."""
    norm: Norm
    """Normalisation after every convolution; all but `batch` treat each image on its own."""

    @field_validator("depth")
    @classmethod
    def _depth_is_the_convnets(cls, depth: int | None, info: ValidationInfo) -> int | None:
        name = info.data.get("name", "convnet")
        if name == "convnet" and depth is None:
            raise UnfitError("a convnet needs its number of blocks", "Choose 1 to 6.")
        if name != "convnet" and depth is not None:
            raise UnfitError(f"{name} has a fixed depth", "Leave it out.")
        return depth

    @field_validator("norm")
    @classmethod
    def _network_has_the_norm(cls, norm: Norm, info: ValidationInfo) -> Norm:
        facts = NETWORKS.get(info.data.get("name", ""))
        if facts is not None and norm not in facts.norms:
            raise UnfitError(f"{facts.name} does not come with this norm", f"Choose one of: {', '.join(facts.norms)}.")
        return norm

    @property
    def label(self) -> str:
        """For a person: `convnet-3, width 128`; the norm is named where it is not the literature's."""
        depth = f"-{self.depth}" if self.depth else ""
        norm = "" if self.norm == NETWORKS[self.name].norms[0] else f", norm {self.norm}"
        return f"{self.name}{depth}, width {self.width}{norm}"

    @property
    def batch_statistics(self) -> bool:
        """Whether images of one forward see each other: then all classes of a step have to go through together."""
        return self.norm == "batch"


class AugmentSpec(Part):
    """Differentiable siamese augmentation."""

    policy: Literal["none", "single", "stack"]
    """`single` applies one of the groups; `stack` applies flip, colour, one of crop, scale, rotate, and cutout."""
    ops: Annotated[tuple[Literal["color", "crop", "cutout", "flip", "scale", "rotate"], ...], Field(max_length=6)]
    """The groups to draw from."""


class NcfmSpec(Part):
    """Neural characteristic function matching (arXiv 2502.20653)."""

    name: Literal["ncfm"]
    """Method."""
    steps: Annotated[int, Field(ge=1, le=10_000_000)]
    """Updates of the images."""
    image_lr: Rate
    """Step size of AdamW on the images, whose pixels lie in [0, 1]."""
    image_weight_decay: Fraction
    """Decoupled weight decay of the images."""
    schedule: Literal["constant", "cosine", "plateau"]
    """Of the image rate over `steps`; cosine ends at zero, plateau halves it when the loss has not fallen for 500 steps."""
    init: Literal["noise", "real", "tiled"]
    """Images at step 0; `tiled` puts one shrunk real image into each tile."""
    factor: Annotated[int, Field(ge=1, le=2)]
    """Multi-formation: each stored image decodes to factor x factor training images."""
    real_batch: BatchSize
    """Real images per class and draw; no more than the smallest class has."""
    real_sampling: Literal["random", "prefix"]
    """`random` draws over the whole class; `prefix` always takes its first images, as the authors' code does."""
    reuse: Annotated[int, Field(ge=1, le=1000)]
    """Image updates per draw of network, real batch, augmentation and frequencies."""
    discrepancy: Literal["characteristic", "mean"]
    """What is matched: the characteristic-function gap, or the squared distance of the class means (DM's term)."""
    sampler: Literal["scale_mixture", "gaussian"]
    """Where frequencies come from; `scale_mixture` is the learned psi of the minmax."""
    num_frequencies: Annotated[int, Field(ge=1, le=65_536)]
    """Frequencies per draw, all distinct."""
    num_components: Annotated[int, Field(ge=1, le=4096)]
    """Components of the scale mixture; divides `num_frequencies`."""
    frequency_scale: Annotated[float, Field(gt=0, le=1000)]
    """The one bandwidth s: root mean square of the scales of t."""
    sampler_lr: Rate
    """Step size of Adam on psi's log-scales."""
    sampler_steps: Annotated[int, Field(ge=0, le=100)]
    """Ascent steps of psi per draw; 0 leaves it where it started."""
    sampler_objective: Literal["gap", "power", "debiased"]
    """What psi raises: the gap itself, the gap over its sampling error, or the gap less that of two halves of the real batch."""
    amplitude_weight: Fraction
    """alpha: weight of the amplitude; the phase has 1 - alpha."""
    discrepancy_weight: Weight
    """Weight of the discrepancy."""
    calibration_weight: Weight
    """Weight of the cross-entropy of the images under the trained network."""
    augment: AugmentSpec
    """Shared by real and synthetic images of a draw."""
    labels: Literal["hard", "soft"]
    """`soft` stores the teachers' logits for every decoded image beside the hard labels."""
    precision: Literal["float32", "bfloat16"]
    """Of the real features, which need no gradient."""

    @model_validator(mode="after")
    def _components_divide_frequencies(self) -> NcfmSpec:
        if self.sampler == "scale_mixture" and self.num_frequencies % self.num_components:
            message = f"not a multiple of num_components, which is {self.num_components}"
            nearest = max(1, self.num_frequencies // self.num_components) * self.num_components
            raise UnfitError(message, f"Choose {nearest}, say, or other num_components.", field="num_frequencies")
        return self


class TrainingSpec(Part):
    """How a network is trained on labelled images: the recipe of teachers, students and the full data alike."""

    epochs: Epochs
    """Passes over the images."""
    batch_size: BatchSize
    """Images per step; a smaller set is one batch."""
    optimizer: Literal["sgd", "adamw"]
    """`sgd` has momentum 0.9."""
    lr: Rate
    """Initial step size."""
    weight_decay: Fraction
    """Coupled for sgd, decoupled for adamw."""
    milestones: Annotated[tuple[Annotated[float, Field(gt=0, lt=1)], ...], Field(max_length=16)]
    """Fractions of the epochs after which the rate is multiplied by `gamma`."""
    gamma: Annotated[float, Field(gt=0, le=1)]
    """Factor at each milestone."""
    reset_optimizer: bool
    """Whether the optimiser starts afresh at each milestone, its momentum dropped (DC's student training does that)."""
    augment: AugmentSpec
    """Drawn for each image apart."""
    cutmix: Fraction
    """Probability of CutMix, Beta(1, 1), per batch."""
    loss: Literal["cross_entropy", "l1_logits", "soft_cross_entropy", "kl"]
    """`cross_entropy` is that of the classes; the others need teacher logits: mean distance to them, cross-entropy with their
    softmax, Kullback-Leibler divergence from it."""

    @property
    def needs_soft_labels(self) -> bool:
        return self.loss != "cross_entropy"


class TeachersSpec(Part):
    """The pool that matching networks are blended from: each teacher keeps its initial and its trained weights."""

    count: Annotated[int, Field(ge=1, le=1000)]
    """Teachers in the pool."""
    seed: Seed
    """Of the pool, apart from the job's, so that jobs of several seeds share their teachers."""
    training: TrainingSpec
    """How each is trained on the real data."""


class EvaluationSpec(Part):
    """Fresh students trained on the distilled images, tested on the test set."""

    protocol: ProtocolName
    """Which protocol `training` is; `custom` when any of its fields was set by hand."""
    model: ModelSpec
    """The student's network."""
    students: Annotated[int, Field(ge=1, le=1000)]
    """Fresh students; mean and standard deviation are over these."""
    training: TrainingSpec
    """How each is trained; the baselines are judged under the very same."""
    lr_grid: Annotated[tuple[Rate, ...], Field(max_length=32)]
    """Rates to choose `training.lr` from, for every set apart, on training data held out; empty to take it as it is."""
    tests: Annotated[int, Field(ge=1, le=1000)]
    """Looks at the test set along the training, the last one at its end; only the last is published as the accuracy."""


class FullDataSpec(Part):
    """The full training set under a recipe of its own: the ceiling."""

    students: Annotated[int, Field(ge=1, le=100)]
    """Fresh networks."""
    training: TrainingSpec
    """How each is trained on the real data."""


class ResourcesSpec(Part):
    """What a stage takes of the cluster. Never changes a result's key."""

    gpus: Literal["auto"] | Annotated[float, Field(ge=0, le=64)]
    """A share of one, or a whole number; `auto`: one where the cluster has any, else none."""
    cpus: Annotated[int, Field(ge=1, le=1024)]
    """CPUs, which are also the threads of a stage."""
    memory_limit: Annotated[int, Field(ge=16, le=1_000_000)] | None
    """MiB that the activations of a distillation step may take; null for what is fast on the device."""

    @field_validator("gpus")
    @classmethod
    def _can_be_given(cls, gpus: float | Literal["auto"]) -> float | Literal["auto"]:
        if gpus != "auto" and gpus > 1 and not float(gpus).is_integer():
            raise ValueError(
                "a GPU is shared only by tasks that take a part of one: ask for at most 1, or a whole number"
            )
        return gpus


class CheckpointSpec(Part):
    """When a running distillation or teacher saves itself. Never changes a result."""

    every_steps: Annotated[int, Field(ge=1, le=10_000_000)]
    """At most this many steps between two checkpoints."""
    every_seconds: Annotated[float, Field(gt=0, le=86_400)]
    """At most this many seconds between two checkpoints."""


class LimitsSpec(Part):
    """Where a job has to end early. Never changes the key of a whole result."""

    wall_seconds: Annotated[float, Field(ge=10, le=10_000_000)] | None
    """Seconds from the job's first start after which the distillation ends at its last step; null for none."""


class JobSpec(Part):
    """Everything that defines a job, resolved."""

    dataset: DatasetSpec
    """The real data."""
    ipc: Annotated[int, Field(ge=1, le=100_000)]
    """Stored images per class."""
    preset: PresetName
    """Where the values that the submission left out came from."""
    method: NcfmSpec
    """How the images are learned."""
    model: ModelSpec
    """The network that features come from, of teachers and, by default, of students."""
    teachers: TeachersSpec
    """The pool of networks."""
    evaluate: Annotated[tuple[EvaluationSpec, ...], Field(min_length=1, max_length=16)]
    """How the set is judged; the first one gives the headline figures."""
    full_data: FullDataSpec
    """The ceiling beside it."""
    baselines: Annotated[tuple[BaselineName, ...], Field(min_length=1, max_length=3)]
    """Real images chosen by a rule, judged like the set: `random_real` always, `herding` and `k_center` where asked for."""
    search: SearchSpec | None
    """A search over `method` before the distillation; null for none."""
    resources: ResourcesSpec
    """What a stage takes of the cluster."""
    checkpoint: CheckpointSpec
    """When it saves itself."""
    limits: LimitsSpec
    """Where it ends early."""
    experiment: Annotated[str, Field(min_length=1, max_length=100, pattern=r"^[\w .:-]+$")]
    """MLflow experiment."""
    seed: Seed
    """Of everything drawn in this job but the teacher pool."""

    @field_validator("baselines")
    @classmethod
    def _random_and_no_doubles(cls, baselines: tuple[BaselineName, ...]) -> tuple[BaselineName, ...]:
        if "random_real" not in baselines:
            raise UnfitError("random_real is judged beside every set", "Add it.")
        if len(set(baselines)) < len(baselines):
            raise UnfitError("a baseline is named twice", "Name each once.")
        return baselines

    def document(self) -> dict[str, JsonValue]:
        """As plain JSON values."""
        document: dict[str, JsonValue] = self.model_dump(mode="json")
        return document

    def digest(self) -> str:
        """sha256 over the canonical JSON, `sha256:` in front."""
        return digest(self.document())


def digest(value: JsonValue) -> str:
    """sha256 over the canonical JSON form of a value, as `sha256:<64 hex digits>`."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return "sha256:" + hashlib.sha256(text.encode()).hexdigest()
