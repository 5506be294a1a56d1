"""What a metric's name says: which way is better, and which of several to show."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Literal, TypeAlias

__all__ = ["MODES", "Mode", "direction", "is_of_training", "is_share", "more_is_better", "pick_metric"]

Mode: TypeAlias = Literal["max", "min"]
"""Which way is better: higher, or lower."""

MODES: tuple[Mode | None, ...] = ("max", "min", None)
"""What is accepted as ``mode``."""


def _terms_of(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Words, and terms of several words written as one. What a term says goes before what its words say.
_LOSSES = _terms_of("loss losses nll ce bce xent crossentropy kl kld negativeloglikelihood")
_SHARES = _terms_of(
    """
    acc accuracy accuracies top precision recall specificity f1 f1score f2 fbeta fscore fmeasure dice iou miou jaccard
    auc auroc rocauc auprc prauc averageprecision ap map hitrate hits exactmatch truepositive truenegative tpr tnr
    predictivevalue negativepredictivevalue ppv npv success winrate ndcg mrr
    """
)
_MORE = _SHARES | _terms_of(
    """
    kappa mcc matthews r2 rsquared explainedvariance corr correlation pearson spearman kendall pcc srcc plcc ccc
    concordance cindex similarity psnr ssim msssim uqi qnr vif pesq stoi estoi mos utmos dnsmos snr sdr sisnr sisdr
    signalnoise signaldistortionratio bleu rouge meteor chrf cider bleurt squad panoptic pq mota hota idf1 nds pck
    delta1 delta2 delta3 inceptionscore mutualinfo nmi ami ari rand dcg reward rewards elbo loglikelihood likelihood wip
    calinski dunn fowlkes homogeneity completeness infopreserved vmeasure quality criticalsuccess
    """
)
_LESS = _LOSSES | _terms_of(
    """
    mse rmse nrmse mae mape smape wmape msle rmsle wape mase perplexity ppl bpd bpc bpb bpp bitsper wer cer mer ter wil
    der eer fid kid fvd mmd lpips dists ece brier crps rankedprobability hamming hausdorff divergence deviance epe ade
    fde mpjpe nme mcd ergas silog absrel sqrel aic bic fpr fnr fdr falsepositive falsenegative falsealarm fallout
    infolost bouldin texturesimilarity totalvariation anglemapper editrate fairness
    """
)
# These say what becomes of the rest: a dice loss is a loss, the error of a similarity an error.
_HEADS = _terms_of("loss losses error errors err errs distance distances drop gap regret penalty misses")
_NEGATIONS = _terms_of("neg negative minus inverse not non")


def direction(name: str) -> Mode | None:
    """Which way a metric is better, by the whole words of its name; None where they do not tell, or contradict.

    Args:
        name: As it is logged. Words end at whatever is not a letter, in camelCase at the next capital, and behind
            digits, which are read where they say something (F1, R2) and left out where they do not (mAP50).

    Example:
        >>> [direction(n) for n in ("val/loss", "val_F1Score", "test/error_rate", "dice_loss", "val/lossless_ratio")]
        ['min', 'max', 'min', 'min', None]
    """
    terms = _terms(name)
    if _NEGATIONS & set(terms):
        return None
    if _HEADS & set(terms):
        return "min"
    says: set[Mode] = set()
    if _MORE & set(terms):
        says.add("max")
    if _LESS & set(terms):
        says.add("min")
    if not says and "score" in terms:
        return "max"
    return says.pop() if len(says) == 1 else None


def more_is_better(name: str) -> bool:
    """Whether a higher value is better, by the metric's name; also where the name does not tell.

    Example:
        >>> more_is_better("val_acc"), more_is_better("val/wer"), more_is_better("val/terrain_height")
        (True, False, True)
    """
    return direction(name) != "min"


def is_share(name: str) -> bool:
    """Whether a metric lies in 0..1 by its name, as an accuracy does; or in 0..100, logged in percent.

    Example:
        >>> is_share("val_acc"), is_share("val_psnr"), is_share("acc_loss")
        (True, False, False)
    """
    return direction(name) == "max" and bool(_SHARES & set(_terms(name)))


def is_of_training(name: str) -> bool:
    """Whether it is training that logs a metric, by its name.

    Example:
        >>> is_of_training("train/acc"), is_of_training("val_acc"), is_of_training("restrained_acc")
        (True, False, False)
    """
    return _stage(name) == 2


def pick_metric(names: Iterable[str]) -> str | None:
    """The metric to show when none is named.

    One of validation goes before one whose name does not tell, and that before one of training; among those an accuracy
    or the like before an error, that before a loss, and what says nothing comes last.

    Example:
        >>> pick_metric(["train_acc", "val_loss"]), pick_metric(["val/loss", "val/wer"])
        ('val_loss', 'val/wer')
    """
    own = [name for name in names if not name.startswith("compress/")]
    # min takes the first of several that are equal
    return min(own, key=lambda name: (_stage(name), _kind(name)), default=None)


def _stage(name: str) -> int:
    words = set(_words(name))
    if words & {"val", "valid", "validation", "dev", "eval"}:
        return 0
    return 2 if words & {"train", "training"} else 1


def _kind(name: str) -> int:
    way = direction(name)
    if way is None:
        return 3
    if way == "max":
        return 0
    return 2 if _LOSSES & set(_terms(name)) else 1


def _terms(name: str) -> list[str]:
    """The words of a name; words in a row that are a term are one, the longest term first."""
    words = _words(name)
    known = _MORE | _LESS
    terms = []
    while words:
        length = next((n for n in (3, 2) if "".join(words[:n]) in known), 1)
        term = "".join(words[:length])
        terms.append(term if term in known else term.rstrip("0123456789"))
        words = words[length:]
    return terms


def _words(name: str) -> list[str]:
    # The one usual capital inside of a word.
    found = re.findall(r"[A-Z]+(?![a-z])\d*|[A-Z]?[a-z]+\d*", name.replace("IoU", "Iou"))
    return [word.lower() for word in found]
