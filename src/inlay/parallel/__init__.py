"""Adapters on a base that is spread over processes: tensor parallelism (DTensor), FSDP2, both, and DDP.

``placement`` says how a slot is spread, given the base weight; ``tensors`` holds the one gather and the one scatter,
and what operators need where tensors are spread; ``hooks`` moves what makes inputs distributed from the base layer to
the adapted one; ``fsdp`` knows which modules ``fully_shard`` manages. Nothing here imports
``torch.distributed.tensor`` before a base weight needs it.

The order is tensor parallelism, injection, then ``fully_shard`` or DDP: a module that ``fully_shard`` manages takes no
new parameters and is refused. Saving, loading, merging and ejecting are collective: every process calls them, the
first one writes (``is_main_process``). A merge gathers one layer at a time and each process writes its part.

Initial values under tensor parallelism are those of the mesh's first process; under ``fully_shard``, which cuts what
each process has, all processes must inject with the same seed. FSDP2 asks for one dtype among the trained parameters
of a unit (older releases: among all of them), so full copies in half precision need float32 too, or adapters in the
base's dtype (``autocast_adapter_dtype=False``).
"""
