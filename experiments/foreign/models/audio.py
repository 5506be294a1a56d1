"""Nets for sound, of transformers: from waves, from mel spectrograms, and from pictures of them."""

from __future__ import annotations

from collections.abc import Callable

import torch

from .text import net_of
from .wrapped import NUM_SAMPLES, Made, by_keywords

__all__ = ["MODELS"]

_CLASSES = 4


def _wav2vec2() -> Made:
    net = net_of(
        "Wav2Vec2Config",
        "Wav2Vec2ForSequenceClassification",
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=128,
        conv_dim=(32, 32),
        conv_kernel=(10, 3),
        conv_stride=(5, 2),
        num_feat_extract_layers=2,
        num_conv_pos_embeddings=16,
        num_conv_pos_embedding_groups=4,
        classifier_proj_size=32,
        num_labels=_CLASSES,
        mask_time_prob=0.0,
        vocab_size=32,
    )
    batch = {"input_values": torch.randn(NUM_SAMPLES, 1600), "labels": torch.randint(0, _CLASSES, (NUM_SAMPLES,))}
    return by_keywords(net, batch)


def _whisper() -> Made:
    net = net_of(
        "WhisperConfig",
        "WhisperForConditionalGeneration",
        d_model=64,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=128,
        decoder_ffn_dim=128,
        num_mel_bins=16,
        max_source_positions=24,
        max_target_positions=32,
        vocab_size=100,
        decoder_start_token_id=1,
        bos_token_id=1,
        eos_token_id=2,
        begin_suppress_tokens=None,
    )
    batch = {"input_features": torch.randn(NUM_SAMPLES, 16, 48), "labels": torch.randint(3, 100, (NUM_SAMPLES, 8))}
    return by_keywords(net, batch)


def _spectrogram_transformer() -> Made:
    net = net_of(
        "ASTConfig",
        "ASTForAudioClassification",
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=128,
        max_length=32,
        num_mel_bins=32,
        patch_size=8,
        frequency_stride=8,
        time_stride=8,
        num_labels=_CLASSES,
    )
    batch = {"input_values": torch.randn(NUM_SAMPLES, 32, 32), "labels": torch.randint(0, _CLASSES, (NUM_SAMPLES,))}
    return by_keywords(net, batch)


MODELS: dict[str, tuple[str, Callable[[], Made]]] = {
    "wav2vec2": ("transformers", _wav2vec2),
    "Whisper": ("transformers", _whisper),
    "AST": ("transformers", _spectrogram_transformer),
}
