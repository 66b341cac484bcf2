"""Local folders and object stores behind one small protocol, the reader of shards, and safetensors files."""
