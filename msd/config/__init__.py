"""config.toml -> frozen Structs: the only reader of settings.

`load` finds the file, decodes it and applies the rules that span fields; whatever is wrong with it is reported at once,
each with file, line, dotted field, value, what is allowed, and the nearest valid key.
"""

from msd.config.file import find, load, parse
from msd.config.problems import InvalidConfigError, Problem
from msd.config.schema import (
    POLICY_NAMES,
    Config,
    CostConfig,
    DaemonConfig,
    EnergyConfig,
    EngineConfig,
    HttpIngressConfig,
    IngressConfig,
    JournalConfig,
    LearnedConfig,
    LimitsConfig,
    ModelConfig,
    PolicyConfig,
    QualityConfig,
    ResidencyConfig,
    RulesConfig,
    SimEngineConfig,
    TelemetryConfig,
    TenantConfig,
    ZmqIngressConfig,
)

__all__ = [
    "POLICY_NAMES",
    "Config",
    "CostConfig",
    "DaemonConfig",
    "EnergyConfig",
    "EngineConfig",
    "HttpIngressConfig",
    "IngressConfig",
    "InvalidConfigError",
    "JournalConfig",
    "LearnedConfig",
    "LimitsConfig",
    "ModelConfig",
    "PolicyConfig",
    "Problem",
    "QualityConfig",
    "ResidencyConfig",
    "RulesConfig",
    "SimEngineConfig",
    "TelemetryConfig",
    "TenantConfig",
    "ZmqIngressConfig",
    "find",
    "load",
    "parse",
]
