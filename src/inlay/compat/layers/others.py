"""What PEFT's layer classes of other methods than LoRA have beside weights and numbers by adapter name."""

MEMBERS: dict = {}
