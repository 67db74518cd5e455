"""Small networks of the kinds that people train, as tasks."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from common.tasks.base import Examples
from tests.tiny import TinyTask

VOCABULARY, LENGTH, WIDTH = 20, 6, 16


class _Network(TinyTask):
    """Classifies ``x`` into two classes."""

    def loss(self, model: nn.Module, batch: Examples) -> Tensor:
        return nn.functional.cross_entropy(model(batch["x"]), batch["y"], reduction="none")

    def data(self, units: int, seed: int) -> Examples:
        chance = torch.Generator().manual_seed(seed)
        x = self.inputs(units, chance)
        return Examples({"x": x, "y": torch.randint(2, (units,), generator=chance)})

    def inputs(self, units: int, chance: torch.Generator) -> Tensor:
        raise NotImplementedError


class Perceptron(_Network):
    """30-64-32-2, the case of the benchmarks."""

    def model(self, units: int) -> nn.Module:
        return nn.Sequential(
            nn.Linear(30, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 2)
        )

    def inputs(self, units: int, chance: torch.Generator) -> Tensor:
        return torch.randn(units, 30, generator=chance)


class Convolutional(_Network):
    """Two convolutions and a group norm on pictures of 8 × 8."""

    def model(self, units: int) -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(1, 4, 3, padding=1),
            nn.GroupNorm(2, 4),
            nn.ReLU(),
            nn.Conv2d(4, 8, 3, stride=2, groups=2),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(72, 2),
        )

    def inputs(self, units: int, chance: torch.Generator) -> Tensor:
        return torch.randn(units, 1, 8, 8, generator=chance)


class _Block(nn.Module):
    """Self-attention with two heads, and a feed-forward part; norms before each."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.between = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.query, self.key, self.value, self.mix = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.widen, self.narrow = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        normed = self.before(x)
        heads = [
            layer(normed).unflatten(-1, (2, -1)).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        ]
        attended = nn.functional.scaled_dot_product_attention(*heads)
        x = x + self.mix(attended.transpose(1, 2).flatten(2))
        return x + self.narrow(nn.functional.gelu(self.widen(self.between(x))))


class _Reader(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(VOCABULARY, WIDTH)
        self.places = nn.Embedding(LENGTH, WIDTH)
        self.block = _Block()
        self.final = nn.LayerNorm(WIDTH)
        self.output = nn.Linear(WIDTH, 2)

    def forward(self, tokens: Tensor) -> Tensor:
        places = torch.arange(LENGTH, device=tokens.device).expand_as(tokens)
        x = self.block(self.words(tokens) + self.places(places))
        output: Tensor = self.output(self.final(x).mean(1))
        return output


class Transformer(_Network):
    """Words and places, a transformer block, a classifier."""

    def model(self, units: int) -> nn.Module:
        return _Reader()

    def inputs(self, units: int, chance: torch.Generator) -> Tensor:
        return torch.randint(VOCABULARY, (units, LENGTH), generator=chance)
