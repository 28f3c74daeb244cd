"""Write adapters to folders and files of ours and of other tools, read them, and prove that the tools load them.

| file | what |
|---|---|
| `native` | our own folder: a batch of samples bit for bit, experts and every operator |
| `peft`, `peft_experts`, `peft_ia3`, `peft_operators` | PEFT's folder: one sample; modules, experts, other operators |
| `single_file` | diffusers' and ComfyUI's LoRA files: one sample; linear modules and convolutions, LoRA alone |
| `lora_file` | reads a LoRA file of any of these key styles |
| `peft_config` | what a LoraConfig says, in a folder or in a file's header: ranks, alphas, options that are refused |
| `comfyui_names` | which names of diffusers' modules ComfyUI translates |
| `fit` | an adapter and the model that it is for; modules with ranks and scales of their own -> one `Adapter` |
| `files` | reads and writes; a folder appears whole or not at all |
| `read` | finds out which of them a path holds |
| `proof` | exports with proof that the tool reads the folder and computes the same |
"""
