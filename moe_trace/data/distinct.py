"""Expected number of distinct experts that T tokens choose: the sum over experts of P(any token chooses it).

    independent tokens, each choosing k of E experts uniformly       E (1 - (1 - k / E)^T)
    T of N tokens drawn without replacement, n_e of which have e     sum_e (1 - C(N - n_e, T) / C(N, T))

Both are exact. C(N - n, T) / C(N, T) is the product of (N - n - i) / (N - i) over i < T.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt


def uniform_distinct(
    num_experts: int, per_token: npt.ArrayLike, tokens: npt.ArrayLike
) -> npt.NDArray[np.float64]:
    """Return the mean, [...], for tokens that each choose `per_token` distinct experts uniformly."""
    missed = 1 - np.minimum(1.0, np.asarray(per_token, np.float64) / num_experts)
    return np.asarray(num_experts * (1 - missed ** np.asarray(tokens, np.float64)))


def drawn_distinct(counts_E: npt.NDArray[np.int64], tokens: int, most: int) -> npt.NDArray[np.float64]:
    """Return the mean, [B], for 1 ... B (`most`, or all) of `tokens` tokens with `counts_E` per expert."""
    batch_sizes = np.arange(min(most, tokens))[:, None]
    missing_BE = np.maximum(0, tokens - counts_E[None] - batch_sizes) / (tokens - batch_sizes)
    return (1 - np.cumprod(missing_BE, axis=0)).sum(axis=1)
