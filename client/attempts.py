"""Requests that were begun here and have no answer yet: each may be tried again, as it was.

Whether computing failed, or that it did not and the disk was full, may depend on the data and has
been told. A coordinator that varied the model could so ask one question after another, all at the
price of one request. So what is tried again under a request's name must be the very same.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from common.errors import Refusal
from common.privacy.ledger import Release

__all__ = ["MOST", "Attempts"]

MOST = 1024
"""Attempts that are remembered. Ordinary work has one; each failure leaves one more behind."""


@dataclass
class Attempts:
    """Which model each request was begun with, until it is answered.

    It lives in memory: after a crash there is nothing to compare, and nothing had been told. Who
    starts the holder again after a failure gives the coordinator one more question.

    Args:
        most: to remember. Where more have failed, a request that is not remembered is not tried
            again.
    """

    most: int = MOST
    _models: dict[str, bytes] = field(default_factory=dict)
    _forgot: bool = False

    def __len__(self) -> int:
        return len(self._models)

    def begin(self, release: Release, model: bytes, *, again: bool) -> None:
        """Remember a request before it is computed.

        Args:
            release: what it asks for.
            model: names the parameters that it brings.
            again: whether it was charged before.

        Raises:
            Refusal: it is another try, and not known to be of the same parameters.
        """
        name = release.request_id
        known = self._models.get(name)
        if known is None and again and self._forgot:
            raise Refusal(
                "request",
                f"round {release.round} may have failed here before, as more than {self.most} "
                "requests have; ask for another round",
            )
        if known is not None and known != model:
            raise Refusal(
                "request",
                f"round {release.round} failed here before with other parameters; ask with the "
                "same, or for another round",
            )
        self._models[name] = model
        if len(self._models) > self.most:
            del self._models[next(iter(self._models))]
            self._forgot = True

    def end(self, request_id: str) -> None:
        """Forget a request that is answered: from now on it has one answer only."""
        self._models.pop(request_id, None)
