"""Chat models, with or without vision, asked for text or JSON: behind an endpoint, or in process."""
