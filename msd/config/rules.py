"""Rules that span fields or look at the disk: what the types of the schema cannot say."""

from __future__ import annotations

import ipaddress
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path as FilePath
from typing import get_args

from msd import gate
from msd.config.positions import Path
from msd.config.presets import PRESETS
from msd.config.problems import ABSENT, close, nearest
from msd.config.schema import POLICY_NAMES, Config, EngineConfig, ZmqIngressConfig
from msd.domain import ServiceClass
from msd.errors import ConfigError

Finding = tuple[Path, object, str]
"""Where, the value (or ABSENT), and what is wrong with it."""

MAX_SOCKET_PATH_BYTES = 107
"""Linux: `sun_path` has 108 bytes with its closing zero; libzmq refuses a longer one at bind."""


def findings(
    config: Config,
    base_dir: FilePath,
    *,
    look_at_files: bool,
    engine_arguments: Collection[str],
    look_at_gate: bool = False,
) -> Iterator[Finding]:
    """Everything that is wrong with `config`, whose relative paths count from `base_dir`.

    `engine_arguments`: names that an engine's `args` may have; empty = they are not looked at.
    """
    yield from _unique("tenant", [tenant.name for tenant in config.tenant])
    yield from _unique("model", [model.name for model in config.model])
    yield from _unique("engine", [engine.name for engine in config.engine])
    yield from _tenants(config)
    yield from _engines(config, engine_arguments)
    yield from _policy(config)
    yield from _quality(config)
    yield from _limits(config)
    yield from _endpoints(config.ingress.zmq)
    yield from _simulated_memory(config)
    yield from _residency(config)
    if look_at_files:
        yield from _files(config, base_dir)
    if look_at_gate:
        yield from _gate(config, base_dir)


def _unique(section: str, names: Sequence[str]) -> Iterator[Finding]:
    for index, name in enumerate(names):
        if name and (first := names.index(name)) != index:
            yield (section, index, "name"), name, f"the name is taken by {section}[{first}]"


def _tenants(config: Config) -> Iterator[Finding]:
    owners: dict[int, str] = {}
    for index, tenant in enumerate(config.tenant):
        for position, uid in enumerate(tenant.uids):
            if (owner := owners.setdefault(uid, tenant.name)) != tenant.name:
                yield ("tenant", index, "uids", position), uid, f"this user id is tenant `{owner}` already"


def _engines(config: Config, engine_arguments: Collection[str]) -> Iterator[Finding]:
    models = {model.name for model in config.model if model.name}
    if not config.engine:
        yield ("engine",), ABSENT, "there is no [[engine]]: nothing could serve a request"
    for index, engine in enumerate(config.engine):
        if engine.model and engine.model not in models:
            yield (
                ("engine", index, "model"),
                engine.model,
                f"no [[model]] has this name; {nearest(engine.model, models)}",
            )
        if engine.preset and engine.preset not in PRESETS:
            message = f"there is no such preset; {nearest(engine.preset, PRESETS)} (`msd modes` lists them)"
            yield ("engine", index, "preset"), engine.preset, message
        elif engine.kind == "vllm":
            yield from _vllm_engine(("engine", index), engine, engine_arguments)
        elif engine.kind == "sim" and engine.sim.max_model_len > engine.sim.kv_capacity_tokens:
            most = engine.sim.kv_capacity_tokens
            message = f"must be at most kv_capacity_tokens ({most:,}), or the longest request could never run"
            yield ("engine", index, "sim", "max_model_len"), engine.sim.max_model_len, message


def _vllm_engine(path: Path, engine: EngineConfig, engine_arguments: Collection[str]) -> Iterator[Finding]:
    preset = PRESETS.get(engine.preset)
    if preset is not None and preset.weights and not engine.weights:
        yield (*path, "weights"), ABSENT, f"preset `{preset.name}` needs {preset.weights} here: the folder of one"
    speculates = bool(engine.args.get("speculative_config"))
    yield from _draft(path, engine)
    if speculates and engine.speculation == "none":
        message = "set speculation too (`ngram` or `draft`): policies go by it"
        yield (*path, "args", "speculative_config"), ABSENT, message
    elif engine.speculation != "none" and not speculates:
        yield (*path, "speculation"), engine.speculation, "args.speculative_config is missing: nothing would speculate"
    for argument, value in engine.args.items():
        if argument in SET_BY_MSD:
            yield (*path, "args", argument), value, f"msd sets this; say {SET_BY_MSD[argument]} instead"
        elif engine_arguments and argument not in engine_arguments:
            meant = close(argument, engine_arguments)
            remedy = f"did you mean `{meant}`?" if meant else "its documentation lists them as engine arguments"
            yield (*path, "args", argument), value, f"the installed vLLM has no such argument; {remedy}"


def _draft(path: Path, engine: EngineConfig) -> Iterator[Finding]:
    """What speculation proposes with is named once, and only where something does."""
    speculative = engine.args.get("speculative_config")
    if not isinstance(speculative, dict) or not speculative:
        if engine.draft:
            yield (*path, "draft"), engine.draft, "nothing would use it: args.speculative_config is missing"
        return
    method = str(speculative.get("method", "draft_model"))
    if engine.draft and "model" in speculative:
        yield (*path, "draft"), engine.draft, "args.speculative_config.model names one too: say it once, here"
    elif method in NEED_DRAFT and not engine.draft and "model" not in speculative:
        preset = PRESETS.get(engine.preset)
        wanted = preset.draft if preset is not None and preset.draft else "a model to propose with"
        yield (*path, "draft"), ABSENT, f"speculation by `{method}` needs {wanted} here: the folder of one"


NEED_DRAFT = ("draft_model", "eagle", "eagle3")
"""Methods of speculation that propose with a model of their own."""

SET_BY_MSD = {
    "model": "`path` of the [[model]], or `weights` of the [[engine]],",
    "max_num_seqs": "`max_num_seqs` of the [[engine]]",
    "enable_prefix_caching": "`prefix_caching` of the [[engine]]",
}
"""Engine arguments that have a setting of their own, and which."""


def _policy(config: Config) -> Iterator[Finding]:
    policy = config.policy
    modes = {engine.name for engine in config.engine if engine.name}
    if policy.name not in POLICY_NAMES:
        yield ("policy", "name"), policy.name, f"there is no such policy; {nearest(policy.name, POLICY_NAMES)}"
    if policy.mode and policy.mode not in modes:
        yield ("policy", "mode"), policy.mode, f"no [[engine]] has this name; {nearest(policy.mode, modes)}"
    if policy.name == "learned" and not policy.learned.file:
        message = "missing: `learned` runs a trained router; `msd train-router --out FILE` writes one"
        yield ("policy", "learned", "file"), ABSENT, message
    rules = policy.rules
    if rules.short_output_tokens >= rules.long_output_tokens:
        message = f"must be less than long_output_tokens ({rules.long_output_tokens:,})"
        yield ("policy", "rules", "short_output_tokens"), rules.short_output_tokens, message
    if rules.short_prompt_tokens >= rules.long_prompt_tokens:
        message = f"must be less than long_prompt_tokens ({rules.long_prompt_tokens:,})"
        yield ("policy", "rules", "short_prompt_tokens"), rules.short_prompt_tokens, message


def _quality(config: Config) -> Iterator[Finding]:
    reference = config.quality.reference
    modes = {engine.name for engine in config.engine if engine.name}
    if reference and reference not in modes:
        yield ("quality", "reference"), reference, f"no [[engine]] has this name; {nearest(reference, modes)}"


def _gate(config: Config, base_dir: FilePath) -> Iterator[Finding]:
    """The gate file: it is there, it is one, and nobody has edited it."""
    if config.quality.gate:
        try:
            gate.load(base_dir / config.quality.gate)
        except ConfigError as error:
            yield ("quality", "gate"), config.quality.gate, f"{error}"


def _limits(config: Config) -> Iterator[Finding]:
    limits = config.limits
    for name in get_args(ServiceClass):
        if name not in limits.class_weights:
            yield ("limits", "class_weights", name), ABSENT, "missing; name all three service classes or none"
    if limits.pending_delta_bytes > limits.session_delta_bytes:
        message = f"must be at most session_delta_bytes ({limits.session_delta_bytes:,})"
        yield ("limits", "pending_delta_bytes"), limits.pending_delta_bytes, message


def _endpoints(zmq: ZmqIngressConfig) -> Iterator[Finding]:
    path: Path = ("ingress", "zmq", "endpoints")
    over_tcp = False
    for index, endpoint in enumerate(zmq.endpoints):
        scheme, separator, address = endpoint.partition("://")
        if not separator or scheme not in ("ipc", "tcp"):
            yield (*path, index), endpoint, "must be `ipc:///path` or `tcp://host:port`"
        elif zmq.endpoints.index(endpoint) != index:
            yield (*path, index), endpoint, "the same endpoint stands here twice"
        elif scheme == "ipc":
            if message := _ipc_fault(address):
                yield (*path, index), endpoint, message
        elif message := _tcp_fault(address, zmq):
            yield (*path, index), endpoint, message
        else:
            over_tcp = True
    if zmq.curve_secret_key_file and over_tcp and not zmq.curve_keys_dir:
        message = "missing: with CURVE, only clients whose key is in this folder are let in"
        yield ("ingress", "zmq", "curve_keys_dir"), ABSENT, message


def _ipc_fault(address: str) -> str:
    if address.startswith("@"):
        return "an abstract socket has no permissions: every local user could connect; use a path"
    if address and not address.startswith("/"):
        return "the path must be absolute: `ipc:///run/msd/msd.sock`"
    if (length := len(address.encode())) > MAX_SOCKET_PATH_BYTES:
        return f"the path has {length} bytes; a socket's may have {MAX_SOCKET_PATH_BYTES}"
    return ""


def _tcp_fault(address: str, zmq: ZmqIngressConfig) -> str:
    host, _, port = address.rpartition(":")
    if not host or not (port == "*" or (port.isascii() and port.isdigit() and int(port) <= 65_535)):
        return "must be `tcp://host:port` with a port from 0 to 65535"
    if zmq.curve_secret_key_file:
        return ""
    if not zmq.insecure_tcp:
        return (
            "tcp without CURVE is refused: set curve_secret_key_file and curve_keys_dir "
            "(or, on a loopback address only, insecure_tcp = true)"
        )
    if not _is_loopback(host):
        return f"insecure_tcp is for loopback addresses only, and `{host}` is none; set curve_secret_key_file"
    return ""


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


def _simulated_memory(config: Config) -> Iterator[Finding]:
    together = [engine for engine in config.engine if engine.kind == "sim" and engine.residency == "always"]
    needed = sum(engine.sim.weights_bytes for engine in together)
    if needed > (there := config.telemetry.sim_memory_bytes):
        parts = " + ".join(f"{engine.name} {engine.sim.weights_bytes:,}" for engine in together)
        message = (
            f"the simulated engines' weights_bytes need {needed:,} ({parts}), {needed - there:,} more than there is"
        )
        yield ("telemetry", "sim_memory_bytes"), there, message


def _residency(config: Config) -> Iterator[Finding]:
    """Simulated engines that may move: each must fit beside those that stay, and leave the reserve free.

    Of a real GPU the memory is not known here; its planner goes by the GPU's view.
    """
    there, reserve = config.telemetry.sim_memory_bytes, config.residency.reserve_bytes
    staying = [engine for engine in config.engine if engine.kind == "sim" and engine.residency == "always"]
    stay_bytes = sum(engine.gpu_bytes or engine.sim.weights_bytes for engine in staying)
    for index, engine in enumerate(config.engine):
        if engine.kind != "sim" or engine.residency != "auto":
            continue
        takes = engine.gpu_bytes or engine.sim.weights_bytes
        if takes + stay_bytes + reserve > there:
            message = (
                f"it can never be resident: it takes {takes:,}, the engines that stay {stay_bytes:,} and "
                f"residency.reserve_bytes {reserve:,}, of telemetry.sim_memory_bytes {there:,}"
            )
            yield ("engine", index, "residency"), engine.residency, message


def _files(config: Config, base_dir: FilePath) -> Iterator[Finding]:
    served = {engine.model for engine in config.engine if engine.kind == "vllm" and not engine.weights}
    for index, model in enumerate(config.model):
        if model.path:
            yield from _folder(("model", index, "path"), model.path, base_dir, "config.json")
        elif model.name in served:
            yield ("model", index, "path"), ABSENT, "missing: a vllm engine serves this model"
        if model.tokenizer:
            yield from _folder(("model", index, "tokenizer"), model.tokenizer, base_dir, "tokenizer.json")
    for index, engine in enumerate(config.engine):
        if engine.weights:
            yield from _folder(("engine", index, "weights"), engine.weights, base_dir, "config.json")
        if engine.draft:
            yield from _folder(("engine", index, "draft"), engine.draft, base_dir, "config.json")
    if config.policy.learned.file:
        yield from _exists(
            ("policy", "learned", "file"), config.policy.learned.file, base_dir, FilePath.is_file, "file"
        )
    zmq = config.ingress.zmq
    if zmq.curve_secret_key_file:
        place: Path = ("ingress", "zmq", "curve_secret_key_file")
        yield from _exists(place, zmq.curve_secret_key_file, base_dir, FilePath.is_file, "file")
    if zmq.curve_keys_dir:
        yield from _exists(
            ("ingress", "zmq", "curve_keys_dir"), zmq.curve_keys_dir, base_dir, FilePath.is_dir, "folder"
        )


def _folder(path: Path, value: str, base_dir: FilePath, inside: str) -> Iterator[Finding]:
    """A model's folder: it exists and has what every such folder has."""
    missing = list(_exists(path, value, base_dir, FilePath.is_dir, "folder"))
    yield from missing
    if not missing and not (base_dir / value / inside).is_file():
        yield path, value, f"{base_dir / value} has no {inside}: not a model in Hugging Face format"


def _exists(
    path: Path, value: str, base_dir: FilePath, test: Callable[[FilePath], bool], what: str
) -> Iterator[Finding]:
    if not test(base_dir / value):
        yield path, value, f"there is no {what} {base_dir / value}"
