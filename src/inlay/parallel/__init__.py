"""Adapters on a base that is spread over processes: tensor parallelism (DTensor) and FSDP2.

``placement`` says how a slot is sharded, given the base weight; ``tensors`` holds the one gather and the one scatter;
``hooks`` moves what turns inputs into distributed tensors from the base layer to the adapted one; ``fsdp`` knows which
modules ``fully_shard`` manages. Nothing here imports ``torch.distributed.tensor`` before a base weight needs it.

The order is: tensor parallelism first, then injection, then ``fully_shard`` (or DDP).
"""
