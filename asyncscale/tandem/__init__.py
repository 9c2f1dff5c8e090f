"""Engines whose steps are collective, as of a mixture of experts spread over them: they run and pause together.

From pause to pause is a *wave*. It starts when an engine that pauses gets a request, and ends at a step after which all
engines agree, by an all-reduce, that none has work. Between, an engine without requests computes a dummy batch, so that
the others can go on. The engines that step together are a *group*; when one of them dies the group is formed anew, all
of them under the next *generation* number and at wave zero.

Three machines decide this, without I/O, by the messages of `tandem.messages`: `EngineWaves` in each engine,
`CoordinatorWaves` beside the coordinator, `ClientWaves` in each client. Around them:

- `core`: an EngineCore that follows the waves; `member`: that in its process, with the owner at the other end of the
  lifeline. engine/server.py asks it, instead of the core, whether to step or to sleep.
- `meeting`: where the engines of a generation find each other; the owner closes it when the generation is over, so that
  nobody waits there for the dead. `torch_group`: their collective operations over torch.distributed; `lockstep`: those
  of simulated engines, which fail for good when one of them steps alone.
- client/tandem_hub.py: the owner's part. GroupState goes to the engines over their lifelines, and to attached clients
  from the coordinator, which takes their Wakes. A pause and a call in lockstep hold the waves meanwhile.

Engines that step on their own construct none of it.
"""
