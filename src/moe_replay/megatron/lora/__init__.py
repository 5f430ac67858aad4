"""LoRA: low-rank adapters beside the frozen weights of a Megatron model."""
