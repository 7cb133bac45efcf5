"""Structured logging: an event name and key=value pairs, never a prompt. Text on a terminal, JSON lines elsewhere."""

from __future__ import annotations

import logging
import sys

import structlog

from msd.config import DaemonConfig


def configure(config: DaemonConfig) -> None:
    """Set structlog up for the process; logs go to stderr."""
    as_text = config.log_format == "text" or (config.log_format == "auto" and sys.stderr.isatty())
    renderer: structlog.typing.Processor = (
        structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty()) if as_text else structlog.processors.JSONRenderer()
    )
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(getattr(logging, config.log_level.upper())),
        logger_factory=structlog.WriteLoggerFactory(file=sys.stderr),
        cache_logger_on_first_use=True,
    )
