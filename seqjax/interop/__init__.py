"""Cells of other libraries as cells of seqjax. Each library is imported only inside its own adapter.

flax-nnx and equinox keep their weights inside their modules, so their adapters take the module's class and its
arguments, build it when `init` has a key, and hold on to its structure alone; `params_from(module)` takes the weights
of one that you already have.
"""
