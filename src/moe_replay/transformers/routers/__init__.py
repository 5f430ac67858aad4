"""Routers of Hugging Face models: where they are, what they choose, and proof that it can be set.

In: a model. Out: RouterSite, `find_routers`, `tapped`, `weigh_experts`.
"""
