"""Pretrained models: find their attention, attach students and LoRA, load them, save what was learned."""
