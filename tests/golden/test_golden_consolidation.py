"""SNR figures and the resonance transform against the original's, given its fast weights and its random basis."""

import jax.numpy as jnp
import numpy as np
import pytest

from phase2_jax.memory.resonance import project
from phase2_jax.memory.snr import snr_ratio


@pytest.mark.parametrize("layer", [0, 1])
def test_snr(activations, layer):
    """The original took one σ over the whole batch, Bessel-corrected, and averaged |W|/σ over each row."""
    ratio_BxHxKxV = snr_ratio(jnp.asarray(activations[f"eval1/layer{layer}/W_raw"]), axis=None, ddof=1)
    # Means of 512 float32 numbers.
    np.testing.assert_allclose(
        jnp.mean(ratio_BxHxKxV, axis=(1, 2, 3)), activations[f"eval1/layer{layer}/snr_per_sample"], rtol=1e-5
    )


@pytest.mark.parametrize("layer", [0, 1])
def test_resonance_transform(activations, layer):
    """The original zeroed the masked rows of U⁻¹WU and transformed back: Re(U diag(mask) U⁻¹ W)."""
    prefix = f"eval1/layer{layer}"
    basis_KxK = activations[f"{prefix}/U"].astype(np.complex128)
    mask_BxHxK = activations[f"{prefix}/res_mask"]
    assert not mask_BxHxK.all(), "no mode was masked, so the data could not tell a filter from the identity"
    filtered = project(
        jnp.asarray(activations[f"{prefix}/W_raw"]), jnp.asarray(mask_BxHxK), basis_KxK, np.linalg.inv(basis_KxK)
    )
    # The bases' condition numbers, 63 and 41, amplify float32's 6e-8; the reference was recomputed in complex128.
    scale = np.abs(activations[f"{prefix}/W_final_c128"]).max()
    np.testing.assert_allclose(filtered, activations[f"{prefix}/W_final_c128"], atol=2e-5 * scale)
