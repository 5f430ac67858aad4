"""What a reward is compared with: one function for each `grpo.advantage_estimator`, by name.

To add one, write its function here and its name in `GrpoSection.advantage_estimator`. Example: the
rewards 1, 0, 0 of a group have the mean 1/3. The first has the advantage 2/3 in ``grpo``, and 1 in
``rloo``, where the mean of the others is 0. The mean alone (Dr. GRPO) is ``grpo`` with
``scale_rewards = "none"``.

In: rewards minus the mean of their group; how many completions of the group count. Out: advantages.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float64, Int64

SCALED_BY_ITS_OWN_SPREAD = frozenset({"reinforce_plus_plus"})
"""Estimators whose ``batch`` divides by the standard deviation of what the function returns, and
not of the rewards, which also differ between prompts."""


def grpo(
    centred: Float64[np.ndarray, "groups generations"], num_counted: Int64[np.ndarray, "groups 1"]
) -> Float64[np.ndarray, "groups generations"]:
    """Compare with the mean of the group.

    Source: GRPO, arXiv 2402.03300, section 4.1.2.
    """
    return centred


def rloo(
    centred: Float64[np.ndarray, "groups generations"], num_counted: Int64[np.ndarray, "groups 1"]
) -> Float64[np.ndarray, "groups generations"]:
    """Compare with the mean of the other completions of the group.

    ``r_i - mean of the others = (r_i - mean of all) n / (n - 1)``.

    Source: RLOO, arXiv 2402.14740, equation 8.
    """
    return centred * (num_counted / np.maximum(num_counted - 1, 1))


def reinforce_plus_plus(
    centred: Float64[np.ndarray, "groups generations"], num_counted: Int64[np.ndarray, "groups 1"]
) -> Float64[np.ndarray, "groups generations"]:
    """Compare with the mean of the group, to be divided by the spread over all samples.

    Other trainers give the name to forms that whiten over tokens, in which a group of equal rewards
    has advantages that depend on lengths.

    Source: REINFORCE++ with baseline, arXiv 2501.03262; over samples, Megatron-SWIFT,
    ``advantage_estimator``.
    """
    return centred
