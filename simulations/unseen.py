"""Masked sums in blocks: the numbers of a masked round, without its masks.

Masks cancel in the sum, so what comes out is what the holders put in, counted in whole steps of the
plan's ring (:mod:`common.aggregation`). Here each holder's part is made as it is on its own machine
(``client.holder.Holder.contribution``), rounding, share of the noise and range included, and
summed as it is. Nobody is protected by that: whoever runs the simulation has all the data.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from flwr.app import Message
from torch import Tensor

from common.aggregation import Masked
from common.plan import TrainingPlan
from common.privacy.distributed import noised_steps
from common.privacy.noise import Randomness
from common.secagg.ring import Encoding
from common.wire import lost_error
from server.secure import mean_update
from simulations.jobs import Total

__all__ = ["lost", "mean_of", "part_of"]


def part_of(plan: TrainingPlan, moved: Tensor, weight: float, randomness: Randomness) -> Tensor:
    """What a holder would mask, as real numbers: whole steps of the ring, exactly.

    Args:
        plan: calibrated, masked.
        moved: its update, or its sum of clipped gradients: [D].
        weight: of the holder, which an update is multiplied by.
        randomness: of its share of the noise.

    Returns:
        [D] float64.

    Raises:
        OutOfRange: a number is beyond what the plan allows one holder to send.
    """
    encoding, exact = _encoding(plan), moved.to("cpu", torch.float64)
    if plan.privacy.kind == "distributed":
        vector = encoding.encode_integers(noised_steps(exact, plan, randomness))
    else:
        vector = encoding.encode(exact.numpy() * weight)
    return torch.from_numpy(encoding.decode(vector))


def mean_of(plan: TrainingPlan, total: Total) -> Tensor:
    """The update that the sum of a round makes, whatever the plan's aggregation: [D] float32."""
    if plan.aggregation.kind == "plain":
        return total.mean().float()
    steps = np.rint(total.sum.total().numpy() / _encoding(plan).step).astype(np.int64)
    return torch.from_numpy(mean_update(plan, steps, float(total.weight)))


def lost(messages: Sequence[Message], fewest: int) -> list[Message]:
    """Replies of holders that did their part in a round of which nothing came.

    Args:
        messages: that they were asked with.
        fewest: holders that the sum would have needed.
    """
    error = lost_error(f"fewer than {fewest} holders remained for a masked sum")
    return [Message(error, reply_to=message) for message in messages]


def _encoding(plan: TrainingPlan) -> Encoding:
    assert isinstance(plan.aggregation, Masked), "plain plans have nothing to encode"
    return plan.aggregation.encoding(plan)
