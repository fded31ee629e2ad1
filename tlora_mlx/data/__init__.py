"""Rows to token ids to batches; the formats and chat templates are mlx-lm's."""
