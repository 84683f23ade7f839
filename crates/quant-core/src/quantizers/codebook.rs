//! The nearest level of a codebook.

use crate::Codebook;

/// Finds the nearest level by counting the midpoints below a value; on a midpoint the lower level wins, as in
/// bitsandbytes.
#[derive(Debug)]
pub(super) struct NearestLevel {
    /// Midpoints of neighbouring levels, ascending, padded with infinity.
    midpoints: [f32; 16],
    /// Levels, ascending.
    levels: [f32; 16],
    /// Code of each level.
    codes: [u8; 16],
}

impl NearestLevel {
    pub(super) fn new(codebook: Codebook) -> Self {
        let table = codebook.levels();
        let mut order: Vec<u8> = (0..table.len() as u8).collect();
        // Stable: of FP4's two zeros code 0 is the lower.
        order.sort_by(|&a, &b| table[usize::from(a)].total_cmp(&table[usize::from(b)]));
        let mut nearest = Self { midpoints: [f32::INFINITY; 16], levels: [0.0; 16], codes: [0; 16] };
        for (rank, &code) in order.iter().enumerate() {
            nearest.codes[rank] = code;
            nearest.levels[rank] = table[usize::from(code)];
        }
        for rank in 1..order.len() {
            nearest.midpoints[rank - 1] = (nearest.levels[rank - 1] + nearest.levels[rank]) / 2.0;
        }
        nearest
    }

    #[inline]
    fn rank(&self, x: f32) -> usize {
        usize::from(self.midpoints.iter().map(|&midpoint| u8::from(x > midpoint)).sum::<u8>())
    }

    /// Code of the level nearest to `x`.
    #[inline]
    pub(super) fn code(&self, x: f32) -> u8 {
        self.codes[self.rank(x)]
    }

    /// The level nearest to `x`.
    #[inline]
    pub(super) fn level(&self, x: f32) -> f32 {
        self.levels[self.rank(x)]
    }
}
