"""Conversations to token ids: chat templates in their sandbox, turns, masks."""
