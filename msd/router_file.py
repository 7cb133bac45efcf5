"""The file of a trained router: plain arrays that `msd train-router` writes and the policy `learned` runs.

A router scores every mode for a request from features that are known before its first token; the highest score is the
best. A score is `base`, plus `weights` times features, plus the leaves that its trees end in. Modes are matched by
name, else by what they are.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Annotated, Literal

import msgspec
from msgspec import Meta, Struct, structs

from msd.config import Config
from msd.domain import Precision, Speculation
from msd.errors import ConfigError
from msd.files import write_whole

SCHEMA = 1
Kind = Literal["logistic", "tree", "forest", "boosting"]
KINDS: tuple[Kind, ...] = ("logistic", "tree", "forest", "boosting")
MAX_DEPTH = 32
Number = Annotated[float, Meta(ge=-1e9, le=1e9)]


class Tree(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One tree as parallel arrays, the root first. A leaf has feature -1; others go left if feature <= threshold."""

    feature: tuple[int, ...]
    threshold: tuple[Number, ...]
    left: tuple[int, ...]
    right: tuple[int, ...]
    value: tuple[Number, ...]


class ModeScorer(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How one mode is scored, and what that mode is."""

    mode: str
    precision: Precision
    speculation: Speculation
    prefix_caching: bool
    base: Number
    weights: tuple[Number, ...] = ()
    trees: tuple[Tree, ...] = ()


class HeldOut(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How routers of this kind did on what they were not trained on (`unit`: families, or decisions)."""

    unit: str
    num_judged: int
    speedup: float
    energy_ratio: float | None
    regret: float
    oracle_match: float
    num_violations: int


class Router(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The whole file."""

    schema: int
    kind: Kind
    created: str
    command: str
    versions: dict[str, str]
    source: str
    """What it was trained on, in words."""
    data_hash: str
    num_examples: int
    features: tuple[str, ...]
    modes: tuple[ModeScorer, ...]
    held_out: HeldOut
    checksum: str = ""


def checksum(router: Router) -> str:
    """Hash of everything else in the file."""
    bare = structs.replace(router, checksum="")
    return hashlib.blake2b(msgspec.json.encode(bare, order="sorted"), digest_size=16).hexdigest()


def write(file: Path, router: Router) -> None:
    """Write the router with its checksum, whole or not at all. Raises ConfigError."""
    signed = structs.replace(router, checksum=checksum(router))
    write_whole(file, msgspec.json.format(msgspec.json.encode(signed), indent=1) + b"\n", "router")


def load(file: Path) -> Router:
    """Read a router. Raises ConfigError: missing, not one, of another schema, damaged, or with broken trees."""
    again = "`msd train-router` writes one"
    try:
        router = msgspec.json.decode(file.read_bytes(), type=Router)
    except OSError as error:
        raise ConfigError(f"policy.learned.file: {file}: {error.strerror}", remedy=again) from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"policy.learned.file: {file} is no router: {error}", remedy=again) from error
    if router.schema != SCHEMA:
        raise ConfigError(f"policy.learned.file: {file} has schema {router.schema}, not {SCHEMA}", remedy=again)
    if router.checksum != checksum(router):
        raise ConfigError(f"policy.learned.file: {file} is damaged: its checksum does not match", remedy=again)
    for scorer in router.modes:
        if fault := _fault(scorer, len(router.features)):
            raise ConfigError(f"policy.learned.file: {file}: mode {scorer.mode}: {fault}", remedy=again)
    return router


def anchored(config: Config, base_dir: Path) -> Config:
    """`config` with the path of its router counted from `base_dir`, the folder of the configuration file."""
    learned = config.policy.learned
    if not learned.file:
        return config
    learned = structs.replace(learned, file=str(base_dir / learned.file))
    return structs.replace(config, policy=structs.replace(config.policy, learned=learned))


def _fault(scorer: ModeScorer, num_features: int) -> str:
    if len(scorer.weights) not in (0, num_features):
        return f"{len(scorer.weights)} weights for {num_features} features"
    for tree in scorer.trees:
        size = len(tree.feature)
        if not size or {len(tree.threshold), len(tree.left), len(tree.right), len(tree.value)} != {size}:
            return "a tree's arrays differ in length"
        depths = [0] + [-1] * (size - 1)
        for node, feature in enumerate(tree.feature):
            if feature < 0:
                continue
            children = (tree.left[node], tree.right[node])
            # Children stand after their parent: so every path ends.
            if feature >= num_features or not all(node < child < size for child in children):
                return "a tree's node points nowhere"
            for child in children:
                depths[child] = depths[node] + 1
        if max(depths) > MAX_DEPTH:
            return f"a tree is deeper than {MAX_DEPTH}"
    return ""
