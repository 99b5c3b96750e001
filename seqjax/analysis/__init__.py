"""The gradient microscope: how information and gradients move through any recurrent cell."""

from .flow import state_parts as state_parts
from .jacobians import JacobianProduct as JacobianProduct
from .jacobians import StepJacobians as StepJacobians
from .jacobians import jacobian_product as jacobian_product
from .jacobians import step_jacobians as step_jacobians
from .lyapunov import LyapunovExponents as LyapunovExponents
from .lyapunov import kaplan_yorke_dimension as kaplan_yorke_dimension
from .lyapunov import lyapunov_exponents as lyapunov_exponents
from .singular_values import ProductSingularValues as ProductSingularValues
from .singular_values import product_singular_values as product_singular_values
from .spectra import MatrixSpectrum as MatrixSpectrum
from .spectra import Spectrum as Spectrum
from .spectra import matrix_spectrum as matrix_spectrum
from .spectra import recurrent_matrices as recurrent_matrices
from .spectra import spectrum as spectrum
from .gradient_flow import GradientByLag as GradientByLag
from .gradient_flow import gradient_by_lag as gradient_by_lag
from .gradient_flow import memory_horizon as memory_horizon
