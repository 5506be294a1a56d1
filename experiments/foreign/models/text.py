"""Language models of transformers, peft, x-transformers and sentence-transformers, of about 64 hidden units."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .wrapped import NUM_SAMPLES, Made, by_keywords

__all__ = ["MODELS"]

_VOCAB = 100
_CLASSES = 4
_LENGTH = 16
_TEXT = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": _VOCAB}
_BERT = _TEXT | {"intermediate_size": 128, "max_position_embeddings": 64, "num_labels": _CLASSES}
_LM = _TEXT | {"intermediate_size": 128, "num_key_value_heads": 2, "max_position_embeddings": 64, "head_dim": 16}


def tokens(num: int = NUM_SAMPLES) -> dict[str, Tensor]:
    """Token ids with a mask of what is padding, and a class for each text."""
    mask = torch.ones(num, _LENGTH, dtype=torch.long)
    mask[0, _LENGTH - 3 :] = 0
    return {
        "input_ids": torch.randint(3, _VOCAB, (num, _LENGTH)),
        "attention_mask": mask,
        "labels": torch.randint(0, _CLASSES, (num,)),
    }


def next_tokens(num: int = NUM_SAMPLES) -> dict[str, Tensor]:
    """Token ids that are their own labels."""
    ids = torch.randint(3, _VOCAB, (num, _LENGTH))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}


def net_of(config: str, model: str, **fields: Any) -> nn.Module:
    """A net of transformers by the names of its configuration and class."""
    import transformers

    made = getattr(transformers, config)(**fields)
    made.pad_token_id = 0
    return getattr(transformers, model)(made)


def _of(config: str, model: str, batch: Any, **fields: Any) -> Made:
    return by_keywords(net_of(config, model, **fields), batch())


def _lora() -> Made:
    import peft

    net = net_of("BertConfig", "BertForSequenceClassification", **_BERT)
    config = peft.LoraConfig(r=4, target_modules=["query", "value"], task_type="SEQ_CLS", init_lora_weights=False)
    return by_keywords(peft.get_peft_model(net, config), tokens())


def _x_transformer(**fields: Any) -> Made:
    import x_transformers

    layers = x_transformers.Decoder(dim=64, depth=2, heads=4, attn_dim_head=16, **fields)
    net = x_transformers.TransformerWrapper(num_tokens=_VOCAB, max_seq_len=32, attn_layers=layers)
    wrapped = x_transformers.AutoregressiveWrapper(net)
    return by_keywords(wrapped, {"x": torch.randint(3, _VOCAB, (NUM_SAMPLES, _LENGTH))})


class _Sentences(nn.Module):
    """Two sentences and how alike they are, as sentence-transformers trains them."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, first: Tensor, second: Tensor, alike: Tensor) -> Tensor:
        texts = ({"input_ids": ids, "attention_mask": torch.ones_like(ids)} for ids in (first, second))
        a, b = (self.net(text)["sentence_embedding"] for text in texts)
        return torch.cosine_similarity(a, b) - alike


def _sentences() -> Made:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.models import Pooling

    class Bert(nn.Module):
        """MiniLM's shape: as BERT, but narrow."""

        def __init__(self) -> None:
            super().__init__()
            self.auto_model = net_of("BertConfig", "BertModel", **_BERT)

        def forward(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
            found = self.auto_model(features["input_ids"], features["attention_mask"]).last_hidden_state
            return features | {"token_embeddings": found}

    net = SentenceTransformer(modules=[Bert(), Pooling(64)], device="cpu")
    ids = torch.randint(3, _VOCAB, (2, NUM_SAMPLES, _LENGTH))
    return by_keywords(_Sentences(net), {"first": ids[0], "second": ids[1], "alike": torch.rand(NUM_SAMPLES)})


_CLASSIFY = {"batch": tokens}
_PREDICT = {"batch": next_tokens}
_T5 = {"d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4, "vocab_size": _VOCAB}

MODELS: dict[str, tuple[str, Callable[[], Made]]] = {
    "BERT": (
        "transformers",
        partial(_of, "BertConfig", "BertForSequenceClassification", **_CLASSIFY, **_BERT),
    ),
    "DistilBERT": (
        "transformers",
        partial(
            _of,
            "DistilBertConfig",
            "DistilBertForSequenceClassification",
            **_CLASSIFY,
            dim=64,
            n_layers=2,
            n_heads=4,
            hidden_dim=128,
            vocab_size=_VOCAB,
            num_labels=_CLASSES,
        ),
    ),
    "RoBERTa": (
        "transformers",
        partial(_of, "RobertaConfig", "RobertaForSequenceClassification", **_CLASSIFY, **_BERT),
    ),
    "GPT-2": (
        "transformers",
        partial(
            _of,
            "GPT2Config",
            "GPT2LMHeadModel",
            **_PREDICT,
            n_embd=64,
            n_layer=2,
            n_head=4,
            vocab_size=_VOCAB,
            bos_token_id=1,
            eos_token_id=2,
        ),
    ),
    "Llama": ("transformers", partial(_of, "LlamaConfig", "LlamaForCausalLM", **_PREDICT, **_LM)),
    "Qwen3": ("transformers", partial(_of, "Qwen3Config", "Qwen3ForCausalLM", **_PREDICT, **_LM)),
    "Mixtral": (
        "transformers",
        partial(_of, "MixtralConfig", "MixtralForCausalLM", **_PREDICT, **_LM, num_local_experts=4),
    ),
    "T5": (
        "transformers",
        partial(_of, "T5Config", "T5ForConditionalGeneration", **_PREDICT, **_T5, decoder_start_token_id=0),
    ),
    "Mamba": (
        "transformers",
        partial(
            _of,
            "MambaConfig",
            "MambaForCausalLM",
            **_PREDICT,
            hidden_size=64,
            num_hidden_layers=2,
            state_size=8,
            vocab_size=_VOCAB,
        ),
    ),
    "LoRA BERT": ("peft", _lora),
    "decoder": ("x-transformers", _x_transformer),
    "rotary decoder": (
        "x-transformers",
        partial(_x_transformer, rotary_pos_emb=True, ff_glu=True, use_rmsnorm=True, attn_kv_heads=2),
    ),
    "MiniLM sentences": ("sentence-transformers", _sentences),
}
