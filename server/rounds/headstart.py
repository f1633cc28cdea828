"""The head that a head start's sums give, in closed form: a classifier by class means, shrunk by what the noise says.

The sums are released, so this costs no privacy. With c_k the noisy count of class k, S_k its noisy sum of features
(each of norm about 1) and mu = sum S / sum c, the part of S_k that tells class k apart is D_k = S_k - c_k mu, without
its part along mu, which all records share and which the noise of the counts enters. Each value of D_k has noise of
deviation s, so that |D_k|² is about c_k² t + d s² with t the mean squared distance of a class from the middle, which is
estimated from all classes together. The classifier is that of Gaussian classes of one spherical covariance (linear
discriminant analysis; Fisher 1936), with means shrunk towards the middle (empirical Bayes; Efron and Morris 1973):

    l_k = t / (t + d s² / c_k²)       weights_k = a √l_k D_k / c_k       bias_k = log(share of k) - a l_k r_k / 2

with r_k the estimated squared distance of class k. l_k itself has the least squared error; its root shrinks rare
classes less, and was better at every noise on generated notes and on MedQuAD. The scale a is such that the own logit of
a class is on average `_LOGIT` times the mean of l_k: noisy means give flat logits, from which training moves on.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from privet.common.masking.noise_shares import deviation_of_sum
from privet.common.masking.vector import COUNT_WEIGHT
from privet.common.study.adapter import Adapter, AdapterSpec, Vector
from privet.common.study.study import Study
from privet.server.rounds.participants import RoundSum

# The mean logit of a class at its own middle, where there is no noise. Chosen on generated notes and MedQuAD.
_LOGIT = 8.0
# Least part of the noise that counts as signal: sums that are noise alone give nearly flat logits.
_FAINT = 0.02


def head_of(spec: AdapterSpec, sums: NDArray[np.float64], deviation: float) -> dict[str, Vector]:
    """Return the values of the head's tensors.

    Args:
        spec: Layout of the adapter.
        sums: The class sums, [classes (width + 1)], in clip norms.
        deviation: Standard deviation of the noise on one value, in clip norms.
    """
    weights, biases = class_means(sums.reshape(spec.class_sums().shape), deviation)
    return {t.name: (weights if len(t.shape) == 2 else biases).astype(np.float32) for t in spec.head()}


def started(study: Study, adapter: Adapter, total: RoundSum) -> Adapter:
    """Return the adapter with the head that the sums of a head start give.

    Raises:
        DivergedError: A value of it is not finite.
    """
    clip_norm = study.privacy.promise.clip_norm if study.private else 1.0
    deviation = deviation_of_sums(study, total) / clip_norm
    with np.errstate(over="ignore", invalid="ignore"):  # what is not finite then is found by the check
        found = adapter.replace(head_of(adapter.spec, total.update / clip_norm, deviation))
    found.check_finite("the head of the head start")
    return found


def deviation_of_sums(study: Study, total: RoundSum) -> float:
    """Return the standard deviation of the noise on one value of a sum over all units; 0 without privacy."""
    return deviation_of_sum(study, len(total.groups[0]["sites"]) if total.groups else 0, len(total.survivors))


def class_means(sums: NDArray[np.float64], deviation: float) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return weights [classes, width] and biases [classes] of the classifier by class means.

    Args:
        sums: For each class the sum of its features, divided by the root of the width, and in the last column its count
            times `COUNT_WEIGHT`; [classes, width + 1].
        deviation: Standard deviation of the noise on one value.
    """
    classes, width = sums.shape[0], sums.shape[1] - 1
    # A count that noise covers is taken as large as its noise, so that rare classes are not made of noise alone.
    counts = np.maximum(sums[:, width] / COUNT_WEIGHT, max(1.0, deviation / COUNT_WEIGHT))
    middle = sums[:, :width].sum(0) / counts.sum()
    apart = sums[:, :width] - np.outer(counts, middle)
    along = middle / max(float(np.linalg.norm(middle)), 1e-12)
    apart -= np.outer(apart @ along, along)
    squares, noise = (apart**2).sum(1), width * deviation**2
    signal = max(float(squares.sum()) - classes * noise, _FAINT * classes * noise, 1e-12)
    distance = signal / float((counts**2).sum())
    shrinkage = distance / (distance + noise / counts**2)
    distances = shrinkage * np.maximum(squares - noise, 0) / counts**2 + (1 - shrinkage) * distance
    # Counts that are noise alone say nothing about how frequent a class is.
    share = counts + deviation / COUNT_WEIGHT
    share /= share.sum()
    root = np.sqrt(shrinkage)
    scale = _LOGIT * float(share @ shrinkage) / max(float(share @ (root * distances)), 1e-12)
    weights = scale * root[:, None] * apart / counts[:, None]
    biases = np.log(share) - weights @ middle - scale * shrinkage * distances / 2
    return weights / width**0.5, biases
