"""msd, the ModeSwitch daemon: routes LLM requests to the inference mode that serves them best right now."""

__version__ = "0.1.0"
