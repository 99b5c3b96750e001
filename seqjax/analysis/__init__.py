"""The gradient microscope: how information and gradients move through any recurrent cell."""

from .flow import state_parts as state_parts
