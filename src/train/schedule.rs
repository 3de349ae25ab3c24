//! The learning rate over the steps.

use crate::{Error, Result};
use serde::{Deserialize, Serialize};

/// Linear warm-up, then half a cosine down to a share of the peak, then constant.
///
/// Step `s` (from 0) gets the share
///
/// ```text
/// (s + 1) / warmup                                         s < warmup
/// min + (1 - min) (1 + cos(pi p)) / 2                      p = (s - warmup) / (steps - warmup)
/// min                                                      s >= steps
/// ```
///
/// of the peak rate: the first step already learns, the last step of the warm-up and the one after have the full rate.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Schedule {
    /// The largest learning rate.
    #[serde(with = "super::exact")]
    pub peak: f64,
    /// Steps of the warm-up.
    pub warmup: u64,
    /// The step at which the lowest rate is reached.
    pub steps: u64,
    /// The lowest rate, as a share of the peak.
    #[serde(with = "super::exact")]
    pub min_ratio: f64,
}

impl Schedule {
    /// Warm-up over `warmup` steps, then a cosine to a tenth of `peak` at `steps`.
    pub fn cosine(peak: f64, warmup: u64, steps: u64) -> Self {
        Self { peak, warmup, steps, min_ratio: 0.1 }
    }

    /// The same rate at every step.
    pub fn constant(rate: f64) -> Self {
        Self { peak: rate, warmup: 0, steps: 0, min_ratio: 1.0 }
    }

    /// The learning rate of step `step`, counted from 0.
    pub fn rate(&self, step: u64) -> f64 {
        let share = if step < self.warmup {
            (step + 1) as f64 / self.warmup as f64
        } else if step >= self.steps {
            self.min_ratio
        } else {
            let progress = (step - self.warmup) as f64 / (self.steps - self.warmup) as f64;
            let cosine = (std::f64::consts::PI * progress).cos();
            self.min_ratio + (1.0 - self.min_ratio) * 0.5 * (1.0 + cosine)
        };
        self.peak * share
    }

    /// Checks the rates.
    ///
    /// # Errors
    /// A peak that is negative or no number, a share outside 0 to 1.
    pub fn validate(&self) -> Result<()> {
        if !(self.peak >= 0.0 && self.peak.is_finite()) {
            return Err(Error::value("schedule: peak", "a finite number, at least 0", self.peak));
        }
        if !(0.0..=1.0).contains(&self.min_ratio) {
            return Err(Error::value("schedule: min_ratio", "a number from 0 to 1", self.min_ratio));
        }
        Ok(())
    }
}
