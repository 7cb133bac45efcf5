"""Tokenizers without vLLM: the daemon counts prompt tokens once and hands the ids on to the engine."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any
from zlib import crc32

from msd.errors import ConfigError
from msd.wire import ChatMessage

_SYLLABLES = tuple(consonant + vowel for consonant in "bcdfghjklmnprstv" for vowel in "aeio")
SIM_WORDS = tuple(" " + first + second for first in _SYLLABLES for second in _SYLLABLES)
"""The vocabulary of simulated models: 4,096 words of one blank and four letters, so that text can be cut by tokens."""
SIM_WORD_CHARS = 5
_SIM_PIECE = re.compile(r"\s*\S{1,5}|\s+")
MAX_TEMPLATE_BYTES = 256 * 1024
MAX_TOKENIZERS = 128


class SimTokenizer:
    """Tokenizer of a simulated model: pieces of up to five characters, hashed; about as many tokens as English has.

    Decoding gives words of the simulated vocabulary, never the text that was encoded.
    """

    fingerprint = "sim-1"
    vocab_size = len(SIM_WORDS)

    def encode(self, text: str) -> tuple[int, ...]:
        """Token ids of `text`: one per piece, the same on every machine."""
        return tuple([crc32(piece.encode("utf-8", "surrogatepass")) & 4_095 for piece in _SIM_PIECE.findall(text)])

    def encode_chat(self, messages: Sequence[ChatMessage]) -> tuple[int, ...]:
        """Token ids of a conversation, each turn headed by its role."""
        return self.encode("\n".join(f"{message.role}: {message.content}" for message in messages))

    def decode(self, token_ids: Sequence[int]) -> str:
        """Words of the simulated vocabulary, each with a blank in front."""
        return "".join([SIM_WORDS[token_id & 4_095] for token_id in token_ids])


class HfTokenizer:
    """Tokenizer of a Hugging Face folder, from its `tokenizer.json`, as the engine itself would read it."""

    def __init__(self, folder: Path) -> None:
        """Read the folder. Raises ConfigError when there is no usable tokenizer in it."""
        from tokenizers import Tokenizer

        path = folder / "tokenizer.json"
        try:
            data = path.read_bytes()
            self._tokenizer: Any = Tokenizer.from_buffer(data)
        except OSError as error:
            raise ConfigError(
                f"no tokenizer in {folder}: {error}", remedy="name a folder with tokenizer.json"
            ) from error
        except Exception as error:  # the Rust library raises bare Exception for a file that it cannot read
            raise ConfigError(f"{path} is not a tokenizer: {error}") from error
        # A file may carry the truncation or padding of its training; neither belongs into serving.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        # Not the number of ids: a vocabulary may have holes.
        self.vocab_size = 1 + max(self._tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)
        settings = _read_json(folder / "tokenizer_config.json")
        template = _read_template(folder, settings)
        self._special_tokens = _special_tokens(folder, settings)
        self._render = None if template is None else _compile(template, folder)
        digest = hashlib.blake2b(data, digest_size=16)
        digest.update(json.dumps([template, self._special_tokens], sort_keys=True).encode())
        self.fingerprint = digest.hexdigest()

    def encode(self, text: str) -> tuple[int, ...]:
        """Token ids of `text`, with the special tokens that the model expects in front."""
        return tuple(self._tokenizer.encode(text).ids)

    def encode_chat(self, messages: Sequence[ChatMessage]) -> tuple[int, ...]:
        """Token ids of a conversation through the folder's template. Raises ValueError: none, or it refuses these."""
        if self._render is None:
            raise ValueError("this model has no chat template; send `prompt` instead of `messages`")
        # The template writes the special tokens itself.
        return tuple(self._tokenizer.encode(self._render(messages, self._special_tokens), add_special_tokens=False).ids)

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of `token_ids`, special tokens left out."""
        text: str = self._tokenizer.decode(list(token_ids), skip_special_tokens=True)
        return text


@lru_cache(maxsize=MAX_TOKENIZERS)
def load_tokenizer(folder: Path) -> HfTokenizer:
    """The folder's tokenizer, read once per process. Raises ConfigError."""
    return HfTokenizer(folder)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        settings = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error
    if not isinstance(settings, dict):
        raise ConfigError(f"{path} is not an object")
    return settings


def _read_template(folder: Path, settings: dict[str, Any]) -> str | None:
    path = folder / "chat_template.jinja"
    template = settings.get("chat_template")
    if path.is_file():
        template = path.read_text()
    if not isinstance(template, str):
        return None
    if len(template) > MAX_TEMPLATE_BYTES:
        raise ConfigError(f"the chat template in {folder} is longer than {MAX_TEMPLATE_BYTES} bytes")
    return template


def _special_tokens(folder: Path, settings: dict[str, Any]) -> dict[str, str]:
    tokens: dict[str, str] = {}
    for source in (_read_json(folder / "special_tokens_map.json"), settings):
        for name in ("bos_token", "eos_token", "pad_token", "unk_token"):
            value = source.get(name)
            if isinstance(value, dict):
                value = value.get("content")
            if isinstance(value, str):
                tokens[name] = value
    return tokens


def _compile(template: str, folder: Path) -> Callable[[Sequence[ChatMessage], dict[str, str]], str]:
    from jinja2 import TemplateError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def refuse(message: str) -> str:
        raise TemplateError(message)

    # Trimming as transformers does it: templates are written for that.
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.globals["raise_exception"] = refuse
    environment.filters["tojson"] = lambda value, **options: json.dumps(value, ensure_ascii=False, **options)
    try:
        compiled = environment.from_string(template)
    except TemplateError as error:
        raise ConfigError(f"the chat template in {folder} cannot be compiled: {error}") from error

    def render(messages: Sequence[ChatMessage], special_tokens: dict[str, str]) -> str:
        turns = [{"role": message.role, "content": message.content} for message in messages]
        try:
            return compiled.render(messages=turns, add_generation_prompt=True, **special_tokens)
        except TemplateError as error:
            raise ValueError(f"the chat template refuses these messages: {error}") from error

    return render
