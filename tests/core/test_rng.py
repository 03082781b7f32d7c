from __future__ import annotations

import torch

from ncfm_core.rng import generator


def numbers(seed: int, stream: str, step: int = 0) -> list[float]:
    return torch.rand(4, generator=generator(seed, stream, step)).tolist()


def test_equal_names_give_equal_numbers() -> None:
    assert numbers(3, "a", 7) == numbers(3, "a", 7)


def test_seed_stream_and_step_each_matter() -> None:
    draws = [numbers(0, "a"), numbers(1, "a"), numbers(0, "b"), numbers(0, "a", 1), numbers(0, "a/1"), numbers(11, "a")]
    assert len({tuple(draw) for draw in draws}) == len(draws)


def test_the_global_generator_is_left_alone() -> None:
    before = torch.random.get_rng_state()
    numbers(0, "a")
    assert torch.equal(torch.random.get_rng_state(), before)
