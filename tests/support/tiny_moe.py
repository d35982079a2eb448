"""Tiny random mixtures of experts of several families, with a tokenizer of bytes, as folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

WORDS = 258
LAYERS, EXPERTS, TOP_K, HIDDEN, INNER = 2, 8, 2, 32, 16

_COMMON: dict[str, Any] = {
    "vocab_size": WORDS,
    "hidden_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "num_experts_per_tok": TOP_K,
    "max_position_embeddings": 128,
    "bos_token_id": 256,
    "eos_token_id": 257,
    "pad_token_id": 257,
}


def tiny_moe(kind: str, seed: int = 0) -> Any:
    """A random causal language model of transformers, in float32."""
    import torch
    from transformers import (
        GraniteMoeConfig,
        GraniteMoeForCausalLM,
        MixtralConfig,
        MixtralForCausalLM,
        OlmoeConfig,
        OlmoeForCausalLM,
        PhimoeConfig,
        PhimoeForCausalLM,
        Qwen2MoeConfig,
        Qwen2MoeForCausalLM,
        Qwen3MoeConfig,
        Qwen3MoeForCausalLM,
    )

    local = {"num_local_experts": EXPERTS, "intermediate_size": INNER}
    qwen = {"num_experts": EXPERTS, "moe_intermediate_size": INNER, "intermediate_size": 48}
    made = {
        "mixtral": (MixtralConfig, MixtralForCausalLM, local),
        "olmoe": (OlmoeConfig, OlmoeForCausalLM, {**local, "num_experts": EXPERTS}),
        "granitemoe": (
            GraniteMoeConfig,
            GraniteMoeForCausalLM,
            {**local, "residual_multiplier": 0.5, "logits_scaling": 2.0},
        ),
        "qwen2_moe": (
            Qwen2MoeConfig,
            Qwen2MoeForCausalLM,
            {**qwen, "shared_expert_intermediate_size": 24},
        ),
        "qwen3_moe": (
            Qwen3MoeConfig,
            Qwen3MoeForCausalLM,
            {**qwen, "head_dim": 16, "norm_topk_prob": True},
        ),
        "phimoe": (PhimoeConfig, PhimoeForCausalLM, local),
    }[kind]
    config_of, model_of, own = made
    torch.manual_seed(seed)
    config = config_of(**{**_COMMON, **own})
    model = model_of(config).float().eval()
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in model.named_parameters():
        # As they come they are so small that all experts would do nearly nothing.
        if tensor.dim() > 1:
            spread = tensor.shape[-1] ** -0.5 * (3.0 if "gate.weight" in name else 1.0)
            tensor.data = torch.randn(tensor.shape, generator=generator) * spread
    return model


def save(model: Any, folder: Path) -> Path:
    """The model as a folder, with a tokenizer whose tokens are bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: i for i, letter in enumerate(letters)} | {"<s>": 256, "</s>": 257}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    model.save_pretrained(folder)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>"
    ).save_pretrained(folder)
    return folder
