"""Small tokenizers, each really trained, that differ in what the render function must get right."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from tptrain.data.tokenizer import train_tokenizer

SPECIALS = ["<s>", "</s>", "<unk>"]


def byte_level_with_bos(texts: Sequence[str]) -> PreTrainedTokenizerFast:
    """Our own: byte-level, BOS in front, as Llama 3's."""
    return train_tokenizer(texts, 600)


def byte_level_without_bos(texts: Sequence[str]) -> PreTrainedTokenizerFast:
    """Byte-level, no BOS, no pad token, spaces left out of a token's characters, as GPT-2's and Qwen's."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.post_processor = processors.ByteLevel(trim_offsets=True)
    _train(bpe, texts, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="</s>")


def byte_level_with_eos(texts: Sequence[str]) -> PreTrainedTokenizerFast:
    """BOS in front and EOS behind, both put there by the tokenizer itself."""
    own = train_tokenizer(texts, 600)
    specials = [(token, own.convert_tokens_to_ids(token)) for token in ("<|bos|>", "<|eos|>")]
    own.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|bos|> $A <|eos|>", pair="<|bos|> $A $B <|eos|>", special_tokens=specials
    )
    return own


def byte_level_with_lines(texts: Sequence[str]) -> PreTrainedTokenizerFast:
    """Byte-level, new lines in a row are a token whatever follows, as Llama 3's and Qwen's."""
    bpe = Tokenizer(models.BPE())
    pieces = Regex(r" ?\p{L}+|\p{N}{1,3}|\s*\n+|[^\s\p{L}\p{N}]+|\s+(?!\S)|\s")
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(pieces, "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    )
    bpe.decoder = decoders.ByteLevel()
    _train(bpe, [*texts, *["a\n\nb"] * 3], initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>")


def sentencepiece_like(texts: Sequence[str]) -> PreTrainedTokenizerFast:
    """Spaces as marks, one in front of the text, unknown characters as bytes, BOS in front, as Llama 2's."""
    bpe = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    bpe.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=True)
    bpe.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    _train(bpe, texts, specials=[*SPECIALS, *(f"<0x{byte:02X}>" for byte in range(256))])
    bpe.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", bpe.token_to_id("<s>"))]
    )
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def across_words(texts: Sequence[str]) -> PreTrainedTokenizerFast:
    """No pre-tokenizer: tokens run across spaces and line ends, also across the end of the prompt."""
    bpe = Tokenizer(models.BPE())
    bpe.normalizer = normalizers.NFC()
    _train(bpe, texts)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="</s>")


EXACT: dict[str, Callable[[Sequence[str]], PreTrainedTokenizerFast]] = {
    "byte level, BOS": byte_level_with_bos,
    "byte level, no BOS": byte_level_without_bos,
    "byte level, EOS appended": byte_level_with_eos,
    "sentencepiece-like": sentencepiece_like,
}


def _train(
    bpe: Tokenizer,
    texts: Sequence[str],
    initial_alphabet: list[str] | None = None,
    specials: list[str] = SPECIALS,
) -> None:
    trainer = trainers.BpeTrainer(
        vocab_size=len(specials) + 400,
        special_tokens=specials,
        initial_alphabet=initial_alphabet or [],
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
