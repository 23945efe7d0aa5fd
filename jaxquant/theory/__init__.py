"""Measurements that show why quantization is hard, and how far it can go."""
