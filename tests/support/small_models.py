"""Where the small real model is; tiny ones made on the fly: a mixture of experts, embedders."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

from service.models import locate

SMALL = "smollm2-135m-instruct"


def small_model() -> Path:
    """The folder of SmolLM2-135M-Instruct; the tests with real engines can't do without."""
    folder = locate(SMALL, root=None)
    assert folder is not None, f"the tests with real engines need: coe models pull {SMALL}"
    return folder


def tiny_moe(folder: Path) -> Path:
    """A Qwen2-MoE of some megabytes with random weights, and SmolLM2's tokenizer.

    Sizes are multiples of 32: the CPU's kernels for FFN experts need that.
    """
    import torch
    from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM

    small = small_model()
    vocabulary = json.loads((small / "config.json").read_text())["vocab_size"]
    torch.manual_seed(0)
    config = Qwen2MoeConfig(
        vocab_size=vocabulary,
        hidden_size=64,
        intermediate_size=128,
        moe_intermediate_size=64,
        shared_expert_intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_experts=4,
        num_experts_per_tok=2,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        eos_token_id=2,
        bos_token_id=1,
    )
    Qwen2MoeForCausalLM(config).to(torch.float32).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        if (small / name).exists():
            shutil.copy(small / name, folder / name)
    assert os.listdir(folder)
    return folder


def tiny_embedder(folder: Path, kind: str) -> Path:
    """A model of some megabytes that embeds, with random weights and SmolLM2's tokenizer.

    `kind`: bert, an encoder whose vector is that of its first token; qwen2, a decoder that could
    make text, whose vector is that of its last token.
    """
    import torch
    from transformers import BertConfig, BertModel, PretrainedConfig, Qwen2Config, Qwen2ForCausalLM

    small = small_model()
    sizes = {
        "vocab_size": json.loads((small / "config.json").read_text())["vocab_size"],
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 512,
    }
    torch.manual_seed(0)
    if kind == "bert":
        config: PretrainedConfig = BertConfig(**sizes)
        model = BertModel(config, add_pooling_layer=False)
    else:
        config = Qwen2Config(**sizes, num_key_value_heads=1, tie_word_embeddings=True)
        model = Qwen2ForCausalLM(config)
    with torch.no_grad():
        for weight in model.parameters():
            # As they are made, layers of that size say nearly the same of every text.
            weight.normal_(0.0, 0.3)
    model.to(torch.float32).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(small / name, folder / name)
    return folder
