"""Does the memory help? `deltamem-export eval`: a bundle, run by `deltamem_rt`, answers questions about what it was told, and the same
frozen model without it, with the history in its prompt, and with BM25 answers them too. Nothing here imports PyTorch.
"""
