"""What a test needs to run real Megatron-Core and real checkpoints on a CPU in seconds; public on purpose.

In: nothing. Out: `tiny_models` (small Hugging Face MoE checkpoints), `ranks` (a multi-process harness).
"""
