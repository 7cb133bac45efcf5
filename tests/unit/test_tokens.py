"""Tokenizers without vLLM: the simulated one and those of Hugging Face folders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from msd.engine.tokens import SIM_WORD_CHARS, SIM_WORDS, HfTokenizer, SimTokenizer, load_tokenizer
from msd.errors import ConfigError
from msd.wire import ChatMessage

CHATML = (
    "{% for message in messages %}<{{ message.role }}>{{ message.content }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def write_folder(folder: Path, *, template: str | None = None, settings: dict[str, Any] | None = None) -> Path:
    """A byte-per-character tokenizer with one special token in front, as a model folder has it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

    vocab = {"<s>": 0, "<unk>": 1} | {chr(code): index for index, code in enumerate(range(32, 127), start=2)}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.add_special_tokens(["<s>"])
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer.enable_truncation(4)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"bos_token": {"content": "<s>"}} if settings is None else settings
    if template is not None:
        settings["chat_template"] = template
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def test_sim_words_have_one_width() -> None:
    assert len(set(SIM_WORDS)) == 4_096
    assert {len(word) for word in SIM_WORDS} == {SIM_WORD_CHARS}


def test_sim_tokenizer_is_the_same_everywhere_and_decodes_to_words() -> None:
    tokenizer = SimTokenizer()
    # Written out: a change of the hash would change every recorded simulation.
    assert tokenizer.encode("hello world, again") == (1670, 715, 878, 2164)
    assert tokenizer.encode("") == ()
    assert len(tokenizer.encode("x" * 4_000)) == 800
    assert tokenizer.decode((0, 1, 4_095)) == " baba babe vovo"


def test_sim_tokenizer_takes_any_text() -> None:
    assert len(SimTokenizer().encode("\ud800 \x00 \U0001f600  ")) >= 1


def test_sim_chat_depends_on_the_role() -> None:
    tokenizer = SimTokenizer()
    user = tokenizer.encode_chat([ChatMessage(role="user", content="hi there")])
    system = tokenizer.encode_chat([ChatMessage(role="system", content="hi there")])
    assert user != system


def test_hf_tokenizer_adds_special_tokens_and_never_truncates(tmp_path: Path) -> None:
    tokenizer = HfTokenizer(write_folder(tmp_path))
    ids = tokenizer.encode("abcdefgh")
    assert ids[0] == 0
    assert len(ids) == 9
    assert tokenizer.decode(ids) == "abcdefgh"


def test_the_vocabulary_is_as_large_as_its_highest_id(tmp_path: Path) -> None:
    assert HfTokenizer(write_folder(tmp_path)).vocab_size == 97
    path = tmp_path / "tokenizer.json"
    tokenizer = json.loads(path.read_bytes())
    tokenizer["model"]["vocab"]["\x7f"] = 500
    path.write_text(json.dumps(tokenizer))
    assert HfTokenizer(tmp_path).vocab_size == 501
    assert SimTokenizer().vocab_size == 4_096


def test_chat_goes_through_the_template_without_doubled_special_tokens(tmp_path: Path) -> None:
    tokenizer = HfTokenizer(write_folder(tmp_path, template="{{ bos_token }}" + CHATML))
    ids = tokenizer.encode_chat([ChatMessage(role="user", content="hi")])
    assert ids.count(0) == 1
    assert tokenizer.decode(ids) == "<user>hi<assistant>"


def test_a_template_file_beside_the_settings_wins(tmp_path: Path) -> None:
    folder = write_folder(tmp_path, template="from settings")
    (folder / "chat_template.jinja").write_text(CHATML)
    tokenizer = HfTokenizer(folder)
    assert tokenizer.decode(tokenizer.encode_chat([ChatMessage(role="a", content="b")])) == "<a>b<assistant>"


def test_chat_without_a_template_is_a_value_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no chat template"):
        HfTokenizer(write_folder(tmp_path)).encode_chat([ChatMessage(role="user", content="hi")])


@pytest.mark.parametrize(
    "template",
    [
        "{{ raise_exception('roles must alternate') }}",
        "{{ messages.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].role.x.y }}",
    ],
)
def test_a_template_that_refuses_or_reaches_out_is_a_value_error(tmp_path: Path, template: str) -> None:
    tokenizer = HfTokenizer(write_folder(tmp_path, template=template))
    with pytest.raises(ValueError, match="refuses these messages"):
        tokenizer.encode_chat([ChatMessage(role="user", content="hi")])


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer.json", "{}"),
        ("tokenizer_config.json", "[]"),
        ("tokenizer_config.json", "{"),
        ("chat_template.jinja", "{% if %}"),
        ("chat_template.jinja", "x" * 300_000),
    ],
)
def test_a_broken_folder_is_a_config_error(tmp_path: Path, name: str, content: str) -> None:
    folder = write_folder(tmp_path)
    (folder / name).write_text(content)
    with pytest.raises(ConfigError):
        HfTokenizer(folder)


def test_a_folder_without_a_tokenizer_is_a_config_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no tokenizer in"):
        HfTokenizer(tmp_path)


def test_fingerprints_tell_tokenizers_apart(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    (tmp_path / "c").mkdir()
    plain = HfTokenizer(write_folder(tmp_path / "a"))
    same = HfTokenizer(write_folder(tmp_path / "b"))
    chat = HfTokenizer(write_folder(tmp_path / "c", template=CHATML))
    assert plain.fingerprint == same.fingerprint
    assert plain.fingerprint != chat.fingerprint


def test_a_folder_is_read_once(tmp_path: Path) -> None:
    folder = write_folder(tmp_path)
    assert load_tokenizer(folder) is load_tokenizer(folder)
