"""Measurements of eva_attn against its peers."""
