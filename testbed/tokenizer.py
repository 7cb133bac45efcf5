"""The testbed's tokenizer: one token per character, and one per task word (`copy `, with its space).

Printable ASCII and the newline survive a round trip; anything else becomes `<unk>`. A text starts with `<s>`.
"""

import re
from typing import TYPE_CHECKING, Final

from msd.tasks import TASKS

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

PAD, BOS, EOS, UNK = "<pad>", "<s>", "</s>", "<unk>"
SPECIALS: Final = (PAD, BOS, EOS, UNK)
TASK_WORDS: Final = tuple(f"{task} " for task in TASKS)
CHARACTERS: Final = ("\n", *(chr(code) for code in range(32, 127)))

VOCABULARY: Final = {token: index for index, token in enumerate((*SPECIALS, *TASK_WORDS, *CHARACTERS))}
VOCABULARY_SIZE: Final = 128
"""Rows of the embedding: the vocabulary rounded up, so that every matrix is a multiple of 128."""

PAD_ID, BOS_ID, EOS_ID, UNK_ID = (VOCABULARY[token] for token in SPECIALS)
MAX_POSITIONS: Final = 2048

_PATTERN: Final = "|".join((*TASK_WORDS, r"[\s\S]"))
_SPLIT: Final = re.compile(_PATTERN)


def encode(text: str) -> list[int]:
    """Return token ids without `<s>`: what the saved tokenizer says, without its cost per call (training uses it)."""
    return [VOCABULARY.get(piece, UNK_ID) for piece in _SPLIT.findall(text)]


def build() -> "PreTrainedTokenizerFast":
    """Build the tokenizer in the form that transformers saves and vLLM loads."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel(VOCABULARY, unk_token=UNK))
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIALS])
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(_PATTERN), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, BOS_ID)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        unk_token=UNK,
        padding_side="left",
        model_max_length=MAX_POSITIONS,
        clean_up_tokenization_spaces=False,
    )
