"""The config file: its schema and its loader.

One YAML file describes a composition. Unknown keys are refused. Each error names the file, the
path in it, the fault, and the allowed values.
"""

from service.config.answer_cache import CacheConfig
from service.config.autoscaling import AutoscalingConfig, GatewaysConfig
from service.config.batches import BatchesConfig
from service.config.circuit_breaker import BreakerConfig
from service.config.command_experts import CommandConfig, ServerCall, SleepCall
from service.config.experts import ExpertConfig, PriceConfig, RemoteConfig
from service.config.feedback import FeedbackConfig
from service.config.guard import GuardConfig
from service.config.loader import load_config, parse_config, read_config
from service.config.pools import MoeCapture, PoolConfig, SimulatedOptions, SwapOptions, VllmOptions
from service.config.prices import PricesConfig
from service.config.recipes import RecipeConfig
from service.config.request_limits import RequestLimits
from service.config.responses import ResponsesConfig
from service.config.router import RouterConfig
from service.config.savings import SavingsConfig
from service.config.schema import SECTIONS, Config
from service.config.section_base import parse_bytes
from service.config.server import ServerConfig
from service.config.shadow import ShadowConfig
from service.config.store import StoreConfig
from service.config.telemetry import TelemetryConfig
from service.config.tenants import BudgetConfig, KeyConfig, LimitsConfig, SpendConfig, TenantConfig

__all__ = [
    "SECTIONS",
    "AutoscalingConfig",
    "BatchesConfig",
    "BreakerConfig",
    "BudgetConfig",
    "CacheConfig",
    "CommandConfig",
    "Config",
    "ExpertConfig",
    "FeedbackConfig",
    "GatewaysConfig",
    "GuardConfig",
    "KeyConfig",
    "LimitsConfig",
    "MoeCapture",
    "PoolConfig",
    "PriceConfig",
    "PricesConfig",
    "RecipeConfig",
    "RemoteConfig",
    "RequestLimits",
    "ResponsesConfig",
    "RouterConfig",
    "SavingsConfig",
    "ServerCall",
    "ServerConfig",
    "ShadowConfig",
    "SimulatedOptions",
    "SleepCall",
    "SpendConfig",
    "StoreConfig",
    "SwapOptions",
    "TelemetryConfig",
    "TenantConfig",
    "VllmOptions",
    "load_config",
    "parse_bytes",
    "parse_config",
    "read_config",
]
