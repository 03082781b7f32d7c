"""Where frequencies come from: Gaussian, or the learned scale mixture psi of the minmax.

K frequencies of D features: t = s * sigma_k * z, z ~ N(0, I). Gaussian t have sigma = 1. The scale mixture has components of D
log-scales r_k each, sigma_k = exp(r_k) / rms(exp(r_k)), and K / components frequencies for each component.

Why the scales are normalised: both empirical characteristic functions fall to their sampling noise at large t, where the gap is
at its largest and means nothing. With free scales the ascent runs there. With the root mean square of each component fixed, psi
learns the shape, and the one bandwidth s stays a hyperparameter.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, Protocol

import torch
from torch import Tensor

from ncfm_core.discrepancy import characteristic_function, gap, power
from ncfm_core.spec import NcfmSpec
from ncfm_core.training import load_optimizer_state, optimizer_state, part


class FrequencySampler(Protocol):
    """Turns standard normal draws of shape (K, D) into frequencies of the same shape."""

    def frequencies(self, normal_KD: Tensor) -> Tensor:
        """The frequencies of a draw, shape (K, D)."""
        ...

    def ascend(self, normal_KD: Tensor, real_CND: Tensor, synthetic_CND: Tensor) -> Tensor:
        """Play the sampler's side of the minmax for one draw; the rise of its objective, as a scalar on the device."""
        ...

    def state(self) -> dict[str, Tensor]:
        """What was learned, as flat tensors."""
        ...

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Go on from what `state` gave; KeyError or RuntimeError where it is of another sampler."""
        ...


class Gaussian:
    """t ~ N(0, s^2 I): nothing to learn."""

    def __init__(self, frequency_scale: float) -> None:
        """
        Args:
            frequency_scale: s.
        """
        self.frequency_scale = frequency_scale

    def frequencies(self, normal_KD: Tensor) -> Tensor:
        """s z, shape (K, D)."""
        return normal_KD * self.frequency_scale

    def ascend(self, normal_KD: Tensor, real_CND: Tensor, synthetic_CND: Tensor) -> Tensor:
        """No ascent: a rise of zero, a scalar on the device."""
        return normal_KD.new_zeros(())

    def state(self) -> dict[str, Tensor]:
        """Empty."""
        return {}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Nothing to load."""
        return None


class ScaleMixture:
    """psi: a scale mixture of normals whose shape is learned by ascent on the gap (NCFM, section 3.2)."""

    def __init__(
        self,
        *,
        num_components: int,
        num_features: int,
        frequency_scale: float,
        lr: float,
        ascent_steps: int,
        objective: Literal["gap", "power", "debiased"],
        amplitude_weight: float,
        device: torch.device,
    ) -> None:
        """
        Args:
            num_components: mixture components; must divide the number of frequencies.
            num_features: D.
            frequency_scale: s, the root mean square of every component's scales.
            lr: of Adam on the log-scales.
            ascent_steps: per draw.
            objective: what is raised: the gap, the gap over its sampling error, or the gap less the one between two halves of the
                real batch, which is sampling alone.
            amplitude_weight: of the gap that is raised.
            device: where the log-scales live.
        """
        self.frequency_scale, self.ascent_steps, self.amplitude_weight = frequency_scale, ascent_steps, amplitude_weight
        self._objective = objective
        self.log_scales = torch.zeros((num_components, num_features), device=device, requires_grad=True)
        self._optimizer = torch.optim.Adam([self.log_scales], lr=lr)

    def scales(self) -> Tensor:
        """sigma of each component, shape (components, D), positive, root mean square 1 over D."""
        # The largest is taken out first, so that exp cannot overflow; the ratio does not change.
        free = (self.log_scales - self.log_scales.amax(1, keepdim=True)).exp()
        return free / free.square().mean(1, keepdim=True).sqrt()

    def frequencies(self, normal_KD: Tensor) -> Tensor:
        """s sigma_k z, shape (K, D), differentiable in the log-scales: K / components rows in turn belong to each component.

        Args:
            normal_KD: standard normal draws; the components must divide K.
        """
        num_components = len(self.log_scales)
        shaped = normal_KD.view(num_components, -1, normal_KD.shape[1]) * self.scales().unsqueeze(1)
        return shaped.flatten(0, 1) * self.frequency_scale

    def ascend(self, normal_KD: Tensor, real_CND: Tensor, synthetic_CND: Tensor) -> Tensor:
        """Adam steps up the class mean of the objective, both sides' features held.

        The gradient is asked for psi alone (`autograd.grad`), so that neither player's leaks into the other's, and gathered class
        by class, since the phases of all classes would take more memory than the rest of the step.

        Args:
            normal_KD: the draw that the images will meet too.
            real_CND: real features, without gradient.
            synthetic_CND: synthetic features, without gradient.

        Returns:
            The rise of the objective, a scalar on the device.
        """
        rise = normal_KD.new_zeros(())
        for _ in range(self.ascent_steps):
            frequencies_KD = self.frequencies(normal_KD)
            gradient_KD = self._gradient(frequencies_KD.detach(), real_CND, synthetic_CND)
            (gradient,) = torch.autograd.grad(frequencies_KD, self.log_scales, gradient_KD)
            self.log_scales.grad = -gradient
            self._optimizer.step()
            with torch.no_grad():
                # To first order: the gap itself would cost another pass over all real features.
                rise += (gradient_KD * (self.frequencies(normal_KD) - frequencies_KD)).sum()
        self.log_scales.grad = None
        return rise

    def _gradient(self, frequencies_KD: Tensor, real_CND: Tensor, synthetic_CND: Tensor) -> Tensor:
        """Of the class mean of the objective, with respect to the frequencies."""
        frequencies_KD.requires_grad_(True)
        gradient_KD = torch.zeros_like(frequencies_KD)
        for label in range(len(real_CND)):
            one = slice(label, label + 1)
            value = self._value(real_CND[one], synthetic_CND[one], frequencies_KD).sum() / len(real_CND)
            gradient_KD += torch.autograd.grad(value, frequencies_KD)[0]
        return gradient_KD

    def _value(self, real_CND: Tensor, synthetic_CND: Tensor, frequencies_KD: Tensor) -> Tensor:
        """The objective of each class, shape (C,)."""
        real, synthetic = (characteristic_function(each, frequencies_KD) for each in (real_CND, synthetic_CND))
        if self._objective == "power":
            sizes = {"num_real": real_CND.shape[1], "num_synthetic": synthetic_CND.shape[1]}
            return power(real, synthetic, self.amplitude_weight, **sizes)
        value = gap(real, synthetic, self.amplitude_weight)
        if self._objective == "debiased":
            # The batch is in random order already.
            halves = [characteristic_function(half, frequencies_KD) for half in real_CND.tensor_split(2, dim=1)]
            value = value - gap(halves[0], halves[1], self.amplitude_weight)
        return value

    def state(self) -> dict[str, Tensor]:
        """Log-scales, float32 of shape (components, D), and their optimiser."""
        optimizer = {f"optimizer.{name}": tensor for name, tensor in optimizer_state(self._optimizer).items()}
        return {"log_scales": self.log_scales.detach().clone()} | optimizer

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Go on from what `state` gave; KeyError or RuntimeError where it is of another mixture."""
        with torch.no_grad():
            self.log_scales.copy_(state["log_scales"])
        load_optimizer_state(self._optimizer, part(state, "optimizer."))


def sampler_of(method: NcfmSpec, num_features: int, device: torch.device) -> FrequencySampler:
    """The sampler of a method, fresh.

    Args:
        method: all of its numbers.
        num_features: D.
        device: where psi lives, if there is one.
    """
    if method.sampler == "gaussian":
        return Gaussian(method.frequency_scale)
    return ScaleMixture(
        num_components=method.num_components,
        num_features=num_features,
        frequency_scale=method.frequency_scale,
        lr=method.sampler_lr,
        ascent_steps=method.sampler_steps,
        objective=method.sampler_objective,
        amplitude_weight=method.amplitude_weight,
        device=device,
    )
