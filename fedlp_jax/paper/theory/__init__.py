"""What FedLP's masks do on average: exact numbers, computed on the host in float64.

For one layer, with keep probabilities `p_k` and weights `a_k` of the C clients of a cohort:

    N = sum m_k                        its senders: a Poisson-binomial number
    q = P(N > 0) = 1 - prod (1 - p_k)  the share of rounds that update it
    rho = E[1/N | N > 0]               scales the variance of the masked mean
    u = sum w_k d_k                    the aggregate of the clients' updates d_k; the moments of its
                                       weights w_k determine those of u

docs/theory.md derives every formula and proves a convergence theorem for FedLP-Homo.
"""

from fedlp_jax.paper.theory.convergence import gradient_bound as gradient_bound
from fedlp_jax.paper.theory.convergence import quadratic_error as quadratic_error
from fedlp_jax.paper.theory.senders import Uploads as Uploads
from fedlp_jax.paper.theory.senders import communication as communication
from fedlp_jax.paper.theory.senders import inverse_senders as inverse_senders
from fedlp_jax.paper.theory.senders import sampling_variance as sampling_variance
from fedlp_jax.paper.theory.senders import senders as senders
from fedlp_jax.paper.theory.senders import updated as updated
from fedlp_jax.paper.theory.senders import uploads as uploads
from fedlp_jax.paper.theory.weights import EffectiveWeights as EffectiveWeights
from fedlp_jax.paper.theory.weights import cohort_mean as cohort_mean
from fedlp_jax.paper.theory.weights import inverse_probability as inverse_probability
from fedlp_jax.paper.theory.weights import masked_mean as masked_mean
from fedlp_jax.paper.theory.weights import sampled_masked_mean as sampled_masked_mean
