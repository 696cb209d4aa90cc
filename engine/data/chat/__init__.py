"""Conversations to token ids: sandboxed chat templates, assistant turns, target masks."""
