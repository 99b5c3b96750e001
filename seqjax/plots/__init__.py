"""Figures of the analyses. Each function draws a result on matplotlib axes and returns the axes.

matplotlib is imported when the first figure is drawn, so `import seqjax` works without it.
"""

from .cliff import loss_cliff as loss_cliff
from .gradients import cell_path as cell_path
from .gradients import clipping as clipping
from .gradients import clipping_factor as clipping_factor
from .gradients import gradient_by_lag as gradient_by_lag
from .gradients import gradient_heat_map as gradient_heat_map
from .gradients import gradients_by_lag as gradients_by_lag
from .gradients import loss_gradient as loss_gradient
from .scores import learning_curves as learning_curves
from .scores import loss_by_length as loss_by_length
from .scores import loss_by_position as loss_by_position
from .spectra import eigenvalues as eigenvalues
from .spectra import lyapunov_convergence as lyapunov_convergence
from .spectra import lyapunov_spectra as lyapunov_spectra
from .spectra import lyapunov_spectrum as lyapunov_spectrum
from .spectra import product_singular_values as product_singular_values
from .spectra import singular_values as singular_values
from .states import gate_histogram as gate_histogram
from .states import gate_saturation as gate_saturation
from .states import principal_plane as principal_plane
from .states import state_portrait as state_portrait
from .states import time_constants as time_constants
