"""Tiny models with random weights and word-level tokenizers, written as any checkpoint is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

WORDS = [f"w{number}" for number in range(40)]
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|> {{ m['role'] }} {{ m['content'] }} <|im_end|> {% endfor %}"
    "{% if add_generation_prompt %}<|im_start|> assistant {% endif %}"
)


def tokenizer(*, chat: bool = False, bos: bool = True, pad: bool = True) -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<s>", "</s>", "<unk>"]
    chat_tokens = ["<|im_start|>", "<|im_end|>"]
    words = [
        *special,
        *chat_tokens,
        "user",
        "assistant",
        "system",
        "a",
        "<",
        "|",
        ">",
        "/",
        "im_end",
        "s",
        *WORDS,
    ]
    vocabulary = {word: index for index, word in enumerate(words)}
    core = Tokenizer(models.WordLevel(vocabulary, "<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    if bos:
        core.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", vocabulary["<s>"])]
        )
    else:
        core.post_processor = processors.TemplateProcessing(
            single="$A </s>", special_tokens=[("</s>", vocabulary["</s>"])]
        )
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    names |= {"pad_token": "<pad>"} if pad else {}
    made = PreTrainedTokenizerFast(tokenizer_object=core, **names)
    if chat:
        made.add_special_tokens({"additional_special_tokens": chat_tokens})
        made.chat_template = CHAT_TEMPLATE
    return made


def save_llama(
    folder: Path, *, chat: bool = False, pad: bool = True, positions: int = 64, **config: Any
) -> Path:
    from transformers import LlamaConfig, LlamaForCausalLM

    made = tokenizer(chat=chat, pad=pad)
    return _save(
        folder,
        made,
        LlamaForCausalLM,
        LlamaConfig(
            vocab_size=len(made),
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=positions,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=0 if pad else None,
            initializer_range=0.5,  # large, so that no two tokens are nearly tied
            **config,
        ),
    )


def save_t5(folder: Path) -> Path:
    from transformers import T5Config, T5ForConditionalGeneration

    made = tokenizer(bos=False)
    config = T5Config(
        vocab_size=len(made),
        d_model=32,
        d_kv=8,
        d_ff=48,
        num_layers=2,
        num_heads=4,
        pad_token_id=0,
        eos_token_id=2,
        decoder_start_token_id=0,
        initializer_factor=3.0,
        tie_word_embeddings=False,  # tied, random weights repeat the start token for ever
    )
    return _save(folder, made, T5ForConditionalGeneration, config)


def save_bart(folder: Path) -> Path:
    from transformers import BartConfig, BartForConditionalGeneration

    made = tokenizer(bos=False)
    config = BartConfig(
        vocab_size=len(made),
        d_model=32,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=48,
        decoder_ffn_dim=48,
        max_position_embeddings=48,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=2,
        forced_eos_token_id=None,
        init_std=0.5,
    )
    return _save(folder, made, BartForConditionalGeneration, config)


def _save(folder: Path, made: Any, kind: Any, config: Any) -> Path:
    import torch

    torch.manual_seed(7)
    kind(config).eval().save_pretrained(folder)
    made.save_pretrained(folder)
    return folder
