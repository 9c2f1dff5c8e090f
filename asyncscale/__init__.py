"""asyncscale: a language model on every core you have, as one asyncio client. See `AsyncScaleClient`."""
