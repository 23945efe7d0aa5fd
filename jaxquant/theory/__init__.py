"""Measurements that say why quantization is hard, or how far it can go."""
