"""Sampling: text token by token, pictures by integrating the flow. Uses the packs and the model of training."""
