"""Tokenizers: loading one, checking it against the model, and training a small one."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from jinja2 import TemplateSyntaxError
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast
from transformers.utils.chat_template_utils import _compile_jinja_template

from tptrain.config.chat_templates import asked_tokens, chosen_template
from tptrain.config.recipe_checks import SMALLEST_TRAINED_VOCAB
from tptrain.config.schema import ModelSection
from tptrain.errors import Problem, refuse
from tptrain.hf_files import CONFIG_FILE, TOKENIZER_FILES, local_folder, require_tokenizer

BOS, EOS, PAD = "<|bos|>", "<|eos|>", "<|pad|>"

# Renders a chat as the gsm8k preset renders a record, so that a model trained on that preset can chat.
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'user' %}Question: {{ message['content'] }}\nAnswer:"
    "{% elif message['role'] == 'assistant' %} {{ message['content'] }}{{ eos_token }}"
    "{% else %}{{ message['content'] }}\n{% endif %}{% endfor %}"
)


def load_tokenizer(section: ModelSection) -> PreTrainedTokenizerFast:
    """The tokenizer that `model.tokenizer` names: a folder, a hub id, or the checkpoint's own.

    It has the tokens and the chat template that the section adds to it. Raises ProblemsError when it cannot
    be found or read, or cannot map tokens to characters ("train" is not loaded but made, by
    `make_tokenizer`).
    """
    from transformers import AutoTokenizer  # imports torch, which making a tokenizer does without

    assert section.tokenizer != "train", "a tokenizer to be trained cannot be loaded"
    setting, source = "model.tokenizer", section.tokenizer
    if source == "pretrained":
        if section.pretrained is None:
            fix = '"train", or the folder or hub id of a tokenizer'
            raise refuse(setting, source, "needs a checkpoint to take it from", "model.pretrained=none", fix)
        setting, source = "model.pretrained", section.pretrained
    rule = "must hold a tokenizer"
    fix = "model.tokenizer=FOLDER with tokenizer.json and tokenizer_config.json"
    # First of all without code of its own: transformers would ask whether to run it.
    folder = local_folder(_tokenizer_folder(source), setting, (*TOKENIZER_FILES, CONFIG_FILE))
    require_tokenizer(folder, setting)
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder))
    except Exception as error:  # the tokenizers library raises Exception itself for a broken tokenizer.json
        other = f"transformers: {type(error).__name__}: {str(error).strip()}".splitlines()[0]
        raise refuse(setting, source, rule, other, fix) from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        rule = "must be a fast tokenizer, which knows the characters of each token"
        raise refuse(setting, source, rule, f"it loads as {type(tokenizer).__name__}", fix)
    return _completed(tokenizer, section)


def make_tokenizer(section: ModelSection, texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """The tokenizer of a new model, trained on texts, with what the section adds; all within `vocab_size`."""
    made = train_tokenizer(texts, vocab_size - len(asked_tokens(section)))
    return _completed(made, section)


def _completed(tokenizer: PreTrainedTokenizerFast, section: ModelSection) -> PreTrainedTokenizerFast:
    """The tokenizer with the tokens it lacks and the chat template that the section chooses."""
    known = {token.content for token in tokenizer.added_tokens_decoder.values()}
    # Cut out of a text before all else, as they are written; a piece of the vocabulary keeps its id.
    lacking = [token for token in asked_tokens(section) if token not in known]
    tokenizer.add_tokens(
        [AddedToken(token, special=True, normalized=False) for token in lacking], special_tokens=True
    )
    template = chosen_template(section)
    if template is not None:
        _check_template(template.text, section.chat_template)
        tokenizer.chat_template = template.text
    return tokenizer


def _check_template(text: str, chosen: str) -> None:
    try:
        _compile_jinja_template(text)  # with the blocks and functions that transformers gives templates
    except TemplateSyntaxError as error:
        rule, other = "must be a Jinja template", f"line {error.lineno}: {error.message}"
        raise refuse("model.chat_template", chosen, rule, other, "a template that compiles") from error


def _tokenizer_folder(source: str) -> str | Path:
    """A step of a run, RUN/checkpoints/STEP, has its tokenizer in RUN/assets; anything else has it inside."""
    folder = Path(source).expanduser()
    if not folder.is_dir():
        return source
    assets = folder.parent.parent / "assets"
    return assets if folder.parent.name == "checkpoints" and assets.is_dir() else folder


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE with every digit a token by itself, BOS in front of each text, and a chat template.

    Few texts yield fewer than `vocab_size` tokens: the tokenizer is then smaller than the model's vocabulary,
    which does no harm. The same texts in the same order give the same tokenizer.
    """
    if vocab_size < SMALLEST_TRAINED_VOCAB:
        other = f"256 bytes and 3 special tokens: {SMALLEST_TRAINED_VOCAB}"
        rule = "is too small to train a tokenizer for"
        raise refuse("model.config.vocab_size", vocab_size, rule, other, f"{SMALLEST_TRAINED_VOCAB} or more")
    bpe = Tokenizer(models.BPE())
    digits = pre_tokenizers.Split(Regex(r"\p{N}"), "isolated")
    bpe.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BOS, EOS, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    bpe.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, bpe.token_to_id(BOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def check_tokenizer(
    tokenizer: PreTrainedTokenizerFast, vocab_size: int, setting: str = "model.tokenizer"
) -> list[Problem]:
    """What keeps a tokenizer from serving a model of `vocab_size` embeddings; a smaller tokenizer is fine."""
    problems = []
    name = tokenizer.name_or_path or "train"
    token, largest = max(tokenizer.get_vocab().items(), key=lambda item: item[1])
    if largest >= vocab_size:
        other = f"vocab_size={vocab_size}, the id of {token!r} is {largest}"
        fix = f"the model's own tokenizer, or model.config.vocab_size={largest + 1} for a new model"
        problems.append(Problem(setting, name, "must have no id beyond the model's vocabulary", other, fix))
    if tokenizer.eos_token_id is None:
        rule = "must have an end-of-sequence token, or the model never learns to stop"
        fix = 'a tokenizer whose tokenizer_config.json has an "eos_token"'
        problems.append(Problem(setting, name, rule, "its eos_token is none", fix))
    return problems


def padding_id(tokenizer: PreTrainedTokenizerFast) -> int:
    """The id that fills rows up: the pad token's, else EOS's.

    Which one does not matter: padded positions are masked in attention and never counted in the loss.
    """
    pad = tokenizer.pad_token_id
    return int(tokenizer.eos_token_id if pad is None else pad)
