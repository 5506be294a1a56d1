"""What names of metrics say, as people and torchmetrics write them."""

from __future__ import annotations

import importlib
import inspect

import pytest
import torchmetrics

from lightning_compress.metrics import direction, is_share, more_is_better, pick_metric

MORE = """
    acc val_acc val/accuracy valAcc val_top1 val/top5_acc val/terrain_acc val_f1 F1Score f1score val/macro_f1
    val_FBetaScore val/precision val_per_class_recall val/auroc val/ROC_AUC val_auc val/mAP val/mAP_50 map50 mAP50-95
    val/mIoU val/mean_iou valIoU Jaccard val/dice val/Dice_score val/psnr val/PSNR val/ssim val/MS-SSIM val/bleu BLEU4
    rouge1_fmeasure val/ROUGE-L chrF val/R2 R2Score val/r_squared explained_variance val/pearson_corr SpearmanCorrCoef
    val/kappa val_mcc val/delta1 val/hit_rate Hits@10 ndcg@10 val_MRR recall@5 val/exact_match val_si_sdr val_pesq
    val/mos val/true_positive_rate negative_predictive_value log_likelihood val/elbo val/reward success_rate
    val/overridden_score VAL_ACC val_acc/dataloader_idx_0 val/cosine_similarity CLIPScore
"""
LESS = """
    loss val_loss val/loss valLoss ValLoss VAL_LOSS avg_val_loss val_loss/dataloader_idx_1 loss_epoch dice_loss IoULoss
    accuracy_loss log_loss val/error top1_err error_rate val/word_error_rate mean_squared_error val_mse val/RMSE rmse
    val_mae MAPE smape val/perplexity val/ppl val_nll negative_log_likelihood val/ce val/cross_entropy val/kl
    KLDivergence val/wer val_cer val/eer val/ter val/fid val/FID val/lpips val/ece val/brier_score val/crps val/hamming
    val/bpd bits_per_dim val/epe val/abs_rel mpjpe minADE val/hausdorff_distance accuracy_drop false_positive_rate FPR
"""
UNKNOWN = """
    val/lossless_ratio val/terrain_height override glossary val/classes val/lr val/entropy val_per closs delta_t
    neg_mean_squared_error negative_loss acc_minus_fid fid_per_acc x "" val/43 time meaning maps_seen
"""


@pytest.mark.parametrize(
    ("names", "expected"), [(MORE, "max"), (LESS, "min"), (UNKNOWN, None)], ids=["more", "less", "unknown"]
)
def test_whole_words_tell_which_way_is_better(names: str, expected: str | None) -> None:
    wrong = [name for name in names.split() if direction(name) != expected]
    assert not wrong
    assert all(more_is_better(name) is (expected != "min") for name in names.split())


# Of these torchmetrics says the opposite of what its own documentation does.
_WRONG = {"WordInfoPreserved", "DaviesBouldinScore"}


def test_nothing_contradicts_torchmetrics_and_nearly_all_of_it_is_known() -> None:
    parts = "audio classification clustering detection image nominal regression retrieval segmentation text"
    modules = [importlib.import_module(f"torchmetrics.{part}") for part in parts.split()]
    classes = {n: c for module in modules for n, c in inspect.getmembers(module, inspect.isclass)}
    ways = {
        name: "max" if kind.higher_is_better else "min"
        for name, kind in classes.items()
        if issubclass(kind, torchmetrics.Metric) and isinstance(getattr(kind, "higher_is_better", None), bool)
    }
    assert len(ways) > 100
    told = {name: direction(name) for name in ways}
    assert {name for name in ways if told[name] not in (ways[name], None)} <= _WRONG
    assert sum(way is None for way in told.values()) < 0.1 * len(ways)


def test_a_share_is_what_lies_between_0_and_1() -> None:
    assert all(map(is_share, ("val_acc", "val/mIoU", "F1Score", "val/auroc", "mAP50", "true_positive_rate")))
    assert not any(map(is_share, ("val_loss", "val_psnr", "acc_loss", "val/bleu", "error_rate", "x")))


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["train_acc", "val_loss"], "val_loss"),
        (["train/acc", "val/loss", "val/dice"], "val/dice"),
        (["val/loss", "val/mIoU"], "val/mIoU"),
        (["val/loss", "val/wer"], "val/wer"),
        (["val/space_loss", "val/mAP"], "val/mAP"),
        (["val/height", "val/loss"], "val/loss"),
        (["train_acc", "acc", "loss"], "acc"),
        (["train_loss", "train_acc"], "train_acc"),
        (["valuation_acc", "validation_loss"], "validation_loss"),
        (["val_b_acc", "val_a_acc"], "val_b_acc"),
        (["compress/sparsity"], None),
        ([], None),
    ],
)
def test_validation_is_shown_before_training_and_an_accuracy_before_a_loss(
    names: list[str], expected: str | None
) -> None:
    assert pick_metric(names) == expected
