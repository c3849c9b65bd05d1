"""Bytes on disk: index encodings, checksums, safetensors written and read in streams."""
