"""The guarantee of an enforced erasure when a request, or an operator, erases more beside it.

Erasing other concepts takes probability from them, and what they lose goes to all the rest, the enforced concept
included. So the answer is compared with that of the enforced erasures alone, and the labels of enforced concepts are
capped by it. Where the values go in that an enforced erasure sees, `Planner.admit` refuses other erasures.
"""

from collections.abc import Sequence

import numpy as np

from workers.engine.answers import Logits

MAX_ROUNDS = 100
"""Most rounds of lowering the enforced labels one after the other; one label needs one round."""


def cap_labels(logits: Logits, alone: Logits, labels: Sequence[int]) -> Logits:
    """Lower the logits of the enforced labels until none is more readable than under the enforced erasures alone.

    For each of `labels`, the logit (so its sigmoid), the log-odds against all others (so its softmax) and the distance
    to the best other label (so whether it is predicted) are at most those of `alone`. Other labels stay as they are.

    Args:
        logits: of one text under all of its erasures, [K] float32.
        alone: of the text under the enforced erasures alone, [K] float32.
        labels: indices of the labels that are enforced concepts.

    Returns:
        [K] float32; `alone` itself where the lowering does not end, which can happen if every label is enforced.
    """
    lowered, bound = logits.astype(np.float64), alone.astype(np.float64)
    for _ in range(MAX_ROUNDS):
        before = lowered.copy()
        for label in labels:
            others, others_alone = np.delete(lowered, label), np.delete(bound, label)
            limits = [bound[label]]
            if others.size:
                limits.append(np.logaddexp.reduce(others) + bound[label] - np.logaddexp.reduce(others_alone))
                limits.append(others.max() + bound[label] - others_alone.max())
            lowered[label] = min(lowered[label], *limits)
        if np.allclose(before, lowered, rtol=0.0, atol=1e-9):
            return lowered.astype(np.float32)
    return alone
