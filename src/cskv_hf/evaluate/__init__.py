"""Measurements that read the compressed cache: perplexity, line retrieval, memory."""
