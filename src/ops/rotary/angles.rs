//! Sines and cosines of many positions.

/// Positions with one coarse angle; the fine angles of as many are made beforehand.
const FINE: i64 = 64;
/// Calls of fewer tokens compute every sine.
const WORTH: usize = 256;

/// Makes `exp(i p f)`: `p = 64 a + b` as the product of two, of which the first seldom changes and the second is kept.
pub(super) struct Angles<'a> {
    frequencies: &'a [f64],
    /// +1, or -1 to turn back.
    sign: f64,
    /// `[FINE, R / 2]` of (cos, sin), or empty.
    fine: Vec<(f64, f64)>,
}

/// The coarse factor that a walk through positions last used.
pub(super) struct Cursor {
    coarse: Option<i64>,
    factors: Vec<(f64, f64)>,
}

impl<'a> Angles<'a> {
    pub(super) fn new(frequencies: &'a [f64], inverse: bool, tokens: usize) -> Self {
        let sign = if inverse { -1.0 } else { 1.0 };
        let fine = if tokens < WORTH { 0 } else { FINE };
        let fine = (0..fine).flat_map(|b| frequencies.iter().map(move |f| turn(b, *f))).collect();
        Self { frequencies, sign, fine }
    }

    pub(super) fn cursor(&self) -> Cursor {
        Cursor { coarse: None, factors: vec![(1.0, 0.0); self.frequencies.len()] }
    }

    /// Calls `put(i, cos, sin)` for every frequency at `position`.
    pub(super) fn at(&self, position: i64, cursor: &mut Cursor, mut put: impl FnMut(usize, f64, f64)) {
        if self.fine.is_empty() {
            for (i, &f) in self.frequencies.iter().enumerate() {
                let (cos, sin) = turn(position, f);
                put(i, cos, self.sign * sin);
            }
            return;
        }
        let (coarse, fine) = (position.div_euclid(FINE), position.rem_euclid(FINE) as usize);
        if cursor.coarse != Some(coarse) {
            for (factor, &f) in cursor.factors.iter_mut().zip(self.frequencies) {
                *factor = turn(coarse * FINE, f);
            }
            cursor.coarse = Some(coarse);
        }
        let width = self.frequencies.len();
        let fine = &self.fine[fine * width..(fine + 1) * width];
        for (i, (&(c, s), &(fc, fs))) in cursor.factors.iter().zip(fine).enumerate() {
            put(i, c * fc - s * fs, self.sign * (c * fs + s * fc));
        }
    }
}

fn turn(position: i64, frequency: f64) -> (f64, f64) {
    let (sin, cos) = (position as f64 * frequency).sin_cos();
    (cos, sin)
}
