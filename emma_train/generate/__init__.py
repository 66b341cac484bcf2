"""Sampling: text token by token, images by integrating the flow. Uses the packs and the model of training."""
