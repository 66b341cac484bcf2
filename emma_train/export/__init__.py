"""Model exchange: public weights in; exports and Qwen3 folders out."""
