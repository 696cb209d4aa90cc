"""What can be wrong with a chat template, and with a conversation for it."""

from engine.errors import ConfigError


class TemplateError(ConfigError):
    """The template itself is unusable: it does not parse, tries to escape, loops forever, grows without bound."""


class ConversationError(ValueError):
    """The template cannot render this conversation; the message gives the reason."""
