"""The recurrences and fused operations of an xLSTM language model, as functions on tensors.

Nothing in here knows a module, a process group or a file. Each operation has a plain PyTorch form that is its
specification.
"""
