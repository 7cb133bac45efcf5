"""config.toml -> frozen Structs: the only reader of settings.

`load` finds the file, decodes it and applies the rules that span fields; whatever is wrong with it is reported at once,
each with file, line, dotted field, value, what is allowed, and the nearest valid key.
"""

from msd.config.file import find, load, parse
from msd.config.problems import InvalidConfigError, Problem
from msd.config.schema import (
    POLICY_NAMES,
    Config,
    DaemonConfig,
    EnergyConfig,
    EngineConfig,
    IngressConfig,
    JournalConfig,
    LimitsConfig,
    ModelConfig,
    PolicyConfig,
    RulesConfig,
    SimEngineConfig,
    TelemetryConfig,
    TenantConfig,
    ZmqIngressConfig,
)

__all__ = [
    "POLICY_NAMES",
    "Config",
    "DaemonConfig",
    "EnergyConfig",
    "EngineConfig",
    "IngressConfig",
    "InvalidConfigError",
    "JournalConfig",
    "LimitsConfig",
    "ModelConfig",
    "PolicyConfig",
    "Problem",
    "RulesConfig",
    "SimEngineConfig",
    "TelemetryConfig",
    "TenantConfig",
    "ZmqIngressConfig",
    "find",
    "load",
    "parse",
]
