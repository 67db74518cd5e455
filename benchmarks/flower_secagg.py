"""Flower's SecAgg+, as it ships, on vectors that are given: its mod on holders, its workflow.

Nothing of it is rewritten: ``SecAggWorkflow`` (all share with all) runs with a ``LegacyContext``
and a Grid that calls ``secaggplus_mod`` in this process. Its strategy does nothing, the model that
it sends is one number, and a holder's "training" hands out a vector that is ready; so what is timed
is secure aggregation and the messages' own encoding.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.client.mod import secaggplus_mod
from flwr.common import (
    Code,
    FitIns,
    FitRes,
    Parameters,
    Status,
    ndarrays_to_parameters,
    parameters_to_ndarrays,
)
from flwr.common.secure_aggregation.crypto.symmetric_encryption import generate_shared_key
from flwr.common.secure_aggregation.secaggplus_constants import RECORD_KEY_CONFIGS, Key, Stage
from flwr.compat.common import recorddict_compat as compat
from flwr.server import LegacyContext
from flwr.server.client_proxy import ClientProxy
from flwr.server.compat.grid_client_proxy import GridClientProxy
from flwr.server.strategy import FedAvg
from flwr.server.workflow import SecAggWorkflow
from flwr.server.workflow.constant import MAIN_CONFIGS_RECORD, MAIN_PARAMS_RECORD
from flwr.supercore.primitives.asymmetric import generate_key_pairs

from benchmarks.masked_round import WATCHED, Cost, Meter, Vectors
from common.flower import BaseGrid, quiet_flower, stamp

__all__ = ["free_bits", "secagg_round"]

_WEIGHT = 1000
"""Of each holder: the workflow's own ``max_weight``, so that its encoding loses least."""


def secagg_round(vectors: Vectors, holders: int, threshold: int, dropped: int = 0) -> Cost:
    """A round with the workflow's own clipping range (8), 2^22 steps and modulus 2^32.

    Args:
        vectors: the holders' updates.
        holders: how many; each shares its secrets with all.
        threshold: shares that give a secret back.
        dropped: how many holders leave before they send a masked vector.

    Raises:
        AssertionError: the mean is not that of the holders who stayed, to two steps.
    """
    quiet_flower()
    grid = _MeteredGrid(vectors, holders, holders - dropped)
    strategy = _Nothing(grid)
    context = LegacyContext(_context(0), strategy=strategy)
    context.state.config_records[MAIN_CONFIGS_RECORD] = ConfigRecord({"current_round": 1})
    context.state.array_records[MAIN_PARAMS_RECORD] = compat.parameters_to_arrayrecord(
        ndarrays_to_parameters([np.zeros(1, np.float32)]), keep_input=True
    )
    workflow = SecAggWorkflow(reconstruction_threshold=threshold / holders)
    grid.begin()
    workflow(grid, context)
    grid.settle()
    expected = np.mean([vectors(place) for place in range(holders - dropped)], axis=0)
    (mean,) = parameters_to_ndarrays(strategy.aggregated)
    assert np.allclose(mean, expected, rtol=0.0, atol=2 * 16 / 2**22), "the mean is wrong"
    return Cost(list(grid.watched.values()), grid.coordinator)


def free_bits(keys: int = 100) -> int:
    """Bits that differ among the 32-bit seeds to which pairwise keys are folded.

    A mask is ``RandomState`` of the exclusive or of its key's 32-bit words
    (``flwr.common.secure_aggregation.secaggplus_utils.pseudo_rand_gen``).

    Args:
        keys: how many agreements to look at; some bit that is free is missed with 2^-``keys``.
    """
    private, _ = generate_key_pairs()
    agreed = (generate_shared_key(private, generate_key_pairs()[1]) for _ in range(keys))
    seeds = np.array([np.bitwise_xor.reduce(np.frombuffer(key, "<u4")) for key in agreed])
    return int(np.bitwise_or.reduce(seeds ^ seeds[0])).bit_count()


class _MeteredGrid(BaseGrid):
    """Calls the mod in this process; what passes between two calls is the coordinator's.

    Args:
        vectors: the holders' updates.
        holders: how many.
        staying: how many of them send a masked vector.
    """

    def __init__(self, vectors: Vectors, holders: int, staying: int) -> None:
        super().__init__()
        self._vectors = vectors
        self._contexts = {place + 1: _context(place + 1) for place in range(holders)}
        self._left = set(list(self._contexts)[staying:])
        self.coordinator = Meter()
        self.watched = {node: Meter() for node in list(self._contexts)[: min(WATCHED, staying)]}
        self._stage, self._since = Stage.SETUP, 0.0

    def get_node_ids(self) -> list[int]:
        return list(self._contexts)

    def holder_name(self, node_id: int) -> str:
        return str(node_id)

    def begin(self) -> None:
        """The coordinator's time runs from here, and stands still while holders are at work."""
        self._since = time.process_time()

    def settle(self) -> None:
        """Count the coordinator's time up to here."""
        self.coordinator.seconds[self._stage] += time.process_time() - self._since

    def send_and_receive(
        self,
        messages: Iterable[Message],
        *,
        timeout: float | None = None,
    ) -> list[Message]:
        asked = list(messages)
        self.settle()
        self._stage = str(asked[0].content.config_records[RECORD_KEY_CONFIGS][Key.STAGE])
        replies = [self._answer(message) for message in asked if self._stays(message)]
        self.begin()
        return replies

    def _stays(self, message: Message) -> bool:
        early = self._stage in (Stage.SETUP, Stage.SHARE_KEYS)
        return early or message.metadata.dst_node_id not in self._left

    def _answer(self, message: Message) -> Message:
        node = message.metadata.dst_node_id
        # The mod takes its stage out of the record, which on a wire is each holder's own.
        asked = ConfigRecord(dict(message.content.config_records[RECORD_KEY_CONFIGS]))
        content = RecordDict({**message.content, RECORD_KEY_CONFIGS: asked})
        own = Message(content, node, message.metadata.message_type)
        stamp(own)
        meter = self.watched.get(node, Meter())
        ready = self._trained(node)
        with meter.measuring(self._stage):
            reply = secaggplus_mod(
                own, self._contexts[node], lambda asked, _: Message(ready, reply_to=asked)
            )
        meter.received += _bytes_in(asked)
        meter.sent += _bytes_in(reply.content.config_records[RECORD_KEY_CONFIGS])
        return reply

    def _trained(self, node: int) -> RecordDict:
        """What the app behind the mod says where it is asked."""
        if self._stage != Stage.COLLECT_MASKED_VECTORS:
            return RecordDict()
        parameters = ndarrays_to_parameters([self._vectors(node - 1)])
        result = FitRes(Status(Code.OK, ""), parameters, _WEIGHT, {})
        return compat.fitres_to_recorddict(result, keep_input=False)


class _Nothing(FedAvg):
    """Asks everybody, and keeps what the workflow has aggregated."""

    def __init__(self, grid: _MeteredGrid) -> None:
        super().__init__()
        self._grid = grid
        self.aggregated = Parameters([], "")

    def configure_fit(
        self, server_round: int, parameters: Parameters, client_manager: Any
    ) -> list[tuple[ClientProxy, FitIns]]:
        del server_round, client_manager
        return [
            (GridClientProxy(node, self._grid, 1), FitIns(parameters, {}))
            for node in self._grid.get_node_ids()
        ]

    def aggregate_fit(
        self, server_round: int, results: Any, failures: Any
    ) -> tuple[Parameters | None, dict[str, Any]]:
        del server_round, failures
        self.aggregated = results[0][1].parameters
        return None, {}


def _context(node: int) -> Context:
    return Context(1, node, {}, RecordDict(), {})


def _bytes_in(record: ConfigRecord) -> int:
    """Bytes of what is said, without names and lengths."""
    values = (each for value in record.values() for each in _items(value))
    return sum(len(value) if isinstance(value, bytes | str) else 8 for value in values)


def _items(value: Any) -> Sequence[Any]:
    return value if isinstance(value, list) else [value]
