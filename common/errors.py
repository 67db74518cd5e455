"""Every exception Sotto raises on purpose, in one tree.

::

    SottoError
    ├── ConfigurationError   a flag, plan, policy or task that cannot work
    ├── DataError            a table that does not fit its schema, a source that is not there
    ├── WireError            a message that is not what the contract says
    ├── LinkError            a connection or identity that cannot be used
    ├── StateError           a state folder, checkpoint or ledger that cannot be trusted
    │   └── StorageError     ... or that a disk or a lock did not let us use; later it may
    ├── Refusal              a holder declines a request; ``code`` names the rule
    │   ├── BudgetExceeded   ... because the ledger would pass its budget
    │   └── ProtocolViolation ... because the coordinator broke secure aggregation
    └── RunError             a run that cannot go on (no quorum, every holder refused)
        └── AggregationFailed a secure sum that did not come about; the next round may
            └── BelowThreshold ... because too few holders remained

The message of each says what was found, what is allowed and what to do. Only the message of
a :class:`Refusal` may leave a holder: it is made of the plan's and the policy's own figures and
never of data. Of every other exception the coordinator learns the type, not the text.
"""

from __future__ import annotations

__all__ = [
    "AggregationFailed",
    "BelowThreshold",
    "BudgetExceeded",
    "ConfigurationError",
    "DataError",
    "LinkError",
    "ProtocolViolation",
    "Refusal",
    "RunError",
    "SottoError",
    "StateError",
    "StorageError",
    "WireError",
]


class SottoError(Exception):
    """Base of every error that Sotto raises on purpose."""


class ConfigurationError(SottoError, ValueError):
    """A flag, plan, policy or task definition that cannot work."""


class DataError(SottoError, ValueError):
    """A table that does not fit its schema, or a source that is not there."""


class WireError(SottoError, ValueError):
    """A message that is not what the contract says."""


class LinkError(SottoError):
    """A connection or an identity that cannot be used."""


class StateError(SottoError):
    """A state folder, checkpoint or ledger that cannot be trusted."""


class StorageError(StateError):
    """A disk or a lock did not let us: full, read-only, gone, or held by another process.

    Nothing is known to be wrong with what is stored. The same call may succeed once there is room,
    or the lock is let go; of a reservation it costs nothing more.
    """


class RunError(SottoError):
    """A run that cannot go on."""


class AggregationFailed(RunError):
    """A secure sum did not come about; nothing was learned, and the next round may succeed."""


class BelowThreshold(AggregationFailed):
    """Too few holders remained in a secure round.

    Args:
        stage: the round of the protocol, by its name in Bonawitz et al. 2017.
        have: holders that remained.
        need: the plan's threshold.
        of: holders that the round began with.
    """

    def __init__(self, stage: str, *, have: int, need: int, of: int) -> None:
        super().__init__(
            f"secure aggregation: {have} of {of} holders remained at {stage}, {need} are needed"
        )
        self.stage = stage
        self.have = have
        self.need = need


class Refusal(SottoError):
    """A holder declines a request.

    Args:
        code: the name of the rule that refused, e.g. ``"budget"`` or ``"task"``.
        sentence: why, in figures of the plan and the policy only; it is sent to the coordinator.
    """

    def __init__(self, code: str, sentence: str) -> None:
        super().__init__(sentence)
        self.code = code
        self.sentence = sentence


class BudgetExceeded(Refusal):
    """The ledger refuses: the release would pass the data set's budget.

    Args:
        sentence: what is left and what was asked.
        left: ε left before this request.
    """

    def __init__(self, sentence: str, *, left: float) -> None:
        super().__init__("budget", sentence)
        self.left = left


class ProtocolViolation(Refusal):
    """The coordinator asked for what secure aggregation forbids; nothing more is sent.

    Args:
        code: the name of the attack: ``"swapped-keys"``, ``"lone-holder"``, ``"roster"``,
            ``"replay"``, ``"threshold"``, ``"survivor-lists"``, ``"both-kinds-of-share"``,
            ``"tampered-shares"`` or ``"out-of-order"``.
        sentence: what was found and what to do.
    """
