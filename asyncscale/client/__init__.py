"""The client: engines supervised, requests routed, tokens streamed."""
