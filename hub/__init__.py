"""Packing thousands of models on many machines: what is a model, which is whose base, engines, receipts."""
