"""Files: the serializer strategy, safetensors, the metadata, saving, loading."""
