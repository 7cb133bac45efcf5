"""config.toml is the documented example: it loads, every key in it is real, and every key of the schema is in it."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import msgspec
import pytest

from msd.config import Config, load, parse
from msd.config.docs import reference_page
from msd.config.read import annotations_of, sections

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "config.toml"
SETTING = re.compile(r"^#(?=[\[a-z])", re.MULTILINE)


def every_line_taken_up() -> str:
    """The example with the settings that are commented out taken up: `#key`, not `# prose`."""
    return SETTING.sub("", EXAMPLE.read_text(encoding="utf-8"))


def test_example_loads_as_it_stands() -> None:
    config = load(EXAMPLE)
    assert [engine.kind for engine in config.engine] == ["vllm", "vllm"]


def test_every_line_that_is_commented_out_is_a_real_setting() -> None:
    # Not the files: the INT8 weights are made by `make testbed`.
    config = parse(every_line_taken_up(), file="config.toml", base_dir=ROOT, look_at_files=False)
    assert [engine.name for engine in config.engine] == ["bf16", "ngram", "int8", "simulated"]


def test_every_table_and_key_of_the_schema_stands_in_the_example() -> None:
    document = tomllib.loads(every_line_taken_up())
    for header, struct, _ in sections():
        tables: list[object] = [document]
        for part in header.split("."):
            found = [table[part] for table in tables if isinstance(table, dict) and part in table]
            tables = [entry for table in found for entry in (table if isinstance(table, list) else [table])]
        keys = {key for table in tables if isinstance(table, dict) for key in table}
        assert set(annotations_of(struct)) <= keys, header


def test_what_the_example_calls_a_default_is_one() -> None:
    """Commented-out values equal the schema's defaults, where the comment above does not call them an example."""
    config = parse(every_line_taken_up(), file="config.toml", base_dir=ROOT, look_at_files=False)
    simulated = next(engine for engine in config.engine if engine.name == "simulated")
    # The gate file is not commented out: it is the testbed's.
    own = {"quality": {"gate": config.quality.gate}}
    plain = msgspec.convert({"model": [{"name": "m"}], "engine": [{"name": "a", "model": "m"}], **own}, Config)
    for section in ("daemon", "ingress", "limits", "policy", "quality", "residency", "energy", "telemetry", "journal"):
        assert getattr(config, section) == getattr(plain, section), section
    assert simulated.sim == plain.engine[0].sim


@pytest.mark.parametrize("page", [ROOT / "docs" / "reference" / "config.md"])
def test_reference_page_is_in_step(page: Path) -> None:
    assert page.read_text(encoding="utf-8") == reference_page(), "write it anew with `make docs`"
