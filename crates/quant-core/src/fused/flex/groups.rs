//! Sums of neighbouring values and their adjoint, on the CPU.

use rayon::prelude::*;

use crate::ops::flex::simd::vectorize;

/// Groups of a task.
const TASK: usize = 1 << 13;

/// Calls `$f::<SIZE>` for the sizes worth compiling apart, else `$f::<0>`, which reads the size at run time.
macro_rules! by_size {
    ($size:expr, $f:ident($($arg:expr),*)) => {
        match $size {
            2 => $f::<2>($($arg),*),
            4 => $f::<4>($($arg),*),
            8 => $f::<8>($($arg),*),
            _ => $f::<0>($($arg),*),
        }
    };
}

/// The sum of each `size` neighbours.
pub(super) fn sum(x: &[f32], size: usize) -> Vec<f32> {
    let mut y = vec![0.0; x.len() / size];
    y.par_chunks_mut(TASK).zip(x.par_chunks(TASK * size)).for_each(|(y, x)| {
        vectorize(|| by_size!(size, sum_part(y, x, size)));
    });
    y
}

#[inline(always)]
fn sum_part<const SIZE: usize>(y: &mut [f32], x: &[f32], size: usize) {
    let size = if SIZE == 0 { size } else { SIZE };
    for (y, group) in y.iter_mut().zip(x.chunks_exact(size)) {
        // Several sums at once, so that long groups don't wait for one addition after the other.
        let (fours, rest) = group.as_chunks::<4>();
        let mut sums = [0.0; 4];
        for four in fours {
            for (sum, x) in sums.iter_mut().zip(four) {
                *sum += x;
            }
        }
        *y = (sums[0] + sums[1]) + (sums[2] + sums[3]) + rest.iter().sum::<f32>();
    }
}

/// Adds `update[i]` to `y[i * times ..][.. times]`.
pub(super) fn add_repeated(y: &mut [f32], update: &[f32], times: usize) {
    y.par_chunks_mut(TASK * times).zip(update.par_chunks(TASK)).for_each(|(y, update)| {
        vectorize(|| by_size!(times, add_part(y, update, times)));
    });
}

#[inline(always)]
fn add_part<const TIMES: usize>(y: &mut [f32], update: &[f32], times: usize) {
    let times = if TIMES == 0 { times } else { TIMES };
    for (group, update) in y.chunks_exact_mut(times).zip(update) {
        for y in group {
            *y += update;
        }
    }
}
