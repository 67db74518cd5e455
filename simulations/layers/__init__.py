"""Layers of many models at once: forward, per-unit gradient norms, and clipped sums.

Rows of a layer's input are the units of all models, holder by holder: ``[H·B, ...]``, where row
``h·B + b`` is unit b of holder h. The layer of holder h has its own parameters, so a stacked layer
is a batched product over H. Norms of per-unit gradients come in closed form from the layer's input
and the gradient of its output (Goodfellow 2015, "Efficient per-example gradient computations",
arXiv:1510.01799; for sequences Bu et al. 2022, "Scalable and efficient training of large
convolutional neural networks with differential privacy", arXiv:2205.10683), without the gradients
themselves; the clipped sum is a second batched product.

Adding a layer is a rule in a module of its own and a line in :data:`RULES`. Modules without a rule
go through :class:`AnyModule`, which takes per-unit gradients with ``torch.func``.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from simulations.layers.anything import AnyModule
from simulations.layers.base import Call, Record, Rule, Weights
from simulations.layers.convolution import ConvolutionRule
from simulations.layers.embedding import EmbeddingRule
from simulations.layers.linear import LinearRule
from simulations.layers.norms import GroupNormRule, LayerNormRule, RMSNormRule

__all__ = ["RULES", "AnyModule", "Call", "Record", "Rule", "Weights", "rule_for"]

RULES: Mapping[type[nn.Module], type[Rule]] = {
    nn.Linear: LinearRule,
    nn.Embedding: EmbeddingRule,
    nn.Conv1d: ConvolutionRule,
    nn.Conv2d: ConvolutionRule,
    nn.Conv3d: ConvolutionRule,
    nn.LayerNorm: LayerNormRule,
    nn.RMSNorm: RMSNormRule,
    nn.GroupNorm: GroupNormRule,
}
"""Layer → rule. Looked up by exact type: a subclass may compute something else."""


def rule_for(layer: nn.Module, name: str) -> Rule:
    """The rule of a layer; :class:`AnyModule` where there is none for it or for its settings.

    Args:
        layer: with its parameters.
        name: in the model, for messages; empty for the model itself.

    Raises:
        ConfigurationError: the layer has a setting under which units cannot be told apart.
    """
    rule = RULES.get(type(layer), AnyModule)
    return (rule if rule.fits(layer) else AnyModule)(layer, name or "model")
