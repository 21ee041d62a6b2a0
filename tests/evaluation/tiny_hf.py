"""Tiny random models of `transformers` with a small tokenizer, in folders as they are published."""

from __future__ import annotations

from pathlib import Path

import tokenizers
import torch
from tokenizers import decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedTokenizerFast,
)

from stlm.corpora.synthetic import corpus

VOCABULARY = 400
CONTEXT = 128
STORIES = corpus(2, 60)["text"]
SIZE = {"vocab_size": VOCABULARY, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
LLAMA = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": CONTEXT,
}
MODELS = {
    "gpt2": (GPT2LMHeadModel, GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=CONTEXT, **SIZE)),
    "llama": (LlamaForCausalLM, LlamaConfig(**LLAMA, **SIZE)),
    "opt": (
        OPTForCausalLM,
        OPTConfig(
            hidden_size=32,
            ffn_dim=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            word_embed_proj_dim=32,
            max_position_embeddings=CONTEXT,
            **SIZE,
        ),
    ),
    "cohere": (CohereForCausalLM, CohereConfig(logit_scale=0.25, **LLAMA, **SIZE)),
    "mistral": (MistralForCausalLM, MistralConfig(sliding_window=16, **LLAMA, **SIZE)),
}


def tokenizer(adds_bos: bool) -> PreTrainedTokenizerFast:
    """A small byte-level vocabulary: <s> is 0, </s> is 1."""
    bpe = tokenizers.Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - 20,  # fewer than the model's, as where a vocabulary is padded
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(STORIES, trainer)
    if adds_bos:
        bpe.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>")


def save(folder: Path, name: str, adds_bos: bool = False) -> Path:
    kind, config = MODELS[name]
    torch.manual_seed(4)
    model = kind(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(6 if parameter.dim() == 2 else 1)
    model.save_pretrained(folder)
    tokenizer(adds_bos).save_pretrained(folder)
    return folder
