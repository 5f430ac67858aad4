"""What an adapter is tested with: tiny models, forked ranks, misalignments planted into an engine.

In: nothing. Out: `tiny_models` (small Hugging Face MoE checkpoints), `ranks` (a multi-process
harness), `misrouting` and `drawn_steps` (wrong routes, for the guard to find).
"""
