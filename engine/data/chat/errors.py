"""Exceptions for invalid chat templates and for conversations they cannot render."""

from engine.errors import ConfigError


class TemplateError(ConfigError):
    """The template is unusable: it does not parse, leaves the sandbox, loops forever or grows without bound."""


class ConversationError(ValueError):
    """The template cannot render this conversation; the message gives the reason."""
