"""The OpenAI-compatible endpoints: one file a family."""
