"""The same client for synchronous programs: every call blocks the calling thread instead of being awaited::

    from asyncscale.blocking import AsyncScaleClient

    with AsyncScaleClient("smollm2-135m-instruct", num_engines=2) as client:
        for token in client.generate("The capital of France is", max_tokens=32):
            print(token, end="", flush=True)

        generations = [client.generate(prompt, max_tokens=32) for prompt in prompts]  # all at once
        texts = [generation.result().text for generation in generations]

Names, arguments and errors are those of `asyncscale`, whose `SamplingParams`, `SimulatedModel` and the rest go with it.
The event loop runs in a thread of its own, so any number of threads may use one client, and so may a notebook's cell.
"""

from asyncscale.blocking.client import AsyncScaleClient
from asyncscale.blocking.generation import Generation

__all__ = ["AsyncScaleClient", "Generation"]
