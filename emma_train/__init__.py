"""emma_train: trains EMMA, one model that understands, makes and edits images (arXiv 2512.04810)."""

__version__ = "0.2.0"
