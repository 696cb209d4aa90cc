"""Chat templates: Jinja that comes with models and is not trusted."""
