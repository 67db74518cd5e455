"""The privacy account, from mechanism to ledger.

* :mod:`~common.privacy.events`: what was released, and multisets of it.
* :mod:`~common.privacy.accounting`: what that costs, and the noise that meets a target;
  :mod:`~common.privacy.bounds` chooses among :mod:`~common.privacy.gaussian`,
  :mod:`~common.privacy.renyi` and :mod:`~common.privacy.prv` (of :mod:`~common.privacy.losses`);
  :mod:`~common.privacy.selection` is the best of a random number of runs.
* :mod:`~common.privacy.ledger`: the holder's durable account and its budgets;
  :mod:`~common.privacy.releases`, :mod:`~common.privacy.account` and
  :mod:`~common.privacy.storage` are its lines, its sums and its file.
* :mod:`~common.privacy.noise`: where randomness comes from, and Poisson sampling.
* :mod:`~common.privacy.step`: clip, sum, add noise, divide.
"""
