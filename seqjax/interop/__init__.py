"""Cells of other libraries as cells of seqjax. Each library is imported only inside its own adapter.

In flax-nnx and equinox, the weights are part of the module. Their adapters therefore take the class of the module and
its arguments. They build the module in `init` and store only its structure. `params_from(module)` returns the weights
of an existing module.
"""
