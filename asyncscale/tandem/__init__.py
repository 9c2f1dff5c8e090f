"""Engines whose steps are collective, as of a mixture of experts spread over them: they run and pause together.

From pause to pause is a *wave*. It starts when an engine that pauses gets a request, and ends at a step after which all
engines agree, by an all-reduce, that none has work. Between, an engine without requests computes a dummy batch, so that
the others can go on. The engines that step together are a *group*; when one of them dies the group is formed anew, all
of them under the next *generation* number and at wave zero.

Three machines decide this, without I/O, by the messages of `tandem.messages`: `EngineWaves` in each engine,
`CoordinatorWaves` beside the coordinator, `ClientWaves` in each client. `TandemCore` is an `EngineCore` that follows
them. Models that are not spread construct none. `tandem.lockstep` has simulated engines that fail a test when one of
them steps alone.

Where they are to be plugged in:

- engine/server.py: a `TandemCore` around the core; where it looks at `core.has_work`, to step or to sleep in poll, it
  looks at `running`. What the core has to say without a step, as of a request that it refuses, needs a way out of it
  that computes nothing: `EngineCore.flush`.
- model/runner.py: `Collectives` over torch.distributed, whose errors become CollectiveError, and `execute_dummy`.
- client/supervisor.py: an engine that is ready or dead is `engine_joined` or `engine_died`. The owner hosts the store
  at which a generation meets, one for each, and closes it when that is over, so that nobody waits there for the dead.
- client/coordinator.py: GroupState goes to all engines, over the owner's connections (again to one that reconnects),
  and to all clients; Wake comes from clients. pause is `hold`, resume `release`; a call in lockstep is hold, wait for
  `at_rest`, call, release.
- client/dispatcher.py: for each request that is sent, `request_sent()`, and its Wake to the coordinator.
"""
