from __future__ import annotations

import torch

# Tiny tensors: more threads would only fight each other and pytest's workers.
torch.set_num_threads(1)
