"""Adapter folders and files: an `Adapter` enters and a folder is written, or one is read and an `Adapter` leaves.

| file | what |
|---|---|
| `native` | our own folder: a batch of samples bit for bit, experts too |
| `peft`, `peft_experts` | PEFT's folder: one sample; linear modules, convolutions, experts |
| `diffusers` | `pytorch_lora_weights.safetensors`: one sample; linear modules and convolutions |
| `comfyui` | one file in the key style of kohya: one sample; linear modules and convolutions |
| `lora_file` | reads a LoRA file of any of these key styles |
| `combine` | modules with ranks and scales of their own -> one `Adapter` |
| `fit` | an adapter and the model that it is for |
| `files` | reads and writes; a folder appears whole or not at all |
| `read` | finds out which of them a path holds |
"""
