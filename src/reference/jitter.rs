//! Every element times its own factor near 1: `x * (1 + epsilon * (2u - 1))`.

use crate::dtype::Dtype;
use crate::error::{Error, Result, check_len};

/// `x[i] * (1 + epsilon * (2 u[i] - 1))` in f32, rounded to `D`: with uniform `u`, factors from
/// `U(1 - epsilon, 1 + epsilon)`. The kernel has the same bits.
///
/// # Errors
/// Different lengths, or an `epsilon` that is not finite.
pub fn jitter_fwd<D: Dtype>(epsilon: f32, x: &[D], u: &[f32]) -> Result<Vec<D>> {
    const OP: &str = "jitter_fwd";
    check_len(OP, "u", u.len(), x.len())?;
    if !epsilon.is_finite() {
        let (wanted, got) = ("a finite number".into(), epsilon.to_string());
        return Err(Error::Unsupported { op: OP, argument: "epsilon", wanted, got });
    }
    let factor = |u: f32| epsilon.mul_add(2f32.mul_add(u, -1.0), 1.0);
    Ok(x.iter().zip(u).map(|(x, &u)| D::from_f32(x.to_f32() * factor(u))).collect())
}

#[cfg(test)]
mod tests {
    use half::bf16;

    use super::*;

    #[test]
    fn hand_computed_elements() {
        let x = [1.0, -2.0, 4.0, f32::INFINITY];
        let got = jitter_fwd(0.25, &x, &[0.0, 1.0, 0.5, 0.75]).unwrap();
        assert_eq!(got, [0.75, -2.5, 4.0, f32::INFINITY]);
        let one = [bf16::ONE];
        assert_eq!(jitter_fwd(0.01, &one, &[0.9]).unwrap(), [bf16::from_f32(1.008)]);
        assert!(jitter_fwd(0.25, &x, &[0.0]).is_err());
        assert!(jitter_fwd(f32::NAN, &x, &[0.0; 4]).is_err());
    }
}
