"""The one loop: images against psi, all classes together.

A draw (network, real batch, augmentation, normal z) serves `reuse` image updates. At its start psi takes its ascent steps,
then frequencies are fixed and the real side, which needs no gradient, is computed once. Random numbers are counted by draw
and step, so a state saved between any two steps goes on with the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.profiler import record_function

from ncfm_core import augment
from ncfm_core.augment import Augmentation
from ncfm_core.datasets import Dataset
from ncfm_core.devices import require_device, told, tried_again
from ncfm_core.discrepancy import (
    CharacteristicTarget,
    MeanTarget,
    Target,
    characteristic_function_by_class,
)
from ncfm_core.errors import CheckpointError, OutOfMemoryError, SpecError
from ncfm_core.execution import (
    BACKWARD_FORWARDS,
    Execution,
    choose,
    compiled_form,
    fallen_back,
    in_chunks,
)
from ncfm_core.frequencies import sampler_of
from ncfm_core.pieces import decoded_pieces, gathered, real_features
from ncfm_core.pools import Extractors, TeacherPool
from ncfm_core.progress import Progress, never
from ncfm_core.rng import generator
from ncfm_core.schedule import Schedule
from ncfm_core.spec import NcfmSpec
from ncfm_core.synthetic import SyntheticSet, decode, start
from ncfm_core.training import load_optimizer_state, optimizer_state, part

REPORT_EVERY = 25
"""Image steps between two reports; each costs one wait for the device."""

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class _Draw:
    """What serves one reuse window."""

    extractors: Extractors
    augmentation: Augmentation
    target: Target


def _too_much() -> OutOfMemoryError:
    hint = "Lower it, model.width, teachers.count or NCFM_DATA_MEMORY_GIB, above which real images stay in a file."
    return OutOfMemoryError.of("ipc", None, "data, networks and images do not fit the memory of the device", hint)


class Distillation:
    """NCFM (arXiv 2502.20653): learn images whose features have the real data's characteristic function."""

    @told(_too_much)
    def __init__(
        self,
        dataset: Dataset,
        pool: TeacherPool,
        method: NcfmSpec,
        *,
        ipc: int,
        seed: int,
        device: torch.device,
        memory_limit: int | None = None,
        compiled: bool | None = None,
        seconds: float | None = None,
        channels_last: bool = False,
    ) -> None:
        """
        Args:
            dataset: the real data.
            pool: the networks.
            method: all of its numbers.
            ipc: stored images per class.
            seed: of everything drawn here.
            device: where to compute; the pool must be there.
            memory_limit: bytes that a step's activations may take; None for what is fast on the device.
            compiled: whether networks go through `torch.compile`; None where it pays, and eager after all where the compiler then
                fails at the first step.
            seconds: that are left for the steps, for that choice: what does not fit them will not pay it back. None for as many
                as they take. It ends nothing.
            channels_last: whether real images go through a network on a GPU in that layout; to be measured.

        Raises:
            SpecError: a class has fewer real images than `ipc`, or `method.factor` does not divide their size.
            ResourcesError: there is no such device, or its memory does not hold data, networks and images.
        """
        require_device(device)
        dataset.check_ipc(ipc)
        if (size := dataset.image_shape[1]) % method.factor:
            message = f"does not divide images of {size} pixels"
            raise SpecError.of("method.factor", method.factor, message, "Choose 1, or an even image_size.")
        self._dataset, self._pool, self._method, self._seed = dataset.to(device), pool, method, seed
        self._real_batch = min(method.real_batch, min(dataset.class_counts))
        self.synthetic = start(
            self._dataset, ipc=ipc, factor=method.factor, init=method.init, draw=generator(seed, "distill/init")
        )
        """The set as it is now: images, float32 of shape (C * ipc, channels, H, W), which a step may leave outside [0, 1] until
        the next one updates them (`end_here`), and labels, int64 of shape (C * ipc,)."""
        self.synthetic.images.requires_grad_(True)
        self._optimizer = torch.optim.AdamW(
            [self.synthetic.images], lr=method.image_lr, weight_decay=method.image_weight_decay
        )
        self._schedule = Schedule(method.schedule, method.image_lr, method.steps, device)
        self._sampler = sampler_of(method, pool.network.num_features, device)
        self._draw: _Draw | None = None
        self.total, self.step = method.steps, 0
        decoded = len(self.synthetic.labels) * method.factor**2
        draws = dataset.num_classes * self._real_batch + decoded
        execution = choose(
            pool.features,
            pool.draw(generator(seed, "distill/execution")).match,
            image_shape=dataset.image_shape,
            num_classes=dataset.num_classes,
            images_per_class=decoded // dataset.num_classes,
            device=device,
            forwards=method.steps
            * (draws / method.reuse + (1 + BACKWARD_FORWARDS) * decoded * (2 if method.calibration_weight else 1)),
            memory_limit=memory_limit,
            together=pool.batch_statistics,
            compiled=compiled,
            seconds=seconds,
        )
        self._carry_out(execution)
        self._own_choice, self._channels_last = compiled is None, channels_last
        self.compile_error = ""
        """Why the run is eager although it was to be compiled, in one line; empty where that is not so."""
        self.halvings = 0
        """How often the execution was halved for want of memory; the bits are then no longer those of another run."""

    def _carry_out(self, execution: Execution) -> None:
        """Compute in this way from now on."""
        self.execution = execution
        features, logits = self._pool.features, self._pool.logits
        if execution.compiled:
            features, logits = compiled_form(features), compiled_form(logits)
        self._features_forward, self._logits_forward = features, logits

    def run(
        self, until: int | None = None, *, pause: Callable[[], bool] = never, report_every: int = REPORT_EVERY
    ) -> Iterator[Progress]:
        """Update the images from `step` to `until` (all of it by default), or to the first step after which `pause` says so.

        The metrics of a report are means since the last one: `discrepancy` (class mean of the gap), `calibration`
        (cross-entropy), `psi_gain` (rise of the gap by psi's ascent, at fixed root mean square of the scales) and `image_lr`.

        Raises:
            OutOfMemoryError: a step does not fit the memory, even in halves.
        """
        until = self.total if until is None else min(until, self.total)
        sums = torch.zeros(3, device=self.synthetic.images.device)
        counted = draws = 0
        while self.step < until:
            gain, losses = self._compiled_step() if self.execution.compiled else self._step()
            if gain is not None:
                sums[2] += gain
                draws += 1
            sums[:2] += losses
            counted += 1
            if (paused := pause()) or self.step == until or self.step % report_every == 0:
                discrepancy, calibration, gain = sums.tolist()
                metrics = {"discrepancy": discrepancy / counted, "calibration": calibration / counted}
                metrics |= {"psi_gain": gain / draws} if draws else {}
                metrics["image_lr"] = self._schedule.rate(self.step - 1)
                yield Progress(self.step, self.total, "step", metrics)
                sums.zero_()
                counted = draws = 0
            if paused:
                return

    def end_here(self) -> None:
        """Bring the images into [0, 1], as the last step does: an end. Save before it what is to go on with the same bits, as
        psi climbs on images as the step before left them."""
        with torch.no_grad():
            self.synthetic.images.clamp_(0, 1)

    def _step(self) -> tuple[Tensor | None, Tensor]:
        """One update of the images: psi's gain where it opens a window, and the losses of `_advance`."""
        gain = None
        if self._draw is None or self.step % self._method.reuse == 0:
            # psi may have climbed before memory ran out: the second try climbs from where the first began.
            undo = partial(self._sampler.load_state, self._sampler.state())
            gain = self._within_memory(self._open_draw, undo)
        return gain, self._advance()

    def _compiled_step(self) -> tuple[Tensor | None, Tensor]:
        """The same where it is compiled; the very first one is made again, eager, if that fails and nobody asked for it."""
        may = self._own_choice and self.step == 0
        psi = self._sampler.state() if may else {}
        try:
            return self._step()
        except Exception as error:  # noqa: BLE001 - compilers fail in many ways; what is not theirs happens again.
            self.compile_error = fallen_back(error, may=may)
        self._sampler.load_state(psi)
        self._draw = None
        self._carry_out(replace(self.execution, compiled=False))
        return self._step()

    def _within_memory(self, compute: Callable[[], T], undo: Callable[[], None] = lambda: None) -> T:
        """The result of a computation, which is tried once more, undone, with half as much at once if memory runs out."""

        def halve() -> bool:
            if not self._pool.batch_statistics:
                # Images of a batch-norm network influence each other: for those the second try only finds a cache emptied.
                self.execution = self.execution.halved()
            self.halvings += 1
            undo()
            return True

        return tried_again(compute, halve=halve, full=self._full, device=self.synthetic.images.device)

    def _full(self) -> OutOfMemoryError:
        return self.execution.too_large(self.synthetic.images.device)

    def _open_draw(self) -> Tensor:
        """Draw what the next window shares; psi's gain, on the device."""
        index, method, images = self.step // self._method.reuse, self._method, self.synthetic.images
        with record_function("draw"):
            extractors = self._pool.draw(generator(self._seed, "distill/network", index))
            augmentation = augment.draw(method.augment, generator(self._seed, "distill/augment", index))
            augmentation = augmentation.to(images.device)
        with record_function("real_forward"):
            real_CND = self._real_features(extractors, augmentation, index)
        if method.discrepancy == "mean":
            self._draw = _Draw(extractors, augmentation, MeanTarget(real_CND.mean(1)))
            return images.new_zeros(())
        with record_function("frequencies"):
            shape = (method.num_frequencies, self._pool.network.num_features)
            draw = generator(self._seed, "distill/frequencies", index, images.device)
            normal_KD = torch.randn(shape, generator=draw, device=images.device)
        gain = images.new_zeros(())
        # A window that a resumed run opens in its middle has had its ascent already: psi came back with the state.
        if self.step % method.reuse == 0 and method.sampler == "scale_mixture":
            with record_function("sampler"):
                synthetic_CND = self._synthetic_features(extractors, augmentation)
                gain = self._sampler.ascend(normal_KD, real_CND, synthetic_CND)
        with torch.no_grad(), record_function("real_characteristic"):
            frequencies_KD = self._sampler.frequencies(normal_KD)
            real = characteristic_function_by_class(real_CND, frequencies_KD)
        self._draw = _Draw(
            extractors, augmentation, CharacteristicTarget(real, frequencies_KD, method.amplitude_weight)
        )
        return gain

    def _advance(self) -> Tensor:
        """One update of the images; discrepancy and calibration as class means, shape (2,), on the device."""
        images = self.synthetic.images
        with torch.no_grad():
            images.clamp_(0, 1)
        gradient, losses = self._within_memory(self._gradient)
        with record_function("optimizer"), told(self._full):
            images.grad = gradient
            for group in self._optimizer.param_groups:
                group["lr"] = self._schedule.rate(self.step)
            self._optimizer.step()
            images.grad = None
        method = self._method
        self._schedule.note(self.step, method.discrepancy_weight * losses[0] + method.calibration_weight * losses[1])
        self.step += 1
        if self.step == self.total:
            self.end_here()
        return losses

    def _gradient(self) -> tuple[Tensor, Tensor]:
        """The images' gradient, block by block of classes, and the two losses as class means, shape (2,).

        Summed over classes: a class's gradient does not depend on how many others there are, nor on how they are cut.
        """
        images, num_classes = self.synthetic.images, self._dataset.num_classes
        ipc = len(images) // num_classes
        calibrate = augment.draw(self._method.augment, generator(self._seed, "distill/calibrate", self.step))
        calibrate = calibrate.to(images.device)
        gradient, losses = torch.empty_like(images), torch.zeros(2, device=images.device)
        for first in range(0, num_classes, self.execution.block):
            classes = slice(first, min(num_classes, first + self.execution.block))
            rows = slice(first * ipc, classes.stop * ipc)
            block = images.detach()[rows].requires_grad_(True)
            with record_function("match"):
                discrepancy = self._matched(block, classes)
                (gradient[rows],) = torch.autograd.grad(self._method.discrepancy_weight * discrepancy, block)
            losses[0] += discrepancy.detach()
            if self._method.calibration_weight:
                with record_function("calibrate"):
                    calibration = self._calibrated(block, rows, calibrate)
                    gradient[rows] += torch.autograd.grad(self._method.calibration_weight * calibration, block)[0]
                losses[1] += calibration.detach()
        return gradient, losses / num_classes

    def _matched(self, block: Tensor, classes: slice) -> Tensor:
        """Sum over classes of the discrepancy of a block of images."""
        assert self._draw is not None
        images = self._decoded(block, self._draw.augmentation)
        features = in_chunks(self._features_forward, self._draw.extractors.match, images, self.execution)
        features_BND = features.view(classes.stop - classes.start, -1, features.shape[1])
        return self._draw.target.gaps(features_BND, classes).sum()

    def _calibrated(self, block: Tensor, rows: slice, augmentation: Augmentation) -> Tensor:
        """Sum over classes of a block's mean cross-entropy under the trained network; each step has its own augmentation."""
        assert self._draw is not None
        repeats = self._method.factor**2
        labels = self.synthetic.labels[rows].repeat_interleave(repeats)
        logits = in_chunks(
            self._logits_forward, self._draw.extractors.calibrate, self._decoded(block, augmentation), self.execution
        )
        per_class = repeats * len(self.synthetic.labels) // self._dataset.num_classes
        return F.cross_entropy(logits, labels, reduction="sum") / per_class

    def _decoded(self, images: Tensor, augmentation: Augmentation) -> Tensor:
        return augmentation(self._dataset.normalise(decode(images, self._method.factor)))

    @torch.no_grad()
    def _real_features(self, extractors: Extractors, augmentation: Augmentation, index: int) -> Tensor:
        """Features of a random real batch of every class, shape (C, N, D), computed in chunks of images and held once."""
        chosen = self._dataset.class_batches(self._real_batch, generator(self._seed, "distill/real", index))
        if self._method.real_sampling == "prefix":
            chosen = self._dataset.members[:, : self._real_batch]
        features = real_features(
            self._features_forward,
            extractors.match,
            self._dataset,
            chosen.flatten(),
            augmentation,
            self.execution,
            bfloat16=self._method.precision == "bfloat16",
            channels_last=self._channels_last,
        )
        return self._by_class(features)

    @torch.no_grad()
    def _synthetic_features(self, extractors: Extractors, augmentation: Augmentation) -> Tensor:
        """Features of all images of every class, shape (C, N, D): a chunk is decoded and augmented as its turn comes."""
        images, factor, chunk = self.synthetic.images, self._method.factor, self.execution.chunk
        pieces = decoded_pieces(images, factor, chunk, lambda decoded: augmentation(self._dataset.normalise(decoded)))
        features = (self._features_forward(extractors.match, piece) for piece in pieces)
        return self._by_class(gathered(features, len(images) * factor**2))

    def _by_class(self, features: Tensor) -> Tensor:
        return features.view(self._dataset.num_classes, -1, features.shape[1])

    def result(self) -> SyntheticSet:
        """The set as it is now, with soft labels where the method asks for them.

        Raises:
            OutOfMemoryError: labelling a batch does not fit the memory, nor does half of it.
        """
        synthetic = replace(self.synthetic, images=self.synthetic.images.detach())
        if self._method.labels == "hard":
            return synthetic
        with told(_too_much):
            images = self._dataset.normalise(synthetic.decode()[0])
        return replace(synthetic, soft_labels=self._pool.label(images))

    def state(self) -> dict[str, Tensor]:
        """Images, optimiser, psi, schedule, step and execution as flat tensors on the CPU."""
        state = {"images": self.synthetic.images.detach(), "step": torch.tensor(self.step)}
        state |= {f"optimizer.{name}": tensor for name, tensor in optimizer_state(self._optimizer).items()}
        state |= {f"sampler.{name}": tensor for name, tensor in self._sampler.state().items()}
        state |= {f"schedule.{name}": tensor for name, tensor in self._schedule.state().items()}
        state["execution"] = self.execution.encode()
        state["halvings"] = torch.tensor(self.halvings)
        return {name: tensor.cpu().clone() for name, tensor in state.items()}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Go on from a state, with its execution.

        Raises:
            CheckpointError: it is of another distillation.
        """
        try:
            with torch.no_grad():
                self.synthetic.images.copy_(state["images"])
            load_optimizer_state(self._optimizer, part(state, "optimizer."))
            self._sampler.load_state(part(state, "sampler."))
            self._schedule.load_state(part(state, "schedule."))
            self.step, self.halvings = int(state["step"]), int(state["halvings"])
            self._carry_out(Execution.decode(state["execution"]))
            self._own_choice = False
        except (KeyError, RuntimeError, IndexError, ValueError) as error:
            raise CheckpointError.of(
                "checkpoint", None, f"does not fit this distillation: {error}", "Start afresh."
            ) from None
        self._draw = None
