"""The model room: the decoder in one file, the hub's folder format in and out; LoRA, NF4, adapters."""
