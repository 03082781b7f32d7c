"""The one loop: images against psi, all classes together.

A draw (network, real batch, augmentation, normal z) serves `reuse` image updates. At its start psi takes its ascent steps,
then frequencies are fixed and the real side, which needs no gradient, is computed once. Random numbers are counted by draw
and step, so a state saved between any two steps goes on with the same bits.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ncfm_core import augment
from ncfm_core.augment import Augmentation
from ncfm_core.datasets import Dataset
from ncfm_core.discrepancy import CharacteristicFunction, characteristic_function, gap
from ncfm_core.errors import CheckpointError
from ncfm_core.frequencies import FrequencySampler, Gaussian, ScaleMixture
from ncfm_core.pools import Extractors, TeacherPool
from ncfm_core.progress import Progress
from ncfm_core.rng import generator
from ncfm_core.spec import NcfmSpec
from ncfm_core.synthetic import decode, start
from ncfm_core.training import load_optimizer_state, optimizer_state, part

REPORT_EVERY = 25
"""Image steps between two reports; each costs one wait for the device."""
FORWARD_BYTES = 256 << 20
"""Bound on the first activation map of a no-gradient forward: real images go through in chunks of this size."""


@dataclass(frozen=True, slots=True)
class _Draw:
    """What serves one reuse window."""

    index: int
    extractors: Extractors
    augmentation: Augmentation
    real: CharacteristicFunction
    frequencies_KD: Tensor


class Distillation:
    """NCFM (arXiv 2502.20653): learn images whose features have the real data's characteristic function."""

    def __init__(
        self,
        dataset: Dataset,
        pool: TeacherPool,
        method: NcfmSpec,
        *,
        ipc: int,
        seed: int,
        device: torch.device,
    ) -> None:
        """
        Args:
            dataset: the real data.
            pool: the networks.
            method: all of its numbers.
            ipc: stored images per class.
            seed: of everything drawn here.
            device: where to compute; the pool must be there.
        """
        self._dataset, self._pool, self._method, self._seed = dataset.to(device), pool, method, seed
        self._real_batch = min(method.real_batch, min(dataset.class_counts))
        self.synthetic = start(
            self._dataset, ipc=ipc, factor=method.factor, init=method.init, draw=generator(seed, "distill/init")
        )
        self.synthetic.images.requires_grad_(True)
        self._optimizer = torch.optim.AdamW(
            [self.synthetic.images], lr=method.image_lr, weight_decay=method.image_weight_decay
        )
        self._sampler = _sampler(method, pool.network.num_features, device)
        self._draw: _Draw | None = None
        self.total, self.step = method.steps, 0

    def run(self, until: int | None = None) -> Iterator[Progress]:
        """Update the images from `step` to `until` (all of it by default).

        The metrics of a report are means since the last one: `discrepancy` (class mean of the gap), `calibration`
        (cross-entropy), `psi_gain` (rise of the gap by psi's ascent, at fixed root mean square of the scales) and `image_lr`.
        """
        until = self.total if until is None else until
        sums = torch.zeros(3, device=self.synthetic.images.device)
        counted = draws = 0
        while self.step < until:
            if self._draw is None or self.step % self._method.reuse == 0:
                sums[2] += self._open_draw()
                draws += 1
            sums[:2] += self._advance()
            counted += 1
            if self.step == until or self.step % REPORT_EVERY == 0:
                discrepancy, calibration, gain = sums.tolist()
                metrics = {"discrepancy": discrepancy / counted, "calibration": calibration / counted}
                metrics |= {"psi_gain": gain / draws} if draws else {}
                metrics["image_lr"] = self._rate(self.step - 1)
                yield Progress(self.step, self.total, "step", metrics)
                sums.zero_()
                counted = draws = 0

    def _open_draw(self) -> Tensor:
        """Draw what the next window shares; psi's gain, on the device."""
        index, method, images = self.step // self._method.reuse, self._method, self.synthetic.images
        extractors = self._pool.draw(generator(self._seed, "distill/network", index))
        augmentation = augment.draw(method.augment, generator(self._seed, "distill/augment", index))
        normal_KD = torch.randn(
            (method.num_frequencies, self._pool.network.num_features),
            generator=generator(self._seed, "distill/frequencies", index),
        ).to(images.device)
        real_CND = self._real_features(extractors, augmentation, index)
        gain = images.new_zeros(())
        # A window that a resumed run opens in its middle has had its ascent already: psi came back with the state.
        if self.step % method.reuse == 0:
            with torch.no_grad():
                synthetic_CND = self._by_class(self._synthetic_features(extractors, augmentation))
            gain = self._sampler.ascend(normal_KD, real_CND, synthetic_CND)
        with torch.no_grad():
            frequencies_KD = self._sampler.frequencies(normal_KD)
            real = characteristic_function(real_CND, frequencies_KD)
        self._draw = _Draw(index, extractors, augmentation, real, frequencies_KD)
        return gain

    def _advance(self) -> Tensor:
        """One update of the images; discrepancy and calibration as class means, shape (2,), on the device."""
        assert self._draw is not None
        method, images = self._method, self.synthetic.images
        with torch.no_grad():
            images.clamp_(0, 1)
        features_CND = self._by_class(self._synthetic_features(self._draw.extractors, self._draw.augmentation))
        synthetic = characteristic_function(features_CND, self._draw.frequencies_KD)
        discrepancy_C = gap(self._draw.real, synthetic, method.amplitude_weight)
        calibration = self._calibration(self._draw.extractors) if method.calibration_weight else images.new_zeros(())
        num_classes = len(discrepancy_C)
        # Summed over classes: a class's gradient does not depend on how many others there are.
        loss = method.discrepancy_weight * discrepancy_C.sum() + method.calibration_weight * num_classes * calibration
        (images.grad,) = torch.autograd.grad(loss, images)
        for group in self._optimizer.param_groups:
            group["lr"] = self._rate(self.step)
        self._optimizer.step()
        images.grad = None
        self.step += 1
        if self.step == self.total:
            with torch.no_grad():
                images.clamp_(0, 1)
        return torch.stack((discrepancy_C.mean(), calibration)).detach()

    def _rate(self, step: int) -> float:
        if self._method.schedule == "constant":
            return self._method.image_lr
        return self._method.image_lr * 0.5 * (1 + math.cos(math.pi * step / self.total))

    def _decoded(self, augmentation: Augmentation) -> Tensor:
        return augmentation(self._dataset.normalise(decode(self.synthetic.images, self._method.factor)))

    def _synthetic_features(self, extractors: Extractors, augmentation: Augmentation) -> Tensor:
        return self._pool.features(extractors.match, self._decoded(augmentation))

    def _calibration(self, extractors: Extractors) -> Tensor:
        """Mean cross-entropy of the decoded images under the trained network, with an augmentation of its own each step."""
        augmentation = augment.draw(self._method.augment, generator(self._seed, "distill/calibrate", self.step))
        labels = self.synthetic.labels.repeat_interleave(self._method.factor**2)
        return F.cross_entropy(self._pool.logits(extractors.calibrate, self._decoded(augmentation)), labels)

    @torch.no_grad()
    def _real_features(self, extractors: Extractors, augmentation: Augmentation, index: int) -> Tensor:
        """Features of a random real batch of every class, shape (C, N, D), computed in chunks of images."""
        chosen = self._dataset.class_batches(self._real_batch, generator(self._seed, "distill/real", index))
        device = self.synthetic.images.device
        chosen = chosen.flatten().to(device)
        _, height, width = self._dataset.image_shape
        chunk = max(1, FORWARD_BYTES // (4 * height * width * self._pool.network.width))
        low = self._method.precision == "bfloat16"
        features = []
        for part_of in chosen.split(chunk):
            images = augmentation(self._dataset.normalise(self._dataset.take(part_of)))
            with torch.autocast(device.type, dtype=torch.bfloat16, enabled=low):
                features.append(self._pool.features(extractors.match, images).to(torch.float32))
        return self._by_class(torch.cat(features))

    def _by_class(self, features: Tensor) -> Tensor:
        return features.view(self._dataset.num_classes, -1, features.shape[1])

    def state(self) -> dict[str, Tensor]:
        """Images, optimiser, psi and step as flat tensors on the CPU."""
        state = {"images": self.synthetic.images.detach(), "step": torch.tensor(self.step)}
        state |= {f"optimizer.{name}": tensor for name, tensor in optimizer_state(self._optimizer).items()}
        state |= {f"sampler.{name}": tensor for name, tensor in self._sampler.state().items()}
        return {name: tensor.cpu().clone() for name, tensor in state.items()}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Go on from a state.

        Raises:
            CheckpointError: it is of another distillation.
        """
        try:
            with torch.no_grad():
                self.synthetic.images.copy_(state["images"])
            load_optimizer_state(self._optimizer, part(state, "optimizer."))
            self._sampler.load_state(part(state, "sampler."))
            self.step = int(state["step"])
        except (KeyError, RuntimeError, IndexError) as error:
            raise CheckpointError.of(
                "checkpoint", None, f"does not fit this distillation: {error}", "Start afresh."
            ) from None
        self._draw = None


def _sampler(method: NcfmSpec, num_features: int, device: torch.device) -> FrequencySampler:
    if method.sampler == "gaussian":
        return Gaussian(method.frequency_scale)
    return ScaleMixture(
        num_components=method.num_components,
        num_features=num_features,
        frequency_scale=method.frequency_scale,
        lr=method.sampler_lr,
        ascent_steps=method.sampler_steps,
        amplitude_weight=method.amplitude_weight,
        device=device,
    )
